//! The console device (virtio 1.2, section 5.3): one port, which Linux calls hvc0.
//!
//! Output goes to a [`Sink`] that never waits. What it has no room for stays in the driver's
//! buffers until it has, so a slow reader holds up the guest's output and nothing else. Input stays
//! with the caller until the driver has buffers for it.
//!
//! There is no MULTIPORT: without it Linux takes port 0 for a console and its size from the
//! configuration space (drivers/char/virtio_console.c: config_work_handler).

use crate::sync::ring;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::{
    Chain, ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

pub use super::state::ConsoleState;

/// Device ID.
const ID: u32 = 3;
/// VIRTIO_CONSOLE_F_SIZE: the configuration says how large the terminal is.
const FEATURE_SIZE: u64 = 1 << 0;
/// VIRTIO_CONSOLE_F_EMERG_WRITE: a character can be written with no queue.
const FEATURE_EMERGENCY: u64 = 1 << 2;

/// Queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Entries of each. Linux fills the receive queue with one page an entry.
const ENTRIES: u16 = 16;

/// Offsets in the configuration space in bytes: columns, rows, emergency character; its size.
const COLUMNS: usize = 0;
const ROWS: usize = 2;
const EMERGENCY: usize = 8;
const CONFIG_BYTES: usize = 12;

/// Bytes that are copied at a time.
const CHUNK: usize = 4096;
/// The most bytes that are taken in one go: other devices share the thread.
const MOST_AT_ONCE: usize = 64 << 10;
/// What a request costs beside its bytes, so that empty ones come to an end too.
const REQUEST_COST: usize = 256;
/// Emergency characters that are kept for a sink without room.
const MOST_LATE: usize = 4096;
/// The longest request that Linux's kernel makes when it prints (drivers/tty/hvc/hvc_console.c:
/// N_OUTBUF). A longer one comes from a program, through the terminal.
const KERNEL_REQUEST: usize = 16;

/// Where the output goes. It never waits.
pub trait Sink: Send {
    /// Takes bytes from the start of `bytes`, as many as it has room for now, and returns how many.
    fn write(&mut self, bytes: &[u8]) -> usize;

    /// A descriptor that becomes readable when there is room again after a write that did not take
    /// all. The device waits for the change and does not read it.
    fn room(&self) -> Option<RawFd>;
}

/// A console.
pub struct Console {
    sink: Box<dyn Sink>,
    on_room: Box<dyn Fn() + Send>,
    config: Arc<ConfigSpace>,
    /// Columns and rows; 0 where they are not known.
    size: (u16, u16),
    /// Emergency characters for which there was no room.
    late: Vec<u8>,
    /// How often a driver began to listen.
    sessions: u64,
    working: Option<Working>,
    /// While a driver has the console in use and the machine is held: bytes of the next request for
    /// output that were written already.
    paused: Option<usize>,
}

/// What there is while the driver uses the device.
struct Working {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    link: Arc<Link>,
    has_size: bool,
    /// A request that was taken, and how many of its bytes the sink took.
    stuck: Option<(Chain, usize)>,
    /// How many bytes of the next request the sink took before a pause.
    sent: usize,
    /// Whether there was a buffer for input once.
    listens: bool,
    /// Whether input waits for a buffer.
    waits: bool,
    /// Whether the size was told to a program's output, and to one who reads.
    told_writer: bool,
    told_reader: bool,
}

impl Console {
    /// A console of `size` columns and rows, 0 where they are not known. `on_room` is called when
    /// the driver has buffers for input after it had none.
    #[must_use]
    pub fn new(
        sink: Box<dyn Sink>,
        on_room: Box<dyn Fn() + Send>,
        size: Option<(u16, u16)>,
    ) -> Console {
        let size = size.unwrap_or_default();
        let mut config = vec![0; CONFIG_BYTES];
        put_size(&mut config, size);
        Console {
            sink,
            on_room,
            config: ConfigSpace::new(config),
            size,
            late: Vec::new(),
            sessions: 0,
            working: None,
            paused: None,
        }
    }

    /// The terminal has this many columns and rows from now on.
    pub fn resize(&mut self, size: (u16, u16)) {
        if self.size == size {
            return;
        }
        self.size = size;
        self.config.change(|config| put_size(config, size));
        self.tell_size();
    }

    /// Which of the times that a driver listened this is; `None` while none does.
    #[must_use]
    pub fn listening(&self) -> Option<u64> {
        let working = self.working.as_ref()?;
        working.listens.then_some(self.sessions)
    }

    /// Gives the guest as much of `input` as it has buffers for. Returns how many bytes it took,
    /// and whether it would take more. Where it would not, `on_room` is called once it does.
    pub fn receive(&mut self, input: &[u8]) -> (usize, bool) {
        let Some(working) = &mut self.working else {
            return (0, false);
        };
        let (taken, wants_more) = working.receive(input);
        if taken > 0 && !std::mem::replace(&mut working.told_reader, true) {
            self.tell_size();
        }
        (taken, wants_more)
    }

    /// Has the driver look at the size. Linux up to 6.12 does so at a change only, and only once
    /// it has made its port, which it does not tell: so it is told when it starts, and again when
    /// a program writes and when somebody types.
    fn tell_size(&mut self) {
        let Some(working) = &self.working else {
            return;
        };
        if working.has_size && self.size != (0, 0) {
            working.link.config_changed();
        }
    }

    fn transmit(&mut self) {
        self.send_late();
        let Some(working) = &mut self.working else {
            return;
        };
        if working.transmit(&mut *self.sink) && !std::mem::replace(&mut working.told_writer, true) {
            self.tell_size();
        }
    }

    fn send_late(&mut self) {
        if !self.late.is_empty() {
            let taken = self.sink.write(&self.late);
            self.late.drain(..taken);
        }
    }
}

impl Working {
    fn receive(&mut self, input: &[u8]) -> (usize, bool) {
        let Some(queue) = &mut self.receive else {
            return (0, false);
        };
        let mut taken = 0;
        let mut refused = 0;
        let wants_more = loop {
            if refused == ENTRIES {
                // The kick brings us back.
                ring(queue.kick());
                self.waits = true;
                break false;
            }
            let Some(chain) = queue.pop() else {
                if queue.listen() {
                    continue;
                }
                self.waits = true;
                break false;
            };
            if !chain.is_whole() {
                queue.complete(chain, 0);
                refused += 1;
                continue;
            }
            self.listens = true;
            if taken == input.len() {
                queue.undo_pop(chain);
                break true;
            }
            let written = chain.write(queue.memory(), 0, &input[taken..]);
            if written == 0 {
                queue.break_ring(format_args!("a buffer for input has no room"));
            }
            taken += written;
            queue.complete(chain, written as u32);
        };
        queue.signal();
        (taken, wants_more)
    }

    /// There may be buffers for input; returns whether there are, and somebody waits for them.
    fn has_room(&mut self) -> bool {
        if !self.waits {
            return false;
        }
        let (_, wants_more) = self.receive(&[]);
        self.waits = !wants_more;
        if let Some(queue) = self.receive.as_mut().filter(|_| wants_more) {
            queue.silence();
        }
        wants_more
    }

    /// Sends what there is. Returns whether there was a request longer than the kernel makes.
    fn transmit(&mut self, sink: &mut dyn Sink) -> bool {
        let Some(queue) = &mut self.transmit else {
            return false;
        };
        let mut is_long = false;
        let mut left = MOST_AT_ONCE;
        loop {
            queue.silence();
            while let Some((chain, sent)) = self
                .stuck
                .take()
                .or_else(|| Some((queue.pop()?, std::mem::take(&mut self.sent))))
            {
                if left == 0 {
                    ring(queue.kick());
                    self.stuck = Some((chain, sent));
                    queue.signal();
                    return is_long;
                }
                left = left.saturating_sub(REQUEST_COST);
                if !chain.is_whole() {
                    queue.complete(chain, 0);
                    continue;
                }
                is_long |= chain.readable_len() > KERNEL_REQUEST;
                match send(&chain, queue, sent, sink, &mut left) {
                    Sent::All => queue.complete(chain, 0),
                    Sent::UpTo(sent) => {
                        self.stuck = Some((chain, sent));
                        if left > 0 {
                            // The sink says when it has room; until then no kick is wanted.
                            queue.signal();
                            return is_long;
                        }
                    }
                }
            }
            if !queue.listen() {
                break;
            }
        }
        queue.signal();
        is_long
    }
}

/// How much of a request the sink took.
enum Sent {
    All,
    UpTo(usize),
}

/// Sends a request from its byte `sent` on, up to `left` bytes, which are counted down; 0 of them
/// left means that it was they that ended it.
fn send(
    chain: &Chain,
    queue: &Virtqueue,
    mut sent: usize,
    sink: &mut dyn Sink,
    left: &mut usize,
) -> Sent {
    let mut buffer = [0; CHUNK];
    loop {
        let count = chain.read(queue.memory(), sent, &mut buffer);
        if count == 0 {
            return Sent::All;
        }
        let count = count.min(*left);
        let taken = sink.write(&buffer[..count]);
        sent += taken;
        *left -= taken;
        if taken < count || *left == 0 {
            return Sent::UpTo(sent);
        }
    }
}

fn put_size(config: &mut [u8], (columns, rows): (u16, u16)) {
    config[COLUMNS..COLUMNS + 2].copy_from_slice(&columns.to_le_bytes());
    config[ROWS..ROWS + 2].copy_from_slice(&rows.to_le_bytes());
}

impl VirtioDevice for Console {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURE_SIZE | FEATURE_EMERGENCY
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES; 2]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let (EMERGENCY, Some(character)) = (offset, data.first()) else {
            if let Some(working) = &self.working {
                let link = &working.link;
                link.fault(format_args!(
                    "the driver writes its configuration at {offset}"
                ));
            }
            return;
        };
        // A driver that goes on when nobody reads loses the characters, and nothing else.
        if self.late.len() < MOST_LATE {
            self.late.push(*character);
        }
        self.send_late();
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        let paused = self.paused.take();
        if paused.is_none() {
            self.sessions += 1;
        }
        self.working = Some(Working {
            receive: driver.take(RECEIVE),
            transmit: driver.take(TRANSMIT),
            has_size: driver.features & FEATURE_SIZE != 0,
            link: driver.link,
            stuck: None,
            sent: paused.unwrap_or(0),
            listens: false,
            waits: true,
            told_writer: false,
            told_reader: false,
        });
        self.tell_size();
        self.kicked(RECEIVE);
        self.kicked(TRANSMIT);
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        let Some(mut working) = self.working.take() else {
            return Positions::new();
        };
        let mut sent = working.sent;
        if let (Some(queue), Some((chain, part))) = (&mut working.transmit, working.stuck) {
            queue.hand_back([chain]);
            sent = part;
        }
        self.paused = Some(sent);
        let queues = [&mut working.receive, &mut working.transmit];
        quiesced(queues.into_iter().flatten())
    }

    fn reset(&mut self) {
        self.working = None;
        self.paused = None;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            late: self.late.clone(),
            sent: self.paused.unwrap_or(0),
            in_use: self.paused.is_some(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console(state) = state else {
            return Err(RestoreError::kind(state));
        };
        if state.late.len() > MOST_LATE {
            return Err(RestoreError(format!(
                "{} emergency characters wait, of which {MOST_LATE} are kept",
                state.late.len()
            )));
        }
        self.late.clone_from(&state.late);
        self.paused = state.in_use.then_some(state.sent);
        if state.in_use {
            // Whoever gives input sees a driver that begins to listen.
            self.sessions += 1;
        }
        Ok(())
    }

    fn stop_queue(&mut self, queue: usize) {
        let Some(working) = &mut self.working else {
            return;
        };
        match queue {
            RECEIVE => {
                working.receive = None;
                working.listens = false;
            }
            _ => {
                working.transmit = None;
                working.stuck = None;
                working.sent = 0;
            }
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let Some(working) = &mut self.working else {
            return Ok(());
        };
        match usize::from(queue.index()) {
            RECEIVE => {
                // Who listens now is another than before.
                self.sessions += 1;
                working.receive = Some(queue);
                working.waits = true;
            }
            _ => working.transmit = Some(queue),
        }
        Ok(())
    }

    /// Linux waits busily until its output is taken (drivers/char/virtio_console.c: `__send_to_port`),
    /// on the very CPU that another thread may need.
    fn answers_at_once(&self, queue: usize) -> bool {
        queue == TRANSMIT
    }

    fn kicked(&mut self, queue: usize) {
        match queue {
            RECEIVE => {
                if self.working.as_mut().is_some_and(Working::has_room) {
                    (self.on_room)();
                }
            }
            _ => self.transmit(),
        }
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source {
            fd,
            output: false,
            edge: true,
        };
        self.sink.room().map(source).into_iter().collect()
    }

    fn ready(&mut self, _source: usize) {
        self.transmit();
    }
}

#[cfg(test)]
mod tests;
