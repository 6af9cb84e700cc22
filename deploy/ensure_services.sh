#!/usr/bin/env bash
# Make sure that the programs named as arguments are on the PATH: installs Debian's package of the same name when root, else says what to do.
set -euo pipefail
missing=()
for program in "$@"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
    echo "installing ${missing[*]}"
    apt-get update -qq
    # The tests start their own servers on free ports; the packages' services stay down.
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    exit 0
fi
echo "the tests need ${missing[*]} on the PATH; install them with your package manager (Debian: apt-get install ${missing[*]})" >&2
exit 1
