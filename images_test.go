package main

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"
)

func TestStoreDispatchesEachJobOnce(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a", "b", "c")
		jobs := publishDue(t, s)
		if len(jobs) != 3 || jobs[0].ProductID != p.ID || jobs[0].RequestID != "req-1" {
			t.Fatalf("dispatched %+v", jobs)
		}
		if again := publishDue(t, s); len(again) != 0 {
			t.Errorf("dispatched again: %v", again)
		}
		if n, err := s.RequeuePublished(t.Context(), time.Hour); err != nil || n != 0 {
			t.Errorf("%d were requeued long before an hour was over, %v", n, err)
		}
		finish(t, s, jobs[0], "object")
		behind := *s
		advance(&behind, -time.Minute) // what one instance marks may be in another's future
		if n, err := behind.RequeueAll(t.Context()); err != nil || n != 2 {
			t.Errorf("%d unfinished jobs were requeued, want 2, %v", n, err)
		}
		if again := publishDue(t, s); len(again) != 2 {
			t.Errorf("after the broker lost them %v were dispatched, want 2", again)
		}
	})
}

// The queue may go, and all be requeued for the next, after it has confirmed a
// batch and before the dispatcher has marked that as published.
func TestStoreRequeuesWhatIsBeingPublished(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a", "b")
		_, err := s.DispatchDue(t.Context(), 10, func(ctx context.Context, jobs []Job) ([]Job, error) {
			n, err := s.RequeueAll(ctx)
			if n != 2 {
				t.Errorf("%d were requeued, want 2", n)
			}
			return nil, err
		})
		if err != nil {
			t.Fatal(err)
		}
		if again := publishDue(t, s); len(again) != 2 {
			t.Errorf("the next queue gets %v, want both", again)
		}
		if again := publishDue(t, s); len(again) != 0 {
			t.Errorf("dispatched again: %v", again)
		}
	})
}

// A worker may be done with a job before its dispatcher has marked it as published.
// Its wait counts from then on, also for a queue that begins empty.
func TestStoreKeepsTheWaitsOfFastWorkers(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a", "b")
		_, err := s.DispatchDue(t.Context(), 10, func(ctx context.Context, jobs []Job) ([]Job, error) {
			retry := failure{imageError: transient("http_503", ""), Attempt: 1, RetryAt: s.now().Add(time.Hour)}
			_, err := s.SettleFailed(ctx, jobs[0], retry)
			return nil, errors.Join(err, s.PutOff(ctx, jobs[1].ID))
		})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := s.RequeueAll(t.Context()); err != nil || n != 0 {
			t.Errorf("%d that wait were requeued, %v", n, err)
		}
	})
}

func TestStoreConcurrentDispatchersShareTheWork(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		const products = 50
		for range products {
			create(t, s, "a", "b")
		}
		var mu sync.Mutex
		times := make(map[int64]int)
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				for {
					n, err := s.DispatchDue(t.Context(), 7, func(_ context.Context, jobs []Job) ([]Job, error) {
						mu.Lock()
						defer mu.Unlock()
						for _, job := range jobs {
							times[job.ID]++
						}
						return nil, nil
					})
					if err != nil {
						t.Error(err)
					}
					if n == 0 || err != nil {
						return
					}
				}
			})
		}
		group.Wait()
		if len(times) != 2*products {
			t.Errorf("%d jobs were dispatched, want %d", len(times), 2*products)
		}
		for id, n := range times {
			if n != 1 {
				t.Errorf("job %d was dispatched %d times", id, n)
			}
		}
	})
}

func TestStoreDispatchesAgainWhatTheBrokerDidNotTake(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a", "b")
		var refused []Job
		_, err := s.DispatchDue(t.Context(), 10, func(_ context.Context, jobs []Job) ([]Job, error) {
			refused = jobs[:1]
			return refused, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		advance(s, 2*refusedDelay)
		if again := publishDue(t, s); !slices.Equal(again, refused) {
			t.Errorf("dispatched again: %v, want %v", again, refused)
		}

		broken := errors.New("broken")
		create(t, s, "c", "d")
		_, err = s.DispatchDue(t.Context(), 10, func(_ context.Context, jobs []Job) ([]Job, error) {
			refused = jobs[1:]
			return refused, broken
		})
		if !errors.Is(err, broken) {
			t.Errorf("a publish that failed on the way: %v", err)
		}
		advance(s, 2*refusedDelay)
		if again := publishDue(t, s); !slices.Equal(again, refused) {
			t.Errorf("after that dispatched again: %v, want %v", again, refused)
		}
	})
}

func TestStoreDispatchesAgainWhatADeadDispatcherHadClaimed(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a")
		if _, err := updateReturning(t.Context(), s, scanJob, claimDue, s.now(), s.now().Add(leaseTime), int64(1), 10); err != nil {
			t.Fatal(err) // a claim whose process is killed here
		}
		if jobs := publishDue(t, s); len(jobs) != 0 {
			t.Errorf("dispatched during the lease: %v", jobs)
		}
		advance(s, leaseTime+time.Second)
		if jobs := publishDue(t, s); len(jobs) != 1 {
			t.Errorf("dispatched after the lease: %v, want 1", jobs)
		}
	})
}

func TestStoreSettlesAnImageOnce(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		if version := finish(t, s, job, "first"); version != 2 {
			t.Errorf("version %d after the first image of a new product", version)
		}
		_, err := s.SettleReady(t.Context(), job, Image{Key: "second"})
		if !errors.Is(err, errNotFound) {
			t.Errorf("settled a second time: %v", err)
		}
		why := permanent("http_404", "404 Not Found")
		if _, err := s.SettleFailed(t.Context(), job, failure{imageError: why, Attempt: 1}); !errors.Is(err, errNotFound) {
			t.Errorf("failed after it was ready: %v", err)
		}
		got, _ := s.Product(t.Context(), p.ID)
		if image := got.Images[0]; got.Version != 2 || image.Status != imageReady || image.Key != "first" ||
			image.Width != 20 || image.Height != 10 || image.Bytes != 500 || image.SourceBytes != 900 {
			t.Errorf("the product is now %+v", got)
		}
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "of objects in use")
	})
}

func TestStoreDropsTheResultOfAnImageNobodyWants(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "old")
		job := publishDue(t, s)[0]
		reserve(t, s, job, "late")
		if _, err := s.UpdateProduct(t.Context(), p.ID, origin{}, always, setSources("new")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.SettleReady(t.Context(), job, Image{Key: "late"}); !errors.Is(err, errNotFound) {
			t.Errorf("settled an image that was replaced: %v", err)
		}
		if err := s.ReserveObject(t.Context(), job.ID, "later"); !errors.Is(err, errNotFound) {
			t.Errorf("reserved an object for it: %v", err)
		}
		got, _ := s.Product(t.Context(), p.ID)
		if got.Version != 2 || got.Images[0].Status != imagePending || got.Images[0].Source != "new" {
			t.Errorf("the newer data was overwritten: %+v", got)
		}
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "of an image that was replaced", "late")
	})
}

func TestStoreUploadsAgainWhatWasCollectedTooSoon(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a")
		job := publishDue(t, s)[0]
		reserve(t, s, job, "key")
		advance(s, 2*garbageGrace)
		_, err := s.CollectGarbage(t.Context(), 10, func(ctx context.Context, key string) error {
			if err := s.ReserveObject(ctx, job.ID, key); !errors.Is(err, errObjectBusy) {
				t.Errorf("reserved while it is being deleted: %v", err)
			}
			if _, err := s.SettleReady(ctx, job, Image{Key: key}); !errors.Is(err, errReservationLost) {
				t.Errorf("settled while it is being deleted: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.SettleReady(t.Context(), job, Image{Key: "key"}); !errors.Is(err, errReservationLost) {
			t.Errorf("settled after it was deleted: %v", err)
		}
		finish(t, s, job, "key")
	})
}

func TestStoreCollectsGarbageUntilStorageHasTakenIt(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		finish(t, s, publishDue(t, s)[0], "key")
		deleteProduct(t, s, p.ID)
		away := errors.New("storage is away")
		if _, err := s.CollectGarbage(t.Context(), 10, func(context.Context, string) error { return away }); !errors.Is(err, away) {
			t.Errorf("a failed deletion: %v", err)
		}
		wantGarbage(t, s, "tried again at once")
		advance(s, 2*deletingTime)
		wantGarbage(t, s, "tried again later", "key")
		advance(s, 2*deletingTime)
		wantGarbage(t, s, "once more")
	})
}

// All that a janitor has claimed it deletes before its claim is over, or not.
func TestStoreDeletesNothingAfterTheClaim(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a")
		if err := s.ReserveObject(t.Context(), publishDue(t, s)[0].ID, "first", "second"); err != nil {
			t.Fatal(err)
		}
		advance(s, 2*garbageGrace)
		var ends []time.Time
		n, err := s.CollectGarbage(t.Context(), 10, func(ctx context.Context, key string) error {
			end, _ := ctx.Deadline()
			ends = append(ends, end)
			return nil
		})
		if err != nil || n != 2 || ends[0].IsZero() || ends[0] != ends[1] {
			t.Errorf("%d objects, %v, to be deleted until %v", n, err, ends)
		}
	})
}

// Whatever an origin puts into the text of a failure, the failure can be written
// down: a worker tries that until it succeeds.
func TestFailureWithAnyTextSettles(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		create(t, s, "a")
		job := publishDue(t, s)[0]
		why := permanent("bad_response", "%s says \x00", "\xff.example")
		if _, err := s.SettleFailed(t.Context(), job, failure{imageError: why, Attempt: 1}); err != nil {
			t.Fatal(err)
		}
		letter, err := s.DeadLetter(t.Context(), job.ID)
		if err != nil || letter.ErrorDetail != "\uFFFD.example says \uFFFD" {
			t.Errorf("%+v, %v", letter, err)
		}
	})
}

func TestStoreRetriesThenBuriesAndReplays(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		why := transient("http_503", "503 Service Unavailable")
		retry := failure{imageError: why, Attempt: 1, Duration: 40 * time.Millisecond, RetryAt: s.now().Add(time.Minute)}
		if version, err := s.SettleFailed(t.Context(), job, retry); err != nil || version != 2 {
			t.Fatalf("first failure: version %d, %v", version, err)
		}
		if _, err := s.SettleFailed(t.Context(), job, retry); !errors.Is(err, errNotFound) {
			t.Errorf("the same failure was counted twice: %v", err)
		}
		got, _ := s.Product(t.Context(), p.ID)
		if image := got.Images[0]; image.Status != imagePending || image.Attempts != 1 || image.ErrorCode != "http_503" {
			t.Errorf("after the first failure: %+v", image)
		}
		if jobs := publishDue(t, s); len(jobs) != 0 {
			t.Errorf("due before its time: %v", jobs)
		}
		advance(s, 2*time.Minute)
		if jobs := publishDue(t, s); len(jobs) != 1 {
			t.Fatalf("not due at its time: %v", jobs)
		}
		settled(t, s.PutOff(t.Context(), job.ID))
		if _, err := s.SettleFailed(t.Context(), job, failure{imageError: why, Attempt: 2}); err != nil {
			t.Fatal(err)
		}

		letters, err := s.DeadLetters(t.Context(), deadFilter{}, 0, 10)
		if err != nil || len(letters) != 1 || letters[0].ID != job.ID || letters[0].ProductID != p.ID || letters[0].Attempts != 2 {
			t.Fatalf("dead letters: %+v, %v", letters, err)
		}
		letter, err := s.DeadLetter(t.Context(), job.ID)
		if err != nil || len(letter.History) != 2 || letter.History[0].Duration != 40*time.Millisecond || letter.History[1].Code != "http_503" {
			t.Errorf("the dead letter: %+v, %v", letter, err)
		}
		if n, changed, err := s.ReplayDead(t.Context(), []int64{job.ID}, origin{}); err != nil || n != 1 || !slices.Equal(changed, []productVersion{{p.ID, 4}}) {
			t.Errorf("replay: %d, %v, %v", n, changed, err)
		}
		if n, changed, err := s.ReplayDead(t.Context(), []int64{job.ID}, origin{}); err != nil || n != 0 || len(changed) != 0 {
			t.Errorf("second replay: %d, %v, %v", n, changed, err)
		}
		if jobs := publishDue(t, s); len(jobs) != 1 {
			t.Errorf("dispatched after the replay: %v", jobs)
		}
		if image, err := s.PendingImage(t.Context(), job.ID); err != nil || image.Attempts != 0 || image.ErrorCode != "" {
			t.Errorf("after the replay: %+v, %v", image, err)
		}
		var putOff int
		if err := queryRow(t.Context(), s, []any{&putOff}, `SELECT put_off FROM images WHERE id = $1`, job.ID); err != nil || putOff != 0 {
			t.Errorf("after the replay it has been put off %d times, %v", putOff, err)
		}
	})
}

func TestStoreDiscardsDeadLetters(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		if err := s.DiscardDead(t.Context(), job.ID); !errors.Is(err, errNotFound) {
			t.Errorf("discarded a pending image: %v", err)
		}
		bury(t, s, job, permanent("http_404", "404 Not Found"))
		if err := s.DiscardDead(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		if letters, err := s.DeadLetters(t.Context(), deadFilter{}, 0, 10); err != nil || len(letters) != 0 {
			t.Errorf("still listed: %v, %v", letters, err)
		}
		if n, _, err := s.ReplayDead(t.Context(), []int64{job.ID}, origin{}); err != nil || n != 0 {
			t.Errorf("replayed: %d, %v", n, err)
		}
		if got, _ := s.Product(t.Context(), p.ID); got.Images[0].Status != imageFailed {
			t.Errorf("the product's image: %+v", got.Images[0])
		}
	})
}
