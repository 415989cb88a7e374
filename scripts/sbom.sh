#!/usr/bin/env bash
# Writes what a release binary is built from, as CycloneDX 1.6 in JSON: each crate with version, licence and the hash of its
# archive, and whether its code is in the binary or ran only as that was made. The same commit gives the same bytes.
# Needs Rust and python3.
set -euo pipefail

usage() {
    echo 'Usage: scripts/sbom.sh [FILE, standard output by default]'
    echo
    echo 'TARGET names the platform, this one by default; SOURCE_DATE_EPOCH the date, that of the commit by default.'
}

case ${1:-} in
    -h | --help)
        usage
        exit
        ;;
    -*)
        usage >&2
        exit 2
        ;;
esac
# Relative to where the caller is.
file=${1:+$(realpath -m -- "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${TARGET:-$(rustc -vV | sed -n 's/^host: //p')}
seconds=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

if [[ -n $file ]]; then
    python3 scripts/lib/dependencies.py sbom "$target" "$seconds" >"$file.new"
    mv "$file.new" "$file"
else
    python3 scripts/lib/dependencies.py sbom "$target" "$seconds"
fi
