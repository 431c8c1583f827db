//! Recognises a host as a board.

use super::error::BoardError;
use super::fields::Fields;
use super::layers::{self, Item};
use crate::architecture::Architecture;
use crate::midr::Midr;
use std::borrow::Cow;

/// The identity of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// `/compatible` of its device tree, most specific first (Devicetree specification v0.4,
    /// section 2.3.1).
    pub compatible: Vec<String>,
    /// DMI's maker of the system, empty without DMI.
    pub vendor: String,
    /// DMI's name of the product.
    pub product: String,
    /// Its kinds of core.
    pub cores: Vec<Midr>,
}

/// How a host is recognised as a board: `[match]`. It borrows where it is part of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The architecture of the hosts.
    pub arch: Architecture,
    /// Any of these is in `/compatible`.
    pub compatible: Cow<'static, [Cow<'static, str>]>,
    /// DMI's maker begins with any of these.
    pub vendors: Cow<'static, [Cow<'static, str>]>,
    /// DMI's product begins with any of these; empty for any product.
    pub products: Cow<'static, [Cow<'static, str>]>,
    /// The host has any of these cores.
    pub cores: Cow<'static, [Midr]>,
}

impl Signature {
    /// Reads the keys of a board file's text by which hosts are recognised: `arch`, if it is there,
    /// and `[match]`, which are not inherited. `None` for a board that no host is recognised as.
    ///
    /// # Errors
    /// [`BoardError`].
    pub fn read(text: &str) -> Result<Option<Signature>, BoardError> {
        let mut root = Fields::top(layers::read_alone(text)?, None);
        let arch = match root.has("arch") {
            true => root.architecture()?,
            // All that inherit do so from boards for ARM64.
            false => Architecture::Aarch64,
        };
        let fields = root.optional_table("match")?;
        let signature = fields.map(signature).transpose()?;
        Ok(signature.map(|signature| Signature { arch, ..signature }))
    }

    /// Returns a score of how well it matches a host, higher is better, and why.
    fn fits(&self, host: &Identity) -> Option<(usize, String)> {
        let core = self.cores.iter().find(|core| host.cores.contains(core));
        let by_tree = host
            .compatible
            .iter()
            .enumerate()
            .find(|(_, name)| self.compatible.iter().any(|known| known == *name));
        if let Some((index, name)) = by_tree {
            // The first names of the list are the most specific.
            let score = 1000_usize.saturating_sub(index);
            return Some((score, format!("its device tree says '{name}'")));
        }
        let begins = |names: &[Cow<'_, str>], text: &str| {
            let mut names = names.iter();
            names.any(|name| text.starts_with(&**name))
        };
        if !self.vendors.is_empty() {
            let product = self.products.is_empty() || begins(&self.products, &host.product);
            let cores = self.cores.is_empty() || core.is_some();
            return (begins(&self.vendors, &host.vendor) && product && cores).then(|| {
                let core = core.map_or(String::new(), |core| format!(", its cores {core}"));
                let Identity {
                    vendor, product, ..
                } = host;
                (100, format!("its firmware says '{vendor} {product}'{core}"))
            });
        }
        // A core alone is weaker evidence than a name.
        core.filter(|_| self.compatible.is_empty())
            .map(|core| (1, format!("its cores are {core}")))
    }
}

/// Returns the index of the board that matches the host best, and why.
#[must_use]
pub fn recognize<'a>(
    host: &Identity,
    boards: impl IntoIterator<Item = Option<&'a Signature>>,
) -> Option<(usize, String)> {
    let mut best: Option<(usize, usize, String)> = None;
    for (index, signature) in boards.into_iter().enumerate() {
        let Some((score, why)) = signature.and_then(|board| board.fits(host)) else {
            continue;
        };
        if best.as_ref().is_none_or(|(most, _, _)| score > *most) {
            best = Some((score, index, why));
        }
    }
    best.map(|(_, index, why)| (index, why))
}

/// Reads `[match]`. The architecture is the caller's to fill in.
pub(super) fn signature(mut fields: Fields<'_>) -> Result<Signature, BoardError> {
    let mut names = |key| -> Result<_, BoardError> {
        let names = fields.texts(key)?;
        Ok(names.into_iter().map(Cow::Owned).collect())
    };
    let signature = Signature {
        arch: Architecture::Aarch64,
        compatible: names("compatible")?,
        vendors: names("dmi-vendor")?,
        products: names("dmi-product")?,
        cores: fields
            .list("midr", "numbers such as 0x410f_d0b0", |item| match item {
                Item::Number(number) => u64::try_from(*number).ok().map(Midr::kind),
                _ => None,
            })?
            .into(),
    };
    if signature.vendors.is_empty() && !signature.products.is_empty() {
        return Err(fields.wrong("dmi-product", "needs a dmi-vendor beside it"));
    }
    fields.finish(&["compatible", "dmi-vendor", "dmi-product", "midr"])?;
    Ok(signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature_of(text: &str) -> Option<Signature> {
        let text = format!("[match]\n{text}\n");
        Signature::read(&text).expect("valid")
    }

    fn refs(boards: &[Option<Signature>]) -> impl Iterator<Item = Option<&Signature>> {
        boards.iter().map(Option::as_ref)
    }

    fn host(compatible: &[&str], vendor: &str, product: &str, cores: &[u64]) -> Identity {
        Identity {
            compatible: compatible.iter().map(|&name| name.to_owned()).collect(),
            vendor: vendor.to_owned(),
            product: product.to_owned(),
            cores: cores.iter().copied().map(Midr::kind).collect(),
        }
    }

    #[test]
    fn the_most_specific_name_wins_over_family_firmware_and_core() {
        let boards = [
            signature_of("midr = [0x414f_d0b1]"),
            signature_of("dmi-vendor = [\"Maker\"]"),
            signature_of("compatible = [\"maker,soc\"]"),
            signature_of("compatible = [\"maker,board\"]"),
        ];
        let mut host = host(
            &["maker,board", "maker,soc"],
            "Maker",
            "One",
            &[0x411f_d0b0],
        );
        for expected in [3, 2, 1, 0] {
            let (index, why) = recognize(&host, refs(&boards)).expect("a board");
            assert_eq!(index, expected, "{why}");
            match expected {
                3 => drop(host.compatible.remove(0)),
                2 => host.compatible.clear(),
                _ => host.vendor.clear(),
            }
        }
        host.cores.clear();
        assert_eq!(recognize(&host, refs(&boards)), None);
    }

    #[test]
    fn firmware_that_sells_several_machines_is_told_apart_by_the_cores() {
        let boards = [
            signature_of("dmi-vendor = [\"Cloud\"]\nmidr = [0x410f_d0c0]"),
            signature_of("dmi-vendor = [\"Cloud\"]\nmidr = [0x410f_d400]"),
        ];
        let second = host(&[], "Cloud", "v1.metal", &[0x411f_d401]);
        assert_eq!(
            recognize(&second, refs(&boards)).map(|(index, _)| index),
            Some(1)
        );
        let other = host(&[], "Other", "v1.metal", &[0x411f_d401]);
        assert_eq!(recognize(&other, refs(&boards)), None);
    }

    #[test]
    fn the_revision_of_a_chip_does_not_matter_and_its_part_does() {
        assert_eq!(Midr::kind(0x413f_d0c1), Midr::kind(0x410f_d0c0));
        assert_ne!(Midr::kind(0x413f_d0c1), Midr::kind(0x413f_d0b1));
        assert_ne!(Midr::kind(0x413f_d0c1), Midr::kind(0x613f_d0c1));
    }

    #[test]
    fn a_board_without_a_signature_is_never_recognised() {
        assert_eq!(Signature::read(""), Ok(None));
        assert!(Signature::read("\n[match]\ndmi-product = [\"x\"]").is_err());
        assert!(Signature::read("\n[match]\nmidr = [\"x\"]").is_err());
        let pc = "arch = \"x86_64\"\n[match]\ndmi-vendor = [\"x\"]\n";
        let pc = Signature::read(pc).expect("valid");
        assert_eq!(pc.map(|board| board.arch), Some(Architecture::X86_64));
    }
}
