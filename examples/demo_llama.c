/* demo_llama.c - what `make run-llama` runs: a LLaMA from nothing to a smaller, faster one that tells stories, in about two
   minutes on two cores.

       cc -O2 -std=c11 examples/demo_llama.c -o demo_llama -lm -lpthread -lutf8proc

   No arguments, no network, no data files: a tiny LLaMA is pretrained on a grammar's sentences, each about one person. It is
   then adapted to stories in which two people and what is said of them have to be kept apart, with LoRA, APT and
   prune-after-training at equal numbers of steps. The quality is the perplexity of stories that nobody has seen. Everything in
   the table is measured. */
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
#include "common/ex_grammar_text.h"
#include "common/ex_token_rows.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_lm.h"
#include "common/ex_demo.h"

typedef struct demo { ex_lm lm; ex_lm_file file[EX_DEMO_SETS]; } demo;

static const char g_prompt[] = "the cook was never kind and the old judge was brave , so everyone who met the judge";

/* ------------------------------------------------------------------------------------------------ data */

static bool make_file(ex_demo *d, ex_demo_set which, const char *name, const char *what, int64_t count)
{
    demo *own = (demo *)d->user;
    ex_lm_file *file = &own->file[which];
    char *path = ex_path(d->out, name);
    const ex_grammar_kind kind = which == EX_DEMO_CORPUS ? EX_GRAMMAR_SENTENCE : EX_GRAMMAR_STORY;
    file->path = path;
    const bool fine = ex_grammar_write_text(path, count, kind, &d->random, &d->seen, &d->error) &&
                      ex_lm_read(&own->lm, file, what, 0);
    file->path = NULL;
    free(path);
    return fine;
}

/* Perplexity of a table of pairs of words (every count begins with 0.1): what can be had from the last word alone. */
static double bigrams(const ex_token_rows *train, const ex_token_rows *test, int32_t words)
{
    double *count = (double *)ex_alloc((size_t)words * (size_t)(words + 1), sizeof(double)), sum = 0;
    int64_t terms = 0;
    for (int64_t i = 0; i < (int64_t)words * (words + 1); i++) count[i] = i % (words + 1) == words ? 0.1 * words : 0.1;
    for (int pass = 0; pass < 2; pass++) {
        const ex_token_rows *set = pass == 0 ? train : test;
        for (int64_t s = 0; s < set->sequences; s++) {
            for (int64_t t = set->starts[s] + 1; t < set->starts[s + 1]; t++) {
                double *row = count + (int64_t)set->tokens[t - 1] * (words + 1);
                if (pass == 0) row[set->tokens[t]] += 1, row[words] += 1;
                else sum -= log(row[set->tokens[t]] / row[words]), terms++;
            }
        }
    }
    free(count);
    return ex_perplexity(sum, terms);
}

static bool make_data(ex_demo *d, ex_cells *baseline)
{
    demo *own = (demo *)d->user;
    own->lm.length = 64;
    own->lm.error = &d->error;
    if (!ex_grammar_write_tokenizer(d->base, "<s>", NULL, &d->error)) return false;
    own->lm.tokenizer = d->tokenizer = ex_tokenizer_load(d->base, &d->error);
    if (d->tokenizer == NULL) return false;
    d->plan->shape(d, &own->lm.config);
    if (!make_file(d, EX_DEMO_CORPUS, "corpus.txt", "corpus", d->sizes.corpus) ||
        !make_file(d, EX_DEMO_TRAIN, "train.txt", "stories", d->sizes.train) ||
        !make_file(d, EX_DEMO_DEV, "dev.txt", "dev", d->sizes.dev) ||
        !make_file(d, EX_DEMO_TEST, "test.txt", "test", d->sizes.test))
        return false;
    const int32_t words = ex_tokenizer_size(d->tokenizer);
    const double pairs = bigrams(&own->file[EX_DEMO_TRAIN].rows, &own->file[EX_DEMO_TEST].rows, words);
    uint64_t random = d->random;
    ex_sentence s;
    for (int i = 0; i < 3; i++) {
        exi_grammar_story(&s, &random);
        printf("    %s .\n", s.text);
    }
    printf("  a table of pairs of words has a perplexity of %.2f\n", pairs);
    baseline->run = "word pairs";
    ex_cell(baseline, "perplexity", "%.3f", pairs);
    ex_cell(baseline, "parameters", "%d", (int)(words * words));
    return true;
}

static ex_source rows(const ex_demo *d, ex_demo_set which)
{
    return ex_token_rows_source(&((const demo *)d->user)->file[which].rows);
}

/* ------------------------------------------------------------------------------------------------ the model */

static void tiny_llama(const ex_demo *d, apt_config *config)
{
    config->family = APT_LLAMA;
    config->task = APT_TASK_LM;
    config->vocab = ex_tokenizer_size(d->tokenizer);
    config->end_id = ex_tokenizer_special(d->tokenizer, EX_EOS);
    config->positions = 128;
    config->hidden = 128;
    config->head_dim = 16;
    config->heads = 8;
    config->kv_heads = 4;
    config->neurons = 384;
    config->layers = 4;
    config->init_range = 0.08f;       /* about 1/sqrt(hidden) */
}

static bool show(ex_demo *d, apt_ctx *ctx, apt_model *model)
{
    const demo *own = (const demo *)d->user;
    ex_sampling how;
    ex_text answer = {NULL, 0, 0};
    ex_sampling_init(&how, 8);
    printf("    %s ...", g_prompt);
    const bool fine = ex_lm_write(&own->lm, ctx, model, g_prompt, &how, &answer, NULL);
    printf("\n");
    ex_text_free(&answer);
    return fine;
}

static bool score(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_demo_set which, ex_scores *scores, ex_score_info *info)
{
    const demo *own = (const demo *)d->user;
    return ex_lm_evaluate(&own->lm, ctx, model, &own->file[which], scores, info);
}

static void quality(const ex_scores *scores, ex_cells *cells)
{
    ex_cell(cells, "perplexity", "%.3f", scores->chosen);
}

/* One text of 100 tokens, token by token. */
static bool decode(ex_demo *d, apt_ctx *ctx, apt_model *model, int64_t *tokens)
{
    enum { LENGTH = 100 };
    int32_t length = 0, written[LENGTH], offsets[2] = {0, 1}, begin = ex_tokenizer_special(d->tokenizer, EX_BOS);
    apt_generate_desc desc = APT_ZERO;
    apt_batch batch = APT_ZERO;
    batch.sequences = 1;
    batch.offsets = offsets;
    batch.tokens = &begin;
    desc.max_tokens = LENGTH;
    desc.ignore_end = 1;
    *tokens = LENGTH;
    return apt_generate(model, &batch, &desc, written, &length) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx));
}

static const ex_demo_plan g_plan = {
    .name = "demo_llama",
    .summary = "Pretrains a tiny LLaMA, adapts it with LoRA, APT and prune-after-training.",
    .title = "apt.h demo: a tiny LLaMA adapted three ways",
    .model = "tiny-llama",
    .data = "Sentences from a grammar, and stories with two people",
    .pretraining = "Pretraining a tiny LLaMA (4 layers, d 128, 8 heads in 4 groups, 384 neurons) on sentences about one person",
    .objective = "next word",
    .sizes = {.pretrain_steps = 900, .steps = 600, .corpus = 30000, .train = 6000, .dev = 300, .test = 1000},
    .fast = {.pretrain_steps = 30, .steps = 40, .corpus = 1000, .train = 500, .dev = 32, .test = 64},
    .batch = 8,
    .pretrain_rate = 2e-3f,
    .rate = 3e-3f,
    .make_data = make_data,
    .shape = tiny_llama,
    .show = show,
    .rows = rows,
    .score = score,
    .quality = quality,
    .decode = decode};

int main(int argc, char **argv)
{
    demo own;
    memset(&own, 0, sizeof(own));
    const int status = ex_demo_main(&g_plan, &own, argc, argv);
    for (int i = 0; i < EX_DEMO_SETS; i++) ex_lm_file_free(&own.file[i]);
    return status;
}
