//! Programs that behave well and badly, most of them shell scripts.

use super::*;
use crate::alone::{
    assert_none_is_left, command, descendants, hold, in_own_process, is_alone, is_gone, kill,
};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::process::Command;

/// How long a test waits for what must come.
const LONG: Duration = Duration::from_secs(30);

fn socket() -> (OwnedFd, OwnedFd) {
    pair().expect("a pair")
}

/// Starts a script; returns the other end of its socket, too.
fn run(broker: &Arc<Broker>, script: &str) -> (Process, OwnedFd) {
    let (ours, theirs) = socket();
    let process = broker.start(
        Path::new("/bin/sh"),
        &["-c", script].map(Into::into),
        theirs,
    );
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
    let broker = Broker::fork().expect("a process");
    let (said, how) = output(&broker, "echo one >&2; printf 'two\\033[2J' >&2; exit 7");
    assert_eq!(said, ["one", "two\\x1b[2J"]);
    assert_eq!(how, "exit status: 7");
    assert_eq!(output(&broker, "kill -SEGV $$").1, "signal: 11 (SIGSEGV)");
}

#[test]
fn what_cannot_be_started_is_an_error_in_the_systems_words() {
    let broker = Broker::fork().expect("a process");
    let start = |program: &str, arguments: &[OsString]| {
        let started = broker.start(Path::new(program), arguments, socket().1);
        started.expect_err(program).to_string()
    };
    assert!(start("/bin/none", &[]).contains("No such file"));
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a name");
    assert!(start(path, &[]).contains("Permission denied"));
    let long = "x".repeat(MOST_REQUEST);
    assert!(start("/bin/true", &[long.into()]).contains("65546 bytes; 65536 are possible"));
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
    let broker = Broker::fork().expect("a process");
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
    let broker = Broker::fork().expect("a process");
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
    let broker = Broker::fork().expect("a process");
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
    let broker = Broker::fork().expect("a process");
    let (mut process, _ours) = run(&broker, "exec sleep 1000");
    kill(broker.pid.as_raw_pid().cast_unsigned());
    assert_eq!(process.ended(Deadline::after(LONG)), Some(BROKER_GONE));
    let error = broker.start(Path::new("/bin/true"), &[], socket().1);
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
    let broker = Broker::fork().expect("a process");
    set(maximum);
    let mut running = Vec::new();
    let error = loop {
        let (ours, theirs) = socket();
        let arguments = ["-c", "exec sleep 1000"].map(Into::into);
        match broker.start(Path::new("/bin/sh"), &arguments, theirs) {
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
    let broker = Broker::fork().expect("a process");
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
    let broker = Broker::fork().expect("a process");
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
