#!/bin/sh
# Puts real photographs, from Debian packages of wallpapers, into .cache/photos
# for the tests. Where apt is missing or cannot reach the packages the tests do
# with made-up ones, and say so.
set -eu
dir=.cache/photos
packages="lomiri-wallpapers-16.04 lomiri-wallpapers-20.04" # 27 MB; up to 20 megapixels
[ -d "$dir" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! (cd "$work" && apt-get download -qq $packages && for deb in *.deb; do dpkg-deb -x "$deb" x; done) >"$work/log" 2>&1; then
    echo "no real photographs: $(tail -n 1 "$work/log")"
    exit 0
fi
mkdir -p "$dir.new"
find "$work/x/usr/share" -type f -name '*.jpg' -exec cp {} "$dir.new" \;
mv "$dir.new" "$dir"
