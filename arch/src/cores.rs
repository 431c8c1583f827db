//! Which of the host's CPUs each vCPU may run on, and what the guest is told of them.

use crate::midr::Midr;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The most computing power (Documentation/devicetree/bindings/cpu/cpu-capacity.txt).
pub const FULL_CAPACITY: u32 = 1024;

/// A CPU of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core {
    /// Its number.
    pub number: u32,
    /// What kind of core it is, where the host says so.
    pub kind: Option<Midr>,
    /// Its computing power relative to the others; 1024 is the maximum.
    pub capacity: u32,
}

/// What `--pin` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PinPolicy {
    /// Pin to cores of one kind on hosts with several kinds, otherwise do not pin.
    #[default]
    Auto,
    /// Do not pin.
    None,
    /// Pin each vCPU to its own range of CPUs, or all to a single one.
    List(Vec<Cpus>),
}

/// CPUs with successive numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// The first.
    pub first: u32,
    /// The last, which may be the same.
    pub last: u32,
}

impl FromStr for PinPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(PinPolicy::Auto),
            "none" => Ok(PinPolicy::None),
            list => list
                .split(',')
                .map(Cpus::from_str)
                .collect::<Result<_, _>>()
                .map(PinPolicy::List)
                .map_err(|()| {
                    format!(
                        "'{text}' is not known; use auto, none, or a list with a CPU or a range of CPUs for each vCPU: 4,5,6-7"
                    )
                }),
        }
    }
}

impl FromStr for Cpus {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let cpus = Cpus {
            first: first.parse().map_err(drop)?,
            last: last.parse().map_err(drop)?,
        };
        // The bound also limits the length of lists.
        (cpus.first <= cpus.last && cpus.last < 1 << 16)
            .then_some(cpus)
            .ok_or(())
    }
}

impl fmt::Display for PinPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PinPolicy::Auto => f.write_str("auto"),
            PinPolicy::None => f.write_str("none"),
            PinPolicy::List(list) => {
                let items: Vec<_> = list.iter().map(Cpus::to_string).collect();
                f.write_str(&items.join(","))
            }
        }
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// What is known of the host's CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCores {
    /// The CPUs that guests may run on, by number.
    pub cores: Vec<Core>,
    /// Names of kinds of core, where a board knows them.
    pub names: Vec<(Midr, String)>,
}

/// Where the vCPUs run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pinning {
    /// The CPUs of each vCPU; empty where vCPUs run anywhere.
    pub cpus: Vec<Vec<u32>>,
    /// Which CPUs and why, for people; empty where vCPUs run anywhere.
    pub description: String,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The properties of each vCPU's core that the guest sees; empty where all are alike.
    pub guest_cores: Vec<GuestCore>,
    /// The CPUs that all vCPUs run on, if these are of one kind, so that their caches can be
    /// described to the guest.
    pub alike: Vec<u32>,
    /// How many kinds of core the host has, as far as it is known.
    pub kinds: usize,
}

/// The properties of a vCPU's core that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCore {
    /// Its kind, from 0.
    pub kind: u32,
    /// Its computing power; 1024 is the maximum.
    pub capacity: u32,
}

/// CPUs of one kind. They may differ in their maximum frequency, and so in capacity.
struct Kind {
    midr: Option<Midr>,
    capacity: u32,
    cpus: Vec<u32>,
}

/// Decides where `vcpus` vCPUs run.
///
/// # Errors
/// When a list does not match the vCPUs or the host's CPUs, with one that would.
pub fn pin(policy: &PinPolicy, vcpus: u32, host: &HostCores) -> Result<Pinning, String> {
    let kinds = kinds(&host.cores);
    let all: Vec<u32> = host.cores.iter().map(|core| core.number).collect();
    let mut pinning = match (policy, kinds.len()) {
        (PinPolicy::List(list), _) => by_list(list, vcpus, host, &kinds)?,
        (PinPolicy::Auto, 2..) => to_one_kind(vcpus, host, &kinds),
        _ => Pinning {
            alike: if kinds.len() == 1 { all } else { Vec::new() },
            ..Pinning::default()
        },
    };
    pinning.kinds = kinds.len();
    let is_used = |core: &&Core| {
        let mut cpus = pinning.cpus.iter();
        cpus.any(|numbers| numbers.contains(&core.number))
    };
    let (used, what) = match pinning.cpus.is_empty() {
        true => (host.cores.len(), "this host has"),
        false => (
            host.cores.iter().filter(is_used).count(),
            "they are pinned to",
        ),
    };
    if used > 0 && vcpus as usize > used {
        let plural = if used == 1 { "" } else { "s" };
        pinning.warnings.push(format!(
            "{vcpus} vCPUs share CPUs: {what} {used} CPU{plural}; use --cpus {used} or fewer for speed"
        ));
    }
    Ok(pinning)
}

fn kinds(cores: &[Core]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = Vec::new();
    for core in cores {
        let known = kinds.iter_mut().find(|kind| kind.midr == core.kind);
        match known {
            Some(kind) => {
                kind.cpus.push(core.number);
                kind.capacity = kind.capacity.max(core.capacity);
            }
            None => kinds.push(Kind {
                midr: core.kind,
                capacity: core.capacity,
                cpus: vec![core.number],
            }),
        }
    }
    kinds
}

/// Pins to the fastest kind that has a CPU for each vCPU, or else to the kind with the most CPUs.
fn to_one_kind(vcpus: u32, host: &HostCores, kinds: &[Kind]) -> Pinning {
    let enough = kinds
        .iter()
        .filter(|kind| kind.cpus.len() >= vcpus as usize);
    let chosen = enough.max_by_key(|kind| kind.capacity).or_else(|| {
        kinds
            .iter()
            .max_by_key(|kind| (kind.cpus.len(), kind.capacity))
    });
    let Some(kind) = chosen else {
        return Pinning::default();
    };
    Pinning {
        cpus: vec![kind.cpus.clone(); vcpus as usize],
        description: format!(
            "CPUs {} ({}): this host has {} kinds of core",
            runs(&kind.cpus),
            name(kind.midr, host),
            kinds.len()
        ),
        alike: kind.cpus.clone(),
        ..Pinning::default()
    }
}

fn by_list(list: &[Cpus], vcpus: u32, host: &HostCores, kinds: &[Kind]) -> Result<Pinning, String> {
    if list.len() != 1 && list.len() != vcpus as usize {
        return Err(format!(
            "{} entries for {vcpus} vCPUs; give one for each, or one for all",
            list.len()
        ));
    }
    let all: Vec<u32> = host.cores.iter().map(|core| core.number).collect();
    let mut cpus = Vec::new();
    let mut guest_cores = Vec::new();
    for entry in list.iter().cycle().take(vcpus as usize) {
        let numbers: Vec<u32> = (entry.first..=entry.last).collect();
        let missing = numbers.iter().find(|number| !all.contains(number));
        if let Some(missing) = missing.filter(|_| !all.is_empty()) {
            return Err(format!(
                "CPU {missing} is none that guests may run on; there are {}",
                runs(&all)
            ));
        }
        // A vCPU that may run on several CPUs gets the kind of the first one.
        let found = kinds.iter().enumerate();
        let mut found = found.filter(|(_, kind)| kind.cpus.contains(&entry.first));
        let core = host.cores.iter().find(|core| core.number == entry.first);
        if let (Some((index, _)), Some(core)) = (found.next(), core) {
            guest_cores.push(GuestCore {
                kind: index as u32,
                capacity: core.capacity,
            });
        }
        cpus.push(numbers);
    }
    let mut warnings = Vec::new();
    let kinds_of = |numbers: &[u32]| {
        let of = kinds
            .iter()
            .filter(|kind| numbers.iter().any(|number| kind.cpus.contains(number)));
        of.count()
    };
    if let Some(index) = cpus.iter().position(|numbers| kinds_of(numbers) > 1) {
        warnings.push(format!(
            "vCPU {index} may run on CPUs {}, which are of several kinds: the guest sees one",
            runs(&cpus[index])
        ));
    }
    let used = cpus.concat();
    let alike = kinds_of(&used) == 1;
    if alike || guest_cores.len() < cpus.len() {
        guest_cores.clear();
    }
    Ok(Pinning {
        description: "those CPUs".to_owned(),
        alike: if alike { used } else { Vec::new() },
        kinds: kinds.len(),
        cpus,
        warnings,
        guest_cores,
    })
}

fn name(midr: Option<Midr>, host: &HostCores) -> String {
    let known = host.names.iter().find(|(kind, _)| Some(*kind) == midr);
    match (known, midr) {
        (Some((_, name)), _) => name.clone(),
        (None, Some(midr)) => midr.to_string(),
        (None, None) => "a kind without a name".to_owned(),
    }
}

/// Formats numbers as a list of ranges: `0-3,6`.
fn runs(numbers: &[u32]) -> String {
    let mut runs: Vec<Cpus> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some(run) if run.last + 1 == number => run.last = number,
            _ => runs.push(Cpus {
                first: number,
                last: number,
            }),
        }
    }
    PinPolicy::List(runs).to_string()
}

/// What a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// Data.
    Data,
    /// Instructions.
    Instruction,
    /// Both.
    Unified,
}

/// A cache of the vCPUs' cores. Unknown values are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Its level, from 1.
    pub level: u32,
    /// What it holds.
    pub kind: CacheKind,
    /// Its size in bytes.
    pub size: u32,
    /// Its line size in bytes.
    pub line: u32,
    /// The number of its sets.
    pub sets: u32,
    /// Whether all cores share it; otherwise each has its own.
    pub shared: bool,
}

/// The cores and caches that a guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The core of each vCPU; empty where all are alike.
    pub cores: Vec<GuestCore>,
    /// The caches of all cores, by level; empty where they are unknown or differ.
    pub caches: Vec<Cache>,
    /// The host's PMU for its vCPUs.
    pub counters: Counters,
}

/// The host's PMU for a guest: each kind of core has its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Counters {
    /// The only one, because the host's cores are of one kind.
    #[default]
    Only,
    /// The one whose perf events have this type, because the vCPUs run only on its cores.
    Type(u32),
    /// None, with the reason.
    None(String),
}

impl Pinning {
    /// Returns the PMU of the CPUs that the vCPUs run on. `type_of` returns the perf event type of
    /// the PMU that the given CPUs share; it is called only on hosts with several kinds of core.
    pub fn counters(&self, type_of: impl FnOnce(&[u32]) -> Option<u32>) -> Counters {
        if self.kinds < 2 {
            return Counters::Only;
        }
        if self.alike.is_empty() {
            return Counters::None(
                "the vCPUs run on several kinds of core, each with counters of its own".to_owned(),
            );
        }
        type_of(&self.alike).map_or_else(
            || {
                let cpus = runs(&self.alike);
                Counters::None(format!("this host's kernel has no counters of CPUs {cpus}"))
            },
            Counters::Type,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RK3588: &str = include_str!("../../boards/rk3588.toml");
    const VIRT: &str = include_str!("../../boards/virt.toml");

    fn rk3588() -> HostCores {
        let parent = |_: &str, _: &str| Ok(("virt".to_owned(), VIRT.to_owned()));
        let profile = crate::board::Profile::read("rk3588", RK3588, &parent).expect("valid");
        profile.board.host.cores()
    }

    fn pinned(policy: &str, vcpus: u32) -> Result<Pinning, String> {
        pin(&policy.parse()?, vcpus, &rk3588())
    }

    #[test]
    fn two_kinds_of_core_give_a_guest_those_of_one_kind_the_fast_ones_if_they_suffice() {
        let pinning = pinned("auto", 4).expect("valid");
        assert_eq!(pinning.cpus, vec![vec![4, 5, 6, 7]; 4]);
        assert!(
            pinning.description.contains("4-7 (Cortex-A76)"),
            "{pinning:?}"
        );
        assert_eq!((pinning.warnings.len(), pinning.guest_cores.len()), (0, 0));
        // No kind has six: the fast one is used, with a warning that vCPUs share CPUs.
        let pinning = pinned("auto", 6).expect("valid");
        assert_eq!(pinning.cpus, vec![vec![4, 5, 6, 7]; 6]);
        let warning = &pinning.warnings[0];
        assert!(
            warning.contains("6 vCPUs") && warning.contains("4 CPUs"),
            "{warning}"
        );
    }

    #[test]
    fn more_slow_cores_than_fast_ones_are_taken_if_only_they_suffice() {
        let mut host = rk3588();
        host.cores.truncate(6);
        let pinning = pin(&PinPolicy::Auto, 3, &host).expect("valid");
        assert_eq!(pinning.cpus[0], [0, 1, 2, 3]);
    }

    #[test]
    fn cores_of_a_kind_are_one_kind_at_any_clock() {
        let mut host = rk3588();
        for core in &mut host.cores[4..6] {
            core.capacity = 1000;
        }
        let pinning = pin(&PinPolicy::Auto, 4, &host).expect("valid");
        assert_eq!(pinning.cpus[0], [4, 5, 6, 7]);
    }

    #[test]
    fn one_kind_of_core_pins_nothing() {
        let mut host = rk3588();
        host.cores.truncate(4);
        let pinning = pin(&PinPolicy::Auto, 2, &host).expect("valid");
        assert_eq!(pinning.cpus, Vec::<Vec<u32>>::new());
        assert_eq!(pinning.alike, [0, 1, 2, 3]);
        let many = pin(&PinPolicy::Auto, 5, &host).expect("valid");
        assert!(
            many.warnings[0].contains("this host has 4 CPUs"),
            "{many:?}"
        );
        // Nothing is known, so there is no warning.
        let unknown = pin(&PinPolicy::Auto, 5, &HostCores::default());
        assert_eq!(unknown, Ok(Pinning::default()));
        let list = pin(&"9".parse().expect("a list"), 1, &HostCores::default());
        assert_eq!(list.map(|pinning| pinning.cpus), Ok(vec![vec![9]]));
    }

    #[test]
    fn counters_are_those_of_the_kind_that_vcpus_are_pinned_to() {
        let of = |policy, found: Option<u32>| {
            let pinning = pinned(policy, 2).expect("valid");
            pinning.counters(|cpus| {
                assert!(cpus == [4, 5, 6, 7] || cpus == [0, 1], "{cpus:?}");
                found
            })
        };
        assert_eq!(of("auto", Some(8)), Counters::Type(8));
        assert_eq!(of("0,1", Some(9)), Counters::Type(9));
        let Counters::None(why) = of("auto", None) else {
            panic!("there are none");
        };
        assert!(why.contains("CPUs 4-7"), "{why}");
        for policy in ["none", "0,4", "3-4"] {
            let Counters::None(why) = of(policy, Some(8)) else {
                panic!("{policy}: two kinds have no counters in common");
            };
            assert!(why.contains("several kinds"), "{why}");
        }
        let mut host = rk3588();
        host.cores.truncate(4);
        let pinning = pin(&PinPolicy::None, 2, &host).expect("valid");
        let unasked = |_: &[u32]| panic!("one kind: there is nothing to look for");
        assert_eq!(pinning.counters(unasked), Counters::Only);
    }

    #[test]
    fn a_list_across_kinds_tells_the_guest_of_them() {
        let pinning = pinned("0,1,4,5-7", 4).expect("valid");
        assert_eq!(pinning.cpus, [vec![0], vec![1], vec![4], vec![5, 6, 7]]);
        let told: Vec<_> = pinning
            .guest_cores
            .iter()
            .map(|core| (core.kind, core.capacity))
            .collect();
        assert_eq!(told, [(0, 530), (0, 530), (1, 1024), (1, 1024)]);
        assert_eq!(pinning.alike, Vec::<u32>::new());
        let alike = pinned("4-7", 4).expect("valid");
        assert_eq!(alike.cpus, vec![vec![4, 5, 6, 7]; 4]);
        assert!(alike.guest_cores.is_empty());
        let mixed = pinned("3-4", 1).expect("valid");
        assert!(mixed.warnings[0].contains("several kinds"), "{mixed:?}");
    }

    #[test]
    fn a_list_that_does_not_fit_is_refused_with_the_numbers() {
        for (list, vcpus, words) in [
            ("4,5", 3, "2 entries for 3 vCPUs"),
            (
                "4,8",
                2,
                "CPU 8 is none that guests may run on; there are 0-7",
            ),
            ("7-4", 1, "a range of CPUs for each vCPU"),
            ("", 1, "auto, none"),
            ("4,", 2, "auto, none"),
            ("0-4000000000", 1, "auto, none"),
        ] {
            let error = pinned(list, vcpus).expect_err(list);
            assert!(error.contains(words), "{list}: {error}");
        }
    }

    #[test]
    fn policies_read_back_as_they_are_shown() {
        for text in ["auto", "none", "4,5,6-7", "0-3"] {
            let policy: PinPolicy = text.parse().expect("valid");
            assert_eq!(policy.to_string(), text);
        }
    }
}
