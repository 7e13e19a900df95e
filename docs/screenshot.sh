#!/bin/sh
# Draws docs/report.png from the report of a run: sh docs/screenshot.sh runs/NAME
# Needs Chromium (on Debian: apt-get install chromium).
set -eu
run=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --force-color-profile=srgb \
    --window-size=1200,1600 --screenshot="$here/report.png" "file://$run/report.html"
