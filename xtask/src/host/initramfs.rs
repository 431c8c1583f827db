//! What an emulated host boots from: its init, the job's files, and a script that runs it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::Result;

use super::job::Job;
use crate::initramfs::Archive;
use crate::packages::Module;

const HOST_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
# Nobody can pivot away from the kernel's first mount (pivot_root(2)), which sandboxes of daemons
# want to. The same files, mounted once more on top of it, are a root like any other.
if [ -z "$ARMLET_RIG_ROOT" ]; then
    export ARMLET_RIG_ROOT=1
    umount /proc
    mkdir /mnt
    mount --bind / /mnt
    cd /mnt
    mount --move . /
    exec chroot . /init
fi
export PATH=/bin HOME=/root TERM=linux
dmesg -n 1
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
ip link set lo up
hostname host
for module in /rig/modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
for disk in /sys/block/vd*; do
    [ -e "$disk/serial" ] || continue
    case "$(cat "$disk/serial")" in
        tools)
            ln -s "${disk##*/}" /dev/tools
            mkdir /tools
            mount -t ext4 -o ro "/dev/${disk##*/}" /tools
            # Programs find their libraries and data where they were made for.
            ln -s /tools/usr/lib /lib
            ln -s /tools/usr/lib64 /lib64
            for folder in lib libexec sbin share; do ln -s "/tools/usr/$folder" "/usr/$folder"; done
            export PATH=/bin:/tools/usr/bin:/tools/usr/sbin
            ;;
        data) mkdir /data && mount -t ext4 "/dev/${disk##*/}" /data ;;
    esac
done
# All else is the initramfs itself, in memory too: a job's files may lie anywhere, below /tmp also.
exec </dev/null >/dev/console 2>&1
stty -onlcr -echo </dev/console
printf '\036ARMLET-RIG-START\n'
/bin/sh /rig/run
status=$?
# Changing a terminal's settings waits until all output has left it.
stty sane </dev/console
printf '\036ARMLET-RIG-EXIT %d\n' $status
# The rig ends the machine when it sees the mark; this is for when nobody looks.
sleep 5
poweroff -f
"#;

/// The second one is who programs become that need no rights.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n";

/// Writes the archive to `file`.
pub(super) fn write_initramfs(
    file: &File,
    busybox: &Path,
    modules: &[Module],
    job: &Job,
    terminal: bool,
) -> Result<()> {
    let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, file));
    for folder in ["/dev", "/proc", "/sys", "/root"] {
        archive.folder(folder)?;
    }
    // The kernel opens this as the init's terminal before /dev is mounted.
    archive.device("/dev/console", 0o600, (5, 1))?;
    archive.file_from("/bin/busybox", 0o755, busybox)?;
    // Scripts name their interpreter in either folder.
    archive.symlink("/usr/bin", "/bin")?;
    archive.file("/init", 0o755, HOST_INIT.as_bytes())?;
    archive.file("/rig/run", 0o755, run_script(job, terminal).as_bytes())?;
    for (index, module) in modules.iter().enumerate() {
        let path = format!("/rig/modules/{index:02}-{}.ko", module.name);
        archive.file(path, 0o644, &module.data)?;
    }
    archive.file("/etc/passwd", 0o644, PASSWD.as_bytes())?;
    archive.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    if !job.folder.as_os_str().is_empty() {
        archive.folder(&job.folder)?;
    }
    let mut there = BTreeSet::new();
    for file in &job.files {
        if there.insert(&file.to) {
            archive.file_from(&file.to, file.mode, &file.from)?;
        }
    }
    archive.finish()?;
    Ok(())
}

/// Returns the script that becomes the job's program.
fn run_script(job: &Job, terminal: bool) -> String {
    let mut script = String::new();
    for (name, value) in &job.environment {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    if !job.folder.as_os_str().is_empty() {
        script.push_str(&format!(
            "cd {} || exit 125\n",
            quoted(&job.folder.to_string_lossy())
        ));
    }
    let words = job
        .command
        .iter()
        .map(|word| quoted(word))
        .collect::<Vec<_>>()
        .join(" ");
    // A session of its own makes the console its controlling terminal.
    let terminal = if terminal {
        "stty sane </dev/console\nexec setsid cttyhack "
    } else {
        "exec "
    };
    script.push_str(&format!("{terminal}{words}\n"));
    script
}

/// `word` as a shell takes it literally.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_program_unchanged() {
        let job = Job {
            command: vec!["/bin/a".to_owned(), "it's $HOME".to_owned()],
            environment: vec![("A".to_owned(), "x y".to_owned())],
            folder: "/w".into(),
            ..Job::default()
        };
        assert_eq!(
            run_script(&job, false),
            "export A='x y'\ncd '/w' || exit 125\nexec '/bin/a' 'it'\\''s $HOME'\n"
        );
    }
}
