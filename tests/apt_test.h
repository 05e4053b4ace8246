/* apt_test.h - what the test programs share, on top of cmocka.

   A test program looks like this (tests/run.sh builds and runs every tests/test_*.c):

       #define APT_IMPLEMENTATION
       #include "../apt.h"
       #include "apt_test.h"

       static void test_something(void **state) { (void)state; assert_int_equal(1, 1); }

       int main(void)
       {
           const struct CMUnitTest tests[] = {cmocka_unit_test(test_something)};
           return cmocka_run_group_tests(tests, NULL, NULL);
       }

   All helpers are static inline: a program uses what it needs. */
#ifndef APT_TEST_H
#define APT_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- skipping: visible and with a reason (tests/run.sh counts and lists it) ---- */

#define test_skip(...)                                                                  \
    do {                                                                                \
        fprintf(stderr, "    skip: ");                                                  \
        fprintf(stderr, __VA_ARGS__);                                                   \
        fprintf(stderr, "\n");                                                          \
        skip();                                                                         \
    } while (0)

/* Path of something in the folder of large test data (APT_SHARED, default ../shared); skips the test when it is not there. */
static inline const char *test_shared(char *path, size_t capacity, const char *name)
{
    const char *root = getenv("APT_SHARED");
    const int n = snprintf(path, capacity, "%s/%s", root != NULL ? root : "../shared", name);
    struct stat info;
    if (n < 0 || (size_t)n >= capacity) fail_msg("path too long: %s", name);
    if (stat(path, &info) != 0) test_skip("%s is missing", path);
    return path;
}

/* ---- how much of a long test runs in which build ---- */

/* Every n-th of many sizes where a sanitizer or an emulator makes the program many times slower; all of them elsewhere. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(APT_TEST_SAMPLE)
#define TEST_SAMPLE(n) (n)
#else
#define TEST_SAMPLE(n) 1
#endif

/* Where to begin in a list of kernel tables. To threads it does not matter which kernels run: for them the last ones do. */
#ifdef __SANITIZE_THREAD__
#define TEST_FIRST_TABLE(count) ((count) - 1)
#else
#define TEST_FIRST_TABLE(count) 0
#endif

#ifdef APT_TEST_CUDA
/* ---- every context on the emulated device of apt_cuda.h (the build "emulated" of tests/run.sh) ---- */

#ifndef APT_TEST_DEVICE                          /* with it: a real one, from the unit that the program is linked with */
#define APT_CUDA_IMPLEMENTATION
#define APT_CUDA_EMULATE
#endif
#include "../apt_cuda.h"

#ifdef TEST_EAGER
/* For tests of single operations, which look at once: waits behind each of them. */
static apt_backend test_real_backend;

static bool test_run_eagerly(void *self, apti_op op, const void *job)
{
    char message[APTI_BACKEND_MESSAGE];
    const bool done = test_real_backend.run(self, op, job);
    if (test_real_backend.sync(self, true, message) != APT_OK) fail_msg("operation %d: %s", (int)op, message);
    return done;
}
#endif

static inline apt_ctx *test_create(const apt_desc *given)
{
    char message[APTI_BACKEND_MESSAGE];
    apt_desc desc = APT_ZERO;
    if (given != NULL) desc = *given;
    if (desc.start_canary == 0 && desc.end_canary == 0) {
        apt_cuda_desc device = APT_ZERO;
        device.workspace_bytes = (size_t)16 << 20;
#ifndef APT_TEST_DEVICE
        device.alloc = desc.alloc;
        device.release = desc.release;
        device.alloc_user = desc.alloc_user;
#endif
        desc.backend = apt_cuda_open(&device, message, sizeof message);
        if (desc.backend == NULL) fail_msg("%s", message);
#ifdef TEST_EAGER
        test_real_backend = *desc.backend;       /* the same functions for every context */
        desc.backend->run = test_run_eagerly;
#endif
    }
    return apt_create(&desc);
}
#define apt_create test_create
#endif

#ifndef APT_ONLY_CORE
/* ---- messages: a logger that remembers ---- */

typedef struct test_log {
    int32_t errors, warnings, infos;
    apt_result result;                /* of the last error */
    char text[1024];                  /* last message */
} test_log;

static inline void test_log_put(const apt_log_item *item, void *user)
{
    test_log *log = (test_log *)user;
    if (item->level == APT_LOG_ERROR) log->errors++, log->result = item->result;
    if (item->level == APT_LOG_WARNING) log->warnings++;
    if (item->level == APT_LOG_INFO) log->infos++;
    snprintf(log->text, sizeof log->text, "%s", item->message);
}

/* ---- memory: an allocator that counts, fails on demand and misaligns on purpose ---- */

typedef struct test_memory {
    int64_t calls, live;              /* allocations asked for; not released yet */
    int64_t fail_at;                  /* this call (0, 1, ...) and all later ones fail; negative: none */
    bool once;                        /* only call number fail_at fails */
    bool failed;                      /* a failure was given */
} test_memory;

static inline void *test_alloc(size_t bytes, void *user)
{
    test_memory *memory = (test_memory *)user;
    const int64_t call = memory->calls++;
    if (memory->fail_at >= 0 && (memory->once ? call == memory->fail_at : call >= memory->fail_at)) {
        memory->failed = true;
        return NULL;
    }
    char *block = (char *)malloc(bytes + 8);
    if (block == NULL) return NULL;
    memory->live++;
    return block + 8;                 /* 8-byte aligned only: apt.h must align by itself */
}

static inline void test_release(void *block, void *user)
{
    ((test_memory *)user)->live--;
    free((char *)block - 8);
}

/* A desc with that allocator and logger, one thread. memory and log may be NULL. */
static inline apt_desc test_desc(test_memory *memory, test_log *log)
{
    apt_desc desc = APT_ZERO;
    desc.threads = 1;
    if (memory != NULL) {
        memset(memory, 0, sizeof *memory);
        memory->fail_at = -1;
        desc.alloc = test_alloc;
        desc.release = test_release;
        desc.alloc_user = memory;
    }
    if (log != NULL) {
        memset(log, 0, sizeof *log);
        desc.log = test_log_put;
        desc.log_user = log;
    }
    return desc;
}

/* A context that keeps its messages to itself. */
static inline apt_ctx *test_context(int32_t threads, test_log *log)
{
    apt_desc desc = test_desc(NULL, log);
    desc.threads = threads;
    apt_ctx *ctx = apt_create(&desc);
    assert_non_null(ctx);
    return ctx;
}

/* Runs attempt() over and over in a fresh context, letting allocation 0, 1, 2 ... of the attempt fail, until none fails.
   Each failure must come back as APT_E_MEMORY with a message and leak nothing. The attempt may leave models and trainers to
   apt_destroy. Returns how many allocations the attempt makes. */
typedef apt_result (*test_attempt)(apt_ctx *ctx, void *user);

static inline int64_t test_every_allocation(test_attempt attempt, void *user)
{
    for (int64_t n = 0;; n++) {
        test_memory memory;
        test_log log;
        const apt_desc desc = test_desc(&memory, &log);
        apt_ctx *ctx = apt_create(&desc);
        assert_non_null(ctx);
        memory.fail_at = memory.calls + n;
        memory.once = true;
        const apt_result result = attempt(ctx, user);
        memory.fail_at = -1;
        if (memory.failed && result != APT_E_MEMORY)
            fail_msg("allocation %lld failed, but the result is %s", (long long)n, apt_result_text(result));
        if (memory.failed) assert_true(apt_error(ctx)[0] != 0);
        else if (result != APT_OK) fail_msg("no allocation failed, but: %s", apt_error(ctx));
        apt_destroy(ctx);
        if (memory.live != 0) fail_msg("%lld blocks leaked after the failure of allocation %lld", (long long)memory.live, (long long)n);
        if (!memory.failed) return n;
    }
}

#endif /* APT_ONLY_CORE */

/* ---- files: a temporary folder that is removed with everything in it ---- */

static inline void test_remove(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) return;
    if (S_ISDIR(info.st_mode)) {
        (void)chmod(path, 0700);
        DIR *dir = opendir(path);
        for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
            char inner[4096];
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
            const int n = snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
            if (n > 0 && (size_t)n < sizeof inner) test_remove(inner);
        }
        if (dir != NULL) closedir(dir);
    }
    (void)remove(path);
}

/* A new empty folder under APT_TEST_TMP, TMPDIR or /tmp. */
static inline const char *test_dir(char *path, size_t capacity)
{
    const char *root = getenv("APT_TEST_TMP");
    if (root == NULL) root = getenv("TMPDIR");
    if (root == NULL) root = "/tmp";
    for (int i = 0; i < 10000; i++) {
        snprintf(path, capacity, "%s/apt_test_%ld_%d", root, (long)getpid(), i);
        if (mkdir(path, 0700) == 0) return path;
        if (errno != EEXIST) break;
    }
    fail_msg("no temporary folder could be made in %s", root);
    return NULL;
}

static inline const char *test_join(char *path, size_t capacity, const char *dir, const char *name)
{
    const int n = snprintf(path, capacity, "%s/%s", dir, name);
    assert_true(n > 0 && (size_t)n < capacity);
    return path;
}

static inline void test_write_file(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL) fail_msg("cannot write %s", path);
    assert_true(fwrite(data, 1, bytes, file) == bytes);
    assert_int_equal(fclose(file), 0);
}

/* The whole file, ended by a 0 byte; free() it. NULL when it cannot be opened. */
static inline char *test_read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) return NULL;
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    const long size = ftell(file);
    assert_true(size >= 0);
    rewind(file);
    char *text = (char *)malloc((size_t)size + 1);
    assert_non_null(text);
    assert_true(fread(text, 1, (size_t)size, file) == (size_t)size);
    text[size] = 0;
    fclose(file);
    if (bytes != NULL) *bytes = (size_t)size;
    return text;
}

static inline int32_t test_count_files(const char *path)
{
    int32_t count = 0;
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) count += entry->d_name[0] != '.';
    closedir(dir);
    return count;
}

/* ---- numbers ---- */

/* One number for many bytes, on top of what came before. Fast, where apti_checksum is what files hold. */
static inline uint64_t test_hash(uint64_t sum, const void *data, size_t bytes)
{
    const char *p = (const char *)data;
    for (size_t left = bytes; left > 0;) {
        uint64_t word = 0;
        const size_t n = left < sizeof word ? left : sizeof word;
        memcpy(&word, p, n);
        sum = (sum ^ word ^ bytes) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
        p += n;
        left -= n;
    }
    return sum;
}

/* By the bits, so that -Ofast cannot fold it. */
static inline bool test_finite(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7f800000u) != 0x7f800000u;
}

/* |actual - expected| <= tolerance * max|expected| for every element: relative to the tensor's own scale, so that a tensor of
   zeros or noise cannot pass for a small one. An expected tensor of only zeros must be met exactly. */
static inline void test_near(const char *name, const float *actual, const float *expected, int64_t n, double tolerance)
{
    double norm = 0, worst = -1;
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!test_finite(actual[i]) || !test_finite(expected[i]))
            fail_msg("%s[%lld]: got %g, expected %g", name, (long long)i, (double)actual[i], (double)expected[i]);
        const double size = fabs((double)expected[i]), error = fabs((double)actual[i] - (double)expected[i]);
        if (size > norm) norm = size;
        if (error > worst) worst = error, at = i;
    }
    if (worst > tolerance * norm)
        fail_msg("%s[%lld]: got %.9g, expected %.9g; error %.3g of the tensor's largest value %.3g, allowed %.3g", name,
                 (long long)at, (double)actual[at], (double)expected[at], worst / norm, norm, tolerance);
}

static inline void test_near_value(const char *name, double actual, double expected, double tolerance)
{
    const double error = fabs(actual - expected);
    if (!test_finite((float)actual) || error > tolerance)
        fail_msg("%s: got %.12g, expected %.12g; error %.3g, allowed %.3g", name, actual, expected, error, tolerance);
}

#define assert_ok(ctx, call)                                                            \
    do {                                                                                \
        const apt_result test_result_ = (call);                                         \
        if (test_result_ != APT_OK) fail_msg("%s: %s (%s)", #call, apt_result_text(test_result_), apt_error(ctx)); \
    } while (0)

#define assert_result(call, wanted)                                                     \
    do {                                                                                \
        const apt_result test_result_ = (call);                                         \
        if (test_result_ != (wanted)) fail_msg("%s: got %s, expected %s", #call, apt_result_text(test_result_), #wanted); \
    } while (0)

/* malloc that never returns NULL. */
static inline void *test_memory_block(size_t bytes)
{
    void *block = malloc(bytes > 0 ? bytes : 1);
    if (block == NULL) fail_msg("no memory for the test itself (%lld bytes)", (long long)bytes);
    return block;
}

#endif /* APT_TEST_H */
