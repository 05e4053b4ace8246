/* What goes wrong around the library: memory that runs out at every single allocation of every call that makes some, threads that
   do not start, disks that refuse. After each failure the call is repeated, and the run must go on as if nothing had happened,
   bit for bit.
   link: -Wl,--wrap=write,--wrap=close,--wrap=fsync,--wrap=rename,--wrap=pthread_create,--wrap=pthread_attr_init
   link: -Wl,--wrap=pthread_mutex_init,--wrap=pthread_mutex_destroy,--wrap=pthread_cond_init,--wrap=pthread_cond_destroy
   build: cc -std=c11 -O2 tests/test_faults.c -o test_faults -lcmocka -lpthread -lm $(sed -n 's/^ *link: //p' tests/test_faults.c) */
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdbool.h>
#include <sys/resource.h>
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"
#include "train_test.h"

/* ---- system calls that fail on demand: the call number fail_at of those that pass here ---- */

static struct { int64_t calls, fail_at; bool failed; int32_t mutexes, conditions; } g_system = {0, -1, false, 0, 0};

static bool system_fails(void)
{
    if (g_system.calls++ != g_system.fail_at) return false;
    g_system.failed = true;
    return true;
}

static void system_fail_at(int64_t n)
{
    g_system.calls = 0;
    g_system.fail_at = n;
    g_system.failed = false;
}

/* The linker (--wrap) puts the __wrap_ function in the place of every call in the program's own objects, and knows the system's
   as __real_. */
#define FAULTY(type, name, parameters, arguments, fault, success)                       \
    type __real_##name parameters;                                                      \
    type __wrap_##name parameters;                                                      \
    type __wrap_##name parameters                                                       \
    {                                                                                   \
        if (system_fails()) fault;                                                      \
        success;                                                                        \
        return __real_##name arguments;                                                 \
    }

static int fails_with(int code)
{
    errno = code;
    return -1;
}

/* A failed close has closed all the same. */
FAULTY(int, close, (int file), (file), return (__real_close(file), fails_with(EIO)), (void)0)
FAULTY(ssize_t, write, (int file, const void *data, size_t bytes), (file, data, bytes), return fails_with(ENOSPC), (void)0)
FAULTY(int, fsync, (int file), (file), return fails_with(EIO), (void)0)
FAULTY(int, rename, (const char *from, const char *to), (from, to), return fails_with(EACCES), (void)0)
FAULTY(int, pthread_create, (pthread_t *thread, const pthread_attr_t *attributes, void *(*entry)(void *), void *arg),
       (thread, attributes, entry, arg), return EAGAIN, (void)0)
FAULTY(int, pthread_attr_init, (pthread_attr_t *attributes), (attributes), return ENOMEM, (void)0)
FAULTY(int, pthread_mutex_init, (pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes), (mutex, attributes),
       return ENOMEM, g_system.mutexes++)
FAULTY(int, pthread_cond_init, (pthread_cond_t *condition, const pthread_condattr_t *attributes), (condition, attributes),
       return ENOMEM, g_system.conditions++)

#define COUNTED(type, name, count)                                                      \
    int __real_##name(type *object);                                                    \
    int __wrap_##name(type *object);                                                    \
    int __wrap_##name(type *object)                                                     \
    {                                                                                   \
        count--;                                                                        \
        return __real_##name(object);                                                   \
    }

COUNTED(pthread_mutex_t, pthread_mutex_destroy, g_system.mutexes)
COUNTED(pthread_cond_t, pthread_cond_destroy, g_system.conditions)

/* ---- one call under attack ------------------------------------------------------------------------------------------- */

typedef struct fixture {
    live l;
    plan p;
    int64_t micro;                    /* the next micro-batch */
    uint64_t value;                   /* checksum of what the call gave back */
    char dir[512], path[600];
} fixture;

typedef struct attack {
    const char *name;
    plan p;
    int64_t before;                   /* micro-batches that run first */
    void (*setup)(fixture *f);        /* what else comes before the call, or NULL */
    apt_result (*call)(fixture *f);
    int64_t least;                    /* allocations that the call makes, at least */
    bool partial;                     /* documented: it may have done its first part, and events may come again */
} attack;

static void begin(fixture *f, const attack *a)
{
    memset(f, 0, sizeof *f);
    f->p = a->p;
    f->micro = a->before;
    test_dir(f->dir, sizeof f->dir);
    test_join(f->path, sizeof f->path, f->dir, "file");
    start(&f->l, &f->p, 1);
    run(f->l.trainer, &f->p, &f->l.tr, 0, a->before);
    if (a->setup != NULL) a->setup(f);
}

static void end(fixture *f)
{
    stop(&f->l);
    test_remove(f->dir);
}

/* Everything that can be seen: weights, masks, losses, events, results, how many files there are. */
static uint64_t state_sum(const fixture *f)
{
    uint64_t sum = f->l.model != NULL ? test_model_sum(f->l.model) : 0;
    const int32_t files = test_count_files(f->dir);
    sum = test_hash(sum, f->l.tr.sum, sizeof f->l.tr.sum);
    sum = test_hash(sum, f->l.tr.fired, sizeof f->l.tr.fired);
    sum = test_hash(sum, f->l.tr.events, sizeof f->l.tr.events);
    sum = test_hash(sum, &f->value, sizeof f->value);
    return test_hash(sum, &files, sizeof files);
}

/* Some steps more: what cannot be seen (moments, salience, sums) shows in them. */
static uint64_t go_on(fixture *f)
{
    if (f->l.trainer == NULL) return state_sum(f);
    const int64_t most = micro_batches(&f->p);
    run(f->l.trainer, &f->p, &f->l.tr, f->micro, f->micro + 5 < most ? f->micro + 5 : most);
    return state_sum(f);
}

static bool unfinished(const fixture *f)
{
    return f->l.trainer != NULL && f->l.trainer->stage != APTI_STAGE_NONE;
}

/* Lets every allocation of the call fail, and every fourth with all later ones; then repeats the call. Returns how many there
   are. */
static int64_t attack_every_allocation(const attack *a)
{
    fixture f;
    int64_t optional = 0;
    int32_t fired[MOST_MICRO];
    begin(&f, a);
    const uint64_t before = state_sum(&f);
    const int64_t first = f.l.memory.calls;
    assert_ok(f.l.ctx, a->call(&f));
    const int64_t count = f.l.memory.calls - first;
    memcpy(fired, f.l.tr.fired, sizeof fired);
    const uint64_t after = state_sum(&f), later = go_on(&f);
    end(&f);
    for (int64_t i = 0; i < count + count / 4; i++) {
        const bool once = i < count;
        const int64_t n = once ? i : 4 * (i - count) + 1;
        begin(&f, a);
        f.l.memory.fail_at = f.l.memory.calls + n;
        f.l.memory.once = once;
        apt_result r = a->call(&f);
        f.l.memory.fail_at = -1;
        if (!f.l.memory.failed) fail_msg("%s: allocation %lld was not reached the second time", a->name, (long long)n);
        if (r == APT_OK) {                                            /* something that only saves memory was left out */
            optional += once;
        } else {
            if (r != APT_E_MEMORY || f.l.messages.result != APT_E_MEMORY || apt_error(f.l.ctx)[0] == 0)
                fail_msg("%s: allocation %lld failed, the result is %s: %s", a->name, (long long)n, apt_result_text(r),
                         apt_error(f.l.ctx));
            if (!a->partial && !unfinished(&f) && state_sum(&f) != before)
                fail_msg("%s: something changed when allocation %lld failed", a->name, (long long)n);
            assert_ok(f.l.ctx, a->call(&f));
            if (a->partial) memcpy(f.l.tr.fired, fired, sizeof fired);
        }
        if (state_sum(&f) != after) fail_msg("%s: not the same after the failure of allocation %lld", a->name, (long long)n);
        if (go_on(&f) != later) fail_msg("%s: goes on differently after the failure of allocation %lld", a->name, (long long)n);
        end(&f);
    }
    if (count - optional < a->least)
        fail_msg("%s: only %lld of %lld allocations are needed, expected %lld", a->name, (long long)(count - optional),
                 (long long)count, (long long)a->least);
    return count;
}

/* ---- plans ----------------------------------------------------------------------------------------------------------- */

/* A shorter APT run in which everything happens. */
static plan short_plan(apt_family family, apt_task_kind task)
{
    plan p = apt_plan(family, task);
    p.c.vocab = 11;
    p.c.positions = 12;
    p.d.steps = 9;
    p.d.prune_begin = 1;
    p.d.prune_end = 7;
    p.d.update_frequency = 2;
    p.d.evaluate_every = 2;
    p.sequences = 3;
    return p;
}

static plan plain_plan(apt_method method, apt_task_kind task)
{
    plan p = short_plan(APT_BERT, task);
    p.d.method = method;
    p.d.target_sparsity = 0;
    p.d.prune_begin = p.d.prune_end = 0;
    return p;
}

/* The same for the other families, as small as they can be: T5 with one layer in each stack, LLaMA with one layer of two KV groups.
   The head of both is tied and has an adapter; LLaMA has a teacher because the plan asks for one. */
static plan decoder_plan(int32_t which)
{
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.c = test_decoder(which);
    p.c.vocab = 11;
    p.c.hidden = 8;
    p.c.neurons = 6;
    p.c.head_dim = 2;
    p.c.layers = p.c.decoder_layers > 0 ? 3 : 1;
    p.c.decoder_layers = p.c.decoder_layers > 0;
    p.c.untied = 0;
    p.c.scaled_head = p.c.decoder_layers;
    p.d.adapt = APT_ADAPT_QUERY | APT_ADAPT_VALUE | APT_ADAPT_UP | APT_ADAPT_HEAD;
    p.d.steps = 8;
    p.d.prune_end = 5;
    p.d.accumulate = 1;
    p.d.rank = 1;
    p.d.min_hidden = 4;
    p.d.distill_pred = 0.1f;
    p.d.distill_layer = 0.9f;
    p.d.evaluate_every = 3;
    return p;
}

enum { DECODERS = 2 };
static const int32_t g_decoders[DECODERS] = {1, 4};                   /* gated T5; LLaMA with biases (Qwen2) */

/* ---- steps ----------------------------------------------------------------------------------------------------------- */

static apt_result call_step(fixture *f)
{
    const apt_result r = run_one(f->l.trainer, &f->p, &f->l.tr, f->micro);
    f->micro += r == APT_OK;
    return r;
}

/* Attacks every micro-batch that allocates. Returns the events that happened in attacked ones. */
static uint32_t attack_steps(const plan *p, int64_t *plain)
{
    live l;
    int64_t count[MOST_MICRO];
    uint32_t events = 0;
    start(&l, p, 1);
    for (int64_t i = 0; i < micro_batches(p); i++) {
        const int64_t first = l.memory.calls;
        run(l.trainer, p, &l.tr, i, i + 1);
        count[i] = l.memory.calls - first;
    }
    for (int64_t i = 0; i < micro_batches(p); i++) {
        char name[64];
        snprintf(name, sizeof name, "apt_trainer_step, micro-batch %d", (int)i);
        const attack a = {name, *p, i, NULL, call_step, 0, false};
        if (count[i] == 0) continue;
        assert_int_equal(attack_every_allocation(&a), count[i]);
        events |= l.tr.events[i];
        if ((l.tr.events[i] & ~(1u << APT_EVENT_STEP)) == 0) plain[l.tr.events[i] != 0]++;
    }
    stop(&l);
    return events;
}

static void test_steps(void **state)
{
    (void)state;
    const uint32_t wanted = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | 1u << APT_EVENT_TEACHER |
                            1u << APT_EVENT_EVALUATE;
    int64_t plain[2] = {0, 0};        /* steps with a larger batch and no event: inside an accumulation, at its end */
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    assert_int_equal(attack_steps(&p, plain) & wanted, wanted);
    assert_true(plain[0] > 1);
    p = short_plan(APT_ROBERTA, APT_TASK_SPAN);
    p.d.accumulate = 1;
    p.d.reset_moments = 1;
    assert_int_equal(attack_steps(&p, plain) & wanted, wanted);
    p = plain_plan(APT_METHOD_LORA, APT_TASK_REGRESS);
    (void)attack_steps(&p, plain);
    p = plain_plan(APT_METHOD_FULL, APT_TASK_MLM);
    p.d.accumulate = 1;
    (void)attack_steps(&p, plain);
    assert_true(plain[1] > 1);
}

static void test_decoder_steps(void **state)
{
    (void)state;
    const uint32_t wanted = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | 1u << APT_EVENT_TEACHER |
                            1u << APT_EVENT_EVALUATE;
    for (int32_t i = 0; i < DECODERS; i++) {
        int64_t plain[2] = {0, 0};
        plan p = decoder_plan(g_decoders[i]);
        assert_int_equal(attack_steps(&p, plain) & wanted, wanted);
        p.d.method = APT_METHOD_FULL;
        p.d.steps = 3;
        p.d.target_sparsity = 0;
        p.d.prune_begin = p.d.prune_end = 0;
        (void)attack_steps(&p, plain);
        assert_true(plain[1] > 0);
    }
}

static apt_config small_teacher(const apt_config *student)
{
    apt_config c = *student;
    c.hidden += 2;
    return c;
}

/* Steps with another model as the teacher: an APT run of an encoder, all weights of a decoder. */
static void test_taught_steps(void **state)
{
    (void)state;
    int64_t plain[2] = {0, 0};
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    apt_config teacher = small_teacher(&p.c);
    p.teacher = &teacher;
    const uint32_t events = attack_steps(&p, plain);
    assert_true((events >> APT_EVENT_COMPACT & 1) == 1 && (events >> APT_EVENT_TEACHER & 1) == 0);
    p = decoder_plan(1);
    p.d.method = APT_METHOD_FULL;
    p.d.steps = 3;
    p.d.target_sparsity = 0;
    p.d.prune_begin = p.d.prune_end = 0;
    teacher = small_teacher(&p.c);
    p.teacher = &teacher;
    (void)attack_steps(&p, plain);
    assert_true(plain[1] > 0);
}

/* Every allocation of a whole run fails once: each step is repeated until nothing of it fails. */
static void test_whole_runs(void **state)
{
    (void)state;
    for (int32_t task = APT_TASK_CLASSIFY; task <= APT_TASK_MLM; task++) {
        plan p = apt_plan(task % 2 == 0 ? APT_BERT : APT_ROBERTA, (apt_task_kind)task);
        live a, b;
        const uint64_t sum = run_all(&a, &p);
        int64_t failures = 0;
        p.threads = 2;
        start(&b, &p, 1);
        for (int64_t i = 0; i < micro_batches(&p); i++)
            for (int64_t n = 0;; n++) {
                b.memory.fail_at = b.memory.calls + n;
                b.memory.once = n % 2 == 0;
                b.memory.failed = false;
                const apt_result r = run_one(b.trainer, &p, &b.tr, i);
                b.memory.fail_at = -1;
                if (r == APT_OK) break;
                assert_true(r == APT_E_MEMORY && b.memory.failed);
                failures++;
            }
        assert_ok(b.ctx, apt_trainer_finish(b.trainer));
        assert_same_trace(&a.tr, &b.tr, 0, micro_batches(&p), "with failures");
        assert_memory_equal(a.tr.events, b.tr.events, sizeof a.tr.events);
        assert_memory_equal(a.tr.fired, b.tr.fired, sizeof a.tr.fired);
        assert_true(test_model_sum(b.model) == sum && failures > 100);
        stop(&a);
        stop(&b);
    }
}

/* Memory runs out behind an update; the run is saved in that state and goes on from the file. */
static void test_saved_unfinished(void **state)
{
    (void)state;
    char dir[512], path[600];
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    live a, b;
    const uint64_t sum = run_all(&a, &p);
    uint32_t stages = 0;
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "run");
    for (int64_t i = 5; i < micro_batches(&p) - 1; i += 2)            /* the second micro-batch of a step */
        for (int64_t n = 0; n < 400; n += 3) {
            start(&b, &p, 1);
            run(b.trainer, &p, &b.tr, 0, i);
            b.memory.fail_at = b.memory.calls + n;
            const apt_result r = run_one(b.trainer, &p, &b.tr, i);
            b.memory.fail_at = -1;
            const int32_t stage = b.trainer->stage;
            if (r != APT_OK && stage != APTI_STAGE_NONE) {
                stages |= 1u << stage;
                assert_result(apt_trainer_metric(b.trainer, 1e6), APT_E_STATE);
                assert_result(apt_trainer_prune_now(b.trainer, 0.5f), APT_E_STATE);
                assert_non_null(strstr(apt_error(b.ctx), "repeat it"));
                assert_ok(b.ctx, apt_checkpoint_save(b.trainer, path, NULL, 0));
                stop(&b);
                start(&b, &p, 999);
                assert_ok(b.ctx, apt_checkpoint_load(b.trainer, path, NULL, NULL));
                assert_int_equal(b.trainer->stage, stage);
                run(b.trainer, &p, &b.tr, i, micro_batches(&p));
                assert_ok(b.ctx, apt_trainer_finish(b.trainer));
                assert_same_trace(&a.tr, &b.tr, i + 1, micro_batches(&p), "saved unfinished");
                if (test_model_sum(b.model) != sum) fail_msg("micro-batch %d, allocation %d: other weights", (int)i, (int)n);
            }
            stop(&b);
            if (r == APT_OK) break;
        }
    const uint32_t wanted = 1u << APTI_STAGE_GLIDE | 1u << APTI_STAGE_DECIDE | 1u << APTI_STAGE_GROW | 1u << APTI_STAGE_EVALUATE;
    if ((stages & wanted) != wanted) fail_msg("only stages %x were met", stages);
    stop(&a);
    test_remove(dir);
}

/* The first micro-batch in which an event of this kind fires. */
static int64_t micro_with(const plan *p, apt_event_kind kind)
{
    live l;
    int64_t i = 0;
    start(&l, p, 1);
    for (; i < micro_batches(p); i++) {
        run(l.trainer, p, &l.tr, i, i + 1);
        if ((l.tr.events[i] >> kind & 1) != 0) break;
    }
    stop(&l);
    assert_true(i < micro_batches(p));
    return i;
}

/* A callback cancels, then the same call runs out of memory: the repeated call says that it was cancelled. */
static void test_cancelled_and_failed(void **state)
{
    (void)state;
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    p.d.accumulate = 1;
    const int64_t i = micro_with(&p, APT_EVENT_PRUNE);
    int32_t met = 0;
    for (int64_t n = 0;; n++) {
        live l;
        start(&l, &p, 1);
        run(l.trainer, &p, &l.tr, 0, i);
        l.tr.cancel_at = APT_EVENT_PRUNE;
        l.memory.fail_at = l.memory.calls + n;
        const apt_result r = run_one(l.trainer, &p, &l.tr, i);
        l.memory.fail_at = -1;
        if (r == APT_E_MEMORY) {
            met += l.tr.cancelled;
            assert_result(run_one(l.trainer, &p, &l.tr, i), APT_E_CANCELLED);
        }
        run(l.trainer, &p, &l.tr, i + 1, i + 2);
        stop(&l);
        if (r == APT_E_CANCELLED) break;
    }
    assert_true(met > 0);
}

/* ---- other calls of the trainer -------------------------------------------------------------------------------------- */

static apt_result call_trainer_create(fixture *f)
{
    apt_train_desc d = f->p.d;
    d.on_event = on_event;
    d.user = &f->l.tr;
    apt_trainer *t = NULL;
    const apt_result r = apt_trainer_create(f->l.model, &d, &t);
    if (r != APT_OK) assert_null(t);
    if (r == APT_OK) f->l.trainer = t;
    return r;
}

static void setup_no_trainer(fixture *f)
{
    apt_trainer_destroy(f->l.trainer);
    f->l.trainer = NULL;
    assert_ok(f->l.ctx, apt_model_merge(f->l.model, NULL, NULL));
}

static void batch_of(const fixture *f, test_batch *b, int64_t index, int32_t sequences)
{
    test_batch_at(b, &f->p.c, 77, index, sequences);
}

static apt_result call_observe(fixture *f)
{
    test_batch b;
    batch_of(f, &b, 0, 9);
    return apt_trainer_observe(f->l.trainer, &b.b);
}

static void setup_observe(fixture *f)
{
    assert_ok(f->l.ctx, call_observe(f));
}

static apt_result call_prune_now(fixture *f)
{
    return apt_trainer_prune_now(f->l.trainer, 0.5f);
}

static apt_result call_finish(fixture *f)
{
    const apt_result r = apt_trainer_finish(f->l.trainer);
    if (r == APT_OK) assert_null(f->l.model->masks);
    return r;
}

static apt_result call_metric(fixture *f)
{
    return apt_trainer_metric(f->l.trainer, 1e3);
}

static apt_result call_set(fixture *f)
{
    int64_t n = 0;
    float *v = test_parameter(f->l.model, f->l.model->embed[APTI_WORD]->name, &n);
    v[0] += 1;
    const apt_result r = apt_model_set(f->l.model, f->l.model->embed[APTI_WORD]->name, v, n);
    free(v);
    return r;
}

static void test_trainer_calls(void **state)
{
    (void)state;
    const plan lora = plain_plan(APT_METHOD_LORA, APT_TASK_REGRESS), full = plain_plan(APT_METHOD_FULL, APT_TASK_SPAN);
    const plan apt = short_plan(APT_ROBERTA, APT_TASK_CLASSIFY);
    const int64_t decided = micro_with(&apt, APT_EVENT_PRUNE) + 1;    /* a decision is gliding, a teacher is there */
    const attack attacks[] = {
        {"apt_trainer_create, APT", apt, 0, setup_no_trainer, call_trainer_create, 20, false},
        {"apt_trainer_create, LoRA", lora, 0, setup_no_trainer, call_trainer_create, 20, false},
        {"apt_trainer_create, full", full, 0, setup_no_trainer, call_trainer_create, 100, false},
        {"apt_trainer_observe", lora, 2, NULL, call_observe, 1, false},
        {"apt_trainer_prune_now", lora, 2, setup_observe, call_prune_now, 9, true},
        {"apt_trainer_prune_now, full", full, 2, setup_observe, call_prune_now, 9, true},
        {"apt_trainer_prune_now while gliding", apt, decided, setup_observe, call_prune_now, 40, true},
        {"apt_trainer_finish", apt, decided, NULL, call_finish, 30, false},
        {"apt_trainer_metric", apt, decided, NULL, call_metric, 20, false},
        {"apt_model_set beside a teacher", apt, decided, NULL, call_set, 1, false},
    };
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) (void)attack_every_allocation(&attacks[i]);
}

/* ---- checkpoints ----------------------------------------------------------------------------------------------------- */

static void check_old(const fixture *f)
{
    size_t bytes = 0;
    char *text = test_read_file(f->path, &bytes);
    assert_true(text != NULL && bytes == 3 && memcmp(text, "old", 3) == 0);
    free(text);
}

static void setup_old(fixture *f)
{
    test_write_file(f->path, "old", 3);
}

static apt_result call_checkpoint_save(fixture *f)
{
    const apt_result r = apt_checkpoint_save(f->l.trainer, f->path, &f->micro, sizeof f->micro);
    if (r != APT_OK) check_old(f);
    return r;
}

static void setup_checkpoint(fixture *f)
{
    assert_ok(f->l.ctx, apt_checkpoint_save(f->l.trainer, f->path, &f->micro, sizeof f->micro));
    apt_model_destroy(f->l.model);
    f->l.model = test_model(f->l.ctx, &f->p.c, 999);
    assert_ok(f->l.ctx, call_trainer_create(f));
}

static apt_result call_checkpoint_load(fixture *f)
{
    int64_t micro = -1;
    size_t bytes = sizeof micro;
    const apt_result r = apt_checkpoint_load(f->l.trainer, f->path, &micro, &bytes);
    assert_true(r == APT_OK ? micro == f->micro : micro == -1 && bytes == sizeof micro);
    return r;
}

/* A run with a teacher goes on with a like one. */
static void setup_taught_checkpoint(fixture *f)
{
    setup_checkpoint(f);
    assert_ok(f->l.ctx, apt_trainer_teacher(f->l.trainer, f->l.teacher, NULL));
}

static apt_result call_teacher(fixture *f)
{
    const apt_result r = apt_trainer_teacher(f->l.trainer, f->l.teacher, &f->p.how);
    if (r != APT_OK) assert_true(f->l.trainer->teacher == NULL && !f->l.trainer->external.given);
    f->value += r == APT_OK;
    return r;
}

static void setup_untaught(fixture *f)
{
    apti_teacher_drop(f->l.trainer);
}

static void test_checkpoints(void **state)
{
    (void)state;
    const plan lora = plain_plan(APT_METHOD_LORA, APT_TASK_REGRESS), full = plain_plan(APT_METHOD_FULL, APT_TASK_MLM);
    const plan apt = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    const int64_t decided = micro_with(&apt, APT_EVENT_PRUNE) + 1, cut = micro_with(&apt, APT_EVENT_COMPACT) + 1;
    const apt_config teacher = small_teacher(&apt.c);
    plan taught = apt;
    taught.teacher = &teacher;
    const attack attacks[] = {
        {"apt_checkpoint_save, LoRA", lora, 2, setup_old, call_checkpoint_save, 20, false},
        {"apt_checkpoint_save, decided", apt, decided, setup_old, call_checkpoint_save, 20, false},
        {"apt_checkpoint_save, cut", apt, cut + 1, setup_old, call_checkpoint_save, 20, false},
        {"apt_checkpoint_load, LoRA", lora, 2, setup_checkpoint, call_checkpoint_load, 60, false},
        {"apt_checkpoint_load, full", full, 3, setup_checkpoint, call_checkpoint_load, 100, false},
        {"apt_checkpoint_load, decided", apt, decided, setup_checkpoint, call_checkpoint_load, 100, false},
        {"apt_checkpoint_load, cut", apt, cut + 1, setup_checkpoint, call_checkpoint_load, 100, false},
        {"apt_checkpoint_save, another model teaches", taught, cut + 1, setup_old, call_checkpoint_save, 20, false},
        {"apt_checkpoint_load, another model teaches", taught, cut + 1, setup_taught_checkpoint, call_checkpoint_load, 60, false},
        {"apt_trainer_teacher", taught, 0, setup_untaught, call_teacher, 3, false},
    };
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) (void)attack_every_allocation(&attacks[i]);
}

/* ---- models ---------------------------------------------------------------------------------------------------------- */

/* Takes a new model down to its checksum. */
static void take_value(fixture *f, apt_result r, apt_model *m)
{
    if (r != APT_OK) assert_null(m);
    else f->value = test_model_sum(m);
    apt_model_destroy(m);
}

static apt_result call_create(fixture *f)
{
    apt_model *m = NULL;
    const apt_result r = apt_model_create(f->l.ctx, &f->p.c, 3, &m);
    take_value(f, r, m);
    return r;
}

static void setup_folder(fixture *f)
{
    setup_no_trainer(f);
    assert_ok(f->l.ctx, apt_model_save(f->l.model, f->dir));
}

static apt_result call_load(fixture *f)
{
    apt_model *m = NULL;
    const apt_result r = apt_model_load(f->l.ctx, f->dir, NULL, &m);
    take_value(f, r, m);
    return r;
}

static apt_result call_forward(fixture *f)
{
    test_batch b;
    float logits[2048];
    apt_output out = APT_ZERO;
    batch_of(f, &b, 1, 8);
    out.logits = logits;
    out.logits_capacity = 2048;
    const apt_result r = apt_model_forward(f->l.model, &b.b, &out);
    if (r == APT_OK) f->value = test_hash(0, logits, (size_t)out.logits_count * sizeof(float));
    return r;
}

static void setup_forward(fixture *f)
{
    test_batch b;
    apt_output out = APT_ZERO;
    batch_of(f, &b, 2, 1);
    assert_ok(f->l.ctx, apt_model_forward(f->l.model, &b.b, &out));
}

/* Adapters that do something, no trainer. */
static void setup_adapted(fixture *f)
{
    apt_trainer_destroy(f->l.trainer);
    f->l.trainer = NULL;
    test_randomise(f->l.model, 5);
}

static apt_result call_merge(fixture *f)
{
    test_batch b;
    float difference = -1;
    batch_of(f, &b, 1, 8);
    const apt_result r = apt_model_merge(f->l.model, &b.b, &difference);
    if (r == APT_OK) {
        assert_true(difference > 0 && difference < 1e-3f);
        f->value = test_hash(0, &difference, sizeof difference);
    }
    return r;
}

static void setup_masks(fixture *f)
{
    float masks[256];
    apt_units u;
    setup_no_trainer(f);
    apt_model_units(f->l.model, &u);
    for (int32_t i = 0; i < u.total; i++) masks[i] = i % 3 == 0 ? 0.0f : 1.0f;
    assert_ok(f->l.ctx, apt_model_set_masks(f->l.model, masks, u.total));
}

static apt_result call_compact(fixture *f)
{
    return apt_model_compact(f->l.model);
}

static apt_result call_masks(fixture *f)
{
    float masks[256];
    apt_units u;
    apt_model_units(f->l.model, &u);
    for (int32_t i = 0; i < u.total; i++) masks[i] = i % 2 == 0 ? 0.5f : 1.0f;
    return apt_model_set_masks(f->l.model, masks, u.total);
}

static void folder_value(fixture *f)
{
    f->value = 0;
    for (int32_t i = 0; i < 2; i++) {
        char path[700];
        size_t bytes = 0;
        char *text = test_read_file(test_join(path, sizeof path, f->dir, i == 0 ? "model.safetensors" : "config.json"), &bytes);
        assert_non_null(text);
        f->value = test_hash(f->value, text, bytes);
        free(text);
    }
}

/* An older model in the folder, another one to be saved. */
static void setup_older(fixture *f)
{
    setup_folder(f);
    folder_value(f);
    apt_model_destroy(f->l.model);
    f->l.model = test_model(f->l.ctx, &f->p.c, 7);
}

static apt_result call_save(fixture *f)
{
    const apt_result r = apt_model_save(f->l.model, f->dir);
    folder_value(f);
    return r;
}

static apt_result call_estimate(fixture *f)
{
    apt_estimate_info info = APT_ZERO;
    const apt_result r = apt_estimate(f->l.ctx, &f->p.c, &f->p.d, 40, 4, &info);
    if (r == APT_OK) f->value = test_hash(0, &info, sizeof info);
    return r;
}

/* Texts for two sequences; rows, seeds and lengths of the same call never change. */
static apt_result generate(fixture *f, int32_t beams)
{
    test_batch b;
    int32_t out[2 * 3 + 2] = {0};
    apt_generate_desc d = APT_ZERO;
    batch_of(f, &b, 1, 2);
    d.max_tokens = 3;
    d.beams = beams;
    d.ignore_end = 1;
    const apt_result r = apt_generate(f->l.model, &b.b, &d, out, out + 6);
    if (r == APT_OK) f->value = test_hash(0, out, sizeof out);
    return r;
}

static apt_result call_generate(fixture *f)
{
    return generate(f, 0);
}

static apt_result call_beams(fixture *f)
{
    return generate(f, 2);
}

static void setup_generate(fixture *f)
{
    assert_ok(f->l.ctx, call_generate(f));
    f->value = 0;
}

/* All calls of a trainer and of a model that are not a step, for T5 and LLaMA. */
static void test_decoder_calls(void **state)
{
    (void)state;
    for (int32_t i = 0; i < DECODERS; i++) {
        const plan p = decoder_plan(g_decoders[i]);
        const int64_t decided = micro_with(&p, APT_EVENT_PRUNE) + 1, cut = micro_with(&p, APT_EVENT_COMPACT) + 1;
        const attack attacks[] = {
            {"apt_model_create", p, 0, NULL, call_create, 15, false},
            {"apt_model_load", p, 0, setup_folder, call_load, 30, false},
            {"apt_model_save", p, 0, setup_older, call_save, 10, false},
            {"apt_model_forward", p, 1, NULL, call_forward, 3, false},
            {"apt_model_merge, tied head", p, 1, setup_adapted, call_merge, 6, false},
            {"apt_model_compact", p, 0, setup_masks, call_compact, 5, false},
            {"apt_model_set beside a teacher", p, decided, NULL, call_set, 1, false},
            {"apt_trainer_create", p, 0, setup_no_trainer, call_trainer_create, 20, false},
            {"apt_trainer_observe", p, 1, NULL, call_observe, 1, false},
            {"apt_trainer_prune_now", p, decided, setup_observe, call_prune_now, 20, true},
            {"apt_trainer_finish", p, decided, NULL, call_finish, 20, false},
            {"apt_trainer_metric", p, decided, NULL, call_metric, 20, false},
            {"apt_checkpoint_save", p, cut + 1, setup_old, call_checkpoint_save, 20, false},
            {"apt_checkpoint_load, decided", p, decided, setup_checkpoint, call_checkpoint_load, 60, false},
            {"apt_checkpoint_load, cut", p, cut + 1, setup_checkpoint, call_checkpoint_load, 60, false},
            {"apt_estimate", p, 0, NULL, call_estimate, 7, false},
            {"apt_generate, first", p, 1, NULL, call_generate, 4, false},
            {"apt_generate, masked, with beams", p, decided, NULL, call_beams, 4, false},
            {"apt_generate, with beams behind a plain one", p, cut, setup_generate, call_beams, 1, false},
        };
        for (size_t k = 0; k < sizeof attacks / sizeof attacks[0]; k++) (void)attack_every_allocation(&attacks[k]);
    }
}

static void test_models(void **state)
{
    (void)state;
    const plan p = plain_plan(APT_METHOD_LORA, APT_TASK_CLASSIFY), apt = short_plan(APT_ROBERTA, APT_TASK_SPAN);
    const attack attacks[] = {
        {"apt_model_create", p, 0, NULL, call_create, 40, false},
        {"apt_model_load", p, 0, setup_folder, call_load, 60, false},
        {"apt_model_forward, first", p, 1, NULL, call_forward, 3, false},
        {"apt_model_forward, larger batch", p, 1, setup_forward, call_forward, 1, false},
        {"apt_model_merge", p, 1, setup_adapted, call_merge, 5, false},
        {"apt_model_set_masks", p, 0, NULL, call_masks, 1, false},
        {"apt_model_compact", p, 0, setup_masks, call_compact, 5, false},
        {"apt_model_save", p, 0, setup_older, call_save, 10, false},
        {"apt_estimate", apt, 0, NULL, call_estimate, 7, false},
    };
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) (void)attack_every_allocation(&attacks[i]);
}

/* Small integers of the weights are made, and made again behind a cut, wherever a pass begins. */
static void test_quantised(void **state)
{
    (void)state;
    const uint32_t wanted = 1u << APT_EVENT_PRUNE | 1u << APT_EVENT_COMPACT | 1u << APT_EVENT_GROW | 1u << APT_EVENT_TEACHER;
    int64_t plain[2] = {0, 0};
    plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY), d = decoder_plan(g_decoders[1]), full = plain_plan(APT_METHOD_FULL, APT_TASK_SPAN);
    p.d.accumulate = full.d.accumulate = 1;
    p.d.quantize = full.d.quantize = APT_QUANT_INT8;
    d.d.quantize = APT_QUANT_INT4;
    p.d.quantize_begin = 4;
    full.d.quantize_begin = 1;
    full.d.steps = 3;
    assert_int_equal(attack_steps(&p, plain) & wanted, wanted);
    assert_int_equal(attack_steps(&d, plain) & wanted, wanted);
    (void)attack_steps(&full, plain);
    const int64_t decided = micro_with(&p, APT_EVENT_PRUNE) + 1, cut = micro_with(&d, APT_EVENT_COMPACT) + 1;
    p.d.quantize_begin = 0;
    const attack attacks[] = {
        {"apt_trainer_create", p, 0, setup_no_trainer, call_trainer_create, 20, false},
        {"apt_trainer_observe", p, 0, NULL, call_observe, 14, false},
        {"apt_trainer_prune_now", p, decided, setup_observe, call_prune_now, 20, true},
        {"apt_trainer_finish", p, decided, NULL, call_finish, 20, false},
        {"apt_model_forward", p, 0, NULL, call_forward, 14, false},
        {"apt_checkpoint_load", d, cut, setup_checkpoint, call_checkpoint_load, 60, false},
        {"apt_generate", d, cut, NULL, call_generate, 4, false},
        {"apt_estimate", d, 0, NULL, call_estimate, 7, false},
    };
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) (void)attack_every_allocation(&attacks[i]);
}

/* ---- threads --------------------------------------------------------------------------------------------------------- */

/* Mutex, both conditions, and attributes and start of each worker. */
static void test_thread_start(void **state)
{
    (void)state;
    for (int64_t n = 0;; n++) {
        test_memory memory;
        test_log log;
        apt_desc desc = test_desc(&memory, &log);
        desc.threads = 4;
        system_fail_at(n);
        apt_ctx *ctx = apt_create(&desc);
        system_fail_at(-1);
        if (ctx != NULL) {
            assert_int_equal(n, 3 + 2 * 3);
            apt_destroy(ctx);
            break;
        }
        assert_true(log.result == APT_E_THREAD && log.errors == 1);
        assert_true(memory.live == 0 && g_system.mutexes == 0 && g_system.conditions == 0);
    }
    assert_true(g_system.mutexes == 0 && g_system.conditions == 0);
}

/* ---- disks ----------------------------------------------------------------------------------------------------------- */

/* Each write, sync, close and rename of the call fails once. On failure nothing on the disk has changed; `call` sees to the
   files' contents. Returns how many were refused. */
static int64_t attack_every_write(const attack *a)
{
    fixture f;
    int64_t refused = 0;
    for (int64_t n = 0;; n++) {
        begin(&f, a);
        const uint64_t before = state_sum(&f);
        system_fail_at(n);
        const apt_result r = a->call(&f);
        const bool failed = g_system.failed;
        system_fail_at(-1);
        if (r != APT_OK) {
            if (!failed || r != APT_E_IO || strstr(apt_error(f.l.ctx), f.dir) == NULL)
                fail_msg("%s: call %lld failed: %s (%s)", a->name, (long long)n, apt_result_text(r), apt_error(f.l.ctx));
            if (state_sum(&f) != before) fail_msg("%s: something changed when call %lld failed", a->name, (long long)n);
            assert_ok(f.l.ctx, a->call(&f));
            refused++;
        }
        (void)go_on(&f);
        end(&f);
        if (!failed) return refused;
    }
}

static void test_disk(void **state)
{
    (void)state;
    const plan p = plain_plan(APT_METHOD_LORA, APT_TASK_CLASSIFY);
    const attack save = {"apt_model_save", p, 0, setup_older, call_save, 0, false};
    const attack checkpoint = {"apt_checkpoint_save", p, 2, setup_old, call_checkpoint_save, 0, false};
    assert_true(attack_every_write(&save) >= 8);                      /* write, sync, close, rename of two files */
    assert_true(attack_every_write(&checkpoint) >= 4);
}

/* A checkpoint that meets a full disk at any size, and a folder that takes no files. */
static void test_disk_full(void **state)
{
    (void)state;
    const plan p = short_plan(APT_BERT, APT_TASK_CLASSIFY);
    const attack a = {"apt_checkpoint_save", p, 9, setup_old, call_checkpoint_save, 0, false};
    fixture f;
    struct rlimit old, now;
    begin(&f, &a);
    const uint64_t before = state_sum(&f);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    int64_t refused = 0;
    for (rlim_t limit = 0;; limit += 4099) {
        now = old;
        now.rlim_cur = limit;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &now), 0);
        const apt_result r = call_checkpoint_save(&f);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        if (r == APT_OK) break;
        assert_int_equal(r, APT_E_IO);
        assert_non_null(strstr(apt_error(f.l.ctx), f.path));
        assert_true(state_sum(&f) == before);
        refused++;
    }
    signal(SIGXFSZ, handler);
    assert_true(refused > 3);
    assert_result(apt_checkpoint_save(f.l.trainer, "/proc/apt/run", NULL, 0), APT_E_IO);
    assert_result(apt_model_save(f.l.model, "/proc/apt"), APT_E_STATE);                      /* adapters come first */
    if (apti_path_query("/dev/full") == APTI_PATH_OTHER)
        assert_result(apt_checkpoint_save(f.l.trainer, "/dev/full", NULL, 0), APT_E_IO);
    setup_no_trainer(&f);
    assert_result(apt_model_save(f.l.model, "/proc/apt"), APT_E_STATE);                      /* then the masks */
    end(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steps),       cmocka_unit_test(test_whole_runs),  cmocka_unit_test(test_saved_unfinished),
        cmocka_unit_test(test_cancelled_and_failed), cmocka_unit_test(test_trainer_calls), cmocka_unit_test(test_checkpoints),
        cmocka_unit_test(test_models),      cmocka_unit_test(test_thread_start), cmocka_unit_test(test_disk),
        cmocka_unit_test(test_disk_full),   cmocka_unit_test(test_decoder_steps), cmocka_unit_test(test_decoder_calls),
        cmocka_unit_test(test_quantised),   cmocka_unit_test(test_taught_steps),
    };
    return cmocka_run_group_tests_name("faults", tests, NULL, NULL);
}
