package main

import (
	"context"
	"net/http"
	"strconv"
)

// webhookOut is a webhook on the wire. The secret is there in the answer to
// its creation, and never again.
type webhookOut struct {
	ID        int64         `json:"id"`
	UserID    *int64        `json:"user_id"`
	URL       string        `json:"url"`
	Secret    string        `json:"secret,omitempty"`
	Status    string        `json:"status"`
	CreatedAt jsonTime      `json:"created_at"`
	Waiting   int           `json:"waiting"`
	Failed    int           `json:"failed"`
	Last      *lastTryJSON  `json:"last_delivery"` // null: none yet
	Failures  []failureJSON `json:"failures,omitempty"`
}

type lastTryJSON struct {
	At    jsonTime   `json:"at"`
	Error *errorJSON `json:"error"` // null: delivered
}

type failureJSON struct {
	ID        string    `json:"id"` // the header webhook-id
	ProductID int64     `json:"product_id"`
	Attempts  int       `json:"attempts"`
	FailedAt  jsonTime  `json:"failed_at"`
	Error     errorJSON `json:"error"`
}

func (w webhook) json() webhookOut {
	out := webhookOut{
		ID: w.ID, UserID: w.UserID, URL: w.URL, Secret: w.Secret, Status: "active",
		CreatedAt: jsonTime(w.CreatedAt), Waiting: w.Waiting, Failed: w.Failed,
	}
	if w.GoneAt != nil {
		out.Status = "gone"
	}
	if w.LastAt != nil {
		out.Last = &lastTryJSON{At: jsonTime(*w.LastAt)}
		if w.LastCode != "" {
			out.Last.Error = &errorJSON{w.LastCode, w.LastText}
		}
	}
	return out
}

// createWebhook stores a webhook of the caller's, or with an admin's token of any
// user's or of all.
func (s *server) createWebhook(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	in, err := readFields(body, "url", "secret", "user_id")
	if err != nil {
		return err
	}
	hook := in.webhook()
	if err := in.err(); err != nil {
		if hook.UserID != nil {
			err = s.alsoUnknownUser(w, r, *hook.UserID, err)
		}
		return err
	}
	if hook.UserID == nil {
		hook.UserID = boundTo(w)
	} else if err := mayWrite(w, *hook.UserID); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	if hook, err = s.store.CreateWebhook(ctx, hook); err != nil {
		return err
	}
	w.Header().Set("Location", "/webhooks/"+strconv.FormatInt(hook.ID, 10))
	w.Header().Set("Cache-Control", "no-store") // it has the secret
	writeJSON(w, http.StatusCreated, hook.json())
	return nil
}

// webhook reads the fields of a webhook; what has no secret gets one.
func (in *bodyFields) webhook() (hook webhook) {
	in.require("url")
	if value, _, ok := in.setting("url", true); ok {
		in.text("url", value, &hook.URL, 1, maxURLBytes)
		if _, err := parseURL(hook.URL); hook.URL != "" && err != nil {
			in.wrong("url", "%v", err)
		}
	}
	if value, null, ok := in.setting("secret", false); ok && !null {
		in.text("secret", value, &hook.Secret, 1, maxSecretText)
		if _, err := secretBytes(hook.Secret); hook.Secret != "" && err != nil {
			in.wrong("secret", "%v", err)
		}
	} else {
		hook.Secret = newWebhookSecret()
	}
	if _, null, ok := in.setting("user_id", false); ok && !null {
		hook.UserID = new(in.userID())
	}
	return hook
}

// maxSecretText is longer than any secret.
const maxSecretText = 200

// ownWebhook reads a webhook of the caller's. Another's is there for admins alone:
// its URL may be a secret too.
func (s *server) ownWebhook(ctx context.Context, w http.ResponseWriter, id int64) (webhook, error) {
	hook, err := s.store.Webhook(ctx, id)
	if err != nil {
		return webhook{}, err
	}
	if only := boundTo(w); only != nil && (hook.UserID == nil || *hook.UserID != *only) {
		return webhook{}, errNotFound
	}
	return hook, nil
}

func (s *server) listWebhooks(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	hooks, err := s.store.Webhooks(ctx, boundTo(w))
	if err != nil {
		return err
	}
	items := make([]webhookOut, len(hooks))
	for n, hook := range hooks {
		items[n] = hook.json()
	}
	writeJSON(w, http.StatusOK, map[string]any{"items": items})
	return nil
}

// failuresShown is how many of a webhook's failed deliveries are shown.
const failuresShown = 20

func (s *server) getWebhook(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	hook, err := s.ownWebhook(ctx, w, id)
	if err != nil {
		return err
	}
	failed, err := s.store.FailedDeliveries(ctx, hook.ID, failuresShown)
	if err != nil {
		return err
	}
	out := hook.json()
	for _, f := range failed {
		out.Failures = append(out.Failures, failureJSON{webhookID(f.EventID), f.ProductID, f.Attempts, jsonTime(f.FailedAt), errorJSON{f.Code, f.Detail}})
	}
	writeJSON(w, http.StatusOK, out)
	return nil
}

func (s *server) deleteWebhook(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	hook, err := s.ownWebhook(ctx, w, id)
	if err != nil {
		return err
	}
	if err := s.store.DeleteWebhook(ctx, hook.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// replayWebhook queues the failed deliveries of a webhook anew. One that was gone
// is back.
func (s *server) replayWebhook(ctx context.Context, w http.ResponseWriter, r *http.Request, id int64) error {
	hook, err := s.ownWebhook(ctx, w, id)
	if err != nil {
		return err
	}
	n, err := s.store.ReplayDeliveries(ctx, hook.ID)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusAccepted, replayedJSON{int(n)})
	return nil
}
