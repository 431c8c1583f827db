//! Suggestions for options that a command does not have: the option that was probably meant.

use super::{devices, habits, is_switch};
use argh::EarlyExit;
use armlet_arch::words::nearest;

/// The commands, of which the first has the most options.
pub(super) const COMMANDS: [&str; 8] = [
    "run", "plan", "probe", "boards", "jail", "ctl", "api", "snapshot",
];

/// Describes what is wrong with `word`, which argh rejects among `words` (the arguments after the
/// program's name).
pub(super) fn explain(word: &str, words: &[&str]) -> String {
    let command = words.first().copied().filter(|first| is_command(first));
    let help = help_of(command);
    let valid = names_in(&help);
    let list = || {
        format!(
            "Unrecognized argument: {word} (valid here: {})",
            valid.join(", ")
        )
    };
    let stray = !word.starts_with('-') || word.trim_start_matches('-').is_empty();
    if stray {
        return match command {
            None => format!(
                "'{word}' is no command; use {} (see 'armlet --help')",
                COMMANDS.join(", ")
            ),
            Some(_) if valid.contains(&"--kernel") => format!(
                "'{word}' belongs to no option; a kernel is named by --kernel, a disk by --disk"
            ),
            Some(_) => list(),
        };
    }
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    let Some(command) = command else {
        // 'armlet --kernel Image', as other programs take it.
        let meant = meant(name, value, &help_of(Some(COMMANDS[0])));
        let first = COMMANDS[0];
        return match meant.is_some() || is_short(name, &help_of(Some(first))) {
            true => format!("{word}: name the command first: armlet {first} {word}"),
            false => list(),
        };
    };
    // A value that begins with a dash is another option, in what others take.
    let follows = words.iter().skip_while(|other| **other != word).nth(1);
    let value = value.or(follows.filter(|value| !value.starts_with('-')).copied());
    if let Some(meant) = meant(name, value, &help) {
        // The value that belongs to it is shown with it, where it is short.
        let shown = value.filter(|value| meant.contains("use ") && value.len() <= habits::SHOWN);
        return match shown.filter(|_| word == name) {
            Some(value) => format!("{word} {value}: {meant}"),
            None => format!("{word}: {meant}"),
        };
    }
    let other = COMMANDS
        .iter()
        .find(|other| names_in(&help_of(Some(other))).contains(&name));
    match other {
        Some(other) => {
            format!("{word} is an option of 'armlet {other}', not of 'armlet {command}'")
        }
        None => list(),
    }
}

/// Suggests what to use instead of `name`, if there is a likely candidate.
fn meant(name: &str, value: Option<&str>, help: &str) -> Option<String> {
    let valid = names_in(help);
    let bare = name.trim_start_matches('-');
    let known = |bare: &str| valid.iter().find(|valid| valid[2..] == *bare);
    if valid.contains(&"--kernel")
        && let Some(here) = habits::instead(bare, value)
    {
        return Some(here);
    }
    if let Some(known) = known(bare) {
        return Some(habits::used(
            known,
            value.filter(|_| !is_switch(COMMANDS[0], known)),
        ));
    }
    // '-m=1G' and '-m1G'.
    let (short, rest) = name.split_at_checked(2)?;
    if is_short(short, help) {
        match (rest, value) {
            ("", Some(value)) => return Some(format!("use {short} {value}")),
            (digits, None) if digits.starts_with(|c: char| c.is_ascii_digit()) => {
                return Some(format!("use {short} {digits}"));
            }
            _ => {}
        }
    }
    let bare_names = valid.iter().map(|valid| &valid[2..]);
    nearest(bare, bare_names)
        .filter(|(_, distance)| bare.len() > 3 && *distance <= 2)
        .map(|(nearest, _)| {
            let nearest = format!("--{nearest}");
            habits::used(
                &nearest,
                value.filter(|_| !is_switch(COMMANDS[0], &nearest)),
            )
        })
}

fn is_command(word: &str) -> bool {
    COMMANDS.contains(&word)
}

/// Returns the text of `--help`, of a command or of armlet itself.
fn help_of(command: Option<&str>) -> String {
    let words: Vec<&str> = command.into_iter().chain(["--help"]).collect();
    match devices::parse(&words) {
        Err(EarlyExit { output, .. }) => output,
        Ok(_) => String::new(),
    }
}

/// Returns the long names of the options in a help text.
fn names_in(help: &str) -> Vec<&str> {
    help.lines()
        .filter_map(|line| {
            let line = line.strip_prefix("  ")?;
            let mut words = line.split_whitespace();
            let name = words.find(|word| word.starts_with("--"));
            match name.map(|name| name.trim_end_matches(',')) {
                Some(name) if line.starts_with('-') => Some(name),
                _ => None,
            }
        })
        .collect()
}

/// Returns whether a help text has the one-letter option `-m`.
fn is_short(name: &str, help: &str) -> bool {
    name.len() == 2 && help.contains(&format!("\n  {name}, --"))
}
