# strace for the tests in which syncs of a disk fail, kept in target/strace/. To be sourced after envoy.sh and debian.sh,
# with the repository as working directory.
# Needs a system with apt, and no root: the Debian packages `strace` and `libunwind8` are unpacked and not installed.
# Elsewhere a strace on the PATH does.
# shellcheck shell=bash

# Where strace is, once it was fetched.
strace=target/strace/strace

# One that runs may still not be allowed to trace, as in some containers: the test needs that it is.
strace_traces() {
    "$strace" -f -D -qq --seccomp-bpf -o /dev/null -e trace=fsync true >/dev/null 2>&1
}

# Fetches strace, unless it is there.
fetch_strace() {
    if strace_traces; then
        return
    fi
    rm -rf target/strace
    mkdir -p target/strace
    if command -v strace >/dev/null; then
        ln -s "$(command -v strace)" "$strace"
    elif has_packages; then
        step 'fetch strace'
        if ! (cd target/strace && unpack_packages strace libunwind8); then
            echo 'apt-get cannot download the package strace: look at its sources, or install strace 5.3 or later' >&2
            exit 1
        fi
        wrap_unpacked target/strace strace
    else
        echo 'strace is missing and this system has no apt to fetch it with: install strace 5.3 or later' >&2
        exit 1
    fi
    if ! strace_traces; then
        echo 'strace cannot trace here: a container needs the capability SYS_PTRACE, or a seccomp profile that allows ptrace' >&2
        exit 1
    fi
    "$strace" --version | head -n 1
}
