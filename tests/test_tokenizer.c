/* examples/common/ex_tokenizer.h against what Hugging Face tokenizers give: recorded cases of tiny tokenizers
   (tests/golden/tokenizer) and of real ones (../shared), plus what must be refused and what must not take long. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../apt.h"
#include "apt_test.h"
#include "../examples/common/ex_tokenizer.h"

#define GOLDEN "tests/golden/tokenizer/"

static ex_tokenizer *load(const char *path)
{
    ex_error error = {""};
    ex_tokenizer *tokenizer = ex_tokenizer_load(path, &error);
    if (tokenizer == NULL) fail_msg("%s", error.text);
    return tokenizer;
}

static void encode(const ex_tokenizer *t, const char *text, const char *pair, ex_encoding *e)
{
    ex_error error = {""};
    ex_encode_desc desc = {0};
    desc.text = text;
    desc.bytes = strlen(text);
    desc.pair = pair;
    desc.pair_bytes = pair != NULL ? strlen(pair) : 0;
    if (!ex_tokenizer_encode(t, &desc, e, &error)) fail_msg("%s", error.text);
}

/* The next line of a JSONL text, parsed; false at the end. */
static bool next_row(char **at, char *end, uint32_t *line, ex_json *json, const char *name)
{
    ex_error error = {""};
    char *stop = *at < end ? (char *)memchr(*at, '\n', (size_t)(end - *at)) : NULL;
    if (stop == NULL) return false;
    *stop = 0;
    if (!ex_json_parse(json, name, ++*line, *at, (size_t)(stop - *at), &error)) fail_msg("%s", error.text);
    *at = stop + 1;
    return true;
}

static int64_t number(const ex_json_node *node)
{
    int64_t value = 0;
    assert_true(ex_json_int(node, INT32_MIN, INT32_MAX, &value));
    return value;
}

static void same_ints(const char *file, uint32_t line, const char *what, const ex_json_node *wanted, const int32_t *got,
                      size_t count)
{
    const ex_json_node *node;
    if (!ex_json_is(wanted, EX_JSON_ARRAY) || wanted->count != count)
        fail_msg("%s:%u: %zu %s, expected %u", file, line, count, what, wanted != NULL ? wanted->count : 0);
    node = ex_json_first(wanted);
    for (size_t i = 0; i < count; i++, node = ex_json_next(node))
        if (number(node) != got[i])
            fail_msg("%s:%u: %s %zu is %d, expected %lld", file, line, what, i, got[i], (long long)number(node));
}

/* Token by token the same text must come, whole characters only at any time; a run of byte tokens that is no UTF-8 is the one
   exception (U+FFFD in the text). */
static void same_stream(const ex_tokenizer *t, const char *file, uint32_t line, const char *text, size_t bytes,
                        const int32_t *ids, int64_t count, bool skip)
{
    ex_error error = {""};
    ex_text out = {NULL, 0, 0};
    ex_decoder decoder;
    bool replaced = false;
    ex_text_put(&out, "");
    ex_decoder_start(&decoder, t, skip);
    for (int64_t i = 0; i < count; i++) {
        assert_true(ex_decoder_add(&decoder, ids[i], &out, &error));
        if (ex_utf8_valid_prefix(out.at, out.length) != out.length) fail_msg("%s:%u: a broken character is written", file, line);
    }
    ex_decoder_end(&decoder, &out);
    for (size_t i = 0; i + 3 <= bytes; i++) replaced = replaced || memcmp(text + i, "\xef\xbf\xbd", 3) == 0;
    if (!replaced && (out.length != bytes || memcmp(out.at, text, bytes) != 0))
        fail_msg("%s:%u: token by token \"%s\", at once \"%s\"", file, line, out.at, text);
    ex_decoder_free(&decoder);
    ex_text_free(&out);
}

static void same_decoded(const ex_tokenizer *t, const char *file, uint32_t line, const ex_json_node *wanted, const int32_t *ids,
                         int64_t count, bool skip)
{
    ex_error error = {""};
    size_t bytes = 0;
    char *text = ex_tokenizer_decode(t, ids, count, skip, &bytes, &error);
    assert_non_null(text);
    if (!ex_json_is(wanted, EX_JSON_STRING) || wanted->count != bytes || memcmp(wanted->as.text, text, bytes) != 0)
        fail_msg("%s:%u: decoded \"%s\", expected \"%s\"", file, line, text, wanted != NULL ? wanted->as.text : "?");
    same_stream(t, file, line, text, bytes, ids, count, skip);
    free(text);
}

static void set_desc(ex_encode_desc *desc, const ex_json_node *row)
{
    const ex_json_node *text = ex_json_get(row, "text"), *pair = ex_json_get(row, "pair");
    memset(desc, 0, sizeof *desc);
    desc->text = text->as.text;
    desc->bytes = text->count;
    desc->pair = pair != NULL ? pair->as.text : NULL;
    desc->pair_bytes = pair != NULL ? pair->count : 0;
    if (ex_json_get(row, "max") != NULL) desc->max_length = (int32_t)number(ex_json_get(row, "max"));
    if (ex_json_get(row, "trunc") != NULL) desc->truncation = (ex_truncation)number(ex_json_get(row, "trunc"));
    desc->windows = ex_json_get(row, "stride") != NULL;
    if (desc->windows) desc->stride = (int32_t)number(ex_json_get(row, "stride"));
}

/* One recorded case: ids per window, types, offsets, decoded text; whichever the row has. */
static void check_row(const ex_tokenizer *t, const char *file, uint32_t line, const ex_json_node *row, ex_encoding *e)
{
    const ex_json_node *ids = ex_json_get(row, "ids"), *window = ex_json_first(ids);
    const bool nested = ids->count > 0 && window->type == EX_JSON_ARRAY;
    ex_error error = {""};
    ex_encode_desc desc;
    set_desc(&desc, row);
    if (!ex_tokenizer_encode(t, &desc, e, &error)) fail_msg("%s:%u: %s", file, line, error.text);
    if (nested && (uint32_t)e->windows != ids->count)
        fail_msg("%s:%u: %d windows, expected %u", file, line, e->windows, ids->count);
    for (int32_t w = 0; w < e->windows; w++, window = nested ? ex_json_next(window) : window)
        same_ints(file, line, "ids", nested ? window : ids, e->ids + e->first[w], (size_t)(e->first[w + 1] - e->first[w]));
    if (ex_json_get(row, "types") != NULL)
        same_ints(file, line, "types", ex_json_get(row, "types"), e->types, (size_t)e->first[1]);
    if (ex_json_get(row, "offsets") != NULL) {
        int32_t *flat = NULL;
        for (int32_t i = 0; i < e->first[1]; i++) {
            stbds_arrput(flat, (int32_t)e->offsets[i].start);
            stbds_arrput(flat, (int32_t)e->offsets[i].end);
        }
        same_ints(file, line, "offsets", ex_json_get(row, "offsets"), flat, stbds_arrlenu(flat));
        stbds_arrfree(flat);
    }
    same_decoded(t, file, line, ex_json_get(row, "decoded"), e->ids, e->first[1], true);
    if (ex_json_get(row, "all") != NULL) same_decoded(t, file, line, ex_json_get(row, "all"), e->ids, e->first[1], false);
}

/* Ids that no text gives, only to be decoded. */
static void check_ids(const ex_tokenizer *t, const char *file, uint32_t line, const ex_json_node *row)
{
    const ex_json_node *list = ex_json_get(row, "ids"), *node = ex_json_first(list);
    int32_t *ids = NULL;
    for (uint32_t i = 0; i < list->count; i++, node = ex_json_next(node)) stbds_arrput(ids, (int32_t)number(node));
    same_decoded(t, file, line, ex_json_get(row, "decoded"), ids, list->count, true);
    same_decoded(t, file, line, ex_json_get(row, "all"), ids, list->count, false);
    stbds_arrfree(ids);
}

static int check_file(const ex_tokenizer *t, const char *path)
{
    ex_error error = {""};
    ex_encoding encoding = {0};
    ex_json json = {0};
    size_t bytes = 0;
    uint32_t line = 0;
    char *text = ex_read_file(path, &bytes, &error), *at = text;
    if (text == NULL) fail_msg("%s", error.text);
    while (next_row(&at, text + bytes, &line, &json, path)) {
        const ex_json_node *row = ex_json_root(&json);
        if (ex_json_get(row, "text") != NULL) check_row(t, path, line, row, &encoding);
        else check_ids(t, path, line, row);
    }
    ex_encoding_free(&encoding);
    ex_json_free(&json);
    free(text);
    return (int)line;
}

static void check_golden(const char *name, const char *ending)
{
    char path[256];
    ex_tokenizer *t;
    snprintf(path, sizeof path, GOLDEN "%s.%s", name, ending);
    t = load(path);
    snprintf(path, sizeof path, GOLDEN "%s.jsonl", name);
    assert_true(check_file(t, path) >= 30);
    ex_tokenizer_free(t);
}

static void test_golden_wordpiece(void **state)
{
    (void)state;
    check_golden("wordpiece", "json");
}

static void test_golden_byte_bpe(void **state)
{
    (void)state;
    check_golden("byte-bpe", "json");
}

/* As T5, LLaMA 2 (older and newer spelling, the latter with tokens missing) and LLaMA 3 have them. */
static void test_golden_unigram(void **state)
{
    (void)state;
    check_golden("unigram", "json");
}

static void test_golden_byte_fallback(void **state)
{
    (void)state;
    check_golden("byte-fallback", "json");
    check_golden("metaspace", "json");
}

static void test_golden_llama3(void **state)
{
    (void)state;
    check_golden("llama3", "json");
}

static void test_golden_llama2c(void **state)
{
    (void)state;
    check_golden("llama2c", "bin");
}

static void check_shared(const char *tokenizer, const char *cases)
{
    char path[512], rows[512];
    ex_tokenizer *t = load(test_shared(path, sizeof path, tokenizer));
    assert_true(check_file(t, test_shared(rows, sizeof rows, cases)) >= 100);
    ex_tokenizer_free(t);
}

static void test_shared_bert(void **state)
{
    (void)state;
    check_shared("models/minilm", "tokenizers/bert-wordpiece/cases.jsonl");
    check_shared("models/minilm/vocab.txt", "tokenizers/bert-wordpiece/cases.jsonl");
}

static void test_shared_roberta(void **state)
{
    (void)state;
    check_shared("tokenizers/roberta-byte-bpe", "tokenizers/roberta-byte-bpe/cases.jsonl");
}

static void test_shared_t5(void **state)
{
    (void)state;
    check_shared("tokenizers/t5-unigram", "tokenizers/t5-unigram/cases.jsonl");
}

static void test_shared_llama(void **state)
{
    (void)state;
    check_shared("tokenizers/llama-bpe", "tokenizers/llama-bpe/cases.jsonl");
}

/* Nothing is lost between text and ids; the first ids are those that llama2.c gives. */
static void test_shared_stories(void **state)
{
    static const char text[] = "Once upon a time, there was a little girl named Lily.  \xc3\xa9\xe6\xbc\xa2\n";
    static const int32_t first[] = {1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317};
    char path[512];
    ex_tokenizer *t = load(test_shared(path, sizeof path, "data/stories260K/tok512.bin"));
    ex_encoding e = {0};
    ex_error error = {""};
    char *back;
    (void)state;
    assert_int_equal(ex_tokenizer_size(t), 512);
    assert_int_equal(ex_tokenizer_special(t, EX_BOS), 1);
    encode(t, text, NULL, &e);
    assert_true(e.first[1] > (int32_t)(sizeof first / sizeof first[0]));
    assert_memory_equal(e.ids, first, sizeof first);
    back = ex_tokenizer_decode(t, e.ids, e.first[1], true, NULL, &error);
    assert_string_equal(back, text);
    free(back);
    ex_encoding_free(&e);
    ex_tokenizer_free(t);
}

/* ---- the other file formats: written here out of the golden tokenizer.json ---------------------------------------- */

static void write_text(const char *dir, const char *name, const char *text, size_t bytes)
{
    ex_error error = {""};
    char *path = ex_path(dir, name);
    if (!ex_write_file(path, text, bytes, &error)) fail_msg("%s", error.text);
    free(path);
}

static void read_golden(const char *name, ex_json *json)
{
    ex_error error = {""};
    char *path = ex_format(GOLDEN "%s", name);
    if (!ex_json_read(json, path, &error)) fail_msg("%s", error.text);
    json->name = "golden";
    free(path);
}

/* Token names of a vocabulary in the order of their ids. */
static const ex_json_node **by_id(const ex_json_node *vocab)
{
    const ex_json_node **names = (const ex_json_node **)ex_alloc(vocab->count, sizeof *names), *name = ex_json_first(vocab);
    for (uint32_t i = 0; i < vocab->count; i++, name = ex_json_next(name + 1)) names[number(name + 1)] = name;
    return names;
}

static void test_vocab_txt(void **state)
{
    const char *config = "{\"do_lower_case\": false, \"mask_token\": {\"content\": \"[MASK]\"}}";
    char dir[512];
    ex_json json = {0};
    ex_text text = {NULL, 0, 0};
    const ex_json_node *vocab, **names;
    ex_tokenizer *whole = load(GOLDEN "wordpiece.json"), *t;
    ex_encoding a = {0}, b = {0};
    (void)state;
    test_dir(dir, sizeof dir);
    read_golden("wordpiece.json", &json);
    vocab = ex_json_get(ex_json_get(ex_json_root(&json), "model"), "vocab");
    names = by_id(vocab);
    for (uint32_t i = 0; i < vocab->count; i++) ex_text_format(&text, "%s%s", names[i]->as.text, i % 3 == 0 ? "\r\n" : "\n");
    write_text(dir, "vocab.txt", text.at, text.length);
    t = load(dir);
    encode(whole, "The WOLF, [MASK] once Caf\xc3\xa9", "upon a time", &a);
    encode(t, "The WOLF, [MASK] once Caf\xc3\xa9", "upon a time", &b);
    assert_int_equal(a.first[1], b.first[1]);
    assert_memory_equal(a.ids, b.ids, (size_t)a.first[1] * sizeof(int32_t));
    assert_memory_equal(a.types, b.types, (size_t)a.first[1] * sizeof(int32_t));
    ex_tokenizer_free(t);
    write_text(dir, "tokenizer_config.json", config, strlen(config));
    t = load(dir);
    encode(t, "W", NULL, &b);                    /* a capital letter, which this vocabulary does not have */
    assert_int_equal(b.ids[1], ex_tokenizer_special(t, EX_UNK));
    assert_int_equal(ex_tokenizer_special(t, EX_MASK), ex_tokenizer_id(t, "[MASK]"));
    ex_tokenizer_free(t);
    ex_tokenizer_free(whole);
    ex_encoding_free(&a);
    ex_encoding_free(&b);
    ex_text_free(&text);
    ex_json_free(&json);
    free(names);
    test_remove(dir);
}

static void test_vocab_and_merges(void **state)
{
    char dir[512];
    ex_json json = {0};
    ex_text vocab_json = {NULL, 0, 0}, merges_txt = {NULL, 0, 0};
    const ex_json_node *model, *vocab, *merges, *node;
    ex_tokenizer *t;
    (void)state;
    test_dir(dir, sizeof dir);
    read_golden("byte-bpe.json", &json);
    model = ex_json_get(ex_json_root(&json), "model");
    vocab = ex_json_get(model, "vocab");
    merges = ex_json_get(model, "merges");
    node = ex_json_first(vocab);
    for (uint32_t i = 0; i < vocab->count; i++, node = ex_json_next(node + 1)) {
        ex_text_put(&vocab_json, i > 0 ? "," : "{");
        ex_json_put(&vocab_json, node->as.text, node->count);
        ex_text_format(&vocab_json, ":%lld", (long long)number(node + 1));
    }
    ex_text_put(&vocab_json, "}");
    ex_text_put(&merges_txt, "#version: 0.2\n");
    node = ex_json_first(merges);
    for (uint32_t i = 0; i < merges->count; i++, node = ex_json_next(node))
        ex_text_format(&merges_txt, "%s %s\n", node[1].as.text, node[2].as.text);
    write_text(dir, "vocab.json", vocab_json.at, vocab_json.length);
    write_text(dir, "merges.txt", merges_txt.at, merges_txt.length);
    t = load(dir);
    check_file(t, GOLDEN "byte-bpe.jsonl");
    ex_tokenizer_free(t);
    ex_text_free(&vocab_json);
    ex_text_free(&merges_txt);
    ex_json_free(&json);
    test_remove(dir);
}

/* ---- what is refused ---------------------------------------------------------------------------------------------- */

#define BPE_PARTS(model) "{\"model\":{" model "},\"pre_tokenizer\":{\"type\":\"ByteLevel\"}}"
#define WORDPIECE(vocab, more)                                                                                                   \
    "{\"model\":{\"type\":\"WordPiece\",\"vocab\":" vocab "},\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}" more "}"

#define UNIGRAM(model, more) "{\"model\":{\"type\":\"Unigram\"," model "}" more "}"
#define VOCAB "\"unk_id\":0,\"vocab\":[[\"a\",0]]"
#define CHARMAP(map) UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":\"" map "\"}")

static void test_refusals(void **state)
{
    static const struct { const char *json, *says;
    } cases[] = {
        {"", "expected a value, found the end"},
        {"[]", "expected an object, found an array"},
        {"{}", "expected \"model\" with an object"},
        {"{\"model\":{\"type\":\"WordLevel\"}}", "\"type\" of \"model\" is \"WordLevel\""},
        {"{\"model\":{\"type\":\"WordPiece\"}}", "expected \"vocab\" with an object, found nothing"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", "the vocabulary is empty"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"a\":0}}}", "the unknown token \"[UNK]\" is not in the vocabulary"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"a\":\"b\"}}}", "token \"a\" needs an id from 0 to"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"a\":1e9}}}", "needs an id from 0 to 16777215"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{\"[UNK]\":0}},\"pre_tokenizer\":null}", "supported: BertPreTokenizer"},
        {WORDPIECE("{\"[UNK]\":0}", ",\"normalizer\":{\"type\":\"NFKC\"}"), "\"type\" of \"normalizer\" is \"NFKC\""},
        {WORDPIECE("{\"[UNK]\":0}", ",\"decoder\":{\"type\":\"CTC\"}"), "\"type\" of \"decoder\" is \"CTC\""},
        {WORDPIECE("{\"[UNK]\":0}", ",\"post_processor\":{\"type\":\"Magic\"}"), "\"type\" of \"post_processor\" is \"Magic\""},
        {WORDPIECE("{\"[UNK]\":0}", ",\"added_tokens\":[{\"id\":5,\"content\":\"[UNK]\"}]"), "has id 5, but 0 in the vocabulary"},
        {WORDPIECE("{\"[UNK]\":0}", ",\"added_tokens\":[{\"id\":-1,\"content\":\"x\"}]"), "added token \"x\" needs an id"},
        {WORDPIECE("{\"[UNK]\":0}", ",\"added_tokens\":{}"), "expected \"added_tokens\" with an array, found an object"},
        {WORDPIECE(
             "{\"[UNK]\":0}",
             ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"B\",\"type_id\":0}}],"
             "\"pair\":[],\"special_tokens\":{}}"),
         "sequence of the template is \"B\""},
        {WORDPIECE(
             "{\"[UNK]\":0}",
             ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"S\",\"type_id\":0}}],"
             "\"pair\":[],\"special_tokens\":{}}"),
         "expected \"S\" with an object"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0}"), "expected \"merges\" with an array"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a b\"]"), "its right part is not in the vocabulary"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b\"]"), "its product is not in the vocabulary"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a  b\"]"), "two parts with one space between"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[3]"), "expected a merge"},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"byte_fallback\":true"), "\"byte_fallback\""},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1"), "\"dropout\""},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\""),
         "end_of_word_suffix is \"</w>\""},
        {UNIGRAM("\"unk_id\":0,\"vocab\":{}", ""), "expected \"vocab\" with an array"},
        {UNIGRAM("\"vocab\":[[\"a\",0]]", ""), "\"unk_id\" of \"model\" must be the id of one of its 1 tokens"},
        {UNIGRAM("\"unk_id\":1,\"vocab\":[[\"a\",0]]", ""), "\"unk_id\" of \"model\" must be the id of one of its 1 tokens"},
        {UNIGRAM("\"unk_id\":0,\"vocab\":[[\"a\"]]", ""), "expected a token as [text, score]"},
        {UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Precompiled\"}"), "expected \"precompiled_charsmap\" with a string"},
        {CHARMAP("?AAA"), "is no base64 text"},
        {CHARMAP("AAA"), "is no base64 text"},
        {CHARMAP("CAAAAAAAAAA="), "has 8 bytes, but its array takes 8"},
        {CHARMAP("BAAAAAAAAAD/AA=="), "the texts of \"precompiled_charsmap\" are no UTF-8"},
        {UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Prepend\",\"prepend\":3}"), "expected \"prepend\" with a string"},
        {UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"a+\"},\"content\":\"b\"}"),
         "\"Regex\" of a \"Replace\" normalizer is \"a+\""},
        {UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"b\"}"),
         "\"String\" must have 1 to 1024 bytes"},
        {UNIGRAM(VOCAB, ",\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[1,1,1,1,1,1,1,1,1]}"),
         "at most 8 are supported"},
        {UNIGRAM(VOCAB, ",\"pre_tokenizer\":{\"type\":\"ByteLevel\"}"), "\"type\" of \"pre_tokenizer\" is \"ByteLevel\""},
        {UNIGRAM(VOCAB, ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"ab\"}"), "must be one character"},
        {UNIGRAM(VOCAB, ",\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\",\"prepend_scheme\":\"last\"}"),
         "\"prepend_scheme\" is \"last\""},
        {UNIGRAM(VOCAB, ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Isolated\"}"),
         "\"pattern\" of a \"Split\" pre-tokenizer is \"a\""},
        {UNIGRAM(VOCAB, ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":\"Removed\"}"),
         "\"behavior\" of a \"Split\" pre-tokenizer is \"Removed\""},
        {BPE_PARTS("\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[],\"byte_fallback\":true"), "the pre-tokenizer ByteLevel"},
        {UNIGRAM(VOCAB, ",\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Fuse\"},{\"type\":\"ByteFallback\"}]}"),
         "step 2 of \"decoder\""},
        {UNIGRAM(VOCAB, ",\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":-1,\"stop\":0}"), "of a Strip decoder"},
        {UNIGRAM(VOCAB, ",\"decoder\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"x\"},\"content\":\"\"}"),
         "\"Regex\" of a \"Replace\" decoder is \"x\""}};
    char dir[512], path[600];
    (void)state;
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "tokenizer.json");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_error error = {""};
        write_text(dir, "tokenizer.json", cases[i].json, strlen(cases[i].json));
        assert_null(ex_tokenizer_load(path, &error));
        if (strstr(error.text, cases[i].says) == NULL)
            fail_msg("case %zu says \"%s\", expected \"%s\"", i, error.text, cases[i].says);
        if (strstr(error.text, "tokenizer.json:1: ") == NULL && strstr(error.text, "tokenizer.json: ") == NULL)
            fail_msg("case %zu does not name the file: %s", i, error.text);
    }
    test_remove(dir);
}

static void test_missing_files(void **state)
{
    char dir[512];
    ex_error error = {""};
    (void)state;
    test_dir(dir, sizeof dir);
    assert_null(ex_tokenizer_load(dir, &error));
    assert_non_null(strstr(error.text, "no tokenizer found"));
    write_text(dir, "vocab.txt", "a\nb\n", 4);
    assert_null(ex_tokenizer_load(dir, &error));
    assert_non_null(strstr(error.text, "the unknown token \"[UNK]\""));
    test_remove(dir);
}

/* ---- encoding ----------------------------------------------------------------------------------------------------- */

static void test_truncation_errors(void **state)
{
    static const struct {
        const char *text, *pair;
        int32_t max;
        ex_truncation how;
        bool windows;
        int32_t stride;
        const char *says;
    } cases[] = {{"a b c", NULL, 1, EX_LONGEST_FIRST, false, 0, "max_length 1 does not hold the 2 special tokens"},
                 {"a b c d", NULL, 4, EX_ONLY_SECOND, false, 0, "there is only one"},
                 {"a b c d e f", "a b c", 8, EX_ONLY_SECOND, false, 0, "the first text alone has 6 tokens"},
                 {"a b c", "a b c d e f", 8, EX_ONLY_FIRST, false, 0, "the second text alone has 6 tokens"},
                 {"a b c", "a b c d e f", 8, EX_LONGEST_FIRST, true, 0, "windows of a pair"},
                 {"a", "a b c d e f", 7, EX_ONLY_SECOND, true, 3, "a stride of 3 tokens needs more than the 3 tokens"},
                 {"a", "a b c d e f", 7, EX_ONLY_SECOND, true, -1, "a stride of -1"}};
    ex_tokenizer *t = load(GOLDEN "wordpiece.json");
    ex_encoding e = {0};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_error error = {""};
        ex_encode_desc desc = {0};
        desc.text = cases[i].text;
        desc.bytes = strlen(desc.text);
        desc.pair = cases[i].pair;
        desc.pair_bytes = desc.pair != NULL ? strlen(desc.pair) : 0;
        desc.max_length = cases[i].max;
        desc.truncation = cases[i].how;
        desc.windows = cases[i].windows;
        desc.stride = cases[i].stride;
        assert_false(ex_tokenizer_encode(t, &desc, &e, &error));
        assert_int_equal(e.windows, 0);
        if (strstr(error.text, cases[i].says) == NULL) fail_msg("case %zu says \"%s\"", i, error.text);
    }
    ex_encoding_free(&e);
    ex_tokenizer_free(t);
}

static const char *const kinds[] = {GOLDEN "wordpiece.json", GOLDEN "byte-bpe.json", GOLDEN "unigram.json",
                                    GOLDEN "byte-fallback.json", GOLDEN "metaspace.json", GOLDEN "llama3.json",
                                    GOLDEN "llama2c.bin"};
#define KINDS (sizeof kinds / sizeof kinds[0])

/* Bytes that are no UTF-8 are read as U+FFFD, and offsets still point into the text that was given. */
static void test_invalid_utf8(void **state)
{
    const char *bad = "a\xff"
                      "b \xe2\x82 c \xed\xa0\x80 \xf0\x9f\x98",
               *good = "a\xef\xbf\xbd"
                       "b \xef\xbf\xbd c \xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd \xef\xbf\xbd";
    (void)state;
    for (size_t i = 0; i < KINDS; i++) {
        ex_tokenizer *t = load(kinds[i]);
        ex_encoding a = {0}, b = {0};
        encode(t, bad, NULL, &a);
        encode(t, good, NULL, &b);
        assert_int_equal(a.first[1], b.first[1]);
        assert_memory_equal(a.ids, b.ids, (size_t)a.first[1] * sizeof(int32_t));
        for (int32_t k = 0; k < a.first[1]; k++)
            assert_true(a.offsets[k].start <= a.offsets[k].end && a.offsets[k].end <= strlen(bad));
        ex_encoding_free(&a);
        ex_encoding_free(&b);
        ex_tokenizer_free(t);
    }
}

/* Texts that make naive tokenizers quadratic: each must stay far below what that would take (hours). */
static void test_long_texts(void **state)
{
    static const char *const units[] = {"a", "ab", " ", ".", "\xcc\x81\xcc\xa3", "\xe4\xb8\xad", "<mask>", "[MASK]", "\xff",
                                        "Grimm ", "'s", "\xe2\x96\x81\r\n 12", "<x> ", "\xe0\xa4\x95\xe0\xa5\x8d"};
    const clock_t begin = clock();               /* processor time: other programs do not count */
    (void)state;
    for (size_t i = 0; i < KINDS; i++) {
        ex_tokenizer *t = load(kinds[i]);
        ex_encoding e = {0};
        for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
            const size_t unit = strlen(units[u]), count = 100000 / unit;
            char *text = (char *)ex_alloc(unit * count + 1, 1);
            for (size_t k = 0; k < count; k++) memcpy(text + k * unit, units[u], unit);
            encode(t, text, NULL, &e);
            for (int32_t k = 1; k + 1 < e.first[1]; k++)
                assert_true(e.offsets[k].end <= unit * count && e.offsets[k].start <= e.offsets[k].end);
            free(text);
        }
        ex_encoding_free(&e);
        ex_tokenizer_free(t);
    }
    assert_true((double)(clock() - begin) / CLOCKS_PER_SEC < 120);
}

/* A merge order that a wrong heap or a stale entry would spoil: one megabyte of a single letter, tokens known exactly. */
static void test_one_long_word(void **state)
{
    const size_t n = 1 << 20;
    const char *json =
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"aa\":1,\"aaaa\":2,\"b\":3,\"ab\":4},\"merges\":[\"a "
        "b\",\"a a\",\"aa aa\"]},"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}}";
    char dir[512], path[600], *text = (char *)ex_alloc(n + 2, 1);
    ex_encoding e = {0};
    ex_tokenizer *t;
    (void)state;
    test_dir(dir, sizeof dir);
    write_text(dir, "tokenizer.json", json, strlen(json));
    t = load(test_join(path, sizeof path, dir, "tokenizer.json"));
    memset(text, 'a', n);
    encode(t, text, NULL, &e);
    assert_int_equal(e.first[1], n / 4);
    for (int32_t i = 0; i < e.first[1]; i++) assert_true(e.ids[i] == 2 && e.offsets[i].start == 4u * (uint32_t)i);
    text[n] = 'b';                               /* takes the last a: n - 1 are left, 3 of them over */
    encode(t, text, NULL, &e);
    assert_int_equal(e.first[1], n / 4 - 1 + 3);
    assert_int_equal(e.ids[e.first[1] - 1], 4);
    assert_int_equal(e.ids[e.first[1] - 2], 0);
    assert_int_equal(e.ids[e.first[1] - 3], 1);
    ex_encoding_free(&e);
    ex_tokenizer_free(t);
    free(text);
    test_remove(dir);
}

/* Marks that change places when a text is normalised: offsets stay in the text's order, as tokenizers 0.23.3 has them. Few marks
   and many are sorted in two ways. */
static void test_order_of_marks(void **state)
{
    static const char json[] = "{\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"vocab\":{\"?\":0,\"q\":1,\"\\u0301\":2,"
                               "\"\\u0323\":3},\"merges\":[]},\"normalizer\":{\"type\":\"NFC\"}}";
    char dir[512], path[600];
    (void)state;
    test_dir(dir, sizeof dir);
    write_text(dir, "tokenizer.json", json, strlen(json));
    ex_tokenizer *t = load(test_join(path, sizeof path, dir, "tokenizer.json"));
    for (uint32_t pairs = 1; pairs <= 20; pairs += 19) {
        char text[128] = "q";
        ex_encoding e = {0};
        for (uint32_t i = 0; i < pairs; i++) strcat(text, "\xcc\x81\xcc\xa3");      /* above, below; below goes first */
        encode(t, text, NULL, &e);
        assert_int_equal(e.first[1], 1 + 2 * pairs);
        for (uint32_t i = 1; i <= 2 * pairs; i++) {
            assert_int_equal(e.ids[i], i <= pairs ? 3 : 2);
            assert_int_equal(e.offsets[i].start, 2 * i - 1);
            assert_int_equal(e.offsets[i].end, 2 * i + 1);
        }
        ex_encoding_free(&e);
    }
    ex_tokenizer_free(t);
    test_remove(dir);
}

/* A whole text is cut before U+2581 where no merge reaches across it, and then has the same tokens as in one piece; where one
   does, it is not cut. */
static void test_boundary(void **state)
{
#define BOUNDARY(tokens, merges)                                                                                              \
    "{\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"fuse_unk\":true,\"vocab\":{\"?\":0,\"\\u2581\":1,\"a\":2,\"b\":3,"  \
    "\"\\u2581\\u2581\":4,\"\\u2581a\":5,\"ab\":6" tokens "},"                                                                \
    "\"merges\":[\"a b\",\"\\u2581 \\u2581\",\"\\u2581 a\"" merges "]}}"
    static const char *const files[] = {BOUNDARY("", ""), BOUNDARY(",\"b\\u2581\":7", ",\"b \\u2581\"")};
    static const char text[] = "\xe2\x96\x81\xe2\x96\x81\xe2\x96\x81" "ab\xe2\x96\x81" "axy\xe2\x96\x81"
                               "bz\xe2\x96\x81";
    static const int32_t whole[] = {4, 1, 6, 5, 0, 1, 3, 0, 1};
    char dir[512], path[600];
    (void)state;
    test_dir(dir, sizeof dir);
    for (int i = 0; i < 2; i++) {
        ex_encoding e = {0};
        ex_tokenizer *t;
        write_text(dir, "tokenizer.json", files[i], strlen(files[i]));
        t = load(test_join(path, sizeof path, dir, "tokenizer.json"));
        assert_int_equal(t->boundary, i == 0 ? 0x2581 : 0);
        for (int cut = 0; i == 0 && cut < 2; cut++, t->boundary = 0) {
            encode(t, text, NULL, &e);
            assert_int_equal(e.first[1], sizeof whole / sizeof whole[0]);
            assert_memory_equal(e.ids, whole, sizeof whole);
            assert_int_equal(e.offsets[4].end - e.offsets[4].start, 2);   /* x and y are unknown together */
        }
        ex_encoding_free(&e);
        ex_tokenizer_free(t);
    }
    test_remove(dir);
}

/* Token by token: a character comes when its last byte has come, the space before the first word never, and what can be no
   character becomes U+FFFD. */
static void test_stream(void **state)
{
    static const struct { const char *token, *adds;
    } steps[] = {{"<s>", ""}, {"\xe2\x96\x81", ""}, {"\xe2\x96\x81", " "}, {"<0xC3>", ""}, {"<0xA9>", "\xc3\xa9"},
                 {"<0x41>", "A"}, {"<0xE6>", ""}, {"<0xBC>", ""}, {"<0xA2>", "\xe6\xbc\xa2"}, {"t", "t"}, {"<0xE6>", ""},
                 {"<0x41>", "\xef\xbf\xbd\xef\xbf\xbd"}, {"<0x42>", "\xef\xbf\xbd"}, {"t", "t"}, {"<0x42>", "B"}, {"<0xF0>", ""}};
    ex_tokenizer *t = load(GOLDEN "byte-fallback.json");
    ex_error error = {""};
    ex_decoder decoder;
    ex_text out = {NULL, 0, 0};
    (void)state;
    ex_decoder_start(&decoder, t, true);
    for (int again = 0; again < 2; again++) {    /* the end makes it ready for the next text */
        for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
            const int32_t id = ex_tokenizer_id(t, steps[i].token);
            assert_true(id >= 0);
            out.length = 0;
            ex_text_put(&out, "");
            assert_true(ex_decoder_add(&decoder, id, &out, &error));
            if (strcmp(out.at, steps[i].adds) != 0)
                fail_msg("step %zu (%s) adds \"%s\", expected \"%s\"", i, steps[i].token, out.at, steps[i].adds);
        }
        out.length = 0;
        ex_decoder_end(&decoder, &out);
        assert_string_equal(out.at, "\xef\xbf\xbd");
        assert_true(ex_decoder_add(&decoder, 1000000, &out, &error));     /* no such token */
        assert_false(ex_decoder_add(&decoder, -1, &out, &error));
        assert_string_equal(out.at, "\xef\xbf\xbd");
    }
    ex_decoder_free(&decoder);
    ex_text_free(&out);
    ex_tokenizer_free(t);
}

/* A file of llama2.c that is cut or does not add up. */
static void test_llama2c_refused(void **state)
{
    char dir[512], path[600];
    size_t bytes = 0;
    ex_error error = {""};
    char *good = test_read_file(GOLDEN "llama2c.bin", &bytes);
    (void)state;
    assert_non_null(good);
    test_dir(dir, sizeof dir);
    test_join(path, sizeof path, dir, "tokenizer.bin");
    for (size_t keep = 0; keep < bytes; keep += keep < 64 ? 1 : 97) {     /* too few tokens, or the last one is cut */
        ex_tokenizer *t;
        write_text(dir, "tokenizer.bin", good, keep);
        t = ex_tokenizer_load(dir, &error);
        if (t != NULL) assert_true(ex_tokenizer_size(t) >= 259);
        else assert_non_null(strstr(error.text, "tokenizer.bin: "));
        ex_tokenizer_free(t);
    }
    good[0] = 1;                                 /* the longest token has one byte */
    write_text(dir, "tokenizer.bin", good, bytes);
    assert_null(ex_tokenizer_load(path, &error));
    assert_non_null(strstr(error.text, "token 0 at byte 4: expected a finite score and at most 1 bytes, found 5 of"));
    good[0] = 6;
    good[8] = 0x7f;                              /* and a length beyond the file */
    good[11] = 0x7f;
    write_text(dir, "tokenizer.bin", good, bytes);
    assert_null(ex_tokenizer_load(path, &error));
    free(good);
    test_remove(dir);
}

/* Every token of the vocabulary: id -> name -> id, and decoding never fails. */
static void test_names(void **state)
{
    (void)state;
    for (size_t i = 0; i < KINDS; i++) {
        ex_tokenizer *t = load(kinds[i]);
        ex_error error = {""};
        const int32_t unknown[2] = {-1, 5};
        assert_true(ex_tokenizer_size(t) > 100);
        for (int32_t id = 0; id < ex_tokenizer_size(t); id++) {
            char *text = ex_tokenizer_decode(t, &id, 1, false, NULL, &error);
            assert_non_null(ex_tokenizer_token(t, id));
            assert_int_equal(ex_tokenizer_id(t, ex_tokenizer_token(t, id)), id);
            assert_non_null(text);
            free(text);
        }
        assert_null(ex_tokenizer_token(t, -1));
        assert_null(ex_tokenizer_token(t, ex_tokenizer_size(t)));
        assert_int_equal(ex_tokenizer_id(t, "there is no such token"), -1);
        assert_null(ex_tokenizer_decode(t, unknown, 2, false, NULL, &error));
        for (int s = EX_CLS; i < 2 && s <= EX_UNK; s++) assert_true(ex_tokenizer_special(t, (ex_special)s) >= 0);
        ex_tokenizer_free(t);
    }
}

/* Character classes where the tables of ex_unicode.h speak against a plain reading of today's Unicode. */
static void test_classes(void **state)
{
    (void)state;
    assert_true(ex_is_punctuation('$') && ex_is_punctuation(0x2019) && ex_is_punctuation(0x166d));
    assert_false(ex_is_punctuation(0x61d) || ex_is_punctuation(0x20ac) || ex_is_punctuation('a'));
    assert_true(ex_is_accent(0x301) && ex_is_accent(0x1734));
    assert_false(ex_is_accent(0x1ac0) || ex_is_accent(0x903) || ex_is_accent('`'));
    assert_true(ex_is_control(0) && ex_is_control(0x200d) && ex_is_control(0xe000));
    assert_false(ex_is_control('\t') || ex_is_control(0x890) || ex_is_control(0x378));
    assert_true(ex_is_letter(0x1c89) && ex_is_letter(0xe9) && ex_is_number(0x10d40) && ex_is_number(0xbd));
    assert_true(ex_is_space(0x3000) && ex_is_space(0x85) && !ex_is_space(0x200b) && !ex_is_space(0x1f));
    assert_true(ex_is_word('_') && ex_is_word(0x24b6) && ex_is_word(0x301) && !ex_is_word('-') && !ex_is_word(0xbd));
    assert_int_equal(ex_lower(0x1e9e), 0xdf);
    assert_int_equal(ex_lower(0xa7cb), 0x264);
    assert_int_equal(ex_lower(0x10d50), 0x10d70);
    assert_int_equal(ex_combining_class(0x301), 230);
    assert_int_equal(ex_combining_class(0x1abf), 0);
}

/* Clusters: each text, and how many characters its reader sees. */
static void test_clusters(void **state)
{
    static const struct { const char *text; int clusters;
    } cases[] = {{"abc", 3}, {"\r\n\n", 2}, {"e\xcc\x81x", 2}, {"\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8\xe1\x84\x80", 2},
                 {"\xf0\x9f\x87\xa6\xf0\x9f\x87\xa7\xf0\x9f\x87\xa8", 2}, {"\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa7", 1},
                 {"a\xe2\x80\x8d\xf0\x9f\x91\xa7", 2}, {"\xe0\xa4\x95\xe0\xa5\x8d\xe0\xa4\xb7", 1},
                 {"\xe0\xa4\x95\xe0\xa4\xb7", 2},
                 {"\xd8\x80" "1", 1}, {"\xe1\xab\x8f", 1}, {"a\xe1\xab\x8f", 1}, {"\n\xcc\x81", 2}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ex_grapheme cluster = {0};
        int count = 0;
        for (size_t at = 0, bytes = strlen(cases[i].text); at < bytes;) {
            uint32_t code;
            at += ex_utf8_decode(cases[i].text + at, bytes - at, &code, NULL);
            count += !ex_grapheme_joins(&cluster, code);
        }
        if (count != cases[i].clusters) fail_msg("case %zu has %d clusters, expected %d", i, count, cases[i].clusters);
    }
    assert_int_equal(ex_compose('e', 0x301), 0xe9);
    assert_int_equal(ex_compose(0x1100, 0x1161), 0xac00);
    assert_int_equal(ex_compose('x', 0x301), 0);
    assert_int_equal(ex_compose(0x915, 0x93c), 0);         /* excluded from composition */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_wordpiece), cmocka_unit_test(test_golden_byte_bpe), cmocka_unit_test(test_shared_bert),
        cmocka_unit_test(test_golden_unigram), cmocka_unit_test(test_golden_byte_fallback), cmocka_unit_test(test_golden_llama3),
        cmocka_unit_test(test_golden_llama2c), cmocka_unit_test(test_shared_t5), cmocka_unit_test(test_shared_llama),
        cmocka_unit_test(test_shared_stories),
        cmocka_unit_test(test_shared_roberta), cmocka_unit_test(test_vocab_txt), cmocka_unit_test(test_vocab_and_merges),
        cmocka_unit_test(test_refusals), cmocka_unit_test(test_missing_files),
        cmocka_unit_test(test_truncation_errors), cmocka_unit_test(test_invalid_utf8), cmocka_unit_test(test_long_texts),
        cmocka_unit_test(test_one_long_word), cmocka_unit_test(test_boundary), cmocka_unit_test(test_stream),
        cmocka_unit_test(test_order_of_marks),
        cmocka_unit_test(test_llama2c_refused), cmocka_unit_test(test_names), cmocka_unit_test(test_classes),
        cmocka_unit_test(test_clusters)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
