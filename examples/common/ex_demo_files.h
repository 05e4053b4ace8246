/* ex_demo_files.h - a demonstration of the encoders that also takes files: any BERT or RoBERTa checkpoint folder, and rows of one
   or two sentences with a class, in the place of the grammar and the tiny BERT.

   Include after ex_task.h and ex_demo_bert.h. A program's d->user begins with an ex_demo_files, its table of options has
   EX_DEMO_FILES_ROWS, and once those are parsed it calls ex_demo_files_check and, for files, ex_demo_files_plan. */
#ifndef EX_DEMO_FILES_H
#define EX_DEMO_FILES_H

enum { EX_DEMO_WATCHED = 500 };       /* rows of --dev that are looked at while training */

typedef struct ex_demo_files {
    ex_bert bert;                     /* the demonstration task; the first member */
    ex_program p;                     /* p.model: NULL for the demonstration */
    ex_task task;
    ex_task_file file[EX_DEMO_SETS];
    const char *train, *dev;
    int64_t limit;
    ex_demo_plan *plan;
} ex_demo_files;

/* Rows of the table of ex_args.h; f is an ex_demo_files *. */
#define EX_DEMO_FILES_ROWS(f)                                                                                               \
    EX_TEXT("model", "DIR", &(f)->p.model, "BERT or RoBERTa checkpoint folder: config.json, safetensors, tokenizer"),       \
    EX_TEXT("train", "FILE", &(f)->train, "training rows: .tsv or .jsonl, one or two sentences and a class"),               \
    EX_TEXT("dev", "FILE", &(f)->dev, "rows to measure on; the first 500 are watched while training"),                      \
    EX_INT("limit", "N", &(f)->limit, 0, 1e12, "training rows to read; 0: all")

EX_API bool exi_demo_files_read(ex_demo_files *f, ex_demo *d)
{
    ex_task *t = &f->task;
    apt_load_desc load = APT_ZERO;
    ex_task_file *train = &f->file[EX_DEMO_TRAIN], *watched = &f->file[EX_DEMO_DEV], *test = &f->file[EX_DEMO_TEST];
    t->kind = load.task = APT_TASK_CLASSIFY;
    train->path = f->train;
    watched->path = test->path = f->dev;
    f->p.ctx = ex_run_context(&d->machine, &f->p.error);
    if (f->p.ctx == NULL || !ex_task_read_labels(t, f->p.model) || !ex_task_read_train(t, train, f->limit)) return false;
    f->plan->load.labels = load.labels = ex_labels_count(t->labels);
    if (!ex_program_load(&f->p, load, &t->config)) return false;
    t->tokenizer = d->tokenizer = ex_program_tokenizer(&f->p, &t->config, f->p.model);
    if (t->tokenizer == NULL) return false;
    ex_program_show_model(&f->p, &t->config, f->p.model, stdout);
    return ex_task_check_labels(t, f->p.model) && ex_task_read(t, watched, true, EX_DEMO_WATCHED) &&
           ex_task_read(t, test, true, 0) && ex_task_tokenise(t, train, "train") && ex_task_tokenise(t, watched, "watched") &&
           ex_task_tokenise(t, test, "dev");
}

EX_API bool exi_demo_files_data(ex_demo *d, ex_cells *baseline)
{
    ex_demo_files *f = (ex_demo_files *)d->user;
    (void)baseline;
    const bool fine = exi_demo_files_read(f, d);
    if (!fine) d->error = f->p.error;
    apt_destroy(f->p.ctx);
    f->p.ctx = NULL;
    return fine;
}

EX_API ex_source exi_demo_files_rows(const ex_demo *d, ex_demo_set which)
{
    return ex_dataset_source(&((const ex_demo_files *)d->user)->file[which].set);
}

EX_API bool exi_demo_files_score(ex_demo *d, apt_ctx *ctx, apt_model *model, ex_demo_set which, ex_scores *scores,
                                 ex_score_info *info)
{
    ex_demo_files *f = (ex_demo_files *)d->user;
    apt_model_config(model, &f->task.config);
    const bool fine = ex_task_evaluate(&f->task, ctx, model, &f->file[which], scores, info);
    if (!fine) d->error = f->p.error;
    return fine;
}

/* What the table cannot check. */
EX_API bool ex_demo_files_check(const ex_demo_files *f, const char *out, ex_error *error)
{
    ex_options o;
    ex_options_init(&o);
    o.overwrite = true;
    if ((f->p.model != NULL) != (f->train != NULL) || (f->p.model != NULL) != (f->dev != NULL))
        return ex_fail(error, "--model, --train and --dev belong together; without them the demonstration runs");
    if (f->limit > 0 && f->p.model == NULL) return ex_fail(error, "--limit goes with --train");
    return f->p.model == NULL || ex_options_check_out(&o, f->p.model, out, error);
}

/* The plan of a demonstration becomes that of files. */
EX_API void ex_demo_files_plan(ex_demo_files *f, ex_demo *d, ex_demo_plan *plan)
{
    f->plan = plan;
    plan->data = "Reading the rows";
    plan->shape = NULL;               /* nothing is pretrained */
    plan->make_data = exi_demo_files_data;
    plan->rows = exi_demo_files_rows;
    plan->score = exi_demo_files_score;
    d->base = ex_copy(f->p.model, strlen(f->p.model));
    f->p.name = "roberta";            /* whose models these are, see ex_program_load */
    f->task.error = &f->p.error;
}

/* The classes go with a folder; nothing to do for the demonstration. */
EX_API bool ex_demo_files_label(ex_demo_files *f, const char *dir, ex_error *error)
{
    if (f->p.model == NULL || ex_task_write_labels(&f->task, dir)) return true;
    *error = f->p.error;
    return false;
}

EX_API void ex_demo_files_free(ex_demo_files *f)
{
    for (int32_t i = 0; i < EX_DEMO_SETS; i++) ex_task_file_free(&f->file[i]);
    ex_task_free(&f->task);
    ex_bert_free(&f->bert);
}

#endif /* EX_DEMO_FILES_H */
