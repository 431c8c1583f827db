//! The kernels of distributions, by the names that options use.

use anyhow::{Context, Result, bail};

use super::release::{Distribution, GUEST_RELEASE, NEWEST_RELEASE, backports_of};
use crate::isa::Isa;

/// A distribution kernel, for ARM64 where its name says nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// 6.12 with 4 KiB pages and every driver: the usual host.
    V6_12,
    /// 6.12 with 16 KiB pages.
    V6_12Pages16K,
    /// 6.12 for clouds, the smallest: the usual guest.
    V6_12Cloud,
    /// 6.1 with 4 KiB pages.
    V6_1,
    /// 7.3 with 4 KiB pages and every driver.
    V7_3,
    /// 6.1 for clouds on x86_64: the host there, as it is the fastest where it is emulated.
    V6_1X86,
    /// 6.12 for clouds on x86_64.
    V6_12X86,
}

impl Kernel {
    /// Every kernel.
    pub(crate) const ALL: [Self; 7] = [
        Self::V6_12,
        Self::V6_12Pages16K,
        Self::V6_12Cloud,
        Self::V6_1,
        Self::V7_3,
        Self::V6_1X86,
        Self::V6_12X86,
    ];

    /// Returns the name by which options and stamps know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_12Pages16K => "6.12-16k",
            Self::V6_12Cloud => "6.12-cloud",
            Self::V6_1 => "6.1",
            Self::V7_3 => "7.3",
            Self::V6_1X86 => "6.1-x86",
            Self::V6_12X86 => "6.12-x86",
        }
    }

    /// Returns the machine that it is for.
    pub(crate) fn isa(self) -> Isa {
        match self {
            Self::V6_1X86 | Self::V6_12X86 => Isa::X86,
            _ => Isa::Arm64,
        }
    }

    /// Returns the kernel that `name` means, or an error that lists the names.
    pub(crate) fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        let names = Self::ALL.map(Self::name).join(", ");
        found.with_context(|| format!("no kernel is called {name:?}; there are {names}"))
    }

    /// Returns the package that depends on the kernel, and the suite to take it from.
    pub(super) fn package(
        self,
        distribution: Distribution,
    ) -> Result<(&'static str, Option<String>)> {
        let backports = || Some(backports_of(GUEST_RELEASE));
        match (distribution, self) {
            (Distribution::Debian, Self::V6_12) => Ok(("linux-image-arm64", backports())),
            (Distribution::Debian, Self::V6_12Pages16K) => {
                Ok(("linux-image-arm64-16k", backports()))
            }
            (Distribution::Debian, Self::V6_12Cloud) => {
                Ok(("linux-image-cloud-arm64", backports()))
            }
            (Distribution::Debian, Self::V6_1) => {
                Ok(("linux-image-arm64", Some(GUEST_RELEASE.to_owned())))
            }
            (Distribution::Debian, Self::V7_3) => {
                Ok(("linux-image-arm64", Some(backports_of(NEWEST_RELEASE))))
            }
            (Distribution::Debian, Self::V6_1X86) => {
                Ok(("linux-image-cloud-amd64", Some(GUEST_RELEASE.to_owned())))
            }
            (Distribution::Debian, Self::V6_12X86) => Ok(("linux-image-cloud-amd64", backports())),
            // Ubuntu has one kernel a release; it stands in for both 4 KiB variants of 6.12.
            (Distribution::Ubuntu, Self::V6_12 | Self::V6_12Cloud) => {
                Ok(("linux-image-virtual", None))
            }
            (Distribution::Ubuntu, _) => {
                bail!(
                    "Ubuntu has no package for the kernel {}; use a Debian machine",
                    self.name()
                )
            }
        }
    }
}
