package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// reaperDirVar makes the test binary a reaper instead of running tests; its
// value is the directory to remove.
const reaperDirVar = "PMS_TEST_REAPER_DIR"

// reapGrace is how long a server may take to end after its own signal.
const reapGrace = 5 * time.Second

// reaper is a second process that ends all servers and removes their files as
// soon as the test process is gone, however that went: a normal end, a panic,
// go test's timeout, ctrl-C or SIGKILL. It learns of it by the end of its
// standard input, which only the test process holds open. Pdeathsig would not
// do: it follows the thread that started the child, and reaches no grandchild.
type reaper struct {
	dir  string // where all servers keep their files
	cmd  *exec.Cmd
	mu   sync.Mutex
	pipe io.WriteCloser
}

// theReaper is started with the first server and lives as long as the process;
// reaperStarted holds it from then on.
var (
	theReaper     = sync.OnceValues(startReaper)
	reaperStarted atomic.Pointer[reaper]
)

func startReaper() (*reaper, error) {
	dir, err := os.MkdirTemp("", "pms-test-")
	if err != nil {
		return nil, err
	}
	// PostgreSQL runs as another user if we are root, and has to get through.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), reaperDirVar+"="+dir)
	cmd.SysProcAttr = groupAttr(nil)
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start reaper: %w", err)
	}
	r := &reaper{dir: dir, cmd: cmd, pipe: pipe}
	reaperStarted.Store(r)
	return r, nil
}

// watch has a process group ended by sig when the tests are over.
func (r *reaper) watch(pgid int, sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintln(r.pipe, pgid, int(sig))
}

// forget takes back watch for a process group that has ended.
func (r *reaper) forget(pgid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintln(r.pipe, pgid, 0)
}

// finish ends all servers and waits until they and their files are gone.
func (r *reaper) finish() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pipe.Close()
	return r.cmd.Wait()
}

// reap is the reaper process. It reads lines "pgid signal" until the test
// process is gone, ends the groups that are left and removes dir.
func reap(r io.Reader, dir string) error {
	groups := map[int]syscall.Signal{}
	for lines := bufio.NewScanner(r); lines.Scan(); {
		var pgid, sig int
		if _, err := fmt.Sscan(lines.Text(), &pgid, &sig); err != nil || pgid <= 1 {
			continue // the last line may be cut off
		}
		if groups[pgid] = syscall.Signal(sig); sig == 0 {
			delete(groups, pgid)
		}
	}
	for pgid, sig := range groups {
		signalPID(-pgid, sig)
		signalPID(-pgid, sigThaw) // a frozen one would never see it
	}
	deadline := time.Now().Add(reapGrace)
	for pgid := range groups {
		gone := func() bool { return signalPID(-pgid, 0) != nil }
		if !pollUntil(deadline, gone) {
			signalPID(-pgid, syscall.SIGKILL)
		}
	}
	return removeTree(dir)
}

// removeTree is os.RemoveAll, repeated for a moment because a process that was
// just killed may still be making files.
func removeTree(dir string) error {
	var err error
	pollUntil(time.Now().Add(reapGrace), func() bool {
		err = os.RemoveAll(dir)
		return err == nil
	})
	return err
}

// pollUntil calls done every few milliseconds until it is true, or answers
// false at the deadline. It is for what other processes do without a signal. The
// longer it takes the rarer it asks, so that many who wait do not slow down whom
// they wait for.
func pollUntil(deadline time.Time, done func() bool) bool {
	const least, most = 5 * time.Millisecond, 100 * time.Millisecond
	start := time.Now()
	for !done() {
		if time.Now().After(deadline) {
			return false
		}
		<-time.After(min(max(time.Since(start)/20, least), most))
	}
	return true
}

// reapOrRun is TestMain's choice: be the reaper, or run the tests and have the
// reaper clean up after them.
func reapOrRun(run func() int) int {
	if dir := os.Getenv(reaperDirVar); dir != "" {
		signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		if err := reap(os.Stdin, dir); err != nil {
			return 1
		}
		return 0
	}
	code := run()
	r := reaperStarted.Load()
	if r == nil {
		return code
	}
	if err := r.finish(); err != nil {
		fmt.Fprintln(os.Stderr, "clean up after test servers:", err)
		return 1
	}
	return code
}
