//! The machine, its boot source, its snapshots, and what is told of it.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// `/machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Memory in MiB.
    pub mem_size_mib: usize,
    /// Whether two vCPUs are threads of a core.
    #[serde(default)]
    pub smt: bool,
    /// What the CPU shows of itself; it will go away.
    #[serde(default, skip_serializing_if = "CpuTemplate::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether snapshots may be of what changed only.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The host's pages for guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// `PATCH /machine-config`: what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// Number of vCPUs.
    #[serde(default)]
    pub vcpu_count: Option<u8>,
    /// Memory in MiB.
    #[serde(default)]
    pub mem_size_mib: Option<usize>,
    /// Whether two vCPUs are threads of a core.
    #[serde(default)]
    pub smt: Option<bool>,
    /// What the CPU shows of itself.
    #[serde(default)]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether snapshots may be of what changed only.
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// The host's pages for guest memory.
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
}

/// A template by name. Those of the original for x86_64 come first, that for aarch64 last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// Intel.
    C3,
    /// Intel.
    T2,
    /// Intel.
    T2S,
    /// None.
    None,
    /// Intel.
    T2CL,
    /// AMD.
    T2A,
    /// Neoverse V1 as N1.
    V1N1,
}

impl CpuTemplate {
    /// Whether there is no template.
    // By reference, as serde calls it.
    #[allow(clippy::trivially_copy_pass_by_ref, clippy::ref_option)]
    #[must_use]
    pub fn is_none(template: &Option<CpuTemplate>) -> bool {
        matches!(template, None | Some(CpuTemplate::None))
    }
}

/// The host's pages for guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Small ones.
    #[default]
    None,
    /// Those that the kernel joins.
    Transparent,
    /// Those of the pool.
    #[serde(rename = "2M")]
    Size2M,
}

/// `/boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel.
    pub kernel_image_path: String,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<String>,
    /// The kernel's command line.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// `/cpu-config`, of both architectures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// What KVM has to offer (`"121"`), or need not (`"!121"`), beside what it is asked for anyway.
    #[serde(default)]
    pub kvm_capabilities: Vec<String>,
    /// x86_64: changes to CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Option<Vec<Value>>,
    /// x86_64: changes to MSRs.
    #[serde(default)]
    pub msr_modifiers: Option<Vec<Value>>,
    /// aarch64: changes to registers.
    #[serde(default)]
    pub reg_modifiers: Option<Vec<Value>>,
    /// aarch64: features of vCPUs.
    #[serde(default)]
    pub vcpu_features: Option<Vec<Value>>,
}

impl CpuConfig {
    /// What of it cannot be had: fields of another architecture, as if they were not known, and changes
    /// to what vCPUs show.
    ///
    /// # Errors
    /// That, with the first such field.
    pub fn check(&self, is_x86: bool) -> Result<(), String> {
        let of_x86 = [
            ("cpuid_modifiers", &self.cpuid_modifiers),
            ("msr_modifiers", &self.msr_modifiers),
        ];
        let of_arm = [
            ("reg_modifiers", &self.reg_modifiers),
            ("vcpu_features", &self.vcpu_features),
        ];
        let (ours, others) = match is_x86 {
            true => (of_x86, of_arm),
            false => (of_arm, of_x86),
        };
        if let Some((name, _)) = others.iter().find(|(_, field)| field.is_some()) {
            let what = "An error occurred when deserializing the json body of a request";
            let known = format!("`kvm_capabilities`, `{}`, `{}`", ours[0].0, ours[1].0);
            return Err(format!(
                "{what}: unknown field `{name}`, expected one of {known}."
            ));
        }
        let is_set = |field: &Option<Vec<Value>>| field.as_ref().is_some_and(|all| !all.is_empty());
        match ours.iter().find(|(_, field)| is_set(field)) {
            Some((name, _)) => Err(format!(
                "CPU configuration error: {name} are not offered: vCPUs have what the host's KVM has."
            )),
            None => Ok(()),
        }
    }
}

/// `/logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// What is logged.
    #[serde(default)]
    pub level: Option<Level>,
    /// Whether a line has its level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether a line has the place in the source that it comes from.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Which modules are logged.
    #[serde(default)]
    pub module: Option<String>,
}

/// What is logged: it, and what is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    Off,
    /// Everything.
    Trace,
    /// What helps to debug.
    Debug,
    /// What happens.
    Info,
    /// What may be wrong.
    Warn,
    /// What is wrong.
    Error,
}

impl Level {
    /// Reads a level, in any case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Level> {
        Some(match text.to_ascii_lowercase().as_str() {
            "off" => Level::Off,
            "trace" => Level::Trace,
            "debug" => Level::Debug,
            "info" => Level::Info,
            "warn" | "warning" => Level::Warn,
            "error" => Level::Error,
            _ => return None,
        })
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Level, D::Error> {
        let text = String::deserialize(deserializer)?;
        Level::parse(&text).ok_or_else(|| serde::de::Error::custom("Invalid LevelFilter"))
    }
}

/// `/metrics`. Fields that are not known are none of its business.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Metrics {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
    /// Whether a line has the ID of the machine.
    #[serde(default)]
    pub emit_id: bool,
    /// What each line says besides.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
}

/// `/actions`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// Which.
    pub action_type: ActionType,
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum ActionType {
    /// Write metrics.
    FlushMetrics,
    /// Start the machine.
    InstanceStart,
    /// Have the guest shut down.
    SendCtrlAltDel,
}

/// `PATCH /vm`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    /// What the machine is to do.
    pub state: VmState,
}

/// What a machine can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum VmState {
    /// Pause.
    Paused,
    /// Go on.
    Resumed,
}

/// `/snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Of everything, or of what changed.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The machine's state.
    pub snapshot_path: PathBuf,
    /// Guest memory.
    pub mem_file_path: PathBuf,
}

/// What a snapshot is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SnapshotType {
    /// What changed.
    Diff,
    /// Everything.
    #[default]
    Full,
}

/// `/snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// The machine's state.
    pub snapshot_path: PathBuf,
    /// Guest memory; it will go away.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Guest memory.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// It will go away.
    #[serde(default)]
    pub enable_diff_snapshots: Option<bool>,
    /// Whether snapshots may be of what changed only.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Whether the machine goes on at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other TAPs.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// x86_64: whether the guest's clock follows the host's.
    #[serde(default)]
    pub clock_realtime: bool,
    /// The host's pages for guest memory.
    #[serde(default)]
    pub huge_pages: Option<String>,
}

/// Where guest memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// How.
    pub backend_type: BackendType,
    /// Its file or socket.
    pub backend_path: PathBuf,
}

/// How guest memory comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum BackendType {
    /// It is a file.
    File,
    /// A process fills it in.
    Uffd,
}

/// Another TAP for an interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
}

/// Another socket for the vsock.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: PathBuf,
}
