package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"time"
)

// AddUser stores a new user and answers its id.
func (s *store) AddUser(ctx context.Context, name, email string) (id int64, err error) {
	err = s.InTx(ctx, func(tx querier) error {
		return queryRow(ctx, tx, []any{&id},
			`INSERT INTO users (name, email, created_at) VALUES ($1, $2, $3) ON CONFLICT (email) DO NOTHING RETURNING id`,
			name, email, s.now())
	})
	if errors.Is(err, errNotFound) {
		err = errEmailTaken
	}
	return id, wrap("add user", err)
}

var errEmailTaken = errors.New("a user with this email exists")

// caller is who a token belongs to.
type caller struct {
	UserID int64
	Admin  bool
}

// tokenPrefix makes a leaked token recognisable, to people and to scanners.
const tokenPrefix = "pms_"

// CreateToken makes an API token of 256 random bits. It is answered here once;
// what is stored is its SHA-256, which suffices for so random a secret.
func (s *store) CreateToken(ctx context.Context, of caller) (string, error) {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	token := tokenPrefix + base64.RawURLEncoding.EncodeToString(secret)
	_, err := s.Exec(ctx, `INSERT INTO tokens (sha256, user_id, admin, created_at) VALUES ($1, $2, $3, $4)`,
		tokenHash(token), of.UserID, of.Admin, s.now())
	return token, wrap("create token", err)
}

func tokenHash(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// TokenCaller answers whose token this is, or errNotFound.
func (s *store) TokenCaller(ctx context.Context, token string) (caller, error) {
	var c caller
	err := queryRow(ctx, s, []any{&c.UserID, &c.Admin}, `SELECT user_id, admin FROM tokens WHERE sha256 = $1`, tokenHash(token))
	return c, wrap("look up token", err)
}

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

// replay claims the key, or finds the answer given before. Of two transactions
// at once the second waits here until the first is over.
func (i *idempotency) replay(ctx context.Context, tx querier, user int64, now time.Time) (done bool, err error) {
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

// record keeps the answer with the key that replay claimed.
func (i *idempotency) record(ctx context.Context, tx querier, p Product) error {
	if i == nil {
		return nil
	}
	_, err := tx.Exec(ctx, `UPDATE idempotency_keys SET response = $3, product_id = $4 WHERE user_id = $1 AND key = $2`,
		p.UserID, i.Key, string(i.Render(p)), p.ID)
	return err
}

// ForgetIdempotencyKeys deletes those that have expired.
func (s *store) ForgetIdempotencyKeys(ctx context.Context) error {
	_, err := s.Exec(ctx, `DELETE FROM idempotency_keys WHERE created_at <= $1`, s.now().Add(-idempotencyTime))
	return wrap("forget idempotency keys", err)
}
