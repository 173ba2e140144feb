package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

//go:embed schema.sql
var postgresSchema string

// postgres is the database of the store when DATABASE_URL is set.
type postgres struct {
	pool *pgxpool.Pool
	pgQuerier
}

// statementTimeout bounds each statement of a caller that sets no deadline, as
// those that try for ever do not. A server that falls silent without closing its
// connections would otherwise keep them for as long as TCP does, a quarter of an
// hour, and requests would find none that is free.
const statementTimeout = time.Minute

// openPostgres makes a pool that connects when it is first used, so that the
// program starts while PostgreSQL is away. A bad URL is an error at once.
func openPostgres(ctx context.Context, url string) (*postgres, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	config.ConnConfig.ConnectTimeout = 5 * time.Second
	config.PingTimeout = 2 * time.Second // of a connection that was idle
	if !namesPoolSize(url) {
		config.MaxConns = max(config.MaxConns, 8)
	}
	setDefault(config.ConnConfig.RuntimeParams, "application_name", "pms")
	// A transaction of ours holds no lock while it waits for anything but
	// PostgreSQL, so one that stays open is one whose client has died.
	setDefault(config.ConnConfig.RuntimeParams, "idle_in_transaction_session_timeout", "30s")
	// Where the first column of an order has one value, as in a user's list, the
	// planner takes sorting by the others for cheap: it expects many small groups.
	setDefault(config.ConnConfig.RuntimeParams, "enable_incremental_sort", "off")
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	return &postgres{pool: pool, pgQuerier: pgQuerier{pool, statementTimeout}}, nil
}

// namesPoolSize says whether a URL sets how many connections there may be, which
// the parsed settings of the pool do not tell from its default.
func namesPoolSize(url string) bool {
	config, err := pgx.ParseConfig(url)
	return err == nil && config.RuntimeParams["pool_max_conns"] != ""
}

func setDefault(params map[string]string, name, value string) {
	if _, ok := params[name]; !ok {
		params[name] = value
	}
}

func (p *postgres) Close() { p.pool.Close() }

func (p *postgres) Ping(ctx context.Context) error { return pgError(p.pool.Ping(ctx)) }

// QueryOnce has PostgreSQL plan the query for its very arguments: a prepared
// statement may settle on a generic plan, which knows neither how selective a
// filter is nor how small a page.
func (p *postgres) QueryOnce(ctx context.Context, sql string, args ...any) (rows, error) {
	return p.Query(ctx, sql, append([]any{pgx.QueryExecModeCacheDescribe}, args...)...)
}

func (p *postgres) InTx(ctx context.Context, do func(querier) error) error {
	tx, err := p.begin(ctx)
	if err != nil {
		return pgError(err)
	}
	defer p.rollback(ctx, tx) // a no-op after the commit
	if err := do(pgQuerier{tx, p.timeout}); err != nil {
		return err
	}
	ctx, cancel := p.bounded(ctx)
	defer cancel()
	return pgError(tx.Commit(ctx))
}

func (p *postgres) begin(ctx context.Context) (pgx.Tx, error) {
	ctx, cancel := p.bounded(ctx)
	defer cancel()
	return p.pool.Begin(ctx)
}

// rollback happens also when ctx has ended.
func (p *postgres) rollback(ctx context.Context, tx pgx.Tx) {
	ctx, cancel := p.bounded(context.WithoutCancel(ctx))
	defer cancel()
	_ = tx.Rollback(ctx) // a connection on which it fails is not used again
}

// migrationLock is the advisory lock under which one instance at a time looks
// at the schema's version. Any number would do that nobody else uses.
const migrationLock = 0x706d73 // "pms"

// Migrate brings the schema to schemaVersion, creating it in an empty database.
func (p *postgres) Migrate(ctx context.Context) error {
	ctx, cancel := p.bounded(ctx)
	defer cancel()
	return p.InTx(ctx, func(tx querier) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, migrationLock); err != nil {
			return err
		}
		return migrate(ctx, tx, func() error {
			_, err := tx.(pgQuerier).conn.Exec(ctx, postgresSchema, pgx.QueryExecModeSimpleProtocol)
			return pgError(err)
		})
	})
}

// pgQuerier is a pool or a transaction in the store's words.
type pgQuerier struct {
	conn interface {
		Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
		Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	}
	timeout time.Duration // of a statement whose caller sets no deadline
}

// bounded is ctx with a deadline: its own, if it has one.
func (q pgQuerier) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, q.timeout)
}

func (q pgQuerier) Exec(ctx context.Context, sql string, args ...any) (int64, error) {
	ctx, cancel := q.bounded(ctx)
	defer cancel()
	tag, err := q.conn.Exec(ctx, sql, args...)
	return tag.RowsAffected(), pgError(err)
}

func (q pgQuerier) Query(ctx context.Context, sql string, args ...any) (rows, error) {
	ctx, cancel := q.bounded(ctx)
	r, err := q.conn.Query(ctx, sql, args...)
	if err != nil {
		cancel()
		return nil, pgError(err)
	}
	return pgRows{r, cancel}, nil
}

// pgRows are a result that is read within the deadline of its query.
type pgRows struct {
	pgx.Rows
	cancel context.CancelFunc
}

func (r pgRows) Close() {
	r.Rows.Close()
	r.cancel()
}

func (r pgRows) Err() error { return pgError(r.Rows.Err()) }

// PostgreSQL's codes (manual, appendix A). The only reference to no row that a
// client can get wrong is a product's user.
const (
	foreignKeyViolation = "23503"
	undefinedTable      = "42P01" // nobody has migrated yet
)

// pgError puts what pgx reports into the store's words. Whatever is not an
// error in our SQL is an outage: the network's, or a server that starts, stops,
// has no room, does not let us in, or has no schema yet.
func pgError(err error) error {
	var pgErr *pgconn.PgError
	switch {
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, pgx.ErrNoRows):
		return err
	case !errors.As(err, &pgErr):
		return fmt.Errorf("%w: %w", errUnavailable, err)
	case pgErr.Code == foreignKeyViolation:
		return errUnknownUser
	case pgErr.Code == undefinedTable:
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	switch pgErr.Code[:2] {
	case "08", "25", "28", "3D", "40", "53", "55", "57", "58": // by class, in the order of the appendix
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return err
}
