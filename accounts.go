package main

import (
	"context"
	"errors"
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
	return id, wrap(err, "add user")
}

// HasUser says whether a user is there.
func (s *store) HasUser(ctx context.Context, id int64) (bool, error) {
	known, err := knownUsers(ctx, s, []int64{id})
	return len(known) > 0, wrap(err, "look for the user")
}

// knownUsers answers those of some ids that are users'.
func knownUsers(ctx context.Context, q querier, ids []int64) ([]int64, error) {
	return queryIDs(ctx, q, `SELECT id FROM users WHERE id = ANY($1)`, ids)
}

var errEmailTaken = errors.New("a user with this email exists")
