package main

import (
	"context"
	"database/sql"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ncruces/go-sqlite3"
	"github.com/ncruces/go-sqlite3/driver"
)

//go:embed schema_sqlite.sql
var sqliteSchema string

// sqlite is the database of the store on the embedded default. It runs the same
// SQL as postgres, put into SQLite's dialect by sqliteSQL.
//
// SQLite takes one writer at a time. Writes queue for the one connection of
// writer, in Go, rather than poll for SQLite's lock; reads go on beside them.
type sqlite struct {
	writer, reader sqliteDB
}

// sqliteOptions are those of every connection. A commit is on the disk when it
// returns (synchronous=FULL in WAL mode), so it outlives a power cut. Times are
// written with a fixed width, so that they sort as text.
var sqliteOptions = url.Values{
	"_pragma":  {"busy_timeout(10000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(ON)"},
	"_timefmt": {"2006-01-02 15:04:05.000"},
	"_txlock":  {"immediate"},
}

// sqliteReaders is how many reads run at once; each connection has a page cache
// of up to 2 MB.
const sqliteReaders = 8

// sqliteFile is where the database is in DATA_DIR.
func sqliteFile(dir string) string { return filepath.Join(dir, "pms.db") }

// openSQLite opens the database in dir, which it makes if need be.
func openSQLite(dir string) (*sqlite, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.ToSlash(sqliteFile(dir))
	dsn := (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: sqliteOptions.Encode()}).String()
	writer, err := driver.Open(dsn)
	if err != nil {
		return nil, err
	}
	writer.SetMaxOpenConns(1)
	reader, err := driver.Open(dsn + "&mode=ro")
	if err != nil {
		writer.Close()
		return nil, err
	}
	reader.SetMaxOpenConns(sqliteReaders)
	reader.SetMaxIdleConns(sqliteReaders)
	return &sqlite{writer: sqliteDB{DB: writer}, reader: sqliteDB{DB: reader}}, nil
}

// lockDataDir takes a directory for this process, until unlock or its end: the
// cache and the queue in the process know nothing of what another one writes
// there. The lock is SQLite's own, on a file of its own.
func lockDataDir(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file, err := sqlite3.Open(filepath.Join(dir, "pms.lock"))
	if err != nil {
		return nil, err
	}
	if err := file.Exec("PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE"); err != nil {
		file.Close()
		if errors.Is(err, sqlite3.BUSY) {
			err = errors.New("another pms serves from it")
		}
		return nil, err
	}
	return file.Close, nil
}

func (s *sqlite) Close() {
	s.reader.Close()
	s.writer.Close()
}

func (s *sqlite) Ping(ctx context.Context) error { return sqliteError(s.reader.PingContext(ctx)) }

func (s *sqlite) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	return sqliteQuerier{db: &s.writer}.Exec(ctx, query, args...)
}

func (s *sqlite) Query(ctx context.Context, query string, args ...any) (rows, error) {
	return sqliteQuerier{db: &s.reader}.Query(ctx, query, args...)
}

func (s *sqlite) QueryOnce(ctx context.Context, query string, args ...any) (rows, error) {
	r, err := s.reader.QueryContext(ctx, sqliteSQL(query), sqliteArgs(args)...)
	if err != nil {
		return nil, sqliteError(err)
	}
	return sqliteRows{r}, nil
}

func (s *sqlite) InTx(ctx context.Context, do func(querier) error) error {
	tx, err := s.writer.BeginTx(ctx, nil)
	if err != nil {
		return sqliteError(err)
	}
	defer tx.Rollback() // a no-op after the commit
	if err := do(sqliteQuerier{db: &s.writer, tx: tx}); err != nil {
		return err
	}
	return sqliteError(tx.Commit())
}

// Migrate brings the schema to schemaVersion, creating it in an empty database.
// The transaction is immediate, so that of several processes one does it.
//
// It tries again while the database is locked: the first process to open a new
// database turns it to WAL, which busy_timeout does not make the others wait for.
func (s *sqlite) Migrate(ctx context.Context) error {
	deadline := time.Now().Add(migrateTimeout)
	for {
		err := s.migrate(ctx)
		if !errors.Is(err, errUnavailable) || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		_ = sleep(ctx, migratePause)
	}
}

const (
	migratePause   = 20 * time.Millisecond
	migrateTimeout = 10 * time.Second
)

func (s *sqlite) migrate(ctx context.Context) error {
	return s.InTx(ctx, func(tx querier) error {
		return migrate(ctx, tx, func() error {
			_, err := tx.(sqliteQuerier).tx.ExecContext(ctx, sqliteSchema)
			return sqliteError(err)
		})
	})
}

// sqliteDB keeps the statements that it has prepared, by the store's SQL.
type sqliteDB struct {
	*sql.DB
	statements sync.Map // string to *sql.Stmt
}

// prepare answers the statement for a query of the store, which is one of a
// fixed number: all but QueryOnce's are constants.
func (db *sqliteDB) prepare(ctx context.Context, query string) (*sql.Stmt, error) {
	if stmt, ok := db.statements.Load(query); ok {
		return stmt.(*sql.Stmt), nil
	}
	stmt, err := db.PrepareContext(ctx, sqliteSQL(query))
	if err != nil {
		return nil, err
	}
	if other, loaded := db.statements.LoadOrStore(query, stmt); loaded {
		stmt.Close()
		return other.(*sql.Stmt), nil
	}
	return stmt, nil
}

// sqliteQuerier is a database, or one transaction of it, in the store's words.
type sqliteQuerier struct {
	db *sqliteDB
	tx *sql.Tx // nil outside a transaction
}

func (q sqliteQuerier) Exec(ctx context.Context, query string, args ...any) (int64, error) {
	stmt, err := q.statement(ctx, query)
	if err != nil {
		return 0, sqliteError(err)
	}
	result, err := stmt.ExecContext(ctx, sqliteArgs(args)...)
	if err != nil {
		return 0, sqliteError(err)
	}
	return result.RowsAffected()
}

func (q sqliteQuerier) Query(ctx context.Context, query string, args ...any) (rows, error) {
	stmt, err := q.statement(ctx, query)
	if err != nil {
		return nil, sqliteError(err)
	}
	r, err := stmt.QueryContext(ctx, sqliteArgs(args)...)
	if err != nil {
		return nil, sqliteError(err)
	}
	return sqliteRows{r}, nil
}

// statement prepares query, inside the transaction if there is one: the
// writer's only connection is then the transaction's.
func (q sqliteQuerier) statement(ctx context.Context, query string) (*sql.Stmt, error) {
	if q.tx == nil {
		return q.db.prepare(ctx, query)
	}
	return q.tx.PrepareContext(ctx, sqliteSQL(query))
}

type sqliteRows struct{ *sql.Rows }

func (r sqliteRows) Close()     { r.Rows.Close() }
func (r sqliteRows) Err() error { return sqliteError(r.Rows.Err()) }

// rowLock is PostgreSQL's row locking, which SQLite neither has nor needs: its
// write transactions run one after the other.
var rowLock = regexp.MustCompile(`\s+FOR (?:NO KEY )?UPDATE( SKIP LOCKED)?`)

// anyOf is PostgreSQL's test for an element of an array, which goes to SQLite as
// JSON: see sqliteArgs.
var anyOf = regexp.MustCompile(`= ANY\((\$\d+)\)`)

// beyondID ends in the value that an id is compared with in a row, as in
// (price_cents, id) > ($1, $2). SQLite begins in the midst of an index at an id only
// if the value has a collation: an id that is its rowid has none.
var beyondID = regexp.MustCompile(`\bid\) [<>]=? \(\$\d+, \$\d+`)

// sqliteFunctions has SQLite's names of what PostgreSQL calls otherwise. Both
// call the elements of a JSON array value, and a member of one value->>'name'. Every
// event is settled here. OFFSET 0 is for PostgreSQL's planner (listQuery.page), and no
// SQL of SQLite's without a LIMIT.
var sqliteFunctions = strings.NewReplacer("json_array_elements(", "json_each(", "decode(value->>'fingerprint', 'hex')", "unhex(value->>'fingerprint')", "settled_events", "events", " OFFSET 0", "", "$", "?")

// sqliteSQL puts a query of the store into SQLite's dialect. The parameters
// become ?N, since SQLite numbers $N by where it first stands.
func sqliteSQL(query string) string {
	query = beyondID.ReplaceAllString(query, "$0 COLLATE BINARY")
	query = anyOf.ReplaceAllString(rowLock.ReplaceAllString(query, ""), "IN (SELECT value FROM json_each($1))")
	return sqliteFunctions.Replace(query)
}

// sqliteArgs are a query's arguments with its arrays as JSON.
func sqliteArgs(args []any) []any {
	args = slices.Clone(args)
	for n, arg := range args {
		if ids, ok := arg.([]int64); ok {
			text, _ := json.Marshal(ids) // never fails
			args[n] = string(text)
		}
	}
	return args
}

// sqliteError puts what SQLite reports into the store's words.
func sqliteError(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, sqlite3.CONSTRAINT_FOREIGNKEY):
		return errUnknownUser
	case errors.Is(err, sqlite3.BUSY), errors.Is(err, sqlite3.LOCKED), errors.Is(err, sqlite3.IOERR),
		errors.Is(err, sqlite3.FULL), errors.Is(err, sqlite3.CANTOPEN), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, sqlite3.INTERRUPT), errors.Is(err, sql.ErrTxDone), // what a context that ends makes of a statement and of a transaction
		errors.Is(err, sql.ErrConnDone),
		strings.Contains(err.Error(), "no such table: "): // nobody has migrated yet; there is no code for it
		return fmt.Errorf("%w: %w", errUnavailable, err)
	}
	return err
}
