#!/bin/sh
# Installs what the console is tested with: Node, Chromium and playwright-core,
# the last in .cache/console. Does nothing if they are there. As root on Debian or
# Ubuntu it uses apt; elsewhere it says what to install and fails.
set -eu
playwright=1.65.1
dir=.cache/console

have() { command -v "$1" >/dev/null 2>&1; }

have_chromium() {
    [ -n "${CHROMIUM:-}" ] && return
    for name in chromium chromium-browser google-chrome "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"; do
        have "$name" && return
    done
    return 1
}

missing=
have npm || missing="$missing nodejs npm"
have_chromium || missing="$missing chromium fonts-inter" # a page without any font shows nothing

if [ -n "$missing" ]; then
    if ! have apt-get || [ "$(id -u)" != 0 ]; then
        cat >&2 <<EOF
Missing for the test of the console:$missing
Install it, then run make test again:
  Debian, Ubuntu   sudo apt-get install --no-install-recommends$missing
  Fedora           sudo dnf install nodejs npm chromium
  macOS            brew install node && brew install --cask google-chrome
A browser elsewhere can be named in CHROMIUM.
EOF
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of package names
    apt-get install -y -qq --no-install-recommends $missing
fi

# Without its install script, which would fetch browsers of its own.
if ! grep -q "\"version\": \"$playwright\"" "$dir/node_modules/playwright-core/package.json" 2>/dev/null; then
    mkdir -p "$dir"
    npm install --prefix "$dir" --ignore-scripts --no-save --no-audit --no-fund --loglevel=error "playwright-core@$playwright"
fi
