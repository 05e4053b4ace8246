/* ex_program.h - what the training programs share around ex_run.h: the plan on the screen, the run with its evaluations, the
   result folder, which is loaded again and measured, the table at the end and the report.

   Include after ex_options.h and ex_result.h. A program fills an ex_program and calls ex_program_train; what only it knows,
   its rows and what is measured of a model, comes as an ex_source and as functions. */
#ifndef EX_PROGRAM_H
#define EX_PROGRAM_H

/* What was measured of a model; `chosen` is what "best" means. */
typedef struct ex_scores {
    int32_t count;
    const char *name[6], *chosen_name;
    double value[6], chosen, loss;
    bool lower;                       /* of two values of `chosen` the lower one is the better */
} ex_scores;

typedef struct ex_program {
    const char *method;               /* its name on the command line, and ... */
    int32_t kind;                     /* ... EX_METHOD_* */
    const ex_options *options;
    const ex_arg *arguments;          /* written into the log */
    const char *model, *train, *out;  /* paths as the user wrote them; model: the folder or file that has the tokenizer */
    ex_source rows;
    const char *rows_name;            /* "sequences" and such */
    int64_t longest, sequences;       /* of a row at most: tokens, sequences ... */
    int64_t longest_target;           /* ... and tokens for a decoder beside an encoder; else 0 */
    const char *data;                 /* what of the data must be alike in a continuation, as one line */
    apt_ctx *ctx;
    apt_model *loaded;
    /* NULL: there is nothing to evaluate on. All three put a message into *error when they fail. */
    bool (*evaluate)(void *user, apt_ctx *ctx, apt_model *model, ex_scores *scores, ex_score_info *info);
    bool (*write)(void *user);        /* what else belongs into the result folder; NULL: nothing */
    bool (*finish)(void *user, apt_ctx *ctx, apt_model *model);       /* the last work, with the model of that folder; or NULL */
    void *user;
    ex_error *error;
} ex_program;

/* For programs that only measure. */
EX_API void ex_scores_print(const ex_scores *scores, const ex_score_info *info)
{
    for (int32_t i = 0; i < scores->count; i++) printf("  %-10s %.4f\n", scores->name[i], scores->value[i]);
    if (info->terms > 0) printf("  %-10s %.4f\n", "loss", info->loss);
    printf("  %-10s %.0f tokens/s\n", "speed", (double)info->tokens / info->seconds);
}

EX_API bool exi_program_evaluate(ex_run *run, double *metric)
{
    const ex_program *p = (const ex_program *)run->user;
    ex_scores scores;
    ex_score_info info;
    if (!p->evaluate(p->user, run->ctx, run->model, &scores, &info)) return false;
    *metric = scores.lower ? -scores.chosen : scores.chosen;
    ex_progress_note(&run->bar, "  step %5lld  dev      %s %.4f, loss %.4f", (long long)run->state.step, scores.chosen_name,
                     scores.chosen, scores.loss);
    ex_log_begin(&run->log, "evaluate");
    ex_log_int(&run->log, "step", run->state.step);
    for (int32_t i = 0; i < scores.count; i++) ex_log_real(&run->log, scores.name[i], scores.value[i]);
    ex_log_real(&run->log, "dev_loss", scores.loss);
    return ex_log_end(&run->log, run->error);
}

/* The most tokens that one batch can have: its longest rows together. */
EX_API void exi_program_announce(const ex_program *p, const ex_run *run)
{
    apt_estimate_info estimate;
    apt_config config = APT_ZERO;
    char text[32];
    const ex_options *o = p->options;
    const int64_t batch = o->batch < p->rows.count ? o->batch : p->rows.count;
    apt_model_config(p->loaded, &config);
    printf("  plan     %s", p->method);
    if (ex_method_prunes(p->kind)) printf(" to %.0f %% sparsity", 100 * o->sparsity);
    printf(", %lld steps of %lld %s, learning rate %g", (long long)run->desc.steps, (long long)(o->batch * o->accumulate),
           p->rows_name, o->lr);
    if (apt_estimate_pair(p->ctx, &config, &run->desc, batch * p->longest, batch * p->longest_target, batch * p->sequences,
                          &estimate) == APT_OK)
        printf(", memory for a step below %s", ex_bytes_text(text, sizeof(text), (double)estimate.total));
    printf("\n");
    fflush(stdout);
}

/* The table at the end, also as the last line of metrics.jsonl and in the report. */
EX_API bool exi_program_conclude(const ex_program *p, ex_run *run, const ex_outcome *outcome, const ex_scores *scores,
                                 int64_t inference_peak)
{
    char text[32];
    ex_cells cells;
    memset(&cells, 0, sizeof(cells));
    cells.run = p->method;
    for (int32_t i = 0; i < scores->count; i++) ex_cell(&cells, scores->name[i], "%.4f", scores->value[i]);
    if (run->state.best_step >= 0)
        ex_cell(&cells, "best in training", "%.4f at step %lld", scores->lower ? -run->state.best : run->state.best,
                (long long)run->state.best_step);
    ex_cells_outcome(&cells, outcome);
    ex_cell(&cells, "inference memory", "%s", ex_bytes_text(text, sizeof(text), (double)inference_peak));
    ex_log_begin(&run->log, "result");
    for (int32_t i = 0; i < cells.count; i++) ex_log_text(&run->log, cells.at[i].name, cells.at[i].value);
    char *title = ex_format("apt.h: %s, %s", p->train, cells.run);
    const bool fine = ex_log_end(&run->log, p->error) && ex_result_report(p->out, title, cells.run, &cells, p->error);
    printf("\n");
    ex_cells_print(&cells, 1, stdout);
    if (fine) printf("\nThe model is in %s, its curves in %s/report.html\n", p->out, p->out);
    free(title);
    return fine;
}

/* Writes the folder, loads it again and measures that. */
EX_API bool exi_program_finish(const ex_program *p, ex_run *run)
{
    ex_outcome outcome;
    ex_saved saved;
    ex_scores scores;
    ex_score_info info;
    memset(&outcome, 0, sizeof(outcome));
    memset(&scores, 0, sizeof(scores));
    ex_outcome_of_run(&outcome, run);
    if (!ex_run_save(run, p->model) || (p->write != NULL && !p->write(p->user))) return false;
    apt_model_destroy(run->model);
    bool fine = ex_saved_open(&saved, &outcome, p->out, p->options->threads, p->options->kernels, p->error);
    if (fine && p->evaluate != NULL) {
        fine = p->evaluate(p->user, saved.ctx, saved.model, &scores, &info);
        if (fine) outcome.tokens_per_second = (double)info.tokens / info.seconds;
    }
    fine = fine && exi_program_conclude(p, run, &outcome, &scores, apt_memory_info(saved.ctx).peak_bytes) &&
           (p->finish == NULL || p->finish(p->user, saved.ctx, saved.model));
    ex_saved_close(&saved);
    return fine;
}

/* What a continuation must have alike and the library does not see. free() */
EX_API char *exi_program_settings(const ex_program *p, const ex_run *run)
{
    char *shared = ex_options_settings(p->options, run);
    char *settings = ex_format("%s, %s", p->data, shared);
    free(shared);
    return settings;
}

/* The whole training, whose model p->loaded is used up. Returns the program's exit status: 0, 1 with a message in *p->error, or
   130 after Ctrl-C. */
EX_API int ex_program_train(ex_program *p)
{
    ex_run run;
    int status = 1;
    ex_run_init(&run, p->method, p->ctx, p->loaded, p->rows, p->out, p->error);
    run.evaluate = p->evaluate != NULL ? exi_program_evaluate : NULL;
    run.user = p;
    run.keeps = true;
    run.arguments = p->arguments;
    const bool planned = ex_options_plan(p->options, p->kind, &run);
    char *settings = exi_program_settings(p, &run);
    run.settings = settings;
    if (planned) exi_program_announce(p, &run);
    ex_run_catch_signals();
    const bool ready = planned && ex_make_dirs(p->out, p->error);
    if (ready) ex_run_warn_space(&run);
    const ex_run_end end = ready ? ex_run_train(&run) : EX_RUN_FAILED;
    if (end == EX_RUN_DONE) status = exi_program_finish(p, &run) ? 0 : 1;
    if (end == EX_RUN_STOPPED) {
        fprintf(stderr, "Stopped after step %lld; everything is in %s.\nGo on with the same command and --resume.\n",
                (long long)run.state.step, run.checkpoint);
        status = 130;
    }
    ex_run_close(&run);
    free(settings);
    return status;
}

#endif /* EX_PROGRAM_H */
