#!/usr/bin/env bash
# Training step and forward of bench_train beside the same job in PyTorch + PEFT: one run of each, one behind the other, ROUNDS
# times; the ratio of every pair, then the medians. Needs ../shared/bench/peer_torch.py and a Python with torch, transformers
# and peft.
#
# usage: PYTHON=python3 ROUNDS=3 tests/bench/against_torch.sh [SHAPE...]            default: all six shapes
# PAUSE, if set, is a command that runs each pair (a lock that keeps other work away, say).
set -u
cd "$(dirname "$0")/../.." || exit 1
PYTHON=${PYTHON:-python3} ROUNDS=${ROUNDS:-3} PEER=${APT_SHARED:-../shared}/bench/peer_torch.py STEPS=5
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

# Prints: step tokens/s, forward tokens/s, MB resident of one program.
ours() { BENCH_FLOATS=1 ./build/bench/bench_train "$1" $(size "$1") $STEPS | sed -nE \
    -e 's/.* ([0-9]+) MB resident.*/\1/; t keep' -e '/ dense /s/.* ([0-9]+) tokens.s \(.* ([0-9]+) tokens.s.*/\1 \2/; t show' -e 'd' \
    -e ':keep; h; d' -e ':show; G; s/\n/ /; p'; }
theirs() { "$PYTHON" "$PEER" "$1" fp32 $(size "$1") $STEPS 2> /dev/null |
    sed -nE 's/.*ms\/step ([0-9]+) tok.*ms ([0-9]+) tok.*RSS ([0-9]+) MB.*/\1 \2 \3/p'; }
pair() { echo "$1 $(ours "$1") $(theirs "$1")"; }
if [ -n "${PAIR:-}" ]; then pair "$PAIR"; exit; fi
make -s build/bench/bench_train || exit 1

for shape; do
    for _ in $(seq "$ROUNDS"); do PAIR=$shape ${PAUSE:-} "$0"; done | awk '
        function median(x, n,   i, j, t) {
            for (i = 2; i <= n; i++) for (j = i; j > 1 && x[j - 1] > x[j]; j--) { t = x[j]; x[j] = x[j - 1]; x[j - 1] = t }
            return x[int((n + 1) / 2)]
        }
        NF != 7 { print "a run failed: " $0; next }
        { n++; step[n] = $2 / $5; forward[n] = $3 / $6; memory[n] = $4 / $7
          printf "%-13s step %5d / %5d tokens/s = %.2f   forward %5d / %5d = %.2f   memory %5d / %5d MB = %.2f\n", $1, $2, $5, step[n], $3, $6,
                 forward[n], $4, $7, memory[n]; fflush() }
        END { if (n) printf "%-13s medians of %d: step %.2f, forward %.2f, memory %.2f\n", $1, n, median(step, n), median(forward, n), median(memory, n) }'
done
