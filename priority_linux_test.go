package main

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Threads that work on pixels step back for others, and do not have to be waited
// for long; the thread that the test runs on stays what it is.
func TestWorkRunsOnThreadsThatStepBack(t *testing.T) {
	t.Parallel()
	attr := func() *unix.SchedAttr {
		a, err := unix.SchedGetAttr(0, 0)
		if err != nil {
			t.Error(err)
			return new(unix.SchedAttr)
		}
		return a
	}
	before := attr()
	lowered := make(chan *unix.SchedAttr)
	go func() {
		lowerPriority()
		lowered <- attr()
	}()
	work := <-lowered
	if work.Nice != workNice {
		t.Errorf("nice %d, want %d", work.Nice, workNice)
	}
	if work.Runtime != 0 && work.Runtime != uint64(workSlice) { // 0: before Linux 6.12
		t.Errorf("a slice of %d ns, want %v", work.Runtime, workSlice)
	}
	if after := attr(); *after != *before {
		t.Errorf("another thread has %+v now, and had %+v", after, before)
	}
}
