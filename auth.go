package main

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// access is who may call a route.
type access int

const (
	noToken    access = iota // anybody
	anyToken                 // who has a token
	adminToken               // who has an admin's
)

var (
	errNoToken   = &httpError{http.StatusUnauthorized, "a token is needed: Authorization: Bearer TOKEN"}
	errBadToken  = &httpError{http.StatusUnauthorized, "the token is not valid"}
	errForbidden = &httpError{http.StatusForbidden, "this token does not allow it"}
)

// authenticate finds out who calls, and notes it in the recorder. With
// authentication off, everybody is admin, and nobody noted.
func (s *server) authenticate(rec *recorder, r *http.Request, access access) error {
	if !s.authOn || access == noToken {
		return nil
	}
	token, err := bearerToken(r)
	if err != nil {
		return err
	}
	known, err := s.tokens.look(r.Context(), sumOf(token), s.store.TokenCaller)
	if errors.Is(err, errNotFound) {
		return errBadToken
	}
	if err != nil {
		return err
	}
	if !known.bucket.take(s.limits.rate, time.Now()) {
		return errRateOver
	}
	if access == adminToken && !known.Admin {
		return errForbidden
	}
	rec.caller = &known.caller
	return nil
}

// bearerToken reads the token of a request (RFC 6750, section 2.1), in the
// header alone: in a query it would get into logs.
func bearerToken(r *http.Request) (string, error) {
	lines := r.Header["Authorization"]
	if len(lines) != 1 {
		return "", errNoToken
	}
	scheme, token, ok := strings.Cut(lines[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return "", errNoToken
	}
	if token = strings.TrimSpace(token); !isToken(token) {
		return "", errBadToken
	}
	return token, nil
}

// boundTo is the user whose things alone the caller may change; nil: anybody's.
func boundTo(w http.ResponseWriter) *int64 {
	who := w.(*recorder).caller
	if who == nil || who.Admin {
		return nil
	}
	return &who.UserID
}

// callerName tells callers apart; all are one if authentication is off.
func callerName(w http.ResponseWriter) string {
	if who := w.(*recorder).caller; who != nil {
		return "user " + strconv.FormatInt(who.UserID, 10)
	}
	return "anybody"
}

// mayWrite says whether the caller may change products of this user.
func mayWrite(w http.ResponseWriter, user int64) error {
	if only := boundTo(w); only != nil && *only != user {
		return errForbidden
	}
	return nil
}

// tokenTime is how long a token that was valid counts as valid without a look
// at the database, so that cached reads need none. A revoked token is accepted
// that long at most.
const tokenTime = 5 * time.Second

// tokenCache remembers valid tokens for tokenTime. Only those: so it holds no
// more entries than there have been tokens, and guessing costs it no memory.
type tokenCache struct {
	known sync.Map // tokenKey to knownCaller
}

type knownCaller struct {
	caller
	sum    tokenSum
	until  time.Time
	bucket *rateBucket
}

func (c *tokenCache) look(ctx context.Context, sum tokenSum, ask func(context.Context, tokenSum) (caller, error)) (knownCaller, error) {
	found, _ := c.known.Load(sum.key())
	known, ok := found.(knownCaller)
	ok = ok && sum.equal(known.sum[:])
	if ok && time.Now().Before(known.until) {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	who, err := ask(ctx, sum)
	if err != nil {
		if ok && errors.Is(err, errNotFound) {
			c.known.Delete(sum.key())
		}
		return knownCaller{}, err
	}
	if !ok {
		known = knownCaller{sum: sum, bucket: new(rateBucket)}
	}
	known.caller, known.until = who, time.Now().Add(tokenTime)
	c.known.Store(sum.key(), known)
	return known, nil
}
