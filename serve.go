package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// The HTTP server's limits. WriteTimeout is longer than requestTimeout, so that
// a slow database ends in an answer.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 30 * time.Second
	writeTimeout      = 60 * time.Second
	keepAliveTimeout  = 2 * time.Minute
	maxRequestHeader  = 64 << 10
)

// queue carries jobs from the dispatcher to the pipelines. Run keeps it
// connected until ctx ends.
type queue interface {
	jobSink
	consumer
	Run(ctx context.Context) error
}

// app is a running program, put together from the parts that its settings name.
type app struct {
	*program
	name       string // of the command
	store      *store
	unlock     func() error // of DATA_DIR; nil if it was not locked
	queue      queue
	reader     productReader
	cache      *cache // the reader, if it is one
	cacheName  string
	blobs      blobs
	media      *fileBlobs // blobs, if they are files
	encoder    encoder
	parts      []part
	dispatcher *dispatcher
	janitor    *janitor
	monitor    *monitor
	feed       *eventFeed
	deliverer  *deliverer
	dead       *deadKeeper // nil: the queue keeps no copies of dead letters
	listener   net.Listener
	migrated   chan struct{} // closed when the database has its schema
}

func serveCommand(p *program, ctx context.Context, flags *flag.FlagSet, args []string) error {
	signal.Ignore(syscall.SIGPIPE) // that nobody reads the log any more ends no server: lines are dropped, see logBuffer
	if _, err := parse(flags, args, 0); err != nil {
		return err
	}
	name := flags.Name()
	if missing := p.missingFor(name); missing != nil {
		return usagef("%s runs beside other processes, so it needs %s to be set", name, strings.Join(missing, " and "))
	}
	a := &app{program: p, name: name, migrated: make(chan struct{})}
	defer a.close()
	if err := a.open(ctx); err != nil {
		return err
	}
	return a.run(ctx)
}

// missingFor names the settings without which a command cannot work.
func (p *program) missingFor(name string) (missing []string) {
	if name == "serve" {
		return nil
	}
	if p.DatabaseURL == "" {
		missing = append(missing, "DATABASE_URL")
	}
	if p.AMQPURL == "" {
		missing = append(missing, "AMQP_URL")
	}
	return missing
}

// open chooses the parts. Those that are servers connect when they run, so the
// program starts while they are away.
func (a *app) open(ctx context.Context) (err error) {
	if addr := a.listenAddr(); addr != "" {
		if a.listener, err = net.Listen("tcp", addr); err != nil {
			return fmt.Errorf("LISTEN_ADDR: %w", err)
		}
	}
	if a.DatabaseURL == "" {
		if a.unlock, err = lockDataDir(a.DataDir); err != nil {
			return fmt.Errorf("lock DATA_DIR %s: %w", a.DataDir, err)
		}
	}
	if a.store, err = a.openStore(ctx); err != nil {
		return err
	}
	a.openQueue()
	a.parts = []part{{"store", true, a.store.Ping}, {"queue", false, a.queue.Ping}}
	if err := a.openBlobs(ctx); err != nil {
		return err
	}
	if err := a.openReader(); err != nil {
		return err
	}
	a.dispatcher = newDispatcher(a.store, a.queue, a.log)
	a.monitor = newMonitor(a.store, a.log)
	a.feed = newEventFeed(a.store, a.log)
	a.deliverer = newDeliverer(a.store, a.encoder, a.FetchLimits, a.Image, a.log)
	a.janitor = newJanitor(a.store, a.blobs, a.log)
	if copies, ok := a.queue.(deadQueue); ok {
		a.dead = newDeadKeeper(a.store, copies, a.invalidate, a.dispatcher.Wake, a.log)
	}
	return nil
}

// listenAddr is where this command listens, or "" if nowhere.
func (a *app) listenAddr() string {
	if a.name == "worker" {
		return a.WorkerAddr
	}
	return a.ListenAddr
}

func (a *app) close() {
	if a.listener != nil {
		a.listener.Close()
	}
	if a.media != nil {
		a.media.Close()
	}
	if a.store != nil {
		a.store.Close()
	}
	if a.unlock != nil {
		_ = a.unlock()
	}
}

func (p *program) openStore(ctx context.Context) (*store, error) {
	if p.DatabaseURL != "" {
		db, err := openPostgres(ctx, p.DatabaseURL)
		if err != nil {
			return nil, fmt.Errorf("open PostgreSQL: %w", err)
		}
		return newStore(db), nil
	}
	db, err := openSQLite(p.DataDir)
	if err != nil {
		return nil, fmt.Errorf("open the database in %s: %w", p.DataDir, err)
	}
	return newStore(db), nil
}

// openQueue makes a queue that, should it have to begin empty, gets the jobs
// that were in it.
func (a *app) openQueue() {
	if a.AMQPURL != "" {
		a.queue = newRabbitQueue(a.AMQPURL, a.store.RequeueAll, a.log)
	} else {
		a.queue = newEmbeddedQueue(a.store.RequeueAll, a.log)
	}
}

func (a *app) openBlobs(ctx context.Context) error {
	if a.S3Bucket != "" {
		s3, err := newS3Blobs(ctx, a.S3Bucket, a.S3PublicURL, a.getenv)
		if err != nil {
			return usageError{fmt.Errorf("open S3: %w", err)} // it asks no server yet
		}
		a.blobs, a.encoder = s3, encoder{s3.URL}
		a.parts = append(a.parts, part{"blobs", false, s3.Ping})
		return nil
	}
	base := a.PublicURL
	if base == "" && a.name != "worker" {
		base = "http://" + a.listener.Addr().String()
	}
	files, err := newFileBlobs(filepath.Join(a.DataDir, "media"), base)
	if err != nil {
		return fmt.Errorf("open the images in %s: %w", a.DataDir, err)
	}
	a.blobs, a.encoder, a.media = files, encoder{files.URL}, files
	a.parts = append(a.parts, part{"blobs", false, files.Ping})
	return nil
}

// openReader makes what reads products, with the cache that the settings name, if
// any. The one in the process is for a process that is the only one to write.
func (a *app) openReader() error {
	var backend cacheBackend
	a.reader = newProductLoader(a.store, a.encoder)
	switch {
	case a.RedisURL == "off", a.RedisURL == "" && a.DatabaseURL != "":
		a.cacheName = "none"
		return nil
	case a.RedisURL == "":
		a.cacheName, backend = "embedded", newMemoryCache(a.CacheTTL, a.CacheSize)
	default:
		redis, err := newRedisCache(a.RedisURL, a.CacheTTL, a.CacheSize, a.log)
		if err != nil {
			return err
		}
		a.cacheName, backend = "redis", redis
		a.parts = append(a.parts, part{"cache", false, redis.Ping})
	}
	a.cache = newCache(a.reader, backend, a.CacheTTL, a.log)
	a.reader = a.cache
	return nil
}

// invalidate tells the streams of events and the cache that a product has changed.
func (a *app) invalidate(id, version int64) {
	a.feed.Wake()
	if a.cache != nil {
		a.cache.Invalidate(id, version)
	}
}

// changed is invalidate, and tells the janitor that the change may have left an
// object behind.
func (a *app) changed(id, version int64) {
	a.invalidate(id, version)
	if version > 1 { // a new product leaves none
		a.janitor.CollectSoon()
	}
}

// run runs the parts until a signal ends ctx or one of them fails. Then it stops
// them in the order in which they need each other: what takes in work, and when
// that has finished what it had in hand, what it worked with.
func (a *app) run(ctx context.Context) error {
	a.logStart()
	backCtx, stopBack := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBack()
	back, backCtx := errgroup.WithContext(backCtx)
	back.Go(func() error { return a.migrate(backCtx) })
	for _, run := range a.backParts() {
		back.Go(func() error { return a.afterMigration(backCtx, run) })
	}
	front, frontCtx := errgroup.WithContext(ctx)
	front.Go(func() error {
		select {
		case <-frontCtx.Done():
			return nil
		case <-backCtx.Done():
			return context.Cause(backCtx)
		}
	})
	if a.listener != nil {
		front.Go(func() error { return a.serveHTTP(frontCtx) })
	}
	if a.name != "api" {
		front.Go(func() error {
			return a.afterMigration(frontCtx, func(stop context.Context) error { return a.process(backCtx, stop) })
		})
	}
	err := front.Wait()
	stopBack()
	if backErr := back.Wait(); err == nil {
		err = backErr
	}
	if err == nil {
		a.log.Info("stopped")
	}
	return err
}

// backParts are what runs until all who use it have ended.
func (a *app) backParts() []func(context.Context) error {
	parts := []func(context.Context) error{a.queue.Run, a.dispatcher.Run, a.janitor.Run}
	if a.dead != nil {
		parts = append(parts, a.dead.Run)
	}
	if a.cache != nil {
		parts = append(parts, a.cache.Run)
	}
	if a.listener != nil { // whoever may ask for /metrics gets those of the workload too
		parts = append(parts, a.monitor.Run, a.feed.Run)
	}
	if a.name != "api" {
		parts = append(parts, a.deliverer.Run)
	}
	return parts
}

// logStart says once what the program is made of.
func (a *app) logStart() {
	kind := func(url, server string) string {
		if url == "" {
			return "embedded"
		}
		return server
	}
	build := readBuild()
	build.expose()
	a.log.Info("starting", "command", a.name, "version", build.version, "store", kind(a.DatabaseURL, "postgres"), "queue", kind(a.AMQPURL, "rabbitmq"),
		"cache", a.cacheName, "blobs", kind(a.S3Bucket, "s3"), "auth", a.Auth)
	if !a.Auth && a.listener != nil {
		a.log.Warn("AUTHENTICATION IS OFF: whoever reaches the address, through a proxy too, may read and change everything",
			"addr", a.listener.Addr().String(), "loopback", isLoopback(a.listenAddr()))
	}
	if a.media != nil && a.PublicURL == "" && a.name != "worker" && isEveryAddress(a.listener.Addr()) {
		a.log.Warn("PUBLIC_URL is not set: the URLs of images have the address listened on, which is no address for clients", "addr", a.listener.Addr().String())
	}
	if a.FetchLimits.AllowPrivate {
		a.log.Warn("images may be fetched from private addresses, and webhooks sent there (IMAGE_ALLOW_PRIVATE)")
	}
}

// isEveryAddress tells what listens on all addresses of the machine, as ":8080" does.
func isEveryAddress(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && (tcp.IP == nil || tcp.IP.IsUnspecified())
}

// migrateInterval is the wait between tries to reach a database that is away.
const migrateInterval = time.Second

// migrate brings the database to this program's schema as soon as it can be
// reached. An error that waiting does not mend ends the program.
func (a *app) migrate(ctx context.Context) error {
	health := healthLog{log: a.log}
	for {
		err := a.store.Migrate(ctx)
		if err == nil {
			close(a.migrated)
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, errUnavailable) {
			return fmt.Errorf("prepare the database: %w", err)
		}
		health.fault("away", "database is away, retrying", err)
		_ = sleep(ctx, migrateInterval)
	}
}

// afterMigration runs a part once there are tables to work with.
func (a *app) afterMigration(ctx context.Context, run func(context.Context) error) error {
	select {
	case <-a.migrated:
		return run(ctx)
	case <-ctx.Done():
		return nil
	}
}

// deadChanged says that there are fewer dead letters than copies.
func (a *app) deadChanged() {
	if a.dead != nil {
		a.dead.LookSoon()
	}
}

// process runs the image pipeline until stop ends, and lets it finish what it
// has in hand within the grace period.
func (a *app) process(ctx, stop context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(stop, func() { time.AfterFunc(a.ShutdownGrace, cancel) })()
	// The pipeline's processors keep as many threads busy; the others need theirs.
	runtime.GOMAXPROCS(cpus + a.Image.Workers)
	limits := a.FetchLimits
	limits.Memory = a.Image.Memory
	p := &pipeline{
		imageSettings: a.Image,
		store:         a.store,
		queue:         a.queue,
		blobs:         a.blobs,
		sources:       newFetcher(limits),
		invalidate:    a.invalidate,
		memory:        semaphore.NewWeighted(a.Image.Memory),
		log:           a.log,
	}
	return p.Run(ctx, stop)
}

// newWebServer answers requests on connections that cannot be held for long.
func newWebServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       keepAliveTimeout,
		MaxHeaderBytes:    maxRequestHeader,
		ConnState:         answered,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),

		DisableGeneralOptionsHandler: true, // "OPTIONS *" is refused in our own words
	}
}

// serveHTTP answers requests until ctx ends, and lets those in work finish
// within the grace period.
func (a *app) serveHTTP(ctx context.Context) error {
	s := &server{
		store:       a.store,
		products:    a.reader,
		encoder:     a.encoder,
		wake:        a.dispatcher.Wake,
		invalidate:  a.changed,
		deadChanged: a.deadChanged,
		parts:       a.parts,
		console:     newConsole(),
		monitor:     a.monitor,
		feed:        a.feed,
		authOn:      a.Auth,
		patience:    bulkPatience,
		log:         a.log,
		stopping:    make(chan struct{}),
	}
	s.limits.set(a.Limits)
	if a.media != nil {
		s.media = a.media.serve
	}
	routes := s.routes
	if a.name == "worker" {
		routes = s.workerRoutes
	}
	web := newWebServer(routes(), a.log)
	failed := make(chan error, 1)
	go func() { failed <- web.Serve(unparsedListener{a.listener, s}) }()
	a.log.Info("listening", "addr", a.listener.Addr().String())
	select {
	case err := <-failed:
		return fmt.Errorf("serve HTTP: %w", err)
	case <-ctx.Done():
	}
	a.log.Info("stopping")
	s.draining.Store(true)
	time.Sleep(a.ShutdownDelay) // requests are answered meanwhile
	close(s.stopping)
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.ShutdownGrace)
	defer cancel()
	if err := web.Shutdown(grace); err != nil {
		a.log.Warn("requests were still in work, breaking them off", "err", err)
		web.Close()
	}
	return nil
}

// withExistingStore is withStore for commands that look at what there is. Without
// the service's settings they would make an empty database and find nothing in it.
func (p *program) withExistingStore(ctx context.Context, do func(*store) error) error {
	if p.DatabaseURL == "" {
		if _, err := os.Stat(sqliteFile(p.DataDir)); err != nil {
			return usagef("there is no database in DATA_DIR %s: is DATABASE_URL to be set, or another DATA_DIR?", p.DataDir)
		}
	}
	return p.withStore(ctx, do)
}

// withStore runs an operator's command on the database.
func (p *program) withStore(ctx context.Context, do func(*store) error) error {
	db, err := p.openStore(ctx)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := db.Migrate(ctx); err != nil {
		return fmt.Errorf("prepare the database: %w", err)
	}
	return do(db)
}

// withInvalidation runs an operator's command that changes products, and tells
// the running instances' caches what has changed.
func (p *program) withInvalidation(ctx context.Context, do func(invalidate func(id, version int64)) error) error {
	if p.RedisURL == "" || p.RedisURL == "off" {
		return do(func(int64, int64) {})
	}
	redis, err := newRedisCache(p.RedisURL, p.CacheTTL, p.CacheSize, p.log)
	if err != nil {
		return err
	}
	cache := newCache(nil, redis, p.CacheTTL, p.log)
	runCtx, stop := context.WithCancel(context.WithoutCancel(ctx)) // do has something to tell until it returns
	ended := make(chan error, 1)
	go func() { ended <- cache.Run(runCtx) }()
	err = do(cache.Invalidate)
	stop() // Run sends what is left
	return errors.Join(err, <-ended)
}
