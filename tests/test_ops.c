/* The ops of apt.h: every forward and backward against plain double loops and against finite differences, bit for bit the same
   for any number of threads, on every kernel table the CPU can run.
   build: cc -std=c11 -O2 tests/test_ops.c -o test_ops -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#define TEST_EAGER
#include "apt_test.h"

/* ---- random numbers, matrices with guarded padding --------------------------------------------------------------- */

static uint64_t g_seed = 1;

static double uniform(void)           /* -1 .. 1 */
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(g_seed >> 11) / 4503599627370496.0 - 1.0;
}

static int64_t below(int64_t n)
{
    const int64_t k = (int64_t)((uniform() + 1.0) * 0.5 * (double)n);
    return k < n ? k : n - 1;
}

static double normal(void)            /* close enough: variance 1, smooth */
{
    double sum = 0;
    for (int i = 0; i < 6; i++) sum += uniform();
    return sum / 1.4142135623730951;
}

/* The padding of every matrix is a NaN with this pattern: reading it spoils a result, writing it is seen. */
#define GUARD 0x7fc0beefu

typedef struct tensor {
    const char *name;
    int64_t rows, cols, ld;
    float *v;                         /* values */
    float *g;                         /* inputs: computed gradient; outputs: gradient given to the backward */
    double *ref;                      /* inputs: reference gradient; outputs: reference values */
    bool plus;                        /* the gradient is added to what was there, else written over NaN */
    bool fixed;                       /* not differentiated */
} tensor;

static float *new_floats(int64_t rows, int64_t cols, int64_t ld)
{
    float *p = (float *)malloc((size_t)(rows * ld + 16) * sizeof(float));
    assert_non_null(p);
    for (int64_t i = 0; i < rows * ld + 16; i++) p[i] = apti_float(GUARD);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) p[i * ld + j] = 0;
    return p;
}

static void check_guard(const char *name, const float *p, int64_t rows, int64_t cols, int64_t ld)
{
    for (int64_t i = 0; p && i < rows * ld + 16; i++)
        if ((i >= rows * ld || i % ld >= cols) && apti_bits(p[i]) != GUARD)
            fail_msg("%s: padding overwritten at row %d column %d", name, (int)(i / ld), (int)(i % ld));
}

static tensor new_tensor(const char *name, int64_t rows, int64_t cols, int64_t ld)
{
    tensor t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.rows = rows;
    t.cols = cols;
    t.ld = ld;
    t.v = new_floats(rows, cols, ld);
    t.g = new_floats(rows, cols, ld);
    t.ref = (double *)calloc((size_t)(rows * cols + 1), sizeof(double));
    assert_non_null(t.ref);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            t.v[i * ld + j] = (float)normal();
            t.g[i * ld + j] = (float)normal();
        }
    return t;
}

static void scale_tensor(tensor *t, double factor)
{
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t j = 0; j < t->cols; j++) t->v[i * t->ld + j] *= (float)factor;
}

static void free_tensor(tensor *t)
{
    free(t->v);
    free(t->g);
    free(t->ref);
}

/* ---- a case: one op with its inputs, outputs and reference ------------------------------------------------------- */

enum { MAX_IN = 12, MAX_OUT = 3 };

typedef struct op_case {
    apt_ctx *ctx;
    char name[160];
    tensor in[MAX_IN], out[MAX_OUT];
    int ins, outs;
    void (*forward)(struct op_case *c);
    void (*backward)(struct op_case *c);
    void (*reference)(struct op_case *c);        /* out[].ref and in[].ref in double */
    double (*loss)(struct op_case *c);           /* NULL: sum of out * out.g */
    double tolerance, fd_tolerance, fd_step;
    double floor;                     /* of the errors of gradients: what rounding alone leaves where large terms cancel */
    void *op;                                    /* what the three functions need besides */
} op_case;

static op_case *new_case(void)
{
    op_case *c = (op_case *)calloc(1, sizeof *c);
    assert_non_null(c);
    c->tolerance = 2e-6;
    c->fd_tolerance = 1e-3;
    c->fd_step = 2e-2;
    return c;
}

static tensor *add_in(op_case *c, const char *name, int64_t rows, int64_t cols, int64_t ld, bool plus)
{
    tensor *t = &c->in[c->ins++];
    assert_true(c->ins <= MAX_IN);
    *t = new_tensor(name, rows, cols, ld);
    t->plus = plus;
    return t;
}

static tensor *add_out(op_case *c, const char *name, int64_t rows, int64_t cols, int64_t ld)
{
    tensor *t = &c->out[c->outs++];
    assert_true(c->outs <= MAX_OUT);
    *t = new_tensor(name, rows, cols, ld);
    return t;
}

static void free_case(op_case *c)
{
    for (int i = 0; i < c->ins; i++) free_tensor(&c->in[i]);
    for (int i = 0; i < c->outs; i++) free_tensor(&c->out[i]);
    free(c);
}

static double case_loss(op_case *c)
{
    double loss = 0;
    c->forward(c);
    if (c->loss) return c->loss(c);
    for (int k = 0; k < c->outs; k++)
        for (int64_t i = 0; i < c->out[k].rows; i++)
            for (int64_t j = 0; j < c->out[k].cols; j++)
                loss += (double)c->out[k].v[i * c->out[k].ld + j] * (double)c->out[k].g[i * c->out[k].ld + j];
    return loss;
}

static const float PLUS_START = 0.25f;            /* what a += gradient starts from */

static void run_case(op_case *c)
{
    for (int k = 0; k < c->outs; k++)
        for (int64_t i = 0; i < c->out[k].rows; i++)
            for (int64_t j = 0; j < c->out[k].cols; j++) c->out[k].v[i * c->out[k].ld + j] = apti_float(GUARD);
    for (int k = 0; k < c->ins; k++)
        for (int64_t i = 0; i < c->in[k].rows; i++)
            for (int64_t j = 0; j < c->in[k].cols; j++) c->in[k].g[i * c->in[k].ld + j] = c->in[k].plus ? PLUS_START : apti_float(GUARD);
    c->forward(c);
    c->backward(c);
}

/* |got - want| <= tolerance * largest |want| of the tensor, for each element */
static void compare(const op_case *c, const char *what, const tensor *t, const float *got, double start, double tolerance)
{
    double largest = 0;
    for (int64_t i = 0; i < t->rows * t->cols; i++) largest = fmax(largest, fabs(t->ref[i]));
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t j = 0; j < t->cols; j++) {
            const double want = t->ref[i * t->cols + j], value = (double)got[i * t->ld + j] - start;
            const double bound = tolerance * largest + (t->g == got ? c->floor : 0) + (start != 0 ? 3e-8 : 0) + 1e-30;
            if (!apti_finite(got[i * t->ld + j]) || fabs(value - want) > bound)
                fail_msg("%s [%s]: %s %s(%d,%d) = %.9g, expected %.9g, largest %.3g", c->name, apt_kernel_name(c->ctx), what, t->name,
                         (int)i, (int)j, value, want, largest);
        }
}

/* The gradient along a direction: a few single elements and a few random vectors for each input */
static void check_differences(op_case *c)
{
    for (int k = 0; k < c->ins; k++) {
        tensor *t = &c->in[k];
        const int64_t n = t->rows * t->cols;
        double norm = 0;
        if (t->fixed || n == 0) continue;
        float *u = (float *)malloc((size_t)n * sizeof(float)), *keep = (float *)malloc((size_t)n * sizeof(float));
        assert_true(u && keep);
        for (int64_t i = 0; i < n; i++) norm += t->ref[i] * t->ref[i];
        for (int round = 0; round < 6; round++) {
            double slope = 0, difference = 0;
            const double step = c->fd_step / (round < 3 ? sqrt(sqrt((double)n)) : 1.0), bound = c->fd_tolerance * sqrt(norm) + 1e-4;
            for (int64_t i = 0; i < n; i++) u[i] = round < 3 ? (float)normal() : 0.0f;
            if (round >= 3) u[below(n)] = 1.0f;
            for (int64_t i = 0; i < n; i++) {
                slope += (double)u[i] * ((double)t->g[i / t->cols * t->ld + i % t->cols] - (t->plus ? (double)PLUS_START : 0.0));
                keep[i] = t->v[i / t->cols * t->ld + i % t->cols];
            }
            for (int point = 0; point < 4; point++) {    /* (4 D(h) - D(2h)) / 3 with the central difference D: error h^4 */
                const double h[4] = {step, -step, 2 * step, -2 * step}, weight[4] = {4, -4, -0.5, 0.5};
                for (int64_t i = 0; i < n; i++) t->v[i / t->cols * t->ld + i % t->cols] = keep[i] + (float)h[point] * u[i];
                difference += weight[point] * case_loss(c) / (6.0 * step);
            }
            for (int64_t i = 0; i < n; i++) t->v[i / t->cols * t->ld + i % t->cols] = keep[i];
            if (!(fabs(difference - slope) <= bound))
                fail_msg("%s [%s]: d%s along direction %d is %.9g, differences give %.9g (norm %.3g)", c->name, apt_kernel_name(c->ctx),
                         t->name, round, slope, difference, sqrt(norm));
        }
        free(u);
        free(keep);
    }
}

static apt_ctx *new_context(int32_t threads, const char *kernels)
{
    apt_desc desc = APT_ZERO;
    desc.threads = threads;
    desc.kernels = kernels;
    apt_ctx *ctx = apt_create(&desc);
    assert_non_null(ctx);
    return ctx;
}

enum { CONTEXTS = 4 };
static const int32_t THREADS[CONTEXTS] = {1, 2, 3, 8};
static apt_ctx *g_ctx[CONTEXTS];                  /* of the kernel table at hand */
static bool g_differences;                        /* for one table: each is compared with the reference, which they prove */

static float *copy_of(const float *p, int64_t n)
{
    float *copy = (float *)malloc((size_t)(n + 1) * sizeof(float));
    assert_non_null(copy);
    memcpy(copy, p, (size_t)n * sizeof(float));
    return copy;
}

/* The same bits for 1, 2, 3 and 8 threads */
static void check_threads(op_case *c)
{
    float *out[MAX_OUT], *grad[MAX_IN];
    for (int k = 0; k < c->outs; k++) out[k] = copy_of(c->out[k].v, c->out[k].rows * c->out[k].ld);
    for (int k = 0; k < c->ins; k++) grad[k] = copy_of(c->in[k].g, c->in[k].rows * c->in[k].ld);
    for (int i = 1; i < CONTEXTS; i++) {
        c->ctx = g_ctx[i];
        run_case(c);
        for (int k = 0; k < c->outs; k++)
            if (memcmp(out[k], c->out[k].v, (size_t)(c->out[k].rows * c->out[k].ld) * sizeof(float)))
                fail_msg("%s [%s]: %s differs with %d threads", c->name, apt_kernel_name(c->ctx), c->out[k].name, THREADS[i]);
        for (int k = 0; k < c->ins; k++)
            if (memcmp(grad[k], c->in[k].g, (size_t)(c->in[k].rows * c->in[k].ld) * sizeof(float)))
                fail_msg("%s [%s]: d%s differs with %d threads", c->name, apt_kernel_name(c->ctx), c->in[k].name, THREADS[i]);
    }
    c->ctx = g_ctx[0];
    for (int k = 0; k < c->outs; k++) free(out[k]);
    for (int k = 0; k < c->ins; k++) free(grad[k]);
}

static void check_case(op_case *c)
{
    c->ctx = g_ctx[0];
    run_case(c);
    for (int k = 0; k < c->ins; k++) memset(c->in[k].ref, 0, (size_t)(c->in[k].rows * c->in[k].cols) * sizeof(double));
    for (int k = 0; k < c->outs; k++) memset(c->out[k].ref, 0, (size_t)(c->out[k].rows * c->out[k].cols) * sizeof(double));
    c->reference(c);
    for (int k = 0; k < c->outs; k++) compare(c, "value of", &c->out[k], c->out[k].v, 0.0, c->tolerance);
    for (int k = 0; k < c->ins; k++)
        if (!c->in[k].fixed) compare(c, "gradient of", &c->in[k], c->in[k].g, c->in[k].plus ? (double)PLUS_START : 0.0, c->tolerance);
    check_threads(c);
    run_case(c);
    if (c->fd_tolerance > 0 && g_differences) check_differences(c);
    for (int k = 0; k < c->ins; k++) {
        check_guard(c->in[k].name, c->in[k].v, c->in[k].rows, c->in[k].cols, c->in[k].ld);
        check_guard(c->in[k].name, c->in[k].g, c->in[k].rows, c->in[k].cols, c->in[k].ld);
    }
    for (int k = 0; k < c->outs; k++) check_guard(c->out[k].name, c->out[k].v, c->out[k].rows, c->out[k].cols, c->out[k].ld);
    free_case(c);
}

static double at(const tensor *t, int64_t i, int64_t j)
{
    return (double)t->v[i * t->ld + j];
}

static double up(const tensor *t, int64_t i, int64_t j)      /* gradient that comes in */
{
    return (double)t->g[i * t->ld + j];
}

/* Masks with zeros, 0.3 and ones */
static void fill_mask(tensor *t)
{
    const float values[3] = {0.0f, 0.3f, 1.0f};
    for (int64_t j = 0; j < t->cols; j++) t->v[j] = values[below(3)];
}

/* Runs a test body for every kernel table. */
static void each_table(void (*body)(void))
{
    const apti_kernels *list[8];
#ifdef APT_TEST_CUDA
    const int32_t count = (int32_t)apti_min_i64(1, apti_kernels_list(list, 8));     /* of the CPU's only what the device does not have */
#else
    const int32_t count = apti_kernels_list(list, 8);
#endif
    assert_true(count >= 1);
    for (int32_t k = TEST_FIRST_TABLE(count); k < count; k++) {
        for (int i = 0; i < CONTEXTS; i++) g_ctx[i] = new_context(THREADS[i], list[k]->name);
        g_seed = 42;
        g_differences = k == count - 1 && TEST_SAMPLE(2) == 1;          /* the same calls over and over */
        body();
        for (int i = 0; i < CONTEXTS; i++) apt_destroy(g_ctx[i]);
    }
}

/* ---- linear ------------------------------------------------------------------------------------------------------ */

enum { LX, LW, LBIAS, LA, LB, LRES, LMASK };     /* inputs of the linear case */

typedef struct linear_case {
    int64_t rows, in, out, rank;
    int32_t act;
    bool bias, residual, mask, accumulate;
    float scale;
} linear_case;

static apti_linear_op linear_op(const op_case *c, apti_packed *packed)
{
    const linear_case *l = (const linear_case *)c->op;
    apti_linear_op op = APT_ZERO;
    memset(packed, 0, sizeof *packed);
    packed->n = l->out;
    packed->k = l->in;
    packed->nr = apti_panel_width(c->ctx);
    packed->type = APT_F32;
    packed->data = apti_alloc(c->ctx, 1, apti_packed_bytes(c->ctx, l->out, l->in, APT_F32));
    assert_non_null(packed->data);
    apti_pack(c->ctx, packed, c->in[LW].v, c->in[LW].ld);
    op.out = l->out;
    op.in = l->in;
    op.w = packed;
    op.bias = l->bias ? c->in[LBIAS].v : NULL;
    op.rank = l->rank;
    op.scale = l->scale;
    op.a = c->in[LA].v;
    op.b = c->in[LB].v;
    return op;
}

/* out[0] = y, out[1] = value before the activation (its gradient is not used) */
static void linear_both(op_case *c, bool backward)
{
    const linear_case *l = (const linear_case *)c->op;
    const tensor *x = &c->in[LX], *res = &c->in[LRES], *y = &c->out[0], *pre = &c->out[1];
    const float *mask = l->mask ? c->in[LMASK].v : NULL;
    apti_packed packed;
    const apti_linear_op op = linear_op(c, &packed);
    float *xa = new_floats(l->rows, l->rank, l->rank), *dya = new_floats(l->rows, l->rank, l->rank);
    float *dz = new_floats(l->rows, l->out, y->ld);
    apti_epilogue e;
    memset(&e, 0, sizeof e);
    e.act = l->act;
    e.pre = pre->v;
    e.ld_pre = pre->ld;
    e.residual = l->residual ? res->v : NULL;
    e.ld_residual = res->ld;
    e.mask = mask;
    apti_linear_forward(c->ctx, &op, y->v, y->ld, x->v, x->ld, l->rows, l->rank ? xa : NULL, &e);
    if (backward) {
        apti_linear_grad grad;
        grad.w = c->in[LW].g;
        grad.bias = l->bias ? c->in[LBIAS].g : NULL;
        grad.a = l->rank ? c->in[LA].g : NULL;
        grad.b = l->rank ? c->in[LB].g : NULL;
        apti_act_backward(c->ctx, dz, y->ld, y->g, y->ld, pre->v, pre->ld, mask, l->rows, l->out, l->act);
        if (l->residual) apti_act_backward(c->ctx, res->g, res->ld, y->g, y->ld, NULL, 0, mask, l->rows, l->out, -1);
        apti_linear_backward(c->ctx, &op, x->g, x->ld, l->accumulate, dz, y->ld, x->v, x->ld, xa, dya, l->rows, &grad);
    }
    check_guard("xa", xa, l->rows, l->rank, l->rank);
    check_guard("dya", dya, l->rows, l->rank, l->rank);
    check_guard("dz", dz, l->rows, l->out, y->ld);
    free(xa);
    free(dya);
    free(dz);
    apti_free(c->ctx, packed.data);
}

static void linear_forward(op_case *c) { linear_both(c, false); }
static void linear_backward(op_case *c) { linear_both(c, true); }

static double linear_loss(op_case *c)
{
    double loss = 0;
    for (int64_t i = 0; i < c->out[0].rows; i++)
        for (int64_t j = 0; j < c->out[0].cols; j++) loss += at(&c->out[0], i, j) * up(&c->out[0], i, j);
    return loss;
}

static double ref_act(double x, int32_t act, double *slope)
{
    const double c = 0.7978845608028654, u = c * (x + 0.044715 * x * x * x), t = tanh(u);
    *slope = 1;
    if (act == APT_GELU_ERF) {
        *slope = 0.5 * erfc(-x * 0.7071067811865476) + x * 0.3989422804014327 * exp(-0.5 * x * x);
        return 0.5 * x * erfc(-x * 0.7071067811865476);
    }
    if (act == APT_GELU_TANH) {
        *slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
        return 0.5 * x * (1 + t);
    }
    if (act == APT_RELU) *slope = x > 0 ? 1 : 0;
    return act == APT_RELU && x <= 0 ? 0 : x;
}

static void linear_reference(op_case *c)
{
    const linear_case *l = (const linear_case *)c->op;
    tensor *x = &c->in[LX], *w = &c->in[LW], *a = &c->in[LA], *b = &c->in[LB];
    double *xa = (double *)calloc((size_t)(l->rank + 1), sizeof(double)), *dxa = (double *)calloc((size_t)(l->rank + 1), sizeof(double));
    for (int64_t i = 0; i < l->rows; i++) {
        for (int64_t r = 0; r < l->rank; r++) {
            xa[r] = dxa[r] = 0;
            for (int64_t p = 0; p < l->in; p++) xa[r] += (double)l->scale * at(x, i, p) * at(a, r, p);
        }
        for (int64_t j = 0; j < l->out; j++) {
            const double mask = l->mask ? at(&c->in[LMASK], 0, j) : 1.0, dy = up(&c->out[0], i, j) * mask;
            double z = l->bias ? at(&c->in[LBIAS], 0, j) : 0, slope;
            for (int64_t p = 0; p < l->in; p++) z += at(x, i, p) * at(w, j, p);
            for (int64_t r = 0; r < l->rank; r++) z += xa[r] * at(b, j, r);
            const double y = ref_act(z, l->act, &slope) + (l->residual ? at(&c->in[LRES], i, j) : 0), dz = dy * slope;
            c->out[0].ref[i * l->out + j] = y * mask;
            c->out[1].ref[i * l->out + j] = z;
            if (l->residual) c->in[LRES].ref[i * l->out + j] = dy;
            if (l->bias) c->in[LBIAS].ref[j] += dz;
            for (int64_t p = 0; p < l->in; p++) {
                w->ref[j * l->in + p] += dz * at(x, i, p);
                x->ref[i * l->in + p] += dz * at(w, j, p);
            }
            for (int64_t r = 0; r < l->rank; r++) {
                b->ref[j * l->rank + r] += dz * xa[r];
                dxa[r] += dz * at(b, j, r);
            }
        }
        for (int64_t r = 0; r < l->rank; r++)
            for (int64_t p = 0; p < l->in; p++) {
                a->ref[r * l->in + p] += (double)l->scale * dxa[r] * at(x, i, p);
                x->ref[i * l->in + p] += (double)l->scale * dxa[r] * at(a, r, p);
            }
    }
    free(xa);
    free(dxa);
}

static void linear_check(linear_case l)
{
    op_case *c = new_case();
    c->op = &l;
    snprintf(c->name, sizeof c->name, "linear rows %d in %d out %d rank %d act %d", (int)l.rows, (int)l.in, (int)l.out, (int)l.rank, l.act);
    c->forward = linear_forward;
    c->backward = linear_backward;
    c->reference = linear_reference;
    c->loss = linear_loss;
    add_in(c, "x", l.rows, l.in, l.in + 3, l.accumulate);
    add_in(c, "w", l.out, l.in, l.in, true);
    add_in(c, "bias", 1, l.out, l.out, true)->fixed = !l.bias;
    add_in(c, "a", l.rank, l.in, l.in, true);
    add_in(c, "b", l.out, l.rank, l.rank, true);
    add_in(c, "residual", l.rows, l.out, l.out + 1, false)->fixed = !l.residual;
    fill_mask(add_in(c, "mask", 1, l.out, l.out, false));
    c->in[LMASK].fixed = true;
    scale_tensor(&c->in[LW], 1.0 / sqrt((double)l.in));      /* activations of size 1 */
    scale_tensor(&c->in[LA], 1.0 / sqrt((double)l.in));
    scale_tensor(&c->in[LB], 0.5 / sqrt((double)l.rank + 1.0));
    add_out(c, "y", l.rows, l.out, l.out + 2);
    add_out(c, "pre", l.rows, l.out, l.out + 5);
    if (l.act == APT_RELU) c->fd_tolerance = 5e-2;       /* differences run across the kink */
    c->fd_step = l.act == APT_RELU ? 3e-4 : 2e-2;
    if (l.rows == 0) c->fd_tolerance = 0;
    check_case(c);
}

static void linear_body(void)
{
    const int64_t shape[][4] = {{1, 1, 1, 0}, {1, 1, 1, 1}, {2, 3, 1, 2}, {1, 17, 33, 8}, {3, 5, 7, 2}, {13, 33, 17, 8}, {65, 40, 50, 3},
                                {100, 96, 130, 16}, {7, 1, 5, 1}, {0, 4, 4, 2}, {5, 9, 6, 70}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int variant = 0; variant < 4; variant++) {
            linear_case l;
            memset(&l, 0, sizeof l);
            l.rows = shape[s][0];
            l.in = shape[s][1];
            l.out = shape[s][2];
            l.rank = shape[s][3];
            l.act = variant - 1;
            l.scale = 2.0f;
            l.bias = variant != 1;
            l.residual = variant % 2 == 0;
            l.mask = variant >= 1;
            l.accumulate = variant >= 2;
            linear_check(l);
        }
}

static void test_linear(void **state)
{
    (void)state;
    each_table(linear_body);
}

/* Gradients that are not asked for change nothing in the others. */
static void linear_optional_body(void)
{
    linear_case l;
    memset(&l, 0, sizeof l);
    l.rows = 9;
    l.in = 21;
    l.out = 19;
    l.rank = 4;
    l.act = -1;
    l.scale = 0.5f;
    l.bias = true;
    op_case *c = new_case();
    c->op = &l;
    c->ctx = g_ctx[1];
    add_in(c, "x", l.rows, l.in, l.in, false);
    add_in(c, "w", l.out, l.in, l.in, true);
    add_in(c, "bias", 1, l.out, l.out, true);
    add_in(c, "a", l.rank, l.in, l.in, true);
    add_in(c, "b", l.out, l.rank, l.rank, true);
    add_in(c, "residual", l.rows, l.out, l.out, false);
    add_in(c, "mask", 1, l.out, l.out, false);
    add_out(c, "y", l.rows, l.out, l.out);
    add_out(c, "pre", l.rows, l.out, l.out);
    c->forward = linear_forward;
    c->backward = linear_backward;
    run_case(c);
    apti_packed packed;
    const apti_linear_op op = linear_op(c, &packed);
    float *xa = new_floats(l.rows, l.rank, l.rank), *dya = new_floats(l.rows, l.rank, l.rank);
    float *dx = new_floats(l.rows, l.in, l.in), *y = new_floats(l.rows, l.out, l.out), *grad = new_floats(l.out, l.in, l.in);
    apti_linear_grad g;
    apti_linear_forward(c->ctx, &op, y, l.out, c->in[LX].v, l.in, l.rows, xa, NULL);
    assert_memory_equal(y, c->out[0].v, (size_t)(l.rows * l.out) * sizeof(float));
    apti_linear_backward(c->ctx, &op, dx, l.in, false, c->out[0].g, l.out, NULL, 0, NULL, dya, l.rows, NULL);
    assert_memory_equal(dx, c->in[LX].g, (size_t)(l.rows * l.in) * sizeof(float));
    memset(&g, 0, sizeof g);
    for (int64_t i = 0; i < l.rank * l.in; i++) grad[i] = PLUS_START;
    g.a = grad;
    apti_linear_backward(c->ctx, &op, NULL, 0, false, c->out[0].g, l.out, c->in[LX].v, l.in, NULL, dya, l.rows, &g);
    assert_memory_equal(grad, c->in[LA].g, (size_t)(l.rank * l.in) * sizeof(float));
    g.a = NULL;
    g.b = grad;
    for (int64_t i = 0; i < l.rank * l.out; i++) grad[i] = PLUS_START;
    apti_linear_backward(c->ctx, &op, NULL, 0, false, c->out[0].g, l.out, NULL, 0, xa, NULL, l.rows, &g);
    assert_memory_equal(grad, c->in[LB].g, (size_t)(l.rank * l.out) * sizeof(float));
    free(xa);
    free(dya);
    free(dx);
    free(y);
    free(grad);
    apti_free(c->ctx, packed.data);
    free_case(c);
}

static void test_linear_optional(void **state)
{
    (void)state;
    each_table(linear_optional_body);
}

/* ---- layer norm -------------------------------------------------------------------------------------------------- */

enum { NZ, NGAMMA, NBETA, NMASK };

typedef struct norm_case { int64_t rows, d; bool mask, in_place, rms; float eps; float *stats; } norm_case;

static void norm_forward(op_case *c)
{
    norm_case *n = (norm_case *)c->op;
    const tensor *z = &c->in[NZ], *y = &c->out[0];
    if (n->rms)
        apti_rmsnorm_forward(c->ctx, y->v, y->ld, n->stats, z->v, z->ld, c->in[NGAMMA].v, n->mask ? c->in[NMASK].v : NULL, n->rows, n->d, n->eps);
    else apti_layernorm_forward(c->ctx, y->v, y->ld, n->stats, z->v, z->ld, c->in[NGAMMA].v, c->in[NBETA].v, n->mask ? c->in[NMASK].v : NULL,
                           n->rows, n->d, n->eps);
}

static void norm_backward(op_case *c)
{
    norm_case *n = (norm_case *)c->op;
    const tensor *z = &c->in[NZ], *y = &c->out[0];
    const float *dy = y->g;
    if (n->in_place) {                /* dz is dy */
        assert_true(z->ld == y->ld);
        memcpy(z->g, y->g, (size_t)(n->rows * z->ld) * sizeof(float));
        dy = z->g;
    }
    if (n->rms)
        apti_rmsnorm_backward(c->ctx, z->g, z->ld, c->in[NGAMMA].g, dy, y->ld, z->v, z->ld, n->stats, c->in[NGAMMA].v,
                              n->mask ? c->in[NMASK].v : NULL, n->rows, n->d);
    else apti_layernorm_backward(c->ctx, z->g, z->ld, c->in[NGAMMA].g, c->in[NBETA].g, dy, y->ld, z->v, z->ld, n->stats, c->in[NGAMMA].v,
                            n->mask ? c->in[NMASK].v : NULL, n->rows, n->d);
}

/* RMS: the mask only chooses columns. */
static double norm_mask(const op_case *c, const norm_case *n, int64_t j)
{
    const double m = n->mask ? at(&c->in[NMASK], 0, j) : 1;
    return n->rms && m != 0 ? 1 : m;
}

static void norm_reference(op_case *c)
{
    norm_case *n = (norm_case *)c->op;
    for (int64_t i = 0; i < n->rows; i++) {
        double mean = 0, variance = 0, alive = 0, g_sum = 0, gx_sum = 0;
        for (int64_t j = 0; j < n->d; j++) {
            const double m = norm_mask(c, n, j);
            alive += m != 0;
            mean += m != 0 ? at(&c->in[NZ], i, j) : 0;
        }
        mean = n->rms ? 0 : mean / (alive > 0 ? alive : 1);
        for (int64_t j = 0; j < n->d; j++) {
            const double m = norm_mask(c, n, j), v = at(&c->in[NZ], i, j) - mean;
            variance += m != 0 ? v * v : 0;
        }
        const double rstd = 1 / sqrt(variance / (alive > 0 ? alive : 1) + (double)n->eps);
        for (int64_t j = 0; j < n->d; j++) {
            const double m = norm_mask(c, n, j), x = (at(&c->in[NZ], i, j) - mean) * rstd;
            c->out[0].ref[i * n->d + j] = m * (at(&c->in[NGAMMA], 0, j) * x + (n->rms ? 0 : at(&c->in[NBETA], 0, j)));
            if (m == 0) continue;
            c->in[NGAMMA].ref[j] += m * up(&c->out[0], i, j) * x;
            c->in[NBETA].ref[j] += m * up(&c->out[0], i, j);
            g_sum += m * up(&c->out[0], i, j) * at(&c->in[NGAMMA], 0, j);
            gx_sum += m * up(&c->out[0], i, j) * at(&c->in[NGAMMA], 0, j) * x;
        }
        for (int64_t j = 0; j < n->d; j++) {
            const double m = norm_mask(c, n, j), x = (at(&c->in[NZ], i, j) - mean) * rstd;
            if (m == 0) continue;
            c->in[NZ].ref[i * n->d + j] = rstd * (m * up(&c->out[0], i, j) * at(&c->in[NGAMMA], 0, j) - (n->rms ? 0 : g_sum / alive) - x * gx_sum / alive);
        }
    }
}

static void norm_check(int64_t rows, int64_t d, int mask, bool in_place, bool rms)
{
    norm_case n;
    op_case *c = new_case();
    n.rows = rows;
    n.d = d;
    n.mask = mask > 0;
    n.in_place = in_place;
    n.rms = rms;
    n.eps = d == 1 ? 1e-2f : 1e-5f;
    n.stats = new_floats(rows, 2, 2);
    c->op = &n;
    snprintf(c->name, sizeof c->name, "%s rows %d d %d mask %d", rms ? "rms norm" : "norm", (int)rows, (int)d, mask);
    c->forward = norm_forward;
    c->backward = norm_backward;
    c->reference = norm_reference;
    add_in(c, "z", rows, d, d + 3, false);
    add_in(c, "gamma", 1, d, d, true);
    add_in(c, "beta", 1, d, d, true)->fixed = rms;
    add_in(c, "mask", 1, d, d, false)->fixed = true;
    fill_mask(&c->in[NMASK]);
    if (mask == 2) memset(c->in[NMASK].v, 0, (size_t)d * sizeof(float));
    for (int64_t j = 0; mask == 3 && j < d; j += 2) c->in[NMASK].v[j] = 1.0f;
    int64_t alive = 0;
    for (int64_t j = 0; j < d; j++) alive += !mask || c->in[NMASK].v[j] != 0.0f;
    if (alive == 2 && !rms) c->fd_tolerance = 0;                 /* (z - mean) * rstd of two numbers is +-1 */
    if (rms && alive == 1 && d > 1) c->fd_tolerance = 0;  /* so is z * rstd of one */
    if (alive <= 4) c->tolerance = alive == (rms ? 1 : 2) ? 1e-2 : 5e-5;     /* and of a few its gradient is a small difference */
    add_out(c, "y", rows, d, d + 3);
    if (rows == 0) c->fd_tolerance = 0;
    check_case(c);
    check_guard("stats", n.stats, rows, 2, 2);
    free(n.stats);
}

static void norm_body(void)
{
    const int64_t shape[][2] = {{1, 1}, {3, 1}, {1, 5}, {4, 2}, {7, 16}, {5, 17}, {33, 64}, {70, 130}, {200, 48}, {6, 768}, {2, 3001}, {0, 8}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int mask = 0; mask < 8; mask++)                  /* none, mixed, all 0, half; then the same for RMS */
            norm_check(shape[s][0], shape[s][1], mask % 4, mask % 2 == 1, mask >= 4);
}

static void test_layernorm(void **state)
{
    (void)state;
    each_table(norm_body);
}

/* A masked row and its compacted copy: the same bits forward, the same numbers backward. Statistics of long rows far from 0. */
static void norm_compact_body(void)
{
    enum { ROWS = 5, D = 61 };
    apt_ctx *ctx = g_ctx[1];
    tensor z = new_tensor("z", ROWS, D, D), gamma = new_tensor("gamma", 1, D, D), beta = new_tensor("beta", 1, D, D);
    tensor small = new_tensor("small", ROWS, D, D), out = new_tensor("out", ROWS, D, D), out2 = new_tensor("out2", ROWS, D, D);
    float mask[D], gamma2[D], beta2[D], stats[2 * ROWS], stats2[2 * ROWS], dz[ROWS * D], dz2[ROWS * D], dy2[ROWS * D];
    int64_t kept[D], n = 0;
    for (int64_t j = 0; j < D; j++) {
        mask[j] = j % 3 ? 1.0f : 0.0f;
        if (mask[j] != 0.0f) kept[n++] = j;
    }
    for (int64_t k = 0; k < n; k++) {
        gamma2[k] = gamma.v[kept[k]];
        beta2[k] = beta.v[kept[k]];
        for (int64_t i = 0; i < ROWS; i++) {
            small.v[i * n + k] = z.v[i * D + kept[k]];
            dy2[i * n + k] = out.g[i * D + kept[k]];
        }
    }
    apti_layernorm_forward(ctx, out.v, D, stats, z.v, D, gamma.v, beta.v, mask, ROWS, D, 1e-12f);
    apti_layernorm_forward(ctx, out2.v, n, stats2, small.v, n, gamma2, beta2, NULL, ROWS, n, 1e-12f);
    apti_layernorm_backward(ctx, dz, D, NULL, NULL, out.g, D, z.v, D, stats, gamma.v, mask, ROWS, D);
    apti_layernorm_backward(ctx, dz2, n, NULL, NULL, dy2, n, small.v, n, stats2, gamma2, NULL, ROWS, n);
    assert_memory_equal(stats, stats2, sizeof stats);
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t k = 0; k < n; k++) {
            assert_true(out.v[i * D + kept[k]] == out2.v[i * n + k]);
            assert_true(fabsf(dz[i * D + kept[k]] - dz2[i * n + k]) < 2e-6f);
        }
    apti_rmsnorm_forward(ctx, out.v, D, stats, z.v, D, gamma.v, mask, ROWS, D, 1e-6f);
    apti_rmsnorm_forward(ctx, out2.v, n, stats2, small.v, n, gamma2, NULL, ROWS, n, 1e-6f);
    assert_memory_equal(stats, stats2, sizeof stats);
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t j = 0, k = 0; j < D; j++) {
            if (mask[j] != 0.0f) assert_true(out.v[i * D + j] == out2.v[i * n + k++]);
            else assert_true(out.v[i * D + j] == 0);
        }
    free_tensor(&z);
    free_tensor(&gamma);
    free_tensor(&beta);
    free_tensor(&small);
    free_tensor(&out);
    free_tensor(&out2);

    const int64_t d = 16384;
    tensor row = new_tensor("row", 1, d, d), y = new_tensor("y", 1, d, d);
    double mean = 0, variance = 0;
    for (int64_t j = 0; j < d; j++) row.v[j] += 100.0f;
    for (int64_t j = 0; j < d; j++) mean += (double)row.v[j] / (double)d;
    for (int64_t j = 0; j < d; j++) variance += ((double)row.v[j] - mean) * ((double)row.v[j] - mean) / (double)d;
    apti_layernorm_forward(ctx, y.v, d, stats, row.v, d, row.v, row.v, NULL, 1, d, 1e-12f);
    assert_true(fabs((double)stats[0] - mean) <= 2e-7 * mean);
    assert_true(fabs((double)stats[1] * sqrt(variance) - 1) <= 5e-7);
    free_tensor(&row);
    free_tensor(&y);
}

static void test_layernorm_compact(void **state)
{
    (void)state;
#ifdef APT_TEST_CUDA
    test_skip("a device adds up the places of the dense row: the masked row has other rounding than the compacted one");
#endif
    each_table(norm_compact_body);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

enum { AQ, AK, AV, ABIAS };

typedef struct attention_case {
    apti_attention_op op;
    int32_t q_offsets[128], k_offsets[128];
    float head_mask[16];
    float *lse;
    bool bias, no_o;
} attention_case;

static void attention_forward(op_case *c)
{
    attention_case *a = (attention_case *)c->op;
    const tensor *q = &c->in[AQ], *k = &c->in[AK], *v = &c->in[AV], *o = &c->out[0];
    apti_attention_op op = a->op;
    op.bias = a->bias ? c->in[ABIAS].v : NULL;
    apti_attention_forward(c->ctx, &op, o->v, o->ld, a->lse, q->v, q->ld, k->v, k->ld, v->v, v->ld);
}

static void attention_backward(op_case *c)
{
    attention_case *a = (attention_case *)c->op;
    const tensor *q = &c->in[AQ], *k = &c->in[AK], *v = &c->in[AV], *o = &c->out[0];
    apti_attention_op op = a->op;
    op.bias = a->bias ? c->in[ABIAS].v : NULL;
    apti_attention_backward(c->ctx, &op, q->g, q->ld, k->g, k->ld, v->g, v->ld, a->bias ? c->in[ABIAS].g : NULL, o->g, o->ld,
                            a->no_o ? NULL : o->v, o->ld, a->lse, q->v, q->ld, k->v, k->ld, v->v, v->ld);
}

static int64_t clamp_distance(int64_t distance, int64_t span)
{
    distance = distance > span - 1 ? span - 1 : distance;
    return (distance < 1 - span ? 1 - span : distance) + span - 1;
}

/* One sequence and head, T x T in double */
static void attention_reference_head(op_case *c, int64_t s, int64_t h)
{
    attention_case *a = (attention_case *)c->op;
    const int64_t q0 = a->q_offsets[s], tq = a->q_offsets[s + 1] - q0, k0 = a->k_offsets[s], tk = a->k_offsets[s + 1] - k0;
    const int64_t dim = a->op.head_dim, hc = h * dim, gc = h * a->op.kv_heads / a->op.heads * dim, shift = a->op.causal ? tk - tq : 0;
    const int64_t span = a->op.bias_span, wide = 2 * span - 1, width = c->in[AK].cols, width_q = c->in[AQ].cols;
    const double mask = a->op.head_mask ? (double)a->head_mask[h / (a->op.heads / a->op.kv_heads)] : 1.0, scale = (double)a->op.scale;
    double *p = (double *)calloc((size_t)(tk + 1), sizeof(double)), *dp = (double *)calloc((size_t)(tk + 1), sizeof(double));
    for (int64_t i = 0; i < tq; i++) {
        double max = 0, sum = 0, dot = 0;
        int64_t n = tk;
        if (a->op.causal) n = i + shift + 1 > tk ? tk : i + shift + 1;
        for (int64_t j = 0; j < n; j++) {
            p[j] = a->bias ? at(&c->in[ABIAS], h, clamp_distance(j - i - shift, span)) : 0;
            for (int64_t e = 0; e < dim; e++) p[j] += scale * at(&c->in[AQ], q0 + i, hc + e) * at(&c->in[AK], k0 + j, gc + e);
            if (j == 0 || p[j] > max) max = p[j];
        }
        for (int64_t j = 0; j < n; j++) sum += p[j] = exp(p[j] - max);
        for (int64_t j = 0; j < n; j++) {
            p[j] /= sum;
            dp[j] = 0;
            for (int64_t e = 0; e < dim; e++) {
                const double d_o = mask * up(&c->out[0], q0 + i, hc + e);
                c->out[0].ref[(q0 + i) * width_q + hc + e] += mask * p[j] * at(&c->in[AV], k0 + j, gc + e);
                c->in[AV].ref[(k0 + j) * width + gc + e] += p[j] * d_o;
                dp[j] += d_o * at(&c->in[AV], k0 + j, gc + e);
            }
            dot += p[j] * dp[j];
        }
        for (int64_t j = 0; j < n; j++) {
            const double ds = p[j] * (dp[j] - dot);
            if (a->bias) c->in[ABIAS].ref[h * wide + clamp_distance(j - i - shift, span)] += ds;
            for (int64_t e = 0; e < dim; e++) {
                c->in[AQ].ref[(q0 + i) * width_q + hc + e] += scale * ds * at(&c->in[AK], k0 + j, gc + e);
                c->in[AK].ref[(k0 + j) * width + gc + e] += scale * ds * at(&c->in[AQ], q0 + i, hc + e);
            }
        }
    }
    free(p);
    free(dp);
}

static void attention_reference(op_case *c)
{
    attention_case *a = (attention_case *)c->op;
    for (int64_t s = 0; s < a->op.sequences; s++)
        for (int64_t h = 0; h < a->op.heads; h++) attention_reference_head(c, s, h);
}

typedef struct attention_shape {
    int32_t heads, kv_heads, head_dim;
    bool causal;
    int32_t span;                     /* 0: no bias */
    bool head_mask, no_o;
    int32_t sequences;
    const int32_t *q, *k;             /* lengths; k NULL: self attention */
    double loudness;                  /* factor on q and k */
} attention_shape;

/* The case owns *a, which the caller frees after the case. */
static op_case *attention_make(const attention_shape *s, attention_case *a)
{
    op_case *c = new_case();
    memset(a, 0, sizeof *a);
    for (int32_t i = 0; i < s->sequences; i++) {
        a->q_offsets[i + 1] = a->q_offsets[i] + s->q[i];
        a->k_offsets[i + 1] = a->k_offsets[i] + (s->k ? s->k[i] : s->q[i]);
    }
    const int64_t rows = a->q_offsets[s->sequences], rows_k = a->k_offsets[s->sequences];
    a->op.heads = s->heads;
    a->op.kv_heads = s->kv_heads;
    a->op.head_dim = s->head_dim;
    a->op.scale = (float)(1.0 / sqrt((double)s->head_dim));
    a->op.causal = s->causal;
    a->op.sequences = s->sequences;
    a->op.q_offsets = a->q_offsets;
    a->op.k_offsets = s->k ? a->k_offsets : a->q_offsets;
    a->op.bias_span = s->span > 0 ? s->span : 1;
    a->bias = s->span > 0;
    a->no_o = s->no_o;
    if (s->head_mask) a->op.head_mask = a->head_mask;
    for (int h = 0; h < s->kv_heads; h++) a->head_mask[h] = h % 3 == 0 ? 0.3f : h % 3 == 1 ? 0.0f : 1.0f;
    a->lse = new_floats(rows, s->heads, s->heads);
    snprintf(c->name, sizeof c->name, "attention heads %d/%d dim %d causal %d span %d mask %d o %d sequences %d (%d..)", s->heads, s->kv_heads,
             s->head_dim, s->causal, s->span, s->head_mask, !s->no_o, s->sequences, s->q[0]);
    c->op = a;
    c->forward = attention_forward;
    c->backward = attention_backward;
    c->reference = attention_reference;
    c->tolerance = 4e-6;
    const int64_t wide = (int64_t)s->heads * s->head_dim, narrow = (int64_t)s->kv_heads * s->head_dim;
    add_in(c, "q", rows, wide, wide + 5, false);
    add_in(c, "k", rows_k, narrow, narrow + 3, false);
    add_in(c, "v", rows_k, narrow, narrow + 1, false);
    add_in(c, "bias", s->heads, 2 * (int64_t)a->op.bias_span - 1, 2 * (int64_t)a->op.bias_span - 1, true)->fixed = !a->bias;
    add_out(c, "o", rows, wide, wide + 2);
    for (int t = AQ; s->loudness > 0 && t <= AK; t++) scale_tensor(&c->in[t], s->loudness);
    return c;
}

static void attention_check(const attention_shape *s)
{
    attention_case *a = (attention_case *)malloc(sizeof *a);
    assert_non_null(a);
    op_case *c = attention_make(s, a);
    if (s->loudness > 0) {
        c->fd_tolerance = 0;
        c->tolerance = 2e-3;          /* logits of about a thousand: their rounding is the error */
#ifdef APT_TEST_CUDA
        /* One key takes nearly all, so dS = P (dP - D) is the difference of two equal sums, which a device adds up in different
           orders: one rounding of each, of numbers between 1 and 2, times keys of this size. */
        c->floor = 2 * 1.19e-7 * s->loudness / sqrt((double)s->head_dim);
#endif
    }
    check_case(c);
    free(a->lse);
    free(a);
}

static void attention_body(void)
{
    const int32_t one[] = {1}, few[] = {3, 1, 13, 7}, other[] = {5, 2, 1, 20}, mixed[] = {65, 1, 64, 33}, longer[] = {140, 300}, keys[] = {300, 129};
    const int32_t blind[] = {6, 4, 9}, seeing[] = {2, 0, 9};
    const attention_shape shape[] = {
        {1, 1, 1, false, 0, false, false, 1, one, NULL, 0},     {2, 2, 3, false, 0, false, false, 4, few, NULL, 0},
        {3, 3, 8, false, 0, true, false, 4, few, NULL, 0},      {3, 3, 8, true, 4, true, true, 4, few, NULL, 0},
        {4, 2, 5, true, 0, true, false, 4, few, NULL, 0},       {6, 2, 7, false, 5, true, false, 4, few, other, 0},
        {4, 1, 16, true, 3, false, true, 4, few, other, 0},     {2, 2, 32, false, 0, false, false, 4, mixed, NULL, 0},
        {2, 1, 33, true, 40, true, false, 4, mixed, NULL, 0},   {3, 3, 20, false, 0, true, true, 2, longer, NULL, 0},
        {2, 2, 16, true, 0, true, false, 2, longer, NULL, 0},   {2, 1, 12, true, 70, true, true, 2, longer, NULL, 0},
        {2, 1, 12, false, 9, true, false, 2, longer, keys, 0},  {2, 2, 8, true, 0, false, false, 2, longer, keys, 0},
        {1, 1, 64, false, 0, false, false, 2, mixed, NULL, 0},  {1, 1, 256, true, 0, false, false, 4, few, NULL, 0},
        {2, 2, 4, true, 3, true, false, 3, blind, seeing, 0},   {2, 2, 4, false, 3, true, true, 3, blind, seeing, 0},
        {2, 2, 16, false, 0, false, false, 4, few, NULL, 30},  {2, 2, 16, true, 0, true, true, 2, longer, NULL, 30},
    };
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) attention_check(&shape[i]);
}

static void test_attention(void **state)
{
    (void)state;
    each_table(attention_body);
}

/* Lengths 1..70, 128 and 300 in one batch; each sequence alone gives the same bits. */
static void attention_batch_body(void)
{
    int32_t length[72];
    for (int32_t i = 0; i < 70; i++) length[i] = i + 1;
    length[70] = 128;
    length[71] = 300;
    for (int causal = 0; causal < 2; causal++) {
        attention_shape s;
        memset(&s, 0, sizeof s);
        s.heads = 2;
        s.kv_heads = 2 - causal;
        s.head_dim = 12;
        s.causal = causal == 1;
        s.sequences = 72;
        s.q = length;
        attention_case *a = (attention_case *)malloc(sizeof *a);
        assert_non_null(a);
        op_case *c = attention_make(&s, a);
        c->ctx = g_ctx[1];
        run_case(c);
        c->reference(c);
        compare(c, "value of", &c->out[0], c->out[0].v, 0.0, c->tolerance);
        for (int k = AQ; k <= AV; k++) compare(c, "gradient of", &c->in[k], c->in[k].g, 0.0, c->tolerance);
        tensor *q = &c->in[AQ], *k = &c->in[AK], *v = &c->in[AV], *o = &c->out[0];
        float *out = new_floats(300, o->cols, o->ld), *lse = new_floats(300, 2, 2), *dq = new_floats(300, q->cols, q->ld);
        float *dk = new_floats(300, k->cols, k->ld), *dv = new_floats(300, v->cols, v->ld);
        for (int32_t i = 0; i < s.sequences; i++) {
            const int64_t row = a->q_offsets[i], rows = length[i];
            const int32_t alone[2] = {0, length[i]};
            apti_attention_op op = a->op;
            op.sequences = 1;
            op.q_offsets = op.k_offsets = alone;
            apti_attention_forward(c->ctx, &op, out, o->ld, lse, q->v + row * q->ld, q->ld, k->v + row * k->ld, k->ld, v->v + row * v->ld, v->ld);
            apti_attention_backward(c->ctx, &op, dq, q->ld, dk, k->ld, dv, v->ld, NULL, o->g + row * o->ld, o->ld, out, o->ld, lse,
                                    q->v + row * q->ld, q->ld, k->v + row * k->ld, k->ld, v->v + row * v->ld, v->ld);
            assert_memory_equal(lse, a->lse + row * 2, (size_t)(rows * 2) * sizeof(float));
            assert_memory_equal(out, o->v + row * o->ld, (size_t)(rows * o->ld) * sizeof(float));
            assert_memory_equal(dq, q->g + row * q->ld, (size_t)(rows * q->ld) * sizeof(float));
            assert_memory_equal(dk, k->g + row * k->ld, (size_t)(rows * k->ld) * sizeof(float));
            assert_memory_equal(dv, v->g + row * v->ld, (size_t)(rows * v->ld) * sizeof(float));
        }
        free(out);
        free(lse);
        free(dq);
        free(dk);
        free(dv);
        free(a->lse);
        free_case(c);
        free(a);
    }
}

static void test_attention_batch(void **state)
{
    (void)state;
    each_table(attention_batch_body);
}

/* Gradients that are not wanted change nothing in the others; lse is optional; a long sequence, which many threads share */
static void attention_options_body(void)
{
    const int32_t lengths[] = {150, 20}, lone[] = {1100};
    attention_shape s;
    memset(&s, 0, sizeof s);
    s.heads = 4;
    s.kv_heads = 2;
    s.head_dim = 9;
    s.sequences = 2;
    s.q = lengths;
    attention_case *a = (attention_case *)malloc(sizeof *a);
    assert_non_null(a);
    op_case *c = attention_make(&s, a);
    c->ctx = g_ctx[1];
    run_case(c);
    tensor *q = &c->in[AQ], *k = &c->in[AK], *v = &c->in[AV], *o = &c->out[0];
    float *grad[3], *out = new_floats(o->rows, o->cols, o->ld);
    for (int want = 1; want < 8; want++) {
        for (int t = 0; t < 3; t++) grad[t] = want >> t & 1 ? new_floats(c->in[t].rows, c->in[t].cols, c->in[t].ld) : NULL;
        apti_attention_backward(c->ctx, &a->op, grad[0], q->ld, grad[1], k->ld, grad[2], v->ld, NULL, o->g, o->ld, o->v, o->ld, a->lse, q->v,
                                q->ld, k->v, k->ld, v->v, v->ld);
        for (int t = 0; t < 3; t++) {
            if (grad[t]) assert_memory_equal(grad[t], c->in[t].g, (size_t)(c->in[t].rows * c->in[t].ld) * sizeof(float));
            free(grad[t]);
        }
    }
    apti_attention_forward(c->ctx, &a->op, out, o->ld, NULL, q->v, q->ld, k->v, k->ld, v->v, v->ld);
    for (int64_t i = 0; i < o->rows; i++) assert_memory_equal(out + i * o->ld, o->v + i * o->ld, (size_t)o->cols * sizeof(float));
    free(out);
    free(a->lse);
    free_case(c);
    for (int causal = 0; causal < 2; causal++) {
        s.heads = s.kv_heads = 1;
        s.head_dim = 4;
        s.causal = causal == 1;
        s.sequences = 1;
        s.q = lone;
        c = attention_make(&s, a);
        c->fd_tolerance = 0;
        check_case(c);
        free(a->lse);
    }
    free(a);
}

static void test_attention_options(void **state)
{
    (void)state;
    each_table(attention_options_body);
}

/* Huge logits stay finite, and a NaN is not swallowed. */
static void attention_extreme_body(void)
{
    enum { T = 70, D = 8 };
    const int32_t offsets[2] = {0, T};
    apt_ctx *ctx = g_ctx[0];
    apti_attention_op op;
    float q[T * D], k[T * D], v[T * D], o[T * D], lse[T], dq[T * D], dk[T * D], dv[T * D], d_o[T * D];
    memset(&op, 0, sizeof op);
    op.heads = op.kv_heads = op.sequences = 1;
    op.head_dim = D;
    op.scale = 1.0f;
    op.q_offsets = op.k_offsets = offsets;
    for (int64_t i = 0; i < T * D; i++) {
        q[i] = (float)(1e9 * normal());
        k[i] = (float)(1e9 * normal());
        v[i] = (float)normal();
        d_o[i] = (float)normal();
    }
    apti_attention_forward(ctx, &op, o, D, lse, q, D, k, D, v, D);
    apti_attention_backward(ctx, &op, dq, D, dk, D, dv, D, NULL, d_o, D, o, D, lse, q, D, k, D, v, D);
    for (int64_t i = 0; i < T * D; i++)
        assert_true(apti_finite(o[i]) && fabsf(o[i]) < 10 && apti_finite(dv[i]) && apti_finite(dq[i]) && apti_finite(dk[i]));
    q[3 * D] = apti_float(0x7fc00000u);
    apti_attention_forward(ctx, &op, o, D, lse, q, D, k, D, v, D);
    for (int64_t j = 0; j < D; j++) assert_true(!apti_finite(o[3 * D + j]) && apti_finite(o[2 * D + j]));
}

static void test_attention_extreme(void **state)
{
    (void)state;
    each_table(attention_extreme_body);
}

/* A cache: keys with room behind them give the bits of keys without. */
static void attention_cache_body(void)
{
    enum { H = 4, G = 2, D = 12, ROOM = 200, N = 3 };
    static float k[N * ROOM * G * D], v[N * ROOM * G * D], q[N * H * D], o[N * H * D], whole[H * D], bias[H * 401];
    const int32_t length[N] = {1, 77, 200}, offsets[N + 1] = {0, 1, 2, 3}, starts[N + 1] = {0, ROOM, 2 * ROOM, 3 * ROOM};
    const int32_t ends[N] = {1, ROOM + 77, 3 * ROOM};
    apt_ctx *ctx = g_ctx[1];
    apti_attention_op op = APT_ZERO;
    for (int64_t i = 0; i < N * ROOM * G * D; i++) k[i] = v[i] = apti_float(GUARD);
    for (int32_t s = 0; s < N; s++)
        for (int64_t i = 0; i < length[s] * G * D; i++) {
            k[s * ROOM * G * D + i] = (float)normal();
            v[s * ROOM * G * D + i] = (float)normal();
        }
    for (int64_t i = 0; i < N * H * D; i++) q[i] = (float)normal();
    for (int64_t i = 0; i < H * 401; i++) bias[i] = (float)normal();
    op.heads = H;
    op.kv_heads = G;
    op.head_dim = D;
    op.scale = 0.3f;
    op.causal = true;
    op.sequences = N;
    op.q_offsets = offsets;
    op.k_offsets = starts;
    op.k_ends = ends;
    op.bias = bias;
    op.bias_span = 201;
    apti_attention_forward(ctx, &op, o, H * D, NULL, q, H * D, k, G * D, v, G * D);
    for (int32_t s = 0; s < N; s++) {
        const int32_t one[2] = {0, 1}, keys[2] = {0, length[s]};
        op.sequences = 1;
        op.q_offsets = one;
        op.k_offsets = keys;
        op.k_ends = NULL;
        apti_attention_forward(ctx, &op, whole, H * D, NULL, q + s * H * D, H * D, k + s * ROOM * G * D, G * D, v + s * ROOM * G * D, G * D);
        assert_memory_equal(whole, o + s * H * D, sizeof whole);
    }
}

static void test_attention_cache(void **state)
{
    (void)state;
    each_table(attention_cache_body);
}

/* ---- rotary positions -------------------------------------------------------------------------------------------- */

typedef struct rotary_case { apti_rotary_op op; float *table, frequency[128]; int32_t positions[64]; } rotary_case;

static void rotary_copy(float *to, int64_t ld, const float *from, int64_t ld_from, int64_t rows, int64_t cols)
{
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * ld, from + i * ld_from, (size_t)cols * sizeof(float));
}

static void rotary_forward(op_case *c)
{
    rotary_case *r = (rotary_case *)c->op;
    rotary_copy(c->out[0].v, c->out[0].ld, c->in[0].v, c->in[0].ld, c->in[0].rows, c->in[0].cols);
    apti_rotary_forward(c->ctx, &r->op, c->out[0].v, c->out[0].ld, c->out[0].rows);
}

static void rotary_backward(op_case *c)
{
    rotary_case *r = (rotary_case *)c->op;
    rotary_copy(c->in[0].g, c->in[0].ld, c->out[0].g, c->out[0].ld, c->in[0].rows, c->in[0].cols);
    apti_rotary_backward(c->ctx, &r->op, c->in[0].g, c->in[0].ld, c->in[0].rows);
}

static void rotary_reference(op_case *c)
{
    const rotary_case *r = (const rotary_case *)c->op;
    const int64_t dim = r->op.dim, half = dim / 2, wide = c->in[0].cols;
    for (int64_t i = 0; i < c->in[0].rows; i++)
        for (int64_t h = 0; h < r->op.heads; h++)
            for (int64_t j = 0; j < half; j++) {
                const int64_t a = h * dim + (r->op.interleaved ? 2 * j : j), b = h * dim + (r->op.interleaved ? 2 * j + 1 : j + half);
                const double angle = (double)((float)r->positions[i] * r->frequency[j]), co = cos(angle), si = sin(angle);
                c->out[0].ref[i * wide + a] = at(&c->in[0], i, a) * co - at(&c->in[0], i, b) * si;
                c->out[0].ref[i * wide + b] = at(&c->in[0], i, b) * co + at(&c->in[0], i, a) * si;
                c->in[0].ref[i * wide + a] = up(&c->out[0], i, a) * co + up(&c->out[0], i, b) * si;
                c->in[0].ref[i * wide + b] = up(&c->out[0], i, b) * co - up(&c->out[0], i, a) * si;
            }
}

static void rotary_body(void)
{
    const int32_t shape[][3] = {{1, 1, 2}, {7, 3, 6}, {40, 2, 64}, {64, 5, 16}};             /* rows, heads, size of a head */
    for (int k = 0; k < 8; k++) {
        const int32_t *s = shape[k / 2];
        rotary_case *r = (rotary_case *)calloc(1, sizeof *r);
        op_case *c = new_case();
        assert_non_null(r);
        r->op.heads = s[1];
        r->op.dim = s[2];
        r->op.interleaved = k % 2 == 1;
        r->table = new_floats(s[0], s[2], s[2]);
        r->op.table = r->table;
        apt_rope rope = APT_ZERO;
        rope.theta = 100.0f;
        apti_rotary_frequencies(r->frequency, &rope, s[2]);
        for (int32_t i = 0; i < s[0]; i++) r->positions[i] = (int32_t)below(500);
        apti_rotary_table(g_ctx[0], r->table, r->positions, r->frequency, s[0], s[2]);
        snprintf(c->name, sizeof c->name, "rotary rows %d heads %d dim %d interleaved %d", s[0], s[1], s[2], k % 2);
        c->op = r;
        c->forward = rotary_forward;
        c->backward = rotary_backward;
        c->reference = rotary_reference;
        add_in(c, "x", s[0], (int64_t)s[1] * s[2], (int64_t)s[1] * s[2] + 3, false);
        add_out(c, "y", s[0], (int64_t)s[1] * s[2], (int64_t)s[1] * s[2] + 1);
        check_case(c);
        free(r->table);
        free(r);
    }
}

/* Frequencies of LLaMA 3: long waves slow down by the factor, short ones stay, and there is a path between them. */
static void rotary_scaling(void)
{
    float plain[64], scaled[64];
    apt_rope rope = APT_ZERO;
    rope.theta = 500000.0f;
    apti_rotary_frequencies(plain, &rope, 128);
    rope.factor = 8.0f;
    rope.low_factor = 1.0f;
    rope.high_factor = 4.0f;
    rope.original_positions = 8192;
    apti_rotary_frequencies(scaled, &rope, 128);
    int32_t kinds[3] = {0, 0, 0};
    for (int32_t i = 0; i < 64; i++) {
        const double f = pow(500000.0, -2.0 * i / 128), wave = 2 * 3.14159265358979323846 / f;
        double want = f / 8;
        if (wave < 8192.0 / 4) want = f;
        else if (wave <= 8192.0) want = (8192 / wave - 1) / 3 * f + (1 - (8192 / wave - 1) / 3) * f / 8;
        assert_true(fabs((double)plain[i] - f) <= 1e-7 * f && fabs((double)scaled[i] - want) <= 1e-7 * want);
        kinds[wave < 8192.0 / 4 ? 0 : wave <= 8192.0 ? 1 : 2]++;
    }
    assert_true(kinds[0] > 5 && kinds[1] > 2 && kinds[2] > 5);
}

static void test_rotary(void **state)
{
    (void)state;
    each_table(rotary_body);
    rotary_scaling();
}

/* ---- relative position bias -------------------------------------------------------------------------------------- */

static void relative_forward(op_case *c) { apti_relative_forward(c->ctx, (apti_relative_op *)c->op, c->out[0].v, c->in[0].v); }

static void relative_backward(op_case *c) { apti_relative_backward(c->ctx, (apti_relative_op *)c->op, c->in[0].g, c->out[0].g); }

/* The definition, in double, with borders found by comparison and not by a logarithm */
static int32_t relative_bucket(const apti_relative_op *op, int64_t distance)
{
    const int32_t half = op->causal ? op->buckets : op->buckets / 2, exact = half / 2;
    const int32_t first = !op->causal && distance > 0 ? half : 0;
    const int64_t n = op->causal ? (distance < 0 ? -distance : 0) : distance < 0 ? -distance : distance;
    int32_t bucket = exact;
    if (n < exact) return first + (int32_t)n;
    while (bucket < half - 1 && (double)n >= exact * pow((double)op->max_distance / exact, (double)(bucket + 1 - exact) / (half - exact)) - 1e-6)
        bucket++;
    return first + bucket;
}

static void relative_reference(op_case *c)
{
    const apti_relative_op *op = (const apti_relative_op *)c->op;
    const int64_t wide = 2 * (int64_t)op->span - 1;
    for (int64_t h = 0; h < op->heads; h++)
        for (int64_t u = 0; u < wide; u++) {
            const int64_t row = relative_bucket(op, u - op->span + 1), column = op->column ? op->column[h] : h;
            c->out[0].ref[h * wide + u] = at(&c->in[0], row, column);
            c->in[0].ref[row * op->table_heads + column] += up(&c->out[0], h, u);
        }
}

static void relative_body(void)
{
    static const int32_t column[3] = {4, 0, 3};
    const int32_t shape[][2] = {{32, 128}, {8, 16}, {4, 3}, {16, 20}};                       /* buckets, distance */
    for (int k = 0; k < 16; k++) {
        apti_relative_op op = APT_ZERO;
        op_case *c = new_case();
        int32_t bucket[512];
        op.bucket = bucket;
        op.heads = k % 4 < 2 ? 5 : 3;
        op.table_heads = 5;
        op.column = k % 4 < 2 ? NULL : column;
        op.buckets = shape[k / 4][0];
        op.max_distance = shape[k / 4][1];
        op.span = op.max_distance + 1 + k % 3 * 40;
        op.causal = k % 2 == 1;
        assert_true(2 * op.span - 1 <= 512);
        apti_relative_buckets(bucket, &op);
        snprintf(c->name, sizeof c->name, "relative bias buckets %d distance %d causal %d columns %d", op.buckets, op.max_distance, op.causal, k % 4 >= 2);
        c->op = &op;
        c->forward = relative_forward;
        c->backward = relative_backward;
        c->reference = relative_reference;
        add_in(c, "table", op.buckets, 5, 5, true);
        add_out(c, "bias", op.heads, 2 * (int64_t)op.span - 1, 2 * (int64_t)op.span - 1);
        check_case(c);
        /* beyond max_distance nothing changes, so a span of max_distance + 1 with clamped ends loses nothing */
        assert_int_equal(apti_relative_bucket(&op, -op.max_distance), apti_relative_bucket(&op, -100000));
        assert_int_equal(apti_relative_bucket(&op, op.max_distance), apti_relative_bucket(&op, 100000));
    }
}

static void test_relative(void **state)
{
    (void)state;
    each_table(relative_body);
}

/* ---- gated FFN, residual ----------------------------------------------------------------------------------------- */

enum { GU, GV, GMASK };

typedef struct gate_case { int32_t act; bool mask, in_place; } gate_case;

static void gate_forward(op_case *c)
{
    const gate_case *k = (const gate_case *)c->op;
    const tensor *u = &c->in[GU], *v = &c->in[GV], *h = &c->out[0];
    for (int64_t i = 0; i < u->rows; i++) c->ctx->kernels->act(h->v + i * h->ld, u->v + i * u->ld, u->cols, k->act);
    apti_gate_forward(c->ctx, h->v, h->ld, h->v, h->ld, v->v, v->ld, k->mask ? c->in[GMASK].v : NULL, u->rows, u->cols);
}

static void gate_backward(op_case *c)
{
    const gate_case *k = (const gate_case *)c->op;
    const tensor *u = &c->in[GU], *v = &c->in[GV], *h = &c->out[0];
    const float *dh = h->g;
    if (k->in_place) {                /* du is dh */
        memcpy(u->g, h->g, (size_t)(u->rows * u->ld) * sizeof(float));
        dh = u->g;
    }
    apti_gate_backward(c->ctx, u->g, u->ld, v->g, v->ld, dh, h->ld, u->v, u->ld, v->v, v->ld, k->mask ? c->in[GMASK].v : NULL, u->rows,
                       u->cols, k->act);
}

static double gate_act(double x, int32_t act, double *slope)
{
    const double s = 1 / (1 + exp(-x)), t = tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x));
    if (act == APT_SILU) *slope = s + x * s * (1 - s);
    if (act == APT_SILU) return x * s;
    *slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.79788456080286535588 * (1 + 3 * 0.044715 * x * x);
    return 0.5 * x * (1 + t);
}

static void gate_reference(op_case *c)
{
    const gate_case *k = (const gate_case *)c->op;
    const int64_t n = c->in[GU].cols;
    for (int64_t i = 0; i < c->in[GU].rows; i++)
        for (int64_t j = 0; j < n; j++) {
            double slope;
            const double m = k->mask ? at(&c->in[GMASK], 0, j) : 1, a = gate_act(at(&c->in[GU], i, j), k->act, &slope), v = at(&c->in[GV], i, j);
            c->out[0].ref[i * n + j] = m * a * v;
            c->in[GU].ref[i * n + j] = m * v * slope * up(&c->out[0], i, j);
            c->in[GV].ref[i * n + j] = m * a * up(&c->out[0], i, j);
        }
}

static void gate_body(void)
{
    const int64_t shape[][2] = {{1, 1}, {5, 17}, {33, 130}, {300, 70}};
    for (int i = 0; i < 16; i++) {
        gate_case k;
        op_case *c = new_case();
        const int64_t rows = shape[i / 4][0], n = shape[i / 4][1];
        k.act = i % 2 ? APT_SILU : APT_GELU_TANH;
        k.mask = i % 4 > 1;
        k.in_place = i % 3 == 0;
        snprintf(c->name, sizeof c->name, "gate rows %d n %d act %d mask %d", (int)rows, (int)n, k.act, k.mask);
        c->op = &k;
        c->forward = gate_forward;
        c->backward = gate_backward;
        c->reference = gate_reference;
        add_in(c, "u", rows, n, n + 3, false);
        add_in(c, "v", rows, n, n + 1, false);
        add_in(c, "mask", 1, n, n, false)->fixed = true;
        fill_mask(&c->in[GMASK]);
        add_out(c, "h", rows, n, n + 3);
        check_case(c);
    }
}

static void residual_body(void)
{
    enum { ROWS = 70, D = 37 };
    for (int masked = 0; masked < 2; masked++) {
        tensor x = new_tensor("x", ROWS, D, D + 2), r = new_tensor("r", ROWS, D, D + 1), y = new_tensor("y", ROWS, D, D + 3);
        float mask[D];
        for (int64_t j = 0; j < D; j++) mask[j] = j % 3 ? 0.25f * (float)j : 0.0f;
        apti_residual(g_ctx[2], y.v, y.ld, x.v, x.ld, r.v, r.ld, masked ? mask : NULL, ROWS, D);
        check_guard("y", y.v, ROWS, D, y.ld);
        for (int64_t i = 0; i < ROWS; i++)
            for (int64_t j = 0; j < D; j++) {
                const float sum = x.v[i * x.ld + j] + r.v[i * r.ld + j];
                assert_true(y.v[i * y.ld + j] == (masked ? sum * mask[j] : sum));
            }
        free_tensor(&x);
        free_tensor(&r);
        free_tensor(&y);
    }
}

static void test_gate(void **state)
{
    (void)state;
    each_table(gate_body);
    each_table(residual_body);
}

/* ---- embeddings, rows, tanh -------------------------------------------------------------------------------------- */

enum { EWORD, EPOSITION, ETYPE };

typedef struct embed_case { int32_t tokens[400], positions[400], types[400]; bool position, type, all_zero; } embed_case;

static void embed_forward(op_case *c)
{
    embed_case *e = (embed_case *)c->op;
    apti_embed_forward(c->ctx, c->out[0].v, c->out[0].ld, c->in[EWORD].v, e->position ? c->in[EPOSITION].v : NULL,
                       e->type ? c->in[ETYPE].v : NULL, e->tokens, e->positions, e->all_zero ? NULL : e->types, c->out[0].rows, c->out[0].cols);
}

static void embed_backward(op_case *c)
{
    embed_case *e = (embed_case *)c->op;
    const int32_t *index[] = {e->tokens, e->positions, e->all_zero ? NULL : e->types};
    for (int t = EWORD; t <= ETYPE; t++)
        if (t == EWORD || (t == EPOSITION ? e->position : e->type))
            apti_embed_backward(c->ctx, c->in[t].g, c->in[t].rows, c->out[0].g, c->out[0].ld, index[t], c->out[0].rows, c->out[0].cols);
}

static void embed_reference(op_case *c)
{
    embed_case *e = (embed_case *)c->op;
    const int64_t d = c->out[0].cols;
    for (int64_t i = 0; i < c->out[0].rows; i++)
        for (int64_t j = 0; j < d; j++) {
            const int64_t row[3] = {e->tokens[i], e->positions[i], e->all_zero ? 0 : e->types[i]};
            for (int t = EWORD; t <= ETYPE; t++) {
                if ((t == EPOSITION && !e->position) || (t == ETYPE && !e->type)) continue;
                c->out[0].ref[i * d + j] += at(&c->in[t], row[t], j);
                c->in[t].ref[row[t] * d + j] += up(&c->out[0], i, j);
            }
        }
}

static void embed_body(void)
{
    const int64_t shape[][2] = {{1, 1}, {7, 5}, {40, 64}, {400, 65}, {33, 130}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int variant = 0; variant < 4; variant++) {
            embed_case *e = (embed_case *)calloc(1, sizeof *e);
            op_case *c = new_case();
            assert_non_null(e);
            e->position = variant != 1;
            e->type = variant != 2;
            e->all_zero = variant == 3;
            for (int64_t i = 0; i < shape[s][0]; i++) {
                e->tokens[i] = (int32_t)below(11);
                e->positions[i] = (int32_t)(i % 9);
                e->types[i] = i % 50 > 20;
            }
            snprintf(c->name, sizeof c->name, "embed rows %d d %d variant %d", (int)shape[s][0], (int)shape[s][1], variant);
            c->op = e;
            c->forward = embed_forward;
            c->backward = embed_backward;
            c->reference = embed_reference;
            add_in(c, "word", 11, shape[s][1], shape[s][1], true);
            add_in(c, "position", 9, shape[s][1], shape[s][1], true)->fixed = !e->position;
            add_in(c, "type", 2, shape[s][1], shape[s][1], true)->fixed = !e->type;
            add_out(c, "x", shape[s][0], shape[s][1], shape[s][1] + 3);
            check_case(c);
            free(e);
        }
}

static void test_embed(void **state)
{
    (void)state;
    each_table(embed_body);
}

/* Gather and scatter as forward and backward of one another; out = gathered rows */
static void gather_forward(op_case *c)
{
    apti_gather_rows(c->ctx, c->out[0].v, c->out[0].ld, c->in[0].v, c->in[0].ld, (const int32_t *)c->op, c->out[0].rows, c->out[0].cols);
}

static void gather_backward(op_case *c)
{
    const int64_t zero_rows = c->in[0].plus ? 0 : c->in[0].rows;
    if (c->out[0].rows > c->in[0].rows)           /* an index that comes twice */
        apti_scatter_run(c->ctx, c->in[0].g, c->in[0].ld, c->out[0].g, c->out[0].ld, (const int32_t *)c->op, c->out[0].rows, c->out[0].cols,
                         zero_rows, c->in[0].rows, false);
    else apti_scatter_rows(c->ctx, c->in[0].g, c->in[0].ld, c->out[0].g, c->out[0].ld, (const int32_t *)c->op, c->out[0].rows, c->out[0].cols,
                           zero_rows);
}

static void gather_reference(op_case *c)
{
    const int32_t *index = (const int32_t *)c->op;
    for (int64_t i = 0; i < c->out[0].rows; i++)
        for (int64_t j = 0; j < c->out[0].cols; j++) {
            c->out[0].ref[i * c->out[0].cols + j] = at(&c->in[0], index[i], j);
            c->in[0].ref[index[i] * c->out[0].cols + j] += up(&c->out[0], i, j);
        }
}

static void tanh_forward(op_case *c)
{
    apti_tanh_forward(c->ctx, c->out[0].v, c->in[0].v, c->in[0].ld, c->in[0].rows, c->in[0].cols);
}

static void tanh_backward(op_case *c)
{
    memcpy(c->in[0].g, c->out[0].g, (size_t)c->in[0].cols * sizeof(float));     /* in place */
    apti_tanh_backward(c->ctx, c->in[0].g, c->in[0].g, c->out[0].v, c->in[0].ld, c->in[0].rows, c->in[0].cols);
}

static void tanh_reference(op_case *c)
{
    for (int64_t j = 0; j < c->in[0].cols; j++) {
        const double y = tanh(at(&c->in[0], 0, j));
        c->out[0].ref[j] = y;
        c->in[0].ref[j] = up(&c->out[0], 0, j) * (1 - y * y);
    }
}

static void rows_body(void)
{
    const int64_t d[] = {1, 63, 64, 200};
    for (size_t s = 0; s < sizeof d / sizeof *d; s++)
        for (int variant = 0; variant < 4; variant++) {
            const bool plus = variant % 2 == 1, unique = variant >= 2;
            int32_t index[37];
            op_case *c = new_case();
            for (int i = 0; i < 37; i++) index[i] = unique ? i * 3 % 20 : (int32_t)below(20);
            snprintf(c->name, sizeof c->name, "gather d %d variant %d", (int)d[s], variant);
            c->op = index;
            c->forward = gather_forward;
            c->backward = gather_backward;
            c->reference = gather_reference;
            add_in(c, "x", 20, d[s], d[s] + 1, plus);
            add_out(c, "y", unique ? 13 : 37, d[s], d[s] + 2);
            check_case(c);
        }
    const int64_t n[] = {1, 17, 16384, 16390};
    for (size_t s = 0; s < sizeof n / sizeof *n; s++) {
        op_case *c = new_case();
        snprintf(c->name, sizeof c->name, "tanh n %d", (int)n[s]);
        c->forward = tanh_forward;
        c->backward = tanh_backward;
        c->reference = tanh_reference;
        add_in(c, "x", 1, n[s], n[s], false);
        add_out(c, "y", 1, n[s], n[s]);
        check_case(c);
    }
}

static void test_rows_and_tanh(void **state)
{
    (void)state;
    each_table(rows_body);
}

/* Sums over columns, against double; a sum over many rows must not lose digits. */
static void column_body(void)
{
    const int64_t shape[][2] = {{0, 5}, {1, 1}, {3, 64}, {64, 65}, {129, 130}, {5000, 7}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++) {
        const int64_t rows = shape[s][0], n = shape[s][1];
        tensor x = new_tensor("x", rows, n, n + 3);
        float first[130];
        for (int absolute = 0; absolute < 2; absolute++)
            for (int i = 0; i < CONTEXTS; i++) {
                float *acc = new_floats(1, n, n);
                for (int64_t j = 0; j < n; j++) acc[j] = 1.5f;
                if (absolute) apti_column_abs_sum(g_ctx[i], acc, x.v, x.ld, rows, n);
                else apti_column_sum(g_ctx[i], acc, x.v, x.ld, rows, n);
                if (i == 0) memcpy(first, acc, (size_t)n * sizeof(float));
                assert_memory_equal(first, acc, (size_t)n * sizeof(float));
                for (int64_t j = 0; j < n; j++) {
                    double sum = 1.5, size = 1.5;
                    for (int64_t r = 0; r < rows; r++) sum += absolute ? fabs(at(&x, r, j)) : at(&x, r, j);
                    for (int64_t r = 0; r < rows; r++) size += fabs(at(&x, r, j));
                    assert_true(fabs((double)acc[j] - sum) <= 5e-7 * size);
                }
                check_guard("acc", acc, 1, n, n);
                free(acc);
            }
        free_tensor(&x);
    }
}

static void test_columns(void **state)
{
    (void)state;
    each_table(column_body);
}

/* ---- losses ------------------------------------------------------------------------------------------------------ */

typedef struct loss_case {
    int32_t labels[512], offsets[40], sequences;
    float targets[64];
    float grad_scale;
    double sum, want;                 /* computed and reference sum */
    int64_t count, correct, want_count, want_correct, chunk;
    float *work;
    bool packed;                                 /* mlm: E in panels */
} loss_case;

static double loss_value(op_case *c)
{
    const loss_case *l = (const loss_case *)c->op;
    return l->count ? (double)l->grad_scale * l->sum / (double)l->count : 0;
}

static void ce_forward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    const tensor *x = &c->in[0];
    l->sum = apti_cross_entropy(c->ctx, NULL, 0, x->v, x->ld, l->labels, x->rows, x->cols, -100, l->grad_scale, &l->count, &l->correct);
}

static void ce_backward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    const tensor *x = &c->in[0];
    int64_t count, correct;
    for (int64_t i = 0; i < x->rows; i++) memcpy(x->g + i * x->ld, x->v + i * x->ld, (size_t)x->cols * sizeof(float));
    const double sum = apti_cross_entropy(c->ctx, x->g, x->ld, x->g, x->ld, l->labels, x->rows, x->cols, -100, l->grad_scale, &count, &correct);
    assert_true(sum == l->sum && count == l->count && correct == l->correct);
}

static void ce_reference(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    const tensor *x = &c->in[0];
    l->want = 0;
    l->want_count = l->want_correct = 0;
    for (int64_t i = 0; i < x->rows; i++) l->want_count += l->labels[i] >= 0;
    for (int64_t i = 0; i < x->rows; i++) {
        double sum = 0;
        int64_t best = 0;
        if (l->labels[i] < 0) continue;
        for (int64_t j = 0; j < x->cols; j++) best = at(x, i, j) > at(x, i, best) ? j : best;
        for (int64_t j = 0; j < x->cols; j++) sum += exp(at(x, i, j) - at(x, i, best));
        l->want += at(x, i, best) + log(sum) - at(x, i, l->labels[i]);
        l->want_correct += best == l->labels[i];
        for (int64_t j = 0; j < x->cols; j++)
            x->ref[i * x->cols + j] = (double)l->grad_scale / (double)l->want_count *
                                      (exp(at(x, i, j) - at(x, i, best)) / sum - (j == l->labels[i] ? 1 : 0));
    }
}

static void regression_forward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    l->sum = apti_regression(c->ctx, NULL, c->in[0].v, l->targets, c->in[0].cols, l->grad_scale);
    l->count = c->in[0].cols;
}

static void regression_backward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    assert_true(l->sum == apti_regression(c->ctx, c->in[0].g, c->in[0].v, l->targets, c->in[0].cols, l->grad_scale));
}

static void regression_reference(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    l->want = 0;
    l->want_count = c->in[0].cols;
    for (int64_t j = 0; j < c->in[0].cols; j++) {
        const double e = at(&c->in[0], 0, j) - (double)l->targets[j];
        l->want += e * e;
        c->in[0].ref[j] = (double)l->grad_scale * 2 * e / (double)c->in[0].cols;
    }
}

static void span_forward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    l->sum = apti_span_loss(c->ctx, NULL, c->in[0].v, c->in[0].ld, l->labels, l->offsets, l->sequences, l->grad_scale, &l->count, &l->correct);
}

static void span_backward(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    int64_t count, correct;
    const double sum =
        apti_span_loss(c->ctx, c->in[0].g, c->in[0].v, c->in[0].ld, l->labels, l->offsets, l->sequences, l->grad_scale, &count, &correct);
    assert_true(sum == l->sum && count == l->count && correct == l->correct);
}

static void span_reference(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    const tensor *x = &c->in[0];
    int64_t terms[2] = {0, 0};
    bool hit[40][2];
    l->want = 0;
    l->want_correct = 0;
    memset(hit, 0, sizeof hit);
    for (int s = 0; s < l->sequences; s++)
        for (int side = 0; side < 2; side++) terms[side] += l->labels[2 * s + side] >= 0;
    l->want_count = terms[0] + terms[1];
    for (int s = 0; s < l->sequences; s++)
        for (int side = 0; side < 2; side++) {
            const int64_t first = l->offsets[s], n = l->offsets[s + 1] - first, label = l->labels[2 * s + side];
            double sum = 0, max = at(x, first, side);
            if (label < 0) continue;
            for (int64_t i = 0; i < n; i++) max = fmax(max, at(x, first + i, side));
            for (int64_t i = 0; i < n; i++) sum += exp(at(x, first + i, side) - max);
            hit[s][side] = at(x, first + label, side) == max;
            l->want += (max + log(sum) - at(x, first + label, side)) * 0.5 / (double)terms[side] * (double)l->want_count;
            for (int64_t i = 0; i < n; i++)
                x->ref[2 * (first + i) + side] =
                    0.5 * (double)l->grad_scale / (double)terms[side] * (exp(at(x, first + i, side) - max) / sum - (i == label ? 1 : 0));
        }
    for (int s = 0; s < l->sequences; s++) l->want_correct += hit[s][0] && hit[s][1];
}

/* h = in[0], E = in[1], bias = in[2] */
static double mlm_call(op_case *c, float *dh, float *de, float *dbias)
{
    loss_case *l = (loss_case *)c->op;
    apti_lm_op op = APT_ZERO;
    op.head.out = c->in[1].rows;
    op.head.in = c->in[1].cols;
    op.e = c->in[1].v;
    op.head.bias = c->in[2].fixed ? NULL : c->in[2].v;
    apti_packed panels = APT_ZERO;
    if (l->packed) {
        assert_true(apti_packed_reserve(c->ctx, &panels, op.head.out, op.head.in, APT_F32));
        apti_pack(c->ctx, &panels, op.e, op.head.in);
        op.head.w = &panels;
        op.e = NULL;
    }
    const apti_linear_grad grad = {de, dbias, NULL, NULL};
    const double sum = apti_lm_loss(c->ctx, &op, dh, c->in[0].ld, dh || de || dbias ? &grad : NULL, c->in[0].v, c->in[0].ld, l->labels, c->in[0].rows, -100,
                                    l->grad_scale, l->work, l->chunk, &l->count, &l->correct);
    apti_free(c->ctx, panels.data);
    check_guard("work", l->work, 1, l->chunk * apti_ld(op.head.out), l->chunk * apti_ld(op.head.out));
    return sum;
}

static void mlm_forward(op_case *c)
{
    ((loss_case *)c->op)->sum = mlm_call(c, NULL, NULL, NULL);
}

static void mlm_backward(op_case *c)
{
    const double sum = mlm_call(c, c->in[0].g, c->in[1].g, c->in[2].fixed ? NULL : c->in[2].g);
    assert_true(sum == ((loss_case *)c->op)->sum);
}

static void mlm_reference(op_case *c)
{
    loss_case *l = (loss_case *)c->op;
    const tensor *h = &c->in[0], *e = &c->in[1], *b = &c->in[2];
    double *x = (double *)calloc((size_t)e->rows, sizeof(double));
    l->want = 0;
    l->want_count = l->want_correct = 0;
    for (int64_t i = 0; i < h->rows; i++) l->want_count += l->labels[i] >= 0;
    for (int64_t i = 0; i < h->rows; i++) {
        double max = 0, sum = 0;
        int64_t best = 0;
        if (l->labels[i] < 0) continue;
        for (int64_t j = 0; j < e->rows; j++) {
            x[j] = b->fixed ? 0 : at(b, 0, j);
            for (int64_t p = 0; p < h->cols; p++) x[j] += at(h, i, p) * at(e, j, p);
            best = x[j] > x[best] ? j : best;
        }
        max = x[best];
        for (int64_t j = 0; j < e->rows; j++) sum += exp(x[j] - max);
        l->want += max + log(sum) - x[l->labels[i]];
        l->want_correct += best == l->labels[i];
        for (int64_t j = 0; j < e->rows; j++) {
            const double dx = (double)l->grad_scale / (double)l->want_count * (exp(x[j] - max) / sum - (j == l->labels[i] ? 1 : 0));
            b->ref[j] += dx;
            for (int64_t p = 0; p < h->cols; p++) {
                h->ref[i * h->cols + p] += dx * at(e, j, p);
                e->ref[j * h->cols + p] += dx * at(h, i, p);
            }
        }
    }
    free(x);
}

static void loss_check(op_case *c, loss_case *l)
{
    c->op = l;
    c->loss = loss_value;
    l->grad_scale = 3.0f;
    c->ctx = g_ctx[0];
    c->forward(c);
    c->reference(c);
    if (fabs(l->sum - l->want) > 1e-6 * fabs(l->want) + 1e-12 || l->count != l->want_count || l->correct != l->want_correct)
        fail_msg("%s [%s]: sum %.9g count %d correct %d, expected %.9g %d %d", c->name, apt_kernel_name(c->ctx), l->sum, (int)l->count,
                 (int)l->correct, l->want, (int)l->want_count, (int)l->want_correct);
    check_case(c);
}

static void loss_body(void)
{
    const int64_t shape[][2] = {{1, 1}, {1, 2}, {5, 3}, {70, 17}, {9, 300}, {130, 2}};
    loss_case *l = (loss_case *)calloc(1, sizeof *l);
    assert_non_null(l);
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int ignore = 0; ignore < 3; ignore++) {         /* none, some, all */
            op_case *c = new_case();
            snprintf(c->name, sizeof c->name, "cross entropy %d x %d ignore %d", (int)shape[s][0], (int)shape[s][1], ignore);
            c->forward = ce_forward;
            c->backward = ce_backward;
            c->reference = ce_reference;
            add_in(c, "logits", shape[s][0], shape[s][1], shape[s][1] + 3, false);
            for (int64_t i = 0; i < shape[s][0]; i++)
                l->labels[i] = ignore == 2 || (ignore == 1 && i % 3 == 1) ? -100 : (int32_t)below(shape[s][1]);
            loss_check(c, l);
        }
    for (int64_t n = 1; n < 64; n += 31) {
        op_case *c = new_case();
        snprintf(c->name, sizeof c->name, "regression n %d", (int)n);
        c->forward = regression_forward;
        c->backward = regression_backward;
        c->reference = regression_reference;
        add_in(c, "pred", 1, n, n, false);
        for (int64_t j = 0; j < n; j++) l->targets[j] = (float)normal();
        l->correct = l->want_correct = 0;
        loss_check(c, l);
    }
    for (int variant = 0; variant < 4; variant++) {          /* all labels, some starts ignored, some of both, all ignored */
        op_case *c = new_case();
        snprintf(c->name, sizeof c->name, "span variant %d", variant);
        c->forward = span_forward;
        c->backward = span_backward;
        c->reference = span_reference;
        l->sequences = variant == 0 ? 1 : 33;
        for (int32_t i = 0; i < l->sequences; i++) {
            const int32_t length = (int32_t)(1 + below(9));
            l->offsets[i + 1] = l->offsets[i] + length;
            for (int side = 0; side < 2; side++) l->labels[2 * i + side] = (int32_t)below(length);
            if (variant == 3 || (variant >= 1 && i % 4 == 0)) l->labels[2 * i] = -1;
            if (variant == 3 || (variant == 2 && i % 5 == 0)) l->labels[2 * i + 1] = -1;
        }
        add_in(c, "logits", l->offsets[l->sequences], 2, 2 + variant, false);
        loss_check(c, l);
    }
    const int64_t mlm[][4] = {{1, 1, 1, 1}, {7, 33, 5, 3}, {20, 70, 16, 20}, {11, 129, 9, 64}, {6, 50, 8, 1}};   /* rows, vocab, d, chunk */
    for (size_t s = 0; s < sizeof mlm / sizeof *mlm; s++)
        for (int variant = 0; variant < 6; variant++) {          /* from 3 on E is packed */
            op_case *c = new_case();
            l->packed = variant >= 3;
            snprintf(c->name, sizeof c->name, "mlm rows %d vocab %d d %d chunk %d variant %d", (int)mlm[s][0], (int)mlm[s][1],
                     (int)mlm[s][2], (int)mlm[s][3], variant);
            c->forward = mlm_forward;
            c->backward = mlm_backward;
            c->reference = mlm_reference;
            add_in(c, "h", mlm[s][0], mlm[s][2], mlm[s][2] + 1, false);
            add_in(c, "e", mlm[s][1], mlm[s][2], mlm[s][2], true);
            add_in(c, "bias", 1, mlm[s][1], mlm[s][1], true)->fixed = variant % 3 == 1;
            for (int64_t i = 0; i < mlm[s][0]; i++) l->labels[i] = variant % 3 == 2 && i % 2 ? -100 : (int32_t)below(mlm[s][1]);
            l->chunk = mlm[s][3];
            l->work = new_floats(1, l->chunk * apti_ld(mlm[s][1]), l->chunk * apti_ld(mlm[s][1]));
            loss_check(c, l);
            free(l->work);
        }
    free(l);
}

static void test_losses(void **state)
{
    (void)state;
    each_table(loss_body);
}

/* Huge logits, ties, wrong labels, NaN and infinity */
static void loss_extreme_body(void)
{
    const float inf = apti_float(0x7f800000u), nan = apti_float(0x7fc00000u);
    apt_ctx *ctx = g_ctx[1];
    float x[3][4] = {{1e30f, -1e30f, 0, 3e38f}, {3e38f, 3e38f, 3e38f, 3e38f}, {-3e38f, 3e38f, 0, 0}}, dx[3][4];
    int32_t labels[3] = {3, 0, 1};
    int64_t count, correct;
    double sum = apti_cross_entropy(ctx, dx[0], 4, x[0], 4, labels, 3, 4, -100, 3.0f, &count, &correct);
    assert_true(fabs(sum - log(4.0)) < 1e-6 && count == 3 && correct == 3);
    for (int j = 0; j < 4; j++) assert_true(fabsf(dx[0][j]) < 1e-6f && fabsf(dx[2][j]) < 1e-6f);
    labels[1] = 1;                    /* a tie: the first of the largest is the answer */
    labels[2] = 4;                    /* outside */
    sum = apti_cross_entropy(ctx, dx[0], 4, x[0], 4, labels, 3, 4, -100, 3.0f, &count, &correct);
    assert_true(count == 2 && correct == 1 && dx[2][0] == 0 && dx[2][1] == 0);
    labels[0] = 0;                    /* the loss is huge but not infinite */
    sum = apti_cross_entropy(ctx, NULL, 0, x[0], 4, labels, 1, 4, -100, 1.0f, &count, &correct);
    assert_true(apti_finite_f64(sum) && sum > 2e38 && correct == 0);
    for (int bad = 0; bad < 3; bad++)
        for (int j = 0; j < 4; j++) {
            float y[2][4] = {{1, 2, 3, 4}, {1, 2, 3, 4}}, dy[2][4];
            const int32_t two[2] = {1, 1}, skip[2] = {-100, 1}, offsets[2] = {0, 4};
            y[0][j] = bad == 0 ? nan : bad == 1 ? inf : -inf;
            assert_false(apti_finite_f64(apti_cross_entropy(ctx, dy[0], 4, y[0], 4, two, 2, 4, -100, 1.0f, &count, &correct)));
            assert_true(!apti_finite(dy[0][0]) && !apti_finite(dy[0][3]) && apti_finite(dy[1][0]));
            assert_true(apti_finite_f64(apti_cross_entropy(ctx, dy[0], 4, y[0], 4, skip, 2, 4, -100, 1.0f, &count, &correct)));
            assert_true(dy[0][0] == 0 && dy[0][3] == 0);
            assert_false(apti_finite_f64(apti_span_loss(ctx, dy[0], y[0], 2, two, offsets, 1, 1.0f, &count, &correct)));
            assert_true(!apti_finite(dy[0][j % 2]) && apti_finite(dy[0][(j + 1) % 2]) && correct == 0);
        }
    count = correct = 9;
    assert_true(apti_cross_entropy(ctx, NULL, 0, NULL, 4, NULL, 0, 4, -100, 1.0f, &count, &correct) == 0 && count == 0 && correct == 0);
    assert_true(apti_regression(ctx, NULL, NULL, NULL, 0, 1.0f) == 0);
    assert_false(apti_finite_f64(apti_regression(ctx, dx[0], &nan, x[0], 1, 1.0f)));
}

static void test_losses_extreme(void **state)
{
    (void)state;
    each_table(loss_extreme_body);
}

/* Distillation over a vocabulary against apt_distill_kl, which computes in double; equal rows; rows that are not finite */
static void kl_row_body(void)
{
    enum { MOST = 3001 };
    static float s[MOST], t[MOST], dx[MOST], exact[MOST];
    static const int64_t lengths[] = {1, 2, 15, 17, 70, 1000, MOST};
    const apti_kernels *kernels = g_ctx[1]->kernels;
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
        const int64_t n = lengths[l];
        for (int half = 1; half <= 4; half *= 2) {
            const float temperature = 0.5f * (float)half;
            double loss = 0, off = 0, norm = 0;
            for (int64_t i = 0; i < n; i++) {
                s[i] = (float)(9 * uniform());
                t[i] = (float)(9 * uniform());
                exact[i] = 0;
            }
            const double got = apti_kl_row(kernels, dx, s, t, n, temperature, 0.75f);
            assert_int_equal(apt_distill_kl(&loss, exact, n, s, n, t, n, NULL, 1, n, temperature, 0.75f), APT_OK);
            assert_true(fabs(got - loss) <= 6e-8 * (double)temperature * 18);    /* a float's rounding of 18, the largest gap */
            for (int64_t i = 0; i < n; i++) {
                off += ((double)dx[i] - (double)exact[i]) * ((double)dx[i] - (double)exact[i]);
                norm += (double)exact[i] * (double)exact[i];
            }
            assert_true(sqrt(off) <= 1e-6 * sqrt(norm) + 1e-7);                  /* 1e-7: of a probability of 1 */
            assert_true(apti_kl_row(kernels, dx, s, s, n, temperature, 0.75f) == 0);
            for (int64_t i = 0; i < n; i++) assert_true(dx[i] == 0);
        }
        for (int extreme = 0; extreme < 2; extreme++) {
            const float temperature = extreme == 0 ? 1e-30f : 1e6f;
            double loss = 0;
            memset(exact, 0, sizeof exact);
            assert_int_equal(apt_distill_kl(&loss, exact, n, s, n, t, n, NULL, 1, n, temperature, 1), APT_OK);
            assert_true(fabs(apti_kl_row(kernels, dx, s, t, n, temperature, 1) - loss) <= 1e-12 * fabs(loss));
            for (int64_t i = 0; i < n; i++) assert_true(fabsf(dx[i] - exact[i]) <= 1e-6f * fabsf(exact[i]));
        }
        for (int bad = 0; bad < 4; bad++) {
            float *x = bad % 2 == 0 ? s : t, before = x[n / 2];
            x[n / 2] = apti_float(bad < 2 ? 0x7fc00000u : 0xff800000u);
            assert_false(apti_finite_f64(apti_kl_row(kernels, dx, s, t, n, 1, 1)));
            assert_true(dx[0] == 0 && dx[n - 1] == 0);
            x[n / 2] = before;
        }
    }
}

static void test_kl_row(void **state)
{
    (void)state;
    each_table(kl_row_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear),           cmocka_unit_test(test_linear_optional),  cmocka_unit_test(test_layernorm),
        cmocka_unit_test(test_layernorm_compact), cmocka_unit_test(test_attention),       cmocka_unit_test(test_attention_batch),
        cmocka_unit_test(test_attention_options), cmocka_unit_test(test_attention_extreme), cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rows_and_tanh),    cmocka_unit_test(test_columns),          cmocka_unit_test(test_losses),
        cmocka_unit_test(test_losses_extreme),   cmocka_unit_test(test_kl_row),
        cmocka_unit_test(test_attention_cache),  cmocka_unit_test(test_rotary),
        cmocka_unit_test(test_relative),         cmocka_unit_test(test_gate),
    };
    return cmocka_run_group_tests_name("ops", tests, NULL, NULL);
}
