#!/usr/bin/env bash
# Restarts sidecars under load through a real Envoy with the settings of the sample, and prints how many requests failed:
#   scripts/restarts.sh [--rate N] [--restarts N]
# Takes about two minutes once relatch is built and Envoy fetched, and leaves nothing behind. Needs Rust, a C compiler, and
# python3 with venv and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/envoy.sh

version=${envoys[-1]}
fetch_envoy "$version"
step 'build relatch'
cargo build --release --locked
exec python3 scripts/restarts/measure.py --relatch "${CARGO_TARGET_DIR:-target}/release/relatch" \
    --envoy "$(envoy_program "$version")" "$@"
