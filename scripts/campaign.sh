#!/usr/bin/env bash
# The campaign against hostile files and faults, for a night: all of it once, then more mutants
# until an hour is over. It prints each seed; with the same seed it tries the same again:
#
#     scripts/campaign.sh            a seed of today's date
#     scripts/campaign.sh 20261129
#     CAMPAIGN_SECONDS=0 scripts/campaign.sh      all of it once
#
# It needs root, or a kernel that lets users mount: disks are filled.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUNNER_SEED="${1:-$(date -u +%Y%m%d)}"
export RUNNER_MUTANTS="${RUNNER_MUTANTS:-1000000}"
export RUNNER_FAULTS="${RUNNER_FAULTS:-100}"
export RUNNER_KILLS="${RUNNER_KILLS:-200}"
until="${CAMPAIGN_SECONDS:-3600}"
echo "seed $RUNNER_SEED: $RUNNER_MUTANTS mutants, $RUNNER_KILLS kills, $RUNNER_FAULTS closed streams," \
    "$RUNNER_FAULTS full disks, $((10 * RUNNER_FAULTS)) flipped bits, $((5 * RUNNER_FAULTS)) rounds"
failed=0
# The fuzz targets are a workspace of their own, which `.ci/run` does not build.
cargo check --locked --manifest-path fuzz/Cargo.toml || failed=1
# One after another, so that each has the machine; all of them, whatever one finds.
try() { cargo test --locked --test it -- --nocapture --test-threads 1 "$@" || failed=1; }
try campaign:: --include-ignored
try faults::killed_at_random
while [ "$failed" = 0 ] && [ "$SECONDS" -lt "$until" ]; do
    RUNNER_SEED=$((RUNNER_SEED + 1))
    echo "seed $RUNNER_SEED: $RUNNER_MUTANTS mutants"
    try campaign::mutants::
done
exit "$failed"
