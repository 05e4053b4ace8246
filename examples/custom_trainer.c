/* cc -O2 examples/custom_trainer.c -o custom_trainer -lm

   The core of apt.h inside somebody else's trainer. Network, data and training loop are this file's own: a residual MLP is
   trained, then tuned for a related task with UP and DOWN frozen, while the core prunes neurons and hidden dimensions, cuts
   the arrays down for real, and lets the adapter of UP grow. What an existing trainer has to add are the apt_ calls. */
#define APT_ONLY_CORE
#define APT_IMPLEMENTATION
#include "../apt.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CHECK(call) ((call) == APT_OK ? (void)0 : (fprintf(stderr, "line %d failed: %s\n", __LINE__, #call), exit(1)))
enum { ROWS = 48, PRETRAIN = 1500, TUNE = 1500, EVERY = 50, MAX_RANK = 8, UNITS = 64 + 32 };
static const apt_schedule schedule = {APT_SCHEDULE_CUBIC, 0.7f, 0, 100, 900, NULL, NULL, 0};   /* 70 % of UP and DOWN go */
/* h0 = EMBED x;  h1 = h0 + DOWN relu((UP + 2 B A) h0);  logits = HEAD h1.  EMBED stays as it is drawn. */
enum { INPUT, HIDDEN, NEURON, CLASS, RANK, AXES };
enum { EMBED, UP, DOWN, HEAD, A, B, MATRICES };
static const int axis_of[MATRICES][2] = {{HIDDEN, INPUT}, {NEURON, HIDDEN}, {HIDDEN, NEURON},
                                         {CLASS, HIDDEN}, {RANK, HIDDEN}, {NEURON, RANK}};
typedef struct matrix { int frozen; float w[64 * 32], g[64 * 32], m[64 * 32]; } matrix;     /* W, dL/dW, momentum */
typedef struct net {
    int32_t size[AXES];                                                       /* shrinks with the network */
    matrix p[MATRICES];
    float x[ROWS * 6], h0[ROWS * 32], u[ROWS * 64], act[ROWS * 64], h1[ROWS * 32], xa[ROWS * MAX_RANK];
    float mask[UNITS], abs_act[UNITS], abs_grad[UNITS];                       /* units: neurons, then hidden dimensions */
    uint8_t keep[UNITS];
} net;
static int rows(const net *n, int m) { return n->size[axis_of[m][0]]; }
static int cols(const net *n, int m) { return n->size[axis_of[m][1]]; }
static apt_adapter adapter(const net *n, float *a, float *b)
{ return (apt_adapter){a, b, n->size[RANK], n->size[HIDDEN], n->size[NEURON], 2.0f}; }

static void linear(const net *n, int m, float *y, const float *x)             /* y += x W^T */
{
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < rows(n, m); o++)
            for (int i = 0; i < cols(n, m); i++) y[r * rows(n, m) + o] += x[r * cols(n, m) + i] * n->p[m].w[o * cols(n, m) + i];
}

static void linear_backward(net *n, int m, float *dx, const float *dy, const float *x)   /* dx += dy W;  dW += dy^T x */
{
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < rows(n, m); o++)
            for (int i = 0, at = o * cols(n, m); i < cols(n, m); i++, at++) {
                dx[r * cols(n, m) + i] += dy[r * rows(n, m) + o] * n->p[m].w[at];
                if (!n->p[m].frozen) n->p[m].g[at] += dy[r * rows(n, m) + o] * x[r * cols(n, m) + i];
            }
}

static void forward(net *n, float *logits)
{
    const int d = n->size[HIDDEN], f = n->size[NEURON];
    const apt_adapter t = adapter(n, n->p[A].w, n->p[B].w);
    memset(n->h0, 0, sizeof n->h0), memset(n->u, 0, sizeof n->u), memset(n->h1, 0, sizeof n->h1);
    linear(n, EMBED, n->h0, n->x);
    for (int i = 0; i < ROWS * d; i++) n->h0[i] *= n->mask[f + i % d];
    linear(n, UP, n->u, n->h0);
    CHECK(apt_adapter_forward(&t, n->u, f, n->xa, n->h0, d, ROWS));
    for (int i = 0; i < ROWS * f; i++) n->act[i] = n->u[i] > 0 ? n->u[i] * n->mask[i % f] : 0;
    linear(n, DOWN, n->h1, n->act);
    for (int i = 0; i < ROWS * d; i++) n->h1[i] = n->h0[i] + n->h1[i] * n->mask[f + i % d];
    linear(n, HEAD, logits, n->h1);
}

static void backward(net *n, const float *dlogits)
{
    const int d = n->size[HIDDEN], f = n->size[NEURON];
    const apt_adapter t = adapter(n, n->p[A].w, n->p[B].w);
    float dh[ROWS * 32] = {0}, da[ROWS * 64] = {0}, dxa[ROWS * MAX_RANK];
    linear_backward(n, HEAD, dh, dlogits, n->h1);
    CHECK(apt_abs_sum(n->abs_act + f, n->h1, d, ROWS, d));                    /* for the salience of hidden dimensions ... */
    CHECK(apt_abs_sum(n->abs_grad + f, dh, d, ROWS, d));
    for (int i = 0; i < ROWS * d; i++) dh[i] *= n->mask[f + i % d];
    linear_backward(n, DOWN, da, dh, n->act);
    CHECK(apt_abs_sum(n->abs_act, n->act, f, ROWS, f));                       /* ... and of neurons */
    CHECK(apt_abs_sum(n->abs_grad, da, f, ROWS, f));
    for (int i = 0; i < ROWS * f; i++) da[i] = n->u[i] > 0 ? da[i] * n->mask[i % f] : 0;
    linear_backward(n, UP, dh, da, n->h0);                                    /* (EMBED below needs no gradient) */
    CHECK(apt_adapter_backward(&t, NULL, 0, n->p[A].g, n->p[B].g, dxa, da, f, n->h0, d, n->xa, ROWS));
}

/* Two XORs of four inputs; `shift` makes the second task a relative of the first. rate 0: only the accuracy. */
static double run(net *n, apt_rng *rng, float shift, float rate, int batches)
{
    int hits = 0;
    for (int k = 0; k < batches; k++) {
        float z[ROWS * 4] = {0}, dz[ROWS * 4] = {0}, wanted[ROWS * 4] = {0};
        double loss;
        for (float *x = n->x, *label = wanted; x < n->x + ROWS * 6; x += 6, label += 4) {
            for (int i = 0; i < 6; i++) x[i] = i == 0 ? 1 : (float)(2 * apt_rng_uniform(rng) - 1);
            label[((x[1] + shift) * (x[2] - shift) > 0) + 2 * (x[3] * (x[4] + shift) > 0)] = 9;
        }
        forward(n, z);
        CHECK(apt_distill_kl(&loss, dz, 4, z, 4, wanted, 4, NULL, ROWS, 4, 1, 1));      /* cross-entropy with labels as logits */
        for (int r = 0, best; r < ROWS; r++, hits += wanted[best] > 0)
            for (int c = best = 4 * r; c < 4 * r + 4; c++) best = z[c] > z[best] ? c : best;
        if (!(rate > 0)) continue;
        backward(n, dz);
        for (int m = 0; m < MATRICES; m++)
            for (int i = 0; i < rows(n, m) * cols(n, m) && !n->p[m].frozen; i++) {
                n->p[m].m[i] = 0.9f * n->p[m].m[i] + n->p[m].g[i], n->p[m].g[i] = 0;
                n->p[m].w[i] -= rate * n->p[m].m[i];
            }
    }
    return (double)hits / (batches * ROWS);
}

static double cost(const int32_t *kept, int32_t groups, void *user)           /* parameters of UP and DOWN */
{ (void)groups, (void)user; return 2.0 * kept[0] * kept[1]; }

/* The masks of the last decision have reached exactly 0 or 1: make every array smaller, in place. */
static void compact(net *n)
{
    int32_t index[UNITS];
    apt_axis axis[AXES];
    const int32_t f = n->size[NEURON];
    CHECK(apt_mask_keep(n->keep, n->mask, f + n->size[HIDDEN]));               /* APT_E_STATE if one were in between */
    for (int i = 0; i < AXES; i++) CHECK(apt_axis_make(&axis[i], NULL, NULL, n->size[i], 1));
    CHECK(apt_axis_make(&axis[NEURON], index, n->keep, f, 1));
    CHECK(apt_axis_make(&axis[HIDDEN], index + f, n->keep + f, n->size[HIDDEN], 1));
    for (int m = 0; m < MATRICES; m++) {
        const apt_axis *r = &axis[axis_of[m][0]], *c = &axis[axis_of[m][1]];
        CHECK(apt_gather(n->p[m].w, c->kept, n->p[m].w, c->units, r, c));
        CHECK(apt_gather(n->p[m].m, c->kept, n->p[m].m, c->units, r, c));
    }
    for (int i = 0; i < AXES; i++) n->size[i] = axis[i].kept;
    for (int u = 0; u < UNITS; u++) n->mask[u] = n->keep[u] = 1;
}

/* Which units are to fade out from now on. */
static float decide(net *n, int step)
{
    const int32_t d = n->size[HIDDEN], f = n->size[NEURON];
    float salience[UNITS], kurtosis[UNITS] = {0}, sparsity;
    int32_t kind[UNITS];
    double scratch[UNITS * 4];
    apt_search s = APT_ZERO;
    CHECK(apt_schedule_sparsity(&schedule, step, &sparsity));
    CHECK(apt_salience_finish(salience, n->abs_act, n->abs_grad, f + d, 1));
    CHECK(apt_unit_kurtosis(kurtosis, NULL, n->p[DOWN].w, f, d, f, 1));
    for (int u = 0; u < f + d; u++) kind[u] = u >= f;
    CHECK(apt_salience_combine(salience, kurtosis, kind, NULL, f + d, 2, APT_SALIENCE_SCALED));
    memset(n->abs_act, 0, sizeof n->abs_act), memset(n->abs_grad, 0, sizeof n->abs_grad);
    s.units = f + d, s.groups = 2, s.group = kind, s.salience = salience;
    s.cost = cost, s.budget = (1 - (double)sparsity) * 2 * 64 * 32;
    CHECK(apt_mask_search(&s, scratch, sizeof scratch, n->keep, NULL, NULL));
    return sparsity;
}

/* More rank for the adapter, up to twice the values it began with: its output stays, new momentum is 0. */
static void grow(net *n, int step, apt_rng *rng)
{
    const float importance = 1;                                               /* there is only one adapter to choose from */
    const int64_t per_rank = n->size[HIDDEN] + n->size[NEURON], budget = 2 * 96 * (TUNE + step) / TUNE;
    matrix a = n->p[A], b = n->p[B];
    const apt_adapter values = adapter(n, a.w, b.w), momentum = adapter(n, a.m, b.m);
    CHECK(apt_adapter_plan(&n->size[RANK], &importance, &values.rank, &per_rank, 1, budget, MAX_RANK));
    const apt_adapter more = adapter(n, n->p[A].w, n->p[B].w), more_momentum = adapter(n, n->p[A].m, n->p[B].m);
    CHECK(apt_adapter_grow(&more, &values, rng));
    CHECK(apt_adapter_grow(&more_momentum, &momentum, NULL));
}

int main(void)
{
    static net n = {.size = {6, 32, 64, 4, 2}};
    apt_rng rng = apt_rng_make(1, 0), test = apt_rng_make(2, 0);
    const double dense = cost(n.size + HIDDEN, 2, NULL);
    for (int m = EMBED; m <= HEAD; m++)
        for (int i = 0; i < rows(&n, m) * cols(&n, m); i++) n.p[m].w[i] = apt_rng_normal(&rng) / sqrtf((float)cols(&n, m));
    for (int u = 0; u < UNITS; u++) n.mask[u] = n.keep[u] = 1;
    n.p[EMBED].frozen = 1;
    for (int step = 0; step < PRETRAIN; step++) (void)run(&n, &rng, 0, 0.05f * (float)(PRETRAIN - step) / PRETRAIN, 1);
    const double before = run(&n, &test, 0, 0, 100);
    printf("trained on the first task: accuracy %.3f; on the second: %.3f\n", before, run(&n, &test, 0.2f, 0, 100));
    n.p[UP].frozen = n.p[DOWN].frozen = 1;
    const apt_adapter first = adapter(&n, n.p[A].w, n.p[B].w);
    CHECK(apt_adapter_init(&first, &rng));
    memset(n.abs_act, 0, sizeof n.abs_act), memset(n.abs_grad, 0, sizeof n.abs_grad);
    printf(" step  target    kept  hidden neurons  rank  accuracy\n");
    for (int step = 0; step < TUNE; step++) {
        if (step % EVERY == 0 && step >= schedule.begin) {
            compact(&n);
            grow(&n, step, &rng);
            const double target = (double)decide(&n, step), kept = cost(n.size + HIDDEN, 2, NULL) / dense;
            if (step % 100 == 0) printf("%5d  %5.1f%%  %5.1f%%  %6d %7d  %4d  %8.3f\n", step, 100 * target, 100 * kept,
                                        n.size[HIDDEN], n.size[NEURON], n.size[RANK], run(&n, &test, 0.2f, 0, 50));
        }
        (void)run(&n, &rng, 0.2f, 0.05f * (float)(TUNE - step) / TUNE, 1);
        CHECK(apt_mask_step(n.mask, n.keep, n.size[NEURON] + n.size[HIDDEN], 1.0f / EVERY));
    }
    compact(&n);
    const apt_adapter last = adapter(&n, n.p[A].w, n.p[B].w);
    CHECK(apt_adapter_merge(&last, n.p[UP].w, n.size[HIDDEN]));               /* a plain, smaller network */
    n.size[RANK] = 0;
    const double after = run(&n, &test, 0.2f, 0, 100), kept = cost(n.size + HIDDEN, 2, NULL) / dense;
    const int good = kept <= 1 - (double)schedule.target && after > before - 0.03;
    printf("merged: %.1f%% of the parameters, accuracy %.3f: %s\n", 100 * kept, after, good ? "ok" : "FAILED");
    return good ? 0 : 1;
}
