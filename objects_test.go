package main

import (
	"fmt"
	"testing"

	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// objects are the keys in a bucket.
func (e s3Env) objects(t *testing.T) (keys []string) {
	t.Helper()
	list, err := e.client().ListObjectsV2(t.Context(), &s3.ListObjectsV2Input{Bucket: &e.Bucket})
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range list.Contents {
		keys = append(keys, *object.Key)
	}
	return keys
}

// Objects of a deleted product and of a replaced image go, though S3 was away
// when that happened and the process that had it to do was killed.
func TestObjectsGoThoughS3WasAwayAndTheProcessKilled(t *testing.T) {
	t.Parallel()
	storage := startS3(t)
	bucket := storage.newBucket(t)
	env := environment(bucketEnv(bucket), map[string]string{"DATA_DIR": t.TempDir()})
	photos := newPhotoServer(t)
	first := startBinary(t, env)
	deleted := first.settled(t, first.post(t, photos.serve("/a", jpegPhoto(t, 40, 40)), photos.serve("/b", jpegPhoto(t, 50, 50))).ID)
	replaced := first.settled(t, first.post(t, photos.serve("/c", jpegPhoto(t, 60, 60)), photos.serve("/d", jpegPhoto(t, 70, 70))).ID)
	if keys := bucket.objects(t); len(keys) != 4 {
		t.Fatalf("stored: %v", keys)
	}
	storage.Kill(t)
	if response := first.call(t, "DELETE", fmt.Sprintf("/products/%d", deleted.ID), nil, nil); response.StatusCode != 204 {
		t.Errorf("delete with S3 away: %s", response.Status)
	}
	patch := map[string]any{"product_images": []string{photos.URL + "/d"}}
	if response := first.call(t, "PATCH", fmt.Sprintf("/products/%d", replaced.ID), patch, nil); response.StatusCode != 200 {
		t.Errorf("patch with S3 away: %s", response.Status)
	}
	first.log.await(t, "clearing up failed")
	first.kill()
	storage.Start(t)
	second := startBinary(t, env)
	eventually(t, "only the image that is referred to is stored", func() bool { return len(bucket.objects(t)) == 1 })
	if got := second.get(t, replaced.ID); len(got.Images) != 1 || statusOf(got.Images[0].URL) != 200 {
		t.Errorf("the image that stayed: %+v", got.Images)
	}
}

// A result whose product was deleted while it was uploaded is not left behind: its
// key is due to be deleted from before the upload on.
func TestObjectOfALateUploadIsNoted(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "https://a.example/1.jpg")
		job := publishDue(t, s)[0]
		if err := s.ReserveObject(t.Context(), job.ID, "late"); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteProduct(t.Context(), p.ID, func(Product) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if _, err := s.SettleReady(t.Context(), job, Image{Key: "late"}); err == nil {
			t.Error("settled")
		}
		advance(s, garbageGrace+1)
		wantGarbage(t, s, "after the grace", "late")
	})
}
