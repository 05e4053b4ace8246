/* Section files: JSON, safetensors, config.json, loading and saving models, the checkpoint container.
   Also built with APT_NO_MMAP and APT_NO_POSIX. */
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "apt_test.h"
#include "model_test.h"

#include <locale.h>
#include <signal.h>
#include <sys/resource.h>

typedef struct file_test { apt_ctx *ctx; test_log log; char dir[512], path[640]; } file_test;

static int file_setup(void **state)
{
    file_test *t = (file_test *)test_memory_block(sizeof *t);
    t->ctx = test_context(1, &t->log);
    test_dir(t->dir, sizeof t->dir);
    test_join(t->path, sizeof t->path, t->dir, "file");
    *state = t;
    return 0;
}

static int file_teardown(void **state)
{
    file_test *t = (file_test *)*state;
    apt_destroy(t->ctx);
    test_remove(t->dir);
    free(t);
    return 0;
}

/* The call fails with `wanted` and its message holds `needle`. */
#define expect(ctx, call, wanted, needle)                                               \
    do {                                                                                \
        const apt_result expect_result_ = (call);                                       \
        if (expect_result_ != (wanted) || strstr(apt_error(ctx), needle) == NULL)       \
            fail_msg("%s: got %s (%s), expected %s with '%s'", #call, apt_result_text(expect_result_), apt_error(ctx),  \
                     #wanted, needle);                                                  \
    } while (0)

/* ------------------------------------------------------------------------------------------------------------- JSON */

static apt_result json_try(apt_ctx *ctx, const char *text, int64_t bytes)
{
    apti_json json;
    const apt_result result = apti_json_parse(ctx, "some.json", text, bytes, &json);
    if (result == APT_OK) apti_json_free(&json);
    return result;
}

static void test_json_accepts(void **state)
{
    file_test *t = (file_test *)*state;
    const char *texts[] = {
        "null", "true", "false", " 0 ", "-0", "1e5", "-1.5E+3", "0.1e-9", "\"\"", "[]", "{}", "[ ]", "{ }", "[1,2 , 3]",
        "{\"a\":[{}]}",
        "\t\r\n{\"a\" : 1 ,\n\"b\":null}\n", "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\uD834\\uDD1E\"",
        "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xef\xbf\xbf\"",
        "{\"a\":{\"a\":1},\"b\":{\"a\":2}}", "{\"\":1,\" \":2}", "\"\x7f\"", "[[[[[]]]]]", "123456789012345678901234567890",
    };
    const int64_t before = apt_memory_info(t->ctx).bytes;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        assert_ok(t->ctx, json_try(t->ctx, texts[i], (int64_t)strlen(texts[i])));
    assert_int_equal(apt_memory_info(t->ctx).bytes, before);
}

typedef struct json_case { const char *text; int at; const char *problem; } json_case;

static const json_case json_refused[] = {
    {"", 0, "a value is expected, found the end"}, {" ", 1, "a value"}, {"nul", 0, "a value"}, {"nulL", 0, "a value"},
    {"True", 0, "a value"},
    {"NaN", 0, "a value"}, {"Infinity", 0, "a value"}, {"-Infinity", 1, "a digit"}, {"+1", 0, "a value"}, {".5", 0, "a value"},
    {"01", 1, "the end is expected, found '1'"}, {"-", 1, "a digit"}, {"1.", 2, "a digit"}, {"1.e5", 2, "a digit"},
    {"1e", 2, "a digit"},
    {"1e+", 3, "a digit"}, {"0x10", 1, "the end"}, {"1 2", 2, "the end"}, {"[1 2]", 3, "',' or ']'"}, {"[1,]", 3, "a value"},
    {"[,1]", 1, "a value"},
    {"[1", 2, "',' or ']'"}, {"[", 1, "a value"}, {"]", 0, "a value"}, {"[1}", 2, "',' or ']'"}, {"{\"a\":1]", 6, "',' or '}'"},
    {"{\"a\":1,}", 7, "a string"}, {"{a:1}", 1, "a string"}, {"{\"a\" 1}", 5, "':'"}, {"{\"a\":}", 5, "a value"},
    {"{\"a\":1 \"b\":2}", 7, "',' or '}'"},
    {"{1:2}", 1, "a string"}, {"{\"a\"", 4, "':'"}, {"{'a':1}", 1, "a string"}, {"'a'", 0, "a value"}, {"\"a", 2, "does not end"},
    {"\"a\nb\"", 2, "control character"}, {"\"a\tb\"", 2, "control character"}, {"\"\\x41\"", 1, "escape"},
    {"\"\\u12g4\"", 1, "escape"},
    {"\"\\u123", 1, "escape"}, {"\"\\", 1, "escape"}, {"\"\\ud800\"", 1, "escape"}, {"\"\\udc00\"", 1, "escape"},
    {"\"\\ud800\\u0041\"", 1, "escape"},
    {"\"\\ud800\\ud800\"", 1, "escape"}, {"\"\x80\"", 1, "UTF-8"}, {"\"\xc0\xaf\"", 1, "UTF-8"}, {"\"\xc1\xbf\"", 1, "UTF-8"},
    {"\"\xe0\x80\xaf\"", 1, "UTF-8"}, {"\"\xed\xa0\x80\"", 1, "UTF-8"}, {"\"\xf0\x80\x80\x80\"", 1, "UTF-8"},
    {"\"\xf4\x90\x80\x80\"", 1, "UTF-8"},
    {"\"\xf5\x80\x80\x80\"", 1, "UTF-8"}, {"\"\xe2\x82\"", 1, "UTF-8"}, {"\"\xff\"", 1, "UTF-8"},
    {"\xef\xbb\xbf{}", 0, "a value"},
    {"{} // no", 3, "the end"}, {"{\"a\":1,\"a\":2}", 8, "twice"}, {"{\"a\":1,\"b\":3,\"\\u0061\":2}", 14, "twice"},
    {"[{\"x\":{\"y\":1,\"y\":1}}]", 14, "twice"},
    {"{\"\xc3\xa9\":1,\"\\u00e9\":2}", 9, "twice"}, {"1\f", 1, "the end"}, {"[1,\v2]", 3, "a value"},
};

static void test_json_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t before = apt_memory_info(t->ctx).bytes;
    for (size_t i = 0; i < sizeof json_refused / sizeof *json_refused; i++) {
        char at[64];
        snprintf(at, sizeof at, "'some.json': byte %d: ", json_refused[i].at);
        expect(t->ctx, json_try(t->ctx, json_refused[i].text, (int64_t)strlen(json_refused[i].text)), APT_E_FORMAT, at);
        if (strstr(apt_error(t->ctx), json_refused[i].problem) == NULL)
            fail_msg("%s: '%s'", json_refused[i].problem, apt_error(t->ctx));
    }
    expect(t->ctx, json_try(t->ctx, "\0", 1), APT_E_FORMAT, "byte 0: a value is expected, found byte 0x00");
    expect(t->ctx, json_try(t->ctx, "1\0", 2), APT_E_FORMAT, "byte 1: the end is expected, found byte 0x00");
    expect(t->ctx, json_try(t->ctx, "\"\0\"", 3), APT_E_FORMAT, "control");
    assert_int_equal(apt_memory_info(t->ctx).bytes, before);
}

static void test_json_depth(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t many = 3000000;
    char *text = (char *)test_memory_block((size_t)many);
    for (int64_t depth = 63; depth <= 66; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        if (depth <= 64) assert_ok(t->ctx, json_try(t->ctx, text, 2 * depth));
        else expect(t->ctx, json_try(t->ctx, text, 2 * depth), APT_E_FORMAT, "byte 64: nested too deeply");
    }
    memset(text, '[', (size_t)many);
    expect(t->ctx, json_try(t->ctx, text, many), APT_E_FORMAT, "nested too deeply");
    for (int64_t i = 0; i + 5 <= many; i += 5) memcpy(text + i, "{\"a\":", 5);
    expect(t->ctx, json_try(t->ctx, text, many), APT_E_FORMAT, "byte 320: nested too deeply");
    free(text);
}

/* More values than are allowed, numbers and texts that are too long: refused quickly, without the memory they ask for. */
static void test_json_limits(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t bytes = 2 * ((int64_t)APTI_JSON_NODES + 1);
    char *text = (char *)test_memory_block((size_t)bytes + 1);
    for (int64_t i = 0; i < bytes; i += 2) memcpy(text + i, "0,", 2);
    text[0] = '[';
    text[1] = ' ';
    apt_memory_reset_peak(t->ctx);
    const int64_t before = apt_memory_info(t->ctx).peak_bytes;
    expect(t->ctx, json_try(t->ctx, text, bytes), APT_E_FORMAT, "more values than are allowed");
    assert_int_equal(apt_memory_info(t->ctx).peak_bytes, before);
    memset(text, '7', 600);
    assert_ok(t->ctx, json_try(t->ctx, text, APTI_NUMBER_BYTES));
    expect(t->ctx, json_try(t->ctx, text, APTI_NUMBER_BYTES + 1), APT_E_FORMAT, "byte 0: number longer");
    expect(t->ctx, json_try(t->ctx, text, (int64_t)APTI_JSON_BYTES + 1), APT_E_RANGE, "bytes of JSON");
    free(text);
}

/* 200,000 different keys, then one of them twice: no quadratic time (this test would not end). */
static void test_json_many_keys(void **state)
{
    file_test *t = (file_test *)*state;
    const int keys = 200000;
    char *text = (char *)test_memory_block((size_t)keys * 32);
    int64_t n = 0;
    text[n++] = '{';
    for (int i = 0; i < keys; i++) n += sprintf(text + n, "\"key%d\":%d,", i, i);
    text[n - 1] = '}';
    assert_ok(t->ctx, json_try(t->ctx, text, n));
    n--;
    n += sprintf(text + n, ",\"key77\":0}");
    expect(t->ctx, json_try(t->ctx, text, n), APT_E_FORMAT, "the key 'key77' stands twice");
    free(text);
}

static void test_json_values(void **state)
{
    file_test *t = (file_test *)*state;
    const char *text = "{\"i\":[0,-1,9223372036854775807,-9223372036854775808,9223372036854775808,-9223372036854775809,1.0,"
                       "1e2,-0],"
                       "\"s\":\"a\\u00e9\\ud83d\\ude00\\n\",\"b\":[true,false],\"n\":null,\"o\":{\"i\":7},\"\\u0071\":5,"
                       "\"z\":\"a\\u0000b\"}";
    apti_json json;
    assert_ok(t->ctx, apti_json_parse(t->ctx, "x", text, (int64_t)strlen(text), &json));
    const int64_t ints[] = {0, -1, INT64_MAX, INT64_MIN};
    const int32_t list = apti_json_find(&json, 0, "i");
    int64_t i = 0;
    for (int32_t k = 0; k < 4; k++) assert_true(apti_json_int(&json, list + 1 + k, &i) && i == ints[k]);
    i = 77;
    for (int32_t k = 4; k < 8; k++) assert_false(apti_json_int(&json, list + 1 + k, &i));
    assert_int_equal(i, 77);
    assert_true(apti_json_int(&json, list + 9, &i) && i == 0);
    assert_int_equal(json.nodes[list].count, 9);
    assert_int_equal(json.nodes[list].next, apti_json_find(&json, 0, "s") - 1);
    char out[32];
    const int32_t s = apti_json_find(&json, 0, "s");
    assert_int_equal(apti_json_string(&json, s, out, sizeof out), 8);
    assert_string_equal(out, "a\xc3\xa9\xf0\x9f\x98\x80\n");
    assert_int_equal(apti_json_string(&json, s, out, 9), 8);
    assert_int_equal(apti_json_string(&json, s, out, 8), -1);
    assert_int_equal(apti_json_string(&json, s, out, 0), -1);
    assert_int_equal(apti_json_string(&json, list, out, sizeof out), -1);
    assert_int_equal(apti_json_string(&json, apti_json_find(&json, 0, "z"), out, sizeof out), 3);
    assert_memory_equal(out, "a\0b", 4);
    assert_true(apti_json_is(&json, s, "a\xc3\xa9\xf0\x9f\x98\x80\n"));
    assert_false(apti_json_is(&json, s, "a\xc3\xa9"));
    assert_false(apti_json_is(&json, apti_json_find(&json, 0, "z"), "a"));
    assert_false(apti_json_is(&json, -1, ""));
    bool b = false;
    const int32_t bools = apti_json_find(&json, 0, "b");
    assert_true(apti_json_bool(&json, bools + 1, &b) && b);
    assert_true(apti_json_bool(&json, bools + 2, &b) && !b);
    assert_false(apti_json_bool(&json, s, &b));
    assert_true(apti_json_int(&json, apti_json_find(&json, apti_json_find(&json, 0, "o"), "i"), &i) && i == 7);
    assert_true(apti_json_int(&json, apti_json_find(&json, 0, "q"), &i) && i == 5);
    assert_int_equal(apti_json_find(&json, 0, "missing"), -1);
    assert_int_equal(apti_json_find(&json, list, "i"), -1);
    assert_int_equal(apti_json_find(&json, -1, "i"), -1);
    apti_json_free(&json);
}

static void test_numbers_read(void **state)
{
    (void)state;
    const char *texts[] = {"0", "-0.0", "1", "0.1", "1e-12", "123456.789e-3", "2.2250738585072011e-308", "4.9e-324",
                           "1.7976931348623157e308",
                           "9007199254740993", "0.30000000000000004", "1E5", "1e+05", "100000000000000000000000000000000",
                           "3.4028234663852886e38"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        double value = 77;
        assert_true(apti_decimal(texts[i], (int64_t)strlen(texts[i]), &value));
        const double expected = strtod(texts[i], NULL);
        assert_memory_equal(&value, &expected, sizeof value);
    }
    double value = 0;
    assert_false(apti_decimal("1e309", 5, &value));
    assert_false(apti_decimal("-1e99999999999999999999", 23, &value));
    assert_true(apti_decimal("1e-99999999999999999999", 23, &value) && value == 0);
    assert_true(apti_decimal("0e99999999999999999999", 22, &value) && value == 0);
    assert_false(apti_decimal("", 0, &value));
}

static void check_float(float value)
{
#ifdef __FAST_MATH__
    if ((apti_bits(value) & 0x7f800000u) == 0) return;   /* -Ofast flushes subnormals to zero */
#endif
    char text[40];
    double back = 0;
    apti_format_float(text, value);
    assert_true(apti_decimal(text, (int64_t)strlen(text), &back));
    if (apti_bits((float)back) != apti_bits(value)) fail_msg("%08x became %s", (unsigned)apti_bits(value), text);
}

static void test_numbers_written(void **state)
{
    (void)state;
    const struct { float value; const char *text; } known[] = {
        {0.0f, "0.0"}, {-0.0f, "-0.0"}, {1.0f, "1.0"}, {0.02f, "0.02"}, {1e-12f, "1e-12"}, {1e-5f, "1e-05"}, {1e-4f, "0.0001"},
        {-12.5f, "-12.5"},
        {100.0f, "100.0"}, {123456.0f, "123456.0"}, {1e15f, "1000000000000000.0"}, {1e16f, "1e+16"}, {1.5e-7f, "1.5e-07"},
        {0.1f, "0.1"},
        {3.4028235e38f, "3.4028235e+38"}, {1e-45f, "1e-45"}, {16777217.0f, "16777216.0"}, {0.33333334f, "0.33333334"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        char text[40];
#ifdef __FAST_MATH__
        if (known[i].value == 1e-45f) continue;
#endif
        apti_format_float(text, known[i].value);
        assert_string_equal(text, known[i].text);
        check_float(known[i].value);
    }
    apti_rng rng = {11, 0};
    for (int i = 0; i < 100000; i++) {
        const float value = apti_float((uint32_t)apti_rng_next(&rng));
        if (apti_finite(value)) check_float(value);
    }
}

/* A program with a decimal comma reads and writes the same files. */
static void test_numbers_locale(void **state)
{
    (void)state;
    const char *names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "ru_RU.UTF-8", "de_DE", "ps_AF.UTF-8"};
    const char *found = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && found == NULL; i++) found = setlocale(LC_NUMERIC, names[i]);
    if (found == NULL) test_skip("no locale with a decimal comma is installed");
    char text[40], probe[16];
    double value = 0;
    snprintf(probe, sizeof probe, "%.1f", 0.5);
    apti_format_float(text, 0.0625f);
    const bool ok = apti_decimal("0.0625", 6, &value);
    setlocale(LC_NUMERIC, "C");
    assert_string_not_equal(probe, "0.5");
    assert_true(ok && value == 0.0625);
    assert_string_equal(text, "0.0625");
}

static void test_json_writer(void **state)
{
    file_test *t = (file_test *)*state;
    apti_json_out out;
    const char *text = NULL;
    int64_t bytes = 0;
    for (int32_t indent = 0; indent <= 2; indent += 2) {
        apti_json_begin(&out, t->ctx, indent);
        apti_json_open(&out, '{');
        apti_json_key(&out, "a\"\\\x01\xc3\xa9");
        apti_json_open(&out, '[');
        apti_json_put_int(&out, INT64_MIN);
        apti_json_put_float(&out, 1e-12f);
        apti_json_put_bool(&out, true);
        apti_json_put_string(&out, "");
        apti_json_open(&out, '{');
        apti_json_close(&out);
        apti_json_close(&out);
        apti_json_key(&out, "b");
        apti_json_put_bool(&out, false);
        apti_json_close(&out);
        assert_ok(t->ctx, apti_json_end(&out, &text, &bytes));
        const char *expected = indent == 0 ? "{\"a\\\"\\\\\\u0001\xc3\xa9\":[-9223372036854775808,1e-12,true,\"\",{}],"
                                             "\"b\":false}"
                                           : "{\n  \"a\\\"\\\\\\u0001\xc3\xa9\": [\n    -9223372036854775808,\n    1e-12,"
                                             "\n    true,\n    \"\",\n    {}\n  ],\n  \"b\": false\n}";
        assert_int_equal(bytes, strlen(expected));
        assert_memory_equal(text, expected, (size_t)bytes);
        assert_ok(t->ctx, json_try(t->ctx, text, bytes));
        apti_json_drop(&out);
    }
    apti_json_begin(&out, t->ctx, 0);
    apti_json_put_string(&out, "bad \xff");
    apti_json_put_string(&out, "later");
    expect(t->ctx, apti_json_end(&out, &text, &bytes), APT_E_FORMAT, "'bad ?' is not valid UTF-8");
    apti_json_drop(&out);
    apti_json_begin(&out, t->ctx, 0);
    apti_json_put_float(&out, apti_float(0x7fc00000u));
    expect(t->ctx, apti_json_end(&out, &text, &bytes), APT_E_NONFINITE, "NaN");
    apti_json_drop(&out);
    apti_json_begin(&out, t->ctx, 0);
    for (int i = 0; i < 65; i++) apti_json_open(&out, '[');
    expect(t->ctx, apti_json_end(&out, &text, &bytes), APT_E_STATE, "nested");
    apti_json_drop(&out);
}

/* ------------------------------------------------------------------------------------------------------- safetensors */

/* A file of `header` (text) and `bytes` of data 0, 1, 2 ... */
static void put_tensors(const char *path, const char *header, int64_t bytes)
{
    const uint64_t length = strlen(header);
    uint8_t *file = (uint8_t *)test_memory_block(8 + (size_t)length + (size_t)bytes);
    memcpy(file, &length, 8);
    memcpy(file + 8, header, length);
    for (int64_t i = 0; i < bytes; i++) file[8 + (int64_t)length + i] = (uint8_t)i;
    test_write_file(path, file, 8 + (size_t)length + (size_t)bytes);
    free(file);
}

static apt_result open_close(apt_ctx *ctx, const char *path)
{
    apti_tensors *set = NULL;
    const apt_result result = apti_tensors_open(ctx, path, &set);
    if (result == APT_OK) apti_tensors_close(set);
    else assert_null(set);
    return result;
}

#define A4 "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"

static void test_tensors_accept(void **state)
{
    file_test *t = (file_test *)*state;
    put_tensors(t->path, "{\"__metadata__\":{\"format\":\"pt\",\"k\":\"v\\u0041\"},"
                         "\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[24,28]},"
                         "\"e\":{\"dtype\":\"F64\",\"shape\":[3,0,5],\"data_offsets\":[24,24]},"
                         "\"sp\\u0061ce \\\"q\\\"\":{\"shape\":[2,3],\"data_offsets\":[0,24],\"dtype\":\"I32\",\"extra\":[{}]},"
                         "\"z\":{\"dtype\":\"BOOL\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[28,29]}}     ", 29);
    apti_tensors *set = NULL;
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
    assert_int_equal(set->count, 4);
    assert_string_equal(apti_tensors_meta(set, "format"), "pt");
    assert_string_equal(apti_tensors_meta(set, "k"), "vA");
    assert_null(apti_tensors_meta(set, "v"));
    const apti_tensor_view *s = apti_tensors_find(set, "s"), *e = apti_tensors_find(set, "e");
    const apti_tensor_view *q = apti_tensors_find(set, "space \"q\"");
    assert_true(s != NULL && s->dims == 0 && s->bytes == 4 && s->dtype == APT_F32 && s->data[0] == 24 && s->name_bytes == 1);
    assert_true(e != NULL && e->dims == 3 && e->bytes == 0 && e->shape[1] == 0 && e->shape[2] == 5 && e->dtype == APT_F64);
    assert_true(q != NULL && q->dims == 2 && q->shape[0] == 2 && q->shape[1] == 3 && q->dtype == APT_I32 && q->data[23] == 23);
    assert_null(apti_tensors_find(set, "space"));
    assert_null(apti_tensors_find(set, ""));
    assert_null(apti_tensors_find(set, "__metadata__"));
    apti_tensors_close(set);
    put_tensors(t->path, "{}", 0);
    assert_ok(t->ctx, open_close(t->ctx, t->path));
    put_tensors(t->path, "{\"__metadata__\":{}}", 0);
    assert_ok(t->ctx, open_close(t->ctx, t->path));
    put_tensors(t->path, "{\"\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4);
    assert_ok(t->ctx, open_close(t->ctx, t->path));
}

typedef struct tensor_case { const char *header; int64_t bytes; apt_result result; const char *message; } tensor_case;

static const tensor_case tensors_refused[] = {
    {"", 0, APT_E_FORMAT, "byte 8: the header does not begin with '{'"},
    {" {}", 0, APT_E_FORMAT, "byte 8: the header does not begin with '{'"},
    {"[]", 0, APT_E_FORMAT, "byte 8: the header does not begin with '{'"},
    {"{", 0, APT_E_FORMAT, "byte 9: a string is expected"},
    {"{}\n", 0, APT_E_FORMAT, "byte 10: only spaces may follow the header, found byte 0x0a"},
    {"{}  \t ", 0, APT_E_FORMAT, "byte 12: only spaces"},
    {"{} x", 0, APT_E_FORMAT, "byte 11: the end is expected"},
    {"{}{}", 0, APT_E_FORMAT, "byte 10: the end is expected"},
    {"{" A4 ",}", 4, APT_E_FORMAT, "a string is expected"},
    {"{" A4 "," A4 "}", 4, APT_E_FORMAT, "the key 'a' stands twice"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "the key 'dtype' stands twice"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, APT_E_FORMAT, "'__metadata__' stands twice"},
    {"{\"__metadata__\":[]}", 0, APT_E_FORMAT, "__metadata__ is not an object"},
    {"{\"__metadata__\":null}", 0, APT_E_FORMAT, "__metadata__ is not an object"},
    {"{\"__metadata__\":{\"k\":1}}", 0, APT_E_FORMAT, "__metadata__ 'k' is not a string"},
    {"{\"__metadata__\":{\"k\":{\"a\":\"b\"}}}", 0, APT_E_FORMAT, "__metadata__ 'k' is not a string"},
    {"{\"a\":1}", 0, APT_E_FORMAT, "tensor 'a' is described by 1, expected an object"},
    {"{\"a\":[]}", 0, APT_E_FORMAT, "tensor 'a' is described by []"},
    {"{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "the tensor name 'a?b' holds a 0 character"},
    {"{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a' has no \"dtype\" string"},
    {"{\"a\":{\"dtype\":32,\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a' has no \"dtype\" string"},
    {"{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_UNSUPPORTED,
     "tensor 'a' has dtype \"F8_E4M3\""},
    {"{\"a\":{\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, APT_E_UNSUPPORTED, "tensor 'a' has dtype \"f32\""},
    {"{\"a\":{\"dtype\":\"U64\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, APT_E_UNSUPPORTED, "tensor 'a' has dtype \"U64\""},
    {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a' has no \"shape\" array"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":4,\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a' has no \"shape\" array"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[-4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "tensor 'a': dimension 0 is -4, expected an integer of 0 or more"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2,2.0],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a': dimension 1 is 2.0"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[\"4\"],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a': dimension 0 is 4"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[[4],4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "tensor 'a': dimension 0 is [4]"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,4]}}", 4, APT_E_UNSUPPORTED,
     "tensor 'a' has 9 dimensions, at most 8"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "the size of shape [4294967296, 4294967296] overflows"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0, APT_E_FORMAT, "overflows"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[9223372036854775807],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "overflows"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[9223372036854775808],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "dimension 0 is 9223372036854775808"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, APT_E_FORMAT, "tensor 'a' has no \"data_offsets\" of two integers"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0]}}", 4, APT_E_FORMAT, "no \"data_offsets\""},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]}}", 4, APT_E_FORMAT, "no \"data_offsets\""},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,\"4\"]}}", 4, APT_E_FORMAT, "no \"data_offsets\""},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[[0],4]}}", 4, APT_E_FORMAT, "no \"data_offsets\""},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[-1,3]}}", 4, APT_E_FORMAT,
     "tensor 'a': data_offsets [-1, 3] do not lie in the 4 bytes"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,0]}}", 4, APT_E_FORMAT, "data_offsets [4, 0]"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[0,5]}}", 4, APT_E_FORMAT,
     "data_offsets [0, 5] do not lie in the 4 bytes"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[9223372036854775803,9223372036854775807]}}", 4, APT_E_FORMAT,
     "do not lie"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "tensor 'a': data_offsets give 4 bytes, F32 [2] needs 8"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT,
     "data_offsets give 4 bytes, U8 [0] needs 0"},
    {"{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[5,7]}}", 7, APT_E_FORMAT,
     "tensor 'b' begins at byte 5 of the data, which leaves a hole from byte 4"},
    {"{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[3,5]}}", 5, APT_E_FORMAT,
     "tensor 'b' begins at byte 3 of the data, which overlaps the tensor up to byte 4"},
    {"{" A4 ",\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, APT_E_FORMAT, "overlaps"},
    {"{\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]}," A4 "}", 4, APT_E_FORMAT, "tensor 'b' begins at byte 2"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[1,4]}}", 4, APT_E_FORMAT,
     "tensor 'a' begins at byte 1 of the data, which leaves a hole from byte 0"},
    {"{" A4 "}", 5, APT_E_FORMAT, "the tensors end at byte 4 of 5 bytes of data"},
    {"{}", 1, APT_E_FORMAT, "the tensors end at byte 0 of 1 bytes of data"},
    {"{\"a\\u001b[31m\":1}", 0, APT_E_FORMAT, "tensor 'a?[31m'"},
};

static void test_tensors_refuse(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t before = apt_memory_info(t->ctx).bytes;
    for (size_t i = 0; i < sizeof tensors_refused / sizeof *tensors_refused; i++) {
        const tensor_case *c = &tensors_refused[i];
        put_tensors(t->path, c->header, c->bytes);
        expect(t->ctx, open_close(t->ctx, t->path), c->result, c->message);
        if (strstr(apt_error(t->ctx), t->path) == NULL) fail_msg("no path: %s", apt_error(t->ctx));
        assert_int_equal(apt_memory_info(t->ctx).bytes, before);
    }
    for (size_t n = 0; n < 8; n++) {
        test_write_file(t->path, "\2\0\0\0\0\0\0\0", n);
        expect(t->ctx, open_close(t->ctx, t->path), APT_E_FORMAT, "too short for the header's length");
    }
    test_write_file(t->path, "\2\0\0\0\0\0\0\0{", 9);
    expect(t->ctx, open_close(t->ctx, t->path), APT_E_FORMAT, "header of 2 bytes in a file of 9");
    test_write_file(t->path, "\1\xe1\xf5\5\0\0\0\0{}", 10);
    expect(t->ctx, open_close(t->ctx, t->path), APT_E_FORMAT, "header of 100000001 bytes, at most 100000000 are allowed");
    test_write_file(t->path, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    expect(t->ctx, open_close(t->ctx, t->path), APT_E_FORMAT, "header of 18446744073709551615 bytes");
    test_write_file(t->path, "\2\0\0\0\0\0\0\x80{}", 10);
    expect(t->ctx, open_close(t->ctx, t->path), APT_E_FORMAT, "header of 9223372036854775810 bytes");
    expect(t->ctx, open_close(t->ctx, "/nonexistent/model"), APT_E_MISSING,
           "'/nonexistent/model': neither model.safetensors nor");
#ifdef APTI_POSIX                                /* stdio cannot tell folders from files */
    expect(t->ctx, open_close(t->ctx, t->dir), APT_E_MISSING, "neither model.safetensors nor");
#else
    expect(t->ctx, open_close(t->ctx, t->dir), APT_E_IO, t->dir);
#endif
}

static void test_tensors_convert(void **state)
{
    file_test *t = (file_test *)*state;
    const float expected[4] = {1.0f, -2.5f, 65504.0f, 0.0009765625f};
    uint8_t data[4 * (8 + 4 + 2 + 2) + 1];
    int64_t n = 0;
    data[n++] = 7;                               /* puts every tensor at an odd address */
    for (int i = 0; i < 4; i++, n += 8) memcpy(data + n, &(const double){(double)expected[i]}, 8);
    for (int i = 0; i < 4; i++, n += 4) memcpy(data + n, &expected[i], 4);
    for (int i = 0; i < 4; i++, n += 2) memcpy(data + n, &(const uint16_t){apti_f32_to_f16(expected[i])}, 2);
    for (int i = 0; i < 4; i++, n += 2) memcpy(data + n, &(const uint16_t){apti_f32_to_bf16(expected[i])}, 2);
    const char *header = "{\"u\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"d\":{\"dtype\":\"F64\","
                         "\"shape\":[4],\"data_offsets\":[1,33]},"
                         "\"f\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[33,49]},\"h\":{\"dtype\":\"F16\","
                         "\"shape\":[4],\"data_offsets\":[49,57]},"
                         "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[57,65]}}";
    put_tensors(t->path, header, n);
    size_t bytes = 0;
    char *file = test_read_file(t->path, &bytes);
    char *body = file + bytes - n;
    memcpy(body, data, (size_t)n);
    test_write_file(t->path, file, bytes);
    apti_tensors *set = NULL;
    float out[4];
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
    const char *names[4] = {"d", "f", "h", "b"};
    for (int k = 0; k < 4; k++) {
        assert_ok(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, names[k]), out));
        for (int i = 0; i < 4; i++)
            assert_true(out[i] == (k == 3 ? apti_bf16_to_f32(apti_f32_to_bf16(expected[i])) : expected[i]));
    }
    expect(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, "u"), out), APT_E_UNSUPPORTED,
           "tensor 'u' has dtype U8, expected F64, F32, F16 or BF16");
    apti_tensors_close(set);
    const uint64_t bad_doubles[4] = {0x7ff0000000000000u, 0xfff8000000000001u, 0x47efffffffffffffu /* just below 2^128 */,
                                     0xffefffffffffffffu};
    for (int i = 0; i < 4; i++) {
        memcpy(body + 1 + 8 * 2, &bad_doubles[i], 8);
        test_write_file(t->path, file, bytes);
        assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
        expect(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, "d"), out), APT_E_NONFINITE, "tensor 'd': value 2 of 4");
        apti_tensors_close(set);
    }
    memcpy(body + 33 + 4, "\0\0\xc0\x7f", 4);
    memcpy(body + 49 + 6, "\0\xfc", 2);
    memcpy(body + 57, "\x80\x7f", 2);
    test_write_file(t->path, file, bytes);
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
    expect(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, "f"), out), APT_E_NONFINITE, "tensor 'f': value 1 of 4");
    expect(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, "h"), out), APT_E_NONFINITE, "tensor 'h': value 3 of 4");
    expect(t->ctx, apti_tensor_to_f32(set, apti_tensors_find(set, "b"), out), APT_E_NONFINITE, "tensor 'b': value 0 of 4");
    if (strstr(apt_error(t->ctx), t->path) == NULL) fail_msg("no path: %s", apt_error(t->ctx));
    apti_tensors_close(set);
    free(file);
}

/* Writes items with apti_tensors_write. */
static apt_result write_items(apt_ctx *ctx, const char *path, const apti_tensor_item *items, int32_t count,
                              apti_tensor_fill fill, void *user)
{
    const apti_meta meta[1] = {{"format", "pt"}};
    apti_tensor_job job;
    memset(&job, 0, sizeof job);
    job.path = path;
    job.items = items;
    job.count = count;
    job.meta = meta;
    job.meta_count = 1;
    job.fill = fill;
    job.user = user;
    return apti_tensors_write(ctx, &job, NULL);
}

static apti_tensor_item make_item(const char *name, apt_dtype dtype, int32_t dims, int64_t a, int64_t b, const void *data)
{
    apti_tensor_item item;
    memset(&item, 0, sizeof item);
    item.name = name;
    item.dtype = dtype;
    item.dims = dims;
    item.shape[0] = a;
    item.shape[1] = b;
    item.data = data;
    return item;
}

static apt_result fill_bytes(void *user, int64_t index, void *out)
{
    apt_ctx *ctx = (apt_ctx *)user;
    if (index == 99) return apti_fail(ctx, APT_E_STATE, "fill refuses");
    memset(out, (int)(0x40 + index), 6);
    return APT_OK;
}

static void test_tensors_write(void **state)
{
    file_test *t = (file_test *)*state;
    const float f[6] = {1, 2, 3, 4, 5, 6};
    const double d[1] = {0.5};
    apti_tensor_item items[6];
    items[0] = make_item("z bytes", APT_U8, 1, 6, 0, NULL);
    items[1] = make_item("b", APT_F32, 2, 2, 3, f);
    items[2] = make_item("a", APT_F32, 1, 0, 0, NULL);
    items[3] = make_item("c\n\"", APT_F64, 0, 0, 0, d);
    items[4] = make_item("half", APT_BF16, 1, 3, 0, NULL);
    items[5] = make_item("aa", APT_F32, 1, 6, 0, f);
    assert_ok(t->ctx, write_items(t->ctx, t->path, items, 6, fill_bytes, t->ctx));
    size_t bytes = 0, again = 0;
    char *file = test_read_file(t->path, &bytes);
    const char *header = "{\"__metadata__\":{\"format\":\"pt\"},\"c\\u000a\\\"\":{\"dtype\":\"F64\",\"shape\":[],"
                         "\"data_offsets\":[0,8]},"
                         "\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[8,8]},\"aa\":{\"dtype\":\"F32\","
                         "\"shape\":[6],\"data_offsets\":[8,32]},"
                         "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[32,56]},\"half\":{\"dtype\":\"BF16\","
                         "\"shape\":[3],\"data_offsets\":[56,62]},"
                         "\"z bytes\":{\"dtype\":\"U8\",\"shape\":[6],\"data_offsets\":[62,68]}}";
    assert_memory_equal(file + 8, header, strlen(header));
    uint64_t length = 0;
    memcpy(&length, file, 8);
    assert_true(length % 8 == 0 && length >= strlen(header) && length < strlen(header) + 8 && bytes == 8 + length + 68);
    const apti_tensor_item turned[6] = {items[5], items[4], items[3], items[2], items[1], items[0]};
    assert_ok(t->ctx, write_items(t->ctx, t->path, items, 6, fill_bytes, t->ctx));
    char *second = test_read_file(t->path, &again);
    assert_true(again == bytes && memcmp(file, second, bytes) == 0);
    free(second);
    /* Another order of the same tensors: the same header. */
    assert_ok(t->ctx, write_items(t->ctx, t->path, turned, 6, fill_bytes, t->ctx));
    second = test_read_file(t->path, &again);
    assert_true(again == bytes && memcmp(file, second, 8 + length + 56) == 0);
    free(second);
    apti_tensors *set = NULL;
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
    for (int32_t i = 0; i < set->count; i++)
        assert_int_equal((uintptr_t)set->views[i].data % (uintptr_t)apti_dtype_bytes(set->views[i].dtype), 0);
    assert_memory_equal(apti_tensors_find(set, "b")->data, f, sizeof f);
    assert_memory_equal(apti_tensors_find(set, "c\n\"")->data, d, 8);
    apti_tensors_close(set);
    free(file);
}

static void test_tensors_write_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    const float f[6] = {1, 2, 3, 4, 5, 6};
    apti_tensor_item items[2];
    test_write_file(t->path, "old", 3);
    items[0] = make_item("same", APT_F32, 1, 6, 0, f);
    items[1] = make_item("same", APT_F64, 1, 0, 0, f);
    expect(t->ctx, write_items(t->ctx, t->path, items, 2, NULL, NULL), APT_E_ARGUMENT, "two tensors are named 'same'");
    items[1] = make_item("huge", APT_F64, 2, INT64_MAX / 2, 3, f);
    expect(t->ctx, write_items(t->ctx, t->path, items, 2, NULL, NULL), APT_E_SHAPE, "tensor 'huge': the size of shape");
    items[1] = make_item("negative", APT_F64, 2, -1, 3, f);
    expect(t->ctx, write_items(t->ctx, t->path, items, 2, NULL, NULL), APT_E_SHAPE, "tensor 'negative'");
    items[1] = make_item("\xff", APT_F64, 1, 0, 3, f);
    expect(t->ctx, write_items(t->ctx, t->path, items, 2, NULL, NULL), APT_E_FORMAT, "'?' is not valid UTF-8");
    apti_tensor_item many[100];
    char names[100][16];
    for (int i = 0; i < 100; i++) {
        snprintf(names[i], sizeof names[i], "t%d", i);
        many[i] = make_item(names[i], APT_U8, 1, 6, 0, NULL);
    }
    expect(t->ctx, write_items(t->ctx, t->path, many, 100, fill_bytes, t->ctx), APT_E_STATE, "fill refuses");
    size_t bytes = 0;
    char *old = test_read_file(t->path, &bytes);
    assert_string_equal(old, "old");
    free(old);
    assert_int_equal(test_count_files(t->dir), 1);
}

/* ------------------------------------------------------------------------------------------------------------ shards */

static void put_shards(file_test *t, const char *index)
{
    char path[700];
    test_write_file(test_join(path, sizeof path, t->dir, "model.safetensors.index.json"), index, strlen(index));
    put_tensors(test_join(path, sizeof path, t->dir, "m-1.safetensors"),
                "{" A4 ",\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[4,5]}}", 5);
    put_tensors(test_join(path, sizeof path, t->dir, "m-2.safetensors"),
                "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2);
}

#define MAP(text) "{\"metadata\":{\"total_size\":7},\"weight_map\":{" text "}}"

static void test_shards(void **state)
{
    file_test *t = (file_test *)*state;
    apti_tensors *set = NULL;
    put_shards(t, MAP("\"c\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\",\"a\":\"m-1.safetensors\""));
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->dir, &set));
    assert_int_equal(set->count, 3);
    assert_int_equal(set->file_count, 2);
    const apti_tensor_view *a = apti_tensors_find(set, "a"), *b = apti_tensors_find(set, "b"), *c = apti_tensors_find(set, "c");
    assert_true(a->bytes == 4 && b->bytes == 2 && c->bytes == 1 && c->data[0] == 4 && b->data[0] == 0);
    assert_non_null(strstr(set->files[a->file].path, "m-1.safetensors"));
    assert_non_null(strstr(set->files[b->file].path, "m-2.safetensors"));
    apti_tensors_close(set);
    char path[700];
    put_tensors(test_join(path, sizeof path, t->dir, "model.safetensors"), "{" A4 "}", 4);     /* a whole file comes first */
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->dir, &set));
    assert_int_equal(set->count, 1);
    apti_tensors_close(set);
}

static void test_shards_refuse(void **state)
{
    file_test *t = (file_test *)*state;
    const struct { const char *index; apt_result result; const char *message; } cases[] = {
        {"", APT_E_FORMAT, "byte 0"},
        {"[]", APT_E_FORMAT, "no \"weight_map\" object"},
        {"{\"weight_map\":[]}", APT_E_FORMAT, "no \"weight_map\" object"},
        {"{\"weight_map\":{}}", APT_E_FORMAT, "no \"weight_map\" object"},
        {MAP("\"a\":1"), APT_E_FORMAT, "tensor 'a': \"1\" is not the name"},
        {MAP("\"a\":[\"m-1.safetensors\"],\"b\":1"), APT_E_FORMAT, "tensor 'a': \"[\"m-1.safetensors\"]\" is not the name"},
        {MAP("\"a\":\"../m-1.safetensors\""), APT_E_FORMAT, "\"../m-1.safetensors\" is not the name"},
        {MAP("\"a\":\"/etc/m-1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"sub/m-1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"sub\\\\m-1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"c:m-1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"m..1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"m-1.safetensors\\u0000.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"\\u001b[2Jm-1.safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\".safetensors\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"pytorch_model.bin\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\":\"\""), APT_E_FORMAT, "is not the name"},
        {MAP("\"a\\u0000\":\"m-1.safetensors\""), APT_E_FORMAT, "holds a 0 character"},
        {MAP("\"a\":\"m-1.safetensors\",\"a\":\"m-2.safetensors\""), APT_E_FORMAT, "'a' stands twice"},
        {MAP("\"a\":\"m-3.safetensors\""), APT_E_IO, "m-3.safetensors"},
        {MAP("\"a\":\"m-1.safetensors\",\"c\":\"m-1.safetensors\",\"b\":\"m-1.safetensors\""), APT_E_MISSING,
         "tensor 'b' is not in 'm-1.safetensors'"},
        {MAP("\"a\":\"m-1.safetensors\",\"c\":\"m-2.safetensors\",\"b\":\"m-2.safetensors\""), APT_E_MISSING,
         "tensor 'c' is not in 'm-2.safetensors'"},
        {MAP("\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\""), APT_E_FORMAT, "tensor 'c' is in"},
        {MAP("\"a\":\"m-1.safetensors\",\"c\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\",\"d\":\"m-2.safetensors\""),
         APT_E_MISSING, "tensor 'd' is not in 'm-2.safetensors'"},
    };
    const int64_t before = apt_memory_info(t->ctx).bytes;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_shards(t, cases[i].index);
        expect(t->ctx, open_close(t->ctx, t->dir), cases[i].result, cases[i].message);
        assert_int_equal(apt_memory_info(t->ctx).bytes, before);
    }
    char path[700];
    put_shards(t, MAP("\"c\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\",\"a\":\"m-1.safetensors\""));
    put_tensors(test_join(path, sizeof path, t->dir, "m-2.safetensors"),
                "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                "\"c\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]}}", 2);
    expect(t->ctx, open_close(t->ctx, t->dir), APT_E_FORMAT, "tensor 'c' is also in");
}

static void test_shards_too_many(void **state)
{
    file_test *t = (file_test *)*state;
    char *index = (char *)test_memory_block(64 * (APTI_SHARDS + 1) + 64);
    int at = sprintf(index, "{\"weight_map\":{");
    for (int i = 0; i <= APTI_SHARDS; i++) at += sprintf(index + at, "%s\"t%d\":\"m-%d.safetensors\"", i > 0 ? "," : "", i, i);
    sprintf(index + at, "}}");
    put_shards(t, index);
    expect(t->ctx, open_close(t->ctx, t->dir), APT_E_RANGE, "10001 shards, at most 10000");
    free(index);
}

/* ------------------------------------------------------------------------------------------------------- config.json */

#define CONFIG_BERT                                                                     \
    "\"model_type\":\"bert\",\"vocab_size\":97,\"max_position_embeddings\":40,\"hidden_size\":32,\"num_hidden_layers\":3," \
    "\"num_attention_heads\":4,\"intermediate_size\":72"

static apt_result config_try(apt_ctx *ctx, const char *text, apt_task_kind task, int32_t labels, apti_model_file *file)
{
    apt_result result = apti_config_parse(ctx, "m/config.json", text, (int64_t)strlen(text), file);
    if (result != APT_OK) return result;
    result = apti_config_resolve(ctx, "m/config.json", file, task, labels);
    if (result != APT_OK) apti_model_file_free(ctx, file);
    return result;
}

static void test_config_defaults(void **state)
{
    file_test *t = (file_test *)*state;
    apti_model_file f;
    assert_ok(t->ctx, config_try(t->ctx, "{" CONFIG_BERT "}", APT_TASK_CLASSIFY, 0, &f));
    const apt_config *c = &f.config;
    assert_true(c->family == APT_BERT && c->task == APT_TASK_CLASSIFY && c->vocab == 97 && c->positions == 40 && c->types == 2);
    assert_true(c->hidden == 32 && c->head_dim == 8 && c->layers == 3 && c->hidden_dense == 32 && c->heads == 4 &&
                c->neurons == 72);
    assert_true(c->labels == 2 && c->pad_id == 0 && c->activation == APT_GELU_ERF && c->norm_eps == 1e-12f &&
                c->init_range == 0.02f && c->layer == NULL);
    const char *roberta = "{\"model_type\":\"roberta\",\"vocab_size\":50265,\"max_position_embeddings\":514,\"hidden_size\":768,"
                          "\"num_hidden_layers\":12,\"num_attention_heads\":12,\"intermediate_size\":3072,\"type_vocab_size\":1,"
                          "\"layer_norm_eps\":1e-05,\"hidden_act\":\"gelu_new\",\"torch_dtype\":\"float16\","
                          "\"pad_token_id\":null}";
    assert_ok(t->ctx, config_try(t->ctx, roberta, APT_TASK_MLM, 0, &f));
    assert_true(c->family == APT_ROBERTA && c->types == 1 && c->pad_id == 1 && c->norm_eps == 1e-5f &&
                c->activation == APT_GELU_TANH && c->head_dim == 64);
}

static void test_config_pruned(void **state)
{
    file_test *t = (file_test *)*state;
    apti_model_file f;
    assert_ok(t->ctx, config_try(t->ctx,
                                 "{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":5,\"hidden_size_dense\":64,"
                                 "\"later\":[],\"layers\":["
                                         "{\"heads\":4,\"kv_heads\":2,\"neurons\":2},{\"neurons\":9,\"heads\":0},{\"heads\":1,"
                                         "\"neurons\":0}]}}",
                                 APT_TASK_SPAN, 0, &f));
    const apt_layer_shape expected[3] = {{4, 2, 2}, {0, 0, 9}, {1, 1, 0}};
    assert_true(f.config.head_dim == 5 && f.config.hidden == 32 && f.config.hidden_dense == 64 && f.config.layer == f.layer);
    assert_memory_equal(f.layer, expected, sizeof expected);
    apti_model_file_free(t->ctx, &f);
}

static void test_config_tasks(void **state)
{
    file_test *t = (file_test *)*state;
    const struct {
        const char *keys;
        apt_task_kind wanted;
        int32_t wanted_labels;
        apt_task_kind task;
        int32_t labels;
    } cases[] = {
        {"\"architectures\":[\"BertForSequenceClassification\"]", APT_TASK_NONE, 0, APT_TASK_CLASSIFY, 2},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"num_labels\":5", APT_TASK_NONE, 0, APT_TASK_CLASSIFY, 5},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"num_labels\":5", APT_TASK_NONE, 3, APT_TASK_CLASSIFY, 3},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"id2label\":{\"0\":\"a\",\"1\":\"b\",\"2\":\"c\"}",
         APT_TASK_NONE, 0, APT_TASK_CLASSIFY, 3},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"id2label\":{\"0\":\"a\"}", APT_TASK_NONE, 0, APT_TASK_REGRESS,
         0},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"id2label\":{\"0\":\"a\"},"
         "\"problem_type\":\"single_label_classification\"", APT_TASK_NONE, 0, APT_TASK_CLASSIFY, 1},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"num_labels\":1,\"problem_type\":\"regression\"", APT_TASK_NONE,
         0, APT_TASK_REGRESS, 0},
        {"\"architectures\":[\"BertForQuestionAnswering\"]", APT_TASK_NONE, 0, APT_TASK_SPAN, 0},
        {"\"architectures\":[\"RobertaForMaskedLM\"]", APT_TASK_NONE, 0, APT_TASK_MLM, 0},
        {"\"architectures\":[\"BertModel\"]", APT_TASK_SPAN, 0, APT_TASK_SPAN, 0},
        {"\"architectures\":[\"BertModel\"],\"num_labels\":7", APT_TASK_CLASSIFY, 0, APT_TASK_CLASSIFY, 2},
        {"\"architectures\":null", APT_TASK_MLM, 0, APT_TASK_MLM, 0},
        {"\"architectures\":[]", APT_TASK_REGRESS, 0, APT_TASK_REGRESS, 0},
        {"\"architectures\":[\"BertForSequenceClassification\"],\"problem_type\":\"multi_label_classification\"", APT_TASK_SPAN,
         0, APT_TASK_SPAN, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024];
        apti_model_file f;
        snprintf(text, sizeof text, "{" CONFIG_BERT ",%s}", cases[i].keys);
        assert_ok(t->ctx, config_try(t->ctx, text, cases[i].wanted, cases[i].wanted_labels, &f));
        if (f.config.task != cases[i].task || f.config.labels != cases[i].labels)
            fail_msg("%s: task %d, labels %d", cases[i].keys, (int)f.config.task, (int)f.config.labels);
    }
}

#define CONFIG_LLAMA                                                                                                       \
    "\"model_type\":\"llama\",\"vocab_size\":32000,\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4," \
    "\"intermediate_size\":172,\"hidden_act\":\"silu\",\"max_position_embeddings\":256"
#define CONFIG_T5                                                                                                          \
    "\"model_type\":\"t5\",\"vocab_size\":100,\"d_model\":64,\"d_kv\":8,\"d_ff\":128,\"num_layers\":3,\"num_heads\":8,"    \
    "\"is_encoder_decoder\":true"

/* Both spellings of rotary positions and of the element type; what a key's absence means. */
static void test_config_llama(void **state)
{
    file_test *t = (file_test *)*state;
    apti_model_file f;
    const apt_config *c = &f.config;
    assert_ok(t->ctx, config_try(t->ctx, "{" CONFIG_LLAMA "}", APT_TASK_NONE, 0, &f));
    assert_true(c->family == APT_LLAMA && c->task == APT_TASK_LM && c->layers == 2 && c->heads == 4 && c->kv_heads == 4 &&
                c->head_dim == 16 && c->neurons == 172 && c->activation == APT_SILU && c->gated && c->untied && !c->qkv_bias);
    assert_true(c->rope.theta == 10000.0f && c->rope.factor == 0 && c->norm_eps == 1e-6f && c->end_id == 2);
    static const char *const scaled[2] = {
        "\"rope_theta\":500000.0,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192},\"torch_dtype\":\"bfloat16\"",
        "\"rope_parameters\":{\"rope_theta\":500000.0,\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192},\"dtype\":\"bfloat16\""};
    for (int i = 0; i < 2; i++) {
        char text[1024];
        snprintf(text, sizeof text, "{" CONFIG_LLAMA ",\"num_key_value_heads\":2,\"head_dim\":24,\"tie_word_embeddings\":true,"
                 "\"rms_norm_eps\":1e-05,\"eos_token_id\":[7,8],%s}", scaled[i]);
        assert_ok(t->ctx, config_try(t->ctx, text, APT_TASK_LM, 0, &f));
        assert_true(c->rope.theta == 500000.0f && c->rope.factor == 8.0f && c->rope.low_factor == 1.0f && c->rope.high_factor == 4.0f &&
                    c->rope.original_positions == 8192);
        assert_true(c->kv_heads == 2 && c->head_dim == 24 && !c->untied && c->norm_eps == 1e-5f && c->end_id == 7);
    }
    assert_ok(t->ctx, config_try(t->ctx, "{\"model_type\":\"qwen2\",\"vocab_size\":99,\"hidden_size\":64,\"num_hidden_layers\":2,"
                                 "\"num_attention_heads\":4,\"intermediate_size\":172,\"use_sliding_window\":false,\"sliding_window\":4096}",
                                 APT_TASK_NONE, 0, &f));
    assert_true(c->family == APT_LLAMA && c->qkv_bias);
}

static void test_config_t5(void **state)
{
    file_test *t = (file_test *)*state;
    apti_model_file f;
    const apt_config *c = &f.config;
    assert_ok(t->ctx, config_try(t->ctx, "{" CONFIG_T5 "}", APT_TASK_NONE, 0, &f));
    assert_true(c->family == APT_T5 && c->task == APT_TASK_LM && c->layers == 9 && c->decoder_layers == 3 && c->head_dim == 8 &&
                c->buckets == 32 && c->max_distance == 128 && c->bias_heads == 8);
    assert_true(c->activation == APT_RELU && !c->gated && !c->untied && c->scaled_head && !f.either && c->start_id == 0 && c->end_id == 1);
    assert_ok(t->ctx, config_try(t->ctx, "{" CONFIG_T5 ",\"feed_forward_proj\":\"gated-gelu\",\"tie_word_embeddings\":false,"
                                 "\"num_decoder_layers\":1,\"relative_attention_num_buckets\":8,\"relative_attention_max_distance\":20,"
                                 "\"decoder_start_token_id\":4}", APT_TASK_LM, 0, &f));
    assert_true(c->layers == 5 && c->decoder_layers == 1 && c->gated && c->activation == APT_GELU_TANH && c->untied && !c->scaled_head);
    assert_true(c->buckets == 8 && c->max_distance == 20 && c->start_id == 4);
    assert_ok(t->ctx, config_try(t->ctx, "{" CONFIG_T5 ",\"tie_word_embeddings\":true,\"scale_decoder_outputs\":false}", APT_TASK_LM, 0, &f));
    assert_true(!c->untied && !c->scaled_head && f.either);           /* newer spelling: the files say which */
}

/* What would change the numbers and is not computed here is refused by its key. */
static void test_config_decoders_refused(void **state)
{
    file_test *t = (file_test *)*state;
    const struct { const char *text; apt_result result; const char *message; } cases[] = {
        {"{\"model_type\":\"llama\",\"hidden_act\":\"gelu\"}", APT_E_UNSUPPORTED, "\"hidden_act\" is gelu, expected silu"},
        {"{" CONFIG_LLAMA ",\"attention_bias\":true}", APT_E_UNSUPPORTED, "\"attention_bias\" is true, expected false"},
        {"{" CONFIG_LLAMA ",\"mlp_bias\":true}", APT_E_UNSUPPORTED, "\"mlp_bias\" is true, expected false"},
        {"{" CONFIG_LLAMA ",\"sliding_window\":4096}", APT_E_UNSUPPORTED, "\"sliding_window\" is 4096, expected null"},
        {"{" CONFIG_LLAMA ",\"num_key_value_heads\":3}", APT_E_SHAPE, "\"num_key_value_heads\" is 3, expected a divisor"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.0}}", APT_E_UNSUPPORTED,
         "\"rope_scaling.type\" is linear, expected default|llama3"},
        {"{" CONFIG_LLAMA ",\"rope_parameters\":{\"rope_type\":\"yarn\"}}", APT_E_UNSUPPORTED, "\"rope_parameters.rope_type\" is yarn"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"low_freq_factor\":4,\"high_freq_factor\":1}}", APT_E_RANGE,
         "\"rope_scaling.high_freq_factor\" is 1, expected more than low_freq_factor"},
        {"{" CONFIG_LLAMA ",\"rope_theta\":-1}", APT_E_RANGE, "\"rope_theta\" is -1"},
        {"{" CONFIG_LLAMA ",\"quantization_config\":{\"bits\":4}}", APT_E_UNSUPPORTED, "\"quantization_config\""},
        {"{" CONFIG_LLAMA ",\"eos_token_id\":[]}", APT_E_FORMAT, "\"eos_token_id\""},
        {"{" CONFIG_LLAMA ",\"is_encoder_decoder\":true}", APT_E_UNSUPPORTED, "\"is_encoder_decoder\" is true"},
        {"{" CONFIG_LLAMA ",\"dtype\":\"int8\"}", APT_E_UNSUPPORTED, "\"dtype\" is int8"},
        {"{\"model_type\":\"mistral\"}", APT_E_UNSUPPORTED, "\"model_type\" is mistral, expected bert|roberta|t5|llama|qwen2"},
        {"{\"model_type\":\"umt5\"}", APT_E_UNSUPPORTED, "\"model_type\" is umt5"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2.0}}", APT_E_UNSUPPORTED,
         "\"rope_scaling.rope_type\" is dynamic, expected default|llama3"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2.0}}", APT_E_UNSUPPORTED, "\"rope_scaling.type\" is yarn"},
        {"{" CONFIG_LLAMA ",\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":2.0}}", APT_E_UNSUPPORTED,
         "\"rope_parameters.rope_type\" is linear"},
        {"{" CONFIG_LLAMA ",\"rope_parameters\":{\"rope_type\":\"longrope\"}}", APT_E_UNSUPPORTED, "\"rope_parameters.rope_type\" is longrope"},
        {"{" CONFIG_LLAMA ",\"rope_parameters\":{\"rope_type\":3}}", APT_E_FORMAT, "\"rope_parameters.rope_type\" is 3"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":\"linear\"}", APT_E_FORMAT, "\"rope_scaling\" is linear, expected an object"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\"},\"rope_parameters\":{\"rope_type\":\"default\"}}", APT_E_FORMAT,
         "expected null beside rope_parameters"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":0}}", APT_E_RANGE, "\"rope_scaling.factor\" is 0"},
        {"{" CONFIG_LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"original_max_position_embeddings\":0}}", APT_E_RANGE,
         "\"rope_scaling.original_max_position_embeddings\" is 0"},
        {"{" CONFIG_LLAMA ",\"partial_rotary_factor\":0.5}", APT_E_UNSUPPORTED, "\"partial_rotary_factor\" is 0.5, expected 1"},
        {"{" CONFIG_LLAMA ",\"rope_parameters\":{\"rope_type\":\"llama3\",\"partial_rotary_factor\":0.25}}", APT_E_UNSUPPORTED,
         "\"rope_parameters.partial_rotary_factor\" is 0.25"},
        {"{" CONFIG_LLAMA ",\"layer_types\":[\"full_attention\",\"sliding_attention\"]}", APT_E_UNSUPPORTED,
         "\"layer_types\" is sliding_attention, expected full_attention in every layer"},
        {"{" CONFIG_LLAMA ",\"layer_types\":\"full_attention\"}", APT_E_FORMAT, "\"layer_types\" is full_attention, expected a list"},
        {"{" CONFIG_LLAMA ",\"head_dim\":15}", APT_E_RANGE, "\"head_dim\" is 15, expected an even number"},
        {"{" CONFIG_LLAMA ",\"apt\":{\"version\":1,\"head_dim\":15}}", APT_E_RANGE, "\"apt.head_dim\" is 15, expected an even number"},
        {"{" CONFIG_LLAMA ",\"head_dim\":0}", APT_E_RANGE, "\"head_dim\" is 0"},
        {"{" CONFIG_LLAMA ",\"head_dim\":258}", APT_E_RANGE, "\"head_dim\" is 258"},
        {"{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":60,\"num_hidden_layers\":1,\"num_attention_heads\":4,"
         "\"intermediate_size\":8}", APT_E_RANGE, "\"hidden_size\" / \"num_attention_heads\" is 15, expected an even number"},
        {"{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":62,\"num_hidden_layers\":1,\"num_attention_heads\":4,"
         "\"intermediate_size\":8}", APT_E_SHAPE, "\"hidden_size\" is 62, expected a multiple of \"num_attention_heads\", which is 4"},
        {"{" CONFIG_LLAMA ",\"num_key_value_heads\":8}", APT_E_SHAPE, "\"num_key_value_heads\" is 8, expected a divisor"},
        {"{" CONFIG_LLAMA ",\"num_key_value_heads\":0}", APT_E_RANGE, "\"num_key_value_heads\" is 0"},
        {"{" CONFIG_LLAMA ",\"rms_norm_eps\":0}", APT_E_RANGE, "\"rms_norm_eps\" is 0"},
        {"{" CONFIG_LLAMA ",\"tie_word_embeddings\":\"yes\"}", APT_E_FORMAT, "\"tie_word_embeddings\" is yes"},
        {"{" CONFIG_LLAMA ",\"eos_token_id\":[-1]}", APT_E_FORMAT, "\"eos_token_id\""},
        {"{" CONFIG_T5 ",\"quantization_config\":{\"bits\":8}}", APT_E_UNSUPPORTED, "\"quantization_config\" is {\"bits\":8}"},
        {"{" CONFIG_T5 ",\"is_gated_act\":true}", APT_E_UNSUPPORTED, "\"is_gated_act\" is true, expected false"},
        {"{" CONFIG_T5 ",\"feed_forward_proj\":\"gated-gelu\",\"is_gated_act\":false}", APT_E_UNSUPPORTED,
         "\"is_gated_act\" is false, expected true"},
        {"{" CONFIG_T5 ",\"dense_act_fn\":\"gelu_new\"}", APT_E_UNSUPPORTED, "\"dense_act_fn\" is gelu_new, expected relu"},
        {"{" CONFIG_T5 ",\"feed_forward_proj\":\"gated-silu\",\"dense_act_fn\":\"gelu\"}", APT_E_UNSUPPORTED,
         "\"dense_act_fn\" is gelu, expected silu"},
        {"{" CONFIG_T5 ",\"feed_forward_proj\":\"gated-swish\"}", APT_E_UNSUPPORTED, "\"feed_forward_proj\" is gated-swish"},
        {"{" CONFIG_T5 ",\"pad_token_id\":100}", APT_E_RANGE, "\"pad_token_id\" is 100, expected an integer in 0..99"},
        {"{" CONFIG_T5 ",\"decoder_start_token_id\":100}", APT_E_RANGE, "\"decoder_start_token_id\" is 100"},
        {"{\"model_type\":\"t5\",\"is_encoder_decoder\":false}", APT_E_UNSUPPORTED, "\"is_encoder_decoder\" is false, expected true"},
        {"{\"model_type\":\"qwen2\",\"use_sliding_window\":true}", APT_E_UNSUPPORTED, "\"use_sliding_window\" is true, expected false"},
        {"{" CONFIG_T5 ",\"feed_forward_proj\":\"gelu\"}", APT_E_UNSUPPORTED, "\"feed_forward_proj\" is gelu"},
        {"{" CONFIG_T5 ",\"num_decoder_layers\":0}", APT_E_RANGE, "\"num_decoder_layers\" is 0"},
        {"{" CONFIG_T5 ",\"relative_attention_max_distance\":16}", APT_E_RANGE, "\"relative_attention_max_distance\" is 16"},
        {"{" CONFIG_T5 ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64,\"bias_heads\":8,\"layers\":[]}}", APT_E_SHAPE,
         "\"apt.layers\" has 0 entries, \"num_layers\" + 2 * \"num_decoder_layers\" is 9"},
        {"{\"model_type\":\"t5\",\"vocab_size\":9,\"d_model\":8,\"d_kv\":4,\"d_ff\":8,\"num_layers\":1,\"num_heads\":2,\"apt\":{\"version\":1,"
         "\"head_dim\":4,\"hidden_size_dense\":8,\"bias_heads\":2,\"layers\":[{\"heads\":1,\"neurons\":3,\"bias_head\":[2]},"
         "{\"heads\":1,\"neurons\":0,\"bias_head\":[0]},{\"heads\":1,\"neurons\":2,\"bias_head\":[0]}]}}", APT_E_RANGE,
         "\"apt.layers[0].bias_head\""},
        {"{\"model_type\":\"t5\",\"vocab_size\":9,\"d_model\":8,\"d_kv\":4,\"d_ff\":8,\"num_layers\":1,\"num_heads\":2,\"apt\":{\"version\":1,"
         "\"head_dim\":4,\"hidden_size_dense\":8,\"bias_heads\":2,\"layers\":[{\"heads\":1,\"neurons\":3,\"bias_head\":[0,1]},"
         "{\"heads\":1,\"neurons\":0},{\"heads\":1,\"neurons\":2}]}}", APT_E_FORMAT, "\"apt.layers[0].bias_head\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        apti_model_file f;
        expect(t->ctx, config_try(t->ctx, cases[i].text, APT_TASK_LM, 0, &f), cases[i].result, cases[i].message);
    }
    apti_model_file f;
    expect(t->ctx, config_try(t->ctx, "{" CONFIG_T5 "}", APT_TASK_CLASSIFY, 0, &f), APT_E_UNSUPPORTED, "APT_TASK_LM only");
    expect(t->ctx, config_try(t->ctx, "{" CONFIG_BERT "}", APT_TASK_LM, 0, &f), APT_E_UNSUPPORTED, "APT_TASK_LM only");
}

static void test_config_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    const struct { const char *text; apt_result result; const char *message; } cases[] = {
        {"", APT_E_FORMAT, "byte 0"},
        {"[]", APT_E_FORMAT, "expected an object"},
        {"{}", APT_E_MISSING, "\"model_type\" is missing, expected bert|roberta|t5|llama|qwen2"},
        {"{\"model_type\":\"gpt2\"}", APT_E_UNSUPPORTED, "\"model_type\" is gpt2, expected bert|roberta"},
        {"{\"model_type\":7}", APT_E_FORMAT, "\"model_type\" is 7"},
        {"{\"model_type\":\"bert\"}", APT_E_MISSING, "\"vocab_size\" is missing, expected an integer in 1..16777216"},
        {"{" CONFIG_BERT ",\"hidden_act\":\"silu\"}", APT_E_UNSUPPORTED,
         "\"hidden_act\" is silu, expected gelu|gelu_new|gelu_pytorch_tanh|relu"},
        {"{" CONFIG_BERT ",\"hidden_act\":3}", APT_E_FORMAT, "\"hidden_act\" is 3"},
        {"{" CONFIG_BERT ",\"position_embedding_type\":\"relative_key\"}", APT_E_UNSUPPORTED,
         "\"position_embedding_type\" is relative_key, expected absolute"},
        {"{" CONFIG_BERT ",\"is_decoder\":true}", APT_E_UNSUPPORTED, "\"is_decoder\" is true, expected false"},
        {"{" CONFIG_BERT ",\"is_decoder\":1}", APT_E_FORMAT, "\"is_decoder\" is 1, expected true or false"},
        {"{" CONFIG_BERT ",\"is_encoder_decoder\":true}", APT_E_UNSUPPORTED, "\"is_encoder_decoder\" is true"},
        {"{" CONFIG_BERT ",\"add_cross_attention\":true}", APT_E_UNSUPPORTED, "\"add_cross_attention\" is true, expected false"},
        {"{" CONFIG_BERT ",\"quantization_config\":{\"bits\":4}}", APT_E_UNSUPPORTED,
         "\"quantization_config\" is {\"bits\":4}, expected plain weights"},
        {"{" CONFIG_BERT ",\"pruned_heads\":{\"0\":[1]}}", APT_E_UNSUPPORTED, "\"pruned_heads\""},
        {"{" CONFIG_BERT ",\"torch_dtype\":\"int8\"}", APT_E_UNSUPPORTED, "\"torch_dtype\" is int8"},
        {"{" CONFIG_BERT ",\"dtype\":\"float8_e4m3fn\"}", APT_E_UNSUPPORTED, "\"dtype\" is float8_e4m3fn"},
        {"{" CONFIG_BERT ",\"type_vocab_size\":0}", APT_E_RANGE, "\"type_vocab_size\" is 0, expected an integer in 1.."},
        {"{" CONFIG_BERT ",\"type_vocab_size\":2.0}", APT_E_FORMAT, "\"type_vocab_size\" is 2.0"},
        {"{" CONFIG_BERT ",\"layer_norm_eps\":0}", APT_E_RANGE, "\"layer_norm_eps\" is 0"},
        {"{" CONFIG_BERT ",\"layer_norm_eps\":\"1e-5\"}", APT_E_FORMAT, "\"layer_norm_eps\" is 1e-5"},
        {"{" CONFIG_BERT ",\"layer_norm_eps\":1e999}", APT_E_FORMAT, "\"layer_norm_eps\" is 1e999"},
        {"{" CONFIG_BERT ",\"initializer_range\":-1}", APT_E_RANGE, "\"initializer_range\" is -1"},
        {"{" CONFIG_BERT ",\"pad_token_id\":-1}", APT_E_RANGE, "\"pad_token_id\" is -1"},
        {"{" CONFIG_BERT ",\"num_labels\":0}", APT_E_RANGE, "\"num_labels\" is 0, expected an integer in 1..65536"},
        {"{" CONFIG_BERT ",\"num_labels\":70000}", APT_E_RANGE, "\"num_labels\" is 70000"},
        {"{" CONFIG_BERT ",\"id2label\":{}}", APT_E_FORMAT, "\"id2label\""},
        {"{" CONFIG_BERT ",\"id2label\":[\"a\"]}", APT_E_FORMAT, "\"id2label\""},
        {"{" CONFIG_BERT ",\"id2label\":{\"0\":\"a\"},\"num_labels\":2}", APT_E_FORMAT, "\"id2label\""},
        {"{" CONFIG_BERT ",\"problem_type\":\"ranking\"}", APT_E_UNSUPPORTED, "\"problem_type\" is ranking"},
        {"{" CONFIG_BERT ",\"architectures\":\"BertModel\"}", APT_E_FORMAT, "\"architectures\""},
        {"{" CONFIG_BERT ",\"architectures\":[1]}", APT_E_FORMAT, "\"architectures\""},
        {"{" CONFIG_BERT ",\"architectures\":[\"BertModel\"]}", APT_E_ARGUMENT, "\"architectures\" names no task"},
        {"{" CONFIG_BERT ",\"architectures\":[\"BertForTokenClassification\"]}", APT_E_ARGUMENT, "names no task"},
        {"{" CONFIG_BERT ",\"architectures\":[\"BertForMaskedLM\"],\"tie_word_embeddings\":false}", APT_E_UNSUPPORTED,
         "\"tie_word_embeddings\" is false, expected true"},
        {"{" CONFIG_BERT ",\"architectures\":[\"BertForSequenceClassification\"],"
         "\"problem_type\":\"multi_label_classification\"}", APT_E_UNSUPPORTED, "multi_label"},
        {"{" CONFIG_BERT ",\"architectures\":[\"BertForSequenceClassification\"],\"problem_type\":\"regression\","
         "\"num_labels\":3}", APT_E_UNSUPPORTED, "regression with 3 labels"},
        {"{" CONFIG_BERT ",\"vocab_size\":5}", APT_E_FORMAT, "'vocab_size' stands twice"},
        {"{\"model_type\":\"bert\",\"vocab_size\":97,\"max_position_embeddings\":40,\"hidden_size\":31,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":4,"
         "\"intermediate_size\":72}", APT_E_SHAPE,
         "\"hidden_size\" is 31, expected a multiple of \"num_attention_heads\", which is 4"},
        {"{\"model_type\":\"bert\",\"vocab_size\":97,\"max_position_embeddings\":40,\"hidden_size\":1024,"
         "\"num_hidden_layers\":3,\"num_attention_heads\":2,"
         "\"intermediate_size\":72}", APT_E_RANGE, "heads of 512 dimensions"},
        {"{\"model_type\":\"bert\",\"vocab_size\":99999999999,\"max_position_embeddings\":40,\"hidden_size\":32,"
         "\"num_hidden_layers\":3,"
         "\"num_attention_heads\":4,\"intermediate_size\":72}", APT_E_RANGE,
         "\"vocab_size\" is 99999999999, expected an integer in 1..16777216"},
        {"{\"model_type\":\"bert\",\"vocab_size\":97,\"max_position_embeddings\":40,\"hidden_size\":32,"
         "\"num_hidden_layers\":1000000,"
         "\"num_attention_heads\":4,\"intermediate_size\":72}", APT_E_RANGE, "\"num_hidden_layers\" is 1000000"},
        {"{\"model_type\":\"roberta\",\"vocab_size\":97,\"max_position_embeddings\":40,\"hidden_size\":32,"
         "\"num_hidden_layers\":3,"
         "\"num_attention_heads\":4,\"intermediate_size\":72,\"pad_token_id\":39}", APT_E_RANGE, "\"pad_token_id\" is 39"},
        {"{" CONFIG_BERT ",\"apt\":7}", APT_E_FORMAT, "\"apt\" is 7"},
        {"{" CONFIG_BERT ",\"apt\":{}}", APT_E_MISSING, "\"apt.version\" is missing"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":2}}", APT_E_UNSUPPORTED, "\"apt.version\" is 2, expected 1"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1}}", APT_E_MISSING, "\"apt.head_dim\" is missing"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":300}}", APT_E_RANGE, "\"apt.head_dim\" is 300"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":31}}", APT_E_RANGE,
         "\"apt.hidden_size_dense\" is 31, expected an integer in 32..65536"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64}}", APT_E_FORMAT,
         "\"apt.layers\" is missing"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64,\"layers\":[]}}", APT_E_SHAPE,
         "\"apt.layers\" has 0 entries, \"num_hidden_layers\" is 3"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64,\"layers\":[{\"heads\":1,"
         "\"neurons\":2},3,4]}}", APT_E_MISSING, "\"apt.layers[1].heads\" is missing"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64,\"layers\":[{\"heads\":1,"
         "\"neurons\":2},{\"heads\":-1,\"neurons\":2},4]}}", APT_E_RANGE, "\"apt.layers[1].heads\" is -1"},
        {"{" CONFIG_BERT ",\"apt\":{\"version\":1,\"head_dim\":8,\"hidden_size_dense\":64,\"layers\":[{\"heads\":1,"
         "\"neurons\":2},{\"heads\":1,\"neurons\":2},{\"heads\":1}]}}", APT_E_MISSING, "\"apt.layers[2].neurons\" is missing"},
    };
    const int64_t before = apt_memory_info(t->ctx).bytes;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        apti_model_file f;
        expect(t->ctx, config_try(t->ctx, cases[i].text, APT_TASK_NONE, 0, &f), cases[i].result, cases[i].message);
        if (strstr(apt_error(t->ctx), "m/config.json") == NULL) fail_msg("no path: %s", apt_error(t->ctx));
        assert_int_equal(apt_memory_info(t->ctx).bytes, before);
    }
}

/* ------------------------------------------------------------------------------------------------- models on the disk */

static apt_config small_config(apt_family family, apt_task_kind task)
{
    apt_config c = APT_ZERO;
    c.family = family;
    c.task = task;
    c.vocab = 23;
    c.positions = 12;
    c.types = family == APT_BERT ? 2 : 1;
    c.hidden = 12;
    c.head_dim = 4;
    c.layers = 2;
    c.heads = 3;
    c.neurons = 10;
    c.labels = task == APT_TASK_CLASSIFY ? 3 : 0;
    c.pad_id = family == APT_BERT ? 0 : 1;
    return c;
}

static const apt_layer_shape pruned_shapes[2] = {{2, 2, 7}, {0, 0, 3}};

static apt_config pruned_config(void)
{
    apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    c.hidden = 9;
    c.hidden_dense = 12;
    c.layer = pruned_shapes;
    return c;
}

static apt_model *make_model(apt_ctx *ctx, const apt_config *config)
{
    apt_model *model = NULL;
    assert_ok(ctx, apt_model_create(ctx, config, 7, &model));
    return model;
}

/* Saves a fresh model of `config` into dir. */
static void save_model(apt_ctx *ctx, const apt_config *config, const char *dir)
{
    apt_model *model = make_model(ctx, config);
    assert_ok(ctx, apt_model_save(model, dir));
    apt_model_destroy(model);
}

static apt_result load_drop(apt_ctx *ctx, const char *dir, const apt_load_desc *desc)
{
    apt_model *model = NULL;
    const apt_result result = apt_model_load(ctx, dir, desc, &model);
    if (result == APT_OK) apt_model_destroy(model);
    else assert_null(model);
    return result;
}

static void compare_configs(const apt_model *x, const apt_model *y)
{
    apt_config a = APT_ZERO, b = APT_ZERO;
    apt_model_config(x, &a);
    apt_model_config(y, &b);
    assert_true(a.family == b.family && a.task == b.task && a.vocab == b.vocab && a.positions == b.positions &&
                a.types == b.types);
    assert_true(a.hidden == b.hidden && a.head_dim == b.head_dim && a.layers == b.layers && a.hidden_dense == b.hidden_dense);
    assert_true(a.labels == b.labels && a.pad_id == b.pad_id && a.activation == b.activation);
    assert_true(apti_bits(a.norm_eps) == apti_bits(b.norm_eps) && apti_bits(a.init_range) == apti_bits(b.init_range));
    assert_memory_equal(a.layer, b.layer, (size_t)a.layers * sizeof *a.layer);
}

/* Every parameter of x is in y with the same bits, and the other way round. */
static void compare_models(const apt_model *x, const apt_model *y)
{
    assert_int_equal(apt_model_parameters(x), apt_model_parameters(y));
    for (int32_t i = 0; i < apt_model_parameters(x); i++) {
        apt_parameter p;
        assert_int_equal(apt_model_parameter(x, i, &p), APT_OK);
        const int64_t n = p.rows * p.cols;
        float *a = (float *)test_memory_block((size_t)n * 4), *b = (float *)test_memory_block((size_t)n * 4);
        assert_int_equal(apt_model_get(x, p.name, a, n), APT_OK);
        assert_int_equal(apt_model_get(y, p.name, b, n), APT_OK);
        if (memcmp(a, b, (size_t)n * 4) != 0) fail_msg("%s differs", p.name);
        free(a);
        free(b);
    }
}

static void test_save_and_load(void **state)
{
    file_test *t = (file_test *)*state;
    for (int f = APT_BERT; f <= APT_ROBERTA; f++)
        for (int k = APT_TASK_CLASSIFY; k <= APT_TASK_MLM; k++)
            for (int a = APT_GELU_ERF; a <= APT_RELU; a++) {
                apt_config c = small_config((apt_family)f, (apt_task_kind)k);
                c.activation = (apt_activation)a;
                c.norm_eps = 3.3e-7f;
                apt_model *model = make_model(t->ctx, &c), *back = NULL;
                assert_ok(t->ctx, apt_model_save(model, t->dir));
                assert_int_equal(test_count_files(t->dir), 2);
                t->log.infos = 0;
                assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
                assert_int_equal(t->log.infos, 0);
                compare_configs(model, back);
                compare_models(model, back);
                apt_model_destroy(back);
                apt_model_destroy(model);
            }
}

/* The decoder families, dense and with pruned layers; T5 heads remember which relative position bias is theirs. */
static void test_save_decoders(void **state)
{
    file_test *t = (file_test *)*state;
    for (int32_t i = 0; i < 2 * TEST_DECODERS; i++) {
        apt_config c = test_decoder(i % TEST_DECODERS), found = APT_ZERO, kept = APT_ZERO;
        apt_model *model = make_model(t->ctx, &c), *back = NULL;
        test_randomise(model, 5);
        apt_units u;
        apt_model_units(model, &u);
        float *mask = (float *)test_memory_block((size_t)u.total * sizeof(float));
        for (int32_t k = 0; k < u.total; k++) mask[k] = i >= TEST_DECODERS && (k % 3 == 1) ? 0.0f : 1.0f;
        assert_ok(t->ctx, apt_model_set_masks(model, mask, u.total));
        assert_ok(t->ctx, apt_model_compact(model));
        assert_ok(t->ctx, apt_model_save(model, t->dir));
        assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
        compare_configs(model, back);
        compare_models(model, back);
        apt_model_config(model, &kept);
        apt_model_config(back, &found);
        assert_true(kept.decoder_layers == found.decoder_layers && kept.gated == found.gated && kept.untied == found.untied &&
                    kept.scaled_head == found.scaled_head && kept.qkv_bias == found.qkv_bias && kept.start_id == found.start_id &&
                    kept.end_id == found.end_id && kept.buckets == found.buckets && kept.max_distance == found.max_distance);
        assert_memory_equal(&kept.rope, &found.rope, sizeof kept.rope);
        for (int32_t l = 0; l < kept.layers && kept.bias_head != NULL; l++)
            assert_memory_equal(kept.bias_head + l * kept.bias_heads, found.bias_head + l * found.bias_heads,
                                (size_t)kept.layer[l].heads * sizeof(int32_t));
        if (i >= TEST_DECODERS && kept.bias_head != NULL) assert_true(kept.bias_head[1] == 2 || kept.bias_head[0] != 0);
        test_batch b;
        test_batch_at(&b, &c, 1, 0, 4);
        int64_t n = 0, n2 = 0;
        float *x = test_logits(model, &b.b, &n, NULL, 0), *y = test_logits(back, &b.b, &n2, NULL, 0);
        assert_true(n == n2);
        assert_memory_equal(x, y, (size_t)n * sizeof(float));
        free(x);
        free(y);
        free(mask);
        apt_model_destroy(back);
        apt_model_destroy(model);
    }
}

/* Names that other writers use: the body without its prefix, T5's embeddings under a stack, a head that newer files keep. */
static void test_load_spellings_of_decoders(void **state)
{
    file_test *t = (file_test *)*state;
    static const char *const from[3] = {"shared.weight", "shared.weight", "model.norm.weight"};
    static const char *const to[3] = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "norm.weight"};
    char path[700];
    test_join(path, sizeof path, t->dir, "model.safetensors");
    for (int32_t i = 0; i < 3; i++) {
        apt_config c = test_decoder(i < 2 ? i : 2);
        apt_model *model = make_model(t->ctx, &c), *back = NULL;
        apti_tensor_item item[256];
        apti_tensor_job job = APT_ZERO;
        memset(item, 0, sizeof item);
        assert_ok(t->ctx, apt_model_save(model, t->dir));
        for (int32_t k = 0; k < apt_model_parameters(model); k++) {
            apt_parameter p;
            assert_int_equal(apt_model_parameter(model, k, &p), APT_OK);
            float *v = test_parameter(model, p.name, NULL);
            item[k].name = strcmp(p.name, from[i]) == 0 ? to[i] : p.name;
            item[k].dtype = APT_F32;
            item[k].dims = p.dims;
            item[k].shape[0] = p.dims == 1 ? p.cols : p.rows;
            item[k].shape[1] = p.dims == 1 ? 0 : p.cols;
            item[k].data = v;
        }
        job.path = path;
        job.items = item;
        job.count = apt_model_parameters(model);
        assert_ok(t->ctx, apti_tensors_write(t->ctx, &job, NULL));
        assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
        compare_models(model, back);
        for (int32_t k = 0; k < job.count; k++) free((void *)(uintptr_t)item[k].data);
        apt_model_destroy(back);
        apt_model_destroy(model);
    }
}

/* Replaces the one `from` in config.json of the folder. */
static void edit_config(file_test *t, const char *from, const char *to)
{
    char path[700];
    size_t bytes = 0;
    char *text = test_read_file(test_join(path, sizeof path, t->dir, "config.json"), &bytes);
    assert_non_null(text);
    char *at = strstr(text, from);
    assert_non_null(at);
    const size_t before = (size_t)(at - text), behind = bytes - before - strlen(from);
    char *other = (char *)test_memory_block(bytes + strlen(to));
    memcpy(other, text, before);
    memcpy(other + before, to, strlen(to));
    memcpy(other + before + strlen(to), at + strlen(from), behind);
    test_write_file(path, other, before + strlen(to) + behind);
    free(other);
    free(text);
}

/* tie_word_embeddings against what the files hold: a head that is wanted and missing, one that is another matrix than the word
   embeddings that it is said to be. The same matrix once more is what some writers leave, and fine. */
static void test_load_ties(void **state)
{
    file_test *t = (file_test *)*state;
    for (int32_t i = 0; i < 4; i++) {                                 /* T5 and LLaMA, untied and tied */
        apt_config c = test_decoder(i % 2 ? 2 : 1);
        c.untied = i < 2;
        apt_model *model = make_model(t->ctx, &c), *back = NULL;
        const char *word = i % 2 ? "model.embed_tokens.weight" : "shared.weight";
        int64_t n = 0;
        assert_ok(t->ctx, apt_model_save(model, t->dir));
        if (i >= 2) {
            edit_config(t, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
            expect(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back), APT_E_MISSING, "no tensor 'lm_head.weight'");
            assert_non_null(strstr(apt_error(t->ctx), "\"tie_word_embeddings\" is false"));
        } else {
            if (i == 0) edit_config(t, "\"scale_decoder_outputs\": false", "\"scale_decoder_outputs\": true");
            edit_config(t, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
            expect(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back), APT_E_FORMAT, "tensor 'lm_head.weight' is not '");
            assert_non_null(strstr(apt_error(t->ctx), word));
            float *v = test_parameter(model, word, &n);
            assert_ok(t->ctx, apt_model_set(model, "lm_head.weight", v, n));
            assert_ok(t->ctx, apt_model_save(model, t->dir));
            if (i == 0) edit_config(t, "\"scale_decoder_outputs\": false", "\"scale_decoder_outputs\": true");
            edit_config(t, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
            assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
            assert_true(back->config.untied == 0 && apt_model_get(back, "lm_head.weight", v, n) == APT_E_SHAPE);
            free(v);
        }
        apt_model_destroy(back);
        apt_model_destroy(model);
    }
}

/* A config.json of fewer layers than the weights have, for each stack of each family: half a model is refused. */
static void test_load_layers_too_many(void **state)
{
    file_test *t = (file_test *)*state;
    static const struct { int32_t which; const char *key, *tensor; } cases[] = {
        {-1, "\"num_hidden_layers\"", "encoder.layer.1"}, {0, "\"num_layers\"", "encoder.block.1"},
        {1, "\"num_decoder_layers\"", "decoder.block.1"}, {2, "\"num_hidden_layers\"", "layers.1"}};
    test_join(t->path, sizeof t->path, t->dir, "config.json");
    for (int i = 0; i < 4; i++) {
        const apt_config c = cases[i].which < 0 ? small_config(APT_BERT, APT_TASK_CLASSIFY) : test_decoder(cases[i].which);
        apt_model *model = make_model(t->ctx, &c), *back = NULL;
        assert_ok(t->ctx, apt_model_save(model, t->dir));
        size_t bytes = 0;
        char *text = test_read_file(t->path, &bytes);
        assert_non_null(text);
        char *at = strstr(text, cases[i].key);
        assert_non_null(at);
        at += strcspn(at, "0123456789");
        assert_int_equal(*at, '2');
        *at = '1';
        test_write_file(t->path, text, bytes);
        expect(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back), APT_E_SHAPE, cases[i].tensor);
        assert_non_null(strstr(apt_error(t->ctx), "is of a layer beyond the 1 of config.json"));
        assert_null(back);
        free(text);
        apt_model_destroy(model);
    }
}

static void test_save_pruned(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700];
    apt_config c = pruned_config();
    apt_model *model = make_model(t->ctx, &c), *back = NULL;
    test_join(path, sizeof path, t->dir, "made/here");
    expect(t->ctx, apt_model_save(model, path), APT_E_IO, path);                      /* makes one folder, not its parents */
    test_join(path, sizeof path, t->dir, "made");
#ifndef APTI_POSIX
    assert_int_equal(mkdir(path, 0700), 0);      /* C cannot make folders */
#endif
    assert_ok(t->ctx, apt_model_save(model, path));
    assert_ok(t->ctx, apt_model_load(t->ctx, path, NULL, &back));
    compare_configs(model, back);
    compare_models(model, back);
    test_join(path, sizeof path, t->dir, "made/config.json");
    char *text = test_read_file(path, NULL);
    assert_non_null(strstr(text, "\"apt\": {"));
    assert_non_null(strstr(text, "\"hidden_size_dense\": 12"));
    assert_non_null(strstr(text, "\"num_attention_heads\": 2"));
    assert_non_null(strstr(text, "\"intermediate_size\": 7"));
    free(text);
    apt_model_destroy(model);
    apt_model_destroy(back);
    c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    save_model(t->ctx, &c, t->dir);
    test_join(path, sizeof path, t->dir, "config.json");
    text = test_read_file(path, NULL);
    assert_null(strstr(text, "\"apt\""));                                             /* a dense model stays plain */
    free(text);
}

static void test_load_weights_and_seed(void **state)
{
    file_test *t = (file_test *)*state;
    apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    save_model(t->ctx, &c, t->dir);
    apt_load_desc desc = APT_ZERO;
    apt_model *full = NULL, *narrow = NULL, *again = NULL;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &full));
    desc.weights = APT_BF16;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, &desc, &narrow));
    const char *name = "bert.encoder.layer.1.intermediate.dense.weight";
    float a[120], b[120];
    assert_ok(t->ctx, apt_model_get(full, name, a, 120));
    assert_ok(t->ctx, apt_model_get(narrow, name, b, 120));
    for (int i = 0; i < 120; i++) assert_true(b[i] == apti_bf16_to_f32(apti_f32_to_bf16(a[i])));
    apt_model_destroy(narrow);
    desc.weights = APT_F16;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, &desc, &narrow));
    assert_ok(t->ctx, apt_model_get(narrow, name, b, 120));
    for (int i = 0; i < 120; i++) assert_true(b[i] == apti_f16_to_f32(apti_f32_to_f16(a[i])));
    /* What float16 cannot hold is refused, and the model stays as it was. */
    float large[120];
    memcpy(large, a, sizeof large);
    large[7] = -65520.0f;
    assert_result(apt_model_set(narrow, name, large, 120), APT_E_RANGE);
    assert_non_null(strstr(apt_error(t->ctx), "value 7 is -65520; weights kept as float16 reach to 65504"));
    assert_ok(t->ctx, apt_model_get(narrow, name, large, 120));
    assert_memory_equal(large, b, sizeof large);
    apt_model_destroy(narrow);
    narrow = NULL;
    memcpy(large, a, sizeof large);
    large[119] = 7e4f;
    assert_ok(t->ctx, apt_model_set(full, name, large, 120));
    assert_ok(t->ctx, apt_model_save(full, t->dir));
    assert_result(apt_model_load(t->ctx, t->dir, &desc, &narrow), APT_E_RANGE);
    assert_non_null(strstr(apt_error(t->ctx), "model.safetensors': bert.encoder.layer.1.intermediate.dense.weight: value 119 is 70000"));
    assert_null(narrow);
    t->log.infos = 0;
    assert_ok(t->ctx, apt_model_set(full, name, a, 120));
    assert_ok(t->ctx, apt_model_save(full, t->dir));
    /* Another task: its head is not in the file and comes from the seed, as apt_model_create makes it. */
    desc.weights = APT_F32;
    desc.task = APT_TASK_SPAN;
    desc.seed = 41;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, &desc, &again));
    assert_int_equal(t->log.infos, 2);
    assert_non_null(strstr(t->log.text,
                           "tensors that this model does not use: bert.pooler.dense.bias, bert.pooler.dense.weight,"
                           " classifier.bias, classifier.weight"));
    c.task = APT_TASK_SPAN;
    apt_model *made = NULL;
    assert_ok(t->ctx, apt_model_create(t->ctx, &c, 41, &made));
    assert_ok(t->ctx, apt_model_get(again, "qa_outputs.weight", a, 24));
    assert_ok(t->ctx, apt_model_get(made, "qa_outputs.weight", b, 24));
    assert_memory_equal(a, b, 24 * 4);
    assert_ok(t->ctx, apt_model_get(again, name, b, 120));
    assert_ok(t->ctx, apt_model_get(full, name, a, 120));
    assert_memory_equal(a, b, 120 * 4);
}

static void test_load_arguments(void **state)
{
    file_test *t = (file_test *)*state;
    apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    save_model(t->ctx, &c, t->dir);
    apt_model *model = NULL;
    apt_load_desc desc = APT_ZERO;
    assert_result(apt_model_load(NULL, t->dir, NULL, &model), APT_E_ARGUMENT);
    expect(t->ctx, apt_model_load(t->ctx, NULL, NULL, &model), APT_E_ARGUMENT, "NULL");
    expect(t->ctx, apt_model_load(t->ctx, t->dir, NULL, NULL), APT_E_ARGUMENT, "NULL");
    desc.start_canary = 1;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_ARGUMENT, "APT_ZERO");
    desc.start_canary = 0;
    desc.end_canary = 1;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_ARGUMENT, "APT_ZERO");
    desc.end_canary = 0;
    desc.task = (apt_task_kind)6;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_ARGUMENT, "task is 6");
    desc.task = APT_TASK_NONE;
    desc.labels = -1;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_RANGE, "labels is -1");
    desc.labels = 65537;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_RANGE, "labels is 65537");
    desc.labels = 0;
    desc.weights = APT_I8;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_UNSUPPORTED, "weights is I8");
    desc.weights = APT_F32;
    desc.labels = 4;
    expect(t->ctx, load_drop(t->ctx, t->dir, &desc), APT_E_SHAPE,
           "model.safetensors': tensor 'classifier.weight' has shape [3, 12], expected [4, 12] (apt_load_desc.labels is 4,"
           " the model has 4 labels)");
    expect(t->ctx, load_drop(t->ctx, "/nonexistent/m", NULL), APT_E_IO, "/nonexistent/m/config.json");
    char path[700];
    test_remove(test_join(path, sizeof path, t->dir, "model.safetensors"));
    assert_result(load_drop(t->ctx, t->dir, NULL), apti_path_query(t->dir) == APTI_PATH_DIR ? APT_E_MISSING : APT_E_IO);
    assert_result(apt_model_save(NULL, t->dir), APT_E_ARGUMENT);
    model = make_model(t->ctx, &c);
    expect(t->ctx, apt_model_save(model, NULL), APT_E_ARGUMENT, "dir is NULL");
    expect(t->ctx, apt_model_save(model, ""), APT_E_ARGUMENT, "empty");
}

/* Reads dir's model.safetensors and writes it again with edit() applied to each item; edit returns false to drop it. */
typedef bool (*item_edit)(apti_tensor_item *item, char name[128]);

static void edit_model(file_test *t, item_edit edit)
{
    char path[700];
    static char names[256][128];
    apti_tensor_item items[256];
    apti_tensors *set = NULL;
    int32_t n = 0;
    test_join(path, sizeof path, t->dir, "model.safetensors");
    assert_ok(t->ctx, apti_tensors_open(t->ctx, path, &set));
    for (int32_t i = 0; i < set->count; i++) {
        const apti_tensor_view *v = &set->views[i];
        items[n] = make_item(names[n], v->dtype, v->dims, v->shape[0], v->shape[1], v->data);
        snprintf(names[n], 128, "%s", v->name);
        n += edit(&items[n], names[n]);
    }
    assert_ok(t->ctx, write_items(t->ctx, path, items, n, NULL, NULL));
    apti_tensors_close(set);
}

static bool edit_no_prefix(apti_tensor_item *item, char name[128])
{
    (void)item;
    if (strncmp(name, "bert.", 5) == 0) memmove(name, name + 5, strlen(name) - 4);
    return strncmp(name, "classifier", 10) != 0;
}

static bool edit_old_names(apti_tensor_item *item, char name[128])
{
    (void)item;
    char *norm = strstr(name, "LayerNorm.");
    if (norm != NULL) strcpy(norm + 10, strcmp(norm + 10, "weight") == 0 ? "gamma" : "beta");
    return true;
}

static bool edit_decoder_bias(apti_tensor_item *item, char name[128])
{
    (void)item;
    if (strcmp(name, "lm_head.bias") == 0) strcpy(name, "lm_head.decoder.bias");
    return true;
}

static bool edit_drop_body(apti_tensor_item *item, char name[128])
{
    (void)item;
    return strcmp(name, "bert.encoder.layer.1.output.dense.bias") != 0;
}

static bool edit_shape(apti_tensor_item *item, char name[128])
{
    if (strcmp(name, "bert.encoder.layer.0.attention.self.key.weight") == 0) {
        item->shape[0] = 6;
        item->shape[1] = 24;
    }
    return true;
}

static bool edit_dims(apti_tensor_item *item, char name[128])
{
    if (strcmp(name, "bert.embeddings.LayerNorm.bias") == 0) {
        item->dims = 2;
        item->shape[1] = item->shape[0];
        item->shape[0] = 1;
    }
    return true;
}

static bool edit_type(apti_tensor_item *item, char name[128])
{
    if (strcmp(name, "bert.embeddings.LayerNorm.bias") == 0) item->dtype = APT_I32;
    return true;
}

static bool edit_nan(apti_tensor_item *item, char name[128])
{
    static float values[120];
    if (strcmp(name, "bert.encoder.layer.1.intermediate.dense.weight") != 0) return true;
    memcpy(values, item->data, sizeof values);
    values[33] = apti_float(0x7fc00001u);
    item->data = values;
    return true;
}

static void test_load_names(void **state)
{
    file_test *t = (file_test *)*state;
    apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_load_desc desc = APT_ZERO;
    apt_model *made = make_model(t->ctx, &c), *back = NULL;
    assert_ok(t->ctx, apt_model_save(made, t->dir));
    edit_model(t, edit_old_names);
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
    compare_models(made, back);
    apt_model_destroy(back);
    edit_model(t, edit_no_prefix);
    desc.labels = 5;                             /* free to choose: the file has no classifier now */
    desc.seed = 7;
    t->log.infos = 0;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, &desc, &back));
    assert_int_equal(t->log.infos, 1);
    assert_non_null(strstr(t->log.text, "not in the files, so initialised from the seed: classifier.weight, classifier.bias"));
    float a[144], b[144];
    assert_ok(t->ctx, apt_model_get(made, "bert.pooler.dense.weight", a, 144));
    assert_ok(t->ctx, apt_model_get(back, "bert.pooler.dense.weight", b, 144));
    assert_memory_equal(a, b, sizeof a);
    assert_ok(t->ctx, apt_model_get(back, "classifier.weight", b, 60));
    desc.labels = 0;
    desc.seed = 7;
    apt_model_destroy(back);
    desc.labels = 3;
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, &desc, &back));                 /* seed 7: what apt_model_create gave */
    compare_models(made, back);
    apt_model_destroy(back);
    apt_model_destroy(made);
    c = small_config(APT_ROBERTA, APT_TASK_MLM);
    made = make_model(t->ctx, &c);
    assert_ok(t->ctx, apt_model_save(made, t->dir));
    edit_model(t, edit_decoder_bias);
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
    compare_models(made, back);
}

static void test_load_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    const struct { item_edit edit; apt_result result; const char *message; } cases[] = {
        {edit_drop_body, APT_E_MISSING, "no tensor 'bert.encoder.layer.1.output.dense.bias'"},
        {edit_shape, APT_E_SHAPE, "tensor 'bert.encoder.layer.0.attention.self.key.weight' has shape [6, 24], expected [12, 12]"},
        {edit_dims, APT_E_SHAPE, "tensor 'bert.embeddings.LayerNorm.bias' has shape [1, 12], expected [12]"},
        {edit_type, APT_E_UNSUPPORTED, "tensor 'bert.embeddings.LayerNorm.bias' has dtype I32, expected F64, F32, F16 or BF16"},
        {edit_nan, APT_E_NONFINITE, "tensor 'bert.encoder.layer.1.intermediate.dense.weight': value 33 of 120"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        save_model(t->ctx, &c, t->dir);
        edit_model(t, cases[i].edit);
        const int64_t before = apt_memory_info(t->ctx).bytes;
        expect(t->ctx, load_drop(t->ctx, t->dir, NULL), cases[i].result, cases[i].message);
        if (strstr(apt_error(t->ctx), t->dir) == NULL) fail_msg("no path: %s", apt_error(t->ctx));
        assert_int_equal(apt_memory_info(t->ctx).bytes, before);
        assert_null(t->ctx->models);
    }
}

/* A config that promises gigabytes fails on the files' shapes before it takes memory. */
static void test_load_huge_config(void **state)
{
    file_test *t = (file_test *)*state;
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    char path[700];
    save_model(t->ctx, &c, t->dir);
    const char *text = "{\"model_type\":\"bert\",\"vocab_size\":16777216,\"max_position_embeddings\":16777216,"
                       "\"hidden_size\":65536,\"num_hidden_layers\":1024,"
                       "\"num_attention_heads\":1024,\"intermediate_size\":1048576,\"architectures\":[\"BertForMaskedLM\"]}";
    test_write_file(test_join(path, sizeof path, t->dir, "config.json"), text, strlen(text));
    apt_memory_reset_peak(t->ctx);
    const int64_t before = apt_memory_info(t->ctx).peak_bytes;
    expect(t->ctx, load_drop(t->ctx, t->dir, NULL), APT_E_SHAPE,
           "tensor 'bert.embeddings.word_embeddings.weight' has shape [23, 12], expected [16777216, 65536]");
    assert_true(apt_memory_info(t->ctx).peak_bytes - before < 32 * 1024 * 1024);
}

/* Shards load like one file. */
static void test_load_shards(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700], shard[2][700], *index = (char *)test_memory_block(65536);
    const apt_config c = small_config(APT_ROBERTA, APT_TASK_SPAN);
    apt_model *made = make_model(t->ctx, &c), *back = NULL;
    apti_tensors *set = NULL;
    apti_tensor_item items[2][256];
    int32_t n[2] = {0, 0};
    int at = sprintf(index, "{\"metadata\":{},\"weight_map\":{");
    assert_ok(t->ctx, apt_model_save(made, t->dir));
    test_join(path, sizeof path, t->dir, "model.safetensors");
    assert_ok(t->ctx, apti_tensors_open(t->ctx, path, &set));
    for (int32_t i = 0; i < set->count; i++) {
        const apti_tensor_view *v = &set->views[i];
        const int k = i % 2;
        items[k][n[k]++] = make_item(v->name, v->dtype, v->dims, v->shape[0], v->shape[1], v->data);
        at += sprintf(index + at, "%s\"%s\":\"model-0000%d-of-00002.safetensors\"", i > 0 ? "," : "", v->name, k + 1);
    }
    at += sprintf(index + at, "}}");
    for (int k = 0; k < 2; k++) {
        snprintf(shard[k], sizeof shard[k], "%s/model-0000%d-of-00002.safetensors", t->dir, k + 1);
        assert_ok(t->ctx, write_items(t->ctx, shard[k], items[k], n[k], NULL, NULL));
    }
    apti_tensors_close(set);
    test_remove(path);
    test_write_file(test_join(path, sizeof path, t->dir, "model.safetensors.index.json"), index, (size_t)at);
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
    compare_models(made, back);
    apt_model_destroy(back);
    test_remove(shard[1]);
    expect(t->ctx, load_drop(t->ctx, t->dir, NULL), APT_E_IO, "model-00002-of-00002.safetensors");
    free(index);
}

static void test_save_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *model = make_model(t->ctx, &c);
    float masks[256];
    apt_units units = APT_ZERO;
    char path[700];
    apt_model_units(model, &units);
    for (int32_t i = 0; i < units.total; i++) masks[i] = i == 2 ? 0.5f : 1.0f;
    assert_ok(t->ctx, apt_model_set_masks(model, masks, units.total));
    expect(t->ctx, apt_model_save(model, t->dir), APT_E_STATE, "unit 2 has mask 0.5: call apt_model_compact first");
    assert_int_equal(test_count_files(t->dir), 0);
    masks[2] = 1;
    assert_ok(t->ctx, apt_model_set_masks(model, masks, units.total));
    assert_ok(t->ctx, apt_model_save(model, t->dir));
    /* Weights that went to NaN do not replace a good file. */
    model->embed[APTI_WORD]->value[5] = apti_float(0x7f800000u);
    expect(t->ctx, apt_model_save(model, t->dir), APT_E_NONFINITE,
           "bert.embeddings.word_embeddings.weight holds NaN or infinity");
    assert_int_equal(test_count_files(t->dir), 2);
    assert_ok(t->ctx, load_drop(t->ctx, t->dir, NULL));
    test_join(path, sizeof path, t->dir, "config.json");
    expect(t->ctx, apt_model_save(model, path), APT_E_IO, path);
}

static void test_save_adapters(void **state)
{
    file_test *t = (file_test *)*state;
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *model = make_model(t->ctx, &c);
    apt_trainer *trainer = NULL;
    apt_train_desc desc = APT_ZERO;
    desc.steps = 4;
    assert_ok(t->ctx, apt_trainer_create(model, &desc, &trainer));
    expect(t->ctx, apt_model_save(model, t->dir), APT_E_STATE,
           "the model has adapters (lora_A.bert.encoder.layer.0.attention.self.query)");
    apt_trainer_destroy(trainer);
    assert_ok(t->ctx, apt_model_merge(model, NULL, NULL));
    assert_ok(t->ctx, apt_model_save(model, t->dir));
    assert_ok(t->ctx, load_drop(t->ctx, t->dir, NULL));
}

/* While a wider teacher lives, an embedding may be some columns of its table. */
static void test_save_columns(void **state)
{
    file_test *t = (file_test *)*state;
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *model = make_model(t->ctx, &c), *back = NULL;
    apti_param *p = model->embed[APTI_WORD];
    const int64_t stride = p->cols + 3;
    float *wide = (float *)apti_calloc(t->ctx, p->rows * stride, 4);
    p->columns = (int32_t *)apti_alloc(t->ctx, p->cols, 4);
    assert_true(wide != NULL && p->columns != NULL);
    for (int32_t j = 0; j < p->cols; j++) {
        p->columns[j] = j < 5 ? j : j + 3;
        for (int64_t i = 0; i < p->rows; i++) wide[i * stride + p->columns[j]] = p->value[i * p->cols + j];
    }
    apti_free(t->ctx, p->value);
    p->value = wide;
    p->stride = stride;
    assert_ok(t->ctx, apt_model_save(model, t->dir));
    assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
    compare_models(model, back);
}

static void keep_limit(struct rlimit *old, rlim_t bytes)
{
    assert_int_equal(getrlimit(RLIMIT_FSIZE, old), 0);
    struct rlimit now = *old;
    now.rlim_cur = bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &now), 0);
}

/* No room on the disk, at any point: the files of before stay, byte for byte, and no others. */
static void test_save_disk_full(void **state)
{
    file_test *t = (file_test *)*state;
    char path[2][700];
    apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    save_model(t->ctx, &c, t->dir);
    size_t bytes[2], now = 0;
    char *old[2];
    for (int k = 0; k < 2; k++) {
        test_join(path[k], sizeof path[k], t->dir, k == 0 ? "model.safetensors" : "config.json");
        old[k] = test_read_file(path[k], &bytes[k]);
    }
    c.labels = 4;
    apt_model *model = make_model(t->ctx, &c);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit = 0; limit < bytes[0]; limit += 997) {
        struct rlimit before;
        keep_limit(&before, limit);
        const apt_result result = apt_model_save(model, t->dir);
        setrlimit(RLIMIT_FSIZE, &before);
        if (result != APT_E_IO || strstr(apt_error(t->ctx), t->dir) == NULL)
            fail_msg("limit %lld: %s", (long long)limit, apt_error(t->ctx));
        assert_int_equal(test_count_files(t->dir), 2);
        for (int k = 0; k < 2; k++) {
            char *text = test_read_file(path[k], &now);
            assert_true(now == bytes[k] && memcmp(text, old[k], now) == 0);
            free(text);
        }
    }
    signal(SIGXFSZ, handler);
    free(old[0]);
    free(old[1]);
    assert_ok(t->ctx, apt_model_save(model, t->dir));
    assert_ok(t->ctx, load_drop(t->ctx, t->dir, NULL));
}

static apt_result attempt_load(apt_ctx *ctx, void *user)
{
    apt_model *model = NULL;
    const apt_result result = apt_model_load(ctx, (const char *)user, NULL, &model);
    if (result != APT_OK && (ctx->models != NULL || model != NULL)) fail_msg("a half-loaded model stays");
    return result;
}

static apt_result attempt_save(apt_ctx *ctx, void *user)
{
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    apt_model *model = NULL;
    const apt_result result = apt_model_create(ctx, &c, 7, &model);
    return result == APT_OK ? apt_model_save(model, (const char *)user) : result;
}

static void test_every_allocation_of_files(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700];
    apt_config c = pruned_config();
    save_model(t->ctx, &c, t->dir);
    assert_true(test_every_allocation(attempt_load, t->dir) > 40);
    size_t before = 0, after = 0;
    char *old = test_read_file(test_join(path, sizeof path, t->dir, "model.safetensors"), &before);
    assert_true(test_every_allocation(attempt_save, t->dir) > 40);
    char *now = test_read_file(path, &after);
    assert_int_equal(test_count_files(t->dir), 2);
    assert_true(before != after);                /* only the last attempt replaced the file */
    free(old);
    free(now);
    test_remove(path);
    put_shards(t, MAP("\"c\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\",\"a\":\"m-1.safetensors\""));
    assert_true(test_every_allocation((test_attempt)open_close, t->dir) > 10);
}

/* --------------------------------------------------------------------------------------------- damage and golden files */

/* apti_tensors_open on a file in memory. */
static apt_result read_memory(apt_ctx *ctx, const void *file, size_t bytes)
{
    apti_tensors *set = NULL;
    assert_ok(ctx, apti_tensors_new(ctx, "memory", 1, &set));
    set->files[0].path = apti_copy_text(ctx, "memory");
    apt_result result = apti_tensors_read(set, 0, (const uint8_t *)file, (int64_t)bytes);
    if (result == APT_OK) result = apti_tensors_sort(set);
    apti_tensors_close(set);
    return result;
}

/* A file cut at any byte of its header, or anywhere in the data, is refused. */
static void check_truncation(file_test *t, const char *source, size_t data_step)
{
    size_t bytes = 0;
    uint64_t header = 0;
    char *file = test_read_file(source, &bytes);
    memcpy(&header, file, 8);
    for (size_t n = 0; n < bytes; n += n < 8 + header + 16 || n + 16 > bytes ? 1 : data_step) {
        uint8_t *part = (uint8_t *)test_memory_block(n);         /* exactly n bytes: a sanitizer sees a step too far */
        memcpy(part, file, n);
        expect(t->ctx, read_memory(t->ctx, part, n), APT_E_FORMAT, "'memory'");
        free(part);
    }
    free(file);
}

static void test_truncation(void **state)
{
    file_test *t = (file_test *)*state;
    char path[700];
    const apt_config c = small_config(APT_BERT, APT_TASK_CLASSIFY);
    save_model(t->ctx, &c, t->dir);
    check_truncation(t, test_join(path, sizeof path, t->dir, "model.safetensors"), 7);
    size_t bytes = 0;
    char *file = test_read_file(path, &bytes);
    for (size_t n = 0; n < bytes; n += 501) {                    /* and through the public way */
        test_write_file(path, file, n);
        expect(t->ctx, load_drop(t->ctx, t->dir, NULL), APT_E_FORMAT, "model.safetensors");
    }
    test_write_file(path, file, bytes);
    free(file);
    file = test_read_file(test_join(path, sizeof path, t->dir, "config.json"), &bytes);
    for (size_t n = 0; n + 2 < bytes; n++) {
        test_write_file(path, file, n);
        expect(t->ctx, load_drop(t->ctx, t->dir, NULL), APT_E_FORMAT, "config.json");
    }
    free(file);
}

static void test_golden_truncation(void **state)
{
    file_test *t = (file_test *)*state;
    char path[1024];
    check_truncation(t, test_shared(path, sizeof path, "golden/bert/model.safetensors"), 4099);
}

/* Random damage: any outcome but a crash, a leak or an endless loop. */
static void test_mutations(void **state)
{
    file_test *t = (file_test *)*state;
    char path[2][700];
    char *file[2];
    size_t bytes[2];
    apt_config c = pruned_config();
    apti_rng rng = {apti_rng_seed(1, 2), 0};
    int32_t refused = 0;
    save_model(t->ctx, &c, t->dir);
    for (int k = 0; k < 2; k++) {
        test_join(path[k], sizeof path[k], t->dir, k == 0 ? "model.safetensors" : "config.json");
        file[k] = test_read_file(path[k], &bytes[k]);
    }
    const int64_t before = apt_memory_info(t->ctx).bytes;
    uint64_t header = 0;
    memcpy(&header, file[0], 8);
    for (int i = 0; i < 4000; i++) {
        const int k = i % 4 == 0 ? 1 : 0;
        char *copy = (char *)test_memory_block(bytes[k]);
        memcpy(copy, file[k], bytes[k]);
        const uint32_t edits = 1 + apti_rng_below(&rng, 4), span = (uint32_t)(k == 0 ? 8 + header : bytes[k]);
        for (uint32_t e = 0; e < edits; e++) {
            const uint32_t at = apti_rng_below(&rng, apti_rng_below(&rng, 10) == 0 ? (uint32_t)bytes[k] : span);;
            const char *bits = "0123456789{}[],:\"\\ -eE.tfn";
            copy[at] = apti_rng_below(&rng, 2) ? bits[apti_rng_below(&rng, 26)] : (char)apti_rng_below(&rng, 256);
        }
        if (k == 0 && i % 4 != 3) refused += read_memory(t->ctx, copy, bytes[k]) != APT_OK;
        else {
            test_write_file(path[k], copy, bytes[k]);
            refused += load_drop(t->ctx, t->dir, NULL) != APT_OK;
            test_write_file(path[k], file[k], bytes[k]);
        }
        assert_int_equal(apt_memory_info(t->ctx).bytes, before);
        free(copy);
    }
    assert_true(refused > 1000);
    free(file[0]);
    free(file[1]);
}

static void test_golden_models(void **state)
{
    file_test *t = (file_test *)*state;
    const char *names[] = {"bert", "roberta", "roberta-qa", "roberta-regression", "t5-relu-tied", "t5-gated-untied", "llama",
                           "llama-gqa-tied"};
    const apt_task_kind tasks[] = {APT_TASK_CLASSIFY, APT_TASK_CLASSIFY, APT_TASK_SPAN, APT_TASK_REGRESS, APT_TASK_LM, APT_TASK_LM,
                                   APT_TASK_LM, APT_TASK_LM};
    for (int i = 0; i < 8; i++) {
        char path[1024], inner[1100], out[700];
        size_t a = 0, b = 0;
        apt_model *model = NULL;
        apt_config c;
        char name[64];
        snprintf(name, sizeof name, "golden/%s", names[i]);
        test_shared(path, sizeof path, name);
        assert_ok(t->ctx, apt_model_load(t->ctx, path, NULL, &model));
        apt_model_config(model, &c);
        assert_int_equal(c.task, tasks[i]);
        assert_ok(t->ctx, apt_model_save(model, t->dir));
        char *theirs = test_read_file(test_join(inner, sizeof inner, path, "model.safetensors"), &a);
        char *ours = test_read_file(test_join(out, sizeof out, t->dir, "model.safetensors"), &b);
        assert_true(a == b && memcmp(theirs, ours, a) == 0);     /* the very bytes that Hugging Face wrote */
        free(theirs);
        free(ours);
        apt_model *back = NULL;
        assert_ok(t->ctx, apt_model_load(t->ctx, t->dir, NULL, &back));
        compare_configs(model, back);
        apt_model_destroy(back);
        apt_model_destroy(model);
    }
    assert_int_equal(t->log.infos, 0);
}

static void test_real_model(void **state)
{
    file_test *t = (file_test *)*state;
    char path[1024], line[1024];
    apt_model *model = NULL;
    apt_load_desc desc = APT_ZERO;
    test_shared(path, sizeof path, "models/minilm");
    expect(t->ctx, load_drop(t->ctx, path, NULL), APT_E_ARGUMENT, "names no task");
    desc.task = APT_TASK_CLASSIFY;
    desc.labels = 2;
    assert_ok(t->ctx, apt_model_load(t->ctx, path, &desc, &model));
    assert_int_equal(t->log.infos, 2);
    assert_non_null(strstr(t->log.text, "tensors that this model does not use: embeddings.position_ids"));
    apt_model_info info;
    apt_model_query(model, &info);
    assert_int_equal(info.parameters, 22713216 + 2 * 384 + 2);
    FILE *maps = fopen("/proc/self/maps", "r");                  /* nothing of the folder stays open */
    while (maps != NULL && fgets(line, sizeof line, maps) != NULL)
        if (strstr(line, "minilm") != NULL) fail_msg("still mapped: %s", line);
    if (maps != NULL) fclose(maps);
}

/* ------------------------------------------------------------------------------------------------------- checkpoints */

static apt_result put_checkpoint(apt_ctx *ctx, const char *path)
{
    const float f[6] = {1, 2, 3, 4, 5, 6};
    const int64_t i[2] = {-5, INT64_MAX}, shape[2] = {2, 3}, two[1] = {2}, six[1] = {6}, none[1] = {0};
    apti_ckpt_writer *w = NULL;
    const apt_result result = apti_ckpt_begin(ctx, &w);
    if (result != APT_OK) return result;
    (void)apti_ckpt_put(w, "floats", APT_F32, 2, shape, f);
    {
        const double gone[2] = {0.25, -8};
        (void)apti_ckpt_put_copy(w, "doubles", APT_F64, 1, two, gone);
    }
    (void)apti_ckpt_put(w, "ints", APT_I64, 1, two, i);
    (void)apti_ckpt_put_copy(w, "scalar", APT_U8, 0, NULL, "s");
    (void)apti_ckpt_put(w, "zz empty", APT_U8, 1, none, NULL);
    (void)apti_ckpt_put(w, "empty", APT_F64, 1, none, NULL);
    (void)apti_ckpt_put_fill(w, "filled", APT_U8, 1, six, fill_bytes, ctx, 3);
    for (int k = 0; k < 70; k++) {
        char name[32];
        snprintf(name, sizeof name, "many.%d", k);
        (void)apti_ckpt_put(w, name, APT_F32, 2, shape, f);
    }
    return apti_ckpt_finish(w, path);
}

static apt_result open_checkpoint(apt_ctx *ctx, const char *path)
{
    apti_ckpt_reader *r = NULL;
    const apt_result result = apti_ckpt_open(ctx, path, &r);
    if (result == APT_OK) apti_ckpt_close(r);
    else assert_null(r);
    return result;
}

static void test_checkpoint_round_trip(void **state)
{
    file_test *t = (file_test *)*state;
    apti_ckpt_reader *r = NULL;
    const void *data = NULL;
    int64_t n = 0;
    assert_ok(t->ctx, put_checkpoint(t->ctx, t->path));
    assert_ok(t->ctx, apti_ckpt_open(t->ctx, t->path, &r));
    assert_ok(t->ctx, apti_ckpt_find(r, "floats", APT_F32, 6, &data, &n));
    assert_true(n == 6 && ((const float *)data)[5] == 6);
    assert_ok(t->ctx, apti_ckpt_find(r, "doubles", APT_F64, 2, &data, NULL));
    assert_true(((const double *)data)[1] == -8);
    assert_ok(t->ctx, apti_ckpt_find(r, "ints", APT_I64, -1, &data, &n));
    assert_true(n == 2 && ((const int64_t *)data)[1] == INT64_MAX);
    assert_ok(t->ctx, apti_ckpt_find(r, "scalar", APT_U8, 1, &data, &n));
    assert_ok(t->ctx, apti_ckpt_find(r, "zz empty", APT_U8, 0, &data, &n));
    assert_ok(t->ctx, apti_ckpt_find(r, "filled", APT_U8, 6, &data, &n));
    assert_memory_equal(data, "CCCCCC", 6);
    assert_true(apti_ckpt_has(r, "many.69") && !apti_ckpt_has(r, "many.70"));
    expect(t->ctx, apti_ckpt_find(r, "other", APT_F32, 6, &data, &n), APT_E_MISSING, "no tensor 'other'");
    expect(t->ctx, apti_ckpt_find(r, "floats", APT_F32, 7, &data, &n), APT_E_SHAPE,
           "tensor 'floats' holds 6 values of F32, expected 7 of F32");
    expect(t->ctx, apti_ckpt_find(r, "floats", APT_I32, 6, &data, &n), APT_E_SHAPE,
           "tensor 'floats' holds 6 values of F32, expected 6 of I32");
    if (strstr(apt_error(t->ctx), t->path) == NULL) fail_msg("no path: %s", apt_error(t->ctx));
    apti_ckpt_close(r);
    apti_ckpt_close(NULL);
    apti_ckpt_abort(NULL);
    /* The same state gives the same file. */
    size_t a = 0, b = 0;
    char *first = test_read_file(t->path, &a);
    assert_ok(t->ctx, put_checkpoint(t->ctx, t->path));
    char *second = test_read_file(t->path, &b);
    assert_true(a == b && memcmp(first, second, a) == 0);
    free(first);
    free(second);
}

/* apti_ckpt_open on a file in memory. */
static apt_result open_memory(apt_ctx *ctx, const char *file, size_t bytes)
{
    apti_tensors *set = NULL;
    assert_ok(ctx, apti_tensors_new(ctx, "memory", 1, &set));
    set->files[0].path = apti_copy_text(ctx, "memory");
    set->files[0].map.data = (const uint8_t *)file;
    apt_result result = apti_tensors_read(set, 0, (const uint8_t *)file, (int64_t)bytes);
    if (result == APT_OK) result = apti_tensors_sort(set);
    if (result == APT_OK) result = apti_ckpt_accept(set);
    set->files[0].map.data = NULL;
    apti_tensors_close(set);
    return result;
}

/* Whichever bit flips, it is seen; and each byte that is missing at the end. */
static void test_checkpoint_damage(void **state)
{
    file_test *t = (file_test *)*state;
    size_t bytes = 0;
    uint64_t header = 0;
    assert_ok(t->ctx, put_checkpoint(t->ctx, t->path));
    char *file = test_read_file(t->path, &bytes);
    memcpy(&header, file, 8);
    assert_ok(t->ctx, open_memory(t->ctx, file, bytes));
    for (size_t bit = 0; bit < 8 * bytes; bit += bit < 8 * (8 + header) ? 5 : 3) {
        const size_t at = bit / 8;
        file[at] = (char)(file[at] ^ (1 << (bit % 8)));
        const apt_result result = open_memory(t->ctx, file, bytes);
        if (result == APT_OK) fail_msg("a flipped bit at byte %lld of %lld was not seen", (long long)at, (long long)bytes);
        if (at >= 8 + header && result != APT_E_CHECKSUM) fail_msg("byte %lld: %s", (long long)at, apt_error(t->ctx));
        file[at] = (char)(file[at] ^ (1 << (bit % 8)));
    }
    for (size_t n = 0; n < bytes; n++) assert_result(open_memory(t->ctx, file, n), APT_E_FORMAT);
    /* The second double of "doubles": the message names the tensor. */
    apti_tensors *set = NULL;
    test_write_file(t->path, file, bytes);
    assert_ok(t->ctx, apti_tensors_open(t->ctx, t->path, &set));
    const size_t at = (size_t)(apti_tensors_find(set, "doubles")->data - set->files[0].map.data) + 9;
    apti_tensors_close(set);
    file[at] ^= 1;
    test_write_file(t->path, file, bytes);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_CHECKSUM, "'doubles' has checksum");
    free(file);
}

#define SUMS16 "\"apt.checksums\":{\"dtype\":\"U8\",\"shape\":[16],\"data_offsets\":[0,16]}"

#define CHECKPOINT_META "\"__metadata__\":{\"format\":\"apt-checkpoint\",\"version\":\"" APTI_CKPT_VERSION "\"}"

static void test_checkpoint_refuses(void **state)
{
    file_test *t = (file_test *)*state;
    put_tensors(t->path, "{" A4 "}", 4);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_FORMAT, "is not a checkpoint: metadata format is \"\"");
    put_tensors(t->path, "{\"__metadata__\":{\"format\":\"pt\"}}", 0);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_FORMAT, "metadata format is \"pt\", expected \"apt-checkpoint\"");
    put_tensors(t->path, "{\"__metadata__\":{\"format\":\"apt-checkpoint\"}}", 0);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_UNSUPPORTED, "checkpoint version \"\", expected \"" APTI_CKPT_VERSION "\"");
    put_tensors(t->path, "{\"__metadata__\":{\"format\":\"apt-checkpoint\",\"version\":\"1\"}}", 0);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_UNSUPPORTED, "checkpoint version \"1\"");
    put_tensors(t->path, "{" CHECKPOINT_META "}", 0);
    expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_MISSING, "no tensor 'apt.checksums'");
    const char *tables[] = {
        SUMS16,
        "\"apt.checksums\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}",
        SUMS16 ",\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[16,17]}",
    };
    const int64_t sizes[] = {16, 8, 17};
    for (int i = 0; i < 3; i++) {
        char header[512];
        snprintf(header, sizeof header, "{" CHECKPOINT_META ",%s}", tables[i]);
        put_tensors(t->path, header, sizes[i]);
        expect(t->ctx, open_checkpoint(t->ctx, t->path), APT_E_FORMAT, "'apt.checksums' is not the last one");
    }
    expect(t->ctx, open_checkpoint(t->ctx, t->dir), APT_E_IO, t->dir);
}

/* Right checksums, but a tensor that cannot be read in place. */
static void test_checkpoint_alignment(void **state)
{
    file_test *t = (file_test *)*state;
    put_tensors(t->path, "{" CHECKPOINT_META ","
                         "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"f\":{\"dtype\":\"F32\","
                         "\"shape\":[1],\"data_offsets\":[1,5]},"
                         "\"apt.checksums\":{\"dtype\":\"U8\",\"shape\":[24],\"data_offsets\":[5,29]}}   ", 29);
    size_t bytes = 0;
    char *file = test_read_file(t->path, &bytes);
    char *data = file + bytes - 29;
    const uint64_t sums[3] = {apti_checksum(0, file, bytes - 29), apti_checksum(0, data, 1), apti_checksum(0, data + 1, 4)};
    memcpy(data + 5, sums, sizeof sums);
    test_write_file(t->path, file, bytes);
    free(file);
    apti_ckpt_reader *r = NULL;
    const void *found = NULL;
    assert_ok(t->ctx, apti_ckpt_open(t->ctx, t->path, &r));
    assert_ok(t->ctx, apti_ckpt_find(r, "a", APT_U8, 1, &found, NULL));
    const bool odd = (uintptr_t)apti_tensors_find(r, "f")->data % 4 != 0;
    assert_true(odd);
    expect(t->ctx, apti_ckpt_find(r, "f", APT_F32, 1, &found, NULL), APT_E_FORMAT, "tensor 'f' is not aligned to 4 bytes");
    apti_ckpt_close(r);
}

static void test_checkpoint_writer_errors(void **state)
{
    file_test *t = (file_test *)*state;
    const int64_t one[1] = {1}, huge[2] = {INT64_MAX, 2};
    apti_ckpt_writer *w = NULL;
    const int64_t before = apt_memory_info(t->ctx).bytes;
    test_write_file(t->path, "old", 3);
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    expect(t->ctx, apti_ckpt_put(w, "apt.checksums", APT_U8, 1, one, "x"), APT_E_ARGUMENT, "apt.checksums");
    assert_result(apti_ckpt_put(w, "fine", APT_U8, 1, one, "x"), APT_E_ARGUMENT);      /* the first failure sticks */
    assert_result(apti_ckpt_put_copy(w, "fine", APT_U8, 1, one, "x"), APT_E_ARGUMENT);
    assert_result(apti_ckpt_put_fill(w, "fine", APT_U8, 1, one, fill_bytes, NULL, 0), APT_E_ARGUMENT);
    assert_result(apti_ckpt_finish(w, t->path), APT_E_ARGUMENT);
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    assert_result(apti_ckpt_put(w, "dims", APT_U8, 9, one, "x"), APT_E_ARGUMENT);
    assert_result(apti_ckpt_finish(w, t->path), APT_E_ARGUMENT);
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    expect(t->ctx, apti_ckpt_put(w, "nothing", APT_U8, 1, one, NULL), APT_E_ARGUMENT, "tensor 'nothing' has no data");
    assert_result(apti_ckpt_finish(w, t->path), APT_E_ARGUMENT);
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    assert_result(apti_ckpt_put_copy(w, "huge", APT_U8, 2, huge, "x"), APT_E_MEMORY);
    assert_result(apti_ckpt_finish(w, t->path), APT_E_MEMORY);
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    assert_ok(t->ctx, apti_ckpt_put(w, "same", APT_U8, 1, one, "x"));
    assert_ok(t->ctx, apti_ckpt_put(w, "same", APT_U8, 1, one, "x"));
    expect(t->ctx, apti_ckpt_finish(w, t->path), APT_E_ARGUMENT, "two tensors are named 'same'");
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    assert_ok(t->ctx, apti_ckpt_put_fill(w, "refused", APT_U8, 1, one, fill_bytes, t->ctx, 99));
    expect(t->ctx, apti_ckpt_finish(w, t->path), APT_E_STATE, "fill refuses");
    assert_ok(t->ctx, apti_ckpt_begin(t->ctx, &w));
    assert_ok(t->ctx, apti_ckpt_put(w, "x", APT_U8, 1, one, "x"));
    apti_ckpt_abort(w);
    assert_int_equal(apt_memory_info(t->ctx).bytes, before);
    char *old = test_read_file(t->path, NULL);
    assert_string_equal(old, "old");
    free(old);
    assert_int_equal(test_count_files(t->dir), 1);
}

static void test_checkpoint_allocations(void **state)
{
    file_test *t = (file_test *)*state;
    assert_true(test_every_allocation((test_attempt)put_checkpoint, t->path) > 80);
    assert_true(test_every_allocation((test_attempt)open_checkpoint, t->path) > 8);
}

static void test_checkpoint_disk_full(void **state)
{
    file_test *t = (file_test *)*state;
    struct rlimit before;
    assert_ok(t->ctx, put_checkpoint(t->ctx, t->path));
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    keep_limit(&before, 1024);
    const apt_result result = put_checkpoint(t->ctx, t->path);
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    assert_int_equal(result, APT_E_IO);
    assert_int_equal(test_count_files(t->dir), 1);
    assert_ok(t->ctx, open_checkpoint(t->ctx, t->path));
    /* Never where the library cannot tell a device from a file: it would replace the device. */
    if (apti_path_query("/dev/full") == APTI_PATH_OTHER)
        expect(t->ctx, put_checkpoint(t->ctx, "/dev/full"), APT_E_IO, "/dev/full");
}

#define FILE_TEST(f) cmocka_unit_test_setup_teardown(f, file_setup, file_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        FILE_TEST(test_json_accepts), FILE_TEST(test_json_refuses), FILE_TEST(test_json_depth), FILE_TEST(test_json_limits),
        FILE_TEST(test_json_many_keys), FILE_TEST(test_json_values), cmocka_unit_test(test_numbers_read),
        cmocka_unit_test(test_numbers_written),
        cmocka_unit_test(test_numbers_locale), FILE_TEST(test_json_writer),
        FILE_TEST(test_tensors_accept), FILE_TEST(test_tensors_refuse), FILE_TEST(test_tensors_convert),
        FILE_TEST(test_tensors_write),
        FILE_TEST(test_tensors_write_refuses), FILE_TEST(test_shards), FILE_TEST(test_shards_refuse),
            FILE_TEST(test_shards_too_many),
        FILE_TEST(test_config_defaults), FILE_TEST(test_config_tasks), FILE_TEST(test_config_pruned),
            FILE_TEST(test_config_refuses), FILE_TEST(test_config_llama), FILE_TEST(test_config_t5),
        FILE_TEST(test_config_decoders_refused), FILE_TEST(test_save_decoders), FILE_TEST(test_load_spellings_of_decoders),
        FILE_TEST(test_load_layers_too_many), FILE_TEST(test_load_ties),
        FILE_TEST(test_save_and_load), FILE_TEST(test_save_pruned), FILE_TEST(test_load_weights_and_seed),
        FILE_TEST(test_load_arguments),
        FILE_TEST(test_load_names), FILE_TEST(test_load_refuses), FILE_TEST(test_load_huge_config), FILE_TEST(test_load_shards),
        FILE_TEST(test_save_refuses), FILE_TEST(test_save_adapters), FILE_TEST(test_save_columns), FILE_TEST(test_save_disk_full),
        FILE_TEST(test_every_allocation_of_files),
        FILE_TEST(test_truncation), FILE_TEST(test_golden_truncation), FILE_TEST(test_mutations), FILE_TEST(test_golden_models),
        FILE_TEST(test_real_model),
        FILE_TEST(test_checkpoint_round_trip), FILE_TEST(test_checkpoint_damage), FILE_TEST(test_checkpoint_refuses),
        FILE_TEST(test_checkpoint_alignment), FILE_TEST(test_checkpoint_writer_errors), FILE_TEST(test_checkpoint_allocations),
            FILE_TEST(test_checkpoint_disk_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
