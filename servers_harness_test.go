package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	awsconfig "github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// The harness's own tests: each server is used for real through the client
// library that the program uses, and is broken in every way that other tests
// rely on.

func TestDatabasesAreSeparate(t *testing.T) {
	t.Parallel()
	for _, server := range []string{testDatabase(t), testDatabase(t)} {
		execPostgres(t, server, "CREATE TABLE probe (n int)") // fails on a second one in the same database
	}
}

func TestPostgresKeepsCommittedRowThroughKill(t *testing.T) {
	t.Parallel()
	s := startPostgres(t)
	execPostgres(t, s.URL, "CREATE TABLE probe AS SELECT 42 AS n")
	idle := connectPostgres(t, s.URL) // a backend that the kill has to reach
	s.Kill(t)
	if err := idle.Ping(t.Context()); err == nil {
		t.Error("a connection outlived Kill")
	}
	s.Start(t)
	var n int
	if err := connectPostgres(t, s.URL).QueryRow(t.Context(), "SELECT n FROM probe").Scan(&n); err != nil || n != 42 {
		t.Errorf("row after Kill and Start: %d, %v; want 42", n, err)
	}
}

func TestPostgresFrozenAnswersAfterThaw(t *testing.T) {
	t.Parallel()
	s := startPostgres(t)
	conn := connectPostgres(t, s.URL)
	answer := make(chan error, 1)
	s.Freeze(t)
	go func() { answer <- conn.Ping(context.Background()) }()
	select {
	case err := <-answer:
		t.Fatalf("a frozen server answered: %v", err)
	case <-time.After(aWhile):
	}
	s.Thaw(t)
	if err := <-answer; err != nil {
		t.Errorf("ping after Thaw: %v", err)
	}
}

func TestPostgresWipedIsNew(t *testing.T) {
	t.Parallel()
	s := startPostgres(t)
	execPostgres(t, s.URL, "CREATE TABLE probe (n int)")
	s.Stop(t)
	s.Wipe(t)
	s.Start(t)
	execPostgres(t, s.URL, "CREATE TABLE probe (n int)")
}

func connectPostgres(t *testing.T, server string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func TestRedisTracksClientSideCache(t *testing.T) {
	t.Parallel()
	client := dialRedis(t, testRedis(t))
	defer client.Close()
	ctx := t.Context()
	if err := client.Do(ctx, client.B().Set().Key("k").Value("v").Build()).Error(); err != nil {
		t.Fatal(err)
	}
	for _, wantHit := range []bool{false, true} {
		got := client.DoCache(ctx, client.B().Get().Key("k").Cache(), time.Minute)
		if v, err := got.ToString(); err != nil || v != "v" || got.IsCacheHit() != wantHit {
			t.Errorf("got %q, %v, from the local cache: %v; want v, %v", v, err, got.IsCacheHit(), wantHit)
		}
	}
}

func TestRedisRestartsEmptyOnSamePort(t *testing.T) {
	t.Parallel()
	s := startRedis(t)
	client := dialRedis(t, s.URL)
	set := client.B().Set().Key("k").Value("v").Build()
	if err := client.Do(t.Context(), set).Error(); err != nil {
		t.Fatal(err)
	}
	client.Close()
	s.Kill(t)
	s.Wipe(t)
	s.Start(t)
	client = dialRedis(t, s.URL)
	defer client.Close()
	if n, err := client.Do(t.Context(), client.B().Dbsize().Build()).AsInt64(); err != nil || n != 0 {
		t.Errorf("%d keys, %v after a restart; want none", n, err)
	}
}

const probeQueue = "image_processing_queue"

func TestVirtualHostsAreSeparate(t *testing.T) {
	t.Parallel()
	first, second := openChannel(t, testAMQP(t)), openChannel(t, testAMQP(t))
	publishConfirmed(t, first, "in the first")
	declareQuorum(t, second)
	if _, ok, err := second.Get(probeQueue, true); ok || err != nil {
		t.Errorf("message in the second virtual host: %v, %v; want none", ok, err)
	}
}

func openChannel(t *testing.T, server string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func declareQuorum(t *testing.T, ch *amqp.Channel) {
	t.Helper()
	args := amqp.Table{amqp.QueueTypeArg: amqp.QueueTypeQuorum}
	if _, err := ch.QueueDeclare(probeQueue, true, false, false, false, args); err != nil {
		t.Fatal(err)
	}
}

func publishConfirmed(t *testing.T, ch *amqp.Channel, body string) {
	t.Helper()
	declareQuorum(t, ch)
	if err := ch.Confirm(false); err != nil {
		t.Fatal(err)
	}
	msg := amqp.Publishing{DeliveryMode: amqp.Persistent, Body: []byte(body)}
	confirm, err := ch.PublishWithDeferredConfirmWithContext(t.Context(), "", probeQueue, true, false, msg)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := confirm.WaitContext(t.Context()); err != nil || !ok {
		t.Fatalf("publish: confirmed %v, %v", ok, err)
	}
}

// TestS3ByEnvironment uses a bucket as the program does: by the SDK's variables.
func TestS3ByEnvironment(t *testing.T) {
	env := testS3(t)
	for name, value := range env.Vars() {
		t.Setenv(name, value)
	}
	cfg, err := awsconfig.LoadDefaultConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	putObject(t, s3.NewFromConfig(cfg), env.Bucket, "a/b.txt", "by environment")
	if got := textOf(t, env.ObjectURL("a/b.txt")); got != "by environment" {
		t.Errorf("anonymous GET: %q", got)
	}
}

func TestS3KeepsObjectThroughKill(t *testing.T) {
	t.Parallel()
	s := startS3(t)
	env := s.newBucket(t)
	putObject(t, env.client(), env.Bucket, "k.txt", "kept")
	s.Kill(t)
	s.Start(t)
	if got := textOf(t, env.ObjectURL("k.txt")); got != "kept" {
		t.Errorf("anonymous GET after Kill and Start: %q, want kept", got)
	}
}

func putObject(t *testing.T, client *s3.Client, bucket, key, body string) {
	t.Helper()
	_, err := client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: strings.NewReader(body)})
	if err != nil {
		t.Fatal(err)
	}
}

// TestGivenServers points the variables at servers of ours, as if they had
// been there.
func TestGivenServers(t *testing.T) {
	t.Run("database", func(t *testing.T) {
		given := startPostgres(t).URL
		t.Setenv(testDatabaseVar, given)
		got, err := url.Parse(testDatabase(t))
		if err != nil || !strings.Contains(given, got.Host) {
			t.Errorf("database on %v, %v; want it on %s", got, err, given)
		}
	})
	t.Run("redis", func(t *testing.T) {
		given := startRedis(t).URL
		t.Setenv(testRedisVar, given)
		client := dialRedis(t, given)
		defer client.Close()
		if err := client.Do(t.Context(), client.B().Set().Key("k").Value("v").Build()).Error(); err != nil {
			t.Fatal(err)
		}
		if got := testRedis(t); got != given {
			t.Errorf("got %s, want %s", got, given)
		}
		if n, err := client.Do(t.Context(), client.B().Dbsize().Build()).AsInt64(); err != nil || n != 0 {
			t.Errorf("%d keys, %v; want it emptied", n, err)
		}
	})
	t.Run("amqp", func(t *testing.T) {
		given := testAMQP(t)
		ch := openChannel(t, given)
		publishConfirmed(t, ch, "left over")
		t.Setenv(testAMQPVar, given)
		if got := testAMQP(t); got != given {
			t.Errorf("got %s, want %s", got, given)
		}
		declareQuorum(t, ch)
		if _, ok, err := ch.Get(probeQueue, true); ok || err != nil {
			t.Errorf("left over message: %v, %v; want none", ok, err)
		}
	})
	t.Run("s3", func(t *testing.T) {
		given := startS3(t).URL
		t.Setenv(testS3Var, given)
		t.Setenv("AWS_ACCESS_KEY_ID", s3AccessKey)
		t.Setenv("AWS_SECRET_ACCESS_KEY", s3SecretKey)
		t.Setenv("AWS_REGION", s3Region)
		env := testS3(t)
		putObject(t, env.client(), env.Bucket, "k", "v")
		if env.Endpoint != given {
			t.Errorf("bucket on %s, want %s", env.Endpoint, given)
		}
	})
}

// TestStartIsTriedAgain has the first try end at once, as it would on a port
// that another process took meanwhile.
func TestStartIsTriedAgain(t *testing.T) {
	t.Parallel()
	kind := redisKind()
	tries := 0
	kind.command = func(s *testServer) *exec.Cmd {
		if tries++; tries == 1 {
			return exec.Command("false")
		}
		return redisCommand(s)
	}
	startServer(t, kind)
	if tries != 2 {
		t.Errorf("%d tries, want 2", tries)
	}
}

func TestStartFailureShowsLog(t *testing.T) {
	t.Parallel()
	kind := redisKind()
	if _, err := kind.find(); err != nil {
		skipOrFail(t, err)
	}
	var dir string
	kind.command = func(s *testServer) *exec.Cmd {
		dir = s.dir
		return exec.Command("sh", "-c", "echo bad directive in the config; exit 1")
	}
	_, err := launch(kind)
	if !errors.Is(err, errEarlyExit) || !strings.Contains(err.Error(), "bad directive in the config") {
		t.Errorf("error %v, want an early exit with the log", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory after a failed start: %v, want it gone", err)
	}
}

// ending is a test that only notes how it was ended.
type ending struct {
	testing.TB
	got string
}

func (v *ending) Helper()              {}
func (v *ending) Skipf(string, ...any) { v.got = "skipped"; panic(v) }
func (v *ending) Fatal(...any)         { v.got = "failed"; panic(v) }

func TestMissingProgramSkipsUnlessRequired(t *testing.T) {
	missing := fmt.Errorf("start x: %w", &missingError{"x", "install it"})
	for _, c := range []struct {
		name, required string
		err            error
		want           string
	}{
		{"missing", "", missing, "skipped"},
		{"missing but required", "1", missing, "failed"},
		{"broken", "", errEarlyExit, "failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(requireServersVar, c.required)
			v := &ending{TB: t}
			func() {
				defer func() { recover() }()
				skipOrFail(v, c.err)
			}()
			if v.got != c.want {
				t.Errorf("%s, want %s", v.got, c.want)
			}
		})
	}
}

// orphanVar makes TestOrphan start a server and wait to be killed.
const orphanVar = "PMS_TEST_ORPHAN"

// TestOrphan is the victim of the test below, run in a process of its own.
func TestOrphan(t *testing.T) {
	if os.Getenv(orphanVar) == "" {
		t.Skip("only for TestServersEndWithKilledTestProcess")
	}
	s := startRedis(t) // nothing else would end it
	fmt.Println("orphan", s.addr(), s.dir)
	io.Copy(io.Discard, os.Stdin) // until killed
}

func TestServersEndWithKilledTestProcess(t *testing.T) {
	t.Parallel()
	if _, err := redisKind().find(); err != nil {
		skipOrFail(t, err)
	}
	addr, dir := killOrphan(t)
	gone := func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		_, stat := os.Stat(dir)
		return errors.Is(err, syscall.ECONNREFUSED) && errors.Is(stat, os.ErrNotExist)
	}
	if !pollUntil(time.Now().Add(stopTimeout), gone) {
		t.Errorf("server on %s or its files in %s outlived the test process", addr, dir)
	}
}

// killOrphan runs TestOrphan, kills it once its server is up, and reports the
// server's address and directory.
func killOrphan(t *testing.T) (addr, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOrphan$", "-test.v")
	cmd.Env = append(os.Environ(), orphanVar+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	for lines := bufio.NewScanner(io.TeeReader(out, &seen)); lines.Scan(); {
		if n, _ := fmt.Sscanf(lines.Text(), "orphan %s %s", &addr, &dir); n == 2 {
			break
		}
	}
	cmd.Process.Kill()
	cmd.Wait() // by our signal
	if dir == "" {
		t.Fatalf("no server came up:\n%s", seen.String())
	}
	return addr, dir
}

func TestNewestDirOrdersVersionsByNumber(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for _, version := range []string{"9.6", "16", "15"} {
		if err := os.MkdirAll(filepath.Join(root, version, "bin"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := newestDir(filepath.Join(root, "*", "bin")), filepath.Join(root, "16", "bin"); got != want {
		t.Errorf("newest is %q, want %q", got, want)
	}
	if got := newestDir(filepath.Join(root, "none*")); got != "" {
		t.Errorf("newest of none is %q", got)
	}
	if !slices.Equal(versionOf("/server-3.10.8/sbin"), []int{3, 10, 8}) {
		t.Errorf("version of 3.10.8 read as %v", versionOf("/server-3.10.8/sbin"))
	}
}
