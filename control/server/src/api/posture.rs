//! The posture: as a whole, file by file, and part by part.

use keepwall_api::fleet::{PostureChange, PostureFile, PostureQuestion, PostureVersion, RolloutPolicy};
use keepwall_api::operations::Operation;
use keepwall_api::problem::{self, Problem};
use keepwall_api::{
    Accepted, DeclaredInstancePage, DeclaredInstanceView, FilePage, FileText, FileView, GroupPage, GroupSpec,
    GroupView, InstanceSpec, Labels, PortListPage, PortListSpec, PortListView, PosturePage, PrefixListPage,
    PrefixListSpec, PrefixListView, ReturnChange, RuleEdit, RuleSpec,
};
use keepwall_fleet::access::{Action, Resource, Target};
use keepwall_secgroup::spec::{Direction, Spec};
use keepwall_store::{Expect, StoreError};
use serde::Serialize;
use serde_json::Value;

use super::answer::Answer;
use super::call::{Call, cursor};
use super::fleet::settle;
use super::problems;
use super::views::{self, RuleWork, Section};
use crate::fleet::FleetError;

/// How often a change that names no revision is made again upon what somebody else declared meanwhile.
const TRIES_MAX: usize = 4;

fn version_answer(_: &Operation, version: PostureVersion) -> Answer {
    Answer::json(&version).etag(version.revision)
}

fn accepted(_: &Operation, accepted: Accepted) -> Answer {
    Answer::json(&accepted).location(&format!("/operations/{}", accepted.rollout))
}

async fn present(call: &Call) -> Result<PostureVersion, Problem> {
    call.app.fleet.posture().await.map_err(problems::fleet)
}

pub(super) async fn get(call: Call) -> Result<Answer, Problem> {
    let found = call.app.fleet.posture().await;
    settle(call, found, version_answer).await
}

pub(super) async fn at(call: Call) -> Result<Answer, Problem> {
    let found = call.app.fleet.posture_at(call.number("revision")?).await;
    settle(call, found, version_answer).await
}

pub(super) async fn history(call: Call) -> Result<Answer, Problem> {
    let limit = call.limit();
    let before = call.cursor_number()?;
    let items = call.app.fleet.postures(before, limit).await.map_err(problems::fleet)?;
    let next = items.last().filter(|_| items.len() == limit).map(|last| cursor(last.revision));
    Ok(Answer::json(&PosturePage { items, next }))
}

pub(super) async fn check(call: Call) -> Result<Answer, Problem> {
    let body: PostureQuestion = call.body()?;
    let report = call.app.fleet.check(body.files).await;
    settle(call, report, |_, report| Answer::json(&report)).await
}

pub(super) async fn put(call: Call) -> Result<Answer, Problem> {
    let change: PostureChange = call.body()?;
    let made = declare(&call, change, call.expect, None).await;
    settle(call, made, accepted).await
}

pub(super) async fn return_to(call: Call) -> Result<Answer, Problem> {
    let body: ReturnChange = call.body()?;
    let revision = call.number("revision")?;
    let earlier = call.app.fleet.posture_at(revision).await.map_err(problems::fleet)?;
    let files = earlier.files.unwrap_or_default();
    let change = PostureChange { files, reason: body.reason, rollout: body.rollout };
    let made = declare(&call, change, call.expect, Some(revision)).await;
    settle(call, made, accepted).await
}

async fn declare(
    call: &Call,
    change: PostureChange,
    expect: Expect,
    returned_to: Option<u64>,
) -> Result<Accepted, FleetError> {
    let who = call.who.clone();
    let permit = move |labels: &Labels| {
        let target = Target::One(labels);
        who.as_ref().is_some_and(|who| who.permits(Resource::Posture, Action::Change, target).is_allow())
    };
    call.app.fleet.declare(change, expect, returned_to, &permit, &call.act).await
}

/// Changes some of the files, upon what is declared now.
async fn change(
    call: Call,
    reason: String,
    rollout: RolloutPolicy,
    edit: impl Fn(Vec<PostureFile>) -> Result<Vec<PostureFile>, Problem>,
) -> Result<Answer, Problem> {
    for _ in 1..TRIES_MAX {
        let found = present(&call).await?;
        let unexpected = match call.expect {
            Expect::Any => false,
            Expect::Absent => found.revision != 0,
            Expect::Present => found.revision == 0,
            Expect::Revision(revision) => found.revision != revision,
        };
        if unexpected {
            let detail = format!("the posture is at revision {} by now", found.revision);
            return Err(problem::CHANGED.because(detail));
        }
        let expect = if found.revision == 0 { Expect::Absent } else { Expect::Revision(found.revision) };
        let files = edit(found.files.unwrap_or_default())?;
        let change = PostureChange { files, reason: reason.clone(), rollout: rollout.clone() };
        match declare(&call, change, expect, None).await {
            Err(FleetError::Store(StoreError::Conflict { .. })) if call.expect == Expect::Any => {}
            made => return settle(call, made, accepted).await,
        }
    }
    Err(problem::CONFLICT.because("the posture changes faster than this change could be made"))
}

fn reason(call: &Call) -> String {
    call.query("reason").unwrap_or_default().to_owned()
}

/// A page of things by name.
fn page<T>(call: &Call, mut all: Vec<(String, T)>) -> Result<(Vec<T>, Option<String>), Problem> {
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let after = call.cursor()?;
    let limit = call.limit();
    let mut rest = all.into_iter().skip_while(|(name, _)| after.as_ref().is_some_and(|after| name <= after));
    let mut items = Vec::new();
    let mut last = None;
    for (name, one) in rest.by_ref().take(limit) {
        items.push(one);
        last = Some(name);
    }
    let more = rest.next().is_some();
    Ok((items, last.filter(|_| more).map(cursor)))
}

pub(super) async fn files(call: Call) -> Result<Answer, Problem> {
    let found = present(&call).await?;
    let all = found.files.unwrap_or_default().into_iter();
    let all = all.map(|file| (file.name.clone(), FileView { bytes: file.text.len() as u64, name: file.name }));
    let (items, next) = page(&call, all.collect())?;
    Ok(Answer::json(&FilePage { items, next }).etag(found.revision))
}

fn no_file(name: &str) -> Problem {
    problem::NOT_FOUND.because(format!("the posture has no file `{name}`"))
}

pub(super) async fn file(call: Call) -> Result<Answer, Problem> {
    let found = present(&call).await?;
    let name = call.param("name");
    let file = found.files.unwrap_or_default().into_iter().find(|file| file.name == name);
    Ok(Answer::json(&file.ok_or_else(|| no_file(name))?).etag(found.revision))
}

pub(super) async fn put_file(call: Call) -> Result<Answer, Problem> {
    let body: FileText = call.body()?;
    let name = call.param("name").to_owned();
    change(call, body.reason, body.rollout, |mut files| {
        match files.iter_mut().find(|file| file.name == name) {
            Some(file) => file.text.clone_from(&body.text),
            None => files.push(PostureFile { name: name.clone(), text: body.text.clone() }),
        }
        Ok(files)
    })
    .await
}

pub(super) async fn delete_file(call: Call) -> Result<Answer, Problem> {
    let name = call.param("name").to_owned();
    let why = reason(&call);
    change(call, why, RolloutPolicy::default(), |mut files| {
        let before = files.len();
        files.retain(|file| file.name != name);
        if files.len() == before { Err(no_file(&name)) } else { Ok(files) }
    })
    .await
}

async fn list<V, P: Serialize>(
    call: Call,
    views: impl Fn(&Spec) -> Vec<(String, V)>,
    into: impl Fn(Vec<V>, Option<String>) -> P,
) -> Result<Answer, Problem> {
    let found = present(&call).await?;
    let spec = views::spec(&found.files.unwrap_or_default())?;
    let (items, next) = page(&call, views(&spec))?;
    Ok(Answer::json(&into(items, next)).etag(found.revision))
}

async fn one<V: Serialize>(
    call: Call,
    section: Section,
    view: impl Fn(&Spec, &str) -> Option<V>,
) -> Result<Answer, Problem> {
    let found = present(&call).await?;
    let spec = views::spec(&found.files.unwrap_or_default())?;
    let name = call.param("name");
    let none = || problem::NOT_FOUND.because(format!("no posture file declares a {} `{name}`", section.noun()));
    Ok(Answer::json(&view(&spec, name).ok_or_else(none)?).etag(found.revision))
}

async fn put_part(call: Call, section: Section, value: Value) -> Result<Answer, Problem> {
    let name = call.param("name").to_owned();
    let why = reason(&call);
    change(call, why, RolloutPolicy::default(), |files| views::put(files, section, &name, &value)).await
}

async fn delete_part(call: Call, section: Section) -> Result<Answer, Problem> {
    let name = call.param("name").to_owned();
    let why = reason(&call);
    change(call, why, RolloutPolicy::default(), |files| views::delete(files, section, &name)).await
}

fn value<T: Serialize>(spec: &T) -> Value {
    serde_json::to_value(spec).unwrap_or_default()
}

pub(super) async fn groups(call: Call) -> Result<Answer, Problem> {
    let views =
        |spec: &Spec| spec.groups.iter().map(|one| (one.name.clone(), GroupView::from(views::group(one)))).collect();
    list(call, views, |items, next| GroupPage { items, next }).await
}

pub(super) async fn group(call: Call) -> Result<Answer, Problem> {
    one(call, Section::Groups, |spec, name| {
        spec.groups.iter().find(|one| one.name == name).map(|one| GroupView::from(views::group(one)))
    })
    .await
}

pub(super) async fn put_group(call: Call) -> Result<Answer, Problem> {
    let body: GroupSpec = call.body()?;
    put_part(call, Section::Groups, views::group_value(&body)).await
}

pub(super) async fn delete_group(call: Call) -> Result<Answer, Problem> {
    delete_part(call, Section::Groups).await
}

pub(super) async fn prefix_lists(call: Call) -> Result<Answer, Problem> {
    let views = |spec: &Spec| {
        let all = spec.prefix_lists.iter();
        all.map(|one| (one.name.clone(), PrefixListView::from(views::prefix_list(one)))).collect()
    };
    list(call, views, |items, next| PrefixListPage { items, next }).await
}

pub(super) async fn prefix_list(call: Call) -> Result<Answer, Problem> {
    one(call, Section::PrefixLists, |spec, name| {
        let found = spec.prefix_lists.iter().find(|one| one.name == name);
        found.map(|one| PrefixListView::from(views::prefix_list(one)))
    })
    .await
}

pub(super) async fn put_prefix_list(call: Call) -> Result<Answer, Problem> {
    let body: PrefixListSpec = call.body()?;
    put_part(call, Section::PrefixLists, value(&body)).await
}

pub(super) async fn delete_prefix_list(call: Call) -> Result<Answer, Problem> {
    delete_part(call, Section::PrefixLists).await
}

pub(super) async fn port_lists(call: Call) -> Result<Answer, Problem> {
    let views = |spec: &Spec| {
        let all = spec.port_lists.iter();
        all.map(|one| (one.name.clone(), PortListView::from(views::port_list(one)))).collect()
    };
    list(call, views, |items, next| PortListPage { items, next }).await
}

pub(super) async fn port_list(call: Call) -> Result<Answer, Problem> {
    one(call, Section::PortLists, |spec, name| {
        let found = spec.port_lists.iter().find(|one| one.name == name);
        found.map(|one| PortListView::from(views::port_list(one)))
    })
    .await
}

pub(super) async fn put_port_list(call: Call) -> Result<Answer, Problem> {
    let body: PortListSpec = call.body()?;
    put_part(call, Section::PortLists, value(&body)).await
}

pub(super) async fn delete_port_list(call: Call) -> Result<Answer, Problem> {
    delete_part(call, Section::PortLists).await
}

pub(super) async fn instances(call: Call) -> Result<Answer, Problem> {
    let views = |spec: &Spec| {
        let all = spec.instances.iter();
        all.map(|one| (one.name.clone(), DeclaredInstanceView::from(views::instance(one)))).collect()
    };
    list(call, views, |items, next| DeclaredInstancePage { items, next }).await
}

pub(super) async fn instance(call: Call) -> Result<Answer, Problem> {
    one(call, Section::Instances, |spec, name| {
        let found = spec.instances.iter().find(|one| one.name == name);
        found.map(|one| DeclaredInstanceView::from(views::instance(one)))
    })
    .await
}

pub(super) async fn put_instance(call: Call) -> Result<Answer, Problem> {
    let body: InstanceSpec = call.body()?;
    put_part(call, Section::Instances, value(&body)).await
}

pub(super) async fn delete_instance(call: Call) -> Result<Answer, Problem> {
    delete_part(call, Section::Instances).await
}

fn direction(call: &Call) -> Result<Direction, Problem> {
    match call.param("direction") {
        "ingress" => Ok(Direction::Ingress),
        "egress" => Ok(Direction::Egress),
        other => Err(problem::NOT_FOUND.because(format!("rules are `ingress` or `egress`, not `{other}`"))),
    }
}

fn index(call: &Call) -> Result<usize, Problem> {
    Ok(usize::try_from(call.number("index")?).unwrap_or(usize::MAX))
}

async fn edit_rule(call: Call, work: RuleWork) -> Result<Answer, Problem> {
    let direction = direction(&call)?;
    let group = call.param("name").to_owned();
    let why = reason(&call);
    let edit = |files| views::edit_rule(files, &group, direction, &work);
    change(call, why, RolloutPolicy::default(), edit).await
}

pub(super) async fn add_rule(call: Call) -> Result<Answer, Problem> {
    let rule: RuleSpec = call.body()?;
    edit_rule(call, RuleWork::Add(Box::new(rule))).await
}

pub(super) async fn change_rule(call: Call) -> Result<Answer, Problem> {
    let change: RuleEdit = call.body()?;
    let index = index(&call)?;
    edit_rule(call, RuleWork::Change(index, change)).await
}

pub(super) async fn remove_rule(call: Call) -> Result<Answer, Problem> {
    let index = index(&call)?;
    edit_rule(call, RuleWork::Remove(index)).await
}
