//! vCPUs and what KVM emulates beside them, saved and made anew: machines of KVM's objects alone, whose
//! guests tell the test by a port where they are.

use crate::commanded::FIRST;
use crate::control::{controlled, done};
use crate::guest::Armlet;
use crate::rig;
use crate::software::Program;
use armlet::cli::{self, Command, Parsed};
use armlet::commands;
use armlet::decide::decide;
use armlet::kvm::kick::{self, Kickable, Target};
use armlet::kvm::{HostArch, KvmArch};
use armlet::memory;
use armlet_arch::Plan;
use armlet_system::status::{Status, status_of};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_value, to_value};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{sleep, spawn};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Chip = <HostArch as KvmArch>::Chip;
type VcpuState = <HostArch as KvmArch>::VcpuState;
type ChipState = <HostArch as KvmArch>::ChipState;

/// The port by which guests tell where they are: that of a PC's power-on self-test.
const POST: u8 = 0x80;
/// Where guests leave what they find, and where they find what the test leaves.
const FOUND: u64 = 0x20_0000;
const LEFT: u64 = 0x20_1000;
/// Where KVM tells a guest the time.
const CLOCK: u64 = 0x20_2000;
/// Longer than a guest here runs.
const LONG: Duration = Duration::from_secs(20);

/// What a guest is planned from, and its memory.
struct Kept {
    kvm: Kvm,
    plan: Plan<HostArch>,
    memory: GuestMemoryMmap,
}

/// A machine of KVM's objects.
struct Bare {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    chip: Chip,
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// It wrote this to the port.
    Told(u8),
    /// It was kicked.
    Kicked,
}

impl Kept {
    /// A guest with so many vCPUs that does what `program` says.
    fn new(program: &Program, vcpus: u32) -> Kept {
        let folder = tempfile::tempdir().expect("a folder");
        let kernel = folder.path().join("kernel");
        std::fs::write(&kernel, program.image()).expect("a file");
        let arguments = [
            "run".to_owned(),
            format!("--kernel={}", kernel.display()),
            "--board=pc".to_owned(),
            "--memory=64M".to_owned(),
            format!("--cpus={vcpus}"),
        ];
        let Parsed::Cli(cli, devices) = cli::parse(&arguments) else {
            panic!("no command");
        };
        let Some(Command::Run(args)) = cli.command else {
            panic!("another command");
        };
        let options = commands::run_options(&args, &devices).expect("a machine");
        let config = &options.config;
        let plan = decide(config, &options.host, &config.board).expect("a plan");
        let banks: Vec<_> = plan
            .layout
            .ram
            .iter()
            .map(|bank| (GuestAddress(bank.start()), bank.size() as usize))
            .collect();
        let memory = GuestMemoryMmap::from_ranges(&banks).expect("memory");
        let place = plan.layout.payload.kernel.expect("a kernel");
        let mut image = vec![0; place.size() as usize];
        let kernel = config.kernel.as_ref().expect("a kernel");
        kernel.load_into(&mut image).expect("a kernel");
        let put = |address, bytes: &[u8]| {
            memory
                .write_slice(bytes, GuestAddress(address))
                .expect("room");
        };
        put(place.start(), &image);
        for blob in &plan.blobs {
            put(blob.address, &blob.bytes);
        }
        Kept {
            kvm: options.kvm,
            plan,
            memory,
        }
    }

    /// A machine on its memory, whatever that holds by now.
    fn machine(&self) -> Bare {
        let vm = HostArch::create_vm(&self.kvm, &self.plan.width).expect("a VM");
        memory::give(&self.memory, &vm).expect("memory");
        let (vcpus, chip) = HostArch::populate(&self.kvm, &vm, &self.plan, &[]).expect("vCPUs");
        Bare { vm, vcpus, chip }
    }

    fn words(&self, address: u64, count: usize) -> Vec<u64> {
        let read = |index: usize| {
            let address = GuestAddress(address + 8 * index as u64);
            self.memory.read_obj(address).expect("memory")
        };
        (0..count).map(read).collect()
    }
}

impl Bare {
    /// Runs a vCPU until it tells something or has run for that long, and then completes its access.
    /// Returns what the guest printed as well.
    fn run(&mut self, index: usize, limit: Duration) -> (Stop, String) {
        kick::install();
        let vcpu = &mut self.vcpus[index];
        let target = Target::default();
        let _kickable = Kickable::new(vcpu, target.clone());
        let (done, waits) = channel::<()>();
        let watch = spawn(move || {
            // Again and again: one may come before KVM_RUN begins.
            let mut wait = limit;
            while let Err(RecvTimeoutError::Timeout) = waits.recv_timeout(wait) {
                target.kick();
                wait = Duration::from_millis(10);
            }
        });
        let mut printed = String::new();
        let mut told = None;
        let stop = loop {
            match vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) if port == u16::from(POST) => {
                    told = Some(Stop::Told(data[0]));
                    vcpu.set_kvm_immediate_exit(1);
                }
                Ok(VcpuExit::IoOut(0x3f8, data)) => {
                    printed.extend(data.iter().map(|byte| char::from(*byte)));
                }
                Ok(VcpuExit::IoOut(..)) => {}
                Ok(exit) => panic!("{exit:?} after {printed:?}"),
                Err(error) if error.errno() == libc_eintr() => {
                    vcpu.set_kvm_immediate_exit(0);
                    break told.unwrap_or(Stop::Kicked);
                }
                Err(error) if error.errno() == libc_eagain() => {}
                Err(error) => panic!("{error} after {printed:?}"),
            }
        };
        drop(done);
        watch.join().expect("a thread that ends");
        (stop, printed)
    }

    /// Has the first vCPU run for a moment.
    fn run_whatever_comes(&mut self) {
        kick::install();
        let vcpu = &mut self.vcpus[0];
        let target = Target::default();
        let _kickable = Kickable::new(vcpu, target.clone());
        let kicks = spawn(move || {
            for _ in 0..3 {
                sleep(Duration::from_millis(1));
                target.kick();
            }
        });
        for _ in 0..1000 {
            match vcpu.run() {
                Err(error) if error.errno() != libc_eagain() => break,
                _ => {}
            }
        }
        kicks.join().expect("a thread that ends");
    }

    fn expect(&mut self, index: usize, told: u8) -> String {
        let (stop, printed) = self.run(index, LONG);
        assert_eq!(stop, Stop::Told(told), "{printed:?}");
        printed
    }

    /// The state of all of it, as it comes out of a file.
    fn save(&self) -> (Vec<VcpuState>, ChipState) {
        let save = |vcpu| HostArch::save_vcpu(vcpu, &self.chip).expect("the state of a vCPU");
        let vcpus: Vec<_> = self.vcpus.iter().map(save).collect();
        let chip = HostArch::save_chip(&self.vm, &self.chip, &vcpus).expect("the rest");
        let vcpus = postcard::to_allocvec(&vcpus).expect("bytes");
        let vcpus: Vec<_> = postcard::from_bytes(&vcpus).expect("states");
        let chip = postcard::to_allocvec(&chip).expect("bytes");
        let chip = postcard::from_bytes(&chip).expect("a state");
        (vcpus, chip)
    }

    fn restore(&self, (vcpus, chip): (&[VcpuState], &ChipState)) -> Result<(), String> {
        HostArch::restore(&self.vm, &self.chip, &self.vcpus, (vcpus, chip)).map_err(|error| {
            // What has a wrong size is so on every host.
            let said = format!("{error:#}");
            let is_invalid = said.contains(" bytes") || said.contains("the states of");
            assert_eq!(
                status_of(&error) == Status::Usage,
                is_invalid || said.contains(" leaves")
            );
            said
        })
    }

    /// Another machine in place of this, which goes on where this one stood.
    fn again(self, kept: &Kept) -> Bare {
        let (vcpus, chip) = self.save();
        drop(self);
        let other = kept.machine();
        other.restore((&vcpus, &chip)).expect("restored");
        other
    }
}

/// EINTR and EAGAIN (include/uapi/asm-generic/errno-base.h).
fn libc_eintr() -> i32 {
    rustix::io::Errno::INTR.raw_os_error()
}

fn libc_eagain() -> i32 {
    rustix::io::Errno::AGAIN.raw_os_error()
}

/// A program in long mode.
fn begin() -> Program {
    Program::default()
}

trait Tells {
    /// Tells where it is: MOV AL, number; OUT 0x80, AL. Other registers stay as they are.
    fn tell(self, number: u8) -> Self;
    /// The same without a change of RAX: OUT 0x80, AL.
    fn tell_al(self) -> Self;
    /// RDTSC; SHL RDX, 32; OR RAX, RDX; and RAX to where it is looked for.
    fn leave_tsc(self, at: u64) -> Self;
    /// MOV [address], a register by its number, all 64 bits.
    fn leave(self, register: u8, at: u64) -> Self;
    /// MOV register, value.
    fn load(self, register: u8, value: u64) -> Self;
    /// RDMSR, and EDX:EAX to where it is looked for.
    fn leave_msr(self, number: u32, at: u64) -> Self;
}

impl Tells for Program {
    fn tell(self, number: u8) -> Program {
        self.bytes(&[0xb0, number]).tell_al()
    }

    fn tell_al(self) -> Program {
        self.bytes(&[0xe6, POST])
    }

    fn leave_tsc(self, at: u64) -> Program {
        self.bytes(&[0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0])
            .leave(0, at)
    }

    fn leave(self, register: u8, at: u64) -> Program {
        let (low, high) = (register & 7, register >> 3);
        self.bytes(&[0x48 | high << 2, 0x89, 0x04 | low << 3, 0x25])
            .bytes(&(at as u32).to_le_bytes())
    }

    fn load(self, register: u8, value: u64) -> Program {
        self.bytes(&[0x48 | register >> 3, 0xb8 | register & 7])
            .bytes(&value.to_le_bytes())
    }

    fn leave_msr(self, number: u32, at: u64) -> Program {
        let program = self.bytes(&[0xb9]).bytes(&number.to_le_bytes());
        program
            .bytes(&[0x0f, 0x32, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0])
            .leave(0, at)
    }
}

/// The state as a value that can be looked into.
fn open(state: &impl serde::Serialize) -> Value {
    to_value(state).expect("a value")
}

fn close<T: DeserializeOwned>(state: Value) -> T {
    from_value(state).expect("a state")
}

/// The base addresses of FS and GS, GS's other, the target of SYSCALL, and PAT, with what the guest writes.
const MSRS: [(u32, u64); 5] = [
    (0xc000_0100, 0x1234_5678),
    (0xc000_0101, 0x2345_6789),
    (0xc000_0102, 0x3456_789a),
    (0xc000_0082, 0x4567_89ab),
    (0x277, 0x0007_0406_0007_0106),
];

#[test]
fn a_restored_vcpu_goes_on_with_all_of_its_registers() {
    if !rig::small() {
        return;
    }
    // KVM's own emulation has the registers of SSE alone.
    let wide = rig::virtualizes();
    // CR0: no emulation, MP; CR4: OSFXSR, OSXMMEXCPT.
    let mut program = begin()
        .bytes(&[0x0f, 0x20, 0xc0, 0x83, 0xe0, 0xfb, 0x83, 0xc8, 0x02])
        .bytes(&[0x0f, 0x22, 0xc0])
        .bytes(&[0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x06, 0, 0, 0x0f, 0x22, 0xe0]);
    if wide {
        // CR4: OSXSAVE; XCR0: x87, SSE, AVX.
        program = program
            .bytes(&[0x0f, 0x20, 0xe0, 0x0d, 0, 0, 4, 0, 0x0f, 0x22, 0xe0])
            .bytes(&[0x31, 0xc9, 0x31, 0xd2, 0xb8, 7, 0, 0, 0, 0x0f, 0x01, 0xd1]);
    }
    for (number, value) in MSRS {
        program = program.write_msr(number, (value >> 32) as u32, value as u32);
    }
    // MOV DR1, RAX.
    program = program.load(0, 0x0123_4567).bytes(&[0x0f, 0x23, 0xc8]);
    // VMOVDQU YMM, [R8 + 32 * number], or MOVDQU XMM.
    let vector = |program: Program, opcode: u8, register: u8| {
        let high = register >> 3;
        let program = match wide {
            true => program.bytes(&[0xc4, 0xc1 ^ high << 7, 0x7e, opcode]),
            false => program.bytes(&[0xf3, 0x41 | high << 2, 0x0f, opcode]),
        };
        program
            .bytes(&[0x80 | (register & 7) << 3])
            .bytes(&(u32::from(register) * 32).to_le_bytes())
    };
    program = program.load(8, LEFT);
    for register in 0..16 {
        program = vector(program, 0x6f, register);
    }
    let value = |register: u8| 0x0101_0101_0101_0101 * u64::from(register + 1);
    for register in 0..16 {
        program = program.load(register, value(register));
    }
    program = program.tell_al();
    for register in 0..16 {
        program = program.leave(register, FOUND + 8 * u64::from(register));
    }
    program = program.load(8, FOUND + 0x200);
    for register in 0..16 {
        program = vector(program, 0x7f, register);
    }
    for (at, (number, _)) in (0..).zip(MSRS) {
        program = program.leave_msr(number, FOUND + 0x400 + 8 * at);
    }
    // MOV RAX, DR1.
    program = program.bytes(&[0x0f, 0x21, 0xc8]).leave(0, FOUND + 0x480);
    let kept = Kept::new(&program.tell(2).stay(), 1);
    let pattern: Vec<u8> = (0..512_u32).map(|at| (at * 7 + at / 256) as u8).collect();
    let put = |bytes: &[u8]| {
        let place = GuestAddress(LEFT);
        kept.memory.write_slice(bytes, place).expect("memory");
    };
    put(&pattern);
    let mut machine = kept.machine();
    machine.expect(0, value(0) as u8);
    put(&[0; 512]);
    let mut machine = machine.again(&kept);
    machine.expect(0, 2);
    for register in 0..16 {
        let found = kept.words(FOUND + 8 * u64::from(register), 1);
        assert_eq!(found, [value(register)], "register {register}");
    }
    let mut vectors = vec![0; 512];
    let place = GuestAddress(FOUND + 0x200);
    kept.memory.read_slice(&mut vectors, place).expect("memory");
    for (register, (found, loaded)) in vectors.chunks(32).zip(pattern.chunks(32)).enumerate() {
        let bytes = if wide { 32 } else { 16 };
        assert_eq!(
            found[..bytes],
            loaded[..bytes],
            "vector register {register}"
        );
    }
    let msrs = kept.words(FOUND + 0x400, MSRS.len());
    assert_eq!(msrs, MSRS.map(|(_, value)| value));
    assert_eq!(kept.words(FOUND + 0x480, 1), [0x0123_4567]);
}

/// A state without what goes on by itself: TSC, kvmclock, and what the local APIC's timer has left.
fn without_clocks((vcpus, chip): &(Vec<VcpuState>, ChipState)) -> Value {
    let (mut vcpus, mut chip) = (open(vcpus), open(chip));
    for vcpu in vcpus.as_array_mut().expect("vCPUs") {
        for clock in ["tsc", "tsc_offset"] {
            assert!(vcpu[clock].take().is_u64(), "{clock}");
        }
        for byte in 0x390..0x394 {
            vcpu["lapic"][byte] = Value::Null;
        }
    }
    assert!(chip["clock"].take().is_u64());
    Value::Array(vec![vcpus, chip])
}

#[test]
fn what_is_restored_is_what_was_saved() {
    if !rig::small() {
        return;
    }
    let program = begin().route(4).on_interrupt(&begin().stay()).start_timer();
    let program = program
        .write_msr(0x4b56_4d01, 0, CLOCK as u32 | 1)
        .write_msr(0x200, 0, 6)
        .write_msr(0x201, 0, 0x800);
    // One that starts, two that wait for a start, and with 300, local APICs in x2APIC mode and an I/O
    // APIC that is not KVM's.
    for vcpus in [1, 3, 300] {
        let kept = Kept::new(&program.clone().tell(1).stay(), vcpus);
        let mut machine = kept.machine();
        if vcpus < 256 {
            machine.expect(0, 1);
        }
        let first = machine.save();
        let other = machine.again(&kept);
        let second = other.save();
        assert_eq!(without_clocks(&first), without_clocks(&second), "{vcpus}");
    }
}

#[test]
fn a_guests_clocks_stand_still_while_it_is_saved_and_step_back_never() {
    if !rig::small() {
        return;
    }
    let program = begin().write_msr(0x4b56_4d01, 0, CLOCK as u32 | 1);
    let program = program
        .leave_tsc(FOUND)
        .tell(1)
        .leave_tsc(FOUND + 8)
        .tell(2);
    let kept = Kept::new(&program.stay(), 1);
    // struct pvclock_vcpu_time_info (arch/x86/include/asm/pvclock-abi.h).
    let time = |tsc: u64| {
        let words = kept.words(CLOCK, 4);
        let [_, stamp, system, scale] = words[..] else {
            panic!("no time");
        };
        let shift = (scale >> 32) as u8 as i8;
        let ticks = u128::from(tsc - stamp);
        let ticks = match shift {
            0.. => ticks << shift,
            _ => ticks >> -i32::from(shift),
        };
        system + ((ticks * u128::from(scale as u32)) >> 32) as u64
    };
    let mut machine = kept.machine();
    // So that a clock that begins anew is behind.
    sleep(Duration::from_millis(700));
    machine.expect(0, 1);
    let tsc = kept.words(FOUND, 1)[0];
    let then = time(tsc);
    let (vcpus, chip) = machine.save();
    drop(machine);
    sleep(Duration::from_millis(1500));
    let mut machine = kept.machine();
    machine.restore((&vcpus, &chip)).expect("restored");
    machine.expect(0, 2);
    let later = kept.words(FOUND + 8, 1)[0];
    let now = time(later);
    let khz = open(&vcpus[0])["tsc_khz"].as_u64().expect("a frequency");
    println!(
        "TSC at {khz} kHz: {tsc} {later}, {} us; kvmclock {then} {now}, {} us",
        later.wrapping_sub(tsc) * 1000 / khz,
        now.wrapping_sub(then) / 1000
    );
    assert!(later > tsc, "{tsc} {later}");
    assert!(now > then, "{then} {now}");
    // Less than it was not there.
    let by_kvm = |state: &Value, what: &str| state[what].as_u64().expect("a number");
    let (saved, restored) = (open(&vcpus[0]), open(&machine.save().0[0]));
    if by_kvm(&restored, "tsc_offset") == 0 {
        println!("skipped: guests here read the host's TSC");
    } else {
        let [first, second] = [saved, restored].map(|state| by_kvm(&state, "tsc"));
        assert!(
            first < second && (second - first) / khz < 1000,
            "{first} {second}"
        );
        assert!((later - tsc) / khz < 1000, "{tsc} {later}");
    }
    assert!(now - then < 1_000_000_000, "{then} {now}");
}

#[test]
fn a_timers_interrupt_comes_to_a_restored_vcpu() {
    if !rig::small() {
        return;
    }
    let handler = begin().print("tick").tell(7).stay();
    let lapic =
        |at: u64, value: u32| move |program: Program| program.write(0xfee0_0000 + at, value);
    let base = begin().on_interrupt(&handler);
    let base = lapic(0x3e0, 0xb)(base);
    // Once, and again and again: a vector, and a count of bus cycles.
    let count =
        |mode: u32| lapic(0x380, 500_000_000)(lapic(0x320, mode << 17 | 0x40)(base.clone()));
    // RDTSC + 2^30 to IA32_TSC_DEADLINE.
    let deadline = lapic(0x320, 2 << 17 | 0x40)(base.clone()).bytes(&[
        0x0f, 0x31, 0x05, 0, 0, 0, 0x40, 0x83, 0xd2, 0, 0xb9, 0xe0, 6, 0, 0, 0x0f, 0x30,
    ]);
    for (name, program) in [
        ("once", count(0)),
        ("again", count(1)),
        ("deadline", deadline),
    ] {
        let kept = Kept::new(&program.tell(1).wait(), 1);
        let mut machine = kept.machine();
        machine.expect(0, 1);
        let (awake, chip) = machine.save();
        // Asleep it has its mode, too.
        let (stop, _) = machine.run(0, Duration::from_millis(50));
        assert_eq!(stop, Stop::Kicked, "{name}");
        let (asleep, _) = machine.save();
        drop(machine);
        for (stands, vcpus) in [("awake", awake), ("asleep", asleep)] {
            let mut machine = kept.machine();
            machine.restore((&vcpus, &chip)).expect("restored");
            assert_eq!(machine.expect(0, 7), "tick", "{name}, {stands}");
        }
    }
}

#[test]
fn interrupts_come_to_a_restored_vcpu_by_its_io_apic() {
    if !rig::small() {
        return;
    }
    let handler = begin().print("line").tell(7).stay();
    let program = begin().on_interrupt(&handler).route(5).tell(1).wait();
    let kept = Kept::new(&program, 1);
    let mut machine = kept.machine();
    machine.expect(0, 1);
    let mut machine = machine.again(&kept);
    for level in [true, false] {
        machine.vm.set_irq_line(5, level).expect("a line");
    }
    assert_eq!(machine.expect(0, 7), "line");
}

#[test]
fn an_interrupt_that_was_under_way_to_a_saved_machine_comes_to_the_restored_one() {
    if !rig::small() {
        return;
    }
    let handler = begin().print("again\n").power_off();
    let mut program = begin().on_interrupt(&handler).route(10);
    // The entropy device's driver: features, among them VERSION_1, and DRIVER_OK (virtio 1.2, section 3.1.1).
    for (register, value) in [(0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)] {
        program = program.write(0xd000_0000 + register, value);
    }
    let (guest, path) = controlled(Armlet::program(&program.print(FIRST).wait()), &[]);
    let saved = tempfile::tempdir().expect("a folder");
    let folder = saved.path().join("saved");
    done(
        &path,
        &["snapshot", folder.to_str().expect("a path of ours")],
    );
    guest.signal(Signal::KILL);
    // The next one waits for its turn.
    guest.end().assert_signal(Signal::KILL);
    // Whether one is under way nobody can see, so there always is.
    let mut again = Armlet::new().restore(&folder);
    again.expect("again\n");
    again.end().assert_status(0);
}

#[test]
fn a_vcpu_that_waits_for_its_start_is_started_by_one_that_was_restored() {
    if !rig::small() {
        return;
    }
    let second = begin().bytes(&[0xb0, 9, 0xe6, POST]).sleep();
    let program = begin().tell(1).start_second_at(&second).tell(2).stay();
    let kept = Kept::new(&program, 2);
    let mut machine = kept.machine();
    machine.expect(0, 1);
    assert_eq!(machine.run(1, Duration::from_millis(20)).0, Stop::Kicked);
    let mut machine = machine.again(&kept);
    machine.expect(0, 2);
    // Once more between INIT and its first instruction.
    let mut machine = machine.again(&kept);
    machine.expect(1, 9);
}

#[test]
fn states_that_no_machine_here_can_have_are_refused_in_a_line() {
    if !rig::small() {
        return;
    }
    let kept = Kept::new(&begin().tell(1).stay(), 2);
    let mut machine = kept.machine();
    machine.expect(0, 1);
    let (vcpus, chip) = machine.save();
    let refused = |vcpus: &[VcpuState], chip: &ChipState| {
        let said = kept
            .machine()
            .restore((vcpus, chip))
            .err()
            .unwrap_or_default();
        assert!(said.lines().count() <= 1, "{said}");
        said
    };
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut state = open(&vcpus[0]);
        change(&mut state);
        refused(&[close(state), vcpus[1].clone()], &chip)
    };
    let bytes = |count: usize| Value::Array(vec![Value::from(0); count]);
    for (what, said) in [
        (refused(&vcpus[..1], &chip), "the states of 1 vCPUs"),
        (refused(&[], &chip), "the states of 0 vCPUs"),
    ] {
        assert!(what.contains(said), "{what}");
    }
    for (change, said) in [
        (
            (&|state: &mut Value| state["xsave"] = bytes(4092)) as &dyn Fn(&mut Value),
            "its vector registers has 4092 bytes",
        ),
        (
            &|state| state["xsave"] = bytes(1 << 20),
            "its vector registers has 1048576 bytes",
        ),
        (
            // A component that there is not: bit 62 of XSTATE_BV.
            &|state| state["xsave"][512 + 7] = Value::from(0x40),
            "KVM refuses its vector registers",
        ),
        (
            &|state| state["registers"] = bytes(3),
            "its registers has 3 bytes, not 144",
        ),
        (
            &|state| state["system"] = bytes(0),
            "its system registers has 0 bytes",
        ),
        (
            &|state| state["lapic"] = bytes(1025),
            "its local APIC has 1025 bytes, not 1024",
        ),
        (
            &|state| state["msrs"] = to_value([(0x1234_5678, 1)]).expect("a value"),
            "its MSR 0x12345678 is 0x1,",
        ),
        (
            // One of Intel's that KVM knows and never lists: IA32_APIC_BASE.
            &|state| state["msrs"] = to_value([(0x1b, 1)]).expect("a value"),
            "its MSR 0x1b is 0x1,",
        ),
        (
            &|state| state["msrs"] = to_value([(0x2ff, 0x3f)]).expect("a value"),
            "KVM refuses the value 0x3f of its MSR 0x2ff",
        ),
        (
            &|state| state["msrs"] = to_value(vec![(0x277, 0); 5000]).expect("a value"),
            "it has 5000 MSRs",
        ),
        (
            &|state| state["tsc_khz"] = Value::from(1),
            "its TSC runs at 1 kHz, this host's at",
        ),
        (
            &|state| {
                let leaf = state["cpuid"][0].clone();
                state["cpuid"] = Value::Array(vec![leaf; 5000]);
            },
            "its CPUID has 5000 leaves",
        ),
        (
            &|state| {
                let leaves = state["cpuid"].as_array_mut().expect("leaves");
                let leaf = leaves.iter_mut().find(|leaf| leaf[0] == 7 && leaf[1] == 0);
                leaf.expect("leaf 7")[4] = Value::from(u32::MAX);
            },
            "this host's CPU lacks ",
        ),
    ] {
        let told = changed(change);
        assert!(told.contains(said), "{said}: {told}");
        assert!(told.contains("vCPU 0"), "{told}");
    }
    let mut none = open(&chip);
    none["controllers"] = Value::Array(Vec::new());
    let said = refused(&vcpus, &close(none));
    assert!(said.contains("0 interrupt controllers of KVM"), "{said}");
    let mut short = open(&chip);
    short["controllers"][2] = bytes(100);
    let said = refused(&vcpus, &close(short));
    assert!(said.contains("I/O APIC has 100 bytes"), "{said}");
    kept.machine().restore((&vcpus, &chip)).expect("valid");
}

#[test]
fn nothing_in_a_state_makes_armlet_panic() {
    if !rig::small() {
        return;
    }
    if !rig::virtualizes() {
        println!("skipped: KVM without the CPU's help is for guests that are well-behaved");
        return;
    }
    let handler = begin().tell(7).stay();
    let program = begin().on_interrupt(&handler).start_timer().tell(1).wait();
    let kept = Kept::new(&program, 2);
    let mut machine = kept.machine();
    machine.expect(0, 1);
    let state = postcard::to_allocvec(&machine.save()).expect("bytes");
    drop(machine);
    let (mut unread, mut refused, mut taken) = (0, 0, 0);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize % below
    };
    for _ in 0..400 {
        let mut bytes = state.clone();
        for _ in 0..=next(3) {
            bytes[next(state.len())] ^= 1 << next(8);
        }
        if next(10) == 0 {
            bytes.truncate(next(state.len()));
        }
        let Ok((vcpus, chip)) = postcard::from_bytes::<(Vec<VcpuState>, ChipState)>(&bytes) else {
            unread += 1;
            continue;
        };
        let mut machine = kept.machine();
        match machine.restore((&vcpus, &chip)) {
            Err(said) => {
                assert_eq!(said.lines().count(), 1, "{said}");
                refused += 1;
            }
            Ok(()) => {
                machine.run_whatever_comes();
                taken += 1;
            }
        }
    }
    println!("{unread} unread, {refused} refused, {taken} taken");
    assert!(unread > 0 && refused > 0 && taken > 0);
}
