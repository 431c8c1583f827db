//! The thread that serves gdb.

use super::guest::{Guest, Send};
use super::target::Target;
use super::{Address, Place};
use crate::kvm::debug;
use crate::run::Command;
use crate::vcpu::Traps;
use anyhow::{Context, Result, anyhow, bail};
use armlet_arch::debug::Limits;
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use armlet_system::messages;
use armlet_system::sockets::{self, Access};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as State;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use kvm_ioctls::Kvm;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{SocketFlags, accept_with, sockopt};
use std::fmt::{Debug, Display};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 256 << 10;
/// The longest packet of a client.
const PACKET: usize = 16 << 10;
/// The most bytes of an answer that wait to be sent.
const ANSWER: usize = 64 << 10;
/// How long a client may take to receive an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the guest may take to be started, for a client that comes before.
const START: Duration = Duration::from_secs(120);
/// The pause after a client that could not be accepted.
const PAUSE: Duration = Duration::from_millis(10);

/// The debugger's end, which listens.
pub struct Debugger {
    listener: OwnedFd,
    traps: Arc<Traps>,
    limits: (Limits, bool),
}

impl Debugger {
    /// Listens, for this user or this host alone.
    ///
    /// # Errors
    /// An address where nothing can listen.
    pub fn listen(address: &Address, kvm: &Kvm) -> Result<Debugger> {
        let (listener, shown) = match &address.place {
            Place::Unix(path) => {
                let shown = path.display().to_string();
                let listener = sockets::listen(path, Access::Owner)
                    .with_context(|| format!("--gdb: cannot listen at {shown}"))?;
                (OwnedFd::from(listener), shown)
            }
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address)
                    .with_context(|| format!("--gdb: cannot listen at {address}"))?;
                let shown = listener.local_addr().unwrap_or(*address).to_string();
                (OwnedFd::from(listener), shown)
            }
        };
        ioctl_fionbio(&listener, true)?;
        if address.waits {
            messages::say(&format!(
                "the guest waits for gdb before its first instruction: target remote {shown}"
            ));
        }
        Ok(Debugger {
            listener,
            traps: Arc::new(Traps::new(address.waits).context("no room for a descriptor")?),
            limits: debug::limits(kvm),
        })
    }

    /// What vCPUs tell it.
    #[must_use]
    pub fn traps(&self) -> &Arc<Traps> {
        &self.traps
    }

    /// Starts the thread, which ends with the process, and serves nobody unless `begin` succeeds there.
    /// `send` gives back commands that are not taken.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start(
        self,
        begin: impl FnOnce() -> Result<()> + std::marker::Send + 'static,
        send: impl Fn(Command) -> Result<(), Command> + std::marker::Send + 'static,
        memory: Arc<GuestMemoryMmap>,
        vcpus: usize,
    ) -> Result<()> {
        let send: Send = Box::new(send);
        let guest = Guest {
            send,
            memory,
            vcpus,
        };
        let serve = move || {
            let mut target = Target::new(guest, self.limits);
            if let Err(error) =
                begin().and_then(|()| serve(&self.listener, &self.traps, &mut target))
            {
                log::error!("gdb is served no more: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("gdb".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(serve);
        started.context("cannot start the thread gdb")?;
        Ok(())
    }
}

fn serve(listener: &OwnedFd, traps: &Traps, target: &mut Target) -> Result<()> {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(traps.bell(), PollFlags::IN),
        ];
        uninterrupted(|| poll(&mut fds, None)).context("cannot wait for clients")?;
        if !fds[1].revents().is_empty() {
            let happened = traps.take();
            if happened.is_new_life {
                target.begin_life();
            }
            if happened.ended.is_some() {
                traps.end_was_told();
            }
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        let Some(client) = accept(listener) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        let held = traps.holds();
        traps.set_holds(true);
        if let Err(error) = target.attach(START) {
            log::warn!("gdb: {error:#}");
            traps.set_holds(held);
            continue;
        }
        // It stands where it was started, which the client need not be told of.
        if traps.take().is_new_life {
            target.begin_life();
        }
        log::info!("gdb: a client has come; the guest stands still");
        match session(&client, listener, traps, target) {
            Ok(DisconnectReason::Kill) => {
                // A guest that has ended is none to stop.
                let _ = target.guest.stop();
            }
            Ok(_) => {}
            Err(error) => log::info!("gdb: the client is let go: {error:#}"),
        }
        traps.set_holds(false);
        target.detach();
        log::info!("gdb: the client is gone; the guest runs");
    }
}

fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let client = uninterrupted(|| accept_with(listener, flags)).ok()?;
    // Answers are short, and gdb waits for each. A Unix socket has no such option.
    let _ = sockopt::set_tcp_nodelay(&client, true);
    Some(client)
}

/// A client, and what is to be sent to it.
struct Wire<'a> {
    client: &'a OwnedFd,
    answer: Vec<u8>,
}

impl Connection for Wire<'_> {
    type Error = anyhow::Error;

    fn write(&mut self, byte: u8) -> Result<()> {
        if self.answer.len() == ANSWER {
            bail!("an answer has more than {ANSWER} bytes");
        }
        self.answer.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let deadline = Deadline::after(PATIENCE);
        let mut rest = self.answer.as_slice();
        while !rest.is_empty() {
            let flags = rustix::net::SendFlags::NOSIGNAL;
            match uninterrupted(|| rustix::net::send(self.client, rest, flags)) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::AGAIN) => {
                    if !deadline.wait(self.client, PollFlags::OUT)? {
                        bail!("it takes no answers");
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.answer.clear();
        Ok(())
    }
}

/// What was waited for.
enum News {
    /// These many bytes of the client.
    Bytes(usize),
    /// The client is gone.
    Gone,
    /// vCPUs or the event loop tell something.
    Bell,
}

/// Waits for the client, and for what vCPUs tell. Other clients are refused meanwhile.
fn wait(client: &OwnedFd, listener: &OwnedFd, traps: &Traps, bytes: &mut [u8]) -> Result<News> {
    loop {
        let mut fds = [
            PollFd::new(client, PollFlags::IN),
            PollFd::new(traps.bell(), PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        uninterrupted(|| poll(&mut fds, None)).context("cannot wait for the client")?;
        let [from_client, bell, other] = fds.map(|fd| !fd.revents().is_empty());
        if bell {
            return Ok(News::Bell);
        }
        if from_client {
            match uninterrupted(|| rustix::io::read(client, &mut *bytes)) {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(News::Gone),
                Ok(count) => return Ok(News::Bytes(count)),
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Looked at last: whoever comes as the client goes is the next one.
        if other {
            match accept(listener) {
                Some(_) => log::info!("gdb: another client is refused"),
                None => std::thread::sleep(PAUSE),
            }
        }
    }
}

/// Serves a client until it is gone.
fn session(
    client: &OwnedFd,
    listener: &OwnedFd,
    traps: &Traps,
    target: &mut Target,
) -> Result<DisconnectReason> {
    let wire = Wire {
        client,
        answer: Vec::new(),
    };
    // One that is not lent grows with what the client sends.
    let mut packet = vec![0; PACKET];
    let stub = GdbStub::builder(wire)
        .with_packet_buffer(&mut packet)
        .build();
    let stub = stub.map_err(|_| anyhow!("no room for packets"))?;
    let mut state = stub.run_state_machine(target).map_err(told)?;
    let mut bytes = [0; 4096];
    // Those that were read and not looked at.
    let mut next = 0..0;
    loop {
        state = match state {
            State::Disconnected(state) => return Ok(state.get_reason()),
            State::CtrlCInterrupt(state) => {
                let reason = target.interrupt();
                state
                    .interrupt_handled(target, Some(reason))
                    .map_err(told)?
            }
            State::Idle(state) if !next.is_empty() => {
                let byte = bytes[next.next().unwrap_or_default()];
                state.incoming_data(target, byte).map_err(told)?
            }
            State::Running(state) if !next.is_empty() => {
                let byte = bytes[next.next().unwrap_or_default()];
                state.incoming_data(target, byte).map_err(told)?
            }
            State::Idle(state) => match wait(client, listener, traps, &mut bytes)? {
                News::Bytes(count) => {
                    next = 0..count;
                    state.into()
                }
                News::Gone => return Ok(DisconnectReason::Disconnect),
                News::Bell => {
                    let happened = traps.take();
                    if happened.is_new_life {
                        // It stands still already, before its first instruction.
                        target.begin_life();
                    }
                    if happened.ended.is_some() {
                        traps.end_was_told();
                        return Ok(DisconnectReason::Disconnect);
                    }
                    state.into()
                }
            },
            State::Running(state) => {
                // What was met together with the last stop.
                let happened = match target.has_pending() {
                    true => Default::default(),
                    false => match wait(client, listener, traps, &mut bytes)? {
                        News::Bytes(count) => {
                            next = 0..count;
                            Default::default()
                        }
                        News::Gone => return Ok(DisconnectReason::Disconnect),
                        News::Bell => traps.take(),
                    },
                };
                if let Some(status) = happened.ended {
                    let told_of = state.report_stop(target, MultiThreadStopReason::Exited(status));
                    traps.end_was_told();
                    told_of.map_err(told)?
                } else {
                    match target.stopped(happened) {
                        Some(reason) => state.report_stop(target, reason).map_err(told)?,
                        None => state.into(),
                    }
                }
            }
        };
    }
}

/// What went wrong with a session, in one line.
fn told<T: Display, C: Display + Debug>(error: GdbStubError<T, C>) -> anyhow::Error {
    match error.is_connection_error() {
        true => anyhow!("{error}"),
        false => anyhow!("it does not speak gdb's protocol as gdb does: {error}"),
    }
}
