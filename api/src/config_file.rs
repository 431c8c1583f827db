//! `--config-file`: everything that would be configured by requests, at once.

use crate::model::{
    Balloon, BootSource, CpuConfig, Drive, Entropy, HotplugMemory, Logger, MachineConfig, Metrics,
    MmdsConfig, NetworkInterface, Pmem, Serial, Vsock,
};
use crate::route::Call;
use serde::Deserialize;

/// The file. Keys that are not known are none of its business.
#[derive(Debug, Deserialize)]
struct File {
    #[serde(rename = "boot-source")]
    boot: BootSource,
    drives: Vec<Drive>,
    balloon: Option<Balloon>,
    #[serde(rename = "cpu-config")]
    cpu: Option<Cpu>,
    logger: Option<Logger>,
    #[serde(rename = "machine-config")]
    machine: Option<MachineConfig>,
    metrics: Option<Metrics>,
    #[serde(rename = "mmds-config")]
    mmds: Option<MmdsConfig>,
    #[serde(rename = "network-interfaces", default)]
    interfaces: Vec<NetworkInterface>,
    vsock: Option<Vsock>,
    entropy: Option<Entropy>,
    #[serde(default)]
    pmem: Vec<Pmem>,
    serial: Option<Serial>,
    #[serde(rename = "memory-hotplug")]
    hotplug: Option<HotplugMemory>,
}

/// Where the vCPUs' configuration is.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Cpu {
    File(String),
    Here(CpuConfig),
}

/// Reads the text of a file into what its requests would be, in the order in which they can be carried
/// out; `read` gets the text of the file that a `cpu-config` names.
///
/// # Errors
/// What is wrong with the text.
pub fn read(
    text: &str,
    read: impl FnOnce(&str) -> Result<String, String>,
) -> Result<Vec<Call>, String> {
    let file: File = serde_json::from_slice(text.as_bytes()).map_err(|error| error.to_string())?;
    let cpu = match file.cpu {
        None => None,
        Some(Cpu::Here(config)) => Some(config),
        Some(Cpu::File(path)) => {
            let text = read(&path)?;
            let config = serde_json::from_str(&text);
            Some(config.map_err(|error| format!("cpu-config '{path}': {error}"))?)
        }
    };
    let mut calls = Vec::new();
    calls.extend(file.logger.map(Call::PutLogger));
    calls.extend(file.metrics.map(Call::PutMetrics));
    calls.extend(file.machine.map(Call::PutMachine));
    calls.extend(cpu.map(Call::PutCpuConfig));
    calls.push(Call::PutBootSource(file.boot));
    calls.extend(file.drives.into_iter().map(Call::PutDrive));
    calls.extend(file.interfaces.into_iter().map(Call::PutInterface));
    calls.extend(file.pmem.into_iter().map(Call::PutPmem));
    calls.extend(file.balloon.map(Call::PutBalloon));
    calls.extend(file.vsock.map(Call::PutVsock));
    calls.extend(file.mmds.map(Call::PutMmdsConfig));
    calls.extend(file.entropy.map(Call::PutEntropy));
    calls.extend(file.serial.map(Call::PutSerial));
    calls.extend(file.hotplug.map(Call::PutHotplug));
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_requests_that_it_stands_for() {
        let text = r#"{
            "drives": [{"drive_id": "root.img", "is_root_device": true, "path_on_host": "d"}],
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
            "boot-source": {"kernel_image_path": "k"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
            "mmds-config": {"network_interfaces": ["eth0"], "version": "V2"},
            "cpu-config": "cpu.json", "balloon": null, "other": 1
        }"#;
        let calls = read(text, |path| {
            assert_eq!(path, "cpu.json");
            Ok("{}".to_owned())
        });
        let names: Vec<String> = calls
            .expect("right")
            .iter()
            .map(|call| {
                format!("{call:?}")
                    .split('(')
                    .next()
                    .unwrap_or("")
                    .to_owned()
            })
            .collect();
        assert_eq!(
            names,
            [
                "PutMachine",
                "PutCpuConfig",
                "PutBootSource",
                "PutDrive",
                "PutInterface",
                "PutMmdsConfig"
            ]
        );
    }

    #[test]
    fn a_file_that_says_too_little_is_refused() {
        let wrong = |text| read(text, |_| Err("none".to_owned())).expect_err("wrong");
        assert!(wrong("{").contains("EOF"));
        assert!(wrong("{\"drives\": []}").contains("boot-source"));
        let some = r#"{"boot-source": {"kernel_image_path": "k"}, "drives": [{"x": 1}]}"#;
        assert!(wrong(some).contains("unknown field `x`"));
        let cpu = r#"{"boot-source": {"kernel_image_path": "k"}, "drives": [], "cpu-config": "c"}"#;
        assert_eq!(wrong(cpu), "none");
    }
}
