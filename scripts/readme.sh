#!/usr/bin/env bash
# Runs the commands of README.md as a newcomer does: every block that begins with ```sh, in order, in an empty directory
# that has only deploy/, the Envoy of the tests and the built program. Fails when an answer is not the expected one, and
# ends every process that it started. These comments, right before a block, change what the script does with it:
#   <!-- expect: TEXT -->             the output must contain TEXT; can be repeated
#   <!-- exit: N -->                  the exit code must be N instead of 0
#   <!-- background, ready: TEXT -->  the block continues to run; it is ready when its output contains TEXT
#   <!-- not run: REASON -->          the script checks only the syntax
# RELATCH is the program to run, target/debug/relatch by default; ENVOY is the Envoy, target/envoy/1.40/bin/envoy by default.
# Needs bash, curl, jq, openssl, python3 and util-linux, and the ports of `relatch dev` (9001, 9002, 9010 to 9012), 8080,
# 9901 and 10000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readme=README.md
relatch=$(realpath -e "${RELATCH:-target/debug/relatch}")
envoy=$(realpath -e "${ENVOY:-target/envoy/1.40/bin/envoy}")
# Seconds that a block may take, and that a process may take to end.
limit=120
grace=20
place=$(mktemp -d "${TMPDIR:-/tmp}/relatch-readme.XXXXXX")
# The shells of the blocks so far. Each leads a process group of its own, and lives as long as its background processes.
shells=()
ran=0
skipped=0

cleanup() {
    local code=$? group groups deadline=$((SECONDS + grace))
    trap '' INT TERM HUP
    # Only shells that still run: the number of another may be somebody else's by now.
    mapfile -t groups < <(jobs -pr)
    for group in "${groups[@]}"; do
        kill -- "-$group" 2>/dev/null || true
    done
    for group in "${groups[@]}"; do
        while kill -0 -- "-$group" 2>/dev/null; do
            if ((SECONDS > deadline)); then
                echo "a process of group $group did not end within $grace s and was killed" >&2
                kill -KILL -- "-$group" 2>/dev/null || true
                code=1
                break
            fi
            sleep 0.05
        done
    done
    rm -rf "$place"
    exit "$code"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Reports a failure of the block that begins at `line`, with its output.
fail() {
    echo "$readme:$line: $*" >&2
    echo '--- the block' >&2
    cat "$place/block" >&2
    echo '--- its output' >&2
    cat "$place/output.$line" >&2
    exit 1
}

# Creates the parts of a clone that the README needs.
prepare() {
    mkdir -p "$place/clone/target/release" "$place/clone/target/envoy/1.40/bin" "$place/bin" "$place/tmp"
    ln -s "$relatch" "$place/clone/target/release/relatch"
    ln -s "$envoy" "$place/clone/target/envoy/1.40/bin/envoy"
    cp -r deploy "$place/clone/deploy"
    # Runs the program that is built already.
    cat >"$place/bin/cargo" <<'END'
#!/bin/sh
if [ "$1 $2 $3" != 'run --release --' ]; then
    echo "this cargo does not know: $*" >&2
    exit 2
fi
shift 3
exec target/release/relatch "$@"
END
    chmod +x "$place/bin/cargo"
    # Each block has its own shell, which passes its variables and directory to the next one. The shell waits for its
    # background processes, as a terminal would: the Envoy of the Python package ends with its parent.
    cat >"$place/shell" <<'END'
set -a
source "$1/state"
cd "$(cat "$1/directory")"
trap 'code=$?; set +e; export -p >"$1/state"; pwd >"$1/directory"; echo "$code" >"$1/draft"; mv "$1/draft" "$1/code"; wait' EXIT
set -euo pipefail
source "$1/block"
END
    echo "$place/clone" >"$place/directory"
    # The settings of the caller must not redirect the commands.
    local name
    for name in "${!RELATCH@}"; do
        unset "$name"
    done
    unset RELATCH
    PATH="$place/bin:$PATH" TMPDIR="$place/tmp" no_proxy='*' NO_PROXY='*' bash -c 'export -p' >"$place/state"
}

# Starts the block in a shell, the last of `shells`.
start() {
    rm -f "$place/code"
    setsid bash "$place/shell" "$place" >"$place/output.$line" 2>&1 </dev/null &
    shells+=($!)
}

until_ready() {
    local text=$1 deadline=$((SECONDS + limit))
    until grep -qF -- "$text" "$place/output.$line"; do
        if ! kill -0 "${shells[-1]}" 2>/dev/null; then
            fail "it ended before it printed: $text"
        fi
        if ((SECONDS > deadline)); then
            fail "it did not print within $limit s: $text"
        fi
        sleep 0.05
    done
}

# Waits for the commands of the block. Its background processes continue.
until_ended() {
    local deadline=$((SECONDS + limit))
    until [[ -e $place/code ]]; do
        if ! kill -0 "${shells[-1]}" 2>/dev/null && [[ ! -e $place/code ]]; then
            fail 'its shell ended'
        fi
        if ((SECONDS > deadline)); then
            fail "it did not end within $limit s"
        fi
        sleep 0.05
    done
    code=$(<"$place/code")
}

run_block() {
    if ! bash -n "$place/block" 2>"$place/output.$line"; then
        fail 'the syntax is wrong'
    fi
    if [[ -n $reason ]]; then
        echo "$readme:$line: not run: $reason"
        skipped=$((skipped + 1))
        return
    fi
    echo "$readme:$line"
    start
    if [[ -n $ready ]]; then
        until_ready "$ready"
    else
        until_ended
        if [[ $code != "$exit_code" ]]; then
            fail "its exit code is $code, not $exit_code"
        fi
    fi
    local text
    for text in "${expected[@]}"; do
        if ! grep -qF -- "$text" "$place/output.$line"; then
            fail "its output lacks: $text"
        fi
    done
    ran=$((ran + 1))
}

forget_comments() {
    expected=() exit_code=0 ready='' reason='' commented=''
}

prepare
forget_comments
number=0
within=
while IFS= read -r text <&3; do
    number=$((number + 1))
    if [[ $within == sh ]]; then
        if [[ $text == '```' ]]; then
            within=
            run_block
            forget_comments
        else
            printf '%s\n' "$text" >>"$place/block"
        fi
    elif [[ $within == other ]]; then
        if [[ $text == '```' ]]; then
            within=
        fi
    elif [[ $text == '```sh' ]]; then
        within=sh line=$number
        : >"$place/block"
    elif [[ $text == '```'* && -z $commented ]]; then
        within=other
    elif [[ $text == '<!-- expect: '*' -->' ]]; then
        text=${text#'<!-- expect: '} commented=yes
        expected+=("${text%' -->'}")
    elif [[ $text == '<!-- exit: '*' -->' ]]; then
        text=${text#'<!-- exit: '} commented=yes
        exit_code=${text%' -->'}
    elif [[ $text == '<!-- background, ready: '*' -->' ]]; then
        text=${text#'<!-- background, ready: '} commented=yes
        ready=${text%' -->'}
    elif [[ $text == '<!-- not run: '*' -->' ]]; then
        text=${text#'<!-- not run: '} commented=yes
        reason=${text%' -->'}
    elif [[ $text == '<!--'* ]]; then
        echo "$readme:$number: this comment is not known" >&2
        exit 1
    elif [[ $text == [[:space:]]*'```'* ]]; then
        echo "$readme:$number: begin the block at the start of the line" >&2
        exit 1
    elif [[ -n $text && -n $commented ]]; then
        echo "$readme:$number: no block follows the comment before this line" >&2
        exit 1
    fi
done 3<"$readme"

if [[ -n $within ]]; then
    echo "$readme:$line: this block has no end" >&2
    exit 1
fi
if ((ran == 0)); then
    echo "$readme has no block to run" >&2
    exit 1
fi
echo "$ran blocks of $readme ran as expected, $skipped were not run"
