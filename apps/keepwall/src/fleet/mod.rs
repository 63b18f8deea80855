//! The same words for a fleet: what one asks and tells a server, by its API.

pub mod access;
pub mod instances;
pub mod observed;
pub mod posture;
pub mod rollouts;
pub mod secret;
pub mod session;
pub mod sg;

use std::time::Duration;

use keepwall_api::Labels;
use keepwall_client::{Client, Error, Settings};

use crate::contexts::Aim;
use crate::failure::Failure;
use crate::ui;

/// What one page of a list holds at most.
const PAGE: u64 = 500;
/// Pages that are read for one list: a server that never ends one is no server of ours.
const PAGES_MAX: usize = 1_000;
/// A posture of 10,000 machines is looked at in less.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that was chosen.
pub struct Server {
    pub client: Client,
    pub aim: Aim,
}

impl Server {
    pub fn open(aim: Aim) -> Result<Server, Failure> {
        let mut settings = Settings::new(&aim.server);
        settings.trust = aim.trust.clone();
        settings.token = aim.token.clone();
        settings.timeout = PATIENCE;
        Ok(Server { client: Client::new(settings)?, aim })
    }

    /// `prod`, or the address of a server without a name.
    pub fn label(&self) -> &str {
        &self.aim.label
    }
}

/// Up to `count` of a list, page by page; `get` takes cursor and limit.
fn pages<T>(
    count: usize,
    mut get: impl FnMut(Option<String>, Option<u64>) -> Result<(Vec<T>, Option<String>), Error>,
) -> Result<Vec<T>, Error> {
    let mut out = Vec::new();
    let mut cursor = None;
    for _ in 0..PAGES_MAX {
        let left = u64::try_from(count - out.len()).unwrap_or(PAGE).clamp(1, PAGE);
        let (items, next) = get(cursor, Some(left))?;
        out.extend(items);
        if next.is_none() || out.len() >= count {
            break;
        }
        cursor = next;
    }
    out.truncate(count);
    Ok(out)
}

/// `env=test, role=web`
fn labels(labels: &Labels) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")
}

/// `1 machine`, `3 machines`
pub fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Up to five names, and how many more.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// What a server says is text from elsewhere: it moves no cursor and changes no colour.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A change went through.
fn done(json: bool, text: &str) -> Result<u8, Failure> {
    if json {
        ui::json(&serde_json::json!({ "done": text }));
    } else {
        ui::out(format!("{} {text}.", ui::green("✓")));
    }
    Ok(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn lists_end_where_they_should() {
        let endless = |cursor: Option<String>, limit: Option<u64>| {
            let at: u64 = cursor.map_or(0, |text| text.parse().unwrap());
            let end = at + limit.unwrap();
            Ok(((at..end).collect::<Vec<_>>(), Some(end.to_string())))
        };
        assert_eq!(pages(1_234, endless).unwrap(), (0..1_234).collect::<Vec<u64>>());
        assert_eq!(pages(7, endless).unwrap().len(), 7);
        // A short page with more behind it is no last page.
        let short = |cursor: Option<String>, _| {
            Ok(match cursor.as_deref() {
                None => (vec![1], Some("a".into())),
                Some("a") => (vec![], Some("b".into())),
                _ => (vec![2], None),
            })
        };
        assert_eq!(pages(usize::MAX, short).unwrap(), [1, 2]);
    }
}
