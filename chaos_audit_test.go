package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// acceptance is what a client knows of a product: that it got a 201 for it, and
// what each of its images must end as.
type acceptance struct {
	Product int64           `json:"product"`
	Images  []expectedImage `json:"images"`
	Deleted bool            `json:"deleted,omitempty"`
}

// expectedImage says how an image may end: "ready", or with an error code.
type expectedImage struct {
	Source string   `json:"source"`
	Want   []string `json:"want"`
}

// acceptanceLog is the client's own record, on disk before anything else
// happens. Of several lines for a product the last counts.
type acceptanceLog struct {
	mu   sync.Mutex
	file *os.File
}

func newAcceptanceLog(t *testing.T) *acceptanceLog {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "accepted")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return &acceptanceLog{file: file}
}

func (l *acceptanceLog) add(a acceptance) error {
	line, err := json.Marshal(a)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.file.Write(append(line, '\n')); err != nil {
		return err
	}
	return l.file.Sync()
}

// readAcceptances reads a log as the auditor does: from its file.
func readAcceptances(path string) (map[int64]acceptance, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	accepted := make(map[int64]acceptance)
	for line := range bytes.Lines(data) {
		var a acceptance
		if err := json.Unmarshal(line, &a); err != nil {
			return nil, fmt.Errorf("read acceptance %s: %w", line, err)
		}
		accepted[a.Product] = a
	}
	return accepted, nil
}

// auditor compares what a client was promised with what PostgreSQL, S3 and
// RabbitMQ hold. It asks each of them directly, by its own connections, and the
// program nothing.
type auditor struct {
	accepted string // path of the acceptance log
	db       *pgxpool.Pool
	s3       s3Env
	amqp     string
}

// ledgerTrigger writes down each step of an image on its way to the broker, as
// its row shows it. Nothing is published that is not claimed, so of the claims
// those that were neither given back nor made necessary by a retry are images
// that the broker may have got once more than need be.
const ledgerTrigger = `
CREATE TABLE audit_steps (id bigserial PRIMARY KEY, image_id bigint NOT NULL, step text NOT NULL);
CREATE FUNCTION audit_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO audit_steps (image_id, step) VALUES (NEW.id, CASE
		WHEN NEW.status <> 'pending' THEN 'ended'
		WHEN NEW.claim <> OLD.claim AND NEW.claim <> 0 THEN 'claimed'
		WHEN OLD.status <> 'pending' OR (NEW.attempts, NEW.put_off) <> (OLD.attempts, OLD.put_off) THEN 'retried'
		WHEN OLD.run_at IS NOT NULL AND NEW.run_at IS NOT NULL THEN 'given back'
		ELSE 'other' END);
	RETURN NULL;
END $$;
CREATE TRIGGER audit_steps AFTER UPDATE ON images FOR EACH ROW EXECUTE FUNCTION audit_step()`

// newAuditor attaches an auditor to a database that has its schema.
func newAuditor(t *testing.T, accepted *acceptanceLog, database, amqpURL string, bucket s3Env) *auditor {
	t.Helper()
	pool, err := pgxpool.New(context.Background(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if _, err := pool.Exec(t.Context(), ledgerTrigger, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatalf("watch the images: %v", err)
	}
	return &auditor{accepted: accepted.file.Name(), db: pool, s3: bucket, amqp: amqpURL}
}

// findings are what an audit found. All but the first three must be 0 in the end;
// Twice must be 0 where nothing was broken.
type findings struct {
	Accepted, Ready, Dead int // images

	Lost         int // accepted, and neither ready with its object stored nor dead
	WronglyDead  int // ended otherwise than its source deserves
	Unfinished   int // rows still pending, of whatever product
	Orphans      int // objects that no image refers to
	Disagreeing  int // in the dead queue or a dead row, but not both
	Twice        int // claims that may have put an image into the queue once more than need be
	explanations []string
}

func (v *findings) count(n *int, format string, args ...any) {
	*n++
	if len(v.explanations) < 20 {
		v.explanations = append(v.explanations, fmt.Sprintf(format, args...))
	}
}

// clean says whether every promise is kept.
func (v findings) clean() bool {
	return v.Lost == 0 && v.WronglyDead == 0 && v.Unfinished == 0 && v.Orphans == 0 && v.Disagreeing == 0
}

func (v findings) String() string {
	lines := []string{
		fmt.Sprintf("accepted %d images: ready %d, dead %d", v.Accepted, v.Ready, v.Dead),
		fmt.Sprintf("lost %d, wrongly dead %d, unfinished %d, orphan objects %d, dead queue and rows disagree %d", v.Lost, v.WronglyDead, v.Unfinished, v.Orphans, v.Disagreeing),
		fmt.Sprintf("published twice: %d at most", v.Twice),
	}
	return strings.Join(append(lines, v.explanations...), "\n")
}

// auditedImage is a row of images as the auditor reads it.
type auditedImage struct {
	ID, ProductID             int64
	Source, Status, Code, Key string
	Bytes                     int64
	Discarded                 bool
}

// audit looks at everything once.
func (a *auditor) audit(ctx context.Context) (v findings, err error) {
	accepted, err := readAcceptances(a.accepted)
	if err != nil {
		return v, err
	}
	rows, err := a.db.Query(ctx, `SELECT id, product_id, source, status, error_code, object_key, bytes, discarded_at IS NOT NULL FROM images ORDER BY product_id, position`)
	if err != nil {
		return v, err
	}
	images, err := pgx.CollectRows(rows, pgx.RowToStructByPos[auditedImage])
	if err != nil {
		return v, err
	}
	objects, err := a.objects(ctx)
	if err != nil {
		return v, err
	}
	dead, err := a.deadQueue()
	if err != nil {
		return v, err
	}
	v.compareAccepted(accepted, images, objects)
	v.compareObjects(images, objects)
	v.compareDead(images, dead)
	return v, a.db.QueryRow(ctx, `SELECT coalesce(sum(greatest(0, claimed - given_back - retried - 1)), 0) FROM (
		SELECT count(*) FILTER (WHERE step = 'claimed') claimed, count(*) FILTER (WHERE step = 'given back') given_back,
			count(*) FILTER (WHERE step = 'retried') retried
		FROM audit_steps GROUP BY image_id) steps`).Scan(&v.Twice)
}

// compareAccepted holds each accepted image against its row.
func (v *findings) compareAccepted(accepted map[int64]acceptance, images []auditedImage, objects map[string]int64) {
	byProduct := make(map[int64][]auditedImage)
	for _, image := range images {
		byProduct[image.ProductID] = append(byProduct[image.ProductID], image)
		if image.Status == "pending" {
			v.count(&v.Unfinished, "image %d of product %d is still pending: %s", image.ID, image.ProductID, image.Source)
		}
	}
	for id, a := range accepted {
		have := byProduct[id]
		if a.Deleted && len(have) > 0 {
			v.count(&v.Lost, "product %d was deleted and is there", id)
		}
		for n, want := range a.Images {
			v.Accepted++
			if n >= len(have) || have[n].Source != want.Source {
				v.count(&v.Lost, "image %d of product %d was accepted and has no row: %s", n, id, want.Source)
				continue
			}
			v.compareImage(have[n], want, objects)
		}
	}
}

func (v *findings) compareImage(have auditedImage, want expectedImage, objects map[string]int64) {
	end := cmp.Or(have.Code, have.Status)
	switch have.Status {
	case "ready":
		v.Ready++
		end = have.Status
		if size, stored := objects[have.Key]; !stored || size != have.Bytes {
			v.count(&v.Lost, "image %d is ready, but its object %s has %d bytes instead of %d", have.ID, have.Key, size, have.Bytes)
		}
	case "failed":
		v.Dead++
	default:
		v.count(&v.Lost, "image %d of product %d never ended: %s", have.ID, have.ProductID, have.Source)
		return
	}
	if !slices.Contains(want.Want, end) {
		v.count(&v.WronglyDead, "image %d ended as %s, want %v: %s", have.ID, end, want.Want, have.Source)
	}
}

func (v *findings) compareObjects(images []auditedImage, objects map[string]int64) {
	referred := make(map[string]bool)
	for _, image := range images {
		referred[image.Key] = true
	}
	for key := range objects {
		if !referred[key] {
			v.count(&v.Orphans, "object %s belongs to no image", key)
		}
	}
}

func (v *findings) compareDead(images []auditedImage, dead map[int64]bool) {
	for _, image := range images {
		isDead := image.Status == "failed" && !image.Discarded
		if isDead != dead[image.ID] {
			v.count(&v.Disagreeing, "image %d (%s): dead row %t, in the dead queue %t", image.ID, image.Code, isDead, dead[image.ID])
		}
		delete(dead, image.ID)
	}
	for id := range dead {
		v.count(&v.Disagreeing, "job %d is in the dead queue and has no row", id)
	}
}

// objects lists the bucket: the sizes by key.
func (a *auditor) objects(ctx context.Context) (map[string]int64, error) {
	sizes := make(map[string]int64)
	pages := s3.NewListObjectsV2Paginator(a.s3.client(), &s3.ListObjectsV2Input{Bucket: &a.s3.Bucket})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, fmt.Errorf("list bucket: %w", err)
		}
		for _, object := range page.Contents {
			sizes[*object.Key] = *object.Size
		}
	}
	return sizes, nil
}

// deadQueue reads every message of the dead queue and leaves them there.
func (a *auditor) deadQueue() (map[int64]bool, error) {
	conn, err := amqp.DialConfig(a.amqp, amqp.Config{Dial: amqp.DefaultDial(setupTimeout)})
	if err != nil {
		return nil, fmt.Errorf("connect to RabbitMQ: %w", err)
	}
	defer conn.CloseDeadline(time.Now().Add(time.Second)) // gives everything back
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	dead := make(map[int64]bool)
	for {
		message, ok, err := ch.Get("image_processing_queue.dead", false)
		if err != nil {
			return nil, fmt.Errorf("read the dead queue: %w", err)
		}
		if !ok {
			return dead, nil
		}
		var body struct{ Job int64 }
		if err := json.Unmarshal(message.Body, &body); err != nil {
			return nil, fmt.Errorf("message %s: %w", message.Body, err)
		}
		dead[body.Job] = true
	}
}

// contents reads every object and holds it against the hash in its key.
func (a *auditor) contents(ctx context.Context) error {
	objects, err := a.objects(ctx)
	if err != nil {
		return err
	}
	for key := range objects {
		object, err := a.s3.client().GetObject(ctx, &s3.GetObjectInput{Bucket: &a.s3.Bucket, Key: &key})
		if err != nil {
			return fmt.Errorf("get %s: %w", key, err)
		}
		data, err := io.ReadAll(object.Body)
		object.Body.Close()
		if err != nil {
			return fmt.Errorf("read %s: %w", key, err)
		}
		sum := sha256.Sum256(data)
		if !strings.Contains(key, fmt.Sprintf("-%x.", sum[:8])) {
			return fmt.Errorf("object %s holds something else", key)
		}
	}
	return nil
}

// auditRest leaves the dead queue alone between two audits, for twice as long
// again as the last took: while one reads it, the program cannot.
const auditRest = 500 * time.Millisecond

// await audits again and again until there is nothing to complain of, for as
// long as patience lasts, and answers what the last audit found. nudge, called
// before each, has the program do now what it would do within minutes.
func (a *auditor) await(t *testing.T, patience time.Duration, nudge func()) findings {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		nudge()
		began := time.Now()
		v, err := a.audit(t.Context())
		if err == nil && v.clean() {
			return v
		}
		if time.Now().Before(deadline) {
			<-time.After(auditRest + 2*time.Since(began))
			continue
		}
		if err != nil {
			t.Fatalf("audit: %v", err)
		}
		return v
	}
}

// count answers how many images satisfy a condition.
func (a *auditor) count(ctx context.Context, condition string) (n int, err error) {
	err = a.db.QueryRow(ctx, "SELECT count(*) FROM images WHERE "+condition).Scan(&n)
	return n, err
}

// letTimePass moves what waits for a time closer by d: leases of dead
// dispatchers, objects whose upload was never settled, copies of dead letters
// that are on their way, and what is kept for a time. Nothing may be at work on them, or it would take its own
// lease for another's.
func (a *auditor) letTimePass(t *testing.T, d time.Duration) {
	t.Helper()
	for _, sql := range []string{
		`UPDATE images SET run_at = run_at - $1::interval WHERE run_at IS NOT NULL AND status = 'pending'`,
		`UPDATE images SET failed_at = failed_at - $1::interval WHERE status = 'failed'`,
		`UPDATE garbage SET delete_at = delete_at - $1::interval`,
		`UPDATE events SET created_at = created_at - $1::interval`,
		`UPDATE idempotency_keys SET created_at = created_at - $1::interval`,
		`UPDATE deliveries SET failed_at = failed_at - $1::interval`,
	} {
		if _, err := a.db.Exec(t.Context(), sql, d); err != nil {
			t.Fatalf("let time pass: %v", err)
		}
	}
}
