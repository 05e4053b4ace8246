/* model_test.h - small models, batches and comparisons for the tests of the model and the trainer. Include it after "../apt.h"
   (with APT_IMPLEMENTATION) and "apt_test.h". */
#ifndef APT_MODEL_TEST_H
#define APT_MODEL_TEST_H

/* ---- configurations ---- */

/* A small encoder; tests change single fields. heads * head_dim need not be hidden. */
static inline apt_config test_config(apt_family family, apt_task_kind task)
{
    apt_config c = APT_ZERO;
    c.family = family;
    c.task = task;
    c.vocab = 37;
    c.positions = 24;
    c.types = 2;
    c.hidden = 16;
    c.head_dim = 4;
    c.layers = 2;
    c.heads = 4;
    c.neurons = 24;
    c.labels = 3;
    c.pad_id = family == APT_ROBERTA ? 1 : 0;
    c.init_range = 0.25f;
    return c;
}

/* Small models of the other families: T5 v1.0 and v1.1, LLaMA with and without its own head, a block with biases. */
enum { TEST_DECODERS = 5 };
static inline apt_config test_decoder(int32_t which)
{
    apt_config c = test_config(which < 2 ? APT_T5 : APT_LLAMA, APT_TASK_LM);
    c.types = 0;
    c.labels = 0;
    if (which < 2) {                                                  /* two encoder layers, two decoder layers */
        c.layers = 2 + 2 * 2;
        c.decoder_layers = 2;
        c.buckets = 8;
        c.max_distance = 6;
        c.gated = which;
        c.untied = which;
        c.scaled_head = !which;
        c.start_id = 3;
        return c;
    }
    c.kv_heads = which == 3 ? 0 : 2;
    c.untied = which == 2;
    c.qkv_bias = which == 4;
    if (which == 4) c.head_dim = 6;                                   /* heads * head_dim is not hidden */
    if (which != 3) return c;
    c.rope.interleaved = 1;
    c.rope.theta = 100;
    c.rope.factor = 4;
    c.rope.low_factor = 1;
    c.rope.high_factor = 4;
    c.rope.original_positions = 24;
    return c;
}

/* Every value random, so that no bias, norm or adapter is invisible. */
static inline void test_randomise(apt_model *model, uint64_t seed)
{
    apt_rng rng = apt_rng_make(seed, 99);
    for (int32_t i = 0; i < apt_model_parameters(model); i++) {
        apt_parameter p;
        assert_int_equal(apt_model_parameter(model, i, &p), APT_OK);
        const int64_t n = p.rows * p.cols;
        float *v = (float *)test_memory_block((size_t)n * sizeof(float));
        const bool norm = strstr(p.name, "Norm.weight") != NULL || strstr(p.name, "norm.weight") != NULL;
        for (int64_t j = 0; j < n; j++) v[j] = (norm ? 1.0f : 0.0f) + 0.25f * apt_rng_normal(&rng);
        assert_int_equal(apt_model_set(model, p.name, v, n), APT_OK);
        free(v);
    }
}

/* ---- batches ---- */

#define TEST_SEQUENCES 64
#define TEST_TOKENS 4096
typedef struct test_batch {
    apt_batch b;
    int32_t offsets[TEST_SEQUENCES + 1], tokens[TEST_TOKENS], types[TEST_TOKENS], labels[TEST_TOKENS];
    int32_t target_offsets[TEST_SEQUENCES + 1];
    float targets[TEST_SEQUENCES];
} test_batch;

/* A decoder alone learns its own text but for a prompt of one or two tokens; behind an encoder it learns to copy the source in
   reverse, with a length of its own. */
static inline void test_batch_lm(test_batch *t, const apt_config *c, apt_rng *rng)
{
    int32_t n = 0;
    if (c->decoder_layers == 0) {
        for (int32_t s = 0; s < t->b.sequences; s++)
            for (int32_t i = t->offsets[s]; i < t->offsets[s + 1]; i++) t->labels[i] = i < t->offsets[s] + 1 + s % 2 ? -100 : t->tokens[i];
        return;
    }
    t->target_offsets[0] = 0;
    for (int32_t s = 0; s < t->b.sequences; s++) {
        const int32_t length = t->offsets[s + 1] - t->offsets[s], target = 1 + (int32_t)apt_rng_below(rng, (uint32_t)length + 2);
        for (int32_t i = 0; i < target; i++, n++) t->labels[n] = i == 2 ? -100 : t->tokens[t->offsets[s + 1] - 1 - i % length];
        t->target_offsets[s + 1] = n;
    }
    t->b.target_offsets = t->target_offsets;
}

/* Random tokens with labels that can be learned: CLASSIFY counts small ids, REGRESS is their share, SPAN marks the largest id. */
static inline void test_batch_fill(test_batch *t, const apt_config *c, apt_rng *rng, int32_t sequences, int32_t shortest, int32_t longest)
{
    int32_t n = 0;
    memset(&t->b, 0, sizeof t->b);
    assert_true(sequences <= TEST_SEQUENCES && sequences * longest <= TEST_TOKENS);
    for (int32_t s = 0; s < sequences; s++) {
        const int32_t length = shortest + (int32_t)apt_rng_below(rng, (uint32_t)(longest - shortest + 1)), first = n;
        int32_t low = 0, top = 0;
        t->offsets[s] = n;
        for (int32_t i = 0; i < length; i++, n++) {
            t->tokens[n] = (int32_t)apt_rng_below(rng, (uint32_t)c->vocab);
            t->types[n] = i > length / 2 ? c->types - 1 : 0;
            low += t->tokens[n] < c->vocab / 2;
            if (t->tokens[n] > t->tokens[first + top]) top = i;
            if (c->task == APT_TASK_MLM) t->labels[n] = apt_rng_below(rng, 3) == 0 ? t->tokens[n] : -100;
        }
        if (c->task == APT_TASK_CLASSIFY) t->labels[s] = low * c->labels / (length + 1);
        if (c->task == APT_TASK_SPAN) {
            t->labels[2 * s] = top;
            t->labels[2 * s + 1] = top + (int32_t)apt_rng_below(rng, (uint32_t)(length - top));
        }
        t->targets[s] = (float)low / (float)length;
    }
    t->offsets[sequences] = n;
    t->b.sequences = sequences;
    t->b.offsets = t->offsets;
    t->b.tokens = t->tokens;
    t->b.types = t->types;
    if (c->task == APT_TASK_REGRESS) t->b.targets = t->targets;
    else t->b.labels = t->labels;
    if (c->task != APT_TASK_LM) return;
    t->b.types = NULL;
    test_batch_lm(t, c, rng);
}

/* Batch number `index` of a stream: the same for the same (seed, index). */
static inline void test_batch_at(test_batch *t, const apt_config *c, uint64_t seed, int64_t index, int32_t sequences)
{
    apt_rng rng = apt_rng_make(seed, 1000 + (uint64_t)index);
    test_batch_fill(t, c, &rng, sequences, 3, 9);
}

/* ---- reading a whole model ---- */

/* Logits of a batch in malloc'ed memory; hidden may be NULL. */
static inline float *test_logits(apt_model *model, const apt_batch *batch, int64_t *count, float *hidden, int64_t hidden_capacity)
{
    apt_output out = APT_ZERO;
    apt_result r = apt_model_forward(model, batch, &out);
    if (r != APT_OK) fail_msg("forward: %s (%s)", apt_result_text(r), apt_error(model->ctx));
    float *logits = (float *)test_memory_block((size_t)out.logits_count * sizeof(float));
    *count = out.logits_count;
    out.logits = logits;
    out.logits_capacity = out.logits_count;
    out.hidden = hidden;
    out.hidden_capacity = hidden_capacity;
    r = apt_model_forward(model, batch, &out);
    if (r != APT_OK) fail_msg("forward: %s (%s)", apt_result_text(r), apt_error(model->ctx));
    return logits;
}

/* Checksum over names, shapes, values, and masks: two models with the same one are the same bit for bit. */
static inline uint64_t test_model_sum(const apt_model *model)
{
    uint64_t sum = 0;
    for (int32_t i = 0; i < apt_model_parameters(model); i++) {
        apt_parameter p;
        assert_int_equal(apt_model_parameter(model, i, &p), APT_OK);
        const int64_t n = p.rows * p.cols;
        float *v = (float *)test_memory_block((size_t)n * sizeof(float));
        assert_int_equal(apt_model_get(model, p.name, v, n), APT_OK);
        sum = test_hash(sum, p.name, strlen(p.name));
        sum = test_hash(sum, &p.rows, sizeof p.rows);
        sum = test_hash(sum, v, (size_t)n * sizeof(float));
        free(v);
    }
    apt_units u;
    apt_model_units(model, &u);
    float *masks = (float *)test_memory_block((size_t)u.total * sizeof(float));
    assert_int_equal(apt_model_get_masks(model, masks, u.total), APT_OK);
    sum = test_hash(sum, masks, (size_t)u.total * sizeof(float));
    free(masks);
    return sum;
}

/* One parameter in malloc'ed memory. */
static inline float *test_parameter(const apt_model *model, const char *name, int64_t *count)
{
    const apti_param *p = apti_param_find(model, name);
    if (p == NULL) fail_msg("no parameter %s", name);
    const int64_t n = p->rows * p->cols;
    float *v = (float *)test_memory_block((size_t)n * sizeof(float));
    assert_int_equal(apt_model_get(model, name, v, n), APT_OK);
    if (count != NULL) *count = n;
    return v;
}

/* A trainer whose failure ends the test. */
static inline apt_trainer *test_trainer(apt_model *model, const apt_train_desc *desc)
{
    apt_trainer *t = NULL;
    const apt_result r = apt_trainer_create(model, desc, &t);
    if (r != APT_OK) fail_msg("apt_trainer_create: %s (%s)", apt_result_text(r), apt_error(model->ctx));
    return t;
}

static inline apt_model *test_model(apt_ctx *ctx, const apt_config *config, uint64_t seed)
{
    apt_model *m = NULL;
    const apt_result r = apt_model_create(ctx, config, seed, &m);
    if (r != APT_OK) fail_msg("apt_model_create: %s (%s)", apt_result_text(r), apt_error(ctx));
    return m;
}

/* All that adapters can sit on, as apt_train_desc.adapt. */
static inline int32_t test_adaptable(const apt_config *c)
{
    return 63 | (c->gated || c->family == APT_LLAMA ? APT_ADAPT_GATE : 0) | (c->task == APT_TASK_LM ? APT_ADAPT_HEAD : 0);
}

/* Adapters of rank `rank` on every linear map and the LM head with random A and B, no trainer left. */
static inline void test_add_adapters(apt_model *model, int32_t rank, uint64_t seed)
{
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_LORA;
    d.steps = 1;
    d.rank = rank;
    d.adapt = test_adaptable(&model->config);
    apt_trainer *t = test_trainer(model, &d);
    apt_trainer_destroy(t);
    test_randomise(model, seed);
}

#endif /* APT_MODEL_TEST_H */
