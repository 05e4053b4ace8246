/* ex_grammar_text.h - what the grammar of ex_grammar.h has for models that write text: a tokenizer.json of its words, sentences
   whose words got into disorder, facts with the sentence that tells them, and stories with two people. Include after
   ex_grammar.h. */
#ifndef EX_GRAMMAR_TEXT_H
#define EX_GRAMMAR_TEXT_H

/* The kinds of lines that ex_grammar_write_text writes. */
typedef enum ex_grammar_kind { EX_GRAMMAR_SENTENCE, EX_GRAMMAR_STORY, EX_GRAMMAR_SHUFFLED, EX_GRAMMAR_FACTS } ex_grammar_kind;

EX_API void exi_grammar_add_token(ex_text *vocabulary, const char *word, int32_t *count)
{
    ex_text_format(vocabulary, "%s\"%s\": %d", *count > 0 ? ", " : "", word, (int)*count);
    ++*count;
}

/* tokenizer.json of a word-level model in dir: one token a word, `begin` and `end` ("<s>", "</s>") around each text where they
   are not NULL. */
EX_API bool ex_grammar_write_tokenizer(const char *dir, const char *begin, const char *end, ex_error *error)
{
    static const char *const special[] = {"<pad>", "<s>", "</s>", "<unk>"};
    static const char *const names[] = {"looks", "nature", "denied", ":", ";", "."};
    const char *const around[2] = {begin, end};
    char *path = ex_path(dir, "tokenizer.json"), *config = ex_path(dir, "tokenizer_config.json");
    ex_text text = {NULL, 0, 0}, vocabulary = {NULL, 0, 0}, form = {NULL, 0, 0}, ids = {NULL, 0, 0};
    int32_t count = 0;
    for (int i = 0; i < 4; i++) exi_grammar_add_token(&vocabulary, special[i], &count);
    for (int i = 0; i < 6; i++) exi_grammar_add_token(&vocabulary, names[i], &count);
    for (int list = EXI_SPECIAL + 1; list < EXI_LISTS; list++)
        for (int i = 0; exi_word_lists[list][i] != NULL; i++) exi_grammar_add_token(&vocabulary, exi_word_lists[list][i], &count);
    ex_text_put(&text, "{\"version\": \"1.0\", \"added_tokens\": [");
    for (int i = 0; i < 4; i++)
        ex_text_format(&text, "%s{\"id\": %d, \"content\": \"%s\", \"special\": true}", i > 0 ? ", " : "", i, special[i]);
    for (int i = 0; i < 2; i++) {
        if (i == 1) ex_text_format(&form, "%s{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}", form.length > 0 ? ", " : "");
        if (around[i] == NULL) continue;
        ex_text_format(&form, "%s{\"SpecialToken\": {\"id\": \"%s\", \"type_id\": 0}}", i > 0 ? ", " : "", around[i]);
        ex_text_format(&ids, "%s\"%s\": {\"id\": \"%s\", \"ids\": [%d], \"tokens\": [\"%s\"]}", ids.length > 0 ? ", " : "",
                       around[i], around[i], i + 1, around[i]);
    }
    ex_text_format(&text, "],\n\"normalizer\": null, \"pre_tokenizer\": {\"type\": \"BertPreTokenizer\"},\n"
                   "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [%s], \"pair\": [%s], "
                   "\"special_tokens\": {%s}},\n"
                   "\"decoder\": {\"type\": \"WordPiece\", \"prefix\": \"##\", \"cleanup\": false},\n"
                   "\"model\": {\"type\": \"WordPiece\", \"unk_token\": \"<unk>\", \"continuing_subword_prefix\": \"##\", "
                   "\"max_input_chars_per_word\": 100, \"vocab\": {%s}}}\n", form.at, form.at, ids.at != NULL ? ids.at : "",
                   vocabulary.at);
    static const char settings[] = "{\"pad_token\": \"<pad>\", \"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}\n";
    const bool fine = ex_make_dirs(dir, error) && ex_write_file(path, text.at, text.length, error) &&
                      ex_write_file(config, settings, sizeof(settings) - 1, error);
    ex_text_free(&text);
    ex_text_free(&vocabulary);
    ex_text_free(&form);
    ex_text_free(&ids);
    free(path);
    free(config);
    return fine;
}

/* A sentence in pieces of up to three words, which stand in any order, every eighth word missing. What stands side by side still
   means something, so that a model that puts it in order learns to look at places. */
EX_API void exi_grammar_shuffle(ex_sentence *out, const ex_sentence *s, uint64_t *random)
{
    ex_sentence piece[64];
    char copy[sizeof(s->text)], *at = copy;
    uint32_t count = 0, left = 0;
    memcpy(copy, s->text, sizeof(copy));
    for (char *blank; at != NULL && (left > 0 || count < 64); at = blank != NULL ? blank + 1 : NULL) {
        blank = strchr(at, ' ');
        if (blank != NULL) *blank = 0;
        if (left == 0) {
            left = 1 + ex_below(random, 3);
            piece[count++].text[0] = 0;
        }
        left--;
        if (!ex_chance(random, 1.0 / 8) || at == copy) ex_say(&piece[count - 1], at);
    }
    for (out->text[0] = 0; count > 0; count--) {
        const uint32_t k = ex_below(random, count);
        if (piece[k].text[0] != 0) ex_say(out, piece[k].text);
        piece[k] = piece[count - 1];
    }
}

/* "nature : kind and wise ; denied : never ; who : cook" in any order, and "the cook was never kind or wise , so everyone
   sighed": whether there is a smile has to be found out. */
EX_API void exi_grammar_facts(ex_sentence *facts, ex_sentence *told, uint64_t *random)
{
    ex_clause c;
    ex_sentence fact[5];
    uint32_t count = 0;
    ex_clause_draw(&c, random, 0.5);
    told->text[0] = facts->text[0] = 0;
    ex_say_clause(told, &c);
    ex_say(told, ", so everyone");
    ex_say(told, exi_word_lists[c.good ? EXI_SMILE : EXI_SIGH][0]);
    snprintf(fact[count++].text, sizeof(fact->text), "who : %s", c.who);
    snprintf(fact[count++].text, sizeof(fact->text), "nature : %s%s%s", c.nature, c.also ? " and " : "", c.also ? c.also : "");
    if (c.looks != NULL) snprintf(fact[count++].text, sizeof(fact->text), "looks : %s", c.looks);
    if (c.negation != NULL) snprintf(fact[count++].text, sizeof(fact->text), "denied : %s", c.negation);
    if (c.met != NULL) snprintf(fact[count++].text, sizeof(fact->text), "%s : %s %s", c.met, c.met_who, c.met_nature);
    for (; count > 0; count--) {
        const uint32_t k = ex_below(random, count);
        ex_say(facts, fact[k].text);
        if (count > 1) ex_say(facts, ";");
        fact[k] = fact[count - 1];
    }
}

/* "the old cook was never kind and the judge was brave , so everyone who met the judge smiled and everyone who met the cook
   sighed": who is who has to be remembered. */
EX_API void exi_grammar_story(ex_sentence *s, uint64_t *random)
{
    ex_clause c[2];
    ex_clause_draw(&c[0], random, 0);
    do ex_clause_draw(&c[1], random, 0);
    while (strcmp(c[0].who, c[1].who) == 0);
    s->text[0] = 0;
    for (int i = 0; i < 2; i++) {
        if (i > 0) ex_say(s, "and");
        ex_say_clause(s, &c[i]);
    }
    ex_say(s, ", so everyone");
    const uint32_t first = ex_below(random, 2);
    for (uint32_t i = 0; i < 2; i++) {
        const ex_clause *of = &c[i ^ first];
        if (i > 0) ex_say(s, "and everyone");
        ex_say(s, "who met the");
        ex_say(s, of->who);
        ex_say(s, exi_word(random, of->good ? EXI_SMILE : EXI_SIGH));
    }
}

/* One line: a text, or a source and its target. The target, or the text, is in *key. Half of the shuffled ones ask for the facts
   of a sentence, so that a model pretrained on them knows the words for facts. Returns the one that is a sentence. */
EX_API const ex_sentence *exi_grammar_line(ex_grammar_kind kind, ex_sentence *source, ex_sentence *key, uint64_t *random)
{
    source->text[0] = 0;
    if (kind == EX_GRAMMAR_SHUFFLED && ex_chance(random, 0.5)) {
        exi_grammar_facts(key, source, random);
        return source;
    }
    if (kind == EX_GRAMMAR_STORY) exi_grammar_story(key, random);
    else if (kind == EX_GRAMMAR_FACTS) exi_grammar_facts(source, key, random);
    else ex_sentence_make(key, random, true);
    if (kind == EX_GRAMMAR_SHUFFLED) exi_grammar_shuffle(source, key, random);
    return key;
}

/* Writes `count` lines whose sentences are not in `seen` yet: texts end with a point, pairs are a TSV with a header. */
EX_API bool ex_grammar_write_text(const char *path, int64_t count, ex_grammar_kind kind, uint64_t *random, ex_map *seen,
                                  ex_error *error)
{
    const bool pairs = kind == EX_GRAMMAR_SHUFFLED || kind == EX_GRAMMAR_FACTS;
    ex_text text = {NULL, 0, 0};
    ex_sentence source, key;
    ex_text_put(&text, pairs ? "source\ttarget\n" : "");
    for (int64_t i = 0; i < count;) {
        const ex_sentence *sentence = exi_grammar_line(kind, &source, &key, random);
        if (!ex_map_put(seen, sentence->text, strlen(sentence->text), 1)) continue;
        if (pairs) ex_text_format(&text, "%s\t%s\n", source.text, key.text);
        else ex_text_format(&text, "%s .\n", key.text);
        i++;
    }
    const bool fine = ex_write_file(path, text.at, text.length, error);
    ex_text_free(&text);
    return fine;
}

#endif /* EX_GRAMMAR_TEXT_H */
