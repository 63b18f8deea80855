//! Login at an identity provider: OpenID Connect, code flow with PKCE.
//!
//! The server keeps nothing between the two halves. What it must remember (verifier, nonce, state) goes to the client
//! sealed; whoever finishes has to show it, so that a code slipped to somebody else's browser logs nobody in. A
//! finished flow is written down until it would have expired: it works once, at whichever server.
//!
//! What somebody may is mapped from one claim at each login, and nothing else of the provider's word is kept.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use keepwall_api::{OidcFinish, OidcStarted, Secret, SessionMade, UserKind};
use keepwall_fleet::access::{Binding, Labels, Role};
use keepwall_store::{Expect, Op, StoreError};
use openidconnect::core::{CoreAuthenticationFlow, CoreClient, CoreJwsSigningAlgorithm, CoreProviderMetadata};
use openidconnect::{
    AuthorizationCode, ClaimsVerificationError, ClientId, ClientSecret, CsrfToken, HttpRequest, HttpResponse,
    IssuerUrl, Nonce, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, Scope, TokenResponse as _,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::users::{self, Stored};
use super::{Auth, AuthError, hash};
use crate::fleet::{Act, rfc3339};

/// Finished flows in the store.
pub const KIND: &str = "oidc-flow";
/// How long somebody may take at the provider, milliseconds.
const FLOW_MS: u64 = 600_000;
/// How long the provider's description and keys are believed, milliseconds.
const DISCOVERY_MS: u64 = 300_000;
/// A signature by an unknown key makes us look for new keys, but not more often than this, milliseconds: a stranger
/// sends such signatures as fast as he likes.
const REFRESH_MS: u64 = 30_000;
/// One answer of the provider, bytes.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// One question to the provider, with all of its steps.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// What flows are sealed for.
const PURPOSE: &str = "oidc-flow";

/// An identity provider.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OidcConfig {
    /// `https://id.example.org/realm`. Plain HTTP is for loopback only.
    pub issuer: String,
    /// What the provider calls us.
    pub client_id: String,
    /// If the provider wants one besides PKCE.
    #[serde(default)]
    pub client_secret: Option<Secret>,
    /// Where the provider sends the browser back to.
    pub redirect_url: String,
    /// Asked for besides `openid`. Default: `profile`, `groups`.
    #[serde(default = "scopes")]
    pub scopes: Vec<String>,
    /// The claim that roles come from: a text or a list of texts. Default: `groups`.
    #[serde(default = "groups")]
    pub claim: String,
    /// Which value of the claim is which role. Who has none of them is not let in.
    pub roles: Vec<RoleOf>,
    /// Certificate authorities of the provider, PEM.
    #[serde(default)]
    pub ca_pem: String,
}

fn scopes() -> Vec<String> {
    vec!["profile".into(), "groups".into()]
}

fn groups() -> String {
    "groups".into()
}

/// A value of the claim, and what it is worth.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleOf {
    /// `keepwall-admins`.
    pub value: String,
    /// The role.
    pub role: Role,
    /// Where it holds; empty means everywhere.
    #[serde(default)]
    pub scope: Labels,
}

/// What the client carries between the halves, sealed.
#[derive(Serialize, Deserialize)]
struct Flow {
    state: String,
    nonce: String,
    verifier: String,
    expires_ms: u64,
}

/// What a claim says, once it is verified.
struct Vouched {
    issuer: String,
    subject: String,
    claims: Value,
}

/// The provider as we see it.
pub struct Oidc {
    settings: OidcConfig,
    tls: Arc<rustls::ClientConfig>,
    /// When it was fetched, and what; one fetches at a time.
    known: Mutex<Option<(u64, CoreProviderMetadata)>>,
}

impl fmt::Debug for Oidc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Oidc").field(&self.settings.issuer).finish()
    }
}

#[derive(Debug)]
struct Unreachable(String);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreachable {}

fn provider(error: impl fmt::Display) -> AuthError {
    AuthError::Provider(error.to_string())
}

impl Oidc {
    pub(super) fn new(settings: OidcConfig) -> Result<Oidc, String> {
        let issuer: http::Uri = settings.issuer.parse().map_err(|_| format!("`{}` is no URL", settings.issuer))?;
        let loopback = matches!(issuer.host(), Some("127.0.0.1" | "[::1]" | "localhost"));
        if issuer.scheme_str() != Some("https") && !(issuer.scheme_str() == Some("http") && loopback) {
            return Err(format!("the issuer `{}` must be an https:// URL", settings.issuer));
        }
        RedirectUrl::new(settings.redirect_url.clone())
            .map_err(|_| format!("the redirect URL `{}` is none", settings.redirect_url))?;
        if settings.roles.is_empty() {
            return Err("no value of the claim has a role, so nobody could log in: add `roles`".into());
        }
        let mut roots = rustls::RootCertStore::empty();
        for one in CertificateDer::pem_slice_iter(settings.ca_pem.as_bytes()) {
            let one = one.map_err(|error| format!("the provider's certificate authorities are no PEM: {error}"))?;
            // A bundle of a distribution may hold one that this library does not take; the others still count.
            roots.add(one).ok();
        }
        let crypto = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(crypto)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Oidc { settings, tls: Arc::new(config), known: Mutex::new(None) })
    }

    async fn metadata(&self, now_ms: u64, older_than_ms: u64) -> Result<CoreProviderMetadata, AuthError> {
        let mut known = self.known.lock().await;
        if let Some((at, metadata)) = known.as_ref()
            && now_ms < at + older_than_ms
        {
            return Ok(metadata.clone());
        }
        let issuer = IssuerUrl::new(self.settings.issuer.clone()).map_err(provider)?;
        let metadata = CoreProviderMetadata::discover_async(issuer, &|request| self.ask(request)).await;
        let metadata = metadata.map_err(|error| provider(chain(&error)))?;
        *known = Some((now_ms, metadata.clone()));
        Ok(metadata)
    }

    fn redirect(&self) -> Result<RedirectUrl, AuthError> {
        RedirectUrl::new(self.settings.redirect_url.clone()).map_err(provider)
    }

    fn secret(&self) -> Option<ClientSecret> {
        self.settings.client_secret.clone().map(|secret| ClientSecret::new(secret.0))
    }

    /// The URL for the browser, and what to remember.
    async fn begin(&self, now_ms: u64) -> Result<(String, Flow), AuthError> {
        let metadata = self.metadata(now_ms, DISCOVERY_MS).await?;
        let id = ClientId::new(self.settings.client_id.clone());
        let client = CoreClient::from_provider_metadata(metadata, id, self.secret()).set_redirect_uri(self.redirect()?);
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let mut request =
            client.authorize_url(CoreAuthenticationFlow::AuthorizationCode, CsrfToken::new_random, Nonce::new_random);
        for scope in &self.settings.scopes {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        let (url, state, nonce) = request.set_pkce_challenge(challenge).url();
        let flow = Flow {
            state: state.secret().clone(),
            nonce: nonce.secret().clone(),
            verifier: verifier.secret().clone(),
            expires_ms: now_ms + FLOW_MS,
        };
        Ok((url.into(), flow))
    }

    /// Gives the code to the provider, and verifies what comes back.
    async fn end(&self, flow: &Flow, code: &str, now_ms: u64) -> Result<Vouched, AuthError> {
        let metadata = self.metadata(now_ms, DISCOVERY_MS).await?;
        let id = ClientId::new(self.settings.client_id.clone());
        let client =
            CoreClient::from_provider_metadata(metadata, id.clone(), self.secret()).set_redirect_uri(self.redirect()?);
        let exchange = client.exchange_code(AuthorizationCode::new(code.to_owned())).map_err(provider)?;
        let verifier = PkceCodeVerifier::new(flow.verifier.clone());
        let http = |request| self.ask(request);
        let answer = exchange.set_pkce_verifier(verifier).request_async(&http).await;
        let answer = answer.map_err(|error| match error {
            // The provider's word that the code is wrong, used or too old.
            openidconnect::RequestTokenError::ServerResponse(_) => AuthError::Failed,
            other => provider(chain(&other)),
        })?;
        let token = answer.id_token().ok_or_else(|| provider("the provider sent no ID token"))?;
        // Signatures that only the provider can make: no `none`, and no HMAC, whose key would be our own secret.
        let algorithms = [
            CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
            CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
            CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
            CoreJwsSigningAlgorithm::RsaSsaPssSha256,
            CoreJwsSigningAlgorithm::EcdsaP256Sha256,
            CoreJwsSigningAlgorithm::EcdsaP384Sha384,
            CoreJwsSigningAlgorithm::EdDsa,
        ];
        let nonce = Nonce::new(flow.nonce.clone());
        let verifier = client.id_token_verifier().set_allowed_algs(algorithms.clone());
        let claims = match token.claims(&verifier, &nonce) {
            Err(ClaimsVerificationError::SignatureVerification(_)) => {
                // The provider may have new keys.
                let metadata = self.metadata(now_ms, REFRESH_MS).await?;
                let client = CoreClient::from_provider_metadata(metadata, id, self.secret());
                let verifier = client.id_token_verifier().set_allowed_algs(algorithms);
                token.claims(&verifier, &nonce).cloned()
            }
            other => other.cloned(),
        };
        let claims = claims.map_err(|_| AuthError::Failed)?;
        // Verified just now; read once more for the claim that the settings name.
        let text = token.to_string();
        let payload = text.split('.').nth(1).and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
        let payload = payload.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok(Vouched {
            issuer: claims.issuer().as_str().to_owned(),
            subject: claims.subject().as_str().to_owned(),
            claims: payload.ok_or(AuthError::Failed)?,
        })
    }

    fn roles(&self, claims: &Value) -> Vec<Binding> {
        let claim = &claims[&self.settings.claim];
        let has = |value: &str| match claim {
            Value::String(one) => one == value,
            Value::Array(many) => many.iter().any(|one| one == value),
            _ => false,
        };
        let roles = self.settings.roles.iter().filter(|role| has(&role.value));
        roles.map(|role| Binding { role: role.role, scope: role.scope.clone() }).collect()
    }

    /// One request, one connection, no redirect.
    fn ask(&self, request: HttpRequest) -> impl Future<Output = Result<HttpResponse, Unreachable>> + Send + use<> {
        let tls = Arc::clone(&self.tls);
        async move {
            let asked = tokio::time::timeout(ANSWER_WITHIN, ask(tls, request)).await;
            asked.unwrap_or_else(|_| Err(Unreachable("the provider did not answer in time".into())))
        }
    }
}

async fn ask(tls: Arc<rustls::ClientConfig>, request: HttpRequest) -> Result<HttpResponse, Unreachable> {
    fn failed(error: impl std::error::Error) -> Unreachable {
        Unreachable(chain(&error))
    }
    let (mut parts, body) = request.into_parts();
    let secure = parts.uri.scheme_str() == Some("https");
    let host = parts.uri.host().ok_or_else(|| Unreachable("the provider's URL has no host".into()))?.to_owned();
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    if !secure && !matches!(name.as_str(), "127.0.0.1" | "::1" | "localhost") {
        return Err(Unreachable(format!("{host} is asked without TLS")));
    }
    let port = parts.uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let authority = parts.uri.authority().map(ToString::to_string).unwrap_or(host);
    let stream = TcpStream::connect((name.as_str(), port)).await.map_err(failed)?;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    parts.uri = path.parse().map_err(failed)?;
    parts.headers.insert(http::header::HOST, authority.parse().map_err(failed)?);
    let request = http::Request::from_parts(parts, Full::new(Bytes::from(body)));
    let answer = if secure {
        let name = ServerName::try_from(name).map_err(failed)?;
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, stream).await.map_err(failed)?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    };
    let (parts, body) = answer.map_err(failed)?.into_parts();
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| Unreachable(format!("the provider's answer: {error}")))?;
    Ok(http::Response::from_parts(parts, body.to_bytes().to_vec()))
}

async fn exchange<T>(
    io: T,
    request: http::Request<Full<Bytes>>,
) -> Result<http::Response<hyper::body::Incoming>, hyper::Error>
where
    T: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    // Ends with the sender or with the answer's body.
    tokio::spawn(async move { connection.await.ok() });
    sender.send_request(request).await
}

/// An error with all of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut cause = error.source();
    while let Some(one) = cause {
        out.push_str(": ");
        out.push_str(&one.to_string());
        cause = one.source();
    }
    out
}

impl Auth {
    fn provider(&self) -> Result<&Oidc, AuthError> {
        self.oidc.as_ref().ok_or_else(|| AuthError::NotFound("no identity provider is set up here".into()))
    }

    /// Begins a login at the provider.
    ///
    /// # Errors
    /// There is no provider, it does not answer, or this address tries too often.
    pub async fn oidc_start(&self, act: &Act) -> Result<OidcStarted, AuthError> {
        let oidc = self.provider()?;
        let now = self.now_ms();
        let (url, flow) = oidc.begin(now).await?;
        let sealed = self.seal.seal(PURPOSE, json!(flow).to_string().as_bytes());
        tracing::debug!(request = act.request, "a login at the identity provider begins");
        Ok(OidcStarted { url, state: flow.state, flow: Secret(sealed), expires: rfc3339(flow.expires_ms) })
    }

    /// Ends a login at the provider: opens a session.
    ///
    /// # Errors
    /// Anything about it is wrong, was used, or took too long; or the provider's word gives no role.
    pub async fn oidc_finish(&self, finish: &OidcFinish, act: &Act) -> Result<SessionMade, AuthError> {
        let oidc = self.provider()?;
        let now = self.now_ms();
        self.throttle.attempt("", &act.address, now).map_err(AuthError::Throttled)?;
        let flow = self.seal.open(PURPOSE, &finish.flow.0).ok().and_then(|plain| serde_json::from_slice(&plain).ok());
        let flow: Flow = flow.ok_or(AuthError::Failed)?;
        if flow.state != finish.state || now >= flow.expires_ms {
            return Err(AuthError::Failed);
        }
        let used = hash(&flow.state);
        if self.store.get(KIND, &used).await?.is_some() {
            return Err(AuthError::Failed);
        }
        let vouched = oidc.end(&flow, &finish.code.0, now).await?;
        let bindings = oidc.roles(&vouched.claims);
        let name = format!("oidc.{}", &hash(&format!("{}\n{}", vouched.issuer, vouched.subject))[..32]);
        let called = ["preferred_username", "email", "name"].iter().find_map(|key| vouched.claims[*key].as_str());
        let called = called.unwrap_or(&vouched.subject);
        if bindings.is_empty() {
            return Err(AuthError::NoRole(format!("{called} has no role here: {} names none", oidc.settings.claim)));
        }
        let found = self.stored_user(&name).await?;
        let (expect, mut stored) = match found {
            Some((one, stored)) if stored.kind == UserKind::Oidc => (Expect::Revision(one.revision), stored),
            Some(_) => return Err(AuthError::Failed),
            None => {
                let kind = UserKind::Oidc;
                let new = Stored { kind, password: None, totp: None, bindings: Vec::new(), disabled: false, epoch: 0 };
                (Expect::Absent, new)
            }
        };
        if stored.disabled {
            return Err(AuthError::Failed);
        }
        let mut ops = vec![Op::put(KIND, &used, Expect::Absent, &json!({ "expires_ms": flow.expires_ms }))];
        if stored.bindings != bindings || expect == Expect::Absent {
            stored.bindings = bindings;
            ops.push(Op::put(users::KIND, &name, expect, &stored));
        }
        let note = json!({ "called": called, "bindings": stored.bindings });
        let made = self.open(&name, &stored, ops, note, act).await.map_err(|error| match error {
            AuthError::Store(StoreError::Conflict { .. }) => AuthError::Failed,
            other => other,
        })?;
        self.throttle.succeeded("", &act.address);
        Ok(made)
    }
}
