package main

import (
	"context"
	"errors"
	"net/http"
	"slices"
)

// productStream tells a client what becomes of one product's images.
//
// It begins with what the product shows, or, for a client that comes back, with
// the events since. Which events have been told it knows by ids alone: those of
// one product's events ascend in the order of its changes, see schema.sql.
type productStream struct {
	*eventStream
	server  *server
	id      int64
	at      place          // what happened to the product up to here has been told
	shown   map[int]string // what was told of each position; nil: nothing
	pending map[int64]bool // images that are not settled, as of at
	product Product        // as it was when it was last read
	fresh   bool           // nothing has been told since
}

// resumeMost is how many events are told one by one to a client that comes back.
const resumeMost = 200

// productEvents streams the changes of a product's images as server-sent events,
// first those that have happened already. It ends when no image is pending, when
// the product is deleted, or with the server.
func (s *server) productEvents(w http.ResponseWriter, r *http.Request) error {
	id, err := pathID(r)
	if err != nil {
		return err
	}
	from, known, err := s.lastSeen(r)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	end, err := s.store.LastEvent(ctx)
	if err != nil {
		return err
	}
	l := s.feed.listen(end, func(e event) bool { return e.ProductID == id }) // before the product is read: so nothing is lost in between
	defer l.leave()
	p := &productStream{server: s, id: id}
	at, err := p.read(ctx)
	if err != nil {
		return err
	}
	unlogged := at == (place{})
	if unlogged {
		at = end
	}
	if p.eventStream, err = s.openStream(w, r); err != nil {
		return err
	}
	defer p.heartbeat.Stop()
	if given := r.Header.Get("Last-Event-ID"); given == "" || given == (place{}).String() {
		err = p.tell(at)
	} else {
		err = p.resume(from, known, at)
	}
	if unlogged { // the event at the end is another product's: what comes of this one may have a smaller id
		p.at.ID = 0
	}
	if err == nil && r.Method != http.MethodHead {
		_ = p.follow(l) // whoever ended it, there is nobody to tell
	}
	return nil
}

// read reads the product as of now, and the place of the last event that it shows.
func (p *productStream) read(ctx context.Context) (at place, err error) {
	p.product, at, err = p.server.store.ProductAt(ctx, p.id)
	return at, err
}

// take takes over what was read last: it is what has been told now.
func (p *productStream) take(at place) {
	p.at, p.fresh, p.pending = at, true, make(map[int64]bool)
	for _, image := range p.product.Images {
		if image.Status == imagePending {
			p.pending[image.ID] = true
		}
	}
}

// tell sends what the product shows at a place and was not told before. If nothing
// was told before, images that are pending and were never tried are left out.
//
// These events have the place before everything, from which a client that has
// seen only some of them begins anew; the last one's place comes after them.
func (p *productStream) tell(at place) error {
	first := p.shown == nil
	if first {
		p.shown = make(map[int]string)
	}
	for _, image := range p.product.Images {
		if first && image.Status == imagePending && image.Attempts == 0 {
			p.shown[image.Position] = p.text(image)
			continue
		}
		if err := p.image(place{}, image); err != nil {
			return err
		}
	}
	p.take(at)
	return p.mark(at)
}

func (p *productStream) text(image Image) string {
	return string(encodeJSON(p.server.encoder.imageJSON(image)))
}

// image sends one image, unless it was told just so.
func (p *productStream) image(at place, image Image) error {
	text := p.text(image)
	if p.shown[image.Position] == text {
		return nil
	}
	p.shown[image.Position] = text
	return p.send(at, eventMessage{"image", positionedJSON{image.Position, p.server.encoder.imageJSON(image)}})
}

// positionedJSON is the data of an event "image" of a known product.
type positionedJSON struct {
	Position int `json:"position"`
	imageJSON
}

// resume goes on after the last event that the client has seen, if that is known.
func (p *productStream) resume(from place, known bool, at place) error {
	p.shown = make(map[int]string)
	if !known {
		if err := p.reset(place{}); err != nil {
			return err
		}
		return p.tell(at)
	}
	var events []event
	err := p.insist(func(ctx context.Context) (err error) {
		events, err = p.server.store.ProductEvents(ctx, p.id, from, at.ID, resumeMost)
		return err
	})
	if err != nil {
		return err
	}
	changed := slices.ContainsFunc(events, func(e event) bool { return e.What != imageChanged }) // its images may be others now
	if changed || len(events) == resumeMost {
		return p.tell(at)
	}
	for _, e := range events {
		if err := p.image(e.place, e.Image); err != nil {
			return err
		}
	}
	p.take(at)
	return nil
}

// follow sends the events of the product until none of its images is pending.
func (p *productStream) follow(l *listener) error {
	for !p.fresh || len(p.pending) > 0 {
		e, err := p.next(l)
		if err != nil {
			return err
		}
		if e.ID <= p.at.ID {
			continue
		}
		if err := p.pass(e); err != nil {
			return err
		}
	}
	return p.send(p.at, eventMessage{"done", doneJSON{p.product.Version}})
}

type doneJSON struct {
	Version int64 `json:"version"`
}

// pass tells what has happened to the product.
func (p *productStream) pass(e *event) error {
	switch e.What {
	case productDeleted:
		return errStreamOver
	case imageChanged:
		if err := p.image(e.place, e.Image); err != nil {
			return err
		}
		p.at, p.fresh = e.place, false
		delete(p.pending, e.Image.ID)
		if e.Image.Status == imagePending {
			p.pending[e.Image.ID] = true
		}
		if len(p.pending) > 0 {
			return nil
		}
	}
	var at place
	err := p.insist(func(ctx context.Context) (err error) { at, err = p.read(ctx); return err })
	switch {
	case errors.Is(err, errNotFound):
		return errStreamOver
	case err != nil:
		return err
	case e.What == imageChanged && at.ID > p.at.ID: // more has happened, and will be told
		return nil
	case e.What == imageChanged:
		p.take(p.at)
		return nil
	}
	return p.tell(at)
}
