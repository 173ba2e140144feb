package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime/pprof"
	"runtime/trace"
	"time"
)

// net/http/pprof would do, but it registers itself on http.DefaultServeMux, and
// its errors are not ours.

// The seconds that a CPU profile or a trace takes. The most is less than
// writeTimeout, after which the answer could not be sent.
const (
	profileSeconds    = 10
	maxProfileSeconds = 50
)

// listProfiles answers the profiles that there are, and the entries in each.
func (s *server) listProfiles(w http.ResponseWriter, r *http.Request) error {
	entries := make(map[string]int)
	for _, p := range pprof.Profiles() {
		entries[p.Name()] = p.Count()
	}
	writeJSON(w, http.StatusOK, entries)
	return nil
}

// profile answers one of them, in the form that "go tool pprof" reads, or
// records the CPU's or a trace.
func (s *server) profile(w http.ResponseWriter, r *http.Request) error {
	length, err := readProfileQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	name := r.PathValue("profile")
	switch name {
	case "profile":
		return s.record(r.Context(), asFile(w, "cpu.pprof"), length, pprof.StartCPUProfile, pprof.StopCPUProfile)
	case "trace":
		return s.record(r.Context(), asFile(w, "trace.out"), length, trace.Start, trace.Stop)
	}
	p := pprof.Lookup(name)
	if p == nil {
		return fmt.Errorf("profile %q: %w", name, errNotFound)
	}
	_ = p.WriteTo(asFile(w, name+".pprof"), 0) // it fails for want of a client
	return nil
}

// readProfileQuery reads the parameter seconds.
func readProfileQuery(raw string) (time.Duration, error) {
	query, err := readQuery(raw, "seconds")
	if err != nil {
		return 0, err
	}
	seconds := profileSeconds
	var wrong invalidInput
	wrong.check(query, "seconds", func(v string) (err error) { seconds, err = readNumber(v, maxProfileSeconds); return err })
	return time.Duration(seconds) * time.Second, wrong.err()
}

// record runs a recorder that the process has only one of, for the given time
// or until the client or the server goes.
func (s *server) record(ctx context.Context, w http.ResponseWriter, length time.Duration, start func(io.Writer) error, stop func()) error {
	if err := start(w); err != nil {
		w.Header().Del("Content-Disposition")
		return &httpError{http.StatusConflict, "another such profile is being recorded"}
	}
	defer stop()
	select {
	case <-time.After(length):
	case <-s.stopping:
	case <-ctx.Done():
	}
	return nil
}

// asFile makes the answer a file to download.
func asFile(w http.ResponseWriter, name string) http.ResponseWriter {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", fmt.Sprintf("attachment; filename=%q", name))
	return w
}
