/* ex_run.h - what a training program does around apt.h: scoring a data set, the training loop with progress, events,
   metrics.jsonl, checkpoints and Ctrl-C, saving the result.

   Include after apt.h, ex_log.h, ex_args.h, ex_data.h and ex_progress.h. With EX_CUDA it also knows an NVIDIA GPU and is linked
   with the unit that apt_cuda.h describes (make cuda). A program calls ex_run_init, fills in what is its own,
   and calls ex_run_train once, ex_run_save, ex_run_close. Errors are in run->error. */
#ifndef EX_RUN_H
#define EX_RUN_H

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <sys/statvfs.h>
#ifdef EX_CUDA
#include "../../apt_cuda.h"
#endif

/* ------------------------------------------------------------------------------------------------ Ctrl-C and context */

static volatile sig_atomic_t exi_stop;        /* number of the signal that asked to stop */

static void exi_on_signal(int number)
{
    static const char text[] = "\nstopping after this step; once more ends at once\n";
    exi_stop = number;
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0) return;      /* there is nobody to tell */
}

/* SIGINT and SIGTERM ask for a stop after the present step; the second one ends the program at once. For the training
   alone: whatever else these programs do can be broken off at any time, since files are replaced as a whole. */
EX_API void ex_run_catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = exi_on_signal;
    action.sa_flags = (int)(SA_RESETHAND | SA_RESTART);
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

EX_API bool ex_run_stopping(void)
{
    return exi_stop != 0;
}

/* Errors come back through apt_error(); what is left for the screen are warnings, and errors of apt_create itself. The first
   message stays: when a callback fails, what the library says later is only that it was cancelled. */
static void exi_on_log(const apt_log_item *item, void *user)
{
    if (item->level == APT_LOG_WARNING) fprintf(stderr, "\nwarning: %s\n", item->message);
    else if (item->level == APT_LOG_ERROR && ((ex_error *)user)->text[0] == 0) ex_fail((ex_error *)user, "%s", item->message);
}

/* What computes. All zero: this machine's CPU. */
enum { EX_DEVICE_CPU, EX_DEVICE_CUDA };
#define EX_DEVICES "cpu|cuda"
#define EX_MATHS "fp32|tf32|bf16|fp16"            /* the order of apt_cuda_math */

typedef struct ex_machine {
    int64_t threads;                  /* 0: all cores */
    const char *kernels;              /* NULL: the fastest */
    int32_t device, math;
} ex_machine;

/* A context for a program: `error` receives the library's messages and must live as long as the context. */
EX_API apt_ctx *ex_run_context(const ex_machine *machine, ex_error *error)
{
    apt_desc desc = APT_ZERO;
    desc.threads = (int32_t)machine->threads;
    desc.kernels = machine->kernels;
    desc.log = exi_on_log;
    desc.log_user = error;
#ifdef EX_CUDA
    char message[512] = "";
    apt_cuda_desc cuda = APT_ZERO;
    cuda.math = (apt_cuda_math)machine->math;
    if (machine->device == EX_DEVICE_CUDA) {
        desc.backend = apt_cuda_open(&cuda, message, sizeof(message));
        if (desc.backend == NULL) return ex_fail(error, "--device cuda: %s", message), NULL;
    }
#endif
    return apt_create(&desc);
}

/* ------------------------------------------------------------------------------------------------ scoring a data set */

typedef struct ex_score_info { int64_t tokens, correct, terms; double seconds, loss; } ex_score_info;
typedef void (*ex_sink)(void *user, const ex_batch *batch, const apt_output *output);

static int64_t exi_logits_count(apt_model *model, const ex_batch *batch)
{
    apt_config config = APT_ZERO;
    apt_model_config(model, &config);
    if (config.task == APT_TASK_CLASSIFY) return (int64_t)batch->sequences * config.labels;
    if (config.task == APT_TASK_SPAN) return 2 * (int64_t)batch->offsets[batch->sequences];
    return batch->sequences;
}

static bool exi_score_batch(apt_ctx *ctx, apt_model *model, const ex_batch *batch, apt_output *output, bool logits,
                            ex_score_info *info, ex_error *error)
{
    const int64_t need = logits ? exi_logits_count(model, batch) : 0;
    const apt_batch view = ex_batch_apt(batch);
    if (need > output->logits_capacity) {
        free(output->logits);
        output->logits = (float *)ex_alloc((size_t)need, sizeof(float));
        output->logits_capacity = need;
    }
    const double start = ex_seconds();
    if (apt_model_forward(model, &view, output) != APT_OK) return ex_fail(error, "%s", apt_error(ctx));
    info->seconds += ex_seconds() - start;
    info->tokens += batch->offsets[batch->sequences];
    if (batch->target_offsets != NULL) info->tokens += batch->target_offsets[batch->sequences];
    info->correct += output->correct;
    info->loss += output->loss * (double)output->loss_count;
    info->terms += output->loss_count;
    return true;
}

/* Runs the model over `rows` in order of length, up to 64 of them and 4096 tokens at a time, and hands every batch with its
   logits to sink (NULL: the loss is enough, and no logits are kept). info receives the mean loss, and the
   time spent in the model alone. */
EX_API bool ex_score(apt_ctx *ctx, apt_model *model, const ex_source *rows, ex_sink sink, void *user, ex_score_info *info,
                     ex_error *error)
{
    int64_t *order = (int64_t *)ex_alloc((size_t)rows->count, sizeof(int64_t));
    apt_output output = APT_ZERO;
    ex_batch batch;
    bool fine = true;
    memset(&batch, 0, sizeof(batch));
    memset(info, 0, sizeof(*info));
    for (int64_t i = 0; i < rows->count; i++) order[i] = i;
    exi_sort_by_length(rows, order, rows->count);
    for (int64_t i = 0; fine && i < rows->count;) {
        int64_t take = 0, tokens = 0;
        while (i + take < rows->count && take < 64) {
            const int64_t more = rows->length(rows->set, order[i + take]);
            if (take > 0 && tokens + more > 4096) break;
            tokens += more;
            take++;
        }
        rows->gather(&batch, rows->set, order + i, (int32_t)take);
        fine = exi_score_batch(ctx, model, &batch, &output, sink != NULL, info, error);
        if (fine && sink != NULL) sink(user, &batch, &output);
        i += take;
    }
    info->loss = info->terms > 0 ? info->loss / (double)info->terms : 0;
    free(output.logits);
    free(order);
    ex_batch_free(&batch);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ the training run */

enum { EX_TIMED = 32, EX_TIMED_SKIP = 2 };    /* the first steps pay for cold caches */

/* Milliseconds of the first and of the last steps, and of the teacher's forward where there was one. */
typedef struct ex_timing { int64_t count, teacher_count; float first[EX_TIMED], last[EX_TIMED]; double teacher; } ex_timing;

/* What a checkpoint holds beside the library's own state, byte for byte. */
typedef struct ex_run_state {
    uint32_t version;
    int32_t pruned;                   /* the one-shot prune of prune-after-training has happened */
    int64_t step;
    ex_cursor at;
    double best;
    int64_t best_step;                /* -1: nothing evaluated yet */
    double seconds;                   /* of training, over all sessions */
    int64_t tokens, peak_bytes;
    ex_timing timing;
    char settings[1536];              /* what must not change between a run and its continuation */
} ex_run_state;

typedef enum ex_run_end { EX_RUN_DONE, EX_RUN_STOPPED, EX_RUN_FAILED } ex_run_end;

typedef struct ex_run ex_run;
struct ex_run {
    /* of ex_run_init */
    const char *name;                 /* title of the progress bar */
    apt_ctx *ctx;
    apt_model *model;
    const char *dir;                  /* receives metrics.jsonl, the checkpoint and the result */
    ex_error *error;
    ex_feed feed;
    ex_log log;
    /* the caller's */
    apt_train_desc desc;              /* without on_event and user */
    apt_batch (*prepare)(ex_run *run, ex_batch *batch);       /* NULL: the rows as they are */
    bool (*evaluate)(ex_run *run, double *metric);            /* higher is better; NULL: none. Writes run->error on failure */
    void *user;
    float prune_sparsity;             /* > 0: prune-after-training, all at once ... */
    const apt_magnitude_desc *magnitude;      /* ... or, not NULL, single weights at once ... */
    int64_t prune_at;                 /* ... when so many steps are done */
    const apt_iterative_desc *iterative;      /* single weights step by step; NULL: none. Its metric is that of `evaluate`, with
                                                 the sign turned where it says that lower is better */
    int32_t observe;                  /* batches of salience before that */
    apt_model *teacher;               /* another model to learn from ... */
    const apt_distill_desc *distill;  /* ... and how; NULL: none */
    bool sparse;                      /* ex_run_save compresses matrices that have zeros enough */
    int32_t quantize;                 /* APT_QUANT_*: what ex_run_save makes of the weights */
    bool keeps, resume;               /* keeps: a stop leaves a checkpoint, which resume begins with */
    const char *settings;             /* NULL: none */
    const ex_arg *arguments;          /* written into the log; NULL: none */
    int64_t log_every;                /* steps between "step" lines; 0: 1 */
    double retry_seconds;             /* how long ex_run_write tries again */
    /* the run's */
    apt_trainer *trainer;
    char *checkpoint;                 /* dir/checkpoint.apt */
    ex_run_state state;
    ex_progress bar;
    apt_step_info step;
    bool failed;                      /* inside an event */
};

EX_API void ex_run_init(ex_run *run, const char *name, apt_ctx *ctx, apt_model *model, ex_source train, const char *dir,
                        ex_error *error)
{
    memset(run, 0, sizeof(*run));
    run->name = name;
    run->ctx = ctx;
    run->model = model;
    run->dir = dir;
    run->error = error;
    run->feed.source = train;
    run->feed.batch = 32;
    run->checkpoint = ex_path(dir, "checkpoint.apt");
}

/* The context and the model stay the caller's. */
EX_API void ex_run_close(ex_run *run)
{
    apt_trainer_destroy(run->trainer);
    ex_log_close(&run->log);
    ex_feed_free(&run->feed);
    free(run->checkpoint);
    memset(run, 0, sizeof(*run));
}

static ex_run_end exi_run_fail(ex_run *run)
{
    if (!run->failed) ex_fail(run->error, "%s", apt_error(run->ctx));
    ex_progress_end(&run->bar);
    return EX_RUN_FAILED;
}

#define EX_RETRY_EVERY 5                      /* seconds between two tries of ex_run_write */

/* A full disk must not cost hours of training: what cannot be written (APT_E_IO; nothing else gets better by waiting) is tried again
   for run->retry_seconds, and there is time to make room. Ctrl-C gives up sooner. `writes` puts a message into run->error when it
   fails. */
EX_API bool ex_run_write(ex_run *run, apt_result (*writes)(void *user), void *user)
{
    const double end = ex_seconds() + run->retry_seconds;
    const bool stopping = ex_run_stopping();
    apt_result result;
    for (bool told = false; (result = writes(user)) != APT_OK; told = true) {
        if (result != APT_E_IO || ex_seconds() >= end || ex_run_stopping() != stopping) return false;
        if (!told)
            fprintf(stderr, "\nerror: %s\nNothing is lost yet: the model is in memory, and this is tried again for %.3g minutes. "
                    "Make room, or give up with Ctrl-C.\n", run->error->text, run->retry_seconds / 60);
        run->error->text[0] = 0;
        for (int i = 0; i < EX_RETRY_EVERY && ex_run_stopping() == stopping; i++) sleep(1);
    }
    return true;
}

static apt_result exi_run_log_line(void *user)
{
    ex_run *run = (ex_run *)user;
    return ex_log_write(&run->log, run->error) ? APT_OK : APT_E_IO;
}

/* Instead of ex_log_end */
EX_API bool ex_run_log_end(ex_run *run)
{
    ex_log_close_line(&run->log);
    return ex_run_write(run, exi_run_log_line, run);
}

/* The layer that a parameter belongs to by its name, or -1: encoder.layer.3, model.layers.3, and of T5 encoder.block.3 and
   decoder.block.3.layer.1, where each block of the decoder is two layers, its self attention and what follows it. */
static int32_t exi_layer_of(const apt_config *config, const char *name)
{
    const char *block = strstr(name, ".block."), *layers = strstr(name, ".layers."), *layer = strstr(name, ".layer.");
    const char *number = block != NULL ? block + 7 : layers != NULL ? layers + 8 : layer != NULL ? layer + 7 : NULL;
    const int32_t at = number != NULL ? (int32_t)strtol(number, NULL, 10) : -1;
    if (block == NULL || strstr(name, "decoder.") == NULL) return at;
    return config->layers - 2 * config->decoder_layers + 2 * at + (layer != NULL && strncmp(layer, ".layer.0.", 9) != 0);
}

/* Adapter ranks, heads and neurons of every layer, and the hidden size. */
static bool exi_run_log_layers(ex_run *run)
{
    apt_config config = APT_ZERO;
    apt_model_config(run->model, &config);
    int32_t *values = (int32_t *)ex_alloc(3 * (size_t)config.layers, sizeof(int32_t)), *heads = values + config.layers,
            *neurons = heads + config.layers;
    for (int32_t i = 0; i < apt_model_parameters(run->model); i++) {
        apt_parameter p;
        if (apt_model_parameter(run->model, i, &p) != APT_OK || strncmp(p.name, "lora_A.", 7) != 0) continue;
        const int32_t layer = exi_layer_of(&config, p.name);
        if (layer >= 0 && layer < config.layers) values[layer] += (int32_t)p.rows;
    }
    for (int32_t l = 0; l < config.layers; l++) {
        heads[l] = config.layer[l].heads;
        neurons[l] = config.layer[l].neurons;
    }
    ex_log_begin(&run->log, "layers");
    ex_log_int(&run->log, "step", run->state.step);
    ex_log_ints(&run->log, "ranks", values, config.layers);
    ex_log_ints(&run->log, "heads", heads, config.layers);
    ex_log_ints(&run->log, "neurons", neurons, config.layers);
    ex_log_int(&run->log, "hidden", config.hidden);
    free(values);
    return ex_run_log_end(run);
}

static void exi_run_peak(ex_run *run)
{
    const int64_t peak = apt_memory_info(run->ctx).peak_bytes;
    if (peak > run->state.peak_bytes) run->state.peak_bytes = peak;
}

static apt_result exi_run_write_checkpoint(void *user)
{
    ex_run *run = (ex_run *)user;
    const apt_result result = apt_checkpoint_save(run->trainer, run->checkpoint, &run->state, sizeof(run->state));
    if (result != APT_OK) ex_fail(run->error, "%s", apt_error(run->ctx));
    return result;
}

static bool exi_run_save(ex_run *run)
{
    run->state.version = 2;
    run->state.at = run->feed.at;
    exi_run_peak(run);
    return ex_run_write(run, exi_run_write_checkpoint, run);
}

static void exi_time(ex_timing *timing, const apt_step_info *step)
{
    const float own = (float)(step->milliseconds - step->teacher_milliseconds);
    const int64_t n = timing->count++ - EX_TIMED_SKIP;
    timing->teacher += step->teacher_milliseconds;
    timing->teacher_count += step->teacher_milliseconds > 0;
    if (n < 0) return;
    if (n < EX_TIMED) timing->first[n] = own;
    timing->last[n % EX_TIMED] = own;
}

static bool exi_event_step(ex_run *run, const apt_step_info *step)
{
    ex_progress_values shown;
    shown.loss = step->loss;
    shown.sparsity = run->desc.target_sparsity > 0 || step->kept < 1 ? 1 - step->kept : step->sparsity > 0 ? step->sparsity : -1;
    shown.tokens_per_second = step->tokens_per_second;
    run->state.seconds += step->milliseconds / 1e3;
    run->state.tokens += step->tokens;
    exi_time(&run->state.timing, step);
    ex_progress_update(&run->bar, step->step, &shown);
    if (run->log_every > 1 && step->step % run->log_every != 0 && step->step != run->desc.steps) return true;
    ex_log_begin(&run->log, "step");
    ex_log_int(&run->log, "step", step->step);
    ex_log_real(&run->log, "loss", step->loss);
    ex_log_real(&run->log, "task_loss", step->task_loss);
    ex_log_real(&run->log, "distill_loss", step->distill_loss);
    ex_log_real(&run->log, "learning_rate", step->learning_rate);
    ex_log_real(&run->log, "gradient_norm", step->gradient_norm);
    ex_log_real(&run->log, "sparsity_target", step->sparsity_target);
    ex_log_real(&run->log, "sparsity", step->sparsity);
    ex_log_real(&run->log, "kept", step->kept);
    ex_log_real(&run->log, "mu", step->mu);
    ex_log_int(&run->log, "tokens", step->tokens);
    ex_log_real(&run->log, "milliseconds", step->milliseconds);
    ex_log_real(&run->log, "teacher_milliseconds", step->teacher_milliseconds);
    ex_log_real(&run->log, "tokens_per_second", step->tokens_per_second);
    ex_log_int(&run->log, "trainable", step->trainable);
    ex_log_int(&run->log, "bytes", step->bytes);
    if (step->loss_scale != 1) ex_log_real(&run->log, "loss_scale", step->loss_scale);
    if (step->skipped) ex_log_bool(&run->log, "skipped", true);
    return ex_run_log_end(run);
}

/* One line for each thing that happened. A decision is silent: its compaction follows within the interval. */
static void exi_note_change(ex_run *run, const apt_event *event)
{
    const long long step = (long long)run->state.step;
    char before[32], after[32];
    ex_count_text(before, sizeof(before), (double)event->parameters_before);
    ex_count_text(after, sizeof(after), (double)event->parameters_after);
    if (event->kind == APT_EVENT_PRUNE && !event->budget_reached) {
        ex_progress_note(&run->bar, "  step %5lld  prune    the target of %.1f %% is out of reach: the least sizes forbid it",
                         step, 100 * run->step.sparsity_target);
    } else if (event->kind == APT_EVENT_PRUNE && (run->magnitude != NULL || run->iterative != NULL)) {
        ex_progress_note(&run->bar, "  step %5lld  prune    %s -> %s active weights, %.1f %% are 0", step, before, after,
                         100 * event->step->sparsity);
    } else if (event->kind == APT_EVENT_COMPACT) {
        ex_progress_note(&run->bar, "  step %5lld  compact  %d heads, %d neurons, d %d: %s -> %s parameters, %.1f %% left", step,
                         (int)event->heads, (int)event->neurons, (int)event->hidden, before, after, 100 * run->step.kept);
    } else if (event->kind == APT_EVENT_GROW) {
        ex_progress_note(&run->bar, "  step %5lld  grow     adapters %s -> %s parameters", step, before, after);
    } else if (event->kind == APT_EVENT_TEACHER) {
        ex_progress_note(&run->bar, "  step %5lld  teacher  a snapshot of the tuned parameters", step);
    }
}

static bool exi_event_change(ex_run *run, const apt_event *event)
{
    static const char *const names[] = {"", "step", "prune", "compact", "grow", "teacher", "evaluate", "checkpoint"};
    exi_note_change(run, event);
    ex_log_begin(&run->log, names[event->kind]);
    ex_log_int(&run->log, "step", run->state.step);
    if (event->kind != APT_EVENT_TEACHER) {
        ex_log_int(&run->log, "parameters_before", event->parameters_before);
        ex_log_int(&run->log, "parameters_after", event->parameters_after);
    }
    if (event->kind == APT_EVENT_COMPACT) {
        ex_log_int(&run->log, "bytes_before", event->bytes_before);
        ex_log_int(&run->log, "bytes_after", event->bytes_after);
    }
    if (!ex_run_log_end(run)) return false;
    return event->kind == APT_EVENT_COMPACT || event->kind == APT_EVENT_GROW ? exi_run_log_layers(run) : true;
}

static bool exi_event_evaluate(ex_run *run, apt_event *event)
{
    if (run->evaluate == NULL) return true;
    if (!run->evaluate(run, &event->metric)) return false;
    event->has_metric = 1;
    if (run->state.best_step < 0 || event->metric > run->state.best) {
        run->state.best = event->metric;
        run->state.best_step = run->state.step;
    }
    if (run->iterative != NULL && run->iterative->lower_is_better) event->metric = -event->metric;
    return true;
}

static int exi_on_event(apt_event *event, void *user)
{
    ex_run *run = (ex_run *)user;
    bool fine = true;
    run->step = *event->step;
    run->state.step = event->step->step;
    switch (event->kind) {
    case APT_EVENT_STEP: fine = exi_event_step(run, event->step); break;
    case APT_EVENT_EVALUATE: fine = exi_event_evaluate(run, event); break;
    case APT_EVENT_CHECKPOINT: fine = !run->keeps || exi_run_save(run); break;
    default: fine = exi_event_change(run, event); break;
    }
    if (!fine) run->failed = true;
    return fine ? 0 : 1;
}

static bool exi_run_load(ex_run *run)
{
    size_t bytes = sizeof(run->state);
    if (apt_checkpoint_load(run->trainer, run->checkpoint, &run->state, &bytes) != APT_OK)
        return ex_fail(run->error, "%s", apt_error(run->ctx));
    run->state.settings[sizeof(run->state.settings) - 1] = 0;
    if (bytes != sizeof(run->state) || run->state.version != 2)
        return ex_fail(run->error, "%s: not a checkpoint of this program", run->checkpoint);
    if (run->settings != NULL && strncmp(run->settings, run->state.settings, sizeof(run->state.settings) - 1) != 0)
        return ex_fail(run->error, "%s was written with other settings.\n  then: %s\n  now:  %s", run->checkpoint,
                       run->state.settings, run->settings);
    if (run->state.at.epoch < 0 || run->state.at.index < 0 || run->state.at.index > run->feed.source.count)
        return ex_fail(run->error, "%s: its data position does not fit these training rows", run->checkpoint);
    run->feed.at = run->state.at;
    run->model = apt_trainer_model(run->trainer);
    return true;
}

/* Files are written as NAME.tmp-PROCESS-N and then renamed. What a killed process has left of that is removed. */
static void exi_run_sweep(const char *dir)
{
    DIR *folder = opendir(dir);
    const struct dirent *entry;
    while (folder != NULL && (entry = readdir(folder)) != NULL) {
        const char *mark = strstr(entry->d_name, ".tmp-");
        char *end = NULL;
        const long process = mark != NULL ? strtol(mark + 5, &end, 10) : 0;
        if (process <= 0 || process > INT32_MAX || *end != '-' || end[1 + strspn(end + 1, "0123456789")] != 0) continue;
        if (kill((pid_t)process, 0) == 0 || errno != ESRCH) continue;
        char *path = ex_path(dir, entry->d_name);
        if (remove(path) == 0) fprintf(stderr, "removed %s, the beginning of a file from a run that was killed\n", path);
        free(path);
    }
    if (folder != NULL) closedir(folder);
}

static bool exi_run_begin(ex_run *run)
{
    memset(&run->state, 0, sizeof(run->state));
    memset(&run->step, 0, sizeof(run->step));
    run->state.best_step = -1;
    run->failed = false;
    if (run->settings != NULL) snprintf(run->state.settings, sizeof(run->state.settings), "%s", run->settings);
    run->desc.on_event = exi_on_event;
    run->desc.user = run;
    apt_memory_reset_peak(run->ctx);
    if (apt_trainer_create(run->model, &run->desc, &run->trainer) != APT_OK)
        return ex_fail(run->error, "%s", apt_error(run->ctx));
    apt_trainer_query(run->trainer, &run->desc);
    run->desc.on_event = exi_on_event;
    if (run->iterative != NULL && apt_trainer_iterative(run->trainer, run->iterative) != APT_OK)
        return ex_fail(run->error, "%s", apt_error(run->ctx));
    if (run->distill != NULL && apt_trainer_teacher(run->trainer, run->teacher, run->distill) != APT_OK)
        return ex_fail(run->error, "%s", apt_error(run->ctx));
    if (run->resume && !exi_run_load(run)) return false;
    exi_run_sweep(run->dir);
    char *path = ex_path(run->dir, "metrics.jsonl");
    const bool opened = ex_log_open(&run->log, path, run->resume ? run->state.step : -1, run->error);
    free(path);
    if (!opened || run->resume) return opened;
    if (run->arguments != NULL) {
        ex_log_begin(&run->log, "settings");
        ex_args_log(run->arguments, &run->log);
        if (!ex_run_log_end(run)) return false;
    }
    return exi_run_log_layers(run);
}

static apt_batch exi_run_next(ex_run *run)
{
    ex_batch *rows = ex_feed_next(&run->feed);
    return run->prepare != NULL ? run->prepare(run, rows) : ex_batch_apt(rows);
}

static bool exi_run_watch(ex_run *run)
{
    double metric;
    if (run->evaluate == NULL || run->evaluate(run, &metric)) return true;
    run->failed = true;
    return false;
}

/* Single weights at once, with an evaluation before and behind. */
static bool exi_run_magnitude(ex_run *run)
{
    if (!exi_run_watch(run) || apt_trainer_magnitude(run->trainer, run->magnitude, NULL) != APT_OK) return false;
    run->state.pruned = 1;
    return exi_run_watch(run);
}

/* Prune-after-training, when it is due: salience from `observe` batches, then everything at once. What steps are left are for
   recovery. */
static bool exi_run_one_shot(ex_run *run)
{
    const bool planned = run->prune_sparsity > 0 || run->magnitude != NULL;
    if (!planned || run->state.pruned || run->state.step < run->prune_at) return true;
    if (run->magnitude != NULL) return exi_run_magnitude(run);
    for (int32_t i = 0; i < run->observe; i++) {
        const apt_batch batch = exi_run_next(run);
        if (apt_trainer_observe(run->trainer, &batch) != APT_OK) return false;
    }
    if (apt_trainer_prune_now(run->trainer, run->prune_sparsity) != APT_OK) return false;
    run->state.pruned = 1;
    return exi_run_log_layers(run);
}

static ex_run_end exi_run_stop(ex_run *run)
{
    const bool saved = !run->keeps || exi_run_save(run);
    ex_progress_end(&run->bar);
    return saved ? EX_RUN_STOPPED : EX_RUN_FAILED;
}

/* Trains run->model from the start or from the checkpoint to desc.steps, then snaps and compacts (apt_trainer_finish). */
EX_API ex_run_end ex_run_train(ex_run *run)
{
    apt_step_info info;
    memset(&run->bar, 0, sizeof(run->bar));
    if (!exi_run_begin(run)) return EX_RUN_FAILED;
    fflush(stdout);
    ex_progress_begin(&run->bar, run->name, run->state.step, run->desc.steps);
    while (run->state.step < run->desc.steps) {
        if (!exi_run_one_shot(run)) return exi_run_fail(run);
        const apt_batch batch = exi_run_next(run);
        if (apt_trainer_step(run->trainer, &batch, &info) != APT_OK) return exi_run_fail(run);
        if (ex_run_stopping()) return exi_run_stop(run);
    }
    if (!exi_run_one_shot(run) || apt_trainer_finish(run->trainer) != APT_OK || !exi_run_log_layers(run))
        return exi_run_fail(run);
    exi_run_peak(run);
    ex_progress_end(&run->bar);
    return EX_RUN_DONE;
}

/* ------------------------------------------------------------------------------------------------ the result */

/* Better before hours of training than after: is there room for the model as it is now, and for a checkpoint? */
EX_API void ex_run_warn_space(const ex_run *run)
{
    struct statvfs disk;
    apt_model_info info;
    char left[32], most[32];
    apt_model_query(run->model, &info);
    const double needed = 8.0 * (double)info.parameters;
    if (statvfs(run->dir, &disk) != 0) return;
    const double bytes = (double)disk.f_bavail * (double)disk.f_frsize;
    if (bytes < needed)
        fprintf(stderr, "warning: %s has room for %s; the result and a checkpoint may need %s\n", run->dir,
                ex_bytes_text(left, sizeof(left), bytes), ex_bytes_text(most, sizeof(most), needed));
}

/* kind: APT_QUANT_*, also NONE. calibration: what scales are chosen by; NULL: the largest weight. */
EX_API bool ex_quantize(apt_model *model, int32_t kind, const apt_batch *calibration)
{
    apt_quantize_desc d = APT_ZERO;
    d.kind = kind;
    d.batches = calibration;
    d.batch_count = calibration != NULL;
    return kind == APT_QUANT_NONE || apt_model_quantize(model, &d) == APT_OK;
}

/* Calibrated on what would have been the next batch; a model that was trained with its integers keeps just these. */
static bool exi_run_quantize(ex_run *run)
{
    if (run->quantize == APT_QUANT_NONE) return true;
    const apt_batch batch = exi_run_next(run);
    return ex_quantize(run->model, run->quantize, run->desc.quantize == APT_QUANT_NONE ? &batch : NULL);
}

typedef struct exi_result { ex_run *run; const char *tokenizer_dir; } exi_result;

static apt_result exi_run_write_result(void *user)
{
    const exi_result *job = (const exi_result *)user;
    const ex_run *run = job->run;
    const apt_result result = run->sparse ? apt_model_save_sparse(run->model, run->dir, NULL) : apt_model_save(run->model, run->dir);
    if (result != APT_OK) ex_fail(run->error, "%s", apt_error(run->ctx));
    else if (job->tokenizer_dir != NULL && !ex_copy_tokenizer(job->tokenizer_dir, run->dir, run->error)) return APT_E_IO;
    return result;
}

/* Ends the training and writes the model, adapters folded in, into run->dir, with the tokenizer of another folder. */
EX_API bool ex_run_save(ex_run *run, const char *tokenizer_dir)
{
    exi_result job = {run, tokenizer_dir};
    apt_trainer_destroy(run->trainer);
    run->trainer = NULL;
    if (apt_model_merge(run->model, NULL, NULL) != APT_OK || !exi_run_quantize(run))
        return ex_fail(run->error, "%s", apt_error(run->ctx));
    return ex_run_write(run, exi_run_write_result, &job);
}

#endif /* EX_RUN_H */
