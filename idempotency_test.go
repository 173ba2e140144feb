package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// One Idempotency-Key, 16 requests at once, on two API processes: one product.
// A process refuses what it has in work itself; what the other has in work waits
// in the database, and is answered alike.
func TestIdempotencyKeyOnTwoProcesses(t *testing.T) {
	t.Parallel()
	env := environment(map[string]string{"DATABASE_URL": testDatabase(t), "AMQP_URL": testAMQP(t), "DATA_DIR": t.TempDir()})
	seedUser(t, env)
	apis := []*instance{startBinary(t, env, "api"), startBinary(t, env, "api")}
	const rounds, requests = 5, 16
	for round := range rounds {
		key := strings.Repeat("k", round+1)
		var answers [requests]string
		var statuses [requests]int
		var group sync.WaitGroup
		for n := range requests {
			group.Go(func() { statuses[n], answers[n] = postOnce(t, apis[n%2].url, key, shoe) })
		}
		group.Wait()
		first := ""
		for n, status := range statuses {
			switch {
			case status == http.StatusCreated && first == "":
				first = answers[n]
			case status == http.StatusCreated && answers[n] != first, status != http.StatusCreated && status != http.StatusConflict:
				t.Errorf("status %d: %s, want 409 or 201 with %s", status, answers[n], first)
			}
		}
		if status, again := postOnce(t, apis[round%2].url, key, shoe); status != http.StatusCreated || again != first {
			t.Errorf("afterwards: %d %s, want %s", status, again, first)
		}
		if status, _ := postOnce(t, apis[round%2].url, key, shoe+" "); status != http.StatusUnprocessableEntity {
			t.Errorf("with another body: %d", status)
		}
	}
	var page struct{ Items []shown }
	apis[0].call(t, "GET", "/products", nil, &page)
	if len(page.Items) != rounds {
		t.Errorf("%d products of %d keys", len(page.Items), rounds)
	}
}

// While a request is in work, another with its key is refused; one with the same
// key for another user is not, nor one afterwards.
func TestIdempotencyKeyInFlight(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	user := addUser(t, a.store)
	working, release := make(chan struct{}), make(chan struct{})
	a.wake = func() { working <- struct{}{}; <-release }
	var first sync.WaitGroup
	first.Go(func() {
		if got := a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k"); got.Code != http.StatusCreated {
			t.Errorf("the request in work: %d %s", got.Code, got.Body)
		}
	})
	<-working
	a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k").wantProblem(t, 409)
	a.wake = func() {}
	theirs := strings.Replace(shoe, `"user_id": 1`, fmt.Sprintf(`"user_id": %d`, user), 1)
	if got := a.do(t, "POST", "/products", theirs, "Idempotency-Key", "k"); got.Code != http.StatusCreated {
		t.Errorf("another user's: %d %s", got.Code, got.Body)
	}
	close(release)
	first.Wait()
	if got := a.do(t, "POST", "/products", shoe, "Idempotency-Key", "k"); got.Code != http.StatusCreated || got.Header().Get("Location") != "/products/1" {
		t.Errorf("afterwards: %d %v", got.Code, got.Header())
	}
}

func postOnce(t *testing.T, url, key, body string) (status int, answer string) {
	request, err := http.NewRequest("POST", url+"/products", strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Idempotency-Key", key)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response.StatusCode, string(data)
}
