//! The service on a card with a driver.

use super::super::frames::WithMetadata;
use super::guest::Peer;
use super::*;
use crate::net::tests::Guest;
use armlet_devices::virtio::Source;
use armlet_devices::virtio::net::feature::{GUEST_CSUM, MRG_RXBUF};
use armlet_devices::virtio::net::{
    Frame, FrameError, Frames, HEADER, Net, Network, Room, SourceEvent,
};
use std::time::Instant;

/// A network behind the card: it keeps what is sent, and says "hello" once.
#[derive(Clone, Default)]
struct Other(Arc<Mutex<Vec<Vec<u8>>>>, bool);

impl Network for Other {
    fn offloads(&self) -> u64 {
        GUEST_CSUM
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn woken(&mut self, _source: usize) -> SourceEvent {
        SourceEvent::Nothing
    }

    fn configure(&mut self, _pairs: u16, _offloads: u64) -> std::result::Result<(), String> {
        Ok(())
    }
}

impl Frames for Other {
    fn has_header(&self) -> bool {
        self.1
    }

    fn send(&mut self, _pair: usize, frame: Frame<'_>) -> std::result::Result<(), FrameError> {
        let mut bytes = Vec::new();
        for slice in frame.slices() {
            let end = bytes.len();
            bytes.resize(end + slice.len(), 0);
            slice.copy_to(&mut bytes[end..]);
        }
        lock(&self.0).push(bytes);
        Ok(())
    }

    fn receive(&mut self, _pair: usize, _room: Room<'_>) -> std::result::Result<usize, FrameError> {
        Err(FrameError::Wait)
    }
}

fn card(other: &Other) -> Guest {
    let opened = OpenMetadata::open(&options(false)).expect("a timer");
    let network = WithMetadata::new(Box::new(other.clone()), &opened, 5);
    let device = Arc::new(Mutex::new(Net::new(network, GUEST_MAC)));
    Guest::of("net0".to_owned(), device, MRG_RXBUF | GUEST_CSUM)
}

#[test]
fn a_driver_reaches_the_service_and_its_network_sees_nothing_of_it() {
    for has_header in [false, true] {
        let other = Other(Arc::default(), has_header);
        let mut guest = card(&other);
        let mut peer = Peer::new(1500, true);
        let handle = peer.connect(8);
        let begun = Instant::now();
        let mut left = &b"GET /latest/user-data HTTP/1.0\r\n\r\n"[..];
        let mut received = Vec::new();
        let answer = guest.wait("answer", |guest| {
            peer.poll(begun.elapsed());
            let socket = peer.socket(handle);
            if socket.may_send() && !left.is_empty() {
                left = &left[socket.send_slice(left).expect("open")..];
            }
            while let Ok(1..) = socket.recv(|bytes| {
                received.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            }) {}
            peer.poll(begun.elapsed());
            while let Some(frame) = peer.wire.sent.pop_front() {
                // Its checksum is to be completed.
                let mut header = [0; HEADER];
                header[0] = 1;
                guest.send(0, header, &frame);
            }
            while let Some((pair, frame)) = guest.poll(|_| true) {
                assert_eq!((pair, &frame[..10]), (0, &[0; 10][..]));
                peer.wire.coming.push_back(frame[HEADER..].to_vec());
            }
            parse(&received)
        });
        assert_eq!((answer.0, answer.1.len()), (200, 20_000));
        assert!(lock(&other.0).is_empty(), "the network saw a frame");
    }
}

#[test]
fn what_goes_elsewhere_passes_untouched() {
    let arp = |target: [u8; 4]| {
        let mut frame = vec![0xff; 6];
        frame.extend(GUEST_MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(GUEST_MAC);
        frame.extend(GUEST.octets());
        frame.extend([0; 6]);
        frame.extend(target);
        frame
    };
    let mut to_ours = vec![0x45; 60];
    to_ours[12..14].copy_from_slice(&[8, 0]);
    to_ours[30..34].copy_from_slice(&ADDRESS.octets());
    let mut tagged = to_ours.clone();
    tagged[12..14].copy_from_slice(&[0x81, 0]);
    let mut elsewhere = to_ours.clone();
    elsewhere[33] ^= 1;
    for has_header in [false, true] {
        let other = Other(Arc::default(), has_header);
        let mut guest = card(&other);
        let header = [3, 1, 54, 0, 0, 5, 34, 0, 16, 0, 0, 0];
        let passing = [
            arp([169, 254, 169, 253]),
            elsewhere.clone(),
            tagged.clone(),
            vec![1; 14],
        ];
        for frame in [&to_ours, &arp(ADDRESS.octets())]
            .into_iter()
            .chain(&passing)
        {
            guest.send(0, header, frame);
        }
        let sent = std::mem::take(&mut *lock(&other.0));
        let expected = passing.map(|frame| match has_header {
            true => [&header[..], &frame].concat(),
            false => frame,
        });
        assert_eq!(sent, expected);
        // Of the two, ARP is answered.
        let (_, answer) = guest.receive("answer to ARP", |_| true);
        let answer = &answer[HEADER..];
        assert_eq!(
            (&answer[..6], &answer[20..22]),
            (&GUEST_MAC[..], &[0, 2][..])
        );
        assert_eq!(
            (&answer[22..28], &answer[28..32]),
            (&MAC[..], &ADDRESS.octets()[..])
        );
    }
}
