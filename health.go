package main

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// part is something that the program works with and that may be away.
type part struct {
	name     string
	required bool // without it no request can be answered
	ping     func(context.Context) error
}

// pingTimeout is how long a part may take to answer before it counts as away.
const pingTimeout = 2 * time.Second

func (s *server) healthz(w http.ResponseWriter, r *http.Request) error {
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	return nil
}

// readyz answers 503 when requests would fail. A part that is away and not
// required makes the program degraded: products are accepted and read all the
// same, so traffic should still come here.
func (s *server) readyz(w http.ResponseWriter, r *http.Request) error {
	ready := s.readiness(r.Context())
	status := http.StatusOK
	if ready.Status == "unavailable" || ready.Status == "stopping" {
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, status, ready)
	return nil
}

// readinessJSON is how the program is: "ready", "degraded", "unavailable" or
// "stopping", and each part "ok" or "unavailable".
type readinessJSON struct {
	Status string            `json:"status"`
	Parts  map[string]string `json:"parts"`
}

func (s *server) readiness(ctx context.Context) readinessJSON {
	ready := readinessJSON{"ready", checkParts(ctx, s.parts)}
	for _, p := range s.parts {
		if ready.Parts[p.name] == "ok" {
			continue
		}
		if p.required {
			ready.Status = "unavailable"
			break
		}
		ready.Status = "degraded"
	}
	if s.draining.Load() {
		ready.Status = "stopping"
	}
	return ready
}

// checkParts asks all parts at once how they are: "ok" or "unavailable". The
// reasons are in the log, not for everybody who can reach /readyz.
func checkParts(ctx context.Context, parts []part) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	states := make(map[string]string, len(parts))
	var mu sync.Mutex
	var group sync.WaitGroup
	for _, p := range parts {
		group.Go(func() {
			state := "ok"
			if p.ping(ctx) != nil {
				state = "unavailable"
			}
			mu.Lock()
			defer mu.Unlock()
			states[p.name] = state
		})
	}
	group.Wait()
	return states
}
