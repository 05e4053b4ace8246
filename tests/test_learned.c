/* Learned sparsity on raw arrays: the BK-core against a dense complex inverse, against its recursions in double and against
   closed forms, its gradients, cut rows and threads; the losses on a mask and their scheduler; counts of experts. Also built
   with APT_ONLY_CORE, where everything but threads must be the same.
   build: cc -std=c11 -O2 tests/test_learned.c -o test_learned -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include <complex.h>
#include <float.h>

enum { MOST = 60 };

/* diagonal(n) of (T - zI)^-1 by Gauss-Jordan elimination; mask NULL: all 1. Only the product of the two entries beside the
   diagonal counts, so one of them is 1. */
static void dense(double complex *diagonal, const double *v, const double *mask, int64_t n, double complex z)
{
    static double complex a[MOST][2 * MOST];
    memset(a, 0, sizeof a);
    for (int64_t i = 0; i < n; i++) {
        a[i][i] = -2 + v[i] - z;
        a[i][n + i] = 1;
        if (i == 0) continue;
        a[i - 1][i] = 1;
        a[i][i - 1] = mask == NULL ? 1 : mask[i - 1] * mask[i];
    }
    for (int64_t k = 0; k < n; k++) {
        int64_t best = k;
        for (int64_t i = k; i < n; i++)
            if (cabs(a[i][k]) > cabs(a[best][k])) best = i;
        for (int64_t j = 0; j < 2 * n; j++) {
            const double complex t = a[k][j];
            a[k][j] = a[best][j];
            a[best][j] = t;
        }
        const double complex pivot = a[k][k];
        for (int64_t j = 0; j < 2 * n; j++) a[k][j] /= pivot;
        for (int64_t i = 0; i < n; i++) {
            const double complex f = a[i][k];
            for (int64_t j = 0; j < 2 * n && i != k; j++) a[i][j] -= f * a[k][j];
        }
    }
    for (int64_t i = 0; i < n; i++) diagonal[i] = a[i][n + i];
}

/* In [0, 1), the same on every machine. */
static float uniform(apt_rng *rng)
{
    return (float)(apt_rng_next(rng) >> 40) / 16777216.0f;
}

/* kind 0: no mask, 1: of 0 and 1, 2: values between */
static void draw(float *v, float *mask, double *v2, double *mask2, int64_t n, int32_t kind, uint64_t seed)
{
    apt_rng rng = apt_rng_make(seed, (uint64_t)(n * 3 + kind));
    for (int64_t i = 0; i < n; i++) {
        v2[i] = v[i] = 4 * uniform(&rng) - 2;
        const float u = uniform(&rng);
        mask2[i] = mask[i] = kind == 1 ? (u > 0.4f ? 1.0f : 0.0f) : 0.05f + 0.9f * u;
    }
}

/* With scratch of exactly the size that is asked for. */
static void forward(float *re, float *im, const float *v, const float *mask, int64_t rows, int64_t n, const apt_bk *z)
{
    const int64_t bytes = apt_bk_scratch(rows, n, z);
    assert_true(bytes >= 0);
    void *scratch = test_memory_block((size_t)bytes);
    assert_result(apt_bk_forward(re, im, v, mask, rows, n, z, scratch, (size_t)bytes), APT_OK);
    free(scratch);
}

static void backward(float *dv, float *dmask, double *dz, const float *dre, const float *dim, const float *v, const float *mask,
                     int64_t rows, int64_t n, const apt_bk *z)
{
    const int64_t bytes = apt_bk_scratch(rows, n, z);
    assert_true(bytes >= 0);
    void *scratch = test_memory_block((size_t)bytes);
    assert_result(apt_bk_backward(dv, dmask, dz, dre, dim, v, mask, rows, n, z, scratch, (size_t)bytes), APT_OK);
    free(scratch);
}

static const apt_bk points[] = {{0, 1}, {-1.5f, 0.3f}, {0.7f, -0.5f}, {2, 2}};

static void test_dense(void **state)
{
    (void)state;
    float v[MOST], mask[MOST], re[MOST], im[MOST];
    double v2[MOST], mask2[MOST];
    double complex want[MOST];
    for (int64_t n = 1; n <= MOST; n++)
        for (int32_t c = 0; c < 12; c++) {
            const apt_bk z = points[c / 3];
            const int32_t kind = c % 3;
            draw(v, mask, v2, mask2, n, kind, 5);
            forward(re, im, v, kind == 0 ? NULL : mask, 1, n, &z);
            dense(want, v2, kind == 0 ? NULL : mask2, n, z.re + I * z.im);
            for (int64_t i = 0; i < n; i++)
                test_near_value("G", cabs(re[i] + I * im[i] - want[i]) / cabs(want[i]), 0, 1e-6);
        }
}

static double point_loss(const double *v, const double *mask, int64_t n, double complex z, const float *dre, const float *dim)
{
    double complex g[MOST];
    double sum = 0;
    dense(g, v, mask, n, z);
    for (int64_t i = 0; i < n; i++) sum += dre[i] * creal(g[i]) + dim[i] * cimag(g[i]);
    return sum;
}

static void test_gradients(void **state)
{
    (void)state;
    enum { n = 17 };
    const double h = 1e-5;
    float v[n], mask[n], dre[n], dim[n], dv[n] = {0}, dmask[n] = {0}, want_v[n], want_mask[n];
    double v2[n], mask2[n], dz[2] = {0, 0};
    apt_rng rng = apt_rng_make(3, 0);
    for (int32_t i = 0; i < n; i++) dre[i] = 2 * uniform(&rng) - 1, dim[i] = 2 * uniform(&rng) - 1;
    const apt_bk z = {0.25f, 0.5f};
    const double complex at = z.re + I * z.im;
    draw(v, mask, v2, mask2, n, 2, 9);
    backward(dv, dmask, dz, dre, dim, v, mask, 1, n, &z);
    for (int32_t i = 0; i < 2 * n; i++) {
        double *x = i < n ? &v2[i] : &mask2[i - n];
        const double before = *x;
        *x = before + h;
        const double up = point_loss(v2, mask2, n, at, dre, dim);
        *x = before - h;
        const double down = point_loss(v2, mask2, n, at, dre, dim);
        *x = before;
        *(i < n ? &want_v[i] : &want_mask[i - n]) = (float)((up - down) / (2 * h));
    }
    test_near("dv", dv, want_v, n, 1e-5);
    test_near("dmask", dmask, want_mask, n, 1e-5);
    for (int32_t i = 0; i < 2; i++) {
        const double complex step = i == 0 ? h : I * h;
        const double slope = point_loss(v2, mask2, n, at + step, dre, dim) - point_loss(v2, mask2, n, at - step, dre, dim);
        test_near_value("dz", dz[i], slope / (2 * h), 1e-5 * (1 + fabs(dz[i])));
    }
}

/* G is written, gradients are added to what stands there. */
static void test_gradients_add_up(void **state)
{
    (void)state;
    enum { n = 5 };
    const float v[n] = {0.1f, -0.2f, 1, 0, 0.5f}, mask[n] = {1, 0.5f, 1, 0.25f, 1};
    const float dre[n] = {1, 0, 0, 2, 0}, dim[n] = {0, 1, 0, 0, -1};
    float dv[2][n] = {{0}, {1, 2, 3, 4, 5}}, dmask[2][n] = {{0}, {5, 4, 3, 2, 1}};
    double dz[2][2] = {{0, 0}, {7, 8}};
    for (int32_t k = 0; k < 2; k++) backward(dv[k], dmask[k], dz[k], dre, dim, v, mask, 1, n, NULL);
    for (int32_t i = 0; i < n; i++) {
        test_near_value("dv", dv[1][i], dv[0][i] + (float)(i + 1), 1e-6);
        test_near_value("dmask", dmask[1][i], dmask[0][i] + (float)(n - i), 1e-6);
    }
    test_near_value("dz", dz[1][0] - dz[0][0], 7, 1e-12);
    test_near_value("dz", dz[1][1] - dz[0][1], 8, 1e-12);
}

/* The ratios of the recursions in double, over the whole row at once. */
static void recursions(double complex *g, const double *v, const double *mask, int64_t n, double complex z)
{
    double complex left = 1, right = 1;
    for (int64_t i = 0; i < n; i++) {
        const double link = i > 0 ? mask[i - 1] * mask[i] : 0;
        left = -2 + v[i] - z - link / left;
        g[i] = left;
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        const double link = i + 1 < n ? mask[i] * mask[i + 1] : 0;
        right = -2 + v[i] - z - link / right;
        g[i] = 1 / (g[i] + right - (-2 + v[i] - z));
    }
}

typedef struct batch { int64_t rows, n; float *v, *mask, *re, *im, *dv, *dmask; double *v2, *mask2; double complex *want; } batch;

static batch make_batch(int64_t rows, int64_t n, int32_t kind)
{
    const size_t all = (size_t)(rows * n);
    batch b;
    b.rows = rows;
    b.n = n;
    b.v = (float *)test_memory_block(6 * all * sizeof(float));
    b.mask = b.v + all;
    b.re = b.mask + all;
    b.im = b.re + all;
    b.dv = b.im + all;
    b.dmask = b.dv + all;
    b.v2 = (double *)test_memory_block(2 * all * sizeof(double));
    b.mask2 = b.v2 + all;
    b.want = (double complex *)test_memory_block(all * sizeof *b.want);
    for (int64_t r = 0; r < rows; r++)
        draw(b.v + r * n, b.mask + r * n, b.v2 + r * n, b.mask2 + r * n, n, kind, (uint64_t)r);
    memset(b.dv, 0, 2 * all * sizeof(float));
    return b;
}

static void free_batch(const batch *b)
{
    free(b->v);
    free(b->v2);
    free(b->want);
}

static double complex complex_of(const apt_bk *z)
{
    return (double)z->re + I * (double)z->im;
}

/* Rows so long that they are cut, several of them, down to the smallest |im z|, where pieces overlap most and rounding is
   amplified most: 1e-6 there would leave nothing for a compiler that divides by approximations (-Ofast). */
static void test_cut_rows(void **state)
{
    (void)state;
    static const apt_bk far[] = {{0, 1}, {0.3f, -0.2f}, {-1.5f, 0.05f}, {0, 30}};
    for (int32_t c = 0; c < 8; c++) {
        const apt_bk z = far[c / 2];
        const int64_t n = c / 2 == 2 ? 100003 : 3001;
        const batch b = make_batch(3, n, 1 + c % 2);
        forward(b.re, b.im, b.v, b.mask, b.rows, n, &z);
        for (int64_t r = 0; r < b.rows; r++) recursions(b.want + r * n, b.v2 + r * n, b.mask2 + r * n, n, complex_of(&z));
        for (int64_t i = 0; i < b.rows * n; i++)
            test_near_value("G", cabs(b.re[i] + I * b.im[i] - b.want[i]) * fabs((double)z.im), 0, c / 2 == 2 ? 2e-6 : 1e-6);
        free_batch(&b);
    }
}

static double row_loss(const batch *b, const double *v, const double *mask, double complex z, const float *dre, const float *dim)
{
    double sum = 0;
    for (int64_t r = 0; r < b->rows; r++) {
        recursions(b->want, v + r * b->n, mask + r * b->n, b->n, z);
        for (int64_t i = 0; i < b->n; i++) sum += dre[r * b->n + i] * creal(b->want[i]) + dim[r * b->n + i] * cimag(b->want[i]);
    }
    return sum;
}

/* Gradients near every cut (a row of 1500 has three pieces of 500) and at the ends, against differences of the uncut row. */
static void test_cut_gradients(void **state)
{
    (void)state;
    enum { n = 1500, rows = 2, all = n * rows };
    const apt_bk z = {0.25f, 0.6f};
    const double h = 1e-5;
    const batch b = make_batch(rows, n, 2);
    float *dre = b.re, *dim = b.im;
    double dz[2] = {0, 0};
    apt_rng rng = apt_rng_make(8, 8);
    for (int32_t i = 0; i < all; i++) dre[i] = 2 * uniform(&rng) - 1, dim[i] = 2 * uniform(&rng) - 1;
    backward(b.dv, b.dmask, dz, dre, dim, b.v, b.mask, rows, n, &z);
    for (int32_t at = 0; at < all; at++) {
        if ((at + 3) % 500 > 6) continue;
        for (int32_t k = 0; k < 2; k++) {
            double *x = k == 0 ? &b.v2[at] : &b.mask2[at], slope[2];
            const double before = *x;
            for (int32_t side = 0; side < 2; side++) {
                *x = before + (side == 0 ? h : -h);
                slope[side] = row_loss(&b, b.v2, b.mask2, complex_of(&z), dre, dim);
            }
            *x = before;
            test_near_value(k == 0 ? "dv" : "dmask", k == 0 ? b.dv[at] : b.dmask[at], (slope[0] - slope[1]) / (2 * h), 2e-5);
        }
    }
    for (int32_t i = 0; i < 2; i++) {
        const double complex step = i == 0 ? h : I * h;
        const double up = row_loss(&b, b.v2, b.mask2, complex_of(&z) + step, dre, dim);
        const double down = row_loss(&b, b.v2, b.mask2, complex_of(&z) - step, dre, dim);
        test_near_value("dz", dz[i], (up - down) / (2 * h), 1e-5 * fabs(dz[i]) + 1e-4);
    }
    free_batch(&b);
}

/* The closed form of a constant diagonal d, at both ends and between, for a million positions: with mu the root of
   mu^2 - d mu + 1 inside the unit circle, G[i] = mu (1 - mu^2(i+1)) (1 - mu^2(n-i)) / ((1 - mu^2) (1 - mu^2(n+1))). */
static void test_constant_diagonal(void **state)
{
    (void)state;
    const int64_t n = 1000000;
    static const apt_bk where[] = {{0, 1}, {-1.25f, 0.5f}, {0.5f, -2}};
    float *v = (float *)test_memory_block(3 * (size_t)n * sizeof(float)), *re = v + n, *im = re + n;
    for (int64_t i = 0; i < n; i++) v[i] = 0.5f;
    for (int32_t c = 0; c < 3; c++) {
        const double complex d = -1.5 - complex_of(&where[c]), root = csqrt(d * d - 4);
        const double complex mu = cabs(d - root) < cabs(d + root) ? (d - root) / 2 : (d + root) / 2;
        forward(re, im, v, NULL, 1, n, &where[c]);
        for (int64_t i = 0; i < n; i++) {
            const double complex left = 1 - cpow(mu, 2.0 * (double)(i < 500 ? i + 1 : 500));
            const double complex right = 1 - cpow(mu, 2.0 * (double)(n - i < 500 ? n - i : 500));
            const double complex want = i >= 500 && n - i >= 500 ? mu / (1 - mu * mu) : mu * left * right / (1 - mu * mu);
            const double complex off = re[i] + I * im[i] - want;
            if (!(cabs(off) <= 1e-6 * cabs(want))) fail_msg("position %lld of case %d", (long long)i, (int)c);
        }
    }
    free(v);
}

/* Where theta and phi themselves would be 1e6^1e6 or 0, and with the largest and smallest potentials that are allowed. */
static void test_no_overflow(void **state)
{
    (void)state;
    const int64_t n = 1000000;
    float *v = (float *)test_memory_block(5 * (size_t)n * sizeof(float)), *re = v + n, *im = re + n, *dv = im + n, *one = dv + n;
    static const float size[] = {1e6f, 1e9f, 1, 1e-38f};
    for (int32_t c = 0; c < 4; c++) {
        for (int64_t i = 0; i < n; i++) {
            v[i] = i % 3 == 0 ? size[c] : i % 3 == 1 ? -size[c] : c == 0 ? size[c] : 0;
            one[i] = 1;
            dv[i] = 0;
        }
        double dz[2] = {0, 0};
        forward(re, im, v, NULL, 1, n, NULL);
        backward(dv, NULL, dz, one, one, v, NULL, 1, n, NULL);
        for (int64_t i = 0; i < n; i++) {
            if (!test_finite(re[i]) || !test_finite(im[i]) || !test_finite(dv[i]))
                fail_msg("v of %g, position %lld", (double)size[c], (long long)i);
            if (c == 0) test_near_value("G", re[i] * (v[i] - 2), 1, 1e-5);
        }
        assert_true(test_finite((float)dz[0]) && test_finite((float)dz[1]));
    }
    free(v);
}

/* Unmasked positions get the diagonal of what remains: each run of them is a row of its own. A masked one stands alone. Up to
   two units in the last place: -Ofast divides by approximations. */
static void test_sparse_form(void **state)
{
    (void)state;
    enum { n = 50 };
    float v[n], mask[n], re[n], im[n], part_re[n], part_im[n], single_re, single_im;
    double v2[n], mask2[n];
    draw(v, mask, v2, mask2, n, 1, 21);
    forward(re, im, v, mask, 1, n, NULL);
    for (int32_t from = 0, to; from < n; from = to) {
        for (to = from + 1; to < n && mask[from] > 0.5f && mask[to] > 0.5f;) to++;
        forward(part_re, part_im, v + from, NULL, 1, to - from, NULL);
        for (int32_t i = from; i < to; i++) {
            test_near_value("re", re[i], part_re[i - from], 2.5e-7);
            test_near_value("im", im[i], part_im[i - from], 2.5e-7);
            if (mask[i] > 0.5f) continue;
            const double complex alone = 1 / (v2[i] - 2 - I);
            single_re = (float)creal(alone);
            single_im = (float)cimag(alone);
            test_near_value("re of a masked position", re[i], single_re, 2.5e-7);
            test_near_value("im of a masked position", im[i], single_im, 2.5e-7);
        }
    }
}

/* A row of a batch is what it is alone, bit for bit: its neighbours' masks and potentials do not matter. */
static void test_rows_are_independent(void **state)
{
    (void)state;
    for (int64_t n = 30; n < 3000; n = n * 7 + 3) {
        const batch b = make_batch(37, n, 1);
        float *re = (float *)test_memory_block(4 * (size_t)n * sizeof(float)), *im = re + n, *dv = im + n, *dmask = dv + n;
        forward(b.re, b.im, b.v, b.mask, b.rows, n, NULL);
        backward(b.dv, b.dmask, NULL, b.re, b.im, b.v, b.mask, b.rows, n, NULL);
        for (int64_t r = 0; r < b.rows; r++) {
            const size_t bytes = (size_t)n * sizeof(float);
            memset(dv, 0, 2 * bytes);
            forward(re, im, b.v + r * n, b.mask + r * n, 1, n, NULL);
            assert_memory_equal(re, b.re + r * n, bytes);
            assert_memory_equal(im, b.im + r * n, bytes);
            backward(dv, dmask, NULL, re, im, b.v + r * n, b.mask + r * n, 1, n, NULL);
            assert_memory_equal(dv, b.dv + r * n, bytes);
            assert_memory_equal(dmask, b.dmask + r * n, bytes);
        }
        free(re);
        free_batch(&b);
    }
}

static uint64_t hash(uint64_t h, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return h;
}

/* One number for all bits of a forward and a backward of seven rows, two of whose pieces are cut. With ctx: on its threads. */
static uint64_t bits_of(apt_ctx *ctx)
{
    const int64_t n = 1100;
    const apt_bk z = {0.5f, 0.75f};
    const batch b = make_batch(7, n, 1);
    const size_t bytes = (size_t)(b.rows * n) * sizeof(float);
    double dz[2] = {0, 0};
    if (ctx == NULL) {
        forward(b.re, b.im, b.v, b.mask, b.rows, n, &z);
        backward(b.dv, b.dmask, dz, b.re, b.im, b.v, b.mask, b.rows, n, &z);
    }
#ifndef APT_ONLY_CORE
    else {
        assert_ok(ctx, apt_bk_forward_threads(ctx, b.re, b.im, b.v, b.mask, b.rows, n, &z));
        assert_ok(ctx, apt_bk_backward_threads(ctx, b.dv, b.dmask, dz, b.re, b.im, b.v, b.mask, b.rows, n, &z));
    }
#endif
    const float *const all[] = {b.re, b.im, b.dv, b.dmask};
    uint64_t h = 0xcbf29ce484222325u;
    for (int32_t i = 0; i < 4; i++) h = hash(h, all[i], bytes);
    h = hash(h, dz, sizeof dz);
    free_batch(&b);
    return h;
}

/* The same bits on 1, 2, 3 and 8 threads and in the calling thread; and, where the compiler keeps to IEEE operations, in every
   build, that with APT_ONLY_CORE among them: hence a constant. */
static void test_same_bits(void **state)
{
    (void)state;
    const uint64_t alone = bits_of(NULL);
#ifndef APT_ONLY_CORE
    static const int32_t threads[] = {1, 2, 3, 8};
    for (int32_t t = 0; t < 4; t++) {
        apt_ctx *ctx = test_context(threads[t], NULL);
        assert_true(bits_of(ctx) == alone);
        apt_destroy(ctx);
    }
#endif
#if defined(__x86_64__) && !defined(__FAST_MATH__) && !defined(__FMA__) && FLT_EVAL_METHOD == 0
    if (alone != 0x6e1de07fbfd3867au) fail_msg("bits of this build: %016llx", (unsigned long long)alone);
#endif
}

static void test_core_refuses(void **state)
{
    (void)state;
    float v[4] = {0, 1, 2, 3}, mask[4] = {1, 0, 1, 1}, out[4], out2[4], dv[4] = {0};
    char scratch[1 << 17];
    const apt_bk real = {0, 0.01f}, far = {2e6f, 1}, nan = {NAN, 1}, standard = {0, 0};
    assert_true(apt_bk_scratch(1, 4, NULL) > 0 && apt_bk_scratch(1, 4, NULL) == apt_bk_scratch(1, 4, &standard));
    assert_true(apt_bk_scratch(-1, 4, NULL) < 0 && apt_bk_scratch(1, -4, NULL) < 0 && apt_bk_scratch(INT64_MAX, 2, NULL) < 0);
    assert_true(apt_bk_scratch(1, 4, &real) < 0 && apt_bk_scratch(1, 4, &far) < 0 && apt_bk_scratch(1, 4, &nan) < 0);
    assert_true(apt_bk_scratch(INT64_MAX / 64, 1, NULL) != 0);
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, &real, scratch, sizeof scratch), APT_E_RANGE);
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, &nan, scratch, sizeof scratch), APT_E_NONFINITE);
    assert_result(apt_bk_forward(out, NULL, v, mask, 1, 4, NULL, scratch, sizeof scratch), APT_E_ARGUMENT);
    assert_result(apt_bk_forward(out, out2, NULL, mask, 1, 4, NULL, scratch, sizeof scratch), APT_E_ARGUMENT);
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, NULL, scratch, 16), APT_E_SCRATCH);
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, NULL, NULL, sizeof scratch), APT_E_SCRATCH);
    assert_result(apt_bk_forward(out, out2, v, mask, 0, 4, NULL, NULL, 0), APT_OK);
    assert_result(apt_bk_forward(NULL, NULL, NULL, NULL, 1, 0, NULL, NULL, 0), APT_OK);
    assert_result(apt_bk_backward(dv, out, NULL, out, out2, v, NULL, 1, 4, NULL, scratch, sizeof scratch), APT_E_ARGUMENT);
    mask[1] = 1.5f;
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, NULL, scratch, sizeof scratch), APT_E_RANGE);
    mask[1] = NAN;
    assert_result(apt_bk_forward(out, out2, v, mask, 1, 4, NULL, scratch, sizeof scratch), APT_E_NONFINITE);
    v[2] = 1.1e9f;
    assert_result(apt_bk_forward(out, out2, v, NULL, 1, 4, NULL, scratch, sizeof scratch), APT_E_RANGE);
    v[2] = INFINITY;
    assert_result(apt_bk_forward(out, out2, v, NULL, 1, 4, NULL, scratch, sizeof scratch), APT_E_NONFINITE);
    v[2] = 0;
    const float bad[4] = {0, NAN, 0, 0};
    assert_result(apt_bk_backward(dv, NULL, NULL, v, bad, v, NULL, 1, 4, NULL, scratch, sizeof scratch), APT_E_NONFINITE);
    for (int32_t i = 0; i < 4; i++) assert_true(dv[i] <= 0 && dv[i] >= 0);
}

/* ------------------------------------------------------------------------------------------------ losses on a mask */

static double loss_of(int32_t kind, double s, double target)
{
    const double e = s - target;
    if (kind == APT_SPARSITY_L2) return e * e;
    if (kind == APT_SPARSITY_L1) return fabs(e);
    if (kind == APT_SPARSITY_HUBER) return fabs(e) <= 0.1 ? e * e / 2 : 0.1 * (fabs(e) - 0.05);
    return target * log(target / s) + (1 - target) * log((1 - target) / (1 - s));
}

/* Values by the formulas, slopes by differences of them, below and above the target and on both branches of Huber's. */
static void test_losses(void **state)
{
    (void)state;
    enum { n = 5 };
    static const float targets[] = {0.05f, 0.3f, 0.42f, 0.5f, 0.9f};
    const float mask[n] = {0.9f, 0.5f, 0.75f, 0.25f, 0.4f};              /* sparsity 0.44 */
    const double s = 1 - 2.8 / n, h = 1e-6;
    for (int32_t kind = APT_SPARSITY_L2; kind <= APT_SPARSITY_HUBER; kind++)
        for (int32_t t = 0; t < 5; t++) {
            const double target = (double)targets[t];
            double loss;
            float grad[n] = {1, 2, 3, 4, 5};
            assert_result(apt_sparsity_loss(&loss, grad, mask, n, kind, targets[t], 3), APT_OK);
            test_near_value(apt_sparsity_kind_name(kind), loss, loss_of(kind, s, target), 1e-7);
            const double slope = (loss_of(kind, s + h, target) - loss_of(kind, s - h, target)) / (2 * h);
            for (int32_t i = 0; i < n; i++) test_near_value("slope", grad[i], i + 1 - 3 * slope / n, 2e-6);
            assert_result(apt_sparsity_loss(&loss, NULL, mask, n, kind, targets[t], 3), APT_OK);
        }
}

/* KL has no minimum when the target is 0 or 1: then it is L2. A mask of only zeros or ones is read as almost that, with L2's
   slope, which points the right way. */
static void test_kl_ends(void **state)
{
    (void)state;
    const float none[2] = {1, 1}, all[2] = {0, 0}, half[2] = {1, 0};
    const float *const masks[3] = {none, all, half};
    for (int32_t m = 0; m < 3; m++)
        for (int32_t end = 0; end < 2; end++) {
            double kl, l2;
            float grad[2][2] = {{0, 0}, {0, 0}};
            assert_result(apt_sparsity_loss(&kl, grad[0], masks[m], 2, APT_SPARSITY_KL, (float)end, 1), APT_OK);
            assert_result(apt_sparsity_loss(&l2, grad[1], masks[m], 2, APT_SPARSITY_L2, (float)end, 1), APT_OK);
            test_near_value("KL at a target at the end", kl, l2, 0);
            assert_memory_equal(grad[0], grad[1], sizeof grad[0]);
        }
    double loss;
    float grad[2] = {0, 0};
    assert_result(apt_sparsity_loss(&loss, grad, none, 2, APT_SPARSITY_KL, 0.25f, 1), APT_OK);
    test_near_value("KL at sparsity 0", loss, loss_of(APT_SPARSITY_KL, 1e-6, 0.25), 1e-9);
    test_near_value("slope at sparsity 0", grad[0], 0.25, 1e-7);
    grad[0] = 0;
    assert_result(apt_sparsity_loss(&loss, grad, all, 2, APT_SPARSITY_KL, 0.25f, 1), APT_OK);
    test_near_value("KL at sparsity 1", loss, loss_of(APT_SPARSITY_KL, 1 - 1e-6, 0.25), 1e-9);
    test_near_value("slope at sparsity 1", grad[0], -0.75, 1e-7);
    assert_result(apt_sparsity_loss(&loss, NULL, half, 2, APT_SPARSITY_KL, 0.5f, 1), APT_OK);
    test_near_value("KL at the target", loss, 0, 1e-12);
}

static void test_losses_refuse(void **state)
{
    (void)state;
    const float mask[2] = {1, 0}, above[2] = {1, 1.5f}, below[2] = {-0.5f, 1}, nan[2] = {1, NAN};
    double loss = 0;
    int32_t kind = -1;
    char message[128];
    assert_result(apt_sparsity_loss(&loss, NULL, above, 2, 0, 0.5f, 1), APT_E_RANGE);
    assert_result(apt_sparsity_loss(&loss, NULL, below, 2, 0, 0.5f, 1), APT_E_RANGE);
    assert_result(apt_sparsity_loss(&loss, NULL, nan, 2, 0, 0.5f, 1), APT_E_NONFINITE);
    assert_result(apt_sparsity_loss(&loss, NULL, mask, 2, 0, NAN, 1), APT_E_NONFINITE);
    assert_result(apt_sparsity_loss(&loss, NULL, mask, 2, 0, 1.5f, 1), APT_E_RANGE);
    assert_result(apt_sparsity_loss(&loss, NULL, mask, 2, 0, 0.5f, INFINITY), APT_E_NONFINITE);
    assert_result(apt_sparsity_loss(&loss, NULL, mask, 0, 0, 0.5f, 1), APT_E_ARGUMENT);
    assert_result(apt_sparsity_loss(&loss, NULL, NULL, 2, 0, 0.5f, 1), APT_E_ARGUMENT);
    assert_result(apt_sparsity_loss(NULL, NULL, mask, 2, 0, 0.5f, 1), APT_E_ARGUMENT);
    assert_result(apt_sparsity_loss(&loss, NULL, mask, 2, 4, 0.5f, 1), APT_E_ARGUMENT);
    assert_null(apt_sparsity_kind_name(4));
    for (int32_t k = 0; k < 4; k++) {
        assert_result(apt_sparsity_kind_from_name(apt_sparsity_kind_name(k), &kind, message, sizeof message), APT_OK);
        assert_int_equal(kind, k);
    }
    assert_result(apt_sparsity_kind_from_name("l3", &kind, message, sizeof message), APT_E_ARGUMENT);
    assert_string_equal(message, "unknown sparsity loss 'l3'; supported: l2, l1, kl, huber");
    assert_result(apt_adaptive_kind_from_name("cubic", &kind, message, sizeof message), APT_E_ARGUMENT);
    assert_string_equal(message, "unknown schedule 'cubic'; supported: linear, cosine, step");
    assert_result(apt_adaptive_kind_from_name("step", &kind, NULL, 0), APT_OK);
    assert_int_equal(kind, APT_ADAPTIVE_STEP);
}

static void test_balanced(void **state)
{
    (void)state;
    apt_balanced b;
    assert_result(apt_balanced_loss(&b, 2.5, 0.25, 0.5, 8), APT_OK);
    const double got[] = {b.accuracy,      b.sparsity,      b.accuracy_weight, b.sparsity_weight,
                          b.accuracy_part, b.sparsity_part, b.total};
    const double want[] = {2.5, 0.25, 0.5, 8, 1.25, 2, 3.25};
    for (int32_t i = 0; i < 7; i++) test_near_value("part", got[i], want[i], 0);
    assert_result(apt_balanced_loss(&b, 1, 1, -1, 1), APT_E_RANGE);
    assert_result(apt_balanced_loss(&b, 1, 1, 1, -1), APT_E_RANGE);
    assert_result(apt_balanced_loss(&b, NAN, 1, 1, 1), APT_E_NONFINITE);
    assert_result(apt_balanced_loss(&b, 1, 1, 1, INFINITY), APT_E_NONFINITE);
    assert_result(apt_balanced_loss(NULL, 1, 1, 1, 1), APT_E_ARGUMENT);
}

/* ------------------------------------------------------------------------------------------------ the scheduler */

static double share_of(int32_t kind, double u)
{
    if (u < 0) u = 0;
    if (u > 1) u = 1;
    if (kind == APT_ADAPTIVE_LINEAR) return u;
    if (kind == APT_ADAPTIVE_COSINE) return (1 - cos(acos(-1) * u)) / 2;
    return u >= 0.75 ? 1 : u >= 0.5 ? 0.67 : u >= 0.25 ? 0.33 : 0;
}

/* Defaults, the three curves at every step, and that a step may be asked for in any order. */
static void test_schedule_curves(void **state)
{
    (void)state;
    for (int32_t kind = APT_ADAPTIVE_LINEAR; kind <= APT_ADAPTIVE_STEP; kind++) {
        apt_adaptive_desc desc = APT_ZERO;
        apt_adaptive a;
        desc.kind = kind;
        desc.steps = 1400;
        assert_result(apt_adaptive_init(&a, &desc), APT_OK);
        assert_true(a.desc.warmup == 1000);
        for (int64_t step = 1500; step >= 0; step -= 20) {
            const double share = share_of(kind, (double)(step - 1000) / 400);
            assert_result(apt_adaptive_step(&a, step, NULL), APT_OK);
            test_near_value("target", a.target, 0.2 + 0.3 * share, 1e-7);
            test_near_value("weight", a.weight, 0.001 + 0.009 * share, 1e-8);
        }
        desc.warmup = -5;
        desc.sparsity_first = 0.1f;
        desc.sparsity_last = 0.7f;
        desc.weight_first = 2;
        desc.weight_last = 1;
        assert_result(apt_adaptive_init(&a, &desc), APT_OK);
        test_near_value("target at once", a.target, 0.1, 1e-7);
        assert_result(apt_adaptive_step(&a, 700, NULL), APT_OK);
        test_near_value("target without warm-up", a.target, 0.1 + 0.6 * share_of(kind, 0.5), 1e-7);
        test_near_value("falling weight", a.weight, 2 - share_of(kind, 0.5), 1e-6);
    }
}

static void test_schedule_eases(void **state)
{
    (void)state;
    apt_adaptive_desc desc = APT_ZERO;
    apt_adaptive a;
    desc.steps = 110;
    desc.warmup = 10;
    desc.threshold = 2;
    const double good = 1.5, bad = 2.5, at = 2, better = 1;
    assert_result(apt_adaptive_init(&a, &desc), APT_OK);
    assert_result(apt_adaptive_step(&a, 60, &good), APT_OK);
    test_near_value("target", a.target, 0.35, 1e-7);
    assert_true(a.best_step == 60 && a.validations == 1 && a.eased == 0);
    assert_result(apt_adaptive_step(&a, 60, &bad), APT_OK);
    test_near_value("eased target", a.target, 0.9 * 0.35, 1e-7);
    test_near_value("eased weight", a.weight, 0.5 * 0.0055, 1e-8);
    assert_result(apt_adaptive_step(&a, 70, NULL), APT_OK);
    test_near_value("still eased", a.target, 0.9 * 0.38, 1e-7);
    assert_result(apt_adaptive_step(&a, 80, &at), APT_OK);
    test_near_value("at the threshold nothing is eased", a.target, 0.41, 1e-7);
    test_near_value("best", a.best, 1.5, 0);
    assert_result(apt_adaptive_step(&a, 90, &better), APT_OK);
    test_near_value("best", a.best, 1, 0);
    assert_true(a.best_step == 90 && a.validations == 4 && a.eased_count == 1);
    assert_result(apt_adaptive_reset(&a), APT_OK);
    assert_true(a.step == 0 && a.validations == 0 && a.eased_count == 0 && a.desc.steps == 110);
    test_near_value("target", a.target, 0.2, 1e-7);
}

/* Bytes saved in the middle of an easing go on as the run itself does; any other bytes are refused. */
static void test_schedule_saved(void **state)
{
    (void)state;
    apt_adaptive_desc desc = APT_ZERO;
    apt_adaptive a, b;
    unsigned char bytes[APT_ADAPTIVE_BYTES], damaged[APT_ADAPTIVE_BYTES];
    const double good = 0.1, bad = 3;
    desc.kind = APT_ADAPTIVE_COSINE;
    desc.steps = 50;
    desc.warmup = 5;
    desc.threshold = 0.5f;
    assert_result(apt_adaptive_init(&a, &desc), APT_OK);
    assert_result(apt_adaptive_step(&a, 20, &good), APT_OK);
    assert_result(apt_adaptive_step(&a, 30, &bad), APT_OK);
    assert_result(apt_adaptive_save(&a, bytes, sizeof bytes), APT_OK);
    memset(&b, 0xff, sizeof b);
    assert_result(apt_adaptive_restore(&b, bytes, sizeof bytes), APT_OK);
    for (int64_t step = 30; step < 60; step++) {
        unsigned char one[APT_ADAPTIVE_BYTES], two[APT_ADAPTIVE_BYTES];
        const double *validation = step % 10 == 5 ? &good : NULL;
        assert_true(memcmp(&a.target, &b.target, sizeof a.target) == 0 && memcmp(&a.weight, &b.weight, sizeof a.weight) == 0);
        assert_true(memcmp(&a.best, &b.best, sizeof a.best) == 0 && a.best_step == b.best_step && a.eased == b.eased);
        assert_result(apt_adaptive_save(&a, one, sizeof one), APT_OK);
        assert_result(apt_adaptive_save(&b, two, sizeof two), APT_OK);
        assert_memory_equal(one, two, sizeof one);
        assert_result(apt_adaptive_step(&a, step, validation), APT_OK);
        assert_result(apt_adaptive_step(&b, step, validation), APT_OK);
    }
    for (size_t i = 0; i < sizeof bytes; i++) {
        memcpy(damaged, bytes, sizeof bytes);
        damaged[i] ^= 16;
        assert_result(apt_adaptive_restore(&b, damaged, sizeof damaged), i < 8 ? APT_E_FORMAT : APT_E_CHECKSUM);
    }
    assert_result(apt_adaptive_restore(&b, bytes, sizeof bytes - 1), APT_E_FORMAT);
    assert_result(apt_adaptive_save(&a, bytes, sizeof bytes - 1), APT_E_SCRATCH);
    assert_true(b.step == 59);                                   /* what was refused changed nothing */
}

static void test_schedule_refuses(void **state)
{
    (void)state;
    apt_adaptive a;
    const double nan = NAN;
    apt_adaptive_desc good = APT_ZERO;
    good.steps = 10;
    good.warmup = 2;
    for (int32_t c = 0; c < 13; c++) {
        static const apt_result want[] = {APT_E_ARGUMENT, APT_E_RANGE, APT_E_RANGE, APT_E_RANGE, APT_E_RANGE, APT_E_RANGE,
                                          APT_E_RANGE, APT_E_RANGE, APT_E_RANGE, APT_E_RANGE, APT_E_NONFINITE, APT_E_NONFINITE,
                                          APT_E_NONFINITE};
        apt_adaptive_desc d = good;
        switch (c) {
            case 0: d.kind = 3; break;
            case 1: d.steps = 0; break;
            case 2: d.warmup = 10; break;
            case 3: d.warmup = 0; break;                         /* the default is longer than the run */
            case 4: d.sparsity_first = -0.1f; break;
            case 5: d.sparsity_first = 1; break;
            case 6: d.sparsity_last = 1; break;
            case 7: d.weight_first = -1; break;
            case 8: d.weight_last = -1; break;
            case 9: d.threshold = -1; break;
            case 10: d.sparsity_last = NAN; break;
            case 11: d.weight_last = INFINITY; break;
            default: d.threshold = NAN; break;
        }
        assert_result(apt_adaptive_init(&a, &d), want[c]);
    }
    assert_result(apt_adaptive_init(&a, &good), APT_OK);
    assert_result(apt_adaptive_step(&a, -1, NULL), APT_E_RANGE);
    assert_result(apt_adaptive_step(&a, 1, &nan), APT_E_NONFINITE);
    assert_true(a.step == 0 && a.validations == 0);
    memset(&a, 0, sizeof a);
    assert_result(apt_adaptive_step(&a, 1, NULL), APT_E_RANGE);  /* never made */
    assert_result(apt_adaptive_reset(&a), APT_E_RANGE);
}

static void test_expert_count(void **state)
{
    (void)state;
    const apt_expert_schedule s = {8, 2, 100, 400};
    int32_t count, last = 8;
    for (int64_t step = -50; step < 500; step++) {
        assert_result(apt_expert_count(&s, step, &count), APT_OK);
        if (step <= 100) assert_int_equal(count, 8);
        else if (step >= 400) assert_int_equal(count, 2);
        else assert_int_equal(count, (int32_t)ceil(8 - 6 * (double)(step - 100) / 300 - 1e-9));
        assert_true(count <= last);
        last = count;
    }
    const apt_expert_schedule at_once = {5, 3, 7, 7}, none = {4, 0, 0, 1}, rising = {2, 3, 0, 1}, back = {3, 2, 2, 1};
    assert_result(apt_expert_count(&at_once, 6, &count), APT_OK);
    assert_int_equal(count, 5);
    assert_result(apt_expert_count(&at_once, 7, &count), APT_OK);
    assert_int_equal(count, 3);
    assert_result(apt_expert_count(&none, 0, &count), APT_E_RANGE);
    assert_result(apt_expert_count(&rising, 0, &count), APT_E_RANGE);
    assert_result(apt_expert_count(&back, 0, &count), APT_E_RANGE);
    assert_result(apt_expert_count(NULL, 0, &count), APT_E_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),
#ifndef __SANITIZE_THREAD__                      /* one thread cannot race */
        cmocka_unit_test(test_dense), cmocka_unit_test(test_gradients), cmocka_unit_test(test_gradients_add_up),
        cmocka_unit_test(test_cut_rows), cmocka_unit_test(test_cut_gradients), cmocka_unit_test(test_constant_diagonal),
        cmocka_unit_test(test_no_overflow), cmocka_unit_test(test_sparse_form), cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_core_refuses), cmocka_unit_test(test_losses),
        cmocka_unit_test(test_kl_ends), cmocka_unit_test(test_losses_refuse), cmocka_unit_test(test_balanced),
        cmocka_unit_test(test_schedule_curves), cmocka_unit_test(test_schedule_eases), cmocka_unit_test(test_schedule_saved),
        cmocka_unit_test(test_schedule_refuses), cmocka_unit_test(test_expert_count),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
