//! The nodes of CPUs, their caches and their clusters.

use crate::aarch64::Vcpu;
use crate::cores::{Cache, CacheKind, Topology};
use armlet_fdt::{Cell, Node};

/// The phandle of the first CPU.
const FIRST_CPU: u32 = 0x100;

/// arm/cpus.yaml; dt-schema cpu-map.yaml, cache-controller.yaml; cpu/cpu-capacity.txt.
pub(super) fn cpus(root: &mut Node, vcpus: &[Vcpu], topology: &Topology) {
    let node = root.child("cpus");
    node.prop("#address-cells", 1_u32)
        .prop("#size-cells", 0_u32);
    let caches = Caches::new(&topology.caches, vcpus.len() as u32);
    for (index, vcpu) in vcpus.iter().enumerate() {
        // KVM leaves Aff3 0, so one cell holds the affinity.
        let affinity = vcpu.mpidr as u32;
        let cpu = node
            .add_child(format!("cpu@{affinity:x}"))
            .prop("device_type", "cpu")
            .prop("compatible", "arm,armv8")
            .prop("reg", affinity)
            .prop("enable-method", "psci");
        if let Some(core) = topology.cores.get(index) {
            // The map refers to it.
            cpu.prop("phandle", FIRST_CPU + index as u32)
                .prop("capacity-dmips-mhz", core.capacity);
        }
        caches.of_cpu(cpu, index as u32);
    }
    caches.of_all(node);
    // With a single kind of core, the map carries no information, and is expensive: Linux looks up
    // each of its cores among all CPU nodes, for each possible CPU (`get_cpu_for_node` in
    // drivers/base/arch_topology.c), 276 million instructions for 128.
    if topology.cores.is_empty() {
        return;
    }
    let map = node.child("cpu-map");
    // A cluster for each kind of core, numbered in order of appearance.
    let mut kinds: Vec<u32> = Vec::new();
    for core in &topology.cores {
        if !kinds.contains(&core.kind) {
            kinds.push(core.kind);
        }
    }
    for (number, kind) in kinds.iter().enumerate() {
        let cluster = map.child(format!("cluster{number}"));
        let cores = topology.cores.iter().enumerate();
        let cores = cores.filter(|(_, core)| core.kind == *kind);
        for (number, (index, _)) in cores.enumerate() {
            cluster
                .child(format!("core{number}"))
                .prop("cpu", Cell::Phandle(FIRST_CPU + index as u32));
        }
    }
}

/// The caches that can be described: those of level 1, and above them an unbroken series of unified
/// ones, where no private cache follows a shared one.
struct Caches<'a> {
    first: Vec<&'a Cache>,
    above: Vec<&'a Cache>,
    vcpus: u32,
}

impl<'a> Caches<'a> {
    fn new(caches: &'a [Cache], vcpus: u32) -> Self {
        let first = caches.iter().filter(|cache| cache.level == 1).collect();
        let mut above: Vec<&Cache> = Vec::new();
        for level in 2..=7 {
            let of_level = |cache: &&Cache| cache.level == level;
            match caches.iter().find(of_level) {
                Some(cache)
                    if cache.kind == CacheKind::Unified
                        && (cache.shared || above.iter().all(|below| !below.shared)) =>
                {
                    above.push(cache);
                }
                _ => break,
            }
        }
        Caches {
            first,
            above,
            vcpus,
        }
    }

    /// Returns the phandle of the cache above level 1 with this index: the vCPU's own, or the
    /// shared one.
    fn phandle(&self, index: usize, vcpu: u32) -> u32 {
        let owner = if self.above[index].shared { 0 } else { vcpu };
        // After the phandles of the vCPUs.
        FIRST_CPU + self.vcpus * (index as u32 + 1) + owner
    }

    fn of_cpu(&self, cpu: &mut Node, vcpu: u32) {
        for cache in &self.first {
            let prefix = match cache.kind {
                CacheKind::Data => "d-cache",
                CacheKind::Instruction => "i-cache",
                CacheKind::Unified => "cache",
            };
            sizes(cpu, prefix, cache);
        }
        if !self.above.is_empty() {
            cpu.prop("next-level-cache", Cell::Phandle(self.phandle(0, vcpu)));
        }
        // Private caches are children of their CPU's node, shared ones siblings of the CPUs.
        for (index, cache) in self.above.iter().enumerate() {
            if !cache.shared {
                self.describe(cpu, index, vcpu);
            }
        }
    }

    fn of_all(&self, cpus: &mut Node) {
        for (index, cache) in self.above.iter().enumerate() {
            if cache.shared {
                self.describe(cpus, index, 0);
            }
        }
    }

    fn describe(&self, parent: &mut Node, index: usize, vcpu: u32) {
        let cache = self.above[index];
        let node = parent.child(format!("l{}-cache", cache.level));
        node.prop("compatible", "cache")
            .prop("cache-level", cache.level)
            .prop("cache-unified", ());
        sizes(node, "cache", cache);
        if index + 1 < self.above.len() {
            let next = self.phandle(index + 1, vcpu);
            node.prop("next-level-cache", Cell::Phandle(next));
        }
        node.prop("phandle", self.phandle(index, vcpu));
    }
}

fn sizes(node: &mut Node, prefix: &str, cache: &Cache) {
    for (name, value) in [
        ("size", cache.size),
        ("line-size", cache.line),
        ("sets", cache.sets),
    ] {
        if value > 0 {
            node.prop(format!("{prefix}-{name}"), value);
        }
    }
}
