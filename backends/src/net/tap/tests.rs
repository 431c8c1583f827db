//! TAPs of this host, where it lets us make them.

use super::super::tests::{Guest, open};
use super::*;
use crate::backend::Backend;
use armlet_devices::virtio::net::feature::{CTRL_VQ, MQ, MRG_RXBUF, STATUS};
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const MAC: &str = "02:00:00:00:00:07";
const MAC_BYTES: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// Addresses of the host and of the guest on each TAP: such addresses belong to one interface.
const HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Bytes before the data of a UDP datagram over IPv6: Ethernet, IPv6, UDP.
const UDP_DATA: usize = 14 + 40 + 8;
/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the checksum is to be completed.
const NEEDS_CSUM: u8 = 1;

/// An interface that a test made, up, with an address and the guest as its neighbour.
struct Interface {
    name: String,
    index: u32,
}

impl Interface {
    /// Makes one; without the right to, says that the test is skipped.
    fn new(options: &str) -> Option<Interface> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("at{}n{count}", std::process::id());
        if let Err(why) = ip(&format!("tuntap add dev {name} mode tap {options}")) {
            eprintln!("skipped: no TAP can be made here: {why}");
            return None;
        }
        let mut interface = Interface { name, index: 0 };
        let name = &interface.name;
        let set_up = ip(&format!("link set {name} addrgenmode none"))
            .and_then(|()| ip(&format!("link set {name} up")))
            .and_then(|()| ip(&format!("addr add {HOST}/64 dev {name} nodad")))
            .and_then(|()| ip(&format!("neigh add {GUEST} lladdr {MAC} dev {name}")));
        if let Err(why) = set_up {
            eprintln!("skipped: a TAP cannot be set up here: {why}");
            return None;
        }
        let socket = UdpSocket::bind("[::]:0").expect("a socket");
        let index = rustix::net::netdevice::name_to_index(&socket, name);
        interface.index = index.expect("it was made");
        Some(interface)
    }

    fn card(&self, options: &str) -> super::super::NetworkCard {
        open(&format!("tap={},mac={MAC}{options}", self.name)).expect("it opens")
    }

    /// A socket of the host on this interface.
    fn socket(&self) -> UdpSocket {
        UdpSocket::bind(SocketAddrV6::new(HOST, 0, 0, self.index)).expect("an address")
    }

    fn guest(&self) -> SocketAddrV6 {
        SocketAddrV6::new(GUEST, 7, 0, self.index)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        // A test may have removed it.
        let _ = ip(&format!("link del {}", self.name));
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// A datagram from the guest to a port of the host. Its checksum is the part of the header that the
/// guest leaves to others who complete it: the sum of the addresses, the protocol and the size.
fn datagram(port: u16, host_mac: [u8; 6], data: &[u8]) -> ([u8; HEADER], Vec<u8>) {
    let size = (8 + data.len()) as u16;
    let mut frame = [host_mac, MAC_BYTES].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(size.to_be_bytes());
    frame.extend([17, 64]);
    frame.extend(GUEST.octets());
    frame.extend(HOST.octets());
    let words = frame[22..54].chunks(2);
    let sum = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = sum.sum::<u32>() + 17 + u32::from(size);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    for field in [7, port, size, sum as u16] {
        frame.extend(field.to_be_bytes());
    }
    frame.extend(data);
    let mut header = [0; HEADER];
    header[0] = NEEDS_CSUM;
    header[6] = 14 + 40;
    header[8] = 6;
    (header, frame)
}

fn is_datagram(frame: &[u8], data: &[u8]) -> bool {
    let is_udp = frame.len() >= HEADER + UDP_DATA && frame[HEADER + 20] == 17;
    is_udp && frame[HEADER + 12..][..2] == [0x86, 0xdd] && &frame[HEADER + UDP_DATA..] == data
}

/// Sends a datagram to the guest until it comes: a TAP that was just opened drops what is sent
/// before the host has seen that it is. Returns the pair that it came by, and the frame.
fn reach(interface: &Interface, guest: &mut Guest, data: &[u8]) -> (usize, Vec<u8>) {
    let socket = interface.socket();
    let is_wanted = |frame: &[u8]| is_datagram(frame, data);
    guest.wait("datagram", |guest| {
        socket.send_to(data, interface.guest()).expect("room");
        guest.poll(is_wanted)
    })
}

/// Sends a frame with a datagram from the guest until it comes: that a new interface has an address
/// takes effect when the host gets round to it.
fn answer(
    guest: &mut Guest,
    pair: usize,
    (header, frame): &([u8; HEADER], Vec<u8>),
    socket: &UdpSocket,
) {
    let wanted = &frame[UDP_DATA..];
    let patience = Some(Duration::from_millis(100));
    socket.set_read_timeout(patience).expect("a time");
    guest.wait("datagram from the guest", |guest| {
        guest.send(pair, *header, frame);
        let mut data = [0; 100];
        let (size, from) = socket.recv_from(&mut data).ok()?;
        assert_eq!(from.ip(), GUEST);
        (&data[..size] == wanted).then_some(())
    });
}

/// Moves datagrams both ways, and with and without offloads.
fn exchange(interface: &Interface, card: &super::super::NetworkCard) {
    let socket = interface.socket();
    let port = socket.local_addr().expect("an address").port();
    // Long enough for several of the guest's buffers: MTU 1500, in one frame by offload only.
    let first = [b'x'; 1400];
    for (features, needs_checksum) in [(!(MQ | CTRL_VQ), NEEDS_CSUM), (MRG_RXBUF, 0)] {
        let mut guest = Guest::new(card, features);
        assert!(guest.is_up());
        let (_, frame) = reach(interface, &mut guest, &first);
        assert_eq!(
            frame[0] & NEEDS_CSUM,
            needs_checksum,
            "who completes the checksum"
        );
        assert_eq!(frame[HEADER..HEADER + 6], MAC_BYTES);
        assert!(guest.interrupts() > 0);
        if features == MRG_RXBUF {
            continue;
        }
        let host_mac = frame[HEADER + 6..HEADER + 12].try_into().expect("6 bytes");
        let frame = datagram(port, host_mac, b"from the guest");
        answer(&mut guest, 0, &frame, &socket);
        // Another driver of the same guest.
        guest.start(MRG_RXBUF);
        reach(interface, &mut guest, b"again");
    }
}

#[test]
fn frames_go_both_ways_in_each_life_of_a_guest() {
    let Some(interface) = Interface::new("") else {
        return;
    };
    exchange(&interface, &interface.card(",vhost=off"));
}

#[test]
fn the_kernel_moves_frames_where_it_can() {
    let Some(interface) = Interface::new("") else {
        return;
    };
    // Each has an interface of its own: while another test starts a program, that program has our
    // descriptors for a moment, and an interface is in use that is closed here.
    let another = |options| Interface::new(options).expect("one was made before");
    let wanted = open(&format!("tap={},vhost=on", interface.name));
    if let Err(error) = wanted {
        eprintln!("skipped: {error:#}");
        let error = format!("{error:#}");
        assert!(error.contains("/dev/vhost-net"), "{error}");
        // Without being asked for it is not missed.
        let interface = another("");
        exchange(&interface, &interface.card(""));
        return;
    }
    let interface = another("");
    let card = interface.card("");
    assert!(!card.is_busy(), "the kernel does the work, unasked");
    exchange(&interface, &card);
    let interface = another("multi_queue");
    exchange_by_pairs(&interface, &interface.card(",vhost=on,queues=2"));
    let interface = another("");
    let card = interface.card(",vhost=on");
    // What breaks a ring breaks the card until the next driver takes it into use.
    let mut guest = Guest::new(&card, MRG_RXBUF);
    guest.offer_at(1, 0xdead_0000_0000);
    guest.wait("wish for a reset", |guest| {
        (guest.read(0x70) & 0x40 != 0).then_some(())
    });
    guest.start(MRG_RXBUF);
    reach(&interface, &mut guest, b"after a reset");
    drop(guest);
    the_link_follows(&interface, &card);
}

/// Frames of each flow come by one of the pairs that the guest uses, and by all it can send.
fn exchange_by_pairs(interface: &Interface, card: &super::super::NetworkCard) {
    let socket = interface.socket();
    let port = socket.local_addr().expect("an address").port();
    let mut guest = Guest::new(card, MRG_RXBUF | CTRL_VQ | MQ);
    for pairs in [1, 2, 1, 2] {
        assert!(guest.control(4, &[4, 0, pairs, 0]));
        let mut host_mac = [0; 6];
        for datagram in 0..8 {
            // Each socket is a flow, and so may get another pair.
            let data = [b'x', pairs, datagram];
            let (pair, frame) = reach(interface, &mut guest, &data);
            assert!(pair < usize::from(pairs), "pair {pair} of {pairs}");
            host_mac = frame[HEADER + 6..HEADER + 12].try_into().expect("6 bytes");
        }
        for pair in 0..usize::from(pairs) {
            let (_, mut frame) = datagram(port, host_mac, &[pairs, pair as u8]);
            complete(&mut frame);
            answer(&mut guest, pair, &([0; HEADER], frame), &socket);
        }
    }
    assert!(!guest.control(4, &[4, 0, 3, 0]));
}

/// Completes the checksum of a datagram with an even number of bytes.
fn complete(frame: &mut [u8]) {
    let words = frame[54..].chunks(2);
    let sum = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = sum.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[60..62].copy_from_slice(&(!sum as u16).to_be_bytes());
}

#[test]
fn frames_go_by_all_pairs_of_queues_in_use() {
    if let Some(interface) = Interface::new("multi_queue") {
        exchange_by_pairs(&interface, &interface.card(",vhost=off,queues=2"));
    }
}

/// The guest's link goes up and down with the interface, and for good when it is removed.
fn the_link_follows(interface: &Interface, card: &super::super::NetworkCard) {
    let name = &interface.name;
    let mut guest = Guest::new(card, MRG_RXBUF | STATUS);
    assert!(guest.is_up());
    guest.interrupts();
    for (command, up) in [("down", false), ("up", true)] {
        ip(&format!("link set {name} {command}")).expect("it was made here");
        guest.wait("change of the link", |guest| {
            (guest.is_up() == up).then_some(())
        });
        assert!(guest.interrupts() > 0);
    }
    ip(&format!("link del {name}")).expect("it was made here");
    guest.wait("end of the link", |guest| (!guest.is_up()).then_some(()));
}

#[test]
fn the_link_is_as_the_interface() {
    let Some(interface) = Interface::new("") else {
        return;
    };
    let card = interface.card(",vhost=off");
    the_link_follows(&interface, &card);
    // What the guest sends now goes nowhere, and does not hold it up.
    let mut guest = Guest::new(&card, 0);
    assert!(!guest.is_up());
    guest.send(0, [0; HEADER], &[0; 60]);
}

#[test]
fn an_inherited_descriptor_works_as_an_opened_one() {
    let (Some(interface), Some(other)) = (Interface::new(""), Interface::new("")) else {
        return;
    };
    let attach = |interface: &Interface, flags| {
        let tun = open_tun().expect("it opens");
        sys::set_interface(&tun, &interface.name, flags).expect("it is ours");
        tun
    };
    let tun = attach(&interface, FLAGS);
    let card = open(&format!("fd={},mac={MAC},vhost=off", tun.as_raw_fd()));
    exchange(&interface, &card.expect("it opens"));
    let wrong = |number: RawFd| {
        let error = open(&format!("fd={number}")).err().expect("it is wrong");
        format!("{error:#}")
    };
    let tun = attach(&other, libc::IFF_TAP | libc::IFF_NO_PI);
    let bare = wrong(tun.as_raw_fd());
    assert!(bare.contains("IFF_VNET_HDR"), "{bare}");
    let closed = wrong(1_000_000);
    assert!(
        closed.contains("not started with descriptor 1000000"),
        "{closed}"
    );
    let (pipe, _) = rustix::pipe::pipe().expect("a pipe");
    assert!(wrong(pipe.as_raw_fd()).contains("is no TAP"));
}

#[test]
fn an_interface_that_cannot_be_used_is_refused_with_what_would_work() {
    let wrong = |text: &str| {
        let error = open(text).err().expect(text);
        let error = format!("{error:#}");
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let missing = wrong("tap=none-such");
    assert!(
        missing.starts_with("--net tap=none-such: there is no interface"),
        "{missing}"
    );
    assert!(
        missing.contains("ip tuntap add dev none-such mode tap user "),
        "{missing}"
    );
    for name in ["a/b", "a name", "tap%d", "..", "sixteen-letters-"] {
        assert!(
            wrong(&format!("tap={name}")).contains("no interface can be called"),
            "{name}"
        );
    }
    let Some(interface) = Interface::new("") else {
        return;
    };
    let name = &interface.name;
    let other = wrong("tap=lo");
    assert!(other.contains("lo is no TAP"), "{other}");
    let queues = wrong(&format!("tap={name},queues=2"));
    assert!(queues.contains("multi_queue"), "{queues}");
    // The advice, word for word.
    let commands = queues
        .split('\'')
        .filter_map(|word| word.strip_prefix("ip "));
    for command in commands {
        ip(command).expect(command);
    }
    open(&format!("tap={name},queues=2")).expect("two queues");
    ip(&format!("link del {name}")).expect("it is there");
    let missing = wrong(&format!("tap={name}"));
    let commands = missing
        .split('\'')
        .filter_map(|word| word.strip_prefix("ip "));
    for command in commands {
        ip(command).expect(command);
    }
    let _card = interface.card("");
    let busy = wrong(&format!("tap={name}"));
    assert!(busy.contains("in use"), "{busy}");
    // One that was made for several queues takes one, too.
    let Some(interface) = Interface::new("multi_queue") else {
        return;
    };
    interface.card("");
}
