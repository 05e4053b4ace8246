/* Speed of the matrix products and vector functions of apt.h, for every kernel table the CPU has.
   build: cc -std=c11 -O2 tests/bench/bench_gemm.c -o bench_gemm -lpthread -lm
   usage: bench_gemm [-t threads] [-s seconds per case] [-k table] [word in the name of the cases to run]

   The peak is measured in the same run: independent fused multiply-adds on registers, on as many threads, repeated between
   the repetitions of every case. All times are the best of many, so that other programs on the machine do little harm.
   "% peak" is by the clock on the wall. "% tiles" is for busy machines, where no long run is ever left alone: one thread runs
   the same tasks and the best time of every single task is added up, against the peak of one thread. */
#define APT_IMPLEMENTATION
#include "../../apt.h"

/* ---- peak ---- */

enum { PEAK_STEPS = 20000, CHAINS = 12 };

#ifdef APTI_X86
APTI_AVX2 static float peak_avx2(void)
{
    __m256 x[CHAINS];
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    for (int i = 0; i < CHAINS; i++) x[i] = _mm256_set1_ps((float)i);
    for (int s = 0; s < PEAK_STEPS; s++) {
#define STEP(i) x[i] = _mm256_fmadd_ps(x[i], a, b);
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#undef STEP
    }
    for (int i = 1; i < CHAINS; i++) x[0] = _mm256_add_ps(x[0], x[i]);
    return _mm256_cvtss_f32(x[0]);
}

APTI_AVX512 static float peak_avx512(void)
{
    __m512 x[CHAINS];
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
    for (int i = 0; i < CHAINS; i++) x[i] = _mm512_set1_ps((float)i);
    for (int s = 0; s < PEAK_STEPS; s++) {
#define STEP(i) x[i] = _mm512_fmadd_ps(x[i], a, b);
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#undef STEP
    }
    for (int i = 1; i < CHAINS; i++) x[0] = _mm512_add_ps(x[0], x[i]);
    return _mm512_cvtss_f32(x[0]);
}
#endif

#ifdef APTI_NEON
static float peak_neon(void)
{
    float32x4_t x[CHAINS];
    const float32x4_t a = vdupq_n_f32(0.999f), b = vdupq_n_f32(0.001f);
    for (int i = 0; i < CHAINS; i++) x[i] = vdupq_n_f32((float)i);
    for (int s = 0; s < PEAK_STEPS; s++) {
#define STEP(i) x[i] = vfmaq_f32(b, x[i], a);
        STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#undef STEP
    }
    for (int i = 1; i < CHAINS; i++) x[0] = vaddq_f32(x[0], x[i]);
    return vgetq_lane_f32(x[0], 0);
}
#endif

static float peak_ref(void)
{
    float x[CHAINS];
    for (int i = 0; i < CHAINS; i++) x[i] = (float)i;
    for (int s = 0; s < PEAK_STEPS; s++)
        for (int i = 0; i < CHAINS; i++) x[i] = x[i] * 0.999f + 0.001f;
    for (int i = 1; i < CHAINS; i++) x[0] += x[i];
    return x[0];
}

typedef struct peak_job { float (*run)(void); volatile float sink[APTI_MAX_THREADS]; double best[APTI_MAX_THREADS]; } peak_job;

static void peak_task(int64_t index, int32_t thread, void *arg)
{
    peak_job *job = (peak_job *)arg;
    const double start = apti_seconds();
    job->sink[thread] = job->run();
    const double time = apti_seconds() - start;
    (void)index;
    if (job->best[thread] == 0 || time < job->best[thread]) job->best[thread] = time;
}

static double g_peak;                 /* GFLOP/s of one thread, best so far */

/* A parallel_for that runs the tasks one by one and keeps the best time of each. */
enum { MAX_TASKS = 1 << 14 };

static double g_task_best[MAX_TASKS];

static void timed_for(int64_t count, apt_task task, void *arg, void *user)
{
    (void)user;
    for (int64_t i = 0; i < count; i++) {
        const double start = apti_seconds();
        task(i, 0, arg);
        const double time = apti_seconds() - start;
        if (i < MAX_TASKS && (g_task_best[i] == 0 || time < g_task_best[i])) g_task_best[i] = time;
    }
}

/* Sum of the best task times since the last call. */
static double task_sum(void)
{
    double sum = 0;
    for (int64_t i = 0; i < MAX_TASKS; i++) {
        sum += g_task_best[i];
        g_task_best[i] = 0;
    }
    return sum;
}

static void measure_peak(apt_ctx *ctx)
{
    peak_job job = APT_ZERO;
    job.run = peak_ref;
#ifdef APTI_X86
    if (ctx->kernels->lanes == 8) job.run = peak_avx2;
    if (ctx->kernels->lanes == 16) job.run = peak_avx512;
#endif
#ifdef APTI_NEON
    if (ctx->kernels->lanes == 4) job.run = peak_neon;
#endif
    apti_parallel_for(ctx, 4 * ctx->threads, peak_task, &job);
    for (int32_t i = 0; i < ctx->threads; i++) {
        if (job.best[i] == 0) continue;
        const double rate = 2.0 * CHAINS * PEAK_STEPS * ctx->kernels->lanes / job.best[i] * 1e-9;
        if (rate > g_peak) g_peak = rate;
    }
}

/* ---- products ---- */

typedef enum form {
    FORWARD,                          /* y = x W^T + bias, packed */
    FORWARD_GELU,                     /* + adapter of rank 8, GELU, pre-activation kept */
    FORWARD_BF16,
    BACKWARD,                         /* dx = dy W, packed and transposed on the fly */
    BACKWARD_BF16,
    DW,                               /* dW = dy^T x: A transposed, B plain */
    PLAIN,
    PLAIN_T,
    SERIAL_QK,                        /* many small products, one per task: B plain_t */
    SERIAL_PV                         /* B plain */
} form;

typedef struct bench_case { const char *name; form form; int64_t m, n, k; } bench_case;

static const bench_case g_cases[] = {
    {"forward", FORWARD, 4096, 1536, 384},      {"forward", FORWARD, 4096, 384, 1536},      {"forward", FORWARD, 2048, 768, 768},
    {"forward", FORWARD, 2048, 3072, 768},      {"forward", FORWARD, 2048, 768, 3072},
    {"forward+gelu", FORWARD_GELU, 4096, 1536, 384}, {"forward+gelu", FORWARD_GELU, 2048, 3072, 768},
    {"backward", BACKWARD, 4096, 384, 1536},    {"backward", BACKWARD, 4096, 1536, 384},    {"backward", BACKWARD, 2048, 768, 768},
    {"backward", BACKWARD, 2048, 768, 3072},    {"backward", BACKWARD, 2048, 3072, 768},
    {"short forward", FORWARD, 416, 1536, 384}, {"short forward", FORWARD, 416, 384, 1536}, {"short forward", FORWARD, 64, 1536, 384},
    {"short forward", FORWARD, 64, 384, 1536},  {"short forward", FORWARD, 64, 768, 768},
    {"short backward", BACKWARD, 416, 384, 1536}, {"short backward", BACKWARD, 416, 1536, 384}, {"short backward", BACKWARD, 64, 384, 1536},
    {"short backward", BACKWARD, 64, 1536, 384},
    {"dW", DW, 384, 384, 4096},                 {"dW", DW, 1536, 384, 4096},                {"dW", DW, 768, 768, 2048},
    {"adapter xA", PLAIN_T, 4096, 8, 384},      {"adapter dyB", PLAIN, 4096, 8, 1536},      {"adapter dA", DW, 8, 384, 4096},
    {"adapter dB", DW, 1536, 8, 4096},
    {"attention qk", SERIAL_QK, 128, 128, 32},  {"attention pv", SERIAL_PV, 128, 32, 128},  {"attention qk", SERIAL_QK, 13, 13, 32},
    {"attention pv", SERIAL_PV, 13, 32, 13},    {"attention qk", SERIAL_QK, 128, 128, 64},  {"attention pv", SERIAL_PV, 128, 64, 128},
    {"bf16 forward", FORWARD_BF16, 4096, 1536, 384}, {"bf16 forward", FORWARD_BF16, 2048, 768, 768}, {"bf16 forward", FORWARD_BF16, 64, 768, 768},
    {"bf16 backward", BACKWARD_BF16, 4096, 384, 1536},
    {"token", FORWARD, 1, 768, 768},            {"token", FORWARD, 1, 3072, 768},           {"token", FORWARD, 3, 768, 3072},
    {"bf16 token", FORWARD_BF16, 1, 768, 768},  {"bf16 token", FORWARD_BF16, 1, 3072, 768}};

enum { SERIAL_TASKS = 64 };

typedef struct serial_job { apt_ctx *ctx; const apti_gemm *g; } serial_job;

static void serial_task(int64_t index, int32_t thread, void *arg)
{
    const serial_job *job = (const serial_job *)arg;
    apti_gemm g = *job->g;            /* every task its own operands, as attention has */
    g.c += index * g.m * g.ldc;
    g.part[0].a += index * g.m * g.part[0].a_row;
    apti_gemm_serial(job->ctx->kernels, &g, job->ctx->scratch[thread], APTI_GEMM_SCRATCH);
}

static float *numbers(apt_ctx *ctx, int64_t n)
{
    float *x = (float *)apti_alloc(ctx, n, (int64_t)sizeof(float));
    if (x == NULL) exit(1);
    uint32_t s = 1;
    for (int64_t i = 0; i < n; i++) {
        s = s * 1664525u + 1013904223u;
        x[i] = (float)(s >> 8) * (1.0f / 8388608.0f) - 1.0f;
    }
    return x;
}

typedef struct operands { float *a, *b, *c, *pre, *bias, *small; apti_packed packed; } operands;

static apti_gemm make_case(apt_ctx *ctx, const bench_case *t, operands *o)
{
    const bool serial = t->form >= SERIAL_QK, transposed = t->form == DW;
    const int64_t batch = serial ? SERIAL_TASKS : 1, lda = apti_ld(transposed ? t->m : t->k);
    apti_gemm g = APT_ZERO;
    g.m = t->m;
    g.n = t->n;
    g.act = -1;
    g.ldc = transposed ? t->n : apti_ld(t->n);
    g.c = o->c = numbers(ctx, batch * g.m * g.ldc);
    g.accumulate = transposed;
    apti_gemm_part *part = &g.part[0];
    part->k = t->k;
    part->a = o->a = numbers(ctx, batch * (transposed ? t->k : t->m) * lda);
    part->a_row = transposed ? 1 : lda;
    part->a_col = transposed ? lda : 1;
    if (t->form == PLAIN || t->form == DW || t->form == SERIAL_PV || t->form == PLAIN_T || t->form == SERIAL_QK) {
        part->kind = t->form == PLAIN_T || t->form == SERIAL_QK ? APTI_B_PLAIN_T : APTI_B_PLAIN;
        part->ldb = serial ? apti_ld(384) : part->kind == APTI_B_PLAIN ? (t->n == 8 ? 8 : apti_ld(t->n)) : t->k;
        part->b = o->b = numbers(ctx, (part->kind == APTI_B_PLAIN ? t->k : t->n) * part->ldb);
        return g;
    }
    const bool back = t->form == BACKWARD || t->form == BACKWARD_BF16;
    o->packed.n = back ? t->k : t->n;
    o->packed.k = back ? t->n : t->k;
    o->packed.nr = ctx->kernels->nr;
    o->packed.type = t->form == FORWARD_BF16 || t->form == BACKWARD_BF16 ? APT_BF16 : APT_F32;
    o->packed.data = numbers(ctx, apti_packed_bytes(ctx, o->packed.n, o->packed.k, APT_F32) / 4);
    o->b = numbers(ctx, t->n * t->k);
    apti_pack(ctx, &o->packed, o->b, o->packed.k);
    part->kind = back ? APTI_B_PACKED_T : APTI_B_PACKED;
    part->packed = &o->packed;
    if (back) return g;
    g.bias = o->bias = numbers(ctx, t->n);
    if (t->form != FORWARD_GELU) return g;
    g.pre = o->pre = numbers(ctx, t->m * g.ldc);
    g.ld_pre = g.ldc;
    g.act = APT_GELU_ERF;
    o->small = numbers(ctx, 8 * (t->m + t->n));
    part[1].k = part[1].a_row = part[1].ldb = 8;
    part[1].a_col = 1;
    part[1].kind = APTI_B_PLAIN_T;
    part[1].a = o->small;
    part[1].b = o->small + 8 * t->m;
    return g;
}

static double run_once(apt_ctx *ctx, const bench_case *t, const apti_gemm *g, int64_t inner)
{
    const double start = apti_seconds();
    for (int64_t i = 0; i < inner; i++) {
        if (t->form >= SERIAL_QK) {
            serial_job job;
            job.ctx = ctx;
            job.g = g;
            apti_parallel_for(ctx, SERIAL_TASKS, serial_task, &job);
        } else {
            apti_gemm_run(ctx, g);
        }
    }
    return (apti_seconds() - start) / (double)inner;
}

typedef struct result { double flops, wall, tasks; } result;

/* Best times of one case in seconds: of a whole product, and all tasks of it on one thread (`alone` runs them one by one). */
static result best_time(apt_ctx *ctx, apt_ctx *alone, const bench_case *t, double seconds)
{
    result best = {0, 1e9, 0};
    operands o = APT_ZERO;
    const apti_gemm g = make_case(ctx, t, &o);
    best.flops = 2.0 * (double)t->m * (double)t->n * (double)(t->k + g.part[1].k) * (t->form >= SERIAL_QK ? SERIAL_TASKS : 1);
    const double guess = run_once(ctx, t, &g, 1), end = apti_seconds() + seconds;
    const int64_t inner = guess < 2e-4 ? (int64_t)(4e-4 / guess) + 1 : 1;
    for (int32_t i = 0; i < 5 || apti_seconds() < end; i++) {
        measure_peak(ctx);
        const double wall = run_once(ctx, t, &g, inner);
        if (wall < best.wall) best.wall = wall;
    }
    (void)task_sum();
    const double stop = apti_seconds() + seconds;
    for (int32_t i = 0; i < 10 || apti_seconds() < stop; i++) (void)run_once(alone, t, &g, 1);
    best.tasks = task_sum();
    apti_free(ctx, o.a);
    apti_free(ctx, o.b);
    apti_free(ctx, o.c);
    apti_free(ctx, o.pre);
    apti_free(ctx, o.bias);
    apti_free(ctx, o.small);
    apti_free(ctx, o.packed.data);
    return best;
}

/* ---- vector functions: nanoseconds per 1000 elements in the cache ---- */

enum { LENGTH = 2000, VECTOR_FUNCTIONS = 16 };

static const char *const g_vector[VECTOR_FUNCTIONS] = {"exp_scaled", "max", "sum", "dot", "sq_dev", "scale", "add", "axpy", "abs_add", "gelu",
                                                       "gelu_grad", "tanh_gelu", "tanh_gelu_grad", "tanh", "norm", "adam"};

static float run_vector(const apti_kernels *k, int32_t f, float *x, float *y, float *z, float *v)
{
    const int64_t n = LENGTH;
    switch (f) {
        case 0: k->exp_scaled(x, n, -0.5f, 0.1f); break;
        case 1: return k->max(x, n);
        case 2: return k->sum(x, n);
        case 3: return k->dot(x, y, n);
        case 4: return k->sq_dev(x, 0.5f, n);
        case 5: k->scale(y, x, 0.5f, n); break;
        case 6: k->add(z, x, y, n); break;
        case 7: k->axpy(z, 1e-9f, y, n); break;
        case 8: k->abs_add(z, y, n); break;
        case 9: k->act(y, x, n, APT_GELU_ERF); break;
        case 10: k->act_grad(z, y, x, n, APT_GELU_ERF); break;
        case 11: k->act(y, x, n, APT_GELU_TANH); break;
        case 12: k->act_grad(z, y, x, n, APT_GELU_TANH); break;
        case 13: k->tanh(y, x, n); break;
        case 14: k->norm(z, x, y, y, 0.5f, 0.25f, n); break;
        default: k->adam(x, y, v, z, n, 1.0f, 0.9f, 0.999f, 1e-9f, 1e-8f, 0.0f); break;
    }
    return x[0];
}

static void bench_vectors(apt_ctx *ctx, const char *word)
{
    float *x = numbers(ctx, 4 * LENGTH), *y = x + LENGTH, *z = y + LENGTH, *v = z + LENGTH;
    for (int64_t i = 0; i < LENGTH; i++) v[i] = 1.0f;
    volatile float sink;
    for (int32_t f = 0; f < VECTOR_FUNCTIONS; f++) {
        if (word != NULL && strstr(g_vector[f], word) == NULL) continue;
        double best = 1e9;
        for (int32_t r = 0; r < 200; r++) {
            const double start = apti_seconds();
            for (int32_t i = 0; i < 20; i++) sink = run_vector(ctx->kernels, f, x, y, z, v);
            const double time = (apti_seconds() - start) / 20;
            if (time < best) best = time;
        }
        (void)sink;
        printf("%-7s %-16s %31.0f ns per 1000 elements\n", ctx->kernels->name, g_vector[f], best * 1e9 * 1000 / LENGTH);
    }
    apti_free(ctx, x);
}

static void bench_table(const char *table, int32_t threads, double seconds, const char *word)
{
    apt_desc desc = APT_ZERO;
    desc.threads = threads;
    desc.kernels = table;
    apt_ctx *ctx = apt_create(&desc);
    if (ctx == NULL) exit(1);
    desc.parallel_for = timed_for;
    apt_ctx *alone = apt_create(&desc);
    if (alone == NULL) exit(1);
    alone->threads = 2;               /* only cuts the products as for two */
    g_peak = 0;
    enum { CASES = sizeof g_cases / sizeof g_cases[0] };
    result best[CASES];
    for (int32_t i = 0; i < CASES; i++) {
        best[i].flops = 0;
        if (word == NULL || strstr(g_cases[i].name, word) != NULL) best[i] = best_time(ctx, alone, &g_cases[i], seconds);
    }
    printf("\n%s, %d threads, peak %.1f GFLOP/s\n", table, (int)ctx->threads, g_peak * ctx->threads);
    printf("%-7s %-15s %5s x%5s x%5s %9s %9s %7s %7s %7s\n", "table", "case", "m", "n", "k", "time us", "GFLOP/s", "% peak", "% tiles", "GB/s W");
    for (int32_t i = 0; i < CASES; i++) {
        if (best[i].flops == 0) continue;
        const bench_case *t = &g_cases[i];
        const double rate = best[i].flops * 1e-9 / best[i].wall;
        printf("%-7s %-15s %5d x%5d x%5d %9.1f %9.1f %6.1f%% %6.1f%%", table, t->name, (int)t->m, (int)t->n, (int)t->k, best[i].wall * 1e6, rate,
               100 * rate / (g_peak * ctx->threads), 100 * best[i].flops * 1e-9 / best[i].tasks / g_peak);
        if (t->m <= 3) printf(" %7.1f", (double)(t->n * t->k) * (t->form == FORWARD_BF16 ? 2 : 4) / best[i].wall * 1e-9);
        printf("\n");
    }
    bench_vectors(ctx, word);
    apt_destroy(alone);
    apt_destroy(ctx);
}

int main(int argc, char **argv)
{
    int32_t threads = 2;
    double seconds = 0.3;
    const char *word = NULL, *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (i + 1 < argc && strcmp(argv[i], "-t") == 0) threads = (int32_t)atoi(argv[++i]);
        else if (i + 1 < argc && strcmp(argv[i], "-s") == 0) seconds = atof(argv[++i]);
        else if (i + 1 < argc && strcmp(argv[i], "-k") == 0) only = argv[++i];
        else word = argv[i];
    }
    const apti_kernels *list[8];
    const int32_t tables = apti_kernels_list(list, 8);
    for (int32_t i = tables - 1; i >= 0; i--)
        if (only == NULL ? i > 0 || tables == 1 : strcmp(list[i]->name, only) == 0) bench_table(list[i]->name, threads, seconds, word);
    return 0;
}
