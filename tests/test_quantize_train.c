/* Training with quantised weights: a trainer's passes are those of the model that merging and quantising make, bit for bit; its
   gradients are the straight-through ones; runs are the same for any number of threads, cut or whole, and when memory runs out.
   build: cc -std=c11 -O2 tests/test_quantize_train.c -o test_quantize_train -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"
#include "train_test.h"

static const int32_t kinds[2] = {APT_QUANT_INT8, APT_QUANT_INT4};

/* ||a - b|| / ||b||; no norm at all: 0 when both are zero. */
static double relative(const float *a, const float *b, int64_t n)
{
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return size > 0 ? sqrt(difference / size) : difference;
}

enum { CONFIGS = 5 + TEST_DECODERS };
static apt_config config_of(int32_t which)
{
    static const apt_task_kind tasks[] = {APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN, APT_TASK_MLM, APT_TASK_CLASSIFY};
    apt_config c = which >= 5 ? test_decoder(which - 5) : test_config(which % 2 ? APT_ROBERTA : APT_BERT, tasks[which]);
    c.hidden = 40;                                                    /* more than one group of int4, and a rest */
    c.neurons = 36;
    return c;
}

/* A run of `steps`: LoRA on all maps, all weights, or APT to 40 % with growth and a teacher. */
static apt_train_desc desc_of(apt_method method, int32_t kind, int64_t steps)
{
    apt_train_desc d = APT_ZERO;
    d.method = method;
    d.steps = steps;
    d.quantize = kind;
    d.learning_rate = 5e-3f;
    d.rank = 2;
    d.adapt = 63;
    d.seed = 3;
    if (method != APT_METHOD_APT) return d;
    d.target_sparsity = 0.4f;
    d.prune_begin = 1;
    d.prune_end = 5;
    d.update_frequency = 2;
    d.min_hidden = 8;
    d.distill_pred = 0.1f;
    d.distill_layer = 0.9f;
    return d;
}

/* ---- what is trained is what is deployed ----------------------------------------------------------------------------- */

static void quantize(apt_model *m, int32_t kind)
{
    apt_quantize_desc d = APT_ZERO;
    d.kind = kind;
    assert_ok(m->ctx, apt_model_quantize(m, &d));
}

static void assert_same_logits(apt_model *m, const apt_batch *b, const float *expected, const char *what)
{
    int64_t n;
    float *logits = test_logits(m, b, &n, NULL, 0);
    for (int64_t i = 0; i < n; i++)
        if (memcmp(&logits[i], &expected[i], sizeof(float)) != 0)
            fail_msg("%s: logit %d is %.9g, expected %.9g", what, (int)i, (double)logits[i], (double)expected[i]);
    free(logits);
}

/* Trains, then merges, ends the trainer, quantises: the evaluation of the trainer and the quantised model give the same bits.
   Returns how far the float model is from both. */
static double deploy(apt_model *m, const apt_train_desc *d)
{
    test_batch b;
    apt_output out = APT_ZERO;
    apt_step_info info;
    int64_t n, n2;
    float difference = 1;
    apt_trainer *t = test_trainer(m, d);
    for (int64_t i = 0; i < d->steps; i++) {
        test_batch_at(&b, &m->config, 5, i, 5);
        assert_ok(m->ctx, apt_model_forward(m, &b.b, &out));
        assert_ok(m->ctx, apt_trainer_step(t, &b.b, &info));
        if (out.loss != info.task_loss)                       /* the loss that is trained is that of the quantised model */
            fail_msg("step %d: loss %.17g, evaluated before it %.17g", (int)i, info.task_loss, out.loss);
    }
    assert_ok(m->ctx, apt_trainer_finish(t));
    float *logits = test_logits(m, &b.b, &n, NULL, 0);
    assert_ok(m->ctx, apt_model_merge(m, &b.b, &difference));
    assert_true(difference == 0);
    assert_same_logits(m, &b.b, logits, "merged");
    apt_trainer_destroy(t);
    float *plain = test_logits(m, &b.b, &n2, NULL, 0);
    assert_int_equal(n, n2);
    quantize(m, d->quantize);
    assert_same_logits(m, &b.b, logits, "quantised");
    const double error = relative(plain, logits, n);
    free(plain);
    free(logits);
    return error;
}

static void test_deployed(void **state)
{
    (void)state;
    for (int32_t which = 0; which < CONFIGS; which++)
        for (int32_t k = 0; k < 2; k++)
            for (int32_t method = APT_METHOD_APT; method <= APT_METHOD_FULL; method++) {
                test_log log;
                apt_ctx *ctx = test_context(1 + which % 2, &log);
                const apt_config c = config_of(which);
                apt_model *m = test_model(ctx, &c, 3);
                test_randomise(m, 5);
                const apt_train_desc d = desc_of((apt_method)method, kinds[k], 7);
                const double error = deploy(m, &d);
                if (method == APT_METHOD_APT) assert_true(m->config.hidden < c.hidden || m->shape[0].neurons < c.neurons);
                if (!(error > 1e-4)) fail_msg("model %d: the float model is the quantised one (error %g)", (int)which, error);
                apt_destroy(ctx);
            }
}

/* The same with checkpoints of transformers, and with frozen weights that are stored in 16 bits. */
static void test_deployed_files(void **state)
{
    (void)state;
    static const char *const names[] = {"bert", "roberta-qa", "t5-relu-tied", "t5-small-case", "llama", "llama3-rope", "qwen2"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        for (int32_t k = 0; k < 4; k++) {
            test_log log;
            char dir[64];
            apt_model *m = NULL;
            apt_load_desc load = APT_ZERO;
            apt_ctx *ctx = test_context(2, &log);
            snprintf(dir, sizeof dir, "tests/golden/%s", names[i]);
            load.weights = k < 2 ? APT_F32 : i % 2 == 0 ? APT_BF16 : APT_F16;
            assert_ok(ctx, apt_model_load(ctx, dir, &load, &m));
            const apt_train_desc d = desc_of(k % 2 ? APT_METHOD_LORA : APT_METHOD_APT, kinds[k % 2], 7);
            (void)deploy(m, &d);
            apt_destroy(ctx);
        }
}

/* Single weights that are 0 stay 0 in the integers, also where an adapter lies over them. */
static void test_deployed_masks(void **state)
{
    (void)state;
    for (int32_t method = APT_METHOD_APT; method <= APT_METHOD_FULL; method++)
        for (int32_t k = 0; k < 2; k++) {
            test_log log;
            apt_ctx *ctx = test_context(2, &log);
            const apt_config c = config_of(0);
            apt_model *m = test_model(ctx, &c, 3);
            test_randomise(m, 5);
            const apt_train_desc d = desc_of((apt_method)method, kinds[k], 7);
            apt_trainer *t = test_trainer(m, &d);
            apt_magnitude_desc how = APT_ZERO;
            how.sparsity = 0.5;
            assert_ok(ctx, apt_trainer_magnitude(t, &how, NULL));
            apt_trainer_destroy(t);                                   /* the masks belong to the model */
            assert_ok(ctx, apt_model_merge(m, NULL, NULL));
            (void)deploy(m, &d);
            apt_destroy(ctx);
        }
}

/* ---- gradients -------------------------------------------------------------------------------------------------------- */

/* One map at the quantised point. The float function of which differences are taken is
       sum of dy * ((x + cx) (W + s B A + cw)^T),   cx = x' - x,  cw = W' - (W + s B A) constant,
   in double; x' and W' come from the functions on raw arrays. */
typedef struct point {
    int64_t rows, in, out, rank;
    float scale;
    float *x, *w, *a, *b, *dy;
    double *cx, *cw;
} point;

static double entry(const point *p, int64_t o, int64_t i)
{
    double sum = p->w[o * p->in + i];
    for (int64_t k = 0; k < p->rank; k++) sum += (double)p->scale * p->b[o * p->rank + k] * p->a[k * p->in + i];
    return sum;
}

static double function(const point *p)
{
    double sum = 0;
    for (int64_t o = 0; o < p->out; o++)
        for (int64_t i = 0; i < p->in; i++) {
            const double w = entry(p, o, i) + p->cw[o * p->in + i];
            for (int64_t r = 0; r < p->rows; r++)
                sum += (double)p->dy[r * p->out + o] * ((double)p->x[r * p->in + i] + p->cx[r * p->in + i]) * w;
        }
    return sum;
}

static void freeze_rounding(point *p, apt_ctx *ctx, int32_t kind)
{
    int8_t q[64];
    float *merged = (float *)test_memory_block((size_t)(p->out * p->in) * sizeof(float));
    float *scale = (float *)test_memory_block((size_t)apt_quant_scales(kind, p->out, p->in) * sizeof(float));
    for (int64_t i = 0; i < p->out * p->in; i++) merged[i] = (float)entry(p, i / p->in, i % p->in);
    assert_ok(ctx, apt_quant_absmax(ctx, kind, scale, merged, p->in, p->out, p->in));
    assert_ok(ctx, apt_fake_quantize(ctx, kind, merged, p->in, scale, merged, p->in, p->out, p->in));
    p->cx = (double *)test_memory_block((size_t)(p->rows * p->in) * sizeof(double));
    p->cw = (double *)test_memory_block((size_t)(p->out * p->in) * sizeof(double));
    for (int64_t i = 0; i < p->out * p->in; i++) p->cw[i] = (double)merged[i] - entry(p, i / p->in, i % p->in);
    for (int64_t r = 0; r < p->rows; r++) {
        const double s = (double)apti_quant_narrow_ref(q, NULL, 0, p->x + r * p->in, p->in, false);
        for (int64_t i = 0; i < p->in; i++) p->cx[r * p->in + i] = s * q[i] - (double)p->x[r * p->in + i];
    }
    free(merged);
    free(scale);
}

static void check_differences(const point *p, const char *what, float *variable, int64_t n, const float *gradient)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs((double)gradient[i]));
    assert_true(most > 0);
    for (int64_t i = 0; i < n; i += 1 + n / 61) {
        const float at = variable[i], h = 0.0625f;
        variable[i] = at + h;
        const double up = function(p), high = (double)variable[i];
        variable[i] = at - h;
        const double slope = (up - function(p)) / (high - (double)variable[i]);
        variable[i] = at;
        if (fabs(slope - (double)gradient[i]) > 2e-5 * most)
            fail_msg("%s[%d]: %.9g, by differences %.9g (largest %.3g)", what, (int)i, (double)gradient[i], slope, most);
    }
}

static void test_map_gradients(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 2; k++)
        for (int32_t full = 0; full < 2; full++)
            for (int32_t linear = 0; linear < APTI_GATE; linear++) {
                test_log log;
                apt_ctx *ctx = test_context(2, &log);
                const apt_config c = config_of(0);
                apt_model *m = test_model(ctx, &c, 3);
                test_batch b;
                apt_train_desc d = desc_of(full ? APT_METHOD_FULL : APT_METHOD_LORA, kinds[k], 4);
                apt_trainer *t = test_trainer(m, &d);
                test_randomise(m, 7);
                test_batch_at(&b, &c, 5, 0, 5);
                assert_ok(ctx, apti_forward(t->pass, &b.b, APTI_PASS_KEEP | (full ? APTI_PASS_FULL : 0u)));
                const apti_site site = apti_site_of(m, APTI_LINEARS + linear);
                point p = {9, site.w->cols, site.w->rows, site.a->rows, m->scale, NULL, NULL, site.a->value, site.b->value, NULL,
                           NULL, NULL};
                p.w = test_parameter(m, site.w->name, NULL);
                p.x = (float *)test_memory_block((size_t)(p.rows * p.in) * sizeof(float));
                p.dy = (float *)test_memory_block((size_t)(p.rows * p.out) * sizeof(float));
                float *dx = (float *)test_memory_block((size_t)(p.rows * apti_ld(p.in)) * sizeof(float));
                apt_rng rng = apt_rng_make(1, 2);
                for (int64_t i = 0; i < p.rows * p.in; i++) p.x[i] = apt_rng_normal(&rng);
                for (int64_t i = 0; i < p.rows * p.out; i++) p.dy[i] = apt_rng_normal(&rng);
                freeze_rounding(&p, ctx, kinds[k]);
                apti_map_backward(t->pass, 1, linear, dx, false, p.dy, p.out, p.x, p.in, p.rows);
                for (int64_t r = 1; r < p.rows; r++)
                    memmove(dx + r * p.in, dx + r * apti_ld(p.in), (size_t)p.in * sizeof(float));
                check_differences(&p, "dx", p.x, p.rows * p.in, dx);
                if (full) check_differences(&p, "dW", p.w, p.out * p.in, site.w->grad);
                else {
                    check_differences(&p, "dA", p.a, p.rank * p.in, site.a->grad);
                    check_differences(&p, "dB", p.b, p.out * p.rank, site.b->grad);
                }
                free(p.w), free(p.x), free(p.dy), free(p.cx), free(p.cw), free(dx);
                apt_destroy(ctx);
            }
}

/* Values of `from` for `to`, but with W' (where an adapter lies: W' - s B A) for the weights that `from` rounds. */
static void copy_rounded(apt_model *to, const apt_model *from)
{
    for (int32_t i = 0; i < from->param_count; i++) {
        const apti_param *p = &from->params[i];
        if (apti_param_count(p) == 0) continue;
        float *values = test_parameter(from, p->name, NULL);
        assert_ok(to->ctx, apt_model_set(to, p->name, values, apti_param_count(p)));
        free(values);
    }
    for (int32_t s = 0; s < apti_layer_sites(from); s++) {
        const apti_site site = apti_site_of(from, s);
        if (site.w == NULL || site.w->rounded.data == NULL) continue;
        const int64_t n = apti_param_count(site.w);
        float *values = (float *)test_memory_block((size_t)n * sizeof(float));
        float *adapter = (float *)calloc((size_t)n, sizeof(float));
        assert_non_null(adapter);
        apti_quant_get(from->ctx, values, &site.w->rounded);
        const apt_adapter view = apti_adapter_view(from, site.a->value, site.b->value, site.a, site.b);
        assert_ok(to->ctx, apt_adapter_merge(&view, adapter, site.w->cols));
        for (int64_t i = 0; i < n; i++) values[i] -= adapter[i];
        assert_ok(to->ctx, apt_model_set(to, site.w->name, values, n));
        free(values);
        free(adapter);
    }
}

/* ||difference|| / ||gradient|| over everything that is trained in the layers. */
static double gradient_error(const apt_model *a, const apt_model *b)
{
    double difference = 0, size = 0;
    for (int32_t i = 0; i < a->param_count; i++) {
        const apti_param *p = &a->params[i], *q = &b->params[i];
        if (!apti_is_trained(p) || p->layer < 0) continue;
        for (int64_t j = 0; j < apti_param_count(p); j++) {
            difference += ((double)p->grad[j] - (double)q->grad[j]) * ((double)p->grad[j] - (double)q->grad[j]);
            size += (double)q->grad[j] * (double)q->grad[j];
        }
    }
    return sqrt(difference / size);
}

/* Gradients of a whole pass against those of a float model with the weights W': only the narrowing of activations is left between
   them. Against one with the weights W int4 is far off. */
static void test_pass_gradients(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 4; k++) {
        double worst = 0, sum = 0, other = 0;
        for (int32_t which = 0; which < CONFIGS; which++) {
            test_log log;
            apt_ctx *ctx = test_context(1, &log);
            apt_config c = config_of(which);
            test_batch b;
            c.init_range = which == 5 || which == 6 ? 1.0f : 0.15f;     /* T5's are divided by roots of sizes */
            apt_model *m = test_model(ctx, &c, 3), *rounded = test_model(ctx, &c, 3), *plain = test_model(ctx, &c, 3);
            apt_train_desc d = desc_of(k < 2 ? APT_METHOD_LORA : APT_METHOD_FULL, kinds[k % 2], 4);
            d.accumulate = 2;                                         /* gradients are still there behind a call */
            apt_trainer *t = test_trainer(m, &d);
            d.quantize = APT_QUANT_NONE;
            apt_trainer *r = test_trainer(rounded, &d), *p = test_trainer(plain, &d);
            apt_rng rng = apt_rng_make(4, 4);
            for (int32_t s = 0; s < apti_layer_sites(m) && k < 2; s++) {
                const apti_site site = apti_site_of(m, s);
                for (int64_t i = 0; i < apti_param_count(site.b); i++) site.b->value[i] = 0.02f * apt_rng_normal(&rng);
            }
            m->stale = APTI_STALE_ALL;
            copy_rounded(plain, m);
            test_batch_at(&b, &c, 5, 0, 20);
            assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
            copy_rounded(rounded, m);
            assert_ok(ctx, apt_trainer_step(r, &b.b, NULL));
            assert_ok(ctx, apt_trainer_step(p, &b.b, NULL));
            const double error = gradient_error(m, rounded);
            sum += error;
            other += gradient_error(m, plain);
            worst = fmax(worst, error);
            apt_destroy(ctx);
        }
        print_message("    %s, %s: gradients are %.3f off (the worst model %.3f), with W for W' %.3f\n", k < 2 ? "LoRA" : "full",
                      apt_quant_kind_name(kinds[k % 2]), sum / CONFIGS, worst, other / CONFIGS);
        assert_true(worst < 0.1 && (k % 2 == 0 || other > 4 * sum));
    }
}

/* ---- runs -------------------------------------------------------------------------------------------------------------- */

/* An APT run of 24 steps with everything in it that turns to integers at step 5, in the middle of a decision's decay. */
static plan qat_plan(int32_t which, int32_t kind)
{
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.c = config_of(which);
    p.c.neurons = 20;
    p.d.quantize = kind;
    p.d.quantize_begin = 5;
    p.d.distill_pred = 0.1f;
    p.d.distill_layer = 0.9f;
    return p;
}

static void test_threads(void **state)
{
    (void)state;
    static const int32_t threads[3] = {2, 3, 8}, which[4] = {0, 3, 6, 9};
    for (int32_t w = 0; w < 4; w++) {
        live a, b;
        plan p = qat_plan(which[w], kinds[w % 2]);
        p.sequences = 20;
        p.c.hidden = 70;
        if (w == 3) p.d.method = APT_METHOD_FULL;
        const uint64_t sum = run_all(&a, &p);
        for (int32_t i = 0; i < 3; i++) {
            p.threads = threads[i];
            const uint64_t other = run_all(&b, &p);
            assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "threads");
            if (other != sum) fail_msg("model %d: %d threads give other weights", (int)which[w], (int)p.threads);
            stop(&b);
        }
        stop(&a);
    }
}

/* Before quantize_begin nothing differs from a run without it, behind it everything does. */
static void test_begin(void **state)
{
    (void)state;
    live a, b;
    plan p = qat_plan(0, APT_QUANT_INT4);
    (void)run_all(&a, &p);
    p.d.quantize = APT_QUANT_NONE;
    p.d.quantize_begin = 0;
    (void)run_all(&b, &p);
    assert_same_trace(&a.tr, &b.tr, 0, 10, "in front of quantize_begin");
    for (int64_t i = 10; i < micro_batches(&p); i++) assert_true(a.tr.sum[i] != b.tr.sum[i]);
    stop(&a);
    stop(&b);
}

static void test_resume(void **state)
{
    (void)state;
    /* in front of quantize_begin, at it, behind it; inside accumulations, behind decisions and compactions, at the end */
    static const int64_t cut[] = {0, 1, 8, 9, 10, 11, 12, 14, 15, 20, 21, 26, 27, 33, 38, 41, 47};
    static const int64_t some[] = {1, 9, 10, 11, 26, 33};
    resume_everywhere(qat_plan(0, APT_QUANT_INT8), cut, (int32_t)(sizeof cut / sizeof cut[0]), every_event);
    resume_everywhere(qat_plan(6, APT_QUANT_INT4), some, 6, 0);
    resume_everywhere(qat_plan(9, APT_QUANT_INT8), some, 6, 0);
    plan p = qat_plan(1, APT_QUANT_INT4);
    p.d.method = APT_METHOD_FULL;
    resume_everywhere(p, some, 4, 0);
    p.d.method = APT_METHOD_LORA;
    p.d.quantize_begin = 0;
    resume_everywhere(p, some, 2, 0);
}

/* ---- what is refused ------------------------------------------------------------------------------------------------------ */

static void test_refused(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    apt_config c = config_of(0);
    apt_model *m = test_model(ctx, &c, 3);
    apt_trainer *t = NULL;
    apt_estimate_info info;
    apt_train_desc d = desc_of(APT_METHOD_LORA, 7, 6), resolved;
    assert_result(apt_trainer_create(m, &d, &t), APT_E_UNSUPPORTED);
    assert_non_null(strstr(apt_error(ctx), "apt_train_desc.quantize: kind 7 is not known; supported: int8 (1), int4 (2)"));
    assert_result(apt_estimate(ctx, &c, &d, 8, 1, &info), APT_E_UNSUPPORTED);
    d.quantize = -1;
    assert_result(apt_trainer_create(m, &d, &t), APT_E_UNSUPPORTED);
    d.quantize = APT_QUANT_INT8;
    d.quantize_begin = 7;
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "apt_train_desc.quantize_begin is 7; expected 0..6"));
    d.quantize_begin = -1;
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);
    d.quantize = APT_QUANT_NONE;
    d.quantize_begin = 1;
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);        /* of what? */
    d.quantize = APT_QUANT_INT4;
    t = test_trainer(m, &d);
    apt_trainer_query(t, &resolved);
    assert_true(resolved.quantize == APT_QUANT_INT4 && resolved.quantize_begin == 1);
    apt_trainer_destroy(t);
    assert_ok(ctx, apt_model_merge(m, NULL, NULL));
    c.neurons = APT_QUANT_IN + 1;
    c.hidden = 2;
    c.layers = 1;
    apt_model *wide = test_model(ctx, &c, 3);
    assert_result(apt_trainer_create(wide, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "at most 131072 inputs"));
    apt_destroy(ctx);
}

/* A checkpoint goes on with the setting that it was written with, or not at all. */
static void test_checkpoint_refused(void **state)
{
    (void)state;
    char dir[512], path[600];
    live a, b;
    plan p = qat_plan(0, APT_QUANT_INT8);
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "run");
    start(&a, &p, 1);
    run(a.trainer, &p, &a.tr, 0, 3);
    assert_ok(a.ctx, apt_checkpoint_save(a.trainer, path, NULL, 0));
    stop(&a);
    for (int32_t i = 0; i < 3; i++) {
        plan q = p;
        if (i == 0) q.d.quantize = APT_QUANT_INT4;
        if (i == 1) q.d.quantize_begin = 6;
        if (i == 2) q.d.quantize = APT_QUANT_NONE, q.d.quantize_begin = 0;
        start(&b, &q, 1);
        assert_result(apt_checkpoint_load(b.trainer, path, NULL, NULL), APT_E_STATE);
        assert_non_null(strstr(apt_error(b.ctx), i == 1 ? "written with quantize_begin = 5; this trainer has 6"
                                                        : "written with quantize = 1"));
        stop(&b);
    }
    test_remove(dir);
}

/* A weight that is not finite is an error with its name, never a number. */
static void test_not_finite(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(2, &log);
    const apt_config c = config_of(0);
    apt_model *m = test_model(ctx, &c, 3);
    test_batch b;
    apt_output out = APT_ZERO;
    const apt_train_desc d = desc_of(APT_METHOD_LORA, APT_QUANT_INT4, 6);
    apt_trainer *t = test_trainer(m, &d);
    test_batch_at(&b, &c, 5, 0, 5);
    assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
    apti_param *p = apti_param_find(m, "lora_B.bert.encoder.layer.1.output.dense");
    for (int32_t i = 0; i < 3; i++) {
        const float was = p->value[5];
        p->value[5] = apti_float(i == 0 ? 0x7fc00000u : i == 1 ? 0x7f800000u : 0xff800000u);
        m->stale = APTI_STALE_TRAINED;                                /* as an update leaves it */
        assert_result(apt_trainer_step(t, &b.b, NULL), APT_E_NONFINITE);
        assert_non_null(strstr(apt_error(ctx), "layer.1.output.dense.weight (with its adapter) holds NaN or infinity"));
        assert_result(apt_model_forward(m, &b.b, &out), APT_E_NONFINITE);
        p->value[5] = was;
        assert_ok(ctx, apt_model_forward(m, &b.b, &out));
    }
    assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
    apt_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_deployed),      cmocka_unit_test(test_deployed_files),     cmocka_unit_test(test_deployed_masks),
        cmocka_unit_test(test_map_gradients), cmocka_unit_test(test_pass_gradients),     cmocka_unit_test(test_threads),
        cmocka_unit_test(test_begin),         cmocka_unit_test(test_resume),             cmocka_unit_test(test_refused),
        cmocka_unit_test(test_checkpoint_refused), cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests_name("quantize_train", tests, NULL, NULL);
}
