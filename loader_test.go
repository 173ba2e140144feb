package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// countingDB counts the queries, and holds each back until it may go on.
type countingDB struct {
	database
	queries atomic.Int64
	begun   chan struct{}
	goOn    chan struct{}
}

func (c *countingDB) Query(ctx context.Context, sql string, args ...any) (rows, error) {
	c.queries.Add(1)
	c.begun <- struct{}{}
	<-c.goOn
	return c.database.Query(ctx, sql, args...)
}

// While maxLoadQueries are under way, whoever comes shares the one after them,
// and so reads what was committed before.
func TestLoaderReadsTogetherWhatIsAskedForMeanwhile(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.do(t, "POST", "/products", shoe)
	db := &countingDB{database: a.store.database, begun: make(chan struct{}, 100), goOn: make(chan struct{})}
	counted := newStore(db)
	l := newProductLoader(counted, a.encoder)
	var readers sync.WaitGroup
	for n := range maxLoadQueries {
		load := l.join(int64(n + 100))
		<-db.begun // each by a query of its own
		readers.Go(func() {
			if <-load.done; !errors.Is(load.err, errNotFound) {
				t.Errorf("a product that is not there: %v", load.err)
			}
		})
	}
	const late = 200
	for n := range late {
		load := l.join(int64(n%2*1000 + 1)) // product 1, and one that is not there
		readers.Go(func() {
			<-load.done
			if found := load.err == nil && load.doc.Version == 2; found != (n%2 == 0) {
				t.Errorf("reader %d: version %d, %v", n, load.doc.Version, load.err)
			}
		})
	}
	a.do(t, "PATCH", "/products/1", `{"product_price":1}`)
	close(db.goOn)
	readers.Wait()
	if got := db.queries.Load(); got != maxLoadQueries+1 {
		t.Errorf("%d queries for %d readers, want %d", got, late, maxLoadQueries+1)
	}
}

func TestLoaderReadsManyInBatches(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	for range 3 {
		a.do(t, "POST", "/products", shoe)
	}
	l := newProductLoader(a.store, a.encoder)
	var readers sync.WaitGroup
	for n := range 3 * maxLoadBatch {
		readers.Go(func() {
			doc, err := l.Product(t.Context(), int64(n+1))
			if found := err == nil && doc.ID == int64(n+1); found != (n < 3) {
				t.Errorf("product %d: %+v, %v", n+1, doc.ID, err)
			}
		})
	}
	readers.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) != 0 {
		t.Errorf("%d loads are left over", len(l.waiting))
	}
}

func TestLoaderLetsAReaderGo(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	db := &countingDB{database: a.store.database, begun: make(chan struct{}, 1), goOn: make(chan struct{})}
	defer close(db.goOn)
	l := newProductLoader(newStore(db), a.encoder)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Product(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a reader that gave up: %v", err)
	}
}

// hungDB does not answer.
type hungDB struct{ database }

func (hungDB) Query(ctx context.Context, _ string, _ ...any) (rows, error) {
	<-ctx.Done()
	return nil, errUnavailable
}

// While the database hangs each reader is answered within loadTimeout, however
// many queries are before its own.
func TestLoaderDoesNotHangWithTheDatabase(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newProductLoader(newStore(hungDB{}), encoder{})
		start := time.Now()
		var readers sync.WaitGroup
		for n := range 10 * maxLoadBatch {
			readers.Go(func() {
				_, err := l.Product(t.Context(), int64(n+1))
				if took := time.Since(start); !errors.Is(err, errUnavailable) || took > loadTimeout {
					t.Errorf("product %d: %v after %v", n+1, err, took)
				}
			})
		}
		readers.Wait()
		<-time.After(time.Hour) // of the bubble's clock: the queries end by themselves
	})
}
