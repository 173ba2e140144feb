package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/redis/rueidis"
)

// The servers that tests run against. testDatabase, testRedis, testAMQP and
// testS3 give a test a place of its own on a server that the whole process
// shares and that is started on first use; startPostgres and its kin start a
// server that the test may kill, freeze and wipe.
//
// These variables name servers to use in place of the shared ones:
//
//	TEST_DATABASE_URL  the user may create databases; each test gets its own
//	TEST_REDIS_URL     its logical database is emptied before and after each test
//	TEST_AMQP_URL      our two queues in its vhost are deleted before and after each test
//	TEST_S3_ENDPOINT   with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; each test gets a bucket
//
// With TEST_REDIS_URL or TEST_AMQP_URL tests run one at a time, since they share that place.
const (
	testDatabaseVar = "TEST_DATABASE_URL"
	testRedisVar    = "TEST_REDIS_URL"
	testAMQPVar     = "TEST_AMQP_URL"
	testS3Var       = "TEST_S3_ENDPOINT"

	// requireServersVar makes a missing program a failure instead of a skip.
	requireServersVar = "REQUIRE_SERVERS"
)

// sharedVHosts is how many tests can use the shared RabbitMQ, each with a
// virtual host; each costs the start 25 ms, and many of them more than that.
const sharedVHosts = 112

// setupTimeout bounds what a test's own database, queue or bucket may take.
const setupTimeout = 30 * time.Second

// The shared servers live until the process ends, so they are its state.
var (
	sharedPostgres = sync.OnceValues(func() (*testServer, error) { return launch(postgresKind()) })
	sharedRabbit   = sync.OnceValues(func() (*testServer, error) { return launch(rabbitKind(vhostNames())) })
	sharedS3       = sync.OnceValues(func() (*testServer, error) { return launch(s3Kind()) })

	usedVHosts atomic.Int32
)

func TestMain(m *testing.M) {
	os.Exit(reapOrRun(func() int {
		flag.Parse()
		if os.Getenv(testRedisVar) != "" || os.Getenv(testAMQPVar) != "" {
			flag.Set("test.parallel", "1") // the flag is always there
		}
		defer os.Remove(programFile(plainProgram))
		defer os.Remove(programFile(armedProgram))
		return unseenAnswers(m.Run())
	}))
}

func startPostgres(t testing.TB) *testServer { t.Helper(); return startServer(t, postgresKind()) }
func startRedis(t testing.TB) *testServer    { t.Helper(); return startServer(t, redisKind()) }
func startRabbitMQ(t testing.TB) *testServer { t.Helper(); return startServer(t, rabbitKind(nil)) }
func startS3(t testing.TB) *testServer       { t.Helper(); return startServer(t, s3Kind()) }

// skipOrFail ends a test whose server did not start: as skipped if a program
// is missing and may be, else as failed.
func skipOrFail(t testing.TB, err error) {
	t.Helper()
	var missing *missingError
	if errors.As(err, &missing) && os.Getenv(requireServersVar) == "" {
		t.Skipf("needs %v", missing)
	}
	t.Fatal(err)
}

// sharedURL is the URL in the variable, else that of the shared server.
func sharedURL(t testing.TB, variable string, shared func() (*testServer, error)) string {
	t.Helper()
	if given := os.Getenv(variable); given != "" {
		return given
	}
	s, err := shared()
	if err != nil {
		skipOrFail(t, err)
	}
	return s.URL
}

// testDatabase is the URL of an empty database of the test's own.
func testDatabase(t testing.TB) string {
	t.Helper()
	server := sharedURL(t, testDatabaseVar, sharedPostgres)
	u, err := url.Parse(server)
	if err != nil || u.Scheme == "" {
		t.Fatalf("%s: not a URL", testDatabaseVar)
	}
	name := freshName()
	execPostgres(t, server, "CREATE DATABASE "+name)
	if os.Getenv(testDatabaseVar) != "" { // else the server goes with all it has, which costs less
		t.Cleanup(func() { execPostgres(t, server, "DROP DATABASE "+name+" WITH (FORCE)") })
	}
	u.Path = "/" + name
	return u.String()
}

func execPostgres(t testing.TB, server, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, server)
	if err != nil {
		t.Fatalf("connect to PostgreSQL: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// testRedis is the URL of an empty Redis. It is a server of the test's own,
// not a logical database of a shared one: client tracking ignores database
// numbers, so one test's writes and FLUSHDB would invalidate another's keys
// (redis.io, "Client-side caching in Redis"). One starts in 50 ms.
func testRedis(t testing.TB) string {
	t.Helper()
	given := os.Getenv(testRedisVar)
	if given == "" {
		return startRedis(t).URL
	}
	flushRedis(t, given)
	t.Cleanup(func() { flushRedis(t, given) })
	return given
}

func flushRedis(t testing.TB, server string) {
	t.Helper()
	client := dialRedis(t, server)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	if err := client.Do(ctx, client.B().Flushdb().Build()).Error(); err != nil {
		t.Fatalf("flush Redis: %v", err)
	}
}

// dialRedis is a client that the caller closes.
func dialRedis(t testing.TB, server string) rueidis.Client {
	t.Helper()
	option, err := rueidis.ParseURL(server)
	if err != nil {
		t.Fatalf("Redis URL: %v", err)
	}
	client, err := rueidis.NewClient(option)
	if err != nil {
		t.Fatalf("connect to Redis: %v", err)
	}
	return client
}

// testAMQP is the URL of an empty virtual host of the test's own. When the
// shared node's are used up, as with -count, it is a node of the test's own.
func testAMQP(t testing.TB) string {
	t.Helper()
	server := sharedURL(t, testAMQPVar, sharedRabbit)
	if os.Getenv(testAMQPVar) != "" {
		deleteQueues(t, server)
		t.Cleanup(func() { deleteQueues(t, server) })
		return server
	}
	n := int(usedVHosts.Add(1)) - 1
	if n >= sharedVHosts {
		return startRabbitMQ(t).URL
	}
	return server + vhostNames()[n]
}

func vhostNames() []string {
	names := make([]string, sharedVHosts)
	for i := range names {
		names[i] = fmt.Sprintf("test%d", i)
	}
	return names
}

// deleteQueues deletes the queues of the contract, with what is in them.
func deleteQueues(t testing.TB, server string) {
	t.Helper()
	conn, err := amqp.Dial(server)
	if err != nil {
		t.Fatalf("connect to RabbitMQ: %v", err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatalf("open channel: %v", err)
	}
	for _, queue := range []string{"image_processing_queue", "image_processing_queue.dead"} {
		if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
			t.Fatalf("delete queue %s: %v", queue, err)
		}
	}
}

// s3Env is a bucket whose objects anyone may read, and how to get at it.
type s3Env struct {
	Endpoint, Region, AccessKey, SecretKey, Bucket string
}

// Vars is the environment that makes the AWS SDK use this server.
func (e s3Env) Vars() map[string]string {
	return map[string]string{
		"AWS_ENDPOINT_URL_S3":   e.Endpoint,
		"AWS_REGION":            e.Region,
		"AWS_ACCESS_KEY_ID":     e.AccessKey,
		"AWS_SECRET_ACCESS_KEY": e.SecretKey,
	}
}

// getenv is Vars as os.Getenv is.
func (e s3Env) getenv(name string) string { return e.Vars()[name] }

// ObjectURL is where anyone may get an object.
func (e s3Env) ObjectURL(key string) string { return e.Endpoint + "/" + e.Bucket + "/" + key }

// client is an S3 client with the bucket in the path, not in the host name.
func (e s3Env) client() *s3.Client {
	credentials := aws.Credentials{AccessKeyID: e.AccessKey, SecretAccessKey: e.SecretKey}
	return s3.New(s3.Options{
		BaseEndpoint: &e.Endpoint,
		Region:       e.Region,
		UsePathStyle: true,
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return credentials, nil
		}),
	})
}

// testS3 is a bucket of the test's own on the shared S3 server.
func testS3(t testing.TB) s3Env {
	t.Helper()
	env := s3Env{
		Endpoint:  sharedURL(t, testS3Var, sharedS3),
		AccessKey: s3AccessKey, SecretKey: s3SecretKey, Region: s3Region,
	}
	if os.Getenv(testS3Var) != "" {
		env.AccessKey, env.SecretKey = os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY")
		env.Region = os.Getenv("AWS_REGION")
	}
	env.createBucket(t)
	t.Cleanup(func() { env.deleteBucket(t) })
	return env
}

// newBucket is a bucket on a private S3 server. It goes with the server.
func (s *testServer) newBucket(t testing.TB) s3Env {
	t.Helper()
	env := s3Env{Endpoint: s.URL, AccessKey: s3AccessKey, SecretKey: s3SecretKey, Region: s3Region}
	env.createBucket(t)
	return env
}

// createBucket makes a bucket under a fresh name and lets anyone read it.
func (e *s3Env) createBucket(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	e.Bucket = strings.ReplaceAll(freshName(), "_", "-")
	client := e.client()
	if _, err := client.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &e.Bucket}); err != nil {
		t.Fatalf("create bucket: %v", err)
	}
	policy := fmt.Sprintf(`{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*",
		"Action": "s3:GetObject", "Resource": "arn:aws:s3:::%s/*"}]}`, e.Bucket)
	if _, err := client.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &e.Bucket, Policy: &policy}); err != nil {
		t.Fatalf("let anyone read the bucket: %v", err)
	}
}

func (e *s3Env) deleteBucket(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	client := e.client()
	pages := s3.NewListObjectsV2Paginator(client, &s3.ListObjectsV2Input{Bucket: &e.Bucket})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			t.Fatalf("list bucket: %v", err)
		}
		if len(page.Contents) == 0 {
			continue
		}
		var objects []types.ObjectIdentifier
		for _, object := range page.Contents {
			objects = append(objects, types.ObjectIdentifier{Key: object.Key})
		}
		if _, err := client.DeleteObjects(ctx, &s3.DeleteObjectsInput{
			Bucket: &e.Bucket, Delete: &types.Delete{Objects: objects},
		}); err != nil {
			t.Fatalf("empty bucket: %v", err)
		}
	}
	if _, err := client.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: &e.Bucket}); err != nil {
		t.Fatalf("delete bucket: %v", err)
	}
}

// freshName is a name that no other test has used on any server.
func freshName() string { return "pms_test_" + strings.ToLower(rand.Text()) }

// rabbitctl runs an operator's command on a private RabbitMQ.
func rabbitctl(t testing.TB, s *testServer, args ...string) (stdout string) {
	t.Helper()
	server := rabbitCommand(s)
	cmd := exec.Command(filepath.Join(filepath.Dir(server.Path), "rabbitmqctl"), args...)
	cmd.Env = server.Env
	s.confine(cmd)
	out, err := cmd.Output()
	if exit, failed := errors.AsType[*exec.ExitError](err); failed {
		out = append(out, exit.Stderr...)
	}
	if err != nil {
		t.Fatalf("rabbitmqctl %v: %v\n%s", args, err, out)
	}
	return string(out)
}
