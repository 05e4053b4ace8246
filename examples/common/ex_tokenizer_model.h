/* ex_tokenizer_model.h - the part of ex_tokenizer.h that turns a word into tokens: WordPiece, BPE, Unigram. */
#ifndef EX_TOKENIZER_MODEL_H
#define EX_TOKENIZER_MODEL_H

/* ------------------------------------------------------------------------------------------------ WordPiece */

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

/* ------------------------------------------------------------------------------------------------ BPE */

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

/* The rule that merges two tokens, or NULL. */
EX_API const exi_tok_rule *exi_tok_rule_of(const ex_tokenizer *t, int32_t left, int32_t right)
{
    int32_t key[2], index;
    key[0] = left;
    key[1] = right;
    index = ex_map_get(&t->merges, key, sizeof(key), -1);
    return index >= 0 ? &t->rules[index] : NULL;
}

/* Offers the pair that starts at symbol `at`. */
EX_API void exi_tok_offer(const ex_tokenizer *t, exi_tok_work *work, int32_t at)
{
    const exi_tok_symbol *left = &work->symbols[at];
    const exi_tok_rule *rule = left->next >= 0 ? exi_tok_rule_of(t, left->id, work->symbols[left->next].id) : NULL;
    exi_tok_merge merge;
    if (rule == NULL) return;
    merge.rank = rule->rank;
    merge.at = at;
    merge.id = rule->id;
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
        const exi_tok_rule *rule;
        if (left->at == left->end || left->next < 0) continue;
        right = &symbols[left->next];
        rule = exi_tok_rule_of(t, left->id, right->id);
        if (rule == NULL || rule->id != top.id) continue;
        left->id = top.id;
        left->end = right->end;
        left->next = right->next;
        right->end = right->at;
        if (left->next >= 0) symbols[left->next].previous = top.at;
        if (left->previous >= 0) exi_tok_offer(t, work, left->previous);
        exi_tok_offer(t, work, top.at);
    }
}

EX_API void exi_tok_add_symbol(exi_tok_work *work, int32_t id, uint32_t at, uint32_t bytes)
{
    const int32_t index = (int32_t)stbds_arrlenu(work->symbols);
    exi_tok_symbol symbol;
    symbol.id = id;
    symbol.previous = index - 1;
    symbol.next = -1;
    symbol.at = at;
    symbol.end = at + bytes;
    if (index > 0) work->symbols[index - 1].next = index;
    stbds_arrput(work->symbols, symbol);
}

/* The bytes of a word into work->bytes, and for each of them its character into work->starts. */
EX_API void exi_tok_spell_word(exi_tok_work *work, const exi_tok_char *word, size_t count)
{
    stbds_arrsetlen(work->starts, 0);
    stbds_arrsetlen(work->bytes, 0);
    for (size_t i = 0; i < count; i++) {
        char bytes[4];
        const size_t length = ex_utf8_encode(word[i].code, bytes);
        memcpy(stbds_arraddnptr(work->bytes, length), bytes, length);
        for (size_t b = 0; b < length; b++) stbds_arrput(work->starts, (uint32_t)i);
    }
}

/* One symbol per byte; bytes without a token are unknown, or left out where the model has no unknown token. */
EX_API void exi_tok_byte_symbols(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *word, size_t count)
{
    bool unknown = false;
    exi_tok_spell_word(work, word, count);
    stbds_arrsetlen(work->symbols, 0);
    for (uint32_t at = 0; at < stbds_arrlenu(work->bytes); at++) {
        const int32_t id = t->byte_id[(unsigned char)work->bytes[at]];
        if (id >= 0) exi_tok_add_symbol(work, id, at, 1);
        else if (t->unk_id >= 0 && unknown && t->fuse_unk) stbds_arrlast(work->symbols).end = at + 1;
        else if (t->unk_id >= 0) exi_tok_add_symbol(work, t->unk_id, at, 1);
        unknown = id < 0;
    }
}

/* One symbol per character. What is not in the vocabulary becomes its bytes where the model has a token for each, else unknown,
   else it is left out. An unknown symbol waits: fuse_unk may lengthen it, and the bytes of a character go before it, since the
   reference has them in this order too. */
EX_API void exi_tok_char_symbols(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *word, size_t count)
{
    uint32_t at = 0, waiting = 0, from = 0;
    exi_tok_spell_word(work, word, count);
    stbds_arrsetlen(work->symbols, 0);
    for (size_t i = 0; i < count; i++) {
        const char *bytes = work->bytes + from;
        uint32_t length = 0;
        int32_t id;
        bool fallback = t->byte_fallback;
        while (from + length < stbds_arrlenu(work->bytes) && work->starts[from + length] == i) length++;
        from += length;
        id = ex_map_get(&t->vocab, bytes, length, -1);
        for (uint32_t b = 0; id < 0 && fallback && b < length; b++) fallback = t->byte_id[(unsigned char)bytes[b]] >= 0;
        if (id < 0 && fallback) {
            for (uint32_t b = 0; b < length; b++) exi_tok_add_symbol(work, t->byte_id[(unsigned char)bytes[b]], at++, 1);
            continue;
        }
        if (waiting > 0 && (id >= 0 || (t->unk_id >= 0 && !t->fuse_unk))) {
            exi_tok_add_symbol(work, t->unk_id, at, waiting);
            at += waiting;
            waiting = 0;
        }
        if (id >= 0) exi_tok_add_symbol(work, id, at, length);
        else if (t->unk_id >= 0) waiting += length;
        if (id >= 0 || t->unk_id < 0) at += length;
    }
    if (waiting > 0) exi_tok_add_symbol(work, t->unk_id, at, waiting);
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
    if (!t->byte_level) return ex_map_get(&t->vocab, work->bytes, count, -1);
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
    if (t->byte_level) exi_tok_byte_symbols(t, work, word, count);
    else exi_tok_char_symbols(t, work, word, count);
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

/* A text that is one word is cut where no merge can reach across, which changes nothing but the time it takes. */
EX_API void exi_tok_bpe_parts(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word,
                              size_t count)
{
    for (size_t start = 0, end; start < count; start = end) {
        for (end = start + 1; end < count; end++) {
            if (word[end].code == t->boundary && word[end - 1].code != t->boundary) break;
        }
        exi_tok_bpe(t, work, out, word + start, end - start);
    }
}

/* ------------------------------------------------------------------------------------------------ Unigram */

/* A better way to cut the word up to character `to`, the last piece starting at `from`? Of equals the first one stays. */
EX_API void exi_tok_path_offer(exi_tok_path *paths, size_t from, size_t to, double score, int32_t id)
{
    const double all = paths[from].score + score;
    if (paths[to].from >= 0 && all <= paths[to].score) return;
    paths[to].score = all;
    paths[to].from = (int32_t)from;
    paths[to].id = id;
}

/* Viterbi's search: work->paths receives the best last piece for every end. */
EX_API void exi_tok_best_paths(const ex_tokenizer *t, exi_tok_work *work, const exi_tok_char *word, size_t count)
{
    const exi_tok_path none = {0, -1, -1};
    stbds_arrsetlen(work->paths, count + 1);
    for (size_t i = 0; i <= count; i++) work->paths[i] = none;
    for (size_t i = 0; i < count; i++) {
        int32_t node = t->pieces.root[word[i].code & 255] ? 0 : -1;
        bool single = false;
        for (size_t k = i; k < count && node >= 0; k++) {
            node = exi_tok_child(&t->pieces, node, word[k].code);
            if (node < 0 || t->pieces.value[node] < 0) continue;
            exi_tok_path_offer(work->paths, i, k + 1, t->scores[t->pieces.value[node]], t->pieces.value[node]);
            single = single || k == i;
        }
        if (!single) exi_tok_path_offer(work->paths, i, i + 1, t->unk_score, t->unk_id);
    }
}

/* The token of characters [from, to), unknown ones together: as it is spelled, else its bytes, else unknown. */
EX_API void exi_tok_unigram_emit(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word,
                                 size_t from, size_t to, int32_t id)
{
    const uint32_t start = word[from].start, end = word[to - 1].end;
    bool fallback = t->byte_fallback;
    size_t count;
    if (id != t->unk_id) {
        exi_tok_emit(out, id, start, end);
        return;
    }
    exi_tok_spell_word(work, word + from, to - from);
    count = stbds_arrlenu(work->bytes);
    id = ex_map_get(&t->vocab, work->bytes, count, -1);
    for (size_t b = 0; id < 0 && fallback && b < count; b++) fallback = t->byte_id[(unsigned char)work->bytes[b]] >= 0;
    if (id >= 0 || !fallback) {
        exi_tok_emit(out, id >= 0 ? id : t->unk_id, start, end);
        return;
    }
    for (size_t b = 0; b < count; b++) exi_tok_emit(out, t->byte_id[(unsigned char)work->bytes[b]], start, end);
}

/* Cuts a word so that the sum of the scores is highest. */
EX_API void exi_tok_unigram(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word,
                            size_t count)
{
    exi_tok_path *paths;
    size_t first = count;             /* paths[first ...] is used again for the pieces, from the last to the first */
    exi_tok_best_paths(t, work, word, count);
    paths = work->paths;
    for (size_t at = count; at > 0;) {
        const exi_tok_path last = paths[at];
        paths[first] = last;          /* at <= first: what is overwritten has been read */
        first--;
        at = (size_t)last.from;
    }
    for (size_t i = first + 1, end; i <= count; i = end) { /* unknown neighbours are one token */
        for (end = i + 1; end <= count && paths[i].id == t->unk_id && paths[end].id == t->unk_id; end++) continue;
        exi_tok_unigram_emit(t, work, out, word, (size_t)paths[i].from,
                             end <= count ? (size_t)paths[end].from : count, paths[i].id);
    }
}

/* ------------------------------------------------------------------------------------------------ all models */

/* One word, count > 0. */
EX_API void exi_tok_word(const ex_tokenizer *t, exi_tok_work *work, exi_tok_token **out, const exi_tok_char *word, size_t count)
{
    if (t->model == EXI_TOK_WORDPIECE) exi_tok_wordpiece(t, work, out, word, count);
    else if (t->model == EXI_TOK_UNIGRAM) exi_tok_unigram(t, work, out, word, count);
    else if (t->boundary != 0) exi_tok_bpe_parts(t, work, out, word, count);
    else exi_tok_bpe(t, work, out, word, count);
}

#endif /* EX_TOKENIZER_MODEL_H */
