CREATE TABLE finding (
    -- Never given twice, also after the newest rows went.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    key TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    severity INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (source, key)
) STRICT;
-- Each ends with the id, so it gives a page newest first.
CREATE INDEX finding_by_source ON finding (source);
CREATE INDEX finding_by_kind ON finding (kind);
CREATE INDEX finding_by_time ON finding (time_ms);

CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    source TEXT NOT NULL,
    key TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    severity INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (source, key)
) STRICT;
CREATE INDEX event_by_source ON event (source);
CREATE INDEX event_by_kind ON event (kind);
CREATE INDEX event_by_time ON event (time_ms);
