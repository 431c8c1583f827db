//! Reads facts about this host from /proc and /sys, as plain data.

use armlet_arch::board::Identity;
use armlet_arch::cores::FULL_CAPACITY;
use armlet_arch::cores::{Cache, CacheKind, Core, HostCores, PinPolicy};
use armlet_arch::midr::Midr;
use armlet_arch::size::parse_size;
use armlet_system::eintr::uninterrupted;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::cell::OnceCell;
use std::path::{Path, PathBuf};

/// The most bytes read of a file: a page, the limit of sysfs, and more than firmware's names take.
const MAX_BYTES: usize = 4096;

/// The root directory below which /proc and /sys are read.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
    /// The CPUs that this process may run on, each with its kind.
    cpus: OnceCell<Vec<(u32, Option<Midr>)>>,
}

/// The host's policy for PMD-sized transparent huge pages
/// (Documentation/admin-guide/mm/transhuge.rst), and the files that hold it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePagePolicy {
    /// For private memory: always, madvise or never; `None` where the kernel has none.
    pub private: Option<String>,
    /// The file that holds it.
    pub private_file: String,
    /// For shared memory: always, within_size, advise, never, deny or force.
    pub shared: Option<String>,
    /// The file that holds it.
    pub shared_file: String,
}

/// Returns this host's files.
#[must_use]
pub fn this() -> HostFiles {
    HostFiles::below("/")
}

impl HostFiles {
    fn below(root: impl Into<PathBuf>) -> HostFiles {
        let root = root.into();
        let cpus = OnceCell::new();
        HostFiles { root, cpus }
    }

    /// Returns the CPUs that this process may run on, each with what it is.
    fn cpus(&self) -> &[(u32, Option<Midr>)] {
        self.cpus.get_or_init(|| {
            let mut told = true;
            let kind = |cpu| {
                // If the kind of one CPU is unknown, all are unknown.
                let kind = if told { self.midr(cpu) } else { None };
                told = kind.is_some();
                (cpu, kind)
            };
            allowed_cpus().into_iter().map(kind).collect()
        })
    }

    /// Returns the identity that the host's firmware gives.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let mut kinds: Vec<Midr> = Vec::new();
        for kind in self.cpus().iter().filter_map(|(_, kind)| *kind) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        Identity {
            compatible: self.compatible(),
            vendor: self.text("sys/class/dmi/id/sys_vendor").unwrap_or_default(),
            product: self
                .text("sys/class/dmi/id/product_name")
                .unwrap_or_default(),
            cores: kinds,
        }
    }

    /// Returns the CPUs that guests may run on; `names` are the names of kinds of core.
    #[must_use]
    pub fn cores(&self, names: Vec<(Midr, String)>) -> HostCores {
        let core = |&(number, kind): &(u32, Option<Midr>)| Core {
            number,
            kind,
            capacity: FULL_CAPACITY,
        };
        let mut cores: Vec<Core> = self.cpus().iter().map(core).collect();
        // If all are alike, none has more power than another, and their files need not be read.
        if cores.windows(2).any(|pair| pair[0].kind != pair[1].kind) {
            for core in &mut cores {
                let path = format!("sys/devices/system/cpu/cpu{}/cpu_capacity", core.number);
                let capacity = self.number(&path).filter(|value| *value > 0);
                core.capacity = capacity.unwrap_or(FULL_CAPACITY);
            }
        }
        HostCores { cores, names }
    }

    /// Returns the caches of `cores`, which are of one kind, as far as their sizes are known
    /// (Documentation/ABI/testing/sysfs-devices-system-cpu).
    #[must_use]
    pub fn caches(&self, cores: &[u32]) -> Vec<Cache> {
        let Some(first) = cores.first() else {
            return Vec::new();
        };
        let mut caches = Vec::new();
        for index in 0.. {
            let folder = format!("sys/devices/system/cpu/cpu{first}/cache/index{index}");
            let read = |file: &str| self.text(&format!("{folder}/{file}"));
            // Linux shows no size for a cache that firmware does not describe.
            let size = read("size").and_then(|size| parse_size(&size).ok());
            let Some(size) = size.and_then(|size| u32::try_from(size).ok()) else {
                break;
            };
            let kind = match read("type").as_deref() {
                Some("Data") => CacheKind::Data,
                Some("Instruction") => CacheKind::Instruction,
                _ => CacheKind::Unified,
            };
            let number = |file: &str| self.number(&format!("{folder}/{file}")).unwrap_or(0);
            let shared_by: PinPolicy = read("shared_cpu_list")
                .and_then(|list| list.parse().ok())
                .unwrap_or_default();
            let PinPolicy::List(shared_by) = shared_by else {
                continue;
            };
            let sharers = |cpu: &&u32| {
                shared_by
                    .iter()
                    .any(|cpus| (cpus.first..=cpus.last).contains(cpu))
            };
            // A cache shared by only some of the cores cannot be described for any vCPU, which may
            // run on all of them.
            let shared = match cores.iter().filter(sharers).count() {
                sharers if sharers == cores.len() => sharers > 1,
                1 => false,
                _ => continue,
            };
            caches.push(Cache {
                level: number("level"),
                kind,
                size,
                line: number("coherency_line_size"),
                sets: number("number_of_sets"),
                shared,
            });
        }
        caches
    }

    /// Returns the perf event type of the PMU that all of these CPUs share
    /// (Documentation/ABI/testing/sysfs-bus-event_source-devices;
    /// Documentation/arch/arm64/perf.rst).
    #[must_use]
    pub fn counters(&self, cpus: &[u32]) -> Option<u32> {
        const FOLDER: &str = "sys/bus/event_source/devices";
        let mut found: Vec<u32> = Vec::new();
        for entry in std::fs::read_dir(self.root.join(FOLDER)).ok()?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // PMUs of cores have this file, those of caches and memory controllers another one
            // (drivers/perf/arm_pmu.c: armpmu_common_attrs).
            let counted: Option<PinPolicy> = self
                .text(&format!("{FOLDER}/{name}/cpus"))
                .and_then(|list| list.parse().ok());
            let Some(PinPolicy::List(counted)) = counted else {
                continue;
            };
            let has = |cpu: &u32| {
                let mut runs = counted.iter();
                runs.any(|run| (run.first..=run.last).contains(cpu))
            };
            if cpus.iter().all(has) {
                found.extend(self.number(&format!("{FOLDER}/{name}/type")));
            }
        }
        found.first().copied()
    }

    /// Returns the size of a GICv2's virtual CPU interface (GICV) in bytes, where the device tree
    /// has one: the fourth range of its `reg`
    /// (Documentation/devicetree/bindings/interrupt-controller/arm,gic.yaml).
    #[must_use]
    pub fn gic_v2_cpu_interface(&self) -> Option<u64> {
        self.find_gic_v2(Path::new("proc/device-tree"), 0)
    }

    fn find_gic_v2(&self, folder: &Path, depth: u32) -> Option<u64> {
        const KINDS: [&str; 2] = ["arm,gic-400", "arm,cortex-a15-gic"];
        let read = |path: PathBuf| std::fs::read(self.root.join(path)).ok();
        let cells = |name| {
            let bytes = read(folder.join(name))?.try_into().ok()?;
            Some(u32::from_be_bytes(bytes) as usize)
        };
        for entry in std::fs::read_dir(self.root.join(folder)).ok()?.flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let node = folder.join(entry.file_name());
            let names = self.text(&node.join("compatible").to_string_lossy());
            let mut names = names.iter().flat_map(|names| names.split('\0'));
            if names.any(|name| KINDS.contains(&name)) {
                let (address, size) = (cells("#address-cells")?, cells("#size-cells")?);
                return fourth_size(&read(node.join("reg"))?, address, size);
            }
            // Interrupt controllers are at the root or on a bus of the SoC.
            if depth < 2
                && let Some(found) = self.find_gic_v2(&node, depth + 1)
            {
                return Some(found);
            }
        }
        None
    }

    /// Returns the policy for transparent huge pages of `size` bytes.
    #[must_use]
    pub fn huge_page_policy(&self, size: usize) -> HugePagePolicy {
        const FOLDER: &str = "sys/kernel/mm/transparent_hugepage";
        // "always [madvise] never"
        let chosen = |path: &str| {
            let text = self.text(path)?;
            let mut words = text.split_whitespace();
            let chosen = words.find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
            chosen.map(str::to_owned)
        };
        // Since Linux 6.8 the policy of the size takes precedence, unless it is "inherit".
        let rules = |name: &str| {
            let of_size = format!("{FOLDER}/hugepages-{}kB/{name}", size >> 10);
            let of_all = format!("{FOLDER}/{name}");
            match chosen(&of_size) {
                Some(policy) if policy != "inherit" => (Some(policy), format!("/{of_size}")),
                _ => (chosen(&of_all), format!("/{of_all}")),
            }
        };
        let (private, private_file) = rules("enabled");
        let (shared, shared_file) = rules("shmem_enabled");
        HugePagePolicy {
            private,
            private_file,
            shared,
            shared_file,
        }
    }

    /// Returns the kernel's command line, as far as it can be read.
    #[must_use]
    pub fn kernel_cmdline(&self) -> String {
        self.text("proc/cmdline").unwrap_or_default()
    }

    fn number(&self, path: &str) -> Option<u32> {
        self.text(path)?.parse().ok()
    }

    /// Returns the board's name from firmware: the device tree's model (Devicetree specification
    /// v0.4, section 2.3.2), else DMI's.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.text("proc/device-tree/model").or_else(|| {
            let vendor = self.text("sys/class/dmi/id/sys_vendor")?;
            let product = self.text("sys/class/dmi/id/product_name")?;
            Some(format!("{vendor} {product}"))
        })
    }

    fn compatible(&self) -> Vec<String> {
        let names = self.text("proc/device-tree/compatible");
        let names = names.iter().flat_map(|names| names.split('\0'));
        names.map(str::to_owned).collect()
    }

    /// Returns a CPU's kind of core (Documentation/arch/arm64/cpu-feature-registers.rst).
    fn midr(&self, cpu: u32) -> Option<Midr> {
        let path = format!("sys/devices/system/cpu/cpu{cpu}/regs/identification/midr_el1");
        let text = self.text(&path)?;
        let register = u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
        Some(Midr::kind(register))
    }

    fn text(&self, path: &str) -> Option<String> {
        let mut buffer = [0; MAX_BYTES];
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let path = self.root.join(path);
        let file = uninterrupted(|| openat(CWD, &path, flags, Mode::empty())).ok()?;
        // sysfs and /proc/device-tree return everything in one read.
        let length = uninterrupted(|| rustix::io::read(&file, &mut buffer)).ok()?;
        let text = std::str::from_utf8(buffer.get(..length)?).ok()?;
        let text = text.trim_matches(['\0', '\n', ' ']);
        (!text.is_empty()).then(|| text.to_owned())
    }
}

/// Returns the size of the fourth range in a `reg` with these numbers of address and size cells
/// (Devicetree specification v0.4, section 2.3.6).
fn fourth_size(reg: &[u8], address: usize, size: usize) -> Option<u64> {
    // At most two cells for a number.
    let range = (address.min(2) + size.min(2)) * 4;
    let start = 3 * range + address.min(2) * 4;
    let bytes = reg.get(start..start + size.min(2) * 4)?;
    let cells = bytes.iter();
    Some(cells.fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// Returns the CPUs that this process may run on.
#[must_use]
pub fn allowed_cpus() -> Vec<u32> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else {
        return Vec::new();
    };
    let cpus = (0..).filter(|cpu| set.is_set(*cpu));
    // Most hosts have far fewer CPUs than the set can hold.
    let count = set.count() as usize;
    cpus.take(count).map(|cpu| cpu as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_read_from_its_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles::below(folder.path());
        assert_eq!(files.identity(), Identity::default());
        assert_eq!(files.name(), None);
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        };
        let cpu = allowed_cpus()[0];
        write(
            &format!("sys/devices/system/cpu/cpu{cpu}/regs/identification/midr_el1"),
            "0x00000000414fd0b1\n",
        );
        write("sys/class/dmi/id/sys_vendor", "Maker\n");
        write("sys/class/dmi/id/product_name", "One\n");
        assert_eq!(files.name().as_deref(), Some("Maker One"));
        write("proc/device-tree/compatible", "maker,board\0maker,soc\0");
        write("proc/device-tree/model", "The Board\0");
        assert_eq!(files.name().as_deref(), Some("The Board"));
        // The kinds of its CPUs are read once.
        let files = HostFiles::below(folder.path());
        let identity = files.identity();
        assert_eq!(identity.compatible, ["maker,board", "maker,soc"]);
        assert_eq!(identity.cores, [Midr::kind(0x410f_d0b0)]);
        assert_eq!(identity.vendor, "Maker");
        let cores = files.cores(Vec::new()).cores;
        assert_eq!(cores[0].kind, Some(Midr::kind(0x410f_d0b0)));
    }

    #[test]
    fn the_window_for_guests_is_found_in_the_device_tree() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles::below(folder.path());
        assert_eq!(files.gic_v2_cpu_interface(), None);
        let write = |path: &str, bytes: &[u8]| {
            let path = folder.path().join("proc/device-tree").join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, bytes).expect("a file");
        };
        // As on a Raspberry Pi 5: GICV has 8 KiB.
        write("#address-cells", &2_u32.to_be_bytes());
        write("#size-cells", &2_u32.to_be_bytes());
        write("soc/#address-cells", &1_u32.to_be_bytes());
        write("soc/#size-cells", &1_u32.to_be_bytes());
        write("soc/serial@1/compatible", b"arm,pl011\0");
        write(
            "soc/interrupt-controller@7fff9000/compatible",
            b"arm,gic-400\0",
        );
        let reg: Vec<u8> = [
            0x7fff_9000_u32,
            0x1000,
            0x7fff_a000,
            0x2000,
            0x7fff_c000,
            0x2000,
            0x7fff_e000,
            0x2000,
        ]
        .iter()
        .flat_map(|cell| cell.to_be_bytes())
        .collect();
        write("soc/interrupt-controller@7fff9000/reg", &reg);
        assert_eq!(files.gic_v2_cpu_interface(), Some(0x2000));
        // Two ranges: no GICV.
        assert_eq!(fourth_size(&reg[..16], 1, 1), None);
        assert_eq!(fourth_size(&[0; 64], 2, 2), Some(0));
    }

    #[test]
    fn the_policy_for_huge_pages_is_that_of_their_size() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles::below(folder.path());
        assert_eq!(files.huge_page_policy(2 << 20).private, None);
        let write = |path: &str, text: &str| {
            let path = folder
                .path()
                .join("sys/kernel/mm/transparent_hugepage")
                .join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        };
        write("enabled", "always [madvise] never\n");
        write(
            "shmem_enabled",
            "always within_size advise [never] deny force\n",
        );
        let policy = files.huge_page_policy(2 << 20);
        assert_eq!(policy.private.as_deref(), Some("madvise"));
        assert_eq!(policy.shared.as_deref(), Some("never"));
        write(
            "hugepages-2048kB/enabled",
            "always [inherit] madvise never\n",
        );
        let policy = files.huge_page_policy(2 << 20);
        assert_eq!(policy.private.as_deref(), Some("madvise"));
        write(
            "hugepages-2048kB/enabled",
            "always inherit madvise [never]\n",
        );
        let policy = files.huge_page_policy(2 << 20);
        assert_eq!(policy.private.as_deref(), Some("never"));
        assert_eq!(
            policy.private_file,
            "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled"
        );
    }

    #[test]
    fn counters_are_those_that_all_the_cpus_have() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles::below(folder.path());
        assert_eq!(files.counters(&[0]), None);
        let device = |name: &str, cpus: &str, number: &str| {
            let path = format!("sys/bus/event_source/devices/{name}");
            let path = folder.path().join(path);
            std::fs::create_dir_all(&path).expect("a folder");
            std::fs::write(path.join("cpus"), format!("{cpus}\n")).expect("a file");
            std::fs::write(path.join("type"), format!("{number}\n")).expect("a file");
        };
        // As on an RK3588; the last one counts what its memory controller does.
        device("armv8_cortex_a55", "0-3", "8");
        device("armv8_cortex_a76", "4-5,6-7", "9");
        let memory = folder.path().join("sys/bus/event_source/devices/arm_dmc_0");
        std::fs::create_dir_all(&memory).expect("a folder");
        std::fs::write(memory.join("cpumask"), "0-7\n").expect("a file");
        std::fs::write(memory.join("type"), "10\n").expect("a file");
        assert_eq!(files.counters(&[0, 1, 2, 3]), Some(8));
        assert_eq!(files.counters(&[4, 7]), Some(9));
        assert_eq!(files.counters(&[3, 4]), None);
        assert_eq!(files.counters(&[8]), None);
    }

    #[test]
    fn caches_are_told_as_far_as_they_are_known() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = HostFiles::below(folder.path());
        let cache = |index: u32, values: [&str; 6]| {
            let path = format!("sys/devices/system/cpu/cpu4/cache/index{index}");
            let path = folder.path().join(path);
            std::fs::create_dir_all(&path).expect("a folder");
            let names = [
                "level",
                "type",
                "size",
                "coherency_line_size",
                "number_of_sets",
                "shared_cpu_list",
            ];
            for (name, value) in names.iter().zip(values) {
                std::fs::write(path.join(name), format!("{value}\n")).expect("a file");
            }
        };
        cache(0, ["1", "Data", "64K", "64", "256", "4"]);
        cache(1, ["1", "Instruction", "64K", "64", "256", "4"]);
        cache(2, ["2", "Unified", "512K", "64", "1024", "4-5"]);
        cache(3, ["3", "Unified", "3072K", "64", "4096", "0-7"]);
        let of = |cores: &[u32]| {
            let caches = files.caches(cores).into_iter();
            caches
                .map(|cache| (cache.level, cache.size, cache.shared))
                .collect::<Vec<_>>()
        };
        let first = [(1, 64 << 10, false), (1, 64 << 10, false)];
        let last = [(3, 3 << 20, true)];
        // Two of four cores share a level-2 cache: for a vCPU that may run on all four, it cannot
        // be described.
        assert_eq!(of(&[4, 5, 6, 7]), [&first[..], &last].concat());
        let pair = [&first[..], &[(2, 512 << 10, true)], &last].concat();
        assert_eq!(of(&[4, 5]), pair);
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[9]), []);
    }
}
