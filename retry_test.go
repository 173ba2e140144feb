package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// Full jitter: any wait from none to the whole is as likely as any other, and the
// whole doubles with each try up to maxRetryDelay.
func TestBackoffHasFullJitter(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		base time.Duration
		try  int
		most time.Duration
	}{
		{time.Second, 1, time.Second}, {time.Second, 2, 2 * time.Second}, {time.Second, 6, 32 * time.Second},
		{time.Second, 9, 256 * time.Second}, {time.Second, 10, maxRetryDelay}, {time.Second, 100, maxRetryDelay},
		{maxRetryDelay, 1, maxRetryDelay}, {maxRetryDelay, 60, maxRetryDelay}, {time.Millisecond, 1, time.Millisecond},
		{time.Millisecond, 60, maxRetryDelay}, {1<<34 + 1, 31, maxRetryDelay},
	} {
		const draws, parts = 4000, 4
		var hits [parts]int
		for range draws {
			wait := backoff(c.base, c.try)
			if wait < 0 || wait > c.most {
				t.Fatalf("backoff(%v, %d) = %v, want at most %v", c.base, c.try, wait, c.most)
			}
			hits[min(int(wait*parts/c.most), parts-1)]++
		}
		for part, n := range hits { // 1000 expected, with a standard deviation of 27
			if n < 800 || n > 1200 {
				t.Errorf("backoff(%v, %d): %d of %d waits in quarter %d", c.base, c.try, n, draws, part+1)
			}
		}
	}
}

// The least wait that a host asks for is kept, and only as long as an hour.
func TestRetryAfterIsKeptInTheRow(t *testing.T) {
	t.Parallel()
	text := func(s string) func() string { return func() string { return s } }
	date := func(in time.Duration) func() string {
		return func() string { return time.Now().Add(in).UTC().Format(http.TimeFormat) }
	}
	for name, c := range map[string]struct {
		header func() string
		least  time.Duration
	}{
		"seconds": {text("120"), 2 * time.Minute}, "too many seconds": {text("999999999999999999999"), maxRetryAfter},
		"date": {date(10 * time.Minute), 10 * time.Minute}, "late date": {date(90 * time.Minute), maxRetryAfter},
		"nonsense": {text("soon"), 0}, "past": {text("Mon, 02 Jan 2006 15:04:05 GMT"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", c.header())
				w.WriteHeader(http.StatusServiceUnavailable)
			}))
			t.Cleanup(host.Close)
			dir := t.TempDir()
			api := start(t, environment(map[string]string{"DATA_DIR": dir, "RETRY_ATTEMPTS": "100"}))
			before := time.Now()
			p := api.post(t, host.URL+"/a")
			api.log.await(t, "image will be tried again")
			db, err := openSQLite(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			var attempts int
			var runAt *time.Time
			err = queryRow(t.Context(), db, []any{&attempts, &runAt}, `SELECT attempts, run_at FROM images WHERE product_id = $1`, p.ID)
			if err != nil || attempts < 1 {
				t.Fatalf("%d attempts, %v", attempts, err)
			}
			if c.least == 0 {
				return
			}
			if wait := runAt.Sub(before); attempts != 1 || wait < c.least-2*time.Second || wait > c.least+30*time.Second {
				t.Errorf("after %d attempts it waits %v, want %v", attempts, wait, c.least)
			}
		})
	}
}

// A host that does not answer cannot keep images of other hosts from being made,
// however many of its own were there first; nor do those lose an attempt.
func TestSlowHostCannotTakeAllWorkers(t *testing.T) {
	t.Parallel()
	eachDeployment(t, func(t *testing.T, api *instance) {
		slow, quick := newPhotoServer(t), newPhotoServer(t)
		release := slow.holdBack("/held")
		defer release()
		slow.serve("/held", jpegPhoto(t, 40, 40))
		var held []shown
		begin := time.Now()
		for range 5 {
			sources := make([]string, maxImages)
			for n := range sources {
				sources[n] = slow.URL + "/held?" + fmt.Sprint(n)
			}
			held = append(held, api.post(t, sources...))
		}
		eventually(t, "the slow host is busy", func() bool { return slow.mostHeld("/held") == maxHostDownloads })
		if p := api.settled(t, api.post(t, quick.serve("/a", jpegPhoto(t, 50, 50))).ID); p.Images[0].Status != "ready" {
			t.Errorf("the image of another host: %+v", p.Images[0])
		}
		if n := slow.mostHeld("/held"); n != maxHostDownloads {
			t.Errorf("%d downloads at once from the slow host", n)
		}
		patient := time.Since(begin) < headerTimeout // else some downloads have been given up
		release()
		for _, p := range held {
			for n, image := range api.settled(t, p.ID).Images {
				if image.Status != "ready" || image.Attempts != 0 && patient {
					t.Fatalf("image %d of the slow host: %+v", n, image)
				}
			}
		}
	})
}
