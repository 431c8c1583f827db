//! Network cards (`--net`): a TAP interface of the host, or a network that needs no privileges.

use super::broker::Broker;
use super::options::Options;
use crate::backend::Backend;
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::net::{Net, RingNet};
use armlet_system::eintr::uninterrupted;
use passt::{Forward, Passt, PasstFrames};
use rustix::rand::{GetRandomFlags, getrandom};
use std::fmt;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use tap::{Tap, TapFrames};
use vhost::VhostNet;

pub mod passt;
mod sys;
pub mod tap;
#[cfg(test)]
mod tests;
pub mod vhost;

/// The option's name, for messages.
const FLAG: &str = "--net";
/// The most pairs of queues: one a vCPU is all that a guest makes use of.
const MOST_QUEUES: u64 = 16;

/// A network card as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its MAC address, where the user chose one.
    pub mac: Option<[u8; 6]>,
    network: Choice,
}

/// What it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Tap {
        name: String,
        queues: u16,
        vhost: Wish,
    },
    Inherited {
        descriptors: Vec<RawFd>,
        vhost: Wish,
    },
    User {
        forwards: Vec<Forward>,
    },
}

/// Whether the host's kernel is to do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// Where it can.
    Auto,
    On,
    Off,
}

impl NetOptions {
    /// Reads the value of `--net`:
    /// `tap=NAME|fd=N[,fd=N...][,mac=ADDRESS][,queues=N][,vhost=auto|on|off]` or
    /// `user[,hostfwd=tcp:[HOSTADDR]:HOSTPORT-:GUESTPORT]...[,mac=ADDRESS]`.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(text: &str) -> Result<NetOptions> {
        let mut options = Options::parse(FLAG, text, &["fd", "hostfwd"])?;
        let say = |error: anyhow::Error| error.context(format!("{FLAG} '{text}'"));
        let mac = options.take("mac")?;
        let mac = mac.map(|mac| parse_mac(&mac)).transpose().map_err(say)?;
        let (tap, descriptors) = (options.take("tap")?, options.take_all("fd")?);
        let user = options.switch("user")?;
        let network = match (tap, descriptors.is_empty(), user) {
            (Some(name), true, false) => {
                tap::check_name(&name).map_err(say)?;
                Choice::Tap {
                    name,
                    queues: options.number("queues", 1..=MOST_QUEUES)?.unwrap_or(1) as u16,
                    vhost: wish(&mut options)?,
                }
            }
            (None, false, false) => Choice::Inherited {
                descriptors: parse_descriptors(&descriptors).map_err(say)?,
                vhost: wish(&mut options)?,
            },
            (None, true, true) => {
                let forwards = options.take_all("hostfwd")?;
                let forwards = forwards.iter().map(|text| Forward::parse(text));
                Choice::User {
                    forwards: forwards.collect::<Result<_>>().map_err(say)?,
                }
            }
            _ => bail!("{FLAG} '{text}' is to have one of user, tap=NAME and fd=N"),
        };
        options.finish()?;
        Ok(NetOptions { mac, network })
    }

    /// Whether a program works for it, which a broker starts.
    #[must_use]
    pub fn needs_broker(&self) -> bool {
        matches!(self.network, Choice::User { .. })
    }

    /// Connects the card to its network. It is the machine's card `number`, from 0.
    ///
    /// # Errors
    /// What does not work, and what would.
    pub fn open(&self, number: usize, broker: Option<&Arc<Broker>>) -> Result<NetworkCard> {
        let open = || match &self.network {
            Choice::Tap {
                name,
                queues,
                vhost,
            } => connect(Tap::open(name, *queues)?, *vhost),
            Choice::Inherited { descriptors, vhost } => connect(Tap::inherit(descriptors)?, *vhost),
            Choice::User { forwards } => {
                let broker = broker.context("nobody starts passt")?;
                let passt = Passt::start(broker, forwards, self.address(number)?)?;
                Ok(Connection::User(PasstFrames::new(passt)))
            }
        };
        Ok(NetworkCard {
            name: format!("net{number}"),
            mac: self.address(number)?,
            connection: open().with_context(|| format!("{FLAG} {self}"))?,
        })
    }

    /// The card's address. On a TAP other machines may hear it, so it is a random one; passt has
    /// one guest, which finds the same card each time.
    fn address(&self, number: usize) -> Result<[u8; 6]> {
        if let Some(mac) = self.mac {
            return Ok(mac);
        }
        let mut mac = [0x02, b'a', b'r', b'm', 0, number as u8];
        if !matches!(self.network, Choice::User { .. }) {
            let count = uninterrupted(|| getrandom(&mut mac[..], GetRandomFlags::empty()));
            count.context("cannot choose a MAC address")?;
            // Of one machine, and administered locally (IEEE 802).
            mac[0] = mac[0] & 0xfc | 0x02;
        }
        Ok(mac)
    }
}

/// The card as the user wrote it, without what is not needed to know it.
impl fmt::Display for NetOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.network {
            Choice::Tap { name, .. } => write!(f, "tap={name}"),
            Choice::Inherited { descriptors, .. } => write!(f, "fd={}", descriptors[0]),
            Choice::User { .. } => write!(f, "user"),
        }
    }
}

fn wish(options: &mut Options<'_>) -> Result<Wish> {
    options.choice(
        "vhost",
        &[("auto", Wish::Auto), ("on", Wish::On), ("off", Wish::Off)],
    )
}

fn parse_descriptors(texts: &[String]) -> Result<Vec<RawFd>> {
    let parse = |text: &String| -> Result<RawFd> {
        match text.parse() {
            // 0 to 2 are the terminal's.
            Ok(number @ 3..) => Ok(number),
            _ => bail!("fd={text} is not the number of a descriptor, from 3"),
        }
    };
    let numbers = texts.iter().map(parse).collect::<Result<Vec<_>>>()?;
    match numbers.len() as u64 {
        ..=MOST_QUEUES => Ok(numbers),
        count => {
            bail!("it has {count} descriptors; a card has up to {MOST_QUEUES} pairs of queues")
        }
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
    if mac[0] & 1 != 0 || mac == [0; 6] {
        bail!(
            "mac={text} is no address of one card; its first byte is to be even, as in \
             52:54:00:12:34:56"
        );
    }
    Ok(mac)
}

/// A network card's connection to the host.
pub struct NetworkCard {
    name: String,
    mac: [u8; 6],
    connection: Connection,
}

enum Connection {
    Tap(TapFrames),
    Vhost(VhostNet),
    User(PasstFrames),
}

fn connect(tap: Tap, vhost: Wish) -> Result<Connection> {
    let tap = Arc::new(tap);
    if vhost != Wish::Off {
        match VhostNet::open(&tap) {
            Ok(vhost) => return Ok(Connection::Vhost(vhost)),
            Err(error) if vhost == Wish::On => return Err(error),
            Err(error) => log::info!("without vhost-net: {error:#}"),
        }
    }
    Ok(Connection::Tap(TapFrames(tap)))
}

impl Backend for NetworkCard {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        Ok(match &self.connection {
            Connection::Tap(tap) => Arc::new(Mutex::new(Net::new(tap.clone(), self.mac))),
            Connection::User(passt) => Arc::new(Mutex::new(Net::new(passt.clone(), self.mac))),
            Connection::Vhost(vhost) => {
                let card = RingNet::new(vhost.clone(), self.mac);
                Arc::new(Mutex::new(card.context("cannot make an epoll instance")?))
            }
        })
    }

    fn is_busy(&self) -> bool {
        !matches!(self.connection, Connection::Vhost(_))
    }
}
