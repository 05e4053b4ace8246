/* magnitude.c - what `make run-magnitude` runs: single weights go, the smallest first. One model, tuned at equal numbers of steps
   dense, with 60 % of its weights pruned at once, in the pattern 2:4, step by step to 70 %, and with APT to 60 %.

       cc -O2 -std=c11 examples/magnitude.c -o magnitude -lm -lpthread -lutf8proc

       magnitude
       magnitude --model DIR --train train.tsv --dev dev.tsv --steps 1000 --out DIR

   With no arguments it needs no file: the task is that of demo.c. Else it takes any BERT or RoBERTa checkpoint folder and rows of
   one or two sentences with a class. Each way leaves a folder as other programs read it and a compressed one beside it; what
   the table at the end says is measured with both, loaded again. report.html and results.json say the same with all curves
   and iterations. */
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

enum { DENSE, MAGNITUDE, PATTERN, ITERATIVE, APT, APT_INT8, WAYS, MOST_PATTERNS = 16, MOST_ITERATIONS = 32 };

/* What was measured of one way. */
typedef struct row {
    apt_sparsity pruned, stored, used;/* by its masks; what is compressed in the file; what is multiplied compressed */
    double target, accuracy, loss, speed, sparse_speed;
    int64_t prunable;
    double kept;                      /* of the dense way's prunable parameters, by units */
    double degradation, perplexity_degradation;      /* of the loss and of e^loss, against the dense way's */
    int64_t parameters, disk, sparse_disk;
    double first, last, seconds;      /* ms per step, training time */
    apt_iterative_summary summary;
    apt_iteration history[MOST_ITERATIONS];
    int32_t iterations;
} row;

typedef struct app {
    ex_demo_files files;              /* the task, of the demonstration or of files; the first member */
    ex_demo d;
    ex_demo_plan plan;
    ex_demo_way way[WAYS];
    char *name[WAYS], *stage[WAYS];
    /* the command line's */
    const char *patterns;
    double sparsity, begin, last, lr, apt_lr;
    int64_t iterations, steps, batch;
    int32_t demo;                     /* 0: words, 1: classes */
    char *pattern_text;
    const char *pattern[MOST_PATTERNS];
    int32_t pattern_count;
    apt_magnitude_desc once;
    apt_iterative_desc plan_of_iterations;
    row row[WAYS];
} app;

/* ------------------------------------------------------------------------------------------------ ways */

static void schedule(ex_demo *d, ex_run *run, int32_t way)
{
    app *a = (app *)d->user;
    apt_train_desc *t = &run->desc;
    apt_magnitude_desc *once = &a->once;
    apt_iterative_desc *plan = &a->plan_of_iterations;
    memset(once, 0, sizeof(*once));
    memset(plan, 0, sizeof(*plan));
    if (a->files.bert.words) run->prepare = ex_bert_mask;
    if (way == APT_INT8) return;      /* what APT has left, and no step more */
    if (way == APT) {
        ex_demo_apt(d, run);
        t->target_sparsity = (float)a->sparsity;
        return;
    }
    t->method = APT_METHOD_FULL;
    t->learning_rate = (float)a->lr;
    once->patterns = plan->patterns = a->pattern_count > 0 ? a->pattern : NULL;
    once->pattern_count = plan->pattern_count = a->pattern_count;
    run->prune_at = t->steps * 3 / 10;
    if (way == MAGNITUDE || way == PATTERN) run->magnitude = once;
    if (way == MAGNITUDE) once->sparsity = a->sparsity;
    if (way == PATTERN) once->keep = 2, once->of = 4;
    if (way != ITERATIVE) return;
    plan->first = a->begin;
    plan->last = a->last;
    plan->iterations = (int32_t)a->iterations;
    plan->global = 1;                 /* one threshold: layers that can spare more lose more */
    plan->lower_is_better = 1;
    plan->begin = t->steps * 2 / 10;  /* the last iteration prunes at 70 % or sooner: the rest is for recovery */
    plan->retrain = (t->steps * 5 / 10) / a->iterations;
    run->iterative = plan;
}

/* What the trainer knows of its pruning. */
static bool trained(ex_demo *d, ex_run *run, int32_t way)
{
    app *a = (app *)d->user;
    row *r = &a->row[way];
    bool fine = apt_model_sparsity(run->model, NULL, &r->pruned) == APT_OK;
    r->iterations = apt_trainer_iterations(run->trainer);
    for (int32_t i = 0; fine && i < r->iterations; i++)
        fine = apt_trainer_iteration(run->trainer, i, &r->history[i]) == APT_OK;
    if (fine && way == ITERATIVE) fine = apt_trainer_iterative_query(run->trainer, &r->summary) == APT_OK;
    return fine || ex_fail(&d->error, "%s", apt_error(run->ctx));
}

/* The compressed folder, loaded again: it must compute what the dense one does, by the dense kernels and by compressed copies. */
static bool measure_sparse(app *a, const char *dir, row *r)
{
    ex_demo *d = &a->d;
    ex_outcome outcome;
    ex_saved saved;
    ex_scores scores;
    ex_score_info info;
    memset(&outcome, 0, sizeof(outcome));
    bool fine = ex_saved_open(&saved, &outcome, dir, &d->machine, &d->error);
    if (fine && apt_model_compress(saved.model, 0, &r->used) != APT_OK) fine = ex_fail(&d->error, "%s", apt_error(saved.ctx));
    fine = fine && d->plan->score(d, saved.ctx, saved.model, EX_DEMO_TEST, &scores, &info);
    if (fine && !(fabs(scores.loss - r->loss) <= 1e-4 * (1 + r->loss)))
        fine = ex_fail(&d->error, "%s: the compressed model has a loss of %.6f, the dense one %.6f", dir, scores.loss, r->loss);
    fine = fine && (r->used.matrices == 0 || ex_demo_speed(d, saved.ctx, saved.model, &outcome));
    r->sparse_disk = outcome.disk;
    r->sparse_speed = outcome.tokens_per_second;
    ex_saved_close(&saved);
    return fine;
}

/* The compressed folder beside run->dir. */
static bool compress(app *a, ex_run *run, row *r)
{
    ex_demo *d = &a->d;
    char *dir = ex_format("%s-sparse", run->dir);
    bool fine = apt_model_save_sparse(run->model, dir, &r->stored) == APT_OK || ex_fail(&d->error, "%s", apt_error(run->ctx));
    fine = fine && ex_copy_tokenizer(d->base, dir, &d->error) && ex_demo_files_label(&a->files, dir, &d->error) &&
           measure_sparse(a, dir, r);
    free(dir);
    return fine;
}

static void cells_of(const row *r, int32_t way, bool words, ex_cells *cells)
{
    char text[32];
    const bool masks = r->pruned.matrices > 0;
    ex_cell(cells, "loss", "%.4f", r->loss);
    if (way != DENSE) {
        ex_cell(cells, "loss, against dense", "%+.1f %%", 100 * r->degradation);
        if (words) ex_cell(cells, "perplexity, against dense", "%+.1f %%", 100 * r->perplexity_degradation);
    }
    if (r->target > 0) ex_cell(cells, "sparsity, target", "%.1f %%", 100 * r->target);
    else ex_cell(cells, "sparsity, target", "-");
    ex_cell(cells, "sparsity, reached", "%.1f %%", 100 * (masks ? r->pruned.sparsity : 1 - r->kept));
    ex_cell(cells, "active parameters", "%s", ex_count_text(text, sizeof(text), (double)(r->parameters - r->pruned.zeros)));
    ex_cell(cells, "compressed, on disk", "%s", ex_bytes_text(text, sizeof(text), (double)r->sparse_disk));
    if (masks) ex_cell(cells, "pruned layers, smaller", "%.2f x", r->pruned.compression);
    else ex_cell(cells, "pruned layers, smaller", "-");
    exi_cell_speed(cells, "inference, compressed", r->sparse_speed);
}

static bool measured(ex_demo *d, ex_run *run, int32_t way, const ex_scores *scores, ex_outcome *outcome, ex_cells *cells)
{
    app *a = (app *)d->user;
    row *r = &a->row[way];
    apt_model_info info = APT_ZERO;
    if (!ex_demo_files_label(&a->files, run->dir, &d->error)) return false;
    r->target = way == DENSE ? 0 : way == PATTERN ? 0.5 : way == ITERATIVE ? a->last : a->sparsity;
    r->accuracy = scores->value[0];
    r->loss = scores->loss;
    r->degradation = a->row[DENSE].loss > 0 ? r->loss / a->row[DENSE].loss - 1 : 0;
    r->perplexity_degradation = exp(r->loss - a->row[DENSE].loss) - 1;
    r->parameters = outcome->parameters;
    r->disk = outcome->disk;
    r->speed = outcome->tokens_per_second;
    r->first = outcome->first;
    r->last = outcome->last;
    r->seconds = outcome->seconds;
    r->sparse_disk = r->disk;
    apt_model_query(run->model, &info);
    r->prunable = info.prunable;
    r->kept = outcome->kept = (double)r->prunable / (double)a->row[DENSE].prunable;
    if (way != APT_INT8 && !compress(a, run, r)) return false;
    if (d->measure) r->pruned = r->stored;                 /* the folder has the zeros and not the masks */
    cells_of(r, way, a->files.bert.words, cells);
    if (r->pruned.matrices > 0 && a->pattern_count == 0) outcome->kept -= r->pruned.sparsity;      /* what is 0 is not left */
    return true;
}

/* ------------------------------------------------------------------------------------------------ results */

static void put_sparsity(ex_text *out, const apt_sparsity *s)
{
    ex_json_put_number(out, "sparsity", s->sparsity);
    ex_json_put_count(out, "matrices", s->matrices);
    ex_json_put_count(out, "weights", s->weights);
    ex_json_put_count(out, "zeros", s->zeros);
    ex_json_put_count(out, "active", s->weights - s->zeros);
    ex_json_put_count(out, "dense_bytes", s->dense_bytes);
    ex_json_put_count(out, "sparse_bytes", s->sparse_bytes);
    ex_json_put_number(out, "compression", s->compression);
}

static void put_iteration(ex_text *out, const apt_iteration *h)
{
    ex_text_format(out, "%s      {\"iteration\": %d", h->number > 1 ? ",\n" : "\n", (int)h->number);
    ex_json_put_count(out, "step", h->step);
    ex_json_put_number(out, "target", h->target);
    put_sparsity(out, &h->reached);
    if ((h->measured & APT_MEASURED_BEFORE) != 0) ex_json_put_number(out, "loss_before", h->before);
    if ((h->measured & APT_MEASURED_AFTER) != 0) ex_json_put_number(out, "loss_after", h->after);
    if ((h->measured & APT_MEASURED_RETRAINED) != 0) ex_json_put_number(out, "loss_retrained", h->retrained);
    ex_json_put_number(out, "degradation", h->degradation);
    ex_text_put(out, "}");
}

static void put_way(const app *a, int32_t way, ex_text *out)
{
    const row *r = &a->row[way];
    ex_text_put(out, way > 0 ? ",\n    {\"way\": " : "\n    {\"way\": ");
    ex_json_put(out, a->way[way].name, strlen(a->way[way].name));
    ex_text_put(out, ", \"folder\": ");
    ex_json_put(out, a->way[way].folder, strlen(a->way[way].folder));
    ex_json_put_number(out, "accuracy", r->accuracy);
    ex_json_put_number(out, "loss", r->loss);
    ex_json_put_number(out, "perplexity", exp(r->loss));
    ex_json_put_number(out, "degradation", r->degradation);
    ex_json_put_number(out, "perplexity_degradation", r->perplexity_degradation);
    ex_json_put_number(out, "target", r->target);
    put_sparsity(out, &r->pruned);
    ex_json_put_count(out, "parameters", r->parameters);
    ex_json_put_count(out, "active_parameters", r->parameters - r->pruned.zeros);
    ex_json_put_count(out, "file_bytes", r->disk);
    ex_json_put_count(out, "sparse_file_bytes", r->sparse_disk);
    ex_json_put_number(out, "tokens_per_second", r->speed);
    if (r->used.matrices > 0) ex_json_put_number(out, "tokens_per_second_compressed", r->sparse_speed);
    ex_json_put_number(out, "milliseconds_first", r->first);
    ex_json_put_number(out, "milliseconds_last", r->last);
    ex_json_put_number(out, "training_seconds", r->seconds);
    if (r->iterations > 0) {
        const apt_iterative_summary *s = &r->summary;
        ex_text_format(out, ",\n     \"summary\": {\"iterations\": %d", (int)s->iterations);
        ex_json_put_count(out, "done", s->done);
        ex_json_put_count(out, "begin", s->begin);
        ex_json_put_count(out, "retrain", s->retrain);
        ex_json_put_number(out, "first", s->first);
        ex_json_put_number(out, "last", s->last);
        ex_json_put_number(out, "loss_before", s->before);
        ex_json_put_number(out, "loss_retrained", s->retrained);
        ex_json_put_number(out, "degradation", s->degradation);
        ex_text_put(out, "},\n     \"history\": [");
        for (int32_t i = 0; i < r->iterations; i++) put_iteration(out, &r->history[i]);
        ex_text_put(out, "]");
    }
    ex_text_put(out, "}");
}

static bool write_results(app *a)
{
    char *path = ex_path(a->d.out, "results.json");
    ex_text out = {NULL, 0, 0};
    ex_text_put(&out, "{\"model\": ");
    ex_json_put(&out, a->d.base, strlen(a->d.base));
    ex_json_put_count(&out, "seed", a->d.seed);
    ex_json_put_count(&out, "steps", a->d.sizes.steps);
    ex_json_put_count(&out, "batch", a->plan.batch);
    ex_text_put(&out, ",\n  \"ways\": [");
    for (int32_t way = 0; way < WAYS; way++) put_way(a, way, &out);
    ex_text_put(&out, "]}\n");
    const bool fine = ex_write_file(path, out.at, out.length, &a->d.error);
    ex_text_free(&out);
    free(path);
    return fine;
}

/* The iterations on the screen and as rows of the report. */
static void show_iterations(const app *a, ex_report *report)
{
    const row *r = &a->row[ITERATIVE];
    printf("\n  %s, the loss of sentences to watch:\n", a->way[ITERATIVE].name);
    for (int32_t i = 0; i < r->iterations; i++) {
        const apt_iteration *h = &r->history[i];
        char *name = ex_format("iteration %d", (int)h->number);
        char *text = ex_format("%.1f %% (%.1f %%): %.4f, pruned %.4f, retrained %.4f", 100 * h->reached.sparsity, 100 * h->target,
                               h->before, h->after, h->retrained);
        printf("    %s, step %lld: %s\n", name, (long long)h->step, text);
        ex_report_result(report, a->way[ITERATIVE].name, name, text);
        free(name);
        free(text);
    }
}

static bool concluded(ex_demo *d, ex_report *report)
{
    app *a = (app *)d->user;
    show_iterations(a, report);
    return write_results(a);
}

/* ------------------------------------------------------------------------------------------------ main */

static void name_ways(app *a)
{
    static const char *const folders[WAYS] = {"dense", "magnitude", "pattern", "iterative", "apt", "apt-int8"};
    const double p = 100 * a->sparsity, q = 100 * a->last;
    a->name[DENSE] = ex_format("dense");
    a->name[MAGNITUDE] = ex_format("magnitude %.0f %%", p);
    a->name[PATTERN] = ex_format("2:4");
    a->name[ITERATIVE] = ex_format("iterative %.0f %%", q);
    a->name[APT] = ex_format("APT %.0f %%", p);
    a->name[APT_INT8] = ex_format("APT + int8");
    a->stage[DENSE] = ex_format("Tuning all weights, nothing pruned");
    a->stage[MAGNITUDE] = ex_format("The same, but %.0f %% of the weights go at once, and the others recover", p);
    a->stage[PATTERN] = ex_format("The same, but of every four weights in a row two go");
    a->stage[ITERATIVE] = ex_format("The same, but %.0f %% of the weights go in %lld iterations", q, (long long)a->iterations);
    a->stage[APT] = ex_format("Adapting it with APT: %.0f %% of heads, neurons and dimensions go while it learns", p);
    a->stage[APT_INT8] = ex_format("What APT has left, its matrices as int8");
    a->way[APT_INT8].quantize = APT_QUANT_INT8;
    for (int32_t way = 0; way < WAYS; way++) {
        a->way[way].name = a->name[way];
        a->way[way].folder = folders[way];
        a->way[way].stage = a->stage[way];
    }
}

/* "query,layer.*.output" -> a->pattern */
static bool split_patterns(app *a)
{
    if (a->patterns == NULL) return true;
    a->pattern_text = ex_copy(a->patterns, strlen(a->patterns));
    for (char *at = a->pattern_text, *end; at != NULL; at = end) {
        end = strchr(at, ',');
        if (end != NULL) *end++ = 0;
        if (*at == 0) return ex_fail(&a->d.error, "--patterns: an empty name in \"%s\"", a->patterns);
        if (a->pattern_count == MOST_PATTERNS) return ex_fail(&a->d.error, "--patterns: more than %d names", (int)MOST_PATTERNS);
        a->pattern[a->pattern_count++] = at;
    }
    return true;
}

static bool check_options(app *a)
{
    if (!ex_demo_files_check(&a->files, a->d.out, &a->d.error)) return false;
    if (a->begin > a->last)
        return ex_fail(&a->d.error, "--first %g is above --iterative %g, where the iterations end", a->begin, a->last);
    const int64_t steps = a->plan.sizes.steps;
    if (!a->d.fast && steps / 2 < a->iterations)
        return ex_fail(&a->d.error, "--iterations %lld do not fit --steps %lld: half of the steps are theirs",
                       (long long)a->iterations, (long long)steps);
    return split_patterns(a);
}

static const ex_demo_plan g_plan = {
    EX_BERT_PLAN,
    .name = "magnitude",
    .title = "apt.h: single weights, pruned by magnitude",
    .sizes = {.pretrain_steps = 800, .steps = 300, .corpus = 30000, .train = 4000, .dev = 500, .test = 2000},
    .fast = {.pretrain_steps = 40, .steps = 40, .corpus = 1500, .train = 1000, .dev = 100, .test = 200},
    .way_count = WAYS,
    .schedule = schedule,
    .trained = trained,
    .measured = measured,
    .concluded = concluded};

/* Rates of learning: a real checkpoint wants smaller steps than one that a demonstration made a minute ago. */
static void choose_plan(app *a)
{
    ex_demo_plan *plan = &a->plan;
    const bool files = a->files.p.model != NULL;
    if (a->steps > 0) plan->sizes.steps = a->steps;
    else if (files) plan->sizes.steps = 1000;
    if (a->batch > 0) plan->batch = (int32_t)a->batch;
    if (!(a->lr > 0)) a->lr = files ? 3e-4 : 1e-3;
    a->files.bert.words = !files && a->demo == 0;
    if (a->files.bert.words) {
        plan->load = (apt_load_desc)APT_ZERO;
        plan->sizes.train = plan->sizes.steps * plan->batch;
    }
    if (a->apt_lr > 0) plan->rate = (float)a->apt_lr;
    if (!files) return;
    ex_demo_files_plan(&a->files, &a->d, plan);
    plan->fast.steps = plan->fast.steps < plan->sizes.steps ? plan->fast.steps : plan->sizes.steps;
}

static int work(app *a)
{
    a->d.plan = &a->plan;
    a->d.user = a;
    a->plan.ways = a->way;
    name_ways(a);
    const int status = ex_demo_work(&a->d);
    for (int32_t way = 0; way < WAYS; way++) {
        free(a->name[way]);
        free(a->stage[way]);
    }
    ex_demo_files_free(&a->files);
    return status;
}

int main(int argc, char **argv)
{
    static app a;
    a.plan = g_plan;
    a.d.seed = 1;
    a.d.out = "build/magnitude-run";
    a.sparsity = 0.6;
    a.begin = 0.5;                    /* the more goes early, while the task is still being learned, the less it costs */
    a.last = 0.7;
    a.iterations = 5;
    const ex_arg table[] = {
        EX_GROUP("Data (none: the demonstration task)"),
        EX_DEMO_FILES_ROWS(&a.files),
        EX_TEXT("out", "DIR", &a.d.out, "folder for models, results.json and report.html"),
        EX_CHOICE("demo", &a.demo, "words|classes", "the task of the demonstration: masked words, or whether it is good news"),
        EX_GROUP("Pruning"),
        EX_REAL("sparsity", "X", &a.sparsity, 0.05, 0.95, "of magnitude at once and of APT"),
        EX_REAL("first", "X", &a.begin, 0.05, 0.95, "sparsity that the iterations start from: X (iterative/X)^(t/iterations)"),
        EX_REAL("iterative", "X", &a.last, 0.05, 0.95, "sparsity at their end"),
        EX_INT("iterations", "N", &a.iterations, 1, MOST_ITERATIONS, "how many of them"),
        EX_TEXT("patterns", "LIST", &a.patterns, "matrices whose names have one of these, * stands for anything; default: all "
                "linear maps of the layers"),
        EX_GROUP("Training"),
        EX_INT("steps", "N", &a.steps, 0, 1e9, "of each way; 0: 300, with files 1000"),
        EX_INT("batch", "N", &a.batch, 0, 1e6, "rows; 0: 32"),
        EX_REAL("lr", "X", &a.lr, 0, 1, "learning rate of all weights; 0: 1e-3, with files 3e-4"),
        EX_REAL("apt-lr", "X", &a.apt_lr, 0, 1, "learning rate of APT's adapters; 0: 2e-3"),
        EX_INT("seed", "N", &a.d.seed, 0, 1e9, "another corpus and another start"),
        EX_INT("threads", "N", &a.d.machine.threads, 0, 64, "threads to use; 0: all cores"),
        EX_FLAG("measure", &a.d.measure, "trains nothing: measures what an earlier run with the same options has left in --out"),
        EX_FLAG("fast", &a.d.fast, "a few seconds, for tests: everything runs, nothing is learned well"),
        EX_ARGS_END};
    static const ex_args_about about = {
        "magnitude", "Prunes single weights by magnitude, at once, in a pattern and step by step, and compares with APT.",
        "[options]",
        "  magnitude\n  magnitude --model minilm --train train.tsv --dev dev.tsv --steps 1000 --out sparse\n"};
    const ex_args_result parsed = ex_args_parse(table, &about, argc, argv, &a.d.error);
    if (parsed == EX_ARGS_HELP) return 0;
    bool fine = parsed == EX_ARGS_OK;
    if (fine) choose_plan(&a);
    fine = fine && check_options(&a);
    if (!fine) fprintf(stderr, "%s: %s\nTry --help.\n", about.program, a.d.error.text);
    const int status = fine ? work(&a) : 2;
    if (!fine) free(a.d.base);
    free(a.pattern_text);
    return status;
}
