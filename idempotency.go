package main

import (
	"bytes"
	"context"
	"errors"
	"time"
)

// idempotencyTime is how long an Idempotency-Key is remembered.
const idempotencyTime = 24 * time.Hour

var errKeyReused = errors.New("Idempotency-Key used with another request")

// idempotency lets a product be created once, however often its client asks.
// The key, the request's fingerprint and the product are committed together.
type idempotency struct {
	Key         string
	Fingerprint []byte
	Render      func(Product) []byte // makes the answer to keep
	ProductID   int64                // set, with Answer, when the product had been created before
	Answer      []byte
}

// claim claims the key, or finds the answer given before. Of two transactions
// at once the second waits here until the first is over.
func (i *idempotency) claim(ctx context.Context, tx querier, user int64, now time.Time) (done bool, err error) {
	if i == nil {
		return false, nil
	}
	_, err = tx.Exec(ctx, `DELETE FROM idempotency_keys WHERE user_id = $1 AND key = $2 AND created_at <= $3`,
		user, i.Key, now.Add(-idempotencyTime))
	if err != nil {
		return false, err
	}
	claimed, err := tx.Exec(ctx, `
INSERT INTO idempotency_keys (user_id, key, fingerprint, response, product_id, created_at)
VALUES ($1, $2, $3, '', 0, $4) ON CONFLICT (user_id, key) DO NOTHING`, user, i.Key, i.Fingerprint, now)
	if err != nil || claimed == 1 {
		return false, err
	}
	var fingerprint []byte
	var answer string
	err = queryRow(ctx, tx, []any{&fingerprint, &answer, &i.ProductID},
		`SELECT fingerprint, response, product_id FROM idempotency_keys WHERE user_id = $1 AND key = $2`, user, i.Key)
	if err == nil && !bytes.Equal(fingerprint, i.Fingerprint) {
		err = errKeyReused
	}
	i.Answer = []byte(answer)
	return true, err
}

// record keeps the answer with the key that was claimed.
func (i *idempotency) record(ctx context.Context, tx querier, p Product) error {
	if i == nil {
		return nil
	}
	_, err := tx.Exec(ctx, `UPDATE idempotency_keys SET response = $3, product_id = $4 WHERE user_id = $1 AND key = $2`,
		p.UserID, i.Key, string(i.Render(p)), p.ID)
	return err
}

const forgetIdempotencyKeys = `
DELETE FROM idempotency_keys
WHERE (user_id, key) IN (SELECT user_id, key FROM idempotency_keys WHERE created_at <= $1 LIMIT $2)`

// ForgetIdempotencyKeys deletes those that have expired.
func (s *store) ForgetIdempotencyKeys(ctx context.Context) error {
	_, err := s.inBatches(ctx, forgetIdempotencyKeys, s.now().Add(-idempotencyTime))
	return wrap(err, "forget idempotency keys")
}
