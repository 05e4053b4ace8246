/* The structure of a model: masks against compaction, merging, growth, parameter access, and every gradient of a whole model
   against finite differences.
   build: cc -std=c11 -O2 tests/test_structure.c -o test_structure -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"

/* ---- shapes ------------------------------------------------------------------------------------------------------- */

static const apt_layer_shape g_grouped[2] = {{6, 2, 10}, {4, 4, 7}};           /* grouped queries; layers of different shape */
static const apt_layer_shape g_uneven[3] = {{1, 1, 1}, {5, 5, 33}, {2, 2, 16}};

static apt_config shape_config(int32_t which, apt_family family, apt_task_kind task)
{
    apt_config c = test_config(family, task);
    c.activation = (apt_activation)(which % 3);
    switch (which) {
    case 0: break;
    case 1: c.hidden = 24; c.head_dim = 8; c.heads = 3; c.neurons = 13; c.layers = 3; break;
    case 2: c.hidden = 17; c.head_dim = 5; c.layer = g_grouped; break;
    case 3: c.hidden = 40; c.head_dim = 4; c.layers = 3; c.layer = g_uneven; break;
    case 4: c.hidden = 64; c.head_dim = 16; c.heads = 4; c.neurons = 96; c.layers = 1; break;
    default: c.hidden = 330; c.head_dim = 64; c.heads = 5; c.neurons = 1101; break;      /* longer than a block of any kernel */
    }
    return c;
}
enum { SHAPES = 5, LARGE = 5 };

/* ---- masks: which units stay -------------------------------------------------------------------------------------- */

typedef struct mask_set { float *mask; apt_units units; } mask_set;

static void keep_one(float *mask, int32_t n, apt_rng *rng)
{
    for (int32_t i = 0; i < n; i++) mask[i] = 0;
    if (n > 0) mask[apt_rng_below(rng, (uint32_t)n)] = 1;
}

/* Each unit of [mask, mask + n) stays with probability p; at least one does. */
static void keep_some(float *mask, int32_t n, double p, apt_rng *rng)
{
    int32_t left = 0;
    for (int32_t i = 0; i < n; i++) left += (mask[i] = apt_rng_uniform(rng) < p ? 1.0f : 0.0f) > 0;
    if (left == 0) keep_one(mask, n, rng);
}

enum { STYLES = 9 };

/* style 0..8: how much goes, and what goes to its last survivor; 8: everything does. */
static mask_set make_masks(const apt_model *m, int32_t style, apt_rng *rng)
{
    static const double keep[STYLES] = {0.5, 0.8, 0.3, 0.5, 0.5, 0.5, 0.9, 0.15, 0.5};
    mask_set s;
    apt_model_units(m, &s.units);
    s.mask = (float *)test_memory_block((size_t)s.units.total * sizeof(float));
    apt_config c;
    apt_model_config(m, &c);
    float *at = s.mask;
    for (int32_t l = 0; l < c.layers; l++) {
        const int32_t g = c.layer[l].kv_heads, f = c.layer[l].neurons;
        keep_some(at, g, keep[style], rng);
        keep_some(at + g, f, keep[style], rng);
        if (style == 3 || style == 8) keep_one(at, g, rng);
        if (style == 4 || style == 8) keep_one(at + g, f, rng);
        if (style == 6 && l == c.layers - 1) memset(at, 0, (size_t)g * sizeof(float));          /* whole sublayers go */
        if (style == 7 && l == 0) memset(at + g, 0, (size_t)f * sizeof(float));
        at += g + f;
    }
    keep_some(at, c.hidden, style == 3 || style == 4 ? 1.0 : keep[style], rng);
    if (style == 5 || style == 8) keep_one(at, c.hidden, rng);
    return s;
}

/* Largest |a - b| over the largest |b|, where b(i) is compared with a at the i-th place whose mask is 1. */
static double difference_kept(const float *whole, int64_t rows, int64_t d, const float *mask, const float *small)
{
    double worst = 0, top = 0;
    int64_t at = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d; i++) {
            const double x = (double)whole[r * d + i];
            if (mask != NULL && mask[i] == 0) {
                assert_true(x == 0);
                continue;
            }
            const double y = (double)small[at++];
            if (!test_finite((float)x) || !test_finite((float)y)) return 1e30;
            worst = fmax(worst, fabs(x - y));
            top = fmax(top, fabs(y));
        }
    return worst == 0 ? 0 : worst / top;
}

/* ---- masked model against its compacted copy ---------------------------------------------------------------------- */

typedef struct compact_case { apt_config c; int32_t style; bool adapters, narrow; uint64_t seed; } compact_case;

/* Returns the relative difference of logits and hidden states. */
static double compare_compacted(apt_ctx *ctx, const compact_case *k)
{
    apt_model *m = NULL;
    apt_config c = k->c;
    if (c.head_dim == 0) c.head_dim = c.hidden / c.heads;
    assert_ok(ctx, apti_model_build(ctx, &c, k->seed, !k->narrow ? APT_F32 : k->seed % 2 == 0 ? APT_BF16 : APT_F16, &m));
    apt_rng rng = apt_rng_make(k->seed, 1);
    test_randomise(m, k->seed);
    if (k->adapters) test_add_adapters(m, 3, k->seed);
    test_batch t;
    test_batch_fill(&t, &c, &rng, 4, 1, 7);
    const mask_set s = make_masks(m, k->style, &rng);
    assert_ok(ctx, apt_model_set_masks(m, s.mask, s.units.total));
    const int64_t rows = c.decoder_layers > 0 ? t.target_offsets[4] : t.offsets[4], d = c.hidden;
    float *hidden = (float *)test_memory_block((size_t)(rows * d) * sizeof(float));
    float *after = (float *)test_memory_block((size_t)(rows * d) * sizeof(float));
    int64_t n = 0, n2 = 0;
    float *before = test_logits(m, &t.b, &n, hidden, rows * d);
    assert_ok(ctx, apt_model_compact(m));
    float *logits = test_logits(m, &t.b, &n2, after, rows * d);
    apt_units left;
    apt_model_units(m, &left);
    assert_true(n == n2 && left.total < s.units.total);
    for (n2 = 0; n2 < n && before[n2] == 0; n2++) {}
    assert_true(n2 < n);                                              /* not zeros against zeros */
    const float *mask_hidden = s.mask + s.units.heads + s.units.neurons;
    const double e1 = difference_kept(before, 1, n, NULL, logits), e2 = difference_kept(hidden, rows, d, mask_hidden, after);
    free(hidden);
    free(after);
    free(before);
    free(logits);
    free(s.mask);
    apt_model_destroy(m);
    return fmax(e1, e2);
}

static void test_masked_is_compacted(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    double worst = 0;
    int32_t sets = 0;
    for (int32_t i = 0; i < 369; i++) {
        compact_case k;
        k.c = shape_config(i < 360 ? i % SHAPES : LARGE, i / 2 % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i / 4 % 4));
        k.style = i < 360 ? i / 5 % STYLES : i % STYLES;
        k.adapters = i % 2 == 0;
        k.narrow = i % 7 == 0;
        k.seed = 1000 + (uint64_t)i;
        const double e = compare_compacted(ctx, &k);
        if (!(e <= 1e-5))
            fail_msg("set %d (shape %d, family %d, task %d, style %d, adapters %d, bf16 %d): masked and compacted differ by %g", i, i % SHAPES,
                     (int)k.c.family, (int)k.c.task, k.style, k.adapters, k.narrow, e);
        worst = fmax(worst, e);
        sets++;
    }
    print_message("    %d mask sets, worst relative difference %.2g\n", sets, worst);
    apt_destroy(ctx);
}

/* Which attention a layer has: 0 of an encoder or alone, 1 of a decoder behind an encoder, 2 across both. */
static int32_t attention_kind(const apt_config *c, int32_t l)
{
    return l < apti_first_stack(c) ? 0 : apti_is_cross(c, l) ? 2 : 1;
}

static void test_masked_decoders(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    double worst[2] = {0, 0};
    int32_t cut[2][3] = {{0, 0, 0}, {0, 0, 0}}, groups = 0;           /* sets that remove heads of each attention, of grouped queries */
    for (int32_t i = 0; i < 420; i++) {                               /* 210 of T5, 210 of LLaMA */
        compact_case k;
        const int32_t t5 = i % 2;
        k.c = test_decoder(t5 ? i / 2 % 2 : 2 + i / 2 % 3);
        if (i / 6 % 3 == 1) {
            k.c.hidden = 40;
            k.c.neurons = 70;
        }
        k.style = i / 4 % 8;
        k.adapters = i % 3 == 0;
        k.narrow = i % 7 == 0;
        k.seed = 3000 + (uint64_t)i;
        const double e = compare_compacted(ctx, &k);
        if (!(e <= 1e-5))
            fail_msg("set %d (family %d, style %d, adapters %d, bf16 %d): masked and compacted differ by %g", i, (int)k.c.family, k.style,
                     k.adapters, k.narrow, e);
        worst[t5] = fmax(worst[t5], e);
        apt_rng rng = apt_rng_make(k.seed, 1);                        /* the same masks once more, to see what they took */
        apt_model *m = test_model(ctx, &k.c, k.seed);
        test_batch b;
        test_batch_fill(&b, &k.c, &rng, 4, 1, 7);
        const mask_set s = make_masks(m, k.style, &rng);
        bool seen[3] = {false, false, false};
        for (int32_t l = 0; l < m->config.layers; l++)
            for (int32_t h = 0; h < m->shape[l].kv_heads; h++)
                if (s.mask[apti_unit_head(m, l) + h] == 0) seen[attention_kind(&m->config, l)] = true;
        for (int32_t a = 0; a < 3; a++) cut[t5][a] += seen[a];
        groups += seen[0] && m->shape[0].kv_heads < m->shape[0].heads;
        free(s.mask);
        apt_model_destroy(m);
    }
    for (int32_t a = 0; a < 3; a++) assert_true(cut[1][a] > 100);
    assert_true(cut[0][0] > 100 && groups > 70);
    print_message("    210 mask sets each, worst relative difference T5 %.2g, LLaMA %.2g\n", worst[1], worst[0]);
    apt_destroy(ctx);
}

/* ---- what compaction does to each parameter ----------------------------------------------------------------------- */

/* What rows and columns of a parameter follow, by its name: H hidden, Q query heads, K key and value heads, N neurons, '-' nothing.
   First match counts; written down here a second time on purpose. */
typedef struct axes_row { const char *end; char row, col; } axes_row;
static const axes_row g_axes[] = {
    {"self.query.weight", 'Q', 'H'}, {"self.query.bias", '-', 'Q'}, {"self.key.weight", 'K', 'H'}, {"self.key.bias", '-', 'K'},
    {"self.value.weight", 'K', 'H'}, {"self.value.bias", '-', 'K'}, {"attention.output.dense.weight", 'H', 'Q'},
    {"attention.output.dense.bias", '-', 'H'}, {"intermediate.dense.weight", 'N', 'H'}, {"intermediate.dense.bias", '-', 'N'},
    {"output.dense.weight", 'H', 'N'}, {"output.dense.bias", '-', 'H'}, {"embeddings.weight", '-', 'H'}, {"LayerNorm.weight", '-', 'H'},
    {"LayerNorm.bias", '-', 'H'}, {"layer_norm.weight", '-', 'H'}, {"layer_norm.bias", '-', 'H'}, {"pooler.dense.weight", '-', 'H'},
    {"pooler.dense.bias", '-', '-'}, {"classifier.dense.weight", '-', 'H'}, {"classifier.dense.bias", '-', '-'},
    {"classifier.out_proj.weight", '-', '-'}, {"classifier.out_proj.bias", '-', '-'}, {"classifier.weight", '-', '-'},
    {"classifier.bias", '-', '-'}, {"qa_outputs.weight", '-', 'H'}, {"qa_outputs.bias", '-', '-'},
    {"predictions.transform.dense.weight", 'H', 'H'}, {"predictions.transform.dense.bias", '-', 'H'}, {"predictions.bias", '-', '-'},
    {"SelfAttention.relative_attention_bias.weight", '-', '-'}, {"Attention.q.weight", 'Q', 'H'}, {"Attention.k.weight", 'K', 'H'},
    {"Attention.v.weight", 'K', 'H'}, {"Attention.o.weight", 'H', 'Q'}, {"wi.weight", 'N', 'H'}, {"wi_0.weight", 'N', 'H'},
    {"wi_1.weight", 'N', 'H'}, {"wo.weight", 'H', 'N'}, {"shared.weight", '-', 'H'}, {"embed_tokens.weight", '-', 'H'},
    {"norm.weight", '-', 'H'}, {"q_proj.weight", 'Q', 'H'}, {"k_proj.weight", 'K', 'H'}, {"v_proj.weight", 'K', 'H'},
    {"q_proj.bias", '-', 'Q'}, {"k_proj.bias", '-', 'K'}, {"v_proj.bias", '-', 'K'}, {"o_proj.weight", 'H', 'Q'},
    {"gate_proj.weight", 'N', 'H'}, {"up_proj.weight", 'N', 'H'}, {"down_proj.weight", 'H', 'N'}, {"lm_head.weight", '-', 'H'},
    {"lm_head.dense.weight", 'H', 'H'}, {"lm_head.dense.bias", '-', 'H'}, {"lm_head.bias", '-', '-'},
};

static void axes_of(const char *name, char *row, char *col)
{
    char full[160];
    const bool a = strncmp(name, "lora_A.", 7) == 0, b = strncmp(name, "lora_B.", 7) == 0;
    snprintf(full, sizeof full, "%s%s", a || b ? name + 7 : name, a || b ? ".weight" : "");
    for (size_t i = 0; i < sizeof g_axes / sizeof g_axes[0]; i++) {
        const size_t n = strlen(g_axes[i].end), m = strlen(full);
        if (m < n || strcmp(full + m - n, g_axes[i].end) != 0) continue;
        *row = a ? '-' : g_axes[i].row;
        *col = b ? '-' : g_axes[i].col;
        return;
    }
    fail_msg("the test does not know the axes of %s", name);
}

/* For row or column i of a parameter in layer l: does it stay? */
static bool stays(const apt_config *c, const float *mask, char axis, int32_t layer, int64_t i)
{
    const float *at = mask;
    for (int32_t l = 0; l < c->layers; l++) {
        const int32_t g = c->layer[l].kv_heads, f = c->layer[l].neurons;
        if (l == layer && axis == 'K') return at[i / c->head_dim] != 0;
        if (l == layer && axis == 'Q') return at[i / c->head_dim / (c->layer[l].heads / g)] != 0;
        if (l == layer && axis == 'N') return at[g + i] != 0;
        at += g + f;
    }
    return axis == '-' || at[i] != 0;
}

/* A decoder layer of T5 is two of ours: its layer.0, then the rest. */
static int32_t layer_of(const apt_config *c, const char *name)
{
    static const char *const stems[4] = {"encoder.layer.", "model.layers.", "encoder.block.", "decoder.block."};
    for (int32_t i = 0; i < 4; i++) {
        const char *p = strstr(name, stems[i]);
        if (p == NULL || strstr(name, "relative_attention_bias") != NULL) continue;
        const int32_t number = atoi(p + strlen(stems[i]));
        return i < 3 ? number : c->layers - 2 * c->decoder_layers + 2 * number + (strstr(p, ".layer.0.") == NULL);
    }
    return -1;
}

/* Values, gradient and both moments of every parameter before a compaction. */
typedef struct kept_param { char name[112]; int64_t rows, cols; float *part[4]; } kept_param;

static void read_parts(const apt_model *m, const apti_param *p, float **part)
{
    const int64_t n = p->rows * p->cols;
    const float *from[4] = {NULL, p->grad, p->moment1, p->moment2};
    for (int32_t i = 0; i < 4; i++) {
        part[i] = NULL;
        if (i > 0 && from[i] == NULL) continue;
        part[i] = (float *)test_memory_block((size_t)n * sizeof(float));
        if (i == 0) assert_int_equal(apt_model_get(m, p->name, part[0], n), APT_OK);
        else memcpy(part[i], from[i], (size_t)n * sizeof(float));
    }
}

/* Bit for bit: after[k] is before[] without the units that went. Returns how many values were compared. */
static int64_t compare_gathered(const kept_param *b, const apt_config *c, const float *mask, const apti_param *p, float **after)
{
    char row, col;
    int64_t n = 0;
    axes_of(b->name, &row, &col);
    const int32_t l = layer_of(c, b->name);
    for (int32_t k = 0; k < 4; k++) {
        int64_t at = 0;
        assert_true((b->part[k] == NULL) == (after[k] == NULL));
        for (int64_t i = 0; i < b->rows && b->part[k] != NULL; i++)
            for (int64_t j = 0; j < b->cols; j++) {
                if (!stays(c, mask, row, l, i) || !stays(c, mask, col, l, j)) continue;
                assert_true(at < p->rows * p->cols);
                if (memcmp(&after[k][at], &b->part[k][i * b->cols + j], sizeof(float)) != 0)
                    fail_msg("%s[%lld,%lld], part %d: %g became %g", b->name, (long long)i, (long long)j, k, (double)b->part[k][i * b->cols + j],
                             (double)after[k][at]);
                at++;
            }
        if (b->part[k] != NULL) assert_true(at == p->rows * p->cols);
        n += at;
    }
    return n;
}

/* Trains a few steps (so that moments and a gradient exist), masks, compacts and compares all arrays. */
static void compact_trained(apt_config c, apt_method method, int32_t style)
{
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    apt_model *m = test_model(ctx, &c, 5);
    apt_train_desc d = APT_ZERO;
    d.method = method;
    d.steps = 20;
    d.rank = 2;
    d.adapt = test_adaptable(&c);
    d.accumulate = 2;
    d.learning_rate = 1e-3f;
    apt_trainer *t = test_trainer(m, &d);
    test_batch b;
    for (int32_t i = 0; i < 5; i++) {                                  /* ends inside an accumulation: gradients are not 0 */
        test_batch_at(&b, &c, 3, i, 4);
        assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
    }
    apt_rng rng = apt_rng_make(8, (uint64_t)style);
    const mask_set s = make_masks(m, style, &rng);
    apt_config old;
    apt_model_config(m, &old);
    apt_layer_shape shape[8];
    memcpy(shape, old.layer, (size_t)old.layers * sizeof shape[0]);
    old.layer = shape;
    kept_param *kept = (kept_param *)test_memory_block((size_t)m->param_count * sizeof(kept_param));
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        snprintf(kept[i].name, sizeof kept[i].name, "%s", p->name);
        kept[i].rows = p->rows;
        kept[i].cols = p->cols;
        memset(kept[i].part, 0, sizeof kept[i].part);
        if (p->rows * p->cols > 0) read_parts(m, p, kept[i].part);
    }
    assert_ok(ctx, apt_model_set_masks(m, s.mask, s.units.total));
    assert_ok(ctx, apt_model_compact(m));
    int64_t compared = 0;
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        float *after[4] = {NULL, NULL, NULL, NULL};
        if (kept[i].rows * kept[i].cols == 0) continue;
        if (p->rows * p->cols > 0) {
            read_parts(m, p, after);
            compared += compare_gathered(&kept[i], &old, s.mask, p, after);
        }
        for (int32_t k = 0; k < 4; k++) {
            free(after[k]);
            free(kept[i].part[k]);
        }
    }
    assert_true(compared > 200);
    assert_result(apt_trainer_step(t, &b.b, NULL), APT_E_STATE);       /* changed from outside */
    free(kept);
    free(s.mask);
    apt_destroy(ctx);
}

static void test_compaction_gathers(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 16; i++) {
        const apt_config c = shape_config(i % SHAPES, i % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i / 2 % 4));
        compact_trained(c, i % 3 == 0 ? APT_METHOD_LORA : APT_METHOD_FULL, i % 8);
    }
    for (int32_t i = 0; i < 2 * TEST_DECODERS; i++)
        compact_trained(test_decoder(i % TEST_DECODERS), i % 2 == 0 ? APT_METHOD_LORA : APT_METHOD_FULL, i % 8);
}

/* Shapes, counts and bytes afterwards are those of a model made in that shape. */
static void test_compaction_shapes(void **state)
{
    (void)state;
    test_log log;
    for (int32_t i = 0; i < 10; i++) {
        apt_ctx *ctx = test_context(1, &log), *other = test_context(1, &log);
        const apt_config c = shape_config(i % SHAPES, APT_BERT, (apt_task_kind)(APT_TASK_CLASSIFY + i % 4));
        apt_model *m = test_model(ctx, &c, 1);
        apt_rng rng = apt_rng_make(4, (uint64_t)i);
        mask_set s = make_masks(m, i % 6, &rng);
        const int64_t before = apt_memory_info(ctx).bytes;
        apt_model_info info, fresh_info;
        apt_config small;
        assert_ok(ctx, apt_model_set_masks(m, s.mask, s.units.total));
        assert_ok(ctx, apt_model_compact(m));
        assert_true(apt_memory_info(ctx).bytes < before);
        apt_model_query(m, &info);
        apt_model_config(m, &small);
        int32_t heads = 0, neurons = 0, hidden = 0, at = 0;
        int64_t prunable = 0;
        for (int32_t l = 0; l < c.layers; l++) {
            const int32_t g = c.layer != NULL ? c.layer[l].kv_heads : c.heads, q = c.layer != NULL ? c.layer[l].heads : c.heads;
            const int32_t f = c.layer != NULL ? c.layer[l].neurons : c.neurons;
            int32_t kg = 0, kf = 0;
            for (int32_t j = 0; j < g; j++) kg += s.mask[at++] != 0;
            for (int32_t j = 0; j < f; j++) kf += s.mask[at++] != 0;
            assert_int_equal(small.layer[l].kv_heads, kg);
            assert_int_equal(small.layer[l].heads, kg * (q / g));
            assert_int_equal(small.layer[l].neurons, kf);
            heads += kg;
            neurons += kf;
            prunable += c.head_dim * 2 * (kg * (q / g) + kg) + 2 * kf;
        }
        while (at < s.units.total) hidden += s.mask[at++] != 0;
        assert_int_equal(small.hidden, hidden);
        assert_int_equal(small.hidden_dense, c.hidden);
        apt_units u;
        apt_model_units(m, &u);
        assert_true(u.heads == heads && u.neurons == neurons && u.hidden == hidden && u.total == heads + neurons + hidden);
        assert_true(info.prunable == prunable * hidden);
        assert_true(info.prunable_dense > info.prunable && info.trainable == 0 && info.adapter == 0);
        assert_int_equal(apt_model_get_masks(m, s.mask, u.total), APT_OK);
        for (int32_t j = 0; j < u.total; j++) assert_true(s.mask[j] == 1);
        apt_model *fresh = test_model(other, &small, 1);
        apt_model_query(fresh, &fresh_info);
        assert_true(fresh_info.parameters == info.parameters);
        assert_true(apt_memory_info(ctx).bytes == apt_memory_info(other).bytes);
        assert_true(apt_memory_info(ctx).blocks == apt_memory_info(other).blocks);
        free(s.mask);
        apt_destroy(ctx);
        apt_destroy(other);
    }
}

/* Masks of 1 change nothing; masks between 0 and 1 are no compaction; bad masks are refused. */
static void test_masks(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 1);
    apt_units u;
    apt_model_units(m, &u);
    assert_int_equal(u.heads, 8);
    assert_int_equal(u.neurons, 48);
    assert_int_equal(u.hidden, 16);
    assert_int_equal(u.total, 72);
    float mask[72], got[72];
    for (int32_t i = 0; i < 72; i++) mask[i] = 1;
    test_batch b;
    test_batch_at(&b, &c, 1, 0, 4);
    int64_t n = 0;
    float *before = test_logits(m, &b.b, &n, NULL, 0);
    const uint64_t sum = test_model_sum(m);
    assert_ok(ctx, apt_model_set_masks(m, mask, 72));
    assert_ok(ctx, apt_model_compact(m));
    assert_true(test_model_sum(m) == sum);
    float *after = test_logits(m, &b.b, &n, NULL, 0);
    assert_memory_equal(before, after, (size_t)n * sizeof(float));
    for (int32_t i = 0; i < 72; i += 7) {                              /* one fraction anywhere */
        mask[i] = 0.25f;
        mask[(i + 30) % 72] = 0;
        assert_ok(ctx, apt_model_set_masks(m, mask, 72));
        assert_ok(ctx, apt_model_get_masks(m, got, 72));
        assert_memory_equal(mask, got, sizeof got);
        const uint64_t masked = test_model_sum(m);
        assert_result(apt_model_compact(m), APT_E_STATE);
        assert_true(test_model_sum(m) == masked);
        mask[i] = mask[(i + 30) % 72] = 1;
    }
    const int64_t bytes = apt_memory_info(ctx).bytes;
    assert_ok(ctx, apt_model_set_masks(m, mask, 72));
    assert_true(apt_memory_info(ctx).bytes < bytes);                   /* masks of 1 cost nothing */
    for (int32_t i = 56; i < 72; i++) mask[i] = 0;                     /* no hidden dimension left */
    assert_ok(ctx, apt_model_set_masks(m, mask, 72));
    assert_result(apt_model_compact(m), APT_E_STATE);
    for (int32_t i = 0; i < 72; i++) mask[i] = 1;
    assert_ok(ctx, apt_model_set_masks(m, mask, 72));
    assert_true(test_model_sum(m) == sum);
    mask[3] = -0.01f;
    assert_result(apt_model_set_masks(m, mask, 72), APT_E_RANGE);
    mask[3] = 1.01f;
    assert_result(apt_model_set_masks(m, mask, 72), APT_E_RANGE);
    const uint32_t nan_bits = 0x7fc00000u;
    memcpy(&mask[3], &nan_bits, sizeof nan_bits);
    assert_result(apt_model_set_masks(m, mask, 72), APT_E_RANGE);
    assert_result(apt_model_set_masks(m, mask, 71), APT_E_SHAPE);
    assert_result(apt_model_get_masks(m, mask, 73), APT_E_SHAPE);
    assert_result(apt_model_set_masks(m, NULL, 72), APT_E_ARGUMENT);
    assert_result(apt_model_compact(NULL), APT_E_ARGUMENT);
    assert_true(test_model_sum(m) == sum);
    assert_non_null(strstr(apt_error(ctx), "72"));
    free(before);
    free(after);
    apt_destroy(ctx);
}

/* ---- merge -------------------------------------------------------------------------------------------------------- */

/* A model that is made in the shape of `m` takes the same memory: nothing of the adapters is left. */
static void check_memory(const apt_model *m)
{
    test_log log;
    apt_ctx *other = test_context(1, &log);
    apt_config c;
    apt_model_config(m, &c);
    (void)test_model(other, &c, 1);
    assert_true(apt_memory_info(m->ctx).bytes == apt_memory_info(other).bytes);
    assert_true(apt_memory_info(m->ctx).blocks == apt_memory_info(other).blocks);
    apt_destroy(other);
}

/* A merged model goes through its files: the same parameters in the same order, the same logits. */
static void check_saved(apt_model *m, const test_batch *b)
{
    char dir[512];
    apt_model *back = NULL;
    int64_t n = 0, n2 = 0;
    test_dir(dir, sizeof dir);
    assert_ok(m->ctx, apt_model_save(m, dir));
    assert_ok(m->ctx, apt_model_load(m->ctx, dir, NULL, &back));
    assert_true(test_model_sum(m) == test_model_sum(back));
    float *x = test_logits(m, &b->b, &n, NULL, 0), *y = test_logits(back, &b->b, &n2, NULL, 0);
    assert_true(n == n2);
    assert_memory_equal(x, y, (size_t)n * sizeof(float));
    free(x);
    free(y);
    apt_model_destroy(back);
    test_remove(dir);
}

static void check_merge(const apt_config *c, int32_t i)
{
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    apt_model *m = test_model(ctx, c, 7);
    const bool tied = c->task == APT_TASK_LM && !c->untied;
    test_add_adapters(m, 1 + i % 4, 70 + (uint64_t)i);
    test_batch b;
    test_batch_at(&b, c, 1, i, 5);
    int64_t n = 0;
    float difference = -1;
    apt_model_info info;
    apt_model_query(m, &info);
    assert_true(info.adapter > 0);
    const uint64_t sum = test_model_sum(m);
    const int32_t token = b.tokens[0];
    b.tokens[0] = c->vocab;                                           /* a bad probe: nothing is merged */
    assert_result(apt_model_merge(m, &b.b, &difference), APT_E_RANGE);
    assert_true(test_model_sum(m) == sum);
    b.tokens[0] = token;
    float *before = test_logits(m, &b.b, &n, NULL, 0), *words = test_parameter(m, m->embed[APTI_WORD]->name, NULL);
    assert_ok(ctx, apt_model_merge(m, i % 5 == 4 ? NULL : &b.b, i % 5 == 3 ? NULL : &difference));
    float *after = test_logits(m, &b.b, &n, NULL, 0), *same = test_parameter(m, m->embed[APTI_WORD]->name, NULL);
    float worst = 0;
    for (int64_t j = 0; j < n; j++) worst = fmaxf(worst, fabsf(after[j] - before[j]));
    test_near("merged logits", after, before, n, 1e-5);
    assert_memory_equal(words, same, (size_t)(c->vocab * c->hidden) * sizeof(float));
    if (tied) assert_true(m->config.untied && !m->config.scaled_head && m->embed[APTI_WORD]->packed.data == NULL);
    if (i % 5 < 3) assert_true(difference == worst);
    apt_model_query(m, &info);
    assert_true(info.adapter == 0);
    for (int32_t j = 0; j < apt_model_parameters(m); j++) {
        apt_parameter p;
        assert_ok(ctx, apt_model_parameter(m, j, &p));
        assert_null(strstr(p.name, "lora_"));
    }
    assert_ok(ctx, apt_model_merge(m, &b.b, &difference));            /* nothing left to merge */
    assert_true(difference == 0);
    apti_pass_free(ctx, m->pass);
    m->pass = NULL;
    check_memory(m);
    check_saved(m, &b);
    apt_train_desc d = APT_ZERO;
    d.steps = 1;
    d.adapt = test_adaptable(c);
    assert_ok(ctx, apt_trainer_step(test_trainer(m, &d), &b.b, NULL)); /* and the model can be trained again */
    free(before);
    free(after);
    free(words);
    free(same);
    apt_destroy(ctx);
}

static void test_merge(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 12; i++) {
        const apt_config c = shape_config(i % SHAPES, i % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i % 4));
        check_merge(&c, i);
    }
    for (int32_t i = 0; i < 2 * TEST_DECODERS; i++) {
        const apt_config c = test_decoder(i % TEST_DECODERS);
        check_merge(&c, i);
    }
}

/* A tied head becomes (E + s B A) / sqrt(d) in T5 v1.0, E + s B A in LLaMA; frozen weights in half precision are rounded once. */
static void test_merge_tied(void **state)
{
    (void)state;
    test_log log;
    static const apt_dtype types[3] = {APT_F32, APT_BF16, APT_F16};
    static const double ulps[3] = {2e-7, 1.0 / 256, 1.0 / 2048};
    for (int32_t i = 0; i < 6; i++) {
        apt_ctx *ctx = test_context(1, &log);
        const apt_config c = test_decoder(i % 2 ? 3 : 0);
        const int64_t vocab = c.vocab, hidden = c.hidden;
        const double scale = c.scaled_head ? 1 / sqrt((double)hidden) : 1, rounding = ulps[i / 2];
        apt_model *m = NULL;
        assert_ok(ctx, apti_model_build(ctx, &c, 5, types[i / 2], &m));
        apt_train_desc d = APT_ZERO;
        d.method = APT_METHOD_LORA;
        d.steps = 1;
        d.rank = 3;
        d.adapt = APT_ADAPT_HEAD;
        apt_trainer_destroy(test_trainer(m, &d));
        test_randomise(m, 6);
        float *e = test_parameter(m, m->embed[APTI_WORD]->name, NULL), *a = test_parameter(m, "lora_A.lm_head", NULL),
              *b = test_parameter(m, "lora_B.lm_head", NULL), zero = 0;
        assert_result(apt_model_get(m, "lm_head.weight", &zero, vocab * hidden), APT_E_SHAPE);
        assert_ok(ctx, apt_model_merge(m, NULL, NULL));
        float *head = test_parameter(m, "lm_head.weight", NULL), *words = test_parameter(m, m->embed[APTI_WORD]->name, NULL);
        for (int64_t v = 0; v < vocab; v++)
            for (int64_t j = 0; j < hidden; j++) {
                double sum = (double)e[v * hidden + j];
                for (int32_t r = 0; r < 3; r++) sum += 2.0 * (double)b[v * 3 + r] * (double)a[r * hidden + j];
                if (!(fabs((double)head[v * hidden + j] - scale * sum) <= rounding * fabs(scale * sum) + 1e-7))
                    fail_msg("case %d: lm_head[%d,%d] is %g, expected %g", i, (int)v, (int)j, (double)head[v * hidden + j], scale * sum);
            }
        assert_memory_equal(e, words, (size_t)(vocab * hidden) * sizeof(float));
        free(e);
        free(a);
        free(b);
        free(head);
        free(words);
        apt_destroy(ctx);
    }
}

/* Merging is W + s B A: checked in double for one matrix. */
static void test_merge_values(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 7);
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_LORA;
    d.steps = 1;
    d.rank = 3;
    d.scale = 0.75f;
    d.adapt = APT_ADAPT_KEY | APT_ADAPT_DOWN;
    apt_trainer_destroy(test_trainer(m, &d));
    test_randomise(m, 3);
    float *w = test_parameter(m, "bert.encoder.layer.1.output.dense.weight", NULL), *q = test_parameter(m, "bert.encoder.layer.1.attention.self.query.weight", NULL);
    float *a = test_parameter(m, "lora_A.bert.encoder.layer.1.output.dense", NULL), *b = test_parameter(m, "lora_B.bert.encoder.layer.1.output.dense", NULL);
    assert_ok(ctx, apt_model_merge(m, NULL, NULL));
    float *got = test_parameter(m, "bert.encoder.layer.1.output.dense.weight", NULL), *same = test_parameter(m, "bert.encoder.layer.1.attention.self.query.weight", NULL);
    for (int32_t i = 0; i < 16; i++)
        for (int32_t j = 0; j < 24; j++) {
            double sum = 0;
            for (int32_t r = 0; r < 3; r++) sum += (double)b[i * 3 + r] * (double)a[r * 24 + j];
            const float expected = (float)((double)w[i * 24 + j] + 0.75 * sum);
            assert_true(fabsf(got[i * 24 + j] - expected) <= 2e-7f * fabsf(expected));
        }
    assert_memory_equal(q, same, 256 * sizeof(float));               /* a matrix without an adapter stays */
    free(w);
    free(q);
    free(a);
    free(b);
    free(got);
    free(same);
    apt_destroy(ctx);
}

/* ---- growth ------------------------------------------------------------------------------------------------------- */

static void test_growth_keeps_logits(void **state)
{
    (void)state;
    test_log log;
    for (int32_t i = 0; i < 8 + TEST_DECODERS; i++) {
        apt_ctx *ctx = test_context(1, &log);
        const apt_config c = i < 8 ? shape_config(i % SHAPES, APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i % 4)) : test_decoder(i - 8);
        apt_model *m = test_model(ctx, &c, 7);
        apt_train_desc d = APT_ZERO;
        d.method = APT_METHOD_LORA;
        d.steps = 8;
        d.rank = 1 + i % 8;
        d.adapt = test_adaptable(&c);
        apt_trainer *t = test_trainer(m, &d);
        test_randomise(m, 12);
        test_batch b;
        test_batch_at(&b, &c, 1, i, 6);
        assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));             /* moments exist */
        int64_t n = 0, na = 0, nb = 0;
        float *before = test_logits(m, &b.b, &n, NULL, 0);
        const apti_site site = apti_site_of(m, i < 8 ? (int32_t)APTI_UP : apti_layer_sites(m));
        const apti_param *pa = site.a, *pb = site.b;
        const int64_t rank = pa->rows, in = pa->cols, out = pb->rows;
        float *a = test_parameter(m, pa->name, &na), *bb = test_parameter(m, pb->name, &nb);
        float *m1 = (float *)test_memory_block((size_t)nb * sizeof(float));
        memcpy(m1, pb->moment1, (size_t)nb * sizeof(float));
        apt_rng rng = apt_rng_make(9, 0);
        for (int32_t k = 0; k < apti_sites(m); k++)
            if (apti_site_of(m, k).a != m->none) assert_ok(ctx, apti_adapter_resize(m, k, rank + 1 + k % 3, true, &rng));
        float *after = test_logits(m, &b.b, &n, NULL, 0);
        assert_memory_equal(before, after, (size_t)n * sizeof(float));
        const int64_t grown = pa->rows;
        float bound = 0;
        assert_true(grown > rank && pa->cols == in && pb->cols == grown && pb->rows == out);
        assert_memory_equal(pa->value, a, (size_t)na * sizeof(float));
        for (int64_t r = rank; r < grown; r++)
            for (int64_t j = 0; j < in; j++) bound = fmaxf(bound, fabsf(pa->value[r * in + j]));
        assert_true(bound > 0 && bound <= 1.0f / sqrtf((float)in) * 1.000001f);
        for (int64_t r = 0; r < out; r++)
            for (int64_t j = 0; j < grown; j++) {
                assert_true(pb->value[r * grown + j] == (j < rank ? bb[r * rank + j] : 0.0f));
                assert_true(pb->moment1[r * grown + j] == (j < rank ? m1[r * rank + j] : 0.0f));
                assert_true(pb->grad[r * grown + j] == 0);
            }
        free(a);
        free(bb);
        free(m1);
        free(before);
        free(after);
        apt_destroy(ctx);
    }
}

/* ---- parameters by name ------------------------------------------------------------------------------------------- */

static void test_parameters(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    for (int32_t i = 0; i < 8; i++) {
        const apt_config c = test_config(i % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i / 2));
        apt_model *m = test_model(ctx, &c, 3), *copy = test_model(ctx, &c, 4);
        test_batch b;
        test_batch_at(&b, &c, 1, i, 4);
        int64_t n = 0, total = 0;
        apt_model_info info;
        apt_model_query(m, &info);
        for (int32_t j = 0; j < apt_model_parameters(m); j++) {
            apt_parameter p;
            assert_ok(ctx, apt_model_parameter(m, j, &p));
            assert_true(p.rows > 0 && p.cols > 0 && (p.dims == 2 || (p.dims == 1 && p.rows == 1)) && p.trainable == 0);
            float *v = test_parameter(m, p.name, NULL);
            assert_ok(ctx, apt_model_set(copy, p.name, v, p.rows * p.cols));
            assert_result(apt_model_get(m, p.name, v, p.rows * p.cols + 1), APT_E_SHAPE);
            assert_result(apt_model_set(m, p.name, v, p.rows * p.cols - 1), APT_E_SHAPE);
            const uint32_t bad = j % 2 == 0 ? 0x7fc00000u : 0x7f800000u;
            memcpy(&v[p.rows * p.cols / 2], &bad, sizeof bad);
            assert_result(apt_model_set(m, p.name, v, p.rows * p.cols), APT_E_NONFINITE);
            assert_non_null(strstr(apt_error(ctx), p.name));
            free(v);
            total += p.rows * p.cols;
        }
        assert_true(total == info.parameters);
        assert_true(test_model_sum(m) == test_model_sum(copy));
        float *x = test_logits(m, &b.b, &n, NULL, 0), *y = test_logits(copy, &b.b, &n, NULL, 0);
        assert_memory_equal(x, y, (size_t)n * sizeof(float));
        free(x);
        free(y);
        apt_parameter p;
        float one = 0;
        assert_result(apt_model_parameter(m, apt_model_parameters(m), &p), APT_E_RANGE);
        assert_result(apt_model_parameter(m, -1, &p), APT_E_RANGE);
        assert_result(apt_model_get(m, "no.such.weight", &one, 1), APT_E_MISSING);
        assert_non_null(strstr(apt_error(ctx), "no.such.weight"));
        assert_result(apt_model_get(m, NULL, &one, 1), APT_E_ARGUMENT);
        assert_result(apt_model_get(m, "lora_A.bert.encoder.layer.0.output.dense", &one, 1), i % 2 == 0 ? APT_E_SHAPE : APT_E_MISSING);
        apt_model_destroy(copy);
        apt_model_destroy(m);
    }
    apt_destroy(ctx);
}

/* Setting a matrix that is being trained reaches the products too; setting one that a teacher shares leaves the teacher alone. */
static void test_set_while_training(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 3), *plain = test_model(ctx, &c, 3), *teacher = NULL;
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_LORA;
    d.steps = 2;
    assert_non_null(test_trainer(m, &d));
    assert_ok(ctx, apti_model_snapshot(m, &teacher));
    test_batch b;
    test_batch_at(&b, &c, 1, 0, 4);
    int64_t n = 0;
    float *old = test_logits(teacher, &b.b, &n, NULL, 0);
    const char *names[3] = {"bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.value.bias"};
    for (int32_t i = 0; i < 3; i++) {
        int64_t count = 0;
        float *v = test_parameter(m, names[i], &count);
        for (int64_t j = 0; j < count; j++) v[j] = 0.5f * v[j] + 0.1f;
        assert_ok(ctx, apt_model_set(m, names[i], v, count));
        assert_ok(ctx, apt_model_set(plain, names[i], v, count));
        float *x = test_logits(m, &b.b, &n, NULL, 0), *y = test_logits(plain, &b.b, &n, NULL, 0), *z = test_logits(teacher, &b.b, &n, NULL, 0);
        assert_memory_equal(x, y, (size_t)n * sizeof(float));
        assert_memory_not_equal(x, old, (size_t)n * sizeof(float));
        assert_memory_equal(z, old, (size_t)n * sizeof(float));
        free(v);
        free(x);
        free(y);
        free(z);
    }
    free(old);
    apti_model_free(teacher);
    apt_destroy(ctx);
}

/* ---- gradients against finite differences -------------------------------------------------------------------------- */

typedef struct grad_case { apt_config c; apt_method method; int32_t masks; bool all_rows; } grad_case;

static double pass_loss(apti_pass *p, const apt_batch *b, uint32_t mode)
{
    assert_int_equal(apti_forward(p, b, mode), APT_OK);
    apti_task_loss(p, false, 1.0f);
    return apti_mean_loss(p);
}

/* masks 0: none; 1: fractions and zeros; 2: zeros and ones. */
static void grad_masks(apt_model *m, int32_t kind)
{
    apt_units u;
    apt_model_units(m, &u);
    float *mask = (float *)test_memory_block((size_t)u.total * sizeof(float));
    static const float fraction[5] = {0.3f, 1.0f, 0.0f, 0.7f, 1.0f}, binary[5] = {1, 1, 0, 1, 1};
    for (int32_t i = 0; i < u.total; i++) mask[i] = kind == 0 ? 1.0f : kind == 1 ? fraction[i % 5] : binary[i % 5];
    assert_int_equal(apt_model_set_masks(m, mask, u.total), APT_OK);
    free(mask);
}

/* Four-point derivative at entry `at` of a parameter. */
static double pass_slope(apt_model *m, apti_pass *pass, const apt_batch *b, uint32_t mode, apti_param *p, int64_t at)
{
    const float old = p->value[at], h = m->block->unscaled ? 0.003f : 0.02f;  /* without 1/sqrt(head size) curves are sharper */
    double f[4];
    static const float step[4] = {-2, -1, 1, 2};
    double moved[4];
    for (int32_t i = 0; i < 4; i++) {
        p->value[at] = old + step[i] * h;
        moved[i] = (double)p->value[at] - (double)old;
        apti_param_repack(m, p);
        f[i] = pass_loss(pass, b, mode);
    }
    p->value[at] = old;
    apti_param_repack(m, p);
    const double near = (f[2] - f[1]) / (moved[2] - moved[1]), far = (f[3] - f[0]) / (moved[3] - moved[0]);
    return (4 * near - far) / 3;
}

/* Gradients of every trained tensor; returns the worst relative error of a tensor. */
static double check_gradients(const grad_case *k, uint64_t seed)
{
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    apt_model *m = test_model(ctx, &k->c, seed);
    apt_train_desc d = APT_ZERO;
    d.method = k->method;
    d.steps = 1;
    d.rank = 2;
    d.adapt = test_adaptable(&k->c);
    apt_trainer *t = test_trainer(m, &d);
    test_randomise(m, seed);
    grad_masks(m, k->masks);
    test_batch b;
    test_batch_at(&b, &k->c, seed, 0, 3);
    const uint32_t mode = APTI_PASS_KEEP | (k->method == APT_METHOD_FULL ? (uint32_t)APTI_PASS_FULL : 0u) | (k->all_rows ? (uint32_t)APTI_PASS_ALL_ROWS : 0u);
    assert_int_equal(apti_forward(t->pass, &b.b, mode), APT_OK);
    if (seed % 2 != 0) t->pass->mlm_chunk = 2;                        /* the vocabulary's logits in several chunks of rows */
    apti_task_loss(t->pass, true, 1.0f);
    apti_backward(t->pass);
    apti_sync(t->ctx);
    double worst = 0, largest = 0;
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        for (int64_t j = 0; p->grad != NULL && j < p->rows * p->cols; j++) largest = fmax(largest, fabs((double)p->grad[j]));
    }
    apt_rng rng = apt_rng_make(seed, 5);
    int32_t tensors = 0, silent = 0;
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param *p = &m->params[i];
        const int64_t n = p->rows * p->cols, samples = n < 8 ? n : 8;
        double error = 0, norm = 0;
        if (p->grad == NULL || n == 0) continue;
        for (int64_t j = 0; j < samples; j++) {
            const int64_t at = samples == n ? j : (int64_t)apt_rng_below(&rng, (uint32_t)n);
            if (!apti_finite(p->grad[at])) fail_msg("%s: the gradient is not finite", p->name);
            const double slope = pass_slope(m, t->pass, &b.b, mode, p, at), e = slope - (double)p->grad[at];
            error += e * e;
            norm += slope * slope;
        }
        const double floor = 1e-5 * sqrt((double)samples), relative = fmax(0, sqrt(error) - floor) / (sqrt(norm) + 1e-30);
        tensors++;
        if (sqrt(norm) < 50 * floor) silent++;
        if (!(relative <= 1e-2))
            fail_msg("task %d, method %d, masks %d, %s: error %g of norm %g", (int)k->c.task, (int)k->method, k->masks, p->name, sqrt(error), sqrt(norm));
        worst = fmax(worst, relative);
    }
    assert_true(largest > 1e-2 && tensors > 15);
    if (k->masks == 0) assert_true(silent <= tensors / 4);           /* key biases have no gradient; few others may be so small */
    apt_destroy(ctx);
    return worst;
}

static void test_gradients(void **state)
{
    (void)state;
    double worst = 0;
    for (int32_t i = 0; i < 48; i++) {
        grad_case k;
        k.c = test_config(i % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i / 2 % 4));
        k.c.hidden = 8;
        k.c.neurons = 10;
        k.c.heads = 2;
        k.c.vocab = 13;
        k.c.positions = 12;
        k.c.activation = i % 3 == 0 ? APT_GELU_TANH : APT_GELU_ERF;
        k.method = i / 8 % 2 == 0 ? APT_METHOD_FULL : APT_METHOD_LORA;
        k.masks = i / 16 % 3;
        k.all_rows = i % 5 == 0;
        worst = fmax(worst, check_gradients(&k, 40 + (uint64_t)i));
    }
    print_message("    worst relative error of a tensor %.2g\n", worst);
}

/* Grouped queries have gradients too. */
static void test_gradients_grouped(void **state)
{
    (void)state;
    grad_case k;
    k.c = shape_config(2, APT_BERT, APT_TASK_SPAN);
    k.c.activation = APT_GELU_ERF;
    k.masks = 1;
    k.all_rows = false;
    for (int32_t i = 0; i < 2; i++) {
        k.method = i == 0 ? APT_METHOD_FULL : APT_METHOD_LORA;
        (void)check_gradients(&k, 77);
    }
}

/* Every parameter of the decoder families, masks on and off. */
static void test_gradients_decoders(void **state)
{
    (void)state;
    double worst = 0;
    for (int32_t i = 0; i < 6 * TEST_DECODERS; i++) {
        grad_case k;
        k.c = test_decoder(i % TEST_DECODERS);
        k.c.hidden = 8;
        k.c.neurons = 10;
        k.c.vocab = 13;
        k.c.positions = 12;
        if (k.c.family == APT_T5 && !k.c.gated) k.c.activation = APT_SILU;   /* ReLU has no slope where a step crosses 0 */
        k.method = i / TEST_DECODERS % 2 == 0 ? APT_METHOD_FULL : APT_METHOD_LORA;
        k.masks = i / TEST_DECODERS / 2;
        k.all_rows = false;
        worst = fmax(worst, check_gradients(&k, 400 + (uint64_t)i));
    }
    print_message("    worst relative error of a tensor %.2g\n", worst);
}

/* The shortcut through first tokens only: the same logits and gradients as with all rows. */
static void test_lean(void **state)
{
    (void)state;
    test_log log;
    for (int32_t i = 0; i < 12; i++) {
        apt_ctx *ctx = test_context(1, &log);
        const apt_config c = shape_config(i % SHAPES, i % 2 == 0 ? APT_BERT : APT_ROBERTA, i / 2 % 2 == 0 ? APT_TASK_CLASSIFY : APT_TASK_REGRESS);
        apt_model *m = test_model(ctx, &c, 3);
        apt_train_desc d = APT_ZERO;
        d.method = i % 3 == 0 ? APT_METHOD_FULL : APT_METHOD_LORA;
        d.steps = 1;
        d.rank = 2;
        d.adapt = 63;
        apt_trainer *t = test_trainer(m, &d);
        test_randomise(m, 5);
        grad_masks(m, i % 3);
        test_batch b;
        test_batch_at(&b, &c, 9, i, 5);
        const uint32_t mode = APTI_PASS_KEEP | (i % 3 == 0 ? (uint32_t)APTI_PASS_FULL : 0u);
        float *logits[2], **grad[2];
        const int64_t n = 5 * apti_head_width(&c);
        double loss[2];
        for (int32_t k = 0; k < 2; k++) {
            apti_zero_gradients(t);
            assert_ok(ctx, apti_forward(t->pass, &b.b, mode | (k == 1 ? (uint32_t)APTI_PASS_ALL_ROWS : 0u)));
            assert_true(t->pass->lean == (k == 0));
            apti_task_loss(t->pass, true, 1.0f);
            apti_backward(t->pass);
            apti_sync(t->ctx);
            loss[k] = apti_mean_loss(t->pass);
            logits[k] = (float *)test_memory_block((size_t)n * sizeof(float));
            memcpy(logits[k], t->pass->logits, (size_t)n * sizeof(float));
            grad[k] = (float **)test_memory_block((size_t)m->param_count * sizeof(float *));
            for (int32_t j = 0; j < m->param_count; j++) {
                const size_t bytes = (size_t)(m->params[j].rows * m->params[j].cols) * sizeof(float);
                grad[k][j] = (float *)test_memory_block(bytes);
                if (m->params[j].grad != NULL) memcpy(grad[k][j], m->params[j].grad, bytes);
            }
        }
        test_near("lean logits", logits[0], logits[1], n, 1e-6);
        test_near_value("lean loss", loss[0], loss[1], 1e-6 * fabs(loss[1]));
        for (int32_t j = 0; j < m->param_count; j++) {
            const apti_param *p = &m->params[j];
            double size = 0, error = 0;
            for (int64_t e = 0; p->grad != NULL && e < p->rows * p->cols; e++) {
                size += (double)grad[1][j][e] * (double)grad[1][j][e];
                error += ((double)grad[0][j][e] - (double)grad[1][j][e]) * ((double)grad[0][j][e] - (double)grad[1][j][e]);
            }
            if (sqrt(error) > 1e-6 * sqrt(size) + 1e-7) fail_msg("case %d, %s: lean gradient off by %g of %g", i, p->name, sqrt(error), sqrt(size));
            free(grad[0][j]);
            free(grad[1][j]);
        }
        for (int32_t k = 0; k < 2; k++) {
            free(logits[k]);
            free(grad[k]);
        }
        apt_destroy(ctx);
    }
}

/* ---- what apt_model_forward says ---------------------------------------------------------------------------------- */

static void test_forward_output(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    const apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *m = test_model(ctx, &c, 3);
    test_batch b;
    test_batch_at(&b, &c, 1, 0, 4);
    float logits[12], hidden[40 * 16];
    apt_output out = APT_ZERO;
    out.logits = logits;
    out.logits_capacity = 11;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_SCRATCH);
    out.logits_capacity = 12;
    out.hidden = hidden;
    out.hidden_capacity = b.offsets[4] * 16 - 1;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_SCRATCH);
    out.hidden_capacity++;
    assert_ok(ctx, apt_model_forward(m, &b.b, &out));
    assert_true(out.logits_count == 12 && out.loss_count == 4);
    double loss = 0;
    int64_t hits = 0;
    for (int32_t i = 0; i < 4; i++) {
        const float *x = logits + 3 * i;
        double sum = 0;
        int32_t best = 0;
        for (int32_t j = 0; j < 3; j++) {
            sum += exp((double)x[j]);
            if (x[j] > x[best]) best = j;
        }
        loss += (log(sum) - (double)x[b.labels[i]]) / 4;
        hits += best == b.labels[i];
    }
    test_near_value("loss", out.loss, loss, 1e-6);
    assert_true(out.correct == hits);
    b.b.labels = NULL;
    assert_ok(ctx, apt_model_forward(m, &b.b, &out));
    assert_true(out.loss == 0 && out.loss_count == 0);
    int32_t *const tokens = b.tokens, *const offsets = b.offsets;
    tokens[2] = -1;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "token 2"));
    tokens[2] = 0;
    b.types[1] = 2;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    b.types[1] = 0;
    offsets[2] = offsets[1];
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    offsets[0] = 1;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    offsets[0] = 0;
    offsets[1] = c.positions + 1;
    b.b.sequences = 1;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    offsets[1] = 3;
    assert_ok(ctx, apt_model_forward(m, &b.b, &out));
    b.labels[0] = 3;
    b.b.labels = b.labels;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_RANGE);
    b.b.sequences = 0;
    assert_result(apt_model_forward(m, &b.b, &out), APT_E_ARGUMENT);
    assert_result(apt_model_forward(m, NULL, &out), APT_E_ARGUMENT);
    assert_result(apt_model_forward(m, &b.b, NULL), APT_E_ARGUMENT);
    apt_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_masked_is_compacted), cmocka_unit_test(test_compaction_gathers), cmocka_unit_test(test_compaction_shapes),
        cmocka_unit_test(test_masks),               cmocka_unit_test(test_merge),              cmocka_unit_test(test_merge_values),
        cmocka_unit_test(test_merge_tied),
        cmocka_unit_test(test_growth_keeps_logits), cmocka_unit_test(test_parameters),         cmocka_unit_test(test_set_while_training),
        cmocka_unit_test(test_gradients),           cmocka_unit_test(test_gradients_grouped),  cmocka_unit_test(test_lean),
        cmocka_unit_test(test_forward_output),      cmocka_unit_test(test_masked_decoders),   cmocka_unit_test(test_gradients_decoders),
    };
    return cmocka_run_group_tests_name("structure", tests, NULL, NULL);
}
