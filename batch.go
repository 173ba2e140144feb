package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"slices"
	"time"
)

// Many products are stored at once with a few statements in one transaction. The
// rows go to the database as one JSON array, so that a statement is the same
// however many there are.

// batchEntry is a product that CreateProducts is to store, and what came of it.
type batchEntry struct {
	Product            // its ID is set if it is there
	Key         string // under which it is created once, as with idempotency; "": none
	Fingerprint []byte // of what the key stands for
	Existed     bool   // it had been created under its key before
	Err         error  // why this entry alone is refused; one that has it already is left alone
}

// batchRow is an entry, or an image of one, as the statements below read it.
type batchRow struct {
	Number      int    `json:"number"` // of the entry
	UserID      int64  `json:"user_id"`
	ProductID   int64  `json:"product_id,omitempty"`
	Key         string `json:"key,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Name        string `json:"name,omitempty"`
	Folded      string `json:"folded,omitempty"`
	Description string `json:"description"`
	Price       int64  `json:"price"`
	Position    int    `json:"position"`
	Source      string `json:"source,omitempty"`
	Host        string `json:"host"`
	Port        int    `json:"port"`
}

// CreateProducts is CreateProduct for many. An entry that is refused fails alone;
// an error is that of the whole batch, of which nothing is stored then.
func (s *store) CreateProducts(ctx context.Context, entries []batchEntry, from origin) error {
	if !slices.ContainsFunc(entries, batchEntry.isNew) {
		return nil
	}
	now := s.now()
	err := s.InTx(ctx, func(tx querier) error {
		if err := refuseUnknownUsers(ctx, tx, entries); err != nil {
			return err
		}
		if err := claimKeys(ctx, tx, entries, now); err != nil {
			return err
		}
		if err := insertProducts(ctx, tx, entries, now); err != nil {
			return err
		}
		if err := insertBatchImages(ctx, tx, entries, from, now); err != nil {
			return err
		}
		return recordKeys(ctx, tx, entries, now)
	})
	return wrap(err, "create %d products", len(entries))
}

// batchRows makes rows of the entries that are wanted, as JSON.
func batchRows(entries []batchEntry, wanted func(batchEntry) bool, row func(batchEntry) []batchRow) (text string, n int) {
	var all []batchRow
	for number, e := range entries {
		if !wanted(e) {
			continue
		}
		for _, r := range row(e) {
			r.Number, r.UserID, r.ProductID = number, e.UserID, e.ID
			all = append(all, r)
		}
	}
	data, _ := json.Marshal(all) // never fails
	return string(data), len(all)
}

// isNew says that an entry's product is to be stored, or has been in this batch.
func (e batchEntry) isNew() bool { return e.Err == nil && !e.Existed }

// refuseUnknownUsers looks for the users first: one that is not there would fail
// the whole statement.
func refuseUnknownUsers(ctx context.Context, tx querier, entries []batchEntry) error {
	var ids []int64
	for _, e := range entries {
		if e.Err == nil && !slices.Contains(ids, e.UserID) {
			ids = append(ids, e.UserID)
		}
	}
	known, err := knownUsers(ctx, tx, ids)
	if err != nil {
		return err
	}
	for n, e := range entries {
		if e.Err == nil && !slices.Contains(known, e.UserID) {
			entries[n].Err = errUnknownUser
		}
	}
	return nil
}

const (
	// insertKeys takes those that are new or have expired. It finds a key by the
	// index even where the planner does not know yet how many there are.
	insertKeys = `
INSERT INTO idempotency_keys AS k (user_id, key, fingerprint, response, product_id, created_at)
SELECT CAST(value->>'user_id' AS bigint), value->>'key', decode(value->>'fingerprint', 'hex'), '', 0, $2
FROM json_array_elements($1)
WHERE true
ORDER BY CAST(value->>'number' AS bigint)
ON CONFLICT (user_id, key) DO UPDATE SET fingerprint = excluded.fingerprint, product_id = 0, created_at = excluded.created_at
WHERE k.created_at <= $3
RETURNING key`

	selectKeys = `
SELECT k.key, k.fingerprint, k.product_id
FROM idempotency_keys k JOIN json_array_elements($1) ON k.user_id = CAST(value->>'user_id' AS bigint) AND k.key = value->>'key'`

	// updateKeys is written as an INSERT for the sake of the index, as above.
	updateKeys = `
INSERT INTO idempotency_keys (user_id, key, fingerprint, response, product_id, created_at)
SELECT CAST(value->>'user_id' AS bigint), value->>'key', decode(value->>'fingerprint', 'hex'), '', CAST(value->>'product_id' AS bigint), $2
FROM json_array_elements($1)
WHERE true
ON CONFLICT (user_id, key) DO UPDATE SET product_id = excluded.product_id`
)

func scanKey(r rows) (e batchEntry, err error) {
	err = r.Scan(&e.Key, &e.Fingerprint, &e.ID)
	return e, err
}

// claimKeys claims the entries' keys, or finds the products that they stand for.
// Of two transactions at once the second waits here until the first is over;
// they take the keys in the order of the entries, so neither waits for the other.
func claimKeys(ctx context.Context, tx querier, entries []batchEntry, now time.Time) error {
	keys, asked := batchRows(entries, batchEntry.hasKey, batchEntry.keyRow)
	if asked == 0 {
		return nil
	}
	claimed, err := query(ctx, tx, scanOne[string], insertKeys, keys, now, now.Add(-idempotencyTime))
	if err != nil || len(claimed) == asked {
		return err
	}
	known, err := query(ctx, tx, scanKey, selectKeys, keys)
	if err != nil {
		return err
	}
	for n := range entries {
		entries[n].adopt(known)
	}
	return nil
}

func (e batchEntry) hasKey() bool { return e.isNew() && e.Key != "" }

func (e batchEntry) keyRow() []batchRow {
	return []batchRow{{Key: e.Key, Fingerprint: hex.EncodeToString(e.Fingerprint)}}
}

// adopt takes over what is known of the entry's key. A key that was claimed just
// now has no product yet.
func (e *batchEntry) adopt(known []batchEntry) {
	if !e.hasKey() {
		return
	}
	at := slices.IndexFunc(known, func(k batchEntry) bool { return k.Key == e.Key })
	switch {
	case at < 0 || known[at].ID == 0:
	case bytes.Equal(known[at].Fingerprint, e.Fingerprint):
		e.ID, e.Existed = known[at].ID, true
	default:
		e.Err = errKeyReused
	}
}

func recordKeys(ctx context.Context, tx querier, entries []batchEntry, now time.Time) error {
	keys, n := batchRows(entries, batchEntry.hasKey, batchEntry.keyRow)
	if n == 0 {
		return nil
	}
	_, err := tx.Exec(ctx, updateKeys, keys, now)
	return err
}

// insertBatch inserts in the order of the entries, so the ids ascend as they do.
const insertBatch = `
INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
SELECT CAST(value->>'user_id' AS bigint), value->>'name', value->>'folded', value->>'description', CAST(value->>'price' AS bigint), $2, $2
FROM json_array_elements($1)
ORDER BY CAST(value->>'number' AS bigint)
RETURNING id`

func insertProducts(ctx context.Context, tx querier, entries []batchEntry, now time.Time) error {
	products, n := batchRows(entries, batchEntry.isNew, func(e batchEntry) []batchRow {
		return []batchRow{{Name: e.Name, Folded: foldCase(e.Name), Description: e.Description, Price: int64(e.Price)}}
	})
	if n == 0 {
		return nil
	}
	ids, err := queryIDs(ctx, tx, insertBatch, products, now)
	if err != nil {
		return err
	}
	slices.Sort(ids) // RETURNING promises no order
	for n, e := range entries {
		if e.isNew() {
			entries[n].ID, ids = ids[0], ids[1:]
		}
	}
	return nil
}

const insertBatchOfImages = `
INSERT INTO images (product_id, user_id, run_at, request_id, traceparent, position, source, host, port)
SELECT CAST(value->>'product_id' AS bigint), CAST(value->>'user_id' AS bigint), $2, $3, $4,
	CAST(value->>'position' AS integer), value->>'source', value->>'host', CAST(value->>'port' AS integer)
FROM json_array_elements($1)`

// insertBatchImages queues the images of products that are new, due at once.
func insertBatchImages(ctx context.Context, tx querier, entries []batchEntry, from origin, now time.Time) error {
	images, n := batchRows(entries, batchEntry.isNew, func(e batchEntry) (all []batchRow) {
		for _, image := range e.Images {
			host, port := sourceHost(image.Source)
			all = append(all, batchRow{Position: image.Position, Source: image.Source, Host: host, Port: port})
		}
		return all
	})
	if n == 0 {
		return nil
	}
	_, err := tx.Exec(ctx, insertBatchOfImages, images, now, from.RequestID, from.Traceparent)
	return err
}
