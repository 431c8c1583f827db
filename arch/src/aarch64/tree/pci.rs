//! PCI in the device tree.

use crate::pci::{Msi, PlacedPci};
use crate::range::Range;
use armlet_fdt::{Cell, Node};

/// The phandle of what takes MSIs; the tree's other nodes have lower ones.
const MSI: u32 = 4;

/// Spaces of `ranges` (IEEE 1275 PCI bus binding, section 2.2.1.1): 32-bit and 64-bit memory, not prefetchable.
const MEMORY_32: u32 = 0x0200_0000;
const MEMORY_64: u32 = 0x0300_0000;

fn reg(range: Range) -> Vec<u64> {
    vec![range.start(), range.size()]
}

/// interrupt-controller/arm,gic-v3.yaml and arm,gic.yaml: the child of the GIC's node.
pub(super) fn msi_controller(gic: &mut Node, msi: Msi) {
    match msi {
        Msi::Its { window } => {
            gic.child(format!("its@{:x}", window.start()))
                .prop("compatible", "arm,gic-v3-its")
                .prop("msi-controller", ())
                .prop("#msi-cells", 1_u32)
                .prop("reg", reg(window))
                .prop("phandle", MSI);
        }
        // The frame's register says which SPIs it has.
        Msi::V2m { window, .. } => {
            gic.child(format!("v2m@{:x}", window.start()))
                .prop("compatible", "arm,gic-v2m-frame")
                .prop("msi-controller", ())
                .prop("reg", reg(window))
                .prop("phandle", MSI);
        }
        Msi::LocalApics => {}
    }
}

/// pci/host-generic-pci.yaml. A bus address is that of the machine.
pub(super) fn bridge(root: &mut Node, pci: &PlacedPci) {
    let halves = |number: u64| [(number >> 32) as u32, number as u32];
    let mut ranges = Vec::new();
    for (space, window) in [(MEMORY_32, Some(pci.low)), (MEMORY_64, pci.high)] {
        let Some(window) = window else { continue };
        let (address, size) = (halves(window.start()), halves(window.size()));
        ranges.push(space);
        ranges.extend([address, address, size].concat());
    }
    let node = root.child(format!("pcie@{:x}", pci.ecam.start()));
    node.prop("compatible", "pci-host-ecam-generic")
        .prop("device_type", "pci")
        .prop("#address-cells", 3_u32)
        .prop("#size-cells", 2_u32)
        .prop("reg", reg(pci.ecam))
        .prop("bus-range", [0_u32, 0])
        .prop("ranges", ranges)
        .prop("dma-coherent", ());
    match pci.msi {
        // pci/pci-msi.txt: every requester ID is the DeviceID.
        Msi::Its { .. } => node.prop(
            "msi-map",
            [
                Cell::Number(0),
                Cell::Phandle(MSI),
                Cell::Number(0),
                Cell::Number(0x1_0000),
            ],
        ),
        Msi::V2m { .. } => node.prop("msi-parent", Cell::Phandle(MSI)),
        Msi::LocalApics => node,
    };
}

#[cfg(test)]
mod tests {
    use crate::aarch64::{Aarch64, Host, device_tree};
    use crate::irq::GicChoice;
    use crate::{Arch, Board, Request, plan};
    use armlet_fdt::{Node, Value};

    fn tree(gic: GicChoice) -> Node {
        let board = Board::parse(include_str!("../../../../boards/virt.toml")).expect("valid");
        let request = Request {
            gic,
            pci: vec!["disk0".to_owned()],
            ..Request::new(1, 512 << 20)
        };
        let host = Host {
            gic_v2: true,
            ..Aarch64::assumed_host(&board)
        };
        let plan = plan(&board, &request, &host).expect("a plan");
        device_tree(&board, &plan, &request)
    }

    fn get<'a>(tree: &'a Node, path: &[&str], name: &str) -> Option<&'a Value> {
        tree.at(path)
            .unwrap_or_else(|| panic!("no node {path:?}"))
            .get(name)
    }

    #[test]
    fn the_host_bridge_names_its_windows_and_maps_requesters_to_the_its() {
        let tree = tree(GicChoice::V3);
        let bridge = ["pcie@3fe00000"];
        let ranges = vec![
            0x0200_0000,
            0,
            0x3fc0_0000,
            0,
            0x3fc0_0000,
            0,
            0x20_0000,
            0x0300_0000,
            0,
            0x6000_0000,
            0,
            0x6000_0000,
            0,
            0x10_0000,
        ];
        assert_eq!(get(&tree, &bridge, "ranges"), Some(&Value::Cells(ranges)));
        assert_eq!(get(&tree, &bridge, "bus-range"), Some(&[0_u32, 0].into()));
        assert!(get(&tree, &bridge, "msi-map").is_some());
        let its = ["interrupt-controller@8000000", "its@3ff00000"];
        assert_eq!(get(&tree, &its, "#msi-cells"), Some(&1_u32.into()));
        let gic = &its[..1];
        assert_eq!(get(&tree, gic, "#address-cells"), Some(&2_u32.into()));
        assert_eq!(get(&tree, gic, "ranges"), Some(&Value::Empty));
    }

    #[test]
    fn a_gic_v2_has_a_frame_that_the_bridge_sends_to() {
        let tree = tree(GicChoice::V2);
        let frame = ["interrupt-controller@8000000", "v2m@3ff00000"];
        assert_eq!(
            get(&tree, &frame, "compatible"),
            Some(&"arm,gic-v2m-frame".into())
        );
        assert!(get(&tree, &["pcie@3fe00000"], "msi-parent").is_some());
        assert!(get(&tree, &["pcie@3fe00000"], "msi-map").is_none());
    }
}
