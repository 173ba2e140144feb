package main

import (
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// workNice is the nice value of the threads that decode and encode: the kernel
	// gives a thread of the API about ten times their share when both want to run.
	workNice = 10

	// workSlice is how long such a thread may run before one that waits has its
	// turn. It is the least that the kernel takes (sched_setattr(2), since Linux 6.12).
	workSlice = 100 * time.Microsecond
)

// lowerPriority ties the calling goroutine to a thread of its own that steps
// back for others. The thread ends with the goroutine. On Linux the priority
// is a thread's, not a process's (setpriority(2), "C library/kernel differences").
func lowerPriority() {
	runtime.LockOSThread()
	// Without the permission, which nobody has been seen to lack, all is as before.
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, workNice)
	if attr, err := unix.SchedGetAttr(0, 0); err == nil {
		attr.Runtime = uint64(workSlice)
		_ = unix.SchedSetAttr(0, attr, 0)
	}
}

// stepBack lets a thread run that waits for this CPU. Loops over pixels call it
// every hundred microseconds or so. Priority alone does not do it: whatever its nice
// value, a running thread keeps the CPU until its slice is over, and the kernel
// looks for that only at the next tick, up to 4 ms later. What a yield leaves of
// a slice is lost (Linux 6.18), hence a short one: else a busy API would starve the work.
func stepBack() {
	_, _, _ = syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0)
}
