//! Security groups in the posture file: every edit keeps comments, is checked whole, and can be taken back.

use std::path::{Path, PathBuf};

use keepwall_link::{Request, Response};
use keepwall_posture::edit::{self, EditError, Edited, NewGroup, RuleChange, RuleSelector};
use keepwall_posture::snapshot::GroupSnapshot;
use keepwall_posture::{NewRule, SourceFile, exchange};
use keepwall_secgroup::check::Checked;
use keepwall_secgroup::intent::rules_of;
use keepwall_secgroup::spec::{Direction, Group, GroupType, InnerAccess, Policy};

use crate::Context;
use crate::cli::{AccessWord, Format, Membership, RuleArgs, RuleCommand, RuleRemove, RuleSet, Sg, SnapshotCommand};
use crate::failure::Failure;
use crate::plan::say_rule;
use crate::posture;
use crate::time::{now, utc};
use crate::ui;

/// All changes within this time give one snapshot, of the rules before the first (semantics §1.10).
const SNAPSHOT_EVERY_S: u64 = 300;
/// Snapshots of one group that are kept; the oldest go first.
const SNAPSHOTS_MAX: usize = 200;
/// An imported file is for people; theirs are small.
const IMPORT_BYTES_MAX: u64 = 16 << 20;

pub fn run(context: &Context, command: Sg) -> Result<u8, Failure> {
    match command {
        Sg::List => list(context),
        Sg::Show { group } => show(context, &group),
        Sg::Create(create) => {
            let group = NewGroup {
                name: create.name.clone(),
                description: create.description,
                kind: if create.advanced { GroupType::Advanced } else { GroupType::Basic },
                inner_access: None,
                members: vec![],
                ingress: vec![],
                egress: vec![],
            };
            let desk = Desk::open(context)?;
            let at = desk.groups_file();
            desk.change(at, None, &format!("group {} is declared", create.name), |text| edit::add_group(text, &group))
        }
        Sg::Clone { group, new_name } => {
            let desk = Desk::open(context)?;
            let at = desk.file_of(&group)?;
            desk.change(at, None, &format!("{new_name} is a copy of {group}"), |text| {
                edit::clone_group(text, &group, &new_name)
            })
        }
        Sg::Delete { group } => delete(context, &group),
        Sg::InnerAccess { group, access } => {
            let (access, word) = match access {
                AccessWord::Accept => (InnerAccess::Accept, "members reach each other"),
                AccessWord::Drop => (InnerAccess::Drop, "members are isolated"),
            };
            let desk = Desk::open(context)?;
            let at = desk.file_of(&group)?;
            desk.change(at, None, &format!("{group}: {word}"), |text| edit::set_inner_access(text, &group, access))
        }
        Sg::Join(membership) => member(context, &membership, true),
        Sg::Leave(membership) => member(context, &membership, false),
        Sg::Rule(RuleCommand::Add(args)) => add(context, &args),
        Sg::Rule(RuleCommand::Remove(args)) => remove(context, &args),
        Sg::Rule(RuleCommand::Set(args)) => set(context, &args),
        Sg::Export { group, format } => {
            let checked = posture::load(context.global.posture.as_deref())?;
            let group = find(&checked, &group)?;
            let text = match format {
                Format::Json => exchange::to_json(group),
                Format::Csv => exchange::to_csv(group),
            };
            ui::out(text.trim_end_matches(['\r', '\n']));
            Ok(0)
        }
        Sg::Import { group, file } => import(context, &group, &file),
        Sg::Snapshot(SnapshotCommand::List { group }) => snapshots(context, &group),
        Sg::Snapshot(SnapshotCommand::Restore { group, id }) => restore(context, &group, &id),
    }
}

/// The posture's files, read once, one of which an edit changes.
struct Desk {
    root: PathBuf,
    files: Vec<SourceFile>,
    checked: Checked,
    json: bool,
}

impl Desk {
    fn open(context: &Context) -> Result<Desk, Failure> {
        let root = posture::locate(context.global.posture.as_deref())?;
        let files = posture::read(&root)?;
        let checked = posture::checked(&files)?;
        Ok(Desk { root, files, checked, json: context.global.json })
    }

    fn index(&self, name: &str) -> usize {
        self.files.iter().position(|file| *file.name == *name).unwrap_or(0)
    }

    fn file_of(&self, group: &str) -> Result<usize, Failure> {
        Ok(self.index(&find(&self.checked, group)?.place.file))
    }

    /// Where new groups go: beside the others, or into the first file.
    fn groups_file(&self) -> usize {
        self.checked.spec().groups.last().map_or(0, |group| self.index(&group.place.file))
    }

    /// Edits one file, checks the whole posture as it would be, takes a snapshot of the group, and writes.
    fn change(
        &self,
        at: usize,
        snapshot: Option<&str>,
        said: &str,
        edit: impl FnOnce(&str) -> Result<Edited, EditError>,
    ) -> Result<u8, Failure> {
        let file = &self.files[at];
        let edited = edit(&file.text).map_err(|error| Failure::plain(error.to_string()))?;
        if edited.changed {
            let mut files = self.files.clone();
            files[at].text = edited.text.clone();
            posture::checked(&files)?;
            if let Some(group) = snapshot {
                self.snapshot(group)?;
            }
            posture::write(Path::new(&*file.name), &edited.text)?;
        }
        if self.json {
            ui::json(
                &serde_json::json!({ "changed": edited.changed, "file": &*file.name, "line": edited.line, "done": said }),
            );
        } else if edited.changed {
            let line = if edited.line > 0 { format!(":{}", edited.line) } else { String::new() };
            ui::out(format!("{} {said} ({}{line}).", ui::green("✓"), file.name));
            ui::say(ui::dim("The machine still enforces what it did: look at `keepwall plan`, then `keepwall apply`."));
        } else {
            ui::out(format!("{} Nothing to do: {said} already.", ui::green("✓")));
        }
        Ok(0)
    }

    fn snapshot_directory(&self, group: &str) -> PathBuf {
        let beside = if self.root.is_dir() {
            self.root.clone()
        } else {
            self.root.parent().unwrap_or(Path::new(".")).to_owned()
        };
        beside.join(".keepwall").join("snapshots").join(group)
    }

    /// Keeps what the group's rules were, unless that was done a moment ago.
    fn snapshot(&self, group: &str) -> Result<(), Failure> {
        let now = now();
        let directory = self.snapshot_directory(group);
        let known = ids(&directory);
        if known.last().is_some_and(|last| now.saturating_sub(*last) < SNAPSHOT_EVERY_S) {
            return Ok(());
        }
        std::fs::create_dir_all(&directory)?;
        let snapshot = GroupSnapshot::of(find(&self.checked, group)?, now);
        posture::write(&directory.join(format!("{now}.json")), &snapshot.serialise())?;
        for old in known.iter().take((known.len() + 1).saturating_sub(SNAPSHOTS_MAX)) {
            // An old one that stays is no harm.
            let _ = std::fs::remove_file(directory.join(format!("{old}.json")));
        }
        Ok(())
    }
}

fn ids(directory: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut ids: Vec<u64> =
        entries.filter_map(|e| e.file_name().to_str()?.strip_suffix(".json")?.parse().ok()).collect();
    ids.sort_unstable();
    ids
}

fn find<'a>(checked: &'a Checked, name: &str) -> Result<&'a Group, Failure> {
    let groups = &checked.spec().groups;
    groups.iter().find(|group| group.name == name).ok_or_else(|| {
        let names = groups.iter().map(|g| g.name.as_str());
        let help = match keepwall_core::nearest(name, names) {
            Some(near) => format!("did you mean {near}?"),
            None => "see `keepwall sg list`".to_owned(),
        };
        Failure::new(format!("there is no security group `{name}`"), help)
    })
}

fn list(context: &Context) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let rows: Vec<_> = (checked.spec().groups.iter())
        .map(|group| {
            let members: Vec<String> =
                checked.members_of(&group.name).map(|(i, x)| format!("{}/{}", i.name, x.name)).collect();
            (group, members)
        })
        .collect();
    if context.global.json {
        let rows: Vec<_> = (rows.iter())
            .map(|(g, members)| {
                serde_json::json!({
                    "name": g.name, "type": g.kind, "inner_access": g.inner_access(), "description": g.description,
                    "members": members, "ingress_rules": g.ingress.len(), "egress_rules": g.egress.len(),
                    "place": g.place.to_string(),
                })
            })
            .collect();
        ui::json(&rows);
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (rows.into_iter())
        .map(|(g, members)| {
            let shown = members.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let more = if members.len() > 3 { format!(", … {} in all", members.len()) } else { String::new() };
            vec![
                g.name.clone(),
                if g.kind == GroupType::Basic { "basic" } else { "advanced" }.into(),
                if g.inner_access() == InnerAccess::Accept { "accept" } else { "isolated" }.into(),
                g.ingress.len().to_string(),
                g.egress.len().to_string(),
                format!("{shown}{more}"),
                ui::dim(&g.description),
            ]
        })
        .collect();
    ui::table(&["Group", "Type", "Intra-group", "In", "Out", "Members", "Description"], &rows);
    Ok(0)
}

fn show(context: &Context, name: &str) -> Result<u8, Failure> {
    let checked = posture::load(context.global.posture.as_deref())?;
    let group = find(&checked, name)?;
    let counters = match context.agent.ask(Request::Counters) {
        Ok(Response::Counters(counters)) => counters.rules,
        _ => Default::default(),
    };
    if context.global.json {
        let rules: Vec<_> = (Direction::BOTH.iter())
            .flat_map(|d| rules_of(&checked, group, *d).into_iter().map(move |r| (*d, r)))
            .map(|(direction, rule)| {
                serde_json::json!({ "direction": direction, "rule": rule, "packets": counters.get(&rule.id).map(|c| c.0) })
            })
            .collect();
        ui::json(
            &serde_json::json!({ "name": group.name, "type": group.kind, "inner_access": group.inner_access(), "rules": rules }),
        );
        return Ok(0);
    }
    ui::out(format!("{}  {}", ui::bold(&group.name), group.description));
    for direction in Direction::BOTH {
        ui::out("");
        let mut rows = Vec::new();
        let implicit = |what: &str, policy: &str| {
            vec![ui::dim("·"), ui::dim(policy), ui::dim(what), String::new(), ui::dim("implicit")]
        };
        if direction == Direction::Ingress && group.inner_access() == InnerAccess::Accept {
            rows.push(implicit("all from members of this group, before any rule", "accept"));
        }
        let mut rules = rules_of(&checked, group, direction);
        rules.sort_by_key(|rule| (rule.priority, rule.policy));
        for rule in &rules {
            let number = rule.label.rsplit('#').next().unwrap_or("?");
            let text = say_rule(rule, direction);
            let text = text.split_once(' ').map_or(text.as_str(), |(_, rest)| rest).to_owned();
            let policy = if rule.policy == Policy::Accept { ui::green("accept") } else { ui::red("drop") };
            let packets = counters.get(&rule.id).map_or(String::new(), |c| c.0.to_string());
            rows.push(vec![format!("#{number}"), policy, text, packets, ui::dim(&rule.place.to_string())]);
        }
        let default = match (direction, group.kind) {
            (Direction::Egress, GroupType::Basic) => "accept",
            _ => "drop",
        };
        rows.push(implicit("everything else", default));
        let heading = if direction == Direction::Ingress {
            "Inbound, in the order of evaluation"
        } else {
            "Outbound, in the order of evaluation"
        };
        ui::table(&["Rule", "Does", heading, "Packets", "Written at"], &rows);
    }
    let members: Vec<String> = checked.members_of(&group.name).map(|(i, x)| format!("{}/{}", i.name, x.name)).collect();
    ui::out("");
    ui::out(format!(
        "{} {}",
        ui::bold("Members:"),
        if members.is_empty() { "none".into() } else { members.join(", ") }
    ));
    Ok(0)
}

fn delete(context: &Context, name: &str) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    let at = desk.file_of(name)?;
    let members: Vec<String> = desk.checked.members_of(name).map(|(i, x)| format!("{}/{}", i.name, x.name)).collect();
    if !members.is_empty() {
        return Err(Failure::new(
            format!("group {name} still has members: {}", members.join(", ")),
            "take them out first (`keepwall sg leave`), or change `members:` if they join by label",
        ));
    }
    let named_by: Vec<&str> = (desk.checked.spec().groups.iter())
        .filter(|g| {
            g.ingress
                .iter()
                .chain(&g.egress)
                .any(|r| r.peers.iter().any(|p| p.peer == keepwall_secgroup::spec::Peer::Group(name.into())))
        })
        .map(|g| g.name.as_str())
        .collect();
    if !named_by.is_empty() {
        return Err(Failure::new(
            format!("rules of {} name group {name}", named_by.join(", ")),
            "remove those rules first",
        ));
    }
    desk.change(at, Some(name), &format!("group {name} is deleted"), |text| edit::delete_group(text, name))
}

fn member(context: &Context, membership: &Membership, joins: bool) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    find(&desk.checked, &membership.group)?;
    let (instance, interface) = match membership.member.split_once('/') {
        Some((instance, interface)) => (instance, Some(interface)),
        None => (membership.member.as_str(), None),
    };
    let Some((number, found)) = desk.checked.instance(instance) else {
        return Err(Failure::new(format!("there is no instance `{instance}`"), "see `instances:` in the posture"));
    };
    let (n, interface) = match (interface, found.interfaces.as_slice()) {
        (Some(name), all) => match all.iter().position(|x| x.name == name) {
            Some(n) => (n, name.to_owned()),
            None => return Err(Failure::plain(format!("instance {instance} has no interface `{name}`"))),
        },
        (None, [only]) => (0, only.name.clone()),
        (None, all) => {
            let names: Vec<&str> = all.iter().map(|x| x.name.as_str()).collect();
            return Err(Failure::new(
                format!("instance {instance} has several interfaces: {}", names.join(", ")),
                format!("name one: {instance}/{}", names.first().unwrap_or(&"eth0")),
            ));
        }
    };
    let at = desk.index(&found.place.file);
    let group = &membership.group;
    if joins {
        return desk.change(at, None, &format!("{instance}/{interface} is in {group}"), |text| {
            edit::join(text, instance, &interface, group)
        });
    }
    // The last group cannot be left (semantics §1.6): the interface would be open.
    let groups: Vec<&str> = desk.checked.groups_of(number, n).map(|g| g.name.as_str()).collect();
    if groups == [group.as_str()] {
        return Err(Failure::new(
            format!(
                "{group} is the last group of {instance}/{interface}; without one, nothing would be filtered on it"
            ),
            "join another group first",
        ));
    }
    desk.change(at, None, &format!("{instance}/{interface} is not in {group}"), |text| {
        edit::leave(text, instance, &interface, group)
    })
}

/// A rule in words of the command line.
#[derive(Default)]
pub struct Words<'a> {
    pub drop: bool,
    pub protocol: &'a str,
    pub ports: Option<&'a str>,
    pub peers: &'a str,
    pub priority: u8,
    pub local: Option<&'a str>,
    pub source_ports: Option<&'a str>,
    pub description: &'a str,
}

/// Words as a rule. Goes through the same reading as a snapshot's rules.
pub fn rule(said: &Words<'_>) -> Result<NewRule, Failure> {
    let Words { drop, protocol, ports, peers, priority, local, source_ports, description } = *said;
    let words = |text: &str| -> Vec<String> {
        text.split(',').map(|w| w.trim().to_owned()).filter(|w| !w.is_empty()).collect()
    };
    let protocol: keepwall_core::Protocol =
        protocol.parse().map_err(|e: keepwall_core::ProtocolError| Failure::plain(e.to_string()))?;
    let ports = match ports {
        Some("all") => vec!["1/65535".to_owned()],
        Some(text) => words(text),
        None if protocol.has_ports() => {
            return Err(Failure::new(format!("{protocol} needs ports"), "add --ports 443, or --ports all"));
        }
        None => vec![],
    };
    let value = serde_json::json!({
        "policy": if drop { "drop" } else { "accept" },
        "priority": priority,
        "protocol": protocol.to_string(),
        "ports": ports,
        "source_ports": source_ports.map(words).unwrap_or_default(),
        "peers": words(peers),
        "local": local,
        "description": description,
    });
    serde_json::from_value(value).map_err(|error| Failure::plain(error.to_string()))
}

fn direction(egress: bool) -> Direction {
    if egress { Direction::Egress } else { Direction::Ingress }
}

fn add(context: &Context, args: &RuleArgs) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    let at = desk.file_of(&args.group)?;
    let rule = rule(&Words {
        drop: args.drop,
        protocol: &args.protocol,
        ports: args.ports.as_deref(),
        peers: &args.peer,
        priority: args.priority,
        local: args.local.as_deref(),
        source_ports: args.source_ports.as_deref(),
        description: &args.description,
    })?;
    let way = direction(args.egress);
    desk.change(at, Some(&args.group), &format!("{} has the {way} rule", args.group), |text| {
        edit::add_rule(text, &args.group, way, &rule)
    })
}

fn remove(context: &Context, args: &RuleRemove) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    let at = desk.file_of(&args.group)?;
    let selector = match args.number {
        Some(0) => return Err(Failure::new("rules count from 1", "see `keepwall sg show`")),
        Some(number) => RuleSelector::Index(number - 1),
        None => RuleSelector::Tuple(rule(&Words {
            drop: args.drop,
            protocol: &args.protocol,
            ports: args.ports.as_deref(),
            peers: args.peer.as_deref().unwrap_or_default(),
            priority: args.priority,
            ..Words::default()
        })?),
    };
    let way = direction(args.egress);
    desk.change(at, Some(&args.group), &format!("{} has no such {way} rule", args.group), |text| {
        edit::remove_rule(text, &args.group, way, &selector)
    })
}

fn set(context: &Context, args: &RuleSet) -> Result<u8, Failure> {
    if args.number == 0 {
        return Err(Failure::new("rules count from 1", "see `keepwall sg show`"));
    }
    let ports = match &args.ports {
        None => None,
        // Read by the same reader as a whole rule's.
        Some(text) => {
            let said = Words { protocol: "tcp", ports: Some(text), peers: "any", priority: 1, ..Words::default() };
            Some(rule(&said)?.ports)
        }
    };
    let change = RuleChange {
        description: args.description.clone(),
        priority: args.priority,
        policy: args.policy.map(|p| match p {
            AccessWord::Accept => Policy::Accept,
            AccessWord::Drop => Policy::Drop,
        }),
        ports,
    };
    let desk = Desk::open(context)?;
    let at = desk.file_of(&args.group)?;
    let way = direction(args.egress);
    desk.change(at, Some(&args.group), &format!("{}/{way}#{} is so", args.group, args.number), |text| {
        edit::set_rule(text, &args.group, way, &RuleSelector::Index(args.number - 1), &change)
    })
}

fn import(context: &Context, group: &str, file: &Path) -> Result<u8, Failure> {
    let cannot = |error: std::io::Error| Failure::plain(format!("cannot read {}: {error}", file.display()));
    if std::fs::metadata(file).map_err(cannot)?.len() > IMPORT_BYTES_MAX {
        return Err(Failure::plain(format!("{} is larger than {IMPORT_BYTES_MAX} bytes", file.display())));
    }
    let text = std::fs::read_to_string(file).map_err(cannot)?;
    let read = match file.extension().and_then(|e| e.to_str()) {
        Some("csv") => exchange::from_csv(&text),
        _ => exchange::from_json(&text),
    };
    let rules = read.map_err(|errors| {
        for error in &errors {
            ui::say(format!("{}: {error}", file.display()));
        }
        Failure::new(format!("{} cannot be imported; nothing was changed", file.display()), "mend the rows named above")
    })?;
    let desk = Desk::open(context)?;
    let at = desk.file_of(group)?;
    desk.change(at, Some(group), &format!("{group} has the {} rules of {}", rules.len(), file.display()), |text| {
        edit::add_rules(text, group, &rules)
    })
}

fn snapshots(context: &Context, group: &str) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    let directory = desk.snapshot_directory(group);
    let mut rows = Vec::new();
    for id in ids(&directory).into_iter().rev() {
        let text = std::fs::read_to_string(directory.join(format!("{id}.json"))).unwrap_or_default();
        if let Ok(snapshot) = GroupSnapshot::parse(&text) {
            rows.push((id, snapshot));
        }
    }
    if context.global.json {
        let rows: Vec<_> = (rows.iter())
            .map(|(id, s)| serde_json::json!({ "id": id.to_string(), "taken_at_s": s.taken_at_s, "ingress": s.ingress.len(), "egress": s.egress.len() }))
            .collect();
        ui::json(&rows);
    } else if rows.is_empty() {
        ui::out(format!("There are no snapshots of {group} yet: one is made before keepwall changes its rules."));
    } else {
        let rows: Vec<Vec<String>> = (rows.iter())
            .map(|(id, s)| {
                vec![id.to_string(), utc(s.taken_at_s), s.ingress.len().to_string(), s.egress.len().to_string()]
            })
            .collect();
        ui::table(&["Snapshot", "Taken (UTC)", "Rules in", "Rules out"], &rows);
    }
    Ok(0)
}

fn restore(context: &Context, group: &str, id: &str) -> Result<u8, Failure> {
    let desk = Desk::open(context)?;
    let at = desk.file_of(group)?;
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Failure::new(format!("`{id}` is no snapshot"), format!("see `keepwall sg snapshot list {group}`")));
    }
    let path = desk.snapshot_directory(group).join(format!("{id}.json"));
    let text = std::fs::read_to_string(&path).map_err(|_| {
        Failure::new(
            format!("there is no snapshot {id} of {group}"),
            format!("see `keepwall sg snapshot list {group}`"),
        )
    })?;
    let snapshot =
        GroupSnapshot::parse(&text).map_err(|error| Failure::plain(format!("{}: {error}", path.display())))?;
    desk.change(at, Some(group), &format!("{group} has the rules of {}", utc(snapshot.taken_at_s)), |text| {
        edit::replace_rules(text, group, &snapshot.ingress, &snapshot.egress)
    })
}
