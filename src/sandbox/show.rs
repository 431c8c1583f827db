//! The sandbox, for people and for programs.

use super::{Answer, Role, Sandbox, name};
use crate::kvm::{HostArch, KvmArch};
use serde_json::{Value, json};
use std::fmt::Write;

/// What is done to confine armlet, in order: as a word and as a sentence.
const STEPS: [(&str, &str); 5] = [
    (
        "descriptors",
        "inherited descriptors are closed, but for 0, 1, 2 and those that options name",
    ),
    ("no_new_privs", "no program that is executed gains rights"),
    (
        "capabilities",
        "capabilities and supplementary groups are given up",
    ),
    (
        "landlock",
        "no file by name, TCP, abstract socket or signal to others, as far as the host has Landlock",
    ),
    ("seccomp", "system calls, by thread:"),
];

impl Sandbox {
    /// As a person reads it.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::from("Before the guest runs\n");
        // Writing to a String cannot fail.
        for (word, sentence) in STEPS {
            let _ = writeln!(out, "  {word:<13} {sentence}");
        }
        for role in Role::ALL {
            let (calls, requests) = self.shown(role);
            let _ = writeln!(out, "\n{} ({} calls)", role.name(), calls.len());
            wrap(&mut out, &calls);
            let _ = writeln!(out, "  ioctl:");
            wrap(&mut out, &requests);
        }
        let needs: Vec<_> = self.needs.iter().map(ToString::to_string).collect();
        if !needs.is_empty() {
            let _ = writeln!(out, "\nFor that, devices");
            for need in needs {
                let _ = writeln!(out, "  {need}");
            }
        }
        out.push_str("A call with a star is checked for its arguments.\n");
        out
    }

    /// As a program reads it.
    #[must_use]
    pub fn json(&self) -> Value {
        let threads = Role::ALL.map(|role| {
            let rules = self.rules(role);
            let other = &HostArch::OTHER_CALLS;
            let calls: Vec<Value> = rules
                .calls()
                .map(|call| {
                    let checked = rules.answer(call) == Answer::Checked;
                    json!({"number": call, "name": name(call, other.known), "checked": checked})
                })
                .collect();
            let requests: Vec<_> = rules.requests().map(|(name, _)| *name).collect();
            json!({"thread": role.name(), "calls": calls, "ioctl": requests})
        });
        let steps: Vec<_> = STEPS.iter().map(|(word, _)| *word).collect();
        let needs: Vec<_> = self.needs.iter().map(ToString::to_string).collect();
        json!({"mode": self.mode.name(), "steps": steps, "needs": needs, "threads": threads})
    }

    /// The names of the calls of a role, a star behind those with checked arguments, and of its requests.
    fn shown(&self, role: Role) -> (Vec<String>, Vec<String>) {
        let rules = self.rules(role);
        let calls = rules.calls().map(|call| {
            let name = name(call, HostArch::OTHER_CALLS.known);
            let name = name.map_or_else(|| call.to_string(), str::to_owned);
            match rules.answer(call) {
                Answer::Checked => name + "*",
                _ => name,
            }
        });
        let requests = rules.requests().map(|(name, _)| (*name).to_owned());
        (calls.collect(), requests.collect())
    }
}

/// Words in lines of up to 100 columns.
fn wrap(out: &mut String, words: &[String]) {
    let mut column = 100;
    for word in words {
        if column + word.len() >= 100 {
            out.push_str(if column == 100 && out.ends_with('\n') {
                "    "
            } else {
                "\n    "
            });
            column = 4;
        } else {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += word.len();
    }
    out.push('\n');
}
