//! An intent into the kernel: lower, converge, count.

use std::collections::BTreeMap;
use std::time::Instant;

use keepwall_link::{Counters, Drift};
use keepwall_nft::{ElementCounter, Features, Nft, NftError, TableFamily};
use keepwall_secgroup::intent::Intent;
use keepwall_secgroup::lower::{Lowered, TABLE, lower};

/// The kernel's side of this machine's security groups.
pub(crate) struct Enforcer {
    nft: Nft,
    /// Tried when the first rules are to be loaded: an agent that only observes leaves no trace in the kernel.
    features: Option<Features>,
    loaded: Option<Loaded>,
    /// Somebody reads flow records. Without a reader there are none: each would cost every new session some 70 ns.
    watched: bool,
    /// Numbers the versions of our chains and maps; never used twice in the life of a table.
    serial: u64,
    /// Packets and bytes by rule id of maps that are gone.
    retired: BTreeMap<String, (u64, u64)>,
    since: Instant,
}

struct Loaded {
    intent: Intent,
    lowered: Lowered,
    tag: String,
}

/// How a change went in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Unchanged,
    Elements,
    Replaced,
}

impl Enforcer {
    pub(crate) fn open() -> Result<Enforcer, NftError> {
        let nft = Nft::open()?;
        Ok(Enforcer {
            nft,
            features: None,
            loaded: None,
            watched: false,
            serial: 0,
            retired: BTreeMap::new(),
            since: Instant::now(),
        })
    }

    /// What this kernel can do; refused if it lacks what security groups cannot do without.
    fn features(&mut self) -> Result<Features, String> {
        if let Some(features) = self.features {
            return Ok(features);
        }
        let features = self.nft.probe().map_err(|error| chain(&error))?;
        if !features.conntrack {
            return Err("this kernel has no connection tracking (nf_conntrack), which security groups need".into());
        }
        if !features.verdict_maps {
            return Err("this kernel has no verdict maps over ranges; Linux 5.6 or newer has them".into());
        }
        self.features = Some(features);
        Ok(features)
    }

    /// What this kernel lacks, and what we do instead.
    pub(crate) fn degraded(&self) -> Vec<String> {
        let mut out = Vec::new();
        let Some(f) = &self.features else { return out };
        let mut say = |fine: bool, text: &str| {
            if !fine {
                out.push(text.to_owned());
            }
        };
        say(
            f.table_flags != 0,
            "this kernel has no owned, persistent tables (before 6.9): other tools can change ours, which is noticed and repaired",
        );
        say(f.ct_timeouts, "this kernel cannot limit idle sessions (no ct timeout objects): its own limits hold");
        say(f.log, "this kernel cannot log packets to user space: `keepwall flows` shows nothing");
        say(f.trace, "this kernel cannot trace packets: `keepwall trace` shows nothing");
        out
    }

    fn lowered(&mut self, intent: &Intent, tag: &str) -> Result<Lowered, String> {
        let features = self.features()?;
        let mut intent = intent.clone();
        if !features.ct_timeouts {
            intent.session_idle_s = None;
        }
        if !features.log || !features.limit || !self.watched {
            intent.flow_log_per_s = 0;
        }
        let mut lowered = lower(&intent, tag).map_err(|error| error.to_string())?;
        lowered.table.flags = features.table_flags;
        Ok(lowered)
    }

    /// Checks that an intent can be lowered, without touching anything.
    pub(crate) fn check(&mut self, intent: &Intent) -> Result<(), String> {
        self.lowered(intent, "0").map(|_| ())
    }

    pub(crate) fn intent(&self) -> Option<&Intent> {
        self.loaded.as_ref().map(|loaded| &loaded.intent)
    }

    /// Puts an intent in force: nothing if it is, one map's elements if that is all, else a new version beside the
    /// old one and a switch.
    pub(crate) fn enforce(&mut self, intent: &Intent) -> Result<Change, String> {
        let Some(loaded) = self.loaded.take() else {
            let tag = self.next_tag()?;
            let lowered = self.lowered(intent, &tag)?;
            self.nft.replace(&lowered.table).map_err(|error| chain(&error))?;
            self.loaded = Some(Loaded { intent: intent.clone(), lowered, tag });
            return Ok(Change::Replaced);
        };
        let (next, change) = match self.change(&loaded, intent) {
            Ok(changed) => changed,
            Err(why) => {
                self.loaded = Some(loaded);
                return Err(why);
            }
        };
        self.loaded = Some(next);
        Ok(change)
    }

    /// From what is loaded to an intent.
    fn change(&mut self, loaded: &Loaded, intent: &Intent) -> Result<(Loaded, Change), String> {
        let lowered = self.lowered(intent, &loaded.tag)?;
        let next = |lowered, tag: &str| Loaded { intent: intent.clone(), lowered, tag: tag.to_owned() };
        if lowered.table == loaded.lowered.table {
            return Ok((next(lowered, &loaded.tag), Change::Unchanged));
        }
        if loaded.lowered.differs_in_place(&lowered) {
            self.nft.change_elements(&loaded.lowered.table, &lowered.table).map_err(|error| chain(&error))?;
            return Ok((next(lowered, &loaded.tag), Change::Elements));
        }
        let tag = self.next_tag()?;
        let lowered = lowered.retagged(&loaded.tag, &tag);
        let applied = self.nft.replace_from(&loaded.lowered.table, &lowered.table).map_err(|error| chain(&error))?;
        count(&mut self.retired, &loaded.lowered, &applied.retired);
        Ok((next(lowered, &tag), Change::Replaced))
    }

    /// A tag that nothing in the kernel has.
    fn next_tag(&mut self) -> Result<String, String> {
        if self.serial == 0 {
            // A table of an earlier life: go on counting behind it.
            let present = self.nft.observe(TableFamily::Inet, TABLE).map_err(|error| chain(&error))?;
            let names = present.iter().flat_map(|table| table.chains.iter().map(|c| c.name.as_str()));
            let highest = names.filter_map(|name| name.rsplit_once(".g")?.1.parse::<u64>().ok()).max();
            self.serial = self.serial.max(highest.unwrap_or(0));
        }
        self.serial += 1;
        Ok(format!("g{}", self.serial))
    }

    /// What somebody took away from an earlier agent's table; nothing, if there is any rule in it.
    pub(crate) fn missing(&mut self) -> Result<Option<&'static str>, String> {
        let present = self.nft.observe(TableFamily::Inet, TABLE).map_err(|error| chain(&error))?;
        Ok(match present {
            None => Some("the table was gone"),
            Some(table) if table.chains.iter().all(|chain| chain.rules.is_empty()) => Some("all its rules were gone"),
            Some(_) => None,
        })
    }

    /// Takes over a table that an earlier agent left, if it holds just this intent; else replaces it.
    pub(crate) fn adopt(&mut self, intent: &Intent) -> Result<Change, String> {
        if self.loaded.is_some() {
            return self.enforce(intent);
        }
        let present = self.nft.observe(TableFamily::Inet, TABLE).map_err(|error| chain(&error))?;
        let tag = present.as_ref().and_then(|table| {
            let name = table.chains.iter().find(|c| c.base.is_none())?.name.rsplit_once('.')?.1.to_owned();
            name.strip_prefix('g').and_then(|n| n.parse::<u64>().ok()).map(|n| (n, name))
        });
        if let Some((serial, tag)) = tag {
            let lowered = self.lowered(intent, &tag)?;
            if self.nft.adopt_if_equal(&lowered.table).map_err(|error| chain(&error))? {
                self.serial = serial;
                self.loaded = Some(Loaded { intent: intent.clone(), lowered, tag });
                return Ok(Change::Unchanged);
            }
        }
        self.enforce(intent)
    }

    /// Starts or stops flow records, by rules with or without them.
    pub(crate) fn watch(&mut self, watched: bool) -> Result<(), String> {
        if std::mem::replace(&mut self.watched, watched) == watched {
            return Ok(());
        }
        match self.intent().cloned() {
            Some(intent) => self.enforce(&intent).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Looks at the kernel and puts right what differs.
    pub(crate) fn verify(&mut self) -> Result<Drift, String> {
        let Some(loaded) = &self.loaded else { return Ok(Drift::NoTable) };
        let before = self.nft.differences(&loaded.lowered.table).map_err(|error| chain(&error))?;
        if before.is_empty() {
            return Ok(Drift::None);
        }
        let intent = loaded.intent.clone();
        // What is there is unknown: build a new version from what the kernel shows.
        self.loaded = None;
        self.enforce(&intent)?;
        let Some(loaded) = &self.loaded else { return Ok(Drift::NoTable) };
        let after = self.nft.differences(&loaded.lowered.table).map_err(|error| chain(&error))?;
        Ok(if after.is_empty() { Drift::Repaired(before) } else { Drift::Contested(after) })
    }

    /// Removes our table; `false` if there was none.
    pub(crate) fn remove(&mut self) -> Result<bool, String> {
        self.loaded = None;
        self.nft.remove(TableFamily::Inet, TABLE).map_err(|error| chain(&error))
    }

    pub(crate) fn counters(&mut self) -> Result<Counters, String> {
        let mut rules = self.retired.clone();
        if let Some(loaded) = &self.loaded {
            for rule in loaded.intent.attachments.iter().flat_map(|a| a.ingress.iter().chain(&a.egress)) {
                rules.entry(rule.id.clone()).or_default();
            }
            let now = self.nft.counters(&loaded.lowered.table).map_err(|error| chain(&error))?;
            count(&mut rules, &loaded.lowered, &now);
        }
        Ok(Counters { since_s: self.since.elapsed().as_secs(), rules })
    }
}

fn count(rules: &mut BTreeMap<String, (u64, u64)>, lowered: &Lowered, counters: &[ElementCounter]) {
    for counter in counters {
        if let Some(id) = lowered.rule_of(&counter.map, &counter.key) {
            let sum = rules.entry(id.to_owned()).or_default();
            sum.0 += counter.packets;
            sum.1 += counter.bytes;
        }
    }
}

/// An error with all its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot go on fails, and says why it skips")]
mod tests {
    use super::*;

    /// A kernel without owned tables (before 6.9), where others can change ours.
    #[test]
    fn what_others_change_is_noticed_and_repaired() {
        let story = || {
            let mut enforcer = Enforcer::open().unwrap();
            let features = enforcer.features().unwrap();
            enforcer.features = Some(Features { table_flags: 0, ..features });
            let mut intent = Intent::empty("web");
            intent.flow_log_per_s = 0;
            enforcer.enforce(&intent).unwrap();
            assert_eq!(enforcer.verify().unwrap(), Drift::None);
            let nft = |arguments: &[&str]| {
                std::process::Command::new("nft").args(arguments).status().is_ok_and(|s| s.success())
            };
            if !nft(&["flush", "chain", "inet", "keepwall", "input"]) {
                return eprintln!("skipped: nftables is not installed");
            }
            assert!(matches!(enforcer.verify().unwrap(), Drift::Repaired(what) if !what.is_empty()));
            assert_eq!(enforcer.verify().unwrap(), Drift::None);
            assert!(nft(&["flush", "ruleset"]));
            assert!(matches!(enforcer.verify().unwrap(), Drift::Repaired(_)));
            assert_eq!(enforcer.verify().unwrap(), Drift::None);
            assert!(!enforcer.degraded().is_empty(), "the user is told");
        };
        match keepwall_host::namespace::in_a_new_one(story) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => eprintln!("skipped: needs root"),
            other => other.unwrap(),
        }
    }
}
