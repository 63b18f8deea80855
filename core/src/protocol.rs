//! IP protocols by the names that security groups use, or by their IANA number.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Family;

/// What a rule's protocol field says: every protocol, or one by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// `all`.
    All,
    /// One IANA protocol number, 0-255.
    Number(u8),
}

/// The names with their numbers. Numbers are IANA's.
const NAMES: [(&str, u8); 5] = [("tcp", 6), ("udp", 17), ("icmp", 1), ("icmpv6", 58), ("gre", 47)];

/// A text that names no protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolError(pub String);

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a protocol; expected ", self.0)?;
        f.write_str("tcp, udp, icmp, icmpv6, gre, all, or an IANA number from 0 to 255")?;
        if let Some(near) = crate::nearest(&self.0, NAMES.iter().map(|(name, _)| *name).chain(["all"])) {
            write!(f, "; did you mean {near}?")?;
        }
        Ok(())
    }
}

impl std::error::Error for ProtocolError {}

impl Protocol {
    /// Transmission control protocol.
    pub const TCP: Protocol = Protocol::Number(6);
    /// User datagram protocol.
    pub const UDP: Protocol = Protocol::Number(17);
    /// ICMP for IPv4.
    pub const ICMP: Protocol = Protocol::Number(1);
    /// ICMP for IPv6.
    pub const ICMPV6: Protocol = Protocol::Number(58);
    /// Generic routing encapsulation.
    pub const GRE: Protocol = Protocol::Number(47);

    /// True for the protocols whose rules carry a port range: TCP and UDP (semantics §1.1).
    #[must_use]
    pub fn has_ports(self) -> bool {
        self == Protocol::TCP || self == Protocol::UDP
    }

    /// True if a packet with this protocol number is meant.
    #[must_use]
    pub fn matches(self, number: u8) -> bool {
        match self {
            Protocol::All => true,
            Protocol::Number(own) => own == number,
        }
    }

    /// The family that the protocol is bound to: ICMP to IPv4, ICMPv6 to IPv6, others to none.
    #[must_use]
    pub fn family(self) -> Option<Family> {
        match self {
            Protocol::ICMP => Some(Family::Ipv4),
            Protocol::ICMPV6 => Some(Family::Ipv6),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Protocol::All => f.write_str("all"),
            Protocol::Number(number) => match NAMES.iter().find(|(_, n)| n == number) {
                Some((name, _)) => f.write_str(name),
                None => number.fmt(f),
            },
        }
    }
}

impl FromStr for Protocol {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Protocol, ProtocolError> {
        let lower = text.trim().to_ascii_lowercase();
        if lower == "all" {
            return Ok(Protocol::All);
        }
        if let Some((_, number)) = NAMES.iter().find(|(name, _)| *name == lower) {
            return Ok(Protocol::Number(*number));
        }
        if lower.is_empty() || !lower.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ProtocolError(text.to_owned()));
        }
        lower.parse().map(Protocol::Number).map_err(|_| ProtocolError(text.to_owned()))
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Protocol, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn names_are_case_insensitive_and_numbers_are_their_names() {
        assert_eq!("TCP".parse::<Protocol>().unwrap(), Protocol::TCP);
        assert_eq!("58".parse::<Protocol>().unwrap().to_string(), "icmpv6");
        assert_eq!("132".parse::<Protocol>().unwrap().to_string(), "132");
        assert_eq!("0".parse::<Protocol>().unwrap(), Protocol::Number(0));
    }

    #[test]
    fn a_typo_gets_the_nearest_name() {
        assert!("tpc".parse::<Protocol>().unwrap_err().to_string().ends_with("did you mean tcp?"));
        assert!("256".parse::<Protocol>().is_err() && "".parse::<Protocol>().is_err());
    }
}
