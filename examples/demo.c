/* demo.c - what `make run` runs: apt.h from nothing to a smaller, faster classifier, in about two minutes on two cores.

       cc -O2 -std=c11 examples/demo.c -o demo -lm -lpthread -lutf8proc

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
#include "common/ex_grammar.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_result.h"

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

enum { WITH_LORA, WITH_APT, WITH_PRUNE_AFTER, WAYS };
static const struct { const char *name, *folder; } g_ways[WAYS] = {
    {"LoRA", "lora"}, {"APT 60 %", "apt"}, {"prune after 60 %", "prune-after"}};

/* ------------------------------------------------------------------------------------------------ data */

/* A file of sentences that no earlier one has, written, read again and tokenised. */
static bool make_file(demo *d, ex_dataset *set, const char *name, int64_t count, bool labelled, uint64_t *random)
{
    char *path = ex_path(d->out, name);
    ex_rows_desc desc;
    ex_rows rows;
    memset(&desc, 0, sizeof(desc));
    memset(&rows, 0, sizeof(rows));
    desc.kind = labelled ? EX_LABEL_CLASS : EX_LABEL_NONE;
    const bool fine = ex_grammar_write(path, count, labelled, random, &d->seen, &d->error) &&
                      ex_rows_read(&rows, path, &desc, &d->error) && ex_dataset_rows(set, &rows, d->tokenizer, 64, &d->error);
    ex_rows_free(&rows);
    free(path);
    return fine;
}

static void show_samples(uint64_t seed)
{
    ex_sentence s;
    for (int i = 0; i < 3; i++) {
        ex_sentence_make(&s, &seed, false);
        printf("    %-8s \"%s\"\n", s.label ? "good" : "not good", s.text);
    }
}

static bool make_data(demo *d)
{
    uint64_t random = (uint64_t)d->seed * 0x9e3779b97f4a7c15u + 1;
    if (!ex_grammar_write_vocabulary(d->base, &d->error)) return false;
    d->tokenizer = ex_tokenizer_load(d->base, &d->error);
    if (d->tokenizer == NULL || !make_file(d, &d->corpus, "corpus.tsv", d->corpus_rows, false, &random) ||
        !make_file(d, &d->train, "train.tsv", d->train_rows, true, &random) ||
        !make_file(d, &d->dev, "dev.tsv", d->dev_rows, true, &random) ||
        !make_file(d, &d->test, "test.tsv", d->test_rows, true, &random))
        return false;
    show_samples(random);
    printf("  %lld sentences to pretrain on, %lld labelled ones to adapt with, %lld to watch, %lld to test\n",
           (long long)d->corpus.count, (long long)d->train.count, (long long)d->dev.count, (long long)d->test.count);
    return true;
}

/* ------------------------------------------------------------------------------------------------ pretraining */

/* Masked language modelling: 15 % of the words are to be guessed, and half of the reactions at the end, which say most about
   the sentence. Of these 80 % become [MASK], 10 % a random word, 10 % stay. The choice depends on the seed and the place in
   the stream alone. */
static apt_batch mask_words(ex_run *run, ex_batch *batch)
{
    demo *d = (demo *)run->user;
    const int32_t mask = ex_tokenizer_special(d->tokenizer, EX_MASK), first = mask + 1, words = ex_tokenizer_size(d->tokenizer);
    uint64_t random = (uint64_t)d->seed + (uint64_t)run->feed.at.epoch * 0x100000001b3u + (uint64_t)run->feed.at.index;
    arrsetlen(d->mask_labels, (size_t)batch->offsets[batch->sequences]);
    for (int32_t s = 0; s < batch->sequences; s++) {
        const int32_t last = batch->offsets[s + 1] - 2;               /* before [SEP] */
        for (int32_t t = batch->offsets[s]; t <= last + 1; t++) {
            const bool chosen = batch->tokens[t] >= first && ex_chance(&random, t == last ? 0.5 : 0.15);
            d->mask_labels[t] = chosen ? batch->tokens[t] : -100;
            if (!chosen || ex_chance(&random, 0.1)) continue;
            batch->tokens[t] = ex_chance(&random, 1.0 / 9) ? first + (int32_t)ex_below(&random, (uint32_t)(words - first)) : mask;
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
    const int32_t best = fine ? ex_argmax(logits, words) : 0;
    if (fine)
        printf("    %s  ->  %s (%.0f %%)\n", text, ex_tokenizer_token(d->tokenizer, best),
               100 * ex_softmax_best(logits, words, best));
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

/* A demonstration is not worth a checkpoint. */
static bool trained(demo *d, ex_run *run)
{
    const ex_run_end end = ex_run_train(run);
    return end == EX_RUN_DONE || (end == EX_RUN_STOPPED && ex_fail(&d->error, "interrupted; nothing to keep, start again"));
}

static bool pretrain(demo *d)
{
    apt_config config;
    apt_model *model = NULL;
    ex_run run;
    apt_ctx *ctx = ex_run_context(d->threads, NULL, &d->error);
    tiny_bert(d, &config);
    bool fine = ctx != NULL && (apt_model_create(ctx, &config, (uint64_t)d->seed, &model) == APT_OK ||
                                ex_fail(&d->error, "%s", apt_error(ctx)));
    ex_run_init(&run, "masked LM", ctx, model, ex_dataset_source(&d->corpus), d->base, &d->error);
    run.feed.seed = run.desc.seed = (uint64_t)d->seed;
    run.desc.method = APT_METHOD_FULL;
    run.desc.steps = d->pretrain_steps;
    run.desc.learning_rate = 1e-3f;
    run.desc.warmup_steps = d->pretrain_steps / 20;
    run.prepare = mask_words;
    run.user = d;
    fine = fine && trained(d, &run) && ex_run_save(&run, NULL) &&
           ex_result_report(d->base, "apt.h demo: pretraining a tiny BERT", "masked LM", NULL, &d->error) &&
           show_guess(d, ctx, model, "the old cook was kind , so everyone [MASK]") &&
           show_guess(d, ctx, model, "the old cook was never kind , so everyone [MASK]") &&
           show_guess(d, ctx, model, "the cook who met the cruel clerk was not rude , so everyone [MASK]");
    ex_run_close(&run);
    apt_destroy(ctx);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ adapting, three ways */

static bool evaluate_dev(ex_run *run, double *metric)
{
    demo *d = (demo *)run->user;
    ex_score_info info;
    const ex_source dev = ex_dataset_source(&d->dev);
    if (!ex_score(run->ctx, run->model, &dev, NULL, NULL, &info, run->error)) return false;
    *metric = (double)info.correct / (double)d->dev.count;
    ex_progress_note(&run->bar, "  step %5lld  dev      accuracy %.1f %%", (long long)run->state.step, 100 * *metric);
    ex_log_begin(&run->log, "evaluate");
    ex_log_int(&run->log, "step", run->state.step);
    ex_log_real(&run->log, "accuracy", *metric);
    ex_log_real(&run->log, "dev_loss", info.loss);
    return ex_log_end(&run->log, run->error);
}

static void training_plan(const demo *d, ex_run *run, int32_t way)
{
    apt_train_desc *t = &run->desc;
    t->steps = d->steps;
    t->learning_rate = 2e-3f;
    t->warmup_steps = d->steps / 20;
    t->evaluate_every = d->steps / 8;
    t->seed = (uint64_t)d->seed;
    t->method = way == WITH_APT ? APT_METHOD_APT : APT_METHOD_LORA;
    if (way == WITH_APT) {
        t->target_sparsity = 0.6f;
        t->prune_begin = d->steps * 2 / 10;
        t->prune_end = d->steps * 6 / 10;
        t->update_frequency = (int32_t)((t->prune_end - t->prune_begin) / 10);
    } else if (way == WITH_PRUNE_AFTER) {
        run->prune_at = d->steps * 6 / 10;
        run->prune_sparsity = 0.6f;
        run->observe = 16;
    }
}

/* Accuracy and speed on the test sentences, the best of a few passes, with the folder that was just written. */
static bool measure(demo *d, const char *dir, ex_outcome *outcome, double *accuracy)
{
    ex_saved saved;
    ex_score_info score;
    const ex_source test = ex_dataset_source(&d->test);
    bool fine = ex_saved_open(&saved, outcome, dir, d->threads, NULL, &d->error);
    for (int pass = 0; fine && pass < (d->fast ? 2 : 5); pass++) {
        fine = ex_score(saved.ctx, saved.model, &test, NULL, NULL, &score, &d->error);
        const double speed = fine ? (double)score.tokens / score.seconds : 0;
        if (speed > outcome->tokens_per_second) outcome->tokens_per_second = speed;
    }
    if (fine) *accuracy = (double)score.correct / (double)d->test.count;
    ex_saved_close(&saved);
    return fine;
}

static bool adapt_with(demo *d, ex_run *run, int32_t way, ex_cells *cells)
{
    ex_outcome outcome;
    double accuracy = 0;
    memset(&outcome, 0, sizeof(outcome));
    run->feed.seed = (uint64_t)d->seed;
    run->evaluate = evaluate_dev;
    run->user = d;
    training_plan(d, run, way);
    if (!trained(d, run)) return false;
    ex_outcome_of_run(&outcome, run);
    if (!ex_run_save(run, d->base) || !measure(d, run->dir, &outcome, &accuracy)) return false;
    printf("  test accuracy %.1f %%, %.0f %% of the prunable parameters left\n", 100 * accuracy, 100 * outcome.kept);
    ex_cell(cells, "accuracy", "%.1f %%", 100 * accuracy);
    ex_cells_outcome(cells, &outcome);
    return true;
}

static bool adapt(demo *d, int32_t way, ex_cells *cells)
{
    apt_load_desc load = APT_ZERO;
    apt_model *model = NULL;
    ex_run run;
    char *dir = ex_path(d->out, g_ways[way].folder);
    apt_ctx *ctx = ex_run_context(d->threads, NULL, &d->error);
    cells->run = g_ways[way].name;
    load.task = APT_TASK_CLASSIFY;
    load.labels = 2;
    load.seed = (uint64_t)d->seed;
    bool fine = ctx != NULL && ex_make_dirs(dir, &d->error) &&
                (apt_model_load(ctx, d->base, &load, &model) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx)));
    ex_run_init(&run, cells->run, ctx, model, ex_dataset_source(&d->train), dir, &d->error);
    fine = fine && adapt_with(d, &run, way, cells);
    ex_run_close(&run);
    apt_destroy(ctx);
    free(dir);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ the whole of it */

static bool conclude(demo *d, const ex_cells *cells, int32_t count)
{
    ex_report *report = ex_report_create("apt.h demo: a tiny BERT adapted three ways");
    char *path = ex_path(d->out, "report.html");
    bool fine = true;
    for (int32_t i = 0; i < count; i++) ex_cells_report(&cells[i], report);
    for (int32_t i = 0; fine && i < WAYS; i++) {
        char *log = ex_format("%s/%s/metrics.jsonl", d->out, g_ways[i].folder);
        fine = ex_report_add_metrics(report, g_ways[i].name, log, &d->error);
        free(log);
    }
    fine = fine && ex_report_write(report, path, &d->error);
    if (fine) {
        printf("\n");
        ex_cells_print(cells, count, stdout);
        printf("\nTest sentences were never trained on. Steps: medians of the first and last %d, the teacher's forward apart.\n"
               "Parameters, disk and inference are those of the saved folder, loaded again. Curves: %s\n", EX_TIMED, path);
    }
    ex_report_free(report);
    free(path);
    return fine;
}

static void stage(int32_t number, const char *text)
{
    printf("\n[%d/6] %s\n", (int)number, text);
    fflush(stdout);
}

static bool run_demo(demo *d)
{
    ex_cells cells[1 + WAYS];
    memset(cells, 0, sizeof(cells));
    stage(1, "A corpus from a grammar: is the main statement good news?");
    if (!make_data(d)) return false;
    const int32_t words = ex_tokenizer_size(d->tokenizer);
    const double bag = ex_bag_of_words(&d->train, &d->test, words, (uint64_t)d->seed);
    printf("  a bag of words gets %.1f %% of the test sentences right\n", 100 * bag);
    cells[0].run = "bag of words";
    ex_cell(&cells[0], "accuracy", "%.1f %%", 100 * bag);
    ex_cell(&cells[0], "parameters", "%d", (int)words + 1);
    stage(2, "Pretraining a tiny BERT (4 layers, d 128, 8 heads, 512 neurons) by masked language modelling");
    if (!pretrain(d)) return false;
    stage(3, "Adapting it with LoRA, nothing pruned");
    if (!adapt(d, WITH_LORA, &cells[1])) return false;
    stage(4, "Adapting it with APT: 60 % of the prunable parameters go while it learns");
    if (!adapt(d, WITH_APT, &cells[2])) return false;
    stage(5, "Adapting it with LoRA, then pruning 60 % at once, then recovering");
    if (!adapt(d, WITH_PRUNE_AFTER, &cells[3])) return false;
    stage(6, "Results");
    return conclude(d, cells, 1 + WAYS);
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
    const ex_args_about about = {"demo", "Pretrains a tiny BERT, adapts it with LoRA, APT and prune-after-training.", "[options]",
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
