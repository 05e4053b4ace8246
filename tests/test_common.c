/* examples/common without the tokenizer: JSON, data files, batches and their order, SQuAD, metrics, options, log, progress
   line, what is tried again when it cannot be written, report, table, the grammar of the demonstration. */
#define _POSIX_C_SOURCE 200809L
#include <signal.h>
#include <sys/resource.h>
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../apt.h"
#include "apt_test.h"
#include "../examples/common/ex_args.h"
#include "../examples/common/ex_cells.h"
#include "../examples/common/ex_data.h"
#include "../examples/common/ex_grammar.h"
#include "../examples/common/ex_log.h"
#include "../examples/common/ex_metrics.h"
#include "../examples/common/ex_progress.h"
#include "../examples/common/ex_report.h"
#include "../examples/common/ex_tokenizer.h"
#include "../examples/common/ex_run.h"
#include "place.h"

#define WORDPIECE "tests/golden/tokenizer/wordpiece.json"

static void near(double got, double wanted, double tolerance)
{
    if (!(fabs(got - wanted) <= tolerance)) fail_msg("got %.17g, wanted %.17g", got, wanted);
}

static const char *put(place *p, const char *name, const char *text, size_t bytes)
{
    ex_error error = {""};
    test_join(p->path, sizeof p->path, p->dir, name);
    if (!ex_write_file(p->path, text, bytes, &error)) fail_msg("%s", error.text);
    return p->path;
}

static const char *put_text(place *p, const char *name, const char *text)
{
    return put(p, name, text, strlen(text));
}

static char *get(const char *path)
{
    ex_error error = {""};
    size_t bytes;
    char *text = ex_read_file(path, &bytes, &error);
    if (text == NULL) fail_msg("%s", error.text);
    return text;
}

/* ---- base ---- */

static void test_base_files(void **state)
{
    place *p = (place *)*state;
    ex_error error = {""};
    size_t bytes = 0;
    char *deep = ex_format("%s/a/b//c", p->dir), *text, *file;
    assert_true(ex_make_dirs(deep, &error) && ex_make_dirs(deep, &error) && ex_is_directory(deep));
    put_text(p, "file", "x");
    file = ex_format("%s/under", p->path);
    assert_false(ex_make_dirs(file, &error));
    assert_false(ex_write_file(file, "x", 1, &error));
    says(&error, "cannot be written");
    assert_null(ex_read_file(p->dir, &bytes, &error));
    says(&error, "cannot be read");
    assert_null(ex_read_file(file, &bytes, &error));
    says(&error, "cannot be opened");
    free(file);
    file = (char *)ex_alloc(300001, 1);          /* more than one block */
    memset(file, 'q', 300000);
    put(p, "file", file, 300000);
    text = ex_read_file(p->path, &bytes, &error);
    assert_int_equal(bytes, 300000);
    assert_memory_equal(text, file, 300001);
    free(text);
    free(file);
    free(deep);
}

static void test_base_utf8(void **state)
{
    /* from table 3-8 of the Unicode standard: how many U+FFFD */
    static const struct { const char *text; int64_t replaced; const char *repaired;
    } cases[] = {{"plain", 0, "plain"},
                 {"\xc3\xa9", 0, "\xc3\xa9"},
                 {"\xc0\x80", 2, "??"},
                 {"\xed\xa0\x80", 3, "???"},
                 {"\xe2\x82", 1, "?"},
                 {"\xf0\x9f\x98x", 1, "?x"},
                 {"\xf4\x90\x80\x80", 4, "????"},
                 {"a\xf1\x80\x80\xe1\x80\xc2"
                  "b\x80"
                  "c\x80\xbf"
                  "d",
                  6, "a???b?c??d"},
                 {"\xff", 1, "?"},
                 {"\xf4\x8f\xbf\xbf", 0, "\xf4\x8f\xbf\xbf"}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_text out = {NULL, 0, 0}, wanted = {NULL, 0, 0};
        for (const char *c = cases[i].repaired; *c != 0; c++) {
            if (*c == '?') ex_text_put(&wanted, "\xef\xbf\xbd");
            else ex_text_add(&wanted, c, 1);
        }
        assert_int_equal(ex_utf8_add_repaired(&out, cases[i].text, strlen(cases[i].text)), cases[i].replaced);
        assert_string_equal(out.at, wanted.at);
        ex_text_free(&out);
        ex_text_free(&wanted);
    }
    for (uint32_t code = 0; code < 0x110000; code++) {
        char bytes[4];
        uint32_t back = 0;
        bool valid = false;
        size_t n;
        if (code >= 0xd800 && code < 0xe000) continue;
        n = ex_utf8_encode(code, bytes);
        if (ex_utf8_decode(bytes, n, &back, &valid) != n || back != code || !valid) fail_msg("U+%04X does not come back", code);
    }
}

static void test_base_map(void **state)
{
    ex_map map = {0};
    char key[16];
    (void)state;
    assert_int_equal(ex_map_get(&map, "x", 1, -7), -7);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 5000; i++) {
            const int n = snprintf(key, sizeof key, "%d", i * 7);
            assert_int_equal(ex_map_put(&map, key, (size_t)n, i + round), round == 0);
        }
    }
    assert_true(ex_map_put(&map, "\0a", 2, 1) && ex_map_put(&map, "\0b", 2, 2) && ex_map_put(&map, "", 0, 3));
    assert_int_equal(ex_map_count(&map), 5003);
    assert_int_equal(ex_map_get(&map, "34993", 5, -1), 5000);
    assert_int_equal(ex_map_get(&map, "34994", 5, -1), -1);
    assert_int_equal(ex_map_get(&map, "\0b", 2, -1), 2);
    assert_int_equal(ex_map_get(&map, "", 0, -1), 3);
    assert_string_equal(ex_map_key(&map, 3), "21");
    ex_map_free(&map);
}

static void test_base_numbers(void **state)
{
    char t[32];
    (void)state;
    assert_string_equal(ex_count_text(t, sizeof t, 950), "950");
    assert_string_equal(ex_count_text(t, sizeof t, 12345), "12.3k");
    assert_string_equal(ex_count_text(t, sizeof t, 999600), "1.0M");
    assert_string_equal(ex_bytes_text(t, sizeof t, 512), "512 B");
    assert_string_equal(ex_bytes_text(t, sizeof t, 1.25 * 1073741824), "1.2 GiB");
    assert_string_equal(ex_time_text(t, sizeof t, 0.84), "0.8 s");
    assert_string_equal(ex_time_text(t, sizeof t, 123), "2:03");
    assert_string_equal(ex_time_text(t, sizeof t, 3723), "1:02:03");
    assert_string_equal(ex_time_text(t, sizeof t, 3 * 86400.0 + 4 * 3600 + 5 * 60), "3d 04:05");
    assert_true(ex_finite(1e308) && !ex_finite(HUGE_VAL) && !ex_finite(-HUGE_VAL) && !ex_finite(strtod("nan", NULL)));
}

/* ---- JSON ---- */

static bool parse(ex_json *json, const char *text, ex_error *error)
{
    char *copy = ex_copy(text, strlen(text));
    free(json->text);
    json->text = copy;
    return ex_json_parse(json, "t.json", 1, copy, strlen(text), error);
}

static void test_json_accepts(void **state)
{
    ex_json json = {0};
    ex_error error = {""};
    const ex_json_node *root;
    int64_t n = 0;
    (void)state;
    assert_true(parse(
        &json,
        "\xef\xbb\xbf { \"a\" : [1, -2.5e1, true,false , null,\"x\"],\"b\":{},\"a\\u0062\":\"\\ud83d\\ude00\\n\\u00e9\\/\","
        " \"n\":1, \"n\":2}\n",
        &error));
    root = ex_json_root(&json);
    assert_int_equal(root->count, 5);
    assert_int_equal(root->span, stbds_arrlenu(json.nodes));
    assert_int_equal(ex_json_get(root, "a")->count, 6);
    near((ex_json_get(root, "a") + 2)->as.number, -25, 0);
    assert_string_equal(ex_json_text(root, "ab", ""), "\xf0\x9f\x98\x80\n\xc3\xa9/");
    assert_true(ex_json_int(ex_json_get(root, "n"), 0, 9, &n) && n == 2);
    assert_false(ex_json_int(ex_json_get(root, "a") + 2, -20, 9, &n) || ex_json_int(ex_json_get(root, "n"), 3, 9, &n));
    assert_true(ex_json_bool(root, "absent", true) && !ex_json_bool(root, "a", false));
    assert_null(ex_json_get(root, "c"));
    assert_true(parse(&json, "\"\\ud800 \\udc00 \\ud800\\u0041\"", &error));
    assert_int_equal(json.replaced, 3);
    assert_string_equal(ex_json_root(&json)->as.text, "\xef\xbf\xbd \xef\xbf\xbd \xef\xbf\xbd" "A");
    assert_true(parse(&json, "\"a\\u0000b\"", &error));
    assert_int_equal(ex_json_root(&json)->count, 3);
    assert_true(parse(&json, "1.5", &error) && parse(&json, "-0", &error) && parse(&json, "[]", &error) &&
                parse(&json, "1e-999", &error));
    ex_json_free(&json);
}

static void test_json_refuses(void **state)
{
    static const char *const bad[] = {"",           " ",       "{",     "[",       "[1,]",        "[1 2]",
                                      "{\"a\":1,}", "{\"a\"}", "{a:1}", "{1:2}",   "01",          "1.",
                                      ".5",         "+1",      "-",     "1e",      "1e+",         "1e999",
                                      "nul",        "True",    "\"",    "\"\\x\"", "\"\\u12g4\"", "\"\\ud83d\\u12\"",
                                      "\"a\nb\"",   "\"\t\"",  "[]]",   "{}{}",    "[1]x",        "\"a\" b",
                                      "0x10",       "NaN",     "'a'",   "[1,,2]",  "{\"a\":}",    "//",
                                      "[\"a\",]"};
    ex_json json = {0};
    ex_error error = {""};
    ex_text deep = {NULL, 0, 0};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        error.text[0] = 0;
        if (parse(&json, bad[i], &error)) fail_msg("%s was accepted", bad[i]);
        says(&error, "t.json:");
        says(&error, "expected");
    }
    assert_false(parse(&json, "{\"a\": 1,\n\"b\": x}", &error));
    says(&error, "t.json:2: not valid JSON at byte 14: expected a value, found 'x'");
    for (int i = 0; i < EX_JSON_DEPTH; i++) ex_text_put(&deep, i % 2 == 0 ? "[" : "{\"a\":");
    ex_text_put(&deep, "1");
    for (int i = EX_JSON_DEPTH; i-- > 0;) ex_text_put(&deep, i % 2 == 0 ? "]" : "}");
    if (!parse(&json, deep.at, &error)) fail_msg("%s", error.text);
    deep.length = 0;
    for (int i = 0; i < 100000; i++) ex_text_put(&deep, "[");
    assert_false(parse(&json, deep.at, &error));
    says(&error, "at most 256");
    ex_text_free(&deep);
    ex_json_free(&json);
}

/* Writing any text and reading it gives the same text. */
static void test_json_round(void **state)
{
    char text[600];
    ex_text out = {NULL, 0, 0};
    ex_json json = {0};
    ex_error error = {""};
    size_t n = 0;
    (void)state;
    for (uint32_t c = 0; c < 256; c++) n += ex_utf8_encode(c, text + n);
    ex_json_put(&out, text, n);
    assert_true(parse(&json, out.at, &error));
    assert_int_equal(ex_json_root(&json)->count, n);
    assert_memory_equal(ex_json_root(&json)->as.text, text, n);
    ex_text_free(&out);
    ex_json_free(&json);
}

/* ---- rows ---- */

static ex_rows_desc desc_of(ex_label_kind kind)
{
    ex_rows_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.kind = kind;
    return desc;
}

static void read_rows(ex_rows *rows, const char *path, const ex_rows_desc *desc)
{
    ex_error error = {""};
    if (!ex_rows_read(rows, path, desc, &error)) fail_msg("%s", error.text);
}

static void test_tsv(void **state)
{
    place *p = (place *)*state;
    ex_rows rows;
    ex_rows_desc desc = desc_of(EX_LABEL_CLASS);
    /* quotes are text, lines may end in CR LF, the last one needs no end, empty lines at the end do not count */
    read_rows(&rows,
              put_text(p, "a.tsv", "\xef\xbb\xbfsentence\tlabel\r\n\"quoted\" it's \t1\r\nsecond \"one\t0\n 	1\n\n \n"),
              &desc);
    assert_int_equal(rows.count, 3);
    assert_string_equal(rows.row[0].text, "\"quoted\" it's ");
    assert_string_equal(rows.row[1].text, "second \"one");
    assert_string_equal(rows.row[2].text, " ");
    assert_int_equal(rows.row[0].label, 1);
    assert_int_equal(rows.row[1].label, 0);
    assert_int_equal(rows.row[1].line, 3);
    assert_int_equal(rows.row[1].bytes, 11);
    assert_int_equal(ex_labels_count(&rows.labels), 2);
    assert_string_equal(ex_labels_name(&rows.labels, 1), "1");
    assert_false(rows.has_pair);
    assert_int_equal(rows.replaced, 0);
    ex_rows_free(&rows);
}

static void test_tsv_columns(void **state)
{
    place *p = (place *)*state;
    ex_rows rows;
    ex_rows_desc desc = desc_of(EX_LABEL_CLASS);
    read_rows(&rows, put_text(p, "mrpc.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tfirst\tsecond\n"), &desc);
    assert_string_equal(rows.row[0].text, "first");
    assert_string_equal(rows.row[0].pair, "second");
    assert_true(rows.has_pair);
    ex_rows_free(&rows);
    read_rows(
        &rows,
        put_text(
            p, "qnli.tsv",
            "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWhy?\tSo.\tnot_entailment\n2\tA\tB\tentailment\n"),
        &desc);
    assert_string_equal(rows.row[0].text, "Who?");
    assert_string_equal(rows.row[0].pair, "He.");
    assert_int_equal(rows.row[1].label, 1);
    assert_int_equal(rows.row[2].label, 0);
    assert_string_equal(ex_labels_name(&rows.labels, 1), "not_entailment");
    ex_rows_free(&rows);
    desc.no_header = true;                       /* CoLA */
    desc.text_column = "#4";
    desc.label_column = "#2";
    read_rows(&rows, put_text(p, "cola.tsv", "gj04\t1\t\tThey drank the pub dry.\ngj04\t0\t*\tThey drank the pub.\textra\n"),
              &desc);
    assert_int_equal(rows.count, 2);
    assert_string_equal(rows.row[1].text, "They drank the pub.");
    ex_rows_free(&rows);
    desc = desc_of(EX_LABEL_SCORE);
    read_rows(&rows, put_text(p, "stsb.tsv", "sentence1\tsentence2\tscore\na\tb\t3.25\nc\td\t-0.5e1\n"), &desc);
    near((double)rows.row[0].score, 3.25, 0);
    near((double)rows.row[1].score, -5, 0);
    ex_rows_free(&rows);
    desc = desc_of(EX_LABEL_NONE);
    desc.pair_column = "";
    desc.limit = 1;
    read_rows(&rows, p->path, &desc);
    assert_int_equal(rows.count, 1);
    assert_null(rows.row[0].pair);
    ex_rows_free(&rows);
}

static void test_labels(void **state)
{
    place *p = (place *)*state;
    ex_rows train, dev;
    ex_rows_desc desc = desc_of(EX_LABEL_CLASS);
    ex_error error = {""};
    /* whole numbers are classes in their own order, also where they do not begin at 0 and 10 comes before 9 */
    read_rows(&train, put_text(p, "train.tsv", "sentence\tlabel\na\t10\nb\t-1\nc\t9\nd\t10\n"), &desc);
    assert_string_equal(ex_labels_name(&train.labels, 0), "-1");
    assert_string_equal(ex_labels_name(&train.labels, 2), "10");
    assert_int_equal(train.row[0].label, 2);
    assert_int_equal(train.row[2].label, 1);
    desc.labels = &train.labels;
    read_rows(&dev, put_text(p, "dev.jsonl", "{\"sentence\": \"x\", \"label\": 9}\n\n{\"label\": \"10\", \"sentence\": \"y\"}\n"),
              &desc);
    assert_int_equal(dev.row[0].label, 1);
    assert_int_equal(dev.row[1].label, 2);
    assert_int_equal(ex_labels_count(&dev.labels), 3);
    ex_rows_free(&dev);
    assert_false(ex_rows_read(&dev, put_text(p, "dev.tsv", "sentence\tlabel\nx\t9\ny\t7\n"), &desc, &error));
    says(&error, "dev.tsv:3: label \"7\" is none of the 3 known ones (-1, 9, 10)");
    ex_rows_free(&train);
}

static void test_row_errors(void **state)
{
    static const struct { const char *name, *text; ex_label_kind kind; const char *says;
    } cases[] = {{"a.tsv", "", EX_LABEL_NONE, "a.tsv: expected rows of text, found an empty file"},
                 {"a.tsv", "\n \n\t\n", EX_LABEL_NONE, "found an empty file"},
                 {"a.tsv", "sentence\tlabel\n", EX_LABEL_CLASS, "a.tsv: expected rows after the header line, found none"},
                 {"a.tsv", "x\ty\n1\t2\n", EX_LABEL_NONE, "a.tsv:1: expected a column for the text: one of \"sentence1\""},
                 {"a.tsv", "x\ty\n1\t2\n", EX_LABEL_NONE, "found the columns \"x\", \"y\""},
                 {"a.tsv", "sentence\ty\n1\t2\n", EX_LABEL_CLASS, "expected a column for the label: one of \"label\""},
                 {"a.tsv", "sentence\tlabel\na\t1\nb\n", EX_LABEL_CLASS, "a.tsv:3: expected at least 2 columns, found 1"},
                 {"a.tsv", "sentence\tlabel\na\t1\nb\tc\t1\n", EX_LABEL_CLASS,
                  "a.tsv:3: expected at most the 2 columns of the header line, found 3"},
                 {"a.tsv", "sentence\tlabel\na\t1\n\nb\t1\n", EX_LABEL_CLASS,
                  "a.tsv:3: expected 2 column(s), found an empty line"},
                 {"a.tsv", "sentence\tlabel\na\t\n", EX_LABEL_CLASS, "a.tsv:2: expected a label, found nothing"},
                 {"a.tsv", "sentence\tscore\na\t1.5x\n", EX_LABEL_SCORE, "a.tsv:2: expected a number as score, found \"1.5x\""},
                 {"a.tsv", "sentence\tscore\na\tnan\n", EX_LABEL_SCORE, "found \"nan\""},
                 {"a.tsv", "sentence\tscore\na\t0x1p3\n", EX_LABEL_SCORE, "found \"0x1p3\""},
                 {"a.tsv", "sentence\tscore\na\t1e39\n", EX_LABEL_SCORE, "found \"1e39\""},
                 {"a.jsonl", "{\"sentence\": \"a\"}\n[1]\n", EX_LABEL_NONE, "a.jsonl:2: expected an object, found an array"},
                 {"a.jsonl", "{\"sentence\": \"a\"}\n{\"sentence\": 3}\n", EX_LABEL_NONE,
                  "a.jsonl:2: expected \"sentence\" with a string, found a number"},
                 {"a.jsonl", "{\"sentence\": \"a\",}\n", EX_LABEL_NONE, "a.jsonl:1: not valid JSON at byte 17"},
                 {"a.jsonl", "{\"words\": \"a\"}\n", EX_LABEL_NONE, "a.jsonl:1: expected a name for the text"},
                 {"a.jsonl", "{\"sentence\": \"a\", \"label\": 1}\n{\"sentence\": \"a\"}\n", EX_LABEL_CLASS,
                  "a.jsonl:2: expected \"label\" with a number or a string, found nothing"},
                 {"a.jsonl", "{\"sentence\": \"a\", \"label\": []}\n", EX_LABEL_CLASS, "found an array"}};
    place *p = (place *)*state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const ex_rows_desc desc = desc_of(cases[i].kind);
        ex_error error = {""};
        ex_rows rows;
        if (ex_rows_read(&rows, put_text(p, cases[i].name, cases[i].text), &desc, &error)) fail_msg("case %zu was accepted", i);
        says(&error, cases[i].says);
        assert_true(rows.count == 0 && rows.row == NULL && rows.buffer == NULL);
    }
}

static void test_row_errors_named(void **state)
{
    place *p = (place *)*state;
    ex_rows_desc desc = desc_of(EX_LABEL_NONE);
    ex_error error = {""};
    ex_rows rows;
    ex_text many = {NULL, 0, 0};
    desc.text_column = "body";
    assert_false(ex_rows_read(&rows, put_text(p, "a.tsv", "sentence\tlabel\na\t1\n"), &desc, &error));
    says(&error, "expected a column for the text: \"body\"; found the columns \"sentence\", \"label\"");
    desc.text_column = "#3";
    assert_false(ex_rows_read(&rows, p->path, &desc, &error));
    says(&error, "\"#3\"");
    desc.text_column = NULL;
    desc.no_header = true;
    assert_false(ex_rows_read(&rows, p->path, &desc, &error));
    says(&error, "must be given by its number");
    desc.text_column = "#3";
    assert_false(ex_rows_read(&rows, p->path, &desc, &error));
    says(&error, "a.tsv:1: expected at least 3 columns, found 2");
    ex_text_put(&many, "sentence\tlabel\n");
    for (int i = 0; i < 1500; i++) ex_text_format(&many, "x\tname %d\n", i);
    desc = desc_of(EX_LABEL_CLASS);
    assert_false(ex_rows_read(&rows, put(p, "b.tsv", many.at, many.length), &desc, &error));
    says(&error, "more than 1000 different labels");
    assert_false(ex_rows_read(&rows, put(p, "c.tsv", "sentence\na\0b\n", 13), &desc, &error));
    assert_false(ex_rows_read(&rows, "/nonexistent/file.tsv", &desc, &error));
    says(&error, "cannot be opened");
    ex_text_free(&many);
}

static void test_bad_utf8(void **state)
{
    place *p = (place *)*state;
    ex_rows rows;
    const ex_rows_desc desc = desc_of(EX_LABEL_NONE);
    ex_error error = {""};
    read_rows(&rows, put_text(p, "a.tsv", "sentence\nok\n\xff\xfe\n\xe2\x82\n"), &desc);
    assert_int_equal(rows.count, 3);
    assert_int_equal(rows.replaced, 3);
    assert_string_equal(rows.row[1].text, "\xef\xbf\xbd\xef\xbf\xbd");
    ex_rows_free(&rows);
    assert_false(ex_rows_read(&rows, put(p, "b.tsv", "sentence\na\0b\n", 13), &desc, &error));
    says(&error, "b.tsv:2: expected text, found a NUL byte");
}

/* ---- data sets, batches, their order ---- */

static ex_tokenizer *tokenizer(void)
{
    ex_error error = {""};
    ex_tokenizer *t = ex_tokenizer_load(WORDPIECE, &error);
    if (t == NULL) fail_msg("%s", error.text);
    return t;
}

/* n rows "a", "a a", ... with label i % 3. */
static void make_set(place *p, int n, ex_dataset *set, int32_t max_length)
{
    ex_text text = {NULL, 0, 0};
    ex_rows rows;
    ex_error error = {""};
    ex_tokenizer *t = tokenizer();
    const ex_rows_desc desc = desc_of(EX_LABEL_CLASS);
    ex_text_put(&text, "sentence\tlabel\n");
    for (int i = 0; i < n; i++) {
        for (int k = 0; k <= i % 17; k++) ex_text_put(&text, "a ");
        ex_text_format(&text, "\t%d\n", i % 3);
    }
    read_rows(&rows, put(p, "set.tsv", text.at, text.length), &desc);
    if (!ex_dataset_rows(set, &rows, t, max_length, &error)) fail_msg("%s", error.text);
    ex_rows_free(&rows);
    ex_text_free(&text);
    ex_tokenizer_free(t);
}

static void test_dataset(void **state)
{
    place *p = (place *)*state;
    ex_dataset set;
    make_set(p, 40, &set, 10);
    assert_int_equal(set.count, 40);
    assert_int_equal(set.longest, 10);
    assert_null(set.types);
    assert_null(set.targets);
    for (int i = 0; i < 40; i++) {
        assert_int_equal(set.starts[i + 1] - set.starts[i], i % 17 + 3 < 10 ? i % 17 + 3 : 10);
        assert_int_equal(set.labels[i], i % 3);
        assert_int_equal(set.tokens[set.starts[i]], 2);
        assert_int_equal(set.tokens[set.starts[i + 1] - 1], 3);
    }
    assert_int_equal(set.truncated, 18);
    ex_dataset_free(&set);
}

static void test_batches(void **state)
{
    place *p = (place *)*state;
    ex_rows rows;
    ex_dataset set;
    ex_tokenizer *t = tokenizer();
    ex_error error = {""};
    ex_batch batch = {0};
    apt_batch view;
    const int64_t index[2] = {1, 0};
    const ex_rows_desc desc = desc_of(EX_LABEL_SCORE);
    read_rows(&rows, put_text(p, "a.tsv", "sentence1\tsentence2\tscore\na\tthe a\t1\na a\tthe\t2.5\n"), &desc);
    assert_true(ex_dataset_rows(&set, &rows, t, 0, &error));
    assert_non_null(set.types);
    ex_batch_gather(&batch, &set, index, 2);
    view = ex_batch_apt(&batch);
    assert_int_equal(view.sequences, 2);
    assert_int_equal(view.offsets[0], 0);
    assert_int_equal(view.offsets[1], 6);
    assert_int_equal(view.offsets[2], 12);
    assert_int_equal(view.types[3], 0);
    assert_int_equal(view.types[4], 1);
    assert_int_equal(view.types[5], 1);
    assert_null(view.labels);
    near((double)view.targets[0], 2.5, 0);
    near((double)view.targets[1], 1, 0);
    assert_int_equal(batch.index[0], 1);
    ex_rows_free(&rows);
    ex_dataset_free(&set);
    make_set(p, 5, &set, 0);                     /* the same batch with another kind of data set */
    ex_batch_gather(&batch, &set, index, 2);
    view = ex_batch_apt(&batch);
    assert_null(view.types);
    assert_null(view.targets);
    assert_int_equal(view.labels[0], 1);
    ex_batch_free(&batch);
    ex_dataset_free(&set);
    ex_tokenizer_free(t);
}

static void test_permute(void **state)
{
    static const int64_t counts[] = {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097};
    int64_t place_of_0[20] = {0}, moved = 0;
    (void)state;
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        bool *seen = (bool *)ex_alloc((size_t)counts[c], sizeof(bool));
        for (int64_t i = 0; i < counts[c]; i++) {
            const int64_t to = ex_permute(7, 3, counts[c], i);
            assert_true(to >= 0 && to < counts[c] && !seen[to]);
            seen[to] = true;
        }
        free(seen);
    }
    /* every element comes first about equally often: 20 cells of 1000, standard deviation 31 */
    for (int64_t epoch = 0; epoch < 20000; epoch++) place_of_0[ex_permute(1, epoch, 20, 0)]++;
    for (int i = 0; i < 20; i++) assert_true(place_of_0[i] > 840 && place_of_0[i] < 1160);
    for (int64_t i = 0; i < 1000; i++) moved += ex_permute(1, 0, 1000, i) != ex_permute(1, 1, 1000, i);
    assert_true(moved > 980);
    for (int64_t i = 0, near_by = 0; i < 999; i++) {       /* neighbours do not stay neighbours */
        near_by += llabs(ex_permute(1, 0, 1000, i) - ex_permute(1, 0, 1000, i + 1)) < 10;
        assert_true(near_by < 60);
    }
}

/* Every row once an epoch, with and without groups of similar length; a resumed run needs to know only the cursor. */
static void test_feed(void **state)
{
    place *p = (place *)*state;
    ex_dataset set;
    make_set(p, 23, &set, 0);
    for (int by_length = 0; by_length < 2; by_length++) {
        ex_feed a, b;
        int seen[23] = {0}, moved = 0;
        memset(&a, 0, sizeof a);
        a.source = ex_dataset_source(&set);
        a.batch = 5;
        a.seed = 11;
        a.by_length = by_length == 1;
        assert_int_equal(ex_feed_batches(&a), 5);
        for (int i = 0; i < 15; i++) {
            const ex_batch *batch = ex_feed_next(&a);
            assert_int_equal(batch->sequences, i % 5 == 4 ? 3 : 5);
            assert_int_equal(a.at.epoch, i / 5);
            for (int s = 0; s < batch->sequences; s++) {
                seen[batch->index[s]]++;
                moved += batch->index[s] != 5 * (i % 5) + s;
            }
            if (i % 5 == 4) for (int r = 0; r < 23; r++) assert_int_equal(seen[r], i / 5 + 1);
            if (i != 7) continue;
            b = a;
            b.order = NULL;
            b.ordered = 0;
            memset(&b.rows, 0, sizeof b.rows);
            b.at.index -= 5;
            assert_memory_equal(ex_feed_next(&b)->index, batch->index, 5 * sizeof(int64_t));
            ex_feed_free(&b);
        }
        assert_true(moved > 40);
        ex_feed_free(&a);
    }
    ex_dataset_free(&set);
}

/* ---- SQuAD ---- */

#define SQUAD(version, qas)                                                                          \
    "{\"version\":\"" version "\",\"data\":[{\"title\":\"T\",\"paragraphs\":[{\"context\":"           \
    "\"The caf\\u00e9 was old. \\ud83d\\ude00 The wolf said that the king's daughter went to the old house" \
    " in the wood.\",\"qas\":[" qas "]}]}]}"

static void read_squad(ex_squad *squad, const char *path)
{
    ex_error error = {""};
    if (!ex_squad_read(squad, path, &error)) fail_msg("%s", error.text);
}

static void test_squad_read(void **state)
{
    place *p = (place *)*state;
    ex_squad squad;
    /* starts count characters: an accent and an emoji stand before "wolf" */
    read_squad(&squad,
               put_text(p, "a.json",
                        SQUAD("1.1", "{\"id\":\"1\",\"question\":\"Who?\",\"answers\":[{\"text\":\"wolf\",\"answer_start\":24},"
                                     "{\"text\":\"The wolf\",\"answer_start\":20}]},{\"id\":\"2\",\"question\":\"x\"}")));
    assert_int_equal(squad.count, 2);
    assert_false(squad.version2);
    assert_int_equal(squad.question[0].answers, 2);
    assert_int_equal(squad.question[1].answers, 0);
    assert_false(squad.question[1].impossible);
    assert_int_equal(squad.answer[0].start, 28);
    assert_memory_equal(squad.question[0].context + squad.answer[0].start, "wolf", 4);
    assert_string_equal(squad.question[0].title, "T");
    ex_squad_free(&squad);
    read_squad(&squad, put_text(p, "b.json",
                                SQUAD("v2.0", "{\"id\":\"1\",\"question\":\"Who?\",\"is_impossible\":true,\"answers\":[],"
                                              "\"plausible_answers\":[{\"text\":\"nonsense\",\"answer_start\":2}]}")));
    assert_true(squad.version2 && squad.question[0].impossible);
    assert_int_equal(squad.question[0].answers, 0);
    ex_squad_free(&squad);
}

static void test_squad_errors(void **state)
{
    static const struct { const char *text, *says;
    } cases[] = {{"[]", "s.json:1: expected an object, found an array"},
                 {"{\"version\":\"1.1\"}", "expected \"data\" with an array, found nothing"},
                 {"{\"data\":[]}", "expected questions, found none"},
                 {"{\"data\":[3]}", "expected an article, found a number"},
                 {"{\"data\":[{}]}", "expected \"paragraphs\" with an array"},
                 {"{\"data\":[{\"paragraphs\":[{\"qas\":[]}]}]}", "expected \"context\" with a string"},
                 {SQUAD("1", "{\"question\":\"q\"}"), "expected \"id\" with a string"},
                 {SQUAD("1", "{\"id\":\"q7\"}"), "expected \"question\" with a string"},
                 {SQUAD("1", "{\"id\":\"q7\",\"question\":\"q\",\"answers\":{}}"), "expected \"answers\" with an array"},
                 {SQUAD("1", "{\"id\":\"q7\",\"question\":\"q\",\"answers\":[{\"text\":\"wolf\"}]}"),
                  "question q7: expected \"answer_start\""},
                 {SQUAD("1", "{\"id\":\"q7\",\"question\":\"q\",\"answers\":[{\"text\":\"wolf\",\"answer_start\":25}]}"),
                  "question q7: expected the answer \"wolf\" at character 25 of its context, found \"olf said"},
                 {SQUAD("1", "{\"id\":\"q7\",\"question\":\"q\",\"answers\":[{\"text\":\"wolf\",\"answer_start\":2000}]}"),
                  "at character 2000 of its context, found \"\""},
                 {SQUAD("1",
                        "{\"id\":\"q7\",\"question\":\"q\",\"answers\":[{\"text\":\"wood. And more\",\"answer_start\":85}]}"),
                  "question q7: expected the answer"}};
    place *p = (place *)*state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_error error = {""};
        ex_squad squad;
        if (ex_squad_read(&squad, put_text(p, "s.json", cases[i].text), &error)) fail_msg("case %zu was accepted", i);
        says(&error, cases[i].says);
        assert_true(squad.count == 0 && squad.buffer == NULL);
    }
}

/* Windows, labels and the way back: scores that point at the labels must give the answer. */
static void test_squad_windows(void **state)
{
    place *p = (place *)*state;
    ex_squad squad;
    ex_dataset set;
    ex_error error = {""};
    ex_tokenizer *t = tokenizer();
    const ex_squad_desc desc = {30, 8, 4};
    ex_answers *answers;
    ex_batch batch = {0};
    ex_squad_score score;
    int holding = 0;
    read_squad(
        &squad,
        put_text(
            p, "a.json",
            SQUAD(
                "v2.0",
                "{\"id\":\"1\",\"question\":\"  What did the wolf say to whom and why?\",\"answers\":"
                "[{\"text\":\"king's daughter\",\"answer_start\":43}]},{\"id\":\"2\",\"question\":\"Why?\","
                "\"is_impossible\":true,\"answers\":[]}")));
    if (!ex_dataset_squad(&set, &squad, t, &desc, &error)) fail_msg("%s", error.text);
    if (set.count < 4 || set.labels_each != 2 || set.longest != 30)
        fail_msg("%lld windows, longest %d", (long long)set.count, set.longest);
    answers = ex_answers_create(&squad, &set, 12);
    for (int64_t w = set.count; w-- > 0;) {      /* from the last window to the first */
        float *logits;
        int32_t n;
        ex_batch_gather(&batch, &set, &w, 1);
        n = batch.offsets[1];
        logits = (float *)ex_alloc((size_t)(2 * n), sizeof(float));
        assert_int_equal(set.context_end[w] - set.context_first[w], n - set.context_first[w] - 1);
        if (set.question[w] == 1) assert_true(batch.labels[0] == 0 && batch.labels[1] == 0);
        holding += batch.labels[0] > 0;
        logits[batch.labels[0]] = 5;
        logits[n + batch.labels[1]] = 5;
        ex_answers_add(answers, &batch, logits);
        free(logits);
    }
    assert_true(holding >= 1);
    assert_true(ex_squad_score_all(&score, &squad, answers, 0));
    near(score.exact, 100, 0);
    near(score.f1, 100, 0);
    near(score.null_exact, 100, 0);
    assert_int_equal(score.answer_total, 1);
    put_text(p, "pred.json", "");
    assert_true(ex_answers_write(answers, p->path, 0, &error));
    {
        char *text = get(p->path);
        assert_string_equal(text, "{\n \"1\": \"king's daughter\",\n \"2\": \"\"\n}\n");
        free(text);
    }
    assert_true(ex_answers_write(answers, p->path, 1e9, &error));        /* never "no answer" */
    ex_batch_free(&batch);
    ex_answers_free(answers);
    ex_dataset_free(&set);
    ex_squad_free(&squad);
    ex_tokenizer_free(t);
}

/* The official script's answers, worked out with it. */
static void test_squad_compare(void **state)
{
    static const struct { const char *predicted, *answer; double exact, f1;
    } cases[] = {{"The Wolf.", "wolf", 1, 1},
                 {"a wolf an the", "Wolf", 1, 1},
                 {"theatre", "the atre", 0, 0},
                 {"old house", "the old house in the wood", 0, 2.0 / 3},
                 {"", "", 1, 1},
                 {"x", "", 0, 0},
                 {"the", "", 1, 1},
                 {"a b b", "b b c", 0, 0.8},
                 {"U.S.", "us", 1, 1},
                 {"\xc3\x89t\xc3\xa9", "\xc3\xa9t\xc3\xa9", 1, 1},
                 {"one-two", "one two", 0, 0},
                 {"x\xc2\xa0y", "x y", 1, 1},
                 {"an_x", "x", 0, 0},
                 {"the-x", "thex", 1, 1},
                 {"caf\xc3\xa9 a\xcc\x81", "caf\xc3\xa9 \xcc\x81", 1, 1}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double exact, f1;
        ex_squad_compare(cases[i].predicted, strlen(cases[i].predicted), cases[i].answer, strlen(cases[i].answer), &exact, &f1);
        if (fabs(exact - cases[i].exact) > 0 || fabs(f1 - cases[i].f1) > 1e-12)
            fail_msg("\"%s\", \"%s\": %g %g", cases[i].predicted, cases[i].answer, exact, f1);
    }
}

/* ---- metrics ---- */

static void test_metrics(void **state)
{
    const int32_t predicted[8] = {0, 1, 1, 2, 2, 2, 0, 1}, label[8] = {0, 1, 0, 2, 1, 2, -1, 1},
                  constant[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    const float scores[4] = {1, 3, 2, 2};
    (void)state;
    near(ex_accuracy(predicted, label, 8), 5.0 / 7, 1e-15);
    near(ex_f1_binary(predicted, label, 8, 1), 2.0 / 3, 1e-15);          /* TP 2, FP 1, FN 1 */
    near(ex_f1_macro(predicted, label, 8, 4), (2.0 / 3 + 2.0 / 3 + 0.8) / 3, 1e-15);     /* class 3 does not occur */
    near(ex_f1_binary(constant, predicted, 8, 3), 0, 0);
    /* binary: TP 2, TN 1, FP 1, FN 2 */
    {
        const int32_t p[6] = {1, 1, 1, 0, 0, 0}, l[6] = {1, 1, 0, 0, 1, 1};
        near(ex_matthews(p, l, 6, 2), (2.0 * 1 - 1 * 2) / sqrt(3.0 * 4 * 2 * 3), 1e-15);
        near(ex_matthews(p, p, 6, 2), 1, 1e-15);
        near(ex_matthews(constant, l, 6, 2), 0, 0);
    }
    near(ex_matthews(predicted, label, 8, 3), (5.0 * 7 - 17) / sqrt((49.0 - 19) * (49 - 17)),
         1e-15); /* sums of squares and products */
    assert_int_equal(ex_argmax(scores, 4), 1);
    near(ex_softmax_best(scores, 4, 1), 1 / (1 + 2 * exp(-1.0) + exp(-2.0)), 1e-12);
    near(ex_accuracy(predicted, label, 0), 0, 0);
}

static void test_correlations(void **state)
{
    const float x[6] = {1, 2, 3, 4, 5, 6}, y[6] = {2, 1, 4, 3, 7, 5}, flat[6] = {2, 2, 2, 2, 2, 2}, down[6] = {6, 5, 4, 3, 2, 1};
    const float ties[6] = {1, 2, 2, 3, 3, 3}, steep[6] = {1, 10, 100, 1000, 10000, 100000},
                large[3] = {1e8f, 1e8f + 8, 1e8f + 16}, small[3] = {1, 2, 3};
    (void)state;
    near(ex_pearson(x, x, 6), 1, 1e-15);
    near(ex_pearson(x, down, 6), -1, 1e-15);
    near(ex_pearson(x, y, 6), 16.0 / sqrt(17.5 * (104.0 - 484.0 / 6)), 1e-12);
    near(ex_pearson(x, flat, 6), 0, 0);
    near(ex_pearson(large, small, 3), 1, 1e-12);
    near(ex_spearman(x, steep, 6), 1, 1e-15);
    near(ex_spearman(x, y, 6), 1 - 6.0 * (1 + 1 + 1 + 1 + 1 + 1) / (6 * 35), 1e-12);
    /* ranks 1, 2.5, 2.5, 5, 5, 5 against 1 ... 6 */
    near(ex_spearman(x, ties, 6), 15 / sqrt(17.5 * 15), 1e-12);
    near(ex_spearman(flat, x, 6), 0, 0);
    near(ex_spearman(x, y, 0), 0, 0);
}

/* ---- options ---- */

typedef struct given { const char *text; bool flag, on; int64_t whole; double real; int32_t choice; } given;

static ex_args_result parse_args(given *g, ex_error *error, const char *const *words, bool *steps_given)
{
    const ex_arg table[] = {EX_GROUP("Group"),
                            EX_REQUIRED(EX_TEXT("model", "DIR", &g->text, "a folder")),
                            EX_INT("steps", "N", &g->whole, 1, 1000000, "how many"),
                            EX_REAL("learning-rate", "X", &g->real, 0, 1, "a rate"),
                            EX_CHOICE("method", &g->choice, "apt|lora|full", "which"),
                            EX_FLAG("resume", &g->flag, "go on"),
                            EX_FLAG("grow", &g->on, "let them grow"),
                            EX_ARGS_END};
    const ex_args_about about = {"test", "Tests.", "[options]", NULL};
    char *argv[16];
    char *copies[16] = {NULL};
    int argc = 1;
    ex_args_result result;
    memset(g, 0, sizeof *g);
    g->whole = 100;
    g->on = true;
    argv[0] = copies[0] = ex_copy("test", 4);
    for (; words[argc - 1] != NULL; argc++) argv[argc] = copies[argc] = ex_copy(words[argc - 1], strlen(words[argc - 1]));
    result = ex_args_parse(table, &about, argc, argv, error);
    if (steps_given != NULL) *steps_given = ex_args_given(table, "steps");
    g->text = g->text != NULL ? "given" : NULL;  /* the copies go */
    for (int i = 0; i < argc; i++) free(copies[i]);
    return result;
}

static void test_args(void **state)
{
    static const char *const one[] = {"--model",  "m",    "--steps=1e3", "--learning_rate", "0.25",
                                      "--method", "full", "--resume",    "--no-grow",       NULL};
    static const char *const two[] = {"--model=m", "--grow=false", "--grow", "--resume=no", "--", NULL};
    given g;
    ex_error error = {""};
    bool steps = false;
    (void)state;
    assert_int_equal(parse_args(&g, &error, one, &steps), EX_ARGS_OK);
    assert_true(steps && g.text != NULL && g.whole == 1000 && g.choice == 2 && g.flag && !g.on);
    near(g.real, 0.25, 0);
    assert_int_equal(parse_args(&g, &error, two, &steps), EX_ARGS_OK);
    assert_true(!steps && g.whole == 100 && g.on && !g.flag);
}

static void test_arg_errors(void **state)
{
    static const struct { const char *words[5]; const char *says; } cases[] = {
        {{NULL}, "--model DIR is required: a folder"},
        {{"--model", "m", "--stpes", "5", NULL}, "--stpes: there is no such option; did you mean --steps?"},
        {{"--model", "m", "--learn", "5", NULL}, "did you mean --learning-rate?"},
        {{"--model", "m", "--xyzzy", NULL}, "--xyzzy: there is no such option"},
        {{"--model", "m", "--steps", "0", NULL}, "--steps: expected a whole number from 1 to 1000000, found \"0\""},
        {{"--model", "m", "--steps", "1.5", NULL}, "found \"1.5\""},
        {{"--model", "m", "--steps", "99999999999999999999", NULL}, "--steps: expected"},
        {{"--model", "m", "--steps", "", NULL}, "found \"\""},
        {{"--model", "m", "--learning-rate", "nan", NULL}, "--learning-rate: expected a number from 0 to 1, found \"nan\""},
        {{"--model", "m", "--method=lara", NULL}, "--method: expected one of apt|lora|full, found \"lara\""},
        {{"--model", "m", "--resume=perhaps", NULL}, "--resume: expected true or false, found \"perhaps\""},
        {{"--model", "m", "--no-steps", NULL}, "--no-steps: there is no such option"},
        {{"--model", "--steps", "5", NULL}, "--model: expected a value (DIR), found the option --steps"},
        {{"--model", NULL}, "--model: expected a value (DIR), found the end"},
        {{"model", NULL}, "\"model\": expected an option that begins with --"},
        {{"--model", "m", "--", "x", NULL}, "\"x\": expected an option"}
    };
    given g;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_error error = {""};
        assert_int_equal(parse_args(&g, &error, cases[i].words, NULL), EX_ARGS_ERROR);
        says(&error, cases[i].says);
    }
}

static void test_args_help(void **state)
{
    place *p = (place *)*state;
    given g = {"x.tsv", false, true, 5, 2e-4, 1};
    const ex_arg table[] =
        {EX_GROUP("Data"),
         EX_TEXT("train", "FILE", &g.text, "rows"),
         EX_REQUIRED(EX_INT("steps", "N", &g.whole, 1, 9, "how many")),
         EX_REAL("lr", "X", &g.real, 0, 1, "a rate"),
         EX_CHOICE("method", &g.choice, "apt|lora", "which"),
         EX_FLAG("resume", &g.flag, "go on"),
         EX_FLAG("grow", &g.on,
                 "a help text that is so long that it cannot stand in one line of one hundred columns and must be wrapped"),
         EX_ARGS_END};
    const ex_args_about about = {"test", "Tests.", "--steps N [options]", "  test --steps 3"};
    ex_log log = {0};
    ex_error error = {""};
    FILE *file = fopen(put_text(p, "help", ""), "wb");
    char *text, *line;
    assert_non_null(file);
    ex_args_help(table, &about, file);
    fclose(file);
    text = get(p->path);
    assert_non_null(strstr(text, "test - Tests.\n\nUsage: test --steps N [options]\n\nData\n"));
    assert_non_null(strstr(text, "rows [x.tsv]\n"));
    assert_non_null(strstr(text, "how many (required)\n"));
    assert_non_null(strstr(text, "a rate [0.0002]\n"));
    assert_non_null(strstr(text, "--method apt|lora"));
    assert_non_null(strstr(text, "which [lora]\n"));
    assert_non_null(strstr(text, "go on\n"));
    assert_non_null(strstr(text, "--[no-]grow"));
    assert_non_null(strstr(text, "Examples\n  test --steps 3\n"));
    for (line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) assert_true(strlen(line) <= 100);
    free(text);
    ex_log_begin(&log, "settings");
    ex_args_log(table, &log);
    assert_true(ex_log_end(&log, &error));
    assert_string_equal(
        log.line.at,
        "{\"event\":\"settings\",\"train\":\"x.tsv\",\"steps\":5,\"lr\":0.0002,\"method\":\"lora\",\"resume\":false,"
        "\"grow\":true}\n");
    ex_log_close(&log);
}

/* ---- log ---- */

static void log_step(ex_log *log, int64_t step)
{
    ex_error error = {""};
    ex_log_begin(log, "step");
    ex_log_int(log, "step", step);
    ex_log_real(log, "loss", 0.5);
    if (!ex_log_end(log, &error)) fail_msg("%s", error.text);
}

static void test_log_file(void **state)
{
    place *p = (place *)*state;
    const int32_t ranks[3] = {8, 0, -1};
    ex_log log;
    ex_error error = {""};
    char *text;
    test_join(p->path, sizeof p->path, p->dir, "m.jsonl");
    assert_true(ex_log_open(&log, p->path, -1, &error));
    ex_log_begin(&log, "set\"tings");
    ex_log_text(&log, "name", "a\n\"b\"\\\x01");
    ex_log_text(&log, "none", NULL);
    ex_log_bool(&log, "yes", true);
    ex_log_real(&log, "nan", strtod("nan", NULL));
    ex_log_ints(&log, "ranks", ranks, 3);
    ex_log_ints(&log, "empty", NULL, 0);
    assert_true(ex_log_end(&log, &error));
    for (int64_t step = 1; step <= 4; step++) log_step(&log, step);
    text = get(p->path);                         /* flushed while the log is open */
    assert_non_null(strstr(
        text,
        "{\"event\":\"set\\\"tings\",\"name\":\"a\\n\\\"b\\\"\\\\\\u0001\",\"none\":null,\"yes\":true,"
        "\"nan\":null,\"ranks\":[8,0,-1],\"empty\":[]}\n"));
    assert_non_null(strstr(text, "{\"event\":\"step\",\"step\":4,\"loss\":0.5}\n"));
    free(text);
    ex_log_close(&log);
}

static void test_log_resume(void **state)
{
    place *p = (place *)*state;
    ex_log log;
    ex_error error = {""};
    char *text;
    put_text(
        p, "m.jsonl",
        "{\"event\":\"settings\"}\n{\"event\":\"step\",\"step\":1}\n{\"event\":\"step\",\"step\":2}\n"
        "{\"event\":\"evaluate\",\"step\":3}\n{\"event\":\"st");
    assert_true(ex_log_open(&log, p->path, 2, &error));
    log_step(&log, 3);
    ex_log_close(&log);
    text = get(p->path);
    assert_string_equal(
        text,
        "{\"event\":\"settings\"}\n{\"event\":\"step\",\"step\":1}\n{\"event\":\"step\",\"step\":2}\n"
        "{\"event\":\"step\",\"step\":3,\"loss\":0.5}\n");
    free(text);
    put_text(p, "m.jsonl", "{\"event\":\"step\",\"step\":1}\n{\"event\":\n{\"event\":\"step\",\"step\":2}\n");
    assert_false(ex_log_open(&log, p->path, 5, &error));
    says(&error, "m.jsonl:2: not valid JSON");
    test_join(p->path, sizeof p->path, p->dir, "fresh.jsonl");
    assert_true(ex_log_open(&log, p->path, 5, &error));       /* nothing there: a new file */
    ex_log_close(&log);
    test_join(p->path, sizeof p->path, p->dir, "no/such/dir.jsonl");
    assert_false(ex_log_open(&log, p->path, -1, &error));
}

/* A line that does not fit is taken away again, and can be written once there is room. */
static void test_log_half_line(void **state)
{
    place *p = (place *)*state;
    ex_log log;
    ex_error error = {""};
    struct rlimit before, tight;
    char *text;
    test_join(p->path, sizeof p->path, p->dir, "half.jsonl");
    assert_true(ex_log_open(&log, p->path, -1, &error));
    log_step(&log, 1);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    tight = before;
    tight.rlim_cur = 60;                         /* of 40 bytes a line */
    void (*const handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
    ex_log_begin(&log, "step");
    ex_log_int(&log, "step", 2);
    ex_log_real(&log, "loss", 0.5);
    const bool first = ex_log_end(&log, &error), second = ex_log_write(&log, &error);
    text = get(p->path);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    (void)signal(SIGXFSZ, handler);
    assert_false(first || second);
    says(&error, "half.jsonl: cannot be written");
    assert_string_equal(text, "{\"event\":\"step\",\"step\":1,\"loss\":0.5}\n");
    free(text);
    assert_true(ex_log_write(&log, &error));
    text = get(p->path);
    assert_string_equal(text, "{\"event\":\"step\",\"step\":1,\"loss\":0.5}\n{\"event\":\"step\",\"step\":2,\"loss\":0.5}\n");
    free(text);
    ex_log_close(&log);
}

/* ---- what is tried again ---- */

typedef struct tries { int32_t calls, fails; apt_result result; } tries;

static apt_result try_it(void *user)
{
    tries *t = (tries *)user;
    return t->calls++ < t->fails ? t->result : APT_OK;
}

static void test_retry(void **state)
{
    static const struct { double seconds; tries t; bool fine; int32_t calls; } cases[] = {
        {0, {0, 0, APT_OK}, true, 1},        {0, {0, 1, APT_E_IO}, false, 1},     {30, {0, 1, APT_E_IO}, true, 2},
        {1, {0, 9, APT_E_IO}, false, 2},     {2, {0, 1, APT_E_MEMORY}, false, 1},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_run run;
        ex_error error = {"there is no room"};
        tries t = cases[i].t;
        memset(&run, 0, sizeof run);
        run.error = &error;
        run.retry_seconds = cases[i].seconds;
        assert_int_equal(ex_run_write(&run, try_it, &t), cases[i].fine);
        assert_int_equal(t.calls, cases[i].calls);
    }
}

/* ---- progress ---- */

static void test_progress_line(void **state)
{
    ex_progress bar;
    ex_text line = {NULL, 0, 0};
    (void)state;
    memset(&bar, 0, sizeof bar);
    snprintf(bar.title, sizeof bar.title, "train");
    bar.total = 1000;
    bar.done = 250;
    bar.rate = 10;
    bar.values.loss = 0.5;
    bar.values.sparsity = 0.25;
    bar.values.tokens_per_second = 12345;
    exi_progress_line(&bar, 120, 0, false, &line);
    assert_string_equal(
        line.at,
        "train  25% [##########..............................]   250/1000  1:15 left  loss 0.5000  sparsity 25.0%  12.3k tok/s");
    for (int width = 20; width < 140; width++) {
        for (int64_t done = 0; done <= 1000; done += 125) {
            bar.done = done;
            bar.blocks = width % 2 == 0;
            exi_progress_line(&bar, width, 77, done == 1000, &line);
            if (exi_progress_columns(line.at) > width)
                fail_msg("%d columns in %d: %s", exi_progress_columns(line.at), width, line.at);
            assert_non_null(strstr(line.at, "train"));
        }
    }
    bar.values.loss = strtod("nan", NULL);
    bar.values.sparsity = -1;
    bar.values.tokens_per_second = -1;
    bar.total = 0;
    bar.done = 7;
    exi_progress_line(&bar, 80, 12, true, &line);
    assert_string_equal(line.at, "train  7  12 s");
    ex_text_free(&line);
}

/* Ten steps a second and, every hundred steps, an evaluation of 20 s: the time left counts the evaluations to come, before and
   right behind one of them alike. */
static void test_progress_time_left(void **state)
{
    ex_progress bar;
    double now = 0, least = 1e9, most = 0;
    (void)state;
    memset(&bar, 0, sizeof bar);
    bar.total = 1000;
    for (bar.done = 1; bar.done < bar.total; bar.done++) {
        now += bar.done % 100 == 0 ? 20.1 : 0.1;
        if (bar.done % 10 == 1 || bar.done % 100 == 0) exi_progress_rate(&bar, now);
        if (bar.done <= 200) continue;
        least = fmin(least, bar.rate);
        most = fmax(most, bar.rate);
    }
    assert_true(least > 2 && most < 6);                       /* 3.3 in truth; an evaluation alone is 0.05 */
}

/* Not a terminal: plain lines, no control characters, and a finished line at the end. */
static void test_progress_plain(void **state)
{
    place *p = (place *)*state;
    ex_progress bar;
    char *text;
    FILE *file = fopen(put_text(p, "err", ""), "wb");
    assert_non_null(file);
    ex_progress_begin(&bar, "train", 0, 10);
    bar.file = file;
    bar.terminal = false;
    for (int64_t i = 1; i <= 10; i++) ex_progress_update(&bar, i, NULL);
    ex_progress_note(&bar, "note %d", 7);
    ex_progress_end(&bar);
    ex_progress_end(&bar);
    fclose(file);
    text = get(p->path);
    assert_null(strchr(text, '\r'));
    assert_null(strchr(text, 27));
    assert_non_null(strstr(text, "note 7\n"));
    assert_non_null(strstr(text, "train 100% ["));
    assert_int_equal(text[strlen(text) - 1], '\n');
    free(text);
}

/* ---- report ---- */

static void test_report_scale(void **state)
{
    static const struct { double low, high, step, from, to;
    } cases[] = {{0, 1, 0.2, 0, 1},  {0.13, 0.97, 0.2, 0, 1}, {0, 1000, 200, 0, 1000},       {3, 3, 0.2, 2.6, 3.4},
                 {0, 0, 0.5, -1, 1}, {-5, 17, 5, -5, 20},     {2e-4, 3e-4, 2e-5, 2e-4, 3e-4}};
    char text[32];
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const exi_rep_scale s = exi_rep_nice(cases[i].low, cases[i].high, 5);
        near(s.step, cases[i].step, 1e-12);
        near(s.low, cases[i].from, 1e-9);
        near(s.high, cases[i].to, 1e-9);
    }
    exi_rep_tick(text, sizeof text, 0.30000000000000004, 0.1);
    assert_string_equal(text, "0.3");
    exi_rep_tick(text, sizeof text, 20000, 5000);
    assert_string_equal(text, "20k");
    exi_rep_tick(text, sizeof text, 1.5e-4, 5e-5);
    assert_string_equal(text, "1.5e-4");
    exi_rep_tick(text, sizeof text, 1e-20, 0.5);
    assert_string_equal(text, "0");
}

/* Every element that is opened is closed in its turn. */
static void balanced(const char *html)
{
    char stack[64][16];
    int depth = 0;
    const char *at = strstr(html, "</head>") + 7;
    for (at = strchr(at, '<'); at != NULL; at = strchr(at + 1, '<')) {
        const char *end = strchr(at, '>');
        char name[16];
        assert_non_null(end);
        snprintf(name, sizeof name, "%.*s", (int)strcspn(at + (at[1] == '/' ? 2 : 1), " />\n"), at + (at[1] == '/' ? 2 : 1));
        if (end[-1] == '/') continue;
        if (at[1] != '/') {
            assert_true(depth < 64);
            memcpy(stack[depth++], name, sizeof name);
        } else if (strcmp(name, "html") != 0) {
            if (depth == 0 || strcmp(stack[depth - 1], name) != 0)
                fail_msg("</%s> closes <%s>", name, depth > 0 ? stack[depth - 1] : "nothing");
            depth--;
        }
    }
    assert_int_equal(depth, 0);
}

static void test_report(void **state)
{
    static const char *const outside[] = {"http:", "https:", "src=", "href=", "<script", "@import", "nan", "inf\""};
    place *p = (place *)*state;
    ex_report *report = ex_report_create("a <b> & \"c\"");
    ex_text metrics = {NULL, 0, 0};
    ex_error error = {""};
    char *html;
    ex_text_put(
        &metrics,
        "{\"event\":\"settings\",\"lr\":0.1,\"name\":\"<i>\"}\n{\"event\":\"layers\",\"step\":0,\"ranks\":[8,"
        "8],\"heads\":[4,4],\"hidden\":64}\n");
    for (int i = 1; i <= 300; i++) {
        ex_text_format(
            &metrics,
            "{\"event\":\"step\",\"step\":%d,\"loss\":%g,\"sparsity\":%g,\"sparsity_target\":%g,\"milliseconds\":%d,"
            "\"bytes\":%d,\"distill_loss\":0}\n",
            i, 1.0 / i, i / 600.0, i / 500.0, 300 - i / 2, 1000000 * (400 - i));
    }
    ex_text_put(
        &metrics,
        "{\"event\":\"evaluate\",\"step\":100,\"accuracy\":0.8,\"loss\":1}\n{\"event\":\"evaluate\","
        "\"step\":300,\"accuracy\":0.9,\"loss\":null}\n"
        "{\"event\":\"compact\",\"step\":150}\n{\"event\":\"layers\",\"step\":150,\"ranks\":[16,8],\"heads\":[4,"
        "4],\"hidden\":48}\n"
        "{\"event\":\"result\",\"accuracy\":\"90 %\",\"speed\":2.5}\n{\"event\":\"torn");
    put(p, "m.jsonl", metrics.at, metrics.length);
    assert_true(ex_report_add_metrics(report, "run <1>", p->path, &error));
    assert_true(ex_report_add_metrics(report, "run 2", p->path, &error));
    ex_report_point(report, "run 2", "strange & new", 3, 4);
    ex_report_result(report, "run 2", "speed", "3x");
    put_text(p, "r.html", "");
    if (!ex_report_write(report, p->path, &error)) fail_msg("%s", error.text);
    html = get(p->path);
    balanced(html);
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++)
        if (strstr(html, outside[i]) != NULL) fail_msg("the report holds %s", outside[i]);
    assert_non_null(strstr(html, "<title>a &lt;b&gt; &amp; &quot;c&quot;</title>"));
    assert_non_null(strstr(html, "run &lt;1&gt;"));
    assert_null(strstr(html, "<i>"));
    assert_non_null(strstr(html, "Training loss"));
    assert_non_null(strstr(html, "Strange &amp; new"));
    assert_non_null(strstr(html, "Ranks per layer, run 2"));
    assert_null(strstr(html, "Heads per layer"));          /* they never change */
    assert_non_null(strstr(html, "<td>3x</td>"));
    assert_non_null(strstr(html, "<td>90 %</td>"));
    assert_non_null(strstr(html, "step 150: compacted"));
    free(html);
    put_text(p, "bad.jsonl", "{\"event\":\"step\"\n");
    assert_false(ex_report_add_metrics(report, "x", p->path, &error));
    says(&error, "bad.jsonl:1: not valid JSON");
    ex_report_free(report);
    ex_text_free(&metrics);
}

/* Reports of nearly nothing must still be whole. */
static void test_report_empty(void **state)
{
    place *p = (place *)*state;
    ex_error error = {""};
    put_text(p, "r.html", "");
    for (int i = 0; i < 4; i++) {
        ex_report *report = ex_report_create("");
        const int32_t one = 5;
        char *html;
        if (i > 0) ex_report_point(report, "run", "loss", 0, i == 2 ? HUGE_VAL : 0);
        if (i == 3) ex_report_layers(report, "run", "ranks", 0, &one, 1);
        if (i == 3) ex_report_point(report, "run", "loss", 0, -1e300);
        assert_true(ex_report_write(report, p->path, &error));
        html = get(p->path);
        balanced(html);
        assert_null(strstr(html, "nan"));
        free(html);
        ex_report_free(report);
    }
}

/* ---- table ---- */

static void test_cells(void **state)
{
    place *p = (place *)*state;
    ex_cells cells[2];
    char *text;
    FILE *file;
    memset(cells, 0, sizeof cells);
    cells[0].run = "a";
    cells[1].run = "longer run";
    ex_cell(&cells[0], "accuracy", "%.1f %%", 57.6);
    ex_cell(&cells[1], "accuracy", "%.1f %%", 100.0);
    ex_cell(&cells[1], "on disk", "%s", "3.2 MiB");
    put_text(p, "table", "");
    file = fopen(p->path, "wb");
    assert_non_null(file);
    ex_cells_print(cells, 2, file);
    fclose(file);
    text = get(p->path);
    assert_string_equal(text, "               a  longer run\n"
                              "----------------------------\n"
                              "accuracy  57.6 %     100.0 %\n"
                              "on disk        -     3.2 MiB\n");
    free(text);
    for (int i = 0; i < 40; i++) ex_cell(&cells[0], "more", "%d", i);      /* what has no place is left out */
    assert_int_equal(cells[0].count, 24);
}

/* ---- grammar ---- */

/* Is the statement good news? Read from the words alone, as the comment of ex_grammar.h says. */
static int read_sentence(const char *text)
{
    static const char *const good[] = {"kind", "honest", "gentle", "brave", "wise", "cheerful"};
    const char *from = text, *end = strstr(text, " although "), *was;
    int negated, positive = 0;
    if (strncmp(text, "although ", 9) == 0 || strncmp(text, "while ", 6) == 0 || strncmp(text, "because ", 8) == 0)
        from = strstr(text, " , ");
    if (end == NULL) end = strstr(text, " while ");
    if (end == NULL) end = strstr(text, " because ");
    was = strstr(from, " was ");
    assert_non_null(was);
    if (end != NULL) assert_true(was < end);
    was += 5;
    negated = strncmp(was, "not ", 4) == 0 || strncmp(was, "never ", 6) == 0 || strncmp(was, "hardly ", 7) == 0;
    if (negated) was = strchr(was, ' ') + 1;
    for (int i = 0; i < 6; i++) positive |= strncmp(was, good[i], strlen(good[i])) == 0;
    return positive ^ negated ^ (strstr(text, "it is false that ") != NULL);
}

static void test_grammar(void **state)
{
    place *p = (place *)*state;
    uint64_t random = 5, again = 5;
    ex_sentence s, t;
    ex_map seen;
    ex_rows rows;
    ex_rows_desc desc = desc_of(EX_LABEL_CLASS);
    ex_error error = {""};
    int good = 0;
    for (int i = 0; i < 2000; i++) {
        ex_sentence_make(&s, &random, false);
        ex_sentence_make(&t, &again, false);
        assert_string_equal(s.text, t.text);
        if (read_sentence(s.text) != s.label) fail_msg("\"%s\" has label %d", s.text, (int)s.label);
        good += s.label;
    }
    assert_true(good > 900 && good < 1100);
    memset(&seen, 0, sizeof seen);
    put_text(p, "g.tsv", "");
    assert_true(ex_grammar_write(p->path, 300, true, &random, &seen, &error));
    read_rows(&rows, p->path, &desc);
    assert_int_equal(rows.count, 300);
    assert_int_equal(ex_map_count(&seen), 300);
    ex_rows_free(&rows);
    ex_map_free(&seen);
}

#define IN_PLACE(test) cmocka_unit_test_setup_teardown(test, place_setup, place_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {IN_PLACE(test_base_files),
                                       cmocka_unit_test(test_base_utf8),
                                       cmocka_unit_test(test_base_map),
                                       cmocka_unit_test(test_base_numbers),
                                       cmocka_unit_test(test_json_accepts),
                                       cmocka_unit_test(test_json_refuses),
                                       cmocka_unit_test(test_json_round),
                                       IN_PLACE(test_tsv),
                                       IN_PLACE(test_tsv_columns),
                                       IN_PLACE(test_labels),
                                       IN_PLACE(test_row_errors),
                                       IN_PLACE(test_row_errors_named),
                                       IN_PLACE(test_bad_utf8),
                                       IN_PLACE(test_dataset),
                                       IN_PLACE(test_batches),
                                       cmocka_unit_test(test_permute),
                                       IN_PLACE(test_feed),
                                       IN_PLACE(test_squad_read),
                                       IN_PLACE(test_squad_errors),
                                       IN_PLACE(test_squad_windows),
                                       cmocka_unit_test(test_squad_compare),
                                       cmocka_unit_test(test_metrics),
                                       cmocka_unit_test(test_correlations),
                                       cmocka_unit_test(test_args),
                                       cmocka_unit_test(test_arg_errors),
                                       IN_PLACE(test_args_help),
                                       IN_PLACE(test_log_file),
                                       IN_PLACE(test_log_resume),
                                       IN_PLACE(test_log_half_line),
                                       cmocka_unit_test(test_retry),
                                       cmocka_unit_test(test_progress_line), cmocka_unit_test(test_progress_time_left),
                                       IN_PLACE(test_progress_plain),
                                       cmocka_unit_test(test_report_scale),
                                       IN_PLACE(test_report),
                                       IN_PLACE(test_report_empty),
                                       IN_PLACE(test_cells),
                                       IN_PLACE(test_grammar)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
