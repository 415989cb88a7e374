#!/usr/bin/env bash
# Fuzzes one target of fuzz/ with libFuzzer, from its corpus in the repository, to which it adds what it finds. Needs Rust
# and a C++ compiler; neither nightly Rust nor cargo-fuzz, with which the same targets run too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../fuzz"

usage() {
    echo 'Usage: scripts/fuzz.sh TARGET [SECONDS, 60 by default]'
    echo
    echo 'Targets:'
    for target in fuzz_targets/*.rs; do
        echo "  $(basename "$target" .rs)"
    done
}

target=${1:-}
seconds=${2:-60}
if [[ $target == --help || $target == -h ]]; then
    usage
    exit
fi
if [[ ! -f fuzz_targets/$target.rs || ! $seconds =~ ^[0-9]+$ ]]; then
    usage >&2
    exit 2
fi

# What cargo-fuzz sets, less the sanitizers that only nightly Rust has: relatch has no unsafe code for them to look at.
flags=(
    '--cfg' 'fuzzing'
    '-Cpasses=sancov-module'
    '-Cllvm-args=-sanitizer-coverage-level=4'
    '-Cllvm-args=-sanitizer-coverage-inline-8bit-counters'
    '-Cllvm-args=-sanitizer-coverage-pc-table'
    '-Cllvm-args=-sanitizer-coverage-trace-compares'
)
# Flags for this triple only, so that build scripts are not instrumented.
triple=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=../target/fuzz
RUSTFLAGS="${flags[*]}" cargo build --release --target "$triple" --bin "$target"
mkdir -p "../target/fuzz/found/$target"
"$CARGO_TARGET_DIR/$triple/release/$target" "corpus/$target" \
    -artifact_prefix="../target/fuzz/found/$target/" -max_total_time="$seconds" -max_len=4096 -print_final_stats=1
