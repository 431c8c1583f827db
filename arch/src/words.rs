//! Suggests corrections for misspelt words, and for values as other programs write them.

/// Returns the name with the smallest Levenshtein distance to `word`, and that distance; `None`
/// without names.
#[must_use]
pub fn nearest<'a>(
    word: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Option<(&'a str, usize)> {
    let names = names.into_iter().map(|name| (name, distance(name, word)));
    names.min_by_key(|(_, distance)| *distance)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Returns the value of `name` among parts `name=value` between commas.
#[must_use]
pub fn part<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut parts = text.split(',').filter_map(|part| part.split_once('='));
    parts.find(|(of, _)| *of == name).map(|(_, value)| value)
}

/// Returns the number of vCPUs in a value as other programs write it: `cpus=4,cores=2` or `4,maxcpus=8`
/// (QEMU), `boot=4` (Cloud Hypervisor), `num-cores=4` (crosvm).
#[must_use]
pub fn cpus_in(text: &str) -> Option<&str> {
    let names = ["cpus", "boot", "num-cores"];
    let named = names.iter().find_map(|name| part(text, name));
    let first = named.or_else(|| text.split(',').next());
    first.filter(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns the size in a value as other programs write it: `size=512M,slots=2` or `512M,slots=2`.
#[must_use]
pub fn size_in(text: &str) -> &str {
    let first = text.split(',').next().unwrap_or_default();
    part(text, "size").unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_what_other_programs_take() {
        for text in [
            "4",
            "cpus=4,cores=2",
            "4,maxcpus=8",
            "boot=4,max=8",
            "num-cores=4",
        ] {
            assert_eq!(cpus_in(text), Some("4"), "{text}");
        }
        for text in ["", "cores=2", "four", "boot=", "-1"] {
            assert_eq!(cpus_in(text), None, "{text}");
        }
        for text in ["1G", "1G,slots=2", "size=1G", "slots=2,size=1G,shared=on"] {
            assert_eq!(size_in(text), "1G", "{text}");
        }
    }

    #[test]
    fn the_nearest_is_the_one_with_the_fewest_changes() {
        let names = ["kernel", "memory", "cpus"];
        assert_eq!(nearest("kernle", names), Some(("kernel", 2)));
        assert_eq!(nearest("cpu", names), Some(("cpus", 1)));
        assert_eq!(nearest("x", []), None);
    }
}
