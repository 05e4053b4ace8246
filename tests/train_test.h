/* train_test.h - whole training runs for the tests: a plan, a run that records what happened, comparison. Include it after
   "model_test.h". */
#ifndef APT_TRAIN_TEST_H
#define APT_TRAIN_TEST_H

enum { MOST_MICRO = 128 };

/* What a run looked like, step by step. Losses are kept as bits so that they are compared exactly. */
typedef struct trace {
    uint64_t sum[MOST_MICRO];         /* checksum of (loss, task loss, distillation loss, gradient norm) of each micro-batch */
    double loss[MOST_MICRO];
    uint32_t events[MOST_MICRO];      /* bit k: event kind k fired */
    int32_t fired[MOST_MICRO];        /* how many events, evaluations apart */
    int32_t now;                      /* micro-batch at work */
    apt_event_kind cancel_at;         /* cancel at the first event of this kind */
    int32_t cancelled;
} trace;

static inline int on_event(apt_event *event, void *user)
{
    trace *t = (trace *)user;
    t->events[t->now] |= 1u << event->kind;
    t->fired[t->now] += event->kind != APT_EVENT_EVALUATE;
    if (event->kind == APT_EVENT_EVALUATE) {
        event->metric = 0.25 * (double)(event->step->step / 4);        /* a new best now and then, and repeats of it */
        event->has_metric = 1;
    }
    if (t->cancel_at == event->kind && t->cancelled++ == 0) return 1;
    return 0;
}

typedef struct plan {
    apt_config c;
    apt_train_desc d;
    const apt_config *teacher;        /* another model teaches (apt_trainer_teacher); NULL: none does */
    apt_distill_desc how;
    int32_t threads, sequences;
    uint64_t data_seed;
} plan;

static inline int64_t micro_batches(const plan *p)
{
    return p->d.steps * (p->d.accumulate > 0 ? p->d.accumulate : 1);
}

/* An APT run of 24 steps in which everything happens: decisions at 4, 7, 10, 13, 16, compactions, growth, teachers,
   accumulation. */
static inline plan apt_plan(apt_family family, apt_task_kind task)
{
    plan p;
    memset(&p, 0, sizeof p);
    p.c = test_config(family, task);
    p.c.neurons = 20;
    p.d.steps = 24;
    p.d.accumulate = 2;
    p.d.prune_begin = 1;
    p.d.prune_end = 16;
    p.d.update_frequency = 3;
    p.d.target_sparsity = 0.6f;
    p.d.min_hidden = 6;
    p.d.rank = 2;
    p.d.learning_rate = 3e-3f;
    p.d.warmup_steps = 2;
    p.d.evaluate_every = 5;
    p.d.checkpoint_every = 7;
    p.d.seed = 11;
    p.threads = 1;
    p.sequences = 5;
    p.data_seed = 21;
    return p;
}

/* Micro-batch i, recorded. */
static inline apt_result run_one(apt_trainer *t, const plan *p, trace *tr, int64_t i)
{
    test_batch b;
    apt_step_info info;
    test_batch_at(&b, &p->c, p->data_seed, i, p->sequences);
    tr->now = (int32_t)i;
    const apt_result r = apt_trainer_step(t, &b.b, &info);
    if (r != APT_OK) return r;
    const double values[4] = {info.loss, info.task_loss, info.distill_loss, info.gradient_norm};
    tr->sum[i] = test_hash(0, values, sizeof values);
    tr->loss[i] = info.loss;
    if (!test_finite((float)info.loss)) fail_msg("micro-batch %d: the loss is not finite", (int)i);
    return r;
}

/* Runs micro-batches [from, to) and records them. */
static inline void run(apt_trainer *t, const plan *p, trace *tr, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++) {
        const apt_result r = run_one(t, p, tr, i);
        if (r != APT_OK) fail_msg("micro-batch %d: %s (%s)", (int)i, apt_result_text(r), apt_error(t->ctx));
    }
}

typedef struct live {
    apt_ctx *ctx;
    apt_model *model, *teacher;
    apt_trainer *trainer;
    trace tr;
    test_log messages;
    test_memory memory;
} live;

static inline void start(live *l, const plan *p, uint64_t model_seed)
{
    memset(l, 0, sizeof *l);
    apt_desc desc = test_desc(&l->memory, &l->messages);
    desc.threads = p->threads;
    l->ctx = apt_create(&desc);
    assert_non_null(l->ctx);
    l->model = test_model(l->ctx, &p->c, model_seed);
    apt_train_desc d = p->d;
    d.on_event = on_event;
    d.user = &l->tr;
    l->trainer = test_trainer(l->model, &d);
    if (p->teacher == NULL) return;
    l->teacher = test_model(l->ctx, p->teacher, 77);
    test_randomise(l->teacher, 77);
    assert_ok(l->ctx, apt_trainer_teacher(l->trainer, l->teacher, &p->how));
}

static inline void stop(live *l)
{
    apt_destroy(l->ctx);
    if (l->memory.live != 0) fail_msg("%lld blocks leaked", (long long)l->memory.live);
}

/* Whole run with its end; returns the checksum of the final model. */
static inline uint64_t run_all(live *l, const plan *p)
{
    start(l, p, 1);
    run(l->trainer, p, &l->tr, 0, micro_batches(p));
    assert_ok(l->ctx, apt_trainer_finish(l->trainer));
    return test_model_sum(l->model);
}

static inline uint32_t all_events(const trace *t)
{
    uint32_t all = 0;
    for (int32_t i = 0; i < MOST_MICRO; i++) all |= t->events[i];
    return all;
}

static inline void assert_same_trace(const trace *a, const trace *b, int64_t from, int64_t to, const char *what)
{
    for (int64_t i = from; i < to; i++)
        if (a->sum[i] != b->sum[i])
            fail_msg("%s: micro-batch %d gave loss %.17g, expected %.17g", what, (int)i, b->loss[i], a->loss[i]);
}

/* ---- cut and resumed ---- */

static inline const char *checkpoint_path(char *path, size_t capacity, const char *dir, int64_t micro)
{
    char name[64];
    snprintf(name, sizeof name, "run.%d", (int)micro);
    return test_join(path, capacity, dir, name);
}

/* Saves after each micro-batch in `cut`, then resumes from each into fresh objects. */
static inline void resume_everywhere(plan p, const int64_t *cut, int32_t cuts, uint32_t must_cut_at)
{
    char dir[512], path[600];
    live a, b;
    uint32_t cut_events = 0;
    test_dir(dir, sizeof dir);
    const uint64_t plain = run_all(&a, &p);
    const trace reference = a.tr;
    stop(&a);
    start(&a, &p, 1);                                                 /* again, with saving: it disturbs nothing */
    int64_t at = 0;
    for (int32_t i = 0; i < cuts; i++) {
        run(a.trainer, &p, &a.tr, at, cut[i]);
        at = cut[i];
        const int64_t blob[2] = {at, at * at};
        assert_ok(a.ctx, apt_checkpoint_save(a.trainer, checkpoint_path(path, sizeof path, dir, at), blob, i == 0 ? 0 : sizeof blob));
        if (at > 0) cut_events |= a.tr.events[at - 1];
    }
    run(a.trainer, &p, &a.tr, at, micro_batches(&p));
    assert_ok(a.ctx, apt_trainer_finish(a.trainer));
    assert_same_trace(&reference, &a.tr, 0, micro_batches(&p), "while saving");
    assert_true(test_model_sum(a.model) == plain);
    stop(&a);
    if ((cut_events & must_cut_at) != must_cut_at) fail_msg("the cuts miss an event: %x of %x", cut_events & must_cut_at, must_cut_at);
    for (int32_t i = 0; i < cuts; i++) {
        int64_t blob[4] = {-1, -1, -1, -1};
        size_t bytes = sizeof blob;
        p.threads = 1 + i % 2;
        start(&b, &p, 999);                                           /* other weights: all of them come from the file */
        assert_ok(b.ctx, apt_checkpoint_load(b.trainer, checkpoint_path(path, sizeof path, dir, cut[i]), blob, &bytes));
        assert_true(bytes == (i == 0 ? 0 : 16));
        if (i > 0) assert_true(blob[0] == cut[i] && blob[1] == cut[i] * cut[i] && blob[2] == -1);
        run(b.trainer, &p, &b.tr, cut[i], micro_batches(&p));
        assert_ok(b.ctx, apt_trainer_finish(b.trainer));
        char what[64];
        snprintf(what, sizeof what, "resumed at micro-batch %d", (int)cut[i]);
        assert_same_trace(&reference, &b.tr, cut[i], micro_batches(&p), what);
        for (int64_t j = cut[i]; j < micro_batches(&p); j++) assert_int_equal(b.tr.events[j], reference.events[j]);
        if (test_model_sum(b.model) != plain) fail_msg("%s: the final weights differ", what);
        stop(&b);
    }
    test_remove(dir);
}

static const uint32_t every_event = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | 1u << APT_EVENT_TEACHER |
                                    1u << APT_EVENT_EVALUATE | 1u << APT_EVENT_CHECKPOINT;

/* Loading `path` with plan q must fail and say `word`; the trainer then still works as a fresh one. */
static inline void refuse(const char *path, const plan *q, apt_result wanted, const char *word, const plan *fresh)
{
    live l, f;
    start(&l, q, 1);
    const int64_t bytes = apt_memory_info(l.ctx).bytes, blocks = apt_memory_info(l.ctx).blocks;
    const apt_result r = apt_checkpoint_load(l.trainer, path, NULL, NULL);
    if (r != wanted) fail_msg("expected %s (%s), got %s (%s)", apt_result_text(wanted), word, apt_result_text(r), apt_error(l.ctx));
    if (strstr(apt_error(l.ctx), word) == NULL) fail_msg("the message does not name %s: %s", word, apt_error(l.ctx));
    assert_true(apt_memory_info(l.ctx).bytes == bytes && apt_memory_info(l.ctx).blocks == blocks);
    if (fresh != NULL) {
        start(&f, fresh, 1);
        run(l.trainer, fresh, &l.tr, 0, 6);
        run(f.trainer, fresh, &f.tr, 0, 6);
        assert_same_trace(&f.tr, &l.tr, 0, 6, "after a refused checkpoint");
        assert_true(test_model_sum(f.model) == test_model_sum(l.model));
        stop(&f);
    }
    stop(&l);
}

/* A run of plan p, `micro` micro-batches long, and its checkpoint in a folder of its own. */
typedef struct saved_run { plan p; live l; char dir[512], path[600], other[600]; } saved_run;

static inline void save_run(saved_run *s, const plan *p, int64_t micro)
{
    const uint64_t blob = 7;
    s->p = *p;
    test_dir(s->dir, sizeof s->dir);
    test_join(s->path, sizeof s->path, s->dir, "a");
    test_join(s->other, sizeof s->other, s->dir, "b");
    start(&s->l, p, 1);
    run(s->l.trainer, p, &s->l.tr, 0, micro);
    assert_ok(s->l.ctx, apt_checkpoint_save(s->l.trainer, s->path, &blob, sizeof blob));
}

static inline void drop_run(saved_run *s)
{
    stop(&s->l);
    test_remove(s->dir);
}

/* The gradient of the whole loss, distillation included, against finite differences of that loss. */
static inline double distilled_loss(apt_trainer *t, const apt_batch *b)
{
    apti_zero_gradients(t);
    memset(&t->info, 0, sizeof t->info);
    assert_int_equal(apti_micro_batch(t, b, false), APT_OK);
    apti_sync(t->ctx);
    return t->info.loss;
}

/* Every trained parameter at four places. h: how far a value is moved. Returns how many parameters there were. */
static inline int32_t check_distilled_gradients(apt_trainer *t, const apt_batch *b, float h, int32_t which)
{
    apt_rng rng = apt_rng_make(4, 5);
    int32_t checked = 0;
    for (int32_t k = 0; k < t->model->param_count + 2; k++) {
        apti_param *q = apti_trained(t, k);
        const int64_t n = apti_is_trained(q) ? apti_param_count(q) : 0, samples = n < 4 ? n : 4;
        int64_t at[4];
        float grad[4];
        double error = 0, norm = 0;
        (void)distilled_loss(t, b);
        for (int64_t j = 0; j < samples; j++) {
            at[j] = (int64_t)apt_rng_below(&rng, (uint32_t)n);
            grad[j] = q->grad[at[j]];
        }
        for (int64_t j = 0; j < samples; j++) {
            const float old = q->value[at[j]];
            double f[4], moved[4];
            for (int32_t s = 0; s < 4; s++) {
                q->value[at[j]] = old + (s < 2 ? (float)(s - 2) : (float)(s - 1)) * h;
                moved[s] = (double)q->value[at[j]] - (double)old;
                apti_param_repack(t->model, q);
                f[s] = distilled_loss(t, b);
            }
            q->value[at[j]] = old;
            apti_param_repack(t->model, q);
            const double slope = (4 * (f[2] - f[1]) / (moved[2] - moved[1]) - (f[3] - f[0]) / (moved[3] - moved[0])) / 3;
            error += (slope - (double)grad[j]) * (slope - (double)grad[j]);
            norm += slope * slope;
        }
        if (samples > 0 && sqrt(error) > 1e-2 * sqrt(norm) + 2e-5)
            fail_msg("case %d, %s: gradient with distillation off by %g of %g", which, q->name, sqrt(error), sqrt(norm));
        checked += samples > 0;
    }
    return checked;
}

#endif /* APT_TRAIN_TEST_H */
