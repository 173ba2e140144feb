#!/bin/sh
# Runs govulncheck, given as the argument, over the program. Found
# vulnerabilities fail; a database out of reach is said and passes.
set -u

output=$("$1" ./... 2>&1)
code=$?
case "$code:$output" in
0:*) ;;
1:*"govulncheck: fetching vulnerabilities:"*)
    echo "govulncheck skipped: vulnerability database not reachable"
    exit 0
    ;;
*) printf '%s\n' "$output" ;;
esac
exit "$code"
