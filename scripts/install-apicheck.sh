#!/bin/sh
# Installs the npm packages of tools/apicheck into .cache/apicheck, unless they
# are there. None of their install scripts is run.
set -eu
dir=.cache/apicheck
cmp -s tools/apicheck/package-lock.json "$dir/installed-lock.json" && exit 0
command -v npm >/dev/null || { echo "npm and Node.js 20 or later are needed" >&2; exit 1; }
mkdir -p "$dir"
cp tools/apicheck/package.json tools/apicheck/package-lock.json "$dir/"
(cd -P "$dir" && npm ci --ignore-scripts --no-audit --no-fund --loglevel error)
cp tools/apicheck/package-lock.json "$dir/installed-lock.json"
