//! Network cards as they are asked for.

use super::mmds::MmdsOptions;
use super::passt::Forward;
use super::tap;
use crate::backend::Backend;
use crate::kind::{DeviceOptions, Kind, Need, Place};
use crate::options::Options;
use anyhow::{Result, anyhow, bail};
use armlet_devices::rate::{Bucket, Limits};
use std::fmt;
use std::os::fd::RawFd;

/// Network cards.
pub static KIND: Kind = Kind {
    name: "net",
    letter: Some("-n"),
    value: "NET",
    help: "network card: user[,hostfwd=tcp:2222-:22]... (no privileges\n\
        needed), or\n\
        tap=NAME|fd=N[,queues=N][,vhost=auto|on|off][,mtu=N]; each\n\
        with [,mac=MAC] and [,rx-bps=SIZE][,rx-pps=N][,tx-bps=SIZE]\n\
        [,tx-pps=N] and [,metadata=FILE] (JSON for the guest at\n\
        http://169.254.169.254/); may be repeated",
    repeats: true,
    slot: 1,
    default: None,
    parse: |text, _| Ok(Some(Box::new(NetOptions::parse(text)?))),
};

/// The option's name, for messages.
pub(super) const FLAG: &str = "--net";
/// The most pairs of queues: one a vCPU is all that a guest makes use of.
const MOST_QUEUES: u64 = 16;
/// The smallest MTU that a card may tell of (virtio 1.2, section 5.1.4.1).
const LEAST_MTU: u16 = 68;

/// The first descriptor that is not the terminal's.
const FIRST: RawFd = 3;

/// A network card as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its MAC address, where the user chose one.
    pub mac: Option<[u8; 6]>,
    /// The MTU in bytes that the guest is told, where it is not the TAP's: 68 or more.
    pub mtu: Option<u16>,
    /// How much it may receive in how much time.
    pub receive: Limits,
    /// How much it may send in how much time.
    pub transmit: Limits,
    /// What it is connected to.
    pub network: Network,
    /// Metadata that the guest reads by it.
    pub mmds: Option<MmdsOptions>,
}

/// What it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A TAP interface of the host.
    Tap {
        /// The interface.
        name: String,
        /// Pairs of queues: 1 to 16.
        queues: u16,
        /// Whether the host's kernel does the work.
        vhost: VhostChoice,
    },
    /// A TAP whose queues armlet was started with.
    Inherited {
        /// One for each pair of queues, from 3.
        descriptors: Vec<RawFd>,
        /// Whether the host's kernel does the work.
        vhost: VhostChoice,
    },
    /// A network of passt's.
    User {
        /// Ports of the host that lead to the guest.
        forwards: Vec<Forward>,
    },
}

/// Whether the host's kernel is to do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhostChoice {
    /// Where it can.
    Auto,
    /// Or not at all.
    On,
    /// Not at all.
    Off,
}

impl NetOptions {
    /// Reads the value of `--net`:
    /// `tap=NAME|fd=N[,fd=N...][,mac=ADDRESS][,queues=N][,vhost=auto|on|off][,mtu=N]` or
    /// `user[,hostfwd=tcp:[HOSTADDR]:HOSTPORT-:GUESTPORT]...[,mac=ADDRESS]`, each with
    /// `[,metadata=FILE]`.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(text: &str) -> Result<NetOptions> {
        let mut options = Options::parse(FLAG, text, &["fd", "hostfwd"])?;
        let say = |error: anyhow::Error| error.context(format!("{FLAG} '{text}'"));
        let mac = options.take("mac")?;
        let mac = mac.map(|mac| parse_mac(&mac)).transpose().map_err(say)?;
        let mtu = options.number("mtu", LEAST_MTU.into()..=u16::MAX.into())?;
        let mtu = mtu.map(|mtu| mtu as u16);
        let receive = options.limits("rx-bps", "rx-pps")?;
        let transmit = options.limits("tx-bps", "tx-pps")?;
        let (tap, descriptors) = (options.take("tap")?, options.take_all("fd")?);
        let user = options.switch("user")?;
        let network = match (tap, descriptors.is_empty(), user) {
            (Some(name), true, false) => Network::Tap {
                name,
                queues: options.number("queues", 1..=MOST_QUEUES)?.unwrap_or(1) as u16,
                vhost: wish(&mut options)?,
            },
            (None, false, false) => Network::Inherited {
                descriptors: parse_descriptors(&descriptors).map_err(say)?,
                vhost: wish(&mut options)?,
            },
            (None, true, true) => {
                let forwards = options.take_all("hostfwd")?;
                let forwards = forwards.iter().map(|text| Forward::parse(text));
                Network::User {
                    forwards: forwards.collect::<Result<_>>().map_err(say)?,
                }
            }
            _ => bail!("{FLAG} '{text}' is to have one of user, tap=NAME and fd=N"),
        };
        let mmds = options.take("metadata")?.map(|file| MmdsOptions {
            file: Some(file.into()),
            ..MmdsOptions::default()
        });
        options.finish()?;
        let parsed = NetOptions {
            mac,
            mtu,
            receive,
            transmit,
            network,
            mmds,
        };
        parsed.check().map_err(say)?;
        Ok(parsed)
    }

    /// Checks what has bounds; whoever connects the card does so, too.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn check(&self) -> Result<()> {
        match &self.network {
            Network::Tap { name, queues, .. } => {
                tap::check_name(name)?;
                if !(1..=MOST_QUEUES).contains(&u64::from(*queues)) {
                    bail!("queues={queues} is not a number from 1 to {MOST_QUEUES}");
                }
            }
            Network::Inherited { descriptors, .. } => check_descriptors(descriptors)?,
            Network::User { .. } if self.mtu.is_some() => {
                bail!("passt has an MTU of its own; leave mtu= out");
            }
            Network::User { .. } => {}
        }
        if self.mtu.is_some_and(|mtu| mtu < LEAST_MTU) {
            bail!("a card has an MTU of {LEAST_MTU} to 65535 bytes");
        }
        if self.is_limited() && self.vhost() == Some(VhostChoice::On) {
            bail!("the kernel moves vhost's frames, however many they are; limits need vhost=off");
        }
        if let Some(mmds) = &self.mmds {
            mmds.check()?;
            if self.vhost() == Some(VhostChoice::On) {
                bail!("the kernel moves vhost's frames, those to metadata too; leave vhost=on out");
            }
        }
        self.mac.as_ref().map_or(Ok(()), check_mac)
    }
}

impl NetOptions {
    /// Whether it is held to limits.
    pub(super) fn is_limited(&self) -> bool {
        let limits = [&self.receive, &self.transmit];
        let mut buckets = limits.into_iter().flat_map(|it| [&it.bandwidth, &it.ops]);
        buckets.any(|bucket| bucket.as_ref().is_some_and(Bucket::is_limit))
    }

    fn vhost(&self) -> Option<VhostChoice> {
        match &self.network {
            Network::Tap { vhost, .. } | Network::Inherited { vhost, .. } => Some(*vhost),
            Network::User { .. } => None,
        }
    }
}

impl DeviceOptions for NetOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn needs_broker(&self) -> bool {
        matches!(self.network, Network::User { .. })
    }

    fn needs(&self) -> Vec<Need> {
        match self.network {
            Network::User { .. } => vec![Need::Thread, Need::Sockets, Need::Broker],
            // Netlink tells of the interface.
            _ if self.mmds.is_some() => vec![Need::Thread, Need::Tap, Need::Sockets],
            _ => vec![Need::Thread, Need::Tap, Need::Vhost, Need::Sockets],
        }
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        Ok(Box::new(self.open(
            place.number,
            place.broker,
            place.changes,
        )?))
    }
}

/// The card as the user wrote it, without what is not needed to know it.
impl fmt::Display for NetOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.network {
            Network::Tap { name, .. } => write!(f, "tap={name}"),
            Network::Inherited { descriptors, .. } => match descriptors.first() {
                Some(first) => write!(f, "fd={first}"),
                None => write!(f, "fd="),
            },
            Network::User { .. } => write!(f, "user"),
        }
    }
}

fn wish(options: &mut Options<'_>) -> Result<VhostChoice> {
    options.choice(
        "vhost",
        &[
            ("auto", VhostChoice::Auto),
            ("on", VhostChoice::On),
            ("off", VhostChoice::Off),
        ],
    )
}

fn parse_descriptors(texts: &[String]) -> Result<Vec<RawFd>> {
    let parse = |text: &String| -> Result<RawFd> {
        let number = text.parse().ok().filter(|number| *number >= FIRST);
        number.ok_or_else(|| no_descriptor(text))
    };
    texts.iter().map(parse).collect()
}

fn no_descriptor(shown: impl fmt::Display) -> anyhow::Error {
    anyhow!("fd={shown} is not the number of a descriptor, from {FIRST}")
}

fn check_descriptors(descriptors: &[RawFd]) -> Result<()> {
    match descriptors.len() as u64 {
        1..=MOST_QUEUES => {}
        count => {
            bail!("it has {count} descriptors; a card has 1 to {MOST_QUEUES} pairs of queues")
        }
    }
    match descriptors.iter().find(|number| **number < FIRST) {
        Some(number) => Err(no_descriptor(number)),
        None => Ok(()),
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let wrong = || anyhow!("mac={text} is not a MAC address; write it like 52:54:00:12:34:56");
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
        *byte = value.ok_or_else(wrong)?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    Ok(mac)
}

fn check_mac(mac: &[u8; 6]) -> Result<()> {
    if mac[0] & 1 != 0 || *mac == [0; 6] {
        let shown = mac.map(|byte| format!("{byte:02x}")).join(":");
        bail!(
            "mac={shown} is no address of one card; its first byte is to be even, as in \
             52:54:00:12:34:56"
        );
    }
    Ok(())
}
