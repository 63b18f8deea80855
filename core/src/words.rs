//! Names that operators give, and the word they probably meant.

use std::fmt;

/// Why a name is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameError {
    /// Shorter than 2 or longer than 128 characters.
    Length(usize),
    /// Does not start with a letter.
    Start,
    /// Starts with `http://` or `https://`.
    Url,
    /// Holds this character, which a name in a posture may not have.
    Character(char),
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NameError::Length(count) => write!(f, "a name has 2 to 128 characters; this one has {count}"),
            NameError::Start => f.write_str("a name starts with a letter"),
            NameError::Url => f.write_str("a name does not start with http:// or https://"),
            NameError::Character(c) => {
                write!(f, "a name holds letters, digits, and . _ - only, so that `web:443` stays readable; found {c:?}")
            }
        }
    }
}

impl std::error::Error for NameError {}

/// Checks the name of a group, list, or instance: 2-128 characters, a letter first (semantics §1.1), and then
/// letters, digits, `.`, `_` and `-`.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let count = name.chars().count();
    if !(2..=128).contains(&count) {
        return Err(NameError::Length(count));
    }
    if name.starts_with("http://") || name.starts_with("https://") {
        return Err(NameError::Url);
    }
    if !name.starts_with(char::is_alphabetic) {
        return Err(NameError::Start);
    }
    match name.chars().find(|c| !(c.is_alphanumeric() || matches!(c, '.' | '_' | '-'))) {
        Some(c) => Err(NameError::Character(c)),
        None => Ok(()),
    }
}

/// A word longer than this is never compared: edit distance is quadratic and the text is foreign.
const WORD_MAX: usize = 64;

/// The candidate that `word` is probably a typo of: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word: Vec<char> = word.to_lowercase().chars().collect();
    if word.is_empty() || word.len() > WORD_MAX {
        return None;
    }
    let limit = (word.len() / 3).max(1) + usize::from(word.len() > 3);
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() <= WORD_MAX)
        .map(|candidate| (distance(&word, &candidate.to_lowercase().chars().collect::<Vec<_>>()), candidate))
        .filter(|(distance, candidate)| *distance <= limit && *distance < candidate.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment: insert, delete, replace, swap neighbours.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replace = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replace.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typos_find_their_word_and_strangers_do_not() {
        let words = ["ingress", "egress", "members", "description"];
        assert_eq!(nearest("ingres", words), Some("ingress"));
        assert_eq!(nearest("descripton", words), Some("description"));
        assert_eq!(nearest("colour", words), None);
        assert_eq!(nearest("", words), None);
    }

    #[test]
    fn names_follow_the_clouds_rules() {
        for good in ["web", "db-1", "数据库", "a.b_c"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        assert_eq!(check_name("w"), Err(NameError::Length(1)));
        assert_eq!(check_name(&"w".repeat(129)), Err(NameError::Length(129)));
        assert_eq!(check_name("1web"), Err(NameError::Start));
        assert_eq!(check_name("http://x"), Err(NameError::Url));
        assert_eq!(check_name("we b"), Err(NameError::Character(' ')));
    }
}
