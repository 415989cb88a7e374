#!/usr/bin/env bash
# Checks and tests everything. Fetches what the tests run, once, into target/: the Envoys, Traefik, Caddy, nginx, Node.js,
# OpenBao, promtool, strace and jq.
# Needs Rust, python3 with venv and pip, a C compiler, curl and openssl; apt, or nginx, promtool, strace and jq on the PATH;
# and, for the commands of README.md, its ports (see scripts/readme.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/caddy.sh
source scripts/lib/debian.sh
source scripts/lib/envoy.sh
source scripts/lib/jq.sh
source scripts/lib/nginx.sh
source scripts/lib/node.sh
source scripts/lib/openbao.sh
source scripts/lib/promtool.sh
source scripts/lib/strace.sh
source scripts/lib/traefik.sh

for version in "${envoys[@]}"; do
    fetch_envoy "$version"
done
fetch_traefik
fetch_caddy
fetch_nginx
fetch_node
fetch_openbao
fetch_promtool
fetch_strace
fetch_jq

step 'promtool'
"$promtool" check rules deploy/prometheus/relatch.rules.yaml
"$promtool" test rules deploy/prometheus/relatch.rules.test.yaml
"$promtool" check config --lint=all deploy/prometheus/prometheus.yaml

step 'licences'
python3 scripts/lib/dependencies.py licences
if command -v cargo-deny >/dev/null; then
    # Advisories need the network; the rest of deny.toml does not.
    step 'cargo deny'
    cargo deny --offline check bans licenses sources
fi

step 'cargo fmt --check'
cargo fmt --check
step 'cargo clippy'
cargo clippy --locked --all-targets -- -D warnings
step 'cargo test'
cargo test --locked
step 'README.md'
RELATCH="${CARGO_TARGET_DIR:-target}/debug/relatch" PATH="$PWD/target/jq:$PATH" ./scripts/readme.sh
