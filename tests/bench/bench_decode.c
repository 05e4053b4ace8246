/* Single-stream decoding of LLaMA models with random weights: the median time between two tokens, for weights in float32, in
   bfloat16, in float16 and as small integers (the layers' maps; the LM head stays float32 or bfloat16), dense and after 60 % of
   the prunable parameters are gone. Beside it the memory's own limit: every token reads every weight once, so tokens/s cannot pass (bytes
   read per second) / (bytes of the weights); the benchmark measures the former with plain loads over a buffer as large.

   usage: bench_decode [SHAPE|all [TOKENS [THREADS]]]                     default: all shapes, 64 new tokens */
#define APT_IMPLEMENTATION
#include "../../apt.h"
#include "bench.h"

typedef struct shape { const char *name; int32_t hidden, head_dim, layers, heads, neurons; } shape;
static const shape shapes[] = {{"llama-15m", 288, 48, 6, 6, 768}, {"llama-110m", 768, 64, 12, 12, 2048}};
enum { VOCAB = 32000, PROMPT = 16, MOST = 1024 };
#define FOLDER "build/bench/decode-model"

/* ---- the memory's limit ---- */

typedef struct stream { const apt_ctx *ctx; const float *data; int64_t block; float sink[64]; } stream;

static void stream_task(int64_t index, int32_t thread, void *arg)
{
    stream *s = (stream *)arg;
    s->sink[thread % 64] += s->ctx->kernels->sum(s->data + index * s->block, s->block);
}

/* Bytes per second that all threads read together, the best of several passes over `bytes`. */
static double read_rate(apt_ctx *ctx, int64_t bytes)
{
    stream s = APT_ZERO;
    s.ctx = ctx;
    s.block = 1 << 16;
    const int64_t blocks = bytes / ((int64_t)sizeof(float) * s.block);
    float *data = (float *)calloc((size_t)(blocks * s.block), sizeof(float));
    if (data == NULL) fail(NULL, "read_rate");
    for (int64_t i = 0; i < blocks * s.block; i += 1024) data[i] = 1;
    s.data = data;
    double best = 1e9;
    for (int i = 0; i < 12; i++) {
        const double start = apti_seconds();
        apti_parallel_for(ctx, blocks, stream_task, &s);
        best = fmin(best, apti_seconds() - start);
    }
    free(data);
    return (double)(blocks * s.block) * sizeof(float) / best;
}

/* ---- decoding ---- */

static double parameter_bytes(const apti_param *p)
{
    const apt_dtype type = p->linear ? p->packed.type : APT_F32;
    const int32_t kind = apti_quant_kind(type);
    if (apti_is_quant(type))
        return (double)apt_quant_bytes(kind, p->rows, p->cols) + 4.0 * (double)apt_quant_scales(kind, p->rows, p->cols);
    return (double)p->rows * (double)p->cols * (type == APT_BF16 || type == APT_F16 ? 2 : 4);
}

/* Bytes that one token reads: every matrix that is multiplied, not the rows that are looked up. */
static double weight_bytes(const apt_model *m)
{
    double bytes = 0;
    for (int32_t i = 0; i < m->param_count; i++)
        if (strstr(m->params[i].name, "embed_tokens") == NULL) bytes += parameter_bytes(&m->params[i]);
    return bytes;
}

typedef struct clock_log { double at[MOST]; int32_t count; } clock_log;

static int note_time(int32_t sequence, int32_t token, void *user)
{
    clock_log *log = (clock_log *)user;
    (void)sequence;
    (void)token;
    if (log->count < MOST) log->at[log->count++] = apti_seconds();
    return 0;
}

/* Median seconds of a token behind a prompt. */
static double token_seconds(apt_model *m, int32_t tokens)
{
    static clock_log log;
    static int32_t out[MOST];
    int32_t prompt[PROMPT], length;
    const int32_t offsets[2] = {0, PROMPT};
    apt_batch b = APT_ZERO;
    apt_generate_desc d = APT_ZERO;
    for (int32_t i = 0; i < PROMPT; i++) prompt[i] = 5 + 7 * i;
    b.sequences = 1;
    b.offsets = offsets;
    b.tokens = prompt;
    d.max_tokens = tokens;
    d.ignore_end = 1;
    d.on_token = note_time;
    d.user = &log;
    log.count = 0;
    if (apt_generate(m, &b, &d, out, &length) != APT_OK) fail(m->ctx, "generate");
    for (int32_t i = log.count - 1; i > 0; i--) log.at[i] -= log.at[i - 1];
    return median(log.at + 1, log.count - 1);
}

/* How a model's weights are kept: what is loaded, then what the layers' maps become. */
typedef struct form { const char *name; apt_dtype weights; int32_t quant; } form;
static const form forms[] = {{"float32", APT_F32, APT_QUANT_NONE},          {"bfloat16", APT_BF16, APT_QUANT_NONE},
                             {"float16", APT_F16, APT_QUANT_NONE},
                             {"int8", APT_F32, APT_QUANT_INT8},             {"int4", APT_F32, APT_QUANT_INT4},
                             {"int8 + bfloat16", APT_BF16, APT_QUANT_INT8}, {"int4 + bfloat16", APT_BF16, APT_QUANT_INT4}};

/* A model in that form: through a folder of its own, which half precision needs. */
static apt_model *in_form(apt_model *m, const form *f)
{
    apt_load_desc d = APT_ZERO;
    apt_quantize_desc q = APT_ZERO;
    apt_model *other = NULL;
    d.weights = f->weights;
    q.kind = f->quant;
    if (apt_model_save(m, FOLDER) != APT_OK || apt_model_load(m->ctx, FOLDER, &d, &other) != APT_OK) fail(m->ctx, FOLDER);
    if (f->quant != APT_QUANT_NONE && apt_model_quantize(other, &q) != APT_OK) fail(m->ctx, "quantize");
    return other;
}

/* One line a form. dense: seconds of a token of the dense float32 model, which the first line sets when it is 0. */
static void report(apt_model *m, const char *name, const char *gone, int32_t tokens, double rate, double *dense)
{
    for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
        apt_model *other = in_form(m, &forms[i]);
        const double bytes = weight_bytes(other), seconds = token_seconds(other, tokens), limit = rate / bytes;
        apt_model_destroy(other);
        if (*dense <= 0) *dense = seconds;
        printf("%-11s %-15s %-9s %7.1f MB  %8.2f ms/token %8.1f tokens/s  %5.1f GB/s, %3.0f %% of the memory's limit  (%.2fx)\n",
               name, forms[i].name, gone, bytes / 1e6, 1e3 * seconds, 1 / seconds, bytes / seconds / 1e9, 100 / seconds / limit,
               *dense / seconds);
        fflush(stdout);
    }
}

/* 60 % gone, chosen by one batch; the adapters are folded in. */
static void prune(apt_model *m)
{
    int32_t text[4 * PROMPT], offsets[5];
    apt_rng rng = apt_rng_make(3, 0);
    apt_batch b = APT_ZERO;
    apt_train_desc d = APT_ZERO;
    apt_trainer *t = NULL;
    for (int32_t i = 0; i <= 4; i++) offsets[i] = i * PROMPT;
    for (int32_t i = 0; i < 4 * PROMPT; i++) text[i] = 5 + (int32_t)apt_rng_below(&rng, VOCAB - 5);
    b.sequences = 4;
    b.offsets = offsets;
    b.tokens = b.labels = text;
    d.method = APT_METHOD_LORA;
    d.steps = 1;
    d.learning_rate = 1e-4f;
    if (apt_trainer_create(m, &d, &t) != APT_OK || apt_trainer_observe(t, &b) != APT_OK ||
        apt_trainer_prune_now(t, 0.6f) != APT_OK || apt_trainer_finish(t) != APT_OK || apt_model_merge(m, NULL, NULL) != APT_OK)
        fail(m->ctx, "prune");
    apt_trainer_destroy(t);
}

static void bench(const shape *s, int32_t tokens, int32_t threads)
{
    apt_desc desc = APT_ZERO;
    desc.threads = threads;
    apt_ctx *ctx = apt_create(&desc);
    if (ctx == NULL) fail(NULL, "apt_create");
    apt_config c = APT_ZERO;
    c.family = APT_LLAMA;
    c.task = APT_TASK_LM;
    c.vocab = VOCAB;
    c.positions = 2048;
    c.hidden = s->hidden;
    c.head_dim = s->head_dim;
    c.layers = s->layers;
    c.heads = s->heads;
    c.neurons = s->neurons;
    c.untied = 1;
    apt_model *m = NULL;
    if (apt_model_create(ctx, &c, 1, &m) != APT_OK) fail(ctx, "create");
    const double rate = read_rate(ctx, (int64_t)weight_bytes(m));
    printf("%s, %d threads; reading %.0f MB: %.1f GB/s\n", apt_kernel_name(ctx), (int)apt_thread_count(ctx),
           weight_bytes(m) / 1e6, rate / 1e9);
    double dense = 0;
    report(m, s->name, "", tokens, rate, &dense);
    prune(m);
    report(m, s->name, "60 % gone", tokens, rate, &dense);
    apt_destroy(ctx);
}

int main(int argc, char **argv)
{
    const int32_t tokens = argc > 2 ? (int32_t)atoi(argv[2]) : 64;
    bool known = false;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        if (argc > 1 && strcmp(argv[1], "all") != 0 && strcmp(argv[1], shapes[i].name) != 0) continue;
        known = true;
        bench(&shapes[i], tokens < 2 ? 2 : tokens > MOST ? MOST : tokens, argc > 3 ? (int32_t)atoi(argv[3]) : 0);
    }
    if (!known) fprintf(stderr, "unknown shape '%s'\n", argv[1]);
    return known ? 0 : 2;
}
