//! Port ranges, in the cloud's form and in friendlier ones.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// TCP or UDP ports `first..=last`, each 1-65535. (0 is matched by no rule: semantics §1.1, `1/65535` is "all".)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// Why a text is no [`PortRange`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortRangeError {
    /// Not `22`, `22/22` or `8000-8100`.
    NotAPort(String),
    /// The first port is higher than the last.
    Reversed {
        /// What was written.
        text: String,
        /// The same two ports in order.
        suggestion: String,
    },
}

impl fmt::Display for PortRangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortRangeError::NotAPort(text) => write!(
                f,
                "`{text}` is not a port range; expected 22, 22/22, 8000/8100 or 8000-8100, each port from 1 to 65535"
            ),
            PortRangeError::Reversed { text, suggestion } => {
                write!(f, "`{text}` is reversed: the first port is higher than the last; did you mean {suggestion}?")
            }
        }
    }
}

impl std::error::Error for PortRangeError {}

impl PortRange {
    /// All ports, `1/65535`.
    pub const ALL: PortRange = PortRange { first: 1, last: u16::MAX };

    /// `first..=last`.
    ///
    /// # Errors
    /// Port 0, or a reversed range.
    pub fn new(first: u16, last: u16) -> Result<PortRange, PortRangeError> {
        if first == 0 {
            return Err(PortRangeError::NotAPort(format!("{first}/{last}")));
        }
        if first > last {
            return Err(PortRangeError::Reversed {
                text: format!("{first}/{last}"),
                suggestion: format!("{last}/{first}"),
            });
        }
        Ok(PortRange { first, last })
    }

    /// The lowest port.
    #[must_use]
    pub fn first(&self) -> u16 {
        self.first
    }

    /// The highest port, included.
    #[must_use]
    pub fn last(&self) -> u16 {
        self.last
    }

    /// True if the port lies in the range.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// The cloud's form, `22/22`.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.last)
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<PortRange, PortRangeError> {
        let bad = || PortRangeError::NotAPort(text.to_owned());
        let port = |t: &str| -> Result<u16, PortRangeError> {
            let t = t.trim();
            if t.is_empty() || !t.bytes().all(|b| b.is_ascii_digit()) {
                return Err(bad());
            }
            t.parse().ok().filter(|p| *p != 0).ok_or_else(bad)
        };
        let (first, last) = match text.split_once(['/', '-']) {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last {
            return Err(PortRangeError::Reversed { text: text.to_owned(), suggestion: format!("{last}/{first}") });
        }
        Ok(PortRange { first, last })
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PortRange, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_clouds_form_and_the_friendly_ones_mean_the_same() {
        for text in ["22/22", "22", "22-22", " 22 / 22 "] {
            assert_eq!(text.parse::<PortRange>().unwrap(), PortRange::new(22, 22).unwrap(), "{text}");
        }
        assert_eq!("8000-8100".parse::<PortRange>().unwrap().to_string(), "8000/8100");
    }

    #[test]
    fn reversed_zero_and_nonsense_are_refused() {
        assert_eq!(
            "200/1".parse::<PortRange>().unwrap_err().to_string(),
            "`200/1` is reversed: the first port is higher than the last; did you mean 1/200?"
        );
        for text in ["0", "0/10", "-1/-1", "65536", "", "/", "1/", "+1", "1,2", "ssh"] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }
}
