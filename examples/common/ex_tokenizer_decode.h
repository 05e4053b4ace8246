/* ex_tokenizer_decode.h - the part of ex_tokenizer.h that turns ids into text, at once or token by token:

       ex_decoder decoder;
       ex_text text = {NULL, 0, 0};
       ex_decoder_start(&decoder, tokenizer, true);
       while (...) {
           ex_decoder_add(&decoder, id, &text, &error);    -> appends what is certain by now: whole characters only
           fwrite(text.at, 1, text.length, stdout);
           text.length = 0;
       }
       ex_decoder_end(&decoder, &text);                    -> and what was still waiting
       ex_decoder_free(&decoder);

   A decoder is a list of steps. Each token goes through all of them before the next one comes, so that both ways are one code.
   The texts are the same with one exception: a run of byte tokens that is no UTF-8 as a whole decodes to one U+FFFD for each of
   its bytes, but token by token the good characters at its beginning have been written already. */
#ifndef EX_TOKENIZER_DECODE_H
#define EX_TOKENIZER_DECODE_H

typedef struct ex_decoder {
    const ex_tokenizer *tokenizer;
    bool skip_special;                /* leave out special tokens */
    bool at_once;                     /* a run of byte tokens waits for its end */
    int64_t seen[EXI_TOK_STEPS];      /* tokens that have come to a step */
    int64_t cut[EXI_TOK_STEPS];       /* STRIP: characters taken from the beginning of the present token; -1: no more */
    ex_text wait;                     /* bytes that are no character yet */
    bool run, broken;                 /* FALLBACK: the token of this run has begun; the run is no UTF-8 */
    ex_text token, *out;
} ex_decoder;

/* tokenizer must stay as long as the decoder is used. */
EX_API void ex_decoder_start(ex_decoder *decoder, const ex_tokenizer *tokenizer, bool skip_special)
{
    memset(decoder, 0, sizeof(*decoder));
    decoder->tokenizer = tokenizer;
    decoder->skip_special = skip_special;
}

EX_API void ex_decoder_free(ex_decoder *decoder)
{
    ex_text_free(&decoder->wait);
    ex_text_free(&decoder->token);
    memset(decoder, 0, sizeof(*decoder));
}

/* ------------------------------------------------------------------------------------------------ single steps */

/* Undoes spaces before punctuation and contractions, within one token as the reference does. */
EX_API void exi_tok_cleanup(ex_text *token)
{
    static const char *const rules[][2] = {
        {" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"}, {" n't", "n't"}, {" 'm", "'m"},
        {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}
    };
    if (memchr(token->at, ' ', token->length) == NULL) return;
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        ex_text changed = {NULL, 0, 0};
        ex_text_put(&changed, "");
        ex_text_add_replaced(&changed, token->at, token->length, rules[i][0], rules[i][1]);
        ex_text_free(token);
        *token = changed;
    }
}

EX_API void exi_tok_decode_wordpiece(const exi_tok_decode_step *step, ex_text *out, const char *name, size_t bytes, bool first)
{
    const bool joins = !first && exi_starts_with(name, bytes, step->from);
    if (!joins && !first) ex_text_put(out, " ");
    if (joins) ex_text_add(out, name + strlen(step->from), bytes - strlen(step->from));
    else ex_text_add(out, name, bytes);
    if (step->cleanup) exi_tok_cleanup(out);
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

/* The byte of "<0x41>", or -1. */
EX_API int exi_tok_byte_name(const char *name, size_t bytes)
{
    int value = 0;
    if (bytes != 6 || memcmp(name, "<0x", 3) != 0 || name[5] != '>') return -1;
    for (int i = 3; i < 5; i++) {
        const char c = name[i];
        const int digit = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : -1;
        if (digit < 0 && !(c == '+' && i == 3)) return -1; /* the reference reads "+5" as a number, too */
        value = digit < 0 ? value : value * 16 + digit;
    }
    return value;
}

/* How many bytes at the end of text are the beginning of a character that more bytes may complete. */
EX_API size_t exi_tok_open_end(const char *text, size_t bytes)
{
    for (size_t back = 1; back <= 3 && back <= bytes; back++) {
        const unsigned char lead = (unsigned char)text[bytes - back];
        uint32_t code;
        bool valid;
        if (lead < 0xc2 || lead > 0xf4) {
            if (lead < 0x80 || lead > 0xbf) return 0;
            continue;
        }
        return ex_utf8_decode(text + bytes - back, back, &code, &valid) == back && !valid ? back : 0;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ the chain */

EX_API void exi_tok_decode_step_run(ex_decoder *d, int32_t k, const char *text, size_t bytes, bool goes_on);

/* What waits and is complete goes on; what can no longer become a character goes on as U+FFFD. last: nothing follows. */
EX_API void exi_tok_release_bytes(ex_decoder *d, int32_t k, bool last)
{
    const size_t open = last ? 0 : exi_tok_open_end(d->wait.at, d->wait.length), ready = d->wait.length - open;
    ex_text text = {NULL, 0, 0};
    if (ready == 0) return;
    ex_utf8_add_repaired(&text, d->wait.at, ready);
    memmove(d->wait.at, d->wait.at + ready, open);
    d->wait.length = open;
    exi_tok_decode_step_run(d, k + 1, text.at, text.length, d->seen[k]++ > 0);
    ex_text_free(&text);
}

/* The same for byte tokens, where every byte of a run that is no UTF-8 becomes a U+FFFD. */
EX_API void exi_tok_release_run(ex_decoder *d, int32_t k, bool last)
{
    size_t good = d->wait.length > 0 ? ex_utf8_valid_prefix(d->wait.at, d->wait.length) : 0;
    const size_t open = last ? 0 : exi_tok_open_end(d->wait.at, d->wait.length);
    if (d->at_once && !last) return;
    d->broken = d->broken || good + open < d->wait.length;
    if (d->broken) {
        for (size_t i = 0; i < d->wait.length; i++) exi_tok_decode_step_run(d, k + 1, "\xef\xbf\xbd", 3, false);
        good = d->wait.length;
    } else if (good > 0) {
        ex_text text = {NULL, 0, 0};
        ex_text_add(&text, d->wait.at, good);
        exi_tok_decode_step_run(d, k + 1, text.at, text.length, d->run);
        d->run = true;
        ex_text_free(&text);
    }
    if (good < d->wait.length) memmove(d->wait.at, d->wait.at + good, d->wait.length - good);
    d->wait.length -= good;
    if (last) d->run = d->broken = false;
}

EX_API void exi_tok_decode_fallback(ex_decoder *d, int32_t k, const char *text, size_t bytes)
{
    const int byte = exi_tok_byte_name(text, bytes);
    const char one = (char)byte;
    if (byte >= 0) {
        ex_text_add(&d->wait, &one, 1);
        exi_tok_release_run(d, k, false);
        return;
    }
    exi_tok_release_run(d, k, true);
    exi_tok_decode_step_run(d, k + 1, text, bytes, false);
}

/* Takes up to `start` of a character from the beginning and up to `stop` from the end. */
EX_API void exi_tok_decode_strip(ex_decoder *d, int32_t k, const char *text, size_t bytes, bool goes_on)
{
    const exi_tok_decode_step *step = &d->tokenizer->decode[k];
    const size_t length = strlen(step->from);
    if (!goes_on) d->cut[k] = 0;
    while (bytes > 0 && d->cut[k] >= 0 && d->cut[k] < step->start && exi_starts_with(text, bytes, step->from)) {
        text += length;
        bytes -= length;
        d->cut[k]++;
    }
    if (bytes > 0) d->cut[k] = -1;
    for (int64_t i = 0; i < step->stop && bytes >= length && exi_starts_with(text + bytes - length, length, step->from); i++)
        bytes -= length;
    exi_tok_decode_step_run(d, k + 1, text, bytes, goes_on);
}

/* Gives one token, or a part of one (goes_on: not its first), to step k and those behind it. */
EX_API void exi_tok_decode_step_run(ex_decoder *d, int32_t k, const char *text, size_t bytes, bool goes_on)
{
    const exi_tok_decode_step *step = &d->tokenizer->decode[k];
    ex_text changed = {NULL, 0, 0};
    bool first;
    if (k == d->tokenizer->decodes) {
        ex_text_add(d->out, text, bytes);
        return;
    }
    if (step->kind == EXI_TOK_DECODE_FALLBACK) {
        exi_tok_decode_fallback(d, k, text, bytes);
        return;
    }
    if (step->kind == EXI_TOK_DECODE_STRIP) {
        exi_tok_decode_strip(d, k, text, bytes, goes_on);
        return;
    }
    if (step->kind == EXI_TOK_DECODE_BYTES) {
        exi_tok_decode_bytes(&d->wait, text, bytes);
        exi_tok_release_bytes(d, k, false);
        return;
    }
    if (step->kind == EXI_TOK_DECODE_FUSE) {
        exi_tok_decode_step_run(d, k + 1, text, bytes, d->seen[k]++ > 0);
        return;
    }
    d->seen[k] += !goes_on;
    first = d->seen[k] <= 1;
    ex_text_put(&changed, "");
    if (step->kind == EXI_TOK_DECODE_WORDPIECE) exi_tok_decode_wordpiece(step, &changed, text, bytes, first);
    else if (step->kind == EXI_TOK_DECODE_REPLACE) ex_text_add_replaced(&changed, text, bytes, step->from, step->to);
    else if (step->kind == EXI_TOK_DECODE_METASPACE)
        ex_text_add_replaced(&changed, text, bytes, step->from, first && step->drop ? "" : " ");
    else ex_text_format(&changed, "%s", first ? "" : " ");
    if (step->kind == EXI_TOK_DECODE_JOIN) ex_text_add(&changed, text, bytes);
    exi_tok_decode_step_run(d, k + 1, changed.at, changed.length, goes_on);
    ex_text_free(&changed);
}

/* ------------------------------------------------------------------------------------------------ decode */

/* Appends to out what the next token makes certain. An id that no token has adds nothing; a negative one is an error. */
EX_API bool ex_decoder_add(ex_decoder *decoder, int32_t id, ex_text *out, ex_error *error)
{
    const ex_tokenizer *t = decoder->tokenizer;
    const char *name = ex_tokenizer_token(t, id);
    size_t length = name != NULL ? t->names.entries[t->name_of[id]].bytes : 0;
    int32_t added = name != NULL ? ex_map_get(&t->specials, name, length, -1) : -1;
    if (id < 0) return ex_fail(error, "a negative token id cannot be decoded");
    if (name == NULL) return true;
    if (added >= 0 && t->added[added].decoded != NULL) {
        name = t->added[added].decoded;
        length = strlen(name);
        added = ex_map_get(&t->specials, name, length, -1);
    }
    if (decoder->skip_special && added >= 0 && t->added[added].special) return true;
    decoder->out = out;
    exi_tok_decode_step_run(decoder, 0, name, length, false);
    return true;
}

/* Appends what still waits for bytes that will not come, and makes the decoder ready for another text. */
EX_API void ex_decoder_end(ex_decoder *decoder, ex_text *out)
{
    const ex_tokenizer *t = decoder->tokenizer;
    decoder->out = out;
    for (int32_t k = 0; k < t->decodes; k++) {
        if (t->decode[k].kind == EXI_TOK_DECODE_FALLBACK) exi_tok_release_run(decoder, k, true);
        if (t->decode[k].kind == EXI_TOK_DECODE_BYTES) exi_tok_release_bytes(decoder, k, true);
    }
    memset(decoder->seen, 0, sizeof(decoder->seen));
    memset(decoder->cut, 0, sizeof(decoder->cut));
}

/* The text of ids, NUL-terminated; free(). *bytes (may be NULL): its length, since a text may hold NUL itself. Ids that no
   token has are left out. NULL and a message for negative ids. */
EX_API char *ex_tokenizer_decode(const ex_tokenizer *tokenizer, const int32_t *ids, int64_t count, bool skip_special,
                                 size_t *bytes, ex_error *error)
{
    ex_text out = {NULL, 0, 0};
    ex_decoder decoder;
    bool fine = true;
    ex_decoder_start(&decoder, tokenizer, skip_special);
    decoder.at_once = true;
    ex_text_put(&out, "");
    for (int64_t i = 0; i < count && fine; i++) fine = ex_decoder_add(&decoder, ids[i], &out, error);
    if (fine) ex_decoder_end(&decoder, &out);
    ex_decoder_free(&decoder);
    if (!fine) {
        ex_text_free(&out);
        return NULL;
    }
    if (bytes != NULL) *bytes = out.length;
    return out.at;
}

#endif /* EX_TOKENIZER_DECODE_H */
