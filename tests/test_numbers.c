/* Section numbers: half precision, random numbers, sums, checksums. The references go through integers and ldexp, so that
   they also hold under -Ofast, which flushes subnormal floats to zero. */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

/* ---------------------------------------------------------------------------------------------------- half precision */

/* A small float format: 1 sign bit, exponent_bits, fraction_bits. */
typedef struct format { int exponent_bits, fraction_bits; uint32_t (*from_float)(float); float (*to_float)(uint32_t); } format;

static uint32_t half_from(float x) { return apti_f32_to_f16(x); }
static float half_to(uint32_t h) { return apti_f16_to_f32((uint16_t)h); }
static uint32_t brain_from(float x) { return apti_f32_to_bf16(x); }
static float brain_to(uint32_t h) { return apti_bf16_to_f32((uint16_t)h); }
static const format g_half = {5, 10, half_from, half_to};
static const format g_brain = {8, 7, brain_from, brain_to};

/* Exact value of a non-negative finite pattern of any such format; one past the largest gives what infinity stands for. */
static double value_of(uint32_t bits, int exponent_bits, int fraction_bits)
{
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (int)(bits >> fraction_bits);
    const double fraction = (double)(bits & ((1u << fraction_bits) - 1));
    if (exponent == 0) return ldexp(fraction, 1 - bias - fraction_bits);
    return ldexp(fraction + (double)(1u << fraction_bits), exponent - bias - fraction_bits);
}

static double float_value(uint32_t bits)
{
    return value_of(bits & 0x7fffffffu, 8, 23);
}

/* The pattern nearest to a non-negative finite float, ties to the even one, found by bisection over all patterns. */
static uint32_t nearest(const format *f, uint32_t float_bits)
{
    const double x = float_value(float_bits);
    const uint32_t infinity = ((1u << f->exponent_bits) - 1) << f->fraction_bits;
    uint32_t low = 0, high = infinity;           /* value(low) <= x < value(high), unless x is beyond all */
    if (x >= value_of(infinity, f->exponent_bits, f->fraction_bits)) return infinity;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (value_of(middle, f->exponent_bits, f->fraction_bits) <= x) low = middle;
        else high = middle;
    }
    const double below = x - value_of(low, f->exponent_bits, f->fraction_bits);
    const double above = value_of(high, f->exponent_bits, f->fraction_bits) - x;
    if (below != above) return below < above ? low : high;
    return low % 2 == 0 ? low : high;
}

static void check_from(const format *f, uint32_t float_bits)
{
    const uint32_t sign = float_bits >> 31, expected = nearest(f, float_bits & 0x7fffffffu) | sign << 15;
    const uint32_t found = f->from_float(apti_float(float_bits));
    if (found != expected) fail_msg("0x%08x became 0x%04x instead of 0x%04x", float_bits, found, expected);
}

/* All 65,536 patterns to float and back; then everything around the boundaries between two of them. */
static void check_format(const format *f)
{
    const uint32_t infinity = ((1u << f->exponent_bits) - 1) << f->fraction_bits;
    for (uint32_t h = 0; h < 65536; h++) {
        const uint32_t sign = h >> 15, magnitude = h & 0x7fffu, bits = apti_bits(f->to_float(h));
        assert_int_equal(bits >> 31, sign);
        if (magnitude > infinity) {              /* NaN: stays one, quiet, both ways, sign and payload kept */
            assert_true((bits & 0x7fffffffu) > 0x7f800000u && (f == &g_brain || (bits & 0x400000u) != 0));
            assert_int_equal(f->from_float(apti_float(bits)), h | 1u << (f->fraction_bits - 1));
            continue;
        }
        if (magnitude == infinity) assert_int_equal(bits & 0x7fffffffu, 0x7f800000u);
        else assert_true(float_value(bits) == value_of(magnitude, f->exponent_bits, f->fraction_bits));
        assert_int_equal(f->from_float(apti_float(bits)), h);
    }
    for (uint32_t h = 0; h < infinity; h++) {
        /* The float half way to the next pattern, exactly representable in both formats; its neighbours; thirds. */
        const double middle = (value_of(h, f->exponent_bits, f->fraction_bits) + value_of(h + 1, f->exponent_bits, f->fraction_bits)) / 2;
        uint32_t low = 0, high = 0x7f800000u;
        while (high - low > 1) {
            const uint32_t bits = (low + high) / 2;
            if (float_value(bits) <= middle) low = bits;
            else high = bits;
        }
        if (f != &g_brain || h > 0) assert_true(float_value(low) == middle);
        for (uint32_t bits = low > 2 ? low - 2 : 0; bits <= low + 2 && bits < 0x7f800000u; bits++) {
            check_from(f, bits);
            check_from(f, bits | 0x80000000u);
        }
    }
}

static void test_half(void **state)
{
    (void)state;
    check_format(&g_half);
    assert_int_equal(apti_f32_to_f16(65504.0f), 0x7bff);
    assert_int_equal(apti_f32_to_f16(65519.0f), 0x7bff);
    assert_int_equal(apti_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(apti_f32_to_f16(1.0f / 3), 0x3555);
    assert_int_equal(apti_f32_to_f16(-2.0f), 0xc000);
}

static void test_brain(void **state)
{
    (void)state;
    check_format(&g_brain);
    assert_int_equal(apti_f32_to_bf16(1.0f), 0x3f80);
    assert_int_equal(apti_f32_to_bf16(1.0f / 3), 0x3eab);
    assert_int_equal(apti_f32_to_bf16(apti_float(0x7f7fffffu)), 0x7f80);              /* rounds up to infinity */
}

static void test_half_random(void **state)
{
    (void)state;
    apti_rng rng = {apti_rng_seed(1, 2), 0};
    for (int i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)apti_rng_next(&rng);
        if ((bits & 0x7f800000u) == 0x7f800000u) continue;
        check_from(&g_brain, bits);
        check_from(&g_half, bits);
        bits = (bits & 0x8fffffffu) | 0x30000000u;                                    /* where halves live */
        check_from(&g_half, bits);
    }
    const uint32_t nans[] = {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7f80ffffu, 0x7fa00000u, 0xffc12345u};
    for (int i = 0; i < 6; i++) {
        assert_true((apti_f32_to_f16(apti_float(nans[i])) & 0x7e00u) == 0x7e00u);
        assert_true((apti_f32_to_bf16(apti_float(nans[i])) & 0x7fc0u) == 0x7fc0u);
        assert_int_equal(apti_f32_to_f16(apti_float(nans[i])) >> 15, nans[i] >> 31);
    }
}

/* ---------------------------------------------------------------------------------------------------- random numbers */

/* Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds). */
static void test_philox(void **state)
{
    (void)state;
    uint32_t zeros[4] = {0, 0, 0, 0}, ones[4] = {~0u, ~0u, ~0u, ~0u};
    uint32_t pi[4] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
    const uint32_t zeros_out[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
    const uint32_t ones_out[4] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
    const uint32_t pi_out[4] = {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
    apti_philox(0, zeros);
    apti_philox(~(uint64_t)0, ones);
    apti_philox((uint64_t)0x299f31d0u << 32 | 0xa4093822u, pi);
    assert_memory_equal(zeros, zeros_out, sizeof zeros);
    assert_memory_equal(ones, ones_out, sizeof ones);
    assert_memory_equal(pi, pi_out, sizeof pi);
    apti_rng rng = {0, 0};
    assert_true(apti_rng_next(&rng) == ((uint64_t)0xe169c58du << 32 | 0x6627e8d5u));
    assert_true(apti_rng_next(&rng) == ((uint64_t)0x9b00dbd8u << 32 | 0xbc57ac4cu));
}

/* Value number i is the same however one gets there. */
static void test_rng_position(void **state)
{
    (void)state;
    const uint64_t key = apti_rng_seed(7, 3);
    float all[257], part[257];
    uint64_t bits[257];
    apti_rng rng = {key, 0};
    apti_rng_fill_normal(&rng, all, 257, 0.02f);
    assert_true(rng.key == key && rng.counter == 257);
    rng.counter = 0;
    for (int i = 0; i < 257; i++) bits[i] = apti_rng_next(&rng);
    for (int split = 0; split <= 257; split += 16) {
        apti_rng first = {key, 0}, second = {key, (uint64_t)split};
        apti_rng_fill_normal(&first, part, split, 0.02f);
        apti_rng_fill_normal(&second, part + split, 257 - split, 0.02f);
        assert_memory_equal(part, all, sizeof all);
    }
    for (uint64_t i = 0; i < 257; i++) {
        apti_rng here = {key, i};
        assert_true(apti_rng_next(&here) == bits[i] && here.counter == i + 1);
        here.counter = i;
        assert_true(0.02f * apti_rng_normal(&here) == all[i] && here.counter == i + 1);
        here.counter = i;
        assert_true(apti_rng_uniform(&here) == (double)(bits[i] >> 11) / 9007199254740992.0);
    }
    apti_rng uniform = {key, 0};
    apti_rng_fill_uniform(&uniform, part, 257, -3, 5);
    for (int i = 0; i < 257; i++) assert_true(part[i] == (float)(-3 + 8 * ((double)(bits[i] >> 11) / 9007199254740992.0)));
    assert_int_equal(uniform.counter, 257);
    apti_rng far = {key, ~(uint64_t)0};          /* the counter wraps */
    (void)apti_rng_next(&far);
    assert_true(far.counter == 0);
}

/* Moments of N samples against their expectation, within 5 standard errors. */
static void test_rng_normal_moments(void **state)
{
    (void)state;
    enum { N = 400000 };
    float *x = (float *)test_memory_block(N * sizeof(float));
    apti_rng rng = {apti_rng_seed(11, 0), 0};
    apti_rng_fill_normal(&rng, x, N, 1);
    double m[5] = {0, 0, 0, 0, 0}, neighbour = 0, largest = 0;
    for (int i = 0; i < N; i++) {
        double power = 1;
        assert_true(test_finite(x[i]));
        for (int k = 1; k <= 4; k++) power *= (double)x[i], m[k] += power / N;
        if (i > 0) neighbour += (double)x[i] * (double)x[i - 1] / N;
        largest = fmax(largest, fabs((double)x[i]));
    }
    const double error = 5 / sqrt(N);
    test_near_value("mean", m[1], 0, error);
    test_near_value("variance", m[2], 1, error * sqrt(2));
    test_near_value("third moment", m[3], 0, error * sqrt(15));
    test_near_value("fourth moment", m[4], 3, error * sqrt(96));
    test_near_value("correlation of neighbours", neighbour, 0, error);
    assert_true(largest > 4 && largest < 8.6);   /* 8.57 is where 53 bits end */
    free(x);
}

static void test_rng_uniform_moments(void **state)
{
    (void)state;
    enum { N = 400000, BINS = 64 };
    apti_rng rng = {apti_rng_seed(12, 0), 0};
    double mean = 0, square = 0, chi = 0;
    int32_t bins[BINS] = {0};
    for (int i = 0; i < N; i++) {
        const double u = apti_rng_uniform(&rng);
        assert_true(u >= 0 && u < 1);
        mean += u / N;
        square += u * u / N;
        bins[(int)(u * BINS)]++;
    }
    test_near_value("mean", mean, 0.5, 5 * sqrt(1.0 / 12 / N));
    test_near_value("second moment", square, 1.0 / 3, 5 * sqrt(4.0 / 45 / N));
    for (int i = 0; i < BINS; i++) chi += pow(bins[i] - (double)N / BINS, 2) / ((double)N / BINS);
    assert_true(chi > 20 && chi < 130);          /* 63 degrees of freedom */
    uint64_t ones[64] = {0};
    for (int i = 0; i < 20000; i++) {
        const uint64_t bits = apti_rng_next(&rng);
        for (int b = 0; b < 64; b++) ones[b] += bits >> b & 1;
    }
    for (int b = 0; b < 64; b++) test_near_value("share of ones", (double)ones[b] / 20000, 0.5, 5 * 0.5 / sqrt(20000));
}

static void test_rng_below(void **state)
{
    (void)state;
    apti_rng rng = {apti_rng_seed(13, 0), 0};
    const uint32_t sizes[] = {1, 2, 3, 7, 64, 1000};
    for (int s = 0; s < 6; s++) {
        int32_t seen[1000] = {0};
        double chi = 0;
        const int32_t n = 200000;
        for (int i = 0; i < n; i++) {
            const uint32_t x = apti_rng_below(&rng, sizes[s]);
            assert_true(x < sizes[s]);
            seen[x]++;
        }
        for (uint32_t i = 0; i < sizes[s]; i++) chi += pow(seen[i] - (double)n / sizes[s], 2) / ((double)n / sizes[s]);
        const double freedom = (double)sizes[s] - 1;
        assert_true(chi <= freedom + 6 * sqrt(2 * freedom) + 6);
    }
    /* 3 * 2^30 possible values of 2^32: without rejection the lower half of each third would come up twice as often. */
    int32_t low = 0;
    for (int i = 0; i < 60000; i++) {
        const uint32_t x = apti_rng_below(&rng, 3u << 30);
        assert_true(x < 3u << 30);
        low += x % 3 == 0;
    }
    test_near_value("share of multiples of 3", low / 60000.0, 1.0 / 3, 5 * sqrt(2.0 / 9 / 60000));
    assert_int_equal(apti_rng_below(&rng, 0), 0);
    assert_int_equal(apti_rng_below(&rng, 1), 0);
    (void)apti_rng_below(&rng, UINT32_MAX);
}

static void test_rng_streams(void **state)
{
    (void)state;
    enum { N = 64 };
    uint64_t keys[N * N];
    for (uint64_t seed = 0; seed < N; seed++)
        for (uint64_t stream = 0; stream < N; stream++) keys[seed * N + stream] = apti_rng_seed(seed, stream);
    for (int i = 0; i < N * N; i++)
        for (int k = 0; k < i; k++) assert_true(keys[i] != keys[k]);
    double correlation = 0;
    apti_rng a = {keys[0], 0}, b = {keys[1], 0};
    for (int i = 0; i < 100000; i++) correlation += (double)apti_rng_normal(&a) * (double)apti_rng_normal(&b) / 100000;
    test_near_value("correlation of two streams", correlation, 0, 5 / sqrt(100000));
    /* Bits and normals of the same place of one stream have nothing in common either. */
    correlation = 0;
    apti_rng u = {keys[2], 0}, v = {keys[2], 0};
    for (int i = 0; i < 100000; i++) correlation += (apti_rng_uniform(&u) - 0.5) * sqrt(12) * (double)apti_rng_normal(&v) / 100000;
    test_near_value("correlation of bits and normals", correlation, 0, 5 / sqrt(100000));
}

/* ---------------------------------------------------------------------------------------------------- sums, checksums */

static void test_sum(void **state)
{
    (void)state;
    float x[1000];
    apti_rng rng = {apti_rng_seed(14, 0), 0};
    for (int n = 0; n <= 67; n++) {
        double expected = 0;
        for (int i = 0; i < n; i++) x[i] = (float)(i * i - 100), expected += (double)x[i];
        assert_true(apti_sum(x, n) == expected); /* small integers: exact in any order */
    }
    apti_rng_fill_normal(&rng, x, 1000, 1);
    double expected = 0;
    for (int i = 0; i < 1000; i++) expected += (double)x[i];
    test_near_value("sum", apti_sum(x, 1000), expected, 1e-11);
    x[0] = 1e8f;                                 /* a float accumulator would lose the rest */
    for (int i = 1; i < 1000; i++) x[i] = 0.25f;
    assert_true(apti_sum(x, 1000) == 1e8 + 999 * 0.25);
}

static void test_checksum(void **state)
{
    (void)state;
    assert_true(apti_checksum(0, "123456789", 9) == 0x995DC9BBDF1939FAu);             /* the check value of CRC-64/XZ */
    assert_true(apti_checksum(0, "", 0) == 0);
    enum { N = 9000 };
    uint8_t data[N + 1];
    for (int i = 0; i <= N; i++) data[i] = (uint8_t)(i * 31 + (i >> 5));
    uint64_t slow = 0;
    for (int i = 0; i < N; i++) slow = apti_checksum(slow, data + i, 1);              /* bit by bit */
    for (size_t cut = 0; cut <= N; cut += 97)
        assert_true(apti_checksum(apti_checksum(0, data, cut), data + cut, N - cut) == slow);
    for (size_t n = 2040; n < 2064; n++) {       /* around the switch to tables, at any alignment */
        uint64_t crc = 0;
        for (size_t i = 0; i < n; i++) crc = apti_checksum(crc, data + 1 + i, 1);
        assert_true(apti_checksum(0, data + 1, n) == crc);
    }
    for (int bit = 0; bit < 8 * N; bit += 611) { /* any flipped bit shows */
        data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_true(apti_checksum(0, data, N) != slow);
        data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    assert_true(apti_checksum(0, data, N) == slow);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_half), cmocka_unit_test(test_brain), cmocka_unit_test(test_half_random),
        cmocka_unit_test(test_philox), cmocka_unit_test(test_rng_position), cmocka_unit_test(test_rng_normal_moments),
        cmocka_unit_test(test_rng_uniform_moments), cmocka_unit_test(test_rng_below), cmocka_unit_test(test_rng_streams),
        cmocka_unit_test(test_sum), cmocka_unit_test(test_checksum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
