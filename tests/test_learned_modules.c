/* Modules of learned sparsity: gated experts, the sparse BK-core and the layer of both, each against a plain version in double
   and its gradients against differences of that; removal of experts, saved modules, threads, memory that runs out, bad input.
   build: cc -std=c11 -O2 tests/test_learned_modules.c -o test_learned_modules -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include <complex.h>

enum { TENSORS = 64, ROWS = 32, WIDE = 8, CHANNELS = 16 };

static float uniform(apt_rng *rng, float low, float high)
{
    return low + (high - low) * (float)(apt_rng_next(rng) >> 40) / 16777216.0f;
}

/* ------------------------------------------------------------------------------------------------ the plain version */

/* The parameters of a module, in double. */
typedef struct bag { int32_t n; apt_module_tensor tensor[TENSORS]; double *value[TENSORS]; } bag;

static void fill_bag(bag *b, const apt_module *m)
{
    b->n = apt_module_tensors(m);
    assert_true(b->n <= TENSORS);
    for (int32_t i = 0; i < b->n; i++) {
        assert_result(apt_module_get(m, i, &b->tensor[i]), APT_OK);
        const int64_t count = b->tensor[i].rows * b->tensor[i].cols;
        b->value[i] = (double *)test_memory_block((size_t)count * sizeof(double));
        for (int64_t k = 0; k < count; k++) b->value[i][k] = (double)b->tensor[i].value[k];
    }
}

static void free_bag(const bag *b)
{
    for (int32_t i = 0; i < b->n; i++) free(b->value[i]);
}

/* NULL when there is no such tensor */
static const double *find(const bag *b, const char *name)
{
    for (int32_t i = 0; i < b->n; i++)
        if (strcmp(b->tensor[i].name, name) == 0) return b->value[i];
    return NULL;
}

static apt_module_tensor named(const apt_module *m, const char *name)
{
    apt_module_tensor t = {NULL, 0, 0, NULL, NULL};
    for (int32_t i = 0; i < apt_module_tensors(m); i++) {
        assert_result(apt_module_get(m, i, &t), APT_OK);
        if (strcmp(t.name, name) == 0) return t;
    }
    fail_msg("there is no %s", name);
    return t;
}

static float *values(const apt_module *m, const char *name)
{
    return named(m, name).value;
}

static void affine(double *y, const double *w, const double *bias, const double *x, int32_t out, int32_t in)
{
    for (int32_t o = 0; o < out; o++) {
        y[o] = bias != NULL ? bias[o] : 0;
        for (int32_t i = 0; i < in; i++) y[o] += w[o * in + i] * x[i];
    }
}

/* All that a loss depends on. A hard mask is the soft one and an offset that stays: what straight-through gradients are exact
   for. */
typedef struct problem {
    bag b;
    int32_t d, f, top_k;
    int64_t sequences, length;
    double temperature;
    double complex z;
    double x[ROWS * WIDE], v[ROWS], noise[ROWS], offset[ROWS], dy[ROWS * WIDE];
    double mask_weight, mask_target;  /* of a quadratic sparsity loss */
    double y[ROWS * WIDE], u[ROWS], p[ROWS], m[ROWS];                    /* results */
    int64_t count[TENSORS];
} problem;

static const double *tensor_of(const problem *a, const char *what, int32_t number, const char *which)
{
    char name[48];
    snprintf(name, sizeof name, "%s.%d.%s", what, (int)number, which);
    return find(&a->b, name);
}

static void plain_expert(const problem *a, double *y, const double *x, int32_t id)
{
    double h[4 * WIDE];
    affine(h, tensor_of(a, "expert", id, "up.weight"), tensor_of(a, "expert", id, "up.bias"), x, a->f, a->d);
    for (int32_t i = 0; i < a->f; i++) h[i] = h[i] * 0.5 * (1 + erf(h[i] / sqrt(2)));
    affine(y, tensor_of(a, "expert", id, "down.weight"), tensor_of(a, "expert", id, "down.bias"), h, a->d, a->f);
}

static void plain_experts(problem *a, double *y, const double *x)
{
    int32_t id[TENSORS], experts = 0;
    for (int32_t i = 0; i < TENSORS; i++)
        if (tensor_of(a, "expert", i, "up.weight") != NULL) id[experts++] = i;
    memset(a->count, 0, sizeof a->count);
    for (int64_t r = 0; r < a->sequences * a->length; r++) {
        double z[TENSORS], sum = 0, out[WIDE];
        bool taken[TENSORS] = {0};
        affine(z, find(&a->b, "gate.weight"), NULL, x + r * a->d, experts, a->d);
        for (int32_t k = 0; k < a->top_k; k++) {
            int32_t best = -1;
            for (int32_t e = 0; e < experts; e++)
                if (!taken[e] && (best < 0 || z[e] > z[best])) best = e;
            taken[best] = true;
            a->count[best]++;
            sum += exp(z[best]);
        }
        for (int32_t i = 0; i < a->d; i++) y[r * a->d + i] = 0;
        for (int32_t e = 0; e < experts; e++) {
            if (!taken[e]) continue;
            plain_expert(a, out, x + r * a->d, id[e]);
            for (int32_t i = 0; i < a->d; i++) y[r * a->d + i] += exp(z[e]) / sum * out[i];
        }
    }
}

static void plain_mask(problem *a)
{
    for (int64_t r = 0; r < a->sequences * a->length; r++) {
        double h[WIDE];
        affine(h, find(&a->b, "importance.0.weight"), find(&a->b, "importance.0.bias"), a->x + r * a->d, a->d / 2, a->d);
        for (int32_t i = 0; i < a->d / 2; i++) h[i] = h[i] > 0 ? h[i] : 0;
        affine(&a->u[r], find(&a->b, "importance.1.weight"), find(&a->b, "importance.1.bias"), h, 1, a->d / 2);
        a->p[r] = 1 / (1 + exp(-(a->u[r] + a->noise[r]) / a->temperature));
        a->m[r] = a->p[r] + a->offset[r];
    }
}

/* One sequence: g[n] from v, m */
static void plain_bk(double complex *g, const double *v, const double *m, int64_t n, double complex z)
{
    double complex left = 1, right = 1;
    for (int64_t i = 0; i < n; i++) g[i] = left = -2 + v[i] - z - (i > 0 ? m[i - 1] * m[i] : 0) / left;
    for (int64_t i = n - 1; i >= 0; i--) {
        right = -2 + v[i] - z - (i + 1 < n ? m[i] * m[i + 1] : 0) / right;
        g[i] = 1 / (g[i] + right - (-2 + v[i] - z));
    }
}

static void plain_convolution(const problem *a, double *y, const double *x, int64_t n, int32_t number, int32_t out, int32_t in)
{
    const double *w = tensor_of(a, "interpolation", number, "weight"), *bias = tensor_of(a, "interpolation", number, "bias");
    for (int64_t i = 0; i < n; i++)
        for (int32_t o = 0; o < out; o++) {
            double sum = bias[o];
            for (int32_t t = 0; t < 3; t++)
                for (int32_t c = 0; c < in && i + t >= 1 && i + t - 1 < n; c++)
                    sum += w[(o * 3 + t) * in + c] * x[(i + t - 1) * in + c];
            y[i * out + o] = number < 2 && sum < 0 ? 0 : sum;
        }
}

static void plain_core(problem *a, double *f, const double *v)
{
    plain_mask(a);
    for (int64_t s = 0; s < a->sequences; s++) {
        double complex g[ROWS];
        double h0[ROWS * 2], h1[ROWS * CHANNELS], h2[ROWS * CHANNELS], h3[ROWS * 2];
        const int64_t at = s * a->length, n = a->length;
        const double *m = a->m + at;
        plain_bk(g, v + at, m, n, a->z);
        for (int64_t i = 0; i < n; i++) h0[2 * i] = m[i] * creal(g[i]), h0[2 * i + 1] = m[i] * cimag(g[i]);
        plain_convolution(a, h1, h0, n, 0, CHANNELS, 2);
        plain_convolution(a, h2, h1, n, 1, CHANNELS, CHANNELS);
        plain_convolution(a, h3, h2, n, 2, 2, CHANNELS);
        for (int64_t i = 0; i < n; i++) {
            f[2 * (at + i)] = m[i] * creal(g[i]) + (1 - m[i]) * h3[2 * i];
            f[2 * (at + i) + 1] = m[i] * cimag(g[i]) + (1 - m[i]) * h3[2 * i + 1];
        }
    }
}

static double clamp(double x, double limit)
{
    return x > limit ? limit : x < -limit ? -limit : x;
}

static void plain_layer(problem *a)
{
    double e[ROWS * WIDE], v[ROWS], f[ROWS * 2], out[WIDE];
    const int64_t rows = a->sequences * a->length;
    plain_experts(a, e, a->x);
    for (int64_t r = 0; r < rows; r++) {
        affine(&v[r], find(&a->b, "potential.weight"), find(&a->b, "potential.bias"), e + r * a->d, 1, a->d);
        v[r] = clamp(v[r], 3);
    }
    plain_core(a, f, v);
    for (int64_t i = 0; i < 2 * rows; i++) f[i] = clamp(f[i], 10);
    for (int64_t r = 0; r < rows; r++) {
        affine(out, find(&a->b, "output.weight"), find(&a->b, "output.bias"), f + 2 * r, a->d, 2);
        for (int32_t i = 0; i < a->d; i++) a->y[r * a->d + i] = e[r * a->d + i] + find(&a->b, "scale")[0] * out[i];
    }
}

static double weighted(const problem *a, int64_t n)
{
    double sum = 0, mean = 0;
    const int64_t rows = a->sequences * a->length;
    for (int64_t i = 0; i < n; i++) sum += a->dy[i] * a->y[i];
    for (int64_t r = 0; r < rows; r++) mean += a->m[r] / (double)rows;
    return sum + a->mask_weight * (1 - mean - a->mask_target) * (1 - mean - a->mask_target);
}

static double loss_of_core(problem *a)
{
    plain_core(a, a->y, a->v);
    return weighted(a, a->sequences * a->length * 2);
}

static double loss_of_layer(problem *a)
{
    plain_layer(a);
    return weighted(a, a->sequences * a->length * a->d);
}

static double loss_of_experts(problem *a)
{
    plain_experts(a, a->y, a->x);
    return weighted(a, a->sequences * a->length * a->d);
}

typedef double (*loss_function)(problem *a);

/* grad(n) against the slopes of the loss along each of x(n), which are numbers of the problem */
static void check_slopes(const char *name, const float *grad, double *x, int64_t n, problem *a, loss_function loss)
{
    const double h = 1e-6;
    float *want = (float *)test_memory_block((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        const double before = x[i];
        x[i] = before + h;
        const double up = loss(a);
        x[i] = before - h;
        want[i] = (float)((up - loss(a)) / (2 * h));
        if (fabs((double)want[i]) < 1e-15 * fabs(up) / h) want[i] = 0;   /* a slope that is nothing but rounding */
        x[i] = before;
    }
    test_near(name, grad, want, n, 3e-5);
    free(want);
}

static void check_parameters(problem *a, loss_function loss)
{
    for (int32_t i = 0; i < a->b.n; i++)
        check_slopes(a->b.tensor[i].name, a->b.tensor[i].grad, a->b.value[i], a->b.tensor[i].rows * a->b.tensor[i].cols, a, loss);
}

static void check_values(const char *name, const float *got, const double *want, int64_t n)
{
    float narrow[ROWS * WIDE];
    for (int64_t i = 0; i < n; i++) narrow[i] = (float)want[i];
    test_near(name, got, narrow, n, 3e-6);
}

/* ------------------------------------------------------------------------------------------------ problems */

typedef struct inputs { float x[ROWS * WIDE], v[ROWS], dy[ROWS * WIDE]; } inputs;

/* Random inputs of 3 sequences of 9 positions, 6 wide, for a module, whose parameters are taken as they are. */
static void make_problem(problem *a, inputs *in, const apt_module *m)
{
    apt_rng rng = apt_rng_make(77, 1);
    memset(a, 0, sizeof *a);
    fill_bag(&a->b, m);
    a->d = 6;
    a->f = 5;
    a->top_k = 2;
    a->sequences = 3;
    a->length = 9;
    a->temperature = 0.75;
    a->z = 0.25 + 0.5 * I;
    for (int32_t i = 0; i < ROWS * WIDE; i++) {
        a->x[i] = in->x[i] = uniform(&rng, -1.5f, 1.5f);
        a->dy[i] = in->dy[i] = uniform(&rng, -1, 1);
    }
    for (int32_t i = 0; i < ROWS; i++) a->v[i] = in->v[i] = uniform(&rng, -2, 2);
}

static apt_bk_core_desc core_desc(void)
{
    apt_bk_core_desc desc = APT_ZERO;
    desc.hidden = 6;
    desc.temperature = 0.75f;
    desc.z.re = 0.25f;
    desc.z.im = 0.5f;
    desc.seed = 11;
    return desc;
}

static apt_bk_layer_desc layer_desc(void)
{
    apt_bk_layer_desc desc = APT_ZERO;
    desc.moe.hidden = 6;
    desc.moe.experts = 3;
    desc.moe.neurons = 5;
    desc.temperature = 0.75f;
    desc.z.re = 0.25f;
    desc.z.im = 0.5f;
    desc.scale = 0.8f;
    desc.seed = 11;
    return desc;
}

/* Importances near 0, so that masks have both kinds of positions; biases of the convolutions that are not 0, else a window of
   masked positions stands exactly where ReLU has no slope. */
static void level(const apt_module *m)
{
    apt_rng rng = apt_rng_make(6, 0);
    values(m, "importance.1.bias")[0] = 0.1f;
    for (int32_t i = 0; i < CHANNELS; i++) {
        values(m, "interpolation.0.bias")[i] = uniform(&rng, -0.2f, 0.2f);
        values(m, "interpolation.1.bias")[i] = uniform(&rng, -0.2f, 0.2f);
    }
}

/* The noise of a forward in soft mode, out of the mask it gave, and for a hard mode the offset of the hard mask. */
static void take_noise(problem *a, const float *soft, const float *hard)
{
    memset(a->noise, 0, sizeof a->noise);
    memset(a->offset, 0, sizeof a->offset);
    plain_mask(a);
    for (int64_t r = 0; r < a->sequences * a->length && soft != NULL; r++) {
        const double p = (double)soft[r];
        a->noise[r] = a->temperature * log(p / (1 - p)) - a->u[r];
    }
    plain_mask(a);
    for (int64_t r = 0; r < a->sequences * a->length && hard != NULL; r++) a->offset[r] = (double)hard[r] - a->p[r];
}

/* The masks of a module's forward and of its twin's, which had the same draws in soft mode. */
static void take_masks(problem *a, const apt_module *m, const apt_module *twin, int32_t mode)
{
    float soft[ROWS], hard[ROWS];
    const int64_t rows = a->sequences * a->length;
    int64_t kept = 0;
    assert_result(apt_module_mask(twin, soft, rows), APT_OK);
    assert_result(apt_module_mask(m, hard, rows), APT_OK);
    take_noise(a, mode == APT_MASK_FIXED ? NULL : soft, mode == APT_MASK_SOFT ? NULL : hard);
    for (int64_t r = 0; r < rows && mode != APT_MASK_SOFT; r++) {
        const double threshold = mode == APT_MASK_FIXED ? a->u[r] : (double)soft[r] - 0.5;
        assert_true(hard[r] > 0.5f ? hard[r] >= 1 && threshold > 0 : hard[r] <= 0 && threshold <= 0);
        kept += hard[r] > 0.5f;
    }
    if (mode != APT_MASK_SOFT) assert_true(kept > 2 && kept < rows - 2);
}

static void test_core_gradients(void **state)
{
    (void)state;
    const apt_bk_core_desc desc = core_desc();
    for (int32_t mode = APT_MASK_FIXED; mode <= APT_MASK_SOFT; mode++) {
        apt_ctx *ctx = test_context(2, NULL);
        apt_module *m, *twin;
        problem a;
        inputs in;
        float f[ROWS * 2], dx[ROWS * WIDE], dv[ROWS];
        double loss;
        assert_ok(ctx, apt_bk_core_create(ctx, &desc, &m));
        assert_ok(ctx, apt_bk_core_create(ctx, &desc, &twin));
        level(m);
        level(twin);
        make_problem(&a, &in, m);
        assert_ok(ctx, apt_bk_core_forward(twin, f, in.x, in.v, a.sequences, a.length, APT_MASK_SOFT));
        assert_ok(ctx, apt_bk_core_forward(m, f, in.x, in.v, a.sequences, a.length, mode));
        take_masks(&a, m, twin, mode);
        a.mask_weight = 3;
        a.mask_target = (double)0.7f;
        loss_of_core(&a);
        check_values("features", f, a.y, 2 * a.sequences * a.length);
        assert_ok(ctx, apt_module_sparsity_loss(m, &loss, APT_SPARSITY_L2, 0.7f, 3));
        assert_ok(ctx, apt_bk_core_backward(m, dx, dv, in.dy, in.x, in.v, a.sequences, a.length));
        check_slopes("dx", dx, a.x, a.sequences * a.length * a.d, &a, loss_of_core);
        check_slopes("dv", dv, a.v, a.sequences * a.length, &a, loss_of_core);
        check_parameters(&a, loss_of_core);
        free_bag(&a.b);
        apt_destroy(ctx);
    }
}

/* In soft mode everything is differentiable; in the hard ones the gradient is that of the relaxation around the hard mask. Both
   clamps hold some values and not others. */
static void test_layer_gradients(void **state)
{
    (void)state;
    const apt_bk_layer_desc desc = layer_desc();
    for (int32_t mode = APT_MASK_FIXED; mode <= APT_MASK_SOFT; mode++) {
        apt_ctx *ctx = test_context(2, NULL);
        apt_module *m[2];
        problem a;
        inputs in;
        float y[ROWS * WIDE], dx[ROWS * WIDE];
        double loss;
        apt_bk_stats stats;
        for (int32_t k = 0; k < 2; k++) {
            assert_ok(ctx, apt_bk_layer_create(ctx, &desc, &m[k]));
            level(m[k]);
            for (int32_t i = 0; i < 6; i++) values(m[k], "potential.weight")[i] *= 20;
            values(m[k], "interpolation.2.bias")[0] = 14;
        }
        make_problem(&a, &in, m[0]);
        assert_ok(ctx, apt_bk_layer_forward(m[1], y, in.x, a.sequences, a.length, APT_MASK_SOFT));
        assert_ok(ctx, apt_bk_layer_forward(m[0], y, in.x, a.sequences, a.length, mode));
        take_masks(&a, m[0], m[1], mode);
        a.mask_weight = 2;
        a.mask_target = 0.25;
        loss_of_layer(&a);
        check_values("y", y, a.y, a.sequences * a.length * a.d);
        assert_ok(ctx, apt_module_stats(m[0], &stats));
        assert_true(stats.potential_clamped > 2 && stats.potential_clamped < 25 && stats.experts == 3);
        assert_true(stats.features_clamped > 2 && stats.features_clamped < 25);
        assert_ok(ctx, apt_module_sparsity_loss(m[0], &loss, APT_SPARSITY_L2, 0.25f, 2));
        assert_ok(ctx, apt_bk_layer_backward(m[0], dx, in.dy, in.x, a.sequences, a.length));
        check_slopes("dx", dx, a.x, a.sequences * a.length * a.d, &a, loss_of_layer);
        check_parameters(&a, loss_of_layer);
        free_bag(&a.b);
        apt_destroy(ctx);
    }
}

static apt_moe_desc moe_desc(int32_t experts, int32_t top_k)
{
    apt_moe_desc desc = APT_ZERO;
    desc.hidden = 6;
    desc.neurons = 5;
    desc.experts = experts;
    desc.top_k = top_k;
    desc.seed = 4;
    return desc;
}

static void test_expert_gradients(void **state)
{
    (void)state;
    for (int32_t top_k = 1; top_k <= 3; top_k++) {
        const apt_moe_desc desc = moe_desc(3, top_k);
        apt_ctx *ctx = test_context(3, NULL);
        apt_module *m;
        problem a;
        inputs in;
        float y[ROWS * WIDE], dx[ROWS * WIDE];
        int64_t counts[3];
        int32_t experts;
        assert_ok(ctx, apt_moe_create(ctx, &desc, &m));
        make_problem(&a, &in, m);
        a.top_k = top_k;
        const int64_t rows = a.sequences * a.length;
        assert_ok(ctx, apt_moe_forward(m, y, in.x, rows, 0));
        assert_ok(ctx, apt_moe_forward(m, y, in.x, rows, 1));
        loss_of_experts(&a);
        check_values("y", y, a.y, rows * a.d);
        assert_ok(ctx, apt_moe_usage(m, &experts, counts, 3));
        assert_int_equal(experts, 3);
        for (int32_t e = 0; e < 3; e++) assert_int_equal(counts[e], a.count[e]);
        assert_ok(ctx, apt_moe_backward(m, dx, in.dy, in.x, rows));
        check_slopes("dx", dx, a.x, rows * a.d, &a, loss_of_experts);
        check_parameters(&a, loss_of_experts);
        free_bag(&a.b);
        apt_destroy(ctx);
    }
}

/* Gradients of parameters add up, those of inputs are written; Adam uses the former and clears them. */
static void test_adam(void **state)
{
    (void)state;
    const apt_moe_desc desc = moe_desc(2, 2);
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_module *m;
    problem a;
    inputs in;
    float y[ROWS * WIDE], dx[2][ROWS * WIDE], *once;
    assert_ok(ctx, apt_moe_create(ctx, &desc, &m));
    make_problem(&a, &in, m);
    const int32_t tensor = 1;
    const int64_t rows = a.sequences * a.length, n = a.b.tensor[tensor].rows * a.b.tensor[tensor].cols;
    once = (float *)test_memory_block((size_t)n * sizeof(float));
    for (int32_t k = 0; k < 2; k++) {
        assert_ok(ctx, apt_moe_forward(m, y, in.x, rows, 0));
        assert_ok(ctx, apt_moe_backward(m, dx[k], in.dy, in.x, rows));
        if (k == 0) memcpy(once, a.b.tensor[tensor].grad, (size_t)n * sizeof(float));
    }
    assert_memory_equal(dx[0], dx[1], (size_t)(rows * a.d) * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        const double twice = 2 * (double)once[i];
        test_near_value("sum", a.b.tensor[tensor].grad[i], twice, 1e-5 * fabs(twice) + 1e-6);
    }
    double moment[2] = {0, 0}, w = a.b.value[tensor][0];
    for (int64_t step = 1; step <= 3; step++) {
        const double g = (double)a.b.tensor[tensor].grad[0];
        moment[0] = 0.9 * moment[0] + 0.1 * g;
        moment[1] = 0.999 * moment[1] + 0.001 * g * g;
        w -= 0.01 * moment[0] / (1 - pow(0.9, (double)step)) / (sqrt(moment[1] / (1 - pow(0.999, (double)step))) + 1e-8);
        assert_ok(ctx, apt_module_adam(m, 0.01f, step));
        test_near_value("weight", a.b.tensor[tensor].value[0], w, 1e-6);
        for (int64_t i = 0; i < n; i++) assert_true(a.b.tensor[tensor].grad[i] >= 0 && a.b.tensor[tensor].grad[i] <= 0);
        a.b.tensor[tensor].grad[0] = step == 1 ? 0.5f : -2;
    }
    a.b.tensor[tensor].grad[0] = NAN;
    assert_result(apt_module_adam(m, 0.01f, 4), APT_E_NONFINITE);
    assert_true(strstr(apt_error(ctx), "expert.0.up.weight") != NULL);
    test_near_value("unchanged", a.b.tensor[tensor].value[0], w, 1e-6);
    assert_result(apt_module_adam(m, 0.01f, 0), APT_E_RANGE);
    assert_result(apt_module_adam(m, NAN, 1), APT_E_RANGE);
    assert_result(apt_module_adam(m, -1, 1), APT_E_RANGE);
    free(once);
    free_bag(&a.b);
    apt_destroy(ctx);
}

/* ------------------------------------------------------------------------------------------------ the mask */

enum { MANY = 20000 };

/* Logits of `bias` everywhere; p of a soft forward, or the mask of a hard one. */
static void draw_mask(apt_ctx *ctx, float *p, float bias, uint64_t seed, int32_t mode, int32_t before)
{
    apt_bk_core_desc desc = APT_ZERO;
    apt_module *m;
    float *zeros = (float *)test_memory_block(4 * MANY * sizeof(float)), *f = zeros + 2 * MANY;
    memset(zeros, 0, 2 * MANY * sizeof(float));
    desc.hidden = 2;
    desc.seed = seed;
    assert_ok(ctx, apt_bk_core_create(ctx, &desc, &m));
    values(m, "importance.1.weight")[0] = 0;
    values(m, "importance.1.bias")[0] = bias;
    for (int32_t i = 0; i < before; i++) assert_ok(ctx, apt_bk_core_forward(m, f, zeros, zeros, 4, MANY / 4, mode));
    assert_ok(ctx, apt_bk_core_forward(m, f, zeros, zeros, 4, MANY / 4, mode));
    assert_ok(ctx, apt_module_mask(m, p, MANY));
    apt_module_destroy(m);
    free(zeros);
}

/* With a logit of 0 and temperature 1 the sigmoid of logistic noise is uniform; a hard mask stays with probability sigmoid(u). */
static void test_gumbel(void **state)
{
    (void)state;
    apt_ctx *ctx = test_context(2, NULL);
    float *p = (float *)test_memory_block(2 * MANY * sizeof(float)), *q = p + MANY;
    int32_t bins[20] = {0};
    double product = 0, share = 0;
    draw_mask(ctx, p, 0, 1, APT_MASK_SOFT, 0);
    for (int32_t i = 0; i < MANY; i++) {
        assert_true(p[i] >= 0 && p[i] <= 1);
        bins[(int32_t)(p[i] * 19.9999f)]++;
        if (i > 0) product += ((double)p[i] - 0.5) * ((double)p[i - 1] - 0.5);
    }
    for (int32_t k = 0; k < 20; k++) test_near_value("bin", bins[k], MANY / 20.0, 5 * sqrt(MANY / 20.0));
    test_near_value("neighbours", product / MANY, 0, 5.0 / 12 / sqrt(MANY));
    draw_mask(ctx, q, 0, 1, APT_MASK_SOFT, 0);
    assert_memory_equal(p, q, MANY * sizeof(float));             /* the seed decides */
    draw_mask(ctx, q, 0, 2, APT_MASK_SOFT, 0);
    assert_memory_not_equal(p, q, MANY * sizeof(float));
    draw_mask(ctx, q, 0, 1, APT_MASK_SOFT, 1);
    assert_memory_not_equal(p, q, MANY * sizeof(float));         /* another forward, another draw */
    draw_mask(ctx, q, 1.5f, 3, APT_MASK_SAMPLE, 0);
    for (int32_t i = 0; i < MANY; i++) share += (double)q[i] / MANY;
    test_near_value("share that stays", share, 1 / (1 + exp(-1.5)), 5 * 0.4 / sqrt(MANY));
    for (int32_t k = 0; k < 2; k++) {                            /* inference knows no chance */
        draw_mask(ctx, k == 0 ? p : q, 0.01f, (uint64_t)k, APT_MASK_FIXED, 0);
        for (int32_t i = 0; i < MANY; i++) assert_true((k == 0 ? p : q)[i] >= 1);
    }
    free(p);
    apt_destroy(ctx);
}

static void test_stats_and_losses(void **state)
{
    (void)state;
    test_log messages;
    const apt_bk_core_desc desc = core_desc();
    apt_ctx *ctx = test_context(1, &messages);
    apt_module *m;
    problem a;
    inputs in;
    apt_bk_stats s;
    apt_balanced b;
    float f[ROWS * 2], mask[ROWS], gentle[ROWS];
    double loss, want = 0, masked = 0, least = 1, most = 0;
    assert_ok(ctx, apt_bk_core_create(ctx, &desc, &m));
    level(m);
    make_problem(&a, &in, m);
    assert_result(apt_module_stats(m, &s), APT_E_STATE);
    assert_result(apt_module_mask(m, mask, 27), APT_E_STATE);
    assert_result(apt_module_sparsity_loss(m, &loss, 0, 0.5f, 1), APT_E_STATE);
    assert_ok(ctx, apt_bk_core_forward(m, f, in.x, in.v, a.sequences, a.length, APT_MASK_SAMPLE));
    assert_ok(ctx, apt_module_mask(m, mask, 27));
    assert_result(apt_module_mask(m, mask, 26), APT_E_SHAPE);
    for (int32_t k = 0; k < 3; k++) {
        double here = 0;
        for (int32_t i = 0; i < 9; i++) here += 1 - (double)mask[9 * k + i];
        masked += here;
        least = fmin(least, here / 9);
        most = fmax(most, here / 9);
    }
    assert_ok(ctx, apt_module_stats(m, &s));
    assert_true(s.positions == 27 && s.masked == (int64_t)masked && s.experts == 0 && least < most);
    test_near_value("sparsity", s.sparsity, masked / 27, 1e-12);
    test_near_value("least", s.least, least, 1e-12);
    test_near_value("most", s.most, most, 1e-12);
    assert_result(apt_sparsity_loss(&want, NULL, mask, 27, APT_SPARSITY_KL, 0.25f, 1), APT_OK);
    assert_ok(ctx, apt_module_sparsity_loss(m, &loss, APT_SPARSITY_KL, 0.25f, 0));
    test_near_value("loss", loss, want, 0);
    assert_ok(ctx, apt_module_balanced_loss(m, &b, APT_SPARSITY_KL, 0.25f, 2, 0.5, 4));
    test_near_value("total", b.total, 1 + 4 * want, 1e-12);
    test_near_value("parts", b.accuracy_part + b.sparsity_part, b.total, 0);
    assert_result(apt_module_sparsity_loss(m, &loss, 4, 0.25f, 1), APT_E_ARGUMENT);
    assert_true(strstr(apt_error(ctx), "l2, l1, kl, huber") != NULL);
    assert_result(apt_module_balanced_loss(m, &b, -1, 0.25f, 2, 1, 1), APT_E_ARGUMENT);
    assert_true(strstr(apt_error(ctx), "l2, l1, kl, huber") != NULL);
    assert_result(apt_module_sparsity_loss(m, &loss, 0, -0.25f, 1), APT_E_RANGE);
    assert_result(apt_module_balanced_loss(m, &b, 0, 0.25f, NAN, 1, 1), APT_E_NONFINITE);
    assert_result(apt_module_balanced_loss(m, &b, 0, 0.25f, 1, 1, -1), APT_E_RANGE);
    assert_result(apt_module_temperature(m, 0), APT_E_RANGE);
    assert_result(apt_module_temperature(m, NAN), APT_E_RANGE);
    /* A higher temperature draws every probability towards 1/2. */
    for (int32_t k = 0; k < 2; k++) {
        apt_module *twin;
        assert_ok(ctx, apt_bk_core_create(ctx, &desc, &twin));
        assert_ok(ctx, apt_module_temperature(twin, k == 0 ? 0.75f : 3));
        assert_ok(ctx, apt_bk_core_forward(twin, f, in.x, in.v, a.sequences, a.length, APT_MASK_SOFT));
        assert_ok(ctx, apt_module_mask(twin, k == 0 ? mask : gentle, 27));
    }
    for (int32_t i = 0; i < 27; i++) {
        const double logit = log((double)mask[i] / (1 - (double)mask[i]));
        test_near_value("p", gentle[i], 1 / (1 + exp(-logit / 4)), 1e-5);
    }
    free_bag(&a.b);
    apt_destroy(ctx);
}

/* ------------------------------------------------------------------------------------------------ removing experts */

/* Experts with gates that a constant feature (the first) shifts. */
static void shift_gates(const apt_module *m, const float *shift, int32_t experts, float *x, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++) x[r * 6] = 1;
    for (int32_t e = 0; e < experts; e++) values(m, "gate.weight")[e * 6] += shift[e];
}

static void train_experts(apt_ctx *ctx, apt_module *m, const inputs *in, int64_t rows, int64_t from, int64_t to)
{
    float y[ROWS * WIDE];
    for (int64_t step = from; step <= to; step++) {
        assert_ok(ctx, apt_moe_forward(m, y, in->x, rows, 1));
        assert_ok(ctx, apt_moe_backward(m, NULL, in->dy, in->x, rows));
        assert_ok(ctx, apt_module_adam(m, 0.001f, step));
    }
}

/* An expert that nobody asks is removed, memory and all. The others, their gates and what the optimizer knows of them go on as
   if it had stayed. */
static void test_prune_experts(void **state)
{
    (void)state;
    static const float shift[4] = {0, -100, 0, 1};
    const apt_moe_desc desc = moe_desc(4, 2);
    test_memory memory;
    test_log messages;
    apt_desc context = test_desc(&memory, &messages);
    apt_ctx *ctx = apt_create(&context);
    apt_module *m[2];
    problem a;
    inputs in;
    float y[2][ROWS * WIDE];
    int32_t removed, experts;
    int64_t counts[4];
    apt_expert_event event;
    assert_non_null(ctx);
    for (int32_t k = 0; k < 2; k++) {
        assert_ok(ctx, apt_moe_create(ctx, &desc, &m[k]));
        make_problem(&a, &in, m[k]);
        const int64_t rows = a.sequences * a.length;
        shift_gates(m[k], shift, 4, in.x, rows);
        free_bag(&a.b);
        if (k == 0) assert_result(apt_moe_prune(m[0], 0, 0, &removed), APT_E_STATE);
        train_experts(ctx, m[k], &in, rows, 1, 5);
    }
    const int64_t rows = a.sequences * a.length, live = memory.live, parameters = apt_module_parameters(m[0]);
    assert_ok(ctx, apt_moe_usage(m[0], NULL, counts, 4));
    assert_int_equal(counts[0] + counts[1] + counts[2] + counts[3], 5 * 2 * rows);
    assert_int_equal(counts[1], 0);
    assert_result(apt_moe_usage(m[0], NULL, counts, 3), APT_E_SCRATCH);
    assert_ok(ctx, apt_moe_prune(m[0], 0, 5, &removed));
    assert_ok(ctx, apt_moe_usage(m[0], &experts, counts, 4));
    assert_true(removed == 1 && experts == 3 && counts[0] == 0 && counts[1] == 0 && counts[2] == 0);
    assert_int_equal(memory.live, live - 4 + 1);                 /* its four tensors; the history is new */
    assert_int_equal(apt_module_tensors(m[0]), 1 + 3 * 4);
    assert_int_equal(apt_module_parameters(m[0]), parameters - (2 * 6 * 5 + 5 + 6 + 6));
    assert_int_equal(apt_moe_events(m[0]), 1);
    assert_ok(ctx, apt_moe_event(m[0], 0, &event));
    assert_true(event.step == 5 && event.before == 4 && event.after == 3 && event.least_share <= 0 && event.lost_share <= 0);
    assert_result(apt_moe_event(m[0], 1, &event), APT_E_RANGE);
    for (int32_t k = 0; k < 2; k++) {
        train_experts(ctx, m[k], &in, rows, 6, 12);
        assert_ok(ctx, apt_moe_forward(m[k], y[k], in.x, rows, 0));
    }
    test_near("y", y[0], y[1], rows * 6, 1e-6);
    static const char *const names[] = {"expert.0.up.weight", "expert.2.down.weight", "expert.3.up.bias", "expert.3.down.bias"};
    static const int64_t sizes[] = {30, 30, 5, 6};
    for (int32_t i = 0; i < 4; i++) test_near(names[i], values(m[0], names[i]), values(m[1], names[i]), sizes[i], 1e-6);
    test_near("gate", values(m[0], "gate.weight"), values(m[1], "gate.weight"), 6, 1e-6);
    test_near("gate", values(m[0], "gate.weight") + 6, values(m[1], "gate.weight") + 12, 12, 1e-6);
    apt_destroy(ctx);
    assert_int_equal(memory.live, 0);
}

/* A share that no expert reaches leaves the most used one; one expert is never removed. */
static void test_last_expert(void **state)
{
    (void)state;
    static const float shift[4] = {0, 0, 6, 0};
    const apt_moe_desc desc = moe_desc(4, 1);
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_module *m;
    problem a;
    inputs in;
    int32_t removed, experts;
    int64_t counts[4];
    apt_expert_event event;
    assert_ok(ctx, apt_moe_create(ctx, &desc, &m));
    make_problem(&a, &in, m);
    free_bag(&a.b);
    shift_gates(m, shift, 4, in.x, 27);
    for (int32_t i = 0; i < 5; i++) in.x[i * 6] = -1;            /* these few positions ask others */
    train_experts(ctx, m, &in, 27, 1, 1);
    assert_ok(ctx, apt_moe_usage(m, NULL, counts, 4));
    assert_true(counts[2] == 22);
    const double least = fmin(fmin((double)counts[0], (double)counts[1]), (double)counts[3]) / 27;
    assert_ok(ctx, apt_moe_prune(m, 1, 3, &removed));
    assert_ok(ctx, apt_moe_usage(m, &experts, NULL, 0));
    assert_true(removed == 3 && experts == 1);
    assert_non_null(values(m, "expert.2.up.weight"));
    assert_ok(ctx, apt_moe_event(m, 0, &event));
    test_near_value("least share", event.least_share, least, 1e-12);
    test_near_value("lost share", event.lost_share, 5.0 / 27, 1e-12);
    train_experts(ctx, m, &in, 27, 2, 2);
    assert_ok(ctx, apt_moe_prune(m, 1, 4, &removed));
    assert_true(removed == 0 && apt_moe_events(m) == 1);
    assert_result(apt_moe_prune(m, 1.5f, 4, &removed), APT_E_RANGE);
    assert_result(apt_moe_prune(m, NAN, 4, &removed), APT_E_RANGE);
    apt_destroy(ctx);
}

/* The schedule says how many; who goes is who was used least since the last time. */
static void test_progressive_experts(void **state)
{
    (void)state;
    static const float at[5] = {1, 0.125f, 1.5f, 0.25f, 0.5f};   /* order of use: 2 0 4 3 1 */
    static const char *const order[] = {"expert.1.up.weight", "expert.3.up.weight", "expert.4.up.weight"};
    const apt_expert_schedule schedule = {5, 2, 0, 9}, bad = {2, 5, 0, 9};
    const apt_moe_desc desc = moe_desc(5, 1);
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_module *m;
    problem a;
    inputs in;
    apt_module_tensor t;
    apt_expert_event event;
    int32_t removed, gone = 0;
    assert_ok(ctx, apt_moe_create(ctx, &desc, &m));
    make_problem(&a, &in, m);
    free_bag(&a.b);
    /* Expert e has the largest gate where the second feature is at[e]: a line 100 (a x - a^2 / 2) for each. */
    memset(in.x, 0, sizeof in.x);
    memset(values(m, "gate.weight"), 0, 5 * 6 * sizeof(float));
    for (int32_t i = 0; i < 27; i++) {
        in.x[i * 6] = 1;
        in.x[i * 6 + 1] = i < 11 ? 1.5f : i < 20 ? 1 : i < 24 ? 0.5f : i < 26 ? 0.25f : 0.125f;
    }
    for (int32_t e = 0; e < 5; e++) {
        values(m, "gate.weight")[e * 6] = -50 * at[e] * at[e];
        values(m, "gate.weight")[e * 6 + 1] = 100 * at[e];
    }
    float y[ROWS * WIDE];
    for (int64_t step = 0; step < 12; step++) {
        assert_ok(ctx, apt_moe_forward(m, y, in.x, 27, 1));
        assert_ok(ctx, apt_moe_progress(m, &schedule, step, &removed));
        if (removed > 0) {
            assert_true(removed == 1 && gone < 3 && step == 3 * (gone + 1));
            assert_ok(ctx, apt_moe_event(m, gone, &event));
            assert_true(event.step == step && event.before == 5 - gone && event.after == 4 - gone);
            for (int32_t i = 0; apt_module_get(m, i, &t) == APT_OK; i++) assert_string_not_equal(t.name, order[gone]);
            gone++;
        }
    }
    assert_int_equal(gone, 3);
    assert_non_null(values(m, "expert.2.up.weight"));
    assert_non_null(values(m, "expert.0.up.weight"));
    assert_result(apt_moe_progress(m, &bad, 3, &removed), APT_E_RANGE);
    apt_destroy(ctx);
}

/* ------------------------------------------------------------------------------------------------ whole runs */

/* Steps of a layer on targets, the experts pruned on the way. Returns the last loss. */
static double train_layer(apt_ctx *ctx, apt_module *m, const inputs *in, int64_t from, int64_t to)
{
    const apt_expert_schedule schedule = {3, 2, 0, 8};
    float y[ROWS * WIDE], dy[ROWS * WIDE];
    double loss = 0;
    for (int64_t step = from; step < to; step++) {
        apt_balanced b;
        loss = 0;
        assert_ok(ctx, apt_bk_layer_forward(m, y, in->x, 3, 9, APT_MASK_SAMPLE));
        for (int32_t i = 0; i < 27 * 6; i++) {
            dy[i] = (y[i] - in->dy[i]) / (27 * 6);
            loss += 0.5 * (double)(y[i] - in->dy[i]) * (double)(y[i] - in->dy[i]) / (27 * 6);
        }
        assert_ok(ctx, apt_module_balanced_loss(m, &b, APT_SPARSITY_HUBER, 0.5f, loss, 1, 0.5));
        assert_ok(ctx, apt_bk_layer_backward(m, NULL, dy, in->x, 3, 9));
        assert_ok(ctx, apt_module_adam(m, 0.01f, step + 1));
        assert_ok(ctx, apt_moe_progress(apt_bk_layer_moe(m), &schedule, step, NULL));
        loss = b.total;
    }
    return loss;
}

static unsigned char *saved(const apt_module *m, size_t *bytes)
{
    *bytes = (size_t)apt_module_bytes(m);
    unsigned char *out = (unsigned char *)test_memory_block(*bytes);
    assert_result(apt_module_save(m, out, *bytes), APT_OK);
    return out;
}

static void same_module(const apt_module *a, const apt_module *b)
{
    size_t n, k;
    unsigned char *one = saved(a, &n), *two = saved(b, &k);
    assert_int_equal(n, k);
    assert_memory_equal(one, two, n);
    free(one);
    free(two);
}

/* Learning goes down, and is the same for any number of threads. */
static void test_threads(void **state)
{
    (void)state;
    static const int32_t threads[] = {1, 2, 3, 8};
    const apt_bk_layer_desc desc = layer_desc();
    apt_ctx *ctx[4];
    apt_module *m[4];
    for (int32_t t = 0; t < 4; t++) {
        problem a;
        inputs in;
        ctx[t] = test_context(threads[t], NULL);
        assert_ok(ctx[t], apt_bk_layer_create(ctx[t], &desc, &m[t]));
        make_problem(&a, &in, m[t]);
        free_bag(&a.b);
        const double first = train_layer(ctx[t], m[t], &in, 0, 1), last = train_layer(ctx[t], m[t], &in, 1, 60);
        assert_true(last < 0.8 * first);
        same_module(m[t], m[0]);
    }
    for (int32_t t = 0; t < 4; t++) apt_destroy(ctx[t]);
}

/* A run that is cut anywhere, before or behind a removal of experts or with gradients on hand, goes on bit for bit. */
static void test_resume(void **state)
{
    (void)state;
    const apt_bk_layer_desc desc = layer_desc();
    for (int64_t cut = 0; cut < 14; cut += 3) {
        test_log messages;
        apt_ctx *ctx = test_context(1, &messages);
        apt_module *whole, *part;
        problem a;
        inputs in;
        size_t bytes;
        assert_ok(ctx, apt_bk_layer_create(ctx, &desc, &whole));
        make_problem(&a, &in, whole);
        free_bag(&a.b);
        train_layer(ctx, whole, &in, 0, cut);
        named(whole, "scale").grad[0] = 0.125f;
        assert_ok(ctx, apt_module_temperature(whole, 0.5f));
        unsigned char *memory = saved(whole, &bytes);
        assert_ok(ctx, apt_bk_layer_create(ctx, &desc, &part));
        assert_ok(ctx, apt_module_restore(part, memory, bytes));
        same_module(whole, part);
        train_layer(ctx, whole, &in, cut, 14);
        train_layer(ctx, part, &in, cut, 14);
        same_module(whole, part);
        assert_int_equal(apt_moe_events(apt_bk_layer_moe(part)), 1);
        /* Behind a removal the old state has an expert more than the module: refused. Before it, it is taken back. */
        assert_result(apt_module_restore(part, memory, bytes), cut < 9 ? APT_E_SHAPE : APT_OK);
        free(memory);
        apt_destroy(ctx);
    }
}

static void put_sum(unsigned char *data, size_t bytes)
{
    const uint64_t sum = apti_checksum(0, data, bytes - 8);
    for (size_t i = 0; i < 8; i++) data[bytes - 8 + i] = (unsigned char)(sum >> (8 * i));
}

/* Truncated, damaged, of another desc, and, with a check sum that fits, every byte of the heads set to something else. */
static void test_restore_refuses(void **state)
{
    (void)state;
    test_log log;
    const apt_bk_layer_desc desc = layer_desc();
    apt_bk_core_desc core = core_desc();
    const apt_moe_desc moe = moe_desc(3, 2);
    apt_ctx *ctx = test_context(1, &log);
    apt_module *m, *other[3];
    problem a;
    inputs in;
    size_t bytes;
    assert_ok(ctx, apt_bk_layer_create(ctx, &desc, &m));
    assert_ok(ctx, apt_bk_core_create(ctx, &core, &other[0]));
    core.seed++;
    assert_ok(ctx, apt_bk_core_create(ctx, &core, &other[1]));
    assert_ok(ctx, apt_moe_create(ctx, &moe, &other[2]));
    make_problem(&a, &in, m);
    free_bag(&a.b);
    train_layer(ctx, m, &in, 0, 12);
    unsigned char *data = saved(m, &bytes);
    assert_result(apt_module_save(m, data, bytes - 1), APT_E_SCRATCH);
    for (size_t n = 0; n < bytes; n += n < 2000 ? 1 : 997) {
        unsigned char *cut = (unsigned char *)test_memory_block(n);      /* so that a read beyond it is seen */
        memcpy(cut, data, n);
        assert_result(apt_module_restore(m, cut, n), APT_E_FORMAT);
        free(cut);
    }
    for (size_t i = 0; i < bytes; i += i < 2000 ? 1 : 97) {
        data[i] ^= 32;
        assert_result(apt_module_restore(m, data, bytes), i < 16 ? APT_E_FORMAT : APT_E_CHECKSUM);
        data[i] ^= 32;
    }
    for (size_t i = 16; i < 16 + 3 * APTI_HEAD_BYTES; i++) {
        static const unsigned char evil[] = {0, 1, 0x7f, 0xff};
        const unsigned char before = data[i];
        for (int32_t k = 0; k < 4; k++) {
            data[i] = evil[k];
            put_sum(data, bytes);
            const apt_result r = apt_module_restore(m, data, bytes);
            if (r != APT_OK && r != APT_E_SHAPE) fail_msg("head byte %lld: %s", (long long)i, apt_result_text(r));
        }
        data[i] = before;
    }
    put_sum(data, bytes);
    assert_ok(ctx, apt_module_restore(m, data, bytes));
    for (int32_t k = 0; k < 3; k++) assert_result(apt_module_restore(other[k], data, bytes), APT_E_SHAPE);
    free(data);
    data = saved(other[0], &bytes);
    assert_result(apt_module_restore(other[1], data, bytes), APT_E_SHAPE);
    assert_result(apt_module_restore(other[0], NULL, bytes), APT_E_ARGUMENT);
    assert_ok(ctx, apt_module_restore(other[0], data, bytes));
    free(data);
    apt_destroy(ctx);
}

static apt_result everything(apt_ctx *ctx, void *user)
{
    const inputs *in = (const inputs *)user;
    const apt_bk_layer_desc desc = layer_desc();
    const apt_expert_schedule schedule = {3, 1, 0, 1};
    apt_module *m, *copy;
    float y[ROWS * WIDE], dx[ROWS * WIDE];
    unsigned char data[1 << 16];
    double loss;
    apt_result r = apt_bk_layer_create(ctx, &desc, &m);
    if (r == APT_OK) r = apt_bk_layer_forward(m, y, in->x, 3, 9, APT_MASK_SAMPLE);
    if (r == APT_OK) r = apt_module_sparsity_loss(m, &loss, APT_SPARSITY_L1, 0.5f, 1);
    if (r == APT_OK) r = apt_bk_layer_backward(m, dx, in->dy, in->x, 3, 9);
    if (r == APT_OK) r = apt_module_adam(m, 0.01f, 1);
    if (r == APT_OK) r = apt_moe_progress(apt_bk_layer_moe(m), &schedule, 1, NULL);
    if (r == APT_OK) r = apt_bk_layer_forward(m, y, in->x, 1, 32, APT_MASK_FIXED);
    if (r == APT_OK) r = apt_module_save(m, data, sizeof data);
    if (r == APT_OK) r = apt_bk_layer_create(ctx, &desc, &copy);
    if (r == APT_OK) r = apt_module_restore(copy, data, (size_t)apt_module_bytes(m));
    if (r == APT_OK) apt_module_destroy(m);
    return r;
}

static void test_memory_runs_out(void **state)
{
    (void)state;
    inputs in;
    apt_rng rng = apt_rng_make(5, 5);
    for (int32_t i = 0; i < ROWS * WIDE; i++) in.x[i] = in.dy[i] = uniform(&rng, -1, 1);
    assert_true(test_every_allocation(everything, &in) > 60);
}

/* ------------------------------------------------------------------------------------------------ bad input */

static void test_descs_refuse(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    apt_module *m = NULL;
    for (int32_t c = 0; c < 14; c++) {
        apt_bk_layer_desc d = layer_desc();
        switch (c) {
            case 0: d.moe.hidden = 0; break;
            case 1: d.moe.hidden = 1; break;
            case 2: d.moe.hidden = 1 << 30; break;
            case 3: d.moe.experts = -1; break;
            case 4: d.moe.experts = 65; break;
            case 5: d.moe.top_k = 4; break;
            case 6: d.moe.top_k = -1; break;
            case 7: d.moe.neurons = -1; break;
            case 8: d.temperature = -1; break;
            case 9: d.temperature = 1e-5f; break;
            case 10: d.z.im = 0.01f; break;
            case 11: d.z.im = NAN; break;
            case 12: d.z.re = 1e9f; break;
            default: d.scale = INFINITY; break;
        }
        const int32_t errors = log.errors;
        assert_result(apt_bk_layer_create(ctx, &d, &m), c == 13 ? APT_E_NONFINITE : APT_E_RANGE);
        assert_true(log.errors == errors + 1 && m == NULL);
    }
    assert_result(apt_bk_layer_create(NULL, NULL, &m), APT_E_ARGUMENT);
    assert_result(apt_bk_core_create(ctx, NULL, &m), APT_E_ARGUMENT);
    assert_result(apt_moe_create(ctx, NULL, &m), APT_E_ARGUMENT);
    apt_module_destroy(NULL);
    apt_destroy(ctx);
}

static void test_calls_refuse(void **state)
{
    (void)state;
    test_log log;
    const apt_bk_layer_desc desc = layer_desc();
    apt_ctx *ctx = test_context(1, &log);
    apt_module *m, *core, *moe;
    problem a;
    inputs in;
    float y[ROWS * WIDE], dx[ROWS * WIDE], v[ROWS] = {0};
    apt_module_tensor t;
    assert_ok(ctx, apt_bk_layer_create(ctx, &desc, &m));
    make_problem(&a, &in, m);
    free_bag(&a.b);
    core = apt_bk_layer_core(m);
    moe = apt_bk_layer_moe(m);
    assert_true(core != NULL && moe != NULL && apt_bk_layer_core(core) == NULL && apt_bk_layer_moe(moe) == NULL);
    assert_result(apt_bk_layer_forward(m, y, in.x, 0, 9, 0), APT_E_RANGE);
    assert_result(apt_bk_layer_forward(m, y, in.x, 3, -9, 0), APT_E_RANGE);
    assert_result(apt_bk_layer_forward(m, y, in.x, INT64_MAX / 2, 9, 0), APT_E_RANGE);
    assert_result(apt_bk_layer_forward(m, y, in.x, 3, 9, 3), APT_E_ARGUMENT);
    assert_result(apt_bk_layer_forward(m, NULL, in.x, 3, 9, 0), APT_E_ARGUMENT);
    assert_result(apt_bk_layer_forward(m, y, NULL, 3, 9, 0), APT_E_ARGUMENT);
    assert_result(apt_bk_layer_forward(core, y, in.x, 3, 9, 0), APT_E_ARGUMENT);
    assert_result(apt_bk_core_forward(moe, y, in.x, in.v, 3, 9, 0), APT_E_ARGUMENT);
    assert_result(apt_moe_forward(m, y, in.x, 27, 0), APT_E_ARGUMENT);
    assert_result(apt_moe_forward(moe, y, in.x, -1, 0), APT_E_ARGUMENT);
    assert_result(apt_moe_forward(moe, y, in.x, 0, 0), APT_E_RANGE);
    assert_result(apt_module_sparsity_loss(moe, NULL, 0, 0.5f, 1), APT_E_ARGUMENT);
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 3, 9), APT_E_STATE);
    assert_result(apt_module_get(m, -1, &t), APT_E_RANGE);
    assert_result(apt_module_get(m, apt_module_tensors(m), &t), APT_E_RANGE);
    in.x[5] = NAN;
    assert_result(apt_bk_layer_forward(m, y, in.x, 3, 9, 0), APT_E_NONFINITE);
    in.x[5] = 0;
    assert_ok(ctx, apt_bk_layer_forward(m, y, in.x, 3, 9, 0));
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 9, 3), APT_E_SHAPE);
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 2, 9), APT_E_SHAPE);
    in.dy[5] = INFINITY;
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 3, 9), APT_E_NONFINITE);
    in.dy[5] = 0;
    assert_ok(ctx, apt_bk_layer_backward(m, dx, in.dy, in.x, 3, 9));
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 3, 9), APT_E_STATE);
    /* A part that was used by itself takes the layer's forward with it. */
    assert_ok(ctx, apt_bk_layer_forward(m, y, in.x, 1, 9, 0));
    assert_ok(ctx, apt_bk_core_forward(core, y, in.x, v, 3, 9, 0));
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 1, 9), APT_E_STATE);
    assert_ok(ctx, apt_bk_layer_forward(m, y, in.x, 1, 9, 0));
    assert_ok(ctx, apt_moe_backward(moe, dx, in.dy, in.x, 9));
    assert_result(apt_bk_layer_backward(m, dx, in.dy, in.x, 1, 9), APT_E_STATE);
    apt_module_destroy(core);                                    /* a part: left alone */
    values(m, "importance.1.bias")[0] = NAN;
    assert_result(apt_bk_layer_forward(m, y, in.x, 3, 9, 0), APT_E_NONFINITE);
    values(m, "importance.1.bias")[0] = 0;
    assert_ok(ctx, apt_bk_layer_forward(m, y, in.x, 3, 9, 0));
    apt_destroy(ctx);
}

/* A sequence's features depend on nothing outside it. */
static void test_sequences_are_independent(void **state)
{
    (void)state;
    const apt_bk_core_desc desc = core_desc();
    apt_ctx *ctx = test_context(2, NULL);
    apt_module *m;
    problem a;
    inputs in;
    float together[ROWS * 2], alone[ROWS * 2];
    assert_ok(ctx, apt_bk_core_create(ctx, &desc, &m));
    level(m);
    make_problem(&a, &in, m);
    free_bag(&a.b);
    assert_ok(ctx, apt_bk_core_forward(m, together, in.x, in.v, 3, 9, APT_MASK_FIXED));
    for (int32_t s = 0; s < 3; s++) {
        assert_ok(ctx, apt_bk_core_forward(m, alone, in.x + s * 9 * 6, in.v + s * 9, 1, 9, APT_MASK_FIXED));
        test_near("features", alone, together + s * 9 * 2, 18, 1e-6);
    }
    apt_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads), cmocka_unit_test(test_sequences_are_independent),
#ifndef __SANITIZE_THREAD__                      /* nothing but more of the same, or on one thread, which cannot race */
        cmocka_unit_test(test_core_gradients), cmocka_unit_test(test_layer_gradients), cmocka_unit_test(test_expert_gradients),
        cmocka_unit_test(test_adam), cmocka_unit_test(test_gumbel), cmocka_unit_test(test_stats_and_losses),
        cmocka_unit_test(test_prune_experts), cmocka_unit_test(test_last_expert), cmocka_unit_test(test_progressive_experts),
        cmocka_unit_test(test_resume), cmocka_unit_test(test_restore_refuses), cmocka_unit_test(test_memory_runs_out),
        cmocka_unit_test(test_descs_refuse), cmocka_unit_test(test_calls_refuse),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
