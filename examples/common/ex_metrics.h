/* ex_metrics.h - accuracy, F1, Matthews and rank correlations as GLUE uses them, exact match and F1 as SQuAD does; at its end
   it includes ex_metrics_text.h: ROUGE, BLEU, exact match and perplexity of written text.

   Fractions in 0..1 (correlations in -1..1), SQuAD scores in percent like the official script. Where a value is not
   defined (no positive example, a constant column) the result is 0, never NaN. Labels below 0 are left out. */
#ifndef EX_METRICS_H
#define EX_METRICS_H

#include <math.h>

#include "ex_base.h"
#include "ex_squad.h"

/* Index of the largest value, the first one of equals. */
EX_API int32_t ex_argmax(const float *x, int32_t n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
}

/* Probability of the largest of n logits, which stands at `best`. */
EX_API double ex_softmax_best(const float *x, int32_t n, int32_t best)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)x[i] - (double)x[best]);
    return 1 / sum;
}

EX_API double ex_accuracy(const int32_t *predicted, const int32_t *label, int64_t n)
{
    int64_t right = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        all += label[i] >= 0;
        right += label[i] >= 0 && predicted[i] == label[i];
    }
    return all > 0 ? (double)right / (double)all : 0;
}

/* 2 TP / (2 TP + FP + FN) of one class. *seen (may be NULL): the class stands in a label or a prediction. */
EX_API double exi_f1(const int32_t *predicted, const int32_t *label, int64_t n, int32_t positive, bool *seen)
{
    int64_t both = 0, either = 0;
    for (int64_t i = 0; i < n; i++) {
        if (label[i] < 0) continue;
        both += predicted[i] == positive && label[i] == positive;
        either += (predicted[i] == positive) + (label[i] == positive);
    }
    if (seen != NULL) *seen = either > 0;
    return either > 0 ? 2 * (double)both / (double)either : 0;
}

EX_API double ex_f1_binary(const int32_t *predicted, const int32_t *label, int64_t n, int32_t positive)
{
    return exi_f1(predicted, label, n, positive, NULL);
}

/* Mean over the classes that occur in the labels or the predictions. */
EX_API double ex_f1_macro(const int32_t *predicted, const int32_t *label, int64_t n, int32_t classes)
{
    double sum = 0;
    int32_t count = 0;
    for (int32_t c = 0; c < classes; c++) {
        bool seen;
        const double f1 = exi_f1(predicted, label, n, c, &seen);
        if (!seen) continue;
        sum += f1;
        count++;
    }
    return count > 0 ? sum / count : 0;
}

/* Matthews correlation for any number of classes: (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)),
   c right predictions of s, class k predicted p_k times and true t_k times. */
EX_API double ex_matthews(const int32_t *predicted, const int32_t *label, int64_t n, int32_t classes)
{
    double *p = (double *)ex_alloc((size_t)classes, sizeof(double)), *t = (double *)ex_alloc((size_t)classes, sizeof(double));
    double right = 0, all = 0, pt = 0, pp = 0, tt = 0, below;
    for (int64_t i = 0; i < n; i++) {
        if (label[i] < 0 || label[i] >= classes || predicted[i] < 0 || predicted[i] >= classes) continue;
        p[predicted[i]]++;
        t[label[i]]++;
        right += predicted[i] == label[i];
        all++;
    }
    for (int32_t k = 0; k < classes; k++) {
        pt += p[k] * t[k];
        pp += p[k] * p[k];
        tt += t[k] * t[k];
    }
    free(p);
    free(t);
    below = sqrt(all * all - pp) * sqrt(all * all - tt);
    return below > 0 ? (right * all - pt) / below : 0;
}

EX_API double exi_pearson(const double *x, const double *y, int64_t n)
{
    double mx = 0, my = 0, xx = 0, yy = 0, xy = 0, below;
    for (int64_t i = 0; i < n; i++) {
        mx += x[i] / (double)n;
        my += y[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++) {
        xx += (x[i] - mx) * (x[i] - mx);
        yy += (y[i] - my) * (y[i] - my);
        xy += (x[i] - mx) * (y[i] - my);
    }
    below = sqrt(xx) * sqrt(yy);
    if (!(below > 0)) return 0;
    return xy / below > 1 ? 1 : xy / below < -1 ? -1 : xy / below;
}

EX_API double *exi_doubles(const float *x, int64_t n)
{
    double *copy = (double *)ex_alloc((size_t)n, sizeof(double));
    for (int64_t i = 0; i < n; i++) copy[i] = (double)x[i];
    return copy;
}

typedef struct exi_ranked { float value; int64_t index; } exi_ranked;

EX_API int exi_compare_ranked(const void *a, const void *b)
{
    const exi_ranked *x = (const exi_ranked *)a, *y = (const exi_ranked *)b;
    return x->value < y->value ? -1 : x->value > y->value ? 1 : x->index < y->index ? -1 : x->index > y->index;
}

/* Ranks from 1; equal values share the mean of theirs. */
EX_API double *exi_ranks(const float *x, int64_t n)
{
    exi_ranked *order = (exi_ranked *)ex_alloc((size_t)n, sizeof(exi_ranked));
    double *ranks = (double *)ex_alloc((size_t)n, sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        order[i].value = x[i];
        order[i].index = i;
    }
    qsort(order, (size_t)n, sizeof(exi_ranked), exi_compare_ranked);
    for (int64_t from = 0, to; from < n; from = to) {
        for (to = from + 1; to < n && order[to].value <= order[from].value; to++) continue;
        for (int64_t i = from; i < to; i++) ranks[order[i].index] = 0.5 * (double)(from + 1 + to);
    }
    free(order);
    return ranks;
}

/* Pearson's correlation of what `prepare` makes of both. */
EX_API double exi_correlation(const float *predicted, const float *target, int64_t n,
                              double *(*prepare)(const float *values, int64_t count))
{
    double *x = prepare(predicted, n), *y = prepare(target, n);
    const double result = exi_pearson(x, y, n);
    free(x);
    free(y);
    return result;
}

EX_API double ex_pearson(const float *predicted, const float *target, int64_t n)
{
    return exi_correlation(predicted, target, n, exi_doubles);
}

EX_API double ex_spearman(const float *predicted, const float *target, int64_t n)
{
    return exi_correlation(predicted, target, n, exi_ranks);
}

/* ------------------------------------------------------------------------------------------------ SQuAD */

typedef struct ex_squad_score {
    double exact, f1;                 /* percent */
    int64_t total;
    double answer_exact, answer_f1;   /* over the questions that have an answer */
    int64_t answer_total;
    double null_exact;                /* over those that have none; F1 is the same number */
    int64_t null_total;
} ex_squad_score;

EX_API bool exi_squad_word(uint32_t code)
{
    return ex_is_letter(code) || ex_is_number(code) || code == '_';
}

/* Python's str.isspace */
EX_API bool exi_squad_space(uint32_t code)
{
    return ex_is_space(code) || (code >= 0x1c && code <= 0x1f);
}

/* Small letters without ASCII punctuation. */
EX_API void exi_squad_fold(ex_text *out, const char *text, size_t bytes)
{
    ex_text_put(out, "");
    for (size_t at = 0; at < bytes;) {
        char letter[4];
        uint32_t code;
        at += ex_utf8_decode(text + at, bytes - at, &code, NULL);
        if (code < 0x80 && ex_is_punctuation(code)) continue;
        ex_text_add(out, letter, ex_utf8_encode(ex_lower(code), letter));
        if (code == 0x130) ex_text_add(out, "\xcc\x87", 2);
    }
}

/* Length of the article at `at` that stands between word boundaries, else 0. before: the character before it. */
EX_API size_t exi_squad_article_here(const char *text, size_t bytes, size_t at, uint32_t before)
{
    static const char *const articles[] = {"the", "an", "a"};
    if (exi_squad_word(before)) return 0;
    for (int i = 0; i < 3; i++) {
        const size_t length = strlen(articles[i]);
        uint32_t after = ' ';
        if (bytes - at < length || memcmp(text + at, articles[i], length) != 0) continue;
        if (at + length < bytes) ex_utf8_decode(text + at + length, bytes - at - length, &after, NULL);
        if (!exi_squad_word(after)) return length;
    }
    return 0;
}

/* The official normalisation: lower case, no punctuation, no articles, single spaces. */
EX_API void ex_squad_normalise(ex_text *out, const char *text, size_t bytes)
{
    ex_text folded = {NULL, 0, 0};
    uint32_t before = ' ', code;
    bool gap = false;
    exi_squad_fold(&folded, text, bytes);
    out->length = 0;
    ex_text_put(out, "");
    for (size_t at = 0; at < folded.length;) {
        const size_t article = exi_squad_article_here(folded.at, folded.length, at, before);
        const size_t step = ex_utf8_decode(folded.at + at, folded.length - at, &code, NULL);
        if (article > 0 || exi_squad_space(code)) {
            gap = true;
            before = article > 0 ? (uint32_t)'a' : code;
            at += article > 0 ? article : step;
            continue;
        }
        if (gap && out->length > 0) ex_text_add(out, " ", 1);
        gap = false;
        ex_text_add(out, folded.at + at, step);
        before = code;
        at += step;
    }
    ex_text_free(&folded);
}

/* How many words two normalised texts share, each counted as often as it stands in both. */
EX_API void exi_squad_overlap(const ex_text *a, const ex_text *b, int64_t *count_a, int64_t *count_b, int64_t *both)
{
    ex_map words;
    memset(&words, 0, sizeof(words));
    *count_a = *count_b = *both = 0;
    for (int side = 0; side < 2; side++) {
        const ex_text *text = side == 0 ? a : b;
        for (size_t at = 0; at < text->length;) {
            const char *space = (const char *)memchr(text->at + at, ' ', text->length - at);
            const size_t length = space != NULL ? (size_t)(space - (text->at + at)) : text->length - at;
            const int32_t left = ex_map_get(&words, text->at + at, length, 0);
            if (side == 0 || left > 0) ex_map_put(&words, text->at + at, length, side == 0 ? left + 1 : left - 1);
            *both += side == 1 && left > 0;
            ++*(side == 0 ? count_a : count_b);
            at += length + 1;
        }
    }
    ex_map_free(&words);
}

/* Exact match and F1 of a prediction against one answer. */
EX_API void ex_squad_compare(const char *predicted, size_t predicted_bytes, const char *answer, size_t answer_bytes,
                             double *exact, double *f1)
{
    ex_text p = {NULL, 0, 0}, a = {NULL, 0, 0};
    int64_t count_p, count_a, both;
    ex_squad_normalise(&p, predicted, predicted_bytes);
    ex_squad_normalise(&a, answer, answer_bytes);
    exi_squad_overlap(&p, &a, &count_p, &count_a, &both);
    *exact = p.length == a.length && memcmp(p.at, a.at, a.length) == 0;
    if (count_p == 0 || count_a == 0) *f1 = count_p == count_a;
    else *f1 = 2 * (double)both / (double)(count_p + count_a);
    ex_text_free(&p);
    ex_text_free(&a);
}

/* The best over all answers of a question; a question without any wants no answer. */
EX_API void exi_squad_best(const ex_squad *squad, const ex_question *question, const char *text, size_t bytes, double *exact,
                           double *f1)
{
    bool any = false;
    *exact = *f1 = 0;
    for (int32_t i = 0; i < question->answers; i++) {
        const ex_answer *answer = &squad->answer[question->first_answer + i];
        ex_text normal = {NULL, 0, 0};
        double e, f;
        ex_squad_normalise(&normal, answer->text, answer->bytes);
        if (normal.length > 0 || !squad->version2) {       /* the version 2 script leaves answers like "the" out */
            ex_squad_compare(text, bytes, answer->text, answer->bytes, &e, &f);
            if (normal.length == 0) f = 0;                 /* and that of version 1 gives them no F1 */
            *exact = e > *exact ? e : *exact;
            *f1 = f > *f1 ? f : *f1;
            any = true;
        }
        ex_text_free(&normal);
    }
    if (!any) ex_squad_compare(text, bytes, "", 0, exact, f1);
}

/* Scores every question of the file; false when there are none. */
EX_API bool ex_squad_score_all(ex_squad_score *score, const ex_squad *squad, const ex_answers *answers, double null_threshold)
{
    double sum[2][2] = {{0, 0}, {0, 0}};                   /* [has an answer][exact, f1] */
    int64_t count[2] = {0, 0};
    memset(score, 0, sizeof(*score));
    for (int64_t i = 0; i < squad->count; i++) {
        const int has = squad->question[i].answers > 0;
        uint32_t bytes;
        double exact, f1;
        const char *text = ex_answers_text(answers, i, &bytes, NULL, NULL, null_threshold);
        exi_squad_best(squad, &squad->question[i], text, bytes, &exact, &f1);
        sum[has][0] += exact;
        sum[has][1] += f1;
        count[has]++;
    }
    score->total = squad->count;
    score->answer_total = count[1];
    score->null_total = count[0];
    if (squad->count > 0) {
        score->exact = 100 * (sum[0][0] + sum[1][0]) / (double)squad->count;
        score->f1 = 100 * (sum[0][1] + sum[1][1]) / (double)squad->count;
    }
    if (count[1] > 0) {
        score->answer_exact = 100 * sum[1][0] / (double)count[1];
        score->answer_f1 = 100 * sum[1][1] / (double)count[1];
    }
    if (count[0] > 0) score->null_exact = 100 * sum[0][0] / (double)count[0];
    return squad->count > 0;
}

#include "ex_metrics_text.h"

#endif /* EX_METRICS_H */
