//! Health, readiness and metrics on a listener of their own: numbers, no names, no secrets.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::fleet::Fleet;

/// Questions at once.
const CONNECTIONS_MAX: usize = 32;
/// How long a head may take.
const HEAD: Duration = Duration::from_secs(10);
/// How long the store may take to say that it is there.
const READY: Duration = Duration::from_secs(3);

/// Serves until told to stop.
pub async fn serve(fleet: Arc<Fleet>, listener: TcpListener, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let Ok((tcp, address)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let fleet = Arc::clone(&fleet);
        tokio::spawn(async move {
            let _place = place;
            let service = hyper::service::service_fn(move |request| {
                let fleet = Arc::clone(&fleet);
                async move { Ok::<_, std::convert::Infallible>(answer(&fleet, &request).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(tcp), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%address, %error, "a question about health broke off");
            }
        });
    }
}

async fn answer<B>(fleet: &Fleet, request: &Request<B>) -> Response<Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => (StatusCode::OK, "ok\n".to_owned()),
        (&Method::GET, "/readyz") => match ready(fleet).await {
            Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        (&Method::GET, "/metrics") => (StatusCode::OK, text(fleet).await),
        _ => (StatusCode::NOT_FOUND, "here are /healthz, /readyz and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

async fn ready(fleet: &Fleet) -> Result<(), String> {
    match tokio::time::timeout(READY, fleet.store().ready()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the store does not answer".into()),
    }
}

/// The Prometheus text format.
async fn text(fleet: &Fleet) -> String {
    let count = fleet.count();
    let up = u8::from(ready(fleet).await.is_ok());
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, value: f64| {
        let _ = writeln!(out, "# HELP keepwall_{name} {help}\n# TYPE keepwall_{name} gauge\nkeepwall_{name} {value}");
    };
    gauge("store_up", "1 if a commit would go through now.", f64::from(up));
    gauge("streams", "Streams of instances that are open at this server.", fleet.streams() as f64);
    gauge("instances", "Instances that have enrolled.", count.instances as f64);
    gauge("instances_connected", "Instances whose stream is open at any server.", count.connected as f64);
    gauge("instances_in_sync", "Instances that hold what they should.", count.in_sync as f64);
    gauge("instances_failed", "Instances that did not take what they were told.", count.failed as f64);
    gauge("instances_drifted", "Instances whose kernel differs from what it should hold.", count.drifted as f64);
    gauge("generation", "The newest commit that this server has heard of.", count.generation as f64);
    gauge("rollout_active", "1 while a rollout is on its way or stopped.", f64::from(u8::from(count.rollout)));
    out
}
