//! A machine's vCPUs and interrupt controller that are saved, dropped, and restored in another machine with the
//! same memory: the guest goes on.

use crate::rig;
use crate::software::{Image, Program};
use armlet::cli::Command;
use armlet::cli::{Parsed, parse};
use armlet::commands::run_options;
use armlet::kvm::{HostArch, KvmArch};
use armlet::machine::{self, Machine, StateOf, Wires};
use armlet::run::RunOptions;
use armlet::sandbox::{Mode, Sandbox};
use armlet::vcpu::VcpuEvent;
use armlet::{decide, memory};
use armlet_arch::Plan;
use armlet_arch::aarch64::registers::{
    PHYSICAL_COUNTER, Registers, VECTOR_LENGTHS, VIRTUAL_COUNTER,
};
use armlet_devices::sync::lock;
use serde_json::{Value, json};
use std::fs;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

type State = StateOf<HostArch>;
type VcpuState = <HostArch as KvmArch>::VcpuState;
type ChipState = <HostArch as KvmArch>::ChipState;

const MIDR_EL1: u64 = 0x6030_0000_0013_c000;
const ID_AA64ISAR2_EL1: u64 = 0x6030_0000_0013_c032;

const LIMIT: Duration = Duration::from_secs(60);

/// What the guest does on its vCPUs. Each fills registers with values of its own: floating point, SVE and
/// pointer authentication where it has them, a breakpoint, TPIDR_EL0. Its timer interrupts it 64 times a
/// second. It prints `!` where a register is not as it was, and `<` where the counter went back.
///
/// The first turns on the second, which sleeps and checks when it wakes, and the third, which goes off. With
/// its interrupts masked it waits until its timer has expired, and prints `P`. When it reads a character it
/// takes that interrupt, and prints `t`. From then on it checks, and prints each character that it reads after
/// both vCPUs were interrupted again. After a `q` it turns the third vCPU on again, which prints `o` and goes
/// off, and powers off.
#[rustfmt::skip]
const CODE: [u32; 202] = [
    // _start: mov x20, #0x9000000; mov w5, #0x301; str w5, [x20, #48]; mrs x28, mpidr_el1; and x28,
    // x28, #0xff; mov x5, #0x330000; msr cpacr_el1, x5
    0xd2a1_2014, 0x5280_6025, 0xb900_3285, 0xd538_00bc, 0x9240_1f9c, 0xd2a0_0665, 0xd518_1045,
    // isb; adr x5, vectors; msr vbar_el1, x5; isb; add x21, x28, #0x123; fmov d8, x21; msr tpidr_el0,
    // x21
    0xd503_3fdf, 0x1000_3705, 0xd518_c005, 0xd503_3fdf, 0x9104_8f95, 0x9e67_02a8, 0xd51b_d055,
    // lsl x5, x21, #4; msr dbgbvr0_el1, x5; mrs x5, id_aa64pfr0_el1; ubfx x27, x5, #24, #4; ubfx x22,
    // x5, #32, #4; cbz x22, nosve; mov x5, #0xf
    0xd37c_eea5, 0xd510_0085, 0xd538_0405, 0xd358_6cbb, 0xd360_8cb6, 0xb400_0116, 0xd280_01e5,
    // msr zcr_el1, x5; isb; mov z9.d, x21; add z9.d, z9.d, #5; ptrue p3.b; rdvl x23, #1
    0xd518_1205, 0xd503_3fdf, 0x05e0_3aa9, 0x25e0_c0a9, 0x2518_e3e3, 0x04bf_5037,
    // nosve: mrs x5, id_aa64isar1_el1; ubfx x24, x5, #4, #8; mrs x5, id_aa64isar2_el1; ubfx x5, x5,
    // #12, #4; orr x24, x24, x5; cbz x24, nopauth; msr apiakeylo_el1, x21
    0xd538_0625, 0xd344_2cb8, 0xd538_0645, 0xd34c_3ca5, 0xaa05_0318, 0xb400_0138, 0xd518_2115,
    // msr apiakeyhi_el1, x21; mrs x5, sctlr_el1; orr x5, x5, #0x80000000; msr sctlr_el1, x5; isb; adr
    // x25, _start; pacia x25, x21
    0xd518_2135, 0xd538_1005, 0xb261_00a5, 0xd518_1005, 0xd503_3fdf, 0x10ff_fb39, 0xdac1_02b9,
    // nopauth: mov x5, #0x8000000; mov w7, #0x8000000; cbz x27, gic2; mov w6, #0x12; str w6, [x5]; mov
    // x5, #0x80a0000; add x5, x5, x28, lsl #17
    0xd2a1_0005, 0x52a1_0007, 0xb400_025b, 0x5280_0246, 0xb900_00a6, 0xd2a1_0145, 0x8b1c_44a5,
    // str wzr, [x5, #20]; add x5, x5, #0x10, lsl #12; mov w6, #0xffffffff; str w6, [x5, #128]; str w7,
    // [x5, #256]; mov x6, #0x1; msr icc_sre_el1, x6
    0xb900_14bf, 0x9140_40a5, 0x1280_0006, 0xb900_80a6, 0xb901_00a7, 0xd280_0026, 0xd518_cca6,
    // isb; mov x5, #0xf0; msr icc_pmr_el1, x5; msr icc_igrpen1_el1, x6; isb; b ready
    0xd503_3fdf, 0xd280_1e05, 0xd518_4605, 0xd518_cce6, 0xd503_3fdf, 0x1400_0008,
    // gic2: mov w6, #0x1; str w7, [x5, #256]; str w6, [x5]; mov x5, #0x8010000; mov w7, #0xf0; str w7,
    // [x5, #4]; str w6, [x5]
    0x5280_0026, 0xb901_00a7, 0xb900_00a6, 0xd2a1_0025, 0x5280_1e07, 0xb900_04a7, 0xb900_00a6,
    // ready: mov x26, #0x0; mrs x5, cntvct_el0; add x5, x5, #0x1, lsl #12; msr cntv_cval_el0, x5; mov
    // x5, #0x1; msr cntv_ctl_el0, x5; isb
    0xd280_001a, 0xd53b_e045, 0x9140_04a5, 0xd51b_e345, 0xd280_0025, 0xd51b_e325, 0xd503_3fdf,
    // adr x18, shared; cbz x28, first; msr daifclr, #0x2
    0x1000_0ff2, 0xb400_00dc, 0xd503_42ff,
    // second: wfi; bl check; str x26, [x18]; b second
    0xd503_207f, 0x9400_004b, 0xf900_025a, 0x17ff_fffd,
    // first: mov x1, #0x1; adr x2, _start; bl on; mov x1, #0x2; adr x2, third; bl on; bl isoff
    0xd280_0021, 0x10ff_f5a2, 0x9400_0032, 0xd280_0041, 0x1000_0822, 0x9400_002f, 0x9400_0034,
    // expired: mrs x5, cntv_ctl_el0; tbz w5, #2, expired; mov w5, #0x50; str w5, [x20]
    0xd53b_e325, 0x3617_ffe5, 0x5280_0a05, 0xb900_0285,
    // silent: mov w5, #0x10; str w5, [x20, #56]; ldr w5, [x20, #24]; tbnz w5, #4, silent; ldr w5,
    // [x20]; msr daifclr, #0x2
    0x5280_0205, 0xb900_3a85, 0xb940_1a85, 0x3727_ffa5, 0xb940_0285, 0xd503_42ff,
    // taken: cbz x26, taken; mov w5, #0x74; str w5, [x20]; mrs x19, cntvct_el0
    0xb400_001a, 0x5280_0e85, 0xb900_0285, 0xd53b_e053,
    // turn: isb; mrs x5, cntvct_el0; cmp x5, x19; b.cc back; mov x19, x5; bl check; mov w5, #0x10
    0xd503_3fdf, 0xd53b_e045, 0xeb13_00bf, 0x5400_0323, 0xaa05_03f3, 0x9400_002e, 0x5280_0205,
    // str w5, [x20, #56]; ldr w5, [x20, #24]; tbnz w5, #4, turn; ldr w8, [x20]; mov x6, x26; ldr x7,
    // [x18]
    0xb900_3a85, 0xb940_1a85, 0x3727_fee5, 0xb940_0288, 0xaa1a_03e6, 0xf940_0247,
    // own: cmp x26, x6; b.eq own
    0xeb06_035f, 0x54ff_ffe0,
    // other: ldr x5, [x18]; cmp x5, x7; b.eq other; str w8, [x20]; cmp w8, #0x71; b.ne turn; mov x1,
    // #0x2
    0xf940_0245, 0xeb07_00bf, 0x54ff_ffc0, 0xb900_0288, 0x7101_c51f, 0x54ff_fd81, 0xd280_0041,
    // adr x2, again; bl on; bl isoff; mov x0, #0x84000000; movk x0, #0x8; hvc #0x0
    0x1000_02e2, 0x9400_0008, 0x9400_000d, 0xd2b0_8000, 0xf280_0100, 0xd400_0002,
    // back: mov w5, #0x3c; str w5, [x20]; b back+0x8
    0x5280_0785, 0xb900_0285, 0x1400_0000,
    // on: mov x0, #0xc4000000; movk x0, #0x3; mov x3, #0x0; hvc #0x0; cbnz x0, fail; ret
    0xd2b8_8000, 0xf280_0060, 0xd280_0003, 0xd400_0002, 0xb500_0560, 0xd65f_03c0,
    // isoff: mov x0, #0xc4000000; movk x0, #0x4; mov x1, #0x2; mov x2, #0x0; hvc #0x0; cmp x0, #0x1;
    // b.ne isoff
    0xd2b8_8000, 0xf280_0080, 0xd280_0041, 0xd280_0002, 0xd400_0002, 0xf100_041f, 0x54ff_ff41,
    // ret
    0xd65f_03c0,
    // again: mov x20, #0x9000000; mov w5, #0x6f; str w5, [x20]
    0xd2a1_2014, 0x5280_0de5, 0xb900_0285,
    // third: mov x0, #0x84000000; movk x0, #0x2; hvc #0x0
    0xd2b0_8000, 0xf280_0040, 0xd400_0002,
    // check: fmov x5, d8; cmp x5, x21; b.ne fail; mrs x5, tpidr_el0; cmp x5, x21; b.ne fail; mrs x5,
    // dbgbvr0_el1
    0x9e66_0105, 0xeb15_00bf, 0x5400_0321, 0xd53b_d045, 0xeb15_00bf, 0x5400_02c1, 0xd530_0085,
    // cmp x21, x5, lsr #4; b.ne fail; cbz x22, check+0x50; rdvl x5, #1; cmp x5, x23; b.ne fail; cntp
    // x5, p3, p3.b
    0xeb45_12bf, 0x5400_0261, 0xb400_0176, 0x04bf_5025, 0xeb17_00bf, 0x5400_01e1, 0x2520_8c65,
    // cmp x5, x23; b.ne fail; lastb x5, p3, z9.d; sub x5, x5, #0x5; cmp x5, x21; b.ne fail; cbz x24,
    // check+0x68
    0xeb17_00bf, 0x5400_0181, 0x05e1_ad25, 0xd100_14a5, 0xeb15_00bf, 0x5400_0101, 0xb400_00d8,
    // mov x5, x25; autia x5, x21; adr x13, _start; cmp x5, x13; b.ne fail; ret
    0xaa19_03e5, 0xdac1_12a5, 0x10ff_e9ed, 0xeb0d_00bf, 0x5400_0041, 0xd65f_03c0,
    // fail: mov w5, #0x21; str w5, [x20]; b fail+0x8
    0x5280_0425, 0xb900_0285, 0x1400_0000,
    // irq: mov x10, #0x8010000; cbz x27, irq+0x10; mrs x9, icc_iar1_el1; b irq+0x14; ldr w9, [x10,
    // #12]; mrs x11, cntfrq_el0; lsr x11, x11, #6
    0xd2a1_002a, 0xb400_007b, 0xd538_cc09, 0x1400_0002, 0xb940_0d49, 0xd53b_e00b, 0xd346_fd6b,
    // mrs x12, cntvct_el0; add x12, x12, x11; msr cntv_cval_el0, x12; isb; add x26, x26, #0x1; cbz
    // x27, irq+0x3c; msr icc_eoir1_el1, x9
    0xd53b_e04c, 0x8b0b_018c, 0xd51b_e34c, 0xd503_3fdf, 0x9100_075a, 0xb400_007b, 0xd518_cc29,
    // eret; str w9, [x10, #16]; eret; nop
    0xd69f_03e0, 0xb900_1149, 0xd69f_03e0, 0xd503_201f,
];

/// Where its vectors are, behind the image's headers of 0x100 bytes, and that of an IRQ: b irq.
const VECTORS: usize = 0x700 / 4;
const IRQ: (usize, u32) = (0x980 / 4, 0x17ff_fe58);

struct Setup {
    options: RunOptions<HostArch>,
    plan: Plan<HostArch>,
    memory: Arc<GuestMemoryMmap>,
}

impl Setup {
    fn new(cpus: usize) -> Setup {
        let mut code = CODE.to_vec();
        code.resize(VECTORS, 0);
        code.resize(IRQ.0 + 1, 0);
        code[IRQ.0] = IRQ.1;
        let folder = tempfile::tempdir().expect("a folder");
        let kernel = folder.path().join("guest");
        let mut image = Image::default().holding(&Program::of(code));
        image.resize(1 << 20, 0);
        fs::write(&kernel, image).expect("a kernel");
        let line = format!(
            "run --kernel {} --cpus {cpus} --memory 128M --board virt --sandbox off --rng off",
            kernel.display()
        );
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        let Parsed::Cli(cli, devices) = parse(&words) else {
            panic!("{line}");
        };
        let Some(Command::Run(run)) = cli.command else {
            panic!("{line}");
        };
        let options = run_options(&run, &devices).expect("options");
        let board = &options.config.board;
        let plan = decide::decide(&options.config, &options.host, board).expect("a plan");
        let (ram, backing) = (&plan.layout.ram, options.config.backing);
        let memory = memory::map(ram, memory::Sharing::Private, backing, None);
        Setup {
            memory: Arc::new(memory.expect("memory")),
            options,
            plan,
        }
    }

    fn assemble(&self, saved: &[VcpuState]) -> Guest {
        let (printed, output) = channel();
        let wires = Wires {
            output: Box::new(move |bytes: &[u8]| {
                // The test may have ended.
                for byte in bytes {
                    let _ = printed.send(*byte);
                }
            }),
            on_room: Box::new(|| {}),
            on_burst: Box::new(|| {}),
            on_deadline: Box::new(|| {}),
            stopping: Arc::default(),
        };
        let sandbox = Arc::new(Sandbox::new(Mode::Off, Vec::new()));
        let kvm = &self.options.kvm;
        let machine = machine::assemble(kvm, &self.plan, &self.memory, &[], wires, &sandbox, saved);
        Guest {
            machine: machine.expect("a machine"),
            output,
            events: channel().1,
        }
    }

    fn boot(&self) -> Guest {
        let mut guest = self.assemble(&[]);
        let kernel = self.options.config.kernel.as_ref();
        let loaded = guest.machine.load(&self.memory, &self.plan, kernel, None);
        loaded.expect("loaded");
        guest.start();
        guest
    }

    /// A machine that was restored, and is paused.
    fn restore(&self, state: &State) -> anyhow::Result<Guest> {
        let mut guest = self.assemble(&state.vcpus);
        guest.machine.restore(state)?;
        guest.start();
        Ok(guest)
    }

    /// The state of a machine that has not run.
    fn fresh(&self) -> State {
        let mut guest = self.assemble(&[]);
        guest.start();
        guest.pause();
        let state = guest.save();
        guest.end();
        state
    }
}

struct Guest {
    machine: Machine<HostArch>,
    output: Receiver<u8>,
    events: Receiver<VcpuEvent>,
}

impl Guest {
    fn start(&mut self) {
        let (told, events) = channel();
        self.events = events;
        let tell = || {
            let told = told.clone();
            move |event| drop(told.send(event))
        };
        let everywhere = |_| Vec::new();
        let started = self.machine.start("vcpu", everywhere, None, tell);
        started.expect("started");
    }

    /// What the guest prints next.
    fn next(&self) -> char {
        let serial = self.machine.devices.serial.as_ref().expect("a UART");
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(byte) = self.output.recv_timeout(Duration::from_millis(5)) {
                return byte.into();
            }
            let _ = lock(serial).flush();
            assert!(
                Instant::now() < deadline,
                "nothing is printed: {}",
                self.positions()
            );
        }
    }

    fn send(&self, text: &str) {
        let serial = self.machine.devices.serial.as_ref().expect("a UART");
        let deadline = Instant::now() + LIMIT;
        while lock(serial).receive(text.as_bytes()).0 < text.len() {
            assert!(
                Instant::now() < deadline,
                "'{text}' is not read: {}",
                self.positions()
            );
            sleep(Duration::from_millis(5));
        }
    }

    /// Where its vCPUs are.
    fn positions(&self) -> String {
        let (sent, received) = channel();
        for index in 0..self.machine.vcpus.count() {
            let sent = sent.clone();
            let tell = move |vcpu: &mut _| drop(sent.send((index, HostArch::position(vcpu))));
            let _ = self.machine.vcpus.ask(index, tell);
        }
        let all = (0..self.machine.vcpus.count()).map(|_| received.recv_timeout(LIMIT));
        format!(
            "{:?} {:?}",
            all.collect::<Vec<_>>(),
            self.events.try_iter().collect::<Vec<_>>()
        )
    }

    fn pause(&self) {
        self.machine.pause(LIMIT).expect("paused");
    }

    fn resume(&self) {
        self.machine.resume();
    }

    /// The state of a paused machine.
    fn save(&self) -> State {
        self.machine.save().expect("a state").0
    }

    fn end(mut self) {
        self.machine.stop(LIMIT).expect("stopped");
        self.machine.vcpus.join();
    }
}

fn registers(vcpu: &VcpuState) -> Registers {
    let state = serde_json::to_value(vcpu).expect("JSON");
    serde_json::from_value(state["registers"].clone()).expect("registers")
}

/// A state with another value of a register, if it has that.
fn with(vcpu: &VcpuState, register: u64, value: u64) -> VcpuState {
    let mut state = serde_json::to_value(vcpu).expect("JSON");
    let all = registers(vcpu);
    let before = all.iter().take_while(|(id, _)| *id != register);
    let at: usize = before.map(|(_, words)| words.len()).sum();
    if all.word(register).is_some() {
        state["registers"]["words"][at] = json!(value);
    }
    serde_json::from_value(state).expect("a state")
}

/// A state without what time changes.
fn timeless(vcpu: &VcpuState) -> VcpuState {
    let mut vcpu = vcpu.clone();
    for counter in [VIRTUAL_COUNTER, PHYSICAL_COUNTER] {
        vcpu = with(&vcpu, counter, 0);
    }
    // CNTV_CTL_EL0.ISTATUS and CNTP_CTL_EL0.ISTATUS.
    for control in [0x6030_0000_0013_df19, 0x6030_0000_0013_df11] {
        let value = registers(&vcpu).word(control).unwrap_or(0);
        vcpu = with(&vcpu, control, value & !4);
    }
    vcpu
}

fn counter(vcpus: &[VcpuState]) -> u64 {
    let counters = vcpus
        .iter()
        .map(|vcpu| registers(vcpu).word(VIRTUAL_COUNTER));
    counters.max().flatten().expect("a counter")
}

fn assert_same(one: &[VcpuState], other: &[VcpuState]) {
    assert_eq!(one.len(), other.len());
    for (index, (one, other)) in one.iter().zip(other).enumerate() {
        let (one, other) = (timeless(one), timeless(other));
        let (first, second) = (registers(&one), registers(&other));
        let differ = first.iter().zip(second.iter());
        let differ: Vec<_> = differ.filter(|(a, b)| a != b).collect();
        assert!(differ.is_empty(), "vCPU {index}: {differ:x?}");
        assert_eq!(one, other, "vCPU {index}");
    }
}

#[test]
fn a_guest_goes_on_in_a_machine_that_got_its_state() {
    if rig::any().is_none() {
        return;
    }
    let setup = Setup::new(4);
    let guest = setup.boot();
    assert_eq!(guest.next(), 'P');
    guest.pause();
    let mut state = guest.save();
    guest.end();
    let frequency = serde_json::to_value(&state.chip).expect("JSON")["frequency"].as_u64();
    let frequency = frequency.expect("a frequency");
    for (turn, text) in ["1", "2", "q"].into_iter().enumerate() {
        // Time that the guest must not see.
        sleep(Duration::from_secs(4));
        let guest = setup.restore(&state).expect("restored");
        let again = guest.save();
        assert_same(&state.vcpus, &again.vcpus);
        assert_eq!(state.chip, again.chip);
        let passed = counter(&again.vcpus).wrapping_sub(counter(&state.vcpus));
        assert!(passed < 3 * frequency, "{passed} ticks of {frequency} Hz");
        guest.resume();
        if turn == 0 {
            // Its interrupt was pending.
            guest.send("g");
            assert_eq!(guest.next(), 't');
        }
        guest.send(text);
        assert_eq!(guest.next().to_string(), text);
        if text == "q" {
            assert_eq!(guest.next(), 'o');
            let is_end = |event: &VcpuEvent| *event == VcpuEvent::PowerOff;
            let deadline = Instant::now() + LIMIT;
            while !guest.events.try_iter().any(|event| is_end(&event)) {
                assert!(Instant::now() < deadline, "it does not power off");
                sleep(Duration::from_millis(5));
            }
        } else {
            guest.pause();
            state = guest.save();
        }
        guest.end();
    }
}

/// The states that Linux 6.1 gave of this guest on 3 vCPUs, when it had printed `P`, and that CPU.
const BY_LINUX_6_1: &str = include_str!("../states/linux-6.1-max.json");

#[test]
fn a_guest_that_an_older_kernel_saved_goes_on_by_a_newer_one() {
    if rig::main().is_none() {
        return;
    }
    let setup = Setup::new(3);
    let mut state = setup.fresh();
    let saved: Value = serde_json::from_str(BY_LINUX_6_1).expect("JSON");
    let vcpus: Vec<VcpuState> = serde_json::from_value(saved["vcpus"].clone()).expect("vCPUs");
    let identity = |vcpu: &VcpuState| registers(vcpu).word(MIDR_EL1);
    if identity(&vcpus[0]) != identity(&state.vcpus[0]) {
        println!("skipped: this host has another CPU");
        return;
    }
    // FEAT_MOPS and others, which this kernel would give, and the guest does not know.
    let features = |state: &State| registers(&state.vcpus[0]).word(ID_AA64ISAR2_EL1);
    let offered = features(&state);
    // All that the guest keeps in memory is how often its second vCPU woke.
    let mut loaded = setup.assemble(&[]);
    let kernel = setup.options.config.kernel.as_ref();
    let done = loaded
        .machine
        .load(&setup.memory, &setup.plan, kernel, None);
    done.expect("loaded");
    drop(loaded);
    state.vcpus = vcpus;
    state.chip = serde_json::from_value(saved["chip"].clone()).expect("a GIC");
    let guest = setup.restore(&state).expect("restored");
    let again = guest.save();
    assert_ne!(offered, features(&state));
    assert_eq!(features(&again), features(&state));
    assert!(counter(&again.vcpus) >= counter(&state.vcpus));
    guest.resume();
    for (sent, printed) in [("g", 't'), ("1", '1'), ("2", '2')] {
        guest.send(sent);
        assert_eq!(guest.next(), printed);
    }
    guest.end();
}

#[test]
fn vectors_are_as_short_as_the_guest_knows_them() {
    if rig::any().is_none() {
        return;
    }
    let setup = Setup::new(1);
    let vcpu = &setup.fresh().vcpus[0];
    let Some(all) = registers(vcpu).word(VECTOR_LENGTHS) else {
        println!("skipped: this host has no SVE");
        return;
    };
    assert!(all > 1, "{all:#x}");
    // Vectors of 128 bits.
    let short = with(vcpu, VECTOR_LENGTHS, 1);
    let mut guest = setup.assemble(&[short]);
    guest.start();
    guest.pause();
    let saved = guest.save();
    assert_eq!(registers(&saved.vcpus[0]).word(VECTOR_LENGTHS), Some(1));
    guest.end();
    let again = setup.restore(&saved).expect("restored");
    assert_same(&saved.vcpus, &again.save().vcpus);
    again.end();
}

#[test]
fn states_that_are_not_valid_are_refused_in_a_line() {
    if rig::any().is_none() {
        return;
    }
    let setup = Setup::new(2);
    let fresh = setup.fresh();
    let (vcpus, chip) = (fresh.vcpus.clone(), fresh.chip.clone());
    let refused = |vcpus: &[VcpuState], chip: &ChipState, text: &str| {
        let mut state = fresh.clone();
        (state.vcpus, state.chip) = (vcpus.to_vec(), chip.clone());
        let Err(error) = setup.restore(&state) else {
            panic!("{text}: restored");
        };
        let error = format!("{error:#}");
        println!("{error}");
        assert!(error.contains(text) && !error.contains('\n'), "{error}");
    };
    let chip_with = |change: &dyn Fn(&mut Value)| {
        let mut state = serde_json::to_value(&chip).expect("JSON");
        change(&mut state);
        serde_json::from_value::<ChipState>(state).expect("a state")
    };
    refused(
        &vcpus[..1],
        &chip,
        "states of 1 vCPUs, and the machine has 2",
    );
    refused(
        &[vcpus[1].clone(), vcpus[0].clone()],
        &chip,
        "its MPIDR_EL1 is",
    );
    refused(
        &vcpus,
        &chip_with(&|chip| chip["frequency"] = json!(1)),
        "counts 1 Hz",
    );
    let other = |chip: &mut Value| chip["gic"]["interrupts"] = json!(992);
    refused(&vcpus, &chip_with(&other), "992 interrupts");
    let other = |chip: &mut Value| {
        chip["gic"]["version"] = json!(5 - chip["gic"]["version"].as_u64().expect("a version"));
    };
    refused(&vcpus, &chip_with(&other), "the state of a GICv");
    let other = |chip: &mut Value| chip["gic"]["values"] = json!([1, 2, 3]);
    refused(&vcpus, &chip_with(&other), "3 registers of the GIC");
    // The guest has features that no host has: FEAT_RNG and LSE as never before, another core.
    let feature = |id: u64, value: u64| {
        let change = |vcpu| with(vcpu, id, value);
        vcpus.iter().map(change).collect::<Vec<_>>()
    };
    let isar0 = registers(&vcpus[0])
        .word(0x6030_0000_0013_c030)
        .expect("ID_AA64ISAR0_EL1");
    refused(
        &feature(0x6030_0000_0013_c030, isar0 | 0xf << 20),
        &chip,
        "FEAT_LSE: ID_AA64ISAR0_EL1.Atomic is ",
    );
    // PSTATE of EL3.
    refused(
        &feature(0x6030_0000_0010_0042, 0xd),
        &chip,
        "core register 0x42",
    );
    let mut cut = serde_json::to_value(&vcpus[0]).expect("JSON");
    cut["registers"]["words"]
        .as_array_mut()
        .expect("words")
        .pop();
    let cut = serde_json::from_value(cut).expect("a state");
    refused(&[cut, vcpus[1].clone()], &chip, "words of registers");
}
