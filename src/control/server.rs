//! The thread that serves the control socket.

use super::answer::{self, TEXT};
use super::line::{Lines, MOST};
use super::request::Request;
use crate::run::{By, Command, Reply, State};
use anyhow::{Context, Result, bail};
use armlet_system::eintr::uninterrupted;
use armlet_system::sockets::{self, Access};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// The most clients at a time; for a further one, the one that was silent for longest is let go.
const CLIENTS: usize = 16;
/// How long a request may take, before its client is told that it takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
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
            let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(listener, PollFlags::IN)];
            for client in &clients {
                fds.push(PollFd::new(&client.stream, PollFlags::IN));
            }
            uninterrupted(|| poll(&mut fds, None)).context("cannot wait for clients")?;
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
        loop {
            let (answer, stays) = match client.lines.take() {
                Ok(None) => return true,
                Ok(Some(line)) => {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    match words.split_first() {
                        Some((&TEXT, words)) => (answer::as_text(self.carry_out(words)), true),
                        _ => (answer::as_json(self.carry_out(&words)), true),
                    }
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

    fn carry_out(&self, words: &[&str]) -> Result<Value> {
        let none = Value::Null;
        match Request::parse(words)? {
            Request::Status => {
                let state = self.ask(Command::Status)?;
                Ok(self.status(&state))
            }
            Request::Pause => refused(self.ask(Command::Pause)?).map(|()| none),
            Request::Resume => self.ask(Command::Resume).map(|()| none),
            Request::Reset => self.ask(Command::Reset).map(|()| none),
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

fn refused<T>(answer: Result<T, String>) -> Result<T> {
    answer.map_err(anyhow::Error::msg)
}
