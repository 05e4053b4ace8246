#!/usr/bin/env bash
# The test suite of apt.h. Everything in it is found by name, so a new file needs no entry here:
#
#   tests/test_*.c        cmocka programs, run from the repository root in several builds (see "builds" below)
#   tests/test_*.sh       scripts that get the folder with the built examples as $1; they print lines that start with
#                         "ok ", "FAILED " or "skipped "
#   tests/fuzz_NAME.c     targets for libFuzzer (tests/fuzz.h), which also replay what is in tests/corpus/NAME; of every format
#                         something there must be accepted
#   examples/*.c          must compile with the command in their first comment, by gcc and by clang
#
# What cannot run here is skipped with a reason: a test prints "    skip: reason" and calls cmocka's skip().
#
# usage: tests/run.sh [-j JOBS] [-k REGEX] [-l]     -k: only jobs whose name matches; -l: list the jobs
# Environment: CC (default cc), CLANG, CXX, CLANGXX, APT_SHARED (large test data, default ../shared).
set -u
cd "$(dirname "$0")/.." || exit 1

CC=${CC:-cc} CXX=${CXX:-c++} CLANG=${CLANG:-clang} CLANGXX=${CLANGXX:-clang++}
CROSS=aarch64-linux-gnu-gcc QEMU=qemu-aarch64
JOBS=$(nproc 2> /dev/null || echo 2) FILTER=. LIST=
while getopts j:k:l option; do
    case $option in
        j) JOBS=$OPTARG ;;
        k) FILTER=$OPTARG ;;
        l) LIST=1 ;;
        *) exit 2 ;;
    esac
done

OUT=$PWD/build/test BIN=$PWD/build/test/bin LOGS=$PWD/build/test/logs SPLIT=$PWD/build/test/split
export APT_TEST_TMP=$OUT/tmp APT_SHARED=${APT_SHARED:-../shared}
[ -n "$LIST" ] || rm -rf "$OUT"
mkdir -p "$BIN" "$LOGS" "$SPLIT" "$APT_TEST_TMP"

WARN="-Wall -Wextra -Wconversion -Wshadow -pedantic"
STRICT="-std=c11 $WARN -Werror"
TESTS="$STRICT -Wno-maybe-uninitialized"         # gcc does not know that cmocka's assertions do not return
LIBS="-lcmocka -lutf8proc -lm -pthread"
FUZZ_LIBS="-lutf8proc -lm -pthread"
LIMIT=600 HANG=1500                              # processor seconds and seconds for one run of one program
export ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1

# ---------------------------------------------------------------------------------------------------------------- jobs

# Runs a program within the limits. Time on the clock says little where others use the processors too; it only ends what hangs.
limited() { (ulimit -t $LIMIT; exec timeout $HANG "$@"); }

have() { command -v "$1" > /dev/null 2>&1; }
skip() { echo "    skip: $*"; return 77; }

# Counts what a log says: passed failed skipped.
count() {                                        # KIND STATUS LOG
    case $1 in
        cmocka) awk -v rc="$2" '
            /^\[  PASSED  \] [0-9]+ test/ { p += $4 }  /^\[  FAILED  \] [0-9]+ test/ { f += $4 }
            /^\[  SKIPPED \] [0-9]+ test/ { s += $4 }  /^    skip: / { r++ }
            END { if (r > s) s = r; if (rc == 77) { p = f = 0; s = 1 } else if (rc != 0 && f == 0) f = 1
                  if (p + f + s == 0) f = 1; print p + 0, f + 0, s + 0 }' "$3" ;;
        script) awk -v rc="$2" '
            /^ok / { p++ }  /^FAILED / { f++ }  /^skipped / { s++ }
            END { if (rc == 77) s++; else if (rc != 0 && f == 0) f = 1; if (p + f + s == 0) f = 1; print p + 0, f + 0, s + 0 }' "$3" ;;
        *) case $2 in 0) echo 1 0 0 ;; 77) echo 0 0 1 ;; *) echo 0 1 0 ;; esac ;;
    esac
}

# A command that builds something; the time it takes goes into the log, for the line that job() shows.
build() { local TIMEFORMAT="    built in %U %S s"; time "$@"; }

# Runs a command in the background as soon as a place is free. KIND says how its log is counted. Shown: processor seconds, and
# how many of them went into compiling. Long ones should come first.
job() {                                          # KIND NAME COMMAND...; STARTED: its process, or empty
    local kind=$1 name=$2
    STARTED=
    shift 2
    [[ $name =~ $FILTER ]] || return 0
    if [ -n "$LIST" ]; then echo "$name"; return 0; fi
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    (
        log=$LOGS/${name//\//.}.log
        TIMEFORMAT='%U %S'
        seconds=$({ time { ("$@") > "$log" 2>&1; }; } 2>&1)
        status=$?
        read -r passed failed skipped <<< "$(count "$kind" $status "$log")"
        seconds=$(awk '{ printf "%.1f", $1 + $2 }' <<< "$seconds")
        built=$(awk '/^    built in / { s += $3 + $4 } END { printf "%.1f", s }' "$log")
        echo "$passed $failed $skipped $name $seconds $built" > "${log%.log}.count"
        if [ "$failed" -gt 0 ]; then printf 'FAILED   %-34s (exit status %s, %s s)\n%s\n' "$name" $status "$seconds" \
            "$(grep -vE '^\[( RUN|       OK)' "$log" | tail -n 15 | sed 's/^/         | /')"
        elif [ "$passed" -eq 0 ]; then printf 'skipped  %-34s %s\n' "$name" "$(sed -n 's/^ *skip: *//p' "$log" | head -n 1)"
        else printf 'ok       %-34s %s passed, %s skipped (%s s, %s of them to build)\n' "$name" "$passed" "$skipped" "$seconds" "$built"; fi
    ) &
    STARTED=$!
}

# -------------------------------------------------------------------------------------------------------------- builds

# BUILD: the command that compiles the header. The sanitizers get -g1: lines for their reports, no variables; with -g the header
# takes half as long again. asan has -O2: its programs run twice as fast as with -O1, and the header is compiled only once. What
# is fuzzed are the readers of files, which are the same for all kernels.
compiler() {
    case $1 in
        cc) echo "$CC -O2 $TESTS" ;;
        clang) echo "$CLANG -O2 $STRICT" ;;
        asan) echo "$CC -O2 -g1 -std=c11 -w -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow" \
                  "-fno-sanitize-recover=all" ;;
        emulated) echo "$(compiler asan) -DAPT_TEST_CUDA" ;;      # contexts on the emulated device of apt_cuda.h
        tsan) echo "$CC -O1 -g1 -std=c11 -w -fsanitize=thread" ;;
        ofast) echo "$CC -Ofast -std=c11 -w" ;;
        nothreads) echo "$CC -O1 $TESTS -DAPT_NO_THREADS -DAPT_NO_MMAP" ;;
        plainc) echo "$CC -O1 $TESTS -DAPT_NO_POSIX -DAPT_NO_SIMD" ;;
        onlycore) echo "$CC -O1 $TESTS -DAPT_ONLY_CORE" ;;
        neon) echo "$CROSS -O2 $TESTS -static -Itests/cross -DAPT_TEST_SAMPLE" ;;
        fuzz) echo "$CLANG -O1 -g1 -std=c11 -w -DAPT_FUZZ -DAPT_NO_SIMD -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all" ;;
    esac
}

# Which programs, by the part after test_, run in a build; "*": all of them, but not those behind "-". What the kernels and ops do
# without SIMD is tested in every build, which goes through all tables of kernels; plainc is for what is chosen around them.
builds() {
    case $1 in
        cc) echo "*" ;;
        asan) echo "* -estimate" ;;              # it counts the bytes of runs like those of train
        ofast) echo "* -estimate -faults -cuda -text" ;;
        clang) echo "kernels ops core sparsify learned learned_modules quantize model train" ;;
        emulated) echo "ops model generate train" ;;
        tsan) echo "platform kernels ops sparsify learned learned_modules quantize quantize_train model train" ;;
        nothreads) echo "platform files model" ;;
        plainc) echo "platform files kernels learned_modules model train" ;;
        onlycore) echo "core sparsify learned quantize" ;;
        neon) echo "kernels numbers core sparsify learned quantize" ;;
    esac
}

runs_in() {                                      # BUILD SOURCE
    local name=${2#tests/test_}
    name=${name%.c}
    case " $(builds "$1") " in *" -$name "*) return 1 ;; *" $name "* | " * "*) return 0 ;; esac
    return 1
}

# Some kernels place programs where the thread sanitizer of older compilers cannot work; without randomisation it can.
tsan_prefix() {
    local probe=$OUT/tsan_probe.$BASHPID
    echo 'int main(void) { return 0; }' | $CC -x c - -fsanitize=thread -o "$probe" 2> /dev/null || return 1
    "$probe" 2> /dev/null && return 0
    setarch "$(uname -m)" -R "$probe" 2> /dev/null && echo "setarch $(uname -m) -R"
}

can_build() {                                    # BUILD: or says why not
    case $1 in
        clang) have "$CLANG" || skip "no $CLANG" ;;
        tsan) tsan_prefix > /dev/null || skip "the thread sanitizer does not work here" ;;
        neon) have $CROSS && have $QEMU || skip "no $CROSS or no $QEMU" ;;
        fuzz) echo 'int LLVMFuzzerTestOneInput(const char *d, long n) { (void)d; (void)n; return 0; }' |
                  $CLANG -x c - -fsanitize=fuzzer -o "$OUT/fuzz_probe" 2> /dev/null || skip "$CLANG has no fuzzer library" ;;
    esac
}

# The header takes far longer to compile than any program that tests it, so a build compiles it once and its programs link to
# that. They call private functions too: split.awk makes an implementation whose functions are not static, and a header that
# declares them. What stays in one piece, as every user has it: the programs of onlycore. A program that puts its own system
# calls under the header says so to the linker, in a line "link: OPTIONS" of its first comment.
shares() {                                       # BUILD SOURCE: does this program link to the build's implementation?
    [ "$1" != onlycore ] || return 1
    grep -q '^#define APT_IMPLEMENTATION' "$2"
}

# The implementation that a build's programs link to.
shared_object() { case $1 in emulated) echo "$SPLIT/asan.o" ;; *) echo "$SPLIT/$1.o" ;; esac; }

split() {
    awk -v part=object -f tests/split.awk apt.h > "$SPLIT/object.c" && awk -v part=view -f tests/split.awk apt.h > "$SPLIT/view.h"
}

implementation() {                               # BUILD
    can_build "$1" || return
    build $(compiler "$1") -I. -c "$SPLIT/object.c" -o "$SPLIT/$1.o"
}

compile() {                                      # BUILD SOURCE PROGRAM LIBRARIES...
    local build=$1 source=$2 exe=$3 parts=() object
    shift 3
    if shares "$build" "$source"; then
        object=$(shared_object "$build")
        parts=(-include "$SPLIT/view.h" "$object")
        [ -f "$object" ] || { echo "${object##*/} is missing"; return 1; }
    fi
    case $build in asan | emulated) parts+=(-O1) ;; esac              # the tests themselves need no more
    build $(compiler "$build") "$source" "${parts[@]}" -o "$exe" "$@" $(head -n 20 "$source" | sed -n 's/^ *link: //p')
}

program() {                                      # BUILD SOURCE: compiles and runs one test program
    local exe prefix= libs=$LIBS
    exe=$BIN/$(basename "$2" .c)-$1
    can_build "$1" || return
    case $1 in
        tsan) prefix=$(tsan_prefix) ;;
        neon) prefix=$QEMU libs="-lm -pthread" ;;
    esac
    compile "$1" "$2" "$exe" $libs || return 1
    limited $prefix "$exe"
}

# ------------------------------------------------------------------------------------------------------ header compiles

UNIT='#define APT_IMPLEMENTATION
#include "apt.h"'
LATE='#ifndef __cplusplus
#define _GNU_SOURCE
#endif
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#define APT_IMPLEMENTATION
#include "apt.h"'
TWICE='#include "apt.h"
#define APT_IMPLEMENTATION
#include "apt.h"
#include "apt.h"'
USER='#include "apt.h"
int main(void)
{
    apt_desc desc = APT_ZERO;
    desc.threads = 1;
    apt_ctx *ctx = apt_create(&desc);
    const int bad = ctx == 0 || apt_version() != APT_VERSION_MAJOR * 10000 + APT_VERSION_MINOR * 100 + APT_VERSION_PATCH;
    apt_destroy(ctx);
    return bad;
}'

compiles() {                                     # LANGUAGE TEXT COMPILER FLAGS...
    local language=$1 text=$2
    shift 2
    have "$1" || { skip "no $1"; return; }
    printf '%s\n' "$text" | "$@" $WARN -Werror -I. -c -x "$language" -o /dev/null -
}

object() {                                       # OUTPUT LANGUAGE TEXT COMPILER FLAGS...
    local output=$1 language=$2 text=$3
    shift 3
    printf '%s\n' "$text" | "$@" $WARN -Werror -I. -c -x "$language" -o "$output" -
}

# Two units, one of them with the implementation, in each mixture of languages.
links() {
    local o=$OUT/link a b language compiler bad=0
    have "$CXX" || { skip "no $CXX"; return; }
    for language in c c++; do
        compiler=$CC
        [ $language = c++ ] && compiler=$CXX
        object "$o-a-$language.o" $language "$UNIT" "$compiler" && object "$o-b-$language.o" $language "$USER" "$compiler" || return 1
    done
    for a in c c++; do
        for b in c c++; do
            compiler=$CC
            [ $a = c++ ] && compiler=$CXX
            if "$compiler" "$o-a-$a.o" "$o-b-$b.o" -o "$o-$a-$b" -lm -pthread && "$o-$a-$b"; then echo "ok $a implementation, $b user"
            else echo "FAILED $a implementation, $b user"; bad=1; fi
        done
    done
    return $bad
}

# APT_STATIC: an implementation in each of two units, so nothing of it may be seen from outside.
links_static() {
    local o=$OUT/link-static
    object "$o.o" c "#define APT_IMPLEMENTATION
$USER" "$CC" -DAPT_STATIC && "$CC" "$o.o" -o "$o" -lm -pthread && "$o" && [ "$(nm -g --defined-only "$o.o" | wc -l)" -eq 1 ]
}

# Only apt_ names leave the object, nothing in it can be written to, and it calls nothing that a library must not call. Not
# optimised: then every call in the text is there.
symbols() {                                      # COMPILER
    local o=$OUT/symbols-$1.o bad=0
    have "$1" || { skip "no $1"; return; }
    object "$o" c "$UNIT" "$1" || return 1
    nm -g --defined-only "$o" | awk '$3 !~ /^apt_/ { print "exported:", $3; bad = 1 } END { exit bad }' || bad=1
    size -A "$o" | awk '/^\.(data|bss|tdata|tbss)/ && $1 !~ /^\.data\.rel\.ro/ && $2 > 0 { print "writable:", $1, $2; bad = 1 }
                        END { exit bad }' || bad=1
    nm -u "$o" | awk '$2 ~ /^(_?exit|_Exit|quick_exit|abort|raise|stdout|puts|putchar|printf|vprintf|__printf_chk|__assert_fail|rand|srand|setlocale|strtok|system|getenv)$/ {
                      print "uses:", $2; bad = 1 } END { exit bad }' || bad=1
    return $bad
}

reserved() {                                     # COMPILER LANGUAGE STD
    have "$1" || { skip "no $1"; return; }
    echo 'int a;' | "$1" -Werror -Wreserved-identifier -c -x c -o /dev/null - 2> /dev/null || { skip "$1 has no -Wreserved-identifier"; return; }
    compiles "$2" "$UNIT" "$1" "$3" -Wreserved-identifier -fsyntax-only || return 1
    ! grep -nE '^ *# *define +(_|[A-Za-z0-9]\w*__)' apt.h
}

# ------------------------------------------------------------------------------------------------------- text of apt.h

# The names in the table of contents (lines of the first comment that start with ">>name") are the "// >>name" markers, in order.
contents() {
    diff <(sed '/\*\//q' apt.h | grep -oE '^ +>>[a-z_]+' | tr -d ' ') <(grep -oE '^// >>[a-z_]+' apt.h | sed 's,^// ,,')
}

# At most 120 lines in a function, 130 characters in a line, no tabs, no blanks at the end.
shape() {                                        # FILE
    awk 'length > 130 { print "line " NR " has " length " characters"; bad = 1 }
         /\t/ { print "line " NR " has a tab"; bad = 1 }
         /[ \t]$/ { print "line " NR " ends in a blank"; bad = 1 }
         /^\{$/ { start = NR }
         /^\}/ && start { n = NR - start + 1; all[++count] = n; start = 0
                          if (n > 120) { print "the function before line " NR " has " n " lines"; bad = 1 } }
         END { for (i = 2; i <= count; i++) { v = all[i]; for (k = i - 1; k > 0 && all[k] > v; k--) all[k + 1] = all[k]; all[k + 1] = v }
               print count " functions; lines: median " all[int((count + 1) / 2)] ", p90 " all[int(count * 0.9)] ", longest " all[count]
               exit bad }' "$1"
}

# Code (comments removed) that must not appear: it ends the program, prints, or is folded away by -Ofast.
words() {
    awk '{ line = $0; text = ""
           while (line != "") {
               if (inside) { end = index(line, "*/"); if (!end) break; line = substr(line, end + 2); inside = 0 }
               else { start = index(line, "/*"); if (!start) { text = text line; break }
                      text = text substr(line, 1, start - 1); line = substr(line, start + 2); inside = 1 } }
           if (text !~ /^\/\/ >>/) print NR ": " text }' apt.h > "$OUT/code"
    ! grep -wE 'exit|abort|assert|stdout|printf|puts|isnan|isinf|isfinite|fpclassify|strtok|setlocale|getenv' "$OUT/code" |
        grep -vE 'format\(printf|APTI_PRINTF'
}

# First line, macros and CHANGELOG.md name the same version.
version() {
    local v
    v=$(awk '/^#define APT_VERSION_(MAJOR|MINOR|PATCH) / { printf "%s%s", dot, $3; dot = "." }' apt.h)
    echo "version $v"
    head -n 1 apt.h | grep -F "$v" && grep -m 1 -E '^## ' CHANGELOG.md | grep -F "$v"
}

private_names() {
    ! grep -rnE '\b(apti_|APTI_)' examples README.md
}

# Each forward of the ops has a backward, and the other way round except two whose
# forward has another name: the activation (an epilogue of the product) and mlm_logits.
pairs() {
    sed -n '/^\/\/ >>ops/,/^\/\/ >>core/p' apt.h | grep -oE '^static [^(]*\bapti_\w+_(forward|backward)\(' |
        grep -oE 'apti_\w+' | grep -vE '^apti_(act|mlm_logits)_backward' | sort -u > "$OUT/ops"
    diff <(sed -n 's/_forward$//p' "$OUT/ops") <(sed -n 's/_backward$//p' "$OUT/ops") && [ -s "$OUT/ops" ]
}

# Every mutant of mutations.sh can still be made.
mutations() { tests/mutations.sh -c; }

# Writes the code blocks of a document to DIR/1.txt, 2.txt ...: in Markdown what stands between ```c and ```; in the first comment
# of apt.h what is indented by seven blanks or more and has a line that ends in ";" or starts with "#".
blocks() {                                       # FILE DIR
    if [ "$1" = apt.h ]; then
        sed '/\*\//q' apt.h | awk -v dir="$2" '
            function flush() { if (code) { n++; printf "%s", text > (dir "/" n ".txt") } text = ""; code = 0 }
            /^       / { text = text $0 "\n"; if (/; *(\/\/.*)?$/ || /^ *#/) code = 1; next }
            /^ *$/ { if (text != "") text = text "\n"; next }
            { flush() } END { flush() }'
    else awk -v dir="$2" '/^ *```/ { if (on) on = 0; else if ($1 == "```c") { on = 1; n++ } next } on { print > (dir "/" n ".txt") }' "$1"; fi
}

# Every code block compiles: as a file when it has a main, else at file scope, else inside a function with the usual variables.
doc_code() {                                     # FILE
    local n=0 bad=0 block dir=$OUT/doc-${1%.*} includes='#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "apt.h"'
    local arguments='apt_ctx *ctx, apt_model *model, apt_trainer *trainer, apt_batch batch, apt_step_info info'
    mkdir -p "$dir" && [ -f "$1" ] || { echo "no $1"; return 1; }
    blocks "$1" "$dir"
    for block in "$dir"/*.txt; do
        [ -f "$block" ] || break
        n=$((n + 1))
        { grep -qE '\bmain\(' "$block" && cat "$block"; } > "$dir/a.c"
        { echo "$includes"; cat "$block"; } > "$dir/b.c"
        printf '%s\nvoid f(%s);\nvoid f(%s)\n{\n%s\n}\n' "$includes" "$arguments" "$arguments" "$(cat "$block")" > "$dir/c.c"
        for way in a b c; do
            [ -s "$dir/$way.c" ] && $CC -std=c11 -I. -w -fsyntax-only "$dir/$way.c" 2> "$dir/$way.log" && continue 2
        done
        echo "code block $n of $1 does not compile:"
        cat "$block" "$dir"/*.log
        bad=1
    done
    echo "$n code blocks"
    [ $n -gt 0 ] && return $bad
}

# --------------------------------------------------------------------------------------------------------- the device

nvcc_path() { command -v nvcc || ls "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" 2> /dev/null || skip "no nvcc"; }
cuda_device() { nvidia-smi -L 2> /dev/null | grep '^GPU ' || skip "no NVIDIA device"; }

cuda_unit() {                                    # OUTPUT ARCHITECTURE: what a user's unit for nvcc is, with no remark of its own
    local nvcc
    nvcc=$(nvcc_path) || { echo "$nvcc"; return 77; }
    printf '#define APT_CUDA_IMPLEMENTATION\n#include "apt_cuda.h"\n' > "$1.cu"
    build "$nvcc" -O2 "-arch=$2" -Werror all-warnings -Xcompiler -Wall,-Wextra -I. -c "$1.cu" -o "$1"
}

cuda_build() { cuda_unit "$OUT/cuda.o" sm_90; }

# The tests of the build "emulated", and those of whole runs, on the device itself.
cuda_run() {
    local nvcc lib name bad=0 unit=$OUT/cuda-native.o
    nvcc=$(nvcc_path) || { echo "$nvcc"; return 77; }
    cuda_device || return
    cuda_unit "$unit" native || return 1
    lib=$(dirname "$(dirname "$(readlink -f "$nvcc")")")/lib64
    for name in $(builds emulated) cuda; do
        build $(compiler cc) -DAPT_TEST_CUDA -DAPT_TEST_DEVICE -include "$SPLIT/view.h" "tests/test_$name.c" "$SPLIT/cc.o" "$unit" \
            -o "$BIN/test_$name-device" $LIBS -L"$lib" -Wl,-rpath,"$lib" -lcublasLt -lcudart -lstdc++ &&
            limited "$BIN/test_$name-device" && echo "ok $name" || { echo "FAILED $name"; bad=1; }
    done
    return $bad
}

# The emulated device compiles with every warning in both languages.
cuda_emulation() {                               # c-gcc, c-clang or c++
    local unit='#define APT_CUDA_IMPLEMENTATION
#define APT_CUDA_EMULATE
#include "apt_cuda.h"'
    case $1 in
        c-gcc) compiles c "$unit" "$CC" -std=c11 -fsyntax-only ;;
        c-clang) compiles c "$unit" "$CLANG" -std=c11 -fsyntax-only ;;
        c++) compiles c++ "$unit" "$CXX" -std=c++17 -fsyntax-only && compiles c++ "$unit" "$CLANGXX" -std=c++17 -fsyntax-only ;;
    esac
}

# ---------------------------------------------------------------------------------------------------- examples, fuzzing

# The command in the first comment, with the name of the output replaced: this program is what tests/test_*.sh use.
documented() {                                   # SOURCE
    head -n 30 "$1" | grep -m 1 -oE '\bcc -O2 .*' || { echo "no 'cc -O2 ...' in the first lines of $1" >&2; return 1; }
}

# roberta is what a user builds. The header takes longer to compile than all the rest of an example, so for the others it is
# parsed in its place, and then the same command links to what cc/object has made of it.
example() {                                      # SOURCE
    local command
    command=$(documented "$1") || return 1
    command=$(sed -E "s,^cc ,$CC ,; s, -o [^ ]+, -o $BIN/$(basename "$1" .c)," <<< "$command")
    case $1 in
        */roberta.c | */custom_trainer.c) ;;     # custom_trainer takes the core alone
        *) build eval "$command -fsyntax-only" && command="$command -DAPT_IMPLEMENTED $SPLIT/cc.o" || return 1 ;;
    esac
    echo "$command"
    build eval "$command $WARN -Werror" && build $CC $STRICT -DAPT_IMPLEMENTED -fsyntax-only "$1"
}

# What clang makes of the header at -O2 is in clang/object and the programs there.
example_clang() {                                # SOURCE
    local command
    have "$CLANG" || { skip "no $CLANG"; return; }
    command=$(documented "$1") || return 1
    command=$(sed -E "s,^cc -O2 ,$CLANG ,; s, -o [^ ]+, -o $OUT/example-clang-$(basename "$1" .c)," <<< "$command")
    build eval "$command -fsyntax-only" || return 1
    grep -q '^#define APT_ONLY_CORE' "$1" || command="$command -DAPT_IMPLEMENTED $SPLIT/cc.o"
    echo "$command"
    build eval "$command"
}

# Replays the corpus, then tries new inputs for a few seconds, always the same ones. Without clang's fuzzer only the replay.
fuzz_build() { if can_build fuzz > /dev/null; then echo fuzz; else echo asan; fi; }

fuzz() {                                         # SOURCE
    local exe bad=0 name=${1##*/fuzz_} files=() build
    name=${name%.c} exe=$BIN/fuzz_${name%.c} build=$(fuzz_build)
    [ -d "tests/corpus/$name" ] && files=("tests/corpus/$name"/*)
    $CC -std=c11 -w -fsyntax-only "$1" || return 1
    compile $build "$1" "$exe" $FUZZ_LIBS || return 1
    if [ $build = fuzz ]; then
        mkdir -p "$OUT/fuzz_$name"
        limited "$exe" -seed=1 -runs=20000 -max_total_time=10 -timeout=20 -artifact_prefix="$OUT/" "$OUT/fuzz_$name" \
            ${files[0]:+"tests/corpus/$name"} && echo "ok new inputs" || { echo "FAILED new inputs"; bad=1; }
    else echo "skipped fuzz/$name: $CLANG has no fuzzer library, only the corpus is replayed"; fi
    limited "$exe" --replay "${files[@]}" && echo "ok ${#files[@]} files" || { echo "FAILED on the corpus"; bad=1; }
    return $bad
}

# ------------------------------------------------------------------------------------------------------------- the plan

# The implementations first (the slow ones in front), because the programs link to them; only those whose programs will run.
plan_implementations() {
    local build f name wanted
    [ -n "$LIST" ] || split || exit 1
    for build in asan fuzz ofast clang cc neon tsan nothreads plainc; do
        wanted=
        for f in tests/test_*.c; do
            name=${f#tests/test_}
            runs_in $build "$f" && shares $build "$f" && [[ $build/${name%.c} =~ $FILTER ]] && wanted=1
            [ $build = asan ] && runs_in emulated "$f" && [[ emulated/${name%.c} =~ $FILTER ]] && wanted=1
        done
        for f in tests/fuzz_*.c; do
            name=${f#tests/fuzz_}
            [ $build = "$(fuzz_build)" ] && shares $build "$f" && [[ fuzz/${name%.c} =~ $FILTER ]] && wanted=1
        done
        [ $build = cc ] && [[ cuda/run =~ $FILTER ]] && cuda_device > /dev/null && wanted=1
        for f in examples/*.c; do
            name=$(basename "$f" .c)
            [ $build = cc ] && { [[ example/$name =~ $FILTER ]] || [[ example/$name-clang =~ $FILTER ]]; } && wanted=1
        done
        [ -n "$wanted" ] && FILTER=. job check "$build/object" implementation $build
    done
    wait
}

# The scripts take long and need all examples.
plan_scripts() {
    local f examples=()
    for f in examples/*.c; do
        job check "example/$(basename "$f" .c)" example "$f"
        [ -z "$STARTED" ] || examples+=("$STARTED")
    done
    for f in examples/*.c; do job check "example/$(basename "$f" .c)-clang" example_clang "$f"; done
    [ ${#examples[@]} -eq 0 ] || wait "${examples[@]}" 2> /dev/null
    for f in tests/test_*.sh; do
        [ -f "$f" ] && job script "script/$(basename "$f" .sh)" sh "$f" "$BIN"
    done
}

plan() {
    local f build name std option
    plan_implementations
    plan_scripts
    for build in asan emulated tsan ofast cc clang neon plainc nothreads onlycore; do
        for f in tests/test_*.c; do
            name=${f#tests/test_}
            runs_in $build "$f" && job cmocka "$build/${name%.c}" program $build "$f"
        done
    done
    for f in tests/fuzz_*.c; do
        [ -f "$f" ] || continue
        name=$(basename "$f" .c)
        job script "fuzz/${name#fuzz_}" fuzz "$f"
    done
    for std in c11 gnu11; do
        for build in "$CC" "$CLANG"; do job check "header/$std-$build" compiles c "$UNIT" "$build" -std=$std -fsyntax-only; done
    done
    for build in "$CXX" "$CLANGXX"; do job check "header/c++17-$build" compiles c++ "$UNIT" "$build" -std=c++17 -fsyntax-only; done
    job check header/late compiles c "$LATE" "$CC" -std=c11 -fsyntax-only
    job check header/late-c++ compiles c++ "$LATE" "$CXX" -std=c++17 -fsyntax-only
    job check header/twice compiles c "$TWICE" "$CC" -std=c11 -fsyntax-only
    job check header/declarations compiles c '#include "apt.h"' "$CC" -std=c11
    job check header/declarations-c++ compiles c++ '#include "apt.h"' "$CXX" -std=c++17
    for option in APT_NO_SIMD APT_NO_THREADS APT_NO_POSIX APT_NO_MMAP APT_NO_STDIO APT_ONLY_CORE APT_STATIC; do
        for build in "$CC" "$CLANG"; do
            job check "header/$option-$build" compiles c "$UNIT" "$build" -std=c11 -D$option -fsyntax-only
        done
        job check "header/$option-$CXX" compiles c++ "$UNIT" "$CXX" -std=c++17 -D$option -fsyntax-only
    done
    job check header/neon compiles c "$UNIT" $CROSS -std=c11 -fsyntax-only
    job script link/languages links
    job check link/static links_static
    job check "symbols/$CC" symbols "$CC"
    job check "symbols/$CLANG" symbols "$CLANG"
    job check reserved/c reserved "$CLANG" c -std=c11
    job check reserved/c++ reserved "$CLANGXX" c++ -std=c++17
    job check cuda/build cuda_build
    job script cuda/run cuda_run
    for f in c-gcc c-clang c++; do job check "cuda/emulation-$f" cuda_emulation $f; done
    for f in apt.h apt_cuda.h; do job check "text/shape-$f" shape $f; done
    for f in contents words version private_names pairs mutations; do job check "text/$f" $f; done
    for f in apt.h README.md; do job check "doc/$f" doc_code $f; done
    wait
}

# Where the time went: processor seconds by groups of jobs, and how much of the processors stood idle.
account() {
    awk -v wall=$SECONDS -v jobs="$JOBS" '
        { group = $4; sub(/\/.*/, "", group); run = $5 - $6
          if ($4 ~ /\/object$/) { build["the header, once for each build"] += $5; next }
          if (group ~ /^(header|link|symbols|reserved|text|doc)$/) group = "checks of the header and of texts"
          if (group == "example") group = "examples"
          build[group] += $6; ran[group] += run }
        END { for (g in build) { all += build[g] + ran[g]
                  printf "%-34s %5.0f s to build, %5.0f s to run\n", g, build[g], ran[g] | "sort" }
              close("sort")
              printf "%.0f processor seconds, %d s on the clock, %.0f %% of %d processors\n", all, wall, 100 * all / (wall * jobs), jobs }' \
        "$LOGS"/*.count
}

plan
[ -n "$LIST" ] && exit 0
rm -rf "$APT_TEST_TMP"

echo
grep -hE '^ *(skip:|skipped ) *' "$LOGS"/*.log 2> /dev/null | sed -E 's/^ *(skip:|skipped ) */skipped: /' | sort | uniq -c | sort -rn
awk '$2 > 0 { print "failed: " $4 }' "$LOGS"/*.count
account
awk '{ p += $1; f += $2; s += $3 } END { printf "%d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 || p == 0 }' "$LOGS"/*.count
