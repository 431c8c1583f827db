//! The device tree of an ARM64 machine. Each function cites the binding that it follows, below
//! Documentation/devicetree/bindings/ of Linux or in dt-schema.

mod cpus;
mod pci;

use super::features::{Features, Pmu};
use super::gic::Gic;
use super::{Aarch64, Vcpu, boot};
use crate::arch::{Layout, Plan, Request};
use crate::board::Board;
use crate::irq::Spi;
use crate::machine::{DeviceKind, POWER_KEY_LINE, Placed, PlacedGeneration};
use crate::pci::Msi;
use crate::range::Range;
use armlet_fdt::{Cell, Node};

const GIC: u32 = 1;
const CLOCK: u32 = 2;
const GPIO: u32 = 3;

/// KEY_POWER (include/uapi/linux/input-event-codes.h).
const KEY_POWER: u32 = 116;

/// Interrupt flags (arm,gic.yaml): edge, rising; level, active high.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// Returns the device tree of a planned machine as a value, for printing.
#[must_use]
pub fn device_tree(board: &Board, plan: &Plan<Aarch64>, request: &Request<Aarch64>) -> Node {
    build(board, &plan.layout, &plan.vcpus, &plan.features, request)
}

pub(super) fn build(
    board: &Board,
    layout: &Layout<Aarch64>,
    vcpus: &[Vcpu],
    features: &Features,
    request: &Request<Aarch64>,
) -> Node {
    let mut root = Node::new("");
    root.prop("#address-cells", 2_u32)
        .prop("#size-cells", 2_u32)
        .prop("interrupt-parent", Cell::Phandle(GIC))
        // All devices access memory through the host's caches. Each inherits the property,
        // including AMBA devices, for which Linux otherwise warns where a cache's write-back
        // granule is larger than 128 bytes (arch/arm64/mm/dma-mapping.c: arch_setup_dma_ops).
        .prop("dma-coherent", ())
        .prop("compatible", "linux,dummy-virt")
        .prop("model", format!("armlet,{}", board.name).as_str());
    chosen(&mut root, layout, request);
    if let Some(console) = console(layout) {
        root.child("aliases")
            .prop("serial0", format!("/{}", serial_name(console)).as_str());
    }
    cpus::cpus(&mut root, vcpus, &request.topology);
    for bank in &layout.ram {
        memory(&mut root, *bank);
    }
    let stolen_time = boot::stolen_time(&layout.payload, request).filter(|_| features.steal_time);
    let reserved = [
        ("stolen-time", stolen_time),
        ("vmgenid", layout.generation.map(|placed| placed.memory())),
    ];
    reserved_memory(&mut root, reserved);
    psci(&mut root);
    timer(&mut root, &layout.irqchip, vcpus.len());
    if let Some(counters) = &features.pmu {
        pmu(&mut root, &layout.irqchip, vcpus.len(), counters);
    }
    gic(
        &mut root,
        &layout.irqchip,
        layout.pci.as_ref().map(|pci| pci.msi),
    );
    clock(&mut root);
    for device in &layout.devices {
        match device.kind {
            DeviceKind::Pl011 => pl011(&mut root, device),
            DeviceKind::Uart16550 => uart16550(&mut root, device),
            DeviceKind::Pl031 => pl031(&mut root, device),
            DeviceKind::Pl061 => {
                let has_power_key = find(layout, DeviceKind::Pl061) == Some(device);
                pl061(&mut root, device, has_power_key);
            }
            DeviceKind::VirtioMmio { .. } => virtio_mmio(&mut root, device),
        }
    }
    if let Some(placed) = &layout.pci {
        pci::bridge(&mut root, placed);
    }
    if let Some(placed) = &layout.generation {
        generation(&mut root, placed);
    }
    root
}

fn find(layout: &Layout<Aarch64>, kind: DeviceKind) -> Option<&Placed> {
    layout.devices.iter().find(|device| device.kind == kind)
}

/// Returns the serial console: no board has two.
fn console(layout: &Layout<Aarch64>) -> Option<&Placed> {
    find(layout, DeviceKind::Pl011).or_else(|| find(layout, DeviceKind::Uart16550))
}

fn reg(ranges: impl IntoIterator<Item = Range>) -> Vec<u64> {
    ranges
        .into_iter()
        .flat_map(|range| [range.start(), range.size()])
        .collect()
}

fn spi(spi: Spi, flags: u32) -> [u32; 3] {
    [0, spi.0, flags]
}

/// dt-schema chosen.yaml; drivers/of/fdt.c: early_init_dt_scan_chosen.
fn chosen(root: &mut Node, layout: &Layout<Aarch64>, request: &Request<Aarch64>) {
    let node = root.child("chosen");
    node.prop("bootargs", request.cmdline.as_str());
    if let Some(console) = console(layout) {
        node.prop("stdout-path", format!("/{}", serial_name(console)).as_str());
    }
    if let Some(initrd) = layout.payload.initrd {
        // The end is exclusive.
        node.prop("linux,initrd-start", initrd.start())
            .prop("linux,initrd-end", initrd.end());
    }
    if let Some(seeds) = &request.seeds {
        node.prop("kaslr-seed", seeds.kaslr)
            .prop("rng-seed", &seeds.rng[..]);
    }
}

/// dt-schema memory.yaml.
fn memory(root: &mut Node, bank: Range) {
    root.child(format!("memory@{:x}", bank.start()))
        .prop("device_type", "memory")
        .prop("reg", reg([bank]));
}

/// dt-schema reserved-memory.yaml: what KVM or the VMM writes and the guest maps by itself
/// (arch/arm64/kernel/paravirt.c: init_stolen_time_cpu; ioremap refuses RAM that Linux maps).
fn reserved_memory<const N: usize>(root: &mut Node, areas: [(&str, Option<Range>); N]) {
    if areas.iter().all(|(_, range)| range.is_none()) {
        return;
    }
    let node = root.child("reserved-memory");
    node.prop("#address-cells", 2_u32)
        .prop("#size-cells", 2_u32)
        .prop("ranges", ());
    for (name, range) in areas {
        let Some(range) = range else { continue };
        node.child(format!("{name}@{:x}", range.start()))
            .prop("reg", reg([range]))
            .prop("no-map", ());
    }
}

/// rng/microsoft,vmgenid.yaml and, since Linux 7.0, ptp/amazon,vmclock.yaml. Their drivers share the
/// interrupt (IRQF_SHARED).
fn generation(root: &mut Node, placed: &PlacedGeneration) {
    for (name, compatible, page) in [
        ("rng", "microsoft,vmgenid", placed.id),
        ("ptp", "amazon,vmclock", placed.clock),
    ] {
        root.child(format!("{name}@{:x}", page.start()))
            .prop("compatible", compatible)
            .prop("reg", reg([page]))
            .prop("interrupts", spi(placed.irq, EDGE_RISING));
    }
}

/// arm/psci.yaml.
fn psci(root: &mut Node) {
    root.child("psci")
        .prop("compatible", ["arm,psci-1.0", "arm,psci-0.2"])
        .prop("method", "hvc");
}

/// Returns the cells of a level-triggered PPI. On a GICv2 bits 15:8 hold the mask of CPUs
/// (interrupt-controller/arm,gic.yaml).
fn ppi(number: u32, gic: &Gic, vcpus: usize) -> [u32; 3] {
    let mask = match gic {
        Gic::V2 { .. } => (1_u32 << vcpus.min(8)) - 1,
        Gic::V3 { .. } => 0,
    };
    [1, number, mask << 8 | LEVEL_HIGH]
}

/// arm/pmu.yaml. PPIs are counted from INTID 16 on.
fn pmu(root: &mut Node, gic: &Gic, vcpus: usize, counters: &Pmu) {
    root.child("pmu")
        .prop("compatible", "arm,armv8-pmuv3")
        .prop("interrupts", ppi(counters.intid - 16, gic, vcpus));
}

/// timer/arm,arch_timer.yaml: secure, non-secure, virtual and hypervisor timers, which KVM raises
/// as PPIs 13, 14, 11 and 10 (arch/arm64/kvm/arch_timer.c: default_ppi).
fn timer(root: &mut Node, gic: &Gic, vcpus: usize) {
    let cells: Vec<u32> = [13, 14, 11, 10]
        .into_iter()
        .flat_map(|number| ppi(number, gic, vcpus))
        .collect();
    root.child("timer")
        .prop("compatible", "arm,armv8-timer")
        .prop("interrupts", cells)
        .prop("always-on", ());
}

/// interrupt-controller/arm,gic.yaml and arm,gic-v3.yaml.
fn gic(root: &mut Node, gic: &Gic, msi: Option<Msi>) {
    let (compatible, frames) = match gic {
        Gic::V2 {
            distributor,
            cpu_interface,
            ..
        } => ("arm,cortex-a15-gic", vec![*distributor, *cpu_interface]),
        Gic::V3 {
            distributor,
            redistributors,
            ..
        } => {
            let mut frames = vec![*distributor];
            frames.extend(redistributors.iter().map(|run| run.range));
            ("arm,gic-v3", frames)
        }
    };
    let node = root.child(format!("interrupt-controller@{:x}", frames[0].start()));
    node.prop("compatible", compatible)
        .prop("interrupt-controller", ())
        .prop("#interrupt-cells", 3_u32);
    match msi {
        // Its child's registers are where the machine has them.
        Some(_) => node
            .prop("#address-cells", 2_u32)
            .prop("#size-cells", 2_u32)
            .prop("ranges", ()),
        None => node.prop("#address-cells", 0_u32),
    };
    if frames.len() > 2 {
        node.prop("#redistributor-regions", frames.len() as u32 - 1);
    }
    node.prop("reg", reg(frames)).prop("phandle", GIC);
    if let Some(msi) = msi {
        pci::msi_controller(node, msi);
    }
}

/// clock/fixed-clock.yaml: the clock that the PrimeCell drivers require.
fn clock(root: &mut Node) {
    root.child("apb-pclk")
        .prop("compatible", "fixed-clock")
        .prop("#clock-cells", 0_u32)
        .prop("clock-frequency", 24_000_000_u32)
        .prop("clock-output-names", "clk24mhz")
        .prop("phandle", CLOCK);
}

/// arm/primecell.yaml. The peripheral ID is also in the device's registers; given here, it spares
/// the guest an exit for each of them.
fn primecell<'a>(
    root: &'a mut Node,
    name: String,
    device: &Placed,
    part: &str,
    id: u32,
) -> &'a mut Node {
    root.child(name)
        .prop("compatible", [part, "arm,primecell"])
        .prop("reg", reg([device.window]))
        .prop("interrupts", spi(device.spi, LEVEL_HIGH))
        .prop("arm,primecell-periphid", id)
}

fn serial_name(device: &Placed) -> String {
    format!("serial@{:x}", device.window.start())
}

/// serial/pl011.yaml.
fn pl011(root: &mut Node, device: &Placed) {
    primecell(root, serial_name(device), device, "arm,pl011", 0x0014_1011)
        .prop("clocks", [Cell::Phandle(CLOCK); 2])
        .prop("clock-names", ["uartclk", "apb_pclk"]);
}

/// serial/8250.yaml: registers of a byte, one behind the other. Its interrupt is an edge, which Linux's
/// handler allows for: it asks for further causes until there is none
/// (drivers/tty/serial/8250/8250_core.c: serial8250_interrupt).
fn uart16550(root: &mut Node, device: &Placed) {
    root.child(serial_name(device))
        .prop("compatible", "ns16550a")
        .prop("reg", reg([device.window]))
        .prop("interrupts", spi(device.spi, EDGE_RISING))
        .prop("clocks", Cell::Phandle(CLOCK));
}

/// rtc/arm,pl031.yaml.
fn pl031(root: &mut Node, device: &Placed) {
    let name = format!("rtc@{:x}", device.window.start());
    primecell(root, name, device, "arm,pl031", 0x0014_1031)
        .prop("clocks", Cell::Phandle(CLOCK))
        .prop("clock-names", "apb_pclk");
}

/// gpio/pl061-gpio.yaml and input/gpio-keys.yaml. One machine has one power key.
fn pl061(root: &mut Node, device: &Placed, has_power_key: bool) {
    let name = format!("gpio@{:x}", device.window.start());
    let node = primecell(root, name, device, "arm,pl061", 0x0004_1061);
    node.prop("clocks", Cell::Phandle(CLOCK))
        .prop("clock-names", "apb_pclk")
        .prop("gpio-controller", ())
        .prop("#gpio-cells", 2_u32);
    if !has_power_key {
        return;
    }
    node.prop("phandle", GPIO);
    root.child("gpio-keys")
        .prop("compatible", "gpio-keys")
        .child("power-key")
        .prop("label", "GPIO Key Poweroff")
        .prop("linux,code", KEY_POWER)
        .prop(
            "gpios",
            [
                Cell::Phandle(GPIO),
                Cell::Number(POWER_KEY_LINE),
                Cell::Number(0),
            ],
        );
}

/// virtio/mmio.yaml. Edge-triggered, because an irqfd only ever asserts
/// (virt/kvm/eventfd.c: irqfd_wakeup).
fn virtio_mmio(root: &mut Node, device: &Placed) {
    // No two have one address.
    root.add_child(format!("virtio_mmio@{:x}", device.window.start()))
        .prop("compatible", "virtio,mmio")
        .prop("reg", reg([device.window]))
        .prop("interrupts", spi(device.spi, EDGE_RISING))
        .prop("dma-coherent", ());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::GicChoice;
    use crate::{Arch, Seeds, plan};
    use armlet_fdt::Value;

    const VIRT: &str = include_str!("../../../boards/virt.toml");

    fn request(cpus: u32, gic: GicChoice) -> Request<Aarch64> {
        Request {
            gic,
            cmdline: "console=ttyAMA0 \"quoted\"".to_owned(),
            virtio: vec!["disk0".to_owned(), "rng".to_owned()],
            ..Request::new(cpus, 512 << 20)
        }
    }

    fn tree_of(text: &str, request: &Request<Aarch64>) -> Node {
        let board = Board::parse(text).expect("a valid board");
        let host = super::super::Host {
            gic_v2: true,
            ..Aarch64::assumed_host(&board)
        };
        let plan: Plan<Aarch64> = plan(&board, request, &host).expect("a plan");
        let tree = build(&board, &plan.layout, &plan.vcpus, &plan.features, request);
        assert_eq!(tree.to_dtb(), Ok(plan.blobs[0].bytes.clone()));
        tree
    }

    fn tree(cpus: u32, gic: GicChoice) -> Node {
        tree_of(VIRT, &request(cpus, gic))
    }

    fn get<'a>(tree: &'a Node, path: &[&str], property: &str) -> Option<&'a Value> {
        tree.at(path)
            .unwrap_or_else(|| panic!("no node {path:?}"))
            .get(property)
    }

    fn cells(value: Option<&Value>) -> Vec<u32> {
        match value {
            Some(Value::Cells(cells)) => cells.clone(),
            Some(Value::References(cells)) => cells.iter().map(|cell| cell.number()).collect(),
            other => panic!("{other:?} are no cells"),
        }
    }

    fn text(text: &str) -> Option<Value> {
        Some(Value::from(text))
    }

    #[test]
    fn the_timers_are_level_triggered_and_a_gic_v2_masks_its_cpus() {
        let flags = |cpus, gic| cells(get(&tree(cpus, gic), &["timer"], "interrupts"));
        // PPIs 13, 14, 11 and 10, type 1.
        assert_eq!(
            flags(1, GicChoice::V3),
            [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]
        );
        assert_eq!(flags(4, GicChoice::V2)[..3], [1, 13, 0xf04]);
        assert_eq!(flags(8, GicChoice::V2)[9..], [1, 10, 0xff04]);
    }

    #[test]
    fn performance_counters_raise_ppi_7_where_they_are_given() {
        let flags = |cpus, gic| cells(get(&tree(cpus, gic), &["pmu"], "interrupts"));
        assert_eq!(flags(2, GicChoice::V3), [1, 7, 4]);
        assert_eq!(flags(2, GicChoice::V2), [1, 7, 0x304]);
        let mut without = request(1, GicChoice::V3);
        without.features.pmu = crate::switch::Switch::Off;
        assert!(tree_of(VIRT, &without).at(&["pmu"]).is_none());
    }

    #[test]
    fn stolen_time_lies_behind_the_tree_and_out_of_what_linux_maps() {
        let clocks = ["reserved-memory", "stolen-time@40010000"];
        let tree = tree(3, GicChoice::V3);
        let reg = vec![0x4001_0000_u64, 0x1_0000];
        assert_eq!(get(&tree, &clocks, "reg"), Some(&Value::from(reg)));
        assert!(get(&tree, &clocks, "no-map").is_some());
        let mut without = request(3, GicChoice::V3);
        without.features.steal_time = crate::switch::Switch::Off;
        assert!(tree_of(VIRT, &without).at(&clocks[..1]).is_none());
    }

    #[test]
    fn vmgenid_and_vmclock_have_pages_of_their_own_that_linux_does_not_map() {
        let mut with = request(3, GicChoice::V3);
        with.vmgenid = true;
        let tree = tree_of(VIRT, &with);
        let pages = ["reserved-memory", "vmgenid@40020000"];
        let reg = |path: &[&str]| get(&tree, path, "reg").cloned();
        let value = |range: [u64; 2]| Some(Value::from(range.to_vec()));
        assert_eq!(reg(&pages), value([0x4002_0000, 0x2_0000]));
        assert!(get(&tree, &pages, "no-map").is_some());
        assert!(
            tree.at(&["reserved-memory", "stolen-time@40010000"])
                .is_some()
        );
        for (name, compatible, start) in [
            ("rng@40020000", "microsoft,vmgenid", 0x4002_0000),
            ("ptp@40030000", "amazon,vmclock", 0x4003_0000),
        ] {
            assert_eq!(get(&tree, &[name], "compatible"), text(compatible).as_ref());
            assert_eq!(reg(&[name]), value([start, 0x1_0000]));
            assert_eq!(cells(get(&tree, &[name], "interrupts")), [0, 8, 1]);
        }
        // Stolen time is not needed for that.
        with.features.steal_time = crate::switch::Switch::Off;
        let alone = tree_of(VIRT, &with);
        assert!(alone.at(&["reserved-memory", "vmgenid@40010000"]).is_some());
        let without = self::tree(3, GicChoice::V3);
        assert!(without.at(&["rng@40020000"]).is_none());
        assert!(without.at(&pages).is_none());
    }

    #[test]
    fn redistributor_regions_are_counted_where_there_is_more_than_one() {
        let gic = ["interrupt-controller@8000000"];
        let property = |cpus| {
            let tree = tree(cpus, GicChoice::V3);
            let reg = get(&tree, &gic, "reg").cloned();
            (get(&tree, &gic, "#redistributor-regions").cloned(), reg)
        };
        let first = [0x0800_0000_u64, 0x1_0000, 0x080a_0000, 123 * 0x2_0000];
        assert_eq!(property(123), (None, Some(Value::from(first.to_vec()))));
        let both = [first.as_slice(), &[0x6000_0000, 7 * 0x2_0000]].concat();
        assert_eq!(
            property(130),
            (Some(Value::from(2_u32)), Some(Value::from(both)))
        );
    }

    #[test]
    fn a_gic_v2_has_both_its_frames() {
        let tree = tree(8, GicChoice::V2);
        let gic = ["interrupt-controller@8000000"];
        assert_eq!(
            get(&tree, &gic, "compatible"),
            text("arm,cortex-a15-gic").as_ref()
        );
        let reg = vec![0x0800_0000_u64, 0x1000, 0x0801_0000, 0x2000];
        assert_eq!(get(&tree, &gic, "reg"), Some(&Value::from(reg)));
    }

    #[test]
    fn cpus_are_started_by_psci_and_those_that_are_alike_have_no_map() {
        let tree = tree(18, GicChoice::V3);
        assert_eq!(get(&tree, &["psci"], "method"), text("hvc").as_ref());
        let cpu = ["cpus", "cpu@101"];
        assert_eq!(cells(get(&tree, &cpu, "reg")), [0x101]);
        assert_eq!(get(&tree, &cpu, "enable-method"), text("psci").as_ref());
        assert!(tree.at(&["cpus", "cpu-map"]).is_none());
    }

    #[test]
    fn the_power_key_is_line_3_of_the_gpio() {
        let tree = tree(1, GicChoice::V3);
        let key = ["gpio-keys", "power-key"];
        let gpio = cells(get(&tree, &["gpio@9030000"], "phandle"))[0];
        assert_eq!(cells(get(&tree, &key, "gpios")), [gpio, 3, 0]);
        assert_eq!(cells(get(&tree, &key, "linux,code")), [116]);
    }

    #[test]
    fn a_second_gpio_has_no_power_key() {
        let second = "[[device]]\nkind = \"pl061\"\nbase = 0x0904_0000\nspi = 8\n";
        let tree = tree_of(&format!("{VIRT}\n{second}"), &request(1, GicChoice::V3));
        assert!(get(&tree, &["gpio@9030000"], "phandle").is_some());
        assert_eq!(get(&tree, &["gpio@9040000"], "phandle"), None);
    }

    #[test]
    fn devices_raise_the_interrupts_of_the_board() {
        let tree = tree(1, GicChoice::V3);
        let irq = |name: &str| cells(get(&tree, &[name], "interrupts"));
        assert_eq!(irq("serial@9000000"), [0, 1, 4]);
        assert_eq!(irq("rtc@9010000"), [0, 2, 4]);
        assert_eq!(irq("gpio@9030000"), [0, 7, 4]);
        // Edge-triggered.
        assert_eq!(irq("virtio_mmio@a000000"), [0, 16, 1]);
        assert_eq!(irq("virtio_mmio@a000200"), [0, 17, 1]);
        assert!(tree.at(&["virtio_mmio@a000400"]).is_none());
    }

    #[test]
    fn chosen_holds_what_was_asked_for() {
        let mut request = request(1, GicChoice::V3);
        let chosen = |request: &Request<Aarch64>| {
            tree_of(VIRT, request)
                .at(&["chosen"])
                .cloned()
                .expect("/chosen")
        };
        let plain = chosen(&request);
        assert_eq!(
            plain.get("bootargs"),
            text("console=ttyAMA0 \"quoted\"").as_ref()
        );
        assert_eq!(plain.get("stdout-path"), text("/serial@9000000").as_ref());
        for absent in ["linux,initrd-start", "kaslr-seed", "rng-seed"] {
            assert_eq!(plain.get(absent), None, "{absent}");
        }
        request.initrd = Some(0x1234);
        request.seeds = Some(Seeds {
            kaslr: 0x1122_3344_5566_7788,
            rng: [7; 64],
        });
        let full = chosen(&request);
        let number = |number: u64| Some(Value::from(number));
        assert_eq!(full.get("linux,initrd-start"), number(0x4000_0000).as_ref());
        // Exclusive.
        assert_eq!(full.get("linux,initrd-end"), number(0x4000_1234).as_ref());
        assert_eq!(
            full.get("kaslr-seed"),
            number(0x1122_3344_5566_7788).as_ref()
        );
        assert_eq!(full.get("rng-seed"), Some(&Value::Bytes(vec![7; 64])));
    }

    #[test]
    fn a_machine_without_a_console_or_key_has_no_trace_of_them() {
        let bare = VIRT
            .split("# Devices;")
            .next()
            .expect("the part before the devices");
        let request = Request {
            virtio: Vec::new(),
            pmem: Vec::new(),
            topology: Default::default(),
            ..request(1, GicChoice::V3)
        };
        let tree = tree_of(bare, &request);
        assert!(tree.at(&["aliases"]).is_none());
        assert!(tree.at(&["gpio-keys"]).is_none());
        assert_eq!(get(&tree, &["chosen"], "stdout-path"), None);
    }
}
