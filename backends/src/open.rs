//! Virtio devices as a user asks for them, and the opening of what stands behind them.

use crate::backend::Backend;
use crate::broker::Broker;
use crate::habits;
use crate::kind::{DeviceOptions, Guest, Kind, Place, Transport};
use crate::options::split;
use crate::{balloon, console, disk, net, pmem, rng, share, vsock};
use anyhow::{Result, anyhow, bail};
use armlet_system::seccomp::Native;
use armlet_system::signals;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// The kinds of devices, in the order of the help.
pub static KINDS: &[&Kind] = &[
    &disk::KIND,
    &net::KIND,
    &pmem::KIND,
    &share::KIND,
    &console::KIND,
    &vsock::KIND,
    &balloon::KIND,
    &rng::KIND,
];

/// A virtio device of a guest, checked and not opened yet.
pub struct Wanted {
    name: String,
    number: usize,
    transport: Transport,
    options: Box<dyn DeviceOptions>,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Wanted {
    /// Its name: "disk0".
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is to be.
    #[must_use]
    pub fn options(&self) -> &dyn DeviceOptions {
        &*self.options
    }

    /// What it is connected by, as it was asked for.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Words for the kernel's command line where the user gives none.
    #[must_use]
    pub fn cmdline(&self) -> Option<&'static str> {
        self.options.cmdline(self.number)
    }
}

/// Reads the options that a user gave, each with its kind; the result is as that of [`checked`].
///
/// # Errors
/// An option that cannot be read, or does not go with another.
pub fn read(given: &[(&'static Kind, String)], guest: &Guest) -> Result<Vec<Wanted>> {
    let mut devices = Vec::new();
    for kind in KINDS {
        let texts = given.iter().filter(|(of, _)| of.name == kind.name);
        let mut texts: Vec<&str> = texts.map(|(_, text)| text.as_str()).collect();
        if texts.is_empty() {
            texts.extend(kind.default);
        }
        for text in texts {
            let (text, transport) = split_transport(kind, text)?;
            let parsed = (kind.parse)(&text, guest);
            let parsed = parsed.map_err(|error| match habits::rewrite(kind, &text, guest) {
                Some(ours) => anyhow!("--{name} {text}: use --{name} {ours}", name = kind.name),
                None => error,
            })?;
            devices.extend(parsed.map(|options| (options, transport)));
        }
    }
    named(devices, guest)
}

/// Takes the part `transport=` out of the value of an option; what is left is for the kind.
fn split_transport<'a>(kind: &Kind, text: &'a str) -> Result<(Cow<'a, str>, Transport)> {
    const NAME: &str = "transport=";
    if !text.contains(NAME) {
        return Ok((Cow::Borrowed(text), Transport::Auto));
    }
    let (transports, rest): (Vec<&str>, Vec<&str>) = split(text)
        .into_iter()
        .partition(|part| part.starts_with(NAME));
    let transport = match transports[..] {
        [] => Transport::Auto,
        [one] => one[NAME.len()..]
            .parse()
            .map_err(|wrong| anyhow!("--{} '{text}': {wrong}", kind.name))?,
        _ => bail!("--{} '{text}' says transport twice", kind.name),
    };
    let rest = match rest[..] {
        [] => Cow::Borrowed(kind.default.unwrap_or_default()),
        _ => Cow::Owned(rest.join(",")),
    };
    Ok((rest, transport))
}

/// Names the devices of a guest, and puts them into the order of its slots. Whatever of them is wrong
/// on any host is found here, before anything is opened.
///
/// # Errors
/// Devices that do not go with one another or with the guest.
pub fn checked(devices: Vec<Box<dyn DeviceOptions>>, guest: &Guest) -> Result<Vec<Wanted>> {
    let devices = devices.into_iter();
    let devices = devices.map(|options| (options, Transport::Auto));
    named(devices.collect(), guest)
}

/// As [`checked`], with what each is connected by.
fn named(
    mut devices: Vec<(Box<dyn DeviceOptions>, Transport)>,
    guest: &Guest,
) -> Result<Vec<Wanted>> {
    devices.sort_by_key(|(device, _)| device.kind().slot);
    let mut wanted: Vec<Wanted> = Vec::new();
    for (options, transport) in devices {
        let kind = options.kind();
        options.check_for(guest)?;
        let others = wanted.iter().map(|other| &other.options);
        let others = others.filter(|other| other.kind().name == kind.name);
        let number = others.clone().count();
        if number > 0 && !kind.repeats {
            bail!("--{}: a guest has one at most", kind.name);
        }
        if let Some(ours) = options.identity() {
            let mut others = others.filter_map(|other| other.identity());
            if let Some(other) = others.find(|other| other.value == ours.value) {
                bail!(
                    "--{kind} {} and --{kind} {} have one {}={}; guests tell them apart by it",
                    other.path.display(),
                    ours.path.display(),
                    ours.name,
                    ours.value,
                    kind = kind.name
                );
            }
        }
        let name = match kind.repeats {
            true => format!("{}{number}", kind.name),
            false => kind.name.to_owned(),
        };
        wanted.push(Wanted {
            name,
            number,
            transport,
            options,
        });
    }
    Ok(wanted)
}

/// Forks a broker if [`open`] wants one, or if `wanted_besides`. There are to be no other threads yet.
///
/// # Errors
/// What the system refuses.
pub fn fork_broker(
    wanted: &[Wanted],
    wanted_besides: bool,
    native: Option<&Native>,
) -> Result<Option<Arc<Broker>>> {
    let is_needed = wanted_besides || wanted.iter().any(|wanted| wanted.options.needs_broker());
    is_needed.then(|| Broker::fork(native)).transpose()
}

/// Opens what stands behind the devices of a guest with `memory` bytes, in their order; `console` stands
/// behind the console, and `broker` does what devices will not do themselves ([`fork_broker`]): with
/// these, and nothing else. `changes` says whether clients may have devices changed while the guest runs.
///
/// # Errors
/// What cannot be opened, and what would help.
pub fn open(
    wanted: &[Wanted],
    memory: u64,
    console: Option<&Arc<dyn Backend + Sync>>,
    broker: Option<&Arc<Broker>>,
    changes: bool,
) -> Result<Vec<Box<dyn Backend>>> {
    let mut backends = Vec::new();
    for Wanted {
        name,
        number,
        options,
        ..
    } in wanted
    {
        signals::waiting_for(format_args!("{name} to be opened"));
        backends.push(options.open_backend(&Place {
            name,
            number: *number,
            memory,
            broker,
            changes,
            console,
        })?);
    }
    if let Some(broker) = broker {
        broker.seal()?;
    }
    Ok(backends)
}

/// Reads what is not to be trusted in what was opened, when the process is confined.
///
/// # Errors
/// What is damaged, or not what the user says it is.
pub fn examine(backends: &mut [Box<dyn Backend>]) -> Result<()> {
    for backend in backends {
        signals::waiting_for(format_args!("{} to be examined", backend.name()));
        backend.examine()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::BalloonOptions;
    use crate::disk::DiskOptions;
    use crate::rng::RngOptions;
    use crate::vsock::VsockOptions;

    const GUEST: Guest = Guest {
        memory: 1 << 30,
        parse_size: |text| text.parse().map_err(|_| format!("size '{text}'")),
        show_size: |bytes| bytes.to_string(),
    };

    fn names(wanted: &[Wanted]) -> Vec<&str> {
        wanted.iter().map(Wanted::name).collect()
    }

    fn kind(name: &str) -> &'static Kind {
        let mut kinds = KINDS.iter();
        kinds.find(|kind| kind.name == name).expect(name)
    }

    #[test]
    fn devices_have_the_order_of_slots_whoever_asks_for_them() {
        let texts = [
            ("balloon", "on"),
            ("console", "virtio"),
            ("pmem", "p"),
            ("vsock", "cid=3"),
            ("share", "tag=a,path=/"),
            ("net", "user"),
            ("disk", "b"),
            ("disk", "a"),
            ("net", "user"),
        ];
        let given = texts.map(|(name, text)| (kind(name), text.to_owned()));
        let all = read(&given, &GUEST).expect("right");
        let wanted = [
            "disk0", "disk1", "net0", "net1", "share0", "vsock", "pmem0", "balloon", "console",
            "rng",
        ];
        assert_eq!(names(&all), wanted);
        let typed: Vec<Box<dyn DeviceOptions>> = vec![
            Box::new(RngOptions::default()),
            Box::new(DiskOptions::new("a")),
        ];
        let all = checked(typed, &GUEST).expect("right");
        assert_eq!(names(&all), ["disk0", "rng"]);
    }

    #[test]
    fn what_is_not_asked_for_is_not_there_but_random_numbers() {
        assert_eq!(names(&read(&[], &GUEST).expect("right")), ["rng"]);
        let off = [("rng", "off"), ("console", "serial")];
        let off = off.map(|(name, text)| (kind(name), text.to_owned()));
        assert!(read(&off, &GUEST).expect("right").is_empty());
    }

    #[test]
    fn a_device_says_what_it_is_connected_by_whatever_else_it_says() {
        let texts = [
            ("disk", "transport=pci,path=a"),
            ("disk", "a,,transport=mmio,transport=mmio"),
            ("disk", "c"),
            ("rng", "transport=pci"),
            ("balloon", "on,transport=auto"),
        ];
        let given = texts.map(|(name, text)| (kind(name), text.to_owned()));
        let all = read(&given, &GUEST).expect("right");
        let transports: Vec<_> = all.iter().map(Wanted::transport).collect();
        let wanted = [
            Transport::Pci,
            Transport::Mmio,
            Transport::Auto,
            Transport::Auto,
            Transport::Pci,
        ];
        assert_eq!(transports, wanted);
        for (text, why) in [
            ("a,transport=isa", "use auto, mmio or pci"),
            ("a,transport=pci,transport=pci", "says transport twice"),
            ("transport=pci", "--disk"),
        ] {
            let error = read(&[(kind("disk"), text.to_owned())], &GUEST).expect_err(text);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn devices_without_a_text_are_checked_as_those_with_one() {
        let wrong = |devices: Vec<Box<dyn DeviceOptions>>| {
            checked(devices, &GUEST).expect_err("wrong").to_string()
        };
        let balloon = |target| BalloonOptions {
            target,
            reporting: true,
            deflate_on_oom: true,
        };
        let error = wrong(vec![Box::new(balloon(1 << 30))]);
        assert!(error.contains("leaves nothing of the guest's"), "{error}");
        checked(vec![Box::new(balloon(1 << 29))], &GUEST).expect("it leaves half");
        let error = wrong(vec![Box::new(balloon(0)), Box::new(balloon(0))]);
        assert_eq!(error, "--balloon: a guest has one at most");
        let disk = |path: &str| {
            let mut disk = DiskOptions::new(path);
            disk.id = Some("x".to_owned());
            Box::new(disk)
        };
        let error = wrong(vec![disk("a"), disk("b")]);
        assert!(
            error.contains("--disk a and --disk b have one id=x"),
            "{error}"
        );
        let vsock = VsockOptions {
            cid: 3,
            uds: None,
            stays: false,
        };
        checked(vec![Box::new(vsock), disk("a")], &GUEST).expect("right");
    }

    #[test]
    fn help_keeps_to_its_width() {
        let mut slots: Vec<u8> = KINDS.iter().map(|kind| kind.slot).collect();
        for kind in KINDS {
            // A word that is longer than a line stands in one of its own.
            let long = kind.help.lines().filter(|line| line.len() > 60);
            assert!(
                long.clone().all(|line| !line.contains(' ')),
                "{}",
                kind.name
            );
        }
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), KINDS.len(), "two kinds have one place");
    }
}
