package main

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
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
	errOtherSite = &httpError{http.StatusForbidden, "a page of another site may not do this"}
)

// crossOrigin recognises requests that a page of another site makes a browser
// send. Without tokens any page that somebody looks at could use the API.
var crossOrigin = http.NewCrossOriginProtection()

// authenticate finds out who calls, and notes it in the recorder. With
// authentication off, everybody is admin, and nobody noted.
func (s *server) authenticate(rec *recorder, r *http.Request, access access) error {
	if access == noToken {
		return nil
	}
	if !s.authOn {
		if crossOrigin.Check(r) != nil {
			return errOtherSite
		}
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
	rec.caller = &known
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

const (
	// tokenTime is how long a token that was valid counts as valid without a look
	// at the database, so that cached reads need none. A revoked token is accepted
	// that long at most, while the database answers.
	tokenTime = 5 * time.Second
	// tokenGrace is how long a token that was valid counts as valid while the
	// database cannot be asked. So what needs no database goes on, and those who
	// look into the outage are let in.
	tokenGrace = 10 * time.Minute
	// tokenPatience is how long the database may take over a token that is known.
	tokenPatience = time.Second
)

// tokenCache remembers valid tokens. Only those: so it holds no more entries
// than there have been tokens, and guessing costs it no memory.
type tokenCache struct {
	known   sync.Map           // tokenKey to knownCaller
	looking singleflight.Group // by the whole sum
}

type knownCaller struct {
	caller
	sum    tokenSum
	seen   time.Time // when the database last had it
	next   time.Time // when it has to be asked again
	bucket *rateBucket
}

// askToken answers whose token it is, or errNotFound.
type askToken func(context.Context, tokenSum) (caller, error)

// look answers whose token it is. One request asks the database for all that would
// ask at the same time, so the question does not end with that request.
func (c *tokenCache) look(ctx context.Context, sum tokenSum, ask askToken) (knownCaller, error) {
	known, ok := c.find(sum)
	if ok && time.Now().Before(known.next) {
		return known, nil
	}
	found, err, _ := c.looking.Do(string(sum[:]), func() (any, error) {
		return c.lookAgain(context.WithoutCancel(ctx), sum, ask)
	})
	return found.(knownCaller), err
}

func (c *tokenCache) find(sum tokenSum) (knownCaller, bool) {
	found, _ := c.known.Load(sum.key())
	known, ok := found.(knownCaller)
	return known, ok && sum.equal(known.sum[:])
}

func (c *tokenCache) lookAgain(ctx context.Context, sum tokenSum, ask askToken) (knownCaller, error) {
	known, ok := c.find(sum)
	patience := requestTimeout
	if ok {
		patience = tokenPatience
	} else {
		known = knownCaller{sum: sum, bucket: new(rateBucket)}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	who, err := ask(ctx, sum)
	now := time.Now()
	switch {
	case err == nil:
		known.caller, known.seen = who, now
	case ok && errors.Is(err, errNotFound):
		c.known.Delete(sum.key())
		return knownCaller{}, err
	case !ok || now.After(known.seen.Add(tokenGrace)):
		return knownCaller{}, err
	}
	known.next = now.Add(tokenTime)
	c.known.Store(sum.key(), known)
	return known, nil
}

// tokenWatch ends what may go on for ever when its caller's token is revoked, as
// soon as a request would be refused. A database that cannot be asked ends nothing.
type tokenWatch struct {
	expired <-chan time.Time // then the token has to be looked at again; nil: there is none
	look    func() (knownCaller, error)
}

// watchToken begins with what is known of the caller's token. A look at the
// database takes tokenPatience at most, whether ctx has ended or not.
func (s *server) watchToken(ctx context.Context, w http.ResponseWriter) (t tokenWatch) {
	if known := w.(*recorder).caller; known != nil {
		t.expired = time.After(time.Until(known.next))
		t.look = func() (knownCaller, error) { return s.tokens.look(ctx, known.sum, s.store.TokenCaller) }
	}
	return t
}

// renew answers errBadToken if the token has been revoked.
func (t *tokenWatch) renew() error {
	known, err := t.look()
	switch {
	case errors.Is(err, errNotFound):
		return errBadToken
	case err != nil:
		known.next = time.Now().Add(tokenTime)
	}
	t.expired = time.After(time.Until(known.next))
	return nil
}
