//! The file system device, whose server ends at any time and leaves the rings as it likes.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::fs::{Fs, Server};
use armlet_devices::virtio::mmio::Mmio;
use armlet_devices::virtio::{Link, StartError, VirtioDevice, Virtqueue};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest::{Guest, Subject, lock};
use super::input::Input;

#[derive(Default)]
struct State {
    /// Whether the server works on the rings, and whether it did and the device goes on alone.
    works: bool,
    is_orphan: bool,
    dead: bool,
    refuses: bool,
    /// Whether the device had it stop since it last started.
    stopped: bool,
    /// Whether it let go of the rings while the machine is held.
    paused: bool,
}

struct Fake {
    state: Arc<Mutex<State>>,
    bell: EventFd,
}

impl Server for Fake {
    fn start(
        &mut self,
        _features: u64,
        queues: &[Virtqueue],
        _link: &Link,
    ) -> Result<(), StartError> {
        let mut state = lock(&self.state);
        assert!(!state.works && !queues.is_empty());
        state.stopped = false;
        state.dead = state.refuses;
        state.is_orphan = state.refuses;
        match state.refuses {
            true => Err(StartError("not today".to_owned())),
            false => {
                state.works = true;
                Ok(())
            }
        }
    }

    fn pause(&mut self, queues: &[Virtqueue]) -> Result<Vec<(u16, u16)>, String> {
        let mut state = lock(&self.state);
        assert!(state.works);
        (state.works, state.paused) = (false, true);
        if state.dead {
            state.is_orphan = true;
            return Err("it was killed".to_owned());
        }
        // It took nothing that it did not complete.
        let used = |queue: &Virtqueue| {
            let index = GuestAddress(queue.addresses().used + 2);
            queue.memory().read_obj(index).expect("the ring")
        };
        Ok(queues
            .iter()
            .map(|queue| (queue.index(), used(queue)))
            .collect())
    }

    fn resume(&mut self, queues: &[Virtqueue], _link: &Link) -> Result<(), StartError> {
        let mut state = lock(&self.state);
        assert!(!state.works && state.paused && !queues.is_empty());
        state.paused = false;
        state.works = !state.dead;
        state.is_orphan = state.dead;
        match state.dead {
            true => Err(StartError("it was killed".to_owned())),
            false => Ok(()),
        }
    }

    fn stop(&mut self) {
        let mut state = lock(&self.state);
        (state.works, state.is_orphan, state.stopped) = (false, false, true);
    }

    fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    fn look(&mut self) -> Result<(), String> {
        let mut state = lock(&self.state);
        if state.dead {
            state.is_orphan |= std::mem::take(&mut state.works);
            return Err("it was killed".to_owned());
        }
        Ok(())
    }
}

struct World {
    state: Arc<Mutex<State>>,
    tag: &'static str,
    requests: u16,
}

impl World {
    fn device(&self) -> Fs {
        let server = Fake {
            state: Arc::clone(&self.state),
            bell: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
        };
        Fs::new(self.tag, self.requests, Box::new(server)).expect("descriptors")
    }
}

impl Subject for World {
    type Device = Fs;

    fn payload(&mut self, _queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        let len = if input.rarely(4) { input.below(64) } else { 40 };
        let fill = input.u8();
        vec![fill; len]
    }

    fn event(&mut self, device: &Mutex<Fs>, input: &mut Input<'_>) {
        match input.u8() {
            0..=95 => {
                lock(&self.state).dead = true;
                lock(device).ready(0);
            }
            96..=127 => lock(&self.state).refuses = input.flag(),
            128..=191 => lock(device).ready(1),
            _ => lock(device).ready(0),
        }
    }

    fn kicks(&mut self, guest: &mut Mmio, device: &Mutex<Fs>) -> bool {
        let is_orphan = lock(&self.state).is_orphan;
        let mut any = false;
        for kick in guest.kicks() {
            // Who does not wait for them leaves them; the server's are lost here.
            if let Ok(count) = kick.read()
                && is_orphan
            {
                kick.write(count).expect("room");
                any = true;
            }
        }
        if any {
            lock(device).ready(1);
            // Those of queues that are stopped are nobody's.
            for kick in guest.kicks() {
                let _ = kick.read();
            }
        }
        any
    }

    fn fresh(&mut self) -> Option<Fs> {
        // The server of the one before is lost, and with it what it knew.
        let state = {
            let before = lock(&self.state);
            State {
                is_orphan: before.is_orphan || before.paused,
                stopped: before.stopped,
                refuses: before.refuses,
                ..State::default()
            }
        };
        self.state = Arc::new(Mutex::new(state));
        Some(self.device())
    }

    fn finish(&mut self, device: &Mutex<Fs>) {
        lock(device).ready(0);
        lock(device).ready(1);
    }

    fn is_drained(&self, _queue: usize) -> bool {
        // With some queues stopped, the others may wait for them.
        !lock(&self.state).stopped
    }

    fn has_other_worker(&self) -> bool {
        lock(&self.state).works
    }
}

/// The file system device.
pub fn fs(data: &[u8]) {
    let mut input = Input::new(data);
    let requests = 1 + u16::from(input.u8() & 3);
    let tag = ["", "home", "a tag that has thirty-six bytes, all"][input.below(3)];
    let world = World {
        state: Arc::default(),
        tag,
        requests,
    };
    let device = world.device();
    Guest::new(world, Arc::new(Mutex::new(device))).run(&mut input);
}
