/* bench.h - what benchmarks share. Include after apt.h. */
#ifndef BENCH_H
#define BENCH_H

static inline void fail(const apt_ctx *ctx, const char *what)
{
    fprintf(stderr, "%s: %s\n", what, ctx != NULL ? apt_error(ctx) : "no memory");
    exit(1);
}

static inline int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts x[n]. */
static inline double median(double *x, int32_t n)
{
    qsort(x, (size_t)n, sizeof(double), by_value);
    return x[n / 2];
}

#endif /* BENCH_H */
