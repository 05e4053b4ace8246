/* pipeline.c - what `make run-pipeline` runs: stages that make one model smaller, one behind the other, each on the result of the
   last: tuning, APT, magnitude pruning, a student with fewer layers, distillation, quantisation.

       cc -O2 -std=c11 examples/pipeline.c -o pipeline -lm -lpthread -lutf8proc

       pipeline
       pipeline --model DIR --train train.tsv --dev dev.tsv --stages tune,student,distill,qat,quantize --out DIR
       pipeline --resume

   With no arguments it needs no file: the task is that of demo.c. Else it takes any BERT or RoBERTa checkpoint folder and rows of
   one or two sentences with a class. Every stage leaves a folder as other programs read it. pipeline.json says which are done;
   after a crash or Ctrl-C the same command with --resume goes on in the stage where it was, from the last checkpoint, and ends
   with the same bytes. What the table at the end says is measured with the folders, loaded again; report.html and
   results.json say the same. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_tokenizer.h"
#include "common/ex_data.h"
#include "common/ex_grammar.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_task.h"
#include "common/ex_demo.h"
#include "common/ex_demo_bert.h"
#include "common/ex_demo_files.h"
#include "common/ex_layers.h"

enum { TUNE, APT, MAGNITUDE, QAT, DISTILL, STUDENT, QUANTIZE, KINDS, PRETRAIN = KINDS, MOST_STAGES = 16 };
static const char *const g_names[KINDS + 1] = {"tune", "apt", "magnitude", "qat", "distill", "student", "quantize", "pretrain"};
#define KNOWN_STAGES "tune, apt, magnitude, qat, distill, student, quantize"
#define NO_EXPERTS "experts are parts of apt_moe networks, which sparse_bk trains and prunes; a transformer has none"

/* What was measured of a folder. */
typedef struct record {
    int64_t parameters, zeros, disk;  /* zeros: in the linear maps of the layers */
    double metric, loss, speed, seconds;
} record;

typedef struct stage {
    int32_t kind;
    char *name, *folder, *text;       /* as columns of the table are called; OUT/1-tune; what it does */
    record r;
    bool done;
} stage;

typedef struct app {
    ex_demo_files files;              /* the task, of the demonstration or of files; the first member */
    ex_demo d;
    ex_demo_plan plan;
    ex_demo_way way[MOST_STAGES];
    const ex_arg *table;
    stage stage[MOST_STAGES];
    int32_t count, first;             /* stages; the first that the command line names */
    record origin;                    /* of --model, where no stage makes what the others are compared with */
    const char *before;               /* the folder of the model before compression: the teacher */
    const record *reference;          /* its figures */
    bool tuned, resume;               /* --model knows its task; go on with OUT */
    char *settings;
    /* the command line's */
    const char *stages;
    double sparsity, zeros, target, temperature, alpha, lr, apt_lr, qat_lr;
    int64_t steps, batch, student_layers;
    int32_t bits;
    /* of the stage at work */
    apt_iterative_desc iterations;
    apt_distill_desc distill;
} app;

/* ------------------------------------------------------------------------------------------------ the command line */

static bool has_kind(const app *a, int32_t kind, int32_t end)
{
    for (int32_t i = 0; i < end; i++)
        if (a->stage[i].kind == kind) return true;
    return false;
}

/* Why the stage `i` cannot stand where it does; NULL: it can. */
static const char *misplaced(const app *a, int32_t i)
{
    const int32_t kind = a->stage[i].kind;
    const bool knows = a->tuned || has_kind(a, TUNE, i), compressed = has_kind(a, APT, i) || has_kind(a, MAGNITUDE, i) ||
                                                                    has_kind(a, STUDENT, i) || has_kind(a, QAT, i);
    if (has_kind(a, QUANTIZE, i)) return "nothing can follow quantize: its weights are small integers, which do not learn";
    if (kind != DISTILL && has_kind(a, kind, i)) return "only distill may come more than once";
    if (kind == TUNE && i > 0) return "it makes the model that all others are compared with, so it comes first";
    if ((kind == APT || kind == MAGNITUDE) && has_kind(a, QAT, i))
        return "qat has learned to round the weights that are there: prune in front of it";
    if ((kind == DISTILL || kind == STUDENT) && !knows)
        return "its teacher is a model that knows the task: begin with tune, or with a --model that is tuned";
    if (kind == DISTILL && !compressed)
        return "there is nothing to win back: apt, magnitude, student or qat must stand in front of it";
    if ((kind == QAT || kind == QUANTIZE) && !knows && !has_kind(a, APT, i) && !has_kind(a, MAGNITUDE, i))
        return "the model does not know the task yet: tune, apt or magnitude must stand in front of it";
    return NULL;
}

static int32_t kind_of(const char *name, size_t length)
{
    int32_t kind = 0;
    while (kind < KINDS && (strlen(g_names[kind]) != length || strncmp(g_names[kind], name, length) != 0)) kind++;
    return kind;
}

/* "tune,apt" -> a->stage */
static bool parse_stages(app *a)
{
    ex_error *error = &a->d.error;
    const char *at = a->stages;
    for (bool more = true; more;) {
        const size_t length = strcspn(at, ",");
        const int32_t kind = kind_of(at, length);
        if (kind == KINDS)
            return ex_fail(error, "--stages: \"%.*s\" is no stage; there are %s (%s)", (int)length, at, KNOWN_STAGES, NO_EXPERTS);
        if (a->count == MOST_STAGES - 1) return ex_fail(error, "--stages: more than %d", (int)MOST_STAGES - 1);
        a->stage[a->count++].kind = kind;
        more = at[length] == ',';
        at += length + more;
    }
    for (int32_t i = 0; i < a->count; i++) {
        const char *why = misplaced(a, i);
        if (why != NULL) return ex_fail(error, "--stages %s: %s: %s", a->stages, g_names[a->stage[i].kind], why);
    }
    const bool rounds = has_kind(a, QAT, a->count);
    if (rounds && a->stage[a->count - 1].kind != QUANTIZE)
        return ex_fail(error, "--stages %s: qat: it learns for quantize, which must come at the end", a->stages);
    return true;
}

/* Is the folder a classifier already? What is wrong with it the library says later. */
static bool is_tuned(const char *dir)
{
    static const char ending[] = "ForSequenceClassification";
    char *path = ex_path(dir, "config.json");
    ex_error ignored = {""};
    ex_json json;
    bool tuned = false;
    if (ex_json_read(&json, path, &ignored)) {
        const ex_json_node *list = ex_json_get(ex_json_root(&json), "architectures");
        const ex_json_node *first = ex_json_is(list, EX_JSON_ARRAY) && list->count > 0 ? ex_json_first(list) : NULL;
        const size_t n = ex_json_is(first, EX_JSON_STRING) ? strlen(first->as.text) : 0, with = sizeof(ending) - 1;
        tuned = n > with && strcmp(first->as.text + n - with, ending) == 0;
        ex_json_free(&json);
    }
    free(path);
    return tuned;
}

static bool check_options(app *a)
{
    const char *model = a->files.p.model;
    if (!ex_demo_files_check(&a->files, a->d.out, &a->d.error)) return false;
    a->tuned = model != NULL && is_tuned(model);
    if (!parse_stages(a)) return false;
    char *state = ex_path(a->d.out, "pipeline.json");
    const bool fine = !a->resume || ex_file_exists(state) || ex_fail(&a->d.error, "--resume: there is no %s", state);
    free(state);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ stages: what they are */

static char *stage_text(const app *a, int32_t kind)
{
    switch (kind) {
    case PRETRAIN: return ex_format("%s", a->plan.pretraining);
    case TUNE: return ex_format("tune: all weights learn the task; this is what the others are compared with");
    case APT: return ex_format("apt: %.0f %% of heads, neurons and dimensions go while it learns", 100 * a->sparsity);
    case MAGNITUDE: return ex_format("magnitude: %.0f %% of the weights that are left become 0, in five steps", 100 * a->zeros);
    case QAT: return ex_format("qat: the weights learn what %s will make of them", apt_quant_kind_name(a->bits));
    case DISTILL: return ex_format("distill: it learns again from the model before compression");
    case STUDENT: return ex_format("student: some of its layers, taught by the model before compression");
    case QUANTIZE: default: return ex_format("quantize: the layers' matrices become %s", apt_quant_kind_name(a->bits));
    }
}

/* What must be alike when a run goes on. Threads may differ, and the target. */
static void name_settings(app *a)
{
    const ex_demo_files *f = &a->files;
    char *data = f->p.model != NULL ? ex_format("%s, rows %s (%lld), %s", f->p.model, f->train, (long long)f->limit, f->dev)
                                    : ex_format("%sdemonstration", a->d.fast ? "fast " : "");
    a->settings = ex_format("%s, stages %s, seed %lld, %lld steps of %d rows, sparsity %g, zeros %g, student of %lld layers, "
                            "temperature %g, alpha %g, rates %g %g %g, %s", data, a->stages, (long long)a->d.seed,
                            (long long)a->d.sizes.steps, (int)a->plan.batch, a->sparsity, a->zeros,
                            (long long)a->student_layers, a->temperature, a->alpha, a->lr, (double)a->plan.rate, a->qat_lr,
                            apt_quant_kind_name(a->bits));
    free(data);
}

/* Pretraining comes in front for the demonstration. */
static void name_stages(app *a)
{
    int32_t seen[KINDS + 1] = {0};
    a->first = a->plan.shape != NULL;
    for (int32_t i = a->count - 1; a->first > 0 && i >= 0; i--) a->stage[i + 1] = a->stage[i];
    a->count += a->first;
    if (a->first > 0) a->stage[0].kind = PRETRAIN;
    for (int32_t i = 0; i < a->count; i++) {
        stage *s = &a->stage[i];
        const int32_t again = ++seen[s->kind];
        s->name = again > 1 ? ex_format("%s %d", g_names[s->kind], (int)again) : ex_format("%s", g_names[s->kind]);
        s->folder = s->kind == PRETRAIN ? ex_copy(a->d.base, strlen(a->d.base))
                                        : ex_format("%s/%d-%s", a->d.out, (int)(i - a->first + 1), g_names[s->kind]);
        s->text = stage_text(a, s->kind);
    }
    a->plan.ways = a->way;            /* exi_demo_stage counts them */
    a->plan.way_count = a->count - a->first;
    a->before = a->d.base;
    a->reference = &a->origin;
    for (int32_t i = 0; i <= a->first && i < a->count; i++) {
        if (a->stage[i].kind != TUNE && a->stage[i].kind != PRETRAIN) continue;
        a->before = a->stage[i].folder;
        a->reference = &a->stage[i].r;
    }
    name_settings(a);
}

/* What of a stage differs from the others. Weights that are 0 stay 0 in all of them, and from qat on all compute with what
   quantize will make of the weights. */
static void schedule(app *a, ex_run *run, int32_t i)
{
    apt_train_desc *t = &run->desc;
    const int32_t kind = a->stage[i].kind;
    const int64_t steps = a->d.sizes.steps;
    if (has_kind(a, QAT, i + 1)) t->quantize = a->bits;
    t->method = APT_METHOD_FULL;
    t->steps = kind == QAT ? (steps + 1) / 2 : kind == PRETRAIN ? a->d.sizes.pretrain_steps : steps;
    t->learning_rate = kind == PRETRAIN ? a->plan.pretrain_rate : (float)(kind == QAT ? a->qat_lr : a->lr);
    t->warmup_steps = t->steps / 20;
    t->evaluate_every = kind == PRETRAIN ? 0 : t->steps / 4 + 1;
    t->checkpoint_every = t->steps / 8 + 1;
    if (kind == APT) {
        ex_demo_apt(&a->d, run);
        t->target_sparsity = (float)a->sparsity;
    }
    if (kind == MAGNITUDE) {
        apt_iterative_desc *plan = &a->iterations;
        memset(plan, 0, sizeof(*plan));
        plan->first = a->zeros / 2;
        plan->last = a->zeros;
        plan->iterations = 5;
        plan->global = 1;
        plan->lower_is_better = 1;
        plan->begin = t->steps * 2 / 10;
        plan->retrain = t->steps / 10;
        run->iterative = plan;
    }
    if (kind == DISTILL || kind == STUDENT) {
        memset(&a->distill, 0, sizeof(a->distill));
        a->distill.temperature = (float)a->temperature;
        a->distill.alpha = (float)a->alpha;
        run->distill = &a->distill;
    }
    if (kind == PRETRAIN) run->prepare = a->plan.prepare;
    else run->evaluate = exi_demo_evaluate;
}

/* ------------------------------------------------------------------------------------------------ models */

static bool load_folder(app *a, apt_ctx *ctx, const char *dir, apt_model **model)
{
    apt_load_desc load = a->plan.load;
    load.seed = (uint64_t)a->d.seed;
    return apt_model_load(ctx, dir, &load, model) == APT_OK || ex_fail(&a->d.error, "%s", apt_error(ctx));
}

/* ------------------------------------------------------------------------------------------------ measuring, pipeline.json */

/* The folder, loaded again. */
static bool measure(app *a, const char *dir, bool knows, record *r)
{
    ex_demo *d = &a->d;
    ex_outcome outcome;
    ex_saved saved;
    ex_scores scores;
    ex_score_info info;
    memset(&outcome, 0, sizeof(outcome));
    memset(&scores, 0, sizeof(scores));
    bool fine = ex_saved_open(&saved, &outcome, dir, &d->machine, &d->error);
    if (fine && knows)
        fine = d->plan->score(d, saved.ctx, saved.model, EX_DEMO_TEST, &scores, &info) &&
               ex_demo_speed(d, saved.ctx, saved.model, &outcome);
    r->zeros = fine ? ex_layers_zeros(saved.model) : 0;
    r->parameters = outcome.parameters;
    r->disk = outcome.disk;
    r->metric = scores.chosen;
    r->loss = scores.loss;
    r->speed = outcome.tokens_per_second;
    ex_saved_close(&saved);
    return fine;
}

static void put_record(ex_text *out, const record *r)
{
    ex_json_put_count(out, "parameters", r->parameters);
    ex_json_put_count(out, "zeros", r->zeros);
    ex_json_put_count(out, "file_bytes", r->disk);
    ex_json_put_number(out, "metric", r->metric);
    ex_json_put_number(out, "loss", r->loss);
    ex_json_put_number(out, "tokens_per_second", r->speed);
    ex_json_put_number(out, "seconds", r->seconds);
}

/* Which stages are done, and their figures. Replaced as a whole, so that a crash leaves the old file or the new one. */
static bool write_state(app *a)
{
    char *path = ex_path(a->d.out, "pipeline.json");
    ex_text out = {NULL, 0, 0};
    ex_text_put(&out, "{\"settings\": ");
    ex_json_put(&out, a->settings, strlen(a->settings));
    ex_text_put(&out, ",\n \"done\": [");
    for (int32_t i = 0; i < a->count && a->stage[i].done; i++) {
        ex_text_format(&out, "%s\n  {\"stage\": \"%s\"", i > 0 ? "," : "", a->stage[i].name);
        put_record(&out, &a->stage[i].r);
        ex_text_put(&out, "}");
    }
    ex_text_put(&out, "]}\n");
    const bool fine = ex_write_file(path, out.at, out.length, &a->d.error);
    ex_text_free(&out);
    free(path);
    return fine;
}

static int64_t whole_member(const ex_json_node *node, const char *name)
{
    int64_t value = 0;
    const ex_json_node *member = ex_json_get(node, name);
    return member != NULL && ex_json_int(member, 0, INT64_MAX / 2, &value) ? value : 0;
}

static double real_member(const ex_json_node *node, const char *name)
{
    const ex_json_node *member = ex_json_get(node, name);
    return ex_json_is(member, EX_JSON_NUMBER) ? member->as.number : 0;
}

static bool take_state(app *a, const ex_json *json, const char *path)
{
    const char *settings = ex_json_text(ex_json_root(json), "settings", "");
    const ex_json_node *done = ex_json_need(json, ex_json_root(json), "done", EX_JSON_ARRAY, &a->d.error);
    if (done == NULL) return false;
    if (strcmp(settings, a->settings) != 0)
        return ex_fail(&a->d.error, "%s was written with other settings.\n  then: %s\n  now:  %s", path, settings, a->settings);
    const ex_json_node *node = ex_json_first(done);
    for (uint32_t i = 0; i < done->count && i < (uint32_t)a->count; i++, node = ex_json_next(node)) {
        record *r = &a->stage[i].r;
        if (strcmp(ex_json_text(node, "stage", ""), a->stage[i].name) != 0)
            return ex_fail(&a->d.error, "%s: stage %d is not %s", path, (int)i + 1, a->stage[i].name);
        r->parameters = whole_member(node, "parameters");
        r->zeros = whole_member(node, "zeros");
        r->disk = whole_member(node, "file_bytes");
        r->metric = real_member(node, "metric");
        r->loss = real_member(node, "loss");
        r->speed = real_member(node, "tokens_per_second");
        r->seconds = real_member(node, "seconds");
        a->stage[i].done = true;
    }
    return true;
}

/* A fresh run forgets what an earlier one has left. */
static bool begin_state(app *a)
{
    char *path = ex_path(a->d.out, "pipeline.json");
    bool fine = true;
    if (a->resume) {
        ex_json json;
        fine = ex_json_read(&json, path, &a->d.error);
        if (fine) {
            fine = take_state(a, &json, path);
            ex_json_free(&json);
        }
    } else {
        fine = ex_remove_file(path, &a->d.error);
        for (int32_t i = 0; fine && i < a->count; i++) {
            char *checkpoint = ex_path(a->stage[i].folder, "checkpoint.apt");
            fine = ex_remove_file(checkpoint, &a->d.error);
            free(checkpoint);
        }
        fine = fine && write_state(a);
    }
    free(path);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ a stage */

/* The model that the stage begins with, and its teacher. */
static bool open_models(app *a, int32_t i, ex_run *run)
{
    const int32_t kind = a->stage[i].kind;
    apt_config config = APT_ZERO;
    if (kind == PRETRAIN) {
        a->plan.shape(&a->d, &config);
        return apt_model_create(run->ctx, &config, (uint64_t)a->d.seed, &run->model) == APT_OK ||
               ex_fail(&a->d.error, "%s", apt_error(run->ctx));
    }
    if (!load_folder(a, run->ctx, i > 0 ? a->stage[i - 1].folder : a->d.base, &run->model)) return false;
    if (kind == STUDENT && !ex_layers_keep(run->ctx, &run->model, (int32_t)a->student_layers, a->d.seed, &a->d.error))
        return false;
    if (has_kind(a, MAGNITUDE, i) && !ex_layers_mask(run->ctx, run->model, &a->d.error)) return false;
    return run->distill == NULL || load_folder(a, run->ctx, a->before, &run->teacher);
}

/* Trains and writes the folder. The checkpoint stays until pipeline.json knows that the stage is done. */
static ex_run_end run_stage(app *a, int32_t i, ex_run *run)
{
    const int32_t kind = a->stage[i].kind;
    const double start = ex_seconds();
    schedule(a, run, i);
    run->keeps = true;
    run->resume = a->resume && ex_file_exists(run->checkpoint);
    run->settings = a->settings;
    run->arguments = a->table;
    run->sparse = has_kind(a, MAGNITUDE, i + 1);
    if (!open_models(a, i, run)) return EX_RUN_FAILED;
    if (kind == QUANTIZE) {
        run->quantize = a->bits;
        run->sparse = false;
    } else {
        const ex_run_end end = ex_run_train(run);
        if (end != EX_RUN_DONE) return end;
    }
    if (!ex_run_save(run, kind == PRETRAIN ? NULL : a->d.base)) return EX_RUN_FAILED;
    a->stage[i].r.seconds = kind == QUANTIZE ? ex_seconds() - start : run->state.seconds;
    return EX_RUN_DONE;
}

static ex_run_end do_stage(app *a, int32_t i)
{
    stage *s = &a->stage[i];
    ex_demo *d = &a->d;
    ex_run run;
    apt_ctx *ctx = ex_run_context(&d->machine, &d->error);
    exi_demo_run(d, &run, s->kind == PRETRAIN ? a->plan.objective : s->name, ctx, NULL,
                 s->kind == PRETRAIN ? EX_DEMO_CORPUS : EX_DEMO_TRAIN, s->folder);
    ex_run_end end = ctx != NULL && ex_make_dirs(s->folder, &d->error) ? run_stage(a, i, &run) : EX_RUN_FAILED;
    const bool knows = s->kind != PRETRAIN;
    if (end == EX_RUN_DONE && ((knows && !ex_demo_files_label(&a->files, s->folder, &d->error)) ||
                               !measure(a, s->folder, knows, &s->r)))
        end = EX_RUN_FAILED;
    s->done = end == EX_RUN_DONE;
    if (s->done && (!write_state(a) || !ex_remove_file(run.checkpoint, &d->error))) end = EX_RUN_FAILED;
    if (end == EX_RUN_STOPPED)
        ex_fail(&d->error, "stopped in %s after step %lld; the same command with --resume goes on", s->name,
                (long long)run.state.step);
    ex_run_close(&run);
    apt_destroy(ctx);
    return end;
}

/* ------------------------------------------------------------------------------------------------ results */

static double smaller(const app *a, const record *r)
{
    return r->disk > 0 ? (double)a->reference->disk / (double)r->disk : 0;
}

static void cells_of(const app *a, const char *name, const record *r, bool knows, ex_cells *cells)
{
    char text[32];
    const double times = smaller(a, r);
    cells->run = name;
    if (knows) ex_cell(cells, "accuracy", "%.1f %%", 100 * r->metric);
    else ex_cell(cells, "accuracy", "-");
    if (knows) ex_cell(cells, "loss", "%.4f", r->loss);
    else ex_cell(cells, "loss", "-");
    ex_cell(cells, "parameters", "%s", ex_count_text(text, sizeof(text), (double)r->parameters));
    ex_cell(cells, "not 0", "%s", ex_count_text(text, sizeof(text), (double)(r->parameters - r->zeros)));
    ex_cell(cells, "on disk", "%s", ex_bytes_text(text, sizeof(text), (double)r->disk));
    ex_cell(cells, "smaller", "%.2f x", times);
    ex_cell(cells, "of the target", "%.0f %%", 100 * times / a->target);
    exi_cell_speed(cells, "inference", r->speed);
    if (r->seconds > 0) ex_cell(cells, "time", "%s", ex_time_text(text, sizeof(text), r->seconds));
    else ex_cell(cells, "time", "-");
}

static bool write_results(app *a)
{
    char *path = ex_path(a->d.out, "results.json");
    const record *last = &a->stage[a->count - 1].r;
    ex_text out = {NULL, 0, 0};
    ex_text_put(&out, "{\"model\": ");
    ex_json_put(&out, a->d.base, strlen(a->d.base));
    ex_text_put(&out, ", \"settings\": ");
    ex_json_put(&out, a->settings, strlen(a->settings));
    ex_json_put_number(&out, "target", a->target);
    ex_json_put_number(&out, "reached", smaller(a, last));
    ex_text_put(&out, ",\n  \"stages\": [");
    for (int32_t i = a->first; i < a->count; i++) {
        const stage *s = &a->stage[i];
        ex_text_format(&out, "%s\n    {\"stage\": \"%s\", \"folder\": ", i > a->first ? "," : "", s->name);
        ex_json_put(&out, s->folder, strlen(s->folder));
        put_record(&out, &s->r);
        ex_json_put_number(&out, "compression", smaller(a, &s->r));
        ex_text_put(&out, "}");
    }
    ex_text_put(&out, "]}\n");
    const bool fine = ex_write_file(path, out.at, out.length, &a->d.error);
    ex_text_free(&out);
    free(path);
    return fine;
}

static bool conclude(app *a)
{
    ex_cells cells[MOST_STAGES];
    ex_report *report = ex_report_create(a->plan.title);
    char *path = ex_path(a->d.out, "report.html");
    int32_t count = 0;
    bool fine = true;
    memset(cells, 0, sizeof(cells));
    if (a->reference == &a->origin) cells_of(a, "--model", &a->origin, a->tuned, &cells[count++]);
    for (int32_t i = 0; i < a->count; i++)
        if (i >= a->first || a->reference == &a->stage[i].r)
            cells_of(a, a->stage[i].name, &a->stage[i].r, i >= a->first, &cells[count++]);
    for (int32_t i = 0; i < count; i++) ex_cells_report(&cells[i], report);
    for (int32_t i = a->first; fine && i < a->count; i++) {
        char *log = ex_path(a->stage[i].folder, "metrics.jsonl");
        if (a->stage[i].kind != QUANTIZE) fine = ex_report_add_metrics(report, a->stage[i].name, log, &a->d.error);
        free(log);
    }
    fine = fine && write_results(a) && ex_report_write(report, path, &a->d.error);
    if (fine) {
        const double times = smaller(a, &a->stage[a->count - 1].r);
        printf("\n");
        ex_cells_print(cells, count, stdout);
        printf("\nThe target, %g times smaller than %s on disk, is %s: %.2f times.\n"
               "Test sentences were never trained on. Everything is measured with the saved folders. Curves: %s\n", a->target,
               a->before, times >= a->target ? "reached" : "missed", times, path);
    }
    ex_report_free(report);
    free(path);
    return fine;
}

static bool run_all(app *a, bool *stopped)
{
    ex_demo *d = &a->d;
    ex_cells baseline;
    memset(&baseline, 0, sizeof(baseline));
    if (!ex_make_dirs(d->out, &d->error) || !begin_state(a)) return false;
    exi_demo_stage(d, a->plan.data);
    if (!a->plan.make_data(d, &baseline)) return false;
    if (a->reference == &a->origin && !measure(a, d->base, a->tuned, &a->origin)) return false;
    for (int32_t i = 0; i < a->count; i++) {
        exi_demo_stage(d, a->stage[i].text);
        const ex_run_end end = a->stage[i].done ? EX_RUN_DONE : do_stage(a, i);
        *stopped = end == EX_RUN_STOPPED;
        if (end != EX_RUN_DONE) return false;
        const record *r = &a->stage[i].r;
        if (i >= a->first)
            printf("  accuracy %.1f %%, %.2f times smaller, in %s\n", 100 * r->metric, smaller(a, r), a->stage[i].folder);
    }
    exi_demo_stage(d, "Results");
    return conclude(a);
}

/* ------------------------------------------------------------------------------------------------ main */

static const ex_demo_plan g_plan = {
    EX_BERT_PLAN,
    .name = "pipeline",
    .title = "apt.h: a model made smaller in stages",
    .sizes = {.pretrain_steps = 800, .steps = 400, .corpus = 30000, .train = 4000, .dev = 500, .test = 2000},
    .fast = {.pretrain_steps = 30, .steps = 24, .corpus = 1500, .train = 600, .dev = 100, .test = 200}};

/* Rates of learning: a real checkpoint wants smaller steps than one that a demonstration made a minute ago. */
static void choose_plan(app *a)
{
    ex_demo_plan *plan = &a->plan;
    const bool files = a->files.p.model != NULL;
    if (files) ex_demo_files_plan(&a->files, &a->d, plan);
    if (files) plan->sizes.steps = 1000;
    if (a->steps > 0) plan->sizes.steps = plan->fast.steps = a->steps;
    if (a->batch > 0) plan->batch = (int32_t)a->batch;
    if (!(a->lr > 0)) a->lr = files ? 5e-5 : 5e-4;
    if (!(a->qat_lr > 0)) a->qat_lr = a->lr / 5;
    if (a->apt_lr > 0) plan->rate = (float)a->apt_lr;
    else if (files) plan->rate = 1e-3f;
    a->bits++;                        /* the choices are those of APT_QUANT_* without the first */
    if (a->d.base == NULL) a->d.base = ex_path(a->d.out, plan->model);
    a->d.plan = plan;
    a->d.user = a;
    a->d.sizes = a->d.fast ? plan->fast : plan->sizes;
    a->d.random = (uint64_t)a->d.seed * 0x9e3779b97f4a7c15u + 1;
}

static int work(app *a)
{
    const double start = ex_seconds();
    char time[32];
    bool stopped = false;
    name_stages(a);
    ex_run_catch_signals();
    const bool fine = run_all(a, &stopped);
    if (fine) printf("Done in %s.\n", ex_time_text(time, sizeof(time), ex_seconds() - start));
    else fprintf(stderr, "\npipeline: %s\n", a->d.error.text);
    return fine ? 0 : stopped ? 130 : 1;
}

static void close_app(app *a)
{
    for (int32_t i = 0; i < a->count; i++) {
        free(a->stage[i].name);
        free(a->stage[i].folder);
        free(a->stage[i].text);
    }
    ex_tokenizer_free(a->d.tokenizer);
    ex_map_free(&a->d.seen);
    ex_demo_files_free(&a->files);
    free(a->d.base);
    free(a->settings);
}

int main(int argc, char **argv)
{
    static app a;
    a.plan = g_plan;
    a.d.seed = 1;
    a.d.out = "build/pipeline-run";
    a.stages = "tune,apt,magnitude,distill,qat,quantize";
    a.sparsity = 0.6;
    a.zeros = 0.5;
    a.target = 6;
    a.temperature = 2;
    a.alpha = 0.7;
    const ex_arg table[] = {
        EX_GROUP("Data (none: the demonstration task)"),
        EX_DEMO_FILES_ROWS(&a.files),
        EX_TEXT("out", "DIR", &a.d.out, "folder for the stages' folders, pipeline.json, results.json and report.html"),
        EX_GROUP("Stages"),
        EX_TEXT("stages", "LIST", &a.stages, "in this order, each on the result of the last; of " KNOWN_STAGES
                " (" NO_EXPERTS ")"),
        EX_REAL("target", "X", &a.target, 1, 1e6, "how many times smaller on disk the result is meant to be"),
        EX_REAL("sparsity", "X", &a.sparsity, 0.05, 0.95, "apt: share of the prunable parameters that go"),
        EX_REAL("zeros", "X", &a.zeros, 0.05, 0.95, "magnitude: share of the layers' weights that become 0"),
        EX_INT("student-layers", "N", &a.student_layers, 0, 1024, "student: every n-th layer, N in all; 0: half of them"),
        EX_REAL("temperature", "X", &a.temperature, 1e-3, 1e3, "distill, student: of the predictions of both"),
        EX_REAL("alpha", "X", &a.alpha, 1e-3, 1, "distill, student: the teacher's share of the loss"),
        EX_CHOICE("bits", &a.bits, "int8|int4", "qat, quantize: what the layers' matrices become"),
        EX_GROUP("Training"),
        EX_INT("steps", "N", &a.steps, 0, 1e9, "of each stage, of qat half as many; 0: 400, with files 1000"),
        EX_INT("batch", "N", &a.batch, 0, 1e6, "rows; 0: 32"),
        EX_REAL("lr", "X", &a.lr, 0, 1, "learning rate of all weights; 0: 5e-4, with files 5e-5"),
        EX_REAL("apt-lr", "X", &a.apt_lr, 0, 1, "learning rate of apt's adapters; 0: 2e-3, with files 1e-3"),
        EX_REAL("qat-lr", "X", &a.qat_lr, 0, 1, "learning rate of qat; 0: a fifth of --lr"),
        EX_INT("seed", "N", &a.d.seed, 0, 1e9, "another corpus and another start"),
        EX_INT("threads", "N", &a.d.machine.threads, 0, 64, "threads to use; 0: all cores"),
        EX_FLAG("resume", &a.resume, "go on with an interrupted run in --out"),
        EX_FLAG("fast", &a.d.fast, "a few seconds, for tests: everything runs, nothing is learned well"),
        EX_ARGS_END};
    static const ex_args_about about = {
        "pipeline", "Makes a model smaller in stages: tuning, pruning, distillation, quantisation.", "[options]",
        "  pipeline\n  pipeline --stages tune,student,apt,distill,qat,quantize --bits int4 --target 20\n"
        "  pipeline --model minilm --train train.tsv --dev dev.tsv --out small\n"
        "  pipeline --model minilm --train train.tsv --dev dev.tsv --out small --resume\n"};
    const ex_args_result parsed = ex_args_parse(table, &about, argc, argv, &a.d.error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    a.table = table;
    if (parsed == EX_ARGS_OK && check_options(&a)) {
        choose_plan(&a);
        status = work(&a);
    } else if (status != 0) fprintf(stderr, "%s: %s\nTry --help.\n", about.program, a.d.error.text);
    close_app(&a);
    return status;
}
