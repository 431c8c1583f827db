//! Sizes as people write them: `512M`, `4G`.

use crate::words::size_in;

/// Returns the bytes that `text` means: a whole number and K, M, G or T (powers of 1024), upper or
/// lower case, with an optional `i`, `iB` or `B` after it (`4Gi`, `4GiB`); no letter means bytes.
///
/// # Errors
/// One sentence that says what is wrong and shows what is valid.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let refuse = |why: &str| {
        format!("size '{text}' {why}; write a whole number with K, M, G or T: 512M, 4G")
    };
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(refuse("does not begin with a number"));
    }
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kb" | "kib" => 10,
        "m" | "mi" | "mb" | "mib" => 20,
        "g" | "gi" | "gb" | "gib" => 30,
        "t" | "ti" | "tb" | "tib" => 40,
        _ => return Err(refuse("has an unknown unit")),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| refuse("is more than 64 bits hold"))
}

/// Like [`parse_size`], for guest memory: a number without a unit that is less than 1 MiB is
/// refused, because other VMMs take it as MiB, and so is what else they take (`size=1G,slots=2`).
///
/// # Errors
/// As [`parse_size`], and with the unit that is most likely meant.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = match parse_size(text) {
        Ok(bytes) => bytes,
        Err(error) => {
            let meant = size_in(text);
            let is_other = meant != text && parse_size(meant).is_ok();
            return Err(match is_other {
                true => {
                    let unit = if meant.parse::<u64>().is_ok() {
                        "M"
                    } else {
                        ""
                    };
                    format!("for '{text}' use {meant}{unit}")
                }
                false => error,
            });
        }
    };
    match text.parse::<u64>() {
        Ok(number) if (1..1 << 20).contains(&number) => Err(format!(
            "{number} bytes is too little; for {number} MiB use {number}M"
        )),
        _ => Ok(bytes),
    }
}

/// Formats `bytes` in the largest unit that divides it: `512M`, `1536K`, `7` (bytes).
#[must_use]
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_usual_spellings_are_read() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4g"), Ok(4 << 30));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1Gi"), Ok(1 << 30));
        assert_eq!(parse_size("512mi"), Ok(512 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
    }

    #[test]
    fn memory_without_a_unit_is_asked_about() {
        for (text, meant) in [
            ("512", "512 bytes is too little; for 512 MiB use 512M"),
            ("1536", "use 1536M"),
            ("1", "use 1M"),
            ("65535", "for 65535 MiB use 65535M"),
            ("size=512M", "use 512M"),
            ("512,slots=2,maxmem=8G", "use 512M"),
        ] {
            let error = parse_memory(text).expect_err(text);
            assert!(error.contains(meant), "{error}");
        }
        assert_eq!(parse_memory("0"), Ok(0));
        assert_eq!(parse_memory("64K"), Ok(64 << 10));
        assert_eq!(parse_memory("1073741824"), Ok(1 << 30));
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in [
            "",
            "M",
            "12X",
            "-1G",
            "1.5G",
            "99999999999999999999",
            "16777217T",
            "4 G",
        ] {
            let error = parse_size(text).expect_err(text);
            assert!(error.contains("512M"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(bytes: u64) {
            prop_assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = parse_size(&text);
        }
    }
}
