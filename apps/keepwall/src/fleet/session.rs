//! Who is asking: login, logout, whoami.

use keepwall_api::{Login, Secret};

use super::{Server, access, secret};
use crate::Context;
use crate::cli;
use crate::contexts::{Aim, remember};
use crate::failure::Failure;
use crate::{time, ui};

/// Where the token is kept.
fn context_of(aim: &Aim) -> Result<String, Failure> {
    aim.context.clone().ok_or_else(|| {
        Failure::new(
            "there is no context to keep the login in",
            format!("keepwall context add NAME --server {}; or set KEEPWALL_TOKEN to an API key", aim.server),
        )
    })
}

pub fn login(context: &Context, aim: Aim, args: &cli::Login) -> Result<u8, Failure> {
    let name = context_of(&aim)?;
    // With an older token a refusal would speak of that one.
    let server = Server::open(Aim { token: None, ..aim })?;
    let (token, user, expires) = match args.token_stdin {
        true => with_key(server.aim)?,
        false => with_password(&server, args.user.clone())?,
    };
    remember(&name, user.clone(), Some(token))?;
    if context.global.json {
        ui::json(&serde_json::json!({ "context": name, "user": user, "expires": expires }));
        return Ok(0);
    }
    let who = user.unwrap_or_else(|| "the key's owner".into());
    let until = expires.map_or(String::new(), |at| format!("; it ends {} at the latest", time::when(&at)));
    ui::out(format!("{} You are {} at {name}{until}.", ui::green("✓"), ui::bold(&who)));
    Ok(0)
}

type Proof = (Secret, Option<String>, Option<String>);

/// A key is tried before it is kept.
fn with_key(aim: Aim) -> Result<Proof, Failure> {
    let token = secret::from_stdin()?;
    let server = Server::open(Aim { token: Some(token.clone()), ..aim })?;
    let me = server.client.me()?;
    Ok((token, Some(me.user).filter(|user| !user.is_empty()), me.expires))
}

fn with_password(server: &Server, user: Option<String>) -> Result<Proof, Failure> {
    let user = match user {
        Some(user) => user,
        None => secret::line(&format!("User at {}: ", server.label()))?,
    };
    let password = secret::password("Password: ")?;
    let mut login = Login { user, password, code: None };
    let made = match server.client.login(&login) {
        // The server does not say whether it was the code that lacked.
        Err(error) if error.code() == Some("login_failed") => {
            let code = secret::line("Code of your authenticator (Enter if you have none): ")?;
            if code.is_empty() {
                return Err(error.into());
            }
            login.code = Some(Secret(code));
            server.client.login(&login)?
        }
        made => made?,
    };
    Ok((made.token, Some(made.user), Some(made.expires)))
}

pub fn logout(context: &Context, aim: Aim) -> Result<u8, Failure> {
    let name = context_of(&aim)?;
    if aim.token.is_none() {
        return super::done(context.global.json, &format!("nobody was logged in at {name}"));
    }
    let ended = Server::open(aim)?.client.logout();
    remember(&name, None, None)?;
    match ended {
        Ok(()) => super::done(context.global.json, &format!("the session at {name} has ended")),
        Err(error) if matches!(error.code(), Some("unauthenticated")) => {
            super::done(context.global.json, &format!("the session at {name} had ended already"))
        }
        Err(error) if matches!(error.code(), Some("wrong_state")) => {
            super::done(context.global.json, "the key is forgotten here; it stays good (keepwall key delete ID)")
        }
        Err(error) => Err(Failure::new(
            format!("the token is forgotten here, but the server was not told: {error}"),
            "the session ends by itself, an hour after its last use",
        )),
    }
}

pub fn whoami(context: &Context, server: &Server) -> Result<u8, Failure> {
    let me = server.client.me()?;
    if context.global.json {
        ui::json(&me);
        return Ok(0);
    }
    let who = if me.user.is_empty() { me.actor.clone() } else { me.user.clone() };
    ui::out(format!("{} at {} ({})", ui::bold(&who), server.label(), server.aim.server));
    ui::out(format!("  by         {}", me.actor));
    ui::out(format!("  may        {}", access::bindings(&me.bindings)));
    if let Some(narrowed) = &me.narrowed {
        ui::out(format!("  the key to {}", access::bindings(narrowed)));
    }
    if !me.user.is_empty() {
        ui::out(format!(
            "  codes      {}",
            if me.totp { "asked for at login" } else { "none: keepwall user totp enable" }
        ));
    }
    if let Some(expires) = &me.expires {
        ui::out(format!("  ends       {}", time::date(expires)));
    }
    Ok(0)
}
