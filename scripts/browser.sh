#!/bin/sh
# Installs Chromium, in which pages are tested, where apt-get can; without one those tests are skipped.
set -eu

fail() {
    echo "browser: $*" >&2
    exit 1
}

. "$(dirname "$0")/packages.sh"
for name in chromium chromium-browser google-chrome; do
    ! command -v "$name" >/dev/null || exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    (install_missing chromium fonts-dejavu-core) || echo "browser: no Chromium; the tests of pages are skipped" >&2
fi
