/* ex_tokenizer_load.h - the second half of ex_tokenizer.h: a tokenizer out of the files of a model folder.

     tokenizer.json               everything stands in it
     vocab.txt                    BERT: one token per line; lower case or not from tokenizer_config.json
     vocab.json and merges.txt    GPT-2 and RoBERTa
     tokenizer.bin                llama2.c

   What is not supported is refused by the name of the key and its value, never ignored. Of tokenizer.json the keys
   "truncation" and "padding" are left out on purpose: lengths are the caller's. */
#ifndef EX_TOKENIZER_LOAD_H
#define EX_TOKENIZER_LOAD_H

#define EXI_TOK_MAX_ID 16777215       /* a wrong id must not become a table of gigabytes */
#define EXI_TOK_MAX_ADDED 1024        /* bytes of an added token, of a pattern, of a token of llama2.c */

typedef struct exi_tok_loader {
    ex_tokenizer *t;
    ex_json json;                     /* of the file that is being read */
    const ex_json_node *root;
    bool complete;                    /* special tokens are known, and none is looked for in texts */
    ex_error *error;
} exi_tok_loader;

EX_API void ex_tokenizer_free(ex_tokenizer *tokenizer)
{
    if (tokenizer == NULL) return;
    ex_map_free(&tokenizer->vocab);
    ex_map_free(&tokenizer->specials);
    exi_tok_trie_free(&tokenizer->raw);
    exi_tok_trie_free(&tokenizer->normalized);
    exi_tok_trie_free(&tokenizer->pieces);
    ex_map_free(&tokenizer->names);
    ex_map_free(&tokenizer->merges);
    for (size_t i = 0; i < stbds_arrlenu(tokenizer->added); i++) free(tokenizer->added[i].decoded);
    stbds_arrfree(tokenizer->added);
    stbds_arrfree(tokenizer->name_of);
    stbds_arrfree(tokenizer->single);
    stbds_arrfree(tokenizer->pair);
    stbds_arrfree(tokenizer->rules);
    stbds_arrfree(tokenizer->scores);
    for (int32_t i = 0; i < EXI_TOK_STEPS; i++) {
        stbds_arrfree(tokenizer->normal[i].from);
        stbds_arrfree(tokenizer->normal[i].to);
        free(tokenizer->decode[i].from);
        free(tokenizer->decode[i].to);
    }
    free(tokenizer->charmap.units);
    free(tokenizer->charmap.texts);
    free(tokenizer->prefix);
    free(tokenizer);
}

EX_API bool exi_tok_refuse(const exi_tok_loader *l, const ex_json_node *node, const char *key, const char *supported)
{
    const char *value = ex_json_is(node, EX_JSON_STRING) ? node->as.text
                        : node != NULL                   ? ex_json_type_name(node->type)
                                                         : "nothing";
    return ex_fail(l->error, "%s:%u: %s is \"%s\", which is not supported; supported: %s", l->json.name,
                   node != NULL ? node->line : l->root->line, key, value, supported);
}

/* A member that may be absent or null, but nothing other than `type`. *node is NULL then. */
EX_API bool exi_tok_optional(const exi_tok_loader *l, const ex_json_node *object, const char *key, ex_json_type type,
                             const ex_json_node **node)
{
    *node = ex_json_get(object, key);
    if (*node == NULL || (*node)->type == type) return true;
    if ((*node)->type != EX_JSON_NULL) return ex_json_need(&l->json, object, key, type, l->error) != NULL;
    *node = NULL;
    return true;
}

/* ------------------------------------------------------------------------------------------------ vocabulary */

/* Records that a token has an id. Two tokens with one id: the first keeps the name. */
EX_API bool exi_tok_name(const exi_tok_loader *l, const char *token, size_t bytes, int64_t id, uint32_t line)
{
    ex_tokenizer *t = l->t;
    int64_t entry;
    if (id < 0 || id > EXI_TOK_MAX_ID) {
        return ex_fail(l->error, "%s:%u: token \"%s\" has id %lld, allowed are 0 to %d", l->json.name, line, token, (long long)id,
                       EXI_TOK_MAX_ID);
    }
    while ((int64_t)stbds_arrlenu(t->name_of) <= id) stbds_arrput(t->name_of, -1);
    ex_map_put(&t->names, token, bytes, (int32_t)id);
    entry = ex_map_find(&t->names, token, bytes);
    if (t->name_of[id] < 0) t->name_of[id] = (int32_t)entry;
    return true;
}

EX_API bool exi_tok_add_vocab(const exi_tok_loader *l, const char *token, size_t bytes, int64_t id, uint32_t line)
{
    if (!exi_tok_name(l, token, bytes, id, line)) return false;
    ex_map_put(&l->t->vocab, token, bytes, (int32_t)id);
    if (bytes > l->t->longest) l->t->longest = bytes;
    return true;
}

/* {"token": id, ...} */
EX_API bool exi_tok_vocab_object(const exi_tok_loader *l, const ex_json_node *vocab)
{
    const ex_json_node *name = ex_json_first(vocab);
    for (uint32_t i = 0; i < vocab->count; i++, name = ex_json_next(name + 1)) {
        int64_t id;
        if (!ex_json_int(name + 1, 0, EXI_TOK_MAX_ID, &id)) {
            return ex_fail(l->error, "%s:%u: token \"%s\" needs an id from 0 to %d, found %s", l->json.name, name->line,
                           name->as.text, EXI_TOK_MAX_ID, ex_json_type_name((name + 1)->type));
        }
        if (!exi_tok_add_vocab(l, name->as.text, name->count, id, name->line)) return false;
    }
    return vocab->count > 0 ? true : ex_fail(l->error, "%s:%u: the vocabulary is empty", l->json.name, vocab->line);
}

/* ------------------------------------------------------------------------------------------------ merges */

EX_API void exi_tok_add_rule(ex_tokenizer *t, const int32_t parts[2], int32_t product, int32_t rank)
{
    exi_tok_rule rule;
    rule.id = product;
    rule.rank = rank;
    ex_map_put(&t->merges, parts, 2 * sizeof(int32_t), (int32_t)stbds_arrlenu(t->rules));
    stbds_arrput(t->rules, rule);
}

/* Rank is the order. Both parts and their product must be tokens. */
EX_API bool exi_tok_add_merge(const exi_tok_loader *l, const char *left, size_t left_bytes, const char *right, size_t right_bytes,
                              uint32_t line)
{
    ex_tokenizer *t = l->t;
    char *product = (char *)ex_alloc(left_bytes + right_bytes + 1, 1);
    int32_t ids[2], merged;
    memcpy(product, left, left_bytes);
    memcpy(product + left_bytes, right, right_bytes);
    ids[0] = ex_map_get(&t->vocab, left, left_bytes, -1);
    ids[1] = ex_map_get(&t->vocab, right, right_bytes, -1);
    merged = ex_map_get(&t->vocab, product, left_bytes + right_bytes, -1);
    free(product);
    if (ids[0] < 0 || ids[1] < 0 || merged < 0) {
        return ex_fail(l->error, "%s:%u: merge \"%.*s %.*s\": %s is not in the vocabulary", l->json.name, line, (int)left_bytes,
                       left, (int)right_bytes, right,
                       ids[0] < 0   ? "its left part"
                       : ids[1] < 0 ? "its right part"
                                    : "its product");
    }
    exi_tok_add_rule(t, ids, merged, (int32_t)stbds_arrlenu(t->rules));
    return true;
}

/* "left right" */
EX_API bool exi_tok_merge_line(const exi_tok_loader *l, const char *text, size_t bytes, uint32_t line)
{
    const char *space = (const char *)memchr(text, ' ', bytes);
    const size_t left = space != NULL ? (size_t)(space - text) : 0;
    if (left == 0 || left + 1 >= bytes || memchr(space + 1, ' ', bytes - left - 1) != NULL) {
        return ex_fail(l->error, "%s:%u: expected a merge of two parts with one space between, found \"%.*s\"", l->json.name,
                       line, bytes < 80 ? (int)bytes : 80, text);
    }
    return exi_tok_add_merge(l, text, left, space + 1, bytes - left - 1, line);
}

/* Both spellings: ["a b", ...] and [["a", "b"], ...] */
EX_API bool exi_tok_merges(const exi_tok_loader *l, const ex_json_node *merges)
{
    const ex_json_node *node = ex_json_first(merges);
    for (uint32_t i = 0; i < merges->count; i++, node = ex_json_next(node)) {
        if (node->type == EX_JSON_STRING) {
            if (!exi_tok_merge_line(l, node->as.text, node->count, node->line)) return false;
        } else if (node->type == EX_JSON_ARRAY && node->count == 2 && ex_json_is(node + 1, EX_JSON_STRING) &&
                   ex_json_is(node + 2, EX_JSON_STRING)) {
            if (!exi_tok_add_merge(l, node[1].as.text, node[1].count, node[2].as.text, node[2].count, node->line)) return false;
        } else {
            return ex_fail(l->error, "%s:%u: expected a merge (\"a b\" or [\"a\", \"b\"]), found %s", l->json.name, node->line,
                           ex_json_type_name(node->type));
        }
    }
    return true;
}

/* May words be cut before `code`? It must be a token, so that nothing unknown goes on across it, and no product of a merge may
   have it behind another character. */
EX_API bool exi_tok_is_boundary(const ex_tokenizer *t, uint32_t code)
{
    char name[4];
    const size_t length = ex_utf8_encode(code, name);
    if (ex_map_find(&t->vocab, name, length) < 0) return false;
    for (size_t i = 0; i < stbds_arrlenu(t->rules); i++) {
        const ex_map_entry *entry = &t->names.entries[t->name_of[t->rules[i].id]];
        const char *product = t->names.keys + entry->key;
        for (size_t at = 0, behind = 0; at < entry->bytes;) {
            uint32_t one;
            at += ex_utf8_decode(product + at, entry->bytes - at, &one, NULL);
            if (one == code && behind) return false;
            behind = behind || one != code;
        }
    }
    return true;
}

EX_API void exi_tok_find_boundary(ex_tokenizer *t)
{
    if (t->model != EXI_TOK_BPE || t->byte_level || t->ignore_merges) return;
    t->boundary = exi_tok_is_boundary(t, 0x2581) ? 0x2581 : exi_tok_is_boundary(t, ' ') ? ' ' : 0;
}

/* The token of each byte: its letter, or its name ("<0x41>"). */
EX_API void exi_tok_byte_ids(ex_tokenizer *t)
{
    for (int b = 0; b < 256; b++) {
        char name[8];
        const size_t length = t->byte_level ? ex_utf8_encode(exi_tok_byte_letter((unsigned char)b), name)
                                            : (size_t)snprintf(name, sizeof(name), "<0x%02X>", (unsigned)b);
        t->byte_id[b] = ex_map_get(&t->vocab, name, length, -1);
    }
}

/* ------------------------------------------------------------------------------------------------ added tokens */

EX_API bool exi_tok_add_added(const exi_tok_loader *l, const char *content, size_t bytes, const exi_tok_added *added,
                              uint32_t line)
{
    ex_tokenizer *t = l->t;
    const int32_t known = ex_map_get(&t->vocab, content, bytes, -1);
    if (bytes == 0) return true;                           /* the reference ignores them too */
    if (bytes > EXI_TOK_MAX_ADDED)
        return ex_fail(l->error, "%s:%u: an added token of %zu bytes, at most %d are supported", l->json.name, line, bytes,
                       EXI_TOK_MAX_ADDED);
    if (known >= 0 && known != added->id) {
        return ex_fail(l->error, "%s:%u: added token \"%s\" has id %d, but %d in the vocabulary", l->json.name, line, content,
                       added->id, known);
    }
    ex_map_put(&t->specials, content, bytes, (int32_t)stbds_arrlenu(t->added));
    stbds_arrput(t->added, *added);
    return exi_tok_name(l, content, bytes, added->id, line);
}

/* Decoding writes an added token as the normalizer leaves it ("foo bar" for "Foo Bar"). */
EX_API char *exi_tok_spell(const exi_tok_char *chars)
{
    ex_text text = {NULL, 0, 0};
    ex_text_put(&text, "");
    for (size_t i = 0; i < stbds_arrlenu(chars); i++) {
        char bytes[4];
        ex_text_add(&text, bytes, ex_utf8_encode(chars[i].code, bytes));
    }
    return text.at;
}

/* After the normalizer is known: puts every added token into the tree of its kind. */
EX_API void exi_tok_build_tries(ex_tokenizer *t)
{
    exi_tok_work work;
    memset(&work, 0, sizeof(work));
    for (size_t i = 0; i < ex_map_count(&t->specials); i++) {
        const ex_map_entry *entry = &t->specials.entries[i];
        const char *content = ex_map_key(&t->specials, i);
        const bool normalized = t->added[entry->value].normalized;
        exi_tok_char *chars;
        stbds_arrsetlen(work.raw, 0);
        exi_tok_characters(&work.raw, content, entry->bytes);
        if (normalized) exi_tok_normalise(t, &work, work.raw, stbds_arrlenu(work.raw));
        if (normalized && t->normals > 0) t->added[entry->value].decoded = exi_tok_spell(work.normal);
        chars = normalized ? work.normal : work.raw;
        if (stbds_arrlenu(chars) == 0) continue;
        exi_tok_trie_add(normalized ? &t->normalized : &t->raw, chars, stbds_arrlenu(chars), entry->value);
    }
    stbds_arrfree(work.raw);
    stbds_arrfree(work.normal);
    stbds_arrfree(work.parts);
    stbds_arrfree(work.clean);
    stbds_arrfree(work.marks);
}

EX_API void exi_tok_added_flags(const ex_json_node *object, exi_tok_added *added)
{
    memset(added, 0, sizeof(*added));
    added->special = ex_json_bool(object, "special", false);
    added->single_word = ex_json_bool(object, "single_word", false);
    added->lstrip = ex_json_bool(object, "lstrip", false);
    added->rstrip = ex_json_bool(object, "rstrip", false);
    added->normalized = ex_json_bool(object, "normalized", !added->special);
}

EX_API bool exi_tok_added_list(const exi_tok_loader *l)
{
    const ex_json_node *list, *node;
    if (!exi_tok_optional(l, l->root, "added_tokens", EX_JSON_ARRAY, &list)) return false;
    node = list != NULL ? ex_json_first(list) : NULL;
    for (uint32_t i = 0; list != NULL && i < list->count; i++, node = ex_json_next(node)) {
        const ex_json_node *content;
        exi_tok_added added;
        int64_t id;
        if (node->type != EX_JSON_OBJECT)
            return ex_fail(l->error, "%s:%u: expected an added token, found %s", l->json.name, node->line,
                           ex_json_type_name(node->type));
        content = ex_json_need(&l->json, node, "content", EX_JSON_STRING, l->error);
        if (content == NULL) return false;
        if (!ex_json_int(ex_json_get(node, "id"), 0, EXI_TOK_MAX_ID, &id)) {
            return ex_fail(l->error, "%s:%u: added token \"%s\" needs an id from 0 to %d", l->json.name, node->line,
                           content->as.text, EXI_TOK_MAX_ID);
        }
        exi_tok_added_flags(node, &added);
        added.id = (int32_t)id;
        if (!exi_tok_add_added(l, content->as.text, content->count, &added, node->line)) return false;
    }
    return true;
}

#include "ex_tokenizer_parts.h"

/* ------------------------------------------------------------------------------------------------ models of tokenizer.json */

EX_API bool exi_tok_set_prefix(const exi_tok_loader *l, const char *prefix)
{
    free(l->t->prefix);
    l->t->prefix = ex_format("%s", prefix);
    l->t->prefix_bytes = strlen(prefix);
    if (l->t->prefix_bytes <= 64) return true;
    return ex_fail(l->error, "%s: \"continuing_subword_prefix\" has %zu bytes, at most 64 are supported", l->json.name,
                   l->t->prefix_bytes);
}

EX_API bool exi_tok_need_unk(const exi_tok_loader *l, const char *unk)
{
    l->t->unk_id = ex_map_get(&l->t->vocab, unk, strlen(unk), -1);
    return l->t->unk_id >= 0 ? true
                             : ex_fail(l->error, "%s: the unknown token \"%s\" is not in the vocabulary", l->json.name, unk);
}

EX_API bool exi_tok_wordpiece_model(const exi_tok_loader *l, const ex_json_node *model)
{
    const ex_json_node *vocab = ex_json_need(&l->json, model, "vocab", EX_JSON_OBJECT, l->error), *most;
    if (vocab == NULL || !exi_tok_vocab_object(l, vocab)) return false;
    l->t->max_word = 100;
    if (!exi_tok_optional(l, model, "max_input_chars_per_word", EX_JSON_NUMBER, &most)) return false;
    if (most != NULL && !ex_json_int(most, 0, INT32_MAX, &l->t->max_word)) {
        return ex_fail(l->error, "%s:%u: \"max_input_chars_per_word\" must be a whole number", l->json.name, most->line);
    }
    return exi_tok_set_prefix(l, ex_json_text(model, "continuing_subword_prefix", "##")) &&
           exi_tok_need_unk(l, ex_json_text(model, "unk_token", "[UNK]"));
}

EX_API bool exi_tok_bpe_model(const exi_tok_loader *l, const ex_json_node *model)
{
    static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const ex_json_node *vocab = ex_json_need(&l->json, model, "vocab", EX_JSON_OBJECT, l->error);
    const ex_json_node *merges = ex_json_need(&l->json, model, "merges", EX_JSON_ARRAY, l->error);
    const ex_json_node *dropout = ex_json_get(model, "dropout"), *unk;
    if (vocab == NULL || merges == NULL || !exi_tok_optional(l, model, "unk_token", EX_JSON_STRING, &unk)) return false;
    for (int i = 0; i < 2; i++) {
        const ex_json_node *node = ex_json_get(model, empty[i]);
        if (ex_json_is(node, EX_JSON_STRING) && node->count > 0) return exi_tok_refuse(l, node, empty[i], "null, \"\"");
    }
    if (ex_json_is(dropout, EX_JSON_NUMBER) && dropout->as.number > 0)
        return exi_tok_refuse(l, dropout, "\"dropout\" of \"model\"", "null, 0");
    l->t->fuse_unk = ex_json_bool(model, "fuse_unk", false);
    l->t->ignore_merges = ex_json_bool(model, "ignore_merges", false);
    l->t->byte_fallback = ex_json_bool(model, "byte_fallback", false);
    if (!exi_tok_vocab_object(l, vocab) || !exi_tok_merges(l, merges)) return false;
    return unk == NULL || exi_tok_need_unk(l, unk->as.text);
}

/* [["token", score], ...]: the place is the id. */
EX_API bool exi_tok_unigram_vocab(const exi_tok_loader *l, const ex_json_node *vocab)
{
    const ex_json_node *node = ex_json_first(vocab);
    exi_tok_char *chars = NULL;
    bool fine = true;
    for (uint32_t i = 0; fine && i < vocab->count; i++, node = ex_json_next(node)) {
        if (node->type != EX_JSON_ARRAY || node->count != 2 || node[1].type != EX_JSON_STRING || node[2].type != EX_JSON_NUMBER) {
            fine = ex_fail(l->error, "%s:%u: expected a token as [text, score], found %s", l->json.name, node->line,
                           ex_json_type_name(node->type));
            break;
        }
        fine = exi_tok_add_vocab(l, node[1].as.text, node[1].count, i, node->line);
        stbds_arrput(l->t->scores, node[2].as.number);
        if (i == 0 || node[2].as.number < l->t->unk_score) l->t->unk_score = node[2].as.number;
        stbds_arrsetlen(chars, 0);
        exi_tok_characters(&chars, node[1].as.text, node[1].count);
        if (stbds_arrlenu(chars) > 0) exi_tok_trie_add(&l->t->pieces, chars, stbds_arrlenu(chars), (int32_t)i);
    }
    l->t->unk_score -= 10;            /* as SentencePiece has it */
    stbds_arrfree(chars);
    return fine;
}

EX_API bool exi_tok_unigram_model(const exi_tok_loader *l, const ex_json_node *model)
{
    const ex_json_node *vocab = ex_json_need(&l->json, model, "vocab", EX_JSON_ARRAY, l->error), *unk;
    int64_t id;
    if (vocab == NULL) return false;
    unk = ex_json_get(model, "unk_id");
    if (!ex_json_int(unk, 0, (int64_t)vocab->count - 1, &id)) {
        return ex_fail(l->error, "%s:%u: \"unk_id\" of \"model\" must be the id of one of its %u tokens", l->json.name,
                       unk != NULL ? unk->line : model->line, vocab->count);
    }
    l->t->unk_id = (int32_t)id;
    l->t->byte_fallback = ex_json_bool(model, "byte_fallback", false);
    return exi_tok_unigram_vocab(l, vocab);
}

/* Older files do not name the type of the model. */
EX_API bool exi_tok_model_part(const exi_tok_loader *l)
{
    const ex_json_node *model = ex_json_need(&l->json, l->root, "model", EX_JSON_OBJECT, l->error), *type;
    if (model == NULL) return false;
    type = ex_json_get(model, "type");
    if (type == NULL ? ex_json_get(model, "merges") != NULL : ex_json_equals(type, "BPE")) {
        l->t->model = EXI_TOK_BPE;
        return exi_tok_bpe_model(l, model);
    }
    if (type == NULL ? ex_json_get(model, "max_input_chars_per_word") != NULL : ex_json_equals(type, "WordPiece")) {
        l->t->model = EXI_TOK_WORDPIECE;
        return exi_tok_wordpiece_model(l, model);
    }
    if (type == NULL ? ex_json_get(model, "unk_id") != NULL : ex_json_equals(type, "Unigram")) {
        l->t->model = EXI_TOK_UNIGRAM;
        return exi_tok_unigram_model(l, model);
    }
    return exi_tok_refuse(l, type != NULL ? type : model, "\"type\" of \"model\"", "WordPiece, BPE, Unigram");
}

EX_API bool exi_tok_read_tokenizer_json(exi_tok_loader *l)
{
    const ex_json_node *processor;
    exi_tok_plain_form(l->t);
    if (!exi_tok_model_part(l) || !exi_tok_pre_tokenizer(l) || !exi_tok_normalizer(l) || !exi_tok_added_list(l)) return false;
    if (l->t->byte_level && l->t->byte_fallback)
        return ex_fail(l->error, "%s: \"byte_fallback\" of \"model\" is not supported with the pre-tokenizer ByteLevel",
                       l->json.name);
    exi_tok_byte_ids(l->t);
    if (!exi_tok_optional(l, l->root, "post_processor", EX_JSON_OBJECT, &processor)) return false;
    return (processor == NULL || exi_tok_processor(l, processor, 0)) && exi_tok_decoder_part(l);
}

/* ------------------------------------------------------------------------------------------------ tokenizer_config.json */

/* A special token there is a string or an object with "content". */
EX_API const char *exi_tok_config_token(const ex_json_node *config, const char *key)
{
    const ex_json_node *node = ex_json_get(config, key);
    if (ex_json_is(node, EX_JSON_STRING)) return node->as.text;
    return ex_json_text(node, "content", NULL);
}

/* Ids of [CLS], [SEP], ...: by the configuration if there is one, else by the usual names. */
EX_API void exi_tok_find_specials(ex_tokenizer *t, const ex_json_node *config)
{
    static const char *const keys[EX_SPECIALS] = {"cls_token",  "sep_token", "pad_token", "mask_token",
                                                  "unk_token", "bos_token", "eos_token"};
    static const char *const usual[EX_SPECIALS][3] = {
        {"[CLS]", "<s>", ""}, {"[SEP]", "</s>", ""}, {"[PAD]", "<pad>", ""}, {"[MASK]", "<mask>", ""}, {"[UNK]", "<unk>", ""},
        {"<s>", "<|begin_of_text|>", ""}, {"</s>", "<|end_of_text|>", "<|endoftext|>"}
    };
    for (int i = 0; i < EX_SPECIALS; i++) {
        const char *name = exi_tok_config_token(config, keys[i]);
        t->special[i] = name != NULL ? ex_tokenizer_id(t, name) : -1;
        for (int k = 0; k < 3 && t->special[i] < 0; k++) t->special[i] = ex_tokenizer_id(t, usual[i][k]);
    }
}

/* "added_tokens_decoder": {"0": {"content": "<s>", "lstrip": false, ...}, ...} */
EX_API bool exi_tok_config_added(const exi_tok_loader *l, const ex_json_node *config)
{
    const ex_json_node *list = ex_json_get(config, "added_tokens_decoder"), *name;
    name = ex_json_is(list, EX_JSON_OBJECT) ? ex_json_first(list) : NULL;
    for (uint32_t i = 0; name != NULL && i < list->count; i++, name = ex_json_next(name + 1)) {
        const ex_json_node *content = ex_json_get(name + 1, "content");
        exi_tok_added added;
        char *end;
        const long id = strtol(name->as.text, &end, 10);
        if (!ex_json_is(content, EX_JSON_STRING) || *end != 0 || id < 0 || id > EXI_TOK_MAX_ID) continue;
        exi_tok_added_flags(name + 1, &added);
        added.id = (int32_t)id;
        if (!exi_tok_add_added(l, content->as.text, content->count, &added, name->line)) return false;
    }
    return true;
}

/* A special token that the model has always had, unless the configuration has named it already. */
EX_API bool exi_tok_add_usual(const exi_tok_loader *l, const char *content, bool lstrip)
{
    const int32_t id = ex_map_get(&l->t->vocab, content, strlen(content), -1);
    exi_tok_added added;
    if (id < 0 || ex_map_find(&l->t->specials, content, strlen(content)) >= 0) return true;
    memset(&added, 0, sizeof(added));
    added.id = id;
    added.lstrip = lstrip;
    added.special = true;
    return exi_tok_add_added(l, content, strlen(content), &added, 0);
}

/* ------------------------------------------------------------------------------------------------ vocab.txt */

EX_API size_t exi_tok_trim_end(const char *line, size_t bytes)
{
    while (bytes > 0) {
        uint32_t code;
        const size_t start = ex_utf8_last(line, bytes, &code);
        if (!ex_is_space(code)) break;
        bytes = start;
    }
    return bytes;
}

typedef bool (*exi_tok_line)(const exi_tok_loader *l, const char *text, size_t bytes, uint32_t line);

/* Calls `each` for every line. */
EX_API bool exi_tok_lines(exi_tok_loader *l, const char *path, exi_tok_line each)
{
    size_t bytes, at = 0;
    int64_t replaced;
    uint32_t line = 1;
    bool fine = true;
    char *text = ex_read_file(path, &bytes, l->error);
    if (text == NULL) return false;
    text = ex_utf8_repair(text, &bytes, &replaced);
    l->json.name = path;
    for (; fine && at < bytes; line++) {
        const char *end = (const char *)memchr(text + at, '\n', bytes - at);
        const size_t next = end != NULL ? (size_t)(end - text) : bytes;
        fine = each(l, text + at, next - at - (next > at && text[next - 1] == '\r'), line);
        at = next + 1;
    }
    free(text);
    return fine;
}

EX_API bool exi_tok_vocab_line(const exi_tok_loader *l, const char *text, size_t bytes, uint32_t line)
{
    const size_t trimmed = exi_tok_trim_end(text, bytes);
    char *token = ex_copy(text, trimmed);
    const bool fine = exi_tok_add_vocab(l, token, trimmed, (int64_t)line - 1, line);
    free(token);
    return fine;
}

EX_API bool exi_tok_read_vocab_txt(exi_tok_loader *l, const char *path, const ex_json_node *config)
{
    static const char *const keys[] = {"pad_token", "unk_token", "cls_token", "sep_token", "mask_token"};
    static const char *const usual[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};
    const char *names[5];
    ex_tokenizer *t = l->t;
    if (!exi_tok_lines(l, path, exi_tok_vocab_line)) return false;
    t->model = EXI_TOK_WORDPIECE;
    t->max_word = 100;
    exi_tok_bert_step(&t->normal[t->normals++], config, "tokenize_chinese_chars", "do_lower_case");
    t->normal[0].clean_text = true;   /* a configuration cannot switch this off */
    t->split[t->splits++].kind = EXI_TOK_SPLIT_BERT;
    exi_tok_add_decode(t, EXI_TOK_DECODE_WORDPIECE, "##", NULL)->cleanup = true;
    if (!exi_tok_config_added(l, config)) return false;
    for (int i = 0; i < 5; i++) {
        const char *named = exi_tok_config_token(config, keys[i]);
        names[i] = named != NULL ? named : usual[i];
        if (!exi_tok_add_usual(l, names[i], false)) return false;
    }
    if (!exi_tok_set_prefix(l, "##") || !exi_tok_need_unk(l, names[1])) return false;
    if (ex_tokenizer_id(t, names[2]) < 0 || ex_tokenizer_id(t, names[3]) < 0) {
        return ex_fail(l->error, "%s: \"%s\" or \"%s\" is not in the vocabulary", path, names[2], names[3]);
    }
    exi_tok_model_form(t, ex_tokenizer_id(t, names[2]), ex_tokenizer_id(t, names[3]), false);
    return true;
}

/* ------------------------------------------------------------------------------------------------ vocab.json, merges.txt */

EX_API bool exi_tok_merges_line(const exi_tok_loader *l, const char *text, size_t bytes, uint32_t line)
{
    if (bytes == 0 || (bytes >= 8 && memcmp(text, "#version", 8) == 0)) return true;
    return exi_tok_merge_line(l, text, bytes, line);
}

/* RoBERTa when the vocabulary has <s> and </s>, else GPT-2, which adds no special tokens. */
EX_API bool exi_tok_read_vocab_json(exi_tok_loader *l, const char *merges, const ex_json_node *config)
{
    static const char *const usual[] = {"<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"};
    ex_tokenizer *t = l->t;
    int32_t cls = -1, sep = -1;
    t->model = EXI_TOK_BPE;
    t->byte_level = t->trim_offsets = true;
    t->split[0].kind = EXI_TOK_SPLIT_GPT2;
    t->split[0].space = ' ';
    t->split[t->splits++].prefix = ex_json_bool(config, "add_prefix_space", false) ? EXI_TOK_ALWAYS : EXI_TOK_NEVER;
    exi_tok_add_decode(t, EXI_TOK_DECODE_BYTES, NULL, NULL);
    if (l->root->type != EX_JSON_OBJECT)
        return ex_fail(l->error, "%s:1: expected an object, found %s", l->json.name, ex_json_type_name(l->root->type));
    if (!exi_tok_vocab_object(l, l->root) || !exi_tok_lines(l, merges, exi_tok_merges_line)) return false;
    exi_tok_byte_ids(t);
    if (!exi_tok_config_added(l, config)) return false;
    for (int i = 0; i < 6; i++) {
        if (!exi_tok_add_usual(l, usual[i], strcmp(usual[i], "<mask>") == 0)) return false;
    }
    cls = ex_tokenizer_id(t, "<s>");
    sep = ex_tokenizer_id(t, "</s>");
    if (cls >= 0 && sep >= 0) exi_tok_model_form(t, cls, sep, true);
    else exi_tok_plain_form(t);
    return true;
}

/* ------------------------------------------------------------------------------------------------ llama2.c's tokenizer.bin */

#define EXI_TOK_BIN_BYTES 3           /* id of the token of byte 0; before it stand unknown, begin and end */

EX_API uint32_t exi_tok_u32(const char *at)
{
    const unsigned char *b = (const unsigned char *)at;
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* int32 bytes of the longest token; then for each token: float32 score, int32 bytes, its text. The number of tokens is not
   there: they end with the file. */
EX_API bool exi_tok_bin_tokens(const exi_tok_loader *l, const char *path, const char *file, size_t bytes)
{
    size_t at = 4;
    for (int64_t id = 0; at < bytes; id++) {
        const uint32_t bits = bytes - at >= 8 ? exi_tok_u32(file + at) : 0;
        const uint32_t length = bytes - at >= 8 ? exi_tok_u32(file + at + 4) : 0;
        float score;
        char *token;
        bool fine;
        memcpy(&score, &bits, sizeof(score));
        if (bytes - at < 8 || length > bytes - at - 8 || length > exi_tok_u32(file) || !ex_finite((double)score)) {
            return ex_fail(l->error, "%s: token %lld at byte %zu: expected a finite score and at most %u bytes, found %u of %zu",
                           path, (long long)id, at, exi_tok_u32(file), length, bytes - at);
        }
        if (ex_utf8_valid_prefix(file + at + 8, length) != length)
            return ex_fail(l->error, "%s: token %lld at byte %zu is no UTF-8", path, (long long)id, at);
        token = ex_copy(file + at + 8, length);
        fine = exi_tok_add_vocab(l, token, length, id, 0);
        free(token);
        if (!fine) return false;
        stbds_arrput(l->t->scores, (double)score);
        at += 8 + length;
    }
    return true;
}

typedef struct exi_tok_scored { double score; int32_t id; } exi_tok_scored;

EX_API int exi_compare_scored(const void *a, const void *b)
{
    const exi_tok_scored *x = (const exi_tok_scored *)a, *y = (const exi_tok_scored *)b;
    return x->score > y->score ? -1 : x->score < y->score ? 1 : x->id < y->id ? -1 : x->id > y->id;
}

/* Any two tokens that make a third are merged, those first whose product has the highest score; equal scores, equal rank. */
EX_API void exi_tok_bin_merges(ex_tokenizer *t)
{
    const size_t count = stbds_arrlenu(t->scores);
    exi_tok_scored *order = (exi_tok_scored *)ex_alloc(count, sizeof(exi_tok_scored));
    int32_t rank = 0;
    for (size_t i = 0; i < count; i++) {
        order[i].score = t->scores[i];
        order[i].id = (int32_t)i;
    }
    qsort(order, count, sizeof(exi_tok_scored), exi_compare_scored);
    for (size_t i = 0; i < count; i++) {
        const ex_map_entry *entry = &t->names.entries[t->name_of[order[i].id]];
        rank += i > 0 && order[i].score < order[i - 1].score;
        for (uint32_t cut = 1; cut < entry->bytes; cut++) {
            const char *text = t->names.keys + entry->key;
            int32_t parts[2];
            parts[0] = ex_map_get(&t->vocab, text, cut, -1);
            parts[1] = ex_map_get(&t->vocab, text + cut, entry->bytes - cut, -1);
            if (parts[0] >= 0 && parts[1] >= 0) exi_tok_add_rule(t, parts, order[i].id, rank);
        }
    }
    free(order);
}

/* The begin and the end of a text are left out of what is decoded; they are never found in a text. */
EX_API void exi_tok_bin_specials(ex_tokenizer *t)
{
    for (int32_t id = 0; id < EXI_TOK_BIN_BYTES; id++) {
        const ex_map_entry *entry = &t->names.entries[t->name_of[id]];
        exi_tok_added added;
        memset(&added, 0, sizeof(added));
        added.id = id;
        added.special = true;
        ex_map_put(&t->specials, t->names.keys + entry->key, entry->bytes, (int32_t)stbds_arrlenu(t->added));
        stbds_arrput(t->added, added);
    }
    for (int i = 0; i < EX_SPECIALS; i++) t->special[i] = -1;
    t->special[EX_UNK] = 0;
    t->special[EX_BOS] = 1;
    t->special[EX_EOS] = 2;
    for (int i = 0; i < 2; i++) {
        exi_tok_piece **form = i == 0 ? &t->single : &t->pair;
        for (int8_t sequence = 0; sequence <= i; sequence++) {
            exi_tok_add_piece(form, 1, 0, 0);
            exi_tok_add_piece(form, -1, 0, sequence);
        }
    }
}

EX_API bool exi_tok_bin(exi_tok_loader *l, const char *path, const char *file, size_t bytes)
{
    ex_tokenizer *t = l->t;
    exi_tok_normal_step *prepend = &t->normal[t->normals++];
    if (bytes < 4 || exi_tok_u32(file) > EXI_TOK_MAX_ADDED) {
        return ex_fail(l->error, "%s: expected a tokenizer of llama2.c with tokens of at most %d bytes", path, EXI_TOK_MAX_ADDED);
    }
    if (!exi_tok_bin_tokens(l, path, file, bytes)) return false;
    t->model = EXI_TOK_BPE;
    t->byte_fallback = true;
    exi_tok_byte_ids(t);
    for (int b = 0; b < 256; b++) {
        if (t->byte_id[b] != EXI_TOK_BIN_BYTES + b)
            return ex_fail(l->error, "%s: expected token %d to be \"<0x%02X>\", %s", path, EXI_TOK_BIN_BYTES + b, (unsigned)b,
                           t->byte_id[b] < 0 ? "but there is no such token" : "but it stands in another place");
    }
    exi_tok_bin_merges(t);
    exi_tok_bin_specials(t);
    l->complete = true;
    prepend->kind = EXI_TOK_NORMAL_PREPEND;
    prepend->to = exi_tok_codes(" ");
    exi_tok_add_decode(t, EXI_TOK_DECODE_FALLBACK, NULL, NULL);
    exi_tok_add_decode(t, EXI_TOK_DECODE_FUSE, NULL, NULL);
    exi_tok_add_decode(t, EXI_TOK_DECODE_STRIP, " ", NULL)->start = 1;
    return true;
}

EX_API bool exi_tok_read_bin(exi_tok_loader *l, const char *path)
{
    size_t bytes = 0;
    char *file = ex_read_file(path, &bytes, l->error);
    const bool fine = file != NULL && exi_tok_bin(l, path, file, bytes);
    free(file);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ load */

EX_API bool exi_tok_load_json(exi_tok_loader *l, const char *path)
{
    if (!ex_json_read(&l->json, path, l->error)) return false;
    l->root = ex_json_root(&l->json);
    return l->root->type == EX_JSON_OBJECT
               ? true
               : ex_fail(l->error, "%s:1: expected an object, found %s", path, ex_json_type_name(l->root->type));
}

typedef struct exi_tok_paths { char *json, *text, *vocab, *merges, *binary, *config; } exi_tok_paths;

/* Picks what there is. */
EX_API bool exi_tok_load_found(exi_tok_loader *l, const exi_tok_paths *paths, const char *shown, const ex_json_node *config)
{
    if (paths->json != NULL && ex_file_exists(paths->json))
        return exi_tok_load_json(l, paths->json) && exi_tok_read_tokenizer_json(l);
    if (paths->text != NULL && ex_file_exists(paths->text)) return exi_tok_read_vocab_txt(l, paths->text, config);
    if (paths->vocab != NULL && ex_file_exists(paths->vocab) && ex_file_exists(paths->merges)) {
        return exi_tok_load_json(l, paths->vocab) && exi_tok_read_vocab_json(l, paths->merges, config);
    }
    if (paths->binary != NULL && ex_file_exists(paths->binary)) return exi_tok_read_bin(l, paths->binary);
    return ex_fail(l->error,
                   "%s: no tokenizer found; expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt, or "
                   "tokenizer.bin",
                   shown);
}

EX_API void exi_tok_find_paths(exi_tok_paths *paths, const char *path)
{
    const size_t length = strlen(path);
    memset(paths, 0, sizeof(*paths));
    if (ex_is_directory(path)) {
        paths->json = ex_path(path, "tokenizer.json");
        paths->text = ex_path(path, "vocab.txt");
        paths->vocab = ex_path(path, "vocab.json");
        paths->merges = ex_path(path, "merges.txt");
        paths->binary = ex_path(path, "tokenizer.bin");
        paths->config = ex_path(path, "tokenizer_config.json");
    } else if (length > 4 && strcmp(path + length - 4, ".txt") == 0) {
        paths->text = ex_copy(path, length);
    } else if (length > 4 && strcmp(path + length - 4, ".bin") == 0) {
        paths->binary = ex_copy(path, length);
    } else {
        paths->json = ex_copy(path, length);
    }
}

/* path: a model folder, a tokenizer.json, a vocab.txt, or a tokenizer of llama2.c (*.bin). NULL on failure. Free with
   ex_tokenizer_free. */
EX_API ex_tokenizer *ex_tokenizer_load(const char *path, ex_error *error)
{
    exi_tok_loader l;
    exi_tok_paths paths;
    ex_json config;
    bool fine = true;
    memset(&l, 0, sizeof(l));
    memset(&config, 0, sizeof(config));
    l.error = error;
    l.t = (ex_tokenizer *)ex_alloc(1, sizeof(ex_tokenizer));
    l.t->unk_id = -1;
    exi_tok_find_paths(&paths, path);
    if (paths.config != NULL && ex_file_exists(paths.config)) fine = ex_json_read(&config, paths.config, error);
    fine = fine && exi_tok_load_found(&l, &paths, path, ex_json_root(&config));
    if (fine) exi_tok_find_boundary(l.t);
    if (fine && !l.complete) {
        exi_tok_find_specials(l.t, ex_json_root(&config));
        exi_tok_build_tries(l.t);
    }
    ex_json_free(&config);
    ex_json_free(&l.json);
    free(paths.json);
    free(paths.text);
    free(paths.vocab);
    free(paths.merges);
    free(paths.binary);
    free(paths.config);
    if (fine) return l.t;
    ex_tokenizer_free(l.t);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------ copy */

/* Where a tokenizer that ex_tokenizer_load can read keeps what a folder calls `name`; free(). NULL: nowhere. */
EX_API char *exi_tokenizer_part(const char *from, const char *name)
{
    if (from == NULL || ex_is_directory(from)) return from != NULL ? ex_path(from, name) : NULL;
    const char *own = exi_ends_with(from, ".txt")   ? "vocab.txt"
                      : exi_ends_with(from, ".bin") ? "tokenizer.bin"
                                                    : "tokenizer.json";
    return strcmp(name, own) == 0 ? ex_copy(from, strlen(from)) : NULL;
}

/* The tokenizer's files, byte for byte; what `to` holds of an earlier one and `from` has not goes. from: a folder, one file, or
   NULL. */
EX_API bool ex_copy_tokenizer(const char *from, const char *to, ex_error *error)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt",
                                        "tokenizer.bin", "special_tokens_map.json", "added_tokens.json"};
    bool fine = true;
    for (size_t i = 0; fine && i < sizeof(names) / sizeof(names[0]); i++) {
        char *source = exi_tokenizer_part(from, names[i]), *target = ex_path(to, names[i]), *text = NULL;
        size_t bytes = 0;
        if (source == NULL || !ex_file_exists(source)) fine = ex_remove_file(target, error);
        else fine = (text = ex_read_file(source, &bytes, error)) != NULL && ex_write_file(target, text, bytes, error);
        free(source);
        free(target);
        free(text);
    }
    return fine;
}

#endif /* EX_TOKENIZER_LOAD_H */
