/* The core of apt.h: schedules, salience, search, masks, compaction, adapters, distillation on raw arrays. Every function
   against an independent plain version in double, against recorded values (tests/golden/core.safetensors, and all of
   ../shared/golden where that is there), and against its own promises under random input.
   build: cc -std=c11 -O2 tests/test_core.c -o test_core -lcmocka -lpthread -lm     (run from the repository root)
   Also compiles with -DAPT_ONLY_CORE: then only the presets are left out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define APT_IMPLEMENTATION
#include "../apt.h"

/* ---- helpers ------------------------------------------------------------------------------------------------------ */

#define wants(wanted, call)                                                                               \
    do {                                                                                                  \
        const apt_result got_ = (call);                                                                   \
        if (got_ != (wanted)) fail_msg("%s: got %s, wanted %s", #call, apt_result_text(got_), #wanted);   \
    } while (0)

static void near(const char *what, double got, double wanted, double tolerance)
{
    const double error = got > wanted ? got - wanted : wanted - got;
    if (!(error <= tolerance)) fail_msg("%s: got %.10g, wanted %.10g (error %.3g, allowed %.3g)", what, got, wanted, error, tolerance);
}

/* |got - wanted| <= tolerance * max|wanted|; an all-zero tensor must be met exactly. Returns the relative error. */
static double near_all(const char *what, const float *got, const float *wanted, int64_t n, double tolerance)
{
    double size = 0, worst = 0;
    for (int64_t i = 0; i < n; i++) {
        if (fabs((double)wanted[i]) > size) size = fabs((double)wanted[i]);
        const double e = fabs((double)got[i] - (double)wanted[i]);
        if (!(e <= worst)) worst = e;
    }
    if (!(worst <= tolerance * size)) fail_msg("%s: error %.3g, largest value %.3g, allowed ratio %.3g", what, worst, size, tolerance);
    return size > 0 ? worst / size : 0;
}

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Not the NAN macro: compilers with -Ofast may object to it. */
static float not_a_number(void) { return from_bits(0x7fc00000u); }
static float infinite(void) { return from_bits(0x7f800000u); }

static apt_rng g_rng;
static double uniform(void) { return 2 * apt_rng_uniform(&g_rng) - 1; }                     /* -1 .. 1 */
static int32_t below(int32_t n) { return (int32_t)apt_rng_below(&g_rng, (uint32_t)n); }
static void fill(float *x, int64_t n) { for (int64_t i = 0; i < n; i++) x[i] = (float)uniform(); }

static void *memory(int64_t bytes)
{
    void *p = calloc(bytes > 0 ? (size_t)bytes : 1, 1);
    if (p == NULL) fail_msg("no memory for the test itself");
    return p;
}

static float *floats(int64_t n) { return (float *)memory(n * (int64_t)sizeof(float)); }

static int start(void **state)
{
    (void)state;
    g_rng = apt_rng_make(20240721, 7);
    return 0;
}

/* ---- a safetensors file, as far as these tests need it ---- */

typedef struct file { char *text; const char *data; size_t header; } file;
typedef struct tensor { const float *x; int64_t n, rows, cols; char name[160]; } tensor;

static bool file_open(file *f, const char *path)
{
    memset(f, 0, sizeof *f);
    FILE *in = fopen(path, "rb");
    if (in == NULL) return false;
    (void)fseek(in, 0, SEEK_END);
    const long size = ftell(in);
    rewind(in);
    f->text = (char *)memory(size + 1);
    const bool read = size > 8 && fread(f->text, 1, (size_t)size, in) == (size_t)size;
    fclose(in);
    uint64_t header = 0;
    if (read) memcpy(&header, f->text, 8);
    if (!read || header % 4 != 0 || header + 8 > (uint64_t)size) fail_msg("%s is not a safetensors file", path);
    f->header = (size_t)header;
    f->data = f->text + 8 + header;
    return true;
}

/* The first tensor at or after *at (in the header) whose name starts with prefix. */
static bool file_next(const file *f, const char *prefix, size_t *at, tensor *t)
{
    char key[200];
    const char *header = f->text + 8, *end = header + f->header;
    snprintf(key, sizeof key, "\"%s", prefix);
    for (const char *p = header + *at; p + strlen(key) < end; p++) {
        if (memcmp(p, key, strlen(key)) != 0) continue;
        const char *q = strchr(p + 1, '"');
        if (q == NULL || q[1] != ':') continue;                          /* not a key */
        snprintf(t->name, sizeof t->name, "%.*s", (int)(q - p - 1), p + 1);
        const char *shape = strstr(q, "\"shape\":["), *offsets = strstr(q, "\"data_offsets\":[");
        if (shape == NULL || offsets == NULL) return false;
        char *rest;
        t->rows = strtoll(shape + 9, &rest, 10);
        t->cols = *rest == ',' ? strtoll(rest + 1, NULL, 10) : 1;
        const int64_t first = strtoll(offsets + 16, &rest, 10), last = strtoll(rest + 1, NULL, 10);
        t->n = (last - first) / 4;
        t->x = (const float *)(const void *)(f->data + first);
        *at = (size_t)(q - header);
        return true;
    }
    return false;
}

static tensor file_tensor(const file *f, const char *part1, const char *part2)
{
    char name[200];
    tensor t = APT_ZERO;
    size_t at = 0;
    snprintf(name, sizeof name, "%s%s", part1, part2);
    while (file_next(f, name, &at, &t))
        if (strcmp(t.name, name) == 0) return t;
    fail_msg("%s is missing in the recorded values", name);
    return t;
}

static file golden_core(void)
{
    file f;
    if (!file_open(&f, "tests/golden/core.safetensors") && !file_open(&f, "golden/core.safetensors"))
        fail_msg("tests/golden/core.safetensors is missing: run from the repository root");
    return f;
}

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

static void test_rng(void **state)
{
    (void)state;
    apt_rng a = apt_rng_make(1, 2), b = apt_rng_make(1, 2), c = apt_rng_make(1, 3);
    for (int i = 0; i < 10; i++) assert_true(apt_rng_next(&a) == apt_rng_next(&b));
    assert_true(apt_rng_next(&a) != apt_rng_next(&c));
    apt_rng saved = a;                           /* going on from a copy gives the same numbers */
    assert_true(apt_rng_uniform(&a) == apt_rng_uniform(&saved));
    double sum = 0, square = 0, mean = 0;
    int32_t hits[7] = {0};
    const int n = 70000;
    for (int i = 0; i < n; i++) {
        const double u = apt_rng_uniform(&a), z = (double)apt_rng_normal(&a);
        assert_true(u >= 0 && u < 1);
        mean += u / n;
        sum += z / n;
        square += z * z / n;
        const uint32_t k = apt_rng_below(&a, 7);
        assert_true(k < 7);
        hits[k]++;
    }
    near("uniform mean", mean, 0.5, 0.01);
    near("normal mean", sum, 0, 0.02);
    near("normal variance", square, 1, 0.03);
    for (int k = 0; k < 7; k++) near("below", hits[k], n / 7.0, 450);
    assert_int_equal(apt_rng_below(&a, 0), 0);
    assert_int_equal(apt_rng_next(NULL) != 0, 0);
}

/* ---- schedules ---------------------------------------------------------------------------------------------------- */

static float sparsity(const apt_schedule *s, int64_t step)
{
    float value = -1;
    wants(APT_OK, apt_schedule_sparsity(s, step, &value));
    return value;
}

static apt_schedule schedule(int32_t kind, float target, float first, int64_t begin, int64_t end)
{
    apt_schedule s = APT_ZERO;
    s.kind = kind;
    s.target = target;
    s.start = first;
    s.begin = begin;
    s.end = end;
    return s;
}

static void test_schedule_curves(void **state)
{
    (void)state;
    const apt_schedule cubic = schedule(APT_SCHEDULE_CUBIC, 0.6f, 0, 100, 300);
    for (int64_t t = 0; t <= 200; t++) {
        /* The paper prints the density form: d_T + (1 - d_T) (1 - t/T)^3. */
        const double u = 1 - (double)t / 200, density = 0.4 + 0.6 * u * u * u;
        near("cubic", (double)sparsity(&cubic, 100 + t), 1 - density, 1e-6);
        if (t > 0) assert_true(sparsity(&cubic, 100 + t) > sparsity(&cubic, 99 + t));
    }
    const apt_schedule linear = schedule(APT_SCHEDULE_LINEAR, 0.5f, 0, 0, 10);
    for (int64_t t = 0; t <= 10; t++) near("linear", (double)sparsity(&linear, t), 0.05 * (double)t, 1e-7);
    const apt_schedule expo = schedule(APT_SCHEDULE_EXPONENTIAL, 0.8f, 0.05f, 0, 4);
    for (int64_t t = 0; t <= 4; t++) near("exponential", (double)sparsity(&expo, t), 0.05 * pow(16, (double)t / 4), 1e-6);
}

static void test_schedule_edges(void **state)
{
    (void)state;
    const int64_t far = INT64_MAX, past = INT64_MIN;
    for (int32_t kind = APT_SCHEDULE_CUBIC; kind <= APT_SCHEDULE_EXPONENTIAL; kind++) {
        const float first = kind == APT_SCHEDULE_EXPONENTIAL ? 0.1f : 0.0f;
        apt_schedule s = schedule(kind, 0.7f, first, 10, 20);
        assert_true(sparsity(&s, 10) == first && sparsity(&s, 9) == first && sparsity(&s, past) == first);
        assert_true(sparsity(&s, 20) == 0.7f && sparsity(&s, 21) == 0.7f && sparsity(&s, far) == 0.7f);
        s.begin = past;                          /* the window may span every step there is */
        s.end = far;
        assert_true(sparsity(&s, 0) > first && sparsity(&s, 0) < 0.7f);
        s.begin = s.end = 5;                     /* T = 0: all at once */
        assert_true(sparsity(&s, 4) == first && sparsity(&s, 5) == 0.7f && sparsity(&s, 6) == 0.7f);
        s = schedule(kind, 0, 0, 0, 10);         /* target 0 */
        assert_true(sparsity(&s, -1) == 0 && sparsity(&s, 5) == 0 && sparsity(&s, 11) == 0);
        s.start = 0.5f;
        assert_true(sparsity(&s, 5) == 0);
    }
    const apt_schedule least = schedule(APT_SCHEDULE_CUBIC, 0.6f, 0.3f, 0, 100);
    assert_true(sparsity(&least, -5) == 0.3f && sparsity(&least, 1) == 0.3f && sparsity(&least, 90) > 0.59f && sparsity(&least, 100) == 0.6f);
}

static void test_schedule_errors(void **state)
{
    (void)state;
    float out = 0.25f;
    apt_schedule s = schedule(APT_SCHEDULE_EXPONENTIAL, 0.6f, 0, 0, 10);
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));              /* s_0 = 0 */
    s = schedule(4, 0.6f, 0.1f, 0, 10);
    wants(APT_E_ARGUMENT, apt_schedule_sparsity(&s, 5, &out));
    s.kind = -1;
    wants(APT_E_ARGUMENT, apt_schedule_sparsity(&s, 5, &out));
    s = schedule(APT_SCHEDULE_LINEAR, 1.5f, 0, 0, 10);
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s.target = -0.1f;
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s = schedule(APT_SCHEDULE_LINEAR, 0.5f, 0.6f, 0, 10);
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s = schedule(APT_SCHEDULE_LINEAR, 0.5f, 0, 10, 9);
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s = schedule(APT_SCHEDULE_CUBIC, not_a_number(), 0, 0, 10);
    wants(APT_E_NONFINITE, apt_schedule_sparsity(&s, 5, &out));
    s = schedule(APT_SCHEDULE_CUBIC, 0.5f, infinite(), 0, 10);
    wants(APT_E_NONFINITE, apt_schedule_sparsity(&s, 5, &out));
    wants(APT_E_ARGUMENT, apt_schedule_sparsity(NULL, 5, &out));
    wants(APT_E_ARGUMENT, apt_schedule_sparsity(&s, 5, NULL));
    assert_true(out == 0.25f);                   /* untouched by every failure */
}

static void test_schedule_milestones(void **state)
{
    (void)state;
    const int64_t steps[] = {10, 20, 40};
    const float values[] = {0.1f, 0.4f, 0.6f};
    apt_schedule s = schedule(APT_SCHEDULE_MILESTONES, 0.6f, 0, 0, 0);
    s.milestone_step = steps;
    s.milestones = 3;
    assert_true(sparsity(&s, 9) == 0 && sparsity(&s, 40) == 0.6f && sparsity(&s, 1000) == 0.6f);
    near("first equal step", (double)sparsity(&s, 10), 0.2, 1e-7);
    near("second equal step", (double)sparsity(&s, 39), 0.4, 1e-7);
    s.milestone_sparsity = values;
    assert_true(sparsity(&s, -3) == 0 && sparsity(&s, 19) == 0.1f && sparsity(&s, 20) == 0.4f && sparsity(&s, 40) == 0.6f);
    float out;
    const int64_t unsorted[] = {10, 10, 40};
    s.milestone_step = unsorted;
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s.milestone_step = NULL;
    wants(APT_E_ARGUMENT, apt_schedule_sparsity(&s, 5, &out));
    s.milestone_step = steps;
    const float falling[] = {0.4f, 0.1f, 0.6f}, short_of[] = {0.1f, 0.2f, 0.5f}, broken[] = {0.1f, not_a_number(), 0.6f};
    s.milestone_sparsity = falling;
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s.milestone_sparsity = short_of;
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
    s.milestone_sparsity = broken;
    wants(APT_E_NONFINITE, apt_schedule_sparsity(&s, 5, &out));
    s.milestones = 0;
    wants(APT_E_RANGE, apt_schedule_sparsity(&s, 5, &out));
}

static void test_schedule_layers_and_due(void **state)
{
    (void)state;
    const apt_schedule s = schedule(APT_SCHEDULE_CUBIC, 0.6f, 0.2f, 100, 200);
    const float target[3] = {0.6f, 0, 0.1f};
    float out[3];
    wants(APT_OK, apt_schedule_layers(&s, target, 150, out, 3));
    assert_true(out[0] == sparsity(&s, 150) && out[1] == 0 && out[2] == 0.1f);
    const float bad[3] = {0.6f, 2, 0};
    out[0] = -1;
    wants(APT_E_RANGE, apt_schedule_layers(&s, bad, 150, out, 3));
    assert_true(out[0] == -1);
    wants(APT_E_ARGUMENT, apt_schedule_layers(&s, NULL, 150, out, 3));
    int32_t due, count = 0;
    for (int64_t t = 0; t < 300; t++) {
        wants(APT_OK, apt_schedule_due(&s, 30, t, &due));
        if (due != (t == 100 || t == 130 || t == 160 || t == 190 || t == 200)) fail_msg("due at %d", (int)t);
        count += due;
    }
    assert_int_equal(count, 5);
    wants(APT_E_RANGE, apt_schedule_due(&s, 0, 5, &due));
    const int64_t steps[] = {3, 9};
    apt_schedule m = schedule(APT_SCHEDULE_MILESTONES, 0.6f, 0, 0, 0);
    m.milestone_step = steps;
    m.milestones = 2;
    for (int64_t t = 0; t < 12; t++) {
        wants(APT_OK, apt_schedule_due(&m, 1, t, &due));
        assert_int_equal(due, t == 3 || t == 9);
    }
}

static void test_schedule_names(void **state)
{
    (void)state;
    int32_t kind = -7;
    char text[200], tiny[9];
    for (int32_t k = 0; k < 4; k++) {
        assert_non_null(apt_schedule_kind_name(k));
        wants(APT_OK, apt_schedule_kind_from_name(apt_schedule_kind_name(k), &kind, text, sizeof text));
        assert_int_equal(kind, k);
        assert_string_equal(text, "");
    }
    assert_null(apt_schedule_kind_name(4));
    assert_null(apt_schedule_kind_name(-1));
    kind = -7;
    wants(APT_E_ARGUMENT, apt_schedule_kind_from_name("quartic", &kind, text, sizeof text));
    assert_non_null(strstr(text, "quartic"));
    for (int32_t k = 0; k < 4; k++) assert_non_null(strstr(text, apt_schedule_kind_name(k)));
    assert_int_equal(kind, -7);
    memset(tiny, 'x', sizeof tiny);
    wants(APT_E_ARGUMENT, apt_schedule_kind_from_name("quartic", &kind, tiny, 8));
    assert_true(strlen(tiny) == 7 && tiny[8] == 'x');
    wants(APT_E_ARGUMENT, apt_schedule_kind_from_name("quartic", &kind, NULL, 100));
    wants(APT_E_ARGUMENT, apt_schedule_kind_from_name(NULL, &kind, text, sizeof text));
    wants(APT_E_ARGUMENT, apt_schedule_kind_from_name("Cubic", &kind, text, 0));
}

/* ---- salience ----------------------------------------------------------------------------------------------------- */

static void test_sums(void **state)
{
    (void)state;
    enum { ROWS = 9, N = 21, LD = 24 };
    float x[ROWS * LD], whole[N] = {0}, halves[N] = {0}, wanted[N], sums[N] = {0};
    fill(x, ROWS * LD);
    for (int f = 0; f < N; f++) {
        double sum = 0;
        for (int r = 0; r < ROWS; r++) sum += fabs((double)x[r * LD + f]);
        wanted[f] = (float)sum;
    }
    wants(APT_OK, apt_abs_sum(whole, x, LD, ROWS, N));
    wants(APT_OK, apt_abs_sum(halves, x, LD, 4, N));
    wants(APT_OK, apt_abs_sum(halves, x + 4 * LD, LD, ROWS - 4, N));
    near_all("abs sum", whole, wanted, N, 1e-6);
    near_all("abs sum of two halves", halves, wanted, N, 1e-6);
    for (int f = 0; f < N; f++) {
        double sum = 0;
        for (int r = 0; r < ROWS; r++) sum += (double)x[r * LD + f];
        wanted[f] = (float)sum;
    }
    wants(APT_OK, apt_value_sum(sums, x, LD, ROWS, N));
    near_all("sum", sums, wanted, N, 1e-6);
    wants(APT_E_SHAPE, apt_abs_sum(whole, x, N - 1, ROWS, N));
    wants(APT_E_ARGUMENT, apt_abs_sum(whole, x, LD, -1, N));
    wants(APT_E_ARGUMENT, apt_abs_sum(NULL, x, LD, ROWS, N));
    wants(APT_E_ARGUMENT, apt_value_sum(whole, NULL, LD, ROWS, N));
    wants(APT_E_SHAPE, apt_abs_sum(whole, x, INT64_MAX / 2, ROWS, N));   /* rows * ld overflows */
    wants(APT_OK, apt_abs_sum(NULL, NULL, 0, 0, 0));
}

static void test_salience_finish(void **state)
{
    (void)state;
    const float act[6] = {1, 2, 3, 4, 5, 6}, grad[6] = {6, 5, 4, 3, 2, 1};
    float sal[3] = {-1, -1, -1};
    wants(APT_OK, apt_salience_finish(sal, act, grad, 3, 2));
    assert_true(sal[0] == 16 && sal[1] == 24 && sal[2] == 16);
    wants(APT_OK, apt_salience_finish(sal, act, grad, 1, 6));
    assert_true(sal[0] == 56);
    /* A unit whose activations are masked to 0 gets 0. */
    const float none[2] = {0, 0};
    wants(APT_OK, apt_salience_finish(sal, none, grad, 1, 2));
    assert_true(sal[0] == 0);
    float bad[6] = {1, 2, 3, not_a_number(), 5, 6};
    sal[0] = -1;
    wants(APT_E_NONFINITE, apt_salience_finish(sal, bad, grad, 3, 2));
    wants(APT_E_NONFINITE, apt_salience_finish(sal, act, bad, 3, 2));
    bad[3] = infinite();
    wants(APT_E_NONFINITE, apt_salience_finish(sal, bad, grad, 3, 2));
    const float huge[2] = {3e38f, 3e38f};        /* finite, but the product is not */
    wants(APT_E_NONFINITE, apt_salience_finish(sal, huge, huge, 1, 2));
    assert_true(sal[0] == -1);
    wants(APT_E_ARGUMENT, apt_salience_finish(NULL, act, grad, 3, 2));
    wants(APT_E_ARGUMENT, apt_salience_finish(sal, act, grad, -3, 2));
    wants(APT_E_ARGUMENT, apt_salience_finish(sal, act, grad, INT64_MAX, 2));
    wants(APT_OK, apt_salience_finish(NULL, NULL, NULL, 0, 5));
}

static void test_weight_salience(void **state)
{
    (void)state;
    enum { ROWS = 6, COLS = 8, LD = 10 };
    float w[ROWS * LD], g[ROWS * LD];
    fill(w, ROWS * LD);
    fill(g, ROWS * LD);
    for (int by_rows = 0; by_rows < 2; by_rows++) {
        float sal[4] = {1, 1, 1, 1}, wanted[4];
        const int width = 2, units = by_rows ? ROWS / width : COLS / width;
        for (int u = 0; u < units; u++) {
            double sum = 0;
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLS; c++)
                    if ((by_rows ? r : c) / width == u) sum += (double)w[r * LD + c] * (double)g[r * LD + c];
            wanted[u] = (float)(1 + 2 * fabs(sum));
        }
        wants(APT_OK, apt_weight_salience(sal, w, g, LD, ROWS, COLS, width, by_rows, 2));
        near_all("weight salience", sal, wanted, units, 1e-6);
    }
    float sal[8] = {0};
    wants(APT_E_SHAPE, apt_weight_salience(sal, w, g, LD, ROWS, COLS, 3, 0, 1));
    wants(APT_E_RANGE, apt_weight_salience(sal, w, g, LD, ROWS, COLS, 0, 0, 1));
    w[13] = not_a_number();
    wants(APT_E_NONFINITE, apt_weight_salience(sal, w, g, LD, ROWS, COLS, 2, 0, 1));
}

/* Two passes in double over one unit, as method.md words it. */
static double plain_kurtosis(const float *mean, const float *w, int64_t ld, int64_t rows, int64_t first, int64_t width)
{
    double sum = 0, m2 = 0, m4 = 0;
    const double n = (double)(rows * width);
    for (int pass = 0; pass < 2; pass++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = first; i < first + width; i++) {
                const double o = (double)w[r * ld + i] * (mean != NULL ? (double)mean[i] : 1), d = o - sum / n;
                if (pass == 0) sum += o;
                else m2 += d * d, m4 += d * d * d * d;
            }
    const double variance = m2 / (n - 1);
    return variance > 0 ? m4 / n / (variance * variance) - 3 : 0;
}

static void test_kurtosis(void **state)
{
    (void)state;
    for (int trial = 0; trial < 60; trial++) {
        const int64_t rows = trial % 7 == 0 ? 100 + below(300) : 2 + below(40), width = trial % 3 == 0 ? 1 : 1 + below(trial % 3 == 1 ? 40 : 150);
        const int64_t units = 1 + below(40), cols = units * width, ld = cols + below(3);
        float *w = floats(rows * ld), *mean = floats(cols), *got = floats(units), *joined = floats(units);
        for (int64_t i = 0; i < rows * ld; i++) {
            const double u = uniform();
            w[i] = (float)(trial % 4 == 0 ? 1000 + 0.01 * u : trial % 4 == 1 ? u * u * u * u * u * 5 : trial % 4 == 2 ? 1e-20 * u : u);
        }
        fill(mean, cols);
        const float *act = trial % 5 == 0 ? NULL : mean;
        wants(APT_OK, apt_unit_kurtosis(got, act, w, ld, rows, units, width));
        for (int64_t u = 0; u < units; u++) {
            const double wanted = plain_kurtosis(act, w, ld, rows, u * width, width);
            near("kurtosis", (double)got[u], wanted, 1e-5 * (1 + fabs(wanted)));
        }
        /* Moments joined from three parts of the rows are those of the whole. */
        apt_moments *m = (apt_moments *)memory(units * (int64_t)sizeof(apt_moments));
        const int64_t cut1 = rows / 3, cut2 = cut1 + (rows - cut1) / 2;
        wants(APT_OK, apt_unit_moments(m, act, w, ld, cut1, units, width));
        wants(APT_OK, apt_unit_moments(m, act, w + cut1 * ld, ld, cut2 - cut1, units, width));
        wants(APT_OK, apt_unit_moments(m, act, w + cut2 * ld, ld, rows - cut2, units, width));
        wants(APT_OK, apt_moments_kurtosis(joined, m, units));
        for (int64_t u = 0; u < units; u++) near("joined kurtosis", (double)joined[u], (double)got[u], 1e-4 * (1 + fabs((double)got[u])));
        /* A common factor of the activations cancels. */
        for (int64_t i = 0; i < cols; i++) mean[i] *= -8;
        wants(APT_OK, apt_unit_kurtosis(joined, mean, w, ld, rows, units, width));
        if (act != NULL) near_all("kurtosis without factor", joined, got, units, 1e-6);
        free(w), free(mean), free(got), free(joined), free(m);
    }
}

static void test_kurtosis_edges(void **state)
{
    (void)state;
    enum { ROWS = 300, N = 20 };
    float w[ROWS * N], mean[N], out[N];
    for (int i = 0; i < ROWS * N; i++) w[i] = 0.1f;
    for (int i = 0; i < N; i++) mean[i] = 1.0f / 3;
    wants(APT_OK, apt_unit_kurtosis(out, mean, w, N, ROWS, N, 1));
    for (int i = 0; i < N; i++) assert_true(out[i] == 0);                /* constant input: exactly */
    wants(APT_OK, apt_unit_kurtosis(out, mean, w, N, ROWS, 4, 5));
    assert_true(out[0] == 0 && out[3] == 0);
    fill(w, ROWS * N);
    memset(mean, 0, sizeof mean);
    wants(APT_OK, apt_unit_kurtosis(out, mean, w, N, ROWS, N, 1));
    for (int i = 0; i < N; i++) assert_true(out[i] == 0);                /* units that never fire */
    /* n values, half +1 and half -1: m4 = 1, variance = n/(n-1). */
    for (int i = 0; i < ROWS; i++) w[i] = i % 2 ? 1.0f : -1.0f;
    wants(APT_OK, apt_unit_kurtosis(out, NULL, w, 1, ROWS, 1, 1));
    near("two values", (double)out[0], pow((ROWS - 1.0) / ROWS, 2) - 3, 1e-6);
    wants(APT_OK, apt_unit_kurtosis(out, NULL, w, 1, 1, 1, 1));          /* one value */
    assert_true(out[0] == 0);
    out[0] = 7;
    wants(APT_OK, apt_unit_kurtosis(out, NULL, w, 1, 0, 1, 1));          /* none */
    assert_true(out[0] == 0);
    out[0] = 7;
    w[17] = not_a_number();
    wants(APT_E_NONFINITE, apt_unit_kurtosis(out, NULL, w, 1, ROWS, 1, 1));
    w[17] = 1;
    mean[3] = infinite();
    wants(APT_E_NONFINITE, apt_unit_kurtosis(out, mean, w, N, ROWS, N, 1));
    wants(APT_E_SHAPE, apt_unit_kurtosis(out, NULL, w, N - 1, ROWS, N, 1));
    wants(APT_E_ARGUMENT, apt_unit_kurtosis(out, NULL, NULL, N, ROWS, N, 1));
    wants(APT_E_ARGUMENT, apt_unit_kurtosis(NULL, NULL, w, N, ROWS, N, 1));
    wants(APT_E_ARGUMENT, apt_unit_kurtosis(out, NULL, w, N, ROWS, N, 0));
    assert_true(out[0] == 7);
    for (int i = 0; i < ROWS; i++) w[i] = (i % 2 ? 3e38f : -3e38f);      /* at the ends of float: a number or an error */
    const apt_result r = apt_unit_kurtosis(out, w, w, 1, ROWS, 1, 1);
    assert_true(r == APT_E_NONFINITE || (r == APT_OK && out[0] < 100));
}

static void test_combine(void **state)
{
    (void)state;
    const float kurtosis[5] = {4, -2, 16, 9, 1};
    float sal[5] = {1, 2, 3, 4, 50};
    wants(APT_OK, apt_salience_outlier(sal, kurtosis, 5));
    const float raw[5] = {3, 2, 7, 7, 51};
    near_all("outlier term", sal, raw, 5, 0);
    /* Kinds 0: units 0, 1; 1: units 2, 3, and 4, which is dead. */
    const int32_t kind[5] = {0, 0, 1, 1, 1};
    const uint8_t alive[5] = {1, 1, 1, 1, 0};
    const float s0[5] = {1, 2, 3, 4, 50};
    memcpy(sal, s0, sizeof sal);
    wants(APT_OK, apt_salience_normalise(sal, kind, alive, 5, 2));
    const float n[5] = {1 / 1.5f, 2 / 1.5f, 3 / 3.5f, 4 / 3.5f, 0};
    near_all("normalise", sal, n, 5, 1e-7);
    /* mean S = 1.5, 3.5; K = 2 0 4 3, mean 1, 3.5. */
    const float normalised[5] = {1 / 1.5f + 2, 2 / 1.5f, 3 / 3.5f + 4 / 3.5f, 4 / 3.5f + 3 / 3.5f, 0};
    const float scaled[5] = {1 + 2 * 1.5f, 2, 3 + 4, 4 + 3, 0};
    memcpy(sal, s0, sizeof sal);
    wants(APT_OK, apt_salience_combine(sal, kurtosis, kind, alive, 5, 2, APT_SALIENCE_NORMALISED));
    near_all("normalised", sal, normalised, 5, 1e-6);
    memcpy(sal, s0, sizeof sal);
    wants(APT_OK, apt_salience_combine(sal, kurtosis, kind, alive, 5, 2, APT_SALIENCE_SCALED));
    near_all("scaled", sal, scaled, 5, 1e-6);
    memcpy(sal, s0, sizeof sal);
    wants(APT_OK, apt_salience_combine(sal, kurtosis, NULL, NULL, 5, 1, APT_SALIENCE_RAW));
    near_all("raw", sal, raw, 5, 0);
    memcpy(sal, s0, sizeof sal);
    wants(APT_OK, apt_salience_combine(sal, NULL, NULL, NULL, 5, 1, APT_SALIENCE_SCALED));
    near_all("no outlier term", sal, s0, 5, 0);
    wants(APT_OK, apt_salience_combine(sal, kurtosis, NULL, NULL, 5, 1, APT_SALIENCE_DEFAULT));
    /* A kind whose mean is 0 is left alone instead of dividing by 0. */
    float zero[3] = {0, 0, 0};
    const float low[3] = {-1, -1, -1};
    wants(APT_OK, apt_salience_combine(zero, low, NULL, NULL, 3, 1, APT_SALIENCE_NORMALISED));
    assert_true(zero[0] == 0 && zero[2] == 0);
    /* Errors change nothing. */
    memcpy(sal, s0, sizeof sal);
    const int32_t bad_kind[5] = {0, 0, 1, 2, 1};
    const float bad[5] = {4, not_a_number(), 16, 9, 1};
    wants(APT_E_RANGE, apt_salience_combine(sal, kurtosis, bad_kind, alive, 5, 2, APT_SALIENCE_RAW));
    wants(APT_E_NONFINITE, apt_salience_combine(sal, bad, kind, alive, 5, 2, APT_SALIENCE_RAW));
    wants(APT_E_NONFINITE, apt_salience_outlier(sal, bad, 5));
    wants(APT_E_ARGUMENT, apt_salience_combine(sal, kurtosis, kind, alive, 5, 2, 9));
    wants(APT_E_RANGE, apt_salience_normalise(sal, kind, alive, 5, 65));
    near_all("untouched", sal, s0, 5, 0);
    sal[1] = -1;
    wants(APT_E_RANGE, apt_salience_normalise(sal, kind, alive, 5, 2));
}

static void test_ema(void **state)
{
    (void)state;
    float avg[3] = {0, 0, 0};
    const float sal[3] = {1, 2, 4}, bad[3] = {1, not_a_number(), 4};
    for (int i = 1; i <= 5; i++) {
        wants(APT_OK, apt_salience_ema(avg, sal, 3, 0.9f));
        for (int u = 0; u < 3; u++) near("ema", (double)avg[u], (double)sal[u] * (1 - pow(0.9, i)), 1e-6);
    }
    wants(APT_OK, apt_salience_ema(avg, sal, 3, 0));
    near_all("beta 0", avg, sal, 3, 0);
    wants(APT_E_NONFINITE, apt_salience_ema(avg, bad, 3, 0.9f));
    wants(APT_E_RANGE, apt_salience_ema(avg, sal, 3, 1));
    wants(APT_E_RANGE, apt_salience_ema(avg, sal, 3, -0.5f));
    near_all("untouched", avg, sal, 3, 0);
}

/* ---- recorded values ---------------------------------------------------------------------------------------------- */

/* Per feature and per head from recorded sums; kurtosis from weights and signed mean activations. */
static void check_projection(const file *sums, const char *prefix, const char *suffix, const char *name, tensor weight, const float *mean, double worst[4])
{
    char key[240];
    tensor t[6];
    const char *kind[6] = {"sum_abs_act", "sum_abs_grad", "salience_per_feature", "kurtosis_per_feature", "salience_per_head", "kurtosis_per_head"};
    for (int k = 0; k < (mean != NULL ? 6 : 4); k++) {
        snprintf(key, sizeof key, "%s%s%s%s", prefix, suffix[0] ? name : kind[k], suffix[0] ? suffix : ".", suffix[0] ? kind[k] : name);
        t[k] = file_tensor(sums, key, "");
    }
    const int64_t n = t[0].n;
    float *out = floats(n);
    double e;
    wants(APT_OK, apt_salience_finish(out, t[0].x, t[1].x, n, 1));
    if ((e = near_all("salience per feature", out, t[2].x, n, 1e-6)) > worst[0]) worst[0] = e;
    wants(APT_OK, apt_unit_kurtosis(out, t[0].x, weight.x, weight.cols, weight.rows, n, 1));
    for (int64_t i = 0; i < n; i++) {            /* recorded as 0/(0 + tiny) - 3 where a neuron never fires; defined as 0 */
        if (t[0].x[i] > 0) continue;
        assert_true(out[i] == 0 && t[3].x[i] == -3);
        out[i] = -3;
    }
    if ((e = near_all("kurtosis per feature", out, t[3].x, n, 1e-6)) > worst[1]) worst[1] = e;
    if (mean == NULL) {
        free(out);
        return;
    }
    const int64_t heads = t[4].n, width = n / heads;
    wants(APT_OK, apt_salience_finish(out, t[0].x, t[1].x, heads, width));
    if ((e = near_all("salience per head", out, t[4].x, heads, 1e-6)) > worst[2]) worst[2] = e;
    wants(APT_OK, apt_unit_kurtosis(out, mean, weight.x, weight.cols, weight.rows, heads, width));
    if ((e = near_all("kurtosis per head", out, t[5].x, heads, 1e-5)) > worst[3]) worst[3] = e;
    free(out);
}

static double check_importance(const file *f, const char *prefix, const char *name)
{
    char key[3][240];
    const char *kind[3] = {"lora_B.", "grad.lora_B.", "adapter_importance."};
    for (int k = 0; k < 3; k++) snprintf(key[k], sizeof key[k], "%s%s%s", prefix, kind[k], name);
    const tensor b = file_tensor(f, key[0], ""), g = file_tensor(f, key[1], ""), wanted = file_tensor(f, key[2], "");
    float a = 0, got, *copy = floats(b.n);
    memcpy(copy, b.x, (size_t)b.n * sizeof(float));
    apt_adapter t = APT_ZERO;
    t.a = &a;
    t.b = copy;
    t.rank = (int32_t)b.cols;
    t.out = (int32_t)b.rows;
    t.scale = 2;
    wants(APT_OK, apt_adapter_importance(&t, g.x, &got));
    free(copy);
    return near_all("adapter importance", &got, wanted.x, 1, 1e-5);
}

static void test_golden_recorded(void **state)
{
    (void)state;
    const file f = golden_core();
    double worst[4] = {0, 0, 0, 0};
    const char *heads[] = {"bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.2.attention.output.dense"};
    for (int i = 0; i < 2; i++) {
        char name[200];
        snprintf(name, sizeof name, "bert.%s", heads[i]);
        const tensor mean = file_tensor(&f, "mean_act.", name), w = file_tensor(&f, name, ".weight");
        check_projection(&f, "", ".", name, w, mean.x, worst);
    }
    check_projection(&f, "", ".", "bert.bert.encoder.layer.0.output.dense", file_tensor(&f, "bert.bert.encoder.layer.0.output.dense", ".weight"), NULL, worst);
    const char *relu = "t5-relu-tied.decoder.block.0.layer.2.DenseReluDense.wo";     /* some of these neurons never fire */
    check_projection(&f, "", ".", relu, file_tensor(&f, relu, ".weight"), NULL, worst);
    (void)check_importance(&f, "bert.", "bert.encoder.layer.1.attention.self.value");
    free(f.text);
    print_message("    relative error: salience %.1e, kurtosis %.1e, salience per head %.1e, kurtosis per head %.1e\n", worst[0], worst[1], worst[2], worst[3]);
}

static void test_golden_shared(void **state)
{
    (void)state;
    const char *cases[] = {"bert", "roberta", "roberta-qa", "roberta-regression", "llama", "llama-gqa-tied", "t5-relu-tied", "t5-gated-untied"};
    const char *root = getenv("APT_SHARED") != NULL ? getenv("APT_SHARED") : "../shared";
    const file core = golden_core();
    double worst[4] = {0, 0, 0, 0}, importance = 0;
    int projections = 0;
    for (int c = 0; c < 8; c++) {
        char path[1024], weights[1024], name[200];
        file gold, model;
        snprintf(path, sizeof path, "%s/golden/%s/golden.safetensors", root, cases[c]);
        snprintf(weights, sizeof weights, "%s/golden/%s/model.safetensors", root, cases[c]);
        if (!file_open(&gold, path) || !file_open(&model, weights)) {
            fprintf(stderr, "    skip: %s is missing\n", path);
            skip();
        }
        tensor t = APT_ZERO;
        for (size_t at = 0; file_next(&gold, "sum_abs_act.", &at, &t); projections++) {
            const char *module = t.name + strlen("sum_abs_act.");
            char head[240];
            size_t from = 0;
            tensor probe, mean = APT_ZERO;
            snprintf(head, sizeof head, "kurtosis_per_head.%s", module);
            snprintf(name, sizeof name, "%s.%s", cases[c], module);
            if (file_next(&gold, head, &from, &probe)) mean = file_tensor(&core, "mean_act.", name);
            check_projection(&gold, "", "", module, file_tensor(&model, module, ".weight"), mean.x, worst);
        }
        for (size_t at = 0; file_next(&gold, "adapter_importance.", &at, &t);) {
            const double e = check_importance(&gold, "", t.name + strlen("adapter_importance."));
            if (e > importance) importance = e;
        }
        free(gold.text), free(model.text);
    }
    free(core.text);
    assert_true(projections >= 30);
    print_message("    %d projections, relative error: salience %.1e, kurtosis %.1e, salience per head %.1e, kurtosis per head %.1e; adapter importance %.1e\n",
                  projections, worst[0], worst[1], worst[2], worst[3], importance);
}

/* ---- search ------------------------------------------------------------------------------------------------------- */

typedef struct instance {
    apt_search s;
    apt_transformer shape;
    float *salience;
    int32_t *group, *least, *round_to;
    uint8_t *alive, *keep;
    int32_t *kept;
    void *scratch;
    size_t bytes;
} instance;

static void instance_free(instance *i)
{
    free(i->salience), free(i->group), free(i->least), free(i->round_to), free(i->alive), free(i->keep), free(i->kept), free(i->scratch);
}

/* A transformer with heads[l], cross[l], neurons[l] drawn up to the given sizes; levels: how many distinct saliences (0: many). */
static instance instance_make(int32_t layers, int32_t heads, int32_t neurons, int32_t hidden, int32_t levels)
{
    instance i = APT_ZERO;
    i.shape.layers = layers;
    i.shape.cross_layers = below(layers + 1);
    i.shape.head_dim = 1 + below(4);
    i.shape.query_heads = below(3);
    i.shape.gated = below(2);
    const int32_t groups = apt_transformer_groups(&i.shape);
    i.least = (int32_t *)memory(groups * 4), i.round_to = (int32_t *)memory(groups * 4), i.kept = (int32_t *)memory(groups * 4);
    apt_limits limits = APT_ZERO;
    limits.whole = below(2);
    limits.min_hidden = below(hidden + 1);
    limits.round_heads = below(4);
    limits.round_neurons = below(6);
    limits.round_hidden = below(4);
    wants(APT_OK, apt_transformer_limits(i.least, i.round_to, &i.shape, &limits));
    const int32_t most = groups * (heads > neurons ? heads : neurons) + hidden;
    i.group = (int32_t *)memory(most * 4);
    int32_t n = 0;
    for (int32_t g = 0; g < groups; g++) {
        bool ffn = false;
        for (int32_t l = 0; l < layers; l++) ffn = ffn || apt_transformer_group(&i.shape, l, APT_GROUP_NEURONS) == g;
        const int32_t count = g == groups - 1 ? 1 + below(hidden) : ffn ? 1 + below(neurons) : 1 + below(heads);
        for (int32_t k = 0; k < count; k++) i.group[n++] = g;
    }
    for (int32_t k = n - 1; k > 0; k--) {        /* groups need not be contiguous */
        const int32_t j = below(k + 1), t = i.group[k];
        i.group[k] = i.group[j];
        i.group[j] = t;
    }
    i.salience = floats(n);
    i.alive = (uint8_t *)memory(n), i.keep = (uint8_t *)memory(n);
    for (int32_t u = 0; u < n; u++) {
        i.salience[u] = levels > 0 ? (float)below(levels) : (float)(uniform() * uniform());
        i.alive[u] = below(8) != 0;
        if (!i.alive[u]) i.salience[u] = not_a_number();                 /* nobody may look at it */
    }
    i.s.units = n;
    i.s.groups = groups;
    i.s.salience = i.salience, i.s.group = i.group, i.s.alive = i.alive, i.s.least = i.least, i.s.round_to = i.round_to;
    i.s.cost = apt_transformer_cost;
    i.bytes = (size_t)apt_mask_search_scratch(n, groups);
    i.scratch = memory((int64_t)i.bytes + 64);
    return i;
}

/* &i->shape as the cost's user: set anew whenever an instance has been copied. */
static apt_result search(instance *i, double budget, apt_search_result *result)
{
    i->s.user = &i->shape;
    i->s.budget = budget;
    return apt_mask_search(&i->s, i->scratch, i->bytes, i->keep, i->kept, result);
}

/* The definition, spelled out: try every prefix from the longest down. Returns reached. */
static bool plain_search(const instance *i, double budget, uint8_t *keep)
{
    const apt_search *s = &i->s;
    int32_t *alive = (int32_t *)memory(s->groups * 4), *kept = (int32_t *)memory(s->groups * 4), *order = (int32_t *)memory(s->units * 4);
    double *price = (double *)memory(s->groups * 8);
    int32_t n = 0;
    for (int32_t u = 0; u < s->units; u++)
        if (s->alive[u]) order[n++] = u, alive[s->group[u]]++;
    for (int32_t g = 0; g < s->groups; g++) {
        if (alive[g] == 0) continue;
        const double all = s->cost(alive, s->groups, s->user);
        alive[g]--;
        price[g] = all - s->cost(alive, s->groups, s->user);
        alive[g]++;
    }
    for (int32_t a = 0; a < n; a++)              /* selection sort: the best of what is left, the lower index of equals */
        for (int32_t b = a + 1; b < n; b++) {
            const double pa = price[s->group[order[a]]], pb = price[s->group[order[b]]];
            const double da = pa > 0 ? (double)s->salience[order[a]] / pa : 1e300, db = pb > 0 ? (double)s->salience[order[b]] / pb : 1e300;
            if (db > da || (db == da && order[b] < order[a])) {
                const int32_t t = order[a];
                order[a] = order[b];
                order[b] = t;
            }
        }
    bool fits = false;
    for (int32_t p = n; p >= 0 && !fits; p--) {
        memset(kept, 0, (size_t)s->groups * 4);
        for (int32_t k = 0; k < p; k++) kept[s->group[order[k]]]++;
        for (int32_t g = 0; g < s->groups; g++) {
            const int32_t r = s->round_to[g], whole = kept[g] == alive[g] && kept[g] < r;
            if (!whole) kept[g] -= kept[g] % r;
            int32_t least = s->least[g];
            while (least % r != 0) least++;
            if (least > alive[g]) least = alive[g];
            if (kept[g] < least) kept[g] = least;
        }
        fits = s->cost(kept, s->groups, s->user) <= budget;
    }
    memset(keep, 0, (size_t)s->units);
    for (int32_t k = 0; k < n; k++)
        if (kept[s->group[order[k]]] > 0) kept[s->group[order[k]]]--, keep[order[k]] = 1;
    free(alive), free(kept), free(order), free(price);
    return fits;
}

/* What every answer must satisfy. */
static void check_answer(const instance *i, const apt_search_result *r)
{
    const apt_search *s = &i->s;
    int32_t *kept = (int32_t *)memory(s->groups * 4), *alive = (int32_t *)memory(s->groups * 4), total = 0;
    for (int32_t u = 0; u < s->units; u++) {
        assert_true(i->keep[u] <= 1 && (s->alive[u] || !i->keep[u]));
        kept[s->group[u]] += i->keep[u];
        alive[s->group[u]] += s->alive[u];
        total += i->keep[u];
    }
    for (int32_t g = 0; g < s->groups; g++) {
        assert_int_equal(kept[g], i->kept[g]);
        assert_true(kept[g] >= (s->least[g] < alive[g] ? s->least[g] : alive[g]));
        if (kept[g] % s->round_to[g] != 0) assert_true(kept[g] == alive[g]);      /* too few for a multiple */
    }
    assert_int_equal(total, r->kept);
    near("cost", r->cost, s->cost(kept, s->groups, s->user), 0);
    near("cost before", r->cost_before, s->cost(alive, s->groups, s->user), 0);
    assert_true(r->reached == (r->cost <= s->budget));
    free(kept), free(alive);
}

static void test_search_against_plain(void **state)
{
    (void)state;
    int reached = 0, failed = 0;
    for (int trial = 0; trial < 400; trial++) {
        instance i = instance_make(1 + below(3), 5, 9, 9, trial % 3);
        uint8_t *wanted = (uint8_t *)memory(i.s.units), *before = (uint8_t *)memory(i.s.units);
        double full = 0;
        apt_search_result r;
        wants(APT_OK, search(&i, 1e30, &r));
        full = r.cost_before;
        memset(before, 0, (size_t)i.s.units);
        for (int k = 0; k <= 10; k++) {          /* rising budget */
            wants(APT_OK, search(&i, full * k / 10, &r));
            check_answer(&i, &r);
            const bool fits = plain_search(&i, full * k / 10, wanted);
            assert_int_equal(fits, r.reached);
            assert_memory_equal(wanted, i.keep, (size_t)i.s.units);
            for (int32_t u = 0; u < i.s.units; u++) assert_true(i.keep[u] >= before[u]);   /* monotone */
            memcpy(before, i.keep, (size_t)i.s.units);
            reached += r.reached;
            failed += !r.reached;
        }
        free(wanted), free(before);
        instance_free(&i);
    }
    assert_true(reached > 1000 && failed > 100); /* both kinds of answer were seen */
}

static void test_search_stress(void **state)
{
    (void)state;
    for (int trial = 0; trial < 30; trial++) {
        instance i = instance_make(1 + below(12), 16, 700, 200, trial % 2 ? 4 : 0);
        apt_search_result r;
        wants(APT_OK, search(&i, 1e30, &r));
        const double budget = r.cost_before * apt_rng_uniform(&g_rng);
        wants(APT_OK, search(&i, budget, &r));
        check_answer(&i, &r);
        uint8_t *first = (uint8_t *)memory(i.s.units);
        memcpy(first, i.keep, (size_t)i.s.units);
        memset(i.scratch, 0xa5, i.bytes);
        wants(APT_OK, search(&i, budget, NULL));                         /* what scratch held does not matter */
        assert_memory_equal(first, i.keep, (size_t)i.s.units);
        free(first);
        instance_free(&i);
    }
}

/* Renumbering units with distinct saliences renumbers the answer; equal ones stay in the order of their index. */
static void test_search_permutation(void **state)
{
    (void)state;
    for (int trial = 0; trial < 40; trial++) {
        instance i = instance_make(2, 6, 20, 12, 0);
        apt_search_result r;
        for (int32_t u = 0; u < i.s.units; u++)  /* without hidden dimensions all prices are 0, and so all equal */
            if (i.group[u] == i.s.groups - 1 && !i.alive[u]) i.alive[u] = 1, i.salience[u] = (float)uniform();
        wants(APT_OK, search(&i, 1e30, &r));
        const double budget = r.cost_before * (0.3 + 0.6 * apt_rng_uniform(&g_rng));
        wants(APT_OK, search(&i, budget, &r));
        const int32_t n = i.s.units;
        int32_t *to = (int32_t *)memory(n * 4), *group = (int32_t *)memory(n * 4);
        float *salience = floats(n);
        uint8_t *alive = (uint8_t *)memory(n), *keep = (uint8_t *)memory(n);
        for (int32_t u = 0; u < n; u++) to[u] = u;
        for (int32_t u = n - 1; u > 0; u--) {
            const int32_t j = below(u + 1), t = to[u];
            to[u] = to[j];
            to[j] = t;
        }
        for (int32_t u = 0; u < n; u++) group[to[u]] = i.group[u], salience[to[u]] = i.salience[u], alive[to[u]] = i.alive[u];
        apt_search s = i.s;
        s.group = group, s.salience = salience, s.alive = alive;
        wants(APT_OK, apt_mask_search(&s, i.scratch, i.bytes, keep, NULL, NULL));
        for (int32_t u = 0; u < n; u++) assert_int_equal(keep[to[u]], i.keep[u]);
        free(to), free(group), free(salience), free(alive), free(keep);
        instance_free(&i);
    }
    apt_transformer shape = APT_ZERO;            /* all equal: exactly the first ones stay */
    shape.layers = 1;
    shape.head_dim = 1;
    const int32_t group[12] = {0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2};
    const float same[12] = {1, 1, 1, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 1};
    uint8_t keep[12];
    char scratch[512];
    apt_search s = APT_ZERO;
    s.units = 12;
    s.groups = 3;
    s.salience = same;
    s.group = group;
    s.cost = apt_transformer_cost;
    s.user = &shape;
    s.budget = 3 * 4 + 5 * 2;                    /* heads 4 each, neurons 2 each: densities are all 1/4 */
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, NULL, NULL));
    const uint8_t wanted[12] = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1};
    assert_memory_equal(keep, wanted, 12);
}

static double falling_cost(const int32_t *kept, int32_t groups, void *user)
{
    (void)groups, (void)user;
    return 100 - kept[0];
}

static double broken_cost(const int32_t *kept, int32_t groups, void *user)
{
    (void)kept, (void)groups, (void)user;
    return (double)not_a_number();
}

static void test_search_errors(void **state)
{
    (void)state;
    instance i = instance_make(2, 4, 8, 8, 0);
    apt_search_result r;
    memset(i.keep, 9, (size_t)i.s.units);
    i.s.budget = 10;
    i.s.user = &i.shape;
    wants(APT_E_SCRATCH, apt_mask_search(&i.s, i.scratch, i.bytes - 1, i.keep, i.kept, &r));
    wants(APT_E_SCRATCH, apt_mask_search(&i.s, i.scratch, 0, i.keep, i.kept, &r));
    wants(APT_E_ARGUMENT, apt_mask_search(&i.s, NULL, i.bytes, i.keep, i.kept, &r));
    wants(APT_E_ARGUMENT, apt_mask_search(&i.s, i.scratch, i.bytes, NULL, i.kept, &r));
    wants(APT_E_ARGUMENT, apt_mask_search(NULL, i.scratch, i.bytes, i.keep, i.kept, &r));
    wants(APT_E_NONFINITE, search(&i, (double)not_a_number(), &r));
    int32_t u = 0;
    while (!i.alive[u]) u++;
    const float old = i.salience[u];
    i.salience[u] = not_a_number();
    wants(APT_E_NONFINITE, search(&i, 10, &r));
    i.salience[u] = infinite();
    wants(APT_E_NONFINITE, search(&i, 10, &r));
    i.salience[u] = old;
    const int32_t group = i.group[u];
    i.group[u] = i.s.groups;
    wants(APT_E_RANGE, search(&i, 10, &r));
    i.group[u] = -1;
    wants(APT_E_RANGE, search(&i, 10, &r));
    i.group[u] = group;
    i.least[0] = -1;
    wants(APT_E_RANGE, search(&i, 10, &r));
    i.least[0] = 1;
    i.round_to[1] = 0;
    wants(APT_E_RANGE, search(&i, 10, &r));
    i.round_to[1] = 1;
    i.s.cost = falling_cost;
    wants(APT_E_ARGUMENT, search(&i, 10, &r));
    i.s.cost = broken_cost;
    wants(APT_E_NONFINITE, search(&i, 10, &r));
    i.s.cost = NULL;
    wants(APT_E_ARGUMENT, search(&i, 10, &r));
    i.s.cost = apt_transformer_cost;
    i.shape.layers = 3;                          /* no longer fits the number of groups */
    wants(APT_E_NONFINITE, search(&i, 10, &r));
    i.shape.layers = 2;
    for (int32_t k = 0; k < i.s.units; k++) assert_int_equal(i.keep[k], 9);
    wants(APT_OK, search(&i, 10, &r));
    assert_true(apt_mask_search_scratch(-1, 3) == -1 && apt_mask_search_scratch(INT32_MAX, INT32_MAX) > 0);
    instance_free(&i);
}

/* Exactly the bytes it asked for, at every alignment. */
static void test_search_scratch(void **state)
{
    (void)state;
    instance i = instance_make(2, 4, 30, 8, 0);
    apt_search_result r;
    wants(APT_OK, search(&i, 1e30, &r));
    i.s.budget = r.cost_before / 2;
    wants(APT_OK, search(&i, i.s.budget, &r));
    uint8_t *first = (uint8_t *)memory(i.s.units);
    memcpy(first, i.keep, (size_t)i.s.units);
    char *scratch = (char *)i.scratch;
    for (size_t shift = 1; shift < 32; shift++) {
        memset(scratch, 0x5a, i.bytes + 64);
        wants(APT_OK, apt_mask_search(&i.s, scratch + shift, i.bytes, i.keep, i.kept, NULL));
        assert_memory_equal(first, i.keep, (size_t)i.s.units);
        for (size_t k = 0; k < shift; k++) assert_int_equal(scratch[k], 0x5a);
        for (size_t k = shift + i.bytes; k < i.bytes + 64; k++) assert_int_equal(scratch[k], 0x5a);
    }
    free(first);
    instance_free(&i);
}

static void test_search_whole_and_budget(void **state)
{
    (void)state;
    /* Two layers of 2 heads and 3 neurons, 4 hidden; all of layer 1 is worthless. Order of groups: h0 n0 h1 n1 hidden. */
    apt_transformer shape = APT_ZERO;
    shape.layers = 2;
    shape.head_dim = 2;
    const int32_t group[14] = {0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4};
    const float salience[14] = {9, 9, 9, 9, 9, 0, 0, 0, 0, 0, 90, 90, 90, 90};
    int32_t least[5], round_to[5], kept[5];
    uint8_t keep[14];
    char scratch[1024];
    apt_search_result r;
    apt_limits limits = APT_ZERO;
    limits.min_hidden = 2;
    apt_search s = APT_ZERO;
    s.units = 14, s.groups = 5, s.salience = salience, s.group = group, s.least = least, s.round_to = round_to;
    s.cost = apt_transformer_cost, s.user = &shape;
    s.budget = 0.5 * 4 * 2 * (8 * 2 + 2 * 3);    /* half of C */
    for (limits.whole = 0; limits.whole < 2; limits.whole++) {
        wants(APT_OK, apt_transformer_limits(least, round_to, &shape, &limits));
        wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
        assert_true(r.reached && r.cost <= s.budget);
        assert_int_equal(kept[2], limits.whole ? 0 : 1);
        assert_int_equal(kept[3], limits.whole ? 0 : 1);
        assert_true(kept[0] >= 1 && kept[1] >= 1 && kept[4] >= 2);
    }
    /* The floors cost 2 hidden * 2 layers * (8 + 2) = 40. */
    limits.whole = 0;
    wants(APT_OK, apt_transformer_limits(least, round_to, &shape, &limits));
    s.budget = 40;
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
    assert_true(r.reached == 1 && r.cost == 40);
    s.budget = 39;
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
    assert_true(r.reached == 0 && r.cost == 40 && r.kept == 6);
    s.budget = r.cost_before;                    /* nothing has to go */
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
    assert_true(r.kept == 14 && r.cost == r.cost_before && r.reached);
    s.budget = r.cost_before - 1;                /* something has to */
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
    assert_true(r.kept == 13 && keep[9] == 0);   /* the last of the worthless units */
    s.least = NULL;                              /* defaults: one of each, no rounding */
    s.round_to = NULL;
    s.budget = 0;
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, kept, &r));
    assert_true(r.kept == 5 && r.reached == 0 && r.cost == 2 * (8 + 2));
    s.units = s.groups = 0;                      /* nothing at all is fine with a cost that takes it */
    apt_cost_table none = APT_ZERO;
    const double no_price[1] = {0};
    none.per_unit = no_price;
    s.cost = apt_table_cost, s.user = &none;
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, NULL, NULL, &r));
    assert_true(r.kept == 0 && r.reached == 1);
}

static void test_search_costs(void **state)
{
    (void)state;
    /* C of known models: BERT-base, LLaMA-2-7B, a grouped-query and an encoder-decoder shape. */
    int32_t kept[100];
    apt_transformer t = APT_ZERO;
    t.layers = 12, t.head_dim = 64;
    for (int l = 0; l < 12; l++) kept[2 * l] = 12, kept[2 * l + 1] = 3072;
    kept[24] = 768;
    near("BERT-base", apt_transformer_cost(kept, 25, &t), 12.0 * (4 * 768 * 768 + 2 * 768 * 3072), 0);
    t.layers = 32, t.head_dim = 128, t.gated = 1;
    for (int l = 0; l < 32; l++) kept[2 * l] = 32, kept[2 * l + 1] = 11008;
    kept[64] = 4096;
    near("LLaMA-7B", apt_transformer_cost(kept, 65, &t), 32.0 * (4.0 * 4096 * 4096 + 3.0 * 4096 * 11008), 0);
    t.query_heads = 4;                           /* 8 KV heads for 32 query heads */
    for (int l = 0; l < 32; l++) kept[2 * l] = 8;
    near("grouped queries", apt_transformer_cost(kept, 65, &t), 32.0 * 4096 * (128 * (2 * 32 + 2 * 8) + 3 * 11008), 0);
    t.layers = 24, t.cross_layers = 12, t.head_dim = 64, t.gated = 0, t.query_heads = 1;
    assert_int_equal(apt_transformer_groups(&t), 61);
    bool seen[61] = {false};
    for (int l = 0; l < 24; l++)
        for (int what = APT_GROUP_HEADS; what <= APT_GROUP_NEURONS; what++) {
            const int32_t g = apt_transformer_group(&t, l, what);
            if (what == APT_GROUP_CROSS && l < 12) {
                assert_int_equal(g, -1);
                continue;
            }
            assert_true(g >= 0 && g < 60 && !seen[g]);
            seen[g] = true;
            kept[g] = what == APT_GROUP_NEURONS ? 2048 : 12;
        }
    assert_int_equal(apt_transformer_group(&t, 5, APT_GROUP_HIDDEN), 60);
    kept[60] = 768;
    near("T5-base", apt_transformer_cost(kept, 61, &t), 36.0 * 4 * 768 * 768 + 24.0 * 2 * 768 * 2048, 0);
    assert_int_equal(apt_transformer_group(&t, 24, APT_GROUP_HEADS), -1);
    assert_int_equal(apt_transformer_group(&t, 0, 7), -1);
    t.cross_layers = 25;
    assert_int_equal(apt_transformer_groups(&t), -1);
    /* A table of milliseconds: groups 0 and 1 at 2 and 0.5 ms, 1 ms fixed. */
    const double price[2] = {2, 0.5};
    apt_cost_table table = APT_ZERO;
    table.per_unit = price;
    table.fixed = 1;
    const int32_t group[6] = {0, 0, 1, 1, 1, 1};
    const float salience[6] = {4, 8, 1.5f, 0.75f, 3, 0.5f};              /* densities 2 4 3 1.5 6 1 */
    uint8_t keep[6];
    char scratch[512];
    apt_search s = APT_ZERO;
    apt_search_result r;
    s.units = 6, s.groups = 2, s.salience = salience, s.group = group, s.cost = apt_table_cost, s.user = &table;
    s.budget = 4.3;
    wants(APT_OK, apt_mask_search(&s, scratch, sizeof scratch, keep, NULL, &r));
    const uint8_t wanted[6] = {0, 1, 1, 0, 1, 0};
    assert_memory_equal(keep, wanted, 6);
    near("milliseconds", r.cost, 4, 0);
}

/* ---- masks -------------------------------------------------------------------------------------------------------- */

static void test_masks(void **state)
{
    (void)state;
    float mask[4] = {1, 0, 0.5f, 1};
    const uint8_t keep[4] = {0, 1, 1, 1};
    for (int i = 1; i <= 100; i++) {
        wants(APT_OK, apt_mask_step(mask, keep, 4, 0.01f));
        near("falling", (double)mask[0], 1 - 0.01 * i, 2e-5);
        near("rising", (double)mask[1], 0.01 * i, 2e-5);
        assert_int_equal(apt_mask_settled(mask, 4), i == 100);           /* exactly then, in spite of rounding */
        assert_true(mask[3] == 1);
    }
    assert_true(mask[0] == 0 && mask[1] == 1 && mask[2] == 1);
    for (int rate = 1; rate < 1500; rate += 1 + rate / 40) {             /* 1/rate steps are enough for any rate of that form */
        float m[2] = {1, 0};
        const uint8_t k[2] = {0, 1};
        for (int i = 0; i < rate; i++) {
            assert_false(apt_mask_settled(m, 2) && i > 0);
            wants(APT_OK, apt_mask_step(m, k, 2, 1.0f / (float)rate));
        }
        assert_true(m[0] == 0 && m[1] == 1);
    }
    float half[4] = {0.5f, 0.25f, 0, 1};
    uint8_t out[4] = {9, 9, 9, 9};
    wants(APT_E_STATE, apt_mask_keep(out, half, 4));
    assert_int_equal(out[0], 9);
    wants(APT_OK, apt_mask_snap(half, keep, 4));
    assert_true(half[0] == 0 && half[1] == 1 && half[2] == 1 && half[3] == 1);
    wants(APT_OK, apt_mask_keep(out, half, 4));
    assert_memory_equal(out, keep, 4);
    half[1] = not_a_number();
    assert_int_equal(apt_mask_settled(half, 4), 0);
    wants(APT_E_NONFINITE, apt_mask_step(half, keep, 4, 0.01f));
    wants(APT_E_NONFINITE, apt_mask_keep(out, half, 4));
    wants(APT_E_RANGE, apt_mask_step(mask, keep, 4, 0));
    wants(APT_E_RANGE, apt_mask_step(mask, keep, 4, 1e-9f));
    wants(APT_E_RANGE, apt_mask_step(mask, keep, 4, 1.5f));
    wants(APT_E_NONFINITE, apt_mask_step(mask, keep, 4, not_a_number()));
    wants(APT_E_ARGUMENT, apt_mask_step(NULL, keep, 4, 0.5f));
    wants(APT_E_ARGUMENT, apt_mask_snap(mask, NULL, 4));
    assert_int_equal(apt_mask_settled(NULL, 4), 0);
    assert_int_equal(apt_mask_settled(mask, -1), 0);
}

/* ---- compaction --------------------------------------------------------------------------------------------------- */

static void test_gather(void **state)
{
    (void)state;
    for (int trial = 0; trial < 200; trial++) {
        const int32_t ru = 1 + below(6), rw = 1 + below(3), cu = 1 + below(6), cw = 1 + below(3), cols = cu * cw, ld = cols + below(3);
        uint8_t rkeep[6], ckeep[6];
        int32_t rindex[6], cindex[6];
        for (int k = 0; k < 6; k++) rkeep[k] = (uint8_t)(below(3) != 0), ckeep[k] = (uint8_t)(below(3) != 0);
        apt_axis rows = APT_ZERO, axis = APT_ZERO;
        wants(APT_OK, apt_axis_make(&rows, rindex, trial % 4 == 0 ? NULL : rkeep, ru, rw));
        wants(APT_OK, apt_axis_make(&axis, cindex, trial % 5 == 0 ? NULL : ckeep, cu, cw));
        float *in = floats(ru * rw * ld), *out = floats(ru * rw * ld), *wanted = floats(ru * rw * ld);
        fill(in, ru * rw * ld);
        const int32_t kept_cols = axis.kept * cw;
        int64_t n = 0;
        for (int32_t r = 0; r < ru * rw; r++)
            for (int32_t c = 0; c < cols; c++)
                if ((trial % 4 == 0 || rkeep[r / rw]) && (trial % 5 == 0 || ckeep[c / cw])) wanted[n++] = in[r * ld + c];
        assert_true(n == (int64_t)rows.kept * rw * kept_cols);
        wants(APT_OK, apt_gather(out, kept_cols, in, ld, &rows, &axis));
        assert_memory_equal(out, wanted, (size_t)n * sizeof(float));
        wants(APT_OK, apt_gather(in, kept_cols, in, ld, &rows, &axis));  /* in place */
        assert_memory_equal(in, wanted, (size_t)n * sizeof(float));
        free(in), free(out), free(wanted);
    }
    float v[6] = {0, 1, 2, 3, 4, 5}, out[6] = {0};
    const uint8_t keep[3] = {0, 1, 1};
    int32_t index[3];
    apt_axis axis = APT_ZERO;
    wants(APT_OK, apt_axis_make(&axis, index, keep, 3, 2));
    wants(APT_OK, apt_gather(out, 0, v, 0, NULL, &axis));                /* a vector: no distances needed */
    assert_true(out[0] == 2 && out[1] == 3 && out[2] == 4 && out[3] == 5);
    wants(APT_OK, apt_gather(out, 1, v, 1, &axis, NULL));                /* or as a column */
    assert_true(out[0] == 2 && out[3] == 5);
    wants(APT_E_SHAPE, apt_gather(out, 3, v, 2, &axis, &axis));
    wants(APT_E_ARGUMENT, apt_gather(NULL, 4, v, 6, NULL, &axis));
    apt_axis two;
    wants(APT_OK, apt_axis_make(&two, NULL, NULL, 2, 1));
    wants(APT_E_SHAPE, apt_gather(v, 3, v, 2, &two, &two));              /* in place it cannot grow */
    index[1] = 3;
    wants(APT_E_RANGE, apt_gather(out, 4, v, 6, NULL, &axis));
    index[1] = 1;                                                        /* not rising */
    wants(APT_E_RANGE, apt_gather(out, 4, v, 6, NULL, &axis));
    wants(APT_E_ARGUMENT, apt_axis_make(&axis, NULL, keep, 3, 2));
    wants(APT_E_RANGE, apt_axis_make(&axis, index, keep, 3, 0));
    wants(APT_OK, apt_axis_make(&axis, NULL, NULL, 3, 1));
    axis.kept = 2;                                                       /* all, but not all */
    wants(APT_E_ARGUMENT, apt_gather(out, 4, v, 6, NULL, &axis));
}

/* ---- adapters ----------------------------------------------------------------------------------------------------- */

enum { IN = 13, OUT = 11, RANK = 5, ROWS = 7 };

typedef struct layer { float a[64 * IN], b[OUT * 64], x[ROWS * (IN + 2)], w[OUT * IN], bias[OUT]; apt_adapter t; } layer;

static layer *layer_make(int32_t rank)
{
    layer *l = (layer *)memory((int64_t)sizeof(layer));
    l->t.a = l->a;
    l->t.b = l->b;
    l->t.rank = rank;
    l->t.in = IN;
    l->t.out = OUT;
    l->t.scale = 2;
    fill(l->a, rank * IN);
    fill(l->b, OUT * rank);
    fill(l->x, ROWS * (IN + 2));
    fill(l->w, OUT * IN);
    return l;
}

/* y = W x in plain float, to have something that the adapter adds to. */
static void base_forward(const layer *l, float *y)
{
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUT; o++) {
            float sum = 0;
            for (int i = 0; i < IN; i++) sum += l->w[o * IN + i] * l->x[r * (IN + 2) + i];
            y[r * OUT + o] = sum;
        }
}

static void test_adapter_init(void **state)
{
    (void)state;
    layer *l = layer_make(32);
    apt_rng a = apt_rng_make(5, 0), b = apt_rng_make(5, 0);
    wants(APT_OK, apt_adapter_init(&l->t, &a));
    const double bound = 1 / sqrt((double)IN);
    double sum = 0, square = 0;
    for (int i = 0; i < 32 * IN; i++) {
        assert_true(fabs((double)l->a[i]) <= bound);
        sum += (double)l->a[i] / (32 * IN);
        square += (double)l->a[i] * (double)l->a[i] / (32 * IN);
    }
    near("mean of A", sum, 0, 0.03);
    near("variance of A", square, bound * bound / 3, 0.004);
    for (int i = 0; i < OUT * 32; i++) assert_true(l->b[i] == 0);
    float copy[32 * IN];
    memcpy(copy, l->a, sizeof copy);
    wants(APT_OK, apt_adapter_init(&l->t, &b));
    assert_memory_equal(copy, l->a, sizeof copy);
    wants(APT_E_ARGUMENT, apt_adapter_init(&l->t, NULL));
    l->t.rank = -1;
    wants(APT_E_ARGUMENT, apt_adapter_init(&l->t, &a));
    free(l);
}

static void test_adapter_forward_and_merge(void **state)
{
    (void)state;
    layer *l = layer_make(RANK);
    float y[ROWS * OUT], wanted[ROWS * OUT], xa[ROWS * RANK], merged[ROWS * OUT];
    base_forward(l, y);
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUT; o++) {
            double sum = (double)y[r * OUT + o];
            for (int k = 0; k < RANK; k++)
                for (int i = 0; i < IN; i++) sum += 2.0 * (double)l->b[o * RANK + k] * (double)l->a[k * IN + i] * (double)l->x[r * (IN + 2) + i];
            wanted[r * OUT + o] = (float)sum;
        }
    wants(APT_OK, apt_adapter_forward(&l->t, y, OUT, xa, l->x, IN + 2, ROWS));
    near_all("adapter forward", y, wanted, ROWS * OUT, 1e-6);
    wants(APT_OK, apt_adapter_merge(&l->t, l->w, IN));
    base_forward(l, merged);
    near_all("merged", merged, wanted, ROWS * OUT, 1e-6);
    wants(APT_E_SHAPE, apt_adapter_forward(&l->t, y, OUT - 1, xa, l->x, IN, ROWS));
    wants(APT_E_ARGUMENT, apt_adapter_forward(&l->t, y, OUT, NULL, l->x, IN, ROWS));
    wants(APT_E_SHAPE, apt_adapter_merge(&l->t, l->w, IN - 1));
    l->t.scale = not_a_number();
    wants(APT_E_NONFINITE, apt_adapter_forward(&l->t, y, OUT, xa, l->x, IN, ROWS));
    l->t.scale = 2;
    l->t.rank = 0;                               /* legal, does nothing, needs nothing */
    l->t.a = l->t.b = NULL;
    memcpy(y, wanted, sizeof y);
    wants(APT_OK, apt_adapter_forward(&l->t, y, OUT, NULL, l->x, IN, ROWS));
    wants(APT_OK, apt_adapter_backward(&l->t, NULL, 0, NULL, NULL, NULL, y, OUT, l->x, IN, NULL, ROWS));
    assert_memory_equal(y, wanted, sizeof y);
    free(l);
}

/* sum c*y of the layer, in double from float outputs. */
static double weighted_output(const layer *l, const float *c)
{
    float y[ROWS * OUT] = {0}, xa[ROWS * RANK];
    wants(APT_OK, apt_adapter_forward(&l->t, y, OUT, xa, l->x, IN + 2, ROWS));
    double sum = 0;
    for (int i = 0; i < ROWS * OUT; i++) sum += (double)c[i] * (double)y[i];
    return sum;
}

/* The output is linear in each argument alone, so a wide central difference is exact up to rounding. */
static double difference(const layer *l, const float *c, float *at)
{
    const float old = *at;
    *at = old + 1;
    const double up = weighted_output(l, c);
    *at = old - 1;
    const double down = weighted_output(l, c);
    *at = old;
    return (up - down) / 2;
}

static void test_adapter_backward(void **state)
{
    (void)state;
    layer *l = layer_make(RANK);
    float c[ROWS * OUT], y[ROWS * OUT] = {0}, xa[ROWS * RANK], dxa[ROWS * RANK], dx[ROWS * IN], da[RANK * IN], db[OUT * RANK];
    fill(c, ROWS * OUT);
    for (int i = 0; i < ROWS * IN; i++) dx[i] = 10;                      /* all three are added to */
    for (int i = 0; i < RANK * IN; i++) da[i] = 20;
    for (int i = 0; i < OUT * RANK; i++) db[i] = 30;
    wants(APT_OK, apt_adapter_forward(&l->t, y, OUT, xa, l->x, IN + 2, ROWS));
    wants(APT_OK, apt_adapter_backward(&l->t, dx, IN, da, db, dxa, c, OUT, l->x, IN + 2, xa, ROWS));
    for (int i = 0; i < RANK * IN; i++) near("da", (double)da[i] - 20, difference(l, c, &l->a[i]), 2e-5);
    for (int i = 0; i < OUT * RANK; i++) near("db", (double)db[i] - 30, difference(l, c, &l->b[i]), 2e-5);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < IN; i++) near("dx", (double)dx[r * IN + i] - 10, difference(l, c, &l->x[r * (IN + 2) + i]), 2e-5);
    float only[OUT * RANK] = {0};                /* each output alone */
    wants(APT_OK, apt_adapter_backward(&l->t, NULL, 0, NULL, only, dxa, c, OUT, NULL, 0, xa, ROWS));
    for (int i = 0; i < OUT * RANK; i++) near("db alone", (double)only[i], (double)db[i] - 30, 1e-5);
    wants(APT_E_ARGUMENT, apt_adapter_backward(&l->t, dx, IN, da, db, NULL, c, OUT, l->x, IN + 2, xa, ROWS));
    wants(APT_E_ARGUMENT, apt_adapter_backward(&l->t, dx, IN, da, db, dxa, c, OUT, NULL, IN + 2, xa, ROWS));
    free(l);
}

static void test_adapter_grow(void **state)
{
    (void)state;
    apt_rng rng = apt_rng_make(3, 1);
    for (int32_t rank = 0; rank <= 20; rank++) {
        layer *l = layer_make(rank);
        float y[ROWS * OUT], after[ROWS * OUT], xa[ROWS * 64], a[64 * IN], b[OUT * 64];
        base_forward(l, y);
        memcpy(after, y, sizeof y);
        wants(APT_OK, apt_adapter_forward(&l->t, y, OUT, xa, l->x, IN + 2, ROWS));
        apt_adapter grown = l->t;
        grown.a = a;
        grown.b = b;
        grown.rank = rank + 1 + below(20);
        wants(APT_OK, apt_adapter_grow(&grown, &l->t, &rng));
        wants(APT_OK, apt_adapter_forward(&grown, after, OUT, xa, l->x, IN + 2, ROWS));
        assert_memory_equal(y, after, sizeof y); /* not a bit */
        int moved = 0;
        for (int i = rank * IN; i < grown.rank * IN; i++) {
            assert_true(fabs((double)a[i]) <= 1 / sqrt((double)IN));
            moved += a[i] != 0;
        }
        assert_true(moved > (grown.rank - rank) * IN / 2);
        wants(APT_OK, apt_adapter_grow(&grown, &l->t, NULL));            /* moments: zeros */
        for (int i = rank * IN; i < grown.rank * IN; i++) assert_true(a[i] == 0);
        assert_memory_equal(a, l->a, (size_t)(rank * IN) * sizeof(float));
        for (int o = 0; o < OUT; o++)
            for (int k = 0; k < grown.rank; k++) assert_true(b[o * grown.rank + k] == (k < rank ? l->b[o * rank + k] : 0));
        if (rank > 0) {
            grown.rank = rank - 1;
            wants(APT_E_SHAPE, apt_adapter_grow(&grown, &l->t, &rng));
        }
        grown.rank = 40;
        grown.in = IN - 1;
        wants(APT_E_SHAPE, apt_adapter_grow(&grown, &l->t, &rng));
        free(l);
    }
}

static void test_adapter_plan(void **state)
{
    (void)state;
    /* Total 5*8*100 = 4000; a budget of 6000 makes 8 -> 12 for the best three of five. */
    const float importance[5] = {1, 5, 3, 3, 3};
    const int32_t rank[5] = {8, 8, 8, 8, 8};
    const int64_t per_rank[5] = {100, 100, 100, 100, 100};
    int32_t out[5];
    wants(APT_OK, apt_adapter_plan(out, importance, rank, per_rank, 5, 6000, 64));
    const int32_t wanted[5] = {8, 12, 12, 12, 8};                        /* of the three equal ones the first two */
    assert_memory_equal(out, wanted, sizeof out);
    wants(APT_OK, apt_adapter_plan(out, importance, rank, per_rank, 5, 6000, 10));
    assert_true(out[1] == 10 && out[2] == 10 && out[0] == 8);
    wants(APT_OK, apt_adapter_plan(out, importance, rank, per_rank, 5, 3999, 64));
    assert_memory_equal(out, rank, sizeof out);  /* a smaller budget takes nothing away */
    wants(APT_OK, apt_adapter_plan(out, importance, rank, per_rank, 5, INT64_MAX, 64));
    assert_true(out[1] == 64 && out[3] == 64 && out[4] == 8);
    const int32_t none[5] = {0, 0, 0, 0, 0}, some[5] = {0, 0, 4, 80, 0};
    wants(APT_OK, apt_adapter_plan(out, importance, none, per_rank, 5, 6000, 64));
    assert_memory_equal(out, none, sizeof out);
    wants(APT_OK, apt_adapter_plan(out, importance, some, per_rank, 5, 100000, 64));
    assert_true(out[1] == 0 && out[2] == 47 && out[3] == 80);            /* rank 0 stays; above max_rank nothing is cut */
    for (int trial = 0; trial < 500; trial++) {
        enum { MOST = 40 };
        const int32_t n = 1 + below(MOST), most = below(65);
        float imp[MOST];
        int32_t now[MOST], next[MOST];
        int64_t each[MOST], total = 0, after = 0;
        for (int i = 0; i < n; i++) {
            imp[i] = (float)below(trial % 2 ? 4 : 1000000);
            now[i] = below(40);
            each[i] = below(5000);
            total += now[i] * each[i];
        }
        const int64_t budget = (int64_t)((double)total * 3 * apt_rng_uniform(&g_rng));
        wants(APT_OK, apt_adapter_plan(next, imp, now, each, n, budget, most));
        int grown = 0;
        for (int i = 0; i < n; i++) {
            assert_true(next[i] >= now[i] && (next[i] == now[i] || next[i] <= most));
            after += next[i] * each[i];
            grown += next[i] > now[i];
            if (next[i] > now[i])                /* nobody who grew is less important than one of the upper half */
                for (int j = 0, better = 0; j < n; j++) {
                    better += imp[j] > imp[i];
                    assert_true(better < n - n / 2);
                }
        }
        assert_true(grown <= n - n / 2);
        assert_true(after <= (budget > total ? budget : total));
        wants(APT_OK, apt_adapter_plan(now, imp, now, each, n, budget, most));     /* in place */
        assert_memory_equal(now, next, (size_t)n * sizeof *now);
    }
    out[0] = -3;
    const float bad[5] = {1, not_a_number(), 3, 3, 3};
    const int32_t negative[5] = {8, -8, 8, 8, 8};
    const int64_t huge[5] = {INT64_MAX, 1, 1, 1, 1};
    wants(APT_E_NONFINITE, apt_adapter_plan(out, bad, rank, per_rank, 5, 6000, 64));
    wants(APT_E_RANGE, apt_adapter_plan(out, importance, negative, per_rank, 5, 6000, 64));
    wants(APT_E_RANGE, apt_adapter_plan(out, importance, rank, huge, 5, 6000, 64));
    wants(APT_E_RANGE, apt_adapter_plan(out, importance, rank, per_rank, 5, -1, 64));
    wants(APT_E_ARGUMENT, apt_adapter_plan(out, NULL, rank, per_rank, 5, 6000, 64));
    assert_int_equal(out[0], -3);
}

static void test_adapter_importance(void **state)
{
    (void)state;
    layer *l = layer_make(RANK);
    float db[OUT * RANK], got = -1;
    fill(db, OUT * RANK);
    double sum = 0;
    for (int i = 0; i < OUT * RANK; i++) sum += fabs((double)l->b[i] * (double)db[i]);
    wants(APT_OK, apt_adapter_importance(&l->t, db, &got));
    near("importance", (double)got, sum, 1e-6 * sum);
    got = -1;
    db[3] = not_a_number();
    wants(APT_E_NONFINITE, apt_adapter_importance(&l->t, db, &got));
    assert_true(got == -1);
    l->t.rank = 0;
    wants(APT_OK, apt_adapter_importance(&l->t, NULL, &got));
    assert_true(got == 0);
    free(l);
}

/* ---- distillation ------------------------------------------------------------------------------------------------- */

static void test_distill_mu(void **state)
{
    (void)state;
    float mu = -1;
    for (int64_t t = -5; t < 120; t++) {
        wants(APT_OK, apt_distill_mu(&mu, t, 10, 110));
        near("mu", (double)mu, t <= 10 ? 0 : t >= 110 ? 1 : (double)(t - 10) / 100, 1e-7);
    }
    wants(APT_OK, apt_distill_mu(&mu, 4, 5, 5));
    assert_true(mu == 0);
    wants(APT_OK, apt_distill_mu(&mu, 5, 5, 5));
    assert_true(mu == 1);
    wants(APT_OK, apt_distill_mu(&mu, 0, INT64_MIN, INT64_MAX));
    near("mu of the whole range", (double)mu, 0.5, 1e-6);
    wants(APT_E_RANGE, apt_distill_mu(&mu, 4, 5, 4));
    wants(APT_E_ARGUMENT, apt_distill_mu(NULL, 4, 5, 6));
}

enum { D_ROWS = 6, D_COLS = 5, D_LD = 7 };

static double kl(const float *s, const float *t, const uint8_t *used, float temperature)
{
    double loss = -1;
    wants(APT_OK, apt_distill_kl(&loss, NULL, 0, s, D_LD, t, D_LD, used, D_ROWS, D_COLS, temperature, 1));
    return loss;
}

static double plain_kl(const float *s, const float *t, const uint8_t *used, double temperature)
{
    double sum = 0, rows = 0;
    for (int r = 0; r < D_ROWS; r++) {
        if (used != NULL && !used[r]) continue;
        double zs = 0, zt = 0;
        rows++;
        for (int c = 0; c < D_COLS; c++) zs += exp((double)s[r * D_LD + c] / temperature), zt += exp((double)t[r * D_LD + c] / temperature);
        for (int c = 0; c < D_COLS; c++) {
            const double p = exp((double)t[r * D_LD + c] / temperature) / zt, q = exp((double)s[r * D_LD + c] / temperature) / zs;
            sum += p * log(p / q);
        }
    }
    return temperature * temperature * sum / rows;
}

static void test_distill_kl(void **state)
{
    (void)state;
    float s[D_ROWS * D_LD], t[D_ROWS * D_LD], grad[D_ROWS * D_LD];
    const uint8_t used[D_ROWS] = {1, 1, 0, 1, 0, 1};
    const float temperatures[3] = {2.0f / 3, 1, 4};
    double loss;
    for (int trial = 0; trial < 6; trial++) {
        const float temperature = temperatures[trial % 3];
        const uint8_t *mask = trial < 3 ? NULL : used;
        fill(s, D_ROWS * D_LD);
        fill(t, D_ROWS * D_LD);
        for (int i = 0; i < D_ROWS * D_LD; i++) s[i] *= 3, t[i] *= 3, grad[i] = 10;
        near("KL", kl(s, t, mask, temperature), plain_kl(s, t, mask, (double)temperature), 1e-6);
        assert_true(kl(s, t, mask, temperature) > 0);
        wants(APT_OK, apt_distill_kl(&loss, grad, D_LD, s, D_LD, t, D_LD, mask, D_ROWS, D_COLS, temperature, 0.5f));
        for (int r = 0; r < D_ROWS; r++)
            for (int c = 0; c < D_LD; c++) {
                float *at = &s[r * D_LD + c];
                const float old = *at, h = 0.01f;
                *at = old + h;
                const double up = plain_kl(s, t, mask, (double)temperature), high = (double)*at;
                *at = old - h;
                const double slope = c < D_COLS ? (up - plain_kl(s, t, mask, (double)temperature)) / (high - (double)*at) : 0;
                *at = old;
                near("KL gradient", (double)grad[r * D_LD + c] - 10, 0.5 * slope, 2e-5);
            }
        wants(APT_OK, apt_distill_kl(&loss, grad, D_LD, t, D_LD, t, D_LD, mask, D_ROWS, D_COLS, temperature, 1));
        assert_true(loss == 0);
    }
    memset(grad, 0, sizeof grad);                /* identical: nothing at all */
    for (int i = 0; i < D_ROWS * D_LD; i++) s[i] = t[i] = (float)(3e4 * uniform());    /* and no overflow */
    wants(APT_OK, apt_distill_kl(&loss, grad, D_LD, s, D_LD, t, D_LD, NULL, D_ROWS, D_COLS, 0.25f, 1));
    for (int i = 0; i < D_ROWS * D_LD; i++) assert_true(grad[i] == 0);
    assert_true(loss == 0);
    const uint8_t nobody[D_ROWS] = {0};
    wants(APT_OK, apt_distill_kl(&loss, grad, D_LD, s, D_LD, t, D_LD, nobody, D_ROWS, D_COLS, 1, 1));
    assert_true(loss == 0);
    loss = -1;
    s[2 * D_LD] = not_a_number();
    wants(APT_E_NONFINITE, apt_distill_kl(&loss, grad, D_LD, s, D_LD, t, D_LD, NULL, D_ROWS, D_COLS, 1, 1));
    assert_true(loss == -1 && grad[0] == 0);
    wants(APT_OK, apt_distill_kl(&loss, NULL, 0, s, D_LD, t, D_LD, used, D_ROWS, D_COLS, 1, 1));   /* that row is not used */
    wants(APT_E_RANGE, apt_distill_kl(&loss, grad, D_LD, t, D_LD, t, D_LD, NULL, D_ROWS, D_COLS, 0, 1));
    wants(APT_E_SHAPE, apt_distill_kl(&loss, grad, D_COLS - 1, t, D_LD, t, D_LD, NULL, D_ROWS, D_COLS, 1, 1));
    wants(APT_E_ARGUMENT, apt_distill_kl(NULL, grad, D_LD, t, D_LD, t, D_LD, NULL, D_ROWS, D_COLS, 1, 1));
}

static void test_distill_mse(void **state)
{
    (void)state;
    float s[D_ROWS * D_LD], t[D_ROWS * D_LD], grad[D_ROWS * D_LD];
    const uint8_t used[D_ROWS] = {0, 1, 1, 1, 0, 1};
    double loss;
    for (int trial = 0; trial < 2; trial++) {
        const uint8_t *mask = trial ? used : NULL;
        double sum = 0, n = 0;
        fill(s, D_ROWS * D_LD);
        fill(t, D_ROWS * D_LD);
        for (int i = 0; i < D_ROWS * D_LD; i++) grad[i] = 10;
        for (int r = 0; r < D_ROWS; r++)
            for (int c = 0; c < D_COLS && (mask == NULL || mask[r]); c++) sum += pow((double)s[r * D_LD + c] - (double)t[r * D_LD + c], 2), n++;
        wants(APT_OK, apt_distill_mse(&loss, grad, D_LD, s, D_LD, t, D_LD, mask, D_ROWS, D_COLS, 3));
        near("MSE", loss, sum / n, 1e-6);
        for (int r = 0; r < D_ROWS; r++)
            for (int c = 0; c < D_LD; c++) {
                const bool counts = c < D_COLS && (mask == NULL || mask[r]);
                const double d = (double)s[r * D_LD + c] - (double)t[r * D_LD + c], h = 0.1;
                const double slope = counts ? ((d + h) * (d + h) - (d - h) * (d - h)) / (2 * h) / n : 0;      /* exact: quadratic */
                near("MSE gradient", (double)grad[r * D_LD + c] - 10, 3 * slope, 3e-6);
            }
    }
    memset(grad, 0, sizeof grad);
    wants(APT_OK, apt_distill_mse(&loss, grad, D_LD, s, D_LD, s, D_LD, NULL, D_ROWS, D_COLS, 1));
    assert_true(loss == 0);
    for (int i = 0; i < D_ROWS * D_LD; i++) assert_true(grad[i] == 0);
    t[D_LD] = infinite();
    loss = -1;
    wants(APT_E_NONFINITE, apt_distill_mse(&loss, grad, D_LD, s, D_LD, t, D_LD, used, D_ROWS, D_COLS, 1));
    assert_true(loss == -1);
    wants(APT_OK, apt_distill_mse(&loss, NULL, 0, NULL, 0, NULL, 0, NULL, 0, D_COLS, 1));
    assert_true(loss == 0);
}

static void test_distill_match(void **state)
{
    (void)state;
    apt_rng rng = apt_rng_make(1, 1);
    apt_distill_map m;
    uint8_t gone[12] = {0};
    int32_t hits[12] = {0};
    for (int trial = 0; trial < 600; trial++) {
        for (int l = 0; l < 12; l++) gone[l] = (uint8_t)(trial < 300 ? 0 : below(2));
        gone[below(12)] = 0;
        wants(APT_OK, apt_distill_match(&m, gone, 12, &rng));
        assert_int_equal(m.pairs, 4);
        for (int i = 0; i < 4; i++) {
            const int32_t t = m.teacher[i], s = m.student[i];
            assert_true(t >= 3 * i && t < 3 * i + 3);                    /* one of each quarter */
            assert_true(s >= 0 && s < 12 && !gone[s]);
            hits[t]++;
            const int32_t away = s > t ? s - t : t - s;
            for (int l = 0; l < 12; l++) {       /* nobody is nearer, and of two the lower was taken */
                const int32_t d = l > t ? l - t : t - l;
                assert_true(gone[l] || d > away || (d == away && l >= s));
            }
        }
    }
    for (int l = 0; l < 12; l++) assert_true(hits[l] > 100);
    /* What is pruned does not move the generator: a resumed run draws the same layers. */
    apt_rng a = apt_rng_make(9, 9), b = a;
    memset(gone, 1, sizeof gone);
    wants(APT_OK, apt_distill_match(&m, gone, 12, &a));
    assert_int_equal(m.pairs, 0);
    wants(APT_OK, apt_distill_match(&m, NULL, 12, &b));
    assert_true(a.counter == b.counter && a.key == b.key);
    for (int32_t layers = 0; layers < 30; layers++) {
        wants(APT_OK, apt_distill_match(&m, NULL, layers, &rng));
        assert_int_equal(m.pairs, layers < 4 ? layers : 4);
        for (int i = 0; i < m.pairs; i++) {
            assert_true(m.student[i] == m.teacher[i] && m.teacher[i] < layers);
            assert_true(i == 0 || m.teacher[i] > m.teacher[i - 1]);
        }
    }
    wants(APT_E_ARGUMENT, apt_distill_match(&m, NULL, 12, NULL));
    wants(APT_E_ARGUMENT, apt_distill_match(NULL, NULL, 12, &rng));
    wants(APT_E_ARGUMENT, apt_distill_match(&m, NULL, -1, &rng));
}

/* ---- presets ------------------------------------------------------------------------------------------------------ */

#ifndef APT_ONLY_CORE
static void test_presets(void **state)
{
    (void)state;
    const struct { apt_preset_kind kind; float rate; int32_t batch, epochs, distill; } table[] = {
        {APT_PRESET_GLUE_SMALL, 2e-4f, 32, 40, 20}, {APT_PRESET_GLUE_BIG, 2e-4f, 32, 40, 20}, {APT_PRESET_SQUAD, 2e-4f, 32, 40, 20},
        {APT_PRESET_CNNDM, 1e-4f, 16, 16, 6}, {APT_PRESET_ALPACA, 1e-4f, 32, 15, 0}};
    for (int i = 0; i < 5; i++) {
        apt_preset_info info;
        wants(APT_OK, apt_preset_query(table[i].kind, &info));
        assert_non_null(info.name);
        assert_true(info.learning_rate == table[i].rate && info.batch == table[i].batch);
        assert_true(info.epochs == table[i].epochs && info.distill_epochs == table[i].distill);
        const apt_train_desc desc = apt_preset(table[i].kind);
        assert_true(desc.learning_rate == table[i].rate && desc.target_sparsity == 0.6f && desc.rank == 8 && desc.scale == 2);
        assert_true(desc.mask_step == 0.01f && desc.salience_momentum == 0.9f && desc.clip == 1 && desc.weight_decay == 0);
        assert_true(desc.update_frequency == 100 && desc.steps == 0 && desc.start_canary == 0 && desc.end_canary == 0);
        assert_int_equal(desc.disable_distill, table[i].distill == 0);
    }
    apt_preset_info info;
    wants(APT_E_ARGUMENT, apt_preset_query(APT_PRESET_GLUE_SMALL, NULL));
    wants(APT_E_ARGUMENT, apt_preset_query((apt_preset_kind)0, &info));
    assert_int_equal(apt_preset((apt_preset_kind)0).rank, 0);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_rng, start),
        cmocka_unit_test_setup(test_schedule_curves, start),
        cmocka_unit_test_setup(test_schedule_edges, start),
        cmocka_unit_test_setup(test_schedule_errors, start),
        cmocka_unit_test_setup(test_schedule_milestones, start),
        cmocka_unit_test_setup(test_schedule_layers_and_due, start),
        cmocka_unit_test_setup(test_schedule_names, start),
        cmocka_unit_test_setup(test_sums, start),
        cmocka_unit_test_setup(test_salience_finish, start),
        cmocka_unit_test_setup(test_weight_salience, start),
        cmocka_unit_test_setup(test_kurtosis, start),
        cmocka_unit_test_setup(test_kurtosis_edges, start),
        cmocka_unit_test_setup(test_combine, start),
        cmocka_unit_test_setup(test_ema, start),
        cmocka_unit_test_setup(test_golden_recorded, start),
        cmocka_unit_test_setup(test_golden_shared, start),
        cmocka_unit_test_setup(test_search_against_plain, start),
        cmocka_unit_test_setup(test_search_stress, start),
        cmocka_unit_test_setup(test_search_permutation, start),
        cmocka_unit_test_setup(test_search_errors, start),
        cmocka_unit_test_setup(test_search_scratch, start),
        cmocka_unit_test_setup(test_search_whole_and_budget, start),
        cmocka_unit_test_setup(test_search_costs, start),
        cmocka_unit_test_setup(test_masks, start),
        cmocka_unit_test_setup(test_gather, start),
        cmocka_unit_test_setup(test_adapter_init, start),
        cmocka_unit_test_setup(test_adapter_forward_and_merge, start),
        cmocka_unit_test_setup(test_adapter_backward, start),
        cmocka_unit_test_setup(test_adapter_grow, start),
        cmocka_unit_test_setup(test_adapter_plan, start),
        cmocka_unit_test_setup(test_adapter_importance, start),
        cmocka_unit_test_setup(test_distill_mu, start),
        cmocka_unit_test_setup(test_distill_kl, start),
        cmocka_unit_test_setup(test_distill_mse, start),
        cmocka_unit_test_setup(test_distill_match, start),
#ifndef APT_ONLY_CORE
        cmocka_unit_test_setup(test_presets, start),
#endif
    };
    return cmocka_run_group_tests_name("core", tests, NULL, NULL);
}
