//! Programs that behave well and badly, most of them shell scripts.

use super::*;
use crate::alone::{
    assert_none_is_left, command, descendants, hold, in_own_process, is_alone, is_gone, kill,
};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::recv;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

/// How long a test waits for what must come.
const LONG: Duration = Duration::from_secs(30);

/// How system calls are made on the computer that runs this.
pub(crate) fn native() -> Native {
    match std::env::consts::ARCH {
        "x86_64" => Native {
            architecture: 0xc000_003e,
            // poll, alarm, getpgrp, epoll_wait
            calls: &[7, 37, 111, 232],
            // open, stat, lstat, readlink
            files: &[2, 4, 6, 89],
        },
        _ => Native {
            architecture: 0xc000_00b7,
            calls: &[],
            files: &[],
        },
    }
}

fn socket() -> (OwnedFd, OwnedFd) {
    pair().expect("a pair")
}

/// Has a program started with a socket.
fn start(
    broker: &Arc<Broker>,
    path: &str,
    arguments: &[OsString],
    socket: OwnedFd,
) -> Result<Process> {
    let service = broker.offer(Service::Program {
        path: path.into(),
        arguments: arguments.into(),
        listens: false,
        gains_rights: false,
    })?;
    Ok(broker.start(service, Some(socket))?.0)
}

/// Starts a script; returns the other end of its socket, too.
fn run(broker: &Arc<Broker>, script: &str) -> (Process, OwnedFd) {
    let (ours, theirs) = socket();
    let process = start(broker, "/bin/sh", &["-c", script].map(Into::into), theirs);
    (process.expect("a shell"), ours)
}

/// What a script says until its end, line by line, and how it ended.
fn output(broker: &Arc<Broker>, script: &str) -> (Vec<String>, String) {
    let (mut process, _ours) = run(broker, script);
    let how = process
        .ended(Deadline::after(LONG))
        .expect("an end")
        .to_owned();
    (process.words().hear_all(), how)
}

/// The lines that a process says, from the first to this one.
fn lines_to(process: &mut Process, last: &str) -> Vec<String> {
    let deadline = Deadline::after(LONG);
    let mut lines = Vec::new();
    while !lines.iter().any(|line| line == last) {
        let words = &process.words.pipe;
        assert!(
            deadline.wait(words, PollFlags::IN).expect("a wait"),
            "{lines:?}"
        );
        lines.extend(process.words().hear());
    }
    lines
}

#[test]
fn a_process_says_how_it_ended() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let (said, how) = output(&broker, "echo one >&2; printf 'two\\033[2J' >&2; exit 7");
    assert_eq!(said, ["one", "two\\x1b[2J"]);
    assert_eq!(how, "exit status: 7");
    assert_eq!(output(&broker, "kill -SEGV $$").1, "signal: 11 (SIGSEGV)");
}

#[test]
fn what_cannot_be_started_is_an_error_in_the_systems_words() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let start = |program: &str, arguments: &[OsString]| {
        let started = start(&broker, program, arguments, socket().1);
        started.expect_err(program).to_string()
    };
    assert!(start("/bin/none", &[]).contains("No such file"));
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a name");
    assert!(start(path, &[]).contains("Permission denied"));
    let long = "x".repeat(MOST_REQUEST);
    assert!(start("/bin/true", &[long.into()]).contains("65546 bytes; 65535 are possible"));
    // It works on.
    assert_eq!(output(&broker, "exit 0").1, "exit status: 0");
}

#[test]
fn a_program_is_found_in_absolute_folders_by_those_who_may_run_it() {
    let path = OsStr::new("bin:/nowhere");
    assert_eq!(find("no such program", Some(path), &["/bin"]), None);
    assert_eq!(
        find("sh", Some(OsStr::new("/bin")), &[]),
        Some("/bin/sh".into())
    );
    assert_eq!(find("env", None, &[]), Some("/usr/bin/env".into()));
    // A file, but no program.
    assert_eq!(
        find("passwd", Some(OsStr::new("/etc")), &["/etc"]),
        Some("/usr/bin/passwd".into())
    );
}

#[test]
fn a_program_gets_no_signals_descriptors_or_variables_of_armlets() {
    const NAME: &str =
        "broker::tests::a_program_gets_no_signals_descriptors_or_variables_of_armlets";
    if !is_alone(NAME) {
        // As a shell and a service manager may start armlet.
        let alone = command(NAME);
        let output = Command::new("env")
            .args(["--block-signal=TERM,USR1", "--ignore-signal=HUP,CHLD"])
            .arg(alone.get_program())
            .args(alone.get_args())
            .envs(
                alone
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .env("ARMLET_FOREIGN", "1")
            .output()
            .expect("env");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success(), "{said}");
        return;
    }
    let foreign = fs::File::open("/dev/zero").expect("a file");
    fcntl_setfd(&foreign, FdFlags::empty()).expect("a flag");
    let mask = fs::read_to_string("/proc/thread-self/status").expect("a status");
    assert!(mask.contains("SigBlk:\t0000000000004200"), "{mask}");
    let broker = Broker::fork(Some(&native())).expect("a process");
    // One that starts while another runs gets nothing of that one either.
    let _other = run(&broker, "sleep 1000");
    let script = "exec >&2
ls -l /proc/$$/fd
env | sed 's/=.*//' | grep -v -e PWD -e SHLVL -e '^_$'
pwd
exec grep -E '^Sig(Blk|Ign)' /proc/self/status";
    let (mut said, how) = output(&broker, script);
    assert_eq!(how, "exit status: 0");
    said.retain(|line| !line.starts_with("total"));
    for line in &mut said {
        // Of a descriptor: number and kind.
        if let Some((mode, target)) = line.split_once(" -> ") {
            let number = mode.rsplit(' ').next().unwrap_or_default();
            let kind = target.split(':').next().unwrap_or_default();
            *line = format!("{number} {kind}");
        }
    }
    let signals = ["SigBlk:\\t0000000000000000", "SigIgn:\\t0000000000000000"];
    let descriptors = ["0 /dev/null", "1 pipe", "2 pipe", "3 socket"];
    let all = [&descriptors[..], &["PATH", "/"], &signals].concat();
    assert_eq!(said, all);
}

/// Starts sleepers in every way that a program has to be rid of its parent, and says READY.
const SLEEPERS: &str = "trap '' TERM HUP INT
sleep 1000 &
setsid sleep 1000 &
(sleep 1000 & setsid sleep 1000 &)
setsid sh -c 'sleep 1000 & sleep 1000 &' &
unshare --pid --fork --kill-child=TERM sleep 1000 2>/dev/null &
unshare --user --pid --fork sleep 1000 2>/dev/null &
sleep 0.3
echo READY >&2
exec 2>&-
wait; sleep 1000";

#[test]
fn all_that_a_process_started_ends_with_it() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let (mut other, _ours) = run(&broker, "echo READY >&2; sleep 1000");
    lines_to(&mut other, "READY");
    // By itself, when it is told to, and when it is killed.
    for end in ["exit", "told", "killed"] {
        let (mut process, _ours) = run(&broker, SLEEPERS);
        lines_to(&mut process, "READY");
        let ours = process.pid().cast_unsigned();
        let others = [
            vec![other.pid().cast_unsigned()],
            descendants(other.pid().cast_unsigned()),
        ];
        let deadline = Deadline::after(LONG);
        let started = loop {
            let mut started = descendants(broker.pid.as_raw_pid().cast_unsigned());
            started.retain(|pid| !others.concat().contains(pid));
            // Without the right to make namespaces there are no more.
            if started.len() >= 7 {
                break started;
            }
            assert!(!deadline.left().is_zero(), "{started:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        match end {
            "told" => assert_eq!(process.end(Duration::ZERO), "signal: 9 (SIGKILL)"),
            "killed" => {
                kill(ours);
                let how = process.ended(Deadline::after(LONG));
                assert_eq!(how, Some("signal: 9 (SIGKILL)"));
            }
            _ => drop(process),
        }
        // The broker says so of the process, and looks for those who left it then.
        let deadline = Deadline::after(LONG);
        while !started.iter().all(|pid| is_gone(*pid)) {
            let left: Vec<_> = started.iter().filter(|pid| !is_gone(**pid)).collect();
            assert!(!deadline.left().is_zero(), "{end}: {left:?} of {started:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(other.ended(Deadline::after(Duration::ZERO)), None);
    }
}

#[test]
fn nothing_is_left_when_armlet_is_killed() {
    const NAME: &str = "broker::tests::nothing_is_left_when_armlet_is_killed";
    if !is_alone(NAME) {
        // The broker, two shells and what they start.
        return assert_none_is_left(NAME, 15);
    }
    let broker = Broker::fork(Some(&native())).expect("a process");
    let mut kept = Vec::new();
    for _ in 0..2 {
        let (mut process, ours) = run(&broker, SLEEPERS);
        lines_to(&mut process, "READY");
        kept.push((process, ours));
    }
    hold();
}

#[test]
fn without_a_broker_nothing_is_waited_for() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let (mut process, _ours) = run(&broker, "exec sleep 1000");
    kill(broker.pid.as_raw_pid().cast_unsigned());
    assert_eq!(process.ended(Deadline::after(LONG)), Some(BROKER_GONE));
    let error = start(&broker, "/bin/true", &[], socket().1);
    let error = error.expect_err("no broker").to_string();
    assert!(error.starts_with(BROKER_GONE), "{error}");
    let deadline = Deadline::after(LONG);
    while !is_gone(process.pid().cast_unsigned()) {
        assert!(!deadline.left().is_zero(), "it outlives the broker");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_broker_without_room_for_a_request_goes_on() {
    const NAME: &str = "broker::tests::a_broker_without_room_for_a_request_goes_on";
    if !in_own_process(NAME) {
        return;
    }
    // The broker has the limit of the moment: with its own four it is enough to start two.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let set = |current| {
        let limit = Rlimit { current, maximum };
        setrlimit(Resource::Nofile, limit).expect("no more than the maximum");
    };
    set(Some(14));
    let broker = Broker::fork(Some(&native())).expect("a process");
    set(maximum);
    let mut running = Vec::new();
    let error = loop {
        let (ours, theirs) = socket();
        let arguments = ["-c", "exec sleep 1000"].map(Into::into);
        match start(&broker, "/bin/sh", &arguments, theirs) {
            Ok(process) => running.push((process, ours)),
            Err(error) => break error,
        }
        assert!(running.len() < 10);
    };
    assert_eq!(running.len(), 2);
    assert!(
        error.to_string().contains("Too many open files"),
        "{error:#}"
    );
    for (process, _) in &mut running {
        assert_eq!(process.ended(Deadline::after(Duration::ZERO)), None);
    }
    // With none of them there is room again.
    running.clear();
    assert_eq!(output(&broker, "exit 3").1, "exit status: 3");
}

#[test]
fn one_that_says_too_much_is_not_kept_in_memory() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let (mut process, _ours) = run(&broker, "exec head -c 4000000 /dev/zero >&2");
    let mut lines = 0;
    while process
        .ended(Deadline::after(Duration::from_millis(1)))
        .is_none()
    {
        let said = process.words().hear();
        lines += said.len();
        assert!(said.iter().all(|line| line.len() < 4096));
        assert!(process.words().rest.len() < 2 * MOST_WORDS);
    }
    assert!(lines > 100, "{lines}");
}

#[test]
fn its_socket_is_where_it_looks_for_it() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let (process, ours) = run(&broker, "echo hello >&3");
    let deadline = Deadline::after(LONG);
    assert_eq!(deadline.wait(&ours, PollFlags::IN), Ok(true));
    let mut bytes = [0; 16];
    let (count, _) = recv(&ours, &mut bytes, RecvFlags::empty()).expect("a message");
    assert_eq!(&bytes[..count], b"hello\n");
    drop(process);
    // And nobody else has it.
    assert_eq!(recv(&ours, &mut bytes, RecvFlags::empty()), Ok((0, 0)));
}

#[test]
fn a_sealed_broker_does_what_it_was_told_and_no_more() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let program = |script: &str| Service::Program {
        path: "/bin/sh".into(),
        arguments: ["-c", script].map(Into::into).into(),
        listens: false,
        gains_rights: false,
    };
    let known = broker.offer(program("exit 7")).expect("a service");
    broker.seal().expect("a broker");
    let refused = broker
        .offer(program("exit 8"))
        .expect_err("sealed")
        .to_string();
    assert!(refused.contains("no more than the 1 services"), "{refused}");
    // One who has taken armlet over is not held by its own side of that.
    let request = Request::Offer(program("exit 8")).to_bytes();
    let deadline = Deadline::after(LONG);
    broker.send(&request, &[], deadline).expect("a message");
    let error = broker.start(ServiceId(1), Some(socket().1));
    let error = error.expect_err("no such service").to_string();
    assert!(error.contains("No such file"), "{error}");
    let (mut process, _) = broker.start(known, Some(socket().1)).expect("a shell");
    let how = process.ended(Deadline::after(LONG));
    assert_eq!(how, Some("exit status: 7"));
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let broker = Broker::fork(Some(&native())).expect("a process");
    let device = broker.offer(Service::Device("/dev/zero".into()));
    let device = device.expect("a service");
    // A program is no device.
    let program = broker.offer(Service::Program {
        path: "/bin/true".into(),
        arguments: Vec::new(),
        listens: false,
        gains_rights: false,
    });
    let error = broker.get(program.expect("a service"), 0);
    assert!(error.is_err());
    for request in [&b"x"[..], b"?", b"p", &[0; 100]] {
        let deadline = Deadline::after(LONG);
        broker.send(request, &[], deadline).expect("a message");
    }
    let mut bytes = [1; 8];
    let opened = broker.get(device, 0).expect("it goes on");
    let mut zero = fs::File::from(opened);
    zero.read_exact(&mut bytes).expect("zeros");
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn devices_are_opened_and_ports_connected_to() {
    const NAME: &str = "broker::tests::devices_are_opened_and_ports_connected_to";
    if !in_own_process(NAME) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    // An absolute path would be too long for a socket.
    let deep = folder.path().join("d".repeat(100));
    fs::create_dir(&deep).expect("a folder");
    std::env::set_current_dir(&deep).expect("a folder");
    let listener = UnixListener::bind("v_4294967295").expect("a socket");
    drop(UnixListener::bind("v_2").expect("a socket"));
    let broker = Broker::fork(Some(&native())).expect("a process");
    let ports = broker
        .offer(Service::Sockets("v".into()))
        .expect("a folder");
    let full = broker
        .offer(Service::Device("/dev/full".into()))
        .expect("one");
    broker.seal().expect("a broker");
    let file = broker.get(full, 0).expect("a device");
    let error = fs::File::from(file).write(&[0]).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    let ours = broker.get(ports, u32::MAX).expect("a listener");
    let (mut theirs, _) = listener.accept().expect("a connection");
    theirs.write_all(b"hello").expect("a connection");
    let mut bytes = [0; 5];
    let mut ours = UnixStream::from(ours);
    ours.read_exact(&mut bytes).expect("a message");
    assert_eq!(&bytes, b"hello");
    let kind = |port| broker.get(ports, port).expect_err("nobody").kind();
    assert_eq!(kind(1), ErrorKind::NotFound);
    assert_eq!(kind(2), ErrorKind::ConnectionRefused);
    // Who accepts nobody keeps nobody waiting.
    let busy = (0..).find_map(|_| broker.get(ports, u32::MAX).map(std::mem::forget).err());
    assert_eq!(busy.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
}

#[test]
fn a_socket_goes_with_the_broker_unless_something_took_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let [ours, other] = ["ours", "other"].map(|name| folder.path().join(name));
    let _listeners = [&ours, &other].map(|path| UnixListener::bind(path).expect("a socket"));
    let broker = Broker::fork(Some(&native())).expect("a process");
    for path in [&ours, &other] {
        broker.offer_removal(path).expect("a folder");
    }
    fs::write(folder.path().join("new"), "").expect("a file");
    fs::rename(folder.path().join("new"), &other).expect("a name");
    drop(broker);
    assert!(!ours.exists() && other.exists());
}
