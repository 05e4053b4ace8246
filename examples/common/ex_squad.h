/* ex_squad.h - question answering: SQuAD 1.1 and 2.0 files, their windows as tokens, and answers out of span scores.
   Included by ex_data.h.

   A context that does not fit is cut into windows that overlap by `stride` tokens. A window whose context does not hold
   the whole answer is labelled with its first token ([CLS]), which also means "no answer" in version 2. */
#ifndef EX_SQUAD_H
#define EX_SQUAD_H

#include "ex_data.h"

typedef struct ex_answer { const char *text; uint32_t bytes, start; } ex_answer;           /* start: byte in the context */

typedef struct ex_question {
    const char *id, *title, *context, *question;           /* NUL-terminated */
    uint32_t context_bytes, question_bytes;
    bool impossible;                  /* version 2: the context does not answer it */
    int32_t first_answer, answers;    /* in ex_squad.answer; 0 answers and not impossible: unknown (a test set) */
} ex_question;

typedef struct ex_squad {
    int64_t count;
    ex_question *question;            /* stb_ds array */
    ex_answer *answer;                /* stb_ds array */
    bool version2;
    int64_t replaced;
    char *buffer;                     /* the file; all texts point into it */
} ex_squad;

typedef struct exi_squad_reader {
    ex_squad *squad;
    ex_json json;
    const char *title;
    const ex_json_node *context;
    uint32_t *marks;                  /* byte of every 64th character of the context */
    ex_error *error;
} exi_squad_reader;

EX_API void ex_squad_free(ex_squad *squad)
{
    stbds_arrfree(squad->question);
    stbds_arrfree(squad->answer);
    free(squad->buffer);
    memset(squad, 0, sizeof(*squad));
}

EX_API size_t exi_char_bytes(char lead)
{
    const unsigned char c = (unsigned char)lead;
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* Answers say where they start in characters; marks make that a short walk. */
EX_API void exi_squad_mark(exi_squad_reader *r)
{
    size_t at = 0;
    stbds_arrsetlen(r->marks, 0);
    for (size_t i = 0; at < r->context->count; i++) {
        if (i % 64 == 0) stbds_arrput(r->marks, (uint32_t)at);
        at += exi_char_bytes(r->context->as.text[at]);
    }
}

/* Byte of a character, or -1 behind the end. */
EX_API int64_t exi_squad_byte(const exi_squad_reader *r, int64_t character)
{
    size_t at;
    if (character / 64 >= (int64_t)stbds_arrlenu(r->marks)) return -1;
    at = r->marks[character / 64];
    for (int64_t i = 0; i < character % 64 && at < r->context->count; i++) at += exi_char_bytes(r->context->as.text[at]);
    return at < r->context->count ? (int64_t)at : -1;
}

EX_API bool exi_squad_answer(exi_squad_reader *r, const ex_json_node *node, const char *id)
{
    const ex_json_node *text = ex_json_need(&r->json, node, "text", EX_JSON_STRING, r->error);
    ex_answer answer;
    int64_t character, byte;
    if (text == NULL) return false;
    if (!ex_json_int(ex_json_get(node, "answer_start"), 0, INT32_MAX, &character)) {
        return ex_fail(r->error, "%s:%u: question %s: expected \"answer_start\" with a whole number", r->json.name, node->line,
                       id);
    }
    byte = exi_squad_byte(r, character);
    if (text->count == 0 || byte < 0 || text->count > r->context->count - (uint64_t)byte ||
        memcmp(r->context->as.text + byte, text->as.text, text->count) != 0) {
        return ex_fail(r->error,
                       "%s:%u: question %s: expected the answer \"%.60s\" at character %lld of its context, found \"%.*s\"",
                       r->json.name, node->line, id, text->as.text, (long long)character,
                       byte < 0 ? 0 : (int)(r->context->count - (uint64_t)byte < 60 ? r->context->count - (uint64_t)byte : 60),
                       byte < 0 ? "" : r->context->as.text + byte);
    }
    answer.text = r->context->as.text + byte;
    answer.bytes = text->count;
    answer.start = (uint32_t)byte;
    stbds_arrput(r->squad->answer, answer);
    return true;
}

EX_API bool exi_squad_question(exi_squad_reader *r, const ex_json_node *node)
{
    const ex_json_node *id = ex_json_need(&r->json, node, "id", EX_JSON_STRING, r->error);
    const ex_json_node *text = ex_json_need(&r->json, node, "question", EX_JSON_STRING, r->error);
    const ex_json_node *answers = ex_json_get(node, "answers"), *answer;
    ex_question question;
    memset(&question, 0, sizeof(question));
    if (id == NULL || text == NULL) return false;
    question.id = id->as.text;
    question.title = r->title;
    question.context = r->context->as.text;
    question.context_bytes = r->context->count;
    question.question = text->as.text;
    question.question_bytes = text->count;
    question.impossible = ex_json_bool(node, "is_impossible", false);
    question.first_answer = (int32_t)stbds_arrlenu(r->squad->answer);
    if (ex_json_get(node, "is_impossible") != NULL) r->squad->version2 = true;
    if (answers != NULL && answers->type != EX_JSON_ARRAY)
        return ex_json_need(&r->json, node, "answers", EX_JSON_ARRAY, r->error) != NULL;
    answer = answers != NULL && !question.impossible ? ex_json_first(answers) : NULL;
    for (uint32_t i = 0; answer != NULL && i < answers->count; i++, answer = ex_json_next(answer)) {
        if (!exi_squad_answer(r, answer, question.id)) return false;
        question.answers++;
    }
    stbds_arrput(r->squad->question, question);
    return true;
}

EX_API bool exi_squad_paragraph(exi_squad_reader *r, const ex_json_node *node)
{
    const ex_json_node *questions = ex_json_need(&r->json, node, "qas", EX_JSON_ARRAY, r->error), *one;
    r->context = ex_json_need(&r->json, node, "context", EX_JSON_STRING, r->error);
    if (questions == NULL || r->context == NULL) return false;
    exi_squad_mark(r);
    one = ex_json_first(questions);
    for (uint32_t i = 0; i < questions->count; i++, one = ex_json_next(one)) {
        if (one->type != EX_JSON_OBJECT)
            return ex_fail(r->error, "%s:%u: expected a question, found %s", r->json.name, one->line,
                           ex_json_type_name(one->type));
        if (!exi_squad_question(r, one)) return false;
    }
    return true;
}

EX_API bool exi_squad_article(exi_squad_reader *r, const ex_json_node *node)
{
    const ex_json_node *paragraphs, *one;
    if (node->type != EX_JSON_OBJECT)
        return ex_fail(r->error, "%s:%u: expected an article, found %s", r->json.name, node->line, ex_json_type_name(node->type));
    paragraphs = ex_json_need(&r->json, node, "paragraphs", EX_JSON_ARRAY, r->error);
    if (paragraphs == NULL) return false;
    r->title = ex_json_text(node, "title", "");
    one = ex_json_first(paragraphs);
    for (uint32_t i = 0; i < paragraphs->count; i++, one = ex_json_next(one)) {
        if (one->type != EX_JSON_OBJECT)
            return ex_fail(r->error, "%s:%u: expected a paragraph, found %s", r->json.name, one->line,
                           ex_json_type_name(one->type));
        if (!exi_squad_paragraph(r, one)) return false;
    }
    return true;
}

EX_API bool exi_squad_parse(exi_squad_reader *r)
{
    const ex_json_node *root = ex_json_root(&r->json), *data, *one;
    if (root->type != EX_JSON_OBJECT)
        return ex_fail(r->error, "%s:1: expected an object, found %s", r->json.name, ex_json_type_name(root->type));
    data = ex_json_need(&r->json, root, "data", EX_JSON_ARRAY, r->error);
    if (data == NULL) return false;
    r->squad->version2 = strncmp(ex_json_text(root, "version", ""), "v2", 2) == 0;
    one = ex_json_first(data);
    for (uint32_t i = 0; i < data->count; i++, one = ex_json_next(one)) {
        if (!exi_squad_article(r, one)) return false;
    }
    return stbds_arrlenu(r->squad->question) > 0 ? true : ex_fail(r->error, "%s: expected questions, found none", r->json.name);
}

/* On failure squad is empty. */
EX_API bool ex_squad_read(ex_squad *squad, const char *path, ex_error *error)
{
    exi_squad_reader r;
    bool fine;
    memset(&r, 0, sizeof(r));
    memset(squad, 0, sizeof(*squad));
    r.squad = squad;
    r.error = error;
    fine = ex_json_read(&r.json, path, error) && exi_squad_parse(&r);
    squad->count = (int64_t)stbds_arrlenu(squad->question);
    squad->replaced = r.json.replaced;
    squad->buffer = r.json.text;                           /* the nodes go, the texts stay */
    r.json.text = NULL;
    ex_json_free(&r.json);
    stbds_arrfree(r.marks);
    if (!fine) ex_squad_free(squad);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ windows */

typedef struct ex_squad_desc {        /* zero: the values in the comments */
    int32_t max_length;               /* 384 tokens */
    int32_t stride;                   /* 128: tokens that two neighbouring windows share */
    int32_t max_question;             /* 64: longer questions are cut */
} ex_squad_desc;

/* First and last token of a byte range of the context inside window w, or false. */
EX_API bool exi_squad_find(const ex_encoding *e, int32_t first, int32_t end, uint32_t from, uint32_t to, int32_t *start,
                           int32_t *stop)
{
    int32_t a = first, b = end - 1;
    if (first >= end || e->offsets[first].start > from || e->offsets[b].end < to) return false;
    while (a + 1 < end && e->offsets[a + 1].start <= from) a++;
    while (b - 1 >= first && e->offsets[b - 1].end >= to) b--;
    *start = a;
    *stop = b;
    return a <= b;
}

EX_API void exi_squad_window(exi_dataset_builder *b, const ex_squad *squad, int64_t index, const ex_encoding *e, int32_t w)
{
    const ex_question *question = &squad->question[index];
    const ex_span nowhere = {0, 0};
    int32_t first = e->first[w], end, start = -1, stop = -1;
    while (first < e->first[w + 1] && e->sequence[first] != 1) first++;
    for (end = first; end < e->first[w + 1] && e->sequence[end] == 1; end++) continue;
    for (int32_t i = e->first[w]; i < e->first[w + 1]; i++)
        stbds_arrput(b->offsets, e->sequence[i] == 1 ? e->offsets[i] : nowhere);
    if (question->answers > 0) {
        const ex_answer *answer = &squad->answer[question->first_answer];
        if (!exi_squad_find(e, first, end, answer->start, answer->start + answer->bytes, &start, &stop))
            start = stop = e->first[w];
    } else if (question->impossible) {
        start = stop = e->first[w];
    }
    stbds_arrput(b->labels, start < 0 ? -1 : start - e->first[w]);
    stbds_arrput(b->labels, stop < 0 ? -1 : stop - e->first[w]);
    stbds_arrput(b->context_first, first - e->first[w]);
    stbds_arrput(b->context_end, end - e->first[w]);
    stbds_arrput(b->question, index);
    exi_dataset_take(b, e, w);
}

/* Leading spaces off, and not more than `most` tokens. */
EX_API bool exi_squad_question_text(const ex_tokenizer *tokenizer, const ex_question *question, int32_t most, ex_encoding *e,
                                    const char **text, size_t *bytes, ex_error *error)
{
    ex_encode_desc desc;
    *text = question->question;
    *bytes = question->question_bytes;
    while (*bytes > 0 && (**text == ' ' || **text == '\t' || **text == '\n' || **text == '\r')) {
        (*text)++;
        (*bytes)--;
    }
    memset(&desc, 0, sizeof(desc));
    desc.text = *text;
    desc.bytes = *bytes;
    desc.no_special = true;
    if (!ex_tokenizer_encode(tokenizer, &desc, e, error)) return false;
    if (e->first[1] > most) *bytes = e->offsets[most - 1].end;
    return true;
}

EX_API bool exi_squad_encode(exi_dataset_builder *b, ex_dataset *set, const ex_squad *squad, int64_t index,
                             const ex_tokenizer *tokenizer, const ex_squad_desc *limits, ex_encoding *e, ex_error *error)
{
    const ex_question *question = &squad->question[index];
    ex_encode_desc desc;
    ex_error reason;
    memset(&desc, 0, sizeof(desc));
    if (!exi_squad_question_text(tokenizer, question, limits->max_question, e, &desc.text, &desc.bytes, error)) return false;
    desc.pair = question->context;
    desc.pair_bytes = question->context_bytes;
    desc.max_length = limits->max_length;
    desc.truncation = EX_ONLY_SECOND;
    desc.windows = true;
    desc.stride = limits->stride;
    if (!ex_tokenizer_encode(tokenizer, &desc, e, &reason))
        return ex_fail(error, "question %s: %.900s", question->id, reason.text);
    for (int32_t w = 0; w < e->windows; w++) exi_squad_window(b, squad, index, e, w);
    set->truncated += e->truncated;
    return true;
}

/* All windows of all questions, in order. labels: start and end token of the first answer; the first token when the window
   does not hold it; -1 (ignored) when the file has no answers. */
EX_API bool ex_dataset_squad(ex_dataset *set, const ex_squad *squad, const ex_tokenizer *tokenizer, const ex_squad_desc *desc,
                             ex_error *error)
{
    exi_dataset_builder builder;
    ex_encoding encoding;
    ex_squad_desc limits = *desc;
    bool fine = true;
    memset(&builder, 0, sizeof(builder));
    memset(&encoding, 0, sizeof(encoding));
    memset(set, 0, sizeof(*set));
    if (limits.max_length <= 0) limits.max_length = 384;
    if (limits.stride <= 0) limits.stride = 128;
    if (limits.max_question <= 0) limits.max_question = 64;
    set->labels_each = 2;
    for (int64_t i = 0; fine && i < squad->count; i++)
        fine = exi_squad_encode(&builder, set, squad, i, tokenizer, &limits, &encoding, error);
    exi_dataset_finish(set, &builder);
    ex_encoding_free(&encoding);
    if (!fine) ex_dataset_free(set);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ answers */

/* The best span of every question over its windows, and the score of having none. */
typedef struct ex_answers {
    const ex_squad *squad;
    const ex_dataset *set;
    int32_t max_tokens;               /* of an answer */
    struct exi_best { double score, null_score; uint32_t start, end; bool found, seen; } *best;   /* per question */
} ex_answers;

EX_API ex_answers *ex_answers_create(const ex_squad *squad, const ex_dataset *set, int32_t max_answer_tokens)
{
    ex_answers *answers = (ex_answers *)ex_alloc(1, sizeof(ex_answers));
    answers->squad = squad;
    answers->set = set;
    answers->max_tokens = max_answer_tokens > 0 ? max_answer_tokens : 30;
    answers->best = (struct exi_best *)ex_alloc((size_t)squad->count, sizeof(struct exi_best));
    return answers;
}

EX_API void ex_answers_free(ex_answers *answers)
{
    if (answers == NULL) return;
    free(answers->best);
    free(answers);
}

/* One window: start and end point to the scores of its tokens. Every span of up to max_tokens tokens is looked at. */
EX_API void ex_answers_add_window(ex_answers *answers, int64_t window, const float *start, const float *end)
{
    const ex_dataset *set = answers->set;
    const ex_span *offsets = set->offsets + set->starts[window];
    const int32_t first = set->context_first[window], stop = set->context_end[window];
    struct exi_best *best = &answers->best[set->question[window]];
    const double none = (double)start[0] + (double)end[0];
    if (!best->seen || none < best->null_score) best->null_score = none;
    best->seen = true;
    for (int32_t a = first; a < stop; a++) {
        const int32_t last = stop - a > answers->max_tokens ? a + answers->max_tokens : stop;
        for (int32_t b = a; b < last; b++) {
            const double score = (double)start[a] + (double)end[b];
            if (offsets[b].end <= offsets[a].start || (best->found && !(score > best->score))) continue;
            best->found = true;
            best->score = score;
            best->start = offsets[a].start;
            best->end = offsets[b].end;
        }
    }
}

/* A batch and its logits: the start scores of all tokens, then the end scores. Windows may come in any order. */
EX_API void ex_answers_add(ex_answers *answers, const ex_batch *batch, const float *logits)
{
    const int32_t tokens = batch->offsets[batch->sequences];
    for (int32_t s = 0; s < batch->sequences; s++) {
        ex_answers_add_window(answers, batch->index[s], logits + batch->offsets[s], logits + tokens + batch->offsets[s]);
    }
}

/* The answer, pointing into the context and *bytes long; 0 bytes: no answer, which only version 2 may say: when its score
   exceeds that of the best span by more than null_threshold. score and null_score may be NULL. */
EX_API const char *ex_answers_text(const ex_answers *answers, int64_t question, uint32_t *bytes, double *score,
                                   double *null_score, double null_threshold)
{
    const struct exi_best *best = &answers->best[question];
    const bool none = !best->found || (answers->squad->version2 && best->null_score - best->score > null_threshold);
    *bytes = none ? 0 : best->end - best->start;
    if (score != NULL) *score = best->score;
    if (null_score != NULL) *null_score = best->null_score;
    return none ? "" : answers->squad->question[question].context + best->start;
}

/* {"id": "answer", ...}, as the official scorer reads it. */
EX_API bool ex_answers_write(const ex_answers *answers, const char *path, double null_threshold, ex_error *error)
{
    ex_text text = {NULL, 0, 0};
    bool fine;
    ex_text_put(&text, "{");
    for (int64_t i = 0; i < answers->squad->count; i++) {
        uint32_t bytes;
        const char *answer = ex_answers_text(answers, i, &bytes, NULL, NULL, null_threshold);
        ex_text_put(&text, i > 0 ? ",\n " : "\n ");
        ex_json_put(&text, answers->squad->question[i].id, strlen(answers->squad->question[i].id));
        ex_text_put(&text, ": ");
        ex_json_put(&text, answer, bytes);
    }
    ex_text_put(&text, "\n}\n");
    fine = ex_write_file(path, text.at, text.length, error);
    ex_text_free(&text);
    return fine;
}

#endif /* EX_SQUAD_H */
