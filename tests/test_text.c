/* examples/common for models that write text: pairs out of CSV, TSV, JSON and instructions, tokens in rows and blocks, ROUGE,
   BLEU and the other metrics of written text. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../apt.h"
#include "apt_test.h"
#include "../examples/common/ex_metrics.h"
#include "../examples/common/ex_pairs.h"
#include "../examples/common/ex_token_rows.h"
#include "../examples/common/ex_grammar.h"
#include "../examples/common/ex_grammar_text.h"
#include "place.h"

#define TOKENIZERS "tests/golden/tokenizer/"
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const char *put(place *p, const char *name, const char *text)
{
    test_write_file(test_join(p->path, sizeof p->path, p->dir, name), text, strlen(text));
    return p->path;
}

/* ---- pairs ---- */

static void read_pairs(ex_pairs *pairs, place *p, const char *name, const char *text, const ex_pairs_desc *desc)
{
    ex_error error = {""};
    if (!ex_pairs_read(pairs, put(p, name, text), desc, &error)) fail_msg("%s", error.text);
}

static void is_pair(const ex_pairs *pairs, int64_t i, const char *source, const char *target, int64_t line)
{
    assert_true(i < pairs->count);
    assert_string_equal(pairs->pair[i].source, source);
    assert_string_equal(pairs->pair[i].target, target);
    assert_int_equal(pairs->pair[i].source_bytes, strlen(source));
    assert_int_equal(pairs->pair[i].target_bytes, strlen(target));
    assert_int_equal(pairs->pair[i].line, line);
}

static void test_csv(void **state)
{
    place *p = (place *)*state;
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    read_pairs(&pairs, p, "a.csv",
               "\xef\xbb\xbf" "id,\"mr\",ref\r\n1,\"name[\"\"A\"\"], eat\",plain text \r\n2,,\"two\nlines, and a comma\"\r\n"
               "3,\"\"\"\",\"\"\n\n \n", &desc);
    assert_int_equal(pairs.count, 3);
    is_pair(&pairs, 0, "name[\"A\"], eat", "plain text ", 2);
    is_pair(&pairs, 1, "", "two\nlines, and a comma", 3);
    is_pair(&pairs, 2, "\"", "", 5);
    ex_pairs_free(&pairs);
    desc.source = "ref";
    desc.target = "#1";
    desc.prefix = "say: ";
    desc.limit = 1;
    read_pairs(&pairs, p, "a.csv", "id,mr,ref\n1,a,b\n2,c,d", &desc);
    assert_int_equal(pairs.count, 1);
    is_pair(&pairs, 0, "say: b", "1", 2);
    ex_pairs_free(&pairs);
    memset(&desc, 0, sizeof desc);
    desc.no_header = true;
    read_pairs(&pairs, p, "a.csv", "x,y\n\"z\",w", &desc);
    assert_int_equal(pairs.count, 2);
    is_pair(&pairs, 0, "x", "y", 1);
    is_pair(&pairs, 1, "z", "w", 2);
    ex_pairs_free(&pairs);
}

static void test_tsv(void **state)
{
    place *p = (place *)*state;
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    read_pairs(&pairs, p, "a.tsv", "a \"b\tc\nd\te\tf\r\n", &desc);      /* no names in the first line: it is data */
    assert_int_equal(pairs.count, 2);
    is_pair(&pairs, 0, "a \"b", "c", 1);
    is_pair(&pairs, 1, "d", "e", 2);
    ex_pairs_free(&pairs);
    read_pairs(&pairs, p, "a.tsv", "target\tx\tsource\nt\t\ts\n", &desc);
    assert_int_equal(pairs.count, 1);
    is_pair(&pairs, 0, "s", "t", 2);
    ex_pairs_free(&pairs);
    desc.no_target = true;
    read_pairs(&pairs, p, "a.txt", "only\nsources\xff\n", &desc);
    assert_int_equal(pairs.count, 2);
    is_pair(&pairs, 1, "sources\xef\xbf\xbd", "", 2);
    assert_int_equal(pairs.replaced, 1);
    ex_pairs_free(&pairs);
}

static void test_objects(void **state)
{
    place *p = (place *)*state;
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    read_pairs(&pairs, p, "a.jsonl",
               "{\"document\":\"d\\n1\",\"x\":2,\"summary\":\"s\"}\n\n{\"summary\":\"\",\"document\":\"e\"}", &desc);
    assert_int_equal(pairs.count, 2);
    is_pair(&pairs, 0, "d\n1", "s", 1);
    is_pair(&pairs, 1, "e", "", 3);
    assert_false(pairs.instructions);
    ex_pairs_free(&pairs);
    desc.source = "q";
    desc.target = "a";
    read_pairs(&pairs, p, "a.json", "[{\"q\":\"1\",\"a\":\"2\"},\n {\"q\":\"3\",\"a\":\"4\"}]", &desc);
    is_pair(&pairs, 1, "3", "4", 2);
    ex_pairs_free(&pairs);
    read_pairs(&pairs, p, "a.json", "\n {\"q\":\"1\",\"a\":\"2\"}\n", &desc);   /* objects in lines under the other name */
    is_pair(&pairs, 0, "1", "2", 2);
    ex_pairs_free(&pairs);
}

static void test_instructions(void **state)
{
    static const char text[] = "[{\"instruction\":\"Add.\",\"input\":\"1 2\",\"output\":\"3\"},\n"
                               "{\"instruction\":\"Say hi.\",\"input\":\"\",\"output\":\"hi\"},"
                               "{\"instruction\":\"x\",\"output\":\"y\"}]";
    place *p = (place *)*state;
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    desc.prefix = "not used: ";
    read_pairs(&pairs, p, "alpaca.json", text, &desc);
    assert_true(pairs.instructions);
    is_pair(&pairs, 0, "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
            "### Response:", "3", 1);
    is_pair(&pairs, 1, "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nSay hi.\n\n### Response:", "hi", 2);
    assert_string_equal(pairs.pair[2].target, "y");
    ex_pairs_free(&pairs);
}

static void test_pairs_refused(void **state)
{
    static const struct { const char *name, *text, *source, *target, *says;
    } cases[] = {
        {"a.csv", "", NULL, NULL, "expected pairs of texts, found none"},
        {"a.csv", "mr,ref\n", NULL, NULL, "expected pairs of texts, found none"},
        {"a.csv", "x,y\n1,2\n", NULL, NULL,
         "a.csv:1: expected columns of usual names (such as \"source\" and \"target\"), found \"x\", \"y\""},
        {"a.csv", "mr,ref\n1,2\n", "mr", "text", "a.csv:1: expected a column \"text\", found \"mr\", \"ref\""},
        {"a.csv", "mr,ref\n1,2\n", "mr", NULL, "must be given both or not at all"},
        {"a.csv", "mr,ref\n1,2\n1\n", NULL, NULL, "a.csv:3: expected 2 fields as in the first line, found 1"},
        {"a.csv", "mr,ref\n\"a\nb\",2\n\n3,4\n", NULL, NULL, "a.csv:4: expected 2 fields as in the first line, found 1"},
        {"a.csv", "mr,ref\n1,\"a\n\nb", NULL, NULL, "a.csv:2: a field in quotes that begins in this line has no end"},
        {"a.csv", "mr,ref\n1,a\"b\"\n", NULL, NULL, "a.csv:2: a quote inside of a field"},
        {"a.csv", "mr,ref\n1,\"a\nb\"c\n", NULL, NULL,
         "a.csv:3: expected a comma or the end of the line behind a field, found byte 0x63"},
        {"a.csv", "mr,ref\r1,2\r", NULL, NULL,
         "a.csv:1: expected a comma or the end of the line behind a field, found byte 0x0d"},
        {"a.tsv", "one\n", NULL, NULL, "a.tsv:1: expected columns of usual names"},
        {"a.tsv", "a\tb\nc\n", NULL, NULL, "a.tsv:2: expected at least 2 columns, found 1"},
        {"a.tsv", "a\tb\n", "#1", "#3", "expected a column \"#3\", found \"a\", \"b\""},
        {"a.jsonl", "{\"source\":\"a\"}", NULL, NULL, "a.jsonl:1: expected strings of usual names"},
        {"a.jsonl", "{\"source\":\"a\",\"target\":\"b\"}\n[]", NULL, NULL, "a.jsonl:2: expected an object, found an array"},
        {"a.jsonl", "{\"source\":\"a\",\"target\":\"b\"}\n{\"source\":\"a\"}", NULL, NULL,
         "a.jsonl:2: expected \"target\" with a string, found nothing"},
        {"a.jsonl", "{\"source\":\"a\",\"target\":\"b\\u0000\"}", NULL, NULL,
         "expected text in \"target\", found a NUL character"},
        {"a.jsonl", "{\"source\":\"a\",\n", NULL, NULL, "a.jsonl:1: not valid JSON"},
        {"a.json", "3", NULL, NULL, "a.json:1: expected an array of objects, found a number"},
        {"a.json", "[\n{\"instruction\":\"a\"}]", NULL, NULL, "a.json:2: expected \"output\" with a string, found nothing"},
        {"a.json", "[{\"instruction\":\"a\",\"output\":\"b\",\n\"input\":3}]", NULL, NULL,
         "a.json:2: expected \"input\" with a string"}};
    place *p = (place *)*state;
    for (size_t i = 0; i < COUNT(cases); i++) {
        ex_error error = {""};
        ex_pairs pairs;
        ex_pairs_desc desc = {0};
        desc.source = cases[i].source;
        desc.target = cases[i].target;
        assert_false(ex_pairs_read(&pairs, put(p, cases[i].name, cases[i].text), &desc, &error));
        assert_true(pairs.count == 0 && pairs.pair == NULL && pairs.buffer == NULL);
        says(&error, cases[i].says);
    }
}

static void test_groups(void **state)
{
    place *p = (place *)*state;
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    ex_groups groups;
    read_pairs(&pairs, p, "a.tsv", "a\t1\nb\t2\na\t3\nc\t4\na\t5\nb\t6\n", &desc);
    ex_groups_make(&groups, &pairs);
    const int64_t first[] = {0, 3, 5, 6}, row[] = {0, 2, 4, 1, 5, 3};
    assert_int_equal(groups.count, 3);
    assert_memory_equal(groups.first, first, sizeof first);
    assert_memory_equal(groups.row, row, sizeof row);
    ex_groups_free(&groups);
    ex_pairs_free(&pairs);
}

static void test_shared_e2e(void **state)
{
    char path[512];
    ex_error error = {""};
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    ex_groups groups;
    (void)state;
    test_shared(path, sizeof path, "data/e2e/testset_w_refs.csv");
    if (!ex_pairs_read(&pairs, path, &desc, &error)) fail_msg("%s", error.text);
    assert_int_equal(pairs.count, 4693);
    assert_string_equal(pairs.pair[0].source, "name[Blue Spice], eatType[coffee shop], area[city centre]");
    assert_string_equal(pairs.pair[1].target, "Blue Spice is a coffee shop in city centre.");
    ex_groups_make(&groups, &pairs);
    assert_int_equal(groups.count, 630);
    ex_groups_free(&groups);
    ex_pairs_free(&pairs);
}

/* ---- rows of tokens ---- */

static ex_tokenizer *load(const char *name)
{
    char path[256];
    ex_error error = {""};
    ex_tokenizer *t;
    snprintf(path, sizeof path, TOKENIZERS "%s", name);
    t = ex_tokenizer_load(path, &error);
    if (t == NULL) fail_msg("%s", error.text);
    return t;
}

static void is_text(const ex_tokenizer *t, const int32_t *ids, int64_t count, const char *wanted)
{
    char *text = ex_tokenizer_decode(t, ids, count, false, NULL, NULL);
    assert_non_null(text);
    assert_string_equal(text, wanted);
    free(text);
}

/* What is learned of a sequence, as text; each token has its own label or none. */
static void is_learned(const ex_tokenizer *t, const ex_token_rows *set, int64_t s, const char *wanted)
{
    int32_t *ids = NULL;
    for (int64_t i = set->starts[s]; i < set->starts[s + 1]; i++) {
        assert_true(set->labels[i] == EX_IGNORED || set->labels[i] == set->tokens[i]);
        if (set->labels[i] != EX_IGNORED) stbds_arrput(ids, set->labels[i]);
    }
    is_text(t, ids, (int64_t)stbds_arrlenu(ids), wanted);
    stbds_arrfree(ids);
}

static void test_rows(void **state)
{
    place *p = (place *)*state;
    ex_tokenizer *t = load("byte-fallback.json");
    ex_error error = {""};
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    ex_token_rows set;
    ex_token_rows_desc how = {0};
    char *prompt;
    read_pairs(&pairs, p, "a.tsv", "the wolf\tsaid it\nwho\t\xf0\x9f\x98\x80\na long source of many words\tx\n", &desc);
    assert_true(ex_token_rows_pairs(&set, &pairs, t, &how, &error));
    assert_int_equal(set.rows, 3);
    assert_int_equal(set.sequences, 3);
    is_text(t, set.tokens + set.starts[0], set.starts[1] - set.starts[0], "<s> the wolf\nsaid it</s>");
    is_learned(t, &set, 0, "said it</s>");
    is_learned(t, &set, 1, "\xf0\x9f\x98\x80</s>");
    is_learned(t, &set, 2, "x</s>");
    assert_true(set.truncated == 0 && set.dropped == 0);
    assert_int_equal(set.bytes, 7 + 4 + 1);
    prompt = ex_pair_prompt(&pairs, 0, &how);
    assert_string_equal(prompt, "the wolf\n");
    free(prompt);
    ex_token_rows_free(&set);
    how.learn_prompt = true;
    how.separator = " => ";
    assert_true(ex_token_rows_pairs(&set, &pairs, t, &how, &error));
    is_learned(t, &set, 0, "<s> the wolf => said it</s>");
    assert_int_equal(set.bytes, 19 + 11 + 32);
    ex_token_rows_free(&set);
    memset(&how, 0, sizeof how);
    how.length = 10;                             /* the third answer has no place any more */
    assert_true(ex_token_rows_pairs(&set, &pairs, t, &how, &error));
    assert_int_equal(set.rows, 2);
    assert_int_equal(set.dropped, 1);
    assert_int_equal(set.bytes, 7 + 4);
    assert_true(set.truncated >= 1);
    for (int64_t s = 0; s < set.sequences; s++) assert_true(set.starts[s + 1] - set.starts[s] <= 10);
    ex_token_rows_free(&set);
    how.length = 2;
    assert_false(ex_token_rows_pairs(&set, &pairs, t, &how, &error));
    says(&error, "nothing to learn is left of 3 pairs in 2 tokens each");
    how.length = 0;
    how.pack = true;
    assert_false(ex_token_rows_pairs(&set, &pairs, t, &how, &error));
    ex_pairs_free(&pairs);
    ex_tokenizer_free(t);
}

/* Packing keeps every sequence whole and in its place, fills rows as far as the next one allows, and batches hold the same. */
static void test_packing(void **state)
{
    place *p = (place *)*state;
    ex_tokenizer *t = load("byte-fallback.json");
    ex_error error = {""};
    ex_text text = {NULL, 0, 0};
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    ex_token_rows alone, packed;
    ex_token_rows_desc how = {0};
    ex_feed feed = {0};
    uint8_t seen[40] = {0};
    for (int i = 0; i < 40; i++) ex_text_format(&text, "%.*s\t%d\n", i % 7 + 1, "abcdefgh", i);
    read_pairs(&pairs, p, "a.tsv", text.at, &desc);
    how.length = 32;
    assert_true(ex_token_rows_pairs(&alone, &pairs, t, &how, &error));
    how.pack = true;
    assert_true(ex_token_rows_pairs(&packed, &pairs, t, &how, &error));
    assert_int_equal(alone.rows, 40);
    assert_int_equal(packed.sequences, 40);
    assert_true(packed.rows < 25);
    assert_int_equal(packed.learned, alone.learned);
    assert_memory_equal(packed.starts, alone.starts, 41 * sizeof(int64_t));
    assert_memory_equal(packed.tokens, alone.tokens, (size_t)alone.starts[40] * sizeof(int32_t));
    assert_memory_equal(packed.labels, alone.labels, (size_t)alone.starts[40] * sizeof(int32_t));
    assert_true(packed.first[0] == 0 && packed.first[packed.rows] == 40);
    for (int64_t r = 0; r < packed.rows; r++) {
        const int64_t start = packed.starts[packed.first[r]], next = packed.first[r + 1];
        assert_true(next > packed.first[r] && packed.starts[next] - start <= 32);
        if (next < 40) assert_true(packed.starts[next + 1] - start > 32);
    }
    feed.source = ex_token_rows_source(&packed);
    feed.batch = 3;
    feed.seed = 4;
    for (int i = 0; i < 2 * ((int)packed.rows + 2) / 3 && feed.at.index < packed.rows; i++) {
        const ex_batch *batch = ex_feed_next(&feed);
        for (int32_t s = 0; s < batch->sequences; s++) {
            const int64_t from = packed.starts[batch->index[s]], count = packed.starts[batch->index[s] + 1] - from;
            assert_int_equal(batch->offsets[s + 1] - batch->offsets[s], count);
            assert_memory_equal(batch->tokens + batch->offsets[s], packed.tokens + from, (size_t)count * sizeof(int32_t));
            assert_memory_equal(batch->labels + batch->offsets[s], packed.labels + from, (size_t)count * sizeof(int32_t));
            seen[batch->index[s]]++;
        }
    }
    for (int i = 0; i < 40; i++) assert_int_equal(seen[i], 1);
    assert_int_equal(feed.at.epoch, 0);
    ex_feed_free(&feed);
    ex_token_rows_free(&alone);
    ex_token_rows_free(&packed);
    ex_pairs_free(&pairs);
    ex_text_free(&text);
    ex_tokenizer_free(t);
}

static void test_blocks(void **state)
{
    place *p = (place *)*state;
    ex_tokenizer *t = load("byte-fallback.json");
    ex_error error = {""};
    ex_encoding whole = {0};
    ex_encode_desc encode = {0};
    ex_token_rows set;
    ex_blocks_desc how = {0};
    int64_t replaced = 0, bytes = 0;
    encode.text = "Once upon a time there was a little girl who went into the wood.\nShe met a wolf.";
    encode.bytes = strlen(encode.text);
    encode.no_special = true;
    assert_true(ex_tokenizer_encode(t, &encode, &whole, &error));
    how.length = 7;
    assert_true(ex_token_rows_text(&set, encode.text, encode.bytes, t, &how, &error));
    assert_int_equal(set.rows, whole.first[1] / 7);
    assert_int_equal(set.learned, set.rows * 7);
    for (int64_t r = 0; r < set.rows; r++) bytes += whole.offsets[7 * r + 6].end - whole.offsets[7 * r].end;
    assert_int_equal(set.bytes, bytes);
    assert_memory_equal(set.tokens, whole.ids, (size_t)set.rows * 7 * sizeof(int32_t));
    assert_memory_equal(set.labels, set.tokens, (size_t)set.rows * 7 * sizeof(int32_t));
    ex_token_rows_free(&set);
    how.begin = how.keep_rest = true;
    assert_true(ex_token_rows_file(&set, put(p, "a.txt", encode.text), t, &how, &replaced, &error));
    assert_int_equal(set.rows, (whole.first[1] + 5) / 6);
    assert_int_equal(set.learned, whole.first[1]);
    assert_int_equal(set.bytes, encode.bytes);
    for (int64_t r = 0; r < set.rows; r++) {
        const int64_t from = set.starts[r], count = set.starts[r + 1] - from;
        assert_true(set.first[r] == r && (count == 7 || (r + 1 == set.rows && count >= 2)));
        assert_true(set.tokens[from] == 1 && set.labels[from] == EX_IGNORED);
        assert_memory_equal(set.tokens + from + 1, whole.ids + 6 * r, (size_t)(count - 1) * sizeof(int32_t));
    }
    ex_token_rows_free(&set);
    how.length = 1000;
    how.keep_rest = false;
    assert_false(ex_token_rows_file(&set, p->path, t, &how, NULL, &error));
    says(&error, "a.txt: a text of 80 bytes has too few tokens for a block of 1000");
    how.length = 1;
    assert_false(ex_token_rows_file(&set, p->path, t, &how, NULL, &error));
    says(&error, "at least 2 are needed");
    ex_encoding_free(&whole);
    ex_tokenizer_free(t);
}

/* Pieces of a long text end with a line, or at a character where there is no line. */
static void test_text_pieces(void **state)
{
    const size_t bytes = EX_TEXT_PIECE + 1000;
    char *text = (char *)ex_alloc(bytes + 1, 1);
    (void)state;
    memset(text, 'a', bytes);
    assert_int_equal(exi_text_piece(text, bytes), EX_TEXT_PIECE);
    text[100] = '\n';
    assert_int_equal(exi_text_piece(text, bytes), 101);
    assert_int_equal(exi_text_piece(text, EX_TEXT_PIECE), EX_TEXT_PIECE);
    text[100] = 'a';
    memcpy(text + EX_TEXT_PIECE - 1, "\xe4\xb8\xad", 3);
    assert_int_equal(exi_text_piece(text, bytes), EX_TEXT_PIECE - 1);
    free(text);
}

static void test_sources_and_targets(void **state)
{
    place *p = (place *)*state;
    ex_tokenizer *t = load("unigram.json");
    ex_error error = {""};
    ex_pairs pairs;
    ex_pairs_desc desc = {0};
    ex_dataset source, target;
    read_pairs(&pairs, p, "a.tsv", "the wolf and the king went\twho\nx\tthe king said that he was there\n", &desc);
    assert_true(ex_dataset_pairs(&source, &target, &pairs, t, 6, 0, &error));
    assert_int_equal(source.count, 2);
    assert_int_equal(target.count, 2);
    assert_int_equal(source.starts[1], 6);       /* cut, and still ended */
    assert_int_equal(source.tokens[5], ex_tokenizer_special(t, EX_EOS));
    assert_int_equal(source.truncated, 1);
    assert_int_equal(target.truncated, 0);
    is_text(t, target.tokens, target.starts[1], "who</s>");
    is_text(t, target.tokens + target.starts[1], target.starts[2] - target.starts[1], "the king said that he was there</s>");
    ex_dataset_free(&source);
    ex_dataset_free(&target);
    ex_pairs_free(&pairs);
    ex_tokenizer_free(t);
}

/* ---- metrics ---- */

static double number_at(const ex_json_node *list, uint32_t index)
{
    const ex_json_node *node = ex_json_first(list);
    for (uint32_t i = 0; i < index; i++) node = ex_json_next(node);
    return node->as.number;
}

static void is_score(uint32_t line, const char *what, const ex_rouge_score *got, const ex_json_node *wanted)
{
    const double parts[3] = {got->precision, got->recall, got->f};
    for (uint32_t i = 0; i < 3; i++) {
        if (fabs(parts[i] - number_at(wanted, i)) > 1e-12)
            fail_msg("line %u: %s part %u is %.17g, expected %.17g", line, what, i, parts[i], number_at(wanted, i));
    }
}

/* rouge_score and sacrebleu on the same texts, see make_metrics.py. */
static void test_golden_metrics(void **state)
{
    static const char path[] = "tests/golden/metrics/text.jsonl";
    ex_error error = {""};
    ex_json json = {0};
    ex_bleu bleu = {{0}, {0}, 0, 0};
    size_t bytes = 0;
    exi_lines lines;
    char *text = ex_read_file(path, &bytes, &error), *line;
    (void)state;
    assert_non_null(text);
    exi_lines_start(&lines, text, bytes);
    while ((line = exi_lines_next(&lines, &bytes)) != NULL) {
        const ex_json_node *row, *node, *rouge;
        ex_string own, references[8];
        ex_rouge scores;
        int64_t count = 0;
        if (!ex_json_parse(&json, path, exi_lines_number(&lines), line, bytes, &error)) fail_msg("%s", error.text);
        row = ex_json_root(&json);
        own.at = ex_json_get(row, "text")->as.text;
        own.bytes = ex_json_get(row, "text")->count;
        node = ex_json_first(ex_json_get(row, "references"));
        for (uint32_t i = 0; i < ex_json_get(row, "references")->count; i++, node = ex_json_next(node)) {
            assert_true(count < 8);
            references[count].at = node->as.text;
            references[count++].bytes = node->count;
        }
        rouge = ex_json_first(ex_json_get(row, "rouge"));
        ex_rouge_compare(&scores, own, references, count);
        is_score(json.nodes->line, "ROUGE-1", &scores.one, rouge);
        is_score(json.nodes->line, "ROUGE-2", &scores.two, ex_json_next(rouge));
        is_score(json.nodes->line, "ROUGE-L", &scores.longest, ex_json_next(ex_json_next(rouge)));
        ex_bleu_add(&bleu, own, references, count);
        if (fabs(ex_bleu_score(&bleu) - ex_json_get(row, "bleu")->as.number) > 1e-9)
            fail_msg("line %u: BLEU is %.17g, expected %.17g", json.nodes->line, ex_bleu_score(&bleu),
                     ex_json_get(row, "bleu")->as.number);
    }
    assert_int_equal(lines.line, 60);
    ex_json_free(&json);
    free(text);
}

static void near(double got, double wanted)
{
    if (!(fabs(got - wanted) <= 1e-12)) fail_msg("got %.17g, wanted %.17g", got, wanted);
}

static void test_rouge_by_hand(void **state)
{
    const ex_string references[2] = {ex_string_of("the cat was found under the bed"), ex_string_of("")};
    ex_rouge rouge;
    (void)state;
    ex_rouge_compare(&rouge, ex_string_of("The cat was, under THE bed!"), references, 2);
    near(rouge.one.precision, 1);
    near(rouge.one.recall, 6.0 / 7);
    near(rouge.one.f, 12.0 / 13);
    near(rouge.two.precision, 4.0 / 5);          /* the cat, cat was, under the, the bed */
    near(rouge.two.recall, 4.0 / 6);
    near(rouge.longest.f, 12.0 / 13);
    ex_rouge_compare(&rouge, ex_string_of("bed the under"), references, 1);
    near(rouge.longest.precision, 2.0 / 3);      /* the, under */
    near(rouge.two.f, 0);
    ex_rouge_compare(&rouge, ex_string_of("!"), references, 2);
    near(rouge.one.f, 0);
    ex_rouge_compare(&rouge, references[0], references, 0);
    near(rouge.one.f, 0);
}

static void test_bleu_by_hand(void **state)
{
    const ex_string references[2] = {ex_string_of("a b c d e f"), ex_string_of("a b x d")};
    ex_bleu bleu = {{0}, {0}, 0, 0};
    (void)state;
    near(ex_bleu_score(&bleu), 0);
    ex_bleu_add(&bleu, ex_string_of("a b c d"), references, 1);
    near(ex_bleu_score(&bleu), 100 * exp(1 - 6.0 / 4));     /* all runs match, the text is short */
    memset(&bleu, 0, sizeof bleu);
    ex_bleu_add(&bleu, ex_string_of("a b x y"), references, 2);
    /* words 3 of 4, pairs 2 of 3 (a b, b x), triples 1 of 2, none of one; the shorter reference is as long as the text */
    near(ex_bleu_score(&bleu), 100 * pow(3.0 / 4 * 2.0 / 3 * 1.0 / 2 * 1.0 / 2, 0.25));
    assert_int_equal(bleu.reference, 4);
    memset(&bleu, 0, sizeof bleu);
    ex_bleu_add(&bleu, ex_string_of("a b"), references, 2);
    near(ex_bleu_score(&bleu), 0);               /* too short for three words */
}

static void test_match_and_perplexity(void **state)
{
    const ex_string references[2] = {ex_string_of("yes"), ex_string_of(" no\n")};
    (void)state;
    assert_true(ex_exact_match(ex_string_of("yes "), references, 2));
    assert_true(ex_exact_match(ex_string_of("no"), references, 2));
    assert_false(ex_exact_match(ex_string_of("Yes"), references, 2));
    assert_false(ex_exact_match(ex_string_of(""), references, 2));
    assert_false(ex_exact_match(ex_string_of("yes"), references, 0));
    near(ex_perplexity(log(8) * 5, 5), 8);
    near(ex_perplexity(3, 0), 0);
}

/* ---- texts of the grammar ---- */

/* The word of `text` behind `before`, "" where there is none. */
static const char *word_behind(const char *text, const char *before)
{
    static char word[32];
    const char *at = strstr(text, before);
    word[0] = 0;
    if (at != NULL) sscanf(at + strlen(before), "%31s", word);
    return word;
}

static bool is_good(const char *word)
{
    static const char *const good[] = {"kind", "honest", "gentle", "brave", "wise", "cheerful"};
    for (size_t i = 0; i < COUNT(good); i++) {
        if (strcmp(good[i], word) == 0) return true;
    }
    return false;
}

/* What the facts say is what the sentence says, and the reaction fits them. */
static void test_facts(void **state)
{
    uint64_t random = 3;
    ex_sentence facts, told;
    (void)state;
    for (int i = 0; i < 500; i++) {
        exi_grammar_facts(&facts, &told, &random);
        const bool good = is_good(word_behind(facts.text, "nature : ")), denied = strstr(facts.text, "denied : ") != NULL;
        char expected[96];
        snprintf(expected, sizeof expected, " %s", word_behind(facts.text, "who : "));
        assert_non_null(strstr(told.text, expected));
        snprintf(expected, sizeof expected, " was %s", word_behind(facts.text, denied ? "denied : " : "nature : "));
        assert_non_null(strstr(told.text, expected));
        assert_string_equal(word_behind(told.text, ", so everyone "), good != denied ? "smiled" : "sighed");
    }
}

/* Two different people, and whoever met one of them reacts to what was said of that one. */
static void test_stories(void **state)
{
    uint64_t random = 4;
    ex_sentence s;
    (void)state;
    for (int i = 0; i < 500; i++) {
        exi_grammar_story(&s, &random);
        const char *first = strstr(s.text, "everyone who met the "), *second = strstr(first + 1, "everyone who met the ");
        assert_non_null(second);
        for (const char *at = first; at != NULL; at = at == first ? second : NULL) {
            char who[32], does[32], said[64];
            assert_int_equal(sscanf(at, "everyone who met the %31s %31s", who, does), 2);
            snprintf(said, sizeof said, " %s was ", who);
            char *was = strstr(s.text, said);
            assert_non_null(was);
            char word[32];
            snprintf(word, sizeof word, "%s", word_behind(was, " was "));
            const bool denied = strcmp(word, "not") == 0 || strcmp(word, "never") == 0 || strcmp(word, "hardly") == 0;
            if (denied) {
                char behind[48];
                snprintf(behind, sizeof behind, "%s ", word);
                snprintf(word, sizeof word, "%s", word_behind(was, behind));
            }
            const bool smiles = strcmp(does, "smiled") == 0 || strcmp(does, "cheered") == 0 || strcmp(does, "laughed") == 0;
            assert_int_equal(smiles, is_good(word) != denied);
        }
    }
}

static int compare_words(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Words of a text, sorted, cut in place. */
static int sorted_words(char *text, char **word)
{
    int count = 0;
    for (char *at = strtok(text, " "); at != NULL; at = strtok(NULL, " ")) word[count++] = at;
    qsort(word, (size_t)count, sizeof *word, compare_words);
    return count;
}

/* Pieces hold no word that the sentence has not, and most of those it has. */
static void test_pieces(void **state)
{
    uint64_t random = 5;
    int64_t all = 0, left = 0, same_order = 0;
    ex_sentence s, pieces;
    (void)state;
    for (int i = 0; i < 500; i++) {
        char *a[128], *b[128];
        ex_sentence_make(&s, &random, true);
        exi_grammar_shuffle(&pieces, &s, &random);
        same_order += strcmp(s.text, pieces.text) == 0;
        const int n = sorted_words(s.text, a), m = sorted_words(pieces.text, b);
        int k = 0;
        for (int j = 0; j < n && k < m; j++) k += strcmp(a[j], b[k]) == 0;
        assert_int_equal(k, m);
        all += n;
        left += m;
    }
    assert_true(same_order < 10);
    assert_true(left > all * 8 / 10 && left < all * 95 / 100);
}

/* The tokenizer knows every word, gives each one token, and writes them back as they were. */
static void test_grammar_tokenizer(void **state)
{
    place *p = (place *)*state;
    static const ex_grammar_kind kinds[] = {EX_GRAMMAR_SENTENCE, EX_GRAMMAR_STORY, EX_GRAMMAR_SHUFFLED, EX_GRAMMAR_FACTS};
    uint64_t random = 6;
    ex_error error = {""};
    ex_encoding encoding = {0};
    if (!ex_grammar_write_tokenizer(p->dir, "<s>", "</s>", &error)) fail_msg("%s", error.text);
    ex_tokenizer *t = ex_tokenizer_load(p->dir, &error);
    if (t == NULL) fail_msg("%s", error.text);
    for (int i = 0; i < 400; i++) {
        ex_sentence text[2];
        exi_grammar_line(kinds[i % 4], &text[0], &text[1], &random);
        for (int k = 0; k < 2; k++) {
            ex_encode_desc desc = {0};
            size_t bytes = 0;
            int words = text[k].text[0] != 0;
            for (const char *c = text[k].text; *c != 0; c++) words += *c == ' ';
            desc.text = text[k].text;
            desc.bytes = strlen(text[k].text);
            assert_true(ex_tokenizer_encode(t, &desc, &encoding, &error));
            assert_int_equal(encoding.first[1], words + 2);
            assert_int_equal(encoding.ids[0], ex_tokenizer_special(t, EX_BOS));
            assert_int_equal(encoding.ids[words + 1], ex_tokenizer_special(t, EX_EOS));
            for (int w = 1; w <= words; w++) assert_int_not_equal(encoding.ids[w], ex_tokenizer_special(t, EX_UNK));
            char *decoded = ex_tokenizer_decode(t, encoding.ids, encoding.first[1], true, &bytes, &error);
            assert_string_equal(decoded, text[k].text);
            free(decoded);
        }
    }
    ex_encoding_free(&encoding);
    ex_tokenizer_free(t);
}

int main(void)
{
#define PLACED(test) cmocka_unit_test_setup_teardown(test, place_setup, place_teardown)
    const struct CMUnitTest tests[] = {
        PLACED(test_csv), PLACED(test_tsv), PLACED(test_objects), PLACED(test_instructions), PLACED(test_pairs_refused),
        PLACED(test_groups), cmocka_unit_test(test_shared_e2e), PLACED(test_rows), PLACED(test_packing), PLACED(test_blocks),
        cmocka_unit_test(test_text_pieces), PLACED(test_sources_and_targets), cmocka_unit_test(test_golden_metrics),
        cmocka_unit_test(test_rouge_by_hand), cmocka_unit_test(test_bleu_by_hand), cmocka_unit_test(test_match_and_perplexity),
        cmocka_unit_test(test_facts), cmocka_unit_test(test_stories), cmocka_unit_test(test_pieces),
        PLACED(test_grammar_tokenizer)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
