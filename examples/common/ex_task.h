/* ex_task.h - what an encoder can be tuned for: classes or numbers for one or two sentences, spans that answer questions.
   From files to tokens, from logits to metrics and predictions.

   Include after ex_program.h and ex_metrics.h. A program fills an ex_task's first part, then

       ex_task_read_labels, ex_task_read     the files; the first labelled one may bring the names of the classes
       ex_task_tokenise                      once `config` and `tokenizer` are known
       ex_task_evaluate, ex_task_predict     with any model that fits `config` */
#ifndef EX_TASK_H
#define EX_TASK_H

enum {                                /* ex_task.metric; in the order of EX_METRICS */
    EX_METRIC_AUTO, EX_METRIC_ACCURACY, EX_METRIC_F1, EX_METRIC_F1_MACRO, EX_METRIC_MATTHEWS, EX_METRIC_PEARSON,
    EX_METRIC_SPEARMAN, EX_METRIC_EXACT
};
#define EX_METRICS "auto|accuracy|f1|f1-macro|matthews|pearson|spearman|exact"

/* One file of rows or questions, tokenised. */
typedef struct ex_task_file { const char *path; ex_rows rows; ex_squad squad; ex_dataset set; } ex_task_file;

typedef struct ex_task {
    /* the program's */
    apt_task_kind kind;
    int32_t metric;
    const char *text_column, *pair_column, *label_column;
    bool no_header;
    int64_t max_length, stride;       /* tokens; max_length 0: 128, for spans 384 */
    double null_threshold;
    apt_config config;
    ex_tokenizer *tokenizer;
    ex_error *error;
    /* the task's */
    const ex_labels *labels;          /* names of the classes: `known`, or those of the training rows; NULL: none yet */
    ex_labels known;
    int32_t *predicted;               /* stb_ds: class of every row of the set scored last */
    float *value;                     /* stb_ds: its probability, or the number predicted */
    ex_answers *answers;
} ex_task;

EX_API const char *ex_task_name(apt_task_kind kind)
{
    return kind == APT_TASK_CLASSIFY ? "classification" : kind == APT_TASK_REGRESS ? "regression"
           : kind == APT_TASK_SPAN ? "span answers" : "masked language modelling";
}

/* ------------------------------------------------------------------------------------------------ classes */

/* A result folder names its classes in labels.txt, one a line, in the order of the model's outputs. */
EX_API bool ex_task_read_labels(ex_task *task, const char *dir)
{
    char *path = ex_path(dir, "labels.txt"), *text = NULL;
    size_t bytes = 0;
    bool fine = true;
    if (ex_file_exists(path)) {
        text = ex_read_file(path, &bytes, task->error);
        fine = text != NULL;
        for (char *line = fine ? text : NULL, *end; line != NULL && *line != 0; line = end) {
            end = line + strcspn(line, "\r\n");
            if (*end != 0) *end++ = 0;
            if (*line != 0) ex_labels_add(&task->known, line);
        }
        task->labels = &task->known;
    }
    free(text);
    free(path);
    return fine;
}

/* labels.txt of a classifier; the folder of another model has none. */
EX_API bool ex_task_write_labels(ex_task *task, const char *dir)
{
    char *path = ex_path(dir, "labels.txt");
    ex_text text = {NULL, 0, 0};
    const int32_t count = task->kind == APT_TASK_CLASSIFY ? ex_labels_count(task->labels) : 0;
    for (int32_t i = 0; i < count; i++) ex_text_format(&text, "%s\n", ex_labels_name(task->labels, i));
    const bool fine = count > 0 ? ex_write_file(path, text.at, text.length, task->error) : ex_remove_file(path, task->error);
    ex_text_free(&text);
    free(path);
    return fine;
}

/* The classes of a model that is there: numbers where nobody names them, and as many as it has outputs. */
EX_API bool ex_task_check_labels(ex_task *task, const char *model)
{
    if (task->kind != APT_TASK_CLASSIFY) return true;
    for (int32_t i = 0; task->labels == NULL && i < task->config.labels; i++) {
        char name[16];
        snprintf(name, sizeof(name), "%d", (int)i);
        ex_labels_add(&task->known, name);
    }
    if (task->labels == NULL) task->labels = &task->known;
    return ex_labels_count(task->labels) == task->config.labels ||
           ex_fail(task->error, "%s: %d classes are named (labels.txt or the training rows), the model has %d", model,
                   (int)ex_labels_count(task->labels), (int)task->config.labels);
}

/* ------------------------------------------------------------------------------------------------ files */

/* Reads file->path, if there is one; labelled rows get the class names known already. limit: of rows or questions, 0: all. */
EX_API bool ex_task_read(ex_task *task, ex_task_file *file, bool labelled, int64_t limit)
{
    const char *path = file->path;
    ex_rows_desc desc;
    if (path == NULL) return true;
    if (task->kind == APT_TASK_SPAN) {
        if (!ex_squad_read(&file->squad, path, task->error)) return false;
        if (limit > 0 && file->squad.count > limit) file->squad.count = limit;
        return true;
    }
    memset(&desc, 0, sizeof(desc));
    desc.kind = !labelled ? EX_LABEL_NONE : task->kind == APT_TASK_REGRESS ? EX_LABEL_SCORE : EX_LABEL_CLASS;
    desc.text_column = task->text_column;
    desc.pair_column = task->pair_column;
    desc.label_column = labelled ? task->label_column : NULL;
    desc.no_header = task->no_header;
    desc.labels = task->labels;
    desc.limit = limit;
    if (!ex_rows_read(&file->rows, path, &desc, task->error)) return false;
    if (desc.kind == EX_LABEL_CLASS && task->labels == NULL) task->labels = &file->rows.labels;
    if (file->rows.replaced > 0)
        fprintf(stderr, "warning: %s: %lld bytes that are not UTF-8 were replaced\n", path, (long long)file->rows.replaced);
    return true;
}

/* Rows with the names of the model's classes keep their order; else the classes are those of the rows. */
EX_API bool exi_task_read_train(ex_task *task, ex_task_file *file, int64_t limit)
{
    if (ex_task_read(task, file, true, limit)) return true;
    if (task->labels == NULL || task->kind != APT_TASK_CLASSIFY) return false;
    task->labels = NULL;
    task->error->text[0] = 0;
    return ex_task_read(task, file, true, limit);
}

EX_API bool ex_task_read_train(ex_task *task, ex_task_file *file, int64_t limit)
{
    if (!exi_task_read_train(task, file, limit)) return false;
    return task->kind != APT_TASK_CLASSIFY || ex_labels_count(task->labels) > 1 ||
           ex_fail(task->error, "%s: expected two classes or more, found only \"%s\"", file->path,
                   ex_labels_name(task->labels, 0));
}

/* Longer texts are cut, or for spans cut into windows. what: "train" and such. */
EX_API bool ex_task_tokenise(ex_task *task, ex_task_file *file, const char *what)
{
    const bool span = task->kind == APT_TASK_SPAN;
    const int64_t room = task->config.positions - (task->config.family == APT_ROBERTA ? task->config.pad_id + 1 : 0);
    int64_t length = task->max_length > 0 ? task->max_length : span ? 384 : 128;
    const ex_dataset *set = &file->set;
    ex_squad_desc desc;
    if (file->path == NULL) return true;
    if (length > room) length = room;
    memset(&desc, 0, sizeof(desc));
    desc.max_length = (int32_t)length;
    desc.stride = (int32_t)task->stride;
    if (span ? !ex_dataset_squad(&file->set, &file->squad, task->tokenizer, &desc, task->error)
             : !ex_dataset_rows(&file->set, &file->rows, task->tokenizer, (int32_t)length, task->error))
        return false;
    printf("  %-8s %lld %s, mean %.0f tokens, longest %d", what, (long long)set->count, span ? "windows" : "rows",
           (double)set->starts[set->count] / (double)set->count, (int)set->longest);
    if (set->truncated > 0) printf(" (%lld %s)", (long long)set->truncated, span ? "questions in several windows" : "cut");
    printf("\n");
    return true;
}

EX_API void ex_task_file_free(ex_task_file *file)
{
    ex_dataset_free(&file->set);
    ex_rows_free(&file->rows);
    ex_squad_free(&file->squad);
}

/* The program's tokenizer stays its own. */
EX_API void ex_task_free(ex_task *task)
{
    ex_answers_free(task->answers);
    ex_labels_free(&task->known);
    stbds_arrfree(task->predicted);
    stbds_arrfree(task->value);
}

/* ------------------------------------------------------------------------------------------------ scores */

/* Takes the class with the highest logit and its probability, the number, or the span of every row of a batch. */
EX_API void exi_task_keep(void *user, const ex_batch *batch, const apt_output *output)
{
    ex_task *task = (ex_task *)user;
    const int32_t labels = task->config.labels;
    if (task->kind == APT_TASK_SPAN) {
        ex_answers_add(task->answers, batch, output->logits);
        return;
    }
    for (int32_t s = 0; s < batch->sequences; s++) {
        const int64_t row = batch->index[s];
        if (task->kind == APT_TASK_REGRESS) {
            task->value[row] = output->logits[s];
            continue;
        }
        const float *z = output->logits + (int64_t)s * labels;
        const int32_t best = ex_argmax(z, labels);
        task->predicted[row] = best;
        task->value[row] = (float)ex_softmax_best(z, labels, best);
    }
}

EX_API bool exi_task_score(ex_task *task, apt_ctx *ctx, apt_model *model, ex_task_file *file, ex_score_info *info)
{
    stbds_arrsetlen(task->predicted, (size_t)file->set.count);
    stbds_arrsetlen(task->value, (size_t)file->set.count);
    if (task->kind == APT_TASK_SPAN) {
        ex_answers_free(task->answers);
        task->answers = ex_answers_create(&file->squad, &file->set, 30);
    }
    const ex_source rows = ex_dataset_source(&file->set);
    return ex_score(ctx, model, &rows, exi_task_keep, task, info, task->error);
}

EX_API void exi_task_add_score(const ex_task *task, ex_scores *scores, int32_t metric, const char *name, double value)
{
    if (scores->count == 0 || task->metric == metric) {
        scores->chosen = value;
        scores->chosen_name = name;
    }
    scores->name[scores->count] = name;
    scores->value[scores->count++] = value;
}

/* Runs the model over a labelled file. Every metric of the task is a score; the one that was asked for, or the first, is
   `chosen`. */
EX_API bool ex_task_evaluate(ex_task *task, apt_ctx *ctx, apt_model *model, ex_task_file *file, ex_scores *scores,
                             ex_score_info *info)
{
    const ex_dataset *set = &file->set;
    const int32_t labels = task->config.labels;
    memset(scores, 0, sizeof(*scores));
    if (!exi_task_score(task, ctx, model, file, info)) return false;
    scores->loss = info->loss;
    if (task->kind == APT_TASK_SPAN) {
        ex_squad_score squad;
        if (!ex_squad_score_all(&squad, &file->squad, task->answers, task->null_threshold))
            return ex_fail(task->error, "%s: no questions", file->path);
        exi_task_add_score(task, scores, EX_METRIC_F1, "f1", squad.f1 / 100);
        exi_task_add_score(task, scores, EX_METRIC_EXACT, "exact", squad.exact / 100);
    } else if (task->kind == APT_TASK_REGRESS) {
        exi_task_add_score(task, scores, EX_METRIC_PEARSON, "pearson", ex_pearson(task->value, set->targets, set->count));
        exi_task_add_score(task, scores, EX_METRIC_SPEARMAN, "spearman", ex_spearman(task->value, set->targets, set->count));
    } else {
        const int32_t *guess = task->predicted, *truth = set->labels;
        exi_task_add_score(task, scores, EX_METRIC_ACCURACY, "accuracy", ex_accuracy(guess, truth, set->count));
        if (labels == 2) exi_task_add_score(task, scores, EX_METRIC_F1, "f1", ex_f1_binary(guess, truth, set->count, 1));
        exi_task_add_score(task, scores, EX_METRIC_F1_MACRO, "f1-macro", ex_f1_macro(guess, truth, set->count, labels));
        exi_task_add_score(task, scores, EX_METRIC_MATTHEWS, "matthews", ex_matthews(guess, truth, set->count, labels));
    }
    return true;
}

/* Once the model is known: does the metric that was asked for exist here? */
EX_API bool ex_task_check_metric(const ex_task *task)
{
    static const struct { apt_task_kind kind; int32_t metric; } known[] = {
        {APT_TASK_CLASSIFY, EX_METRIC_ACCURACY}, {APT_TASK_CLASSIFY, EX_METRIC_F1_MACRO}, {APT_TASK_CLASSIFY, EX_METRIC_MATTHEWS},
        {APT_TASK_REGRESS, EX_METRIC_PEARSON}, {APT_TASK_REGRESS, EX_METRIC_SPEARMAN}, {APT_TASK_SPAN, EX_METRIC_F1},
        {APT_TASK_SPAN, EX_METRIC_EXACT}};
    if (task->metric == EX_METRIC_AUTO) return true;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (known[i].kind == task->kind && known[i].metric == task->metric) return true;
    }
    if (task->kind == APT_TASK_CLASSIFY && task->metric == EX_METRIC_F1)
        return task->config.labels == 2 ||
               ex_fail(task->error, "--metric f1 is that of two classes, there are %d: try f1-macro", (int)task->config.labels);
    return ex_fail(task->error, "--metric does not fit the task %s", ex_task_name(task->kind));
}

/* ------------------------------------------------------------------------------------------------ predictions */

EX_API void exi_task_put(const ex_task *task, ex_text *text, int64_t row)
{
    ex_text_format(text, "%lld\t", (long long)row + 1);
    if (task->kind == APT_TASK_REGRESS) ex_text_format(text, "%.6g\n", (double)task->value[row]);
    else ex_text_format(text, "%s\t%.4f\n", ex_labels_name(task->labels, task->predicted[row]), (double)task->value[row]);
}

/* dir/predictions.tsv: row number, class or number, probability; dir/predictions.json for SQuAD. */
EX_API bool ex_task_predict(ex_task *task, apt_ctx *ctx, apt_model *model, ex_task_file *file, const char *dir)
{
    const bool span = task->kind == APT_TASK_SPAN;
    ex_score_info info;
    ex_text text = {NULL, 0, 0};
    if (file->path == NULL) return true;
    if (!ex_make_dirs(dir, task->error) || !exi_task_score(task, ctx, model, file, &info)) return false;
    char *path = ex_path(dir, span ? "predictions.json" : "predictions.tsv");
    ex_text_put(&text, task->kind == APT_TASK_REGRESS ? "row\tprediction\n" : "row\tprediction\tprobability\n");
    for (int64_t i = 0; !span && i < file->set.count; i++) exi_task_put(task, &text, i);
    const bool fine = span ? ex_answers_write(task->answers, path, task->null_threshold, task->error)
                           : ex_write_file(path, text.at, text.length, task->error);
    if (fine) printf("  wrote    %s\n", path);
    ex_text_free(&text);
    free(path);
    return fine;
}

#endif /* EX_TASK_H */
