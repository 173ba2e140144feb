package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hostileRequest is what a client sends, byte by byte, and what it deserves.
type hostileRequest struct {
	name   string
	raw    string
	status int
	body   string // part of the answer's body, if that matters
}

// rawRequest puts a request together that is whole HTTP; headers are name, value…
func rawRequest(method, target, body string, headers ...string) string {
	var raw strings.Builder
	fmt.Fprintf(&raw, "%s %s HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n", method, target)
	for n := 0; n < len(headers); n += 2 {
		fmt.Fprintf(&raw, "%s: %s\r\n", headers[n], headers[n+1])
	}
	if body != "" {
		if !slices.Contains(headers, "Content-Type") {
			raw.WriteString("Content-Type: application/json\r\n")
		}
		fmt.Fprintf(&raw, "Content-Length: %d\r\n", len(body))
	}
	return raw.String() + "\r\n" + body
}

// productWith is a product whose only doubtful field is the given one.
func productWith(field, value string) string {
	fields := map[string]string{"user_id": "1", "product_name": `"x"`, "product_price": "1"}
	fields[field] = value
	var members []string
	for name, value := range fields {
		members = append(members, fmt.Sprintf("%q:%s", name, value))
	}
	slices.Sort(members)
	return "{" + strings.Join(members, ",") + "}"
}

const plainProduct = `{"user_id":1,"product_name":"x","product_price":1}`

// hostileBodies are bodies of POST /products.
func hostileBodies() (all []hostileRequest) {
	add := func(name, body string, status int) {
		all = append(all, hostileRequest{name: "body: " + name, raw: rawRequest("POST", "/products", body), status: status})
	}
	for name, body := range map[string]string{
		"white space": " \n\t", "a byte order mark": "\xef\xbb\xbf" + plainProduct, "UTF-16": "{\x00}\x00",
		"NUL": "\x00", "NUL behind": plainProduct + "\x00", "a comment": "/* x */" + plainProduct, "single quotes": `{'user_id':1}`,
		"a trailing comma": `{"user_id":1,}`, "no quotes": `{user_id:1}`, "two objects": plainProduct + plainProduct,
		"a number": "1", "a string": `"x"`, "true": "true", "null": "null", "a list": "[" + plainProduct + "]", "half": `{"user_id":1`,
		"an open string": `{"product_name":"x`, "invalid UTF-8": productWith("product_name", "\"\xff\""), "overlong UTF-8": productWith("product_name", "\"\xc0\xaf\""),
		"a surrogate in UTF-8": productWith("product_name", "\"\xed\xa0\x80\""), "invalid UTF-8 in a name": "{\"\xff\":1}",
		"a lone high surrogate": productWith("product_name", `"\ud800"`), "a lone low surrogate": productWith("product_name", `"\udc00"`),
		"surrogates the wrong way round": productWith("product_name", `"\udc00\ud800"`), "a high surrogate and a letter": productWith("product_name", `"\uD800x"`),
		"a lone surrogate in a URL": productWith("product_images", `["http://e.example/\udfff"]`), "a lone surrogate in a field's name": `{"\ud800":1}`,
		"an unknown escape": productWith("product_name", `"\x41"`), "a raw newline in a string": productWith("product_name", "\"a\nb\""),
		"a field twice": `{"user_id":1,` + plainProduct[1:], "a field twice, escaped": `{"user\u005fid":1,` + plainProduct[1:],
		"a field twice, nested": productWith("product_images", `[{"a":1,"a":2}]`), "an unknown field": productWith("colour", "1"),
		"a field in another case": productWith("Product_Name", `"y"`), "the prototype": productWith("__proto__", `{"admin":true}`), "an empty name": productWith("", "1"),
		"a read-only field": productWith("id", "7"), "the version": productWith("version", "7"), "10,000 unknown fields": manyFields(10_000),
		"100,000 open brackets": strings.Repeat("[", 100_000), "100,000 open braces": strings.Repeat(`{"a":`, 100_000), "33 levels": productWith("product_images", strings.Repeat("[", 33)+strings.Repeat("]", 33)),
		"NaN": productWith("product_price", "NaN"), "infinity": productWith("product_price", "Infinity"), "a plus sign": productWith("product_price", "+1"),
		"hexadecimal": productWith("product_price", "0x10"), "a leading zero": productWith("product_price", "01"), "no digit before the point": productWith("product_price", ".5"),
		"no digit behind the point": productWith("product_price", "5."), "an exponent without digits": productWith("product_price", "1e"), "an underscore": productWith("product_price", "1_000"),
	} {
		add(name, body, 400)
	}
	for name, body := range map[string]string{
		"nothing in it": "{}", "the user as text": productWith("user_id", `"1"`), "the user as a fraction": productWith("user_id", "1.0"), "the user with an exponent": productWith("user_id", "1e0"),
		"the user below zero": productWith("user_id", "-1"), "the user above int64": productWith("user_id", "9223372036854775808"), "a user of a million digits": productWith("user_id", strings.Repeat("9", 1_000_000)),
		"a user that is not there": productWith("user_id", "9223372036854775807"), "the user as a list": productWith("user_id", "[1]"), "the user null": productWith("user_id", "null"),
		"a price of 1e999999999": productWith("product_price", "1e999999999"), "a price of 1e99999999999999999999": productWith("product_price", "1e99999999999999999999"),
		"a price of 1e-999999999": productWith("product_price", "1e-999999999"), "a price of a million digits": productWith("product_price", strings.Repeat("9", 1_000_000)),
		"a price of a million decimals": productWith("product_price", "0."+strings.Repeat("9", 1_000_000)), "a price below a cent": productWith("product_price", "0.001"),
		"a price as text with an exponent": productWith("product_price", `"1e2"`), "a price with a comma": productWith("product_price", `"1,50"`), "a price with white space": productWith("product_price", `" 1"`),
		"a price in other digits": productWith("product_price", `"٣"`), "a price that is a list": productWith("product_price", "[1]"), "a price that is true": productWith("product_price", "true"),
		"NUL in the name": productWith("product_name", `"a\u0000b"`), "NUL in the description": productWith("product_description", `"\u0000"`), "NUL in a URL": productWith("product_images", `["http://e.example/\u0000"]`),
		"a name of 201 characters": productWith("product_name", `"`+strings.Repeat("𝕏", 201)+`"`), "an empty text": productWith("product_name", `""`), "a name that is a number": productWith("product_name", "1"),
		"21 images": productWith("product_images", "["+strings.Repeat(`"http://e.example/",`, 20)+`"http://e.example/"]`), "100,000 images": productWith("product_images", "["+strings.Repeat("1,", 100_000)+"1]"),
		"an image that is an object": productWith("product_images", `[{"url":"http://e.example/"}]`), "images that are a map": productWith("product_images", `{"0":"http://e.example/"}`),
		"a file as image": productWith("product_images", `["file:///etc/passwd"]`), "a header in a URL": productWith("product_images", `["http://e.example/\r\nX: y"]`),
		"a password in a URL": productWith("product_images", `["http://a:b@e.example/"]`), "a long URL": productWith("product_images", `["http://e.example/`+strings.Repeat("a", 3000)+`"]`),
	} {
		add(name, body, 422)
	}
	for name, body := range map[string]string{
		"a price of 1e2": productWith("product_price", "1e2"), "minus zero": productWith("product_price", "-0"), "0e99999999999999999999": productWith("product_price", "0e99999999999999999999"),
		"a pair of surrogates": productWith("product_name", `"\ud83d\ude00"`), "SQL in the description": productWith("product_description", `"'; DROP TABLE products; --"`),
		"a script in the name": productWith("product_name", `"<script>alert(1)</script>"`), "bidirectional marks": productWith("product_name", `"\u202e\u2066x"`), "32 levels of white space": strings.Repeat("\n", 1000) + plainProduct,
		"the replacement character": productWith("product_name", `"\ufffd"`), "an escaped backslash before ud800": productWith("product_description", `"\\ud800"`),
	} {
		add(name, body, 201)
	}
	return all
}

func manyFields(n int) string {
	fields := make([]string, n)
	for i := range fields {
		fields[i] = fmt.Sprintf(`"f%d":1`, i)
	}
	return "{" + strings.Join(fields, ",") + "}"
}

// hostileTargets are requests without a body that matters.
func hostileTargets() (all []hostileRequest) {
	add := func(status int, method string, targets ...string) {
		for _, target := range targets {
			all = append(all, hostileRequest{name: method + " " + target, raw: rawRequest(method, target, ""), status: status})
		}
	}
	add(404, "GET", "/products/0", "/products/-1", "/products/+1", "/products/01", "/products/1.0", "/products/0x1", "/products/1e0", "/products/%31%30%30%30%30", "/products/1%00", "/products/1%20",
		"/products/9223372036854775808", "/products/"+strings.Repeat("9", 10_000), "/products/1'%20OR%20'1'='1", "/products/%F0%9F%98%80", "/products/%ff", "/products/1;x=y", "/products/%2e%2e",
		"/products/1%2fevents", "/Products/1", "/PRODUCTS", "/products/1/", "/products/1/events/x", "/.env", "/data/pms.db", "/%2e%2e/%2e%2e/etc/passwd", "/debug/vars", "/nothing?x=y&x=%zz")
	add(404, "GET", "/media/", "/media/..%2fpms.db", "/media/%2e%2e%2fpms.db", "/media/..%5cpms.db", "/media/%2fetc%2fpasswd", "/media/products%2f1%2f..%2f..%2f..%2fpms.db", "/media/.tmp/x.jpg", "/media/products", "/media/products/1/x.jpg%00.png",
		"/media/"+strings.Repeat("a", 5000)+".jpg", "/media/"+strings.Repeat("a/", 2000)+"x.jpg", "/media/CON.jpg", "/media/%ff.jpg", "/media/x.svg", "/media/x.jpg/", "/media/%c0%ae%c0%ae/pms.db")
	add(405, "FOO", "/products")
	add(405, "TRACE", "/products/1")
	add(405, "OPTIONS", "/products", "/healthz")
	add(405, "PROPFIND", "/media/x.jpg")
	add(405, "DELETE", "/products", "/healthz")
	add(405, "POST", "/products/1", "/healthz", "/metrics")
	add(405, "get", "/products")
	add(404, "FOO", "/nowhere")
	add(400, "GET", "/products?x", "/products?%zz", "/products?a;b", "/products?limit=1;limit=2", "/products?sort=id;drop", "/products?limit=1&limit=1", "/products?"+strings.Repeat("a=1&", 10_000), "/products?LIMIT=1", "/products?limit[]=1", "/products?access_token=x", "/dead-letters?name=x", "/products?limit%00=1")
	add(422, "GET", "/products?limit=", "/products?limit=0", "/products?limit=-1", "/products?limit=1e1", "/products?limit=99999999999999999999", "/products?limit=+1", "/products?limit=%D9%A3", "/products?user_id=1'--", "/products?user_id=9223372036854775808",
		"/products?min_price=1e999999999", "/products?max_price=-1", "/products?min_price=NaN", "/products?sort=%00", "/products?sort=product_description", "/products?cursor=%00", "/products?cursor=AAAA", "/products?cursor=bnVsbA", "/products?cursor="+strings.Repeat("A", 20_000),
		"/products?name=%00", "/products?name=%ff", "/products?name=%ed%a0%80", "/dead-letters?limit=x", "/dead-letters?cursor=x")
	for _, text := range []string{"%25", "_", "%5C", "%5C%25", "%5C_", "%25x", "'", "%2A", "%3F"} { // no name has any of these
		all = append(all, hostileRequest{"GET /products?name=" + text, rawRequest("GET", "/products?name="+text, ""), 200, `{"items":[],"next_cursor":null}`})
	}
	for _, long := range []string{strings.Repeat("%25", 10_000), strings.Repeat("_", 26_000)} { // no name has so many; SQLite takes no pattern of 50,000 bytes
		add(200, "GET", "/products?name="+long, "/products/export?name="+long)
	}
	add(200, "GET", "/products?min_price=2&max_price=1", "/products?user_id=9223372036854775807", "/products?name=%EF%BF%BD")
	return all
}

// hostileHeaders are requests that would be fine but for a header.
func hostileHeaders() (all []hostileRequest) {
	add := func(status int, name, raw string) {
		all = append(all, hostileRequest{name: name, raw: raw, status: status})
	}
	post := func(headers ...string) string { return rawRequest("POST", "/products", plainProduct, headers...) }
	patch := func(headers ...string) string {
		return rawRequest("PATCH", "/products/1", `{"product_price":1}`, headers...)
	}
	for name, value := range map[string]string{
		"none": "", "text": "text/plain", "a form": "application/x-www-form-urlencoded", "another charset": "application/json; charset=utf-16", "no parameter": "application/json; charset", "two types": "application/json, text/plain",
		"a wildcard": "*/*", "a merge patch": "application/merge-patch+json", "quotes": `"application/json"`, "a suffix": "application/vnd.x+json",
	} {
		add(415, "Content-Type: "+name, post("Content-Type", value))
	}
	add(201, "Content-Type: a long one", post("Content-Type", "application/json; x="+strings.Repeat("y", 10_000)))
	add(201, "Content-Type: capitals", post("Content-Type", "APPLICATION/JSON; CHARSET=UTF-8"))
	add(415, "Content-Encoding: gzip", post("Content-Encoding", "gzip"))
	add(415, "Content-Encoding: deflate, gzip", post("Content-Encoding", "deflate, gzip"))
	add(415, "Content-Encoding: x", patch("Content-Encoding", "x"))
	add(201, "Content-Encoding: identity", post("Content-Encoding", "identity"))
	for name, value := range map[string]string{
		"empty": "", "a space": " ", "Latin-1": "caf\xe9", "UTF-8": "schlüssel", "a tab": "a\tb", "256 characters": strings.Repeat("k", 256), "long": strings.Repeat("k", 20_000),
	} {
		add(400, "Idempotency-Key: "+name, post("Idempotency-Key", value))
	}
	add(400, "Idempotency-Key: twice", post("Idempotency-Key", "a", "Idempotency-Key", "a"))
	add(201, "Idempotency-Key: odd", post("Idempotency-Key", `"; DROP TABLE idempotency_keys; --"`))
	for _, value := range []string{"", "1", "x", `"1`, `""`, `W/"1"`, `"-1"`, `"01"`, `"99999999999999999999999"`, `"1'--"`, "\xff", strings.Repeat(`"0",`, 5_000), ",,,"} {
		add(412, fmt.Sprintf("If-Match: %.20q", value), patch("If-Match", value))
		add(200, fmt.Sprintf("If-None-Match: %.20q", strings.ReplaceAll(value, "W/", "w/")), rawRequest("GET", "/products/1", "", "If-None-Match", strings.ReplaceAll(value, "W/", "w/")))
	}
	for _, value := range []string{"bytes=0-", "bytes=-1", "bytes=5-1", "bytes=a-b", "bytes=" + strings.Repeat("0-0,", 5_000), "x"} {
		add(200, fmt.Sprintf("Range: %.20s", value), rawRequest("GET", "/products/1", "", "Range", value))
	}
	add(200, "X-Request-Id: a script", rawRequest("GET", "/healthz", "", "X-Request-Id", "<script>"))
	add(200, "X-Request-Id: long", rawRequest("GET", "/healthz", "", "X-Request-Id", strings.Repeat("x", 30_000)))
	add(200, "traceparent: garbage", rawRequest("GET", "/healthz", "", "Traceparent", "00-"+strings.Repeat("0", 500)))
	add(200, "Accept: nothing that is there", rawRequest("GET", "/products/1", "", "Accept", "image/x-none"))
	add(200, "Authorization: garbage", rawRequest("GET", "/products/1", "", "Authorization", "Bearer \xff\xfe"))
	add(200, "X-HTTP-Method-Override: DELETE", rawRequest("GET", "/products/1", "", "X-HTTP-Method-Override", "DELETE"))
	add(200, "X-Forwarded-For: a line", rawRequest("GET", "/products/1", "", "X-Forwarded-For", "127.0.0.1, evil", "X-Original-URL", "/metrics"))
	add(417, "Expect: something", post("Expect", "miracles"))
	add(413, "a body of 2 MiB", rawRequest("POST", "/products", strings.Repeat(" ", 2<<20)))
	add(413, "a body that says 1 TiB", rawRequest("POST", "/products", "", "Content-Type", "application/json", "Content-Length", "1099511627776"))
	add(400, "a body where none belongs", rawRequest("DELETE", "/products/999", strings.Repeat("x", 100), "Content-Length", "1"))
	return all
}

// hostileBytes are not quite HTTP, or HTTP that two servers may read in two
// ways.
func hostileBytes() []hostileRequest {
	const head = "POST /products HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\nContent-Type: application/json\r\n"
	chunked := func(header, body string) string { return head + header + "\r\n" + body }
	length := fmt.Sprintf("Content-Length: %d\r\n", len(plainProduct))
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(plainProduct), plainProduct)
	return []hostileRequest{
		{"no HTTP", "hello\r\n\r\n", 400, ""},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, ""},
		{"HTTP/0.9", "GET /products\r\n\r\n", 400, ""},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""},
		{"HTTP/3.0", "GET /healthz HTTP/3.0\r\nHost: x\r\n\r\n", 400, ""},
		{"HTTP/1.9", "GET /healthz HTTP/1.9\r\nHost: x\r\nConnection: close\r\n\r\n", 200, ""},
		{"no host", "GET /healthz HTTP/1.1\r\n\r\n", 400, ""},
		{"two hosts", "GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, ""},
		{"a host that is none", "GET /healthz HTTP/1.1\r\nHost: a b\r\n\r\n", 400, ""},
		{"a target without a slash", "GET products HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""},
		{"a star", "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400, ""},
		{"a star with another method", "GET * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400, ""},
		{"another host in the target", "GET http://evil.example/products/0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404, ""},
		{"a tunnel", "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nConnection: close\r\n\r\n", 405, ""},
		{"a bad escape in the path", "GET /products/%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""},
		{"a raw NUL in the path", "GET /products/\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, ""},
		{"a space before the colon", "GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n", 400, ""},
		{"a folded header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\nConnection: close\r\n\r\n", 200, ""},
		{"a header without a colon", "GET /healthz HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n", 400, ""},
		{"a header without a name", "GET /healthz HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n", 400, ""},
		{"NUL in a header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400, ""},
		{"a bare CR in a header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\rGET / HTTP/1.1\r\n\r\n", 400, ""},
		{"a header of 1 MiB", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 1<<20) + "\r\n\r\n", 431, ""},
		{"10,000 headers", "GET /healthz HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: aaaaaaaa\r\n", 10_000) + "\r\n", 431, ""},
		{"a target of 1 MiB", "GET /" + strings.Repeat("a", 1<<20) + " HTTP/1.1\r\nHost: x\r\n\r\n", 431, ""},
		{"two lengths", chunked(length+"Content-Length: 5\r\n", plainProduct), 400, ""},
		{"two equal lengths", chunked(length+length, plainProduct), 201, ""},
		{"a list of lengths", chunked("Content-Length: 49, 49\r\n", plainProduct), 400, ""},
		{"a negative length", chunked("Content-Length: -1\r\n", plainProduct), 400, ""},
		{"a length with a sign", chunked("Content-Length: +49\r\n", plainProduct), 400, ""},
		{"a length in hexadecimal", chunked("Content-Length: 0x31\r\n", plainProduct), 400, ""},
		{"a length above int64", chunked("Content-Length: 9223372036854775808\r\n", plainProduct), 400, ""},
		{"length and chunks", chunked(length+"Transfer-Encoding: chunked\r\n", chunk), 201, ""},
		{"chunks twice", chunked("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", chunk), 400, ""},
		{"chunks of a list", chunked("Transfer-Encoding: gzip, chunked\r\n", chunk), 400, ""},
		{"chunks in disguise", chunked("Transfer-Encoding: xchunked\r\n", chunk), 400, ""},
		{"chunks behind a vertical tab", chunked("Transfer-Encoding: \x0bchunked\r\n", chunk), 400, ""},
		{"chunks in HTTP/1.0", strings.Replace(chunked("Transfer-Encoding: chunked\r\n", chunk), "HTTP/1.1", "HTTP/1.0", 1), 400, ""},
		{"a chunk of no size", chunked("Transfer-Encoding: chunked\r\n", "\r\n{}\r\n"), 400, ""},
		{"a chunk of negative size", chunked("Transfer-Encoding: chunked\r\n", "-1\r\n{}\r\n"), 400, ""},
		{"a chunk size with 0x", chunked("Transfer-Encoding: chunked\r\n", "0x2\r\n{}\r\n0\r\n\r\n"), 400, ""},
		{"a chunk size above int64", chunked("Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\n{}\r\n0\r\n\r\n"), 400, ""},
		{"a chunk that is too long", chunked("Transfer-Encoding: chunked\r\n", "2\r\n{}{}\r\n0\r\n\r\n"), 400, ""},
		{"a chunk ended by a bare LF", chunked("Transfer-Encoding: chunked\r\n", "2\n{}\r\n0\r\n\r\n"), 400, ""},
		{"a chunk extension of 1 MiB", chunked("Transfer-Encoding: chunked\r\n", "2;"+strings.Repeat("x", 1<<20)+"\r\n{}\r\n0\r\n\r\n"), 400, ""},
		{"a million tiny chunks", chunked("Transfer-Encoding: chunked\r\n", strings.Repeat("1;xxxxxxxxxxxxxxxxxxx\r\n{\r\n", 60_000)+"0\r\n\r\n"), 400, ""},
		{"chunks of 2 MiB", chunked("Transfer-Encoding: chunked\r\n", strings.Repeat("100000\r\n"+strings.Repeat(" ", 1<<20)+"\r\n", 2)+"0\r\n\r\n"), 413, ""},
		{"a trailer that is a header", chunked("Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n", strings.Replace(chunk, "0\r\n\r\n", "0\r\nAuthorization: x\r\n\r\n", 1)), 201, ""},
		{"an upgrade", "GET /products/0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", 404, ""},
		{"an upgrade to h2c", "GET /products/0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n", 404, ""},
	}
}

// Whatever strangers send: no 5xx, every error a problem document, no
// word of the inside, and others are served meanwhile.
func TestHostileRequests(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	api.post(t)
	all := slices.Concat(hostileBodies(), hostileTargets(), hostileHeaders(), hostileBytes())
	if len(all) < 150 {
		t.Errorf("%d requests", len(all))
	}
	good := watchGoodClient(t, api.url+"/products/1")
	for _, hostile := range all {
		answer, body := sendHostile(t, api.url, hostile)
		if answer == nil {
			continue
		}
		if err := checkHostileAnswer(hostile, answer, body); err != nil {
			t.Errorf("%.80s: %v\n%.300s", hostile.name, err, body)
		}
	}
	served, slowest := good()
	t.Logf("%d hostile requests; meanwhile %d good ones were served, the slowest in %v", len(all), served, slowest)
	if served < 10 || slowest > requestTimeout { // a machine may pause; a server that is held up does so for longer
		t.Errorf("a good client had %d answers, the slowest in %v", served, slowest)
	}
	if log := api.log.tail(1 << 20); strings.Contains(log, `"level":"ERROR"`) || strings.Contains(log, "panic") {
		t.Error("the log has errors")
	}
}

// A body that holds the beginning of an answer of net/http's own goes out as it
// is, wherever the writes to its connection divide it.
func TestABodyIsNotTakenForAnAnswer(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	api.post(t)
	const answer = "HTTP/1.1 417"
	for padding := range len(answer) {
		description := strings.Repeat("x", padding) + strings.Repeat(answer, 800)
		body := productWith("product_description", strconv.Quote(description))
		created, err := http.Post(api.url+"/products", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(created.Body)
		created.Body.Close()
		if err != nil || !bytes.Contains(got, []byte(`"`+description+`"`)) {
			t.Errorf("after %d bytes of padding: %v, a body of %d bytes", padding, err, len(got))
		}
	}
}

// What is not HTTP is refused as it should be behind a request that is, too.
func TestASecondRequestThatIsNoHTTP(t *testing.T) {
	t.Parallel()
	api := start(t, environment(map[string]string{"DATA_DIR": t.TempDir()}))
	conn, err := net.Dial("tcp", strings.TrimPrefix(api.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(settleTime))
	io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nhello\r\n\r\n")
	answers := bufio.NewReader(conn)
	for _, want := range []int{200, 400} {
		answer, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		if err = errors.Join(err, checkHostileAnswer(hostileRequest{status: want}, answer, body)); err != nil {
			t.Errorf("%v: %s", err, body)
		}
	}
}

// sendHostile sends a request's bytes and reads the first answer.
func sendHostile(t *testing.T, url string, hostile hostileRequest) (*http.Response, []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(settleTime))
	go io.WriteString(conn, hostile.raw) // fails when the answer comes before the whole was read
	method, _, _ := strings.Cut(hostile.raw, " ")
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Errorf("%.80s: no answer: %v", hostile.name, err)
		return nil, nil
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Errorf("%.80s: %s: %v", hostile.name, response.Status, err)
	}
	return response, body
}

func checkHostileAnswer(hostile hostileRequest, answer *http.Response, body []byte) error {
	if answer.StatusCode != hostile.status {
		return fmt.Errorf("status %d, want %d", answer.StatusCode, hostile.status)
	}
	for _, inside := range []string{"goroutine", ".go:", "SQL", "sqlite", "panic", "/tmp/", "strconv.", "json:"} {
		if answer.StatusCode >= 400 && bytes.Contains(body, []byte(inside)) {
			return fmt.Errorf("the body tells of the inside: %q", inside)
		}
	}
	if strings.HasPrefix(hostile.body, "{") && string(bytes.TrimSpace(body)) != hostile.body {
		return fmt.Errorf("want the body %s", hostile.body)
	}
	id := answer.Header.Get("X-Request-Id")
	if id == "" || answer.Header.Get("X-Content-Type-Options") != "nosniff" || answer.Header.Get("Content-Security-Policy") == "" {
		return fmt.Errorf("headers %v", answer.Header)
	}
	if answer.StatusCode < 400 {
		return nil
	}
	var p problem
	if err := json.Unmarshal(body, &p); err != nil || answer.Header.Get("Content-Type") != "application/problem+json" ||
		p.Status != answer.StatusCode || p.RequestID != id || p.Title == "" || p.Detail == "" || len(body) > 64<<10 {
		return fmt.Errorf("not a whole problem document (%v), %s", err, answer.Header.Get("Content-Type"))
	}
	return nil
}

// watchGoodClient reads one product again and again. The function that it
// returns stops that, and tells how often it was served and the longest wait.
func watchGoodClient(t *testing.T, url string) func() (served int, slowest time.Duration) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	var served int
	var slowest time.Duration
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			start := time.Now()
			if status := statusOf(url); status != http.StatusOK {
				t.Errorf("a good client got the status %d", status)
				return
			}
			served, slowest = served+1, max(slowest, time.Since(start))
		}
	}()
	return func() (int, time.Duration) {
		close(stop)
		<-done
		return served, slowest
	}
}
