#!/usr/bin/env bash
# Compares the cost of a Check with that of two baselines, in interleaved rounds, and prints the ratios.
# docs/performance.md says what they mean. Needs Rust, a C compiler and h2load, which is installed where it is missing.
# It fails when something could not be measured, never because of what was measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'USAGE'
Usage: scripts/bench.sh --swarm [--streams N] [--start-keys N] [...]
       scripts/bench.sh [--rounds N] [--requests N] [--keys N] [--report FILE] [--micro]

Compares the processor time, the rate and the latency of a Check with two baselines.

  --rounds N     rounds, each of which asks every server once (5)
  --requests N   Checks that a server answers in a round (200000)
  --keys N       keys in the sidecar's keyring (1000)
  --report FILE  where the figures are written as JSON (target/bench/check.json)
  --micro        run the micro-benchmarks too, after the comparison
  --swarm        measure the control plane instead, with simulated sidecars and many keys; docs/scaling.md says what,
                 and --swarm --help which further arguments there are
  --help         print this
USAGE
}

install_h2load() {
    if command -v h2load >/dev/null; then
        return
    fi
    local sudo=()
    if [[ $(id -u) -ne 0 ]]; then
        sudo=(sudo)
    fi
    if ! command -v apt-get >/dev/null || { [[ ${#sudo[@]} -gt 0 ]] && ! command -v sudo >/dev/null; }; then
        echo "h2load is missing; install it first: it comes with nghttp2 (Debian and Ubuntu: nghttp2-client)" >&2
        exit 1
    fi
    echo 'h2load is missing; installing nghttp2-client' >&2
    "${sudo[@]}" apt-get update --quiet
    "${sudo[@]}" apt-get install --yes --quiet --no-install-recommends nghttp2-client
}

if [[ ${1:-} == --swarm ]]; then
    shift
    exec cargo bench --locked --bench swarm -- "$@"
fi

micro=no
arguments=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --help | -h)
            usage
            exit
            ;;
        --micro)
            micro=yes
            shift
            ;;
        --rounds | --requests | --keys | --report)
            arguments+=("$1" "${2:?"$1 needs a value"}")
            shift 2
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done

install_h2load
# Builds the binary that is measured too, as `cargo build --release` does.
cargo bench --locked --bench check -- "${arguments[@]}"
if [[ $micro == yes ]]; then
    cargo bench --locked --bench micro
fi
