//! What a request is: by method and path, with its body read.

use crate::http::{Answer, Method, Request};
use crate::model::{
    Action, ActionType, Balloon, BalloonHint, BalloonPatch, BalloonStatistics, BootSource,
    CpuConfig, Drive, DrivePatch, Entropy, HintStart, HotplugMemory, HotplugPatch, Logger,
    MachineConfig, MachineConfigUpdate, Metrics, MmdsConfig, MmdsVersion, NetPatch,
    NetworkInterface, Pmem, PmemPatch, Serial, SnapshotCreate, SnapshotLoad, VmPatch, VmState,
    Vsock,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A request that says something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// `GET /`.
    Instance,
    /// `GET /version`.
    Version,
    /// `GET /vm/config`.
    Configuration,
    /// `GET /machine-config`.
    Machine,
    /// `GET /mmds`.
    Mmds,
    /// `GET /balloon`.
    Balloon,
    /// `GET /balloon/statistics`.
    BalloonStatistics,
    /// `GET /balloon/hinting/status`.
    HintingStatus,
    /// `GET /hotplug/memory`.
    Hotplug,
    /// `PUT /actions`.
    Act(ActionType),
    /// `PUT /balloon`.
    PutBalloon(Balloon),
    /// `PUT /boot-source`.
    PutBootSource(BootSource),
    /// `PUT /cpu-config`.
    PutCpuConfig(CpuConfig),
    /// `PUT /drives/{id}`.
    PutDrive(Drive),
    /// `PUT /logger`.
    PutLogger(Logger),
    /// `PUT /machine-config`.
    PutMachine(MachineConfig),
    /// `PUT /metrics`.
    PutMetrics(Metrics),
    /// `PUT /mmds`.
    PutMmds(Value),
    /// `PUT /mmds/config`.
    PutMmdsConfig(MmdsConfig),
    /// `PUT /network-interfaces/{id}`.
    PutInterface(NetworkInterface),
    /// `PUT /pmem/{id}`.
    PutPmem(Pmem),
    /// `PUT /serial`.
    PutSerial(Serial),
    /// `PUT /vsock`.
    PutVsock(Vsock),
    /// `PUT /entropy`.
    PutEntropy(Entropy),
    /// `PUT /hotplug/memory`.
    PutHotplug(HotplugMemory),
    /// `PUT /snapshot/create`.
    CreateSnapshot(SnapshotCreate),
    /// `PUT /snapshot/load`.
    LoadSnapshot(Box<SnapshotLoad>),
    /// `PATCH /balloon`.
    PatchBalloon(BalloonPatch),
    /// `PATCH /balloon/statistics`.
    PatchBalloonStatistics(BalloonStatistics),
    /// `PATCH /balloon/hinting/start` and `stop`.
    Hint(BalloonHint),
    /// `PATCH /drives/{id}`.
    PatchDrive(DrivePatch),
    /// `PATCH /machine-config`.
    PatchMachine(MachineConfigUpdate),
    /// `PATCH /mmds`.
    PatchMmds(Value),
    /// `PATCH /network-interfaces/{id}`.
    PatchInterface(NetPatch),
    /// `PATCH /pmem/{id}`.
    PatchPmem(PmemPatch),
    /// `PATCH /hotplug/memory`.
    PatchHotplug(HotplugPatch),
    /// `PATCH /vm`.
    PatchVm(VmState),
    /// `DELETE` of a drive, an interface or persistent memory.
    Delete,
}

/// A request that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routed {
    /// What it says.
    pub call: Call,
    /// Whether it uses what will go away.
    pub deprecated: bool,
}

/// Why a request says nothing.
type Wrong = String;

/// Reads a request.
///
/// # Errors
/// The answer, for what is no request of this interface.
pub fn route(request: &Request) -> Result<Routed, Answer> {
    let path: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
    let path = match path.split_last() {
        // A path may end with a slash.
        Some((&"", path)) if !path.is_empty() => path,
        _ => &path[..],
    };
    let (first, rest) = path.split_first().unwrap_or((&"", &[]));
    let second = rest.first().copied();
    let body = request.body.as_deref();
    let read = match (request.method, body) {
        (Method::Get, Some(_)) => Err("GET request cannot have a body.".to_owned()),
        (Method::Get, None) => get(first, rest),
        (Method::Delete, Some(_)) => Err("Empty Delete request.".to_owned()),
        (Method::Delete, None) => match *first {
            "drives" | "pmem" | "network-interfaces" => id(second).map(|_| Call::Delete),
            _ => Err(unknown(request.method, first)),
        },
        (Method::Patch, body) if *first == "balloon" && second == Some("hinting") => {
            hinting(rest, body)
        }
        (Method::Put, None) => Err("Empty PUT request.".to_owned()),
        (Method::Patch, None) => Err("Empty PATCH request.".to_owned()),
        (Method::Put, Some(body)) => put(first, second, body),
        (Method::Patch, Some(body)) => patch(first, second, body),
    };
    let call = read.map_err(Answer::fault)?;
    Ok(Routed {
        deprecated: is_deprecated(&call),
        call,
    })
}

fn unknown(method: Method, first: &str) -> Wrong {
    format!(
        "Invalid request method and/or path: {} {first}.",
        method.name()
    )
}

/// An ID of a path: letters, digits and underscores.
fn id(segment: Option<&str>) -> Result<&str, Wrong> {
    let id = segment.unwrap_or_default();
    if id.is_empty() {
        return Err("The ID cannot be empty.".to_owned());
    }
    let is_id = |letter: char| letter == '_' || letter.is_alphanumeric();
    match id.chars().all(is_id) {
        true => Ok(id),
        false => Err(
            "API Resource IDs can only contain alphanumeric characters and underscores.".to_owned(),
        ),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Wrong> {
    serde_json::from_slice(body).map_err(|error| {
        format!("An error occurred when deserializing the json body of a request: {error}.")
    })
}

/// Reads a body that repeats the ID of its path; `differ` says that it has another.
fn of_id<T: DeserializeOwned>(
    segment: Option<&str>,
    body: &[u8],
    of: fn(&T) -> &str,
    differ: fn(&str, &str) -> Wrong,
) -> Result<T, Wrong> {
    let id = id(segment)?;
    let value: T = json(body)?;
    match of(&value) {
        same if same == id => Ok(value),
        other => Err(differ(id, other)),
    }
}

fn differ(_: &str, _: &str) -> Wrong {
    "The id from the path does not match the id from the body!".to_owned()
}

/// As [`differ`], for interfaces, of which the original says more.
fn differ_of_interface(path: &str, body: &str) -> Wrong {
    format!("The id from the path [{path}] does not match the id from the body [{body}]!")
}

fn get(first: &str, rest: &[&str]) -> Result<Call, Wrong> {
    Ok(match (first, rest) {
        ("", _) => Call::Instance,
        ("version", _) => Call::Version,
        ("vm", ["config", ..]) => Call::Configuration,
        ("machine-config", _) => Call::Machine,
        ("mmds", _) => Call::Mmds,
        ("balloon", []) => Call::Balloon,
        ("balloon", ["statistics", ..]) => Call::BalloonStatistics,
        ("balloon", ["hinting", "status", ..]) => Call::HintingStatus,
        ("balloon", rest) => {
            return Err(format!(
                "Unrecognized GET request path `{}`.",
                rest.join("/")
            ));
        }
        ("hotplug", ["memory", ..]) => Call::Hotplug,
        (first, _) => return Err(unknown(Method::Get, first)),
    })
}

fn put(first: &str, second: Option<&str>, body: &[u8]) -> Result<Call, Wrong> {
    Ok(match (first, second) {
        ("actions", _) => Call::Act(json::<Action>(body)?.action_type),
        ("balloon", _) => Call::PutBalloon(json(body)?),
        ("boot-source", _) => Call::PutBootSource(json(body)?),
        ("cpu-config", _) => Call::PutCpuConfig(json(body)?),
        ("drives", id) => Call::PutDrive(of_id(id, body, |drive: &Drive| &drive.drive_id, differ)?),
        ("logger", _) => Call::PutLogger(json(body)?),
        ("machine-config", _) => Call::PutMachine(json(body)?),
        ("metrics", _) => Call::PutMetrics(json(body)?),
        ("mmds", None) => Call::PutMmds(json(body)?),
        ("mmds", Some("config")) => Call::PutMmdsConfig(json(body)?),
        ("mmds", Some(other)) => return Err(format!("Unrecognized PUT request path `{other}`.")),
        ("network-interfaces", id) => {
            let interface = of_id(
                id,
                body,
                |net: &NetworkInterface| &net.iface_id,
                differ_of_interface,
            )?;
            Call::PutInterface(interface)
        }
        ("pmem", id) => Call::PutPmem(of_id(id, body, |pmem: &Pmem| &pmem.id, differ)?),
        ("serial", _) => Call::PutSerial(json(body)?),
        ("snapshot", None) => return Err("Missing snapshot operation type.".to_owned()),
        ("snapshot", Some("create")) => Call::CreateSnapshot(json(body)?),
        ("snapshot", Some("load")) => Call::LoadSnapshot(Box::new(snapshot(body)?)),
        ("snapshot", Some(other)) => {
            return Err(format!(
                "Invalid request method and/or path: PUT /snapshot/{other}."
            ));
        }
        ("vsock", _) => Call::PutVsock(json(body)?),
        ("entropy", _) => Call::PutEntropy(json(body)?),
        ("hotplug", Some("memory")) => Call::PutHotplug(json(body)?),
        (first, _) => return Err(unknown(Method::Put, first)),
    })
}

fn snapshot(body: &[u8]) -> Result<SnapshotLoad, Wrong> {
    let load: SnapshotLoad = json(body)?;
    let what = match (&load.mem_backend, &load.mem_file_path) {
        (None, None) => "missing field: either `mem_backend` or `mem_file_path` is required",
        (Some(_), Some(_)) => {
            "too many fields: either `mem_backend` or `mem_file_path` exclusively is required"
        }
        _ => return Ok(load),
    };
    Err(format!(
        "An error occurred when deserializing the json body of a request: {what}."
    ))
}

fn patch(first: &str, second: Option<&str>, body: &[u8]) -> Result<Call, Wrong> {
    Ok(match (first, second) {
        ("balloon", Some("statistics")) => Call::PatchBalloonStatistics(json(body)?),
        ("balloon", _) => Call::PatchBalloon(json(body)?),
        ("drives", id) => Call::PatchDrive(of_id(
            id,
            body,
            |patch: &DrivePatch| &patch.drive_id,
            differ,
        )?),
        ("machine-config", _) => {
            let update: MachineConfigUpdate = json(body)?;
            if update == MachineConfigUpdate::default() {
                return Err("Empty PATCH request.".to_owned());
            }
            Call::PatchMachine(update)
        }
        ("mmds", _) => Call::PatchMmds(json(body)?),
        ("network-interfaces", id) => Call::PatchInterface(of_id(
            id,
            body,
            |net: &NetPatch| &net.iface_id,
            differ_of_interface,
        )?),
        ("pmem", id) => Call::PatchPmem(of_id(id, body, |patch: &PmemPatch| &patch.id, differ)?),
        ("hotplug", Some("memory")) => Call::PatchHotplug(json(body)?),
        ("vm", _) => Call::PatchVm(json::<VmPatch>(body)?.state),
        (first, _) => return Err(unknown(Method::Patch, first)),
    })
}

/// `PATCH /balloon/hinting/...`, which may have no body.
fn hinting(rest: &[&str], body: Option<&[u8]>) -> Result<Call, Wrong> {
    match rest {
        ["hinting", "start", ..] => {
            let start: HintStart = body.map_or_else(|| Ok(HintStart::default()), json)?;
            Ok(Call::Hint(BalloonHint::Start(start.acknowledge_on_stop)))
        }
        ["hinting", "stop", ..] => Ok(Call::Hint(BalloonHint::Stop)),
        rest => Err(format!(
            "Unrecognized PATCH request path `/{}`.",
            rest.join("/")
        )),
    }
}

fn is_deprecated(call: &Call) -> bool {
    match call {
        Call::PutMachine(config) => config.cpu_template.is_some(),
        Call::PatchMachine(update) => update.cpu_template.is_some(),
        Call::PutVsock(vsock) => vsock.vsock_id.is_some(),
        Call::PutMmdsConfig(config) => config.version == MmdsVersion::V1,
        Call::LoadSnapshot(load) => {
            load.mem_file_path.is_some() || load.enable_diff_snapshots.is_some()
        }
        _ => false,
    }
}
