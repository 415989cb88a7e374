#!/usr/bin/env bash
# Rotates and revokes a key under live traffic through a real Envoy, and shows it. Takes about a minute once relatch is
# built and Envoy fetched, and leaves nothing behind. Exit code 0 only if no request failed and the revoked key is denied.
# Needs Rust, a C compiler, and python3 with venv and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/envoy.sh

version=${envoys[-1]}
started=()
place=

cleanup() {
    trap '' INT TERM HUP
    for pid in "${started[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    for pid in "${started[@]}"; do
        wait "$pid" 2>/dev/null || true
    done
    if [[ -n $place ]]; then
        rm -rf "$place"
    fi
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs a program in the background, its output in the named log.
start() {
    local name=$1
    shift
    "$@" >"$place/$name.log" 2>&1 &
    started+=($!)
}

# Waits until a file has content; `start` was called for `name` before, which is to write it.
until_written() {
    local name=$1 file=$2 pid=${started[-1]}
    local deadline=$((SECONDS + 30))
    until [[ -s $file ]]; do
        if ! kill -0 "$pid" 2>/dev/null || ((SECONDS > deadline)); then
            echo "$name did not start:" >&2
            tail -n 20 "$place/$name.log" >&2
            exit 1
        fi
        sleep 0.05
    done
}

fetch_envoy "$version"
step 'build relatch'
cargo build --release --locked
relatch=${CARGO_TARGET_DIR:-target}/release/relatch

step "start an upstream, relatch dev and Envoy $version"
umask 077
place=$(mktemp -d "${TMPDIR:-/tmp}/relatch-demo.XXXXXX")

start upstream python3 scripts/demo/upstream.py "$place/upstream.port"
until_written upstream "$place/upstream.port"
start relatch "$relatch" dev --ephemeral-ports --data-dir "$place/data"
until_written relatch "$place/data/envoy.yaml"

# Port 0 lets the system choose; Envoy's admin page then tells where it listens.
sed -e 's/port_value: 10000/port_value: 0/' \
    -e 's/port_value: 9901/port_value: 0/' \
    -e "s/port_value: 8080/port_value: $(<"$place/upstream.port")/" \
    "$place/data/envoy.yaml" >"$place/envoy.yaml"
start envoy "$(envoy_program "$version")" -c "$place/envoy.yaml" --admin-address-path "$place/envoy.admin" \
    --concurrency 1 --disable-hot-restart --log-level warn
until_written envoy "$place/envoy.admin"

# In the background, so that a signal ends the demo at once.
python3 scripts/demo/traffic.py --relatch "$relatch" --endpoints "$place/data/endpoints.json" \
    --envoy-admin "$(<"$place/envoy.admin")" &
started+=($!)
wait "$!"
