//! Clients that behave, and clients that do not.

use super::*;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

struct Echo;

impl Handler for Echo {
    fn handle(&mut self, request: &Request) -> Step {
        match request.method {
            crate::http::Method::Put => Step::Start,
            _ => Step::Answer(Answer::with(&request.path)),
        }
    }
}

struct Served {
    folder: tempfile::TempDir,
}

impl Served {
    /// Serves on a thread of its own: PUT starts, everything else is answered by its path. A start is
    /// answered by `started`.
    fn new(started: mpsc::Receiver<Answer>) -> Served {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("s")).expect("a socket");
        let mut server = Server::new(Some(listener), 1000).expect("a server");
        thread::spawn(move || {
            while let Ok(pending) = server.serve(&mut Echo) {
                match started.recv() {
                    Ok(answer) => server.answer(&pending, &answer),
                    Err(_) => return,
                }
            }
        });
        Served { folder }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("s")
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).expect("a limit");
    stream
}

/// The status and body of the next answer.
fn answer(stream: &mut BufReader<UnixStream>) -> (String, String) {
    let mut status = String::new();
    stream.read_line(&mut status).expect("a line");
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a header");
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.trim().parse().expect("a number");
        }
        if line == "\r\n" || line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("a body");
    let body = String::from_utf8(body).expect("text");
    (status.trim().to_owned(), body)
}

const GET: &[u8] = b"GET /x HTTP/1.1\r\n\r\n";
const PUT: &[u8] = b"PUT /y HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";

fn is_answered(path: &Path) {
    let mut stream = BufReader::new(connect(path));
    stream.get_mut().write_all(GET).expect("sent");
    let expected = ("HTTP/1.1 200".to_owned(), "\"/x\"".to_owned());
    assert_eq!(answer(&mut stream), expected);
}

#[test]
fn answers_come_in_the_order_of_requests_and_a_start_is_waited_for() {
    let (start, started) = mpsc::channel();
    let served = Served::new(started);
    let mut stream = BufReader::new(connect(&served.path()));
    stream
        .get_mut()
        .write_all(&[GET, PUT, GET].concat())
        .expect("sent");
    assert_eq!(answer(&mut stream).1, "\"/x\"");
    start.send(Answer::done()).expect("it waits");
    assert_eq!(answer(&mut stream).0, "HTTP/1.1 204");
    assert_eq!(answer(&mut stream).1, "\"/x\"");
    // One that sends no more still gets its answers.
    stream.get_mut().write_all(GET).expect("sent");
    let shut = stream.get_mut().shutdown(std::net::Shutdown::Write);
    shut.expect("half closed");
    assert_eq!(answer(&mut stream).1, "\"/x\"");
    assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
}

#[test]
fn who_starts_the_machine_and_goes_away_harms_nobody() {
    let (start, started) = mpsc::channel();
    let served = Served::new(started);
    let mut stream = connect(&served.path());
    stream.write_all(PUT).expect("sent");
    drop(stream);
    start.send(Answer::done()).expect("it waits");
    is_answered(&served.path());
}

#[test]
fn one_too_many_is_told_so() {
    let (_start, started) = mpsc::channel();
    let served = Served::new(started);
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| BufReader::new(connect(&served.path())))
        .collect();
    for client in &mut clients {
        client.get_mut().write_all(GET).expect("sent");
        assert_eq!(answer(client).1, "\"/x\"");
    }
    let mut told = Vec::new();
    connect(&served.path())
        .read_to_end(&mut told)
        .expect("told");
    assert_eq!(told, BUSY);
    drop(clients);
    // The places are free once the server has seen it.
    let mut stream = BufReader::new(connect(&served.path()));
    for _ in 0..100 {
        let _ = stream.get_mut().write_all(GET);
        if answer(&mut stream).0 == "HTTP/1.1 200" {
            return;
        }
        stream = BufReader::new(connect(&served.path()));
    }
    panic!("no place became free");
}

#[test]
fn garbage_halves_and_the_deaf_hold_nobody_up() {
    let (_start, started) = mpsc::channel();
    let served = Served::new(started);
    let path = served.path();
    let mut half = connect(&path);
    half.write_all(b"GET /x HT").expect("sent");
    let mut garbage = BufReader::new(connect(&path));
    garbage.get_mut().write_all(&[0x80; 3000]).expect("sent");
    assert_eq!(answer(&mut garbage).0, "HTTP/1.1 400");
    // It takes no answer, until it can send no more.
    let mut deaf = connect(&path);
    deaf.set_nonblocking(true).expect("set");
    let mut sent = 0_u64;
    loop {
        match deaf.write(&GET.repeat(1000)) {
            Ok(count) => sent += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                is_answered(&path);
                if matches!(deaf.write(GET), Err(error) if error.kind() == ErrorKind::WouldBlock) {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1 << 28, "the server keeps all of it");
    }
    let large = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", 1_u64 << 30);
    let mut stream = BufReader::new(connect(&path));
    stream.get_mut().write_all(large.as_bytes()).expect("sent");
    assert_eq!(answer(&mut stream).0, "HTTP/1.1 400");
    for _ in 0..1000 {
        drop(UnixStream::connect(&path));
    }
    half.write_all(b"TP/1.1\r\n\r\n").expect("sent");
    assert_eq!(answer(&mut BufReader::new(half)).1, "\"/x\"");
}

#[test]
fn what_answers_hears_that_a_client_has_its_answer() {
    /// Ends what serves, once its client has the answer.
    struct Once(UnixStream, bool);

    impl Handler for Once {
        fn handle(&mut self, request: &Request) -> Step {
            match self.1 {
                true => Step::End(Answer::done()),
                false => Step::Answer(Answer::with(&request.path)),
            }
        }

        fn answered(&mut self) {
            let mut stream = BufReader::new(self.0.try_clone().expect("a stream"));
            assert!(answer(&mut stream).0.starts_with("HTTP/1.1 200"));
            self.0.write_all(GET).expect("sent");
            self.1 = true;
        }
    }

    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut server = Server::new(Some(listener), 1000).expect("a server");
    let mut client = connect(&path);
    client.write_all(GET).expect("sent");
    let pending = server.serve(&mut Once(client, false)).expect("served");
    assert!(pending.is_end);
}
