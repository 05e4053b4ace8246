/* The kernels of apt.h: every table the CPU can run against plain double precision, products bit for bit against the one chain
   of fused multiply-adds that defines them, the approximations scanned over the whole range of float.
   build: cc -std=c11 -O2 tests/test_kernels.c -o test_kernels -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

/* ---- help ---- */

static uint64_t g_seed = 1;

static double uniform(void)           /* -1 .. 1 */
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(g_seed >> 11) / 4503599627370496.0 - 1.0;
}

static int64_t below(int64_t n)
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((g_seed >> 33) % (uint64_t)n);
}

static void fill(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)uniform();
}

static float *floats(int64_t n)       /* n random floats, never freed by a failing test */
{
    float *x = (float *)malloc((size_t)(n + 1) * sizeof(float));
    assert_non_null(x);
    fill(x, n);
    return x;
}

static bool same_bits(const float *a, const float *b, int64_t n)
{
    return memcmp(a, b, (size_t)n * sizeof(float)) == 0;
}

static uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Called through a volatile pointer: under -Ofast a compiler may split fmaf into two roundings. */
static float (*volatile exact_fma)(float, float, float) = fmaf;

/* -Ofast allows divisions and roots by estimate. */
#ifdef __FAST_MATH__
#define LOOSER 4
#else
#define LOOSER 1
#endif

static bool is_nan(float x)
{
    return (bits_of(x) & 0x7fffffffu) > 0x7f800000u;
}

static apt_ctx *context(const char *kernels, int32_t threads)
{
    apt_desc desc = APT_ZERO;
    desc.kernels = kernels;
    desc.threads = threads;
    apt_ctx *ctx = apt_create(&desc);
    assert_non_null(ctx);
    return ctx;
}

static const apti_kernels *g_table[8];
static int32_t g_tables;

static void test_tables(void **state)
{
    (void)state;
    static const char *const names[] = {"ref", "avx2", "avx512", "amx", "neon"};
    g_tables = apti_kernels_list(g_table, 8);
    assert_true(g_tables >= 1 && g_table[0] == apti_kernels_find("ref"));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const apti_kernels *k = apti_kernels_find(names[i]);
        if (k == NULL) {
            printf("    skip: table %s is not compiled in or not supported by this CPU\n", names[i]);
            continue;
        }
        assert_true(strcmp(k->name, names[i]) == 0);
        assert_true(k->nr % k->lanes == 0 && k->nr <= APTI_NR_MAX && k->mr <= APTI_MR_MAX);
        printf("    table %s: tiles of %d x %d\n", k->name, (int)k->mr, (int)k->nr);
    }
    assert_true(apti_kernels_find(NULL) == g_table[g_tables - 1]);
    assert_true(apti_kernels_find("sse9") == NULL);
    for (int64_t n = 1; n < 5000; n++)
        assert_true(apti_ld(n) >= n && apti_ld(n) < n + 32 && apti_ld(n) % 32 == 16);
}

/* ---- vector functions: n = 0..67, all alignments, in place, nothing written behind the end ---- */

enum { LONGEST = 67, ROOM = LONGEST + 24 };

/* One call of a function under test on vectors that start `shift` floats off alignment. */
typedef struct vectors {
    APTI_ALIGN64 float in[3][ROOM];
    APTI_ALIGN64 float out[3][ROOM];
    double want[3][ROOM];
    int64_t n, shift;
    float s;
} vectors;

static double normal_cdf(double x)
{
    return 0.5 * erfc(-x * 0.70710678118654752440);
}

static double act_true(double x, int32_t act)
{
    if (act == APT_GELU_ERF) return x < -38 ? 0 : x * normal_cdf(x);
    if (act == APT_RELU) return x > 0 ? x : 0;
    if (act == APT_SILU) return x < -700 ? 0 : x / (1 + exp(-x));
    const double u = 0.79788456080286535588 * (x + 0.044715 * x * x * x);
    return x < -38 ? 0 : x > 38 ? x : x / (1 + exp(-2 * u));
}

static double slope_true(double x, int32_t act)
{
    if (act == APT_RELU) return x > 0;
    if (act == APT_SILU && x < -700) return 0;
    if (act == APT_SILU) return (1 + x / (1 + exp(x))) / (1 + exp(-x));
    if (x < -38) return 0;
    if (x > 38) return 1;
    if (act == APT_GELU_ERF) return normal_cdf(x) + x * 0.39894228040143267794 * exp(-0.5 * x * x);
    const double u = 0.79788456080286535588 * (x + 0.044715 * x * x * x), du = 0.79788456080286535588 * (1 + 3 * 0.044715 * x * x);
    const double s = 1 / (1 + exp(-2 * u));
    return s + x * s * (1 - s) * 2 * du;
}

static void vectors_begin(vectors *v, int64_t n, int64_t shift)
{
    v->n = n;
    v->shift = shift;
    v->s = (float)uniform();
    for (int32_t q = 0; q < 3; q++) {
        fill(v->in[q], ROOM);
        memcpy(v->out[q], v->in[q], sizeof v->out[q]);
        for (int64_t i = 0; i < ROOM; i++) v->want[q][i] = (double)v->in[q][i];
    }
}

static void vectors_end(const vectors *v, const char *table, const char *what, double tolerance)
{
    for (int32_t q = 0; q < 3; q++) {
        for (int64_t i = 0; i < ROOM; i++) {
            const bool inside = i >= v->shift && i < v->shift + v->n;
            const double error = fabs((double)v->out[q][i] - v->want[q][i]);
            if (inside ? error > LOOSER * tolerance * (1 + fabs(v->want[q][i])) : bits_of(v->out[q][i]) != bits_of(v->in[q][i]))
                fail_msg("%s %s n=%d shift=%d argument %d [%d]: got %.9g, expected %.9g", table, what, (int)v->n, (int)v->shift, (int)q,
                         (int)(i - v->shift), (double)v->out[q][i], v->want[q][i]);
        }
    }
}

#define EACH(q, expression)                                                                       \
    for (int64_t i = v.shift; i < v.shift + v.n; i++) {                                           \
        const double x = (double)v.in[0][i], y = (double)v.in[1][i], z = (double)v.in[2][i], s = (double)v.s; \
        (void)x, (void)y, (void)z, (void)s;                                                       \
        v.want[q][i] = (expression);                                                              \
    }

static void check_elementwise(const apti_kernels *k, int64_t n, int64_t shift)
{
    static vectors v;
    float *a = v.out[0] + shift, *b = v.out[1] + shift, *c = v.out[2] + shift;
#define CASE(what, call, q, expression, tolerance)                                                \
    vectors_begin(&v, n, shift);                                                                  \
    call;                                                                                         \
    EACH(q, expression)                                                                           \
    vectors_end(&v, k->name, what, tolerance)
    CASE("scale", k->scale(b, a, v.s, n), 1, s * x, 1e-7);
    CASE("scale in place", k->scale(a, a, v.s, n), 0, s * x, 1e-7);
    CASE("add", k->add(c, a, b, n), 2, x + y, 1e-7);
    CASE("add in place", k->add(a, a, b, n), 0, x + y, 1e-7);
    CASE("mul", k->mul(c, a, b, n), 2, x * y, 1e-7);
    CASE("mul in place", k->mul(b, a, b, n), 1, x * y, 1e-7);
    CASE("axpy", k->axpy(a, v.s, b, n), 0, x + s * y, 2e-7);
    CASE("abs_add", k->abs_add(a, b, n), 0, x + fabs(y), 1e-7);
    CASE("exp_scaled", k->exp_scaled(a, n, v.s, 0.25f), 0, exp(s * x - 0.25), 3e-7);
    CASE("tanh", k->tanh(b, a, n), 1, tanh(x), 3e-7);
    CASE("norm", k->norm(a, a, b, c, 0.25f, v.s, n), 0, (x - 0.25) * s * y + z, 3e-7);
    for (int32_t act = APT_GELU_ERF; act <= APT_SILU; act++) {
        CASE("act", k->act(b, a, n, act), 1, act_true(x, act), 2e-7);
        CASE("act in place", k->act(a, a, n, act), 0, act_true(x, act), 2e-7);
        CASE("act_grad", k->act_grad(c, b, a, n, act), 2, y * slope_true(x, act), 2e-7);
        CASE("act_grad in place", k->act_grad(b, b, a, n, act), 1, y * slope_true(x, act), 2e-7);
    }
#undef CASE
}

static void check_adam(const apti_kernels *k, int64_t n, int64_t shift)
{
    static vectors v;
    float g[ROOM];
    vectors_begin(&v, n, shift);
    for (int64_t i = 0; i < ROOM; i++) v.in[2][i] = v.out[2][i] = 0.01f + fabsf(v.in[2][i]);
    fill(g, ROOM);
    k->adam(v.out[0] + shift, v.out[1] + shift, v.out[2] + shift, g + shift, n, 0.5f, 0.9f, 0.999f, 0.01f, 1e-8f, 0.001f);
    for (int64_t i = shift; i < shift + n; i++) {
        const double gs = 0.5 * (double)g[i];
        v.want[1][i] = (double)0.9f * (double)v.in[1][i] + (1 - (double)0.9f) * gs;
        v.want[2][i] = (double)0.999f * (double)v.in[2][i] + (1 - (double)0.999f) * gs * gs;
        v.want[0][i] = (double)v.in[0][i] - 0.01 * v.want[1][i] / (sqrt(v.want[2][i]) + 1e-8) - 0.001 * (double)v.in[0][i];
    }
    vectors_end(&v, k->name, "adam", 3e-7);
}

static void check_reductions(const apti_kernels *k, int64_t n, int64_t shift)
{
    static vectors v;
    vectors_begin(&v, n, shift);
    const float *a = v.in[0] + shift, *b = v.in[1] + shift;
    double sum = 0, dot = 0, dev = 0, max = n > 0 ? (double)a[0] : -(double)APTI_FLT_MAX;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)a[i];
        dot += (double)a[i] * (double)b[i];
        dev += ((double)a[i] - 0.25) * ((double)a[i] - 0.25);
        if ((double)a[i] > max) max = (double)a[i];
    }
    const double allowed = 1e-5;
    if (fabs((double)k->sum(a, n) - sum) > allowed || fabs((double)k->dot(a, b, n) - dot) > allowed ||
        fabs((double)k->sq_dev(a, 0.25f, n) - dev) > allowed * 2 || (double)k->max(a, n) != max)
        fail_msg("%s: a reduction is wrong at n=%d shift=%d", k->name, (int)n, (int)shift);
    float *copy = floats(n + 8);      /* the value does not depend on the alignment */
    memcpy(copy + 1, a, (size_t)n * sizeof(float));
    const float x = k->sum(copy + 1, n), y = k->sum(a, n);
    assert_int_equal(bits_of(x), bits_of(y));
    free(copy);
}

static void test_vectors(void **state)
{
    (void)state;
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        for (int64_t n = 0; n <= LONGEST; n++) {
            for (int64_t shift = 0; shift < 4; shift++) {
                check_elementwise(g_table[t], n, shift);
                check_adam(g_table[t], n, shift);
                check_reductions(g_table[t], n, shift);
            }
        }
    }
}

static void test_layout(void **state)        /* transpose, copy, expand */
{
    (void)state;
    enum { SIDE = 37, LD = 41 };
    static float x[SIDE * LD], y[SIDE * LD + 16], z[SIDE * LD + 16];
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        const apti_kernels *k = g_table[t];
        for (int64_t rows = 0; rows <= SIDE; rows++) {
            for (int64_t cols = 0; cols <= SIDE; cols += 1 + (rows % 3)) {
                fill(x, SIDE * LD);
                fill(y, SIDE * LD);
                memcpy(z, y, sizeof z);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < cols; c++) z[c * LD + r] = x[r * LD + c];
                k->transpose(y, LD, x, LD, rows, cols);
                assert_true(same_bits(y, z, SIDE * LD));
                k->copy(y, cols, x, LD, rows, cols);         /* rows overlap the padding of the row before */
                for (int64_t r = 0; r < rows; r++) assert_true(same_bits(y + r * cols, x + r * LD, cols));
            }
        }
        static uint16_t h[LONGEST];
        for (int64_t n = 0; n <= LONGEST; n++) {
            for (int64_t i = 0; i < n; i++) h[i] = (uint16_t)below(65536);
            y[n] = 7.0f;
            const apt_dtype type = n % 2 == 0 ? APT_BF16 : APT_F16;
            k->expand(y, h, n, type);
            for (int64_t i = 0; i < n; i++) assert_true(bits_of(y[i]) == bits_of(apti_half_to_f32(h[i], type)));
            assert_true(y[n] == 7.0f);
        }
        static uint16_t every[65536];
        static float wide[65536];
        for (int32_t i = 0; i < 65536; i++) every[i] = (uint16_t)i;
        for (int32_t half = 0; half < 2; half++) {
            const apt_dtype type = half ? APT_F16 : APT_BF16;
            k->expand(wide, every, 65536, type);
            for (int32_t i = 0; i < 65536; i++) assert_true(bits_of(wide[i]) == bits_of(apti_half_to_f32((uint16_t)i, type)));
        }
    }
}

/* ---- approximations over the whole range ---- */

enum { CHUNK = 4096 };

typedef struct scan { double exp_rel, tanh_rel, gelu, gelu_slope, gelu_tanh, gelu_tanh_slope; } scan;

static void raise_to(double *worst, double error)
{
    if (error > *worst) *worst = error;
}

static void scan_chunk(const apti_kernels *k, const float *x, int64_t n, scan *w)
{
    static float y[CHUNK], one[CHUNK];
    for (int64_t i = 0; i < n; i++) one[i] = 1.0f;
    memcpy(y, x, (size_t)n * sizeof(float));
    k->exp_scaled(y, n, 1.0f, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const double want = exp((double)x[i]);
        if (x[i] > 88.7228394f) { if (bits_of(y[i]) != 0x7f800000u) fail_msg("%s exp(%g) = %g", k->name, (double)x[i], (double)y[i]); }
        else if (x[i] < -86.9f) assert_true(y[i] >= 0.0f && (double)y[i] <= want * 1.000001 + 1e-44);
        else raise_to(&w->exp_rel, fabs((double)y[i] - want) / want);
    }
    k->tanh(y, x, n);
    for (int64_t i = 0; i < n; i++) {
        const double want = tanh((double)x[i]);
        if (fabsf(x[i]) > 1e-30f) raise_to(&w->tanh_rel, fabs((double)y[i] - want) / fabs(want));
    }
    /* absolute for |x| < 1, then relative to |x|: a float near 30 cannot be better than 1e-6 */
    for (int32_t act = APT_GELU_ERF; act <= APT_GELU_TANH; act++) {
        k->act(y, x, n, act);
        for (int64_t i = 0; i < n; i++)
            raise_to(act == APT_GELU_ERF ? &w->gelu : &w->gelu_tanh, fabs((double)y[i] - act_true((double)x[i], act)) / fmax(1.0, (double)fabsf(x[i])));
        k->act_grad(y, one, x, n, act);
        for (int64_t i = 0; i < n; i++)
            raise_to(act == APT_GELU_ERF ? &w->gelu_slope : &w->gelu_tanh_slope, fabs((double)y[i] - slope_true((double)x[i], act)));
    }
}

static void test_accuracy(void **state)
{
    (void)state;
    static float x[CHUNK];
    const uint32_t stride = getenv("APT_TEST_DENSE") != NULL ? 61 : 6007 * TEST_SAMPLE(10);
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        scan w = APT_ZERO;
        int64_t n = 0;
        for (uint64_t u = 0; u <= 0xffffffffu; u += stride) {     /* every exponent, both signs */
            const float f = from_bits((uint32_t)u);
            if ((bits_of(f) & 0x7f800000u) != 0x7f800000u) x[n++] = f;
            if (n == CHUNK) scan_chunk(g_table[t], x, n, &w), n = 0;
        }
        scan_chunk(g_table[t], x, n, &w);
        for (int64_t c = 0; c < 400; c += TEST_SAMPLE(11)) {                     /* where the functions bend */
            for (int64_t i = 0; i < CHUNK; i++) x[i] = (float)(uniform() * (c % 2 == 0 ? 6.0 : 20.0));
            scan_chunk(g_table[t], x, CHUNK, &w);
        }
        printf("    %-7s exp %.2g rel, tanh %.2g rel, gelu %.2g, slope %.2g, tanh gelu %.2g, slope %.2g abs\n", g_table[t]->name, w.exp_rel,
               w.tanh_rel, w.gelu, w.gelu_slope, w.gelu_tanh, w.gelu_tanh_slope);
        assert_true(w.exp_rel < 1.3e-7);
        assert_true(w.tanh_rel < LOOSER * 2e-7);
        assert_true(w.gelu < 1.3e-7);
        assert_true(w.gelu_slope < LOOSER * 1.6e-7);
        assert_true(w.gelu_tanh < 1.3e-7);
        assert_true(w.gelu_tanh_slope < LOOSER * 1.6e-7);
    }
}

/* The value of an elementwise function must not depend on where in the vector the element stands. */
static void test_position(void **state)
{
    (void)state;
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        const apti_kernels *k = g_table[t];
        float x[LONGEST], y[LONGEST], one[LONGEST];
        for (int64_t i = 0; i < LONGEST; i++) x[i] = (float)uniform() * 4.0f, one[i] = 1.0f;
        for (int32_t f = 0; f < 10; f++) {
            for (int64_t i = -1; i < LONGEST; i++) {              /* -1: all at once, then one by one */
                float z[LONGEST];
                memcpy(z, x, sizeof z);
                float *p = i < 0 ? z : z + i;
                const int64_t n = i < 0 ? LONGEST : 1;
                if (f < 4) k->act(p, p, n, f);
                else if (f < 8) k->act_grad(p, one, p, n, f - 4);
                else if (f == 8) k->tanh(p, p, n);
                else k->exp_scaled(p, n, 0.7f, 0.1f);
                if (i < 0) memcpy(y, z, sizeof y);
                else assert_int_equal(bits_of(z[i]), bits_of(y[i]));
            }
        }
    }
}

static void test_extremes(void **state)
{
    (void)state;
    const float inf = from_bits(0x7f800000u), nans[3] = {from_bits(0x7fc00000u), from_bits(0xffc00000u), from_bits(0x7f800001u)};
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        const apti_kernels *k = g_table[t];
        for (int32_t place = 0; place < 37; place++) {
            for (int32_t q = 0; q < 3; q++) {
                float x[37], y[37], one[37];
#define PUT for (int32_t i = 0; i < 37; i++) { x[i] = one[i] = 1.0f; y[i] = 0.5f; } x[place] = nans[q]
#define LOST(call, out) do { PUT; call; for (int32_t i = 0; i < 37; i++) if (is_nan((out)[i]) != (i == place)) fail_msg("%s: NaN lost or spread by %s", k->name, #call); } while (0)
                LOST(k->exp_scaled(x, 37, 1.0f, 0.5f), x);
                LOST(k->tanh(y, x, 37), y);
                LOST(k->scale(y, x, 2.0f, 37), y);
                LOST(k->abs_add(y, x, 37), y);
                LOST(k->axpy(y, 2.0f, x, 37), y);
                LOST(k->norm(y, x, one, one, 0.0f, 1.0f, 37), y);
                for (int32_t act = APT_GELU_ERF; act <= APT_SILU; act++) {
                    LOST(k->act(y, x, 37, act), y);
                    LOST(k->act_grad(y, x, one, 37, act), y);
                    LOST(k->act_grad(y, one, x, 37, act), y);
                }
                PUT;
                assert_true(is_nan(k->max(x, 37)) && is_nan(k->sum(x, 37)) && is_nan(k->dot(one, x, 37)) && is_nan(k->sq_dev(x, 0.0f, 37)));
                assert_true(k->max(one, 37) == 1.0f);
            }
        }
        const float big[6] = {inf, -inf, 3e38f, -3e38f, 1e30f, -1e30f};
        float y[6], one[6] = {1, 1, 1, 1, 1, 1};
        for (int32_t act = APT_GELU_ERF; act <= APT_SILU; act++) {
            k->act(y, big, 6, act);
            for (int32_t i = 0; i < 6; i += 2) assert_true(bits_of(y[i]) == bits_of(big[i]) && fabsf(y[i + 1]) < 1e-30f);
            k->act_grad(y, one, big, 6, act);
            for (int32_t i = 0; i < 6; i += 2) assert_true(y[i] == 1.0f && fabsf(y[i + 1]) < 1e-15f);
        }
        k->tanh(y, big, 6);
        for (int32_t i = 0; i < 6; i++) assert_true(y[i] == (i % 2 == 0 ? 1.0f : -1.0f));
        memcpy(y, big, sizeof y);
        k->exp_scaled(y, 6, 1.0f, 0.0f);
        for (int32_t i = 0; i < 6; i++) assert_int_equal(bits_of(y[i]), i % 2 == 0 ? 0x7f800000u : 0u);
    }
}

/* ---- products ---- */

enum { EXTRA = 5 };                   /* padding floats in every row, checked to be untouched */

typedef struct product {
    apti_gemm g;
    float *a[2], *b[2], *w[2], *c, *pre, *residual, *bias, *mask, *start;
    apti_packed packed[2];
    void *block[2];
    int64_t size_c;
} product;

static const char *const kind_name[] = {"packed", "packed_t", "plain", "plain_t"};

static void product_part(apt_ctx *ctx, product *p, int32_t q, int64_t k, apti_b_kind kind, bool a_transposed, apt_dtype type)
{
    apti_gemm_part *part = &p->g.part[q];
    const int64_t m = p->g.m, n = p->g.n;
    part->k = k;
    part->kind = kind;
    p->a[q] = floats((m + EXTRA) * (k + EXTRA));
    part->a = p->a[q];
    part->a_row = a_transposed ? 1 : k + EXTRA;
    part->a_col = a_transposed ? m + EXTRA : 1;
    p->b[q] = floats((n + EXTRA) * (k + EXTRA));
    part->b = p->b[q];
    part->ldb = kind == APTI_B_PLAIN ? n + EXTRA : k + EXTRA;
    if (kind > APTI_B_PACKED_T) return;
    apti_packed *packed = &p->packed[q];
    packed->n = kind == APTI_B_PACKED ? n : k;
    packed->k = kind == APTI_B_PACKED ? k : n;
    packed->nr = ctx->kernels->nr;
    packed->type = type;
    packed->data = p->block[q] = apti_alloc(ctx, apti_packed_bytes(ctx, packed->n, packed->k, type), 1);
    assert_non_null(packed->data);
    const int64_t ldw = packed->k + EXTRA;
    p->w[q] = floats((packed->n + 1) * ldw);
    for (int64_t i = 0; apti_is_half(type) && i < packed->n * ldw; i++)
        p->w[q][i] = apti_half_to_f32(apti_f32_to_half(p->w[q][i], type), type);
    apti_pack(ctx, packed, p->w[q], ldw);
    float *back = floats((packed->n + 1) * ldw);
    memcpy(back, p->w[q], (size_t)((packed->n + 1) * ldw) * sizeof(float));
    for (int64_t i = 0; i < packed->n; i++)
        for (int64_t j = 0; j < packed->k; j++) back[i * ldw + j] = 9.0f;
    apti_unpack(ctx, back, ldw, packed);
    assert_true(same_bits(back, p->w[q], (packed->n + 1) * ldw));
    free(back);
    part->packed = packed;
}

static float b_at(const product *p, int32_t q, int64_t row, int64_t col)
{
    const apti_gemm_part *part = &p->g.part[q];
    if (part->kind == APTI_B_PLAIN) return part->b[row * part->ldb + col];
    if (part->kind == APTI_B_PLAIN_T) return part->b[col * part->ldb + row];
    const int64_t ldw = p->packed[q].k + EXTRA;
    return part->kind == APTI_B_PACKED ? p->w[q][col * ldw + row] : p->w[q][row * ldw + col];
}

enum { WITH_BIAS = 1, WITH_PRE = 2, WITH_RESIDUAL = 4, WITH_MASK = 8, WITH_ACCUMULATE = 16, WITH_ALIAS = 32 };

static void product_begin(product *p, int64_t m, int64_t n, int32_t with, int32_t act)
{
    memset(p, 0, sizeof *p);
    apti_gemm *g = &p->g;
    g->m = m;
    g->n = n;
    g->ldc = n + EXTRA;
    p->size_c = (m + 1) * g->ldc;
    g->c = p->c = floats(p->size_c);
    p->start = floats(p->size_c);
    memcpy(p->start, p->c, (size_t)p->size_c * sizeof(float));
    p->bias = floats(n);
    p->mask = floats(n);
    p->pre = floats((m + 1) * (n + EXTRA + 1));
    p->residual = floats((m + 1) * (n + EXTRA + 2));
    g->accumulate = (with & WITH_ACCUMULATE) != 0;
    g->act = act;
    if (with & WITH_BIAS) g->bias = p->bias;
    if (with & WITH_MASK) g->mask = p->mask;
    if (with & WITH_PRE) g->pre = p->pre, g->ld_pre = n + EXTRA + 1;
    if (with & WITH_RESIDUAL) g->residual = p->residual, g->ld_residual = n + EXTRA + 2;
    if (with & WITH_ALIAS) g->residual = p->c, g->ld_residual = g->ldc;
}

static void product_end(apt_ctx *ctx, product *p)
{
    for (int32_t q = 0; q < 2; q++) {
        free(p->a[q]);
        free(p->b[q]);
        free(p->w[q]);
        apti_free(ctx, p->block[q]);
    }
    free(p->c);
    free(p->start);
    free(p->bias);
    free(p->mask);
    free(p->pre);
    free(p->residual);
}

/* z of one element: by the chain of fused multiply-adds, and in double with the size of its terms. */
static float product_chain(const product *p, int64_t i, int64_t j, double *exact, double *size)
{
    float z = p->g.accumulate ? p->start[i * p->g.ldc + j] : p->g.bias != NULL ? p->g.bias[j] : 0.0f;
    *exact = (double)z;
    *size = fabs(*exact);
    for (int32_t q = 0; q < 2; q++) {
        const apti_gemm_part *part = &p->g.part[q];
        for (int64_t r = 0; r < part->k; r++) {
            const float a = part->a[i * part->a_row + r * part->a_col], b = b_at(p, q, r, j);
            z = exact_fma(a, b, z);
            *exact += (double)a * (double)b;
            *size += fabs((double)a * (double)b);
        }
    }
    return z;
}

/* Checks c (and pre) of a finished product. Without epilogue the SIMD tables must give the chain bit for bit. */
static void product_check(const apti_kernels *kernels, const product *p, const char *what)
{
    const apti_gemm *g = &p->g;
    const bool chain = apti_gemm_kernels(kernels, g)->operands == NULL && kernels->lanes > 1, late_bias = g->bias != NULL && g->accumulate, plain = !late_bias && g->act < 0 && g->residual == NULL && g->mask == NULL;
    for (int64_t i = 0; i <= g->m; i++) {
        if (i % TEST_SAMPLE(7) != 0 && i < g->m - 1) continue;
        for (int64_t j = 0; j < g->ldc; j++) {
            const float got = g->c[i * g->ldc + j];
            if (i == g->m || j >= g->n) {
                assert_int_equal(bits_of(got), bits_of(p->start[i * g->ldc + j]));
                continue;
            }
            double z, size;
            const float first = product_chain(p, i, j, &z, &size);
            const double allowed = 1e-6 + 6e-8 * size * (2 + sqrt((double)(g->part[0].k + g->part[1].k)));
            double want = late_bias ? z + (double)g->bias[j] : z;
            bool good = g->pre == NULL || fabs((double)g->pre[i * g->ld_pre + j] - want) <= allowed;
            if (g->pre != NULL && !late_bias && chain) good = good && bits_of(g->pre[i * g->ld_pre + j]) == bits_of(first);
            if (g->act >= 0) want = act_true(want, g->act);
            if (g->residual != NULL) want += (double)(g->residual == g->c ? p->start : g->residual)[i * g->ld_residual + j];
            if (g->mask != NULL) want *= (double)g->mask[j];
            good = good && (plain && chain ? bits_of(got) == bits_of(first) : fabs((double)got - want) <= 1.2 * allowed);
            if (!good)
                fail_msg("%s %s %dx%d k=%d+%d kinds %s+%s act %d [%d,%d]: got %.9g, expected %.9g (chain %.9g)", kernels->name, what, (int)g->m,
                         (int)g->n, (int)g->part[0].k, (int)g->part[1].k, kind_name[g->part[0].kind], kind_name[g->part[1].kind], (int)g->act,
                         (int)i, (int)j, (double)got, want, (double)first);
        }
    }
}

typedef struct shape { int64_t m, n, k0, k1; } shape;

static void run_product(apt_ctx *ctx, shape s, apti_b_kind kind0, apti_b_kind kind1, bool a_transposed, apt_dtype type, int32_t with, int32_t act)
{
    product p;
    product_begin(&p, s.m, s.n, with, act);
    product_part(ctx, &p, 0, s.k0, kind0, a_transposed, type);
    product_part(ctx, &p, 1, s.k1, kind1, a_transposed && s.m % 2 == 0, type);
    apti_gemm_run(ctx, &p.g);
    product_check(ctx->kernels, &p, "run");
    if (with % 3 == 0) {              /* the same without threads, and in the least scratch */
        float *first = floats(p.size_c);
        memcpy(first, p.c, (size_t)p.size_c * sizeof(float));
        memcpy(p.c, p.start, (size_t)p.size_c * sizeof(float));
        apti_gemm_serial(ctx->kernels, &p.g, ctx->scratch[0], APTI_GEMM_SCRATCH);
        assert_true(same_bits(first, p.c, p.size_c));
        free(first);
    }
    product_end(ctx, &p);
}

static void test_products_small(void **state)
{
    (void)state;
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        apt_ctx *ctx = context(g_table[t]->name, 2);
        int32_t with = 0;
        for (int64_t m = 1; m <= 18; m++) {
            for (int64_t n = 1; n <= 36; n += m <= 4 ? 1 : 5) {
                for (int64_t k = 0; k <= 9; k += m <= 4 ? 1 : 3) {
                    for (int32_t kind = 0; kind < 4; kind++) {
                        const shape s = {m, n, k, k % 3 == 0 ? 0 : 3};
                        run_product(ctx, s, (apti_b_kind)kind, (apti_b_kind)((kind + with) % 4), with % 2 == 1, with % 5 == 0 ? APT_BF16 : with % 5 == 2 ? APT_F16 : APT_F32, with % 64 & (with % 3 == 0 ? 0x10 : 0x3f), with % 4 - 1);
                        with++;
                    }
                }
            }
        }
        apt_destroy(ctx);
    }
}

/* Sizes around the blocks: k past one and two k blocks, rows past a row block, columns past a tile. */
static void test_products_large(void **state)
{
    (void)state;
    static const shape shapes[] = {{61, 75, 300, 8}, {1, 517, 600, 4}, {2, 200, 257, 0}, {3, 96, 256, 80}, {4, 100, 513, 64}, {200, 40, 260, 16},
                                   {13, 13, 32, 0}, {128, 128, 32, 0}, {40, 300, 31, 65}, {190, 290, 70, 0}, {8, 384, 700, 0}, {90, 8, 520, 0}, {150, 28, 300, 0}, {77, 3, 700, 0},
                                   {36, 70, 1600, 8}, {1100, 36, 40, 8}};
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        apt_ctx *ctx = context(g_table[t]->name, 2);
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            for (int32_t kind = 0; kind < 4; kind++) {
                const apti_b_kind first = (apti_b_kind)kind, second = (apti_b_kind)((kind + (int32_t)i) % 4);
                run_product(ctx, shapes[i], first, second, false, APT_F32, 0, -1);
                run_product(ctx, shapes[i], first, second, true, i % 2 == 0 ? APT_BF16 : APT_F32, WITH_ACCUMULATE, -1);
                run_product(ctx, shapes[i], first, second, kind == 1, APT_F16, WITH_ACCUMULATE | WITH_MASK, kind - 1);
                run_product(ctx, shapes[i], first, second, false, APT_BF16, WITH_BIAS | WITH_PRE | WITH_RESIDUAL | WITH_MASK, APT_GELU_ERF);
                run_product(ctx, shapes[i], first, second, kind % 2 == 0, APT_F32, WITH_BIAS | WITH_ALIAS | WITH_PRE, kind - 1);
            }
        }
        for (int32_t i = 0; i < 60; i++) {
            const shape s = {1 + below(70), 1 + below(150), below(300), below(20)};
            run_product(ctx, s, (apti_b_kind)below(4), (apti_b_kind)below(4), below(2) == 1, below(2) == 1 ? below(2) == 1 ? APT_BF16 : APT_F16 : APT_F32, (int32_t)below(64), (int32_t)below(4) - 1);
        }
        apt_destroy(ctx);
    }
}

/* Bit for bit the same for any number of threads, any caller's order of tasks, and for a row alone as for the row in a batch.
   (A table that splits the operands of large products does not do it for few rows: there it is the row in any larger batch.) */
static void test_products_identical(void **state)
{
    (void)state;
    static const int32_t threads[] = {1, 2, 3, 8};
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        for (int32_t kind = 0; kind < 4; kind++) {
            const bool transposed = kind % 2 == 1;
            const int64_t m = 143, n = 210, ld = n + EXTRA;
            float *reference = NULL;
            for (size_t c = 0; c < sizeof threads / sizeof threads[0]; c++) {
                g_seed = 77;
                apt_ctx *ctx = context(g_table[t]->name, threads[c]);
                product p;
                product_begin(&p, m, n, WITH_BIAS | WITH_PRE | WITH_RESIDUAL | WITH_MASK, APT_GELU_ERF);
                product_part(ctx, &p, 0, 300, (apti_b_kind)kind, transposed, kind == 0 ? APT_BF16 : kind == 1 ? APT_F16 : APT_F32);
                product_part(ctx, &p, 1, 8, APTI_B_PLAIN_T, false, APT_F32);
                apti_gemm_run(ctx, &p.g);
                if (reference == NULL) {
                    reference = floats(p.size_c);
                    memcpy(reference, p.c, (size_t)p.size_c * sizeof(float));
                }
                assert_true(same_bits(reference, p.c, p.size_c));
                const int64_t least = ctx->kernels->split != NULL ? APTI_SPLIT_STEP : 1;
                for (int64_t rows = least; rows <= least + 16; rows += rows < 4 ? 1 : 6) {            /* from 1 row to more than a strip */
                    const int64_t i = below(m - rows);
                    apti_gemm g = p.g;
                    g.m = rows;
                    g.pre = NULL;
                    for (int32_t q = 0; q < 2; q++) g.part[q].a += i * g.part[q].a_row;
                    g.residual += i * g.ld_residual;
                    g.c = floats(rows * ld);
                    apti_gemm_run(ctx, &g);
                    for (int64_t r = 0; r < rows; r++) assert_true(same_bits(g.c + r * ld, reference + (i + r) * ld, n));
                    free(g.c);
                }
                product_end(ctx, &p);
                apt_destroy(ctx);
            }
            free(reference);
        }
    }
}

/* Large products give every thread the same number of tiles, and no tile without rows. */
static void test_tiles_even(void **state)
{
    (void)state;
    static const int64_t sizes[] = {256, 384, 768, 1024, 2048, 3072};
    for (int32_t t = TEST_FIRST_TABLE(g_tables); t < g_tables; t++) {
        for (int32_t i = 0; i < 36 * 4; i++) {
            const int32_t threads = 1 << i / 36;
            apti_packed packed = APT_ZERO;
            apti_gemm g = APT_ZERO;
            apti_gemm_job job = APT_ZERO;
            packed.type = APT_F32;
            g.m = sizes[i % 6];
            g.n = sizes[i / 6 % 6];
            g.part[0].k = 768;
            g.part[0].kind = APTI_B_PACKED;
            g.part[0].packed = &packed;
            g.part[0].a_col = 1;
            job.g = &g;
            job.kernels = g_table[t];
            apti_gemm_cut(&job, threads);
            assert_int_equal(job.tiles_m * job.tiles_n % threads, 0);
            assert_true(job.tiles_m * job.kernels->mr <= g.m && job.tiles_n <= job.panels);
        }
    }
}

/* Products of the SIMD tables agree bit for bit with each other, but for those of split operands. */
static void test_products_agree(void **state)
{
    (void)state;
    float *reference = NULL;
    for (int32_t t = 1; t < g_tables; t++) {
        if (g_table[t]->split != NULL) continue;
        g_seed = 5;
        apt_ctx *ctx = context(g_table[t]->name, 1);
        product p;
        product_begin(&p, 37, 70, 0, -1);
        product_part(ctx, &p, 0, 333, APTI_B_PACKED_T, false, APT_F32);
        product_part(ctx, &p, 1, 8, APTI_B_PLAIN, false, APT_F32);
        apti_gemm_run(ctx, &p.g);
        if (reference == NULL) {
            reference = floats(p.size_c);
            memcpy(reference, p.c, (size_t)p.size_c * sizeof(float));
        }
        assert_true(same_bits(reference, p.c, p.size_c));
        product_end(ctx, &p);
        apt_destroy(ctx);
    }
    free(reference);
}

/* ---- products of split operands ---- */

/* The parts of a float, in plain C */
static void parts_of(uint16_t part[APTI_SPLIT_PLANES], float x, int32_t planes)
{
    for (int32_t plane = 0; plane < planes; plane++) {
        const uint32_t bits = plane + 1 < planes ? (bits_of(x) + 0x8000u) & 0xffff0000u : bits_of(x);
        part[plane] = (uint16_t)(bits >> 16);
        x -= apti_bf16_to_f32(part[plane]);
    }
}

/* Number `pair` (0, 1) of line `line` of a block: its place in a plane of a step */
static int64_t split_at(int64_t step, int32_t planes, int32_t plane, int64_t line, int64_t at, int64_t pair)
{
    return ((step * planes + plane) * 2 + line / 16) * APTI_SPLIT_BLOCK + line % 16 * 32 + 2 * at + pair;
}

static int64_t g_split_steps;                    /* of A, in the driver's test, which has one strip of rows where it looks */

static void split_a_plain(const apti_split_job *job)
{
    __atomic_add_fetch(&g_split_steps, apti_ceil_div(job->across, APTI_SPLIT_STEP), __ATOMIC_RELAXED);
    for (int64_t p = 0; p < apti_round_up(job->across, APTI_SPLIT_STEP); p++) {
        for (int64_t r = 0; r < APTI_SPLIT_STEP; r++) {
            uint16_t part[APTI_SPLIT_PLANES];
            parts_of(part, r < job->lines && p < job->across ? job->x[r * job->ldx + p] : 0.0f, APTI_SPLIT_PLANES);
            for (int32_t plane = 0; plane < APTI_SPLIT_PLANES; plane++)
                job->y[split_at(p / 32, APTI_SPLIT_PLANES, plane, r, p % 16, p % 32 / 16)] = part[plane];
        }
    }
}

static void split_b_plain(const apti_split_job *job)
{
    for (int64_t p = 0; p < apti_round_up(job->lines, APTI_SPLIT_STEP); p++) {
        for (int64_t j = 0; j < APTI_SPLIT_STEP; j++) {
            uint16_t part[APTI_SPLIT_PLANES];
            parts_of(part, p < job->lines && j < job->across ? job->x[p * job->ldx + j] : 0.0f, job->planes);
            for (int32_t plane = 0; plane < job->planes; plane++)
                job->y[split_at(p / 32, job->planes, plane, j / 16 * 16 + p % 16, j % 16, p % 32 / 16)] = part[plane];
        }
    }
}

static void split_tile_plain(const apti_tile *t)
{
    float sum[APTI_SPLIT_STEP][APTI_SPLIT_STEP];
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t j = 0; j < APTI_SPLIT_STEP; j++) sum[i][j] = t->from != NULL ? t->from[i * t->ld_from + j] : 0.0f;
    for (int32_t q = 0; q < 2; q++) {
        const apti_segment *segment = &t->segment[q];
        const uint16_t *a = (const uint16_t *)(const void *)segment->a, *b = (const uint16_t *)segment->b;
        const int32_t planes = segment->type == APT_BF16 ? 1 : APTI_SPLIT_PLANES;
        for (int64_t p = 0; p < apti_round_up(segment->k, APTI_SPLIT_STEP); p++)
            for (int64_t i = 0; i < t->rows; i++)
                for (int64_t j = 0; j < APTI_SPLIT_STEP; j++)
                    for (int32_t x = 0; x < APTI_SPLIT_PLANES; x++)
                        for (int32_t y = 0; y < planes && x + y < APTI_SPLIT_PLANES; y++)
                            sum[i][j] += apti_bf16_to_f32(a[split_at(p / 32, APTI_SPLIT_PLANES, x, i, p % 16, p % 32 / 16)]) *
                                apti_bf16_to_f32(b[split_at(p / 32, planes, y, j / 16 * 16 + p % 16, j % 16, p % 32 / 16)]);
    }
    for (int64_t i = 0; i < t->rows; i++) memcpy(t->to + i * t->ld_to, sum[i], sizeof sum[i]);
}

static void split_nothing(void) { }

/* The driver of split products on any CPU, with the operands and tiles above. */
static void test_split_driver(void **state)
{
    (void)state;
    static const apti_split_kernels operands = {split_nothing, split_nothing, split_a_plain, split_b_plain};
    static const shape shapes[] = {{32, 32, 32, 0}, {33, 40, 31, 8}, {61, 75, 300, 65}, {70, 450, 129, 16}, {600, 33, 40, 0}, {40, 36, 800, 8}};
    apti_kernels table = *apti_kernels_find("ref"), split = table;
    split.mr = split.nr = split.slim = APTI_SPLIT_STEP;
    split.operands = &operands;
    split.tile = split_tile_plain;
    table.nr = APTI_SPLIT_STEP;                  /* the width of panels that both read */
    table.split = &split;
    apt_ctx *ctx = context("ref", 2);
    ctx->kernels = &table;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int32_t kind = 0; kind < 4; kind++) {
            const apti_b_kind first = (apti_b_kind)kind, second = (apti_b_kind)((kind + (int32_t)i) % 4);
            run_product(ctx, shapes[i], first, second, kind % 2 == 0, APT_F32, WITH_BIAS | WITH_PRE | WITH_RESIDUAL, APT_GELU_ERF);
            run_product(ctx, shapes[i], first, second, kind % 2 == 1, APT_BF16, WITH_ACCUMULATE | WITH_ALIAS | WITH_MASK, -1);
            run_product(ctx, shapes[i], first, second, kind % 2 == 1, APT_F16, WITH_ACCUMULATE, -1);
        }
    }
    g_split_steps = 0;                           /* no step is only half full but the last; the product is made twice */
    run_product(ctx, (shape){32, 32, 800, 0}, APTI_B_PLAIN, APTI_B_PLAIN, false, APT_F32, 0, -1);
    assert_int_equal(g_split_steps, 2 * 25);
    apt_destroy(ctx);
}

/* What a table makes of operands is what the plain functions make; its tiles are right to rounding. */
static void test_split_operands(void **state)
{
    (void)state;
    enum { SIDE = 70, ROOM_Y = 3 * 3 * 2 * APTI_SPLIT_BLOCK };
    static float x[SIDE * (SIDE + 3)];
    static uint16_t y[ROOM_Y], want[ROOM_Y];
    for (int32_t t = 0; t < g_tables; t++) {
        if (g_table[t]->split == NULL) continue;
        const apti_split_kernels *operands = g_table[t]->split->operands;
        for (int32_t i = 0; i < 400; i++) {
            apti_split_job job = {y, x, SIDE + 3, 1 + below(i % 2 == 0 ? 32 : SIDE), 1 + below(i % 2 == 0 ? SIDE : 32), i % 3 == 0 && i % 2 != 0 ? 1 : 3}, plain;
            for (int64_t r = 0; r < SIDE * (SIDE + 3); r++) {
                x[r] = (float)uniform() * (float)(below(2) == 0 ? 1e-20 : 1e10);
                if (job.planes == 1) x[r] = apti_bf16_to_f32(apti_f32_to_bf16(x[r]));
            }
            plain = job;
            plain.y = want;
            memset(y, 0x55, sizeof y);
            memset(want, 0x55, sizeof want);
            (i % 2 == 0 ? operands->a : operands->b)(&job);
            (i % 2 == 0 ? split_a_plain : split_b_plain)(&plain);
            assert_memory_equal(y, want, sizeof y);
        }
    }
}

/* Root mean square of the errors of a product of 64 x 64 with k inputs, against double */
static double product_error(const char *table, int64_t k, bool wide)
{
    apt_ctx *ctx = context(table, 1);
    product p;
    double squares = 0;
    g_seed = 11;
    product_begin(&p, 64, 64, 0, -1);
    product_part(ctx, &p, 0, k, APTI_B_PLAIN, false, APT_F32);
    for (int64_t i = 0; wide && i < 64 * k; i++) p.a[0][i] *= exp2f((float)below(40) - 20.0f);
    apti_gemm_run(ctx, &p.g);
    for (int64_t i = 0; i < 64; i++) {
        for (int64_t j = 0; j < 64; j++) {
            double exact, size;
            product_chain(&p, i, j, &exact, &size);
            squares += pow(((double)p.c[i * p.g.ldc + j] - exact) / size, 2);
        }
    }
    product_end(ctx, &p);
    apt_destroy(ctx);
    return sqrt(squares / 4096);
}

/* Splitting loses nothing that the sums of floats would keep: the errors are not above those of the chain. */
static void test_split_accuracy(void **state)
{
    (void)state;
    for (int32_t t = 0; t < g_tables; t++) {
        if (g_table[t]->split == NULL) continue;
        for (int64_t k = 32; k <= 2048; k *= 8) {
            for (int32_t wide = 0; wide < 2; wide++) {
                const double chain = product_error("avx512", k, wide != 0), split = product_error(g_table[t]->name, k, wide != 0);
                printf("    %s, %d inputs%s: rms error %.2g of the size of the terms, of the chain %.2g\n", g_table[t]->name, (int)k,
                       wide ? " of many sizes" : "", split, chain);
                assert_true(split <= 1.1 * chain);
            }
        }
    }
}

static void test_products_empty(void **state)
{
    (void)state;
    apt_ctx *ctx = context(NULL, 1);
    product p;
    product_begin(&p, 3, 4, 0, -1);
    p.g.m = 0;
    apti_gemm_run(ctx, &p.g);
    apti_gemm_serial(ctx->kernels, &p.g, ctx->scratch[0], APTI_GEMM_SCRATCH);
    p.g.m = 3;
    p.g.n = 0;
    apti_gemm_run(ctx, &p.g);
    assert_true(same_bits(p.c, p.start, p.size_c));
    p.g.n = 4;
    apti_gemm_run(ctx, &p.g);         /* k = 0: zeros */
    for (int64_t i = 0; i < 3; i++)
        for (int64_t j = 0; j < 4; j++) assert_int_equal(bits_of(p.c[i * p.g.ldc + j]), 0);
    product_end(ctx, &p);
    assert_true(apti_packed_bytes(ctx, INT64_MAX - 3, 5, APT_F32) < 0 && apti_packed_bytes(ctx, 5, INT64_MAX / 8, APT_F32) < 0);
    apt_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),          cmocka_unit_test(test_products_small),
        cmocka_unit_test(test_products_large),  cmocka_unit_test(test_products_identical),
        cmocka_unit_test(test_tiles_even),
        cmocka_unit_test(test_split_driver),
#ifndef __SANITIZE_THREAD__                      /* one thread cannot race */
        cmocka_unit_test(test_vectors),         cmocka_unit_test(test_layout),
        cmocka_unit_test(test_accuracy),        cmocka_unit_test(test_position),
        cmocka_unit_test(test_extremes),        cmocka_unit_test(test_products_agree),
        cmocka_unit_test(test_products_empty),  cmocka_unit_test(test_split_operands),
        cmocka_unit_test(test_split_accuracy),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
