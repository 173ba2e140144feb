-- The embedded default's schema: schema.sql in SQLite's terms; what each table
-- is for is said there. Text sorts by code point (SQLite's BINARY collation);
-- times are text of fixed width in UTC, so they sort as they are.
--
-- No index names its table's id, with which each ends by itself: by one that is named
-- SQLite does not find (price_cents, id) > (?, ?), and reads all with that price.

CREATE TABLE users (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT NOT NULL,
    email      TEXT NOT NULL UNIQUE,
    created_at TIMESTAMP NOT NULL
);

INSERT INTO users (id, name, email, created_at)
VALUES (1, 'demo', 'demo@example.com', strftime('%Y-%m-%d %H:%M:%f', 'now'));

CREATE TABLE tokens (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    sha256       BLOB NOT NULL,
    user_id      INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    admin        BOOLEAN NOT NULL,
    created_at   TIMESTAMP NOT NULL,
    last_used_at TIMESTAMP
);

CREATE UNIQUE INDEX tokens_key ON tokens (substr(sha256, 1, 8));

CREATE TABLE products (
    id                  INTEGER PRIMARY KEY AUTOINCREMENT, -- an id is never used twice
    user_id             INTEGER NOT NULL REFERENCES users,
    product_name        TEXT NOT NULL,
    name_folded         TEXT NOT NULL,
    product_description TEXT NOT NULL,
    price_cents         INTEGER NOT NULL CHECK (price_cents BETWEEN 0 AND 999999999999),
    version             INTEGER NOT NULL DEFAULT 1,
    created_at          TIMESTAMP NOT NULL,
    updated_at          TIMESTAMP NOT NULL
);

CREATE INDEX products_price        ON products (price_cents);
CREATE INDEX products_created      ON products (created_at);
CREATE INDEX products_name         ON products (product_name);
CREATE INDEX products_user         ON products (user_id);
CREATE INDEX products_user_price   ON products (user_id, price_cents);
CREATE INDEX products_user_created ON products (user_id, created_at);
CREATE INDEX products_user_name    ON products (user_id, product_name);

CREATE TABLE images (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    product_id   INTEGER NOT NULL REFERENCES products ON DELETE CASCADE,
    user_id      INTEGER NOT NULL,
    position     INTEGER NOT NULL,
    source       TEXT NOT NULL,
    host         TEXT NOT NULL,
    port         INTEGER NOT NULL,
    status       TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'ready', 'failed')),
    attempts     INTEGER NOT NULL DEFAULT 0,
    lone_starts  INTEGER NOT NULL DEFAULT 0,
    put_off      INTEGER NOT NULL DEFAULT 0,
    run_at       TIMESTAMP,
    claim        INTEGER NOT NULL DEFAULT 0,
    published_at TIMESTAMP,
    ready_at     TIMESTAMP,
    failed_at    TIMESTAMP,
    discarded_at TIMESTAMP,
    error_code   TEXT NOT NULL DEFAULT '',
    error_detail TEXT NOT NULL DEFAULT '',
    object_key   TEXT NOT NULL DEFAULT '',
    width        INTEGER NOT NULL DEFAULT 0,
    height       INTEGER NOT NULL DEFAULT 0,
    bytes        INTEGER NOT NULL DEFAULT 0,
    source_bytes INTEGER NOT NULL DEFAULT 0,
    variants     TEXT NOT NULL DEFAULT '',
    request_id   TEXT NOT NULL DEFAULT '',
    traceparent  TEXT NOT NULL DEFAULT ''
);

CREATE INDEX images_product   ON images (product_id, position);
CREATE INDEX images_due       ON images (run_at) WHERE status = 'pending' AND run_at IS NOT NULL;
CREATE INDEX images_published ON images (published_at) WHERE status = 'pending' AND run_at IS NULL;

CREATE INDEX images_ready      ON images (ready_at) WHERE ready_at IS NOT NULL;
CREATE INDEX images_dead       ON images (id) WHERE status = 'failed' AND discarded_at IS NULL;
CREATE INDEX images_dead_code  ON images (error_code) WHERE status = 'failed' AND discarded_at IS NULL;
CREATE INDEX images_dead_host  ON images (host) WHERE status = 'failed' AND discarded_at IS NULL;
CREATE INDEX images_dead_user  ON images (user_id) WHERE status = 'failed' AND discarded_at IS NULL;
CREATE INDEX images_dead_since ON images (failed_at) WHERE status = 'failed' AND discarded_at IS NULL;

CREATE TABLE image_attempts (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    image_id    INTEGER NOT NULL REFERENCES images ON DELETE CASCADE,
    failed_at   TIMESTAMP NOT NULL,
    duration_ms INTEGER NOT NULL,
    code        TEXT NOT NULL,
    detail      TEXT NOT NULL
);

CREATE INDEX image_attempts_image ON image_attempts (image_id);

CREATE TABLE garbage (
    object_key TEXT PRIMARY KEY,
    delete_at  TIMESTAMP NOT NULL,
    deleting   BOOLEAN NOT NULL DEFAULT false
);

CREATE INDEX garbage_due ON garbage (delete_at);

CREATE TABLE idempotency_keys (
    user_id     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    key         TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    response    TEXT NOT NULL,
    product_id  INTEGER NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    PRIMARY KEY (user_id, key)
);

CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);

-- One writer at a time: ids are in the order in which transactions end, and every
-- event is settled.
CREATE TABLE events (
    tx           INTEGER NOT NULL DEFAULT 0,
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at   TIMESTAMP NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
    what         TEXT NOT NULL CHECK (what IN ('created', 'updated', 'deleted', 'image')),
    product_id   INTEGER NOT NULL,
    user_id      INTEGER NOT NULL,
    version      INTEGER NOT NULL DEFAULT 0,
    image_id     INTEGER NOT NULL DEFAULT 0,
    position     INTEGER NOT NULL DEFAULT 0,
    source       TEXT NOT NULL DEFAULT '',
    status       TEXT NOT NULL DEFAULT '',
    attempts     INTEGER NOT NULL DEFAULT 0,
    error_code   TEXT NOT NULL DEFAULT '',
    error_detail TEXT NOT NULL DEFAULT '',
    object_key   TEXT NOT NULL DEFAULT '',
    width        INTEGER NOT NULL DEFAULT 0,
    height       INTEGER NOT NULL DEFAULT 0,
    bytes        INTEGER NOT NULL DEFAULT 0,
    source_bytes INTEGER NOT NULL DEFAULT 0,
    variants     TEXT NOT NULL DEFAULT '',
    request_id   TEXT NOT NULL DEFAULT '',
    traceparent  TEXT NOT NULL DEFAULT ''
);

CREATE INDEX events_order   ON events (tx);
CREATE INDEX events_product ON events (product_id);

CREATE TRIGGER products_created AFTER INSERT ON products BEGIN
    INSERT INTO events (what, product_id, user_id, version) VALUES ('created', NEW.id, NEW.user_id, NEW.version);
END;

CREATE TRIGGER products_updated AFTER UPDATE OF product_name ON products BEGIN
    INSERT INTO events (what, product_id, user_id, version) VALUES ('updated', NEW.id, NEW.user_id, NEW.version);
END;

CREATE TRIGGER products_deleted AFTER DELETE ON products BEGIN
    INSERT INTO events (what, product_id, user_id, version) VALUES ('deleted', OLD.id, OLD.user_id, OLD.version);
END;

CREATE TRIGGER images_changed AFTER UPDATE OF status ON images BEGIN
    INSERT INTO events (what, product_id, user_id, image_id, position, source, status, attempts, error_code, error_detail,
        object_key, width, height, bytes, source_bytes, variants, request_id, traceparent)
    VALUES ('image', NEW.product_id, NEW.user_id, NEW.id, NEW.position, NEW.source, NEW.status, NEW.attempts, NEW.error_code, NEW.error_detail,
        NEW.object_key, NEW.width, NEW.height, NEW.bytes, NEW.source_bytes, NEW.variants, NEW.request_id, NEW.traceparent);
END;

CREATE TABLE webhooks (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id     INTEGER REFERENCES users ON DELETE CASCADE,
    url         TEXT NOT NULL,
    secret      TEXT NOT NULL,
    created_at  TIMESTAMP NOT NULL,
    seen_tx     INTEGER NOT NULL,
    seen_id     INTEGER NOT NULL,
    gone_at     TIMESTAMP,
    last_at     TIMESTAMP,
    last_code   TEXT NOT NULL DEFAULT '',
    last_detail TEXT NOT NULL DEFAULT ''
);

CREATE INDEX webhooks_user ON webhooks (user_id);

CREATE TABLE deliveries (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    webhook_id   INTEGER NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    event_id     INTEGER NOT NULL,
    product_id   INTEGER NOT NULL,
    body         TEXT NOT NULL,
    attempts     INTEGER NOT NULL DEFAULT 0,
    run_at       TIMESTAMP,
    claim        INTEGER NOT NULL DEFAULT 0,
    failed_at    TIMESTAMP,
    error_code   TEXT NOT NULL DEFAULT '',
    error_detail TEXT NOT NULL DEFAULT '',
    request_id   TEXT NOT NULL DEFAULT '',
    traceparent  TEXT NOT NULL DEFAULT ''
);

CREATE INDEX deliveries_due    ON deliveries (webhook_id, run_at);
CREATE INDEX deliveries_failed ON deliveries (failed_at) WHERE run_at IS NULL;
