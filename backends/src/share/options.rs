//! Shared folders as they are asked for.

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Identity, Kind, Need, Place};
use crate::options::Options;
use anyhow::{Context, Result, bail};
use armlet_devices::virtio::fs::TAG;
use std::path::PathBuf;

/// Folders of the host.
pub static KIND: Kind = Kind {
    name: "share",
    letter: None,
    value: "SHARE",
    help: "folder of the host:\n\
        tag=T,path=DIR[,readonly][,sandbox=namespace|chroot|none]\n\
        [,cache=auto|always|never|metadata][,xattr]; may be repeated",
    repeats: true,
    slot: 2,
    default: None,
    parse: |text, _| Ok(Some(Box::new(ShareOptions::parse(text)?))),
};

/// The flag.
const FLAG: &str = "--share";

/// A shared folder as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareOptions {
    /// The name by which the guest mounts it, of up to 36 bytes. Each folder of a guest needs its own.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// Whether the guest only reads it.
    pub readonly: bool,
    /// How virtiofsd is kept within the folder.
    pub sandbox: Sandbox,
    /// What the guest may keep without asking.
    pub cache: Cache,
    /// Whether there are extended attributes.
    pub xattr: bool,
}

/// How virtiofsd is kept within the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// By namespaces: works for root, and for users where they may make user namespaces.
    Namespace,
    /// By chroot(2): works for root, in containers too.
    Chroot,
    /// Not at all: works for everyone.
    None,
}

/// What the guest may keep without asking (virtiofsd's `--cache`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Everything, for a while.
    Auto,
    /// Everything, for ever.
    Always,
    /// Nothing.
    Never,
    /// What is known of files, and not what is in them.
    Metadata,
}

impl ShareOptions {
    /// Reads what stands behind `--share`: `tag=T,path=DIR` and more.
    ///
    /// # Errors
    /// What is not known or does not go together.
    pub fn parse(text: &str) -> Result<ShareOptions> {
        let mut options = Options::parse(FLAG, text, &[])?;
        let parsed = ShareOptions {
            tag: options.require("tag")?,
            path: options.require("path")?.into(),
            readonly: options.switch("readonly")?,
            sandbox: options.choice(
                "sandbox",
                &[
                    ("namespace", Sandbox::Namespace),
                    ("chroot", Sandbox::Chroot),
                    ("none", Sandbox::None),
                ],
            )?,
            cache: options.choice(
                "cache",
                &[
                    ("auto", Cache::Auto),
                    ("always", Cache::Always),
                    ("never", Cache::Never),
                    ("metadata", Cache::Metadata),
                ],
            )?,
            xattr: options.switch("xattr")?,
        };
        options.finish()?;
        parsed.check().with_context(|| format!("{FLAG} '{text}'"))?;
        Ok(parsed)
    }

    /// Checks what has bounds; whoever opens the folder does so, too.
    ///
    /// # Errors
    /// A tag that is empty or too long.
    pub fn check(&self) -> Result<()> {
        match self.tag.len() {
            0 => bail!("the tag is empty; give it a name"),
            1..=TAG => Ok(()),
            length => bail!("the tag has {length} bytes; use up to {TAG}"),
        }
    }
}

impl DeviceOptions for ShareOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn identity(&self) -> Option<Identity<'_>> {
        Some(Identity {
            name: "tag",
            value: &self.tag,
            path: &self.path,
        })
    }

    fn shares_memory(&self) -> bool {
        true
    }

    fn needs_broker(&self) -> bool {
        true
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::Sockets, Need::Broker]
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        let broker = place.broker.context("nobody starts virtiofsd")?;
        self.open(place.name, broker)
    }
}
