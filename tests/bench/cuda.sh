#!/usr/bin/env bash
# Everything there is to know about apt_cuda.h on the device at hand, in under 8 minutes: the tests of operations, golden models and whole
# runs on the device itself, compute-sanitizer, and the benchmark beside PyTorch + PEFT where a Python has them.
#
# usage: PYTHON=python3 tests/bench/cuda.sh [build|test|sanitize|bench|peer]...     default: all of it
set -u
cd "$(dirname "$0")/../.." || exit 1
CC=${CC:-cc} PYTHON=${PYTHON:-python3} OUT=build/cuda STEPS=10
[ $# -gt 0 ] || set -- build test sanitize bench peer
NVCC=$(command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2> /dev/null)
[ -n "$NVCC" ] || { echo "no nvcc: neither in PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"; exit 1; }
CUDA=$(dirname "$(dirname "$(readlink -f "$NVCC")")")
LIBS="-L$CUDA/lib64 -Wl,-rpath,$CUDA/lib64 -lcublasLt -lcudart -lstdc++ -lm -lpthread"
export APT_TEST_TMP=$PWD/$OUT/tmp
mkdir -p "$OUT" "$APT_TEST_TMP"

# One object of the device, one of the header, and programs that link to both.
build() {
    local name
    printf '#define APT_CUDA_IMPLEMENTATION\n#include "apt_cuda.h"\n' > "$OUT/unit.cu"
    "$NVCC" -O2 -I. -arch=native -c "$OUT/unit.cu" -o "$OUT/unit.o" || "$NVCC" -O2 -I. -arch=sm_90 -c "$OUT/unit.cu" -o "$OUT/unit.o" || return 1
    awk -v part=object -f tests/split.awk apt.h > "$OUT/object.c" && awk -v part=view -f tests/split.awk apt.h > "$OUT/view.h" || return 1
    $CC -O2 -std=c11 -w -I. -c "$OUT/object.c" -o "$OUT/object.o" || return 1
    for name in ops model generate train cuda; do
        $CC -O1 -std=c11 -w -DAPT_TEST_CUDA -DAPT_TEST_DEVICE -include "$OUT/view.h" "tests/test_$name.c" "$OUT/object.o" "$OUT/unit.o" \
            -o "$OUT/test_$name" -lcmocka $LIBS || return 1
    done
    $CC -O2 -std=c11 -w -DBENCH_CUDA tests/bench/bench_train.c "$OUT/unit.o" -o "$OUT/bench_train" $LIBS
}

summary() { grep -E '^\[  (PASSED|FAILED|SKIPPED)|ERROR|skip:' | head -n 20; }

run_tests() {
    local name
    for name in ops model generate cuda train; do
        echo "-- test_$name"
        timeout 120 "$OUT/test_$name" 2>&1 | summary
    done
}

sanitize() {
    local tool program=$CUDA/bin/compute-sanitizer
    [ -x "$program" ] || { echo "skipped: no compute-sanitizer"; return 0; }
    for tool in memcheck racecheck; do
        echo "-- compute-sanitizer $tool, test_cuda"
        timeout 150 "$program" --tool $tool "$OUT/test_cuda" 2>&1 | grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|=========.*(Invalid|hazard)|PASSED|FAILED' | head -n 12
    done
}

bench() {
    local math
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    for math in fp32 bf16; do
        for shape in "roberta-base 32 128" "roberta-base 128 128" "llama-110m 8 256"; do
            echo "-- $math"
            BENCH_MATH=$math timeout 60 "$OUT/bench_train" $shape $STEPS
        done
    done
    echo "-- bf16"
    BENCH_MATH=bf16 timeout 150 "$OUT/bench_train" llama-7b 4 512 5
}

peer() {
    "$PYTHON" -c 'import torch, peft; assert torch.cuda.is_available()' 2> /dev/null || { echo "skipped: $PYTHON has no torch with CUDA and peft"; return 0; }
    for shape in "roberta-base 32 128" "roberta-base 128 128"; do timeout 120 "$PYTHON" tests/bench/peer_cuda.py $shape $STEPS; done
}

for part; do
    echo "== $part"
    case $part in
        build) build || exit 1 ;;
        test) run_tests ;;
        sanitize) sanitize ;;
        bench) bench ;;
        peer) peer ;;
        *) echo "unknown part '$part'; there are build, test, sanitize, bench, peer"; exit 2 ;;
    esac
done
