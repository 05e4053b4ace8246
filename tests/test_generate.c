/* Generation: the same tokens with and without a cache, against plain argmax over apt_model_forward, against exhaustive search;
   seeds, limits, callbacks, pruned shapes, memory that runs out.
   build: cc -std=c11 -O2 tests/test_generate.c -o test_generate -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"

enum { SEQUENCES = 5, NEW = 9 };

typedef struct texts { int32_t tokens[SEQUENCES * NEW], lengths[SEQUENCES]; } texts;

static texts generate(apt_model *m, const apt_batch *b, const apt_generate_desc *d)
{
    texts t;
    memset(&t, 0xff, sizeof t);
    assert_true(b->sequences <= SEQUENCES && d->max_tokens <= NEW);
    const apt_result r = apt_generate(m, b, d, t.tokens, t.lengths);
    if (r != APT_OK) fail_msg("apt_generate: %s (%s)", apt_result_text(r), apt_error(m->ctx));
    for (int32_t s = 0; s < b->sequences; s++) {
        assert_true(t.lengths[s] >= 1 && t.lengths[s] <= d->max_tokens);
        for (int32_t i = 0; i < t.lengths[s]; i++) assert_true(t.tokens[s * d->max_tokens + i] >= 0 && t.tokens[s * d->max_tokens + i] < m->config.vocab);
    }
    return t;
}

static void assert_same_texts(const texts *a, const texts *b, const apt_batch *batch, int32_t most, const char *what)
{
    for (int32_t s = 0; s < batch->sequences; s++) {
        if (a->lengths[s] != b->lengths[s]) fail_msg("%s: sequence %d has %d tokens, expected %d", what, s, b->lengths[s], a->lengths[s]);
        for (int32_t i = 0; i < a->lengths[s]; i++)
            if (a->tokens[s * most + i] != b->tokens[s * most + i])
                fail_msg("%s: sequence %d token %d is %d, expected %d", what, s, i, b->tokens[s * most + i], a->tokens[s * most + i]);
    }
}

/* A model with adapters, the LM head's too; style 1: masks, 2: compacted, 3: compacted with whole sublayers gone, 4: compacted and
   merged, which gives tied heads a matrix of their own. */
enum { STYLES = 5 };
static apt_model *decoder_model(apt_ctx *ctx, int32_t which, int32_t style, uint64_t seed)
{
    apt_config c = test_decoder(which);
    c.end_id = 2;
    c.positions = 40;
    apt_model *m = test_model(ctx, &c, seed);
    test_add_adapters(m, 2, seed);
    apt_units u;
    apt_model_units(m, &u);
    float *mask = (float *)test_memory_block((size_t)u.total * sizeof(float));
    for (int32_t i = 0; i < u.total; i++) mask[i] = style > 0 && i % 3 == 1 ? 0.0f : style == 1 && i % 5 == 0 ? 0.4f : 1.0f;
    if (style == 3) {
        const int32_t l = m->config.layers - 1;
        memset(mask + apti_unit_head(m, l), 0, (size_t)m->shape[l].kv_heads * sizeof(float));
    }
    assert_ok(ctx, apt_model_set_masks(m, mask, u.total));
    free(mask);
    if (style >= 2) assert_ok(ctx, apt_model_compact(m));
    if (style == 4) assert_ok(ctx, apt_model_merge(m, NULL, NULL));
    return m;
}

/* The next token by apt_model_forward over the whole text of one sequence. */
static int32_t likeliest(apt_model *m, const apt_batch *b, int32_t s, const int32_t *made, int32_t n)
{
    int32_t offsets[2] = {0, b->offsets[s + 1] - b->offsets[s]}, target[2] = {0, n + 1}, text[64], start[NEW + 1];
    apt_batch one = APT_ZERO;
    memcpy(text, b->tokens + b->offsets[s], (size_t)offsets[1] * sizeof(int32_t));
    one.sequences = 1;
    one.offsets = offsets;
    one.tokens = text;
    if (m->config.decoder_layers > 0) {
        start[0] = m->config.start_id;
        memcpy(start + 1, made, (size_t)n * sizeof(int32_t));
        one.target_offsets = target;
        one.target_tokens = start;
    } else {
        memcpy(text + offsets[1], made, (size_t)n * sizeof(int32_t));
        offsets[1] += n;
    }
    int64_t count = 0;
    float *logits = test_logits(m, &one, &count, NULL, 0), *last = logits + count - m->config.vocab;
    int32_t best = 0;
    for (int32_t i = 1; i < m->config.vocab; i++)
        if (last[i] > last[best]) best = i;
    free(logits);
    return best;
}

static void prompts(test_batch *t, const apt_model *m, uint64_t seed)
{
    apt_rng rng = apt_rng_make(seed, 4);
    test_batch_fill(t, &m->config, &rng, SEQUENCES, 1, 9);
    t->b.labels = NULL;
    t->b.target_offsets = NULL;
}

static void test_greedy(void **state)
{
    (void)state;
    test_log messages;
    int32_t ended = 0;
    for (int32_t i = 0; i < STYLES * TEST_DECODERS; i++) {
        apt_ctx *ctx = test_context(1 + i % 3, &messages);
        apt_model *m = decoder_model(ctx, i % TEST_DECODERS, i / TEST_DECODERS, 60 + (uint64_t)i);
        test_batch b;
        prompts(&b, m, (uint64_t)i);
        apt_generate_desc d = APT_ZERO;
        d.max_tokens = NEW;
        d.ignore_end = 1;
        m->config.end_id = generate(m, &b.b, &d).tokens[3];           /* a token that comes */
        d.ignore_end = i % 4 == 3;
        const texts t = generate(m, &b.b, &d);
        for (int32_t s = 0; s < SEQUENCES; s++) {
            for (int32_t k = 0; k < t.lengths[s]; k++)
                if (t.tokens[s * NEW + k] != likeliest(m, &b.b, s, t.tokens + s * NEW, k))
                    fail_msg("decoder %d: sequence %d token %d is not the likeliest", i % TEST_DECODERS, s, k);
            const bool end = t.tokens[s * NEW + t.lengths[s] - 1] == m->config.end_id && !d.ignore_end;
            assert_true(end || t.lengths[s] == NEW);
            ended += end;
        }
        d.disable_cache = 1;
        const texts plain = generate(m, &b.b, &d);
        assert_same_texts(&t, &plain, &b.b, NEW, "without a cache");
        apt_destroy(ctx);
    }
    assert_true(ended > 3);                                           /* or the end token was never tried */
}

/* Drawn tokens and beams: with a cache and without, alone and in a batch, twice, for any number of threads. */
static void test_drawn_and_beams(void **state)
{
    (void)state;
    test_log messages;
    for (int32_t i = 0; i < 6 * TEST_DECODERS; i++) {
        texts first;
        for (int32_t way = 0; way < 4; way++) {
            apt_ctx *ctx = test_context(way == 1 ? 4 : 1, &messages);
            apt_model *m = decoder_model(ctx, i % TEST_DECODERS, i / TEST_DECODERS % STYLES, 90 + (uint64_t)i);
            test_batch b;
            prompts(&b, m, (uint64_t)i);
            apt_generate_desc d = APT_ZERO;
            d.max_tokens = NEW;
            d.seed = 5;
            if (i % 3 < 2) d.temperature = 0.8f;
            else d.beams = 3;
            if (i % 3 == 1) d.top_k = 5;
            if (i % 2) d.top_p = 0.9f;
            if (d.beams > 0) d.length_penalty = 0.5f * (float)(i % 4);
            d.disable_cache = way == 2;
            const texts t = generate(m, &b.b, &d);
            if (way == 0) first = t;
            assert_same_texts(&first, &t, &b.b, NEW, way == 1 ? "threads" : "without a cache");
            if (way == 3) {                                           /* the first sequence alone */
                texts alone;
                b.b.sequences = 1;
                alone = generate(m, &b.b, &d);
                assert_same_texts(&first, &alone, &b.b, NEW, "alone");
            }
            apt_destroy(ctx);
        }
    }
}

/* Drawn tokens follow the probabilities, and only the allowed ones come. */
static void test_distribution(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *m = decoder_model(ctx, 2, 0, 7);
    const int32_t vocab = m->config.vocab, offsets[2] = {0, 3}, tokens[3] = {4, 9, 1};
    apt_batch b = APT_ZERO;
    b.sequences = 1;
    b.offsets = offsets;
    b.tokens = tokens;
    int64_t n = 0;
    float *logits = test_logits(m, &b, &n, NULL, 0), *x = logits + 2 * vocab;
    enum { DRAWS = 3000, VOCAB = 37 };
    for (int32_t kind = 0; kind < 3; kind++) {
        apt_generate_desc d = APT_ZERO;
        double p[VOCAB], sum = 0, seen[VOCAB] = {0};
        d.max_tokens = 1;
        d.temperature = 1.5f;
        d.top_k = kind == 1 ? 4 : 0;
        d.top_p = kind == 2 ? 0.5f : 0;
        for (int32_t i = 0; i < vocab; i++) sum += p[i] = exp((double)x[i] / 1.5);
        double kept = 0;
        for (int32_t i = 0; i < vocab; i++) {                         /* out go those that too many or too much stands above */
            double above = 0;
            int32_t rank = 0;
            for (int32_t j = 0; j < vocab; j++)
                if (x[j] > x[i] || (x[j] == x[i] && j < i)) {
                    above += exp((double)x[j] / 1.5);
                    rank++;
                }
            if ((kind == 1 && rank >= 4) || (kind == 2 && above >= 0.5 * sum)) p[i] = 0;
            kept += p[i];
        }
        for (int32_t i = 0; i < DRAWS; i++) {
            int32_t token = -1, length = 0;
            d.seed = 1000 + (uint64_t)i;
            assert_ok(ctx, apt_generate(m, &b, &d, &token, &length));
            seen[token]++;
        }
        for (int32_t i = 0; i < vocab; i++) {
            const double want = p[i] / kept * DRAWS;
            if (want == 0) assert_true(seen[i] == 0);
            if (fabs(seen[i] - want) > 5 * sqrt(want + 1)) fail_msg("kind %d: token %d came %g times, expected %g", kind, i, seen[i], want);
        }
    }
    free(logits);
    apt_destroy(ctx);
}

/* log probability of every text of two tokens over a small vocabulary: with beams enough the search is exhaustive. */
static void test_beams_exhaustive(void **state)
{
    (void)state;
    test_log messages;
    enum { V = 5 };
    for (int32_t i = 0; i < 3 * TEST_DECODERS; i++) {
        apt_ctx *ctx = test_context(1, &messages);
        apt_config c = test_decoder(i % TEST_DECODERS);
        c.vocab = V;
        c.end_id = 2;
        apt_model *m = test_model(ctx, &c, 30 + (uint64_t)i);
        test_randomise(m, 30 + (uint64_t)i);
        const float penalty = i % 2 ? 1.0f : 0.0f;
        const int32_t offsets[2] = {0, 3}, source[3] = {4, 0, 1};
        double best = -1e30;
        int32_t want[2] = {-1, -1};
        for (int32_t a = 0; a < V; a++)
            for (int32_t e = 0; e < (a == 2 ? 1 : V); e++) {
                int32_t text[6] = {4, 0, 1, a, e, 0}, behind[4] = {c.start_id, a, e, 0}, whole[2] = {0, 5}, target[2] = {0, 2};
                apt_batch b = APT_ZERO;
                b.sequences = 1;
                b.offsets = c.decoder_layers > 0 ? offsets : whole;
                b.tokens = text;
                b.target_offsets = target;
                b.target_tokens = behind;
                int64_t n = 0;
                float *logits = test_logits(m, &b, &n, NULL, 0);
                double p = 0;
                for (int32_t k = 0; k < (a == 2 ? 1 : 2); k++) {
                    const float *x = logits + (c.decoder_layers > 0 ? k : 2 + k) * V;
                    double sum = 0;
                    for (int32_t j = 0; j < V; j++) sum += exp((double)x[j]);
                    p += (double)x[k == 0 ? a : e] - log(sum);
                }
                if (penalty > 0 && a != 2) p /= 2;
                if (p > best) {
                    best = p;
                    want[0] = a;
                    want[1] = a == 2 ? -1 : e;
                }
                free(logits);
            }
        apt_batch b = APT_ZERO;
        b.sequences = 1;
        b.offsets = offsets;
        b.tokens = source;
        apt_generate_desc d = APT_ZERO;
        d.max_tokens = 2;
        d.beams = V * V;
        d.length_penalty = penalty;
        const texts t = generate(m, &b, &d);
        assert_int_equal(t.tokens[0], want[0]);
        assert_int_equal(t.lengths[0], want[1] < 0 ? 1 : 2);
        if (want[1] >= 0) assert_int_equal(t.tokens[1], want[1]);
        apt_destroy(ctx);
    }
}

typedef struct heard { int32_t token[SEQUENCES][NEW], count[SEQUENCES], stop; } heard;

static int on_token(int32_t sequence, int32_t token, void *user)
{
    heard *h = (heard *)user;
    h->token[sequence][h->count[sequence]++] = token;
    return sequence == h->stop && h->count[sequence] == 2;
}

static void test_callback(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *m = decoder_model(ctx, 0, 0, 3);
    test_batch b;
    prompts(&b, m, 1);
    heard h;
    memset(&h, 0, sizeof h);
    h.stop = 3;
    apt_generate_desc d = APT_ZERO;
    d.max_tokens = NEW;
    d.ignore_end = 1;
    d.on_token = on_token;
    d.user = &h;
    const texts t = generate(m, &b.b, &d);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        assert_int_equal(t.lengths[s], s == 3 ? 2 : NEW);
        assert_int_equal(h.count[s], t.lengths[s]);
        assert_memory_equal(h.token[s], t.tokens + s * NEW, (size_t)t.lengths[s] * sizeof(int32_t));
    }
    apt_destroy(ctx);
}

static void test_refused(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *m = decoder_model(ctx, 2, 0, 3);
    test_batch b;
    prompts(&b, m, 1);
    texts t;
    apt_generate_desc d = APT_ZERO;
    assert_result(apt_generate(m, &b.b, &d, t.tokens, t.lengths), APT_E_RANGE);           /* max_tokens is required */
    d.max_tokens = 100;
    assert_result(apt_generate(m, &b.b, &d, t.tokens, t.lengths), APT_E_RANGE);           /* more than the model has positions */
    d.max_tokens = 4;
    assert_result(apt_generate(m, NULL, &d, t.tokens, t.lengths), APT_E_ARGUMENT);
    assert_result(apt_generate(m, &b.b, NULL, t.tokens, t.lengths), APT_E_ARGUMENT);
    assert_result(apt_generate(m, &b.b, &d, NULL, t.lengths), APT_E_ARGUMENT);
    assert_result(apt_generate(NULL, &b.b, &d, t.tokens, t.lengths), APT_E_ARGUMENT);
    apt_generate_desc bad = d;
    bad.end_canary = 1;
    assert_result(apt_generate(m, &b.b, &bad, t.tokens, t.lengths), APT_E_ARGUMENT);
    bad = d;
    bad.temperature = -1;
    assert_result(apt_generate(m, &b.b, &bad, t.tokens, t.lengths), APT_E_RANGE);
    bad.temperature = apti_float(0x7fc00000u);
    assert_result(apt_generate(m, &b.b, &bad, t.tokens, t.lengths), APT_E_RANGE);
    bad = d;
    bad.top_p = 1.5f;
    assert_result(apt_generate(m, &b.b, &bad, t.tokens, t.lengths), APT_E_RANGE);
    bad = d;
    bad.beams = 2;
    bad.temperature = 1;
    assert_result(apt_generate(m, &b.b, &bad, t.tokens, t.lengths), APT_E_ARGUMENT);
    const int32_t token = b.tokens[0];
    b.tokens[0] = m->config.vocab;
    assert_result(apt_generate(m, &b.b, &d, t.tokens, t.lengths), APT_E_RANGE);
    b.tokens[0] = token;
    apt_config c = test_config(APT_BERT, APT_TASK_MLM);
    apt_model *bert = test_model(ctx, &c, 1);
    assert_result(apt_generate(bert, &b.b, &d, t.tokens, t.lengths), APT_E_STATE);
    (void)generate(m, &b.b, &d);                                       /* after all that it works */
    apt_destroy(ctx);
}

/* Each allocation of a generation fails once; the model then generates as before. */
static apt_result attempt(apt_ctx *ctx, void *user)
{
    const int32_t which = *(const int32_t *)user;
    apt_config c = test_decoder(which % TEST_DECODERS);
    apt_model *m = NULL;
    apt_result r = apt_model_create(ctx, &c, 3, &m);
    if (r != APT_OK) return r;
    const int32_t offsets[3] = {0, 2, 5}, source[5] = {4, 0, 1, 7, 3};
    int32_t tokens[8], lengths[2];
    apt_batch b = APT_ZERO;
    b.sequences = 2;
    b.offsets = offsets;
    b.tokens = source;
    apt_generate_desc d = APT_ZERO;
    d.max_tokens = 4;
    d.beams = which >= TEST_DECODERS ? 2 : 0;
    r = apt_generate(m, &b, &d, tokens, lengths);
    if (r != APT_OK && apt_generate(m, &b, &d, tokens, lengths) != APT_OK) return APT_E_STATE;
    return r;
}

static void test_memory_runs_out(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 2 * TEST_DECODERS; i++) assert_true(test_every_allocation(attempt, &i) > 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),   cmocka_unit_test(test_drawn_and_beams), cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_callback), cmocka_unit_test(test_beams_exhaustive), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_memory_runs_out),
    };
    return cmocka_run_group_tests_name("generate", tests, NULL, NULL);
}
