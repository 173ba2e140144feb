package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"time"
)

const (
	// eventsHeartbeat keeps proxies from closing a stream on which nothing happens.
	eventsHeartbeat = 15 * time.Second
	// eventsWriteTimeout is for one write to a client that does not read.
	eventsWriteTimeout = 10 * time.Second
)

// errStreamOver ends a stream in good order.
var errStreamOver = errors.New("the stream is over")

// events streams what happens to all products, or to those that a filter selects,
// as server-sent events (WHATWG HTML, section 9.2): from now on, or from after the
// event that the client names as the last it has seen.
func (s *server) events(w http.ResponseWriter, r *http.Request) error {
	wants, err := readEventFilter(r.URL.RawQuery)
	if err != nil {
		return err
	}
	from, known, err := s.lastSeen(r)
	if err != nil {
		return err
	}
	missed := !known && r.Header.Get("Last-Event-ID") != ""
	if !known {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		if from, err = s.store.LastEvent(ctx); err != nil {
			return err
		}
	}
	stream, err := s.openStream(w, r)
	if err != nil {
		return err
	}
	defer stream.heartbeat.Stop()
	if missed {
		err = stream.reset(from)
	} else {
		err = stream.mark(from) // so that a client whose first event is lost can name where it was
	}
	if err == nil && r.Method != http.MethodHead {
		_ = stream.follow(s, from, wants) // whoever ended it, there is nobody to tell
	}
	return nil
}

// readEventFilter reads which events a client wants.
func readEventFilter(raw string) (wants func(event) bool, err error) {
	query, err := readQuery(raw, "user_id", "product_id")
	if err != nil {
		return nil, err
	}
	var wrong invalidInput
	var user, product *int64
	readInto := func(to **int64) func(string) error {
		return func(v string) (err error) { *to, err = readID(v); return err }
	}
	wrong.check(query, "user_id", readInto(&user))
	wrong.check(query, "product_id", readInto(&product))
	return func(e event) bool {
		return (user == nil || e.UserID == *user) && (product == nil || e.ProductID == *product)
	}, wrong.err()
}

// lastSeen answers the place in the log that a client names in Last-Event-ID, and
// whether everything after it is still there.
func (s *server) lastSeen(r *http.Request) (from place, known bool, err error) {
	from, ok := parsePlace(r.Header.Get("Last-Event-ID"))
	if !ok {
		return place{}, false, nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	known, err = s.store.HasPlace(ctx, from)
	return from, known, err
}

// eventStream writes server-sent events to one client.
type eventStream struct {
	w         http.ResponseWriter
	control   *http.ResponseController
	ctx       context.Context // ends with the client
	stopping  <-chan struct{} // closed when the server is to end
	heartbeat *time.Ticker    // the handler stops it
	told      place           // the last that the client was told
	token     tokenWatch
}

// openStream answers the request with the beginning of a stream.
func (s *server) openStream(w http.ResponseWriter, r *http.Request) (*eventStream, error) {
	if err := w.(*recorder).enter(&s.limits.streaming); err != nil {
		return nil, err
	}
	e := &eventStream{w: w, control: http.NewResponseController(w), ctx: r.Context(), stopping: s.stopping, token: s.watchToken(r.Context(), w)}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	e.heartbeat = time.NewTicker(eventsHeartbeat)
	_ = e.write(":\n\n") // so that the client knows at once that it is connected
	return e, nil
}

// follow sends the events that a client wants, from after a place on, until the
// client or the server ends. A client that has fallen behind, at first or later,
// reads the log by itself, at its own pace, until it is at its end.
func (e *eventStream) follow(s *server, from place, wants func(event) bool) error {
	for {
		at, err := e.catchUp(s, from, wants)
		if err == nil {
			from, err = e.live(s, at, wants)
		}
		if !errors.Is(err, errLeftBehind) {
			return err
		}
	}
}

// errLeftBehind says that events came faster than a client took them.
var errLeftBehind = errors.New("the client has fallen behind")

// catchUp sends what the log has after a place, and answers where that ends.
func (e *eventStream) catchUp(s *server, at place, wants func(event) bool) (place, error) {
	for {
		var page []event
		err := e.insist(func(ctx context.Context) (err error) { page, err = s.store.EventsAfter(ctx, at, feedPage); return err })
		if err != nil {
			return at, err
		}
		for _, event := range page {
			if at = event.place; !wants(event) {
				continue
			}
			if err := e.send(event.place, s.encoder.event(event)); err != nil {
				return at, err
			}
		}
		if len(page) < feedPage {
			return at, nil
		}
		if err := e.mark(at); err != nil { // of a page of which the client wanted nothing
			return at, err
		}
		select {
		case <-e.token.expired:
			if err := e.token.renew(); err != nil {
				return at, err
			}
		default:
		}
	}
}

// live sends events as they come, from after a place near the end of the log.
func (e *eventStream) live(s *server, at place, wants func(event) bool) (place, error) {
	l := s.feed.listen(at, wants)
	defer l.leave()
	at, err := e.catchUp(s, at, wants) // what came until the feed listened
	for err == nil {
		var event *event
		if event, err = e.next(l); err == nil && event.after(at) {
			at = event.place
			err = e.send(at, s.encoder.event(*event))
		}
	}
	return at, err
}

// next waits for an event and keeps the connection alive meanwhile.
func (e *eventStream) next(l *listener) (*event, error) {
	for {
		select {
		case event, open := <-l.events:
			if !open {
				return nil, errLeftBehind
			}
			return event, nil
		case <-e.heartbeat.C:
			if err := e.beat(l); err != nil {
				return nil, err
			}
		case <-e.token.expired:
			if err := e.token.renew(); err != nil {
				return nil, err
			}
		case <-e.stopping:
			return nil, errStreamOver
		case <-e.ctx.Done():
			return nil, e.ctx.Err()
		}
	}
}

// insist does what needs the database until it succeeds, and keeps the connection
// alive meanwhile.
func (e *eventStream) insist(do func(context.Context) error) error {
	for {
		ctx, cancel := context.WithTimeout(e.ctx, feedTimeout)
		err := do(ctx)
		cancel()
		if !errors.Is(err, errUnavailable) {
			return err
		}
		select {
		case <-time.After(feedPoll):
		case <-e.heartbeat.C:
			if err := e.write(":\n\n"); err != nil {
				return err
			}
		case <-e.stopping:
			return errStreamOver
		case <-e.ctx.Done():
			return e.ctx.Err()
		}
	}
}

// beat is a sign of life. It also tells the client its place in the log, which it
// would not learn otherwise while nothing happens that it wants.
func (e *eventStream) beat(l *listener) error {
	if at, ok := l.caughtUp(); ok && at.after(e.told) {
		return e.mark(at)
	}
	return e.write(":\n\n")
}

// mark tells a client its place in the log: by itself an id is no event, but what
// the client names when it comes back (section 9.2.6).
func (e *eventStream) mark(at place) error {
	e.told = at
	return e.write(":\nid: " + at.String() + "\n\n")
}

// reset tells a client that it has missed events, and where it goes on.
func (e *eventStream) reset(at place) error {
	return e.send(at, eventMessage{"reset", resetJSON{"events were missed: read again what you show"}})
}

func (e *eventStream) send(at place, m eventMessage) error {
	e.told = at
	data := bytes.TrimSpace(encodeJSON(m.data))
	return e.write("id: " + at.String() + "\nevent: " + m.name + "\ndata: " + string(data) + "\n\n")
}

func (e *eventStream) write(text string) error {
	if err := e.control.SetWriteDeadline(time.Now().Add(eventsWriteTimeout)); err != nil {
		return err
	}
	if _, err := e.w.Write([]byte(text)); err != nil {
		return err
	}
	return e.control.Flush()
}

// eventMessage is an event on the wire.
type eventMessage struct {
	name string
	data any
}

type resetJSON struct {
	Detail string `json:"detail"`
}

// imageEventJSON is the data of an event "image" of any product.
type imageEventJSON struct {
	ProductID int64 `json:"product_id"`
	positionedJSON
}

// productEventJSON is the data of an event "product".
type productEventJSON struct {
	ProductID int64     `json:"product_id"`
	UserID    int64     `json:"user_id"`
	Version   int64     `json:"version"`
	Action    eventKind `json:"action"`
}

// event encodes an event of the log.
func (e encoder) event(of event) eventMessage {
	if of.What == imageChanged {
		return eventMessage{"image", imageEventJSON{of.ProductID, positionedJSON{of.Image.Position, e.imageJSON(of.Image)}}}
	}
	return eventMessage{"product", productEventJSON{of.ProductID, of.UserID, of.Version, of.What}}
}
