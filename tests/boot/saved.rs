//! Linux guests that are saved while they work, and go on in other processes, many times in a row.

use crate::commanded::TICKS;
use crate::control::{controlled, done};
use crate::guest::{Armlet, GLANCE, Guest};
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// How often a guest is saved and restored, where this variable says nothing else.
const VARIABLE: &str = "ARMLET_RESTORES";
const USUALLY: usize = 6;

/// Of the kernel's log, that a handler of timers took less than a tenth of a second is no fault: it waits for pages
/// that the guest has first to get, on a host that is emulated. A guest whose clock went on in a pause says more.
///
/// Rounds of work: each checks what a round before wrote to the disk, and writes something else. Meanwhile
/// others look whether a clock goes back, and draw random numbers from the device.
const WORK: &str = r#"
dmesg -c >/dev/null
clock() {
    last=0
    while :; do
        read -r now rest </proc/uptime
        now=${now%.*}${now#*.}
        [ "$now" -ge "$last" ] || echo "BAD clock: $last $now"
        [ "$last" -eq 0 ] || [ $((now - last)) -lt 300 ] || echo "BAD gap: $last $now"
        last=$now
    done
}
for cpu in $(seq "$(nproc)"); do clock & done
(while :; do head -c 64 /dev/hwrng >/dev/null || echo "BAD hwrng"; sleep 0.1; done) &
for part in 0 1 2 3; do
    head -c 65536 /dev/urandom >/tmp/$part
    dd if=/tmp/$part of=/dev/vda bs=64k seek=$part conv=notrunc,fsync 2>/dev/null || echo "BAD write"
done
round=0
while [ ! -e /tmp/stop ]; do
    part=$((round % 4))
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda of=/tmp/read bs=64k skip=$part count=1 2>/dev/null || echo "BAD read"
    cmp /tmp/read /tmp/$part || echo "BAD data in round $round"
    head -c 65536 /dev/urandom >/tmp/$part
    dd if=/tmp/$part of=/dev/vda bs=64k seek=$part conv=notrunc,fsync 2>/dev/null || echo "BAD write"
    echo "ROUND $round"
    round=$((round + 1))
    [ "$round" -lt ROUNDS ] || touch /tmp/stop
done
dmesg -r | grep '^<[0-4]>' | grep -Ev 'hrtimer: interrupt took [0-9]{1,8} ns' | sed 's/^/BAD log: /'
echo "DONE $round"
"#;

/// What the guest's init is to run, for so many restores.
pub(crate) fn work() -> String {
    WORK.replace("ROUNDS", &(3 * restores() + 6).to_string())
}

fn restores() -> usize {
    std::env::var(VARIABLE).map_or(USUALLY, |number| number.parse().expect(VARIABLE))
}

/// Waits until the guest has done a round more than before.
fn works(guest: &mut Guest, round: &mut usize) {
    guest.expect(&format!("ROUND {round}"));
    *round += 1;
}

/// `make` gives a guest that does [`work`] on its first disk.
pub(crate) fn a_guest_at_work_goes_on(make: Armlet) {
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    let image = saved.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).expect("written");
    let socket = saved.path().join("vsock");
    let make = make
        .option("--disk", format!("path={}", image.display()))
        .option("--vsock", format!("cid=3,uds={}", socket.display()))
        .option("--balloon", "size=16M");
    let control = make.file("control", b"");
    fs::remove_file(&control).expect("a file of ours");
    let mut guest = make.option("--control", &control).start();
    let mut round = 0;
    let mut said = String::new();
    for _ in 0..restores() {
        works(&mut guest, &mut round);
        works(&mut guest, &mut round);
        let control = guest.path("control");
        done(&control, &["pause"]);
        // The image is then as the guest knows it.
        done(&control, &["snapshot", folder.to_str().expect("a path")]);
        guest.signal(Signal::KILL);
        said.push_str(&guest.said());
        round = next_round(&said).max(round);
        guest.end().assert_signal(Signal::KILL);
        guest = restored(&folder, false);
    }
    let outcome = guest.end();
    said.push_str(&outcome.text());
    outcome.assert_status(0);
    assert!(!said.contains("BAD"), "{said}");
    assert!(said.contains("DONE"), "{said}");
}

/// The round that has not ended.
fn next_round(said: &str) -> usize {
    let rounds = said.lines().filter_map(|line| line.strip_prefix("ROUND "));
    let mut rounds = rounds.filter_map(|number| number.parse::<usize>().ok());
    let last = rounds.next_back();
    last.map_or(0, |last| last + 1)
}

fn restored(folder: &Path, stays_paused: bool) -> Guest {
    let mut again = Armlet::new();
    if stays_paused {
        again = again.flag("--paused");
    }
    let control = again.file("control", b"");
    fs::remove_file(&control).expect("a file of ours");
    let mut guest = again.option("--control", &control).restore(folder);
    while !control.exists() && guest.runs() {
        sleep(GLANCE);
    }
    guest
}

/// A guest that looks at its clock without a pause, and says when more than three seconds are gone.
pub(crate) const CLOCK: &str = "
echo ticks:
read -r last rest </proc/uptime
last=${last%.*}${last#*.}
while :; do
    for look in $(seq 200); do
        read -r now rest </proc/uptime
        now=${now%.*}${now#*.}
        [ $((now - last)) -lt 300 ] || echo \"GAP: $last $now\"
        [ $now -ge $last ] || echo \"BACK: $last $now\"
        last=$now
    done
    echo 0123456789
done
";

/// A guest's clock stands still while it is paused: before and while it is saved, and where it is restored.
pub(crate) fn a_pause_is_no_time(make: Armlet) {
    const PAUSE: Duration = Duration::from_secs(6);
    let (mut guest, control) = controlled(make, &[]);
    done(&control, &["pause"]);
    sleep(PAUSE);
    done(&control, &["resume"]);
    guest.expect(TICKS);
    guest.expect(TICKS);
    done(&control, &["pause"]);
    sleep(PAUSE);
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    done(&control, &["snapshot", folder.to_str().expect("a path")]);
    guest.signal(Signal::KILL);
    let mut said = guest.end().assert_signal(Signal::KILL).text();
    let mut guest = restored(&folder, true);
    sleep(PAUSE);
    done(&guest.path("control"), &["resume"]);
    guest.expect(TICKS);
    guest.expect(TICKS);
    guest.signal(Signal::KILL);
    said.push_str(&guest.end().assert_signal(Signal::KILL).text());
    let bad = ["GAP", "BACK", "hrtimer"];
    assert!(!bad.iter().any(|bad| said.contains(bad)), "{said}");
}
