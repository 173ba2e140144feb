package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
)

// serverKind is how to start one kind of server.
type serverKind struct {
	name        string
	find        func() (map[string]string, error) // programs by name, or errMissing
	refusesRoot bool
	prepare     func(*testServer) error // fills an empty data directory
	helper      func(*testServer) *exec.Cmd
	command     func(*testServer) *exec.Cmd
	url         func(*testServer) string
	ready       func(context.Context, *testServer) error // nil once a client would be served
	settled     func(*testServer) bool                   // may be killed without losing what was confirmed; nil for always
	stop        syscall.Signal                           // to the leader: ends it in good order
	end         syscall.Signal                           // to the group: ends it at once
}

// missingError is a program that tests need and this machine lacks.
type missingError struct{ program, hint string }

func (e *missingError) Error() string {
	return fmt.Sprintf("%s not found: %s", e.program, e.hint)
}

const installHint = "make test installs it or says how"

func postgresKind() *serverKind {
	return &serverKind{
		name: "postgres", find: findPostgres, refusesRoot: true,
		prepare: initPostgres, command: postgresCommand, ready: postgresReady,
		url: func(s *testServer) string {
			return fmt.Sprintf("postgres://postgres@%s/postgres?sslmode=disable", s.addr())
		},
		// SIGINT rolls back what is open, SIGQUIT does not even write a
		// checkpoint; both free the shared memory (manual, chapter 19.5).
		stop: syscall.SIGINT, end: syscall.SIGQUIT,
	}
}

// findPostgres looks on the path first and then where Debian keeps servers of
// several versions off it.
func findPostgres() (map[string]string, error) {
	dirs := []string{""}
	if dir := newestDir("/usr/lib/postgresql/*/bin"); dir != "" {
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		bin, err := lookPaths(dir, "postgres", "initdb")
		if err == nil {
			return bin, nil
		}
	}
	return nil, &missingError{"postgres", installHint}
}

// initPostgres makes the cluster. Files need not be synced: nothing of it
// matters after a power cut of this machine.
func initPostgres(s *testServer) error {
	locale := "C.UTF-8" // orders by code point and knows every letter's case
	if runtime.GOOS == "darwin" {
		locale = "en_US.UTF-8" // has no C.UTF-8
	}
	cmd := exec.Command(s.bin["initdb"], "-D", s.data, "-U", "postgres", "--auth=trust",
		"--no-sync", "--encoding=UTF8", "--locale="+locale)
	s.confine(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return nil
}

// postgresCommand leaves fsync on, so that a benchmark pays for its commits.
func postgresCommand(s *testServer) *exec.Cmd {
	return exec.Command(s.bin["postgres"], "-D", s.data, "-p", strconv.Itoa(s.ports[0]),
		"-c", "listen_addresses=127.0.0.1",
		"-c", "unix_socket_directories=", // their path may be too long
		"-c", "max_connections=300") // many tests, each with its pools
}

func postgresReady(ctx context.Context, s *testServer) error {
	conn, err := pgx.Connect(ctx, s.URL)
	if err != nil {
		return err
	}
	return errors.Join(conn.Ping(ctx), conn.Close(ctx))
}

func redisKind() *serverKind {
	return &serverKind{
		name: "redis",
		find: func() (map[string]string, error) {
			bin, err := lookPaths("", "redis-server")
			if err != nil {
				return nil, &missingError{"redis-server", installHint}
			}
			return bin, nil
		},
		prepare: func(*testServer) error { return nil },
		command: redisCommand, ready: redisReady,
		url:  func(s *testServer) string { return "redis://" + s.addr() + "/0" },
		stop: syscall.SIGTERM, end: syscall.SIGKILL,
	}
}

// redisCommand runs Redis as the cache that it is for us: it keeps nothing on
// disk, so a restarted one is empty.
func redisCommand(s *testServer) *exec.Cmd {
	return exec.Command(s.bin["redis-server"], "--bind", "127.0.0.1", "--port", strconv.Itoa(s.ports[0]),
		"--dir", s.data, "--save", "", "--appendonly", "no",
		"--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
}

func redisReady(ctx context.Context, s *testServer) error {
	return exchange(ctx, s.addr(), "PING\r\n", "+PONG")
}

// rabbitNode is the Erlang node's name. It is the same on every server, since
// each has a name service (epmd) of its own.
const rabbitNode = "pms@localhost"

// rabbitKind makes RabbitMQ with some virtual hosts besides "/".
func rabbitKind(vhosts []string) *serverKind {
	return &serverKind{
		name: "rabbitmq", find: findRabbit,
		prepare: func(s *testServer) error { return writeRabbitConfig(s, vhosts) },
		helper:  epmdCommand, command: rabbitCommand, ready: rabbitReady, settled: rabbitSettled,
		url:  func(s *testServer) string { return "amqp://guest:guest@" + s.addr() + "/" },
		stop: syscall.SIGTERM, end: syscall.SIGKILL,
	}
}

// findRabbit prefers the script inside the package to the one on the path,
// which on Debian insists on becoming the user rabbitmq and on fixed files.
func findRabbit() (map[string]string, error) {
	bin, err := lookPaths(newestDir("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin"), "rabbitmq-server")
	if err != nil {
		return nil, &missingError{"rabbitmq-server", installHint}
	}
	if bin["epmd"], err = exec.LookPath("epmd"); err != nil {
		bin["epmd"] = filepath.Join(newestDir("/usr/lib/erlang/erts-*/bin"), "epmd")
		if _, err := exec.LookPath(bin["epmd"]); err != nil {
			return nil, &missingError{"epmd (of Erlang)", installHint}
		}
	}
	return bin, nil
}

// epmdCommand is the node's own name service. Left to itself Erlang would
// start one on a fixed port, as a daemon that outlives the tests.
func epmdCommand(s *testServer) *exec.Cmd {
	return exec.Command(s.bin["epmd"], "-port", strconv.Itoa(s.ports[2]), "-address", "127.0.0.1")
}

// rabbitCommand sets every path and port that would otherwise be a shared one
// (RabbitMQ manual, "Configuration" and "File and Directory Locations").
func rabbitCommand(s *testServer) *exec.Cmd {
	cmd := exec.Command(s.bin["rabbitmq-server"])
	dist := strconv.Itoa(s.ports[1])
	epmd := strconv.Itoa(s.ports[2])
	cmd.Env = []string{
		"RABBITMQ_NODENAME=" + rabbitNode,
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		"RABBITMQ_NODE_PORT=" + strconv.Itoa(s.ports[0]),
		"RABBITMQ_DIST_PORT=" + dist,
		"ERL_EPMD_PORT=" + epmd,
		"ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_MNESIA_BASE=" + filepath.Join(s.data, "mnesia"),
		"RABBITMQ_LOG_BASE=" + s.dir,
		"RABBITMQ_LOGS=-",
		"RABBITMQ_CONF_ENV_FILE=" + os.DevNull,
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(s.dir, "enabled_plugins"),
		"RABBITMQ_CONFIG_FILE=" + filepath.Join(s.dir, "rabbitmq.conf"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + filepath.Join(s.dir, "advanced.config"),
		"RABBITMQ_GENERATED_CONFIG_DIR=" + filepath.Join(s.dir, "generated"),
		"RABBITMQ_PID_FILE=" + filepath.Join(s.dir, "pid"),
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1}",
	}
	return cmd
}

// rabbitReady wants the node's own word that it is up and the first frame of
// the protocol (AMQP 0-9-1, 2.2.4: a method frame has type 1). The port opens
// earlier than that.
func rabbitReady(ctx context.Context, s *testServer) error {
	if !strings.Contains(s.readLog()[s.since:], "Server startup complete") {
		return errors.New("still booting")
	}
	return exchange(ctx, s.addr(), "AMQP\x00\x00\x09\x01", "\x01")
}

// rabbitSettled says whether every quorum queue's id is in the file that maps
// queues to their logs. RabbitMQ writes that up to three seconds after it
// confirms the declaration; killed before, it comes back with the queue empty
// and without a leader, so that each use of it hangs for a minute (seen on
// 3.10.8).
func rabbitSettled(s *testServer) bool {
	dir := filepath.Join(s.data, "mnesia", rabbitNode, "quorum", rabbitNode)
	names, err := os.ReadFile(filepath.Join(dir, "names.dets"))
	if err != nil {
		return errors.Is(err, os.ErrNotExist) // no queue yet
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	return !slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		return e.IsDir() && !bytes.Contains(names, []byte(e.Name()))
	})
}

// s3AccessKey and s3SecretKey are what private S3 servers are started with.
const (
	s3AccessKey = "test-access"
	s3SecretKey = "test-secret-key"
	s3Region    = "us-east-1"
)

func s3Kind() *serverKind {
	return &serverKind{
		name: "s3", find: findS3, prepare: makeS3Dirs, command: s3Command, ready: s3Ready,
		url:  func(s *testServer) string { return "http://" + s.addr() },
		stop: syscall.SIGTERM, end: syscall.SIGKILL,
	}
}

// findS3 looks for versitygw where the variable says, on the path, and where
// the Makefile builds it.
func findS3() (map[string]string, error) {
	for _, name := range []string{os.Getenv("VERSITYGW"), "versitygw", ".cache/bin/versitygw"} {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		path, err = filepath.Abs(path)
		return map[string]string{"versitygw": path}, err
	}
	return nil, &missingError{"versitygw", "make tools builds it"}
}

func makeS3Dirs(s *testServer) error {
	return errors.Join(os.Mkdir(filepath.Join(s.data, "objects"), 0o700), os.Mkdir(filepath.Join(s.data, "meta"), 0o700))
}

// s3Command keeps metadata in a directory instead of in extended attributes,
// which not every file system has.
func s3Command(s *testServer) *exec.Cmd {
	cmd := exec.Command(s.bin["versitygw"], "--port", s.addr(), "--region", s3Region, "--quiet",
		"posix", "--sidecar", filepath.Join(s.data, "meta"), filepath.Join(s.data, "objects"))
	cmd.Env = []string{"ROOT_ACCESS_KEY=" + s3AccessKey, "ROOT_SECRET_KEY=" + s3SecretKey}
	return cmd
}

// s3Ready takes any answer, which without credentials is a refusal.
func s3Ready(ctx context.Context, s *testServer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL, nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// exchange sends a few bytes on a new connection and wants an answer that
// starts with want.
func exchange(ctx context.Context, addr, send, want string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if _, err := io.WriteString(conn, send); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(bufio.NewReader(conn), got); err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("%s answered %q, want %q", addr, got, want)
	}
	return nil
}

// lookPaths finds programs in dir, or on the path if dir is empty.
func lookPaths(dir string, names ...string) (map[string]string, error) {
	bin := map[string]string{}
	for _, name := range names {
		path, err := exec.LookPath(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		bin[name] = path
	}
	return bin, nil
}

// newestDir is the match of pattern with the highest version number in it, or
// "" if there is none.
func newestDir(pattern string) string {
	dirs, _ := filepath.Glob(pattern) // the only error is of the pattern
	if len(dirs) == 0 {
		return ""
	}
	return slices.MaxFunc(dirs, func(a, b string) int {
		return slices.Compare(versionOf(a), versionOf(b))
	})
}

// versionOf is the numbers in a path, in order: 9.6 comes before 15.
func versionOf(path string) []int {
	fields := strings.FieldsFunc(path, func(r rune) bool { return r < '0' || r > '9' })
	numbers := make([]int, 0, len(fields))
	for _, f := range fields {
		n, _ := strconv.Atoi(f) // all digits
		numbers = append(numbers, n)
	}
	return numbers
}

// writeRabbitConfig has the node make its virtual hosts and its user as it
// boots, which saves a second of rabbitmqctl for each.
func writeRabbitConfig(s *testServer, vhosts []string) error {
	type vhost struct {
		Name string `json:"name"`
	}
	type permission struct {
		User      string `json:"user"`
		VHost     string `json:"vhost"`
		Configure string `json:"configure"`
		Write     string `json:"write"`
		Read      string `json:"read"`
	}
	var hosts []vhost
	var permissions []permission
	for _, name := range append([]string{"/"}, vhosts...) {
		hosts = append(hosts, vhost{name})
		permissions = append(permissions, permission{"guest", name, ".*", ".*", ".*"})
	}
	definitions, err := json.Marshal(map[string]any{
		"vhosts":      hosts,
		"permissions": permissions,
		"users":       []map[string]string{{"name": "guest", "password": "guest", "tags": "administrator"}},
	})
	if err != nil {
		return err
	}
	path := filepath.Join(s.dir, "definitions.json")
	conf := "load_definitions = " + path + "\n" +
		"log.console.level = info\n" +
		"vm_memory_high_watermark.absolute = 512MB\n" +
		"disk_free_limit.absolute = 50MB\n"
	return errors.Join(
		os.WriteFile(path, definitions, 0o600),
		os.WriteFile(filepath.Join(s.dir, "rabbitmq.conf"), []byte(conf), 0o600),
		os.WriteFile(filepath.Join(s.dir, "enabled_plugins"), []byte("[].\n"), 0o600),
	)
}
