/* Training step and forward of whole models with random weights: LoRA (rank 8 on query, value and FFN up) dense, and the same
   after 60 % of the prunable parameters are gone; and the forward of the plain model with weights as float32, int8 and int4, and
   LoRA's step with each of them (quantisation-aware training).
   Medians of single steps; ratios are of this one run. The shapes and batches are those of peer_torch.py: T5 counts source
   tokens, with a quarter as many target tokens.

   usage: bench_train [SHAPE|all [BATCH [TOKENS [STEPS [THREADS]]]]]      default: all shapes, their own batches, 5 steps

   BENCH_KERNELS=avx2, say, chooses the kernels; with BENCH_FLOATS=1 there are no small integers; with BENCH_RECOMPUTE=1 the
   steps compute activations again for their backward. With BENCH_TURNS=1 the dense model takes turns with another program
   (against_torch.sh): it says "ready" in front of each step and forward, waits for a line, and says "done" behind it. */
#define _DEFAULT_SOURCE
#include <sys/resource.h>

#define APT_IMPLEMENTATION
#include "../../apt.h"
#include "bench.h"
#include "bench_model.h"

static const shape shapes[] = {
    {"minilm", APT_ROBERTA, 384, 32, 6, 12, 1536, 30522, 32, 128},
    {"roberta-base", APT_ROBERTA, 768, 64, 12, 12, 3072, 50265, 16, 128},
    {"t5-small", APT_T5, 512, 64, 8, 6, 1024, 32128, 16, 128},
    {"t5-base", APT_T5, 768, 64, 12, 12, 2048, 32128, 8, 128},
    {"llama-15m", APT_LLAMA, 288, 48, 6, 6, 768, 32000, 16, 128},
    {"llama-110m", APT_LLAMA, 768, 64, 12, 12, 2048, 32000, 8, 256},
};

typedef struct timing { double step, forward; } timing;

static long peak_rss(void)
{
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return use.ru_maxrss / 1024;
}

static apt_ctx *make_context(int32_t threads)
{
    apt_desc desc = APT_ZERO;
    desc.threads = threads;
    desc.kernels = getenv("BENCH_KERNELS");      /* NULL: the best */
    apt_ctx *ctx = apt_create(&desc);
    if (ctx == NULL) exit(1);
    return ctx;
}

/* i < 0: a step to get warm, out of turn */
static void turn(int i, const char *word)
{
    char line[16];
    if (getenv("BENCH_TURNS") == NULL || i < 0) return;
    puts(word);
    fflush(stdout);
    if (strcmp(word, "ready") == 0 && fgets(line, sizeof line, stdin) == NULL) exit(1);
}

static timing measure(apt_ctx *ctx, apt_trainer *t, const apt_batch *batch, int steps)
{
    double step[64], forward[64];
    timing r;
    for (int i = -1; i < steps; i++) {
        apt_step_info info;
        turn(i, "ready");
        if (apt_trainer_step(t, batch, &info) != APT_OK) fail(ctx, "step");
        turn(i, "done");
        if (i >= 0) step[i] = info.milliseconds;
    }
    for (int i = -1; i < steps; i++) {
        turn(i, "ready");
        forward[i < 0 ? 0 : i] = forward_ms(ctx, apt_trainer_model(t), batch);
        turn(i, "done");
    }
    r.step = median(step, steps);
    r.forward = median(forward, steps);
    return r;
}

static void report(const shape *s, const char *what, timing t, timing dense)
{
    const double tokens = (double)s->batch * s->tokens;
    printf("%-13s %-8s step %8.1f ms %8.0f tokens/s (%.2fx)   forward %8.1f ms %8.0f tokens/s (%.2fx)\n", s->name, what, t.step,
           1e3 * tokens / t.step, dense.step / t.step, t.forward, 1e3 * tokens / t.forward, dense.forward / t.forward);
    fflush(stdout);
}

/* The same dense model without adapters, its weights as float32, int8 and int4; the three take turns. */
static void bench_quantized(const shape *s, int steps, int32_t threads)
{
    static const int32_t kinds[3] = {APT_QUANT_NONE, APT_QUANT_INT8, APT_QUANT_INT4};
    const apt_config c = make_config(s);
    const apt_batch batch = make_batch(s);
    apt_model *model[3] = {NULL, NULL, NULL};
    double ms[3][64], bytes[3], plain = 0;
    apt_ctx *ctx = make_context(threads);
    for (int i = 0; i < 3; i++) {
        const int64_t before = apt_memory_info(ctx).bytes;
        apt_quantize_desc d = APT_ZERO;
        d.kind = kinds[i];
        if (apt_model_create(ctx, &c, 1, &model[i]) != APT_OK) fail(ctx, "create");
        if (i > 0 && apt_model_quantize(model[i], &d) != APT_OK) fail(ctx, "quantize");
        bytes[i] = (double)(apt_memory_info(ctx).bytes - before) / 1048576;
    }
    for (int k = -1; k < steps; k++)
        for (int i = 0; i < 3; i++) ms[i][k < 0 ? 0 : k] = forward_ms(ctx, model[i], &batch);
    for (int i = 0; i < 3; i++) {
        const double middle = median(ms[i], steps), tokens = (double)s->batch * s->tokens;
        if (i == 0) plain = middle;
        printf("%-13s %-8s forward %8.1f ms %8.0f tokens/s (%.2fx)   model %.0f MB\n", s->name,
               i > 0 ? apt_quant_kind_name(kinds[i]) : "plain", middle, 1e3 * tokens / middle, plain / middle, bytes[i]);
    }
    fflush(stdout);
    apt_destroy(ctx);
}

/* LoRA's step, dense, with weights as float32, int8 and int4; the three take turns. */
static void bench_quantized_steps(const shape *s, int steps, int32_t threads)
{
    static const int32_t kinds[3] = {APT_QUANT_NONE, APT_QUANT_INT8, APT_QUANT_INT4};
    const apt_config c = make_config(s);
    const apt_batch batch = make_batch(s);
    apt_trainer *trainer[3] = {NULL, NULL, NULL};
    apt_step_info info;
    double ms[3][64], plain = 0;
    apt_ctx *ctx = make_context(threads);
    for (int i = 0; i < 3; i++) {
        apt_model *model = NULL;
        apt_train_desc d = APT_ZERO;
        d.method = APT_METHOD_LORA;
        d.steps = 1000;
        d.learning_rate = 1e-4f;
        d.quantize = kinds[i];
        if (apt_model_create(ctx, &c, 1, &model) != APT_OK || apt_trainer_create(model, &d, &trainer[i]) != APT_OK)
            fail(ctx, "create");
    }
    for (int k = -1; k < steps; k++)
        for (int i = 0; i < 3; i++) {
            if (apt_trainer_step(trainer[i], &batch, &info) != APT_OK) fail(ctx, "step");
            ms[i][k < 0 ? 0 : k] = info.milliseconds;
        }
    for (int i = 0; i < 3; i++) {
        const double middle = median(ms[i], steps);
        if (i == 0) plain = middle;
        printf("%-13s %-8s step    %8.1f ms (%.2fx)\n", s->name, i > 0 ? apt_quant_kind_name(kinds[i]) : "plain", middle,
               plain / middle);
    }
    fflush(stdout);
    apt_destroy(ctx);
}

static void bench(const shape *s, int steps, int32_t threads)
{
    apt_ctx *ctx = make_context(threads);
    const apt_config c = make_config(s);
    apt_model *model = NULL;
    apt_trainer *trainer = NULL;
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_LORA;
    d.steps = 1000;
    d.learning_rate = 1e-4f;
    d.recompute = getenv("BENCH_RECOMPUTE") != NULL;
    const apt_batch batch = make_batch(s);
    if (apt_model_create(ctx, &c, 1, &model) != APT_OK || apt_trainer_create(model, &d, &trainer) != APT_OK)
        fail(ctx, "create");
    const timing dense = measure(ctx, trainer, &batch, steps);
    printf("%s, %d threads, %d x %d tokens, peak %.0f MB by apt.h, %ld MB resident\n", apt_kernel_name(ctx),
           (int)apt_thread_count(ctx), (int)s->batch, (int)s->tokens, (double)apt_memory_info(ctx).peak_bytes / 1048576,
           peak_rss());
    report(s, "dense", dense, dense);
    if (getenv("BENCH_TURNS") != NULL) exit(0);
    if (apt_trainer_observe(trainer, &batch) != APT_OK || apt_trainer_prune_now(trainer, 0.6f) != APT_OK) fail(ctx, "prune");
    const timing small = measure(ctx, trainer, &batch, steps);
    report(s, "60% gone", small, dense);
    apt_destroy(ctx);
}

int main(int argc, char **argv)
{
    bool known = false;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        shape s = shapes[i];
        if (argc > 1 && strcmp(argv[1], "all") != 0 && strcmp(argv[1], s.name) != 0) continue;
        known = true;
        if (argc > 2) s.batch = atoi(argv[2]);
        if (argc > 3) s.tokens = atoi(argv[3]);
        int steps = argc > 4 ? atoi(argv[4]) : 5;
        steps = steps < 1 ? 1 : steps > 64 ? 64 : steps;
        const int32_t threads = argc > 5 ? atoi(argv[5]) : 0;
        bench(&s, steps, threads);
        if (getenv("BENCH_FLOATS") != NULL) continue;
        bench_quantized(&s, steps, threads);
        bench_quantized_steps(&s, steps, threads);
    }
    if (!known) fprintf(stderr, "unknown shape '%s'\n", argv[1]);
    return known ? 0 : 2;
}
