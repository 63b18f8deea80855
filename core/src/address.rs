//! Addresses as the policy sees them: prefixes that operators write, ranges that compilers cut.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The two address families. A rule is of exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const BOTH: [Family; 2] = [Family::Ipv4, Family::Ipv6];

    /// Address length in bits: 32 or 128.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Family::Ipv4 => 32,
            Family::Ipv6 => 128,
        }
    }

    /// The family of an address. An IPv4-mapped IPv6 address is IPv6: no packet carries it as IPv4.
    #[must_use]
    pub fn of(address: IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        }
    }

    /// The highest address of the family, as a number.
    #[must_use]
    pub fn max(self) -> u128 {
        match self {
            Family::Ipv4 => u128::from(u32::MAX),
            Family::Ipv6 => u128::MAX,
        }
    }

    /// The prefix that holds every address of the family: `0.0.0.0/0` or `::/0`.
    #[must_use]
    pub fn everything(self) -> Prefix {
        Prefix { address: address_from_number(self, 0), len: 0 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Ipv4 => "IPv4",
            Family::Ipv6 => "IPv6",
        })
    }
}

fn address_from_number(family: Family, number: u128) -> IpAddr {
    match family {
        Family::Ipv4 => IpAddr::V4(Ipv4Addr::from((number & 0xffff_ffff) as u32)),
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

fn number_from_address(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

/// A CIDR block with no host bits set: `10.0.0.0/24`, `2001:db8::/32`, `192.0.2.7/32`.
///
/// A bare address parses as its own /32 or /128 (semantics §1.9: "a bare IP in a list becomes /32").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

/// Why a text is no [`Prefix`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrefixError {
    /// Not an address at all.
    NotAnAddress(String),
    /// What stands behind the slash is no number in 0..=max.
    BadLength {
        /// What was written.
        text: String,
        /// The longest prefix of this family.
        max: u8,
    },
    /// Bits behind the prefix are set; the address meant was probably `suggestion`.
    HostBits {
        /// What was written.
        text: String,
        /// The block that contains it.
        suggestion: String,
    },
}

impl fmt::Display for PrefixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrefixError::NotAnAddress(text) => {
                write!(f, "`{text}` is not an address; expected a CIDR block such as 203.0.113.0/24 or 2001:db8::/32")
            }
            PrefixError::BadLength { text, max } => {
                write!(f, "`{text}` has no valid prefix length; expected a number from 0 to {max} behind the slash")
            }
            PrefixError::HostBits { text, suggestion } => {
                write!(
                    f,
                    "`{text}` has host bits set; did you mean {suggestion}, or the one address {}?",
                    text.split('/').next().unwrap_or(text)
                )
            }
        }
    }
}

impl std::error::Error for PrefixError {}

impl Prefix {
    /// A block of `len` bits, refused if `address` has bits set behind them.
    ///
    /// # Errors
    /// [`PrefixError::BadLength`] or [`PrefixError::HostBits`].
    pub fn new(address: IpAddr, len: u8) -> Result<Prefix, PrefixError> {
        let family = Family::of(address);
        if len > family.bits() {
            return Err(PrefixError::BadLength { text: format!("{address}/{len}"), max: family.bits() });
        }
        let number = number_from_address(address);
        let masked = number & mask(family, len);
        if masked != number {
            let block = Prefix { address: address_from_number(family, masked), len };
            return Err(PrefixError::HostBits { text: format!("{address}/{len}"), suggestion: block.to_string() });
        }
        Ok(Prefix { address, len })
    }

    /// The block that is just this address.
    #[must_use]
    pub fn host(address: IpAddr) -> Prefix {
        Prefix { address, len: Family::of(address).bits() }
    }

    /// The network address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Prefix length in bits.
    #[allow(clippy::len_without_is_empty, reason = "a prefix length, not a count")]
    #[must_use]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// IPv4 or IPv6.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// True for `0.0.0.0/0` and `::/0`.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.len == 0
    }

    /// The addresses in it, as one range.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        let first = number_from_address(self.address);
        AddrRange { family: self.family(), first, last: first | (self.family().max() & !mask(self.family(), self.len)) }
    }

    /// True if `address` is in the block (and of its family).
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family() && self.range().contains(number_from_address(address))
    }

    /// True if every address of `other` is in this block.
    #[must_use]
    pub fn covers(&self, other: &Prefix) -> bool {
        self.family() == other.family() && self.len <= other.len && self.contains(other.address)
    }
}

fn mask(family: Family, len: u8) -> u128 {
    let bits = u32::from(family.bits());
    let host = bits - u32::from(len);
    if host >= 128 { 0 } else { (family.max() >> host) << host }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Prefix, PrefixError> {
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| PrefixError::NotAnAddress(text.to_owned()))?;
        let max = Family::of(address).bits();
        let Some(len) = len else { return Ok(Prefix::host(address)) };
        // `str::parse` takes "+8" and "08"; a prefix length is plain digits without a leading zero.
        let plain = len.bytes().all(|b| b.is_ascii_digit()) && (len == "0" || !len.starts_with('0'));
        let len: u8 = len
            .parse()
            .ok()
            .filter(|len| plain && *len <= max)
            .ok_or_else(|| PrefixError::BadLength { text: text.to_owned(), max })?;
        Prefix::new(address, len)
    }
}

impl Serialize for Prefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Prefix, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Addresses `first..=last` of one family, as numbers in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddrRange {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The lowest address.
    pub first: u128,
    /// The highest address, included.
    pub last: u128,
}

impl AddrRange {
    /// Every address of the family.
    #[must_use]
    pub fn everything(family: Family) -> AddrRange {
        AddrRange { family, first: 0, last: family.max() }
    }

    /// Just this address.
    #[must_use]
    pub fn host(address: IpAddr) -> AddrRange {
        Prefix::host(address).range()
    }

    /// True if the number lies in the range.
    #[must_use]
    pub fn contains(&self, number: u128) -> bool {
        self.first <= number && number <= self.last
    }

    /// The lowest address.
    #[must_use]
    pub fn first_address(&self) -> IpAddr {
        address_from_number(self.family, self.first)
    }

    /// The highest address.
    #[must_use]
    pub fn last_address(&self) -> IpAddr {
        address_from_number(self.family, self.last)
    }

    /// The address with this number.
    #[must_use]
    pub fn address(family: Family, number: u128) -> IpAddr {
        address_from_number(family, number)
    }

    /// The number of an address.
    #[must_use]
    pub fn number(address: IpAddr) -> u128 {
        number_from_address(address)
    }

    /// The fewest prefixes that cover exactly this range.
    #[must_use]
    pub fn prefixes(&self) -> Vec<Prefix> {
        let bits = u32::from(self.family.bits());
        let mut out = Vec::new();
        let mut first = self.first;
        loop {
            // Grow the block while it stays aligned and inside the range; at most `bits` doublings each.
            let mut host = if first == 0 { bits } else { first.trailing_zeros().min(bits) };
            while host > 0 && block_last(first, host) > self.last {
                host -= 1;
            }
            #[expect(clippy::cast_possible_truncation, reason = "host <= bits <= 128")]
            out.push(Prefix { address: address_from_number(self.family, first), len: (bits - host) as u8 });
            let last = block_last(first, host);
            if last >= self.last {
                return out;
            }
            first = last + 1;
        }
    }
}

fn block_last(first: u128, host_bits: u32) -> u128 {
    if host_bits >= 128 { u128::MAX } else { first | ((1u128 << host_bits) - 1) }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefixes = self.prefixes();
        if let [one] = prefixes.as_slice() {
            return if one.len() == self.family.bits() { one.address().fmt(f) } else { one.fmt(f) };
        }
        write!(f, "{}-{}", self.first_address(), self.last_address())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_refused_with_the_block_that_was_meant() {
        let error = "10.0.0.7/24".parse::<Prefix>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`10.0.0.7/24` has host bits set; did you mean 10.0.0.0/24, or the one address 10.0.0.7?"
        );
        assert!("2001:db8::1/64".parse::<Prefix>().is_err());
    }

    #[test]
    fn odd_lengths_are_refused() {
        for text in ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/08", "10.0.0.0/8/8", "::/129", "10.0.0/8", ""]
        {
            assert!(text.parse::<Prefix>().is_err(), "{text}");
        }
    }

    #[test]
    fn equal_ipv6_texts_are_equal_values() {
        let long: Prefix = "2001:0db8:0000::0001/128".parse().unwrap();
        assert_eq!(long, "2001:db8::1".parse().unwrap());
        assert_eq!(long.to_string(), "2001:db8::1/128");
    }

    #[test]
    fn a_range_becomes_the_fewest_prefixes() {
        let range = AddrRange {
            family: Family::Ipv4,
            first: number_from_address("10.0.0.1".parse().unwrap()),
            last: number_from_address("10.0.0.6".parse().unwrap()),
        };
        let texts: Vec<String> = range.prefixes().iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/31", "10.0.0.6/32"]);
        assert_eq!(AddrRange::everything(Family::Ipv6).prefixes(), [Family::Ipv6.everything()]);
        assert_eq!(AddrRange::everything(Family::Ipv4).to_string(), "0.0.0.0/0");
    }

    #[test]
    fn a_prefix_contains_its_ends_and_not_their_neighbours() {
        let block: Prefix = "192.0.2.128/25".parse().unwrap();
        assert!(block.contains("192.0.2.128".parse().unwrap()) && block.contains("192.0.2.255".parse().unwrap()));
        assert!(!block.contains("192.0.2.127".parse().unwrap()) && !block.contains("192.0.3.0".parse().unwrap()));
        assert!(Family::Ipv4.everything().covers(&block) && !block.covers(&Family::Ipv4.everything()));
    }
}
