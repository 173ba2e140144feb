package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/redis/rueidis"
)

// config is every setting of the program. An empty URL means the embedded
// default of that part.
type config struct {
	ListenAddr    string
	WorkerAddr    string // "": a worker does not listen
	DatabaseURL   string
	RedisURL      string // "off": no cache
	AMQPURL       string
	S3Bucket      string
	S3PublicURL   string
	PublicURL     string
	DataDir       string
	Auth          bool
	Limits        limitSettings
	CacheTTL      time.Duration
	CacheSize     int64 // bytes
	Image         imageSettings
	FetchLimits   fetchLimits
	ShutdownGrace time.Duration
	ShutdownDelay time.Duration
	LogLevel      slog.Level
	LogText       bool
	getenv        func(string) string // for what the AWS SDK reads
}

// cpus is how many CPUs the program may use, a container's limit considered, as
// Go has found out at start.
var cpus = runtime.GOMAXPROCS(0)

// setting is one environment variable: where it goes, and what help says of it.
type setting struct {
	name, fallback, help string
	set                  func(value string) error
}

// settings are those of c, in the order in which help lists them. An empty
// fallback leaves the setting as it is.
func (c *config) settings() []setting {
	return []setting{
		{"LISTEN_ADDR", "127.0.0.1:8080", "host:port to listen on; port 0 picks one", listenAddr(&c.ListenAddr)},
		{"WORKER_LISTEN_ADDR", "", "host:port on which a worker answers /healthz, /readyz, /metrics and /debug/pprof/; else it does not listen", listenAddr(&c.WorkerAddr)},
		{"DATABASE_URL", "", "PostgreSQL; else SQLite in DATA_DIR", databaseURL(&c.DatabaseURL)},
		{"REDIS_URL", "", `Redis 6 or later, or "off"; else a cache in the process, or none if DATABASE_URL is set`, redisURL(&c.RedisURL)},
		{"AMQP_URL", "", "RabbitMQ; else a queue in the process", amqpURL(&c.AMQPURL)},
		{"S3_BUCKET", "", "bucket for the images; else files in DATA_DIR. Credentials, region and endpoint come from the AWS SDK's own variables", bucketName(&c.S3Bucket)},
		{"S3_PUBLIC_URL", "", "base of the image URLs given to clients; else the bucket's own", baseURL(&c.S3PublicURL)},
		{"PUBLIC_URL", "", "base of the URLs of images in DATA_DIR; else http:// and the listening address", baseURL(&c.PublicURL)},
		{"DATA_DIR", "data", "directory of the embedded database and images", text(&c.DataDir)},
		{"AUTH", "", `"on" or "off"; else on, unless only loopback is listened on`, onOff(&c.Auth)},
		{"MAX_REQUESTS", "1024", "requests handled at once (503 beyond); as many more may be sending their bodies, and as many more listening to events", number(&c.Limits.MaxRequests, 1, 1<<20)},
		{"RATE_LIMIT", "5000", "requests a second of one token; 0 is no limit", number(&c.Limits.RateLimit, 0, 1<<20)},
		{"CACHE_TTL", "60s", "how long a cached product may be served after a lost invalidation", duration(&c.CacheTTL, time.Second, 24*time.Hour)},
		{"CACHE_SIZE", "64MiB", "memory for cached products in the process, the copies of what is in Redis included", byteSize(&c.CacheSize, 1<<20)},
		{"IMAGE_WORKERS", strconv.Itoa(cpus), "images decoded and encoded at once; default: the number of CPUs", number(&c.Image.Workers, 1, 1024)},
		{"IMAGE_MEMORY", "256MiB", "memory that decoded images, and results that wait to be stored, may hold at once", byteSize(&c.Image.Memory, 2*fixedCost)},
		{"IMAGE_MAX_BYTES", "32MiB", "largest download", byteSize(&c.FetchLimits.MaxBytes, 1)},
		{"IMAGE_MAX_PIXELS", "50000000", "largest width × height", number(&c.Image.MaxPixels, 1, 1<<40)},
		{"IMAGE_MAX_SIDE", "2048", "compressed images fit in a square of this side", number(&c.Image.MaxSide, 1, 65535)},
		{"IMAGE_VARIANTS", "", "further widths to make of each image that is wider, such as 320,800; else none", widths(&c.Image.Variants)},
		{"IMAGE_QUALITY", "80", "JPEG quality, 1 to 100", number(&c.Image.Quality, 1, 100)},
		{"IMAGE_TIMEOUT", "30s", "for one download", duration(&c.FetchLimits.Timeout, time.Millisecond, time.Hour)},
		{"IMAGE_ALLOW_PRIVATE", "false", "allow URLs of images and webhooks on loopback, private and link-local addresses, and any port", boolean(&c.FetchLimits.AllowPrivate)},
		{"RETRY_ATTEMPTS", "6", "tries of an image before it is dead, and of a delivery to a webhook", number(&c.Image.RetryAttempts, 1, 100)},
		{"RETRY_BASE", "1s", "first backoff; doubles, with jitter, to 5 minutes at most", duration(&c.Image.RetryBase, time.Millisecond, maxRetryDelay)},
		{"SHUTDOWN_GRACE", "25s", "for requests and images in hand after SIGTERM; Kubernetes kills after 30 s", duration(&c.ShutdownGrace, time.Millisecond, time.Hour)},
		{"SHUTDOWN_DELAY", "0s", "before that: how long requests are still taken while /readyz says no; for load balancers that poll it", duration(&c.ShutdownDelay, 0, time.Hour)},
		{"LOG_LEVEL", "info", "debug, info, warn or error", logLevel(&c.LogLevel)},
		{"LOG_FORMAT", "", "json or text; else json, but text on a terminal", oneOf(&c.LogText, "text", "json")},
	}
}

// loadConfig reads the settings, and reports everything that is wrong with them
// at once.
func loadConfig(getenv func(string) string, terminal bool) (config, error) {
	c := config{getenv: getenv, LogText: terminal}
	var errs []error
	for _, s := range c.settings() {
		value := cmp.Or(getenv(s.name), s.fallback)
		if value == "" {
			continue
		}
		if err := s.set(value); err != nil {
			errs = append(errs, fmt.Errorf("%s %w", s.name, err)) // without the value, which may be a secret
		}
	}
	if getenv("AUTH") == "" {
		c.Auth = !isLoopback(c.ListenAddr) || c.WorkerAddr != "" && !isLoopback(c.WorkerAddr)
	}
	if getenv("S3_PUBLIC_URL") != "" && c.S3Bucket == "" {
		errs = append(errs, errors.New("S3_PUBLIC_URL is set, but S3_BUCKET is not"))
	}
	return c, errors.Join(errs...)
}

// isLoopback says whether nobody but this machine can reach a listening address.
func isLoopback(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func text(to *string) func(string) error {
	return func(v string) error { *to = v; return nil }
}

func listenAddr(to *string) func(string) error {
	return func(v string) error {
		_, port, err := net.SplitHostPort(v)
		if err != nil {
			return errors.New("must be host:port")
		}
		if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
			return errors.New("must have a port from 0 to 65535")
		}
		*to = v
		return nil
	}
}

func urlOf(to *string, schemes ...string) func(string) error {
	return func(v string) error {
		u, err := url.Parse(v)
		if err != nil || u.Host == "" {
			return fmt.Errorf("must be a URL such as %s://host", schemes[0])
		}
		if !slices.Contains(schemes, u.Scheme) {
			return fmt.Errorf("must begin with %s://", strings.Join(schemes, ":// or "))
		}
		*to = v
		return nil
	}
}

// baseURL takes what a path can be appended to.
func baseURL(to *string) func(string) error {
	return func(v string) error {
		if strings.ContainsAny(v, "?#") {
			return errors.New("must have neither a query nor a fragment")
		}
		return urlOf(to, "http", "https")(v)
	}
}

// textIf takes a text that is good; wanted says which are.
func textIf(to *string, good func(string) bool, wanted string) func(string) error {
	return func(v string) error {
		if !good(v) {
			return errors.New(wanted)
		}
		*to = v
		return nil
	}
}

// databaseURL takes what pgx does: a URL, or keywords and values. To pgx a URL of
// any other scheme is a keyword too, if it has a "=" somewhere.
func databaseURL(to *string) func(string) error {
	good := func(v string) bool {
		_, err := pgxpool.ParseConfig(v)
		keyword, _, _ := strings.Cut(v, "=")
		scheme, _, isURL := strings.Cut(keyword, "://")
		return err == nil && (!isURL || scheme == "postgres" || scheme == "postgresql")
	}
	return textIf(to, good, "must be a URL such as postgres://user:password@host/database")
}

// redisURL takes what rueidis does, and a slash without a database's number. To
// rueidis "redis:6379" is a URL, of localhost.
func redisURL(to *string) func(string) error {
	return func(v string) error {
		if v != "off" {
			v = strings.TrimSuffix(v, "/")
			options, err := rueidis.ParseURL(v)
			if err != nil || options.SelectDB < 0 || !strings.Contains(v, "://") {
				return errors.New("must be off, or a URL such as redis://host:6379/0")
			}
			if options.AlwaysRESP2 {
				return errors.New("must not ask for protocol 2: copies in the process need 3")
			}
		}
		*to = v
		return nil
	}
}

func amqpURL(to *string) func(string) error {
	good := func(v string) bool {
		_, err := amqp.ParseURI(v) // takes "amqp:5672", as localhost
		return err == nil && strings.Contains(v, "://")
	}
	return textIf(to, good, "must be a URL such as amqp://user:password@host")
}

// bucketNames are wider than what Amazon takes for new buckets: other servers are
// less strict, and an access point has an ARN.
var bucketNames = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9._-]{2,254}|arn:[^ ]+)$`)

func bucketName(to *string) func(string) error {
	return textIf(to, bucketNames.MatchString, "must be the name of a bucket, or the ARN of an access point")
}

func onOff(to *bool) func(string) error { return oneOf(to, "on", "off") }

func boolean(to *bool) func(string) error { return oneOf(to, "true", "false") }

// oneOf takes one of two words, the first of which means true.
func oneOf(to *bool, yes, no string) func(string) error {
	return func(v string) error {
		if v != yes && v != no {
			return fmt.Errorf("must be %s or %s", yes, no)
		}
		*to = v == yes
		return nil
	}
}

func duration(to *time.Duration, least, most time.Duration) func(string) error {
	return func(v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < least || d > most {
			return fmt.Errorf("must be a time from %v to %v, such as 30s", least, most)
		}
		*to = d
		return nil
	}
}

func number[N int | int64](to *N, least, most N) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < int64(least) || n > int64(most) {
			return fmt.Errorf("must be a whole number from %d to %d", least, most)
		}
		*to = N(n)
		return nil
	}
}

// byteSize takes a number of bytes, or of KiB, MiB or GiB.
func byteSize(to *int64, least int64) func(string) error {
	return func(v string) error {
		digits, unit := v, int64(1)
		for n, suffix := range []string{"KiB", "MiB", "GiB"} {
			if before, ok := strings.CutSuffix(v, suffix); ok {
				digits, unit = before, 1<<(10*(n+1))
			}
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n < 0 || n > (1<<50)/unit || n*unit < least {
			return fmt.Errorf("must be a size of at least %d bytes, such as 32MiB", least)
		}
		*to = n * unit
		return nil
	}
}

func logLevel(to *slog.Level) func(string) error {
	return func(v string) error {
		for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			if strings.EqualFold(v, level.String()) {
				*to = level
				return nil
			}
		}
		return errors.New("must be debug, info, warn or error")
	}
}

// withDotEnv fills in what getenv does not have from the file .env, if there is
// one in the working directory.
func withDotEnv(getenv func(string) string) (func(string) string, error) {
	file, err := os.Open(".env")
	if errors.Is(err, fs.ErrNotExist) {
		return getenv, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	values, err := readDotEnv(file)
	return func(name string) string { return cmp.Or(getenv(name), values[name]) }, err
}

// readDotEnv reads lines of NAME=value. A value may stand in quotes; empty
// lines, and lines that begin with #, are passed over.
func readDotEnv(r io.Reader) (map[string]string, error) {
	values := make(map[string]string)
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(strings.TrimPrefix(lines.Text(), "\ufeff")) // as some editors begin a file
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if !ok {
			return nil, fmt.Errorf(".env: line %d is not NAME=value", n)
		}
		value = strings.TrimSpace(value)
		if len(value) >= 2 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		values[strings.TrimSpace(name)] = value
	}
	return values, lines.Err()
}
