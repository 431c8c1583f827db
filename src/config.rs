//! Turns the command line into a request: parses and checks everything, but decides nothing.

use crate::asked::Asked;
use crate::boards::{self, Chosen};
use crate::cli::MachineArgs;
use crate::host::HostFiles;
use crate::kernel::{Initrd, Kernel};
use crate::memory::{Backing, Sharing};
use crate::settings::{ChosenValues, Setting};
use anyhow::{Context, Result, anyhow};
use armlet_arch::cores::{self, Counters, HostCores, PinPolicy, Pinning, Topology};
use armlet_arch::image::Header;
use armlet_arch::irq::GicChoice;
use armlet_arch::size::{parse_memory, show_size};
use armlet_arch::switch::Switch;
use armlet_arch::words::cpus_in;
use armlet_arch::{Arch, Architecture, Board, FeatureOptions, Request, Seeds};
use armlet_backends::kind::{DeviceOptions, Guest, Need, Transport};
use armlet_backends::open::{self, Wanted};
use armlet_devices::generation;
use armlet_system::eintr::uninterrupted;
use armlet_system::status::{Fault, Status};
use linux_loader::cmdline::Cmdline;
use std::path::Path;

/// The size of a kernel command line in bytes, including the terminating NUL (COMMAND_LINE_SIZE of
/// arm64 and x86_64).
const CMDLINE_MAX: usize = 2048;

/// The machine that the user asked for, with its files open.
#[derive(Debug)]
pub struct Config<A: Arch> {
    /// The board.
    pub board: Board,
    /// How it was asked for.
    pub asked: Asked,
    /// Each chosen value, with its origin.
    pub settings: Vec<Setting>,
    /// The request to plan for.
    pub request: Request<A>,
    /// The kernel, if one was named.
    pub kernel: Option<Kernel>,
    /// The initrd, if one was named.
    pub initrd: Option<Initrd>,
    /// Virtio devices, in the order of their windows.
    pub virtio: Vec<Wanted>,
    /// The host's CPUs that vCPUs are pinned to.
    pub pinning: Pinning,
    /// The CPUs of all other threads; empty for any.
    pub io_cpus: Vec<u32>,
    /// The kind of host memory that backs the guest's.
    pub backing: Backing,
    /// VMGenID and VMClock, as they were asked for.
    pub vmgenid: Switch,
}

impl<A: Arch> Config<A> {
    /// Returns what the machine needs of the sandbox beside its devices.
    #[must_use]
    pub fn needs(&self) -> &'static [Need] {
        match self.request.pci.is_empty() {
            true => &[],
            false => &[Need::Pci],
        }
    }

    /// Gives a guest that clients can make snapshots of VMGenID and VMClock, where neither option nor
    /// board decides and the board has an interrupt for them.
    pub fn expect_clients(&mut self) {
        if self.vmgenid == Switch::Auto {
            self.request.vmgenid = self.board.vmgenid.is_some();
        }
    }
}

/// Returns the board that the arguments name, or the one that matches the host: `host` if the
/// machine is planned for another host, `fallback` if none matches.
///
/// # Errors
/// As [`boards::choose`].
pub fn board(
    args: &MachineArgs,
    host: Option<&str>,
    fallback: &'static str,
    files: &HostFiles,
) -> Result<Chosen> {
    let named = args.board.as_deref().unwrap_or(boards::AUTO);
    let chosen = match host {
        Some(host) if named == boards::AUTO => Chosen {
            why: "--host".to_owned(),
            ..boards::choose(host, fallback, || files.identity())?
        },
        _ => boards::choose(named, fallback, || files.identity())?,
    };
    log::info!("board {}: {}", chosen.board.name, chosen.why);
    Ok(chosen)
}

/// Reads the arguments for a guest of architecture `A` on the board, and on these CPUs of the
/// host. `files` are those of the host, where it is this one.
///
/// # Errors
/// An invalid value, or a file that cannot be opened or used; status [`Status::Usage`].
pub fn read<A: Arch>(
    args: &MachineArgs,
    chosen: Chosen,
    host: &HostCores,
    files: Option<&HostFiles>,
) -> Result<Config<A>> {
    let devices = |guest: &Guest| open::read(&args.devices, guest);
    read_checked(args, chosen, host, files, devices).fault(Status::Usage)
}

/// As [`read`], with these devices in place of those of the arguments.
///
/// # Errors
/// As [`read`].
pub fn read_with<A: Arch>(
    args: &MachineArgs,
    chosen: Chosen,
    host: &HostCores,
    files: Option<&HostFiles>,
    devices: Vec<Box<dyn DeviceOptions>>,
) -> Result<Config<A>> {
    let devices = |guest: &Guest| open::checked(devices, guest);
    read_checked(args, chosen, host, files, devices).fault(Status::Usage)
}

fn read_checked<A: Arch>(
    args: &MachineArgs,
    chosen: Chosen,
    host: &HostCores,
    files: Option<&HostFiles>,
    devices: impl FnOnce(&Guest) -> Result<Vec<Wanted>>,
) -> Result<Config<A>> {
    let Chosen { board, why } = chosen;
    let defaults = &board.guest;
    let cpus = match &args.cpus {
        None => defaults.cpus,
        Some(text) => text.parse().map_err(|_| match cpus_in(text) {
            Some(number) if number != text => anyhow!("--cpus {text}: use --cpus {number}"),
            _ => anyhow!("--cpus '{text}' is no number of vCPUs; use 1 or more"),
        })?,
    };
    let memory = match &args.memory {
        None => defaults.memory,
        Some(text) => parse_memory(text).map_err(|cause| anyhow!("--memory: {cause}"))?,
    };
    let width = match &args.ipa_bits {
        None => defaults.width,
        Some(text) => text
            .parse()
            .map_err(|cause| anyhow!("--ipa-bits: {cause}"))?,
    };
    let gic = match &args.gic {
        None => defaults.gic,
        Some(text) => text.parse().map_err(|cause| anyhow!("--gic: {cause}"))?,
    };
    if A::ARCHITECTURE != Architecture::Aarch64 && gic != GicChoice::Auto {
        return Err(anyhow!("--gic is for aarch64 guests; leave it out"));
    }
    let policy = match &args.pin {
        None => defaults.pin.clone(),
        Some(text) => text.parse().map_err(|cause| anyhow!("--pin: {cause}"))?,
    };
    let pinning = cores::pin(&policy, cpus, host).map_err(|cause| anyhow!("--pin: {cause}"))?;
    let io_cpus = match &args.pin_io {
        None => Vec::new(),
        Some(text) => io_cpus(text, host).map_err(|cause| anyhow!("--pin-io: {cause}"))?,
    };
    let pages = match &args.hugepages {
        None => defaults.huge_pages,
        Some(text) => text
            .parse()
            .map_err(|cause| anyhow!("--hugepages: {cause}"))?,
    };
    let backing = Backing {
        pages,
        prefault: args.prefault,
        mergeable: args.mergeable,
        locked: args.mlock,
    };
    let guest = Guest {
        memory,
        parse_size: parse_memory,
        show_size,
    };
    let wanted = devices(&guest)?;
    let mut devices = wanted.iter().map(Wanted::options);
    backing.check(match devices.any(|device| device.shares_memory()) {
        true => Sharing::Shared,
        false => Sharing::Private,
    })?;
    let cmdline = match &args.cmdline {
        Some(cmdline) => cmdline.clone(),
        None => default_cmdline(&defaults.cmdline, &wanted),
    };
    check_cmdline(&cmdline)?;
    if args.initrd.is_some() && args.kernel.is_none() {
        return Err(anyhow!(
            "--initrd without --kernel: name the kernel that takes it"
        ));
    }
    let kernel = args
        .kernel
        .as_ref()
        .map(|path| Kernel::open(Path::new(path)))
        .transpose()?;
    let header = kernel
        .as_ref()
        .map(|kernel| {
            A::kernel(&sized_header(kernel))
                .with_context(|| format!("kernel '{}'", args.kernel.as_deref().unwrap_or_default()))
        })
        .transpose()?;
    let initrd = args
        .initrd
        .as_ref()
        .map(|path| Initrd::open(Path::new(path)))
        .transpose()?;
    let options = FeatureOptions {
        paravirtual: args.pv.as_deref(),
        exits: args.exits.as_deref(),
        pmu: switch("--pmu", args.pmu.as_deref(), defaults.pmu)?,
        sve: switch("--sve", args.sve.as_deref(), defaults.sve)?,
        pauth: switch("--pauth", args.pauth.as_deref(), defaults.pauth)?,
    };
    let vmgenid = switch("--vmgenid", args.vmgenid.as_deref(), defaults.vmgenid)?;
    let transport = match &args.transport {
        None => Transport::Auto,
        Some(text) => text
            .parse()
            .map_err(|cause| anyhow!("--transport: {cause}"))?,
    };
    let is_over_pci = |device: &&Wanted| match device.transport() {
        Transport::Auto => transport == Transport::Pci,
        own => own == Transport::Pci,
    };
    let names = |is_pci| {
        let those = wanted
            .iter()
            .filter(move |device| is_over_pci(device) == is_pci);
        those.map(|device| device.name().to_owned()).collect()
    };
    let features = A::feature_request(&options).map_err(|cause| anyhow!("{cause}"))?;
    let counters = match files {
        Some(files) if options.pmu != Switch::Off => pinning.counters(|cpus| files.counters(cpus)),
        // Boards do not specify this.
        _ => Counters::Only,
    };
    let pmem = wanted
        .iter()
        .filter_map(|device| device.options().pmem_size().transpose());
    let request = Request {
        cpus,
        memory,
        width,
        gic,
        kernel: header,
        initrd: initrd.as_ref().map(Initrd::size),
        cmdline,
        seeds: None,
        virtio: names(false),
        pci: names(true),
        pmem: pmem.collect::<Result<_>>()?,
        goes_on: false,
        topology: Topology {
            cores: pinning.guest_cores.clone(),
            caches: files.map_or_else(Vec::new, |files| files.caches(&pinning.alike)),
            counters,
        },
        features,
        vmgenid: vmgenid == Switch::On,
    };
    let chosen = ChosenValues {
        args,
        board: &board,
        why: &why,
        cpus,
        memory,
        gic,
        width,
        pin: &policy,
        pinning: &pinning,
        pages,
        features: &options,
        vmgenid,
        cmdline: &request.cmdline,
    };
    let settings = chosen.settings();
    Ok(Config {
        asked: Asked::of(args),
        board,
        settings,
        request,
        kernel,
        initrd,
        virtio: wanted,
        pinning,
        io_cpus,
        backing,
        vmgenid,
    })
}

/// Returns the value of an option, or the board's where it is not given.
fn switch(option: &str, text: Option<&str>, board: Switch) -> Result<Switch> {
    match text {
        None => Ok(board),
        Some(text) => text.parse().map_err(|cause| anyhow!("{option}: {cause}")),
    }
}

/// Returns the CPUs of a list, after checking that the host has them.
fn io_cpus(text: &str, host: &HostCores) -> Result<Vec<u32>, String> {
    let PinPolicy::List(list) = text.parse()? else {
        return Err(format!("'{text}' is no list of CPUs: 0,2-3"));
    };
    // A vCPU for each entry: the check is the same.
    let entries = list.len() as u32;
    let pinning = cores::pin(&PinPolicy::List(list), entries, host)?;
    Ok(pinning.cpus.concat())
}

/// Returns the board's command line, with the console that has the terminal, and the root file
/// system if the first disk has one.
fn default_cmdline(board: &str, devices: &[Wanted]) -> String {
    let mut words = vec![board];
    // The root file system comes last.
    words.extend(devices.iter().rev().filter_map(|device| device.cmdline()));
    words.join(" ")
}

/// Rejects a command line that the kernel would truncate or misread.
fn check_cmdline(cmdline: &str) -> Result<()> {
    Cmdline::new(CMDLINE_MAX)
        .and_then(|mut checked| checked.insert_str(cmdline))
        .map_err(|cause| {
            let most = CMDLINE_MAX - 1;
            anyhow!("--cmdline: {cause} Use at most {most} bytes of printable ASCII")
        })
}

/// Returns the kernel's header, with an estimate of its memory size if the header does not give it.
#[must_use]
pub fn sized_header(kernel: &Kernel) -> Header {
    let mut header = kernel.header().clone();
    if let Header::Arm64(image) = &mut header {
        image.image_size = kernel.memory_size();
    }
    header
}

/// Gets the random seeds of one start of the guest from the host's kernel.
///
/// # Errors
/// A kernel without `getrandom`.
pub fn fresh_seeds() -> Result<Seeds> {
    Ok(Seeds {
        kaslr: u64::from_be_bytes(random()?),
        rng: random()?,
    })
}

/// Gets the random bytes of a generation of the guest from the host's kernel.
///
/// # Errors
/// As [`fresh_seeds`].
pub fn fresh_generation() -> Result<generation::Random> {
    random()
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let rest = &mut bytes[filled..];
        let none = rustix::rand::GetRandomFlags::empty();
        filled += uninterrupted(|| rustix::rand::getrandom(&mut *rest, none))
            .context("cannot get random numbers for the guest's seeds")?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host;
    use armlet_arch::aarch64::Aarch64;

    fn read_here(args: &MachineArgs, chosen: Chosen) -> Result<Config<Aarch64>> {
        let cores = chosen.board.host.cores();
        read::<Aarch64>(args, chosen, &cores, None)
    }

    fn refused(args: MachineArgs) -> String {
        let board = board(&args, None, "virt", &host::this()).expect("the default board");
        let error = read_here(&args, board).expect_err("to be refused");
        assert_eq!(armlet_system::status::status_of(&error), Status::Usage);
        let line = format!("{error:#}");
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn flags_win_over_the_board() {
        let args = MachineArgs {
            cpus: Some("3".to_owned()),
            cmdline: Some("quiet".to_owned()),
            ..MachineArgs::default()
        };
        let config = read_here(
            &args,
            board(&args, Some("rpi5"), "virt", &host::this()).expect("a board"),
        )
        .expect("valid");
        assert_eq!(config.request.cpus, 3);
        assert_eq!(config.request.cmdline, "quiet");
        assert_eq!(config.request.memory, 1 << 30);
        let from = |name: &str| {
            let mut settings = config.settings.iter();
            let setting = settings.find(|setting| setting.name == name);
            setting.map(|setting| setting.from.as_str())
        };
        assert_eq!(from("vCPUs"), Some("--cpus"));
        assert_eq!(from("memory"), Some("board rpi5"));
        assert_eq!(from("GIC"), Some("default"));
        assert_eq!(from("board"), Some("--host"));
    }

    #[test]
    fn bad_values_are_refused_by_the_flag_that_holds_them() {
        let with = |set: fn(&mut MachineArgs)| {
            let mut args = MachineArgs::default();
            set(&mut args);
            refused(args)
        };
        assert!(with(|args| args.cpus = Some("two".into())).contains("--cpus"));
        assert!(with(|args| args.memory = Some("lots".into())).contains("--memory"));
        assert!(with(|args| args.ipa_bits = Some("53".into())).contains("32 to 52"));
        assert!(with(|args| args.gic = Some("4".into())).contains("--gic"));
        assert!(with(|args| args.pmu = Some("yes".into())).contains("--pmu: 'yes'"));
        assert!(with(|args| args.pin = Some("all".into())).contains("--pin"));
        assert!(with(|args| args.pin = Some("1,2".into())).contains("1 vCPU"));
        assert!(with(|args| args.pin_io = Some("auto".into())).contains("--pin-io"));
        assert!(with(|args| args.hugepages = Some("3M".into())).contains("--hugepages"));
        assert!(with(|args| args.memory = Some("1536".into())).contains("1536M"));
        let device = |name: &str, texts: &[&str]| {
            let kind = open::KINDS.iter().find(|kind| kind.name == name);
            let kind = kind.expect("a kind");
            let given = texts.iter().map(|text| (*kind, (*text).to_owned()));
            MachineArgs {
                devices: given.collect(),
                ..MachineArgs::default()
            }
        };
        for (name, texts, why) in [
            (
                "balloon",
                &["size=9G"] as &[&str],
                "leaves nothing of the guest's",
            ),
            ("balloon", &["size=512"], "use 512M"),
            ("balloon", &["big"], "--balloon"),
            ("net", &["tap=a-name-of-16-bytes"], "--net"),
            (
                "vsock",
                &[&format!("cid=3,uds=/{}", "v".repeat(100))],
                "--vsock",
            ),
            ("disk", &["a,id=x", "b,id=x"], "have one id=x"),
            (
                "share",
                &["tag=a,path=/", "tag=a,path=/x"],
                "have one tag=a",
            ),
            ("rng", &["maybe"], "use on, off or limits"),
            ("console", &["hvc0"], "use --console virtio"),
        ] {
            let line = refused(device(name, texts));
            assert!(line.contains(why), "{name} {texts:?}: {line}");
        }
        let merged = MachineArgs {
            mergeable: true,
            ..device("share", &["tag=a,path=/"])
        };
        assert!(refused(merged).contains("--mergeable"));
        assert!(with(|args| args.cmdline = Some("\u{1}".into())).contains("--cmdline"));
        assert!(with(|args| args.cmdline = Some("x".repeat(2048))).contains("--cmdline"));
        assert!(with(|args| args.initrd = Some("/dev/null".into())).contains("--kernel"));
        assert!(with(|args| args.kernel = Some("/nonexistent".into())).contains("/nonexistent"));
    }

    #[test]
    fn a_guest_of_clients_has_vmgenid_unless_somebody_says_no() {
        let has = |board: &str, option: Option<&str>| {
            let args = MachineArgs {
                vmgenid: option.map(str::to_owned),
                ..MachineArgs::default()
            };
            let chosen = board_of(&args, board);
            let mut config = read_here(&args, chosen).expect("valid");
            let before = config.request.vmgenid;
            config.expect_clients();
            (before, config.request.vmgenid)
        };
        assert_eq!(has("virt", None), (false, true));
        assert_eq!(has("virt", Some("on")), (true, true));
        assert_eq!(has("virt", Some("off")), (false, false));
        assert_eq!(has("firecracker", None), (true, true));
        assert_eq!(has("firecracker", Some("off")), (false, false));
        // It has no interrupt for it, and nobody insists.
        assert_eq!(has("./tests/boards/highbank.toml", None), (false, false));
    }

    fn board_of(args: &MachineArgs, name: &str) -> Chosen {
        board(args, Some(name), "virt", &host::this()).expect("a board")
    }

    #[test]
    fn seeds_are_fresh() {
        assert_ne!(
            fresh_seeds().expect("random"),
            fresh_seeds().expect("random")
        );
        assert_ne!(
            fresh_generation().expect("random"),
            fresh_generation().expect("random")
        );
    }
}
