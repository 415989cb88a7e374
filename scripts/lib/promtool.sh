# promtool for the tests of the alert rules, kept in target/promtool/. To be sourced after envoy.sh and debian.sh, with the
# repository as working directory.
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
    if ! has_packages; then
        echo 'promtool is missing and this system has no apt to fetch it with: install Prometheus 2.42 or later' >&2
        exit 1
    fi
    step 'fetch promtool'
    if ! (cd target/promtool && unpack_packages prometheus); then
        echo 'apt-get cannot download the package prometheus: look at its sources, or install Prometheus 2.42 or later' >&2
        exit 1
    fi
    mv target/promtool/unpacked/usr/bin/promtool "$promtool"
    rm -rf target/promtool/unpacked
    "$promtool" --version | head -n 1
}
