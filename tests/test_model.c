/* Whole models against golden files: logits, losses, hidden states, every gradient, salience, kurtosis, importance.
   The files were computed in double precision by PyTorch and transformers (tests/golden; more cases in the shared data). */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

typedef struct golden {
    apt_ctx *ctx;
    apti_tensors *set;
    char dir[700];
    apt_batch batch;
    int32_t offsets[8], tokens[128], types[128], labels[128], target_offsets[8];
    float targets[8];
    int32_t length, target_length;    /* padded lengths in the file */
} golden;

static const int32_t *golden_ints(const golden *g, const char *name)
{
    const apti_tensor_view *v = apti_tensors_find(g->set, name);
    return v != NULL ? (const int32_t *)(const void *)v->data : NULL;
}

static int64_t view_count(const apti_tensor_view *v)
{
    int64_t n = 1;
    for (int32_t i = 0; i < v->dims; i++) n *= v->shape[i];
    return n;
}

/* Floats of a tensor; the caller frees. */
static float *golden_floats(const golden *g, const char *name, int64_t *count)
{
    const apti_tensor_view *v = apti_tensors_find(g->set, name);
    if (v == NULL) fail_msg("the golden file has no tensor %s", name);
    *count = view_count(v);
    float *x = (float *)malloc((size_t)*count * sizeof(float));
    assert_int_equal(apti_tensor_to_f32(g->set, v, x), APT_OK);
    return x;
}

/* Labels of a language model: one per real token (T5: of the target, whose padding has the label -100). */
static void golden_lm_labels(golden *g, const int32_t *mask, const int32_t *labels, bool target)
{
    const int32_t rows = g->batch.sequences;
    int32_t n = 0;
    g->target_length = (int32_t)apti_tensors_find(g->set, "labels")->shape[1];
    for (int32_t s = 0; s < rows; s++) {
        for (int32_t i = 0; i < g->target_length; i++) {
            const int32_t at = s * g->target_length + i;
            if (target ? labels[at] != -100 : mask[at]) g->labels[n++] = labels[at];
        }
        g->target_offsets[s + 1] = n;
    }
    if (target) g->batch.target_offsets = g->target_offsets;
}

/* Packs the padded rows of the file: padding never enters a batch. */
static void golden_batch(golden *g)
{
    const apti_tensor_view *mask = apti_tensors_find(g->set, "attention_mask");
    const int32_t *m = (const int32_t *)(const void *)mask->data, *ids = golden_ints(g, "input_ids"), *types = golden_ints(g, "token_type_ids");
    const int32_t *labels = golden_ints(g, "labels"), *start = golden_ints(g, "start_positions"), *end = golden_ints(g, "end_positions");
    const int32_t rows = (int32_t)mask->shape[0];
    int32_t n = 0;
    g->length = (int32_t)mask->shape[1];
    for (int32_t s = 0; s < rows; s++) {
        for (int32_t i = 0; i < g->length; i++) {
            if (!m[s * g->length + i]) continue;
            g->types[n] = types != NULL ? types[s * g->length + i] : 0;
            g->tokens[n++] = ids[s * g->length + i];
        }
        g->offsets[s + 1] = n;
        if (start != NULL) {
            g->labels[2 * s] = start[s];
            g->labels[2 * s + 1] = end[s];
        } else if (apti_tensors_find(g->set, "labels")->dtype == APT_F32) {
            memcpy(&g->targets[s], (const uint8_t *)labels + 4 * s, 4);
        } else if (apti_tensors_find(g->set, "labels")->dims == 1) {
            g->labels[s] = labels[s];
        }
    }
    g->batch.sequences = rows;
    if (labels != NULL && apti_tensors_find(g->set, "labels")->dims == 2)
        golden_lm_labels(g, m, labels, apti_tensors_find(g->set, "dense.decoder_hidden.0") != NULL);
    g->batch.offsets = g->offsets;
    g->batch.tokens = g->tokens;
    g->batch.types = types != NULL ? g->types : NULL;
    g->batch.labels = g->labels;
    g->batch.targets = g->targets;
}

static void golden_open(golden *g, const char *name, const char *kernels)
{
    char path[800];
    memset(g, 0, sizeof(*g));
    snprintf(g->dir, sizeof(g->dir), "tests/golden/%s", name);
    struct stat info;
    if (stat(g->dir, &info) != 0) {
        snprintf(path, sizeof(path), "golden/%s", name);
        (void)test_shared(g->dir, sizeof(g->dir), path);
    }
    apt_desc desc = APT_ZERO;
    desc.kernels = kernels;
    desc.threads = 2;
    g->ctx = apt_create(&desc);
    assert_non_null(g->ctx);
    snprintf(path, sizeof(path), "%s/golden.safetensors", g->dir);
    if (apti_tensors_open(g->ctx, path, &g->set) != APT_OK) fail_msg("%s", apt_error(g->ctx));
    golden_batch(g);
}

static apt_model *golden_model(golden *g)
{
    apt_model *model = NULL;
    apt_load_desc load = APT_ZERO;
    if (apt_model_load(g->ctx, g->dir, &load, &model) != APT_OK) fail_msg("%s", apt_error(g->ctx));
    return model;
}

static void golden_close(golden *g)
{
    apti_tensors_close(g->set);
    apt_destroy(g->ctx);
}

/* norm(a - b) / norm(b), in double */
static double relative_error(const float *a, const float *b, int64_t n)
{
    double d = 0, s = 0;
    for (int64_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        s += (double)b[i] * b[i];
    }
    return s > 0 ? sqrt(d / s) : sqrt(d);
}

static void expect_close(const char *what, const float *a, const float *b, int64_t n, double bound)
{
    const double e = relative_error(a, b, n);
    if (getenv("APT_TEST_ERRORS") != NULL) printf("    %-80s %.2e of %.0e\n", what, e, bound);
    if (!(e <= bound)) fail_msg("%s: relative error %.3g, bound %.3g (first values %g and %g)", what, e, bound, (double)a[0], (double)b[0]);
}

static void expect_golden(const golden *g, const char *part, const char *name, const float *mine, int64_t n, double bound)
{
    char key[256];
    int64_t count = 0;
    snprintf(key, sizeof(key), "%s%s", part, name);
    float *x = golden_floats(g, key, &count);
    assert_int_equal(count, n);
    expect_close(key, mine, x, n, bound);
    free(x);
}

/* Rows of a padded tensor (sequences, length, width) at the real positions. */
static float *golden_rows(const golden *g, const char *name, const int32_t *offsets, int64_t length, int64_t *width)
{
    int64_t n = 0;
    float *x = golden_floats(g, name, &n);
    *width = n / (g->batch.sequences * length);
    for (int32_t s = 0; s < g->batch.sequences; s++)              /* moves towards the front only */
        memmove(x + offsets[s] * *width, x + s * length * *width, (size_t)((offsets[s + 1] - offsets[s]) * *width) * sizeof(float));
    return x;
}

static void expect_rows(const golden *g, const char *name, const float *mine, int64_t ld, const int32_t *offsets, int64_t length)
{
    int64_t width = 0;
    const int64_t rows = offsets[g->batch.sequences];
    float *x = golden_rows(g, name, offsets, length, &width), *packed = (float *)malloc((size_t)(rows * width) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) memcpy(packed + i * width, mine + i * ld, (size_t)width * sizeof(float));
    expect_close(name, packed, x, rows * width, 1e-5);
    free(packed);
    free(x);
}

/* Logits at all real positions. */
static void check_lm_logits(golden *g, const apt_model *model, apti_pass *pass, const char *part)
{
    char name[64];
    const apti_lm_op op = apti_decoder_of(pass);
    const apti_stack *last = &pass->stack[pass->stacks - 1];
    const int64_t d = model->config.hidden, ld = apti_ld(d), vocab = model->config.vocab;
    float *h = (float *)malloc((size_t)(last->rows * ld) * sizeof(float)), *logits = (float *)malloc((size_t)(last->rows * vocab) * sizeof(float));
    for (int64_t i = 0; i < last->rows; i++) memcpy(h + i * ld, last->out + i * ld, (size_t)d * sizeof(float));
    apti_head_scale(pass, h, last->rows);
    apti_lm_logits(g->ctx, &op, logits, vocab, h, ld, last->rows);
    apti_sync(g->ctx);
    snprintf(name, sizeof(name), "%slogits", part);
    expect_rows(g, name, logits, vocab, last->offsets, pass->stacks > 1 ? g->target_length : g->length);
    free(h);
    free(logits);
}

/* The same and the hidden states of every stack; the last one of a stack is behind its norm. */
static void check_lm(golden *g, apt_model *model, apti_pass *pass, const char *part)
{
    char name[64];
    const int64_t ld = apti_ld(model->config.hidden);
    check_lm_logits(g, model, pass, part);
    for (int32_t k = 0; k < pass->stacks; k++) {
        const apti_stack *stack = &pass->stack[k];
        const int32_t step = k + 1, layers = (stack->end - stack->first) / step;          /* a decoder layer is two */
        for (int32_t i = 0; i <= layers; i++) {
            const float *mine = i == 0 ? pass->acts[stack->first].x : i == layers ? stack->out : pass->acts[stack->first + step * i - 1].y2;
            snprintf(name, sizeof(name), "%s%shidden.%d", part, k > 0 ? "decoder_" : "", (int)i);
            expect_rows(g, name, mine, ld, stack->offsets, k > 0 ? g->target_length : g->length);
        }
    }
}

/* Logits, loss and all hidden states of one forward ("dense." or "lora."). */
static void check_forward(golden *g, apt_model *model, apti_pass *pass, const char *part)
{
    char name[64];
    float mine[512];
    int64_t n = 0;
    const int32_t d = model->config.hidden;
    const float loss = (float)apti_mean_loss(pass);
    expect_golden(g, part, "loss", &loss, 1, 1e-5);
    if (model->config.task == APT_TASK_LM) {
        check_lm(g, model, pass, part);
        return;
    }
    if (model->config.task == APT_TASK_SPAN) {
        for (int32_t c = 0; c < 2; c++) {
            snprintf(name, sizeof(name), "%s%s_logits", part, c == 0 ? "start" : "end");
            float *x = golden_floats(g, name, &n), real[512];
            int64_t rows = 0;
            for (int32_t s = 0; s < g->batch.sequences; s++)
                for (int32_t i = g->offsets[s]; i < g->offsets[s + 1]; i++, rows++) {
                    mine[rows] = pass->logits[2 * i + c];
                    real[rows] = x[s * g->length + i - g->offsets[s]];
                }
            expect_close(name, mine, real, rows, 1e-5);
            free(x);
        }
    } else {
        const int64_t count = g->batch.sequences * apti_head_width(&model->config);
        expect_golden(g, part, "logits", pass->logits, count, 1e-5);
    }
    for (int32_t l = 0; l <= model->config.layers; l++) {
        snprintf(name, sizeof(name), "%shidden.%d", part, (int)l);
        float *x = golden_floats(g, name, &n);
        const float *h = l == 0 ? pass->acts[0].x : pass->acts[l - 1].y2;
        for (int32_t s = 0; s < g->batch.sequences; s++)
            for (int32_t i = g->offsets[s]; i < g->offsets[s + 1]; i++)
                expect_close(name, h + i * apti_ld(d), x + (s * g->length + i - g->offsets[s]) * d, d, 1e-5);
        free(x);
    }
}

static double gradient_norm(const apt_model *model)
{
    double sum = 0;
    for (int32_t i = 0; i < model->param_count; i++)
        for (int64_t j = 0; model->params[i].grad != NULL && j < apti_param_count(&model->params[i]); j++)
            sum += (double)model->params[i].grad[j] * model->params[i].grad[j];
    return sqrt(sum);
}

/* Some true gradients are 0 (a shift of all keys changes no softmax; a shift of all scores changes no span loss). What the file
   and we hold there is rounding, measured against the whole gradient. Returns true when that case was checked. */
static bool expect_vanishing(const golden *g, const apti_param *p, double whole)
{
    char key[256];
    int64_t n = 0;
    double file = 0, mine = 0;
    snprintf(key, sizeof(key), "grad.%s", p->name);
    float *x = golden_floats(g, key, &n);
    for (int64_t i = 0; i < n; i++) {
        file += (double)x[i] * x[i];
        mine += (double)p->grad[i] * p->grad[i];
    }
    free(x);
    if (sqrt(file) > 1e-12 * whole) return false;
    if (!(sqrt(mine) <= 1e-6 * whole)) fail_msg("%s: gradient %.3g should vanish beside %.3g", p->name, sqrt(mine), whole);
    return true;
}

/* 2e-5, but for one gradient that the file itself has wrong by 1.6e-5 (measured against make_golden.py in double throughout): its
   attention without 1/sqrt(head size) answers rounding with large changes, and transformers' softmax and norms are in float
   whatever the model is in. Sums in double (ref) come to 1.8e-5 of the exact gradient and 2.3e-5 of the file's; PyTorch in
   float to 7.4e-5. */
static double gradient_bound(const golden *g, const apti_param *p)
{
    bool known = strstr(g->dir, "t5-gated-untied") != NULL && strcmp(p->name, "lora_B.decoder.block.0.layer.0.SelfAttention.q") == 0;
#ifdef __FAST_MATH__                             /* the compiler reorders sums (with -fno-associative-math all is as below) */
    return known ? 4e-5 : strstr(g->dir, "t5-gated-untied") != NULL ? 3e-5 : 2e-5;
#endif
#ifdef APT_TEST_CUDA                             /* sums in another order: A's gradients answer, too: 2.2e-5 */
    known = known || (strstr(g->dir, "t5-gated-untied") != NULL && strncmp(p->name, "lora_A.", 7) == 0 &&
                      strstr(p->name, "SelfAttention.q") != NULL);
#endif
    return known ? 3e-5 : 2e-5;
}

static void check_gradients(const golden *g, const apt_model *model, bool adapters)
{
    const double whole = gradient_norm(model);
    int32_t seen = 0;
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        const bool adapter = strncmp(p->name, "lora_", 5) == 0;
        if (p->grad == NULL || adapter != adapters) continue;
        if (!expect_vanishing(g, p, whole)) expect_golden(g, "grad.", p->name, p->grad, apti_param_count(p), gradient_bound(g, p));
        seen++;
    }
    assert_true(seen > 4);
}

static void forward_backward(apt_trainer *t, golden *g, uint32_t mode)
{
    assert_int_equal(apti_forward(t->pass, &g->batch, APTI_PASS_KEEP | mode), APT_OK);
    apti_task_loss(t->pass, true, 1.0f);
}

static apt_trainer *golden_trainer(apt_model *model, apt_method method, int32_t adapt)
{
    apt_trainer *t = NULL;
    apt_train_desc desc = APT_ZERO;
    desc.method = method;
    desc.steps = 10;
    desc.rank = 4;
    desc.scale = 2.0f;
    desc.adapt = adapt;
    if (apt_trainer_create(model, &desc, &t) != APT_OK) fail_msg("%s", apt_error(model->ctx));
    return t;
}

static void check_dense(const char *name, const char *kernels)
{
    golden g;
    golden_open(&g, name, kernels);
    apt_model *model = golden_model(&g);
    apt_trainer *t = golden_trainer(model, APT_METHOD_FULL, 0);
    forward_backward(t, &g, APTI_PASS_FULL | APTI_PASS_ALL_ROWS);
    check_forward(&g, model, t->pass, "dense.");
    apti_backward(t->pass);
    apti_sync(t->ctx);
    check_gradients(&g, model, false);
    apti_zero_gradients(t);
    forward_backward(t, &g, APTI_PASS_FULL);                       /* the last layer on first tokens only: the same numbers */
    apti_backward(t->pass);
    apti_sync(t->ctx);
    check_gradients(&g, model, false);
    golden_close(&g);
}

static void set_adapters(golden *g, apt_model *model)
{
    for (int32_t i = 0; i < model->param_count; i++) {
        apti_param *p = &model->params[i];
        int64_t n = 0;
        if (strncmp(p->name, "lora_", 5) != 0 || apti_param_count(p) == 0 || apti_tensors_find(g->set, p->name) == NULL) continue;
        float *x = golden_floats(g, p->name, &n);
        assert_int_equal(apt_model_set(model, p->name, x, n), APT_OK);
        free(x);
    }
}

/* Sums, salience and kurtosis at the inputs of one output or down projection. */
static void check_projection(golden *g, apt_trainer *t, int32_t l, int32_t linear)
{
    const apt_model *m = t->model;
    const apti_param *w = m->layers[l].slot[2 * linear];
    if (w == NULL) return;                                         /* self attention of a decoder has no FFN behind it */
    const bool heads = linear == APTI_OUTPUT;
    const int64_t n = w->cols, at = heads ? apti_probe_head(m, l) : apti_probe_neuron(m, l), dh = m->config.head_dim;
    char name[128];
    float s[2048], *values = (float *)malloc((size_t)apti_param_count(w) * sizeof(float));
    snprintf(name, sizeof(name), "%.*s", (int)(strlen(w->name) - strlen(".weight")), w->name);
    expect_golden(g, "sum_abs_act.", name, t->probe.act + at, n, 1e-5);
    expect_golden(g, "sum_abs_grad.", name, t->probe.grad + at, n, 2e-5);
    assert_int_equal(apt_salience_finish(s, t->probe.act + at, t->probe.grad + at, n, 1), APT_OK);
    expect_golden(g, "salience_per_feature.", name, s, n, 1e-4);
    apti_param_get(m, w, values);
    /* the size of a feature cancels, but one that never fires (ReLU) has kurtosis 0 */
    assert_int_equal(apt_unit_kurtosis(s, t->probe.act + at, values, n, w->rows, n, 1), APT_OK);
    for (int64_t i = 0; i < n; i++)
        if (t->probe.act[at + i] == 0) {                           /* constant input: 0 by method.md, where the file has 0/0 - 3 */
            assert_true(s[i] == 0);
            s[i] = -3;
        }
    expect_golden(g, "kurtosis_per_feature.", name, s, n, 1e-4);
    if (heads) {
        assert_int_equal(apt_salience_finish(s, t->probe.act + at, t->probe.grad + at, n / dh, dh), APT_OK);
        expect_golden(g, "salience_per_head.", name, s, n / dh, 1e-4);
        assert_int_equal(apt_unit_kurtosis(s, t->probe.sum + at, values, n, w->rows, n / dh, dh), APT_OK);
        expect_golden(g, "kurtosis_per_head.", name, s, n / dh, 1e-4);
    }
    free(values);
}

static void check_importance(const golden *g, const apt_model *model)
{
    for (int32_t k = 0; k < apti_sites(model); k++) {
        const apti_param *a = apti_site_of(model, k).a, *b = apti_site_of(model, k).b;
        float importance = 0;
        if (a->rows == 0) continue;
        const apt_adapter view = apti_adapter_view(model, a->value, b->value, a, b);
        assert_int_equal(apt_adapter_importance(&view, b->grad, &importance), APT_OK);
        expect_golden(g, "adapter_importance.", a->name + strlen("lora_A."), &importance, 1, 1e-4);
    }
}

static void check_adapted(const char *name, const char *kernels)
{
    golden g;
    golden_open(&g, name, kernels);
    apt_model *model = golden_model(&g);
    apt_trainer *t = golden_trainer(model, APT_METHOD_LORA, 0);
    set_adapters(&g, model);
    t->pass->probe = &t->probe;
    forward_backward(t, &g, APTI_PASS_ALL_ROWS);
    check_forward(&g, model, t->pass, "lora.");
    apti_backward(t->pass);
    apti_sync(t->ctx);
    check_gradients(&g, model, true);
    for (int32_t l = 0; l < model->config.layers; l++) {
        check_projection(&g, t, l, APTI_OUTPUT);
        check_projection(&g, t, l, APTI_DOWN);
    }
    check_importance(&g, model);
    golden_close(&g);
}

/* One more adapter, on the LM head (head.safetensors): of tied and untied heads, with and without a scale in front. */
static void check_head(const char *name, const char *kernels)
{
    golden g;
    char path[800];
    apti_tensors *head = NULL;
    golden_open(&g, name, kernels);
    test_join(path, sizeof path, g.dir, "head.safetensors");
    if (apti_tensors_open(g.ctx, path, &head) != APT_OK) fail_msg("%s", apt_error(g.ctx));
    apt_model *model = golden_model(&g);
    apt_trainer *t = golden_trainer(model, APT_METHOD_LORA, APT_ADAPT_QUERY | APT_ADAPT_VALUE | APT_ADAPT_UP | APT_ADAPT_HEAD);
    set_adapters(&g, model);
    apti_tensors_close(g.set);
    g.set = head;
    set_adapters(&g, model);
    forward_backward(t, &g, 0);
    const float loss = (float)apti_mean_loss(t->pass);
    expect_golden(&g, "", "loss", &loss, 1, 1e-5);
    check_lm_logits(&g, model, t->pass, "");
    apti_backward(t->pass);
    apti_sync(t->ctx);
    check_gradients(&g, model, true);
    check_importance(&g, model);
    golden_close(&g);
}

/* Inference shares its buffers between layers and runs other code paths: the logits must be the same. */
static void check_inference(const char *name, const char *kernels)
{
    golden g;
    float logits[8192];
    golden_open(&g, name, kernels);
    apt_model *model = golden_model(&g);
    apt_output out = APT_ZERO;
    out.logits = logits;
    out.logits_capacity = 8192;
    assert_int_equal(apt_model_forward(model, &g.batch, &out), APT_OK);
    const float loss = (float)out.loss;
    expect_golden(&g, "dense.", "loss", &loss, 1, 1e-5);
    if (model->config.task == APT_TASK_LM)
        expect_rows(&g, "dense.logits", logits, model->config.vocab, g.batch.target_offsets != NULL ? g.target_offsets : g.offsets, g.target_length);
    else if (model->config.task != APT_TASK_SPAN) expect_golden(&g, "dense.", "logits", logits, out.logits_count, 1e-5);
    golden_close(&g);
}

/* Continuations of two prompts, each alone, token for token: greedy, three beams, and beams that an end token stops. Rows of the
   file hold 20 new tokens, -1 behind an end. */
static void expect_texts(const golden *g, apt_model *model, const char *name, const apt_generate_desc *how)
{
    const apti_tensor_view *prompt = apti_tensors_find(g->set, "generate.prompt"), *texts = apti_tensors_find(g->set, name);
    const int32_t length = (int32_t)prompt->shape[1], most = (int32_t)texts->shape[1], offsets[2] = {0, length};
    const int32_t *expected = golden_ints(g, name);
    int32_t tokens[32], made = 0;
    apt_generate_desc d = *how;
    assert_true(most <= 32);
    d.max_tokens = most;
    for (int64_t s = 0; s < prompt->shape[0]; s++) {
        apt_batch b = APT_ZERO;
        b.sequences = 1;
        b.offsets = offsets;
        b.tokens = golden_ints(g, "generate.prompt") + s * length;
        if (apt_generate(model, &b, &d, tokens, &made) != APT_OK) fail_msg("%s", apt_error(g->ctx));
        for (int32_t i = 0; i < most; i++)
            if ((i < made ? tokens[i] : -1) != expected[s * most + i])
                fail_msg("%s of %s: text %d token %d is %d, expected %d", name, g->dir, (int)s, (int)i, i < made ? (int)tokens[i] : -1,
                         (int)expected[s * most + i]);
    }
}

static void check_generation(const char *name, const char *kernels)
{
    golden g;
    apt_generate_desc how = APT_ZERO;
    golden_open(&g, name, kernels);
    apt_model *model = golden_model(&g);
    for (int32_t slow = 0; slow < 2; slow++) {
        how.disable_cache = slow;
        how.beams = 0;
        expect_texts(&g, model, "generate.greedy", &how);
        how.beams = 3;
        how.length_penalty = 1.0f;
        expect_texts(&g, model, "generate.beam3", &how);
        const int32_t end = model->config.end_id;
        model->config.end_id = golden_ints(&g, "generate.stop")[0];
        expect_texts(&g, model, "generate.beam3_stop", &how);
        model->config.end_id = end;
    }
    golden_close(&g);
}

/* config_old.json says the same in the spelling of older files. */
static void check_old_spelling(const char *name, const char *kernels)
{
    static const char *const files[][2] = {{"model.safetensors", "model.safetensors"}, {"config_old.json", "config.json"}};
    golden g;
    char dir[700], path[800];
    golden_open(&g, name, kernels);
    test_dir(dir, sizeof dir);
    for (int32_t i = 0; i < 2; i++) {
        size_t bytes = 0;
        char *data = test_read_file(test_join(path, sizeof path, g.dir, files[i][0]), &bytes);
        assert_non_null(data);
        test_write_file(test_join(path, sizeof path, dir, files[i][1]), data, bytes);
        free(data);
    }
    snprintf(g.dir, sizeof g.dir, "%s", dir);
    apt_model *model = golden_model(&g);
    float logits[8192];
    apt_output out = APT_ZERO;
    out.logits = logits;
    out.logits_capacity = 8192;
    assert_int_equal(apt_model_forward(model, &g.batch, &out), APT_OK);
    expect_rows(&g, "dense.logits", logits, model->config.vocab, g.batch.target_offsets != NULL ? g.target_offsets : g.offsets, g.target_length);
    golden_close(&g);
    test_remove(dir);
}

static const char *const golden_cases[] = {"bert", "roberta", "roberta-regression", "roberta-qa", "t5-relu-tied", "t5-gated-untied", "llama", "llama-gqa-tied",
                                           "qwen2", "llama3-rope", "t5-small-case"};
enum { TIED_T5 = 4, FIRST_GENERATED = 8 };         /* from the latter on the files hold continuations, too */

/* Every case on every kernel table that this processor has; case 1 needs the shared data. */
static void run_cases(void (*check)(const char *, const char *), int32_t which)
{
    const apti_kernels *tables[8];
    const int32_t n = apti_kernels_list(tables, 8);
    for (int32_t i = TEST_FIRST_TABLE(n); i < n; i++) check(golden_cases[which], tables[i]->name);
}

#define GOLDEN_TESTS(which)                                                                                     \
    static void test_dense_##which(void **state) { (void)state; run_cases(check_dense, which); }                \
    static void test_adapted_##which(void **state) { (void)state; run_cases(check_adapted, which); }            \
    static void test_inference_##which(void **state) { (void)state; run_cases(check_inference, which); }
GOLDEN_TESTS(0)
GOLDEN_TESTS(1)
GOLDEN_TESTS(2)
GOLDEN_TESTS(3)
GOLDEN_TESTS(4)
GOLDEN_TESTS(5)
GOLDEN_TESTS(6)
GOLDEN_TESTS(7)
GOLDEN_TESTS(8)
GOLDEN_TESTS(9)
GOLDEN_TESTS(10)

static void test_head(void **state)
{
    (void)state;
    for (int32_t i = 0; i < (int32_t)(sizeof golden_cases / sizeof golden_cases[0]); i++)
        if (i == TIED_T5 || i >= FIRST_GENERATED) run_cases(check_head, i);
}

static void test_generation(void **state)
{
    (void)state;
    for (int32_t i = FIRST_GENERATED; i < (int32_t)(sizeof golden_cases / sizeof golden_cases[0]); i++) run_cases(check_generation, i);
}

static void test_old_spelling(void **state)
{
    (void)state;
    for (int32_t i = FIRST_GENERATED; i < (int32_t)(sizeof golden_cases / sizeof golden_cases[0]); i++) check_old_spelling(golden_cases[i], NULL);
}

#define GOLDEN_ENTRIES(which) cmocka_unit_test(test_dense_##which), cmocka_unit_test(test_adapted_##which), cmocka_unit_test(test_inference_##which)
int main(void)
{
    const struct CMUnitTest tests[] = {GOLDEN_ENTRIES(0), GOLDEN_ENTRIES(1), GOLDEN_ENTRIES(2), GOLDEN_ENTRIES(3),
                                       GOLDEN_ENTRIES(4), GOLDEN_ENTRIES(5), GOLDEN_ENTRIES(6), GOLDEN_ENTRIES(7),
                                       GOLDEN_ENTRIES(8), GOLDEN_ENTRIES(9), GOLDEN_ENTRIES(10),
                                       cmocka_unit_test(test_generation), cmocka_unit_test(test_old_spelling), cmocka_unit_test(test_head)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
