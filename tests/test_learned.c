/* Learned sparsity: the BK-core against a dense complex inverse, its gradients, cut rows and threads; the losses on a mask.
   build: cc -std=c11 -O2 tests/test_learned.c -o test_learned -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include <complex.h>

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

/* kind 0: no mask, 1: of 0 and 1, 2: values between */
static void draw(float *v, float *mask, double *v2, double *mask2, int64_t n, int32_t kind, uint64_t seed)
{
    apt_rng rng = apt_rng_make(seed, (uint64_t)(n * 3 + kind));
    for (int64_t i = 0; i < n; i++) {
        v2[i] = v[i] = apt_rng_normal(&rng);
        const float u = (float)(apt_rng_next(&rng) >> 40) / 16777216.0f;
        mask2[i] = mask[i] = kind == 1 ? (u > 0.4f ? 1.0f : 0.0f) : 0.05f + 0.9f * u;
    }
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
            const int64_t bytes = apt_bk_scratch(1, n, &z);
            assert_true(bytes >= 0);
            void *scratch = test_memory_block((size_t)bytes);
            assert_result(apt_bk_forward(re, im, v, kind == 0 ? NULL : mask, 1, n, &z, scratch, (size_t)bytes), APT_OK);
            free(scratch);
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
    for (int32_t i = 0; i < n; i++) dre[i] = apt_rng_normal(&rng), dim[i] = apt_rng_normal(&rng);
    const apt_bk z = {0.25f, 0.5f};
    const double complex at = z.re + I * z.im;
    draw(v, mask, v2, mask2, n, 2, 9);
    const size_t bytes = (size_t)apt_bk_scratch(1, n, &z);
    void *scratch = test_memory_block(bytes);
    assert_result(apt_bk_backward(dv, dmask, dz, dre, dim, v, mask, 1, n, &z, scratch, bytes), APT_OK);
    free(scratch);
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

/* Far from both ends of a constant row stands the value of the infinite chain. */
static void test_long_row(void **state)
{
    (void)state;
    const int64_t n = 1000000;
    float *v = (float *)test_memory_block((size_t)n * sizeof(float));
    float *got[6];
    for (int32_t i = 0; i < 6; i++) got[i] = (float *)test_memory_block((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) v[i] = 0.5f;
    for (int32_t t = 0; t < 3; t++) {
        apt_ctx *ctx = test_context(t + 1, NULL);
        assert_ok(ctx, apt_bk_forward_threads(ctx, got[2 * t], got[2 * t + 1], v, NULL, 1, n, NULL));
        apt_destroy(ctx);
        assert_memory_equal(got[2 * t], got[0], (size_t)n * sizeof(float));
        assert_memory_equal(got[2 * t + 1], got[1], (size_t)n * sizeof(float));
    }
    const double complex d = -1.5 - I, root = csqrt(d * d - 4);
    const double complex want = 1 / (cabs(d + root) > cabs(d - root) ? root : -root);
    for (int64_t i = 1000; i < n - 1000; i++)
        if (cabs(got[0][i] + I * got[1][i] - want) > 1e-6 * cabs(want)) fail_msg("position %lld", (long long)i);
    for (int32_t i = 0; i < 6; i++) free(got[i]);
    free(v);
}

static void test_losses(void **state)
{
    (void)state;
    const float mask[4] = {0.9f, 0.5f, 0.75f, 0.25f};
    for (int32_t kind = APT_SPARSITY_L2; kind <= APT_SPARSITY_HUBER; kind++) {
        const double h = 1e-3;
        double loss[3];
        float grad[4] = {0}, moved[4];
        assert_non_null(apt_sparsity_kind_name(kind));
        assert_result(apt_sparsity_loss(&loss[0], grad, mask, 4, kind, 0.2f, 2), APT_OK);
        for (int32_t i = 0; i < 4; i++)
            for (int32_t side = 1; side < 3; side++) {
                memcpy(moved, mask, sizeof mask);
                moved[i] += side == 1 ? (float)h : (float)-h;
                assert_result(apt_sparsity_loss(&loss[side], NULL, moved, 4, kind, 0.2f, 1), APT_OK);
                if (side == 2) test_near_value("slope", grad[i], 2 * (loss[1] - loss[2]) / (2 * h), 2e-4);
            }
        const float bad = 1.5f;
        assert_result(apt_sparsity_loss(&loss[0], NULL, &bad, 1, kind, 0.2f, 1), APT_E_RANGE);
    }
    assert_null(apt_sparsity_kind_name(4));
}

static void test_schedule(void **state)
{
    (void)state;
    apt_adaptive_desc desc = APT_ZERO;
    desc.steps = 110;
    desc.warmup = 10;
    desc.threshold = 2;
    for (int32_t kind = APT_ADAPTIVE_LINEAR; kind <= APT_ADAPTIVE_STEP; kind++) {
        apt_adaptive a, b;
        unsigned char bytes[APT_ADAPTIVE_BYTES];
        const double middle = kind == APT_ADAPTIVE_STEP ? 0.67 : 0.5, bad = 3, good = 1;
        desc.kind = kind;
        assert_result(apt_adaptive_init(&a, &desc), APT_OK);
        assert_result(apt_adaptive_step(&a, 10, NULL), APT_OK);
        test_near_value("start", a.target, 0.2, 1e-6);
        assert_result(apt_adaptive_step(&a, 60, &bad), APT_OK);
        test_near_value("eased", a.target, 0.9 * (0.2 + 0.3 * middle), 1e-6);
        assert_result(apt_adaptive_step(&a, 110, &good), APT_OK);
        test_near_value("end", a.target, 0.5, 1e-6);
        assert_true(a.best_step == 110 && a.eased_count == 1);
        assert_result(apt_adaptive_save(&a, bytes, sizeof bytes), APT_OK);
        assert_result(apt_adaptive_restore(&b, bytes, sizeof bytes), APT_OK);
        assert_true(b.step == 110 && b.validations == 2);
        bytes[50] ^= 1;
        assert_result(apt_adaptive_restore(&b, bytes, sizeof bytes), APT_E_CHECKSUM);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_dense), cmocka_unit_test(test_gradients),
                                       cmocka_unit_test(test_long_row), cmocka_unit_test(test_losses),
                                       cmocka_unit_test(test_schedule)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
