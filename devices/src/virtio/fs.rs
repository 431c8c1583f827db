//! The file system device (virtio 1.2, section 5.11), whose requests another process serves.
//!
//! When that process ends, the device goes on by itself: each request gets an I/O error, so that
//! nothing in the guest waits for ever.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    Chain, ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

pub use super::state::{FsState, Served};

/// Device ID.
const ID: u32 = 26;
/// Entries of each queue. Linux has no request of more pages than there are entries
/// (fs/fuse/virtio_fs.c: max_pages_limit), and would have up to 256.
const ENTRIES: u16 = 1024;
/// The most bytes of a tag.
pub const TAG: usize = 36;

/// Bytes of struct fuse_in_header (include/uapi/linux/fuse.h), with the request's number at 8.
const FUSE_IN: usize = 40;
const FUSE_UNIQUE: std::ops::Range<usize> = 8..16;
/// Bytes of struct fuse_out_header.
const FUSE_OUT: usize = 16;
/// EIO, as FUSE writes errors.
const FUSE_EIO: i32 = -5;

/// What the end of a server means.
const CONSEQUENCE: &str = "the guest gets I/O errors until its driver starts again";

/// Sources: the server, and the kicks that it does not take any more.
const SERVER: usize = 0;
const KICKS: usize = 1;

/// Another process that serves the requests, in the order of the ring.
pub trait Server: Send {
    /// Has it work on these queues with these features. It takes the kicks and interrupts the
    /// guest itself.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn start(&mut self, features: u64, queues: &[Virtqueue], link: &Link)
    -> Result<(), StartError>;

    /// Has it let go of these queues and keep what it knows of the guest; it does not touch guest
    /// memory from here on. Returns for each queue, by its index, which request it would have taken
    /// next.
    ///
    /// # Errors
    /// What went wrong, in words; it has stopped then.
    fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String>;

    /// Has it go on with these queues, each from where it stands.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn resume(&mut self, queues: &[Virtqueue], link: &Link) -> Result<(), StartError>;

    /// Has it stop; it does not touch guest memory from here on.
    fn stop(&mut self);

    /// A descriptor that is ready to be read when [`Self::look`] has something to look at; the
    /// same all the time.
    fn fd(&self) -> RawFd;

    /// Looks whether it still works on the queues; why not, in words, where it ended.
    fn look(&mut self) -> Result<(), String>;
}

/// A file system device.
pub struct Fs {
    config: Arc<ConfigSpace>,
    requests: u16,
    server: Box<dyn Server>,
    running: Option<Running>,
    /// Who answered, while the machine is held; and whether the server is another one than then.
    paused: Option<Paused>,
    /// Waits for the kicks of the queues of a server that ended.
    kicks: Epoll,
}

struct Running {
    queues: Vec<Virtqueue>,
    link: Arc<Link>,
    features: u64,
    served: Served,
}

#[derive(Clone, Copy, Debug)]
struct Paused {
    served: Served,
    is_other: bool,
}

impl Fs {
    /// The file system that guests mount by `tag` (up to [`TAG`] bytes), with so many queues for
    /// requests.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(tag: &str, requests: u16, server: Box<dyn Server>) -> std::io::Result<Fs> {
        let mut config = vec![0; TAG];
        let len = tag.len().min(TAG);
        config[..len].copy_from_slice(&tag.as_bytes()[..len]);
        config.extend(u32::from(requests).to_le_bytes());
        Ok(Fs {
            config: ConfigSpace::new(config),
            requests,
            server,
            running: None,
            paused: None,
            kicks: Epoll::new()?,
        })
    }

    /// The server ended: its queues are ours.
    fn adopt(&mut self, why: &str) {
        let Some(running) = self.running.as_mut() else {
            return;
        };
        if running.served != Served::Well {
            return;
        }
        log::error!("{}: {why}; {CONSEQUENCE}", running.link.name());
        self.take_over();
        self.serve_alone();
    }

    /// The server works no more: what it did not complete is the first that is taken next.
    fn take_over(&mut self) {
        for queue in self.running.iter_mut().flat_map(|now| &mut now.queues) {
            queue.adopt(None);
        }
    }

    /// From here on requests are answered here, with errors.
    fn serve_alone(&mut self) {
        let Some(running) = &mut self.running else {
            return;
        };
        running.served = Served::Alone;
        for queue in &mut running.queues {
            watch(&self.kicks, queue);
            refuse_all(queue);
        }
    }

    /// Goes on where the device was held, or another one in its stead.
    fn go_on(&mut self, driver: Driver, paused: Paused) {
        let running = self.running.insert(Running {
            queues: driver.queues.into_iter().flatten().collect(),
            link: driver.link,
            features: driver.features,
            served: paused.served,
        });
        let resumed = match paused {
            Paused {
                served: Served::Well,
                is_other: true,
            } => Err(StartError(
                "its server knows nothing of the guest that was saved".to_owned(),
            )),
            Paused {
                served: Served::Well,
                ..
            } => self.server.resume(&running.queues, &running.link),
            Paused {
                served: Served::Alone,
                ..
            } => return self.serve_alone(),
            _ => return,
        };
        if let Err(why) = resumed {
            log::error!("{}: {why}; {CONSEQUENCE}", running.link.name());
            self.serve_alone();
        }
    }

    fn queue_count(&self) -> usize {
        // One more, for what goes before all else.
        usize::from(self.requests) + 1
    }
}

impl VirtioDevice for Fs {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![ENTRIES; self.queue_count()]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, driver: Driver) -> Result<(), StartError> {
        if let Some(paused) = self.paused.take() {
            self.go_on(driver, paused);
            return Ok(());
        }
        let queues: Option<Vec<Virtqueue>> = driver.queues.into_iter().collect();
        let Some(queues) = queues else {
            return Err(StartError("the driver left a queue out".to_owned()));
        };
        let started = self.server.start(driver.features, &queues, &driver.link);
        self.running = Some(Running {
            queues,
            link: driver.link,
            features: driver.features,
            served: Served::Well,
        });
        if let Err(error) = started {
            self.adopt(&error.to_string());
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        let Some(mut running) = self.running.take() else {
            return Positions::new();
        };
        match running.served {
            Served::Well => match self.server.pause(&running.queues) {
                Ok(bases) => {
                    for queue in &mut running.queues {
                        let base = bases.iter().find(|(index, _)| *index == queue.index());
                        queue.adopt(base.map(|(_, base)| *base));
                    }
                }
                Err(why) => {
                    let name = running.link.name();
                    log::error!("{name}: {why}; {CONSEQUENCE}");
                    running.served = Served::Alone;
                    running
                        .queues
                        .iter_mut()
                        .for_each(|queue| queue.adopt(None));
                }
            },
            Served::Alone => {
                for queue in &running.queues {
                    unwatch(&self.kicks, queue);
                }
            }
            Served::Later => {}
        }
        self.paused = Some(Paused {
            served: running.served,
            is_other: false,
        });
        quiesced(&mut running.queues)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            served: self.paused.map(|paused| paused.served),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else {
            return Err(RestoreError::kind(state));
        };
        let is_other = true;
        self.paused = state.served.map(|served| Paused { served, is_other });
        Ok(())
    }

    fn reset(&mut self) {
        if self.paused.take().is_some() {
            self.server.stop();
        }
        let Some(running) = self.running.take() else {
            return;
        };
        self.server.stop();
        if running.served == Served::Alone {
            for queue in &running.queues {
                unwatch(&self.kicks, queue);
            }
        }
    }

    /// A server's end is the one sure way to have it out of a queue, so it ends, and what comes in
    /// the other queues gets errors until the driver has set up all of them again.
    fn stop_queue(&mut self, queue: usize) {
        let Some(running) = &mut self.running else {
            return;
        };
        let is_it = |ring: &Virtqueue| usize::from(ring.index()) == queue;
        let Some(at) = running.queues.iter().position(is_it) else {
            return;
        };
        let ring = running.queues.remove(at);
        match running.served {
            Served::Well => {
                self.server.stop();
                self.take_over();
                self.serve_alone();
            }
            Served::Alone => unwatch(&self.kicks, &ring),
            Served::Later => {}
        }
        if let Some(running) = self.running.as_mut()
            && running.queues.is_empty()
        {
            // Nothing is left of the session that the server had.
            running.served = Served::Later;
        }
    }

    fn start_queue(&mut self, mut queue: Virtqueue) -> Result<(), StartError> {
        let all = self.queue_count();
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        if running.served == Served::Alone {
            watch(&self.kicks, &mut queue);
        }
        running.queues.push(queue);
        if running.served != Served::Later || running.queues.len() < all {
            return Ok(());
        }
        running.queues.sort_by_key(Virtqueue::index);
        running.served = Served::Well;
        let started = self
            .server
            .start(running.features, &running.queues, &running.link);
        if let Err(error) = started {
            self.adopt(&error.to_string());
        }
        Ok(())
    }

    fn kicked(&mut self, _queue: usize) {}

    fn takes_kicks(&self) -> bool {
        false
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source {
            fd,
            output: false,
            edge: false,
        };
        vec![source(self.server.fd()), source(self.kicks.as_raw_fd())]
    }

    fn ready(&mut self, source: usize) {
        if source == SERVER
            && let Err(why) = self.server.look()
        {
            self.adopt(&why);
        }
        let alone = |running: &&mut Running| running.served == Served::Alone;
        let running = self.running.as_mut().filter(alone);
        if let Some(running) = running.filter(|_| source == KICKS) {
            for queue in &mut running.queues {
                // A kick is taken before the queue is looked at: one that comes later rings again.
                let _ = queue.kick().read();
                refuse_all(queue);
            }
        }
    }
}

/// Waits for the kicks of a queue.
fn watch(kicks: &Epoll, queue: &mut Virtqueue) {
    let event = EpollEvent::new(EventSet::IN, queue.index().into());
    let fd = queue.kick().as_raw_fd();
    if let Err(error) = kicks.ctl(ControlOperation::Add, fd, event) {
        queue.break_ring(format_args!("cannot wait for its kicks: {error}"));
    }
}

fn unwatch(kicks: &Epoll, queue: &Virtqueue) {
    let fd = queue.kick().as_raw_fd();
    // What is not waited for cannot be taken out.
    let _ = kicks.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

/// Answers each request of a queue that it failed.
fn refuse_all(queue: &mut Virtqueue) {
    queue.serve(|queue, chain| {
        let written = refuse(queue, &chain);
        queue.complete(chain, written as u32);
    });
}

/// Writes an error for an answer; returns its bytes. Some requests have no answer, and no room for
/// one.
fn refuse(queue: &Virtqueue, chain: &Chain) -> usize {
    let mut request = [0; FUSE_IN];
    chain.read(queue.memory(), 0, &mut request);
    if chain.writable_len() < FUSE_OUT {
        return 0;
    }
    let mut answer = [0; FUSE_OUT];
    answer[..4].copy_from_slice(&(FUSE_OUT as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&FUSE_EIO.to_le_bytes());
    answer[8..].copy_from_slice(&request[FUSE_UNIQUE]);
    chain.write(queue.memory(), 0, &answer)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::virtio::fake::Guest;
    use crate::virtio::lock;

    /// A server that does nothing but say what it is told.
    #[derive(Clone)]
    struct FakeServer {
        bell: Arc<EventFd>,
        state: Arc<Mutex<State>>,
    }

    #[derive(Default)]
    struct State {
        starts: Vec<(u64, usize)>,
        stops: usize,
        pauses: usize,
        /// What it would take next, of each queue.
        base: [u16; 2],
        /// Where it went on in each queue, each time.
        resumed: Vec<Vec<u16>>,
        dead: Option<&'static str>,
        refuses: bool,
    }

    impl Server for FakeServer {
        fn start(
            &mut self,
            features: u64,
            queues: &[Virtqueue],
            _link: &Link,
        ) -> Result<(), StartError> {
            let mut state = lock(&self.state);
            state.starts.push((features, queues.len()));
            match state.refuses {
                true => Err(StartError("not today".to_owned())),
                false => Ok(()),
            }
        }

        fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String> {
            let mut state = lock(&self.state);
            state.pauses += 1;
            match state.dead {
                Some(why) => Err(why.to_owned()),
                // It has done what it took.
                None => Ok(queues
                    .iter()
                    .map(|queue| (queue.index(), state.base[usize::from(queue.index())]))
                    .collect()),
            }
        }

        fn resume(&mut self, queues: &[Virtqueue], _link: &Link) -> Result<(), StartError> {
            let bases = queues.iter().map(Virtqueue::next_available).collect();
            let mut state = lock(&self.state);
            state.resumed.push(bases);
            match state.refuses {
                true => Err(StartError("not today".to_owned())),
                false => Ok(()),
            }
        }

        fn stop(&mut self) {
            lock(&self.state).stops += 1;
        }

        fn fd(&self) -> RawFd {
            self.bell.as_raw_fd()
        }

        fn look(&mut self) -> Result<(), String> {
            match lock(&self.state).dead {
                Some(why) => Err(why.to_owned()),
                None => Ok(()),
            }
        }
    }

    fn share() -> (Fs, FakeServer) {
        let server = FakeServer {
            bell: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
            state: Arc::default(),
        };
        let device = Fs::new("home", 1, Box::new(server.clone())).expect("descriptors");
        (device, server)
    }

    /// A request of FUSE with this number.
    fn request(unique: u8) -> [u8; FUSE_IN] {
        let mut bytes = [0; FUSE_IN];
        bytes[8] = unique;
        bytes
    }

    /// The answer that it failed.
    fn failed(unique: u8) -> Vec<u8> {
        let mut bytes = vec![16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff];
        bytes.extend([unique, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    /// The server takes a request and completes it, as far as the guest can see.
    fn complete(guest: &mut Guest<Fs>, queue: usize, head: u16) {
        let [_, _, used] = guest.rings(queue);
        let index: u16 = guest.memory.read_obj(GuestAddress(used + 2)).expect("ring");
        let slot = GuestAddress(used + 4 + 8 * u64::from(index));
        let entry = [u32::from(head), 0];
        guest.memory.write_obj(entry, slot).expect("ring");
        let next = index + 1;
        guest
            .memory
            .write_obj(next, GuestAddress(used + 2))
            .expect("ring");
    }

    fn kick(guest: &mut Guest<Fs>, queue: usize) {
        guest.write(0x50, queue as u32);
        lock(&guest.device).ready(KICKS);
    }

    #[test]
    fn the_guest_sees_the_tag_and_the_queues() {
        let (device, _) = share();
        let mut guest = Guest::new(device);
        let mut tag = [0; 36];
        for (offset, word) in (0x100..).step_by(4).zip(tag.chunks_mut(4)) {
            word.copy_from_slice(&guest.read(offset).to_le_bytes());
        }
        assert!(tag.starts_with(b"home\0"));
        assert_eq!(guest.read(0x124), 1);
        assert_eq!(lock(&guest.device).queue_sizes().len(), 2);
    }

    #[test]
    fn the_server_gets_queues_and_features_and_is_stopped_at_a_reset() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        assert_eq!(lock(&server.state).starts, [(1 << 32, 2)]);
        // It takes the requests itself.
        guest.request(1, &[&request(1)], &[100]);
        kick(&mut guest, 1);
        assert!(guest.used(1).is_empty());
        guest.write(0x70, 0);
        assert_eq!(lock(&server.state).stops, 1);
        guest.start(0);
        assert_eq!(lock(&server.state).starts.len(), 2);
    }

    #[test]
    fn when_the_server_ends_each_request_gets_an_error() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        // One was served, one is under way, and one more comes afterwards.
        let done = guest.request(1, &[&request(1)], &[100]);
        guest.request(1, &[&request(2)], &[16, 84]);
        complete(&mut guest, 1, done);
        assert_eq!(guest.used(1).len(), 1);
        lock(&server.state).dead = Some("it was killed");
        lock(&guest.device).ready(SERVER);
        let used = guest.used(1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].1, failed(2));
        assert_eq!(guest.interrupts(), 1);
        guest.request(1, &[&request(3)], &[100]);
        kick(&mut guest, 1);
        assert_eq!(guest.used(1)[0].1, failed(3));
        // To forget a file has no answer.
        guest.request(0, &[&request(4)], &[]);
        kick(&mut guest, 0);
        assert_eq!(guest.used(0)[0].1, []);
        assert!(!guest.is_broken());
    }

    #[test]
    fn its_end_is_told_once() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        lock(&server.state).dead = Some("it was killed");
        for _ in 0..3 {
            lock(&guest.device).ready(SERVER);
        }
        guest.request(1, &[&request(1)], &[100]);
        kick(&mut guest, 1);
        assert_eq!(guest.used(1).len(), 1);
        // A new driver gets a new server.
        lock(&server.state).dead = None;
        guest.write(0x70, 0);
        guest.start(0);
        guest.request(1, &[&request(1)], &[100]);
        kick(&mut guest, 1);
        assert!(guest.used(1).is_empty());
    }

    #[test]
    fn a_server_that_cannot_be_started_is_one_that_ended() {
        let (device, server) = share();
        lock(&server.state).refuses = true;
        let mut guest = Guest::started(device, 0);
        guest.request(1, &[&request(1)], &[100]);
        kick(&mut guest, 1);
        assert_eq!(guest.used(1)[0].1, failed(1));
    }

    #[test]
    fn a_queue_that_is_stopped_ends_the_server_and_all_set_up_again_have_a_new_one() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        guest.request(1, &[&request(1)], &[100]);
        guest.stop_queue(0);
        assert_eq!(lock(&server.state).stops, 1);
        // The other queue's requests fail, rather than wait for ever.
        assert_eq!(guest.used(1)[0].1, failed(1));
        guest.set_up_queue(0);
        guest.request(0, &[&request(2)], &[100]);
        kick(&mut guest, 0);
        assert_eq!(guest.used(0)[0].1, failed(2));
        assert_eq!(lock(&server.state).starts.len(), 1);
        for queue in [0, 1] {
            guest.stop_queue(queue);
        }
        for queue in [1, 0] {
            guest.set_up_queue(queue);
        }
        assert_eq!(lock(&server.state).starts, [(1 << 32, 2); 2]);
        guest.request(1, &[&request(3)], &[100]);
        kick(&mut guest, 1);
        assert!(guest.used(1).is_empty(), "it is the server's");
        assert_eq!(guest.mmio.faults(), 0);
    }

    #[test]
    fn a_server_goes_on_where_it_let_go() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        let done = guest.request(1, &[&request(1)], &[100]);
        guest.request(1, &[&request(2)], &[100]);
        complete(&mut guest, 1, done);
        lock(&server.state).base = [0, 1];
        guest.pause();
        {
            let state = lock(&server.state);
            assert_eq!((state.starts.len(), state.pauses, state.stops), (1, 1, 0));
            assert_eq!(state.resumed, [[0, 1]]);
        }
        // A reset while it is held ends it.
        guest.mmio.quiesce();
        guest.write(0x70, 0);
        assert_eq!(lock(&server.state).stops, 1);
        guest.mmio.resume();
        guest.start(0);
        assert_eq!(lock(&server.state).starts.len(), 2);
    }

    #[test]
    fn a_server_that_is_another_one_knows_nothing_of_the_guest() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        let done = guest.request(1, &[&request(1)], &[100]);
        complete(&mut guest, 1, done);
        lock(&server.state).base = [0, 1];
        guest.request(1, &[&request(2)], &[100]);
        assert_eq!(guest.used(1).len(), 1);
        let (device, other) = share();
        guest.move_to(device);
        // Its first answer: the request that nobody had taken.
        kick(&mut guest, 1);
        assert_eq!(guest.used(1)[0].1, failed(2));
        assert!(lock(&other.state).starts.is_empty());
        // So it stays, wherever it goes on.
        guest.move_to(share().0);
        guest.request(1, &[&request(3)], &[100]);
        kick(&mut guest, 1);
        assert_eq!(guest.used(1)[0].1, failed(3));
        assert!(!guest.is_broken());
    }

    #[test]
    fn a_server_that_ends_while_the_machine_is_held_fails_what_it_left() {
        for refuses in [false, true] {
            let (device, server) = share();
            let mut guest = Guest::started(device, 0);
            guest.request(1, &[&request(1)], &[100]);
            match refuses {
                // It does not come back, or does not even let go.
                true => lock(&server.state).refuses = true,
                false => lock(&server.state).dead = Some("it was killed"),
            }
            guest.pause();
            assert_eq!(guest.used(1)[0].1, failed(1));
            guest.request(1, &[&request(2)], &[100]);
            kick(&mut guest, 1);
            assert_eq!(guest.used(1)[0].1, failed(2));
        }
    }

    #[test]
    fn a_buffer_outside_memory_fails_its_request_only() {
        let (device, server) = share();
        lock(&server.state).refuses = true;
        let mut guest = Guest::started(device, 0);
        for outside in [0, 1] {
            guest.request_outside(1, &[false, true], outside);
            kick(&mut guest, 1);
            assert_eq!(guest.used(1).len(), 1);
        }
        assert!(!guest.is_broken());
        guest.request(1, &[&request(1)], &[100]);
        kick(&mut guest, 1);
        assert_eq!(guest.used(1)[0].1, failed(1));
    }

    #[test]
    fn a_server_that_left_a_broken_ring_is_survived() {
        let (device, server) = share();
        let mut guest = Guest::started(device, 0);
        let [_, available, used] = guest.rings(1);
        guest
            .memory
            .write_obj(0x7000_u16, GuestAddress(used + 2))
            .expect("ring");
        guest
            .memory
            .write_obj(3_u16, GuestAddress(available + 2))
            .expect("ring");
        lock(&server.state).dead = Some("it was killed");
        lock(&guest.device).ready(SERVER);
        assert!(guest.is_broken());
        // A request too short to be one.
        guest.request(0, &[b"short"], &[3]);
        kick(&mut guest, 0);
        assert_eq!(guest.used(0).len(), 1);
    }
}
