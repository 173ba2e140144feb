package main

import (
	"runtime"
	"syscall"
)

// workNice is the nice value of the threads that decode and encode: the kernel
// gives a thread of the API about ten times their share when both want to run.
const workNice = 10

// lowerPriority ties the calling goroutine to a thread of its own that steps
// back for others. The thread ends with the goroutine. On Linux the priority
// is a thread's, not a process's (setpriority(2), "C library/kernel differences").
func lowerPriority() {
	runtime.LockOSThread()
	// Without the permission, which nobody has been seen to lack, all is as before.
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, workNice)
}
