//! The metadata service: a guest that sends what it likes to its TCP/IP stack.

use std::time::Duration;

use armlet_backends::net::mmds::service::Service;
use armlet_backends::net::mmds::stack::{MAC, MOST_FRAMES, Stack};
use armlet_backends::net::mmds::{ADDRESS, MmdsOptions};

use super::input::Input;

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST: [u8; 4] = [172, 16, 0, 2];
/// Zeros before each frame for the guest.
const HEADER: usize = 12;
/// Bytes of the headers of Ethernet and IPv4.
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const PORTS: usize = 4;

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const REQUESTS: [&[u8]; 5] = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /a/text HTTP/1.0\r\nAccept: application/json\r\n\r\n",
    b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 1\r\n\r\n",
    b"GET /a HTTP/1.1\r\nX-metadata-token: 0\r\nContent-Length: 2\r\n\r\n",
    b"GET ",
];

/// What the guest knows of a connection.
#[derive(Clone, Copy, Default)]
struct Known {
    sequence: u32,
    acknowledged: u32,
}

struct Client {
    stack: Stack,
    now: Duration,
    known: [Known; PORTS],
}

impl Client {
    fn segment(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let port = input.below(PORTS);
        let known = &mut self.known[port];
        let flags = match input.u8() {
            0..=63 => SYN,
            64..=127 => ACK,
            128..=191 => ACK | 8,
            192..=215 => ACK | 1,
            216..=223 => RST,
            _ => input.u8(),
        };
        let data = match input.u8() {
            0..=127 => input.pick(&REQUESTS),
            128..=191 => &[],
            _ => input.bytes(200),
        };
        let data = if flags & SYN == 0 { data } else { &[] };
        let mut sequence = known.sequence;
        match input.rarely(8) {
            true => sequence = sequence.wrapping_add(input.u32()),
            false => {
                let count = data.len() as u32 + u32::from(flags & 3 != 0);
                known.sequence = sequence.wrapping_add(count);
            }
        }
        let mut acknowledged = known.acknowledged;
        if input.rarely(8) {
            acknowledged = acknowledged.wrapping_add(input.u32());
        }
        let window = input.pick(&[8192_u16, 65535, 1, 0]);
        let mut options = match input.u8() {
            0..=127 => vec![],
            128..=191 => vec![2, 4, input.u8(), input.u8(), 3, 3, input.u8() & 15],
            _ => input.bytes(40).to_vec(),
        };
        options.resize(options.len().next_multiple_of(4), 0);
        let to = if input.rarely(16) { 81 } else { 80 };
        let mut tcp = (1000 + port as u16).to_be_bytes().to_vec();
        tcp.extend(u16::to_be_bytes(to));
        tcp.extend(sequence.to_be_bytes());
        tcp.extend(acknowledged.to_be_bytes());
        tcp.extend([((20 + options.len()) as u8) << 2, flags]);
        tcp.extend(window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(data);
        packet(&tcp, input)
    }

    /// Takes a frame from the stack, and learns from it.
    fn take(&mut self) -> bool {
        let Some(frame) = self.stack.take_frame() else {
            return false;
        };
        let (header, frame) = frame.split_at(HEADER);
        assert_eq!(header, [0; HEADER]);
        assert!((42..=1514).contains(&frame.len()), "{}", frame.len());
        assert_eq!(frame[6..12], MAC);
        if frame[12..14] == [8, 0] {
            let tcp = &frame[ETHERNET + IPV4..];
            let word =
                |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
            let port = usize::from(u16::from_be_bytes([tcp[2], tcp[3]]));
            if let Some(known) = port.checked_sub(1000).and_then(|at| self.known.get_mut(at)) {
                let data = tcp.len() - usize::from(tcp[12] >> 4) * 4;
                let count = data as u32 + u32::from(tcp[13] & 3 != 0);
                known.acknowledged = word(4).wrapping_add(count);
            }
        }
        true
    }

    fn check(&mut self) {
        if let Some(due) = self.stack.due(self.now) {
            assert!(due >= self.now + Duration::from_millis(1), "a busy wait");
        }
    }
}

/// An IPv4 packet in a frame, right but for what `input` says.
fn packet(payload: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut frame = MAC.to_vec();
    frame.extend(GUEST_MAC);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(((IPV4 + payload.len()) as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(GUEST);
    frame.extend(ADDRESS.octets());
    if input.rarely(16) {
        let at = input.below(frame.len());
        frame[at] = input.u8();
    }
    let words = frame[ETHERNET..].chunks(2);
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The metadata service.
pub fn metadata(data: &[u8]) {
    let mut input = Input::new(data);
    let options = MmdsOptions {
        needs_token: input.flag(),
        ..MmdsOptions::default()
    };
    options
        .data
        .set(serde_json::json!({"a": {"text": "x".repeat(9000)}, "b": 1}));
    let mtu = input.pick(&[None, Some(1500), Some(68), Some(9000)]);
    let mut client = Client {
        stack: Stack::new(Service::new(&options), options.address, mtu, HEADER, 1),
        now: Duration::ZERO,
        known: [Known::default(); PORTS],
    };
    while !input.is_empty() {
        match input.u8() {
            0..=127 => {
                let frame = client.segment(&mut input);
                client.stack.receive(&frame, client.now);
            }
            128..=143 => client.stack.receive(input.bytes(200), client.now),
            144..=159 => {
                let payload = input.bytes(100);
                let frame = packet(payload, &mut input);
                client.stack.receive(&frame, client.now);
            }
            160..=191 => {
                client.now += Duration::from_millis(input.pick(&[1, 100, 1000, 31_000]));
                client.stack.work(client.now);
            }
            _ => {
                for _ in 0..input.below(4) + 1 {
                    client.take();
                }
                if client.stack.is_starved() {
                    client.stack.work(client.now);
                }
            }
        }
        client.check();
    }
    // A guest that says nothing more leaves nothing behind.
    for _ in 0..8 {
        let mut count = 0;
        while client.take() {
            count += 1;
        }
        assert!(count <= MOST_FRAMES);
        client.now += Duration::from_secs(31);
        client.stack.work(client.now);
    }
    assert_eq!(
        client.stack.due(client.now),
        None,
        "a connection that does not end"
    );
}
