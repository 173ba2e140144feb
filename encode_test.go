package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"time"
)

// A product is encoded by hand just as encoding/json encodes it, whatever is in it.
func FuzzEncodeProduct(f *testing.F) {
	for n := range 256 {
		f.Add(string([]byte{byte(n)}), int64(n), byte(1), byte(0xff))
	}
	for _, text := range []string{
		"", "Trail shoe", `"quoted" \ / slashed`, "<script>&amp;</script>", "line\r\n", "Äpfel 鞋 👟",
		"\u2028\u2029", "\ufffd", "cut \xe2\x80", "bad \xff\xc0\xaf", strings.Repeat("x", 5000),
	} {
		f.Add(text, int64(0), byte(0), byte(0))
		f.Add(text, int64(1), byte(1), byte(0xff))
		f.Add(text, int64(1767319445678), byte(3), byte(0b0101))
	}
	f.Fuzz(func(t *testing.T, text string, number int64, images, has byte) {
		p := productJSON{
			ID: number, UserID: number + 1, Name: text + "name", Description: text, Price: Price(number & (1<<40 - 1)), Version: number + 2,
			Sources: []string{}, CompressedImages: []*string{}, Images: []imageJSON{},
			CreatedAt: jsonTime(time.UnixMilli(number % 1e14)), UpdatedAt: jsonTime(time.UnixMilli(number%1e14 + 1)),
		}
		for n := range images % 21 {
			i := encodedImage(text, number+int64(n), has+n)
			p.Images, p.Sources, p.CompressedImages = append(p.Images, i), append(p.Sources, i.Source), append(p.CompressedImages, i.URL)
		}
		if got, want := appendProduct(nil, p), encodeJSON(p); !bytes.Equal(got, want) {
			t.Errorf("by hand\n%s\nby encoding/json\n%s", got, want)
		}
	})
}

// encodedImage is an image that has of each optional field what a bit of has says.
func encodedImage(text string, number int64, has byte) imageJSON {
	i := imageJSON{Source: "source" + text, Status: imageStatus(text)}
	if has&1 != 0 {
		i.URL = new("url" + text)
	}
	if has&2 != 0 {
		i.Width, i.Bytes = int(number), number+1
	}
	if has&4 != 0 {
		i.Height, i.SourceBytes = int(number)+2, number+3
	}
	if has&8 != 0 {
		i.Variants = []variantJSON{{int(number), "variant" + text, number}, {}}
	}
	if has&16 != 0 {
		i.Attempts = int(number)
	}
	if has&32 != 0 {
		i.Error = &errorJSON{Code: text, Detail: "detail" + text}
	}
	return i
}

// A field that is left out when it is zero must be set in the image above, or the
// comparison would not miss it.
func TestEncodedImageHasEveryField(t *testing.T) {
	t.Parallel()
	image := reflect.ValueOf(encodedImage("x", 1, 0xff))
	for n := range image.NumField() {
		if image.Field(n).IsZero() {
			t.Errorf("%s is zero", image.Type().Field(n).Name)
		}
	}
}
