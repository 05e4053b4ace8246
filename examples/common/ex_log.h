/* ex_log.h - metrics.jsonl: one JSON object a line, written and flushed at once, so that a killed run loses nothing and
   another program can follow the file.

       ex_log log = {0};
       ex_log_open(&log, "out/metrics.jsonl", -1, &error);           -1: new file; a step: go on from there
       ex_log_begin(&log, "step");  ex_log_int(&log, "step", 7);  ex_log_real(&log, "loss", 0.5);
       ex_log_end(&log, &error);                                     {"event":"step","step":7,"loss":0.5}
       ex_log_close(&log);

   Events that ex_report.h draws:
     settings   any names                 evaluate   step, any numbers (accuracy, f1, ...)
     step       step, loss, task_loss, distill_loss, learning_rate, sparsity_target, sparsity, kept, milliseconds,
                tokens_per_second, bytes, ...
     layers     step, ranks, heads, neurons (one number per layer), hidden
     result     any names                 prune, compact, grow, checkpoint   step, ... */
#ifndef EX_LOG_H
#define EX_LOG_H

#include "ex_base.h"
#include "ex_json.h"

/* Zero-initialise. */
typedef struct ex_log {
    FILE *file;
    char *path;
    off_t bytes;                      /* of whole lines in the file */
    ex_text line;
} ex_log;

/* Keeps the lines of a run that is resumed: those without "step" and those whose step is not above `last`. A last line
   without its end is the trace of a killed run and goes; a broken line elsewhere is an error. */
EX_API bool exi_log_keep(const char *path, const char *text, size_t bytes, int64_t last, ex_text *kept, ex_error *error)
{
    ex_json json;
    uint32_t number = 1;
    bool fine = true;
    memset(&json, 0, sizeof(json));
    for (size_t at = 0; fine && at < bytes; number++) {
        const char *end = (const char *)memchr(text + at, '\n', bytes - at);
        const size_t length = end != NULL ? (size_t)(end - (text + at)) : 0;
        char *copy;
        int64_t step;
        if (end == NULL) break;
        copy = ex_copy(text + at, length);
        if (ex_utf8_valid_prefix(copy, length) != length) fine = ex_fail(error, "%s:%u: expected UTF-8", path, number);
        fine = fine && ex_json_parse(&json, path, number, copy, length, error);
        if (fine && (!ex_json_int(ex_json_get(ex_json_root(&json), "step"), 0, INT64_MAX, &step) || step <= last)) {
            ex_text_add(kept, text + at, length + 1);
        }
        free(copy);
        at += length + 1;
    }
    ex_json_free(&json);
    return fine;
}

/* resume_step < 0: a new file. Else what the file holds up to that step stays, and lines are appended. */
EX_API bool ex_log_open(ex_log *log, const char *path, int64_t resume_step, ex_error *error)
{
    ex_text kept = {NULL, 0, 0};
    bool fine = true;
    memset(log, 0, sizeof(*log));
    ex_text_put(&kept, "");
    if (resume_step >= 0 && ex_file_exists(path)) {
        size_t bytes = 0;
        char *text = ex_read_file(path, &bytes, error);
        fine = text != NULL && exi_log_keep(path, text, bytes, resume_step, &kept, error);
        free(text);
    }
    fine = fine && ex_write_file(path, kept.at, kept.length, error);
    log->bytes = (off_t)kept.length;
    ex_text_free(&kept);
    if (!fine) return false;
    log->file = fopen(path, "ab");
    if (log->file == NULL) return ex_fail(error, "%s: cannot be opened: %s", path, strerror(errno));
    log->path = ex_copy(path, strlen(path));
    setvbuf(log->file, NULL, _IONBF, 0);          /* what fails is tried again by ex_log_write, not by the buffer */
    return true;
}

EX_API void exi_log_name(ex_log *log, const char *name)
{
    ex_text_put(&log->line, log->line.length > 1 ? "," : "");
    ex_json_put(&log->line, name, strlen(name));
    ex_text_put(&log->line, ":");
}

EX_API void ex_log_text(ex_log *log, const char *name, const char *value)
{
    exi_log_name(log, name);
    if (value != NULL) ex_json_put(&log->line, value, strlen(value));
    else ex_text_put(&log->line, "null");
}

EX_API void ex_log_begin(ex_log *log, const char *event)
{
    log->line.length = 0;
    ex_text_put(&log->line, "{");
    ex_log_text(log, "event", event);
}

EX_API void ex_log_int(ex_log *log, const char *name, int64_t value)
{
    exi_log_name(log, name);
    ex_text_format(&log->line, "%lld", (long long)value);
}

/* null when the value is not finite. */
EX_API void ex_log_real(ex_log *log, const char *name, double value)
{
    exi_log_name(log, name);
    if (ex_finite(value)) ex_text_format(&log->line, "%.9g", value);
    else ex_text_put(&log->line, "null");
}

EX_API void ex_log_bool(ex_log *log, const char *name, bool value)
{
    exi_log_name(log, name);
    ex_text_put(&log->line, value ? "true" : "false");
}

EX_API void ex_log_ints(ex_log *log, const char *name, const int32_t *values, int64_t count)
{
    exi_log_name(log, name);
    ex_text_put(&log->line, "[");
    for (int64_t i = 0; i < count; i++) ex_text_format(&log->line, "%s%d", i > 0 ? "," : "", (int)values[i]);
    ex_text_put(&log->line, "]");
}

EX_API void ex_log_close_line(ex_log *log)
{
    ex_text_put(&log->line, "}\n");
}

/* Writes a line that was closed, whole or not at all: after a failure it can be called again. */
EX_API bool ex_log_write(ex_log *log, ex_error *error)
{
    if (log->file == NULL) return true;
    if (fwrite(log->line.at, 1, log->line.length, log->file) == log->line.length) {
        log->bytes += (off_t)log->line.length;
        return true;
    }
    ex_fail(error, "%s: cannot be written: %s", log->path, strerror(errno));
    clearerr(log->file);
    if (ftruncate(fileno(log->file), log->bytes) != 0) ex_fail(error, "%s: half a line stays: %s", log->path, strerror(errno));
    return false;
}

/* Writes the line. A log that was never opened takes everything and writes nothing. */
EX_API bool ex_log_end(ex_log *log, ex_error *error)
{
    ex_log_close_line(log);
    return ex_log_write(log, error);
}

EX_API void ex_log_close(ex_log *log)
{
    if (log->file != NULL) fclose(log->file);
    free(log->path);
    ex_text_free(&log->line);
    memset(log, 0, sizeof(*log));
}

#endif /* EX_LOG_H */
