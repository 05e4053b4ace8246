/* What apt_cuda.h does on the device at hand, with random weights, as rows of a table (tests/bench/cuda.sh prints its head and
   calls this for each of them).

   usage: bench_cuda lora|graphs|round|apt|llama fp32|tf32|bf16|fp16 SHAPE BATCH TOKENS STEPS [PEAK]

   lora    one row: LoRA (rank 8 on query, value and FFN up), dense
   graphs  two rows: the same with its operations launched one by one, and as CUDA graphs, which is the default
   round   two rows: LoRA with a tenth of the hidden size and 40 % of the neurons gone, to odd numbers, and with a little less gone,
           to multiples of 64 (of 8 where the model is small), as apt_train_desc.round_hidden and round_neurons make them
   apt     three rows: APT to 60 % sparsity, in front of its first decision, while it prunes with a teacher, and at its end;
           forward: the dense model, and the pruned and merged one
   llama   LoRA's step with activations computed again for the backward (those operations count), reading of prompts (prefill) and
           one more token for each of them (decoding): dense, and with 30 % of the prunable parameters gone, which is made that way
           because random weights have nothing to choose from

   Times are medians. Frozen weights are kept in what products round their operands to. "of products": what the products
   of a step alone take, with the conversion of their operands, over the whole step. "of peak": the rate at which a step works
   through its products over the best that one product of PEAK (8192) rows, twice as many columns and PEAK terms reaches here.

   Linked with a unit of apt_cuda.h, or built with APT_CUDA_EMULATE, which shows that it runs and nothing else. */
#define APT_IMPLEMENTATION
#include "../../apt.h"
#ifdef APT_CUDA_EMULATE
#define APT_CUDA_IMPLEMENTATION
#endif
#include "../../apt_cuda.h"
#include "bench.h"
#include "bench_model.h"

static const shape shapes[] = {
    {"minilm", APT_ROBERTA, 384, 32, 6, 12, 1536, 30522, 32, 128},
    {"roberta-base", APT_ROBERTA, 768, 64, 12, 12, 3072, 50265, 32, 128},
    {"llama-110m", APT_LLAMA, 768, 64, 12, 12, 2048, 32000, 8, 256},
    {"llama-7b", APT_LLAMA, 4096, 128, 32, 32, 11008, 32000, 4, 512},
    {"tiny", APT_ROBERTA, 32, 8, 2, 4, 128, 100, 2, 8},              /* for the emulation */
    {"tiny-llama", APT_LLAMA, 32, 8, 2, 4, 128, 100, 2, 8},
};

enum { WORKSPACE_MB = 512, MOST = 64 };

/* ---- the device, watched ---- */

/* Counts the operations of products, or leaves everything else undone. */
static struct { bool (*run)(void *self, apti_op op, const void *job); double flops; bool products_only; } watched;

static bool watch(void *self, apti_op op, const void *job)
{
    if (op == APTI_OP_GEMM) {
        const apti_gemm *g = (const apti_gemm *)job;
        watched.flops += 2.0 * (double)g->m * (double)g->n * (double)(g->part[0].k + g->part[1].k);
    }
    return op != APTI_OP_GEMM && watched.products_only ? true : watched.run(self, op, job);
}

static apt_cuda_math math_of(const char *name)
{
    static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
    for (int32_t i = 0; i < 4; i++)
        if (strcmp(name, names[i]) == 0) return (apt_cuda_math)i;
    fprintf(stderr, "'%s' is no math; there are fp32, tf32, bf16, fp16\n", name);
    exit(2);
}

static apt_dtype frozen_type(apt_cuda_math math)
{
    return math == APT_CUDA_BF16 ? APT_BF16 : math == APT_CUDA_FP16 ? APT_F16 : APT_F32;
}

static apt_ctx *make_context(apt_cuda_math math, bool graphs)
{
    apt_desc desc = APT_ZERO;
    char message[512];
    apt_cuda_desc device = APT_ZERO;
    device.math = math;
    device.workspace_bytes = (size_t)WORKSPACE_MB << 20;
    device.no_graphs = !graphs;
    desc.backend = apt_cuda_open(&device, message, sizeof message);
    if (desc.backend == NULL) {
        fprintf(stderr, "%s\n", message);
        exit(1);
    }
    watched.run = desc.backend->run;
    desc.backend->run = watch;
    apt_ctx *ctx = apt_create(&desc);
    if (ctx == NULL) exit(1);
    return ctx;
}

/* ---- models ---- */

/* Normal numbers, the same for every matrix: drawing 7 thousand million of them would take longer than all that is measured. */
static const float *pool(int64_t *count)
{
    static float *values;
    *count = (int64_t)1 << 22;
    if (values != NULL) return values;
    values = (float *)malloc((size_t)*count * sizeof(float));
    if (values == NULL) exit(1);
    apt_rng rng = apt_rng_make(7, 0);
    for (int64_t i = 0; i < *count; i++) values[i] = 0.02f * apt_rng_normal(&rng);
    return values;
}

static void fill(float *values, const apti_param *p)
{
    int64_t size;
    const float *from = pool(&size);
    const int64_t n = apti_param_count(p);
    for (int64_t i = 0; i < n; i += size)
        if (p->init < 0) memcpy(values + i, from, (size_t)apti_min_i64(size, n - i) * sizeof(float));
        else for (int64_t j = i; j < apti_min_i64(i + size, n); j++) values[j] = p->init;
}

/* As apti_model_build, with other numbers. */
static apt_model *make_model(apt_ctx *ctx, const apt_config *c, apt_dtype weights)
{
    apt_model *m = NULL;
    if (apti_model_frame(ctx, c, weights, &m) != APT_OK) fail(ctx, "frame");
    float *values = (float *)apti_alloc(ctx, apti_largest_linear(m), (int64_t)sizeof(float));
    for (int32_t i = 0; i < m->param_count && values != NULL; i++) {
        apti_param *p = &m->params[i];
        if (apti_param_count(p) == 0) continue;
        if (!apti_param_reserve(m, p)) {
            fprintf(stderr, "no memory for %s\n", p->name);
            exit(1);
        }
        fill(p->linear ? values : p->value, p);
        apti_param_set(m, p, p->linear ? values : p->value);
    }
    apti_free(ctx, values);
    m->next = ctx->models;
    ctx->models = m;
    return m;
}

static const shape *shape_of(const char *name)
{
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        if (strcmp(name, shapes[i].name) == 0) return &shapes[i];
    fprintf(stderr, "unknown shape '%s'\n", name);
    exit(2);
}

/* ---- rows ---- */

typedef struct bench { apt_ctx *ctx; shape s; const char *math; apt_dtype weights; int steps; double peak; apt_batch batch; } bench;

/* Operations per second of one large product. */
static double peak_of(apt_ctx *ctx, apt_dtype weights, int64_t size)
{
    const int64_t n = 2 * size;
    apti_packed w = APT_ZERO;
    apti_param p = APT_ZERO;
    float *values = (float *)malloc((size_t)(n * size) * sizeof(float));
    float *a = (float *)apti_data(ctx, size * size, 4), *c = (float *)apti_data(ctx, size * n, 4);
    double best = 0;
    if (values == NULL || a == NULL || c == NULL || !apti_packed_reserve(ctx, &w, n, size, weights)) fail(ctx, "peak: no memory");
    p.init = -1;
    p.rows = n;
    p.cols = size;
    fill(values, &p);
    memcpy(a, values, (size_t)(size * size) * sizeof(float));
    apti_pack(ctx, &w, values, size);
    apti_gemm g = apti_gemm_begin(c, n, size, n, false);
    apti_gemm_left(&g.part[0], a, size, size);
    apti_gemm_packed(&g.part[0], APTI_B_PACKED, &w);
    for (int i = 0; i < 8; i++) {
        const double start = apti_seconds();
        apti_gemm_run(ctx, &g);
        apti_sync(ctx);
        const double rate = 2.0 * (double)size * (double)n * (double)size / (apti_seconds() - start);
        if (i > 1 && rate > best) best = rate;
    }
    if (apti_device_check(ctx) != APT_OK) fail(ctx, "peak");
    apti_free(ctx, w.data);
    apti_free(ctx, a);
    apti_free(ctx, c);
    free(values);
    return best;
}

static double median_steps(const bench *b, apt_trainer *t, int steps)
{
    double ms[MOST];
    for (int i = -2; i < steps; i++) {
        apt_step_info info;
        if (apt_trainer_step(t, &b->batch, &info) != APT_OK) fail(b->ctx, "step");
        if (i >= 0) ms[i] = info.milliseconds;
    }
    return median(ms, steps);
}

static double median_forward(const bench *b, apt_model *m)
{
    double ms[MOST];
    for (int i = -2; i < b->steps; i++) ms[i < 0 ? 0 : i] = forward_ms(b->ctx, m, &b->batch);
    return median(ms, b->steps);
}

/* One row of steps. first: milliseconds of what this one is compared with; flops, products, forward 0: not measured. */
static void show(const bench *b, const char *what, double ms, double first, double flops, double products, double forward,
                 double first_forward)
{
    const double tokens = (double)b->s.batch * b->s.tokens, rate = 1e3 * flops / ms;
    const double mb = (double)apt_memory_info(b->ctx).peak_bytes / 1048576;
    printf("| %s %s, %d x %d | %s | %.1f (%.2fx) | %.0f |", b->s.name, what, (int)b->s.batch, (int)b->s.tokens, b->math, ms,
           first / ms, 1e3 * tokens / ms);
    if (flops > 0) printf(" %.1f | %.0f %% |", rate / 1e12, 100 * rate / b->peak);
    else printf(" | |");
    if (products > 0) printf(" %.0f %% |", 100 * products / ms);
    else printf(" |");
    if (forward > 0) printf(" %.1f (%.2fx) | %.0f |", forward, first_forward / forward, 1e3 * tokens / forward);
    else printf(" | |");
    printf(" %.0f |\n", mb);
    fflush(stdout);
}

/* Operations of the products of one step, and the median time of these alone. What the trainer holds is worthless afterwards. */
static double products_of(const bench *b, apt_trainer *t, double *flops)
{
    watched.flops = 0;
    if (apt_trainer_step(t, &b->batch, NULL) != APT_OK) fail(b->ctx, "step");
    *flops = watched.flops;
    watched.products_only = true;
    const double ms = median_steps(b, t, b->steps);
    watched.products_only = false;
    return ms;
}

static apt_train_desc lora(void)
{
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_LORA;
    d.steps = 1000;
    d.learning_rate = 1e-5f;
    return d;
}

static double bench_lora(const bench *b, apt_model *m, const char *what, bool recompute, double first, double forward)
{
    apt_train_desc d = lora();
    d.recompute = recompute;
    apt_trainer *t = NULL;
    double flops;
    if (apt_trainer_create(m, &d, &t) != APT_OK) fail(b->ctx, "create");
    const double ms = median_steps(b, t, b->steps), products = products_of(b, t, &flops);
    show(b, what, ms, first > 0 ? first : ms, flops, products, forward, forward);
    apt_trainer_destroy(t);
    return ms;
}

static int32_t round_step(const shape *s) { return s->hidden >= 256 ? 64 : 8; }

/* What sizes that tensor cores can take at once are worth. */
static void bench_round(const bench *b)
{
    const int32_t step = round_step(&b->s);
    double first = 0;
    for (int32_t k = 0; k < 2; k++) {
        apt_config c = make_config(&b->s);
        char text[64];
        c.hidden = c.hidden * 9 / 10 | 1;
        c.neurons = c.neurons * 6 / 10 | 1;
        if (k == 1) c.hidden = (c.hidden + step - 1) / step * step, c.neurons = (c.neurons + step - 1) / step * step;
        apt_model *m = make_model(b->ctx, &c, b->weights);
        snprintf(text, sizeof text, "LoRA, hidden size %d, %d neurons", (int)c.hidden, (int)c.neurons);
        first = bench_lora(b, m, text, false, first, median_forward(b, m));
        apt_model_destroy(m);
        apt_memory_reset_peak(b->ctx);
    }
}

/* Decisions every four steps, whose masks fall at once, so that compaction comes in the step behind each. */
static void bench_apt(const bench *b, apt_model *m)
{
    apt_train_desc d = lora();
    apt_trainer *t = NULL;
    double ms[3][MOST], flops = 0, longest = 0;
    int n[3] = {0, 0, 0};
    const double dense = median_forward(b, m);
    d.method = APT_METHOD_APT;
    d.target_sparsity = 0.6f;
    d.prune_begin = b->steps + 2;
    d.update_frequency = 4;
    d.prune_end = d.prune_begin + 5 * d.update_frequency;
    d.mask_step = 1;
    d.round_neurons = d.round_hidden = round_step(&b->s);                /* see bench_round */
    d.steps = d.prune_end + 4 * b->steps + 12;
    if (apt_trainer_create(m, &d, &t) != APT_OK) fail(b->ctx, "create");
    for (int64_t i = 0; i < d.prune_end + 2 + b->steps; i++) {
        apt_step_info info;
        const int phase = i < d.prune_begin ? 0 : i < d.prune_end + 2 ? 1 : 2;
        watched.flops = 0;
        if (apt_trainer_step(t, &b->batch, &info) != APT_OK) fail(b->ctx, "step");
        if (i < 2 || n[phase] == MOST) continue;
        ms[phase][n[phase]++] = info.milliseconds;
        if (phase == 1) longest = fmax(longest, info.milliseconds);
        if (i == 2) flops = watched.flops;
    }
    const double begin = median(ms[0], n[0]), middle = median(ms[1], n[1]), end = median(ms[2], n[2]);
    char text[96];
    double last;
    const double products = products_of(b, t, &last);
    if (apt_trainer_finish(t) != APT_OK || apt_model_merge(m, NULL, NULL) != APT_OK) fail(b->ctx, "finish");
    apt_trainer_destroy(t);
    const double forward = median_forward(b, m);
    show(b, "APT at first", begin, begin, flops, 0, dense, dense);
    snprintf(text, sizeof text, "APT while it prunes (longest %.0f ms)", longest);
    show(b, text, middle, begin, 0, 0, 0, 0);
    show(b, "APT at the end", end, begin, last, products, forward, dense);
}

static double generate_ms(const bench *b, apt_model *m, int32_t tokens)
{
    apt_generate_desc d = APT_ZERO;
    d.max_tokens = tokens;
    d.ignore_end = 1;
    int32_t *out = numbers((int64_t)b->s.batch * tokens), *lengths = numbers(b->s.batch);
    const double start = apti_seconds();
    if (apt_generate(m, &b->batch, &d, out, lengths) != APT_OK) fail(b->ctx, "generate");
    const double ms = 1e3 * (apti_seconds() - start);
    free(out);
    free(lengths);
    return ms;
}

typedef struct writing { double prefill, token; char row[256]; } writing;

/* A row for later: the table of steps comes first. */
static writing bench_writing(const bench *b, apt_model *m, const char *what, const writing *dense)
{
    enum { TOKENS = 32, TIMES = 3 };
    double one[TIMES + 1], many[TIMES + 1];
    for (int i = -1; i < TIMES; i++) {
        one[i < 0 ? 0 : i] = generate_ms(b, m, 1);
        many[i < 0 ? 0 : i] = generate_ms(b, m, 1 + TOKENS);
    }
    writing w;
    w.prefill = median(one, TIMES);
    w.token = (median(many, TIMES) - w.prefill) / TOKENS;
    const double prefill = dense != NULL ? dense->prefill : w.prefill, token = dense != NULL ? dense->token : w.token;
    snprintf(w.row, sizeof w.row, "| %s %s, %d x %d | %s | %.1f (%.2fx) | %.0f | %.2f (%.2fx) | %.0f |", b->s.name, what,
             (int)b->s.batch, (int)b->s.tokens, b->math, w.prefill, prefill / w.prefill,
             1e3 * b->s.batch * b->s.tokens / w.prefill, w.token, token / w.token, 1e3 * b->s.batch / w.token);
    return w;
}

static void bench_llama(const bench *b)
{
    apt_config c = make_config(&b->s);
    apt_model *m = make_model(b->ctx, &c, b->weights);
    const writing dense = bench_writing(b, m, "dense", NULL);
    const double first = bench_lora(b, m, "LoRA, recomputing", true, 0, 0), parameters = (double)m->prunable_dense;
    apt_model_destroy(m);
    const int32_t step = c.neurons >= 1024 ? 64 : 8;
    c.heads = (int32_t)(0.69 * c.heads + 0.5);
    c.neurons = (int32_t)(0.7 * c.neurons) / step * step;
    apt_memory_reset_peak(b->ctx);
    m = make_model(b->ctx, &c, b->weights);
    const double gone = 100 * (1 - (double)m->prunable_dense / parameters);
    char text[64];
    snprintf(text, sizeof text, "%.0f %% gone", gone);
    const writing pruned = bench_writing(b, m, text, &dense);
    snprintf(text, sizeof text, "LoRA, recomputing, %.0f %% gone", gone);
    (void)bench_lora(b, m, text, true, first, 0);
    printf("\n| model | math | prefill ms | tokens/s | ms for a token each | tokens/s |\n|---|---|--:|--:|--:|--:|\n%s\n%s\n", dense.row,
           pruned.row);
}

int main(int argc, char **argv)
{
    if (argc < 7) {
        fprintf(stderr, "usage: bench_cuda lora|graphs|round|apt|llama fp32|tf32|bf16|fp16 SHAPE BATCH TOKENS STEPS [PEAK]\n");
        return 2;
    }
    const apt_cuda_math math = math_of(argv[2]);
    const bool compare = strcmp(argv[1], "graphs") == 0;
    double single = 0;
    bench b;
    b.s = *shape_of(argv[3]);
    b.s.batch = atoi(argv[4]);
    b.s.tokens = atoi(argv[5]);
    b.steps = atoi(argv[6]) < 1 ? 1 : atoi(argv[6]) > MOST ? MOST : atoi(argv[6]);
    b.math = argv[2];
    b.weights = frozen_type(math);
    b.batch = make_batch(&b.s);
    for (int graphs = !compare; graphs < 2; graphs++) {
        b.ctx = make_context(math, graphs != 0);
        b.peak = peak_of(b.ctx, b.weights, argc > 7 ? atoi(argv[7]) : 8192);
        apt_memory_reset_peak(b.ctx);
        if (strcmp(argv[1], "llama") == 0) bench_llama(&b);
        else if (strcmp(argv[1], "round") == 0) bench_round(&b);
        else {
            const apt_config c = make_config(&b.s);
            apt_model *m = make_model(b.ctx, &c, b.weights);
            if (strcmp(argv[1], "apt") == 0) bench_apt(&b, m);
            else single = bench_lora(&b, m, !compare ? "LoRA" : graphs ? "LoRA, graphs" : "LoRA, one by one", false, single, median_forward(&b, m));
        }
        apt_destroy(b.ctx);
    }
    return 0;
}
