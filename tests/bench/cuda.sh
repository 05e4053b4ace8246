#!/usr/bin/env bash
# Everything there is to know about apt_cuda.h on the device at hand: the tests of operations, golden models and whole runs on the
# device itself, compute-sanitizer, and a table of times beside PyTorch + PEFT where a Python has them.
#
# usage: PYTHON=python3 tests/bench/cuda.sh [test|sanitize|bench|peer]...     default: all of it
#
# make cuda-bench is "bench peer". Whatever is asked for, LIMIT (470) seconds after the start nothing new is begun, and what runs is
# ended: what is missing then is said.
set -u
cd "$(dirname "$0")/../.." || exit 1
CC=${CC:-cc} PYTHON=${PYTHON:-python3} OUT=build/cuda STEPS=10 LIMIT=${LIMIT:-470}
[ $# -gt 0 ] || set -- test sanitize bench peer
NVCC=$(command -v "${NVCC:-nvcc}" || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2> /dev/null)
[ -n "$NVCC" ] || { echo "no nvcc: neither in PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"; exit 1; }
nvidia-smi -L 2> /dev/null | grep '^GPU ' || { echo "no NVIDIA device: nvidia-smi lists none"; exit 1; }
CUDA=$(dirname "$(dirname "$(readlink -f "$NVCC")")")
LIBS="-L$CUDA/lib64 -Wl,-rpath,$CUDA/lib64 -lcublasLt -lcudart -lstdc++ -lm -lpthread"
export APT_TEST_TMP=$PWD/$OUT/tmp
mkdir -p "$OUT" "$APT_TEST_TMP"

# Runs a command for at most so many seconds, and not beyond LIMIT.
within() {
    local left=$((LIMIT - SECONDS)) most=$1 rc
    shift
    [ $left -gt 0 ] || { echo "not run, $LIMIT s are over: ${*##*/}"; return 124; }
    timeout -k 10 $((most < left ? most : left)) "$@"
    rc=$?
    [ $rc -ne 124 ] || echo "ended after $((most < left ? most : left)) s: ${*##*/}"
    return $rc
}

# The object of the device, for this device alone: a third of the time that all of them take.
unit() {
    [ -z "${UNIT:-}" ] || return 0
    printf '#define APT_CUDA_IMPLEMENTATION\n#include "apt_cuda.h"\n' > "$OUT/unit.cu"
    "$NVCC" -O2 -I. -arch=native -c "$OUT/unit.cu" -o "$OUT/unit.o" || "$NVCC" -O2 -I. -arch=sm_90 -c "$OUT/unit.cu" -o "$OUT/unit.o" || return 1
    UNIT=$OUT/unit.o
}

# One object of the header for all of them.
build_tests() {
    local name
    unit || return 1
    awk -v part=object -f tests/split.awk apt.h > "$OUT/object.c" && awk -v part=view -f tests/split.awk apt.h > "$OUT/view.h" || return 1
    $CC -O2 -std=c11 -w -I. -c "$OUT/object.c" -o "$OUT/object.o" || return 1
    for name in ops model generate train cuda; do
        $CC -O1 -std=c11 -w -DAPT_TEST_CUDA -DAPT_TEST_DEVICE -include "$OUT/view.h" "tests/test_$name.c" "$OUT/object.o" "$UNIT" \
            -o "$OUT/test_$name" -lcmocka $LIBS || return 1
    done
    build_tests() { :; }
}

summary() { grep -E '^\[  (PASSED|FAILED|SKIPPED)|ERROR|skip:|not run|ended after' | head -n 20; }

run_tests() {
    local name
    build_tests || return 1
    for name in ops model generate cuda train; do
        echo "-- test_$name"
        within 120 "$OUT/test_$name" 2>&1 | summary
    done
}

sanitize() {
    local tool program=$CUDA/bin/compute-sanitizer
    [ -x "$program" ] || { echo "skipped: no compute-sanitizer"; return 0; }
    build_tests || return 1
    for tool in memcheck racecheck; do
        echo "-- compute-sanitizer $tool, test_cuda"
        within 150 "$program" --tool $tool "$OUT/test_cuda" 2>&1 |
            grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|=========.*(Invalid|hazard)|PASSED|FAILED|not run|ended after' | head -n 12
    done
}

bench() {
    local math row run="$OUT/bench_cuda"
    unit && $CC -O2 -std=c11 -w tests/bench/bench_cuda.c "$UNIT" -o "$run" $LIBS || return 1
    echo "$(date +%F), $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader), $("$NVCC" --version | grep -o 'release [0-9.]*')"
    echo
    echo "| step | math | ms | tokens/s | TFLOP/s | of peak | of products | forward ms | tokens/s | MB |"
    echo "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for math in fp32 bf16; do
        for row in "roberta-base 32 128" "roberta-base 128 128" "llama-110m 8 256"; do within 60 "$run" lora $math $row $STEPS; done
        within 90 "$run" apt $math roberta-base 128 128 $STEPS
    done
    within 60 "$run" lora fp16 roberta-base 128 128 $STEPS
    within 60 "$run" round bf16 roberta-base 128 128 $STEPS
    within 60 "$run" graphs bf16 minilm 8 64 $STEPS
    within 180 "$run" llama bf16 llama-7b 4 512 5
}

peer() {
    local row
    "$PYTHON" -c 'import torch, peft; assert torch.cuda.is_available()' 2> /dev/null || { echo "skipped: $PYTHON has no torch with CUDA and peft"; return 0; }
    for row in "roberta-base 32 128" "roberta-base 128 128"; do within 120 "$PYTHON" tests/bench/peer_cuda.py $row $STEPS; done
}

bad=0
for part; do
    echo "== $part"
    case $part in
        test) run_tests || bad=1 ;;
        sanitize) sanitize || bad=1 ;;
        bench) bench || bad=1 ;;
        peer) peer || bad=1 ;;
        *) echo "unknown part '$part'; there are test, sanitize, bench, peer"; exit 2 ;;
    esac
done
exit $bad
