/* ex_tokenizer_split.h - the part of ex_tokenizer.h that splits a normalised text into words. A pre-tokenizer is a list of steps,
   each of which splits what the step before it has left whole; the words of the last one go to the model. */
#ifndef EX_TOKENIZER_SPLIT_H
#define EX_TOKENIZER_SPLIT_H

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

EX_API bool exi_tok_newline(uint32_t code)
{
    return code == '\r' || code == '\n';
}

/* The contraction at text in small or capital letters; the long s is an s, too. */
EX_API size_t exi_tok_any_contraction(const exi_tok_char *text, size_t count)
{
    exi_tok_char small[3];
    if (text[0].code != '\'') return 0;
    if (count > 3) count = 3;
    for (size_t i = 0; i < count; i++) {
        small[i] = text[i];
        small[i].code = text[i].code == 0x17f ? 's' : text[i].code < 0x80 ? ex_lower(text[i].code) : text[i].code;
    }
    return exi_tok_contraction(small, count);
}

/* Length of the spaces at text as the pattern below cuts them: up to the last line end, else all before a word but one. */
EX_API size_t exi_tok_llama3_spaces(const exi_tok_char *text, size_t count)
{
    size_t at = 0, line = 0;
    for (; at < count && ex_is_space(text[at].code); at++) {
        if (exi_tok_newline(text[at].code)) line = at + 1;
    }
    if (line > 0) return line;
    return at < count && at > 1 ? at - 1 : at;
}

/* Length of the word at text, count > 0, by the pattern of LLaMA 3 (digits 3) and Qwen 2 (digits 1):
   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
EX_API size_t exi_tok_llama3_word(const exi_tok_char *text, size_t count, int32_t digits)
{
    const size_t contraction = exi_tok_any_contraction(text, count);
    const exi_tok_class first = exi_tok_classify(text[0].code);
    const exi_tok_class second = count > 1 ? exi_tok_classify(text[1].code) : EXI_TOK_SPACE;
    const bool prefix = first != EXI_TOK_LETTER && first != EXI_TOK_NUMBER && !exi_tok_newline(text[0].code);
    size_t at = 0;
    if (contraction > 0) return contraction;
    if (first == EXI_TOK_LETTER || (prefix && second == EXI_TOK_LETTER)) {
        for (at = 1; at < count && exi_tok_classify(text[at].code) == EXI_TOK_LETTER; at++) continue;
        return at;
    }
    if (first == EXI_TOK_NUMBER) {
        while (at < count && at < (size_t)digits && exi_tok_classify(text[at].code) == EXI_TOK_NUMBER) at++;
        return at;
    }
    if (first == EXI_TOK_OTHER || (text[0].code == ' ' && count > 1 && second == EXI_TOK_OTHER)) {
        for (at = 1; at < count && exi_tok_classify(text[at].code) == EXI_TOK_OTHER; at++) continue;
        while (at < count && exi_tok_newline(text[at].code)) at++;
        return at;
    }
    return exi_tok_llama3_spaces(text, count);
}

/* Length of the piece at text that is all numbers or has none; each number alone when `digits` is 1. */
EX_API size_t exi_tok_digits_word(const exi_tok_char *text, size_t count, int32_t digits)
{
    const bool number = ex_is_numeric(text[0].code);
    size_t at = 1;
    if (number && digits == 1) return 1;
    while (at < count && ex_is_numeric(text[at].code) == number) at++;
    return at;
}

/* Length of the piece at text up to the next space that starts a new one. */
EX_API size_t exi_tok_metaspace_word(const exi_tok_split_step *step, const exi_tok_char *text, size_t count)
{
    size_t at = 1;
    if (step->whole) return count;
    while (at < count && text[at].code != step->space) at++;
    return at;
}

EX_API size_t exi_tok_step_word(const exi_tok_split_step *step, const exi_tok_char *text, size_t count)
{
    if (step->kind == EXI_TOK_SPLIT_GPT2) return exi_tok_gpt2_word(text, count);
    if (step->kind == EXI_TOK_SPLIT_LLAMA3) return exi_tok_llama3_word(text, count, step->digits);
    if (step->kind == EXI_TOK_SPLIT_DIGITS) return exi_tok_digits_word(text, count, step->digits);
    return step->kind == EXI_TOK_SPLIT_METASPACE ? exi_tok_metaspace_word(step, text, count) : count;
}

/* The text with the step's spaces: a copy in *buffer when something changes. */
EX_API const exi_tok_char *exi_tok_put_spaces(const exi_tok_split_step *step, exi_tok_char **buffer, const exi_tok_char *text,
                                              size_t *count)
{
    const bool meta = step->kind == EXI_TOK_SPLIT_METASPACE;
    const bool has = text[0].code == step->space || (meta && text[0].code == ' ');
    const bool put = !has && (step->prefix == EXI_TOK_ALWAYS || (step->prefix == EXI_TOK_FIRST && text[0].start == 0));
    exi_tok_char *copy;
    if (!meta && !put) return text;
    stbds_arrsetlen(*buffer, *count + put);
    copy = *buffer;
    if (put) {
        copy[0].code = step->space;
        copy[0].start = copy[0].end = text[0].start;
    }
    memcpy(copy + put, text, *count * sizeof(exi_tok_char));
    *count += put;
    for (size_t i = 0; meta && i < *count; i++) {
        if (copy[i].code == ' ') copy[i].code = step->space;
    }
    return copy;
}

/* Applies step k and those behind it; the depth is that of the pre-tokenizer, at most EXI_TOK_STEPS. count > 0. */
EX_API void exi_tok_split_from(const ex_tokenizer *t, int32_t k, exi_tok_work *work, exi_tok_token **out,
                               const exi_tok_char *text, size_t count)
{
    const exi_tok_split_step *step = &t->split[k];
    size_t start = 0;
    if (k == t->splits) {
        exi_tok_word(t, work, out, text, count);
        return;
    }
    if (step->kind == EXI_TOK_SPLIT_BERT || step->kind == EXI_TOK_SPLIT_SPACES) {
        for (size_t i = 0; i <= count; i++) {              /* words end at spaces; BERT: each punctuation character is a word */
            const bool space = i < count && ex_is_space(text[i].code);
            const bool alone = step->kind == EXI_TOK_SPLIT_BERT && i < count && !space && ex_is_punctuation(text[i].code);
            if (i < count && !space && !alone) continue;
            if (i > start) exi_tok_split_from(t, k + 1, work, out, text + start, i - start);
            if (alone) exi_tok_split_from(t, k + 1, work, out, text + i, 1);
            start = i + 1;
        }
        return;
    }
    text = exi_tok_put_spaces(step, &work->split[k], text, &count);
    while (start < count) {
        const size_t length = exi_tok_step_word(step, text + start, count - start);
        exi_tok_split_from(t, k + 1, work, out, text + start, length);
        start += length;
    }
}

EX_API void exi_tok_split(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *text, size_t count)
{
    if (count > 0) exi_tok_split_from(t, 0, work, out, text, count);
}

#endif /* EX_TOKENIZER_SPLIT_H */
