package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// variant is a stored object that shows an image in a smaller width.
type variant struct {
	Width int    `json:"width"`
	Key   string `json:"key"`
	Bytes int64  `json:"bytes"`
}

// variants are those of one image, from the widest down. In the database they
// are JSON, and the empty text if there are none.
type variants []variant

// Scan reads what text made (sql.Scanner).
func (v *variants) Scan(value any) error {
	*v = nil
	text, ok := value.(string)
	if !ok {
		return fmt.Errorf("variants are %T, not text", value)
	}
	if text == "" {
		return nil
	}
	return json.Unmarshal([]byte(text), v)
}

// text is what the database keeps.
func (v variants) text() string {
	if len(v) == 0 {
		return ""
	}
	text, _ := json.Marshal(v) // never fails
	return string(text)
}

// keys are those of all objects that an image refers to.
func (i Image) keys() []string {
	if i.Key == "" {
		return nil
	}
	keys := []string{i.Key}
	for _, v := range i.Variants {
		keys = append(keys, v.Key)
	}
	return keys
}

// maxVariants bounds the objects of one image, which are made and stored one
// after the other.
const maxVariants = 16

// widths reads IMAGE_VARIANTS, and sorts it from the widest down.
func widths(to *[]int) func(string) error {
	return func(v string) error {
		var all []int
		for text := range strings.SplitSeq(v, ",") {
			width, err := strconv.Atoi(strings.TrimSpace(text))
			if err != nil || width < 1 || width > maxImageSide || slices.Contains(all, width) {
				return fmt.Errorf("must be different widths from 1 to %d, such as 320,800", maxImageSide)
			}
			all = append(all, width)
		}
		if len(all) > maxVariants {
			return fmt.Errorf("must have at most %d widths", maxVariants)
		}
		slices.Sort(all)
		slices.Reverse(all)
		*to = all
		return nil
	}
}
