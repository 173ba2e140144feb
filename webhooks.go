package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"
)

// This file is the ledger of the webhooks: who is to be told of events, what has
// yet to be told, and what could not be. Each event becomes a delivery of each
// webhook that it is for, in the transaction that moves the webhook on in the
// log: so none is lost, and none made twice, whatever ends when.

// webhook is a receiver of events.
type webhook struct {
	ID        int64
	UserID    *int64 // whose products; nil: all
	URL       string
	Secret    string // read only where it is needed
	CreatedAt time.Time
	GoneAt    *time.Time // since then it gets nothing; nil: it does
	LastAt    *time.Time // of the last try of a delivery; nil: none yet
	LastCode  string     // of its failure; "": it was delivered
	LastText  string
	Waiting   int // deliveries
	Failed    int // for good
}

// delivery is one event for one webhook.
type delivery struct {
	ID        int64
	EventID   int64
	ProductID int64
	Body      string
	Attempts  int // failed so far
	claim     int64
	origin
}

// failedDelivery is one that was given up.
type failedDelivery struct {
	EventID   int64
	ProductID int64
	Attempts  int
	FailedAt  time.Time
	Code      string
	Detail    string
}

// secretPrefix and the base64 behind it are the Standard Webhooks' form of a
// secret, which has 24 to 64 bytes.
const (
	secretPrefix = "whsec_"
	secretLeast  = 24
	secretMost   = 64
)

func newWebhookSecret() string {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	return secretPrefix + base64.StdEncoding.EncodeToString(secret)
}

// secretBytes is the key that a secret stands for.
func secretBytes(secret string) ([]byte, error) {
	text, ok := strings.CutPrefix(secret, secretPrefix)
	key, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(key) < secretLeast || len(key) > secretMost {
		return nil, fmt.Errorf("must be %s and the base64 of %d to %d bytes", secretPrefix, secretLeast, secretMost)
	}
	return key, nil
}

// maxWebhooks is how many a user may have, and the admins together: each event
// is written once for each of them.
const maxWebhooks = 20

var errTooManyWebhooks = fmt.Errorf("there are %d webhooks already", maxWebhooks)

const (
	// lockWebhookOwner lets one of two at once count first, and nobody wait who stores
	// a product of that user. Admins' webhooks have no owner, and may be one too many.
	lockWebhookOwner = `SELECT id FROM users WHERE id = $1 FOR NO KEY UPDATE`

	countWebhooks = `SELECT count(*) FROM webhooks WHERE coalesce(user_id, 0) = $1`

	insertWebhook = `
INSERT INTO webhooks (user_id, url, secret, created_at, seen_tx, seen_id) VALUES ($1, $2, $3, $4, $5, $6) RETURNING id`
)

// CreateWebhook stores a webhook, which gets the events from now on. errUnknownUser
// if it is to be of nobody.
func (s *store) CreateWebhook(ctx context.Context, w webhook) (webhook, error) {
	w.CreatedAt = s.now()
	err := s.InTx(ctx, func(tx querier) error {
		var owner, count int64
		if w.UserID != nil {
			err := queryRow(ctx, tx, []any{&owner}, lockWebhookOwner, *w.UserID)
			if errors.Is(err, errNotFound) {
				return errUnknownUser
			}
			if err != nil {
				return err
			}
		}
		if err := queryRow(ctx, tx, []any{&count}, countWebhooks, owner); err != nil {
			return err
		}
		if count >= maxWebhooks {
			return errTooManyWebhooks
		}
		var at place
		if err := queryRow(ctx, tx, []any{&at.Tx, &at.ID}, selectLastEvent); err != nil {
			return err
		}
		return queryRow(ctx, tx, []any{&w.ID}, insertWebhook, w.UserID, w.URL, w.Secret, w.CreatedAt, at.Tx, at.ID)
	})
	return w, wrap(err, "create webhook")
}

const (
	webhookColumns = `h.id, h.user_id, h.url, h.created_at, h.gone_at, h.last_at, h.last_code, h.last_detail,
	(SELECT count(*) FROM deliveries d WHERE d.webhook_id = h.id AND d.run_at IS NOT NULL),
	(SELECT count(*) FROM deliveries d WHERE d.webhook_id = h.id AND d.run_at IS NULL)`

	selectWebhooks     = `SELECT ` + webhookColumns + ` FROM webhooks h ORDER BY h.id`
	selectUserWebhooks = `SELECT ` + webhookColumns + ` FROM webhooks h WHERE h.user_id = $1 ORDER BY h.id`
	selectWebhook      = `SELECT ` + webhookColumns + ` FROM webhooks h WHERE h.id = $1`
)

func scanWebhook(r rows) (w webhook, err error) {
	err = r.Scan(&w.ID, &w.UserID, &w.URL, &w.CreatedAt, &w.GoneAt, &w.LastAt, &w.LastCode, &w.LastText, &w.Waiting, &w.Failed)
	return w, err
}

// Webhooks reads those of a user, or all.
func (s *store) Webhooks(ctx context.Context, userID *int64) ([]webhook, error) {
	sql, args := selectWebhooks, []any(nil)
	if userID != nil {
		sql, args = selectUserWebhooks, []any{*userID}
	}
	hooks, err := query(ctx, s, scanWebhook, sql, args...)
	return hooks, wrap(err, "list webhooks")
}

// Webhook reads one, or answers errNotFound.
func (s *store) Webhook(ctx context.Context, id int64) (webhook, error) {
	hook, err := only(query(ctx, s, scanWebhook, selectWebhook, id))
	return hook, wrap(err, "read webhook %d", id)
}

const selectFailedDeliveries = `
SELECT event_id, product_id, attempts, failed_at, error_code, error_detail FROM deliveries
WHERE webhook_id = $1 AND run_at IS NULL ORDER BY id DESC LIMIT $2`

func scanFailedDelivery(r rows) (f failedDelivery, err error) {
	err = r.Scan(&f.EventID, &f.ProductID, &f.Attempts, &f.FailedAt, &f.Code, &f.Detail)
	return f, err
}

// FailedDeliveries reads the latest of those that were given up.
func (s *store) FailedDeliveries(ctx context.Context, webhookID int64, limit int) ([]failedDelivery, error) {
	failed, err := query(ctx, s, scanFailedDelivery, selectFailedDeliveries, webhookID, limit)
	return failed, wrap(err, "read failed deliveries of webhook %d", webhookID)
}

// deleteDeliveries locks the webhook first, as failDeliveries does: else each could
// wait for the other.
const deleteDeliveries = `
WITH batch AS MATERIALIZED (
	SELECT d.id FROM webhooks h CROSS JOIN deliveries d WHERE h.id = $1 AND d.webhook_id = h.id LIMIT $2 FOR UPDATE)
DELETE FROM deliveries WHERE id IN (SELECT id FROM batch)`

// DeleteWebhook deletes a webhook with its deliveries. One that is being sent may
// still arrive. At first it is gone, so that the deliveries become no more.
func (s *store) DeleteWebhook(ctx context.Context, id int64) error {
	_, err := s.Exec(ctx, retireWebhook, id, s.now())
	if err == nil {
		_, err = s.inBatches(ctx, deleteDeliveries, id)
	}
	if err == nil {
		_, err = s.Exec(ctx, `DELETE FROM webhooks WHERE id = $1`, id)
	}
	return wrap(err, "delete webhook %d", id)
}

const (
	reviveWebhook = `UPDATE webhooks SET gone_at = NULL WHERE id = $1`

	selectFailedIDs = `SELECT id FROM deliveries WHERE webhook_id = $1 AND run_at IS NULL`

	// replayDeliveries changes nothing once the webhook is gone again, which gives up
	// what it queues.
	replayDeliveries = `
UPDATE deliveries SET attempts = 0, run_at = $2, failed_at = NULL, error_code = '', error_detail = ''
WHERE id = ANY($1) AND run_at IS NULL AND EXISTS (SELECT 1 FROM webhooks h WHERE h.id = webhook_id AND h.gone_at IS NULL)`
)

// ReplayDeliveries queues those anew that were given up, and answers how many
// they were. A webhook that was gone is back, and goes on where it stopped.
func (s *store) ReplayDeliveries(ctx context.Context, webhookID int64) (replayed int64, err error) {
	failed, err := queryIDs(ctx, s, selectFailedIDs, webhookID) // which end, though some may fail anew meanwhile
	if err == nil {
		_, err = s.Exec(ctx, reviveWebhook, webhookID)
	}
	if err == nil {
		replayed, err = s.inChunks(ctx, replayDeliveries, failed, s.now())
	}
	return replayed, wrap(err, "replay deliveries of webhook %d", webhookID)
}

const (
	// SQLite finds the events by their index for values, which + makes of the columns.
	anyWebhookBehind = `
SELECT EXISTS (SELECT 1 FROM webhooks h WHERE h.gone_at IS NULL AND
	EXISTS (SELECT 1 FROM settled_events e WHERE (e.tx, e.id) > (+h.seen_tx, +h.seen_id)))`

	lockWebhooks = `
SELECT id, user_id, seen_tx, seen_id FROM webhooks WHERE gone_at IS NULL ORDER BY id FOR UPDATE SKIP LOCKED`

	moveWebhooks = `
UPDATE webhooks SET seen_tx = $2, seen_id = $3 WHERE id = ANY($1)`
)

// follower is a webhook and its place in the log.
type follower struct {
	ID     int64
	UserID *int64
	Seen   place
}

// MakeDeliveries makes deliveries of the next events, as body renders them, and
// says whether there may be more. What another process is at is left to it.
func (s *store) MakeDeliveries(ctx context.Context, limit int, body func(event) []byte) (more bool, err error) {
	// First a look, so that nothing is written while there is nothing to do.
	if err := queryRow(ctx, s, []any{&more}, anyWebhookBehind); err != nil || !more {
		return false, wrap(err, "look for events for webhooks")
	}
	err = s.InTx(ctx, func(tx querier) error {
		more = false
		places, err := lockedFollowers(ctx, tx)
		if err != nil {
			return err
		}
		for from, followers := range places { // so that none waits for one that is further behind
			made, err := deliverPage(ctx, tx, from, followers, limit, body, s.now())
			if err != nil {
				return err
			}
			more = more || made == limit
		}
		return nil
	})
	return more, wrap(err, "make deliveries")
}

func scanFollower(r rows) (f follower, err error) {
	err = r.Scan(&f.ID, &f.UserID, &f.Seen.Tx, &f.Seen.ID)
	return f, err
}

// lockedFollowers are those that no other process is at, by their places.
func lockedFollowers(ctx context.Context, tx querier) (map[place][]follower, error) {
	followers, err := query(ctx, tx, scanFollower, lockWebhooks)
	places := make(map[place][]follower)
	for _, f := range followers {
		places[f.Seen] = append(places[f.Seen], f)
	}
	return places, err
}

// deliverPage makes the deliveries of a page of events for all who stand at one place,
// and answers how many events it had.
func deliverPage(ctx context.Context, tx querier, from place, followers []follower, limit int, body func(event) []byte, now time.Time) (int, error) {
	events, err := query(ctx, tx, scanEvent, selectEvents, from.Tx, from.ID, limit)
	if err != nil || len(events) == 0 {
		return 0, err
	}
	for _, e := range events {
		if err := insertDeliveries(ctx, tx, e, followers, body, now); err != nil {
			return 0, err
		}
	}
	ids := make([]int64, len(followers))
	for n, f := range followers {
		ids[n] = f.ID
	}
	last := events[len(events)-1].place
	_, err = tx.Exec(ctx, moveWebhooks, ids, last.Tx, last.ID)
	return len(events), err
}

const insertDelivery = `
INSERT INTO deliveries (webhook_id, event_id, product_id, body, run_at, request_id, traceparent)
SELECT id, $2, $3, $4, $5, $6, $7 FROM webhooks WHERE id = ANY($1)`

// insertDeliveries makes the deliveries of one event.
func insertDeliveries(ctx context.Context, tx querier, e event, followers []follower, body func(event) []byte, now time.Time) error {
	var to []int64
	for _, f := range followers {
		if f.UserID == nil || *f.UserID == e.UserID {
			to = append(to, f.ID)
		}
	}
	if to == nil {
		return nil
	}
	_, err := tx.Exec(ctx, insertDelivery, to, e.ID, e.ProductID, string(body(e)), now, e.RequestID, e.Traceparent)
	return err
}

const selectDueWebhooks = `
SELECT h.id FROM webhooks h
WHERE h.gone_at IS NULL AND EXISTS (SELECT 1 FROM deliveries d WHERE d.webhook_id = h.id AND d.run_at <= $1)`

// DueWebhooks answers those that have something to be sent now.
func (s *store) DueWebhooks(ctx context.Context) ([]int64, error) {
	ids, err := queryIDs(ctx, s, selectDueWebhooks, s.now())
	return ids, wrap(err, "look for due deliveries")
}

const (
	selectWebhookTarget = `SELECT url, secret FROM webhooks WHERE id = $1 AND gone_at IS NULL`

	claimDeliveries = `
WITH due AS MATERIALIZED (
	SELECT id FROM deliveries WHERE webhook_id = $1 AND run_at <= $2
	ORDER BY run_at, id LIMIT $5 FOR UPDATE SKIP LOCKED)
UPDATE deliveries SET run_at = $3, claim = $4 WHERE id IN (SELECT id FROM due)
RETURNING id, event_id, product_id, body, attempts, request_id, traceparent`
)

// ClaimDeliveries claims up to limit due deliveries of a webhook, and answers
// where they go. The claim is a lease, as DispatchDue has it: a delivery whose
// process dies is due again when it ends.
func (s *store) ClaimDeliveries(ctx context.Context, webhookID, claim int64, limit int) (to webhook, claimed []delivery, err error) {
	to.ID = webhookID
	err = s.InTx(ctx, func(tx querier) error {
		if err := queryRow(ctx, tx, []any{&to.URL, &to.Secret}, selectWebhookTarget, webhookID); err != nil {
			return err
		}
		now := s.now()
		scan := func(r rows) (delivery, error) {
			d := delivery{claim: claim}
			err := r.Scan(&d.ID, &d.EventID, &d.ProductID, &d.Body, &d.Attempts, &d.RequestID, &d.Traceparent)
			return d, err
		}
		claimed, err = query(ctx, tx, scan, claimDeliveries, webhookID, now, now.Add(deliveryLease), claim, limit)
		return err
	})
	return to, claimed, wrap(err, "claim deliveries of webhook %d", webhookID)
}

const noteLastTry = `UPDATE webhooks SET last_at = $2, last_code = $3, last_detail = $4 WHERE id = $1`

// SettleDelivered forgets a delivery that has arrived.
func (s *store) SettleDelivered(ctx context.Context, webhookID int64, d delivery) error {
	err := s.InTx(ctx, func(tx querier) error {
		if _, err := tx.Exec(ctx, noteLastTry, webhookID, s.now(), "", ""); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `DELETE FROM deliveries WHERE id = $1 AND claim = $2`, d.ID, d.claim)
		return err
	})
	return wrap(err, "settle delivery %d", d.ID)
}

const (
	settleDeliveryFailed = `
UPDATE deliveries SET attempts = attempts + 1, claim = 0, run_at = $3, failed_at = $4, error_code = $5, error_detail = $6
WHERE id = $1 AND claim = $2`

	retireWebhook = `UPDATE webhooks SET gone_at = $2 WHERE id = $1`

	// failDeliveries locks the webhooks, so that none comes back meanwhile. SQLite uses
	// the index of the deliveries only if the join and the time are put in this way.
	failDeliveries = `
WITH undeliverable AS MATERIALIZED (
	SELECT d.id FROM webhooks h CROSS JOIN deliveries d
	WHERE d.webhook_id = h.id AND h.gone_at IS NOT NULL AND d.run_at >= '-infinity' LIMIT $2 FOR UPDATE)
UPDATE deliveries SET run_at = NULL, claim = 0, failed_at = $1, error_code = 'http_410', error_detail = '410 Gone'
WHERE id IN (SELECT id FROM undeliverable)`
)

// SettleUndelivered records a failed try: the delivery is due again at f.RetryAt,
// or given up. With gone the webhook gets nothing more: ForgetDeliveries gives up
// what else it has.
func (s *store) SettleUndelivered(ctx context.Context, webhookID int64, d delivery, f failure, gone bool) error {
	now := s.now()
	retryAt, failedAt := f.times(now)
	err := s.InTx(ctx, func(tx querier) error {
		if _, err := tx.Exec(ctx, noteLastTry, webhookID, now, f.Code, f.Detail); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, settleDeliveryFailed, d.ID, d.claim, retryAt, failedAt, f.Code, f.Detail); err != nil || !gone {
			return err
		}
		_, err := tx.Exec(ctx, retireWebhook, webhookID, now)
		return err
	})
	return wrap(err, "settle failed delivery %d", d.ID)
}

// GiveBackDelivery makes a delivery due again that was not tried to the end, after
// a pause: what kept us from it may last.
func (s *store) GiveBackDelivery(ctx context.Context, d delivery) error {
	_, err := s.Exec(ctx, `UPDATE deliveries SET run_at = $3, claim = 0 WHERE id = $1 AND claim = $2`, d.ID, d.claim, s.now().Add(refusedDelay))
	return wrap(err, "give delivery %d back", d.ID)
}

// failedDeliveryTime is how long a delivery that was given up can be replayed.
const failedDeliveryTime = 7 * 24 * time.Hour

const forgetDeliveries = `
DELETE FROM deliveries
WHERE run_at IS NULL AND id IN (SELECT id FROM deliveries WHERE run_at IS NULL AND failed_at < $1 LIMIT $2)`

// ForgetDeliveries deletes those that were given up long ago, and gives up what is
// left of webhooks that are gone.
func (s *store) ForgetDeliveries(ctx context.Context) error {
	_, err := s.inBatches(ctx, failDeliveries, s.now())
	if err == nil {
		_, err = s.inBatches(ctx, forgetDeliveries, s.now().Add(-failedDeliveryTime))
	}
	return wrap(err, "forget failed deliveries")
}
