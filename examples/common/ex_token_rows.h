/* ex_token_rows.h - tokens for models that write text, out of the pairs of ex_pairs.h or out of plain text:

       ex_dataset_pairs         sources and targets apart, for a model with an encoder and a decoder
       ex_token_rows_pairs      prompt and answer in one sequence, for a model that predicts the next token; several of them
                                packed into rows of a given length
       ex_token_rows_text       plain text, cut into blocks
       ex_token_rows_source     such rows for ex_feed_next, which makes batches of them

   A label is the token itself where it is to be learned and EX_IGNORED elsewhere; a model that predicts the next token compares
   what it says at one place with the label of the following place, inside one sequence. */
#ifndef EX_TOKEN_ROWS_H
#define EX_TOKEN_ROWS_H

#include "ex_base.h"
#include "ex_data.h"
#include "ex_pairs.h"
#include "ex_tokenizer.h"

#define EX_IGNORED (-100)

/* Row r is the sequences first[r] .. first[r + 1] - 1; sequence s is tokens[starts[s] .. starts[s + 1]). */
typedef struct ex_token_rows {
    int64_t rows, sequences;
    int64_t *first;                   /* [rows + 1] */
    int64_t *starts;                  /* [sequences + 1] */
    int32_t *tokens, *labels;
    int64_t learned;                  /* tokens that are to be learned */
    int64_t bytes;                    /* of the text that these tokens stand for, without a sequence's first token */
    int64_t truncated, dropped;       /* pairs that were cut; pairs of whose answer nothing was left */
} ex_token_rows;

EX_API void ex_token_rows_free(ex_token_rows *set)
{
    free(set->first);
    free(set->starts);
    free(set->tokens);
    free(set->labels);
    memset(set, 0, sizeof(*set));
}

/* ------------------------------------------------------------------------------------------------ encoder and decoder */

/* Fills both sets, pair i in place i of each; a template's end token is there in both. Lengths count it; 0: no limit. */
EX_API bool ex_dataset_pairs(ex_dataset *source, ex_dataset *target, const ex_pairs *pairs, const ex_tokenizer *tokenizer,
                             int32_t max_source, int32_t max_target, ex_error *error)
{
    ex_dataset *const sets[2] = {source, target};
    ex_encoding encoding;
    bool fine = true;
    memset(&encoding, 0, sizeof(encoding));
    for (int which = 0; which < 2; which++) {
        exi_dataset_builder builder;
        memset(&builder, 0, sizeof(builder));
        memset(sets[which], 0, sizeof(*sets[which]));
        for (int64_t i = 0; fine && i < pairs->count; i++) {
            const ex_pair *pair = &pairs->pair[i];
            ex_encode_desc desc;
            memset(&desc, 0, sizeof(desc));
            desc.text = which == 0 ? pair->source : pair->target;
            desc.bytes = which == 0 ? pair->source_bytes : pair->target_bytes;
            desc.max_length = which == 0 ? max_source : max_target;
            fine = ex_tokenizer_encode(tokenizer, &desc, &encoding, error);
            if (!fine) break;
            exi_dataset_take(&builder, &encoding, 0);
            sets[which]->truncated += encoding.truncated;
        }
        exi_dataset_finish(sets[which], &builder);
    }
    ex_encoding_free(&encoding);
    if (fine) return true;
    ex_dataset_free(source);
    ex_dataset_free(target);
    return false;
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Grows while sequences come in; all are stb_ds arrays. */
typedef struct exi_tokens_builder {
    int64_t *first, *starts;
    int32_t *tokens, *labels;
} exi_tokens_builder;

EX_API void exi_tokens_token(ex_token_rows *set, exi_tokens_builder *b, int32_t token, bool learn)
{
    stbds_arrput(b->tokens, token);
    stbds_arrput(b->labels, learn ? token : EX_IGNORED);
    set->learned += learn;
}

/* Bytes of the text up to `end` that no token before covered. (Several tokens may share the bytes of one character, and a space
   may belong to none.) */
EX_API int64_t exi_tokens_cover(size_t *covered, size_t end)
{
    const int64_t fresh = end > *covered ? (int64_t)(end - *covered) : 0;
    *covered += (size_t)fresh;
    return fresh;
}

/* Ends the sequence whose tokens were added last. It joins the present row when `join` and the row stays within length. */
EX_API void exi_tokens_sequence(exi_tokens_builder *b, int32_t length, bool join)
{
    const int64_t end = (int64_t)stbds_arrlenu(b->tokens);
    int64_t row_start;
    if (b->starts == NULL) stbds_arrput(b->starts, 0);
    row_start = b->first != NULL ? b->starts[stbds_arrlast(b->first)] : 0;
    if (b->first == NULL || !join || end - row_start > length) stbds_arrput(b->first, (int64_t)stbds_arrlenu(b->starts) - 1);
    stbds_arrput(b->starts, end);
}

EX_API void exi_tokens_finish(ex_token_rows *set, exi_tokens_builder *b)
{
    if (b->starts == NULL) stbds_arrput(b->starts, 0);
    set->sequences = (int64_t)stbds_arrlenu(b->starts) - 1;
    set->rows = (int64_t)stbds_arrlenu(b->first);
    stbds_arrput(b->first, set->sequences);
    EXI_DATASET_MOVE(int64_t, set->first, b->first);
    EXI_DATASET_MOVE(int64_t, set->starts, b->starts);
    EXI_DATASET_MOVE(int32_t, set->tokens, b->tokens);
    EXI_DATASET_MOVE(int32_t, set->labels, b->labels);
}

/* ------------------------------------------------------------------------------------------------ prompt and answer */

/* Zero-initialise: no limit, one pair per row, only answers are learned. */
typedef struct ex_token_rows_desc {
    int32_t length;                   /* tokens of a row at most; longer pairs are cut at their end; 0: no limit */
    bool pack;                        /* as many pairs as fit, in their order, share a row (needs length) */
    bool learn_prompt;
    const char *separator;            /* between source and target; NULL: none behind the prompt of an instruction, else "\n" */
} ex_token_rows_desc;

/* The text before the answer, as training has it: for generating. free(). */
EX_API char *ex_pair_prompt(const ex_pairs *pairs, int64_t i, const ex_token_rows_desc *desc)
{
    const char *separator = desc->separator != NULL ? desc->separator : pairs->instructions ? "" : "\n";
    return ex_format("%s%s", pairs->pair[i].source, separator);
}

/* Prompt and answer are tokenised as one text; a token that begins in the prompt is not part of the answer. (Where a tokenizer
   leaves the space before a word out of its offsets, that space may be the end of the prompt.) */
EX_API bool exi_tokens_pair(ex_token_rows *set, exi_tokens_builder *b, const ex_pairs *pairs, int64_t i,
                            const ex_tokenizer *tokenizer, const ex_token_rows_desc *desc, ex_encoding *encoding, ex_error *error)
{
    const int32_t end = ex_tokenizer_special(tokenizer, EX_EOS);
    const size_t before = stbds_arrlenu(b->tokens);
    const int64_t learned = set->learned, bytes = set->bytes;
    char *prompt = ex_pair_prompt(pairs, i, desc);
    const size_t prompt_bytes = strlen(prompt);
    size_t covered = desc->learn_prompt ? 0 : prompt_bytes;
    ex_text text = {prompt, prompt_bytes, prompt_bytes + 1};
    ex_encode_desc encode;
    int32_t count;
    bool cut, fine;
    ex_text_add(&text, pairs->pair[i].target, pairs->pair[i].target_bytes);
    memset(&encode, 0, sizeof(encode));
    encode.text = text.at;
    encode.bytes = text.length;
    fine = ex_tokenizer_encode(tokenizer, &encode, encoding, error);
    ex_text_free(&text);
    if (!fine) return false;
    count = encoding->first[1];
    for (int32_t k = 0; k < count && (desc->length == 0 || k < desc->length); k++) {
        const bool answer = encoding->sequence[k] == 0 ? encoding->offsets[k].start >= prompt_bytes : k > 0 && k + 1 == count;
        const int64_t fresh = encoding->sequence[k] == 0 ? exi_tokens_cover(&covered, encoding->offsets[k].end) : 0;
        exi_tokens_token(set, b, encoding->ids[k], answer || desc->learn_prompt);
        if (k > 0 && (answer || desc->learn_prompt)) set->bytes += fresh;
    }
    if (end >= 0 && (count == 0 || encoding->ids[count - 1] != end)) {
        count++;                      /* the template has not put it there */
        if (desc->length == 0 || count <= desc->length) exi_tokens_token(set, b, end, true);
    }
    cut = desc->length > 0 && count > desc->length;
    set->truncated += cut;
    if (set->learned == learned) {
        set->dropped++;
        set->bytes = bytes;
        stbds_arrsetlen(b->tokens, before);
        stbds_arrsetlen(b->labels, before);
        return true;
    }
    exi_tokens_sequence(b, desc->length, desc->pack);
    return true;
}

EX_API bool ex_token_rows_pairs(ex_token_rows *set, const ex_pairs *pairs, const ex_tokenizer *tokenizer,
                                const ex_token_rows_desc *desc, ex_error *error)
{
    exi_tokens_builder builder;
    ex_encoding encoding;
    bool fine = true;
    memset(set, 0, sizeof(*set));
    memset(&builder, 0, sizeof(builder));
    memset(&encoding, 0, sizeof(encoding));
    if (desc->length < 0 || (desc->pack && desc->length == 0))
        return ex_fail(error, "rows of %d tokens cannot be packed", (int)desc->length);
    for (int64_t i = 0; fine && i < pairs->count; i++)
        fine = exi_tokens_pair(set, &builder, pairs, i, tokenizer, desc, &encoding, error);
    exi_tokens_finish(set, &builder);
    ex_encoding_free(&encoding);
    if (fine && set->rows == 0)
        fine = ex_fail(error, "nothing to learn is left of %lld pairs in %d tokens each", (long long)pairs->count,
                       (int)desc->length);
    if (!fine) ex_token_rows_free(set);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ plain text */

/* Longer texts are tokenised in pieces that end with a line, so that memory stays within bounds. */
#define EX_TEXT_PIECE ((size_t)8 << 20)

/* Zero-initialise except for length: tokens of each block. */
typedef struct ex_blocks_desc {
    int32_t length;
    bool begin;                       /* each block starts with the begin token, where there is one; it is not learned */
    bool keep_rest;                   /* the last block may be shorter; else it is left out */
} ex_blocks_desc;

/* Bytes of the piece that starts at text. */
EX_API size_t exi_text_piece(const char *text, size_t bytes)
{
    size_t at = EX_TEXT_PIECE;
    if (bytes <= EX_TEXT_PIECE) return bytes;
    while (at > 0 && text[at - 1] != '\n') at--;
    if (at > 0) return at;
    for (at = EX_TEXT_PIECE; ((unsigned char)text[at] & 0xc0) == 0x80; at--) continue;       /* one endless line */
    return at;
}

/* The block that is being filled: its first token, and set->bytes before it. */
typedef struct exi_block { size_t start; int64_t bytes; } exi_block;

EX_API void exi_blocks_end(const ex_token_rows *set, exi_tokens_builder *b, exi_block *block)
{
    exi_tokens_sequence(b, 0, false);
    block->start = stbds_arrlenu(b->tokens);
    block->bytes = set->bytes;
}

/* bytes: those that the token stands for. */
EX_API void exi_blocks_add(ex_token_rows *set, exi_tokens_builder *b, const ex_blocks_desc *desc, int32_t begin, int32_t token,
                           int64_t bytes, exi_block *block)
{
    if (stbds_arrlenu(b->tokens) == block->start && begin >= 0) exi_tokens_token(set, b, begin, false);
    if (stbds_arrlenu(b->tokens) > block->start) set->bytes += bytes;
    exi_tokens_token(set, b, token, true);
    if (stbds_arrlenu(b->tokens) - block->start == (size_t)desc->length) exi_blocks_end(set, b, block);
}

/* A text that has fewer tokens than a block is an error unless keep_rest. text must be UTF-8 (ex_utf8_repair). */
EX_API bool ex_token_rows_text(ex_token_rows *set, const char *text, size_t bytes, const ex_tokenizer *tokenizer,
                               const ex_blocks_desc *desc, ex_error *error)
{
    const int32_t begin = desc->begin ? ex_tokenizer_special(tokenizer, EX_BOS) : -1;
    exi_tokens_builder builder;
    ex_encoding encoding;
    exi_block block = {0, 0};
    size_t piece;
    bool fine = true;
    memset(set, 0, sizeof(*set));
    memset(&builder, 0, sizeof(builder));
    memset(&encoding, 0, sizeof(encoding));
    if (desc->length < 2) return ex_fail(error, "blocks of %d tokens: at least 2 are needed", (int)desc->length);
    for (size_t at = 0; fine && at < bytes; at += piece) {
        ex_encode_desc encode;
        size_t covered = 0;
        memset(&encode, 0, sizeof(encode));
        piece = exi_text_piece(text + at, bytes - at);
        encode.text = text + at;
        encode.bytes = piece;
        encode.no_special = true;
        fine = ex_tokenizer_encode(tokenizer, &encode, &encoding, error);
        for (int32_t i = 0; fine && i < encoding.first[1]; i++) {
            const int64_t fresh = exi_tokens_cover(&covered, encoding.offsets[i].end);
            exi_blocks_add(set, &builder, desc, begin, encoding.ids[i], fresh, &block);
        }
    }
    if (desc->keep_rest && stbds_arrlenu(builder.tokens) - block.start >= 2) exi_blocks_end(set, &builder, &block);
    set->bytes = block.bytes;
    for (size_t i = block.start; i < stbds_arrlenu(builder.labels); i++) set->learned -= builder.labels[i] != EX_IGNORED;
    stbds_arrsetlen(builder.tokens, block.start);
    stbds_arrsetlen(builder.labels, block.start);
    exi_tokens_finish(set, &builder);
    ex_encoding_free(&encoding);
    if (fine && set->rows == 0)
        fine = ex_fail(error, "a text of %zu bytes has too few tokens for a block of %d", bytes, (int)desc->length);
    if (!fine) ex_token_rows_free(set);
    return fine;
}

/* The same of a file. *replaced (may be NULL): U+FFFD put in for bytes that are no UTF-8. */
EX_API bool ex_token_rows_file(ex_token_rows *set, const char *path, const ex_tokenizer *tokenizer, const ex_blocks_desc *desc,
                               int64_t *replaced, ex_error *error)
{
    ex_error inner = {""};
    size_t bytes = 0;
    int64_t count = 0;
    char *text = ex_read_file(path, &bytes, error);
    bool fine;
    memset(set, 0, sizeof(*set));
    if (text == NULL) return false;
    text = ex_utf8_repair(text, &bytes, &count);
    fine = ex_token_rows_text(set, text, bytes, tokenizer, desc, &inner);
    if (!fine) ex_fail(error, "%s: %s", path, inner.text);
    if (replaced != NULL) *replaced = count;
    free(text);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ batches */

/* The sequences of rows index[0 .. count), packed; batch->index says which sequence each one is. */
EX_API void ex_token_rows_gather(ex_batch *batch, const ex_token_rows *set, const int64_t *index, int32_t count)
{
    stbds_arrsetlen(batch->offsets, 0);
    stbds_arrsetlen(batch->tokens, 0);
    stbds_arrsetlen(batch->labels, 0);
    stbds_arrsetlen(batch->index, 0);
    stbds_arrfree(batch->types);
    stbds_arrfree(batch->targets);
    stbds_arrput(batch->offsets, 0);
    for (int32_t r = 0; r < count; r++) {
        for (int64_t s = set->first[index[r]]; s < set->first[index[r] + 1]; s++) {
            for (int64_t k = set->starts[s]; k < set->starts[s + 1]; k++) {
                stbds_arrput(batch->tokens, set->tokens[k]);
                stbds_arrput(batch->labels, set->labels[k]);
            }
            stbds_arrput(batch->index, s);
            stbds_arrput(batch->offsets, (int32_t)stbds_arrlenu(batch->tokens));
        }
    }
    batch->sequences = (int32_t)stbds_arrlenu(batch->index);
}

EX_API int32_t exi_token_rows_length(const void *set, int64_t row)
{
    const ex_token_rows *t = (const ex_token_rows *)set;
    return (int32_t)(t->starts[t->first[row + 1]] - t->starts[t->first[row]]);
}

EX_API void exi_token_rows_gather(ex_batch *batch, const void *set, const int64_t *index, int32_t count)
{
    ex_token_rows_gather(batch, (const ex_token_rows *)set, index, count);
}

EX_API ex_source ex_token_rows_source(const ex_token_rows *set)
{
    const ex_source source = {set, set->rows, exi_token_rows_length, exi_token_rows_gather};
    return source;
}

#endif /* EX_TOKEN_ROWS_H */
