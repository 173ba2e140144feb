package main

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// A server that falls silent keeps nobody for ever who has set no deadline, nor
// the connections that others need.
func TestPostgresThatIsSilentIsGivenUp(t *testing.T) {
	t.Parallel()
	const silence = `SELECT pg_sleep(3600)`
	calls := map[string]func(ctx context.Context, db *postgres) error{
		"a statement": func(ctx context.Context, db *postgres) error { _, err := db.Exec(ctx, silence); return err },
		"a query": func(ctx context.Context, db *postgres) error {
			return queryRow(ctx, db, []any{new(any)}, silence)
		},
		"a transaction": func(ctx context.Context, db *postgres) error {
			return db.InTx(ctx, func(tx querier) error { _, err := tx.Exec(ctx, silence); return err })
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db, err := openPostgres(t.Context(), testDatabase(t))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			db.timeout = 200 * time.Millisecond
			ctx, cancel := context.WithCancel(t.Context()) // of its own, so that it ends if the call does not
			defer time.AfterFunc(10*time.Second, cancel).Stop()
			if err := call(ctx, db); !errors.Is(err, errUnavailable) {
				t.Errorf("%v, want that the database is unavailable", err)
			}
			eventually(t, "its connection is free", func() bool { return db.pool.Stat().AcquiredConns() == 0 })
		})
	}
}

// How many connections there may be is the URL's to say, above and below the default.
func TestPostgresPoolSize(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]int32{"pool_max_conns=3": 3, "pool_max_conns=50": 50, "": max(8, int32(runtime.NumCPU()))} {
		db, err := openPostgres(t.Context(), "postgres://127.0.0.1:1/pms?"+query)
		if err != nil {
			t.Fatal(err)
		}
		if got := db.pool.Config().MaxConns; got != want {
			t.Errorf("%q: %d connections, want %d", query, got, want)
		}
		db.Close()
	}
}

// What PostgreSQL refuses for a reason that passes is an outage; an error in our SQL
// is none.
func TestPostgresErrorsThatPass(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"08006": errUnavailable, // connection_failure
		"25P03": errUnavailable, // idle_in_transaction_session_timeout
		"28P01": errUnavailable, // invalid_password
		"3D000": errUnavailable, // invalid_catalog_name
		"40P01": errUnavailable, // deadlock_detected
		"42P01": errUnavailable, // undefined_table: nobody has migrated yet
		"53300": errUnavailable, // too_many_connections
		"55P03": errUnavailable, // lock_not_available
		"57P01": errUnavailable, // admin_shutdown
		"58030": errUnavailable, // io_error
		"23503": errUnknownUser, // foreign_key_violation
		"22021": nil,            // character_not_in_repertoire
		"23505": nil,            // unique_violation
		"42601": nil,            // syntax_error
	} {
		err := pgError(&pgconn.PgError{Code: code})
		for _, kind := range []error{errUnavailable, errUnknownUser} {
			if errors.Is(err, kind) != (kind == want) {
				t.Errorf("%s: %v, want %v", code, err, want)
			}
		}
	}
}
