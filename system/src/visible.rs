//! Escapes untrusted text of guests, files and other programs: for terminals, and as a word for a
//! shell.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

/// Escapes the control characters of a text, and truncates it to about `longest` bytes with a note
/// of how much is missing.
///
/// C0 and C1 controls, line and paragraph separators, characters that are invisible or change the
/// writing direction, and invalid UTF-8 become escapes such as `\n`, `\x1b` or `\u{202e}`.
#[must_use]
pub fn visible(text: &[u8], longest: usize) -> String {
    let mut shown = String::new();
    let mut used = 0;
    'chunks: for chunk in text.utf8_chunks() {
        for character in chunk.valid().chars() {
            if shown.len() >= longest {
                break 'chunks;
            }
            used += character.len_utf8();
            show(character, &mut shown);
        }
        for byte in chunk.invalid() {
            if shown.len() >= longest {
                break 'chunks;
            }
            used += 1;
            let _ = write!(shown, "\\x{byte:02x}");
        }
    }
    let left = text.len() - used;
    if left > 0 {
        let _ = write!(shown, "... ({left} more bytes)");
    }
    shown
}

/// Like [`visible`], for a text of several lines: newlines and tabs are kept.
#[must_use]
pub fn visible_lines(text: &str) -> String {
    let mut shown = String::new();
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            _ => show(character, &mut shown),
        }
    }
    shown
}

/// Escapes in JSON what a terminal would not show; the JSON value stays the same.
#[must_use]
pub fn visible_json(json: &str) -> String {
    let mut shown = String::new();
    for character in json.chars() {
        if character != '\n' && character.is_control() || deceives(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Quotes a name as a word of a suggested shell command; a path is never taken for an option or a
/// QEMU protocol ("nbd:"). Control characters require a shell with `$'...'` (POSIX.1-2024, 2.2.4).
#[must_use]
pub fn shell_word(name: impl AsRef<OsStr>) -> String {
    let bytes = name.as_ref().as_bytes();
    let first = bytes.split(|byte| *byte == b'/').next().unwrap_or(bytes);
    let before = match first.starts_with(b"-") || first.contains(&b':') {
        true => "./",
        false => "",
    };
    let text = str::from_utf8(bytes).ok();
    match text.filter(|text| !text.chars().any(|c| c.is_control() || deceives(c))) {
        Some(text) if !text.is_empty() && text.chars().all(is_plain) => format!("{before}{text}"),
        // Suggested commands are printed in single quotes.
        Some(text) if !text.contains(['"', '$', '`', '\\', '!']) => format!("\"{before}{text}\""),
        Some(text) => format!("'{before}{}'", text.replace('\'', "'\\''")),
        None => {
            let escape = |byte: &u8| match byte {
                b'\'' | b'\\' | ..=0x1f | 0x7f.. => format!("\\x{byte:02x}"),
                _ => char::from(*byte).to_string(),
            };
            let escaped: String = bytes.iter().map(escape).collect();
            format!("$'{before}{escaped}'")
        }
    }
}

/// Returns whether a character needs no quoting anywhere in a shell word.
fn is_plain(character: char) -> bool {
    character.is_ascii_alphanumeric() || "@%+=:,./_-".contains(character)
}

fn show(character: char, shown: &mut String) {
    // Writing to a String cannot fail.
    let _ = match character {
        '\n' => shown.write_str("\\n"),
        '\r' => shown.write_str("\\r"),
        '\t' => shown.write_str("\\t"),
        '\0'..='\x1f' | '\x7f' => write!(shown, "\\x{:02x}", u32::from(character)),
        _ if character.is_control() || deceives(character) => {
            write!(shown, "\\u{{{:x}}}", u32::from(character))
        }
        _ => shown.write_char(character),
    };
}

/// Returns whether a character is invisible or changes how others are displayed (Unicode Technical
/// Report 36, section 2.5; the general categories Cf, Zl and Zp).
pub(crate) fn deceives(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}
