//! The API's document, and the client that is made from it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::{root, say};

/// Where the document is committed.
const DOCUMENT: &str = "docs/openapi.json";
/// Where the client is committed.
const CLIENT: &str = "control/client/src/generated.rs";

/// `cargo xtask openapi [--check]`
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let check = match args {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err("it takes nothing, or --check".into()),
    };
    let document = keepwall_api::openapi::document();
    let client = formatted(&client(&document))?;
    for (place, text) in [(DOCUMENT, keepwall_api::openapi::text()), (CLIENT, client)] {
        let path = root().join(place);
        if std::fs::read_to_string(&path).is_ok_and(|there| there == text) {
            continue;
        }
        if check {
            return Err(format!("{place} is not what control/api says: run `cargo xtask openapi` and read the diff"));
        }
        std::fs::write(&path, text).map_err(|error| format!("{place}: {error}"))?;
        say(format!("wrote {place}"));
    }
    Ok(())
}

/// As `cargo fmt` would leave it, so that it does not differ after the next one.
fn formatted(source: &str) -> Result<String, String> {
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(root().join("rustfmt.toml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start rustfmt: {error}"))?;
    // Its input is read whole before anything is written, so neither side waits for the other.
    child.stdin.take().map(|mut stdin| stdin.write_all(source.as_bytes()));
    let out = child.wait_with_output().map_err(|error| format!("rustfmt: {error}"))?;
    if !out.status.success() {
        return Err("rustfmt does not take the generated client".into());
    }
    String::from_utf8(out.stdout).map_err(|error| format!("rustfmt: {error}"))
}

/// The client's source.
fn client(document: &Value) -> String {
    let mut structs = String::new();
    let mut methods = String::new();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let (query, call) = method_of(path, method, operation);
            structs.push_str(&query);
            methods.push_str(&call);
        }
    }
    format!(
        "//! Made from docs/openapi.json by `cargo xtask openapi`; changes here are lost.\n\n\
         #![allow(clippy::too_many_arguments, reason = \"as many as the operation has\")]\n\n\
         use crate::{{Client, Error, Live, Request, Tagged, segment}};\n\n{structs}impl Client {{\n{methods}}}\n"
    )
}

/// The struct of an operation's query, and its method.
fn method_of(path: &str, method: &str, operation: &Value) -> (String, String) {
    let id = operation["operationId"].as_str().unwrap_or_default();
    let mut arguments = String::from("&self");
    let mut build = format!("let request = Request::new(\"{}\", ", method.to_uppercase());
    let parameters = || operation["parameters"].as_array().into_iter().flatten();
    let of = |place: &'static str| parameters().filter(move |one| one["in"] == place);
    let mut template = path.to_owned();
    let mut segments = String::new();
    for one in of("path") {
        let name = one["name"].as_str().unwrap_or_default();
        let kind = rust_type(&one["schema"]);
        let _ = write!(arguments, ", {name}: {kind}");
        template = template.replace(&format!("{{{name}}}"), "{}");
        let _ = write!(segments, ", segment({name})");
    }
    if segments.is_empty() {
        let _ = write!(build, "{template:?})");
    } else {
        let _ = write!(build, "format!({template:?}{segments}))");
    }
    let query: Vec<&Value> = of("query").collect();
    let name = format!("{}Query", camel(id));
    if !query.is_empty() {
        let _ = write!(arguments, ", query: &{name}");
        build.push_str(".query(query.pairs())");
    }
    if let Some(schema) = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str() {
        let _ = write!(arguments, ", body: &keepwall_api::{}", last(schema));
        build.push_str(".body(body)");
    }
    for one in of("header") {
        match (one["name"].as_str().unwrap_or_default(), one["required"] == true) {
            ("If-Match", true) => {
                arguments.push_str(", if_match: u64");
                build.push_str(".if_match(Some(if_match))");
            }
            ("If-Match", false) => {
                arguments.push_str(", if_match: Option<u64>");
                build.push_str(".if_match(if_match)");
            }
            ("Idempotency-Key", _) => build.push_str(".once()"),
            _ => {}
        }
    }
    let responses = operation["responses"].as_object().into_iter().flatten();
    let success = responses.filter(|(status, _)| status.starts_with('2')).map(|(_, answer)| answer).next();
    let success = success.cloned().unwrap_or_default();
    let tagged = !success["headers"]["ETag"].is_null();
    let (result, send) = match &success["content"] {
        Value::Null => ("()".to_owned(), "nothing"),
        content if !content["text/event-stream"].is_null() => ("Live<'_>".to_owned(), "stream"),
        content => match content["application/json"]["schema"]["$ref"].as_str() {
            Some(schema) if tagged => (format!("Tagged<keepwall_api::{}>", last(schema)), "tagged"),
            Some(schema) => (format!("keepwall_api::{}", last(schema)), "json"),
            None => ("serde_json::Value".to_owned(), "json"),
        },
    };
    let doc = operation["summary"].as_str().unwrap_or_default();
    let right = operation["description"].as_str().unwrap_or_default();
    let call = format!(
        "/// {doc} {right}\n///\n/// # Errors\n/// The server refused, with a code; or it could not be reached.\n\
         pub fn {id}({arguments}) -> Result<{result}, Error> {{\n{build};\nself.{send}(request)\n}}\n\n"
    );
    (if query.is_empty() { String::new() } else { query_struct(&name, id, &query) }, call)
}

fn query_struct(name: &str, id: &str, query: &[&Value]) -> String {
    let mut fields = String::new();
    let mut pairs = String::new();
    for one in query {
        let field = one["name"].as_str().unwrap_or_default();
        let kind = match one["schema"]["type"].as_str() {
            Some("integer") => "u64",
            Some("boolean") => "bool",
            _ => "String",
        };
        let doc = one["description"].as_str().unwrap_or_default();
        if one["required"] == true {
            let _ = writeln!(fields, "/// {doc}\npub {field}: {kind},");
            let _ = writeln!(pairs, "out.push((\"{field}\", self.{field}.to_string()));");
        } else {
            let _ = writeln!(fields, "/// {doc}\npub {field}: Option<{kind}>,");
            let _ = writeln!(pairs, "out.extend(self.{field}.as_ref().map(|value| (\"{field}\", value.to_string())));");
        }
    }
    format!(
        "/// What `{id}` may be asked.\n#[derive(Clone, Debug, Default, PartialEq, Eq)]\npub struct {name} {{\n{fields}}}\n\n\
         impl {name} {{\nfn pairs(&self) -> Vec<(&'static str, String)> {{\nlet mut out = Vec::new();\n{pairs}out\n}}\n}}\n\n"
    )
}

fn rust_type(schema: &Value) -> &'static str {
    if schema["type"] == "integer" { "u64" } else { "&str" }
}

fn last(reference: &str) -> &str {
    reference.rsplit('/').next().unwrap_or(reference)
}

fn camel(id: &str) -> String {
    id.split('_')
        .flat_map(|word| {
            let mut letters = word.chars();
            letters.next().map(|first| first.to_uppercase().chain(letters).collect::<String>())
        })
        .collect()
}
