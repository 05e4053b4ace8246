/* ex_program.h - what the training programs share around ex_run.h: the checks of their options, the checkpoint folder that they
   begin with, the plan on the screen, the run with its evaluations, the result folder, which is loaded again and measured, the
   table at the end and the report, and main() itself.

   Include after ex_options.h and ex_result.h. A program has an ex_program, whose first part it fills and its table of options
   points into, and calls ex_program_main, which comes back through `check` and `work`. For a training it fills an ex_training:
   what only it knows, its rows and what is measured of a model, comes as an ex_source and as functions. */
#ifndef EX_PROGRAM_H
#define EX_PROGRAM_H

/* ------------------------------------------------------------------------------------------------ scores */

/* What was measured of a model; `chosen` is what "best" means. */
typedef struct ex_scores {
    int32_t count;
    const char *name[6], *chosen_name;
    double value[6], chosen, loss;
    bool lower;                       /* of two values of `chosen` the lower one is the better */
} ex_scores;

/* For programs that only measure. */
EX_API void ex_scores_print(const ex_scores *scores, const ex_score_info *info)
{
    for (int32_t i = 0; i < scores->count; i++) printf("  %-10s %.4f\n", scores->name[i], scores->value[i]);
    if (info->terms > 0) printf("  %-10s %.4f\n", "loss", info->loss);
    printf("  %-10s %.0f tokens/s\n", "speed", (double)info->tokens / info->seconds);
}

/* An evaluation during a run: a line on the screen, one in the log, and the metric of which higher is better. */
EX_API bool ex_scores_note(const ex_scores *scores, ex_run *run, double *metric)
{
    *metric = scores->lower ? -scores->chosen : scores->chosen;
    ex_progress_note(&run->bar, "  step %5lld  dev      %s %.4f, loss %.4f", (long long)run->state.step, scores->chosen_name,
                     scores->chosen, scores->loss);
    ex_log_begin(&run->log, "evaluate");
    ex_log_int(&run->log, "step", run->state.step);
    for (int32_t i = 0; i < scores->count; i++) ex_log_real(&run->log, scores->name[i], scores->value[i]);
    ex_log_real(&run->log, "dev_loss", scores->loss);
    return ex_run_log_end(run);
}

/* ------------------------------------------------------------------------------------------------ a program */

/* What the command line says, and what becomes of it. */
typedef struct ex_program {
    const char *const *methods;       /* their names; the first EX_METHODS_SHARED train */
    ex_arg *table;                    /* of the options, which this owns */
    bool (*check)(void *user);        /* which options belong together */
    int (*work)(void *user);          /* exit status; 1 with a message in `error` */
    void *user;
    /* the command line's */
    ex_options options;
    const char *model, *out;
    int32_t method;
    int64_t limit;                    /* training rows to read; 0: all */
    /* ex_program_main's and ex_program_load's */
    const char *name;
    apt_ctx *ctx;
    apt_model *loaded;
    ex_error error;
} ex_program;

EX_API bool ex_program_trains(const ex_program *p)
{
    return p->method < EX_METHODS_SHARED;
}

/* The checks that all of them share. from: the folder or file that the run begins with. */
EX_API bool ex_program_check(ex_program *p, const char *train, const char *from)
{
    const char *method = p->methods[p->method];
    if (!ex_options_check_machine(&p->options, &p->error)) return false;
    if (!ex_program_trains(p))
        return !p->options.resume || ex_fail(&p->error, "--resume goes with a training method, not with %s", method);
    if (train == NULL || p->out == NULL)
        return ex_fail(&p->error, "--method %s needs --train FILE and --out DIR", method);
    if (p->method == EX_METHOD_FULL && p->options.weights != 0)
        return ex_fail(&p->error, "--weights is for frozen matrices; --method full has none");
    return ex_options_check(&p->options, &p->error) && ex_options_check_out(&p->options, from, p->out, &p->error);
}

/* The table's rows, which a program lists in a function; free() */
EX_API ex_arg *ex_program_table(const ex_arg *rows, size_t bytes)
{
    ex_arg *table = (ex_arg *)ex_alloc(bytes, 1);
    memcpy(table, rows, bytes);
    return table;
}

/* The exit status: 0, 1 when the work failed, 2 for a command line that makes no sense, 130 after Ctrl-C. */
EX_API int ex_program_main(ex_program *p, const ex_args_about *about, int argc, char **argv)
{
    const ex_args_result parsed = ex_args_parse(p->table, about, argc, argv, &p->error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    p->name = about->program;
    if (parsed == EX_ARGS_OK) {
        ex_options_preset(&p->options, p->table);
        if (p->check(p->user)) {
            p->ctx = ex_run_context(&p->options.machine, &p->error);
            status = p->ctx != NULL ? p->work(p->user) : 1;
        }
    }
    if (status == 1 || status == 2) fprintf(stderr, "%s: %s\n%s", p->name, p->error.text, status == 2 ? "Try --help.\n" : "");
    return status;
}

EX_API void ex_program_free(ex_program *p)
{
    apt_destroy(p->ctx);
    free(p->table);
}

/* ------------------------------------------------------------------------------------------------ a checkpoint folder */

typedef struct exi_kind_of_model { const char *type, *name, *program; } exi_kind_of_model;

/* A folder of another family is for another program. (What is wrong with a config.json the library says better.) */
EX_API bool exi_program_fits(ex_program *p)
{
    static const exi_kind_of_model kinds[] = {{"bert", "BERT", "roberta"}, {"roberta", "RoBERTa", "roberta"}, {"t5", "T5", "t5"},
                                              {"llama", "LLaMA", "llama"}, {"qwen2", "Qwen2", "llama"}};
    char *path = ex_path(p->model, "config.json");
    ex_error ignored = {""};
    ex_json json;
    bool fine = true;
    if (ex_json_read(&json, path, &ignored)) {
        const char *type = ex_json_text(ex_json_root(&json), "model_type", "");
        for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
            if (strcmp(kinds[i].type, type) == 0 && strcmp(kinds[i].program, p->name) != 0)
                fine = ex_fail(&p->error, "%s is a %s model, which is not for this program; %s is", p->model, kinds[i].name,
                               kinds[i].program);
        }
        ex_json_free(&json);
    }
    free(path);
    return fine;
}

/* p->model becomes p->loaded, quantised where it will not be trained (a training quantises its result), and *config. load: what
   only the program knows. */
EX_API bool ex_program_load(ex_program *p, apt_load_desc load, apt_config *config)
{
    static const apt_dtype weights[] = {APT_F32, APT_BF16, APT_F16};
    load.weights = weights[p->options.weights];
    load.seed = (uint64_t)p->options.seed;
    if (!exi_program_fits(p)) return false;
    if (apt_model_load(p->ctx, p->model, &load, &p->loaded) != APT_OK ||
        (!ex_program_trains(p) && !ex_quantize(p->loaded, p->options.quantize, NULL)))
        return ex_fail(&p->error, "%s", apt_error(p->ctx));
    apt_model_config(p->loaded, config);
    return true;
}

/* The tokenizer of a folder, or of a file, for a model. NULL with a message: none, or one that does not fit. */
EX_API ex_tokenizer *ex_program_tokenizer(ex_program *p, const apt_config *config, const char *path)
{
    ex_tokenizer *tokenizer = ex_tokenizer_load(path, &p->error);
    const int32_t size = tokenizer != NULL ? ex_tokenizer_size(tokenizer) : 0;
    if (size <= config->vocab) return tokenizer;
    ex_fail(&p->error, "%s: the tokenizer has %d tokens, the model's embedding %d rows", path, (int)size, (int)config->vocab);
    ex_tokenizer_free(tokenizer);
    return NULL;
}

EX_API const char *exi_family_name(const apt_config *config)
{
    if (config->family == APT_LLAMA) return config->qkv_bias ? "Qwen2" : "LLaMA";
    return config->family == APT_T5 ? "T5" : config->family == APT_BERT ? "BERT" : "RoBERTa";
}

/* Says on `file` what p->loaded is. path: where it comes from. */
EX_API void ex_program_show_model(const ex_program *p, const apt_config *config, const char *path, FILE *file)
{
    static const char *const maths[] = {", on the GPU in fp32", ", on the GPU in tf32", ", on the GPU in bf16",
                                        ", on the GPU in fp16"};
    const ex_machine *machine = &p->options.machine;
    const int32_t threads = apt_thread_count(p->ctx);
    const char *quant = apt_quant_kind_name(config->quant);
    apt_model_info info = APT_ZERO;
    char text[32];
    apt_model_query(p->loaded, &info);
    fprintf(file, "  model    %s: %s, %d layers, d %d, %s parameters%s%s, %s kernels, %d thread%s%s\n", path,
            exi_family_name(config), (int)(config->layers - config->decoder_layers), (int)config->hidden,
            ex_count_text(text, sizeof(text), (double)info.parameters), quant != NULL ? ", " : "", quant != NULL ? quant : "",
            apt_kernel_name(p->ctx), (int)threads, threads == 1 ? "" : "s",
            machine->device == EX_DEVICE_CUDA ? maths[machine->math] : "");
}

/* ------------------------------------------------------------------------------------------------ a training */

typedef struct ex_training {
    ex_program *program;
    const char *train, *dev;          /* paths as the user wrote them; dev may be NULL */
    const char *tokenizer;            /* the folder or file that has it */
    ex_source rows;
    const char *rows_name;            /* "sequences" and such */
    int64_t longest, sequences;       /* of a row at most: tokens, sequences ... */
    int64_t longest_target;           /* ... and tokens for a decoder beside an encoder; else 0 */
    char *data;                       /* what of the data must be alike in a continuation, in words; ex_program_train frees it */
    /* All three have the program's `user` and put a message into its error when they fail. evaluate: where there is dev. */
    bool (*evaluate)(void *user, apt_ctx *ctx, apt_model *model, ex_scores *scores, ex_score_info *info);
    bool (*write)(void *user);        /* what else belongs into the result folder; NULL: nothing */
    bool (*finish)(void *user, apt_ctx *ctx, apt_model *model);       /* the last work, with the model of that folder; or NULL */
} ex_training;

EX_API bool exi_training_evaluate(ex_run *run, double *metric)
{
    const ex_training *t = (const ex_training *)run->user;
    ex_scores scores;
    ex_score_info info;
    return t->evaluate(t->program->user, run->ctx, run->model, &scores, &info) && ex_scores_note(&scores, run, metric);
}

/* The most tokens that one batch can have: its longest rows together. */
EX_API void exi_training_announce(const ex_training *t, const ex_run *run)
{
    apt_estimate_info estimate;
    apt_config config = APT_ZERO;
    char text[32];
    const ex_program *p = t->program;
    const ex_options *o = &p->options;
    const int64_t batch = o->batch < t->rows.count ? o->batch : t->rows.count;
    apt_model_config(p->loaded, &config);
    printf("  plan     %s", p->methods[p->method]);
    if (ex_method_prunes(p->method)) printf(" to %.0f %% sparsity", 100 * o->sparsity);
    printf(", %lld steps of %lld %s, learning rate %g", (long long)run->desc.steps, (long long)(o->batch * o->accumulate),
           t->rows_name, o->lr);
    if (apt_estimate_pair(p->ctx, &config, &run->desc, batch * t->longest, batch * t->longest_target, batch * t->sequences,
                          &estimate) == APT_OK)
        printf(", memory for a step below %s", ex_bytes_text(text, sizeof(text), (double)estimate.total));
    printf("\n");
    fflush(stdout);
}

/* The table at the end, also as the last line of metrics.jsonl and in the report. */
EX_API bool exi_training_conclude(const ex_training *t, ex_run *run, const ex_outcome *outcome, const ex_scores *scores,
                                   int64_t inference_peak)
{
    ex_program *p = t->program;
    char text[32];
    ex_cells cells;
    memset(&cells, 0, sizeof(cells));
    cells.run = p->methods[p->method];
    for (int32_t i = 0; i < scores->count; i++) ex_cell(&cells, scores->name[i], "%.4f", scores->value[i]);
    if (run->state.best_step >= 0)
        ex_cell(&cells, "best in training", "%.4f at step %lld", scores->lower ? -run->state.best : run->state.best,
                (long long)run->state.best_step);
    ex_cells_outcome(&cells, outcome);
    ex_cell(&cells, "inference memory", "%s", ex_bytes_text(text, sizeof(text), (double)inference_peak));
    ex_log_begin(&run->log, "result");
    for (int32_t i = 0; i < cells.count; i++) ex_log_text(&run->log, cells.at[i].name, cells.at[i].value);
    char *title = ex_format("apt.h: %s, %s", t->train, cells.run);
    const bool fine = ex_run_log_end(run) && ex_result_report(p->out, title, cells.run, &cells, &p->error);
    printf("\n");
    ex_cells_print(&cells, 1, stdout);
    if (fine) printf("\nThe model is in %s, its curves in %s/report.html\n", p->out, p->out);
    free(title);
    return fine;
}

static apt_result exi_training_write(void *user)
{
    const ex_training *t = (const ex_training *)user;
    return t->write == NULL || t->write(t->program->user) ? APT_OK : APT_E_IO;
}

/* Writes the folder, loads it again and measures that. */
EX_API bool exi_training_finish(const ex_training *t, ex_run *run)
{
    ex_program *p = t->program;
    ex_outcome outcome;
    ex_saved saved;
    ex_scores scores;
    ex_score_info info;
    memset(&outcome, 0, sizeof(outcome));
    memset(&scores, 0, sizeof(scores));
    ex_outcome_of_run(&outcome, run);
    if (!ex_run_save(run, t->tokenizer) || !ex_run_write(run, exi_training_write, run->user)) return false;
    apt_model_destroy(run->model);
    bool fine = ex_saved_open(&saved, &outcome, p->out, &p->options.machine, &p->error);
    if (fine && t->dev != NULL) {
        fine = t->evaluate(p->user, saved.ctx, saved.model, &scores, &info);
        if (fine) outcome.tokens_per_second = (double)info.tokens / info.seconds;
    }
    fine = fine && exi_training_conclude(t, run, &outcome, &scores, apt_memory_info(saved.ctx).peak_bytes) &&
           (t->finish == NULL || t->finish(p->user, saved.ctx, saved.model));
    ex_saved_close(&saved);
    return fine;
}

/* What a continuation must have alike and the library does not see. free() */
EX_API char *exi_training_settings(const ex_training *t, const ex_run *run)
{
    char *shared = ex_options_settings(&t->program->options, run);
    char *settings = ex_format("train %s (%s), dev %s, %s", t->train, t->data, t->dev != NULL ? t->dev : "none", shared);
    free(shared);
    return settings;
}

/* The whole training, whose model p->loaded is used up. Returns the program's exit status. */
EX_API int ex_program_train(ex_training *t)
{
    ex_program *p = t->program;
    ex_run run;
    int status = 1;
    ex_run_init(&run, p->methods[p->method], p->ctx, p->loaded, t->rows, p->out, &p->error);
    run.evaluate = t->dev != NULL ? exi_training_evaluate : NULL;
    run.user = t;
    run.keeps = true;
    run.arguments = p->table;
    const bool planned = ex_options_plan(&p->options, p->method, &run);
    char *settings = exi_training_settings(t, &run);
    run.settings = settings;
    if (planned) exi_training_announce(t, &run);
    ex_run_catch_signals();
    const bool ready = planned && ex_make_dirs(p->out, &p->error);
    if (ready) ex_run_warn_space(&run);
    const ex_run_end end = ready ? ex_run_train(&run) : EX_RUN_FAILED;
    if (end == EX_RUN_DONE) status = exi_training_finish(t, &run) ? 0 : 1;
    if (end == EX_RUN_STOPPED) {
        fprintf(stderr, "Stopped after step %lld; everything is in %s.\nGo on with the same command and --resume.\n",
                (long long)run.state.step, run.checkpoint);
        status = 130;
    }
    ex_run_close(&run);
    free(settings);
    free(t->data);
    return status;
}

#endif /* EX_PROGRAM_H */
