/* demo_t5.c - what `make run-t5` runs: a T5 from nothing to a smaller, faster one that puts facts into words, in less
   than two minutes on two cores.

       cc -O2 -std=c11 examples/demo_t5.c -o demo_t5 -lm -lpthread -lutf8proc

   No arguments, no network, no data files: a tiny T5 is pretrained on a grammar's sentences, which are to be put in order or
   turned into facts. It is then adapted to tell lists of facts ("who : cook ; denied : never ; nature : kind") as sentences ("the
   cook was never kind , so everyone sighed"), with LoRA, APT and prune-after-training at equal numbers of steps. Everything in
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
#include "common/ex_t2t.h"
#include "common/ex_demo.h"

typedef struct demo { ex_t2t t2t; ex_t2t_file file[EX_DEMO_SETS]; } demo;

/* ------------------------------------------------------------------------------------------------ data */

static bool make_file(ex_demo *d, ex_demo_set which, const char *name, const char *what, int64_t count)
{
    demo *own = (demo *)d->user;
    ex_t2t_file *file = &own->file[which];
    char *path = ex_path(d->out, name);
    const ex_grammar_kind kind = which == EX_DEMO_CORPUS ? EX_GRAMMAR_SHUFFLED : EX_GRAMMAR_FACTS;
    file->path = path;
    const bool fine = ex_grammar_write_text(path, count, kind, &d->random, &d->seen, &d->error) &&
                      ex_t2t_read(&own->t2t, file, what, d->base, 0);
    file->path = NULL;
    free(path);
    return fine;
}

static bool make_data(ex_demo *d, ex_cells *baseline)
{
    demo *own = (demo *)d->user;
    ex_lm *lm = &own->t2t.lm;
    (void)baseline;
    own->t2t.max_source = own->t2t.max_target = 64;
    own->t2t.metric = EX_T2T_EXACT;
    ex_sampling_init(&own->t2t.how, 32);
    lm->error = &d->error;
    if (!ex_grammar_write_tokenizer(d->base, NULL, "</s>", &d->error)) return false;
    lm->tokenizer = d->tokenizer = ex_tokenizer_load(d->base, &d->error);
    if (lm->tokenizer == NULL) return false;
    d->plan->shape(d, &lm->config);
    if (!make_file(d, EX_DEMO_CORPUS, "corpus.tsv", "corpus", d->sizes.corpus) ||
        !make_file(d, EX_DEMO_TRAIN, "train.tsv", "train", d->sizes.train) ||
        !make_file(d, EX_DEMO_DEV, "dev.tsv", "dev", d->sizes.dev) ||
        !make_file(d, EX_DEMO_TEST, "test.tsv", "test", d->sizes.test))
        return false;
    for (int i = 0; i < 3; i++) {
        const ex_pair *pair = &own->file[EX_DEMO_TEST].pairs.pair[i];
        printf("    %s\n      ->  %s\n", pair->source, pair->target);
    }
    return true;
}

static ex_source rows(const ex_demo *d, ex_demo_set which)
{
    return ex_t2t_source(&((const demo *)d->user)->file[which].set);
}

/* ------------------------------------------------------------------------------------------------ the model */

static void tiny_t5(const ex_demo *d, apt_config *config)
{
    config->family = APT_T5;
    config->task = APT_TASK_LM;
    config->vocab = ex_tokenizer_size(d->tokenizer);
    config->pad_id = config->start_id = ex_tokenizer_special(d->tokenizer, EX_PAD);
    config->end_id = ex_tokenizer_special(d->tokenizer, EX_EOS);
    config->positions = 64;
    config->hidden = 128;
    config->head_dim = 16;
    config->heads = 8;
    config->neurons = 512;
    config->layers = 3 * 2;
    config->decoder_layers = 2;
    config->scaled_head = 1;
}

/* A T5 knows places only by its position biases. They begin near 0, and Adam moves a number by its learning rate at most: in a
   run this short they stay so small that words have no order ("the clerk who saw the sailor" is also the other way round), and
   no adapter repairs that. Here they begin as those of trained models end: most heads look at one distance, the last two look
   everywhere. bias: [buckets][heads]; distances up to 7 have buckets of their own, ahead those in the encoder's upper half. */
static bool find_places(ex_demo *d, apt_ctx *ctx, apt_model *model)
{
    enum { HEADS = 8, BUCKETS = 32, AHEAD = BUCKETS / 2, FREE = 2 };
    static const int looks[2][HEADS - FREE] = {{1, 2, 3, AHEAD + 1, AHEAD + 2, AHEAD + 3}, {1, 2, 3, 4, 5, 6}};
    static const char *const names[2] = {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                                         "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"};
    float bias[BUCKETS * HEADS];
    bool fine = true;
    for (int s = 0; fine && s < 2; s++) {
        fine = apt_model_get(model, names[s], bias, BUCKETS * HEADS) == APT_OK;
        for (int h = 0; fine && h < HEADS - FREE; h++) bias[looks[s][h] * HEADS + h] += 4;
        fine = fine && apt_model_set(model, names[s], bias, BUCKETS * HEADS) == APT_OK;
    }
    return fine || ex_fail(&d->error, "%s", apt_error(ctx));
}

static bool show(ex_demo *d, apt_ctx *ctx, apt_model *model)
{
    static const char *const source = "was not kind everyone sighed the old cook , so";
    const demo *own = (const demo *)d->user;
    ex_text answer = {NULL, 0, 0};
    printf("    %s\n      ->  ", source);
    const bool fine = ex_lm_write(&own->t2t.lm, ctx, model, source, &own->t2t.how, &answer, NULL);
    printf("\n");
    ex_text_free(&answer);
    return fine;
}

static bool score(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_demo_set which, ex_scores *scores, ex_score_info *info)
{
    const demo *own = (const demo *)d->user;
    return ex_t2t_evaluate(&own->t2t, ctx, model, &own->file[which], scores, info);
}

static void quality(const ex_scores *scores, ex_cells *cells)
{
    ex_cell(cells, "exact match", "%.1f %%", scores->value[EX_T2T_EXACT]);
    ex_cell(cells, "ROUGE-L", "%.1f %%", scores->value[EX_T2T_ROUGE_L]);
}

/* 32 sentences of 24 tokens, written together. */
static bool decode(ex_demo *d, apt_ctx *ctx, apt_model *model, int64_t *tokens)
{
    enum { TOGETHER = 32, LENGTH = 24 };
    int32_t lengths[TOGETHER], written[TOGETHER * LENGTH];
    int64_t index[TOGETHER];
    const ex_source test = rows(d, EX_DEMO_TEST);
    apt_generate_desc desc = APT_ZERO;
    ex_batch batch;
    memset(&batch, 0, sizeof(batch));
    for (int i = 0; i < TOGETHER; i++) index[i] = i;
    test.gather(&batch, test.set, index, TOGETHER);
    apt_batch view = ex_batch_apt(&batch);
    view.labels = view.target_offsets = NULL;
    desc.max_tokens = LENGTH;
    desc.ignore_end = 1;
    const bool fine = apt_generate(model, &view, &desc, written, lengths) == APT_OK || ex_fail(&d->error, "%s", apt_error(ctx));
    ex_batch_free(&batch);
    *tokens = TOGETHER * LENGTH;
    return fine;
}

static const ex_demo_plan g_plan = {
    .name = "demo_t5",
    .summary = "Pretrains a tiny T5, adapts it with LoRA, APT and prune-after-training.",
    .title = "apt.h demo: a tiny T5 adapted three ways",
    .model = "tiny-t5",
    .data = "Sentences from a grammar, and facts that are to be told",
    .pretraining = "Pretraining a tiny T5 (2 + 2 blocks, d 128, 8 heads, 512 neurons): sentences in pieces, facts of sentences",
    .objective = "sentences and facts",
    .sizes = {.pretrain_steps = 1200, .steps = 300, .corpus = 30000, .train = 4000, .dev = 128, .test = 512},
    .fast = {.pretrain_steps = 30, .steps = 40, .corpus = 1000, .train = 500, .dev = 32, .test = 64},
    .batch = 32,
    .pretrain_rate = 2e-3f,
    .rate = 3e-3f,
    .make_data = make_data,
    .shape = tiny_t5,
    .begin = find_places,
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
    for (int i = 0; i < EX_DEMO_SETS; i++) ex_t2t_file_free(&own.file[i]);
    return status;
}
