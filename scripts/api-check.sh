#!/bin/bash
# Lints openapi.yaml and holds the running program against it with tools from
# outside: redocly, spectral; portman and newman, alone and through prism, which
# checks every request and answer; specmatic, where there is a Java runtime.
# Each tool gets a fresh program on a free port of this machine.
set -euo pipefail

cache=$PWD/.cache
bin=$cache/apicheck/node_modules/.bin
work=$(mktemp -d)
program='' proxy=''

# stop ends a process that this script started.
stop() {
    if [ -n "$1" ]; then
        kill "$1" 2>/dev/null || true
        wait "$1" 2>/dev/null || true
    fi
}
trap 'stop "$proxy"; stop "$program"; rm -rf "$work"' EXIT

# await COMMAND... tries a command until it succeeds, for half a minute.
await() {
    for _ in $(seq 150); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "never succeeded: $*" >&2
    exit 1
}

# address prints where the program listens, as its log tells.
address() { sed -n 's/.*"msg":"listening","addr":"\([^"]*\)".*/\1/p' "$work/log" | grep .; }

has_letters() { curl -fsS -H "Authorization: Bearer $token" "$url/dead-letters" | grep -q '"id":6,'; }

# fresh starts a program with three products, six dead letters and three webhooks:
# their addresses are forbidden, so nothing is sent anywhere. A stored image stands
# where the document's example has it.
fresh() {
    stop "$program"
    rm -rf "$work/data"
    export DATA_DIR=$work/data AUTH=on LISTEN_ADDR=127.0.0.1:0 LOG_FORMAT=json
    token=$("$work/pms" token create -user 1 -admin)
    mkdir -p "$DATA_DIR/media/products/42"
    printf '\377\330\377\340' >"$DATA_DIR/media/products/42/7-0123456789abcdef.jpg"
    "$work/pms" 2>"$work/log" &
    program=$!
    await address
    url=http://$(address)
    await curl -fsS "$url/readyz"
    for _ in 1 2 3; do
        curl -fsS -o /dev/null -H "Authorization: Bearer $token" -H 'Content-Type: application/json' "$url/products" \
            -d '{"user_id": 1, "product_name": "Trail shoe", "product_price": "89.90", "product_images": ["http://127.0.0.1/a.jpg", "http://127.0.0.1/b.jpg"]}'
    done
    for _ in 1 2 3; do
        curl -fsS -o /dev/null -H "Authorization: Bearer $token" -H 'Content-Type: application/json' "$url/webhooks" -d '{"url": "http://127.0.0.1/hooks"}'
    done
    await has_letters
}

# collection URL makes portman's collection and lets newman run it there, but for
# the stream of events, which has no end.
collection() {
    (cd "$work" && "$bin/portman" -l "$spec" -b "$1" -c "$root/tools/apicheck/portman.json" --filterFile "$root/tools/apicheck/portman-filter.json" -o collection.json >portman.log 2>&1) ||
        { cat "$work/portman.log"; return 1; }
    (cd "$work" && "$bin/newman" run collection.json --env-var "token=$token" --color off --reporter-cli-no-banner --disable-unicode >newman.log 2>&1) ||
        { cat "$work/newman.log"; return 1; }
    grep -E '^\| +(requests|assertions)' "$work/newman.log"
}

free_port() { node -e 'const s = require("net").createServer().listen(0, "127.0.0.1", () => { console.log(s.address().port); s.close(); })'; }

root=$PWD
spec=$root/openapi.yaml
CGO_ENABLED=0 go build -o "$work/pms" .

echo "== redocly"
"$bin/redocly" lint --config tools/apicheck/redocly.yaml openapi.yaml

echo "== spectral"
"$bin/spectral" lint --fail-severity hint -r tools/apicheck/spectral.yaml openapi.yaml

echo "== portman and newman"
fresh
collection "$url"

echo "== prism between newman and the program"
fresh
port=$(free_port)
"$bin/prism" proxy "$spec" "$url" --errors -h 127.0.0.1 -p "$port" >"$work/prism.log" 2>&1 &
proxy=$!
await curl -fsS "http://127.0.0.1:$port/healthz"
collection "http://127.0.0.1:$port"
if grep -qi violation "$work/prism.log"; then
    grep -i violation "$work/prism.log"
    exit 1
fi
stop "$proxy"
proxy=

echo "== specmatic"
if ! command -v java >/dev/null; then
    echo "skipped: there is no Java runtime"
    exit 0
fi
fresh
mkdir "$work/specmatic"
cp "$spec" "$work/specmatic/"
cat >"$work/specmatic/specmatic.yaml" <<EOF
version: 2
contracts: [{provides: [openapi.yaml]}]
security: {OpenAPI: {securitySchemes: {token: {type: bearer, token: $token}}}}
EOF
(cd "$work/specmatic" && java -jar "$cache/apicheck/node_modules/specmatic/specmatic.jar" test --strict --testBaseURL "$url" >log 2>&1 </dev/null) || true
# Its exit code is 0 even when scenarios have failed.
grep -E '^Tests run' "$work/specmatic/log" || true
if ! grep -qE '^Tests run: [1-9][0-9]*, Successes: [1-9][0-9]*, Failures: 0,.* Errors: 0$' "$work/specmatic/log"; then
    cat "$work/specmatic/log"
    exit 1
fi
