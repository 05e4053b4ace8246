# apt.h has nothing to build: include it. This file runs the demo, the tests and the benchmarks.

CC      ?= cc
CFLAGS  ?= -O2
WARN     = -std=c11 -Wall -Wextra -Wconversion -Wshadow -pedantic -Werror
LIBS     = -lutf8proc -lm -pthread
COMMON   = apt.h $(wildcard examples/common/*.h)
EXAMPLES = $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
BENCHES  = $(patsubst tests/bench/%.c,build/bench/%,$(filter-out %_cuda.c,$(wildcard tests/bench/*.c)))
CUDA_BIN = $(addsuffix /bin/nvcc,$(CUDA_HOME) /usr/local/cuda)
NVCC    ?= $(firstword $(shell command -v nvcc 2> /dev/null) $(wildcard $(CUDA_BIN)))
CUDA     = $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
CUDA_GPU = $(foreach sm,80 89 90,-gencode arch=compute_$(sm),code=sm_$(sm)) -gencode arch=compute_90,code=compute_90
CUDA_LIBS = -L$(CUDA)/lib64 -Wl,-rpath,$(CUDA)/lib64 -lcublasLt -lcudart -lstdc++
PACKAGES = libstb-dev libcmocka-dev libutf8proc-dev

.PHONY: help run run-t5 run-llama run-magnitude run-pipeline run-bk test mutations examples cuda cuda-bench bench deps need-run \
        need-test need-nvcc clean

help:
	@echo "make run       build the demo and run it (about two minutes on two cores; no arguments, no downloads)"
	@echo "make run-t5    the same with a tiny T5 that puts facts into words; make run-llama with a tiny LLaMA that tells stories"
	@echo "make run-magnitude  single weights pruned by magnitude, at once, in a 2:4 pattern, step by step, against APT"
	@echo "make run-pipeline   stages that make a model smaller: APT, magnitude, distillation, quantisation (about a minute, resumable)"
	@echo "make run-bk    a sequence model that learns which positions it can do without (about ten seconds)"
	@echo "make test      the whole test suite; make test ARGS='-k platform' runs what matches, ARGS=-l lists the jobs"
	@echo "make mutations breaks one gradient at a time and expects the tests to notice (some ten minutes)"
	@echo "make examples  build every program of examples/ into build/"
	@echo "make cuda      roberta, t5 and llama for NVIDIA GPUs into build/cuda/ (needs nvcc and cuBLAS: the CUDA toolkit)"
	@echo "make cuda-bench  a table of what the GPU at hand does, in under 8 minutes (needs nvcc and the GPU)"
	@echo "make bench     build and run the benchmarks of tests/bench/"
	@echo "make deps      install $(PACKAGES) (Debian, Ubuntu)"
	@echo "make clean     remove build/"

run: need-run build/demo
	./build/demo

run-t5: need-run build/demo_t5
	./build/demo_t5

run-llama: need-run build/demo_llama
	./build/demo_llama

run-magnitude: need-run build/magnitude
	./build/magnitude

run-pipeline: need-run build/pipeline
	./build/pipeline

run-bk: need-run build/sparse_bk
	./build/sparse_bk

test: need-test
	@CC="$(CC)" tests/run.sh $(ARGS)

mutations: need-test
	@CC="$(CC)" tests/mutations.sh $(ARGS)

examples: need-run $(EXAMPLES)

cuda: need-run build/cuda/roberta build/cuda/t5 build/cuda/llama

cuda-bench: need-nvcc
	@CC="$(CC)" NVCC="$(NVCC)" tests/bench/cuda.sh bench peer

bench: need-run $(BENCHES)
	@for b in $(BENCHES); do echo "== $$b"; ./$$b || exit 1; done

build/%: examples/%.c $(COMMON) | need-run
	@mkdir -p build
	$(CC) $(CFLAGS) $(WARN) $< -o $@ $(LIBS)

# Ampere, Ada and Hopper, and code from which the driver makes what later ones need.
build/apt_cuda.o: apt_cuda.h apt.h | need-nvcc
	@mkdir -p build
	printf '#define APT_CUDA_IMPLEMENTATION\n#include "apt_cuda.h"\n' > build/apt_cuda.cu
	$(NVCC) -O2 -I. --threads 0 $(CUDA_GPU) -c build/apt_cuda.cu -o $@

build/cuda/%: examples/%.c build/apt_cuda.o $(COMMON) | need-run
	@mkdir -p build/cuda
	$(CC) $(CFLAGS) $(WARN) -DEX_CUDA $< build/apt_cuda.o -o $@ $(LIBS) $(CUDA_LIBS)

build/bench/%: tests/bench/%.c $(COMMON) $(wildcard tests/*.h tests/bench/*.h) | need-run
	@mkdir -p build/bench
	$(CC) $(CFLAGS) $(WARN) $< -o $@ $(LIBS)

# The examples and tests use three small C libraries; apt.h itself needs none.
need-run:
	@printf '#include <stb/stb_ds.h>\n#include <utf8proc.h>\n' | $(CC) -E -x c - > /dev/null 2>&1 || $(MAKE) --no-print-directory deps

need-test: need-run
	@printf '#include <stdarg.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <setjmp.h>\n#include <cmocka.h>\n' | \
	    $(CC) -E -x c - > /dev/null 2>&1 || $(MAKE) --no-print-directory deps

need-nvcc:
	@[ -n "$(NVCC)" ] || { echo "No nvcc in PATH, CUDA_HOME/bin or /usr/local/cuda/bin: please install the CUDA toolkit, or say" \
	    "where it is with  make cuda CUDA_HOME=DIR" >&2; exit 1; }

INSTALL = DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(PACKAGES)

deps:
	@if ! command -v apt-get > /dev/null; then \
	    echo "This is not Debian: please install stb (stb_ds.h as <stb/stb_ds.h>), cmocka and utf8proc with their headers." >&2; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update; $(INSTALL); \
	elif sudo -n true 2> /dev/null; then sudo -n apt-get update; sudo -n $(INSTALL); \
	else echo "Some headers are missing. Please run:  sudo apt-get install $(PACKAGES)" >&2; exit 1; fi

clean:
	rm -rf build
