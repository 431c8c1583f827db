//! VMMs that a bench measures beside armlet: `--vmm "NAME=PROGRAM ARGUMENTS"`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::host::HostFile;

/// A VMM, as a file of this machine and arguments with places to fill in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vmm {
    /// What it is called in tables.
    pub(crate) name: String,
    /// A static program, for the architecture of the emulated host.
    pub(crate) file: PathBuf,
    /// Its arguments, which name their places in braces.
    pub(crate) arguments: Vec<String>,
}

impl Vmm {
    /// Reads `NAME=PROGRAM ARGUMENTS`. Words stand apart by spaces; one with spaces in it stands in
    /// single quotes.
    ///
    /// # Errors
    /// No name, no program, a quote that does not end.
    pub(crate) fn parse(text: &str) -> Result<Vmm> {
        let (name, command) = text
            .split_once('=')
            .with_context(|| format!("--vmm {text:?} has no name; write NAME=PROGRAM ARGUMENTS"))?;
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        ensure!(
            !name.is_empty() && name.bytes().all(is_word),
            "--vmm: {name:?} is no name; use letters, digits and .-_"
        );
        let mut words = words(command)?.into_iter();
        let file = words.next().context("--vmm names no program")?;
        Ok(Vmm {
            name: name.to_owned(),
            file: file.into(),
            arguments: words.collect(),
        })
    }

    /// Reads one VMM from each of `texts`, with names that differ from one another's and from
    /// those that are `taken`.
    ///
    /// # Errors
    /// As [`Vmm::parse`], and a name that is there already.
    pub(crate) fn parse_all(texts: &[String], taken: &[&str]) -> Result<Vec<Vmm>> {
        let mut vmms: Vec<Vmm> = Vec::new();
        for text in texts {
            let vmm = Vmm::parse(text)?;
            let name = &*vmm.name;
            ensure!(
                !taken.contains(&name) && vmms.iter().all(|other| other.name != name),
                "two VMMs are called {name:?}; give each its own name"
            );
            vmms.push(vmm);
        }
        Ok(vmms)
    }

    /// Returns where its program is in the host.
    pub(crate) fn path(&self) -> String {
        format!("/bin/vmm-{}", self.name)
    }

    /// Returns its program, for the host.
    pub(crate) fn host_file(&self) -> HostFile {
        HostFile::program(&self.file, self.path())
    }

    /// Returns its command with this many vCPUs for `{cpus}`, and the words with `{disk}` once for
    /// each of `disks`, each time with the option before it, if that is a word of its own.
    pub(crate) fn command(&self, cpus: u32, disks: &[String]) -> Vec<String> {
        let mut command = vec![self.path()];
        let mut words = self.arguments.iter().peekable();
        while let Some(word) = words.next() {
            let is_option = word.starts_with('-') && !word.contains(['=', '{']);
            let value = words
                .next_if(|next| is_option && !next.starts_with('-') && next.contains("{disk}"));
            if value.is_none() && !word.contains("{disk}") {
                command.push(word.replace("{cpus}", &cpus.to_string()));
                continue;
            }
            for disk in disks {
                let part = [Some(word), value].into_iter().flatten();
                command.extend(part.map(|word| word.replace("{disk}", disk)));
            }
        }
        command
    }
}

fn words(text: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut is_quoted = false;
    for letter in text.chars() {
        match letter {
            '\'' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            ' ' | '\t' | '\n' if !is_quoted => words.extend(word.take()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    if is_quoted {
        bail!("--vmm {text:?}: a quote does not end");
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_is_a_name_a_program_and_its_words() {
        let vmm = Vmm::parse("lkvm=/x/lkvm run  -p 'console=ttyS0 {cmdline}' ''").expect("one");
        assert_eq!(vmm.name, "lkvm");
        assert_eq!(vmm.file, PathBuf::from("/x/lkvm"));
        assert_eq!(vmm.arguments, ["run", "-p", "console=ttyS0 {cmdline}", ""]);
        for text in ["lkvm", "=x", "a b=x", "a=", "a=x 'b"] {
            assert!(Vmm::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_come_with_their_options() {
        let vmm = Vmm::parse(
            "x=/x -c={cpus} --drive=file={disk} -q --disk {disk} -v --drive=file={disk}",
        )
        .expect("one");
        let disks = ["/a".to_owned(), "/b".to_owned()];
        assert_eq!(
            vmm.command(2, &disks).join(" "),
            "/bin/vmm-x -c=2 --drive=file=/a --drive=file=/b -q --disk /a --disk /b -v \
             --drive=file=/a --drive=file=/b"
        );
        assert_eq!(vmm.command(1, &[]).join(" "), "/bin/vmm-x -c=1 -q -v");
    }

    #[test]
    fn each_vmm_has_a_name_of_its_own() {
        let of = |texts: &[&str]| {
            let texts = texts.iter().map(|text| (*text).to_owned());
            Vmm::parse_all(&texts.collect::<Vec<_>>(), &["armlet"])
        };
        assert_eq!(of(&["a=/a", "b=/a"]).expect("two").len(), 2);
        for texts in [["a=/a", "a=/b"], ["b=/b", "armlet=/a"]] {
            let error = of(&texts).expect_err("twice").to_string();
            assert!(error.contains("give each its own name"), "{error}");
        }
    }
}
