/* Section platform: results, sizes, contexts, messages, memory, threads, files.
   Also built with APT_NO_THREADS, APT_NO_POSIX and APT_NO_MMAP. */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---------------------------------------------------------------------------------------------------------- results */

static void test_results(void **state)
{
    (void)state;
#define CHECK(id, value, text)                                                          \
    assert_int_equal(APT_##id, value);                                                  \
    assert_string_equal(apt_result_text(APT_##id), "APT_" #id ": " text);
    APT_RESULTS(CHECK)
#undef CHECK
    assert_string_equal(apt_result_text((apt_result)12345), "unknown result");
    assert_string_equal(apt_result_text((apt_result)-1000), "unknown result");
    assert_string_equal(apt_result_text(APT_RESULT_MIN_), "unknown result");
    assert_int_equal(apt_version(), APT_VERSION_MAJOR * 10000 + APT_VERSION_MINOR * 100 + APT_VERSION_PATCH);
}

static void test_sizes(void **state)
{
    (void)state;
    int64_t out = 77;
    assert_true(apti_mul(0, INT64_MAX, &out) && out == 0);
    assert_true(apti_mul(INT64_MAX, 0, &out) && out == 0);
    assert_true(apti_mul(INT64_MAX, 1, &out) && out == INT64_MAX);
    assert_true(apti_mul(3037000499, 3037000499, &out) && out == 9223372030926249001);
    assert_true(apti_add(INT64_MAX, 0, &out) && out == INT64_MAX);
    assert_true(apti_add(1, 2, &out) && out == 3);
    out = 77;
    assert_false(apti_mul(3037000500, 3037000500, &out));
    assert_false(apti_mul(INT64_MAX, 2, &out));
    assert_false(apti_mul(-1, 2, &out));
    assert_false(apti_mul(2, -1, &out));
    assert_false(apti_mul(INT64_MIN, -1, &out));
    assert_false(apti_add(INT64_MAX, 1, &out));
    assert_false(apti_add(-1, 5, &out));
    assert_false(apti_add(5, -1, &out));
    assert_int_equal(out, 77);
    assert_int_equal(apti_ceil_div(0, 8), 0);
    assert_int_equal(apti_ceil_div(8, 8), 1);
    assert_int_equal(apti_ceil_div(9, 8), 2);
    assert_int_equal(apti_round_up(0, 64), 0);
    assert_int_equal(apti_round_up(1, 64), 64);
    assert_int_equal(apti_round_up(64, 64), 64);
    assert_int_equal(apti_min_i64(-3, 2), -3);
    assert_int_equal(apti_max_i64(-3, 2), 2);
}

static void test_finite_bits(void **state)
{
    (void)state;
    const uint32_t bad[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00000u, 0x7f800001u, 0x7fffffffu};
    const uint32_t good[] = {0, 0x80000000u, 1, 0x007fffffu, 0x7f7fffffu, 0xff7fffffu, 0x3f800000u};
    float x[67];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) assert_false(apti_finite(apti_float(bad[i])));
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) assert_true(apti_finite(apti_float(good[i])));
    for (int n = 0; n < 67; n++) {
        for (int i = 0; i < 67; i++) x[i] = apti_float(good[(i + n) % 7]);
        assert_true(apti_finite_all(x, n));
        if (n == 0) continue;
        x[n / 2] = apti_float(bad[n % 6]);
        assert_false(apti_finite_all(x, n));
        x[n / 2] = 0;
        x[n - 1] = apti_float(bad[n % 6]);
        assert_false(apti_finite_all(x, n));
        assert_true(apti_finite_all(x, n - 1));
    }
    const uint64_t wide[] = {0x7ff0000000000000u, 0xfff0000000000000u, 0x7ff8000000000000u, 0x7fefffffffffffffu, 0};
    for (int i = 0; i < 5; i++) {
        double d;
        memcpy(&d, &wide[i], sizeof d);
        assert_int_equal(apti_finite_f64(d), i >= 3);
    }
}

/* ---------------------------------------------------------------------------------------------------------- contexts */

static void test_create_default(void **state)
{
    (void)state;
    apt_ctx *ctx = apt_create(NULL);
    assert_non_null(ctx);
    assert_string_equal(apt_error(ctx), "");
    assert_true(apt_thread_count(ctx) >= 1 && apt_thread_count(ctx) <= 64);
    assert_true(strlen(apt_kernel_name(ctx)) > 0);
    const apt_memory memory = apt_memory_info(ctx);
    assert_true(memory.bytes > 0 && memory.peak_bytes >= memory.bytes && memory.blocks >= 2);
    apt_destroy(ctx);
    apt_destroy(NULL);
    assert_string_equal(apt_error(NULL), "");
    assert_string_equal(apt_kernel_name(NULL), "");
    assert_int_equal(apt_thread_count(NULL), 0);
    assert_int_equal(apt_memory_info(NULL).bytes, 0);
    apt_memory_reset_peak(NULL);
}

static void expect_refused(const apt_desc *desc, const test_log *log, apt_result result)
{
    const int32_t errors = log->errors;
    assert_null(apt_create(desc));
    assert_int_equal(log->errors, errors + 1);
    assert_int_equal(log->result, result);
    assert_true(log->text[0] != 0);
}

static void test_create_refuses(void **state)
{
    (void)state;
    test_memory memory;
    test_log log;
    const apt_desc good = test_desc(&memory, &log);
    apt_desc desc = good;
    desc.release = NULL;
    expect_refused(&desc, &log, APT_E_ARGUMENT);
    desc = good;
    desc.alloc = NULL;
    expect_refused(&desc, &log, APT_E_ARGUMENT);
    desc = good;
    desc.threads = -1;
    expect_refused(&desc, &log, APT_E_RANGE);
    desc.threads = 65;
    expect_refused(&desc, &log, APT_E_RANGE);
    desc = good;
    desc.kernels = "abacus";
    expect_refused(&desc, &log, APT_E_UNSUPPORTED);
    assert_non_null(strstr(log.text, "abacus"));
    desc.kernels = "";
    expect_refused(&desc, &log, APT_E_UNSUPPORTED);
    assert_int_equal(memory.live, 0);
}

/* Behind a wrong canary the logger is garbage too: it must not be called. */
static void must_not_log(const apt_log_item *item, void *user)
{
    (void)item;
    *(bool *)user = true;
}

static void test_create_canaries(void **state)
{
    (void)state;
    bool called = false;
    apt_desc desc = APT_ZERO;
    desc.log = must_not_log;
    desc.log_user = &called;
    desc.start_canary = 1;
    assert_null(apt_create(&desc));
    desc.start_canary = 0;
    desc.end_canary = 1;
    assert_null(apt_create(&desc));
    assert_false(called);
}

static void test_create_every_allocation(void **state)
{
    (void)state;
    for (int32_t threads = 1; threads <= 3; threads++) {
        for (int64_t n = 0;; n++) {
            test_memory memory;
            test_log log;
            apt_desc desc = test_desc(&memory, &log);
            desc.threads = threads;
            memory.fail_at = n;
            apt_ctx *ctx = apt_create(&desc);
            assert_true((ctx == NULL) == memory.failed);
            if (ctx == NULL) {
                assert_int_equal(log.errors, 1);
                assert_int_equal(log.result, APT_E_MEMORY);
                assert_int_equal(memory.live, 0);
                continue;
            }
            assert_int_equal(apt_memory_info(ctx).blocks, memory.live);
            apt_destroy(ctx);
            assert_int_equal(memory.live, 0);
            assert_true(n >= 2);                 /* at least the context and its scratch */
            break;
        }
    }
}

static void test_kernels_by_name(void **state)
{
    (void)state;
    const char *names[] = {"ref", "avx2", "avx512", "amx", "neon"};
    int made = 0;
    for (int i = 0; i < 5; i++) {
        test_log log;
        apt_desc desc = test_desc(NULL, &log);
        char name[16];
        snprintf(name, sizeof name, "%s", names[i]);
        desc.kernels = name;
        apt_ctx *ctx = apt_create(&desc);
        memset(name, '?', sizeof name - 1);      /* the caller's text may change afterwards */
        if (ctx == NULL) {
            assert_int_equal(log.result, APT_E_UNSUPPORTED);
            assert_true(i > 0);
            continue;
        }
        made++;
        assert_string_equal(apt_kernel_name(ctx), names[i]);
        apt_destroy(ctx);
    }
    assert_true(made >= 1);
#ifdef APT_NO_SIMD
    assert_int_equal(made, 1);
#endif
}

static void test_messages(void **state)
{
    (void)state;
    test_log log;
    apt_ctx *ctx = test_context(1, &log);
    assert_result(apti_fail(ctx, APT_E_SHAPE, "'%s' has %d rows, expected %d", "w", 3, 4), APT_E_SHAPE);
    assert_string_equal(apt_error(ctx), "'w' has 3 rows, expected 4");
    assert_string_equal(log.text, apt_error(ctx));
    assert_int_equal(log.errors, 1);
    assert_int_equal(log.result, APT_E_SHAPE);
    (void)apti_fail(ctx, APT_E_IO, "loading: %s", ctx->error);                        /* arguments may overlap the target */
    assert_string_equal(apt_error(ctx), "loading: 'w' has 3 rows, expected 4");
    apti_log(ctx, APT_LOG_WARNING, "careful");
    apti_log(ctx, APT_LOG_INFO, "by the way");
    assert_int_equal(log.warnings, 1);
    assert_int_equal(log.infos, 1);
    assert_string_equal(apt_error(ctx), "loading: 'w' has 3 rows, expected 4");       /* only errors are kept */
    char text[5000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    (void)apti_fail(ctx, APT_E_IO, "%s", text);
    assert_int_equal(strlen(apt_error(ctx)), 1023);
    assert_string_equal(apt_error(ctx) + 1018, "xx...");
    apt_destroy(ctx);
}

/* ---------------------------------------------------------------------------------------------------------- memory */

static void test_blocks(void **state)
{
    (void)state;
    test_memory memory;
    const apt_desc desc = test_desc(&memory, NULL);
    apt_ctx *ctx = apt_create(&desc);
    assert_non_null(ctx);
    const apt_memory before = apt_memory_info(ctx);
    void *blocks[40];
    for (int i = 0; i < 40; i++) {
        blocks[i] = i % 2 ? apti_calloc(ctx, i, 7) : apti_alloc(ctx, 7, i);
        assert_non_null(blocks[i]);
        assert_int_equal((uintptr_t)blocks[i] % 64, 0);
        assert_int_equal(apti_block_bytes(blocks[i]), 7 * i);
        for (int k = 0; i % 2 && k < 7 * i; k++) assert_int_equal(((char *)blocks[i])[k], 0);
        memset(blocks[i], 0xA5, (size_t)(i > 0 ? 7 * i : 64));                        /* zero bytes still give 64 */
    }
    const apt_memory full = apt_memory_info(ctx);
    assert_int_equal(full.blocks, before.blocks + 40);
    assert_int_equal(full.blocks, memory.live);
    assert_true(full.bytes >= before.bytes + 7 * 40 * 39 / 2);
    assert_int_equal(full.peak_bytes, full.bytes);
    for (int i = 0; i < 40; i++) apti_free(ctx, blocks[i]);
    apti_free(ctx, NULL);
    assert_int_equal(apt_memory_info(ctx).bytes, before.bytes);
    assert_int_equal(apt_memory_info(ctx).blocks, before.blocks);
    assert_int_equal(apt_memory_info(ctx).peak_bytes, full.bytes);
    apt_memory_reset_peak(ctx);
    assert_int_equal(apt_memory_info(ctx).peak_bytes, before.bytes);
    apt_destroy(ctx);
    assert_int_equal(memory.live, 0);
}

static void test_references(void **state)
{
    (void)state;
    test_memory memory;
    const apt_desc desc = test_desc(&memory, NULL);
    apt_ctx *ctx = apt_create(&desc);
    const int64_t live = memory.live;
    int *shared = (int *)apti_alloc(ctx, 1, sizeof(int));
    assert_non_null(shared);
    *shared = 42;
    assert_ptr_equal(apti_retain(shared), shared);
    assert_null(apti_retain(NULL));
    apti_free(ctx, shared);
    assert_int_equal(*shared, 42);
    assert_int_equal(memory.live, live + 1);
    apti_free(ctx, shared);
    assert_int_equal(memory.live, live);
    assert_int_equal(apti_block_bytes(NULL), 0);
    apt_destroy(ctx);
}

static void test_impossible_sizes(void **state)
{
    (void)state;
    test_memory memory;
    const apt_desc desc = test_desc(&memory, NULL);
    apt_ctx *ctx = apt_create(&desc);
    const apt_memory before = apt_memory_info(ctx);
    const int64_t calls = memory.calls;
    assert_null(apti_alloc(ctx, INT64_MAX, 2));
    assert_null(apti_alloc(ctx, INT64_MAX, 1));
    assert_null(apti_alloc(ctx, INT64_MAX - 100, 1));
    assert_null(apti_calloc(ctx, INT64_MAX / 4 + 1, 4));
    assert_null(apti_alloc(ctx, -1, 4));
    assert_null(apti_alloc(ctx, 4, -1));
    assert_int_equal(memory.calls, calls);       /* never reached the allocator */
    assert_memory_equal(&before, &ctx->bytes, sizeof ctx->bytes);
    assert_int_equal(apt_memory_info(ctx).blocks, before.blocks);
    assert_string_equal(apt_error(ctx), "");     /* the message is the caller's business */
    apt_destroy(ctx);
}

/* ---------------------------------------------------------------------------------------------------------- threads */

typedef struct pool_check {
    apt_ctx *ctx;
    int64_t count;
    uint8_t *seen;                    /* how often each task ran */
    int32_t inside[APTI_MAX_THREADS]; /* tasks running as thread i now: never above 1 */
    int32_t wrong;
    bool nested, slow;
    int64_t inner;                    /* tasks run by nested loops */
} pool_check;

typedef struct inner_check { pool_check *outer; int32_t thread; int64_t next; } inner_check;

static void inner_task(int64_t index, int32_t thread, void *arg)
{
    inner_check *inner = (inner_check *)arg;
    /* Nested loops run on the spot: same thread, in order. */
    if (thread != inner->thread || index != inner->next++) __atomic_add_fetch(&inner->outer->wrong, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&inner->outer->inner, 1, __ATOMIC_RELAXED);
}

static void pool_task(int64_t index, int32_t thread, void *arg)
{
    pool_check *check = (pool_check *)arg;
    if (index < 0 || index >= check->count || thread < 0 || thread >= apt_thread_count(check->ctx)) {
        __atomic_add_fetch(&check->wrong, 1, __ATOMIC_RELAXED);
        return;
    }
    if (__atomic_add_fetch(&check->inside[thread], 1, __ATOMIC_SEQ_CST) != 1) __atomic_add_fetch(&check->wrong, 1, __ATOMIC_RELAXED);
    check->seen[index]++;                        /* plain on purpose: the thread sanitizer sees two runners of one task */
    ((uint8_t *)check->ctx->scratch[thread])[0]++;                                    /* the same for two threads of one number */
    if (check->slow)
        for (volatile int i = 0; i < 20000; i++) {}
    if (check->nested) {
        inner_check inner = {check, thread, 0};
        apti_parallel_for(check->ctx, 5, inner_task, &inner);
    }
    __atomic_sub_fetch(&check->inside[thread], 1, __ATOMIC_SEQ_CST);
}

static void check_loop(apt_ctx *ctx, int64_t count, bool nested, bool slow)
{
    pool_check check;
    memset(&check, 0, sizeof check);
    check.ctx = ctx;
    check.count = count;
    check.nested = nested;
    check.slow = slow;
    check.seen = (uint8_t *)test_memory_block((size_t)count + 1);
    memset(check.seen, 0, (size_t)count + 1);
    apti_parallel_for(ctx, count, pool_task, &check);
    for (int64_t i = 0; i < count; i++)
        if (check.seen[i] != 1) fail_msg("task %lld of %lld ran %d times", (long long)i, (long long)count, check.seen[i]);
    assert_int_equal(check.wrong, 0);
    assert_int_equal(check.inner, nested ? 5 * count : 0);
    free(check.seen);
}

static void check_all_loops(apt_ctx *ctx)
{
    const int64_t counts[] = {0, 1, 2, 3, 7, 8, 9, 64, 1000, 20000};
    for (int repeat = 0; repeat < 3; repeat++)
        for (int i = 0; i < 10; i++) check_loop(ctx, counts[i], i % 2 == repeat % 2, false);
    check_loop(ctx, 40, false, true);
    for (int i = 0; i < 2000; i++) check_loop(ctx, i % 17, i % 3 == 0, false);        /* back to back: workers still spin */
    for (int i = 0; i < 20; i++) {                                                    /* with pauses: workers sleep */
        const double until = apti_seconds() + 0.0005;
        while (apti_seconds() < until) {}
        check_loop(ctx, 3 + i % 5, false, i % 2 == 0);
    }
    apti_parallel_for(ctx, -5, pool_task, NULL);                                      /* nothing to do */
}

static void test_pool(void **state)
{
    (void)state;
    const int32_t threads[] = {1, 2, 3, 8};
    for (int i = 0; i < 4; i++) {
        apt_ctx *ctx = test_context(threads[i], NULL);
#ifdef APTI_THREADS
        assert_int_equal(apt_thread_count(ctx), threads[i]);
#else
        assert_int_equal(apt_thread_count(ctx), 1);
#endif
        check_all_loops(ctx);
        apt_destroy(ctx);
    }
    for (int i = 0; i < 50; i++) apt_destroy(test_context(1 + i % 4, NULL));          /* never used */
}

/* The most threads there may be; the sanitizers' shadow memory is the only thing that cares. */
static void test_pool_of_64(void **state)
{
    (void)state;
    apt_ctx *ctx = test_context(64, NULL);
    for (int i = 0; i < 20; i++) check_loop(ctx, 200, true, false);
    apt_destroy(ctx);
}

/* Every worker is woken: as many tasks as threads wait for each other, also after the workers went to sleep. */
static void meeting_task(int64_t index, int32_t thread, void *arg)
{
    int32_t *arrived = (int32_t *)arg;
    (void)index;
    __atomic_add_fetch(&arrived[1 + thread], 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&arrived[0], 1, __ATOMIC_SEQ_CST);
    const double end = apti_seconds() + 20;
    while (__atomic_load_n(&arrived[0], __ATOMIC_SEQ_CST) < 3 && apti_seconds() < end) sched_yield();
}

static void test_pool_works_together(void **state)
{
    (void)state;
    apt_ctx *ctx = test_context(3, NULL);
    for (int i = 0; i < 30 && apt_thread_count(ctx) == 3; i++) {
        int32_t arrived[4] = {0, 0, 0, 0};
        for (const double until = apti_seconds() + (i % 3) * 1e-3; apti_seconds() < until;) {}
        const double start = apti_seconds();
        apti_parallel_for(ctx, 3, meeting_task, arrived);
        assert_true(apti_seconds() - start < 20);
        for (int k = 1; k < 4; k++) assert_int_equal(arrived[k], 1);
    }
    apt_destroy(ctx);
}

/* A caller's parallel_for on threads of its own, started for each loop; thread numbers run backwards. */
typedef struct foreign_pool { int32_t threads; int64_t calls; } foreign_pool;
typedef struct foreign_share { int64_t first, step, count; int32_t thread; apt_task task; void *arg; } foreign_share;

static void *foreign_main(void *arg)
{
    const foreign_share *share = (const foreign_share *)arg;
    for (int64_t i = share->first; i < share->count; i += share->step) share->task(i, share->thread, share->arg);
    return NULL;
}

static void foreign_parallel_for(int64_t count, apt_task task, void *arg, void *user)
{
    foreign_pool *pool = (foreign_pool *)user;
    pthread_t handle[8];
    foreign_share share[8];
    memset(share, 0, sizeof share);
    pool->calls++;
    for (int32_t i = 0; i < pool->threads; i++) {
        share[i].first = i;
        share[i].step = pool->threads;
        share[i].count = count;
        share[i].thread = pool->threads - 1 - i;
        share[i].task = task;
        share[i].arg = arg;
        if (i > 0) assert_int_equal(pthread_create(&handle[i], NULL, foreign_main, &share[i]), 0);
    }
    foreign_main(&share[0]);
    for (int32_t i = 1; i < pool->threads; i++) assert_int_equal(pthread_join(handle[i], NULL), 0);
}

static void test_foreign_pool(void **state)
{
    (void)state;
    for (int32_t threads = 1; threads <= 4; threads++) {
        foreign_pool pool = {threads, 0};
        apt_desc desc = APT_ZERO;
        desc.threads = threads;
        desc.parallel_for = foreign_parallel_for;
        desc.parallel_user = &pool;
        apt_ctx *ctx = apt_create(&desc);
        assert_non_null(ctx);
        assert_int_equal(apt_thread_count(ctx), threads);
        for (int i = 0; i < 100; i++) check_loop(ctx, i % 19, i % 2 == 0, i % 10 == 9);
        assert_true(threads == 1 ? pool.calls == 0 : pool.calls > 80);
        apt_destroy(ctx);
    }
}

/* Two contexts that work at the same time in two threads of the program. */
static void *context_main(void *arg)
{
    (void)arg;
    apt_desc desc = APT_ZERO;
    desc.threads = 2;
    apt_ctx *ctx = apt_create(&desc);
    for (int i = 0; i < 300; i++) check_loop(ctx, i % 13, i % 2 == 0, false);
    (void)apti_checksum(0, "123456789", 9);
    apt_destroy(ctx);
    return NULL;
}

static void test_two_contexts(void **state)
{
    (void)state;
    pthread_t other;
    assert_int_equal(pthread_create(&other, NULL, context_main, NULL), 0);
    context_main(NULL);
    assert_int_equal(pthread_join(other, NULL), 0);
}

static void test_clock(void **state)
{
    (void)state;
    const double start = apti_seconds();
    double last = start;
    for (int i = 0; i < 1000; i++) {
        const double now = apti_seconds();
        assert_true(now >= last);
        last = now;
    }
    while (apti_seconds() < start + 0.002) {}
    assert_true(apti_seconds() - start < 5);
    assert_true(apti_cpu_count() >= 1 && apti_cpu_count() <= 64);
    if (apti_cpu_has(APTI_CPU_AVX512)) assert_true(apti_cpu_has(APTI_CPU_AVX2));
    if (apti_cpu_has(APTI_CPU_AVX512_BF16)) assert_true(apti_cpu_has(APTI_CPU_AVX512));
#if defined(APTI_X86) && !defined(__clang__)
    assert_int_equal(apti_cpu_has(APTI_CPU_AVX2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
    assert_int_equal(apti_cpu_has(APTI_CPU_AVX512), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#endif
#ifdef APT_NO_SIMD
    assert_false(apti_cpu_has(APTI_CPU_AVX2) || apti_cpu_has(APTI_CPU_NEON));
#endif
}

/* ---------------------------------------------------------------------------------------------------------- files */

typedef struct file_test { apt_ctx *ctx; test_log log; test_memory memory; char dir[512], path[600]; int64_t live; } file_test;

static int file_setup(void **state)
{
    file_test *t = (file_test *)test_memory_block(sizeof *t);
    const apt_desc desc = test_desc(&t->memory, &t->log);
    t->ctx = apt_create(&desc);
    assert_non_null(t->ctx);
    t->live = t->memory.live;
    test_dir(t->dir, sizeof t->dir);
    test_join(t->path, sizeof t->path, t->dir, "file");
    *state = t;
    return 0;
}

static int file_teardown(void **state)
{
    file_test *t = (file_test *)*state;
    assert_int_equal(t->memory.live, t->live);   /* nothing kept, whatever happened */
    apt_destroy(t->ctx);
    test_remove(t->dir);
    free(t);
    return 0;
}

/* A failure of the system: APT_E_IO and a message with the path in it. */
static void expect_io(file_test *t, apt_result result, const char *path)
{
    assert_result(result, APT_E_IO);
    if (strstr(apt_error(t->ctx), path) == NULL) fail_msg("'%s' does not name %s", apt_error(t->ctx), path);
}

static void expect_content(const char *path, const void *data, size_t bytes)
{
    size_t found = 0;
    char *text = test_read_file(path, &found);
    assert_non_null(text);
    assert_int_equal(found, bytes);
    assert_memory_equal(text, data, bytes);
    free(text);
}

static apt_result write_whole(apt_ctx *ctx, const char *path, const void *data, int64_t bytes, int64_t piece)
{
    apti_writer w;
    apt_result result = apti_write_begin(ctx, path, &w);
    for (int64_t i = 0; i < bytes; i += piece) result = apti_write(&w, (const char *)data + i, apti_min_i64(piece, bytes - i));
    if (result == APT_OK) assert_int_equal(w.bytes, bytes);
    return apti_write_commit(&w);
}

static void test_write_and_read(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t sizes[] = {0, 1, 100, 65535, 65536, 65537, 200000, 1000003};
    const int64_t pieces[] = {1000000, 65536, 65535, 4099, 1};
    uint8_t *data = (uint8_t *)test_memory_block(1000003);
    for (int i = 0; i < 1000003; i++) data[i] = (uint8_t)(i * 7 + (i >> 8));
    for (int i = 0; i < 8; i++) {
        for (int k = 0; k < (sizes[i] > 100000 ? 4 : 5); k++) {
            assert_ok(t->ctx, write_whole(t->ctx, t->path, data, sizes[i], pieces[k]));
            expect_content(t->path, data, (size_t)sizes[i]);
        }
        char *text = NULL;
        int64_t bytes = -1;
        assert_ok(t->ctx, apti_read_file(t->ctx, t->path, sizes[i], &text, &bytes));
        assert_int_equal(bytes, sizes[i]);
        assert_memory_equal(text, data, (size_t)bytes);
        assert_int_equal(text[bytes], 0);
        apti_free(t->ctx, text);
        apti_map map;
        assert_ok(t->ctx, apti_map_file(t->ctx, t->path, &map));
        assert_int_equal(map.bytes, sizes[i]);
        assert_non_null(map.data);
        assert_memory_equal(map.data, data, (size_t)sizes[i]);
        apti_unmap_file(t->ctx, &map);
        assert_null(map.data);
        apti_unmap_file(t->ctx, &map);           /* twice is harmless */
    }
    assert_int_equal(test_count_files(t->dir), 1);
    free(data);
}

static void test_read_failures(void **state)
{
    file_test *t = (file_test *)*state;
    char *text = (char *)t;
    int64_t bytes = 5;
    apti_map map;
    expect_io(t, apti_read_file(t->ctx, t->path, 100, &text, &bytes), t->path);
    assert_null(text);
    assert_int_equal(bytes, 0);
    assert_non_null(strstr(apt_error(t->ctx), strerror(ENOENT)));
    expect_io(t, apti_map_file(t->ctx, t->path, &map), t->path);
    apti_unmap_file(t->ctx, &map);               /* after a failure it is harmless */
    expect_io(t, apti_map_file(t->ctx, t->dir, &map), t->dir);
    expect_io(t, apti_read_file(t->ctx, t->dir, 100, &text, &bytes), t->dir);
    expect_io(t, apti_map_file(t->ctx, "", &map), "''");
    test_write_file(t->path, "0123456789", 10);
    assert_result(apti_read_file(t->ctx, t->path, 9, &text, &bytes), APT_E_RANGE);
    assert_null(text);
    assert_ok(t->ctx, apti_read_file(t->ctx, t->path, 10, &text, &bytes));
    apti_free(t->ctx, text);
    t->memory.fail_at = 0;
    assert_result(apti_read_file(t->ctx, t->path, 10, &text, &bytes), APT_E_MEMORY);
    t->memory.fail_at = -1;
#ifdef APTI_POSIX
    char pipe[600];
    test_join(pipe, sizeof pipe, t->dir, "pipe");
    if (mkfifo(pipe, 0600) == 0) expect_io(t, apti_map_file(t->ctx, pipe, &map), pipe);   /* and does not hang */
    expect_io(t, apti_read_file(t->ctx, "/dev/null", 100, &text, &bytes), "/dev/null");
#endif
    char longname[3000];
    memset(longname, 'n', sizeof longname - 1);
    longname[sizeof longname - 1] = 0;
    assert_result(apti_map_file(t->ctx, longname, &map), APT_E_IO);
    assert_non_null(strstr(apt_error(t->ctx), strerror(ENAMETOOLONG)));               /* the reason survives a long path */
}

static void test_write_replaces(void **state)
{
    file_test *t = (file_test *)*state;
    apti_writer w;
    test_write_file(t->path, "old", 3);
    assert_ok(t->ctx, apti_write_begin(t->ctx, t->path, &w));
    assert_ok(t->ctx, apti_write(&w, "new content", 11));
    expect_content(t->path, "old", 3);           /* until the commit */
    assert_int_equal(test_count_files(t->dir), 2);
    assert_ok(t->ctx, apti_write_commit(&w));
    expect_content(t->path, "new content", 11);
    assert_int_equal(test_count_files(t->dir), 1);
    apti_write_abort(&w);                        /* harmless now */
    assert_result(apti_write(&w, "more", 4), APT_E_STATE);
    assert_result(apti_write_commit(&w), APT_E_STATE);
    expect_content(t->path, "new content", 11);
}

static void test_write_abort(void **state)
{
    file_test *t = (file_test *)*state;
    apti_writer w;
    test_write_file(t->path, "old", 3);
    assert_ok(t->ctx, apti_write_begin(t->ctx, t->path, &w));
    assert_ok(t->ctx, apti_write(&w, "new", 3));
    apti_write_abort(&w);
    apti_write_abort(&w);
    assert_result(apti_write_commit(&w), APT_E_STATE);
    expect_content(t->path, "old", 3);
    assert_int_equal(test_count_files(t->dir), 1);
}

/* What a crashed process left behind is neither used nor removed. */
static void test_write_beside_leftovers(void **state)
{
    file_test *t = (file_test *)*state;
    char left[700];
    for (int i = 0; i < 3; i++) {
        snprintf(left, sizeof left, "%s.tmp-%ld-%d", t->path, apti_os_process(), i);
        test_write_file(left, "crashed", 7);
    }
    apti_writer a, b;
    assert_ok(t->ctx, apti_write_begin(t->ctx, t->path, &a));
    assert_ok(t->ctx, apti_write_begin(t->ctx, t->path, &b));                         /* two at once: the last commit wins */
    assert_ok(t->ctx, apti_write(&a, "aaa", 3));
    assert_ok(t->ctx, apti_write(&b, "bbbb", 4));
    assert_ok(t->ctx, apti_write_commit(&b));
    expect_content(t->path, "bbbb", 4);
    assert_ok(t->ctx, apti_write_commit(&a));
    expect_content(t->path, "aaa", 3);
    assert_int_equal(test_count_files(t->dir), 4);
    expect_content(left, "crashed", 7);
}

static void test_write_to_bad_places(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700];
    snprintf(path, sizeof path, "%s/none/file", t->dir);
    expect_io(t, write_whole(t->ctx, path, "x", 1, 1), path);
    test_write_file(t->path, "old", 3);
    snprintf(path, sizeof path, "%s/under", t->path);                                 /* a file where a folder should be */
    expect_io(t, write_whole(t->ctx, path, "x", 1, 1), path);
    expect_io(t, write_whole(t->ctx, "", "x", 1, 1), "''");
#ifdef APTI_POSIX
    expect_io(t, write_whole(t->ctx, t->dir, "x", 1, 1), t->dir);
#endif
    for (int64_t n = 0; n < 3; n++) {
        apti_writer w;
        t->memory.fail_at = t->memory.calls + n;
        assert_result(apti_write_begin(t->ctx, t->path, &w), APT_E_MEMORY);
        assert_result(apti_write(&w, "x", 1), APT_E_MEMORY);
        assert_result(apti_write_commit(&w), APT_E_MEMORY);
        t->memory.fail_at = -1;
    }
    expect_content(t->path, "old", 3);
    assert_int_equal(test_count_files(t->dir), 1);
}

static void test_write_without_permission(void **state)
{
    file_test *t = (file_test *)*state;
    test_write_file(t->path, "old", 3);
    assert_int_equal(chmod(t->dir, 0500), 0);
    /* Root may write anywhere, so the attempt is made by a child that is somebody else. */
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (geteuid() == 0 && setuid(65534) != 0) _exit(2);
        const bool refused = write_whole(t->ctx, t->path, "new", 3, 3) == APT_E_IO;
        _exit(refused && strstr(apt_error(t->ctx), strerror(EACCES)) != NULL ? 0 : 1);
    }
    int status = -1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(chmod(t->dir, 0700), 0);
    expect_content(t->path, "old", 3);
    assert_int_equal(test_count_files(t->dir), 1);
}

/* A file size limit makes a write fail in the middle: the old file must stay and the temporary one go. */
static void test_write_fails_halfway(void **state)
{
    file_test *t = (file_test *)*state;
    struct rlimit old, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    limit = old;
    limit.rlim_cur = 100000;
    test_write_file(t->path, "old", 3);
    uint8_t *data = (uint8_t *)test_memory_block(300000);
    memset(data, 1, 300000);
    const int64_t pieces[] = {300000, 70000, 1000};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const apt_result result = write_whole(t->ctx, t->path, data, 300000, pieces[i]);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        expect_io(t, result, t->path);
        expect_content(t->path, "old", 3);
        assert_int_equal(test_count_files(t->dir), 1);
    }
    (void)signal(SIGXFSZ, handler);
    free(data);
}

#ifdef APTI_POSIX                                /* stdio cannot tell devices and folders from files */
static void test_write_disk_full(void **state)
{
    file_test *t = (file_test *)*state;
    if (apti_path_query("/dev/full") == APTI_PATH_NONE) test_skip("no /dev/full here");
    apti_writer w;
    char block[1000] = {0};
    expect_io(t, write_whole(t->ctx, "/dev/full", block, 1000, 1000), "/dev/full");   /* small: fails in the commit */
    assert_non_null(strstr(apt_error(t->ctx), strerror(ENOSPC)));
    assert_ok(t->ctx, apti_write_begin(t->ctx, "/dev/full", &w));                     /* large: fails in a write */
    apt_result result = APT_OK;
    int32_t calls = 0;
    for (; result == APT_OK && calls < 1000; calls++) result = apti_write(&w, block, 1000);
    expect_io(t, result, "/dev/full");
    assert_int_equal(t->log.errors, 2);
    assert_result(apti_write(&w, block, 1000), APT_E_IO);                             /* sticky, said once */
    assert_result(apti_write_commit(&w), APT_E_IO);
    assert_int_equal(t->log.errors, 2);
    assert_int_equal(apti_path_query("/dev/full"), APTI_PATH_OTHER);                  /* still a device */
    assert_ok(t->ctx, write_whole(t->ctx, "/dev/null", block, 1000, 10));
    assert_int_equal(apti_path_query("/dev/null"), APTI_PATH_OTHER);
}

static void test_make_dir(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700];
    assert_ok(t->ctx, apti_make_dir(t->ctx, t->dir));                                 /* exists */
    test_join(path, sizeof path, t->dir, "inner");
    assert_ok(t->ctx, apti_make_dir(t->ctx, path));
    assert_int_equal(apti_path_query(path), APTI_PATH_DIR);
    assert_ok(t->ctx, apti_make_dir(t->ctx, path));
    test_write_file(t->path, "x", 1);
    expect_io(t, apti_make_dir(t->ctx, t->path), t->path);                            /* a file has the name */
    assert_non_null(strstr(apt_error(t->ctx), strerror(EEXIST)));
    snprintf(path, sizeof path, "%s/a/b", t->dir);
    expect_io(t, apti_make_dir(t->ctx, path), path);                                  /* no parent */
    assert_int_equal(apti_path_query(t->path), APTI_PATH_FILE);
    assert_int_equal(apti_path_query(path), APTI_PATH_NONE);
}
#endif

#define FILE_TEST(f) cmocka_unit_test_setup_teardown(f, file_setup, file_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_results), cmocka_unit_test(test_sizes), cmocka_unit_test(test_finite_bits),
        cmocka_unit_test(test_create_default), cmocka_unit_test(test_create_refuses), cmocka_unit_test(test_create_canaries),
        cmocka_unit_test(test_create_every_allocation), cmocka_unit_test(test_kernels_by_name), cmocka_unit_test(test_messages),
        cmocka_unit_test(test_blocks), cmocka_unit_test(test_references), cmocka_unit_test(test_impossible_sizes),
        cmocka_unit_test(test_pool), cmocka_unit_test(test_pool_of_64),
        cmocka_unit_test(test_pool_works_together), cmocka_unit_test(test_foreign_pool),
        cmocka_unit_test(test_two_contexts), cmocka_unit_test(test_clock),
        FILE_TEST(test_write_and_read), FILE_TEST(test_read_failures), FILE_TEST(test_write_replaces), FILE_TEST(test_write_abort),
        FILE_TEST(test_write_beside_leftovers), FILE_TEST(test_write_to_bad_places), FILE_TEST(test_write_without_permission),
        FILE_TEST(test_write_fails_halfway),
#ifdef APTI_POSIX
        FILE_TEST(test_write_disk_full), FILE_TEST(test_make_dir),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
