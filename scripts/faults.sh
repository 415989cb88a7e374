#!/usr/bin/env bash
# Plays every fault scenario of tests/integration/faults.rs again and again, judges every check, and prints a table. The
# same seed makes the same choices; how processes and networks interleave is never the same. Needs what scripts/test.sh
# needs, and fetches Envoy and strace as that does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/debian.sh
source scripts/lib/envoy.sh
source scripts/lib/strace.sh

usage() {
    echo 'Usage: scripts/faults.sh [--minutes N, 10 by default] [--seed S, 1 by default] [--only PART_OF_A_NAME]
       [--release]'
    echo
    echo 'Exit code 0 only without a wrong decision. The results are in target/faults/ too, a JSON file for each scenario.'
}

minutes=10
seed=1
only=
profile=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --minutes | --seed | --only)
            if [[ $# -lt 2 ]]; then
                usage >&2
                exit 2
            fi
            declare "${1#--}=$2"
            shift 2
            ;;
        --release)
            profile=(--release)
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
if [[ ! $minutes =~ ^[1-9][0-9]*$ || ! $seed =~ ^[1-9][0-9]*$ ]]; then
    usage >&2
    exit 2
fi

for version in "${envoys[@]}"; do
    fetch_envoy "$version"
done
fetch_strace
test=(cargo test --locked "${profile[@]}" --test integration)
"${test[@]}" --no-run
mapfile -t scenarios < <("${test[@]}" -- --list --format terse faults:: |
    sed -n 's/: test$//p' | grep -v '::tests::' | grep -F -- "$only" | sort)
if [[ ${#scenarios[@]} -eq 0 ]]; then
    echo "no scenario has $only in its name" >&2
    exit 2
fi
out=$PWD/target/faults
rm -rf "$out"
export RELATCH_FAULTS_OUT=$out RELATCH_FAULTS_SEED=$seed
export RELATCH_FAULTS_SECONDS=$((minutes * 60 / ${#scenarios[@]}))
failed=0
for scenario in "${scenarios[@]}"; do
    "${test[@]}" --quiet -- --exact --nocapture "$scenario" >"$out.log" 2>&1 || {
        failed=1
        cat "$out.log" >&2
    }
    echo "$scenario" >&2
done
rm -f "$out.log"
python3 - "$out" <<'PYTHON'
import json
import pathlib
import sys

columns = ["row", "seed", "rounds", "injections", "must_allow", "must_deny", "either", "wrong", "recovery_ms"]
rows = [json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))]
lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
for line in lines:
    print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
for row in rows:
    if row["note"]:
        print(f"{row['row']}: {row['note']}")
for column in ["rounds", "injections", "must_allow", "must_deny", "wrong"]:
    print(f"{column}: {sum(row[column] for row in rows):,}")
print(f"minutes: {sum(row['seconds'] for row in rows) / 60:.1f}")
PYTHON
exit "$failed"
