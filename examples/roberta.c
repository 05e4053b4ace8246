/* roberta.c - fine-tunes, prunes and shrinks any Hugging Face BERT or RoBERTa checkpoint folder on the CPU.

       cc -O2 -std=gnu11 examples/roberta.c -o roberta -lm -lpthread -lutf8proc

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

enum { METHOD_EVAL = EX_METHOD_PRUNE_AFTER + 1, METHOD_PREDICT };
enum { METRIC_AUTO, METRIC_ACCURACY, METRIC_F1, METRIC_F1_MACRO, METRIC_MATTHEWS, METRIC_PEARSON, METRIC_SPEARMAN, METRIC_EXACT };

static const char *const g_methods[] = {"apt", "lora", "full", "prune-after", "eval", "predict"};
static const char *const g_tasks[] = {"auto", "classification", "regression", "span"};

typedef struct options {
    ex_options run;                   /* what every training example has */
    const char *model, *train, *dev, *predict, *out, *text_column, *pair_column, *label_column;
    int32_t method, task, metric;
    bool no_header;
    int64_t limit, max_length, stride;
    double null_threshold;
} options;

/* One file of rows or questions, tokenised. */
typedef struct data_file { ex_rows rows; ex_squad squad; ex_dataset set; } data_file;

typedef struct scores { int32_t count; const char *name[6]; double value[6]; double chosen, loss; const char *chosen_name; } scores;

typedef struct app {
    options o;
    ex_arg *table;
    apt_task_kind task;
    apt_ctx *ctx;
    apt_model *model;
    apt_config config;
    ex_tokenizer *tokenizer;
    data_file train, dev, predict;
    const ex_labels *labels;          /* class names: `known` or those of the training rows; NULL: none yet */
    ex_labels known;                  /* from labels.txt in the model's folder, or plain numbers */
    int32_t *predicted;               /* stb_ds: class of every row of the set scored last */
    float *value;                     /* stb_ds: its probability, or the number predicted */
    ex_answers *answers;
    ex_log log;
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

/* The table points into *o, whose present values are the defaults that --help shows. */
static ex_arg *make_table(options *o)
{
    const ex_arg rows[] = {
        EX_GROUP("Data"),
        EX_REQUIRED(EX_TEXT("model", "DIR", &o->model, "checkpoint folder: config.json, safetensors, tokenizer")),
        EX_TEXT("train", "FILE", &o->train, "training rows: .tsv, .jsonl, or SQuAD .json"),
        EX_TEXT("dev", "FILE", &o->dev, "rows to evaluate on"),
        EX_TEXT("predict", "FILE", &o->predict, "rows to predict; written to OUT/predictions.tsv or .json"),
        EX_TEXT("out", "DIR", &o->out, "result folder"),
        EX_CHOICE("task", &o->task, "auto|classification|regression|span", "auto: span for .json, else what the model says, else classification"),
        EX_TEXT("text-column", "NAME", &o->text_column, "first sentence: a name of the header line, or #1, #2 ..."),
        EX_TEXT("pair-column", "NAME", &o->pair_column, "second sentence; \"\" for none"),
        EX_TEXT("label-column", "NAME", &o->label_column, "label or number"),
        EX_FLAG("no-header", &o->no_header, "the TSV has no header line; name columns by #n"),
        EX_INT("limit", "N", &o->limit, 0, 1e12, "training rows to read; 0: all"),
        EX_INT("max-length", "N", &o->max_length, 0, 1e6, "tokens per sequence; 0: 128, span 384"),
        EX_INT("stride", "N", &o->stride, 1, 1e6, "span: tokens that neighbouring windows share"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &o->method, "apt|lora|full|prune-after|eval|predict", "prune-after: LoRA, one-shot prune, recovery"),
        EX_CHOICE("metric", &o->metric, "auto|accuracy|f1|f1-macro|matthews|pearson|spearman|exact", "what `best` means"),
        EX_REAL("null-threshold", "X", &o->null_threshold, -1e6, 1e6, "SQuAD v2: no answer when its score leads by more"),
        EX_OPTIONS_ROWS(&o->run),
        EX_ARGS_END};
    ex_arg *table = (ex_arg *)ex_alloc(sizeof(rows) / sizeof(rows[0]), sizeof(ex_arg));
    memcpy(table, rows, sizeof(rows));
    return table;
}

static bool training(const app *a)
{
    return a->o.method != METHOD_EVAL && a->o.method != METHOD_PREDICT;
}

/* What the table cannot check: which options belong together. */
static bool check_options(app *a)
{
    const options *o = &a->o;
    const char *method = g_methods[o->method];
    if (training(a) && (o->train == NULL || o->out == NULL)) return ex_fail(&a->error, "--method %s needs --train FILE and --out DIR", method);
    if (o->method == METHOD_EVAL && o->dev == NULL) return ex_fail(&a->error, "--method eval needs --dev FILE");
    if (o->method == METHOD_PREDICT && o->predict == NULL) return ex_fail(&a->error, "--method predict needs --predict FILE");
    if (o->predict != NULL && o->out == NULL) return ex_fail(&a->error, "--predict needs --out DIR for the predictions");
    if (!training(a)) return !o->run.resume || ex_fail(&a->error, "--resume goes with a training method, not with %s", method);
    return ex_options_check(&o->run, &a->error) && ex_options_check_out(&o->run, o->model, o->out, &a->error);
}

/* ------------------------------------------------------------------------------------------------ data and model */

static bool json_file(const char *path)
{
    const size_t n = path != NULL ? strlen(path) : 0;
    return n > 5 && strcmp(path + n - 5, ".json") == 0;
}

static apt_task_kind choose_task(const options *o)
{
    static const apt_task_kind tasks[] = {APT_TASK_NONE, APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN};
    if (o->task != 0) return tasks[o->task];
    if (json_file(o->train) || json_file(o->dev) || json_file(o->predict)) return APT_TASK_SPAN;
    return o->method == METHOD_EVAL || o->method == METHOD_PREDICT ? APT_TASK_NONE : APT_TASK_CLASSIFY;
}

/* Reads one file; labelled rows get the class names known already. */
static bool read_file(app *a, data_file *f, const char *path, bool labelled, int64_t limit)
{
    ex_rows_desc desc;
    if (path == NULL) return true;
    if (a->task == APT_TASK_SPAN) return ex_squad_read(&f->squad, path, &a->error);
    memset(&desc, 0, sizeof(desc));
    desc.kind = !labelled ? EX_LABEL_NONE : a->task == APT_TASK_REGRESS ? EX_LABEL_SCORE : EX_LABEL_CLASS;
    desc.text_column = a->o.text_column;
    desc.pair_column = a->o.pair_column;
    desc.label_column = labelled ? a->o.label_column : NULL;
    desc.no_header = a->o.no_header;
    desc.labels = a->labels;
    desc.limit = limit;
    if (!ex_rows_read(&f->rows, path, &desc, &a->error)) return false;
    if (f->rows.count == 0) return ex_fail(&a->error, "%s: no rows", path);
    if (desc.kind == EX_LABEL_CLASS && a->labels == NULL) a->labels = &f->rows.labels;
    if (f->rows.replaced > 0) fprintf(stderr, "warning: %s: %lld bytes that are not UTF-8 were replaced\n", path, (long long)f->rows.replaced);
    return true;
}

static bool tokenise(app *a, data_file *f, const char *path)
{
    const int64_t room = a->config.positions - (a->config.family == APT_ROBERTA ? a->config.pad_id + 1 : 0);
    int64_t length = a->o.max_length > 0 ? a->o.max_length : a->task == APT_TASK_SPAN ? 384 : 128;
    ex_squad_desc desc;
    if (path == NULL) return true;
    if (length > room) length = room;
    memset(&desc, 0, sizeof(desc));
    desc.max_length = (int32_t)length;
    desc.stride = (int32_t)a->o.stride;
    if (a->task == APT_TASK_SPAN ? !ex_dataset_squad(&f->set, &f->squad, a->tokenizer, &desc, &a->error)
                                 : !ex_dataset_rows(&f->set, &f->rows, a->tokenizer, (int32_t)length, &a->error))
        return false;
    printf("  %-8s %lld %s, mean %.0f tokens, longest %d%s\n", path == a->o.train ? "train" : path == a->o.dev ? "dev" : "predict",
           (long long)f->set.count, a->task == APT_TASK_SPAN ? "windows" : "rows",
           (double)f->set.starts[f->set.count] / (double)f->set.count, (int)f->set.longest, f->set.truncated > 0 ? " (cut)" : "");
    return true;
}

/* A result folder names its classes in labels.txt, one a line, in the order of the model's outputs. */
static bool read_labels(app *a)
{
    char *path = ex_path(a->o.model, "labels.txt"), *text = NULL;
    size_t bytes = 0;
    bool fine = true;
    if (ex_file_exists(path)) {
        text = ex_read_file(path, &bytes, &a->error);
        fine = text != NULL;
        for (char *line = fine ? text : NULL, *end; line != NULL && *line != 0; line = end) {
            end = line + strcspn(line, "\r\n");
            if (*end != 0) *end++ = 0;
            if (*line != 0) ex_labels_add(&a->known, line);
        }
        a->labels = &a->known;
    }
    free(text);
    free(path);
    return fine;
}

static bool write_labels(app *a)
{
    char *path = ex_path(a->o.out, "labels.txt");
    ex_text text;
    memset(&text, 0, sizeof(text));
    for (int32_t i = 0; a->task == APT_TASK_CLASSIFY && i < ex_labels_count(a->labels); i++) ex_text_format(&text, "%s\n", ex_labels_name(a->labels, i));
    const bool fine = text.at == NULL || ex_write_file(path, text.at, text.length, &a->error);
    ex_text_free(&text);
    free(path);
    return fine;
}

/* A classifier that names no classes has the numbers 0, 1, ... */
static void number_labels(app *a)
{
    char name[16];
    for (int32_t i = 0; i < a->config.labels; i++) {
        snprintf(name, sizeof(name), "%d", (int)i);
        ex_labels_add(&a->known, name);
    }
    a->labels = &a->known;
}

/* Training rows keep the order of the model's classes when they use the same names. */
static bool read_train(app *a)
{
    if (!read_labels(a)) return false;
    if (a->labels == NULL || a->task != APT_TASK_CLASSIFY) return read_file(a, &a->train, a->o.train, true, a->o.limit);
    if (read_file(a, &a->train, a->o.train, true, a->o.limit)) return true;
    ex_rows_free(&a->train.rows);
    a->labels = NULL;
    return read_file(a, &a->train, a->o.train, true, a->o.limit);
}

static bool load_model(app *a)
{
    apt_load_desc load = APT_ZERO;
    apt_model_info info;
    char text[32];
    load.task = a->task;
    load.weights = a->o.run.weights == 1 && a->o.method != EX_METHOD_FULL ? APT_BF16 : APT_F32;
    load.seed = (uint64_t)a->o.run.seed;
    if (training(a) && a->task == APT_TASK_CLASSIFY) load.labels = ex_labels_count(a->labels);
    if (apt_model_load(a->ctx, a->o.model, &load, &a->model) != APT_OK) return ex_fail(&a->error, "%s", apt_error(a->ctx));
    apt_model_config(a->model, &a->config);
    apt_model_query(a->model, &info);
    a->task = a->config.task;
    a->tokenizer = ex_tokenizer_load(a->o.model, &a->error);
    if (a->tokenizer == NULL) return false;
    if (ex_tokenizer_size(a->tokenizer) > a->config.vocab)
        return ex_fail(&a->error, "%s: the tokenizer has %d tokens, the model's embedding %d rows", a->o.model,
                       (int)ex_tokenizer_size(a->tokenizer), (int)a->config.vocab);
    printf("  model    %s: %s, %d layers, d %d, %s parameters, %s kernels, %d thread%s\n", a->o.model,
           a->config.family == APT_BERT ? "BERT" : "RoBERTa", (int)a->config.layers, (int)a->config.hidden,
           ex_count_text(text, sizeof(text), (double)info.parameters), apt_kernel_name(a->ctx), (int)apt_thread_count(a->ctx),
           apt_thread_count(a->ctx) == 1 ? "" : "s");
    return true;
}

static bool check_labels(app *a)
{
    if (a->task == APT_TASK_CLASSIFY && ex_labels_count(a->labels) != a->config.labels)
        return ex_fail(&a->error, "%d classes are named, the model has %d", (int)ex_labels_count(a->labels), (int)a->config.labels);
    return a->task != APT_TASK_MLM || ex_fail(&a->error, "%s is a language model: say --task classification, regression or span", a->o.model);
}

/* For training rows first, since the model needs the number of classes; else the model first, since it knows the task. */
static bool load_everything(app *a)
{
    const options *o = &a->o;
    a->task = choose_task(o);
    if (training(a) ? !read_train(a) || !load_model(a) : !read_labels(a) || !load_model(a)) return false;
    if (a->task == APT_TASK_CLASSIFY && a->labels == NULL) number_labels(a);
    return read_file(a, &a->dev, o->dev, true, 0) && read_file(a, &a->predict, o->predict, false, 0) && check_labels(a) &&
           tokenise(a, &a->train, training(a) ? o->train : NULL) && tokenise(a, &a->dev, o->dev) && tokenise(a, &a->predict, o->predict);
}

/* ------------------------------------------------------------------------------------------------ scoring */

static void keep_predictions(void *user, const ex_batch *batch, const apt_output *output)
{
    app *a = (app *)user;
    const int32_t labels = a->config.labels;
    if (a->task == APT_TASK_SPAN) {
        ex_answers_add(a->answers, batch, output->logits);
        return;
    }
    for (int32_t s = 0; s < batch->sequences; s++) {
        const int64_t row = batch->index[s];
        if (a->task == APT_TASK_REGRESS) {
            a->value[row] = output->logits[s];
            continue;
        }
        const float *z = output->logits + (int64_t)s * labels;
        const int32_t best = ex_argmax(z, labels);
        double sum = 0;
        for (int32_t c = 0; c < labels; c++) sum += exp((double)z[c] - (double)z[best]);
        a->predicted[row] = best;
        a->value[row] = (float)(1 / sum);
    }
}

static bool score_file(app *a, apt_ctx *ctx, apt_model *model, data_file *f, ex_score_info *info)
{
    arrsetlen(a->predicted, (size_t)f->set.count);
    arrsetlen(a->value, (size_t)f->set.count);
    if (a->task == APT_TASK_SPAN) {
        ex_answers_free(a->answers);
        a->answers = ex_answers_create(&f->squad, &f->set, 30);
    }
    return ex_score(ctx, model, &f->set, keep_predictions, a, info, &a->error);
}

static void add_score(app *a, scores *s, int32_t metric, const char *name, double value)
{
    if (s->count == 0 || a->o.metric == metric) {
        s->chosen = value;
        s->chosen_name = name;
    }
    s->name[s->count] = name;
    s->value[s->count++] = value;
}

/* Every metric of the task; the first one is the default. */
static bool evaluate_dev(app *a, apt_ctx *ctx, apt_model *model, scores *s, ex_score_info *info)
{
    const ex_dataset *set = &a->dev.set;
    if (!score_file(a, ctx, model, &a->dev, info)) return false;
    memset(s, 0, sizeof(*s));
    s->loss = info->loss;
    if (a->task == APT_TASK_SPAN) {
        ex_squad_score squad;
        if (!ex_squad_score_all(&squad, &a->dev.squad, a->answers, a->o.null_threshold)) return ex_fail(&a->error, "%s: no questions", a->o.dev);
        add_score(a, s, METRIC_F1, "f1", squad.f1 / 100);
        add_score(a, s, METRIC_EXACT, "exact", squad.exact / 100);
    } else if (a->task == APT_TASK_REGRESS) {
        add_score(a, s, METRIC_PEARSON, "pearson", ex_pearson(a->value, set->targets, set->count));
        add_score(a, s, METRIC_SPEARMAN, "spearman", ex_spearman(a->value, set->targets, set->count));
    } else {
        add_score(a, s, METRIC_ACCURACY, "accuracy", ex_accuracy(a->predicted, set->labels, set->count));
        if (a->config.labels == 2) add_score(a, s, METRIC_F1, "f1", ex_f1_binary(a->predicted, set->labels, set->count, 1));
        add_score(a, s, METRIC_F1_MACRO, "f1-macro", ex_f1_macro(a->predicted, set->labels, set->count, a->config.labels));
        add_score(a, s, METRIC_MATTHEWS, "matthews", ex_matthews(a->predicted, set->labels, set->count, a->config.labels));
    }
    return true;
}

static bool check_metric(app *a)
{
    static const int32_t metrics[][5] = {{0}, {METRIC_ACCURACY, METRIC_F1, METRIC_F1_MACRO, METRIC_MATTHEWS, 0},
                                         {METRIC_PEARSON, METRIC_SPEARMAN, 0}, {METRIC_F1, METRIC_EXACT, 0}};
    const int32_t kind = a->task == APT_TASK_CLASSIFY ? 1 : a->task == APT_TASK_REGRESS ? 2 : 3;
    if (a->o.metric == METRIC_AUTO) return true;
    for (int32_t i = 0; metrics[kind][i] != 0; i++)
        if (metrics[kind][i] == a->o.metric) return true;
    return ex_fail(&a->error, "--metric does not fit the task %s", g_tasks[kind]);
}

static void put_prediction(const app *a, ex_text *text, int64_t row)
{
    const int32_t k = a->predicted[row];
    ex_text_format(text, "%lld\t", (long long)row + 1);
    if (a->task == APT_TASK_REGRESS) ex_text_format(text, "%.6g\n", (double)a->value[row]);
    else if (a->labels != NULL && k < ex_labels_count(a->labels)) ex_text_format(text, "%s\t%.4f\n", ex_labels_name(a->labels, k), (double)a->value[row]);
    else ex_text_format(text, "%d\t%.4f\n", (int)k, (double)a->value[row]);
}

/* predictions.tsv: row number, class or number, probability; predictions.json for SQuAD. */
static bool write_predictions(app *a, apt_ctx *ctx, apt_model *model)
{
    const bool span = a->task == APT_TASK_SPAN;
    ex_score_info info;
    ex_text text;
    if (a->o.predict == NULL) return true;
    if (!ex_make_dirs(a->o.out, &a->error) || !score_file(a, ctx, model, &a->predict, &info)) return false;
    char *path = ex_path(a->o.out, span ? "predictions.json" : "predictions.tsv");
    memset(&text, 0, sizeof(text));
    ex_text_put(&text, a->task == APT_TASK_REGRESS ? "row\tprediction\n" : "row\tprediction\tprobability\n");
    for (int64_t i = 0; !span && i < a->predict.set.count; i++) put_prediction(a, &text, i);
    const bool fine = span ? ex_answers_write(a->answers, path, a->o.null_threshold, &a->error) : ex_write_file(path, text.at, text.length, &a->error);
    if (fine) printf("  wrote    %s\n", path);
    ex_text_free(&text);
    free(path);
    return fine;
}

static bool evaluate_only(app *a)
{
    scores s;
    ex_score_info info;
    if (a->o.dev == NULL) return true;
    if (!evaluate_dev(a, a->ctx, a->model, &s, &info)) return false;
    for (int32_t i = 0; i < s.count; i++) printf("  %-10s %.4f\n", s.name[i], s.value[i]);
    if (info.terms > 0) printf("  %-10s %.4f\n", "loss", info.loss);
    printf("  %-10s %.0f tokens/s\n", "speed", (double)info.tokens / info.seconds);
    return true;
}

/* ------------------------------------------------------------------------------------------------ training */

static bool evaluate_in_run(ex_run *run, double *metric)
{
    app *a = (app *)run->user;
    scores s;
    ex_score_info info;
    if (!evaluate_dev(a, run->ctx, run->model, &s, &info)) return false;
    *metric = s.chosen;
    ex_progress_note(&run->bar, "  step %5lld  dev      %s %.4f, loss %.4f", (long long)run->state.step, s.chosen_name, s.chosen, s.loss);
    ex_log_begin(run->log, "evaluate");
    ex_log_int(run->log, "step", run->state.step);
    for (int32_t i = 0; i < s.count; i++) ex_log_real(run->log, s.name[i], s.value[i]);
    ex_log_real(run->log, "dev_loss", s.loss);
    return ex_log_end(run->log, run->error);
}

/* The most tokens that one batch can have: its longest sequences together. */
static void announce(app *a, const ex_run *run)
{
    apt_estimate_info estimate;
    char text[32];
    const ex_options *o = &a->o.run;
    const int64_t batch = o->batch < a->train.set.count ? o->batch : a->train.set.count;
    printf("  plan     %s", g_methods[a->o.method]);
    if (a->o.method == EX_METHOD_APT || a->o.method == EX_METHOD_PRUNE_AFTER) printf(" to %.0f %% sparsity", 100 * o->sparsity);
    printf(", %lld steps of %lld sequences, learning rate %g", (long long)run->desc.steps, (long long)(o->batch * o->accumulate), o->lr);
    if (apt_estimate(a->ctx, &a->config, &run->desc, batch * a->train.set.longest, batch, &estimate) == APT_OK)
        printf(", memory below %s", ex_bytes_text(text, sizeof(text), (double)estimate.total));
    printf("\n");
    fflush(stdout);
}

static void put_line(app *a, ex_table *table, ex_report *report, const char *name, const char *value)
{
    ex_table_cell(table, "%s", name);
    ex_table_cell(table, "%s", value);
    ex_report_result(report, g_methods[a->o.method], name, value);
    ex_log_text(&a->log, name, value);
}

/* The table at the end, also as the last line of metrics.jsonl and in the report. */
static bool conclude(app *a, const ex_run *run, const apt_model_info *trained, apt_ctx *ctx, apt_model *saved, const scores *s, double speed)
{
    const ex_step_times times = ex_run_times(run);
    char *file = ex_path(a->o.out, "model.safetensors"), *log = ex_path(a->o.out, "metrics.jsonl"), *html = ex_path(a->o.out, "report.html");
    char value[64], text[32];
    apt_model_info info;
    ex_table table;
    ex_report *report = ex_report_create("apt.h: roberta");
    memset(&table, 0, sizeof(table));
    table.columns = 2;
    apt_model_query(saved, &info);
    ex_log_begin(&a->log, "result");
    ex_table_cell(&table, "result");
    ex_table_cell(&table, "%s", g_methods[a->o.method]);
#define PUT(name, ...) (snprintf(value, sizeof(value), __VA_ARGS__), put_line(a, &table, report, (name), value))
    for (int32_t i = 0; i < s->count; i++) PUT(s->name[i], "%.4f", s->value[i]);
    if (run->state.best_step >= 0) PUT("best in training", "%.4f at step %lld", run->state.best, (long long)run->state.best_step);
    PUT("parameters", "%s", ex_count_text(text, sizeof(text), (double)info.parameters));
    PUT("prunable parameters kept", "%.1f %%", 100 * (double)trained->prunable / (double)trained->prunable_dense);
    PUT("bytes on disk", "%s", ex_bytes_text(text, sizeof(text), (double)ex_file_bytes(file)));
    PUT("ms per step, first", "%.1f", times.first);
    PUT("ms per step, last", "%.1f", times.last);
    if (times.teacher > 0) PUT("and the teacher's forward", "%.1f", times.teacher);
    if (speed > 0) PUT("inference tokens/s", "%.0f", speed);
    PUT("peak memory, training", "%s", ex_bytes_text(text, sizeof(text), (double)run->state.peak_bytes));
    PUT("peak memory, inference", "%s", ex_bytes_text(text, sizeof(text), (double)apt_memory_info(ctx).peak_bytes));
    PUT("training time", "%s", ex_time_text(text, sizeof(text), run->state.seconds));
#undef PUT
    bool fine = ex_log_end(&a->log, &a->error) && ex_report_add_metrics(report, g_methods[a->o.method], log, &a->error) &&
                ex_report_write(report, html, &a->error);
    printf("\n");
    ex_table_print(&table, stdout);
    if (fine) printf("\nThe smaller model is in %s, its curves in %s\n", a->o.out, html);
    ex_table_free(&table);
    ex_report_free(report);
    free(file);
    free(log);
    free(html);
    return fine;
}

/* Loads the folder that was just written in a context of its own and measures that. */
static bool finish(app *a, ex_run *run)
{
    apt_model_info trained;
    apt_model *saved = NULL;
    scores s;
    ex_score_info info;
    apt_model_query(run->model, &trained);
    if (!ex_run_save(run, a->o.out, a->o.model) || !write_labels(a)) return false;
    apt_model_destroy(run->model);
    a->model = NULL;
    memset(&s, 0, sizeof(s));
    memset(&info, 0, sizeof(info));
    apt_ctx *ctx = ex_run_context(a->o.run.threads, a->o.run.kernels, &a->error);
    bool fine = ctx != NULL && (apt_model_load(ctx, a->o.out, NULL, &saved) == APT_OK || ex_fail(&a->error, "%s", apt_error(ctx)));
    if (fine) apt_model_config(saved, &a->config);
    fine = fine && (a->o.dev == NULL || evaluate_dev(a, ctx, saved, &s, &info)) &&
           conclude(a, run, &trained, ctx, saved, &s, info.seconds > 0 ? (double)info.tokens / info.seconds : 0) && write_predictions(a, ctx, saved);
    apt_destroy(ctx);
    return fine;
}

static int train(app *a)
{
    ex_feed feed;
    ex_run run;
    char *checkpoint = ex_path(a->o.out, "checkpoint.apt"), *log = ex_path(a->o.out, "metrics.jsonl");
    memset(&feed, 0, sizeof(feed));
    memset(&run, 0, sizeof(run));
    feed.set = &a->train.set;
    feed.batch = (int32_t)a->o.run.batch;
    feed.seed = (uint64_t)a->o.run.seed;
    feed.by_length = a->o.run.group_by_length;
    run.name = g_methods[a->o.method];
    run.ctx = a->ctx;
    run.model = a->model;
    run.feed = &feed;
    run.evaluate = a->o.dev != NULL ? evaluate_in_run : NULL;
    run.user = a;
    run.checkpoint = checkpoint;
    run.log_path = log;
    run.log = &a->log;
    run.arguments = a->table;
    run.error = &a->error;
    ex_options_plan(&a->o.run, a->o.method, a->o.dev != NULL, &run);
    char *shared = ex_options_settings(&a->o.run, &run);
    char *settings = ex_format("train %s (%lld sequences of at most %d tokens), dev %s, metric %d, %s", a->o.train, (long long)a->train.set.count,
                               (int)a->train.set.longest, a->o.dev != NULL ? a->o.dev : "none", (int)a->o.metric, shared);
    run.settings = settings;
    announce(a, &run);
    int status = 1;
    const ex_run_end end = ex_make_dirs(a->o.out, &a->error) ? ex_run_train(&run) : EX_RUN_FAILED;
    if (end == EX_RUN_DONE) status = finish(a, &run) ? 0 : 1;
    if (end == EX_RUN_STOPPED) {
        fprintf(stderr, "Stopped after step %lld; everything is in %s.\nGo on with the same command and --resume.\n", (long long)run.state.step, checkpoint);
        status = 130;
    }
    ex_log_close(&a->log);
    ex_feed_free(&feed);
    free(checkpoint);
    free(log);
    free(settings);
    free(shared);
    return status;
}

/* ------------------------------------------------------------------------------------------------ main */

static void data_free(data_file *f)
{
    ex_dataset_free(&f->set);
    ex_rows_free(&f->rows);
    ex_squad_free(&f->squad);
}

static void app_free(app *a)
{
    ex_answers_free(a->answers);
    data_free(&a->train);
    data_free(&a->dev);
    data_free(&a->predict);
    ex_labels_free(&a->known);
    ex_tokenizer_free(a->tokenizer);
    arrfree(a->predicted);
    arrfree(a->value);
    apt_destroy(a->ctx);
    free(a->table);
}

int main(int argc, char **argv)
{
    app a;
    memset(&a, 0, sizeof(a));
    ex_options_init(&a.o.run);
    a.o.stride = 128;
    a.table = make_table(&a.o);
    const ex_args_result parsed = ex_args_parse(a.table, &g_about, argc, argv, &a.error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    if (parsed == EX_ARGS_OK) {
        ex_options_preset(&a.o.run, a.table);
        if (check_options(&a)) {
            status = 1;
            ex_run_catch_signals();
            a.ctx = ex_run_context(a.o.run.threads, a.o.run.kernels, &a.error);
            if (a.ctx != NULL && load_everything(&a) && check_metric(&a))
                status = training(&a) ? train(&a) : evaluate_only(&a) && write_predictions(&a, a.ctx, a.model) ? 0 : 1;
        }
    }
    if (status == 1 || status == 2) fprintf(stderr, "roberta: %s\n%s", a.error.text, status == 2 ? "Try --help.\n" : "");
    app_free(&a);
    return status;
}
