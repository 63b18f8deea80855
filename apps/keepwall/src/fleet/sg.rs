//! Security groups of a fleet: each change goes to the machines at once, in the usual waves.

use keepwall_api::{Accepted, GroupSpec, GroupTypeWord, GroupView, PolicyWord, RuleEdit, RuleSpec};
use keepwall_client::{
    AddRuleQuery, ChangeRuleQuery, DeleteSecurityGroupQuery, Error, ListSecurityGroupsQuery, PutSecurityGroupQuery,
    RemoveRuleQuery, Tagged,
};
use keepwall_posture::NewRule;

use super::posture::sent;
use super::{Server, labels, pages};
use crate::Context;
use crate::cli::{AccessWord, RuleCommand, RuleSet, Sg};
use crate::failure::Failure;
use crate::plan::agreed;
use crate::sg::{Words, rule};
use crate::ui;

pub fn run(context: &Context, server: &Server, command: Sg, yes: bool) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    let change = |what: &str, send: &dyn Fn() -> Result<Accepted, Error>| -> Result<u8, Failure> {
        if !agreed(&format!("{what}: tell the fleet at {} now?", server.label()), yes)? {
            return Ok(1);
        }
        let accepted = send()?;
        sent(json, server, &accepted.rollout, false)
    };
    let put = |name: &str, spec: &GroupSpec, revision: Option<u64>| {
        client.put_security_group(name, &PutSecurityGroupQuery::default(), spec, revision)
    };
    match command {
        Sg::List => list(json, server),
        Sg::Show { group } => show(json, &client.get_security_group(&group)?),
        Sg::Create(create) => {
            let (revision, there) = (client.get_posture()?.revision, client.get_security_group(&create.name));
            if there.is_ok() {
                return Err(Failure::new(
                    format!("there is a security group `{}` already", create.name),
                    format!("see `keepwall sg show {}`", create.name),
                ));
            }
            let kind = if create.advanced { GroupTypeWord::Advanced } else { GroupTypeWord::Basic };
            let spec = GroupSpec { kind, description: create.description, ..GroupSpec::default() };
            change(&format!("Create {}", create.name), &|| put(&create.name, &spec, Some(revision)))
        }
        Sg::Clone { group, new_name } => {
            let found = client.get_security_group(&group)?;
            // Its members stay with the first: a copy of the rules is asked for.
            let spec = GroupSpec { members: Vec::new(), ..found.spec.clone() };
            change(&format!("Copy {group} to {new_name}"), &|| put(&new_name, &spec, found.etag))
        }
        Sg::Delete { group } => {
            let found = client.get_security_group(&group)?;
            change(&format!("Delete {group}"), &|| {
                client.delete_security_group(&group, &DeleteSecurityGroupQuery::default(), found.etag)
            })
        }
        Sg::InnerAccess { group, access } => {
            let found = client.get_security_group(&group)?;
            let word = policy(access);
            let spec = GroupSpec { inner_access: Some(word), ..found.spec.clone() };
            let what = if word == PolicyWord::Accept { "reach each other" } else { "are isolated" };
            change(&format!("Members of {group} {what}"), &|| put(&group, &spec, found.etag))
        }
        Sg::Rule(RuleCommand::Add(args)) => {
            let found = client.get_security_group(&args.group)?;
            let said = Words {
                drop: args.drop,
                protocol: &args.protocol,
                ports: args.ports.as_deref(),
                peers: &args.peer,
                priority: args.priority,
                local: args.local.as_deref(),
                source_ports: args.source_ports.as_deref(),
                description: &args.description,
            };
            let (new, way) = (rule(&said)?, direction(args.egress));
            if rules(&found, args.egress).iter().any(|one| same(one, &new)) {
                ui::out(format!("{} Nothing to do: {} has this rule already.", ui::green("✓"), args.group));
                return Ok(0);
            }
            let spec = spec(&new)?;
            change(&format!("Add to {} {way}: {}", args.group, words(&spec)), &|| {
                client.add_rule(&args.group, way, &AddRuleQuery::default(), &spec, found.etag)
            })
        }
        Sg::Rule(RuleCommand::Remove(args)) => {
            let found = client.get_security_group(&args.group)?;
            let all = rules(&found, args.egress);
            let at = match args.number {
                Some(number) => Some(index(&found, args.egress, number)?),
                None => {
                    let said = Words {
                        drop: args.drop,
                        protocol: &args.protocol,
                        ports: args.ports.as_deref(),
                        peers: args.peer.as_deref().unwrap_or_default(),
                        priority: args.priority,
                        ..Words::default()
                    };
                    let wanted = rule(&said)?;
                    all.iter().position(|one| same(one, &wanted))
                }
            };
            let Some(at) = at else {
                ui::out(format!("{} Nothing to do: {} has no such rule.", ui::green("✓"), args.group));
                return Ok(0);
            };
            let way = direction(args.egress);
            change(&format!("Remove from {} {way}: {}", args.group, words(&all[at])), &|| {
                client.remove_rule(&args.group, way, at as u64, &RemoveRuleQuery::default(), found.etag)
            })
        }
        Sg::Rule(RuleCommand::Set(args)) => {
            let found = client.get_security_group(&args.group)?;
            let at = index(&found, args.egress, args.number)?;
            let (edit, way) = (edit(&args)?, direction(args.egress));
            let what =
                format!("Change {} {way} #{}: {}", args.group, args.number, words(&rules(&found, args.egress)[at]));
            change(&what, &|| {
                client.change_rule(&args.group, way, at as u64, &ChangeRuleQuery::default(), &edit, found.etag)
            })
        }
        Sg::Join(_) | Sg::Leave(_) | Sg::Export { .. } | Sg::Import { .. } => Err(Failure::new(
            "this works on posture files, and a server is chosen",
            "keepwall posture pull DIR, do it there with `--context none --posture DIR`, then keepwall apply",
        )),
        Sg::Snapshot(_) => Err(Failure::new(
            "the server keeps whole postures, and no snapshots of single groups",
            "keepwall posture history, diff and return",
        )),
    }
}

fn policy(word: AccessWord) -> PolicyWord {
    match word {
        AccessWord::Accept => PolicyWord::Accept,
        AccessWord::Drop => PolicyWord::Drop,
    }
}

fn direction(egress: bool) -> &'static str {
    if egress { "egress" } else { "ingress" }
}

fn rules(group: &GroupView, egress: bool) -> &[RuleSpec] {
    if egress { &group.spec.egress } else { &group.spec.ingress }
}

/// A rule's number, as `sg show` counts, as the API counts.
fn index(group: &GroupView, egress: bool, number: usize) -> Result<usize, Failure> {
    let there = rules(group, egress).len();
    number.checked_sub(1).filter(|at| *at < there).ok_or_else(|| {
        Failure::new(
            format!("{} has {there} {} rules, counted from 1", group.name, direction(egress)),
            format!("see `keepwall sg show {}`", group.name),
        )
    })
}

fn value(rule: &RuleSpec) -> serde_json::Value {
    serde_json::to_value(rule).unwrap_or_default()
}

/// The API's rule of a posture's.
fn spec(rule: &NewRule) -> Result<RuleSpec, Failure> {
    let value = serde_json::to_value(rule).and_then(serde_json::from_value);
    value.map_err(|error| Failure::plain(error.to_string()))
}

/// True if both decide the same; what they are described by does not matter.
fn same(one: &RuleSpec, other: &NewRule) -> bool {
    let read = serde_json::from_value::<NewRule>(value(one));
    read.is_ok_and(|one| one == NewRule { description: one.description.clone(), ..other.clone() })
}

fn edit(args: &RuleSet) -> Result<RuleEdit, Failure> {
    let ports = match &args.ports {
        None => None,
        Some(text) => {
            let said = Words { protocol: "tcp", ports: Some(text), peers: "any", priority: 1, ..Words::default() };
            Some(spec(&rule(&said)?)?.ports)
        }
    };
    Ok(RuleEdit {
        policy: args.policy.map(policy),
        priority: args.priority,
        ports,
        description: args.description.clone(),
    })
}

fn words(rule: &RuleSpec) -> String {
    let policy = if rule.policy == PolicyWord::Accept { "accept" } else { "drop" };
    let ports = if rule.ports.is_empty() { String::new() } else { format!(" {}", rule.ports.join(", ")) };
    let local = rule.local.as_ref().map_or(String::new(), |local| format!(" (this side {local})"));
    let source = match rule.source_ports.is_empty() {
        true => String::new(),
        false => format!(" source ports {}", rule.source_ports.join(", ")),
    };
    let peers = rule.peers.join(", ");
    format!("{policy} {}{ports} · {peers}{local}{source} · priority {}", rule.protocol, rule.priority)
}

fn list(json: bool, server: &Server) -> Result<u8, Failure> {
    let all = pages(usize::MAX, |cursor, limit| {
        let query = ListSecurityGroupsQuery { cursor, limit };
        server.client.list_security_groups(&query).map(|page| (page.value.items, page.value.next))
    })?;
    if json {
        ui::json(&all);
        return Ok(0);
    }
    if all.is_empty() {
        ui::out("There are no security groups yet: write a posture, then keepwall apply.");
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (all.iter())
        .map(|group| {
            let members: Vec<String> = group.spec.members.iter().map(labels).collect();
            vec![
                group.name.clone(),
                format!("{:?}", group.spec.kind).to_lowercase(),
                if isolated(&group.spec) { "isolated" } else { "accept" }.into(),
                group.spec.ingress.len().to_string(),
                group.spec.egress.len().to_string(),
                members.join(" or "),
                ui::dim(&group.place),
            ]
        })
        .collect();
    ui::table(&["Group", "Type", "Intra-group", "In", "Out", "Members by label", "Written at"], &rows);
    Ok(0)
}

fn isolated(group: &GroupSpec) -> bool {
    group.kind == GroupTypeWord::Advanced || group.inner_access == Some(PolicyWord::Drop)
}

fn show(json: bool, group: &Tagged<GroupView>) -> Result<u8, Failure> {
    if json {
        ui::json(&group.value);
        return Ok(0);
    }
    ui::out(format!("{}  {}  {}", ui::bold(&group.name), group.spec.description, ui::dim(&group.place)));
    for (egress, heading) in [(false, "Inbound"), (true, "Outbound")] {
        ui::out("");
        let implicit =
            |what: &str, policy: &str| vec![ui::dim("·"), ui::dim(policy), ui::dim(what), ui::dim("implicit")];
        let mut rows = Vec::new();
        if !egress && !isolated(&group.spec) {
            rows.push(implicit("all from members of this group, before any rule", "accept"));
        }
        let mut numbered: Vec<(usize, &RuleSpec)> = rules(group, egress).iter().enumerate().collect();
        numbered.sort_by_key(|(_, rule)| (rule.priority, rule.policy == PolicyWord::Accept));
        for (at, rule) in numbered {
            let policy = if rule.policy == PolicyWord::Accept { ui::green("accept") } else { ui::red("drop") };
            let text = words(rule);
            let text = text.split_once(' ').map_or(text.as_str(), |(_, rest)| rest).to_owned();
            rows.push(vec![format!("#{}", at + 1), policy, text, ui::dim(&rule.description)]);
        }
        let accepts = egress && group.spec.kind == GroupTypeWord::Basic;
        rows.push(implicit("everything else", if accepts { "accept" } else { "drop" }));
        ui::table(&["Rule", "Does", &format!("{heading}, in the order of evaluation"), "For"], &rows);
    }
    ui::out("");
    let members: Vec<String> = group.spec.members.iter().map(labels).collect();
    let text = if members.is_empty() { "none; instances may name this group".into() } else { members.join(" or ") };
    ui::out(format!("{} {text}", ui::bold("Members by label:")));
    Ok(0)
}
