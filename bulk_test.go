package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The import of a catalogue over HTTP, on real servers: every hundredth row is
// wrong, each in another way than the one before, and exactly these are refused.
// "make bulk" takes BULK_ROWS=100000, which must be done within a minute.
func TestBulkImport(t *testing.T) {
	t.Parallel()
	rows := 2000
	if given := os.Getenv("BULK_ROWS"); given != "" {
		n, err := strconv.Atoi(given)
		if err != nil {
			t.Fatal(err)
		}
		rows = n
	}
	api := bulkAPI(t)
	began := time.Now()
	answer := api.importFrom(t, "", func(w io.Writer) {
		for line := 1; line <= rows; line++ {
			io.WriteString(w, bulkRow(line))
		}
	})
	var last importLine
	for line := 1; line <= rows+1; line++ {
		if err := answer.Decode(&last); err != nil {
			t.Fatalf("line %d: %v", line, err)
		}
		want := rowCreated
		if line%100 == 0 {
			want = rowInvalid
		}
		if line <= rows && (last.Line != line || last.Status != want) {
			t.Fatalf("line %d: %+v, want %s", line, last, want)
		}
	}
	took := time.Since(began)
	if last.Status != importComplete || last.Rows != rows || last.Invalid != rows/100 {
		t.Errorf("the summary is %+v", last)
	}
	if took > time.Minute {
		t.Errorf("it took %v", took)
	}
	t.Logf("%d rows in %.1f s: %.0f a second; %.0f MB of memory at most", rows, took.Seconds(), float64(rows)/took.Seconds(), api.peak(t)/1e6)
	began = time.Now()
	if n := strings.Count(textOf(t, api.url+"/products/export"), "\n"); n != rows-rows/100 {
		t.Errorf("%d rows were exported", n)
	}
	t.Logf("exported in %.1f s", time.Since(began).Seconds())
}

// bulkRow is a row as a shop may have it, and every hundredth time one that is
// wrong. Every tenth has an image, which is queued; nobody is there to make it.
func bulkRow(line int) string {
	images := ""
	if line%10 == 0 {
		images = fmt.Sprintf(`"https://example.com/%d.jpg"`, line)
	}
	row := fmt.Sprintf(`{"user_id":1,"product_name":"Trail shoe, model %d","product_description":"Light, grippy, and made for the %dth kilometre.",`+
		`"product_price":%d.%02d,"product_images":[%s]}`+"\n", line, line, line%1000, line%100, images)
	if line%100 != 0 {
		return row
	}
	return []string{
		"not JSON\n", strings.Replace(row, `"user_id":1`, `"user_id":4711`, 1), strings.Replace(row, "product_name", "name", 1), strings.Replace(row, ".0", ".001", 1),
	}[line/100%4]
}

// bulkAPI is an API in a process of its own, on servers of its own.
func bulkAPI(t *testing.T) *instance {
	t.Helper()
	env := environment(map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "DATA_DIR": t.TempDir()})
	seedUser(t, env)
	return startBinary(t, env, "api")
}

// importFrom sends what write writes and answers the results.
func (i *instance) importFrom(t *testing.T, key string, write func(io.Writer)) *json.Decoder {
	t.Helper()
	body, rows := io.Pipe()
	request, err := http.NewRequestWithContext(t.Context(), "POST", i.url+"/products/import", body)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", string(ndjsonRows))
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	go func() { // ends with the request
		w := bufio.NewWriterSize(rows, 64<<10)
		write(w)
		w.Flush()
		rows.Close()
	}()
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	if response.StatusCode != http.StatusOK {
		t.Fatalf("status %d", response.StatusCode)
	}
	return json.NewDecoder(response.Body)
}

// peak is the most memory that the process has had, in bytes.
func (i *instance) peak(t *testing.T) float64 {
	t.Helper()
	return i.metric(t, "process_resident_memory_peak_bytes")
}

// However much is imported and exported takes the program no more than the batch
// in hand: here 54 MB of large rows, half of which are refused.
func TestBulkImportTakesBoundedMemory(t *testing.T) {
	t.Parallel()
	const rows, bound = 600, 16e6
	api := bulkAPI(t)
	importLarge := func(rows int) (sent int) {
		large := `"` + strings.Repeat(`\u00e9`, maxDescriptionLength) + `"` // 60 KB
		answer := api.importFrom(t, "", func(w io.Writer) {
			for line := range rows {
				row := fmt.Sprintf(`{"user_id":1,"product_name":"%d","product_description":%s,"product_price":1}`+"\n", line, large)
				if line%2 == 0 {
					row = strings.Replace(row, `"product_price"`, `"product_description2":`+large+`,"product_price"`, 1)
				}
				sent += len(row)
				io.WriteString(w, row)
			}
		})
		var last importLine
		for last.Status != importComplete {
			if err := answer.Decode(&last); err != nil || last.Status == importAborted {
				t.Fatalf("%+v, %v", last, err)
			}
		}
		if last.Created != rows/2 || last.Invalid != rows/2 {
			t.Errorf("the summary is %+v", last)
		}
		return sent
	}
	importLarge(20)
	before := api.peak(t)
	sent := importLarge(rows)
	exported := len(textOf(t, api.url+"/products/export"))
	grown := api.peak(t) - before
	t.Logf("%.0f MB were imported and %.0f MB exported with %.1f MB on top of %.1f MB", float64(sent)/1e6, float64(exported)/1e6, grown/1e6, before/1e6)
	if grown > bound {
		t.Errorf("memory grew by %.1f MB, %.1f are allowed", grown/1e6, bound/1e6)
	}
}

// An import whose server is killed goes on with another: what was created has the
// id that was told, and nothing is there twice.
func TestImportGoesOnAfterAKill(t *testing.T) {
	t.Parallel()
	env := environment(map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "DATA_DIR": t.TempDir()})
	seedUser(t, env)
	const rows = 3000
	write := func(w io.Writer) {
		for n := range rows {
			io.WriteString(w, rowOfUser(1, fmt.Sprint("p", n)))
		}
	}
	first := startBinary(t, env, "api")
	answer := first.importFrom(t, "k", write)
	told := make(map[int]int64)
	for {
		var l importLine
		if err := answer.Decode(&l); err != nil {
			break // killed
		}
		if told[l.Line] = l.ID; len(told) == 500 {
			go first.kill()
		}
	}
	if len(told) == rows+1 {
		t.Fatal("the import was over before the kill")
	}
	second := startBinary(t, env, "api")
	answer = second.importFrom(t, "k", write)
	var ids []int64
	existing := 0
	for line := 1; line <= rows; line++ {
		var l importLine
		if err := answer.Decode(&l); err != nil {
			t.Fatal(err)
		}
		if l.Line != line || l.ID == 0 || told[line] != 0 && (l.ID != told[line] || l.Status != rowExisting) {
			t.Fatalf("line %d: %+v, and before the kill the id %d", line, l, told[line])
		}
		if l.Status == rowExisting {
			existing++
		}
		ids = append(ids, l.ID)
	}
	if slices.Sort(ids); len(slices.Compact(ids)) != rows {
		t.Error("an id stands twice")
	}
	if n := strings.Count(textOf(t, second.url+"/products/export"), "\n"); n != rows {
		t.Errorf("%d products of %d rows", n, rows)
	}
	t.Logf("%d rows were told before the kill, %d had been created", len(told), existing)
}
