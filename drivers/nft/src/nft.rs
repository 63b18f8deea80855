//! Observe, compare, replace, observe again.

use std::borrow::Cow;
use std::collections::BTreeSet;

use keepwall_ir::nft::decode::{self, Dump, ElementCounter};
use keepwall_ir::nft::encode::{self, At, Batch, EncodeError};
use keepwall_ir::nft::{
    Base, Chain, CtKey, CtTimeout, Expr, FieldType, LookupInto, Map, MapData, PayloadBase, Rule, TABLE_OWNER,
    TABLE_PERSIST, Table, TableFamily,
};

use crate::error::NftError;
use crate::kernel::{Dumped, Kernel};
use crate::plan::{Change, Names, Plan, Steps, element_changes, plan};

/// Another change during a reading spoils it; this often it is read again.
const READINGS_MAX: usize = 8;

/// A transaction of phase 1 is closed when it is longer, so that it stays well below the send queue (64 MiB, of which
/// the kernel counts about twice what is sent).
const TRANSACTION_BYTES_MAX: usize = 16 * 1024 * 1024;

/// So many elements are added at once before the length of the transaction is looked at: at most 4096 × 1 KiB.
const ELEMENTS_PER_STEP: usize = 4096;

/// Differences that are told; more are only counted.
const DIFFERENCES_MAX: usize = 20;

/// A conversation with nf_tables. It owns the tables that it loads with [`TABLE_OWNER`]: while it lives nobody else may
/// change them, and when it is dropped those with [`TABLE_PERSIST`] stay in force as orphans, for the next one to adopt.
#[derive(Debug)]
pub struct Nft {
    kernel: Kernel,
}

/// What this kernel can do, as tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Flags for our table: owner and persist, or none. Never owner alone: such a table vanishes with its process, and
    /// with it all protection.
    pub table_flags: u32,
    /// `ct state` and the like in rules.
    pub conntrack: bool,
    /// `ct timeout` objects.
    pub ct_timeouts: bool,
    /// Verdict maps of concatenated ranges, with a counter per element.
    pub verdict_maps: bool,
    /// `log group`.
    pub log: bool,
    /// `limit`.
    pub limit: bool,
    /// `meta nftrace`.
    pub trace: bool,
}

/// What a replacement did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Chains created.
    pub chains_created: usize,
    /// Maps created.
    pub maps_created: usize,
    /// Elements added, in new maps and old.
    pub elements_added: usize,
    /// Elements removed from a map that stayed.
    pub elements_removed: usize,
    /// Base chains that got other rules.
    pub base_chains_switched: usize,
    /// Chains and maps that are gone.
    pub removed: Vec<String>,
    /// What the elements of the maps that are gone had counted, at the very end.
    pub retired: Vec<ElementCounter>,
    /// The new table is in force, but removing the old parts (or reading their counters) failed; the next replacement
    /// tries again.
    pub left_behind: Option<NftError>,
}

/// What [`Nft::converge`] came to.
#[derive(Debug)]
pub enum Outcome {
    /// It was so.
    AlreadyThere,
    /// It is so now.
    Replaced(Applied),
    /// It was made so, and is not: somebody else changes our table.
    Contested {
        /// What differs, a phrase each.
        differences: Vec<String>,
    },
}

/// A table of somebody else.
pub type Foreign = decode::Dumped;

impl Nft {
    /// Opens a conversation in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel cannot be reached.
    pub fn open() -> Result<Nft, NftError> {
        Ok(Nft { kernel: Kernel::open()? })
    }

    /// The netlink port by which the kernel names this conversation as owner or as the cause of a change.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.kernel.port()
    }

    /// Finds out what this kernel can do, by trying: each feature in a table that is created and deleted within one
    /// transaction, so that nobody ever sees it.
    ///
    /// # Errors
    /// [`NftError::NotPermitted`], or the kernel cannot be reached. What is not supported is no error.
    pub fn probe(&mut self) -> Result<Features, NftError> {
        let name = format!("keepwall-probe-{}", self.port());
        let at = At { family: TableFamily::Inet, table: &name };
        let persistent = self.try_out(at, TABLE_OWNER | TABLE_PERSIST, |_| Ok(()))?;
        let mut try_exprs = |exprs: Vec<Expr>| {
            self.try_out(at, 0, |batch| {
                batch.new_chain(at, &Chain { name: "c".to_owned(), base: None, rules: Vec::new() })?;
                batch.new_rule(at, "c", &Rule { exprs, comment: String::new() })
            })
        };
        let state = Expr::Ct { key: CtKey::State, dreg: 0 };
        let conntrack = try_exprs(vec![state])?;
        let log = try_exprs(vec![Expr::Log { group: 0, prefix: "probe".to_owned(), snaplen: 64 }])?;
        let limit = try_exprs(vec![Expr::Limit { per_s: 1, burst: 5, over: false }])?;
        let trace = try_exprs(vec![Expr::TraceOn])?;
        let ct_timeouts = self.try_out(at, 0, |batch| {
            let timeout = CtTimeout { name: "t".to_owned(), l4proto: 17, l3proto: 2, policy: vec![(2, 60)] };
            batch.new_timeout(at, &timeout)
        })?;
        let verdict_maps = self.try_out(at, 0, |batch| {
            let map = Map {
                name: "m".to_owned(),
                key: vec![FieldType::Ipv4Addr, FieldType::InetService],
                interval: true,
                data: MapData::Verdict,
                counters: true,
                elements: Vec::new(),
            };
            batch.new_map(at, &map, 0)?;
            batch.new_chain(at, &Chain { name: "c".to_owned(), base: None, rules: Vec::new() })?;
            let source = Expr::Payload { base: PayloadBase::Network, offset: 12, len: 4, dreg: 0 };
            let port = Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, dreg: 1 };
            let lookup = Expr::Lookup { map: map.name.clone(), sreg: 0, into: LookupInto::Verdict, invert: false };
            batch.new_rule(at, "c", &Rule { exprs: vec![source, port, lookup], comment: String::new() })
        })?;
        let table_flags = if persistent { TABLE_OWNER | TABLE_PERSIST } else { 0 };
        Ok(Features { table_flags, conntrack, ct_timeouts, verdict_maps, log, limit, trace })
    }

    fn try_out(
        &mut self,
        at: At<'_>,
        flags: u32,
        content: impl FnOnce(&mut Batch) -> Result<(), EncodeError>,
    ) -> Result<bool, NftError> {
        let outcome = self.transact(at, |batch| {
            batch.new_table(at, flags)?;
            content(batch)?;
            batch.del_table(at)
        });
        match outcome {
            Ok(()) => Ok(true),
            Err(
                NftError::Unsupported { .. }
                | NftError::Refused { .. }
                | NftError::Busy { .. }
                | NftError::Owned { .. },
            ) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a table, normalised; `None` if there is none.
    ///
    /// # Errors
    /// The kernel cannot be reached or understood, or the table does not hold still.
    pub fn observe(&mut self, family: TableFamily, name: &str) -> Result<Option<Table>, NftError> {
        Ok(self.observe_all_of(family, name)?.map(|dumped| dumped.table))
    }

    /// Reads a table, normalised, with what is beside it: the handles of its rules, its owner, the counters of its
    /// elements, and what was not understood. `None` if there is none.
    ///
    /// # Errors
    /// As for [`Nft::observe`].
    pub fn observe_all_of(&mut self, family: TableFamily, name: &str) -> Result<Option<decode::Dumped>, NftError> {
        let mut dumped = self.read(At { family, table: name }, |_| true)?;
        if let Some(dumped) = &mut dumped {
            decode::normalise(&mut dumped.table);
        }
        Ok(dumped)
    }

    /// Reads all tables of the network namespace, ours included. Maps with more than `elements_max` elements are left
    /// out, and so is every lookup in them; [`Foreign::not_dumped`] names them.
    ///
    /// # Errors
    /// The kernel cannot be reached or understood.
    pub fn observe_all(&mut self, elements_max: usize) -> Result<Vec<Foreign>, NftError> {
        // A conversation of its own: breaking off a dump ends it, and ours owns tables.
        let mut kernel = Kernel::open()?;
        let mut dump = Dump::new();
        for request in [
            encode::dump_tables as fn(u32) -> Vec<u8>,
            |seq| encode::dump_chains(seq, None),
            |seq| encode::dump_rules(seq, None),
            |seq| encode::dump_maps(seq, None),
        ] {
            kernel.ask("all tables", request, |message| push(&mut dump, message))?;
        }
        for (family, table) in dump.tables() {
            let at = At { family, table: &table };
            kernel.ask(&table, |seq| encode::dump_timeouts(seq, at), |message| push(&mut dump, message))?;
        }
        for (family, table, map) in dump.maps() {
            let at = At { family, table: &table };
            let before = dump.elements();
            let outcome = kernel.ask(
                &table,
                |seq| encode::dump_elements(seq, at, &map),
                |message| {
                    push(&mut dump, message)?;
                    Ok(dump.elements() - before <= elements_max)
                },
            )?;
            if matches!(outcome, Dumped::BrokenOff) {
                dump.leave_out(family, &table, &map);
                kernel = Kernel::open()?;
            }
        }
        let mut tables = dump.finish();
        for dumped in &mut tables {
            decode::normalise(&mut dumped.table);
        }
        Ok(tables)
    }

    /// Puts `desired` in force so that each packet meets the old rules or the new ones, never a mixture, and never an
    /// empty map (see the phases in `plan.rs`). An orphaned table is adopted; what an interrupted replacement left
    /// behind is removed.
    ///
    /// Changed chains and maps must have fresh names. The exception: if one map changes some of its elements and nothing
    /// else changes, they are changed in place, in one transaction.
    ///
    /// # Errors
    /// What was in force still is, unless the error is [`NftError::Unanswered`].
    pub fn replace(&mut self, desired: &Table) -> Result<Applied, NftError> {
        let at = At { family: desired.family, table: &desired.name };
        let present = match self.take_over(at, desired.flags)? {
            true => self.observe(desired.family, &desired.name)?,
            false => None,
        };
        self.carry_out(present.as_ref(), desired)
    }

    /// As [`Nft::replace`], but takes the caller's word for what is in force, and saves reading it: `previous` must be
    /// what this same value put in force last.
    ///
    /// # Errors
    /// As for [`Nft::replace`]. If `previous` is wrong, the kernel refuses, or what is left behind is found by the next
    /// [`Nft::replace`].
    pub fn replace_from(&mut self, previous: &Table, desired: &Table) -> Result<Applied, NftError> {
        if previous.flags != desired.flags || (previous.family, &previous.name) != (desired.family, &desired.name) {
            return self.replace(desired);
        }
        let previous = normalised(previous);
        self.carry_out(Some(&previous), desired)
    }

    /// Changes elements in place, also of several maps, in one transaction. The kernel publishes such a transaction map
    /// after map, so the caller must know that no packet asks two of them. Both tables must be normalised, and
    /// `previous` must be what this same value put in force last.
    ///
    /// # Errors
    /// As for [`Nft::replace`]; [`NftError::NameReused`] if maps differ in more than elements.
    pub fn change_elements(&mut self, previous: &Table, desired: &Table) -> Result<Applied, NftError> {
        let at = At { family: desired.family, table: &desired.name };
        let reused = |what| NftError::NameReused { table: desired.name.clone(), what };
        let changes = element_changes(previous, desired).map_err(reused)?;
        self.elements(at, &changes)
    }

    fn elements(&mut self, at: At<'_>, changes: &[Change<'_>]) -> Result<Applied, NftError> {
        self.transact(at, |batch| {
            changes.iter().try_for_each(|Change { map, remove, add }| {
                batch.del_elements(at, map, remove.iter().copied())?;
                batch.new_elements(at, map, add.iter().copied())
            })
        })?;
        Ok(Applied {
            elements_added: changes.iter().map(|change| change.add.len()).sum(),
            elements_removed: changes.iter().map(|change| change.remove.len()).sum(),
            ..Applied::default()
        })
    }

    /// Observe, compare, replace, observe again.
    ///
    /// # Errors
    /// As for [`Nft::replace`].
    pub fn converge(&mut self, desired: &Table) -> Result<Outcome, NftError> {
        let desired = normalised(desired);
        let there = |found: &Option<decode::Dumped>| {
            found.as_ref().is_some_and(|found| found.table == *desired && found.not_understood.is_empty())
        };
        self.take_over(At { family: desired.family, table: &desired.name }, desired.flags)?;
        if there(&self.observe_all_of(desired.family, &desired.name)?) {
            return Ok(Outcome::AlreadyThere);
        }
        let applied = self.replace(&desired)?;
        let found = self.observe_all_of(desired.family, &desired.name)?;
        if there(&found) {
            return Ok(Outcome::Replaced(applied));
        }
        Ok(Outcome::Contested { differences: differences(found.as_ref(), &desired) })
    }

    /// Deletes a table with all that is in it; `false` if there was none.
    ///
    /// # Errors
    /// [`NftError::Owned`] if another live process owns it.
    pub fn remove(&mut self, family: TableFamily, name: &str) -> Result<bool, NftError> {
        let at = At { family, table: name };
        if self.owner(at)?.is_none() {
            return Ok(false);
        }
        self.transact(at, |batch| batch.del_table(at))?;
        Ok(true)
    }

    /// What the elements of the table's maps have counted so far, where they count.
    ///
    /// # Errors
    /// As for [`Nft::observe`].
    pub fn counters(&mut self, table: &Table) -> Result<Vec<ElementCounter>, NftError> {
        let counting: BTreeSet<&str> = table.maps.iter().filter(|m| m.counters).map(|m| m.name.as_str()).collect();
        let dumped = self.read(At { family: table.family, table: &table.name }, |map| counting.contains(map))?;
        Ok(dumped.map(|dumped| dumped.counters).unwrap_or_default())
    }

    // ---- reading

    /// Flags and owner of a table.
    fn owner(&mut self, at: At<'_>) -> Result<Option<(u32, Option<u32>)>, NftError> {
        let mut dump = Dump::new();
        self.kernel.ask(at.table, |seq| encode::get_table(seq, at), |message| push(&mut dump, message))?;
        Ok(dump.finish().into_iter().next().map(|dumped| (dumped.table.flags, dumped.owner)))
    }

    fn generation(&mut self) -> Result<u32, NftError> {
        let mut id = 0;
        self.kernel.ask("the generation", encode::get_generation, |message| {
            id = decode::generation(message).map_or(id, |generation| generation.id);
            Ok(true)
        })?;
        Ok(id)
    }

    /// Reads a table and the elements of the maps that `wanted` says, until it holds still.
    fn read(&mut self, at: At<'_>, wanted: impl Fn(&str) -> bool) -> Result<Option<decode::Dumped>, NftError> {
        let mut last = None;
        for _ in 0..READINGS_MAX {
            let before = self.generation()?;
            let (dumped, still) = self.read_once(at, &wanted)?;
            let still = still && !dumped.as_ref().is_some_and(says_twice);
            // Somebody else's transaction raises the generation too; two equal readings are as good as a quiet one.
            if still && (self.generation()? == before || last.as_ref() == Some(&dumped)) {
                return Ok(dumped);
            }
            last = Some(dumped);
        }
        Err(NftError::Moving { table: at.table.to_owned() })
    }

    fn read_once(
        &mut self,
        at: At<'_>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(Option<decode::Dumped>, bool), NftError> {
        let mut dump = Dump::new();
        let mut still = true;
        let mut ask = |dump: &mut Dump, request: &dyn Fn(u32) -> Vec<u8>| -> Result<bool, NftError> {
            let outcome = self.kernel.ask(at.table, request, |message| push(dump, message))?;
            still &= !matches!(outcome, Dumped::Interrupted);
            Ok(!matches!(outcome, Dumped::Missing))
        };
        if !ask(&mut dump, &|seq| encode::get_table(seq, at))? {
            return Ok((None, true));
        }
        ask(&mut dump, &|seq| encode::dump_chains(seq, Some(at.family)))?;
        ask(&mut dump, &|seq| encode::dump_rules(seq, Some(at)))?;
        ask(&mut dump, &|seq| encode::dump_maps(seq, Some(at)))?;
        ask(&mut dump, &|seq| encode::dump_timeouts(seq, at))?;
        let mut all_there = true;
        for (_, _, map) in dump.maps() {
            if wanted(&map) {
                all_there &= ask(&mut dump, &|seq| encode::dump_elements(seq, at, &map))?;
            }
        }
        Ok((dump.finish().into_iter().next(), still && all_there))
    }

    // ---- changing

    /// Becomes the owner of the table, if it is there and is to have one; `false` if it is not there.
    fn take_over(&mut self, at: At<'_>, wanted: u32) -> Result<bool, NftError> {
        let Some((present, owner)) = self.owner(at)? else {
            return Ok(false);
        };
        match owner {
            Some(port) if port != self.port() => {
                return Err(NftError::Owned { table: at.table.to_owned(), port: owner });
            }
            _ if present == wanted => {}
            // The kernel takes the owner's flag from a table that has lost its owner.
            None if wanted & TABLE_OWNER != 0 && present & TABLE_PERSIST != 0 && present | TABLE_OWNER == wanted => {
                self.transact(at, |batch| batch.adopt_table(at, wanted))?;
            }
            _ => return Err(NftError::Flags { table: at.table.to_owned(), present, wanted }),
        }
        Ok(true)
    }

    fn carry_out(&mut self, present: Option<&Table>, desired: &Table) -> Result<Applied, NftError> {
        let desired = normalised(desired);
        let at = At { family: desired.family, table: &desired.name };
        let reused = |what| NftError::NameReused { table: desired.name.clone(), what };
        match plan(present, &desired).map_err(reused)? {
            Plan::Nothing => Ok(Applied::default()),
            Plan::Elements { clean, change } => {
                self.remove_names(at, &clean)?;
                let applied = self.elements(at, &[change])?;
                Ok(Applied { removed: all_names(&clean), ..applied })
            }
            Plan::Replace(steps) => self.replace_in_phases(at, desired.flags, present, &steps),
        }
    }

    fn replace_in_phases(
        &mut self,
        at: At<'_>,
        flags: u32,
        present: Option<&Table>,
        steps: &Steps<'_>,
    ) -> Result<Applied, NftError> {
        let mut retire = steps.retire.clone();
        match self.remove_names(at, &steps.clean) {
            Ok(()) => {}
            // Something that is not understood here still uses it: perhaps not any more after the switch.
            Err(NftError::Busy { .. }) => retire.extend(&steps.clean),
            Err(error) => return Err(error),
        }
        let mut committed = false;
        let prepared = self.prepare(at, flags, steps, &mut committed);
        if let Err(error) = prepared.and_then(|()| self.switch(at, steps)) {
            // A single transaction takes itself back.
            if committed && !matches!(error, NftError::Unanswered { .. }) {
                self.clean_up(at, steps);
            }
            return Err(error);
        }
        let mut applied = Applied {
            chains_created: steps.chains.len() + steps.bases.len(),
            maps_created: steps.maps.len(),
            elements_added: steps.maps.iter().map(|map| map.elements.len()).sum(),
            base_chains_switched: steps.switch.len() + steps.drop_bases.len(),
            removed: all_names(&steps.clean),
            ..Applied::default()
        };
        match self.retire(at, present, &retire) {
            Ok(retired) => {
                applied.retired = retired;
                applied.removed.extend(steps.drop_bases.iter().cloned());
                applied.removed.extend(all_names(&retire));
            }
            Err(error) => applied.left_behind = Some(error),
        }
        Ok(applied)
    }

    /// Phase 1. Nothing refers to what is created here, so it may take several transactions.
    fn prepare(&mut self, at: At<'_>, flags: u32, steps: &Steps<'_>, committed: &mut bool) -> Result<(), NftError> {
        let mut batch = self.batch();
        let loadable = unloadable(at);
        if steps.create_table {
            batch.new_table(at, flags).map_err(&loadable)?;
        }
        for timeout in &steps.timeouts {
            batch.new_timeout(at, timeout).map_err(&loadable)?;
        }
        for chain in steps.bases.iter().chain(&steps.chains) {
            // A base chain is met by packets from the moment of its creation; its policy comes with its rules.
            let base = chain.base.clone().map(|base| Base { accept: true, ..base });
            let empty = Chain { name: chain.name.clone(), base, rules: Vec::new() };
            batch.new_chain(at, &empty).map_err(&loadable)?;
        }
        for map in &steps.maps {
            batch.new_map(at, map, 0).map_err(&loadable)?;
            for elements in map.elements.chunks(ELEMENTS_PER_STEP) {
                batch.new_elements(at, map, elements).map_err(&loadable)?;
                batch = self.close_if_long(at, batch, committed)?;
            }
        }
        for chain in &steps.chains {
            for rule in &chain.rules {
                batch.new_rule(at, &chain.name, rule).map_err(&loadable)?;
            }
            batch = self.close_if_long(at, batch, committed)?;
        }
        self.kernel.transact(at.table, &batch.finish())?;
        *committed = true;
        Ok(())
    }

    fn close_if_long(&mut self, at: At<'_>, batch: Batch, committed: &mut bool) -> Result<Batch, NftError> {
        if batch.len() <= TRANSACTION_BYTES_MAX {
            return Ok(batch);
        }
        self.kernel.transact(at.table, &batch.finish())?;
        *committed = true;
        Ok(self.batch())
    }

    /// Phase 2.
    fn switch(&mut self, at: At<'_>, steps: &Steps<'_>) -> Result<(), NftError> {
        self.transact(at, |batch| {
            for name in &steps.drop_bases {
                batch.flush_chain(at, name)?;
                batch.del_chain(at, name)?;
            }
            for switch in &steps.switch {
                batch.flush_chain(at, &switch.chain.name)?;
                if switch.policy {
                    batch.set_policy(at, switch.chain)?;
                }
                for rule in &switch.chain.rules {
                    batch.new_rule(at, &switch.chain.name, rule)?;
                }
            }
            Ok(())
        })
    }

    /// Phase 3. No packet meets these maps any more: what they have counted is final.
    fn retire(&mut self, at: At<'_>, present: Option<&Table>, names: &Names) -> Result<Vec<ElementCounter>, NftError> {
        let counting = present.map(|table| table.maps.iter().filter(|m| m.counters)).into_iter().flatten();
        let counting: BTreeSet<&str> =
            counting.map(|map| map.name.as_str()).filter(|name| names.maps.iter().any(|n| n == name)).collect();
        let mut retired = Vec::new();
        if !counting.is_empty() {
            let mut dump = Dump::new();
            self.kernel.ask(at.table, |seq| encode::get_table(seq, at), |message| push(&mut dump, message))?;
            self.kernel.ask(at.table, |seq| encode::dump_maps(seq, Some(at)), |message| push(&mut dump, message))?;
            for map in &counting {
                let request = |seq| encode::dump_elements(seq, at, map);
                self.kernel.ask(at.table, request, |message| push(&mut dump, message))?;
            }
            retired = dump.finish().into_iter().flat_map(|dumped| dumped.counters).collect();
        }
        self.remove_names(at, names)?;
        Ok(retired)
    }

    /// Removes chains, maps and timeouts that only refer to each other, in one transaction: rules first, as they use
    /// maps, chains and timeouts; then maps, as their elements jump to chains.
    fn remove_names(&mut self, at: At<'_>, names: &Names) -> Result<(), NftError> {
        self.transact(at, |batch| {
            for chain in &names.chains {
                batch.flush_chain(at, chain)?;
            }
            for map in &names.maps {
                batch.del_map(at, map)?;
            }
            for chain in &names.chains {
                batch.del_chain(at, chain)?;
            }
            for timeout in &names.timeouts {
                batch.del_timeout(at, timeout)?;
            }
            Ok(())
        })
    }

    /// Phase 1 or 2 failed: takes back what phase 1 has made, as far as it got. If this fails too, the next replacement
    /// finds it.
    fn clean_up(&mut self, at: At<'_>, steps: &Steps<'_>) {
        if steps.create_table {
            let _ = self.remove(at.family, at.table);
            return;
        }
        let Ok(Some(now)) = self.observe(at.family, at.table) else { return };
        let made = |wanted: Vec<&String>, there: Vec<&String>| -> Vec<String> {
            wanted.into_iter().filter(|name| there.contains(name)).cloned().collect()
        };
        let chains = steps.chains.iter().chain(&steps.bases).map(|c| &c.name).collect();
        let names = Names {
            chains: made(chains, now.chains.iter().map(|c| &c.name).collect()),
            maps: made(steps.maps.iter().map(|m| &m.name).collect(), now.maps.iter().map(|m| &m.name).collect()),
            timeouts: made(
                steps.timeouts.iter().map(|t| &t.name).collect(),
                now.timeouts.iter().map(|t| &t.name).collect(),
            ),
        };
        let _ = self.remove_names(at, &names);
    }

    fn batch(&mut self) -> Batch {
        // The numbers are taken for good when the transaction is sent.
        Batch::new(self.kernel.take_seq(0))
    }

    fn transact(
        &mut self,
        at: At<'_>,
        content: impl FnOnce(&mut Batch) -> Result<(), EncodeError>,
    ) -> Result<(), NftError> {
        let mut batch = self.batch();
        content(&mut batch).map_err(unloadable(at))?;
        self.kernel.transact(at.table, &batch.finish())
    }
}

fn push(dump: &mut Dump, message: &decode::Message<'_>) -> Result<bool, NftError> {
    dump.push(message).map_err(|source| NftError::Garbled { source })?;
    Ok(true)
}

/// True if an element was shown twice, and so perhaps another not at all: the kernel is still resizing the hash of a map
/// that was filled just now, and walks it in another order from one piece of the dump to the next.
fn says_twice(dumped: &decode::Dumped) -> bool {
    let maps = &dumped.table.maps;
    maps.iter().any(|map| map.elements.windows(2).any(|pair| pair[0].key == pair[1].key))
}

fn unloadable(at: At<'_>) -> impl Fn(EncodeError) -> NftError {
    let table = at.table.to_owned();
    move |source| NftError::Unloadable { table: table.clone(), source }
}

pub(crate) fn normalised(table: &Table) -> Cow<'_, Table> {
    if decode::is_normalised(table) {
        return Cow::Borrowed(table);
    }
    let mut copy = table.clone();
    decode::normalise(&mut copy);
    Cow::Owned(copy)
}

fn all_names(names: &Names) -> Vec<String> {
    names.chains.iter().chain(&names.maps).chain(&names.timeouts).cloned().collect()
}

/// What differs, for a human: the first [`DIFFERENCES_MAX`] phrases.
pub(crate) fn differences(found: Option<&decode::Dumped>, desired: &Table) -> Vec<String> {
    let Some(found) = found else {
        return vec![format!("table {} is gone", desired.name)];
    };
    let mut phrases = found.not_understood.clone();
    if found.table.flags != desired.flags {
        phrases.push(format!("flags are {} instead of {}", found.table.flags, desired.flags));
    }
    compare(&mut phrases, "chain", &found.table.chains, &desired.chains, |c| &c.name);
    compare(&mut phrases, "map", &found.table.maps, &desired.maps, |m| &m.name);
    compare(&mut phrases, "ct timeout", &found.table.timeouts, &desired.timeouts, |t| &t.name);
    let more = phrases.len().saturating_sub(DIFFERENCES_MAX);
    phrases.truncate(DIFFERENCES_MAX);
    if more > 0 {
        phrases.push(format!("and {more} more"));
    }
    phrases
}

fn compare<T: PartialEq>(
    phrases: &mut Vec<String>,
    kind: &str,
    found: &[T],
    desired: &[T],
    name: impl Fn(&T) -> &String,
) {
    let find = |list: &[T], wanted: &T| list.iter().position(|item| name(item) == name(wanted));
    for wanted in desired {
        match find(found, wanted) {
            None => phrases.push(format!("{kind} {} is missing", name(wanted))),
            Some(at) if found[at] != *wanted => phrases.push(format!("{kind} {} has other content", name(wanted))),
            Some(_) => {}
        }
    }
    for item in found {
        if find(desired, item).is_none() {
            phrases.push(format!("{kind} {} is not ours", name(item)));
        }
    }
}
