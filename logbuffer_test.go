package main

import (
	"strings"
	"syscall"
	"testing"
)

func TestLogLinesAreWrittenSoonOrWhenFlushed(t *testing.T) {
	t.Parallel()
	out := newWatchedLog()
	b := newLogBuffer(out)
	b.Write([]byte("one\n"))
	b.Write([]byte("two\n"))
	out.await(t, "two")
	b.Write([]byte("three\n"))
	b.Flush()
	if got := out.tail(9); got != "one\ntwo\nthree\n" {
		t.Errorf("written: %q", got)
	}
}

func TestLogLinesStayWhole(t *testing.T) {
	t.Parallel()
	writes := &recordedWrites{}
	b := newLogBuffer(writes)
	line := strings.Repeat("x", 1000) + "\n"
	for range 200 {
		b.Write([]byte(line))
	}
	b.Flush()
	if len(writes.each) < 3 || strings.Join(writes.each, "") != strings.Repeat(line, 200) {
		t.Fatalf("%d writes of %d bytes", len(writes.each), len(strings.Join(writes.each, "")))
	}
	for _, w := range writes.each {
		if !strings.HasSuffix(w, "\n") || len(w) > logBufferSize {
			t.Errorf("a write of %d bytes ends with %q", len(w), w[len(w)-5:])
		}
	}
}

// A log that could not be written goes on when it can be again.
func TestLogGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	writes := &recordedWrites{full: true}
	b := newLogBuffer(writes)
	for _, lines := range []string{"lost\n", strings.Repeat("x", 2*logBufferSize) + "\n"} {
		b.Write([]byte(lines))
		b.Flush()
	}
	writes.full = false
	b.Write([]byte("kept\n"))
	b.Flush()
	if got := strings.Join(writes.each, ""); got != "kept\n" {
		t.Errorf("written: %.100q", got)
	}
}

type recordedWrites struct {
	each []string
	full bool
}

func (r *recordedWrites) Write(data []byte) (int, error) {
	if r.full {
		return 0, syscall.ENOSPC
	}
	r.each = append(r.each, string(data))
	return len(data), nil
}
