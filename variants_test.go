package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/image/draw"
)

// Each variant is compared with how an independent resampler scales an
// independent decoder's view of the source.
func TestVariantsLookLikeTheImage(t *testing.T) {
	t.Parallel()
	const photos, edges = 4, 6 // the mean that a channel may differ; see TestGoldenImages
	for name, test := range map[string]struct {
		mean  float64
		ext   string
		model string
	}{
		"orientation-1.jpg":     {photos, "jpg", "colour"},
		"orientation-2.jpg":     {photos, "jpg", "colour"},
		"orientation-6.jpg":     {photos, "jpg", "colour"},
		"orientation-7.jpg":     {photos, "jpg", "colour"},
		"progressive-444.jpg":   {edges, "jpg", "colour"},
		"grey.jpg":              {photos, "jpg", "grey"},
		"display-p3.jpg":        {photos, "jpg", "profile"},
		"cmyk.jpg":              {edges, "jpg", "colour"},
		"interlaced-16-bit.png": {edges, "jpg", "colour"},
		"grey-16-bit.png":       {photos, "jpg", "grey"},
		"alpha.png":             {2, "png", "alpha"},
		"palette.gif":           {2, "png", "alpha"},
		"lossy-alpha.webp":      {2, "png", "alpha"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			whole := decoded(t, readTestFile(t, filepath.Join("testdata", "golden", name+".whole.png")))
			widths := []int{20, 11}
			all := compressBest(t, readTestFile(t, filepath.Join("testdata", "golden", name)), maxImageSide, widths)
			if len(all) != 1+len(widths) {
				t.Fatalf("%d results", len(all))
			}
			for n, c := range all[1:] {
				got := decodeResult(t, c)
				size := whole.Bounds().Size()
				want := image.NewRGBA(image.Rect(0, 0, widths[n], (size.Y*widths[n]*2+size.X)/(size.X*2)))
				draw.CatmullRom.Scale(want, want.Rect, whole, whole.Bounds(), draw.Src, nil)
				if kind := kindOf(t, c, got); c.Ext != test.ext || kind != test.model {
					t.Errorf("%d wide: %s, %s; want %s, %s", widths[n], c.Ext, kind, test.ext, test.model)
				}
				t.Run(fmt.Sprint(widths[n]), func(t *testing.T) { comparePixels(t, onWhite(got), onWhite(want), test.mean, 90) })
			}
		})
	}
}

func TestVariantsHaveTheWidthsThatAreNarrower(t *testing.T) {
	t.Parallel()
	turned := withJPEGSegment(encodedJPEG(t, photo(300, 200), 90), 0xe1, exifName+exifData(6))
	for name, test := range map[string]struct {
		data []byte
		side int
		want string
	}{
		"wide":                  {encodedJPEG(t, photo(300, 200), 90), 2048, "[300×200 299×199 150×100 1×1]"},
		"wide, made smaller":    {encodedJPEG(t, photo(300, 200), 90), 150, "[150×100 1×1]"},
		"turned":                {turned, 2048, "[200×300 150×225 1×2]"},
		"turned, made smaller":  {turned, 200, "[133×200 1×2]"},
		"thin":                  {encodedJPEG(t, photo(300, 1), 90), 2048, "[300×1 299×1 150×1 1×1]"},
		"as wide as a variant":  {encodedPNG(t, corners(150, 90)), 2048, "[150×90 1×1]"},
		"narrower than any":     {encodedPNG(t, corners(1, 9)), 2048, "[1×9]"},
		"its source is kept":    {encodedGIF(t, corners(200, 100)), 2048, "[200×100 150×75 1×1]"},
		"rounded from its size": {encodedJPEG(t, photo(299, 101), 90), 298, "[298×101 150×51 1×1]"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			all, err := compressSizes(test.data, test.side, 300, 299, 150, 1)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range all {
				if size := decodeResult(t, c).Bounds().Size(); size != image.Pt(c.Width, c.Height) {
					t.Errorf("%v, but said to be %d×%d", size, c.Width, c.Height)
				}
				got = append(got, fmt.Sprintf("%d×%d", c.Width, c.Height))
			}
			if fmt.Sprint(got) != test.want {
				t.Errorf("%v, want %s", got, test.want)
			}
		})
	}
}

// While a variant is made, planes and file of the sizes before it are still
// there. White noise is the worst that an encoder can get.
func TestCostCoversVariants(t *testing.T) {
	t.Parallel()
	alpha := image.NewNRGBA(image.Rect(0, 0, 512, 512))
	copy(alpha.Pix, slices.Concat(noise(512, 512, 1).Y, noise(512, 512, 2).Y, noise(512, 512, 3).Y, noise(512, 512, 4).Y))
	grey := &image.Gray{Pix: noise(512, 512, 1).Y, Stride: 512, Rect: alpha.Rect}
	for name, test := range map[string]struct {
		data   []byte
		planes float64 // bytes a pixel
	}{
		"colour": {encodedJPEG(t, noise(512, 512, 1), 100), 1.5},
		"grey":   {encodedJPEG(t, grey, 100), 1},
		"alpha":  {encodedPNG(t, alpha), 4},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := headerOf(t, test.data)
			d, err := decodeImage(test.data, h, 2048, imageTools{})
			if err != nil {
				t.Fatal(err)
			}
			widths := []int{500, 400}
			all, err := compressImage(d, test.data, widths, 100)
			if err != nil {
				t.Fatal(err)
			}
			stays := 0.0
			for _, c := range all[:2] {
				stays += test.planes*float64(c.Width*c.Height) + float64(cap(c.Data))
			}
			last := float64(all[2].Width*all[2].Height) * h.outputBytes
			if counted := float64(h.costAt(2048, widths) - h.costAt(1, nil)); stays+last > counted {
				t.Errorf("%.0f stay of two sizes and %.0f are needed for the third, %.0f are counted", stays, last, counted)
			}
		})
	}
}

func TestVariantWidthsAreRead(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]string{
		"320":            "[320]",
		"320,800":        "[800 320]",
		" 1600 ,320,800": "[1600 800 320]",
		"65535":          "[65535]",
		"65536":          "", "0": "", "-1": "", "320,": "", ",": "", "320,320": "", "a": "", "320;800": "", "3.5": "",
		"1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17": "",
	} {
		env := map[string]string{"IMAGE_VARIANTS": value}
		c, err := loadConfig(func(name string) string { return env[name] }, false)
		switch {
		case want == "" && (err == nil || !strings.Contains(err.Error(), "IMAGE_VARIANTS")):
			t.Errorf("%q is read as %v, %v", value, c.Image.Variants, err)
		case want != "" && (err != nil || fmt.Sprint(c.Image.Variants) != want):
			t.Errorf("%q is read as %v, %v; want %s", value, c.Image.Variants, err, want)
		}
	}
	if c, err := loadConfig(func(string) string { return "" }, false); err != nil || c.Image.Variants != nil {
		t.Errorf("by default: %v, %v", c.Image.Variants, err)
	}
}

// imageWith is an image as a worker hands it to SettleReady.
func imageWith(keys ...string) Image {
	i := Image{Key: keys[0], Width: 20, Height: 10, Bytes: 500, SourceBytes: 900}
	for n, key := range keys[1:] {
		i.Variants = append(i.Variants, variant{Width: 10 - n, Key: key, Bytes: int64(50 - n)})
	}
	return i
}

func inOrderOfID(jobs []Job) []Job {
	slices.SortFunc(jobs, func(a, b Job) int { return cmp.Compare(a.ID, b.ID) })
	return jobs
}

func TestStoreKeepsVariantsWithTheirImage(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a", "b")
		jobs := inOrderOfID(publishDue(t, s))
		finish(t, s, jobs[0], "main", "800", "320")
		finish(t, s, jobs[1], "alone")
		got, err := s.Product(t.Context(), p.ID)
		if err != nil || len(got.Images) != 2 || fmt.Sprint(got.Images[0].Variants) != "[{10 800 50} {9 320 49}]" || got.Images[1].Variants != nil {
			t.Fatalf("stored %+v, %v", got.Images, err)
		}
		doc := encoder{objectURL: func(key string) string { return "https://cdn.example/" + key }}.product(got)
		var shown struct {
			Images []struct{ Variants json.RawMessage }
		}
		if err := json.Unmarshal(doc.Body, &shown); err != nil {
			t.Fatal(err)
		}
		if v := string(shown.Images[0].Variants); v != `[{"width":10,"url":"https://cdn.example/800","bytes":50},{"width":9,"url":"https://cdn.example/320","bytes":49}]` || shown.Images[1].Variants != nil {
			t.Errorf("shown %s", doc.Body)
		}
		advance(s, 2*garbageGrace)
		wantGarbage(t, s, "of objects in use")
		if _, err := s.UpdateProduct(t.Context(), p.ID, origin{}, always, setSources("b")); err != nil {
			t.Fatal(err)
		}
		wantGarbage(t, s, "of a dropped image", "320", "800", "main")
		deleteProduct(t, s, p.ID)
		wantGarbage(t, s, "of a deleted product", "alone")
	})
}

// A variant that was collected as garbage before its image was settled has all
// of them uploaded again.
func TestStoreSettlesNoImageThatLacksAVariant(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		reserve(t, s, job, "main", "320")
		if _, err := s.SettleReady(t.Context(), job, imageWith("main", "800", "320")); !errors.Is(err, errReservationLost) {
			t.Errorf("settled with a variant that was not reserved: %v", err)
		}
		if got, _ := s.Product(t.Context(), p.ID); got.Version != 1 || got.Images[0].Status != imagePending || got.Images[0].Key != "" {
			t.Errorf("the product is now %+v", got)
		}
		advance(s, 2*garbageGrace)
		_, err := s.CollectGarbage(t.Context(), 10, func(ctx context.Context, key string) error {
			if err := s.ReserveObject(ctx, job.ID, "main", "320"); !errors.Is(err, errObjectBusy) {
				t.Errorf("reserved while %s is being deleted: %v", key, err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		finish(t, s, job, "main", "800", "320")
	})
}

// A worker whose upload took so long that another one with the same result was
// faster, and that one's object gone again, has left it behind.
func TestStoreDiscardsWhatCameTooLate(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		finish(t, s, job, "main", "320")
		if err := s.DiscardUnwanted(t.Context(), job.ID, []string{"main", "320"}); err != nil {
			t.Fatal(err)
		}
		wantGarbage(t, s, "of objects in use")
		deleteProduct(t, s, p.ID)
		for _, when := range []string{"with the product", "after the late upload"} {
			wantGarbage(t, s, when, "320", "main")
			if err := s.DiscardUnwanted(t.Context(), job.ID, []string{"main", "320"}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// What a worker uploaded while its product was deleted goes as soon as it knows,
// and not when its reservation ends.
func TestStoreDiscardsWhatIsReserved(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		job := publishDue(t, s)[0]
		reserve(t, s, job, "main", "320")
		deleteProduct(t, s, p.ID)
		wantGarbage(t, s, "while it is uploaded")
		if err := s.DiscardUnwanted(t.Context(), job.ID, []string{"main", "320"}); err != nil {
			t.Fatal(err)
		}
		wantGarbage(t, s, "after the upload", "320", "main")
	})
}

// An object that cannot be deleted does not keep the others.
func TestStoreDeletesWhatItCan(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		p := create(t, s, "a")
		finish(t, s, publishDue(t, s)[0], "main", "320", "800")
		deleteProduct(t, s, p.ID)
		refused, first := errors.New("refused"), ""
		_, err := s.CollectGarbage(t.Context(), 10, func(_ context.Context, key string) error {
			if first = cmp.Or(first, key); key == first {
				return refused
			}
			return nil
		})
		if !errors.Is(err, refused) {
			t.Errorf("the failure is %v", err)
		}
		advance(s, garbageRetry)
		wantGarbage(t, s, "later", first)
	})
}
