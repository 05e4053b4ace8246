/* Quantisation: scales, integers, calibration and straight-through on raw arrays; the integer kernels of every table against
   plain loops; quantised models of every family: run, generated with, saved, loaded, refused.
   build: cc -std=c11 -O2 tests/test_quantize.c -o test_quantize -lcmocka -lpthread -lm     (-DAPT_ONLY_CORE: raw arrays only) */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

/* ---- raw arrays ----------------------------------------------------------------------------------------------------- */

static const int32_t kinds[2] = {APT_QUANT_INT8, APT_QUANT_INT4};

/* -Ofast divides by multiplying with a reciprocal: a scale may be one unit in its last place off, which moves what rounding
   leaves of w, at worst s/2 = |w|/254, by 127 times as many units. */
#ifdef __FAST_MATH__
#define SCALE_OFF 1.2e-7f
#define ERROR_OFF 1e-4
#else
#define SCALE_OFF 0.0f
#define ERROR_OFF 1e-6
#endif

static float limit_of(int32_t kind)
{
    return kind == APT_QUANT_INT8 ? 127.0f : 7.0f;
}

static int64_t group_of(int32_t kind, int64_t col)
{
    return kind == APT_QUANT_INT8 ? 0 : col / 32;
}

static float *normal_block(int64_t n, uint64_t seed)
{
    float *x = (float *)test_memory_block((size_t)(n + 1) * sizeof(float));
    apt_rng rng = apt_rng_make(seed, 5);
    for (int64_t i = 0; i < n; i++) x[i] = apt_rng_normal(&rng);
    return x;
}

/* A matrix with everything of its quantised form. */
typedef struct matrix {
    int32_t kind;
    int64_t rows, cols, bytes, scales;
    float *w, *scale, *back;
    uint8_t *q;
} matrix;

static matrix matrix_make(apt_ctx *ctx, int32_t kind, int64_t rows, int64_t cols, uint64_t seed)
{
    matrix m;
    m.kind = kind;
    m.rows = rows;
    m.cols = cols;
    m.bytes = apt_quant_bytes(kind, rows, cols);
    m.scales = apt_quant_scales(kind, rows, cols);
    m.w = normal_block(rows * cols, seed);
    m.scale = normal_block(m.scales, 1);
    m.back = normal_block(rows * cols, 2);
    m.q = (uint8_t *)test_memory_block((size_t)m.bytes + 1);
    m.q[m.bytes] = 0x5a;
    assert_result(apt_quant_absmax(ctx, kind, m.scale, m.w, cols, rows, cols), APT_OK);
    assert_result(apt_quantize(ctx, kind, m.q, m.scale, m.w, cols, rows, cols), APT_OK);
    assert_int_equal(m.q[m.bytes], 0x5a);
    return m;
}

static void matrix_free(matrix *m)
{
    free(m->w);
    free(m->scale);
    free(m->back);
    free(m->q);
}

static int32_t integer_at(const matrix *m, int64_t r, int64_t c)
{
    if (m->kind == APT_QUANT_INT8) return (int8_t)m->q[r * m->cols + c];
    return (m->q[r * ((m->cols + 1) / 2) + c / 2] >> (c % 2 != 0 ? 4 : 0) & 15) - 8;
}

static float scale_at(const matrix *m, int64_t r, int64_t c)
{
    return m->scale[r * (m->scales / m->rows) + group_of(m->kind, c)];
}

/* Every value is within half a step, the largest of a group takes the last one, and going there again changes nothing. */
static void test_round_trip(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 97, 1023, 1024, 1025, 2081};
    for (size_t k = 0; k < 2 * sizeof(sizes) / sizeof(sizes[0]); k++) {
        matrix m = matrix_make(NULL, kinds[k % 2], 3, sizes[k / 2], k);
        uint8_t *again = (uint8_t *)test_memory_block((size_t)m.bytes);
        assert_int_equal(m.bytes, m.kind == APT_QUANT_INT8 ? m.rows * m.cols : m.rows * ((m.cols + 1) / 2));
        assert_int_equal(m.scales, m.kind == APT_QUANT_INT8 ? m.rows : m.rows * ((m.cols + 31) / 32));
        assert_result(apt_dequantize(NULL, m.kind, m.back, m.cols, m.q, m.scale, m.rows, m.cols), APT_OK);
        for (int64_t r = 0; r < m.rows; r++) {
            for (int64_t c = 0; c < m.cols; c++) {
                const float s = scale_at(&m, r, c), w = m.w[r * m.cols + c], back = m.back[r * m.cols + c];
                float largest = 0;
                for (int64_t i = 0; i < m.cols; i++)
                    if (group_of(m.kind, i) == group_of(m.kind, c)) largest = fmaxf(largest, fabsf(m.w[r * m.cols + i]));
                assert_true(fabsf(s - largest / limit_of(m.kind)) <= SCALE_OFF * s);
                assert_true(back == (float)integer_at(&m, r, c) * s);
                assert_true(fabsf(back - w) <= s * 0.500001f);
                if (fabsf(w) == largest) assert_int_equal(abs(integer_at(&m, r, c)), (int)limit_of(m.kind));
            }
            if (m.kind == APT_QUANT_INT4 && m.cols % 2 != 0) assert_int_equal(m.q[(r + 1) * ((m.cols + 1) / 2) - 1] >> 4, 8);
        }
        assert_result(apt_quantize(NULL, m.kind, again, m.scale, m.back, m.cols, m.rows, m.cols), APT_OK);
        assert_memory_equal(again, m.q, (size_t)m.bytes);
        assert_result(apt_fake_quantize(NULL, m.kind, m.w, m.cols, m.scale, m.w, m.cols, m.rows, m.cols), APT_OK);
        assert_memory_equal(m.w, m.back, (size_t)(m.rows * m.cols) * sizeof(float));
        free(again);
        matrix_free(&m);
    }
}

/* What stands between the rows is neither read nor written; empty matrices are fine. */
static void test_strides(void **state)
{
    (void)state;
    float w[3 * 8], y[3 * 8], scale[3];
    int8_t q[3 * 5];
    for (int i = 0; i < 24; i++) {
        w[i] = i % 8 < 5 ? (float)(i - 11) : apti_float(0x7fc00000u);
        y[i] = 77;
    }
    assert_result(apt_quant_absmax(NULL, APT_QUANT_INT8, scale, w, 8, 3, 5), APT_OK);
    assert_true(scale[0] == 11.0f / 127 && scale[1] == 3.0f / 127 && scale[2] == 9.0f / 127);
    assert_result(apt_quantize(NULL, APT_QUANT_INT8, q, scale, w, 8, 3, 5), APT_OK);
    assert_result(apt_dequantize(NULL, APT_QUANT_INT8, y, 8, q, scale, 3, 5), APT_OK);
    for (int i = 0; i < 24; i++) assert_true(i % 8 < 5 ? fabsf(y[i] - w[i]) <= scale[i / 8] : y[i] == 77);
    assert_result(apt_quant_absmax(NULL, APT_QUANT_INT4, NULL, NULL, 0, 0, 5), APT_OK);
    assert_result(apt_quantize(NULL, APT_QUANT_INT4, NULL, NULL, NULL, 0, 3, 0), APT_OK);
    assert_result(apt_dequantize(NULL, APT_QUANT_INT8, NULL, 0, NULL, NULL, 0, 0), APT_OK);
    assert_result(apt_fake_quantize(NULL, APT_QUANT_INT8, NULL, 0, NULL, NULL, 0, 0, 7), APT_OK);
    float zero[40] = {0}, none[2];                                    /* a row of zeros has scale 0 and stays zeros */
    assert_result(apt_quant_absmax(NULL, APT_QUANT_INT4, none, zero, 40, 1, 40), APT_OK);
    assert_true(none[0] == 0 && none[1] == 0);
    zero[3] = 5;
    assert_result(apt_fake_quantize(NULL, APT_QUANT_INT4, y, 40, none, zero, 40, 1, 20), APT_OK);
    assert_true(y[3] == 0);
}

static double weighted_error(const float *w, const float *importance, int64_t n, float s, float limit)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = s > 0 ? fmax(-(double)limit, fmin((double)limit, nearbyint((double)(w[i] / s)))) * (double)s : 0;
        sum += (importance != NULL ? (double)importance[i] : 1.0) * ((double)w[i] - x) * ((double)w[i] - x);
    }
    return sum;
}

/* No ratio of the list does better, and what matters most is cut off least. */
static void test_calibration(void **state)
{
    (void)state;
    enum { COLS = 75, ROWS = 4 };
    int32_t clipped = 0;
    for (int32_t k = 0; k < 4; k++) {
        matrix m = matrix_make(NULL, kinds[k % 2], ROWS, COLS, 40 + (uint64_t)k);
        float *importance = normal_block(COLS, 9);
        for (int64_t i = 0; i < COLS; i++) importance[i] *= importance[i];
        const float *weight = k < 2 ? NULL : importance;
        for (int64_t r = 0; r < ROWS; r++) m.w[r * COLS + 5] *= 3;    /* an outlier */
        assert_result(apt_quant_calibrate(NULL, m.kind, m.scale, m.w, COLS, ROWS, COLS, weight), APT_OK);
        for (int64_t g = 0; g < m.scales; g++) {
            const int64_t per = m.scales / ROWS, from = m.kind == APT_QUANT_INT8 ? 0 : g % per * 32, r = g / per;
            const int64_t n = m.kind == APT_QUANT_INT8 || from + 32 > COLS ? COLS - from : 32;
            const float *w = m.w + r * COLS + from, *i = weight != NULL ? weight + from : NULL;
            float full = 0;
            for (int64_t j = 0; j < n; j++) full = fmaxf(full, fabsf(w[j]) / limit_of(m.kind));
            const double mine = weighted_error(w, i, n, m.scale[g], limit_of(m.kind));
            for (int32_t step = 0; step <= 30; step++)
                assert_true(mine <= weighted_error(w, i, n, full * (1 - 0.02f * (float)step), limit_of(m.kind)) * (1 + ERROR_OFF));
            clipped += m.scale[g] < full;
        }
        free(importance);
        matrix_free(&m);
    }
    assert_true(clipped > 8);
    float w[3] = {1, 0.3f, 0.3f}, only[3] = {1, 0, 0}, scale;
    assert_result(apt_quant_calibrate(NULL, APT_QUANT_INT4, &scale, w, 3, 1, 3, only), APT_OK);
    assert_true(scale == 1.0f / 7);                                   /* nothing but the largest counts */
}

/* The gradient passes where the value is rounded only, up to half a step beyond the last one. */
static void test_straight_through(void **state)
{
    (void)state;
    float w[6] = {0, 12.6f, 12.8f, -12.74f, -13, 3}, dw[6] = {1, 2, 3, 4, 5, 6}, y[6], scale[1] = {0.1f};
    assert_result(apt_fake_quantize(NULL, APT_QUANT_INT8, y, 6, scale, w, 6, 1, 6), APT_OK);
    assert_true(y[0] == 0 && y[2] == 127 * 0.1f && y[4] == -127 * 0.1f && fabsf(y[5] - 3) < 1e-6f);
    assert_result(apt_fake_quantize_backward(NULL, APT_QUANT_INT8, dw, 6, scale, w, 6, 1, 6), APT_OK);
    assert_true(dw[0] == 1 && dw[1] == 2 && dw[2] == 0 && dw[3] == 4 && dw[4] == 0 && dw[5] == 6);
    for (int32_t k = 0; k < 2; k++) {                                 /* by max|w| nothing is cut off */
        matrix m = matrix_make(NULL, kinds[k], 5, 70, 3);
        float *grad = normal_block(350, 8), *same = normal_block(350, 8);
        assert_result(apt_fake_quantize_backward(NULL, m.kind, grad, 70, m.scale, m.w, 70, 5, 70), APT_OK);
        assert_memory_equal(grad, same, 350 * sizeof(float));
        for (int64_t i = 0; i < m.scales; i++) m.scale[i] *= 0.5f;
        assert_result(apt_fake_quantize_backward(NULL, m.kind, grad, 70, m.scale, m.w, 70, 5, 70), APT_OK);
        int32_t gone = 0;
        for (int64_t i = 0; i < 350; i++) {
            const bool beyond = fabsf(m.w[i]) > scale_at(&m, i / 70, i % 70) * (limit_of(m.kind) + 0.5f);
            assert_true(grad[i] == (beyond ? 0 : same[i]));
            gone += beyond;
        }
        assert_true(gone > 5);
        free(grad);
        free(same);
        matrix_free(&m);
    }
}

static void test_names(void **state)
{
    (void)state;
    char message[128];
    int32_t kind = 9;
    assert_string_equal(apt_quant_kind_name(APT_QUANT_INT8), "int8");
    assert_string_equal(apt_quant_kind_name(APT_QUANT_INT4), "int4");
    assert_null(apt_quant_kind_name(APT_QUANT_NONE));
    assert_null(apt_quant_kind_name(3));
    assert_result(apt_quant_kind_from_name("int4", &kind, message, sizeof message), APT_OK);
    assert_true(kind == APT_QUANT_INT4 && message[0] == 0);
    assert_result(apt_quant_kind_from_name("int2", &kind, message, sizeof message), APT_E_ARGUMENT);
    assert_string_equal(message, "unknown quantisation 'int2'; supported: int8, int4");
    assert_result(apt_quant_kind_from_name(NULL, &kind, NULL, 0), APT_E_ARGUMENT);
    assert_result(apt_quant_kind_from_name("int8", NULL, message, sizeof message), APT_E_ARGUMENT);
}

static void test_bad_input(void **state)
{
    (void)state;
    float w[64], scale[2] = {1, 1}, nan[64];
    int8_t q[64];
    for (int i = 0; i < 64; i++) {
        w[i] = 1;
        q[i] = 1;
        nan[i] = i == 63 ? apti_float(0x7f800000u) : 0;
    }
    assert_int_equal(apt_quant_bytes(0, 1, 1), -1);
    assert_int_equal(apt_quant_bytes(APT_QUANT_INT8, -1, 1), -1);
    assert_int_equal(apt_quant_bytes(APT_QUANT_INT8, 1, APT_QUANT_IN + 1), -1);
    assert_int_equal(apt_quant_bytes(APT_QUANT_INT8, INT64_MAX, 2), -1);
    assert_int_equal(apt_quant_scales(APT_QUANT_INT4, INT64_MAX, 64), -1);
    assert_result(apt_quant_absmax(NULL, 7, scale, w, 32, 2, 32), APT_E_UNSUPPORTED);
    assert_result(apt_quant_absmax(NULL, 1, NULL, w, 32, 2, 32), APT_E_ARGUMENT);
    assert_result(apt_quant_absmax(NULL, 1, scale, NULL, 32, 2, 32), APT_E_ARGUMENT);
    assert_result(apt_quant_absmax(NULL, 1, scale, w, 31, 2, 32), APT_E_SHAPE);
    assert_result(apt_quant_absmax(NULL, 1, scale, w, 32, -2, 32), APT_E_ARGUMENT);
    assert_result(apt_quant_absmax(NULL, 1, scale, w, 32, 2, APT_QUANT_IN + 1), APT_E_RANGE);
    assert_result(apt_quant_absmax(NULL, 1, scale, nan, 32, 2, 32), APT_E_NONFINITE);
    assert_result(apt_quant_calibrate(NULL, 1, scale, w, 32, 2, 32, nan + 32), APT_E_NONFINITE);
    scale[0] = scale[1] = 1;
    assert_result(apt_quantize(NULL, 1, NULL, scale, w, 32, 2, 32), APT_E_ARGUMENT);
    assert_result(apt_quantize(NULL, 1, q, scale, nan, 32, 2, 32), APT_E_NONFINITE);
    assert_result(apt_dequantize(NULL, 2, NULL, 32, q, scale, 2, 32), APT_E_ARGUMENT);
    assert_result(apt_dequantize(NULL, 1, w, 32, NULL, scale, 2, 32), APT_E_ARGUMENT);
    q[63] = -128;
    assert_result(apt_dequantize(NULL, 1, w, 32, q, scale, 2, 32), APT_E_RANGE);
    for (int i = 0; i < 64; i++) q[i] = (int8_t)0x88;
    assert_result(apt_dequantize(NULL, 2, w, 31, q, scale, 2, 31), APT_OK);
    q[15] = (int8_t)0x98;                                             /* behind the 31st weight */
    assert_result(apt_dequantize(NULL, 2, w, 31, q, scale, 2, 31), APT_E_RANGE);
    q[15] = (int8_t)0x80;
    assert_result(apt_dequantize(NULL, 2, w, 31, q, scale, 2, 31), APT_E_RANGE);
    assert_result(apt_fake_quantize(NULL, 1, NULL, 32, scale, w, 32, 2, 32), APT_E_ARGUMENT);
    assert_result(apt_fake_quantize_backward(NULL, 1, w, 31, scale, w, 32, 2, 32), APT_E_SHAPE);
    scale[1] = -1;
    assert_result(apt_quantize(NULL, 1, q, scale, w, 32, 2, 32), APT_E_RANGE);
    scale[1] = apti_float(0x7fc00000u);
    assert_result(apt_fake_quantize(NULL, 1, w, 32, scale, w, 32, 2, 32), APT_E_NONFINITE);
}

#ifndef APT_ONLY_CORE
#include "model_test.h"

/* Threads change nothing, and a context tells what is wrong. */
static void test_contexts(void **state)
{
    (void)state;
    static const int32_t threads[] = {1, 2, 3, 8};
    for (int32_t k = 0; k < 2; k++) {
        matrix plain = matrix_make(NULL, kinds[k], 37, 129, 5);
        for (int32_t i = 0; i < 4; i++) {
            test_log log;
            apt_ctx *ctx = test_context(threads[i], &log);
            matrix m = matrix_make(ctx, kinds[k], 37, 129, 5);
            assert_memory_equal(m.q, plain.q, (size_t)m.bytes);
            assert_result(apt_quant_calibrate(ctx, m.kind, m.scale, m.w, 129, 37, 129, NULL), APT_OK);
            assert_result(apt_quant_calibrate(NULL, m.kind, plain.scale, m.w, 129, 37, 129, NULL), APT_OK);
            assert_memory_equal(m.scale, plain.scale, (size_t)m.scales * sizeof(float));
            assert_result(apt_quantize(ctx, 5, m.q, m.scale, m.w, 129, 37, 129), APT_E_UNSUPPORTED);
            assert_non_null(strstr(apt_error(ctx), "supported: int8, int4"));
            matrix_free(&m);
            apt_destroy(ctx);
        }
        matrix_free(&plain);
    }
}

/* ---- kernels -------------------------------------------------------------------------------------------------------- */

static const apt_dtype types[2] = {APT_I8, APT_U8};

static void every_table(void (*check)(const apti_quant_kernels *, apt_ctx *, int32_t))
{
    const apti_quant_kernels *list[8];
    const int32_t n = apti_quant_kernels_list(list, 8);
    for (int32_t i = TEST_FIRST_TABLE(n); i < n; i++) {
        test_log log;
        apt_desc desc = test_desc(NULL, &log);
        desc.kernels = list[i]->base;
        desc.threads = 2;
        apt_ctx *ctx = apt_create(&desc);
        assert_non_null(ctx);
        ctx->quant = list[i];
        for (int32_t k = 0; k < 2; k++) check(list[i], ctx, k);
        apt_destroy(ctx);
    }
    static const char *const all[] = {"avx2", "avx512", "avx512vnni", "amx", "neon", "dotprod"};
    for (int32_t a = 0; a < 6; a++) {
        bool there = false;
        for (int32_t i = 0; i < n; i++) there = there || strcmp(list[i]->name, all[a]) == 0;
        if (!there) print_message("    (no %s on this processor)\n", all[a]);
    }
}

/* The panels of m, and back. */
static apti_packed packed_make(apt_ctx *ctx, const matrix *m, apt_dtype type)
{
    apti_packed packed = APT_ZERO;
    assert_true(apti_packed_reserve(ctx, &packed, m->rows, m->cols, type));
    apti_quant_read(ctx, &packed, m->q, m->scale);
    uint8_t *q = (uint8_t *)test_memory_block((size_t)m->bytes);
    float *scale = (float *)test_memory_block((size_t)m->scales * sizeof(float));
    apti_quant_write(ctx, q, &packed, false);
    apti_quant_write(ctx, scale, &packed, true);
    assert_memory_equal(q, m->q, (size_t)m->bytes);
    assert_memory_equal(scale, m->scale, (size_t)m->scales * sizeof(float));
    free(q);
    free(scale);
    return packed;
}

/* One panel times `rows` rows: int32 sums as plain loops have them, int4 the same chain of multiply-adds bit for bit. */
static void check_tile(const apti_quant_kernels *quant, apt_ctx *ctx, int32_t k, int32_t rows, int64_t cols, bool extreme)
{
    matrix m = matrix_make(NULL, kinds[k], quant->nr, cols, (uint64_t)cols);
    const int64_t groups = (cols + 31) / 32, bytes = groups * 64;
    float *x = normal_block(rows * cols, 77);
    for (int64_t i = 0; extreme && i < m.rows * cols; i++) m.w[i] = i / cols % 2 == 0 || i % 3 == 0 ? 1.0f : -1.0f;
    for (int64_t i = 0; extreme && i < rows * cols; i++) x[i] = i / cols % 2 == 0 || i % 3 == 0 ? 1.0f : -1.0f;
    assert_result(apt_quant_absmax(NULL, m.kind, m.scale, m.w, cols, m.rows, cols), APT_OK);
    assert_result(apt_quantize(NULL, m.kind, m.q, m.scale, m.w, cols, m.rows, cols), APT_OK);
    apti_packed packed = packed_make(ctx, &m, types[k]);
    uint8_t *a = (uint8_t *)test_memory_block((size_t)(rows * bytes));
    const int64_t row_sums = k == 0 ? 1 : groups, stretch = k == 0 ? 32 * groups : 32;
    int32_t *sums = (int32_t *)test_memory_block((size_t)(rows * row_sums) * sizeof(int32_t));
    int32_t out[APTI_QUANT_MR_MAX * APTI_QUANT_NR_MAX];
    const bool wide = quant->wide && k == 0;
    for (int32_t r = 0; r < rows; r++)
        (void)quant->narrow(a + r * bytes, sums + r * row_sums, stretch, x + r * cols, cols, wide);
    apti_quant_tile t = APT_ZERO;
    t.rows = rows;
    t.groups = groups;
    t.a = a;
    t.a_row = bytes;
    t.a_sums = (k == 0 ? quant->sums8 : quant->sums4) ? sums : NULL;
    t.b = apti_quant_panel(&packed, 0);
    t.scale = apti_quant_scales(&packed, 0);
    t.sums = out;
    t.to = (float *)(void *)out;
    t.ld = quant->nr;
    if (quant->begin != NULL) quant->begin();
    if (k == 0) quant->int8(&t);
    else quant->int4(&t);
    if (quant->end != NULL) quant->end();
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t j = 0; j < quant->nr; j++) {
            int64_t sum = 0;
            float chain = 0;
            for (int64_t g = 0, c = 0; g < groups; g++) {
                int32_t part = 0;
                for (; c < cols && c < 32 * (g + 1); c++)
                    part += integer_at(&m, j, c) * (wide ? ((const int16_t *)(void *)(a + r * bytes))[c] : (int8_t)a[r * bytes + c]);
                sum += part;
                if (k == 1) chain = fmaf(scale_at(&m, j, 32 * g), (float)part, chain);
            }
            if (k == 0 && out[r * quant->nr + j] != sum)
                fail_msg("%s, %d rows, %d columns: sum %d is %d, expected %lld", quant->name, (int)rows, (int)cols, (int)j,
                         (int)out[r * quant->nr + j], (long long)sum);
            if (k == 1 && memcmp(&out[r * quant->nr + j], &chain, sizeof chain) != 0)
                fail_msg("%s, int4, %d rows, %d columns: value %d is %g, expected %g", quant->name, (int)rows, (int)cols, (int)j,
                         (double)t.to[r * quant->nr + j], (double)chain);
        }
    }
    apti_free(ctx, packed.data);
    free(a);
    free(sums);
    free(x);
    matrix_free(&m);
}

static void check_tiles(const apti_quant_kernels *quant, apt_ctx *ctx, int32_t k)
{
    for (int32_t rows = 1; rows <= quant->mr; rows++) {
        for (int64_t cols = 1; cols <= 70; cols++) check_tile(quant, ctx, k, rows, cols, false);
        check_tile(quant, ctx, k, rows, 1000, true);
    }
    check_tile(quant, ctx, k, 1, APT_QUANT_IN, true);                 /* the largest sum there is: 2,114,060,288 */
}

static void test_tiles(void **state)
{
    (void)state;
    every_table(check_tiles);
}

/* Rows become integers in the same way everywhere: ties to even, the largest is 127, what is not finite is NaN and zeros. */
static void check_narrow(const apti_quant_kernels *quant, apt_ctx *ctx, int32_t k)
{
    (void)ctx;
    int16_t mine[128], plain[128];
    int32_t sums[6], expected[6];
    for (int64_t n = 0; n <= 100; n++) {
        for (int32_t what = 0; what < 8; what++) {
            float *x = normal_block(n, (uint64_t)(n + 1000 * what));
            for (int64_t i = 0; i < n; i++) {
                if (what == 1) x[i] = (float)(i % 255 - 127) * 0.5f;  /* 63.5 steps of one: ties */
                if (what == 2) x[i] = 0;
                if (what == 3) x[i] *= 1e-36f;
                if (what == 4) x[i] *= 1e37f;
                if (what == 5 && i == n - 1) x[i] = apti_float(0x7fc00000u);
                if (what == 6 && i == n / 2) x[i] = apti_float(0xff800000u);
                if (what == 7) x[i] = i == 0 ? -127.0f : (float)(i % 40) + 0.5f;
            }
            for (int64_t stretch = 32; stretch <= 128; stretch *= 2) {
                memset(mine, 0x77, sizeof mine);
                memset(plain, 0x77, sizeof plain);
                memset(sums, 0x77, sizeof sums);
                memset(expected, 0x77, sizeof expected);
                const float s = quant->narrow(mine, sums, stretch, x, n, k == 0);
                const float e = apti_quant_narrow_ref(plain, expected, stretch, x, n, k == 0);
                assert_memory_equal(mine, plain, sizeof mine);
                assert_memory_equal(sums, expected, sizeof sums);
                if (n > 0 && (what == 5 || what == 6)) assert_true(apti_is_nan(s) && apti_is_nan(e));
                else assert_true(s == e && apti_finite(s));
            }
            memset(mine, 0x77, sizeof mine);
            (void)quant->narrow(mine, NULL, 0, x, n, k == 0);
            assert_memory_equal(mine, plain, sizeof mine);
            if (k == 0 && what == 7) assert_true(n < 3 || (plain[0] == -127 && plain[1] == 2 && plain[2] == 2));
            free(x);
        }
    }
}

static void test_narrow(void **state)
{
    (void)state;
    every_table(check_narrow);
}

/* A product with everything that can follow it, against its definition; the same for every number of threads. */
static void check_product(apt_ctx *ctx, int32_t k, int64_t rows, int64_t out, int64_t in)
{
    matrix m = matrix_make(NULL, kinds[k], out, in, 21);
    apti_packed packed = packed_make(ctx, &m, types[k]);
    const int64_t ld = out + 5;
    float *x = normal_block(rows * in, 4), *bias = normal_block(out, 5), *mask = normal_block(out, 6), *res = normal_block(rows * ld, 7);
    float *y = normal_block(rows * ld, 8), *pre = normal_block(rows * ld, 9), *once = NULL;
    apti_gemm g = apti_gemm_begin(y, ld, rows, out, false);
    apti_gemm_left(&g.part[0], x, in, in);
    apti_gemm_packed(&g.part[0], APTI_B_PACKED, &packed);
    g.bias = bias;
    g.act = APT_RELU;
    g.mask = mask;
    g.residual = res;
    g.ld_residual = ld;
    g.pre = pre;
    g.ld_pre = ld;
    const int32_t was = ctx->threads;
    for (int32_t threads = was; threads >= 1; threads--) {            /* the pool stays; fewer threads cut the work differently */
        ctx->threads = threads;
        memset(y, 0, (size_t)(rows * ld) * sizeof(float));
        apti_gemm_run(ctx, &g);
        if (once != NULL) assert_memory_equal(once, y, (size_t)(rows * ld) * sizeof(float));
        if (once == NULL) once = (float *)memcpy(test_memory_block((size_t)(rows * ld) * sizeof(float)), y, (size_t)(rows * ld) * sizeof(float));
    }
    ctx->threads = was;
    int8_t *a = (int8_t *)test_memory_block((size_t)in + 32);
    for (int64_t i = 0; i < rows; i++) {
        const double s = (double)apti_quant_narrow_ref(a, NULL, 0, x + i * in, in, false);
        for (int64_t j = 0; j < out; j++) {
            double z = 0, size = fabs((double)bias[j]);
            for (int64_t c = 0; c < in; c++) {
                const double term = (double)scale_at(&m, j, c) * integer_at(&m, j, c) * a[c] * s;
                z += term;
                size += fabs(term);
            }
            z += (double)bias[j];
            const double expected = ((z > 0 ? z : 0) + (double)res[i * ld + j]) * (double)mask[j];
            if (fabs((double)pre[i * ld + j] - z) > 1e-6 * size || fabs((double)y[i * ld + j] - expected) > 1e-5 * (size + 3))
                fail_msg("%s, kind %d, %d x %d x %d: (%d, %d) is %g, expected %g", ctx->quant->name, (int)k, (int)rows, (int)out,
                         (int)in, (int)i, (int)j, (double)y[i * ld + j], expected);
        }
        for (int64_t j = out; j < ld; j++) assert_true(y[i * ld + j] == 0);
    }
    free(a);
    free(once);
    apti_free(ctx, packed.data);
    matrix_free(&m);
    free(x), free(bias), free(mask), free(res), free(y), free(pre);
}

static void check_products(const apti_quant_kernels *quant, apt_ctx *ctx, int32_t k)
{
    (void)quant;
    for (int64_t rows = 1; rows <= 30; rows++) check_product(ctx, k, rows, rows * 7 % 43 + 1, rows * 13 % 71 + 1);
    check_product(ctx, k, 1, 600, 300);
    check_product(ctx, k, 270, 290, 40);                              /* more than one block of rows and of columns */
    check_product(ctx, k, 40, 20, 9000);                              /* rows so long that few make a block */
}

static void test_products(void **state)
{
    (void)state;
    every_table(check_products);
}

/* A block of narrowed rows, its scales and its strip of sums fit into a task's scratch, for matrices of any width and for every
   table that there can be: also those that this CPU does not run. */
static void test_blocks_fit(void **state)
{
    (void)state;
    char *scratch = (char *)test_memory_block(APTI_SCRATCH_BYTES);
    for (int32_t table = 0; table < 2 * APTI_QUANT_MR_MAX; table++) {
        apti_quant_kernels quant;
        memset(&quant, 0, sizeof quant);
        quant.mr = 1 + table / 2;
        quant.wide = table % 2 != 0;
        quant.sums8 = quant.sums4 = true;
        for (int64_t k = 1; k <= APT_QUANT_IN; k += 1 + k / 7) {
            for (int32_t t = 0; t < 2; t++) {
                apti_packed w = APT_ZERO;
                apti_quant_block block;
                w.k = APT_QUANT_IN - k < k / 7 ? APT_QUANT_IN : k;             /* the widest, too */
                w.type = types[t];
                const int64_t rows = apti_quant_block_make(&block, &quant, &w, scratch);
                assert_true(rows >= 1 && rows <= APTI_QUANT_ROWS && block.bytes >= w.k);
                assert_true((char *)block.rows + rows * block.bytes <= scratch + APTI_SCRATCH_BYTES);
            }
        }
    }
    free(scratch);
}

/* A row of activations that is not finite makes its own row NaN, no other. */
static void test_not_finite(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    for (int32_t k = 0; k < 2; k++) {
        matrix m = matrix_make(NULL, kinds[k], 9, 40, 2);
        apti_packed packed = packed_make(ctx, &m, types[k]);
        float *x = normal_block(120, 3), y[27];
        x[55] = apti_float(0x7f800000u);
        apti_gemm g = apti_gemm_begin(y, 9, 3, 9, false);
        apti_gemm_left(&g.part[0], x, 40, 40);
        apti_gemm_packed(&g.part[0], APTI_B_PACKED, &packed);
        apti_gemm_run(ctx, &g);
        for (int32_t i = 0; i < 27; i++) assert_true(i / 9 == 1 ? apti_is_nan(y[i]) : apti_finite(y[i]));
        free(x);
        apti_free(ctx, packed.data);
        matrix_free(&m);
    }
    apt_destroy(ctx);
}

/* ---- models --------------------------------------------------------------------------------------------------------- */

static void quantize(apt_model *m, int32_t kind, const apt_batch *batch)
{
    apt_quantize_desc d = APT_ZERO;
    d.kind = kind;
    d.batches = batch;
    d.batch_count = batch != NULL;
    const apt_result r = apt_model_quantize(m, &d);
    if (r != APT_OK) fail_msg("apt_model_quantize: %s (%s)", apt_result_text(r), apt_error(m->ctx));
}

/* ||a - b|| / ||b|| */
static double relative(const float *a, const float *b, int64_t n)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / size);
}

/* Rows of the last hidden state */
static int64_t rows_out(const apt_batch *b)
{
    return b->target_offsets != NULL ? b->target_offsets[b->sequences] : b->offsets[b->sequences];
}

enum { CONFIGS = 4 + TEST_DECODERS };
static apt_config config_of(int32_t which)
{
    if (which >= 4) return test_decoder(which - 4);
    return test_config(which % 2 ? APT_ROBERTA : APT_BERT, which < 2 ? APT_TASK_CLASSIFY : which == 2 ? APT_TASK_MLM : APT_TASK_SPAN);
}

static double logit_error(apt_model *m, const apt_batch *b, const float *before)
{
    int64_t n;
    float *after = test_logits(m, b, &n, NULL, 0);
    const double error = relative(after, before, n);
    free(after);
    return error;
}

/* Every family: near the float model, nearer with calibration where it is coarse, as many bytes smaller as it should be, and
   generating with or without a cache is the same. */
static void test_models(void **state)
{
    (void)state;
    double by_max = 0, calibrated = 0;
    for (int32_t which = 0; which < CONFIGS; which++) {
        for (int32_t k = 0; k < 2; k++) {
            test_log log;
            apt_ctx *ctx = test_context(2, &log);
            const apt_config c = config_of(which);
            apt_model *m = test_model(ctx, &c, 3), *other = test_model(ctx, &c, 3);
            test_batch b;
            int64_t n;
            test_randomise(m, 5);
            test_randomise(other, 5);
            test_batch_at(&b, &c, 1, 0, 5);
            float *before = test_logits(m, &b.b, &n, NULL, 0);
            quantize(m, kinds[k], NULL);
            quantize(other, kinds[k], &b.b);
            apt_config now;
            apt_model_config(m, &now);
            assert_int_equal(now.quant, kinds[k]);
            const double error = logit_error(m, &b.b, before), better = logit_error(other, &b.b, before);
            if (error > (k == 0 ? 0.05 : 0.6)) fail_msg("model %d, kind %d: error %g", (int)which, (int)k, error);
            if (k == 1) by_max += error, calibrated += better;
            if (c.task == APT_TASK_LM) {
                apt_generate_desc d = APT_ZERO;
                int32_t one[5 * 8], two[5 * 8], length[5], length2[5];
                memset(one, 0, sizeof one);
                memset(two, 0, sizeof two);
                d.max_tokens = 8;
                d.ignore_end = 1;
                assert_result(apt_generate(m, &b.b, &d, one, length), APT_OK);
                d.disable_cache = 1;
                assert_result(apt_generate(m, &b.b, &d, two, length2), APT_OK);
                assert_memory_equal(one, two, sizeof one);
            }
            free(before);
            apt_destroy(ctx);
        }
    }
    print_message("    int4: mean error of the logits %.3f by max|w|, %.3f calibrated\n", by_max / CONFIGS, calibrated / CONFIGS);
    assert_true(calibrated < by_max);
}

/* Checkpoints of transformers with random weights. Two differences of all last hidden states, relative to their norm: from the float
   model, and from a float model that has q * scale for weights, so that only the narrowing of activations is left. (Of a task head
   with one output nothing general can be said.) T5 has the largest ones: its attention is not scaled, so that these weights make
   its softmax choose, and an error of a logit turns into another choice. */
static void test_golden(void **state)
{
    (void)state;
    static const struct { const char *name; double bound[2], activations; } cases[] = {
        {"bert", {0.03, 0.3}, 0.02}, {"roberta-qa", {0.03, 0.3}, 0.02}, {"roberta-regression", {0.03, 0.3}, 0.02},
        {"t5-small-case", {0.08, 0.6}, 0.06}, {"t5-relu-tied", {0.08, 0.6}, 0.06},
        {"llama", {0.05, 0.4}, 0.04}, {"llama3-rope", {0.05, 0.4}, 0.04}, {"qwen2", {0.05, 0.4}, 0.04}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int32_t k = 0; k < 2; k++) {
            test_log log;
            char dir[64];
            apt_ctx *ctx = test_context(1, &log);
            apt_model *m = NULL, *plain = NULL;
            test_batch b;
            int64_t n;
            snprintf(dir, sizeof dir, "tests/golden/%s", cases[i].name);
            if (apt_model_load(ctx, dir, NULL, &m) != APT_OK || apt_model_load(ctx, dir, NULL, &plain) != APT_OK)
                fail_msg("%s", apt_error(ctx));
            test_batch_at(&b, &m->config, 4, 0, 8);
            const int64_t room = (int64_t)m->config.hidden * rows_out(&b.b);
            float *before = normal_block(room, 1), *after = normal_block(room, 1), *rounded = normal_block(room, 1);
            free(test_logits(m, &b.b, &n, before, room));
            quantize(m, kinds[k], NULL);
            free(test_logits(m, &b.b, &n, after, room));
            for (int32_t p = 0; p < apt_model_parameters(m); p++) {
                apt_parameter info;
                assert_result(apt_model_parameter(m, p, &info), APT_OK);
                float *w = test_parameter(m, info.name, NULL);
                assert_result(apt_model_set(plain, info.name, w, info.rows * info.cols), APT_OK);
                free(w);
            }
            free(test_logits(plain, &b.b, &n, rounded, room));
            const double error = relative(after, before, room), activations = relative(after, rounded, room);
            print_message("    %-18s %s: error of the hidden states %.4f, of the activations alone %.4f\n", cases[i].name,
                          apt_quant_kind_name(kinds[k]), error, activations);
            assert_true(error > 0 && error < cases[i].bound[k] && activations < cases[i].activations);
            free(before), free(after), free(rounded);
            apt_destroy(ctx);
        }
    }
}

/* The same bits for 1, 2, 3 and 8 threads, and from every integer kernel that goes with the same float ones. */
static void test_threads(void **state)
{
    (void)state;
    static const int32_t threads[] = {1, 2, 3, 8};
    for (int32_t k = 0; k < 2; k++) {
        float *first = NULL;
        for (int32_t i = 0; i < 6; i++) {
            test_log log;
            apt_ctx *ctx = test_context(threads[i % 4], &log);
            apt_config c = test_config(APT_ROBERTA, APT_TASK_MLM);
            test_batch b;
            int64_t n;
            c.hidden = 70;
            c.neurons = 300;
            if (i == 4) ctx->quant = &apti_quant_kernels_ref;
            apt_model *m = test_model(ctx, &c, 3);
            test_randomise(m, 6);
            test_batch_at(&b, &c, 1, 0, 20);
            quantize(m, kinds[k], i == 5 ? NULL : &b.b);
            float *logits = test_logits(m, &b.b, &n, NULL, 0);
            if (first != NULL && i < 5) assert_memory_equal(logits, first, (size_t)n * sizeof(float));
            if (i == 5) assert_true(memcmp(logits, first, (size_t)n * sizeof(float)) != 0);
            if (first == NULL) first = logits;
            else free(logits);
            apt_destroy(ctx);
        }
        free(first);
    }
}

/* Masks of units act, bitmasks' zeros stay, and pruned shapes, also whole sublayers that are gone, are quantised as they are. */
static void test_pruned(void **state)
{
    (void)state;
    for (int32_t which = 0; which < CONFIGS; which++) {
        test_log log;
        apt_ctx *ctx = test_context(2, &log);
        const apt_config c = config_of(which);
        apt_model *m = test_model(ctx, &c, 3);
        apt_units u;
        test_batch b;
        int64_t n;
        test_randomise(m, 8);
        test_batch_at(&b, &c, 1, 0, 4);
        apt_model_units(m, &u);
        float *masks = (float *)test_memory_block((size_t)u.total * sizeof(float));
        for (int32_t i = 0; i < u.total; i++) masks[i] = i % 3 != 0;
        for (int32_t i = 0; i < m->shape[0].kv_heads; i++) masks[i] = 0;                     /* all heads of layer 0 */
        assert_result(apt_model_set_masks(m, masks, u.total), APT_OK);
        apt_model *whole = test_model(ctx, &c, 3);
        test_randomise(whole, 8);
        assert_result(apt_model_set_masks(whole, masks, u.total), APT_OK);
        assert_result(apt_model_compact(m), APT_OK);
        float *before = test_logits(m, &b.b, &n, NULL, 0);
        quantize(m, APT_QUANT_INT8, NULL);
        quantize(whole, APT_QUANT_INT8, NULL);
        assert_true(logit_error(m, &b.b, before) < 0.06 && logit_error(whole, &b.b, before) < 0.06);
        assert_result(apt_model_compact(whole), APT_E_STATE);
        assert_non_null(strstr(apt_error(ctx), "quantised (int8)"));
        free(before);
        free(masks);
        apt_destroy(ctx);
    }
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = config_of(0);
    apt_model *m = test_model(ctx, &c, 3);
    const char *name = "bert.encoder.layer.0.output.dense.weight";
    uint64_t mask[6] = {0x5555555555555555u, 0, 0x3333333333333333u, ~(uint64_t)0, 1, 0};
    assert_result(apt_model_set_bitmask(m, name, mask, 6), APT_OK);
    quantize(m, APT_QUANT_INT4, NULL);
    float *w = test_parameter(m, name, NULL);
    for (int32_t i = 0; i < 384; i++) assert_true((mask[i / 64] >> i % 64 & 1) != 0 || w[i] == 0);
    free(w);
    apt_destroy(ctx);
}

/* Compressed copies go when a model is quantised; calibration watches as if they had never been. */
static void test_compressed(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(2, &log);
    const apt_config c = config_of(0);
    apt_model *plain = test_model(ctx, &c, 3), *compressed = test_model(ctx, &c, 3);
    const char *name = "bert.encoder.layer.0.intermediate.dense.weight";
    uint64_t mask[6];
    for (int32_t i = 0; i < 6; i++) mask[i] = 0x9249249249249249u;
    apt_sparsity used;
    apt_quantize_desc d = APT_ZERO;
    int32_t offsets[5], tokens[80], kind[80];               /* rows enough for the compressed product */
    apt_batch b = APT_ZERO;
    int64_t n;
    for (int32_t i = 0; i < 80; i++) {
        tokens[i] = i % c.vocab;
        kind[i] = 0;
    }
    for (int32_t i = 0; i < 5; i++) offsets[i] = 20 * i;
    b.sequences = 4;
    b.offsets = offsets;
    b.tokens = tokens;
    b.types = kind;
    d.kind = APT_QUANT_INT4;
    d.batches = &b;
    d.batch_count = 1;
    assert_result(apt_model_set_bitmask(plain, name, mask, 6), APT_OK);
    assert_result(apt_model_set_bitmask(compressed, name, mask, 6), APT_OK);
    assert_result(apt_model_compress(compressed, 0.5, &used), APT_OK);
    assert_true(used.weights == 384 && apti_param_find(compressed, name)->sparse.start != NULL);
    assert_result(apt_model_quantize(plain, &d), APT_OK);
    assert_result(apt_model_quantize(compressed, &d), APT_OK);
    assert_null(apti_param_find(compressed, name)->sparse.start);
    float *x = test_logits(plain, &b, &n, NULL, 0), *y = test_logits(compressed, &b, &n, NULL, 0);
    assert_memory_equal(x, y, (size_t)n * sizeof(float));
    assert_result(apt_model_compress(compressed, 0.5, NULL), APT_E_STATE);
    assert_non_null(strstr(apt_error(ctx), "quantised (int4)"));
    free(x);
    free(y);
    apt_destroy(ctx);
}

/* ---- files */

static void test_files(void **state)
{
    (void)state;
    for (int32_t which = 0; which < CONFIGS; which++) {
        for (int32_t k = 0; k < 2; k++) {
            test_log log;
            char dir[512], again[600], one[600], two[600];
            size_t bytes = 0, bytes2 = 0;
            apt_ctx *ctx = test_context(2, &log);
            const apt_config c = config_of(which);
            apt_model *m = test_model(ctx, &c, 3), *back = NULL;
            test_batch b;
            int64_t n;
            test_dir(dir, sizeof dir);
            test_join(again, sizeof again, dir, "again");
            test_randomise(m, 9);
            test_batch_at(&b, &c, 1, 0, 4);
            quantize(m, kinds[k], &b.b);
            assert_result(apt_model_save(m, dir), APT_OK);
            if (apt_model_load(ctx, dir, NULL, &back) != APT_OK) fail_msg("%s", apt_error(ctx));
            assert_int_equal(back->config.quant, kinds[k]);
            assert_true(test_model_sum(back) == test_model_sum(m));
            float *mine = test_logits(m, &b.b, &n, NULL, 0), *theirs = test_logits(back, &b.b, &n, NULL, 0);
            assert_memory_equal(mine, theirs, (size_t)n * sizeof(float));
            assert_result(apt_model_save(back, again), APT_OK);
            test_join(one, sizeof one, dir, "model.safetensors");
            test_join(two, sizeof two, again, "model.safetensors");
            char *x = test_read_file(one, &bytes), *y = test_read_file(two, &bytes2);
            assert_int_equal(bytes, bytes2);
            assert_memory_equal(x, y, bytes);
            free(x), free(y), free(mine), free(theirs);
            apt_destroy(ctx);
            test_remove(dir);
        }
    }
}

/* Every lie that a folder can tell is met with the file, the tensor, and what was expected. */
typedef struct lie { const char *tensor; apt_dtype type; int32_t dims; int64_t shape[2]; int32_t fault; const char *expected; } lie;



/* The tensors of a folder as they are, but for the one that the lie is about. */
static void write_lie(apt_ctx *ctx, const char *dir, const char *from, const lie *l)
{
    char path[600];
    apti_tensors *set = NULL;
    assert_result(apti_tensors_open(ctx, from, &set), APT_OK);
    apti_tensor_item *items = (apti_tensor_item *)test_memory_block((size_t)set->count * sizeof *items);
    uint8_t *data = (uint8_t *)test_memory_block(1 << 16);
    int32_t n = 0;
    for (int32_t i = 0; i < set->count; i++) {
        const apti_tensor_view *v = &set->views[i];
        apti_tensor_item *item = &items[n];
        memset(item, 0, sizeof *item);
        item->name = v->name;
        item->dtype = v->dtype;
        item->dims = v->dims;
        memcpy(item->shape, v->shape, sizeof item->shape);
        item->data = v->data;
        const bool this_one = strcmp(v->name, l->tensor) == 0;
        if (this_one && l->fault < 0) continue;                       /* missing */
        n++;
        if (!this_one) continue;
        if (l->dims > 0) {
            item->dtype = l->type;
            item->dims = l->dims;
            item->shape[0] = l->shape[0];
            item->shape[1] = l->dims > 1 ? l->shape[1] : 0;
        }
        memset(data, 0x11, 1 << 16);
        if (l->dims == 0) memcpy(data, v->data, (size_t)v->bytes);
        if (l->fault > 0) memset(data + 5, l->fault, 5);
        item->data = data;
    }
    apti_tensor_job job = APT_ZERO;
    apti_writer w;
    test_join(path, sizeof path, dir, "model.safetensors");
    job.path = path;
    job.items = items;
    job.count = n;
    assert_result(apti_write_begin(ctx, path, &w), APT_OK);
    assert_result(apti_tensors_emit(&w, &job), APT_OK);
    assert_result(apti_write_ready(&w), APT_OK);
    assert_result(apti_write_commit(&w), APT_OK);
    apti_write_abort(&w);
    apti_tensors_close(set);
    free(items);
    free(data);
}

#define QUERY "bert.encoder.layer.1.attention.self.query.weight"
static void test_hostile_files(void **state)
{
    (void)state;
    static const lie lies[2][8] = {
        {{QUERY, APT_I8, 2, {16, 15}, 0, "I8 of shape [16, 15], expected I8 of shape [16, 16]"},
         {QUERY, APT_U8, 2, {16, 16}, 0, "is U8 of shape [16, 16], expected I8"},
         {QUERY, APT_F32, 2, {16, 16}, 0, "is F32 of shape [16, 16], expected I8"},
         {QUERY "_scale", APT_F32, 1, {15, 0}, 0, "F32 of shape [15], expected F32 of shape [16]"},
         {QUERY "_scale", APT_F16, 1, {16, 0}, 0, "is F16 of shape [16], expected F32"},
         {QUERY, APT_I8, 0, {0, 0}, 0x80, "row 0, value 5 is -128, expected at least -127"},
         {QUERY "_scale", APT_F32, 0, {0, 0}, 0xff, "expected a scale of 0 or more"},
         {QUERY "_scale", APT_F32, 0, {0, 0}, -1, "no tensor '" QUERY "_scale', which config.json wants"}},
        {{QUERY, APT_U8, 2, {16, 16}, 0, "U8 of shape [16, 16], expected U8 of shape [16, 8]"},
         {QUERY, APT_I8, 2, {16, 8}, 0, "is I8 of shape [16, 8], expected U8"},
         {QUERY, APT_U8, 0, {0, 0}, 0x01, "row 0, value 11 is -8, expected at least -7"},
         {QUERY "_scale", APT_F32, 2, {16, 2}, 0, "F32 of shape [16, 2], expected F32 of shape [16, 1]"},
         {QUERY "_scale", APT_F32, 1, {16, 0}, 0, "F32 of shape [16], expected F32 of shape [16, 1]"},
         {QUERY "_scale", APT_F64, 2, {16, 1}, 0, "is F64 of shape [16, 1], expected F32"},
         {QUERY "_scale", APT_F32, 0, {0, 0}, 0xff, "expected a scale of 0 or more"},
         {QUERY, APT_U8, 0, {0, 0}, -1, "no tensor '" QUERY "', which config.json wants"}}};
    for (int32_t k = 0; k < 2; k++) {
        for (int32_t i = 0; i < 8; i++) {
            test_log log;
            char dir[512];
            apt_ctx *ctx = test_context(1, &log);
            const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
            apt_model *m = test_model(ctx, &c, 3), *back = NULL;
            test_dir(dir, sizeof dir);
            quantize(m, kinds[k], NULL);
            assert_result(apt_model_save(m, dir), APT_OK);
            write_lie(ctx, dir, dir, &lies[k][i]);
            const int64_t blocks = apt_memory_info(ctx).blocks;
            assert_true(apt_model_load(ctx, dir, NULL, &back) < 0 && back == NULL);
            if (strstr(apt_error(ctx), lies[k][i].expected) == NULL || strstr(apt_error(ctx), dir) == NULL)
                fail_msg("lie %d of kind %d: \"%s\", expected \"%s\"", (int)i, (int)k, apt_error(ctx), lies[k][i].expected);
            assert_int_equal(apt_memory_info(ctx).blocks, blocks);
            apt_destroy(ctx);
            test_remove(dir);
        }
    }
}

/* config.json: an unknown kind, a wrong type, floats behind the word, and other people's quantisation. */
static void test_hostile_config(void **state)
{
    (void)state;
    static const char *const change[4][3] = {
        {"\"quantization\": \"int8\"", "\"quantization\": \"int3\"", "\"apt.quantization\" is int3, expected int8|int4"},
        {"\"quantization\": \"int8\"", "\"quantization\": 8", "\"apt.quantization\" is 8, expected"},
        {"\"quantization\": \"int8\"", "\"quantization\": \"int4\"", "expected U8 of shape [16, 8]"},
        {"\"architectures\"", "\"quantization_config\": {\"bits\": 4}, \"architectures\"", "\"quantization_config\" is"},
    };
    for (int32_t i = 0; i < 5; i++) {
        test_log log;
        char dir[512], path[600];
        size_t bytes = 0;
        apt_ctx *ctx = test_context(1, &log);
        const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
        apt_model *m = test_model(ctx, &c, 3), *back = NULL;
        test_dir(dir, sizeof dir);
        test_join(path, sizeof path, dir, "config.json");
        quantize(m, APT_QUANT_INT8, NULL);
        assert_result(apt_model_save(m, dir), APT_OK);
        char *text = test_read_file(path, &bytes), *at = i < 4 ? strstr(text, change[i][0]) : text;
        assert_non_null(at);
        if (i < 4) {
            char *out = (char *)test_memory_block(bytes + 200);
            const size_t head = (size_t)(at - text);
            memcpy(out, text, head);
            const int n = snprintf(out + head, bytes + 200 - head, "%s%.*s", change[i][1],
                                   (int)(bytes - head - strlen(change[i][0])), at + strlen(change[i][0]));
            test_write_file(path, out, head + (size_t)n);
            free(out);
        } else {                                                      /* the config of a float model beside int8 weights */
            char other[600];
            test_join(other, sizeof other, dir, "other");
            apt_model *plain = test_model(ctx, &c, 3);
            assert_result(apt_model_save(plain, other), APT_OK);
            test_join(other, sizeof other, dir, "other/config.json");
            free(text);
            text = test_read_file(other, &bytes);
            test_write_file(path, text, bytes);
        }
        assert_true(apt_model_load(ctx, dir, NULL, &back) < 0 && back == NULL);
        const char *expected = i < 4 ? change[i][2] : "has dtype I8, expected F64, F32, F16 or BF16";
        if (strstr(apt_error(ctx), expected) == NULL) fail_msg("%d: \"%s\", expected \"%s\"", (int)i, apt_error(ctx), expected);
        free(text);
        apt_destroy(ctx);
        test_remove(dir);
    }
}

/* ---- what is refused, and memory */

static void test_refusals(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 3), *made = NULL;
    apt_quantize_desc d = APT_ZERO;
    test_batch b;
    apt_train_desc train = APT_ZERO;
    apt_trainer *t = NULL;
    apt_estimate_info info;
    uint64_t mask[4] = {1, 2, 3, 4};
    float *w = test_parameter(m, QUERY, NULL), *bias = test_parameter(m, "classifier.bias", NULL);
    train.steps = 2;
    train.method = APT_METHOD_LORA;
    test_batch_at(&b, &c, 1, 0, 3);
    const uint64_t sum = test_model_sum(m);
    assert_result(apt_model_quantize(NULL, &d), APT_E_ARGUMENT);
    assert_result(apt_model_quantize(m, NULL), APT_E_ARGUMENT);
    assert_result(apt_model_quantize(m, &d), APT_E_UNSUPPORTED);
    assert_non_null(strstr(apt_error(ctx), "supported: int8 (1), int4 (2)"));
    d.kind = APT_QUANT_INT8;
    d.end_canary = 1;
    assert_result(apt_model_quantize(m, &d), APT_E_ARGUMENT);
    d.end_canary = 0;
    d.batch_count = 1;
    assert_result(apt_model_quantize(m, &d), APT_E_ARGUMENT);
    d.batches = &b.b;
    b.tokens[2] = 1000;
    assert_result(apt_model_quantize(m, &d), APT_E_RANGE);
    assert_null(m->squares);
    b.tokens[2] = 1;
    t = test_trainer(m, &train);
    assert_result(apt_model_quantize(m, &d), APT_E_STATE);
    apt_trainer_destroy(t);
    assert_result(apt_model_quantize(m, &d), APT_E_STATE);
    assert_non_null(strstr(apt_error(ctx), "apt_model_merge first"));
    assert_result(apt_model_merge(m, NULL, NULL), APT_OK);
    assert_true(test_model_sum(m) == sum);
    assert_result(apt_model_quantize(m, &d), APT_OK);
    assert_result(apt_model_quantize(m, &d), APT_E_STATE);
    assert_result(apt_trainer_create(m, &train, &t), APT_E_STATE);
    assert_non_null(strstr(apt_error(ctx), "apt_trainer_create: the model is quantised (int8)"));
    assert_result(apt_model_set(m, QUERY, w, 256), APT_E_STATE);
    assert_result(apt_model_set(m, "classifier.bias", bias, 3), APT_OK);
    assert_result(apt_model_set_bitmask(m, QUERY, mask, 4), APT_E_STATE);
    assert_result(apt_model_save_sparse(m, "/nowhere", NULL), APT_E_STATE);
    assert_result(apt_model_merge(m, NULL, NULL), APT_OK);            /* nothing to merge */
    assert_result(apt_estimate(ctx, &m->config, &train, 8, 1, &info), APT_E_STATE);
    apt_config wide = c;
    wide.quant = 7;
    assert_result(apt_model_create(ctx, &wide, 1, &made), APT_E_UNSUPPORTED);
    wide.quant = APT_QUANT_INT4;
    wide.neurons = APT_QUANT_IN + 1;
    assert_result(apt_model_create(ctx, &wide, 1, &made), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "at most 131072 inputs"));
    apti_param *p = apti_param_find(test_model(ctx, &c, 4), QUERY);
    memset(p->packed.data, 0xff, 64);
    d.batches = NULL;
    d.batch_count = 0;
    assert_result(apt_model_quantize(ctx->models, &d), APT_E_NONFINITE);
    assert_non_null(strstr(apt_error(ctx), QUERY));
    free(w);
    free(bias);
    apt_destroy(ctx);
}

/* The weights' memory shrinks as it should, and apt_estimate knows it beforehand. */
static void test_memory_held(void **state)
{
    (void)state;
    int64_t bytes[3];
    for (int32_t kind = 0; kind < 3; kind++) {
        test_log log;
        apt_ctx *ctx = test_context(1, &log);
        apt_config c = test_config(APT_LLAMA, APT_TASK_LM);
        apt_estimate_info info;
        test_batch b;
        c.labels = 0;
        c.types = 0;
        c.hidden = 128;
        c.heads = 8;
        c.head_dim = 16;
        c.neurons = 384;
        c.quant = kind;
        const int64_t empty = apt_memory_info(ctx).bytes;
        apt_model *m = test_model(ctx, &c, 3);                        /* made quantised */
        bytes[kind] = apt_memory_info(ctx).bytes - empty;
        apt_memory_reset_peak(ctx);
        test_batch_at(&b, &c, 1, 0, 8);
        const int32_t tokens = b.offsets[8];
        int64_t n;
        free(test_logits(m, &b.b, &n, NULL, 0));
        const int64_t peak = apt_memory_info(ctx).peak_bytes;
        assert_result(apt_estimate(ctx, &c, NULL, tokens, 8, &info), APT_OK);
        assert_int_equal(info.weights, bytes[kind]);
        assert_in_range(peak, info.total - info.total / 50, info.total + info.total / 50);
        apt_config plain = c;
        plain.quant = APT_QUANT_NONE;
        apt_model *later = test_model(ctx, &plain, 3);                /* or quantised afterwards: the same, bit for bit */
        if (kind != APT_QUANT_NONE) quantize(later, kind, NULL);
        assert_true(test_model_sum(later) == test_model_sum(m));
        assert_int_equal(apt_memory_info(ctx).bytes - empty > 2 * bytes[kind], 1);
        apt_destroy(ctx);
    }
    const double matrices = 4.0 * 2 * (2 * 128 * 128 + 2 * 128 * 128 + 3 * 128 * 384);       /* two layers in float */
    assert_true((double)(bytes[0] - bytes[1]) > 0.74 * matrices - 4096 && (double)(bytes[0] - bytes[2]) > 0.84 * matrices - 4096);
}

/* ---- memory that runs out */

typedef struct folder { const char *dir; int32_t kind; } folder;

/* Quantises with calibration, saves, loads: on failure the model is what it was. */
static apt_result attempt(apt_ctx *ctx, void *user)
{
    const folder *f = (const folder *)user;
    const apt_config c = test_config(APT_ROBERTA, APT_TASK_CLASSIFY);
    apt_model *m = NULL, *back = NULL;
    apt_quantize_desc d = APT_ZERO;
    static test_batch b;
    test_batch_at(&b, &c, 1, 0, 3);
    d.kind = f->kind;
    d.batches = &b.b;
    d.batch_count = 1;
    apt_result r = apt_model_create(ctx, &c, 3, &m);
    if (r != APT_OK) return r;
    const uint64_t before = test_model_sum(m);
    r = apt_model_quantize(m, &d);
    if (r != APT_OK) assert_true(test_model_sum(m) == before && m->config.quant == APT_QUANT_NONE && m->squares == NULL);
    if (r == APT_OK) r = apt_model_save(m, f->dir);
    if (r == APT_OK) r = apt_model_load(ctx, f->dir, NULL, &back);
    if (r == APT_OK) assert_true(test_model_sum(m) == test_model_sum(back));
    return r;
}

static void test_no_memory(void **state)
{
    (void)state;
    char dir[512];
    test_dir(dir, sizeof dir);
    for (int32_t k = 0; k < 2; k++) {
        folder f = {dir, kinds[k]};
        assert_true(test_every_allocation(attempt, &f) > 60);
    }
    test_remove(dir);
}
#endif /* APT_ONLY_CORE */

int main(void)
{
    const struct CMUnitTest tests[] = {
#ifndef APT_ONLY_CORE
        cmocka_unit_test(test_contexts),    cmocka_unit_test(test_products),    cmocka_unit_test(test_threads),
        cmocka_unit_test(test_pruned),
#endif
#ifndef __SANITIZE_THREAD__                      /* nothing but more of the same, or on one thread, which cannot race */
        cmocka_unit_test(test_round_trip),  cmocka_unit_test(test_strides),     cmocka_unit_test(test_calibration),
        cmocka_unit_test(test_straight_through), cmocka_unit_test(test_names),  cmocka_unit_test(test_bad_input),
#ifndef APT_ONLY_CORE
        cmocka_unit_test(test_tiles),       cmocka_unit_test(test_narrow),      cmocka_unit_test(test_blocks_fit),
        cmocka_unit_test(test_not_finite),  cmocka_unit_test(test_models),      cmocka_unit_test(test_golden),
        cmocka_unit_test(test_files),       cmocka_unit_test(test_hostile_files), cmocka_unit_test(test_hostile_config),
        cmocka_unit_test(test_compressed),  cmocka_unit_test(test_refusals),    cmocka_unit_test(test_memory_held),
        cmocka_unit_test(test_no_memory),
#endif
#endif
    };
    return cmocka_run_group_tests_name("quantize", tests, NULL, NULL);
}
