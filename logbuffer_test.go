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

type recordedWrites struct{ each []string }

func (r *recordedWrites) Write(data []byte) (int, error) {
	r.each = append(r.each, string(data))
	return len(data), nil
}

// A log that could not be written for a time goes on afterwards.
func TestLogGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	out := &fullDisk{full: true}
	b := newLogBuffer(out)
	b.Write([]byte("lost\n"))
	b.Flush()
	out.full = false
	b.Write([]byte("written\n"))
	b.Flush()
	if got := strings.Join(out.each, ""); got != "written\n" {
		t.Errorf("written: %q", got)
	}
}

type fullDisk struct {
	recordedWrites
	full bool
}

func (d *fullDisk) Write(data []byte) (int, error) {
	if d.full {
		return 0, syscall.ENOSPC
	}
	return d.recordedWrites.Write(data)
}
