/* ex_result.h - the end of a run: its figures, those of the folder it has written, the table and the report that show them.

   Include after ex_run.h. */
#ifndef EX_RESULT_H
#define EX_RESULT_H

#include "ex_cells.h"

/* ------------------------------------------------------------------------------------------------ figures */

EX_API int exi_compare_float(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

EX_API double exi_median(const float *values, int64_t count)
{
    float sorted[EX_TIMED];
    if (count <= 0) return 0;
    memcpy(sorted, values, (size_t)count * sizeof(float));
    qsort(sorted, (size_t)count, sizeof(float), exi_compare_float);
    return 0.5 * ((double)sorted[(count - 1) / 2] + (double)sorted[count / 2]);
}

/* first, last: median milliseconds per step of the first and of the last 32 steps (of a short run: of its halves), without the
   teacher's forward; teacher: the mean of that over the steps that had one. 0: not measured. */
typedef struct ex_outcome {
    double kept, first, last, teacher, seconds;
    int64_t training_peak;            /* bytes */
    int64_t parameters, disk;         /* of the saved folder */
    double tokens_per_second;         /* inference ... */
    double written_per_second;        /* ... and texts, token by token */
} ex_outcome;

/* What is known when the training ends, before ex_run_save. */
EX_API void ex_outcome_of_run(ex_outcome *outcome, const ex_run *run)
{
    const ex_timing *timing = &run->state.timing;
    const int64_t n = timing->count - EX_TIMED_SKIP, count = n < 2 * EX_TIMED ? n / 2 : EX_TIMED;
    float last[EX_TIMED];
    apt_model_info info = APT_ZERO;
    for (int64_t i = 0; i < count; i++) last[i] = timing->last[(n - 1 - i) % EX_TIMED];
    apt_model_query(run->model, &info);
    outcome->kept = (double)info.prunable / (double)info.prunable_dense;
    outcome->first = exi_median(timing->first, count);
    outcome->last = exi_median(last, count);
    outcome->teacher = timing->teacher_count > 0 ? timing->teacher / (double)timing->teacher_count : 0;
    outcome->seconds = run->state.seconds;
    outcome->training_peak = run->state.peak_bytes;
}

/* The folder that was just written, loaded again in a context of its own: what is measured with it is true of the files. */
typedef struct ex_saved { apt_ctx *ctx; apt_model *model; } ex_saved;

EX_API bool ex_saved_open(ex_saved *saved, ex_outcome *outcome, const char *dir, const ex_machine *machine, ex_error *error)
{
    char *file = ex_path(dir, "model.safetensors");
    apt_model_info info = APT_ZERO;
    saved->model = NULL;
    saved->ctx = ex_run_context(machine, error);
    outcome->disk = ex_file_bytes(file);
    free(file);
    if (saved->ctx == NULL) return false;
    if (apt_model_load(saved->ctx, dir, NULL, &saved->model) != APT_OK) return ex_fail(error, "%s", apt_error(saved->ctx));
    apt_model_query(saved->model, &info);
    outcome->parameters = info.parameters;
    return true;
}

EX_API void ex_saved_close(ex_saved *saved)
{
    apt_destroy(saved->ctx);
    memset(saved, 0, sizeof(*saved));
}

/* ------------------------------------------------------------------------------------------------ as text */

EX_API void exi_cell_ms(ex_cells *cells, const char *name, double milliseconds)
{
    if (milliseconds > 0) ex_cell(cells, name, "%.1f ms", milliseconds);
    else ex_cell(cells, name, "-");
}

EX_API void exi_cell_speed(ex_cells *cells, const char *name, double tokens_per_second)
{
    char text[32];
    if (tokens_per_second > 0)
        ex_cell(cells, name, "%s tokens/s", ex_count_text(text, sizeof(text), tokens_per_second));
    else ex_cell(cells, name, "-");
}

/* What is true of the saved folder. */
EX_API void ex_cells_saved(ex_cells *cells, const ex_outcome *outcome)
{
    char text[32];
    ex_cell(cells, "parameters", "%s", ex_count_text(text, sizeof(text), (double)outcome->parameters));
    ex_cell(cells, "prunable left", "%.1f %%", 100 * outcome->kept);
    ex_cell(cells, "on disk", "%s", ex_bytes_text(text, sizeof(text), (double)outcome->disk));
    exi_cell_speed(cells, "inference", outcome->tokens_per_second);
    if (outcome->written_per_second > 0) exi_cell_speed(cells, "writing", outcome->written_per_second);
}

EX_API void ex_cells_outcome(ex_cells *cells, const ex_outcome *outcome)
{
    char text[32];
    ex_cells_saved(cells, outcome);
    exi_cell_ms(cells, "step, at the start", outcome->first);
    exi_cell_ms(cells, "step, at the end", outcome->last);
    exi_cell_ms(cells, "teacher's forward", outcome->teacher);
    if (outcome->training_peak == 0) return;               /* nothing was trained */
    ex_cell(cells, "peak memory", "%s", ex_bytes_text(text, sizeof(text), (double)outcome->training_peak));
    ex_cell(cells, "training time", "%s", ex_time_text(text, sizeof(text), outcome->seconds));
}

/* dir/report.html out of dir/metrics.jsonl; cells may be NULL. */
EX_API bool ex_result_report(const char *dir, const char *title, const char *run, const ex_cells *cells, ex_error *error)
{
    ex_report *report = ex_report_create(title);
    char *log = ex_path(dir, "metrics.jsonl"), *html = ex_path(dir, "report.html");
    if (cells != NULL) ex_cells_report(cells, report);
    const bool fine = ex_report_add_metrics(report, run, log, error) && ex_report_write(report, html, error);
    ex_report_free(report);
    free(log);
    free(html);
    return fine;
}

#endif /* EX_RESULT_H */
