package main

import (
	"context"
	"errors"
	"net/http"
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

// callerKey is the context key of a request's caller.
type callerKey struct{}

// authenticate finds out who calls. With authentication off, everybody is admin.
func (s *server) authenticate(r *http.Request, access access) (*http.Request, error) {
	if !s.authOn || access == noToken {
		return r, nil
	}
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return r, errNoToken
	}
	who, err := s.tokens.caller(r.Context(), strings.TrimSpace(token), s.store.TokenCaller)
	if errors.Is(err, errNotFound) {
		return r, errBadToken
	}
	if err != nil {
		return r, err
	}
	if access == adminToken && !who.Admin {
		return r, errForbidden
	}
	return r.WithContext(context.WithValue(r.Context(), callerKey{}, who)), nil
}

// mayWrite says whether the caller may change products of this user.
func mayWrite(r *http.Request, user int64) error {
	who, authOn := r.Context().Value(callerKey{}).(caller)
	if authOn && !who.Admin && who.UserID != user {
		return errForbidden
	}
	return nil
}

// tokenTime is how long a token that was valid counts as valid without a look
// at the database, so that cached reads need none.
const tokenTime = 5 * time.Second

// tokenCache remembers valid tokens for tokenTime. Only those: so it holds no
// more entries than the database has tokens, and guessing costs it no memory.
type tokenCache struct {
	known sync.Map // the token to knownCaller
}

type knownCaller struct {
	caller
	until time.Time
}

func (c *tokenCache) caller(ctx context.Context, token string, look func(context.Context, string) (caller, error)) (caller, error) {
	if known, ok := c.known.Load(token); ok && time.Now().Before(known.(knownCaller).until) {
		return known.(knownCaller).caller, nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	who, err := look(ctx, token)
	if err != nil {
		c.known.Delete(token)
		return who, err
	}
	c.known.Store(token, knownCaller{who, time.Now().Add(tokenTime)})
	return who, nil
}
