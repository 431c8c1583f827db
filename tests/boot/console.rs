use crate::guest::{Armlet, Input, MARKER, section};
use crate::rig;
use crate::software::{Program, UARTDR};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Bytes that go each way: many FIFOs of 16 and more than a pipe of one page, but each byte is two
/// exits, which an emulated host takes its time for.
const BYTES: usize = 16 << 10;

/// Bytes that no pattern in the way from here to the guest could hide a change of.
fn noise(length: usize) -> Vec<u8> {
    // Xorshift (Marsaglia 2003), the same each time.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    });
    bytes.take(length).collect()
}

/// Lines of text, so many bytes of them, as a terminal's line discipline takes them unchanged.
fn lines(length: usize) -> Vec<u8> {
    let text = noise(length)
        .into_iter()
        .enumerate()
        .map(|(at, byte)| match at % 64 {
            63 => b'\n',
            _ => b'a' + byte % 26,
        });
    let mut text: Vec<u8> = text.collect();
    text.pop();
    text.push(b'\n');
    text
}

/// Where `wanted` begins in `bytes`.
fn position(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|part| part == wanted)
}

#[test]
fn every_byte_arrives_in_order_both_ways() {
    let Some(rig) = rig::any() else { return };
    both_ways(rig, |armlet| armlet);
}

/// Sends bytes to a guest that `change` may change, and checks that it gets them all and sends them back.
pub(crate) fn both_ways(rig: &rig::Rig, change: fn(Armlet) -> Armlet) {
    let sent = noise(BYTES);
    let script = format!(
        "exec </dev/console
stty raw -echo
echo READY
head -c {BYTES} >/tmp/in
echo \"CRC $(crc32 /tmp/in | cut -c -8)\"
printf BEGIN; cat /tmp/in; printf END"
    );
    let armlet = Armlet::script(rig, "Image", &script).input(Input::Pipe);
    let mut guest = change(armlet).start();
    guest.expect("READY\n");
    let started = Instant::now();
    guest.send(&sent);
    guest.expect("CRC ");
    let there = started.elapsed();
    guest.expect("END");
    let back = started.elapsed() - there;
    let outcome = guest.end();
    outcome.assert_status(0);
    println!("{BYTES} bytes went in {there:.1?}, and back in {back:.1?}");
    let mut crc = flate2::Crc::new();
    crc.update(&sent);
    let crc = format!("CRC {:08x}\n", crc.sum());
    assert!(
        outcome.text().contains(&crc),
        "what the guest read is not what was sent"
    );
    let start = position(&outcome.bytes, b"BEGIN").expect("output") + 5;
    let returned = &outcome.bytes[start..start + sent.len()];
    let wrong = returned.iter().zip(&sent).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first byte that differs on the way out");
    assert!(outcome.bytes[start + sent.len()..].starts_with(b"END"));
}

#[test]
fn a_verbose_kernels_log_is_complete() {
    let Some(rig) = rig::any() else { return };
    let script = "echo '== dmesg'; dmesg; echo '== end'";
    let outcome = Armlet::script(rig, "Image", script)
        .cmdline("loglevel=8")
        .run();
    let script = outcome.script();
    let text = outcome.text();
    let log = section(&script, "dmesg").split_once("Run /init as init process");
    let log = log.expect("all that was logged until init ran").0;
    let mut console = text.split("\x1eARMLET-SCRIPT-START").next().expect("a log");
    println!("{} bytes", log.len());
    for line in log.lines() {
        let at = console.find(line);
        let at = at.unwrap_or_else(|| panic!("not on the console, or not in order: {line}"));
        console = &console[at + line.len()..];
    }
}

/// Boots with `input`, which holds `sent` before the guest is there, and checks that it gets it.
fn early(rig: &rig::Rig, input: Input, sent: &[u8]) {
    let script = format!(
        "exec </dev/console
stty -echo
head -n {} >/tmp/in
echo \"CRC $(crc32 /tmp/in | cut -c -8) of $(wc -c </tmp/in)\"",
        sent.iter().filter(|byte| **byte == b'\n').count()
    );
    let piped = matches!(input, Input::Pipe);
    let mut guest = Armlet::script(rig, "Image", &script).input(input).start();
    if piped {
        guest.send(sent);
        guest.close_input();
    }
    let outcome = guest.end();
    outcome.assert_status(0);
    let mut crc = flate2::Crc::new();
    crc.update(sent);
    let wanted = format!("CRC {:08x} of {}\n", crc.sum(), sent.len());
    // Before the script turns it off, the guest echoes what comes between its own words.
    let text = outcome.text();
    assert!(text.contains(&wanted), "no {wanted:?} in\n{text}");
}

#[test]
fn input_from_before_the_guest_listens_is_not_lost() {
    let Some(rig) = rig::main() else { return };
    early(rig, Input::Pipe, &lines(6 << 10));
}

#[test]
fn a_file_is_an_input() {
    let Some(rig) = rig::main() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("input");
    let sent = lines(6 << 10);
    fs::write(&path, &sent).expect("a file");
    early(rig, Input::File(path), &sent);
}

/// The PL011's registers (Arm DDI 0183, section 3.2), and the bit of the transmit interrupt in
/// each.
const UARTIMSC: u64 = 0x0900_0038;
const UARTRIS: u64 = 0x0900_003c;
const UARTICR: u64 = 0x0900_0044;
const TRANSMIT: u32 = 5;

/// Drivers fill the FIFO and wait for the interrupt that says that there is room again. It comes
/// with the bytes, and not when somebody gets to them, however much output there is.
#[test]
fn the_transmit_interrupt_is_raised_by_the_write() {
    let Some(_) = rig::any() else { return };
    let late = Program::default().print("late\n").power_off();
    let mut program = Program::default().write(UARTIMSC, 1 << TRANSMIT);
    for _ in 0..30 {
        program = program
            .write(UARTICR, 1 << TRANSMIT)
            .print("8 bytes\n")
            .unless_set(UARTRIS, TRANSMIT, &late);
    }
    let outcome = Armlet::program(&program.print("done\n").power_off()).run();
    outcome.assert_status(0);
    let wanted = format!("{}done\n", "8 bytes\n".repeat(30));
    assert_eq!(outcome.text(), wanted);
}

#[test]
fn a_slow_reader_gets_every_byte() {
    let Some(rig) = rig::main() else { return };
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    // One page, where it would be 64 KiB.
    let room = rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a pipe");
    let mut guest =
        Armlet::script(rig, "Image", "seq 1 4000").start_with(Some(OwnedFd::from(writer)));
    let started = Instant::now();
    // Nearly full: the last write may not have fitted.
    while rustix::io::ioctl_fionread(&reader).expect("a pipe") < room as u64 - 256 {
        assert!(
            guest.runs() && started.elapsed() < Duration::from_secs(200),
            "no output"
        );
        sleep(Duration::from_millis(50));
    }
    sleep(Duration::from_millis(500));
    let (mut read, mut buffer) = (Vec::new(), [0; 1000]);
    while let count @ 1.. = reader.read(&mut buffer).expect("a pipe") {
        read.extend(&buffer[..count]);
        if read.len() < 2 * room {
            sleep(Duration::from_millis(20));
        }
    }
    guest.end().assert_status(0);
    let wanted: String = (1..=4000).map(|number| format!("{number}\r\n")).collect();
    let at = position(&read, b"1\r\n2\r\n").expect("the first lines");
    assert!(
        read[at..].starts_with(wanted.as_bytes()),
        "lines are lost or out of order"
    );
}

#[test]
fn a_guest_whose_output_nobody_reads_can_be_stopped() {
    let Some(_) = rig::any() else { return };
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe");
    // Full, so that the guest's first byte waits.
    while writer.write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("a pipe");
    let program = Program::default().print("up\n").stay();
    let mut guest = Armlet::program(&program).start_with(Some(OwnedFd::from(writer)));
    sleep(Duration::from_millis(500));
    assert!(guest.runs());
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
    drop(reader);
}

#[test]
fn output_that_nobody_can_read_is_told_once_and_the_guest_runs_on() {
    let Some(_) = rig::any() else { return };
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let program = Program::default().print("one\ntwo\nthree\n").power_off();
    let outcome = Armlet::program(&program)
        .start_with(Some(OwnedFd::from(writer)))
        .end();
    outcome.assert_status(0);
    let told = outcome.errors.matches("standard output is closed").count();
    assert_eq!(
        (told, outcome.errors.lines().count()),
        (1, 1),
        "{}",
        outcome.errors
    );
}

/// Hundredths of a second that each thread of a process has run, by name.
fn ticks(pid: u32) -> BTreeMap<String, u64> {
    let folder = fs::read_dir(format!("/proc/{pid}/task")).expect("a running process");
    let thread = |path: &Path| {
        let stat = fs::read_to_string(path.join("stat")).expect("a running thread");
        let (name, rest) = stat.rsplit_once(") ").expect("a name in brackets");
        let name = name
            .split_once('(')
            .expect("a name in brackets")
            .1
            .to_owned();
        // utime and stime are fields 14 and 15, state is field 3 (proc(5)).
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |field: usize| fields[field - 3].parse::<u64>().expect("a number");
        (name, number(14) + number(15))
    };
    folder
        .map(|entry| thread(&entry.expect("a thread").path()))
        .collect()
}

/// What each thread of a process runs in a while, in hundredths of a second.
fn ticks_in(pid: u32, time: Duration) -> BTreeMap<String, u64> {
    let before = ticks(pid);
    sleep(time);
    let mut spent = ticks(pid);
    for (name, ticks) in &mut spent {
        *ticks -= before.get(name).copied().unwrap_or(0);
    }
    spent
}

#[test]
fn an_input_that_has_ended_takes_no_time() {
    let Some(_) = rig::any() else { return };
    let program = Program::default().print("up\n").sleep();
    for kind in ["nothing", "a pipe", "a file"] {
        let armlet = Armlet::program(&program).alone();
        let input = match kind {
            "a pipe" => Input::Pipe,
            "a file" => Input::File(armlet.file("input", b"text that nobody reads\n")),
            _ => Input::Nothing,
        };
        let mut guest = armlet.input(input).start();
        guest.expect("up\n");
        guest.close_input();
        let spent = ticks_in(guest.pid(), Duration::from_secs(1));
        assert!(spent.len() >= 2, "threads: {spent:?}");
        assert!(
            spent.values().all(|ticks| *ticks <= 2),
            "hundredths of a second in one second of doing nothing, with {kind} as input: {spent:?}"
        );
        guest.signal(Signal::INT);
        guest.end().assert_status(6);
    }
}

#[test]
fn an_idle_linux_takes_no_time() {
    let Some(rig) = rig::any() else { return };
    let mut guest = Armlet::debian(rig, "Image", "hold").alone().start();
    guest.expect(MARKER);
    // The kernel frees and tidies for a while.
    sleep(Duration::from_secs(2));
    let spent = ticks_in(guest.pid(), Duration::from_secs(3));
    println!("hundredths of a second in three seconds: {spent:?}");
    for (name, ticks) in &spent {
        // The guest's own timer ticks are all that runs.
        let most = if name.starts_with("vcpu") { 45 } else { 2 };
        assert!(
            *ticks <= most,
            "{name} ran {ticks} hundredths of a second in three seconds"
        );
    }
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

#[test]
fn a_byte_beside_the_data_register_is_no_character() {
    let Some(_) = rig::main() else { return };
    let text = "many characters, so that they are collected in bursts ".repeat(8);
    let mut program = Program::default();
    for word in text.split_inclusive(' ') {
        program = program.print(word);
        for offset in 1..4 {
            program = program.write_byte(UARTDR + offset, b'X');
        }
    }
    let outcome = Armlet::program(&program.power_off()).run();
    outcome.assert_status(0);
    assert_eq!(outcome.text(), text);
}
