-- One row; what the audit log's head and the newest commit are.
CREATE TABLE state (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    generation INTEGER NOT NULL,
    changes INTEGER NOT NULL,
    -- Changes of commits up to this one may be forgotten.
    changes_gone INTEGER NOT NULL,
    audit_number INTEGER NOT NULL,
    audit_mac TEXT NOT NULL,
    audit_seal TEXT NOT NULL
) STRICT;

CREATE TABLE resources (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    revision INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (kind, name)
) STRICT;

-- Versions before the present one.
CREATE TABLE history (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    revision INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (kind, name, revision)
) STRICT;

CREATE TABLE changes (
    number INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    deleted INTEGER NOT NULL
) STRICT;
CREATE INDEX changes_by_generation ON changes (generation);

CREATE TABLE audit (
    number INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL,
    entry TEXT NOT NULL,
    mac TEXT NOT NULL
) STRICT;

-- Answers to idempotent requests.
CREATE TABLE remembered (
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    digest BLOB NOT NULL,
    answer TEXT NOT NULL,
    expires_ms INTEGER NOT NULL,
    UNIQUE (scope, key)
) STRICT;
CREATE INDEX remembered_by_expiry ON remembered (expires_ms);
