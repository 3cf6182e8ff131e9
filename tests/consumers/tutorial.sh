#!/usr/bin/env bash
# Runs the commands of docs/tutorial.md as they stand there, but the build and the
# download. RUNNER is the program; models/ has the weights.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
count=0
while IFS= read -r line; do
    # Only lines within ```sh that start with `runner`.
    count=$((count + 1))
    command=${line/#runner/\"$RUNNER\"}
    echo "\$ $line"
    code=0
    eval "$command --runs \"$runs\"" >"$runs/out.txt" 2>"$runs/err.txt" </dev/null || code=$?
    case "$line" in
        *'--prompt "France"'*) expected=1 ;;
        *) expected=0 ;;
    esac
    if [ "$code" -ne "$expected" ]; then
        cat "$runs/out.txt" "$runs/err.txt"
        echo "exit code $code, expected $expected"
        exit 1
    fi
done < <(awk '/^```sh/{inside=1; next} /^```/{inside=0} inside && /^runner /' docs/tutorial.md)
rm -f measures.csv
test "$count" -ge 5
echo "$count commands of the tutorial ran as it says"
