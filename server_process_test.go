package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// startTimeout is generous: RabbitMQ takes 5 s on an idle machine, and has
	// been seen to take a minute beside several compilers.
	startTimeout = 2 * time.Minute
	// stopTimeout is how long a server may take to end in good order.
	stopTimeout = 20 * time.Second
	// startTries is how often a server that ends at once is started again, on
	// other ports: between choosing a port and using it another may take it.
	startTries = 3
	// logTail is how much of a server's log an error shows.
	logTail = 4 << 10
)

// errEarlyExit is a server that ended before it was ready.
var errEarlyExit = errors.New("ended before it was ready")

// testServer is a private server on loopback. Its methods are for one
// goroutine at a time.
type testServer struct {
	URL string // for clients; the same for the server's whole life

	kind  *serverKind
	bin   map[string]string // programs by name
	dir   string            // all of the server's files, log included
	data  string            // what Wipe empties
	owner *credential       // whom it runs as, nil for ourselves
	ports [3]int            // its own, then those of its helpers
	since int               // where in the log the latest start begins

	helper *serverProcess // runs beside it and stays when it is killed
	proc   *serverProcess // nil when it is down
	frozen []int          // process ids between Freeze and Thaw
	killed bool           // went down without tidying up
}

// startServer starts a private server of a kind for one test, which ends with it.
func startServer(t testing.TB, kind *serverKind) *testServer {
	t.Helper()
	s, err := launch(kind)
	if err != nil {
		skipOrFail(t, err)
	}
	t.Cleanup(func() {
		if err := s.discard(); err != nil {
			t.Errorf("discard %s: %v", kind.name, err)
		}
	})
	return s
}

// launch starts a server in a fresh directory. The caller discards it, else
// the reaper does when the tests are over.
func launch(kind *serverKind) (*testServer, error) {
	bin, err := kind.find()
	if err != nil {
		return nil, err
	}
	r, err := theReaper()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(r.dir, kind.name+"-")
	if err != nil {
		return nil, err
	}
	s := &testServer{kind: kind, bin: bin, dir: dir, data: filepath.Join(dir, "data")}
	if err := s.chown(); err != nil {
		return nil, err
	}
	for range startTries {
		if err = s.startOnNewPorts(); !errors.Is(err, errEarlyExit) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w%s", kind.name, err, s.log()), s.discard())
	}
	return s, nil
}

// chown gives the server's directory to the user it will run as.
func (s *testServer) chown() error {
	if !s.kind.refusesRoot {
		return nil
	}
	owner, err := unprivileged()
	if err != nil {
		return err
	}
	s.owner = owner
	return chownTo(s.dir, owner)
}

func (s *testServer) startOnNewPorts() error {
	for i := range s.ports {
		port, err := freePort()
		if err != nil {
			return err
		}
		s.ports[i] = port
	}
	s.URL = s.kind.url(s)
	return s.start()
}

// start starts the server on its ports and waits until it answers.
func (s *testServer) start() error {
	if err := s.prepare(); err != nil {
		return err
	}
	s.since = len(s.readLog())
	proc, err := s.run(s.kind.command(s), s.kind.end)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := proc.awaitReady(ctx, func() error { return s.kind.ready(ctx, s) }); err != nil {
		return errors.Join(err, proc.kill())
	}
	s.proc, s.killed = proc, false
	return nil
}

// prepare makes the data directory and the helper if they are not there.
func (s *testServer) prepare() error {
	if s.kind.helper != nil && s.helper == nil {
		helper, err := s.run(s.kind.helper(s), syscall.SIGKILL)
		if err != nil {
			return err
		}
		s.helper = helper
	}
	if _, err := os.Stat(s.data); err == nil {
		return nil
	}
	if err := os.Mkdir(s.data, 0o700); err != nil {
		return err
	}
	if err := chownTo(s.data, s.owner); err != nil {
		return err
	}
	return s.kind.prepare(s)
}

// run starts one process of the server, in a group of its own.
func (s *testServer) run(cmd *exec.Cmd, end syscall.Signal) (*serverProcess, error) {
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	s.confine(cmd)
	return startProcess(cmd, end)
}

// confine gives a command the server's directory, user and an environment
// that holds nothing of ours, so that no PGPORT or AWS_PROFILE gets in.
func (s *testServer) confine(cmd *exec.Cmd) {
	cmd.Dir = s.dir
	cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"), "HOME="+s.dir, "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = groupAttr(s.owner)
}

func (s *testServer) logPath() string { return filepath.Join(s.dir, "log") }

// readLog is all of the server's log, empty before the first start.
func (s *testServer) readLog() string {
	b, err := os.ReadFile(s.logPath())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "(no log: " + err.Error() + ")"
	}
	return string(b)
}

// log is the end of the server's log, for an error message.
func (s *testServer) log() string {
	log := s.readLog()
	return "\nlog:\n" + log[max(0, len(log)-logTail):]
}

// addr is the host and port that the server listens on.
func (s *testServer) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.ports[0])) }

// Kill ends the server and every process under it by SIGKILL, as a power cut
// would. RabbitMQ is given the moment that it needs after declaring a queue.
func (s *testServer) Kill(t testing.TB) {
	t.Helper()
	if s.proc == nil {
		t.Fatalf("kill %s: it is down", s.kind.name)
	}
	if settled := s.kind.settled; settled != nil && s.frozen == nil {
		if !pollUntil(time.Now().Add(stopTimeout), func() bool { return settled(s) }) {
			t.Fatalf("kill %s: it has not settled within %v", s.kind.name, stopTimeout)
		}
	}
	if err := s.proc.kill(); err != nil {
		t.Fatalf("kill %s: %v", s.kind.name, err)
	}
	s.proc, s.frozen, s.killed = nil, nil, true
}

// Stop ends the server in good order.
func (s *testServer) Stop(t testing.TB) {
	t.Helper()
	if s.proc == nil {
		t.Fatalf("stop %s: it is down", s.kind.name)
	}
	signalPID(s.proc.pid, s.kind.stop)
	select {
	case <-s.proc.done:
	case <-time.After(stopTimeout):
		t.Fatalf("stop %s: still there after %v%s", s.kind.name, stopTimeout, s.log())
	}
	s.proc = nil
}

// Start starts a server that Kill or Stop ended: same port, same data.
func (s *testServer) Start(t testing.TB) {
	t.Helper()
	if s.proc != nil {
		t.Fatalf("start %s: it is up", s.kind.name)
	}
	if err := s.start(); err != nil {
		t.Fatalf("start %s again: %v%s", s.kind.name, err, s.log())
	}
}

// Freeze stops every process of the server where it is: connections stay open
// and nothing answers, like a machine that hangs.
func (s *testServer) Freeze(t testing.TB) {
	t.Helper()
	if s.proc == nil {
		t.Fatalf("freeze %s: it is down", s.kind.name)
	}
	tree, err := s.proc.freezeTree()
	if err != nil {
		t.Fatalf("freeze %s: %v", s.kind.name, err)
	}
	s.frozen = tree
}

// Thaw undoes Freeze.
func (s *testServer) Thaw(t testing.TB) {
	t.Helper()
	if s.frozen == nil {
		t.Fatalf("thaw %s: it is not frozen", s.kind.name)
	}
	s.thaw()
}

func (s *testServer) thaw() {
	for _, pid := range s.frozen {
		signalPID(pid, sigThaw)
	}
	s.frozen = nil
}

// Wipe empties the data directory of a server that is down: it starts next as
// a new one, on the same port.
func (s *testServer) Wipe(t testing.TB) {
	t.Helper()
	if s.proc != nil {
		t.Fatalf("wipe %s: it is up", s.kind.name)
	}
	if err := removeTree(s.data); err != nil {
		t.Fatalf("wipe %s: %v", s.kind.name, err)
	}
}

// discard ends the server for good and removes its files.
func (s *testServer) discard() error {
	s.thaw()
	var errs []error
	// A killed PostgreSQL leaves shared memory that only its next start frees.
	if s.kind.end != syscall.SIGKILL && s.killed {
		if _, err := os.Stat(s.data); err == nil {
			errs = append(errs, s.start())
		}
	}
	for _, proc := range []*serverProcess{s.proc, s.helper} {
		if proc != nil {
			errs = append(errs, proc.finish())
		}
	}
	s.proc, s.helper = nil, nil
	return errors.Join(append(errs, removeTree(s.dir))...)
}

// serverProcess is one running process, the leader of its group.
type serverProcess struct {
	pid  int
	end  syscall.Signal // ends it at once, leaving nothing behind
	done chan struct{}  // closed when it has ended and was waited for
}

// startProcess starts cmd under the reaper's watch. A goroutine waits for it,
// which ends with it.
func startProcess(cmd *exec.Cmd, end syscall.Signal) (*serverProcess, error) {
	r, err := theReaper()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &serverProcess{pid: cmd.Process.Pid, end: end, done: make(chan struct{})}
	r.watch(p.pid, end)
	go func() {
		cmd.Wait() // how it ended is in its log
		r.forget(p.pid)
		close(p.done)
	}()
	return p, nil
}

// awaitReady polls ready until it is nil. The process's end ends the wait.
func (p *serverProcess) awaitReady(ctx context.Context, ready func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return errEarlyExit
		case <-ctx.Done():
			return fmt.Errorf("not ready after %v: %w", startTimeout, err)
		case <-tick.C:
		}
	}
}

// finish ends the process's group by the signal meant for that.
func (p *serverProcess) finish() error {
	signalPID(-p.pid, p.end)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		signalPID(-p.pid, syscall.SIGKILL)
		return fmt.Errorf("process %d still there after %v", p.pid, stopTimeout)
	}
}

// kill ends the process and all its descendants by SIGKILL and waits until
// they are gone.
func (p *serverProcess) kill() error {
	tree, err := p.freezeTree()
	if err != nil {
		return err
	}
	for _, pid := range tree {
		signalPID(pid, syscall.SIGKILL)
	}
	<-p.done
	if !pollUntil(time.Now().Add(stopTimeout), func() bool { return !anyAlive(tree) }) {
		return fmt.Errorf("some of processes %v outlived SIGKILL", tree)
	}
	return nil
}

// freezeTree stops the process and all its descendants and lists them; none
// if it has ended. Signalling the group would not be enough, since each
// PostgreSQL backend leads one of its own. A stopped process makes no more
// children, so the list is whole once a look at it finds no new one.
func (p *serverProcess) freezeTree() ([]int, error) {
	select {
	case <-p.done:
		return nil, nil // the process id may be another's by now
	default:
	}
	tree, fresh := []int{p.pid}, []int{p.pid}
	for len(fresh) > 0 {
		for _, pid := range fresh {
			signalPID(pid, sigFreeze)
		}
		table, err := processTable()
		if err != nil {
			return nil, err
		}
		fresh = nil
		for _, proc := range table {
			if slices.Contains(tree, proc.parent) && !slices.Contains(tree, proc.pid) && !proc.zombie {
				fresh = append(fresh, proc.pid)
			}
		}
		tree = append(tree, fresh...)
	}
	return tree, nil
}

func anyAlive(pids []int) bool {
	table, err := processTable()
	return err != nil || slices.ContainsFunc(table, func(p processInfo) bool {
		return !p.zombie && slices.Contains(pids, p.pid)
	})
}

type processInfo struct {
	pid, parent int
	zombie      bool // ended, but its parent has not asked yet
}

// processTable lists all processes through ps, the one way that Linux and
// macOS share.
func processTable() ([]processInfo, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var table []processInfo
	for line := range bytes.Lines(out) {
		var p processInfo
		var state string
		if _, err := fmt.Sscan(string(line), &p.pid, &p.parent, &state); err != nil {
			return nil, fmt.Errorf("list processes: line %q: %w", line, err)
		}
		p.zombie = strings.HasPrefix(state, "Z")
		table = append(table, p)
	}
	return table, nil
}

// freePort chooses a loopback port that nobody uses, below the range that
// Linux and macOS take outgoing connections' ports from. Within that range a
// server's port could be taken while it is down, and a client that keeps
// dialling it would some day be connected to itself.
func freePort() (int, error) {
	const low, high, tries = 15_000, 32_000, 100
	var err error
	for range tries {
		port := low + rand.IntN(high-low)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("no free port between %d and %d: %w", low, high, err)
}
