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
    /* the command line: run is what every training example has, task a part of the rest */
    ex_options run;
    ex_task task;
    const char *model, *out;
    int32_t method, kind;
    int64_t limit;
    ex_arg *table;
    /* what it becomes */
    ex_task_file train, dev, predict;
    apt_ctx *ctx;
    apt_model *loaded;
    ex_error error;
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
        EX_REQUIRED(EX_TEXT("model", "DIR", &a->model, "checkpoint folder: config.json, safetensors, tokenizer")),
        EX_TEXT("train", "FILE", &a->train.path, "training rows: .tsv, .jsonl, or SQuAD .json"),
        EX_TEXT("dev", "FILE", &a->dev.path, "rows to evaluate on"),
        EX_TEXT("predict", "FILE", &a->predict.path, "rows to predict; written to OUT/predictions.tsv or .json"),
        EX_TEXT("out", "DIR", &a->out, "result folder"),
        EX_CHOICE("task", &a->kind, "auto|classification|regression|span",
                  "auto: span for .json, else what the model says, else classification"),
        EX_TEXT("text-column", "NAME", &t->text_column, "first sentence: a name of the header line, or #1, #2 ..."),
        EX_TEXT("pair-column", "NAME", &t->pair_column, "second sentence; \"\" for none"),
        EX_TEXT("label-column", "NAME", &t->label_column, "label or number"),
        EX_FLAG("no-header", &t->no_header, "the TSV has no header line; name columns by #n"),
        EX_INT("limit", "N", &a->limit, 0, 1e12, "training rows or questions to read; 0: all"),
        EX_INT("max-length", "N", &t->max_length, 0, 1e6, "tokens per sequence; 0: 128, span 384"),
        EX_INT("stride", "N", &t->stride, 1, 1e6, "span: tokens that neighbouring windows share"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &a->method, EX_METHODS "|eval|predict", "prune-after: LoRA, one-shot prune, recovery"),
        EX_CHOICE("metric", &t->metric, EX_METRICS, "what `best` means; auto: the first of the task"),
        EX_REAL("null-threshold", "X", &t->null_threshold, -1e6, 1e6, "SQuAD v2: no answer when its score leads by more"),
        EX_OPTIONS_ROWS(&a->run),
        EX_ARGS_END};
    ex_arg *table = (ex_arg *)ex_alloc(sizeof(rows) / sizeof(rows[0]), sizeof(ex_arg));
    memcpy(table, rows, sizeof(rows));
    return table;
}

static bool training(const app *a)
{
    return a->method != METHOD_EVAL && a->method != METHOD_PREDICT;
}

/* What the table cannot check: which options belong together. */
static bool check_options(app *a)
{
    const char *method = g_methods[a->method];
    if (training(a) && (a->train.path == NULL || a->out == NULL))
        return ex_fail(&a->error, "--method %s needs --train FILE and --out DIR", method);
    if (a->method == METHOD_EVAL && a->dev.path == NULL) return ex_fail(&a->error, "--method eval needs --dev FILE");
    if (a->method == METHOD_PREDICT && a->predict.path == NULL)
        return ex_fail(&a->error, "--method predict needs --predict FILE");
    if (a->predict.path != NULL && a->out == NULL) return ex_fail(&a->error, "--predict needs --out DIR for the predictions");
    if (!training(a)) return !a->run.resume || ex_fail(&a->error, "--resume goes with a training method, not with %s", method);
    if (a->method == EX_METHOD_FULL && a->run.weights == 1)
        return ex_fail(&a->error, "--weights bf16 is for frozen matrices; --method full has none");
    return ex_options_check(&a->run, &a->error) && ex_options_check_out(&a->run, a->model, a->out, &a->error);
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
    return training(a) ? APT_TASK_CLASSIFY : APT_TASK_NONE;
}

static bool load_model(app *a)
{
    apt_load_desc load = APT_ZERO;
    apt_model_info info;
    const apt_config *config = &a->task.config;
    const int32_t threads = apt_thread_count(a->ctx);
    char text[32];
    load.task = training(a) ? a->task.kind : APT_TASK_NONE;           /* else: what it was trained for */
    load.weights = a->run.weights == 1 ? APT_BF16 : APT_F32;
    load.seed = (uint64_t)a->run.seed;
    if (training(a) && a->task.kind == APT_TASK_CLASSIFY) load.labels = ex_labels_count(a->task.labels);
    if (apt_model_load(a->ctx, a->model, &load, &a->loaded) != APT_OK) return ex_fail(&a->error, "%s", apt_error(a->ctx));
    apt_model_config(a->loaded, &a->task.config);
    if (config->task == APT_TASK_MLM || (a->task.kind != APT_TASK_NONE && a->task.kind != config->task))
        return ex_fail(&a->error, "%s was trained for %s, not for %s: train it first", a->model, ex_task_name(config->task),
                       a->task.kind == APT_TASK_NONE ? "a task with labels" : ex_task_name(a->task.kind));
    apt_model_query(a->loaded, &info);
    a->task.kind = config->task;
    a->task.tokenizer = ex_tokenizer_load(a->model, &a->error);
    if (a->task.tokenizer == NULL) return false;
    if (ex_tokenizer_size(a->task.tokenizer) > config->vocab)
        return ex_fail(&a->error, "%s: the tokenizer has %d tokens, the model's embedding %d rows", a->model,
                       (int)ex_tokenizer_size(a->task.tokenizer), (int)config->vocab);
    printf("  model    %s: %s, %d layers, d %d, %s parameters, %s kernels, %d thread%s\n", a->model,
           config->family == APT_BERT ? "BERT" : "RoBERTa", (int)config->layers, (int)config->hidden,
           ex_count_text(text, sizeof(text), (double)info.parameters), apt_kernel_name(a->ctx), (int)threads,
           threads == 1 ? "" : "s");
    return true;
}

/* For training rows first, since the model needs the number of classes; else the model first, since it knows the task. */
static bool load_everything(app *a)
{
    ex_task *t = &a->task;
    t->kind = choose_task(a);
    return ex_task_read_labels(t, a->model) && (!training(a) || ex_task_read_train(t, &a->train, a->limit)) && load_model(a) &&
           ex_task_check_labels(t, a->model) && ex_task_check_metric(t) && ex_task_read(t, &a->dev, true, 0) &&
           ex_task_read(t, &a->predict, false, 0) && (!training(a) || ex_task_tokenise(t, &a->train, "train")) &&
           ex_task_tokenise(t, &a->dev, "dev") && ex_task_tokenise(t, &a->predict, "predict");
}

/* ------------------------------------------------------------------------------------------------ training */

static int evaluate_and_predict(app *a)
{
    ex_scores scores;
    ex_score_info info;
    if (a->dev.path != NULL) {
        if (!ex_task_evaluate(&a->task, a->ctx, a->loaded, &a->dev, &scores, &info)) return 1;
        ex_scores_print(&scores, &info);
    }
    return ex_task_predict(&a->task, a->ctx, a->loaded, &a->predict, a->out) ? 0 : 1;
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
    return ex_task_write_labels(&a->task, a->out);
}

static bool predict(void *user, apt_ctx *ctx, apt_model *model)
{
    app *a = (app *)user;
    return ex_task_predict(&a->task, ctx, model, &a->predict, a->out);
}

static int train(app *a)
{
    ex_program p;
    memset(&p, 0, sizeof(p));
    p.method = g_methods[a->method];
    p.kind = a->method;
    p.options = &a->run;
    p.arguments = a->table;
    p.model = a->model;
    p.train = a->train.path;
    p.out = a->out;
    p.rows = ex_dataset_source(&a->train.set);
    p.rows_name = "sequences";
    p.longest = a->train.set.longest;
    p.sequences = 1;
    char *data = ex_format("train %s (%lld sequences of at most %d tokens), dev %s, metric %d", a->train.path,
                           (long long)a->train.set.count, (int)a->train.set.longest, a->dev.path != NULL ? a->dev.path : "none",
                           (int)a->task.metric);
    p.data = data;
    p.ctx = a->ctx;
    p.loaded = a->loaded;
    p.evaluate = a->dev.path != NULL ? evaluate : NULL;
    p.write = write_labels;
    p.finish = predict;
    p.user = a;
    p.error = &a->error;
    const int status = ex_program_train(&p);
    free(data);
    return status;
}

/* ------------------------------------------------------------------------------------------------ main */

static void app_free(app *a)
{
    ex_task_file_free(&a->train);
    ex_task_file_free(&a->dev);
    ex_task_file_free(&a->predict);
    ex_task_free(&a->task);
    ex_tokenizer_free(a->task.tokenizer);
    apt_destroy(a->ctx);
    free(a->table);
}

int main(int argc, char **argv)
{
    app a;
    memset(&a, 0, sizeof(a));
    ex_options_init(&a.run);
    a.task.stride = 128;
    a.task.error = &a.error;
    a.table = make_table(&a);
    const ex_args_result parsed = ex_args_parse(a.table, &g_about, argc, argv, &a.error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    if (parsed == EX_ARGS_OK) {
        ex_options_preset(&a.run, a.table);
        if (check_options(&a)) {
            status = 1;
            a.ctx = ex_run_context(a.run.threads, a.run.kernels, &a.error);
            if (a.ctx != NULL && load_everything(&a)) status = training(&a) ? train(&a) : evaluate_and_predict(&a);
        }
    }
    if (status == 1 || status == 2) fprintf(stderr, "roberta: %s\n%s", a.error.text, status == 2 ? "Try --help.\n" : "");
    app_free(&a);
    return status;
}
