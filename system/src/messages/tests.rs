//! Messages to pipes, terminals, sockets and files of these tests' own.

use super::*;
use crate::visible::deceives;
use proptest::prelude::*;
use rustix::pipe::PipeFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Returns an outlet to a descriptor that lives as long as the tests.
fn outlet_to(fd: impl Into<OwnedFd>) -> Outlet {
    let fd: &'static OwnedFd = Box::leak(Box::new(fd.into()));
    let behind = Box::leak(Box::new(AtomicBool::new(false)));
    Outlet::to(fd.as_fd(), behind)
}

/// Says numbered lines until some are lost, whoever reads; returns how many were said.
fn flood(outlet: &mut Outlet) -> usize {
    let said = (0..100_000).find(|number| {
        outlet.say(log::Level::Info, &format!("line {number}"));
        outlet.lost > 10
    });
    assert!(outlet.behind.load(Ordering::Relaxed));
    said.expect("an end of the room") + 1
}

/// Lines that arrived, of a flood that was read afterwards: all in order, and the count of those
/// that are lost.
fn check(read: &str, said: usize) {
    let lines: Vec<_> = read.lines().collect();
    let (last, lines) = lines.split_last().expect("lines");
    for (number, line) in lines.iter().enumerate() {
        assert_eq!(*line, format!("armlet: line {number}"));
    }
    let lost = said - lines.len();
    let wanted =
        format!("armlet: {lost} messages are lost: what they go to took no more at the time");
    assert_eq!(*last, wanted);
}

/// Reads what is there while the outlet writes the rest.
fn drain(outlet: &mut Outlet, mut reader: impl Read + AsFd) -> String {
    let mut text = Vec::new();
    let mut part = [0; 4096];
    while {
        outlet.flush();
        is_readable(reader.as_fd())
    } {
        let count = reader.read(&mut part).expect("readable");
        text.extend_from_slice(&part[..count]);
    }
    assert!(!outlet.behind.load(Ordering::Relaxed));
    String::from_utf8(text).expect("UTF-8")
}

#[test]
fn what_is_printed_has_no_control_characters_but_ends_of_lines() {
    let hostile = "a\x1b[2Jb\u{9b}c\u{202e}d\re\nf\tg\u{e0001}";
    assert_eq!(
        visible_lines(hostile),
        "a\\x1b[2Jb\\u{9b}c\\u{202e}d\\re\nf\tg\\u{e0001}"
    );
    let json = format!("{:#}\n", serde_json::json!({ hostile: [hostile] }));
    let shown = visible_json(&json);
    assert!(
        shown
            .bytes()
            .all(|byte| byte == b'\n' || (b' '..0x7f).contains(&byte))
    );
    let value: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(value[hostile][0], hostile);
}

#[test]
fn a_shell_takes_a_word_of_advice_for_the_name_that_is_meant() {
    let names: [&[u8]; 12] = [
        b"disk.img",
        b"/srv/a b.img",
        b"it's",
        b"say \"hi\"",
        b"$HOME/`id`!x\\",
        b"a;b|c&d>e*f?g[h]",
        b"-f",
        b"nbd:x",
        "gr\u{fc}n.img".as_bytes(),
        b"two\nlines\x1b'[2J\\",
        b"no \xff UTF-8",
        "\u{202e}gmi.ksid".as_bytes(),
    ];
    for name in names {
        let word = shell_word(OsStr::from_bytes(name));
        assert_eq!(
            visible(word.as_bytes(), LONGEST),
            word,
            "it is shown as it is"
        );
        let output = std::process::Command::new("bash")
            .args(["-c", &format!("printf %s {word}")])
            .output();
        let Ok(output) = output else {
            println!("skipped: bash is not here");
            return;
        };
        let taken = output.stdout.strip_prefix(b"./").unwrap_or(&output.stdout);
        assert_eq!(taken, name, "{word}");
    }
    assert_eq!(shell_word("a b"), "\"a b\"");
    assert_eq!(shell_word("/srv/disk-1.img"), "/srv/disk-1.img");
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    wait_once(fd, PollFlags::IN, Some(Duration::from_millis(50))) == Ok(true)
}

fn is_nonblocking(fd: BorrowedFd<'_>) -> bool {
    let flags = rustix::fs::fcntl_getfl(fd).expect("an open descriptor");
    flags.contains(OFlags::NONBLOCK)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).expect("a pipe")
}

/// Returns a terminal: what a user sees of it, and what a program writes to.
fn terminal() -> (File, OwnedFd) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&user).expect("a terminal");
    unlockpt(&user).expect("a terminal");
    let name = ptsname(&user, Vec::new()).expect("a name");
    let program = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
    let program = program.expect("the other end");
    let mut modes = rustix::termios::tcgetattr(&program).expect("modes");
    modes.make_raw();
    rustix::termios::tcsetattr(&program, rustix::termios::OptionalActions::Now, &modes)
        .expect("modes");
    (File::from(user), program)
}

#[test]
fn a_pipe_that_nobody_reads_stops_nobody_and_tells_what_is_lost() {
    let (reader, writer) = pipe();
    let kept = writer.try_clone().expect("a descriptor");
    let mut outlet = outlet_to(writer);
    let said = flood(&mut outlet);
    assert!(!is_nonblocking(kept.as_fd()), "a flag that others share");
    check(&drain(&mut outlet, File::from(reader)), said);
}

#[test]
fn without_proc_a_pipe_stops_nobody_either() {
    let (reader, writer) = pipe();
    let mut outlet = outlet_to(writer);
    outlet.way = Some(Way::Polled);
    let said = flood(&mut outlet);
    check(&drain(&mut outlet, File::from(reader)), said);
}

#[test]
fn a_terminal_that_nobody_reads_stops_nobody() {
    let (user, program) = terminal();
    let kept = program.try_clone().expect("a descriptor");
    let mut outlet = outlet_to(program);
    let said = flood(&mut outlet);
    assert!(!is_nonblocking(kept.as_fd()), "a flag that others share");
    check(&drain(&mut outlet, user), said);
}

#[test]
fn a_socket_that_nobody_reads_stops_nobody() {
    let (reader, writer) = UnixStream::pair().expect("sockets");
    let kept = writer.try_clone().expect("a descriptor");
    let mut outlet = outlet_to(writer);
    let said = flood(&mut outlet);
    assert!(!is_nonblocking(kept.as_fd()), "a flag that others share");
    check(&drain(&mut outlet, reader), said);
}

#[test]
fn a_full_disk_loses_no_more_than_there_is_no_room_for() {
    let full = File::options()
        .write(true)
        .open("/dev/full")
        .expect("Linux");
    let mut outlet = outlet_to(full);
    flood(&mut outlet);
    assert!(outlet.waiting.len() <= ROOM);
    let limit = Duration::from_millis(20);
    let start = Instant::now();
    outlet.finish(limit);
    assert!(start.elapsed() >= limit, "it may get room");
}

#[test]
fn without_a_reader_nothing_is_kept() {
    let (reader, writer) = pipe();
    drop(reader);
    let mut outlet = outlet_to(writer);
    outlet.say(log::Level::Info, "to nobody");
    assert!(outlet.waiting.is_empty());
    assert!(!outlet.behind.load(Ordering::Relaxed));
}

#[test]
fn the_end_waits_for_a_reader_who_comes_in_time() {
    let (reader, writer) = pipe();
    let mut outlet = outlet_to(writer);
    flood(&mut outlet);
    let late = std::thread::spawn(move || {
        let mut text = vec![0; 1 << 16];
        File::from(reader)
            .read_exact(&mut text)
            .expect("a full pipe");
    });
    // The flood was more than a pipe holds, so the end needs the reader.
    outlet.finish(Duration::from_secs(600));
    assert!(outlet.waiting.is_empty() && outlet.lost == 0);
    late.join().expect("read");
}

#[test]
fn what_others_say_is_visible_and_moves_no_cursor() {
    let shown = |text: &[u8]| visible(text, 100);
    assert_eq!(
        shown(b"a\x1b[2Jb\r\nc\td\0\x7f"),
        "a\\x1b[2Jb\\r\\nc\\td\\x00\\x7f"
    );
    // CSI as one character of C1, and as one byte, which is no UTF-8.
    assert_eq!(shown("\u{9b}2J".as_bytes()), "\\u{9b}2J");
    assert_eq!(shown(b"\x9b2J\xff"), "\\x9b2J\\xff");
    assert_eq!(
        shown("a\u{202e}b\u{2066}\u{200b}\u{2028}".as_bytes()),
        "a\\u{202e}b\\u{2066}\\u{200b}\\u{2028}"
    );
    assert_eq!(shown("äß 漢 é".as_bytes()), "äß 漢 é");
    assert_eq!(visible(b"0123456789", 4), "0123... (6 more bytes)");
    assert_eq!(visible("ääää".as_bytes(), 3), "ää... (4 more bytes)");
    let said: Vec<_> = lines(b"one\r\n\n  two\x1b]0;x\x07\nlast").collect();
    assert_eq!(said, ["one", "two\\x1b]0;x\\x07", "last"]);
}

#[test]
fn a_message_is_one_line_of_bounded_length() {
    let (reader, writer) = pipe();
    let mut outlet = outlet_to(writer);
    outlet.say(log::Level::Info, &"x\n".repeat(100_000));
    let text = drain(&mut outlet, File::from(reader));
    assert_eq!(text.lines().count(), 1);
    assert!(text.len() < PIPE_BUF, "{} bytes", text.len());
}

#[test]
fn one_place_that_logs_again_and_again_is_limited_and_another_is_not() {
    let log = Log(Mutex::default());
    let site = |line| (Some("file"), Some(line));
    let shown = (0..1000).filter(|_| log.admit(site(1)).is_some()).count();
    // A second may pass meanwhile.
    assert!(
        (BURST as usize..BURST as usize + 8).contains(&shown),
        "{shown}"
    );
    assert!(log.admit(site(2)).is_some());
}

proptest! {
    #[test]
    fn whatever_is_said_is_printable_and_bounded(text: Vec<u8>) {
        let shown = visible(&text, 50);
        prop_assert!(shown.chars().all(|character| !character.is_control() && !deceives(character)));
        prop_assert!(shown.len() < 100);
    }
}

#[test]
fn lines_of_a_file_have_time_and_origin() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut outlet = outlet_to(writer);
    outlet.is_formed = true;
    outlet.form = Form {
        id: "id".to_owned(),
        show_level: Some(true),
    };
    outlet.say(log::Level::Warn, "a\nb");
    drop(outlet);
    let mut line = String::new();
    let mut reader = std::io::BufReader::new(reader);
    std::io::BufRead::read_line(&mut reader, &mut line).expect("a line");
    let (time, rest) = line.split_once(' ').expect("a time");
    assert_eq!(time.len(), "2026-11-29T21:10:27.510239865".len());
    assert!(
        rest.starts_with("[id:") && rest.contains(":WARN] a"),
        "{rest}"
    );
    let at = |seconds, nanos| utc(UNIX_EPOCH + Duration::new(seconds, nanos));
    assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000");
    assert_eq!(at(951_782_400, 1), "2000-02-29T00:00:00.000000001");
    assert_eq!(
        at(1_795_986_627, 510_239_865),
        "2026-11-29T21:10:27.510239865"
    );
    assert_eq!(at(4_107_542_399, 0), "2100-02-28T23:59:59.000000000");
}
