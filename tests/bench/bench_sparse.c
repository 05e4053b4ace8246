/* bench_sparse.c - magnitude pruning: selection, masks, and where a compressed matrix begins to pay.

   build: cc -std=c11 -O2 tests/bench/bench_sparse.c -o bench_sparse -lpthread -lm
   usage: bench_sparse [-s] [threads]            -s: selection and masks only

   Times are the best of many. Selection and masks run on 2^26 weights, far beyond the caches; the copy they are compared with
   is memcpy by the same threads, and both are counted in bytes read and written. */
#define APT_IMPLEMENTATION
#include "../../apt.h"

#include <stdio.h>

static void *block(apt_ctx *ctx, int64_t count, int64_t size)
{
    void *memory = apti_calloc(ctx, count, size);
    if (memory != NULL) return memory;
    fprintf(stderr, "bench_sparse: no memory\n");
    exit(1);
}

static void need(apt_ctx *ctx, apt_result r)
{
    if (r == APT_OK) return;
    fprintf(stderr, "bench_sparse: %s (%s)\n", apt_result_text(r), apt_error(ctx));
    exit(1);
}

/* ------------------------------------------------------------------------------------------------ selection and masks */

typedef struct copy_job { float *to; const float *from; int64_t n; } copy_job;

static void copy_task(int64_t index, int32_t thread, void *arg)
{
    const copy_job *job = (const copy_job *)arg;
    const int64_t at = index * APTI_BITMASK_BLOCK;
    (void)thread;
    memcpy(job->to + at, job->from + at, (size_t)apti_min_i64(APTI_BITMASK_BLOCK, job->n - at) * sizeof(float));
}

static void bench_selection(apt_ctx *ctx)
{
    const int64_t n = (int64_t)1 << 26;
    float *w = (float *)block(ctx, n, 4), *to = (float *)block(ctx, n, 4);
    uint64_t *mask = (uint64_t *)block(ctx, apt_bitmask_words(n), 8);
    apti_rng rng = {1, 0};
    double select = 1e9, threshold = 1e9, pattern = 1e9, copy = 1e9, apply = 1e9;
    apti_rng_fill_normal(&rng, w, n, 0.02f);
    copy_job job = {to, w, n};
    for (int i = 0; i < 7; i++) {
        double start = apti_seconds();
        need(ctx, apt_magnitude_threshold(ctx, mask, NULL, w, n, APT_MAGNITUDE_THRESHOLD));
        threshold = fmin(threshold, apti_seconds() - start);
        start = apti_seconds();
        need(ctx, apt_magnitude_pattern(ctx, mask, NULL, w, n / 1024, 1024, 2, 4));
        pattern = fmin(pattern, apti_seconds() - start);
        start = apti_seconds();
        need(ctx, apt_magnitude_sparsity(ctx, mask, NULL, w, n, 0.6));
        select = fmin(select, apti_seconds() - start);
        start = apti_seconds();
        apti_parallel_for(ctx, n / APTI_BITMASK_BLOCK, copy_task, &job);
        copy = fmin(copy, apti_seconds() - start);
        start = apti_seconds();
        need(ctx, apt_bitmask_apply(ctx, to, mask, n));
        apply = fmin(apply, apti_seconds() - start);
    }
    printf("%lld weights: selection of 60 %% %.0f M/s, threshold %.0f M/s, 2:4 %.0f M/s\n", (long long)n, (double)n / select / 1e6,
           (double)n / threshold / 1e6, (double)n / pattern / 1e6);
    printf("copy %.1f GB/s; a mask of 60 %% zeros re-applied %.1f GB/s: %.0f %% of it\n", 8.0 * (double)n / copy / 1e9,
           8.125 * (double)n / apply / 1e9, 100 * 8.125 / apply / (8.0 / copy));
    apti_free(ctx, w);
    apti_free(ctx, to);
    apti_free(ctx, mask);
}

/* ------------------------------------------------------------------------------------------------ products */

/* Dense and compressed products of one shape at several sparsities, and by linear interpolation where they meet. */
static void bench_product(apt_ctx *ctx, int64_t m, int64_t n, int64_t k)
{
    static const double sparsity[] = {0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95};
    enum { LEVELS = sizeof(sparsity) / sizeof(sparsity[0]) };
    double times[LEVELS], dense = 1e9, even = -1;
    float *w = (float *)block(ctx, n * k, 4), *x = (float *)block(ctx, m * k, 4), *y = (float *)block(ctx, m * n, 4);
    float *values = (float *)block(ctx, n * k, 4);
    uint64_t *mask = (uint64_t *)block(ctx, apt_bitmask_words(n * k), 8);
    apt_sparse s = {n, k, NULL, NULL, values};
    apti_rng rng = {2, 0};
    apti_packed packed;
    apti_gemm g = APT_ZERO;
    s.bits = (uint64_t *)block(ctx, n * apt_bitmask_words(k), 8);
    s.start = (int64_t *)block(ctx, n + 1, 8);
    apti_rng_fill_normal(&rng, w, n * k, 0.02f);
    apti_rng_fill_normal(&rng, x, m * k, 1.0f);
    packed.n = n;
    packed.k = k;
    packed.nr = ctx->kernels->nr;
    packed.type = APT_F32;
    packed.data = block(ctx, apti_packed_bytes(ctx, n, k, APT_F32), 1);
    apti_pack(ctx, &packed, w, k);
    g.m = m;
    g.n = n;
    g.part[0].k = k;
    g.part[0].a = x;
    g.part[0].a_row = k;
    g.part[0].a_col = 1;
    g.part[0].kind = APTI_B_PACKED;
    g.part[0].packed = &packed;
    g.c = y;
    g.ldc = n;
    g.act = -1;
    for (int level = 0; level < LEVELS; level++) {
        need(ctx, apt_magnitude_sparsity(ctx, mask, NULL, w, n * k, sparsity[level]));
        need(ctx, apt_bitmask_apply(ctx, w, mask, n * k));
        need(ctx, apt_sparse_pack(&s, n * k, w, k));
        times[level] = 1e9;
        const double until = apti_seconds() + 0.25;
        while (apti_seconds() < until) {
            double start = apti_seconds();
            apti_gemm_run(ctx, &g);
            dense = fmin(dense, apti_seconds() - start);
            start = apti_seconds();
            need(ctx, apt_sparse_forward(ctx, y, n, &s, x, k, m));
            times[level] = fmin(times[level], apti_seconds() - start);
        }
    }
    printf("%4lld x %4lld x %4lld  dense %6.1f GFLOP/s; times of it at", (long long)m, (long long)n, (long long)k,
           2.0 * (double)(m * n * k) / dense / 1e9);
    for (int i = 0; i < LEVELS; i++) {
        printf(" %.0f %%: %.2f", 100 * sparsity[i], times[i] / dense);
        const double before = i > 0 ? times[i - 1] : 2 * dense, at = i > 0 ? sparsity[i - 1] : 0;
        if (even < 0 && times[i] <= dense)
            even = i == 0 ? sparsity[0] : at + (sparsity[i] - at) * (before - dense) / (before - times[i]);
    }
    if (even < 0) printf("; never even\n");
    else printf("; even at %.0f %%\n", 100 * even);
    void *const all[] = {w, x, y, values, mask, s.bits, s.start, packed.data};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) apti_free(ctx, all[i]);
}

int main(int argc, char **argv)
{
    apt_desc desc = APT_ZERO;
    const bool selection = argc > 1 && strcmp(argv[1], "-s") == 0;
    if (argc > 1 + selection) desc.threads = (int32_t)strtol(argv[1 + selection], NULL, 10);
    apt_ctx *ctx = apt_create(&desc);
    if (ctx == NULL) return 1;
    printf("%s, %d threads\n", apt_kernel_name(ctx), (int)apt_thread_count(ctx));
    bench_selection(ctx);
    static const int64_t rows[] = {1, 8, 32, 512, 4096};
    for (size_t i = 0; !selection && i < sizeof(rows) / sizeof(rows[0]); i++) {
        bench_product(ctx, rows[i], 1536, 384);
        bench_product(ctx, rows[i], 384, 1536);
    }
    if (!selection) bench_product(ctx, 512, 3072, 768);
    apt_destroy(ctx);
    return 0;
}
