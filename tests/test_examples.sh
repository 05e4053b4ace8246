#!/bin/sh
# Exercises the built examples as a user would: the demos, every method and task of roberta, llama and t5, interruption and resumption,
# bad input. usage: tests/test_examples.sh [BUILD_DIR]   Prints one line a check; exit status 1 when any failed.
cd "$(dirname "$0")/.." || exit 1
build=${1:-build}
shared=${APT_SHARED:-../shared}
work=$(mktemp -d "${TMPDIR:-/tmp}/apt-examples.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0
demo=$build/demo roberta=$build/roberta llama=$build/llama t5=$build/t5 base=$work/demo/tiny-bert

pass() { passed=$((passed + 1)); echo "ok       examples: $1"; }
fail() { failed=$((failed + 1)); echo "FAILED   examples: $1"; [ -f "$work/log" ] && tail -n 5 "$work/log" | sed 's/^/           /'; return 0; }
skip() { skipped=$((skipped + 1)); echo "skipped  examples: $1"; }

# check NAME STATUS COMMAND...: runs the command, its output goes to $work/log, its exit status must be STATUS
check() {
    name=$1 want=$2
    shift 2
    "$@" > "$work/log" 2>&1
    got=$?
    if [ "$got" -eq "$want" ]; then pass "$name"; else fail "$name (exit status $got, expected $want)"; fi
}
# says NAME PATTERN: the output of the last command has PATTERN
says() { if grep -q -e "$2" "$work/log"; then pass "$1"; else fail "$1 (no \"$2\" in the output)"; fi; }
value() { sed -n "s/^ *$1 *\([0-9.]*\).*/\1/p" "$work/log" | head -n 1; }
below() { if awk -v a="${2:-x}" -v b="$3" 'BEGIN { exit !(a + 0 > 0 && a + 0 < b + 0) }'; then pass "$1 ($2)"; else fail "$1 ($2, expected less than $3)"; fi; }
# quantised PROGRAM MODEL METHOD ARGUMENTS...: what is measured of a folder of floats that becomes small integers in memory
quantised() {
    program=$1 folder=$2 method=$3
    shift 3
    for kind in none int8 int4; do
        check "$method with --quantize $kind" 0 "$program" --model "$folder" --method "$method" --threads 2 --quantize $kind "$@"
        [ $kind = none ] || says "$kind: the model's line says so" "parameters, $kind, "
        eval "loss_$kind=$(value loss)"
    done
    if [ "$loss_int4" != "$loss_none" ]; then pass "int4 shows in the loss"; else fail "int4 shows in the loss"; fi
    below "int8 stays close" "$(awk -v a="$loss_int8" -v b="$loss_none" 'BEGIN { print (a > b ? a / b : b / a) }')" 1.05
}
same() { if cmp -s "$2" "$3"; then pass "$1"; else fail "$1 ($2 and $3 differ)"; fi; }
says_file() { if grep -q -e "$3" "$2"; then pass "$1"; else fail "$1 (no \"$3\" in $2)"; fi; }
has() { if [ -s "$2" ]; then pass "$1"; else fail "$1 ($2 is missing or empty)"; fi; }

for program in demo demo_t5 demo_llama magnitude pipeline roberta llama t5 sparse_bk; do
    if [ ! -x "$build/$program" ]; then fail "$build/$program is not built"; exit 1; fi
done

# ---- the demo
check "demo --help" 0 "$demo" --help
says "demo --help names its options" "--seed"
check "demo refuses an unknown option" 2 "$demo" --bogus
check "demo runs" 0 "$demo" --fast --threads 2 --out "$work/demo"
says "demo compares the three ways" "prune after"
for row in accuracy parameters "on disk" "step, at the start" "step, at the end" inference "peak memory"; do says "demo's table has: $row" "^$row "; done
has "demo writes its report" "$work/demo/report.html"
has "and one of the pretraining" "$base/report.html"
for curve in "Training loss" Accuracy Sparsity "Step time" Memory "Ranks per layer, APT 60 %" "Heads per layer, APT 60 %" \
    "Neurons per layer, APT 60 %" "Hidden size"; do
    if grep -q "<figcaption>$curve" "$work/demo/report.html"; then pass "the report draws: $curve"; else fail "the report draws: $curve"; fi
done
if grep -q -e 'src="http' -e 'href="http' -e '@import' "$work/demo/report.html"; then fail "the report is self-contained"; else pass "the report is self-contained"; fi
check "demo runs on one thread" 0 "$demo" --fast --threads 1 --out "$work/demo1"
for run in tiny-bert lora apt prune-after; do
    same "$run is the same on one and two threads" "$work/demo/$run/model.safetensors" "$work/demo1/$run/model.safetensors"
done

# ---- learned sparsity: two runs, one table; the same on any number of threads, and when it is cut and goes on
bk=$build/sparse_bk
check "sparse_bk --help" 0 "$bk" --help
says "sparse_bk --help names its options" "--threshold"
check "sparse_bk refuses an unknown option" 2 "$bk" --bogus
check "sparse_bk refuses a target of 1" 2 "$bk" --target 1
check "sparse_bk refuses a number that is none" 2 "$bk" --weight much
check "sparse_bk refuses an unknown loss" 2 "$bk" --loss l3
says "and lists the kinds" "l2.*l1.*kl.*huber"
check "sparse_bk runs" 0 "$bk" --fast --threads 2 --out "$work/bk"
for row in accuracy loss "positions masked" target experts parameters "on disk" training inference; do says "sparse_bk's table has: $row" "^$row "; done
says "half of the experts are gone" "^experts *8 of 8 *4 of 8 *4 of 8"
removal="which had [0-9.]* % and [0-9.]* % of the choices: [0-9.]*, pruned [0-9.]*, retrained [0-9]"
says "the first removal is shown" "step 30: 4 -> 3, $removal"
says "and the second" "step 39: 3 -> 2, $removal"
says_file "the report has them" "$work/bk/report.html" "tep 39</th>"
says_file "and the metrics" "$work/bk/sparse/metrics.jsonl" '"event":"experts","step":39,"before":3,"after":2,'
for model in dense sparse int8; do has "the weights of $model" "$work/bk/$model/weights"; done
if [ "$(($(wc -c < "$work/bk/int8/weights") * 2))" -lt "$(wc -c < "$work/bk/sparse/weights")" ]; then
    pass "int8 has less than half of the bytes"; else fail "int8 has less than half of the bytes"; fi
has "sparse_bk writes its report" "$work/bk/report.html"
says_file "its metrics hold the scheduler's target" "$work/bk/sparse/metrics.jsonl" '"sparsity_target"'
check "sparse_bk runs on one thread" 0 "$bk" --fast --threads 1 --out "$work/bk1"
same "it is the same on one and two threads" "$work/bk/sparse/checkpoint" "$work/bk1/sparse/checkpoint"
same "and so are its small integers" "$work/bk/int8/weights" "$work/bk1/int8/weights"
check "sparse_bk with int4 and one expert" 0 "$bk" --fast --experts 1 --bits int4 --out "$work/bk4"
says "six of eight are gone" "^experts *8 of 8 *2 of 8 *2 of 8"
says "one by one" "3 -> 2, which had"
has "int4 has weights of its own" "$work/bk4/int4/weights"
check "sparse_bk refuses to have no expert" 2 "$bk" --experts 0
check "sparse_bk stops where it is told to" 0 "$bk" --fast --stop 33 --out "$work/bk2"
check "sparse_bk goes on" 0 "$bk" --fast --resume --out "$work/bk2"
says "from its checkpoint" "goes on at step 30"
same "and ends where the whole run ended" "$work/bk/sparse/checkpoint" "$work/bk2/sparse/checkpoint"
same "with the same small integers" "$work/bk/int8/weights" "$work/bk2/int8/weights"
check "sparse_bk refuses the checkpoint of other settings" 1 "$bk" --fast --resume --target 0.5 --out "$work/bk2"
printf damage | dd of="$work/bk2/sparse/checkpoint" bs=1 seek=30000 conv=notrunc 2> /dev/null
check "sparse_bk refuses a damaged checkpoint" 1 "$bk" --fast --resume --out "$work/bk2"
says "and says so" "damaged"

# ---- the demos of the other families: their folders are ordinary ones
for family in t5 llama; do
    check "demo_$family --help" 0 "$build/demo_$family" --help
    check "demo_$family runs" 0 "$build/demo_$family" --fast --threads 2 --out "$work/demo-$family"
    says "demo_$family compares the three ways" "prune after"
    quality=perplexity drawn=Perplexity
    [ $family = t5 ] && quality="exact match" drawn="Exact match"
    says "demo_$family's table has: $quality" "^$quality "
    says_file "demo_$family's report draws it" "$work/demo-$family/report.html" "<figcaption>$drawn"
    for row in parameters "on disk" "step, at the start" "step, at the end" inference writing "peak memory"; do
        says "demo_$family's table has: $row" "^$row "
    done
    has "demo_$family writes its report" "$work/demo-$family/report.html"
    check "demo_$family runs on one thread" 0 "$build/demo_$family" --fast --threads 1 --out "$work/demo-$family-1"
    for run in "tiny-$family" lora apt prune-after; do
        same "$family: $run is the same on one and two threads" "$work/demo-$family/$run/model.safetensors" \
            "$work/demo-$family-1/$run/model.safetensors"
    done
done
check "t5 reads demo_t5's pruned model" 0 "$t5" --model "$work/demo-t5/apt" --method eval --dev "$work/demo-t5/dev.tsv" --max-new 30
says "and measures it" "^ *ROUGE-L *[1-9]"
check "llama reads demo_llama's pruned model" 0 "$llama" --model "$work/demo-llama/apt" --method generate --prompt "the cook was" --max-new 8
says "and goes on with words of the grammar" "^the cook was [a-z]* "
check "a T5 is not for llama" 1 "$llama" --model "$work/demo-t5/apt" --method generate
says "t5 is" "is a T5 model, which is not for this program; t5 is"
check "a LLaMA is not for roberta" 1 "$roberta" --model "$work/demo-llama/apt" --method eval --dev "$work/demo/dev.tsv"
says "llama is" "is a LLaMA model, which is not for this program; llama is"
mkdir "$work/bare" && sed 's/"[A-Za-z]*ForMaskedLM"/"BertModel"/' "$base/config.json" > "$work/bare/config.json" && cp "$base/model.safetensors" "$base/vocab.txt" "$work/bare/"
for program in llama t5; do
    check "$program: an encoder without any head" 1 "$build/$program" --model "$work/bare" --method generate --prompt x
    says "its family and program are named" "is a BERT model, which is not for this program; roberta is"
done

# ---- magnitude: on the grammar, then on files
magnitude=$build/magnitude
check "magnitude --help" 0 "$magnitude" --help
says "magnitude --help names its options" "--iterations"
check "magnitude refuses an unknown option" 2 "$magnitude" --bogus
check "a sparsity out of range" 2 "$magnitude" --sparsity 1
says "both limits are named" "from 0.05 to 0.95"
check "a sparsity that is no number" 2 "$magnitude" --iterative nan
check "more iterations than steps" 2 "$magnitude" --steps 8 --iterations 5
says "both are named" "iterations 5 do not fit --steps 8"
check "iterations that would lead back" 2 "$magnitude" --first 0.6 --iterative 0.5
says "both ends are named" "first 0.6 is above --iterative 0.5"
check "an empty name among the patterns" 2 "$magnitude" --patterns query,,output
check "a model without rows" 2 "$magnitude" --model "$base"
check "rows without a model" 2 "$magnitude" --train "$work/demo/train.tsv" --dev "$work/demo/dev.tsv"
check "the result must not replace the model" 2 "$magnitude" --model "$base" --train x.tsv --dev x.tsv --out "$base"
check "magnitude runs" 0 "$magnitude" --fast --threads 2 --out "$work/magnitude"
for row in perplexity accuracy loss "loss, against dense" "perplexity, against dense" "sparsity, target" "sparsity, reached" "active parameters" "on disk" \
    "compressed, on disk" "pruned layers, smaller" inference "inference, compressed"; do says "magnitude's table has: $row" "^$row "; done
says "what was asked for is reached" "^sparsity, reached *- *- *0.0 % *60.0 % *50.0 % *70.0 % "
says "70 % gone: the pruned layers are three times smaller" "^pruned layers, smaller .*  3\.0[0-9] x "
for i in 1 2 3 4 5; do says "iteration $i is shown" "iteration $i, step .* retrained [0-9]"; done
sed -n '/^perplexity \|^accuracy \|^pruned layers\|^sparsity, reached/p' "$work/log" | tr -s ' ' > "$work/magnitude.rows"
if grep -q -e 'src="http' -e 'href="http' -e '@import' "$work/magnitude/report.html"; then fail "its report is self-contained"; else pass "its report is self-contained"; fi
says_file "its report has the iterations" "$work/magnitude/report.html" "teration 5</th>"
results=$work/magnitude/results.json
for name in accuracy perplexity degradation perplexity_degradation sparsity active zeros compression sparse_file_bytes tokens_per_second_compressed loss_before loss_retrained; do
    says_file "results.json has: $name" "$results" "\"$name\": [-0-9]"
done
if [ "$(grep -c '"iteration": ' "$results")" -eq 5 ]; then pass "results.json has all iterations"; else fail "results.json has all iterations"; fi
if command -v python3 > /dev/null 2>&1; then
    check "results.json is JSON" 0 python3 -c 'import json, sys; d = json.load(open(sys.argv[1])); sys.exit(len(d["ways"]) != 6)' "$results"
else skip "results.json is JSON (no python3)"; fi
if [ "$(($(wc -c < "$work/magnitude/apt-int8/model.safetensors") * 2))" -lt "$(wc -c < "$work/magnitude/apt/model.safetensors")" ]; then
    pass "APT + int8 has less than half of APT's bytes"; else fail "APT + int8 has less than half of APT's bytes"; fi
check "magnitude runs on one thread" 0 "$magnitude" --fast --threads 1 --out "$work/magnitude1"
for folder in dense magnitude pattern iterative apt apt-int8 iterative-sparse; do
    same "$folder is the same on one and two threads" "$work/magnitude/$folder/model.safetensors" "$work/magnitude1/$folder/model.safetensors"
done
check "magnitude --measure" 0 "$magnitude" --fast --measure --threads 2 --out "$work/magnitude"
sed -n '/^perplexity \|^accuracy \|^pruned layers\|^sparsity, reached/p' "$work/log" | tr -s ' ' > "$work/measured.rows"
same "the folders are what the run said they were" "$work/magnitude.rows" "$work/measured.rows"
same "and stay as they are" "$work/magnitude/apt-int8/model.safetensors" "$work/magnitude1/apt-int8/model.safetensors"
check "nothing to be measured" 1 "$magnitude" --fast --measure --out "$work/magnitude-none"
says "the folder is named" "magnitude-none/"
check "magnitude with classes" 0 "$magnitude" --demo classes --fast --threads 2 --out "$work/magnitude-classes"
says "its table has a baseline" "bag of words"
for way in magnitude pattern iterative apt-int8; do
    for folder in $way $way-sparse; do
        [ $folder = apt-int8-sparse ] && continue
        check "roberta reads $folder" 0 "$roberta" --model "$work/magnitude-classes/$folder" --dev "$work/magnitude-classes/test.tsv" --method eval
        sed -n '/accuracy\|loss/p' "$work/log" > "$work/$folder.scores"
    done
    [ $way = apt-int8 ] && continue
    same "$way: the compressed folder is the same model" "$work/$way.scores" "$work/$way-sparse.scores"
    if [ "$(wc -c < "$work/magnitude-classes/$way-sparse/model.safetensors")" -lt "$(wc -c < "$work/magnitude-classes/$way/model.safetensors")" ]; then
        pass "$way: and smaller"; else fail "$way: and smaller"; fi
done
check "magnitude on files" 0 "$magnitude" --model "$base" --train "$work/demo/train.tsv" --dev "$work/demo/dev.tsv" --limit 400 --steps 20 \
    --batch 16 --iterations 2 --first 0.2 --iterative 0.5 --patterns 'attention*query,intermediate' --threads 2 --out "$work/magnitude-files"
says "only the chosen matrices are pruned" "^sparsity, reached *0.0 % *60.0 % *50.0 % *50.0 % "
if [ "$(grep -c '"matrices": 8,' "$work/magnitude-files/results.json")" -ge 3 ]; then pass "which are eight"; else fail "which are eight"; fi
has "the classes are named" "$work/magnitude-files/iterative-sparse/labels.txt"
check "a name that no matrix has" 1 "$magnitude" --model "$base" --train "$work/demo/train.tsv" --dev "$work/demo/dev.tsv" --steps 20 --fast \
    --patterns nothing --out "$work/magnitude-nothing"
says "is named, and a matrix" "'nothing' in its name.*query"
check "a folder of another family" 1 "$magnitude" --model "$work/demo-t5/apt" --train "$work/demo/train.tsv" --dev "$work/demo/dev.tsv" --out "$work/x"
says "is for another program" "is a T5 model, which is not for this program; t5 is"
check "rows without classes" 1 "$magnitude" --model "$base" --train "$work/demo/corpus.tsv" --dev "$work/demo/dev.tsv" --out "$work/x"

# ---- pipeline: orders that make no sense, all stages in one run, runs that are killed in the middle, files
pipeline=$build/pipeline
check "pipeline --help" 0 "$pipeline" --help
says "pipeline --help says where experts are" "apt_moe networks"
refuses() {                                                           # NAME STAGES PATTERN
    check "$1" 2 "$pipeline" --stages "$2" --out "$work/x"
    says "and says why" "$3"
}
refuses "a stage that there is not" tune,prune '"prune" is no stage; there are tune, apt, magnitude, qat, distill, student, quantize'
refuses "no stage at all" "" '"" is no stage'
refuses "a stage behind quantize" tune,quantize,distill "distill: nothing can follow quantize"
refuses "tuning behind pruning" apt,tune "tune: .* comes first"
refuses "pruning behind qat" tune,qat,apt,quantize "apt: .*prune in front of it"
refuses "qat without quantize" tune,qat,distill "qat: it learns for quantize"
refuses "nothing to win back" tune,distill "distill: there is nothing to win back"
refuses "a teacher that knows nothing" student "student: its teacher is a model that knows the task"
refuses "magnitude twice" tune,magnitude,magnitude "only distill may come more than once"
check "a student as deep as its teacher" 1 "$pipeline" --stages tune,student --student-layers 4 --fast --steps 4 --out "$work/deep"
says "both numbers are named" "student of 4 layers: the model has 4"
check "nothing to go on with" 2 "$pipeline" --resume --out "$work/nothing"
all="--fast --steps 16 --stages tune,student,apt,magnitude,distill,qat,quantize"
check "pipeline runs" 0 "$pipeline" $all --threads 2 --out "$work/stages"
for row in accuracy loss parameters "not 0" "on disk" smaller "of the target" inference time; do says "pipeline's table has: $row" "^$row "; done
says "the target is reached" "is reached: 1[0-9]"
says_file "results.json has the compression" "$work/stages/results.json" '"stage": "quantize".*"compression": 1[0-9]'
says_file "the report draws its stages" "$work/stages/report.html" "7-quantize\|magnitude"
zeros() { sed -n "s/.*\"stage\": \"$1\".*\"zeros\": \([0-9]*\).*/\1/p" "$work/stages/results.json"; }
if [ "$(zeros magnitude)" -gt 50000 ] && [ "$(zeros qat)" = "$(zeros magnitude)" ]; then pass "zeros stay through distill and qat"; else fail "zeros stay through distill and qat"; fi
for folder in 2-student 4-magnitude 7-quantize; do
    check "roberta reads $folder" 0 "$roberta" --model "$work/stages/$folder" --dev "$work/stages/test.tsv" --method eval
done
breaks() {                                                            # FOLDER LINES SIGNAL STATUS OPTIONS...
    folder=$1 least=$2 signal=$3 status=$4
    shift 4
    "$pipeline" $all --out "$work/broken" "$@" > "$work/log" 2>&1 &
    pid=$! tries=0
    while kill -0 "$pid" 2> /dev/null && [ "$tries" -lt 3000 ]; do
        lines=$(grep -c '"event":"step"' "$work/broken/$folder/metrics.jsonl" 2> /dev/null)
        [ "${lines:-0}" -ge "$least" ] && break
        sleep 0.01
        tries=$((tries + 1))
    done
    kill "-$signal" "$pid" 2> /dev/null
    wait "$pid" 2> /dev/null
    got=$?
    if [ "$got" -eq "$status" ]; then pass "SIG$signal in $folder"; else fail "SIG$signal in $folder (exit status $got)"; fi
}
breaks tiny-bert 8 KILL 137 --threads 2
breaks 3-apt 10 KILL 137 --threads 1 --resume
breaks 5-distill 8 INT 130 --threads 2 --resume
says "it says how to go on" "stopped in distill after step .* --resume goes on"
check "other settings are refused" 1 "$pipeline" $all --lr 1e-4 --resume --out "$work/broken"
says "both are shown" "then: .*now: \|written with other settings"
check "the rest" 0 "$pipeline" $all --threads 1 --resume --out "$work/broken"
for folder in tiny-bert 3-apt 5-distill 7-quantize; do
    same "$folder is the same, killed or not" "$work/stages/$folder/model.safetensors" "$work/broken/$folder/model.safetensors"
done
check "pipeline on files" 0 "$pipeline" --model "$base" --train "$work/demo/train.tsv" --dev "$work/demo/dev.tsv" --limit 300 --steps 8 \
    --batch 16 --stages tune,student,distill,quantize --bits int4 --student-layers 1 --out "$work/stages-files"
has "the classes are named" "$work/stages-files/4-quantize/labels.txt"
check "a folder that is tuned needs no tuning" 0 "$pipeline" --model "$work/stages-files/1-tune" --train "$work/demo/train.tsv" \
    --dev "$work/demo/dev.tsv" --limit 300 --steps 6 --batch 16 --stages student,quantize --out "$work/stages-tuned"
says "it is what the others are compared with" "^ *--model  "

# ---- roberta: arguments
r() { "$roberta" --model "$base" --threads 2 "$@"; }
data="--train $work/demo/train.tsv --dev $work/demo/dev.tsv"
check "roberta --help" 0 "$roberta" --help
says "roberta --help names its options" "--sparsity"
check "no --model" 2 "$roberta" --train x.tsv --out y
check "unknown method" 2 r --method magic
check "training needs --train" 2 r --method apt --out "$work/x"
check "eval needs --dev" 2 r --method eval
check "a word that is no part of the model" 2 r $data --out "$work/x" --prune heads,tails
says "the message names the word" tails
check "an option out of range" 2 r $data --out "$work/x" --sparsity 1.5
says "both limits are named" "from 0 to 0.99"
check "a misspelt option" 2 r $data --out "$work/x" --spasity 0.5
says "the right one is named" "did you mean --sparsity"
check "bf16 is for frozen matrices" 2 r $data --out "$work/x" --method full --weights bf16
check "a pruning window behind the end" 1 r $data --out "$work/x" --epochs 1 --prune-begin 100000
says "the message names the option" prune-begin
check "a model without a head cannot be evaluated" 1 r --method eval --task classification --dev "$work/demo/dev.tsv"
says "the message says why" "was trained for masked language modelling"
check "--out must not be the model" 2 r $data --out "$base"
check "a metric of another task" 1 r $data --out "$work/x" --metric pearson --steps 2
says "the message names the task" classification

# ---- roberta: methods (short runs)
short="--batch 16 --steps 24 --eval-every 12 --lr 1e-3 --prune-every 2"
for method in apt lora full prune-after prune-first; do
    check "method $method" 0 r $data $short --method $method --out "$work/$method"
    accuracy=$(sed -n 's/^accuracy *//p' "$work/log")
    has "$method: metrics.jsonl" "$work/$method/metrics.jsonl"
    has "$method: report.html" "$work/$method/report.html"
    check "$method: the result loads again" 0 "$roberta" --model "$work/$method" --dev "$work/demo/dev.tsv" --method eval
    says "$method: and scores the same" "accuracy *$accuracy"
done
check "an earlier result is not replaced unasked" 2 r $data $short --out "$work/apt"
check "--overwrite replaces it" 0 r $data $short --method apt --overwrite --out "$work/apt"
check "prune-after in a single step" 0 r $data --method prune-after --steps 1 --batch 8 --observe 2 --out "$work/one"
if grep -q "^prunable left *[34]" "$work/log"; then pass "prunes all the same"; else fail "prunes all the same"; fi
check "a pruned model can be pruned further" 0 "$roberta" --model "$work/apt" $data $short --sparsity 0.5 --out "$work/apt2"
check "bf16 weights" 0 r $data $short --method lora --weights bf16 --out "$work/bf16"
check "f16 weights" 0 r $data $short --method lora --weights f16 --out "$work/f16"
check "activations computed again" 0 r $data $short --method apt --recompute --out "$work/recompute"
same "change no byte" "$work/recompute/model.safetensors" "$work/apt/model.safetensors"
for kind in int8 int4; do
    check "$kind weights in the result" 0 r $data $short --quantize $kind --out "$work/$kind"
    says_file "config.json says so" "$work/$kind/config.json" "\"quantization\": \"$kind\""
    check "which loads again" 0 "$roberta" --model "$work/$kind" --dev "$work/demo/dev.tsv" --method eval
done
[ "$(wc -c < "$work/int4/model.safetensors")" -lt "$(wc -c < "$work/int8/model.safetensors")" ] && pass "int4 is smaller" || fail "int4 is smaller"
check "but cannot be trained" 1 "$roberta" --model "$work/int8" $data $short --out "$work/int8-again"
says "and says why" "quantised (int8)"
check "nor quantised once more" 1 "$roberta" --model "$work/int8" --dev "$work/demo/dev.tsv" --method eval --quantize int4
says "which is said, too" "quantised (int8)"
quantised "$roberta" "$work/lora" eval --dev "$work/demo/dev.tsv"
check "an unknown kind" 2 r $data --quantize int5 --out "$work/x"
check "a device that the program was not built for" 2 r $data --device cuda --out "$work/x"
says "how to get it is named" "make cuda"
check "products in bfloat16 on the CPU" 2 r $data --math bf16 --out "$work/x"
says "they need a device" "go with --device cuda"
check "trained with its integers" 0 r $data $short --quantize int4 --qat --quantize-begin 4 --out "$work/qat"
accuracy=$(sed -n 's/^accuracy *//p' "$work/log")
says_file "config.json says int4" "$work/qat/config.json" "\"quantization\": \"int4\""
check "the result loads again" 0 "$roberta" --model "$work/qat" --dev "$work/demo/dev.tsv" --method eval
says "and scores what training said" "accuracy *$accuracy"
check "--qat without a kind" 2 r $data --qat --out "$work/x"
says "needs one" "qat needs --quantize"
check "--quantize-begin without --qat" 2 r $data --quantize int8 --quantize-begin 3 --out "$work/x"
check "accumulation, length groups, preset, linear schedule" 0 r $data --steps 8 --accumulate 3 --group-by-length --preset glue-small \
    --schedule linear --no-grow --no-distill --lr-schedule cosine --warmup 2 --out "$work/options"
check "predictions" 0 "$roberta" --model "$work/apt" --method predict --predict "$work/demo/test.tsv" --out "$work/predicted"
if [ "$(wc -l < "$work/predicted/predictions.tsv")" -eq "$(wc -l < "$work/demo/test.tsv")" ]; then pass "one prediction a row"; else fail "one prediction a row"; fi

# ---- roberta: other tasks, on the same words
awk -F'\t' 'BEGIN { print "sentence1\tsentence2\tscore" } NR > 1 && NR < 202 { print $1 "\t" $1 "\t" length($1) / 40 }' "$work/demo/train.tsv" > "$work/pairs.tsv"
check "regression on pairs" 0 r --task regression --train "$work/pairs.tsv" --dev "$work/pairs.tsv" --steps 12 --batch 8 --sparsity 0.3 --out "$work/regression"
says "regression reports Pearson" pearson
says "and Spearman" spearman
printf 'stale\n' > "$work/regression/labels.txt"
printf '{}' > "$work/regression/tokenizer.json"
check "over an earlier result" 0 r --task regression --train "$work/pairs.tsv" --steps 2 --batch 8 --sparsity 0.3 --overwrite --out "$work/regression"
if [ -e "$work/regression/labels.txt" ] || [ -e "$work/regression/tokenizer.json" ]; then fail "its stale files are gone"; else pass "its stale files are gone"; fi
check "eval of a regression" 0 "$roberta" --model "$work/regression" --dev "$work/pairs.tsv" --method eval
check "not as a classifier" 1 "$roberta" --model "$work/regression" --dev "$work/demo/dev.tsv" --method eval --task classification
says "both tasks are named" "regression, not for classification"
awk 'BEGIN { print "{\"sentence\":\"the cook was kind\",\"label\":\"yes\"}"; print "{\"sentence\":\"the cook was rude\",\"label\":\"no\"}";
             print "{\"sentence\":\"the cook was not rude\",\"label\":\"perhaps\"}" }' > "$work/words.jsonl"
check "JSONL with three named classes" 0 r --train "$work/words.jsonl" --dev "$work/words.jsonl" --steps 4 --sparsity 0.2 --out "$work/words"
check "named classes survive" 0 "$roberta" --model "$work/words" --method predict --predict "$work/words.jsonl" --out "$work/words"
if grep -q -e perhaps -e yes -e no "$work/words/predictions.tsv"; then pass "predictions use the names"; else fail "predictions use the names"; fi
cat > "$work/squad.json" <<'JSON'
{"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "the old cook met the kind baker who knew the famous judge", "qas": [
 {"id": "1", "question": "who was kind", "is_impossible": false, "answers": [{"text": "baker", "answer_start": 26}]},
 {"id": "2", "question": "who was famous", "is_impossible": false, "answers": [{"text": "judge", "answer_start": 52}]},
 {"id": "3", "question": "who was cruel", "is_impossible": true, "answers": []}]}]}]}
JSON
check "span answers" 0 r --train "$work/squad.json" --dev "$work/squad.json" --steps 20 --batch 3 --lr 2e-3 --sparsity 0.3 --max-length 40 --out "$work/span"
says "span reports exact match" exact
check "span predictions" 0 "$roberta" --model "$work/span" --method predict --predict "$work/squad.json" --max-length 40 --out "$work/span"
has "predictions.json" "$work/span/predictions.json"

# ---- interruption: killed somewhere, resumed, the same bytes at the end
long="$data --batch 16 --steps 200 --eval-every 50 --lr 1e-3 --prune-every 4 --method apt"
check "the uninterrupted run" 0 r $long --out "$work/whole"
interrupt() {                                                         # interrupt SIGNAL LINES PROGRAM ARGUMENTS...
    signal=$1 least=$2
    shift 2
    rm -rf "$work/cut"
    "$@" --out "$work/cut" > "$work/log" 2>&1 &
    pid=$! tries=0
    while kill -0 "$pid" 2> /dev/null && [ "$tries" -lt 3000 ]; do
        lines=$(grep -c '"event":"step"' "$work/cut/metrics.jsonl" 2> /dev/null)
        [ "${lines:-0}" -ge "$least" ] && break
        sleep 0.01
        tries=$((tries + 1))
    done
    kill "-$signal" "$pid" 2> /dev/null
    wait "$pid"
    got=$?
    if [ "$got" -eq 130 ]; then pass "SIG$signal near step $least ends the run cleanly"
    else fail "SIG$signal near step $least ends the run cleanly (exit status $got)"; fi
    has "a checkpoint is there" "$work/cut/checkpoint.apt"
}
interrupted="$roberta --model $base --threads 2 $long"
interrupt INT 5 $interrupted
says "and says how to go on" "--resume"
check "resuming with other settings is refused" 1 r $long --lr 1e-4 --resume --out "$work/cut"
says "and the first difference is named" learning_rate
check "resuming with other data is refused" 1 r $long --resume --train "$work/demo/dev.tsv" --out "$work/cut"
says "and both are shown" "then:"
left=checkpoint.apt.tmp
for mark in 2147483646-0 "$$-1" 2147483646 2147483646-0x; do echo half > "$work/cut/$left-$mark"; done
check "resuming" 0 r $long --resume --out "$work/cut"
if [ "$(cd "$work/cut" && ls -d $left-* | sort)" = "$(printf '%s\n' "$left-$$-1" $left-2147483646 $left-2147483646-0x | sort)" ]
then pass "what a killed run had begun to write is removed, and nothing else"
else fail "what a killed run had begun to write is removed, and nothing else"; fi
same "resumed and uninterrupted runs end the same" "$work/whole/model.safetensors" "$work/cut/model.safetensors"
interrupt TERM 80 $interrupted
check "resuming on one thread" 0 "$roberta" --model "$base" --threads 1 $long --resume --out "$work/cut"
same "the same again" "$work/whole/model.safetensors" "$work/cut/model.safetensors"
interrupt INT 120 $interrupted
printf 'X' | dd of="$work/cut/checkpoint.apt" bs=1 seek=4000 conv=notrunc 2> /dev/null
check "a damaged checkpoint is refused" 1 r $long --resume --out "$work/cut"
check "--resume without a checkpoint" 2 r $long --resume --out "$work/nothing"

# ---- bad input
# a trained classifier, one file of which is then spoilt at a time
good=$work/demo/lora
mkdir -p "$work/bad" && cp "$good"/* "$work/bad/"
bad() { "$roberta" --model "$work/bad" --dev "$work/demo/dev.tsv" --method eval; }
check "the copy is fine before" 0 bad
check "no such folder" 1 "$roberta" --model "$work/none" --dev "$work/demo/dev.tsv" --method eval
head -c 5000 "$good/model.safetensors" > "$work/bad/model.safetensors"
check "truncated safetensors" 1 bad
says "names the file" model.safetensors
: > "$work/bad/model.safetensors"
check "empty safetensors" 1 bad
cp "$good/model.safetensors" "$work/bad/"
printf '\377\377\377\177' | dd of="$work/bad/model.safetensors" bs=1 seek=$(($(wc -c < "$good/model.safetensors") - 4)) conv=notrunc 2> /dev/null
check "a weight that is not a number" 1 bad
says "names the tensor" "tensor '.*NaN"
rm "$work/bad/model.safetensors" && mkdir "$work/bad/model.safetensors"
check "a folder instead of a file" 1 bad
says "says so" "is a folder"
rmdir "$work/bad/model.safetensors"
cp "$good/model.safetensors" "$work/bad/"
sed 's/"hidden_size": *[0-9]*/"hidden_size": 64/' "$good/config.json" > "$work/bad/config.json"
check "a config that disagrees with the tensors" 1 bad
sed 's/"num_hidden_layers": *[0-9]*/"num_hidden_layers": 3/; /^  "apt": {/,/^  },/d' "$good/config.json" > "$work/bad/config.json"
check "a config with fewer layers than the file" 1 bad
says "names a tensor of the layer too many" "layer.3.*beyond the 3"
printf '{"model_type": ' > "$work/bad/config.json"
check "broken config.json" 1 bad
says "names the config" config.json
cp "$good/config.json" "$work/bad/"
printf 'one\nmore\nword\n' >> "$work/bad/vocab.txt"
check "more tokens than the embedding has" 1 bad
says "names both numbers" "64 tokens, the model's embedding 61 rows"
rm "$work/bad/vocab.txt"
check "no tokenizer" 1 bad
says "names what may be there" "merges.txt"
printf 'sentence\tlabel\nthe cook\t1\nno label here\n' > "$work/bad.tsv"
check "a row without a label" 1 r --train "$work/bad.tsv" --out "$work/x"
says "names file and line" "bad.tsv:3"
: > "$work/empty.tsv"
check "an empty file" 1 r --train "$work/empty.tsv" --out "$work/x"
check "a folder instead of a data file" 1 r --train "$work/demo" --out "$work/x"
printf 'sentence\tlabel\nthe cook\twas\t1\n' > "$work/many.tsv"
check "a row with too many columns" 1 r --train "$work/many.tsv" --out "$work/x"
says "names line, expected and found" "many.tsv:2: expected at most the 2 columns of the header line, found 3"
printf 'sentence\tlabel\nthe cook\t1\nthe judge\t1\n' > "$work/single.tsv"
check "a single class" 1 r --train "$work/single.tsv" --out "$work/x"
says "names it" 'found only "1"'
printf '\357\273\277sentence\tlabel\r\nthe cook was kind\t1\r\nthe cook was rude\t0\r\n' > "$work/windows.tsv"
check "a BOM and CR LF" 0 r --train "$work/windows.tsv" --steps 2 --sparsity 0.1 --out "$work/windows"
if [ "$(cat "$work/windows/labels.txt")" = "0
1" ]; then pass "are no part of the labels"; else fail "are no part of the labels"; fi
[ -e "$work/x" ] && fail "bad input writes nothing" || pass "bad input writes nothing"

# ---- a disk that fills up: the limit makes every longer write fail
cp -r "$work/apt" "$work/kept"
full() {                                                              # full BLOCKS ARGUMENTS...
    trap '' XFSZ
    ulimit -S -f "$1"
    shift
    exec "$roberta" --model "$base" --threads 2 $data $short --method apt --overwrite "$@"
}
check "no room for the result" 1 eval '(full 600 --retry-minutes 0 --out "$work/kept")'
says "the reason is the file, not what followed from it" "cannot write '.*model.safetensors'"
same "the earlier result is still there" "$work/apt/model.safetensors" "$work/kept/model.safetensors"
check "no room for a checkpoint" 1 eval '(full 600 --retry-minutes 0 --checkpoint-every 4 --out "$work/full")'
says "names the checkpoint" "cannot write '.*checkpoint.apt'"

# waits TIMES: until the program $pid has said so often that it waits for room
waits() {
    tries=0
    until [ "$(grep -c "Nothing is lost yet" "$work/log")" -ge "$1" ] || [ "$tries" -ge 3000 ]; do
        kill -0 "$pid" 2> /dev/null || break
        sleep 0.01
        tries=$((tries + 1))
    done
}
ends() { wait "$pid"; got=$?; if [ "$got" -eq "$2" ]; then pass "$1"; else fail "$1 (exit status $got, expected $2)"; fi; }
full 600 --checkpoint-every 4 --out "$work/full" > "$work/log" 2>&1 &
pid=$!
waits 1
kill -INT "$pid"
ends "Ctrl-C while there is no room gives up" 1
says "and names what could not be written" "cannot write '.*checkpoint.apt'"
lifts() { sleep 1 & prlimit --pid $! --fsize=1000000: 2> /dev/null; }   # can the limit of another process be changed here?
if lifts; then
    full 1 --out "$work/room" > "$work/log" 2>&1 &
    pid=$!
    waits 1
    says "no room for a line of the log" "metrics.jsonl: cannot be written"
    prlimit --pid "$pid" --fsize=307200:
    waits 2
    says "no room for the result, and the run waits" "cannot write '.*model.safetensors'"
    prlimit --pid "$pid" --fsize=unlimited:
    ends "once there is room the run goes on" 0
    same "to the same result" "$work/apt/model.safetensors" "$work/room/model.safetensors"
    if [ "$(cut -d, -f1-2 "$work/room/metrics.jsonl")" = "$(cut -d, -f1-2 "$work/apt/metrics.jsonl")" ]; then pass "and the same log"
    else fail "and the same log"; fi
else
    skip "waiting for room (prlimit is missing or may not change limits)"
fi
check "--out is a file" 1 r $data $short --out "$work/bad.tsv"
says "says that it is no folder" "not a folder"
printf 'sentence\tlabel\nthe cook\t7\n' > "$work/seven.tsv"
check "a label that training never saw" 1 r --train "$work/demo/train.tsv" --dev "$work/seven.tsv" --out "$work/x"
says "names the label" 7

# ---- a real checkpoint, where there is one
if [ -d "$shared/models/minilm" ] && [ -d "$shared/data/sst2" ]; then
    head -n 300 "$shared/data/sst2/dev.tsv" > "$work/sst2.tsv"
    check "MiniLM on SST-2 for a few steps" 0 "$roberta" --model "$shared/models/minilm" --train "$work/sst2.tsv" --dev "$work/sst2.tsv" \
        --steps 6 --batch 8 --eval-every 6 --prune-every 1 --out "$work/minilm"
    check "the smaller MiniLM loads again" 0 "$roberta" --model "$work/minilm" --dev "$work/sst2.tsv" --method eval
else
    skip "MiniLM on SST-2 ($shared/models/minilm is not here)"
fi

# ---- llama: a random checkpoint of llama2.c with a tokenizer of letters, both written as octal escapes for printf
octets='function byte(b) { printf "\\%03o", b }
        function word(n) { byte(n % 256); byte(int(n / 256) % 256); byte(int(n / 65536) % 256); byte(int(n / 16777216) % 256) }
        function text(s,  i) { for (i = 1; i <= length(s); i++) byte(index(ascii, substr(s, i, 1)) + 31) }
        function token(s) { word(0); word(length(s)); text(s) }
        function marked(s) { word(0); word(length(s) + 2); byte(10); text(s); byte(10) }
        function some(n) { while (n-- > 0) { byte(int(256 * rand())); byte(int(256 * rand())); byte(int(128 * rand()));
                                             byte(rand() < 0.5 ? 61 : 189) } }
        function ones(n) { while (n-- > 0) word(1065353216) }
        BEGIN { srand(5); for (i = 32; i < 127; i++) ascii = ascii sprintf("%c", i) }'
tokens='function all(letters) { word(6); token("<unk>"); marked("<s>"); marked("</s>");
                                for (i = 0; i < 256; i++) token(sprintf("<0x%02X>", i));
                                for (i = 1; i <= length(letters); i++) token(substr(letters, i, 1)) }'
printf "$(LC_ALL=C awk "$octets $tokens"' BEGIN { all(" .abcdefghijklmnopqrstuvwxyz") }')" > "$work/letters.bin"
printf "$(LC_ALL=C awk "$octets $tokens"' BEGIN { all(" .abcdefghijklmnopqrstuvwxy") }')" > "$work/fewer.bin"
printf "$(LC_ALL=C awk "$octets"' BEGIN {
    split("32 48 2 4 2 287 512", size, " ")
    for (i = 1; i <= 7; i++) word(size[i])
    some(287 * 32); ones(2 * 32); some(2 * (32 + 16 + 16 + 32) * 32); ones(2 * 32); some(2 * 3 * 48 * 32); ones(32); ones(512 * 8) }')" > "$work/random.bin"
tiny=$work/tiny-llama
l() { "$llama" --model "$tiny" --threads 2 "$@"; }
imports() { check "$1" "$2" "$llama" --import "$3" --tokenizer "$4" --out "${5:-$work/x}"; }
check "llama --help" 0 "$llama" --help
says "llama --help names its options" "--top-p"
imports "a checkpoint of llama2.c" 0 "$work/random.bin" "$work/letters.bin" "$tiny"
for file in config.json model.safetensors tokenizer.bin; do has "becomes a folder: $file" "$tiny/$file"; done
imports "which is not replaced unasked" 2 "$work/random.bin" "$work/letters.bin" "$tiny"
imports "a tokenizer of another size" 1 "$work/random.bin" "$work/fewer.bin"
says "both sizes are named" "has 286 tokens, .* needs 287"
imports "a tokenizer of another kind" 1 "$work/random.bin" "$work/words.jsonl"
head -c 9000 "$work/random.bin" > "$work/short.bin"
imports "a truncated checkpoint" 1 "$work/short.bin" "$work/letters.bin"
says "expected and found bytes are named" "found 9000"
head -c 20 "$work/random.bin" > "$work/short.bin"
imports "less than a header" 1 "$work/short.bin" "$work/letters.bin"
cp "$work/random.bin" "$work/long.bin" && printf 'more' >> "$work/long.bin"
imports "bytes behind the end" 1 "$work/long.bin" "$work/letters.bin"
for field in dim hidden_dim n_layers n_heads n_kv_heads vocab_size seq_len; do
    at=${at:-0}
    for value in '\377\377\377\177' '\000\000\000\000' '\000\000\000\200'; do
        cp "$work/random.bin" "$work/spoilt.bin"
        printf "$value" | dd of="$work/spoilt.bin" bs=1 seek="$at" conv=notrunc 2> /dev/null
        imports "$field out of range" 1 "$work/spoilt.bin" "$work/letters.bin"
        says "names $field" "$field is"
    done
    at=$((at + 4))
done
cp "$work/random.bin" "$work/spoilt.bin" && printf '\003' | dd of="$work/spoilt.bin" bs=1 seek=16 conv=notrunc 2> /dev/null
imports "KV heads that do not divide the heads" 1 "$work/spoilt.bin" "$work/letters.bin"
says "names both" "n_heads 4, n_kv_heads 3"
cp "$work/random.bin" "$work/spoilt.bin" && printf '24ka\001' | dd of="$work/spoilt.bin" bs=1 conv=notrunc 2> /dev/null
imports "a later version of the format" 1 "$work/spoilt.bin" "$work/letters.bin"
says "names it" "version [0-9]* of llama2.c's format is not supported"
cp "$work/random.bin" "$work/spoilt.bin" && printf '\377\377\377\177' | dd of="$work/spoilt.bin" bs=1 seek=1028 conv=notrunc 2> /dev/null
imports "a weight that is not finite" 1 "$work/spoilt.bin" "$work/letters.bin"
says "names the weight" "number 250 of what becomes 'model.embed_tokens.weight' is not finite"
check "--import without a tokenizer" 2 "$llama" --import "$work/random.bin" --out "$work/x"
check "--import with a model" 2 l --import "$work/random.bin" --tokenizer "$work/letters.bin" --out "$work/x"
[ -e "$work/x" ] && fail "refused files write nothing" || pass "refused files write nothing"

# ---- llama: methods
awk 'BEGIN { split("cook judge baker wolf king girl", who, " "); split("kind rude old famous cruel", how, " ")
             for (i = 0; i < 240; i++) print "the " who[i * 7 % 6 + 1] " was " how[i * 3 % 5 + 1] " and the " who[i * 5 % 6 + 1] " met the " who[i % 6 + 1] "." }' > "$work/plain.txt"
head -n 40 "$work/plain.txt" > "$work/plain-dev.txt"
awk 'BEGIN { for (i = 0; i < 12; i++) printf "{\"instruction\": \"who was %s\", \"input\": \"\", \"output\": \"the %s\"}\n", i % 2 ? "kind" : "rude", i % 2 ? "cook" : "judge" }' > "$work/tasks.jsonl"
perplexity() { value perplexity; }
text="--train $work/plain.txt --dev $work/plain-dev.txt --length 64 --batch 8 --steps 40 --eval-every 20 --lr 1e-2"
check "llama without a model" 2 "$llama" --method generate
check "perplexity needs --dev" 2 l --method perplexity
check "training needs --out" 2 l --method lora --train "$work/plain.txt"
check "beams and a temperature" 2 l --method generate --beams 2 --temperature 1
check "llama is not for encoders" 1 "$llama" --model "$base" --method generate
says "and says which program is" roberta
check "perplexity of the random model" 0 l --method perplexity --dev "$work/plain-dev.txt" --length 64
random=$(perplexity)
says "and per byte" "per byte"
check "perplexity on one thread" 0 "$llama" --model "$tiny" --threads 1 --method perplexity --dev "$work/plain-dev.txt" --length 64
if [ "$(perplexity)" = "$random" ]; then pass "is the same"; else fail "is the same"; fi
for method in full lora apt prune-first prune-after; do
    check "llama: method $method" 0 l $text --method $method --out "$work/llama-$method"
    reached=$(perplexity) left=$(sed -n 's/^prunable left *//p' "$work/log" | tr -d ' %')
    has "$method: metrics.jsonl" "$work/llama-$method/metrics.jsonl"
    has "$method: report.html" "$work/llama-$method/report.html"
    check "$method: the result loads again" 0 "$llama" --model "$work/llama-$method" --method perplexity --dev "$work/plain-dev.txt" --length 64
    if [ "$(perplexity)" = "$reached" ]; then pass "$method: and measures the same"; else fail "$method: and measures the same"; fi
    case $method in
    full) below "$method: it has learned" "$reached" "$(awk -v a="$random" 'BEGIN { print a / 10 }')" ;;
    prune-first) below "$method: 30 % are gone" "$left" 70.5 ;;
    apt | prune-after) below "$method: 60 % are gone" "$left" 42 ;;
    esac
done
says_file "adapter ranks are counted per layer" "$work/llama-lora/metrics.jsonl" '"ranks":\[24,24\]'
below "full tuning is better than adapters" "$(sed -n 's/.*"perplexity":"\([0-9.]*\)".*/\1/p' "$work/llama-full/metrics.jsonl")" \
    "$(sed -n 's/.*"perplexity":"\([0-9.]*\)".*/\1/p' "$work/llama-lora/metrics.jsonl")"
check "an adapter on the LM head" 0 l $text --method lora --adapt query,value,head --out "$work/llama-head"
reached=$(perplexity)
check "and the result loads again" 0 "$llama" --model "$work/llama-head" --method perplexity --dev "$work/plain-dev.txt" --length 64
if [ "$(perplexity)" = "$reached" ]; then pass "and measures the same"; else fail "and measures the same"; fi
says_file "its head is tied no longer" "$work/llama-head/config.json" '"tie_word_embeddings": false'
check "instructions with answers" 0 l --train "$work/tasks.jsonl" --dev "$work/tasks.jsonl" --length 500 --batch 2 --steps 4 --method lora --out "$work/llama-tasks"
says "share rows" "12 examples packed"
check "without packing, prompts learned, bf16" 0 l --train "$work/tasks.jsonl" --length 500 --batch 2 --steps 2 --method prune-first --no-pack \
    --learn-prompt --weights bf16 --out "$work/llama-options"
check "rows that are too short for an answer" 1 l --train "$work/tasks.jsonl" --length 20 --method lora --out "$work/x"
says "names the file" "tasks.jsonl: nothing to learn"

check "llama: int4 weights in the result" 0 l $text --method apt --quantize int4 --out "$work/llama-int4"
reached=$(perplexity)
check "which loads again" 0 "$llama" --model "$work/llama-int4" --method perplexity --dev "$work/plain-dev.txt" --length 64
says "as what it is" "parameters, int4, "
if [ "$(perplexity)" = "$reached" ]; then pass "and measures the same"; else fail "and measures the same"; fi
quantised "$llama" "$work/llama-full" perplexity --dev "$work/plain-dev.txt" --length 64

# ---- llama: writing
writes() { "$llama" --model "$work/llama-full" --method generate --prompt "the cook was" --max-new 40 "$@" 2> /dev/null; }
writes --threads 2 > "$work/greedy.txt"
says_file "it goes on with the prompt" "$work/greedy.txt" "^the cook was [a-z]"
writes --threads 1 > "$work/other.txt"
same "the same on one thread" "$work/greedy.txt" "$work/other.txt"
writes --temperature 0.9 --top-k 20 --top-p 0.95 --seed 3 > "$work/drawn.txt"
writes --temperature 0.9 --top-k 20 --top-p 0.95 --seed 3 > "$work/other.txt"
same "the same seed draws the same text" "$work/drawn.txt" "$work/other.txt"
writes --temperature 0.9 --top-k 20 --top-p 0.95 --seed 4 > "$work/other.txt"
if cmp -s "$work/drawn.txt" "$work/other.txt"; then fail "another seed draws another one"; else pass "another seed draws another one"; fi
check "beams" 0 writes --beams 4 --length-penalty 0.8
says "go on with the prompt, too" "^the cook was .*[a-z]"
check "the pruned model writes" 0 "$llama" --model "$work/llama-apt" --method generate --prompt "the wolf" --max-new 10
check "so does the int4 one" 0 "$llama" --model "$work/llama-int4" --method generate --prompt "the wolf" --max-new 10
says "behind its prompt" "^the wolf."
check "and one that is quantised on the way" 0 writes --quantize int8
says "behind its prompt" "^the cook was [a-z]"
check "a prompt that fills the model" 1 l --method generate --prompt "$(awk 'BEGIN { for (i = 0; i < 600; i++) printf "a" }')"
says "both numbers are named" "has 60[0-9] tokens, the model 512 positions"
printf 'who was kind\n\nwho was rude\n' > "$work/turns.txt"
chats() { "$llama" --model "$work/llama-tasks" --method chat --max-new 20 < "$work/turns.txt"; }
check "a conversation" 0 chats
if [ "$(grep -c 'tokens/s' "$work/log")" -eq 2 ]; then pass "answers every line"; else fail "answers every line"; fi

# ---- llama: the golden Qwen2 and LLaMA 3, with byte-level tokenizers in the form of each family (39 tokens)
for kind in qwen2 llama3-rope; do
    folder=$work/$kind
    family=LLaMA
    [ $kind = qwen2 ] && family=Qwen2
    mkdir "$folder" && cp tests/golden/$kind/config.json tests/golden/$kind/model.safetensors tests/golden/$kind/tokenizer.json "$folder/"
    check "$kind: perplexity of random weights" 0 "$llama" --model "$folder" --method perplexity --dev "$work/plain-dev.txt" --length 48
    says "$kind: is shown as $family" ": $family, [0-9]* layers"
    before=$(perplexity)
    check "$kind: a short LoRA run" 0 "$llama" --model "$folder" --train "$work/plain.txt" --dev "$work/plain-dev.txt" --length 48 --batch 8 \
        --steps 30 --lr 1e-2 --method lora --out "$folder-lora"
    reached=$(perplexity)
    below "$kind: it has learned" "$reached" "$(awk -v a="$before" 'BEGIN { print a / 2 }')"
    check "$kind: the result loads again" 0 "$llama" --model "$folder-lora" --method perplexity --dev "$work/plain-dev.txt" --length 48
    if [ "$(perplexity)" = "$reached" ]; then pass "$kind: and measures the same"; else fail "$kind: and measures the same"; fi
    check "$kind: it writes" 0 "$llama" --model "$folder-lora" --method generate --prompt "the cook was" --max-new 20
    says "$kind: behind its prompt" "^the cook was."
done

# ---- llama: interrupted, resumed, the same bytes at the end
tuned="$text --steps 120 --prune-every 4 --method apt"
check "the uninterrupted run" 0 l $tuned --out "$work/llama-whole"
interrupt INT 30 "$llama" --model "$tiny" --threads 2 $tuned
check "resuming with another text is refused" 1 l $tuned --train "$work/plain-dev.txt" --resume --out "$work/cut"
check "resuming on one thread" 0 "$llama" --model "$tiny" --threads 1 $tuned --resume --out "$work/cut"
same "resumed and uninterrupted runs end the same" "$work/llama-whole/model.safetensors" "$work/cut/model.safetensors"

# ---- llama: a real checkpoint, where there is one
if [ -d "$shared/data/stories260K" ]; then
    imports "stories260K" 0 "$shared/data/stories260K/stories260K.bin" "$shared/data/stories260K/tok512.bin" "$work/stories"
    check "it tells its story" 0 "$llama" --model "$work/stories" --method generate --prompt "Once upon a time" --max-new 80
    says "the one that llama2.c tells" "^Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    printf 'Once upon a time, there was a little boy named Tim. Tim had a big red ball. He liked to play with his ball in the park. One day, Tim saw a dog. The dog was sad. Tim said, "Do you want to play with me?" The dog was happy and they played all day.\n' > "$work/story.txt"
    check "simple English" 0 "$llama" --model "$work/stories" --method perplexity --dev "$work/story.txt"
    below "surprises it little" "$(perplexity)" 8
    check "one-shot pruning and tuning" 0 "$llama" --model "$work/stories" --train "$work/story.txt" --dev "$work/story.txt" --method prune-first \
        --length 64 --batch 2 --observe 4 --steps 6 --out "$work/stories-small"
    check "the smaller one writes" 0 "$llama" --model "$work/stories-small" --method generate --prompt "Once upon a time" --max-new 20
else
    skip "stories260K ($shared/data/stories260K is not here)"
fi

# ---- t5: from nothing, with a tokenizer of 265 tokens, on made-up restaurants; two sources have two targets each
unigram=tests/golden/tokenizer/unigram.json
awk 'BEGIN { print "mr,ref"; split("Wolf Dwarf King Forest Daughter", who, " "); split("cheap dear", how, " ")
             for (i = 1; i <= 5; i++) for (k = 1; k <= 2; k++)
                 printf "\"name[%s], price[%s]\",\"The %s is %s.\"\n", who[i], how[k], who[i], how[k]
             for (k = 1; k <= 2; k++) printf "\"name[Wolf], price[%s]\",\"It is %s, the \"\"Wolf\"\".\"\n", how[k], how[k] }' > "$work/food.csv"
head -n 5 "$work/food.csv" > "$work/food-dev.csv"
tail -n 2 "$work/food.csv" >> "$work/food-dev.csv"
t() { "$t5" --threads 2 "$@"; }
food="--train $work/food.csv --dev $work/food-dev.csv --batch 12 --max-new 24 --eval-every 1000"
check "t5 --help" 0 "$t5" --help
says "t5 --help names its options" "--init"
check "neither a model nor a shape" 2 t --method eval --dev "$work/food-dev.csv"
check "a model and a shape" 2 t --model "$base" --init tiny --tokenizer "$unigram" $food --out "$work/x"
check "a shape without a tokenizer" 2 t --init tiny $food --out "$work/x"
check "a shape is for training" 2 t --init tiny --tokenizer "$unigram" --method generate
check "eval needs --dev" 2 t --model "$base" --method eval
check "a source without a target" 2 t --init tiny --tokenizer "$unigram" $food --source mr --out "$work/x"
check "t5 is not for encoders" 1 t --model "$base" --method generate --prompt x
says "and says which program is" "roberta is"
check "a tokenizer without a padding token" 1 t --init tiny --tokenizer tests/golden/tokenizer/metaspace.json $food --out "$work/x"
says "names what is missing" "metaspace.json: the tokenizer has no token for padding"
check "one that does not end its texts" 1 t --init tiny --tokenizer tests/golden/tokenizer/llama3.json $food --out "$work/x"
says "is refused, too" "llama3.json: the tokenizer does not put the end token"
check "a column that is not there" 1 t --init tiny --tokenizer "$unigram" $food --source mr --target text --out "$work/x"
says "names those that are" 'food.csv:1: expected a column "text", found "mr", "ref"'
[ -e "$work/x" ] && fail "bad input writes nothing" || pass "bad input writes nothing"
check "a T5 from nothing" 0 t --init tiny --tokenizer "$unigram" $food --method full --lr 2e-3 --steps 60 --out "$work/t5"
says "equal sources are grouped" "train *12 pairs, 10 sources"
exact=$(value "exact match")
says_file "its metrics are logged" "$work/t5/metrics.jsonl" '"event":"result".*"ROUGE-2".*"BLEU".*"exact match"'
has "its report" "$work/t5/report.html"
same "its tokenizer is the one given" "$unigram" "$work/t5/tokenizer.json"
check "it loads again" 0 t --model "$work/t5" --method eval --dev "$work/food-dev.csv" --max-new 24
if [ "$(value "exact match")" = "$exact" ]; then pass "and writes the same"; else fail "and writes the same"; fi
below "it has learned its rows" 0.5 "$(value ROUGE-L | awk '{ print $1 / 100 }')"
loss=$(value loss)
check "beams, two texts only" 0 t --model "$work/t5" --method eval --dev "$work/food-dev.csv" --max-new 24 --beams 2 --texts 2
if [ "$(value loss)" = "$loss" ]; then pass "leave the loss alone"; else fail "leave the loss alone"; fi
for method in lora apt; do
    check "t5: method $method" 0 t --model "$work/t5" $food --method $method --steps 5 --prune-every 1 --out "$work/t5-$method"
    says "t5: $method shows its memory" "memory for a step below"
    left=$(sed -n 's/^prunable left *//p' "$work/log" | tr -d ' %') rouge=$(value ROUGE-L)
    check "t5: $method: the result loads again" 0 t --model "$work/t5-$method" --method eval --dev "$work/food-dev.csv" --max-new 24
    if [ "$(value ROUGE-L)" = "$rouge" ]; then pass "t5: $method: and measures the same"; else fail "t5: $method: and measures the same"; fi
done
below "apt: 60 % are gone" "$left" 42
check "t5: int8 weights in the result" 0 t --model "$work/t5" $food --method lora --steps 5 --quantize int8 --out "$work/t5-int8"
rouge=$(value ROUGE-L)
check "which loads again" 0 t --model "$work/t5-int8" --method eval --dev "$work/food-dev.csv" --max-new 24
says "as what it is" "parameters, int8, "
if [ "$(value ROUGE-L)" = "$rouge" ]; then pass "and measures the same"; else fail "and measures the same"; fi
check "and writes" 0 t --model "$work/t5-int8" --method generate --max-new 24 --prompt "name[King], price[dear]"
quantised "$t5" "$work/t5" eval --dev "$work/food-dev.csv" --max-new 24
writes() { "$t5" --model "$work/t5" --method generate --max-new 24 "$@" 2> /dev/null; }
writes --threads 2 --prompt "name[King], price[dear]" > "$work/greedy.txt"
says_file "it writes a sentence" "$work/greedy.txt" "[a-z]"
writes --threads 1 --prefix "name[King], " --prompt "price[dear]" > "$work/other.txt"
same "the same on one thread, prefix apart" "$work/greedy.txt" "$work/other.txt"
printf 'name[King], price[dear]\n\nname[Wolf], price[cheap]\n' | writes > "$work/other.txt"
if [ "$(wc -l < "$work/other.txt")" -eq 2 ] && [ "$(head -n 1 "$work/other.txt")" = "$(cat "$work/greedy.txt")" ]
then pass "and one for every line of stdin"; else fail "and one for every line of stdin"; fi
tuned="--train $work/food.csv --dev $work/food-dev.csv --max-new 4 --texts 1 --batch 4 --steps 12 --eval-every 6 --prune-every 2 --method apt"
check "the uninterrupted run" 0 t --model "$work/t5" $tuned --out "$work/t5-whole"
says_file "evaluations are logged" "$work/t5-whole/metrics.jsonl" '"event":"evaluate".*"ROUGE-2".*"BLEU".*"dev_loss"'
interrupt INT 3 "$t5" --model "$work/t5" --threads 2 $tuned
check "resuming with other data is refused" 1 t --model "$work/t5" $tuned --train "$work/food-dev.csv" --resume --out "$work/cut"
check "resuming on one thread" 0 "$t5" --model "$work/t5" --threads 1 $tuned --resume --out "$work/cut"
same "resumed and uninterrupted runs end the same" "$work/t5-whole/model.safetensors" "$work/cut/model.safetensors"

echo "examples: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
