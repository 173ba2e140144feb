package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// routesOf answers the pattern of every route, by the metrics that each has.
func routesOf(t *testing.T, a *api) (patterns []string) {
	t.Helper()
	page := a.do(t, "GET", "/metrics", "").Body.String()
	for _, match := range regexp.MustCompile(`http_requests_total\{route="([A-Z]+ [^"]+)",code="2xx"`).FindAllStringSubmatch(page, -1) {
		patterns = append(patterns, match[1])
	}
	if !slices.Contains(patterns, "POST /products") || len(patterns) < 15 {
		t.Fatalf("the routes are %q", patterns)
	}
	return patterns
}

// What needs no token, and what needs an admin's. Every other route, one that is
// new too, needs a token.
var (
	openPaths  = regexp.MustCompile(`^/(healthz|readyz|openapi\.yaml|media/.*|console/.*)?$`)
	adminPaths = regexp.MustCompile(`^/(dead-letters|metrics|overview|debug)(/|$)`)
)

// Every route with every kind of caller: no route is forgotten, since they are
// taken from the program.
func TestWhoMayCallWhat(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	patterns := routesOf(t, a)
	a.do(t, "POST", "/products", shoe)
	a.authOn = true
	owner, stranger, admin := tokenOf(t, a, caller{UserID: 1}), tokenOf(t, a, caller{UserID: addUser(t, a.store)}), tokenOf(t, a, caller{UserID: addUser(t, a.store), Admin: true})
	close(a.stopping) // ends the streams
	for _, pattern := range patterns {
		method, path, _ := strings.Cut(pattern, " ")
		path = regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(strings.TrimSuffix(path, "{$}"), "1")
		open, adminOnly := openPaths.MatchString(path), adminPaths.MatchString(path)
		for _, c := range []struct {
			who, header string
			status      int // 0: neither 401 nor 403
		}{
			{"nobody", "", 401}, {"an unknown token", "Bearer pms_" + strings.Repeat("x", 43), 401}, {"no token of ours", "Bearer x", 401}, {"a password", "Basic eDp4", 401},
			{"a user", owner, 403}, {"a stranger", stranger, 403}, {"an admin", admin, 0},
		} {
			want := c.status
			writesProduct := method != "GET" && strings.HasPrefix(path, "/products/1")
			if open || c.status == 403 && !adminOnly && !(c.who == "a stranger" && writesProduct) {
				want = 0
			}
			if c.who == "an admin" && method != "GET" {
				continue // what an admin may do would change what the others find
			}
			body := ""
			if method == "PUT" || method == "PATCH" {
				body = `{"product_name":"x","product_price":1}`
			}
			if method == "DELETE" && want == 0 {
				continue // likewise
			}
			got := a.do(t, method, path, body, "Authorization", c.header)
			if want != 0 {
				got.wantProblem(t, want)
			}
			if want == 0 && (got.Code == 401 || got.Code == 403) || want != 0 && got.Code != want {
				t.Errorf("%s for %s: %d, want %d", pattern, c.who, got.Code, want)
			}
			if challenge := got.Header().Get("WWW-Authenticate"); (got.Code == 401) != strings.HasPrefix(challenge, `Bearer realm="pms"`) {
				t.Errorf("%s for %s: WWW-Authenticate %q", pattern, c.who, challenge)
			}
		}
	}
	a.do(t, "POST", "/products", shoe, "Authorization", stranger).wantProblem(t, 403)
}

// tokenOf makes a token and answers its header.
func tokenOf(t *testing.T, a *api, of caller) string {
	t.Helper()
	token, err := a.store.CreateToken(t.Context(), of)
	if err != nil {
		t.Fatal(err)
	}
	return "Bearer " + token
}

// doWith sends a request without a body, with headers that may stand twice.
func (a *api) doWith(t *testing.T, header http.Header, method, target string) answer {
	t.Helper()
	r := httptest.NewRequest(method, target, nil)
	r.Header = header
	out := answer{ResponseRecorder: httptest.NewRecorder()}
	a.handler.ServeHTTP(out.ResponseRecorder, r)
	if err := json.Unmarshal(out.Body.Bytes(), &out.json); err != nil {
		t.Errorf("%v in %q", err, out.Body)
	}
	return out
}

func TestAuthorizationHeaders(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true
	header := tokenOf(t, a, caller{UserID: 1})
	token := strings.TrimPrefix(header, "Bearer ")
	for name, c := range map[string]struct {
		lines     []string
		challenge string // "": it is accepted
	}{
		"as it should be":  {[]string{header}, ""},
		"another case":     {[]string{"bEARER " + token}, ""},
		"more white space": {[]string{"Bearer   " + token + " "}, ""},
		"none":             {nil, `Bearer realm="pms"`},
		"empty":            {[]string{""}, `Bearer realm="pms"`},
		"twice":            {[]string{header, header}, `Bearer realm="pms"`},
		"no scheme":        {[]string{token}, `Bearer realm="pms"`},
		"another scheme":   {[]string{"Token " + token}, `Bearer realm="pms"`},
		"no token":         {[]string{"Bearer "}, `Bearer realm="pms", error="invalid_token"`},
		"cut off":          {[]string{header[:len(header)-1]}, `Bearer realm="pms", error="invalid_token"`},
		"one more":         {[]string{header + "x"}, `Bearer realm="pms", error="invalid_token"`},
		"two tokens":       {[]string{header + "," + token}, `Bearer realm="pms", error="invalid_token"`},
		"another letter":   {[]string{"Bearer " + tokenPrefix + strings.Repeat("A", 43)}, `Bearer realm="pms", error="invalid_token"`},
		"SQL":              {[]string{"Bearer ' OR '1'='1"}, `Bearer realm="pms", error="invalid_token"`},
		"a megabyte":       {[]string{"Bearer " + strings.Repeat("x", 1<<20)}, `Bearer realm="pms", error="invalid_token"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := a.doWith(t, http.Header{"Authorization": c.lines}, "GET", "/products")
			if c.challenge != "" {
				got.wantProblem(t, 401)
			} else if got.Code != 200 {
				t.Errorf("status %d: %s", got.Code, got.Body)
			}
			if got.Header().Get("WWW-Authenticate") != c.challenge {
				t.Errorf("WWW-Authenticate %q, want %q", got.Header().Get("WWW-Authenticate"), c.challenge)
			}
		})
	}
}

// What does not look like a token is refused without a query.
func TestMalformedTokensCostNoQuery(t *testing.T) {
	t.Parallel()
	a := newAPI(t)
	a.authOn = true
	a.store.Close()
	a.do(t, "GET", "/products", "", "Authorization", "Bearer x").wantProblem(t, 401)
	if got := a.do(t, "GET", "/products", "", "Authorization", "Bearer "+tokenPrefix+strings.Repeat("x", 43)); got.Code < 500 {
		t.Errorf("a token that must be looked up: %d", got.Code)
	}
}

// A token is looked up once in tokenTime, so a revoked one is refused then. A
// database that is away, or hangs, does not make a token unknown for tokenGrace.
func TestTokensAreLookedUpAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var c tokenCache
		asked, answer := 0, error(nil)
		look := func() (knownCaller, error) {
			return c.look(t.Context(), sumOf("x"), func(ctx context.Context, _ tokenSum) (caller, error) {
				asked++
				if answer == errUnavailable {
					<-ctx.Done()
				}
				return caller{UserID: 7}, answer
			})
		}
		first, err := look()
		if err != nil || first.UserID != 7 {
			t.Fatal(first, err)
		}
		answer = errUnavailable
		time.Sleep(tokenTime - 1) // the bubble's clock
		if _, err := look(); err != nil || asked != 1 {
			t.Errorf("within tokenTime: %v, asked %d times", err, asked)
		}
		time.Sleep(time.Nanosecond)
		begin := time.Now()
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				if known, err := look(); err != nil || known.UserID != 7 {
					t.Errorf("with the database away: %v", err)
				}
			})
		}
		callers.Wait()
		if waited := time.Since(begin); waited != tokenPatience || asked != 2 {
			t.Errorf("waited %v for a database that hangs, asked %d times", waited, asked)
		}
		time.Sleep(tokenGrace)
		if _, err := look(); !errors.Is(err, errUnavailable) {
			t.Errorf("with the database away for long: %v", err)
		}
		answer = nil
		again, err := look()
		if err != nil || again.bucket != first.bucket {
			t.Errorf("with the database back: %v, or another bucket", err)
		}
		answer = errNotFound
		time.Sleep(tokenTime)
		if _, err := look(); !errors.Is(err, errNotFound) {
			t.Errorf("revoked: %v", err)
		}
		answer = errUnavailable
		if _, err := look(); !errors.Is(err, errUnavailable) {
			t.Errorf("revoked, and then with the database away: %v", err)
		}
		watch := tokenWatch{look: look}
		err = watch.renew()
		begin = time.Now()
		if <-watch.expired; err != nil || time.Since(begin) != tokenTime {
			t.Errorf("with the database away a watch looks again after %v, %v", time.Since(begin), err)
		}
	})
}

// The one who asks for all may leave before there is an answer.
func TestTokenIsLookedUpThoughItsFirstCallerLeaves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var c tokenCache
		answer := make(chan struct{})
		ask := func(ctx context.Context, _ tokenSum) (caller, error) {
			select {
			case <-ctx.Done():
				return caller{}, ctx.Err()
			case <-answer:
				return caller{UserID: 7}, nil
			}
		}
		first, leave := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		for _, ctx := range []context.Context{first, t.Context()} {
			callers.Go(func() {
				if known, err := c.look(ctx, sumOf("x"), ask); err != nil || known.UserID != 7 {
					t.Errorf("user %d, %v", known.UserID, err)
				}
			})
			synctest.Wait()
		}
		leave()
		synctest.Wait()
		close(answer)
		callers.Wait()
	})
}

// A sum that begins like a known one is another token's, in the database and in
// memory, and does not push the known one out.
func TestSumsAreComparedWhole(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		token, err := s.CreateToken(t.Context(), caller{UserID: 1})
		if err != nil {
			t.Fatal(err)
		}
		sum := sumOf(token)
		other := sum
		other[len(other)-1] ^= 1
		if _, err := s.TokenCaller(t.Context(), other); !errors.Is(err, errNotFound) {
			t.Errorf("in the database: %v", err)
		}
		var c tokenCache
		for _, look := range []struct {
			sum  tokenSum
			want error
		}{{sum, nil}, {other, errNotFound}} {
			if _, err := c.look(t.Context(), look.sum, s.TokenCaller); !errors.Is(err, look.want) {
				t.Errorf("in memory: %v, want %v", err, look.want)
			}
		}
		if _, known := c.known.Load(sum.key()); !known {
			t.Error("the known token was pushed out")
		}
	})
}

func TestStoreListsAndRevokesTokens(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *store) {
		var sums []tokenSum
		for _, admin := range []bool{false, true} {
			token, err := s.CreateToken(t.Context(), caller{1, admin})
			if err != nil {
				t.Fatal(err)
			}
			sums = append(sums, sumOf(token))
		}
		lastUse := func() time.Time {
			tokens, err := s.Tokens(t.Context())
			if err != nil || len(tokens) != 2 || tokens[0].Admin || !tokens[1].Admin || tokens[0].UserName == "" || tokens[1].LastUsed != nil {
				t.Fatalf("tokens %+v, %v", tokens, err)
			}
			if tokens[0].LastUsed == nil {
				return time.Time{}
			}
			return *tokens[0].LastUsed
		}
		use := func() {
			if _, err := s.TokenCaller(t.Context(), sums[0]); err != nil {
				t.Fatal(err)
			}
		}
		if at := lastUse(); !at.IsZero() {
			t.Errorf("a token that was never used: %v", at)
		}
		use()
		first := lastUse()
		if d := s.now().Sub(first); d < 0 || d > time.Minute {
			t.Errorf("the first use was %v ago", d)
		}
		advance(s, lastUseStep/2)
		use()
		if at := lastUse(); !at.Equal(first) {
			t.Errorf("a use soon after: %v, want %v", at, first)
		}
		advance(s, lastUseStep)
		use()
		if at := lastUse(); !at.After(first) {
			t.Errorf("a use later on: %v", at)
		}
		tokens, _ := s.Tokens(t.Context())
		if err := s.RevokeToken(t.Context(), tokens[0].ID); err != nil {
			t.Error(err)
		}
		if err := s.RevokeToken(t.Context(), tokens[0].ID); !errors.Is(err, errNotFound) {
			t.Errorf("revoked twice: %v", err)
		}
		if _, err := s.TokenCaller(t.Context(), sums[0]); !errors.Is(err, errNotFound) {
			t.Errorf("a revoked token: %v", err)
		}
		if _, err := s.TokenCaller(t.Context(), sums[1]); err != nil {
			t.Errorf("the other token: %v", err)
		}
	})
}

// An operator's way: create, use, list, revoke. And wherever a client puts its
// token, the log does not have it.
func TestTokensFromTheCommandLine(t *testing.T) {
	t.Parallel()
	env := environment(map[string]string{"DATA_DIR": t.TempDir(), "AUTH": "on"})
	command := func(args ...string) string {
		var out bytes.Buffer
		if err := run(t.Context(), args, func(name string) string { return env[name] }, &out, io.Discard); err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return out.String()
	}
	token := strings.TrimSpace(command("token", "create", "-user", "1"))
	if list := command("token", "list"); !strings.Contains(list, "never") || strings.Contains(list, token) {
		t.Errorf("token list: %s", list)
	}
	api := start(t, env)
	status := func(path string, headers ...string) int {
		request, err := http.NewRequest("GET", api.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for n := 0; n < len(headers); n += 2 {
			request.Header.Set(headers[n], headers[n+1])
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	valid := func() int { return status("/products", "Authorization", "Bearer "+token) }
	if got := valid(); got != 200 {
		t.Fatalf("with the token: %d", got)
	}
	if list := command("token", "list"); strings.Contains(list, "never") {
		t.Errorf("token list after its use: %s", list)
	}
	for path, headers := range map[string][]string{
		"/products?access_token=" + token: nil, "/products/" + token: nil, "/products/1?token=" + token: {"Authorization", "Bearer " + token},
		"/": {"Authorization", "Basic " + token}, "/healthz": {"X-Request-Id", token}, "/readyz": {"Traceparent", token}, "/media/" + token + ".jpg": {"Cookie", token}, "/metrics": {"Referer", token},
	} {
		status(path, headers...)
	}
	if out := command("token", "revoke", "1"); !strings.Contains(out, "5s") {
		t.Errorf("token revoke: %s", out)
	}
	begin := time.Now()
	eventually(t, "the revoked token is refused", func() bool { return valid() == 401 })
	t.Logf("refused after %v", time.Since(begin))
	if strings.Contains(api.log.tail(1<<20), strings.TrimPrefix(token, tokenPrefix)) {
		t.Error("the log has the token")
	}
}

func TestStartSaysThatAuthenticationIsOff(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	api.log.await(t, `"level":"WARN"`, "AUTHENTICATION IS OFF")
}
