//! Secrets from a person: typed without being shown, or read from standard input.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _, Write as _};

use keepwall_api::Secret;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// Longer than any password or key of ours.
const BYTES_MAX: u64 = 4_096;
/// Ctrl-C, as a terminal sends it when it does not mean a signal.
const INTERRUPT: u8 = 3;

/// A terminal that shows what is typed again, however this ends.
struct Quiet<'t> {
    terminal: &'t File,
    before: Termios,
}

impl Quiet<'_> {
    fn new(terminal: &File) -> std::io::Result<Quiet<'_>> {
        let before = tcgetattr(terminal)?;
        let mut quiet = before.clone();
        // No signals either: one that ends us would leave the terminal so. Ctrl-C ends the line instead.
        quiet.local_modes.remove(LocalModes::ECHO | LocalModes::ISIG);
        quiet.special_codes[SpecialCodeIndex::VEOL] = INTERRUPT;
        tcsetattr(terminal, OptionalActions::Flush, &quiet)?;
        Ok(Quiet { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}

/// Asks at the terminal, whatever standard input is.
fn ask(prompt: &str, shown: bool) -> Result<String, Failure> {
    let nobody = || {
        Failure::new(
            "there is nobody to ask: no terminal",
            "give it on standard input (--password-stdin, --token-stdin), or in KEEPWALL_TOKEN",
        )
    };
    let mut terminal = File::options().read(true).write(true).open("/dev/tty").map_err(|_| nobody())?;
    if !terminal.is_terminal() {
        return Err(nobody());
    }
    terminal.write_all(prompt.as_bytes())?;
    let mut line = Vec::new();
    let quiet = if shown { None } else { Some(Quiet::new(&terminal)?) };
    let mut reader = &terminal;
    let mut byte = [0];
    while reader.read(&mut byte)? == 1 && !matches!(byte[0], b'\n' | INTERRUPT) && (line.len() as u64) < BYTES_MAX {
        line.push(byte[0]);
    }
    if quiet.is_some() {
        let _ = writeln!(reader);
    }
    drop(quiet);
    if byte[0] == INTERRUPT {
        return Err(Failure { code: 130, ..Failure::plain("interrupted; nothing was changed") });
    }
    String::from_utf8(line).map_err(|_| Failure::plain("what was typed is not UTF-8"))
}

/// A line that everybody may see.
pub fn line(prompt: &str) -> Result<String, Failure> {
    ask(prompt, true).map(|text| text.trim().to_owned())
}

pub fn password(prompt: &str) -> Result<Secret, Failure> {
    ask(prompt, false).map(Secret)
}

/// A new password, twice, because nobody sees it.
pub fn new_password(prompt: &str) -> Result<Secret, Failure> {
    let first = password(prompt)?;
    if first != password("The same once more: ")? {
        return Err(Failure::new("the two are not the same; nothing was changed", "try again"));
    }
    Ok(first)
}

/// The one line of standard input.
pub fn from_stdin() -> Result<Secret, Failure> {
    let mut text = String::new();
    std::io::stdin().take(BYTES_MAX).read_to_string(&mut text)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() || text.contains('\n') {
        return Err(Failure::plain("standard input should hold one line, the secret"));
    }
    Ok(Secret(text.to_owned()))
}
