/* ex_tokenizer_parts.h - the part of ex_tokenizer_load.h that reads what stands around the model in a tokenizer.json: the
   template, the normalizer, the pre-tokenizer, the decoder. */
#ifndef EX_TOKENIZER_PARTS_H
#define EX_TOKENIZER_PARTS_H

#define EXI_TOK_MAX_MAPPED 256        /* bytes that the character map puts in the place of a character */

/* ------------------------------------------------------------------------------------------------ templates */

EX_API void exi_tok_add_piece(exi_tok_piece **form, int32_t id, int32_t type, int8_t sequence)
{
    exi_tok_piece piece;
    piece.id = id;
    piece.type = type;
    piece.sequence = sequence;
    stbds_arrput(*form, piece);
}

/* A alone; A of type 0 and B of type 1. */
EX_API void exi_tok_plain_form(ex_tokenizer *t)
{
    stbds_arrsetlen(t->single, 0);
    stbds_arrsetlen(t->pair, 0);
    exi_tok_add_piece(&t->single, -1, 0, 0);
    exi_tok_add_piece(&t->pair, -1, 0, 0);
    exi_tok_add_piece(&t->pair, -1, 1, 1);
}

/* [CLS] A [SEP] and [CLS] A [SEP] B [SEP]; RoBERTa: <s> A </s> </s> B </s>, all of type 0. */
EX_API void exi_tok_model_form(ex_tokenizer *t, int32_t cls, int32_t sep, bool roberta)
{
    const int32_t second = roberta ? 0 : 1;
    stbds_arrsetlen(t->single, 0);
    stbds_arrsetlen(t->pair, 0);
    for (int i = 0; i < 2; i++) {
        exi_tok_piece **form = i == 0 ? &t->single : &t->pair;
        exi_tok_add_piece(form, cls, 0, 0);
        exi_tok_add_piece(form, -1, 0, 0);
        exi_tok_add_piece(form, sep, 0, 0);
    }
    if (roberta) exi_tok_add_piece(&t->pair, sep, 0, 0);
    exi_tok_add_piece(&t->pair, -1, second, 1);
    exi_tok_add_piece(&t->pair, sep, second, 0);
}

/* ["[SEP]", 102] under key */
EX_API bool exi_tok_processor_token(const exi_tok_loader *l, const ex_json_node *processor, const char *key, int32_t *id)
{
    const ex_json_node *node = ex_json_need(&l->json, processor, key, EX_JSON_ARRAY, l->error);
    int64_t value;
    if (node == NULL) return false;
    if (node->count != 2 || !ex_json_is(node + 1, EX_JSON_STRING) || !ex_json_int(node + 2, 0, EXI_TOK_MAX_ID, &value)) {
        return ex_fail(l->error, "%s:%u: expected \"%s\" as [token, id]", l->json.name, node->line, key);
    }
    *id = (int32_t)value;
    return true;
}

EX_API bool exi_tok_template_special(const exi_tok_loader *l, const ex_json_node *specials, const char *name, int32_t type,
                                     exi_tok_piece **form)
{
    const ex_json_node *entry = ex_json_need(&l->json, specials, name, EX_JSON_OBJECT, l->error), *ids, *node;
    if (entry == NULL) return false;
    ids = ex_json_need(&l->json, entry, "ids", EX_JSON_ARRAY, l->error);
    if (ids == NULL) return false;
    node = ex_json_first(ids);
    for (uint32_t i = 0; i < ids->count; i++, node = ex_json_next(node)) {
        int64_t id;
        if (!ex_json_int(node, 0, EXI_TOK_MAX_ID, &id))
            return ex_fail(l->error, "%s:%u: expected ids of \"%s\"", l->json.name, ids->line, name);
        exi_tok_add_piece(form, (int32_t)id, type, 0);
    }
    return true;
}

/* One place: {"Sequence": {"id": "A", "type_id": 0}} or {"SpecialToken": {...}} */
EX_API bool exi_tok_template_piece(const exi_tok_loader *l, const ex_json_node *node, const ex_json_node *specials, bool pair,
                                   exi_tok_piece **form)
{
    const ex_json_node *sequence = ex_json_get(node, "Sequence"), *special = ex_json_get(node, "SpecialToken");
    const ex_json_node *which = sequence != NULL ? sequence : special, *id = ex_json_get(which != NULL ? which : node, "id");
    int64_t type = 0;
    if (which == NULL || !ex_json_is(id, EX_JSON_STRING) || !ex_json_int(ex_json_get(which, "type_id"), 0, 1, &type)) {
        return ex_fail(l->error, "%s:%u: expected a \"Sequence\" or \"SpecialToken\" with an \"id\" and a \"type_id\" of 0 or 1",
                       l->json.name, node->line);
    }
    if (sequence == NULL) return exi_tok_template_special(l, specials, id->as.text, (int32_t)type, form);
    if (!ex_json_equals(id, "A") && !(pair && ex_json_equals(id, "B")))
        return exi_tok_refuse(l, id, "sequence of the template", pair ? "A, B" : "A");
    exi_tok_add_piece(form, -1, (int32_t)type, ex_json_equals(id, "B") ? 1 : 0);
    return true;
}

EX_API bool exi_tok_template(const exi_tok_loader *l, const ex_json_node *processor, const char *key, exi_tok_piece **form)
{
    const ex_json_node *list = ex_json_need(&l->json, processor, key, EX_JSON_ARRAY, l->error), *node;
    const ex_json_node *specials = ex_json_need(&l->json, processor, "special_tokens", EX_JSON_OBJECT, l->error);
    if (list == NULL || specials == NULL) return false;
    stbds_arrsetlen(*form, 0);
    node = ex_json_first(list);
    for (uint32_t i = 0; i < list->count; i++, node = ex_json_next(node)) {
        if (!exi_tok_template_piece(l, node, specials, strcmp(key, "pair") == 0, form)) return false;
    }
    return true;
}

/* depth: a Sequence may hold the others, but no Sequence. */
EX_API bool exi_tok_processor(const exi_tok_loader *l, const ex_json_node *processor, int depth)
{
    const ex_json_node *type = ex_json_get(processor, "type");
    int32_t cls = -1, sep = -1;
    if (ex_json_equals(type, "TemplateProcessing")) {
        return exi_tok_template(l, processor, "single", &l->t->single) && exi_tok_template(l, processor, "pair", &l->t->pair);
    }
    if (ex_json_equals(type, "ByteLevel")) {
        l->t->trim_offsets = ex_json_bool(processor, "trim_offsets", true);
        return true;
    }
    if (ex_json_equals(type, "BertProcessing") || ex_json_equals(type, "RobertaProcessing")) {
        const bool roberta = ex_json_equals(type, "RobertaProcessing");
        if (!exi_tok_processor_token(l, processor, "cls", &cls) || !exi_tok_processor_token(l, processor, "sep", &sep))
            return false;
        if (roberta) l->t->trim_offsets = ex_json_bool(processor, "trim_offsets", true);
        exi_tok_model_form(l->t, cls, sep, roberta);
        return true;
    }
    if (ex_json_equals(type, "Sequence") && depth == 0) {
        const ex_json_node *list = ex_json_need(&l->json, processor, "processors", EX_JSON_ARRAY, l->error), *node;
        if (list == NULL) return false;
        node = ex_json_first(list);
        for (uint32_t i = 0; i < list->count; i++, node = ex_json_next(node)) {
            if (!exi_tok_processor(l, node, 1)) return false;
        }
        return true;
    }
    return exi_tok_refuse(l, type != NULL ? type : processor, "\"type\" of \"post_processor\"",
                          "TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel, a Sequence of these");
}

/* ------------------------------------------------------------------------------------------------ normalizer */

/* A text of the file as C holds it: without NUL, not empty where that makes no sense, and not long enough to blow a text up. */
EX_API const char *exi_tok_need_text(const exi_tok_loader *l, const ex_json_node *object, const char *key, bool may_be_empty)
{
    const ex_json_node *node = ex_json_need(&l->json, object, key, EX_JSON_STRING, l->error);
    if (node == NULL) return NULL;
    if (strlen(node->as.text) == node->count && node->count <= EXI_TOK_MAX_ADDED && (may_be_empty || node->count > 0))
        return node->as.text;
    ex_fail(l->error, "%s:%u: \"%s\" must have %d to %d bytes and no NUL", l->json.name, node->line, key, may_be_empty ? 0 : 1,
            EXI_TOK_MAX_ADDED);
    return NULL;
}

/* The same for exactly one character. */
EX_API const char *exi_tok_need_character(const exi_tok_loader *l, const ex_json_node *object, const char *key)
{
    const char *text = exi_tok_need_text(l, object, key, false);
    uint32_t code;
    if (text == NULL) return NULL;
    if (ex_utf8_decode(text, strlen(text), &code, NULL) == strlen(text)) return text;
    ex_fail(l->error, "%s:%u: \"%s\" must be one character, found \"%s\"", l->json.name, object->line, key, text);
    return NULL;
}

EX_API uint32_t *exi_tok_codes(const char *text)
{
    const size_t bytes = strlen(text);
    uint32_t *codes = NULL;
    for (size_t at = 0; at < bytes;) {
        uint32_t code;
        at += ex_utf8_decode(text + at, bytes - at, &code, NULL);
        stbds_arrput(codes, code);
    }
    return codes;
}

/* The bytes of a base64 text, or NULL; free(). */
EX_API unsigned char *exi_tok_base64(const char *text, size_t length, size_t *bytes)
{
    unsigned char *out;
    uint32_t bits = 0;
    size_t padding = 0;
    *bytes = 0;
    if (length % 4 != 0 || length == 0) return NULL;
    while (padding < 2 && text[length - 1 - padding] == '=') padding++;
    out = (unsigned char *)ex_alloc(length / 4 * 3, 1);
    for (size_t i = 0; i < length; i++) {
        const char c = i < length - padding ? text[i] : 'A';
        const int value = c >= 'A' && c <= 'Z'   ? c - 'A'
                          : c >= 'a' && c <= 'z' ? c - 'a' + 26
                          : c >= '0' && c <= '9' ? c - '0' + 52
                          : c == '+'             ? 62
                          : c == '/'             ? 63
                                                 : -1;
        if (value < 0) {
            free(out);
            return NULL;
        }
        bits = bits << 6 | (uint32_t)value;
        if (i % 4 != 3) continue;
        for (int b = 16; b >= 0; b -= 8) out[(*bytes)++] = (unsigned char)(bits >> b);
    }
    *bytes -= padding;
    return out;
}

/* uint32 bytes of the double array, the array, texts that end with NUL; all numbers little-endian. */
EX_API bool exi_tok_charmap_read(const exi_tok_loader *l, const ex_json_node *node, const unsigned char *map, size_t bytes)
{
    exi_tok_charmap *charmap = &l->t->charmap;
    const size_t array = bytes >= 4 ? map[0] | (size_t)map[1] << 8 | (size_t)map[2] << 16 | (size_t)map[3] << 24 : 0;
    size_t run = 0;
    if (array < 4 || array % 4 != 0 || array > bytes - 4) {
        return ex_fail(l->error, "%s:%u: \"precompiled_charsmap\" has %zu bytes, but its array takes %zu", l->json.name,
                       node->line, bytes, array);
    }
    charmap->count = array / 4;
    charmap->units = (uint32_t *)ex_alloc(charmap->count, sizeof(uint32_t));
    for (size_t i = 0; i < charmap->count; i++) {
        const unsigned char *unit = map + 4 + 4 * i;
        charmap->units[i] = unit[0] | (uint32_t)unit[1] << 8 | (uint32_t)unit[2] << 16 | (uint32_t)unit[3] << 24;
    }
    charmap->bytes = bytes - 4 - array;
    charmap->texts = ex_copy((const char *)map + 4 + array, charmap->bytes);
    for (size_t i = 0; i < charmap->bytes; i++) {
        run = charmap->texts[i] != 0 ? run + 1 : 0;
        if (run > EXI_TOK_MAX_MAPPED)
            return ex_fail(l->error, "%s:%u: \"precompiled_charsmap\" has a replacement of more than %d bytes", l->json.name,
                           node->line, EXI_TOK_MAX_MAPPED);
    }
    if (ex_utf8_valid_prefix(charmap->texts, charmap->bytes) == charmap->bytes) return true;
    return ex_fail(l->error, "%s:%u: the texts of \"precompiled_charsmap\" are no UTF-8", l->json.name, node->line);
}

EX_API bool exi_tok_charmap_part(const exi_tok_loader *l, const ex_json_node *node)
{
    const ex_json_node *text = ex_json_need(&l->json, node, "precompiled_charsmap", EX_JSON_STRING, l->error);
    unsigned char *map;
    size_t bytes;
    bool fine;
    if (text == NULL) return false;
    if (l->t->charmap.units != NULL)
        return ex_fail(l->error, "%s:%u: a second \"Precompiled\" normalizer is not supported", l->json.name, node->line);
    map = exi_tok_base64(text->as.text, text->count, &bytes);
    if (map == NULL)
        return ex_fail(l->error, "%s:%u: \"precompiled_charsmap\" is no base64 text", l->json.name, text->line);
    fine = exi_tok_charmap_read(l, text, map, bytes);
    free(map);
    return fine;
}

/* A pattern is {"String": text}, or {"Regex": text} for the expressions that are known here. *regex: it is the latter. */
EX_API const char *exi_tok_pattern(const exi_tok_loader *l, const ex_json_node *object, bool *regex)
{
    const ex_json_node *pattern = ex_json_need(&l->json, object, "pattern", EX_JSON_OBJECT, l->error);
    if (pattern == NULL) return NULL;
    *regex = ex_json_get(pattern, "Regex") != NULL;
    return exi_tok_need_text(l, pattern, *regex ? "Regex" : "String", false);
}

EX_API bool exi_tok_normal_replacement(const exi_tok_loader *l, const ex_json_node *node, exi_tok_normal_step *step)
{
    bool regex = false;
    const char *from = exi_tok_pattern(l, node, &regex), *to = from != NULL ? exi_tok_need_text(l, node, "content", true) : NULL;
    if (to == NULL) return false;
    if (regex && strcmp(from, " {2,}") != 0) {
        return exi_tok_refuse(l, ex_json_get(ex_json_get(node, "pattern"), "Regex"), "\"Regex\" of a \"Replace\" normalizer",
                              " {2,}");
    }
    step->kind = regex ? EXI_TOK_NORMAL_SPACES : EXI_TOK_NORMAL_REPLACE;
    if (!regex) step->from = exi_tok_codes(from);
    step->to = exi_tok_codes(to);
    return true;
}

EX_API void exi_tok_bert_step(exi_tok_normal_step *step, const ex_json_node *node, const char *chinese, const char *lowercase)
{
    step->kind = EXI_TOK_NORMAL_BERT;
    step->clean_text = ex_json_bool(node, "clean_text", true);
    step->chinese = ex_json_bool(node, chinese, true);
    step->lowercase = ex_json_bool(node, lowercase, true);
    step->strip_accents = ex_json_bool(node, "strip_accents", step->lowercase);
}

EX_API bool exi_tok_normal_one(const exi_tok_loader *l, const ex_json_node *node, exi_tok_normal_step *step)
{
    const ex_json_node *type = ex_json_get(node, "type");
    if (ex_json_equals(type, "BertNormalizer")) {
        exi_tok_bert_step(step, node, "handle_chinese_chars", "lowercase");
        return true;
    }
    if (ex_json_equals(type, "Precompiled")) {
        step->kind = EXI_TOK_NORMAL_CHARMAP;
        return exi_tok_charmap_part(l, node);
    }
    if (ex_json_equals(type, "Replace")) return exi_tok_normal_replacement(l, node, step);
    if (ex_json_equals(type, "Prepend")) {
        const char *text = exi_tok_need_text(l, node, "prepend", true);
        step->kind = EXI_TOK_NORMAL_PREPEND;
        step->to = text != NULL ? exi_tok_codes(text) : NULL;
        return text != NULL;
    }
    step->left = ex_json_bool(node, "strip_left", false);
    step->right = ex_json_bool(node, "strip_right", false);
    step->lowercase = true;
    step->kind = ex_json_equals(type, "Strip")       ? EXI_TOK_NORMAL_STRIP
                 : ex_json_equals(type, "Lowercase") ? EXI_TOK_NORMAL_LOWERCASE
                                                     : EXI_TOK_NORMAL_NFC;
    if (step->kind != EXI_TOK_NORMAL_NFC || ex_json_equals(type, "NFC")) return true;
    return exi_tok_refuse(l, type != NULL ? type : node, "\"type\" of \"normalizer\"",
                          "BertNormalizer, Precompiled, Prepend, Replace, Strip, Lowercase, NFC, a Sequence of these, null");
}

/* The list of a Sequence, or NULL when node is a single part. */
EX_API bool exi_tok_sequence_list(const exi_tok_loader *l, const ex_json_node *node, const char *key, const ex_json_node **list)
{
    *list = NULL;
    if (!ex_json_equals(ex_json_get(node, "type"), "Sequence")) return true;
    *list = ex_json_need(&l->json, node, key, EX_JSON_ARRAY, l->error);
    if (*list == NULL) return false;
    if ((*list)->count <= EXI_TOK_STEPS) return true;
    return ex_fail(l->error, "%s:%u: %u \"%s\", at most %d are supported", l->json.name, (*list)->line, (*list)->count, key,
                   EXI_TOK_STEPS);
}

EX_API bool exi_tok_normalizer(const exi_tok_loader *l)
{
    const ex_json_node *node, *list, *at;
    if (!exi_tok_optional(l, l->root, "normalizer", EX_JSON_OBJECT, &node)) return false;
    if (node == NULL) return true;
    if (!exi_tok_sequence_list(l, node, "normalizers", &list)) return false;
    at = list != NULL ? ex_json_first(list) : node;
    for (uint32_t i = 0; i < (list != NULL ? list->count : 1); i++, at = ex_json_next(at)) {
        if (!exi_tok_normal_one(l, at, &l->t->normal[l->t->normals++])) return false;
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ pre-tokenizer */

/* "prepend_scheme", or in older files "add_prefix_space". */
EX_API bool exi_tok_prefix_scheme(const exi_tok_loader *l, const ex_json_node *node, exi_tok_prefix *prefix)
{
    const ex_json_node *scheme = ex_json_get(node, "prepend_scheme");
    *prefix = ex_json_bool(node, "add_prefix_space", true) ? EXI_TOK_ALWAYS : EXI_TOK_NEVER;
    if (scheme == NULL || ex_json_equals(scheme, "always")) return true;
    *prefix = ex_json_equals(scheme, "first") ? EXI_TOK_FIRST : EXI_TOK_NEVER;
    return *prefix == EXI_TOK_FIRST || ex_json_equals(scheme, "never") ||
           exi_tok_refuse(l, scheme, "\"prepend_scheme\"", "always, first, never");
}

EX_API bool exi_tok_metaspace(const exi_tok_loader *l, const ex_json_node *node, exi_tok_split_step *step)
{
    const char *space = exi_tok_need_character(l, node, "replacement");
    step->kind = EXI_TOK_SPLIT_METASPACE;
    if (space == NULL || !exi_tok_prefix_scheme(l, node, &step->prefix)) return false;
    ex_utf8_decode(space, strlen(space), &step->space, NULL);
    step->whole = !ex_json_bool(node, "split", true);
    return true;
}

/* Words by a regular expression: those that models are known to use. */
EX_API bool exi_tok_split_part(const exi_tok_loader *l, const ex_json_node *node, exi_tok_split_step *step)
{
#define EXI_TOK_LLAMA3(numbers) \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    static const struct { const char *regex; exi_tok_split_kind kind; int32_t digits; } known[] = {
        {EXI_TOK_LLAMA3("\\p{N}{1,3}"), EXI_TOK_SPLIT_LLAMA3, 3},
        {EXI_TOK_LLAMA3("\\p{N}"), EXI_TOK_SPLIT_LLAMA3, 1},
        {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", EXI_TOK_SPLIT_GPT2, 0}
    };
    const ex_json_node *behavior = ex_json_get(node, "behavior");
    const bool invert = ex_json_bool(node, "invert", false);
    bool regex = false;
    const char *text = exi_tok_pattern(l, node, &regex);
    if (text == NULL) return false;
    /* all characters are matched, so that removing what is not matched is the same as keeping the matches apart */
    if (!ex_json_equals(behavior, invert ? "Removed" : "Isolated"))
        return exi_tok_refuse(l, behavior != NULL ? behavior : node, "\"behavior\" of a \"Split\" pre-tokenizer",
                              "Isolated, Removed with invert");
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]) && regex; i++) {
        if (strcmp(known[i].regex, text) != 0) continue;
        step->kind = known[i].kind;
        step->digits = known[i].digits;
        return true;
    }
    return exi_tok_refuse(l, ex_json_get(ex_json_get(node, "pattern"), regex ? "Regex" : "String"),
                          "\"pattern\" of a \"Split\" pre-tokenizer", "the regular expressions of GPT-2, LLaMA 3 and Qwen 2");
#undef EXI_TOK_LLAMA3
}

EX_API bool exi_tok_split_one(const exi_tok_loader *l, const ex_json_node *node, exi_tok_split_step *step)
{
    const ex_json_node *type = ex_json_get(node, "type");
    ex_tokenizer *t = l->t;
    if (t->byte_level)
        return ex_fail(l->error, "%s:%u: a pre-tokenizer behind ByteLevel is not supported", l->json.name, node->line);
    if (ex_json_equals(type, "ByteLevel") && t->model == EXI_TOK_BPE) {
        step->kind = ex_json_bool(node, "use_regex", true) ? EXI_TOK_SPLIT_GPT2 : EXI_TOK_SPLIT_NOTHING;
        step->prefix = ex_json_bool(node, "add_prefix_space", true) ? EXI_TOK_ALWAYS : EXI_TOK_NEVER;
        step->space = ' ';
        t->byte_level = true;
        return true;
    }
    if (ex_json_equals(type, "Metaspace")) return exi_tok_metaspace(l, node, step);
    if (ex_json_equals(type, "Split")) return exi_tok_split_part(l, node, step);
    if (ex_json_equals(type, "Digits")) {
        step->kind = EXI_TOK_SPLIT_DIGITS;
        step->digits = ex_json_bool(node, "individual_digits", false) ? 1 : 0;
        return true;
    }
    step->kind = ex_json_equals(type, "WhitespaceSplit") ? EXI_TOK_SPLIT_SPACES : EXI_TOK_SPLIT_BERT;
    if (step->kind == EXI_TOK_SPLIT_SPACES || ex_json_equals(type, "BertPreTokenizer")) return true;
    return exi_tok_refuse(l, type != NULL ? type : node, "\"type\" of \"pre_tokenizer\"",
                          "BertPreTokenizer, ByteLevel (of a BPE model), Metaspace, Split, Digits, WhitespaceSplit, a Sequence "
                          "of these");
}

EX_API bool exi_tok_pre_tokenizer(const exi_tok_loader *l)
{
    const ex_json_node *node = ex_json_get(l->root, "pre_tokenizer"), *type = ex_json_get(node, "type"), *list, *at;
    if (l->t->model == EXI_TOK_WORDPIECE && !ex_json_equals(type, "BertPreTokenizer"))
        return exi_tok_refuse(l, type != NULL ? type : node, "\"pre_tokenizer\" (of a WordPiece model)", "BertPreTokenizer");
    if (!exi_tok_optional(l, l->root, "pre_tokenizer", EX_JSON_OBJECT, &node)) return false;
    if (node == NULL) return true;
    if (!exi_tok_sequence_list(l, node, "pretokenizers", &list)) return false;
    at = list != NULL ? ex_json_first(list) : node;
    for (uint32_t i = 0; i < (list != NULL ? list->count : 1); i++, at = ex_json_next(at)) {
        if (!exi_tok_split_one(l, at, &l->t->split[l->t->splits++])) return false;
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ decoder */

EX_API exi_tok_decode_step *exi_tok_add_decode(ex_tokenizer *t, exi_tok_decode_kind kind, const char *from, const char *to)
{
    exi_tok_decode_step *step = &t->decode[t->decodes++];
    step->kind = kind;
    step->from = from != NULL ? ex_copy(from, strlen(from)) : NULL;
    step->to = to != NULL ? ex_copy(to, strlen(to)) : NULL;
    return step;
}

EX_API bool exi_tok_decode_strip_part(const exi_tok_loader *l, const ex_json_node *node)
{
    const char *content = exi_tok_need_character(l, node, "content");
    exi_tok_decode_step *step;
    int64_t start, stop;
    if (content == NULL) return false;
    if (!ex_json_int(ex_json_get(node, "start"), 0, INT32_MAX, &start) ||
        !ex_json_int(ex_json_get(node, "stop"), 0, INT32_MAX, &stop)) {
        return ex_fail(l->error, "%s:%u: \"start\" and \"stop\" of a Strip decoder must be whole numbers", l->json.name,
                       node->line);
    }
    step = exi_tok_add_decode(l->t, EXI_TOK_DECODE_STRIP, content, NULL);
    step->start = start;
    step->stop = stop;
    return true;
}

EX_API bool exi_tok_decode_replace_part(const exi_tok_loader *l, const ex_json_node *node)
{
    bool regex = false;
    const char *from = exi_tok_pattern(l, node, &regex), *to = from != NULL ? exi_tok_need_text(l, node, "content", true) : NULL;
    if (to == NULL) return false;
    if (regex) {
        return exi_tok_refuse(l, ex_json_get(ex_json_get(node, "pattern"), "Regex"), "\"Regex\" of a \"Replace\" decoder",
                              "a String");
    }
    exi_tok_add_decode(l->t, EXI_TOK_DECODE_REPLACE, from, to);
    return true;
}

EX_API bool exi_tok_decode_one(const exi_tok_loader *l, const ex_json_node *node)
{
    const ex_json_node *type = ex_json_get(node, "type");
    if (ex_json_equals(type, "ByteLevel")) exi_tok_add_decode(l->t, EXI_TOK_DECODE_BYTES, NULL, NULL);
    else if (ex_json_equals(type, "ByteFallback")) exi_tok_add_decode(l->t, EXI_TOK_DECODE_FALLBACK, NULL, NULL);
    else if (ex_json_equals(type, "Fuse")) exi_tok_add_decode(l->t, EXI_TOK_DECODE_FUSE, NULL, NULL);
    else if (ex_json_equals(type, "Strip")) return exi_tok_decode_strip_part(l, node);
    else if (ex_json_equals(type, "Replace")) return exi_tok_decode_replace_part(l, node);
    else if (ex_json_equals(type, "WordPiece")) {
        const char *prefix = ex_json_text(node, "prefix", "##");
        exi_tok_add_decode(l->t, EXI_TOK_DECODE_WORDPIECE, prefix, NULL)->cleanup = ex_json_bool(node, "cleanup", true);
    } else if (ex_json_equals(type, "Metaspace")) {
        const char *space = exi_tok_need_character(l, node, "replacement");
        exi_tok_prefix prefix;
        if (space == NULL || !exi_tok_prefix_scheme(l, node, &prefix)) return false;
        exi_tok_add_decode(l->t, EXI_TOK_DECODE_METASPACE, space, NULL)->drop = prefix != EXI_TOK_NEVER;
    } else
        return exi_tok_refuse(l, type != NULL ? type : node, "\"type\" of \"decoder\"",
                              "WordPiece, ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, a Sequence of these, null");
    return true;
}

/* Behind a step that makes one text of all tokens only those steps are supported that need not see it whole. */
EX_API bool exi_tok_check_decoder(const exi_tok_loader *l, const ex_json_node *node)
{
    bool fused = false, bytes = false;
    for (int32_t k = 0; k < l->t->decodes; k++) {
        const exi_tok_decode_step *step = &l->t->decode[k];
        const bool waits = step->kind == EXI_TOK_DECODE_BYTES || step->kind == EXI_TOK_DECODE_FALLBACK;
        const bool streams = step->kind == EXI_TOK_DECODE_FUSE || (step->kind == EXI_TOK_DECODE_STRIP && step->stop == 0);
        if ((fused && !streams) || (bytes && waits))
            return ex_fail(l->error, "%s:%u: step %d of \"decoder\" is not supported behind those before it", l->json.name,
                           node->line, (int)k + 1);
        fused = fused || step->kind == EXI_TOK_DECODE_FUSE || step->kind == EXI_TOK_DECODE_BYTES;
        bytes = bytes || waits;
    }
    return true;
}

EX_API bool exi_tok_decoder_part(const exi_tok_loader *l)
{
    const ex_json_node *node, *list, *at;
    if (!exi_tok_optional(l, l->root, "decoder", EX_JSON_OBJECT, &node)) return false;
    if (node == NULL) {
        exi_tok_add_decode(l->t, EXI_TOK_DECODE_JOIN, NULL, NULL);
        return true;
    }
    if (!exi_tok_sequence_list(l, node, "decoders", &list)) return false;
    at = list != NULL ? ex_json_first(list) : node;
    for (uint32_t i = 0; i < (list != NULL ? list->count : 1); i++, at = ex_json_next(at)) {
        if (!exi_tok_decode_one(l, at)) return false;
    }
    return exi_tok_check_decoder(l, node);
}

#endif /* EX_TOKENIZER_PARTS_H */
