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
    /* the command line: run is what every training example has, t2t a part of the rest */
    ex_options run;
    ex_t2t t2t;
    const char *model, *tokenizer, *out, *prompt;
    int32_t method, init;
    int64_t limit;
    ex_arg *table;
    /* what it becomes */
    const char *from;                 /* --model or --tokenizer: where the tokenizer is */
    ex_t2t_file train, dev;
    apt_ctx *ctx;
    apt_model *loaded;
    ex_error error;
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
        EX_TEXT("model", "DIR", &a->model, "checkpoint folder: config.json, safetensors, tokenizer"),
        EX_CHOICE("init", &a->init, EX_T2T_SHAPES, "instead: a random model of that shape; needs --tokenizer"),
        EX_TEXT("tokenizer", "PATH", &a->tokenizer, "its tokenizer: a folder, or a tokenizer.json"),
        EX_TEXT("train", "FILE", &a->train.path, ".tsv, .csv, .jsonl, .json: sources with targets"),
        EX_TEXT("dev", "FILE", &a->dev.path, "the same, to evaluate on"),
        EX_TEXT("out", "DIR", &a->out, "result folder"),
        EX_INT("limit", "N", &a->limit, 0, 1e12, "training pairs to read; 0: all"),
        EX_TEXT("source", "NAME", &a->t2t.source, "column of the source (\"#1\": by number); default: a usual name"),
        EX_TEXT("target", "NAME", &a->t2t.target, "column of the target"),
        EX_FLAG("no-header", &a->t2t.no_header, "TSV, CSV: the first line is data"),
        EX_TEXT("prefix", "TEXT", &a->t2t.prefix, "put before each source, \"summarize: \" and such"),
        EX_INT("max-source", "N", &a->t2t.max_source, 2, 1e5, "tokens of a source at most"),
        EX_INT("max-target", "N", &a->t2t.max_target, 2, 1e5, "tokens of a target at most"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &a->method, EX_METHODS "|eval|generate",
                  "prune-first: one-shot prune, then LoRA; prune-after: the prune comes in between"),
        EX_CHOICE("metric", &a->t2t.metric, EX_T2T_METRICS, "what the best evaluation is"),
        EX_INT("texts", "N", &a->t2t.texts, 0, 1e12, "sources that an evaluation writes texts for; 0: all of --dev"),
        EX_OPTIONS_ROWS(&a->run),
        EX_GROUP("Writing, for evaluations, too"),
        EX_TEXT("prompt", "TEXT", &a->prompt, "generate: the source; default: every line of stdin is one"),
        EX_SAMPLING_ROWS(&a->t2t.how),
        EX_ARGS_END};
    ex_arg *table = (ex_arg *)ex_alloc(sizeof(rows) / sizeof(rows[0]), sizeof(ex_arg));
    memcpy(table, rows, sizeof(rows));
    return table;
}

static void set_defaults(app *a)
{
    ex_options_init(&a->run);
    ex_sampling_init(&a->t2t.how, 128);
    a->t2t.max_source = 512;
    a->t2t.max_target = 128;
    a->t2t.lm.error = &a->error;
}

static bool training(const app *a)
{
    return a->method < EX_METHODS_SHARED;
}

/* One of --model and --init with --tokenizer. */
static bool check_start(app *a)
{
    a->from = a->init != 0 ? a->tokenizer : a->model;
    if (a->model != NULL && a->init != 0) return ex_fail(&a->error, "--model and --init exclude each other");
    if (a->model == NULL && a->init == 0) return ex_fail(&a->error, "--model DIR is missing (or --init with --tokenizer)");
    if (a->init != 0 && a->tokenizer == NULL) return ex_fail(&a->error, "--init needs --tokenizer PATH");
    if (a->init == 0 && a->tokenizer != NULL)
        return ex_fail(&a->error, "--tokenizer goes with --init; a --model folder has its own");
    return a->init == 0 || training(a) ||
           ex_fail(&a->error, "--init goes with a training method, not with %s", g_methods[a->method]);
}

/* What the table cannot check: which options belong together. */
static bool check_options(app *a)
{
    const char *method = g_methods[a->method];
    if (!check_start(a) || !ex_sampling_check(&a->t2t.how, &a->error)) return false;
    if ((a->t2t.source == NULL) != (a->t2t.target == NULL)) return ex_fail(&a->error, "--source and --target go together");
    if (a->method == METHOD_EVAL && a->dev.path == NULL) return ex_fail(&a->error, "--method eval needs --dev FILE");
    if (!training(a)) return !a->run.resume || ex_fail(&a->error, "--resume goes with a training method, not with %s", method);
    if (a->train.path == NULL || a->out == NULL)
        return ex_fail(&a->error, "--method %s needs --train FILE and --out DIR", method);
    if (a->run.weights == 1 && (a->method == EX_METHOD_FULL || a->init != 0))
        return ex_fail(&a->error, "--weights bf16 is for frozen matrices of a --model; %s has none",
                       a->init != 0 ? "--init" : "--method full");
    return ex_options_check(&a->run, &a->error) && ex_options_check_out(&a->run, a->from, a->out, &a->error);
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
    ex_program p;
    memset(&p, 0, sizeof(p));
    p.method = g_methods[a->method];
    p.kind = a->method;
    p.options = &a->run;
    p.arguments = a->table;
    p.model = a->from;
    p.train = a->train.path;
    p.out = a->out;
    p.rows = ex_t2t_source(set);
    p.rows_name = "pairs";
    p.longest = set->source.longest;
    p.longest_target = set->target.longest;
    p.sequences = 1;
    char *data = ex_format("train %s (%lld pairs, %lld tokens to %lld), dev %s, metric %d", a->train.path,
                           (long long)set->source.count, (long long)set->source.starts[set->source.count],
                           (long long)set->target.starts[set->target.count], a->dev.path != NULL ? a->dev.path : "none",
                           (int)a->t2t.metric);
    p.data = data;
    p.ctx = a->ctx;
    p.loaded = a->loaded;
    p.evaluate = a->dev.path != NULL ? evaluate : NULL;
    p.user = a;
    p.error = &a->error;
    const int status = ex_program_train(&p);
    free(data);
    return status;
}

static bool measure(app *a)
{
    ex_scores scores;
    ex_score_info info;
    if (!evaluate(a, a->ctx, a->loaded, &scores, &info)) return false;
    ex_scores_print(&scores, &info);
    return true;
}

static bool answer(void *user, const char *source)
{
    app *a = (app *)user;
    return ex_t2t_answer(&a->t2t, a->ctx, a->loaded, source);
}

static bool load_model(app *a)
{
    if (a->init != 0) return ex_t2t_create(&a->t2t, a->ctx, a->init, a->tokenizer, (uint64_t)a->run.seed, &a->loaded);
    return ex_lm_load(&a->t2t.lm, a->ctx, a->model, APT_T5, &a->run, a->method == METHOD_GENERATE ? stderr : stdout, &a->loaded);
}

static int work(app *a)
{
    if (!load_model(a)) return 1;
    if (a->method == METHOD_GENERATE) return (a->prompt != NULL ? answer(a, a->prompt) : ex_lm_lines(answer, a)) ? 0 : 1;
    if (training(a) && !ex_t2t_read(&a->t2t, &a->train, "train", a->from, a->limit)) return 1;
    if (!ex_t2t_read(&a->t2t, &a->dev, "dev", a->from, 0)) return 1;
    return training(a) ? train(a) : measure(a) ? 0 : 1;
}

static void app_free(app *a)
{
    ex_t2t_file_free(&a->train);
    ex_t2t_file_free(&a->dev);
    ex_tokenizer_free(a->t2t.lm.tokenizer);
    apt_destroy(a->ctx);
    free(a->table);
}

int main(int argc, char **argv)
{
    app a;
    memset(&a, 0, sizeof(a));
    set_defaults(&a);
    a.table = make_table(&a);
    const ex_args_result parsed = ex_args_parse(a.table, &g_about, argc, argv, &a.error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    if (parsed == EX_ARGS_OK) {
        ex_options_preset(&a.run, a.table);
        if (check_options(&a)) {
            a.t2t.how.seed = a.run.seed;
            a.ctx = ex_run_context(a.run.threads, a.run.kernels, &a.error);
            status = a.ctx != NULL ? work(&a) : 1;
        }
    }
    if (status == 1 || status == 2) fprintf(stderr, "t5: %s\n%s", a.error.text, status == 2 ? "Try --help.\n" : "");
    app_free(&a);
    return status;
}
