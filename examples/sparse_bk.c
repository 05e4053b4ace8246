/* sparse_bk.c - what `make run-bk` runs: a small sequence model that learns which positions it can do without.

       cc -O2 examples/sparse_bk.c -o sparse_bk -lm -lpthread

   The task: sequences of 32 symbols, five of which are marks. For every position the model says how far away the nearest mark
   is: 0, 1, 2, 3 or more. Symbols become vectors, two BK layers follow (experts, and the BK-core, by which positions see each
   other), then a map to the four answers. Two runs of equal length are compared: one that masks nothing, and one that minimises
   the balanced loss, accuracy + weight * sparsity loss, where a scheduler raises target and weight and eases both while the
   validation loss is too high. In its first two thirds masks are drawn with Gumbel noise, then the threshold decides, as it
   will after training. The sparse run also gives up half of its experts, one of each layer at a time, and learns between two
   removals; what each has cost is shown. In its last sixth it computes with weights rounded to int8, which its matrices become
   in the end. What the table says is measured with the files that a network needs to run, OUT/dense/weights and so on, loaded
   again. No other file is needed; a run that was cut goes on with --resume, bit for bit: it writes a checkpoint at each of its
   twelve validations. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_cells.h"

enum {
    SYMBOLS = 32, MARKS = 5, CLASSES = 4, HIDDEN = 16, LAYERS = 2, EXPERTS = 4,
    LENGTH = 64, BATCH = 16, ROWS = LENGTH * BATCH, CHECKS = 12          /* batches of a validation */
};

/* Weights, gradients, the two moments of Adam */
enum { MOST = SYMBOLS * HIDDEN };
typedef struct matrix { int32_t n; float w[MOST], g[MOST], m[MOST], v[MOST]; } matrix;

typedef struct settings {
    int64_t seed, threads, steps, stop, experts;
    double target, weight, threshold, rate;
    int32_t loss, schedule, bits;
    const char *out;
    bool fast, resume;
} settings;

typedef struct checked { double loss, accuracy, sparsity; } checked;      /* on validation sequences */

/* A removal of experts from all layers: how many each had and has, the share of its choices that those which went had got, and
   validation losses before it, right behind it, and when the next one is due or the run is over. */
typedef struct removal {
    int64_t step;
    int32_t from, to;
    double lost[LAYERS], before, after, retrained;
} removal;
typedef struct removals { int64_t count; removal at[EXPERTS]; } removals;

/* A model while it learns. */
typedef struct run {
    const settings *set;
    const char *name;
    char *dir;
    bool sparse;
    apt_ctx *ctx;
    apt_module *layer[LAYERS];
    int32_t experts[LAYERS];          /* that the layers are made with */
    removals history;
    matrix embed, head;               /* (symbols, hidden), (classes, hidden + 1): the last column is the bias */
    apt_adaptive pressure;
    ex_log log;
    ex_error error;
    int64_t step, begun;              /* begun: the step at which this call of the program began */
    double seconds;                   /* of training since then */
    int32_t symbol[ROWS], answer[ROWS];
    float h[LAYERS + 1][ROWS * HIDDEN], dh[2][ROWS * HIDDEN], logits[ROWS * CLASSES];
} run;

static bool fine(run *r, apt_result result)
{
    return result == APT_OK || ex_fail(&r->error, "%s: %s: %s", r->name, apt_result_text(result), apt_error(r->ctx));
}

/* ------------------------------------------------------------------------------------------------ data */

/* Batch number `index` of training (stream 0) or validation (stream 1) sequences: the same ones in both runs. */
static void make_batch(run *r, int32_t stream, int64_t index)
{
    apt_rng rng = apt_rng_make((uint64_t)r->set->seed, (uint64_t)(2 * index + stream));
    for (int32_t at = 0; at < ROWS; at += LENGTH) {
        for (int32_t i = at; i < at + LENGTH; i++) r->symbol[i] = (int32_t)apt_rng_below(&rng, SYMBOLS);
        for (int32_t i = at; i < at + LENGTH; i++) {
            r->answer[i] = CLASSES - 1;
            for (int32_t far = CLASSES - 2; far >= 0; far--) {
                const bool left = i - far >= at && r->symbol[i - far] < MARKS;
                if (left || (i + far < at + LENGTH && r->symbol[i + far] < MARKS)) r->answer[i] = far;
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------ the model */

static void make_matrix(matrix *p, int32_t n, float size, apt_rng *rng)
{
    memset(p, 0, sizeof *p);
    p->n = n;
    for (int32_t i = 0; i < n; i++) p->w[i] = size * apt_rng_normal(rng);
}

/* Importances so large that no position is ever masked. */
static bool hold_open(run *r, const apt_module *layer)
{
    for (int32_t i = 0; i < apt_module_tensors(layer); i++) {
        apt_module_tensor t;
        if (!fine(r, apt_module_get(layer, i, &t))) return false;
        if (strcmp(t.name, "importance.1.bias") == 0) t.value[0] = 1000;
    }
    return true;
}

static bool make_model(run *r)
{
    apt_desc desc = APT_ZERO;
    apt_rng rng = apt_rng_make((uint64_t)r->set->seed, UINT64_MAX);
    desc.threads = (int32_t)r->set->threads;
    r->ctx = apt_create(&desc);
    if (r->ctx == NULL) return ex_fail(&r->error, "no memory");
    make_matrix(&r->embed, SYMBOLS * HIDDEN, 1, &rng);
    make_matrix(&r->head, CLASSES * (HIDDEN + 1), 0.25f, &rng);
    for (int32_t i = 0; i < LAYERS; i++) {
        apt_bk_layer_desc layer = APT_ZERO;
        layer.moe.hidden = HIDDEN;
        layer.moe.experts = r->experts[i];
        layer.seed = (uint64_t)r->set->seed + (uint64_t)i;
        if (!fine(r, apt_bk_layer_create(r->ctx, &layer, &r->layer[i]))) return false;
        if (!r->sparse && !hold_open(r, r->layer[i])) return false;
    }
    return true;
}

static bool forward(run *r, int32_t mode)
{
    for (int32_t i = 0; i < ROWS; i++) memcpy(r->h[0] + i * HIDDEN, r->embed.w + r->symbol[i] * HIDDEN, HIDDEN * sizeof(float));
    for (int32_t k = 0; k < LAYERS; k++)
        if (!fine(r, apt_bk_layer_forward(r->layer[k], r->h[k + 1], r->h[k], BATCH, LENGTH, mode))) return false;
    for (int32_t i = 0; i < ROWS; i++)
        for (int32_t c = 0; c < CLASSES; c++) {
            const float *w = r->head.w + c * (HIDDEN + 1), *h = r->h[LAYERS] + i * HIDDEN;
            float sum = w[HIDDEN];
            for (int32_t k = 0; k < HIDDEN; k++) sum += w[k] * h[k];
            r->logits[i * CLASSES + c] = sum;
        }
    return true;
}

/* Mean cross-entropy. Logits become their gradients; *right counts positions whose best answer is the right one. */
static double cross_entropy(run *r, int64_t *right)
{
    double loss = 0;
    for (int32_t i = 0; i < ROWS; i++) {
        float *z = r->logits + i * CLASSES;
        double p[CLASSES], sum = 0;
        int32_t best = 0;
        for (int32_t c = 1; c < CLASSES; c++) best = z[c] > z[best] ? c : best;
        for (int32_t c = 0; c < CLASSES; c++) sum += p[c] = exp((double)z[c] - (double)z[best]);
        *right += best == r->answer[i];
        loss -= log(p[r->answer[i]] / sum) / ROWS;
        for (int32_t c = 0; c < CLASSES; c++) z[c] = (float)((p[c] / sum - (c == r->answer[i])) / ROWS);
    }
    return loss;
}

static bool backward(run *r)
{
    float *dh = r->dh[0], *dx = r->dh[1];
    memset(dh, 0, sizeof r->dh[0]);
    for (int32_t i = 0; i < ROWS; i++)
        for (int32_t c = 0; c < CLASSES; c++) {
            const float dz = r->logits[i * CLASSES + c], *w = r->head.w + c * (HIDDEN + 1), *h = r->h[LAYERS] + i * HIDDEN;
            float *g = r->head.g + c * (HIDDEN + 1);
            for (int32_t k = 0; k < HIDDEN; k++) dh[i * HIDDEN + k] += dz * w[k], g[k] += dz * h[k];
            g[HIDDEN] += dz;
        }
    for (int32_t k = LAYERS - 1; k >= 0; k--) {
        float *swap = dh;
        if (!fine(r, apt_bk_layer_backward(r->layer[k], dx, dh, r->h[k], BATCH, LENGTH))) return false;
        dh = dx;
        dx = swap;
    }
    for (int32_t i = 0; i < ROWS; i++)
        for (int32_t k = 0; k < HIDDEN; k++) r->embed.g[r->symbol[i] * HIDDEN + k] += dh[i * HIDDEN + k];
    return true;
}

static void adam(matrix *p, float rate, int64_t step)
{
    const float size = rate * (float)(sqrt(1 - pow(0.999, (double)step)) / (1 - pow(0.9, (double)step)));
    for (int32_t i = 0; i < p->n; i++) {
        p->m[i] += 0.1f * (p->g[i] - p->m[i]);
        p->v[i] += 0.001f * (p->g[i] * p->g[i] - p->v[i]);
        p->w[i] -= size * p->m[i] / (sqrtf(p->v[i]) + 1e-8f);
        p->g[i] = 0;
    }
}

/* ------------------------------------------------------------------------------------------------ weights as bytes */

/* A file in memory, written or read by the same calls. */
typedef struct archive { bool reading; ex_text text; size_t at; } archive;

static bool field(archive *a, void *value, size_t bytes)
{
    if (!a->reading) ex_text_add(&a->text, (const char *)value, bytes);
    else if (bytes > a->text.length - a->at) return false;
    else memcpy(value, a->text.at + a->at, bytes);
    a->at += bytes;
    return true;
}

/* rows x cols weights that begin ld apart: floats, or (matrices) small integers and their scales. The latter are read as what
   they stand for. */
static bool map_field(run *r, archive *a, int32_t bits, float *w, int64_t ld, int64_t rows, int64_t cols)
{
    if (bits == APT_QUANT_NONE || rows == 1 || cols == 1) {
        bool good = true;
        for (int64_t i = 0; good && i < rows; i++) good = field(a, w + i * ld, (size_t)cols * sizeof *w);
        return good;
    }
    const size_t bytes = (size_t)apt_quant_bytes(bits, rows, cols), scales = (size_t)apt_quant_scales(bits, rows, cols);
    void *q = ex_alloc(bytes, 1);
    float *scale = (float *)ex_alloc(scales, sizeof *scale);
    bool good = a->reading || (fine(r, apt_quant_absmax(r->ctx, bits, scale, w, ld, rows, cols)) &&
                               fine(r, apt_quantize(r->ctx, bits, q, scale, w, ld, rows, cols)));
    good = good && field(a, scale, scales * sizeof *scale) && field(a, q, bytes);
    good = good && (!a->reading || fine(r, apt_dequantize(r->ctx, bits, w, ld, q, scale, rows, cols)));
    free(q);
    free(scale);
    return good;
}

static bool weights_fields(run *r, archive *a, int32_t bits)
{
    bool good = map_field(r, a, bits, r->embed.w, HIDDEN, SYMBOLS, HIDDEN) &&
                map_field(r, a, bits, r->head.w, HIDDEN + 1, CLASSES, HIDDEN) &&
                map_field(r, a, bits, r->head.w + HIDDEN, HIDDEN + 1, CLASSES, 1);
    for (int32_t k = 0; k < LAYERS; k++)
        for (int32_t i = 0; good && i < apt_module_tensors(r->layer[k]); i++) {
            apt_module_tensor t;
            good = fine(r, apt_module_get(r->layer[k], i, &t)) && map_field(r, a, bits, t.value, t.cols, t.rows, t.cols);
        }
    return good;
}

/* In the last sixth of the sparse run all passes compute with what the small integers will be (quantisation-aware training): put
   in place of the weights, which *floats keeps until unround_weights. No weight is cut off, so gradients go straight through. */
static bool round_weights(run *r, archive *floats)
{
    archive small = {false, {NULL, 0, 0}, 0};
    memset(floats, 0, sizeof *floats);
    if (!r->sparse || 6 * r->step < 5 * r->set->steps) return true;
    bool good = weights_fields(r, floats, APT_QUANT_NONE) && weights_fields(r, &small, r->set->bits);
    small.reading = true;
    small.at = 0;
    good = good && weights_fields(r, &small, r->set->bits);
    ex_text_free(&small.text);
    return good;
}

static bool unround_weights(run *r, archive *floats)
{
    const bool rounded = floats->at > 0;
    floats->reading = true;
    floats->at = 0;
    const bool good = !rounded || weights_fields(r, floats, APT_QUANT_NONE);
    ex_text_free(&floats->text);
    return good;
}

/* ------------------------------------------------------------------------------------------------ training */

/* The first two thirds draw their masks, then the threshold decides. */
static int32_t mode_of(const run *r, int64_t step)
{
    return 3 * step < 2 * r->set->steps ? APT_MASK_SAMPLE : APT_MASK_FIXED;
}

static bool look(run *r, checked *c)
{
    int64_t right = 0;
    memset(c, 0, sizeof *c);
    for (int32_t i = 0; i < CHECKS; i++) {
        make_batch(r, 1, i);
        if (!forward(r, APT_MASK_FIXED)) return false;
        c->loss += cross_entropy(r, &right) / CHECKS;
        for (int32_t k = 0; k < LAYERS; k++) {
            apt_bk_stats stats;
            if (!fine(r, apt_module_stats(r->layer[k], &stats))) return false;
            c->sparsity += stats.sparsity / (CHECKS * LAYERS);
        }
    }
    c->accuracy = (double)right / (CHECKS * ROWS);
    return true;
}

static bool validate(run *r, checked *c)
{
    archive floats;
    const bool good = round_weights(r, &floats) && look(r, c);
    return unround_weights(r, &floats) && good;
}

/* Forward, balanced loss, backward. *total is the balanced loss, *sparsity that of the step's masks. */
static bool passes(run *r, double *total, double *sparsity)
{
    const double weight = r->sparse ? (double)r->pressure.weight : 0;
    int64_t right = 0;
    make_batch(r, 0, r->step);
    if (!forward(r, mode_of(r, r->step))) return false;
    const double loss = cross_entropy(r, &right);
    *total = loss;
    *sparsity = 0;
    for (int32_t k = 0; k < LAYERS; k++) {
        apt_balanced b;
        apt_bk_stats stats;
        if (!fine(r, apt_module_balanced_loss(r->layer[k], &b, r->set->loss, r->pressure.target, loss, 1, weight)) ||
            !fine(r, apt_module_stats(r->layer[k], &stats))) return false;
        *total += b.sparsity_part;
        *sparsity += stats.sparsity / LAYERS;
    }
    return backward(r);
}

static bool train_step(run *r, double *total, double *sparsity)
{
    const float rate = (float)r->set->rate * (float)(r->set->steps - r->step) / (float)r->set->steps;
    archive floats;
    const bool good = round_weights(r, &floats) && passes(r, total, sparsity);
    if (!unround_weights(r, &floats) || !good) return false;
    r->step++;
    adam(&r->embed, rate, r->step);
    adam(&r->head, rate, r->step);
    for (int32_t k = 0; k < LAYERS; k++)
        if (!fine(r, apt_module_adam(r->layer[k], rate, r->step))) return false;
    return true;
}

/* Removes what the schedule wants to be gone by now, from all layers alike. */
static bool remove_experts(run *r, const apt_expert_schedule *plan, removal *now)
{
    checked c;
    if (!validate(r, &c)) return false;
    now->before = c.loss;
    for (int32_t k = 0; k < LAYERS; k++) {
        apt_module *moe = apt_bk_layer_moe(r->layer[k]);
        apt_expert_event event;
        if (!fine(r, apt_moe_progress(moe, plan, r->step, NULL)) ||
            !fine(r, apt_moe_event(moe, apt_moe_events(moe) - 1, &event))) return false;
        now->from = event.before;
        now->to = event.after;
        now->lost[k] = event.lost_share;
    }
    if (!validate(r, &c)) return false;
    now->step = r->step;
    now->after = now->retrained = c.loss;
    return true;
}

/* In the sparse run experts go in the second third; those that stay have the steps between to learn what the others did. */
static bool thin_out(run *r, ex_progress *bar)
{
    const settings *s = r->set;
    const apt_expert_schedule plan = {EXPERTS, (int32_t)s->experts, s->steps / 3, s->steps * 2 / 3 - 1};
    removals *h = &r->history;
    removal *now = &h->at[h->count];
    int32_t there = EXPERTS, wanted = EXPERTS;
    if (!r->sparse || mode_of(r, r->step) != APT_MASK_SAMPLE) return true;
    if (!fine(r, apt_moe_usage(apt_bk_layer_moe(r->layer[0]), &there, NULL, 0)) ||
        !fine(r, apt_expert_count(&plan, r->step, &wanted))) return false;
    if (wanted >= there) return true;
    if (!remove_experts(r, &plan, now)) return false;
    if (h->count > 0) now[-1].retrained = now->before;
    h->count++;
    ex_progress_note(bar, "  step %5lld  %d -> %d experts a layer: loss %.3f -> %.3f", (long long)now->step, (int)now->from,
                     (int)now->to, now->before, now->after);
    ex_log_begin(&r->log, "experts");
    ex_log_int(&r->log, "step", now->step);
    ex_log_int(&r->log, "before", now->from);
    ex_log_int(&r->log, "after", now->to);
    ex_log_real(&r->log, "loss_before", now->before);
    ex_log_real(&r->log, "loss_after", now->after);
    return ex_log_end(&r->log, &r->error);
}

/* ------------------------------------------------------------------------------------------------ checkpoints */

/* Gradients are 0 between two steps. */
static bool matrix_fields(archive *a, matrix *p)
{
    return field(a, p->w, sizeof p->w) && field(a, p->m, sizeof p->m) && field(a, p->v, sizeof p->v);
}

/* A layer and its length. The library looks at what it gets: size, check sum, shapes. */
static bool layer_field(run *r, archive *a, apt_module *layer)
{
    int64_t bytes = apt_module_bytes(layer);
    if (!field(a, &bytes, sizeof bytes)) return false;
    if (a->reading) {
        if (bytes < 0 || (uint64_t)bytes > a->text.length - a->at) return false;
        if (!fine(r, apt_module_restore(layer, a->text.at + a->at, (size_t)bytes))) return false;
    } else {
        ex_text_reserve(&a->text, (size_t)bytes);
        if (!fine(r, apt_module_save(layer, a->text.at + a->at, (size_t)bytes))) return false;
        a->text.length += (size_t)bytes;
    }
    a->at += (size_t)bytes;
    return true;
}

static bool fields(run *r, archive *a)
{
    unsigned char pressure[APT_ADAPTIVE_BYTES];
    if (!a->reading && !fine(r, apt_adaptive_save(&r->pressure, pressure, sizeof pressure))) return false;
    if (!field(a, pressure, sizeof pressure)) return false;
    if (a->reading && apt_adaptive_restore(&r->pressure, pressure, sizeof pressure) != APT_OK) return false;
    if (!field(a, &r->step, sizeof r->step) || !field(a, &r->history, sizeof r->history)) return false;
    if (r->history.count < 0 || r->history.count >= EXPERTS) return false;
    if (!matrix_fields(a, &r->embed) || !matrix_fields(a, &r->head)) return false;
    for (int32_t k = 0; k < LAYERS; k++)
        if (!layer_field(r, a, r->layer[k])) return false;
    return true;
}

/* What a run cannot change on the way: the first line of its checkpoint. */
static char *settings_line(const settings *s)
{
    return ex_format("sparse_bk 2: seed %lld, steps %lld, lr %g, target %g, weight %g, threshold %g, loss %d, schedule %d, "
                     "experts %lld, %s\n", (long long)s->seed, (long long)s->steps, s->rate, s->target, s->weight, s->threshold,
                     (int)s->loss, (int)s->schedule, (long long)s->experts, apt_quant_kind_name(s->bits));
}

static bool save(run *r)
{
    archive a = {false, {NULL, 0, 0}, 0};
    char *path = ex_path(r->dir, "checkpoint"), *line = settings_line(r->set);
    const bool good = field(&a, line, strlen(line)) && fields(r, &a) && ex_write_file(path, a.text.at, a.text.length, &r->error);
    ex_text_free(&a.text);
    free(line);
    free(path);
    return good;
}

static bool load(run *r)
{
    archive a = {true, {NULL, 0, 0}, 0};
    char *path = ex_path(r->dir, "checkpoint"), *line = settings_line(r->set);
    const size_t length = strlen(line);
    a.text.at = ex_read_file(path, &a.text.length, &r->error);
    bool good = a.text.at != NULL;
    if (good && (a.text.length < length || memcmp(a.text.at, line, length) != 0))
        good = ex_fail(&r->error, "%s: expected the checkpoint of \"%.*s\"", path, (int)length - 1, line);
    a.at = length;
    if (good && (!fields(r, &a) || a.at != a.text.length || r->step < 0 || r->step > r->set->steps))
        good = ex_fail(&r->error, "%s: damaged%s%s", path, r->error.text[0] != 0 ? ": " : "", apt_error(r->ctx));
    free(a.text.at);
    free(line);
    free(path);
    return good;
}

/* ------------------------------------------------------------------------------------------------ the weights alone */

/* What comes first in the file: how the weights are stored and how many experts the layers have. */
static const char g_weights[] = "sparse_bk weights 1\n";
static bool weights_head(archive *a, char *line, int32_t *bits, int32_t *experts)
{
    return field(a, line, sizeof g_weights - 1) && field(a, bits, sizeof *bits) && field(a, experts, LAYERS * sizeof *experts);
}

/* Into dir/weights. */
static bool write_weights(run *r, const char *dir, int32_t bits)
{
    archive a = {false, {NULL, 0, 0}, 0};
    char *path = ex_path(dir, "weights"), line[sizeof g_weights];
    int32_t experts[LAYERS];
    bool good = ex_make_dirs(dir, &r->error);
    memcpy(line, g_weights, sizeof line);
    for (int32_t k = 0; good && k < LAYERS; k++)
        good = fine(r, apt_moe_usage(apt_bk_layer_moe(r->layer[k]), &experts[k], NULL, 0));
    good = good && weights_head(&a, line, &bits, experts) && weights_fields(r, &a, bits) &&
           ex_write_file(path, a.text.at, a.text.length, &r->error);
    ex_text_free(&a.text);
    free(path);
    return good;
}

/* A model with the weights of dir/weights; *bytes of the file. */
static bool read_weights(run *r, const char *dir, size_t *bytes)
{
    archive a = {true, {NULL, 0, 0}, 0};
    char *path = ex_path(dir, "weights"), line[sizeof g_weights] = "";
    int32_t bits = 0;
    a.text.at = ex_read_file(path, &a.text.length, &r->error);
    bool good = a.text.at != NULL;
    if (good && (!weights_head(&a, line, &bits, r->experts) || strcmp(line, g_weights) != 0))
        good = ex_fail(&r->error, "%s: no weights of this program", path);
    good = good && make_model(r);
    if (good && (!weights_fields(r, &a, bits) || a.at != a.text.length))
        good = ex_fail(&r->error, "%s: damaged%s%s", path, r->error.text[0] != 0 ? ": " : "", apt_error(r->ctx));
    *bytes = a.text.length;
    free(a.text.at);
    free(path);
    return good;
}

/* ------------------------------------------------------------------------------------------------ a run */

static bool note(run *r, const checked *c)
{
    ex_log_begin(&r->log, "evaluate");
    ex_log_int(&r->log, "step", r->step);
    ex_log_real(&r->log, "loss", c->loss);
    ex_log_real(&r->log, "accuracy", c->accuracy);
    ex_log_real(&r->log, "mask_sparsity", c->sparsity);
    return ex_log_end(&r->log, &r->error);
}

static bool note_step(run *r, double total, double sparsity)
{
    ex_log_begin(&r->log, "step");
    ex_log_int(&r->log, "step", r->step);
    ex_log_real(&r->log, "loss", total);
    ex_log_real(&r->log, "sparsity", sparsity);
    if (r->sparse) ex_log_real(&r->log, "sparsity_target", (double)r->pressure.target);
    if (r->sparse) ex_log_real(&r->log, "sparsity_weight", (double)r->pressure.weight);
    return ex_log_end(&r->log, &r->error);
}

static int64_t last_step(const settings *s)
{
    return s->stop > 0 && s->stop < s->steps ? s->stop : s->steps;
}

static double speed(const run *r)
{
    return r->seconds > 0 ? (double)((r->step - r->begun) * ROWS) / r->seconds : 0;
}

static bool train(run *r)
{
    const int64_t every = r->set->steps >= 12 ? r->set->steps / 12 : 1;
    ex_progress bar;
    bool good = true;
    memset(&bar, 0, sizeof bar);
    ex_progress_begin(&bar, r->name, r->step, r->set->steps);
    while (good && r->step < last_step(r->set)) {
        const double start = ex_seconds();
        const bool check = (r->step + 1) % every == 0;
        double total = 0, sparsity = 0;
        checked c;
        good = train_step(r, &total, &sparsity);
        r->seconds += ex_seconds() - start;
        const ex_progress_values values = {total, sparsity, speed(r)};
        good = good && note_step(r, total, sparsity) && (!check || (validate(r, &c) && note(r, &c)));
        good = good && fine(r, apt_adaptive_step(&r->pressure, r->step, check ? &c.loss : NULL)) && thin_out(r, &bar);
        if (good && check) {
            ex_progress_note(&bar, "  step %5lld  loss %.3f  accuracy %5.1f %%  masked %4.1f %%", (long long)r->step, c.loss,
                             100 * c.accuracy, 100 * c.sparsity);
            if (r->sparse) ex_progress_note(&bar, "              target %.1f %%, weight %.3f%s", 100 * (double)r->pressure.target,
                                            (double)r->pressure.weight, r->pressure.eased ? ", eased: the loss is too high" : "");
            good = save(r);
        }
        ex_progress_update(&bar, r->step, &values);
    }
    ex_progress_end(&bar);
    return good;
}

static run *new_run(const settings *set, const char *name, bool sparse)
{
    run *r = (run *)ex_alloc(1, sizeof(run));
    memset(r, 0, sizeof *r);
    r->set = set;
    r->name = name;
    r->sparse = sparse;
    r->dir = ex_path(set->out, name);
    for (int32_t k = 0; k < LAYERS; k++) r->experts[k] = EXPERTS;
    return r;
}

static void free_run(run *r)
{
    ex_log_close(&r->log);
    apt_destroy(r->ctx);
    free(r->dir);
    free(r);
}

/* The cells of a model that was read from its file. */
static bool cells_of(run *r, size_t bytes, ex_cells *cells)
{
    int64_t parameters = r->embed.n + r->head.n;
    int32_t experts = 0;
    char size[32];
    checked c;
    const double start = ex_seconds();
    if (!validate(r, &c)) return false;
    const double inference = CHECKS * ROWS / (ex_seconds() - start);
    for (int32_t k = 0; k < LAYERS; k++) {
        parameters += apt_module_parameters(r->layer[k]);
        experts += r->experts[k];
    }
    ex_cell(cells, "accuracy", "%.1f %%", 100 * c.accuracy);
    ex_cell(cells, "loss", "%.4f", c.loss);
    ex_cell(cells, "positions masked", "%.1f %%", 100 * c.sparsity);
    if (r->sparse) ex_cell(cells, "target", "%.1f %%", 100 * r->set->target);
    ex_cell(cells, "experts", "%d of %d", (int)experts, LAYERS * EXPERTS);
    ex_cell(cells, "parameters", "%lld", (long long)parameters);
    ex_cell(cells, "on disk", "%s", ex_bytes_text(size, sizeof size, (double)bytes));
    ex_cell(cells, "inference", "%.0f k positions/s", inference / 1e3);
    return true;
}

/* Writes the weights of a run that is done, as floats or small integers, reads them again and measures. */
static bool measure(run *r, const char *name, int32_t bits, ex_cells *cells)
{
    run *m = new_run(r->set, name, r->sparse);
    size_t bytes = 0;
    const bool good = write_weights(r, m->dir, bits) && (read_weights(m, m->dir, &bytes) && cells_of(m, bytes, cells));
    if (!good && r->error.text[0] == 0) r->error = m->error;
    free_run(m);
    return good;
}

/* What only the run itself knows, and the loss of its last step as that of the experts that are left. */
static bool finish(run *r, ex_cells *cells)
{
    checked c;
    if (!measure(r, r->name, APT_QUANT_NONE, cells)) return false;
    if (r->sparse) ex_cell(cells, "times eased", "%lld", (long long)r->pressure.eased_count);
    if (r->step > r->begun) ex_cell(cells, "training", "%.0f k positions/s", speed(r) / 1e3);
    if (r->history.count > 0) {
        if (!validate(r, &c)) return false;
        r->history.at[r->history.count - 1].retrained = c.loss;
    }
    ex_log_begin(&r->log, "result");
    for (int32_t i = 0; i < cells->count; i++) ex_log_text(&r->log, cells->at[i].name, cells->at[i].value);
    return ex_log_end(&r->log, &r->error);
}

static bool begin(run *r)
{
    apt_adaptive_desc desc = APT_ZERO;
    const settings *s = r->set;
    char *path = ex_path(r->dir, "checkpoint"), *log = ex_path(r->dir, "metrics.jsonl");
    const bool go_on = s->resume && ex_file_exists(path);
    desc.kind = s->schedule;
    desc.steps = s->steps * 2 / 3;    /* the rest of the run is at the target */
    desc.warmup = desc.steps / 5 > 0 ? desc.steps / 5 : -1;
    desc.sparsity_first = 0.1f * (float)s->target;
    desc.sparsity_last = (float)s->target;
    desc.weight_first = 0.1f * (float)s->weight;
    desc.weight_last = (float)s->weight;
    desc.threshold = (float)s->threshold;
    const apt_result result = apt_adaptive_init(&r->pressure, &desc);
    bool good = result == APT_OK || ex_fail(&r->error, "the scheduler refuses these settings: %s", apt_result_text(result));
    good = good && ex_make_dirs(r->dir, &r->error) && make_model(r) && (!go_on || load(r));
    good = good && ex_log_open(&r->log, log, go_on ? r->step : -1, &r->error);
    r->begun = r->step;
    if (good && go_on) printf("%s goes on at step %lld.\n", r->name, (long long)r->step);
    free(path);
    free(log);
    return good;
}

/* The two runs, and what becomes of the sparse one's weights, as columns of the table. */
enum { DENSE, SPARSE, NARROW, COLUMNS };
typedef struct results { ex_cells cells[COLUMNS]; removals history; } results;

/* One of the two runs from its beginning to its columns. */
static bool whole_run(const settings *set, bool sparse, results *all, ex_error *error)
{
    run *r = new_run(set, sparse ? "sparse" : "dense", sparse);
    ex_cells *cells = &all->cells[sparse ? SPARSE : DENSE];
    cells->run = r->name;
    bool good = begin(r) && train(r);
    if (good && r->step == set->steps) {
        good = finish(r, cells);
        if (good && sparse) {
            ex_cells *narrow = &all->cells[NARROW];
            all->history = r->history;
            narrow->run = apt_quant_kind_name(set->bits);
            good = measure(r, narrow->run, set->bits, narrow);
        }
    }
    if (!good) *error = r->error;
    free_run(r);
    return good;
}

/* The removals of experts, on the screen and as rows of the report. */
static void show_history(const removals *h, ex_report *report)
{
    if (h->count > 0) printf("\nExperts of the sparse run's layers, and its validation loss:\n");
    for (int64_t i = 0; i < h->count; i++) {
        const removal *at = &h->at[i];
        ex_text text = {NULL, 0, 0};
        char *name = ex_format("step %lld", (long long)at->step);
        ex_text_format(&text, "%d -> %d, which had", (int)at->from, (int)at->to);
        for (int32_t k = 0; k < LAYERS; k++) ex_text_format(&text, "%s %.1f %%", k > 0 ? " and" : "", 100 * at->lost[k]);
        ex_text_format(&text, " of the choices: %.4f, pruned %.4f, retrained %.4f", at->before, at->after, at->retrained);
        printf("  %s: %s\n", name, text.at);
        ex_report_result(report, "sparse", name, text.at);
        ex_text_free(&text);
        free(name);
    }
}

static bool conclude(const settings *set, const results *all, ex_error *error)
{
    ex_report *report = ex_report_create("Learned sparsity: BK layers");
    char *path = ex_path(set->out, "report.html");
    bool good = true;
    for (int32_t i = 0; i < COLUMNS; i++) {
        ex_cells_report(&all->cells[i], report);
        if (i == NARROW) continue;    /* nothing was trained */
        char *log = ex_format("%s/%s/metrics.jsonl", set->out, all->cells[i].run);
        good = good && ex_report_add_metrics(report, all->cells[i].run, log, error);
        free(log);
    }
    if (good) show_history(&all->history, report);
    good = good && ex_report_write(report, path, error);
    if (good) {
        printf("\n");
        ex_cells_print(all->cells, COLUMNS, stdout);
        printf("\nMeasured with the files of weights, loaded again, on %d sequences that no step has seen, masks by their\n"
               "threshold. The sparse run learned in the end for its %s weights, not for those as floats. Curves: %s\n",
               CHECKS * BATCH, all->cells[NARROW].run, path);
    }
    ex_report_free(report);
    free(path);
    return good;
}

int main(int argc, char **argv)
{
    settings s = {1, 0, 1200, 0, EXPERTS / 2, 0.75, 3, 0.35, 0.004, APT_SPARSITY_L2, APT_ADAPTIVE_COSINE, 0,
                  "build/sparse_bk-run", false, false};
    ex_error error = {{0}};
    const ex_arg table[] = {
        EX_GROUP("Training"),
        EX_INT("steps", "N", &s.steps, 1, 1e6, "steps of each of the two runs"),
        EX_REAL("lr", "X", &s.rate, 0, 1, "learning rate at the beginning; it falls to 0"),
        EX_GROUP("Sparsity"),
        EX_REAL("target", "X", &s.target, 0.01, 0.99, "share of the positions that are to be masked"),
        EX_REAL("weight", "X", &s.weight, 1e-6, 1e3, "of the sparsity loss, at the end of the schedule"),
        EX_REAL("threshold", "X", &s.threshold, 0, 100, "validation loss above which the pressure is eased; 0: never"),
        EX_CHOICE("loss", &s.loss, "l2|l1|kl|huber", "sparsity loss"),
        EX_CHOICE("schedule", &s.schedule, "linear|cosine|step", "curve of target and weight"),
        EX_GROUP("Smaller"),
        EX_INT("experts", "N", &s.experts, 1, EXPERTS, "that each layer of the sparse run has left in the end"),
        EX_CHOICE("bits", &s.bits, "int8|int4", "what its matrices become then"),
        EX_GROUP("Run"),
        EX_INT("seed", "N", &s.seed, 0, 1e9, "other sequences and another start"),
        EX_INT("threads", "N", &s.threads, 0, 64, "threads to use; 0: all cores"),
        EX_TEXT("out", "DIR", &s.out, "folder for checkpoints, metrics.jsonl and the report"),
        EX_FLAG("fast", &s.fast, "60 steps, for tests: everything runs, nothing is learned well"),
        EX_INT("stop", "N", &s.stop, 0, 1e6, "both runs end after this step, as if they were interrupted; 0: they do not"),
        EX_FLAG("resume", &s.resume, "go on from the checkpoints in --out"),
        EX_ARGS_END};
    const ex_args_about about = {"sparse_bk", "BK layers learn which positions of a sequence they can do without.", "[options]",
                                 "  sparse_bk\n  sparse_bk --target 0.7 --loss kl --out /tmp/bk\n"};
    const ex_args_result parsed = ex_args_parse(table, &about, argc, argv, &error);
    const double start = ex_seconds();
    static results all;
    char time[32];
    if (parsed == EX_ARGS_HELP) return 0;
    if (s.fast) s.steps = 60;
    s.bits++;                         /* the choices are those of APT_QUANT_* without the first */
    if (parsed == EX_ARGS_OK)
        printf("How far is the nearest mark? %d positions, %d layers, two runs of %lld steps.\n", LENGTH, LAYERS,
               (long long)s.steps);
    const bool good = parsed == EX_ARGS_OK && whole_run(&s, false, &all, &error) && whole_run(&s, true, &all, &error) &&
                      (last_step(&s) < s.steps || conclude(&s, &all, &error));
    if (good && last_step(&s) < s.steps) printf("Stopped at step %lld; --resume goes on.\n", (long long)s.stop);
    else if (good) printf("Done in %s.\n", ex_time_text(time, sizeof time, ex_seconds() - start));
    else fprintf(stderr, "sparse_bk: %s\n", error.text);
    return good ? 0 : parsed == EX_ARGS_OK ? 1 : 2;
}
