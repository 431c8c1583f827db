//! A file system device whose server works, ends, and is replaced.

use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::fake::Guest;
use crate::virtio::lock;

/// A server that only records its calls.
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
    /// The next available request of each queue.
    base: [u16; 2],
    /// The positions at which it was resumed, for each call.
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
            // It has completed what it popped.
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

/// Returns a FUSE request with this unique ID.
fn request(unique: u8) -> [u8; FUSE_IN] {
    let mut bytes = [0; FUSE_IN];
    bytes[8] = unique;
    bytes
}

/// Returns the answer to a request that failed.
fn failed(unique: u8) -> Vec<u8> {
    let mut bytes = vec![16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff];
    bytes.extend([unique, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

/// Completes a request in the server's stead.
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
    // The server processes the requests itself.
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
    // One is completed, one is in flight, and one follows later.
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
    // FUSE_FORGET has no answer.
    guest.request(0, &[&request(4)], &[]);
    kick(&mut guest, 0);
    assert_eq!(guest.used(0)[0].1, []);
    assert!(!guest.is_broken());
}

#[test]
fn its_end_is_reported_once() {
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
fn a_server_that_cannot_be_started_counts_as_ended() {
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
    // The other queue's requests fail rather than hang.
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
fn a_server_resumes_where_it_paused() {
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
    // A reset while the machine is paused stops the server.
    guest.mmio.quiesce();
    guest.write(0x70, 0);
    assert_eq!(lock(&server.state).stops, 1);
    guest.mmio.resume();
    guest.start(0);
    assert_eq!(lock(&server.state).starts.len(), 2);
}

#[test]
fn another_server_has_no_session_of_the_guest() {
    let (device, server) = share();
    let mut guest = Guest::started(device, 0);
    let done = guest.request(1, &[&request(1)], &[100]);
    complete(&mut guest, 1, done);
    lock(&server.state).base = [0, 1];
    guest.request(1, &[&request(2)], &[100]);
    assert_eq!(guest.used(1).len(), 1);
    let (device, other) = share();
    guest.move_to(device);
    // Its first answer is to the request that was never popped.
    kick(&mut guest, 1);
    assert_eq!(guest.used(1)[0].1, failed(2));
    assert!(lock(&other.state).starts.is_empty());
    // It stays so after it moves.
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
            // Its resume fails, or already its pause.
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
fn a_server_that_leaves_a_broken_ring_does_no_harm() {
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
