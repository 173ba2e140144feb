package main

import (
	"context"
	"log/slog"
	"sync"
	"testing"
)

// BenchmarkDispatch moves jobs from real rows through the dispatcher and RabbitMQ
// to a consumer whose work is nothing: it acks. One operation is one job, from
// due to acked; jobs/s is what a deployment can start at most.
//
//	go test -run '^$' -bench Dispatch -benchtime 50000x .
func BenchmarkDispatch(b *testing.B) {
	db, err := openPostgres(b.Context(), testDatabase(b))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(db.Close)
	s := newStore(db)
	if err := s.Migrate(b.Context()); err != nil {
		b.Fatal(err)
	}
	insertDueImages(b, s, b.N)
	log := slog.New(slog.DiscardHandler)
	q := newRabbitQueue(testAMQP(b), noRefill, log)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	part := func(run func(context.Context) error) {
		running.Go(func() {
			if err := run(ctx); err != nil {
				b.Error(err)
			}
		})
	}
	part(q.Run)
	eventually(b, "the queue is ready", func() bool { return q.Ping(ctx) == nil })

	const prefetch = 200
	out := make(chan Delivery, prefetch)
	part(func(ctx context.Context) error { return q.Consume(ctx, prefetch, out) })
	b.ResetTimer()
	part(newDispatcher(s, q, log).Run)
	for range b.N {
		if err := (<-out).Ack(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
}

// insertDueImages queues n images, of a product each.
func insertDueImages(b *testing.B, s *store, n int) {
	b.Helper()
	user, err := s.AddUser(b.Context(), "Ann", "ann@example.com")
	if err != nil {
		b.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO products (user_id, product_name, name_folded, product_description, price_cents, created_at, updated_at)
		SELECT $1, 'x', 'x', '', 1, $2, $2 FROM generate_series(1, $3)`,
		`INSERT INTO images (product_id, position, source, run_at) SELECT id, 0, 'https://example.com/' || id, created_at FROM products
		WHERE user_id = $1 AND created_at = $2 ORDER BY id LIMIT $3`,
	} {
		if _, err := s.Exec(b.Context(), sql, user, s.now().Truncate(1e9), n); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := s.Exec(b.Context(), `ANALYZE images`); err != nil {
		b.Fatal(err)
	}
}
