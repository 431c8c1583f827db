//! Answers, as one line of JSON or as lines for people.

use anyhow::Result;
use armlet_system::messages::visible_json;
use serde_json::{Value, json};
use std::fmt::Write;

/// The word before a request whose answer is to be read by people.
pub(super) const TEXT: &str = "text";
/// How an answer for people begins; it ends with an empty line.
pub(super) const DONE: &str = "ok\n";
pub(super) const REFUSED: &str = "error: ";

/// An answer for people or for programs.
pub(super) fn of(answer: Result<Value>, is_text: bool) -> String {
    match is_text {
        true => as_text(answer),
        false => as_json(answer),
    }
}

/// One line of JSON: `{"ok":...}` or `{"error":"..."}`.
pub(super) fn as_json(answer: Result<Value>) -> String {
    let value = match answer {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    visible_json(&format!("{value}\n"))
}

/// Lines, the last of them empty.
pub(super) fn as_text(answer: Result<Value>) -> String {
    match answer {
        Ok(value) => format!("{DONE}{}\n", lines(&value)),
        Err(error) => format!("{REFUSED}{error:#}\n\n"),
    }
}

fn lines(value: &Value) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = name.replace('_', " ");
                let _ = writeln!(text, "{name}: {}", in_a_row(value));
            }
        }
        Value::Array(values) => {
            for value in values {
                let _ = writeln!(text, "{}", in_a_row(value));
            }
        }
        other => {
            let _ = writeln!(text, "{}", in_a_row(other));
        }
    }
    text
}

fn in_a_row(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(in_a_row).collect();
            values.join(" ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_for_programs_or_people() {
        let value =
            || json!({ "state": "running", "memory_bytes": 1024, "devices": ["disk0", "rng"] });
        let json = as_json(Ok(value()));
        let read: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(read, json!({ "ok": value() }));
        assert_eq!(json.lines().count(), 1);
        let text = as_text(Ok(value()));
        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines.remove(0), lines.pop()), ("ok", Some("")));
        lines.sort_unstable();
        assert_eq!(
            lines,
            ["devices: disk0 rng", "memory bytes: 1024", "state: running"]
        );
        assert_eq!(as_text(Ok(Value::Null)), "ok\n\n");
        assert_eq!(as_text(Ok(json!(["one", "two"]))), "ok\none\ntwo\n\n");
        let error = || anyhow::anyhow!("why").context("what");
        assert_eq!(as_json(Err(error())), "{\"error\":\"what: why\"}\n");
        assert_eq!(as_text(Err(error())), "error: what: why\n\n");
    }
}
