/* Fuzz target: the example programs' tokenizer. The first byte chooses: the rest is a tokenizer.json, or a tokenizer of llama2.c,
   or a text (and, behind a 0 byte, its pair) for one of four small tokenizers. Whatever is accepted must keep its promises.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_tokenizer.c -lutf8proc -lm && ./a.out corpus/tokenizer */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#include "../examples/common/ex_tokenizer.h"

static const char *const fuzz_formats[] = {"tokenizer.json", "tokenizer of llama2.c", "text", NULL};
#include "fuzz.h"

static ex_tokenizer *load(const char *json, size_t bytes, ex_error *error)
{
    exi_tok_loader l;
    int64_t replaced = 0;
    bool fine;
    char *text = ex_copy(json, bytes);
    memset(&l, 0, sizeof l);
    l.error = error;
    l.t = (ex_tokenizer *)ex_alloc(1, sizeof(ex_tokenizer));
    l.t->unk_id = -1;
    l.json.text = ex_utf8_repair(text, &bytes, &replaced);
    fine = ex_json_parse(&l.json, "fuzz", 1, l.json.text, bytes, error);
    l.root = ex_json_root(&l.json);
    fine = fine && l.root->type == EX_JSON_OBJECT && exi_tok_read_tokenizer_json(&l);
    if (fine) {
        exi_tok_find_specials(l.t, NULL);
        exi_tok_build_tries(l.t);
    }
    ex_json_free(&l.json);
    if (fine) return l.t;
    ex_tokenizer_free(l.t);
    return NULL;
}

static ex_tokenizer *load_bin(const char *file, size_t bytes, ex_error *error)
{
    exi_tok_loader l;
    memset(&l, 0, sizeof l);
    l.error = error;
    l.t = (ex_tokenizer *)ex_alloc(1, sizeof(ex_tokenizer));
    l.t->unk_id = -1;
    if (exi_tok_bin(&l, "fuzz", file, bytes)) return l.t;
    ex_tokenizer_free(l.t);
    return NULL;
}

/* Offsets lie in the text, tokens follow one another, each id has a name. */
static void check_encoding(const ex_tokenizer *t, const ex_encode_desc *desc, const ex_encoding *e)
{
    const size_t count = stbds_arrlenu(e->ids);
    fuzz_check(e->windows >= 1 && e->first[0] == 0 && (size_t)e->first[e->windows] == count);
    fuzz_check(stbds_arrlenu(e->types) == count && stbds_arrlenu(e->sequence) == count && stbds_arrlenu(e->offsets) == count);
    for (int32_t w = 0; w < e->windows; w++) {
        const int32_t length = e->first[w + 1] - e->first[w];
        uint32_t last[2] = {0, 0};
        fuzz_check(length >= 0 && (desc->max_length == 0 || length <= desc->max_length));
        for (int32_t i = e->first[w]; i < e->first[w + 1]; i++) {
            const int s = e->sequence[i];
            fuzz_check(e->types[i] == 0 || e->types[i] == 1);
            if (s < 0) continue;
            fuzz_check(s == 0 || desc->pair != NULL);
            fuzz_check(ex_tokenizer_token(t, e->ids[i]) != NULL);
            fuzz_check(e->offsets[i].start <= e->offsets[i].end &&
                       e->offsets[i].end <= (s == 0 ? desc->bytes : desc->pair_bytes));
            fuzz_check(e->offsets[i].end >= last[s]);
            last[s] = e->offsets[i].end;
        }
    }
}

/* Token by token: nothing that is no character, and all that decoding at once gives where it replaces nothing. */
static void check_stream(const ex_tokenizer *t, const ex_encoding *e, bool skip, const char *text, size_t bytes)
{
    ex_text out = {NULL, 0, 0};
    ex_decoder decoder;
    bool replaced = false;
    ex_text_put(&out, "");
    ex_decoder_start(&decoder, t, skip);
    for (int32_t i = 0; i < e->first[1]; i++) {
        fuzz_check(ex_decoder_add(&decoder, e->ids[i], &out, NULL));
        fuzz_check(ex_utf8_valid_prefix(out.at, out.length) == out.length);
    }
    ex_decoder_end(&decoder, &out);
    for (size_t i = 0; i + 3 <= bytes; i++) replaced = replaced || memcmp(text + i, "\xef\xbf\xbd", 3) == 0;
    fuzz_check(replaced || (out.length == bytes && memcmp(out.at, text, bytes) == 0));
    ex_decoder_free(&decoder);
    ex_text_free(&out);
}

static void check_decode(const ex_tokenizer *t, const ex_encoding *e)
{
    for (int skip = 0; skip < 2; skip++) {
        size_t bytes = 0;
        char *text = ex_tokenizer_decode(t, e->ids, e->first[1], skip, &bytes, NULL);
        fuzz_check(text != NULL && ex_utf8_valid_prefix(text, bytes) == bytes && text[bytes] == 0);
        check_stream(t, e, skip, text, bytes);
        free(text);
    }
}

static bool encode(const ex_tokenizer *t, const char *text, size_t bytes, uint8_t how)
{
    const char *zero = bytes > 0 && (how & 1) ? (const char *)memchr(text, 0, bytes) : NULL;
    ex_encode_desc desc;
    ex_encoding e;
    ex_error error = {""};
    memset(&desc, 0, sizeof desc);
    memset(&e, 0, sizeof e);
    desc.text = text;
    desc.bytes = zero != NULL ? (size_t)(zero - text) : bytes;
    desc.pair = zero != NULL ? zero + 1 : NULL;
    desc.pair_bytes = zero != NULL ? bytes - desc.bytes - 1 : 0;
    desc.no_special = (how & 2) != 0;
    desc.windows = (how & 4) != 0;
    desc.max_length = how >> 3 == 0 ? 0 : (how >> 3) + 1;
    desc.stride = how >> 5;
    desc.truncation = (ex_truncation)(how % 3);
    const bool fine = ex_tokenizer_encode(t, &desc, &e, &error);
    if (fine) {
        check_encoding(t, &desc, &e);
        check_decode(t, &e);
    } else {
        fuzz_check(error.text[0] != 0 && e.windows == 0);
    }
    ex_encoding_free(&e);
    return fine;
}

/* Byte-level BPE loses nothing: the decoded text is the text. */
static void round_trip(const ex_tokenizer *t, const char *text, size_t bytes)
{
    ex_encode_desc desc;
    ex_encoding e;
    ex_text repaired = {NULL, 0, 0};
    size_t got = 0;
    char *back;
    memset(&desc, 0, sizeof desc);
    memset(&e, 0, sizeof e);
    desc.text = text;
    desc.bytes = bytes;
    desc.no_special = true;
    fuzz_check(ex_tokenizer_encode(t, &desc, &e, NULL));
    back = ex_tokenizer_decode(t, e.ids, e.first[1], false, &got, NULL);
    ex_text_put(&repaired, "");
    ex_utf8_add_repaired(&repaired, text, bytes);
    fuzz_check(back != NULL && got == repaired.length && memcmp(back, repaired.at, got) == 0);
    free(back);
    ex_text_free(&repaired);
    ex_encoding_free(&e);
}

/* All 256 bytes are tokens; "ab", "abab", " a", "th" and "the" too. No added tokens. */
static ex_tokenizer *make_bytes(void)
{
    ex_text json = {NULL, 0, 0};
    ex_error error = {""};
    ex_tokenizer *t;
    ex_text_put(&json, "{\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int b = 0; b < 256; b++) ex_text_format(&json, "\"\\u%04x\":%d,", exi_tok_byte_letter((unsigned char)b), b);
    ex_text_put(
        &json,
        "\"ab\":256,\"abab\":257,\"\\u0120a\":258,\"th\":259,\"the\":260},\"merges\":[\"t h\",\"a b\","
        "\"\\u0120 a\",\"th e\",\"ab ab\"]},"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"decoder\":{\"type\":\"ByteLevel\"}}");
    t = load(json.at, json.length, &error);
    fuzz_check(t != NULL);
    ex_text_free(&json);
    return t;
}

static ex_tokenizer *make_words(void)
{
    static const char json[] =
        "{\"model\":{\"type\":\"WordPiece\",\"unk_token\":\"[UNK]\",\"vocab\":{\"[UNK]\":0,\"[CLS]\":1,"
        "\"[SEP]\":2,\"[MASK]\":3,\"a\":4,\"##a\":5,\"b\":6,\"##b\":7,"
        "\"ab\":8,\"##ab\":9,\"the\":10,\",\":11,\".\":12,\"'\":13,\"##the\":14,\"i\":15}},"
        "\"normalizer\":{\"type\":\"BertNormalizer\"},"
        "\"pre_tokenizer\":{\"type\":"
        "\"BertPreTokenizer\"},\"decoder\":{\"type\":\"WordPiece\"},\"added_tokens\":[{\"id\":3,\"content\":\"[MASK]\","
        "\"lstrip\":true,\"special\":true},"
        "{\"id\":16,\"content\":\"The B\",\"single_word\":true,\"normalized\":true},{\"id\":17,\"content\":\"<e>\","
        "\"rstrip\":true,\"normalized\":false}],"
        "\"post_processor\":{\"type\":\"BertProcessing\",\"cls\":[\"[CLS]\",1],\"sep\":[\"[SEP]\",2]}}";
    ex_error error = {""};
    ex_tokenizer *t = load(json, sizeof json - 1, &error);
    fuzz_check(t != NULL);
    return t;
}

/* The 256 bytes, and a few tokens of several characters, one with U+2581 for a space. */
static ex_tokenizer *make_fallback(void)
{
    ex_text json = {NULL, 0, 0};
    ex_error error = {""};
    ex_tokenizer *t;
    ex_text_put(&json, "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"unk_token\":\"<unk>\",\"vocab\":{\"<unk>\":256,");
    for (int b = 0; b < 256; b++) ex_text_format(&json, "\"<0x%02X>\":%d,", (unsigned)b, b);
    ex_text_put(&json,
                "\"\\u2581\":257,\"a\":258,\"b\":259,\"ab\":260,\"\\u2581ab\":261,\"\\u00e9\":262},\"merges\":[\"a b\","
                "\"\\u2581 ab\"]},\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},"
                "{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},"
                "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]},"
                "\"decoder\":{\"type\":\"Sequence\",\"decoders\":["
                "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\\u2581\"},\"content\":\" \"},"
                "{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},"
                "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}}");
    t = load(json.at, json.length, &error);
    fuzz_check(t != NULL);
    ex_text_free(&json);
    return t;
}

/* By its map "A" becomes a space, "B" nothing, and "e" with an acute accent one letter. */
static ex_tokenizer *make_unigram(void)
{
    static const char json[] =
        "{\"model\":{\"type\":\"Unigram\",\"unk_id\":0,\"vocab\":[[\"<unk>\",0],[\"\\u2581\",-2],[\"a\",-1],[\"ab\",-1.5],"
        "[\"b\",-1],[\"aba\",-3],[\"\\u2581the\",-2],[\"\\u00e9\",-4],[\"fi\",-3]]},\"normalizer\":{\"type\":\"Sequence\","
        "\"normalizers\":[{\"type\":\"Precompiled\",\"precompiled_charsmap\":"
        "\"hAAAAAAUAQAAAACAAgAAgMwcAgBBFQAAgQ0AAAMAAIBCFQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAZbwDACAAAMOpAA==\"},"
        "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true},"
        "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" {2,}\"},\"content\":\"\\u2581\"}]},"
        "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"first\"},"
        "\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\"},\"added_tokens\":[{\"id\":9,\"content\":\"the B\","
        "\"lstrip\":true,\"rstrip\":true}]}";
    ex_error error = {""};
    ex_tokenizer *t = load(json, sizeof json - 1, &error);
    fuzz_check(t != NULL);
    return t;
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    static ex_tokenizer *kinds[4];               /* live as long as the process */
    static const char text[] = "The ab the, abab! [MASK] b\0it's <e> \xc3\xa9";
    ex_error error = {""};
    if (kinds[0] == NULL) {
        kinds[0] = make_bytes();
        kinds[1] = make_words();
        kinds[2] = make_fallback();
        kinds[3] = make_unigram();
    }
    if (size < 2) return 0;
    if (data[0] == '{' || data[0] == 'B') {      /* a tokenizer.json as it is, or "B" and a tokenizer of llama2.c */
        ex_tokenizer *t = data[0] == '{' ? load((const char *)data, size, &error)
                                         : load_bin((const char *)data + 1, size - 1, &error);
        fuzz_check(t != NULL || error.text[0] != 0);
        for (int how = 0; t != NULL && how < 256; how += 37) (void)encode(t, text, sizeof text - 1, (uint8_t)how);
        if (t != NULL) (void)encode(t, (const char *)data, size < 200 ? size : 200, 0);
        ex_tokenizer_free(t);
        return t == NULL ? 0 : data[0] == '{' ? 1 : 2;
    }
    if ((data[0] & 3) == 0) round_trip(kinds[0], (const char *)data + 2, size - 2);
    return encode(kinds[data[0] & 3], (const char *)data + 2, size - 2, data[1]) ? 4 : 0;
}
