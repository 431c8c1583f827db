//! The connections of clients: requests in, answers out, in order and within bounds.

use crate::http::{Answer, BUSY, CONTINUE, Input, Request, Requests};
use crate::microvm::Step;
use armlet_system::eintr::uninterrupted;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// The most clients at a time.
pub const CLIENTS: usize = 10;
/// The most bytes read at a time.
const PIECE: usize = 4096;
/// The most bytes of answers that a client leaves lying before its requests wait.
const LYING: usize = 1 << 16;
/// The pause after a client that could not be accepted.
const PAUSE: Duration = Duration::from_millis(10);

/// What answers requests.
pub trait Handler {
    /// Carries out a request.
    fn handle(&mut self, request: &Request) -> Step;

    /// The request's client has its answer, or is gone.
    fn answered(&mut self) {}

    /// When [`Self::pass`] is to be called.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The deadline has passed.
    fn pass(&mut self) {}
}

/// The client whose request has no answer yet.
#[derive(Debug, PartialEq, Eq)]
pub struct Pending {
    client: u64,
    /// Whether it has its answer, and nothing is served any more.
    pub is_end: bool,
}

struct Client {
    number: u64,
    stream: UnixStream,
    requests: Requests,
    /// What it did not take yet.
    out: Vec<u8>,
    /// Whether it sends no more.
    has_ended: bool,
    /// Whether it waits for an answer.
    waits: bool,
}

impl Client {
    /// Reads what is there; returns whether the client stays.
    fn read(&mut self) -> bool {
        let mut bytes = [0; PIECE];
        match uninterrupted(|| rustix::io::read(&self.stream, &mut bytes)) {
            Ok(0) => self.has_ended = true,
            Ok(count) => self.requests.push(&bytes[..count]),
            Err(error) => return error == Errno::AGAIN,
        }
        true
    }

    /// Writes what it takes; returns whether the client stays.
    fn write(&mut self) -> bool {
        while !self.out.is_empty() {
            match uninterrupted(|| rustix::io::write(&self.stream, &self.out)) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) => return error == Errno::AGAIN,
            }
        }
        true
    }

    fn send(&mut self, answer: &Answer) -> bool {
        self.out.extend_from_slice(&answer.to_bytes());
        self.write()
    }

    /// Whether it is read: not while it leaves answers lying or waits for one.
    fn is_read(&self) -> bool {
        !self.has_ended && !self.waits && self.out.len() < LYING
    }
}

/// The connections at a socket.
pub struct Server {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    next: u64,
    /// The most bytes of a body.
    most: usize,
}

impl Server {
    /// Serves who connects to `listener`, if there is one; a body has up to `most` bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(listener: Option<UnixListener>, most: usize) -> io::Result<Server> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Server {
            listener,
            clients: Vec::new(),
            next: 0,
            most,
        })
    }

    /// Answers requests by `handler`, until one is to start the machine: its client waits for
    /// [`Self::answer`].
    ///
    /// # Errors
    /// A failed wait.
    pub fn serve(&mut self, handler: &mut dyn Handler) -> io::Result<Pending> {
        loop {
            // Answers first what has been read: a client may have sent more than one request.
            for at in 0..self.clients.len() {
                if let Some(pending) = self.handle(at, handler) {
                    return Ok(pending);
                }
            }
            self.clients
                .retain(|client| !client.has_ended || client.waits || !client.out.is_empty());
            if handler
                .deadline()
                .is_some_and(|deadline| deadline <= Instant::now())
            {
                handler.pass();
            }
            self.wait(handler.deadline())?;
        }
    }

    /// Answers the client that waits.
    pub fn answer(&mut self, pending: &Pending, answer: &Answer) {
        let mut clients = self.clients.iter_mut();
        if let Some(client) = clients.find(|client| client.number == pending.client) {
            client.waits = false;
            if !client.send(answer) {
                client.has_ended = true;
                client.out.clear();
            }
        }
    }

    fn handle(&mut self, at: usize, handler: &mut dyn Handler) -> Option<Pending> {
        let most = self.most;
        let client = &mut self.clients[at];
        while !client.waits && client.out.len() < LYING {
            let stays = match client.requests.take(most) {
                None => return None,
                Some(Input::Continue) => {
                    client.out.extend_from_slice(CONTINUE);
                    client.write()
                }
                Some(Input::Wrong(why)) => client.send(&Answer::wrong(&why)),
                Some(Input::Request(request)) => match handler.handle(&request) {
                    Step::Answer(answer) => {
                        let stays = client.send(&answer);
                        handler.answered();
                        stays
                    }
                    Step::Start => {
                        client.waits = true;
                        return Some(Pending {
                            client: client.number,
                            is_end: false,
                        });
                    }
                    Step::End(answer) => {
                        client.send(&answer);
                        return Some(Pending {
                            client: client.number,
                            is_end: true,
                        });
                    }
                },
            };
            if !stays {
                client.has_ended = true;
                client.out.clear();
                client.requests = Requests::default();
            }
        }
        None
    }

    fn wait(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = Vec::with_capacity(1 + self.clients.len());
        for client in &self.clients {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, client.is_read());
            flags.set(PollFlags::OUT, !client.out.is_empty());
            fds.push(PollFd::new(&client.stream, flags));
        }
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        uninterrupted(|| poll(&mut fds, left.as_ref()))?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut ready = ready.into_iter();
        let mut stay = Vec::with_capacity(self.clients.len());
        for (mut client, is_ready) in self.clients.drain(..).zip(&mut ready) {
            if !is_ready {
                stay.push(client);
                continue;
            }
            let reads = client.is_read();
            if client.write() && (!reads || client.read()) {
                stay.push(client);
            }
        }
        self.clients = stay;
        if ready.next() == Some(true) {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        let stream = match self.listener.as_ref().map(UnixListener::accept) {
            None => return,
            Some(Ok((stream, _))) => stream,
            Some(Err(error)) => {
                // It may be gone again, or there is no descriptor for it: the next wait tells.
                if error.kind() != io::ErrorKind::WouldBlock {
                    std::thread::sleep(PAUSE);
                }
                return;
            }
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= CLIENTS {
            // It is told at once, or not at all.
            let _ = (&stream).write(BUSY);
            return;
        }
        self.clients.push(Client {
            number: self.next,
            stream,
            requests: Requests::default(),
            out: Vec::new(),
            has_ended: false,
            waits: false,
        });
        self.next += 1;
    }
}

#[cfg(test)]
mod tests;
