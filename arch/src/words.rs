//! Suggests corrections for misspelt words.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_is_the_one_with_the_fewest_changes() {
        let names = ["kernel", "memory", "cpus"];
        assert_eq!(nearest("kernle", names), Some(("kernel", 2)));
        assert_eq!(nearest("cpu", names), Some(("cpus", 1)));
        assert_eq!(nearest("x", []), None);
    }
}
