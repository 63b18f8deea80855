//! Machines, enrolment tokens and rollouts.

use keepwall_api::fleet::RolloutState;
use keepwall_api::operations::Operation;
use keepwall_api::problem::{self, Problem};
use keepwall_api::{
    InstanceChange, InstancePage, InstanceView, Labels, OperationView, RolloutPage, RolloutView, TokenPage, TokenSpec,
    TokenView,
};
use keepwall_fleet::access::{Action, Resource, Target};
use keepwall_store::Expect;

use super::answer::Answer;
use super::call::{Call, cursor};
use super::problems;
use crate::fleet::FleetError;

/// An answer, or what became of the same request before.
pub(super) async fn settle<T>(
    call: Call,
    made: Result<T, FleetError>,
    answer: impl FnOnce(&Operation, T) -> Answer,
) -> Result<Answer, Problem> {
    match made {
        Ok(made) => Ok(answer(&call.op, made)),
        Err(FleetError::Before(before)) => call.again(&before).await,
        Err(FleetError::Store(error)) => Err(problems::conflict(&call, error)),
        Err(error) => Err(problems::fleet(error)),
    }
}

fn instance_answer(_: &Operation, view: InstanceView) -> Answer {
    Answer::json(&view).etag(view.revision)
}

fn rollout_answer(_: &Operation, view: RolloutView) -> Answer {
    Answer::json(&view).etag(view.revision)
}

/// Pages that are read for one page of an answer at most: who may see little of a large fleet gets a short page and
/// a cursor, not a long wait.
const PAGES_MAX: usize = 20;

pub(super) async fn list(call: Call) -> Result<Answer, Problem> {
    let labels = call.labels()?;
    let limit = call.limit();
    let mut after = call.cursor()?;
    let mut items: Vec<InstanceView> = Vec::new();
    let mut more = true;
    for _ in 0..PAGES_MAX {
        let page = call.app.fleet.instances(after.as_deref(), limit, &labels).await.map_err(problems::fleet)?;
        more = page.len() == limit;
        for one in page {
            if items.len() == limit {
                more = true;
                break;
            }
            after = Some(one.name.clone());
            if call.sees(Resource::Instance, &one.labels) {
                items.push(one);
            }
        }
        if !more || items.len() == limit {
            break;
        }
    }
    Ok(Answer::json(&InstancePage { items, next: after.filter(|_| more).map(cursor) }))
}

/// The machine, if they may read it. What they may not is as if it were not there.
async fn seen(call: &Call) -> Result<InstanceView, Problem> {
    let name = call.param("name");
    let view = call.app.fleet.instance(name).await.map_err(problems::fleet)?;
    if call.sees(Resource::Instance, &view.labels) {
        return Ok(view);
    }
    Err(problem::NOT_FOUND.because(format!("there is no instance `{name}`")))
}

pub(super) async fn get(call: Call) -> Result<Answer, Problem> {
    let view = seen(&call).await?;
    Ok(Answer::json(&view).etag(view.revision))
}

pub(super) async fn change(call: Call) -> Result<Answer, Problem> {
    let body: InstanceChange = call.body()?;
    let view = seen(&call).await?;
    call.allowed(Resource::Instance, Action::Change, Target::One(&view.labels))?;
    if let Some(labels) = &body.labels {
        // Or somebody could push a machine out of their scope, or pull groups over it that they may not touch.
        call.allowed(Resource::Instance, Action::Change, Target::One(labels))?;
    }
    // What was judged is what is changed: between the two, somebody may have given it other labels.
    let expect =
        if call.expect == Expect::Any && view.revision > 0 { Expect::Revision(view.revision) } else { call.expect };
    let made = call.app.fleet.change_instance(call.param("name"), body, expect, &call.act).await;
    settle(call, made, instance_answer).await
}

pub(super) async fn delete(call: Call) -> Result<Answer, Problem> {
    let view = seen(&call).await?;
    call.allowed(Resource::Instance, Action::Delete, Target::One(&view.labels))?;
    let made = call.app.fleet.remove_instance(call.param("name"), call.expect, &call.act).await;
    settle(call, made, |_, ()| Answer::nothing()).await
}

pub(super) async fn revoke(call: Call) -> Result<Answer, Problem> {
    let view = seen(&call).await?;
    call.allowed(Resource::Instance, Action::Revoke, Target::One(&view.labels))?;
    let made = call.app.fleet.revoke(call.param("name"), &call.act).await;
    settle(call, made, |_, ()| Answer::nothing()).await
}

pub(super) async fn intent(call: Call) -> Result<Answer, Problem> {
    seen(&call).await?;
    let intent = call.app.fleet.intent(call.param("name")).await.map_err(problems::fleet)?;
    Ok(Answer::json(&intent))
}

pub(super) async fn tokens(call: Call) -> Result<Answer, Problem> {
    let limit = call.limit();
    let after = call.cursor()?;
    let page = call.app.fleet.tokens(after.as_deref(), limit).await.map_err(problems::fleet)?;
    let next = page.last().filter(|_| page.len() == limit).map(|last| cursor(&last.id));
    let items = page.into_iter().filter(|one| call.sees(Resource::Token, &one.spec.labels)).collect();
    Ok(Answer::json(&TokenPage { items, next }))
}

pub(super) async fn make_token(call: Call) -> Result<Answer, Problem> {
    let spec: TokenSpec = call.body()?;
    call.allowed(Resource::Token, Action::Create, Target::One(&spec.labels))?;
    let made = call.app.fleet.make_token(spec, &call.act).await;
    settle(call, made, |op, made| Answer::json(&made).location(&format!("{}/{}", op.path, made.id))).await
}

async fn seen_token(call: &Call) -> Result<TokenView, Problem> {
    let id = call.param("id");
    let view = call.app.fleet.token(id).await.map_err(problems::fleet)?;
    if call.sees(Resource::Token, &view.spec.labels) {
        return Ok(view);
    }
    Err(problem::NOT_FOUND.because(format!("there is no enrolment token `{id}`")))
}

pub(super) async fn token(call: Call) -> Result<Answer, Problem> {
    let view = seen_token(&call).await?;
    Ok(Answer::json(&view).etag(view.revision))
}

pub(super) async fn delete_token(call: Call) -> Result<Answer, Problem> {
    let view = seen_token(&call).await?;
    call.allowed(Resource::Token, Action::Delete, Target::One(&view.spec.labels))?;
    let made = call.app.fleet.delete_token(call.param("id"), call.expect, &call.act).await;
    settle(call, made, |_, ()| Answer::nothing()).await
}

pub(super) async fn rollouts(call: Call) -> Result<Answer, Problem> {
    let limit = call.limit();
    let after = call.cursor()?;
    let items = call.app.fleet.rollouts(after.as_deref(), limit).await.map_err(problems::fleet)?;
    let next = items.last().filter(|_| items.len() == limit).map(|last| cursor(&last.id));
    Ok(Answer::json(&RolloutPage { items, next }))
}

pub(super) async fn rollout(call: Call) -> Result<Answer, Problem> {
    let found = call.app.fleet.rollout(call.param("id")).await;
    settle(call, found, rollout_answer).await
}

pub(super) async fn stop(call: Call) -> Result<Answer, Problem> {
    call.allowed(Resource::Rollout, Action::Change, Target::Whole)?;
    let made = call.app.fleet.stop_rollout(call.param("id"), &call.act).await;
    settle(call, made, rollout_answer).await
}

pub(super) async fn resume(call: Call) -> Result<Answer, Problem> {
    call.allowed(Resource::Rollout, Action::Change, Target::Whole)?;
    let made = call.app.fleet.resume_rollout(call.param("id"), &call.act).await;
    settle(call, made, rollout_answer).await
}

pub(super) async fn return_back(call: Call) -> Result<Answer, Problem> {
    call.allowed(Resource::Rollout, Action::Change, Target::Whole)?;
    let made = call.app.fleet.return_rollout(call.param("id"), &call.act).await;
    settle(call, made, rollout_answer).await
}

pub(super) async fn operation(call: Call) -> Result<Answer, Problem> {
    let view = call.app.fleet.rollout(call.param("id")).await.map_err(problems::fleet)?;
    Ok(Answer::json(&OperationView {
        done: view.state != RolloutState::Running,
        succeeded: view.state == RolloutState::Done,
        applied: view.waves.iter().map(|wave| wave.applied).sum(),
        total: view.waves.iter().map(|wave| wave.total).sum(),
        rollout: format!("{}/rollouts/{}", keepwall_api::BASE, view.id),
        detail: view.detail,
        id: view.id,
    }))
}

/// The labels of a machine, for who may see what it says; `None` if it is gone.
pub(super) async fn labels_of(call: &Call, instance: &str) -> Result<Option<Labels>, Problem> {
    match call.app.fleet.instance(instance).await {
        Ok(view) => Ok(Some(view.labels)),
        Err(FleetError::NotFound(_)) => Ok(None),
        Err(error) => Err(problems::fleet(error)),
    }
}
