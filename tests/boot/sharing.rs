use crate::guest::{Armlet, GLANCE, Input, Tuned, noise, section};
use crate::net::{TRANSFER, give, kill, started, take, wait_until_gone};
use crate::rig::{self, Rig, WITH_DEVICES};
use rustix::process::Signal;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, sleep};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// Bytes that a terminal passes on as they are, and that are no command for armlet.
fn printable(seed: u64, length: usize) -> Vec<u8> {
    let plain = |byte: &u8| b' ' + byte % 95;
    noise(seed, length).iter().map(plain).collect()
}

#[test]
fn every_byte_goes_through_a_virtio_console_both_ways() {
    let Some(rig) = rig::any() else { return };
    const LENGTH: usize = 96 << 10;
    let script = format!(
        "exec 3<>/dev/hvc0
# Settings last as long as somebody has it open.
stty -F /dev/hvc0 raw -echo
printf READY >&3
head -c {LENGTH} <&3 >/tmp/data
cat /tmp/data >&3
printf DONE >&3"
    );
    let mut guest = Armlet::devices(rig, &script)
        .option("--console", "virtio")
        .input(Input::Pipe)
        .start();
    let data = printable(1, LENGTH);
    guest.expect("READY");
    guest.send(&data);
    guest.expect("DONE");
    let outcome = guest.end();
    outcome.assert_status(0);
    let found = outcome.bytes.windows(LENGTH).any(|part| part == data);
    assert!(found, "the bytes did not come back as they were sent");
}

#[test]
fn a_virtio_console_has_the_terminals_size() {
    let Some(rig) = rig::main() else { return };
    // Linux hears of it as it starts and when a program writes, and sets it a moment later.
    let script = "size() { stty -F /dev/hvc0 size; }
until [ \"$(size)\" != '0 0' ]; do sleep 1; done
echo \"SIZE $(size)\"; sleep 1";
    let mut guest = Armlet::devices(rig, script)
        .option("--console", "virtio")
        .input(Input::Terminal)
        .start();
    guest.expect("SIZE 24 80");
    guest.end().assert_status(0);
}

#[test]
fn the_host_gives_entropy() {
    let Some(rig) = rig::any() else { return };
    let script = "cat /sys/class/misc/hw_random/rng_current
head -c 4096 /dev/hwrng | tr -d '\\0' | wc -c";
    let outcome = Armlet::devices(rig, script).run();
    let script = outcome.script();
    let lines: Vec<&str> = script.lines().collect();
    assert_eq!(lines[0], "virtio_rng.0");
    let count: u32 = lines[1].parse().expect("a number");
    assert!(count > 3900, "{count} of 4096 bytes are not zero");
}

/// A guest that runs `script` with Debian's programs in `/mnt`, for `in_debian`.
fn with_tools(rig: &Rig, tools: &Path, script: &str) -> Armlet {
    let script = format!(
        "mkdir -p /mnt
mount -t ext4 -o ro /dev/vda /mnt
mount --bind /dev /mnt/dev; mount --bind /proc /mnt/proc
socat() {{ chroot /mnt /usr/bin/socat \"$@\"; }}
{script}"
    );
    Armlet::devices(rig, &script).option("--disk", format!("path={},readonly", tools.display()))
}

#[test]
fn guest_and_host_talk_over_vsock_through_unix_sockets() {
    let Some(rig) = rig::main() else { return };
    let Some(tools) = rig::tools_disk() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("vsock");
    let on_port = |port: u32| folder.path().join(format!("vsock_{port}"));
    let (out, back) = (
        UnixListener::bind(on_port(5000)).expect("a socket"),
        UnixListener::bind(on_port(5001)).expect("a socket"),
    );
    let giver = thread::spawn(move || give(out.accept().expect("a guest").0, TRANSFER));
    let taker = thread::spawn(move || take(back.accept().expect("a guest").0, TRANSFER));
    let script = "
socat -u VSOCK-CONNECT:2:5000 STDOUT | socat -u STDIN VSOCK-CONNECT:2:5001 || echo BAD
echo SENT BACK
socat VSOCK-CONNECT:2:5999 STDOUT </dev/null 2>&1 | grep -o 'Connection reset'
socat VSOCK-LISTEN:6000 PIPE &
echo LISTENS
wait
echo ANSWERED";
    let mut guest = with_tools(rig, tools, script)
        .memory("512M")
        .option("--vsock", format!("cid=3,uds={}", path.display()))
        .start();
    guest.expect("SENT BACK");
    giver.join().expect("all sent");
    taker.join().expect("all as it was sent");
    guest.expect("Connection reset");
    guest.expect("LISTENS");
    // It says so just before it does; until then the connection ends at once.
    let answer = loop {
        let mut stream = UnixStream::connect(&path).expect("armlet listens");
        let asked = stream.write_all(b"CONNECT 6000\n").and_then(|()| {
            let mut reader = BufReader::new(stream.try_clone()?);
            let mut line = String::new();
            reader.read_line(&mut line)?;
            Ok((reader, line))
        });
        if let Ok((mut reader, line)) = asked
            && line.starts_with("OK ")
        {
            stream.write_all(b"there and back\n").expect("a guest");
            stream.shutdown(std::net::Shutdown::Write).expect("a guest");
            let mut answer = String::new();
            reader.read_to_string(&mut answer).expect("an answer");
            break answer;
        }
        assert!(guest.runs(), "armlet is gone");
        sleep(GLANCE);
    };
    assert_eq!(answer, "there and back\n");
    guest.expect("ANSWERED");
    assert!(!guest.end().script().contains("BAD"));
    assert!(!path.exists(), "armlet left its socket");
}

#[test]
fn guest_and_host_talk_over_vhost_vsock() {
    let Some(rig) = rig::main() else { return };
    let (Some(tools), Some(socat)) = (rig::tools_disk(), rig::program("socat")) else {
        return;
    };
    if !Path::new("/dev/vhost-vsock").exists() {
        println!("skipped: this host has no /dev/vhost-vsock");
        return;
    }
    let script = "
socat VSOCK-LISTEN:6000 PIPE &
echo LISTENS
wait";
    let mut guest = with_tools(rig, tools, script)
        .option("--vsock", "cid=42")
        .start();
    guest.expect("LISTENS");
    let answer = loop {
        let mut child = Command::new(&socat)
            .args(["-t", "60", "STDIO", "VSOCK-CONNECT:42:6000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("socat can be run");
        let mut input = child.stdin.take().expect("a pipe");
        // Where nobody listens yet, socat is gone already.
        let _ = input.write_all(b"there and back\n");
        drop(input);
        let output = child.wait_with_output().expect("socat ends");
        if !output.stdout.is_empty() {
            break output.stdout;
        }
        assert!(guest.runs(), "armlet is gone");
        sleep(GLANCE);
    };
    assert_eq!(answer, b"there and back\n");
    guest.end().assert_status(0);
}

/// The host and a folder to share; `None` where it has no virtiofsd, which was said then.
fn sharing() -> Option<(&'static Rig, TempDir)> {
    let rig = rig::main()?;
    rig::program("virtiofsd")?;
    Some((rig, tempfile::tempdir().expect("a temporary folder")))
}

/// The option that shares a folder.
fn shared(folder: &TempDir) -> String {
    format!("tag=shared,path={}", folder.path().display())
}

#[test]
fn a_folder_of_the_host_is_read_and_written() {
    let Some((rig, folder)) = sharing() else {
        return;
    };
    let tree = folder.path().join("tree");
    for number in 0..100 {
        let path = tree.join(format!("{}/{}", number % 7, number % 11));
        fs::create_dir_all(&path).expect("a folder");
        let length = number as usize * 977;
        fs::write(path.join(format!("file {number}")), noise(number, length)).expect("a file");
    }
    let script = "
mkdir /share
mount -t virtiofs shared /share || echo BAD
cp -a /share/tree /share/copy || echo BAD
sync
find /share/copy -type f | wc -l
mv '/share/copy/1/1/file 1' /share/moved; rm -r /share/copy/2
ln -s moved /share/link; cat /share/link | wc -c
umount /share && echo UNMOUNTED";
    let outcome = Armlet::devices(rig, script)
        .option("--share", shared(&folder))
        .run();
    let said = outcome.script();
    assert_eq!(said.trim(), "100\n977\nUNMOUNTED", "{}", outcome.errors);
    for number in (0..100_u64).filter(|number| number % 7 != 2 && *number != 1) {
        let path = format!("{}/{}/file {number}", number % 7, number % 11);
        let copy = fs::read(folder.path().join("copy").join(path)).expect("a copy");
        assert!(
            copy == noise(number, number as usize * 977),
            "file {number}"
        );
    }
    assert!(!folder.path().join("copy/2").exists());
    assert_eq!(
        fs::read(folder.path().join("moved")).expect("a file").len(),
        977
    );
}

/// A program of several files: what is compiled tells how often the sum was made, and of what.
const MAKEFILE: &str = "OBJECTS = $(patsubst %.c,%.o,$(wildcard *.c))
sum: $(OBJECTS)
\t$(CC) -o $@ $^
%.o: %.c parts.h
\t$(CC) -c -o $@ $<
";

#[test]
fn a_share_holds_a_git_checkout_that_builds() {
    let Some(rig) = rig::main() else { return };
    let (Some(tools), Some(_)) = (rig::tools_disk(), rig::program("virtiofsd")) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("a folder");
    let mut calls = String::new();
    let mut parts = String::new();
    for number in 0..40 {
        let text = format!("int part{number}(void) {{ return {number}; }}\n");
        fs::write(source.join(format!("part{number}.c")), text).expect("a file");
        calls.push_str(&format!(" + part{number}()"));
        parts.push_str(&format!("int part{number}(void);\n"));
    }
    let main = format!(
        "#include <stdio.h>\n#include \"parts.h\"\nint main(void) {{ printf(\"sum %d\\n\", 0{calls}); return 0; }}\n"
    );
    fs::write(source.join("main.c"), main).expect("a file");
    fs::write(source.join("parts.h"), parts).expect("a file");
    fs::write(source.join("Makefile"), MAKEFILE).expect("a file");
    let script = "
mount -t tmpfs tmpfs /mnt/tmp; mount -t tmpfs tmpfs /mnt/home
mkdir /mnt/home/share /mnt/tmp/bin
mount -t virtiofs shared /mnt/home/share || echo BAD
cp /bin/busybox /mnt/tmp/bin
for name in sh rm wc; do ln -s busybox /mnt/tmp/bin/$name; done
cat >/mnt/tmp/work <<'END'
set -e
export HOME=/tmp PATH=/tmp/bin:/usr/bin
git config --global user.name Guest; git config --global user.email guest@example.org
git config --global safe.directory '*'; git config --global init.defaultBranch main
cd /home/share/source
git init -q; git add .; git commit -q -m 'All of it'
git clone -q /home/share/source ../checkout
cd ../checkout
git fsck --no-progress --strict
make -s SHELL=/tmp/bin/sh CC=tcc
./sum
rm part7.o part7.c; git checkout -q .
make -s SHELL=/tmp/bin/sh CC=tcc; ./sum; rm *.o sum
git status --porcelain | wc -l
END
chroot /mnt /tmp/bin/sh /tmp/work 2>&1 || echo BAD
umount /mnt/home/share && echo UNMOUNTED";
    let outcome = with_tools(rig, tools, script)
        .memory("512M")
        .option("--share", shared(&folder))
        .run();
    let said = outcome.script();
    // The guest's clock may be behind the host's, which sets the files' times.
    let of_clocks = |line: &str| {
        line.starts_with("make: Warning: File") && line.ends_with("in the future")
            || line.starts_with("make: warning:  Clock skew detected.")
    };
    let said: Vec<&str> = said.lines().filter(|line| !of_clocks(line)).collect();
    let wanted = "sum 780\nsum 780\n0\nUNMOUNTED";
    assert_eq!(said.join("\n").trim(), wanted, "{}", outcome.errors);
    for name in ["part39.c", "Makefile", ".git/HEAD"] {
        assert!(
            folder.path().join("checkout").join(name).is_file(),
            "{name}"
        );
    }
}

#[test]
fn a_share_whose_daemon_is_killed_harms_nothing_else() {
    let Some((rig, folder)) = sharing() else {
        return;
    };
    let script = "
mkdir /share
mount -t virtiofs shared /share && echo MOUNTED
read -r line </dev/console
cat /share/file 2>&1 | sed -n 's,.*\\(I/O\\|Input/output\\) error.*,I/O error,p'
echo ALIVE";
    let mut guest = Armlet::devices(rig, script)
        .input(Input::Pipe)
        .option("--share", shared(&folder))
        .start();
    guest.expect("MOUNTED");
    let started = started(guest.pid(), "virtiofsd");
    assert!(!started.is_empty(), "armlet runs no virtiofsd");
    started.into_iter().for_each(kill);
    guest.expect_error("virtiofsd");
    guest.send(b"\n");
    guest.expect("I/O error");
    guest.expect("ALIVE");
    guest.end().assert_status(0);
}

#[test]
fn virtiofsd_ends_with_armlet_and_knows_nothing_of_it() {
    let Some((rig, folder)) = sharing() else {
        return;
    };
    let script = "
mkdir /share
mount -t virtiofs shared /share && echo MOUNTED
sleep 1000";
    for signal in [Signal::INT, Signal::KILL] {
        let mut guest = Armlet::devices(rig, script)
            .option("--share", shared(&folder))
            .start();
        guest.expect("MOUNTED");
        let servers = started(guest.pid(), "virtiofsd");
        assert!(!servers.is_empty(), "armlet runs no virtiofsd");
        for pid in servers {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
            assert!(status.contains("SigBlk:\t0000000000000000"), "{status}");
            let environment = fs::read(format!("/proc/{pid}/environ")).expect("a process");
            let names = environment
                .split(|byte| *byte == 0)
                .filter(|variable| !variable.is_empty() && !variable.starts_with(b"PATH="));
            assert_eq!(names.count(), 0);
        }
        let all = started(guest.pid(), "");
        guest.signal(signal);
        drop(guest.end());
        wait_until_gone(&all);
    }
}

/// What a process has in memory, in MiB.
fn resident(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: usize = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .expect("a size");
    kib >> 10
}

/// A guest that fills 300 MiB and frees it; the host has at least `least` MiB of that back.
///
/// It does so twice, and the second time counts: the first time the guest's kernel takes memory of
/// its own here and there, and each of these places costs the host a huge page for good.
///
/// The host's kernel puts huge pages together again all the while, which would undo it.
fn gives_back(rig: &Rig, kernel: &str, drivers: &str, memory: &'static str, least: usize) {
    let script = "
mkdir -p /mnt
# In blocks of the size in which Linux reports free memory.
mount -t tmpfs -o size=400m,huge=always tmpfs /mnt
echo EMPTY
for time in 1 2; do
    read -r line </dev/console
    dd if=/dev/zero of=/mnt/file bs=1M count=300 status=none
    echo FULL
    read -r line </dev/console
    rm /mnt/file
    echo FREED
done
read -r line </dev/console";
    let armlet = Armlet::devices_on(rig, kernel, drivers, script)
        .memory(memory)
        .input(Input::Pipe)
        .option("--balloon", "reporting=on")
        .alone();
    let values = [("pages_to_scan", "65536"), ("scan_sleep_millisecs", "100")];
    let _eager = Tuned::set("/sys/kernel/mm/transparent_hugepage/khugepaged", &values);
    let mut guest = armlet.start();
    guest.expect("EMPTY");
    let empty = resident(guest.pid());
    for least in [least * 2 / 3, least] {
        guest.send(b"\n");
        guest.expect("FULL");
        let full = resident(guest.pid());
        guest.send(b"\n");
        guest.expect("FREED");
        // Linux reports free pages some seconds after they are freed; the guest waits until then.
        let mut now = full;
        while now + least > full {
            assert!(guest.runs(), "armlet is gone");
            assert!(
                guest.age().as_secs() < 300,
                "{empty} MiB when empty, {full} when full, still {now} when free again"
            );
            sleep(10 * GLANCE);
            now = resident(guest.pid());
        }
        println!("{kernel}: {empty} MiB when empty, {full} when full, {now} when free again");
        sleep(50 * GLANCE);
        let later = resident(guest.pid());
        assert!(later + least <= full, "then {later} MiB");
    }
    guest.send(b"\n");
    guest.end().assert_status(0);
}

#[test]
fn a_guest_gives_free_memory_back() {
    let Some(rig) = rig::any() else { return };
    let [kernel, drivers] = WITH_DEVICES;
    gives_back(rig, kernel, drivers, "768M", rig::GIVEN_BACK);
}

#[test]
fn a_guest_with_16_kib_pages_gives_free_memory_back() {
    let Some(rig) = rig::main() else { return };
    if rig.has_guest_pages(0x4000) {
        // It reports blocks of 32 MiB, so that several are lost where 300 MiB begin and end.
        // With less than 1 GiB of free memory, Linux with such pages reports nothing: its watermark
        // is 32 blocks of 32 MiB (mm/page_reporting.c, `page_reporting_process_zone`).
        gives_back(rig, "Image-16k", "devices-16k.cpio", "2G", 200);
    }
}

#[test]
fn persistent_memory_is_the_hosts_file() {
    let Some(rig) = rig::main() else { return };
    let script = "
echo '== size'; cat /sys/block/pmem0/size
echo '== copies'
dd if=/dev/pmem0 of=/dev/pmem0 bs=64k count=32 seek=32 conv=notrunc,fsync status=none
echo '== end'";
    let armlet = Armlet::devices(rig, script);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = folder.path().join("pmem.img");
    let mut data = noise(5, 2 * MIB);
    data.resize(16 * MIB, 0);
    fs::write(&image, &data).expect("an image");
    let outcome = armlet
        .option("--pmem", format!("path={}", image.display()))
        .run();
    let script = outcome.script();
    let sectors = (16 * MIB / 512).to_string();
    assert_eq!(section(&script, "size"), sectors);
    data.copy_within(..2 * MIB, 2 * MIB);
    assert!(fs::read(&image).expect("an image") == data);
}

/// Reads the first disk past the page cache into a file that is mapped, and writes that to the second.
const READ_INTO_MAPPING: &str = r#"#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
    const long size = 1 << 20;
    int from = open("/dev/vda", O_RDONLY | O_DIRECT);
    int to = open("/dev/vdb", O_WRONLY | O_DIRECT);
    int file = open("/tmp/dax/file", O_RDWR | O_CREAT, 0600);
    if (from < 0 || to < 0 || file < 0 || ftruncate(file, size)) return 1;
    char *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return 2;
    printf("read %ld\n", (long)pread(from, memory, size, 0));
    printf("wrote %ld\n", (long)pwrite(to, memory, size, 0));
    return fsync(to) || fsync(file);
}
"#;

#[test]
fn a_disk_is_read_into_a_file_on_persistent_memory() {
    let Some(rig) = rig::main() else { return };
    let (Some(tools), Some(mke2fs)) = (rig::tools_disk(), rig::program("mke2fs")) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = folder.path().join("pmem.img");
    let made = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
        .arg(&image)
        .arg("16M")
        .status();
    assert!(made.expect("mke2fs can be run").success());
    let second = folder.path().join("second.img");
    fs::write(&second, vec![0; 2 * MIB]).expect("an image");
    let script = format!(
        "
mount -t tmpfs tmpfs /mnt/tmp; mkdir /mnt/tmp/dax
mount -t ext4 -o dax /dev/pmem0 /mnt/tmp/dax || echo BAD
grep -c 'dax=always' /proc/mounts
cat >/mnt/tmp/read.c <<'END'
{READ_INTO_MAPPING}END
chroot /mnt /usr/bin/tcc -o /tmp/read /tmp/read.c || echo BAD
chroot /mnt /tmp/read || echo BAD
dd if=/dev/vda bs=64k count=16 status=none >/mnt/tmp/wanted
cmp /mnt/tmp/wanted /mnt/tmp/dax/file && echo SAME
umount /mnt/tmp/dax
mount -t ext4 -o dax /dev/pmem0 /mnt/tmp/dax
cmp /mnt/tmp/wanted /mnt/tmp/dax/file && echo STILL"
    );
    let outcome = with_tools(rig, tools, &script)
        .memory("512M")
        .option("--disk", format!("path={}", second.display()))
        .option("--pmem", format!("path={}", image.display()))
        .run();
    let wanted = "1\nread 1048576\nwrote 1048576\nSAME\nSTILL";
    assert_eq!(outcome.script().trim(), wanted, "{}", outcome.errors);
    let mut first = vec![0; MIB];
    let read = fs::File::open(tools).and_then(|mut file| file.read_exact(&mut first));
    read.expect("the first disk");
    assert!(fs::read(&second).expect("an image")[..MIB] == first);
}
