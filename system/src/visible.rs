//! Text of guests, files and other programs, as it may be shown: without control characters, and
//! as a word for a shell.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

/// Makes the control characters of a text visible, and cuts it at `longest` bytes or a few more,
/// which say how much is left out.
///
/// C0 and C1, line and paragraph separators, what changes the direction of writing or cannot be
/// seen, and bytes that are no UTF-8 become escapes such as `\n`, `\x1b` or `\u{202e}`.
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

/// As [`visible`], of a text of several lines: the ends of its lines and its tabs stay.
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

/// Makes what a terminal would not show visible in JSON, whose value stays the same.
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

/// Returns a name as a word of a command that a user is told to give to a shell; a path is never
/// taken for an option or a protocol of QEMU ("nbd:"). With control characters in it, for shells
/// that know `$'...'` (POSIX.1-2024, 2.2.4).
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
        // Advice stands in single quotes.
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

/// Returns whether a shell takes a character as it is, wherever it stands in a word.
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

/// Returns whether a character changes how others are shown, or cannot be seen (Unicode Technical
/// Report 36, section 2.5; the general categories Cf, Zl and Zp).
pub(crate) fn deceives(character: char) -> bool {
    matches!(
        character,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}
