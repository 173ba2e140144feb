#!/bin/sh
# Installs the servers that the tests run against, PostgreSQL, Redis, RabbitMQ,
# djpeg, an independent JPEG decoder, and curl.
# Does nothing if they are there. As root on Debian or Ubuntu it uses apt;
# elsewhere it says what to install and fails.
set -eu

# Debian keeps these off the path of ordinary users.
PATH=$PATH:/usr/sbin:/sbin

have() { command -v "$1" >/dev/null 2>&1; }

have_postgres() {
    have initdb && have postgres && return
    for dir in /usr/lib/postgresql/*/bin; do
        [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && return
    done
    return 1
}

missing=
have_postgres || missing="$missing postgresql"
have redis-server || missing="$missing redis-server"
have rabbitmq-server || missing="$missing rabbitmq-server"
have ps || missing="$missing procps"
have djpeg || missing="$missing libjpeg-turbo-progs"
have curl || missing="$missing curl"
[ -n "$missing" ] || exit 0

if ! have apt-get || [ "$(id -u)" != 0 ]; then
    cat >&2 <<EOF
Missing for the tests:$missing
Install it, then run make test again:
  Debian, Ubuntu   sudo apt-get install --no-install-recommends$missing
  Fedora           sudo dnf install postgresql-server postgresql-contrib redis rabbitmq-server procps-ng libjpeg-turbo-utils curl
  macOS            brew install postgresql redis rabbitmq jpeg-turbo
or run the tests in a container:  make docker-test
EOF
    exit 1
fi

# The packages would start their servers. The tests start their own, so in a
# container that has no policy about it this one forbids it meanwhile. On a
# host the administrator's policy stands.
policy=/usr/sbin/policy-rc.d
in_container() { [ -e /.dockerenv ] || [ -e /run/.containerenv ] || [ ! -d /run/systemd/system ]; }
if [ ! -e "$policy" ] && in_container; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 # a list of package names
apt-get install -y -qq --no-install-recommends $missing
