#!/bin/sh
# Makes the root file system of the example: build.sh FOLDER
# Needs a busybox that is linked statically (Debian: busybox-static).
set -eu
root=${1:?"usage: build.sh FOLDER"}
busybox=$(command -v busybox) || { echo "error: busybox is missing. apt install busybox-static" >&2; exit 1; }
mkdir -p "$root/bin" "$root/www" "$root/tmp"
cp "$busybox" "$root/bin/busybox"
echo '<h1>one static binary</h1>' > "$root/www/index.html"
