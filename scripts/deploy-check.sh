#!/bin/bash
# Checks the deployment files with the tools of those who read them. A tool that
# is not to be had here is named and skipped; REQUIRE_TOOLS=1 makes that an error.
set -euo pipefail

root=$PWD
npm=$root/.cache/apicheck
work=$(mktemp -d)
program=''
finish() {
    if [ -n "$program" ]; then
        kill "$program" 2>/dev/null || true
        wait "$program" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT

skip() {
    echo "skipped: $1"
    [ -z "${REQUIRE_TOOLS:-}" ]
}

echo "== Dockerfile: dockerfile-utils"
"$npm/node_modules/.bin/dockerfile-utils" lint Dockerfile

echo "== Kubernetes and KEDA objects: the JSON schemas of their kinds"
(cd "$npm" && node "$root/tools/apicheck/manifests.mjs" "$root"/deploy/kubernetes/*.yaml)

echo "== alert rules: promtool"
promtool=$(command -v promtool || echo "$root/.cache/bin/promtool")
if [ ! -x "$promtool" ] && command -v apt-get >/dev/null; then # the program alone; the package would start a server
    (cd "$work" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb x) >"$work/log" 2>&1 &&
        mkdir -p "$root/.cache/bin" && cp "$work/x/usr/bin/promtool" "$promtool" || true
fi
if [ -x "$promtool" ]; then
    "$promtool" check rules deploy/prometheus-alerts.yaml
    "$promtool" test rules deploy/prometheus-alerts_test.yaml
else
    skip promtool
fi

echo "== the program as the Dockerfile builds it"
CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o "$work/pms" .
if ldd "$work/pms" >/dev/null 2>&1; then
    echo "it is not static" >&2
    exit 1
fi
GOBIN=$work/bin go install . && "$work/bin/pms" version

echo "== systemd unit: systemd-analyze"
if command -v systemd-analyze >/dev/null; then
    sed "s|/usr/local/bin/pms|$work/pms|" deploy/pms.service >"$work/pms.service"
    systemd-analyze verify "$work/pms.service"
    systemd-analyze security --offline=true --threshold=20 "$work/pms.service" | tail -n 1 # of 100; the lower the safer
else
    skip systemd-analyze
fi

# What the image has and no more: an empty root, no shell, an unknown user.
echo "== the program alone in an empty root, as user 65532"
if [ "$(id -u)" = 0 ] && command -v chroot >/dev/null; then
    mkdir -p "$work/root/data" "$work/root/tmp" "$work/root/etc/ssl/certs"
    cp "$work/pms" "$work/root/pms"
    cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/" 2>/dev/null || true
    chmod 755 "$work" "$work/root"
    chown 65532:65532 "$work/root/data" "$work/root/tmp"
    LISTEN_ADDR=127.0.0.1:0 DATA_DIR=/data LOG_FORMAT=json chroot --userspec=65532:65532 "$work/root" /pms serve 2>"$work/log" &
    program=$!
    address=
    for _ in $(seq 150); do
        address=$(sed -n 's/.*"msg":"listening","addr":"\([^"]*\)".*/\1/p' "$work/log")
        if [ -n "$address" ] && curl -fsS "http://$address/readyz" 2>/dev/null; then
            break
        fi
        sleep 0.2
    done
    curl -fsS -o /dev/null "http://$address/readyz" || { cat "$work/log"; exit 1; }
else
    skip "chroot, which needs root"
fi

echo "== compose.yaml"
if docker compose version >/dev/null 2>&1; then
    docker compose -f compose.yaml config -q
else
    skip "docker compose (the tests of the program read the file all the same)"
fi
