/* bench_platform.c - what a parallel_for costs, and how fast random numbers and checksums are. Times are the best of many. */
#define APT_IMPLEMENTATION
#include "../../apt.h"

#include <stdio.h>

static void empty_task(int64_t index, int32_t thread, void *arg)
{
    (void)index;
    (void)thread;
    (void)arg;
}

/* Seconds per call of parallel_for with `count` empty tasks, after a pause of `pause` seconds between the calls. */
static double loop_seconds(apt_ctx *ctx, int64_t count, double pause)
{
    const int32_t calls = pause > 0 ? 200 : 20000;
    double best = 1e9;
    for (int repeat = 0; repeat < 5; repeat++) {
        double total = 0;
        for (int32_t i = 0; i < calls; i++) {
            for (const double until = apti_seconds() + pause; apti_seconds() < until;) {}
            const double start = apti_seconds();
            apti_parallel_for(ctx, count, empty_task, NULL);
            total += apti_seconds() - start;
        }
        if (total / calls < best) best = total / calls;
    }
    return best;
}

int main(void)
{
    for (int32_t threads = 1; threads <= apti_cpu_count(); threads *= 2) {
        apt_desc desc = APT_ZERO;
        desc.threads = threads;
        apt_ctx *ctx = apt_create(&desc);
        if (ctx == NULL) return 1;
        printf("parallel_for, %2d threads: %6.2f us back to back, %6.2f us with 16 tasks, %6.2f us after a sleep\n", (int)threads,
               1e6 * loop_seconds(ctx, threads, 0), 1e6 * loop_seconds(ctx, 16, 0), 1e6 * loop_seconds(ctx, threads, 300e-6));
        apt_destroy(ctx);
    }
    enum { N = 1 << 20 };
    float *x = (float *)malloc(N * sizeof(float));
    if (x == NULL) return 1;
    apti_rng rng = {1, 0};
    double normal = 1e9, crc = 1e9;
    uint64_t sum = 0;
    for (int repeat = 0; repeat < 5; repeat++) {
        double start = apti_seconds();
        apti_rng_fill_normal(&rng, x, N, 1);
        normal = fmin(normal, apti_seconds() - start);
        start = apti_seconds();
        sum ^= apti_checksum(0, x, N * sizeof(float));
        crc = fmin(crc, apti_seconds() - start);
    }
    printf("normal numbers: %.1f million/s; checksum: %.2f GB/s (%016llx)\n", N / normal / 1e6, N * sizeof(float) / crc / 1e9,
           (unsigned long long)sum);
    free(x);
    return 0;
}
