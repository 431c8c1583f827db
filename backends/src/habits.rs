//! Values of device options as other VMMs write them, rewritten as armlet takes them.

use crate::kind::{Guest, Kind};
use crate::options::split;

/// What others write in a value, and what stands for it here. A part of a value is looked up as a whole
/// (`ro`), then by its name with the equals sign (`file=`). An empty text leaves the part out.
type Words = &'static [(&'static str, &'static str)];

/// Disks of QEMU, kvmtool, Cloud Hypervisor and crosvm.
const DISK: Words = &[
    ("file=", "path="),
    ("ro", "readonly"),
    ("ro=", "readonly="),
    ("ro=true", "readonly"),
    ("read-only=", "readonly="),
    ("readonly=true", "readonly"),
    ("readonly=false", ""),
    ("media=cdrom", "readonly"),
    ("media=", ""),
    ("serial=", "id="),
    ("num_queues=", "queues="),
    ("num-queues=", "queues="),
    ("block_size=", "block-size="),
    ("image_type=", "format="),
    ("direct=on", "cache=none"),
    ("direct=true", "cache=none"),
    ("direct=", ""),
    ("if=", ""),
    ("index=", ""),
    ("aio=io_uring", "engine=io_uring"),
    ("aio=", ""),
    ("root=", ""),
    ("sparse=", ""),
    ("discard=", ""),
    ("queue_size=", ""),
];

/// Cards of QEMU, kvmtool, Cloud Hypervisor and crosvm.
const NET: Words = &[
    ("mode=user", "user"),
    ("mode=tap", ""),
    ("tapif=", "tap="),
    ("ifname=", "tap="),
    ("tap-name=", "tap="),
    ("tap_name=", "tap="),
    ("guest_mac=", "mac="),
    // QEMU's word for the kind, followed by ifname=.
    ("tap", ""),
    ("vhost=true", "vhost=on"),
    ("vhost=1", "vhost=on"),
    ("vhost=0", "vhost=off"),
    ("vhost_net", "vhost=on"),
    ("id=", ""),
    ("model=", ""),
    ("script=", ""),
    ("downscript=", ""),
    ("guest_ip=", ""),
    ("host_ip=", ""),
    ("ip=", ""),
    ("mask=", ""),
    ("trans=", ""),
    ("num_queues=", ""),
    ("queue_size=", ""),
];

/// Folders of QEMU and Cloud Hypervisor.
const SHARE: Words = &[
    ("mount_tag=", "tag="),
    ("local", ""),
    ("security_model=", ""),
    ("id=", ""),
    ("readonly=true", "readonly"),
];

/// Sockets of Cloud Hypervisor, crosvm and QEMU.
const VSOCK: Words = &[("socket=", "uds="), ("guest-cid=", "cid="), ("id=", "")];

/// Persistent memory of QEMU, Cloud Hypervisor and crosvm.
const PMEM: Words = &[
    ("file=", "path="),
    ("mem-path=", "path="),
    ("ro", "readonly"),
    ("ro=true", "readonly"),
    ("readonly=true", "readonly"),
    ("discard_writes=on", "readonly"),
    ("discard_writes=", ""),
    ("size=", ""),
    ("id=", ""),
];

/// Balloons of Cloud Hypervisor.
const BALLOON: Words = &[
    ("deflate_on_oom=", "deflate-on-oom="),
    ("free_page_reporting=", "reporting="),
];

/// Terminals of QEMU, kvmtool and Cloud Hypervisor.
const CONSOLE: Words = &[
    ("hv", "virtio"),
    ("hvc0", "virtio"),
    ("tty", "virtio"),
    ("pty", "virtio"),
    ("off", "serial"),
    ("null", "serial"),
    ("ttyAMA0", "serial"),
    ("ttyS0", "serial"),
];

/// Sources of random numbers: there is one.
const RNG: Words = &[
    ("src=", "on"),
    ("filename=", "on"),
    ("true", "on"),
    ("false", "off"),
];

fn words_of(kind: &Kind) -> Words {
    match kind.name {
        "disk" => DISK,
        "net" => NET,
        "share" => SHARE,
        "vsock" => VSOCK,
        "pmem" => PMEM,
        "balloon" => BALLOON,
        "console" => CONSOLE,
        "rng" => RNG,
        _ => &[],
    }
}

/// Returns `text`, a value that armlet does not take, as the user most likely means it; `None` where that
/// is not known. What is returned is a valid value.
#[must_use]
pub fn rewrite(kind: &Kind, text: &str, guest: &Guest) -> Option<String> {
    let words = words_of(kind);
    let find = |part: &str| {
        let whole = words.iter().find(|(theirs, _)| *theirs == part);
        if let Some((_, ours)) = whole {
            return (*ours).to_owned();
        }
        let Some((name, value)) = part.split_once('=') else {
            return part.to_owned();
        };
        let named = words
            .iter()
            .find(|(theirs, _)| theirs.strip_suffix('=') == Some(name));
        match named {
            Some((_, ours)) if ours.ends_with('=') => format!("{ours}{value}"),
            Some((_, ours)) => (*ours).to_owned(),
            None => part.to_owned(),
        }
    };
    let parts: Vec<String> = split(text)
        .into_iter()
        .map(find)
        .filter(|part| !part.is_empty())
        .collect();
    let ours = parts.join(",");
    let is_valid = |ours: &String| (kind.parse)(ours, guest).is_ok();
    // A value alone, such as '--vsock 3'.
    let first = match kind.name {
        "vsock" => "cid=",
        "balloon" => "size=",
        _ => "",
    };
    let with_name = format!("{first}{ours}");
    let mut candidates = [ours, with_name].into_iter();
    candidates.find(|ours| ours != text && is_valid(ours))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open::KINDS;

    const GUEST: Guest = Guest {
        memory: 1 << 30,
        parse_size: |text| {
            let number = text.trim_end_matches('M').parse::<u64>();
            number.map_err(|_| format!("size '{text}'"))
        },
        show_size: |bytes| bytes.to_string(),
    };

    fn rewritten(name: &str, text: &str) -> Option<String> {
        let kind = KINDS.iter().find(|kind| kind.name == name);
        rewrite(kind.expect("a kind"), text, &GUEST)
    }

    #[test]
    fn values_of_other_vmms_become_ours() {
        for (kind, theirs, ours) in [
            ("disk", "file=root.img", "path=root.img"),
            (
                "disk",
                "file=root.img,if=virtio,format=qcow2,index=0",
                "path=root.img,format=qcow2",
            ),
            ("disk", "root.img,ro", "root.img,readonly"),
            ("disk", "path=a,,b.img,ro=true", "path=a,,b.img,readonly"),
            ("disk", "path=a.img,direct=on", "path=a.img,cache=none"),
            ("net", "mode=user", "user"),
            ("net", "mode=tap,tapif=tap0", "tap=tap0"),
            (
                "net",
                "mode=tap,tapif=tap0,guest_mac=02:00:00:00:00:01",
                "tap=tap0,mac=02:00:00:00:00:01",
            ),
            ("net", "tap,id=n0,ifname=tap0,script=no", "tap=tap0"),
            (
                "net",
                "user,id=n0,hostfwd=tcp::2222-:22",
                "user,hostfwd=tcp::2222-:22",
            ),
            ("net", "tap=tap0,ip=10.0.0.1,mask=255.0.0.0", "tap=tap0"),
            ("vsock", "cid=3,socket=/tmp/s", "cid=3,uds=/tmp/s"),
            ("vsock", "3", "cid=3"),
            ("pmem", "file=a.img,size=1G", "path=a.img"),
            ("balloon", "64M", "size=64M"),
            ("console", "tty", "virtio"),
            ("rng", "src=/dev/urandom", "on"),
        ] {
            assert_eq!(rewritten(kind, theirs).as_deref(), Some(ours), "{theirs}");
        }
    }

    #[test]
    fn what_nobody_can_mean_is_not_guessed_at() {
        for (kind, text) in [
            ("net", "mode=none"),
            ("net", "nic"),
            ("disk", "nbd=x,y=z"),
            ("disk", "root.img"),
            ("balloon", "much"),
            ("rng", "maybe"),
        ] {
            assert_eq!(rewritten(kind, text), None, "{text}");
        }
    }
}
