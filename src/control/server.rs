//! The thread that serves the control socket.

use super::answer::{self, TEXT};
use super::line::{Lines, MOST};
use super::request::Request;
use crate::run::{By, Command, Reply, State};
use crate::snapshot::{Wanted, Written};
use anyhow::{Context, Result, anyhow, bail};
use armlet_backends::drafts::Place;
use armlet_system::eintr::uninterrupted;
use armlet_system::sockets::{self, Access};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

/// The most clients at a time; for a further one, the one that was silent for longest is let go.
const CLIENTS: usize = 16;
/// How long a request may take, before its client is told that it takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether a snapshot is there.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// The pause after a client that could not be accepted.
const PAUSE: Duration = Duration::from_millis(10);
/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

/// A socket at which control is offered.
pub struct Control {
    listener: UnixListener,
}

/// What does not change while a guest runs.
#[derive(Clone, Debug)]
pub struct Fixed {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Names of the virtio devices.
    pub devices: Vec<String>,
}

impl Control {
    /// Listens at `path`, for this user alone.
    ///
    /// # Errors
    /// A path where something is already, or where nothing can be made.
    pub fn listen(path: &Path) -> Result<Control> {
        let shown = path.display();
        let listener = sockets::listen(path, Access::Owner)
            .with_context(|| format!("--control: cannot listen at {shown}"))?;
        listener.set_nonblocking(true)?;
        Ok(Control { listener })
    }

    /// Starts the thread, which ends with the process, and serves nobody unless `begin` succeeds there.
    /// `send` gives back commands that are not taken.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start(
        self,
        begin: impl FnOnce() -> Result<()> + Send + 'static,
        send: impl Fn(Command) -> Result<(), Command> + Send + 'static,
        fixed: Fixed,
    ) -> Result<()> {
        let server = Server {
            send: Box::new(send),
            fixed,
            begun: Instant::now(),
        };
        let serve = move || {
            if let Err(error) = begin().and_then(|()| server.serve(&self.listener)) {
                log::error!("the control socket is served no more: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("control".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(serve);
        started.context("cannot start the thread control")?;
        Ok(())
    }
}

struct Client {
    stream: UnixStream,
    lines: Lines,
    /// What it waits for, and whether the answer is for people.
    pending: Option<(Receiver<Result<Written, String>>, bool)>,
}

/// What comes of a request.
enum Outcome {
    /// The answer.
    Now(Value),
    /// It comes when a snapshot is there.
    Later(Receiver<Result<Written, String>>),
}

struct Server {
    /// Sends a command to the event loop, and gives back what it does not take.
    send: Box<dyn Fn(Command) -> Result<(), Command> + Send>,
    fixed: Fixed,
    begun: Instant,
}

impl Server {
    fn serve(&self, listener: &UnixListener) -> Result<()> {
        // The one that was silent for longest comes first.
        let mut clients: Vec<Client> = Vec::new();
        loop {
            clients.retain_mut(|client| match answer_pending(client) {
                Pending::Waits => true,
                Pending::Answered => self.answer_lines(client),
                Pending::Gone => false,
            });
            let is_pending = clients.iter().any(|client| client.pending.is_some());
            let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(listener, PollFlags::IN)];
            for client in &clients {
                // One that waits for an answer is heard after it.
                let events = match client.pending {
                    None => PollFlags::IN,
                    Some(_) => PollFlags::empty(),
                };
                fds.push(PollFd::new(&client.stream, events));
            }
            let limit = is_pending.then_some(&LOOK);
            uninterrupted(|| poll(&mut fds, limit)).context("cannot wait for clients")?;
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            let is_new = ready.next() == Some(true);
            let ready: Vec<bool> = ready.collect();
            let mut active = Vec::new();
            let mut silent = Vec::new();
            for (mut client, is_ready) in clients.drain(..).zip(ready) {
                match is_ready {
                    false => silent.push(client),
                    true if self.answer(&mut client) => active.push(client),
                    true => {}
                }
            }
            clients = silent;
            clients.append(&mut active);
            if is_new {
                let accepted = listener.accept().and_then(|(stream, _)| {
                    stream.set_nonblocking(true)?;
                    Ok(stream)
                });
                match accepted {
                    Ok(stream) => {
                        if clients.len() == CLIENTS {
                            clients.remove(0);
                        }
                        clients.push(Client {
                            stream,
                            lines: Lines::default(),
                            pending: None,
                        });
                    }
                    // It may be gone again, or there is no descriptor for it: the next wait tells.
                    Err(_) => std::thread::sleep(PAUSE),
                }
            }
        }
    }

    /// Answers what a client has asked; returns whether it stays.
    fn answer(&self, client: &mut Client) -> bool {
        let mut bytes = [0; MOST];
        match uninterrupted(|| rustix::io::read(&client.stream, &mut bytes)) {
            Ok(0) => return false,
            Ok(count) => client.lines.push(&bytes[..count]),
            Err(error) => return error == Errno::AGAIN,
        }
        self.answer_lines(client)
    }

    /// Answers the lines that a client has sent, up to one whose answer comes later; returns whether it
    /// stays.
    fn answer_lines(&self, client: &mut Client) -> bool {
        loop {
            let (answer, stays) = match client.lines.take() {
                Ok(None) => return true,
                Ok(Some(line)) => {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    let (is_text, words) = match words.split_first() {
                        Some((&TEXT, words)) => (true, words),
                        _ => (false, &*words),
                    };
                    let answer = match self.carry_out(words) {
                        Ok(Outcome::Later(receiver)) => {
                            client.pending = Some((receiver, is_text));
                            return true;
                        }
                        Ok(Outcome::Now(value)) => Ok(value),
                        Err(error) => Err(error),
                    };
                    (answer::of(answer, is_text), true)
                }
                Err(error) => (answer::as_json(Err(error.into())), false),
            };
            // One that takes no answers holds nobody up: it is let go.
            let sent = client.stream.write_all(answer.as_bytes());
            if sent.is_err() || !stays {
                return false;
            }
        }
    }

    fn carry_out(&self, words: &[&str]) -> Result<Outcome> {
        let request = Request::parse(words)?;
        let Request::Snapshot { folder, is_diff } = request else {
            return self.carry_out_now(request).map(Outcome::Now);
        };
        let wanted = Wanted {
            place: Place::Folder(folder.into()),
            is_diff,
            only_paused: false,
            microvm: None,
        };
        let (reply, answer) = Reply::channel();
        self.send(Command::Snapshot(wanted, reply))?;
        Ok(Outcome::Later(answer))
    }

    fn carry_out_now(&self, request: Request) -> Result<Value> {
        let none = Value::Null;
        match request {
            // It takes long.
            Request::Snapshot { .. } => Ok(none),
            Request::Status => {
                let state = self.ask(Command::Status)?;
                Ok(self.status(&state))
            }
            Request::Pause => refused(self.ask(Command::Pause)?).map(|()| none),
            Request::Resume => refused(self.ask(Command::Resume)?).map(|()| none),
            Request::Reset => refused(self.ask(Command::Reset)?).map(|()| none),
            Request::PowerKey => self.send(Command::PowerKey).map(|()| none),
            Request::Stop => self.send(Command::Stop(By::Control)).map(|()| none),
            Request::Stats => self.ask(Command::Counters).map(|lines| json!(lines)),
            Request::Balloon(bytes) => {
                refused(self.ask(|reply| Command::SetBalloon(bytes, reply))?)?;
                Ok(json!({ "bytes": bytes }))
            }
            Request::ResizeDisk(name) => {
                let ask = |reply| Command::LookAtDisk(name.clone(), reply);
                let bytes = refused(self.ask(ask)?)?;
                Ok(json!({ "disk": name, "bytes": bytes }))
            }
            Request::ChangeDisk(name, path) => {
                let ask = |reply| Command::ChangeDisk(name.clone(), path.into(), reply);
                let bytes = refused(self.ask(ask)?)?;
                Ok(json!({ "disk": name, "bytes": bytes }))
            }
        }
    }

    fn status(&self, state: &State) -> Value {
        json!({
            "state": if state.is_paused { "paused" } else { "running" },
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.begun.elapsed().as_secs(),
            "restarts": state.restarts,
            "vcpus": self.fixed.vcpus,
            "memory_bytes": self.fixed.memory,
            "devices": self.fixed.devices,
        })
    }

    fn send(&self, command: Command) -> Result<()> {
        match (self.send)(command) {
            Ok(()) => Ok(()),
            Err(_) => bail!("the guest has ended, or has too much to do; try again"),
        }
    }

    /// Sends a command and waits for its answer.
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer): (_, Receiver<T>) = Reply::channel();
        self.send(command(reply))?;
        match answer.recv_timeout(PATIENCE) {
            Ok(answer) => Ok(answer),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => bail!("the guest has ended"),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                bail!("no answer within {PATIENCE:?}: it may still be done")
            }
        }
    }
}

/// What became of a client that may wait for an answer.
enum Pending {
    Waits,
    Answered,
    Gone,
}

/// Answers a client whose snapshot is there.
fn answer_pending(client: &mut Client) -> Pending {
    let Some((receiver, is_text)) = &client.pending else {
        return Pending::Waits;
    };
    let answer = match receiver.try_recv() {
        Ok(answer) => refused(answer).map(|written| {
            json!({
                "id": written.id,
                "memory_bytes": written.bytes,
                "milliseconds": written.time.as_millis() as u64,
            })
        }),
        Err(TryRecvError::Empty) => return Pending::Waits,
        Err(TryRecvError::Disconnected) => Err(anyhow!("the guest has ended")),
    };
    let answer = answer::of(answer, *is_text);
    client.pending = None;
    match client.stream.write_all(answer.as_bytes()) {
        Ok(()) => Pending::Answered,
        Err(_) => Pending::Gone,
    }
}

fn refused<T>(answer: Result<T, String>) -> Result<T> {
    answer.map_err(anyhow::Error::msg)
}
