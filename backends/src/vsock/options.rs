//! Sockets as they are asked for.

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Kind, Need, Place};
use crate::options::Options;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// Sockets between guest and host.
pub static KIND: Kind = Kind {
    name: "vsock",
    letter: None,
    value: "VSOCK",
    help: "sockets between guest and host: cid=N[,uds=PATH], by Unix\n\
        sockets or vhost",
    repeats: false,
    slot: 3,
    default: None,
    parse: |text, _| Ok(Some(Box::new(VsockOptions::parse(text)?))),
};

/// The flag.
const FLAG: &str = "--vsock";
/// The addresses that a guest may have: 0 to 2 are the hypervisor's, loopback's and the host's,
/// the last stands for "any" (include/uapi/linux/vm_sockets.h).
const CIDS: std::ops::RangeInclusive<u64> = 3..=u32::MAX as u64 - 1;
/// The most bytes of a path: 108 in a socket's address (unix(7)), less a zero, a "_" and a port.
pub(super) const LONGEST_PATH: usize = 108 - 1 - "_4294967295".len();

/// Sockets as the user asks for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockOptions {
    /// The guest's address: 3 to 2^32 - 2.
    pub cid: u32,
    /// Where the host's side is, a path of up to 96 bytes; `None` leaves it to the kernel.
    pub uds: Option<PathBuf>,
    /// Whether the host's side stays there when the guest has ended.
    pub stays: bool,
}

impl VsockOptions {
    /// Reads what stands behind `--vsock`: `cid=N[,uds=PATH][,vhost=on|off]`.
    ///
    /// # Errors
    /// What is not known or does not go together.
    pub fn parse(text: &str) -> Result<VsockOptions> {
        let mut options = Options::parse(FLAG, text, &[])?;
        let cid = options.number("cid", CIDS)?;
        let uds = options.take("uds")?.map(PathBuf::from);
        let vhost = options.toggle("vhost")?;
        options.finish()?;
        let Some(cid) = cid else {
            bail!("{FLAG} '{text}' lacks cid=, the guest's address: a number from 3");
        };
        match (&uds, vhost) {
            (Some(_), Some(true)) => bail!(
                "{FLAG} '{text}': vhost=on and uds= are two ways to do the same; use one of them"
            ),
            (None, Some(false)) => bail!("{FLAG} '{text}': vhost=off needs uds=PATH"),
            _ => {}
        }
        let cid = cid as u32;
        let parsed = VsockOptions {
            cid,
            uds,
            stays: false,
        };
        parsed.check().with_context(|| format!("{FLAG} '{text}'"))?;
        Ok(parsed)
    }

    /// Checks what has bounds; whoever opens the sockets does so, too.
    ///
    /// # Errors
    /// An address that no guest has, a path that is too long for a socket's.
    pub fn check(&self) -> Result<()> {
        if !CIDS.contains(&u64::from(self.cid)) {
            bail!(
                "cid={} is no guest's address; use a number from 3",
                self.cid
            );
        }
        let length = self.uds.as_ref().map_or(0, |path| path.as_os_str().len());
        if length > LONGEST_PATH {
            bail!("the path has {length} bytes; use up to {LONGEST_PATH}");
        }
        Ok(())
    }
}

impl DeviceOptions for VsockOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn needs_broker(&self) -> bool {
        true
    }

    fn needs(&self) -> Vec<Need> {
        match &self.uds {
            Some(_) => vec![Need::Thread, Need::Sockets, Need::Broker],
            None => vec![Need::Vhost, Need::Broker],
        }
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        self.open(place.broker.context("nobody opens what it needs later")?)
    }
}
