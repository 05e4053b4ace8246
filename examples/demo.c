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
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_demo.h"
#include "common/ex_demo_bert.h"

static const ex_demo_plan g_plan = {
    EX_BERT_PLAN,
    .name = "demo",
    .summary = "Pretrains a tiny BERT, adapts it with LoRA, APT and prune-after-training.",
    .title = "apt.h demo: a tiny BERT adapted three ways",
    .sizes = {.pretrain_steps = 1200, .steps = 800, .corpus = 30000, .train = 4000, .dev = 500, .test = 2000},
    .fast = {.pretrain_steps = 60, .steps = 80, .corpus = 2000, .train = 1000, .dev = 200, .test = 200}};

int main(int argc, char **argv)
{
    ex_bert own;
    memset(&own, 0, sizeof(own));
    const int status = ex_demo_main(&g_plan, &own, argc, argv);
    ex_bert_free(&own);
    return status;
}
