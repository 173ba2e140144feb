package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// importLine is a result line of an import, or its summary.
type importLine struct {
	Line, Rows, Created, Existing, Invalid, Forbidden int
	ID                                                int64
	Status                                            importStatus
	Error                                             *problem
}

// importLines takes the answer to an import apart.
func importLines(t *testing.T, answer []byte) (all []importLine) {
	t.Helper()
	for line := range bytes.Lines(answer) {
		var l importLine
		if err := json.Unmarshal(line, &l); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		all = append(all, l)
	}
	return all
}

// importAll imports rows that are all there already.
func (a *api) importAll(t *testing.T, format rowFormat, rows string, headers ...string) []importLine {
	t.Helper()
	got := a.do(t, "POST", "/products/import", rows, append([]string{"Content-Type", string(format)}, headers...)...)
	if got.Code != http.StatusOK || got.Header().Get("Content-Type") != string(ndjsonRows) {
		t.Fatalf("status %d, headers %v: %s", got.Code, got.Header(), got.Body)
	}
	return importLines(t, got.Body.Bytes())
}

// outcomes tells the lines of an import in short.
func outcomes(lines []importLine) (all []string) {
	for _, l := range lines {
		text := fmt.Sprintf("%d %s", l.Line, l.Status)
		if l.Error != nil {
			text += fmt.Sprintf(" %d", l.Error.Status)
			for _, e := range l.Error.Errors {
				text += " " + e.Field
			}
		}
		all = append(all, text)
	}
	return all
}

// rowOfUser is a row of NDJSON.
func rowOfUser(user int64, name string) string {
	return fmt.Sprintf(`{"user_id":%d,"product_name":%q,"product_price":"1.50","product_images":["https://example.com/a.jpg"]}`+"\n", user, name)
}

func TestImportAnswersEachRowAlone(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	woken := 0
	a.wake = func() { woken++ }
	got := a.importAll(t, ndjsonRows, rowOfUser(1, "a")+"\nhello\n"+
		`{"user_id":1,"user_id":1,"product_name":"x","product_price":1}`+"\n"+
		`{"user_id":1,"product_name":"","product_price":-1}`+"\n"+
		`{"user_id":1,"colour":"red"}`+"\n"+
		"{\"user_id\":1,\"product_name\":\"\xff\",\"product_price\":1}\n"+
		rowOfUser(4711, "b")+strings.Repeat("x", maxRow+1)+"\n"+rowOfUser(1, "c"))
	want := []string{"1 created", "3 invalid 400", "4 invalid 400", "5 invalid 422 product_name product_price", "6 invalid 400 colour",
		"7 invalid 400", "8 invalid 422 user_id", "9 invalid 413", "10 created", "0 complete"}
	if !slices.Equal(outcomes(got), want) {
		t.Errorf("the results are\n%q\nwant\n%q", outcomes(got), want)
	}
	if sum := got[len(got)-1]; sum.Rows != 9 || sum.Created != 2 || sum.Invalid != 7 {
		t.Errorf("the summary is %+v", sum)
	}
	for n, name := range map[int]string{0: "a", 8: "c"} {
		read := a.do(t, "GET", fmt.Sprintf("/products/%d", got[n].ID), "")
		if read.json["product_name"] != name || read.json["product_price"] != 1.5 {
			t.Errorf("product %d: %s", got[n].ID, read.Body)
		}
	}
	if jobs := publishDue(t, a.store); len(jobs) != 2 || jobs[0].RequestID == "" || woken == 0 {
		t.Errorf("the jobs are %v, the dispatcher was woken %d times", jobs, woken)
	}
}

func TestImportsThatAreNone(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	for name, c := range map[string]struct {
		target, kind, body string
		key                string
		status             int
	}{
		"another type":         {"", "application/json", rowOfUser(1, "a"), "k", 415},
		"compressed":           {"", "application/x-ndjson; charset=latin1", rowOfUser(1, "a"), "k", 415},
		"a query":              {"?x=y", "application/x-ndjson", rowOfUser(1, "a"), "k", 400},
		"a key of two lines":   {"", "application/x-ndjson", rowOfUser(1, "a"), "\x7f", 400},
		"CSV without a header": {"", "text/csv", "", "k", 400},
		"CSV of other columns": {"", "text/csv; charset=UTF-8", "a,b\n1,2\n", "k", 400},
	} {
		t.Run(name, func(t *testing.T) {
			got := a.do(t, "POST", "/products/import"+c.target, c.body, "Content-Type", c.kind, "Idempotency-Key", c.key)
			if got.Code != c.status || got.json["status"] != float64(c.status) {
				t.Errorf("status %d: %s", got.Code, got.Body)
			}
		})
	}
	if got := a.importAll(t, "application/jsonl", "\n"); len(got) != 1 || got[0].Status != importComplete || got[0].Rows != 0 {
		t.Errorf("an empty import: %+v", got)
	}
}

// A user's token imports that user's products, an admin's those of all.
func TestImportsAreForTheCallersProducts(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	rows := rowOfUser(1, "a") + "user_id\n" + rowOfUser(2, "b") + rowOfUser(1, "c")
	for token, want := range map[string][]string{
		a.stranger: {"1 forbidden 403", "2 invalid 400", "3 created", "4 forbidden 403", "0 complete"},
		a.admin:    {"1 created", "2 invalid 400", "3 created", "4 created", "0 complete"},
	} {
		if got := outcomes(a.importAll(t, ndjsonRows, rows, "Authorization", token)); !slices.Equal(got, want) {
			t.Errorf("the results are %q, want %q", got, want)
		}
	}
}

// The same import creates nothing twice. Its rows may be mended and added to, and
// a key of an import is none of POST /products.
func TestImportAgainCreatesNothingTwice(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	user := addUser(t, a.store)
	row := func(user int64, name string) string { return fmt.Sprintf("%d,%s,1\n", user, name) }
	rows := "user_id,product_name,product_price\n" + row(1, "a") + row(user, "b") + row(1, "") + row(1, "a")
	first := a.importAll(t, csvRows, rows, "Idempotency-Key", "k")
	if want := []string{"2 created", "3 created", "4 invalid 422 product_name", "5 created", "0 complete"}; !slices.Equal(outcomes(first), want) {
		t.Fatalf("the results are %q, want %q", outcomes(first), want)
	}
	rows = strings.Replace(rows, row(1, ""), row(1, "mended"), 1)
	rows = strings.Replace(rows, row(user, "b"), row(user, "changed"), 1) + row(1, "added")
	again := a.importAll(t, csvRows, rows, "Idempotency-Key", "k")
	if want := []string{"2 existing", "3 invalid 422", "4 created", "5 existing", "6 created", "0 complete"}; !slices.Equal(outcomes(again), want) {
		t.Errorf("the results are %q, want %q", outcomes(again), want)
	}
	if again[0].ID != first[0].ID || again[3].ID != first[3].ID || first[0].ID == first[3].ID {
		t.Errorf("the ids are %d and %d, before %d and %d", again[0].ID, again[3].ID, first[0].ID, first[3].ID)
	}
	if other := a.importAll(t, csvRows, rows, "Idempotency-Key", "l"); other[0].Status != rowCreated {
		t.Errorf("with another key: %+v", other[0])
	}
	if got := a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k"); got.Code != http.StatusCreated {
		t.Errorf("the key of another kind of request: %d %s", got.Code, got.Body)
	}
}

// liveImport is an import whose rows are still being sent.
type liveImport struct {
	*http.Response
	rows    *io.PipeWriter
	answers *json.Decoder
}

// startImport sends the first row; the answer begins with its result.
func startImport(t *testing.T, url, row string, headers ...string) *liveImport {
	t.Helper()
	body, rows := io.Pipe()
	request, err := http.NewRequestWithContext(t.Context(), "POST", url+"/products/import", body)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", string(ndjsonRows))
	for n := 0; n < len(headers); n += 2 {
		request.Header.Set(headers[n], headers[n+1])
	}
	var sending sync.WaitGroup
	sending.Go(func() { io.WriteString(rows, row) })
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	sending.Wait()
	var seen bytes.Buffer
	t.Cleanup(func() {
		response.Body.Close()
		if err := checkExchange(request, []byte(row), response.StatusCode, response.Header, seen.Bytes()); err != nil {
			t.Error(err)
		}
	})
	return &liveImport{response, rows, json.NewDecoder(io.TeeReader(response.Body, &seen))}
}

func (l *liveImport) send(t *testing.T, rows string) {
	t.Helper()
	if _, err := io.WriteString(l.rows, rows); err != nil {
		t.Fatal(err)
	}
}

func (l *liveImport) next(t *testing.T) (line importLine) {
	t.Helper()
	if err := l.answers.Decode(&line); err != nil {
		t.Fatalf("the answer breaks off: %v", err)
	}
	return line
}

func served(t *testing.T, a *api) string {
	web := httptest.NewServer(a.handler)
	t.Cleanup(web.Close)
	return web.URL
}

// awaitBulkEnd waits until no import or export has its place, or its key, any more.
func (a *api) awaitBulkEnd(t *testing.T) {
	t.Helper()
	eventually(t, "imports and exports have ended", func() bool { return a.limits.bulk.taken.Load() == 0 })
}

func TestImportIsAnsweredWhileItIsSent(t *testing.T) {
	t.Parallel()
	live := startImport(t, served(t, newAPI(t)), rowOfUser(1, "a"))
	for n, rows := range []string{"", "\n\n", "\n" + rowOfUser(1, "b") + "\n", rowOfUser(1, "c")[:20], rowOfUser(1, "c")[20:] + rowOfUser(1, "d")[:10]} {
		live.send(t, rows)
		if want := []int64{1, 0, 2, 0, 3}[n]; want != 0 {
			if got := live.next(t); got.ID != want || got.Status != rowCreated {
				t.Fatalf("after %q: %+v, want the id %d", rows, got, want)
			}
		}
	}
	live.send(t, rowOfUser(1, "d")[10:])
	live.rows.Close()
	if last, sum := live.next(t), live.next(t); last.ID != 4 || sum.Status != importComplete || sum.Created != 4 {
		t.Errorf("at the end: %+v, %+v", last, sum)
	}
}

func TestImportIsRefusedWhileAnotherHasItsKey(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.limits.set(limitSettings{MaxRequests: 1})
	url := served(t, a)
	live := startImport(t, url, rowOfUser(1, "a"), "Idempotency-Key", "k")
	again := func(key string) answer {
		return a.do(t, "POST", "/products/import", rowOfUser(1, "a"), "Content-Type", string(ndjsonRows), "Idempotency-Key", key)
	}
	again("k").wantProblem(t, 409)
	again("l").wantProblem(t, 503) // the one place is taken
	a.do(t, "GET", "/products/export", "").wantProblem(t, 503)
	if got := a.do(t, "GET", "/products/1", ""); got.Code != http.StatusOK {
		t.Errorf("a read beside an import: %d", got.Code)
	}
	if events, err := http.Get(url + "/products/1/events"); err != nil || events.StatusCode != http.StatusOK {
		t.Errorf("events beside an import: %v, %v", events, err)
	} else {
		events.Body.Close()
	}
	live.rows.Close()
	io.Copy(io.Discard, live.Body)
	eventually(t, "the key is free", func() bool { return again("k").Code == http.StatusOK })
}

// A client that stops in the middle of a row is told where, and what came before
// is done.
func TestStalledImportIsCut(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.patience = 100 * time.Millisecond
	live := startImport(t, served(t, a), rowOfUser(1, "a")+"\n{")
	if first := live.next(t); first.Status != rowCreated {
		t.Errorf("the whole row: %+v", first)
	}
	end := live.next(t)
	if end.Status != importAborted || end.Line != 3 || end.Created != 1 || end.Error == nil || end.Error.Status != 400 || end.Error.Detail != "the next row was not there within 100ms" {
		t.Errorf("the end: %+v, %+v", end, end.Error)
	}
	if _, err := live.Body.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("behind the end: %v", err)
	}
	if !live.Close {
		t.Error("the connection, on which the rest of the body may come, is kept for another request")
	}
}

func TestImportWithoutAnyRowInTimeIsRefused(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.patience = 100 * time.Millisecond
	body, rows := io.Pipe()
	defer rows.Close()
	response, err := http.Post(served(t, a)+"/products/import", string(ndjsonRows), body)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusBadRequest {
		t.Errorf("status %d", response.StatusCode)
	}
}

// A client that never reads is cut off when its results have no more room, and
// its place is free again.
func TestImportByAClientThatNeverReadsIsCut(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.patience = 200 * time.Millisecond
	conn, err := net.Dial("tcp", strings.TrimPrefix(served(t, a), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprint(conn, "POST /products/import HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nContent-Length: 1000000000\r\n\r\n")
	rows := []byte(strings.Repeat("x\n", 32<<10)) // short rows with long results
	for err == nil {
		_, err = conn.Write(rows)
	}
	a.awaitBulkEnd(t)
}

// What is stored is told, and the rest refused, when the server ends and when the
// database fails; the import may then be sent again.
func TestImportThatIsBrokenOffGoesOnLater(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fail   func(*testing.T, *api, *liveImport)
		mend   func(*testing.T, *api)
		status int
	}{
		"server ends": {
			func(_ *testing.T, a *api, _ *liveImport) { close(a.stopping) },
			func(_ *testing.T, a *api) { a.stopping = make(chan struct{}) }, 503,
		},
		"database fails": {
			func(t *testing.T, a *api, live *liveImport) {
				rename(t, a, "users", "others")
				live.send(t, rowOfUser(1, "c"))
			},
			func(t *testing.T, a *api) { rename(t, a, "others", "users") }, 503,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t)
			live := startImport(t, served(t, a), rowOfUser(1, "a")+rowOfUser(1, "b"), "Idempotency-Key", "k")
			first, second := live.next(t), live.next(t)
			c.fail(t, a, live)
			end := live.next(t)
			if first.Status != rowCreated || end.Status != importAborted || end.Line != 3 || end.Created != 2 || end.Error == nil || end.Error.Status != c.status {
				t.Fatalf("the import ended with %+v", end)
			}
			live.rows.Close()
			a.awaitBulkEnd(t)
			c.mend(t, a)
			again := a.importAll(t, ndjsonRows, rowOfUser(1, "a")+rowOfUser(1, "b")+rowOfUser(1, "c"), "Idempotency-Key", "k")
			if want := []string{"1 existing", "2 existing", "3 created", "0 complete"}; !slices.Equal(outcomes(again), want) || again[0].ID != first.ID || again[1].ID != second.ID {
				t.Errorf("sent again: %+v", again)
			}
		})
	}
}

// What it has stored until then is told.
func TestImportEndsWithItsToken(t *testing.T) {
	t.Parallel()
	a := newTokenAPI(t)
	revoke := a.revocable(t, a.stranger)
	live := startImport(t, served(t, a.api), rowOfUser(2, "a"), "Authorization", a.stranger)
	first := live.next(t)
	revoke()
	if end := live.next(t); first.Status != rowCreated || end.Status != importAborted || end.Line != 2 || end.Created != 1 || end.Error == nil || end.Error.Status != 401 {
		t.Errorf("after %+v the import ended with %+v", first, end)
	}
	live.rows.Close()
}

// An import that is broken off while rows come fast has told of each row before
// the one where it ended.
func TestImportThatIsBrokenOffLeavesNoGap(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	live := startImport(t, served(t, a), rowOfUser(1, "a"))
	go func() { // ends with the connection
		for err := error(nil); err == nil; {
			_, err = io.WriteString(live.rows, strings.Repeat(rowOfUser(1, "b"), 50))
		}
	}()
	told := 0
	for {
		line := live.next(t)
		if line.Line != told+1 {
			t.Fatalf("after line %d: %+v", told, line)
		}
		if line.Status == importAborted {
			break
		}
		if told++; told == 1000 {
			close(a.stopping)
		}
	}
	live.rows.CloseWithError(io.ErrClosedPipe)
}

func rename(t *testing.T, a *api, from, to string) {
	t.Helper()
	if _, err := a.store.Exec(t.Context(), "ALTER TABLE "+from+" RENAME TO "+to); err != nil {
		t.Fatal(err)
	}
}

func TestImportedRowsAreCounted(t *testing.T) {
	a := newTokenAPI(t)
	count := func(outcome importStatus) uint64 { return importedRows[outcome].Get() }
	before := map[importStatus]uint64{}
	for outcome := range importedRows {
		before[outcome] = count(outcome)
	}
	for range 2 {
		a.importAll(t, ndjsonRows, rowOfUser(2, "a")+rowOfUser(1, "b")+"x\n", "Idempotency-Key", "k", "Authorization", a.stranger)
	}
	for outcome, want := range map[importStatus]uint64{rowCreated: 1, rowExisting: 1, rowInvalid: 2, rowForbidden: 2} {
		if got := count(outcome) - before[outcome]; got < want { // others count, too
			t.Errorf("%d rows are counted as %s, want %d", got, outcome, want)
		}
	}
	if page := a.do(t, "GET", "/metrics", "", "Authorization", a.admin).Body.String(); !strings.Contains(page, `pms_import_rows_total{outcome="created"}`) {
		t.Error("the metric is not shown")
	}
}
