/* ex_metrics_text.h - the part of ex_metrics.h for written text: ROUGE as Google's rouge_score computes it (without stemming),
   corpus BLEU as sacrebleu does (13a tokens, exponential smoothing), exact match, perplexity. Several references are one text's
   equals: ROUGE takes the best of them, BLEU all together. */
#ifndef EX_METRICS_TEXT_H
#define EX_METRICS_TEXT_H

typedef struct ex_string { const char *at; size_t bytes; } ex_string;

EX_API ex_string ex_string_of(const char *text)
{
    ex_string string;
    string.at = text;
    string.bytes = strlen(text);
    return string;
}

/* ------------------------------------------------------------------------------------------------ words and their runs */

/* Words as numbers, the same number for the same word of all texts that share `known`. */
typedef struct exi_words { int32_t *id; } exi_words;       /* stb_ds array */

EX_API void exi_words_add(exi_words *words, ex_map *known, const char *word, size_t bytes)
{
    const int32_t fresh = (int32_t)ex_map_count(known);
    const int32_t id = ex_map_get(known, word, bytes, fresh);
    if (id == fresh) ex_map_put(known, word, bytes, fresh);
    stbds_arrput(words->id, id);
}

EX_API int64_t exi_words_count(const exi_words *words)
{
    return (int64_t)stbds_arrlenu(words->id);
}

/* How often each run of n words stands in a text. */
EX_API void exi_runs_count(ex_map *runs, const exi_words *words, int n)
{
    for (int64_t i = 0; i + n <= exi_words_count(words); i++) {
        const size_t bytes = (size_t)n * sizeof(int32_t);
        ex_map_put(runs, words->id + i, bytes, ex_map_get(runs, words->id + i, bytes, 0) + 1);
    }
}

/* How many runs two texts share, each as often as it stands in both. */
EX_API int64_t exi_runs_shared(const ex_map *a, const ex_map *b)
{
    int64_t shared = 0;
    for (size_t i = 0; i < ex_map_count(a); i++) {
        const int32_t other = ex_map_get(b, ex_map_key(a, i), a->entries[i].bytes, 0);
        shared += a->entries[i].value < other ? a->entries[i].value : other;
    }
    return shared;
}

/* ------------------------------------------------------------------------------------------------ ROUGE */

typedef struct ex_rouge_score { double precision, recall, f; } ex_rouge_score;
typedef struct ex_rouge { ex_rouge_score one, two, longest; } ex_rouge;       /* ROUGE-1, ROUGE-2, ROUGE-L; in 0..1 */

/* Small letters; words are what stands between characters other than a-z and 0-9. */
EX_API void exi_rouge_words(exi_words *words, ex_map *known, ex_string text)
{
    ex_text word = {NULL, 0, 0};
    for (size_t at = 0; at < text.bytes;) {
        uint32_t code, small;
        bool inside;
        char letter;
        at += ex_utf8_decode(text.at + at, text.bytes - at, &code, NULL);
        small = code == 0x130 ? 'i' : ex_lower(code);      /* U+0130: its second half is no letter of a-z and ends the word */
        inside = small < 0x80 && (ex_is_letter(small) || ex_is_number(small));
        letter = (char)small;
        if (inside) ex_text_add(&word, &letter, 1);
        if (word.length == 0 || (inside && code != 0x130)) continue;
        exi_words_add(words, known, word.at, word.length);
        word.length = 0;
    }
    if (word.length > 0) exi_words_add(words, known, word.at, word.length);
    ex_text_free(&word);
}

EX_API ex_rouge_score exi_rouge_of(int64_t shared, int64_t predicted, int64_t reference)
{
    ex_rouge_score score = {0, 0, 0};
    if (shared == 0) return score;
    score.precision = (double)shared / (double)predicted;
    score.recall = (double)shared / (double)reference;
    score.f = 2 * score.precision * score.recall / (score.precision + score.recall);
    return score;
}

EX_API ex_rouge_score exi_rouge_runs(const exi_words *predicted, const exi_words *reference, int n)
{
    const int64_t p = exi_words_count(predicted) - n + 1, r = exi_words_count(reference) - n + 1;
    ex_map a, b;
    ex_rouge_score score;
    memset(&a, 0, sizeof(a));
    memset(&b, 0, sizeof(b));
    exi_runs_count(&a, predicted, n);
    exi_runs_count(&b, reference, n);
    score = exi_rouge_of(exi_runs_shared(&a, &b), p, r);
    ex_map_free(&a);
    ex_map_free(&b);
    return score;
}

/* Words of the longest common subsequence; one row of the usual table is kept. */
EX_API int64_t exi_longest_common(const exi_words *a, const exi_words *b)
{
    const int64_t rows = exi_words_count(a), columns = exi_words_count(b);
    int32_t *length = (int32_t *)ex_alloc((size_t)columns + 1, sizeof(int32_t)), result;
    for (int64_t i = 0; i < rows; i++) {
        int32_t diagonal = 0;
        for (int64_t k = 0; k < columns; k++) {
            const int32_t above = length[k + 1];
            if (a->id[i] == b->id[k]) length[k + 1] = diagonal + 1;
            else if (length[k] > above) length[k + 1] = length[k];
            diagonal = above;
        }
    }
    result = length[columns];
    free(length);
    return result;
}

/* One predicted text against its references: of each kind the score with the best F, the first one of equals. */
EX_API void ex_rouge_compare(ex_rouge *rouge, ex_string predicted, const ex_string *references, int64_t count)
{
    exi_words p = {NULL};
    ex_map known;
    memset(rouge, 0, sizeof(*rouge));
    memset(&known, 0, sizeof(known));
    exi_rouge_words(&p, &known, predicted);
    for (int64_t i = 0; i < count; i++) {
        exi_words r = {NULL};
        ex_rouge_score score;
        exi_rouge_words(&r, &known, references[i]);
        score = exi_rouge_runs(&p, &r, 1);
        if (score.f > rouge->one.f) rouge->one = score;
        score = exi_rouge_runs(&p, &r, 2);
        if (score.f > rouge->two.f) rouge->two = score;
        score = exi_rouge_of(exi_longest_common(&p, &r), exi_words_count(&p), exi_words_count(&r));
        if (score.f > rouge->longest.f) rouge->longest = score;
        stbds_arrfree(r.id);
    }
    stbds_arrfree(p.id);
    ex_map_free(&known);
}

/* ------------------------------------------------------------------------------------------------ BLEU */

#define EX_BLEU_ORDER 4               /* runs of one to four words */

/* Zero-initialise, ex_bleu_add for each text, ex_bleu_score at the end. */
typedef struct ex_bleu {
    int64_t right[EX_BLEU_ORDER], all[EX_BLEU_ORDER];      /* runs of the texts that a reference has; all of them */
    int64_t length, reference;        /* words of the texts, and of the references closest in length */
} ex_bleu;

EX_API bool exi_digit(char c)
{
    return c >= '0' && c <= '9';
}

EX_API bool exi_point(char c)
{
    return c == '.' || c == ',';
}

/* ASCII symbols that are words of their own: all but ' , - . */
EX_API bool exi_bleu_symbol(char c)
{
    return ((c >= ' ' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~')) &&
           c != '\'' && c != ',' && c != '-' && c != '.';
}

/* One of the four passes of the 13a rules over text: where it finds two characters (the first pass: one) they get spaces. */
EX_API void exi_bleu_pass(ex_text *out, const ex_text *text, int pass)
{
    out->length = 0;
    for (size_t i = 0; i < text->length; i++) {
        const char a = text->at[i], b = i + 1 < text->length ? text->at[i + 1] : 0;
        const bool two = i + 1 < text->length;
        if (pass == 0 && exi_bleu_symbol(a)) ex_text_format(out, " %c ", a);
        else if (pass == 1 && two && !exi_digit(a) && exi_point(b)) ex_text_format(out, "%c %c ", a, b);
        else if (pass == 2 && two && exi_point(a) && !exi_digit(b)) ex_text_format(out, " %c %c", a, b);
        else if (pass == 3 && two && exi_digit(a) && b == '-') ex_text_format(out, "%c %c ", a, b);
        else {
            ex_text_add(out, &a, 1);
            continue;
        }
        i += pass > 0;
    }
}

/* Bytes without the space at the end. */
EX_API size_t exi_bleu_end(const char *text, size_t bytes)
{
    while (bytes > 0) {
        uint32_t code;
        const size_t last = ex_utf8_last(text, bytes, &code);
        if (!exi_squad_space(code)) break;
        bytes = last;
    }
    return bytes;
}

/* What the 13a rules do before they look at single characters. */
EX_API void exi_bleu_prepare(ex_text *text, ex_string string)
{
    static const char *const rules[][2] = {
        {"<skipped>", ""}, {"-\n", ""}, {"\n", " "}, {"&quot;", "\""}, {"&amp;", "&"}, {"&lt;", "<"}, {"&gt;", ">"}
    };
    ex_utf8_add_repaired(text, string.at, string.bytes);
    text->length = exi_bleu_end(text->at, text->length);
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        ex_text changed = {NULL, 0, 0};
        ex_text_put(&changed, "");
        ex_text_add_replaced(&changed, text->at, text->length, rules[i][0], rules[i][1]);
        ex_text_free(text);
        *text = changed;
    }
}

/* The words of mteval-v13a. */
EX_API void exi_bleu_words(exi_words *words, ex_map *known, ex_string string)
{
    ex_text text = {NULL, 0, 0}, inner = {NULL, 0, 0}, other = {NULL, 0, 0};
    size_t start = 0;
    exi_bleu_prepare(&inner, string);
    ex_text_put(&text, " ");
    ex_text_add(&text, inner.at, inner.length);
    ex_text_put(&text, " ");
    for (int pass = 0; pass < 4; pass++) {
        const ex_text before = text;
        exi_bleu_pass(&other, &text, pass);
        text = other;
        other = before;
    }
    for (size_t at = 0; at <= text.length;) {
        uint32_t code = ' ';
        const size_t step = at < text.length ? ex_utf8_decode(text.at + at, text.length - at, &code, NULL) : 1;
        if (exi_squad_space(code)) {
            if (at > start) exi_words_add(words, known, text.at + start, at - start);
            start = at + step;
        }
        at += step;
    }
    ex_text_free(&text);
    ex_text_free(&inner);
    ex_text_free(&other);
}

/* The reference whose length is closest to `length`, the shorter one of two that are as close. */
EX_API int64_t exi_bleu_closest(const exi_words *references, int64_t count, int64_t length)
{
    int64_t best = exi_words_count(&references[0]);
    for (int64_t i = 1; i < count; i++) {
        const int64_t one = exi_words_count(&references[i]);
        const int64_t far = one > length ? one - length : length - one, before = best > length ? best - length : length - best;
        if (far < before || (far == before && one < best)) best = one;
    }
    return best;
}

/* Adds a text with count > 0 references. */
EX_API void ex_bleu_add(ex_bleu *bleu, ex_string predicted, const ex_string *references, int64_t count)
{
    exi_words p = {NULL}, *r = (exi_words *)ex_alloc((size_t)count, sizeof(exi_words));
    ex_map known;
    memset(&known, 0, sizeof(known));
    exi_bleu_words(&p, &known, predicted);
    for (int64_t i = 0; i < count; i++) exi_bleu_words(&r[i], &known, references[i]);
    for (int n = 1; n <= EX_BLEU_ORDER; n++) {
        ex_map own, most;
        memset(&own, 0, sizeof(own));
        memset(&most, 0, sizeof(most));
        exi_runs_count(&own, &p, n);
        for (int64_t i = 0; i < count; i++) {              /* a run counts as often as in the reference that has most of it */
            ex_map one;
            memset(&one, 0, sizeof(one));
            exi_runs_count(&one, &r[i], n);
            for (size_t k = 0; k < ex_map_count(&one); k++) {
                const ex_map_entry *entry = &one.entries[k];
                if (entry->value > ex_map_get(&most, ex_map_key(&one, k), entry->bytes, 0))
                    ex_map_put(&most, ex_map_key(&one, k), entry->bytes, entry->value);
            }
            ex_map_free(&one);
        }
        bleu->right[n - 1] += exi_runs_shared(&own, &most);
        bleu->all[n - 1] += exi_words_count(&p) >= n ? exi_words_count(&p) - n + 1 : 0;
        ex_map_free(&own);
        ex_map_free(&most);
    }
    bleu->length += exi_words_count(&p);
    bleu->reference += exi_bleu_closest(r, count, exi_words_count(&p));
    for (int64_t i = 0; i < count; i++) stbds_arrfree(r[i].id);
    stbds_arrfree(p.id);
    ex_map_free(&known);
    free(r);
}

/* In percent. Orders without a match count as half of one, a quarter, ...; where the texts are too short for an order, 0. */
EX_API double ex_bleu_score(const ex_bleu *bleu)
{
    double logs = 0, smooth = 1, brevity = 1;
    bool any = false;
    for (int n = 0; n < EX_BLEU_ORDER; n++) any = any || bleu->right[n] > 0;
    if (!any) return 0;
    for (int n = 0; n < EX_BLEU_ORDER; n++) {
        if (bleu->all[n] == 0) return 0;
        if (bleu->right[n] == 0) smooth *= 2;
        logs += log(100 * (bleu->right[n] > 0 ? (double)bleu->right[n] : 1 / smooth) / (double)bleu->all[n]);
    }
    if (bleu->length < bleu->reference) brevity = exp(1 - (double)bleu->reference / (double)bleu->length);
    return brevity * exp(logs / EX_BLEU_ORDER);
}

/* ------------------------------------------------------------------------------------------------ exact match, perplexity */

EX_API ex_string exi_trimmed(ex_string text)
{
    while (text.bytes > 0 && exi_only_space(text.at, text.at + 1)) {
        text.at++;
        text.bytes--;
    }
    while (text.bytes > 0 && exi_only_space(text.at + text.bytes - 1, text.at + text.bytes)) text.bytes--;
    return text;
}

/* Is the text one of its references, but for space around it? */
EX_API bool ex_exact_match(ex_string predicted, const ex_string *references, int64_t count)
{
    const ex_string p = exi_trimmed(predicted);
    for (int64_t i = 0; i < count; i++) {
        const ex_string r = exi_trimmed(references[i]);
        if (p.bytes == r.bytes && (p.bytes == 0 || memcmp(p.at, r.at, p.bytes) == 0)) return true;
    }
    return false;
}

/* exp of the mean loss (natural logarithm) per token; 0 when there are no tokens. */
EX_API double ex_perplexity(double loss_sum, int64_t tokens)
{
    return tokens > 0 ? exp(loss_sum / (double)tokens) : 0;
}

#endif /* EX_METRICS_TEXT_H */
