#!/usr/bin/env bash
# Training step and forward of bench_train beside the same job in PyTorch + PEFT, step by step in turns (turns.py): medians of TURNS
# ratios. Needs ../shared/bench/peer_torch.py, a Python with torch, transformers and peft, and memory for both.
#
# usage: PYTHON=python3 TURNS=7 tests/bench/against_torch.sh [SHAPE...]            default: all six shapes
set -u
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3} TURNS=${TURNS:-7} PEER=${APT_SHARED:-../shared}/bench/peer_torch.py bad=0
[ -f "$PEER" ] || { echo "skipped: no $PEER"; exit 0; }
[ $# -gt 0 ] || set -- minilm roberta-base t5-small t5-base llama-15m llama-110m

size() {
    case $1 in
        minilm) echo 32 128 ;;
        t5-base) echo 8 128 ;;
        llama-110m) echo 8 256 ;;
        *) echo 16 128 ;;
    esac
}

make -s build/bench/bench_train || exit 1
for shape; do "$PYTHON" tests/bench/turns.py "$PEER" "$shape" $(size "$shape") "$TURNS" || bad=1; done
exit $bad
