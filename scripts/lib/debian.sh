# Programs out of Debian packages, without installing them. To be sourced.
# Needs a system with apt, and no root.
# shellcheck shell=bash

# Whether packages can be had at all.
has_packages() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null
}

# Downloads packages and unpacks them into unpacked/ of the working directory. Where the system has no package lists, as in
# many containers, or old ones, they are fetched into a place of our own, which needs no root either.
unpack_packages() {
    download_packages "$@" || return
    local package
    for package in ./*.deb; do
        dpkg-deb -x "$package" unpacked || return
    done
    rm -rf apt ./*.deb
}

download_packages() {
    local own=(-o "Dir::State=$PWD/apt/state" -o "Dir::State::status=/var/lib/dpkg/status"
        -o "Dir::Cache=$PWD/apt/cache")
    # Without it, root downloads as a user that may not write here.
    local apt=(apt-get -q -q -o APT::Sandbox::User=root)
    if "${apt[@]}" download "$@" 2>/dev/null; then
        return
    fi
    mkdir -p apt/state/lists/partial apt/cache/archives/partial
    "${apt[@]}" "${own[@]}" update && "${apt[@]}" "${own[@]}" download "$@"
}

# Makes DIRECTORY/PROGRAM run the program that was unpacked there, with the libraries that lie beside it.
wrap_unpacked() {
    local directory=$1 program=$2 libraries
    libraries=$(cd "$directory/unpacked/usr/lib" && echo "$PWD"/*-linux-*)
    cat >"$directory/$program" <<SCRIPT
#!/bin/sh
LD_LIBRARY_PATH='$libraries' exec '$PWD/$directory/unpacked/usr/bin/$program' "\$@"
SCRIPT
    chmod +x "$directory/$program"
}
