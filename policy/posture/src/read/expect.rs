//! `tests:`, the policy's tests in the policy.
//!
//! ```text
//! expect: allow internet -> web:443
//! expect: deny 10.9.0.0/16 -> web:all/udp
//! expect: allow web -> [2001:db8::1]:443
//! expect: allow internet -> web:icmp
//! ```

use keepwall_core::{PortRange, Protocol, check_name, nearest};
use keepwall_secgroup::spec::{Endpoint, PolicyTest};

use super::Reader;
use crate::keys;
use crate::problem::{Complaint, quote};
use crate::rule::{parse_port_range, parse_prefix, parse_protocol};
use crate::tree::{Kind, Node, Span};

const FORM: &str = "`allow FROM -> TO:PORTS` or `deny FROM -> TO:PORTS`, as in `deny internet -> db:3306/tcp`";

/// The longest line that is taken for a test: two names of 128 characters and a little.
const EXPECT_MAX: usize = 1_024;

/// A complaint about the part of the text that begins at this byte.
type Fault = (usize, Complaint);

impl Reader<'_, '_> {
    pub(super) fn policy_test(&mut self, node: &Node) -> Option<PolicyTest> {
        if let Kind::Scalar { text, plain: true } = &node.kind
            && !node.is_null()
        {
            let complaint = Complaint::new("a test is a mapping").expected("`expect: allow …` or `expect: deny …`");
            self.complain(node.span, complaint.suggest(Some(format!("expect: {text}"))));
            return None;
        }
        if !self.keys(node, &keys::TEST) {
            return None;
        }
        let Some((_, value)) = node.entry("expect") else {
            if self.misspelt(node, &keys::TEST) {
                return None;
            }
            self.complain(
                node.span,
                Complaint::new("the test expects nothing").expected(format!("`expect:` with {FORM}")),
            );
            return None;
        };
        let text = self.text(value, FORM)?;
        match parse_expect(text) {
            Ok(test) => Some(PolicyTest { place: self.place(value.span), ..test }),
            Err((at, complaint)) => {
                // Only a plain text on one line has its columns where its characters are.
                let same = matches!(value.kind, Kind::Scalar { plain: true, .. })
                    && value.span.end - value.span.start == text.len();
                let skip = text.get(..at).map_or(0, |head| head.chars().count());
                let column = value.span.column + if same { u32::try_from(skip).unwrap_or(0) } else { 0 };
                self.complain(Span { column, ..value.span }, complaint);
                None
            }
        }
    }
}

fn parse_expect(text: &str) -> Result<PolicyTest, Fault> {
    if text.len() > EXPECT_MAX {
        return Err((0, Complaint::new(format!("a test has at most {EXPECT_MAX} bytes")).expected(FORM)));
    }
    let at = |part: &str| part.as_ptr() as usize - text.as_ptr() as usize;
    let (verdict, rest) = text.split_once(' ').ok_or_else(|| (0, bad_form(text)))?;
    let allow = match verdict {
        "allow" => true,
        "deny" => false,
        other => {
            let complaint = Complaint::new(format!("a test begins with allow or deny, not {}", quote(other)));
            return Err((0, complaint.expected(FORM).suggest(nearest(other, ["allow", "deny"]))));
        }
    };
    let (from, to) = rest.split_once("->").ok_or_else(|| (at(rest), bad_form(text)))?;
    let (from, to) = (from.trim(), to.trim());
    if to.contains("->") {
        return Err((at(to), bad_form(text)));
    }
    let from_endpoint = endpoint(from).map_err(|complaint| (at(from), complaint))?;
    let (to, target) = split_target(to).map_err(|complaint| (at(to), complaint))?;
    let (ports, protocol) = parse_target(target).map_err(|complaint| (at(target), complaint))?;
    let to_endpoint = endpoint(to).map_err(|complaint| (at(to), complaint))?;
    Ok(PolicyTest { place: Default::default(), allow, from: from_endpoint, to: to_endpoint, ports, protocol })
}

fn bad_form(text: &str) -> Complaint {
    Complaint::new(format!("{} is no test", quote(text))).expected(FORM)
}

/// Cuts `web:443` at its last colon; IPv6 stands in brackets.
fn split_target(text: &str) -> Result<(&str, &str), Complaint> {
    const PORTS: &str = "ports behind the last colon: `web:443`, `web:all/udp`, `web:icmp`, `web:all/all`";
    let (to, target) = match text.rfind(']') {
        Some(end) if text.starts_with('[') => (&text[..=end], text[end + 1..].strip_prefix(':')),
        _ => match text.rsplit_once(':') {
            Some((to, _)) if to.contains(':') => {
                let complaint = Complaint::new(format!("in {} the port cannot be told from the address", quote(text)));
                let meant = to.parse::<std::net::Ipv6Addr>().ok().map(|_| format!("[{to}]:{}", &text[to.len() + 1..]));
                return Err(complaint.expected("an IPv6 address in brackets, as in [2001:db8::1]:443").suggest(meant));
            }
            Some((to, target)) => (to, Some(target)),
            None => (text, None),
        },
    };
    match target {
        Some(target) if !target.is_empty() && !to.is_empty() => Ok((to, target)),
        _ => Err(Complaint::new(format!("{} does not say on which ports", quote(text))).expected(PORTS)),
    }
}

/// `443`, `443/udp`, `8000-8100/tcp`, `all/udp`, `icmp`.
fn parse_target(text: &str) -> Result<(Option<PortRange>, Protocol), Complaint> {
    let (ports, protocol) = match text.split_once('/') {
        Some((ports, protocol)) => (ports, parse_protocol(protocol)?),
        None if text != "all" && text.starts_with(|c: char| c.is_ascii_alphabetic()) => ("all", parse_protocol(text)?),
        None => (text, Protocol::TCP),
    };
    if ports == "all" {
        return Ok((None, protocol));
    }
    let range = parse_port_range(ports)?;
    if !protocol.has_ports() {
        let complaint = Complaint::new(format!("{protocol} has no ports"));
        return Err(complaint.expected("PORTS/tcp or PORTS/udp with a range written 8000-8100, or the protocol alone"));
    }
    Ok((Some(range), protocol))
}

fn endpoint(text: &str) -> Result<Endpoint, Complaint> {
    const EXPECTED: &str = "internet, the name of an instance, group or prefix list, or an address block";
    if text == "internet" {
        return Ok(Endpoint::Internet);
    }
    let bare = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text);
    let looks_like_address = bare.starts_with(|c: char| c.is_ascii_digit())
        || bare.contains(':') && bare.chars().all(|c| c.is_ascii_hexdigit() || matches!(c, ':' | '.' | '/'));
    if looks_like_address {
        return parse_prefix(bare).map(Endpoint::Prefix);
    }
    match check_name(text) {
        Ok(()) => Ok(Endpoint::Name(text.to_owned())),
        Err(error) => {
            let message = format!("{} is no end of a session: {error}", quote(text));
            Err(Complaint::new(message).expected(EXPECTED))
        }
    }
}
