/* ex_demo.h - a demonstration that needs no file and no network: data out of a grammar, a tiny model pretrained on it and stored
   as a Hugging Face folder, that folder adapted several ways at equal numbers of steps, and one table. Unless a program has
   its own ways, they are LoRA without pruning, APT (pruning and tuning at the same time), and prune-after-training (LoRA,
   one-shot prune, recovery).

   Include after ex_program.h and ex_grammar.h. A program describes in an ex_demo_plan what it does in its own way, and its main()
   is ex_demo_main, or it fills an ex_demo from options of its own and calls ex_demo_work. Everything in the table at the end is
   measured. */
#ifndef EX_DEMO_H
#define EX_DEMO_H

typedef struct ex_demo_sizes { int64_t pretrain_steps, steps, corpus, train, dev, test; } ex_demo_sizes;
typedef enum ex_demo_set { EX_DEMO_CORPUS, EX_DEMO_TRAIN, EX_DEMO_DEV, EX_DEMO_TEST, EX_DEMO_SETS } ex_demo_set;

typedef struct ex_demo ex_demo;
/* quantize: APT_QUANT_*; a way that has one trains nothing but narrows what the way before it has left. */
typedef struct ex_demo_way { const char *name, *folder, *stage; int32_t quantize; } ex_demo_way;

/* Functions return false with a message in d->error. */
typedef struct ex_demo_plan {
    const char *name, *summary;       /* of the program, for --help */
    const char *title, *model;        /* of the report; "tiny-bert", the folder of the pretrained model */
    const char *data, *pretraining, *objective;       /* what the first two stages say; "masked LM" */
    ex_demo_sizes sizes, fast;
    int32_t batch;                    /* rows */
    float pretrain_rate, rate;        /* of learning */
    apt_load_desc load;               /* how the adapted models begin */
    /* Writes and reads the data of d->sizes; the baseline's row of the table, where there is one. */
    bool (*make_data)(ex_demo *d, ex_cells *baseline);
    void (*shape)(const ex_demo *d, apt_config *config);      /* config comes zeroed */
    bool (*begin)(ex_demo *d, apt_ctx *ctx, apt_model *model);        /* changes the random weights; NULL: they stay */
    apt_batch (*prepare)(ex_run *run, ex_batch *batch);       /* of pretraining; run->user is d. NULL: the rows as they are */
    bool (*show)(ex_demo *d, apt_ctx *ctx, apt_model *model); /* what the pretrained model can do, on the screen */
    ex_source (*rows)(const ex_demo *d, ex_demo_set which);
    bool (*score)(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_demo_set which, ex_scores *scores, ex_score_info *info);
    void (*quality)(const ex_scores *scores, ex_cells *cells);        /* as rows of the table */
    bool (*decode)(ex_demo *d, apt_ctx *ctx, apt_model *model, int64_t *tokens);      /* writes texts to be timed; NULL: none */
    /* Ways of the program's own; NULL: the three. */
    const ex_demo_way *ways;
    int32_t way_count;
    void (*schedule)(ex_demo *d, ex_run *run, int32_t way);           /* behind the steps and rates that all have alike */
    bool (*trained)(ex_demo *d, ex_run *run, int32_t way);            /* what only the trainer knows, before it goes; or NULL */
    /* What else is to be said of the folder run->dir, in the table; or NULL. */
    bool (*measured)(ex_demo *d, ex_run *run, int32_t way, const ex_scores *scores, ex_outcome *outcome, ex_cells *cells);
    bool (*concluded)(ex_demo *d, ex_report *report); /* before the report is written; or NULL */
} ex_demo_plan;

struct ex_demo {
    const ex_demo_plan *plan;
    void *user;
    int64_t seed;
    ex_machine machine;
    const char *out;
    bool fast;
    bool measure;                     /* nothing is trained: what an earlier run has left in `out` is measured again */
    ex_demo_sizes sizes;
    char *base;                       /* folder of the pretrained model; one that is there already when plan->shape is NULL */
    int32_t stage;
    ex_map seen;                      /* the sentences handed out: none is used twice */
    uint64_t random;
    ex_tokenizer *tokenizer;
    ex_error error;
};

enum { EX_DEMO_LORA, EX_DEMO_APT, EX_DEMO_PRUNE_AFTER, EX_DEMO_WAYS, EX_DEMO_MOST_WAYS = 8 };
static const ex_demo_way exi_demo_ways[EX_DEMO_WAYS] = {
    {"LoRA", "lora", "Adapting it with LoRA, nothing pruned", APT_QUANT_NONE},
    {"APT 60 %", "apt", "Adapting it with APT: 60 % of the prunable parameters go while it learns", APT_QUANT_NONE},
    {"prune after 60 %", "prune-after", "Adapting it with LoRA, then pruning 60 % at once, then recovering", APT_QUANT_NONE}};

EX_API const ex_demo_way *exi_demo_way_of(const ex_demo *d, int32_t way)
{
    return d->plan->ways != NULL ? &d->plan->ways[way] : &exi_demo_ways[way];
}

EX_API int32_t exi_demo_way_count(const ex_demo *d)
{
    return d->plan->ways != NULL ? d->plan->way_count : EX_DEMO_WAYS;
}

EX_API bool exi_demo_pretrains(const ex_demo *d)
{
    return d->plan->shape != NULL && !d->measure;
}

EX_API void exi_demo_stage(ex_demo *d, const char *text)
{
    const int32_t stages = exi_demo_way_count(d) + (exi_demo_pretrains(d) ? 3 : 2);
    printf("\n[%d/%d] %s\n", (int)++d->stage, (int)stages, text);
    fflush(stdout);
}

/* ------------------------------------------------------------------------------------------------ runs */

EX_API bool exi_demo_evaluate(ex_run *run, double *metric)
{
    ex_demo *d = (ex_demo *)run->user;
    ex_scores scores;
    ex_score_info info;
    if (!d->plan->score(d, run->ctx, run->model, EX_DEMO_DEV, &scores, &info) || !ex_scores_note(&scores, run, metric))
        return false;
    if (run->iterative != NULL && run->iterative->lower_is_better) *metric = -scores.loss;
    return true;
}

EX_API void exi_demo_run(ex_demo *d, ex_run *run, const char *name, apt_ctx *ctx, apt_model *model, ex_demo_set rows,
                         const char *dir)
{
    ex_run_init(run, name, ctx, model, d->plan->rows(d, rows), dir, &d->error);
    run->feed.batch = d->plan->batch;
    run->feed.seed = run->desc.seed = (uint64_t)d->seed;
    run->user = d;
}

/* A demonstration is not worth a checkpoint. */
EX_API bool exi_demo_train(ex_demo *d, ex_run *run)
{
    const ex_run_end end = ex_run_train(run);
    return end == EX_RUN_DONE || (end == EX_RUN_STOPPED && ex_fail(&d->error, "interrupted; nothing to keep, start again"));
}

EX_API bool exi_demo_pretrain(ex_demo *d)
{
    const ex_demo_plan *plan = d->plan;
    apt_config config = APT_ZERO;
    apt_model *model = NULL;
    ex_run run;
    apt_ctx *ctx = ex_run_context(&d->machine, &d->error);
    char *title = ex_format("%s: pretraining", plan->title);
    plan->shape(d, &config);
    bool fine = ctx != NULL && (apt_model_create(ctx, &config, (uint64_t)d->seed, &model) == APT_OK ||
                                ex_fail(&d->error, "%s", apt_error(ctx)));
    fine = fine && (plan->begin == NULL || plan->begin(d, ctx, model));
    exi_demo_run(d, &run, plan->objective, ctx, model, EX_DEMO_CORPUS, d->base);
    run.desc.method = APT_METHOD_FULL;
    run.desc.steps = d->sizes.pretrain_steps;
    run.desc.learning_rate = plan->pretrain_rate;
    run.desc.warmup_steps = d->sizes.pretrain_steps / 20;
    run.prepare = plan->prepare;
    fine = fine && exi_demo_train(d, &run) && ex_run_save(&run, NULL) &&
           ex_result_report(d->base, title, plan->objective, NULL, &d->error) && plan->show(d, ctx, model);
    ex_run_close(&run);
    apt_destroy(ctx);
    free(title);
    return fine;
}

/* LoRA while a way says nothing else; pruning with APT. */
EX_API void ex_demo_apt(const ex_demo *d, ex_run *run)
{
    apt_train_desc *t = &run->desc;
    t->method = APT_METHOD_APT;
    t->learning_rate = d->plan->rate;
    t->target_sparsity = 0.6f;
    t->prune_begin = t->steps * 2 / 10;
    t->prune_end = t->steps * 6 / 10;
    t->update_frequency = (int32_t)((t->prune_end - t->prune_begin) / 10);
}

EX_API void exi_demo_schedule(ex_demo *d, ex_run *run, int32_t way)
{
    apt_train_desc *t = &run->desc;
    t->steps = d->sizes.steps;
    t->learning_rate = d->plan->rate;
    t->warmup_steps = t->steps / 20;
    t->evaluate_every = t->steps / 8;
    t->method = APT_METHOD_LORA;
    if (d->plan->schedule != NULL) d->plan->schedule(d, run, way);
    else if (way == EX_DEMO_APT) ex_demo_apt(d, run);
    else if (way == EX_DEMO_PRUNE_AFTER) {
        run->prune_at = t->steps * 6 / 10;
        run->prune_sparsity = 0.6f;
        run->observe = 16;
    }
}

/* ------------------------------------------------------------------------------------------------ measuring */

/* Speeds of the forward pass and of writing, the best of a few passes; of two where they take long. */
EX_API bool ex_demo_speed(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_outcome *outcome)
{
    const ex_source test = d->plan->rows(d, EX_DEMO_TEST);
    ex_score_info score;
    bool fine = true;
    const double begin = ex_seconds();
    for (int pass = 0; fine && (pass < 2 || (pass < 5 && !d->fast && ex_seconds() - begin < 5)); pass++) {
        fine = ex_score(ctx, model, &test, NULL, NULL, &score, &d->error);
        const double speed = fine ? (double)score.tokens / score.seconds : 0;
        if (speed > outcome->tokens_per_second) outcome->tokens_per_second = speed;
        if (!fine || d->plan->decode == NULL) continue;
        int64_t tokens = 0;
        const double start = ex_seconds();
        fine = d->plan->decode(d, ctx, model, &tokens);
        const double written = (double)tokens / (ex_seconds() - start);
        if (written > outcome->written_per_second) outcome->written_per_second = written;
    }
    return fine;
}

/* Quality and speed with the folder that was just written. */
EX_API bool exi_demo_measure(ex_demo *d, const char *dir, ex_scores *scores, ex_outcome *outcome, ex_cells *cells)
{
    ex_saved saved;
    ex_score_info info;
    const bool fine = ex_saved_open(&saved, outcome, dir, &d->machine, &d->error) &&
                      d->plan->score(d, saved.ctx, saved.model, EX_DEMO_TEST, scores, &info) &&
                      ex_demo_speed(d, saved.ctx, saved.model, outcome);
    if (fine) d->plan->quality(scores, cells);
    ex_saved_close(&saved);
    return fine;
}

/* The model that all begin with, where it can do the task at all. */
EX_API bool exi_demo_measure_base(ex_demo *d, ex_cells *cells)
{
    ex_outcome outcome;
    ex_scores scores;
    memset(&outcome, 0, sizeof(outcome));
    outcome.kept = 1;
    cells->run = "pretrained";
    if (!exi_demo_measure(d, d->base, &scores, &outcome, cells)) return false;
    ex_cells_saved(cells, &outcome);
    return true;
}

EX_API bool exi_demo_adapt_with(ex_demo *d, ex_run *run, int32_t way, ex_cells *cells)
{
    const ex_demo_plan *plan = d->plan;
    ex_outcome outcome;
    ex_scores scores;
    memset(&outcome, 0, sizeof(outcome));
    run->evaluate = exi_demo_evaluate;
    exi_demo_schedule(d, run, way);
    run->quantize = exi_demo_way_of(d, way)->quantize;
    if (run->quantize == APT_QUANT_NONE && !d->measure &&
        (!exi_demo_train(d, run) || (plan->trained != NULL && !plan->trained(d, run, way))))
        return false;
    ex_outcome_of_run(&outcome, run);
    if ((!d->measure && !ex_run_save(run, d->base)) || !exi_demo_measure(d, run->dir, &scores, &outcome, cells) ||
        (plan->measured != NULL && !plan->measured(d, run, way, &scores, &outcome, cells)))
        return false;
    printf("  test %s %s, %.0f %% of the prunable parameters left\n", cells->at[0].name, cells->at[0].value, 100 * outcome.kept);
    ex_cells_outcome(cells, &outcome);
    return true;
}

/* The model that a way begins with: the pretrained one, what the way before it has left, or its own result. */
EX_API bool exi_demo_load(ex_demo *d, int32_t way, apt_ctx *ctx, apt_model **model)
{
    const bool narrows = exi_demo_way_of(d, way)->quantize != APT_QUANT_NONE, again = narrows || d->measure;
    const int32_t of = narrows && !d->measure ? way - 1 : way;
    apt_load_desc load = d->plan->load;
    char *dir = again ? ex_path(d->out, exi_demo_way_of(d, of)->folder) : NULL;
    load.seed = (uint64_t)d->seed;
    const bool fine = apt_model_load(ctx, again ? dir : d->base, again ? NULL : &load, model) == APT_OK ||
                      ex_fail(&d->error, "%s", apt_error(ctx));
    free(dir);
    return fine;
}

EX_API bool exi_demo_adapt(ex_demo *d, int32_t way, ex_cells *cells)
{
    apt_model *model = NULL;
    ex_run run;
    char *dir = ex_path(d->out, exi_demo_way_of(d, way)->folder);
    apt_ctx *ctx = ex_run_context(&d->machine, &d->error);
    cells->run = exi_demo_way_of(d, way)->name;
    exi_demo_stage(d, exi_demo_way_of(d, way)->stage);
    bool fine = ctx != NULL && ex_make_dirs(dir, &d->error) && exi_demo_load(d, way, ctx, &model);
    exi_demo_run(d, &run, cells->run, ctx, model, EX_DEMO_TRAIN, dir);
    fine = fine && exi_demo_adapt_with(d, &run, way, cells);
    ex_run_close(&run);
    apt_destroy(ctx);
    free(dir);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ the whole of it */

EX_API bool exi_demo_report(ex_demo *d, const ex_cells *cells, int32_t count)
{
    ex_report *report = ex_report_create(d->plan->title);
    char *path = ex_path(d->out, "report.html");
    bool fine = true;
    for (int32_t i = 0; i < count; i++) ex_cells_report(&cells[i], report);
    for (int32_t i = 0; fine && i < exi_demo_way_count(d); i++) {
        const ex_demo_way *way = exi_demo_way_of(d, i);
        if (way->quantize != APT_QUANT_NONE) continue;                /* nothing was trained */
        char *log = ex_format("%s/%s/metrics.jsonl", d->out, way->folder);
        fine = ex_report_add_metrics(report, way->name, log, &d->error);
        free(log);
    }
    fine = fine && (d->plan->concluded == NULL || d->plan->concluded(d, report)) && ex_report_write(report, path, &d->error);
    ex_report_free(report);
    free(path);
    return fine;
}

/* The report stays what it was where nothing was trained. */
EX_API bool exi_demo_conclude(ex_demo *d, const ex_cells *cells, int32_t count)
{
    if (!d->measure && !exi_demo_report(d, cells, count)) return false;
    printf("\n");
    ex_cells_print(cells, count, stdout);
    printf("\nTest sentences were never trained on. Steps: medians of the first and last %d, the teacher's forward apart.\n"
           "Parameters, disk and inference are those of the saved folder, loaded again. Curves: %s/report.html\n", EX_TIMED, d->out);
    return true;
}

EX_API bool exi_demo_all(ex_demo *d)
{
    ex_cells cells[2 + EX_DEMO_MOST_WAYS];
    int32_t count = 0;
    memset(cells, 0, sizeof(cells));
    exi_demo_stage(d, d->plan->data);
    if (!d->plan->make_data(d, &cells[0])) return false;
    count += cells[0].count > 0;
    if (exi_demo_pretrains(d)) {
        exi_demo_stage(d, d->plan->pretraining);
        if (!exi_demo_pretrain(d)) return false;
    }
    if (d->plan->load.task == APT_TASK_NONE && !exi_demo_measure_base(d, &cells[count++])) return false;
    for (int32_t way = 0; way < exi_demo_way_count(d); way++) {
        if (!exi_demo_adapt(d, way, &cells[count++])) return false;
    }
    exi_demo_stage(d, "Results");
    return exi_demo_conclude(d, cells, count);
}

/* All of it, with what the command line has put into d. Returns the exit status and frees what d holds. */
EX_API int ex_demo_work(ex_demo *d)
{
    const double start = ex_seconds();
    char time[32];
    if (d->base == NULL) d->base = ex_path(d->out, d->plan->model);
    d->sizes = d->fast ? d->plan->fast : d->plan->sizes;
    d->random = (uint64_t)d->seed * 0x9e3779b97f4a7c15u + 1;
    ex_run_catch_signals();
    const int status = exi_demo_all(d) ? 0 : ex_run_stopping() ? 130 : 1;
    if (status == 0) printf("Done in %s.\n", ex_time_text(time, sizeof(time), ex_seconds() - start));
    else fprintf(stderr, "\n%s: %s\n", d->plan->name, d->error.text);
    ex_tokenizer_free(d->tokenizer);
    ex_map_free(&d->seen);
    free(d->base);
    return status;
}

/* main() of a demonstration; user: what its functions find in d->user. */
EX_API int ex_demo_main(const ex_demo_plan *plan, void *user, int argc, char **argv)
{
    const char *name = plan->name;
    ex_demo d;
    memset(&d, 0, sizeof(d));
    d.plan = plan;
    d.user = user;
    char *out = ex_format("build/%s-run", name), *examples = ex_format("  %s\n  %s --seed 2 --out /tmp/%s\n", name, name, name);
    d.seed = 1;
    d.out = out;
    const ex_arg table[] = {
        EX_INT("seed", "N", &d.seed, 0, 1e9, "another corpus and another start"),
        EX_INT("threads", "N", &d.machine.threads, 0, 64, "threads to use; 0: all cores"),
        EX_TEXT("out", "DIR", &d.out, "folder for models, data and the report"),
        EX_FLAG("fast", &d.fast, "about ten seconds, for tests: everything runs, nothing is learned well"),
        EX_ARGS_END};
    const ex_args_about about = {name, plan->summary, "[options]", examples};
    const ex_args_result parsed = ex_args_parse(table, &about, argc, argv, &d.error);
    int status = parsed == EX_ARGS_HELP ? 0 : 2;
    if (parsed == EX_ARGS_OK) status = ex_demo_work(&d);
    else if (status != 0) fprintf(stderr, "%s: %s\n", name, d.error.text);
    free(out);
    free(examples);
    return status;
}

#endif /* EX_DEMO_H */
