//! The OpenAPI 3.1 document, made from [`operations`] and the types of this crate.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::BASE;
use crate::operations::{Body, Gives, IDEMPOTENCY_KEY_MAX, Match, Operation, Param, ParamKind, Right, operations};
use crate::problem::{CODES, MEDIA_TYPE, Problem};

/// The document. The same for the same source: keys are sorted.
#[must_use]
pub fn document() -> Value {
    let mut schemas: BTreeMap<String, Value> = BTreeMap::new();
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    collect(&mut schemas, &crate::operations::body::<Problem>());
    for one in operations() {
        one.body.iter().for_each(|body| collect(&mut schemas, body));
        if let Gives::One(body) = &one.gives {
            collect(&mut schemas, body);
        }
        let path = paths.entry(format!("{BASE}{}", one.path)).or_default();
        path.insert(one.method.to_lowercase(), operation(&one));
    }
    let refused = operations().into_iter().flat_map(|one| one.statuses()).filter(|status| *status >= 400);
    let responses: BTreeMap<String, Value> =
        refused.map(|status| (format!("Problem{status}"), refusal(status))).collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Keepwall",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Security groups for machines: declare a posture, roll it out, watch it. Every refusal is \
                            application/problem+json with a stable `code`.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/", "description": "The server that serves this document." }],
        "security": [{ "bearer": [] }],
        "paths": paths,
        "components": {
            "responses": responses,
            "schemas": schemas,
            "securitySchemes": { "bearer": {
                "type": "http", "scheme": "bearer",
                "description": "A session's token, or an API key. There are no cookies.",
            } },
        },
    })
}

/// The document as it is committed.
#[must_use]
pub fn text() -> String {
    // Our own document is JSON.
    format!("{:#}\n", document())
}

fn collect(schemas: &mut BTreeMap<String, Value>, body: &Body) {
    for (name, schema) in (body.schemas)() {
        let mut schema = serde_json::to_value(&schema).unwrap_or_default();
        widen(&mut schema);
        schemas.insert(name, schema);
    }
}

/// Counters reach beyond what `int64` holds by its name in some tools; they are plain integers here.
fn widen(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            let integer = fields.get("type").is_some_and(|kind| kind == "integer" || kind[0] == "integer");
            if integer {
                fields.remove("format");
            }
            fields.values_mut().for_each(widen);
        }
        Value::Array(items) => items.iter_mut().for_each(widen),
        _ => {}
    }
}

fn operation(one: &Operation) -> Value {
    let mut parameters: Vec<Value> = one.path_params().map(path_param).collect();
    parameters.extend(one.query.iter().map(query_param));
    if one.idempotent {
        parameters.push(json!({
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "The same key with the same request is done once, for a day.",
            "schema": { "type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_MAX, "pattern": "^[!-~]+$" },
        }));
    }
    if one.if_match != Match::No {
        parameters.push(json!({
            "name": "If-Match", "in": "header", "required": one.if_match == Match::Must,
            "description": "The ETag of what is to be changed.",
            "schema": { "type": "string", "pattern": "^(\\*|\"[0-9]{1,19}\")$" },
        }));
    }
    let responses: BTreeMap<String, Value> =
        one.statuses().into_iter().map(|status| (status.to_string(), response(one, status))).collect();
    let right = match one.right {
        Right::Public => "Needs no credentials.".to_owned(),
        Right::Own => "Needs valid credentials.".to_owned(),
        Right::To(resource, action) => format!("Needs the right `{} {}`.", resource.as_str(), action.as_str()),
    };
    let mut out = json!({
        "operationId": one.id,
        "summary": one.doc,
        "description": right,
        "tags": [one.path.split('/').nth(1).unwrap_or_default()],
        "parameters": parameters,
        "responses": responses,
    });
    if one.right == Right::Public {
        out["security"] = json!([]);
    }
    if let Some(body) = &one.body {
        let schema = json!({ "$ref": reference(body) });
        out["requestBody"] = json!({ "required": true, "content": { "application/json": { "schema": schema } } });
    }
    out
}

fn response(one: &Operation, status: u16) -> Value {
    if status != one.status {
        return json!({ "$ref": format!("#/components/responses/Problem{status}") });
    }
    let mut out = json!({ "description": one.doc });
    let content = match &one.gives {
        Gives::Nothing => None,
        Gives::One(body) => Some(("application/json", json!({ "$ref": reference(body) }))),
        Gives::Json => Some(("application/json", json!({ "type": "object" }))),
        Gives::Live => Some(("text/event-stream", json!({ "type": "string" }))),
    };
    if let Some((media, schema)) = content {
        out["content"] = json!({ media: { "schema": schema } });
    }
    let mut headers = Map::new();
    if one.etag {
        headers.insert("ETag".into(), header("For If-Match.", json!({ "type": "string" })));
    }
    if one.location {
        headers.insert("Location".into(), header("Where it is.", json!({ "type": "string" })));
    }
    if !headers.is_empty() {
        out["headers"] = Value::Object(headers);
    }
    out
}

/// What every operation that is refused with this status answers.
fn refusal(status: u16) -> Value {
    let codes: Vec<&str> = CODES.iter().filter(|code| code.status == status).map(|code| code.code).collect();
    let schema = json!({ "$ref": "#/components/schemas/Problem" });
    let mut out = json!({ "description": format!("Refused: {}.", codes.join(", ")) });
    if status == 431 {
        // A head with too many bytes is refused by the HTTP library, without a body: none can be promised.
        out["description"] = json!(format!("Refused: {}; no body if the head has too many bytes.", codes.join(", ")));
    } else {
        out["content"] = json!({ MEDIA_TYPE: { "schema": schema } });
    }
    if status == 429 || status == 503 {
        out["headers"] = json!({ "Retry-After": header("Seconds to wait.", json!({ "type": "integer" })) });
    }
    out
}

fn header(doc: &str, schema: Value) -> Value {
    json!({ "description": doc, "required": true, "schema": schema })
}

fn reference(body: &Body) -> String {
    format!("#/components/schemas/{}", (body.name)())
}

fn path_param(name: &str) -> Value {
    let schema = match name {
        "revision" => json!({ "type": "integer", "minimum": 0, "maximum": i64::MAX }),
        "index" => json!({ "type": "integer", "minimum": 0, "maximum": 100_000 }),
        "direction" => json!({ "type": "string", "enum": ["ingress", "egress"] }),
        _ => json!({ "type": "string", "minLength": 1, "maxLength": 256 }),
    };
    json!({ "name": name, "in": "path", "required": true, "schema": schema })
}

fn query_param(param: &Param) -> Value {
    let schema = match param.kind {
        ParamKind::Text(max) => json!({ "type": "string", "maxLength": max }),
        ParamKind::Number(min, max) => json!({ "type": "integer", "minimum": min, "maximum": max }),
        ParamKind::Word(words) => json!({ "type": "string", "enum": words }),
        ParamKind::Flag => json!({ "type": "boolean" }),
    };
    json!({ "name": param.name, "in": "query", "required": param.required, "description": param.doc, "schema": schema })
}

#[cfg(test)]
mod tests {
    use super::document;

    #[test]
    fn every_reference_leads_to_a_schema() {
        let document = document();
        let text = document.to_string();
        for part in text.split("\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap_or_default();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }
}
