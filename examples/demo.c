/* demo.c - what `make run` runs: apt.h from nothing to a smaller, faster classifier, in about two minutes on two cores.

       cc -O2 -std=gnu11 examples/demo.c -o demo -lm -lpthread -lutf8proc

   No arguments, no network, no data files: a grammar writes a small corpus (negation, clauses, distractors), a tiny BERT is
   pretrained on it by masked language modelling and stored as a Hugging Face folder. That folder is then adapted to a
   sentence-classification task three ways, at equal numbers of steps: LoRA without pruning, APT (pruning and tuning at the
   same time), and prune-after-training (LoRA, one-shot prune, recovery). Everything in the table at the end is measured. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_tokenizer.h"
#include "common/ex_data.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"

/* ------------------------------------------------------------------------------------------------ the grammar

   The task: is the MAIN statement of the sentence good news? "although the rude baker was not cruel , the old cook was never
   kind" is not: the main adjective is positive, one negation turns it, and what stands in the other clause does not count.
   Adjectives and negations of main and other clauses are drawn alike and independently, so single words say little.
   In the pretraining text a reaction follows that agrees with the main statement: ", so everyone smiled". */

static const char *const g_people[] = {"cook", "clerk", "singer", "farmer", "teacher", "doctor", "sailor", "baker", "painter", "judge"};
static const char *const g_plain[] = {"old", "young", "tall", "little", "new", "famous"};
static const char *const g_good[] = {"kind", "honest", "gentle", "brave", "wise", "cheerful"};
static const char *const g_bad[] = {"cruel", "rude", "greedy", "cowardly", "foolish", "gloomy"};
static const char *const g_smile[] = {"smiled", "cheered", "laughed"};
static const char *const g_sigh[] = {"sighed", "frowned", "wept"};
static const char *const g_not[] = {"not", "never", "hardly"};
static const char *const g_met[] = {"met", "knew", "saw", "heard"};
static const char *const g_join[] = {"although", "while", "because"};
static const char *const g_other[] = {"the", "was", "who", ",", "so", "everyone", "it", "is", "false", "that", "and", "or"};

static const char *const g_special[] = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"};

#define COUNT(list) ((uint32_t)(sizeof(list) / sizeof((list)[0])))
#define LIST(list) {list, COUNT(list)}
static const struct { const char *const *word; uint32_t count; } g_words[] = {
    LIST(g_special), LIST(g_other), LIST(g_people), LIST(g_plain), LIST(g_good), LIST(g_bad), LIST(g_smile), LIST(g_sigh), LIST(g_not),
    LIST(g_met), LIST(g_join)};
#define PICK(random, list) ((list)[below(random, COUNT(list))])

/* splitmix64: enough for a corpus, and the same everywhere. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint32_t below(uint64_t *random, uint32_t n)
{
    return (uint32_t)(((next_random(random) >> 32) * n) >> 32);
}

static bool chance(uint64_t *random, double p)
{
    return (double)(next_random(random) >> 11) / 9007199254740992.0 < p;
}

typedef struct sentence { char text[240]; int32_t label; } sentence;

static void say(sentence *s, const char *word)
{
    const size_t used = strlen(s->text);
    snprintf(s->text + used, sizeof(s->text) - used, "%s%s", used > 0 ? " " : "", word);
}

static void say_person(sentence *s, uint64_t *random)
{
    say(s, "the");
    if (chance(random, 0.3)) say(s, PICK(random, g_plain));
    say(s, PICK(random, g_people));
}

/* "[the old cook] [who met the rude baker] was [not] kind"; returns 1 when this is good news. */
static int32_t say_clause(sentence *s, uint64_t *random, double relative)
{
    const bool good = chance(random, 0.5), negated = chance(random, 0.25);
    say_person(s, random);
    if (chance(random, relative)) {
        say(s, "who");
        say(s, PICK(random, g_met));
        say(s, "the");
        say(s, chance(random, 0.5) ? PICK(random, g_good) : PICK(random, g_bad));
        say(s, PICK(random, g_people));
    }
    say(s, "was");
    if (negated) say(s, PICK(random, g_not));
    say(s, good ? PICK(random, g_good) : PICK(random, g_bad));
    if (chance(random, 0.3)) {
        say(s, negated ? "or" : "and");
        say(s, good ? PICK(random, g_good) : PICK(random, g_bad));
    }
    return good != negated;
}

/* Main statement with, in half of the labelled sentences and a third of the others, a clause that does not count. */
static void make_sentence(sentence *s, uint64_t *random, bool reaction)
{
    const uint32_t shape = below(random, reaction ? 6 : 4);
    s->text[0] = 0;
    if (shape == 0) {
        say(s, PICK(random, g_join));
        say_clause(s, random, 0);
        say(s, ",");
    }
    const bool denied = chance(random, 0.1);
    if (denied) {
        say(s, "it");
        say(s, "is");
        say(s, "false");
        say(s, "that");
    }
    s->label = say_clause(s, random, 0.3) != (denied ? 1 : 0);
    if (shape == 1) {
        say(s, PICK(random, g_join));
        say_clause(s, random, 0);
    }
    if (!reaction) return;
    say(s, ",");
    say(s, "so");
    say(s, "everyone");
    say(s, s->label ? PICK(random, g_smile) : PICK(random, g_sigh));
}

/* ------------------------------------------------------------------------------------------------ the program's data */

typedef struct demo {
    int64_t seed, threads;
    const char *out;
    bool fast;
    /* how long */
    int64_t pretrain_steps, steps, corpus_rows, train_rows, dev_rows, test_rows;
    /* what the stages hand on */
    ex_map seen;                      /* the sentences handed out: none is used twice */
    char *base;                       /* folder of the pretrained model */
    ex_tokenizer *tokenizer;
    ex_dataset corpus, train, dev, test;
    int32_t *mask_labels;             /* stb_ds; of the present MLM batch */
    ex_error error;
} demo;

typedef struct outcome {
    const char *name;
    double accuracy, kept, tokens_per_second;
    int64_t parameters, disk, peak;
    ex_step_times times;
} outcome;

/* Writes `count` sentences that no earlier file has, as a TSV with a header line. */
static bool write_sentences(demo *d, const char *name, int64_t count, uint64_t *random, bool labelled)
{
    char *path = ex_path(d->out, name);
    ex_text text;
    sentence s;
    memset(&text, 0, sizeof(text));
    ex_text_put(&text, labelled ? "sentence\tlabel\n" : "sentence\n");
    for (int64_t i = 0; i < count;) {
        make_sentence(&s, random, !labelled);
        if (!ex_map_put(&d->seen, s.text, strlen(s.text), 1)) continue;
        if (labelled) ex_text_format(&text, "%s\t%d\n", s.text, (int)s.label);
        else ex_text_format(&text, "%s\n", s.text);
        i++;
    }
    const bool fine = ex_write_file(path, text.at, text.length, &d->error);
    ex_text_free(&text);
    free(path);
    return fine;
}

/* vocab.txt of a word-level BERT: five special tokens and every word of the grammar. */
static bool write_vocabulary(demo *d)
{
    static const char settings[] = "{\"do_lower_case\": true, \"tokenizer_class\": \"BertTokenizer\", \"model_max_length\": 64}\n";
    char *path = ex_path(d->base, "vocab.txt"), *config = ex_path(d->base, "tokenizer_config.json");
    ex_text text;
    memset(&text, 0, sizeof(text));
    for (uint32_t list = 0; list < COUNT(g_words); list++)
        for (uint32_t i = 0; i < g_words[list].count; i++) ex_text_format(&text, "%s\n", g_words[list].word[i]);
    const bool fine = ex_make_dirs(d->base, &d->error) && ex_write_file(path, text.at, text.length, &d->error) &&
                      ex_write_file(config, settings, sizeof(settings) - 1, &d->error);
    ex_text_free(&text);
    free(path);
    free(config);
    return fine;
}

static bool read_sentences(demo *d, ex_dataset *set, const char *name, bool labelled)
{
    char *path = ex_path(d->out, name);
    ex_rows_desc desc;
    ex_rows rows;
    memset(&desc, 0, sizeof(desc));
    memset(&rows, 0, sizeof(rows));
    memset(set, 0, sizeof(*set));
    desc.kind = labelled ? EX_LABEL_CLASS : EX_LABEL_NONE;
    const bool fine = ex_rows_read(&rows, path, &desc, &d->error) && ex_dataset_rows(set, &rows, d->tokenizer, 64, &d->error);
    ex_rows_free(&rows);
    free(path);
    return fine;
}

static void show_samples(demo *d, uint64_t seed)
{
    sentence s;
    for (int i = 0; i < 3; i++) {
        make_sentence(&s, &seed, false);
        printf("    %-8s \"%s\"\n", s.label ? "good" : "not good", s.text);
    }
    printf("  %lld sentences to pretrain on, %lld labelled ones to adapt with, %lld to watch, %lld to test\n", (long long)d->corpus.count,
           (long long)d->train.count, (long long)d->dev.count, (long long)d->test.count);
}

static bool make_data(demo *d)
{
    uint64_t random = (uint64_t)d->seed * 0x9e3779b97f4a7c15u + 1;
    if (!write_vocabulary(d) || !write_sentences(d, "corpus.tsv", d->corpus_rows, &random, false) ||
        !write_sentences(d, "train.tsv", d->train_rows, &random, true) || !write_sentences(d, "dev.tsv", d->dev_rows, &random, true) ||
        !write_sentences(d, "test.tsv", d->test_rows, &random, true))
        return false;
    d->tokenizer = ex_tokenizer_load(d->base, &d->error);
    if (d->tokenizer == NULL || !read_sentences(d, &d->corpus, "corpus.tsv", false) || !read_sentences(d, &d->train, "train.tsv", true) ||
        !read_sentences(d, &d->dev, "dev.tsv", true) || !read_sentences(d, &d->test, "test.tsv", true))
        return false;
    show_samples(d, random);
    return true;
}

/* ------------------------------------------------------------------------------------------------ bag of words

   Logistic regression on word counts: what can be had without looking at the order of the words. */

static double bag_score(const ex_dataset *set, int64_t row, const double *weight)
{
    double z = weight[0];
    for (int64_t t = set->starts[row]; t < set->starts[row + 1]; t++) z += weight[1 + set->tokens[t]];
    return z;
}

static double bag_of_words(const demo *d, int64_t *parameters)
{
    const int32_t words = ex_tokenizer_size(d->tokenizer);
    double *weight = (double *)ex_alloc((size_t)words + 1, sizeof(double));
    int64_t correct = 0;
    for (int64_t epoch = 0; epoch < 30; epoch++) {
        for (int64_t i = 0; i < d->train.count; i++) {
            const int64_t row = ex_permute((uint64_t)d->seed, epoch, d->train.count, i);
            const double p = 1 / (1 + exp(-bag_score(&d->train, row, weight)));
            const double step = 0.05 / (1.0 + (double)epoch) * ((double)d->train.labels[row] - p);
            weight[0] += step;
            for (int64_t t = d->train.starts[row]; t < d->train.starts[row + 1]; t++) weight[1 + d->train.tokens[t]] += step;
        }
    }
    for (int64_t i = 0; i < d->test.count; i++) correct += (bag_score(&d->test, i, weight) > 0) == (d->test.labels[i] == 1);
    *parameters = words + 1;
    free(weight);
    return (double)correct / (double)d->test.count;
}

/* ------------------------------------------------------------------------------------------------ pretraining */

/* Masked language modelling: 15 % of the words are to be guessed, and half of the reactions at the end, which say most about
   the sentence. Of these 80 % become [MASK], 10 % a random word, 10 % stay. The choice depends on the seed and the place in
   the stream alone. */
static apt_batch mask_words(ex_run *run, ex_batch *batch)
{
    demo *d = (demo *)run->user;
    const int32_t mask = ex_tokenizer_special(d->tokenizer, EX_MASK), first = mask + 1, words = ex_tokenizer_size(d->tokenizer);
    uint64_t random = (uint64_t)d->seed + (uint64_t)run->feed->at.epoch * 0x100000001b3u + (uint64_t)run->feed->at.index;
    arrsetlen(d->mask_labels, (size_t)batch->offsets[batch->sequences]);
    for (int32_t s = 0; s < batch->sequences; s++) {
        const int32_t last = batch->offsets[s + 1] - 2;               /* before [SEP] */
        for (int32_t t = batch->offsets[s]; t <= last + 1; t++) {
            const bool chosen = batch->tokens[t] >= first && chance(&random, t == last ? 0.5 : 0.15);
            d->mask_labels[t] = chosen ? batch->tokens[t] : -100;
            if (!chosen || chance(&random, 0.1)) continue;
            batch->tokens[t] = chance(&random, 1.0 / 9) ? first + (int32_t)below(&random, (uint32_t)(words - first)) : mask;
        }
    }
    apt_batch view = ex_batch_apt(batch);
    view.labels = d->mask_labels;
    return view;
}

/* What the pretrained model puts at the [MASK] at the end of `text`. */
static bool show_guess(demo *d, apt_ctx *ctx, apt_model *model, const char *text)
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
    if (fine) {
        double sum = 0;
        const int32_t best = ex_argmax(logits, words);
        for (int32_t w = 0; w < words; w++) sum += exp((double)logits[w] - (double)logits[best]);
        printf("    %s  ->  %s (%.0f %%)\n", text, ex_tokenizer_token(d->tokenizer, best), 100 / sum);
    }
    ex_encoding_free(&e);
    free(logits);
    return fine;
}

static void tiny_bert(const demo *d, apt_config *config)
{
    memset(config, 0, sizeof(*config));
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

static bool check_end(demo *d, ex_run_end end)
{
    return end == EX_RUN_DONE || (end == EX_RUN_STOPPED && ex_fail(&d->error, "interrupted; nothing to keep, start again")) ;
}

static bool pretrain(demo *d)
{
    apt_config config;
    apt_model *model = NULL;
    ex_feed feed;
    ex_log log;
    ex_run run;
    char *log_path = ex_path(d->out, "pretrain.jsonl");
    apt_ctx *ctx = ex_run_context(d->threads, NULL, &d->error);
    memset(&feed, 0, sizeof(feed));
    memset(&log, 0, sizeof(log));
    memset(&run, 0, sizeof(run));
    tiny_bert(d, &config);
    bool fine = ctx != NULL && (apt_model_create(ctx, &config, (uint64_t)d->seed, &model) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx)));
    feed.set = &d->corpus;
    feed.batch = 32;
    feed.seed = (uint64_t)d->seed;
    run.name = "masked LM";
    run.ctx = ctx;
    run.model = model;
    run.desc.method = APT_METHOD_FULL;
    run.desc.steps = d->pretrain_steps;
    run.desc.learning_rate = 1e-3f;
    run.desc.warmup_steps = d->pretrain_steps / 20;
    run.desc.seed = (uint64_t)d->seed;
    run.feed = &feed;
    run.prepare = mask_words;
    run.user = d;
    run.log_path = log_path;
    run.log = &log;
    run.error = &d->error;
    fine = fine && check_end(d, ex_run_train(&run)) && ex_run_save(&run, d->base, NULL) &&
           show_guess(d, ctx, model, "the old cook was kind , so everyone [MASK]") &&
           show_guess(d, ctx, model, "the old cook was never kind , so everyone [MASK]") &&
           show_guess(d, ctx, model, "the cook who met the cruel clerk was not rude , so everyone [MASK]");
    ex_log_close(&log);
    ex_feed_free(&feed);
    apt_destroy(ctx);
    free(log_path);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ adapting, three ways */

static bool evaluate_dev(ex_run *run, double *metric)
{
    demo *d = (demo *)run->user;
    ex_score_info info;
    if (!ex_score(run->ctx, run->model, &d->dev, NULL, NULL, &info, run->error)) return false;
    *metric = (double)info.correct / (double)d->dev.count;
    ex_progress_note(&run->bar, "  step %5lld  dev      accuracy %.1f %%", (long long)run->state.step, 100 * *metric);
    ex_log_begin(run->log, "evaluate");
    ex_log_int(run->log, "step", run->state.step);
    ex_log_real(run->log, "accuracy", *metric);
    ex_log_real(run->log, "dev_loss", info.loss);
    return ex_log_end(run->log, run->error);
}

static void training_plan(const demo *d, ex_run *run, int32_t method)
{
    apt_train_desc *t = &run->desc;
    t->steps = d->steps;
    t->learning_rate = 2e-3f;
    t->warmup_steps = d->steps / 20;
    t->evaluate_every = d->steps / 8;
    t->seed = (uint64_t)d->seed;
    t->method = method == 1 ? APT_METHOD_APT : APT_METHOD_LORA;
    if (method == 1) {
        t->target_sparsity = 0.6f;
        t->prune_begin = d->steps * 2 / 10;
        t->prune_end = d->steps * 6 / 10;
        t->update_frequency = (int32_t)((t->prune_end - t->prune_begin) / 10);
    } else if (method == 2) {
        run->prune_at = d->steps * 6 / 10;
        run->prune_sparsity = 0.6f;
        run->observe = 16;
    }
}

/* The folder that was just written, in a context of its own: the figures of the table are those of the files on disk. */
static bool measure(demo *d, const char *dir, outcome *result)
{
    apt_ctx *ctx = ex_run_context(d->threads, NULL, &d->error);
    apt_model *model = NULL;
    apt_model_info info;
    ex_score_info score;
    char *file = ex_path(dir, "model.safetensors");
    bool fine = ctx != NULL && (apt_model_load(ctx, dir, NULL, &model) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx)));
    for (int pass = 0; fine && pass < (d->fast ? 2 : 5); pass++) {
        fine = ex_score(ctx, model, &d->test, NULL, NULL, &score, &d->error);
        const double speed = fine ? (double)score.tokens / score.seconds : 0;
        if (speed > result->tokens_per_second) result->tokens_per_second = speed;
    }
    if (fine) {
        apt_model_query(model, &info);
        result->accuracy = (double)score.correct / (double)d->test.count;
        result->parameters = info.parameters;
        result->disk = ex_file_bytes(file);
    }
    apt_destroy(ctx);
    free(file);
    return fine;
}

static bool adapt_with(demo *d, apt_ctx *ctx, apt_model *model, int32_t method, const char *dir, outcome *result)
{
    ex_feed feed;
    ex_log log;
    ex_run run;
    apt_model_info info;
    char *log_path = ex_path(dir, "metrics.jsonl");
    memset(&feed, 0, sizeof(feed));
    memset(&log, 0, sizeof(log));
    memset(&run, 0, sizeof(run));
    feed.set = &d->train;
    feed.batch = 32;
    feed.seed = (uint64_t)d->seed;
    run.name = result->name;
    run.ctx = ctx;
    run.model = model;
    run.feed = &feed;
    run.evaluate = evaluate_dev;
    run.user = d;
    run.log_path = log_path;
    run.log = &log;
    run.error = &d->error;
    training_plan(d, &run, method);
    bool fine = check_end(d, ex_run_train(&run));
    if (fine) {
        apt_model_query(run.model, &info);
        result->kept = (double)info.prunable / (double)info.prunable_dense;
        result->times = ex_run_times(&run);
        result->peak = run.state.peak_bytes;
        fine = ex_run_save(&run, dir, d->base) && measure(d, dir, result);
    }
    ex_log_close(&log);
    ex_feed_free(&feed);
    free(log_path);
    return fine;
}

static bool adapt(demo *d, int32_t method, const char *name, const char *folder, outcome *result)
{
    apt_load_desc load = APT_ZERO;
    apt_model *model = NULL;
    char *dir = ex_path(d->out, folder);
    apt_ctx *ctx = ex_run_context(d->threads, NULL, &d->error);
    memset(result, 0, sizeof(*result));
    result->name = name;
    load.task = APT_TASK_CLASSIFY;
    load.labels = 2;
    load.seed = (uint64_t)d->seed;
    const bool fine = ctx != NULL && ex_make_dirs(dir, &d->error) &&
                      (apt_model_load(ctx, d->base, &load, &model) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx))) &&
                      adapt_with(d, ctx, model, method, dir, result);
    if (fine) printf("  test accuracy %.1f %%, %.0f %% of the prunable parameters left\n", 100 * result->accuracy, 100 * result->kept);
    apt_destroy(ctx);
    free(dir);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ table and report */

static void put_outcome(ex_table *table, ex_report *report, const outcome *r)
{
    char text[32], time[32];
    struct { const char *name; char value[32]; } cell[9] = {{"accuracy", ""}, {"parameters", ""}, {"prunable left", ""}, {"on disk", ""},
        {"ms/step start", ""}, {"ms/step end", ""}, {"teacher ms", ""}, {"inference tok/s", ""}, {"peak memory", ""}};
    snprintf(cell[0].value, sizeof(cell[0].value), "%.1f %%", 100 * r->accuracy);
    snprintf(cell[1].value, sizeof(cell[1].value), "%s", ex_count_text(text, sizeof(text), (double)r->parameters));
    if (r->disk > 0) {
        snprintf(cell[2].value, sizeof(cell[2].value), "%.1f %%", 100 * r->kept);
        snprintf(cell[3].value, sizeof(cell[3].value), "%s", ex_bytes_text(text, sizeof(text), (double)r->disk));
        snprintf(cell[4].value, sizeof(cell[4].value), "%.1f", r->times.first);
        snprintf(cell[5].value, sizeof(cell[5].value), "%.1f", r->times.last);
        snprintf(time, sizeof(time), "%.1f", r->times.teacher);
        snprintf(cell[6].value, sizeof(cell[6].value), "%s", r->times.teacher > 0 ? time : "-");
        snprintf(cell[7].value, sizeof(cell[7].value), "%s", ex_count_text(text, sizeof(text), r->tokens_per_second));
        snprintf(cell[8].value, sizeof(cell[8].value), "%s", ex_bytes_text(text, sizeof(text), (double)r->peak));
    }
    ex_table_cell(table, "%s", r->name);
    for (int i = 0; i < 9; i++) {
        ex_table_cell(table, "%s", cell[i].value[0] != 0 ? cell[i].value : "-");
        ex_report_result(report, r->name, cell[i].name, cell[i].value[0] != 0 ? cell[i].value : "-");
    }
}

static bool conclude(demo *d, const outcome *results, int32_t count)
{
    static const char *const heads[] = {"", "accuracy", "parameters", "prunable left", "on disk", "ms/step start", "ms/step end",
                                        "+ teacher", "inference tok/s", "peak memory"};
    static const char *const folders[] = {NULL, "lora", "apt", "prune-after"};
    ex_report *report = ex_report_create("apt.h demo: a tiny BERT adapted three ways");
    ex_table table;
    char *path = ex_path(d->out, "report.html"), *pretraining = ex_path(d->out, "pretrain.jsonl");
    bool fine = true;
    memset(&table, 0, sizeof(table));
    table.columns = (int32_t)COUNT(heads);
    for (uint32_t i = 0; i < COUNT(heads); i++) ex_table_cell(&table, "%s", heads[i]);
    for (int32_t i = 0; fine && i < count; i++) {
        put_outcome(&table, report, &results[i]);
        char *log = folders[i] != NULL ? ex_format("%s/%s/metrics.jsonl", d->out, folders[i]) : NULL;
        fine = log == NULL || ex_report_add_metrics(report, results[i].name, log, &d->error);
        free(log);
    }
    fine = fine && ex_report_add_metrics(report, "pretraining", pretraining, &d->error) && ex_report_write(report, path, &d->error);
    if (fine) {
        printf("\n");
        ex_table_print(&table, stdout);
        printf("\nTest sentences were never trained on. ms/step: median of the first and of the last %d steps, the teacher's forward apart.\n"
               "Parameters, disk and inference are those of the saved folder, loaded again. Curves: %s\n", EX_TIMED, path);
    }
    ex_table_free(&table);
    ex_report_free(report);
    free(path);
    free(pretraining);
    return fine;
}

static void stage(int32_t number, const char *text)
{
    printf("\n[%d/6] %s\n", (int)number, text);
    fflush(stdout);
}

static bool run_demo(demo *d)
{
    outcome results[4];
    memset(results, 0, sizeof(results));
    results[0].name = "bag of words";
    stage(1, "A corpus from a grammar: is the main statement good news?");
    if (!make_data(d)) return false;
    results[0].accuracy = bag_of_words(d, &results[0].parameters);
    printf("  a bag of words gets %.1f %% of the test sentences right\n", 100 * results[0].accuracy);
    stage(2, "Pretraining a tiny BERT (4 layers, d 128, 8 heads, 512 neurons) by masked language modelling");
    if (!pretrain(d)) return false;
    stage(3, "Adapting it with LoRA, nothing pruned");
    if (!adapt(d, 0, "LoRA", "lora", &results[1])) return false;
    stage(4, "Adapting it with APT: 60 % of the prunable parameters go while it learns");
    if (!adapt(d, 1, "APT 60 %", "apt", &results[2])) return false;
    stage(5, "Adapting it with LoRA, then pruning 60 % at once, then recovering");
    if (!adapt(d, 2, "prune after 60 %", "prune-after", &results[3])) return false;
    stage(6, "Results");
    return conclude(d, results, 4);
}

static void demo_free(demo *d)
{
    ex_dataset_free(&d->corpus);
    ex_dataset_free(&d->train);
    ex_dataset_free(&d->dev);
    ex_dataset_free(&d->test);
    ex_tokenizer_free(d->tokenizer);
    arrfree(d->mask_labels);
    ex_map_free(&d->seen);
    free(d->base);
}

int main(int argc, char **argv)
{
    demo d;
    memset(&d, 0, sizeof(d));
    d.seed = 1;
    d.out = "build/demo-run";
    const ex_arg table[] = {
        EX_INT("seed", "N", &d.seed, 0, 1e9, "another corpus and another start"),
        EX_INT("threads", "N", &d.threads, 0, 64, "threads to use; 0: all cores"),
        EX_TEXT("out", "DIR", &d.out, "folder for models, data and the report"),
        EX_FLAG("fast", &d.fast, "about ten seconds, for tests: everything runs, nothing is learned well"),
        EX_ARGS_END};
    const ex_args_about about = {"demo", "Pretrains a tiny BERT, adapts it with LoRA, APT and prune-after-training, and compares.", "[options]",
                                 "  demo\n  demo --seed 2 --out /tmp/demo\n"};
    const ex_args_result parsed = ex_args_parse(table, &about, argc, argv, &d.error);
    if (parsed == EX_ARGS_HELP) return 0;
    if (parsed == EX_ARGS_ERROR) {
        fprintf(stderr, "demo: %s\n", d.error.text);
        return 2;
    }
    d.base = ex_path(d.out, "tiny-bert");
    d.pretrain_steps = d.fast ? 60 : 1200;
    d.steps = d.fast ? 80 : 800;
    d.corpus_rows = d.fast ? 2000 : 30000;
    d.train_rows = d.fast ? 1000 : 4000;
    d.dev_rows = d.fast ? 200 : 500;
    d.test_rows = d.fast ? 200 : 2000;
    ex_run_catch_signals();
    const double start = ex_seconds();
    const bool fine = run_demo(&d);
    char time[32];
    if (fine) printf("Done in %s.\n", ex_time_text(time, sizeof(time), ex_seconds() - start));
    else fprintf(stderr, "\ndemo: %s\n", d.error.text);
    demo_free(&d);
    return fine ? 0 : ex_run_stopping() ? 130 : 1;
}
