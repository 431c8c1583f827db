//! How a machine was asked for, as it is kept with its snapshot: options of `run`, or what the API was
//! told.

use crate::cli::MachineArgs;
use anyhow::{Result, anyhow, bail};
use armlet_backends::open::KINDS;
use serde::{Deserialize, Serialize};

/// How a machine was asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Options with their values, without dashes: "cpus", "4".
    pub options: Vec<(String, String)>,
    /// Options of devices, in the same form.
    pub devices: Vec<(String, String)>,
    /// The path of the kernel.
    pub kernel: Option<String>,
    /// The path of the initial RAM disk.
    pub initrd: Option<String>,
    /// Whether the guest gets no random seeds.
    pub deterministic: bool,
    /// The microVM as the API shows it, where it was configured there.
    pub microvm: Option<serde_json::Value>,
}

/// The options that describe the machine that a guest sees, beside those of files and devices.
fn places(args: &mut MachineArgs) -> [(&'static str, &mut Option<String>); 12] {
    [
        ("cmdline", &mut args.cmdline),
        ("cpus", &mut args.cpus),
        ("memory", &mut args.memory),
        ("ipa-bits", &mut args.ipa_bits),
        ("gic", &mut args.gic),
        ("pv", &mut args.pv),
        ("exits", &mut args.exits),
        ("pmu", &mut args.pmu),
        ("sve", &mut args.sve),
        ("pauth", &mut args.pauth),
        ("vmgenid", &mut args.vmgenid),
        ("transport", &mut args.transport),
    ]
}

impl Asked {
    /// Takes down what `args` ask for.
    #[must_use]
    pub fn of(args: &MachineArgs) -> Asked {
        let mut args = args.clone();
        let (kernel, initrd) = (args.kernel.take(), args.initrd.take());
        let devices = std::mem::take(&mut args.devices).into_iter();
        let deterministic = args.deterministic;
        let places = places(&mut args).into_iter();
        let given = places.filter_map(|(name, value)| Some((name.to_owned(), value.take()?)));
        Asked {
            options: given.collect(),
            devices: devices
                .map(|(kind, text)| (kind.name.to_owned(), text))
                .collect(),
            kernel,
            initrd,
            deterministic,
            microvm: None,
        }
    }

    /// Sets an option, in place of an earlier value.
    pub fn set(&mut self, name: &str, value: String) {
        self.options.retain(|(other, _)| other != name);
        self.options.push((name.to_owned(), value));
    }

    /// Adds what it asks for to `args`, which say where the machine is to run. Devices of a kind that
    /// `args` name take the place of those that it has; files are left out.
    ///
    /// # Errors
    /// An option of `args` that the machine has already; an option that is not known.
    pub fn add_to(&self, args: &mut MachineArgs) -> Result<()> {
        let fixed = [
            ("kernel", args.kernel.is_some()),
            ("initrd", args.initrd.is_some()),
            ("board", args.board.is_some()),
            ("deterministic", args.deterministic),
        ];
        let given = places(args).map(|(name, value)| (name, value.is_some()));
        let mut given = fixed.into_iter().chain(given);
        if let Some((name, _)) = given.find(|(_, is_given)| *is_given) {
            bail!("--{name}: a machine that is restored has what it was saved with; leave it out");
        }
        args.deterministic = self.deterministic;
        for (name, value) in &self.options {
            let mut places = places(args).into_iter();
            let place = places.find(|(known, _)| known == name);
            let (_, place) =
                place.ok_or_else(|| anyhow!("the snapshot has an unknown option '{name}'"))?;
            *place = Some(value.clone());
        }
        let given = std::mem::take(&mut args.devices);
        for (name, text) in &self.devices {
            let kind = KINDS.iter().find(|kind| kind.name == *name);
            let kind =
                kind.ok_or_else(|| anyhow!("the snapshot has an unknown kind of device '{name}'"))?;
            if !given.iter().any(|(other, _)| other.name == kind.name) {
                args.devices.push((*kind, text.clone()));
            }
        }
        args.devices.extend(given);
        // A machine of the API has no device that was not asked for there.
        if self.microvm.is_some() {
            for kind in KINDS.iter().filter(|kind| kind.default.is_some()) {
                if !args
                    .devices
                    .iter()
                    .any(|(other, _)| other.name == kind.name)
                {
                    args.devices.push((*kind, "off".to_owned()));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, text: &str) -> (&'static armlet_backends::kind::Kind, String) {
        let kind = KINDS.iter().find(|kind| kind.name == name);
        (*kind.expect("a kind"), text.to_owned())
    }

    #[test]
    fn a_machine_is_asked_for_again_as_it_was_with_other_devices_where_these_are_named() {
        let args = MachineArgs {
            kernel: Some("k".to_owned()),
            cpus: Some("3".to_owned()),
            pmu: Some("auto".to_owned()),
            deterministic: true,
            hugepages: Some("none".to_owned()),
            devices: vec![
                device("disk", "a"),
                device("disk", "b"),
                device("net", "user"),
            ],
            ..MachineArgs::default()
        };
        let mut asked = Asked::of(&args);
        asked.set("pmu", "on".to_owned());
        let text = serde_json::to_string(&asked).expect("JSON");
        let asked: Asked = serde_json::from_str(&text).expect("the same");
        let mut again = MachineArgs {
            devices: vec![device("disk", "c")],
            ..MachineArgs::default()
        };
        asked.add_to(&mut again).expect("valid");
        assert_eq!(again.cpus.as_deref(), Some("3"));
        assert_eq!(again.pmu.as_deref(), Some("on"));
        assert!(again.deterministic);
        // How the host's memory stands behind the guest is for the host to say.
        assert_eq!((again.kernel, again.hugepages), (None, None));
        let devices = again.devices.iter();
        let devices: Vec<_> = devices.map(|(kind, text)| (kind.name, &**text)).collect();
        assert_eq!(devices, [("net", "user"), ("disk", "c")]);
    }

    #[test]
    fn what_the_guest_has_seen_cannot_be_changed() {
        let asked = Asked::default();
        let mut args = MachineArgs {
            cpus: Some("2".to_owned()),
            ..MachineArgs::default()
        };
        let error = asked.add_to(&mut args).expect_err("refused").to_string();
        assert!(error.starts_with("--cpus: "), "{error}");
        for (option, kind) in [("frobnicate", "disk"), ("cpus", "floppy")] {
            let asked = Asked {
                options: vec![(option.to_owned(), "1".to_owned())],
                devices: vec![(kind.to_owned(), "x".to_owned())],
                ..Asked::default()
            };
            let error = asked.add_to(&mut MachineArgs::default());
            let error = error.expect_err("refused").to_string();
            assert!(error.contains("unknown"), "{error}");
        }
    }
}
