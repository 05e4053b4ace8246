/* ex_demo_bert.h - the demonstration task of the encoders: a grammar writes sentences (negation, clauses, distractors), a tiny
   BERT is pretrained on them by masked language modelling, and what is to be told of each sentence is whether its main
   statement is good news. Or `words`: it goes on learning masked words, and what counts is their perplexity.

   Include after ex_demo.h. EX_BERT_PLAN stands in a program's ex_demo_plan, whose d->user begins with an ex_bert. */
#ifndef EX_DEMO_BERT_H
#define EX_DEMO_BERT_H

/* Sentences whose masks are always the same, to be measured with. */
typedef struct exi_bert_masked { const ex_demo *d; const ex_dataset *set; } exi_bert_masked;

/* A program's d->user begins with one. */
typedef struct ex_bert {
    bool words;                       /* the program's: not classes but masked words are the task */
    ex_dataset set[EX_DEMO_SETS];
    exi_bert_masked masked[EX_DEMO_SETS];
    int32_t *mask_labels;             /* stb_ds; of the present MLM batch */
} ex_bert;

/* ------------------------------------------------------------------------------------------------ data */

/* A file of sentences that no earlier one has, written, read again and tokenised. */
EX_API bool exi_bert_file(ex_demo *d, ex_dataset *set, const char *name, int64_t count, bool labelled)
{
    char *path = ex_path(d->out, name);
    ex_rows_desc desc;
    ex_rows rows;
    memset(&desc, 0, sizeof(desc));
    memset(&rows, 0, sizeof(rows));
    desc.kind = labelled ? EX_LABEL_CLASS : EX_LABEL_NONE;
    const bool fine = ex_grammar_write(path, count, labelled, &d->random, &d->seen, &d->error) &&
                      ex_rows_read(&rows, path, &desc, &d->error) && ex_dataset_rows(set, &rows, d->tokenizer, 64, &d->error);
    ex_rows_free(&rows);
    free(path);
    return fine;
}

EX_API void exi_bert_samples(uint64_t seed)
{
    ex_sentence s;
    for (int i = 0; i < 3; i++) {
        ex_sentence_make(&s, &seed, false);
        printf("    %-8s \"%s\"\n", s.label ? "good" : "not good", s.text);
    }
}

/* ------------------------------------------------------------------------------------------------ masked words */

/* 15 % of the words of sequence s are to be guessed, and half of the reactions at the end, which say most about the sentence.
   Of these 80 % become [MASK], 10 % a random word, 10 % stay. labels: for all tokens of the batch. */
EX_API void exi_bert_mask_row(const ex_demo *d, ex_batch *batch, int32_t s, int32_t *labels, uint64_t *random)
{
    const int32_t mask = ex_tokenizer_special(d->tokenizer, EX_MASK), first = mask + 1, words = ex_tokenizer_size(d->tokenizer);
    const int32_t last = batch->offsets[s + 1] - 2;       /* before [SEP] */
    for (int32_t t = batch->offsets[s]; t <= last + 1; t++) {
        const bool chosen = batch->tokens[t] >= first && ex_chance(random, t == last ? 0.5 : 0.15);
        labels[t] = chosen ? batch->tokens[t] : -100;
        if (!chosen || ex_chance(random, 0.1)) continue;
        batch->tokens[t] = ex_chance(random, 1.0 / 9) ? first + (int32_t)ex_below(random, (uint32_t)(words - first)) : mask;
    }
}

/* To learn from: other words each time. The choice depends on the seed and the place in the stream alone. */
EX_API apt_batch ex_bert_mask(ex_run *run, ex_batch *batch)
{
    ex_demo *d = (ex_demo *)run->user;
    ex_bert *own = (ex_bert *)d->user;
    uint64_t random = (uint64_t)d->seed + (uint64_t)run->feed.at.epoch * 0x100000001b3u + (uint64_t)run->feed.at.index;
    arrsetlen(own->mask_labels, (size_t)batch->offsets[batch->sequences]);
    for (int32_t s = 0; s < batch->sequences; s++) exi_bert_mask_row(d, batch, s, own->mask_labels, &random);
    apt_batch view = ex_batch_apt(batch);
    view.labels = own->mask_labels;
    return view;
}

EX_API int32_t exi_bert_masked_length(const void *set, int64_t row)
{
    return exi_dataset_length(((const exi_bert_masked *)set)->set, row);
}

/* To measure with: the same words of a sentence each time, whatever batch it is in. */
EX_API void exi_bert_masked_gather(ex_batch *batch, const void *set, const int64_t *index, int32_t count)
{
    const exi_bert_masked *m = (const exi_bert_masked *)set;
    ex_batch_gather(batch, m->set, index, count);
    arrsetlen(batch->labels, (size_t)batch->offsets[count]);
    for (int32_t s = 0; s < count; s++) {
        uint64_t random = exi_mix((uint64_t)m->d->seed) + (uint64_t)index[s];
        exi_bert_mask_row(m->d, batch, s, batch->labels, &random);
    }
}

EX_API ex_source ex_bert_rows(const ex_demo *d, ex_demo_set which)
{
    const ex_bert *own = (const ex_bert *)d->user;
    const exi_bert_masked *m = &own->masked[which];
    if (!own->words || which == EX_DEMO_CORPUS || which == EX_DEMO_TRAIN) return ex_dataset_source(&own->set[which]);
    const ex_source source = {m, m->set->count, exi_bert_masked_length, exi_bert_masked_gather};
    return source;
}

/* Perplexity of masked test words by how often each word stands in the corpus (every count begins with 0.1): what can be had
   without looking at other words. */
EX_API double exi_bert_word_counts(const ex_demo *d)
{
    const ex_dataset *corpus = &((const ex_bert *)d->user)->set[EX_DEMO_CORPUS];
    const ex_source test = ex_bert_rows(d, EX_DEMO_TEST);
    const int32_t first = ex_tokenizer_special(d->tokenizer, EX_MASK) + 1, words = ex_tokenizer_size(d->tokenizer);
    const int64_t tokens = corpus->starts[corpus->count];
    double *count = (double *)ex_alloc((size_t)words, sizeof(double)), all = 0, sum = 0;
    int64_t terms = 0;
    ex_batch batch;
    memset(&batch, 0, sizeof(batch));
    for (int64_t t = 0; t < tokens; t++) count[corpus->tokens[t]] += 1;
    for (int32_t w = first; w < words; w++) all += count[w] += 0.1;
    for (int64_t row = 0; row < test.count; row++) {
        test.gather(&batch, test.set, &row, 1);
        for (int32_t t = 0; t < batch.offsets[1]; t++) {
            if (batch.labels[t] < first) continue;
            sum -= log(count[batch.labels[t]] / all);
            terms++;
        }
    }
    ex_batch_free(&batch);
    free(count);
    return exp(sum / (double)terms);
}

EX_API bool ex_bert_data(ex_demo *d, ex_cells *baseline)
{
    static const char *const names[EX_DEMO_SETS] = {"corpus.tsv", "train.tsv", "dev.tsv", "test.tsv"};
    ex_bert *own = (ex_bert *)d->user;
    ex_dataset *set = own->set;
    const ex_demo_sizes *sizes = &d->sizes;
    const int64_t count[EX_DEMO_SETS] = {sizes->corpus, sizes->train, sizes->dev, sizes->test};
    bool fine = ex_grammar_write_vocabulary(d->base, &d->error) && (d->tokenizer = ex_tokenizer_load(d->base, &d->error)) != NULL;
    for (int which = 0; fine && which < EX_DEMO_SETS; which++) {
        const exi_bert_masked masked = {d, &set[which]};
        own->masked[which] = masked;
        fine = exi_bert_file(d, &set[which], names[which], count[which], which != EX_DEMO_CORPUS && !own->words);
    }
    if (!fine) return false;
    exi_bert_samples(d->random);
    printf("  %lld sentences to pretrain on, %lld %s to adapt with, %lld to watch, %lld to test\n", (long long)sizes->corpus,
           (long long)sizes->train, own->words ? "others" : "labelled ones", (long long)sizes->dev, (long long)sizes->test);
    if (own->words) {
        const double counts = exi_bert_word_counts(d);
        printf("  how often each word stands in the corpus says enough for a perplexity of %.1f\n", counts);
        baseline->run = "word counts";
        ex_cell(baseline, "perplexity", "%.3f", counts);
        return true;
    }
    const int32_t words = ex_tokenizer_size(d->tokenizer);
    const double bag = ex_bag_of_words(&set[EX_DEMO_TRAIN], &set[EX_DEMO_TEST], words, (uint64_t)d->seed);
    printf("  a bag of words gets %.1f %% of the test sentences right\n", 100 * bag);
    baseline->run = "bag of words";
    ex_cell(baseline, "accuracy", "%.1f %%", 100 * bag);
    ex_cell(baseline, "parameters", "%d", (int)words + 1);
    return true;
}

/* ------------------------------------------------------------------------------------------------ pretraining */

/* What the pretrained model puts at the [MASK] at the end of `text`. */
EX_API bool exi_bert_guess(ex_demo *d, apt_ctx *ctx, apt_model *model, const char *text)
{
    const int32_t words = ex_tokenizer_size(d->tokenizer), mask = ex_tokenizer_special(d->tokenizer, EX_MASK);
    float *logits = (float *)ex_alloc((size_t)words, sizeof(float));
    int32_t labels[64], offsets[2] = {0, 0};
    ex_encode_desc desc;
    ex_encoding e;
    apt_batch batch = APT_ZERO;
    apt_output output = APT_ZERO;
    memset(&desc, 0, sizeof(desc));
    memset(&e, 0, sizeof(e));
    desc.text = text;
    desc.bytes = strlen(text);
    desc.max_length = 64;
    if (!ex_tokenizer_encode(d->tokenizer, &desc, &e, &d->error)) return false;
    offsets[1] = e.first[1];
    for (int32_t t = 0; t < offsets[1]; t++) labels[t] = e.ids[t] == mask ? mask : -100;
    batch.sequences = 1;
    batch.offsets = offsets;
    batch.tokens = e.ids;
    batch.labels = labels;
    output.logits = logits;
    output.logits_capacity = words;
    const bool fine = apt_model_forward(model, &batch, &output) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx));
    const int32_t best = fine ? ex_argmax(logits, words) : 0;
    if (fine)
        printf("    %s  ->  %s (%.0f %%)\n", text, ex_tokenizer_token(d->tokenizer, best),
               100 * ex_softmax_best(logits, words, best));
    ex_encoding_free(&e);
    free(logits);
    return fine;
}

EX_API bool exi_bert_show(ex_demo *d, apt_ctx *ctx, apt_model *model)
{
    return exi_bert_guess(d, ctx, model, "the old cook was kind , so everyone [MASK]") &&
           exi_bert_guess(d, ctx, model, "the old cook was never kind , so everyone [MASK]") &&
           exi_bert_guess(d, ctx, model, "the cook who met the cruel clerk was not rude , so everyone [MASK]");
}

EX_API void exi_bert_shape(const ex_demo *d, apt_config *config)
{
    config->family = APT_BERT;
    config->task = APT_TASK_MLM;
    config->vocab = ex_tokenizer_size(d->tokenizer);
    config->positions = 64;
    config->types = 2;
    config->hidden = 128;
    config->head_dim = 16;
    config->heads = 8;
    config->neurons = 512;
    config->layers = 4;
    config->init_range = 0.08f;       /* about 1/sqrt(hidden): BERT's 0.02 suits 768 dimensions, here it learns very slowly */
}

/* ------------------------------------------------------------------------------------------------ adapting */

EX_API bool ex_bert_score(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_demo_set which, ex_scores *scores, ex_score_info *info)
{
    const ex_source set = ex_bert_rows(d, which);
    const bool words = ((const ex_bert *)d->user)->words;
    memset(scores, 0, sizeof(*scores));
    if (!ex_score(ctx, model, &set, NULL, NULL, info, &d->error)) return false;
    scores->name[0] = "accuracy";
    scores->value[0] = (double)info->correct / (double)(words ? info->terms : set.count);
    scores->name[1] = "perplexity";
    scores->value[1] = exp(info->loss);
    scores->count = words ? 2 : 1;
    scores->lower = words;
    scores->chosen_name = scores->name[words];
    scores->chosen = scores->value[words];
    scores->loss = info->loss;
    return true;
}

EX_API void ex_bert_quality(const ex_scores *scores, ex_cells *cells)
{
    if (scores->lower) ex_cell(cells, "perplexity", "%.3f", scores->value[1]);
    ex_cell(cells, "accuracy", "%.1f %%", 100 * scores->value[0]);
}

/* What a plan has of this task; names, ways and numbers of steps are the program's. */
#define EX_BERT_PLAN                                                                                                       \
    .model = "tiny-bert",                                                                                                  \
    .data = "A corpus from a grammar: is the main statement good news?",                                                   \
    .pretraining = "Pretraining a tiny BERT (4 layers, d 128, 8 heads, 512 neurons) by masked language modelling",         \
    .objective = "masked LM",                                                                                              \
    .batch = 32,                                                                                                           \
    .pretrain_rate = 1e-3f,                                                                                                \
    .rate = 2e-3f,                                                                                                         \
    .load = {.task = APT_TASK_CLASSIFY, .labels = 2},                                                                      \
    .make_data = ex_bert_data,                                                                                             \
    .shape = exi_bert_shape,                                                                                               \
    .prepare = ex_bert_mask,                                                                                               \
    .show = exi_bert_show,                                                                                                 \
    .rows = ex_bert_rows,                                                                                                  \
    .score = ex_bert_score,                                                                                                \
    .quality = ex_bert_quality

EX_API void ex_bert_free(ex_bert *own)
{
    for (int i = 0; i < EX_DEMO_SETS; i++) ex_dataset_free(&own->set[i]);
    arrfree(own->mask_labels);
}

#endif /* EX_DEMO_BERT_H */
