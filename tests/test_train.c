/* The trainer: the same numbers for any number of threads, runs that are cut and resumed bit for bit, pruning to its target,
   events and cancelling, the optimizer against a double reference, descs, distillation, learning.
   build: cc -std=c11 -O2 tests/test_train.c -o test_train -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"
#include "train_test.h"

#ifdef APT_TEST_CUDA
enum { EMULATED = 1 };                           /* the device's threads one after the other, which is slow */
#else
enum { EMULATED = 0 };
#endif

/* ---- the same numbers always --------------------------------------------------------------------------------------- */

static void own_parallel_for(int64_t count, apt_task task, void *arg, void *user)
{
    (*(int64_t *)user)++;
    for (int64_t i = count - 1; i >= 0; i--) task(i, (int32_t)(i % 3), arg);
}

static plan plan_of(int32_t which)
{
    static const apt_task_kind tasks[4] = {APT_TASK_CLASSIFY, APT_TASK_SPAN, APT_TASK_MLM, APT_TASK_REGRESS};
    plan p = apt_plan(which % 2 == 0 ? APT_BERT : APT_ROBERTA, tasks[which % 4]);
    p.sequences = 20;
    p.c.hidden = 40;
    p.c.neurons = 70;
    p.c.vocab = 90;
    if (which >= 4) {
        p.d.method = which == 4 || which == 6 ? APT_METHOD_FULL : APT_METHOD_LORA;
        p.d.target_sparsity = 0;
        p.d.steps = 6;
        p.d.prune_begin = p.d.prune_end = 0;
    }
    return p;
}

static void test_threads(void **state)
{
    (void)state;
    static const int32_t threads[] = {2, 3, 8};
    for (int32_t w = 0; w < 8; w++) {
        plan p = plan_of(w);
        live a, b;
        const uint64_t sum = run_all(&a, &p);
        if (p.d.target_sparsity > 0) {
            const uint32_t expected = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | 1u << APT_EVENT_TEACHER;
            assert_int_equal(all_events(&a.tr) & expected, expected);
        }
        for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
            p.threads = threads[i];
            const uint64_t other = run_all(&b, &p);
#ifdef APTI_THREADS
            assert_int_equal(apt_thread_count(b.ctx), threads[i]);
#endif
            assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "threads");
            if (other != sum) fail_msg("plan %d: %d threads give other weights", w, threads[i]);
            stop(&b);
        }
        stop(&a);
    }
}

static void test_own_threads(void **state)
{
    (void)state;
    plan p = plan_of(0);
    live a, b;
    const uint64_t sum = run_all(&a, &p);
    int64_t calls = 0;
    apt_desc desc = APT_ZERO;
    desc.threads = 3;
    desc.parallel_for = own_parallel_for;
    desc.parallel_user = &calls;
    memset(&b, 0, sizeof b);
    b.ctx = apt_create(&desc);
    b.model = test_model(b.ctx, &p.c, 1);
    p.d.on_event = on_event;
    p.d.user = &b.tr;
    b.trainer = test_trainer(b.model, &p.d);
    run(b.trainer, &p, &b.tr, 0, micro_batches(&p));
    assert_ok(b.ctx, apt_trainer_finish(b.trainer));
    assert_true(calls > 200);
    assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "own threads");
    assert_true(test_model_sum(b.model) == sum);
    stop(&a);
    stop(&b);
}

/* Two runs in one context side by side, and the same seed twice: identical. Another seed: different. */
static void test_seeds(void **state)
{
    (void)state;
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    live a, b;
    const uint64_t sum = run_all(&a, &p);
    memset(&b, 0, sizeof b);
    b.ctx = a.ctx;                                                    /* the finished model lives on beside these two */
    b.model = test_model(b.ctx, &p.c, 1);
    trace second;
    memset(&second, 0, sizeof second);
    apt_model *m2 = test_model(b.ctx, &p.c, 1);
    apt_train_desc d = p.d;
    d.on_event = on_event;
    d.user = &b.tr;
    b.trainer = test_trainer(b.model, &d);
    d.user = &second;
    apt_trainer *t2 = test_trainer(m2, &d);
    for (int64_t i = 0; i < micro_batches(&p); i++) {
        run(b.trainer, &p, &b.tr, i, i + 1);
        run(t2, &p, &second, i, i + 1);
    }
    assert_ok(b.ctx, apt_trainer_finish(b.trainer));
    assert_ok(b.ctx, apt_trainer_finish(t2));
    assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "same context");
    assert_same_trace(&a.tr, &second, 0, micro_batches(&p), "same context");
    assert_true(test_model_sum(b.model) == sum && test_model_sum(m2) == sum && test_model_sum(a.model) == sum);
    stop(&a);
    p.d.seed = 12;
    const uint64_t other = run_all(&a, &p);
    assert_true(other != sum);
    stop(&a);
}

/* ---- cut and resumed ------------------------------------------------------------------------------------------------ */

static void test_resume_classify(void **state)
{
    (void)state;
    /* start, before pruning, inside accumulations, right after decisions (8, 14, ...), mid-decay, recovery, last step */
    static const int64_t cut[] = {0, 1, 2, 7, 8, 9, 10, 11, 13, 14, 16, 19, 20, 21, 26, 31, 32, 33, 38, 40, 46, 47};
    static const int64_t few[] = {9, 21, 33};
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    if (EMULATED) resume_everywhere(p, few, (int32_t)(sizeof few / sizeof few[0]), 0);
    else resume_everywhere(p, cut, (int32_t)(sizeof cut / sizeof cut[0]), every_event);
}

static void test_resume_span(void **state)
{
    (void)state;
    static const int64_t cut[] = {1, 8, 9, 14, 15, 18, 20, 23, 26, 30, 33, 41};
    plan p = apt_plan(APT_ROBERTA, APT_TASK_SPAN);
    p.d.reset_moments = 1;
    p.d.schedule = APT_SCHEDULE_LINEAR;
    p.d.lr_schedule = APT_LR_COSINE;
    p.d.weight_decay = 0.01f;
    resume_everywhere(p, cut, (int32_t)(sizeof cut / sizeof cut[0]), every_event);
}

static void test_resume_others(void **state)
{
    (void)state;
    static const int64_t cut[] = {0, 3, 4, 9};
    plan p = plan_of(6);                                              /* MLM, all weights */
    p.sequences = 5;
    resume_everywhere(p, cut, 4, 0);
    p = plan_of(5);                                                   /* SPAN, LoRA */
    p.sequences = 5;
    resume_everywhere(p, cut, 4, 0);
    static const int64_t apt_cut[] = {8, 9, 14, 21, 26, 33};
    resume_everywhere(apt_plan(APT_BERT, APT_TASK_REGRESS), apt_cut, 6, 0);
    resume_everywhere(apt_plan(APT_ROBERTA, APT_TASK_MLM), apt_cut, 6, 0);
}

/* T5: two stacks, a teacher for both. LLaMA: no teacher by default, which one of them keeps. The heads have adapters, too, but for
   one of each family. */
enum { NO_TEACHER = 3 };
static plan decoder_plan(int32_t which)
{
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.c = test_decoder(which);
    p.c.neurons = 20;
    if (which != 1 && which != NO_TEACHER) p.d.adapt = APT_ADAPT_QUERY | APT_ADAPT_VALUE | APT_ADAPT_UP | APT_ADAPT_HEAD;
    if (which < 2 || which == NO_TEACHER) return p;
    p.d.distill_pred = 0.1f;
    p.d.distill_layer = 0.9f;
    return p;
}

static void test_decoder_threads(void **state)
{
    (void)state;
    for (int32_t w = 0; w < TEST_DECODERS; w++) {
        plan p = decoder_plan(w);
        p.sequences = 20;
        p.c.hidden = 40;
        p.c.neurons = 70;
        p.c.vocab = 90;
        live a, b;
        const uint64_t sum = run_all(&a, &p);
        const uint32_t expected = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | (w != NO_TEACHER ? 1u << APT_EVENT_TEACHER : 0u);
        static const int32_t threads[3] = {2, 3, 8};
        assert_int_equal(all_events(&a.tr) & expected, expected);
        for (int32_t i = 0; i < 3; i++) {
            p.threads = threads[i];
            const uint64_t other = run_all(&b, &p);
            assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "threads");
            if (other != sum) fail_msg("decoder %d: %d threads give other weights", w, (int)p.threads);
            stop(&b);
        }
        stop(&a);
    }
}

static void test_decoder_resume(void **state)
{
    (void)state;
    /* inside accumulations, right after decisions, growth and teachers (8, 14, ...), mid-decay, recovery */
    static const int64_t cut[] = {1, 2, 8, 9, 10, 14, 15, 20, 21, 26, 33, 38, 41};
    for (int32_t w = 0; w < TEST_DECODERS; w += EMULATED ? 2 : 1) {
        plan p = decoder_plan(w);
        if (EMULATED) {
            resume_everywhere(p, &cut[7], 1, 0);
            continue;
        }
        resume_everywhere(p, cut, (int32_t)(sizeof cut / sizeof cut[0]), w == NO_TEACHER ? every_event & ~(1u << APT_EVENT_TEACHER) : every_event);
        p.d.method = APT_METHOD_FULL;
        p.d.target_sparsity = 0;
        p.d.steps = 6;
        p.d.prune_begin = p.d.prune_end = 0;
        resume_everywhere(p, cut, 3, 0);
    }
}

/* ---- checkpoints that do not fit ------------------------------------------------------------------------------------ */

/* A plan that differs in one field is refused, and the message names it. */
#define REFUSE(field, value, word)                      \
    do {                                                \
        plan different = s.p;                           \
        different.field = (value);                      \
        refuse(s.path, &different, APT_E_STATE, word, NULL); \
    } while (0)

static void test_checkpoint_refused(void **state)
{
    (void)state;
    saved_run s;
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    save_run(&s, &p, 15);
    assert_result(apt_checkpoint_load(s.l.trainer, s.path, NULL, NULL), APT_E_STATE);        /* not a fresh trainer */
    assert_result(apt_checkpoint_save(s.l.trainer, NULL, NULL, 0), APT_E_ARGUMENT);
    assert_result(apt_checkpoint_save(s.l.trainer, s.path, NULL, 3), APT_E_ARGUMENT);
    plan q = p;
    q.d.seed = 12;
    refuse(s.path, &q, APT_E_STATE, "seed", &q);
    REFUSE(d.learning_rate, 1e-3f, "learning_rate");
    REFUSE(d.update_frequency, 4, "update_frequency");
    REFUSE(d.target_sparsity, 0.5f, "target_sparsity");
    REFUSE(d.accumulate, 3, "accumulate");
    REFUSE(d.disable_growth, 1, "disable_growth");
    REFUSE(d.disable_distill, 1, "disable_distill");
    REFUSE(d.reset_moments, 1, "reset_moments");
    REFUSE(c.vocab, 38, "vocab");
    REFUSE(c.task, APT_TASK_SPAN, "task");
    REFUSE(c.layers, 3, "layers");
    REFUSE(c.labels, 4, "labels");
    REFUSE(c.neurons, 21, "prunable");
    REFUSE(c.norm_eps, 1e-3f, "norm_eps");
    refuse(s.other, &p, APT_E_IO, s.other, &p);                                              /* no such file */
    drop_run(&s);
}

/* What only decoders have: a run must not go on with other positions, another start token, another head. */
static void test_decoder_checkpoint_refused(void **state)
{
    (void)state;
    saved_run s;
    plan p = decoder_plan(3);
    save_run(&s, &p, 6);
    REFUSE(c.rope.theta, 200, "rope theta");
    REFUSE(c.rope.factor, 8, "rope factor");
    REFUSE(c.rope.low_factor, 2, "rope low factor");
    REFUSE(c.rope.high_factor, 5, "rope high factor");
    REFUSE(c.rope.original_positions, 30, "rope original positions");
    REFUSE(c.rope.interleaved, 0, "rope interleaved");
    REFUSE(c.untied, 1, "untied head");
    REFUSE(c.qkv_bias, 1, "query, key, value biases");
    drop_run(&s);
    p = decoder_plan(0);
    save_run(&s, &p, 6);
    REFUSE(c.start_id, 4, "start_id");
    REFUSE(c.scaled_head, 0, "scaled head");
    REFUSE(c.buckets, 10, "relative position buckets");
    REFUSE(c.max_distance, 9, "relative position distance");
    drop_run(&s);
}

/* One bit wrong anywhere, or an end that is missing: refused, nothing changed, and the good file still loads. */
static void test_checkpoint_damaged(void **state)
{
    (void)state;
    saved_run s;
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    save_run(&s, &p, 15);
    size_t bytes = 0;
    char *data = test_read_file(s.path, &bytes);
    for (int32_t i = 0; i < 24; i++) {
        const size_t place = i < 8 ? (size_t)i * 40 : bytes / 24 * (size_t)i;
        data[place] ^= (char)(1 << i % 8);
        test_write_file(s.other, data, bytes);
        data[place] ^= (char)(1 << i % 8);
        live f;
        start(&f, &p, 1);
        const uint64_t before = test_model_sum(f.model);
        size_t room = 8;
        uint64_t user = 1;
        assert_true(apt_checkpoint_load(f.trainer, s.other, &user, &room) != APT_OK);
        assert_non_null(strstr(apt_error(f.ctx), s.other));
        assert_true(test_model_sum(f.model) == before && user == 1);
        assert_ok(f.ctx, apt_checkpoint_load(f.trainer, s.path, &user, &room));             /* the good one still loads */
        assert_true(user == 7 && room == 8 && test_model_sum(f.model) == test_model_sum(s.l.model));
        stop(&f);
    }
    for (int32_t i = 0; i < 6; i++) {                                                        /* truncated */
        test_write_file(s.other, data, bytes / 6 * (size_t)i + (size_t)i % 3);
        live f;
        start(&f, &p, 1);
        assert_true(apt_checkpoint_load(f.trainer, s.other, NULL, NULL) != APT_OK);
        stop(&f);
    }
    free(data);
    drop_run(&s);
}

/* Too little room for the caller's data: nothing is loaded, and then it can be. */
static void test_checkpoint_room(void **state)
{
    (void)state;
    saved_run s;
    live f;
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    save_run(&s, &p, 15);
    start(&f, &p, 1);
    size_t room = 7;
    uint64_t user = 1;
    const uint64_t before = test_model_sum(f.model);
    assert_result(apt_checkpoint_load(f.trainer, s.path, &user, &room), APT_E_SCRATCH);
    assert_true(test_model_sum(f.model) == before);
    room = 8;
    assert_ok(f.ctx, apt_checkpoint_load(f.trainer, s.path, &user, &room));
    stop(&f);
    drop_run(&s);
}

/* ---- pruning reaches its target ------------------------------------------------------------------------------------- */

typedef struct shape_sum { int32_t heads, neurons, hidden, least_heads, least_neurons; } shape_sum;

static shape_sum shapes_of(const apt_model *m)
{
    apt_config c;
    apt_model_config(m, &c);
    shape_sum s = {0, 0, c.hidden, 1 << 30, 1 << 30};
    for (int32_t l = 0; l < c.layers; l++) {
        s.heads += c.layer[l].heads;
        s.neurons += c.layer[l].neurons;
        s.least_heads = c.layer[l].heads < s.least_heads ? c.layer[l].heads : s.least_heads;
        s.least_neurons = c.layer[l].neurons < s.least_neurons ? c.layer[l].neurons : s.least_neurons;
    }
    return s;
}

static double kept_of(const apt_model *m)
{
    apt_model_info info;
    apt_model_query(m, &info);
    return (double)info.prunable / (double)info.prunable_dense;
}

static void test_target(void **state)
{
    (void)state;
    static const float targets[5] = {0.1f, 0.35f, 0.6f, 0.8f, 0.9f};
    for (int32_t i = 0; i < 15; i++) {
        plan p = apt_plan(i % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i % 4));
        p.d.target_sparsity = targets[i % 5];
        p.d.schedule = i % 3;
        p.d.start_sparsity = i % 3 == 2 ? 0.05f : 0;
        p.d.accumulate = 1;
        p.d.salience_norm = i % 4;
        p.d.disable_kurtosis = i % 7 == 0;
        p.d.min_hidden = 2;
        p.d.disable_distill = i % 2;
        p.d.prune_end = i % 4 == 3 ? 24 : 16;                         /* up to the very last step: finish does the cut */
        live l;
        (void)run_all(&l, &p);
        const shape_sum s = shapes_of(l.model);
        if (kept_of(l.model) > 1 - (double)p.d.target_sparsity + 1e-9)
            fail_msg("plan %d: %g of the parameters are left, target %g", i, kept_of(l.model), 1 - (double)p.d.target_sparsity);
        assert_true(kept_of(l.model) > 0.2 * (1 - (double)p.d.target_sparsity));             /* and it is not far below */
        assert_true(s.least_heads >= 1 && s.least_neurons >= 1 && s.hidden >= 2);
        assert_null(l.model->masks);
        stop(&l);
    }
}

/* Events of one run, checked while they come. */
typedef struct watch {
    int32_t decisions, cuts, grown, teachers, unreached;
    double last_target;
    int64_t params_after, first_cut;
    int32_t heads, neurons, hidden;
    apt_trainer *trainer;
    const test_batch *probe;
    float logits[64];
    int64_t count, rank[16];          /* of every adapter at the last decision */
    bool have;
} watch;

/* At most the upper half of the adapters grew, and none that matters less than one of the lower half. */
static void watch_growth(const watch *w, const apt_model *m, const float *importance)
{
    int32_t adapters = 0, grown = 0;
    for (int32_t k = 0; k < 2 * APTI_LINEARS; k++) adapters += w->rank[k] > 0;
    for (int32_t k = 0; k < 2 * APTI_LINEARS; k++) {
        int32_t better = 0;
        if (apti_rank(m, k / APTI_LINEARS, k % APTI_LINEARS) == w->rank[k]) continue;
        for (int32_t i = 0; i < 2 * APTI_LINEARS; i++) better += w->rank[i] > 0 && importance[i] > importance[k];
        assert_true(w->rank[k] > 0 && better < (adapters + 1) / 2);
        grown++;
    }
    assert_true(adapters > 4 && grown > 0 && grown <= (adapters + 1) / 2);
}

static int watch_event(apt_event *e, void *user)
{
    watch *w = (watch *)user;
    apt_model *m = apt_trainer_model(e->trainer);
    if (e->kind == APT_EVENT_PRUNE) {
        w->decisions++;
        w->unreached += !e->budget_reached;
        assert_true(e->parameters_after <= e->parameters_before);
        if (e->budget_reached) assert_true((double)e->parameters_after <= (1 - e->step->sparsity_target) * (double)m->prunable_dense + 1);
        assert_true(e->step->sparsity_target >= w->last_target);
        test_near_value("sparsity", e->step->sparsity, 1 - (double)e->parameters_after / (double)m->prunable_dense, 1e-9);
        w->last_target = e->step->sparsity_target;
        w->params_after = e->parameters_after;
        w->heads = e->heads;
        w->neurons = e->neurons;
        w->hidden = e->hidden;
        int64_t n = 0;
        float *x = test_logits(m, &w->probe->b, &n, NULL, 0);
        memcpy(w->logits, x, (size_t)n * sizeof(float));
        w->count = n;
        w->have = true;
        free(x);
        for (int32_t k = 0; k < 2 * APTI_LINEARS; k++) w->rank[k] = apti_rank(m, k / APTI_LINEARS, k % APTI_LINEARS);
    }
    if (e->kind == APT_EVENT_GROW) {                                  /* right behind the decision: nothing else has changed */
        int64_t n = 0;
        float *x = test_logits(m, &w->probe->b, &n, NULL, 0);
        assert_true(w->have && n == w->count);
        assert_memory_equal(x, w->logits, (size_t)n * sizeof(float));
        free(x);
        w->grown++;
        assert_true(e->parameters_after > e->parameters_before);
        watch_growth(w, m, e->trainer->importance);
    }
    if (e->kind == APT_EVENT_COMPACT) {
        apt_units u;
        apt_model_units(m, &u);
        w->cuts++;
        if (w->first_cut == 0) w->first_cut = e->step->step;
        assert_true(e->heads == w->heads && e->neurons == w->neurons && e->hidden == w->hidden);
        assert_true(u.heads == w->heads && u.neurons == w->neurons && u.hidden == w->hidden);
        assert_true(e->parameters_after == w->params_after && e->parameters_before > e->parameters_after);
        assert_true(e->bytes_before > 0 && e->bytes_after > 0);
        assert_null(m->masks);
    }
    if (e->kind == APT_EVENT_TEACHER) w->teachers++;
    return 0;
}

/* sum |B dB| of the adapter at every place, by a pass that leaves no trace, as apt_trainer_observe makes it. */
static void plain_importance(apt_trainer *t, const plan *p, int64_t i, double *importance)
{
    test_batch b;
    const apt_step_info info = t->info;
    test_batch_at(&b, &p->c, p->data_seed, i, p->sequences);
    assert_ok(t->ctx, apti_micro_batch(t, &b.b, false));
    apti_sync(t->ctx);
    for (int32_t k = 0; k < apti_sites(t->model); k++) {
        const apti_param *q = apti_site_of(t->model, k).b;
        importance[k] = 0;
        for (int64_t j = 0; j < apti_param_count(q); j++) importance[k] += fabs((double)q->value[j] * (double)q->grad[j]);
    }
    apti_zero_gradients(t);
    t->info = info;
}

/* What growth goes by: avg = beta*avg + (1-beta)*sum |B dB|, of every step up to the first decision. */
static void check_importance(const plan *p)
{
    enum { SITES = 64 };
    double now[SITES], expected[SITES] = {0};
    int32_t adapters = 0;
    live l;
    start(&l, p, 1);
    const double beta = (double)l.trainer->desc.salience_momentum;
    assert_true(apti_sites(l.model) <= SITES && beta > 0);
    for (int64_t i = 0; i < p->d.prune_begin; i++) {
        plain_importance(l.trainer, p, i, now);
        run(l.trainer, p, &l.tr, i, i + 1);
        for (int32_t k = 0; k < apti_sites(l.model); k++) {
            expected[k] = beta * expected[k] + (1 - beta) * now[k];
            test_near_value("importance", (double)l.trainer->importance[k], expected[k], 1e-5 * expected[k]);
            adapters += expected[k] > 0;
        }
    }
    assert_true(adapters > 0);
    stop(&l);
}

static void test_importance(void **state)
{
    (void)state;
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY), q = decoder_plan(2);
    p.d.accumulate = q.d.accumulate = 1;
    p.d.prune_begin = q.d.prune_begin = 4;
    check_importance(&p);
    check_importance(&q);
}

static void test_events(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 3; i++) {
        plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
        p.d.disable_growth = i == 1;
        p.d.growth = i == 2 ? 1.0f : 0.0f;
        test_batch probe;
        test_batch_at(&probe, &p.c, 5, 0, 6);
        watch w;
        memset(&w, 0, sizeof w);
        w.probe = &probe;
        test_log messages;
        apt_ctx *ctx = test_context(1, &messages);
        apt_model *m = test_model(ctx, &p.c, 1);
        p.d.on_event = watch_event;
        p.d.user = &w;
        apt_trainer *t = test_trainer(m, &p.d);
        trace tr;
        memset(&tr, 0, sizeof tr);
        const int64_t adapters = apti_adapter_total(m);
        run(t, &p, &tr, 0, micro_batches(&p));
        assert_int_equal(w.decisions, 5);
        assert_int_equal(w.unreached, 0);
        assert_true(w.cuts >= 3 && w.teachers == 1);
        assert_int_equal(w.first_cut, 7);                             /* masks of the decision at step 4 are gone after 3 steps */
        assert_true(i == 0 ? w.grown > 0 : w.grown == 0);
        if (i == 0) {                                                 /* growth stays within its budget */
            int32_t most = 0;
            for (int32_t l = 0; l < p.c.layers; l++)
                for (int32_t k = 0; k < APTI_LINEARS; k++) most = (int32_t)apti_max_i64(most, apti_rank(m, l, k));
            assert_true(most > 2 && most <= 64 && apti_adapter_total(m) <= 4 * adapters);
        }
        apt_destroy(ctx);
    }
}

/* Only the kinds that may be pruned are; kept counts are multiples; floors hold even when the target does not. */
static void test_kinds_and_rounding(void **state)
{
    (void)state;
    for (int32_t kind = 0; kind < 3; kind++) {
        plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
        p.d.prune = 1 << kind;
        p.d.target_sparsity = 0.3f;
        p.d.accumulate = 1;
        live l;
        (void)run_all(&l, &p);
        const shape_sum s = shapes_of(l.model);
        assert_true(kind == APT_PRUNE_HEADS / 2 ? s.heads < 8 : s.heads == 8);
        assert_true(kind == 1 ? s.neurons < 40 : s.neurons == 40);
        assert_true(kind == 2 ? s.hidden < 16 : s.hidden == 16);
        assert_true(kept_of(l.model) <= 0.7 + 1e-9);
        stop(&l);
    }
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.c.heads = 6;
    p.c.neurons = 32;
    p.d.accumulate = 1;
    p.d.round_heads = 2;
    p.d.round_neurons = 8;
    p.d.round_hidden = 4;
    p.d.min_hidden = 4;
    for (int32_t i = 0; i < 3; i++) {
        p.d.target_sparsity = 0.3f + 0.2f * (float)i;
        live l;
        (void)run_all(&l, &p);
        apt_config c;
        apt_model_config(l.model, &c);
        assert_int_equal(c.hidden % 4, 0);
        for (int32_t k = 0; k < c.layers; k++) {
            assert_int_equal(c.layer[k].heads % 2, 0);
            assert_int_equal(c.layer[k].neurons % 8, 0);
        }
        assert_true(kept_of(l.model) <= 1 - (double)p.d.target_sparsity + 1e-9);
        stop(&l);
    }
    p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);                        /* out of reach: 1 head, 1 neuron, 12 dimensions stay */
    p.d.target_sparsity = 0.97f;
    p.d.min_hidden = 12;
    p.d.accumulate = 1;
    test_batch probe;
    test_batch_at(&probe, &p.c, 5, 0, 6);
    watch w;
    memset(&w, 0, sizeof w);
    w.probe = &probe;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *m = test_model(ctx, &p.c, 1);
    p.d.on_event = watch_event;
    p.d.user = &w;
    apt_trainer *t = test_trainer(m, &p.d);
    trace tr;
    memset(&tr, 0, sizeof tr);
    run(t, &p, &tr, 0, micro_batches(&p));
    assert_ok(ctx, apt_trainer_finish(t));
    const shape_sum s = shapes_of(m);
    assert_true(s.heads == 2 && s.neurons == 2 && s.hidden == 12);
    assert_true(w.unreached > 0 && kept_of(m) > 0.03);
    apt_destroy(ctx);
}

/* Frozen weights stay frozen, bytes go down, salience needs no memory of its own per step. */
static void test_frozen_and_memory(void **state)
{
    (void)state;
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.d.target_sparsity = 0;
    live l;
    start(&l, &p, 1);
    float *word = test_parameter(l.model, "bert.embeddings.word_embeddings.weight", NULL), *up = test_parameter(l.model, "bert.encoder.layer.1.intermediate.dense.weight", NULL);
    float *head = test_parameter(l.model, "bert.pooler.dense.weight", NULL), *a = test_parameter(l.model, "lora_A.bert.encoder.layer.1.intermediate.dense", NULL);
    run(l.trainer, &p, &l.tr, 0, 6);
    const apt_memory held = apt_memory_info(l.ctx);
    run(l.trainer, &p, &l.tr, 6, 20);
    float *word2 = test_parameter(l.model, "bert.embeddings.word_embeddings.weight", NULL), *up2 = test_parameter(l.model, "bert.encoder.layer.1.intermediate.dense.weight", NULL);
    float *head2 = test_parameter(l.model, "bert.pooler.dense.weight", NULL), *a2 = test_parameter(l.model, "lora_A.bert.encoder.layer.1.intermediate.dense", NULL);
    assert_memory_equal(word, word2, 37 * 16 * sizeof(float));
    assert_memory_equal(up, up2, 20 * 16 * sizeof(float));
    assert_memory_not_equal(head, head2, 16 * 16 * sizeof(float));
    assert_memory_not_equal(a, a2, 2 * 16 * sizeof(float));
    assert_true(apt_memory_info(l.ctx).blocks == held.blocks);
    free(word);
    free(up);
    free(head);
    free(a);
    free(word2);
    free(up2);
    free(head2);
    free(a2);
    stop(&l);
}

/* The first teacher shares every frozen weight with the student: it costs little, and distilling from oneself costs nothing. */
static int note_bytes(apt_event *e, void *user)
{
    int64_t *bytes = (int64_t *)user;
    if (e->kind == APT_EVENT_TEACHER && bytes[1] == 0) bytes[1] = apt_memory_info(e->trainer->ctx).bytes - bytes[0];
    bytes[0] = apt_memory_info(e->trainer->ctx).bytes;
    return 0;
}

static void test_first_teacher(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 3; i++) {
        static const apt_task_kind tasks[3] = {APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN};
        plan p = apt_plan(APT_BERT, tasks[i]);
        p.c.hidden = 48;
        p.c.neurons = 120;
        p.c.vocab = 300;
        p.d.accumulate = 1;
        test_log messages;
        apt_ctx *ctx = test_context(1, &messages);
        apt_model *m = test_model(ctx, &p.c, 1);
        const int64_t weights = apt_memory_info(ctx).bytes - 2 * 1024 * 1024;
        int64_t bytes[2] = {0, 0};
        p.d.on_event = note_bytes;
        p.d.user = bytes;
        apt_trainer *t = test_trainer(m, &p.d);
        test_batch b;
        apt_step_info info;
        for (int32_t s = 0; s < 4; s++) {                             /* the fourth ends with decision and teacher */
            test_batch_at(&b, &p.c, 3, s, 6);
            assert_ok(ctx, apt_trainer_step(t, &b.b, &info));
            assert_true(info.mu == 0 && info.distill_loss == 0 && info.loss == info.task_loss);
        }
        assert_true(bytes[1] > 0 && bytes[1] < weights / 3);
        assert_non_null(t->teacher);
        test_batch_at(&b, &p.c, 3, 4, 6);
        assert_ok(ctx, apt_trainer_step(t, &b.b, &info));
        test_near_value("mu", info.mu, 3.0 / 15.0, 1e-6);
        test_near_value("distillation from oneself", info.distill_loss, 0, 1e-9);
        test_near_value("loss", info.loss, (1 - info.mu) * info.task_loss + info.mu * info.distill_loss, 1e-9);
        test_batch_at(&b, &p.c, 3, 5, 6);
        assert_ok(ctx, apt_trainer_step(t, &b.b, &info));
        assert_true(info.distill_loss > 1e-9);                        /* and from now on it differs */
        apt_destroy(ctx);
    }
}

static void test_distill_gradients(void **state)
{
    (void)state;
    for (int32_t i = 0; i < (EMULATED ? 1 : 4 + TEST_DECODERS); i++) {
        static const apt_task_kind tasks[4] = {APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN, APT_TASK_MLM};
        plan p = i < 4 ? apt_plan(i % 2 == 0 ? APT_BERT : APT_ROBERTA, tasks[i]) : decoder_plan(i - 4);
        const bool t5 = p.c.family == APT_T5;
        p.c.hidden = 10;
        p.c.neurons = 8;
        if (!t5) p.c.layers = 5;                                      /* quarters of more than one layer, too */
        if (t5 && !p.c.gated) p.c.activation = APT_SILU;              /* ReLU has no slope where a step crosses 0 */
        if (i >= 4) {
            p.d.distill_pred = 0.5f;
            p.d.distill_layer = 0.9f;
        }
        p.d.min_hidden = 3;
        p.d.prune = APT_PRUNE_NEURONS | APT_PRUNE_HIDDEN;
        p.d.accumulate = 1;
        p.d.learning_rate = 0.01f;
        p.d.adapt = test_adaptable(&p.c);
        p.d.evaluate_every = 0;
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, i < 4 ? 14 : 12);                /* compacted, teacher of another shape, masks gliding */
        apt_trainer *t = l.trainer;
        assert_true(t->teacher != NULL && t->teacher->config.hidden > l.model->config.hidden && l.model->masks != NULL);
        apt_rng rng = apt_rng_make(4, 4);
        for (int64_t j = 0; j < apti_param_count(&t->transform.b); j++) t->transform.b.value[j] = 0.2f * apt_rng_normal(&rng);
        test_batch b;
        test_batch_at(&b, &p.c, 3, 40, 3);
        const double loss = distilled_loss(t, &b.b);
        assert_true(loss > 0 && t->info.distill_loss > 0 && t->map.pairs == 4);
        assert_true(check_distilled_gradients(t, &b.b, t5 ? 0.003f : 0.02f, i) > 20);  /* sharper curves without 1/sqrt(head size) */
        stop(&l);
    }
}

/* The layer loss by its definition, from what the last pass left: mean squared error, or where nothing norms the hidden states, each
   row's error over the mean square of the teacher's row. */
static double layer_loss(apt_trainer *t)
{
    const int64_t d = t->model->config.hidden, dt = t->teacher->config.hidden, ld = apti_ld(d), rank = APTI_TRANSFORM_RANK;
    const apti_distill_buffers b = apti_distill_plan(t, (char *)t->distill_block, t->pass->most_rows);
    double loss = 0;
    for (int32_t i = 0; i < t->map.pairs; i++) {
        const apti_acts *a = &t->pass->acts[t->map.student[i]];
        for (int64_t r = 0; r < a->rows_q; r++) {
            double mapped[64] = {0}, error = 0, square = 0;
            for (int64_t k = 0; k < rank; k++) {
                double u = 0;
                for (int64_t j = 0; j < d; j++) u += (double)t->transform.a.value[k * d + j] * (double)a->y2[r * ld + j];
                for (int64_t j = 0; j < dt; j++) mapped[j] += (double)t->model->scale * (double)t->transform.b.value[j * rank + k] * u;
            }
            for (int64_t j = 0; j < d; j++) mapped[t->transform.place[j]] += (double)a->y2[r * ld + j];
            for (int64_t j = 0; j < dt; j++) {
                const double h = b.hidden[i][r * dt + j];
                error += (mapped[j] - h) * (mapped[j] - h);
                square += h * h;
            }
            loss += error / (t->model->block->pre_norm ? square : (double)dt) / (double)a->rows_q;
        }
    }
    return (double)t->desc.distill_layer * loss;
}

static void test_layer_loss(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 3; i++) {
        plan p = i == 0 ? apt_plan(APT_BERT, APT_TASK_CLASSIFY) : decoder_plan(i == 1 ? 0 : 2);
        p.d.disable_distill = 0;
        p.d.distill_pred = 0;
        p.d.distill_layer = 0.7f;
        p.d.accumulate = 1;
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 12);
        apt_trainer *t = l.trainer;
        assert_true(t->teacher != NULL && t->teacher->config.hidden <= 64);
        apt_rng rng = apt_rng_make(4, 4);
        for (int64_t j = 0; j < apti_param_count(&t->transform.b); j++) t->transform.b.value[j] = 0.2f * apt_rng_normal(&rng);
        test_batch b;
        test_batch_at(&b, &p.c, 3, 40, 3);
        (void)distilled_loss(t, &b.b);
        assert_true(t->map.pairs > 0 && t->info.distill_loss > 0);
        test_near_value("layer loss", t->info.distill_loss, layer_loss(t), 1e-5 * t->info.distill_loss);
        stop(&l);
    }
}

/* ---- observing, pruning at once, cancelling, states ----------------------------------------------------------------- */

static void test_prune_now(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 4; i++) {
        plan p = apt_plan(APT_ROBERTA, (apt_task_kind)(APT_TASK_CLASSIFY + i));
        p.d.method = i == 1 ? APT_METHOD_FULL : APT_METHOD_LORA;
        p.d.target_sparsity = 0;
        p.d.prune_begin = p.d.prune_end = 0;
        p.d.accumulate = 1;
        live l, untouched;
        start(&l, &p, 1);
        start(&untouched, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 4);
        run(untouched.trainer, &p, &untouched.tr, 0, 4);
        assert_result(apt_trainer_prune_now(l.trainer, 0.5f), APT_E_STATE);                  /* no salience yet */
        assert_non_null(strstr(apt_error(l.ctx), "observe"));
        test_batch b;
        for (int32_t k = 0; k < 4; k++) {
            test_batch_at(&b, &p.c, 77, k, 6);
            assert_ok(l.ctx, apt_trainer_observe(l.trainer, &b.b));
        }
        assert_true(test_model_sum(l.model) == test_model_sum(untouched.model));
        run(l.trainer, &p, &l.tr, 4, 6);                              /* and it leaves no trace in training */
        run(untouched.trainer, &p, &untouched.tr, 4, 6);
        assert_same_trace(&untouched.tr, &l.tr, 0, 6, "after observing");
        assert_true(test_model_sum(l.model) == test_model_sum(untouched.model));
        assert_result(apt_trainer_prune_now(l.trainer, 1.0f), APT_E_RANGE);
        assert_result(apt_trainer_prune_now(l.trainer, -0.1f), APT_E_RANGE);
        assert_ok(l.ctx, apt_trainer_prune_now(l.trainer, 0.0f));
        assert_true(test_model_sum(l.model) == test_model_sum(untouched.model));
        assert_ok(l.ctx, apt_trainer_prune_now(l.trainer, 0.5f));
        assert_true(kept_of(l.model) <= 0.5 && kept_of(l.model) > 0.25 && l.model->masks == NULL);
        run(l.trainer, &p, &l.tr, 6, 12);                             /* recovery */
        stop(&l);
        stop(&untouched);
    }
}

/* A cancelled call has done its work: the next one goes on as if nothing had been. */
static void test_cancel(void **state)
{
    (void)state;
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    char dir[512], path[600];
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "c");
    live a, l, f;
    const uint64_t sum = run_all(&a, &p);
    for (int32_t kind = APT_EVENT_STEP; kind <= APT_EVENT_CHECKPOINT; kind++) {
        start(&l, &p, 1);
        l.tr.cancel_at = (apt_event_kind)kind;
        test_batch b;
        int64_t i = 0;
        apt_result r = APT_OK;
        for (; i < micro_batches(&p) && r == APT_OK; i++) {
            test_batch_at(&b, &p.c, p.data_seed, i, p.sequences);
            l.tr.now = (int32_t)i;
            r = apt_trainer_step(l.trainer, &b.b, NULL);
        }
        if (r != APT_E_CANCELLED) fail_msg("event %d: %s", kind, apt_result_text(r));
        assert_non_null(strstr(apt_error(l.ctx), "cancel"));
        assert_ok(l.ctx, apt_checkpoint_save(l.trainer, path, NULL, 0));
        start(&f, &p, 7);
        assert_ok(f.ctx, apt_checkpoint_load(f.trainer, path, NULL, NULL));
        run(l.trainer, &p, &l.tr, i, micro_batches(&p));
        run(f.trainer, &p, &f.tr, i, micro_batches(&p));
        assert_ok(l.ctx, apt_trainer_finish(l.trainer));
        assert_ok(f.ctx, apt_trainer_finish(f.trainer));
        assert_same_trace(&a.tr, &l.tr, i, micro_batches(&p), "after a cancel");
        assert_same_trace(&a.tr, &f.tr, i, micro_batches(&p), "resumed after a cancel");
        assert_true(test_model_sum(l.model) == sum && test_model_sum(f.model) == sum);
        stop(&l);
        stop(&f);
    }
    stop(&a);
    start(&l, &p, 1);                                                 /* from apt_trainer_metric, prune_now and finish, too */
    run(l.trainer, &p, &l.tr, 0, 9);
    l.tr.cancel_at = APT_EVENT_TEACHER;
    assert_result(apt_trainer_metric(l.trainer, 5.0), APT_E_CANCELLED);
    assert_ok(l.ctx, apt_trainer_metric(l.trainer, 5.0));
    assert_result(apt_trainer_metric(l.trainer, (double)INFINITY), APT_E_NONFINITE);
    l.tr.cancel_at = APT_EVENT_COMPACT;
    l.tr.cancelled = 0;
    assert_result(apt_trainer_finish(l.trainer), APT_E_STATE == APT_OK ? APT_OK : APT_E_CANCELLED);
    assert_null(l.model->masks);
    assert_ok(l.ctx, apt_trainer_finish(l.trainer));
    stop(&l);
    test_remove(dir);
}

/* Calls that events must not make are refused; those that they may make work. */
typedef struct reentry { char path[600]; test_batch b; int32_t refused, saved; } reentry;

static int reenter(apt_event *e, void *user)
{
    reentry *r = (reentry *)user;
    const bool complete = e->kind == APT_EVENT_STEP || e->kind == APT_EVENT_EVALUATE || e->kind == APT_EVENT_CHECKPOINT;
    assert_result(apt_trainer_step(e->trainer, &r->b.b, NULL), APT_E_STATE);
    assert_result(apt_trainer_observe(e->trainer, &r->b.b), APT_E_STATE);
    assert_result(apt_trainer_prune_now(e->trainer, 0.5f), APT_E_STATE);
    assert_result(apt_trainer_finish(e->trainer), APT_E_STATE);
    const apt_result saved = apt_checkpoint_save(e->trainer, r->path, NULL, 0);
    if (saved != (complete ? APT_OK : APT_E_STATE)) fail_msg("saving in event %d: %s", (int)e->kind, apt_result_text(saved));
    r->saved += saved == APT_OK;
    r->refused += saved != APT_OK;
    if (!complete) assert_result(apt_trainer_metric(e->trainer, 1e6), APT_E_STATE);
    return 0;
}

static void test_calls_from_events(void **state)
{
    (void)state;
    char dir[512];
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    reentry r;
    memset(&r, 0, sizeof r);
    test_dir(dir, sizeof dir);
    test_join(r.path, sizeof r.path, dir, "c");
    test_batch_at(&r.b, &p.c, 1, 0, 3);
    live a, l;
    start(&a, &p, 1);
    run(a.trainer, &p, &a.tr, 0, 20);
    test_log messages;
    memset(&l, 0, sizeof l);
    l.ctx = test_context(1, &messages);
    l.model = test_model(l.ctx, &p.c, 1);
    plan q = p;
    q.d.on_event = reenter;
    q.d.user = &r;
    q.d.evaluate_every = 0;
    p.d.evaluate_every = 0;
    stop(&a);
    start(&a, &p, 1);
    run(a.trainer, &p, &a.tr, 0, 20);
    l.trainer = test_trainer(l.model, &q.d);
    run(l.trainer, &q, &l.tr, 0, 20);
    assert_same_trace(&a.tr, &l.tr, 0, 20, "with calls from events");
    assert_true(r.saved > 5 && r.refused > 3);
    stop(&l);
    stop(&a);
    test_remove(dir);
}

static void test_states(void **state)
{
    (void)state;
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.d.steps = 2;
    p.d.prune_begin = p.d.prune_end = 0;
    p.d.warmup_steps = 0;
    p.d.update_frequency = 1;
    live l;
    start(&l, &p, 1);
    apt_trainer *second = NULL;
    test_batch b;
    test_batch_at(&b, &p.c, 1, 0, 4);
    assert_result(apt_trainer_create(l.model, &p.d, &second), APT_E_STATE);
    assert_ptr_equal(apt_trainer_model(l.trainer), l.model);
    assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, NULL));
    assert_result(apt_trainer_observe(l.trainer, &b.b), APT_E_STATE);  /* half accumulated */
    assert_result(apt_trainer_prune_now(l.trainer, 0.5f), APT_E_STATE);
    b.b.labels = NULL;
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_ARGUMENT);
    b.b.labels = b.labels;
    b.tokens[0] = 1000;
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_RANGE);
    b.tokens[0] = 1;
    for (int32_t i = 0; i < 3; i++) assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, NULL));
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_STATE);
    assert_non_null(strstr(apt_error(l.ctx), "2 steps"));
    apt_trainer_destroy(l.trainer);
    assert_result(apt_trainer_create(l.model, &p.d, &second), APT_E_STATE);                  /* adapters stand */
    assert_non_null(strstr(apt_error(l.ctx), "merge"));
    assert_ok(l.ctx, apt_model_merge(l.model, NULL, NULL));
    assert_ok(l.ctx, apt_trainer_create(l.model, &p.d, &second));
    assert_ok(l.ctx, apt_model_merge(l.model, NULL, NULL));            /* from outside: the trainer notices */
    assert_result(apt_trainer_step(second, &b.b, NULL), APT_E_STATE);
    assert_result(apt_trainer_finish(second), APT_E_STATE);
    assert_result(apt_checkpoint_save(second, "never", NULL, 0), APT_E_STATE);
    apt_trainer_destroy(second);
    assert_result(apt_trainer_create(l.model, NULL, &second), APT_E_ARGUMENT);
    assert_result(apt_trainer_create(l.model, &p.d, NULL), APT_E_ARGUMENT);
    assert_result(apt_trainer_create(NULL, &p.d, &second), APT_E_ARGUMENT);
    assert_result(apt_trainer_step(NULL, &b.b, NULL), APT_E_ARGUMENT);
    assert_result(apt_trainer_finish(NULL), APT_E_ARGUMENT);
    assert_result(apt_trainer_metric(NULL, 1), APT_E_ARGUMENT);
    assert_result(apt_trainer_observe(NULL, &b.b), APT_E_ARGUMENT);
    assert_result(apt_trainer_prune_now(NULL, 0.5f), APT_E_ARGUMENT);
    assert_null(apt_trainer_model(NULL));
    apt_trainer_destroy(NULL);
    stop(&l);
}

/* ---- the desc ------------------------------------------------------------------------------------------------------- */

#define FIELD(f) #f, offsetof(apt_train_desc, f)
typedef struct bad_field { const char *name; size_t at; char type; double value[4]; int32_t values; } bad_field;
static const bad_field g_bad[] = {
    {FIELD(start_canary), 'u', {1, 0xffff}, 2}, {FIELD(end_canary), 'u', {3}, 1}, {FIELD(method), 'i', {-1, 3}, 2},
    {FIELD(steps), 'l', {0, -5, -9.2e18, 9.2e18}, 4}, {FIELD(learning_rate), 'f', {-1e-3, 1e4}, 2}, {FIELD(lr_schedule), 'i', {-1, 3}, 2},
    {FIELD(warmup_steps), 'l', {-1, -9.2e18}, 2}, {FIELD(weight_decay), 'f', {-0.1, 1e9}, 2}, {FIELD(beta1), 'f', {-0.1, 1, 1.5}, 3},
    {FIELD(beta2), 'f', {-0.1, 1, 2}, 3}, {FIELD(epsilon), 'f', {-1e-8, 2}, 2}, {FIELD(accumulate), 'i', {-1, 2e9}, 2},
    {FIELD(loss_scale), 'f', {0.5, 33554432}, 2}, {FIELD(loss_scale_steps), 'i', {-1}, 1},
    {FIELD(rank), 'i', {-1, 5000}, 2}, {FIELD(max_rank), 'i', {-1, 3, 5000}, 3}, {FIELD(scale), 'f', {-1, 1e9}, 2},
    {FIELD(adapt), 'i', {-1, 64}, 2}, {FIELD(disable_growth), 'i', {-1, 2}, 2}, {FIELD(growth), 'f', {0.5, -1, 1e6}, 3},
    {FIELD(target_sparsity), 'f', {-0.1, 1, 1.5}, 3}, {FIELD(schedule), 'i', {-1, 3, 4}, 3}, {FIELD(start_sparsity), 'f', {-0.1, 0.7}, 2},
    {FIELD(prune_begin), 'l', {-1, 1000, -9.2e18, 9.2e18}, 4}, {FIELD(prune_end), 'l', {-1, 1000, -9.2e18, 9.2e18}, 4},
    {FIELD(update_frequency), 'i', {-1, 2e9}, 2}, {FIELD(mask_step), 'f', {-0.1, 1.1, 1e-8}, 3}, {FIELD(salience_momentum), 'f', {-0.1, 1}, 2},
    {FIELD(disable_kurtosis), 'i', {-1, 2}, 2}, {FIELD(salience_norm), 'i', {-1, 4}, 2}, {FIELD(prune), 'i', {-1, 8}, 2},
    {FIELD(round_heads), 'i', {-1, 1e6}, 2}, {FIELD(round_neurons), 'i', {-1, 2e9}, 2}, {FIELD(round_hidden), 'i', {-1, 1e6}, 2},
    {FIELD(min_hidden), 'i', {-1, 17}, 2}, {FIELD(reset_moments), 'i', {-1, 2}, 2}, {FIELD(disable_distill), 'i', {-1, 2}, 2},
    {FIELD(distill_temperature), 'f', {-1, 1e-6, 1e6}, 3}, {FIELD(distill_pred), 'f', {-0.1, 1e9}, 2}, {FIELD(distill_layer), 'f', {-0.1, 1e9}, 2},
    {FIELD(recompute), 'i', {-1, 2}, 2}, {FIELD(evaluate_every), 'l', {-1}, 1}, {FIELD(checkpoint_every), 'l', {-1}, 1},
};

static void put_field(apt_train_desc *d, const bad_field *f, double value)
{
    char *at = (char *)d + f->at;
    const int32_t i = (int32_t)(f->type == 'i' ? value : 0);
    const int64_t l = (int64_t)(f->type == 'l' ? value : 0);
    const uint32_t u = (uint32_t)(f->type == 'u' ? value : 0);
    const float x = (float)value;
    if (f->type == 'i') memcpy(at, &i, sizeof i);
    if (f->type == 'l') memcpy(at, &l, sizeof l);
    if (f->type == 'u') memcpy(at, &u, sizeof u);
    if (f->type == 'f') memcpy(at, &x, sizeof x);
}

static void test_desc_ranges(void **state)
{
    (void)state;
    const plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *m = test_model(ctx, &p.c, 1);
    const uint64_t sum = test_model_sum(m);
    const apt_memory held = apt_memory_info(ctx);
    for (size_t i = 0; i < sizeof g_bad / sizeof g_bad[0]; i++) {
        const bad_field *f = &g_bad[i];
        for (int32_t k = 0; k < f->values + (f->type == 'f' ? 2 : 0); k++) {
            apt_train_desc d = APT_ZERO;
            apt_trainer *t = NULL;
            d.steps = 100;
            d.target_sparsity = 0.6f;
            d.rank = 4;
            put_field(&d, f, k < f->values ? f->value[k] : 0);
            const uint32_t special = k == f->values ? 0x7fc00000u : 0x7f800000u;
            if (k >= f->values) memcpy((char *)&d + f->at, &special, sizeof special);
            const apt_result r = apt_trainer_create(m, &d, &t);
            char word[64];
            snprintf(word, sizeof word, ".%s ", f->name);
            if (r != APT_E_RANGE || strstr(apt_error(ctx), word) == NULL)
                fail_msg("%s, value %d: %s (%s)", f->name, k, apt_result_text(r), apt_error(ctx));
            assert_null(t);
        }
    }
    assert_true(test_model_sum(m) == sum && apt_memory_info(ctx).bytes == held.bytes && apt_memory_info(ctx).blocks == held.blocks);
    apt_train_desc d = APT_ZERO;
    apt_trainer *t = NULL;
    d.steps = 100;
    d.target_sparsity = 0.6f;
    d.schedule = APT_SCHEDULE_EXPONENTIAL;                            /* needs a start */
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "start_sparsity"));
    d.schedule = APT_SCHEDULE_CUBIC;
    d.adapt = APT_ADAPT_HEAD;                                         /* there is no LM head */
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "apt_train_desc.adapt is 128"));
    const apt_config plain = test_decoder(0);                         /* T5 v1.0 has a head but no gate */
    apt_model *t5 = test_model(ctx, &plain, 1);
    d.adapt = APT_ADAPT_QUERY | APT_ADAPT_GATE;
    assert_result(apt_trainer_create(t5, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "no gate"));
    d.adapt = APT_ADAPT_HEAD;
    assert_ok(ctx, apt_trainer_create(t5, &d, &t));
    d.adapt = 0;
    const uint32_t nan_bits = 0x7fc00000u;                            /* clip: any number is legal, NaN is none */
    d.schedule = APT_SCHEDULE_CUBIC;
    memcpy(&d.clip, &nan_bits, sizeof nan_bits);
    assert_result(apt_trainer_create(m, &d, &t), APT_E_RANGE);
    assert_non_null(strstr(apt_error(ctx), "clip"));
    apt_destroy(ctx);
}

static void test_desc_defaults(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    for (int32_t i = 0; i < 3; i++) {
        static const apt_task_kind tasks[3] = {APT_TASK_CLASSIFY, APT_TASK_SPAN, APT_TASK_MLM};
        const apt_config c = test_config(APT_BERT, tasks[i]);
        apt_model *m = test_model(ctx, &c, 1);
        apt_train_desc d = APT_ZERO, q;
        d.steps = 5000;
        d.target_sparsity = 0.6f;
        d.seed = 99;
        apt_trainer *t = test_trainer(m, &d);
        apt_trainer_query(t, &q);
        assert_true(q.steps == 5000 && q.learning_rate == 2e-4f && q.beta1 == 0.9f && q.beta2 == 0.999f && q.epsilon == 1e-8f && q.clip == 1.0f);
        assert_true(q.loss_scale == 0 && q.loss_scale_steps == 2000);
        assert_true(q.accumulate == 1 && q.rank == 8 && q.max_rank == 64 && q.scale == 2.0f && q.growth == 4.0f && q.weight_decay == 0);
        assert_int_equal(q.adapt, APT_ADAPT_QUERY | APT_ADAPT_VALUE | APT_ADAPT_UP);
        assert_true(q.prune_begin == 0 && q.prune_end == 3000 && q.update_frequency == 100 && q.mask_step == 0.01f);
        assert_true(q.salience_momentum == 0.9f && q.prune == 7 && q.round_heads == 1 && q.round_neurons == 1 && q.round_hidden == 1);
        assert_true(q.min_hidden == 16 && q.distill_temperature == 2.0f / 3.0f && q.seed == 99 && q.warmup_steps == 0);
        assert_true(q.distill_pred == (i == 0 ? 1.0f : i == 1 ? 0.1f : 0.0f) && q.distill_layer == 0.9f);
        assert_true(!q.disable_distill && !q.disable_growth && q.evaluate_every == 0);
        apt_model_destroy(m);                                         /* destroys its trainer */
        m = test_model(ctx, &c, 1);
        d.steps = 160;                                                /* short runs: at least 8 decisions fit the window */
        d.prune_begin = 16;
        d.method = i == 0 ? APT_METHOD_LORA : i == 1 ? APT_METHOD_FULL : APT_METHOD_APT;
        d.rank = 100;
        t = test_trainer(m, &d);
        apt_trainer_query(t, &q);
        assert_true(q.prune_end == 96 && q.update_frequency == 10 && q.mask_step == 0.1f && q.max_rank == 100);
        assert_true(q.disable_distill == (i < 2) && q.disable_growth == (i < 2));
        apt_model_destroy(m);
    }
    for (int32_t decoder = 0; decoder < TEST_DECODERS; decoder++) {
        const apt_config c = test_decoder(decoder);
        const bool pair = c.decoder_layers > 0;
        apt_train_desc d = APT_ZERO, q;
        d.steps = 5000;
        d.target_sparsity = 0.6f;
        apt_trainer_query(test_trainer(test_model(ctx, &c, 1), &d), &q);
        assert_true(q.disable_distill == !pair && q.distill_pred == 0.3f && q.distill_layer == 0.1f);
    }
    apt_destroy(ctx);
}

/* ---- the optimizer -------------------------------------------------------------------------------------------------- */

static void test_learning_rates(void **state)
{
    (void)state;
    for (int32_t s = 0; s < 3; s++)
        for (int64_t warm = 0; warm <= 12; warm += 4) {
            plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
            p.d.method = APT_METHOD_LORA;
            p.d.target_sparsity = 0;
            p.d.accumulate = 1;
            p.d.steps = 12;
            p.d.warmup_steps = warm;
            p.d.prune_begin = p.d.prune_end = 0;
            p.d.lr_schedule = (apt_lr_schedule)s;
            p.d.learning_rate = 0.004f;
            live l;
            start(&l, &p, 1);
            test_batch b;
            for (int64_t i = 0; i < 12; i++) {
                apt_step_info info;
                test_batch_at(&b, &p.c, 1, i, 3);
                assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
                const double done = (double)(i - warm) / (double)(12 - warm > 0 ? 12 - warm : 1), top = (double)0.004f;
                const double shape = s == APT_LR_LINEAR ? 1 - done : s == APT_LR_COSINE ? 0.5 * (1 + cos(acos(-1.0) * done)) : 1;
                test_near_value("learning rate", info.learning_rate, i < warm ? top * (double)(i + 1) / (double)warm : top * shape, 1e-12);
                assert_true(info.step == i + 1);
            }
            stop(&l);
        }
}

/* Adam in double from the very gradients that the trainer sees. */
typedef struct adam_ref { double *w, *m, *v; int64_t n; const apti_param *p; } adam_ref;

static void test_adam(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 3; k++) {
        plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
        p.d.method = k == 1 ? APT_METHOD_LORA : APT_METHOD_FULL;
        p.d.target_sparsity = 0;
        p.d.prune_begin = p.d.prune_end = 0;
        p.d.accumulate = 1;
        p.d.warmup_steps = 0;
        p.d.lr_schedule = APT_LR_CONSTANT;
        p.d.learning_rate = 0.01f;
        p.d.weight_decay = k == 2 ? 0.0f : 0.1f;
        p.d.beta1 = 0.8f;
        p.d.beta2 = 0.95f;
        p.d.epsilon = 1e-4f;
        p.d.clip = k == 0 ? 0.05f : k == 1 ? -1.0f : 1000.0f;
        live l;
        start(&l, &p, 1);
        apt_model *m = l.model;
        adam_ref *ref = (adam_ref *)test_memory_block((size_t)m->param_count * sizeof(adam_ref));
        for (int32_t i = 0; i < m->param_count; i++) {
            ref[i].p = &m->params[i];
            ref[i].n = apti_is_trained(ref[i].p) ? apti_param_count(ref[i].p) : 0;
            ref[i].w = (double *)calloc((size_t)(3 * ref[i].n + 1), sizeof(double));
            ref[i].m = ref[i].w + ref[i].n;
            ref[i].v = ref[i].m + ref[i].n;
            for (int64_t j = 0; j < ref[i].n; j++) ref[i].w[j] = (double)ref[i].p->value[j];
        }
        test_batch b;
        for (int32_t step = 1; step <= 5; step++) {
            apt_step_info info;
            test_batch_at(&b, &p.c, 1, step, 6);
            double norm = 0;
            assert_ok(l.ctx, apti_micro_batch(l.trainer, &b.b, false));
            apti_sync(l.ctx);
            for (int32_t i = 0; i < m->param_count; i++)
                for (int64_t j = 0; j < ref[i].n; j++) norm += (double)ref[i].p->grad[j] * (double)ref[i].p->grad[j];
            norm = sqrt(norm);
            const double clip = (double)p.d.clip, factor = clip > 0 && norm > clip ? clip / norm : 1;
            assert_true(k != 0 || factor < 1);
            for (int32_t i = 0; i < m->param_count; i++)
                for (int64_t j = 0; j < ref[i].n; j++) {
                    const double g = factor * (double)ref[i].p->grad[j], b1 = (double)p.d.beta1, b2 = (double)p.d.beta2;
                    ref[i].m[j] = b1 * ref[i].m[j] + (1 - b1) * g;
                    ref[i].v[j] = b2 * ref[i].v[j] + (1 - b2) * g * g;
                    const double mh = ref[i].m[j] / (1 - pow(b1, step)), vh = ref[i].v[j] / (1 - pow(b2, step));
                    const double decay = ref[i].p->dims == 2 ? (double)p.d.weight_decay : 0;
                    ref[i].w[j] -= (double)p.d.learning_rate * (mh / (sqrt(vh) + (double)p.d.epsilon) + decay * ref[i].w[j]);
                }
            apti_zero_gradients(l.trainer);
            assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
            test_near_value("gradient norm", info.gradient_norm, norm, 1e-5 * norm);
            double worst = 0;
            for (int32_t i = 0; i < m->param_count; i++)
                for (int64_t j = 0; j < ref[i].n; j++) {
                    worst = fmax(worst, fabs((double)ref[i].p->value[j] - ref[i].w[j]));
                    ref[i].w[j] = (double)ref[i].p->value[j];         /* stay together: the next step has its own rounding */
                }
            if (worst > 2e-6) fail_msg("case %d, step %d: weights differ from the reference by %g", k, step, worst);
        }
        for (int32_t i = 0; i < m->param_count; i++) free(ref[i].w);
        free(ref);
        stop(&l);
    }
}

/* Equal but for rounding; some gradients (key biases) are nothing but rounding. */
static void near_moments(const apti_param *x, const apti_param *y)
{
    double worst = 0, top = 0;
    for (int64_t i = 0; i < apti_param_count(x); i++) {
        worst = fmax(worst, fabs((double)x->moment1[i] - (double)y->moment1[i]));
        top = fmax(top, fabs((double)x->moment1[i]));
    }
    if (worst > 1e-4 * top + 1e-8) fail_msg("%s: moments differ by %g of %g", x->name, worst, top);
}

static void test_accumulation(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 3; k++) {
        plan p = apt_plan(APT_BERT, k == 1 ? APT_TASK_REGRESS : APT_TASK_CLASSIFY);
        p.d.method = k == 2 ? APT_METHOD_FULL : APT_METHOD_LORA;
        p.d.target_sparsity = 0;
        p.d.prune_begin = p.d.prune_end = 0;
        live two, one, both;
        p.d.accumulate = 2;
        start(&two, &p, 1);
        start(&both, &p, 1);
        p.d.accumulate = 1;
        start(&one, &p, 1);
        apt_trainer *whole = one.trainer;
        test_batch a, b, joined;
        apt_step_info info;
        for (int32_t s = 0; s < 4; s++) {                             /* the same data twice is one step, but for rounding */
            test_batch_at(&a, &p.c, 1, s, 4);
            assert_ok(two.ctx, apt_trainer_step(two.trainer, &a.b, &info));
            assert_true(info.step == s);
            assert_ok(two.ctx, apt_trainer_step(two.trainer, &a.b, &info));
            assert_true(info.step == s + 1 && info.tokens == 2 * a.offsets[4]);
            assert_ok(one.ctx, apt_trainer_step(whole, &a.b, NULL));
        }
        for (int32_t i = 0; i < one.model->param_count; i++) {
            const apti_param *x = &one.model->params[i], *y = &two.model->params[i];
            if (apti_is_trained(x)) near_moments(x, y);
        }
        stop(&one);
        start(&one, &p, 1);
        for (int32_t s = 0; s < 2; s++) {                             /* two halves are one batch, but for rounding */
            apt_rng rng = apt_rng_make(50 + (uint64_t)s, 0);
            test_batch_fill(&joined, &p.c, &rng, 8, 3, 7);
            a = joined;
            b = joined;
            a.b.sequences = b.b.sequences = 4;
            a.b.offsets = a.offsets;
            b.b.offsets = b.offsets;
            for (int32_t i = 0; i <= 4; i++) b.offsets[i] = joined.offsets[4 + i] - joined.offsets[4];
            b.b.tokens = joined.tokens + joined.offsets[4];
            b.b.types = joined.types + joined.offsets[4];
            if (k == 1) b.b.targets = joined.targets + 4;
            else b.b.labels = joined.labels + 4;
            joined.b.offsets = joined.offsets;
            assert_ok(both.ctx, apt_trainer_step(both.trainer, &a.b, NULL));
            assert_ok(both.ctx, apt_trainer_step(both.trainer, &b.b, NULL));
            assert_ok(one.ctx, apt_trainer_step(one.trainer, &joined.b, NULL));
        }
        for (int32_t i = 0; i < one.model->param_count; i++) {
            const apti_param *x = &one.model->params[i], *y = &both.model->params[i];
            if (apti_is_trained(x)) near_moments(x, y);
        }
        stop(&two);
        stop(&one);
        stop(&both);
    }
}

/* A gradient that is not finite skips the update; the run goes on. */
static void test_nonfinite(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 3; k++) {
        plan p = apt_plan(APT_BERT, k == 2 ? APT_TASK_SPAN : APT_TASK_CLASSIFY);
        p.d.method = k == 1 ? APT_METHOD_FULL : APT_METHOD_APT;
        p.d.accumulate = 1;
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 5);
        const char *name = k == 2 ? "qa_outputs.weight" : "classifier.weight", *other = "bert.encoder.layer.1.output.LayerNorm.weight";
        int64_t n = 0, n2 = 0;
        float *old = test_parameter(l.model, name, &n), *big = test_parameter(l.model, name, &n), *norm = test_parameter(l.model, other, &n2);
        for (int64_t i = 0; i < n; i++) big[i] = i % 2 == 0 ? 3e38f : -3e38f;
        assert_ok(l.ctx, apt_model_set(l.model, name, big, n));
        for (int64_t i = 0; i < n2; i++) norm[i] = 1e30f;
        float *keep = test_parameter(l.model, other, &n2);
        assert_ok(l.ctx, apt_model_set(l.model, other, norm, n2));
        const uint64_t before = test_model_sum(l.model);
        const int64_t adam = l.trainer->adam_steps;
        float *salience = (float *)test_memory_block((size_t)n2 * sizeof(float));
        memcpy(salience, l.trainer->salience, 4 * sizeof(float));
        apt_step_info info;
        test_batch b;
        test_batch_at(&b, &p.c, 4, 0, 4);
        l.tr.now = 5;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
        assert_true(info.skipped == 1 && info.step == 6 && l.trainer->adam_steps == adam);
        /* masks may have moved; weights, moments and salience have not */
        if (k == 1) assert_true(test_model_sum(l.model) == before);
        assert_memory_equal(salience, l.trainer->salience, 4 * sizeof(float));
        for (int32_t i = 0; i < l.model->param_count; i++) {
            const apti_param *q = &l.model->params[i];
            if (!apti_is_trained(q)) continue;
            assert_true(apti_finite_all(q->value, apti_param_count(q)) && apti_finite_all(q->moment1, apti_param_count(q)));
            for (int64_t j = 0; j < apti_param_count(q); j++) assert_true(q->grad[j] == 0);
        }
        assert_ok(l.ctx, apt_model_set(l.model, name, old, n));
        assert_ok(l.ctx, apt_model_set(l.model, other, keep, n2));
        run(l.trainer, &p, &l.tr, 6, 12);
        assert_ok(l.ctx, apt_trainer_finish(l.trainer));
        free(old);
        free(big);
        free(norm);
        free(keep);
        free(salience);
        stop(&l);
    }
    plan p = apt_plan(APT_BERT, APT_TASK_REGRESS);                    /* a target that is not finite is an error */
    live l;
    start(&l, &p, 1);
    test_batch b;
    test_batch_at(&b, &p.c, 4, 0, 4);
    const uint32_t bits = 0x7f800000u;
    memcpy(&b.targets[2], &bits, sizeof bits);
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_NONFINITE);
    stop(&l);
}

/* Batches in which nothing counts: no loss, no gradient, no NaN. */
static void test_nothing_labelled(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 3; i++) {
        static const apt_task_kind tasks[3] = {APT_TASK_CLASSIFY, APT_TASK_SPAN, APT_TASK_MLM};
        plan p = apt_plan(APT_BERT, tasks[i]);
        p.d.accumulate = 1;
        live l;
        start(&l, &p, 1);
        test_batch b;
        for (int32_t s = 0; s < 20; s++) {
            apt_step_info info;
            test_batch_at(&b, &p.c, 4, s, 4);
            for (int32_t k = 0; k < TEST_TOKENS; k++) b.labels[k] = i == 1 ? -1 : -100;
            l.tr.now = s;
            assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
            assert_true(info.task_loss == 0 && !info.skipped && test_finite((float)info.loss));
        }
        stop(&l);
    }
}

/* ---- loss scaling --------------------------------------------------------------------------------------------------- */

static plan scaled_plan(float scale, int32_t steps)
{
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.d.loss_scale = scale;
    p.d.loss_scale_steps = steps;
    return p;
}

/* A power of two changes no bit of any loss, gradient norm or weight, through pruning, growth, distillation and compaction, while
   the factor changes with the steps. */
static void test_scaled_same(void **state)
{
    (void)state;
    const int32_t decoders[] = {0, 2};
    for (int32_t k = 0; k < (EMULATED ? 1 : 4); k++) {
        plan p = scaled_plan(0, 3);
        if (k == 1) p.d.method = APT_METHOD_FULL;
        if (k >= 2) {
            p.c = test_decoder(decoders[k - 2]);
            p.c.neurons = 20;
            p.d.disable_distill = 0;
        }
        live plain, scaled;
        const uint64_t sum = run_all(&plain, &p);
        p.d.loss_scale = 1024;
        const uint64_t same = run_all(&scaled, &p);
        assert_same_trace(&plain.tr, &scaled.tr, 0, micro_batches(&p), "with a loss scale");
        assert_true(sum == same);
        assert_true(plain.trainer->scaler.scale == 1 && plain.trainer->info.loss_scale == 1);
        assert_true(scaled.trainer->scaler.scale == 1024 * 256 && scaled.trainer->info.loss_scale == 1024 * 128);
        stop(&plain);
        stop(&scaled);
    }
}

/* ---- recomputation -------------------------------------------------------------------------------------------------- */

/* Activations that are computed again change no bit either, and wait for the backward in less memory: all families, tasks that look
   at some rows and at all, methods, adapters on every map, a teacher, cuts and growth. */
static void test_recompute(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 8; k += EMULATED ? 4 : 1) {
        plan p = apt_plan(k == 1 ? APT_ROBERTA : APT_BERT, k == 1 ? APT_TASK_SPAN : k == 2 ? APT_TASK_MLM : APT_TASK_CLASSIFY);
        if (k == 2 || k == 7) p.d.method = APT_METHOD_FULL;
        if (k == 3) p.d.method = APT_METHOD_LORA;
        if (k == 3 || k == 5) p.d.adapt = APT_ADAPT_QUERY | APT_ADAPT_KEY | APT_ADAPT_VALUE | APT_ADAPT_OUTPUT | APT_ADAPT_UP |
                                          APT_ADAPT_DOWN;
        if (k >= 4) {
            p.c = test_decoder(k < 6 ? 0 : 2);
            p.c.neurons = 20;
            p.d.disable_distill = 0;
        }
        if (k == 6) p.d.quantize = APT_QUANT_INT8;
        live kept, again;
        const uint64_t sum = run_all(&kept, &p);
        p.d.recompute = 1;
        const uint64_t same = run_all(&again, &p);
        assert_same_trace(&kept.tr, &again.tr, 0, micro_batches(&p), "with recomputation");
        assert_true(sum == same);
        if (kept.trainer->pass->block_bytes <= again.trainer->pass->block_bytes)
            fail_msg("case %d: %lld bytes with recomputation, %lld without", k, (long long)again.trainer->pass->block_bytes,
                     (long long)kept.trainer->pass->block_bytes);
        stop(&kept);
        stop(&again);
    }
}

/* Micro-batch i; in front of the last one of a step an infinity gets into what there is of a gradient. */
static apt_step_info run_spoilt(live *l, const plan *p, int64_t i, float *at)
{
    apt_step_info info;
    test_batch b;
    const uint32_t infinity = 0x7f800000u;
    test_batch_at(&b, &p->c, p->data_seed, i, p->sequences);
    l->tr.now = (int32_t)i;
    if (at != NULL) memcpy(at, &infinity, sizeof infinity);
    assert_ok(l->ctx, apt_trainer_step(l->trainer, &b.b, &info));
    return info;
}

/* An infinity in a gradient, or in what salience is made of: the step is left out and said to be, the factor is halved. */
static void test_scaled_overflow(void **state)
{
    (void)state;
    for (int32_t k = 0; k < 2; k++) {
        plan p = scaled_plan(1024, 2000);
        if (k == 0) p.d.method = APT_METHOD_LORA;
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 5);
        const uint64_t before = test_model_sum(l.model);
        const int64_t adam = l.trainer->adam_steps;
        float salience[8];
        memcpy(salience, l.trainer->salience, sizeof salience);
        apti_sync(l.ctx);
        const apt_step_info info = run_spoilt(&l, &p, 5, k == 0 ? l.model->head[APTI_HEAD_OUT_W]->grad : l.trainer->probe.grad);
        assert_true(info.skipped == 1 && info.step == 3 && info.loss_scale == 1024 && l.trainer->scaler.scale == 512);
        assert_true(l.trainer->adam_steps == adam && test_model_sum(l.model) == before);
        assert_memory_equal(salience, l.trainer->salience, sizeof salience);
        run(l.trainer, &p, &l.tr, 6, 8);                              /* and goes on */
        assert_true(l.trainer->info.skipped == 0 && l.trainer->info.loss_scale == 512 && l.trainer->adam_steps == adam + 1);
        run(l.trainer, &p, &l.tr, 8, micro_batches(&p));
        assert_ok(l.ctx, apt_trainer_finish(l.trainer));
        stop(&l);
    }
}

/* Doubles after so many good steps in a row, never above its most; halves, never below 1. */
static void test_scaled_growth(void **state)
{
    (void)state;
    static const struct { float first; int32_t steps; const char *bad; double scale[8]; } cases[] = {
        {8, 3, "..x...x.", {8, 8, 4, 4, 4, 8, 4, 4}},
        {4, 2, "x.xxx...", {2, 2, 1, 1, 1, 1, 2, 2}},
        {16777216, 1, "..x.....", {16777216, 16777216, 8388608, 16777216, 16777216, 16777216, 16777216, 16777216}},
        {-1, 1, "..x.....", {1, 1, 1, 1, 1, 1, 1, 1}},
    };
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        plan p = scaled_plan(cases[k].first, cases[k].steps);
        p.d.method = APT_METHOD_LORA;
        live l;
        start(&l, &p, 1);
        for (int64_t i = 0; i < 8; i++) {
            run(l.trainer, &p, &l.tr, 2 * i, 2 * i + 1);
            apti_sync(l.ctx);
            const bool bad = cases[k].bad[i] == 'x';
            const apt_step_info info = run_spoilt(&l, &p, 2 * i + 1, bad ? l.model->head[APTI_HEAD_OUT_W]->grad : NULL);
            if (info.skipped != bad || l.trainer->scaler.scale != cases[k].scale[i])
                fail_msg("case %d, step %d: scale %g, expected %g; skipped %d", (int)k, (int)i, l.trainer->scaler.scale,
                         cases[k].scale[i], (int)info.skipped);
        }
        stop(&l);
    }
}

/* Checkpoints hold the factor: with one that is no power of two every later bit hangs on it. */
static void test_scaled_resume(void **state)
{
    (void)state;
    static const int64_t cut[] = {1, 7, 8, 9, 14, 21, 33, 40};
    resume_everywhere(scaled_plan(1000, 2), cut, EMULATED ? 3 : 8, 0);
    saved_run s;
    plan p = scaled_plan(1000, 4);
    save_run(&s, &p, 13);                                             /* 6 steps and half of one */
    assert_true(s.l.trainer->scaler.scale == 2000 && s.l.trainer->scaler.good == 2);
    live l;
    start(&l, &p, 1);
    assert_ok(l.ctx, apt_checkpoint_load(l.trainer, s.path, NULL, NULL));
    assert_true(l.trainer->scaler.scale == 2000 && l.trainer->scaler.good == 2 && l.trainer->info.loss_scale == 2000);
    stop(&l);
    static const double wrong[][2] = {{0.5, 0}, {3e7, 0}, {2, -1}, {2, 1e12}};
    for (size_t k = 0; k < sizeof wrong / sizeof wrong[0]; k++) {
        s.l.trainer->scaler.scale = wrong[k][0];
        s.l.trainer->scaler.good = (int64_t)wrong[k][1];
        assert_ok(s.l.ctx, apt_checkpoint_save(s.l.trainer, s.other, NULL, 0));
        refuse(s.other, &p, APT_E_RANGE, "loss scale", NULL);
    }
    drop_run(&s);
}

/* A run that had a factor, or recomputed, goes on without, and the other way round, from inside an accumulation too: the same
   bits. */
static void test_scaled_across(void **state)
{
    (void)state;
    live whole, l;
    plan p[2] = {scaled_plan(-1, 3), scaled_plan(64, 3)};
    p[1].d.recompute = 1;
    (void)run_all(&whole, &p[0]);
    for (int32_t from = 0; from < 2; from++)
        for (int64_t micro = 12; micro < 14; micro++) {
            saved_run s;
            save_run(&s, &p[from], micro);
            start(&l, &p[1 - from], 1);
            assert_ok(l.ctx, apt_checkpoint_load(l.trainer, s.path, NULL, NULL));
            run(l.trainer, &p[1 - from], &l.tr, micro, micro_batches(&p[0]));
            assert_same_trace(&whole.tr, &l.tr, micro, micro_batches(&p[0]), "with and without a loss scale");
            stop(&l);
            drop_run(&s);
        }
    stop(&whole);
}

/* ---- learning ------------------------------------------------------------------------------------------------------- */

/* Is token `wanted` anywhere in the sequence? Half of them. */
static void task_batch(test_batch *b, const apt_config *c, apt_rng *rng, int32_t wanted)
{
    test_batch_fill(b, c, rng, 32, 6, 10);
    for (int32_t s = 0; s < 32; s++) {
        const int32_t first = b->offsets[s], n = b->offsets[s + 1] - first;
        b->labels[s] = (int32_t)apt_rng_below(rng, 2);
        for (int32_t i = first; i < first + n; i++)
            if (b->tokens[i] == wanted) b->tokens[i] = wanted == 0 ? 1 : wanted - 1;
        if (b->labels[s] == 1) b->tokens[first + (int32_t)apt_rng_below(rng, (uint32_t)n)] = wanted;
    }
}

static double train_task(apt_model *m, const apt_config *c, apt_train_desc d, int32_t wanted)
{
    apt_trainer *t = test_trainer(m, &d);
    test_batch b;
    apt_rng rng = apt_rng_make(3, (uint64_t)wanted);
    for (int64_t i = 0; i < d.steps; i++) {
        task_batch(&b, c, &rng, wanted);
        const apt_result r = apt_trainer_step(t, &b.b, NULL);
        if (r != APT_OK) fail_msg("step %d: %s", (int)i, apt_error(m->ctx));
    }
    assert_int_equal(apt_trainer_finish(t), APT_OK);
    apt_trainer_destroy(t);
    assert_int_equal(apt_model_merge(m, NULL, NULL), APT_OK);
    int64_t right = 0;
    for (int32_t i = 0; i < 16; i++) {
        apt_output out = APT_ZERO;
        task_batch(&b, c, &rng, wanted);
        assert_int_equal(apt_model_forward(m, &b.b, &out), APT_OK);
        right += out.correct;
    }
    return (double)right / 512;
}

static void test_learning(void **state)
{
    (void)state;
    test_log messages;
    apt_ctx *ctx = test_context(2, &messages);
    apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY);
    c.labels = 2;
    c.hidden = 32;
    c.heads = 4;
    c.head_dim = 8;
    c.neurons = 64;
    c.init_range = 0.15f;
    apt_model *m = test_model(ctx, &c, 1);
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_FULL;
    d.steps = 150;
    d.learning_rate = 3e-3f;
    d.warmup_steps = 10;
    const double full = train_task(m, &c, d, 5);
    assert_true(full > 0.95);
    d.method = APT_METHOD_LORA;                                       /* another token, frozen weights */
    d.adapt = 63;
    d.learning_rate = 5e-3f;
    const double lora = train_task(m, &c, d, 9);
    assert_true(lora > 0.95);
    d.method = APT_METHOD_APT;                                        /* a third one while 60 % go */
    d.target_sparsity = 0.6f;
    d.steps = 250;
    const double apt = train_task(m, &c, d, 13);
    assert_true(kept_of(m) <= 0.4);
    print_message("    accuracy: full %.3f, lora %.3f, apt at 60 %% sparsity %.3f\n", full, lora, apt);
    assert_true(apt > 0.95);
    apt_destroy(ctx);
}

int main(void)
{
    const struct CMUnitTest several[] = {                            /* on several threads */
        cmocka_unit_test(test_threads),           cmocka_unit_test(test_own_threads),       cmocka_unit_test(test_decoder_threads),
        cmocka_unit_test(test_resume_classify),   cmocka_unit_test(test_resume_span),       cmocka_unit_test(test_resume_others),
        cmocka_unit_test(test_decoder_resume),
    };
    const struct CMUnitTest single[] = {
        cmocka_unit_test(test_seeds),             cmocka_unit_test(test_checkpoint_refused),
        cmocka_unit_test(test_decoder_checkpoint_refused), cmocka_unit_test(test_checkpoint_damaged),
        cmocka_unit_test(test_checkpoint_room),   cmocka_unit_test(test_target),            cmocka_unit_test(test_events),
        cmocka_unit_test(test_kinds_and_rounding), cmocka_unit_test(test_frozen_and_memory), cmocka_unit_test(test_first_teacher),
        cmocka_unit_test(test_distill_gradients), cmocka_unit_test(test_prune_now),         cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_calls_from_events), cmocka_unit_test(test_states),            cmocka_unit_test(test_desc_ranges),
        cmocka_unit_test(test_desc_defaults),     cmocka_unit_test(test_learning_rates),    cmocka_unit_test(test_adam),
        cmocka_unit_test(test_accumulation),      cmocka_unit_test(test_nonfinite),         cmocka_unit_test(test_nothing_labelled),
        cmocka_unit_test(test_learning),          cmocka_unit_test(test_importance),        cmocka_unit_test(test_scaled_same),
        cmocka_unit_test(test_scaled_overflow),   cmocka_unit_test(test_scaled_growth),     cmocka_unit_test(test_scaled_resume),
        cmocka_unit_test(test_scaled_across),     cmocka_unit_test(test_recompute),         cmocka_unit_test(test_layer_loss),
    };
#ifdef APT_TEST_CUDA                             /* what says something about a device */
    const struct CMUnitTest device[] = {
        cmocka_unit_test(test_accumulation),      cmocka_unit_test(test_nonfinite),         cmocka_unit_test(test_adam),
        cmocka_unit_test(test_prune_now),         cmocka_unit_test(test_resume_classify),   cmocka_unit_test(test_decoder_resume),
        cmocka_unit_test(test_distill_gradients), cmocka_unit_test(test_scaled_same),       cmocka_unit_test(test_scaled_overflow),
        cmocka_unit_test(test_recompute),         cmocka_unit_test(test_layer_loss),
    };
    (void)several;
    (void)single;
    return cmocka_run_group_tests_name("train, on a device", device, NULL, NULL);
#else
    int failed = cmocka_run_group_tests_name("train, several threads", several, NULL, NULL);
#ifndef __SANITIZE_THREAD__                      /* one thread cannot race */
    failed += cmocka_run_group_tests_name("train, one thread", single, NULL, NULL);
#else
    (void)single;
#endif
    return failed;
#endif
}
