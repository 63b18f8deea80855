//! JSON, in the shape of `DescribeSecurityGroupAttribute`.

use keepwall_secgroup::spec::Group;
use serde_json::{Map, Value, json};

use super::row::{self, Row};
use super::{IMPORT_BYTES_MAX, IMPORT_RULES_MAX, ImportError, Imported, read_rows, singles};

/// A group's rules as JSON that [`from_json`] and the cloud's console read.
#[must_use]
pub fn to_json(group: &Group) -> String {
    let rules: Vec<Value> = singles(group)
        .iter()
        .map(|(direction, rule)| {
            let row = row::write(*direction, rule);
            Value::Object(row.into_iter().map(|(field, text)| (field.to_owned(), Value::String(text))).collect())
        })
        .collect();
    let document = json!({
        "SecurityGroupName": group.name,
        "Description": group.description,
        "Permissions": { "Permission": rules },
    });
    // A `Value` has only text keys and finite numbers, so writing it cannot fail.
    format!("{document:#}\n")
}

/// Reads rules: the shape that [`to_json`] writes, or just the list of permissions.
///
/// # Errors
/// Everything that is wrong, at most [`super::IMPORT_ERRORS_MAX`].
pub fn from_json(text: &str) -> Imported {
    if text.len() > IMPORT_BYTES_MAX {
        return Err(ImportError::file(format!("the file is larger than {IMPORT_BYTES_MAX} bytes")));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let document: Value =
        serde_json::from_str(text).map_err(|error| ImportError::file(format!("this is not valid JSON: {error}")))?;
    let list = match &document {
        Value::Object(fields) => match fields.get("Permissions") {
            Some(Value::Object(inner)) => inner.get("Permission"),
            other => other,
        },
        other => Some(other),
    };
    let Some(Value::Array(list)) = list else {
        return Err(ImportError::file("expected a list of rules, or `Permissions` with `Permission` in it"));
    };
    let mut errors = Vec::new();
    let mut rows = Vec::new();
    // One more than allowed is enough to know that there are too many.
    for (index, item) in list.iter().take(IMPORT_RULES_MAX + 1).enumerate() {
        match item {
            Value::Object(fields) => rows.push((index + 1, fields_of(index + 1, fields, &mut errors))),
            _ => errors.push(ImportError::new(index + 1, "", "expected an object with the fields of a rule")),
        }
    }
    errors.truncate(super::IMPORT_ERRORS_MAX);
    if errors.is_empty() { read_rows(rows) } else { Err(errors) }
}

fn fields_of(number: usize, fields: &Map<String, Value>, errors: &mut Vec<ImportError>) -> Row {
    let mut row = Row::new();
    for (name, value) in fields {
        let column = match row::column(name) {
            Ok(Some(column)) => column,
            Ok(None) => continue,
            Err(message) => {
                errors.push(ImportError::new(number, name, message));
                continue;
            }
        };
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            Value::Null => continue,
            _ => {
                errors.push(ImportError::new(number, column, "expected a text or a number"));
                continue;
            }
        };
        if !text.is_empty() && row.insert(column, text).is_some() {
            errors.push(ImportError::new(number, column, "the field is given twice"));
        }
    }
    row
}
