//! A machine that goes on from a snapshot.

use super::{Microvm, Step, fault};
use crate::config_file;
use crate::host::Resources;
use crate::http::Answer;
use crate::model::{MachineConfig, NetworkOverride, SnapshotLoad};
use crate::route::Call;
use serde_json::Value;

impl Microvm {
    /// Configures it as the machine of a snapshot was, which is to go on.
    pub(super) fn load(
        &mut self,
        load: &SnapshotLoad,
        deprecated: bool,
        host: &mut dyn Resources,
    ) -> Step {
        let wrong = |why: String| Answer {
            deprecated,
            ..fault("Load snapshot error", why)
        };
        if self.is_configured() {
            let why =
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.";
            return Step::Answer(wrong(why.to_owned()));
        }
        match self.load_configuration(load, host) {
            Ok(()) => Step::Start,
            // As the original: what it was told is of no use any more.
            Err(why) => Step::End(wrong(why)),
        }
    }

    /// Whether anything was configured that a snapshot says itself.
    fn is_configured(&self) -> bool {
        self.boot.is_some()
            || !self.drives.is_empty()
            || !self.interfaces.is_empty()
            || !self.pmem.is_empty()
            || self.vsock.is_some()
            || self.balloon.is_some()
            || self.entropy.is_some()
            || self.machine != MachineConfig::default()
    }

    fn load_configuration(
        &mut self,
        load: &SnapshotLoad,
        host: &mut dyn Resources,
    ) -> Result<(), String> {
        let text = host.open_snapshot(load)?;
        let no_cpu = |path: &str| Err(format!("its vCPUs are described by a file, '{path}'"));
        let mut overrides: Vec<_> = load.network_overrides.iter().collect();
        for mut call in config_file::read(&text, no_cpu)? {
            match &mut call {
                // The guest's memory has it.
                Call::PutBootSource(source) => {
                    self.boot = Some(std::mem::take(source));
                    continue;
                }
                Call::PutInterface(interface) => {
                    let ours = |other: &&NetworkOverride| other.iface_id == interface.iface_id;
                    if let Some(at) = overrides.iter().position(ours) {
                        let other = overrides.swap_remove(at);
                        interface.host_dev_name.clone_from(&other.host_dev_name);
                    }
                }
                Call::PutVsock(vsock) => {
                    if let Some(other) = &load.vsock_override {
                        let path = other.uds_path.to_str();
                        let path = path.ok_or("the vsock's other path is no text")?;
                        path.clone_into(&mut vsock.uds_path);
                    }
                }
                _ => {}
            }
            self.set(call, host).map_err(|answer| {
                let body: Result<Value, _> = serde_json::from_slice(answer.body.as_bytes());
                let why = body.ok().and_then(|body| {
                    let why = body.get("fault_message")?.as_str()?;
                    Some(why.to_owned())
                });
                why.unwrap_or(answer.body)
            })?;
        }
        match overrides.first() {
            None => Ok(()),
            Some(other) => Err(format!("Unknown Network Device: {}", other.iface_id)),
        }
    }
}
