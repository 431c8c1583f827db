use crate::guest::{Armlet, Outcome};
use crate::interpreter::{BOARD, image};
use crate::net::Tap;
use crate::rig;
use crate::steps::{Driver, Part, QUEUE, Steps, register, slots};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// How often a driver stops each of its queues.
const ROUNDS: u32 = 10;

/// What a buffer or a ring holds that nobody may write to.
const UNTOUCHED: u32 = 0x5a5a_5a5a;

/// A guest that drives one device by itself.
struct Bench {
    steps: Steps,
    driver: Driver,
    /// Where the next buffer is.
    free: u64,
}

impl Bench {
    /// For the device called `name` among those of these options.
    fn new(options: &[(&str, String)], name: &str) -> Bench {
        let slots = slots(options);
        let slot = slots.iter().find(|(known, _)| known.starts_with(name));
        let (_, base) = slot.expect("the device");
        let driver = Driver::new(*base, 0);
        let mut steps = Steps::default();
        steps.enable_console();
        Bench {
            steps,
            free: driver.buffers(),
            driver,
        }
    }

    /// A buffer that holds `data`, and [`UNTOUCHED`] up to `size` bytes.
    fn buffer(&mut self, data: &[u8], size: usize) -> u64 {
        let mut bytes = data.to_vec();
        while bytes.len() < size {
            bytes.extend(UNTOUCHED.to_le_bytes());
        }
        let start = self.free;
        self.free += bytes.len().next_multiple_of(8) as u64;
        self.steps.place(start, &bytes);
        start
    }

    /// Room for the device to write 256 bytes to, made available.
    fn room(&mut self, queue: usize) -> u64 {
        let start = self.buffer(&[], 256);
        self.driver
            .offer(&mut self.steps, queue, &[(start, 256, true)]);
        self.driver.kick(&mut self.steps, queue);
        start
    }

    /// Makes a request and kicks.
    fn send(&mut self, queue: usize, data: &[u8]) {
        let start = self.buffer(data, 0);
        let part: Part = (start, data.len() as u32, false);
        self.driver.offer(&mut self.steps, queue, &[part]);
        self.driver.kick(&mut self.steps, queue);
    }

    /// Waits until all that was made available is used.
    fn finish(&mut self, queue: usize) {
        self.driver.finish(&mut self.steps, queue);
    }

    /// The 32 bits at `address` have to be `value` where `mask` is.
    fn check(&mut self, address: u64, mask: u32, value: u32) {
        self.steps.wait_up_to(1, address, mask, value);
    }

    fn stop(&mut self, queue: usize) {
        self.driver.stop_queue(&mut self.steps, queue);
    }

    fn restart(&mut self, queue: usize) {
        self.driver.restart_queue(&mut self.steps, queue);
    }

    /// Lets the host do for a while what it may: each write is an exit to armlet.
    fn rest(&mut self) {
        self.steps
            .write_many(self.driver.base + register::QUEUE_SEL, 0, 1000);
    }

    /// The used ring of a queue that is stopped gets a mark; returns where.
    fn mark(&mut self, queue: usize) -> u64 {
        let [_, _, used] = self.driver.rings(queue);
        self.steps.write(4, used, u64::from(UNTOUCHED));
        used
    }

    /// Runs the guest, of which no check may fail, nor may its device have found a fault.
    fn run(mut self, options: &[(&str, String)]) -> Outcome {
        self.steps.write(4, self.driver.base + register::STATUS, 0);
        self.steps.print("done\n");
        self.steps.power_off();
        let mut armlet = Armlet::image(&image(&self.steps)).option("--board", BOARD);
        for (name, value) in options {
            armlet = armlet.option(name, value);
        }
        let outcome = armlet.run();
        outcome.assert_status(0);
        assert_eq!(outcome.text(), "done\n", "{}", outcome.errors);
        assert!(
            !outcome.errors.contains("of this device"),
            "{}",
            outcome.errors
        );
        outcome
    }
}

/// A question who has an address of the network, behind virtio's header (RFC 826).
fn question(subnet: u8) -> Vec<u8> {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x18];
    let mut frame = vec![0; 12 + 60];
    frame[12..18].fill(0xff);
    frame[18..24].copy_from_slice(&MAC);
    frame[24..34].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[34..40].copy_from_slice(&MAC);
    frame[40..44].copy_from_slice(&[10, 88, subnet, 2]);
    frame[50..54].copy_from_slice(&[10, 88, subnet, 1]);
    frame
}

/// Stops and restarts both queues of a card at a TAP.
fn stops_queues_of_a_card(name: &'static str, subnet: u8, vhost: &str) {
    let Some(_) = rig::main() else { return };
    if vhost == "on" && !Path::new("/dev/vhost-net").exists() {
        println!("skipped: this host has no /dev/vhost-net");
        return;
    }
    let Some(tap) = Tap::new(name, subnet, 1) else {
        return;
    };
    // Its own packets would come in between. Without IPv6 there are none.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let options = [("--net", format!("tap={},vhost={vhost}", tap.name))];
    let mut bench = Bench::new(&options, "net");
    let (rx, tx) = (0, 1);
    bench.driver.start(&mut bench.steps, 0, &[QUEUE; 2]);
    let is_answer = |bench: &mut Bench, buffer: u64| {
        bench.check(buffer + 24, u32::MAX, 0x0100_0608);
        bench.check(buffer + 32, 0xffff, 0x0200);
    };
    for _ in 0..ROUNDS {
        bench.free = bench.driver.buffers();
        let buffer = bench.room(rx);
        bench.send(tx, &question(subnet));
        bench.finish(tx);
        bench.finish(rx);
        is_answer(&mut bench, buffer);
        // The other end has this buffer when the queue is stopped. Answers come all the same.
        let lost = bench.room(rx);
        bench.stop(rx);
        let used = bench.mark(rx);
        for _ in 0..3 {
            bench.send(tx, &question(subnet));
            bench.finish(tx);
        }
        bench.rest();
        bench.check(lost + 32, u32::MAX, UNTOUCHED);
        bench.check(used, u32::MAX, UNTOUCHED);
        bench.restart(rx);
        let buffers = [(); 3].map(|()| bench.room(rx));
        bench.finish(rx);
        for buffer in buffers {
            is_answer(&mut bench, buffer);
        }
        // What is made available while it is stopped is not sent.
        bench.stop(tx);
        let used = bench.mark(tx);
        bench.send(tx, &question(subnet));
        bench.rest();
        bench.check(used, u32::MAX, UNTOUCHED);
        bench.restart(tx);
        let buffer = bench.room(rx);
        bench.send(tx, &question(subnet));
        bench.finish(tx);
        bench.finish(rx);
        is_answer(&mut bench, buffer);
    }
    bench.run(&options);
}

#[test]
fn queues_of_vhost_net_are_stopped_and_set_up_again() {
    stops_queues_of_a_card("armtap6", 16, "on");
}

#[test]
fn queues_of_a_tap_are_stopped_and_set_up_again() {
    stops_queues_of_a_card("armtap7", 17, "off");
}

/// Answers each connection to this port of the host with what it sends; it ends with this.
struct Echo(Child);

impl Echo {
    /// `None` where the host cannot; this was said then.
    fn listen(port: u32) -> Option<Echo> {
        let socat = rig::program("socat")?;
        if !Path::new("/dev/vhost-vsock").exists() {
            println!("skipped: this host has no /dev/vhost-vsock");
            return None;
        }
        let mut child = Command::new(socat)
            .args(["-d", "-d", &format!("VSOCK-LISTEN:{port},fork"), "PIPE"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("socat can be run");
        let words = BufReader::new(child.stderr.take().expect("a pipe"));
        let echo = Echo(child);
        let mut lines = words.lines().map_while(Result::ok);
        let listens = lines.any(|line| line.contains("listening on"));
        assert!(listens, "socat does not listen");
        // What else it says is of no interest, but somebody has to take it.
        std::thread::spawn(move || lines.for_each(drop));
        Some(echo)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A packet of struct virtio_vsock_hdr (virtio 1.2, section 5.10.6) from the guest to the host.
fn packet(op: u16, (from, to): (u32, u32), forwarded: u32, data: &[u8]) -> Vec<u8> {
    const STREAM: u16 = 1;
    let mut bytes = Vec::new();
    for cid in [CID, 2] {
        bytes.extend(u64::from(cid).to_le_bytes());
    }
    for word in [from, to, data.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(STREAM.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    for word in [0, 1 << 16, forwarded] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(data);
    bytes
}

const CID: u32 = 77;

#[test]
fn queues_of_vhost_vsock_are_stopped_and_set_up_again() {
    const PORT: u32 = 1234;
    const REQUEST: u16 = 1;
    const RESPONSE: u16 = 2;
    const DATA: u16 = 5;
    const CREDIT: u16 = 6;
    let Some(_) = rig::main() else { return };
    let Some(_echo) = Echo::listen(PORT) else {
        return;
    };
    let options = [("--vsock", format!("cid={CID}"))];
    let mut bench = Bench::new(&options, "vsock");
    let (rx, tx) = (0, 1);
    bench.driver.start(&mut bench.steps, 0, &[QUEUE, QUEUE, 8]);
    let is = |bench: &mut Bench, buffer: u64, op: u16, data: &[u8]| {
        bench.check(buffer + 28, u32::MAX, u32::from(op) << 16 | 1);
        for (index, word) in (0_u64..).zip(data.chunks(4)) {
            let word = u32::from_le_bytes(word.try_into().expect("whole words"));
            bench.check(buffer + 44 + 4 * index, u32::MAX, word);
        }
    };
    // The kernel says that it has room again once its data was read (from Linux 6.8 on), and then
    // comes the answer.
    let answer = |bench: &mut Bench, data: &[u8]| {
        let buffers = [bench.room(rx), bench.room(rx)];
        bench.finish(tx);
        bench.finish(rx);
        is(bench, buffers[0], CREDIT, &[]);
        is(bench, buffers[1], DATA, data);
    };
    for round in 0..ROUNDS {
        bench.free = bench.driver.buffers();
        let ports = (1000 + round, PORT);
        let data = |letter: u8| vec![letter + round as u8; 8];
        let buffer = bench.room(rx);
        bench.send(tx, &packet(REQUEST, ports, 0, &[]));
        bench.finish(tx);
        bench.finish(rx);
        is(&mut bench, buffer, RESPONSE, &[]);
        bench.send(tx, &packet(DATA, ports, 0, &data(b'a')));
        answer(&mut bench, &data(b'a'));
        // The kernel has this buffer when the queue is stopped, and is kicked for the other one.
        let lost = bench.room(rx);
        bench.stop(rx);
        let used = bench.mark(rx);
        bench.send(tx, &packet(DATA, ports, 8, &data(b'k')));
        bench.rest();
        bench.check(lost + 28, u32::MAX, UNTOUCHED);
        bench.check(used, u32::MAX, UNTOUCHED);
        bench.restart(rx);
        answer(&mut bench, &data(b'k'));
        bench.stop(tx);
        let used = bench.mark(tx);
        bench.send(tx, &packet(DATA, ports, 16, &data(b'u')));
        bench.rest();
        bench.check(used, u32::MAX, UNTOUCHED);
        bench.restart(tx);
        bench.send(tx, &packet(DATA, ports, 16, &data(b'A')));
        answer(&mut bench, &data(b'A'));
    }
    bench.run(&options);
}

/// A request of FUSE (include/uapi/linux/fuse.h) about the root.
fn fuse(opcode: u32, unique: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let len = 40 + data.len() as u32;
    for word in [len, opcode, unique, 0, 1, 0, 0, 0, 1, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(data);
    bytes
}

#[test]
fn queues_of_virtiofsd_are_stopped_and_set_up_again() {
    const LOOKUP: u32 = 1;
    const INIT: u32 = 26;
    const EIO: u32 = 0_u32.wrapping_sub(5);
    /// 7.31, read-ahead, no flags.
    const VERSION: [u32; 4] = [7, 31, 1 << 17, 0];
    let Some(_) = rig::main() else { return };
    if rig::program("virtiofsd").is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("file"), "x").expect("a file");
    let path = folder.path().display();
    let options = [("--share", format!("tag=share,path={path}"))];
    let mut bench = Bench::new(&options, "share");
    let (urgent, requests) = (0, 1);
    bench.driver.start(&mut bench.steps, 0, &[QUEUE; 2]);
    let mut unique = 0;
    let mut ask = |bench: &mut Bench, opcode: u32, data: &[u8], error: u32| {
        unique += 2;
        let request = fuse(opcode, unique, data);
        let asked = bench.buffer(&request, 0);
        let answer = bench.buffer(&[], 256);
        let chain = [(asked, request.len() as u32, false), (answer, 256, true)];
        bench.driver.request(&mut bench.steps, requests, &chain);
        // struct fuse_out_header: length, error, number.
        bench.check(answer + 4, u32::MAX, error);
        bench.check(answer + 8, u32::MAX, unique);
    };
    let version: Vec<u8> = VERSION.iter().flat_map(|word| word.to_le_bytes()).collect();
    for _ in 0..3 {
        bench.free = bench.driver.buffers();
        ask(&mut bench, INIT, &version, 0);
        ask(&mut bench, LOOKUP, b"file\0", 0);
        // Without one of its queues there is no virtiofsd, and with it again no session.
        let lost = bench.buffer(&[], 256);
        let part = (lost, 256, true);
        bench.driver.offer(&mut bench.steps, requests, &[part]);
        bench.stop(requests);
        let used = bench.mark(requests);
        bench.rest();
        bench.check(lost, u32::MAX, UNTOUCHED);
        bench.check(used, u32::MAX, UNTOUCHED);
        bench.restart(requests);
        ask(&mut bench, LOOKUP, b"file\0", EIO);
        // With all of them set up again there is another.
        bench.stop(urgent);
        bench.stop(requests);
        bench.restart(requests);
        bench.restart(urgent);
    }
    ask(&mut bench, INIT, &version, 0);
    ask(&mut bench, LOOKUP, b"file\0", 0);
    bench.run(&options);
}
