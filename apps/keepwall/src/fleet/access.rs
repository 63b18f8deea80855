//! Users, service accounts, keys: who may what.

use keepwall_api::{
    BindingBody, NewKey, NewServiceAccount, NewUser, PasswordChange, ServiceAccountChange, TotpCode, TotpEnrol,
    UserChange, UserView,
};
use keepwall_client::{ListApiKeysQuery, ListServiceAccountsQuery, ListUsersQuery};

use super::{Server, done, labels, pages, secret};
use crate::Context;
use crate::cli::{Key, ServiceAccount, Totp, User};
use crate::failure::Failure;
use crate::plan::agreed;
use crate::{time, ui};

/// `admin`, `operator where env=test`
pub fn bindings(bindings: &[BindingBody]) -> String {
    if bindings.is_empty() {
        return "nothing".into();
    }
    let one = |binding: &BindingBody| {
        let role = format!("{:?}", binding.role).to_lowercase();
        match binding.scope.is_empty() {
            true => role,
            false => format!("{role} where {}", labels(&binding.scope)),
        }
    };
    bindings.iter().map(one).collect::<Vec<_>>().join("; ")
}

pub fn user(context: &Context, server: &Server, command: &User) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        User::List => {
            let all = pages(usize::MAX, |cursor, limit| {
                client.list_users(&ListUsersQuery { cursor, limit }).map(|page| (page.items, page.next))
            })?;
            show(json, &all, "There are no users yet: keepwall user add NAME --role admin")
        }
        User::Add { name, roles, password_stdin } => {
            if roles.is_empty() {
                return Err(Failure::new(
                    "without a role a user may do nothing",
                    format!("keepwall user add {name} --role viewer (or operator, security, admin)"),
                ));
            }
            let password = match password_stdin {
                true => secret::from_stdin()?,
                false => secret::new_password(&format!("Password for {name} (12 characters or more): "))?,
            };
            let body = NewUser { name: name.clone(), password, bindings: roles.clone() };
            let made = client.create_user(&body)?;
            if json {
                ui::json(&made.value);
                return Ok(0);
            }
            done(json, &format!("{name} may log in, as {}", bindings(roles)))
        }
        User::Remove(one) => {
            if !agreed(&format!("Remove {} with all sessions and keys?", one.name), one.yes)? {
                return Ok(1);
            }
            client.delete_user(&one.name, None)?;
            done(json, &format!("{} is gone", one.name))
        }
        User::Passwd { name, password_stdin } => {
            let me = client.me()?;
            match name {
                Some(name) if *name != me.user => {
                    let password = match password_stdin {
                        true => secret::from_stdin()?,
                        false => secret::new_password(&format!("New password for {name}: "))?,
                    };
                    let change = UserChange { password: Some(password), ..UserChange::default() };
                    client.change_user(name, &change, None)?;
                    done(json, &format!("{name} has a new password, and all their sessions have ended"))
                }
                _ if me.user.is_empty() => {
                    Err(Failure::new(format!("{} has no password", me.actor), "name a user: keepwall user passwd NAME"))
                }
                _ => {
                    let current = secret::password("Password that holds now: ")?;
                    let new = secret::new_password("New password (12 characters or more): ")?;
                    client.change_password(&PasswordChange { current, new })?;
                    done(json, "your password is changed")
                }
            }
        }
        User::Role { name, roles } => {
            let change = UserChange { bindings: Some(roles.clone()), ..UserChange::default() };
            client.change_user(name, &change, None)?;
            done(json, &format!("{name} may now: {}", bindings(roles)))
        }
        User::Disable { name, undo } => {
            let change = UserChange { disabled: Some(!undo), ..UserChange::default() };
            client.change_user(name, &change, None)?;
            let word =
                if *undo { "may log in again" } else { "is shut out: no session and no key of theirs is accepted" };
            done(json, &format!("{name} {word}"))
        }
        User::Totp(Totp::Enable) => enable_totp(server, json),
        User::Totp(Totp::Disable) => {
            let code = keepwall_api::Secret(secret::line("Code of your authenticator: ")?);
            client.remove_totp(&TotpCode { code })?;
            done(json, "you are asked for no codes any more")
        }
        User::Totp(Totp::Forget { name }) => {
            let change = UserChange { forget_totp: Some(true), ..UserChange::default() };
            client.change_user(name, &change, None)?;
            done(json, &format!("{name} logs in without a code, until they set up another authenticator"))
        }
    }
}

fn enable_totp(server: &Server, json: bool) -> Result<u8, Failure> {
    let made = server.client.enrol_totp(&TotpEnrol { password: secret::password("Password: ")? })?;
    ui::say("Add this to your authenticator app. It is shown this once:");
    ui::out(format!("  secret {}", made.secret.0));
    ui::out(format!("  url    {}", made.url.0));
    let code = keepwall_api::Secret(secret::line("The code that it shows: ")?);
    server.client.verify_totp(&TotpCode { code })?;
    done(json, "you are asked for a code when you log in from now on")
}

fn show(json: bool, users: &[UserView], none: &str) -> Result<u8, Failure> {
    if json {
        ui::json(&users);
        return Ok(0);
    }
    if users.is_empty() {
        ui::out(none);
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = (users.iter())
        .map(|user| {
            let state = if user.disabled { ui::red("shut out") } else { ui::green("active") };
            let kind = format!("{:?}", user.kind).to_lowercase();
            let codes = if user.totp { "yes" } else { "no" };
            vec![user.name.clone(), state, kind, codes.into(), bindings(&user.bindings), time::when(&user.created)]
        })
        .collect();
    ui::table(&["Name", "State", "Kind", "Codes", "May", "Made"], &rows);
    Ok(0)
}

pub fn service_account(context: &Context, server: &Server, command: &ServiceAccount) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        ServiceAccount::List => {
            let all = pages(usize::MAX, |cursor, limit| {
                let query = ListServiceAccountsQuery { cursor, limit };
                client.list_service_accounts(&query).map(|page| (page.items, page.next))
            })?;
            show(json, &all, "There are no service accounts: keepwall service-account add NAME --role operator")
        }
        ServiceAccount::Add { name, roles } => {
            client.create_service_account(&NewServiceAccount { name: name.clone(), bindings: roles.clone() })?;
            if !json {
                ui::say(format!("It gets in by a key: keepwall key create --owner {name}"));
            }
            done(json, &format!("{name} is made, and may: {}", bindings(roles)))
        }
        ServiceAccount::Role { name, roles } => {
            let change = ServiceAccountChange { bindings: Some(roles.clone()), ..ServiceAccountChange::default() };
            client.change_service_account(name, &change, None)?;
            done(json, &format!("{name} may now: {}", bindings(roles)))
        }
        ServiceAccount::Remove(one) => {
            if !agreed(&format!("Remove {} with all its keys?", one.name), one.yes)? {
                return Ok(1);
            }
            client.delete_service_account(&one.name, None)?;
            done(json, &format!("{} is gone", one.name))
        }
    }
}

pub fn key(context: &Context, server: &Server, command: &Key) -> Result<u8, Failure> {
    let (client, json) = (&server.client, context.global.json);
    match command {
        Key::List { all } => {
            let all = all.then_some(true);
            let keys = pages(usize::MAX, |cursor, limit| {
                client.list_api_keys(&ListApiKeysQuery { all, cursor, limit }).map(|page| (page.items, page.next))
            })?;
            if json {
                ui::json(&keys);
                return Ok(0);
            }
            if keys.is_empty() {
                ui::out("There are no keys: keepwall key create");
                return Ok(0);
            }
            let rows: Vec<Vec<String>> = (keys.into_iter())
                .map(|key| {
                    let may = key.bindings.as_deref().map_or("all that its owner may".into(), bindings);
                    let used = key.last_used.as_deref().map_or("never".into(), time::when);
                    vec![key.id, key.owner, may, used, time::when(&key.expires), ui::dim(&key.note)]
                })
                .collect();
            ui::table(&["Key", "Owner", "May", "Used", "Ends", "For"], &rows);
            Ok(0)
        }
        Key::Create { owner, note, ttl, roles } => {
            let bindings = (!roles.is_empty()).then(|| roles.clone());
            let body = NewKey { owner: owner.clone(), note: note.clone(), ttl_s: Some(*ttl), bindings };
            let made = client.create_api_key(&body)?;
            if json {
                ui::json(&made);
                return Ok(0);
            }
            ui::out(&made.key.0);
            ui::say(format!("This is key {}; it is shown this once, and ends {}.", made.id, time::when(&made.expires)));
            ui::say("Use it as KEEPWALL_TOKEN, or with keepwall login --token-stdin.");
            Ok(0)
        }
        Key::Delete { id } => {
            client.delete_api_key(id, None)?;
            done(json, &format!("key {id} is good for nothing any more"))
        }
    }
}
