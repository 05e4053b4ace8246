/* bench_model.h - models and batches that benchmarks of whole models share: shapes, random texts. Include after apt.h. */
#ifndef BENCH_MODEL_H
#define BENCH_MODEL_H

typedef struct shape {
    const char *name;
    apt_family family;
    int32_t hidden, head_dim, layers, heads, neurons, vocab, batch, tokens;
} shape;

static inline apt_config make_config(const shape *s)
{
    apt_config c = APT_ZERO;
    c.family = s->family;
    c.task = s->family == APT_ROBERTA ? APT_TASK_CLASSIFY : APT_TASK_LM;
    c.vocab = s->vocab;
    c.hidden = s->hidden;
    c.head_dim = s->head_dim;
    c.layers = s->family == APT_T5 ? 3 * s->layers : s->layers;       /* a T5 decoder layer counts as two */
    c.decoder_layers = s->family == APT_T5 ? s->layers : 0;
    c.heads = s->heads;
    c.neurons = s->neurons;
    c.positions = s->family == APT_ROBERTA ? 514 : 2048;
    c.types = s->family == APT_ROBERTA;
    c.labels = s->family == APT_ROBERTA ? 2 : 0;
    c.pad_id = s->family == APT_ROBERTA;
    c.gated = s->family == APT_T5;
    c.untied = s->family == APT_LLAMA;
    return c;
}

static inline int32_t *numbers(int64_t n)
{
    int32_t *p = (int32_t *)malloc((size_t)n * sizeof(int32_t));
    if (p == NULL) exit(1);
    return p;
}

/* `sequences` of `tokens` random ids each, with their offsets. */
static inline int32_t *random_text(const shape *s, int32_t sequences, int32_t tokens, uint64_t seed, int32_t *offsets)
{
    int32_t *text = numbers((int64_t)sequences * tokens);
    apt_rng rng = apt_rng_make(seed, 0);
    for (int32_t i = 0; i <= sequences; i++) offsets[i] = i * tokens;
    for (int32_t i = 0; i < sequences * tokens; i++) text[i] = 5 + (int32_t)apt_rng_below(&rng, (uint32_t)s->vocab - 5);
    return text;
}

/* Labels: a class of each sequence (encoders), a text of a quarter of the tokens (T5), the tokens themselves (LLaMA). */
static inline apt_batch make_batch(const shape *s)
{
    int32_t *offsets = numbers(s->batch + 1), *target_offsets = numbers(s->batch + 1), *labels = numbers(s->batch);
    apt_rng rng = apt_rng_make(2, 0);
    apt_batch b = APT_ZERO;
    b.sequences = s->batch;
    b.tokens = random_text(s, s->batch, s->tokens, 1, offsets);
    b.offsets = offsets;
    for (int32_t i = 0; i < s->batch; i++) labels[i] = (int32_t)apt_rng_below(&rng, 2);
    b.labels = s->family == APT_ROBERTA ? labels : b.tokens;
    if (s->family != APT_T5) return b;
    b.labels = random_text(s, s->batch, s->tokens < 4 ? 1 : s->tokens / 4, 3, target_offsets);
    b.target_offsets = target_offsets;
    return b;
}

static inline double forward_ms(apt_ctx *ctx, apt_model *model, const apt_batch *batch)
{
    apt_output out = APT_ZERO;
    const double start = apti_seconds();
    if (apt_model_forward(model, batch, &out) != APT_OK) fail(ctx, "forward");
    return 1e3 * (apti_seconds() - start);
}

#endif /* BENCH_MODEL_H */
