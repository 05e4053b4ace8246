/* ex_tokenizer.h - text to token ids and back, for the tokenizers that BERT and RoBERTa checkpoints ship: WordPiece and
   byte-level BPE, with the ids, truncation and windows of Hugging Face tokenizers.

       ex_tokenizer *tokenizer = ex_tokenizer_load("roberta-base", &error);
       ex_encode_desc desc = {0};
       ex_encoding encoding = {0};
       desc.text = "Hello";  desc.bytes = 5;
       ex_tokenizer_encode(tokenizer, &desc, &encoding, &error);      -> encoding.ids[0 .. encoding.first[1])
       ex_encoding_free(&encoding);
       ex_tokenizer_free(tokenizer);

   A text runs through these stages, each over an array of characters that know their bytes in the text:
     decode UTF-8 -> cut out added tokens ("<mask>") -> normalise -> split into words -> model (WordPiece or BPE) ->
     truncate -> put into the template ("[CLS] A [SEP] B [SEP]").
   Each stage takes time proportional to the text (BPE: times the logarithm of the longest word), whatever the text is.

   Where this differs from Hugging Face on purpose: offsets. A space that was only put before the text (add_prefix_space)
   has no bytes, and with trim_offsets a real leading space is always left out. */
#ifndef EX_TOKENIZER_H
#define EX_TOKENIZER_H

#include "ex_base.h"
#include "ex_json.h"
#include "ex_unicode.h"

typedef enum ex_special { EX_CLS, EX_SEP, EX_PAD, EX_MASK, EX_UNK } ex_special;
#define EX_SPECIALS 5

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

typedef enum exi_tok_model { EXI_TOK_WORDPIECE = 1, EXI_TOK_BYTE_BPE } exi_tok_model;
typedef enum exi_tok_decoder { EXI_TOK_DECODE_PLAIN = 0, EXI_TOK_DECODE_WORDPIECE, EXI_TOK_DECODE_BYTES } exi_tok_decoder;

/* One place of the template: a sequence (id -1) or a special token. */
typedef struct exi_tok_piece { int32_t id, type; int8_t sequence; } exi_tok_piece;

/* A token that is cut out of the text before the model sees it. */
typedef struct exi_tok_added {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
    char *decoded;                    /* what decoding writes, where normalisation changes the token; else NULL */
} exi_tok_added;

/* All added tokens of one kind (matched before or after normalisation) as a tree of characters. */
typedef struct exi_tok_trie {
    ex_map children;                  /* {node, character} -> node */
    int32_t *added;                   /* per node: index of the added token that ends there, or -1 */
    bool root[256];                   /* by the low byte of the first character: may a token start here? */
} exi_tok_trie;

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
    /* normalizer and splitting into words */
    bool bert_normalizer, clean_text, chinese, strip_accents, lowercase;
    bool prefix_space, trim_offsets, split_words;          /* byte level */
    /* WordPiece */
    int32_t unk_id;
    char *prefix;                     /* "##" */
    size_t prefix_bytes, longest;     /* longest: bytes of the longest token */
    int64_t max_word;                 /* characters; longer words are unknown */
    /* BPE */
    ex_map merges;                    /* {left id, right id} -> rank */
    int32_t *merged;                  /* rank -> id of the product */
    int32_t byte_id[256];             /* token of each byte, -1: none */
    bool fuse_unk, ignore_merges;
    exi_tok_decoder decoder;
    char *decode_prefix;
    bool cleanup;
} ex_tokenizer;

/* One character and the bytes of the text it comes from; start == end: put in. */
typedef struct exi_tok_char { uint32_t code, start, end; } exi_tok_char;
typedef struct exi_tok_token { int32_t id; ex_span at; } exi_tok_token;
/* A BPE symbol: bytes [at, end) of the word; at == end: merged into its left neighbour. */
typedef struct exi_tok_symbol { int32_t id, previous, next; uint32_t at, end; } exi_tok_symbol;
typedef struct exi_tok_merge { int32_t rank, at, id; } exi_tok_merge;
typedef struct exi_tok_cut { int32_t from[2], to[2]; } exi_tok_cut;       /* one window: a range of each sequence */

typedef struct exi_tok_work {
    exi_tok_char *raw, *normal, *parts, *word;             /* characters per stage */
    char *bytes;                      /* of a word: behind the room for the prefix */
    uint32_t *starts;                 /* WordPiece: byte of each character; BPE: character of each byte */
    exi_tok_symbol *symbols;
    exi_tok_merge *heap;
    exi_tok_token *tokens[2];         /* of text and pair, before truncation */
    exi_tok_cut *cuts;
} exi_tok_work;

/* ------------------------------------------------------------------------------------------------ normalizer */

EX_API void exi_tok_push(exi_tok_char **list, uint32_t code, const exi_tok_char *origin)
{
    exi_tok_char one;
    one.code = code;
    one.start = origin->start;
    one.end = origin->end;
    stbds_arrput(*list, one);
}

/* Stable sort by combining class: insertion for the usual two or three, counting for hostile runs. */
EX_API void exi_tok_order_run(exi_tok_char *run, size_t count)
{
    if (count <= 16) {
        for (size_t i = 1; i < count; i++) {
            const exi_tok_char moving = run[i];
            const uint32_t order = ex_combining_class(moving.code);
            size_t to = i;
            for (; to > 0 && ex_combining_class(run[to - 1].code) > order; to--) run[to] = run[to - 1];
            run[to] = moving;
        }
    } else {
        exi_tok_char *sorted = (exi_tok_char *)ex_alloc(count, sizeof(exi_tok_char));
        size_t place[257] = {0};
        for (size_t i = 0; i < count; i++) place[ex_combining_class(run[i].code) + 1]++;
        for (size_t i = 1; i < 257; i++) place[i] += place[i - 1];
        for (size_t i = 0; i < count; i++) sorted[place[ex_combining_class(run[i].code)]++] = run[i];
        memcpy(run, sorted, count * sizeof(exi_tok_char));
        free(sorted);
    }
}

/* Canonical decomposition: in becomes *out. */
EX_API void exi_tok_decompose(exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    uint32_t parts[4];
    size_t run = 0;
    stbds_arrsetlen(*out, 0);
    for (size_t i = 0; i < count; i++) {
        const int pieces = ex_decompose(in[i].code, parts);
        for (int p = 0; p < pieces; p++) exi_tok_push(out, parts[p], &in[i]);
    }
    count = stbds_arrlenu(*out);
    for (size_t i = 0; i <= count; i++) {                  /* runs of marks between characters of class 0 */
        if (i < count && ex_combining_class((*out)[i].code) != 0) continue;
        if (i - run > 1) exi_tok_order_run(*out + run, i - run);
        run = i + 1;
    }
}

/* clean_text and handle_chinese_chars. */
EX_API void exi_tok_clean(const ex_tokenizer *t, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t code = in[i].code;
        if (t->clean_text && (code == 0 || code == 0xfffd || ex_is_control(code))) continue;
        if (t->clean_text && ex_is_space(code)) code = ' ';
        if (t->chinese && ex_is_cjk(code)) {
            exi_tok_push(out, ' ', &in[i]);
            exi_tok_push(out, code, &in[i]);
            exi_tok_push(out, ' ', &in[i]);
        } else {
            exi_tok_push(out, code, &in[i]);
        }
    }
}

/* Drops accents of a decomposed text and lowers it: *out receives in[0 .. count). */
EX_API void exi_tok_fold(const ex_tokenizer *t, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (t->strip_accents && ex_is_accent(in[i].code)) continue;
        exi_tok_push(out, t->lowercase ? (in[i].code == 0x130 ? 'i' : ex_lower(in[i].code)) : in[i].code, &in[i]);
        if (t->lowercase && in[i].code == 0x130) exi_tok_push(out, 0x307, &in[i]);
    }
}

/* work->normal receives the normalised characters of in. */
EX_API void exi_tok_normalise(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *in, size_t count)
{
    stbds_arrsetlen(work->normal, 0);
    if (!t->bert_normalizer) {
        if (count > 0) memcpy(stbds_arraddnptr(work->normal, count), in, count * sizeof(exi_tok_char));
        return;
    }
    if (!t->strip_accents && !t->lowercase) {
        exi_tok_clean(t, &work->normal, in, count);
        return;
    }
    stbds_arrsetlen(work->word, 0);
    exi_tok_clean(t, &work->word, in, count);
    if (t->strip_accents) {
        exi_tok_decompose(&work->parts, work->word, stbds_arrlenu(work->word));
        exi_tok_fold(t, &work->normal, work->parts, stbds_arrlenu(work->parts));
    } else {
        exi_tok_fold(t, &work->normal, work->word, stbds_arrlenu(work->word));
    }
}

/* ------------------------------------------------------------------------------------------------ models */

EX_API void exi_tok_emit(exi_tok_token **out, int32_t id, uint32_t start, uint32_t end)
{
    exi_tok_token token;
    token.id = id;
    token.at.start = start;
    token.at.end = end;
    stbds_arrput(*out, token);
}

/* The longest piece of the vocabulary that starts at character `from`: how many characters, 0 for none.
   work->bytes holds the word behind prefix_bytes of room, work->starts the byte of each character. */
EX_API size_t exi_tok_longest_piece(const ex_tokenizer *t, const exi_tok_work *work, size_t from, size_t count, int32_t *id)
{
    const uint32_t *starts = work->starts;
    const size_t prefix = from > 0 ? t->prefix_bytes : 0;
    char *key = work->bytes + t->prefix_bytes + starts[from] - prefix;
    char saved[64];
    size_t to = count - from > t->longest ? from + t->longest : count;
    if (prefix > 0) {                                      /* the prefix lies over the bytes before the piece for a moment */
        memcpy(saved, key, prefix);
        memcpy(key, t->prefix, prefix);
    }
    for (*id = -1; to > from; to--) {
        const size_t bytes = prefix + starts[to] - starts[from];
        if (bytes > t->longest) continue;
        *id = ex_map_get(&t->vocab, key, bytes, -1);
        if (*id >= 0) break;
    }
    if (prefix > 0) memcpy(key, saved, prefix);
    return to - from;
}

/* Splits a word greedily into the longest pieces; a word with a part that has none is unknown as a whole. */
EX_API void exi_tok_wordpiece(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word,
                              size_t count)
{
    const size_t before = stbds_arrlenu(*out);
    bool known = (int64_t)count <= t->max_word;
    size_t at = 0, bytes = t->prefix_bytes;
    if (known) {
        stbds_arrsetlen(work->bytes, t->prefix_bytes + 4 * count);
        stbds_arrsetlen(work->starts, count + 1);
        for (size_t i = 0; i < count; i++) {
            work->starts[i] = (uint32_t)(bytes - t->prefix_bytes);
            bytes += ex_utf8_encode(word[i].code, work->bytes + bytes);
        }
        work->starts[count] = (uint32_t)(bytes - t->prefix_bytes);
    }
    while (known && at < count) {
        int32_t id;
        const size_t taken = exi_tok_longest_piece(t, work, at, count, &id);
        known = taken > 0;
        if (known) exi_tok_emit(out, id, word[at].start, word[at + taken - 1].end);
        at += taken;
    }
    if (known) return;
    stbds_arrsetlen(*out, before);
    exi_tok_emit(out, t->unk_id, word[0].start, word[count - 1].end);
}

EX_API bool exi_tok_merge_before(const exi_tok_merge *a, const exi_tok_merge *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

EX_API void exi_tok_heap_push(exi_tok_merge **heap, exi_tok_merge merge)
{
    size_t at = stbds_arrlenu(*heap);
    stbds_arrput(*heap, merge);
    while (at > 0 && exi_tok_merge_before(&merge, &(*heap)[(at - 1) / 2])) {
        (*heap)[at] = (*heap)[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    (*heap)[at] = merge;
}

EX_API exi_tok_merge exi_tok_heap_pop(exi_tok_merge *heap)
{
    const exi_tok_merge top = heap[0], last = stbds_arrpop(heap);
    const size_t count = stbds_arrlenu(heap);
    size_t at = 0;
    while (2 * at + 1 < count) {
        size_t child = 2 * at + 1;
        if (child + 1 < count && exi_tok_merge_before(&heap[child + 1], &heap[child])) child++;
        if (!exi_tok_merge_before(&heap[child], &last)) break;
        heap[at] = heap[child];
        at = child;
    }
    if (count > 0) heap[at] = last;
    return top;
}

/* The rank of merging two tokens, or -1. */
EX_API int32_t exi_tok_rank(const ex_tokenizer *t, int32_t left, int32_t right)
{
    int32_t key[2];
    key[0] = left;
    key[1] = right;
    return ex_map_get(&t->merges, key, sizeof(key), -1);
}

/* Offers the pair that starts at symbol `at`. */
EX_API void exi_tok_offer(const ex_tokenizer *t, exi_tok_work *work, int32_t at)
{
    const exi_tok_symbol *left = &work->symbols[at];
    exi_tok_merge merge;
    if (left->next < 0) return;
    merge.rank = exi_tok_rank(t, left->id, work->symbols[left->next].id);
    if (merge.rank < 0) return;
    merge.at = at;
    merge.id = t->merged[merge.rank];
    exi_tok_heap_push(&work->heap, merge);
}

/* Merges neighbours, always the pair of lowest rank, leftmost first. Offers that have become stale are skipped. */
EX_API void exi_tok_merge_all(const ex_tokenizer *t, exi_tok_work *work)
{
    exi_tok_symbol *symbols = work->symbols;
    stbds_arrsetlen(work->heap, 0);
    for (size_t i = 0; i + 1 < stbds_arrlenu(symbols); i++) exi_tok_offer(t, work, (int32_t)i);
    while (stbds_arrlenu(work->heap) > 0) {
        const exi_tok_merge top = exi_tok_heap_pop(work->heap);
        exi_tok_symbol *left = &symbols[top.at], *right;
        int32_t rank;
        if (left->at == left->end || left->next < 0) continue;
        right = &symbols[left->next];
        rank = exi_tok_rank(t, left->id, right->id);
        if (rank < 0 || t->merged[rank] != top.id) continue;
        left->id = top.id;
        left->end = right->end;
        left->next = right->next;
        right->end = right->at;
        if (left->next >= 0) symbols[left->next].previous = top.at;
        if (left->previous >= 0) exi_tok_offer(t, work, left->previous);
        exi_tok_offer(t, work, top.at);
    }
}

EX_API void exi_tok_add_symbol(exi_tok_work *work, int32_t id, uint32_t at)
{
    const int32_t index = (int32_t)stbds_arrlenu(work->symbols);
    exi_tok_symbol symbol;
    symbol.id = id;
    symbol.previous = index - 1;
    symbol.next = -1;
    symbol.at = at;
    symbol.end = at + 1;
    if (index > 0) work->symbols[index - 1].next = index;
    stbds_arrput(work->symbols, symbol);
}

/* One symbol per byte; bytes without a token are unknown, or left out where the model has no unknown token. */
EX_API void exi_tok_byte_symbols(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *word, size_t count)
{
    bool unknown = false;
    stbds_arrsetlen(work->starts, 0);
    stbds_arrsetlen(work->bytes, 0);
    stbds_arrsetlen(work->symbols, 0);
    for (size_t i = 0; i < count; i++) {
        char bytes[4];
        const size_t length = ex_utf8_encode(word[i].code, bytes);
        for (size_t b = 0; b < length; b++) {
            const int32_t id = t->byte_id[(unsigned char)bytes[b]];
            const uint32_t at = (uint32_t)stbds_arrlenu(work->bytes);
            stbds_arrput(work->bytes, bytes[b]);
            stbds_arrput(work->starts, (uint32_t)i);
            if (id >= 0) exi_tok_add_symbol(work, id, at);
            else if (t->unk_id >= 0 && unknown && t->fuse_unk) stbds_arrlast(work->symbols).end = at + 1;
            else if (t->unk_id >= 0) exi_tok_add_symbol(work, t->unk_id, at);
            unknown = id < 0;
        }
    }
}

/* Emits a token over characters [from, to] of a word; trim_offsets leaves spaces at its ends out of the offsets. */
EX_API void exi_tok_emit_trimmed(const ex_tokenizer *t, exi_tok_token **out, int32_t id, const exi_tok_char *word, size_t from,
                                 size_t to)
{
    uint32_t start, end;
    if (t->trim_offsets) {
        while (from < to && word[from].code == ' ') from++;
        while (to > from && word[to].code == ' ') to--;
    }
    start = word[from].start;
    end = word[to].end;
    if (t->trim_offsets && word[from].code == ' ') start = end;
    exi_tok_emit(out, id, start, end);
}

/* The byte-mapped spelling of a word as the vocabulary has it ("\u0120the" for " the"). */
EX_API uint32_t exi_tok_byte_letter(unsigned char byte)
{
    if ((byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad)) return byte;
    if (byte <= 32) return 256u + byte;                    /* the others follow in order: 0-32, 127-160, 173 */
    return byte <= 160 ? 256u + 33 + (byte - 127u) : 256u + 67;
}

EX_API int32_t exi_tok_whole_word(const ex_tokenizer *t, const exi_tok_work *work)
{
    const size_t count = stbds_arrlenu(work->bytes);
    ex_text mapped = {NULL, 0, 0};
    int32_t id = -1;
    if (count <= t->longest) {
        for (size_t i = 0; i < count; i++) {
            char letter[4];
            ex_text_add(&mapped, letter, ex_utf8_encode(exi_tok_byte_letter((unsigned char)work->bytes[i]), letter));
        }
        id = ex_map_get(&t->vocab, mapped.at, mapped.length, -1);
        ex_text_free(&mapped);
    }
    return id;
}

EX_API void exi_tok_bpe(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word, size_t count)
{
    exi_tok_byte_symbols(t, work, word, count);
    if (t->ignore_merges) {
        const int32_t id = exi_tok_whole_word(t, work);
        if (id >= 0) {
            exi_tok_emit_trimmed(t, out, id, word, 0, count - 1);
            return;
        }
    }
    exi_tok_merge_all(t, work);
    for (size_t i = 0; i < stbds_arrlenu(work->symbols); i++) {
        const exi_tok_symbol *symbol = &work->symbols[i];
        if (symbol->at == symbol->end) continue;
        exi_tok_emit_trimmed(t, out, symbol->id, word, work->starts[symbol->at], work->starts[symbol->end - 1]);
    }
}

/* ------------------------------------------------------------------------------------------------ splitting into words */

/* BertPreTokenizer: words end at spaces, and each punctuation character is a word. */
EX_API void exi_tok_split_bert(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text,
                               size_t count)
{
    size_t start = 0;
    for (size_t i = 0; i <= count; i++) {
        const bool space = i < count && ex_is_space(text[i].code);
        const bool alone = i < count && !space && ex_is_punctuation(text[i].code);
        if (i < count && !space && !alone) continue;
        if (i > start) exi_tok_wordpiece(t, work, out, text + start, i - start);
        if (alone) exi_tok_wordpiece(t, work, out, text + i, 1);
        start = i + 1;
    }
}

/* Length of 's 't 're 've 'm 'll 'd at text, 0 for none. */
EX_API size_t exi_tok_contraction(const exi_tok_char *text, size_t count)
{
    uint32_t a, b;
    if (count < 2 || text[0].code != '\'') return 0;
    a = text[1].code;
    b = count > 2 ? text[2].code : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

typedef enum exi_tok_class { EXI_TOK_SPACE, EXI_TOK_LETTER, EXI_TOK_NUMBER, EXI_TOK_OTHER } exi_tok_class;

EX_API exi_tok_class exi_tok_classify(uint32_t code)
{
    if (ex_is_space(code)) return EXI_TOK_SPACE;
    if (ex_is_letter(code)) return EXI_TOK_LETTER;
    return ex_is_number(code) ? EXI_TOK_NUMBER : EXI_TOK_OTHER;
}

/* Length of the word at text, count > 0, by GPT-2's pattern:
   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
EX_API size_t exi_tok_gpt2_word(const exi_tok_char *text, size_t count)
{
    const size_t contraction = exi_tok_contraction(text, count);
    size_t at = text[0].code == ' ' && count > 1 ? 1 : 0;
    exi_tok_class kind = exi_tok_classify(text[at].code);
    if (contraction > 0) return contraction;
    if (kind == EXI_TOK_SPACE) {
        at = 0;
        kind = exi_tok_classify(text[0].code);
    }
    while (at < count && exi_tok_classify(text[at].code) == kind) at++;
    /* of spaces before a word the last one stays with the word */
    return kind == EXI_TOK_SPACE && at < count && at > 1 ? at - 1 : at;
}

/* ByteLevel. text may be moved when a space is put before it. */
EX_API void exi_tok_split_bytes(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text,
                                size_t count)
{
    size_t at = 0;
    if (t->prefix_space && text[0].code != ' ') {
        exi_tok_char space;
        space.code = ' ';
        space.start = space.end = text[0].start;
        stbds_arrsetlen(work->word, 0);
        stbds_arrput(work->word, space);
        for (size_t i = 0; i < count; i++) stbds_arrput(work->word, text[i]);
        text = work->word;
        count++;
    }
    while (at < count) {
        const size_t length = t->split_words ? exi_tok_gpt2_word(text + at, count - at) : count;
        exi_tok_bpe(t, work, out, text + at, length);
        at += length;
    }
}

EX_API void exi_tok_split(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text, size_t count)
{
    if (count == 0) return;
    if (t->model == EXI_TOK_WORDPIECE) exi_tok_split_bert(t, work, out, text, count);
    else exi_tok_split_bytes(t, work, out, text, count);
}

/* ------------------------------------------------------------------------------------------------ added tokens */

EX_API int32_t exi_tok_child(const exi_tok_trie *trie, int32_t node, uint32_t code)
{
    uint32_t key[2];
    key[0] = (uint32_t)node;
    key[1] = code;
    return ex_map_get(&trie->children, key, sizeof(key), -1);
}

/* The longest added token at text: its index, or -1. */
EX_API int32_t exi_tok_match(const exi_tok_trie *trie, const exi_tok_char *text, size_t count, size_t *length)
{
    int32_t node = 0, found = -1;
    if (!trie->root[text[0].code & 255]) return -1;
    for (size_t i = 0; i < count; i++) {
        node = exi_tok_child(trie, node, text[i].code);
        if (node < 0) break;
        if (trie->added[node] < 0) continue;
        found = trie->added[node];
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
        const int32_t index = trie->added != NULL ? exi_tok_match(trie, text + at, count - at, &length) : -1;
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
    for (size_t at = 0; at < bytes;) {
        exi_tok_char one;
        one.start = (uint32_t)at;
        at += ex_utf8_decode(text + at, bytes - at, &one.code, NULL);
        one.end = (uint32_t)at;
        stbds_arrput(work->raw, one);
    }
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
        stbds_arrfree(work->word);
        stbds_arrfree(work->bytes);
        stbds_arrfree(work->starts);
        stbds_arrfree(work->symbols);
        stbds_arrfree(work->heap);
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

/* [CLS] or <s>, [SEP] or </s>, ...; -1: none. */
EX_API int32_t ex_tokenizer_special(const ex_tokenizer *tokenizer, ex_special which)
{
    return tokenizer->special[which];
}

/* ------------------------------------------------------------------------------------------------ decode */

EX_API void exi_tok_replace(ex_text *text, const char *from, const char *to)
{
    const size_t length = strlen(from), with = strlen(to);
    size_t out = 0, in = 0;
    while (in < text->length) {                            /* no `to` is longer than its `from` */
        if (text->length - in >= length && memcmp(text->at + in, from, length) == 0) {
            memcpy(text->at + out, to, with);
            in += length;
            out += with;
        } else {
            text->at[out++] = text->at[in++];
        }
    }
    text->length = out;
}

/* Undoes spaces before punctuation and contractions, within one token as the reference does. */
EX_API void exi_tok_cleanup(ex_text *token)
{
    static const char *const rules[][2] = {
        {" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"}, {" n't", "n't"}, {" 'm", "'m"},
        {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}
    };
    if (memchr(token->at, ' ', token->length) == NULL) return;
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) exi_tok_replace(token, rules[i][0], rules[i][1]);
}

EX_API void exi_tok_decode_wordpiece(const ex_tokenizer *t, ex_text *out, const char *name, size_t bytes, bool first,
                                     ex_text *token)
{
    const size_t prefix = strlen(t->decode_prefix);
    token->length = 0;
    if (!first && bytes >= prefix && memcmp(name, t->decode_prefix, prefix) == 0) {
        ex_text_add(token, name + prefix, bytes - prefix);
    } else {
        if (!first) ex_text_put(token, " ");
        ex_text_add(token, name, bytes);
    }
    if (t->cleanup) exi_tok_cleanup(token);
    ex_text_add(out, token->at, token->length);
}

/* The byte that a letter of the byte-level alphabet stands for, or -1. */
EX_API int exi_tok_letter_byte(uint32_t code)
{
    if (code < 256) return exi_tok_byte_letter((unsigned char)code) == code ? (int)code : -1;
    if (code > 256 + 67) return -1;
    code -= 256;
    return code < 33 ? (int)code : code < 67 ? (int)code - 33 + 127 : 173;
}

/* A token whose letters are all of the alphabet becomes bytes; any other (an added token) stays as it is. */
EX_API void exi_tok_decode_bytes(ex_text *out, const char *name, size_t bytes)
{
    const size_t before = out->length;
    for (size_t at = 0; at < bytes;) {
        uint32_t code;
        int byte;
        char one;
        at += ex_utf8_decode(name + at, bytes - at, &code, NULL);
        byte = exi_tok_letter_byte(code);
        if (byte < 0) {
            out->length = before;
            ex_text_add(out, name, bytes);
            return;
        }
        one = (char)byte;
        ex_text_add(out, &one, 1);
    }
}

/* The text of ids, NUL-terminated; free(). *bytes (may be NULL): its length, since a text may hold NUL itself. Ids that no
   token has are left out. NULL and a message for negative ids. */
EX_API char *ex_tokenizer_decode(const ex_tokenizer *tokenizer, const int32_t *ids, int64_t count, bool skip_special,
                                 size_t *bytes, ex_error *error)
{
    ex_text out = {NULL, 0, 0}, token = {NULL, 0, 0}, whole = {NULL, 0, 0};
    bool first = true, fine = true;
    ex_text_put(&out, "");
    for (int64_t i = 0; i < count && fine; i++) {
        const char *name = ex_tokenizer_token(tokenizer, ids[i]);
        size_t length = name != NULL ? tokenizer->names.entries[tokenizer->name_of[ids[i]]].bytes : 0;
        const int32_t added = name != NULL ? ex_map_get(&tokenizer->specials, name, length, -1) : -1;
        fine = ids[i] >= 0;
        if (name == NULL || (skip_special && added >= 0 && tokenizer->added[added].special)) continue;
        if (added >= 0 && tokenizer->added[added].decoded != NULL) {
            name = tokenizer->added[added].decoded;
            length = strlen(name);
        }
        if (tokenizer->decoder == EXI_TOK_DECODE_BYTES) exi_tok_decode_bytes(&out, name, length);
        else if (tokenizer->decoder == EXI_TOK_DECODE_WORDPIECE)
            exi_tok_decode_wordpiece(tokenizer, &out, name, length, first, &token);
        else ex_text_format(&out, "%s%s", first ? "" : " ", name);
        first = false;
    }
    ex_text_free(&token);
    if (!fine) {
        ex_text_free(&out);
        ex_fail(error, "a negative token id cannot be decoded");
        return NULL;
    }
    if (ex_utf8_valid_prefix(out.at, out.length) != out.length) {
        ex_utf8_add_repaired(&whole, out.at, out.length);  /* characters that were cut between two tokens */
        ex_text_free(&out);
        out = whole;
    }
    if (bytes != NULL) *bytes = out.length;
    return out.at;
}

#include "ex_tokenizer_load.h"

#endif /* EX_TOKENIZER_H */
