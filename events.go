package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"
)

const (
	// eventsPoll is how often a stream looks whether its product has changed. It
	// looks through the cache, so that a stream costs the database little.
	eventsPoll = 250 * time.Millisecond
	// eventsHeartbeat keeps proxies from closing a stream on which nothing happens.
	eventsHeartbeat = 15 * time.Second
	// eventsWriteTimeout is for one write to a client that does not read.
	eventsWriteTimeout = 10 * time.Second
)

// productEvents streams the changes of a product's images as server-sent events
// (WHATWG HTML, section 9.2), first those that have happened already. It ends
// when no image is pending, when the product is deleted, or with the server.
func (s *server) productEvents(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	doc, err := s.products.Product(r.Context(), id)
	if err != nil {
		return err
	}
	if err := w.(*recorder).enter(&s.limits.streaming); err != nil {
		return err
	}
	stream := eventStream{w: w, control: http.NewResponseController(w)}
	// The server's read timeout is for requests; here it would end the stream.
	if err := stream.control.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	if stream.write(":\n\n") != nil { // so that the client knows at once that it is connected
		return nil
	}
	poll := time.NewTicker(eventsPoll)
	defer poll.Stop()
	var seen map[int]string
	for heartbeat := time.Now(); ; {
		pending := 0
		if seen, pending, err = stream.changes(doc, seen); err != nil {
			return nil // the client has gone
		}
		if pending == 0 {
			stream.send("done", []byte(fmt.Sprintf(`{"version":%d}`, doc.Version)))
			return nil
		}
		if time.Since(heartbeat) > eventsHeartbeat {
			heartbeat = time.Now()
			if stream.write(":\n\n") != nil {
				return nil
			}
		}
		select {
		case <-poll.C:
		case <-s.stopping:
			return nil
		case <-r.Context().Done():
			return nil
		}
		if doc, err = s.nextDocument(r.Context(), doc); err != nil {
			return nil
		}
	}
}

// nextDocument reads the product again, and keeps what it has while the
// database is away.
func (s *server) nextDocument(ctx context.Context, last document) (document, error) {
	doc, err := s.products.Product(ctx, last.ID)
	if errors.Is(err, errUnavailable) {
		return last, ctx.Err()
	}
	return doc, err
}

// eventStream writes server-sent events.
type eventStream struct {
	w       http.ResponseWriter
	control *http.ResponseController
}

// changes sends an event for each image that differs from what was seen of it,
// where a pending image that was never tried is nothing to tell.
func (e eventStream) changes(doc document, seen map[int]string) (now map[int]string, pending int, err error) {
	var p struct {
		Images []json.RawMessage `json:"images"`
	}
	if err := json.Unmarshal(doc.Body, &p); err != nil {
		return nil, 0, err
	}
	now = make(map[int]string, len(p.Images))
	for position, raw := range p.Images {
		var image imageJSON
		if err := json.Unmarshal(raw, &image); err != nil {
			return nil, 0, err
		}
		if image.Status == imagePending {
			pending++
		}
		now[position] = string(raw)
		if seen[position] == string(raw) || seen == nil && image.Status == imagePending && image.Attempts == 0 {
			continue
		}
		data := encodeJSON(struct {
			Position int `json:"position"`
			imageJSON
		}{position, image})
		if err := e.send("image", data); err != nil {
			return nil, 0, err
		}
	}
	return now, pending, nil
}

func (e eventStream) send(event string, data []byte) error {
	return e.write("event: " + event + "\ndata: " + string(bytes.TrimSpace(data)) + "\n\n")
}

func (e eventStream) write(text string) error {
	if err := e.control.SetWriteDeadline(time.Now().Add(eventsWriteTimeout)); err != nil {
		return err
	}
	if _, err := e.w.Write([]byte(text)); err != nil {
		return err
	}
	return e.control.Flush()
}
