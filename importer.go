package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/VictoriaMetrics/metrics"
)

// batchRowsMost is how many rows are stored at once. A batch ends sooner when the
// next row has not come whole yet: a slow client has results soon, of a fast one
// more rows arrive while a batch is stored, and no batch is much larger than the
// buffer of the reader or a single row.
const batchRowsMost = 200

// importer stores the products of an import and writes a result for each row, in
// the order of the rows. It is used once, by one goroutine.
type importer struct {
	store  *store
	rows   *rowReader
	allow  func(user int64) error // nil if products of this user may be created
	await  func()                 // is called before more of the import is waited for
	write  func(result any) error
	flush  func() error   // hands over what was written
	stored func(id int64) // is told of each product that is there now, whose images may be due
	from   origin
	key    string // under which each row is imported once, however often the import is sent; "": none

	summary importSummary
	batch   []batchEntry
	lines   []int // on which the batch's rows begin
}

// importStatus is what came of a row, or of an import.
type importStatus string

const (
	rowCreated   importStatus = "created"
	rowExisting  importStatus = "existing"  // created before, under the same key
	rowInvalid   importStatus = "invalid"   // as a request that creates it would be
	rowForbidden importStatus = "forbidden" // of a user whose products the caller may not create

	importComplete importStatus = "complete"
	importAborted  importStatus = "aborted"
)

// importResult says what came of a row.
type importResult struct {
	Line   int          `json:"line"`
	ID     int64        `json:"id,omitempty"`
	Status importStatus `json:"status"`
	Error  *problem     `json:"error,omitempty"`
}

// importSummary is the last result of an import. One that was aborted says where:
// of the rows from Line on nothing is known.
type importSummary struct {
	Status    importStatus `json:"status"`
	Rows      int          `json:"rows"`
	Created   int          `json:"created"`
	Existing  int          `json:"existing"`
	Invalid   int          `json:"invalid"`
	Forbidden int          `json:"forbidden"`
	Line      int          `json:"line,omitempty"`
	Error     *problem     `json:"error,omitempty"`
}

// refused is how many rows were not imported.
func (s *importSummary) refused() int { return s.Invalid + s.Forbidden }

func (s *importSummary) count(status importStatus) {
	s.Rows++
	switch status {
	case rowCreated:
		s.Created++
	case rowExisting:
		s.Existing++
	case rowInvalid:
		s.Invalid++
	case rowForbidden:
		s.Forbidden++
	}
}

// importedRows counts rows by what came of them.
var importedRows = map[importStatus]*metrics.Counter{
	rowCreated:   newImportCounter(rowCreated),
	rowExisting:  newImportCounter(rowExisting),
	rowInvalid:   newImportCounter(rowInvalid),
	rowForbidden: newImportCounter(rowForbidden),
}

func newImportCounter(outcome importStatus) *metrics.Counter {
	return metrics.NewCounter(fmt.Sprintf(`pms_import_rows_total{outcome=%q}`, outcome))
}

// run imports all rows until ctx ends. An error is why it did not come to their
// end; if there were results before it, the summary has it too.
func (im *importer) run(ctx context.Context) error {
	im.await()
	if err := im.rows.begin(); err != nil {
		return err
	}
	err := im.importRows(ctx)
	if err != nil && im.summary.Rows == 0 {
		return err
	}
	im.summary.Status = importComplete
	if err != nil {
		im.summary.Status, im.summary.Error = importAborted, problemFor(err, im.from)
	}
	return errors.Join(err, im.write(im.summary), im.flush())
}

func (im *importer) importRows(ctx context.Context) error {
	for {
		if len(im.batch) == batchRowsMost || !im.rows.text.ready() {
			if err := im.storeBatch(ctx); err != nil {
				return err
			}
			if im.await(); ctx.Err() != nil {
				im.summary.Line = im.rows.text.lines + 1
				return context.Cause(ctx)
			}
		}
		next, err := im.rows.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil { // the row was waited for, so no other is in hand
			im.summary.Line = next.line
			return cmp.Or(context.Cause(ctx), err)
		}
		im.add(next)
	}
}

func (im *importer) add(r row) {
	e := batchEntry{Product: r.Product, Err: r.problem}
	if e.Err == nil {
		e.Err = im.allow(r.UserID)
	}
	if e.Err == nil && im.key != "" {
		e.Key = rowKey(im.key, r.line)
		sum := sha256.Sum256(encodeJSON(rowOf(r.Product)))
		e.Fingerprint = sum[:]
	}
	im.batch, im.lines = append(im.batch, e), append(im.lines, r.line)
}

// rowKey is the key under which a row is created once. A client's own key has no
// newline, so it is never that of a row.
func rowKey(key string, line int) string { return fmt.Sprintf("import\n%s\n%d", key, line) }

// storeBatch stores the batch and writes its results. A batch that has begun is
// finished, so that what came of its rows is told.
func (im *importer) storeBatch(ctx context.Context) error {
	if len(im.batch) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if err := im.store.CreateProducts(ctx, im.batch, im.from); err != nil {
		im.summary.Line = im.lines[0]
		return err
	}
	for n, e := range im.batch {
		result := e.result(im.lines[n], im.from)
		im.summary.count(result.Status)
		importedRows[result.Status].Inc()
		if result.ID != 0 {
			im.stored(result.ID)
		}
		if err := im.write(result); err != nil {
			return err
		}
	}
	im.batch, im.lines = im.batch[:0], im.lines[:0]
	return im.flush()
}

// result is what came of an entry.
func (e batchEntry) result(line int, from origin) importResult {
	switch {
	case e.Err != nil:
		r := importResult{Line: line, Status: rowInvalid, Error: problemFor(e.Err, from)}
		if r.Error.Status == http.StatusForbidden {
			r.Status = rowForbidden
		}
		return r
	case e.Existed:
		return importResult{Line: line, ID: e.ID, Status: rowExisting}
	}
	return importResult{Line: line, ID: e.ID, Status: rowCreated}
}
