/* Fuzz target: the example programs' data files. The first byte chooses TSV, JSONL, SQuAD, metrics.jsonl or pairs of texts (CSV,
   TSV, JSONL, JSON), the second the options; the rest is the file. What is accepted becomes batches, answers, scores or a report.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_data.c -lutf8proc -lm -lpthread && ./a.out corpus/data */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../apt.h"
#include "../examples/common/ex_data.h"
#include "../examples/common/ex_log.h"
#include "../examples/common/ex_metrics.h"
#include "../examples/common/ex_pairs.h"
#include "../examples/common/ex_report.h"
#include "../examples/common/ex_token_rows.h"

static const char *const fuzz_formats[] = {"rows of TSV", "rows of JSONL", "SQuAD", "metrics.jsonl", "pairs of CSV",
                                           "pairs of TSV", "pairs of JSONL", "pairs of JSON", NULL};
#include "fuzz.h"

/* A tokenizer of single letters. */
static ex_tokenizer *make_letters(void)
{
    ex_text text = {NULL, 0, 0};
    ex_error error = {""};
    ex_tokenizer *t;
    const char *path;
    ex_text_put(&text, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n");
    for (int c = 'a'; c <= 'z'; c++) ex_text_format(&text, "%c\n##%c\n", c, c);
    path = fuzz_put(".txt", (const uint8_t *)text.at, text.length);
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
    feed.source = ex_dataset_source(set);
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

static bool rows(const ex_tokenizer *t, const char *path, uint8_t how)
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
        return false;
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
    return true;
}

static bool squad(const ex_tokenizer *t, const char *path, uint8_t how)
{
    ex_squad read;
    ex_dataset set;
    ex_error error = {""};
    ex_squad_desc desc = {24, 5, 6};
    if (!ex_squad_read(&read, path, &error)) {
        fuzz_check(error.text[0] != 0 && read.count == 0);
        return false;
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
    return true;
}

/* Rows hold every sequence once, none longer than asked for, and labels are tokens or ignored. */
static void check_rows(const ex_token_rows *set, int32_t length)
{
    int64_t learned = 0;
    fuzz_check(set->rows > 0 && set->first[0] == 0 && set->first[set->rows] == set->sequences && set->starts[0] == 0);
    for (int64_t r = 0; r < set->rows; r++) {
        fuzz_check(set->first[r + 1] > set->first[r]);
        fuzz_check(length == 0 || set->starts[set->first[r + 1]] - set->starts[set->first[r]] <= length);
    }
    for (int64_t s = 0; s < set->sequences; s++) fuzz_check(set->starts[s + 1] > set->starts[s]);
    for (int64_t i = 0; i < set->starts[set->sequences]; i++) {
        fuzz_check(set->labels[i] == EX_IGNORED || set->labels[i] == set->tokens[i]);
        learned += set->labels[i] != EX_IGNORED;
    }
    fuzz_check(learned == set->learned && learned > 0);
}

static void check_scores(const ex_pairs *pairs)
{
    ex_bleu bleu;
    ex_groups groups;
    memset(&bleu, 0, sizeof bleu);
    ex_groups_make(&groups, pairs);
    fuzz_check(groups.count > 0 && groups.first[groups.count] == pairs->count);
    for (int64_t i = 0; i < pairs->count && i < 20; i++) {
        const ex_pair *pair = &pairs->pair[i];
        const ex_string a = {pair->source, pair->source_bytes}, b = {pair->target, pair->target_bytes};
        ex_rouge rouge;
        if (a.bytes > 1000 || b.bytes > 1000) continue;
        ex_rouge_compare(&rouge, a, &b, 1);
        fuzz_check(rouge.one.f >= 0 && rouge.one.f <= 1 && rouge.longest.f >= 0 && rouge.longest.f <= rouge.one.f);
        ex_bleu_add(&bleu, a, &b, 1);
    }
    fuzz_check(ex_bleu_score(&bleu) >= 0 && ex_bleu_score(&bleu) <= 100.000001);
    ex_groups_free(&groups);
}

static bool pairs(const ex_tokenizer *t, const char *path, uint8_t how)
{
    ex_pairs read;
    ex_pairs_desc desc;
    ex_token_rows_desc rows_desc;
    ex_token_rows set;
    ex_error error = {""};
    memset(&desc, 0, sizeof desc);
    memset(&rows_desc, 0, sizeof rows_desc);
    desc.no_header = (how & 1) != 0;
    desc.no_target = (how & 2) != 0;
    if (how & 4) desc.source = "#2", desc.target = "#1";
    if (how & 8) desc.prefix = "a ";
    desc.limit = how & 16 ? 3 : 0;
    rows_desc.length = how >> 5 == 0 ? 0 : how >> 3;
    rows_desc.pack = rows_desc.length > 0 && (how & 1);
    if (!ex_pairs_read(&read, path, &desc, &error)) {
        fuzz_check(error.text[0] != 0 && read.count == 0 && read.pair == NULL);
        return false;
    }
    for (int64_t i = 0; i < read.count; i++) {
        const ex_pair *pair = &read.pair[i];
        fuzz_check(strlen(pair->source) == pair->source_bytes && strlen(pair->target) == pair->target_bytes && pair->line > 0);
        fuzz_check(ex_utf8_valid_prefix(pair->source, pair->source_bytes) == pair->source_bytes);
        fuzz_check(ex_utf8_valid_prefix(pair->target, pair->target_bytes) == pair->target_bytes);
    }
    if (ex_token_rows_pairs(&set, &read, t, &rows_desc, &error)) {
        check_rows(&set, rows_desc.length);
        ex_token_rows_free(&set);
    } else {
        fuzz_check(error.text[0] != 0 && set.tokens == NULL);
    }
    check_scores(&read);
    ex_pairs_free(&read);
    return true;
}

/* Any file is a text. */
static void blocks(const ex_tokenizer *t, const char *path, uint8_t how)
{
    ex_blocks_desc desc = {how % 50, (how & 64) != 0, (how & 128) != 0};
    ex_token_rows set;
    ex_error error = {""};
    if (ex_token_rows_file(&set, path, t, &desc, NULL, &error)) {
        check_rows(&set, desc.length);
        ex_token_rows_free(&set);
    } else {
        fuzz_check(error.text[0] != 0 && set.tokens == NULL);
    }
}

static bool metrics(const char *path, uint8_t how)
{
    ex_report *report = ex_report_create("fuzz");
    ex_error error = {""};
    ex_log log;
    const bool fine = ex_report_add_metrics(report, "run", path, &error);
    if (fine) {
        char *html = ex_format("%s.html", path);
        fuzz_check(ex_report_write(report, html, &error));
        remove(html);
        free(html);
    } else {
        fuzz_check(error.text[0] != 0);
    }
    ex_report_free(report);
    if (ex_log_open(&log, path, how, &error)) ex_log_close(&log);
    return fine;
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    static const char *const endings[] = {".tsv", ".jsonl", ".json", ".metrics", ".csv", ".tsv", ".jsonl", ".json"};
    static ex_tokenizer *letters;                /* lives as long as the process */
    const int kind = size > 0 ? data[0] & 7 : 0;
    bool fine;
    if (letters == NULL) letters = make_letters();
    if (size < 2) return 0;
    const char *path = fuzz_put(endings[kind], data + 2, size - 2);
    if (kind < 2) fine = rows(letters, path, data[1]);
    else if (kind == 2) fine = squad(letters, path, data[1]);
    else if (kind == 3) fine = metrics(path, data[1]);
    else fine = pairs(letters, path, data[1]);
    if (kind == 5) blocks(letters, path, data[1]);
    remove(path);
    return fine ? 1u << kind : 0;
}
