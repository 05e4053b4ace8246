/* ex_tokenizer_normal.h - the part of ex_tokenizer.h that changes a text before it is split: lower case, accents, the character
   map of SentencePiece, spaces put in front, replaced or stripped. Each step reads one array of characters and writes another. */
#ifndef EX_TOKENIZER_NORMAL_H
#define EX_TOKENIZER_NORMAL_H

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
            const uint32_t moving = run[i].code, order = ex_combining_class(moving);
            size_t to = i;
            for (; to > 0 && ex_combining_class(run[to - 1].code) > order; to--) run[to].code = run[to - 1].code;
            run[to].code = moving;
        }
    } else {
        uint32_t *sorted = (uint32_t *)ex_alloc(count, sizeof(uint32_t));
        size_t place[257] = {0};
        for (size_t i = 0; i < count; i++) place[ex_combining_class(run[i].code) + 1]++;
        for (size_t i = 1; i < 257; i++) place[i] += place[i - 1];
        for (size_t i = 0; i < count; i++) sorted[place[ex_combining_class(run[i].code)]++] = run[i].code;
        for (size_t i = 0; i < count; i++) run[i].code = sorted[i];
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
EX_API void exi_tok_clean(const exi_tok_normal_step *step, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t code = in[i].code;
        if (step->clean_text && (code == 0 || code == 0xfffd || ex_is_control(code))) continue;
        if (step->clean_text && ex_is_space(code)) code = ' ';
        if (step->chinese && ex_is_cjk(code)) {
            exi_tok_push(out, ' ', &in[i]);
            exi_tok_push(out, code, &in[i]);
            exi_tok_push(out, ' ', &in[i]);
        } else {
            exi_tok_push(out, code, &in[i]);
        }
    }
}

/* Drops accents of a decomposed text and lowers it: *out receives in[0 .. count). */
EX_API void exi_tok_fold(const exi_tok_normal_step *step, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (step->strip_accents && ex_is_accent(in[i].code)) continue;
        exi_tok_push(out, step->lowercase ? (in[i].code == 0x130 ? 'i' : ex_lower(in[i].code)) : in[i].code, &in[i]);
        if (step->lowercase && in[i].code == 0x130) exi_tok_push(out, 0x307, &in[i]);
    }
}

/* BertNormalizer */
EX_API void exi_tok_normal_bert(const exi_tok_normal_step *step, exi_tok_work *work, exi_tok_char **out, const exi_tok_char *in,
                                size_t count)
{
    if (!step->strip_accents && !step->lowercase) {
        exi_tok_clean(step, out, in, count);
        return;
    }
    stbds_arrsetlen(work->clean, 0);
    exi_tok_clean(step, &work->clean, in, count);
    if (step->strip_accents) {
        exi_tok_decompose(&work->marks, work->clean, stbds_arrlenu(work->clean));
        exi_tok_fold(step, out, work->marks, stbds_arrlenu(work->marks));
    } else {
        exi_tok_fold(step, out, work->clean, stbds_arrlenu(work->clean));
    }
}

/* Canonical composition of a decomposed text: each character joins the last starter unless something between them, a starter
   or a mark of the same class or a higher one, keeps them apart. */
EX_API void exi_tok_normal_nfc(exi_tok_work *work, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    size_t starter = 0;
    uint32_t before = 0;              /* class of the last character behind the starter */
    bool any = false;
    exi_tok_decompose(&work->marks, in, count);
    for (size_t i = 0; i < stbds_arrlenu(work->marks); i++) {
        const exi_tok_char *one = &work->marks[i];
        const uint32_t order = ex_combining_class(one->code);
        const bool next = any && starter + 1 == stbds_arrlenu(*out);
        const uint32_t both = any && (next || (before != 0 && before < order)) ? ex_compose((*out)[starter].code, one->code) : 0;
        if (both != 0) {
            (*out)[starter].code = both;
            if (one->end > (*out)[starter].end) (*out)[starter].end = one->end;
            continue;
        }
        if (order == 0) starter = stbds_arrlenu(*out);
        any = any || order == 0;
        before = order;
        stbds_arrput(*out, *one);
    }
}

/* ------------------------------------------------------------------------------------------------ character map */

/* Children of a unit of the double array. */
EX_API size_t exi_tok_unit_offset(uint32_t unit)
{
    return (size_t)(unit >> 10) << ((unit & 512u) >> 6);
}

/* Where the replacement of a prefix of key stands, the shortest prefix that has one; NULL: none has. */
EX_API const char *exi_tok_charmap_find(const exi_tok_charmap *map, const char *key, size_t bytes)
{
    size_t node = exi_tok_unit_offset(map->units[0]);
    for (size_t i = 0; i < bytes; i++) {
        const uint32_t c = (unsigned char)key[i];
        uint32_t unit;
        node ^= c;
        if (c == 0 || node >= map->count) return NULL;
        unit = map->units[node];
        if ((unit & 0x800000ffu) != c) return NULL;
        node ^= exi_tok_unit_offset(unit);
        if ((unit >> 8 & 1) == 0) continue;
        if (node >= map->count || (map->units[node] & 0x7fffffffu) > map->bytes) return NULL;
        return map->texts + (map->units[node] & 0x7fffffffu);
    }
    return NULL;
}

/* Writes the replacement of in[0 .. count) as a whole; false when there is none. What takes six bytes or more has none, and of
   a shorter whole only the shortest prefix counts: so the reference does it, and models have learned from that. */
EX_API bool exi_tok_charmap_apply(const exi_tok_charmap *map, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    char key[8];
    size_t bytes = 0;
    const char *with;
    exi_tok_char origin = in[0];
    for (size_t i = 0; i < count; i++) {
        if (bytes > 4) return false;                       /* room for one more character, and too long already */
        bytes += ex_utf8_encode(in[i].code, key + bytes);
    }
    with = bytes < 6 ? exi_tok_charmap_find(map, key, bytes) : NULL;
    if (with == NULL) return false;
    origin.end = in[count - 1].end;
    for (size_t at = 0, length = strlen(with); at < length;) {
        uint32_t code;
        at += ex_utf8_decode(with + at, length - at, &code, NULL);
        exi_tok_push(out, code, &origin);
    }
    return true;
}

/* Each character as its user sees it is replaced as a whole, or else code point by code point. */
EX_API void exi_tok_normal_charmap(const exi_tok_charmap *map, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    size_t end;
    for (size_t at = 0; at < count; at = end) {
        ex_grapheme state;
        memset(&state, 0, sizeof(state));
        (void)ex_grapheme_joins(&state, in[at].code);
        for (end = at + 1; end < count && ex_grapheme_joins(&state, in[end].code); end++) continue;
        if (exi_tok_charmap_apply(map, out, in + at, end - at)) continue;
        for (size_t i = at; end - at > 1 && i < end; i++) {
            if (!exi_tok_charmap_apply(map, out, in + i, 1)) stbds_arrput(*out, in[i]);
        }
        if (end - at == 1) stbds_arrput(*out, in[at]);
    }
    /* what was left out before the first character belongs to it, so that the text still begins at its beginning */
    if (stbds_arrlenu(*out) > 0) (*out)[0].start = in[0].start;
}

/* ------------------------------------------------------------------------------------------------ spaces and replacements */

EX_API void exi_tok_push_all(exi_tok_char **out, const uint32_t *codes, const exi_tok_char *origin)
{
    for (size_t i = 0; i < stbds_arrlenu(codes); i++) exi_tok_push(out, codes[i], origin);
}

/* How many characters at in the step replaces, 0 for none. */
EX_API size_t exi_tok_replaced(const exi_tok_normal_step *step, const exi_tok_char *in, size_t count)
{
    const size_t length = stbds_arrlenu(step->from);
    size_t i = 0;
    if (step->kind == EXI_TOK_NORMAL_SPACES) {
        while (i < count && in[i].code == ' ') i++;
        return i >= 2 ? i : 0;
    }
    while (i < length && i < count && in[i].code == step->from[i]) i++;
    return i == length ? i : 0;
}

EX_API void exi_tok_normal_replace(const exi_tok_normal_step *step, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    for (size_t at = 0; at < count;) {
        const size_t length = exi_tok_replaced(step, in + at, count - at);
        exi_tok_char origin = in[at];
        if (length > 0) {
            origin.end = in[at + length - 1].end;
            exi_tok_push_all(out, step->to, &origin);
        } else {
            stbds_arrput(*out, origin);
        }
        at += length > 0 ? length : 1;
    }
}

EX_API void exi_tok_normal_prepend(const exi_tok_normal_step *step, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    exi_tok_char origin;
    if (count == 0) return;
    origin = in[0];
    origin.end = origin.start;
    exi_tok_push_all(out, step->to, &origin);
    memcpy(stbds_arraddnptr(*out, count), in, count * sizeof(exi_tok_char));
}

EX_API void exi_tok_normal_strip(const exi_tok_normal_step *step, exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    size_t from = 0;
    while (step->left && from < count && ex_is_space(in[from].code)) from++;
    while (step->right && count > from && ex_is_space(in[count - 1].code)) count--;
    if (count > from) memcpy(stbds_arraddnptr(*out, count - from), in + from, (count - from) * sizeof(exi_tok_char));
}

/* ------------------------------------------------------------------------------------------------ all steps */

EX_API void exi_tok_normal_step_run(const ex_tokenizer *t, const exi_tok_normal_step *step, exi_tok_work *work,
                                    exi_tok_char **out, const exi_tok_char *in, size_t count)
{
    stbds_arrsetlen(*out, 0);
    if (step->kind == EXI_TOK_NORMAL_BERT) exi_tok_normal_bert(step, work, out, in, count);
    else if (step->kind == EXI_TOK_NORMAL_CHARMAP) exi_tok_normal_charmap(&t->charmap, out, in, count);
    else if (step->kind == EXI_TOK_NORMAL_PREPEND) exi_tok_normal_prepend(step, out, in, count);
    else if (step->kind == EXI_TOK_NORMAL_STRIP) exi_tok_normal_strip(step, out, in, count);
    else if (step->kind == EXI_TOK_NORMAL_LOWERCASE) exi_tok_fold(step, out, in, count);
    else if (step->kind == EXI_TOK_NORMAL_NFC) exi_tok_normal_nfc(work, out, in, count);
    else exi_tok_normal_replace(step, out, in, count);
}

/* work->normal receives the normalised characters of in. */
EX_API void exi_tok_normalise(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *in, size_t count)
{
    stbds_arrsetlen(work->normal, 0);
    if (count > 0) memcpy(stbds_arraddnptr(work->normal, count), in, count * sizeof(exi_tok_char));
    for (int32_t i = 0; i < t->normals; i++) {
        exi_tok_char *changed = work->parts;
        exi_tok_normal_step_run(t, &t->normal[i], work, &changed, work->normal, stbds_arrlenu(work->normal));
        work->parts = work->normal;
        work->normal = changed;
    }
}

#endif /* EX_TOKENIZER_NORMAL_H */
