//! Sizes as people write them: `512M`, `4G`.

/// The bytes that `text` means: a whole number and K, M, G or T (powers of 1024), upper or lower
/// case, with an optional `iB` or `B` behind it (`4GiB`); no letter means bytes.
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
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(refuse("has an unknown unit")),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| refuse("is more than 64 bits hold"))
}

/// `bytes` in the largest unit that divides it: `512M`, `1536K`, `7` (bytes).
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
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
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
