package main

import (
	"context"
	"errors"
	"net/http"
)

// deadLetterSort is the only order of the dead letters.
const deadLetterSort sortOrder = "id"

func (s *server) listDeadLetters(w http.ResponseWriter, r *http.Request) error {
	filter, err := readDeadLetterQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	letters, err := s.store.DeadLetters(ctx, filter.After.id(), filter.Limit+1)
	if err != nil {
		return err
	}
	var next *cursor
	if len(letters) > filter.Limit {
		letters = letters[:filter.Limit]
		next = &cursor{Sort: deadLetterSort, ID: letters[filter.Limit-1].ID}
	}
	items := make([]deadLetterJSON, len(letters))
	for n, letter := range letters {
		items[n] = letter.json()
	}
	writeList(w, r, items, next)
	return nil
}

// readDeadLetterQuery reads limit and cursor, as readFilter does.
func readDeadLetterQuery(raw string) (productFilter, error) {
	if _, err := readQuery(raw, "limit", "cursor"); err != nil {
		return productFilter{}, err
	}
	return readFilter(raw)
}

func (s *server) getDeadLetter(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
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
func (s *server) replayDeadLetter(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	productID, version, err := s.store.ReplayDead(ctx, id)
	if errors.Is(err, errNotFound) {
		if _, pending := s.store.PendingImage(ctx, id); pending == nil {
			writeJSON(w, http.StatusAccepted, replayedJSON{})
			return nil
		}
	}
	if err != nil {
		return err
	}
	s.invalidate(productID, version)
	s.afterReplay()
	writeJSON(w, http.StatusAccepted, replayedJSON{1})
	return nil
}

func (s *server) replayDeadLetters(w http.ResponseWriter, r *http.Request) error {
	n, err := replayAll(r.Context(), s.store, s.invalidate)
	if n > 0 {
		s.afterReplay()
	}
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusAccepted, replayedJSON{n})
	return nil
}

func (s *server) afterReplay() {
	s.wake()
	s.replayed()
}

// replayAll queues every dead letter anew that there is when it begins. It may
// be interrupted and called again.
func replayAll(ctx context.Context, db *store, invalidate func(id, version int64)) (replayed int, err error) {
	for after := int64(0); ; {
		letters, err := db.DeadLetters(ctx, after, maxLimit)
		if err != nil || len(letters) == 0 {
			return replayed, err
		}
		for _, letter := range letters {
			after = letter.ID
			productID, version, err := db.ReplayDead(ctx, letter.ID)
			if errors.Is(err, errNotFound) {
				continue // someone else was faster
			}
			if err != nil {
				return replayed, err
			}
			invalidate(productID, version)
			replayed++
		}
	}
}

func (s *server) discardDeadLetter(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	if err := s.store.DiscardDead(ctx, id); err != nil {
		return err
	}
	s.replayed()
	w.WriteHeader(http.StatusNoContent)
	return nil
}
