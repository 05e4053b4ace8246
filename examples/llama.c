/* llama.c - tunes, prunes and shrinks any Hugging Face LLaMA or Qwen2 checkpoint folder on the CPU, and writes text with it.

       cc -O2 -std=c11 examples/llama.c -o llama -lm -lpthread -lutf8proc

       llama --model DIR --train train.txt --dev dev.txt --method apt --sparsity 0.6 --out DIR
       llama --model DIR --train alpaca.json --dev dev.json --method prune-first --out DIR
       llama --model DIR --dev dev.txt --method perplexity
       llama --model DIR --prompt "Once upon a time" --method generate
       llama --import stories260K.bin --tokenizer tok512.bin --out DIR
       llama --help

   Plain text is learned in blocks; of instructions with answers (Alpaca's JSON or JSONL, CSV, TSV) only the answers are learned,
   and several of them share a row. The result folder is a smaller checkpoint (config.json, model.safetensors, tokenizer) that
   --model takes again, with metrics.jsonl and report.html. Ctrl-C saves; --resume goes on bit for bit. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "common/ex_log.h"
#include "common/ex_args.h"
#include "common/ex_tokenizer.h"
#include "common/ex_data.h"
#include "common/ex_token_rows.h"
#include "common/ex_metrics.h"
#include "common/ex_progress.h"
#include "common/ex_report.h"
#include "common/ex_run.h"
#include "common/ex_options.h"
#include "common/ex_result.h"
#include "common/ex_program.h"
#include "common/ex_lm.h"
#include "common/ex_llama2c.h"

enum { METHOD_PERPLEXITY = EX_METHODS_SHARED, METHOD_GENERATE, METHOD_CHAT };
static const char *const g_methods[] = {"apt", "lora", "full", "prune-after", "prune-first", "perplexity", "generate", "chat"};
enum { FORM_AUTO, FORM_PLAIN, FORM_ALPACA };

typedef struct app {
    ex_program p;                     /* what every training example has */
    ex_lm lm;
    ex_sampling how;
    const char *prompt, *import, *tokenizer;
    int32_t form;
    ex_lm_file train, dev;
    ex_text talk;                     /* chat: all turns until now */
} app;

/* ------------------------------------------------------------------------------------------------ arguments */

static const ex_args_about g_about = {
    "llama", "Tunes, prunes and shrinks a LLaMA or Qwen2 checkpoint on the CPU, and writes text with it.",
    "--model DIR --train FILE --dev FILE --out DIR [options]",
    "  llama --model base --train train.txt --dev dev.txt --method apt --sparsity 0.6 --out small\n"
    "  llama --model base --train alpaca.json --dev dev.json --method prune-first --epochs 2 --out tuned\n"
    "  llama --model small --dev dev.txt --method perplexity\n"
    "  llama --model small --method generate --prompt \"Once upon a time\" --temperature 0.8 --top-p 0.9\n"
    "  llama --model tuned --method chat\n"
    "  llama --import stories260K.bin --tokenizer tok512.bin --out base\n"};

/* The table points into *a, whose present values are the defaults that --help shows. */
static ex_arg *make_table(app *a)
{
    const ex_arg rows[] = {
        EX_GROUP("Data"),
        EX_TEXT("model", "DIR", &a->p.model, "LLaMA or Qwen2 folder: config.json, safetensors, tokenizer"),
        EX_TEXT("train", "FILE", &a->train.path, ".json, .jsonl, .csv, .tsv: prompts with answers; any other name: plain text"),
        EX_TEXT("dev", "FILE", &a->dev.path, "the same kinds, to evaluate on"),
        EX_TEXT("out", "DIR", &a->p.out, "receives the smaller model, metrics.jsonl, report.html"),
        EX_INT("limit", "N", &a->p.limit, 0, 1e12, "training examples to read of a file with answers; 0: all"),
        EX_INT("length", "N", &a->lm.length, 0, 1e6, "tokens of a row; 0: 256, or the model's positions if fewer"),
        EX_FLAG("pack", &a->lm.pack, "examples with answers share a row, without seeing each other"),
        EX_FLAG("learn-prompt", &a->lm.learn_prompt, "learn the prompts, too, not only the answers"),
        EX_TEXT("import", "FILE", &a->import, "alone: a llama2.c checkpoint (.bin) that becomes folder OUT"),
        EX_TEXT("tokenizer", "FILE", &a->tokenizer, "import: the tokenizer of that checkpoint (.bin)"),
        EX_GROUP("Method"),
        EX_CHOICE("method", &a->p.method, EX_METHODS "|perplexity|generate|chat",
                  "apt: prune while tuning; prune-first: prune at once (30 %), then LoRA; prune-after: LoRA, prune, LoRA; "
                  "perplexity: measure --dev; generate: go on with --prompt; chat: answer every line of stdin"),
        EX_OPTIONS_ROWS(&a->p.options),
        EX_GROUP("Writing"),
        EX_TEXT("prompt", "TEXT", &a->prompt, "generate: the text to go on with"),
        EX_CHOICE("template", &a->form, "auto|plain|alpaca", "the prompt as it is, or as an instruction; auto: chat only"),
        EX_SAMPLING_ROWS(&a->how),
        EX_ARGS_END};
    return ex_program_table(rows, sizeof(rows));
}

static bool check_import(app *a)
{
    if (a->p.model != NULL || a->train.path != NULL || a->dev.path != NULL)
        return ex_fail(&a->p.error, "--import stands alone: the folder that it makes is the --model of further commands");
    if (a->tokenizer == NULL || a->p.out == NULL) return ex_fail(&a->p.error, "--import needs --tokenizer FILE and --out DIR");
    a->p.options.resume = false;
    return ex_options_check_out(&a->p.options, a->import, a->p.out, &a->p.error);
}

/* What the table cannot check: which options belong together. */
static bool check_options(void *user)
{
    app *a = (app *)user;
    ex_program *p = &a->p;
    a->how.seed = p->options.seed;
    if (p->method == EX_METHOD_PRUNE_FIRST && !ex_args_given(p->table, "sparsity")) p->options.sparsity = 0.3;
    if (a->import != NULL) return check_import(a);
    if (a->tokenizer != NULL) return ex_fail(&p->error, "--tokenizer goes with --import; a --model folder has its own");
    if (p->model == NULL) return ex_fail(&p->error, "--model DIR is missing");
    if (!ex_sampling_check(&a->how, &p->error)) return false;
    if (p->method == METHOD_PERPLEXITY && a->dev.path == NULL)
        return ex_fail(&p->error, "--method perplexity needs --dev FILE");
    return ex_program_check(p, a->train.path, p->model);
}

/* ------------------------------------------------------------------------------------------------ training */

static bool evaluate(void *user, apt_ctx *ctx, apt_model *model, ex_scores *scores, ex_score_info *info)
{
    const app *a = (const app *)user;
    return ex_lm_evaluate(&a->lm, ctx, model, &a->dev, scores, info);
}

static int train(app *a)
{
    const ex_token_rows *rows = &a->train.rows;
    ex_training t;
    memset(&t, 0, sizeof(t));
    t.program = &a->p;
    t.train = a->train.path;
    t.dev = a->dev.path;
    t.tokenizer = a->p.model;
    t.rows = ex_token_rows_source(rows);
    t.rows_name = "rows";
    t.longest = a->train.longest;
    t.sequences = a->train.sequences;
    t.data = ex_format("%lld rows, %lld tokens to learn, at most %lld each", (long long)rows->rows, (long long)rows->learned,
                       (long long)a->train.longest);
    t.evaluate = evaluate;
    return ex_program_train(&t);
}

static bool measure(app *a)
{
    ex_scores scores;
    ex_score_info info;
    if (!ex_lm_evaluate(&a->lm, a->p.ctx, a->p.loaded, &a->dev, &scores, &info)) return false;
    ex_scores_print(&scores, &info);
    return true;
}

/* ------------------------------------------------------------------------------------------------ writing */

static bool generate(app *a)
{
    char *text = ex_lm_clean(a->prompt);
    char *prompt = a->form == FORM_ALPACA ? ex_alpaca_prompt(text, NULL) : ex_copy(text, strlen(text));
    ex_text answer = {NULL, 0, 0};
    if (a->form != FORM_ALPACA) fputs(prompt, stdout);
    const bool fine = ex_lm_answer(&a->lm, a->p.ctx, a->p.loaded, prompt, &a->how, &answer);
    ex_text_free(&answer);
    free(prompt);
    free(text);
    return fine;
}

/* Puts the next turn behind the earlier ones; where both are too long for the model these are forgotten. */
static bool chat_turn(void *user, const char *line)
{
    app *a = (app *)user;
    ex_text *talk = &a->talk;
    char *text = ex_lm_clean(line);
    char *turn = a->form == FORM_PLAIN ? ex_copy(text, strlen(text)) : ex_alpaca_prompt(text, NULL);
    ex_text answer = {NULL, 0, 0};
    int32_t before = 0;
    if (talk->length > 0) ex_text_put(talk, "\n\n");
    ex_text_put(talk, turn);
    bool fine = ex_lm_tokens(&a->lm, talk->at, &before);
    if (fine && before + a->how.most > a->lm.config.positions && talk->length > strlen(turn)) {
        fprintf(stderr, "  (the earlier turns no longer fit and are forgotten)\n");
        talk->length = 0;
        ex_text_put(talk, turn);
    }
    fine = fine && ex_lm_answer(&a->lm, a->p.ctx, a->p.loaded, talk->at, &a->how, &answer);
    if (fine) ex_text_add(talk, answer.at, answer.length);
    ex_text_free(&answer);
    free(turn);
    free(text);
    return fine;
}

/* Every line of stdin is a turn. */
static bool chat(app *a)
{
    const bool fine = ex_lm_lines(chat_turn, a);
    ex_text_free(&a->talk);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ main */

static int work(void *user)
{
    app *a = (app *)user;
    if (a->import != NULL) {
        if (!ex_llama2c_import(a->p.ctx, a->import, a->tokenizer, a->p.out, &a->p.error)) return 1;
        printf("The model is in %s\n", a->p.out);
        return 0;
    }
    /* what is written goes to stdout: everything else that these methods have to say goes elsewhere */
    FILE *said = a->p.method == METHOD_GENERATE || a->p.method == METHOD_CHAT ? stderr : stdout;
    if (!ex_lm_load(&a->lm, &a->p, said)) return 1;
    if (a->p.method == METHOD_GENERATE) return generate(a) ? 0 : 1;
    if (a->p.method == METHOD_CHAT) return chat(a) ? 0 : 1;
    if (ex_program_trains(&a->p) && !ex_lm_read(&a->lm, &a->train, "train", a->p.limit)) return 1;
    if (!ex_lm_read(&a->lm, &a->dev, "dev", 0)) return 1;
    return ex_program_trains(&a->p) ? train(a) : measure(a) ? 0 : 1;
}

int main(int argc, char **argv)
{
    app a;
    memset(&a, 0, sizeof(a));
    a.p.methods = g_methods;
    a.p.check = check_options;
    a.p.work = work;
    a.p.user = &a;
    ex_options_init(&a.p.options);
    a.p.options.batch = 8;
    a.lm.pack = true;
    a.lm.error = &a.p.error;
    ex_sampling_init(&a.how, 256);
    a.prompt = "";
    a.p.table = make_table(&a);
    const int status = ex_program_main(&a.p, &g_about, argc, argv);
    ex_lm_file_free(&a.train);
    ex_lm_file_free(&a.dev);
    ex_tokenizer_free(a.lm.tokenizer);
    ex_program_free(&a.p);
    return status;
}
