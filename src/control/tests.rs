//! Clients that behave well and badly, and a machine that answers.

use super::*;
use crate::run::{Command, State};
use armlet_system::status::{Status, status_of};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How long a test waits for what must come.
const LONG: Duration = Duration::from_secs(30);

/// A machine that is paused already, has a balloon, and no disk but disk0, which does not answer.
fn answer(command: Command) -> Result<(), Command> {
    match command {
        Command::Status(reply) => reply.send(State {
            is_paused: true,
            restarts: 3,
        }),
        Command::Pause(reply) => reply.send(Err("disk0 does not stop".to_owned())),
        Command::SetBalloon(_, reply) => reply.send(Ok(())),
        Command::LookAtDisk(name, reply) if name != "disk0" => {
            reply.send(Err(format!("the guest has no disk called {name}")));
        }
        Command::Counters(reply) => reply.send(vec!["one".to_owned(), "two".to_owned()]),
        Command::PowerKey => return Err(command),
        _ => {}
    }
    Ok(())
}

fn listening() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("control");
    let control = Control::listen(&path).expect("a free path");
    let fixed = Fixed {
        vcpus: 2,
        memory: 1 << 30,
        devices: vec!["disk0".to_owned(), "rng".to_owned()],
    };
    control.start(|| Ok(()), answer, fixed).expect("a thread");
    (folder, path)
}

fn words(path: &Path, line: &str, json: bool) -> anyhow::Result<(String, bool)> {
    let words: Vec<&str> = line.split(' ').collect();
    ask(path, &words, json)
}

fn refusal(path: &Path, line: &str) -> String {
    format!("{:#}", words(path, line, false).expect_err(line))
}

#[test]
fn requests_are_answered_for_people_and_programs() {
    let (_folder, path) = listening();
    let (text, _) = words(&path, "status", false).expect("an answer");
    for line in [
        "state: paused",
        "restarts: 3",
        "devices: disk0 rng",
        "vcpus: 2",
    ] {
        assert!(text.lines().any(|said| said == line), "{line} in {text}");
    }
    let (json, is_refused) = words(&path, "status", true).expect("an answer");
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value["ok"]["memory_bytes"], 1 << 30);
    assert!(!is_refused);
    let balloon = words(&path, "balloon 512M", false).expect("an answer");
    assert_eq!(balloon.0, "bytes: 536870912\n");
    let stats = words(&path, "stats", false).expect("an answer");
    assert_eq!(stats.0, "one\ntwo\n");
}

#[test]
fn what_the_machine_refuses_is_an_error() {
    let (_folder, path) = listening();
    assert_eq!(refusal(&path, "pause"), "disk0 does not stop");
    assert!(refusal(&path, "disk resize disk7").contains("no disk called disk7"));
    assert_eq!(refusal(&path, "disk resize disk0"), "the guest has ended");
    assert!(refusal(&path, "power-key").contains("has ended, or has too much to do"));
    let (json, is_refused) = words(&path, "pause", true).expect("an answer");
    assert_eq!(json, "{\"error\":\"disk0 does not stop\"}\n");
    assert!(is_refused);
    let wrong = words(&path, "quit", false).expect_err("no request");
    assert_eq!(status_of(&wrong), Status::Usage);
}

#[test]
fn a_path_where_nobody_listens_is_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("none");
    assert!(refusal(&path, "status").contains("nobody listens"));
    std::fs::write(&path, "").expect("a file");
    let error = Control::listen(&path).map(|_| ()).expect_err("a file");
    assert!(format!("{error:#}").contains("there is something else"));
    let long = folder.path().join("x".repeat(200));
    let error = Control::listen(&long).map(|_| ()).expect_err("a long name");
    assert!(format!("{error:#}").starts_with("--control: cannot listen at"));
}

#[test]
fn a_client_waits_for_its_turn_where_many_connect_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("control");
    let control = Control::listen(&path).expect("a free path");
    let mut waiting = Vec::new();
    while let Ok(stream) = armlet_system::sockets::connect_at_once(&path) {
        waiting.push(stream);
    }
    let asked = {
        let path = path.clone();
        std::thread::spawn(move || words(&path, "status", false))
    };
    // Whether it has tried by then or not, it is answered.
    std::thread::sleep(Duration::from_millis(50));
    let fixed = Fixed {
        vcpus: 1,
        memory: 1 << 20,
        devices: Vec::new(),
    };
    control.start(|| Ok(()), answer, fixed).expect("a thread");
    let (text, _) = asked.join().expect("no panic").expect("an answer");
    assert!(text.contains("paused"), "{text}");
}

#[test]
fn clients_that_misbehave_harm_nobody() {
    let (_folder, path) = listening();
    let connect = || {
        let stream = UnixStream::connect(&path).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        stream
    };
    // Half a request, garbage, no request at all, one without an end.
    let mut half = connect();
    half.write_all(b"stat").expect("a socket");
    let mut garbage = connect();
    garbage.write_all(b"\xff\x00{}\n").expect("a socket");
    let idle = connect();
    let mut endless = connect();
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    let mut said = String::new();
    // What was sent and not read makes the end of a connection an error.
    let _ = endless.read_to_string(&mut said);
    assert!(
        said.is_empty() || said.contains("up to 4096 bytes"),
        "{said}"
    );
    // One that asks, and never listens.
    let mut deaf = connect();
    deaf.set_write_timeout(Some(Duration::from_millis(100)))
        .expect("a socket");
    let requests = "status\n".repeat(100);
    while deaf.write_all(requests.as_bytes()).is_ok() {}
    // Many that come and go.
    for _ in 0..1000 {
        drop(connect());
    }
    assert!(words(&path, "status", false).is_ok());
    half.write_all(b"us\n").expect("it is still there");
    let mut bytes = [0; 6];
    half.read_exact(&mut bytes).expect("an answer");
    assert_eq!(&bytes, b"{\"ok\":");
    drop(idle);
}

#[test]
fn a_new_client_takes_the_place_of_the_one_that_is_silent_for_longest() {
    let (_folder, path) = listening();
    let connect = || {
        let mut stream = UnixStream::connect(&path).expect("it listens");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        stream.write_all(b"status\n").expect("a socket");
        // Once it is answered, it is a client.
        assert!(stream.read(&mut [0; 4096]).expect("an answer") > 0);
        stream
    };
    let mut first = connect();
    let mut second = connect();
    let mut others: Vec<UnixStream> = (0..14).map(|_| connect()).collect();
    first.write_all(b"status\n").expect("a socket");
    assert!(first.read(&mut [0; 4096]).expect("an answer") > 0);
    others.push(connect());
    assert_eq!(second.read(&mut [0; 1]).expect("an end"), 0);
    first.write_all(b"status\n").expect("a socket");
    assert!(first.read(&mut [0; 4096]).expect("an answer") > 0);
}
