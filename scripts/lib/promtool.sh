# promtool for the tests of the alert rules, kept in target/promtool/. To be sourced after envoy.sh, with the repository
# as working directory.
# Needs a system with apt, and no root: the Debian package `prometheus` is unpacked and not installed, so that no service
# starts. Elsewhere a promtool on the PATH does.
# shellcheck shell=bash

# Where promtool is, once it was fetched.
promtool=target/promtool/promtool

# Fetches promtool, unless it is there.
fetch_promtool() {
    if "$promtool" --version >/dev/null 2>&1; then
        return
    fi
    rm -rf target/promtool
    mkdir -p target/promtool
    if command -v promtool >/dev/null; then
        ln -s "$(command -v promtool)" "$promtool"
        return
    fi
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo 'promtool is missing and this system has no apt to fetch it with: install Prometheus 2.42 or later' >&2
        exit 1
    fi
    step 'fetch promtool'
    if ! (cd target/promtool && download_prometheus && dpkg-deb -x prometheus_*.deb unpacked); then
        echo 'apt-get cannot download the package prometheus: look at its sources, or install Prometheus 2.42 or later' >&2
        exit 1
    fi
    mv target/promtool/unpacked/usr/bin/promtool "$promtool"
    rm -rf target/promtool/unpacked target/promtool/apt target/promtool/prometheus_*.deb
    "$promtool" --version | head -n 1
}

# Downloads the package into the working directory. Where the system has no package lists, as in many containers, or old
# ones, they are fetched into a place of our own, which needs no root either.
download_prometheus() {
    local own=(-o "Dir::State=$PWD/apt/state" -o "Dir::State::status=/var/lib/dpkg/status"
        -o "Dir::Cache=$PWD/apt/cache")
    # Without it, root downloads as a user that may not write here.
    local apt=(apt-get -q -q -o APT::Sandbox::User=root)
    if "${apt[@]}" download prometheus 2>/dev/null; then
        return
    fi
    mkdir -p apt/state/lists/partial apt/cache/archives/partial
    "${apt[@]}" "${own[@]}" update && "${apt[@]}" "${own[@]}" download prometheus
}
