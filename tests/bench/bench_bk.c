/* bench_bk.c - positions per second of the BK-core, forward and backward, and how time grows with the length of a row.

   build: cc -std=c11 -O2 tests/bench/bench_bk.c -o bench_bk -lpthread -lm
   usage: bench_bk [most threads]                2 unless told

   Times are the best of those that fit into a fixed time. Short rows come in batches of about 2^17 positions, as a layer would
   have them; from there on it is one row. Inputs are random potentials; the second table has a mask of half the positions, as
   the sparse form has it. */
#define APT_IMPLEMENTATION
#include "../../apt.h"
#include "bench.h"

enum { BATCH = 1 << 17, MOST_THREADS = 64 };

typedef struct arrays { float *v, *mask, *out[2], *grad[2], *dv, *dmask; } arrays;

static float *block(apt_ctx *ctx, int64_t n)
{
    float *memory = (float *)apti_calloc(ctx, n, (int64_t)sizeof(float));
    if (memory == NULL) fail(ctx, "calloc");
    return memory;
}

/* Best seconds of a forward (or backward) over rows of n. */
static double best(apt_ctx *ctx, const arrays *a, bool masked, bool backward, int64_t rows, int64_t n)
{
    double least = 1e9;
    const float *mask = masked ? a->mask : NULL;
    const double until = apti_seconds() + 0.3;
    for (int32_t i = 0; i < 3 || apti_seconds() < until; i++) {
        const double start = apti_seconds();
        const apt_result r = backward
            ? apt_bk_backward_threads(ctx, a->dv, masked ? a->dmask : NULL, NULL, a->grad[0], a->grad[1], a->v, mask, rows, n, NULL)
            : apt_bk_forward_threads(ctx, a->out[0], a->out[1], a->v, mask, rows, n, NULL);
        least = fmin(least, apti_seconds() - start);
        if (r != APT_OK) fail(ctx, "BK-core");
    }
    return least;
}

static void table(apt_ctx *ctx, const arrays *a, bool masked)
{
    static const int64_t lengths[] = {1000, 10000, 100000, 1000000, 10000000};
    printf("%d thread%s, %s: positions/s in millions (ns a position)\n", (int)apt_thread_count(ctx),
           apt_thread_count(ctx) > 1 ? "s" : "", masked ? "half of the positions masked" : "no mask");
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        const int64_t n = lengths[i], rows = apti_max_i64(1, BATCH / n), all = rows * n;
        const double forward = best(ctx, a, masked, false, rows, n), backward = best(ctx, a, masked, true, rows, n);
        printf("  %5lld x %9lld   forward %6.1f (%5.2f)   backward %6.1f (%5.2f)\n", (long long)rows, (long long)n,
               (double)all / forward / 1e6, 1e9 * forward / (double)all, (double)all / backward / 1e6,
               1e9 * backward / (double)all);
    }
}

int main(int argc, char **argv)
{
    const int64_t most = 10000000;
    const int32_t threads = argc > 1 ? (int32_t)strtol(argv[1], NULL, 10) : 2;
    for (int32_t t = 1; t <= threads && t <= MOST_THREADS; t *= 2) {
        apt_desc desc = APT_ZERO;
        desc.threads = t;
        apt_ctx *ctx = apt_create(&desc);
        if (ctx == NULL) fail(NULL, "apt_create");
        arrays a = {block(ctx, most), block(ctx, most), {block(ctx, most), block(ctx, most)}, {block(ctx, most), block(ctx, most)},
                    block(ctx, most), block(ctx, most)};
        apti_rng rng = {1, 0};
        if (t == 1) printf("%s\n", apt_kernel_name(ctx));
        apti_rng_fill_normal(&rng, a.v, most, 1.0f);
        for (int32_t i = 0; i < 2; i++) apti_rng_fill_normal(&rng, a.grad[i], most, 1.0f);
        for (int64_t i = 0; i < most; i++) a.mask[i] = (apti_rng_next(&rng) >> 40 & 1) != 0 ? 1.0f : 0.0f;
        table(ctx, &a, false);
        table(ctx, &a, true);
        float *const all[] = {a.v, a.mask, a.out[0], a.out[1], a.grad[0], a.grad[1], a.dv, a.dmask};
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) apti_free(ctx, all[i]);
        apt_destroy(ctx);
    }
    return 0;
}
