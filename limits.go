package main

import (
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// limitSettings bound what clients can ask for at once. Zero is no bound.
type limitSettings struct {
	MaxRequests int // in work at once
	RateLimit   int // requests a second of one token, and as many at once after a pause
}

// requestLimits counts the requests of a server by what they are waiting for.
// Each kind has as many places, so that clients that send their bodies slowly,
// or listen to events, take none from those that are in work. Small answers that are
// being sent hold no place: the server's write timeout bounds them. Large pages of
// lists, of which nobody may read a byte until then, have places of their own, so
// that there is a bound to what all of them have of memory: maxSending of maxPage.
//
// Imports and exports last as long as their clients like, and hold a batch of
// products each, so they have fewer places: see maxBulk. Those that watch the
// program have places of their own, to learn that it is busy.
type requestLimits struct {
	working, reading, streaming, bulk, watching, sending places
	rate                                                 int
}

// maxBulk bounds the imports and exports at once, if requests are bounded. The
// largest rows take some 10 MB of each.
const maxBulk = 16

// maxSending bounds the pages of more than smallPage that are being sent at once.
const maxSending = 64

// maxWatching bounds the requests for metrics at once: strangers may send tokens
// that have to be looked up.
const maxWatching = 16

// set must come before the first request.
func (l *requestLimits) set(to limitSettings) {
	l.rate = to.RateLimit
	for _, p := range []*places{&l.working, &l.reading, &l.streaming} {
		p.most = int64(to.MaxRequests)
	}
	l.bulk.most = int64(min(to.MaxRequests, maxBulk))
	l.sending.most = int64(min(to.MaxRequests, maxSending))
	l.watching.most = int64(min(to.MaxRequests, maxWatching))
}

// places are what a bounded number of requests can have at once.
type places struct {
	most  int64 // 0: no bound
	taken atomic.Int64
}

// take reports whether there was a place. Who has one gives it back with leave.
func (p *places) take() bool {
	if p.taken.Add(1) > p.most && p.most > 0 {
		p.taken.Add(-1)
		return false
	}
	return true
}

func (p *places) leave() { p.taken.Add(-1) }

var (
	errBusy     = &httpError{http.StatusServiceUnavailable, "too many requests are in work, try again"}
	errRateOver = &httpError{http.StatusTooManyRequests, "this token has sent too many requests, try again"}
)

// enter gives up the request's place for one of another kind.
func (rec *recorder) enter(p *places) error {
	rec.leave()
	if !p.take() {
		return errBusy
	}
	rec.place = p
	return nil
}

// leave gives the request's place up, if it has one.
func (rec *recorder) leave() {
	if rec.place != nil {
		rec.place.leave()
		rec.place = nil
	}
}

// rateBucket holds the requests that a token may still send. It is full at
// first, with those of a second, and gets them back in the course of one: so
// whoever is refused may try again after a second.
type rateBucket struct {
	mu   sync.Mutex
	used float64 // requests missing from the full bucket
	at   time.Time
}

// take reports whether one more request is within rate a second.
func (b *rateBucket) take(rate int, now time.Time) bool {
	if rate == 0 {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if passed := now.Sub(b.at); passed > 0 {
		b.used = max(0, b.used-passed.Seconds()*float64(rate))
		b.at = now
	}
	if b.used+1 > float64(rate) {
		return false
	}
	b.used++
	return true
}
