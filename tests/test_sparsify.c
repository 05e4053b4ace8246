/* Magnitude pruning: selection against sorting, patterns, masks of any length, compressed matrices and their product; masks in
   models, through training, compaction, merging, checkpoints and folders; hostile files; iterative pruning.
   build: cc -std=c11 -O2 tests/test_sparsify.c -o test_sparsify -lcmocka -lpthread -lm     (-DAPT_ONLY_CORE: raw arrays only) */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

/* ---- raw arrays ----------------------------------------------------------------------------------------------------- */

static float not_a_number(void)
{
    return apti_float(0x7fc00000u);
}

static uint64_t *mask_block(int64_t n)
{
    uint64_t *mask = (uint64_t *)test_memory_block((size_t)(apt_bitmask_words(n) + 1) * sizeof(uint64_t));
    memset(mask, 0xa5, (size_t)(apt_bitmask_words(n) + 1) * sizeof(uint64_t));
    return mask;
}

/* Bits behind the last weight are 0, and the word behind the mask is as it was. */
static void check_tail(const uint64_t *mask, int64_t n)
{
    for (int64_t i = n; i < 64 * apt_bitmask_words(n); i++) assert_int_equal(mask[i / 64] >> i % 64 & 1, 0);
    assert_true(mask[apt_bitmask_words(n)] == 0xa5a5a5a5a5a5a5a5u);
}

typedef struct ranked { float size; int64_t index; } ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = (const ranked *)a, *y = (const ranked *)b;
    if (x->size < y->size || x->size > y->size) return x->size < y->size ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

/* The definition: sort by (|w|, index), the first floor(n*sparsity) go. */
static void check_selected(const float *w, const uint64_t *mask, int64_t n, double sparsity)
{
    ranked *all = (ranked *)test_memory_block((size_t)n * sizeof(ranked));
    for (int64_t i = 0; i < n; i++) {
        all[i].size = fabsf(w[i]);
        all[i].index = i;
    }
    qsort(all, (size_t)n, sizeof(ranked), by_rank);
    const int64_t gone = (int64_t)floor((double)n * sparsity);
    for (int64_t i = 0; i < n; i++)
        if ((int64_t)(mask[all[i].index / 64] >> all[i].index % 64 & 1) != (i >= gone))
            fail_msg("n %lld, sparsity %g: weight %lld (%g), rank %lld, %lld go", (long long)n, sparsity, (long long)all[i].index,
                     (double)all[i].size, (long long)i, (long long)gone);
    free(all);
}

/* Weights of many kinds: normal, with many ties, all the same, tiny ones, all zero, of every size there is. */
enum { KINDS = 6 };
static void fill(float *w, int64_t n, int32_t kind, uint64_t seed)
{
    apt_rng rng = apt_rng_make(seed, (uint64_t)kind);
    for (int64_t i = 0; i < n; i++) {
        const float x = apt_rng_normal(&rng);
        const uint32_t bits = (uint32_t)apt_rng_next(&rng);
        switch (kind) {
        case 0: w[i] = x; break;
        case 1: w[i] = 0.25f * (float)(int32_t)(3 * x); break;
        case 2: w[i] = bits & 1 ? 0.5f : -0.5f; break;
        case 3: w[i] = 1e-30f * x; break;
        case 4: w[i] = bits & 1 ? 0.0f : -0.0f; break;
        default: w[i] = apti_finite(apti_float(bits)) ? apti_float(bits) : 1.0f; break;
        }
    }
}

static void test_selection(void **state)
{
    (void)state;
    static const int64_t sizes[] = {0, 1, 2, 10, 63, 64, 65, 128, 1000, 4097};
    static const double sparsities[] = {0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.999};
    float *w = (float *)test_memory_block(4097 * sizeof(float));
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
        for (int32_t kind = 0; kind < KINDS; kind++)
            for (size_t k = 0; k < sizeof(sparsities) / sizeof(sparsities[0]); k++) {
                const int64_t n = sizes[s];
                uint64_t *mask = mask_block(n);
                int64_t zeros = -1;
                fill(w, n, kind, 7);
                assert_result(apt_magnitude_sparsity(NULL, mask, &zeros, w, n, sparsities[k]), APT_OK);
                assert_int_equal(zeros, (int64_t)floor((double)n * sparsities[k]));
                assert_int_equal(apt_bitmask_kept(mask, n), n - zeros);
                if (kind != 3) check_selected(w, mask, n, sparsities[k]);
                check_tail(mask, n);
                free(mask);
            }
    free(w);
}

/* Several arrays are one behind the other, empty ones among them; ties go by array, then by index. */
static void test_global(void **state)
{
    (void)state;
    static const int64_t sizes[] = {100, 0, 64, 1, 333};
    float *w = (float *)test_memory_block(498 * sizeof(float));
    uint64_t *whole = mask_block(498);
    for (int32_t kind = 0; kind < 3; kind++) {
        apt_weights part[5];
        int64_t at = 0, zeros = 0;
        fill(w, 498, kind, 3);
        for (int32_t i = 0; i < 5; at += sizes[i++]) {
            const apt_weights one = {w + at, sizes[i], mask_block(sizes[i]), -1};
            part[i] = one;
        }
        assert_result(apt_magnitude_global(NULL, part, 5, 0.6), APT_OK);
        assert_result(apt_magnitude_sparsity(NULL, whole, NULL, w, 498, 0.6), APT_OK);
        at = 0;
        for (int32_t i = 0; i < 5; i++) {
            for (int64_t j = 0; j < sizes[i]; j++, at++)
                assert_int_equal(part[i].mask[j / 64] >> j % 64 & 1, whole[at / 64] >> at % 64 & 1);
            check_tail(part[i].mask, sizes[i]);
            zeros += part[i].zeros;
            free(part[i].mask);
        }
        assert_int_equal(zeros, (int64_t)floor(498 * 0.6));
    }
    assert_result(apt_magnitude_global(NULL, NULL, 0, 0.5), APT_OK);
    free(whole);
    free(w);
}

static void test_threshold(void **state)
{
    (void)state;
    const float w[6] = {0.01f, -0.0099f, 0.0f, -0.02f, apti_float(apti_bits(0.01f) - 1), -0.01f};
    uint64_t mask = ~(uint64_t)0;
    int64_t zeros = -1;
    assert_result(apt_magnitude_threshold(NULL, &mask, &zeros, w, 6, APT_MAGNITUDE_THRESHOLD), APT_OK);
    assert_true(mask == (1u | 8u | 32u) && zeros == 3);              /* what is equal to the threshold stays */
    assert_result(apt_magnitude_threshold(NULL, &mask, &zeros, w, 6, 0), APT_OK);
    assert_true(mask == 63 && zeros == 0);
    assert_result(apt_magnitude_threshold(NULL, &mask, &zeros, w, 6, 3e38f), APT_OK);
    assert_true(mask == 0 && zeros == 6);
    assert_result(apt_magnitude_threshold(NULL, &mask, NULL, w, 6, -1), APT_E_RANGE);
    assert_result(apt_magnitude_threshold(NULL, &mask, NULL, w, 6, not_a_number()), APT_E_NONFINITE);
}

/* Every group keeps the `keep` largest by (|w|, index), the rest of a row as many. */
static void test_patterns(void **state)
{
    (void)state;
    static const int32_t pairs[][2] = {{2, 4}, {4, 8}, {1, 3}, {1, 2}, {5, 7}, {33, 64}};
    static const int64_t shapes[][2] = {{1, 1}, {3, 8}, {65, 67}, {130, 64}, {2, 129}, {0, 5}, {5, 0}};
    float *w = (float *)test_memory_block(130 * 129 * sizeof(float));
    for (size_t p = 0; p < sizeof(pairs) / sizeof(pairs[0]); p++)
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
            for (int32_t kind = 0; kind < 3; kind++) {
                const int64_t rows = shapes[s][0], cols = shapes[s][1], n = rows * cols;
                const int32_t keep = pairs[p][0], of = pairs[p][1];
                uint64_t *mask = mask_block(n);
                int64_t zeros = -1, expected = 0;
                fill(w, n, kind, 5);
                assert_result(apt_magnitude_pattern(NULL, mask, &zeros, w, rows, cols, keep, of), APT_OK);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < cols; c += of) {
                        const int64_t group = cols - c < of ? cols - c : of;
                        expected += group > keep ? group - keep : 0;
                        for (int64_t i = 0; i < group; i++) {
                            int64_t above = 0;
                            const int64_t at = r * cols + c + i;
                            for (int64_t j = 0; j < group; j++) {
                                const float a = fabsf(w[r * cols + c + j]), b = fabsf(w[at]);
                                above += a > b || (!(a < b) && j > i);
                            }
                            assert_int_equal(mask[at / 64] >> at % 64 & 1, above < keep);
                        }
                    }
                assert_int_equal(zeros, expected);
                check_tail(mask, n);
                free(mask);
            }
    free(w);
    uint64_t mask;
    const float one[4] = {1, 2, 3, not_a_number()};
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, one, 1, 4, 2, 4), APT_E_NONFINITE);
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, one, 1, 3, 0, 4), APT_E_RANGE);
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, one, 1, 3, 4, 4), APT_E_RANGE);
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, one, 1, 3, 4, 65), APT_E_RANGE);
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, NULL, 1, 3, 2, 4), APT_E_ARGUMENT);
    assert_result(apt_magnitude_pattern(NULL, &mask, NULL, one, INT64_MAX, 3, 2, 4), APT_E_RANGE);
}

/* Kept weights keep their bits, NaN too; the others are +0, NaN too. */
static void test_apply(void **state)
{
    (void)state;
    for (int64_t n = 0; n < 200; n++) {
        uint64_t *mask = mask_block(n);
        apt_rng rng = apt_rng_make(1, (uint64_t)n);
        float w[201], old[201];
        for (int64_t i = 0; i < apt_bitmask_words(n); i++) mask[i] = i == 1 ? ~(uint64_t)0 : i == 2 ? 0 : apt_rng_next(&rng);
        for (int64_t i = 0; i <= n; i++) old[i] = w[i] = i % 5 == 3 ? not_a_number() : i % 7 == 1 ? -0.0f : apt_rng_normal(&rng);
        assert_result(apt_bitmask_apply(NULL, w, mask, n), APT_OK);
        for (int64_t i = 0; i <= n; i++)
            assert_int_equal(apti_bits(w[i]), i == n || (mask[i / 64] >> i % 64 & 1) != 0 ? apti_bits(old[i]) : 0);
        free(mask);
    }
    assert_result(apt_bitmask_apply(NULL, NULL, NULL, 0), APT_OK);
    assert_result(apt_bitmask_apply(NULL, NULL, NULL, 1), APT_E_ARGUMENT);
    assert_true(apt_bitmask_words(-1) == -1 && apt_bitmask_words(0) == 0 && apt_bitmask_words(65) == 2);
    assert_true(apt_bitmask_kept(NULL, 3) == -1 && apt_bitmask_kept(NULL, 0) == 0);
}

static void test_bad_arguments(void **state)
{
    (void)state;
    float w[3] = {1, 2, 3};
    uint64_t mask = 77;
    int64_t zeros = 55;
    static const double wrong[] = {-0.1, 1, 1.5};
    for (int32_t i = 0; i < 3; i++) assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, w, 3, wrong[i]), APT_E_RANGE);
    assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, w, 3, (double)not_a_number()), APT_E_NONFINITE);
    assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, w, -1, 0.5), APT_E_ARGUMENT);
    assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, NULL, 3, 0.5), APT_E_ARGUMENT);
    assert_result(apt_magnitude_sparsity(NULL, NULL, &zeros, w, 3, 0.5), APT_E_ARGUMENT);
    for (int32_t i = 0; i < 3; i++) {
        w[i] = i == 1 ? apti_float(0xff800000u) : not_a_number();
        assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, w, 3, 0), APT_E_NONFINITE);
        assert_result(apt_magnitude_sparsity(NULL, &mask, &zeros, w, 3, 0.5), APT_E_NONFINITE);
        assert_result(apt_magnitude_threshold(NULL, &mask, &zeros, w, 3, 0.5f), APT_E_NONFINITE);
        w[i] = 1;
    }
    apt_weights two[2] = {{w, 3, &mask, 0}, {NULL, 3, &mask, 0}};
    assert_result(apt_magnitude_global(NULL, two, 2, 0.5), APT_E_ARGUMENT);
    assert_result(apt_magnitude_global(NULL, NULL, 2, 0.5), APT_E_ARGUMENT);
    assert_true(mask == 77 && zeros == 55);      /* untouched by every failure */
}

static void test_schedule(void **state)
{
    (void)state;
    double s = -1;
    for (int32_t t = 0; t <= 5; t++) {
        assert_result(apt_magnitude_schedule(&s, 0.2, 0.8, 5, t), APT_OK);
        test_near_value("s(t)", s, 0.2 * pow(4, t / 5.0), 1e-12);
    }
    assert_true(s == 0.8);
    assert_result(apt_magnitude_schedule(&s, 0, 0.8, 5, 1), APT_E_RANGE);
    assert_result(apt_magnitude_schedule(&s, 0.9, 0.8, 5, 1), APT_E_RANGE);
    assert_result(apt_magnitude_schedule(&s, 0.2, 1, 5, 1), APT_E_RANGE);
    assert_result(apt_magnitude_schedule(&s, 0.2, 0.8, 0, 0), APT_E_RANGE);
    assert_result(apt_magnitude_schedule(&s, 0.2, 0.8, 5, 6), APT_E_RANGE);
    assert_result(apt_magnitude_schedule(&s, (double)not_a_number(), 0.8, 5, 1), APT_E_NONFINITE);
    assert_result(apt_magnitude_schedule(NULL, 0.2, 0.8, 5, 1), APT_E_ARGUMENT);
}

/* ---- compressed matrices, raw ---- */

/* A compressed copy of w with about `sparsity` zeros put into it. */
static apt_sparse make_sparse(float *w, int64_t rows, int64_t cols, double sparsity, uint64_t seed)
{
    apt_sparse s;
    apt_rng rng = apt_rng_make(seed, 1);
    for (int64_t i = 0; i < rows * cols; i++) w[i] = apt_rng_uniform(&rng) < sparsity ? 0.0f : apt_rng_normal(&rng);
    s.rows = rows;
    s.cols = cols;
    const int64_t count = apt_sparse_count(w, cols, rows, cols);
    s.bits = (uint64_t *)test_memory_block((size_t)(rows * apt_bitmask_words(cols)) * sizeof(uint64_t));
    s.start = (int64_t *)test_memory_block((size_t)(rows + 1) * sizeof(int64_t));
    s.values = (float *)test_memory_block((size_t)count * sizeof(float));
    assert_result(apt_sparse_pack(&s, count, w, cols), APT_OK);
    assert_int_equal(s.start[rows], count);
    if (count > 0) assert_result(apt_sparse_pack(&s, count - 1, w, cols), APT_E_SCRATCH);
    assert_result(apt_sparse_pack(&s, count, w, cols), APT_OK);
    return s;
}

static void drop_sparse(apt_sparse *s)
{
    free(s->bits);
    free(s->start);
    free(s->values);
}

static void test_sparse(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 1}, {3, 64}, {5, 65}, {7, 130}, {4, 63}, {0, 9}, {9, 0}};
    for (size_t k = 0; k < sizeof(shapes) / sizeof(shapes[0]); k++) {
        const int64_t rows = shapes[k][0], cols = shapes[k][1], n = 3;
        float w[1000], back[1000], x[3 * 130], y[3 * 9];
        apt_rng rng = apt_rng_make(2, 2);
        apt_sparse s = make_sparse(w, rows, cols, 0.5, k);
        memset(back, 0x55, sizeof back);
        assert_result(apt_sparse_unpack(back, cols, &s), APT_OK);
        assert_memory_equal(back, w, (size_t)(rows * cols) * sizeof(float));
        for (int64_t i = 0; i < n * cols; i++) x[i] = apt_rng_normal(&rng);
        assert_result(apt_sparse_forward(NULL, y, rows, &s, x, cols, n), APT_OK);
        for (int64_t i = 0; i < n; i++)
            for (int64_t o = 0; o < rows; o++) {
                double sum = 0;
                for (int64_t c = 0; c < cols; c++) sum += (double)x[i * cols + c] * (double)w[o * cols + c];
                test_near_value("product", (double)y[i * rows + o], sum, 1e-5);
            }
        drop_sparse(&s);
    }
    float signs[4] = {-0.0f, 0.0f, not_a_number(), 1}, back[4];
    apt_sparse s = {1, 4, NULL, NULL, NULL};
    uint64_t bits = 0;
    int64_t start[2];
    float values[4];
    s.bits = &bits;
    s.start = start;
    s.values = values;
    assert_int_equal(apt_sparse_count(signs, 4, 1, 4), 3);           /* -0 and NaN are not lost */
    assert_result(apt_sparse_pack(&s, 4, signs, 4), APT_OK);
    assert_result(apt_sparse_unpack(back, 4, &s), APT_OK);
    assert_memory_equal(back, signs, sizeof back);
    bits |= 2;
    assert_result(apt_sparse_unpack(back, 4, &s), APT_E_SHAPE);      /* a bit without a value */
    bits = 13 | 16;
    assert_result(apt_sparse_unpack(back, 4, &s), APT_E_SHAPE);      /* a bit behind the last column */
    start[1] = 5;
    assert_result(apt_sparse_forward(NULL, back, 1, &s, signs, 4, 1), APT_E_SHAPE);
    assert_true(apt_sparse_bytes(3, 9, 7) == 8 + 8 + 28 && apt_sparse_bytes(0, 0, 0) == 8 && apt_sparse_bytes(-1, 2, 0) == -1);
    assert_true(apt_sparse_bytes(INT64_MAX, 9, 7) == -1 && apt_sparse_count(NULL, 4, 2, 4) == -1);
}

#ifndef APT_ONLY_CORE
#include "model_test.h"
#include "train_test.h"

/* ---- with a context: the same for any number of threads, and the dense product's bits ------------------------------------- */

static void test_thread_invariance(void **state)
{
    (void)state;
    static const int32_t threads[] = {1, 2, 3, 8};
    const int64_t n = ((int64_t)1 << 21) + 77, words = apt_bitmask_words(n);
    float *w = (float *)test_memory_block((size_t)n * sizeof(float));
    uint64_t *mask = mask_block(n), *same = mask_block(n);
    for (int32_t kind = 0; kind < 3; kind++) {
        fill(w, n, kind, 9);
        for (int32_t t = 0; t < 4; t++) {
            test_log log;
            apt_ctx *ctx = test_context(threads[t], &log);
            int64_t zeros = 0;
            assert_result(apt_magnitude_sparsity(NULL, mask, NULL, w, n, 0.7), APT_OK);
            assert_result(apt_magnitude_sparsity(ctx, same, &zeros, w, n, 0.7), APT_OK);
            assert_int_equal(zeros, (int64_t)floor((double)n * 0.7));
            assert_memory_equal(mask, same, (size_t)words * sizeof(uint64_t));
            assert_result(apt_magnitude_threshold(NULL, mask, NULL, w, n, 0.5f), APT_OK);
            assert_result(apt_magnitude_threshold(ctx, same, NULL, w, n, 0.5f), APT_OK);
            assert_memory_equal(mask, same, (size_t)words * sizeof(uint64_t));
            assert_result(apt_magnitude_pattern(NULL, mask, NULL, w, n / 1021, 1021, 2, 4), APT_OK);
            assert_result(apt_magnitude_pattern(ctx, same, NULL, w, n / 1021, 1021, 2, 4), APT_OK);
            assert_memory_equal(mask, same, (size_t)apt_bitmask_words(n / 1021 * 1021) * sizeof(uint64_t));
            apt_destroy(ctx);
        }
    }
    free(w);
    free(mask);
    free(same);
}

static void dense_product(apt_ctx *ctx, float *y, const float *x, const float *w, int64_t m, int64_t n, int64_t k)
{
    apti_gemm g = APT_ZERO;
    g.m = m;
    g.n = n;
    g.part[0].k = k;
    g.part[0].a = x;
    g.part[0].a_row = k;
    g.part[0].a_col = 1;
    g.part[0].kind = APTI_B_PLAIN_T;
    g.part[0].b = w;
    g.part[0].ldb = k;
    g.c = y;
    g.ldc = n;
    g.act = -1;
    apti_gemm_run(ctx, &g);
}

static void test_sparse_product(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 1}, {5, 70, 65}, {33, 40, 300}, {64, 129, 128}, {130, 33, 257}, {2, 1100, 64}};
    const apti_kernels *tables[8];
    const int32_t count = apti_kernels_list(tables, 8);
    for (int32_t i = TEST_FIRST_TABLE(2 * count); i < 2 * count; i++) {
        apt_desc desc = APT_ZERO;
        desc.threads = 1 + 2 * (i / count);
        desc.kernels = tables[i % count]->name;
        apt_ctx *ctx = apt_create(&desc);
        assert_non_null(ctx);
        for (size_t q = 0; q < sizeof(shapes) / sizeof(shapes[0]); q++) {
            const int64_t m = shapes[q][0], n = shapes[q][1], k = shapes[q][2];
            float *w = (float *)test_memory_block((size_t)(n * k) * sizeof(float));
            float *x = (float *)test_memory_block((size_t)(m * k) * sizeof(float));
            float *y = (float *)test_memory_block((size_t)(m * n) * sizeof(float));
            float *z = (float *)test_memory_block((size_t)(m * n) * sizeof(float));
            apt_rng rng = apt_rng_make(q, 3);
            apt_sparse s = make_sparse(w, n, k, 0.6, q);
            for (int64_t j = 0; j < m * k; j++) x[j] = apt_rng_normal(&rng);
            dense_product(ctx, y, x, w, m, n, k);
            assert_result(apt_sparse_forward(ctx, z, n, &s, x, k, m), APT_OK);
            if (i % count == 0 || tables[i % count]->split != NULL) test_near(desc.kernels, z, y, m * n, 1e-5);      /* other sums */
            else for (int64_t j = 0; j < m * n; j++)
                if (apti_magnitude(y[j] - z[j]) != 0)
                    fail_msg("%s: [%lld] is %g, dense %g", desc.kernels, (long long)j, (double)z[j], (double)y[j]);
            free(w);
            free(x);
            free(y);
            free(z);
            drop_sparse(&s);
        }
        apt_destroy(ctx);
    }
}

/* ---- files of compressed matrices ---------------------------------------------------------------------------------------- */

static void test_sparse_files(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{5, 9}, {3, 64}, {7, 70}, {0, 4}};
    char dir[512], path[600];
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const int64_t blocks = apt_memory_info(ctx).blocks;
    float w[4][600], back[600];
    apt_sparse s[4], got;
    const char *names[4] = {"a", "layer.b.weight", "c", "empty"};
    int64_t bytes = 0;
    size_t size = 0;
    test_join(path, sizeof path, test_dir(dir, sizeof dir), "m.safetensors");
    for (int32_t i = 0; i < 4; i++) s[i] = make_sparse(w[i], shapes[i][0], shapes[i][1], 0.7, (uint64_t)i);
    assert_ok(ctx, apt_sparse_save(ctx, path, names, s, 4, &bytes));
    assert_int_equal(test_count_files(dir), 1);
    for (int32_t i = 0; i < 4; i++) {
        assert_ok(ctx, apt_sparse_load(ctx, path, names[i], &got));
        assert_true(got.rows == shapes[i][0] && got.cols == shapes[i][1]);
        assert_result(apt_sparse_unpack(back, got.cols, &got), APT_OK);
        assert_memory_equal(back, w[i], (size_t)(got.rows * got.cols) * sizeof(float));
        apt_sparse_free(ctx, &got);
    }
    assert_result(apt_sparse_load(ctx, path, "none", &got), APT_E_MISSING);
    char *file = test_read_file(path, &size);
    assert_int_equal((int64_t)size, bytes);
    /* Every truncation is refused; a byte that is flipped is refused or gives finite numbers of the old shape. */
    test_join(path, sizeof path, dir, "bad");
    for (size_t cut = 0; cut < size; cut += 3) {
        test_write_file(path, file, cut);
        assert_true(apt_sparse_load(ctx, path, "a", &got) != APT_OK);
    }
    for (size_t at = 0; at < size; at++) {
        file[at] = (char)(file[at] ^ (1 << at % 8));
        test_write_file(path, file, size);
        for (int32_t i = 0; i < 2; i++) {
            if (apt_sparse_load(ctx, path, names[i], &got) != APT_OK) continue;
            assert_true(got.rows * got.cols <= 600);
            assert_result(apt_sparse_unpack(back, got.cols, &got), APT_OK);
            assert_true(apti_finite_all(back, got.rows * got.cols));
            apt_sparse_free(ctx, &got);
        }
        file[at] = (char)(file[at] ^ (1 << at % 8));
    }
    s[0].values[0] = not_a_number();
    assert_result(apt_sparse_save(ctx, path, names, s, 1, NULL), APT_E_NONFINITE);
    s[1].bits[0] ^= 1;
    assert_result(apt_sparse_save(ctx, path, names + 1, s + 1, 1, NULL), APT_E_SHAPE);
    assert_result(apt_sparse_save(ctx, "/nonexistent/x", names + 2, s + 2, 1, NULL), APT_E_IO);
    assert_ok(ctx, apt_sparse_make(ctx, &got, w[2], 70, 7, 70));
    assert_memory_equal(got.values, s[2].values, (size_t)got.start[7] * sizeof(float));
    apt_sparse_free(ctx, &got);
    assert_result(apt_sparse_make(ctx, &got, w[2], 60, 7, 70), APT_E_ARGUMENT);
    free(file);
    for (int32_t i = 0; i < 4; i++) drop_sparse(&s[i]);
    test_remove(dir);
    assert_int_equal(apt_memory_info(ctx).blocks, blocks);
    apt_destroy(ctx);
}

/* ---- masks in a model ---------------------------------------------------------------------------------------------------- */

#define QUERY "bert.encoder.layer.0.attention.self.query.weight"
#define UP "bert.encoder.layer.1.intermediate.dense.weight"

static void test_model_masks(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 3);
    int64_t n = 0;
    float *old = test_parameter(m, UP, &n);
    const int64_t words = apt_bitmask_words(n);
    uint64_t *mask = mask_block(n), *got = mask_block(n);
    apt_sparsity s;
    assert_int_equal(n, 24 * 16);
    assert_ok(ctx, apt_model_get_bitmask(m, UP, got, words));
    assert_int_equal(apt_bitmask_kept(got, n), n);
    for (int64_t i = 0; i < words; i++) mask[i] = 0x00ff0ff0f0f0ff0fu;
    assert_ok(ctx, apt_model_set_bitmask(m, UP, mask, words));
    assert_ok(ctx, apt_model_get_bitmask(m, UP, got, words));
    assert_memory_equal(got, mask, (size_t)words * sizeof(uint64_t));
    float *now = test_parameter(m, UP, NULL);
    for (int64_t i = 0; i < n; i++) assert_true(apti_bits(now[i]) == (mask[i / 64] >> i % 64 & 1 ? apti_bits(old[i]) : 0));
    assert_ok(ctx, apt_model_sparsity(m, NULL, &s));
    assert_true(s.matrices == 1 && s.weights == n && s.zeros == n - apt_bitmask_kept(mask, n) && s.dense_bytes == 4 * n);
    assert_int_equal(s.sparse_bytes, apt_sparse_bytes(24, 16, n - s.zeros));
    test_near_value("sparsity", s.sparsity, (double)s.zeros / (double)n, 1e-12);
    test_near_value("compression", s.compression, 4.0 * (double)n / (double)s.sparse_bytes, 1e-12);
    assert_ok(ctx, apt_model_sparsity(m, QUERY, &s));
    assert_true(s.matrices == 1 && s.zeros == 0);
    assert_result(apt_model_set(m, UP, old, n), APT_E_STATE);        /* zeros stay zero */
    assert_ok(ctx, apt_model_set(m, UP, now, n));
    assert_result(apt_model_set_bitmask(m, UP, mask, words - 1), APT_E_SHAPE);
    assert_result(apt_model_set_bitmask(m, UP, NULL, words), APT_E_ARGUMENT);
    assert_result(apt_model_set_bitmask(m, "nothing", mask, words), APT_E_MISSING);
    assert_result(apt_model_set_bitmask(m, "classifier.bias", mask, 1), APT_E_ARGUMENT);
    assert_result(apt_model_get_bitmask(m, UP, got, 1), APT_E_SHAPE);
    assert_result(apt_model_sparsity(m, "nothing", &s), APT_E_MISSING);
    const uint64_t tail[1] = {~(uint64_t)0};
    assert_result(apt_model_set_bitmask(m, "classifier.weight", tail, 1), APT_E_RANGE);   /* 48 weights */
    assert_ok(ctx, apt_model_set_bitmask(m, UP, NULL, 0));
    assert_ok(ctx, apt_model_set(m, UP, old, n));
    free(old);
    free(now);
    free(mask);
    free(got);
    apt_destroy(ctx);
}

/* A mask follows its weights through compaction: the same model pruned weight by weight first or units first. */
static void test_compaction(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(2, &log);
    const int64_t blocks = apt_memory_info(ctx).blocks;
    for (int32_t shared = 0; shared < 2; shared++) {
        const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
        apt_model *m = test_model(ctx, &c, 4), *teacher = NULL;
        apt_units u;
        apt_model_units(m, &u);
        float *units = (float *)test_memory_block((size_t)u.total * sizeof(float));
        for (int32_t i = 0; i < u.total; i++) units[i] = i % 3 == 1 ? 0.0f : 1.0f;
        for (int32_t k = 0; k < 2; k++) {
            int64_t n = 0;
            float *w = test_parameter(m, k ? UP : QUERY, &n);
            uint64_t *mask = mask_block(n);
            assert_result(apt_magnitude_sparsity(NULL, mask, NULL, w, n, 0.5), APT_OK);
            assert_ok(ctx, apt_model_set_bitmask(m, k ? UP : QUERY, mask, apt_bitmask_words(n)));
            free(mask);
            free(w);
        }
        if (shared) assert_ok(ctx, apti_model_snapshot(m, &teacher));
        assert_ok(ctx, apt_model_set_masks(m, units, u.total));
        assert_ok(ctx, apt_model_compact(m));
        for (int32_t k = 0; k < 2; k++) {
            int64_t n = 0, zeros = 0;
            float *w = test_parameter(m, k ? UP : QUERY, &n);
            uint64_t *mask = mask_block(n);
            assert_ok(ctx, apt_model_get_bitmask(m, k ? UP : QUERY, mask, apt_bitmask_words(n)));
            check_tail(mask, n);
            for (int64_t i = 0; i < n; i++) {
                zeros += apti_magnitude(w[i]) == 0;
                assert_int_equal(mask[i / 64] >> i % 64 & 1, apti_magnitude(w[i]) != 0);
            }
            assert_true(zeros > 0 && zeros < n && n < (k ? 384 : 256));
            free(mask);
            free(w);
        }
        if (teacher != NULL) apti_model_free(teacher);
        apt_model_destroy(m);
        free(units);
    }
    assert_int_equal(apt_memory_info(ctx).blocks, blocks);
    apt_destroy(ctx);
}

/* ---- pruning in a trainer ------------------------------------------------------------------------------------------------ */

static plan full_plan(apt_method method)
{
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.d.method = method;
    p.d.target_sparsity = 0;
    p.d.prune_begin = p.d.prune_end = 0;
    p.d.weight_decay = 0.1f;
    p.d.learning_rate = 1e-2f;
    p.d.steps = 12;
    p.d.evaluate_every = p.d.checkpoint_every = 0;
    return p;
}

/* Masked weights are exactly +0; how many there are. */
static void check_zeros(const apt_model *m, int64_t *zeros)
{
    *zeros = 0;
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        const uint64_t *mask = apti_bitmask_of(m, p);
        if (mask == NULL) continue;
        float *w = test_parameter(m, p->name, NULL);
        for (int64_t j = 0; j < p->rows * p->cols; j++) {
            if (mask[j / 64] >> j % 64 & 1) continue;
            if (apti_bits(w[j]) != 0) fail_msg("%s[%lld] is %g", p->name, (long long)j, (double)w[j]);
            ++*zeros;
        }
        free(w);
    }
}

static void test_training(void **state)
{
    (void)state;
    for (int32_t way = 0; way < 5; way++) {
        const plan p = full_plan(way == 3 ? APT_METHOD_LORA : APT_METHOD_FULL);
        live l;
        apt_magnitude_desc d = APT_ZERO;
        apt_sparsity s;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 4);
        int64_t zeros = 0, expected = 0;
        if (way == 0 || way == 3) d.sparsity = 0.6;
        if (way == 1) d.keep = 2, d.of = 4;
        if (way == 2) d.sparsity = 0.37, d.global = 1;
        assert_ok(l.ctx, apt_trainer_magnitude(l.trainer, &d, &s));
        assert_int_equal(s.matrices, 12);
        for (int32_t i = 0; i < l.model->param_count; i++) {
            const apti_param *q = &l.model->params[i];
            const int64_t n = q->rows * q->cols, z = n - apti_param_kept(l.model, q);
            if (apti_bitmask_of(l.model, q) == NULL) continue;
            assert_true(q->layer >= 0 && q->linear);
            if (way == 0 || way == 3) assert_int_equal(z, (int64_t)floor((double)n * 0.6));
            if (way == 1) assert_int_equal(z, n / 2);                 /* all rows are multiples of 4 */
            expected += z;
        }
        if (way == 2) assert_int_equal(expected, (int64_t)floor((double)s.weights * 0.37));
        if (way == 4) assert_true(expected > 0 && expected < s.weights / 4);   /* |w| < 0.01 of N(0, 0.25) */
        assert_int_equal(s.zeros, expected);
        float *before = test_parameter(l.model, QUERY, NULL);
        for (int64_t i = 4; i < micro_batches(&p); i++) {
            run(l.trainer, &p, &l.tr, i, i + 1);
            check_zeros(l.model, &zeros);
            assert_int_equal(zeros, expected);
        }
        float *after = test_parameter(l.model, QUERY, NULL);
        int64_t moved = 0;
        for (int64_t i = 0; i < 256; i++) moved += apti_bits(before[i]) != apti_bits(after[i]);
        assert_int_equal(moved, way == 3 ? 0 : apti_param_kept(l.model, apti_param_find(l.model, QUERY)));
        assert_ok(l.ctx, apt_trainer_finish(l.trainer));
        apt_trainer_destroy(l.trainer);
        assert_ok(l.ctx, apt_model_merge(l.model, NULL, NULL));      /* masked too: way 3 */
        check_zeros(l.model, &zeros);
        assert_int_equal(zeros, expected);
        if (way == 3) {
            float *merged = test_parameter(l.model, QUERY, NULL);
            assert_true(memcmp(merged, after, 256 * sizeof(float)) != 0);
            free(merged);
        }
        free(before);
        free(after);
        stop(&l);
    }
}

static void test_patterns_of_names(void **state)
{
    (void)state;
    assert_true(apti_name_matches("abc.def", "c.d") && apti_name_matches("abc.def", "*") && apti_name_matches("abc.def", "a*f"));
    assert_true(apti_name_matches("abc.def", "b*e*") && !apti_name_matches("abc.def", "e*b") && !apti_name_matches("abc.def", "abcd"));
    const plan p = full_plan(APT_METHOD_FULL);
    live l;
    start(&l, &p, 1);
    apt_magnitude_desc d = APT_ZERO;
    apt_sparsity s;
    const char *query[] = {"query"}, *one[] = {"layer.1.*dense", "query"}, *none[] = {"query", "fc"}, *empty[] = {""}, *null[] = {NULL};
    const char *embedding[] = {"word_embeddings"};
    d.sparsity = 0.5;
    d.patterns = query;
    d.pattern_count = 1;
    assert_ok(l.ctx, apt_trainer_magnitude(l.trainer, &d, &s));
    assert_true(s.matrices == 2 && s.zeros == s.weights / 2);
    d.patterns = one;
    d.pattern_count = 2;
    assert_ok(l.ctx, apt_trainer_magnitude(l.trainer, &d, &s));
    assert_int_equal(s.matrices, 5);
    d.patterns = embedding;
    d.pattern_count = 1;
    assert_ok(l.ctx, apt_trainer_magnitude(l.trainer, &d, &s));
    assert_true(s.matrices == 1 && s.weights == 37 * 16);
    assert_ok(l.ctx, apt_model_sparsity(l.model, NULL, &s));
    assert_int_equal(s.matrices, 6);
    d.patterns = none;
    d.pattern_count = 2;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_MISSING);
    assert_non_null(strstr(apt_error(l.ctx), "'fc'"));
    d.patterns = empty;
    d.pattern_count = 1;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_ARGUMENT);
    d.patterns = null;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_ARGUMENT);
    d.patterns = NULL;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_ARGUMENT);
    stop(&l);
}

static void test_bad_descs(void **state)
{
    (void)state;
    const plan p = full_plan(APT_METHOD_FULL);
    live l;
    start(&l, &p, 1);
    const uint64_t sum = test_model_sum(l.model);
    apt_sparsity s;
    static const struct { double sparsity; float threshold; int32_t keep, of, global; apt_result wanted; } bad[] = {
        {1, 0, 0, 0, 0, APT_E_RANGE}, {-0.5, 0, 0, 0, 0, APT_E_RANGE}, {0, -1, 0, 0, 0, APT_E_RANGE}, {0, 0, 4, 4, 0, APT_E_RANGE},
        {0, 0, 0, 4, 0, APT_E_RANGE}, {0.5, 0, 2, 4, 0, APT_E_ARGUMENT}, {0.5, 0.1f, 0, 0, 0, APT_E_ARGUMENT},
        {0, 0, 0, 0, 1, APT_E_ARGUMENT}, {0, 0, 2, 4, 1, APT_E_ARGUMENT}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        apt_magnitude_desc d = APT_ZERO;
        d.sparsity = bad[i].sparsity;
        d.threshold = bad[i].threshold;
        d.keep = bad[i].keep;
        d.of = bad[i].of;
        d.global = bad[i].global;
        assert_result(apt_trainer_magnitude(l.trainer, &d, &s), bad[i].wanted);
    }
    apt_magnitude_desc d = APT_ZERO;
    d.sparsity = (double)not_a_number();
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_RANGE);
    d.sparsity = 0.5;
    d.end_canary = 1;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_ARGUMENT);
    d.end_canary = 0;
    assert_result(apt_trainer_magnitude(l.trainer, NULL, &s), APT_E_ARGUMENT);
    float *weight = &apti_param_find(l.model, UP)->value[7], old = *weight;
    *weight = not_a_number();                    /* training that went wrong */
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_NONFINITE);
    assert_non_null(strstr(apt_error(l.ctx), UP));
    d.global = 1;
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_NONFINITE);
    *weight = old;
    assert_ok(l.ctx, apt_model_sparsity(l.model, NULL, &s));
    assert_true(s.matrices == 0 && sum == test_model_sum(l.model));  /* nothing was changed by any of these */
    run(l.trainer, &p, &l.tr, 0, 1);
    assert_result(apt_trainer_magnitude(l.trainer, &d, &s), APT_E_STATE);      /* a step is half accumulated */
    stop(&l);
}

/* ---- iterative --------------------------------------------------------------------------------------------------------- */

static apt_iterative_desc iterative(void)
{
    apt_iterative_desc d = APT_ZERO;
    d.iterations = 3;
    d.begin = 2;
    d.retrain = 3;
    d.lower_is_better = 1;
    return d;
}

static void start_iterative(live *l, const plan *p)
{
    const apt_iterative_desc d = iterative();
    start(l, p, 1);
    assert_ok(l->ctx, apt_trainer_iterative(l->trainer, &d));
}

static void check_history(const live *l)
{
    apt_iteration h, first;
    assert_int_equal(apt_trainer_iterations(l->trainer), 3);
    for (int32_t i = 0; i < 3; i++) {
        assert_ok(l->ctx, apt_trainer_iteration(l->trainer, i, &h));
        if (i == 0) first = h;
        assert_true(h.number == i + 1 && h.step == 2 + 3 * i && h.measured == 7 && h.reached.matrices == 12);
        test_near_value("target", h.target, 0.2 * pow(4, (i + 1) / 3.0), 1e-12);
        assert_true(h.reached.sparsity <= h.target && h.reached.sparsity > h.target - 0.01);
        assert_true(h.reached.zeros > 0 && h.reached.zeros < h.reached.weights);
        test_near_value("before", h.before, 0.25 * (double)(h.step / 4), 0);   /* what on_event answers */
        test_near_value("retrained", h.retrained, 0.25 * (double)((h.step + 3) / 4), 0);
        test_near_value("degradation", h.degradation, first.before > 0 ? (h.retrained - first.before) / first.before : 0, 1e-12);
    }
    assert_result(apt_trainer_iteration(l->trainer, 3, &h), APT_E_RANGE);
    assert_result(apt_trainer_iteration(l->trainer, -1, &h), APT_E_RANGE);
}

static void test_iterative(void **state)
{
    (void)state;
    const plan p = full_plan(APT_METHOD_FULL);
    live l;
    int64_t zeros = 0, last = 0;
    start_iterative(&l, &p);
    for (int64_t i = 0; i < micro_batches(&p); i++) {
        const int64_t step = i / p.d.accumulate;
        run(l.trainer, &p, &l.tr, i, i + 1);
        check_zeros(l.model, &zeros);
        assert_true(zeros >= last && (zeros > last) == (i % 2 == 0 && (step == 2 || step == 5 || step == 8)));
        last = zeros;
        const bool pruned = (l.tr.events[i] >> APT_EVENT_PRUNE & 1) != 0, saved = (l.tr.events[i] >> APT_EVENT_CHECKPOINT & 1) != 0;
        assert_true(pruned == (i % 2 == 0 && (step == 2 || step == 5 || step == 8)));
        assert_true(saved == (i % 2 == 1 && (step == 4 || step == 7 || step == 10)));
    }
    check_history(&l);
    stop(&l);
}

/* The summary at every stage of a plan: nothing done, in the middle of an iteration, at the end. */
static void test_summary(void **state)
{
    (void)state;
    const plan p = full_plan(APT_METHOD_FULL);
    live l;
    apt_iterative_summary s;
    apt_iteration h, first;
    start(&l, &p, 1);
    assert_result(apt_trainer_iterative_query(l.trainer, &s), APT_E_STATE);
    stop(&l);
    start_iterative(&l, &p);
    assert_result(apt_trainer_iterative_query(NULL, &s), APT_E_ARGUMENT);
    assert_result(apt_trainer_iterative_query(l.trainer, NULL), APT_E_ARGUMENT);
    for (int64_t i = 0; i <= micro_batches(&p); i++) {
        const int64_t steps = i / p.d.accumulate, done = apt_trainer_iterations(l.trainer);
        assert_ok(l.ctx, apt_trainer_iterative_query(l.trainer, &s));
        assert_true(s.iterations == 3 && s.done == done && s.begin == 2 && s.retrain == 3);
        test_near_value("first", s.first, 0.2, 0);
        test_near_value("last", s.last, 0.8, 0);
        assert_int_equal(s.reached.matrices, 12);
        assert_int_equal(s.measured, (done > 0 ? APT_MEASURED_BEFORE : 0) + (steps >= 5 ? APT_MEASURED_RETRAINED : 0));
        if (done > 0) {
            assert_ok(l.ctx, apt_trainer_iteration(l.trainer, 0, &first));
            assert_ok(l.ctx, apt_trainer_iteration(l.trainer, (int32_t)done - 1, &h));
            assert_true(s.reached.zeros == h.reached.zeros && s.reached.sparse_bytes == h.reached.sparse_bytes);
            test_near_value("before", s.before, first.before, 0);
        } else assert_int_equal(s.reached.zeros, 0);
        if (steps >= 5) {
            const bool ended = (h.measured & APT_MEASURED_RETRAINED) != 0;
            if (!ended) assert_ok(l.ctx, apt_trainer_iteration(l.trainer, (int32_t)done - 2, &h));
            test_near_value("retrained", s.retrained, h.retrained, 0);
            test_near_value("degradation", s.degradation, h.degradation, 0);
        }
        if (i < micro_batches(&p)) run(l.trainer, &p, &l.tr, i, i + 1);
    }
    assert_int_equal(s.done, 3);
    stop(&l);
}

/* Masks made at once, by pattern, go on through a checkpoint that no plan belongs to: the same bits at the end. */
static void test_resume_once(void **state)
{
    (void)state;
    char dir[512], path[600];
    test_join(path, sizeof path, test_dir(dir, sizeof dir), "run.apt");
    for (int32_t method = 0; method < 2; method++) {
        const plan p = full_plan(method ? APT_METHOD_LORA : APT_METHOD_FULL);
        apt_magnitude_desc d = APT_ZERO;
        apt_sparsity a, b;
        live whole, rest;
        d.keep = 2;
        d.of = 4;
        start(&whole, &p, 1);
        run(whole.trainer, &p, &whole.tr, 0, 4);
        assert_ok(whole.ctx, apt_trainer_magnitude(whole.trainer, &d, &a));
        run(whole.trainer, &p, &whole.tr, 4, 7);
        assert_ok(whole.ctx, apt_checkpoint_save(whole.trainer, path, NULL, 0));
        run(whole.trainer, &p, &whole.tr, 7, micro_batches(&p));
        start(&rest, &p, 1);
        assert_ok(rest.ctx, apt_checkpoint_load(rest.trainer, path, NULL, NULL));
        run(rest.trainer, &p, &rest.tr, 7, micro_batches(&p));
        assert_same_trace(&whole.tr, &rest.tr, 7, micro_batches(&p), "resumed");
        assert_true(test_model_sum(rest.model) == test_model_sum(whole.model));
        assert_ok(rest.ctx, apt_model_sparsity(rest.model, NULL, &b));
        assert_true(a.zeros == b.zeros && a.weights == b.weights && a.sparse_bytes == b.sparse_bytes && b.zeros == b.weights / 2);
        for (int32_t i = 0; i < whole.model->param_count; i++) {
            const apti_param *q = &whole.model->params[i];
            const uint64_t *x = apti_bitmask_of(whole.model, q), *y = apti_bitmask_of(rest.model, &rest.model->params[i]);
            assert_true((x == NULL) == (y == NULL));
            if (x != NULL) assert_memory_equal(x, y, (size_t)apt_bitmask_words(apti_param_count(q)) * sizeof(uint64_t));
        }
        stop(&whole);
        stop(&rest);
    }
    test_remove(dir);
}

/* Cut at every micro-batch and resumed: the same losses, weights, masks and history, whatever the threads. */
static void test_resume(void **state)
{
    (void)state;
    char dir[512], path[600];
    test_join(path, sizeof path, test_dir(dir, sizeof dir), "run.apt");
    for (int32_t method = 0; method < 2; method++) {
        const plan p = full_plan(method ? APT_METHOD_LORA : APT_METHOD_FULL);
        live whole;
        start_iterative(&whole, &p);
        run(whole.trainer, &p, &whole.tr, 0, micro_batches(&p));
        const uint64_t sum = test_model_sum(whole.model);
        for (int64_t cut = 1; cut < micro_batches(&p); cut += 1 + method) {
            plan q = p;
            live first, rest;
            start_iterative(&first, &p);
            run(first.trainer, &p, &first.tr, 0, cut);
            assert_ok(first.ctx, apt_checkpoint_save(first.trainer, path, NULL, 0));
            stop(&first);
            q.threads = 1 + (int32_t)cut % 3;
            start_iterative(&rest, &q);
            assert_ok(rest.ctx, apt_checkpoint_load(rest.trainer, path, NULL, NULL));
            run(rest.trainer, &q, &rest.tr, cut, micro_batches(&q));
            assert_same_trace(&whole.tr, &rest.tr, cut, micro_batches(&q), "resumed");
            assert_true(test_model_sum(rest.model) == sum);
            for (int32_t i = 0; i < whole.model->param_count; i++) {
                const uint64_t *a = apti_bitmask_of(whole.model, &whole.model->params[i]);
                const uint64_t *b = apti_bitmask_of(rest.model, &rest.model->params[i]);
                assert_true((a == NULL) == (b == NULL));
                if (a != NULL) assert_memory_equal(a, b, (size_t)apt_bitmask_words(apti_param_count(&whole.model->params[i])) * 8);
            }
            check_history(&rest);
            apt_iteration x, y;
            for (int32_t i = 0; i < 3; i++) {
                assert_ok(rest.ctx, apt_trainer_iteration(whole.trainer, i, &x));
                assert_ok(rest.ctx, apt_trainer_iteration(rest.trainer, i, &y));
                assert_memory_equal(&x, &y, sizeof x);
            }
            stop(&rest);
        }
        stop(&whole);
    }
    test_remove(dir);
}

static void test_plans(void **state)
{
    (void)state;
    char dir[512], path[600];
    const plan p = full_plan(APT_METHOD_FULL);
    live a, b;
    test_join(path, sizeof path, test_dir(dir, sizeof dir), "run.apt");
    start(&a, &p, 1);
    static const struct { double first, last; int32_t iterations; int64_t begin, retrain; } bad[] = {
        {0.5, 0.2, 3, 0, 1}, {0.2, 1, 3, 0, 1}, {-0.1, 0.5, 3, 0, 1}, {0.2, 0.8, -1, 0, 1}, {0.2, 0.8, 3, -1, 1}, {0.2, 0.8, 3, 0, 5},
        {0.2, 0.8, 3, 4, 3}, {0.2, 0.8, 13, 0, 0}, {0.2, 0.8, 3, 12, 0}, {0.2, 0.8, 10001, 0, 0}, {0.2, 0.8, 3, 0, INT64_MAX}};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        apt_iterative_desc d = APT_ZERO;
        d.first = bad[i].first;
        d.last = bad[i].last;
        d.iterations = bad[i].iterations;
        d.begin = bad[i].begin;
        d.retrain = bad[i].retrain;
        assert_result(apt_trainer_iterative(a.trainer, &d), APT_E_RANGE);
    }
    apt_iterative_desc d = APT_ZERO, other = iterative();
    const char *fc[] = {"fc"}, *query[] = {"query"};
    d.patterns = fc;
    d.pattern_count = 1;
    assert_result(apt_trainer_iterative(a.trainer, &d), APT_E_MISSING);
    assert_result(apt_trainer_iterative(a.trainer, NULL), APT_E_ARGUMENT);
    d.patterns = query;
    assert_ok(a.ctx, apt_trainer_iterative(a.trainer, &d));          /* 5 times 2 steps */
    run(a.trainer, &p, &a.tr, 0, 2);
    assert_result(apt_trainer_iterative(a.trainer, &d), APT_E_STATE);
    assert_ok(a.ctx, apt_checkpoint_save(a.trainer, path, NULL, 0));
    start(&b, &p, 1);
    assert_result(apt_checkpoint_load(b.trainer, path, NULL, NULL), APT_E_STATE);        /* no plan */
    assert_ok(b.ctx, apt_trainer_iterative(b.trainer, &other));
    assert_result(apt_checkpoint_load(b.trainer, path, NULL, NULL), APT_E_STATE);        /* another one */
    d.patterns = NULL;
    d.pattern_count = 0;
    assert_ok(b.ctx, apt_trainer_iterative(b.trainer, &d));
    assert_result(apt_checkpoint_load(b.trainer, path, NULL, NULL), APT_E_STATE);        /* other matrices */
    d.patterns = query;
    d.pattern_count = 1;
    assert_ok(b.ctx, apt_trainer_iterative(b.trainer, &d));
    assert_ok(b.ctx, apt_checkpoint_load(b.trainer, path, NULL, NULL));
    assert_int_equal(apt_trainer_iterations(b.trainer), 1);
    stop(&a);
    stop(&b);
    test_remove(dir);
}

/* With right checksums and wrong contents: masks that do not fit, histories out of range. */
static void test_hostile_checkpoints(void **state)
{
    (void)state;
    char dir[512], path[600];
    const plan p = full_plan(APT_METHOD_FULL);
    test_join(path, sizeof path, test_dir(dir, sizeof dir), "run.apt");
    for (int32_t way = 0; way < 5; way++) {
        live a, b;
        start_iterative(&a, &p);
        run(a.trainer, &p, &a.tr, 0, 8);
        apti_param *head = apti_param_find(a.model, "classifier.weight"), *query = apti_param_find(a.model, QUERY);
        apt_iteration *h = a.trainer->iterative.history;
        if (way == 0) a.model->bitmask[head - a.model->params] = (uint64_t *)memset(apti_alloc(a.ctx, 1, 8), 0xff, 8); /* of 48 bits */
        if (way == 1) a.model->bitmask[query - a.model->params][0] &= ~(uint64_t)1;
        if (way == 1) query->value[0] = 1;
        if (way == 2) h->before = (double)not_a_number();
        if (way == 3) h->reached.zeros = h->reached.weights + 1;
        if (way == 4) h->measured = 8;
        assert_ok(a.ctx, apt_checkpoint_save(a.trainer, path, NULL, 0));
        start_iterative(&b, &p);
        assert_result(apt_checkpoint_load(b.trainer, path, NULL, NULL), way < 2 ? APT_E_FORMAT : APT_E_RANGE);
        stop(&a);
        stop(&b);
    }
    test_remove(dir);
}

/* ---- folders ------------------------------------------------------------------------------------------------------------ */

static void test_folders(void **state)
{
    (void)state;
    char dir[512], dense[600], sparse[600], path[700];
    test_dir(dir, sizeof dir);
    test_join(dense, sizeof dense, dir, "dense");
    test_join(sparse, sizeof sparse, dir, "sparse");
    for (int32_t family = 0; family < 3; family++) {
        const apt_config c = family == 0 ? test_config(APT_BERT, APT_TASK_CLASSIFY) : test_decoder(family == 1 ? 1 : 3);
        test_log log;
        apt_ctx *ctx = test_context(1, &log);
        apt_model *m = test_model(ctx, &c, 6), *again = NULL;
        apt_train_desc td = APT_ZERO;
        apt_magnitude_desc d = APT_ZERO;
        apt_sparsity pruned, saved;
        td.steps = 1;
        td.method = family ? APT_METHOD_LORA : APT_METHOD_FULL;
        apt_trainer *t = test_trainer(m, &td);
        d.sparsity = 0.9;
        assert_ok(ctx, apt_trainer_magnitude(t, &d, &pruned));
        apt_trainer_destroy(t);
        assert_ok(ctx, apt_model_merge(m, NULL, NULL));
        assert_ok(ctx, apt_model_save(m, dense));
        assert_ok(ctx, apt_model_save_sparse(m, sparse, &saved));
        assert_int_equal(saved.matrices, pruned.matrices);
        assert_true(saved.zeros == pruned.zeros && saved.compression > 3 && saved.sparse_bytes == pruned.sparse_bytes);
        struct stat x, y;
        assert_int_equal(stat(test_join(path, sizeof path, dense, "model.safetensors"), &x), 0);
        assert_int_equal(stat(test_join(path, sizeof path, sparse, "model.safetensors"), &y), 0);
        assert_true(y.st_size < x.st_size - (saved.dense_bytes - saved.sparse_bytes) / 2);
        assert_ok(ctx, apt_model_load(ctx, sparse, NULL, &again));
        assert_true(test_model_sum(again) == test_model_sum(m));
        apt_destroy(ctx);
    }
    test_remove(dir);
}

/* ---- compressed copies ------------------------------------------------------------------------------------------------- */

static void logits_of(apt_ctx *ctx, apt_model *m, const apt_batch *b, float *logits, int64_t capacity)
{
    apt_output out = APT_ZERO;
    out.logits = logits;
    out.logits_capacity = capacity;
    memset(logits, 0, (size_t)capacity * sizeof(float));
    assert_ok(ctx, apt_model_forward(m, b, &out));
}

/* The same bits; from "ref", whose dense product sums in double, the same but for rounding. */
static void assert_same_logits(const apt_ctx *ctx, const float *plain, const float *copied, int64_t n)
{
    if (strcmp(apt_kernel_name(ctx), "ref") != 0) {
        assert_memory_equal(plain, copied, (size_t)n * sizeof(float));
        return;
    }
    double off = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        const double a = (double)plain[i], b = (double)copied[i];
        off += (a - b) * (a - b);
        all += a * a;
    }
    assert_true(off <= 1e-12 * all);
}

/* Copies compute the same in every family, with masked units too, and short batches do not use them. */
static void test_compressed(void **state)
{
    (void)state;
    enum { ROOM = 1 << 16 };
    float *plain = (float *)test_memory_block(ROOM * sizeof(float)), *copied = (float *)test_memory_block(ROOM * sizeof(float));
    for (int32_t family = 0; family < 6; family++) {
        const apt_config c = family == 0 ? test_config(APT_BERT, APT_TASK_CLASSIFY) : test_decoder(family - 1);
        test_log log;
        apt_ctx *ctx = test_context(1 + family % 3, &log);
        apt_model *m = test_model(ctx, &c, 7);
        apt_magnitude_desc d = APT_ZERO;
        apt_train_desc td = APT_ZERO;
        apt_sparsity used, pruned;
        test_batch b;
        td.steps = 1;
        td.method = APT_METHOD_FULL;
        apt_trainer *t = test_trainer(m, &td);
        d.sparsity = 0.7;
        assert_ok(ctx, apt_trainer_magnitude(t, &d, &pruned));
        assert_result(apt_model_compress(m, 0, &used), APT_E_STATE);           /* a trainer */
        apt_trainer_destroy(t);
        for (int32_t pass = 0; pass < 4; pass++) {
            if (pass == 2) {                     /* units that fade: masks behind the products */
                apt_units u;
                apt_model_units(m, &u);
                float *units = (float *)test_memory_block((size_t)u.total * sizeof(float));
                for (int32_t i = 0; i < u.total; i++) units[i] = i % 3 == 1 ? 0.25f : 1.0f;
                assert_ok(ctx, apt_model_set_masks(m, units, u.total));
                free(units);
            }
            apti_compressed_drop(m);
            test_batch_at(&b, &c, 5, pass, pass % 2 ? 16 : 2);
            const bool rows_enough = b.b.offsets[b.b.sequences] >= APT_SPARSE_ROWS;
            assert_int_equal(rows_enough, pass % 2);
            logits_of(ctx, m, &b.b, plain, ROOM);
            assert_ok(ctx, apt_model_compress(m, 0, &used));
            assert_true(used.matrices == pruned.matrices && used.zeros == pruned.zeros && used.sparse_bytes == pruned.sparse_bytes);
            logits_of(ctx, m, &b.b, copied, ROOM);
            assert_same_logits(ctx, plain, copied, ROOM);
            /* that these bits come from the copies: other values in them, other logits, but only where there are rows enough */
            apt_sparse *s = &m->layers[0].slot[2 * APTI_QUERY]->sparse;
            s->values[0] += 1;
            logits_of(ctx, m, &b.b, copied, ROOM);
            assert_int_equal(memcmp(plain, copied, ROOM * sizeof(float)) != 0, rows_enough);
        }
        apt_destroy(ctx);
    }
    free(plain);
    free(copied);
}

/* Whatever changes a matrix drops its copy. */
static void test_compressed_life(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const int64_t blocks = apt_memory_info(ctx).blocks;
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 8);
    apt_train_desc td = APT_ZERO;
    apt_trainer *t = NULL;
    apt_sparsity used;
    int64_t n = 0;
    float *w = test_parameter(m, UP, &n);
    assert_ok(ctx, apt_model_compress(m, 0, &used));
    assert_true(used.matrices == 0 && used.weights == 0);            /* nothing is 0 yet */
    for (int64_t i = 0; i < n; i++) w[i] = i % 10 < 6 ? 0.0f : w[i];
    assert_ok(ctx, apt_model_set(m, UP, w, n));
    assert_ok(ctx, apt_model_compress(m, 0.61, &used));
    assert_int_equal(used.matrices, 0);
    assert_ok(ctx, apt_model_compress(m, 0, &used));                 /* zeros count without a mask too */
    assert_true(used.matrices == 1 && used.weights == n && used.zeros >= n * 6 / 10 - 1);
    assert_true(apti_param_find(m, UP)->sparse.start != NULL);
    assert_ok(ctx, apt_model_set(m, UP, w, n));
    assert_true(apti_param_find(m, UP)->sparse.start == NULL);
    assert_ok(ctx, apt_model_compress(m, 0, NULL));
    td.steps = 1;
    assert_ok(ctx, apt_trainer_create(m, &td, &t));
    assert_true(apti_param_find(m, UP)->sparse.start == NULL);
    apt_trainer_destroy(t);
    assert_result(apt_model_compress(m, 0, NULL), APT_E_STATE);      /* adapters */
    assert_ok(ctx, apt_model_merge(m, NULL, NULL));
    assert_ok(ctx, apt_model_set(m, UP, w, n));
    assert_ok(ctx, apt_model_compress(m, 0, &used));
    assert_int_equal(used.matrices, 1);
    apt_units u;
    apt_model_units(m, &u);
    float units[200];
    for (int32_t i = 0; i < u.total; i++) units[i] = i % 5 == 1 ? 0.0f : 1.0f;
    assert_ok(ctx, apt_model_set_masks(m, units, u.total));
    assert_ok(ctx, apt_model_compact(m));
    assert_true(apti_param_find(m, UP)->sparse.start == NULL);
    assert_result(apt_model_compress(m, 1, NULL), APT_E_RANGE);
    assert_result(apt_model_compress(m, -0.5, NULL), APT_E_RANGE);
    assert_result(apt_model_compress(m, (double)not_a_number(), NULL), APT_E_RANGE);
    assert_result(apt_model_compress(NULL, 0, NULL), APT_E_ARGUMENT);
    free(w);
    apt_model_destroy(m);
    assert_int_equal(apt_memory_info(ctx).blocks, blocks);
    apt_destroy(ctx);
}

/* Every truncation of a compressed folder is refused, and every flipped bit gives an error or a finite model. */
static void test_hostile_folders(void **state)
{
    (void)state;
    char dir[512], path[600];
    apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    c.layers = 1;
    c.vocab = 7;
    c.positions = 8;
    apt_model *m = test_model(ctx, &c, 6), *again = NULL;
    int64_t n = 0;
    float *w = test_parameter(m, QUERY, &n);
    uint64_t *mask = mask_block(n);
    assert_result(apt_magnitude_sparsity(NULL, mask, NULL, w, n, 0.8), APT_OK);
    assert_ok(ctx, apt_model_set_bitmask(m, QUERY, mask, apt_bitmask_words(n)));
    test_dir(dir, sizeof dir);
    assert_ok(ctx, apt_model_save_sparse(m, dir, NULL));
    test_join(path, sizeof path, dir, "model.safetensors");
    size_t size = 0;
    char *file = test_read_file(path, &size);
    for (size_t cut = 0; cut < size; cut += 41) {
        test_write_file(path, file, cut);
        assert_true(apt_model_load(ctx, dir, NULL, &again) != APT_OK);
    }
    uint64_t header = 0;
    memcpy(&header, file, 8);
    for (size_t at = 0; at < size; at += at > 8 + header && at < size - 600 ? 31 : 1) {  /* compressed tensors come last */
        file[at] = (char)(file[at] ^ (1 << at % 8));
        test_write_file(path, file, size);
        if (apt_model_load(ctx, dir, NULL, &again) == APT_OK) {
            for (int32_t i = 0; i < again->param_count; i++) {
                const apti_param *p = &again->params[i];
                if (p->rows * p->cols == 0) continue;
                float *v = test_parameter(again, p->name, NULL);
                assert_true(apti_finite_all(v, p->rows * p->cols));
                free(v);
            }
            apt_model_destroy(again);
        }
        file[at] = (char)(file[at] ^ (1 << at % 8));
    }
    free(file);
    free(mask);
    free(w);
    test_remove(dir);
    apt_destroy(ctx);
}

/* ---- memory that runs out -------------------------------------------------------------------------------------------------- */

typedef struct attempt { int32_t what; const char *path; } attempt;

static apt_result attempt_prune(apt_ctx *ctx, void *user)
{
    const attempt *a = (const attempt *)user;
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = NULL;
    apt_trainer *t = NULL;
    apt_train_desc td = APT_ZERO;
    apt_magnitude_desc d = APT_ZERO;
    apt_iterative_desc it = APT_ZERO;
    apt_sparse s = APT_ZERO;
    test_batch b;
    const float w[4] = {0, 1, 0, 2};
    td.steps = 6;
    td.method = a->what == 1 ? APT_METHOD_LORA : APT_METHOD_FULL;
    d.sparsity = 0.5;
    d.global = a->what == 1;
    it.iterations = 2;
    apt_result r = apt_model_create(ctx, &c, 1, &m);
    if (r == APT_OK) r = apt_trainer_create(m, &td, &t);
    if (r == APT_OK && a->what < 2) r = apt_trainer_magnitude(t, &d, NULL);
    if (r == APT_OK && a->what == 0) {
        const uint64_t mask[4] = {1, 2, 3, 4};
        r = apt_model_set_bitmask(m, QUERY, mask, 4);
        apt_trainer_destroy(t);
        if (r == APT_OK) r = apt_model_compress(m, 0, NULL);
        if (r == APT_OK) r = apt_model_save_sparse(m, a->path, NULL);
    }
    if (r == APT_OK && a->what == 2) r = apt_trainer_iterative(t, &it);
    test_batch_at(&b, &c, 3, 0, 4);
    if (r == APT_OK && a->what == 2) r = apt_trainer_step(t, &b.b, NULL);
    char file[700];
    test_join(file, sizeof file, a->path, "run.apt");
    if (r == APT_OK && a->what == 2) r = apt_checkpoint_save(t, file, NULL, 0);
    if (r == APT_OK && a->what == 2) {
        apt_trainer_destroy(t);
        r = apt_trainer_create(m, &td, &t);
        if (r == APT_OK) r = apt_trainer_iterative(t, &it);
        if (r == APT_OK) r = apt_checkpoint_load(t, file, NULL, NULL);
    }
    if (r == APT_OK && a->what == 3) {
        const char *names[1] = {"w"};
        r = apt_sparse_make(ctx, &s, w, 2, 2, 2);
        test_join(file, sizeof file, a->path, "s.safetensors");
        if (r == APT_OK) r = apt_sparse_save(ctx, file, names, &s, 1, NULL);
        apt_sparse_free(ctx, &s);
        if (r == APT_OK) r = apt_sparse_load(ctx, file, "w", &s);
        apt_sparse_free(ctx, &s);
    }
    return r;
}

static void test_memory_failures(void **state)
{
    (void)state;
    char dir[512];
    attempt a = {0, test_dir(dir, sizeof dir)};
    for (; a.what < 4; a.what++) assert_true(test_every_allocation(attempt_prune, &a) > 10);
    test_remove(dir);
}
#endif /* APT_ONLY_CORE */

int main(void)
{
    const struct CMUnitTest tests[] = {
#ifndef APT_ONLY_CORE
        cmocka_unit_test(test_thread_invariance),
        cmocka_unit_test(test_sparse_product),
        cmocka_unit_test(test_compaction),
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_compressed),
#endif
#ifndef __SANITIZE_THREAD__                      /* one thread cannot race */
        cmocka_unit_test(test_selection),
        cmocka_unit_test(test_global),
        cmocka_unit_test(test_threshold),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_apply),
        cmocka_unit_test(test_bad_arguments),
        cmocka_unit_test(test_schedule),
        cmocka_unit_test(test_sparse),
#ifndef APT_ONLY_CORE
        cmocka_unit_test(test_sparse_files),
        cmocka_unit_test(test_model_masks),
        cmocka_unit_test(test_training),
        cmocka_unit_test(test_patterns_of_names),
        cmocka_unit_test(test_bad_descs),
        cmocka_unit_test(test_iterative),
        cmocka_unit_test(test_summary),
        cmocka_unit_test(test_resume_once),
        cmocka_unit_test(test_compressed_life),
        cmocka_unit_test(test_plans),
        cmocka_unit_test(test_hostile_checkpoints),
        cmocka_unit_test(test_folders),
        cmocka_unit_test(test_hostile_folders),
        cmocka_unit_test(test_memory_failures),
#endif
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
