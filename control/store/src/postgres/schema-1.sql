-- One row; what the audit log's head and the newest commit are.
CREATE TABLE keepwall.state (
    one boolean PRIMARY KEY CHECK (one),
    generation bigint NOT NULL,
    changes bigint NOT NULL,
    -- Changes of commits up to this one may be forgotten.
    changes_gone bigint NOT NULL,
    audit_number bigint NOT NULL,
    audit_mac text NOT NULL,
    audit_seal text NOT NULL
);

-- The newest batch of each server: tells one whose connection broke while it committed what became of it.
CREATE TABLE keepwall.writers (
    id text PRIMARY KEY,
    batch bigint NOT NULL,
    at timestamptz NOT NULL
);

-- Names sort by their bytes, whatever the database's language.
CREATE TABLE keepwall.resources (
    kind text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    revision bigint NOT NULL,
    created_ms bigint NOT NULL,
    updated_ms bigint NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (kind, name)
);

-- Versions before the present one.
CREATE TABLE keepwall.history (
    kind text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    revision bigint NOT NULL,
    created_ms bigint NOT NULL,
    updated_ms bigint NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (kind, name, revision)
);

CREATE TABLE keepwall.changes (
    number bigint PRIMARY KEY,
    generation bigint NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    deleted boolean NOT NULL
);
CREATE INDEX changes_by_generation ON keepwall.changes (generation);

CREATE TABLE keepwall.audit (
    number bigint PRIMARY KEY,
    time_ms bigint NOT NULL,
    entry text NOT NULL,
    mac text NOT NULL
);

-- Answers to idempotent requests.
CREATE TABLE keepwall.remembered (
    scope text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    digest bytea NOT NULL,
    answer text NOT NULL,
    expires_ms bigint NOT NULL,
    PRIMARY KEY (scope, key)
);
CREATE INDEX remembered_by_expiry ON keepwall.remembered (expires_ms);

CREATE TABLE keepwall.leases (
    name text COLLATE "C" PRIMARY KEY,
    holder text NOT NULL,
    until timestamptz NOT NULL
);

CREATE TABLE keepwall.finding (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    time_ms bigint NOT NULL,
    kind text COLLATE "C" NOT NULL,
    severity smallint NOT NULL,
    body text NOT NULL,
    UNIQUE (source, key)
);
CREATE INDEX finding_by_source ON keepwall.finding (source, id);
CREATE INDEX finding_by_kind ON keepwall.finding (kind, id);
CREATE INDEX finding_by_time ON keepwall.finding (time_ms);

CREATE TABLE keepwall.event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    time_ms bigint NOT NULL,
    kind text COLLATE "C" NOT NULL,
    severity smallint NOT NULL,
    body text NOT NULL,
    UNIQUE (source, key)
);
CREATE INDEX event_by_source ON keepwall.event (source, id);
CREATE INDEX event_by_kind ON keepwall.event (kind, id);
CREATE INDEX event_by_time ON keepwall.event (time_ms);
