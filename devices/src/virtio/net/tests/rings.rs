//! A card whose host's end works on the queues by itself.

use super::*;

/// Queues by index, and features.
pub(super) type Work = (Vec<u16>, u64);

/// The host's end of a card, which works on the queues by itself.
#[derive(Clone, Default)]
pub(super) struct FakeRings {
    pub(super) network: FakeNetwork,
    pub(super) works_on: Arc<Mutex<Option<Work>>>,
    /// What it would take next, of each queue.
    pub(super) next: Arc<Mutex<u16>>,
    /// Where it began in each queue when it last did.
    pub(super) began: Arc<Mutex<Vec<u16>>>,
}

impl Network for FakeRings {
    fn offloads(&self) -> u64 {
        self.network.offloads()
    }

    fn pairs(&self) -> u16 {
        self.network.pairs()
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: 7,
            output: false,
            edge: true,
        }]
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        self.network.woken(source)
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String> {
        self.network.configure(pairs, offloads)
    }
}

impl Rings for FakeRings {
    fn start(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
        _link: &Link,
    ) -> Result<(), String> {
        assert!(memory.check_range(GuestAddress(queues[0].addresses().used), 1));
        *lock(&self.began) = queues.iter().map(Virtqueue::next_available).collect();
        let queues = queues.iter().map(Virtqueue::index).collect();
        *lock(&self.works_on) = Some((queues, features));
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, u16)> {
        let worked_on = lock(&self.works_on).take();
        let queues = worked_on.map_or_else(Vec::new, |(queues, _)| queues);
        let next = *lock(&self.next);
        queues.into_iter().map(|queue| (queue, next)).collect()
    }

    fn start_queue(&mut self, queue: &Virtqueue) -> Result<(), String> {
        let mut works_on = lock(&self.works_on);
        let (queues, _) = works_on.as_mut().expect("it works");
        queues.push(queue.index());
        Ok(())
    }

    fn stop_queue(&mut self, queue: u16) {
        let mut works_on = lock(&self.works_on);
        let (queues, _) = works_on.as_mut().expect("it works");
        queues.retain(|index| *index != queue);
    }
}

#[test]
fn the_hosts_end_works_on_all_queues_but_the_control_queue() {
    let rings = FakeRings::default();
    rings.network.change(|wire| wire.pairs = 2);
    let works_on = || lock(&rings.works_on).clone();
    let card = RingNet::new(rings.clone(), MAC_ADDRESS).expect("descriptors");
    assert!(!card.takes_kicks());
    let sources = card.sources();
    assert_eq!((sources.len(), sources[0].fd), (2, 7));
    let features = CTRL_VQ | MQ | STATUS;
    let mut guest = Guest::started(card, features);
    let (queues, negotiated) = works_on().expect("it works");
    assert_eq!(queues, [0, 1, 2, 3]);
    assert_eq!(negotiated & features, features);
    // A kick of the control queue comes by a source, which is the last.
    let head = guest.request(4, &[&[4, 0], &[2, 0]], &[1]);
    guest.write(0x50, 4);
    let control = Epoll::new().expect("a descriptor");
    let event = EpollEvent::new(EventSet::IN, 0);
    control
        .ctl(ControlOperation::Add, sources[1].fd, event)
        .expect("it can be waited for");
    let mut ready = [EpollEvent::default()];
    assert_eq!(control.wait(0, &mut ready).expect("no error"), 1);
    wake(&guest, 1);
    assert_eq!(guest.used(4), [(head, vec![0])]);
    assert_eq!(lock(&rings.network.0).configured.0, 2);
    assert_eq!(control.wait(0, &mut ready).expect("no error"), 0);
    // Other sources are the network's.
    rings
        .network
        .change(|wire| wire.woken = Some(SourceEvent::Link(false)));
    wake(&guest, 0);
    assert_eq!(guest.read(LINK_STATUS) & 0xffff, 0);
    rings
        .network
        .change(|wire| wire.woken = Some(SourceEvent::Broken("ring 1".to_owned())));
    wake(&guest, 0);
    assert!(guest.is_broken());
    // It stops with the driver, and begins again with the next.
    guest.negotiate(0);
    assert_eq!(works_on(), None);
    guest.start(CTRL_VQ);
    let (queues, _) = works_on().expect("it works");
    assert_eq!(queues, [0, 1]);
    guest.request(CONTROL, &[&[9, 9]], &[1]);
    guest.write(0x50, CONTROL as u32);
    wake(&guest, 1);
    assert_eq!(guest.used(CONTROL)[0].1, [1]);
}

#[test]
fn the_hosts_end_lets_go_of_a_queue_that_is_stopped() {
    let rings = FakeRings::default();
    let works_on = || lock(&rings.works_on).clone().map(|(queues, _)| queues);
    let card = RingNet::new(rings.clone(), MAC_ADDRESS).expect("descriptors");
    let mut guest = Guest::started(card, CTRL_VQ);
    guest.stop_queue(1);
    assert_eq!(works_on(), Some(vec![0]));
    guest.stop_queue(CONTROL as u32);
    guest.request(CONTROL, &[&[9, 9]], &[1]);
    guest.write(0x50, CONTROL as u32);
    wake(&guest, 1);
    assert!(guest.used(CONTROL).is_empty());
    guest.set_up_queue(1);
    guest.set_up_queue(CONTROL as u32);
    assert_eq!(works_on(), Some(vec![0, 1]));
    guest.request(CONTROL, &[&[9, 9]], &[1]);
    guest.write(0x50, CONTROL as u32);
    wake(&guest, 1);
    assert_eq!(guest.used(CONTROL)[0].1, [1]);
    for queue in 0..3 {
        guest.stop_queue(queue);
    }
    assert_eq!(works_on(), Some(vec![]));
    guest.start(CTRL_VQ);
    assert_eq!(works_on(), Some(vec![0, 1]));
}
