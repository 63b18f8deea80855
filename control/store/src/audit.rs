//! The audit log cannot be changed unnoticed.
//!
//! Each line carries an HMAC over the MAC of the line before and all of its own, so that a line that was changed,
//! removed, inserted or moved breaks the chain there. What a chain cannot show is that its end was cut off: the store
//! remembers number and MAC of the newest line apart, under a [`seal`] that takes the key to make.
//!
//! Not seen here: that the whole store was put back to an earlier state of itself, lines and seal together, or what
//! somebody does who has the key. Export heads to another machine to see the first; keep the key off the database's
//! machine against the second.

use ring::hmac;

use crate::AuditLine;

/// The MAC of a line, in hex.
///
/// `previous_mac` is the MAC of line `number - 1`, empty for line 1.
#[must_use]
pub fn link(key: &[u8; 32], previous_mac: &str, number: u64, time_ms: u64, entry: &str) -> String {
    sign(key, "line", &[previous_mac.as_bytes(), &number.to_be_bytes(), &time_ms.to_be_bytes(), entry.as_bytes()])
}

/// What shows that line `number` with this MAC was the newest one: the head's own MAC, in hex. Without a line yet,
/// number 0 and an empty MAC.
#[must_use]
pub fn seal(key: &[u8; 32], number: u64, mac: &str) -> String {
    sign(key, "head", &[&number.to_be_bytes(), mac.as_bytes()])
}

/// Every part with its length, so that no two lists of parts give the same bytes.
fn sign(key: &[u8; 32], purpose: &str, parts: &[&[u8]]) -> String {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in std::iter::once(&purpose.as_bytes()).chain(parts) {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    keepwall_core::hex(context.sign().as_ref())
}

/// All lines are as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// How many lines there are.
    pub lines: u64,
    /// The MAC of the newest; empty if there is none.
    pub mac: String,
}

/// Somebody changed the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The first line that is not as it was written, or is not there.
    pub number: u64,
    /// What is wrong with it.
    pub why: String,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {} of the audit log: {}", self.number, self.why)
    }
}

impl std::error::Error for Broken {}

/// Verifies line by line, so that a log of any length is read in pages.
#[derive(Clone)]
pub struct Verifier {
    key: [u8; 32],
    number: u64,
    mac: String,
}

impl Verifier {
    /// Before the first line.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Verifier {
        Verifier { key, number: 0, mac: String::new() }
    }

    /// Behind a line that was verified before.
    #[must_use]
    pub fn behind(key: [u8; 32], number: u64, mac: &str) -> Verifier {
        Verifier { key, number, mac: mac.to_owned() }
    }

    /// The number of the line that comes next: where the next page starts.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.number.saturating_add(1)
    }

    /// Takes the next line.
    ///
    /// # Errors
    /// It is not the line that was written after the one before.
    pub fn line(&mut self, line: &AuditLine) -> Result<(), Broken> {
        let number = self.next_number();
        if line.number != number {
            return Err(Broken { number, why: format!("missing: line {} stands in its place", line.number) });
        }
        if link(&self.key, &self.mac, number, line.time_ms, &line.entry) != line.mac {
            let why = "it, or what stood before it, is not what was written, or the key is another".to_owned();
            return Err(Broken { number, why });
        }
        self.number = number;
        self.mac.clone_from(&line.mac);
        Ok(())
    }

    /// There are no more lines: is the newest what the store remembers as such?
    ///
    /// # Errors
    /// Lines are missing at the end, or there are more than there should be.
    pub fn finish(self, head: Option<(u64, &str)>) -> Result<Verified, Broken> {
        let (number, mac) = head.unwrap_or((0, ""));
        if number > self.number {
            let why = format!("missing: the log ends before it, and had {number} lines");
            return Err(Broken { number: self.number + 1, why });
        }
        if number < self.number {
            return Err(Broken { number: number + 1, why: format!("too many: the log had {number} lines") });
        }
        if mac != self.mac {
            return Err(Broken { number, why: "not the line that was written last".to_owned() });
        }
        Ok(Verified { lines: self.number, mac: self.mac })
    }
}

/// Verifies a whole log: all `lines` from the first, and the `head` that the store remembers apart.
///
/// # Errors
/// The first place where the log is not what was written.
pub fn verify<'a>(
    key: &[u8; 32],
    lines: impl IntoIterator<Item = &'a AuditLine>,
    head: Option<(u64, &str)>,
) -> Result<Verified, Broken> {
    let mut verifier = Verifier::new(*key);
    for line in lines {
        verifier.line(line)?;
    }
    verifier.finish(head)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn log(lines: u64) -> Vec<AuditLine> {
        let mut mac = String::new();
        (1..=lines)
            .map(|number| {
                let entry = format!("{{\"n\":{number}}}");
                mac = link(&KEY, &mac, number, 1_000 + number, &entry);
                AuditLine { number, time_ms: 1_000 + number, entry, mac: mac.clone() }
            })
            .collect()
    }

    fn broken_at(lines: &[AuditLine], head: &AuditLine) -> u64 {
        verify(&KEY, lines, Some((head.number, &head.mac))).unwrap_err().number
    }

    #[test]
    fn an_untouched_log_verifies_whole_and_in_pages() {
        let lines = log(10);
        let head = Some((10, lines[9].mac.as_str()));
        assert_eq!(verify(&KEY, &lines, head).unwrap().lines, 10);

        let mut page = Verifier::new(KEY);
        lines[..4].iter().for_each(|line| page.line(line).unwrap());
        let mut page = Verifier::behind(KEY, page.next_number() - 1, &lines[3].mac);
        lines[4..].iter().for_each(|line| page.line(line).unwrap());
        assert_eq!(page.finish(head).unwrap().mac, lines[9].mac);

        assert_eq!(verify(&KEY, &[], None).unwrap().lines, 0);
    }

    #[test]
    fn every_kind_of_tampering_is_found_where_it_happened() {
        let good = log(10);
        let head = good[9].clone();
        let tampered = |change: &dyn Fn(&mut Vec<AuditLine>)| {
            let mut lines = good.clone();
            change(&mut lines);
            broken_at(&lines, &head)
        };
        assert_eq!(tampered(&|lines| lines[3].entry.push(' ')), 4, "changed entry");
        assert_eq!(tampered(&|lines| lines[3].time_ms += 1), 4, "changed time");
        assert_eq!(tampered(&|lines| lines[3].mac.replace_range(0..1, "x")), 4, "changed MAC");
        assert_eq!(tampered(&|lines| drop(lines.remove(3))), 4, "removed");
        assert_eq!(tampered(&|lines| lines.swap(3, 4)), 4, "moved");
        assert_eq!(tampered(&|lines| lines.insert(3, lines[2].clone())), 4, "inserted");
        assert_eq!(tampered(&|lines| lines.truncate(7)), 8, "tail cut");
        assert_eq!(tampered(&Vec::clear), 1, "all gone");
        assert_eq!(tampered(&|lines| drop(lines.remove(0))), 1, "first removed");
        let renumbered = |lines: &mut Vec<AuditLine>| {
            lines.remove(3);
            lines.iter_mut().zip(1..).for_each(|(line, number)| line.number = number);
        };
        assert_eq!(tampered(&renumbered), 4, "removed and renumbered");
    }

    #[test]
    fn another_head_and_another_key_are_found() {
        let lines = log(3);
        assert_eq!(broken_at(&lines, &lines[1]), 3, "a line more than the head knows");
        assert_eq!(verify(&KEY, &lines, None).unwrap_err().number, 1);
        assert_eq!(verify(&KEY, &lines, Some((3, &lines[1].mac))).unwrap_err().number, 3);
        assert_eq!(verify(&[8; 32], &lines, Some((3, &lines[2].mac))).unwrap_err().number, 1);
    }

    #[test]
    fn no_two_lines_sign_the_same_bytes() {
        assert_ne!(link(&KEY, "ab", 1, 2, "c"), link(&KEY, "a", 1, 2, "bc"));
        assert_ne!(link(&KEY, "", 1, 2, "c"), link(&KEY, "", 2, 1, "c"));
        assert_ne!(seal(&KEY, 1, "ab"), seal(&KEY, 1, "ac"));
    }
}
