package main

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// feedPoll is how often the feed looks for other processes' events, and a
	// stream whether a database that was away is back.
	feedPoll = 200 * time.Millisecond
	// feedPause is the least time between two looks, so that a rush of changes is
	// read in pages and not one by one.
	feedPause = 10 * time.Millisecond
	// feedPage is how many events one query reads.
	feedPage = 200
	// feedTimeout is for one such query.
	feedTimeout = 5 * time.Second
	// feedBacklog is how many events wait for a stream at most. They are shared
	// with the other streams.
	feedBacklog = 1000
)

// eventFeed follows the log for all streams of this process together: it reads
// each event once, and only while somebody listens.
type eventFeed struct {
	store *store
	log   *slog.Logger
	wake  chan struct{} // a token: there may be events, or a first listener

	mu        sync.Mutex
	at        place // what the listeners have been given
	listeners map[*listener]bool
}

// listener gets the events that it wants, in order. Who does not take them in
// time finds the channel closed.
type listener struct {
	feed   *eventFeed
	wants  func(event) bool
	events chan *event
}

func newEventFeed(db *store, log *slog.Logger) *eventFeed {
	return &eventFeed{store: db, log: log, wake: make(chan struct{}, 1), listeners: make(map[*listener]bool)}
}

// Wake says that there may be an event. It never blocks.
func (f *eventFeed) Wake() { poke(f.wake) }

// listen begins to pass events on. All that the log does not have yet will come;
// of what it has, the listener reads what it needs, and passes over what comes to
// it twice. from is a place near the end of the log, for the first to listen.
func (f *eventFeed) listen(from place, wants func(event) bool) *listener {
	l := &listener{feed: f, wants: wants, events: make(chan *event, feedBacklog)}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.listeners) == 0 {
		f.at = from
		f.Wake()
	}
	f.listeners[l] = true
	return l
}

func (l *listener) leave() {
	l.feed.mu.Lock()
	defer l.feed.mu.Unlock()
	delete(l.feed.listeners, l)
}

// caughtUp answers the place up to which the listener has taken all that it
// wants, if nothing is waiting for it. Who was left behind has missed some, also
// once it has emptied its channel.
func (l *listener) caughtUp() (at place, ok bool) {
	l.feed.mu.Lock()
	defer l.feed.mu.Unlock()
	return l.feed.at, len(l.events) == 0 && l.feed.listeners[l]
}

// Run follows the log until ctx ends. While the database is away it stays where
// it is.
func (f *eventFeed) Run(ctx context.Context) error {
	health := healthLog{log: f.log.With("stage", "events")}
	poll := time.NewTicker(feedPoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
		case <-f.wake:
		}
		health.note(ctx, f.catchUp(ctx), "events cannot be read, retrying", "events can be read again")
		_ = sleep(ctx, feedPause)
	}
}

// catchUp passes on what the log has, page by page, if somebody listens.
func (f *eventFeed) catchUp(ctx context.Context) error {
	for {
		at, idle := f.position()
		if idle {
			return nil
		}
		page, err := f.read(ctx, at)
		if err != nil {
			return err
		}
		f.pass(page)
		if len(page) < feedPage {
			return nil
		}
	}
}

func (f *eventFeed) position() (at place, idle bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at, len(f.listeners) == 0
}

func (f *eventFeed) read(ctx context.Context, after place) ([]event, error) {
	ctx, cancel := context.WithTimeout(ctx, feedTimeout)
	defer cancel()
	return f.store.EventsAfter(ctx, after, feedPage)
}

// pass gives a page to the listeners. One whose channel is full is left behind:
// it would hold up the others, or memory.
func (f *eventFeed) pass(page []event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range page {
		for l := range f.listeners {
			if l.wants(e) {
				f.give(l, &e)
			}
		}
		if e.after(f.at) {
			f.at = e.place
		}
	}
}

func (f *eventFeed) give(l *listener, e *event) {
	select {
	case l.events <- e:
	default:
		close(l.events)
		delete(f.listeners, l)
	}
}
