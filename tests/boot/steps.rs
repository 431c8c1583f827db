use crate::interpreter::{BOARD, RINGS};
use serde_json::Value;
use std::process::Command;

/// How often a guest looks for what it waits for: minutes of an emulated CPU.
const TRIES: u32 = 200_000_000;

/// What an interpreter in the guest can do. The operands are called `extra` (32 bits), `a`, `b` and
/// `c`.
#[derive(Clone, Copy, Debug)]
enum Operation {
    /// Writes `b` at `a`: 1, 2, 4 or 8 bytes.
    Write8,
    Write16,
    Write32,
    Write64,
    /// Reads at `a`.
    Read8,
    Read16,
    Read32,
    Read64,
    /// Calls the hypervisor with `a`, `b`, `c` and `extra`.
    Hypercall,
    /// The same as a call of the secure monitor.
    SecureCall,
    /// Reads 32 bits at `a` until those in `b` are `c`, up to `extra` times; then it prints `!`.
    Wait,
    /// Goes on `a` bytes behind the next step.
    Jump,
    /// Takes one from the 32 bits at `a`, and goes on `b` bytes behind the next step unless they are
    /// 0 then.
    Loop,
    /// Writes the 32 bits `b` at `a`, `extra` times.
    WriteMany,
    /// Executes the instruction `extra` with `a` in X4, `b` in X2 and `c` in X3.
    Execute,
    /// Starts the vCPU `a` with the steps `b` bytes behind the next one.
    StartCpu,
    /// Writes `b` to port `a`: 1, 2 or 4 bytes.
    Out8,
    Out16,
    Out32,
    /// Reads port `a`.
    In8,
    In16,
    In32,
    /// Writes `b` (low) and `c` (high) to the model-specific register `a`.
    WriteMsr,
    /// Reads the model-specific register `a`.
    ReadMsr,
}

/// What a guest without an operating system does, one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    bytes: Vec<u8>,
}

impl Steps {
    /// The bytes of a step.
    const SIZE: usize = 32;

    fn step(&mut self, operation: Operation, extra: u32, [a, b, c]: [u64; 3]) {
        self.bytes.extend((operation as u32).to_le_bytes());
        self.bytes.extend(extra.to_le_bytes());
        for operand in [a, b, c] {
            self.bytes.extend(operand.to_le_bytes());
        }
    }

    /// As the interpreter reads them.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where the next step will be.
    pub(crate) fn position(&self) -> usize {
        self.bytes.len()
    }

    /// Writes 1, 2, 4 or 8 bytes.
    pub(crate) fn write(&mut self, width: u8, address: u64, value: u64) {
        let operation = match width {
            1 => Operation::Write8,
            2 => Operation::Write16,
            4 => Operation::Write32,
            _ => Operation::Write64,
        };
        self.step(operation, 0, [address, value, 0]);
    }

    /// Reads 1, 2, 4 or 8 bytes.
    pub(crate) fn read(&mut self, width: u8, address: u64) {
        let operation = match width {
            1 => Operation::Read8,
            2 => Operation::Read16,
            4 => Operation::Read32,
            _ => Operation::Read64,
        };
        self.step(operation, 0, [address, 0, 0]);
    }

    /// Writes 32 bits at the same address, `times` times.
    pub(crate) fn write_many(&mut self, address: u64, value: u32, times: u32) {
        self.step(Operation::WriteMany, times, [address, u64::from(value), 0]);
    }

    /// Puts `data` into memory.
    pub(crate) fn place(&mut self, address: u64, data: &[u8]) {
        for (at, part) in (address..).step_by(8).zip(data.chunks(8)) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write(8, at, u64::from_le_bytes(word));
        }
    }

    /// Waits until the bits `mask` of the 32 bits at `address` are `value`; prints `!` where they
    /// never are.
    pub(crate) fn wait(&mut self, address: u64, mask: u32, value: u32) {
        self.wait_up_to(TRIES, address, mask, value);
    }

    /// As [`Self::wait`], for so many looks.
    pub(crate) fn wait_up_to(&mut self, tries: u32, address: u64, mask: u32, value: u32) {
        let operands = [address, u64::from(mask), u64::from(value)];
        self.step(Operation::Wait, tries, operands);
    }

    /// Calls the hypervisor (HVC, VMCALL). The last value has 32 bits.
    pub(crate) fn hypercall(&mut self, [a, b, c, extra]: [u64; 4]) {
        self.step(Operation::Hypercall, extra as u32, [a, b, c]);
    }

    /// Calls the secure monitor (SMC).
    pub(crate) fn secure_call(&mut self, [a, b, c, extra]: [u64; 4]) {
        self.step(Operation::SecureCall, extra as u32, [a, b, c]);
    }

    /// Executes one instruction of ARM64 with these values in X4, X2 and X3.
    pub(crate) fn execute(&mut self, instruction: u32, operands: [u64; 3]) {
        self.step(Operation::Execute, instruction, operands);
    }

    /// Writes 1, 2 or 4 bytes to a port of x86_64.
    pub(crate) fn out(&mut self, width: u8, port: u16, value: u32) {
        let operation = match width {
            1 => Operation::Out8,
            2 => Operation::Out16,
            _ => Operation::Out32,
        };
        self.step(operation, 0, [u64::from(port), u64::from(value), 0]);
    }

    /// Reads 1, 2 or 4 bytes from a port of x86_64.
    pub(crate) fn input(&mut self, width: u8, port: u16) {
        let operation = match width {
            1 => Operation::In8,
            2 => Operation::In16,
            _ => Operation::In32,
        };
        self.step(operation, 0, [u64::from(port), 0, 0]);
    }

    /// Writes a model-specific register of x86_64.
    pub(crate) fn write_msr(&mut self, number: u32, value: u64) {
        let operands = [u64::from(number), value & 0xffff_ffff, value >> 32];
        self.step(Operation::WriteMsr, 0, operands);
    }

    /// Reads a model-specific register of x86_64.
    pub(crate) fn read_msr(&mut self, number: u32) {
        self.step(Operation::ReadMsr, 0, [u64::from(number), 0, 0]);
    }

    /// The distance from the step after the one that comes next to `position`.
    fn distance(&self, position: usize) -> u64 {
        (position as u64).wrapping_sub((self.position() + Steps::SIZE) as u64)
    }

    /// Goes on at `position`.
    pub(crate) fn jump(&mut self, position: usize) {
        let distance = self.distance(position);
        self.step(Operation::Jump, 0, [distance, 0, 0]);
    }

    /// Puts the step that `add` adds where another one is.
    pub(crate) fn replace(&mut self, position: usize, add: impl FnOnce(&mut Steps)) {
        let behind = self.bytes.split_off(position + Steps::SIZE);
        self.bytes.truncate(position);
        add(self);
        self.bytes.extend(behind);
    }

    /// Goes on at `position` until the 32 bits at `counter`, which have one less each time, are 0.
    pub(crate) fn repeat(&mut self, counter: u64, position: usize) {
        let distance = self.distance(position);
        self.step(Operation::Loop, 0, [counter, distance, 0]);
    }

    /// Starts another vCPU of ARM64 with the steps at `position`.
    pub(crate) fn start_cpu(&mut self, mpidr: u64, position: usize) {
        let distance = self.distance(position);
        self.step(Operation::StartCpu, 0, [mpidr, distance, 0]);
    }
}

/// Registers of virtio over MMIO (virtio 1.2, section 4.2.2).
pub(crate) mod register {
    pub(crate) const DRIVER_FEATURES: u64 = 0x020;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(crate) const QUEUE_SEL: u64 = 0x030;
    pub(crate) const QUEUE_SIZE: u64 = 0x038;
    pub(crate) const QUEUE_READY: u64 = 0x044;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x050;
    pub(crate) const INTERRUPT_ACK: u64 = 0x064;
    pub(crate) const STATUS: u64 = 0x070;
    pub(crate) const QUEUE_DESC: u64 = 0x080;
    pub(crate) const QUEUE_DRIVER: u64 = 0x090;
    pub(crate) const QUEUE_DEVICE: u64 = 0x0a0;
    pub(crate) const CONFIG: u64 = 0x100;
}

/// A buffer of a chain: address, bytes, and whether the device writes to it.
pub(crate) type Part = (u64, u32, bool);

/// How many descriptors most queues of these drivers have.
pub(crate) const QUEUE: u16 = 64;

/// A driver, which does its part by adding steps.
#[derive(Clone, Debug)]
pub(crate) struct Driver {
    /// The slot's first register.
    pub(crate) base: u64,
    /// The first byte of 1 MiB of its own.
    memory: u64,
    /// How often it looks for an answer of the device's registers.
    tries: u32,
    /// Of each queue: its size, the next descriptor, how many chains were offered.
    queues: Vec<(u16, u16, u16)>,
}

impl Driver {
    /// For the device in the slot at `base`, with the `index`th piece of memory.
    pub(crate) fn new(base: u64, index: u64) -> Driver {
        Driver {
            base,
            memory: RINGS + (index << 20),
            tries: TRIES,
            queues: Vec::new(),
        }
    }

    /// One that does not wait long for a device to be reset, but goes on.
    pub(crate) fn hasty(self) -> Driver {
        Driver {
            tries: 1000,
            ..self
        }
    }

    /// Where descriptors, available ring and used ring of a queue are.
    pub(crate) fn rings(&self, queue: usize) -> [u64; 3] {
        let start = self.memory + 0x1_0000 * queue as u64;
        [start, start + 0x4000, start + 0x8000]
    }

    /// Where room for buffers begins: 512 KiB.
    pub(crate) fn buffers(&self) -> u64 {
        self.memory + 0x8_0000
    }

    /// Resets the device and starts it (virtio 1.2, section 3.1.1), with VIRTIO_F_VERSION_1 and
    /// these features and queues of these sizes.
    pub(crate) fn start(&mut self, steps: &mut Steps, features: u64, queues: &[u16]) {
        let status = self.base + register::STATUS;
        steps.write(4, status, 0);
        steps.wait_up_to(self.tries, status, 0xff, 0);
        steps.write(4, status, 1);
        steps.write(4, status, 3);
        let features = features | 1 << 32;
        for (half, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            steps.write(4, self.base + register::DRIVER_FEATURES_SEL, half);
            steps.write(4, self.base + register::DRIVER_FEATURES, bits);
        }
        steps.write(4, status, 0xb);
        steps.wait_up_to(self.tries, status, 0xff, 0xb);
        self.queues = queues.iter().map(|&size| (size, 0, 0)).collect();
        for queue in 0..queues.len() {
            self.start_queue(steps, queue);
        }
        steps.write(4, status, 0xf);
    }

    /// Stops a queue and waits until the device is out of it (section 4.2.2.2).
    pub(crate) fn stop_queue(&self, steps: &mut Steps, queue: usize) {
        let ready = self.base + register::QUEUE_READY;
        steps.write(4, self.base + register::QUEUE_SEL, queue as u64);
        steps.write(4, ready, 0);
        steps.wait(ready, u32::MAX, 0);
    }

    /// Sets a queue up that was stopped, its rings empty.
    pub(crate) fn restart_queue(&mut self, steps: &mut Steps, queue: usize) {
        let (size, ..) = self.queues[queue];
        self.queues[queue] = (size, 0, 0);
        self.start_queue(steps, queue);
    }

    fn start_queue(&self, steps: &mut Steps, queue: usize) {
        let [descriptors, available, used] = self.rings(queue);
        // Memory may be as it was before a reset of the machine.
        steps.write(4, available, 0);
        steps.write(4, used, 0);
        steps.write(4, self.base + register::QUEUE_SEL, queue as u64);
        let size = u64::from(self.queues[queue].0);
        steps.write(4, self.base + register::QUEUE_SIZE, size);
        for (register, address) in [
            (register::QUEUE_DESC, descriptors),
            (register::QUEUE_DRIVER, available),
            (register::QUEUE_DEVICE, used),
        ] {
            steps.write(4, self.base + register, address & 0xffff_ffff);
            steps.write(4, self.base + register + 4, address >> 32);
        }
        steps.write(4, self.base + register::QUEUE_READY, 1);
    }

    /// Makes a chain available. Those offered earlier must have been answered before their
    /// descriptors come round again.
    pub(crate) fn offer(&mut self, steps: &mut Steps, queue: usize, chain: &[Part]) {
        let [descriptors, available, _] = self.rings(queue);
        let (size, first, offered) = self.queues[queue];
        for (index, &(address, length, writable)) in chain.iter().enumerate() {
            let this = (first + index as u16) % size;
            let next = (this + 1) % size;
            let more = index + 1 < chain.len();
            // VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE (section 2.7.5).
            let flags = u64::from(more) | u64::from(writable) << 1;
            let at = descriptors + 16 * u64::from(this);
            steps.write(8, at, address);
            let rest = u64::from(length) | flags << 32 | u64::from(next) << 48;
            steps.write(8, at + 8, rest);
        }
        let entry = available + 4 + 2 * u64::from(offered % size);
        steps.write(2, entry, u64::from(first));
        let offered = offered.wrapping_add(1);
        steps.write(2, available + 2, u64::from(offered));
        self.queues[queue] = (size, (first + chain.len() as u16) % size, offered);
    }

    /// Tells the device of a queue.
    pub(crate) fn kick(&self, steps: &mut Steps, queue: usize) {
        steps.write(4, self.base + register::QUEUE_NOTIFY, queue as u64);
    }

    /// Waits until all that was offered on a queue is answered.
    pub(crate) fn finish(&self, steps: &mut Steps, queue: usize) {
        let [_, _, used] = self.rings(queue);
        let offered = u32::from(self.queues[queue].2);
        steps.wait(used, 0xffff_0000, offered << 16);
    }

    /// One request from first to last.
    pub(crate) fn request(&mut self, steps: &mut Steps, queue: usize, chain: &[Part]) {
        self.offer(steps, queue, chain);
        self.kick(steps, queue);
        self.finish(steps, queue);
    }
}

/// A driver of a disk (virtio 1.2, section 5.2).
pub(crate) struct Disk {
    pub(crate) driver: Driver,
    tagged: u64,
}

impl Disk {
    /// Bytes of a buffer for data.
    pub(crate) const MOST: u32 = 0x1_0000;

    pub(crate) fn new(driver: Driver) -> Disk {
        Disk { driver, tagged: 0 }
    }

    /// Where the data of requests are.
    pub(crate) fn data(&self) -> u64 {
        self.driver.buffers()
    }

    /// The chain of a request: its type, where on the disk, how many bytes.
    pub(crate) fn chain(
        &mut self,
        steps: &mut Steps,
        kind: u32,
        sector: u64,
        size: u32,
    ) -> Vec<Part> {
        // Each of the last 64 has a header and a status of its own.
        let room = self.driver.buffers() + 0x7_0000 + 32 * (self.tagged % 64);
        self.tagged += 1;
        steps.write(8, room, u64::from(kind));
        steps.write(8, room + 8, sector);
        steps.write(1, room + 16, 0xff);
        let mut chain = vec![(room, 16, false)];
        if size > 0 {
            chain.push((self.data(), size, kind == Disk::READ));
        }
        chain.push((room + 16, 1, true));
        chain
    }

    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;

    /// A request from first to last, which has to succeed: `!` is printed where it does not.
    pub(crate) fn request(&mut self, steps: &mut Steps, kind: u32, sector: u64, size: u32) {
        let chain = self.chain(steps, kind, sector, size);
        self.driver.request(steps, 0, &chain);
        if let Some(&(status, ..)) = chain.last() {
            steps.wait_up_to(1, status, 0xff, 0);
        }
    }
}

/// The slot of each device, by its name, of the machine that `armlet run` makes with these options.
pub(crate) fn slots(options: &[(&str, String)]) -> Vec<(String, u64)> {
    let mut plan = Command::new(env!("CARGO_BIN_EXE_armlet"));
    plan.args(["plan", "--host", BOARD, "--board", BOARD, "--json"]);
    for (name, value) in options {
        plan.args([name, value.as_str()]);
    }
    let output = plan.output().expect("armlet can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let plan: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let devices = plan["devices"].as_array().expect("a list of devices");
    let slot = |device: &Value| {
        let name = device["name"].as_str()?;
        let slot = device["kind"].get("virtio-mmio")?;
        assert!(slot.is_object(), "{device}");
        Some((name.to_owned(), device["window"]["start"].as_u64()?))
    };
    devices.iter().filter_map(slot).collect()
}
