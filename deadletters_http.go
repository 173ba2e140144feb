package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// deadLetterSort is the only order of the dead letters.
const deadLetterSort sortOrder = "id"

// deadFilterNames are the query parameters that select dead letters.
var deadFilterNames = []string{"code", "host", "user_id", "since"}

func (s *server) listDeadLetters(w http.ResponseWriter, r *http.Request) error {
	filter, after, limit, err := readDeadPage(r.URL.RawQuery)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	letters, err := s.store.DeadLetters(ctx, filter, after.id(), limit+1)
	if err != nil {
		return err
	}
	return writeList(w, r, letters, limit, func(d deadLetter) []byte { return encodeJSON(d.json()) }, func(d deadLetter) *cursor { return &cursor{Sort: deadLetterSort, ID: d.ID} })
}

// readDeadPage reads the query of GET /dead-letters.
func readDeadPage(raw string) (f deadFilter, after *cursor, limit int, err error) {
	query, err := readQuery(raw, append([]string{"limit", "cursor"}, deadFilterNames...)...)
	if err != nil {
		return f, nil, 0, err
	}
	limit = defaultLimit
	f, wrong := readDeadFilter(query)
	wrong.check(query, "limit", func(v string) (err error) { limit, err = readNumber(v, maxLimit); return err })
	wrong.check(query, "cursor", func(v string) (err error) { after, err = parseCursor(v, deadLetterSort); return err })
	return f, after, limit, wrong.err()
}

// readDeadFilter reads which dead letters are meant, and what is wrong with that.
func readDeadFilter(query url.Values) (f deadFilter, wrong invalidInput) {
	wrong.check(query, "code", func(v string) error { f.Code = v; return checkFilled(v) })
	wrong.check(query, "host", func(v string) (err error) { f.Host, f.Port, err = readHost(v); return err })
	wrong.check(query, "user_id", func(v string) (err error) { f.UserID, err = readID(v); return err })
	wrong.check(query, "since", func(v string) (err error) { f.Since, err = readTime(v); return err })
	return f, wrong
}

func checkFilled(v string) error {
	if v == "" {
		return errors.New("must not be empty")
	}
	return checkText(v)
}

// readHost reads a host as a URL names it, with a port or without.
func readHost(v string) (host string, port int, err error) {
	if ip := net.ParseIP(v); ip != nil {
		return hostName(v), 0, nil // IPv6 without brackets too
	}
	u, err := parseURL("http://" + v)
	if err != nil || u.Host != v {
		return "", 0, errors.New("must be the host of a URL, with a port or without")
	}
	port, _ = strconv.Atoi(u.Port()) // "" is any
	return hostName(u.Hostname()), port, nil
}

// readTime reads a time from year 1 to 9999.
func readTime(v string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, v)
	if err != nil || t.UTC().Year() < 1 || t.UTC().Year() > 9999 {
		return t, errors.New("must be a time as in RFC 3339, for instance 2026-01-02T03:04:05Z")
	}
	return t, nil
}

func (s *server) getDeadLetter(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	letter, err := s.store.DeadLetter(ctx, id)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, letter.json())
	return nil
}

// replayedJSON answers how many dead letters were queued anew.
type replayedJSON struct {
	Replayed int `json:"replayed"`
}

// replayDeadLetter queues one dead letter anew. One that was replayed already
// is in work, so pressing twice does no harm.
func (s *server) replayDeadLetter(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	n, err := replayOne(ctx, s.store, id, originOf(w), s.invalidate)
	if err != nil {
		return err
	}
	s.queuedAnew()
	writeJSON(w, http.StatusAccepted, replayedJSON{n})
	return nil
}

func (s *server) replayDeadLetters(w http.ResponseWriter, r *http.Request) error {
	query, err := readQuery(r.URL.RawQuery, deadFilterNames...)
	if err != nil {
		return err
	}
	filter, wrong := readDeadFilter(query)
	if wrong != nil {
		return wrong
	}
	if r.ContentLength != 0 { // a filter that is put there would replay everything
		body, err := readBody(w, r, "application/json")
		if err != nil {
			return err
		}
		if _, err := readFields(body); err != nil {
			return err
		}
	}
	n, err := replay(r.Context(), s.store, filter, originOf(w), 0, s.invalidate)
	if n > 0 {
		s.queuedAnew()
	}
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusAccepted, replayedJSON{n})
	return nil
}

// queuedAnew tells that images were, perhaps dead letters among them.
func (s *server) queuedAnew() {
	s.wake()
	s.deadChanged()
}

func (s *server) discardDeadLetter(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	if err := s.store.DiscardDead(ctx, id); err != nil {
		return err
	}
	s.deadChanged()
	w.WriteHeader(http.StatusNoContent)
	return nil
}
