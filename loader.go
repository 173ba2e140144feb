package main

import (
	"context"
	"fmt"
	"sync"
	"time"
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

// Product reads a product. It gives up when ctx ends, and after loadTimeout, since
// it may have to wait for several queries; they go on for those who wait for the
// same. A timer costs a reader less than a context of its own.
func (l *productLoader) Product(ctx context.Context, id int64) (document, error) {
	load := l.join(id)
	late := time.NewTimer(loadTimeout)
	defer late.Stop()
	select {
	case <-load.done:
		return load.doc, load.err
	case <-ctx.Done():
		return document{}, ctx.Err()
	case <-late.C:
		return document{}, fmt.Errorf("read product %d: %w", id, errUnavailable)
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
		batch, ids := l.take()
		if batch == nil {
			return
		}
		l.read(batch, ids)
	}
}

// take takes a batch of what waits. When there is none, run is over.
func (l *productLoader) take() (batch map[int64]*productLoad, ids []int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) == 0 {
		l.running--
		return nil, nil
	}
	if len(l.waiting) <= maxLoadBatch {
		batch, l.waiting = l.waiting, make(map[int64]*productLoad)
		for id := range batch {
			ids = append(ids, id)
		}
		return batch, ids
	}
	batch = make(map[int64]*productLoad, maxLoadBatch)
	for id, load := range l.waiting {
		if len(ids) == maxLoadBatch {
			break
		}
		batch[id], ids = load, append(ids, id)
		delete(l.waiting, id)
	}
	return batch, ids
}

// read answers every load of a batch.
func (l *productLoader) read(batch map[int64]*productLoad, ids []int64) {
	ctx, cancel := context.WithTimeout(context.Background(), loadTimeout)
	defer cancel()
	products, err := l.store.ProductsByID(ctx, ids)
	if err == nil {
		err = errNotFound // those that the query has not found
	}
	for _, p := range products {
		load := batch[p.ID]
		load.doc = l.product(p)
		close(load.done)
		delete(batch, p.ID)
	}
	for _, load := range batch {
		load.err = err
		close(load.done)
	}
}
