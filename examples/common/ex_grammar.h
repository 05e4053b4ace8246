/* ex_grammar.h - a small labelled corpus out of a grammar, for a program that must run without any file; and what a bag of
   words makes of it. Include after ex_data.h.

   The task: is the MAIN statement of the sentence good news? "although the rude baker was not cruel , the old cook was never
   kind" is not: the main adjective is positive, one negation turns it, and what stands in the other clause does not count.
   Adjectives and negations of main and other clauses are drawn alike and independently, so single words say little.
   In the text for pretraining a reaction follows that agrees with the main statement: ", so everyone smiled". */
#ifndef EX_GRAMMAR_H
#define EX_GRAMMAR_H

#include <math.h>

#include "ex_data.h"

typedef enum exi_word_list {
    EXI_SPECIAL, EXI_OTHER, EXI_PEOPLE, EXI_PLAIN, EXI_GOOD, EXI_BAD, EXI_SMILE, EXI_SIGH, EXI_NOT, EXI_MET, EXI_JOIN, EXI_LISTS
} exi_word_list;

/* All words; no list has more than twelve. */
static const char *const exi_word_lists[EXI_LISTS][13] = {
    {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"},
    {"the", "was", "who", ",", "so", "everyone", "it", "is", "false", "that", "and", "or"},
    {"cook", "clerk", "singer", "farmer", "teacher", "doctor", "sailor", "baker", "painter", "judge"},
    {"old", "young", "tall", "little", "new", "famous"},
    {"kind", "honest", "gentle", "brave", "wise", "cheerful"},
    {"cruel", "rude", "greedy", "cowardly", "foolish", "gloomy"},
    {"smiled", "cheered", "laughed"},
    {"sighed", "frowned", "wept"},
    {"not", "never", "hardly"},
    {"met", "knew", "saw", "heard"},
    {"although", "while", "because"}};

/* splitmix64: enough for a corpus, and the same everywhere. */
EX_API uint64_t exi_grammar_next(uint64_t *random)
{
    return exi_mix(*random += 0x9e3779b97f4a7c15u);
}

EX_API uint32_t ex_below(uint64_t *random, uint32_t n)
{
    return (uint32_t)(((exi_grammar_next(random) >> 32) * n) >> 32);
}

EX_API bool ex_chance(uint64_t *random, double p)
{
    return (double)(exi_grammar_next(random) >> 11) / 9007199254740992.0 < p;
}

/* ------------------------------------------------------------------------------------------------ sentences */

typedef struct ex_sentence { char text[240]; int32_t label; } ex_sentence;      /* label 1: good news */

EX_API const char *exi_word(uint64_t *random, exi_word_list list)
{
    uint32_t count = 0;
    while (exi_word_lists[list][count] != NULL) count++;
    return exi_word_lists[list][ex_below(random, count)];
}

/* "the [old] cook [who met the rude baker] was [not] kind [or wise]": its words, NULL for what it has not. */
typedef struct ex_clause {
    const char *looks, *who, *met, *met_nature, *met_who, *negation, *nature, *also;
    bool good;                        /* news */
} ex_clause;

EX_API void ex_clause_draw(ex_clause *c, uint64_t *random, double relative)
{
    const bool good = ex_chance(random, 0.5), negated = ex_chance(random, 0.25);
    memset(c, 0, sizeof(*c));
    c->good = good != negated;
    if (ex_chance(random, 0.3)) c->looks = exi_word(random, EXI_PLAIN);
    c->who = exi_word(random, EXI_PEOPLE);
    if (ex_chance(random, relative)) {
        c->met = exi_word(random, EXI_MET);
        c->met_nature = exi_word(random, ex_chance(random, 0.5) ? EXI_GOOD : EXI_BAD);
        c->met_who = exi_word(random, EXI_PEOPLE);
    }
    if (negated) c->negation = exi_word(random, EXI_NOT);
    c->nature = exi_word(random, good ? EXI_GOOD : EXI_BAD);
    if (ex_chance(random, 0.3)) c->also = exi_word(random, good ? EXI_GOOD : EXI_BAD);
}

/* Adds words that stand in `words`, separated by blanks; NULL: none. */
EX_API void ex_say(ex_sentence *s, const char *words)
{
    const size_t used = strlen(s->text);
    if (words != NULL) snprintf(s->text + used, sizeof(s->text) - used, "%s%s", used > 0 ? " " : "", words);
}

EX_API void ex_say_clause(ex_sentence *s, const ex_clause *c)
{
    ex_say(s, "the");
    ex_say(s, c->looks);
    ex_say(s, c->who);
    if (c->met != NULL) {
        ex_say(s, "who");
        ex_say(s, c->met);
        ex_say(s, "the");
        ex_say(s, c->met_nature);
        ex_say(s, c->met_who);
    }
    ex_say(s, "was");
    ex_say(s, c->negation);
    ex_say(s, c->nature);
    if (c->also != NULL) ex_say(s, c->negation != NULL ? "or" : "and");
    ex_say(s, c->also);
}

/* Draws and adds one; is it good news? */
EX_API bool exi_say_any(ex_sentence *s, uint64_t *random, double relative)
{
    ex_clause c;
    ex_clause_draw(&c, random, relative);
    ex_say_clause(s, &c);
    return c.good;
}

/* Main statement with, in half of the labelled sentences and a third of the others, a clause that does not count. */
EX_API void ex_sentence_make(ex_sentence *s, uint64_t *random, bool reaction)
{
    const uint32_t shape = ex_below(random, reaction ? 6 : 4);
    s->text[0] = 0;
    if (shape == 0) {
        ex_say(s, exi_word(random, EXI_JOIN));
        exi_say_any(s, random, 0);
        ex_say(s, ",");
    }
    const bool denied = ex_chance(random, 0.1);
    if (denied) ex_say(s, "it is false that");
    s->label = exi_say_any(s, random, 0.3) != denied;
    if (shape == 1) {
        ex_say(s, exi_word(random, EXI_JOIN));
        exi_say_any(s, random, 0);
    }
    if (!reaction) return;
    ex_say(s, ", so everyone");
    ex_say(s, exi_word(random, s->label ? EXI_SMILE : EXI_SIGH));
}

/* ------------------------------------------------------------------------------------------------ files */

/* vocab.txt of a word-level BERT in dir: five special tokens and every word of the grammar. */
EX_API bool ex_grammar_write_vocabulary(const char *dir, ex_error *error)
{
    static const char settings[] = "{\"do_lower_case\": true, \"tokenizer_class\": \"BertTokenizer\"}\n";
    char *path = ex_path(dir, "vocab.txt"), *config = ex_path(dir, "tokenizer_config.json");
    ex_text text = {NULL, 0, 0};
    for (int list = 0; list < EXI_LISTS; list++)
        for (int i = 0; exi_word_lists[list][i] != NULL; i++) ex_text_format(&text, "%s\n", exi_word_lists[list][i]);
    const bool fine = ex_make_dirs(dir, error) && ex_write_file(path, text.at, text.length, error) &&
                      ex_write_file(config, settings, sizeof(settings) - 1, error);
    ex_text_free(&text);
    free(path);
    free(config);
    return fine;
}

/* Writes `count` sentences, none of which is in `seen` yet, as a TSV with a header line: labelled ones, or with reactions. */
EX_API bool ex_grammar_write(const char *path, int64_t count, bool labelled, uint64_t *random, ex_map *seen, ex_error *error)
{
    ex_text text = {NULL, 0, 0};
    ex_sentence s;
    ex_text_put(&text, labelled ? "sentence\tlabel\n" : "sentence\n");
    for (int64_t i = 0; i < count;) {
        ex_sentence_make(&s, random, !labelled);
        if (!ex_map_put(seen, s.text, strlen(s.text), 1)) continue;
        if (labelled) ex_text_format(&text, "%s\t%d\n", s.text, (int)s.label);
        else ex_text_format(&text, "%s\n", s.text);
        i++;
    }
    const bool fine = ex_write_file(path, text.at, text.length, error);
    ex_text_free(&text);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ bag of words */

EX_API double exi_bag_score(const ex_dataset *set, int64_t row, const double *weight)
{
    double z = weight[0];
    for (int64_t t = set->starts[row]; t < set->starts[row + 1]; t++) z += weight[1 + set->tokens[t]];
    return z;
}

/* Accuracy of logistic regression on word counts (words + 1 parameters): what can be had without looking at their order. */
EX_API double ex_bag_of_words(const ex_dataset *train, const ex_dataset *test, int32_t words, uint64_t seed)
{
    double *weight = (double *)ex_alloc((size_t)words + 1, sizeof(double));
    int64_t correct = 0;
    for (int64_t epoch = 0; epoch < 30; epoch++) {
        for (int64_t i = 0; i < train->count; i++) {
            const int64_t row = ex_permute(seed, epoch, train->count, i);
            const double p = 1 / (1 + exp(-exi_bag_score(train, row, weight)));
            const double step = 0.05 / (1.0 + (double)epoch) * ((double)train->labels[row] - p);
            weight[0] += step;
            for (int64_t t = train->starts[row]; t < train->starts[row + 1]; t++) weight[1 + train->tokens[t]] += step;
        }
    }
    for (int64_t i = 0; i < test->count; i++) correct += (exi_bag_score(test, i, weight) > 0) == (test->labels[i] == 1);
    free(weight);
    return (double)correct / (double)test->count;
}

#endif /* EX_GRAMMAR_H */
