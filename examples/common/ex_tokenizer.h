/* ex_tokenizer.h - text to token ids and back, with the ids, truncation and windows of Hugging Face tokenizers, for the kinds
   that checkpoints ship:

     WordPiece                         BERT
     byte-level BPE                    GPT-2, RoBERTa; LLaMA 3 and Qwen 2 with their own splitting into words
     BPE with byte fallback            LLaMA 1 and 2, Mistral
     Unigram with a character map      T5 and other SentencePiece models
     SentencePiece's BPE by scores     llama2.c's tokenizer.bin

       ex_tokenizer *tokenizer = ex_tokenizer_load("roberta-base", &error);
       ex_encode_desc desc = {0};
       ex_encoding encoding = {0};
       desc.text = "Hello";  desc.bytes = 5;
       ex_tokenizer_encode(tokenizer, &desc, &encoding, &error);      -> encoding.ids[0 .. encoding.first[1])
       ex_encoding_free(&encoding);
       ex_tokenizer_free(tokenizer);

   A text runs through these stages, each over an array of characters that know their bytes in the text:
     decode UTF-8 -> cut out added tokens ("<mask>") -> normalise -> split into words -> model -> truncate ->
     put into the template ("[CLS] A [SEP] B [SEP]").
   Each stage takes time proportional to the text (BPE: times the logarithm of the longest word; WordPiece and Unigram: times
   the longest token), whatever the text is, and none recurses over it. One file per stage: ex_tokenizer_normal.h,
   ex_tokenizer_split.h, ex_tokenizer_model.h; the way back is ex_tokenizer_decode.h, files are read by ex_tokenizer_load.h.

   Where this differs from Hugging Face on purpose: offsets. A space that was only put before the text (add_prefix_space)
   has no bytes, and with trim_offsets a real leading space is always left out. */
#ifndef EX_TOKENIZER_H
#define EX_TOKENIZER_H

#include "ex_base.h"
#include "ex_json.h"
#include "ex_unicode.h"

typedef enum ex_special { EX_CLS, EX_SEP, EX_PAD, EX_MASK, EX_UNK, EX_BOS, EX_EOS } ex_special;
#define EX_SPECIALS 7

typedef enum ex_truncation { EX_LONGEST_FIRST = 0, EX_ONLY_FIRST, EX_ONLY_SECOND } ex_truncation;

/* Zero-initialise: one text, special tokens, no limit. */
typedef struct ex_encode_desc {
    const char *text;
    size_t bytes;
    const char *pair;                 /* NULL: one sequence */
    size_t pair_bytes;
    bool no_special;                  /* without [CLS], [SEP], ... */
    int32_t max_length;               /* special tokens included; 0: no limit */
    ex_truncation truncation;
    bool windows;                     /* what truncation cuts off becomes further windows ... */
    int32_t stride;                   /* ... that share this many tokens with the one before */
} ex_encode_desc;

typedef struct ex_span { uint32_t start, end; } ex_span;

/* Zero-initialise, reuse over calls, ex_encoding_free at the end. Arrays are stb_ds arrays. */
typedef struct ex_encoding {
    int32_t windows;                  /* 1 unless desc.windows */
    bool truncated;                   /* something was cut off (or went into further windows) */
    int32_t *first;                   /* [windows + 1]: window w is tokens first[w] .. first[w + 1] */
    int32_t *ids, *types;
    int8_t *sequence;                 /* 0: of text, 1: of pair, -1: special token of the template */
    ex_span *offsets;                 /* bytes in text or pair; 0, 0 for tokens of the template */
    struct exi_tok_work *work;        /* buffers */
} ex_encoding;

/* ------------------------------------------------------------------------------------------------ what a tokenizer holds */

#define EXI_TOK_STEPS 8               /* steps of a normalizer, of a pre-tokenizer, of a decoder */

typedef enum exi_tok_model { EXI_TOK_WORDPIECE = 1, EXI_TOK_BPE, EXI_TOK_UNIGRAM } exi_tok_model;

typedef enum exi_tok_normal_kind {
    EXI_TOK_NORMAL_BERT = 1, EXI_TOK_NORMAL_CHARMAP, EXI_TOK_NORMAL_PREPEND, EXI_TOK_NORMAL_REPLACE, EXI_TOK_NORMAL_SPACES,
    EXI_TOK_NORMAL_STRIP, EXI_TOK_NORMAL_LOWERCASE, EXI_TOK_NORMAL_NFC
} exi_tok_normal_kind;

typedef struct exi_tok_normal_step {
    exi_tok_normal_kind kind;
    uint32_t *from, *to;              /* REPLACE from, to; SPACES (a run of two or more) and PREPEND to: characters, stb_ds */
    bool left, right;                 /* STRIP */
    bool clean_text, chinese, strip_accents, lowercase;    /* BERT */
} exi_tok_normal_step;

typedef enum exi_tok_split_kind {
    EXI_TOK_SPLIT_BERT = 1, EXI_TOK_SPLIT_GPT2, EXI_TOK_SPLIT_LLAMA3, EXI_TOK_SPLIT_SPACES, EXI_TOK_SPLIT_DIGITS,
    EXI_TOK_SPLIT_METASPACE, EXI_TOK_SPLIT_NOTHING
} exi_tok_split_kind;
typedef enum exi_tok_prefix { EXI_TOK_NEVER = 0, EXI_TOK_FIRST, EXI_TOK_ALWAYS } exi_tok_prefix;

typedef struct exi_tok_split_step {
    exi_tok_split_kind kind;
    exi_tok_prefix prefix;            /* GPT2, METASPACE, NOTHING: is a space put before a text that has none? */
    uint32_t space;                   /* that space; METASPACE: what all spaces become */
    bool whole;                       /* METASPACE: one word, only the characters change */
    int32_t digits;                   /* LLAMA3: most digits of a word; DIGITS: 1, or 0 for any number */
} exi_tok_split_step;

typedef enum exi_tok_decode_kind {
    EXI_TOK_DECODE_JOIN = 1, EXI_TOK_DECODE_WORDPIECE, EXI_TOK_DECODE_BYTES, EXI_TOK_DECODE_REPLACE, EXI_TOK_DECODE_FALLBACK,
    EXI_TOK_DECODE_FUSE, EXI_TOK_DECODE_STRIP, EXI_TOK_DECODE_METASPACE
} exi_tok_decode_kind;

typedef struct exi_tok_decode_step {
    exi_tok_decode_kind kind;
    char *from, *to;                  /* REPLACE; WORDPIECE: from is the prefix; STRIP, METASPACE: from is the character */
    int64_t start, stop;              /* STRIP: how many at most */
    bool cleanup;                     /* WORDPIECE */
    bool drop;                        /* METASPACE: the first token loses its spaces */
} exi_tok_decode_step;

/* SentencePiece's "precompiled" map from short byte sequences to texts. */
typedef struct exi_tok_charmap {
    uint32_t *units;                  /* a double array, as Darts lays it out */
    size_t count;
    char *texts;                      /* all replacements, each ended by NUL */
    size_t bytes;
} exi_tok_charmap;

/* One place of the template: a sequence (id -1) or a special token. */
typedef struct exi_tok_piece { int32_t id, type; int8_t sequence; } exi_tok_piece;

/* A token that is cut out of the text before the model sees it. */
typedef struct exi_tok_added {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
    char *decoded;                    /* what decoding writes, where there is a normalizer; else NULL */
} exi_tok_added;

/* Tokens as a tree of characters: the added ones of one kind (matched before or after normalisation), or a vocabulary. */
typedef struct exi_tok_trie {
    ex_map children;                  /* {node, character} -> node */
    int32_t *value;                   /* per node: which token ends there (index of an added one, id), or -1 */
    bool root[256];                   /* by the low byte of the first character: may a token start here? */
} exi_tok_trie;

typedef struct exi_tok_rule { int32_t id, rank; } exi_tok_rule;   /* of a merge: its product; lower ranks go first */

typedef struct ex_tokenizer {
    exi_tok_model model;
    ex_map vocab;                     /* of the model: token -> id */
    ex_map specials;                  /* added tokens: content -> index in added */
    exi_tok_added *added;
    exi_tok_trie raw, normalized;
    ex_map names;                     /* token -> id, of all */
    int32_t *name_of;                 /* [size]: id -> entry of names, or -1 */
    int32_t special[EX_SPECIALS];     /* -1: none */
    exi_tok_piece *single, *pair;     /* templates */
    exi_tok_normal_step normal[EXI_TOK_STEPS];
    exi_tok_split_step split[EXI_TOK_STEPS];
    exi_tok_decode_step decode[EXI_TOK_STEPS];
    int32_t normals, splits, decodes; /* how many there are */
    exi_tok_charmap charmap;
    bool trim_offsets;
    int32_t unk_id;                   /* -1: none */
    size_t longest;                   /* bytes of the longest token */
    int32_t byte_id[256];             /* token of each byte, -1: none */
    bool byte_fallback;               /* a character without a token becomes its bytes (<0xE2> ...) */
    /* WordPiece */
    char *prefix;                     /* "##" */
    size_t prefix_bytes;
    int64_t max_word;                 /* characters; longer words are unknown */
    /* BPE */
    ex_map merges;                    /* {left id, right id} -> index in rules */
    exi_tok_rule *rules;
    bool byte_level, fuse_unk, ignore_merges;
    uint32_t boundary;                /* no merge crosses the place before this character, unless it follows itself; 0: none */
    /* Unigram */
    exi_tok_trie pieces;              /* value: id */
    double *scores;                   /* by id */
    double unk_score;
} ex_tokenizer;

/* One character and the bytes of the text it comes from; start == end: put in. */
typedef struct exi_tok_char { uint32_t code, start, end; } exi_tok_char;
typedef struct exi_tok_token { int32_t id; ex_span at; } exi_tok_token;
/* A BPE symbol: bytes [at, end) of the word; at == end: merged into its left neighbour. */
typedef struct exi_tok_symbol { int32_t id, previous, next; uint32_t at, end; } exi_tok_symbol;
typedef struct exi_tok_merge { int32_t rank, at, id; } exi_tok_merge;
/* Unigram: the best way to cut a word up to here: its score, and its last piece. */
typedef struct exi_tok_path { double score; int32_t from, id; } exi_tok_path;
typedef struct exi_tok_cut { int32_t from[2], to[2]; } exi_tok_cut;       /* one window: a range of each sequence */

typedef struct exi_tok_work {
    exi_tok_char *raw, *normal, *parts, *clean, *marks;    /* characters per stage */
    exi_tok_char *split[EXI_TOK_STEPS];
    char *bytes;                      /* of a word: behind the room for the prefix */
    uint32_t *starts;                 /* WordPiece, Unigram: byte of each character; BPE: character of each byte */
    exi_tok_symbol *symbols;
    exi_tok_merge *heap;
    exi_tok_path *paths;
    exi_tok_token *tokens[2];         /* of text and pair, before truncation */
    exi_tok_cut *cuts;
} exi_tok_work;

EX_API void exi_tok_emit(exi_tok_token **out, int32_t id, uint32_t start, uint32_t end)
{
    exi_tok_token token;
    token.id = id;
    token.at.start = start;
    token.at.end = end;
    stbds_arrput(*out, token);
}

/* ------------------------------------------------------------------------------------------------ trees */

EX_API int32_t exi_tok_child(const exi_tok_trie *trie, int32_t node, uint32_t code)
{
    uint32_t key[2];
    key[0] = (uint32_t)node;
    key[1] = code;
    return ex_map_get(&trie->children, key, sizeof(key), -1);
}

/* A later token of the same characters takes the place of an earlier one. */
EX_API void exi_tok_trie_add(exi_tok_trie *trie, const exi_tok_char *chars, size_t count, int32_t value)
{
    int32_t node = 0;
    if (trie->value == NULL) stbds_arrput(trie->value, -1);
    trie->root[chars[0].code & 255] = true;
    for (size_t i = 0; i < count; i++) {
        const int32_t child = exi_tok_child(trie, node, chars[i].code);
        uint32_t key[2];
        key[0] = (uint32_t)node;
        key[1] = chars[i].code;
        node = child >= 0 ? child : (int32_t)stbds_arrlenu(trie->value);
        if (child >= 0) continue;
        ex_map_put(&trie->children, key, sizeof(key), node);
        stbds_arrput(trie->value, -1);
    }
    trie->value[node] = value;
}

EX_API void exi_tok_trie_free(exi_tok_trie *trie)
{
    ex_map_free(&trie->children);
    stbds_arrfree(trie->value);
}

/* Appends the characters of a text, with their places in it. */
EX_API void exi_tok_characters(exi_tok_char **out, const char *text, size_t bytes)
{
    for (size_t at = 0; at < bytes;) {
        exi_tok_char one;
        one.start = (uint32_t)at;
        at += ex_utf8_decode(text + at, bytes - at, &one.code, NULL);
        one.end = (uint32_t)at;
        stbds_arrput(*out, one);
    }
}

#include "ex_tokenizer_normal.h"
#include "ex_tokenizer_model.h"
#include "ex_tokenizer_split.h"

/* ------------------------------------------------------------------------------------------------ added tokens */

/* The longest added token at text: its index, or -1. */
EX_API int32_t exi_tok_match(const exi_tok_trie *trie, const exi_tok_char *text, size_t count, size_t *length)
{
    int32_t node = 0, found = -1;
    if (!trie->root[text[0].code & 255]) return -1;
    for (size_t i = 0; i < count; i++) {
        node = exi_tok_child(trie, node, text[i].code);
        if (node < 0) break;
        if (trie->value[node] < 0) continue;
        found = trie->value[node];
        *length = i + 1;
    }
    return found;
}

typedef void (*exi_tok_rest)(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text,
                             size_t count);

/* Cuts added tokens out of text and gives what lies between them to `rest`. */
EX_API void exi_tok_cut_added(const ex_tokenizer *t, const exi_tok_trie *trie, exi_tok_work *work, exi_tok_token **out,
                              const exi_tok_char *text, size_t count, exi_tok_rest rest)
{
    size_t done = 0, at = 0;
    while (at < count) {
        size_t length = 0, start = at, stop;
        const int32_t index = trie->value != NULL ? exi_tok_match(trie, text + at, count - at, &length) : -1;
        const exi_tok_added *added = index >= 0 ? &t->added[index] : NULL;
        if (added == NULL) {
            at++;
            continue;
        }
        stop = at = at + length;
        if (added->single_word &&
            ((start > 0 && ex_is_word(text[start - 1].code)) || (stop < count && ex_is_word(text[stop].code)))) {
            continue;
        }
        if (start < done) start = done;
        while (added->lstrip && start > done && ex_is_space(text[start - 1].code)) start--;
        while (added->rstrip && stop < count && ex_is_space(text[stop].code)) stop++;
        if (start > done) rest(t, work, out, text + done, start - done);
        done = stop;
        while (t->trim_offsets && start + 1 < stop && ex_is_space(text[start].code)) start++;
        while (t->trim_offsets && start + 1 < stop && ex_is_space(text[stop - 1].code)) stop--;
        exi_tok_emit(out, added->id, text[start].start, text[stop - 1].end);
    }
    if (count > done) rest(t, work, out, text + done, count - done);
}

/* Between the added tokens that are matched in the raw text: normalise, then cut out those matched afterwards. */
EX_API void exi_tok_segment(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text,
                            size_t count)
{
    exi_tok_normalise(t, work, text, count);
    exi_tok_cut_added(t, &t->normalized, work, out, work->normal, stbds_arrlenu(work->normal), exi_tok_split);
}

/* All tokens of one text, without template and truncation. */
EX_API void exi_tok_sequence(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const char *text, size_t bytes)
{
    stbds_arrsetlen(work->raw, 0);
    stbds_arrsetlen(*out, 0);
    exi_tok_characters(&work->raw, text, bytes);
    exi_tok_cut_added(t, &t->raw, work, out, work->raw, stbds_arrlenu(work->raw), exi_tok_segment);
}

/* ------------------------------------------------------------------------------------------------ truncation and template */

/* How many tokens of each sequence stay when both are cut: the shorter one keeps all it has up to half of the room. */
EX_API void exi_tok_longest_first(int32_t keep[2], int32_t room)
{
    const bool swap = keep[0] > keep[1];
    int32_t shorter = swap ? keep[1] : keep[0], longer;
    longer = shorter > room ? shorter : shorter > room - shorter ? shorter : room - shorter;
    if (shorter + longer > room) {
        shorter = room / 2;
        longer = shorter + room % 2;
    }
    keep[0] = swap ? longer : shorter;
    keep[1] = swap ? shorter : longer;
}

EX_API void exi_tok_add_cut(exi_tok_work *work, const int32_t count[2], int which, int32_t from, int32_t to)
{
    exi_tok_cut cut;
    cut.from[0] = cut.from[1] = 0;
    cut.to[0] = count[0];
    cut.to[1] = count[1];
    cut.from[which] = from;
    cut.to[which] = to;
    stbds_arrput(work->cuts, cut);
}

/* Only one sequence is cut, to `keep` tokens; with windows the rest follows, `stride` tokens repeated each time. */
EX_API bool exi_tok_cut_one(const ex_encode_desc *desc, exi_tok_work *work, const int32_t count[2], int which, int32_t keep,
                            ex_error *error)
{
    int32_t from = 0;
    if (!desc->windows) {
        exi_tok_add_cut(work, count, which, 0, keep);
        return true;
    }
    if (desc->stride < 0 || desc->stride >= keep) {
        return ex_fail(error, "windows: a stride of %d tokens needs more than the %d tokens that fit into a window", desc->stride,
                       keep);
    }
    for (;; from += keep - desc->stride) {
        const int32_t to = count[which] - from > keep ? from + keep : count[which];
        exi_tok_add_cut(work, count, which, from, to);
        if (to == count[which]) return true;
    }
}

/* Fills work->cuts. room: tokens without those of the template. */
EX_API bool exi_tok_truncate(const ex_encode_desc *desc, exi_tok_work *work, int32_t special, ex_error *error)
{
    const int32_t room = desc->max_length - special;
    int32_t count[2], keep[2];
    int which = desc->truncation == EX_ONLY_SECOND ? 1 : 0;
    for (int i = 0; i < 2; i++) keep[i] = count[i] = (int32_t)stbds_arrlenu(work->tokens[i]);
    stbds_arrsetlen(work->cuts, 0);
    if (desc->max_length > 0 && room < 0) {
        return ex_fail(error, "max_length %d does not hold the %d special tokens", desc->max_length, special);
    }
    if (desc->max_length == 0 || (int64_t)count[0] + count[1] <= room) {
        exi_tok_add_cut(work, count, 0, 0, count[0]);
        return true;
    }
    if (room == 0) {                                       /* nothing but special tokens */
        keep[0] = keep[1] = 0;
        exi_tok_add_cut(work, keep, 0, 0, 0);
        return true;
    }
    if (desc->truncation == EX_LONGEST_FIRST && desc->pair != NULL) {
        if (desc->windows) return ex_fail(error, "windows of a pair need truncation of only the first or only the second text");
        exi_tok_longest_first(keep, room);
        exi_tok_add_cut(work, keep, 0, 0, keep[0]);
        return true;
    }
    if (which == 1 && desc->pair == NULL) return ex_fail(error, "truncation of the second text, but there is only one");
    keep[which] = room - count[1 - which];
    if (keep[which] <= 0) {
        return ex_fail(error, "the %s text alone has %d tokens, so nothing of the %s one fits into max_length %d",
                       which ? "first" : "second", count[1 - which], which ? "second" : "first", desc->max_length);
    }
    return exi_tok_cut_one(desc, work, count, which, keep[which], error);
}

EX_API void exi_tok_put(ex_encoding *e, int32_t id, int32_t type, int8_t sequence, ex_span at)
{
    stbds_arrput(e->ids, id);
    stbds_arrput(e->types, type);
    stbds_arrput(e->sequence, sequence);
    stbds_arrput(e->offsets, at);
}

EX_API void exi_tok_fill(ex_encoding *e, const exi_tok_piece *form, const exi_tok_cut *cut, bool no_special)
{
    for (size_t i = 0; i < stbds_arrlenu(form); i++) {
        const exi_tok_piece *piece = &form[i];
        const ex_span nowhere = {0, 0};
        if (piece->id >= 0) {
            if (!no_special) exi_tok_put(e, piece->id, piece->type, -1, nowhere);
            continue;
        }
        for (int32_t k = cut->from[piece->sequence]; k < cut->to[piece->sequence]; k++) {
            const exi_tok_token *token = &e->work->tokens[piece->sequence][k];
            exi_tok_put(e, token->id, piece->type, piece->sequence, token->at);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ encode */

/* Texts that are no UTF-8 are read with U+FFFD. On failure the encoding is empty. */
EX_API bool ex_tokenizer_encode(const ex_tokenizer *tokenizer, const ex_encode_desc *desc, ex_encoding *encoding, ex_error *error)
{
    const exi_tok_piece *form = desc->pair != NULL ? tokenizer->pair : tokenizer->single;
    const size_t limit = (size_t)1 << 29;
    int32_t special = 0;
    if (encoding->work == NULL) encoding->work = (exi_tok_work *)ex_alloc(1, sizeof(exi_tok_work));
    encoding->windows = 0;
    stbds_arrsetlen(encoding->first, 0);
    stbds_arrsetlen(encoding->ids, 0);
    stbds_arrsetlen(encoding->types, 0);
    stbds_arrsetlen(encoding->sequence, 0);
    stbds_arrsetlen(encoding->offsets, 0);
    stbds_arrput(encoding->first, 0);
    if (desc->bytes > limit || (desc->pair != NULL && desc->pair_bytes > limit))
        return ex_fail(error, "a text of more than 512 MiB");
    exi_tok_sequence(tokenizer, encoding->work, &encoding->work->tokens[0], desc->text, desc->bytes);
    exi_tok_sequence(tokenizer, encoding->work, &encoding->work->tokens[1], desc->pair,
                     desc->pair != NULL ? desc->pair_bytes : 0);
    for (size_t i = 0; i < stbds_arrlenu(form); i++) special += form[i].id >= 0 && !desc->no_special;
    encoding->truncated = desc->max_length > 0 &&
                          stbds_arrlenu(encoding->work->tokens[0]) + stbds_arrlenu(encoding->work->tokens[1]) + (size_t)special >
                              (size_t)desc->max_length;
    if (!exi_tok_truncate(desc, encoding->work, special, error)) return false;
    for (size_t w = 0; w < stbds_arrlenu(encoding->work->cuts); w++) {
        exi_tok_fill(encoding, form, &encoding->work->cuts[w], desc->no_special);
        stbds_arrput(encoding->first, (int32_t)stbds_arrlenu(encoding->ids));
        encoding->windows++;
    }
    return true;
}

EX_API void ex_encoding_free(ex_encoding *encoding)
{
    exi_tok_work *work = encoding->work;
    stbds_arrfree(encoding->first);
    stbds_arrfree(encoding->ids);
    stbds_arrfree(encoding->types);
    stbds_arrfree(encoding->sequence);
    stbds_arrfree(encoding->offsets);
    if (work != NULL) {
        stbds_arrfree(work->raw);
        stbds_arrfree(work->normal);
        stbds_arrfree(work->parts);
        stbds_arrfree(work->clean);
        stbds_arrfree(work->marks);
        for (int i = 0; i < EXI_TOK_STEPS; i++) stbds_arrfree(work->split[i]);
        stbds_arrfree(work->bytes);
        stbds_arrfree(work->starts);
        stbds_arrfree(work->symbols);
        stbds_arrfree(work->heap);
        stbds_arrfree(work->paths);
        stbds_arrfree(work->tokens[0]);
        stbds_arrfree(work->tokens[1]);
        stbds_arrfree(work->cuts);
        free(work);
    }
    memset(encoding, 0, sizeof(*encoding));
}

/* ------------------------------------------------------------------------------------------------ ids and names */

/* Largest id + 1. */
EX_API int32_t ex_tokenizer_size(const ex_tokenizer *tokenizer)
{
    return (int32_t)stbds_arrlenu(tokenizer->name_of);
}

/* -1: not there. */
EX_API int32_t ex_tokenizer_id(const ex_tokenizer *tokenizer, const char *token)
{
    return ex_map_get(&tokenizer->names, token, strlen(token), -1);
}

/* As the vocabulary spells it, NULL: not there. */
EX_API const char *ex_tokenizer_token(const ex_tokenizer *tokenizer, int32_t id)
{
    if (id < 0 || id >= ex_tokenizer_size(tokenizer) || tokenizer->name_of[id] < 0) return NULL;
    return ex_map_key(&tokenizer->names, (size_t)tokenizer->name_of[id]);
}

/* [CLS] or <s>, [SEP] or </s>, ..., the begin and the end of a text; -1: none. */
EX_API int32_t ex_tokenizer_special(const ex_tokenizer *tokenizer, ex_special which)
{
    return tokenizer->special[which];
}

#include "ex_tokenizer_decode.h"
#include "ex_tokenizer_load.h"

#endif /* EX_TOKENIZER_H */
