package main

import (
	"context"
	"maps"
	"slices"
	"sync"
)

const (
	// maxLoadQueries is how many queries for products run at once. While they do,
	// the ids that are asked for are collected for the next one, so that a rush
	// of readers costs the database a few connections and not one each.
	maxLoadQueries = 2
	// maxLoadBatch is how many products one query reads.
	maxLoadBatch = 100
)

// productLoader is the productReader that asks the database. Readers of one
// product at once share a read, but only one that begins after each of them has
// come: so everybody sees what was committed before.
type productLoader struct {
	store *store
	encoder

	mu      sync.Mutex
	waiting map[int64]*productLoad // asked for, and not yet being read
	running int                    // goroutines of run
}

// productLoad is one product's read. doc and err are set when done is closed.
type productLoad struct {
	done chan struct{}
	doc  document
	err  error
}

func newProductLoader(db *store, enc encoder) *productLoader {
	return &productLoader{store: db, encoder: enc, waiting: make(map[int64]*productLoad)}
}

// Product reads a product. It gives up when ctx ends; the query goes on for those
// who wait for the same. No reader has a timer of its own, which would cost more
// than its part of the query: see read.
func (l *productLoader) Product(ctx context.Context, id int64) (document, error) {
	load := l.join(id)
	select {
	case <-load.done:
		return load.doc, load.err
	case <-ctx.Done():
		return document{}, ctx.Err()
	}
}

func (l *productLoader) join(id int64) *productLoad {
	l.mu.Lock()
	defer l.mu.Unlock()
	load := l.waiting[id]
	if load == nil {
		load = &productLoad{done: make(chan struct{})}
		l.waiting[id] = load
		if l.running < maxLoadQueries {
			l.running++
			go l.run()
		}
	}
	return load
}

// run reads what waits until nothing does.
func (l *productLoader) run() {
	for {
		batch := l.take()
		if batch == nil {
			return
		}
		l.read(batch)
	}
}

// take takes a batch of what waits. When there is none, run is over.
func (l *productLoader) take() (batch map[int64]*productLoad) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) == 0 {
		l.running--
		return nil
	}
	if len(l.waiting) <= maxLoadBatch {
		batch, l.waiting = l.waiting, make(map[int64]*productLoad)
		return batch
	}
	batch = make(map[int64]*productLoad, maxLoadBatch)
	for id, load := range l.waiting {
		if len(batch) == maxLoadBatch {
			break
		}
		batch[id] = load
		delete(l.waiting, id)
	}
	return batch
}

// read answers every load of a batch. While the database hangs it answers those
// too that wait for the next query, which would wait as long for nothing: so each
// reader has its answer within loadTimeout of the query that it waits for.
func (l *productLoader) read(batch map[int64]*productLoad) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	cacheLoads.Inc()
	products, err := l.store.ProductsByID(ctx, slices.Collect(maps.Keys(batch)))
	if err != nil && ctx.Err() != nil {
		fail(l.takeAll(), err)
	}
	if err == nil {
		err = errNotFound // those that the query has not found
	}
	for _, p := range products {
		load := batch[p.ID]
		load.doc = l.product(p)
		close(load.done)
		delete(batch, p.ID)
	}
	fail(batch, err)
}

func fail(loads map[int64]*productLoad, err error) {
	for _, load := range loads {
		load.err = err
		close(load.done)
	}
}

// takeAll takes all that waits.
func (l *productLoader) takeAll() (waiting map[int64]*productLoad) {
	l.mu.Lock()
	defer l.mu.Unlock()
	waiting, l.waiting = l.waiting, make(map[int64]*productLoad)
	return waiting
}
