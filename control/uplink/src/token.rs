//! An enrolment token: server, its authority and a secret, in one word.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// What a token says.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// `host:port`
    pub server: String,
    /// SHA-256 of the authority's certificate.
    pub authority: [u8; 32],
    /// What lets the machine in, once.
    pub secret: String,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("server", &self.server).finish_non_exhaustive()
    }
}

/// The longest token.
const BYTES_MAX: usize = 1_024;

impl std::str::FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let wrong = || {
            "this is no enrolment token: it begins with `kw1.` and is one long word, without spaces or \
                        line breaks; copy it whole from `keepwall token create`"
                .to_owned()
        };
        let word = text.trim().strip_prefix("kw1.").filter(|word| word.len() <= BYTES_MAX).ok_or_else(wrong)?;
        let bytes = URL_SAFE_NO_PAD.decode(word).map_err(|_| wrong())?;
        let text = String::from_utf8(bytes).map_err(|_| wrong())?;
        let mut lines = text.lines();
        let (server, digest, secret) = (lines.next(), lines.next(), lines.next());
        let (Some(server), Some(digest), Some(secret)) = (server, digest, secret) else { return Err(wrong()) };
        crate::dial::host_and_port(server)?;
        Ok(Token {
            server: server.to_owned(),
            authority: keepwall_core::unhex(digest).ok_or_else(wrong)?,
            secret: secret.to_owned(),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_whole_or_refused_in_words() {
        let lines = format!("[fd00::1]:7443\n{}\net-1.AAEC\nsha256//x", "ab".repeat(32));
        let token: Token = format!("kw1.{}\n", URL_SAFE_NO_PAD.encode(&lines)).parse().unwrap();
        assert_eq!((token.server.as_str(), token.secret.as_str()), ("[fd00::1]:7443", "et-1.AAEC"));
        assert!(!format!("{token:?}").contains("AAEC"), "a secret in a log");
        for wrong in ["", "kw1.", "kw1.!!!", "et-1.AAEC", &URL_SAFE_NO_PAD.encode(&lines)] {
            assert!(wrong.parse::<Token>().unwrap_err().contains("kw1."), "{wrong}");
        }
    }
}
