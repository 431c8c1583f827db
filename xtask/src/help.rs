//! Completions and a man page, from what armlet's `--help` says.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A command of armlet, or armlet itself.
#[derive(Debug)]
struct Page {
    /// `run`; empty for armlet itself.
    name: String,
    /// What it does, in a sentence or more.
    about: String,
    options: Vec<Choice>,
    examples: String,
    /// What else the help has, by heading.
    rest: Vec<(String, String)>,
}

/// An option.
#[derive(Debug, PartialEq)]
struct Choice {
    /// `-k`.
    short: Option<String>,
    /// `--kernel`.
    long: String,
    /// `PATH` or `auto|2|3`, for one that takes a value.
    value: Option<String>,
    about: String,
}

/// What armlet says of itself.
#[derive(Debug)]
pub(crate) struct Program {
    main: Page,
    commands: Vec<Page>,
    /// The names of the built-in boards.
    boards: Vec<String>,
}

/// What an option's value may be.
struct Values<'a> {
    words: Vec<&'a str>,
    /// Whether it may be a file as well.
    files: bool,
}

impl Program {
    /// Asks the armlet in `binary`.
    pub(crate) fn ask(binary: &Path) -> Result<Self> {
        let main = Page::read("", &help(binary, &[])?);
        let names = section(&help(binary, &[])?, "Commands");
        let mut commands = Vec::new();
        for (name, _) in entries(&names) {
            let text = help(binary, &[&name])?;
            commands.push(Page::read(&name, &text));
        }
        ensure!(!commands.is_empty(), "armlet --help names no command");
        let listed = output(binary, &["boards"])?;
        let names = listed
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        let boards: Vec<String> = names.map(str::to_owned).collect();
        ensure!(!boards.is_empty(), "armlet boards names no board");
        Ok(Self {
            main,
            commands,
            boards,
        })
    }

    /// Returns what the value of an option may be, as its help writes it: `auto|NAME|PATH`.
    fn values<'a>(&'a self, option: &'a Choice) -> Values<'a> {
        let value = option.value.as_deref().unwrap_or_default();
        // A list of NAME=WORD is no word.
        let parts = || value.split('|').filter(|_| !value.contains('='));
        let is_word = |part: &&str| !part.is_empty() && !part.contains(char::is_uppercase);
        let mut words: Vec<&str> = parts().filter(is_word).collect();
        let named = ["--board", "--host", "--show"].contains(&option.long.as_str());
        if named && parts().any(|part| ["NAME", "BOARD"].contains(&part)) {
            words.extend(self.boards.iter().map(String::as_str));
        }
        let is_file = |part: &str| ["PATH", "DISK", "PMEM"].contains(&part);
        Values {
            words,
            files: parts().any(is_file),
        }
    }

    /// Completions for bash.
    pub(crate) fn bash(&self) -> String {
        let names = self.names().join(" ");
        let mut cases = String::new();
        for page in &self.commands {
            let words: Vec<&str> = page.options.iter().map(|one| one.long.as_str()).collect();
            cases += &format!("        {}) words=\"{}\" ;;\n", page.name, words.join(" "));
        }
        let mut values = String::new();
        for option in self.valued_options() {
            let names = [option.short.as_deref(), Some(&option.long)];
            let names: Vec<&str> = names.into_iter().flatten().collect();
            let values_of = self.values(option);
            let words = values_of.words.join(" ");
            let files = match values_of.files {
                true => "; compgen -f -- \"$word\"",
                false => "",
            };
            let reply = format!("compgen -W \"{words}\" -- \"$word\"{files}");
            values += &format!(
                "        {}) mapfile -t COMPREPLY < <({reply}); return ;;\n",
                names.join("|")
            );
        }
        format!(
            "# Completions of armlet for bash.\n\
             _armlet() {{\n    \
             local word=${{COMP_WORDS[COMP_CWORD]}} last=${{COMP_WORDS[COMP_CWORD-1]}} words\n    \
             case $last in\n{values}    esac\n    \
             case ${{COMP_WORDS[1]}} in\n{cases}        *) words=\"{names} --help --version\" ;;\n    esac\n    \
             [ \"$COMP_CWORD\" = 1 ] && words=\"{names} --help --version\"\n    \
             mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\")\n\
             }}\n\
             complete -o filenames -F _armlet armlet\n"
        )
    }

    /// Completions for zsh.
    pub(crate) fn zsh(&self) -> String {
        let mut text = String::from("#compdef armlet\n# Completions of armlet for zsh.\n\n");
        text += "_armlet_words_or_files() {\n    _alternative \"words:word:($*)\" 'files:file:_files'\n}\n\n";
        text += "_armlet() {\n    local -a commands=(\n";
        for page in &self.commands {
            text += &format!(
                "        '{}:{}'\n",
                page.name,
                zsh_quoted(first_sentence(&page.about))
            );
        }
        text += "    )\n    if (( CURRENT == 2 )); then\n        _describe command commands\n        return\n    fi\n";
        text += "    case $words[2] in\n";
        for page in &self.commands {
            text += &format!(
                "    {})\n        shift words; (( CURRENT-- ))\n        _arguments",
                page.name
            );
            for option in &page.options {
                let about = zsh_quoted(&option.about);
                let values = self.values(option);
                let words = values.words.join(" ");
                let value = match (&option.value, words.is_empty(), values.files) {
                    (None, ..) => String::new(),
                    (Some(_), true, true) => ":value:_files".to_owned(),
                    (Some(_), true, false) => ":value: ".to_owned(),
                    // The space before it: nothing is put between its words.
                    (Some(_), false, true) => format!(":value: _armlet_words_or_files {words}"),
                    (Some(_), false, false) => format!(":value:({words})"),
                };
                // An option may be given again, as --disk is.
                text += &format!(" \\\n            '*{}[{about}]{value}'", option.long);
            }
            text += "\n        ;;\n";
        }
        text + "    esac\n}\n\n_armlet \"$@\"\n"
    }

    /// Completions for fish.
    pub(crate) fn fish(&self) -> String {
        let mut text = String::from("# Completions of armlet for fish.\ncomplete -c armlet -f\n");
        for page in &self.commands {
            let about = fish_quoted(first_sentence(&page.about));
            text += &format!(
                "complete -c armlet -n __fish_use_subcommand -a {} -d '{about}'\n",
                page.name
            );
            for option in &page.options {
                let long = option.long.trim_start_matches('-');
                let short = match option.short.as_deref() {
                    Some(short) => format!(" -s {}", short.trim_start_matches('-')),
                    None => String::new(),
                };
                let values = self.values(option);
                let words = values.words.join(" ");
                let value = match (&option.value, words.is_empty(), values.files) {
                    (None, ..) => String::new(),
                    (Some(_), true, true) => " -r -F".to_owned(),
                    (Some(_), true, false) => " -x".to_owned(),
                    (Some(_), false, true) => format!(" -r -F -a '{words}'"),
                    (Some(_), false, false) => format!(" -x -a '{words}'"),
                };
                text += &format!(
                    "complete -c armlet -n '__fish_seen_subcommand_from {}' -l {long}{short}{value} -d '{}'\n",
                    page.name,
                    fish_quoted(&option.about)
                );
            }
        }
        text
    }

    /// Returns the man page, in roff (man(7)), dated `time` seconds after 1970.
    pub(crate) fn man_page(&self, version: &str, time: u64) -> Result<String> {
        let date = Command::new("date")
            .args(["-u", "-d", &format!("@{time}"), "+%Y-%m-%d"])
            .output()
            .context("cannot run date")?;
        let date = String::from_utf8_lossy(&date.stdout).trim().to_owned();
        let mut text = format!(
            ".TH ARMLET 1 {date} \"armlet {version}\" \"User Commands\"\n\
             .SH NAME\narmlet \\- {}\n\
             .SH SYNOPSIS\n.B armlet\n.I command\n[options]\n.br\n.B armlet\n\\-\\-help | \\-\\-version\n\
             .SH DESCRIPTION\n{}\n",
            roff("small virtual machine monitor for KVM on ARM64"),
            roff(&self.main.about)
        );
        for page in &self.commands {
            text += &format!(
                ".SH \"ARMLET {}\"\n{}\n",
                page.name.to_uppercase(),
                roff(&page.about)
            );
            for option in &page.options {
                let names = [option.short.as_deref(), Some(&option.long)];
                let names: Vec<String> = names.into_iter().flatten().map(roff).collect();
                let value = option.value.as_deref().map(roff).unwrap_or_default();
                text += &format!(
                    ".TP\n\\fB{}\\fR {value}\n{}\n",
                    names.join("\\fR, \\fB"),
                    roff(&option.about)
                );
            }
            if !page.examples.is_empty() {
                text += &format!(
                    ".PP\nExamples:\n.PP\n.nf\n{}.fi\n",
                    roff_lines(&page.examples)
                );
            }
        }
        for (heading, body) in &self.main.rest {
            text += &format!(
                ".SH \"{}\"\n.nf\n{}.fi\n",
                heading.to_uppercase(),
                roff_lines(body)
            );
        }
        Ok(text)
    }

    fn names(&self) -> Vec<&str> {
        self.commands
            .iter()
            .map(|page| page.name.as_str())
            .collect()
    }

    /// Returns the options that take a value, each name once.
    fn valued_options(&self) -> Vec<&Choice> {
        let mut found: Vec<&Choice> = Vec::new();
        for option in self.commands.iter().flat_map(|page| &page.options) {
            let known = found.iter().any(|other| other.long == option.long);
            if option.value.is_some() && !known {
                found.push(option);
            }
        }
        found
    }
}

impl Page {
    fn read(name: &str, text: &str) -> Self {
        let mut paragraphs = text.split("\n\n");
        let usage = paragraphs.next().unwrap_or_default();
        let about = paragraphs.next().unwrap_or_default().replace('\n', " ");
        let options = entries(&section(text, "Options"))
            .into_iter()
            .map(|(names, about)| {
                let mut names: Vec<&str> = names.split(", ").collect();
                // A page's last option is "--help, help".
                names.retain(|name| name.starts_with('-'));
                let long = names.iter().find(|name| name.starts_with("--"));
                let long = long.copied().unwrap_or_default().to_owned();
                let short = names.iter().find(|name| !name.starts_with("--"));
                Choice {
                    value: value_of(usage, &names),
                    short: short.map(|&name| name.to_owned()),
                    long,
                    about,
                }
            })
            .collect();
        let rest = ["Notes", "Error codes"]
            .map(|heading| (heading.to_owned(), section(text, heading)))
            .into_iter()
            .filter(|(_, body)| !body.is_empty())
            .collect();
        Self {
            name: name.to_owned(),
            about,
            options,
            examples: section(text, "Examples"),
            rest,
        }
    }
}

/// `PATH` for an option that the usage shows as `[-k <PATH>]`.
fn value_of(usage: &str, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| {
        let (_, rest) = usage.split_once(&format!("[{name} <"))?;
        let (value, _) = rest.split_once('>')?;
        Some(value.trim_end_matches("...").to_owned())
    })
}

fn help(binary: &Path, words: &[&str]) -> Result<String> {
    output(binary, &[words, &["--help"]].concat())
}

/// Returns what a program prints.
fn output(binary: &Path, words: &[&str]) -> Result<String> {
    let output = Command::new(binary)
        .args(words)
        .output()
        .with_context(|| format!("cannot run {binary:?}"))?;
    ensure!(output.status.success(), "{binary:?} {words:?} fails");
    String::from_utf8(output.stdout).context("what it prints is no text")
}

/// Returns the lines behind `Heading:`, up to the next heading.
fn section(text: &str, heading: &str) -> String {
    let head = format!("{heading}:");
    let lines = text.lines().skip_while(|line| *line != head).skip(1);
    let lines = lines.take_while(|line| line.is_empty() || line.starts_with(' '));
    let body: String = lines.map(|line| format!("{line}\n")).collect();
    match body.trim_end() {
        "" => String::new(),
        body => format!("{body}\n"),
    }
}

/// Names and what stands beside them, over as many lines as it takes.
fn entries(section: &str) -> Vec<(String, String)> {
    let mut entries: Vec<(String, String)> = Vec::new();
    for line in section.lines() {
        let begins = line.starts_with("  ") && !line.starts_with("   ");
        match entries.last_mut() {
            _ if begins => {
                let (name, about) = line.trim().split_once("  ").unwrap_or((line.trim(), ""));
                entries.push((name.to_owned(), about.trim().to_owned()));
            }
            Some((_, about)) => {
                if !about.is_empty() {
                    about.push(' ');
                }
                about.push_str(line.trim());
            }
            None => {}
        }
    }
    entries
}

fn first_sentence(text: &str) -> &str {
    text.split_once(". ").map_or(text, |(first, _)| first)
}

/// `text` within a zsh specification in single quotes.
fn zsh_quoted(text: &str) -> String {
    let text = text.replace('\'', "'\\''").replace(':', "\\:");
    text.replace('[', "\\[").replace(']', "\\]")
}

fn fish_quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\'', "\\'")
}

/// `text` as a line of roff that is taken literally.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    match text.starts_with(['.', '\'']) {
        true => format!("\\&{text}"),
        false => text,
    }
}

fn roff_lines(text: &str) -> String {
    text.lines()
        .map(|line| format!("{}\n", roff(line)))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const HELP: &str = "Usage: armlet run [-k <PATH>] [--gic <auto|2|3>] [-v] [-d <DISK...>] [-b <auto|NAME|PATH>] [--host <BOARD|this>] [--pv <NAME=on|off|auto,..>]\n\n\
        Run a guest. It's this terminal's.\n\n\
        Options:\n  -k, --kernel      kernel to boot: Image,\n                    raw\n\
        \x20 --gic             version\n  -v, --verbose     say more\n  -d, --disk        disk\n\
        \x20 -b, --board       board\n  --host            host\n  --pv              what KVM offers\n\
        \x20 --a-rather-long-option\n                    it's long [really]\n\
        \x20 --help, help      display usage information\n\n\
        Examples:\n  A shell:\n    armlet run -k Image\n\nError codes:\n  0 Done.\n";

    fn program() -> Program {
        Program {
            main: Page::read("", HELP),
            commands: vec![Page::read("run", HELP)],
            boards: vec!["virt".to_owned(), "rpi5".to_owned()],
        }
    }

    #[test]
    fn options_are_read_with_their_values() {
        let page = Page::read("run", HELP);
        let option = |long: &str| page.options.iter().find(|one| one.long == long).unwrap();
        let kernel = option("--kernel");
        assert_eq!(kernel.short.as_deref(), Some("-k"));
        assert_eq!(kernel.value.as_deref(), Some("PATH"));
        assert_eq!(kernel.about, "kernel to boot: Image, raw");
        let program = program();
        let words = |long| program.values(option(long)).words;
        assert_eq!(words("--gic"), ["auto", "2", "3"]);
        assert_eq!(words("--board"), ["auto", "virt", "rpi5"]);
        assert_eq!(words("--host"), ["this", "virt", "rpi5"]);
        assert_eq!(words("--pv"), [""; 0]);
        assert!(program.values(option("--board")).files && program.values(option("--disk")).files);
        assert!(!program.values(option("--gic")).files);
        assert_eq!(option("--disk").value.as_deref(), Some("DISK"));
        assert_eq!(option("--verbose").value, None);
        assert_eq!(option("--a-rather-long-option").about, "it's long [really]");
        assert_eq!(page.examples, "  A shell:\n    armlet run -k Image\n");
        assert_eq!(page.rest[0].1, "  0 Done.\n");
    }

    #[test]
    fn shells_read_their_completions() {
        let program = program();
        for (shell, text) in [
            ("bash", program.bash()),
            ("zsh", program.zsh()),
            ("fish", program.fish()),
        ] {
            assert!(
                text.contains("kernel") && text.contains("auto 2 3"),
                "{text}"
            );
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &text).unwrap();
            match Command::new(shell).arg("-n").arg(file.path()).output() {
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success(), "{shell}: {said}\n{text}");
                }
                Err(error) => println!("{shell} is not checked: {error}"),
            }
        }
        assert!(program.zsh().contains("it'\\''s long \\[really\\]"));
    }

    #[test]
    fn bash_completes_commands_options_and_values() {
        let text = program().bash();
        for (words, expected) in [
            ("armlet r", "run"),
            ("armlet run --k", "--kernel"),
            ("armlet run --gic a", "auto"),
            ("armlet run --board rp", "rpi5"),
            ("armlet run -b v", "virt"),
            ("armlet plan --host t", "this"),
        ] {
            let count = words.split(' ').count() - 1;
            let script = format!(
                "{text}\nCOMP_WORDS=({words}); COMP_CWORD={count}; _armlet; echo \"${{COMPREPLY[*]}}\""
            );
            let output = Command::new("bash").args(["-c", &script]).output().unwrap();
            assert_eq!(
                String::from_utf8_lossy(&output.stdout).trim(),
                expected,
                "{words}"
            );
        }
    }

    #[test]
    fn fish_completes_the_boards() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), program().fish()).unwrap();
        for (line, expected) in [
            ("armlet run --board rp", "rpi5"),
            ("armlet run -b vi", "virt"),
            ("armlet run --host th", "this"),
        ] {
            let script = format!("source {}; complete -C '{line}'", file.path().display());
            let Ok(output) = Command::new("fish").args(["-N", "-c", &script]).output() else {
                println!("skipped: there is no fish here");
                return;
            };
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(
                said.lines()
                    .any(|word| word.split('\t').next() == Some(expected)),
                "{line}: {said}"
            );
        }
    }

    #[test]
    fn the_man_page_has_every_option() {
        let text = program().man_page("0.1.0", 0).unwrap();
        assert!(text.starts_with(".TH ARMLET 1 1970-01-01"), "{text}");
        assert!(
            text.contains("\\fB\\-k\\fR, \\fB\\-\\-kernel\\fR PATH"),
            "{text}"
        );
        assert!(text.contains("ERROR CODES"), "{text}");
    }
}
