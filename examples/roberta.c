/* roberta.c - fine-tunes, prunes and shrinks any Hugging Face BERT or RoBERTa checkpoint folder on the CPU.

       cc -O2 -std=c11 examples/roberta.c -o roberta -lm -lpthread -lutf8proc

       roberta --model DIR --train train.tsv --dev dev.tsv --method apt --sparsity 0.6 --out DIR
       roberta --model DIR --dev dev.tsv --method eval
       roberta --help

   Classification and regression read TSV or JSONL with one or two sentences a row, span answers SQuAD v1/v2 JSON. The result
   folder is a smaller checkpoint (config.json, model.safetensors, tokenizer) that --model takes again, with metrics.jsonl and
   report.html. Ctrl-C saves; --resume goes on bit for bit. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_tokenizer.h"
#include "common/ex_data.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_task.h"

enum { METHOD_EVAL = EX_METHODS_SHARED, METHOD_PREDICT };
static const char *const g_methods[] = {"apt", "lora", "full", "prune-after", "prune-first", "eval", "predict"};

typedef struct app {
    ex_program p;                     /* what every training example has */
    ex_task task;
    int32_t kind;
    ex_task_file train, dev, predict;
} app;

/* ------------------------------------------------------------------------------------------------ arguments */

static const ex_args_about g_about = {
    "roberta", "Fine-tunes, prunes and shrinks a BERT or RoBERTa checkpoint on the CPU.",
    "--model DIR --train FILE --dev FILE --out DIR [options]",
    "  roberta --model minilm --train train.tsv --dev dev.tsv --method apt --sparsity 0.6 --epochs 2 --out small\n"
    "  roberta --model small --dev dev.tsv --method eval\n"
    "  roberta --model small --predict rows.tsv --method predict --out answers\n"
    "  roberta --model roberta-base --preset squad --train train-v1.1.json --dev dev-v1.1.json --out squad-small\n"};

/* The table points into *a, whose present values are the defaults that --help shows. */
static ex_arg *make_table(app *a)
{
    ex_task *t = &a->task;
    const ex_arg rows[] = {
        EX_GROUP("Data"),
        EX_REQUIRED(EX_TEXT("model", "DIR", &a->p.model, "checkpoint folder: config.json, safetensors, tokenizer")),
        EX_TEXT("train", "FILE", &a->train.path, "training rows: .tsv, .jsonl, or SQuAD .json"),
        EX_TEXT("dev", "FILE", &a->dev.path, "rows to evaluate on"),
        EX_TEXT("predict", "FILE", &a->predict.path, "rows to predict; written to OUT/predictions.tsv or .json"),
        EX_TEXT("out", "DIR", &a->p.out, "result folder"),
        EX_CHOICE("task", &a->kind, "auto|classification|regression|span",
                  "auto: span for .json, else what the model says, else classification"),
        EX_TEXT("text-column", "NAME", &t->text_column, "first sentence: a name of the header line, or #1, #2 ..."),
        EX_TEXT("pair-column", "NAME", &t->pair_column, "second sentence; \"\" for none"),
        EX_TEXT("label-column", "NAME", &t->label_column, "label or number"),
        EX_FLAG("no-header", &t->no_header, "the TSV has no header line; name columns by #n"),
        EX_INT("limit", "N", &a->p.limit, 0, 1e12, "training rows or questions to read; 0: all"),
        EX_INT("max-length", "N", &t->max_length, 0, 1e6, "tokens per sequence; 0: 128, span 384"),
        EX_INT("stride", "N", &t->stride, 1, 1e6, "span: tokens that neighbouring windows share"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &a->p.method, EX_METHODS "|eval|predict", "prune-after: LoRA, one-shot prune, recovery"),
        EX_CHOICE("metric", &t->metric, EX_METRICS, "what `best` means; auto: the first of the task"),
        EX_REAL("null-threshold", "X", &t->null_threshold, -1e6, 1e6, "SQuAD v2: no answer when its score leads by more"),
        EX_OPTIONS_ROWS(&a->p.options),
        EX_ARGS_END};
    return ex_program_table(rows, sizeof(rows));
}

/* What the table cannot check: which options belong together. */
static bool check_options(void *user)
{
    app *a = (app *)user;
    ex_program *p = &a->p;
    if (p->method == METHOD_EVAL && a->dev.path == NULL) return ex_fail(&p->error, "--method eval needs --dev FILE");
    if (p->method == METHOD_PREDICT && a->predict.path == NULL)
        return ex_fail(&p->error, "--method predict needs --predict FILE");
    if (a->predict.path != NULL && p->out == NULL) return ex_fail(&p->error, "--predict needs --out DIR for the predictions");
    return ex_program_check(p, a->train.path, p->model);
}

/* ------------------------------------------------------------------------------------------------ data and model */

static bool json_file(const ex_task_file *file)
{
    const size_t n = file->path != NULL ? strlen(file->path) : 0;
    return n > 5 && strcmp(file->path + n - 5, ".json") == 0;
}

static apt_task_kind choose_task(const app *a)
{
    static const apt_task_kind kinds[] = {APT_TASK_NONE, APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN};
    if (a->kind != 0) return kinds[a->kind];
    if (json_file(&a->train) || json_file(&a->dev) || json_file(&a->predict)) return APT_TASK_SPAN;
    return ex_program_trains(&a->p) ? APT_TASK_CLASSIFY : APT_TASK_NONE;
}

static bool load_model(app *a)
{
    ex_task *t = &a->task;
    const bool trains = ex_program_trains(&a->p);
    apt_load_desc load = APT_ZERO;
    load.task = trains ? t->kind : APT_TASK_NONE;                     /* else: what it was trained for */
    if (trains && t->kind == APT_TASK_CLASSIFY) load.labels = ex_labels_count(t->labels);
    if (!ex_program_load(&a->p, load, &t->config)) return false;
    const apt_task_kind found = t->config.task;
    if (found == APT_TASK_MLM || (t->kind != APT_TASK_NONE && t->kind != found))
        return ex_fail(&a->p.error, "%s was trained for %s, not for %s: train it first", a->p.model, ex_task_name(found),
                       t->kind == APT_TASK_NONE ? "a task with labels" : ex_task_name(t->kind));
    t->kind = found;
    t->tokenizer = ex_program_tokenizer(&a->p, &t->config, a->p.model);
    if (t->tokenizer != NULL) ex_program_show_model(&a->p, &t->config, a->p.model, stdout);
    return t->tokenizer != NULL;
}

/* For training rows first, since the model needs the number of classes; else the model first, since it knows the task. */
static bool load_everything(app *a)
{
    ex_task *t = &a->task;
    t->kind = choose_task(a);
    const bool trains = ex_program_trains(&a->p);
    return ex_task_read_labels(t, a->p.model) && (!trains || ex_task_read_train(t, &a->train, a->p.limit)) && load_model(a) &&
           ex_task_check_labels(t, a->p.model) && ex_task_check_metric(t) && ex_task_read(t, &a->dev, true, 0) &&
           ex_task_read(t, &a->predict, false, 0) && (!trains || ex_task_tokenise(t, &a->train, "train")) &&
           ex_task_tokenise(t, &a->dev, "dev") && ex_task_tokenise(t, &a->predict, "predict");
}

/* ------------------------------------------------------------------------------------------------ training */

static int evaluate_and_predict(app *a)
{
    ex_scores scores;
    ex_score_info info;
    if (a->dev.path != NULL) {
        if (!ex_task_evaluate(&a->task, a->p.ctx, a->p.loaded, &a->dev, &scores, &info)) return 1;
        ex_scores_print(&scores, &info);
    }
    return ex_task_predict(&a->task, a->p.ctx, a->p.loaded, &a->predict, a->p.out) ? 0 : 1;
}

static bool evaluate(void *user, apt_ctx *ctx, apt_model *model, ex_scores *scores, ex_score_info *info)
{
    app *a = (app *)user;
    apt_model_config(model, &a->task.config);
    return ex_task_evaluate(&a->task, ctx, model, &a->dev, scores, info);
}

static bool write_labels(void *user)
{
    app *a = (app *)user;
    return ex_task_write_labels(&a->task, a->p.out);
}

static bool predict(void *user, apt_ctx *ctx, apt_model *model)
{
    app *a = (app *)user;
    return ex_task_predict(&a->task, ctx, model, &a->predict, a->p.out);
}

static int train(app *a)
{
    const ex_dataset *set = &a->train.set;
    ex_training t;
    memset(&t, 0, sizeof(t));
    t.program = &a->p;
    t.train = a->train.path;
    t.dev = a->dev.path;
    t.tokenizer = a->p.model;
    t.rows = ex_dataset_source(set);
    t.rows_name = "sequences";
    t.longest = set->longest;
    t.sequences = 1;
    t.data = ex_format("%lld sequences of at most %d tokens, metric %d", (long long)set->count, (int)set->longest,
                       (int)a->task.metric);
    t.evaluate = evaluate;
    t.write = write_labels;
    t.finish = predict;
    return ex_program_train(&t);
}

/* ------------------------------------------------------------------------------------------------ main */

static int work(void *user)
{
    app *a = (app *)user;
    if (!load_everything(a)) return 1;
    return ex_program_trains(&a->p) ? train(a) : evaluate_and_predict(a);
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
    a.task.stride = 128;
    a.task.error = &a.p.error;
    a.p.table = make_table(&a);
    const int status = ex_program_main(&a.p, &g_about, argc, argv);
    ex_task_file_free(&a.train);
    ex_task_file_free(&a.dev);
    ex_task_file_free(&a.predict);
    ex_task_free(&a.task);
    ex_tokenizer_free(a.task.tokenizer);
    ex_program_free(&a.p);
    return status;
}
