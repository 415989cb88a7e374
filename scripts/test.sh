#!/usr/bin/env bash
# Checks and tests everything. Fetches what the tests run, once, into target/: the Envoys and Node.js.
# Needs Rust, python3 with venv and pip, a C compiler and curl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/envoy.sh
source scripts/lib/node.sh

for version in "${envoys[@]}"; do
    fetch_envoy "$version"
done
fetch_node

step 'cargo fmt --check'
cargo fmt --check
step 'cargo clippy'
cargo clippy --locked --all-targets -- -D warnings
step 'cargo test'
cargo test --locked
