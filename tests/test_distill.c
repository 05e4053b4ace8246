/* Distillation from another model (apt_trainer_teacher): the loss against a formula of its own, its gradient by finite differences,
   a smaller student that learns, threads, resuming, teachers that are pruned or quantised, what is refused.
   build: cc -std=c11 -O2 tests/test_distill.c -o test_distill -lcmocka -lpthread -lm */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"
#include "train_test.h"

static apt_task_kind task_of(int32_t which)
{
    static const apt_task_kind tasks[4] = {APT_TASK_CLASSIFY, APT_TASK_REGRESS, APT_TASK_SPAN, APT_TASK_MLM};
    return tasks[which];
}

/* Four tasks of encoders, then all decoders. */
enum { CASES = 4 + TEST_DECODERS };
static apt_config case_config(int32_t which)
{
    return which < 4 ? test_config(which % 2 == 0 ? APT_BERT : APT_ROBERTA, task_of(which)) : test_decoder(which - 4);
}

/* Another depth and width; a decoder behind an encoder with more layers in both stacks. */
static apt_config teacher_config(const apt_config *student)
{
    apt_config c = *student;
    c.hidden = 24;
    c.neurons = 28;
    if (c.decoder_layers > 0) {
        c.decoder_layers = 3;
        c.layers = 3 + 2 * 3;
    } else c.layers = 5;
    return c;
}

/* A short run of `method` with a teacher. */
static plan taught_plan(const apt_config *student, const apt_config *teacher, apt_method method)
{
    plan p = apt_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.c = *student;
    p.d.adapt = test_adaptable(&p.c);
    p.d.method = method;
    p.d.evaluate_every = 0;
    p.teacher = teacher;
    if (method == APT_METHOD_APT) return p;
    p.d.target_sparsity = 0;
    p.d.steps = 6;
    p.d.prune_begin = p.d.prune_end = 0;
    return p;
}

/* ---- the loss ------------------------------------------------------------------------------------------------------- */

/* KL(softmax(t/T) || softmax(s/T)) * T^2 of n logits. */
static double plain_kl(const float *t, const float *s, int64_t n, double temperature)
{
    double zt = 0, zs = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) {
        zt += exp((double)t[i] / temperature);
        zs += exp((double)s[i] / temperature);
    }
    for (int64_t i = 0; i < n; i++) {
        const double p = exp((double)t[i] / temperature) / zt, q = exp((double)s[i] / temperature) / zs;
        sum += p * log(p / q);
    }
    return temperature * temperature * sum;
}

/* L_pred from whole logits of both models. LLaMA: token i is predicted by the row before it, in its own sequence. */
static double plain_loss(const apt_config *c, const test_batch *b, const float *t, const float *s, double temperature)
{
    const int32_t n = b->b.sequences;
    double sum = 0, count = 0;
    if (c->task == APT_TASK_REGRESS) {
        for (int32_t i = 0; i < n; i++) sum += ((double)t[i] - (double)s[i]) * ((double)t[i] - (double)s[i]);
        return sum / n;
    }
    if (c->task == APT_TASK_CLASSIFY) {
        for (int32_t i = 0; i < n; i++) sum += plain_kl(t + i * c->labels, s + i * c->labels, c->labels, temperature);
        return sum / n;
    }
    if (c->task == APT_TASK_SPAN) {
        for (int32_t i = 0; i < 2 * n; i++) {
            const int32_t at = b->offsets[i / 2], row = i % 2 * b->offsets[n];
            sum += plain_kl(t + row + at, s + row + at, b->offsets[i / 2 + 1] - at, temperature);
        }
        return sum / (2 * n);
    }
    const bool decoder = c->task == APT_TASK_LM && c->decoder_layers == 0;
    const int32_t *offsets = c->decoder_layers > 0 ? b->target_offsets : b->offsets;
    for (int32_t q = 0; q < n; q++)
        for (int32_t i = offsets[q] + (decoder ? 1 : 0); i < offsets[q + 1]; i++) {
            if (b->labels[i] == -100) continue;
            const int64_t row = c->task == APT_TASK_MLM ? (int64_t)count : decoder ? i - 1 : i;
            sum += plain_kl(t + row * c->vocab, s + row * c->vocab, c->vocab, temperature);
            count++;
        }
    return count > 0 ? sum / count : 0;
}

static void test_loss(void **state)
{
    (void)state;
    static const float temperatures[3] = {0.0f, 1.0f, 4.5f}, alphas[3] = {0.0f, 0.25f, 1.0f};
    for (int32_t i = 0; i < 3 * CASES; i++) {
        const apt_config c = case_config(i % CASES), bigger = teacher_config(&c);
        plan p = taught_plan(&c, &bigger, i % 2 == 0 ? APT_METHOD_LORA : APT_METHOD_FULL);
        const double temperature = i / CASES == 0 ? 2.0 : (double)temperatures[i / CASES], alpha = i / CASES == 0 ? 0.7 : (double)alphas[i / CASES];
        p.how.temperature = temperatures[i / CASES];                  /* 0: the default */
        p.how.alpha = alphas[i / CASES];
        p.d.accumulate = 1;
        live l;
        start(&l, &p, 1);
        test_randomise(l.model, 5);
        const uint64_t before = test_model_sum(l.teacher);
        test_batch b;
        test_batch_at(&b, &c, 9, i, 5);
        int64_t n = 0, m = 0;
        float *s = test_logits(l.model, &b.b, &n, NULL, 0), *t = test_logits(l.teacher, &b.b, &m, NULL, 0);
        assert_true(n == m && n > 0);
        apt_output out = APT_ZERO;
        assert_ok(l.ctx, apt_model_forward(l.model, &b.b, &out));
        apt_step_info info;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
        const double wanted = plain_loss(&c, &b, t, s, temperature);
        assert_true(wanted > 1e-3);
        test_near_value("mu", info.mu, alpha, 1e-7);
        test_near_value("task loss", info.task_loss, out.loss, 1e-5 * out.loss);
        test_near_value("distillation loss", info.distill_loss, wanted, 1e-4 * wanted);
        test_near_value("loss", info.loss, alpha * wanted + (1 - alpha) * out.loss, 1e-4 * (wanted + out.loss));
        assert_true(info.teacher_milliseconds > 0);
        assert_true(test_model_sum(l.teacher) == before);             /* it learns nothing */
        free(s);
        free(t);
        stop(&l);
    }
}

/* A copy of the student teaches nothing at first: loss 0, and the gradient is that of the task times 1 - alpha. */
static void test_equal_teacher(void **state)
{
    (void)state;
    for (int32_t i = 0; i < CASES; i++) {
        const apt_config c = case_config(i);
        plan p = taught_plan(&c, &c, APT_METHOD_LORA), alone = p;
        alone.teacher = NULL;
        p.d.accumulate = alone.d.accumulate = 1;
        live l, a;
        start(&l, &p, 1);
        test_randomise(l.model, 77);                                  /* as its teacher; adapters too, which the teacher has not */
        for (int32_t k = 0; k < l.model->param_count; k++)
            if (apti_is_adapter(&l.model->params[k]) && l.model->params[k].value != NULL)
                memset(l.model->params[k].value, 0, (size_t)apti_param_count(&l.model->params[k]) * sizeof(float));
        for (int32_t k = 0; k < apt_model_parameters(l.teacher); k++) {
            apt_parameter q;
            assert_ok(l.ctx, apt_model_parameter(l.teacher, k, &q));
            float *v = test_parameter(l.teacher, q.name, NULL);
            assert_ok(l.ctx, apt_model_set(l.model, q.name, v, q.rows * q.cols));
            free(v);
        }
        start(&a, &alone, 1);
        for (int32_t k = 0; k < apt_model_parameters(l.model); k++) {
            apt_parameter q;
            assert_ok(l.ctx, apt_model_parameter(l.model, k, &q));
            float *v = test_parameter(l.model, q.name, NULL);
            assert_ok(a.ctx, apt_model_set(a.model, q.name, v, q.rows * q.cols));
            free(v);
        }
        test_batch b;
        test_batch_at(&b, &c, 9, i, 5);
        apt_step_info taught, plain;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &taught));
        assert_ok(a.ctx, apt_trainer_step(a.trainer, &b.b, &plain));
        test_near_value("loss from an equal teacher", taught.distill_loss, 0, 1e-9);
        test_near_value("gradient norm", taught.gradient_norm, 0.3 * plain.gradient_norm, 1e-5 * plain.gradient_norm);
        stop(&l);
        stop(&a);
    }
}

static void test_gradients(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 2 * CASES; i++) {
        apt_config c = case_config(i % CASES);
        c.hidden = 10;
        c.neurons = 8;
        if (c.family == APT_T5 && !c.gated) c.activation = APT_SILU;  /* ReLU has no slope where a step crosses 0 */
        const apt_config bigger = teacher_config(&c);
        plan p = taught_plan(&c, &bigger, i < CASES ? APT_METHOD_LORA : APT_METHOD_FULL);
        p.d.accumulate = 1;
        p.d.learning_rate = 0.01f;
        p.how.temperature = i % 2 == 0 ? 0.0f : 1.5f;
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, 4);
        test_batch b;
        test_batch_at(&b, &p.c, 3, 40, 3);
        const double loss = distilled_loss(l.trainer, &b.b);
        assert_true(loss > 0 && l.trainer->info.distill_loss > 0);
        assert_true(check_distilled_gradients(l.trainer, &b.b, c.family == APT_T5 ? 0.003f : 0.02f, i) > 10);
        stop(&l);
    }
}

/* ---- learning ------------------------------------------------------------------------------------------------------- */

static void change_quant(apt_model *teacher, apt_distill_desc *how)
{
    apt_quantize_desc d = APT_ZERO;
    (void)how;
    d.kind = APT_QUANT_INT8;
    assert_int_equal(apt_model_quantize(teacher, &d), APT_OK);
}

/* Share of sequences for which the model gives the true class. */
static double accuracy_of(apt_model *m, const apt_config *c)
{
    int64_t right = 0, all = 0;
    for (int32_t i = 0; i < 20; i++) {
        test_batch b;
        apt_output out = APT_ZERO;
        test_batch_at(&b, c, 555, i, 16);
        assert_int_equal(apt_model_forward(m, &b.b, &out), APT_OK);
        right += out.correct;
        all += 16;
    }
    return (double)right / (double)all;
}

/* A teacher of four layers learns a task. Students of two layers see its logits alone: with labels that say nothing and alpha 1
   they learn the task all the same, far beyond what those labels could teach. The teacher is whole, or quantised. */
static double student_of(apt_model *teacher, const apt_config *half, const apt_train_desc *d)
{
    apt_ctx *ctx = teacher->ctx;
    apt_model *student = test_model(ctx, half, 2);
    apt_trainer *t = test_trainer(student, d);
    apt_distill_desc how = APT_ZERO;
    how.alpha = 1;
    assert_ok(ctx, apt_trainer_teacher(t, teacher, &how));
    apt_step_info first = APT_ZERO, last = APT_ZERO;
    test_batch b;
    for (int32_t s = 0; s < d->steps; s++) {
        test_batch_at(&b, half, 4, s + 1 < d->steps ? s : 0, 16);        /* the last batch is the first again: like with like */
        for (int32_t q = 0; q < 16; q++) b.labels[q] = 0;
        assert_ok(ctx, apt_trainer_step(t, &b.b, s == 0 ? &first : &last));
    }
    print_message("    distillation loss of one batch, %.3f at first, %.3f at last\n", (double)first.distill_loss,
        (double)last.distill_loss);
    assert_true(last.distill_loss < 0.2 * first.distill_loss);
    return accuracy_of(student, half);
}

static void test_student_learns(void **state)
{
    (void)state;
    apt_config c = test_config(APT_BERT, APT_TASK_CLASSIFY), half;
    c.labels = 2;
    c.layers = 4;
    c.hidden = c.neurons = 32;
    half = c;
    half.layers = 2;
    test_log messages;
    apt_ctx *ctx = test_context(1, &messages);
    apt_model *teacher = test_model(ctx, &c, 1);
    apt_train_desc d = APT_ZERO;
    d.method = APT_METHOD_FULL;
    d.steps = 400;
    d.learning_rate = 3e-3f;
    apt_trainer *t = test_trainer(teacher, &d);
    test_batch b;
    for (int32_t s = 0; s < d.steps; s++) {
        test_batch_at(&b, &c, 3, s, 16);
        assert_ok(ctx, apt_trainer_step(t, &b.b, NULL));
    }
    apt_trainer_destroy(t);
    const double best = accuracy_of(teacher, &c), taught = student_of(teacher, &half, &d);
    change_quant(teacher, NULL);
    const double quantised = student_of(teacher, &half, &d);
    print_message("    teacher %.3f, students with half its layers %.3f, taught by its int8 form %.3f\n", best, taught, quantised);
    assert_true(best > 0.85 && taught > best - 0.05 && quantised > best - 0.05);
    apt_destroy(ctx);
}

/* ---- runs that are the same -------------------------------------------------------------------------------------------- */

/* Which case with which method: every method, every kind of loss. */
enum { RUNS = 7 };
static plan run_plan(int32_t which, apt_config *student, apt_config *teacher)
{
    static const int32_t cases[RUNS] = {0, 2, 3, 4, 6, 1, 5};
    static const apt_method methods[RUNS] = {APT_METHOD_APT, APT_METHOD_APT, APT_METHOD_FULL, APT_METHOD_APT, APT_METHOD_LORA, APT_METHOD_LORA, APT_METHOD_FULL};
    *student = case_config(cases[which]);
    student->neurons = 20;
    *teacher = teacher_config(student);
    return taught_plan(student, teacher, methods[which]);
}

static void test_threads(void **state)
{
    (void)state;
    static const int32_t threads[2] = {2, 3};
    for (int32_t w = 0; w < RUNS; w++) {
        apt_config student, teacher;
        plan p = run_plan(w, &student, &teacher);
        student.hidden = 40;
        student.neurons = 70;
        student.vocab = teacher.vocab = 90;
        p.c = student;
        p.sequences = 20;
        live a, b;
        const uint64_t sum = run_all(&a, &p);
        assert_true((all_events(&a.tr) >> APT_EVENT_TEACHER & 1) == 0);                      /* no snapshots */
        if (p.d.method == APT_METHOD_APT) assert_true((all_events(&a.tr) >> APT_EVENT_COMPACT & 1) == 1);
        for (int32_t i = 0; i < 2; i++) {
            p.threads = threads[i];
            const uint64_t other = run_all(&b, &p);
            assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "threads");
            if (other != sum) fail_msg("run %d: %d threads give other weights", w, threads[i]);
            stop(&b);
        }
        stop(&a);
    }
}

static void test_resume(void **state)
{
    (void)state;
    static const int64_t cut[] = {0, 1, 8, 9, 14, 21, 33}, few[] = {0, 1, 9};
    for (int32_t w = 0; w < RUNS; w++) {
        apt_config student, teacher;
        plan p = run_plan(w, &student, &teacher);
        p.d.evaluate_every = 5;
        p.d.checkpoint_every = 7;
        const bool pruned = p.d.method == APT_METHOD_APT;
        resume_everywhere(p, pruned ? cut : few, pruned ? 7 : 3, pruned ? 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT : 0);
    }
}

/* A teacher of its own, one step of `p` with it saved at s->path; then the run goes on with what `change` made of a like one. */
static void refuse_teacher(const saved_run *s, void (*change)(apt_model *teacher, apt_distill_desc *how), const char *word)
{
    live l;
    plan q = s->p;
    q.teacher = NULL;
    start(&l, &q, 1);
    apt_distill_desc how = s->p.how;
    l.teacher = test_model(l.ctx, s->p.teacher, 77);
    test_randomise(l.teacher, 77);
    if (change != NULL) change(l.teacher, &how);
    if (change != NULL || word == NULL) assert_ok(l.ctx, apt_trainer_teacher(l.trainer, l.teacher, &how));
    const uint64_t before = test_model_sum(l.model);
    const apt_result r = apt_checkpoint_load(l.trainer, s->path, NULL, NULL);
    if (word == NULL) {
        assert_ok(l.ctx, r);
    } else {
        assert_result(r, APT_E_STATE);
        if (strstr(apt_error(l.ctx), word) == NULL) fail_msg("the message does not name %s: %s", word, apt_error(l.ctx));
        assert_true(test_model_sum(l.model) == before);
    }
    stop(&l);
}

static void change_weight(apt_model *teacher, apt_distill_desc *how)
{
    int64_t n = 0;
    float *v = test_parameter(teacher, "bert.encoder.layer.4.output.dense.weight", &n);
    (void)how;
    v[n - 1] = nextafterf(v[n - 1], 9.0f);
    assert_int_equal(apt_model_set(teacher, "bert.encoder.layer.4.output.dense.weight", v, n), APT_OK);
    free(v);
}

static void change_mask(apt_model *teacher, apt_distill_desc *how)
{
    float masks[512];
    apt_units u;
    (void)how;
    apt_model_units(teacher, &u);
    for (int32_t i = 0; i < u.total; i++) masks[i] = i == 3 ? 0.0f : 1.0f;
    assert_int_equal(apt_model_set_masks(teacher, masks, u.total), APT_OK);
}

static void change_shape(apt_model *teacher, apt_distill_desc *how)
{
    change_mask(teacher, how);
    assert_int_equal(apt_model_compact(teacher), APT_OK);
}

static void change_alpha(apt_model *teacher, apt_distill_desc *how)
{
    (void)teacher;
    how->alpha = 0.5f;
}

static void change_temperature(apt_model *teacher, apt_distill_desc *how)
{
    (void)teacher;
    how->temperature = 3;
}

static void test_resume_refused(void **state)
{
    (void)state;
    saved_run s;
    const apt_config c = case_config(0), bigger = teacher_config(&c);
    const plan p = taught_plan(&c, &bigger, APT_METHOD_APT);
    save_run(&s, &p, 15);
    refuse_teacher(&s, NULL, NULL);                                   /* a like one will do */
    refuse_teacher(&s, NULL, "with apt_trainer_teacher; this trainer runs without");
    refuse_teacher(&s, change_weight, "checksum");
    refuse_teacher(&s, change_mask, "checksum");
    refuse_teacher(&s, change_shape, "parameters");
    refuse_teacher(&s, change_quant, "quantisation");
    refuse_teacher(&s, change_alpha, "alpha");
    refuse_teacher(&s, change_temperature, "temperature");
    plan q = p;
    apt_config deeper = bigger;
    deeper.layers = 6;
    q.teacher = &deeper;
    refuse(s.path, &q, APT_E_STATE, "layers", &q);
    drop_run(&s);
    q.teacher = NULL;
    save_run(&s, &q, 15);
    refuse(s.path, &p, APT_E_STATE, "without apt_trainer_teacher", &p);
    drop_run(&s);
}

/* ---- kinds of teachers ------------------------------------------------------------------------------------------------ */

/* Pruned, quantised, with adapters that are not merged, with masks: each teaches what it computes itself. */
static void test_kinds(void **state)
{
    (void)state;
    for (int32_t kind = 0; kind < 5; kind++) {
        const apt_config c = case_config(kind == 4 ? 4 : 0), bigger = teacher_config(&c);
        plan p = taught_plan(&c, NULL, APT_METHOD_LORA);
        p.d.accumulate = 1;
        live l;
        start(&l, &p, 1);
        l.teacher = test_model(l.ctx, &bigger, 77);
        apt_distill_desc how = APT_ZERO;
        if (kind == 2) {                                              /* adapters stay where their trainer is gone */
            apt_train_desc d = APT_ZERO;
            d.steps = 1;
            apt_trainer_destroy(test_trainer(l.teacher, &d));
            assert_true(apti_adapter_total(l.teacher) > 0);
        }
        test_randomise(l.teacher, 77);
        if (kind == 0 || kind == 4) change_shape(l.teacher, &how);
        if (kind == 1) change_quant(l.teacher, &how);
        if (kind == 3) change_mask(l.teacher, &how);
        assert_ok(l.ctx, apt_trainer_teacher(l.trainer, l.teacher, &how));
        test_batch b;
        test_batch_at(&b, &c, 9, kind, 5);
        int64_t n = 0, m = 0;
        float *s = test_logits(l.model, &b.b, &n, NULL, 0), *t = test_logits(l.teacher, &b.b, &m, NULL, 0);
        const double wanted = plain_loss(&c, &b, t, s, 2.0);
        apt_step_info info;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, &info));
        test_near_value("distillation loss", info.distill_loss, wanted, 1e-4 * wanted);
        free(s);
        free(t);
        stop(&l);
    }
}

/* apt_trainer_observe, prune_now and magnitude pruning beside a teacher; the teacher is given back untouched. */
static void test_other_calls(void **state)
{
    (void)state;
    const apt_config c = case_config(2), bigger = teacher_config(&c);
    plan p = taught_plan(&c, &bigger, APT_METHOD_LORA);
    live l;
    start(&l, &p, 1);
    const uint64_t before = test_model_sum(l.teacher);
    test_batch b;
    apt_magnitude_desc how = APT_ZERO;
    how.sparsity = 0.5;
    test_batch_at(&b, &c, 9, 0, 5);
    assert_ok(l.ctx, apt_trainer_observe(l.trainer, &b.b));
    assert_ok(l.ctx, apt_trainer_prune_now(l.trainer, 0.4f));
    assert_ok(l.ctx, apt_trainer_magnitude(l.trainer, &how, NULL));
    assert_ok(l.ctx, apt_trainer_metric(l.trainer, 1.0));             /* no snapshot comes of it */
    run(l.trainer, &p, &l.tr, 0, micro_batches(&p));
    assert_true(l.trainer->teacher == l.teacher && test_model_sum(l.teacher) == before);
    apt_trainer_destroy(l.trainer);
    assert_true(test_model_sum(l.teacher) == before);
    apt_trainer *t = test_trainer(l.teacher, &p.d);                   /* free again */
    apt_trainer_destroy(t);
    apt_model_destroy(l.teacher);
    stop(&l);
}

/* ---- what is refused --------------------------------------------------------------------------------------------------- */

static void must_refuse(apt_trainer *t, apt_model *teacher, const apt_distill_desc *how, apt_result wanted, const char *word)
{
    assert_result(apt_trainer_teacher(t, teacher, how), wanted);
    if (strstr(apt_error(t->ctx), word) == NULL) fail_msg("the message does not name %s: %s", word, apt_error(t->ctx));
    assert_true(t->teacher == NULL && !t->external.given);
}

#define REFUSE_CONFIG(field, value, word)                                       \
    do {                                                                        \
        apt_config other = bigger;                                              \
        other.field = (value);                                                  \
        must_refuse(l.trainer, test_model(l.ctx, &other, 3), NULL, APT_E_SHAPE, word); \
    } while (0)

static void test_refused(void **state)
{
    (void)state;
    const apt_config c = case_config(0), bigger = teacher_config(&c);
    plan p = taught_plan(&c, NULL, APT_METHOD_LORA);
    live l, elsewhere;
    start(&l, &p, 1);
    start(&elsewhere, &p, 1);
    REFUSE_CONFIG(labels, 4, "labels is 4; expected the student's, 3");
    REFUSE_CONFIG(vocab, 38, "vocabulary size is 38; expected the student's, 37");
    REFUSE_CONFIG(task, APT_TASK_SPAN, "task is 3; expected the student's, 1");
    apt_model *teacher = test_model(l.ctx, &bigger, 3);
    assert_result(apt_trainer_teacher(NULL, teacher, NULL), APT_E_ARGUMENT);
    must_refuse(l.trainer, NULL, NULL, APT_E_ARGUMENT, "NULL");
    must_refuse(l.trainer, l.model, NULL, APT_E_ARGUMENT, "one model");
    must_refuse(l.trainer, elsewhere.model, NULL, APT_E_ARGUMENT, "another context");
    apt_distill_desc how = APT_ZERO;
    how.end_canary = 1;
    must_refuse(l.trainer, teacher, &how, APT_E_ARGUMENT, "APT_ZERO");
    how.end_canary = 0;
    static const float temperatures[3] = {-1.0f, 1e-4f, 1e4f}, alphas[3] = {-0.1f, 1.1f, 2.0f};
    for (int32_t i = 0; i < 3; i++) {
        how.temperature = temperatures[i];
        how.alpha = 0;
        must_refuse(l.trainer, teacher, &how, APT_E_RANGE, "temperature");
        how.temperature = 0;
        how.alpha = alphas[i];
        must_refuse(l.trainer, teacher, &how, APT_E_RANGE, "alpha");
    }
    float nan = 0;
    const uint32_t bits = 0x7fc00000u;
    memcpy(&nan, &bits, sizeof nan);
    how.alpha = nan;
    must_refuse(l.trainer, teacher, &how, APT_E_RANGE, "alpha");
    p.d.method = APT_METHOD_FULL;                                     /* leaves no adapters */
    apt_trainer *its = test_trainer(teacher, &p.d);
    must_refuse(l.trainer, teacher, NULL, APT_E_STATE, "trainer of its own");
    apt_trainer_destroy(its);
    apti_param *norm = apti_param_find(teacher, "bert.encoder.layer.2.output.LayerNorm.weight");
    assert_non_null(norm);
    norm->value[7] = nan;                                             /* as a step that went wrong may leave it */
    must_refuse(l.trainer, teacher, NULL, APT_E_NONFINITE, norm->name);
    norm->value[7] = 1;
    assert_ok(l.ctx, apt_trainer_teacher(l.trainer, teacher, NULL));
    assert_ok(l.ctx, apt_trainer_teacher(l.trainer, teacher, NULL));  /* again: it replaces itself */
    run(l.trainer, &p, &l.tr, 0, 2);
    assert_result(apt_trainer_teacher(l.trainer, teacher, NULL), APT_E_STATE);
    assert_non_null(strstr(apt_error(l.ctx), "fresh"));
    test_batch b;                                                     /* changed behind the trainer's back */
    test_batch_at(&b, &c, 9, 0, 5);
    const uint64_t sum = test_model_sum(l.model);
    norm->value[7] = nan;
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_NONFINITE);
    assert_non_null(strstr(apt_error(l.ctx), "teacher's output"));
    norm->value[7] = 1;
    its = test_trainer(teacher, &p.d);
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_STATE);
    assert_non_null(strstr(apt_error(l.ctx), "got a trainer"));
    assert_result(apt_trainer_observe(l.trainer, &b.b), APT_E_STATE);
    apt_trainer_destroy(its);
    change_quant(teacher, NULL);
    assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_STATE);
    assert_non_null(strstr(apt_error(l.ctx), "quantised"));
    assert_true(test_model_sum(l.model) == sum);
    stop(&l);
    stop(&elsewhere);
}

/* Batches that the student can read and the teacher cannot; an encoder's regression head has no labels to compare. */
static void test_batches_refused(void **state)
{
    (void)state;
    for (int32_t i = 0; i < 2; i++) {
        const apt_config c = case_config(1);
        apt_config bigger = teacher_config(&c);
        bigger.labels = 0;
        if (i == 0) bigger.positions = 6;
        else bigger.types = 1;
        const plan p = taught_plan(&c, &bigger, APT_METHOD_LORA);
        live l;
        start(&l, &p, 1);
        test_batch b;
        apt_rng rng = apt_rng_make(1, 1);
        test_batch_fill(&b, &c, &rng, 3, 8, 9);
        assert_result(apt_trainer_step(l.trainer, &b.b, NULL), APT_E_RANGE);
        assert_non_null(strstr(apt_error(l.ctx), "the teacher cannot read"));
        assert_non_null(strstr(apt_error(l.ctx), i == 0 ? "expected 1..4" : "type"));
        test_batch_fill(&b, &c, &rng, 3, 3, 4);
        b.b.types = NULL;
        assert_ok(l.ctx, apt_trainer_step(l.trainer, &b.b, NULL));
        stop(&l);
    }
    const apt_config t5 = test_decoder(0), llama = test_decoder(2);   /* one vocabulary, one task, other batches */
    plan p = taught_plan(&t5, NULL, APT_METHOD_LORA);
    live l;
    start(&l, &p, 1);
    must_refuse(l.trainer, test_model(l.ctx, &llama, 3), NULL, APT_E_SHAPE, "encoder in front of a decoder (0 or 1) is 0");
    stop(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss),          cmocka_unit_test(test_equal_teacher),   cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_student_learns), cmocka_unit_test(test_threads),        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_resume_refused), cmocka_unit_test(test_kinds),          cmocka_unit_test(test_other_calls),
        cmocka_unit_test(test_refused),        cmocka_unit_test(test_batches_refused),
    };
    return cmocka_run_group_tests_name("distill", tests, NULL, NULL);
}
