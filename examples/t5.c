/* t5.c - tunes, prunes and shrinks any Hugging Face T5 checkpoint folder on the CPU, or trains a T5 from nothing: text to text.

       cc -O2 -std=c11 examples/t5.c -o t5 -lm -lpthread -lutf8proc

       t5 --model DIR --train train.tsv --dev dev.tsv --method apt --sparsity 0.6 --out DIR
       t5 --init small --tokenizer DIR --train train.csv --dev dev.csv --method full --lr 1e-3 --out DIR
       t5 --model DIR --dev dev.csv --method eval --beams 4
       t5 --model DIR --prefix "summarize: " --prompt "A long text." --method generate
       t5 --help

   Data are pairs of a source and a target: TSV, JSONL and JSON with named strings, CSV with a header line. Pairs of the same
   source are its references. The result folder is a smaller checkpoint (config.json, model.safetensors, tokenizer) that --model
   takes again, with metrics.jsonl and report.html. Ctrl-C saves; --resume goes on bit for bit. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_tokenizer.h"
#include "common/ex_data.h"
#include "common/ex_token_rows.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_lm.h"
#include "common/ex_t2t.h"

enum { METHOD_EVAL = EX_METHODS_SHARED, METHOD_GENERATE };
static const char *const g_methods[] = {"apt", "lora", "full", "prune-after", "prune-first", "eval", "generate"};

typedef struct app {
    ex_program p;                     /* what every training example has */
    ex_t2t t2t;
    const char *tokenizer, *prompt;
    int32_t init;
    const char *from;                 /* --model or --tokenizer: where the tokenizer is */
    ex_t2t_file train, dev;
} app;

/* ------------------------------------------------------------------------------------------------ arguments */

static const ex_args_about g_about = {
    "t5", "Tunes, prunes and shrinks a T5 checkpoint on the CPU, or trains one from nothing: text to text.",
    "--model DIR --train FILE --dev FILE --out DIR [options]",
    "  t5 --model base --train train.tsv --dev dev.tsv --method apt --sparsity 0.6 --out small\n"
    "  t5 --init small --tokenizer base --train train.csv --dev dev.csv --method full --lr 1e-3 --out fresh\n"
    "  t5 --model small --dev dev.tsv --method eval --beams 4\n"
    "  t5 --model small --method generate --prompt \"name[Alimentum], area[city centre]\"\n"
    "  t5 --model small --method generate < sources.txt > targets.txt\n"};

/* The table points into *a, whose present values are the defaults that --help shows. */
static ex_arg *make_table(app *a)
{
    const ex_arg rows[] = {
        EX_GROUP("Data"),
        EX_TEXT("model", "DIR", &a->p.model, "T5 folder: config.json, safetensors, tokenizer"),
        EX_CHOICE("init", &a->init, EX_T2T_SHAPES, "instead of --model: random weights in that shape; needs --tokenizer"),
        EX_TEXT("tokenizer", "PATH", &a->tokenizer, "init: a folder with a tokenizer, or a tokenizer.json"),
        EX_TEXT("train", "FILE", &a->train.path, ".tsv, .csv, .jsonl, .json: sources with targets"),
        EX_TEXT("dev", "FILE", &a->dev.path, "the same kinds, to evaluate on"),
        EX_TEXT("out", "DIR", &a->p.out, "receives the smaller model, metrics.jsonl, report.html"),
        EX_INT("limit", "N", &a->p.limit, 0, 1e12, "training pairs to read; 0: all"),
        EX_TEXT("source", "NAME", &a->t2t.source, "column of the source (\"#1\": by number); default: a usual name"),
        EX_TEXT("target", "NAME", &a->t2t.target, "column of the target"),
        EX_FLAG("no-header", &a->t2t.no_header, "TSV, CSV: the first line is data"),
        EX_TEXT("prefix", "TEXT", &a->t2t.prefix, "put before each source, \"summarize: \" and such"),
        EX_INT("max-source", "N", &a->t2t.max_source, 2, 1e5, "tokens of a source at most"),
        EX_INT("max-target", "N", &a->t2t.max_target, 2, 1e5, "tokens of a target at most"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &a->p.method, EX_METHODS "|eval|generate",
                  "apt: prune while tuning; prune-first: prune at once, then LoRA; prune-after: LoRA, prune at once, LoRA; "
                  "eval: measure --dev; generate: write the target of --prompt or of every line of stdin"),
        EX_CHOICE("metric", &a->t2t.metric, EX_T2T_METRICS, "which metric says what the best evaluation is"),
        EX_INT("texts", "N", &a->t2t.texts, 0, 1e12, "sources that an evaluation writes texts for; 0: all of --dev"),
        EX_OPTIONS_ROWS(&a->p.options),
        EX_GROUP("Writing, for evaluations, too"),
        EX_TEXT("prompt", "TEXT", &a->prompt, "generate: the source; default: every line of stdin is one"),
        EX_SAMPLING_ROWS(&a->t2t.how),
        EX_ARGS_END};
    return ex_program_table(rows, sizeof(rows));
}

/* One of --model and --init with --tokenizer. */
static bool check_start(app *a)
{
    a->from = a->init != 0 ? a->tokenizer : a->p.model;
    if (a->p.model != NULL && a->init != 0) return ex_fail(&a->p.error, "--model and --init exclude each other");
    if (a->p.model == NULL && a->init == 0) return ex_fail(&a->p.error, "--model DIR is missing (or --init with --tokenizer)");
    if (a->init != 0 && a->tokenizer == NULL) return ex_fail(&a->p.error, "--init needs --tokenizer PATH");
    if (a->init == 0 && a->tokenizer != NULL)
        return ex_fail(&a->p.error, "--tokenizer goes with --init; a --model folder has its own");
    return a->init == 0 || ex_program_trains(&a->p) ||
           ex_fail(&a->p.error, "--init goes with a training method, not with %s", g_methods[a->p.method]);
}

/* What the table cannot check: which options belong together. */
static bool check_options(void *user)
{
    app *a = (app *)user;
    ex_program *p = &a->p;
    a->t2t.how.seed = p->options.seed;
    if (!check_start(a) || !ex_sampling_check(&a->t2t.how, &p->error)) return false;
    if ((a->t2t.source == NULL) != (a->t2t.target == NULL)) return ex_fail(&p->error, "--source and --target go together");
    if (p->method == METHOD_EVAL && a->dev.path == NULL) return ex_fail(&p->error, "--method eval needs --dev FILE");
    if (a->init != 0 && p->options.weights != 0)
        return ex_fail(&p->error, "--weights is for frozen matrices of a --model; --init has none");
    return ex_program_check(p, a->train.path, a->from);
}

/* ------------------------------------------------------------------------------------------------ work */

static bool evaluate(void *user, apt_ctx *ctx, apt_model *model, ex_scores *scores, ex_score_info *info)
{
    const app *a = (const app *)user;
    return ex_t2t_evaluate(&a->t2t, ctx, model, &a->dev, scores, info);
}

static int train(app *a)
{
    const ex_t2t_set *set = &a->train.set;
    ex_training t;
    memset(&t, 0, sizeof(t));
    t.program = &a->p;
    t.train = a->train.path;
    t.dev = a->dev.path;
    t.tokenizer = a->from;
    t.rows = ex_t2t_source(set);
    t.rows_name = "pairs";
    t.longest = set->source.longest;
    t.longest_target = set->target.longest;
    t.sequences = 1;
    t.data = ex_format("%lld pairs, %lld tokens to %lld, metric %d", (long long)set->source.count,
                       (long long)set->source.starts[set->source.count], (long long)set->target.starts[set->target.count],
                       (int)a->t2t.metric);
    t.evaluate = evaluate;
    return ex_program_train(&t);
}

static bool measure(app *a)
{
    ex_scores scores;
    ex_score_info info;
    if (!evaluate(a, a->p.ctx, a->p.loaded, &scores, &info)) return false;
    ex_scores_print(&scores, &info);
    return true;
}

static bool answer(void *user, const char *source)
{
    app *a = (app *)user;
    return ex_t2t_answer(&a->t2t, a->p.ctx, a->p.loaded, source);
}

static bool load_model(app *a)
{
    if (a->init != 0) return ex_t2t_create(&a->t2t, &a->p, a->init, a->tokenizer);
    return ex_lm_load(&a->t2t.lm, &a->p, a->p.method == METHOD_GENERATE ? stderr : stdout);
}

static int work(void *user)
{
    app *a = (app *)user;
    if (!load_model(a)) return 1;
    if (a->p.method == METHOD_GENERATE) return (a->prompt != NULL ? answer(a, a->prompt) : ex_lm_lines(answer, a)) ? 0 : 1;
    if (ex_program_trains(&a->p) && !ex_t2t_read(&a->t2t, &a->train, "train", a->from, a->p.limit)) return 1;
    if (!ex_t2t_read(&a->t2t, &a->dev, "dev", a->from, 0)) return 1;
    return ex_program_trains(&a->p) ? train(a) : measure(a) ? 0 : 1;
}

int main(int argc, char **argv)
{
    app a;
    memset(&a, 0, sizeof(a));
    a.p.methods = g_methods;
    a.p.check = check_options;
    a.p.work = work;
    a.p.user = &a;
    ex_options_init(&a.p.options);
    ex_sampling_init(&a.t2t.how, 128);
    a.t2t.max_source = 512;
    a.t2t.max_target = 128;
    a.t2t.lm.error = &a.p.error;
    a.p.table = make_table(&a);
    const int status = ex_program_main(&a.p, &g_about, argc, argv);
    ex_t2t_file_free(&a.train);
    ex_t2t_file_free(&a.dev);
    ex_tokenizer_free(a.t2t.lm.tokenizer);
    ex_program_free(&a.p);
    return status;
}
