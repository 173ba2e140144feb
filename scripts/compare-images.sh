#!/bin/sh
# Compares the image pipeline with sharp; make compare-images runs it. sharp comes
# from npm into .cache, photographs from fetch-test-photos.sh.
# COMPARE_ROUNDS is how often each image is compressed (3).
set -eu
scripts/fetch-test-photos.sh
sharp=.cache/compare-images
mkdir -p "$sharp"
cp scripts/compare-images/* "$sharp"
[ -d "$sharp/node_modules/sharp" ] || (cd -P "$sharp" && npm ci --no-audit --no-fund --loglevel=error)
COMPARE_IMAGES="$PWD/$sharp" exec go test -run '^TestCompareWithSharp$' -count=1 -v -timeout 60m .
