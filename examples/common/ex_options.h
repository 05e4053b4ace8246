/* ex_options.h - the command-line options that every training example shares: one struct, its rows for ex_args.h, its checks,
   and how it becomes an apt_train_desc. Include after ex_args.h and ex_run.h. */
#ifndef EX_OPTIONS_H
#define EX_OPTIONS_H

/* Prune-first and prune-after are LoRA with a one-shot prune, before the first step or where APT would reach its target. A
   program may append its own methods to both. */
enum { EX_METHOD_APT, EX_METHOD_LORA, EX_METHOD_FULL, EX_METHOD_PRUNE_AFTER, EX_METHOD_PRUNE_FIRST, EX_METHODS_SHARED };
#define EX_METHODS "apt|lora|full|prune-after|prune-first"

typedef struct ex_options {
    const char *adapt, *prune;
    ex_machine machine;
    int32_t preset, lr_schedule, schedule, salience, weights, quantize;
    bool resume, overwrite, grow, kurtosis, reset_moments, distill, group_by_length, qat, recompute;
    int64_t batch, accumulate, epochs, steps, warmup, rank, max_rank, seed;
    int64_t prune_begin, prune_end, distill_end, prune_every, round_heads, round_neurons, round_hidden, min_hidden, observe;
    int64_t eval_every, checkpoint_every, log_every, quantize_begin;
    double sparsity, start_sparsity, lr, weight_decay, clip, loss_scale, scale, growth, mask_step, momentum;
    double temperature, distill_pred, distill_layer, retry_minutes;
} ex_options;

EX_API void ex_options_init(ex_options *o)
{
    memset(o, 0, sizeof(*o));
    o->adapt = "query,value,up";
    o->prune = "heads,neurons,hidden";
    o->grow = o->kurtosis = o->distill = true;
    o->batch = 32;
    o->accumulate = 1;
    o->epochs = 3;
    o->rank = 8;
    o->max_rank = 64;
    o->observe = 32;
    o->lr = 2e-4;
    o->clip = 1;
    o->scale = 2;
    o->growth = 4;
    o->momentum = 0.9;
    o->retry_minutes = 10;
    o->temperature = 2.0 / 3;
    o->sparsity = 0.6;
    o->round_heads = o->round_neurons = o->round_hidden = 1;
#ifdef EX_CUDA
    o->machine.device = EX_DEVICE_CUDA;
#endif
}

/* What the table cannot check, for every method. */
EX_API bool ex_options_check_machine(const ex_options *o, ex_error *error)
{
    const bool cuda = o->machine.device == EX_DEVICE_CUDA;
#ifndef EX_CUDA
    if (cuda)
        return ex_fail(error, "--device cuda: this program was built for the CPU alone; make cuda builds it for both (build/cuda/)");
#endif
    if (!cuda && o->machine.math != 0) return ex_fail(error, "--math tf32, bf16 and fp16 go with --device cuda");
    if (cuda && o->quantize != APT_QUANT_NONE)
        return ex_fail(error, "--quantize needs --device cpu: products of small integers are the CPU's");
    return true;
}

EX_API bool ex_method_prunes(int32_t method)
{
    return method == EX_METHOD_APT || method == EX_METHOD_PRUNE_AFTER || method == EX_METHOD_PRUNE_FIRST;
}

/* Rows of the table of ex_args.h; o is an ex_options *. */
#define EX_OPTIONS_ROWS(o)                                                                                                  \
    EX_CHOICE("preset", &(o)->preset, "none|glue-small|glue-big|squad|cnndm|alpaca",                                        \
              "learning rate, batch, epochs, sparsity of the APT paper"),                                                   \
    EX_REAL("sparsity", "X", &(o)->sparsity, 0, 0.99, "share of the prunable parameters to remove"),                        \
    EX_GROUP("Optimizer"),                                                                                                  \
    EX_REAL("lr", "X", &(o)->lr, 1e-9, 1, "learning rate"),                                                                 \
    EX_CHOICE("lr-schedule", &(o)->lr_schedule, "linear|cosine|constant", "after the warm-up"),                             \
    EX_INT("warmup", "N", &(o)->warmup, 0, 1e9, "steps of warm-up"),                                                        \
    EX_INT("batch", "N", &(o)->batch, 1, 1e6, "sequences per batch"),                                                       \
    EX_INT("accumulate", "N", &(o)->accumulate, 1, 1e6, "batches per step"),                                                \
    EX_INT("epochs", "N", &(o)->epochs, 1, 1e6, "passes over the training rows"),                                           \
    EX_INT("steps", "N", &(o)->steps, 0, 1e12, "optimizer steps in all; 0: from --epochs"),                                 \
    EX_REAL("weight-decay", "X", &(o)->weight_decay, 0, 10, "decoupled (AdamW)"),                                           \
    EX_REAL("clip", "X", &(o)->clip, -1, 1e6, "largest gradient norm; 0 or less: no limit"),                                \
    EX_REAL("loss-scale", "X", &(o)->loss_scale, -1, 16777216, "first factor of the loss; 0: 65536 with --math fp16, else none; " \
            "below 0: none"),                                                                                               \
    EX_FLAG("group-by-length", &(o)->group_by_length, "batches of rows of similar length"),                                 \
    EX_INT("seed", "N", &(o)->seed, 0, 1e15, "order of the rows and all random starts"),                                    \
    EX_GROUP("Adapters"),                                                                                                   \
    EX_INT("rank", "N", &(o)->rank, 1, 4096, "at the start"),                                                               \
    EX_INT("max-rank", "N", &(o)->max_rank, 1, 4096, "most that one adapter may grow to"),                                  \
    EX_REAL("scale", "X", &(o)->scale, 1e-6, 1e3, "s in W + s B A"),                                                        \
    EX_TEXT("adapt", "LIST", &(o)->adapt, "which of query,key,value,output,up,down,gate,head"),                                  \
    EX_FLAG("grow", &(o)->grow, "APT: let important adapters grow"),                                                        \
    EX_REAL("growth", "X", &(o)->growth, 1, 1e3, "APT: adapter parameters at the end over those at the start"),             \
    EX_GROUP("Pruning"),                                                                                                    \
    EX_TEXT("prune", "LIST", &(o)->prune, "which of heads,neurons,hidden"),                                                 \
    EX_CHOICE("schedule", &(o)->schedule, "cubic|linear|exponential", "how the sparsity rises"),                            \
    EX_REAL("start-sparsity", "X", &(o)->start_sparsity, 0, 0.99, "the schedule's first value; exponential needs one above 0"), \
    EX_INT("prune-begin", "N", &(o)->prune_begin, 0, 1e12, "step of the first decision"),                                   \
    EX_INT("prune-end", "N", &(o)->prune_end, 0, 1e12, "step when the target is reached; 0: at 60 % of the steps"),         \
    EX_INT("prune-every", "N", &(o)->prune_every, 0, 1e9, "steps between decisions; 0: 100, or fewer in a short run"),      \
    EX_REAL("mask-step", "X", &(o)->mask_step, 0, 1, "how fast masks fade; 0: within one interval"),                        \
    EX_REAL("momentum", "X", &(o)->momentum, 0.01, 0.9999, "of the salience average"),                                      \
    EX_FLAG("kurtosis", &(o)->kurtosis, "count outliers in the salience"),                                                  \
    EX_CHOICE("salience", &(o)->salience, "scaled|raw|normalised", "how outliers are added: see apt_salience_norm in apt.h"), \
    EX_INT("round-heads", "N", &(o)->round_heads, 1, 1024, "kept heads are a multiple of N"),                               \
    EX_INT("round-neurons", "N", &(o)->round_neurons, 1, 65536, "kept neurons"),                                            \
    EX_INT("round-hidden", "N", &(o)->round_hidden, 1, 65536, "kept hidden dimensions"),                                    \
    EX_INT("min-hidden", "N", &(o)->min_hidden, 0, 65536, "least hidden size; 0: 16"),                                      \
    EX_FLAG("reset-moments", &(o)->reset_moments, "Adam starts anew when shapes change"),                                   \
    EX_INT("observe", "N", &(o)->observe, 1, 1e6, "one-shot: batches of salience before the prune"),                        \
    EX_GROUP("Distillation (APT)"),                                                                                         \
    EX_FLAG("distill", &(o)->distill, "learn from an earlier, larger state of the same model"),                             \
    EX_REAL("distill-temperature", "X", &(o)->temperature, 1e-3, 1e3, "of the teacher's and the student's predictions"),    \
    EX_REAL("distill-pred", "X", &(o)->distill_pred, 0, 1e3, "weight of the predictions; both 0: the task's default"),      \
    EX_REAL("distill-layer", "X", &(o)->distill_layer, 0, 1e3, "weight of the hidden states"),                              \
    EX_INT("distill-end", "N", &(o)->distill_end, 0, 1e12, "step from which the task loss stands alone; 0: --prune-end"),    \
    EX_GROUP("Running"),                                                                                                    \
    EX_FLAG("resume", &(o)->resume, "go on from OUT/checkpoint.apt"),                                                       \
    EX_FLAG("overwrite", &(o)->overwrite, "OUT may hold an earlier result"),                                                \
    EX_INT("eval-every", "N", &(o)->eval_every, 0, 1e12, "steps between evaluations; 0: ten in a run"),                     \
    EX_INT("checkpoint-every", "N", &(o)->checkpoint_every, 0, 1e12, "steps between checkpoints; 0: only on Ctrl-C"),       \
    EX_INT("log-every", "N", &(o)->log_every, 0, 1e12, "steps between lines of metrics.jsonl; 0: about 2000 lines"),        \
    EX_REAL("retry-minutes", "X", &(o)->retry_minutes, 0, 1e6, "how long a file that cannot be written, on a full disk, is " \
              "tried again before the run is given up"),                                                                    \
    EX_FLAG("recompute", &(o)->recompute, "less memory, up to a half more time: computes activations again"),                 \
    EX_CHOICE("weights", &(o)->weights, "f32|bf16|f16", "how frozen matrices are kept in memory"),                          \
    EX_CHOICE("quantize", &(o)->quantize, "none|int8|int4", "the layers' matrices as small integers, for inference only: in " \
              "OUT, calibrated on a batch; without training: those of --model, in memory, by their largest weights"),        \
    EX_FLAG("qat", &(o)->qat, "train with these small integers, too"),                                                      \
    EX_INT("quantize-begin", "N", &(o)->quantize_begin, 0, 1e12, "--qat: step from which on"),                              \
    EX_INT("threads", "N", &(o)->machine.threads, 0, 64, "0: all cores"),                                                   \
    EX_TEXT("kernels", "NAME", &(o)->machine.kernels, "ref, avx2, avx512, amx or neon; default: the fastest there is"),         \
    EX_CHOICE("device", &(o)->machine.device, EX_DEVICES, "what computes; cuda, an NVIDIA GPU, is for programs of make cuda"), \
    EX_CHOICE("math", &(o)->machine.math, EX_MATHS, "--device cuda: what products round their operands to")

/* The option's list is that of apt_preset_kind, with "none" in place of 0. */
static apt_preset_kind exi_preset(int32_t preset)
{
    return (apt_preset_kind)preset;
}

/* The preset fills in what the command line leaves open. */
EX_API void ex_options_preset(ex_options *o, const ex_arg *table)
{
    apt_preset_info info;
    if (o->preset == 0 || apt_preset_query(exi_preset(o->preset), &info) != APT_OK) return;
    const apt_train_desc t = apt_preset(exi_preset(o->preset));
    if (!ex_args_given(table, "lr")) o->lr = (double)info.learning_rate;
    if (!ex_args_given(table, "batch")) o->batch = info.batch;
    if (!ex_args_given(table, "epochs")) o->epochs = info.epochs;
    if (!ex_args_given(table, "sparsity") && t.target_sparsity > 0) o->sparsity = (double)t.target_sparsity;
}

/* "heads,neurons" -> bits; 0 with a message when a word is not in the list. */
static int32_t exi_parse_list(const char *option, const char *text, const char *const *names, int32_t count, ex_error *error)
{
    int32_t bits = 0;
    for (const char *at = text; *at != 0;) {
        const size_t length = strcspn(at, ",");
        int32_t i = 0;
        while (i < count && (strlen(names[i]) != length || strncmp(names[i], at, length) != 0)) i++;
        if (i == count) {
            ex_fail(error, "--%s: \"%.*s\" is not one of the names that --help lists", option, (int)length, at);
            return 0;
        }
        bits |= (int32_t)(1u << (uint32_t)i);
        at += length + (at[length] == ',');
    }
    if (bits == 0) ex_fail(error, "--%s: the list is empty", option);
    return bits;
}

static int32_t exi_adapt_bits(const ex_options *o, ex_error *error)       /* APT_ADAPT_* */
{
    static const char *const names[] = {"query", "key", "value", "output", "up", "down", "gate", "head"};
    return exi_parse_list("adapt", o->adapt, names, 8, error);
}

static int32_t exi_prune_bits(const ex_options *o, ex_error *error)       /* APT_PRUNE_* */
{
    static const char *const names[] = {"heads", "neurons", "hidden"};
    return exi_parse_list("prune", o->prune, names, 3, error);
}

static int32_t exi_salience(int32_t choice)                               /* apt_salience_norm */
{
    static const int32_t norms[] = {APT_SALIENCE_SCALED, APT_SALIENCE_RAW, APT_SALIENCE_NORMALISED};
    return norms[choice];
}

/* ... and for those that train: which options belong together. */
EX_API bool ex_options_check(const ex_options *o, ex_error *error)
{
    if (o->prune_end > 0 && o->prune_begin >= o->prune_end)
        return ex_fail(error, "--prune-begin must come before --prune-end");
    if (o->max_rank < o->rank)
        return ex_fail(error, "--max-rank %lld is below --rank %lld", (long long)o->max_rank, (long long)o->rank);
    if (o->start_sparsity > o->sparsity) return ex_fail(error, "--start-sparsity is above --sparsity");
    if (o->schedule == 2 && o->start_sparsity <= 0)
        return ex_fail(error, "--schedule exponential needs --start-sparsity above 0");
    if (o->qat && o->quantize == APT_QUANT_NONE) return ex_fail(error, "--qat needs --quantize int8 or int4");
    if (o->quantize_begin > 0 && !o->qat) return ex_fail(error, "--quantize-begin needs --qat");
    return exi_adapt_bits(o, error) != 0 && exi_prune_bits(o, error) != 0;
}

static bool exi_has_file(const char *dir, const char *name)
{
    char *path = ex_path(dir, name);
    const bool there = ex_file_exists(path);
    free(path);
    return there;
}

/* A run must not destroy its own source, nor an earlier result unasked. */
EX_API bool ex_options_check_out(const ex_options *o, const char *model, const char *out, ex_error *error)
{
    struct stat x, y;
    if (stat(model, &x) == 0 && stat(out, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino)
        return ex_fail(error, "--out is the folder that the run begins with: the result would replace it");
    if (o->resume && !exi_has_file(out, "checkpoint.apt")) return ex_fail(error, "--resume: there is no %s/checkpoint.apt", out);
    if (!o->resume && !o->overwrite && (exi_has_file(out, "checkpoint.apt") || exi_has_file(out, "model.safetensors")))
        return ex_fail(error, "%s holds an earlier run: --resume goes on with it, --overwrite replaces it", out);
    return true;
}

/* The step at which the target is reached: asked for, or the preset's distillation epochs, or 60 % of the run. */
static int64_t exi_prune_end(const ex_options *o, int64_t steps)
{
    apt_preset_info info;
    if (o->prune_end > 0) return o->prune_end;
    if (o->preset != 0 && apt_preset_query(exi_preset(o->preset), &info) == APT_OK && info.distill_epochs > 0)
        return steps * info.distill_epochs / info.epochs;
    return steps > 1 ? steps * 6 / 10 : 1;
}

static void exi_options_pruning(const ex_options *o, int32_t method, ex_run *run)
{
    apt_train_desc *t = &run->desc;
    t->prune = exi_prune_bits(o, run->error);
    t->round_heads = (int32_t)o->round_heads;
    t->round_neurons = (int32_t)o->round_neurons;
    t->round_hidden = (int32_t)o->round_hidden;
    t->min_hidden = (int32_t)o->min_hidden;
    t->salience_momentum = (float)o->momentum;
    t->disable_kurtosis = !o->kurtosis;
    t->salience_norm = exi_salience(o->salience);
    t->reset_moments = o->reset_moments;
    if (method == EX_METHOD_PRUNE_AFTER || method == EX_METHOD_PRUNE_FIRST) {
        run->prune_at = method == EX_METHOD_PRUNE_FIRST ? 0 : exi_prune_end(o, t->steps);
        run->prune_sparsity = (float)o->sparsity;
        run->observe = (int32_t)o->observe;
    } else if (method == EX_METHOD_APT) {
        t->target_sparsity = (float)o->sparsity;
        t->schedule = o->schedule;
        t->start_sparsity = (float)o->start_sparsity;
        t->prune_begin = o->prune_begin;
        t->prune_end = exi_prune_end(o, t->steps);
        t->update_frequency = (int32_t)o->prune_every;
        t->mask_step = (float)o->mask_step;
        t->disable_growth = !o->grow;
        t->growth = (float)o->growth;
        t->disable_distill = !o->distill;
        t->distill_temperature = (float)o->temperature;
        t->distill_pred = (float)o->distill_pred;
        t->distill_layer = (float)o->distill_layer;
        t->distill_end = o->distill_end;
    }
}

/* Fills run->desc and what belongs to it. */
EX_API bool ex_options_plan(const ex_options *o, int32_t method, ex_run *run)
{
    apt_train_desc *t = &run->desc;
    run->feed.batch = (int32_t)o->batch;
    run->feed.seed = t->seed = (uint64_t)o->seed;
    run->feed.by_length = o->group_by_length;
    run->quantize = o->quantize;      /* the words stand in the order of APT_QUANT_* */
    t->quantize = o->qat ? o->quantize : APT_QUANT_NONE;
    t->quantize_begin = o->quantize_begin;
    const int64_t per_epoch = (ex_feed_batches(&run->feed) + o->accumulate - 1) / o->accumulate;
    t->method = method == EX_METHOD_APT ? APT_METHOD_APT : method == EX_METHOD_FULL ? APT_METHOD_FULL : APT_METHOD_LORA;
    t->steps = o->steps > 0 ? o->steps : per_epoch * o->epochs;
    t->learning_rate = (float)o->lr;
    t->lr_schedule = (apt_lr_schedule)o->lr_schedule;
    t->warmup_steps = o->warmup;
    t->weight_decay = (float)o->weight_decay;
    t->clip = o->clip > 0 ? (float)o->clip : -1.0f;
    t->loss_scale = (float)o->loss_scale;
    t->accumulate = (int32_t)o->accumulate;
    t->rank = (int32_t)o->rank;
    t->max_rank = (int32_t)o->max_rank;
    t->scale = (float)o->scale;
    t->adapt = exi_adapt_bits(o, run->error);
    t->evaluate_every = run->evaluate == NULL ? 0 : o->eval_every > 0 ? o->eval_every : (t->steps + 9) / 10;
    t->checkpoint_every = o->checkpoint_every;
    t->recompute = o->recompute;
    exi_options_pruning(o, method, run);
    run->resume = o->resume;
    run->retry_seconds = 60 * o->retry_minutes;
    run->log_every = o->log_every > 0 ? o->log_every : t->steps / 2000 + 1;
    return (o->prune_begin <= t->steps && o->prune_end <= t->steps) ||
           ex_fail(run->error, "--prune-begin %lld and --prune-end %lld do not lie within the run's %lld steps",
                   (long long)o->prune_begin, (long long)o->prune_end, (long long)t->steps);
}

/* What a continuation must have alike and the library does not see, as one line (its own settings it compares itself). free() */
EX_API char *ex_options_settings(const ex_options *o, const ex_run *run)
{
    return ex_format("batch %lld%s, one-shot prune of %g at step %lld after %lld batches", (long long)o->batch,
                     o->group_by_length ? " grouped by length" : "", (double)run->prune_sparsity, (long long)run->prune_at,
                     (long long)(run->prune_sparsity > 0 ? o->observe : 0));
}

#endif /* EX_OPTIONS_H */
