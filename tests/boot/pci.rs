//! Virtio over PCI: messages of each queue, a reset in place, snapshots.

use crate::guest::Armlet;
use crate::{rig, saved};

/// Uses the devices, and resets the guest once.
const LIVES: &str = r#"
mark=$(head -c 4 /dev/vda)
dd if=/dev/vda of=/dev/null bs=64k count=8 2>/dev/null || echo "BAD read"
head -c 64 /dev/hwrng >/dev/null || echo "BAD hwrng"
echo "LIFE $mark"
for device in /sys/bus/pci/devices/*; do echo "DEVICE ${device##*/} $(cat $device/vendor) $(cat $device/device)"; done
grep virtio /proc/interrupts | sed 's/^/IRQ /'
dmesg -r | grep '^<[0-3]>' | sed 's/^/BAD log: /'
if [ "$mark" != done ]; then
    printf done | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null || echo "BAD write"
    reboot -f
    sleep 60
fi
"#;

#[test]
fn each_queue_over_pci_interrupts_by_messages_of_its_own_in_each_life() {
    let Some(rig) = rig::any() else { return };
    let armlet = Armlet::devices(rig, LIVES);
    let image = armlet.file("disk.img", &vec![0; 1 << 20]);
    let armlet = armlet
        .option("--transport", "pci")
        .option("--disk", format!("path={}", image.display()));
    let outcome = armlet.run();
    let said = outcome.assert_status(0).text();
    assert!(!said.contains("BAD"), "{said}");
    assert!(said.contains("LIFE done"), "{said}");
    // The host bridge, the disk and random numbers.
    for device in [
        "00:00.0 0x1b36 0x0008",
        "00:01.0 0x1af4 0x1042",
        "00:02.0 0x1af4 0x1044",
    ] {
        assert_eq!(
            said.matches(&format!("DEVICE 0000:{device}")).count(),
            2,
            "{said}"
        );
    }
    let counted = |line: &&str| line.split_whitespace().nth(2) != Some("0");
    let queues = said
        .lines()
        .filter(|line| line.contains("IRQ ") && line.contains("MSI"));
    let requests: Vec<&str> = queues.filter(counted).collect();
    for queue in ["virtio0-req.0", "virtio1-input"] {
        let lines = requests.iter().filter(|line| line.contains(queue));
        assert_eq!(lines.count(), 2, "{said}");
    }
}

#[test]
fn a_guest_at_work_over_pci_is_saved_and_goes_on() {
    let Some(rig) = rig::any() else { return };
    let armlet = Armlet::devices(rig, &saved::work()).cpus(2);
    saved::a_guest_at_work_goes_on(armlet.option("--transport", "pci"));
}
