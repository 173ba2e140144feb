package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// This file reads the log of what has happened to products and images. Triggers
// write it, in the transaction of each change: schema.sql says how, and in which
// order it is to be read.

// eventTime is how long events are kept at least: a client that was away for
// longer learns that it has missed some.
const eventTime = 24 * time.Hour

// place is a place in the log: after the event that is there.
type place struct{ Tx, ID int64 }

// after says whether p comes later in the log than q.
func (p place) after(q place) bool { return p.Tx > q.Tx || p.Tx == q.Tx && p.ID > q.ID }

// String is the place as a client gets it, in the field id of an event.
func (p place) String() string { return fmt.Sprintf("%d-%d", p.Tx, p.ID) }

// parsePlace reads what String wrote.
func parsePlace(text string) (p place, ok bool) {
	tx, id, _ := strings.Cut(text, "-")
	var errTx, errID error
	p.Tx, errTx = strconv.ParseInt(tx, 10, 64)
	p.ID, errID = strconv.ParseInt(id, 10, 64)
	return p, errTx == nil && errID == nil && p.String() == text
}

// eventKind is what has happened.
type eventKind string

const (
	productCreated eventKind = "created"
	productUpdated eventKind = "updated" // by a person: the writable fields
	productDeleted eventKind = "deleted"
	imageChanged   eventKind = "image" // will be tried again, is ready, has failed, is made anew
)

// event is one entry of the log.
type event struct {
	place
	CreatedAt time.Time
	What      eventKind
	ProductID int64
	UserID    int64
	Version   int64 // of the product; for those that are not of an image
	Image     Image // as it was then
	origin          // of the request that queued the image
}

const eventColumns = `tx, id, created_at, what, product_id, user_id, version, image_id, position, source, status, attempts,
	error_code, error_detail, object_key, width, height, bytes, source_bytes, variants, request_id, traceparent`

func scanEvent(r rows) (e event, err error) {
	i := &e.Image
	err = r.Scan(&e.Tx, &e.ID, &e.CreatedAt, &e.What, &e.ProductID, &e.UserID, &e.Version, &i.ID, &i.Position, &i.Source, &i.Status, &i.Attempts,
		&i.ErrorCode, &i.ErrorDetail, &i.Key, &i.Width, &i.Height, &i.Bytes, &i.SourceBytes, &i.Variants, &e.RequestID, &e.Traceparent)
	return e, err
}

const selectEvents = `SELECT ` + eventColumns + ` FROM settled_events WHERE (tx, id) > ($1, $2) ORDER BY tx, id LIMIT $3`

// EventsAfter reads what comes after a place, in order. Nothing is ever put
// before what it has answered.
func (s *store) EventsAfter(ctx context.Context, after place, limit int) ([]event, error) {
	events, err := query(ctx, s, scanEvent, selectEvents, after.Tx, after.ID, limit)
	return events, wrap(err, "read events")
}

const selectLastEvent = `
SELECT coalesce(max(tx), 0), coalesce(max(id), 0)
FROM (SELECT tx, id FROM settled_events ORDER BY tx DESC, id DESC LIMIT 1) AS last`

// LastEvent answers the place after all events that EventsAfter would read now.
func (s *store) LastEvent(ctx context.Context) (p place, err error) {
	err = queryRow(ctx, s, []any{&p.Tx, &p.ID}, selectLastEvent)
	return p, wrap(err, "find the last event")
}

const selectHasPlace = `
SELECT EXISTS (SELECT 1 FROM events WHERE (tx, id) <= ($1, $2)) AND EXISTS (SELECT 1 FROM events WHERE (tx, id) >= ($1, $2))`

// HasPlace says whether everything after a place is still in the log.
func (s *store) HasPlace(ctx context.Context, p place) (has bool, err error) {
	err = queryRow(ctx, s, []any{&has}, selectHasPlace, p.Tx, p.ID)
	return has, wrap(err, "find a place among the events")
}

// selectProductAt is one statement, so that the product and the last of its
// events are of one moment: the product is as its events up to that have made it.
const selectProductAt = `
SELECT ` + productColumns + `, coalesce(e.tx, 0), coalesce(e.id, 0)
FROM products p
	LEFT JOIN images i ON i.product_id = p.id
	LEFT JOIN (SELECT tx, id FROM events WHERE product_id = $1 ORDER BY id DESC LIMIT 1) e ON true
WHERE p.id = $1
ORDER BY i.position`

// ProductAt reads a product, and the place of the last event that it shows: the
// zero place if the log has none of it.
func (s *store) ProductAt(ctx context.Context, id int64) (p Product, at place, err error) {
	r, err := s.Query(ctx, selectProductAt, id)
	p, err = only(scanProducts(placedRows{r, &at}, err))
	return p, at, wrap(err, "read product %d with its events", id)
}

// placedRows are rows with a place behind their other columns.
type placedRows struct {
	rows
	at *place
}

func (r placedRows) Scan(dest ...any) error { return r.rows.Scan(append(dest, &r.at.Tx, &r.at.ID)...) }

const selectProductEvents = `
SELECT ` + eventColumns + ` FROM events
WHERE product_id = $1 AND (tx, id) > ($2, $3) AND id <= $4
ORDER BY id LIMIT $5`

// ProductEvents reads what has happened to a product after a place, up to the
// event with the id to, which is one of the product's.
func (s *store) ProductEvents(ctx context.Context, productID int64, after place, to int64, limit int) ([]event, error) {
	events, err := query(ctx, s, scanEvent, selectProductEvents, productID, after.Tx, after.ID, to, limit)
	return events, wrap(err, "read events of product %d", productID)
}

// forgetEvents looks no further than at the first events of the log, and leaves
// one of them: so the place after the last is known as long as nothing happens.
// What a webhook has not been given yet stays.
const forgetEvents = `
DELETE FROM events
WHERE (tx, id) IN (SELECT tx, id FROM (SELECT tx, id, created_at FROM events ORDER BY tx, id LIMIT $2) AS first WHERE created_at < $1)
	AND (tx, id) < (SELECT tx, id FROM events ORDER BY tx DESC, id DESC LIMIT 1)
	AND NOT EXISTS (SELECT 1 FROM webhooks h WHERE h.gone_at IS NULL AND (h.seen_tx, h.seen_id) < (events.tx, events.id))`

// ForgetEvents deletes those that are older than eventTime.
func (s *store) ForgetEvents(ctx context.Context) error {
	_, err := s.inBatches(ctx, forgetEvents, s.now().Add(-eventTime))
	return wrap(err, "forget events")
}
