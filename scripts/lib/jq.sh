# jq for the commands of README.md, kept in target/jq/. To be sourced after envoy.sh and debian.sh, with the repository as
# working directory.
# Needs a system with apt, and no root: the Debian packages `jq`, `libjq1` and `libonig5` are unpacked and not installed.
# Elsewhere a jq on the PATH does.
# shellcheck shell=bash

# Where jq is, once it was fetched.
jq=target/jq/jq

# Fetches jq, unless it is there.
fetch_jq() {
    if "$jq" --version >/dev/null 2>&1; then
        return
    fi
    rm -rf target/jq
    mkdir -p target/jq
    if command -v jq >/dev/null; then
        ln -s "$(command -v jq)" "$jq"
        return
    fi
    if ! has_packages; then
        echo 'jq is missing and this system has no apt to fetch it with: install jq 1.6 or later' >&2
        exit 1
    fi
    step 'fetch jq'
    if ! (cd target/jq && unpack_packages jq libjq1 libonig5); then
        echo 'apt-get cannot download the package jq: look at its sources, or install jq 1.6 or later' >&2
        exit 1
    fi
    wrap_unpacked target/jq jq
    "$jq" --version
}
