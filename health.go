package main

import (
	"context"
	"log/slog"
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
	ready := s.readiness()
	status := http.StatusOK
	if ready.Status == "unavailable" || ready.Status == "stopping" {
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
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

func (s *server) readiness() readinessJSON {
	ready := readinessJSON{"ready", s.checkup.states(s.parts, s.log)}
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

// checkupTime is how long what was found counts: a stranger who asks again and
// again costs the parts no more than one who asks each second.
const checkupTime = time.Second

// checkup is what was found when the parts were asked last.
type checkup struct {
	mu    sync.Mutex
	found map[string]string // not written to again
	until time.Time
}

// states answers how the parts are. Of callers at once, one asks for all; so the
// question does not end with its caller.
func (c *checkup) states(parts []part, log *slog.Logger) map[string]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Now().After(c.until) {
		c.found = checkParts(parts, c.found, log)
		c.until = time.Now().Add(checkupTime)
	}
	return c.found
}

// checkParts asks all parts at once how they are: "ok" or "unavailable". The reason
// why one is no longer as before is in the log, not for everybody who can reach /readyz.
func checkParts(parts []part, before map[string]string, log *slog.Logger) map[string]string {
	ctx, cancel := context.WithTimeout(context.Background(), pingTimeout)
	defer cancel()
	states := make(map[string]string, len(parts))
	var mu sync.Mutex
	var group sync.WaitGroup
	for _, p := range parts {
		group.Go(func() {
			state, err := "ok", p.ping(ctx)
			switch {
			case err != nil && before[p.name] != "unavailable":
				log.Warn("a part is away", "part", p.name, "err", err)
			case err == nil && before[p.name] == "unavailable":
				log.Info("a part is back", "part", p.name)
			}
			if err != nil {
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
