package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// POST waits for PostgreSQL's commit and for nothing else: not for a broker that
// is away, and little for workers that keep every core busy.
func TestPostWaitsForTheDatabaseAlone(t *testing.T) {
	t.Parallel() // it compares what it measures in turns
	env := environment(map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "DATA_DIR": t.TempDir(), "LOG_LEVEL": "info"})
	seedUser(t, env)
	away := environment(env, map[string]string{"AMQP_URL": "amqp://guest:guest@127.0.0.1:1"})
	up, down := startBinary(t, env, "api"), startBinary(t, away, "api")
	within(t, 1.2, "with the broker away", func() (base, other time.Duration) { return medianPosts(t, up, down) })

	photos := newPhotoServer(t)
	data := jpegPhoto(t, 3000, 2000)
	busyEnv := environment(env, map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": ""})
	seedUser(t, busyEnv)
	busy := startBinary(t, busyEnv)
	stop := make(chan struct{})
	defer close(stop)
	go func() { // keeps the workers in work
		for n := 0; ; n++ {
			var sources []string
			for range maxImages {
				sources = append(sources, photos.serve("/"+strconv.Itoa(n), data))
			}
			if _, err := busy.send("POST", "/products", map[string]any{"user_id": 1, "product_name": "x", "product_price": 1, "product_images": sources}, nil); err != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
		}
	}()
	eventually(t, "the workers are busy", func() bool { return photos.requests("/0") > 0 })
	within(t, 3, "with the workers busy", func() (base, other time.Duration) { return medianPosts(t, up, busy) })
}

// within checks a ratio of two medians. A machine that does something else
// meanwhile may spoil one measurement, but not each of five.
func within(t *testing.T, limit float64, what string, measure func() (base, other time.Duration)) {
	t.Helper()
	var ratios []string
	for range 5 {
		base, other := measure()
		ratio := float64(other) / float64(base)
		if ratio <= limit {
			t.Logf("POST %s takes %.2f of its usual time (%v)", what, ratio, base)
			return
		}
		ratios = append(ratios, strconv.FormatFloat(ratio, 'f', 2, 64))
	}
	t.Errorf("POST %s takes %s times its usual time, want at most %v", what, strings.Join(ratios, ", "), limit)
}

// medianPosts posts to two instances in turn.
func medianPosts(t *testing.T, one, other *instance) (first, second time.Duration) {
	t.Helper()
	const posts = 80
	body := map[string]any{"user_id": 1, "product_name": "x", "product_price": 1, "product_images": []string{"http://127.0.0.1:1/a.jpg"}}
	var times [2][]time.Duration
	for range posts {
		for n, i := range []*instance{one, other} {
			start := time.Now()
			response, err := i.send("POST", "/products", body, nil)
			if err != nil || response.StatusCode != http.StatusCreated {
				t.Fatal(response, err)
			}
			times[n] = append(times[n], time.Since(start))
		}
	}
	for n := range times {
		slices.Sort(times[n])
	}
	return times[0][posts/2], times[1][posts/2]
}

// On an idle system a worker has an image in hand within 50 ms of the 201: the
// dispatcher is woken, not waited for.
func TestPickupLatency(t *testing.T) {
	// Not parallel: it measures.
	env := environment(serverEnv(t))
	api, worker := startBinary(t, env, "api"), startBinary(t, env, "worker")
	worker.log.await(t, `"msg":"consumer is connected"`)
	const limit = 50 * time.Millisecond
	var medians []time.Duration
	for range 5 { // see within
		median := medianPickup(t, api, worker)
		if median <= limit {
			t.Logf("a worker has an image in hand %v after the 201", median)
			return
		}
		medians = append(medians, median)
	}
	t.Errorf("a worker has an image in hand %v after the 201, want at most %v", medians, limit)
}

// medianPickup is the time from a 201 to the worker's first line about its image.
func medianPickup(t *testing.T, api, worker *instance) time.Duration {
	t.Helper()
	photos := newPhotoServer(t)
	source := photos.serve("/photo", jpegPhoto(t, 20, 20))
	const posts = 15
	times := make([]time.Duration, posts)
	for n := range times {
		p := api.post(t, source)
		answered := time.Now()
		var line struct{ Time time.Time }
		if err := json.Unmarshal([]byte(worker.log.await(t, `"msg":"image received"`, `"product_id":`+strconv.FormatInt(p.ID, 10)+`,`)), &line); err != nil {
			t.Fatal(err)
		}
		times[n] = line.Time.Sub(answered)
		worker.log.await(t, `"msg":"image ready"`, `"product_id":`+strconv.FormatInt(p.ID, 10)+`,`)
	}
	slices.Sort(times)
	return times[posts/2]
}
