//! Values like `path=disk.img,readonly,id=root`: what `--disk` and its like take.

use anyhow::{Result, bail};
use armlet_devices::rate::{Bucket, Limits};
use std::borrow::Cow;

/// The parts of one value, to be taken by name; what is left over at the end is an error.
#[derive(Debug)]
pub struct Options<'a> {
    flag: &'a str,
    text: &'a str,
    /// Name and value; `None` for a bare word.
    parts: Vec<(&'a str, Option<&'a str>)>,
    known: Vec<&'static str>,
}

impl<'a> Options<'a> {
    /// Takes a value apart at its commas; a comma within a value is written twice.
    ///
    /// # Errors
    /// An empty part, or a name that comes twice, unless it is in `repeatable`.
    pub fn parse(flag: &'a str, text: &'a str, repeatable: &[&str]) -> Result<Options<'a>> {
        let mut parts: Vec<(&str, Option<&str>)> = Vec::new();
        for part in split(text) {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (part, None),
            };
            if name.is_empty() {
                bail!("{flag} '{text}' has an empty part; write it like name=value,name=value");
            }
            if parts.iter().any(|(known, _)| *known == name) && !repeatable.contains(&name) {
                bail!("{flag} '{text}' says {name} twice");
            }
            parts.push((name, value));
        }
        Ok(Options {
            flag,
            text,
            parts,
            known: Vec::new(),
        })
    }

    /// Takes the value of `name`, with doubled commas made single.
    ///
    /// # Errors
    /// The name without a value.
    pub fn take(&mut self, name: &'static str) -> Result<Option<String>> {
        self.known.push(name);
        let Some(at) = self.parts.iter().position(|(known, _)| *known == name) else {
            return Ok(None);
        };
        match self.parts.remove(at).1 {
            Some(value) if !value.is_empty() => Ok(Some(value.replace(",,", ","))),
            _ => bail!("{} '{}': {name} needs a value", self.flag, self.text),
        }
    }

    /// Takes a value that must be there.
    ///
    /// # Errors
    /// That it is not.
    pub fn require(&mut self, name: &'static str) -> Result<String> {
        match self.take(name)? {
            Some(value) => Ok(value),
            None => bail!("{} '{}' lacks {name}=", self.flag, self.text),
        }
    }

    /// Takes every value of a name that may come more than once.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_all(&mut self, name: &'static str) -> Result<Vec<String>> {
        std::iter::from_fn(|| self.take(name).transpose()).collect()
    }

    /// Takes a switch: `name`, `name=on` or `name=off`; off where it is not there.
    ///
    /// # Errors
    /// Another value.
    pub fn switch(&mut self, name: &'static str) -> Result<bool> {
        Ok(self.toggle(name)?.unwrap_or(false))
    }

    /// As [`Self::switch`], with `None` where it is not there.
    ///
    /// # Errors
    /// Another value.
    pub fn toggle(&mut self, name: &'static str) -> Result<Option<bool>> {
        self.known.push(name);
        let Some(at) = self.parts.iter().position(|(known, _)| *known == name) else {
            return Ok(None);
        };
        match self.parts.remove(at).1 {
            None | Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(other) => bail!(
                "{} '{}': {name}={other} is not known; use on or off",
                self.flag,
                self.text
            ),
        }
    }

    /// Takes limits: bytes a second, which may end in K, M, G or T, and requests a second.
    ///
    /// # Errors
    /// What is no number, or none at all.
    pub fn limits(&mut self, bytes: &'static str, requests: &'static str) -> Result<Limits> {
        let mut bucket = |name| -> Result<Option<Bucket>> {
            let Some(text) = self.take(name)? else {
                return Ok(None);
            };
            let units = ["", "K", "M", "G", "T"];
            let with = |unit: &&str| name == bytes || unit.is_empty();
            let amount = units.iter().filter(|unit| with(unit)).enumerate().find_map(
                |(power, unit)| -> Option<u64> {
                    let digits = text.strip_suffix(unit)?;
                    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
                    let number: u64 = digits.parse().ok().filter(|_| plain)?;
                    number.checked_mul(1 << (10 * power))
                },
            );
            match amount.filter(|amount| *amount > 0) {
                Some(amount) => Ok(Some(Bucket::per_second(amount))),
                None => bail!(
                    "{} '{}': {name}={text} is no number a second; use {}",
                    self.flag,
                    self.text,
                    if name == bytes {
                        "20M or another number of bytes"
                    } else {
                        "1 or more"
                    }
                ),
            }
        };
        Ok(Limits {
            bandwidth: bucket(bytes)?,
            ops: bucket(requests)?,
        })
    }

    /// Takes one of a few words, with what each stands for; the first where it is not there.
    ///
    /// # Errors
    /// Another word.
    pub fn choice<T: Copy>(&mut self, name: &'static str, choices: &[(&str, T)]) -> Result<T> {
        let wanted = self.take(name)?;
        let word = wanted.as_deref().unwrap_or(choices[0].0);
        match choices.iter().find(|(known, _)| *known == word) {
            Some((_, value)) => Ok(*value),
            None => {
                let known: Vec<&str> = choices.iter().map(|(known, _)| *known).collect();
                bail!(
                    "{} '{}': {name}={word} is not known; use {}",
                    self.flag,
                    self.text,
                    known.join(" or ")
                )
            }
        }
    }

    /// Takes a number within bounds.
    ///
    /// # Errors
    /// No number, or one out of bounds.
    pub fn number(
        &mut self,
        name: &'static str,
        bounds: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>> {
        let Some(text) = self.take(name)? else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if bounds.contains(&number) => Ok(Some(number)),
            _ => bail!(
                "{} '{}': {name}={text} is not a number from {} to {}",
                self.flag,
                self.text,
                bounds.start(),
                bounds.end()
            ),
        }
    }

    /// Refuses a name that others use for what is called `ours` here.
    ///
    /// # Errors
    /// That it is there.
    pub fn refuse(&self, theirs: &str, ours: &str) -> Result<()> {
        match self.parts.iter().any(|(name, _)| *name == theirs) {
            true => bail!(
                "{} '{}': {theirs}= is not known; use {ours}",
                self.flag,
                self.text
            ),
            false => Ok(()),
        }
    }

    /// Refuses what nobody took.
    ///
    /// # Errors
    /// The first part left over, with the names that are known.
    pub fn finish(self) -> Result<()> {
        let Some((name, _)) = self.parts.first() else {
            return Ok(());
        };
        let known = self.known.join(", ");
        let (flag, text) = (self.flag, self.text);
        // A dot or a slash: this is the rest of a file's name.
        match name.contains(['.', '/']) {
            true => bail!(
                "{flag} '{text}': {name} is not known; use {known}, or write a comma in a name twice"
            ),
            false => bail!("{flag} '{text}': {name} is not known; use {known}"),
        }
    }
}

/// `text` with `path=` in front where it begins with a path and not with a name and a value, nor with
/// one of the `switches`. A path has something in it before its first "=", if it has one, that no
/// name has: a slash or a dot, say.
pub fn path_first<'a>(text: &'a str, switches: &[&str]) -> Cow<'a, str> {
    let first = text.split(',').next().unwrap_or_default();
    let is_name = |name: &str| {
        name.bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'-' | b'_'))
    };
    let named = first.split_once('=').is_some_and(|(name, _)| is_name(name));
    match named || switches.contains(&first) {
        true => Cow::Borrowed(text),
        false => Cow::Owned(format!("path={text}")),
    }
}

/// Returns the parts between single commas.
pub(crate) fn split(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut at) = (0, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b',' if bytes.get(at + 1) == Some(&b',') => at += 2,
            b',' => {
                parts.push(&text[start..at]);
                at += 1;
                start = at;
            }
            _ => at += 1,
        }
    }
    parts.push(&text[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_taken_by_name() {
        let mut options =
            Options::parse("--disk", "path=a,,b.img,readonly,queues=3", &[]).expect("valid");
        assert_eq!(options.require("path").expect("a path"), "a,b.img");
        assert!(options.switch("readonly").expect("a switch"));
        assert_eq!(options.number("queues", 1..=8).expect("3"), Some(3));
        assert_eq!(options.take("id").expect("none"), None);
        let engine = options.choice("engine", &[("auto", 1), ("sync", 2)]);
        assert_eq!(engine.expect("the default"), 1);
        options.finish().expect("all taken");
    }

    #[test]
    fn a_name_may_repeat_where_it_is_allowed_to() {
        let mut options = Options::parse("--net", "user,fwd=a,fwd=b", &["fwd"]).expect("valid");
        assert!(options.switch("user").expect("a switch"));
        assert_eq!(options.take_all("fwd").expect("both"), ["a", "b"]);
        options.finish().expect("all taken");
    }

    #[test]
    fn a_path_may_stand_first_with_an_equals_sign_in_it() {
        for (text, path) in [
            ("disks/a=b.raw", "disks/a=b.raw"),
            ("./a=b.raw,readonly", "./a=b.raw"),
            ("/srv/x=1/disk", "/srv/x=1/disk"),
            ("disk.img", "disk.img"),
            ("path=a=b.raw", "a=b.raw"),
        ] {
            let text = path_first(text, &["readonly"]);
            let mut options = Options::parse("--disk", &text, &[]).expect("valid");
            assert_eq!(options.require("path").expect("a path"), path);
        }
        assert_eq!(
            path_first("readonly,path=a", &["readonly"]),
            "readonly,path=a"
        );
        assert_eq!(path_first("file=a.raw", &["readonly"]), "file=a.raw");
        let options = Options::parse("--disk", "file=a.raw", &[]).expect("valid");
        let error = options.refuse("file", "path=").expect_err("not ours");
        assert!(error.to_string().contains("use path="), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_work() {
        let wrong = |text: &str| {
            let read = || -> Result<()> {
                let mut options = Options::parse("--disk", text, &[])?;
                options.require("path")?;
                options.switch("readonly")?;
                options.number("queues", 1..=8)?;
                options.choice("format", &[("raw", ()), ("qcow2", ())])?;
                options.finish()
            };
            read().expect_err(text).to_string()
        };
        assert!(wrong("readonly").contains("lacks path="));
        assert!(wrong("path=").contains("path needs a value"));
        assert!(wrong("path=a,path=b").contains("path twice"));
        assert!(wrong("path=a,readonly=maybe").contains("use on or off"));
        assert!(wrong("path=a,queues=9").contains("from 1 to 8"));
        assert!(wrong("path=a,format=vmdk").contains("use raw or qcow2"));
        assert!(wrong("path=a,sice=1").contains("use path, readonly, queues, format"));
        assert!(wrong("path=a,b.raw").contains("a comma in a name twice"));
        assert!(wrong("path=a,").contains("an empty part"));
    }
}
