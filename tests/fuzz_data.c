/* Fuzz target: the example programs' data files. The first byte chooses TSV, JSONL, SQuAD or metrics.jsonl, the second the
   options; the rest is the file. What is accepted becomes batches, answers or a report.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_data.c -lutf8proc -lm -lpthread && ./a.out corpus/data */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../apt.h"
#include "../examples/common/ex_data.h"
#include "../examples/common/ex_log.h"
#include "../examples/common/ex_metrics.h"
#include "../examples/common/ex_report.h"

static void fuzz_one(const uint8_t *data, size_t size);
#include "fuzz_examples.h"

/* A file of this process with this ending; overwritten for every input. */
static const char *put(const char *ending, const uint8_t *data, size_t size)
{
    static char path[600];
    const char *root = getenv("APT_TEST_TMP");
    FILE *file;
    snprintf(path, sizeof path, "%s/apt_fuzz_%ld.%s", root != NULL ? root : "/tmp", (long)getpid(), ending);
    file = fopen(path, "wb");
    fuzz_check(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
    return path;
}

/* A tokenizer of single letters. */
static ex_tokenizer *make_letters(void)
{
    ex_text text = {NULL, 0, 0};
    ex_error error = {""};
    ex_tokenizer *t;
    const char *path;
    ex_text_put(&text, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n");
    for (int c = 'a'; c <= 'z'; c++) ex_text_format(&text, "%c\n##%c\n", c, c);
    path = put("txt", (const uint8_t *)text.at, text.length);
    t = ex_tokenizer_load(path, &error);
    fuzz_check(t != NULL);
    remove(path);
    ex_text_free(&text);
    return t;
}

/* All sequences once, in two epochs; each batch must be what the data set says. */
static void check_batches(const ex_dataset *set, uint8_t how)
{
    ex_feed feed;
    int64_t seen = 0;
    memset(&feed, 0, sizeof feed);
    feed.set = set;
    feed.batch = how % 7 + 1;
    feed.by_length = how & 1;
    feed.seed = how;
    for (int64_t b = 0; b < 2 * ex_feed_batches(&feed); b++) {
        const ex_batch *batch = ex_feed_next(&feed);
        const apt_batch view = ex_batch_apt(batch);
        seen += view.sequences;
        fuzz_check(view.offsets[0] == 0);
        for (int32_t s = 0; s < view.sequences; s++) {
            const int64_t i = batch->index[s];
            fuzz_check(view.offsets[s + 1] - view.offsets[s] == set->starts[i + 1] - set->starts[i]);
            fuzz_check(view.offsets[s + 1] > view.offsets[s]);
        }
    }
    fuzz_check(seen == 2 * set->count);
    ex_feed_free(&feed);
}

static void rows(const ex_tokenizer *t, const char *path, uint8_t how)
{
    static const char *const columns[] = {NULL, "#1", "#2", "text"};
    ex_rows_desc desc;
    ex_rows read;
    ex_dataset set;
    ex_error error = {""};
    memset(&desc, 0, sizeof desc);
    desc.kind = (ex_label_kind)(how % 3);
    desc.no_header = (how & 4) != 0;
    desc.text_column = columns[how >> 3 & 3];
    desc.label_column = columns[how >> 5 & 3];
    desc.limit = how & 128 ? 3 : 0;
    if (!ex_rows_read(&read, path, &desc, &error)) {
        fuzz_check(error.text[0] != 0 && read.count == 0 && read.row == NULL);
        return;
    }
    fuzz_check(read.count > 0);
    for (int64_t i = 0; i < read.count; i++) {
        fuzz_check(ex_utf8_valid_prefix(read.row[i].text, read.row[i].bytes) == read.row[i].bytes);
        if (desc.kind == EX_LABEL_CLASS) fuzz_check(read.row[i].label >= 0 && read.row[i].label < ex_labels_count(&read.labels));
        if (desc.kind == EX_LABEL_SCORE) fuzz_check(ex_finite((double)read.row[i].score));
    }
    fuzz_check(ex_dataset_rows(&set, &read, t, 16, &error));
    check_batches(&set, how);
    ex_dataset_free(&set);
    ex_rows_free(&read);
}

static void squad(const ex_tokenizer *t, const char *path, uint8_t how)
{
    ex_squad read;
    ex_dataset set;
    ex_error error = {""};
    ex_squad_desc desc = {24, 5, 6};
    if (!ex_squad_read(&read, path, &error)) {
        fuzz_check(error.text[0] != 0 && read.count == 0);
        return;
    }
    for (size_t i = 0; i < stbds_arrlenu(read.answer); i++) fuzz_check(read.answer[i].bytes > 0);
    desc.max_length += how;
    if (ex_dataset_squad(&set, &read, t, &desc, &error)) {
        ex_answers *answers = ex_answers_create(&read, &set, 5);
        float *scores = (float *)ex_alloc((size_t)set.longest + 1, sizeof(float));
        ex_squad_score score;
        for (int32_t i = 0; i < set.longest; i++) scores[i] = (float)((i * how) % 13);
        for (int64_t w = 0; w < set.count; w++) ex_answers_add_window(answers, w, scores, scores);
        fuzz_check(ex_squad_score_all(&score, &read, answers, 0) && score.exact >= 0 && score.exact <= 100 && score.f1 >= 0 &&
                   score.f1 <= 100.000001);
        check_batches(&set, how);
        free(scores);
        ex_answers_free(answers);
        ex_dataset_free(&set);
    } else {
        fuzz_check(error.text[0] != 0 && set.tokens == NULL);
    }
    ex_squad_free(&read);
}

static void metrics(const char *path, uint8_t how)
{
    ex_report *report = ex_report_create("fuzz");
    ex_error error = {""};
    ex_log log;
    if (ex_report_add_metrics(report, "run", path, &error)) {
        char *html = ex_format("%s.html", path);
        fuzz_check(ex_report_write(report, html, &error));
        remove(html);
        free(html);
    } else {
        fuzz_check(error.text[0] != 0);
    }
    ex_report_free(report);
    if (ex_log_open(&log, path, how, &error)) ex_log_close(&log);
}

static void fuzz_one(const uint8_t *data, size_t size)
{
    static const char *const endings[] = {"tsv", "jsonl", "json", "metrics"};
    static ex_tokenizer *letters;                /* lives as long as the process */
    const char *path;
    if (letters == NULL) letters = make_letters();
    if (size < 2) return;
    path = put(endings[data[0] & 3], data + 2, size - 2);
    if ((data[0] & 3) < 2) rows(letters, path, data[1]);
    else if ((data[0] & 3) == 2) squad(letters, path, data[1]);
    else metrics(path, data[1]);
    remove(path);
}
