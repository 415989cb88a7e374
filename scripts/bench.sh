#!/usr/bin/env bash
# Measures the cost of a Check, the memory of keys and the delay of changes, beside baselines, and prints one table.
# docs/performance.md explains the figures. Downloads Envoy once, into target/. Needs Rust, a C compiler, python3 with venv
# and pip, and h2load, which is installed if it is missing.
# Fails when something could not be measured, never because of a measured value.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/envoy.sh

usage() {
    cat <<'USAGE'
Usage: scripts/bench.sh [--only PART]... [--rounds N] [--quick] [--large] [--with-swarm] [--micro] [--report FILE]
       scripts/bench.sh --swarm [--streams N] [--start-keys N] [...]

Measures relatch beside baselines, in interleaved rounds, and prints ratios and figures.

  --only PART    measure only this part; repeat the option for several: cost, http, size, spans, tail, overload, envoy,
                 memory, change, inside
  --rounds N     number of rounds, each of which measures every side of a comparison once (default: 5)
  --quick        trial run: one round, few Checks, a tenth of the keys
  --large        also measure the memory of 10,000,000 keys
  --with-swarm   also measure the control plane with a swarm of sidecars, and print it in the same table
  --micro        also run the micro-benchmarks, after the rest
  --report FILE  file for the figures, as JSON (default: target/bench/check.json)
  --swarm        measure the control plane instead, with simulated sidecars and many keys; docs/scaling.md explains
                 the figures, and --swarm --help lists the further arguments
  --help         print this help
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

# Succeeds if a part is to be measured.
wanted() {
    [[ ${#only[@]} -eq 0 || " ${only[*]} " == *" $1 "* ]]
}

only=()
rounds=()
quick=no
large=()
with_swarm=no
micro=no
report=target/bench/check.json
while [[ $# -gt 0 ]]; do
    case $1 in
        --help | -h)
            usage
            exit
            ;;
        --only)
            only+=("${2:?"$1 needs a value"}")
            shift 2
            ;;
        --rounds)
            rounds=(--rounds "${2:?"$1 needs a value"}")
            shift 2
            ;;
        --report)
            report=${2:?"$1 needs a value"}
            shift 2
            ;;
        --quick)
            quick=yes
            shift
            ;;
        --large)
            large=(--large)
            shift
            ;;
        --with-swarm)
            with_swarm=yes
            shift
            ;;
        --micro)
            micro=yes
            shift
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done

# cargo runs a benchmark in the repository's directory.
results=$PWD/target/bench
merge=()

# This also builds the measured binary, as `cargo build --release` does.
step 'build'
cargo bench --locked --no-run --bench check --bench inside

if wanted inside; then
    step 'inside'
    inside=("${rounds[@]}")
    if [[ $quick == yes ]]; then
        inside=(--rounds 1 --keys 100000)
    fi
    cargo bench --locked --quiet --bench inside -- "${inside[@]}" --report "$results/inside.json"
    merge+=(--merge "$results/inside.json")
fi
if [[ $with_swarm == yes ]]; then
    step 'swarm'
    cargo bench --locked --quiet --bench swarm -- --report "$results/swarm.json"
    merge+=(--merge "$results/swarm.json")
fi

arguments=("${rounds[@]}" "${large[@]}" "${merge[@]}" --report "$report")
if [[ $quick == yes ]]; then
    arguments+=(--quick)
fi
for part in "${only[@]}"; do
    if [[ $part != inside ]]; then
        arguments+=(--only "$part")
    fi
done
if [[ ${#only[@]} -gt 0 && " ${arguments[*]} " != *' --only '* ]]; then
    arguments+=(--merge-only)
fi
if wanted cost || wanted http || wanted overload; then
    install_h2load
fi
if wanted envoy; then
    fetch_envoy "${envoys[-1]}"
fi
step 'check'
cargo bench --locked --quiet --bench check -- "${arguments[@]}"

if [[ $micro == yes ]]; then
    step 'micro'
    cargo bench --locked --bench micro
fi
