package main

import (
	"bytes"
	"errors"
	"fmt"
	"image"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// reprocessAll queues all images of a product anew.
func reprocessAll(t *testing.T, s *store, id int64) (queued, version int64) {
	t.Helper()
	queued, version, err := s.ReprocessProduct(t.Context(), id, origin{RequestID: "req-2"}, always)
	if err != nil {
		t.Fatal(err)
	}
	return queued, version
}

// What has never been made is a dead letter, for a person to replay.
func TestStoreReprocessLeavesDeadLettersAlone(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		bury(t, s, job, permanent("http_404", "404 Not Found"))
		if queued, _ := reprocessAll(t, s, p.ID); queued != 0 {
			t.Errorf("queued %d of the product", queued)
		}
		if queued, _, err := s.Reprocess(t.Context(), []int64{job.ID}, origin{}); queued != 0 || err != nil {
			t.Errorf("queued %d by its id, %v", queued, err)
		}
	})
}

func TestStoreReprocessKeepsTheOldUntilTheNewIsSettled(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a", "b")
		jobs := inOrderOfID(publishDue(t, s))
		finish(t, s, jobs[0], "main", "800", "320")
		if queued, version := reprocessAll(t, s, p.ID); queued != 1 || version != 3 {
			t.Errorf("queued %d anew, version %d; want the one that is made, version 3", queued, version)
		}
		if queued, version := reprocessAll(t, s, p.ID); queued != 0 || version != 0 {
			t.Errorf("queued %d again, version %d", queued, version)
		}
		got, _ := s.Product(t.Context(), p.ID)
		if image := got.Images[0]; got.Version != 3 || image.Status != imagePending || !slices.Equal(image.keys(), []string{"main", "800", "320"}) || image.Width != 20 {
			t.Errorf("meanwhile the product is %+v", got)
		}
		again := publishDue(t, s)
		if len(again) != 1 || again[0].ID != jobs[0].ID || again[0].RequestID != "req-2" {
			t.Fatalf("published %+v", again)
		}
		finish(t, s, again[0], "main", "640") // the image comes out the same, its variants do not
		wantGarbage(t, s, "while pages still show them")
		advance(s, overtakenTime)
		wantGarbage(t, s, "after that", "320", "800")
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "of objects in use")
	})
}

// What an image refers to is no garbage while the same is uploaded once more,
// though that should never be settled.
func TestStoreReprocessThatFailsKeepsTheOld(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		finish(t, s, publishDue(t, s)[0], "main", "320")
		reprocessAll(t, s, p.ID)
		job := publishDue(t, s)[0]
		reserve(t, s, job, "main", "640")
		bury(t, s, job, permanent("http_404", "404 Not Found"))
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "of a try that failed", "640")
		got, _ := s.Product(t.Context(), p.ID)
		if image := got.Images[0]; image.Status != imageFailed || !slices.Equal(image.keys(), []string{"main", "320"}) {
			t.Errorf("after the failure: %+v", image)
		}
		if err := s.DiscardDead(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		if queued, _ := reprocessAll(t, s, p.ID); queued != 1 {
			t.Errorf("queued %d after the dead letter was discarded", queued)
		}
		if image, err := s.PendingImage(t.Context(), job.ID); err != nil || image.Attempts != 0 || image.ErrorCode != "" {
			t.Errorf("queued as %+v, %v", image, err)
		}
		finish(t, s, publishDue(t, s)[0], "main", "640")
		deleteProduct(t, s, p.ID)
		advance(s, overtakenTime)
		wantGarbage(t, s, "with the product", "320", "640", "main")
	})
}

// A product that is deleted or an image that is replaced while it is made again
// takes old and new objects along.
func TestStoreDropsAnImageThatIsMadeAgain(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		finish(t, s, publishDue(t, s)[0], "main", "320")
		reprocessAll(t, s, p.ID)
		job := publishDue(t, s)[0]
		reserve(t, s, job, "main", "640")
		deleteProduct(t, s, p.ID)
		if _, err := s.SettleReady(t.Context(), job, imageWith("main", "640")); !errors.Is(err, errNotFound) {
			t.Errorf("settled: %v", err)
		}
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "with the product", "320", "640", "main")
	})
}

// Many who press the button at once queue each image once.
func TestReprocessesAtOnceAreOne(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		const products, pressing = 6, 6
		for range products {
			create(t, s, "a", "b")
		}
		for _, job := range publishDue(t, s) {
			finish(t, s, job, fmt.Sprintf("main %d", job.ID), fmt.Sprintf("320 %d", job.ID))
		}
		var group sync.WaitGroup
		var mu sync.Mutex
		total, told := 0, make(map[int64]int)
		for n := range pressing {
			group.Go(func() {
				var queued int
				var err error
				if n%2 == 0 {
					queued, err = reprocess(t.Context(), s, madeFilter{}, origin{}, 0, func(id, _ int64) { mu.Lock(); told[id]++; mu.Unlock() })
				} else {
					for id := int64(products); id > 0 && err == nil; id-- { // against the order of the others
						var some, version int64
						some, version, err = s.ReprocessProduct(t.Context(), id, origin{}, always)
						queued += int(some)
						if version > 0 {
							mu.Lock()
							told[id]++
							mu.Unlock()
						}
					}
				}
				mu.Lock()
				defer mu.Unlock()
				total += queued
				if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if jobs := publishDue(t, s); total != 2*products || len(jobs) != 2*products || len(told) != products {
			t.Errorf("queued %d, published %d, want %d; caches were told of %d products", total, len(jobs), 2*products, len(told))
		}
		for id := range int64(products) {
			if got, err := s.Product(t.Context(), id+1); err != nil || got.Version != 4 || told[id+1] != 1 {
				t.Errorf("product %d has version %d, caches were told %d times, %v", id+1, got.Version, told[id+1], err)
			}
		}
	})
}

func TestReprocessOverHTTP(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true
	other := addUser(t, a.store)
	owner, stranger, admin := tokenOf(t, a, caller{1, false}), tokenOf(t, a, caller{other, false}), tokenOf(t, a, caller{other, true})
	p := create(t, a.store, "https://a.example/a", "https://a.example/b")
	jobs := inOrderOfID(publishDue(t, a.store))
	finish(t, a.store, jobs[0], "main", "320")
	path := fmt.Sprintf("/products/%d/images/reprocess", p.ID)
	a.do(t, "POST", path, "").wantProblem(t, 401)
	a.do(t, "POST", path, "", "Authorization", stranger).wantProblem(t, 403)
	a.do(t, "POST", "/products/99/images/reprocess", "", "Authorization", admin).wantProblem(t, 404)
	a.do(t, "POST", "/products/x/images/reprocess", "", "Authorization", admin).wantProblem(t, 404)
	a.do(t, "POST", path+"?all=1", "", "Authorization", owner).wantProblem(t, 400)
	a.do(t, "POST", path, "", "Authorization", owner, "If-Match", `"1"`).wantProblem(t, 412)
	a.do(t, "GET", path, "", "Authorization", owner).wantProblem(t, 405)
	if jobs := publishDue(t, a.store); len(jobs) != 0 {
		t.Errorf("refused, but queued: %v", jobs)
	}
	for n, c := range []struct {
		who  string
		want float64
	}{{owner, 1}, {owner, 0}, {admin, 0}} {
		if got := a.do(t, "POST", path, "", "Authorization", c.who); got.Code != 202 || got.json["reprocessed"] != c.want {
			t.Errorf("call %d: %d %s, want %v", n, got.Code, got.Body, c.want)
		}
	}
	shown := a.do(t, "GET", fmt.Sprintf("/products/%d", p.ID), "", "Authorization", stranger)
	if body := shown.Body.String(); !strings.Contains(body, `"compressed_product_images":["https://cdn.example/main",null]`) ||
		!strings.Contains(body, `"variants":[{"width":10,"url":"https://cdn.example/320","bytes":50}]`) {
		t.Errorf("meanwhile %s", body)
	}
}

func TestReprocessCommand(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := storeIn(t, dir)
	other := addUser(t, s)
	for n, p := range []Product{
		{UserID: 1, Images: sourcesOf("https://a.example/1", "https://b.example/2")},
		{UserID: other, Images: sourcesOf("https://a.example/3")},
		{UserID: 1, Images: sourcesOf("https://b.example:8443/4", "https://b.example/pending")},
	} {
		p.Name = fmt.Sprint(n)
		if _, err := s.CreateProduct(t.Context(), p, origin{}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, job := range publishDue(t, s) {
		if job.ID < 5 {
			finish(t, s, job, fmt.Sprint("main ", job.ID))
		}
	}
	env := environment(map[string]string{"DATA_DIR": dir})
	for _, c := range []struct {
		args string
		code int
		says string // "" is anything
	}{
		{"", 2, ""}, {"x", 2, ""}, {"0", 2, ""}, {"-all 1", 2, ""}, {"-all -host a.example", 2, ""}, {"-host a.example 1", 2, ""},
		{"-all -rate -1", 2, ""}, {"-host a/b", 2, ""}, {"-user x", 2, ""}, {"-code http_404", 2, ""}, {"99", 1, ""}, {"1 99", 1, ""},
		{"-all -dry-run", 0, "would reprocess 4\n"},
		{"-dry-run 1 3", 0, "would reprocess 3\n"},
		{"-dry-run -host b.example", 0, "would reprocess 2\n"},
		{"-dry-run -host b.example:8443", 0, "would reprocess 1\n"},
		{fmt.Sprint("-dry-run -user ", other), 0, "would reprocess 1\n"},
		{"-dry-run -host a.example -user 1", 0, "would reprocess 1\n"},
		{"-host a.example -rate 1000", 0, "reprocessed 2\n"},
		{"1 2", 0, "reprocessed 1\n"},
		{"-all", 0, "reprocessed 1\n"},
		{"-all", 0, "reprocessed 0\n"},
	} {
		out, code := runCommand(t, env, append([]string{"reprocess"}, strings.Fields(c.args)...)...)
		if code != c.code || c.says != "" && out != c.says {
			t.Errorf("reprocess %s: exit code %d, %q", c.args, code, out)
		}
	}
	if jobs := publishDue(t, s); len(jobs) != 4 {
		t.Errorf("queued %v", jobs)
	}
}

func TestReprocessKeepsItsRate(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a", "b", "c", "d", "e")
		for _, job := range publishDue(t, s) {
			finish(t, s, job, fmt.Sprint(job.ID))
		}
		start := time.Now()
		if n, err := reprocess(t.Context(), s, madeFilter{}, origin{}, 20, func(int64, int64) {}); err != nil || n != 5 {
			t.Fatalf("queued %d, %v", n, err)
		}
		if took := time.Since(start); took < 4*time.Second/20 {
			t.Errorf("5 at 20 a second took %v", took)
		}
	})
}

// urlsOf are those of an image and its variants.
func urlsOf(p shown, n int) []string {
	urls := []string{p.Images[n].URL}
	for _, v := range p.Images[n].Variants {
		urls = append(urls, v.URL)
	}
	return urls
}

// Images are made with new widths after the setting has changed, by command and by
// request, and no reader misses one meanwhile: not in the product, nor at its URL.
func TestReprocessAfterASettingChanged(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]func(t *testing.T) (map[string]string, bool){
		"embedded": func(t *testing.T) (map[string]string, bool) {
			port, err := freePort() // of its own, so that the old URLs hold after the restart
			if err != nil {
				t.Fatal(err)
			}
			return map[string]string{"DATA_DIR": t.TempDir(), "LISTEN_ADDR": fmt.Sprint("127.0.0.1:", port)}, false
		},
		"apart": func(t *testing.T) (map[string]string, bool) { return serverEnv(t), true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env, apart := settings(t)
			env = environment(env, map[string]string{"CACHE_TTL": "24h", "IMAGE_VARIANTS": "80,200"})
			run := func() (api *instance, stop func()) {
				if !apart {
					api := start(t, env)
					return api, func() { api.stop() }
				}
				worker, api := start(t, env, "worker"), start(t, env, "api")
				return api, func() { api.stop(); worker.stop() }
			}
			photos := newPhotoServer(t)
			api, stop := run()
			first := api.settled(t, api.post(t, photos.serve("/wide", jpegPhoto(t, 300, 150)), photos.serve("/narrow", jpegPhoto(t, 100, 50))).ID)
			wantVariants(t, first, 0, 200, 80)
			wantVariants(t, first, 1, 80)
			stop()

			env["IMAGE_VARIANTS"], env["IMAGE_QUALITY"] = "50,80", "20"
			api, _ = run()
			release := photos.holdBack("/wide")
			defer release()
			if out, code := runCommand(t, env, "reprocess", fmt.Sprint(first.ID)); code != 0 || out != "reprocessed 2\n" {
				t.Fatalf("reprocess: %d %s", code, out)
			}
			eventually(t, "the image is made again", func() bool { return photos.requests("/wide") == 2 })
			if !apart { // the cache in the process has not been told by the command
				api.call(t, "PATCH", fmt.Sprintf("/products/%d", first.ID), map[string]any{"product_price": 1}, nil)
			}
			eventually(t, "it is shown as pending", func() bool { return api.get(t, first.ID).Images[0].Status == "pending" })
			wantVariants(t, api.get(t, first.ID), 0, 200, 80)
			var again reprocessedJSON
			api.call(t, "POST", fmt.Sprintf("/products/%d/images/reprocess", first.ID), nil, &again)
			if again.Reprocessed > 1 {
				t.Errorf("the image that is in work was queued again: %d", again.Reprocessed)
			}
			release()
			second := api.settled(t, first.ID)
			wantVariants(t, second, 0, 80, 50)
			wantVariants(t, second, 1, 80, 50)
			if second.Images[0].URL == first.Images[0].URL || second.Images[0].Bytes >= first.Images[0].Bytes {
				t.Errorf("at a lower quality %+v became %+v", first.Images[0], second.Images[0])
			}
			for _, url := range append(urlsOf(first, 0), urlsOf(first, 1)...) {
				if status := statusOf(url); status != 200 {
					t.Errorf("%s, which pages may still show: %d", url, status)
				}
			}
		})
	}
}

// wantVariants fetches an image and its variants, which must be of these widths.
func wantVariants(t *testing.T, p shown, n int, widths ...int) {
	t.Helper()
	made := p.Images[n]
	if statusOf(made.URL) != 200 || len(made.Variants) != len(widths) {
		t.Fatalf("image %d is %+v, want variants of %v", n, made, widths)
	}
	for i, v := range made.Variants {
		_, data := download(t, v.URL)
		config, _, err := image.DecodeConfig(bytes.NewReader(data))
		if err != nil || v.Width != widths[i] || config.Width != widths[i] || config.Height != (widths[i]+1)/2 || v.Bytes != len(data) {
			t.Errorf("variant %+v is %d × %d in %d bytes, want it %d wide", v, config.Width, config.Height, len(data), widths[i])
		}
	}
}

// A process that is killed between the uploads of an image's variants leaves
// nothing behind that is not known as garbage, also if the image comes out
// otherwise when it is made the next time.
func TestKilledBetweenVariantUploads(t *testing.T) {
	t.Parallel()
	for _, killedAt := range []int{2, 3} {
		t.Run(fmt.Sprint("upload ", killedAt), func(t *testing.T) {
			t.Parallel()
			bucket := testS3(t)
			hung := make(chan struct{})
			front := slowUploads(t, bucket.Endpoint, killedAt, hung)
			dir := t.TempDir()
			env := environment(bucketEnv(bucket), map[string]string{"DATA_DIR": dir, "IMAGE_VARIANTS": "80,200"})
			photos := newPhotoServer(t)
			first := startBinary(t, environment(env, map[string]string{"AWS_ENDPOINT_URL_S3": front}))
			p := first.post(t, photos.serve("/photo", jpegPhoto(t, 300, 150)))
			select {
			case <-hung:
			case <-time.After(settleTime):
				t.Fatal("the upload never came")
			}
			first.kill()
			left := bucket.objects(t)
			if len(left) != killedAt-1 {
				t.Fatalf("stored before the kill: %v", left)
			}

			env["IMAGE_QUALITY"] = "30"
			second := startBinary(t, env)
			wantVariants(t, second.settled(t, p.ID), 0, 200, 80)
			if err := second.stop(); err != nil {
				t.Error(err)
			}
			collectOrphans(t, dir, env)
			got, err := storeIn(t, dir).Product(t.Context(), p.ID)
			if err != nil {
				t.Fatal(err)
			}
			stored, wanted := slices.Sorted(slices.Values(bucket.objects(t))), slices.Sorted(slices.Values(got.Images[0].keys()))
			if !slices.Equal(stored, wanted) || slices.Contains(stored, left[0]) {
				t.Errorf("stored %v, referred to are %v; %v was there at the kill", stored, wanted, left)
			}
		})
	}
}

// collectOrphans deletes what is garbage after the grace has passed.
func collectOrphans(t *testing.T, dir string, env map[string]string) {
	t.Helper()
	s := storeIn(t, dir)
	advance(s, 2*garbageGrace)
	storage, err := newS3Blobs(t.Context(), env["S3_BUCKET"], "", func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CollectGarbage(t.Context(), 100, storage.Delete); err != nil {
		t.Fatal(err)
	}
}

// slowUploads stands before an S3 server. The nth upload, and those after it, never
// end; hung is then closed.
func slowUploads(t *testing.T, endpoint string, n int, hung chan<- struct{}) (front string) {
	t.Helper()
	target, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	uploads := 0
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target); r.Out.Host = r.In.Host }} // the signature covers Host
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			mu.Lock()
			uploads++
			now := uploads
			mu.Unlock()
			if now == n {
				close(hung)
			}
			if now >= n {
				io.Copy(io.Discard, r.Body) // only then the server notices that the client is gone
				<-r.Context().Done()
				return
			}
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(web.Close)
	return web.URL
}
