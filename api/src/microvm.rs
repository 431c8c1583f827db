//! A microVM as it was configured, and the rules of what may be asked of it when.

use crate::host::{Machine, Resources};
use crate::http::{Answer, Request};
use crate::mmds::{self, Store};
use crate::model::{
    ActionType, Balloon, BootSource, CpuConfig, CpuTemplate, Drive, Entropy, HotplugMemory,
    HugePages, Limits, MachineConfig, MachineConfigUpdate, MmdsConfig, NetworkInterface, Pmem,
    Serial, VmState, Vsock,
};
use crate::route::{Call, Routed, route};
use serde::Serialize;
use serde_json::json;

/// The most vCPUs.
const CPUS: u8 = 32;
/// The most bytes of a kernel command line.
const CMDLINE: usize = 2047;
/// The sizes of packets that an interface may have.
const MTUS: std::ops::RangeInclusive<u16> = 68..=u16::MAX;

/// What comes of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// An answer.
    Answer(Answer),
    /// The machine is to be started; the answer depends on how that goes.
    Start,
    /// An answer, after which there is nothing to serve any more.
    End(Answer),
}

/// What clients are told of this program, and what its host's architecture has.
#[derive(Clone, Debug)]
pub struct Identity {
    /// `--id`.
    pub id: String,
    /// The version.
    pub version: &'static str,
    /// Whether the host is of x86_64, where two vCPUs can be threads of a core.
    pub is_x86: bool,
}

/// A microVM.
pub struct Microvm {
    identity: Identity,
    has_metrics: bool,
    /// The machine.
    pub machine: MachineConfig,
    /// What it boots.
    pub boot: Option<BootSource>,
    /// Its drives; the one with the root file system first.
    pub drives: Vec<Drive>,
    /// Its network interfaces.
    pub interfaces: Vec<NetworkInterface>,
    /// Its vsock.
    pub vsock: Option<Vsock>,
    /// Its balloon.
    pub balloon: Option<Balloon>,
    /// Its random numbers.
    pub entropy: Option<Entropy>,
    /// Its persistent memory.
    pub pmem: Vec<Pmem>,
    /// Its serial port.
    pub serial: Serial,
    /// What its vCPUs show.
    pub cpu: Option<CpuConfig>,
    /// Where it finds metadata.
    pub mmds_config: Option<MmdsConfig>,
    /// Its metadata.
    pub mmds: Store,
}

/// `GET /vm/config`, in the order of the original.
#[derive(Serialize)]
struct Configuration<'a> {
    balloon: &'a Option<Balloon>,
    drives: &'a [Drive],
    #[serde(rename = "boot-source")]
    boot: &'a BootSource,
    #[serde(rename = "cpu-config")]
    cpu: (),
    logger: (),
    #[serde(rename = "machine-config")]
    machine: &'a MachineConfig,
    metrics: (),
    #[serde(rename = "mmds-config")]
    mmds: &'a Option<MmdsConfig>,
    #[serde(rename = "network-interfaces")]
    interfaces: &'a [NetworkInterface],
    vsock: &'a Option<Vsock>,
    entropy: &'a Option<Entropy>,
    pmem: &'a [Pmem],
    #[serde(rename = "memory-hotplug")]
    hotplug: Option<HotplugMemory>,
}

/// What a call does, or why not.
type Done = Result<Answer, Answer>;

fn fault(prefix: &str, why: impl std::fmt::Display) -> Answer {
    Answer::fault(format!("{prefix}: {why}"))
}

impl Microvm {
    /// One that nothing is known of, with room for `mmds` bytes of metadata.
    #[must_use]
    pub fn new(identity: Identity, mmds: usize) -> Microvm {
        Microvm {
            identity,
            has_metrics: false,
            machine: MachineConfig::default(),
            boot: None,
            drives: Vec::new(),
            interfaces: Vec::new(),
            vsock: None,
            balloon: None,
            entropy: None,
            pmem: Vec::new(),
            serial: Serial::default(),
            cpu: None,
            mmds_config: None,
            mmds: Store::new(mmds),
        }
    }

    /// Carries out a request before the machine runs.
    pub fn handle(&mut self, request: &Request, host: &mut dyn Resources) -> Step {
        match route(request) {
            Ok(routed) => self.configure(routed, host),
            Err(answer) => Step::Answer(answer),
        }
    }

    /// Carries out a request while the machine runs.
    pub fn handle_running(&mut self, request: &Request, machine: &mut dyn Machine) -> Answer {
        match route(request) {
            Ok(Routed { call, deprecated }) => Answer {
                deprecated,
                ..self.control(call, machine).unwrap_or_else(|fault| fault)
            },
            Err(answer) => answer,
        }
    }

    /// Carries out what a request says before the machine runs.
    pub fn configure(&mut self, routed: Routed, host: &mut dyn Resources) -> Step {
        let Routed { call, deprecated } = routed;
        if call == Call::Act(ActionType::InstanceStart) {
            if self.boot.is_some() {
                return Step::Start;
            }
            let why = "Cannot start microvm without kernel configuration.";
            return Step::Answer(fault("Start microvm error", why));
        }
        if let Call::LoadSnapshot(load) = call {
            return self.load(&load, deprecated, host);
        }
        Step::Answer(Answer {
            deprecated,
            ..self.set(call, host).unwrap_or_else(|fault| fault)
        })
    }

    /// What can be asked before the start and after it.
    fn look(&self, call: &Call, is_paused: Option<bool>) -> Option<Answer> {
        let state = match is_paused {
            None => "Not started",
            Some(false) => "Running",
            Some(true) => "Paused",
        };
        Some(match call {
            Call::Instance => {
                #[derive(Serialize)]
                struct Instance<'a> {
                    id: &'a str,
                    state: &'a str,
                    vmm_version: &'a str,
                    app_name: &'a str,
                }
                Answer::with(&Instance {
                    id: &self.identity.id,
                    state,
                    vmm_version: self.identity.version,
                    app_name: "Firecracker",
                })
            }
            Call::Version => Answer::with(&json!({ "firecracker_version": self.identity.version })),
            Call::Configuration => Answer::with(&self.configuration()),
            Call::Machine => Answer::with(&self.machine),
            Call::Mmds => Answer::with(&self.mmds.get()),
            Call::Balloon => match &self.balloon {
                Some(balloon) => Answer::with(balloon),
                None => fault("Balloon config error", "No balloon device found."),
            },
            _ => return None,
        })
    }

    /// How it was configured.
    fn configuration(&self) -> Configuration<'_> {
        Configuration {
            balloon: &self.balloon,
            drives: &self.drives,
            boot: self.boot.as_ref().unwrap_or(&NO_BOOT),
            cpu: (),
            logger: (),
            machine: &self.machine,
            metrics: (),
            mmds: &self.mmds_config,
            interfaces: &self.interfaces,
            vsock: &self.vsock,
            entropy: &self.entropy,
            pmem: &self.pmem,
            hotplug: None,
        }
    }

    fn set(&mut self, call: Call, host: &mut dyn Resources) -> Done {
        if let Some(answer) = self.look(&call, None) {
            return Ok(answer);
        }
        match call {
            Call::PutMachine(config) => self.put_machine(config)?,
            Call::PatchMachine(update) => {
                let config = patched(&self.machine, update);
                self.put_machine(config)?;
            }
            Call::PutBootSource(source) => {
                let wrong = |why: String| fault("Boot source error", why);
                host.check_boot_source(&source).map_err(wrong)?;
                let words = source.boot_args.as_deref().unwrap_or_default();
                if words.len() > CMDLINE {
                    let why =
                        "The kernel command line is invalid: Invalid cmdline capacity provided.";
                    return Err(fault("Boot source error", why));
                }
                self.boot = Some(source);
            }
            Call::PutDrive(drive) => self.put_drive(drive, host)?,
            Call::PutInterface(interface) => self.put_interface(interface, host)?,
            Call::PutVsock(vsock) => {
                host.bind_vsock(&vsock).map_err(|why| {
                    let what = "Cannot create backend for vsock device";
                    fault("Vsock config error", format!("{what}: {why}"))
                })?;
                self.vsock = Some(vsock);
            }
            Call::PutBalloon(balloon) => {
                if balloon.amount_mib as usize > self.machine.mem_size_mib {
                    let why = "Amount of pages requested is too large.";
                    return Err(fault("Balloon config error", why));
                }
                self.balloon = Some(balloon);
            }
            Call::PutEntropy(entropy) => {
                self.entropy = Some(Entropy {
                    rate_limiter: Limits::in_force(entropy.rate_limiter),
                });
            }
            Call::PutPmem(mut pmem) => {
                pmem.rate_limiter = Limits::in_force(pmem.rate_limiter);
                replace(&mut self.pmem, pmem, |pmem| &pmem.id);
            }
            Call::PutSerial(serial) => self.serial = serial,
            Call::PutCpuConfig(config) => {
                let checked = config.check(self.identity.is_x86);
                checked.map_err(Answer::fault)?;
                self.cpu = Some(config);
            }
            Call::PutLogger(logger) => {
                let wrong = |why| fault("Logger error", why);
                host.configure_logger(&logger).map_err(wrong)?;
            }
            Call::PutMetrics(metrics) => {
                let what = "Cannot initialize the metrics system due to bad user input";
                let wrong = |why: &str| fault("Metrics error", format!("{what}: {why}"));
                if self.has_metrics {
                    return Err(wrong("Reinitialization of metrics not allowed."));
                }
                host.configure_metrics(&metrics)
                    .map_err(|why| wrong(&why))?;
                self.has_metrics = true;
            }
            Call::PutMmdsConfig(config) => self.put_mmds_config(config)?,
            Call::PutMmds(data) => self.mmds.put(data)?,
            Call::PatchMmds(data) => self.mmds.patch(&data)?,
            Call::PutHotplug(hotplug) => {
                let why = hotplug.fault();
                let why = why.unwrap_or_else(|| NO_HOTPLUG.to_owned());
                return Err(fault("Memory hotplug config error", why));
            }
            _ => {
                return Err(Answer::fault(
                    "The requested operation is not supported before starting the microVM.",
                ));
            }
        }
        Ok(Answer::done())
    }

    fn put_machine(&mut self, config: MachineConfig) -> Result<(), Answer> {
        let wrong = |why: &str| Err(fault("Machine config error", why));
        let cpus = config.vcpu_count;
        let is_odd = config.smt && cpus > 1 && !cpus.is_multiple_of(2);
        if cpus == 0 || cpus > CPUS || is_odd {
            return wrong(
                "The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled.",
            );
        }
        if config.smt && !self.identity.is_x86 {
            return wrong("Enabling simultaneous multithreading is not supported on aarch64.");
        }
        let is_odd = config.huge_pages != HugePages::None && !config.mem_size_mib.is_multiple_of(2);
        if config.mem_size_mib == 0 || is_odd {
            return wrong(
                "The memory size (MiB) is either 0, or not a multiple of the configured page size.",
            );
        }
        if let Some(balloon) = &self.balloon
            && balloon.amount_mib as usize > config.mem_size_mib
        {
            return wrong(
                "The memory size (MiB) is smaller than the previously set balloon device target size.",
            );
        }
        if !CpuTemplate::is_none(&config.cpu_template) {
            return wrong(
                "CPU templates are not offered: vCPUs have what the host's KVM has; leave cpu_template out.",
            );
        }
        self.machine = config;
        Ok(())
    }

    fn put_drive(&mut self, mut drive: Drive, host: &mut dyn Resources) -> Result<(), Answer> {
        let wrong = |why: String| fault("Drive config error", why);
        let created = |why: String| {
            let what = "Unable to create the virtio block device";
            wrong(format!("{what}: {why}"))
        };
        let others = self.drives.iter();
        let mut others = others.filter(|other| other.drive_id != drive.drive_id);
        if drive.is_root_device && others.any(|other| other.is_root_device) {
            return Err(wrong("A root block device already exists!".to_owned()));
        }
        if drive.path_on_host.is_some() == drive.socket.is_some() {
            return Err(created("Invalid block config.".to_owned()));
        }
        host.check_drive(&drive).map_err(created)?;
        drive.rate_limiter = Limits::in_force(drive.rate_limiter);
        let is_root = drive.is_root_device;
        let id = drive.drive_id.clone();
        replace(&mut self.drives, drive, |drive| &drive.drive_id);
        if is_root {
            let mut drives = self.drives.iter();
            if let Some(at) = drives.position(|drive| drive.drive_id == id) {
                self.drives[..=at].rotate_right(1);
            }
        }
        Ok(())
    }

    fn put_interface(
        &mut self,
        mut interface: NetworkInterface,
        host: &mut dyn Resources,
    ) -> Result<(), Answer> {
        let wrong = |why: String| fault("Network config error", why);
        let created = |why: String| {
            let what = "Could not create the network device";
            wrong(format!("{what}: {why}"))
        };
        let others = self.interfaces.iter();
        let others = others.filter(|other| other.iface_id != interface.iface_id);
        if let Some(mac) = interface.guest_mac {
            let mut macs = others.clone().filter_map(|other| other.guest_mac);
            if macs.any(|other| other == mac) {
                return Err(wrong(format!("The MAC address is already in use: {mac}")));
            }
        }
        if let Some(mtu) = interface.mtu
            && !MTUS.contains(&mtu)
        {
            let (least, most) = (MTUS.start(), MTUS.end());
            return Err(created(format!(
                "MTU {mtu} is out of range [{least}, {most}]"
            )));
        }
        host.open_tap(&interface).map_err(created)?;
        interface.rx_rate_limiter = Limits::in_force(interface.rx_rate_limiter);
        interface.tx_rate_limiter = Limits::in_force(interface.tx_rate_limiter);
        replace(&mut self.interfaces, interface, |net| &net.iface_id);
        Ok(())
    }

    fn put_mmds_config(&mut self, config: MmdsConfig) -> Result<(), Answer> {
        let wrong = |why| Err(fault("MMMDS config error", why));
        if config.network_interfaces.is_empty() {
            return wrong(
                "The list of network interface IDs that allow forwarding MMDS requests is empty.",
            );
        }
        let mut named = config.network_interfaces.iter();
        let known = |id: &String| self.interfaces.iter().any(|net| net.iface_id == *id);
        if !named.all(known) {
            return wrong(
                "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface.",
            );
        }
        if !config.ipv4_address.is_link_local() {
            return wrong("The MMDS IPv4 address is not link local.");
        }
        self.mmds_config = Some(config);
        Ok(())
    }

    fn control(&mut self, call: Call, host: &mut dyn Machine) -> Done {
        let is_paused = host.is_paused().map_err(Answer::fault)?;
        if let Some(answer) = self.look(&call, Some(is_paused)) {
            return Ok(answer);
        }
        match call {
            Call::Act(ActionType::FlushMetrics) => {
                let wrong = |why| fault("Flush metrics error", why);
                host.flush_metrics().map_err(wrong)?;
            }
            Call::Act(ActionType::SendCtrlAltDel) => {
                host.press_power_key().map_err(Answer::fault)?;
            }
            Call::PatchVm(state) => host
                .set_paused(state == VmState::Paused)
                .map_err(Answer::fault)?,
            Call::PutDrive(_) | Call::PutInterface(_) | Call::PutPmem(_) | Call::Delete => {
                return Err(Answer::fault("PCI is not enabled"));
            }
            Call::PatchDrive(patch) => {
                let wrong = |why: &str| {
                    let what = "Unable to patch the block device";
                    let end = "Please verify the request arguments.";
                    fault("Drive config error", format!("{what}: {why} {end}"))
                };
                let mut ids = self.drives.iter().map(|drive| &drive.drive_id);
                let Some(index) = ids.position(|id| *id == patch.drive_id) else {
                    return Err(wrong(NO_DEVICE));
                };
                if patch.path_on_host.is_none() && patch.rate_limiter.is_none() {
                    return Err(wrong("Block: Running method expected different backend."));
                }
                host.change_drive(index, &patch)
                    .map_err(|why| wrong(&why))?;
                let drive = &mut self.drives[index];
                if patch.path_on_host.is_some() {
                    drive.path_on_host = patch.path_on_host;
                }
                if patch.rate_limiter.is_some() {
                    drive.rate_limiter = Limits::in_force(patch.rate_limiter);
                }
            }
            Call::PatchInterface(patch) => {
                let what = "Unable to update the net device";
                let wrong = |why: &str| fault("Network config error", format!("{what}: {why}"));
                let mut ids = self.interfaces.iter().map(|net| &net.iface_id);
                let Some(index) = ids.position(|id| *id == patch.iface_id) else {
                    return Err(wrong(NO_DEVICE));
                };
                host.change_interface(index, &patch)
                    .map_err(|why| wrong(&why))?;
                let net = &mut self.interfaces[index];
                if patch.rx_rate_limiter.is_some() {
                    net.rx_rate_limiter = Limits::in_force(patch.rx_rate_limiter);
                }
                if patch.tx_rate_limiter.is_some() {
                    net.tx_rate_limiter = Limits::in_force(patch.tx_rate_limiter);
                }
            }
            Call::PatchPmem(patch) => {
                let wrong = |why: &str| fault("Pmem config error", why);
                let mut ids = self.pmem.iter().map(|pmem| &pmem.id);
                let Some(index) = ids.position(|id| *id == patch.id) else {
                    return Err(wrong(NO_DEVICE));
                };
                host.change_pmem(index, &patch).map_err(|why| wrong(&why))?;
                if patch.rate_limiter.is_some() {
                    self.pmem[index].rate_limiter = Limits::in_force(patch.rate_limiter);
                }
            }
            Call::PutMmds(data) => {
                self.has_mmds()?;
                self.mmds.put(data)?;
                host.publish_mmds(&self.mmds.get());
            }
            Call::PatchMmds(data) => {
                self.has_mmds()?;
                self.mmds.patch(&data)?;
                host.publish_mmds(&self.mmds.get());
            }
            Call::CreateSnapshot(create) => {
                let wrong = |why| fault("Create snapshot error", why);
                if !is_paused {
                    let what = "Cannot save the microVM state";
                    let why = "Operation not allowed: save/restore unavailable while running";
                    return Err(wrong(format!("{what}: {why}")));
                }
                let config = serde_json::to_value(self.configuration());
                let config = config.map_err(|error| wrong(error.to_string()))?;
                host.snapshot(&create, config).map_err(wrong)?;
            }
            Call::Hotplug => return Err(fault("Memory hotplug error", NO_HOTPLUG)),
            Call::PatchHotplug(_) => {
                return Err(fault("Memory hotplug update error", NO_HOTPLUG));
            }
            call => return self.control_balloon(call, host),
        }
        Ok(Answer::done())
    }

    fn control_balloon(&mut self, call: Call, host: &mut dyn Machine) -> Done {
        let updated = |why: String| fault("Balloon update error", why);
        let read = |why: String| fault("Balloon config error", why);
        let none = || "No balloon device found.".to_owned();
        match call {
            Call::PatchBalloon(patch) => {
                let balloon = self.balloon.as_mut();
                let balloon = balloon.ok_or_else(|| updated(none()))?;
                host.set_balloon(patch.amount_mib).map_err(updated)?;
                balloon.amount_mib = patch.amount_mib;
            }
            Call::PatchBalloonStatistics(patch) => {
                let balloon = self.balloon.as_mut();
                let balloon = balloon.ok_or_else(|| updated(none()))?;
                let (old, new) = (
                    balloon.stats_polling_interval_s,
                    patch.stats_polling_interval_s,
                );
                if (old == 0) != (new == 0) {
                    let what = "Balloon: Statistics cannot be enabled/disabled after activation.";
                    return Err(updated(what.to_owned()));
                }
                host.set_balloon_interval(new).map_err(updated)?;
                balloon.stats_polling_interval_s = new;
            }
            Call::BalloonStatistics => {
                let balloon = self.balloon.as_ref();
                let balloon = balloon.ok_or_else(|| read(none()))?;
                if balloon.stats_polling_interval_s == 0 {
                    let why = "Statistics for the balloon device are not enabled";
                    return Err(read(why.to_owned()));
                }
                let statistics = host.balloon_statistics().map_err(read)?;
                return Ok(Answer::with(&statistics));
            }
            Call::Hint(hint) => {
                self.has_hinting().map_err(updated)?;
                host.hint(hint).map_err(updated)?;
            }
            Call::HintingStatus => {
                self.has_hinting().map_err(read)?;
                let status = host.hinting_status().map_err(read)?;
                return Ok(Answer::with(&status));
            }
            _ => {
                return Err(Answer::fault(
                    "The requested operation is not supported after starting the microVM.",
                ));
            }
        }
        Ok(Answer::done())
    }

    fn has_hinting(&self) -> Result<(), String> {
        match &self.balloon {
            None => Err("No balloon device found.".to_owned()),
            Some(balloon) if !balloon.free_page_hinting => {
                Err("Balloon: Hinting is not enabled.".to_owned())
            }
            Some(_) => Ok(()),
        }
    }

    fn has_mmds(&self) -> Result<(), Answer> {
        match self.mmds_config.is_some() || self.mmds.is_set() {
            true => Ok(()),
            false => Err(Answer::fault(mmds::NONE)),
        }
    }
}

const NO_DEVICE: &str = "Failed perform action on device: Device not found";
static NO_BOOT: BootSource = BootSource {
    kernel_image_path: String::new(),
    initrd_path: None,
    boot_args: None,
};
const NO_HOTPLUG: &str = "memory hotplug is not offered by this version of armlet";

fn patched(config: &MachineConfig, update: MachineConfigUpdate) -> MachineConfig {
    MachineConfig {
        vcpu_count: update.vcpu_count.unwrap_or(config.vcpu_count),
        mem_size_mib: update.mem_size_mib.unwrap_or(config.mem_size_mib),
        smt: update.smt.unwrap_or(config.smt),
        cpu_template: update.cpu_template.or(config.cpu_template),
        track_dirty_pages: update.track_dirty_pages.unwrap_or(config.track_dirty_pages),
        huge_pages: update.huge_pages.unwrap_or(config.huge_pages),
    }
}

/// Puts a value in the place of the one with its ID, or behind all.
fn replace<T>(values: &mut Vec<T>, value: T, id: fn(&T) -> &str) {
    match values.iter().position(|other| id(other) == id(&value)) {
        Some(at) => values[at] = value,
        None => values.push(value),
    }
}

mod load;
#[cfg(test)]
mod tests;
