//! The options of devices: rows of the table of kinds, beside those that argh knows.

use super::{Cli, is_switch};
use argh::{EarlyExit, FromArgs};
use armlet_backends::kind::Kind;
use armlet_backends::open::KINDS;
use std::fmt::Write;

/// Values of options, each with the kind of device that it is of, in the order in which they were given.
pub type DeviceArgs = Vec<(&'static Kind, String)>;

/// The commands that take devices.
const COMMANDS: [&str; 2] = ["run", "plan"];
/// The option that follows those of devices in the help.
const NEXT: &str = "--deterministic";
/// What begins a line of the help that goes on with an option's description.
const INDENT: &str = "\n                    ";

/// Parses the words that follow the program's name.
///
/// # Errors
/// As argh: a help text, or what is wrong.
pub(super) fn parse(words: &[&str]) -> Result<(Cli, DeviceArgs), EarlyExit> {
    let (rest, devices) = take(words);
    match Cli::from_args(&["armlet"], &rest) {
        Ok(cli) => Ok((cli, devices?)),
        Err(EarlyExit {
            output,
            status: Ok(()),
        }) => Err(EarlyExit {
            output: with_devices(output),
            status: Ok(()),
        }),
        // What argh says is about words before the one that `take` stopped at.
        wrong => Err(wrong.err().unwrap_or_else(|| String::new().into())),
    }
}

/// Takes the options of devices out of the words; what is wrong with one ends that.
fn take<'a>(words: &[&'a str]) -> (Vec<&'a str>, Result<DeviceArgs, EarlyExit>) {
    let is_command = |word: &&str| !word.starts_with('-');
    let at = words.iter().position(is_command);
    let Some(at) = at.filter(|at| COMMANDS.contains(&words[*at])) else {
        return (words.to_vec(), Ok(Vec::new()));
    };
    let (before, after) = words.split_at(at + 1);
    let mut rest = before.to_vec();
    let mut devices = DeviceArgs::new();
    let mut after = after.iter().copied();
    // A word that asks for help ends the options.
    if before.contains(&"--help") {
        rest.extend(after);
        return (rest, Ok(devices));
    }
    while let Some(word) = after.next() {
        let is_it =
            |kind: &&&Kind| word.strip_prefix("--") == Some(kind.name) || kind.letter == Some(word);
        let Some(kind) = KINDS.iter().find(is_it) else {
            rest.push(word);
            if matches!(word, "--" | "--help") || !word.starts_with('-') {
                rest.extend(after);
                break;
            }
            if !is_switch(words[at], word) {
                rest.extend(after.next());
            }
            continue;
        };
        // What begins with a dash is the next option: kvmtool's --balloon and --rng have no value.
        let is_value = |value: &&str| value.len() < 2 || !value.starts_with('-');
        let Some(value) = after.next().filter(is_value) else {
            let wrong = format!("No value provided for option '{word}'.");
            return (rest, Err(wrong.into()));
        };
        if !kind.repeats && devices.iter().any(|(of, _)| of.name == kind.name) {
            let wrong = format!(
                "Error parsing option '{word}' with value '{value}': duplicate values provided"
            );
            return (rest, Err(wrong.into()));
        }
        devices.push((kind, value.to_owned()));
    }
    (rest, Ok(devices))
}

/// A command's help with the options of devices, if the command takes them.
fn with_devices(mut help: String) -> String {
    let (mut usage, mut lines) = (String::new(), String::new());
    for kind in KINDS {
        let long = format!("--{}", kind.name);
        let (first, flags) = match kind.letter {
            Some(letter) => (letter, format!("{letter}, {long}")),
            None => (long.as_str(), long.clone()),
        };
        let more = if kind.repeats { "..." } else { "" };
        // What a String is written to does not fail.
        let _ = write!(usage, "[{first} <{}{more}>] ", kind.value);
        let text = kind.help.replace('\n', INDENT);
        let _ = write!(lines, "\n  {flags:<17} {text}");
    }
    if let Some(at) = help.find(&format!("\n  {NEXT}")) {
        help.insert_str(at, &lines);
    }
    if let Some(at) = help.find(&format!("[{NEXT}]")) {
        help.insert_str(at, &usage);
    }
    help
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::SWITCHES;

    fn words(text: &str) -> Vec<&str> {
        text.split(' ').collect()
    }

    fn given(text: &str) -> Vec<(&'static str, String)> {
        let Ok((_, devices)) = parse(&words(text)) else {
            panic!("{text}: refused");
        };
        let named = devices.into_iter().map(|(kind, text)| (kind.name, text));
        named.collect()
    }

    #[test]
    fn the_values_of_devices_are_taken_wherever_they_stand() {
        let given = given("run -d a -v --net user -k Image --disk b --cmdline --rng --vsock cid=3");
        let wanted = [
            ("disk", "a"),
            ("net", "user"),
            ("disk", "b"),
            ("vsock", "cid=3"),
        ];
        assert_eq!(given, wanted.map(|(name, text)| (name, text.to_owned())));
        assert!(self::given("probe").is_empty());
    }

    #[test]
    fn what_is_wrong_is_said_of_the_first_word_that_is() {
        let wrong = |text: &str| match parse(&words(text)) {
            Err(EarlyExit {
                output,
                status: Err(()),
            }) => output.trim().to_owned(),
            _ => panic!("{text}: not refused"),
        };
        let missing = "No value provided for option '--disk'.";
        assert_eq!(wrong("run --disk"), missing);
        let both = wrong("run --bogus 1 --disk");
        assert_eq!(both, "Unrecognized argument: --bogus");
        let twice = "Error parsing option '--vsock' with value 'cid=4': duplicate values provided";
        assert_eq!(wrong("plan --vsock cid=3 --vsock cid=4"), twice);
        for text in ["probe --disk a", "run -- --disk a", "run x --disk a"] {
            assert!(wrong(text).starts_with("Unrecognized argument: "), "{text}");
        }
        let after = "Trailing arguments are not allowed after `help`.";
        assert_eq!(wrong("run --help --disk a"), after);
    }

    #[test]
    fn switches_are_those_options_that_take_no_value() {
        let mut found = Vec::new();
        for command in COMMANDS {
            let Err(EarlyExit { output, .. }) = parse(&[command, "--help"]) else {
                panic!("{command}: no help");
            };
            let (usage, rest) = output.split_once('\n').expect("a line");
            for option in usage.split('[').skip(1) {
                let option = option.split(']').next().expect("its end");
                if option.contains('<') {
                    let name = option.split(' ').next().expect("a name");
                    assert!(!is_switch(command, name), "{command} {name} takes a value");
                    continue;
                }
                assert!(
                    is_switch(command, option),
                    "{command} {option} takes no value"
                );
                found.push(option.to_owned());
                // "  -v, --verbose   ..."
                let mut lines = rest.lines().map(str::trim_start);
                let long = lines.find_map(|line| line.strip_prefix(&format!("{option}, ")));
                found.extend(long.and_then(|line| line.split(' ').next().map(str::to_owned)));
            }
        }
        for option in SWITCHES {
            assert!(
                found.iter().any(|found| found == option),
                "{option}: no option"
            );
        }
    }
}
