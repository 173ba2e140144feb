package main

import (
	"context"
	"net/http"
)

// reprocessedJSON answers how many images were queued anew.
type reprocessedJSON struct {
	Reprocessed int64 `json:"reprocessed"`
}

// reprocessImages has the images of a product made again. Those that are in work
// are left alone, so pressing twice does no harm.
func (s *server) reprocessImages(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	var begun bool
	n, version, err := s.store.ReprocessProduct(ctx, id, originOf(w), noting(&begun, allow(w, r)))
	if err != nil {
		return s.afterLostWrite(ctx, id, begun, err)
	}
	if n > 0 {
		s.invalidate(id, version)
		s.queuedAnew()
	}
	writeJSON(w, http.StatusAccepted, reprocessedJSON{n})
	return nil
}
