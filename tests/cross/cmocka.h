/* A stand-in for the part of cmocka that the tests use, for processors whose cmocka library is not installed (the tests then
   run under an emulator). Same names, same output; found before the real one through -Itests/cross. */
#ifndef APT_CROSS_CMOCKA_H
#define APT_CROSS_CMOCKA_H

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

typedef struct CMUnitTest { const char *name; void (*run)(void **); int (*setup)(void **); int (*teardown)(void **); } CMUnitTest;

/* 1: failed, 2: skipped. One program, one thread: a static is fine here. */
static jmp_buf cross_back;

#define cmocka_unit_test(f) {#f, f, NULL, NULL}
#define cmocka_unit_test_setup(f, setup) {#f, f, setup, NULL}
#define cmocka_unit_test_teardown(f, teardown) {#f, f, NULL, teardown}
#define cmocka_unit_test_setup_teardown(f, setup, teardown) {#f, f, setup, teardown}
#define cmocka_run_group_tests(tests, setup, teardown) \
    cross_run((tests), sizeof(tests) / sizeof((tests)[0]), (setup), (teardown))
#define cmocka_run_group_tests_name(name, tests, setup, teardown) cmocka_run_group_tests(tests, setup, teardown)

#define print_message(...) printf(__VA_ARGS__)
#define skip() longjmp(cross_back, 2)
#define fail() (printf("%s:%d: failure\n", __FILE__, __LINE__), longjmp(cross_back, 1))
#define fail_msg(...) (printf("%s:%d: ", __FILE__, __LINE__), printf(__VA_ARGS__), printf("\n"), longjmp(cross_back, 1))
#define cross_check(c, text) do { if (!(c)) fail_msg("%s", text); } while (0)

#define assert_true(c) cross_check(c, #c)
#define assert_false(c) cross_check(!(c), "not " #c)
#define assert_null(p) cross_check((p) == NULL, #p " is NULL")
#define assert_non_null(p) cross_check((p) != NULL, #p " is not NULL")
#define assert_ptr_equal(a, b) cross_check((a) == (b), #a " == " #b)
#define assert_int_equal(a, b) cross_equal((long long)(a), (long long)(b), #a " == " #b, __FILE__, __LINE__)
#define assert_int_not_equal(a, b) cross_check((long long)(a) != (long long)(b), #a " != " #b)
#define assert_in_range(x, low, high) cross_check((x) >= (low) && (x) <= (high), #x " in " #low ".." #high)
#define assert_string_equal(a, b) cross_check(strcmp((a), (b)) == 0, #a " equals " #b)
#define assert_string_not_equal(a, b) cross_check(strcmp((a), (b)) != 0, #a " differs from " #b)
#define assert_memory_equal(a, b, n) cross_check(memcmp((a), (b), (n)) == 0, #a " equals " #b)

static inline void cross_equal(long long a, long long b, const char *text, const char *file, int line)
{
    if (a == b) return;
    printf("%s:%d: %s: %lld != %lld\n", file, line, text, a, b);
    longjmp(cross_back, 1);
}

/* 0: passed */
static inline int cross_run_one(const CMUnitTest *test, void **state)
{
    const int code = setjmp(cross_back);
    if (code != 0) return code;
    if (test->setup != NULL && test->setup(state) != 0) return 1;
    test->run(state);
    return test->teardown != NULL && test->teardown(state) != 0;
}

static inline int cross_run(const CMUnitTest *tests, size_t n, int (*setup)(void **), int (*teardown)(void **))
{
    static const char *const words[3] = {"      OK", " FAILED ", " SKIPPED"};
    int counts[3] = {0, 0, 0};
    void *group = NULL;
    printf("[==========] Running %d test(s).\n", (int)n);
    if (setup != NULL && setup(&group) != 0) return 1;
    for (size_t i = 0; i < n; i++) {
        void *state = group;
        printf("[ RUN      ] %s\n", tests[i].name);
        fflush(stdout);
        const int code = cross_run_one(&tests[i], &state);
        printf("[ %s ] %s\n", words[code], tests[i].name);
        counts[code]++;
    }
    if (teardown != NULL) (void)teardown(&group);
    printf("[==========] %d test(s) run.\n[  PASSED  ] %d test(s).\n", (int)n, counts[0]);
    if (counts[2] > 0) printf("[  SKIPPED ] %d test(s), listed below:\n", counts[2]);
    if (counts[1] > 0) printf("[  FAILED  ] %d test(s), listed below:\n", counts[1]);
    return counts[1];
}

#endif /* APT_CROSS_CMOCKA_H */
