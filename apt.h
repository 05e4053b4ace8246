/* apt.h - v0.1.0 - adaptive pruning and tuning of pretrained transformers - public domain or MIT, your choice (end of file)

   apt.h fine-tunes a pretrained transformer and makes it smaller and faster while it does so: low-rank adapters learn the task,
   and attention heads, FFN neurons and hidden dimensions that matter least are faded out and then physically removed, step by
   step, until a sparsity you chose is reached. One header, C11 or C++17, no dependencies beyond libc, libm and pthread.

   It implements APT (Zhao, Hajishirzi, Cao, "APT: Adaptive Pruning and Tuning Pretrained Language Models for Efficient Training
   and Inference", ICML 2024, arXiv 2401.12200) for BERT and RoBERTa encoders, T5 (v1.0, v1.1, Flan) and LLaMA (1, 2, 3; Qwen2).

   DO THIS in exactly one C or C++ file, and include the header plainly everywhere else:

       #define APT_IMPLEMENTATION
       #include "apt.h"

   and link with -lm -lpthread. No -march flag is needed: kernels for AVX-512, AVX2 and NEON are compiled in and chosen at
   run time.

   TABLE OF CONTENTS (each section is marked in the text: search for // >>name)

       >>api           configuration, results; the core on raw arrays; context, model, trainer
       >>platform      errors, memory, threads, files
       >>numbers       half precision, random numbers, sums in a fixed order
       >>kernels       matrix products and vectors, one table per instruction set
       >>ops           forward and backward of every layer
       >>core          the method on raw arrays
       >>sparsify      magnitude pruning, compressed matrices, learned sparsity
       >>model         parameters, families, one pass, generation, compaction, merge
       >>train         optimizer, salience, decisions, distillation, a step
       >>files         JSON, safetensors, Hugging Face folders, checkpoints
       >>context       making and ending a context

   A section calls only sections above it.

   WHAT IT IS NOT
   - No autograd, no graph, no tensor type for general use: it knows transformers, and each backward is written by hand.
   - No tokenizer and no data reader: batches are arrays of token ids. (examples/common has both.)
   - No downloads: it reads checkpoint folders that are on the disk.
   - It never prints to stdout, never exits, never aborts.

   ---------------------------------------------------------------------------------------------------------------------
   IN 40 LINES

       #define APT_IMPLEMENTATION
       #include "apt.h"
       #include <stdio.h>

       extern int my_next_batch(apt_batch *batch);     // your data: packed token ids and labels

       int main(void)
       {
           apt_ctx *ctx = apt_create(NULL);                          // all cores, malloc, messages to stderr
           apt_model *model = NULL;
           apt_load_desc load = APT_ZERO;
           load.task = APT_TASK_CLASSIFY;
           load.labels = 2;
           if (apt_model_load(ctx, "roberta-base", &load, &model) != APT_OK) {
               fprintf(stderr, "%s\n", apt_error(ctx));              // file, tensor, expected and found
               return 1;
           }
           apt_train_desc desc = apt_preset(APT_PRESET_GLUE_BIG);    // the paper's Table 6
           desc.steps = 5000;
           desc.target_sparsity = 0.6f;
           apt_trainer *trainer = NULL;
           if (apt_trainer_create(model, &desc, &trainer) != APT_OK) return 1;

           apt_batch batch;
           apt_step_info info;
           while (my_next_batch(&batch) && apt_trainer_step(trainer, &batch, &info) == APT_OK)
               printf("step %lld loss %.4f kept %.1f%% %.0f tokens/s\n",
                      (long long)info.step, info.loss, 100 * info.kept, info.tokens_per_second);

           apt_trainer_finish(trainer);                              // the last decision takes effect
           apt_model_merge(model, NULL, NULL);                       // adapters folded in: a plain, smaller model
           apt_model_save(model, "roberta-small");                   // config.json + model.safetensors, loads back in one call
           apt_destroy(ctx);                                         // frees everything made from ctx
           return 0;
       }

   ---------------------------------------------------------------------------------------------------------------------
   THREE WAYS IN

   1. The core alone. #define APT_ONLY_CORE before including: pure functions on your own float arrays (schedule, salience,
      search, masks, gather, adapters, distillation and sparsity losses, BK-core). No files, no threads, no allocation. See
      examples/custom_trainer.c.
   2. Model and trainer, as above.
   3. The example programs: examples/roberta.c, examples/t5.c and examples/llama.c are complete command-line trainers, one for
      each kind of model: encoders, encoder-decoders, decoders.

   BUILD OPTIONS, defined before the implementation is included

       APT_STATIC          every public function is static
       APT_ONLY_CORE       declarations and implementation of the core only
       APT_NO_THREADS      no threads of its own (apt_desc.parallel_for still works)
       APT_NO_SIMD         the plain C kernels only
       APT_NO_MMAP         files are read, not mapped
       APT_NO_POSIX        plain C11 library only
       APT_NO_STDIO        errors are not written to stderr when no logger is set

   STEP BY STEP
   - apt_create makes a context: allocator, logger, threads, kernels, last error. There is no other state: contexts are
     independent, and one context is used by one thread at a time.
   - apt_model_load reads a Hugging Face folder; apt_model_create makes a random model of a given shape.
   - apt_trainer_create attaches adapters (or makes all weights trainable) and the optimizer.
   - apt_trainer_step takes one packed batch: sequences stand one behind the other, offsets tell where each begins. There are
     no padding tokens, so none are computed.
   - Evaluate with apt_model_forward whenever you like; report the metric with apt_trainer_metric.
   - apt_trainer_finish, apt_model_merge, apt_model_save. The saved config.json holds the shape of every layer under "apt".

   ON SCHEDULES
   Sparsity is the share of the prunable parameters (attention and FFN matrices) that is gone. It rises from 0 at prune_begin to
   target_sparsity at prune_end along a cubic curve; the steps behind prune_end are for recovery. Every update_frequency steps
   a decision is made.

   ON SALIENCE
   A unit (head, neuron, hidden dimension) is worth (sum |activation|) * (sum |gradient|), summed over its features and
   averaged over steps, plus the square root of the kurtosis of its outputs, which protects units with rare large values.
   What is kept is decided by salience per parameter, so that a large head and a single neuron compete fairly.

   ON MASKS AND COMPACTION
   Units that lost fade: their mask falls from 1 to 0 by mask_step per step, while the others adapt. Masked dimensions do not
   count in LayerNorm's statistics, so a masked model and its compacted copy compute the same. When all masks have arrived,
   every array is gathered to the survivors, and the next step is faster and takes less memory.

   ON ADAPTERS
   y = (W + s B A) x on query, value and the FFN up projection (T5: of all three attentions, and wi or wi_0). W is frozen and
   packed for the kernels once; the adapter rides inside the same product. At each decision the more important half of the
   adapters grows in rank within a budget; new columns of B are 0, so growing changes no output.

   ON DISTILLATION
   When the first decision begins to fade units, the student's tuned parameters are snapshot: this teacher shares all frozen
   weights. The loss moves from the task to the teacher's predictions and hidden states while pruning goes on; behind
   distill_end (default: prune_end) the task loss stands alone and the teacher is freed.

   ON LEARNED SPARSITY
   For networks of your own whose positions are not equally important. apt_bk_forward gives the diagonal of (T - zI)^-1 of a
   tridiagonal T in time linear in the length; a mask cuts positions off. On top of it stand modules with parameters, gradients
   and Adam: gated experts (apt_moe_create), the sparse BK-core that learns its mask (apt_bk_core_create), and the layer of both
   (apt_bk_layer_create). Between forward and backward a sparsity loss pulls the mask towards a target; apt_adaptive_step
   moves target and weight, and eases both while the validation loss is too high. apt_moe_prune and apt_moe_progress remove
   experts. apt_module_save and apt_adaptive_save hold all that a run needs to go on bit for bit. See examples/sparse_bk.c.

   ON DECODERS
   T5 and LLaMA know one task, APT_TASK_LM: the next token. A LLaMA batch has labels[i] = the token that stands at i (or -100,
   for a prompt); a T5 batch has sources in offsets and tokens, and target_offsets with labels for what is to be written. The
   vocabulary's logits are never whole in memory: loss and gradient are taken in chunks of rows. Head units are KV heads with
   their query heads, a neuron of a gated FFN is a row of both input maps, and a T5 decoder layer counts as two layers: its
   self attention, then its cross attention with the FFN. The LM head is frozen unless the method is APT_METHOD_FULL or
   apt_train_desc.adapt has APT_ADAPT_HEAD. That adapter ("lora_A.lm_head") belongs to the product with the vocabulary alone:
   where the head is tied, the word embeddings stay what they are while it learns, and so merging it gives the head a matrix of
   its own (apt_config.untied; scaled_head goes into it).
   apt_generate continues texts with a cache of keys and values in the shapes that pruning has left:

       apt_generate_desc how = APT_ZERO;
       int32_t tokens[64], length;
       how.max_tokens = 64;
       how.temperature = 0.8f;
       how.top_p = 0.95f;
       apt_generate(model, &batch, &how, tokens, &length);           // one sequence in batch: one row of 64 tokens

   To prune LLaMA in one shot, as the paper does: apt_trainer_observe on calibration batches, then apt_trainer_prune_now. How
   to add another family stands in the text: search for apti_design.

   ON SINGLE WEIGHTS
   Beside whole units, single weights can go, the smallest first: apt_trainer_magnitude prunes by threshold, to a sparsity of
   each matrix or of all together, or in N:M patterns; apt_trainer_iterative evaluates, prunes a little, evaluates, retrains and
   evaluates again, following first * (last/first)^(t/iterations), and keeps a history. The zeros stay zero through every
   update. They pay on disk (apt_model_save_sparse) and in long batches (apt_model_compress):

       apt_iterative_desc plan = APT_ZERO;
       plan.first = 0.2;
       plan.last = 0.7;                                               // 30 % of the weights of each linear map stay
       apt_trainer_iterative(trainer, &plan);                         // apt_trainer_step does the rest

   ON MEMORY
   All memory comes from apt_desc.alloc (default malloc). apt_estimate tells the peak before anything is allocated;
   apt_memory_info tells what is held. A step allocates only when a batch is larger than all before it, and where it prunes,
   grows or takes a teacher. If memory runs out, the call returns APT_E_MEMORY, and model and trainer are as they were before
   it. There is one exception: apt_trainer_step, apt_trainer_finish and apt_trainer_prune_now may have done the first part of
   their work. In every case nothing is lost: call again with the same arguments (the same batch), and the call does what is
   still missing; the run goes on as if memory had never run out, bit for bit. A checkpoint can be saved in between. (Events of
   work that is begun again, a decision of apt_trainer_prune_now and an evaluation, come again.)

   ON ERRORS
   Functions return apt_result: APT_OK is 0, errors are negative. apt_error(ctx) is the text: which file, tensor, field or
   index, what was expected and what was found. The text is also given to apt_desc.log.

   ON THREADS AND DETERMINISM
   The same seed gives the same losses and weights, bit for bit, for any number of threads: sums run in a fixed order and no
   result depends on which thread computed it. A checkpoint goes on exactly where it was written, also in the middle of a
   fading decision or of an accumulation. Different kernel tables (AVX2, AVX-512, ...) differ in the last bits.

   ------------------------------------------------------------------------------------------------------------------ */

#ifndef APT_H
#define APT_H

#include <stddef.h>
#include <stdint.h>

// >>api
/* ---------------------------------------------------------------------------------------------------------------------
   Configuration and results
   ------------------------------------------------------------------------------------------------------------------ */

#define APT_VERSION_MAJOR 0
#define APT_VERSION_MINOR 1
#define APT_VERSION_PATCH 0

/* APT_STATIC makes every public function static, for use in one translation unit only. */
#ifndef APT_API
#if defined(APT_STATIC) && (defined(__GNUC__) || defined(__clang__))
#define APT_API static __attribute__((unused))
#elif defined(APT_STATIC)
#define APT_API static
#else
#define APT_API extern
#endif
#endif

/* Zero-initialises any apt_* struct in C and in C++ without a warning:  apt_train_desc desc = APT_ZERO; */
#ifdef __cplusplus
#define APT_ZERO {}
#else
#define APT_ZERO {0}
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Every result there is: name, value, text. Negative values are errors. */
#define APT_RESULTS(X)                                                                  \
    X(OK, 0, "success")                                                                 \
    X(E_ARGUMENT, -1, "invalid argument")                                               \
    X(E_SHAPE, -2, "shapes disagree")                                                   \
    X(E_RANGE, -3, "value out of range")                                                \
    X(E_MEMORY, -4, "out of memory")                                                    \
    X(E_IO, -5, "input or output failed")                                               \
    X(E_FORMAT, -6, "malformed file")                                                   \
    X(E_CHECKSUM, -7, "checksum mismatch")                                              \
    X(E_MISSING, -8, "something required is missing")                                   \
    X(E_UNSUPPORTED, -9, "not supported")                                               \
    X(E_NONFINITE, -10, "NaN or infinity where a finite number is needed")              \
    X(E_STATE, -11, "call not allowed in this state")                                   \
    X(E_SCRATCH, -12, "scratch buffer too small")                                       \
    X(E_CANCELLED, -13, "cancelled by a callback")                                      \
    X(E_THREAD, -14, "threads could not be started")

#define APT_RESULT_ENUMERATOR(id, value, text) APT_##id = (value),
typedef enum apt_result { APT_RESULTS(APT_RESULT_ENUMERATOR) APT_RESULT_MIN_ = -0x7fffffff } apt_result;
#undef APT_RESULT_ENUMERATOR

/* "APT_E_SHAPE: shapes disagree" for any value; never NULL. */
APT_API const char *apt_result_text(apt_result result);
/* Version of the implementation that was linked, as major*10000 + minor*100 + patch. */
APT_API int32_t apt_version(void);

#ifndef APT_ONLY_CORE
/* ---------------------------------------------------------------------------------------------------------------------
   Context: allocator, logger, threads, kernels, last error
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apt_ctx apt_ctx;       /* owns every model and trainer made from it */
typedef struct apt_model apt_model;
typedef struct apt_trainer apt_trainer;

typedef enum apt_log_level { APT_LOG_ERROR = 1, APT_LOG_WARNING = 2, APT_LOG_INFO = 3 } apt_log_level;

typedef struct apt_log_item {
    apt_log_level level;
    apt_result result;                /* APT_OK for information */
    const char *message;              /* valid during the call only */
} apt_log_item;

typedef enum apt_dtype { APT_F32 = 0, APT_F64, APT_F16, APT_BF16, APT_I64, APT_I32, APT_I16, APT_I8, APT_U8, APT_BOOL } apt_dtype;

/* One task of a parallel_for: index runs over [0, count); thread < apt_desc.threads names the scratch it may use. */
typedef void (*apt_task)(int64_t index, int32_t thread, void *arg);

/* Zero means: malloc/free, messages of level ERROR and WARNING to stderr, all cores, the fastest kernels. */
typedef struct apt_desc {
    uint32_t start_canary;                                        /* both canaries stay 0 */
    int32_t threads;                                              /* 0: all cores; at most 64 */
    void *(*alloc)(size_t bytes, void *user);                     /* both or none; any alignment */
    void (*release)(void *memory, void *user);
    void *alloc_user;
    void (*log)(const apt_log_item *item, void *user);
    void *log_user;
    /* The caller's own threads: must call task(i, thread, arg) once for each i in [0, count), any order, and return
       when all are done; two tasks that run at the same time must get different `thread` in [0, threads). */
    void (*parallel_for)(int64_t count, apt_task task, void *arg, void *user);
    void *parallel_user;
    const char *kernels;                                          /* NULL: best; else "ref", "avx2", "avx512", "neon" */
    uint32_t end_canary;
} apt_desc;

typedef struct apt_memory { int64_t bytes, peak_bytes, blocks; } apt_memory;

/* NULL when desc is invalid, memory or threads are short (the reason goes to desc->log or stderr). desc may be NULL. */
APT_API apt_ctx *apt_create(const apt_desc *desc);
/* Frees ctx and everything made from it. NULL is allowed. */
APT_API void apt_destroy(apt_ctx *ctx);
/* Message of the last failed call on ctx: path, tensor, expected, found. "" before the first failure. Owned by ctx. */
APT_API const char *apt_error(const apt_ctx *ctx);
APT_API apt_memory apt_memory_info(const apt_ctx *ctx);
/* Sets peak_bytes to the bytes held now. */
APT_API void apt_memory_reset_peak(apt_ctx *ctx);
/* "avx512", "avx2", "neon" or "ref"; and how many threads work. */
APT_API const char *apt_kernel_name(const apt_ctx *ctx);
APT_API int32_t apt_thread_count(const apt_ctx *ctx);

/* ---------------------------------------------------------------------------------------------------------------------
   Model
   ------------------------------------------------------------------------------------------------------------------ */

typedef enum apt_family { APT_FAMILY_NONE = 0, APT_BERT, APT_ROBERTA, APT_T5, APT_LLAMA } apt_family;
typedef enum apt_task_kind {
    APT_TASK_NONE = 0,                /* load: take the task from config.json's "architectures" */
    APT_TASK_CLASSIFY,                /* labels classes per sequence, cross-entropy */
    APT_TASK_REGRESS,                 /* one number per sequence, squared error */
    APT_TASK_SPAN,                    /* start and end token of an answer */
    APT_TASK_MLM,                     /* masked language modelling, decoder tied to the word embeddings */
    APT_TASK_LM                       /* T5, LLaMA: each next token from the ones before it (T5: and from the source) */
} apt_task_kind;
typedef enum apt_activation { APT_GELU_ERF = 0, APT_GELU_TANH, APT_RELU, APT_SILU } apt_activation;

/* What is left of one transformer layer. heads or neurons may be 0 only where a whole sublayer was removed, and neurons in the
   self attention of a T5 decoder (see apt_config.decoder_layers). */
typedef struct apt_layer_shape { int32_t heads, kv_heads, neurons; } apt_layer_shape;

/* Rotary positions: pair i of a head turns by position * theta^(-2i/head_dim). */
typedef struct apt_rope {
    float theta;                      /* 0: 10000 */
    int32_t interleaved;              /* 1: the pairs of a head stand side by side (llama2.c's files); 0: half a head apart */
    float factor;                     /* 0: as above; else LLaMA 3's scaling: frequencies whose wave is longer than */
    float low_factor, high_factor;    /* original_positions / low_factor are divided by factor, those shorter than */
    int32_t original_positions;       /* original_positions / high_factor stay, between them it is a mixture */
} apt_rope;

typedef struct apt_config {
    apt_family family;
    apt_task_kind task;
    int32_t vocab, positions, types;  /* rows of the word, position and token-type embeddings */
    int32_t hidden, head_dim, layers;
    int32_t hidden_dense;             /* hidden size before any pruning (rows of the pooler); 0: hidden */
    int32_t heads, neurons;           /* of every layer, when `layer` is NULL (apt_model_create) */
    int32_t labels;                   /* CLASSIFY only */
    int32_t pad_id;                   /* RoBERTa: positions start at pad_id + 1 */
    apt_activation activation;
    float norm_eps, init_range;       /* 0: 1e-12 (BERT) / 1e-5 (RoBERTa); 0.02 */
    const apt_layer_shape *layer;     /* [layers], or NULL for equal layers; from apt_model_config owned by the model */
    /* T5 and LLaMA only; zero is right for the others */
    int32_t kv_heads;                 /* LLaMA: of every layer, when `layer` is NULL; 0: heads */
    int32_t decoder_layers;           /* T5. A layer is an attention with the FFN behind it, so a decoder layer counts as two of
                                         `layers`: its self attention (0 neurons), then its cross attention with the FFN. The
                                         first layers - 2*decoder_layers are the encoder */
    int32_t gated;                    /* T5: the FFN has two input maps (v1.1, Flan). LLaMA: always */
    int32_t untied;                   /* the LM head has a matrix of its own, not the word embeddings */
    int32_t scaled_head;              /* T5: hidden states times hidden_dense^-0.5 before the LM head (v1.0) */
    int32_t qkv_bias;                 /* LLaMA block with biases on query, key and value, as Qwen2 has them */
    int32_t start_id, end_id;         /* first token of a decoder (T5); the token that ends a text */
    int32_t buckets, max_distance;    /* T5: relative positions; 0: 32 and 128 */
    int32_t bias_heads;               /* T5: columns of the relative position tables, 0: heads */
    const int32_t *bias_head;         /* T5: [layers * bias_heads] the column that each head of a layer reads; NULL: its number */
    apt_rope rope;                    /* LLaMA */
} apt_config;

/* Packed sequences: no padding. tokens[offsets[s] .. offsets[s+1]) is sequence s. All arrays are the caller's. */
typedef struct apt_batch {
    int32_t sequences;
    const int32_t *offsets;           /* [sequences + 1], offsets[0] = 0, strictly rising */
    const int32_t *tokens;            /* [offsets[sequences]] */
    const int32_t *types;             /* the same, or NULL: all 0 */
    const int32_t *labels;            /* CLASSIFY [sequences]; SPAN [2*sequences] (start, end inside the sequence, -1: ignored);
                                         MLM one per token, -100: ignored; NULL when only a forward is wanted.
                                         LM, LLaMA: one per token, what that token should be (normally `tokens` itself, -100
                                         in a prompt); it is predicted from the tokens before it, so the first of a sequence
                                         does not count. LM, T5: one per target token */
    const float *targets;             /* REGRESS [sequences] */
    const int32_t *target_offsets;    /* T5: [sequences + 1], like offsets */
    const int32_t *target_tokens;     /* T5: what the decoder reads; NULL: labels moved by one behind start_id, -100 as pad_id */
} apt_batch;

typedef struct apt_load_desc {
    uint32_t start_canary;
    apt_task_kind task;               /* NONE: as the file says */
    int32_t labels;                   /* CLASSIFY; 0: as the file says, else 2 */
    apt_dtype weights;                /* storage of frozen matrices: APT_F32 (default) or APT_BF16 */
    uint64_t seed;                    /* for heads that the file does not hold */
    uint32_t end_canary;
} apt_load_desc;

/* Random weights N(0, init_range), biases 0, norms 1; bit-identical for the same seed. */
APT_API apt_result apt_model_create(apt_ctx *ctx, const apt_config *config, uint64_t seed, apt_model **model);
/* A Hugging Face checkpoint folder: config.json + model.safetensors (or an index and shards). Nothing of dir stays open. */
APT_API apt_result apt_model_load(apt_ctx *ctx, const char *dir, const apt_load_desc *desc, apt_model **model);
/* Writes config.json + model.safetensors into dir (made if missing) through temporary files; adapters must be merged
   (APT_E_STATE otherwise). The folder loads again with apt_model_load; per-layer shapes stand in config.json. */
APT_API apt_result apt_model_save(apt_model *model, const char *dir);
APT_API void apt_model_destroy(apt_model *model);
/* Current shapes; config->layer stays valid until the next structural change. */
APT_API void apt_model_config(const apt_model *model, apt_config *config);

typedef struct apt_model_info {
    int64_t parameters;               /* all values, adapters included */
    int64_t prunable;                 /* attention and FFN matrices as they are now: C of method.md */
    int64_t prunable_dense;           /* the same when the model was made or loaded */
    int64_t trainable;                /* values the optimizer sees (0 without a trainer) */
    int64_t adapter;                  /* values in adapters */
} apt_model_info;
APT_API void apt_model_query(const apt_model *model, apt_model_info *info);

typedef struct apt_output {
    float *logits;                    /* caller's, may be NULL. CLASSIFY sequences*labels, REGRESS sequences,
                                         SPAN 2*tokens (start row, then end row), MLM labelled positions * vocab,
                                         LM tokens (T5: target tokens) * vocab */
    int64_t logits_capacity;          /* floats in logits; APT_E_SCRATCH when too few */
    float *hidden;                    /* caller's or NULL: last hidden state, tokens (T5: target tokens) * hidden */
    int64_t hidden_capacity;
    int64_t logits_count;             /* out */
    double loss;                      /* out: mean loss when labels or targets are given, else 0 */
    int64_t loss_count;               /* out: how many terms the mean has */
    int64_t correct;                  /* out: CLASSIFY, MLM and LM argmax hits; SPAN exact start and end */
} apt_output;
/* Inference with the model's present weights, adapters and masks. Threads: one call per context at a time. */
APT_API apt_result apt_model_forward(apt_model *model, const apt_batch *batch, apt_output *output);

/* How apt_generate chooses. Zero: the most likely token each time (greedy). */
typedef struct apt_generate_desc {
    uint32_t start_canary;
    int32_t max_tokens;               /* required: new tokens of a sequence, at most */
    float temperature;                /* above 0: tokens are drawn from softmax(logits / temperature) */
    int32_t top_k;                    /* drawn from the k most likely only; 0: all */
    float top_p;                      /* and of those from the fewest that make up this share; 0: all */
    uint64_t seed;                    /* the same seed draws the same tokens, whatever else is in the batch */
    int32_t beams;                    /* above 1: beam search (not together with temperature) */
    float length_penalty;             /* beams are compared by log probability / tokens^penalty; 0: by log probability */
    int32_t ignore_end;               /* 1: goes on behind apt_config.end_id */
    int32_t disable_cache;            /* 1: every step computes the whole text again. The same tokens, slowly */
    /* Each token as it comes (the end token too), not with beams. Non-zero ends this sequence. */
    int (*on_token)(int32_t sequence, int32_t token, void *user);
    void *user;
    uint32_t end_canary;
} apt_generate_desc;
/* T5 and LLaMA: continues each sequence of `batch` (LLaMA: offsets and tokens are the prompts; T5: the sources), until its end
   token, which is kept, or max_tokens. tokens: [sequences * max_tokens] caller's, row s holds lengths[s] new ones. Keys and
   values of what was read are kept in the shapes that pruning has left; masks and adapters act as in apt_model_forward. */
APT_API apt_result apt_generate(apt_model *model, const apt_batch *batch, const apt_generate_desc *desc, int32_t *tokens,
                                int32_t *lengths);

/* Folds W + s*B*A into W for every adapter and removes them (a tied LM head that has one is tied no longer). *difference (may
   be NULL) receives the largest absolute logit difference on `probe` (NULL: not measured). */
APT_API apt_result apt_model_merge(apt_model *model, const apt_batch *probe, float *difference);

/* Parameter access by Hugging Face name, in current shapes (adapters: "lora_A.NAME", "lora_B.NAME" without ".weight").
   get copies rows*cols floats into out (count must match); set writes them. apt_model_parameter lists them. */
typedef struct apt_parameter { const char *name; int64_t rows, cols; int32_t dims; int32_t trainable; } apt_parameter;
APT_API int32_t apt_model_parameters(const apt_model *model);
APT_API apt_result apt_model_parameter(const apt_model *model, int32_t index, apt_parameter *info);
APT_API apt_result apt_model_get(const apt_model *model, const char *name, float *out, int64_t count);
APT_API apt_result apt_model_set(apt_model *model, const char *name, const float *values, int64_t count);

/* The units that can be pruned: for each layer its heads, then its neurons; then the hidden dimensions. With grouped queries a
   head is a KV head and its query heads. */
typedef struct apt_units { int32_t heads, neurons, hidden, total; } apt_units;  /* heads, neurons: over all layers */
APT_API void apt_model_units(const apt_model *model, apt_units *units);
/* Masks in that order, [total]; set with values in 0..1. */
APT_API apt_result apt_model_get_masks(const apt_model *model, float *masks, int32_t count);
APT_API apt_result apt_model_set_masks(apt_model *model, const float *masks, int32_t count);
/* Physically removes every unit whose mask is 0; all other masks must be 1. A transaction: on failure nothing changed. */
APT_API apt_result apt_model_compact(apt_model *model);

/* ---------------------------------------------------------------------------------------------------------------------
   Trainer
   ------------------------------------------------------------------------------------------------------------------ */

typedef enum apt_method { APT_METHOD_APT = 0, APT_METHOD_LORA, APT_METHOD_FULL } apt_method;
typedef enum apt_lr_schedule { APT_LR_LINEAR = 0, APT_LR_COSINE, APT_LR_CONSTANT } apt_lr_schedule;
enum {
    APT_ADAPT_QUERY = 1,
    APT_ADAPT_KEY = 2,
    APT_ADAPT_VALUE = 4,
    APT_ADAPT_OUTPUT = 8,
    APT_ADAPT_UP = 16,                /* T5 wi or wi_0, LLaMA up_proj */
    APT_ADAPT_DOWN = 32,
    APT_ADAPT_GATE = 64,              /* gated FFN: the other input map: T5 wi_1, LLaMA gate_proj */
    APT_ADAPT_HEAD = 128              /* T5, LLaMA: the LM head, see ON DECODERS */
};
enum { APT_PRUNE_HEADS = 1, APT_PRUNE_NEURONS = 2, APT_PRUNE_HIDDEN = 4 };

typedef enum apt_event_kind {
    APT_EVENT_STEP = 1, APT_EVENT_PRUNE, APT_EVENT_COMPACT, APT_EVENT_GROW, APT_EVENT_TEACHER, APT_EVENT_EVALUATE,
    APT_EVENT_CHECKPOINT
} apt_event_kind;

typedef struct apt_step_info {
    int64_t step;                     /* optimizer steps done */
    double loss, task_loss, distill_loss;
    double learning_rate, gradient_norm;
    double sparsity_target;           /* of the schedule, now */
    double sparsity;                  /* of the last decision (masked units count as gone) */
    double kept;                      /* physical prunable parameters / dense ones */
    double mu;                        /* weight of the distillation loss */
    int64_t tokens;                   /* real tokens in this step */
    double milliseconds, teacher_milliseconds, tokens_per_second;
    int64_t trainable, bytes, peak_bytes;
    int32_t skipped;                  /* 1: non-finite gradient, no update */
} apt_step_info;

/* Passed to on_event; pointers are valid during the call. Return non-zero to cancel (the step returns APT_E_CANCELLED). */
typedef struct apt_event {
    apt_event_kind kind;
    const apt_step_info *step;
    apt_trainer *trainer;
    int64_t parameters_before, parameters_after;   /* PRUNE: by the masks; COMPACT, GROW: physical */
    int64_t bytes_before, bytes_after;             /* COMPACT */
    int32_t heads, neurons, hidden;                /* PRUNE, COMPACT: units left */
    int32_t budget_reached;                        /* PRUNE: 0 when the floors forbid the target */
    double metric;                                 /* EVALUATE: the callback may set it; higher is better */
    int32_t has_metric;                            /* EVALUATE: the callback sets 1 with metric */
} apt_event;

/* Zero means the default named in the comment; where 0 is a meaningful value it means 0. */
typedef struct apt_train_desc {
    uint32_t start_canary;
    apt_method method;
    int64_t steps;                    /* required: optimizer steps in all */
    /* optimizer */
    float learning_rate;              /* 2e-4 */
    apt_lr_schedule lr_schedule;
    int64_t warmup_steps;             /* 0: none */
    float weight_decay;               /* decoupled (AdamW); 0 means 0 */
    float beta1, beta2, epsilon;      /* 0.9, 0.999, 1e-8 */
    float clip;                       /* 1.0; negative: none */
    int32_t accumulate;               /* micro-batches per optimizer step: 1 */
    /* adapters */
    int32_t rank;                     /* 8; at the start */
    int32_t max_rank;                 /* 64 */
    float scale;                      /* s = 2 */
    int32_t adapt;                    /* QUERY | VALUE | UP */
    int32_t disable_growth;
    float growth;                     /* tuning budget at the end over the budget at the start: 4 */
    /* pruning */
    float target_sparsity;            /* of the prunable parameters; 0 means none */
    int32_t schedule;                 /* apt_schedule_kind: cubic, linear or exponential */
    float start_sparsity;             /* the schedule's first value; exponential needs one above 0 */
    int64_t prune_begin, prune_end;   /* steps; 0: begin at once / end at 60 % of steps */
    int32_t update_frequency;         /* steps between decisions: 100, but at least 8 decisions fit the window */
    float mask_step;                  /* 1 / update_frequency, i.e. 0.01 at 100 */
    float salience_momentum;          /* 0.9 */
    int32_t disable_kurtosis;
    int32_t salience_norm;            /* apt_salience_norm: 0 = the default, see there */
    int32_t prune;                    /* HEADS | NEURONS | HIDDEN */
    int32_t round_heads, round_neurons, round_hidden;   /* kept counts are multiples of: 1 */
    int32_t min_hidden;               /* 16, or the model's if smaller */
    int32_t reset_moments;            /* 1: Adam moments to zero at a shape change; 0: carried over for survivors */
    /* self-distillation */
    int32_t disable_distill;
    int64_t distill_end;              /* step from which the task loss stands alone and the teacher is gone; 0: prune_end */
    float distill_temperature;        /* 2/3 */
    float distill_pred, distill_layer;/* both 0: the task's default (1.0/0.9 classification, 0.1/0.9 span and T5; LLaMA: none) */
    /* running */
    int64_t evaluate_every;           /* steps; 0: never. Fires APT_EVENT_EVALUATE */
    int64_t checkpoint_every;         /* steps; 0: never. Fires APT_EVENT_CHECKPOINT */
    uint64_t seed;
    int (*on_event)(apt_event *event, void *user);
    void *user;
    uint32_t end_canary;
} apt_train_desc;

/* The paper's Table 6 rows that concern encoders; every other field zero. steps stays 0: epochs are the caller's. */
typedef enum apt_preset_kind {
    APT_PRESET_GLUE_SMALL = 1,
    APT_PRESET_GLUE_BIG,
    APT_PRESET_SQUAD,
    APT_PRESET_CNNDM,
    APT_PRESET_ALPACA
} apt_preset_kind;
typedef struct apt_preset_info { const char *name; float learning_rate; int32_t batch, epochs, distill_epochs; } apt_preset_info;
APT_API apt_train_desc apt_preset(apt_preset_kind kind);
APT_API apt_result apt_preset_query(apt_preset_kind kind, apt_preset_info *info);

/* Makes the model trainable: attaches adapters (rank rows; B = 0) unless the method is FULL, makes the optimizer state.
   One trainer per model at a time. */
APT_API apt_result apt_trainer_create(apt_model *model, const apt_train_desc *desc, apt_trainer **trainer);
/* The desc with every default filled in. */
APT_API void apt_trainer_query(const apt_trainer *trainer, apt_train_desc *desc);
/* One micro-batch; every desc.accumulate-th call updates. APT_E_STATE after desc.steps steps. A call that failed is repeated
   with the same batch: where the update was done, it only does the rest. */
APT_API apt_result apt_trainer_step(apt_trainer *trainer, const apt_batch *batch, apt_step_info *info);
/* Snaps the masks and compacts: afterwards every mask is 1 and the model has its final shape. */
APT_API apt_result apt_trainer_finish(apt_trainer *trainer);
/* Reports a development metric (higher is better): a new best takes a new teacher snapshot while distilling. */
APT_API apt_result apt_trainer_metric(apt_trainer *trainer, double metric);
/* One-shot pruning with the salience gathered so far (see apt_trainer_observe) to `sparsity` at once, then compaction. */
APT_API apt_result apt_trainer_prune_now(apt_trainer *trainer, float sparsity);
/* Gathers salience from one batch (forward and backward) without changing any weight. */
APT_API apt_result apt_trainer_observe(apt_trainer *trainer, const apt_batch *batch);
APT_API apt_model *apt_trainer_model(apt_trainer *trainer);
APT_API void apt_trainer_destroy(apt_trainer *trainer);

/* Everything a run needs to go on bit-exactly, with checksums; `user` is a blob of the caller's (data position, say).
   Written through a temporary file. Load needs a model of the same family and dense shape in a fresh trainer. */
APT_API apt_result apt_checkpoint_save(apt_trainer *trainer, const char *path, const void *user, size_t user_bytes);
/* user_bytes: in capacity, out size. */
APT_API apt_result apt_checkpoint_load(apt_trainer *trainer, const char *path, void *user, size_t *user_bytes);

typedef struct apt_estimate_info {
    int64_t weights, adapters, optimizer, activations, teacher, masks, scratch, total;
    int64_t shareable;                /* part of total: matrices that a run holds only once if its decisions leave them whole */
} apt_estimate_info;
/* Peak bytes of training (desc given) or inference (desc NULL) with at most `tokens` tokens in `sequences` sequences. Which units
   a run will prune cannot be known: it is taken that all layers lose the same share of heads and neurons, and that no matrix is
   left whole, as it is when hidden dimensions go. With a teacher, a run that keeps all hidden dimensions, and all heads or
   neurons of some layers, shares those layers' matrices with it and takes less, but not less than total - shareable. */
APT_API apt_result apt_estimate(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc, int64_t tokens,
                                int64_t sequences, apt_estimate_info *info);
/* The same for T5: at most `tokens` source and target_tokens target tokens (apt_estimate: as many of both; other families: 0). */
APT_API apt_result apt_estimate_pair(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc, int64_t tokens,
                                     int64_t target_tokens, int64_t sequences, apt_estimate_info *info);
/* The same for a model whose single weights are pruned as well: their masks are counted. Of `plan` the patterns, global, begin
   and iterations matter. It is what apt_trainer_iterative gets; apt_trainer_magnitude in front of step `begin` is a plan of 1
   iteration. (From the second one on, old and new masks stand side by side for a moment.) desc NULL: inference with such masks.
   Units that go meanwhile (APT) take their share of the masks with them; that is not looked at. */
typedef struct apt_iterative_desc apt_iterative_desc;
APT_API apt_result apt_estimate_magnitude(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc,
                                          const apt_iterative_desc *plan, int64_t tokens, int64_t target_tokens,
                                          int64_t sequences, apt_estimate_info *info);
#endif /* APT_ONLY_CORE */


/* ---------------------------------------------------------------------------------------------------------------------
   Core: the method on raw arrays

   For people who have their own trainer (and used by apt_trainer itself). Rules that hold for every function below:
   * Pure functions on the caller's arrays: no allocation, no files, no state between calls, no threads. A pointer is
     never kept. Any number of threads may call at once on different outputs.
   * Outputs first, then inputs, sizes last. Matrices are row-major; ld is the distance between rows in floats.
   * Arguments are checked: NULL, sizes below 0 and ld too small give APT_E_ARGUMENT or APT_E_SHAPE, numbers outside the
     stated range APT_E_RANGE. A size of 0 is legal and does nothing. Unless stated otherwise, outputs are untouched
     when a call fails.
   * NaN and infinity in something that would be ranked or learned from give APT_E_NONFINITE, never a ranking.
   * Deterministic: sums run in a fixed order (in double where a whole array is reduced), ties break by the lower index.
   * A "unit" is what pruning removes whole: an attention head (with grouped queries: the KV head and its query heads),
     an FFN neuron, a hidden dimension. keep[u] is 1 or 0; mask[u] glides between 1 and 0 on the way.
   ------------------------------------------------------------------------------------------------------------------ */

/* --- random numbers --- */

/* Counter based: the value at a position depends on (key, counter) only. Plain data: store it, copy it, compare it. */
typedef struct apt_rng { uint64_t key, counter; } apt_rng;

/* Independent sequence number `stream` of `seed`. */
APT_API apt_rng apt_rng_make(uint64_t seed, uint64_t stream);
APT_API uint64_t apt_rng_next(apt_rng *rng);
/* Uniform in [0, 1). */
APT_API double apt_rng_uniform(apt_rng *rng);
/* Standard normal. */
APT_API float apt_rng_normal(apt_rng *rng);
/* Uniform in [0, n), without bias; 0 when n is 0. */
APT_API uint32_t apt_rng_below(apt_rng *rng, uint32_t n);

/* --- schedules: how much must be gone at which step --- */

typedef enum apt_schedule_kind {
    APT_SCHEDULE_CUBIC = 0,           /* target * (1 - (1 - t/T)^3)                  (the paper's, read as sparsity) */
    APT_SCHEDULE_LINEAR,              /* target * t/T */
    APT_SCHEDULE_EXPONENTIAL,         /* start * (target/start)^(t/T)                (iterative magnitude pruning) */
    APT_SCHEDULE_MILESTONES           /* steps of the caller's */
} apt_schedule_kind;

/* t = step - begin, T = end - begin. t < 0 acts as 0 and t >= T gives exactly target; with end == begin everything
   happens at once. Steps before begin are the warm-up, steps after end the recovery. Sparsity = share that is gone. */
typedef struct apt_schedule {
    int32_t kind;                     /* apt_schedule_kind */
    float target;                     /* sparsity at the end, 0..1; 0 gives 0 at every step, whatever start */
    float start;                      /* cubic, linear: the least sparsity ever asked for; exponential: the first one, > 0;
                                         milestones: before the first one. 0 <= start <= target */
    int64_t begin, end;               /* begin <= end; milestones ignore both */
    const int64_t *milestone_step;    /* milestones only: [milestones], strictly rising */
    const float *milestone_sparsity;  /* from milestone_step[i] on; not falling, in start..target, the last == target.
                                         NULL: equal steps from start to target */
    int32_t milestones;
} apt_schedule;

/* APT_E_ARGUMENT: NULL, unknown kind; APT_E_RANGE: any other rule of apt_schedule is broken (an exponential schedule
   with start 0 among them); APT_E_NONFINITE: target or start is not finite. */
APT_API apt_result apt_schedule_sparsity(const apt_schedule *schedule, int64_t step, float *sparsity);
/* The same curve for several layers (or any parts), each with its own target: sparsity[l] follows `schedule` with
   target[l] in place of schedule->target and min(start, target[l]) in place of start. Milestones must have
   milestone_sparsity NULL. Search each layer with its own units and its own budget. */
APT_API apt_result apt_schedule_layers(const apt_schedule *schedule, const float *target, int64_t step, float *sparsity,
                                       int32_t layers);
/* *due = 1 when a pruning decision belongs to this step: begin, then every `every` steps, and end itself (milestones:
   exactly the milestone steps). every > 0, else APT_E_RANGE. */
APT_API apt_result apt_schedule_due(const apt_schedule *schedule, int64_t every, int64_t step, int32_t *due);
/* "cubic", "linear", "exponential", "milestones"; NULL for any other value. */
APT_API const char *apt_schedule_kind_name(int32_t kind);
/* The reverse. An unknown name gives APT_E_ARGUMENT and, when message is not NULL, a text that lists the supported
   kinds, cut to `bytes` with its terminating zero ("" on success). */
APT_API apt_result apt_schedule_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes);

/* --- salience: how much a unit matters ---

   For a unit with activation H:  S = sum over its features of (sum |dL/dH|) * (sum |H|),  sums over batch and positions
   first, product after (the paper's block salience). Hence S is NOT additive over micro-batches: add up with apt_abs_sum over all
   of them, call apt_salience_finish once, then clear the sums. */

/* acc[features] += sum over rows of |x(rows, features)|. NaN is not looked for here but stays in acc, where
   apt_salience_finish finds it. */
APT_API apt_result apt_abs_sum(float *acc, const float *x, int64_t ld, int64_t rows, int64_t features);
/* acc[features] += sum over rows of x: divided by the rows it is the mean activation that apt_unit_kurtosis takes. */
APT_API apt_result apt_value_sum(float *acc, const float *x, int64_t ld, int64_t rows, int64_t features);
/* sal[u] = sum over w of abs_act[u*width + w] * abs_grad[u*width + w]. width: head_dim for a head, 1 for a neuron;
   a KV group of q query heads is one unit of width q*head_dim. */
APT_API apt_result apt_salience_finish(float *sal, const float *abs_act, const float *abs_grad, int64_t units, int64_t width);
/* The weight form for full fine-tuning (paper, appendix B): sal[u] += scale * |sum over the unit's entries of W * dL/dW|.
   The unit is a block of `width` rows (by_rows 1) or columns (by_rows 0) of weight(rows, cols) and grad alike, which
   have the same ld. Call it with scale 1 on the frozen matrix and with scale s on that adapter matrix which has
   the unit's rows (B) or columns (A). The blocks must cover the matrix exactly, else APT_E_SHAPE. */
APT_API apt_result apt_weight_salience(float *sal, const float *weight, const float *grad, int64_t ld, int64_t rows,
                                       int64_t cols, int64_t width, int32_t by_rows, float scale);

/* Running central moments of a stream of values; zero is the empty stream. */
typedef struct apt_moments { double count, mean, m2, m3, m4; } apt_moments;

/* O(rows, units*width) = weight(rows, units*width) * mean_act(units*width) column by column; moments[u] takes in the
   rows*width values of unit u. Several calls join several matrices into one unit (a hidden dimension). mean_act: the
   SIGNED mean of the activation over the real positions (not of its magnitude); NULL: 1. A common factor cancels in
   the kurtosis, so apt_value_sum's sums serve as well as means. APT_E_NONFINITE as everywhere. */
APT_API apt_result apt_unit_moments(apt_moments *moments, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                    int64_t units, int64_t width);
/* Excess kurtosis with the unbiased deviation:  (m4/n) / (m2/(n-1))^2 - 3;  0 for constant input or fewer than 2 values. */
APT_API apt_result apt_moments_kurtosis(float *kurtosis, const apt_moments *moments, int64_t units);
/* Both in one for a unit that lives in one matrix: the output projection (heads), the down projection (neurons).
   For width 1 the mean activation cancels, so mean_act NULL gives the same and need be done once per structural change
   only; a neuron that never fires (mean_act 0) has kurtosis 0. Should a fourth power overflow (|weight * mean_act|
   beyond 1e70), APT_E_NONFINITE comes with kurtosis partly written. */
APT_API apt_result apt_unit_kurtosis(float *kurtosis, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                     int64_t units, int64_t width);

/* sal[u] += sqrt(max(0, kurtosis[u])): the paper's outlier-aware salience. */
APT_API apt_result apt_salience_outlier(float *sal, const float *kurtosis, int64_t units);
/* values[u] /= mean of values over the alive units of u's kind; a kind whose mean is 0 stays as it is. values >= 0.
   kind: [units] in 0..kinds-1, NULL: all one kind. alive: [units] 0/1, NULL: all. Dead units get 0. kinds: 1..64. */
APT_API apt_result apt_salience_normalise(float *values, const int32_t *kind, const uint8_t *alive, int64_t units, int32_t kinds);

/* How salience S and outlier term K = sqrt(max(0, kurtosis)) are added. S scales with batch size, length and loss scale
   while K does not. */
typedef enum apt_salience_norm {
    APT_SALIENCE_DEFAULT = 0,         /* what measures best; now APT_SALIENCE_SCALED */
    APT_SALIENCE_RAW,                 /* S + K                       the paper's form */
    APT_SALIENCE_NORMALISED,          /* S/mean(S) + K/mean(K)       means over the alive units of the kind */
    APT_SALIENCE_SCALED               /* S + K * mean(S)/mean(K)     the same, but S keeps its ratio between kinds */
} apt_salience_norm;
/* sal holds S >= 0 and receives the sum. kurtosis NULL: no outlier term. kind, alive as above; dead units get 0. A mean
   that is 0 leaves its term as it is. */
APT_API apt_result apt_salience_combine(float *sal, const float *kurtosis, const int32_t *kind, const uint8_t *alive,
                                        int64_t units, int32_t kinds, int32_t norm);
/* avg = beta*avg + (1-beta)*sal, 0 <= beta < 1. Start with avg = 0 (all units are then low by the same factor, which
   no ranking sees) or with beta 0. Serves adapter importance as well. */
APT_API apt_result apt_salience_ema(float *avg, const float *sal, int64_t units, float beta);

/* --- search: which units stay ---

   Units belong to groups: the neurons of one layer, say. Within a group every unit costs the same and counts towards the
   group's floor and rounding. Groups are numbered 0..groups-1 as the caller likes. */

/* What a model costs with kept[g] units left in each group: parameters, bytes, milliseconds... Must be finite and must
   not fall when any kept[g] rises. */
typedef double (*apt_cost)(const int32_t *kept, int32_t groups, void *user);

typedef struct apt_search {
    int32_t units, groups;
    const float *salience;            /* [units], finite */
    const int32_t *group;             /* [units], each in 0..groups-1 */
    const uint8_t *alive;             /* [units] 0/1, NULL: all. A dead unit is never kept and costs nothing */
    const int32_t *least;             /* [groups] floor: so many stay whatever the budget; NULL: 1 each. 0: may go whole */
    const int32_t *round_to;          /* [groups] kept counts are multiples of it, >= 1; NULL: 1 each */
    double budget;                    /* cost <= budget afterwards */
    apt_cost cost;
    void *user;
} apt_search;

typedef struct apt_search_result {
    double cost_before;               /* of all alive units */
    double cost;                      /* of the kept ones */
    int32_t kept;                     /* units */
    int32_t reached;                  /* 1: cost <= budget. 0: the floors alone cost more, and only they are kept */
} apt_search_result;

/* Scratch bytes for apt_mask_search; -1 when units or groups are below 0 or too many. */
APT_API int64_t apt_mask_search_scratch(int32_t units, int32_t groups);
/* Ranks the alive units by density = salience / price, price of a unit = cost(alive) - cost(alive without it), that is, at
   the present shapes; keeps the longest prefix of that ranking whose cost fits the budget (binary search: the cost of a
   prefix never falls). Floors and rounding act inside each group on its own ranking: from a prefix with c of the
   group's units the best max(floor, c rounded down to round_to) stay, the floor itself being rounded up. A group with
   fewer alive units than its floor keeps them all; one with fewer than round_to stays or goes whole. Units with price 0
   rank first. A larger budget never drops a unit.
   keep: [units] out. kept: [groups] out, may be NULL. result may be NULL. scratch: caller's, any alignment.
   APT_E_SCRATCH: too small. APT_E_RANGE: bad group, floor or rounding. APT_E_NONFINITE: salience, budget or cost.
   APT_E_ARGUMENT also when the cost falls as a group grows. */
APT_API apt_result apt_mask_search(const apt_search *search, void *scratch, size_t scratch_bytes, uint8_t *keep, int32_t *kept,
                                   apt_search_result *result);

/* A cost for transformers: parameters of the attention and FFN matrices,
       C = hidden * sum over layers of ( head_dim*(2*h + 2*g) [once more for cross attention] + (2 or 3)*neurons )
   Groups in this order: for each layer its heads, its cross-attention heads if it has them, its neurons; last, the hidden
   dimensions. The unit of a head group is one KV head with its `query_heads` query heads. */
typedef struct apt_transformer {
    int32_t layers;                   /* all stacks together; the residual stream has one width */
    int32_t cross_layers;             /* that many of the last ones have cross attention (T5: the decoder) */
    int32_t head_dim;
    int32_t query_heads;              /* per unit, h/g; 0 means 1 */
    int32_t gated;                    /* 1: the FFN has three matrices, not two */
} apt_transformer;
enum { APT_GROUP_HEADS = 0, APT_GROUP_CROSS, APT_GROUP_NEURONS, APT_GROUP_HIDDEN };

/* 2*layers + cross_layers + 1; -1 when the description is invalid. */
APT_API int32_t apt_transformer_groups(const apt_transformer *shape);
/* Number of a group; -1 when there is none. layer is ignored for APT_GROUP_HIDDEN. */
APT_API int32_t apt_transformer_group(const apt_transformer *shape, int32_t layer, int32_t what);
/* An apt_cost whose user is an apt_transformer (const). NaN, and so APT_E_NONFINITE, when `groups` does not fit it. */
APT_API double apt_transformer_cost(const int32_t *kept, int32_t groups, void *shape);

/* Floors and rounding by kind; 0 means 1 everywhere except `whole`. */
typedef struct apt_limits {
    int32_t whole;                    /* 1: all heads or all neurons of a layer may go */
    int32_t min_hidden;
    int32_t round_heads, round_neurons, round_hidden;
} apt_limits;
/* Fills least[groups] and round_to[groups] of an apt_search. limits NULL: all 1. */
APT_API apt_result apt_transformer_limits(int32_t *least, int32_t *round_to, const apt_transformer *shape,
                                          const apt_limits *limits);

/* An apt_cost for measured times: fixed + sum over g of per_unit[g]*kept[g]; user is an apt_cost_table (const).
   Made for a latency target in milliseconds. */
typedef struct apt_cost_table { const double *per_unit; double fixed; } apt_cost_table;
APT_API double apt_table_cost(const int32_t *kept, int32_t groups, void *table);

/* --- masks: how a decision takes effect --- */

/* keep: mask = min(1, mask + rate); else: mask = max(0, mask - rate), 1e-6 <= rate <= 1. What is left within rate/20 of
   0 or 1 goes there, so that 1/rate steps (up to 1500) suffice in spite of rounding. A rate below 1e-6 would be lost
   in it: APT_E_RANGE. */
APT_API apt_result apt_mask_step(float *mask, const uint8_t *keep, int64_t n, float rate);
/* mask = exactly 1 or 0. */
APT_API apt_result apt_mask_snap(float *mask, const uint8_t *keep, int64_t n);
/* 1 when every mask is exactly 0 or 1, else 0 (also for bad arguments). */
APT_API int32_t apt_mask_settled(const float *mask, int64_t n);
/* keep = mask != 0. APT_E_STATE when a mask is neither 0 nor 1. */
APT_API apt_result apt_mask_keep(uint8_t *keep, const float *mask, int64_t n);

/* --- compaction: cutting the arrays down to what stays --- */

/* One side of a matrix: which blocks of `width` consecutive rows or columns survive. */
typedef struct apt_axis {
    int32_t units, kept;              /* before and after */
    int32_t width;                    /* rows or columns per unit: head_dim, or 1 */
    const int32_t *index;             /* [kept] rising, in 0..units-1; NULL: all, and then kept == units */
} apt_axis;

/* Makes an axis from keep flags; index: the caller's, room for `units`, must live as long as the axis. keep NULL: an axis
   of `units` units that all stay (index may be NULL). width >= 1. */
APT_API apt_result apt_axis_make(apt_axis *axis, int32_t *index, const uint8_t *keep, int32_t units, int32_t width);
/* out(kept rows, kept cols) = the surviving entries of in. For weights, biases, norms, adapters and optimizer moments
   alike. rows NULL: one row (a vector); cols NULL: one column. out may be in when ld_out <= ld_in, then the
   matrix shrinks in place. APT_E_SHAPE: ld too small; APT_E_RANGE: bad index. */
APT_API apt_result apt_gather(float *out, int64_t ld_out, const float *in, int64_t ld_in, const apt_axis *rows,
                              const apt_axis *cols);

/* --- adapters:  y = (W + s*B*A) x --- */

/* A view of the caller's arrays. Rank 0 is legal (a and b may be NULL then): the adapter does nothing. Forward, backward
   and merge let NaN pass, as any product does. */
typedef struct apt_adapter {
    float *a, *b;                     /* A(rank, in), B(out, rank), dense */
    int32_t rank, in, out;
    float scale;                      /* s; independent of the rank */
} apt_adapter;

/* A uniform in +-1/sqrt(in), B zero. rng moves on. */
APT_API apt_result apt_adapter_init(const apt_adapter *adapter, apt_rng *rng);
/* xa(rows, rank) = s * x A^T, kept for the backward;  y(rows, out) += xa B^T.  y holds W x (and bias) on entry. */
APT_API apt_result apt_adapter_forward(const apt_adapter *adapter, float *y, int64_t ldy, float *xa, const float *x, int64_t ldx,
                                       int64_t rows);
/* db(out, rank) += dy^T xa;  dxa(rows, rank) = s * dy B (scratch);  da(rank, in) += dxa^T x;  dx(rows, in) += dxa A.
   dx, da, db may each be NULL: not wanted. */
APT_API apt_result apt_adapter_backward(const apt_adapter *adapter, float *dx, int64_t lddx, float *da, float *db, float *dxa,
                                        const float *dy, int64_t lddy, const float *x, int64_t ldx, const float *xa,
                                        int64_t rows);
/* w(out, in) += s*B*A; each entry is summed in double and rounded once. */
APT_API apt_result apt_adapter_merge(const apt_adapter *adapter, float *w, int64_t ldw);
/* *importance = sum |B * dL/dB| over all entries, as the paper has it; average it with apt_salience_ema. */
APT_API apt_result apt_adapter_importance(const apt_adapter *adapter, const float *db, float *importance);
/* Which adapters grow. The upper half by importance (rounded up; ties by index) get
       new_rank = min(max_rank, floor(rank * budget / total)),   total = sum of rank[i]*per_rank[i],
   the rest keep their rank; no rank ever falls. Then sum new_rank*per_rank <= max(budget, total). per_rank[i]: values
   per unit of rank, in + out. budget: adapter values allowed in all. total 0: nothing grows. new_rank may be rank.
   APT_E_RANGE: something negative, or rank*budget beyond 2^63. */
APT_API apt_result apt_adapter_plan(int32_t *new_rank, const float *importance, const int32_t *rank, const int64_t *per_rank,
                                    int32_t n, int64_t budget, int32_t max_rank);
/* Copies `old` into `grown` (same in, out, scale; rank at least as large; own arrays, no overlap): new A rows uniform in
   +-1/sqrt(in), new B columns 0, so that the layer's output does not change by a bit. rng NULL: new A rows 0, which
   is how Adam moments are carried over. */
APT_API apt_result apt_adapter_grow(const apt_adapter *grown, const apt_adapter *old, apt_rng *rng);

/* --- self-distillation: the loss is mu*L_distill + (1-mu)*L_task --- */

/* *mu rises from 0 at begin to 1 at end in a straight line, 0 before and 1 after. begin <= end. */
APT_API apt_result apt_distill_mu(float *mu, int64_t step, int64_t begin, int64_t end);
/* *loss = T^2 * mean over used rows of KL(teacher || student), both softmax(logits/T) over `classes`.
   grad(rows, classes) += grad_scale * d loss/d student; NULL: not wanted. used: [rows] 0/1, NULL: all; no row used: 0.
   T > 0. teacher == student gives exactly 0. */
APT_API apt_result apt_distill_kl(double *loss, float *grad, int64_t ld_grad, const float *student, int64_t ld_student,
                                  const float *teacher, int64_t ld_teacher, const uint8_t *used, int64_t rows, int64_t classes,
                                  float temperature, float grad_scale);
/* *loss = mean over used rows and features of (student - teacher)^2; grad as above. For hidden states and regression. */
APT_API apt_result apt_distill_mse(double *loss, float *grad, int64_t ld_grad, const float *student, int64_t ld_student,
                                   const float *teacher, int64_t ld_teacher, const uint8_t *used, int64_t rows, int64_t features,
                                   float grad_scale);

/* teacher[i] is matched by student[i], i < pairs. */
typedef struct apt_distill_map { int32_t pairs, teacher[4], student[4]; } apt_distill_map;
/* One teacher layer drawn from each quarter of the stack (a stack of fewer than 4 layers: every layer); for each the
   nearest student layer that is not wholly pruned (ties: the lower one). whole_pruned: [layers] 0/1, NULL: none; all
   pruned gives pairs 0. Layers count from 0 and are the same in both stacks. */
APT_API apt_result apt_distill_match(apt_distill_map *map, const uint8_t *whole_pruned, int32_t layers, apt_rng *rng);

/* ---------------------------------------------------------------------------------------------------------------------
   Magnitude pruning: single weights go, the smallest first

   The rules of the core hold, with two additions. Where a function takes a context, its threads share the work; the result is
   the same for any number of them, and NULL does it in the calling thread (with APT_ONLY_CORE nothing makes a context: pass
   NULL). And weights are ranked by (|w|, index): of equal magnitudes the lower index goes first.
   ------------------------------------------------------------------------------------------------------------------ */

#ifdef APT_ONLY_CORE
typedef struct apt_ctx apt_ctx;
#endif

/* --- bitmasks: one bit per weight, 1 = it stays --- */

/* Bit i%64 of word i/64 belongs to weight i; bits behind the last weight are 0. -1 when n is below 0. */
APT_API int64_t apt_bitmask_words(int64_t n);
/* How many of n weights stay; -1 for NULL or n below 0. */
APT_API int64_t apt_bitmask_kept(const uint64_t *mask, int64_t n);
/* w = +0 where the mask is 0; all other weights keep their bits. Runs at the speed of the memory. */
APT_API apt_result apt_bitmask_apply(apt_ctx *ctx, float *w, const uint64_t *mask, int64_t n);

/* --- which weights go --- */

#define APT_MAGNITUDE_THRESHOLD 0.01f
/* Weights with |w| < threshold go. zeros (may be NULL, as below): how many that are. */
APT_API apt_result apt_magnitude_threshold(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t n,
                                           float threshold);
/* Exactly floor(n*sparsity) weights go (the product is one of doubles), 0 <= sparsity < 1. By selection, in O(n): three
   passes over the weights count digits of |w|, one writes the mask. */
APT_API apt_result apt_magnitude_sparsity(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t n,
                                          double sparsity);
/* One threshold over several arrays, as if they stood one behind the other: a layer of small weights loses more of them. */
typedef struct apt_weights {
    const float *w;
    int64_t n;
    uint64_t *mask;                   /* [apt_bitmask_words(n)] out */
    int64_t zeros;                    /* out */
} apt_weights;
APT_API apt_result apt_magnitude_global(apt_ctx *ctx, apt_weights *part, int32_t parts, double sparsity);
/* N:M patterns: of every `of` weights side by side in a row of w(rows, cols), dense, at most `keep` stay. 1 <= keep < of <= 64;
   2:4 and 4:8 are what hardware knows. A rest of a row that is shorter than `of` keeps `keep` weights too. */
APT_API apt_result apt_magnitude_pattern(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t rows,
                                         int64_t cols, int32_t keep, int32_t of);
/* Iterative pruning: s(t) = first * (last/first)^(t/iterations), t in 0..iterations; s(iterations) is exactly last.
   0 < first <= last < 1. Iteration number t (1, 2 ...) prunes to s(t). */
APT_API apt_result apt_magnitude_schedule(double *sparsity, double first, double last, int32_t iterations, int32_t t);

/* --- compressed matrices: a bitmask and the values that are not 0 --- */

/* A view of the caller's arrays (apt_sparse_make takes memory of a context instead). Rows of the mask begin a new word. */
typedef struct apt_sparse {
    int64_t rows, cols;
    uint64_t *bits;                   /* [rows * apt_bitmask_words(cols)] */
    int64_t *start;                   /* [rows + 1] where a row's values begin; start[rows]: how many there are */
    float *values;                    /* [start[rows]] row by row, in the order of their columns */
} apt_sparse;

/* Values of w(rows, cols) that are not +0 (-0 and NaN count, so that packing loses nothing); -1 for bad arguments. */
APT_API int64_t apt_sparse_count(const float *w, int64_t ld, int64_t rows, int64_t cols);
/* Bytes of such a matrix in a file: 8 for the shape, ceil(cols/8) of mask for each row, up to a multiple of 4, and 4 for each
   value. -1: bad arguments. */
APT_API int64_t apt_sparse_bytes(int64_t rows, int64_t cols, int64_t count);
/* Fills bits, start and values of `sparse`, whose rows, cols and pointers are set and whose values have room for `capacity`
   (APT_E_SCRATCH when that is too little; contents are then undefined). */
APT_API apt_result apt_sparse_pack(apt_sparse *sparse, int64_t capacity, const float *w, int64_t ld);
/* w(rows, cols) = the matrix with its zeros. */
APT_API apt_result apt_sparse_unpack(float *w, int64_t ld, const apt_sparse *sparse);
/* y(n, rows) = x(n, cols) W^T, x and y not overlapping. With a context: the sums of a dense product without the terms that are
   0, in the same order, so the same bits (the "ref" kernels apart); NULL: plain C. The view must be as apt_sparse_pack
   leaves it: whether bits and starts agree is not looked at here. */
APT_API apt_result apt_sparse_forward(apt_ctx *ctx, float *y, int64_t ldy, const apt_sparse *sparse, const float *x, int64_t ldx,
                                      int64_t n);

#ifndef APT_ONLY_CORE
/* The same with memory of ctx; w stays the caller's. A failed make leaves nothing to free. */
APT_API apt_result apt_sparse_make(apt_ctx *ctx, apt_sparse *sparse, const float *w, int64_t ld, int64_t rows, int64_t cols);
/* Of apt_sparse_make and apt_sparse_load only. A zeroed or freed one is fine. */
APT_API void apt_sparse_free(apt_ctx *ctx, apt_sparse *sparse);
/* A safetensors file that holds matrix i as the tensor names[i].sparse, written through a temporary file. bytes (may be NULL):
   its length. */
APT_API apt_result apt_sparse_save(apt_ctx *ctx, const char *path, const char *const *names, const apt_sparse *matrix,
                                   int32_t count, int64_t *bytes);
/* One of them, in memory of ctx. Finite values only. */
APT_API apt_result apt_sparse_load(apt_ctx *ctx, const char *path, const char *name, apt_sparse *sparse);

/* --- magnitude pruning of a model ---

   The masks belong to the model: they outlive the trainer, follow their matrix through compaction, and stand in checkpoints.
   While there is a trainer, masked weights of a trained matrix get no gradient and are set to 0 after every update. A
   frozen matrix (LoRA) is masked once and its adapter stays dense; apt_model_merge then masks the merged matrix too, so
   that zeros stay zero: *difference tells what this cost. apt_model_set refuses other values than 0 where a mask is 0.
   apt_model_save writes the zeros and not the masks. */

typedef struct apt_sparsity {
    int32_t matrices;
    int64_t weights, zeros;           /* weights - zeros are active */
    double sparsity;                  /* zeros / weights */
    int64_t dense_bytes, sparse_bytes;/* as float32, and compressed (apt_sparse_bytes) */
    double compression;               /* dense_bytes / sparse_bytes; 1 when there are no weights */
} apt_sparsity;
/* By the masks. name NULL: all matrices that have one; else that parameter, masked or not. */
APT_API apt_result apt_model_sparsity(const apt_model *model, const char *name, apt_sparsity *sparsity);
/* The mask of a matrix: apt_bitmask_words(rows*cols) words. All ones where it has none. */
APT_API apt_result apt_model_get_bitmask(const apt_model *model, const char *name, uint64_t *mask, int64_t words);
/* Sets it, and the weights under it to 0. mask NULL (words 0) removes it; the weights stay as they are. Adapters have none. */
APT_API apt_result apt_model_set_bitmask(apt_model *model, const char *name, const uint64_t *mask, int64_t words);
/* apt_model_save with every matrix compressed that gets smaller by it, whether by masks or not. apt_model_load reads such a
   folder like any other; transformers cannot. saved (may be NULL): what is compressed in the file. */
APT_API apt_result apt_model_save_sparse(apt_model *model, const char *dir, apt_sparsity *saved);

/* Makes zeros pay in apt_model_forward and apt_generate too: compressed copies of those linear maps of the layers of which a
   share of `least` or more is 0 (0: APT_SPARSE_LEAST), used where a product has APT_SPARSE_ROWS rows or more (below, and for
   maps with fewer zeros, the dense kernels are faster). The numbers stay the same, bit for bit (except with the "ref"
   kernels). For a model with neither trainer nor adapters; whatever changes a matrix drops its copy, and so does a new trainer.
   used (may be NULL): what has a copy; sparse_bytes is what stands in a file, memory holds a little more. */
#define APT_SPARSE_LEAST 0.5
#define APT_SPARSE_ROWS 64
APT_API apt_result apt_model_compress(apt_model *model, double least, apt_sparsity *used);

/* What to prune and how: by threshold when sparsity and pattern are 0. */
typedef struct apt_magnitude_desc {
    uint32_t start_canary;
    /* Matrices whose names contain one of these texts, in which * stands for anything: "output.dense", "layer.3.*query", "fc". A
       text that no matrix has is an error. NULL: the linear maps of all layers. */
    const char *const *patterns;
    int32_t pattern_count;
    int32_t global;                   /* one threshold for all of them; 0: `sparsity` of each */
    double sparsity;                  /* 0..1 */
    float threshold;                  /* APT_MAGNITUDE_THRESHOLD */
    int32_t keep, of;                 /* N:M pattern: 2, 4 or 4, 8; 0: none */
    uint32_t end_canary;
} apt_magnitude_desc;
/* Prunes at once. Fires APT_EVENT_PRUNE with the active weights of the chosen matrices. Earlier masks of these matrices are
   replaced: zeros go first, so they stay unless less is asked for than was (then some weights come back as 0 and learn).
   sparsity (may be NULL): of the chosen matrices, afterwards. */
APT_API apt_result apt_trainer_magnitude(apt_trainer *trainer, const apt_magnitude_desc *desc, apt_sparsity *sparsity);

/* Iterative pruning: evaluate, prune a little, evaluate, retrain, evaluate, and again. */
struct apt_iterative_desc {
    uint32_t start_canary;
    const char *const *patterns;      /* these three as in apt_magnitude_desc */
    int32_t pattern_count;
    int32_t global;
    double first, last;               /* of apt_magnitude_schedule: 0.2 and 0.8 */
    int32_t iterations;               /* 5 */
    int32_t lower_is_better;          /* 1: the metric of APT_EVENT_EVALUATE is a loss or a perplexity */
    int64_t begin;                    /* step before which the first iteration prunes; 0 means 0 */
    int64_t retrain;                  /* steps behind each pruning; 0: equal parts of what is left behind begin */
    uint32_t end_canary;
};
/* For a fresh trainer, and again before apt_checkpoint_load. From here on apt_trainer_step does it: it prunes in front of steps
   begin, begin + retrain, ... and fires APT_EVENT_EVALUATE before and after each (once where one iteration ends and the
   next begins), APT_EVENT_PRUNE, and APT_EVENT_CHECKPOINT where an iteration ends. */
APT_API apt_result apt_trainer_iterative(apt_trainer *trainer, const apt_iterative_desc *desc);

enum { APT_MEASURED_BEFORE = 1, APT_MEASURED_AFTER = 2, APT_MEASURED_RETRAINED = 4 };
typedef struct apt_iteration {
    int32_t number;                   /* 1, 2, ... */
    int32_t measured;                 /* which of the metrics the callback gave: APT_MEASURED_* */
    int64_t step;                     /* steps done when it pruned */
    double target;
    apt_sparsity reached;
    double before, after, retrained;  /* metrics */
    double degradation;               /* of retrained against the first iteration's before, as a share of that; below 0: better */
} apt_iteration;
/* Iterations begun so far; the last one has no `retrained` before it ends. */
APT_API int32_t apt_trainer_iterations(const apt_trainer *trainer);
APT_API apt_result apt_trainer_iteration(const apt_trainer *trainer, int32_t index, apt_iteration *iteration);
/* All iterations in one: where the plan leads, how far it has come, and what it has cost so far. */
typedef struct apt_iterative_summary {
    int32_t iterations, done;         /* planned; begun */
    int32_t measured;                 /* APT_MEASURED_BEFORE: of the first one; APT_MEASURED_RETRAINED: of the last that ended */
    int64_t begin, retrain;           /* of apt_iterative_desc, with the defaults filled in */
    double first, last;
    apt_sparsity reached;             /* of the chosen matrices, now */
    double before, retrained;         /* metrics: before the first iteration, and after the last one that ended ... */
    double degradation;               /* ... as in apt_iteration; 0 when one of them is missing */
} apt_iterative_summary;
/* APT_E_STATE without a plan. */
APT_API apt_result apt_trainer_iterative_query(const apt_trainer *trainer, apt_iterative_summary *summary);
#endif /* APT_ONLY_CORE */

/* --- learned sparsity ---

   A mask m with values in 0..1 says which positions of a sequence are computed in full (1) and which are only interpolated
   (0). Sparsity = 1 - mean(m). A loss pulls it towards a target, a scheduler moves the target, and the BK-core computes a
   feature of each position whose cost does not depend on the distance at which positions see each other. */

/* e = sparsity - target. */
typedef enum apt_sparsity_kind {
    APT_SPARSITY_L2 = 0,              /* e^2 */
    APT_SPARSITY_L1,                  /* |e|                                        (slope 0 at e = 0) */
    APT_SPARSITY_KL,                  /* KL(target || sparsity), both read as the chance that a position is masked. The sparsity
                                         is clamped to 1e-6 .. 1 - 1e-6. A target outside that range, for which the divergence
                                         has no minimum, gives L2; at a clamped sparsity the slope is L2's, which is finite */
    APT_SPARSITY_HUBER                /* e^2/2 up to |e| = 0.1, then 0.1*(|e| - 0.05) */
} apt_sparsity_kind;
/* "l2", "l1", "kl", "huber"; NULL for any other value. */
APT_API const char *apt_sparsity_kind_name(int32_t kind);
/* The reverse, with the messages of apt_schedule_kind_from_name. */
APT_API apt_result apt_sparsity_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes);
/* *loss of the mask(n), n >= 1;  grad(n) += grad_scale * d loss/d mask, NULL: not wanted. APT_E_RANGE: a mask or the target is
   outside 0..1. */
APT_API apt_result apt_sparsity_loss(double *loss, float *grad, const float *mask, int64_t n, int32_t kind, float target,
                                     float grad_scale);

/* total = accuracy_part + sparsity_part;  accuracy_part = accuracy_weight * accuracy, sparsity_part likewise. */
typedef struct apt_balanced {
    double accuracy, sparsity;        /* the losses as they came in */
    double accuracy_weight, sparsity_weight;
    double accuracy_part, sparsity_part, total;
} apt_balanced;
/* Weights >= 0, else APT_E_RANGE. */
APT_API apt_result apt_balanced_loss(apt_balanced *out, double accuracy, double sparsity, double accuracy_weight,
                                     double sparsity_weight);

/* Target and weight of the sparsity loss over a run: value = first + share*(last - first), u = (step - warmup)/(steps - warmup)
   clamped to 0..1. */
typedef enum apt_adaptive_kind {
    APT_ADAPTIVE_LINEAR = 0,          /* share = u */
    APT_ADAPTIVE_COSINE,              /* (1 - cos(pi u)) / 2 */
    APT_ADAPTIVE_STEP                 /* 0, then 0.33, 0.67, 1 from u = 0.25, 0.5, 0.75 on */
} apt_adaptive_kind;
/* "linear", "cosine", "step"; NULL for any other value. */
APT_API const char *apt_adaptive_kind_name(int32_t kind);
APT_API apt_result apt_adaptive_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes);

/* Zero means the default named in the comment. For a start of 0 say a small number. */
typedef struct apt_adaptive_desc {
    int32_t kind;                     /* apt_adaptive_kind */
    int64_t steps;                    /* required: the last value holds from here on */
    int64_t warmup;                   /* 1000; negative: none. Below steps */
    float sparsity_first, sparsity_last;   /* 0.2, 0.5; each in [0, 1) */
    float weight_first, weight_last;       /* 0.001, 0.01; >= 0 */
    float threshold;                  /* validation loss above which the pressure is eased; 0: never */
} apt_adaptive_desc;
/* Plain data, a copy is a snapshot. Read it as you like, change it through the functions. */
typedef struct apt_adaptive {
    apt_adaptive_desc desc;           /* defaults filled in; no warm-up: -1 */
    int64_t step;                     /* of the last call */
    double best;                      /* lowest validation loss */
    int64_t best_step, validations;   /* validations 0: no best yet */
    int64_t eased_count;              /* validations that were above the threshold */
    int32_t eased;                    /* the last one was */
    float target, weight;             /* now */
} apt_adaptive;
APT_API apt_result apt_adaptive_init(apt_adaptive *state, const apt_adaptive_desc *desc);
/* Sets target and weight for `step` >= 0. validation: a new validation loss, or NULL. Above the threshold the scheduled target is
   multiplied by 0.9 and the weight by 0.5 until a validation loss comes in that is not above it. */
APT_API apt_result apt_adaptive_step(apt_adaptive *state, int64_t step, const double *validation);
/* Back to step 0, nothing validated. */
APT_API apt_result apt_adaptive_reset(apt_adaptive *state);
/* Saved bytes are the same on every machine, with a check sum. Restore: APT_E_FORMAT for other data, APT_E_CHECKSUM for
   damaged. */
#define APT_ADAPTIVE_BYTES 100
APT_API apt_result apt_adaptive_save(const apt_adaptive *state, void *out, size_t bytes);
APT_API apt_result apt_adaptive_restore(apt_adaptive *state, const void *in, size_t bytes);

/* How many experts there are at a step: `first` up to begin, `last` from end on, a straight line (rounded up) between. */
typedef struct apt_expert_schedule { int32_t first, last; int64_t begin, end; } apt_expert_schedule;
/* 1 <= last <= first, begin <= end, else APT_E_RANGE. */
APT_API apt_result apt_expert_count(const apt_expert_schedule *schedule, int64_t step, int32_t *count);

/* BK-core: the diagonal of (T - zI)^-1. T is tridiagonal: -2 + v[i] on the diagonal (the discrete Laplacian with potential v), 1
   beside it. The entry beside it, between i-1 and i, has the square mask[i-1]*mask[i]: with a mask of 0 and 1 a masked position
   is cut off from both neighbours, so the others get the exact diagonal of what remains, and it gets 1/(-2 + v[i] - z). Values
   between 0 and 1 are allowed, and everything is differentiable in the mask.
       left pivot r[i] = d[i] - c[i]/r[i-1],   right pivot s[i] = d[i] - c[i+1]/s[i+1],   G[i] = 1/(r[i] + s[i] - d[i]),
   d = -2 + v - z, c = mask[i-1]*mask[i]: ratios of the theta and phi recursions, which neither overflow nor underflow.
   z must not be real: 0.05 <= |im|. Then no pivot is smaller than |im|, |G| <= 1/|im|, and what lies w positions away counts less
   than (1 + im^2)^-w. Long rows are cut into pieces with so much overlap that what is left out is below 1e-9; the pieces run
   side by side. The cut depends on n and z only, so the result is the same for any number of threads. */
typedef struct apt_bk { float re, im; } apt_bk;      /* z; im 0 means 1. NULL where one is wanted: z = i */
/* Bytes of scratch; -1 when an argument is invalid. */
APT_API int64_t apt_bk_scratch(int64_t rows, int64_t n, const apt_bk *z);
/* re, im, v, mask: (rows, n) dense, one sequence per row. mask NULL: all 1. APT_E_NONFINITE: an input; APT_E_RANGE: a mask, z, or
   a v beyond +-1e9. */
APT_API apt_result apt_bk_forward(float *re, float *im, const float *v, const float *mask, int64_t rows, int64_t n,
                                  const apt_bk *z, void *scratch, size_t scratch_bytes);
/* From dre, dim = dL/d re, dL/d im:  dv += dL/dv,  dmask += dL/dmask,  dz[0] += dL/d re(z), dz[1] += dL/d im(z). Each of the
   three may be NULL; dmask needs a mask. */
APT_API apt_result apt_bk_backward(float *dv, float *dmask, double *dz, const float *dre, const float *dim, const float *v,
                                   const float *mask, int64_t rows, int64_t n, const apt_bk *z, void *scratch,
                                   size_t scratch_bytes);

#ifndef APT_ONLY_CORE
/* The same on the context's threads, with its own scratch: bit for bit the same numbers. */
APT_API apt_result apt_bk_forward_threads(apt_ctx *ctx, float *re, float *im, const float *v, const float *mask, int64_t rows,
                                          int64_t n, const apt_bk *z);
APT_API apt_result apt_bk_backward_threads(apt_ctx *ctx, float *dv, float *dmask, double *dz, const float *dre, const float *dim,
                                           const float *v, const float *mask, int64_t rows, int64_t n, const apt_bk *z);

/* Modules: small layers with parameters of their own, for a network of the caller's. One forward, then (if wanted) sparsity
   losses, then one backward with the same inputs. Gradients of parameters are added up until apt_module_adam uses and clears
   them; gradients of inputs are written. A batch is `sequences` sequences of `length` positions, rows = sequences * length. */
typedef struct apt_module apt_module;
typedef struct apt_module_tensor { const char *name; int64_t rows, cols; float *value, *grad; } apt_module_tensor;
/* Belongs to ctx; apt_destroy frees it too. A part of another module (apt_bk_layer_core ...) lives as long as that: it is left
   alone. */
APT_API void apt_module_destroy(apt_module *module);
/* Its parts' parameters included. Pointers and numbers hold until experts are removed. */
APT_API int32_t apt_module_tensors(const apt_module *module);
APT_API apt_result apt_module_get(const apt_module *module, int32_t index, apt_module_tensor *tensor);
APT_API int64_t apt_module_parameters(const apt_module *module);
/* Adam (0.9, 0.999, 1e-8) with every gradient, then clears them. step counts from 1. APT_E_NONFINITE: a gradient; nothing
   changes. */
APT_API apt_result apt_module_adam(apt_module *module, float learning_rate, int64_t step);

/* All that a module and its parts hold from one call to the next: parameters, gradients, the optimizer's state, temperature,
   number of draws, usage and history of experts; not what a forward keeps for its backward. The bytes are the same on every
   machine, with a check sum. Restore into a module of the same desc: experts that the saved one has lost are removed from it.
   APT_E_FORMAT: other data; APT_E_CHECKSUM: damaged; APT_E_SHAPE: saved from a module of another desc, or one that had experts
   which this one has no more. Nothing changes then. */
APT_API int64_t apt_module_bytes(const apt_module *module);
APT_API apt_result apt_module_save(const apt_module *module, void *out, size_t bytes);
APT_API apt_result apt_module_restore(apt_module *module, const void *in, size_t bytes);

/* Experts: y = sum over the top_k best-gated experts of gate * (DOWN gelu(UP x)), gate = softmax over their gate logits. */
typedef struct apt_moe_desc {
    int32_t hidden;                   /* required */
    int32_t experts;                  /* 4; at most 64 */
    int32_t top_k;                    /* 2, or the experts if fewer */
    int32_t neurons;                  /* of each expert: 4 * hidden */
    uint64_t seed;
} apt_moe_desc;
APT_API apt_result apt_moe_create(apt_ctx *ctx, const apt_moe_desc *desc, apt_module **module);
/* train 1: usage is counted. */
APT_API apt_result apt_moe_forward(apt_module *module, float *y, const float *x, int64_t rows, int32_t train);
/* dx may be NULL. */
APT_API apt_result apt_moe_backward(apt_module *module, float *dx, const float *dy, const float *x, int64_t rows);
/* Current number of experts, and how often each was chosen since the last removal: counts[experts], NULL: not wanted. */
APT_API apt_result apt_moe_usage(const apt_module *module, int32_t *experts, int64_t *counts, int32_t capacity);
typedef struct apt_expert_event {
    int64_t step;
    int32_t before, after;
    double least_share;               /* of all choices, of the least used expert before */
    double lost_share;                /* of those that went, together */
} apt_expert_event;
/* Removes, physically, every expert that got less than `share` of the choices (0: 0.05), never the last (the most used one
   stays); usage then starts again at 0. *removed may be NULL. APT_E_STATE when nothing was counted. The optimizer's state of
   the others goes on. A removal ends the validity of the last forward. */
APT_API apt_result apt_moe_prune(apt_module *module, float share, int64_t step, int32_t *removed);
/* Removes the least used experts (ties: the later one) until as many are left as the schedule says. */
APT_API apt_result apt_moe_progress(apt_module *module, const apt_expert_schedule *schedule, int64_t step, int32_t *removed);
APT_API int32_t apt_moe_events(const apt_module *module);
APT_API apt_result apt_moe_event(const apt_module *module, int32_t index, apt_expert_event *event);

/* Sparse BK-core. Importance u = w2 relu(W1 x + b1) + b2 (hidden/2 wide), p = sigmoid((u + noise)/temperature), mask m, G =
   BK-core of v with that mask, interpolation I = three 1-D convolutions (2 -> 16 -> 16 -> 2, width 3, ReLU between) over m*G.
   Features (re, im) = m*G + (1-m)*I. Where m is 0 or 1 the backward goes straight through the threshold: dL/dp = dL/dm. */
typedef enum apt_mask_mode {
    APT_MASK_FIXED = 0,               /* m = (u > 0), no noise: inference */
    APT_MASK_SAMPLE,                  /* Gumbel noise, m = (p > 1/2): training. Same seed, same draws */
    APT_MASK_SOFT                     /* Gumbel noise, m = p: exact gradients */
} apt_mask_mode;
typedef struct apt_bk_core_desc {
    int32_t hidden;                   /* required, >= 2 */
    float temperature;                /* 1 */
    apt_bk z;
    uint64_t seed;
} apt_bk_core_desc;
APT_API apt_result apt_bk_core_create(apt_ctx *ctx, const apt_bk_core_desc *desc, apt_module **module);
/* features(rows, 2) from x(rows, hidden) and the potential v(rows). Each call with noise takes the next draw of the seed. */
APT_API apt_result apt_bk_core_forward(apt_module *module, float *features, const float *x, const float *v, int64_t sequences,
                                       int64_t length, int32_t mode);
/* dx, dv may be NULL. */
APT_API apt_result apt_bk_core_backward(apt_module *module, float *dx, float *dv, const float *dfeatures, const float *x,
                                        const float *v, int64_t sequences, int64_t length);

/* A layer: e = experts(x);  v = clamp(w_v e + b_v, +-3);  f = clamp(sparse BK-core(x, v), +-10);  y = e + scale * (W_o f +
   b_o). */
typedef struct apt_bk_layer_desc {
    apt_moe_desc moe;                 /* moe.hidden is the layer's */
    float temperature;
    apt_bk z;
    float scale;                      /* 1 */
    uint64_t seed;                    /* in place of moe.seed */
} apt_bk_layer_desc;
APT_API apt_result apt_bk_layer_create(apt_ctx *ctx, const apt_bk_layer_desc *desc, apt_module **module);
/* x, y: (rows, hidden). With APT_MASK_FIXED the experts' usage is not counted. */
APT_API apt_result apt_bk_layer_forward(apt_module *module, float *y, const float *x, int64_t sequences, int64_t length,
                                        int32_t mode);
APT_API apt_result apt_bk_layer_backward(apt_module *module, float *dx, const float *dy, const float *x, int64_t sequences,
                                         int64_t length);
APT_API apt_module *apt_bk_layer_core(apt_module *module);
APT_API apt_module *apt_bk_layer_moe(apt_module *module);

/* For a sparse BK-core or a layer, between forward and backward. Loss on the mask; its gradient, times grad_scale, waits for
   the backward (several calls add up). */
APT_API apt_result apt_module_sparsity_loss(apt_module *module, double *loss, int32_t kind, float target, float grad_scale);
/* The same with grad_scale sparsity_weight, and the balanced loss with the caller's `accuracy` loss (whose gradient is the
   caller's). */
APT_API apt_result apt_module_balanced_loss(apt_module *module, apt_balanced *out, int32_t kind, float target, double accuracy,
                                            double accuracy_weight, double sparsity_weight);
APT_API apt_result apt_module_temperature(apt_module *module, float temperature);
typedef struct apt_bk_stats {
    int64_t positions;
    int64_t masked;                   /* mask below 1/2 */
    double sparsity;                  /* masked / positions */
    double probability;               /* mean of p: of staying */
    double least, most;               /* sparsity of the single sequences */
    int64_t potential_clamped, features_clamped;   /* values (layer only) */
    int32_t experts;                  /* layer only */
} apt_bk_stats;
/* Of the last forward; APT_E_STATE when there was none. */
APT_API apt_result apt_module_stats(const apt_module *module, apt_bk_stats *stats);
/* The mask of the last forward, (rows). */
APT_API apt_result apt_module_mask(const apt_module *module, float *mask, int64_t rows);
#endif /* APT_ONLY_CORE */

#ifdef __cplusplus
}
#endif
#endif /* APT_H */


#if (defined(APT_IMPLEMENTATION) || defined(__INTELLISENSE__)) && !defined(APT_IMPLEMENTED)
#define APT_IMPLEMENTED
/* Everything below is implementation. Stop here if you only want the interface. */

// >>platform
/* ---------------------------------------------------------------------------------------------------------------------
   Compiler and system

   The header sets no feature-test macro: it may come after the program's own system headers, when that is too late.
   It needs only what the libc shows to a strict -std=c11 program, with two exceptions on Linux that are declared by
   hand below (a monotonic clock and the CPU affinity). Other systems use them when visible or do without.
   ------------------------------------------------------------------------------------------------------------------ */

#ifndef __cplusplus
#include <stdbool.h>
#endif
#include <math.h>
#include <string.h>

#ifndef APT_ONLY_CORE
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* APT_NO_POSIX: plain C11 only (files through stdio, no mapping, no threads of our own). */
#if !defined(APT_NO_POSIX) && (defined(__unix__) || defined(__APPLE__))
#define APTI_POSIX
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#elif defined(_WIN32)
#include <direct.h>
#endif

#if defined(APTI_POSIX) && defined(__GNUC__) && !defined(APT_NO_THREADS)
#define APTI_THREADS
#include <pthread.h>
#endif
#endif /* APT_ONLY_CORE */

#ifdef __GNUC__
#define APTI_INLINE static inline __attribute__((unused))
#define APTI_UNUSED __attribute__((unused))
#define APTI_NOINLINE __attribute__((noinline))
#define APTI_PRINTF(text, first) __attribute__((format(printf, text, first)))
#define APTI_RESTRICT __restrict__
#define APTI_ALIGN64 __attribute__((aligned(64)))
#define APTI_TARGET(features) __attribute__((target(features)))
#else
#define APTI_INLINE static inline
#define APTI_UNUSED
#define APTI_NOINLINE
#define APTI_PRINTF(text, first)
#define APTI_RESTRICT
#define APTI_ALIGN64
#define APTI_TARGET(features)
#endif

/* The SIMD kernels need GNU target attributes; another compiler gets the plain C ones. */
#if defined(__GNUC__) && !defined(APT_NO_SIMD)
#if defined(__x86_64__)
#define APTI_X86
#elif defined(__aarch64__)
#define APTI_NEON
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define APTI_RESULT_CASE(id, value, text) case APT_##id: return "APT_" #id ": " text;
APT_API const char *apt_result_text(apt_result result)
{
    switch (result) {
        APT_RESULTS(APTI_RESULT_CASE)
        case APT_RESULT_MIN_: break;
    }
    return "unknown result";
}
#undef APTI_RESULT_CASE

APT_API int32_t apt_version(void)
{
    return APT_VERSION_MAJOR * 10000 + APT_VERSION_MINOR * 100 + APT_VERSION_PATCH;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Integers, checked sizes, finite test
   ------------------------------------------------------------------------------------------------------------------ */

APTI_INLINE int64_t apti_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

APTI_INLINE int64_t apti_max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* n >= 0, d > 0 */
APTI_INLINE int64_t apti_ceil_div(int64_t n, int64_t d)
{
    return n / d + (n % d != 0);
}

APTI_INLINE int64_t apti_round_up(int64_t n, int64_t multiple)
{
    return apti_ceil_div(n, multiple) * multiple;
}

/* Sizes come from files and callers: false when a factor is negative or the product does not fit; *out is then untouched. */
APTI_INLINE bool apti_mul(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || (b != 0 && a > INT64_MAX / b)) return false;
    *out = a * b;
    return true;
}

APTI_INLINE bool apti_add(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || a > INT64_MAX - b) return false;
    *out = a + b;
    return true;
}

APTI_INLINE int32_t apti_popcount(uint64_t bits)
{
#ifdef __GNUC__
    return __builtin_popcountll(bits);
#else
    int32_t n = 0;
    for (; bits != 0; bits &= bits - 1) n++;
    return n;
#endif
}

/* Number of the lowest bit that is set; bits != 0. */
APTI_INLINE int32_t apti_lowest_bit(uint64_t bits)
{
#ifdef __GNUC__
    return __builtin_ctzll(bits);
#else
    return apti_popcount((bits & (0 - bits)) - 1);
#endif
}

APTI_INLINE uint32_t apti_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

APTI_INLINE float apti_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* By the exponent bits: -Ofast lets the compiler fold isfinite(x) to true. */
APTI_INLINE bool apti_finite(float x)
{
    return (apti_bits(x) & 0x7f800000u) != 0x7f800000u;
}

APTI_INLINE bool apti_finite_f64(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

/* No early exit: the loop then vectorises, and the usual answer is "all finite". */
APTI_INLINE bool apti_finite_all(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint32_t)((apti_bits(x[i]) & 0x7f800000u) == 0x7f800000u);
    return bad == 0;
}

#ifndef APT_ONLY_CORE
/* ---------------------------------------------------------------------------------------------------------------------
   Context, messages
   ------------------------------------------------------------------------------------------------------------------ */

#define APTI_MAX_THREADS 64
#define APTI_SCRATCH_BYTES (2 * 1024 * 1024)
#define APTI_MESSAGE_BYTES 1024

typedef struct apti_pool apti_pool;
struct apti_kernels;

struct apt_ctx {
    apt_desc desc;                               /* the caller's, or zeros; desc.kernels is not kept */
    apti_pool *pool;                             /* NULL: one thread, or the caller's parallel_for */
    int32_t threads;                             /* 1..APTI_MAX_THREADS */
    const struct apti_kernels *kernels;
    void *scratch[APTI_MAX_THREADS];             /* one per thread, scratch_bytes each, 64-byte aligned */
    size_t scratch_bytes;
    int64_t bytes, peak_bytes, blocks;           /* held from the allocator, overhead included */
    apt_model *models;                           /* list through apt_model.next */
    struct apt_module *modules;                  /* the same through apt_module.next */
    int32_t busy;                                /* atomic: a parallel_for is running */
    const void *owner[APTI_MAX_THREADS];         /* atomic: which system thread runs as thread i, see apti_thread_self */
    char error[APTI_MESSAGE_BYTES];
};

static void apti_emit(const apt_ctx *ctx, apt_log_level level, apt_result result, const char *message)
{
    if (ctx->desc.log != NULL) {
        apt_log_item item;
        item.level = level;
        item.result = result;
        item.message = message;
        ctx->desc.log(&item, ctx->desc.log_user);
        return;
    }
#ifndef APT_NO_STDIO
    if (level == APT_LOG_ERROR) fprintf(stderr, "apt: error: %s\n", message);
    if (level == APT_LOG_WARNING) fprintf(stderr, "apt: warning: %s\n", message);
#endif
}

/* A message that does not fit ends in "...". */
static void apti_format(char *text, const char *format, va_list args)
{
    const int n = vsnprintf(text, APTI_MESSAGE_BYTES, format, args);
    if (n < 0) text[0] = 0;
    if (n >= APTI_MESSAGE_BYTES) memcpy(text + APTI_MESSAGE_BYTES - 4, "...", 4);
}

/* Records the message for apt_error, logs it and returns `result`. The arguments may point into ctx->error. */
static apt_result apti_fail(apt_ctx *ctx, apt_result result, const char *format, ...) APTI_PRINTF(3, 4);
static apt_result apti_fail(apt_ctx *ctx, apt_result result, const char *format, ...)
{
    char text[APTI_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    apti_format(text, format, args);
    va_end(args);
    memcpy(ctx->error, text, sizeof text);
    apti_emit(ctx, APT_LOG_ERROR, result, ctx->error);
    return result;
}

static void apti_log(apt_ctx *ctx, apt_log_level level, const char *format, ...) APTI_PRINTF(3, 4);
static void apti_log(apt_ctx *ctx, apt_log_level level, const char *format, ...)
{
    char text[APTI_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    apti_format(text, format, args);
    va_end(args);
    apti_emit(ctx, level, APT_OK, text);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Memory: 64-byte aligned, counted, reference-counted blocks
   ------------------------------------------------------------------------------------------------------------------ */

/* Lies directly before the block. References let two models share frozen weights; only the API thread touches them. */
typedef struct apti_block {
    void *base;                                  /* what the allocator returned */
    int64_t bytes, total;                        /* asked for by us; asked from the allocator */
    int64_t references;
} apti_block;

#define APTI_ALIGNMENT 64

APTI_INLINE apti_block *apti_block_of(const void *block)
{
    return (apti_block *)((uintptr_t)block - sizeof(apti_block));
}

static void *apti_alloc_bytes(apt_ctx *ctx, int64_t count, int64_t size, bool zero)
{
    int64_t bytes, total;
    if (!apti_mul(count, size, &bytes) || !apti_add(bytes, 3 * APTI_ALIGNMENT, &total)) return NULL;
    /* Rounded up so that a vector load at the end stays inside; one alignment for the header, one to align. */
    total = apti_round_up(apti_max_i64(bytes, 1), APTI_ALIGNMENT) + 2 * APTI_ALIGNMENT;
    if ((uint64_t)total > (uint64_t)PTRDIFF_MAX) return NULL;
    void *base;
    if (ctx->desc.alloc != NULL) base = ctx->desc.alloc((size_t)total, ctx->desc.alloc_user);
    else base = zero ? calloc(1, (size_t)total) : malloc((size_t)total);
    if (base == NULL) return NULL;
    const uintptr_t address = ((uintptr_t)base + 2 * APTI_ALIGNMENT - 1) & ~(uintptr_t)(APTI_ALIGNMENT - 1);
    void *block = (char *)base + (address - (uintptr_t)base);
    if (zero && ctx->desc.alloc != NULL) memset(block, 0, (size_t)apti_round_up(bytes, APTI_ALIGNMENT));
    apti_block *header = apti_block_of(block);
    header->base = base;
    header->bytes = bytes;
    header->total = total;
    header->references = 1;
    ctx->bytes += total;
    ctx->blocks++;
    ctx->peak_bytes = apti_max_i64(ctx->peak_bytes, ctx->bytes);
    return block;
}

/* count * size bytes with undefined contents and one reference; NULL without a message when there is no memory.
   Zero bytes give a valid block. Not for tasks of a parallel_for. */
static void *apti_alloc(apt_ctx *ctx, int64_t count, int64_t size)
{
    return apti_alloc_bytes(ctx, count, size, false);
}

static void *apti_calloc(apt_ctx *ctx, int64_t count, int64_t size)
{
    return apti_alloc_bytes(ctx, count, size, true);
}

static void *apti_retain(void *block)
{
    if (block != NULL) apti_block_of(block)->references++;
    return block;
}

/* Drops one reference. NULL is allowed. */
static void apti_free(apt_ctx *ctx, void *block)
{
    if (block == NULL) return;
    apti_block *header = apti_block_of(block);
    if (--header->references > 0) return;
    void *base = header->base;
    ctx->bytes -= header->total;
    ctx->blocks--;
    if (ctx->desc.release != NULL) ctx->desc.release(base, ctx->desc.alloc_user);
    else free(base);
}

APTI_INLINE int64_t apti_block_bytes(const void *block)
{
    return block != NULL ? apti_block_of(block)->bytes : 0;
}

static char *apti_copy_text(apt_ctx *ctx, const char *text)
{
    const int64_t bytes = (int64_t)strlen(text) + 1;
    char *copy = (char *)apti_alloc(ctx, bytes, 1);
    if (copy != NULL) memcpy(copy, text, (size_t)bytes);
    return copy;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Clock and CPU
   ------------------------------------------------------------------------------------------------------------------ */

/* -std=c11 hides clock_gettime and sched_getaffinity in glibc and musl. The label binds our own declaration to the libc
   symbol, so that it cannot clash with the libc's prototype in a program that does see it. 64-bit only: there the
   types are beyond doubt. */
#if defined(APTI_POSIX) && defined(__linux__) && defined(__GNUC__) && defined(__LP64__)
#define APTI_LINUX
extern int apti_libc_clock_gettime(int clock, struct timespec *now) __asm__("clock_gettime");
extern int apti_libc_sched_getaffinity(int process, size_t bytes, void *mask) __asm__("sched_getaffinity");
#endif

/* Seconds since some moment in the past; monotonic where the system has such a clock. */
static double apti_seconds(void)
{
    struct timespec now;
#if defined(APTI_LINUX)
    const int monotonic = 1;
    if (apti_libc_clock_gettime(monotonic, &now) != 0) return 0;
#elif defined(APTI_POSIX) && defined(CLOCK_MONOTONIC)
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) return 0;
#else
    if (timespec_get(&now, TIME_UTC) == 0) return 0;
#endif
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* How many CPUs this process may run on: taskset and container CPU sets count, not only what the machine has. */
static int32_t apti_cpu_count(void)
{
    long count = 1;
#if defined(APTI_POSIX) && defined(_SC_NPROCESSORS_ONLN)
    count = sysconf(_SC_NPROCESSORS_ONLN);
#endif
#ifdef APTI_LINUX
    uint64_t mask[128];                          /* 8,192 CPUs; the kernel refuses a mask that is too short for it */
    memset(mask, 0, sizeof mask);
    if (apti_libc_sched_getaffinity(0, sizeof mask, mask) >= 0) {
        count = 0;
        for (int i = 0; i < 128; i++)
            for (uint64_t bits = mask[i]; bits != 0; bits &= bits - 1) count++;
    }
#endif
    return count < 1 ? 1 : count > APTI_MAX_THREADS ? APTI_MAX_THREADS : (int32_t)count;
}

typedef enum apti_cpu_feature {
    APTI_CPU_AVX2 = 1,                           /* with FMA and F16C */
    APTI_CPU_AVX512,                             /* F, BW, DQ and VL */
    APTI_CPU_AVX512_BF16,
    APTI_CPU_NEON
} apti_cpu_feature;

#ifdef APTI_X86
typedef struct apti_cpuid { uint32_t a, b, c, d; } apti_cpuid;

static apti_cpuid apti_cpuid_read(uint32_t leaf, uint32_t subleaf)
{
    apti_cpuid r;
    __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}

/* A feature counts when the CPU has it and the system saves its registers (XCR0); cheap enough not to be cached. */
static bool apti_cpu_has(apti_cpu_feature feature)
{
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29;
    const uint32_t avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const apti_cpuid one = apti_cpuid_read(1, 0);
    if (apti_cpuid_read(0, 0).a < 7 || (one.c & osxsave) == 0) return false;
    uint32_t xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    const apti_cpuid seven = apti_cpuid_read(7, 0);
    const bool has_avx2 = (xcr0 & 0x06) == 0x06 && (one.c & (fma | f16c)) == (fma | f16c) && (seven.b & avx2) != 0;
    const bool has_avx512 = has_avx2 && (xcr0 & 0xe6) == 0xe6 && (seven.b & avx512) == avx512;
    switch (feature) {
        case APTI_CPU_AVX2: return has_avx2;
        case APTI_CPU_AVX512: return has_avx512;
        case APTI_CPU_AVX512_BF16: return has_avx512 && seven.a >= 1 && (apti_cpuid_read(7, 1).a & 1u << 5) != 0;
        case APTI_CPU_NEON: break;
    }
    return false;
}
#else
/* NEON is part of every 64-bit ARM. */
APTI_INLINE bool apti_cpu_has(apti_cpu_feature feature)
{
#ifdef APTI_NEON
    return feature == APTI_CPU_NEON;
#else
    (void)feature;
    return false;
#endif
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
   Threads

   One job at a time. The API thread (thread 0) publishes it by storing its task count to `remaining`; every thread
   claims tasks by counting `remaining` down and reports what it finished in `finished`. A successful claim keeps the
   job open (the API thread waits for finished == count), so task, arg and count are read only after a claim and need
   no atomics. Workers that find nothing spin for a moment, because a training step issues hundreds of jobs
   back to back, and then sleep.
   ------------------------------------------------------------------------------------------------------------------ */

#ifdef __GNUC__
#define APTI_LOAD(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define APTI_STORE(p, value) __atomic_store_n((p), (value), __ATOMIC_SEQ_CST)
#define APTI_EXCHANGE(p, old, value) __atomic_compare_exchange_n((p), (old), (value), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#else
#define APTI_LOAD(p) (*(p))
#define APTI_STORE(p, value) (*(p) = (value))
#endif

#ifdef APTI_THREADS
#define APTI_SPIN_SECONDS 40e-6
#define APTI_STACK_BYTES (4u << 20)

typedef struct apti_worker { apti_pool *pool; pthread_t handle; int32_t thread; } apti_worker;

struct apti_pool {
    apt_ctx *ctx;
    apti_worker worker[APTI_MAX_THREADS];        /* [0] is unused: thread 0 is the caller */
    int32_t workers;                             /* started */
    double spin_seconds;                         /* 0 when there are more threads than CPUs: spinning would steal their time */
    apt_task task;
    void *arg;
    int64_t count;
    pthread_mutex_t mutex;                       /* guards sleeping only: wake, done, stop */
    pthread_cond_t wake, done;
    bool stop;
    APTI_ALIGN64 int64_t remaining;              /* atomic: tasks not claimed yet */
    APTI_ALIGN64 int64_t finished;               /* atomic: tasks done */
    APTI_ALIGN64 int32_t sleepers;               /* atomic: workers in pthread_cond_wait(wake), or about to be */
    int32_t waiting;                             /* atomic: the caller is in pthread_cond_wait(done), or about to be */
};

APTI_INLINE void apti_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Claims and runs tasks until none is left. */
static void apti_pool_work(apti_pool *pool, int32_t thread)
{
    int64_t ran = 0, count = 0;
    int64_t left = APTI_LOAD(&pool->remaining);
    while (left > 0) {
        if (!APTI_EXCHANGE(&pool->remaining, &left, left - 1)) continue;
        count = pool->count;
        pool->task(count - left, thread, pool->arg);
        ran++;
        left = APTI_LOAD(&pool->remaining);
    }
    if (ran == 0) return;
    /* The last one to report wakes the caller. Either we see its `waiting` or it sees our `finished`. */
    if (__atomic_add_fetch(&pool->finished, ran, __ATOMIC_SEQ_CST) == count && APTI_LOAD(&pool->waiting) != 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->mutex);
    }
}

/* Spins until *value is at least `target` or the time is up; true when it is. */
static bool apti_spin(const int64_t *value, int64_t target, double seconds)
{
    if (APTI_LOAD(value) >= target) return true;
    if (seconds <= 0) return false;
    const double end = apti_seconds() + seconds;
    do {
        for (int i = 0; i < 16; i++) {
            if (APTI_LOAD(value) >= target) return true;
            apti_pause();
        }
    } while (apti_seconds() < end);
    return false;
}

/* Returns when there may be work (true) or the pool ends (false). */
static bool apti_pool_idle(apti_pool *pool)
{
    if (apti_spin(&pool->remaining, 1, pool->spin_seconds)) return true;
    pthread_mutex_lock(&pool->mutex);
    __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    while (APTI_LOAD(&pool->remaining) == 0 && !pool->stop) pthread_cond_wait(&pool->wake, &pool->mutex);
    __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    const bool go_on = !pool->stop;
    pthread_mutex_unlock(&pool->mutex);
    return go_on;
}

static void *apti_worker_main(void *arg)
{
    apti_worker *worker = (apti_worker *)arg;
    APTI_STORE(&worker->pool->ctx->owner[worker->thread], (const void *)&errno);
    while (apti_pool_idle(worker->pool)) apti_pool_work(worker->pool, worker->thread);
    return NULL;
}

static void apti_pool_run(apti_pool *pool, int64_t count, apt_task task, void *arg)
{
    pool->task = task;
    pool->arg = arg;
    pool->count = count;
    APTI_STORE(&pool->finished, (int64_t)0);
    APTI_STORE(&pool->remaining, count);
    const int32_t sleepers = APTI_LOAD(&pool->sleepers);
    if (sleepers > 0) {
        pthread_mutex_lock(&pool->mutex);
        if (count > sleepers) pthread_cond_broadcast(&pool->wake);
        else for (int64_t i = 1; i < count; i++) pthread_cond_signal(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    apti_pool_work(pool, 0);
    if (apti_spin(&pool->finished, count, pool->spin_seconds)) return;
    pthread_mutex_lock(&pool->mutex);
    APTI_STORE(&pool->waiting, 1);
    while (APTI_LOAD(&pool->finished) != count) pthread_cond_wait(&pool->done, &pool->mutex);
    APTI_STORE(&pool->waiting, 0);
    pthread_mutex_unlock(&pool->mutex);
}

static void apti_pool_destroy(apt_ctx *ctx)
{
    apti_pool *pool = ctx->pool;
    if (pool == NULL) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int32_t i = 1; i <= pool->workers; i++) pthread_join(pool->worker[i].handle, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    apti_free(ctx, pool);
    ctx->pool = NULL;
}

static int apti_worker_start(apti_worker *worker)
{
    pthread_attr_t attributes;
    int code = pthread_attr_init(&attributes);
    if (code != 0) return code;
    /* musl's default of 128 KiB would be short; a refusal leaves the default. */
    (void)pthread_attr_setstacksize(&attributes, APTI_STACK_BYTES);
    code = pthread_create(&worker->handle, &attributes, apti_worker_main, worker);
    pthread_attr_destroy(&attributes);
    return code;
}

/* ctx->threads - 1 workers. */
static apt_result apti_pool_create(apt_ctx *ctx)
{
    apti_pool *pool = (apti_pool *)apti_calloc(ctx, 1, (int64_t)sizeof(apti_pool));
    if (pool == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for the thread pool");
    const bool mutex = pthread_mutex_init(&pool->mutex, NULL) == 0, wake = mutex && pthread_cond_init(&pool->wake, NULL) == 0;
    if (!wake || pthread_cond_init(&pool->done, NULL) != 0) {
        if (wake) pthread_cond_destroy(&pool->wake);
        if (mutex) pthread_mutex_destroy(&pool->mutex);
        apti_free(ctx, pool);
        return apti_fail(ctx, APT_E_THREAD, "the thread pool's mutex could not be made");
    }
    pool->ctx = ctx;
    pool->spin_seconds = ctx->threads <= apti_cpu_count() ? APTI_SPIN_SECONDS : 0;
    ctx->pool = pool;
    for (int32_t i = 1; i < ctx->threads; i++) {
        pool->worker[i].pool = pool;
        pool->worker[i].thread = i;
        const int code = apti_worker_start(&pool->worker[i]);
        if (code != 0) {
            apti_pool_destroy(ctx);
            return apti_fail(ctx, APT_E_THREAD, "thread %d of %d could not be started: %s", (int)i + 1, (int)ctx->threads,
                             strerror(code));
        }
        pool->workers = i;
    }
    return APT_OK;
}
#endif /* APTI_THREADS */

/* errno is thread-local wherever there are threads, so its address names the running thread without any thread API. */
static int32_t apti_thread_self(const apt_ctx *ctx)
{
    for (int32_t i = 0; i < ctx->threads; i++)
        if (APTI_LOAD(&ctx->owner[i]) == (const void *)&errno) return i;
    return 0;
}

typedef struct apti_foreign_job { apt_ctx *ctx; apt_task task; void *arg; } apti_foreign_job;

/* Wraps a task for the caller's parallel_for: notes who runs it for apti_thread_self. */
static void apti_foreign_task(int64_t index, int32_t thread, void *arg)
{
    const apti_foreign_job *job = (const apti_foreign_job *)arg;
    APTI_STORE(&job->ctx->owner[thread], (const void *)&errno);
    job->task(index, thread, job->arg);
    APTI_STORE(&job->ctx->owner[thread], (const void *)NULL);
}

static void apti_run_inline(int64_t count, int32_t thread, apt_task task, void *arg)
{
    for (int64_t i = 0; i < count; i++) task(i, thread, arg);
}

/* task(i, thread, arg) for every i in [0, count), in any order; returns when all are done. From inside a task it runs
   its tasks inline, as the same thread. */
static void apti_parallel_for(apt_ctx *ctx, int64_t count, apt_task task, void *arg)
{
    if (count <= 0) return;
    if (APTI_LOAD(&ctx->busy) != 0) {
        apti_run_inline(count, apti_thread_self(ctx), task, arg);
        return;
    }
    APTI_STORE(&ctx->busy, 1);
    const bool alone = count == 1 || ctx->threads == 1;
    if (!alone && ctx->desc.parallel_for != NULL) {
        apti_foreign_job job;
        job.ctx = ctx;
        job.task = task;
        job.arg = arg;
        APTI_STORE(&ctx->owner[0], (const void *)NULL);
        ctx->desc.parallel_for(count, apti_foreign_task, &job, ctx->desc.parallel_user);
    } else {
        APTI_STORE(&ctx->owner[0], (const void *)&errno);
#ifdef APTI_THREADS
        if (!alone) apti_pool_run(ctx->pool, count, task, arg);
        else
#endif
        apti_run_inline(count, 0, task, arg);
    }
    APTI_STORE(&ctx->busy, 0);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Files: a thin layer over the system (POSIX, or stdio where there is none), then mapping and atomic writing on top
   ------------------------------------------------------------------------------------------------------------------ */

typedef enum apti_path_kind { APTI_PATH_NONE = 0, APTI_PATH_FILE, APTI_PATH_DIR, APTI_PATH_OTHER } apti_path_kind;

#ifdef APTI_POSIX
typedef struct apti_handle { int fd; } apti_handle;

static apti_path_kind apti_path_query(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) return APTI_PATH_NONE;
    return S_ISREG(info.st_mode) ? APTI_PATH_FILE : S_ISDIR(info.st_mode) ? APTI_PATH_DIR : APTI_PATH_OTHER;
}

static bool apti_os_open(apti_handle *handle, const char *path, int flags)
{
#ifdef O_CLOEXEC
    flags |= O_CLOEXEC;
#endif
    do handle->fd = open(path, flags, 0666);
    while (handle->fd < 0 && errno == EINTR);
    if (handle->fd < 0) return false;
    (void)fcntl(handle->fd, F_SETFD, FD_CLOEXEC);
    return true;
}

static bool apti_os_open_read(apti_handle *handle, const char *path)
{
    return apti_os_open(handle, path, O_RDONLY);
}

/* exclusive: the file must not exist yet. */
static bool apti_os_open_write(apti_handle *handle, const char *path, bool exclusive)
{
    return apti_os_open(handle, path, O_WRONLY | (exclusive ? O_CREAT | O_EXCL : 0));
}

/* -1 on failure */
static int64_t apti_os_size(apti_handle *handle)
{
    struct stat info;
    return fstat(handle->fd, &info) == 0 ? (int64_t)info.st_size : -1;
}

/* Reads up to `bytes`, less only at the end of the file; -1 on failure. */
static int64_t apti_os_read(apti_handle *handle, void *data, int64_t bytes)
{
    int64_t got = 0;
    while (got < bytes) {
        const ssize_t n = read(handle->fd, (char *)data + got, (size_t)apti_min_i64(bytes - got, 1 << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        if (n == 0) break;
        got += n;
    }
    return got;
}

static bool apti_os_write(apti_handle *handle, const void *data, int64_t bytes)
{
    int64_t put = 0;
    while (put < bytes) {
        const ssize_t n = write(handle->fd, (const char *)data + put, (size_t)apti_min_i64(bytes - put, 1 << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        put += n;
    }
    return true;
}

/* Terminals, pipes and some file systems cannot sync (EINVAL and friends): nothing is lost there that could be kept. */
static bool apti_os_sync(apti_handle *handle)
{
    int code;
    do code = fsync(handle->fd);
    while (code != 0 && errno == EINTR);
    return code == 0 || errno == EINVAL || errno == ENOTSUP || errno == EROFS;
}

static bool apti_os_close(apti_handle *handle)
{
    return close(handle->fd) == 0 || errno == EINTR;
}

static bool apti_os_replace(const char *from, const char *to)
{
    return rename(from, to) == 0;
}

/* A second name for a file. */
static bool apti_os_link(const char *from, const char *to)
{
    return link(from, to) == 0;
}

static bool apti_os_make_dir(const char *path)
{
    return mkdir(path, 0777) == 0;
}

static long apti_os_process(void)
{
    return (long)getpid();
}
#else
typedef struct apti_handle { FILE *file; } apti_handle;

static bool apti_os_open_read(apti_handle *handle, const char *path)
{
    handle->file = fopen(path, "rb");
    return handle->file != NULL;
}

static apti_path_kind apti_path_query(const char *path)
{
    apti_handle handle;
    if (!apti_os_open_read(&handle, path)) return APTI_PATH_NONE;
    fclose(handle.file);
    return APTI_PATH_FILE;
}

static bool apti_os_open_write(apti_handle *handle, const char *path, bool exclusive)
{
    handle->file = fopen(path, exclusive ? "wbx" : "wb");
    return handle->file != NULL;
}

static int64_t apti_os_size(apti_handle *handle)
{
#ifdef _WIN32
    if (_fseeki64(handle->file, 0, SEEK_END) != 0) return -1;
    const int64_t size = _ftelli64(handle->file);
    if (_fseeki64(handle->file, 0, SEEK_SET) != 0) return -1;
#else
    if (fseek(handle->file, 0, SEEK_END) != 0) return -1;
    const int64_t size = ftell(handle->file);
    if (fseek(handle->file, 0, SEEK_SET) != 0) return -1;
#endif
    return size;
}

static int64_t apti_os_read(apti_handle *handle, void *data, int64_t bytes)
{
    const size_t n = fread(data, 1, (size_t)bytes, handle->file);
    return ferror(handle->file) ? -1 : (int64_t)n;
}

static bool apti_os_write(apti_handle *handle, const void *data, int64_t bytes)
{
    return fwrite(data, 1, (size_t)bytes, handle->file) == (size_t)bytes;
}

static bool apti_os_sync(apti_handle *handle)
{
    return fflush(handle->file) == 0;
}

static bool apti_os_close(apti_handle *handle)
{
    return fclose(handle->file) == 0;
}

/* Not atomic on Windows, where rename refuses an existing target. */
static bool apti_os_replace(const char *from, const char *to)
{
#ifdef _WIN32
    (void)remove(to);
#endif
    return rename(from, to) == 0;
}

static bool apti_os_link(const char *from, const char *to)
{
    (void)from;
    (void)to;
    return false;
}

/* C cannot make folders: opening a file in it will tell. */
static bool apti_os_make_dir(const char *path)
{
#ifdef _WIN32
    return _mkdir(path) == 0;
#else
    (void)path;
    return true;
#endif
}

static long apti_os_process(void)
{
    return 0;
}
#endif /* APTI_POSIX */

static apt_result apti_fail_io(apt_ctx *ctx, const char *verb, const char *path)
{
    const char *reason = errno != 0 ? strerror(errno) : "unknown reason";
    return apti_fail(ctx, APT_E_IO, "cannot %s '%.700s': %s", verb, path, reason);
}

/* Makes a folder (not its parents); one that exists is fine. */
static apt_result apti_make_dir(apt_ctx *ctx, const char *path)
{
    errno = 0;
    if (apti_os_make_dir(path)) return APT_OK;
    const int code = errno;
    const apti_path_kind kind = apti_path_query(path);
    if (code == EEXIST && kind == APTI_PATH_DIR) return APT_OK;
#ifndef APTI_POSIX
    if (code == EEXIST) return APT_OK;           /* the stdio layer cannot tell files from folders */
#endif
    errno = code;
    return apti_fail_io(ctx, "make the folder", path);
}

/* Opens a regular file and gets its size. */
static apt_result apti_open_regular(apt_ctx *ctx, const char *path, apti_handle *handle, int64_t *bytes)
{
    errno = 0;
    /* Asked before opening: opening a pipe would wait for a writer. */
    const apti_path_kind kind = apti_path_query(path);
    if (kind == APTI_PATH_DIR) return apti_fail(ctx, APT_E_IO, "cannot read '%.700s': it is a folder", path);
    if (kind == APTI_PATH_OTHER) return apti_fail(ctx, APT_E_IO, "cannot read '%.700s': it is not a regular file", path);
    if (!apti_os_open_read(handle, path)) return apti_fail_io(ctx, "open", path);
    *bytes = apti_os_size(handle);
    if (*bytes >= 0 && (uint64_t)*bytes <= (uint64_t)PTRDIFF_MAX / 2) return APT_OK;
    const apt_result result = apti_fail_io(ctx, "get the size of", path);
    (void)apti_os_close(handle);
    return result;
}

/* Into a new block with a 0 byte after the data. */
static apt_result apti_read_open(apt_ctx *ctx, const char *path, apti_handle *handle, int64_t bytes, char **text)
{
    char *data = (char *)apti_alloc(ctx, bytes + 1, 1);
    if (data == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for the %lld bytes of '%.700s'", (long long)bytes, path);
    errno = 0;
    const int64_t got = apti_os_read(handle, data, bytes);
    if (got == bytes) {
        data[bytes] = 0;
        *text = data;
        return APT_OK;
    }
    const apt_result result = got < 0 ? apti_fail_io(ctx, "read", path)
                                      : apti_fail(ctx, APT_E_IO, "'%.700s' became shorter while it was read", path);
    apti_free(ctx, data);
    return result;
}

/* The whole file as a block for apti_free, ended by a 0 byte that *bytes does not count. APT_E_RANGE above max_bytes. */
static apt_result apti_read_file(apt_ctx *ctx, const char *path, int64_t max_bytes, char **text, int64_t *bytes)
{
    apti_handle handle;
    *text = NULL;
    *bytes = 0;
    int64_t size = 0;
    apt_result result = apti_open_regular(ctx, path, &handle, &size);
    if (result != APT_OK) return result;
    if (size > max_bytes)
        result = apti_fail(ctx, APT_E_RANGE, "'%.700s' has %lld bytes, at most %lld are allowed", path, (long long)size,
                           (long long)max_bytes);
    else result = apti_read_open(ctx, path, &handle, size, text);
    (void)apti_os_close(&handle);
    if (result == APT_OK) *bytes = size;
    return result;
}

/* A whole file, read-only. It must not shrink while mapped (no program can guard against that): APT_NO_MMAP reads it
   into memory instead. */
typedef struct apti_map {
    const uint8_t *data;                         /* never NULL after success */
    int64_t bytes;
    bool mapped;                                 /* else data is a block */
} apti_map;

static apt_result apti_map_file(apt_ctx *ctx, const char *path, apti_map *map)
{
    apti_handle handle;
    memset(map, 0, sizeof *map);
    int64_t size = 0;
    apt_result result = apti_open_regular(ctx, path, &handle, &size);
    if (result != APT_OK) return result;
#if defined(APTI_POSIX) && !defined(APT_NO_MMAP)
    if (size > 0) {                              /* an empty mapping is an error to the system */
        void *memory = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, handle.fd, 0);
        map->mapped = memory != MAP_FAILED;
        if (map->mapped) map->data = (const uint8_t *)memory;
    }
#endif
    if (!map->mapped) {                          /* also for file systems that cannot map */
        char *text = NULL;
        result = apti_read_open(ctx, path, &handle, size, &text);
        map->data = (const uint8_t *)text;
    }
    (void)apti_os_close(&handle);
    if (result == APT_OK) map->bytes = size;
    return result;
}

/* A zeroed or failed map is allowed. */
static void apti_unmap_file(apt_ctx *ctx, apti_map *map)
{
#if defined(APTI_POSIX) && !defined(APT_NO_MMAP)
    if (map->mapped) (void)munmap((void *)(uintptr_t)map->data, (size_t)map->bytes);
#endif
    if (!map->mapped) apti_free(ctx, (void *)(uintptr_t)map->data);
    memset(map, 0, sizeof *map);
}

/* Atomic writing: into a temporary file beside the target, synced, then renamed over it. Whatever fails, the old file
   stays and the temporary one goes. The first failure ends the writer; later calls just return its result.
   Devices and pipes (/dev/stdout) are written to directly. */
#define APTI_WRITE_BUFFER (64 * 1024)

typedef struct apti_writer {
    apt_ctx *ctx;
    char *path, *temp;                           /* temp NULL: written directly */
    uint8_t *buffer;
    int64_t used;                                /* bytes in buffer */
    int64_t bytes;                               /* given to apti_write so far */
    apti_handle handle;
    bool open, made;                             /* made: the temporary file is there */
    apt_result result;
} apti_writer;

/* Ends a writer without a result: nothing of it stays. Harmless after a commit or an abort. */
static void apti_write_abort(apti_writer *w)
{
    if (w->open) (void)apti_os_close(&w->handle);
    if (w->made && w->temp != NULL) (void)remove(w->temp);
    w->open = w->made = false;
    apti_free(w->ctx, w->path);
    apti_free(w->ctx, w->temp);
    apti_free(w->ctx, w->buffer);
    w->path = w->temp = NULL;
    w->buffer = NULL;
    if (w->result == APT_OK) w->result = APT_E_STATE;
}

static apt_result apti_write_fail(apti_writer *w, const char *verb)
{
    w->result = apti_fail_io(w->ctx, verb, w->path);
    apti_write_abort(w);
    return w->result;
}

/* Names are tried until one is free: another process, or a crashed one, may own the first. */
static bool apti_write_open(apti_writer *w, int64_t temp_bytes)
{
    if (w->temp == NULL) return apti_os_open_write(&w->handle, w->path, false);
    for (int i = 0; i < 1000; i++) {
        (void)snprintf(w->temp, (size_t)temp_bytes, "%s.tmp-%ld-%d", w->path, apti_os_process(), i);
        if (apti_os_open_write(&w->handle, w->temp, true)) return true;
        if (errno != EEXIST) return false;
    }
    return false;
}

static apt_result apti_write_begin(apt_ctx *ctx, const char *path, apti_writer *w)
{
    memset(w, 0, sizeof *w);
    w->ctx = ctx;
    const apti_path_kind kind = apti_path_query(path);
    if (kind == APTI_PATH_DIR) return w->result = apti_fail(ctx, APT_E_IO, "cannot write '%.700s': it is a folder", path);
    const int64_t temp_bytes = (int64_t)strlen(path) + 48;
    w->path = apti_copy_text(ctx, path);
    w->buffer = (uint8_t *)apti_alloc(ctx, APTI_WRITE_BUFFER, 1);
    if (kind != APTI_PATH_OTHER) w->temp = (char *)apti_alloc(ctx, temp_bytes, 1);
    if (w->path == NULL || w->buffer == NULL || (w->temp == NULL && kind != APTI_PATH_OTHER)) {
        w->result = apti_fail(ctx, APT_E_MEMORY, "no memory to write '%.700s'", path);
        apti_write_abort(w);
        return w->result;
    }
    errno = 0;
    w->open = w->made = apti_write_open(w, temp_bytes);
    return w->open ? APT_OK : apti_write_fail(w, "create");
}

static bool apti_write_flush(apti_writer *w)
{
    const bool ok = apti_os_write(&w->handle, w->buffer, w->used);
    w->used = 0;
    return ok;
}

static apt_result apti_write(apti_writer *w, const void *data, int64_t bytes)
{
    if (w->result != APT_OK || bytes <= 0) return w->result;
    errno = 0;
    if (bytes > APTI_WRITE_BUFFER - w->used && !apti_write_flush(w)) return apti_write_fail(w, "write");
    if (bytes >= APTI_WRITE_BUFFER) {
        if (!apti_os_write(&w->handle, data, bytes)) return apti_write_fail(w, "write");
    } else {
        memcpy(w->buffer + w->used, data, (size_t)bytes);
        w->used += bytes;
    }
    w->bytes += bytes;
    return APT_OK;
}

/* Makes the rename itself durable. The file is in place and whole by then, so a refusal is only worth a warning. */
static void apti_sync_parent(apt_ctx *ctx, char *path)
{
#ifdef APTI_POSIX
    char *slash = strrchr(path, '/');
    const char *dir = slash == NULL ? "." : slash == path ? "/" : path;
    if (slash != NULL && slash != path) *slash = 0;
    apti_handle handle;
    if (apti_os_open_read(&handle, dir)) {
        if (!apti_os_sync(&handle)) apti_log(ctx, APT_LOG_WARNING, "cannot sync the folder '%.700s': %s", dir, strerror(errno));
        (void)apti_os_close(&handle);
    }
#else
    (void)ctx;
    (void)path;
#endif
}

/* Everything is on the disk, under the temporary name: what can still fail is the rename. */
static apt_result apti_write_ready(apti_writer *w)
{
    if (w->result != APT_OK || !w->open) return w->result;
    errno = 0;
    if (!apti_write_flush(w)) return apti_write_fail(w, "write");
    if (!apti_os_sync(&w->handle)) return apti_write_fail(w, "sync");
    w->open = false;
    return apti_os_close(&w->handle) ? APT_OK : apti_write_fail(w, "close");
}

/* On APT_OK the file stands under its name with everything written; otherwise nothing changed. Ends the writer. */
static apt_result apti_write_commit(apti_writer *w)
{
    const apt_result result = apti_write_ready(w);
    if (result != APT_OK) return result;
    if (w->temp != NULL) {
        if (!apti_os_replace(w->temp, w->path)) return apti_write_fail(w, "replace");
        w->made = false;
        apti_sync_parent(w->ctx, w->path);
    }
    apti_write_abort(w);
    return APT_OK;
}
#endif /* APT_ONLY_CORE */

// >>numbers
/* ---------------------------------------------------------------------------------------------------------------------
   Half precision. Integer arithmetic only: -Ofast may flush subnormal floats to zero.
   ------------------------------------------------------------------------------------------------------------------ */

#ifndef APT_ONLY_CORE
/* Round to nearest, ties to even; NaN stays a (quiet) NaN with its upper payload. */
APTI_INLINE uint16_t apti_f32_to_bf16(float x)
{
    const uint32_t bits = apti_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

APTI_INLINE float apti_bf16_to_f32(uint16_t h)
{
    return apti_float((uint32_t)h << 16);
}

/* v / 2^shift, rounded to nearest, ties to even; 0 < shift < 32. */
APTI_INLINE uint32_t apti_round_shift(uint32_t v, uint32_t shift)
{
    const uint32_t half = 1u << (shift - 1);
    return (v + (half - 1) + (v >> shift & 1u)) >> shift;
}

APTI_INLINE uint16_t apti_f32_to_f16(float x)
{
    const uint32_t bits = apti_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);                 /* rounds to 65536 or more: infinity */
    if (magnitude >= 0x38800000u)                                                    /* normal: exponent bias 127 becomes 15 */
        return (uint16_t)(sign | apti_round_shift(magnitude - 0x38000000u, 13));
    if (magnitude < 0x33000000u) return (uint16_t)sign;                              /* below 2^-25: rounds to zero */
    /* Subnormal: the significand with its hidden bit, in units of 2^-24; a carry runs into the smallest normal. */
    const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    return (uint16_t)(sign | apti_round_shift(significand, 126u - (magnitude >> 23)));
}

APTI_INLINE float apti_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 0x1fu;
    uint32_t fraction = h & 0x3ffu;
    if (exponent == 0x1fu) return apti_float(sign | 0x7f800000u | fraction << 13 | (fraction != 0 ? 0x400000u : 0u));
    if (exponent != 0) return apti_float(sign | (exponent + 112u) << 23 | fraction << 13);
    if (fraction == 0) return apti_float(sign);
    uint32_t e = 113;                            /* a subnormal half is a normal float: move its first bit up */
    for (; (fraction & 0x400u) == 0; e--) fraction <<= 1;
    return apti_float(sign | e << 23 | (fraction & 0x3ffu) << 13);
}
#endif /* APT_ONLY_CORE */

/* ---------------------------------------------------------------------------------------------------------------------
   Random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
   Value number `counter` of stream `key` depends on these two only, so any part of a sequence can be made anywhere.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apti_rng { uint64_t key, counter; } apti_rng;

/* Uniform and normal values come from different domains, so that one stream may mix them. */
enum { APTI_DOMAIN_BITS = 0, APTI_DOMAIN_NORMAL = 1 };

#define APTI_2_POW_M53 (1.0 / 9007199254740992.0)

/* x: the counter in, 128 random bits out. */
static void apti_philox(uint64_t key, uint32_t x[4])
{
    uint32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)x0 * 0xD2511F53u, b = (uint64_t)x2 * 0xCD9E8D57u;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)b;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    x[0] = x0;
    x[1] = x1;
    x[2] = x2;
    x[3] = x3;
}

/* Two 64-bit values per block. */
static void apti_rng_block(uint64_t key, uint64_t block, uint32_t domain, uint64_t out[2])
{
    uint32_t x[4] = {(uint32_t)block, (uint32_t)(block >> 32), domain, 0};
    apti_philox(key, x);
    out[0] = (uint64_t)x[1] << 32 | x[0];
    out[1] = (uint64_t)x[3] << 32 | x[2];
}

APTI_INLINE uint64_t apti_mix64(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* The key of a numbered stream of a seed (SplitMix64). */
APTI_INLINE uint64_t apti_rng_seed(uint64_t seed, uint64_t stream)
{
    return apti_mix64(apti_mix64(seed + 0x9E3779B97F4A7C15u) ^ apti_mix64(stream + 0x3C6EF372FE94F82Au));
}

/* 64 random bits. Half a Philox block each: even counters take the first half. */
APTI_INLINE uint64_t apti_rng_next(apti_rng *rng)
{
    uint64_t r[2];
    apti_rng_block(rng->key, rng->counter >> 1, APTI_DOMAIN_BITS, r);
    return r[rng->counter++ & 1];
}

/* In [0, 1), a multiple of 2^-53. */
APTI_INLINE double apti_rng_uniform(apti_rng *rng)
{
    return (double)(apti_rng_next(rng) >> 11) * APTI_2_POW_M53;
}

/* In [0, n), unbiased (Lemire's multiply and reject); 0 for n = 0. */
APTI_INLINE uint32_t apti_rng_below(apti_rng *rng, uint32_t n)
{
    if (n == 0) return 0;
    const uint32_t rejected = (0u - n) % n;      /* 2^32 mod n products would come up once too often */
    for (;;) {
        const uint64_t product = (apti_rng_next(rng) >> 32) * n;
        if ((uint32_t)product >= rejected) return (uint32_t)(product >> 32);
    }
}

/* Two independent N(0,1) values by Box and Muller: sqrt(-2 ln u) (cos, sin)(2 pi v), u in (0, 1]. */
APTI_INLINE void apti_normal_pair(uint64_t key, uint64_t block, double pair[2])
{
    uint64_t r[2];
    apti_rng_block(key, block, APTI_DOMAIN_NORMAL, r);
    const double u = (double)((r[0] >> 11) + 1) * APTI_2_POW_M53;
    const double v = (double)(r[1] >> 11) * APTI_2_POW_M53;
    const double radius = sqrt(-2.0 * log(u)), angle = 6.283185307179586 * v;
    pair[0] = radius * cos(angle);
    pair[1] = radius * sin(angle);
}

/* N(0,1). Even counters take the cosine of block counter/2, odd ones the sine. */
APTI_INLINE float apti_rng_normal(apti_rng *rng)
{
    double pair[2];
    apti_normal_pair(rng->key, rng->counter >> 1, pair);
    return (float)pair[rng->counter++ & 1];
}

/* x[i] = std * normal, the same values as n calls of apti_rng_normal at half the work. */
APTI_UNUSED static void apti_rng_fill_normal(apti_rng *rng, float *x, int64_t n, float std)
{
    double pair[2] = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        if (i == 0 || (rng->counter & 1) == 0) apti_normal_pair(rng->key, rng->counter >> 1, pair);
        x[i] = std * (float)pair[rng->counter++ & 1];
    }
}

/* x[i] uniform in [lo, hi] (hi only through rounding to float). */
APTI_UNUSED static void apti_rng_fill_uniform(apti_rng *rng, float *x, int64_t n, float lo, float hi)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)(lo + ((double)hi - lo) * apti_rng_uniform(rng));
}

/* ---------------------------------------------------------------------------------------------------------------------
   Sums and checksums
   ------------------------------------------------------------------------------------------------------------------ */

/* Sum in double, four interleaved accumulators, always in the same order. */
APTI_UNUSED static double apti_sum(const float *x, int64_t n)
{
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const int64_t whole = n & ~(int64_t)3;
    int64_t i = 0;
    for (; i < whole; i += 4) {
        s0 += (double)x[i];
        s1 += (double)x[i + 1];
        s2 += (double)x[i + 2];
        s3 += (double)x[i + 3];
    }
    for (; i < n; i++) s0 += (double)x[i];
    return (s0 + s1) + (s2 + s3);
}

APTI_INLINE uint64_t apti_crc64_step(uint64_t crc, uint32_t bits)
{
    for (uint32_t i = 0; i < bits; i++) crc = crc >> 1 ^ (0xC96C5795D7870F42u & (0u - (crc & 1u)));
    return crc;
}

/* CRC-64/XZ (ECMA-182 polynomial, reflected). Start with state 0 and feed the result back in to go on: the CRC of the
   pieces is the CRC of the whole. Long inputs take eight bytes at a time by tables that are made on the stack in less
   time than a kilobyte takes without them. */
static uint64_t apti_checksum(uint64_t state, const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    uint64_t crc = ~state;
    if (n >= 2048) {
        uint64_t table[8][256];                  /* table[k][b]: byte b followed by k zero bytes */
        for (uint32_t b = 0; b < 256; b++) {
            table[0][b] = apti_crc64_step(b, 8);
            for (int k = 1; k < 8; k++) table[k][b] = table[k - 1][b];
        }
        for (int k = 1; k < 8; k++)
            for (uint32_t b = 0; b < 256; b++) table[k][b] = table[k - 1][b] >> 8 ^ table[0][table[k - 1][b] & 0xff];
        for (; n >= 8; n -= 8, p += 8) {
            uint64_t next = 0;
            for (int i = 0; i < 8; i++) next ^= table[7 - i][(crc >> (8 * i) ^ p[i]) & 0xff];
            crc = next;
        }
    }
    for (; n > 0; n--) crc = apti_crc64_step(crc ^ *p++, 8);
    return ~crc;
}

#ifndef APT_ONLY_CORE
// >>kernels
/* ---------------------------------------------------------------------------------------------------------------------
   Kernels: matrix products and vector functions

   apti_kernels is a table of functions; there is one table per instruction set (ref, avx2, avx512, neon) and the context
   picks one when it is made. Everything above this section is the same for all of them, and so is the driver at its
   end, which cuts a product into tiles, hands them to the threads and calls the table for one tile at a time.

   The one rule of the products: an element of C is one chain of fused multiply-adds,

       c = bias, 0 or the old c;   for p = 0 .. k-1:   c = fma(a[i][p], b[p][j], c)       first part 0, then part 1

   Tiles, strips, panels and k blocks only decide when a link of that chain is computed (between two k blocks c rests
   in memory, which loses no bit), never the order of the links. So the value does not depend on the number of threads,
   on the tile, or on how many other rows there are; and avx2, avx512 and neon agree bit for bit. (ref keeps the links of one
   k block in double.)
   ------------------------------------------------------------------------------------------------------------------ */

/* A matrix W(n, k) (n out features, k in features, as checkpoints store it) held for y = x W^T in panels:
   data[panel][k][nr], a panel being nr out features. The last panel is filled up with zeros. */
typedef struct apti_packed {
    int64_t n, k;
    int32_t nr;
    apt_dtype type;                              /* APT_F32 or APT_BF16 */
    void *data;                                  /* from apti_alloc; NULL: no matrix */
} apti_packed;

typedef enum apti_b_kind {
    APTI_B_PACKED = 0,                           /* B = W^T of a packed W: columns = packed->n, reduction over packed->k */
    APTI_B_PACKED_T,                             /* B = W: columns = packed->k, reduction over packed->n (dx = dy W) */
    APTI_B_PLAIN,                                /* b[p * ldb + j] */
    APTI_B_PLAIN_T                               /* b[j * ldb + p] */
} apti_b_kind;

/* One reduction segment: += A(m,k) B(k,n). k may be 0. */
typedef struct apti_gemm_part {
    int64_t k;
    const float *a;                              /* element (i,p) at a[i*a_row + p*a_col]; one of the strides is 1 */
    int64_t a_row, a_col;
    apti_b_kind kind;
    const apti_packed *packed;                   /* APTI_B_PACKED* */
    const float *b;                              /* APTI_B_PLAIN* */
    int64_t ldb;
} apti_gemm_part;

/* z = [c +] part[0] + part[1] + bias;  pre = z;  c = (act(z) + residual) * mask */
typedef struct apti_gemm {
    int64_t m, n;
    apti_gemm_part part[2];
    float *c;
    int64_t ldc;
    bool accumulate;                             /* start from c instead of 0 */
    const float *bias;                           /* [n] or NULL */
    float *pre;                                  /* or NULL */
    int64_t ld_pre;
    int32_t act;                                 /* -1 none, else apt_activation */
    const float *residual;                       /* or NULL; may be c itself when ld_residual == ldc */
    int64_t ld_residual;
    const float *mask;                           /* [n] or NULL */
    bool flip;                                   /* the driver's own: C is stored transposed */
} apti_gemm;

/* What a tile kernel reads for one stretch of the reduction: row i of A at a + i*a_row, and a panel of B whose row p is
   at b + p*b_step. The thin kernel takes two panels, b and b + b_panel, and also bf16 ones. */
typedef struct apti_segment {
    int64_t k;
    const float *a;
    int64_t a_row, a_col;
    const void *b;
    int64_t b_step, b_panel;
    bool bf16;
} apti_segment;

typedef struct apti_tile {
    apti_segment segment[2];                     /* the second is there so that a low-rank adapter costs no trip to memory */
    int32_t rows, cols;                          /* 1..mr, 1..nr; whole vectors are written, so to[] needs room for them */
    const float *from;                           /* start values, or NULL: zeros */
    int64_t ld_from;
    float *to;
    int64_t ld_to;
    const float *next;                           /* where the next tile will start: fetched while this one computes */
} apti_tile;

/* The epilogue of one tile; fields as in apti_gemm, already moved to the tile's corner. z may be c. */
typedef struct apti_finish {
    int64_t rows, cols;
    const float *z;
    int64_t ldz;
    float *c;
    int64_t ldc;
    const float *bias, *residual, *mask;
    int64_t ld_residual;
    float *pre;
    int64_t ld_pre;
    int32_t act;
} apti_finish;

/* What the kernel of a compressed matrix reads: for each output its bits of one stretch of inputs and its values. x(64*words,
   width) holds these inputs sideways, width = vectors * lanes rows of the batch; sums(outputs, width) go on.
   sums[o][.] += value * x[k][.] for every set bit k, lowest first: links of the chain that the rule above describes. */
typedef struct apti_sparse_tile {
    int32_t vectors;                             /* 1, 2, 4 or APTI_SPARSE_VECTORS */
    int64_t outputs, words, row;                 /* words: of the stretch; row: between outputs */
    const uint64_t *bits;
    const float *values, *x;
    int64_t *at;                                 /* [outputs] each output's next value; moves on */
    float *sums;
} apti_sparse_tile;
#define APTI_SPARSE_VECTORS 8                    /* as many independent sums as two FMA pipes can have under way */

/* Vectors of n floats, any alignment, n >= 0; y may be x or a. A NaN that goes in comes out, also under -Ofast. */
typedef struct apti_kernels {
    const char *name;
    int32_t mr, nr;                              /* largest tile; nr is also the width of a panel */
    int32_t slim;                                /* rows of the tallest tile that is one vector wide */
    int32_t lanes;                               /* floats in a vector; nr is a multiple */
    const struct apti_kernels *narrow;           /* or NULL: shorter vectors, for products of few columns */
    void (*tile)(const apti_tile *tile);
    void (*thin)(const apti_tile *tile);         /* 1..3 rows, two panels: to[] is rows x 2 nr. For one token at a time */
    void (*finish)(const apti_finish *f);
    void (*sparse)(const apti_sparse_tile *t);
    void (*transpose)(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols);   /* y[c][r] = x[r][c] */
    /* y[r][0..cols) = x[r][0..cols). Writes whole vectors, the rest of them zeros, rows in order: later rows may overlap. */
    void (*copy)(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols);
    void (*expand)(float *y, const uint16_t *x, int64_t n);                                  /* bf16 to float */
    void (*exp_scaled)(float *x, int64_t n, float scale, float shift);                       /* x = exp(scale*x - shift) */
    float (*max)(const float *x, int64_t n);                                                 /* n = 0: -FLT_MAX */
    float (*sum)(const float *x, int64_t n);
    float (*dot)(const float *a, const float *b, int64_t n);
    float (*sq_dev)(const float *x, float mean, int64_t n);                                  /* sum (x - mean)^2 */
    void (*scale)(float *y, const float *x, float s, int64_t n);
    void (*add)(float *y, const float *a, const float *b, int64_t n);
    void (*mul)(float *y, const float *a, const float *b, int64_t n);
    void (*axpy)(float *y, float s, const float *x, int64_t n);                              /* y += s x */
    void (*abs_add)(float *acc, const float *x, int64_t n);                                  /* acc += |x| */
    void (*act)(float *y, const float *x, int64_t n, int32_t act);                           /* act: apt_activation */
    void (*act_grad)(float *dx, const float *dy, const float *x, int64_t n, int32_t act);    /* dx = dy act'(x) */
    void (*tanh)(float *y, const float *x, int64_t n);
    /* y = (x - mean) rstd gamma + beta */
    void (*norm)(float *y, const float *x, const float *gamma, const float *beta, float mean, float rstd, int64_t n);
    /* g' = grad_scale g;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2;
       w -= step_size m / (sqrt(v) + eps) + decay w. The caller folds the bias corrections into step_size and eps. */
    void (*adam)(float *w, float *m, float *v, const float *g, int64_t n, float grad_scale, float beta1, float beta2,
                 float step_size, float eps, float decay);
} apti_kernels;

#define APTI_MR_MAX 14                           /* over all tables */
#define APTI_NR_MAX 32
#define APTI_THIN_ROWS 3
/* rows of a plain B, columns of a transposed A copied before going sideways: few pages at a time */
#define APTI_GEMM_PACK 32

/* Row stride for activations: an odd multiple of 16 floats (one cache line), so that the rows of a strip do not fall
   into the same few sets of the first-level cache, as they would with a stride of 1024 floats. */
APTI_INLINE int64_t apti_ld(int64_t n)
{
    return (apti_ceil_div(n, 16) | 1) * 16;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Reference kernels: what each function computes, in plain C. Also the fallback where there is no SIMD.
   ------------------------------------------------------------------------------------------------------------------ */

#define APTI_SQRT_HALF 0.70710678118654752f
#define APTI_INV_SQRT_2PI 0.39894228040143268f
#define APTI_GELU_A 0.79788456080286536f         /* sqrt(2/pi), and the cubic term of tanh GELU times that */
#define APTI_GELU_B 0.03567740813636141f
/* exp(2 u) = 1e33 there: no infinity that a fast-math division would turn into NaN */
#define APTI_GELU_TANH_LIMIT 9.5f
#define APTI_SILU_LIMIT 76.0f                   /* the same bound on exp(x) */
#define APTI_FLT_MAX 3.402823466e+38f
#define APTI_NAN_BITS 0x7fc00000u

APTI_INLINE bool apti_is_nan(float x)
{
    return (apti_bits(x) & 0x7fffffffu) > 0x7f800000u;
}

/* Sums in double, rounded once per k block: this table is the judge of the others, and where there is no fused multiply-add, sums
   in float lose three times as much as theirs. (Measured: twice the time of float sums.) */
static void apti_tile_ref(const apti_tile *t)
{
    double c[4][8];
    for (int32_t i = 0; i < t->rows; i++)
        for (int32_t j = 0; j < 8; j++) c[i][j] = t->from != NULL ? (double)t->from[i * t->ld_from + j] : 0.0;
    for (int32_t s = 0; s < 2; s++) {
        const apti_segment *g = &t->segment[s];
        for (int64_t p = 0; p < g->k; p++) {
            const float *b = (const float *)g->b + p * g->b_step;
            for (int32_t i = 0; i < t->rows; i++)
                for (int32_t j = 0; j < 8; j++) c[i][j] += (double)g->a[i * g->a_row + p * g->a_col] * (double)b[j];
        }
    }
    for (int32_t i = 0; i < t->rows; i++)
        for (int32_t j = 0; j < 8; j++) t->to[i * t->ld_to + j] = (float)c[i][j];
}

static void apti_thin_ref(const apti_tile *t)
{
    double c[16];
    float row[16];
    for (int32_t i = 0; i < t->rows; i++) {
        for (int32_t j = 0; j < 16; j++) c[j] = t->from != NULL ? (double)t->from[i * t->ld_from + j] : 0.0;
        for (int32_t s = 0; s < 2; s++) {
            const apti_segment *g = &t->segment[s];
            for (int64_t p = 0; p < g->k; p++) {
                for (int32_t j = 0; j < 16; j++) {
                    const int64_t at = p * g->b_step + j / 8 * g->b_panel + j % 8;
                    row[j] = g->bf16 ? apti_bf16_to_f32(((const uint16_t *)g->b)[at]) : ((const float *)g->b)[at];
                }
                for (int32_t j = 0; j < 16; j++) c[j] += (double)g->a[i * g->a_row + p * g->a_col] * (double)row[j];
            }
        }
        for (int32_t j = 0; j < 16; j++) t->to[i * t->ld_to + j] = (float)c[j];
    }
}

/* GELU(x) = x P(x) with the normal distribution P. Written as max(x, 0) - |x| P(-|x|): no cancellation, right at infinity.
   (Not inlined, so that -Ofast cannot vectorise it: the same x must give the same bits wherever it stands.) */
APTI_NOINLINE static float apti_act_one(float x, int32_t act)
{
    if (apti_is_nan(x)) return x;
    const float limit = act == APT_GELU_TANH ? APTI_GELU_TANH_LIMIT : act == APT_SILU ? APTI_SILU_LIMIT : 14.0f;
    const float t = fabsf(x) < limit ? fabsf(x) : limit;
    if (act == APT_GELU_ERF) return (x > 0.0f ? x : 0.0f) - t * 0.5f * erfcf(t * APTI_SQRT_HALF);
    if (act == APT_GELU_TANH) return (x > 0.0f ? x : 0.0f) - t / (1.0f + expf(2.0f * t * (APTI_GELU_A + APTI_GELU_B * t * t)));
    if (act == APT_SILU) return (x > 0.0f ? x : 0.0f) - t / (1.0f + expf(t));
    if (act == APT_RELU) return x > 0.0f ? x : 0.0f;
    return x;
}

/* erf GELU: P(x) + x P'(x). tanh GELU = x s(2u), u = A x + B x^3: s + x s (1 - s) 2 u'; SiLU the same with 2u = x. All are
   1 - f(-x) for x > 0. */
APTI_NOINLINE static float apti_act_slope(float x, int32_t act)
{
    if (apti_is_nan(x)) return x;
    const float limit = act == APT_SILU ? APTI_SILU_LIMIT : 9.0f, t = fabsf(x) < limit ? fabsf(x) : limit;
    float f = 0.0f;
    if (act == APT_GELU_ERF) {
        f = 0.5f * erfcf(t * APTI_SQRT_HALF) - t * APTI_INV_SQRT_2PI * expf(-0.5f * t * t);
    } else if (act == APT_GELU_TANH) {
        const float e = expf(2.0f * t * (APTI_GELU_A + APTI_GELU_B * t * t)), s = 1.0f / (1.0f + e);
        f = s - 2.0f * t * (s * e * s) * (APTI_GELU_A + 3.0f * APTI_GELU_B * t * t);
    } else if (act == APT_SILU) {
        const float e = expf(t), s = 1.0f / (1.0f + e);
        f = s - t * (s * e * s);
    } else if (act != APT_RELU) {
        return 1.0f;
    }
    return x > 0.0f ? 1.0f - f : f;
}

static void apti_finish_ref(const apti_finish *f)
{
    for (int64_t i = 0; i < f->rows; i++) {
        for (int64_t j = 0; j < f->cols; j++) {
            float z = f->z[i * f->ldz + j];
            if (f->bias != NULL) z += f->bias[j];
            if (f->pre != NULL) f->pre[i * f->ld_pre + j] = z;
            z = apti_act_one(z, f->act);
            if (f->residual != NULL) z += f->residual[i * f->ld_residual + j];
            if (f->mask != NULL) z *= f->mask[j];
            f->c[i * f->ldc + j] = z;
        }
    }
}

static void apti_sparse_ref(const apti_sparse_tile *t)
{
    const int64_t width = t->vectors;            /* one lane */
    for (int64_t o = 0; o < t->outputs; o++) {
        float *sum = t->sums + o * width;
        for (int64_t w = 0; w < t->words; w++) {
            for (uint64_t bits = t->bits[o * t->row + w]; bits != 0; bits &= bits - 1) {
                const float *x = t->x + (64 * w + apti_lowest_bit(bits)) * width, value = t->values[t->at[o]++];
                for (int64_t i = 0; i < width; i++) sum[i] += value * x[i];
            }
        }
    }
}

static void apti_transpose_ref(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) y[c * ldy + r] = x[r * ldx + c];
}

static void apti_copy_ref(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) y[r * ldy + c] = x[r * ldx + c];
}

static void apti_expand_ref(float *y, const uint16_t *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = apti_bf16_to_f32(x[i]);
}

APTI_NOINLINE static float apti_exp_one(float x)
{
    return apti_is_nan(x) ? x : expf(x);
}

APTI_NOINLINE static float apti_tanh_one(float x)
{
    return apti_is_nan(x) ? x : tanhf(x);
}

static void apti_exp_scaled_ref(float *x, int64_t n, float scale, float shift)
{
    for (int64_t i = 0; i < n; i++) x[i] = apti_exp_one(scale * x[i] - shift);
}

static float apti_max_ref(const float *x, int64_t n)
{
    float m = n > 0 ? x[0] : -APTI_FLT_MAX;
    for (int64_t i = 0; i < n; i++) {
        if (apti_is_nan(x[i])) return x[i];
        m = x[i] > m ? x[i] : m;
    }
    return m;
}

static float apti_sum_ref(const float *x, int64_t n)
{
    float s = 0.0f;
    for (int64_t i = 0; i < n; i++) s += x[i];
    return s;
}

static float apti_dot_ref(const float *a, const float *b, int64_t n)
{
    float s = 0.0f;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

static float apti_sq_dev_ref(const float *x, float mean, int64_t n)
{
    float s = 0.0f;
    for (int64_t i = 0; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
    return s;
}

static void apti_scale_ref(float *y, const float *x, float s, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = s * x[i];
}

static void apti_add_ref(float *y, const float *a, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

static void apti_mul_ref(float *y, const float *a, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = a[i] * b[i];
}

static void apti_axpy_ref(float *y, float s, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += s * x[i];
}

static void apti_abs_add_ref(float *acc, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) acc[i] += fabsf(x[i]);
}

static void apti_act_ref(float *y, const float *x, int64_t n, int32_t act)
{
    for (int64_t i = 0; i < n; i++) y[i] = apti_act_one(x[i], act);
}

static void apti_act_grad_ref(float *dx, const float *dy, const float *x, int64_t n, int32_t act)
{
    for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * apti_act_slope(x[i], act);
}

static void apti_tanh_ref(float *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = apti_tanh_one(x[i]);
}

static void apti_norm_ref(float *y, const float *x, const float *gamma, const float *beta, float mean, float rstd, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * rstd * gamma[i] + beta[i];
}

static void apti_adam_ref(float *w, float *m, float *v, const float *g, int64_t n, float grad_scale, float beta1, float beta2,
                          float step_size, float eps, float decay)
{
    for (int64_t i = 0; i < n; i++) {
        const float gs = grad_scale * g[i];
        m[i] = beta1 * m[i] + (1.0f - beta1) * gs;
        v[i] = beta2 * v[i] + (1.0f - beta2) * gs * gs;
        w[i] -= step_size * m[i] / (sqrtf(v[i]) + eps) + decay * w[i];
    }
}

/* Every table names its functions apti_NAME_isa. */
#define APTI_TABLE(isa, mr, nr, slim, lanes, narrow) {                                                                  \
    #isa, mr, nr, slim, lanes, narrow, apti_tile_##isa, apti_thin_##isa, apti_finish_##isa, apti_sparse_##isa,          \
    apti_transpose_##isa, apti_copy_##isa, apti_expand_##isa, apti_exp_scaled_##isa, apti_max_##isa, apti_sum_##isa,    \
    apti_dot_##isa, apti_sq_dev_##isa, apti_scale_##isa, apti_add_##isa, apti_mul_##isa, apti_axpy_##isa,               \
    apti_abs_add_##isa, apti_act_##isa, apti_act_grad_##isa, apti_tanh_##isa, apti_norm_##isa, apti_adam_##isa }

static const apti_kernels apti_kernels_ref = APTI_TABLE(ref, 4, 8, 4, 1, NULL);

/* ---------------------------------------------------------------------------------------------------------------------
   SIMD kernels

   All instruction sets share one text, the template below. It is written with the macros apti_v* (one vector operation
   each), and this header includes itself once per instruction set with other definitions of them. During such an
   inclusion APTI_ISA is defined and everything but the template is skipped. If the header is not named apt.h, define
   APT_HEADER as its name in quotes.
   ------------------------------------------------------------------------------------------------------------------ */

#if defined(APTI_X86) || defined(APTI_NEON)
#ifdef __cplusplus
}
#endif
#ifdef APTI_X86
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif
#ifdef __cplusplus
extern "C" {
#endif
#ifndef APT_HEADER
#define APT_HEADER "apt.h"
#endif

#define APTI_PASTE2(a, b) a##_##b
#define APTI_PASTE(a, b) APTI_PASTE2(a, b)
#define APTI_FN(name) APTI_PASTE(apti_##name, APTI_ISA)     /* apti_name_isa */
#endif

#ifdef APTI_X86
#define APTI_AVX2 __attribute__((target("avx2,fma")))
#define APTI_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

/* y[c][r] = x[r][c] for 8 x 8. The first step of the exchange is done by loading half rows to where they belong. */
APTI_AVX2 APTI_INLINE void apti_transpose_8x8(float *y, int64_t ldy, const float *x, int64_t ldx)
{
#define APTI_HALVES(r, c) _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + (r) * ldx + (c))), \
                                               _mm_loadu_ps(x + ((r) + 4) * ldx + (c)), 1)
    for (int64_t c = 0; c < 8; c += 4) {
        const __m256 r0 = APTI_HALVES(0, c), r1 = APTI_HALVES(1, c), r2 = APTI_HALVES(2, c), r3 = APTI_HALVES(3, c);
        const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
        const __m256 d = _mm256_unpacklo_ps(r2, r3), e = _mm256_unpackhi_ps(r2, r3);
        _mm256_storeu_ps(y + (c + 0) * ldy, _mm256_shuffle_ps(a, d, 0x44));
        _mm256_storeu_ps(y + (c + 1) * ldy, _mm256_shuffle_ps(a, d, 0xee));
        _mm256_storeu_ps(y + (c + 2) * ldy, _mm256_shuffle_ps(b, e, 0x44));
        _mm256_storeu_ps(y + (c + 3) * ldy, _mm256_shuffle_ps(b, e, 0xee));
    }
#undef APTI_HALVES
}

/* Lanes 0..k-1 of a 32-bit mask are all ones. */
APTI_AVX2 APTI_INLINE __m256i apti_first_8(int64_t k)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* AVX2 + FMA: 6 x 16 keeps 12 of the 16 registers busy with sums: enough to hide the latency of two FMA pipes. */
#define APTI_ISA avx2
#define APTI_ISA_TARGET APTI_AVX2
#define APTI_LANES 8
#define APTI_MR 6
#define APTI_NV 2
#define APTI_SLIM 12
#define APTI_NARROW NULL
#define apti_v __m256
#define apti_vi __m256i
#define apti_vload(p) _mm256_loadu_ps(p)
#define apti_vstore(p, v) _mm256_storeu_ps(p, v)
#define apti_vload_part(p, k) _mm256_maskload_ps(p, apti_first_8(k))
#define apti_vstore_part(p, v, k) _mm256_maskstore_ps(p, apti_first_8(k), v)
#define apti_vkeep(v, k) _mm256_and_ps(v, _mm256_castsi256_ps(apti_first_8(k)))
#define apti_vload_bf16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define apti_vset(x) _mm256_set1_ps(x)
#define apti_vadd(a, b) _mm256_add_ps(a, b)
#define apti_vsub(a, b) _mm256_sub_ps(a, b)
#define apti_vmul(a, b) _mm256_mul_ps(a, b)
#define apti_vdiv(a, b) _mm256_div_ps(a, b)
#define apti_vsqrt(a) _mm256_sqrt_ps(a)
#define apti_vfma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define apti_vfnma(a, b, c) _mm256_fnmadd_ps(a, b, c)
#define apti_vmin(a, b) _mm256_min_ps(a, b)
#define apti_vmax(a, b) _mm256_max_ps(a, b)
#define apti_vbits(v) _mm256_castps_si256(v)
#define apti_vfloat(i) _mm256_castsi256_ps(i)
#define apti_vround(v) _mm256_cvtps_epi32(v)
#define apti_vconvert(i) _mm256_cvtepi32_ps(i)
#define apti_viset(x) _mm256_set1_epi32(x)
#define apti_viadd(a, b) _mm256_add_epi32(a, b)
#define apti_viand(a, b) _mm256_and_si256(a, b)
#define apti_vior(a, b) _mm256_or_si256(a, b)
#define apti_vm __m256i
#define apti_vgt(a, b) _mm256_cmpgt_epi32(a, b)
#define apti_vpick(m, a, b) _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m))
#define apti_vany(m) (_mm256_movemask_epi8(m) != 0)
#define apti_vimin(a, b) _mm256_min_epi32(a, b)
#define apti_vishl23(a) _mm256_slli_epi32(a, 23)
#define apti_vtranspose(y, ldy, x, ldx) apti_transpose_8x8(y, ldy, x, ldx)
#define APTI_BLOCK 8
#include APT_HEADER

/* AVX-512: 14 x 32 keeps 28 of 32 registers busy. One instruction loads and broadcasts, so A costs no register. */
#define APTI_ISA avx512
#define APTI_ISA_TARGET APTI_AVX512
#define APTI_LANES 16
#define APTI_MR 14
#define APTI_NV 2
#define APTI_SLIM 14
#define APTI_NARROW &apti_kernels_avx2
#define apti_v __m512
#define apti_vi __m512i
#define apti_vfirst(k) ((__mmask16)((1u << (k)) - 1u))
#define apti_vload(p) _mm512_loadu_ps(p)
#define apti_vstore(p, v) _mm512_storeu_ps(p, v)
#define apti_vload_part(p, k) _mm512_maskz_loadu_ps(apti_vfirst(k), p)
#define apti_vstore_part(p, v, k) _mm512_mask_storeu_ps(p, apti_vfirst(k), v)
#define apti_vkeep(v, k) _mm512_maskz_mov_ps(apti_vfirst(k), v)
#define apti_vload_bf16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define apti_vset(x) _mm512_set1_ps(x)
#define apti_vadd(a, b) _mm512_add_ps(a, b)
#define apti_vsub(a, b) _mm512_sub_ps(a, b)
#define apti_vmul(a, b) _mm512_mul_ps(a, b)
#define apti_vdiv(a, b) _mm512_div_ps(a, b)
#define apti_vsqrt(a) _mm512_sqrt_ps(a)
#define apti_vfma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define apti_vfnma(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define apti_vmin(a, b) _mm512_min_ps(a, b)
#define apti_vmax(a, b) _mm512_max_ps(a, b)
#define apti_vbits(v) _mm512_castps_si512(v)
#define apti_vfloat(i) _mm512_castsi512_ps(i)
#define apti_vround(v) _mm512_cvtps_epi32(v)
#define apti_vconvert(i) _mm512_cvtepi32_ps(i)
#define apti_viset(x) _mm512_set1_epi32(x)
#define apti_viadd(a, b) _mm512_add_epi32(a, b)
#define apti_viand(a, b) _mm512_and_si512(a, b)
#define apti_vior(a, b) _mm512_or_si512(a, b)
#define apti_vm __mmask16
#define apti_vgt(a, b) _mm512_cmpgt_epi32_mask(a, b)
#define apti_vpick(m, a, b) _mm512_mask_blend_ps(m, b, a)
#define apti_vany(m) ((m) != 0)
#define apti_vimin(a, b) _mm512_min_epi32(a, b)
#define apti_vishl23(a) _mm512_slli_epi32(a, 23)
#define apti_vtranspose(y, ldy, x, ldx) apti_transpose_8x8(y, ldy, x, ldx)
#define APTI_BLOCK 8
#if !defined(__clang__)
#pragma GCC diagnostic push                      /* gcc 12 takes the unused operand inside its own intrinsics for a mistake */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include APT_HEADER
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* APTI_X86 */

#ifdef APTI_NEON
APTI_INLINE float32x4_t apti_load_first(const float *p, int64_t k)
{
    float t[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t i = 0; i < k; i++) t[i] = p[i];
    return vld1q_f32(t);
}

APTI_INLINE void apti_store_first(float *p, float32x4_t v, int64_t k)
{
    float t[4];
    vst1q_f32(t, v);
    for (int64_t i = 0; i < k; i++) p[i] = t[i];
}

APTI_INLINE float32x4_t apti_keep_first(float32x4_t v, int64_t k)
{
    float t[4];
    vst1q_f32(t, v);
    return apti_load_first(t, k);
}

APTI_INLINE void apti_transpose_4x4(float *y, int64_t ldy, const float *x, int64_t ldx)
{
    const float32x4_t r0 = vld1q_f32(x), r1 = vld1q_f32(x + ldx), r2 = vld1q_f32(x + 2 * ldx), r3 = vld1q_f32(x + 3 * ldx);
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), b = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), d = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
    vst1q_f32(y, vreinterpretq_f32_f64(vtrn1q_f64(a, c)));
    vst1q_f32(y + ldy, vreinterpretq_f32_f64(vtrn1q_f64(b, d)));
    vst1q_f32(y + 2 * ldy, vreinterpretq_f32_f64(vtrn2q_f64(a, c)));
    vst1q_f32(y + 3 * ldy, vreinterpretq_f32_f64(vtrn2q_f64(b, d)));
}

/* NEON: 8 x 12 keeps 24 of 32 registers busy. A is read as scalars, which the FMA takes as a lane of a register. */
#define APTI_ISA neon
#define APTI_ISA_TARGET
#define APTI_LANES 4
#define APTI_MR 8
#define APTI_NV 3
#define APTI_SLIM 12
#define APTI_NARROW NULL
#define apti_v float32x4_t
#define apti_vi int32x4_t
#define apti_vload(p) vld1q_f32(p)
#define apti_vstore(p, v) vst1q_f32(p, v)
#define apti_vload_part(p, k) apti_load_first(p, k)
#define apti_vstore_part(p, v, k) apti_store_first(p, v, k)
#define apti_vkeep(v, k) apti_keep_first(v, k)
#define apti_vload_bf16(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define apti_vset(x) vdupq_n_f32(x)
#define apti_vadd(a, b) vaddq_f32(a, b)
#define apti_vsub(a, b) vsubq_f32(a, b)
#define apti_vmul(a, b) vmulq_f32(a, b)
#define apti_vdiv(a, b) vdivq_f32(a, b)
#define apti_vsqrt(a) vsqrtq_f32(a)
#define apti_vfma(a, b, c) vfmaq_f32(c, a, b)
#define apti_vfnma(a, b, c) vfmsq_f32(c, a, b)
#define apti_vmin(a, b) vminq_f32(a, b)
#define apti_vmax(a, b) vmaxq_f32(a, b)
#define apti_vbits(v) vreinterpretq_s32_f32(v)
#define apti_vfloat(i) vreinterpretq_f32_s32(i)
#define apti_vround(v) vcvtnq_s32_f32(v)
#define apti_vconvert(i) vcvtq_f32_s32(i)
#define apti_viset(x) vdupq_n_s32(x)
#define apti_viadd(a, b) vaddq_s32(a, b)
#define apti_viand(a, b) vandq_s32(a, b)
#define apti_vior(a, b) vorrq_s32(a, b)
#define apti_vm uint32x4_t
#define apti_vgt(a, b) vcgtq_s32(a, b)
#define apti_vpick(m, a, b) vbslq_f32(m, a, b)
#define apti_vany(m) (vmaxvq_u32(m) != 0)
#define apti_vimin(a, b) vminq_s32(a, b)
#define apti_vishl23(a) vshlq_n_s32(a, 23)
#define apti_vtranspose(y, ldy, x, ldx) apti_transpose_4x4(y, ldy, x, ldx)
#define APTI_BLOCK 4
#include APT_HEADER
#endif /* APTI_NEON */

/* The implementation is interrupted here for the template, which must be visible when the header includes itself. */
#endif /* APT_ONLY_CORE */
#define APTI_INTERRUPTED
#endif /* APT_IMPLEMENTATION */

#ifdef APTI_ISA
/* Comparisons are made on the bits as integers, so that -Ofast cannot assume NaN away: floats of one sign are ordered
   like their bits, and a NaN has more of them than infinity. */
APTI_ISA_TARGET APTI_INLINE apti_vi APTI_FN(vabs_bits)(apti_v x)
{
    return apti_viand(apti_vbits(x), apti_viset(0x7fffffff));
}

APTI_ISA_TARGET APTI_INLINE apti_vm APTI_FN(vis_nan)(apti_v x)
{
    return apti_vgt(APTI_FN(vabs_bits)(x), apti_viset(0x7f800000));
}

/* min(|x|, limit), and limit for NaN */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vabs_limit)(apti_v x, float limit)
{
    return apti_vfloat(apti_vimin(APTI_FN(vabs_bits)(x), apti_vbits(apti_vset(limit))));
}

/* max(x, 0), and NaN for NaN: as integers, -infinity .. -0 are the values below 0xff800001 */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vrelu)(apti_v x)
{
    return apti_vpick(apti_vgt(apti_viset(-0x7fffff), apti_vbits(x)), apti_vset(0.0f), x);
}

/* exp(r) - 1 with x = n ln 2 + r, |r| <= ln 2 / 2: a minimax polynomial, relative error of exp(r) 3.1e-9. |n| is small. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vexpm1_reduced)(apti_v x, apti_vi *n)
{
    *n = apti_vround(apti_vmul(x, apti_vset(1.44269504f)));
    const apti_v fn = apti_vconvert(*n);
    const apti_v r = apti_vfnma(fn, apti_vset(-2.12194440e-4f), apti_vfnma(fn, apti_vset(0.693359375f), x));
    apti_v q = apti_vfma(r, apti_vset(0.00138143089f), apti_vset(0.00836885627f));
    q = apti_vfma(r, q, apti_vset(0.0416684002f));
    q = apti_vfma(r, q, apti_vset(0.166665196f));
    q = apti_vfma(r, q, apti_vset(0.49999994f));
    return apti_vfma(apti_vmul(r, r), q, r);
}

/* exp(x), relative error below 9e-8 (measured over all exponents). Below -87.3 it is 0, not a denormal; above 88.72
   infinite. 2^n is applied as 2 * 2^(n-1), because 2^128 is not a float. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vexp)(apti_v x)
{
    apti_vi n;
    const apti_v p = APTI_FN(vexpm1_reduced)(apti_vmin(apti_vmax(x, apti_vset(-87.33654f)), apti_vset(89.0f)), &n);
    const apti_v two = apti_vadd(apti_vset(2.0f), apti_vadd(p, p));
    const apti_v power = apti_vfloat(apti_vishl23(apti_viadd(n, apti_viset(126))));
    return apti_vpick(APTI_FN(vis_nan)(x), x, apti_vmul(two, power));
}

/* tanh(x) = e / (e + 2), e = exp(2|x|) - 1 without cancellation. Relative error below 1.8e-7. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vtanh)(apti_v x)
{
    const apti_v t = APTI_FN(vabs_limit)(x, 10.0f);
    apti_vi n;
    const apti_v p = APTI_FN(vexpm1_reduced)(apti_vadd(t, t), &n);
    const apti_v power = apti_vfloat(apti_vishl23(apti_viadd(n, apti_viset(127))));
    const apti_v e = apti_vfma(p, power, apti_vsub(power, apti_vset(1.0f)));
    const apti_v y = apti_vdiv(e, apti_vadd(e, apti_vset(2.0f)));
    const apti_vi sign = apti_viand(apti_vbits(x), apti_viset((int32_t)0x80000000u));
    return apti_vpick(APTI_FN(vis_nan)(x), x, apti_vfloat(apti_vior(apti_vbits(y), sign)));
}

/* For 0 <= t <= APTI_MILLS_LIMIT: returns P(-t) / exp(-t^2/2), P the normal distribution (Mills' ratio, a rational minimax fit),
   and *density = exp(-t^2/2) = 2^n 2^f with a minimax polynomial for 2^f. Together they give erf GELU and its slope without
   cancellation. Fitted for the absolute error of those two, 2e-8 and 3e-8: half of what rounding adds. */
#define APTI_MILLS_LIMIT 13.1f
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vmills)(apti_v t, apti_v *density)
{
    apti_v p = apti_vfma(t, apti_vset(0.0126397312f), apti_vset(0.100008152f));
    p = apti_vfma(t, p, apti_vset(0.326463193f));
    p = apti_vfma(t, p, apti_vset(0.5f));
    apti_v q = apti_vfma(t, apti_vset(0.0317049511f), apti_vset(0.25004822f));
    q = apti_vfma(t, q, apti_vset(0.857609272f));
    q = apti_vfma(t, q, apti_vset(1.4508096f));
    q = apti_vfma(t, q, apti_vset(1.0f));
    const apti_v square = apti_vmul(t, t), scale = apti_vset(-0.72134752f);          /* -log2(e) / 2 */
    const apti_vi n = apti_vround(apti_vmul(square, scale));
    const apti_v f = apti_vfma(square, scale, apti_vsub(apti_vset(0.0f), apti_vconvert(n)));
    apti_v e = apti_vfma(f, apti_vset(0.00132645911f), apti_vset(0.00967161916f));
    e = apti_vfma(f, e, apti_vset(0.0555073507f));
    e = apti_vfma(f, e, apti_vset(0.240222409f));
    e = apti_vfma(f, e, apti_vset(0.693147004f));
    e = apti_vfma(f, e, apti_vset(1.0f));
    *density = apti_vfloat(apti_viadd(apti_vbits(e), apti_vishl23(n)));
    return apti_vdiv(p, q);
}

/* 1 / (1 + exp(u)): SiLU is x times this at -x. *e receives the exponential. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vsigmoid)(apti_v u, apti_v *e)
{
    apti_vi n;
    const apti_v p = APTI_FN(vexpm1_reduced)(u, &n), power = apti_vfloat(apti_vishl23(apti_viadd(n, apti_viset(127))));
    *e = apti_vfma(p, power, power);
    return apti_vdiv(apti_vset(1.0f), apti_vadd(apti_vset(1.0f), *e));
}

/* 1 / (1 + exp(2 u)), u = A t + B t^3: the same for tanh GELU */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vsigmoid_cubic)(apti_v t, apti_v *e)
{
    const apti_v cube = apti_vfma(apti_vmul(t, t), apti_vset(2.0f * APTI_GELU_B), apti_vset(2.0f * APTI_GELU_A));
    return APTI_FN(vsigmoid)(apti_vmul(t, cube), e);
}

APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vact)(apti_v x, int32_t act)
{
    apti_v e;
    if (act == APT_GELU_ERF) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_MILLS_LIMIT), ratio = APTI_FN(vmills)(t, &e);
        return apti_vfnma(apti_vmul(t, ratio), e, APTI_FN(vrelu)(x));
    }
    if (act == APT_GELU_TANH) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_GELU_TANH_LIMIT);
        return apti_vfnma(t, APTI_FN(vsigmoid_cubic)(t, &e), APTI_FN(vrelu)(x));
    }
    if (act == APT_SILU) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_SILU_LIMIT);
        return apti_vfnma(t, APTI_FN(vsigmoid)(t, &e), APTI_FN(vrelu)(x));
    }
    return act == APT_RELU ? APTI_FN(vrelu)(x) : x;
}

/* Slope of the activation: f for x <= 0, 1 - f for x > 0; f as in apti_act_slope. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vslope)(apti_v x, int32_t act)
{
    apti_v f = apti_vset(0.0f), e;
    if (act == APT_GELU_ERF) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_MILLS_LIMIT), ratio = APTI_FN(vmills)(t, &e);
        f = apti_vmul(e, apti_vfnma(t, apti_vset(APTI_INV_SQRT_2PI), ratio));
    } else if (act == APT_GELU_TANH) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_GELU_TANH_LIMIT), s = APTI_FN(vsigmoid_cubic)(t, &e);
        const apti_v du = apti_vfma(apti_vmul(t, t), apti_vset(6.0f * APTI_GELU_B), apti_vset(2.0f * APTI_GELU_A));
        f = apti_vfnma(apti_vmul(apti_vmul(t, du), apti_vmul(s, e)), s, s);
    } else if (act == APT_SILU) {
        const apti_v t = APTI_FN(vabs_limit)(x, APTI_SILU_LIMIT), s = APTI_FN(vsigmoid)(t, &e);
        f = apti_vfnma(apti_vmul(t, apti_vmul(s, e)), s, s);
    } else if (act != APT_RELU) {
        return apti_vset(1.0f);
    }
    const apti_v y = apti_vpick(apti_vgt(apti_vbits(x), apti_viset(0)), apti_vsub(apti_vset(1.0f), f), f);
    return apti_vpick(APTI_FN(vis_nan)(x), x, y);
}

/* The loops below walk n floats in vectors; k is the number of lanes of this step that count. */
#define APTI_EACH(i, n, k) \
    for (int64_t i = 0, k = apti_min_i64(n, APTI_LANES); i < (n); i += APTI_LANES, k = apti_min_i64((n) - i, APTI_LANES))

APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vget)(const float *p, int64_t k)
{
    return k == APTI_LANES ? apti_vload(p) : apti_vload_part(p, k);
}

APTI_ISA_TARGET APTI_INLINE void APTI_FN(vput)(float *p, apti_v v, int64_t k)
{
    if (k == APTI_LANES) apti_vstore(p, v);
    else apti_vstore_part(p, v, k);
}

#define apti_vget APTI_FN(vget)
#define apti_vput APTI_FN(vput)

APTI_ISA_TARGET static void APTI_FN(exp_scaled)(float *x, int64_t n, float scale, float shift)
{
    const apti_v s = apti_vset(scale), d = apti_vset(-shift);
    APTI_EACH(i, n, k) apti_vput(x + i, APTI_FN(vexp)(apti_vfma(s, apti_vget(x + i, k), d)), k);
}

APTI_ISA_TARGET static void APTI_FN(scale)(float *y, const float *x, float s, int64_t n)
{
    const apti_v f = apti_vset(s);
    APTI_EACH(i, n, k) apti_vput(y + i, apti_vmul(f, apti_vget(x + i, k)), k);
}

APTI_ISA_TARGET static void APTI_FN(add)(float *y, const float *a, const float *b, int64_t n)
{
    APTI_EACH(i, n, k) apti_vput(y + i, apti_vadd(apti_vget(a + i, k), apti_vget(b + i, k)), k);
}

APTI_ISA_TARGET static void APTI_FN(mul)(float *y, const float *a, const float *b, int64_t n)
{
    APTI_EACH(i, n, k) apti_vput(y + i, apti_vmul(apti_vget(a + i, k), apti_vget(b + i, k)), k);
}

APTI_ISA_TARGET static void APTI_FN(axpy)(float *y, float s, const float *x, int64_t n)
{
    const apti_v f = apti_vset(s);
    APTI_EACH(i, n, k) apti_vput(y + i, apti_vfma(f, apti_vget(x + i, k), apti_vget(y + i, k)), k);
}

APTI_ISA_TARGET static void APTI_FN(abs_add)(float *acc, const float *x, int64_t n)
{
    APTI_EACH(i, n, k) {
        const apti_v size = apti_vfloat(APTI_FN(vabs_bits)(apti_vget(x + i, k)));
        apti_vput(acc + i, apti_vadd(apti_vget(acc + i, k), size), k);
    }
}

APTI_ISA_TARGET static void APTI_FN(act)(float *y, const float *x, int64_t n, int32_t act)
{
    APTI_EACH(i, n, k) apti_vput(y + i, APTI_FN(vact)(apti_vget(x + i, k), act), k);
}

APTI_ISA_TARGET static void APTI_FN(act_grad)(float *dx, const float *dy, const float *x, int64_t n, int32_t act)
{
    APTI_EACH(i, n, k) apti_vput(dx + i, apti_vmul(apti_vget(dy + i, k), APTI_FN(vslope)(apti_vget(x + i, k), act)), k);
}

APTI_ISA_TARGET static void APTI_FN(tanh)(float *y, const float *x, int64_t n)
{
    APTI_EACH(i, n, k) apti_vput(y + i, APTI_FN(vtanh)(apti_vget(x + i, k)), k);
}

APTI_ISA_TARGET static void APTI_FN(norm)(float *y, const float *x, const float *gamma, const float *beta, float mean,
    float rstd, int64_t n)
{
    const apti_v a = apti_vset(mean), r = apti_vset(rstd);
    APTI_EACH(i, n, k) {
        const apti_v unit = apti_vmul(apti_vsub(apti_vget(x + i, k), a), r);
        apti_vput(y + i, apti_vfma(unit, apti_vget(gamma + i, k), apti_vget(beta + i, k)), k);
    }
}

/* 0 for |x| < 2^-100: moments of a weight that gets no more gradient must not decay into denormals, which cost up to
   a hundred cycles each. sqrt(2^-100) is far below any useful eps. */
APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vflush)(apti_v x)
{
    return apti_vpick(apti_vgt(apti_viset((127 - 100) << 23), APTI_FN(vabs_bits)(x)), apti_vset(0.0f), x);
}

APTI_ISA_TARGET static void APTI_FN(adam)(float *w, float *m, float *v, const float *g, int64_t n, float grad_scale,
    float beta1, float beta2, float step_size, float eps, float decay)
{
    const apti_v b1 = apti_vset(beta1), c1 = apti_vset(1.0f - beta1), b2 = apti_vset(beta2), c2 = apti_vset(1.0f - beta2);
    APTI_EACH(i, n, k) {
        const apti_v gs = apti_vmul(apti_vset(grad_scale), apti_vget(g + i, k)), wi = apti_vget(w + i, k);
        const apti_v mi = APTI_FN(vflush)(apti_vfma(b1, apti_vget(m + i, k), apti_vmul(c1, gs)));
        const apti_v vi = APTI_FN(vflush)(apti_vfma(b2, apti_vget(v + i, k), apti_vmul(apti_vmul(c2, gs), gs)));
        const apti_v step = apti_vdiv(apti_vmul(apti_vset(step_size), mi), apti_vadd(apti_vsqrt(vi), apti_vset(eps)));
        apti_vput(m + i, mi, k);
        apti_vput(v + i, vi, k);
        apti_vput(w + i, apti_vsub(wi, apti_vfma(apti_vset(decay), wi, step)), k);
    }
}

/* Reductions: four vector sums (element i goes to sum i / lanes mod 4), then a fixed tree. */
APTI_ISA_TARGET APTI_INLINE float APTI_FN(vfold)(const apti_v s[4])
{
    float t[APTI_LANES];
    apti_vstore(t, apti_vadd(apti_vadd(s[0], s[1]), apti_vadd(s[2], s[3])));
    for (int32_t w = APTI_LANES / 2; w > 0; w /= 2)
        for (int32_t i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}

#define APTI_REDUCE(TERM)                                                                                   \
    apti_v s[4] = {apti_vset(0.0f), apti_vset(0.0f), apti_vset(0.0f), apti_vset(0.0f)};                     \
    int64_t i = 0;                                                                                          \
    for (; i + 4 * APTI_LANES <= n; i += 4 * APTI_LANES) {                                                  \
        TERM(0, i, APTI_LANES);                                                                             \
        TERM(1, i + APTI_LANES, APTI_LANES);                                                                \
        TERM(2, i + 2 * APTI_LANES, APTI_LANES);                                                            \
        TERM(3, i + 3 * APTI_LANES, APTI_LANES);                                                            \
    }                                                                                                       \
    if (i < n) TERM(0, i, apti_min_i64(n - i, APTI_LANES));                                                 \
    if (i + APTI_LANES < n) TERM(1, i + APTI_LANES, apti_min_i64(n - i - APTI_LANES, APTI_LANES));          \
    if (i + 2 * APTI_LANES < n) TERM(2, i + 2 * APTI_LANES, apti_min_i64(n - i - 2 * APTI_LANES, APTI_LANES)); \
    if (i + 3 * APTI_LANES < n) TERM(3, i + 3 * APTI_LANES, apti_min_i64(n - i - 3 * APTI_LANES, APTI_LANES)); \
    return APTI_FN(vfold)(s)

APTI_ISA_TARGET static float APTI_FN(sum)(const float *x, int64_t n)
{
#define APTI_TERM(q, i, k) s[q] = apti_vadd(s[q], apti_vget(x + (i), k))
    APTI_REDUCE(APTI_TERM);
#undef APTI_TERM
}

APTI_ISA_TARGET static float APTI_FN(dot)(const float *a, const float *b, int64_t n)
{
#define APTI_TERM(q, i, k) s[q] = apti_vfma(apti_vget(a + (i), k), apti_vget(b + (i), k), s[q])
    APTI_REDUCE(APTI_TERM);
#undef APTI_TERM
}

APTI_ISA_TARGET APTI_INLINE apti_v APTI_FN(vdeviation)(const float *x, apti_v mean, int64_t k)
{
    const apti_v d = apti_vsub(apti_vget(x, k), mean);
    return k == APTI_LANES ? d : apti_vkeep(d, k);
}

APTI_ISA_TARGET static float APTI_FN(sq_dev)(const float *x, float mean, int64_t n)
{
    const apti_v a = apti_vset(mean);
#define APTI_TERM(q, i, k) do { const apti_v d = APTI_FN(vdeviation)(x + (i), a, k); s[q] = apti_vfma(d, d, s[q]); } while (0)
    APTI_REDUCE(APTI_TERM);
#undef APTI_TERM
}
#undef APTI_REDUCE

APTI_ISA_TARGET static float APTI_FN(max)(const float *x, int64_t n)
{
    if (n <= 0) return -APTI_FLT_MAX;
    float t[APTI_LANES];
    apti_v m = apti_vset(x[0]), nan = apti_vset(0.0f);           /* nan: the last NaN of each lane */
    for (int64_t i = 0; i < n; i += APTI_LANES) {
        apti_v v = m;
        if (i + APTI_LANES <= n) {
            v = apti_vload(x + i);
        } else {
            for (int32_t l = 0; l < APTI_LANES; l++) t[l] = x[i + l < n ? i + l : i];
            v = apti_vload(t);
        }
        m = apti_vmax(m, v);
        nan = apti_vpick(APTI_FN(vis_nan)(v), v, nan);
    }
    if (apti_vany(APTI_FN(vis_nan)(nan))) return apti_float(APTI_NAN_BITS);
    apti_vstore(t, m);
    for (int32_t l = 1; l < APTI_LANES; l++) t[0] = t[l] > t[0] ? t[l] : t[0];
    return t[0];
}

APTI_ISA_TARGET static void APTI_FN(expand)(float *y, const uint16_t *x, int64_t n)
{
    int64_t i = 0;
    for (; i + APTI_LANES <= n; i += APTI_LANES) apti_vstore(y + i, apti_vload_bf16(x + i));
    for (; i < n; i++) y[i] = apti_bf16_to_f32(x[i]);
}

APTI_ISA_TARGET static void APTI_FN(copy)(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r++, x += ldx, y += ldy) {
        int64_t c = 0;
        for (; c + APTI_LANES <= cols; c += APTI_LANES) {
            if (c % 16 == 0) __builtin_prefetch(x + APTI_GEMM_PACK * ldx + c, 0, 3);
            apti_vstore(y + c, apti_vload(x + c));
        }
        if (c < cols) {
            __builtin_prefetch(x + APTI_GEMM_PACK * ldx + cols - 1, 0, 3);
            apti_vstore(y + c, apti_vload_part(x + c, cols - c));
        }
    }
}

APTI_ISA_TARGET static void APTI_FN(transpose)(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols)
{
    int64_t r = 0;
    for (; r + APTI_BLOCK <= rows; r += APTI_BLOCK) {
        int64_t c = 0;
        for (; c + APTI_BLOCK <= cols; c += APTI_BLOCK) apti_vtranspose(y + c * ldy + r, ldy, x + r * ldx + c, ldx);
        for (; c < cols; c++)
            for (int64_t l = r; l < r + APTI_BLOCK; l++) y[c * ldy + l] = x[l * ldx + c];
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) y[c * ldy + r] = x[r * ldx + c];
}

APTI_ISA_TARGET static void APTI_FN(finish)(const apti_finish *f)
{
    for (int64_t r = 0; r < f->rows; r++) {
        const float *z = f->z + r * f->ldz;
        float *c = f->c + r * f->ldc;
        APTI_EACH(j, f->cols, k) {
            apti_v v = apti_vget(z + j, k);
            if (f->bias != NULL) v = apti_vadd(v, apti_vget(f->bias + j, k));
            if (f->pre != NULL) apti_vput(f->pre + r * f->ld_pre + j, v, k);
            if (f->act >= 0) v = APTI_FN(vact)(v, f->act);
            if (f->residual != NULL) v = apti_vadd(v, apti_vget(f->residual + r * f->ld_residual + j, k));
            if (f->mask != NULL) v = apti_vmul(v, apti_vget(f->mask + j, k));
            apti_vput(c + j, v, k);
        }
    }
}

/* The tile kernel: rows x nv vectors of C stay in registers. `rows` and `nv` are constants of each instance below, so
   every `if` disappears. One k step loads nv vectors of B and, per row, one element of A that is broadcast. Rows are
   addressed from a base for every third row (base, base + a_row, base + 2 a_row are x86 addressing modes), because
   fourteen row pointers would not fit the integer registers. */
#if APTI_NV == 3
#define APTI_THIRD(x) x
#else
#define APTI_THIRD(x)
#endif
#ifdef APTI_NEON
#define apti_sload(p) (*(p))
#define apti_sfma(s, b, c) vfmaq_n_f32(c, b, s)
#define apti_s float
#else
#define apti_sload(p) apti_vset(*(p))
#define apti_sfma(s, b, c) apti_vfma(s, b, c)
#define apti_s apti_v
#endif
#define APTI_ROW_LIST_6(X) X(0, a0, 0) X(1, a0, ar) X(2, a0, 2 * ar) X(3, a3, 0) X(4, a3, ar) X(5, a3, 2 * ar)
#define APTI_ROW_LIST_8(X) APTI_ROW_LIST_6(X) X(6, a6, 0) X(7, a6, ar)
#define APTI_ROW_LIST_12(X) APTI_ROW_LIST_8(X) X(8, a6, 2 * ar) X(9, a9, 0) X(10, a9, ar) X(11, a9, 2 * ar)
#define APTI_ROW_LIST_14(X) APTI_ROW_LIST_12(X) X(12, a12, 0) X(13, a12, ar)
#define APTI_ROWS APTI_PASTE(APTI_ROW_LIST, APTI_MR)             /* X for every row of a full tile */
#define APTI_SLIM_ROWS APTI_PASTE(APTI_ROW_LIST, APTI_SLIM)      /* X for every row of a tile one vector wide */

#define APTI_ROW_START(i, base, offset)                                                                     \
    apti_v x##i = zero, y##i = zero; APTI_THIRD(apti_v z##i = zero;)                                        \
    if (rows > i && from != NULL) {                                                                         \
        x##i = apti_vload(from + i * ld_from);                                                              \
        if (nv > 1) y##i = apti_vload(from + i * ld_from + APTI_LANES);                                     \
        APTI_THIRD(if (nv > 2) z##i = apti_vload(from + i * ld_from + 2 * APTI_LANES);)                     \
    }
#define APTI_ROW_PREFETCH(i, base, offset)                                                                  \
    if (rows > i) {                                                                                         \
        __builtin_prefetch(t->next + i * ld_to, 1, 3);                                                      \
        if (nv * APTI_LANES > 16) __builtin_prefetch(t->next + i * ld_to + 16, 1, 3);                       \
    }
#define APTI_ROW_STEP(i, base, offset)                                                                      \
    if (rows > i) {                                                                                         \
        const apti_s s = apti_sload(base + (offset));                                                       \
        x##i = apti_sfma(s, b0, x##i);                                                                      \
        if (nv > 1) y##i = apti_sfma(s, b1, y##i);                                                          \
        APTI_THIRD(if (nv > 2) z##i = apti_sfma(s, b2, z##i);)                                              \
    }
#define APTI_ROW_END(i, base, offset)                                                                       \
    if (rows > i) {                                                                                         \
        apti_vstore(to + i * ld_to, x##i);                                                                  \
        if (nv > 1) apti_vstore(to + i * ld_to + APTI_LANES, y##i);                                         \
        APTI_THIRD(if (nv > 2) apti_vstore(to + i * ld_to + 2 * APTI_LANES, z##i);)                         \
    }

APTI_ISA_TARGET __attribute__((always_inline)) APTI_INLINE void APTI_FN(tile_body)(const apti_tile *t, const int rows,
    const int nv)
{
    const apti_v zero = apti_vset(0.0f);
    const float *from = t->from;
    float *to = t->to;
    const int64_t ld_from = t->ld_from, ld_to = t->ld_to;
    APTI_SLIM_ROWS(APTI_ROW_START)
    APTI_SLIM_ROWS(APTI_ROW_PREFETCH)
    for (int q = 0; q < 2; q++) {
        if (t->segment[q].k == 0) continue;          /* its pointers may be NULL */
        const int64_t ar = t->segment[q].a_row, ac = t->segment[q].a_col, bs = t->segment[q].b_step;
        const float *a0 = t->segment[q].a, *b = (const float *)t->segment[q].b;
        const float *a3 = rows > 3 ? a0 + 3 * ar : a0, *a6 = rows > 6 ? a0 + 6 * ar : a0;
        const float *a9 = rows > 9 ? a0 + 9 * ar : a0, *a12 = rows > 12 ? a0 + 12 * ar : a0;
        (void)a6, (void)a9, (void)a12;
        for (int64_t p = t->segment[q].k; p > 0; p--) {
            const apti_v b0 = apti_vload(b), b1 = nv > 1 ? apti_vload(b + APTI_LANES) : zero;
            APTI_THIRD(const apti_v b2 = nv > 2 ? apti_vload(b + 2 * APTI_LANES) : zero;)
            APTI_SLIM_ROWS(APTI_ROW_STEP)
            b += bs;
            a0 += ac;
            if (rows > 3) a3 += ac;
            if (rows > 6) a6 += ac;
            if (rows > 9) a9 += ac;
            if (rows > 12) a12 += ac;
        }
    }
    APTI_SLIM_ROWS(APTI_ROW_END)
}

/* One function per height: a remainder of 5 rows costs 5 rows. Tiles one vector wide may be taller, for as many sums. */
#define APTI_FULL_TILE(i, base, offset)                                                                     \
    APTI_ISA_TARGET static void APTI_PASTE(APTI_FN(tile_full), i)(const apti_tile *t)                       \
    {                                                                                                       \
        APTI_FN(tile_body)(t, i + 1, APTI_NV);                                                              \
    }
#define APTI_SLIM_TILE(i, base, offset)                                                                     \
    APTI_ISA_TARGET static void APTI_PASTE(APTI_FN(tile_slim), i)(const apti_tile *t)                       \
    {                                                                                                       \
        APTI_FN(tile_body)(t, i + 1, 1);                                                                    \
    }
APTI_ROWS(APTI_FULL_TILE)
APTI_SLIM_ROWS(APTI_SLIM_TILE)

#define APTI_FULL_NAME(i, base, offset) APTI_PASTE(APTI_FN(tile_full), i),
#define APTI_SLIM_NAME(i, base, offset) APTI_PASTE(APTI_FN(tile_slim), i),
static void (*const APTI_FN(full_tiles)[APTI_MR])(const apti_tile *) = {APTI_ROWS(APTI_FULL_NAME)};
static void (*const APTI_FN(slim_tiles)[APTI_SLIM])(const apti_tile *) = {APTI_SLIM_ROWS(APTI_SLIM_NAME)};

static void APTI_FN(tile)(const apti_tile *t)
{
    if (t->cols > APTI_LANES) APTI_FN(full_tiles)[t->rows - 1](t);
    else APTI_FN(slim_tiles)[t->rows - 1](t);
}

/* The thin kernel: up to 3 rows over two panels. Bound by the loads of B, so all that matters is enough of them under
   way: two panels give two streams and at least four independent sums. */
#define APTI_COLS(X) X(0) X(1) X(2) X(3) APTI_THIRD(X(4) X(5))
#define APTI_THIN_START(j)                                                                                  \
    apti_v x##j = zero, y##j = zero, z##j = zero;                                                           \
    if (t->from != NULL) {                                                                                  \
        x##j = apti_vload(t->from + j * APTI_LANES);                                                        \
        if (rows > 1) y##j = apti_vload(t->from + t->ld_from + j * APTI_LANES);                             \
        if (rows > 2) z##j = apti_vload(t->from + 2 * t->ld_from + j * APTI_LANES);                         \
    }
#define APTI_THIN_STEP(j)                                                                                   \
    {                                                                                                       \
        const int64_t at = j / APTI_NV * panel + j % APTI_NV * APTI_LANES;                                  \
        const apti_v w = bf16 ? apti_vload_bf16(h + at) : apti_vload(b + at);                               \
        x##j = apti_sfma(s0, w, x##j);                                                                      \
        if (rows > 1) y##j = apti_sfma(s1, w, y##j);                                                        \
        if (rows > 2) z##j = apti_sfma(s2, w, z##j);                                                        \
    }
#define APTI_THIN_END(j)                                                                                    \
    apti_vstore(t->to + j * APTI_LANES, x##j);                                                              \
    if (rows > 1) apti_vstore(t->to + t->ld_to + j * APTI_LANES, y##j);                                     \
    if (rows > 2) apti_vstore(t->to + 2 * t->ld_to + j * APTI_LANES, z##j);

/* Half of a thin tile's inner loop: bf16 is a constant. */
#define APTI_THIN_LOOP(BF16)                                                                                \
    for (int64_t p = 0; p < g->k; p++, a += g->a_col) {                                                     \
        const bool bf16 = BF16;                                                                             \
        const float *b = (const float *)g->b + p * g->b_step;                                               \
        const uint16_t *h = (const uint16_t *)g->b + p * g->b_step;                                         \
        const apti_s s0 = apti_sload(a);                                                                    \
        const apti_s s1 = apti_sload(rows > 1 ? a + g->a_row : a), s2 = apti_sload(rows > 2 ? a + 2 * g->a_row : a); \
        APTI_COLS(APTI_THIN_STEP)                                                                           \
        (void)b, (void)h, (void)s1, (void)s2;                                                               \
    }

APTI_ISA_TARGET __attribute__((always_inline)) APTI_INLINE void APTI_FN(thin_body)(const apti_tile *t, const int rows)
{
    const apti_v zero = apti_vset(0.0f);
    APTI_COLS(APTI_THIN_START)
    for (int q = 0; q < 2; q++) {
        const apti_segment *g = &t->segment[q];
        const float *a = g->a;
        const int64_t panel = g->b_panel;
        if (g->bf16) {
            APTI_THIN_LOOP(true)
        } else {
            APTI_THIN_LOOP(false)
        }
    }
    APTI_COLS(APTI_THIN_END)
}

APTI_ISA_TARGET static void APTI_FN(thin)(const apti_tile *t)
{
    switch (t->rows) {
        case 1: APTI_FN(thin_body)(t, 1); break;
        case 2: APTI_FN(thin_body)(t, 2); break;
        default: APTI_FN(thin_body)(t, 3); break;
    }
}

/* Compressed matrices: the sums of one output stay in registers while its set bits are walked. */
#define APTI_EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define APTI_SPARSE_START(j) apti_v s##j = nv > j ? apti_vload(sum + j * APTI_LANES) : zero;
#define APTI_SPARSE_STEP(j) if (nv > j) s##j = apti_sfma(value, apti_vload(x + j * APTI_LANES), s##j);
#define APTI_SPARSE_END(j) if (nv > j) apti_vstore(sum + j * APTI_LANES, s##j);

APTI_ISA_TARGET __attribute__((always_inline)) APTI_INLINE void APTI_FN(sparse_body)(const apti_sparse_tile *t, const int nv)
{
    const apti_v zero = apti_vset(0.0f);
    const int64_t width = nv * APTI_LANES;
    for (int64_t o = 0; o < t->outputs; o++) {
        float *sum = t->sums + o * width;
        const float *v = t->values + t->at[o], *from = t->x;
        APTI_EIGHT(APTI_SPARSE_START)
        for (int64_t w = 0; w < t->words; w++, from += 64 * width) {
            for (uint64_t bits = t->bits[o * t->row + w]; bits != 0; bits &= bits - 1) {
                const float *x = from + apti_lowest_bit(bits) * width;
                const apti_s value = apti_sload(v++);
                APTI_EIGHT(APTI_SPARSE_STEP)
            }
        }
        APTI_EIGHT(APTI_SPARSE_END)
        t->at[o] = v - t->values;
    }
}

APTI_ISA_TARGET static void APTI_FN(sparse)(const apti_sparse_tile *t)
{
    switch (t->vectors) {
        case 1: APTI_FN(sparse_body)(t, 1); break;
        case 2: APTI_FN(sparse_body)(t, 2); break;
        case 4: APTI_FN(sparse_body)(t, 4); break;
        default: APTI_FN(sparse_body)(t, APTI_SPARSE_VECTORS); break;
    }
}

#define APTI_ISA_TABLE(isa) APTI_TABLE(isa, APTI_MR, APTI_NV * APTI_LANES, APTI_SLIM, APTI_LANES, APTI_NARROW)
static const apti_kernels APTI_FN(kernels) = APTI_ISA_TABLE(APTI_ISA);

#undef APTI_ISA
#undef APTI_ISA_TARGET
#undef APTI_ISA_TABLE
#undef APTI_LANES
#undef APTI_MR
#undef APTI_NV
#undef APTI_SLIM
#undef APTI_NARROW
#undef APTI_BLOCK
#undef APTI_EACH
#undef APTI_MILLS_LIMIT
#undef APTI_THIRD
#undef APTI_ROWS
#undef APTI_ROW_LIST_6
#undef APTI_ROW_LIST_8
#undef APTI_ROW_LIST_12
#undef APTI_SLIM_ROWS
#undef APTI_ROW_LIST_14
#undef APTI_ROW_START
#undef APTI_ROW_STEP
#undef APTI_ROW_PREFETCH
#undef APTI_ROW_END
#undef APTI_FULL_TILE
#undef APTI_SLIM_TILE
#undef APTI_FULL_NAME
#undef APTI_SLIM_NAME
#undef APTI_COLS
#undef APTI_THIN_START
#undef APTI_THIN_STEP
#undef APTI_THIN_END
#undef APTI_THIN_LOOP
#undef APTI_EIGHT
#undef APTI_SPARSE_START
#undef APTI_SPARSE_STEP
#undef APTI_SPARSE_END
#undef apti_v
#undef apti_vi
#undef apti_vfirst
#undef apti_vload
#undef apti_vstore
#undef apti_vload_part
#undef apti_vstore_part
#undef apti_vkeep
#undef apti_vload_bf16
#undef apti_vset
#undef apti_vadd
#undef apti_vsub
#undef apti_vmul
#undef apti_vdiv
#undef apti_vsqrt
#undef apti_vfma
#undef apti_vfnma
#undef apti_vmin
#undef apti_vmax
#undef apti_vbits
#undef apti_vfloat
#undef apti_vround
#undef apti_vconvert
#undef apti_viset
#undef apti_viadd
#undef apti_viand
#undef apti_vior
#undef apti_vm
#undef apti_vgt
#undef apti_vpick
#undef apti_vany
#undef apti_vimin
#undef apti_vishl23
#undef apti_vtranspose
#undef apti_vget
#undef apti_vput
#undef apti_sload
#undef apti_sfma
#undef apti_s
#elif defined(APTI_INTERRUPTED)
#undef APTI_INTERRUPTED                          /* the implementation goes on */
#ifndef APT_ONLY_CORE

/* Every table this CPU can run, ref first, the best last. */
static int32_t apti_kernels_list(const apti_kernels **list, int32_t capacity)
{
    int32_t n = 0;
    if (n < capacity) list[n++] = &apti_kernels_ref;
#ifdef APTI_X86
    if (n < capacity && apti_cpu_has(APTI_CPU_AVX2)) list[n++] = &apti_kernels_avx2;
    if (n < capacity && apti_cpu_has(APTI_CPU_AVX512)) list[n++] = &apti_kernels_avx512;
#endif
#ifdef APTI_NEON
    if (n < capacity && apti_cpu_has(APTI_CPU_NEON)) list[n++] = &apti_kernels_neon;
#endif
    return n;
}

/* NULL name: the best. NULL result: there is no such table, or this CPU cannot run it. */
static const apti_kernels *apti_kernels_find(const char *name)
{
    const apti_kernels *list[8];
    const int32_t n = apti_kernels_list(list, 8);
    if (name == NULL) return list[n - 1];
    for (int32_t i = 0; i < n; i++)
        if (strcmp(list[i]->name, name) == 0) return list[i];
    return NULL;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Packed matrices
   ------------------------------------------------------------------------------------------------------------------ */

/* -1 when the size overflows. */
static int64_t apti_packed_bytes(const apt_ctx *ctx, int64_t n, int64_t k, apt_dtype type)
{
    const int64_t nr = ctx->kernels->nr;
    int64_t bytes;
    if (n < 0 || n > INT64_MAX - nr || !apti_mul(apti_round_up(n, nr), k, &bytes)) return -1;
    return apti_mul(bytes, type == APT_BF16 ? 2 : 4, &bytes) ? bytes : -1;
}

typedef struct apti_pack_job {
    apt_ctx *ctx;
    const apti_packed *packed;
    const float *w;
    float *out;
    int64_t ldw;
} apti_pack_job;

#define APTI_PACK_ROWS 256                       /* rows of a bf16 panel converted at a time */

static void apti_pack_task(int64_t index, int32_t thread, void *arg)
{
    const apti_pack_job *job = (const apti_pack_job *)arg;
    const apti_packed *packed = job->packed;
    const apti_kernels *kernels = job->ctx->kernels;
    const int64_t nr = packed->nr, at = index * packed->k * nr, cols = apti_min_i64(nr, packed->n - index * nr);
    const float *w = job->w + index * nr * job->ldw;
    for (int64_t p = 0; p < packed->k; p += APTI_PACK_ROWS) {
        const int64_t rows = apti_min_i64(APTI_PACK_ROWS, packed->k - p);
        float *panel = packed->type == APT_F32 ? (float *)packed->data + at + p * nr : (float *)job->ctx->scratch[thread];
        if (cols < nr) memset(panel, 0, (size_t)(rows * nr) * sizeof(float));
        kernels->transpose(panel, nr, w + p, job->ldw, cols, rows);
        if (packed->type == APT_F32) continue;
        uint16_t *half = (uint16_t *)packed->data + at + p * nr;
        for (int64_t i = 0; i < rows * nr; i++) half[i] = apti_f32_to_bf16(panel[i]);
    }
}

/* packed->data must have apti_packed_bytes; w is (n, k) with row stride ldw. */
static void apti_pack(apt_ctx *ctx, apti_packed *packed, const float *w, int64_t ldw)
{
    apti_pack_job job = APT_ZERO;
    job.ctx = ctx;
    job.packed = packed;
    job.w = w;
    job.ldw = ldw;
    apti_parallel_for(ctx, apti_ceil_div(packed->n, packed->nr), apti_pack_task, &job);
}

static void apti_unpack_task(int64_t index, int32_t thread, void *arg)
{
    const apti_pack_job *job = (const apti_pack_job *)arg;
    const apti_packed *packed = job->packed;
    const apti_kernels *kernels = job->ctx->kernels;
    const int64_t nr = packed->nr, at = index * packed->k * nr, cols = apti_min_i64(nr, packed->n - index * nr);
    for (int64_t p = 0; p < packed->k; p += APTI_PACK_ROWS) {
        const int64_t rows = apti_min_i64(APTI_PACK_ROWS, packed->k - p);
        float *wide = (float *)job->ctx->scratch[thread];
        const float *panel = wide;
        if (packed->type == APT_F32) panel = (const float *)packed->data + at + p * nr;
        else kernels->expand(wide, (const uint16_t *)packed->data + at + p * nr, rows * nr);
        kernels->transpose(job->out + index * nr * job->ldw + p, job->ldw, panel, nr, rows, cols);
    }
}

static void apti_unpack(apt_ctx *ctx, float *w, int64_t ldw, const apti_packed *packed)
{
    apti_pack_job job = APT_ZERO;
    job.ctx = ctx;
    job.packed = packed;
    job.out = w;
    job.ldw = ldw;
    apti_parallel_for(ctx, apti_ceil_div(packed->n, packed->nr), apti_unpack_task, &job);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Matrix product: driver

   gemm -> tiles of C (one task each) -> k blocks -> row blocks -> panels -> strips of at most mr rows.
   For one k block the panels of B are packed into the scratch (packed f32 weights are used where they are), then the
   rows of A are walked in blocks that stay in the second-level cache together with these panels.
   ------------------------------------------------------------------------------------------------------------------ */

#define APTI_GEMM_K 768                          /* longest k block; k is cut evenly */
#define APTI_STRIP_GAP 16                        /* floats between packed strips: the copy writes whole vectors */
#define APTI_GEMM_TAIL 64                        /* a second part up to this long rides on the first part's last k block */
#define APTI_GEMM_ROWS 84                        /* row block: 84 x 768 floats take a quarter of a 1 MiB second-level cache */
#define APTI_GEMM_COLS 256                       /* widest tile */
#define APTI_GEMM_TALL 336                       /* tiles of a B that is packed on the way are 336 x 128 instead of 168 x 256 */
#define APTI_GEMM_SLIM 128
#define APTI_GEMM_TASK 2e5                       /* fused multiply-adds that are worth a task: some 5 us */
#define APTI_GEMM_SCRATCH (1 << 20)              /* bytes that let every product run at full speed; see apti_gemm_serial */

typedef struct apti_gemm_job {
    apt_ctx *ctx;                                /* NULL in a serial product */
    const apti_kernels *kernels;
    const apti_gemm *g;
    bool thin;
    int64_t tiles_m, tiles_n, panels;            /* tiles_m x tiles_n tasks; panels of C in all */
} apti_gemm_job;

/* The panels of B for columns j0.. of one stretch of the reduction. */
typedef struct apti_b_view {
    const float *data;
    int64_t step, panel;
} apti_b_view;

/* One tile of C and the scratch to compute it. */
typedef struct apti_gemm_tile {
    const apti_kernels *kernels;
    const apti_gemm *g;
    int64_t i0, i1, j0, j1;
    float *pack_b[2], *pack_a, *sums;            /* sums: where partial sums of C rest when C must not be touched yet */
    int64_t k_block;
} apti_gemm_tile;

/* Packs one panel (cols <= nr columns from j, rows p0 .. p0+k) of any kind of B, padded with zeros. */
static void apti_pack_panel(const apti_kernels *kernels, float *y, const apti_gemm_part *part, int64_t p0, int64_t k,
    int64_t j, int64_t cols)
{
    const int64_t nr = kernels->nr;
    if (cols < nr) memset(y, 0, (size_t)(k * nr) * sizeof(float));
    if (part->kind == APTI_B_PLAIN) {
        kernels->copy(y, nr, part->b + p0 * part->ldb + j, part->ldb, k, cols);
        return;
    }
    if (part->kind == APTI_B_PLAIN_T) {
        kernels->transpose(y, nr, part->b + j * part->ldb + p0, part->ldb, cols, k);
        return;
    }
    const int64_t wide = part->packed->k;
    if (part->kind == APTI_B_PACKED) {           /* only bf16 comes here */
        kernels->expand(y, (const uint16_t *)part->packed->data + (j / nr * wide + p0) * nr, k * nr);
        return;
    }
    for (int64_t p = 0; p < k;) {                /* transposed: p is an out feature, so it runs through panels of W */
        const int64_t inside = (p0 + p) % nr, rows = apti_min_i64(nr - inside, k - p);
        const int64_t at = ((p0 + p) / nr * wide + j) * nr;
        float block[APTI_NR_MAX * APTI_NR_MAX];
        const float *x = block;
        if (part->packed->type == APT_F32) x = (const float *)part->packed->data + at;
        else kernels->expand(block, (const uint16_t *)part->packed->data + at, cols * nr);
        kernels->transpose(y + p * nr, nr, x + inside, nr, cols, rows);
        p += rows;
    }
}

/* A plain B (of whole panels) is read in place when too few strips would pay for the copy. */
static bool apti_in_place(const apti_gemm_tile *t, const apti_gemm_part *part)
{
    return part->kind == APTI_B_PLAIN && t->i1 - t->i0 <= 2 * t->kernels->mr;
}

static apti_b_view apti_view_b(const apti_gemm_tile *t, const apti_gemm_part *part, int64_t p0, int64_t k, float *scratch)
{
    const int64_t nr = t->kernels->nr;
    apti_b_view view = APT_ZERO;
    view.step = nr;
    if (part->kind == APTI_B_PACKED && part->packed->type == APT_F32) {
        view.panel = part->packed->k * nr;
        view.data = (const float *)part->packed->data + t->j0 / nr * view.panel + p0 * nr;
        return view;
    }
    if (apti_in_place(t, part) && (t->j1 - t->j0) % nr == 0) {
        view.data = part->b + p0 * part->ldb + t->j0;
        view.step = part->ldb;
        view.panel = nr;
        return view;
    }
    for (int64_t p = 0; p < k; p += APTI_GEMM_PACK) {
        const int64_t rows = apti_min_i64(APTI_GEMM_PACK, k - p);
        for (int64_t j = t->j0; j < t->j1; j += nr)
            apti_pack_panel(t->kernels, scratch + (j - t->j0) * k + p * nr, part, p0 + p, rows, j, apti_min_i64(nr, t->j1 - j));
    }
    view.data = scratch;
    view.panel = k * nr;
    return view;
}

/* Rows i0 .. i0+rows of A as strips. A transposed A (a_col != 1) is copied, because its columns are far apart. */
static void apti_pack_a(const apti_gemm_tile *t, float *y, const apti_gemm_part *part, int64_t i0, int64_t rows,
    int64_t strips, int64_t p0, int64_t k)
{
    for (int64_t p = 0; p < k; p += APTI_GEMM_PACK) {
        const float *a = part->a + i0 * part->a_row + (p0 + p) * part->a_col;
        for (int64_t s = 0, r0 = 0, r1; s < strips; s++, r0 = r1) {
            r1 = rows * (s + 1) / strips;
            t->kernels->copy(y + r0 * k + s * APTI_STRIP_GAP + p * (r1 - r0), r1 - r0, a + r0 * part->a_row, part->a_col,
                apti_min_i64(APTI_GEMM_PACK, k - p), r1 - r0);
        }
    }
}

static bool apti_needs_pack_a(const apti_gemm_part *part)
{
    return part->a_col > APTI_NR_MAX;
}

/* Everything after the sums for one strip of one panel: z is in `from`. */
static void apti_gemm_finish(const apti_kernels *kernels, const apti_gemm *g, int64_t i, int64_t j, int64_t rows, int64_t cols,
    const float *z, int64_t ldz)
{
    apti_finish f = APT_ZERO;
    f.rows = rows;
    f.cols = cols;
    f.z = z;
    f.ldz = ldz;
    f.c = g->c + i * g->ldc + j;
    f.ldc = g->ldc;
    f.bias = g->bias != NULL && g->accumulate ? g->bias + j : NULL;
    f.mask = g->mask != NULL ? g->mask + j : NULL;
    f.residual = g->residual != NULL ? g->residual + i * g->ld_residual + j : NULL;
    f.ld_residual = g->ld_residual;
    f.pre = g->pre != NULL ? g->pre + i * g->ld_pre + j : NULL;
    if (f.pre == z && f.bias == NULL) f.pre = NULL;              /* it is there already */
    f.ld_pre = g->ld_pre;
    f.act = g->act;
    kernels->finish(&f);
}

/* Brings n <= 32 floats into the cache, to be written. */
#ifdef __GNUC__
#define APTI_FETCH_ROW(p, n) (__builtin_prefetch(p, 1, 3), __builtin_prefetch((p) + (n) - 1, 1, 3))
#else
#define APTI_FETCH_ROW(p, n) ((void)(p))
#endif

static bool apti_has_epilogue(const apti_gemm *g)
{
    return (g->bias != NULL && g->accumulate) || g->pre != NULL || g->act >= 0 || g->residual != NULL || g->mask != NULL;
}

/* One stretch of the reduction for the whole tile. */
typedef struct apti_k_step {
    const apti_gemm_part *part[2];               /* NULL: none */
    int64_t p0[2], k[2];
    bool first, last;
} apti_k_step;

static void apti_move(float *y, int64_t ldy, const float *x, int64_t ldx, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r++) memcpy(y + r * ldy, x + r * ldx, (size_t)cols * sizeof(float));
}

/* One strip of one panel: rows x cols of C at (i, j). The sums grow where z is wanted: in pre, or else in c; or aside in
   t->sums, when c still holds the residual; and at the right edge in a whole tile of our own. */
static void apti_gemm_strip(const apti_gemm_tile *t, const apti_k_step *step, apti_tile *tile, int64_t i, int64_t j)
{
    const apti_gemm *g = t->g;
    const int64_t nr = t->kernels->nr, rows = tile->rows, cols = tile->cols, ld_sums = apti_round_up(t->j1 - t->j0, nr);
    const int64_t ldz = g->pre != NULL ? g->ld_pre : g->ldc;
    APTI_ALIGN64 float edge[APTI_MR_MAX * APTI_NR_MAX];
    float *c = g->c + i * g->ldc + j, *z = g->pre != NULL ? g->pre + i * ldz + j : c;
    const bool parked = t->sums != NULL, own = cols < nr && !parked;
    if (cols < nr) memset(edge, 0, sizeof edge);                 /* the lanes past the edge hold numbers, too */
    tile->to = parked ? t->sums + (i - t->i0) * ld_sums + (j - t->j0) : own ? edge : z;
    tile->ld_to = parked ? ld_sums : own ? nr : ldz;
    tile->from = tile->to;
    tile->ld_from = tile->ld_to;
    if (!step->first) {
        if (own) apti_move(edge, nr, z, ldz, rows, cols);
    } else if (g->accumulate) {
        tile->from = cols < nr ? edge : c;
        tile->ld_from = cols < nr ? nr : g->ldc;
        if (cols < nr) apti_move(edge, nr, c, g->ldc, rows, cols);
    } else {
        tile->from = g->bias == NULL ? NULL : cols < nr ? edge : g->bias + j;
        tile->ld_from = 0;
        if (g->bias != NULL && cols < nr) memcpy(edge, g->bias + j, (size_t)cols * sizeof(float));
    }
    const bool finish = step->last && apti_has_epilogue(g);
    if (finish && tile->to != c)
        for (int64_t r = 0; r < rows; r++) APTI_FETCH_ROW(c + r * g->ldc, cols);
    t->kernels->tile(tile);
    if (finish) apti_gemm_finish(t->kernels, g, i, j, rows, cols, tile->to, tile->ld_to);
    else if (own || (parked && step->last)) apti_move(z, ldz, tile->to, tile->ld_to, rows, cols);
}

/* The same for a flipped product: always through a tile of our own, because C is stored the other way round. */
static void apti_gemm_strip_flipped(const apti_gemm_tile *t, const apti_k_step *step, apti_tile *tile, int64_t i, int64_t j)
{
    const apti_gemm *g = t->g;
    APTI_ALIGN64 float edge[APTI_MR_MAX * APTI_NR_MAX];
    float *c = g->c + j * g->ldc + i;
    memset(edge, 0, sizeof edge);
    tile->to = edge;
    tile->from = step->first && !g->accumulate ? NULL : edge;
    tile->ld_to = tile->ld_from = t->kernels->nr;
    tile->next = edge;
    if (tile->from != NULL) t->kernels->transpose(edge, tile->ld_to, c, g->ldc, tile->cols, tile->rows);
    t->kernels->tile(tile);
    t->kernels->transpose(c, g->ldc, edge, tile->ld_to, tile->rows, tile->cols);
}

static void apti_gemm_rows(const apti_gemm_tile *t, const apti_k_step *step, const apti_b_view view[2], int64_t i0, int64_t rows)
{
    const int64_t nr = t->kernels->nr, mr = t->j1 - t->j0 <= t->kernels->lanes ? t->kernels->slim : t->kernels->mr;
    const int64_t strips = apti_ceil_div(rows, mr);
    float *pack_a[2] = {NULL, NULL}, *free_a = t->pack_a;
    for (int32_t q = 0; q < 2; q++) {
        if (step->part[q] == NULL || !apti_needs_pack_a(step->part[q])) continue;
        pack_a[q] = free_a;
        apti_pack_a(t, free_a, step->part[q], i0, rows, strips, step->p0[q], step->k[q]);
        free_a += rows * step->k[q] + strips * APTI_STRIP_GAP;
    }
    apti_tile tile = APT_ZERO;
    for (int64_t j = t->j0; j < t->j1; j += nr) {
        tile.cols = (int32_t)apti_min_i64(nr, t->j1 - j);
        for (int32_t q = 0; q < 2 && step->part[q] != NULL; q++) {
            tile.segment[q].b = view[q].data + (j - t->j0) / nr * view[q].panel;
            tile.segment[q].b_step = view[q].step;
        }
        for (int64_t s = 0, r0 = 0, r1; s < strips; s++, r0 = r1) {
            r1 = rows * (s + 1) / strips;
            tile.rows = (int32_t)(r1 - r0);
            for (int32_t q = 0; q < 2 && step->part[q] != NULL; q++) {
                apti_segment *segment = &tile.segment[q];
                const apti_gemm_part *part = step->part[q];
                segment->k = step->k[q];
                if (pack_a[q] != NULL) segment->a = pack_a[q] + r0 * step->k[q] + s * APTI_STRIP_GAP;
                else segment->a = part->a + (i0 + r0) * part->a_row + step->p0[q] * part->a_col;
                segment->a_row = pack_a[q] != NULL ? 1 : part->a_row;
                segment->a_col = pack_a[q] != NULL ? r1 - r0 : part->a_col;
            }
            const int64_t next_i = i0 + (r1 < rows ? r1 : 0), next_j = r1 < rows || j + nr >= t->j1 ? j : j + nr;
            tile.next = t->g->pre != NULL ? t->g->pre + next_i * t->g->ld_pre + next_j : t->g->c + next_i * t->g->ldc + next_j;
            if (t->g->flip) apti_gemm_strip_flipped(t, step, &tile, i0 + r0, j);
            else apti_gemm_strip(t, step, &tile, i0 + r0, j);
        }
    }
}

/* All of one tile. The first part is cut into k blocks, then the second; a short second part joins the last block. */
static void apti_gemm_compute(const apti_gemm_tile *t)
{
    const apti_gemm *g = t->g;
    int64_t done = 0, total = g->part[0].k + g->part[1].k;
    do {
        apti_k_step step = APT_ZERO;
        apti_b_view view[2] = {APT_ZERO, APT_ZERO};
        step.first = done == 0;
        for (int32_t q = 0; q < 2 && done < total; q++) {
            const int32_t which = done < g->part[0].k ? 0 : 1;
            const int64_t p0 = which == 0 ? done : done - g->part[0].k, left = g->part[which].k - p0;
            if (q == 1 && (which == 0 || left > APTI_GEMM_TAIL)) break;
            step.part[q] = &g->part[which];
            step.p0[q] = p0;
            step.k[q] = apti_min_i64(left, apti_ceil_div(g->part[which].k, apti_ceil_div(g->part[which].k, t->k_block)));
            view[q] = apti_view_b(t, step.part[q], p0, step.k[q], t->pack_b[q]);
            done += step.k[q];
            if (which == 1) break;
        }
        step.last = done >= total;
        for (int64_t i = t->i0; i < t->i1; i += APTI_GEMM_ROWS)
            apti_gemm_rows(t, &step, view, i, apti_min_i64(APTI_GEMM_ROWS, t->i1 - i));
    } while (done < total);
}

/* A thin product: at most 3 rows over packed weights, for one or two panels from column j. */
static void apti_gemm_thin(const apti_gemm_tile *t, int64_t j)
{
    const apti_gemm *g = t->g;
    const int64_t nr = t->kernels->nr, cols = apti_min_i64(2 * nr, t->j1 - j);
    float c[APTI_THIN_ROWS * 2 * APTI_NR_MAX];
    apti_tile tile = APT_ZERO;
    tile.rows = (int32_t)g->m;
    tile.to = c;
    tile.from = c;
    tile.ld_to = tile.ld_from = 2 * nr;
    memset(c, 0, sizeof c);
    for (int64_t r = 0; r < g->m; r++) {
        const float *start = g->accumulate ? g->c + r * g->ldc : g->bias;
        if (start != NULL) memcpy(c + r * 2 * nr, start + j, (size_t)cols * sizeof(float));
    }
    for (int32_t q = 0; q < 2; q++) {
        const apti_gemm_part *part = &g->part[q];
        apti_segment *s = &tile.segment[q];
        if ((s->k = part->k) == 0) continue;
        s->a = part->a;
        s->a_row = part->a_row;
        s->a_col = part->a_col;
        s->b_step = nr;
        if (part->kind == APTI_B_PACKED) {
            const int64_t at = j / nr * part->k * nr;
            s->bf16 = part->packed->type == APT_BF16;
            s->b = s->bf16 ? (const void *)((const uint16_t *)part->packed->data + at)
                : (const void *)((const float *)part->packed->data + at);
            s->b_panel = cols > nr ? part->k * nr : 0;
        } else {
            s->b = t->pack_b[q];
            s->b_panel = cols > nr ? part->k * nr : 0;
            for (int64_t l = 0; l < cols; l += nr)
                apti_pack_panel(t->kernels, t->pack_b[q] + l * part->k, part, 0, part->k, j + l, apti_min_i64(nr, cols - l));
        }
    }
    t->kernels->thin(&tile);
    apti_gemm_finish(t->kernels, g, 0, j, g->m, cols, c, 2 * nr);
}

static bool apti_is_thin(const apti_gemm *g)
{
    if (g->m > APTI_THIN_ROWS || g->part[0].kind != APTI_B_PACKED) return false;
    return g->part[1].kind == APTI_B_PACKED || g->part[1].k <= APTI_GEMM_TAIL;
}

/* C[i0..i1) x [j0..j1), in pieces that fit the scratch. j0 is a multiple of nr. */
static void apti_gemm_region(const apti_kernels *kernels, const apti_gemm *g, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
    void *scratch, size_t scratch_bytes)
{
    /* floats per column: two packed panels of B and the sums; per row block: packed A */
    const bool park = g->residual == g->c && g->c != NULL && g->pre == NULL;
    const int64_t nr = kernels->nr, floats = (int64_t)(scratch_bytes / sizeof(float));
    apti_gemm_tile t = APT_ZERO;
    t.kernels = kernels;
    t.g = g;
    t.k_block = APTI_GEMM_K;
    /* a strip has 4 rows or more */
    const int64_t a_floats = APTI_GEMM_ROWS * (t.k_block + APTI_GEMM_TAIL + 2 * APTI_STRIP_GAP / 4);
    int64_t cols = apti_min_i64(APTI_GEMM_COLS, (floats - a_floats) / (t.k_block + APTI_GEMM_TAIL + (park ? APTI_GEMM_ROWS : 0)));
    cols = apti_max_i64(nr, cols / nr * nr);
    t.pack_a = (float *)scratch;
    t.pack_b[0] = t.pack_a + a_floats;
    t.pack_b[1] = t.pack_b[0] + cols * t.k_block;
    float *sums = t.pack_b[1] + cols * APTI_GEMM_TAIL;
    if (park) t.sums = sums;
    const int64_t rows = park ? APTI_GEMM_ROWS : i1 - i0;
    for (int64_t j = j0; j < j1; j += cols) {
        for (int64_t i = i0; i < i1; i += rows) {
            t.i0 = i;
            t.i1 = apti_min_i64(i1, i + rows);
            t.j0 = j;
            t.j1 = apti_min_i64(j1, j + cols);
            apti_gemm_compute(&t);
        }
    }
}

static void apti_gemm_thin_region(const apti_kernels *kernels, const apti_gemm *g, int64_t j0, int64_t j1, void *scratch)
{
    apti_gemm_tile t = APT_ZERO;
    t.kernels = kernels;
    t.g = g;
    t.j1 = j1;
    t.pack_b[0] = (float *)scratch;
    t.pack_b[1] = t.pack_b[0];                   /* only the second part is ever packed */
    for (int64_t j = j0; j < j1; j += 2 * kernels->nr) apti_gemm_thin(&t, j);
}

/* dB += dy^T x of a low rank: a tall, narrow C from a transposed A. Computed as the transposed product, so that the large
   matrix dy takes the place of B, is read row by row where it is, and no lane of a vector idles. */
static bool apti_gemm_flip(const apti_kernels *kernels, apti_gemm *f, const apti_gemm *g)
{
    const apti_gemm_part *part = &g->part[0];
    if (part->a_row != 1 || part->a_col == 1 || part->kind != APTI_B_PLAIN || g->part[1].k > 0) return false;
    if (g->n > 2 * kernels->mr || g->m <= g->n || g->bias != NULL || apti_has_epilogue(g)) return false;
    *f = *g;
    f->m = g->n;
    f->n = g->m;
    f->part[0].a = part->b;
    f->part[0].a_col = part->ldb;
    f->part[0].b = part->a;
    f->part[0].ldb = part->a_col;
    f->flip = true;
    return true;
}

/* Few columns and no matrix packed for the long vectors: the short ones waste less. The result is the same bit for bit. */
static const apti_kernels *apti_gemm_kernels(const apti_kernels *kernels, const apti_gemm *g)
{
    const bool free_of_panels = (g->part[0].k == 0 || g->part[0].kind >= APTI_B_PLAIN) &&
        (g->part[1].k == 0 || g->part[1].kind >= APTI_B_PLAIN);
    return kernels->narrow != NULL && g->n <= kernels->narrow->lanes && free_of_panels ? kernels->narrow : kernels;
}

/* For use inside a task. scratch: 64-byte aligned, APTI_GEMM_SCRATCH bytes. */
static void apti_gemm_serial(const apti_kernels *kernels, const apti_gemm *g, void *scratch, size_t scratch_bytes)
{
    if (g->m <= 0 || g->n <= 0) return;
    apti_gemm flipped;
    if (apti_gemm_flip(kernels, &flipped, g)) g = &flipped;
    kernels = apti_gemm_kernels(kernels, g);
    if (apti_is_thin(g)) apti_gemm_thin_region(kernels, g, 0, g->n, scratch);
    else apti_gemm_region(kernels, g, 0, g->m, 0, g->n, scratch, scratch_bytes);
}

static void apti_gemm_task(int64_t index, int32_t thread, void *arg)
{
    const apti_gemm_job *job = (const apti_gemm_job *)arg;
    const apti_gemm *g = job->g;
    const int64_t nr = job->kernels->nr, im = index % job->tiles_m, in = index / job->tiles_m;
    const int64_t i0 = g->m * im / job->tiles_m, i1 = g->m * (im + 1) / job->tiles_m;
    const int64_t j0 = job->panels * in / job->tiles_n * nr, j1 = apti_min_i64(g->n, job->panels * (in + 1) / job->tiles_n * nr);
    if (job->thin) apti_gemm_thin_region(job->kernels, g, j0, j1, job->ctx->scratch[thread]);
    else apti_gemm_region(job->kernels, g, i0, i1, j0, j1, job->ctx->scratch[thread], job->ctx->scratch_bytes);
}

/* How many tiles: small enough that the threads end together, large enough that packing (B once per row of tiles, A once
   per column of tiles) and the traffic from the outer caches (rows + cols per rows x cols) are paid for. */
static void apti_gemm_cut(apti_gemm_job *job, int32_t threads)
{
    const apti_gemm *g = job->g;
    const bool pack_b = g->part[0].k > 0 && (g->part[0].kind != APTI_B_PACKED || g->part[0].packed->type != APT_F32);
    const bool pack_a = g->part[0].a_col != 1;
    const double work = (double)g->m * (double)g->n * (double)(g->part[0].k + g->part[1].k);
    const int64_t share = threads == 1 ? 1 : (pack_a && pack_b ? 2 : 8) * threads;
    const int64_t wanted = apti_min_i64(share, 1 + (int64_t)(work / APTI_GEMM_TASK));
    job->panels = apti_ceil_div(g->n, job->kernels->nr);
    job->tiles_m = job->tiles_n = 1;
    if (job->thin) {
        job->tiles_n = apti_min_i64(wanted, apti_ceil_div(job->panels, 2));
        return;
    }
    const bool tall = pack_b && !pack_a;
    const int64_t rows = tall ? APTI_GEMM_TALL : 2 * APTI_GEMM_ROWS, cols = tall ? APTI_GEMM_SLIM : APTI_GEMM_COLS;
    job->tiles_m = apti_ceil_div(g->m, rows);
    job->tiles_n = apti_ceil_div(g->n, cols);
    while (job->tiles_m * job->tiles_n < wanted) {
        const double high = (double)g->m / (double)job->tiles_m, wide = (double)g->n / (double)job->tiles_n;
        const bool cut_m = high >= 2 * job->kernels->mr, cut_n = job->tiles_n * 2 <= job->panels;
        if (!cut_m && !cut_n) break;
        const double prefer = pack_b == pack_a ? 1.0 : pack_b ? 0.25 : 4.0;
        if (cut_m && (!cut_n || high * prefer > wide)) job->tiles_m *= 2;
        else job->tiles_n *= 2;
    }
}

static void apti_gemm_run(apt_ctx *ctx, const apti_gemm *g)
{
    if (g->m <= 0 || g->n <= 0) return;
    apti_gemm flipped;
    apti_gemm_job job = APT_ZERO;
    job.ctx = ctx;
    job.g = apti_gemm_flip(ctx->kernels, &flipped, g) ? &flipped : g;
    job.kernels = apti_gemm_kernels(ctx->kernels, job.g);
    job.thin = apti_is_thin(job.g);
    apti_gemm_cut(&job, ctx->threads);
    apti_parallel_for(ctx, job.tiles_m * job.tiles_n, apti_gemm_task, &job);
}
#endif /* APT_ONLY_CORE */
#ifndef APT_ONLY_CORE
// >>ops
/* ---------------------------------------------------------------------------------------------------------------------
   Ops: forward functions, each with its backward right below

   Matrices are row-major with a leading dimension in floats. Gradients of parameters are added (+=), everything else is
   overwritten unless a comment says otherwise. Nothing is allocated and nothing checked here: the model did both.
   Work is cut into tasks whose borders depend on the shapes alone and every sum has one fixed order, so no result
   depends on the number of threads.
   ------------------------------------------------------------------------------------------------------------------ */

enum {
    APTI_OPS_ELEMENTS = 32768,        /* floats of a row-wise task: large against the hand-out of a task, small against a cache */
    APTI_OPS_COLUMNS = 64,            /* columns of a column-wise task: four cache lines */
    APTI_OPS_WIDE = 1024,             /* the same where rows are walked: long pieces of few pages */
    APTI_OPS_SLAB = 65536,            /* columns whose sums are gathered at once */
    APTI_OPS_FOLD = 64,               /* rows added up in float before they go to a double */
    APTI_OPS_BLOCK = 64,              /* vectors that a kernel adds up before they go to a double */
    APTI_OPS_LANES = 16,              /* widest vector of any table */
    APTI_OPS_PARTS = 64               /* partial sums of a loss or a sum over rows, at most */
};

/* Second half of the thread's scratch; the first half is lent to apti_gemm_serial. */
static float *apti_ops_scratch(const apt_ctx *ctx, int32_t thread)
{
    return (float *)(void *)((char *)ctx->scratch[thread] + ctx->scratch_bytes / 2);
}

/* Rows of a task when a row has n floats. */
static int64_t apti_ops_rows(int64_t n)
{
    return apti_min_i64(256, apti_max_i64(1, APTI_OPS_ELEMENTS / (n + 1)));
}

/* A sum with nearly the error of a double sum for the price of a float one: vector sums of short blocks, added in double. */
static double apti_ops_sum(const apti_kernels *kernels, const float *x, int64_t n)
{
    const int64_t block = APTI_OPS_BLOCK * kernels->lanes;
    double total = 0;
    for (int64_t i = 0; i < n; i += block) total += (double)kernels->sum(x + i, apti_min_i64(block, n - i));
    return total;
}

static double apti_ops_dot(const apti_kernels *kernels, const float *a, const float *b, int64_t n)
{
    const int64_t block = APTI_OPS_BLOCK * kernels->lanes;
    double total = 0;
    for (int64_t i = 0; i < n; i += block) total += (double)kernels->dot(a + i, b + i, apti_min_i64(block, n - i));
    return total;
}

static double apti_ops_sq_dev(const apti_kernels *kernels, const float *z, float mean, int64_t n)
{
    const int64_t block = APTI_OPS_BLOCK * kernels->lanes;
    double total = 0;
    for (int64_t i = 0; i < n; i += block) total += (double)kernels->sq_dev(z + i, mean, apti_min_i64(block, n - i));
    return total;
}

static void apti_ops_fill(float *y, float value, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] = value;
}

/* ---- column sums ------------------------------------------------------------------------------------------------- */

/* Sums over rows run in two steps: tasks add up chunks of rows in float, each into a row of its own, then these rows are added
   in order in double. The rows lie in the first half of the scratch of thread 0, which no such task uses otherwise. */
static float *apti_ops_partial(const apt_ctx *ctx)
{
    return (float *)ctx->scratch[0];
}

/* Rows of a chunk: at least `least`, so many that the partial sums of `width` floats each find room */
static int64_t apti_ops_chunk(const apt_ctx *ctx, int64_t rows, int64_t width, int64_t least)
{
    const int64_t room = (int64_t)(ctx->scratch_bytes / 2 / sizeof(float)) / width;
    return apti_max_i64(least, apti_ceil_div(rows, apti_max_i64(1, apti_min_i64(APTI_OPS_PARTS, room))));
}

typedef struct apti_fold_job {
    float *acc;
    const float *partial, *mask;
    int64_t chunks, stride, n;
} apti_fold_job;

static void apti_fold_task(int64_t index, int32_t thread, void *arg)
{
    const apti_fold_job *job = (const apti_fold_job *)arg;
    const int64_t c0 = index * APTI_OPS_COLUMNS, w = apti_min_i64(APTI_OPS_COLUMNS, job->n - c0);
    double total[APTI_OPS_COLUMNS] = {0};
    (void)thread;
    for (int64_t c = 0; c < job->chunks; c++)
        for (int64_t j = 0; j < w; j++) total[j] += (double)job->partial[c * job->stride + c0 + j];
    for (int64_t j = 0; j < w; j++) {
        const double m = job->mask ? (double)job->mask[c0 + j] : 1.0;
        job->acc[c0 + j] = (float)((double)job->acc[c0 + j] + m * total[j]);
    }
}

/* acc(n) += mask * sum of `chunks` rows at partial; mask NULL: ones */
static void apti_fold_run(apt_ctx *ctx, float *acc, const float *partial, int64_t stride, int64_t chunks, int64_t n,
                          const float *mask)
{
    apti_fold_job job = APT_ZERO;
    job.acc = acc;
    job.partial = partial;
    job.mask = mask;
    job.chunks = chunks;
    job.stride = stride;
    job.n = n;
    apti_parallel_for(ctx, apti_ceil_div(n, APTI_OPS_COLUMNS), apti_fold_task, &job);
}

typedef struct apti_column_job {
    const apti_kernels *kernels;
    float *partial;
    const float *x;
    int64_t ldx, rows, n, chunk, blocks;
    bool absolute;
} apti_column_job;

/* Task (chunk of rows, block of columns) */
static void apti_column_task(int64_t index, int32_t thread, void *arg)
{
    const apti_column_job *job = (const apti_column_job *)arg;
    const int64_t c0 = index % job->blocks * APTI_OPS_WIDE, w = apti_min_i64(APTI_OPS_WIDE, job->n - c0);
    const int64_t first = index / job->blocks * job->chunk, end = apti_min_i64(job->rows, first + job->chunk);
    float *sum = job->partial + index / job->blocks * job->n + c0;
    (void)thread;
    memset(sum, 0, (size_t)w * sizeof(float));
    for (int64_t i = first; i < end; i++) {
        if (job->absolute) job->kernels->abs_add(sum, job->x + i * job->ldx + c0, w);
        else job->kernels->add(sum, sum, job->x + i * job->ldx + c0, w);
    }
}

static void apti_column_run(apt_ctx *ctx, float *acc, const float *x, int64_t ldx, int64_t rows, int64_t n, bool absolute)
{
    for (int64_t c0 = 0; rows > 0 && c0 < n; c0 += APTI_OPS_SLAB) {
        apti_column_job job = APT_ZERO;
        job.kernels = ctx->kernels;
        job.partial = apti_ops_partial(ctx);
        job.x = x + c0;
        job.ldx = ldx;
        job.rows = rows;
        job.n = apti_min_i64(APTI_OPS_SLAB, n - c0);
        job.chunk = apti_ops_chunk(ctx, rows, job.n, APTI_OPS_FOLD);
        job.blocks = apti_ceil_div(job.n, APTI_OPS_WIDE);
        job.absolute = absolute;
        const int64_t chunks = apti_ceil_div(rows, job.chunk);
        apti_parallel_for(ctx, chunks * job.blocks, apti_column_task, &job);
        apti_fold_run(ctx, acc + c0, job.partial, job.n, chunks, job.n, NULL);
    }
}

/* acc(n) += sum over rows of x(rows, n) */
static void apti_column_sum(apt_ctx *ctx, float *acc, const float *x, int64_t ldx, int64_t rows, int64_t n)
{
    apti_column_run(ctx, acc, x, ldx, rows, n, false);
}

/* acc(n) += sum over rows of |x(rows, n)|: one factor of the salience of a feature */
static void apti_column_abs_sum(apt_ctx *ctx, float *acc, const float *x, int64_t ldx, int64_t rows, int64_t n)
{
    apti_column_run(ctx, acc, x, ldx, rows, n, true);
}

/* ---- linear layer with adapter ----------------------------------------------------------------------------------- */

typedef struct apti_linear_op {
    int64_t out, in;
    const apti_packed *w;             /* W(out, in); NULL only when out or in is 0 */
    const float *bias;                /* [out] or NULL */
    int64_t rank;                     /* 0: no adapter */
    float scale;                      /* s */
    const float *a, *b;               /* A(rank, in), B(out, rank), row-major */
} apti_linear_op;

/* What follows the product, in this order: pre = z; z = act(z) (act -1: none); z += residual; z *= mask[column]. */
typedef struct apti_epilogue {
    int32_t act;
    float *pre;
    int64_t ld_pre;
    const float *residual;
    int64_t ld_residual;
    const float *mask;
} apti_epilogue;

typedef struct apti_linear_grad { float *w, *bias, *a, *b; } apti_linear_grad;

typedef struct apti_scale_job { const apti_kernels *kernels; float *x; int64_t n; float s; } apti_scale_job;

static void apti_scale_task(int64_t index, int32_t thread, void *arg)
{
    const apti_scale_job *job = (const apti_scale_job *)arg;
    const int64_t i = index * APTI_OPS_ELEMENTS;
    (void)thread;
    job->kernels->scale(job->x + i, job->x + i, job->s, apti_min_i64(APTI_OPS_ELEMENTS, job->n - i));
}

static void apti_scale_run(apt_ctx *ctx, float *x, int64_t n, float s)
{
    apti_scale_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.x = x;
    job.n = n;
    job.s = s;
    apti_parallel_for(ctx, apti_ceil_div(n, APTI_OPS_ELEMENTS), apti_scale_task, &job);
}

/* An empty product c(m, n); parts and epilogue are filled in by the caller. */
static apti_gemm apti_gemm_begin(float *c, int64_t ldc, int64_t m, int64_t n, bool accumulate)
{
    apti_gemm g = APT_ZERO;
    g.m = m;
    g.n = n;
    g.c = c;
    g.ldc = ldc;
    g.accumulate = accumulate;
    g.act = -1;
    return g;
}

/* a(m, k) with row stride lda */
static void apti_gemm_left(apti_gemm_part *part, const float *a, int64_t lda, int64_t k)
{
    part->a = a;
    part->a_row = lda;
    part->a_col = 1;
    part->k = k;
}

static void apti_gemm_right(apti_gemm_part *part, apti_b_kind kind, const float *b, int64_t ldb)
{
    part->kind = kind;
    part->b = b;
    part->ldb = ldb;
}

static void apti_gemm_packed(apti_gemm_part *part, apti_b_kind kind, const apti_packed *packed)
{
    part->kind = kind;
    part->packed = packed;
}

static void apti_gemm_epilogue(apti_gemm *g, const apti_epilogue *epilogue)
{
    g->act = epilogue->act;
    g->pre = epilogue->pre;
    g->ld_pre = epilogue->ld_pre;
    g->residual = epilogue->residual;
    g->ld_residual = epilogue->ld_residual;
    g->mask = epilogue->mask;
}

/* y(rows, out) = epilogue(x W^T + xa B^T + bias),  xa(rows, rank) = s x A^T
   x(rows, in). The adapter is the second segment of the same product: no second pass over x or y. */
static void apti_linear_forward(apt_ctx *ctx, const apti_linear_op *op, float *y, int64_t ldy, const float *x, int64_t ldx,
                                int64_t rows, float *xa, const apti_epilogue *epilogue)
{
    apti_gemm g = apti_gemm_begin(y, ldy, rows, op->out, false);
    if (rows == 0) return;
    if (op->rank > 0) {
        apti_gemm down = apti_gemm_begin(xa, op->rank, rows, op->rank, false);
        apti_gemm_left(&down.part[0], x, ldx, op->in);
        apti_gemm_right(&down.part[0], APTI_B_PLAIN_T, op->a, op->in);
        apti_gemm_run(ctx, &down);
        apti_scale_run(ctx, xa, rows * op->rank, op->scale);
        apti_gemm_left(&g.part[1], xa, op->rank, op->rank);
        apti_gemm_right(&g.part[1], APTI_B_PLAIN_T, op->b, op->rank);
    }
    apti_gemm_left(&g.part[0], x, ldx, op->in);
    apti_gemm_packed(&g.part[0], APTI_B_PACKED, op->w);
    g.bias = op->bias;
    if (epilogue != NULL) apti_gemm_epilogue(&g, epilogue);
    apti_gemm_run(ctx, &g);
}

/* c(m, n) += a^T b with a(rows, m), b(rows, n): every weight gradient */
static void apti_weight_grad(apt_ctx *ctx, float *c, int64_t m, int64_t n, const float *a, int64_t lda, const float *b,
                             int64_t ldb, int64_t rows)
{
    apti_gemm g = apti_gemm_begin(c, n, m, n, true);
    g.part[0].a = a;
    g.part[0].a_row = 1;
    g.part[0].a_col = lda;
    g.part[0].k = rows;
    apti_gemm_right(&g.part[0], APTI_B_PLAIN, b, ldb);
    apti_gemm_run(ctx, &g);
}

/* dy(rows, out) is the gradient of the value before the activation.
   y = x W^T + xa B^T + bias :  dx (+)= dy W + dya A,  dya(rows, rank) = s dy B,
   dW += dy^T x,  dbias += column sums of dy,  dB += dy^T xa,  dA += dya^T x. A NULL output is not computed. */
static void apti_linear_backward(apt_ctx *ctx, const apti_linear_op *op, float *dx, int64_t lddx, bool accumulate_dx,
                                 const float *dy, int64_t lddy, const float *x, int64_t ldx, const float *xa, float *dya,
                                 int64_t rows, const apti_linear_grad *grad)
{
    const bool adapter = op->rank > 0;
    if (rows == 0) return;
    if (adapter && (dx || (grad && grad->a))) {
        apti_gemm up = apti_gemm_begin(dya, op->rank, rows, op->rank, false);
        apti_gemm_left(&up.part[0], dy, lddy, op->out);
        apti_gemm_right(&up.part[0], APTI_B_PLAIN, op->b, op->rank);
        apti_gemm_run(ctx, &up);
        apti_scale_run(ctx, dya, rows * op->rank, op->scale);
    }
    if (dx) {
        apti_gemm g = apti_gemm_begin(dx, lddx, rows, op->in, accumulate_dx);
        apti_gemm_left(&g.part[0], dy, lddy, op->out);
        apti_gemm_packed(&g.part[0], APTI_B_PACKED_T, op->w);
        if (adapter) {
            apti_gemm_left(&g.part[1], dya, op->rank, op->rank);
            apti_gemm_right(&g.part[1], APTI_B_PLAIN, op->a, op->in);
        }
        apti_gemm_run(ctx, &g);
    }
    if (!grad) return;
    if (grad->w) apti_weight_grad(ctx, grad->w, op->out, op->in, dy, lddy, x, ldx, rows);
    if (grad->bias) apti_column_sum(ctx, grad->bias, dy, lddy, rows, op->out);
    if (adapter && grad->b) apti_weight_grad(ctx, grad->b, op->out, op->rank, dy, lddy, xa, op->rank, rows);
    if (adapter && grad->a) apti_weight_grad(ctx, grad->a, op->rank, op->in, dya, op->rank, x, ldx, rows);
}

/* ---- layer norm, RMS norm ---------------------------------------------------------------------------------------- */

typedef struct apti_norm_job {
    apt_ctx *ctx;
    float *y;                         /* forward: y, backward: dz */
    int64_t ldy;
    const float *z, *dy;
    int64_t ldz, lddy;
    float *stats;                     /* forward: written when not NULL */
    const float *saved;               /* backward: the same, read */
    const float *gamma, *beta, *mask;
    float *partial;                   /* backward: sums for dgamma and dbeta, 2 x d for each task; NULL: not wanted */
    int64_t rows, d, chunk;
    float eps;
    bool rms;                         /* no mean, no beta; the mask only chooses the columns: see apti_rmsnorm_forward */
} apti_norm_job;

/* Arrays of a task in its scratch, [d] each. The statistics of a masked row are taken from its alive columns, gathered into
   `row`: so they are those of the compacted row, bit for bit. */
typedef struct apti_norm_alive {
    int64_t n;                        /* columns with mask != 0 */
    int32_t *index;
    const float *gamma, *beta;        /* times the mask */
    float *keep, *zeros;              /* backward: 1 where alive, else 0; zeros */
    float *row, *x;
    float *dgamma, *dbeta;            /* backward: sums over the rows of the task, or NULL */
} apti_norm_alive;

static void apti_norm_begin(apti_norm_alive *alive, const apti_norm_job *job, int32_t thread)
{
    const int64_t d = apti_round_up(job->d, 16);
    float *scratch = apti_ops_scratch(job->ctx, thread);
    float *gamma = scratch, *beta = scratch + d;
    alive->keep = scratch + 2 * d;
    alive->zeros = scratch + 3 * d;
    alive->row = scratch + 4 * d;
    alive->x = scratch + 5 * d;
    alive->index = (int32_t *)(void *)(scratch + 6 * d);
    alive->gamma = job->mask ? gamma : job->gamma;
    alive->beta = job->mask || job->rms ? beta : job->beta;
    alive->dgamma = alive->dbeta = NULL;
    alive->n = job->mask ? 0 : job->d;
    if (job->rms) memset(beta, 0, (size_t)job->d * sizeof(float));
    for (int64_t j = 0; job->mask && j < job->d; j++) {
        const float m = job->rms && job->mask[j] != 0.0f ? 1.0f : job->mask[j];
        gamma[j] = job->gamma[j] * m;
        beta[j] = job->beta ? job->beta[j] * m : 0.0f;
        if (m != 0.0f) alive->index[alive->n++] = (int32_t)j;
    }
    if (job->saved == NULL) return;   /* forward */
    memset(alive->zeros, 0, (size_t)job->d * sizeof(float));
    for (int64_t j = 0; j < job->d; j++) alive->keep[j] = job->mask && job->mask[j] == 0.0f ? 0.0f : 1.0f;
}

/* mean (RMS: 0) and 1/sqrt(variance + eps) in two passes; the row stays in the L1 cache between them */
static void apti_norm_stats(const apti_kernels *kernels, const float *z, int64_t n, float eps, bool rms, float *mean, float *rstd)
{
    double variance;
    *mean = n > 0 && !rms ? (float)(apti_ops_sum(kernels, z, n) / (double)n) : 0.0f;
    variance = n > 0 ? apti_ops_sq_dev(kernels, z, *mean, n) / (double)n + (double)eps : 0.0;
    *rstd = variance == 0.0 ? 0.0f : (float)(1.0 / sqrt(variance));
}

static void apti_layernorm_forward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_norm_job *job = (const apti_norm_job *)arg;
    const apti_kernels *kernels = job->ctx->kernels;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    apti_norm_alive alive;
    apti_norm_begin(&alive, job, thread);
    for (int64_t i = index * job->chunk; i < end; i++) {
        const float *z = job->z + i * job->ldz, *sample = z;
        float mean, rstd;
        if (job->mask) {
            for (int64_t j = 0; j < alive.n; j++) alive.row[j] = z[alive.index[j]];
            sample = alive.row;
        }
        apti_norm_stats(kernels, sample, alive.n, job->eps, job->rms, &mean, &rstd);
        kernels->norm(job->y + i * job->ldy, z, alive.gamma, alive.beta, mean, rstd, job->d);
        if (!job->stats) continue;
        job->stats[2 * i] = mean;
        job->stats[2 * i + 1] = rstd;
    }
}

static void apti_norm_run(apti_norm_job *job)
{
    job->chunk = apti_ops_rows(job->d);
    apti_parallel_for(job->ctx, apti_ceil_div(job->rows, job->chunk), apti_layernorm_forward_task, job);
}

/* y(rows, d) = mask * (gamma * (z - mean) * rstd + beta), mean and rstd of each row over the dimensions with mask != 0.
   stats(rows, 2) = mean, rstd for the backward, or NULL. y may be z. */
static void apti_layernorm_forward(apt_ctx *ctx, float *y, int64_t ldy, float *stats, const float *z, int64_t ldz,
                                   const float *gamma, const float *beta, const float *mask, int64_t rows, int64_t d, float eps)
{
    apti_norm_job job = APT_ZERO;
    job.ctx = ctx;
    job.y = y;
    job.ldy = ldy;
    job.stats = stats;
    job.z = z;
    job.ldz = ldz;
    job.gamma = gamma;
    job.beta = beta;
    job.mask = mask;
    job.rows = rows;
    job.d = d;
    job.eps = eps;
    apti_norm_run(&job);
}

/* One row: x = (z - mean) * rstd, g = dy * gamma * mask,  dz = rstd * (g - avg(g) - x * avg(g x)) with averages over the alive
   columns and 0 in the others,  dgamma += dy x,  dbeta += dy. dz may be dy, or NULL. RMS: there is no avg(g). */
static void apti_layernorm_backward_row(const apti_kernels *kernels, const apti_norm_alive *alive, float *dz, const float *dy,
                                        const float *z, float mean, float rstd, int64_t d, bool rms)
{
    kernels->norm(alive->x, z, alive->keep, alive->zeros, mean, rstd, d);
    if (alive->dgamma) {
        kernels->mul(alive->row, dy, alive->x, d);
        kernels->add(alive->dgamma, alive->dgamma, alive->row, d);
        kernels->add(alive->dbeta, alive->dbeta, dy, d);
    }
    if (!dz) return;
    kernels->mul(dz, dy, alive->gamma, d);
    const double n = (double)apti_max_i64(1, alive->n);
    const float average = rms ? 0.0f : (float)(apti_ops_sum(kernels, dz, d) / n);
    const float slope = (float)(apti_ops_dot(kernels, dz, alive->x, d) / n);
    kernels->axpy(dz, -slope, alive->x, d);
    kernels->norm(dz, dz, alive->keep, alive->zeros, average, rstd, d);
}

static void apti_layernorm_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_norm_job *job = (const apti_norm_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    apti_norm_alive alive;
    apti_norm_begin(&alive, job, thread);
    if (job->partial) {
        alive.dgamma = job->partial + 2 * index * job->d;
        alive.dbeta = alive.dgamma + job->d;
        memset(alive.dgamma, 0, (size_t)(2 * job->d) * sizeof(float));
    }
    for (int64_t i = index * job->chunk; i < end; i++)
        apti_layernorm_backward_row(job->ctx->kernels, &alive, job->y ? job->y + i * job->ldy : NULL, job->dy + i * job->lddy,
                                    job->z + i * job->ldz, job->saved[2 * i], job->saved[2 * i + 1], job->d, job->rms);
}

static void apti_norm_backward_run(apti_norm_job *job, float *dgamma, float *dbeta)
{
    const float *factor = job->rms ? NULL : job->mask;    /* of dgamma and dbeta: what the forward has put on gamma and beta */
    job->chunk = apti_ops_rows(job->d);
    if (job->rows == 0 || (!job->y && !dgamma && !dbeta)) return;
    if (dgamma || dbeta) {
        job->partial = apti_ops_partial(job->ctx);
        job->chunk = apti_ops_chunk(job->ctx, job->rows, 2 * job->d, job->chunk);
    }
    const int64_t tasks = apti_ceil_div(job->rows, job->chunk);
    apti_parallel_for(job->ctx, tasks, apti_layernorm_backward_task, job);
    if (dgamma) apti_fold_run(job->ctx, dgamma, job->partial, 2 * job->d, tasks, job->d, factor);
    if (dbeta) apti_fold_run(job->ctx, dbeta, job->partial + job->d, 2 * job->d, tasks, job->d, factor);
}

/* dz(rows, d) from dy(rows, d): NULL when not wanted, may be dy; dgamma, dbeta: NULL or +=. The rest as in the forward. */
static void apti_layernorm_backward(apt_ctx *ctx, float *dz, int64_t lddz, float *dgamma, float *dbeta, const float *dy,
                                    int64_t lddy, const float *z, int64_t ldz, const float *stats, const float *gamma,
                                    const float *mask, int64_t rows, int64_t d)
{
    apti_norm_job job = APT_ZERO;
    job.ctx = ctx;
    job.y = dz;
    job.ldy = lddz;
    job.dy = dy;
    job.lddy = lddy;
    job.z = z;
    job.ldz = ldz;
    job.saved = stats;
    job.gamma = gamma;
    job.mask = mask;
    job.rows = rows;
    job.d = d;
    apti_norm_backward_run(&job, dgamma, dbeta);
}

/* y(rows, d) = gamma * z * rstd, rstd = 1/sqrt(mean of z^2 + eps) over the dimensions with mask != 0; y is 0 in the others. Masks
   between 0 and 1 are not factors here: in the models that have this norm, they act where the residual stream is written.
   stats(rows, 2) = 0, rstd for the backward, or NULL. y may be z. */
static void apti_rmsnorm_forward(apt_ctx *ctx, float *y, int64_t ldy, float *stats, const float *z, int64_t ldz,
                                 const float *gamma, const float *mask, int64_t rows, int64_t d, float eps)
{
    apti_norm_job job = APT_ZERO;
    job.ctx = ctx;
    job.y = y;
    job.ldy = ldy;
    job.stats = stats;
    job.z = z;
    job.ldz = ldz;
    job.gamma = gamma;
    job.mask = mask;
    job.rows = rows;
    job.d = d;
    job.eps = eps;
    job.rms = true;
    apti_norm_run(&job);
}

/* y = gamma x, x = z * rstd :  dz = rstd * (g - x * avg(g x)) with g = gamma dy,  dgamma += dy x. dz: NULL when not wanted,
   may be dy; dgamma NULL or +=. */
static void apti_rmsnorm_backward(apt_ctx *ctx, float *dz, int64_t lddz, float *dgamma, const float *dy, int64_t lddy,
                                  const float *z, int64_t ldz, const float *stats, const float *gamma, const float *mask,
                                  int64_t rows, int64_t d)
{
    apti_norm_job job = APT_ZERO;
    job.ctx = ctx;
    job.y = dz;
    job.ldy = lddz;
    job.dy = dy;
    job.lddy = lddy;
    job.z = z;
    job.ldz = ldz;
    job.saved = stats;
    job.gamma = gamma;
    job.mask = mask;
    job.rows = rows;
    job.d = d;
    job.rms = true;
    apti_norm_backward_run(&job, dgamma, NULL);
}

/* ---- rotary positions, relative position bias -------------------------------------------------------------------- */

typedef struct apti_rotary_op {
    int32_t heads, dim;               /* dim: of a head, even */
    bool interleaved;                 /* pairs are (2i, 2i + 1), as llama2.c stores them; else (i, i + dim/2), as Hugging Face */
    const float *table;               /* (rows, dim): the cosines of a row's angles, then the sines */
} apti_rotary_op;

typedef struct apti_rotary_job {
    const apti_rotary_op *op;
    float *x;
    int64_t ldx, rows, chunk;
    float direction;                  /* -1: the backward */
    float *table;
    const int32_t *positions;
    const float *frequency;
} apti_rotary_job;

static void apti_rotary_table_task(int64_t index, int32_t thread, void *arg)
{
    const apti_rotary_job *job = (const apti_rotary_job *)arg;
    const int64_t half = job->op->dim / 2, end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++)
        for (int64_t j = 0; j < half; j++) {
            const float angle = (float)job->positions[i] * job->frequency[j];
            job->table[2 * i * half + j] = cosf(angle);
            job->table[(2 * i + 1) * half + j] = sinf(angle);
        }
}

/* table(rows, dim) of the angles positions[row] * frequency[dim/2], rounded to float before the cosine as everywhere else */
static void apti_rotary_table(apt_ctx *ctx, float *table, const int32_t *positions, const float *frequency, int64_t rows,
                              int32_t dim)
{
    apti_rotary_op op = APT_ZERO;
    apti_rotary_job job = APT_ZERO;
    op.dim = dim;
    job.op = &op;
    job.table = table;
    job.positions = positions;
    job.frequency = frequency;
    job.rows = rows;
    job.chunk = 16;
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_rotary_table_task, &job);
}

static void apti_rotary_task(int64_t index, int32_t thread, void *arg)
{
    const apti_rotary_job *job = (const apti_rotary_job *)arg;
    const apti_rotary_op *op = job->op;
    const int64_t dim = op->dim, half = dim / 2, end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    const int64_t step = op->interleaved ? 2 : 1, partner = op->interleaved ? 1 : half;
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        const float *cosine = op->table + i * dim, *sine = cosine + half;
        for (int32_t h = 0; h < op->heads; h++) {
            float *x = job->x + i * job->ldx + h * dim;
            for (int64_t j = 0; j < half; j++) {
                const float a = x[j * step], b = x[j * step + partner], s = job->direction * sine[j];
                x[j * step] = a * cosine[j] - b * s;
                x[j * step + partner] = b * cosine[j] + a * s;
            }
        }
    }
}

static void apti_rotary_run(apt_ctx *ctx, const apti_rotary_op *op, float *x, int64_t ldx, int64_t rows, float direction)
{
    apti_rotary_job job = APT_ZERO;
    job.op = op;
    job.x = x;
    job.ldx = ldx;
    job.rows = rows;
    job.direction = direction;
    job.chunk = apti_ops_rows((int64_t)op->heads * op->dim);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_rotary_task, &job);
}

/* In place: each pair (a, b) of x(rows, heads*dim) becomes (a cos - b sin, b cos + a sin). */
static void apti_rotary_forward(apt_ctx *ctx, const apti_rotary_op *op, float *x, int64_t ldx, int64_t rows)
{
    apti_rotary_run(ctx, op, x, ldx, rows, 1.0f);
}

/* A rotation: the gradient turns back. In place as well. */
static void apti_rotary_backward(apt_ctx *ctx, const apti_rotary_op *op, float *dx, int64_t lddx, int64_t rows)
{
    apti_rotary_run(ctx, op, dx, lddx, rows, -1.0f);
}

typedef struct apti_relative_op {
    int32_t heads, table_heads;       /* of the layer; columns of the table */
    const int32_t *column;            /* [heads] columns that the layer's heads have in the table, NULL: 0, 1, 2 ... */
    int32_t buckets, max_distance;    /* buckets >= 4 (causal 2), max_distance > half of the exact ones */
    int32_t span;                     /* distances -(span - 1) .. span - 1; max_distance + 1 loses nothing */
    bool causal;
    const int32_t *bucket;            /* [2*span - 1] from apti_relative_buckets: the same for all layers of a stack */
} apti_relative_op;

/* The bucket of distance = key - query. Near distances have buckets of their own, farther ones share them in steps that grow by
   a constant factor up to max_distance. In float as in the original, so that the borders are the same. */
static int32_t apti_relative_bucket(const apti_relative_op *op, int64_t distance)
{
    int32_t buckets = op->buckets, first = 0;
    if (!op->causal) {
        buckets /= 2;
        if (distance > 0) first = buckets;
        distance = distance < 0 ? -distance : distance;
    } else {
        distance = distance < 0 ? -distance : 0;
    }
    const int32_t exact = buckets / 2;
    if (distance < exact) return first + (int32_t)distance;
    const float share = logf((float)distance / (float)exact) / (float)log((double)op->max_distance / (double)exact);
    return first + (int32_t)apti_min_i64(buckets - 1, exact + (int64_t)(share * (float)(buckets - exact)));
}

static void apti_relative_buckets(int32_t *bucket, const apti_relative_op *op)
{
    for (int32_t u = 0; u < 2 * op->span - 1; u++) bucket[u] = apti_relative_bucket(op, u - (op->span - 1));
}

/* bias(heads, 2*span - 1), as apti_attention_op wants it, from table(buckets, table_heads):  bias[h][distance] =
   table[bucket[distance]][column[h]] */
static void apti_relative_forward(const apti_relative_op *op, float *bias, const float *table)
{
    const int64_t wide = 2 * (int64_t)op->span - 1;
    for (int64_t u = 0; u < wide; u++) {
        const float *row = table + (int64_t)op->bucket[u] * op->table_heads;
        for (int32_t h = 0; h < op->heads; h++) bias[h * wide + u] = row[op->column ? op->column[h] : h];
    }
}

/* dtable += : each entry takes in all distances of its bucket */
static void apti_relative_backward(const apti_relative_op *op, float *dtable, const float *dbias)
{
    const int64_t wide = 2 * (int64_t)op->span - 1;
    for (int64_t u = 0; u < wide; u++) {
        float *row = dtable + (int64_t)op->bucket[u] * op->table_heads;
        for (int32_t h = 0; h < op->heads; h++) row[op->column ? op->column[h] : h] += dbias[h * wide + u];
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------

   For sequence s and head h with the key head g = h * kv_heads / heads, all rows relative to the sequence:
       S(i,j) = scale * q_i . k_j + bias[h][distance],  P = softmax over the visible j,  o_i = head_mask[h] * sum_j P(i,j) v_j
   A tile holds APTI_ATTN_Q queries by APTI_ATTN_K keys; tiles are cut from the start of each sequence, so a sequence gives
   the same bits alone and in a batch. The forward keeps a running maximum and sum per query; only
   lse_i = log sum_j exp S(i,j) is kept for the backward, which computes P again tile by tile. Nothing is ever T x T.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apti_attention_op {
    int32_t heads, kv_heads, head_dim;        /* heads: a multiple of kv_heads; head_dim 1..256 */
    float scale;                              /* > 0 */
    bool causal;                              /* key j is visible to query i when j <= i + shift, shift = keys - queries */
    int32_t sequences;
    const int32_t *q_offsets, *k_offsets;     /* [sequences + 1], the same for self attention */
    const int32_t *k_ends;                    /* [sequences] or NULL: k_offsets[1..]. A cache has room behind its keys */
    const float *bias;                        /* NULL or (heads, 2*bias_span - 1), indexed by j - i (- shift when causal) */
    int32_t bias_span;                        /* distances are clamped to -(bias_span - 1) .. bias_span - 1 */
    const float *head_mask;                   /* [heads] or NULL */
} apti_attention_op;

enum {
    APTI_ATTN_Q = 128,
    APTI_ATTN_K = 128,
    APTI_ATTN_BLOCK = 256,            /* queries or keys of a task where sequences are cut; a multiple of both */
    APTI_ATTN_ROWS = 16,              /* rows that go through the passes of the softmax together */
    APTI_HEAD_MAX = 256
};

typedef struct apti_attention_job {
    apt_ctx *ctx;
    const apti_attention_op *op;
    const float *q, *k, *v;
    int64_t ldq, ldk, ldv;
    const float *o;                   /* backward: the forward's output, or NULL */
    float *out;                       /* forward: o */
    int64_t ldo;
    float *lse;                       /* forward: written when not NULL */
    const float *saved;               /* backward: the same, read */
    float *dq, *dk, *dv, *dbias;
    const float *d_o;
    int64_t lddq, lddk, lddv, lddo;
    int64_t blocks;                   /* blocks of the longest sequence */
} apti_attention_job;

/* A matrix in memory, element (i, j) at p[i*row + j*col]; one stride is 1 */
typedef struct apti_operand { const float *p; int64_t row, col; } apti_operand;

/* One sequence and head, the tile at hand in it, and the scratch of the thread */
typedef struct apti_attn {
    const apti_attention_job *job;
    const apti_kernels *kernels;
    int32_t thread, head, group;
    int64_t q_row, k_row;             /* first row of the sequence in the batch */
    int64_t queries, keys;            /* of the sequence */
    int64_t shift;                    /* position of query 0 on the scale of the keys */
    int64_t q0, k0, m, n;             /* the tile: queries q0 .. q0+m, keys k0 .. k0+n */
    int64_t lds;                      /* of s and ds */
    float *s, *ds;                    /* (APTI_ATTN_Q, lds): logits, then P; dP, then dS */
    float *acc;                       /* (APTI_ATTN_Q, head_dim): sum of exp(S - max) v; backward: d_o times the head mask */
    apti_operand d_o;                 /* backward: acc, or the caller's d_o where the mask is 1 */
    float *max, *sum, *dot;           /* [APTI_ATTN_Q] */
    float *diagonal, *d_diagonal;     /* [APTI_ATTN_Q + APTI_ATTN_K]: the bias of a tile depends on j - i only */
    float *zeros;                     /* [APTI_ATTN_K] */
} apti_attn;

static apti_operand apti_operand_of(const float *p, int64_t row, int64_t col)
{
    apti_operand view;
    view.p = p;
    view.row = row;
    view.col = col;
    return view;
}

/* c(m, n) [+]= a(m, k) b(k, n) inside a task */
static void apti_attn_product(const apti_attn *t, float *c, int64_t ldc, bool accumulate, apti_operand a, apti_operand b,
                              int64_t m, int64_t n, int64_t k)
{
    const apt_ctx *ctx = t->job->ctx;
    apti_gemm g = apti_gemm_begin(c, ldc, m, n, accumulate);
    g.part[0].k = k;
    g.part[0].a = a.p;
    g.part[0].a_row = a.row;
    g.part[0].a_col = a.col;
    apti_gemm_right(&g.part[0], b.col == 1 ? APTI_B_PLAIN : APTI_B_PLAIN_T, b.p, b.col == 1 ? b.row : b.col);
    apti_gemm_serial(t->kernels, &g, ctx->scratch[t->thread], ctx->scratch_bytes / 2);
}

/* Starts at sequence `sequence`; the head is chosen by apti_attn_head. */
static void apti_attn_begin(apti_attn *t, const apti_attention_job *job, int32_t thread, int64_t sequence)
{
    const apti_attention_op *op = job->op;
    float *p = apti_ops_scratch(job->ctx, thread);
    t->job = job;
    t->kernels = job->ctx->kernels;
    t->thread = thread;
    t->q_row = op->q_offsets[sequence];
    t->k_row = op->k_offsets[sequence];
    t->queries = op->q_offsets[sequence + 1] - t->q_row;
    t->keys = (op->k_ends ? op->k_ends[sequence] : op->k_offsets[sequence + 1]) - t->k_row;
    t->shift = op->causal ? t->keys - t->queries : 0;
    t->lds = apti_ld(apti_min_i64(t->keys, APTI_ATTN_K));
    t->s = p;
    t->ds = t->s + APTI_ATTN_Q * (APTI_ATTN_K + 32);
    t->acc = t->ds + APTI_ATTN_Q * (APTI_ATTN_K + 32);
    t->max = t->acc + APTI_ATTN_Q * APTI_HEAD_MAX;
    t->sum = t->max + APTI_ATTN_Q;
    t->dot = t->sum + APTI_ATTN_Q;
    t->diagonal = t->dot + APTI_ATTN_Q;
    t->d_diagonal = t->diagonal + APTI_ATTN_Q + APTI_ATTN_K;
    t->zeros = t->d_diagonal + APTI_ATTN_Q + APTI_ATTN_K;
}

static void apti_attn_head(apti_attn *t, int32_t head)
{
    const apti_attention_op *op = t->job->op;
    t->head = head;
    t->group = head / (op->heads / op->kv_heads);
}

/* Keys [0, limit) are visible to query i of the sequence. */
static int64_t apti_attn_limit(const apti_attn *t, int64_t i)
{
    if (!t->job->op->causal) return t->keys;
    return apti_max_i64(0, apti_min_i64(t->keys, i + t->shift + 1));
}

/* The same inside the tile: columns [0, width) of its row i */
static int64_t apti_attn_width(const apti_attn *t, int64_t i)
{
    return apti_max_i64(0, apti_min_i64(t->n, apti_attn_limit(t, t->q0 + i) - t->k0));
}

/* Places the tile at key k0, cut to `end` and to the keys that its last query sees; false: nothing is visible from here on. */
static bool apti_attn_keys(apti_attn *t, int64_t k0, int64_t end)
{
    t->k0 = k0;
    t->n = apti_min_i64(apti_min_i64(APTI_ATTN_K, end - k0), apti_attn_limit(t, t->q0 + t->m - 1) - k0);
    return t->n > 0;
}

static const float *apti_attn_row(const float *p, int64_t ld, int64_t row, int32_t head, const apti_attn *t)
{
    return p + row * ld + (int64_t)head * t->job->op->head_dim;
}

/* Column of the bias table for entry u of the tile's diagonal: row i uses entries m-1-i .. m-1-i+n */
static int64_t apti_attn_distance(const apti_attn *t, int64_t u)
{
    const int64_t last = t->job->op->bias_span - 1, distance = t->k0 - t->q0 - t->shift + u - (t->m - 1);
    return apti_max_i64(-last, apti_min_i64(last, distance)) + last;
}

/* s(m, n) = q k^T of the tile; with a bias s = scale q k^T + bias. Returns the factor that is still missing. */
static float apti_attn_scores(apti_attn *t)
{
    const apti_attention_job *job = t->job;
    const apti_attention_op *op = job->op;
    const apti_operand q = apti_operand_of(apti_attn_row(job->q, job->ldq, t->q_row + t->q0, t->head, t), job->ldq, 1);
    const apti_operand k = apti_operand_of(apti_attn_row(job->k, job->ldk, t->k_row + t->k0, t->group, t), 1, job->ldk);
    apti_attn_product(t, t->s, t->lds, false, q, k, t->m, t->n, op->head_dim);
    if (!op->bias) return op->scale;
    const float *table = op->bias + (int64_t)t->head * (2 * (int64_t)op->bias_span - 1);
    for (int64_t u = 0; u < t->m + t->n - 1; u++) t->diagonal[u] = table[apti_attn_distance(t, u)];
    for (int64_t i = 0; i < t->m; i++) {
        float *s = t->s + i * t->lds;
        t->kernels->scale(s, s, op->scale, t->n);
        t->kernels->add(s, s, t->diagonal + t->m - 1 - i, t->n);
    }
    return 1.0f;
}

/* s -> exp(S - max); the running maximum and sum of each row, and acc, are brought up to date. In three passes over a few rows:
   a kernel that reads what another has just written would wait for the stores. */
static void apti_attn_softmax(const apti_attn *t, float factor)
{
    const apti_kernels *kernels = t->kernels;
    const int64_t dim = t->job->op->head_dim;
    for (int64_t i0 = 0; i0 < t->m; i0 += APTI_ATTN_ROWS) {
        const int64_t i1 = apti_min_i64(t->m, i0 + APTI_ATTN_ROWS);
        float old[APTI_ATTN_ROWS];
        for (int64_t i = i0; i < i1; i++) {
            const int64_t width = apti_attn_width(t, i);
            old[i - i0] = t->max[i];
            if (width > 0) t->max[i] = factor * kernels->max(t->s + i * t->lds, width);
        }
        for (int64_t i = i0; i < i1; i++) {
            const int64_t width = apti_attn_width(t, i);
            float *s = t->s + i * t->lds;
            if (width < t->n) memset(s + width, 0, (size_t)(t->n - width) * sizeof(float));
            if (t->k0 == 0 || width == 0) {
                t->sum[i] = t->k0 == 0 ? 0.0f : t->sum[i];
            } else if (t->max[i] > old[i - i0]) {
                const float shrink = expf(old[i - i0] - t->max[i]);
                kernels->scale(t->acc + i * dim, t->acc + i * dim, shrink, dim);
                t->sum[i] *= shrink;
            } else {
                t->max[i] = old[i - i0];
            }
            kernels->exp_scaled(s, width, factor, t->max[i]);
        }
        for (int64_t i = i0; i < i1; i++) t->sum[i] += kernels->sum(t->s + i * t->lds, apti_attn_width(t, i));
    }
}

/* Rows of o from the last tile. `whole`: the queries see no other keys, so o = (P / sum) v in one product; else acc is complete:
   o = acc / sum. Both times the head mask. lse = max + log sum. A query that sees no key gives 0 and 0. */
static void apti_attn_output(const apti_attn *t, bool whole)
{
    const apti_attention_job *job = t->job;
    const int64_t dim = job->op->head_dim, row = t->q_row + t->q0;
    const float mask = job->op->head_mask ? job->op->head_mask[t->head] : 1.0f;
    const apti_operand v = apti_operand_of(apti_attn_row(job->v, job->ldv, t->k_row, t->group, t), job->ldv, 1);
    float *o = job->out + row * job->ldo + t->head * dim;
    for (int64_t i = 0; i < t->m; i++) {
        const bool blind = apti_attn_limit(t, t->q0 + i) == 0;
        const float factor = blind ? 0.0f : mask / t->sum[i];
        if (whole) t->kernels->scale(t->s + i * t->lds, t->s + i * t->lds, factor, apti_attn_width(t, i));
        else t->kernels->scale(o + i * job->ldo, t->acc + i * dim, factor, dim);
        if (job->lse) job->lse[(row + i) * job->op->heads + t->head] = blind ? 0.0f : t->max[i] + logf(t->sum[i]);
    }
    if (whole) apti_attn_product(t, o, job->ldo, false, apti_operand_of(t->s, t->lds, 1), v, t->m, dim, t->n);
}

/* Rows of queries that see no key at all */
static void apti_attn_blind(const apti_attn *t)
{
    const apti_attention_job *job = t->job;
    for (int64_t i = 0; i < t->m; i++) {
        const int64_t row = t->q_row + t->q0 + i;
        memset(job->out + row * job->ldo + (int64_t)t->head * job->op->head_dim, 0, (size_t)job->op->head_dim * sizeof(float));
        if (job->lse) job->lse[row * job->op->heads + t->head] = 0;
    }
}

/* Task (sequence, head, block of queries) */
static void apti_attention_forward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_attention_job *job = (const apti_attention_job *)arg;
    const apti_attention_op *op = job->op;
    const int64_t pair = index / job->blocks, first = index % job->blocks * APTI_ATTN_BLOCK;
    apti_attn t;
    apti_attn_begin(&t, job, thread, pair / op->heads);
    apti_attn_head(&t, (int32_t)(pair % op->heads));
    const int64_t end = apti_min_i64(t.queries, first + APTI_ATTN_BLOCK);
    for (t.q0 = first; t.q0 < end; t.q0 += APTI_ATTN_Q) {
        t.m = apti_min_i64(APTI_ATTN_Q, end - t.q0);
        const int64_t seen = apti_attn_limit(&t, t.q0 + t.m - 1);
        if (seen == 0) {
            apti_attn_blind(&t);
            continue;
        }
        for (int64_t k0 = 0; k0 < seen; k0 += APTI_ATTN_K) {
            const apti_operand v = apti_operand_of(apti_attn_row(job->v, job->ldv, t.k_row + k0, t.group, &t), job->ldv, 1);
            apti_attn_keys(&t, k0, seen);
            apti_attn_softmax(&t, apti_attn_scores(&t));
            if (seen > APTI_ATTN_K)
                apti_attn_product(&t, t.acc, op->head_dim, k0 > 0, apti_operand_of(t.s, t.lds, 1), v, t.m, op->head_dim, t.n);
        }
        apti_attn_output(&t, seen <= APTI_ATTN_K);
    }
}

static int64_t apti_attention_longest(const int32_t *offsets, int32_t sequences)
{
    int64_t longest = 0;
    for (int32_t s = 0; s < sequences; s++) longest = apti_max_i64(longest, offsets[s + 1] - offsets[s]);
    return longest;
}

/* o(rows_q, heads*dh) from q(rows_q, heads*dh), k and v(rows_k, kv_heads*dh); lse(rows_q, heads) for the backward, or NULL */
static void apti_attention_forward(apt_ctx *ctx, const apti_attention_op *op, float *o, int64_t ldo, float *lse, const float *q,
                                   int64_t ldq, const float *k, int64_t ldk, const float *v, int64_t ldv)
{
    apti_attention_job job = APT_ZERO;
    job.ctx = ctx;
    job.op = op;
    job.q = q;
    job.ldq = ldq;
    job.k = k;
    job.ldk = ldk;
    job.v = v;
    job.ldv = ldv;
    job.out = o;
    job.ldo = ldo;
    job.lse = lse;
    job.blocks = apti_ceil_div(apti_attention_longest(op->q_offsets, op->sequences), APTI_ATTN_BLOCK);
    apti_parallel_for(ctx, (int64_t)op->sequences * op->heads * job.blocks, apti_attention_forward_task, &job);
}

/* The tile's d_o times the head mask: where it is, or copied when there is something to multiply */
static void apti_attn_masked_grad(apti_attn *t)
{
    const apti_attention_job *job = t->job;
    const int64_t dim = job->op->head_dim;
    const float *d_o = apti_attn_row(job->d_o, job->lddo, t->q_row + t->q0, t->head, t);
    const float mask = job->op->head_mask ? job->op->head_mask[t->head] : 1.0f;
    t->d_o = mask == 1.0f ? apti_operand_of(d_o, job->lddo, 1) : apti_operand_of(t->acc, dim, 1);
    for (int64_t i = 0; mask != 1.0f && i < t->m; i++) t->kernels->scale(t->acc + i * dim, d_o + i * job->lddo, mask, dim);
}

/* P = exp(S - lse), and dP = d_o v^T */
static void apti_attn_probabilities(apti_attn *t)
{
    const apti_attention_job *job = t->job;
    const int64_t dim = job->op->head_dim;
    const float *lse = job->saved + (t->q_row + t->q0) * job->op->heads + t->head;
    const float factor = apti_attn_scores(t);
    const apti_operand v = apti_operand_of(apti_attn_row(job->v, job->ldv, t->k_row + t->k0, t->group, t), 1, job->ldv);
    for (int64_t i = 0; i < t->m; i++) {
        const int64_t width = apti_attn_width(t, i);
        float *s = t->s + i * t->lds;
        t->kernels->exp_scaled(s, width, factor, lse[i * job->op->heads]);
        if (width < t->n) memset(s + width, 0, (size_t)(t->n - width) * sizeof(float));
    }
    apti_attn_product(t, t->ds, t->lds, false, t->d_o, v, t->m, t->n, dim);
}

/* dot_i = sum_j P(i,j) dP(i,j), which is also d_o_i . o_i: cheap with the forward's output, else one sweep over the keys */
static void apti_attn_dots(apti_attn *t)
{
    const apti_attention_job *job = t->job;
    const int64_t dim = job->op->head_dim;
    if (job->o) {
        for (int64_t i = 0; i < t->m; i++) {
            const int64_t row = t->q_row + t->q0 + i;
            t->dot[i] = t->kernels->dot(apti_attn_row(job->d_o, job->lddo, row, t->head, t),
                                        apti_attn_row(job->o, job->ldo, row, t->head, t), dim);
        }
        return;
    }
    memset(t->dot, 0, sizeof(float) * APTI_ATTN_Q);
    for (int64_t k0 = 0; apti_attn_keys(t, k0, t->keys); k0 += APTI_ATTN_K) {
        apti_attn_probabilities(t);
        for (int64_t i = 0; i < t->m; i++) {
            const int64_t width = apti_attn_width(t, i);
            if (width > 0) t->dot[i] += t->kernels->dot(t->s + i * t->lds, t->ds + i * t->lds, width);
        }
    }
}

/* dS = P (dP - dot), the gradient of the logits: dbias takes it along the diagonals, dq and dk take it times scale */
static void apti_attn_logit_grad(apti_attn *t)
{
    const apti_attention_job *job = t->job;
    const apti_attention_op *op = job->op;
    const float factor = job->dbias ? 1.0f : op->scale;
    if (job->dbias) memset(t->d_diagonal, 0, (size_t)(t->m + t->n - 1) * sizeof(float));
    for (int64_t i = 0; i < t->m; i++) {
        const int64_t width = apti_attn_width(t, i);
        float *ds = t->ds + i * t->lds, *diagonal = t->d_diagonal + t->m - 1 - i;
        t->kernels->norm(ds, ds, t->s + i * t->lds, t->zeros, t->dot[i], factor, width);
        /* The rows of dS sum to 0. What P and D leave of that by rounding would hide small gradients: it is taken out
           where the tile holds the whole row (measured: 10 times closer to double where values are nearly alike). */
        if (width > 0 && t->n == t->keys)
            t->kernels->axpy(ds, -t->kernels->sum(ds, width) / t->kernels->sum(t->s + i * t->lds, width), t->s + i * t->lds,
                             width);
        if (width < t->n) memset(ds + width, 0, (size_t)(t->n - width) * sizeof(float));
        if (!job->dbias) continue;
        t->kernels->add(diagonal, diagonal, ds, width);
        t->kernels->scale(ds, ds, op->scale, width);
    }
    if (!job->dbias) return;
    float *table = job->dbias + (int64_t)t->head * (2 * (int64_t)op->bias_span - 1);
    for (int64_t u = 0; u < t->m + t->n - 1; u++) table[apti_attn_distance(t, u)] += t->d_diagonal[u];
}

/* dv += P^T d_o,  dk += dS^T q,  dq += dS k; the first tile of a row writes it instead. With a causal mask the first query tile
   sees only some of the keys: the caller has set dk and dv to zero. */
static void apti_attn_grads(const apti_attn *t, bool want_q, bool want_k)
{
    const apti_attention_job *job = t->job;
    const int64_t dim = job->op->head_dim, q_row = t->q_row + t->q0, k_row = t->k_row + t->k0;
    const bool more_k = t->q0 > 0 || t->head % (job->op->heads / job->op->kv_heads) > 0;
    if (want_k && job->dv)
        apti_attn_product(t, job->dv + k_row * job->lddv + t->group * dim, job->lddv, more_k, apti_operand_of(t->s, 1, t->lds),
                          t->d_o, t->n, dim, t->m);
    if (want_k && job->dk)
        apti_attn_product(t, job->dk + k_row * job->lddk + t->group * dim, job->lddk, more_k, apti_operand_of(t->ds, 1, t->lds),
                          apti_operand_of(apti_attn_row(job->q, job->ldq, q_row, t->head, t), job->ldq, 1), t->n, dim, t->m);
    if (want_q && job->dq)
        apti_attn_product(t, job->dq + q_row * job->lddq + t->head * dim, job->lddq, t->k0 > 0, apti_operand_of(t->ds, t->lds, 1),
                          apti_operand_of(apti_attn_row(job->k, job->ldk, k_row, t->group, t), job->ldk, 1), t->m, dim, t->n);
}

static void apti_zero_rows(float *x, int64_t ldx, int64_t rows, int64_t n)
{
    for (int64_t i = 0; i < rows; i++) memset(x + i * ldx, 0, (size_t)n * sizeof(float));
}

/* The part of a sequence that a backward task answers for: dq of queries q0..q1 and dk, dv of keys k0..k1 */
typedef struct apti_attention_range { int64_t q0, q1, k0, k1; bool want_q, want_k; } apti_attention_range;

/* Key head `group` with its query heads. dq takes the key tiles in order, dk and dv the heads and query tiles in order, so a
   sequence that is cut into ranges gives the same bits as one task for all of it. */
static void apti_attention_backward_range(apti_attn *t, int32_t group, const apti_attention_range *range)
{
    const apti_attention_job *job = t->job;
    const apti_attention_op *op = job->op;
    const int32_t share = op->heads / op->kv_heads;
    const int64_t dim = op->head_dim;
    const bool zero_k = range->want_k && (op->causal || range->q0 == range->q1);
    const int64_t k_row = t->k_row + range->k0, k_rows = range->k1 - range->k0;
    memset(t->zeros, 0, sizeof(float) * APTI_ATTN_K);
    if (zero_k && job->dk) apti_zero_rows(job->dk + k_row * job->lddk + group * dim, job->lddk, k_rows, dim);
    if (zero_k && job->dv) apti_zero_rows(job->dv + k_row * job->lddv + group * dim, job->lddv, k_rows, dim);
    for (int32_t head = group * share; head < (group + 1) * share; head++) {
        apti_attn_head(t, head);
        for (t->q0 = range->q0; t->q0 < range->q1; t->q0 += APTI_ATTN_Q) {
            t->m = apti_min_i64(APTI_ATTN_Q, range->q1 - t->q0);
            if (!apti_attn_keys(t, range->k0, range->k1)) {
                if (range->want_q && job->dq)
                    apti_zero_rows(job->dq + (t->q_row + t->q0) * job->lddq + head * dim, job->lddq, t->m, dim);
                continue;
            }
            apti_attn_masked_grad(t);
            apti_attn_dots(t);
            for (int64_t k0 = range->k0; apti_attn_keys(t, k0, range->k1); k0 += APTI_ATTN_K) {
                apti_attn_probabilities(t);
                apti_attn_logit_grad(t);
                apti_attn_grads(t, range->want_q, range->want_k);
            }
        }
    }
}

/* Task (sequence, key head) */
static void apti_attention_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_attention_job *job = (const apti_attention_job *)arg;
    apti_attention_range range = APT_ZERO;
    apti_attn t;
    apti_attn_begin(&t, job, thread, index / job->op->kv_heads);
    range.q1 = t.queries;
    range.k1 = t.keys;
    range.want_q = range.want_k = true;
    apti_attention_backward_range(&t, (int32_t)(index % job->op->kv_heads), &range);
}

/* Task (key head): dbias of a head is a sum over the sequences, taken in order */
static void apti_attention_bias_task(int64_t index, int32_t thread, void *arg)
{
    const apti_attention_job *job = (const apti_attention_job *)arg;
    for (int64_t s = 0; s < job->op->sequences; s++) apti_attention_backward_task(s * job->op->kv_heads + index, thread, arg);
}

/* Task (sequence, key head, dq or dk and dv, block): P is computed twice, but a single long sequence feeds many threads */
static void apti_attention_block_task(int64_t index, int32_t thread, void *arg)
{
    const apti_attention_job *job = (const apti_attention_job *)arg;
    const int64_t first = index % job->blocks * APTI_ATTN_BLOCK, pair = index / job->blocks / 2;
    apti_attention_range range = APT_ZERO;
    apti_attn t;
    apti_attn_begin(&t, job, thread, pair / job->op->kv_heads);
    range.q1 = t.queries;
    range.k1 = t.keys;
    range.want_q = index / job->blocks % 2 == 0;
    range.want_k = !range.want_q;
    if (range.want_q) {
        range.q0 = first;
        range.q1 = apti_min_i64(t.queries, first + APTI_ATTN_BLOCK);
    } else {
        range.k0 = first;
        range.k1 = apti_min_i64(t.keys, first + APTI_ATTN_BLOCK);
    }
    if (range.q0 < range.q1 && range.k0 <= range.k1)
        apti_attention_backward_range(&t, (int32_t)(pair % job->op->kv_heads), &range);
}

/* d_o(rows_q, heads*dh) is the gradient of the masked output o.
   o_i = mask sum_j P(i,j) v_j :  dv_j = sum_i P(i,j) mask d_o_i,  dP = mask d_o v^T,
   P = softmax(S) :               dS = P (dP - dot),  dot_i = sum_j P(i,j) dP(i,j) = d_o_i . o_i,
   S = scale q k^T + bias :       dq = scale dS k,  dk = scale dS^T q,  dbias[h][distance] += dS.
   dq, dk, dv are overwritten, each may be NULL; dbias NULL or (heads, 2*bias_span - 1). o may be NULL at the price of a second
   sweep. No output may alias an input. */
static void apti_attention_backward(apt_ctx *ctx, const apti_attention_op *op, float *dq, int64_t lddq, float *dk, int64_t lddk,
                                    float *dv, int64_t lddv, float *dbias, const float *d_o, int64_t lddo, const float *o,
                                    int64_t ldo, const float *lse, const float *q, int64_t ldq, const float *k, int64_t ldk,
                                    const float *v, int64_t ldv)
{
    const int64_t pairs = (int64_t)op->sequences * op->kv_heads;
    const int64_t longest =
        apti_max_i64(apti_attention_longest(op->q_offsets, op->sequences), apti_attention_longest(op->k_offsets, op->sequences));
    apti_attention_job job = APT_ZERO;
    job.ctx = ctx;
    job.op = op;
    job.q = q;
    job.ldq = ldq;
    job.k = k;
    job.ldk = ldk;
    job.v = v;
    job.ldv = ldv;
    job.o = o;
    job.ldo = ldo;
    job.saved = lse;
    job.dq = dq;
    job.lddq = lddq;
    job.dk = dk;
    job.lddk = lddk;
    job.dv = dv;
    job.lddv = lddv;
    job.dbias = op->bias ? dbias : NULL;
    job.d_o = d_o;
    job.lddo = lddo;
    job.blocks = apti_ceil_div(longest, APTI_ATTN_BLOCK);
    if (job.dbias) apti_parallel_for(ctx, op->kv_heads, apti_attention_bias_task, &job);
    else if (pairs < ctx->threads && longest > 2 * APTI_ATTN_BLOCK)
        apti_parallel_for(ctx, 2 * pairs * job.blocks, apti_attention_block_task, &job);
    else apti_parallel_for(ctx, pairs, apti_attention_backward_task, &job);
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

typedef struct apti_act_job {
    const apti_kernels *kernels;
    float *du;
    const float *da, *pre, *mask;
    int64_t lddu, ldda, ld_pre, rows, n, chunk;
    int32_t act;
} apti_act_job;

static void apti_act_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_act_job *job = (const apti_act_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        const float *da = job->da + i * job->ldda;
        float *du = job->du + i * job->lddu;
        if (job->act >= 0) job->kernels->act_grad(du, da, job->pre + i * job->ld_pre, job->n, job->act);
        if (job->act >= 0) da = du;
        if (job->mask) job->kernels->mul(du, da, job->mask, job->n);
        else if (da != du) memcpy(du, da, (size_t)job->n * sizeof(float));
    }
}

/* The forward is an epilogue of the linear layer: a = mask * act(pre).  Backward: du = da * mask * act'(pre).
   du may be da; mask NULL: ones; act -1: du = da * mask, the backward of a plain column mask. */
static void apti_act_backward(apt_ctx *ctx, float *du, int64_t lddu, const float *da, int64_t ldda, const float *pre,
                              int64_t ld_pre, const float *mask, int64_t rows, int64_t n, int32_t act)
{
    apti_act_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.du = du;
    job.lddu = lddu;
    job.da = da;
    job.ldda = ldda;
    job.pre = pre;
    job.ld_pre = ld_pre;
    job.mask = mask;
    job.rows = rows;
    job.n = n;
    job.act = act;
    job.chunk = apti_ops_rows(n);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_act_backward_task, &job);
}

typedef struct apti_residual_job {
    const apti_kernels *kernels;
    float *y;
    const float *x, *r, *mask;
    int64_t ldy, ldx, ldr, rows, n, chunk;
} apti_residual_job;

static void apti_residual_task(int64_t index, int32_t thread, void *arg)
{
    const apti_residual_job *job = (const apti_residual_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        float *y = job->y + i * job->ldy;
        job->kernels->add(y, job->x + i * job->ldx, job->r + i * job->ldr, job->n);
        if (job->mask) job->kernels->mul(y, y, job->mask, job->n);
    }
}

/* y(rows, n) = mask * (x + r), mask NULL: ones; y may be x or r. A product does the same in its epilogue; this is for when the
   sum's terms are needed apart. */
static void apti_residual(apt_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const float *r, int64_t ldr,
                          const float *mask, int64_t rows, int64_t n)
{
    apti_residual_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.y = y;
    job.ldy = ldy;
    job.x = x;
    job.ldx = ldx;
    job.r = r;
    job.ldr = ldr;
    job.mask = mask;
    job.rows = rows;
    job.n = n;
    job.chunk = apti_ops_rows(n);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_residual_task, &job);
}

typedef struct apti_gate_job {
    apt_ctx *ctx;
    float *h, *du, *dv;
    const float *a, *u, *v, *mask, *dh;
    int64_t ldh, lda, ldu, ldv, lddh, lddu, lddv, rows, n, chunk;
    int32_t act;
} apti_gate_job;

static void apti_gate_forward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_gate_job *job = (const apti_gate_job *)arg;
    const apti_kernels *kernels = job->ctx->kernels;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        float *h = job->h + i * job->ldh;
        kernels->mul(h, job->a + i * job->lda, job->v + i * job->ldv, job->n);
        if (job->mask) kernels->mul(h, h, job->mask, job->n);
    }
}

/* h(rows, n) = mask * a * v, the value of a gated FFN: a = act(u) comes out of one product's epilogue, v out of the other
   product. mask NULL: ones; h may be a or v. */
static void apti_gate_forward(apt_ctx *ctx, float *h, int64_t ldh, const float *a, int64_t lda, const float *v, int64_t ldv,
                              const float *mask, int64_t rows, int64_t n)
{
    apti_gate_job job = APT_ZERO;
    job.ctx = ctx;
    job.h = h;
    job.ldh = ldh;
    job.a = a;
    job.lda = lda;
    job.v = v;
    job.ldv = ldv;
    job.mask = mask;
    job.rows = rows;
    job.n = n;
    job.chunk = apti_ops_rows(n);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_gate_forward_task, &job);
}

static void apti_gate_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_gate_job *job = (const apti_gate_job *)arg;
    const apti_kernels *kernels = job->ctx->kernels;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        const float *dh = job->dh + i * job->lddh, *u = job->u + i * job->ldu;
        float *du = job->du + i * job->lddu, *dv = job->dv + i * job->lddv;
        kernels->act(dv, u, job->n, job->act);
        kernels->mul(dv, dv, dh, job->n);
        if (job->mask) kernels->mul(dv, dv, job->mask, job->n);
        kernels->mul(du, dh, job->v + i * job->ldv, job->n);
        if (job->mask) kernels->mul(du, du, job->mask, job->n);
        kernels->act_grad(du, du, u, job->n, job->act);
    }
}

/* h = mask * act(u) * v :  du = mask * dh * v * act'(u),  dv = mask * dh * act(u). du may be dh; dv is a buffer of its own. */
static void apti_gate_backward(apt_ctx *ctx, float *du, int64_t lddu, float *dv, int64_t lddv, const float *dh, int64_t lddh,
                               const float *u, int64_t ldu, const float *v, int64_t ldv, const float *mask, int64_t rows,
                               int64_t n, int32_t act)
{
    apti_gate_job job = APT_ZERO;
    job.ctx = ctx;
    job.du = du;
    job.lddu = lddu;
    job.dv = dv;
    job.lddv = lddv;
    job.dh = dh;
    job.lddh = lddh;
    job.u = u;
    job.ldu = ldu;
    job.v = v;
    job.ldv = ldv;
    job.mask = mask;
    job.rows = rows;
    job.n = n;
    job.act = act;
    job.chunk = apti_ops_rows(n);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_gate_backward_task, &job);
}

typedef struct apti_tanh_job { const apti_kernels *kernels; float *out; const float *dy, *x; int64_t n; } apti_tanh_job;

static void apti_tanh_forward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_tanh_job *job = (const apti_tanh_job *)arg;
    const int64_t i = index * APTI_OPS_ELEMENTS;
    (void)thread;
    job->kernels->tanh(job->out + i, job->x + i, apti_min_i64(APTI_OPS_ELEMENTS, job->n - i));
}

/* y(n) = tanh(x) */
static void apti_tanh_forward(apt_ctx *ctx, float *y, const float *x, int64_t n)
{
    apti_tanh_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.out = y;
    job.x = x;
    job.n = n;
    apti_parallel_for(ctx, apti_ceil_div(n, APTI_OPS_ELEMENTS), apti_tanh_forward_task, &job);
}

static void apti_tanh_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_tanh_job *job = (const apti_tanh_job *)arg;
    const int64_t end = apti_min_i64(job->n, (index + 1) * APTI_OPS_ELEMENTS);
    (void)thread;
    for (int64_t i = index * APTI_OPS_ELEMENTS; i < end; i++) job->out[i] = job->dy[i] * (1.0f - job->x[i] * job->x[i]);
}

/* dx(n) = dy * (1 - y^2) with y of the forward; dx may be dy */
static void apti_tanh_backward(apt_ctx *ctx, float *dx, const float *dy, const float *y, int64_t n)
{
    apti_tanh_job job = APT_ZERO;
    job.out = dx;
    job.dy = dy;
    job.x = y;
    job.n = n;
    apti_parallel_for(ctx, apti_ceil_div(n, APTI_OPS_ELEMENTS), apti_tanh_backward_task, &job);
}

/* ---- embeddings, gathered rows ----------------------------------------------------------------------------------- */

typedef struct apti_rows_job {        /* embedding, gather and scatter */
    const apti_kernels *kernels;
    float *x;
    const float *from;                /* gather: source; backward and scatter: gradient rows */
    const float *word, *position, *type;
    const int32_t *index, *positions, *types;
    int64_t ldx, ld_from, rows, zero_rows, d, chunk;
} apti_rows_job;

static void apti_embed_forward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_rows_job *job = (const apti_rows_job *)arg;
    const int64_t d = job->d, end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        float *x = job->x + i * job->ldx;
        memcpy(x, job->word + job->index[i] * d, (size_t)d * sizeof(float));
        if (job->position) job->kernels->add(x, x, job->position + job->positions[i] * d, d);
        if (job->type) job->kernels->add(x, x, job->type + (job->types ? job->types[i] * d : 0), d);
    }
}

/* x(rows, d) = word[tokens] + position[positions] + type[types]. Tables have ld d; position or type NULL: no such term;
   types NULL: all 0. */
static void apti_embed_forward(apt_ctx *ctx, float *x, int64_t ldx, const float *word, const float *position, const float *type,
                               const int32_t *tokens, const int32_t *positions, const int32_t *types, int64_t rows, int64_t d)
{
    apti_rows_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.x = x;
    job.ldx = ldx;
    job.word = word;
    job.position = position;
    job.type = type;
    job.index = tokens;
    job.positions = positions;
    job.types = types;
    job.rows = rows;
    job.d = d;
    job.chunk = apti_ops_rows(d);
    apti_parallel_for(ctx, apti_ceil_div(rows, job.chunk), apti_embed_forward_task, &job);
}

/* Columns of x[index[i]] += from[i] in the order of i; index NULL: always row 0. Neighbours with the same index (token types)
   are added up first, which keeps a row that takes thousands of terms exact enough. */
static void apti_scatter_task(int64_t index, int32_t thread, void *arg)
{
    const apti_rows_job *job = (const apti_rows_job *)arg;
    const int64_t c0 = index * APTI_OPS_COLUMNS, w = apti_min_i64(APTI_OPS_COLUMNS, job->d - c0);
    const size_t bytes = (size_t)w * sizeof(float);
    (void)thread;
    for (int64_t i = 0; i < job->zero_rows; i++) memset(job->x + i * job->ldx + c0, 0, bytes);
    for (int64_t i = 0, end; i < job->rows; i = end) {
        const float *from = job->from + i * job->ld_from + c0;
        float *x = job->x + (job->index ? job->index[i] * job->ldx : 0) + c0, sum[APTI_OPS_COLUMNS];
        const int64_t limit = apti_min_i64(job->rows, i + APTI_OPS_FOLD);
        for (end = i + 1; end < limit && (!job->index || job->index[end] == job->index[i]); end++) {
            if (end == i + 1) memcpy(sum, from, bytes);
            job->kernels->add(sum, sum, job->from + end * job->ld_from + c0, w);
        }
        job->kernels->add(x, x, end == i + 1 ? from : sum, w);
    }
}

static void apti_scatter_run(apt_ctx *ctx, float *x, int64_t ldx, const float *from, int64_t ld_from, const int32_t *index,
                             int64_t rows, int64_t d, int64_t zero_rows)
{
    apti_rows_job job = APT_ZERO;
    job.kernels = ctx->kernels;
    job.x = x;
    job.ldx = ldx;
    job.from = from;
    job.ld_from = ld_from;
    job.index = index;
    job.rows = rows;
    job.zero_rows = zero_rows;
    job.d = d;
    apti_parallel_for(ctx, apti_ceil_div(d, APTI_OPS_COLUMNS), apti_scatter_task, &job);
}

/* dword[tokens[i]] += dx[i], likewise positions and types; a NULL table is not wanted. Parallel over columns, rows in order. */
static void apti_embed_backward(apt_ctx *ctx, float *dword, float *dposition, float *dtype_, const float *dx, int64_t lddx,
                                const int32_t *tokens, const int32_t *positions, const int32_t *types, int64_t rows, int64_t d)
{
    if (dword) apti_scatter_run(ctx, dword, d, dx, lddx, tokens, rows, d, 0);
    if (dposition) apti_scatter_run(ctx, dposition, d, dx, lddx, positions, rows, d, 0);
    if (dtype_) apti_scatter_run(ctx, dtype_, d, dx, lddx, types, rows, d, 0);
}

static void apti_gather_task(int64_t index, int32_t thread, void *arg)
{
    const apti_rows_job *job = (const apti_rows_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++)
        memcpy(job->x + i * job->ldx, job->from + job->index[i] * job->ld_from, (size_t)job->d * sizeof(float));
}

/* y(n_rows, d): y[i] = x[index[i]] */
static void apti_gather_rows(apt_ctx *ctx, float *y, int64_t ldy, const float *x, int64_t ldx, const int32_t *index,
                             int64_t n_rows, int64_t d)
{
    apti_rows_job job = APT_ZERO;
    job.x = y;
    job.ldx = ldy;
    job.from = x;
    job.ld_from = ldx;
    job.index = index;
    job.rows = n_rows;
    job.d = d;
    job.chunk = apti_ops_rows(d);
    apti_parallel_for(ctx, apti_ceil_div(n_rows, job.chunk), apti_gather_task, &job);
}

/* The backward of a gather: x(zero_rows, d) = 0 (0: leave x), then x[index[i]] += y[i] in the order of i */
static void apti_scatter_rows(apt_ctx *ctx, float *x, int64_t ldx, const float *y, int64_t ldy, const int32_t *index,
                              int64_t n_rows, int64_t d, int64_t zero_rows)
{
    apti_scatter_run(ctx, x, ldx, y, ldy, index, n_rows, d, zero_rows);
}

/* ---- losses ------------------------------------------------------------------------------------------------------

   Each returns the sum of its terms in double; the loss is sum / count. The gradient is that of grad_scale * sum / count and
   is written in the same call. Without a counted term the sum and every gradient are 0. A term with a NaN or an infinity in
   its logits is NaN, and so is its gradient: the kernels' max and exp may swallow a NaN, so the logits are looked at first.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apti_loss_job {
    apt_ctx *ctx;
    float *dlogits;
    const float *logits;
    int64_t ldd, ldl, rows, classes, chunk;
    const int32_t *labels, *offsets;
    int32_t ignore;
    double weight[2];                 /* of a row in the gradient: grad_scale / count; spans: start, end */
    double sum[2][APTI_OPS_PARTS];    /* of each task */
    int64_t correct[APTI_OPS_PARTS];
} apti_loss_job;

static bool apti_loss_counts(int32_t label, int64_t classes, int32_t ignore)
{
    return label != ignore && label >= 0 && label < classes;
}

/* Sum of exp(x - max) over a row; y receives the terms (y may be x), or NULL */
static double apti_exp_sum(const apti_kernels *kernels, float *y, const float *x, int64_t n, float max)
{
    const int64_t step = APTI_OPS_BLOCK * apti_min_i64(kernels->lanes, APTI_OPS_LANES);
    float block[APTI_OPS_BLOCK * APTI_OPS_LANES];
    double total = 0;
    for (int64_t i = 0; i < n; i += step) {
        const int64_t w = apti_min_i64(step, n - i);
        float *e = y ? y + i : block;
        if (e != x + i) memcpy(e, x + i, (size_t)w * sizeof(float));
        kernels->exp_scaled(e, w, 1.0f, max);
        total += (double)kernels->sum(e, w);
    }
    return total;
}

/* -log softmax(x)[label]; *hit: label is the first of the largest; dx(n) = weight * (softmax(x) - one at label), or NULL */
static double apti_cross_entropy_row(const apti_kernels *kernels, float *dx, const float *x, int64_t n, int32_t label,
                                     double weight, bool *hit)
{
    const double nan = (double)apti_float(0x7fc00000u);
    *hit = false;
    if (!apti_finite_all(x, n)) {
        if (dx) apti_ops_fill(dx, apti_float(0x7fc00000u), n);
        return nan;
    }
    const float max = kernels->max(x, n), own = x[label];
    if (own == max) {
        int32_t first = 0;
        while (x[first] != max) first++;
        *hit = first == label;
    }
    const double sum = apti_exp_sum(kernels, dx, x, n, max);
    if (dx) {
        kernels->scale(dx, dx, (float)(weight / sum), n);
        dx[label] = (float)((double)dx[label] - weight);
    }
    return (double)max - (double)own + log(sum);
}

static void apti_cross_entropy_task(int64_t index, int32_t thread, void *arg)
{
    apti_loss_job *job = (apti_loss_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    double sum = 0;
    int64_t correct = 0;
    (void)thread;
    for (int64_t i = index * job->chunk; i < end; i++) {
        float *dx = job->dlogits ? job->dlogits + i * job->ldd : NULL;
        bool hit = false;
        if (apti_loss_counts(job->labels[i], job->classes, job->ignore))
            sum += apti_cross_entropy_row(job->ctx->kernels, dx, job->logits + i * job->ldl, job->classes, job->labels[i],
                                          job->weight[0], &hit);
        else if (dx) memset(dx, 0, (size_t)job->classes * sizeof(float));
        correct += hit;
    }
    job->sum[0][index] = sum;
    job->correct[index] = correct;
}

/* Cuts the rows into at most APTI_OPS_PARTS tasks and adds their sums in order. */
static double apti_loss_run(apti_loss_job *job, apt_task task, int64_t *correct)
{
    double total = 0;
    *correct = 0;
    job->chunk = apti_max_i64(1, apti_ceil_div(job->rows, APTI_OPS_PARTS));
    const int64_t tasks = apti_ceil_div(job->rows, job->chunk);
    apti_parallel_for(job->ctx, tasks, task, job);
    for (int64_t t = 0; t < tasks; t++) {
        total += job->sum[0][t] + job->sum[1][t];
        *correct += job->correct[t];
    }
    return total;
}

/* Sum over the counted rows of -log softmax(logits(rows, classes))[label]. A label that is ignore_label or outside
   [0, classes) does not count. dlogits may be logits, or NULL. */
static double apti_cross_entropy(apt_ctx *ctx, float *dlogits, int64_t ldd, const float *logits, int64_t ldl,
                                 const int32_t *labels, int64_t rows, int64_t classes, int32_t ignore_label, float grad_scale,
                                 int64_t *count, int64_t *correct)
{
    apti_loss_job job = APT_ZERO;
    *count = 0;
    for (int64_t i = 0; i < rows; i++) *count += apti_loss_counts(labels[i], classes, ignore_label);
    job.ctx = ctx;
    job.dlogits = dlogits;
    job.ldd = ldd;
    job.logits = logits;
    job.ldl = ldl;
    job.labels = labels;
    job.rows = rows;
    job.classes = classes;
    job.ignore = ignore_label;
    job.weight[0] = *count > 0 ? (double)grad_scale / (double)*count : 0.0;
    return apti_loss_run(&job, apti_cross_entropy_task, correct);
}

/* Sum of (pred - target)^2 over n values; dpred = grad_scale * 2 (pred - target) / n, or NULL */
static double apti_regression(apt_ctx *ctx, float *dpred, const float *pred, const float *targets, int64_t n, float grad_scale)
{
    double total = 0;
    (void)ctx;
    for (int64_t i = 0; i < n; i++) {
        const double difference = (double)pred[i] - (double)targets[i];
        total += difference * difference;
        if (dpred) dpred[i] = (float)(2.0 * (double)grad_scale * difference / (double)n);
    }
    return total;
}

/* Cross entropy over one column, x[i*ld] for i in [0, n); a sequence is short, so all of it in double */
static double apti_span_column(float *dx, const float *x, int64_t ld, int64_t n, int32_t label, double weight, bool *hit)
{
    const double nan = (double)apti_float(0x7fc00000u);
    double sum = 0;
    int64_t best = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; i++) {
        finite = finite && apti_finite(x[i * ld]);
        if (x[i * ld] > x[best * ld]) best = i;
    }
    const double max = (double)x[best * ld];
    for (int64_t i = 0; finite && i < n; i++) sum += exp((double)x[i * ld] - max);
    for (int64_t i = 0; dx && i < n; i++)
        dx[i * ld] = (float)(finite ? weight * (exp((double)x[i * ld] - max) / sum - (i == label ? 1.0 : 0.0)) : nan);
    *hit = finite && best == label;
    return finite ? max - (double)x[label * ld] + log(sum) : nan;
}

static void apti_span_task(int64_t index, int32_t thread, void *arg)
{
    apti_loss_job *job = (apti_loss_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    double sum[2] = {0, 0};
    int64_t correct = 0;
    (void)thread;
    for (int64_t s = index * job->chunk; s < end; s++) {
        const int64_t first = job->offsets[s], n = job->offsets[s + 1] - first;
        bool hit[2] = {false, false};
        for (int32_t side = 0; side < 2; side++) {
            const int32_t label = job->labels[2 * s + side];
            float *dx = job->dlogits ? job->dlogits + first * job->ldd + side : NULL;
            if (label >= 0 && label < n)
                sum[side] += apti_span_column(dx, job->logits + first * job->ldl + side, job->ldl, n, label, job->weight[side],
                                              &hit[side]);
            else for (int64_t i = 0; dx && i < n; i++) dx[i * job->ldd] = 0;
        }
        correct += hit[0] && hit[1];
    }
    for (int32_t side = 0; side < 2; side++) job->sum[side][index] = sum[side];
    job->correct[index] = correct;
}

/* logits(tokens, 2): start and end score of each token; dlogits has the same ld, or is NULL. labels[2*s], labels[2*s + 1]: start
   and end in sequence s, ignored when outside of it. loss = (mean of the start terms + mean of the end terms) / 2, as Hugging
   Face has it; count: start terms + end terms; the result is loss * count. correct: sequences whose two labels are hit. */
static double apti_span_loss(apt_ctx *ctx, float *dlogits, const float *logits, int64_t ld, const int32_t *labels,
                             const int32_t *offsets, int32_t sequences, float grad_scale, int64_t *count, int64_t *correct)
{
    apti_loss_job job = APT_ZERO;
    int64_t counted[2] = {0, 0};
    double sum[2] = {0, 0};
    for (int32_t s = 0; s < sequences; s++)
        for (int32_t side = 0; side < 2; side++)
            counted[side] += labels[2 * s + side] >= 0 && labels[2 * s + side] < offsets[s + 1] - offsets[s];
    job.ctx = ctx;
    job.dlogits = dlogits;
    job.ldd = ld;
    job.logits = logits;
    job.ldl = ld;
    job.labels = labels;
    job.offsets = offsets;
    job.rows = sequences;
    for (int32_t side = 0; side < 2; side++)
        job.weight[side] = counted[side] > 0 ? 0.5 * (double)grad_scale / (double)counted[side] : 0.0;
    apti_loss_run(&job, apti_span_task, correct);
    *count = counted[0] + counted[1];
    for (int32_t side = 0; side < 2; side++)
        for (int64_t t = 0; t < APTI_OPS_PARTS; t++) sum[side] += job.sum[side][t];
    if (counted[0] > 0) sum[0] *= 0.5 * (double)*count / (double)counted[0];
    if (counted[1] > 0) sum[1] *= 0.5 * (double)*count / (double)counted[1];
    return sum[0] + sum[1];
}

/* ---- language modelling heads ------------------------------------------------------------------------------------- */

/* Logits that exist at a time, at most: 64 MiB. Every chunk of rows streams the whole matrix through the caches and, for the
   gradient of h, transposes it, so a chunk needs some hundred rows before that is cheap beside the product. */
#define APTI_LOGITS ((int64_t)1 << 24)

/* The product with the vocabulary, and its gradients: a linear layer of which only some rows exist at a time. */
typedef struct apti_lm_op {
    apti_linear_op head;              /* W(vocab, d), bias, adapter; head.w NULL: no panels and no adapter, but */
    const float *e;                   /* W row-major */
    float *xa, *dya;                  /* (rows, rank) each: room for what the adapter takes and its gradient */
} apti_lm_op;

/* logits(rows, vocab) = h W^T + xa B^T + bias, h(rows, d) */
static void apti_lm_logits(apt_ctx *ctx, const apti_lm_op *op, float *logits, int64_t ldl, const float *h, int64_t ldh,
                           int64_t rows)
{
    if (op->head.w != NULL) {
        apti_linear_forward(ctx, &op->head, logits, ldl, h, ldh, rows, op->xa, NULL);
        return;
    }
    apti_gemm g = apti_gemm_begin(logits, ldl, rows, op->head.out, false);
    apti_gemm_left(&g.part[0], h, ldh, op->head.in);
    apti_gemm_right(&g.part[0], APTI_B_PLAIN_T, op->e, op->head.in);
    g.bias = op->head.bias;
    apti_gemm_run(ctx, &g);
}

/* dh(rows, d) (+)= dlogits W + dya A, or NULL; grad: += as in apti_linear_backward. Behind apti_lm_logits of the same rows, for
   it reads xa. */
static void apti_lm_grads(apt_ctx *ctx, const apti_lm_op *op, float *dh, int64_t lddh, bool accumulate, const float *dlogits,
                          int64_t ldd, const float *h, int64_t ldh, int64_t rows, const apti_linear_grad *grad)
{
    if (op->head.w != NULL) {
        apti_linear_backward(ctx, &op->head, dh, lddh, accumulate, dlogits, ldd, h, ldh, op->xa, op->dya, rows, grad);
        return;
    }
    if (dh) {
        apti_gemm g = apti_gemm_begin(dh, lddh, rows, op->head.in, accumulate);
        apti_gemm_left(&g.part[0], dlogits, ldd, op->head.out);
        apti_gemm_right(&g.part[0], APTI_B_PLAIN, op->e, op->head.in);
        apti_gemm_run(ctx, &g);
    }
    if (grad->w) apti_weight_grad(ctx, grad->w, op->head.out, op->head.in, dlogits, ldd, h, ldh, rows);
    if (grad->bias) apti_column_sum(ctx, grad->bias, dlogits, ldd, rows, op->head.out);
}

/* Cross entropy of the logits of h against labels[rows], `chunk` rows at a time, so that no more than chunk x vocab logits ever
   exist: work holds chunk * apti_ld(vocab) floats. With grad (its parts are added to; NULL: the loss alone) dh(rows, d) is
   overwritten, unless it is NULL. Labels, gradient and counts as in apti_cross_entropy. */
static double apti_lm_loss(apt_ctx *ctx, const apti_lm_op *op, float *dh, int64_t lddh, const apti_linear_grad *grad,
                           const float *h, int64_t ldh, const int32_t *labels, int64_t rows, int32_t ignore_label,
                           float grad_scale, float *work, int64_t chunk, int64_t *count, int64_t *correct)
{
    const int64_t vocab = op->head.out, ld = apti_ld(vocab);
    apti_loss_job job = APT_ZERO;
    double total = 0;
    *count = *correct = 0;
    for (int64_t i = 0; i < rows; i++) *count += apti_loss_counts(labels[i], vocab, ignore_label);
    job.ctx = ctx;
    job.dlogits = grad ? work : NULL;
    job.logits = work;
    job.ldd = job.ldl = ld;
    job.classes = vocab;
    job.ignore = ignore_label;
    job.weight[0] = *count > 0 ? (double)grad_scale / (double)*count : 0.0;
    for (int64_t first = 0; first < rows; first += chunk) {
        const float *from = h + first * ldh;
        int64_t hits;
        job.rows = apti_min_i64(chunk, rows - first);
        job.labels = labels + first;
        apti_lm_logits(ctx, op, work, ld, from, ldh, job.rows);
        total += apti_loss_run(&job, apti_cross_entropy_task, &hits);
        *correct += hits;
        if (grad) apti_lm_grads(ctx, op, dh ? dh + first * lddh : NULL, lddh, false, work, ld, from, ldh, job.rows, grad);
    }
    return total;
}
#endif /* APT_ONLY_CORE */
// >>core
/* ---------------------------------------------------------------------------------------------------------------------
   The method on raw arrays. Uses the platform's integers, finite test and random numbers and nothing else, so that
   APT_ONLY_CORE can drop the rest.

   The pattern of every function: check everything, then write. A trainer that gets an error has its arrays as they were
   and can skip the step. Checks read each array once more; they cost little beside the forward and backward pass that
   made the numbers. Shapes, errors and sources stand at the declarations; here stands why the code is as it is.
   ------------------------------------------------------------------------------------------------------------------ */

/* What APT_SALIENCE_DEFAULT stands for: the one line to change when a measurement says so. */
#define APTI_SALIENCE_DEFAULT APT_SALIENCE_SCALED

/* A matrix argument: sizes, row distance, presence. One row needs no ld, an empty matrix no memory. */
static apt_result apti_check_matrix(const void *x, int64_t ld, int64_t rows, int64_t cols)
{
    int64_t last;
    if (rows < 0 || cols < 0) return APT_E_ARGUMENT;
    if (rows == 0 || cols == 0) return APT_OK;
    if (x == NULL) return APT_E_ARGUMENT;
    if (rows > 1 && (ld < cols || !apti_mul(rows, ld, &last))) return APT_E_SHAPE;
    return APT_OK;
}

/* Row by row, because what lies between the rows (ld > cols) may be anything. */
static bool apti_finite_matrix(const float *x, int64_t ld, int64_t rows, int64_t cols)
{
    for (int64_t r = 0; r < rows; r++)
        if (!apti_finite_all(x + r * ld, cols)) return false;
    return true;
}

/* --- random numbers: the public generator is the private one under another name --- */

APTI_INLINE apti_rng apti_rng_load(const apt_rng *rng)
{
    apti_rng r;
    r.key = rng->key;
    r.counter = rng->counter;
    return r;
}

APT_API apt_rng apt_rng_make(uint64_t seed, uint64_t stream)
{
    apt_rng rng;
    rng.key = apti_rng_seed(seed, stream);
    rng.counter = 0;
    return rng;
}

APT_API uint64_t apt_rng_next(apt_rng *rng)
{
    if (rng == NULL) return 0;
    apti_rng r = apti_rng_load(rng);
    const uint64_t value = apti_rng_next(&r);
    rng->counter = r.counter;
    return value;
}

APT_API double apt_rng_uniform(apt_rng *rng)
{
    if (rng == NULL) return 0;
    apti_rng r = apti_rng_load(rng);
    const double value = apti_rng_uniform(&r);
    rng->counter = r.counter;
    return value;
}

APT_API float apt_rng_normal(apt_rng *rng)
{
    if (rng == NULL) return 0;
    apti_rng r = apti_rng_load(rng);
    const float value = apti_rng_normal(&r);
    rng->counter = r.counter;
    return value;
}

APT_API uint32_t apt_rng_below(apt_rng *rng, uint32_t n)
{
    if (rng == NULL) return 0;
    apti_rng r = apti_rng_load(rng);
    const uint32_t value = apti_rng_below(&r, n);
    rng->counter = r.counter;
    return value;
}

/* --- schedules ---

   Sparsity is what is asked for, not what a search reaches: floors and rounding may keep more, and a search never brings
   back what compaction removed. All curves are evaluated in double and leave as float exactly at both ends, so that
   "step >= end" and "sparsity == target" are the same test for a caller. */

APT_API const char *apt_schedule_kind_name(int32_t kind)
{
    switch (kind) {
        case APT_SCHEDULE_CUBIC: return "cubic";
        case APT_SCHEDULE_LINEAR: return "linear";
        case APT_SCHEDULE_EXPONENTIAL: return "exponential";
        case APT_SCHEDULE_MILESTONES: return "milestones";
        default: return NULL;
    }
}

/* Appends text to the string in out (bytes in all), cut where it no longer fits. */
static void apti_append(char *out, size_t bytes, const char *text)
{
    if (bytes == 0) return;
    size_t used = 0;
    while (used + 1 < bytes && out[used] != 0) used++;
    while (used + 1 < bytes && *text != 0) out[used++] = *text++;
    out[used] = 0;
}

/* All names, name_of gives NULL behind the last number. */
static void apti_append_kinds(char *out, size_t bytes, const char *(*name_of)(int32_t))
{
    const char *known;
    for (int32_t k = 0; (known = name_of(k)) != NULL; k++) {
        apti_append(out, bytes, k > 0 ? ", " : "");
        apti_append(out, bytes, known);
    }
}

/* The number of a name, or a message that lists what there is. */
static apt_result apti_kind_from_name(const char *what, const char *(*name_of)(int32_t), const char *name, int32_t *kind,
                                      char *message, size_t bytes)
{
    if (message == NULL) bytes = 0;
    if (bytes > 0) message[0] = 0;
    if (kind == NULL) return APT_E_ARGUMENT;
    const char *known;
    for (int32_t k = 0; name != NULL && (known = name_of(k)) != NULL; k++) {
        if (strcmp(name, known) != 0) continue;
        *kind = k;
        return APT_OK;
    }
    apti_append(message, bytes, "unknown ");
    apti_append(message, bytes, what);
    apti_append(message, bytes, " '");
    apti_append(message, bytes, name != NULL ? name : "(null)");
    apti_append(message, bytes, "'; supported: ");
    apti_append_kinds(message, bytes, name_of);
    return APT_E_ARGUMENT;
}

APT_API apt_result apt_schedule_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes)
{
    return apti_kind_from_name("schedule", apt_schedule_kind_name, name, kind, message, bytes);
}

/* Steps must rise strictly (else two sparsities would hold at once) and sparsities must not fall (a cut is final). */
static apt_result apti_check_milestones(const apt_schedule *s)
{
    if (s->milestones < 1) return APT_E_RANGE;
    if (s->milestone_step == NULL) return APT_E_ARGUMENT;
    for (int32_t i = 1; i < s->milestones; i++)
        if (s->milestone_step[i] <= s->milestone_step[i - 1]) return APT_E_RANGE;
    if (s->milestone_sparsity == NULL) return APT_OK;
    if (!apti_finite_all(s->milestone_sparsity, s->milestones)) return APT_E_NONFINITE;
    float last = s->start;
    for (int32_t i = 0; i < s->milestones; i++) {
        if (s->milestone_sparsity[i] < last || s->milestone_sparsity[i] > s->target) return APT_E_RANGE;
        last = s->milestone_sparsity[i];
    }
    return last < s->target ? APT_E_RANGE : APT_OK;
}

/* Finiteness first: under -Ofast a comparison with NaN may go either way. */
static apt_result apti_check_schedule(const apt_schedule *s)
{
    if (s == NULL || apt_schedule_kind_name(s->kind) == NULL) return APT_E_ARGUMENT;
    if (!apti_finite(s->target) || !apti_finite(s->start)) return APT_E_NONFINITE;
    if (s->target < 0 || s->target > 1) return APT_E_RANGE;
    if (s->kind != APT_SCHEDULE_MILESTONES && s->end < s->begin) return APT_E_RANGE;
    if (!(s->target > 0)) return APT_OK;         /* nothing is ever pruned: start does not matter */
    if (s->start < 0 || s->start > s->target) return APT_E_RANGE;
    /* start * (target/start)^u has no meaning at 0. */
    if (s->kind == APT_SCHEDULE_EXPONENTIAL && !(s->start > 0)) return APT_E_RANGE;
    return s->kind == APT_SCHEDULE_MILESTONES ? apti_check_milestones(s) : APT_OK;
}

/* A stair: `passed` milestones lie behind this step. The last stair is the target itself, not a rounded sum of parts. */
static float apti_milestone_value(const apt_schedule *s, float target, float start, int64_t step)
{
    int32_t passed = 0;
    while (passed < s->milestones && s->milestone_step[passed] <= step) passed++;
    if (passed == 0) return start;
    if (passed == s->milestones) return target;
    if (s->milestone_sparsity != NULL) return s->milestone_sparsity[passed - 1];
    return (float)(start + ((double)target - start) * passed / s->milestones);
}

/* The curve of a checked schedule, towards any target. */
static float apti_schedule_value(const apt_schedule *s, float target, float start, int64_t step)
{
    if (!(target > 0)) return 0;
    if (s->kind == APT_SCHEDULE_MILESTONES) return apti_milestone_value(s, target, start, step);
    if (step >= s->end && step >= s->begin) return target;
    /* u = t/T in [0, 1); begin < end here unless step < begin. Differences in double cannot overflow. */
    const double u = step <= s->begin ? 0.0 : ((double)step - (double)s->begin) / ((double)s->end - (double)s->begin);
    double value = target * u;
    if (s->kind == APT_SCHEDULE_CUBIC) value = target * (1 - (1 - u) * (1 - u) * (1 - u));
    if (s->kind == APT_SCHEDULE_EXPONENTIAL) value = start * pow((double)target / start, u);
    if (value < start) value = start;
    return value > target ? target : (float)value;
}

APT_API apt_result apt_schedule_sparsity(const apt_schedule *schedule, int64_t step, float *sparsity)
{
    if (sparsity == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_check_schedule(schedule);
    if (r == APT_OK) *sparsity = apti_schedule_value(schedule, schedule->target, schedule->start, step);
    return r;
}

/* start is a floor for the model; a layer whose own target is lower must still end there, hence the minimum of both. */
APT_API apt_result apt_schedule_layers(const apt_schedule *schedule, const float *target, int64_t step, float *sparsity,
                                       int32_t layers)
{
    const apt_result r = apti_check_schedule(schedule);
    if (r != APT_OK) return r;
    if (layers < 0 || (layers > 0 && (target == NULL || sparsity == NULL))) return APT_E_ARGUMENT;
    if (schedule->kind == APT_SCHEDULE_MILESTONES && schedule->milestone_sparsity != NULL) return APT_E_ARGUMENT;
    if (!apti_finite_all(target, layers)) return APT_E_NONFINITE;
    for (int32_t l = 0; l < layers; l++)
        if (target[l] < 0 || target[l] > 1) return APT_E_RANGE;
    for (int32_t l = 0; l < layers; l++) {
        const float start = schedule->start < target[l] ? schedule->start : target[l];
        sparsity[l] = apti_schedule_value(schedule, target[l], start, step);
    }
    return APT_OK;
}

/* The end is always a decision, whether or not `every` divides the window: only there is the target asked for. */
APT_API apt_result apt_schedule_due(const apt_schedule *schedule, int64_t every, int64_t step, int32_t *due)
{
    if (due == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_check_schedule(schedule);
    if (r != APT_OK) return r;
    if (every <= 0) return APT_E_RANGE;
    *due = 0;
    if (schedule->kind == APT_SCHEDULE_MILESTONES) {
        for (int32_t i = 0; schedule->milestone_step != NULL && i < schedule->milestones; i++)
            if (schedule->milestone_step[i] == step) *due = 1;
    } else if (step >= schedule->begin && step <= schedule->end) {
        const uint64_t since = (uint64_t)step - (uint64_t)schedule->begin;   /* unsigned: any two int64_t */
        *due = step == schedule->end || since % (uint64_t)every == 0;
    }
    return APT_OK;
}

/* --- salience ---

   The sums run over millions of values per step, so they are float loops over features, which vectorise as they stand; a
   float sum of n magnitudes errs by at most n * 6e-8 of itself, far below what could change a ranking. What is computed
   once per decision (products, kurtosis, means) is done in double. */

/* Rows outside, features inside: contiguous, and two half batches give what one whole batch gives. */
APT_API apt_result apt_abs_sum(float *acc, const float *x, int64_t ld, int64_t rows, int64_t features)
{
    const apt_result r = apti_check_matrix(x, ld, rows, features);
    if (r != APT_OK || (acc == NULL && features > 0)) return r != APT_OK ? r : APT_E_ARGUMENT;
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * ld;
        for (int64_t f = 0; f < features; f++) acc[f] += fabsf(row[f]);
    }
    return APT_OK;
}

/* The same with signs, for the mean activation. Signs matter: with |H| in place of H the kurtosis of a head is another
   number altogether (checked against recorded values), since opposite columns then no longer cancel. */
APT_API apt_result apt_value_sum(float *acc, const float *x, int64_t ld, int64_t rows, int64_t features)
{
    const apt_result r = apti_check_matrix(x, ld, rows, features);
    if (r != APT_OK || (acc == NULL && features > 0)) return r != APT_OK ? r : APT_E_ARGUMENT;
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * ld;
        for (int64_t f = 0; f < features; f++) acc[f] += row[f];
    }
    return APT_OK;
}

/* One unit of apt_salience_finish: sum over its features of sum|H| * sum|dL/dH|. */
static double apti_unit_salience(const float *abs_act, const float *abs_grad, int64_t width)
{
    double sum = 0;
    for (int64_t w = 0; w < width; w++) sum += (double)abs_act[w] * (double)abs_grad[w];
    return sum;
}

APT_API apt_result apt_salience_finish(float *sal, const float *abs_act, const float *abs_grad, int64_t units, int64_t width)
{
    int64_t n;
    if (!apti_mul(units, width, &n)) return APT_E_ARGUMENT;
    if ((units > 0 && sal == NULL) || (n > 0 && (abs_act == NULL || abs_grad == NULL))) return APT_E_ARGUMENT;
    if (!apti_finite_all(abs_act, n) || !apti_finite_all(abs_grad, n)) return APT_E_NONFINITE;
    for (int64_t u = 0; u < units; u++)          /* a sum of finite products may still be too large for a float */
        if (!apti_finite((float)apti_unit_salience(abs_act + u * width, abs_grad + u * width, width))) return APT_E_NONFINITE;
    for (int64_t u = 0; u < units; u++) sal[u] = (float)apti_unit_salience(abs_act + u * width, abs_grad + u * width, width);
    return APT_OK;
}

/* scale * |sum of W * dL/dW| over one block of the matrix. */
static double apti_block_salience(const float *weight, const float *grad, int64_t ld, int64_t rows, int64_t cols, double scale)
{
    double sum = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) sum += (double)weight[r * ld + c] * (double)grad[r * ld + c];
    return scale * (sum < 0 ? -sum : sum);
}

/* Why a sum inside the bars: removing a unit sets all its weights to 0 together, so to first order the loss changes by
   |sum of W * dL/dW|, and contributions of opposite sign do cancel. `step` is the distance between two units' blocks. */
APT_API apt_result apt_weight_salience(float *sal, const float *weight, const float *grad, int64_t ld, int64_t rows,
                                       int64_t cols, int64_t width, int32_t by_rows, float scale)
{
    apt_result r = apti_check_matrix(weight, ld, rows, cols);
    if (r == APT_OK) r = apti_check_matrix(grad, ld, rows, cols);
    if (r != APT_OK) return r;
    if (!apti_finite(scale)) return APT_E_NONFINITE;
    if (width < 1 || scale < 0) return APT_E_RANGE;
    const int64_t length = by_rows ? rows : cols, units = length / width;
    if (length % width != 0) return APT_E_SHAPE;
    if (units > 0 && sal == NULL) return APT_E_ARGUMENT;
    if (!apti_finite_matrix(weight, ld, rows, cols) || !apti_finite_matrix(grad, ld, rows, cols)) return APT_E_NONFINITE;
    const int64_t step = by_rows ? width * ld : width, block_rows = by_rows ? width : rows, block_cols = by_rows ? cols : width;
    for (int pass = 0; pass < 2; pass++) {       /* the first only looks for overflow */
        for (int64_t u = 0; u < units; u++) {
            const float value = (float)((double)sal[u] + apti_block_salience(weight + u * step, grad + u * step, ld, block_rows,
                                                                             block_cols, scale));
            if (!apti_finite(value)) return APT_E_NONFINITE;
            if (pass == 1) sal[u] = value;
        }
    }
    return APT_OK;
}

/* Joins two sets of values by their central moments (Pebay 2008, "Formulas for robust, one-pass parallel computation of
   covariances and arbitrary-order statistical moments"). With d the difference of the means and n = na + nb:
       m2 = m2a + m2b + d^2 na nb / n
       m3 = m3a + m3b + d^3 na nb (na - nb) / n^2 + 3 d (na m2b - nb m2a) / n
       m4 = m4a + m4b + d^4 na nb (na^2 - na nb + nb^2) / n^3 + 6 d^2 (na^2 m2b + nb^2 m2a) / n^2 + 4 d (na m3b - nb m3a) / n
   from the highest down, since each needs the lower ones as they were. e = d/n. Equal constants give d = 0, so a constant
   stays exactly constant however it is cut up. */
static void apti_moments_join(apt_moments *a, const apt_moments *b)
{
    if (!(b->count > 0)) return;
    if (!(a->count > 0)) {
        *a = *b;
        return;
    }
    const double na = a->count, nb = b->count, n = na + nb, d = b->mean - a->mean, e = d / n;
    a->m4 += b->m4 + d * e * e * e * na * nb * (na * na - na * nb + nb * nb) +
             6 * e * e * (na * na * b->m2 + nb * nb * a->m2) + 4 * e * (na * b->m3 - nb * a->m3);
    a->m3 += b->m3 + d * e * e * na * nb * (na - nb) + 3 * e * (na * b->m2 - nb * a->m2);
    a->m2 += b->m2 + d * e * na * nb;
    a->mean += e * nb;
    a->count = n;
}

/* Columns taken together: whole cache lines on the way down the rows, and inner loops that vectorise. */
#define APTI_MOMENT_BLOCK 64
/* Rows taken together: the second pass should find them in the cache, also when ld is a large power of two. */
#define APTI_MOMENT_ROWS 128

/* One pass down `rows` rows of n columns, n <= APTI_MOMENT_BLOCK. Everything is taken relative to the first row, so that a
   constant column gives m2 = 0 exactly, without a tolerance. */
APTI_INLINE void apti_column_shift(double *shift, const float *w, int64_t ld, int64_t rows, int64_t n)
{
    for (int64_t r = 1; r < rows; r++)
        for (int64_t c = 0; c < n; c++) shift[c] += (double)w[r * ld + c] - (double)w[c];
}

/* The second pass: sums of d^2, d^3, d^4 with d = value - mean. */
APTI_INLINE void apti_column_powers(double *m2, double *m3, double *m4, const double *shift, const float *w, int64_t ld,
                                    int64_t rows, int64_t n)
{
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < n; c++) {
            const double d = (double)w[r * ld + c] - (double)w[c] - shift[c], d2 = d * d;
            m2[c] += d2;
            m3[c] += d2 * d;
            m4[c] += d2 * d2;
        }
    }
}

/* moments[c] of n <= APTI_MOMENT_BLOCK columns of weight * mean_act. Two passes in double over the weight alone: the
   activation is one factor for the column, so the k-th moment takes its k-th power. */
static void apti_column_moments(apt_moments *moments, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                int64_t n)
{
    double shift[APTI_MOMENT_BLOCK] = {0}, m2[APTI_MOMENT_BLOCK] = {0}, m3[APTI_MOMENT_BLOCK] = {0}, m4[APTI_MOMENT_BLOCK] = {0};
    /* The constant lets a compiler unroll the full blocks. */
    if (n == APTI_MOMENT_BLOCK) apti_column_shift(shift, weight, ld, rows, APTI_MOMENT_BLOCK);
    else apti_column_shift(shift, weight, ld, rows, n);
    for (int64_t c = 0; c < n; c++) shift[c] /= (double)rows;
    if (n == APTI_MOMENT_BLOCK) apti_column_powers(m2, m3, m4, shift, weight, ld, rows, APTI_MOMENT_BLOCK);
    else apti_column_powers(m2, m3, m4, shift, weight, ld, rows, n);
    for (int64_t c = 0; c < n; c++) {
        const double a = mean_act != NULL ? (double)mean_act[c] : 1.0, a2 = a * a;
        moments[c].count = (double)rows;
        moments[c].mean = ((double)weight[c] + shift[c]) * a;
        moments[c].m2 = m2[c] * a2;
        moments[c].m3 = m3[c] * a2 * a;
        moments[c].m4 = m4[c] * a2 * a2;
    }
}

/* Joins all columns into their units, block by block; width > 0. */
static void apti_unit_join(apt_moments *moments, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                           int64_t units, int64_t width)
{
    apt_moments column[APTI_MOMENT_BLOCK];
    for (int64_t first = 0; first < units * width; first += APTI_MOMENT_BLOCK) {
        const int64_t n = apti_min_i64(APTI_MOMENT_BLOCK, units * width - first);
        for (int64_t r = 0; r < rows; r += APTI_MOMENT_ROWS) {
            apti_column_moments(column, mean_act != NULL ? mean_act + first : NULL, weight + r * ld + first, ld,
                                apti_min_i64(APTI_MOMENT_ROWS, rows - r), n);
            for (int64_t c = 0; c < n; c++) apti_moments_join(&moments[(first + c) / width], &column[c]);
        }
    }
}

/* The matrix is searched for NaN before anything is written: a NaN in one row would otherwise spoil the moments for good. */
static apt_result apti_check_moments(const void *out, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                     int64_t units, int64_t width)
{
    int64_t cols;
    if (!apti_mul(units, width, &cols) || (units > 0 && (out == NULL || width == 0))) return APT_E_ARGUMENT;
    const apt_result r = apti_check_matrix(weight, ld, rows, cols);
    if (r != APT_OK) return r;
    if (mean_act != NULL && !apti_finite_all(mean_act, cols)) return APT_E_NONFINITE;
    return apti_finite_matrix(weight, ld, rows, cols) ? APT_OK : APT_E_NONFINITE;
}

APT_API apt_result apt_unit_moments(apt_moments *moments, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                    int64_t units, int64_t width)
{
    const apt_result r = apti_check_moments(moments, mean_act, weight, ld, rows, units, width);
    if (r != APT_OK) return r;
    apti_unit_join(moments, mean_act, weight, ld, rows, units, width);
    return APT_OK;
}

/* (m4/n) / (m2/(n-1))^2 - 3: fourth moment over n, variance over n - 1, as in the recorded values. 0 for a normal
   distribution, large when few values carry the weight, which is what marks an outlier unit. Constant input has no shape:
   0, so that it adds no salience. The second test catches values so small that m2*m2 underflows. */
static double apti_kurtosis(const apt_moments *m)
{
    if (m->count < 2 || !(m->m2 * m->m2 > 1e-300)) return 0;
    const double variance = m->m2 / (m->count - 1);
    return m->m4 / m->count / (variance * variance) - 3;
}

APT_API apt_result apt_moments_kurtosis(float *kurtosis, const apt_moments *moments, int64_t units)
{
    if (units < 0 || (units > 0 && (kurtosis == NULL || moments == NULL))) return APT_E_ARGUMENT;
    for (int64_t u = 0; u < units; u++)
        if (!apti_finite((float)apti_kurtosis(&moments[u]))) return APT_E_NONFINITE;
    for (int64_t u = 0; u < units; u++) kurtosis[u] = (float)apti_kurtosis(&moments[u]);
    return APT_OK;
}

/* apt_unit_moments and apt_moments_kurtosis for as many units at a time as fit the stack. */
APT_API apt_result apt_unit_kurtosis(float *kurtosis, const float *mean_act, const float *weight, int64_t ld, int64_t rows,
                                     int64_t units, int64_t width)
{
    const apt_result r = apti_check_moments(kurtosis, mean_act, weight, ld, rows, units, width);
    if (r != APT_OK) return r;
    const int64_t block = apti_max_i64(1, APTI_MOMENT_BLOCK / apti_max_i64(width, 1));
    for (int64_t u = 0; u < units; u += block) {
        apt_moments part[APTI_MOMENT_BLOCK];
        const int64_t n = apti_min_i64(block, units - u), at = u * width;
        memset(part, 0, sizeof part);
        apti_unit_join(part, mean_act != NULL ? mean_act + at : NULL, weight + at, ld, rows, n, width);
        for (int64_t i = 0; i < n; i++) {
            const float value = (float)apti_kurtosis(&part[i]);
            if (!apti_finite(value)) return APT_E_NONFINITE;   /* |weight * mean_act| beyond 1e70 or so */
            kurtosis[u + i] = value;
        }
    }
    return APT_OK;
}

/* K of a unit. The root brings a fourth-order statistic back to the order of a magnitude; flat distributions (negative
   excess) count as no outliers at all. */
static double apti_outlier(float kurtosis)
{
    return kurtosis > 0 ? sqrt((double)kurtosis) : 0.0;
}

APT_API apt_result apt_salience_outlier(float *sal, const float *kurtosis, int64_t units)
{
    if (units < 0 || (units > 0 && (sal == NULL || kurtosis == NULL))) return APT_E_ARGUMENT;
    if (!apti_finite_all(sal, units) || !apti_finite_all(kurtosis, units)) return APT_E_NONFINITE;
    for (int64_t u = 0; u < units; u++) sal[u] = (float)((double)sal[u] + apti_outlier(kurtosis[u]));
    return APT_OK;
}

/* So that the means fit the stack. Kinds are heads, neurons, hidden dimensions; a foreign model may have a few more. */
#define APTI_MAX_KINDS 64

/* A mean of values of both signs could be 0 or negative and turn a ranking over, so salience must be >= 0 here. */
static apt_result apti_check_kinds(const float *values, const int32_t *kind, const uint8_t *alive, int64_t units, int32_t kinds)
{
    if (units < 0 || (units > 0 && values == NULL)) return APT_E_ARGUMENT;
    if (kinds < 1 || kinds > APTI_MAX_KINDS) return APT_E_RANGE;
    if (!apti_finite_all(values, units)) return APT_E_NONFINITE;
    for (int64_t u = 0; u < units; u++) {
        if (kind != NULL && (kind[u] < 0 || kind[u] >= kinds)) return APT_E_RANGE;
        if (values[u] < 0 && (alive == NULL || alive[u])) return APT_E_RANGE;
    }
    return APT_OK;
}

/* mean[k] over the alive units of kind k; of K when outlier, else of the values. 1 in place of a mean that is 0. */
static void apti_kind_means(double *mean, const float *values, bool outlier, const int32_t *kind, const uint8_t *alive,
                            int64_t units, int32_t kinds)
{
    int64_t count[APTI_MAX_KINDS];
    for (int32_t k = 0; k < kinds; k++) {
        mean[k] = 0;
        count[k] = 0;
    }
    for (int64_t u = 0; u < units; u++) {
        if (alive != NULL && !alive[u]) continue;
        const int32_t k = kind != NULL ? kind[u] : 0;
        mean[k] += outlier ? apti_outlier(values[u]) : (double)values[u];
        count[k]++;
    }
    for (int32_t k = 0; k < kinds; k++) mean[k] = mean[k] > 0 ? mean[k] / (double)count[k] : 1.0;
}

APT_API apt_result apt_salience_normalise(float *values, const int32_t *kind, const uint8_t *alive, int64_t units, int32_t kinds)
{
    const apt_result r = apti_check_kinds(values, kind, alive, units, kinds);
    if (r != APT_OK) return r;
    double mean[APTI_MAX_KINDS];
    apti_kind_means(mean, values, false, kind, alive, units, kinds);
    for (int64_t u = 0; u < units; u++) {
        const bool dead = alive != NULL && !alive[u];
        values[u] = dead ? 0.0f : (float)((double)values[u] / mean[kind != NULL ? kind[u] : 0]);
    }
    return APT_OK;
}

/* Written as value = S/s_mean + K/k_mean: RAW has both means 1, SCALED divides K only, by mean(K)/mean(S). */
APT_API apt_result apt_salience_combine(float *sal, const float *kurtosis, const int32_t *kind, const uint8_t *alive,
                                        int64_t units, int32_t kinds, int32_t norm)
{
    const apt_result r = apti_check_kinds(sal, kind, alive, units, kinds);
    if (r != APT_OK) return r;
    if (norm == APT_SALIENCE_DEFAULT) norm = APTI_SALIENCE_DEFAULT;
    if (norm < APT_SALIENCE_RAW || norm > APT_SALIENCE_SCALED) return APT_E_ARGUMENT;
    if (kurtosis != NULL && !apti_finite_all(kurtosis, units)) return APT_E_NONFINITE;
    double s_mean[APTI_MAX_KINDS], k_mean[APTI_MAX_KINDS];
    apti_kind_means(s_mean, sal, false, kind, alive, units, kinds);
    if (kurtosis != NULL) apti_kind_means(k_mean, kurtosis, true, kind, alive, units, kinds);
    for (int64_t u = 0; u < units; u++) {
        const int32_t k = kind != NULL ? kind[u] : 0;
        double s = (double)sal[u], outlier = kurtosis != NULL ? apti_outlier(kurtosis[u]) : 0.0;
        if (norm != APT_SALIENCE_RAW && kurtosis != NULL) outlier /= k_mean[k];
        if (norm == APT_SALIENCE_NORMALISED) s /= s_mean[k];
        if (norm == APT_SALIENCE_SCALED) outlier *= s_mean[k];
        sal[u] = alive != NULL && !alive[u] ? 0.0f : (float)(s + outlier);
    }
    return APT_OK;
}

/* In double, rounded once per step. */
APT_API apt_result apt_salience_ema(float *avg, const float *sal, int64_t units, float beta)
{
    if (units < 0 || (units > 0 && (avg == NULL || sal == NULL))) return APT_E_ARGUMENT;
    if (!apti_finite(beta) || !apti_finite_all(avg, units) || !apti_finite_all(sal, units)) return APT_E_NONFINITE;
    if (beta < 0 || beta >= 1) return APT_E_RANGE;
    for (int64_t u = 0; u < units; u++) avg[u] = (float)((double)beta * avg[u] + (1.0 - (double)beta) * sal[u]);
    return APT_OK;
}

/* --- search ---

   A knapsack solved the way the paper does it: rank by value per cost, keep a prefix. Three things make it more than a sort.
   1. Costs do not add up. A hidden dimension costs a row in every matrix that is left, a head costs more the wider the
      hidden dimension is. So only the cost of a whole set is ever asked for (through the callback), prices are differences
      at the present shapes, and the prefix is found by bisection on its true cost.
   2. Bisection needs a cost that never falls as the prefix grows. The callback promises that in each count, and each count
      is max(floor, rounded count of the prefix): both steps never fall.
   3. Floors and rounding are per group, hence the rule "the best kept[g] of each group": for any prefix that is a set, and
      the sets of a longer prefix hold those of a shorter one. So a rising budget only ever adds units. */

/* apt_mask_search's scratch, carved into arrays. "units" are alive units from here on. */
typedef struct apti_search_work {
    double *density;                  /* [units] of any unit, by its number */
    double *price;                    /* [groups] cost that removing one unit saves */
    int32_t *order, *other;           /* [units] alive units, best density first; second half of the merge sort */
    int32_t *alive, *floor, *count;   /* [groups] alive units; floor rounded up; units in the present prefix */
    int32_t *kept;                    /* [groups] what the present prefix keeps */
    int32_t n;                        /* alive units in all */
} apti_search_work;

APT_API int64_t apt_mask_search_scratch(int32_t units, int32_t groups)
{
    if (units < 0 || groups < 0) return -1;
    /* 16 to align any pointer. */
    return 16 + (int64_t)units * (int64_t)(sizeof(double) + 2 * sizeof(int32_t)) +
           (int64_t)groups * (int64_t)(sizeof(double) + 4 * sizeof(int32_t));
}

/* doubles first: whatever follows is aligned then. The caller's pointer may have any alignment. */
static void apti_search_carve(apti_search_work *w, const apt_search *s, void *scratch)
{
    char *at = (char *)scratch;
    at += (16 - ((uintptr_t)at & 15)) & 15;
    w->density = (double *)(void *)at;
    w->price = w->density + s->units;
    w->order = (int32_t *)(void *)(w->price + s->groups);
    w->other = w->order + s->units;
    w->alive = w->other + s->units;
    w->floor = w->alive + s->groups;
    w->count = w->floor + s->groups;
    w->kept = w->count + s->groups;
}

/* The salience of a dead unit may be anything: nobody keeps it up to date. */
static apt_result apti_check_search(const apt_search *s)
{
    if (s == NULL || s->cost == NULL || s->units < 0 || s->groups < 0) return APT_E_ARGUMENT;
    if (s->units > 0 && (s->salience == NULL || s->group == NULL)) return APT_E_ARGUMENT;
    if (!apti_finite_f64(s->budget)) return APT_E_NONFINITE;
    for (int32_t u = 0; u < s->units; u++) {
        if (s->group[u] < 0 || s->group[u] >= s->groups) return APT_E_RANGE;
        if ((s->alive == NULL || s->alive[u]) && !apti_finite(s->salience[u])) return APT_E_NONFINITE;
    }
    for (int32_t g = 0; g < s->groups; g++) {
        if (s->least != NULL && s->least[g] < 0) return APT_E_RANGE;
        if (s->round_to != NULL && s->round_to[g] < 1) return APT_E_RANGE;
    }
    return APT_OK;
}

/* Lists the alive units, counts them by group, rounds the floors up: a floor that is no multiple could never be met. */
static void apti_search_count(apti_search_work *w, const apt_search *s)
{
    w->n = 0;
    for (int32_t g = 0; g < s->groups; g++) w->alive[g] = 0;
    for (int32_t u = 0; u < s->units; u++) {
        if (s->alive != NULL && !s->alive[u]) continue;
        w->order[w->n++] = u;
        w->alive[s->group[u]]++;
    }
    for (int32_t g = 0; g < s->groups; g++) {
        const int64_t least = s->least != NULL ? s->least[g] : 1, round_to = s->round_to != NULL ? s->round_to[g] : 1;
        w->floor[g] = (int32_t)apti_min_i64(apti_round_up(least, round_to), w->alive[g]);
    }
}

/* price[g] = cost(alive) - cost(alive less one of g): what a unit frees at the present shapes, also where costs do not
   add up, as with hidden dimensions. */
static apt_result apti_search_price(apti_search_work *w, const apt_search *s, double *cost_before)
{
    for (int32_t g = 0; g < s->groups; g++) w->kept[g] = w->alive[g];
    *cost_before = s->cost(w->kept, s->groups, s->user);
    if (!apti_finite_f64(*cost_before)) return APT_E_NONFINITE;
    for (int32_t g = 0; g < s->groups; g++) {
        w->price[g] = 0;
        if (w->alive[g] == 0) continue;
        w->kept[g]--;
        const double without = s->cost(w->kept, s->groups, s->user);
        w->kept[g]++;
        if (!apti_finite_f64(without)) return APT_E_NONFINITE;
        w->price[g] = *cost_before - without;
        if (w->price[g] < 0) return APT_E_ARGUMENT;
    }
    return APT_OK;
}

/* The order of the ranking is total: higher density first, then lower index. */
static bool apti_ranks_before(const double *density, int32_t a, int32_t b)
{
    if (density[a] > density[b]) return true;
    return !(density[a] < density[b]) && a < b;
}

/* Bottom-up merge sort: no recursion, no library qsort (which may allocate), the same on every platform. */
static void apti_search_sort(apti_search_work *w, const apt_search *s)
{
    for (int32_t i = 0; i < w->n; i++) {
        const int32_t u = w->order[i];
        const double price = w->price[s->group[u]];
        w->density[u] = price > 0 ? (double)s->salience[u] / price : 1.7976931348623157e308;   /* DBL_MAX: costs nothing */
    }
    int32_t *from = w->order, *to = w->other;
    for (int64_t run = 1; run < w->n; run *= 2) {
        for (int64_t lo = 0; lo < w->n; lo += 2 * run) {
            const int64_t mid = apti_min_i64(lo + run, w->n), hi = apti_min_i64(lo + 2 * run, w->n);
            int64_t a = lo, b = mid;
            for (int64_t i = lo; i < hi; i++) {
                const bool left = a < mid && (b >= hi || apti_ranks_before(w->density, from[a], from[b]));
                to[i] = from[left ? a++ : b++];
            }
        }
        int32_t *t = from;
        from = to;
        to = t;
    }
    w->order = from;
    w->other = to;
}

/* kept[g] of the best `prefix` units, with floors and rounding, and its cost. Units of a group that do not fill a multiple
   are dropped, which frees budget that a longer prefix may spend. A group with less than one multiple left is kept whole
   or not at all. Linear in the prefix; bisection calls it log2(units) times. */
static double apti_search_cost(apti_search_work *w, const apt_search *s, int32_t prefix)
{
    for (int32_t g = 0; g < s->groups; g++) w->count[g] = 0;
    for (int32_t i = 0; i < prefix; i++) w->count[s->group[w->order[i]]]++;
    for (int32_t g = 0; g < s->groups; g++) {
        const int32_t round_to = s->round_to != NULL ? s->round_to[g] : 1, count = w->count[g];
        int32_t kept = count / round_to * round_to;
        if (count == w->alive[g] && count < round_to) kept = count;
        w->kept[g] = kept > w->floor[g] ? kept : w->floor[g];
    }
    return s->cost(w->kept, s->groups, s->user);
}

/* Longest prefix that fits, -1 when not even the floors do. Invariant: `fits` fits, nothing longer than `above` does. */
static int32_t apti_search_prefix(apti_search_work *w, const apt_search *s)
{
    if (apti_search_cost(w, s, 0) > s->budget) return -1;
    int32_t fits = 0, above = w->n;
    while (fits < above) {
        const int32_t mid = fits + (above - fits + 1) / 2;
        if (apti_search_cost(w, s, mid) <= s->budget) fits = mid;
        else above = mid - 1;
    }
    return fits;
}

/* Count, price, sort, bisect, write. Nothing is written before the last cost is known to be a number. */
APT_API apt_result apt_mask_search(const apt_search *search, void *scratch, size_t scratch_bytes, uint8_t *keep, int32_t *kept,
                                   apt_search_result *result)
{
    apti_search_work w;
    double cost_before;
    apt_result r = apti_check_search(search);
    if (r != APT_OK) return r;
    const apt_search *s = search;
    if (scratch == NULL || (keep == NULL && s->units > 0)) return APT_E_ARGUMENT;
    if ((uint64_t)scratch_bytes < (uint64_t)apt_mask_search_scratch(s->units, s->groups)) return APT_E_SCRATCH;
    apti_search_carve(&w, s, scratch);
    apti_search_count(&w, s);
    r = apti_search_price(&w, s, &cost_before);
    if (r != APT_OK) return r;
    apti_search_sort(&w, s);
    const int32_t prefix = apti_search_prefix(&w, s);
    const double cost = apti_search_cost(&w, s, prefix > 0 ? prefix : 0);
    if (!apti_finite_f64(cost)) return APT_E_NONFINITE;
    for (int32_t u = 0; u < s->units; u++) keep[u] = 0;
    for (int32_t g = 0; g < s->groups; g++) w.count[g] = 0;
    int32_t total = 0;
    for (int32_t i = 0; i < w.n; i++) {          /* the best kept[g] of each group */
        const int32_t u = w.order[i], g = s->group[u];
        if (w.count[g] >= w.kept[g]) continue;
        w.count[g]++;
        keep[u] = 1;
        total++;
    }
    if (kept != NULL) memcpy(kept, w.kept, (size_t)s->groups * sizeof *kept);
    if (result != NULL) {
        result->cost_before = cost_before;
        result->cost = cost;
        result->kept = total;
        result->reached = prefix >= 0;
    }
    return APT_OK;
}

/* By its bits: -Ofast need not know NAN. */
static double apti_nan(void)
{
    const uint64_t bits = 0x7ff8000000000000u;
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 2^20 layers keep 3*layers + 1 far from the end of int32_t. */
static bool apti_valid_transformer(const apt_transformer *t)
{
    return t != NULL && t->layers >= 1 && t->layers <= (1 << 20) && t->cross_layers >= 0 && t->cross_layers <= t->layers &&
           t->head_dim >= 1 && t->query_heads >= 0;
}

APT_API int32_t apt_transformer_groups(const apt_transformer *shape)
{
    return apti_valid_transformer(shape) ? 2 * shape->layers + shape->cross_layers + 1 : -1;
}

/* Plain layers have two groups, those with cross attention three, and all of the latter come last. */
APT_API int32_t apt_transformer_group(const apt_transformer *shape, int32_t layer, int32_t what)
{
    if (!apti_valid_transformer(shape)) return -1;
    if (what == APT_GROUP_HIDDEN) return apt_transformer_groups(shape) - 1;
    if (layer < 0 || layer >= shape->layers) return -1;
    const int32_t plain = shape->layers - shape->cross_layers;
    const bool cross = layer >= plain;
    const int32_t first = 2 * layer + (cross ? layer - plain : 0);
    if (what == APT_GROUP_HEADS) return first;
    if (what == APT_GROUP_CROSS) return cross ? first + 1 : -1;
    return what == APT_GROUP_NEURONS ? first + 1 + (cross ? 1 : 0) : -1;
}

/* C = d * sum over layers of (attn + cross + ffn). One unit of a head group: q query heads in q and o, one KV head in k, v. */
APT_API double apt_transformer_cost(const int32_t *kept, int32_t groups, void *shape)
{
    const apt_transformer *t = (const apt_transformer *)shape;
    if (kept == NULL || apt_transformer_groups(t) != groups || groups < 0) return apti_nan();
    const double unit = (double)t->head_dim * (2.0 * (t->query_heads > 0 ? t->query_heads : 1) + 2.0);
    double sum = 0;
    for (int32_t l = 0; l < t->layers; l++) {
        const int32_t heads = apt_transformer_group(t, l, APT_GROUP_HEADS), cross = apt_transformer_group(t, l, APT_GROUP_CROSS);
        sum += unit * (kept[heads] + (cross >= 0 ? (double)kept[cross] : 0.0));
        sum += (t->gated ? 3.0 : 2.0) * kept[apt_transformer_group(t, l, APT_GROUP_NEURONS)];
    }
    return sum * kept[groups - 1];
}

APT_API apt_result apt_transformer_limits(int32_t *least, int32_t *round_to, const apt_transformer *shape,
                                          const apt_limits *limits)
{
    apt_limits l = APT_ZERO;
    if (limits != NULL) l = *limits;
    const int32_t groups = apt_transformer_groups(shape);
    if (groups < 0 || least == NULL || round_to == NULL) return APT_E_ARGUMENT;
    if (l.min_hidden < 0 || l.round_heads < 0 || l.round_neurons < 0 || l.round_hidden < 0) return APT_E_RANGE;
    for (int32_t g = 0; g < groups; g++) {       /* heads and cross heads; the others are overwritten below */
        least[g] = l.whole ? 0 : 1;
        round_to[g] = l.round_heads > 0 ? l.round_heads : 1;
    }
    for (int32_t i = 0; i < shape->layers; i++)
        round_to[apt_transformer_group(shape, i, APT_GROUP_NEURONS)] = l.round_neurons > 0 ? l.round_neurons : 1;
    least[groups - 1] = l.min_hidden > 0 ? l.min_hidden : 1;
    round_to[groups - 1] = l.round_hidden > 0 ? l.round_hidden : 1;
    return APT_OK;
}

/* Linear, so prices are the table's own. Times that depend on two counts at once (a product's rows and columns) need a
   cost function of the caller's. */
APT_API double apt_table_cost(const int32_t *kept, int32_t groups, void *table)
{
    const apt_cost_table *t = (const apt_cost_table *)table;
    if (kept == NULL || t == NULL || t->per_unit == NULL) return apti_nan();
    double cost = t->fixed;
    for (int32_t g = 0; g < groups; g++) cost += t->per_unit[g] * kept[g];
    return cost;
}

/* --- masks ---

   A unit fades instead of vanishing, so that the rest of the network, the adapters above all, can take over its part while
   gradients still flow. Only when every mask has arrived may arrays be cut, and then cutting changes no output. */

/* Clamped from both sides: a mask that was set by hand beyond 0..1 comes back in one step. */
APT_API apt_result apt_mask_step(float *mask, const uint8_t *keep, int64_t n, float rate)
{
    if (n < 0 || (n > 0 && (mask == NULL || keep == NULL))) return APT_E_ARGUMENT;
    if (!apti_finite(rate) || !apti_finite_all(mask, n)) return APT_E_NONFINITE;
    if (rate < 1e-6f || rate > 1) return APT_E_RANGE;
    const float near = rate / 20;                /* 1 - 100 * 0.01f is not 0 in floats; n steps err by n * 2e-8 */
    for (int64_t i = 0; i < n; i++) {
        const float m = keep[i] ? mask[i] + rate : mask[i] - rate;
        mask[i] = m >= 1 - near ? 1.0f : m <= near ? 0.0f : m;
    }
    return APT_OK;
}

APT_API apt_result apt_mask_snap(float *mask, const uint8_t *keep, int64_t n)
{
    if (n < 0 || (n > 0 && (mask == NULL || keep == NULL))) return APT_E_ARGUMENT;
    for (int64_t i = 0; i < n; i++) mask[i] = keep[i] ? 1.0f : 0.0f;
    return APT_OK;
}

/* By the bits, since under -Ofast NaN may pass a comparison; -0 counts as 0. */
static bool apti_settled(float m)
{
    const uint32_t bits = apti_bits(m);
    return bits == apti_bits(1.0f) || (bits & 0x7fffffffu) == 0;
}

APT_API int32_t apt_mask_settled(const float *mask, int64_t n)
{
    if (n < 0 || (n > 0 && mask == NULL)) return 0;
    for (int64_t i = 0; i < n; i++)
        if (!apti_settled(mask[i])) return 0;
    return 1;
}

APT_API apt_result apt_mask_keep(uint8_t *keep, const float *mask, int64_t n)
{
    if (n < 0 || (n > 0 && (mask == NULL || keep == NULL))) return APT_E_ARGUMENT;
    if (!apti_finite_all(mask, n)) return APT_E_NONFINITE;
    if (!apt_mask_settled(mask, n)) return APT_E_STATE;
    for (int64_t i = 0; i < n; i++) keep[i] = mask[i] > 0.5f;
    return APT_OK;
}

/* --- compaction ---

   One function for every array there is: each side of a matrix follows one axis (hidden, heads, neurons, or none), and the
   optimizer's moments and the adapters' A and B are cut by the same axes as the weight they belong to. */

APT_API apt_result apt_axis_make(apt_axis *axis, int32_t *index, const uint8_t *keep, int32_t units, int32_t width)
{
    if (axis == NULL || units < 0 || (keep != NULL && index == NULL && units > 0)) return APT_E_ARGUMENT;
    if (width < 1) return APT_E_RANGE;
    int32_t kept = 0;
    for (int32_t u = 0; keep != NULL && u < units; u++)
        if (keep[u]) index[kept++] = u;
    axis->units = units;
    axis->kept = keep != NULL ? kept : units;
    axis->width = width;
    axis->index = keep != NULL ? index : NULL;
    return APT_OK;
}

/* Strictly rising: no unit twice, and that is also what makes gathering in place safe. */
static apt_result apti_check_axis(const apt_axis *axis)
{
    if (axis->units < 0 || axis->kept < 0 || axis->width < 1 || axis->kept > axis->units) return APT_E_RANGE;
    if (axis->index == NULL) return axis->kept == axis->units ? APT_OK : APT_E_ARGUMENT;
    for (int32_t i = 0, last = -1; i < axis->kept; last = axis->index[i++])
        if (axis->index[i] <= last || axis->index[i] >= axis->units) return APT_E_RANGE;
    return APT_OK;
}

/* One row; memmove since dst may be src, and in a rising list no write can overtake what is still to be read. */
static void apti_gather_row(float *out, const float *in, const apt_axis *cols)
{
    const int64_t width = cols->width;
    if (cols->index == NULL) {
        memmove(out, in, (size_t)(cols->units * width) * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < cols->kept; i++)
        memmove(out + i * width, in + cols->index[i] * width, (size_t)width * sizeof *out);
}

/* In place: the k-th value written comes from a position >= k (rows and columns rise, ld_out <= ld_in), and every later
   value from a position further on still. So no write touches anything that has yet to be read. */
APT_API apt_result apt_gather(float *out, int64_t ld_out, const float *in, int64_t ld_in, const apt_axis *rows,
                              const apt_axis *cols)
{
    apt_axis one = APT_ZERO;                     /* a vector's other side */
    one.units = one.kept = one.width = 1;
    if (rows == NULL) rows = &one;
    if (cols == NULL) cols = &one;
    apt_result r = apti_check_axis(rows);
    if (r == APT_OK) r = apti_check_axis(cols);
    const int64_t width = rows->width, all = (int64_t)rows->units * width, kept = (int64_t)rows->kept * width;
    if (r == APT_OK) r = apti_check_matrix(in, ld_in, all, (int64_t)cols->units * cols->width);
    if (r == APT_OK) r = apti_check_matrix(out, ld_out, kept, (int64_t)cols->kept * cols->width);
    if (r != APT_OK) return r;
    if (out == in && kept > 1 && ld_out > ld_in) return APT_E_SHAPE;
    if (kept == 0 || cols->kept == 0) return APT_OK;
    for (int64_t i = 0; i < kept; i++) {
        const int64_t from = (rows->index != NULL ? rows->index[i / width] : i / width) * width + i % width;
        apti_gather_row(out + i * ld_out, in + from * ld_in, cols);
    }
    return APT_OK;
}

/* --- adapters ---

   Plain loops over rows, written to be read. apt_model runs the same products through its packed kernels instead, fused
   with the frozen matrix; a trainer of one's own that spends its time elsewhere can use these as they are. */

/* Rank 0 has no memory; neither has an adapter whose inputs or outputs have all been pruned. */
static apt_result apti_check_adapter(const apt_adapter *t)
{
    if (t == NULL || t->rank < 0 || t->in < 0 || t->out < 0) return APT_E_ARGUMENT;
    if (!apti_finite(t->scale)) return APT_E_NONFINITE;
    if (t->rank > 0 && ((t->in > 0 && t->a == NULL) || (t->out > 0 && t->b == NULL))) return APT_E_ARGUMENT;
    return APT_OK;
}

/* Eight partial sums, element k in lane k % 8: compilers vectorise it without leave to reorder, and appending zeros to
   both vectors changes no bit (no lane is ever -0), which apt_adapter_grow promises. */
static float apti_lane_dot(const float *x, const float *y, int64_t n)
{
    float lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) lane[k] += x[i + k] * y[i + k];
    for (int k = 0; i < n; i++, k++) lane[k] += x[i] * y[i];
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

/* y += s*x */
static void apti_axpy_plain(float *y, float s, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += s * x[i];
}

/* Rows [first, rank) of A, uniform in +-1/sqrt(in): x A^T then has about the size of one entry of x. B = 0 beside it makes
   the adapter start as nothing; A = 0 as well would make both gradients 0 for ever. */
static void apti_adapter_random(const apt_adapter *t, int32_t first, apt_rng *rng)
{
    if (t->in == 0) return;
    const double bound = 1 / sqrt((double)t->in);
    for (int64_t i = (int64_t)first * t->in; i < (int64_t)t->rank * t->in; i++)
        t->a[i] = (float)(bound * (2 * apt_rng_uniform(rng) - 1));
}

APT_API apt_result apt_adapter_init(const apt_adapter *adapter, apt_rng *rng)
{
    const apt_result r = apti_check_adapter(adapter);
    if (r != APT_OK) return r;
    if (rng == NULL) return APT_E_ARGUMENT;
    apti_adapter_random(adapter, 0, rng);
    for (int64_t i = 0; i < (int64_t)adapter->out * adapter->rank; i++) adapter->b[i] = 0;
    return APT_OK;
}

/* h = s x A^T; y += h B^T. Both are rows of dot products over contiguous memory. The scale goes into h once, so that
   neither the product with B nor the gradient of B has to know it. */
APT_API apt_result apt_adapter_forward(const apt_adapter *adapter, float *y, int64_t ldy, float *xa, const float *x, int64_t ldx,
                                       int64_t rows)
{
    apt_result r = apti_check_adapter(adapter);
    if (r != APT_OK) return r;
    const apt_adapter *t = adapter;
    r = apti_check_matrix(x, ldx, rows, t->in);
    if (r == APT_OK) r = apti_check_matrix(y, ldy, rows, t->out);
    if (r == APT_OK) r = apti_check_matrix(xa, t->rank, rows, t->rank);
    if (r != APT_OK || t->rank == 0) return r;
    for (int64_t i = 0; i < rows; i++) {
        float *h = xa + i * t->rank;
        for (int64_t k = 0; k < t->rank; k++) h[k] = t->scale * apti_lane_dot(x + i * ldx, t->a + k * t->in, t->in);
        for (int64_t o = 0; o < t->out; o++) y[i * ldy + o] += apti_lane_dot(h, t->b + o * t->rank, t->rank);
    }
    return APT_OK;
}

/* The forward's lines in reverse, h = xa:
       y += h B^T     gives   db(out, rank) += dy^T h     and   dh(rows, rank) = dy B
       h  = s x A^T   gives   da(rank, in)  += (s dh)^T x and   dx(rows, in)  += (s dh) A
   dxa holds s*dh. All inner loops are y += s*x over contiguous memory. */
APT_API apt_result apt_adapter_backward(const apt_adapter *adapter, float *dx, int64_t lddx, float *da, float *db, float *dxa,
                                        const float *dy, int64_t lddy, const float *x, int64_t ldx, const float *xa, int64_t rows)
{
    apt_result r = apti_check_adapter(adapter);
    if (r != APT_OK) return r;
    const apt_adapter *t = adapter;
    const int64_t rank = t->rank, in = t->in;
    r = apti_check_matrix(dy, lddy, rows, t->out);
    if (r == APT_OK && da != NULL) r = apti_check_matrix(x, ldx, rows, in);
    if (r == APT_OK && dx != NULL) r = apti_check_matrix(dx, lddx, rows, in);
    if (r == APT_OK && db != NULL) r = apti_check_matrix(xa, rank, rows, rank);
    if (r == APT_OK) r = apti_check_matrix(dxa, rank, rows, rank);
    if (r != APT_OK || rank == 0) return r;
    for (int64_t i = 0; i < rows; i++) {
        float *dh = dxa + i * rank;
        for (int64_t k = 0; k < rank; k++) dh[k] = 0;
        for (int64_t o = 0; o < t->out; o++) {
            const float d = dy[i * lddy + o];
            apti_axpy_plain(dh, t->scale * d, t->b + o * rank, rank);
            if (db != NULL) apti_axpy_plain(db + o * rank, d, xa + i * rank, rank);
        }
        for (int64_t k = 0; k < rank; k++) {
            if (da != NULL) apti_axpy_plain(da + k * in, dh[k], x + i * ldx, in);
            if (dx != NULL) apti_axpy_plain(dx + i * lddx, dh[k], t->a + k * in, in);
        }
    }
    return APT_OK;
}

/* Summed in double with W added last and rounded once, so that the merged matrix is the float nearest to W + s*B*A: the
   rank sum can be of the same size as W with opposite sign, where float steps would lose digits. */
APT_API apt_result apt_adapter_merge(const apt_adapter *adapter, float *w, int64_t ldw)
{
    apt_result r = apti_check_adapter(adapter);
    if (r != APT_OK) return r;
    const apt_adapter *t = adapter;
    r = apti_check_matrix(w, ldw, t->out, t->in);
    if (r != APT_OK || t->rank == 0) return r;
    enum { BLOCK = 64 };                         /* inputs at a time: sums in double without a caller's buffer */
    for (int64_t o = 0; o < t->out; o++) {
        for (int64_t first = 0; first < t->in; first += BLOCK) {
            const int64_t n = apti_min_i64(BLOCK, t->in - first);
            double sum[BLOCK] = {0};
            for (int64_t k = 0; k < t->rank; k++) {
                const double b = (double)t->scale * t->b[o * t->rank + k];
                for (int64_t i = 0; i < n; i++) sum[i] += b * t->a[k * t->in + first + i];
            }
            float *row = w + o * ldw + first;
            for (int64_t i = 0; i < n; i++) row[i] = (float)(row[i] + sum[i]);
        }
    }
    return APT_OK;
}

/* |B * dL/dB| entry by entry, not |sum|: an adapter matters when its entries pull, also if they pull apart. dL/dB is that of
   the whole optimizer step (add up micro-batches first). */
APT_API apt_result apt_adapter_importance(const apt_adapter *adapter, const float *db, float *importance)
{
    const apt_result r = apti_check_adapter(adapter);
    if (r != APT_OK) return r;
    const int64_t n = (int64_t)adapter->out * adapter->rank;
    if (importance == NULL || (n > 0 && db == NULL)) return APT_E_ARGUMENT;
    if (!apti_finite_all(adapter->b, n) || !apti_finite_all(db, n)) return APT_E_NONFINITE;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += fabs((double)adapter->b[i] * (double)db[i]);
    if (!apti_finite((float)sum)) return APT_E_NONFINITE;
    *importance = (float)sum;
    return APT_OK;
}

/* *total = sum of rank*per_rank; APT_E_RANGE when something is negative or too large. */
static apt_result apti_plan_total(const int32_t *rank, const int64_t *per_rank, int32_t n, int64_t *total)
{
    *total = 0;
    for (int32_t i = 0; i < n; i++) {
        int64_t values;
        if (!apti_mul(rank[i], per_rank[i], &values) || !apti_add(*total, values, total)) return APT_E_RANGE;
    }
    return APT_OK;
}

/* Why the budget holds: were all to grow by budget/total, the new total would be at most the budget; the lower half does
   not grow, and floor() only takes away. What is left over goes to the next event, where total is larger and other
   adapters may lead. */
APT_API apt_result apt_adapter_plan(int32_t *new_rank, const float *importance, const int32_t *rank, const int64_t *per_rank,
                                    int32_t n, int64_t budget, int32_t max_rank)
{
    int64_t total;
    if (n < 0 || (n > 0 && (new_rank == NULL || importance == NULL || rank == NULL || per_rank == NULL))) return APT_E_ARGUMENT;
    if (budget < 0 || max_rank < 0) return APT_E_RANGE;
    const apt_result r = apti_plan_total(rank, per_rank, n, &total);
    if (r != APT_OK) return r;
    if (!apti_finite_all(importance, n)) return APT_E_NONFINITE;
    int64_t most, product;                       /* from total*max_rank on, every adapter reaches max_rank */
    if (apti_mul(total, max_rank, &most)) budget = apti_min_i64(budget, most);
    for (int32_t i = 0; i < n; i++)
        if (!apti_mul(rank[i], budget, &product)) return APT_E_RANGE;
    for (int32_t i = 0; i < n; i++) {
        int32_t better = 0;                      /* adapters are few: counting beats sorting, and needs no scratch */
        for (int32_t j = 0; j < n; j++) better += importance[j] > importance[i] || (!(importance[j] < importance[i]) && j < i);
        int64_t grown = total > 0 && better < n - n / 2 ? rank[i] * budget / total : 0;
        grown = apti_min_i64(grown, max_rank);
        new_rank[i] = (int32_t)apti_max_i64(grown, rank[i]);
    }
    return APT_OK;
}

/* B(out, rank) is row-major, so its rows spread out; A(rank, in) only gets rows at the end. Output unchanged to the bit: the
   new columns of B are 0 and the dot products with them add +0 to lanes that are never -0 (see apti_lane_dot). */
APT_API apt_result apt_adapter_grow(const apt_adapter *grown, const apt_adapter *old, apt_rng *rng)
{
    apt_result r = apti_check_adapter(grown);
    if (r == APT_OK) r = apti_check_adapter(old);
    if (r != APT_OK) return r;
    if (grown->in != old->in || grown->out != old->out || grown->rank < old->rank) return APT_E_SHAPE;
    if (grown->scale < old->scale || grown->scale > old->scale) return APT_E_RANGE;
    const int64_t in = grown->in, out = grown->out, rank = grown->rank, kept = old->rank;
    if (kept > 0 && in > 0) memcpy(grown->a, old->a, (size_t)(kept * in) * sizeof(float));
    if (rng != NULL) apti_adapter_random(grown, old->rank, rng);
    else
        for (int64_t i = kept * in; i < rank * in; i++) grown->a[i] = 0;
    for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < rank; k++) grown->b[o * rank + k] = k < kept ? old->b[o * kept + k] : 0.0f;
    return APT_OK;
}

/* --- self-distillation ---

   Gradients are added (+=), so that task loss and distillation share one buffer: the caller scales one by (1 - mu) and
   passes mu times its weight as grad_scale for the other. Losses come back unscaled, for the log. */

/* Differences in double: begin and end may lie anywhere in int64_t. */
APT_API apt_result apt_distill_mu(float *mu, int64_t step, int64_t begin, int64_t end)
{
    if (mu == NULL) return APT_E_ARGUMENT;
    if (end < begin) return APT_E_RANGE;
    if (step >= end) *mu = 1;
    else *mu = step <= begin ? 0.0f : (float)(((double)step - (double)begin) / ((double)end - (double)begin));
    return APT_OK;
}

/* Shapes and finiteness of the rows that count; *count of them. */
static apt_result apti_check_distill(const double *loss, const float *grad, int64_t ld_grad, const float *student,
                                     int64_t ld_student, const float *teacher, int64_t ld_teacher, const uint8_t *used,
                                     int64_t rows, int64_t cols, int64_t *count)
{
    if (loss == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_check_matrix(student, ld_student, rows, cols);
    if (r == APT_OK) r = apti_check_matrix(teacher, ld_teacher, rows, cols);
    if (r == APT_OK && grad != NULL) r = apti_check_matrix(grad, ld_grad, rows, cols);
    *count = 0;
    for (int64_t i = 0; r == APT_OK && i < rows; i++) {
        if (used != NULL && !used[i]) continue;
        if (!apti_finite_all(student + i * ld_student, cols) || !apti_finite_all(teacher + i * ld_teacher, cols))
            r = APT_E_NONFINITE;
        ++*count;
    }
    return r;
}

/* log of the sum of exp(z/T), around the maximum: no exponent is above 0, and one is exactly 0, so that the logarithm's
   argument lies between 1 and n. The maximum starts at the first element, not at some constant. */
static double apti_log_sum_exp(const float *z, int64_t n, double inverse)
{
    double top = (double)z[0], sum = 0;
    for (int64_t i = 1; i < n; i++)
        if ((double)z[i] > top) top = (double)z[i];
    for (int64_t i = 0; i < n; i++) sum += exp(((double)z[i] - top) * inverse);
    return top * inverse + log(sum);
}

/* With p = softmax(teacher/T), q = softmax(student/T):  loss = T^2 mean sum p (log p - log q);
   d loss / d student = T^2 (1/T) (q - p) / rows.
   T^2 keeps the gradient's size when T changes: softmax(z/T) flattens by 1/T on both sides (Hinton et al. 2015). Student and
   teacher take the same path through the same functions, so equal logits give p == q and log p == log q to the bit. */
APT_API apt_result apt_distill_kl(double *loss, float *grad, int64_t ld_grad, const float *student, int64_t ld_student,
                                  const float *teacher, int64_t ld_teacher, const uint8_t *used, int64_t rows, int64_t classes,
                                  float temperature, float grad_scale)
{
    int64_t count;
    const apt_result r = apti_check_distill(loss, grad, ld_grad, student, ld_student, teacher, ld_teacher, used, rows, classes,
                                            &count);
    if (r != APT_OK) return r;
    if (!apti_finite(temperature) || !apti_finite(grad_scale)) return APT_E_NONFINITE;
    if (!(temperature > 0)) return APT_E_RANGE;
    const double t = (double)temperature, inverse = 1 / t, factor = count > 0 ? (double)grad_scale * t / (double)count : 0;
    double sum = 0;
    for (int64_t i = 0; classes > 0 && i < rows; i++) {
        if (used != NULL && !used[i]) continue;
        const float *zs = student + i * ld_student, *zt = teacher + i * ld_teacher;
        const double lse_s = apti_log_sum_exp(zs, classes, inverse), lse_t = apti_log_sum_exp(zt, classes, inverse);
        for (int64_t c = 0; c < classes; c++) {
            const double q = exp(zs[c] * inverse - lse_s), p = exp(zt[c] * inverse - lse_t);
            sum += p * (((double)zt[c] - (double)zs[c]) * inverse - (lse_t - lse_s));      /* p (log p - log q): 0 for equals */
            if (grad != NULL) grad[i * ld_grad + c] = (float)(grad[i * ld_grad + c] + factor * (q - p));
        }
    }
    *loss = count > 0 ? t * t * sum / (double)count : 0;
    return APT_OK;
}

/* loss = mean (s - t)^2;  d loss / d s = 2 (s - t) / (rows*features). The mean is over features too, so a weight chosen for
   one model width serves another. */
APT_API apt_result apt_distill_mse(double *loss, float *grad, int64_t ld_grad, const float *student, int64_t ld_student,
                                   const float *teacher, int64_t ld_teacher, const uint8_t *used, int64_t rows, int64_t features,
                                   float grad_scale)
{
    int64_t count;
    const apt_result r = apti_check_distill(loss, grad, ld_grad, student, ld_student, teacher, ld_teacher, used, rows, features,
                                            &count);
    if (r != APT_OK) return r;
    if (!apti_finite(grad_scale)) return APT_E_NONFINITE;
    const double n = (double)count * (double)features, factor = n > 0 ? 2.0 * (double)grad_scale / n : 0;
    double sum = 0;
    for (int64_t i = 0; i < rows; i++) {
        if (used != NULL && !used[i]) continue;
        for (int64_t f = 0; f < features; f++) {
            const double d = (double)student[i * ld_student + f] - (double)teacher[i * ld_teacher + f];
            sum += d * d;
            if (grad != NULL) grad[i * ld_grad + f] = (float)(grad[i * ld_grad + f] + factor * d);
        }
    }
    *loss = n > 0 ? sum / n : 0;
    return APT_OK;
}

/* The nearest layer that is left, the lower one of two; -1: none. */
static int32_t apti_nearest_layer(const uint8_t *whole_pruned, int32_t layers, int32_t layer)
{
    for (int32_t d = 0; d < layers; d++) {
        if (layer - d >= 0 && (whole_pruned == NULL || !whole_pruned[layer - d])) return layer - d;
        if (layer + d < layers && (whole_pruned == NULL || !whole_pruned[layer + d])) return layer + d;
    }
    return -1;
}

/* Quarter i holds layers [i*layers/4, (i+1)*layers/4): together all layers, sizes differing by one at most. */
APT_API apt_result apt_distill_match(apt_distill_map *map, const uint8_t *whole_pruned, int32_t layers, apt_rng *rng)
{
    if (map == NULL || rng == NULL || layers < 0) return APT_E_ARGUMENT;
    memset(map, 0, sizeof *map);
    const int32_t parts = layers < 4 ? layers : 4;
    for (int32_t i = 0; i < parts; i++) {
        /* The draw comes first, so that the generator moves on alike whatever has been pruned. */
        const int64_t first = (int64_t)layers * i / parts, end = (int64_t)layers * (i + 1) / parts;
        map->teacher[i] = (int32_t)(first + apt_rng_below(rng, (uint32_t)(end - first)));
        map->student[i] = apti_nearest_layer(whole_pruned, layers, map->teacher[i]);
        if (map->student[i] >= 0) map->pairs++;
    }
    if (map->pairs == 0) memset(map, 0, sizeof *map);    /* one is pruned whole: all are */
    return APT_OK;
}

/* --- presets: Table 6 of the paper --- */

#ifndef APT_ONLY_CORE
APT_API apt_result apt_preset_query(apt_preset_kind kind, apt_preset_info *info)
{
    if (info == NULL) return APT_E_ARGUMENT;
    memset(info, 0, sizeof *info);
    info->learning_rate = 2e-4f;
    info->batch = 32;
    info->epochs = 40;
    info->distill_epochs = 20;
    switch (kind) {
        case APT_PRESET_GLUE_SMALL: info->name = "glue-small"; return APT_OK;
        case APT_PRESET_GLUE_BIG: info->name = "glue-big"; return APT_OK;
        case APT_PRESET_SQUAD: info->name = "squad"; return APT_OK;
        case APT_PRESET_CNNDM:
            info->name = "cnndm";
            info->learning_rate = 1e-4f;
            info->batch = 16;
            info->epochs = 16;
            info->distill_epochs = 6;
            return APT_OK;
        case APT_PRESET_ALPACA:
            info->name = "alpaca";
            info->learning_rate = 1e-4f;
            info->epochs = 15;
            info->distill_epochs = 0;
            return APT_OK;
    }
    memset(info, 0, sizeof *info);
    return APT_E_ARGUMENT;
}

/* What the table gives for all its rows alike stands here, what differs in apt_preset_query. Everything else stays 0 and so
   takes the trainer's defaults. An unknown kind gives a zeroed desc. */
APT_API apt_train_desc apt_preset(apt_preset_kind kind)
{
    apt_train_desc desc = APT_ZERO;
    apt_preset_info info;
    if (apt_preset_query(kind, &info) != APT_OK) return desc;
    desc.learning_rate = info.learning_rate;
    desc.disable_distill = info.distill_epochs == 0;
    desc.target_sparsity = 0.6f;
    desc.rank = 8;
    desc.scale = 2.0f;
    desc.update_frequency = 100;
    desc.mask_step = 0.01f;
    desc.salience_momentum = 0.9f;
    desc.clip = 1.0f;
    return desc;
}
#endif /* APT_ONLY_CORE */

// >>sparsify
/* ---------------------------------------------------------------------------------------------------------------------
   Magnitude pruning on raw arrays

   |w| is ranked by the 31 bits of its magnitude, which order floats as integers do: exact, the same under -Ofast, and the k-th
   smallest is found digit by digit by counting, with no copy of the weights and no memory but the counters: three digits of
   11, 10 and 10 bits, or, where a context lends its scratch and there are weights enough, two of 16 and 15.
   ------------------------------------------------------------------------------------------------------------------ */

/* Runs task(i, thread, arg) for i < count, by the context's threads where there is one. */
static void apti_share(apt_ctx *ctx, int64_t count, void (*task)(int64_t index, int32_t thread, void *arg), void *arg)
{
#ifndef APT_ONLY_CORE
    if (ctx != NULL) {
        apti_parallel_for(ctx, count, task, arg);
        return;
    }
#else
    (void)ctx;
#endif
    for (int64_t i = 0; i < count; i++) task(i, 0, arg);
}

APTI_INLINE uint32_t apti_magnitude(float x)
{
    return apti_bits(x) & 0x7fffffffu;
}

/* --- bitmasks --- */

APT_API int64_t apt_bitmask_words(int64_t n)
{
    return n < 0 ? -1 : apti_ceil_div(n, 64);
}

APT_API int64_t apt_bitmask_kept(const uint64_t *mask, int64_t n)
{
    int64_t kept = 0;
    if (n < 0 || (mask == NULL && n > 0)) return -1;
    for (int64_t i = 0; i < apt_bitmask_words(n); i++) kept += apti_popcount(mask[i]);
    return kept;
}

/* Bits behind the last weight would be counted as weights. */
static bool apti_bitmask_tail_ok(const uint64_t *mask, int64_t n)
{
    return n % 64 == 0 || mask[n / 64] >> n % 64 == 0;
}

/* w[j] = 0 where bit j of `bits` is not set, j < count <= 64. Whole words of ones need no write, words of zeros no read. */
APTI_INLINE void apti_bitmask_word(float *w, uint64_t bits, int64_t count)
{
    if (bits == ~(uint64_t)0) return;
    if (bits == 0) {
        memset(w, 0, (size_t)count * sizeof(float));
        return;
    }
    for (int64_t j = 0; j < count; j++) w[j] = apti_float(apti_bits(w[j]) & (0u - (uint32_t)(bits >> j & 1)));
}

/* mask begins at weight 0 of w. */
static void apti_bitmask_run(float *w, const uint64_t *mask, int64_t n)
{
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) apti_bitmask_word(w + i, mask[i / 64], 64);
    if (i < n) apti_bitmask_word(w + i, mask[i / 64], n - i);
}

typedef struct apti_bitmask_job { float *w; const uint64_t *mask; int64_t n; } apti_bitmask_job;
#define APTI_BITMASK_BLOCK 65536                 /* weights of a task; a multiple of 64 */

static void apti_bitmask_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bitmask_job *job = (const apti_bitmask_job *)arg;
    const int64_t at = index * APTI_BITMASK_BLOCK;
    (void)thread;
    apti_bitmask_run(job->w + at, job->mask + at / 64, apti_min_i64(APTI_BITMASK_BLOCK, job->n - at));
}

APT_API apt_result apt_bitmask_apply(apt_ctx *ctx, float *w, const uint64_t *mask, int64_t n)
{
    if (n < 0 || (n > 0 && (w == NULL || mask == NULL))) return APT_E_ARGUMENT;
    apti_bitmask_job job = {w, mask, n};
    apti_share(ctx, apti_ceil_div(n, APTI_BITMASK_BLOCK), apti_bitmask_task, &job);
    return APT_OK;
}

/* --- selection --- */

#define APTI_DIGITS 2048                         /* values of the first digit of three ... */
#define APTI_WIDE_DIGITS 65536                   /* ... and of two, for chunks of at least ... */
#define APTI_WIDE_WORDS 16384                    /* ... so many words of mask */
#define APTI_CHUNKS 64                           /* at most so many, one per thread */
#define APTI_CHUNK_WORDS 256                     /* a chunk is worth at least so many words */

/* The arrays as one row of mask words, cut into one chunk per thread: no two threads write to the same word. */
typedef struct apti_select {
    apt_weights *part;
    int32_t parts, chunks;
    int64_t words;
    uint32_t digits;                             /* values of the first digit */
    int32_t shift, up;                           /* the digit counted now is bits [shift, up); bits above must be `prefix` */
    uint32_t prefix;
    uint64_t *count[APTI_CHUNKS];                /* [digits] each */
    uint32_t border;                             /* weights below it go, and of those that are equal to it ... */
    uint64_t drop[APTI_CHUNKS];                  /* ... the first so many of each chunk */
} apti_select;

/* Stretches of a chunk: weights [from, to) of one part, from being a multiple of 64. */
typedef struct apti_stretch { int32_t part; int64_t from, to, skip, left; } apti_stretch;

static apti_stretch apti_stretch_first(const apti_select *s, int64_t chunk)
{
    apti_stretch r;
    memset(&r, 0, sizeof r);
    r.part = -1;
    r.skip = s->words / s->chunks * chunk + apti_min_i64(chunk, s->words % s->chunks);
    r.left = s->words / s->chunks + (chunk < s->words % s->chunks);
    return r;
}

static bool apti_stretch_next(const apti_select *s, apti_stretch *r)
{
    while (r->left > 0 && ++r->part < s->parts) {
        const int64_t words = apt_bitmask_words(s->part[r->part].n), skip = apti_min_i64(r->skip, words);
        const int64_t take = apti_min_i64(words - skip, r->left);
        r->skip -= skip;
        r->left -= take;
        r->from = 64 * skip;
        r->to = apti_min_i64(64 * (skip + take), s->part[r->part].n);
        if (take > 0) return true;
    }
    return false;
}

static void apti_digit_task(int64_t chunk, int32_t thread, void *arg)
{
    const apti_select *s = (const apti_select *)arg;
    uint64_t *count = s->count[chunk];
    apti_stretch r = apti_stretch_first(s, chunk);
    const int32_t shift = s->shift, up = s->up;
    const uint32_t prefix = s->prefix, low = (1u << (up - shift)) - 1;
    (void)thread;
    memset(count, 0, s->digits * sizeof(uint64_t));
    while (apti_stretch_next(s, &r)) {
        const float *w = s->part[r.part].w;
        if (up == 31) {                          /* the first digit: every weight counts */
            for (int64_t i = r.from; i < r.to; i++) count[apti_magnitude(w[i]) >> shift]++;
            continue;
        }
        for (int64_t i = r.from; i < r.to; i++) {
            const uint32_t m = apti_magnitude(w[i]);
            if (m >> up == prefix) count[m >> shift & low]++;
        }
    }
}

/* Bit j: |w[j]| >= least, j < 64. Magnitudes are below 2^31, so the sign of the difference tells. */
APTI_INLINE uint64_t apti_at_least(const float *w, uint32_t least)
{
    uint64_t bits = 0;
    for (int32_t j = 64; j > 0; j -= 8) {
        uint32_t byte = 0;
#define APTI_BELOW(t) byte |= (apti_magnitude(w[j - 8 + t]) - least) >> 31 << t;
        APTI_BELOW(0) APTI_BELOW(1) APTI_BELOW(2) APTI_BELOW(3) APTI_BELOW(4) APTI_BELOW(5) APTI_BELOW(6) APTI_BELOW(7)
#undef APTI_BELOW
        bits = bits << 8 | byte;
    }
    return ~bits;
}

/* The rule itself, for the words where the fast test is not enough: bits of the first n <= 64 weights; *drop counts down. */
static uint64_t apti_border_word(const float *w, int64_t n, uint32_t border, uint64_t *drop)
{
    uint64_t bits = 0;
    for (int64_t j = 0; j < n; j++) {
        const uint32_t m = apti_magnitude(w[j]);
        const bool dropped = m == border && *drop > 0;
        *drop -= dropped;
        bits |= (uint64_t)(m >= border && !dropped) << j;
    }
    return bits;
}

/* While weights on the border are still to be dropped, a word in which the border makes a difference holds some of them. */
static void apti_mask_task(int64_t chunk, int32_t thread, void *arg)
{
    apti_select *s = (apti_select *)arg;
    uint64_t drop = s->drop[chunk];
    const uint32_t border = s->border;
    apti_stretch r = apti_stretch_first(s, chunk);
    (void)thread;
    while (apti_stretch_next(s, &r)) {
        for (int64_t i = r.from; i < r.to; i += 64) {
            const float *w = s->part[r.part].w + i;
            uint64_t *mask = &s->part[r.part].mask[i / 64];
            if (r.to - i < 64) {
                *mask = apti_border_word(w, r.to - i, border, &drop);
                continue;
            }
            *mask = apti_at_least(w, border);
            if (drop > 0 && apti_at_least(w, border + 1) != *mask) *mask = apti_border_word(w, 64, border, &drop);
        }
    }
}

/* One digit further: which one holds the k-th smallest of those that match the prefix. *k becomes its rank among those that match
   the longer one. */
static uint32_t apti_select_digit(apt_ctx *ctx, apti_select *s, uint64_t *k)
{
    uint32_t digit = 0;
    apti_share(ctx, s->chunks, apti_digit_task, s);
    for (;; digit++) {
        uint64_t sum = 0;
        for (int32_t c = 0; c < s->chunks; c++) sum += s->count[c][digit];
        if (*k < sum || digit + 1 == s->digits) return digit;
        *k -= sum;
    }
}

/* Chunks, and their counters: in the scratch of the context's threads, or `own` for a single chunk. */
static void apti_select_begin(apt_ctx *ctx, apti_select *s, apt_weights *part, int32_t parts, uint64_t *own)
{
    memset(s, 0, sizeof *s);
    s->part = part;
    s->parts = parts;
    for (int32_t i = 0; i < parts; i++) s->words += apt_bitmask_words(part[i].n);
    s->chunks = 1;
    s->count[0] = own;
    s->digits = APTI_DIGITS;
#ifndef APT_ONLY_CORE
    if (ctx == NULL) return;
    s->chunks = (int32_t)apti_min_i64(ctx->threads, apti_max_i64(1, s->words / APTI_CHUNK_WORDS));
    for (int32_t c = 0; c < s->chunks; c++) s->count[c] = (uint64_t *)ctx->scratch[c];
    if (s->words / s->chunks >= APTI_WIDE_WORDS) s->digits = APTI_WIDE_DIGITS;
#else
    (void)ctx;
#endif
}

static void apti_select_end(apt_ctx *ctx, apti_select *s)
{
    apti_share(ctx, s->chunks, apti_mask_task, s);
    for (int32_t i = 0; i < s->parts; i++) s->part[i].zeros = s->part[i].n - apt_bitmask_kept(s->part[i].mask, s->part[i].n);
}

/* Counts the first digit, which also tells whether all weights are finite. */
static apt_result apti_select_scan(apt_ctx *ctx, apti_select *s, uint64_t *k, uint32_t *digit)
{
    s->up = 31;
    s->shift = s->digits == APTI_DIGITS ? 20 : 15;
    *digit = apti_select_digit(ctx, s, k);
    for (int32_t c = 0; c < s->chunks; c++)
        for (uint32_t d = 0x7f800000u >> s->shift; d < s->digits; d++)
            if (s->count[c][d] != 0) return APT_E_NONFINITE;
    return APT_OK;
}

static apt_result apti_weights_check(const apt_weights *part, int32_t parts, int64_t *n)
{
    *n = 0;
    if (parts < 0 || (parts > 0 && part == NULL)) return APT_E_ARGUMENT;
    for (int32_t i = 0; i < parts; i++) {
        if (part[i].n < 0 || (part[i].n > 0 && (part[i].w == NULL || part[i].mask == NULL))) return APT_E_ARGUMENT;
        if (!apti_add(*n, part[i].n, n)) return APT_E_RANGE;
    }
    return APT_OK;
}

static apt_result apti_check_sparsity(double sparsity)
{
    if (!apti_finite_f64(sparsity)) return APT_E_NONFINITE;
    return sparsity >= 0 && sparsity < 1 ? APT_OK : APT_E_RANGE;
}

/* The k-th smallest is the border; what is left of k behind the smaller ones is dropped from the equal ones, chunk by chunk. */
APT_API apt_result apt_magnitude_global(apt_ctx *ctx, apt_weights *part, int32_t parts, double sparsity)
{
    apti_select s;
    uint64_t own[APTI_DIGITS], k;
    uint32_t digit = 0;
    int64_t n = 0;
    apt_result r = apti_weights_check(part, parts, &n);
    if (r == APT_OK) r = apti_check_sparsity(sparsity);
    if (r != APT_OK) return r;
    const uint64_t gone = (uint64_t)apti_min_i64((int64_t)((double)n * sparsity), apti_max_i64(n - 1, 0));
    apti_select_begin(ctx, &s, part, parts, own);
    k = gone > 0 ? gone - 1 : 0;
    r = apti_select_scan(ctx, &s, &k, &digit);
    if (r != APT_OK) return r;
    if (gone > 0) {
        s.prefix = digit;
        while (s.shift > 0) {
            s.up = s.shift;
            s.shift = s.up == 20 ? 10 : 0;
            digit = apti_select_digit(ctx, &s, &k);
            s.prefix = s.prefix << (s.up - s.shift) | digit;
        }
        s.border = s.prefix;
        k++;
        for (int32_t c = 0; c < s.chunks && k > 0; c++) {
            s.drop[c] = s.count[c][digit] < k ? s.count[c][digit] : k;
            k -= s.drop[c];
        }
    }
    apti_select_end(ctx, &s);
    return APT_OK;
}

APT_API apt_result apt_magnitude_sparsity(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t n,
                                          double sparsity)
{
    apt_weights part = {w, n, mask, 0};
    const apt_result r = apt_magnitude_global(ctx, &part, 1, sparsity);
    if (r == APT_OK && zeros != NULL) *zeros = part.zeros;
    return r;
}

APT_API apt_result apt_magnitude_threshold(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t n,
                                           float threshold)
{
    apt_weights part = {w, n, mask, 0};
    apti_select s;
    uint64_t own[APTI_DIGITS], k = 0;
    uint32_t digit = 0;
    apt_result r = apti_weights_check(&part, 1, &n);
    if (r != APT_OK) return r;
    if (!apti_finite(threshold)) return APT_E_NONFINITE;
    if (threshold < 0) return APT_E_RANGE;
    apti_select_begin(ctx, &s, &part, 1, own);
    r = apti_select_scan(ctx, &s, &k, &digit);
    if (r != APT_OK) return r;
    s.border = apti_magnitude(threshold);        /* what is equal to it stays: nothing is dropped */
    apti_select_end(ctx, &s);
    if (zeros != NULL) *zeros = part.zeros;
    return APT_OK;
}

/* --- patterns --- */

typedef struct apti_pattern_job { uint64_t *mask; const float *w; int64_t rows, cols; int32_t keep, of; } apti_pattern_job;

/* The bits of one group of n weights: its `keep` last ones by (|w|, index). */
static uint64_t apti_pattern_group(const float *w, int32_t n, int32_t keep)
{
    uint64_t bits = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t better = 0;                      /* weights that go after this one */
        const uint32_t m = apti_magnitude(w[i]);
        for (int32_t j = 0; j < n; j++) better += apti_magnitude(w[j]) > m || (j > i && apti_magnitude(w[j]) == m);
        bits |= (uint64_t)(better < keep) << i;
    }
    return bits;
}

/* 64 rows begin and end with a word of the mask, whatever their length. */
static void apti_pattern_task(int64_t index, int32_t thread, void *arg)
{
    const apti_pattern_job *job = (const apti_pattern_job *)arg;
    const int64_t first = 64 * index, last = apti_min_i64(first + 64, job->rows), cols = job->cols;
    (void)thread;
    memset(job->mask + first * cols / 64, 0, (size_t)apt_bitmask_words((last - first) * cols) * sizeof(uint64_t));
    for (int64_t r = first; r < last; r++) {
        for (int64_t c = 0; c < cols; c += job->of) {
            const int64_t at = r * cols + c;
            const int32_t n = (int32_t)apti_min_i64(job->of, cols - c);
            const uint64_t bits = apti_pattern_group(job->w + at, n, job->keep);
            job->mask[at / 64] |= bits << at % 64;
            if (at % 64 + n > 64) job->mask[at / 64 + 1] |= bits >> (64 - at % 64);
        }
    }
}

APT_API apt_result apt_magnitude_pattern(apt_ctx *ctx, uint64_t *mask, int64_t *zeros, const float *w, int64_t rows,
                                         int64_t cols, int32_t keep, int32_t of)
{
    int64_t n;
    if (rows < 0 || cols < 0) return APT_E_ARGUMENT;
    if (!apti_mul(rows, cols, &n)) return APT_E_RANGE;
    if (n > 0 && (mask == NULL || w == NULL)) return APT_E_ARGUMENT;
    if (keep < 1 || of <= keep || of > 64) return APT_E_RANGE;
    if (!apti_finite_all(w, n)) return APT_E_NONFINITE;
    apti_pattern_job job = {mask, w, rows, cols, keep, of};
    if (n > 0) apti_share(ctx, apti_ceil_div(rows, 64), apti_pattern_task, &job);
    if (zeros != NULL) *zeros = n - apt_bitmask_kept(mask, n);
    return APT_OK;
}

APT_API apt_result apt_magnitude_schedule(double *sparsity, double first, double last, int32_t iterations, int32_t t)
{
    if (sparsity == NULL) return APT_E_ARGUMENT;
    if (!apti_finite_f64(first) || !apti_finite_f64(last)) return APT_E_NONFINITE;
    if (!(first > 0) || last < first || last >= 1 || iterations < 1 || t < 0 || t > iterations) return APT_E_RANGE;
    *sparsity = t == iterations ? last : first * pow(last / first, (double)t / iterations);
    return APT_OK;
}

/* --- compressed matrices --- */

APT_API int64_t apt_sparse_count(const float *w, int64_t ld, int64_t rows, int64_t cols)
{
    int64_t count = 0;
    if (apti_check_matrix(w, ld, rows, cols) != APT_OK) return -1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) count += apti_bits(w[r * ld + c]) != 0;
    return count;
}

APT_API int64_t apt_sparse_bytes(int64_t rows, int64_t cols, int64_t count)
{
    int64_t mask, values, bytes;
    if (rows < 0 || cols < 0 || count < 0 || !apti_mul(rows, apti_ceil_div(cols, 8), &mask) || !apti_mul(4, count, &values) ||
        !apti_add(mask, 8 + 3, &mask) || !apti_add(mask / 4 * 4, values, &bytes))
        return -1;
    return bytes;
}

/* Pointers and sizes of a view. filled: also where its rows begin (that their bits agree is for apti_sparse_check_bits). */
static apt_result apti_sparse_check(const apt_sparse *s, bool filled)
{
    int64_t words;
    if (s == NULL || s->rows < 0 || s->cols < 0 || s->start == NULL) return APT_E_ARGUMENT;
    if (!apti_mul(s->rows, apt_bitmask_words(s->cols), &words)) return APT_E_RANGE;
    if (words > 0 && s->bits == NULL) return APT_E_ARGUMENT;
    if (!filled) return APT_OK;
    if (s->start[0] != 0 || (s->values == NULL && s->start[s->rows] > 0)) return APT_E_ARGUMENT;
    for (int64_t r = 0; r < s->rows; r++)
        if (s->start[r + 1] < s->start[r] || s->start[r + 1] - s->start[r] > s->cols) return APT_E_SHAPE;
    return APT_OK;
}

/* Each row has as many values as bits, and no bit behind its last column. Too slow for every product of a few rows. */
static apt_result apti_sparse_check_bits(const apt_sparse *s)
{
    const int64_t row = apt_bitmask_words(s->cols);
    for (int64_t r = 0; r < s->rows; r++) {
        const uint64_t *bits = s->bits + r * row;
        if (s->start[r + 1] - s->start[r] != apt_bitmask_kept(bits, s->cols)) return APT_E_SHAPE;
        if (!apti_bitmask_tail_ok(bits, s->cols)) return APT_E_SHAPE;
    }
    return APT_OK;
}

APT_API apt_result apt_sparse_pack(apt_sparse *sparse, int64_t capacity, const float *w, int64_t ld)
{
    apt_result r = apti_sparse_check(sparse, false);
    if (r == APT_OK) r = apti_check_matrix(w, ld, sparse->rows, sparse->cols);
    if (r == APT_OK && sparse->values == NULL && capacity > 0) r = APT_E_ARGUMENT;
    if (r != APT_OK) return r;
    const int64_t row = apt_bitmask_words(sparse->cols);
    int64_t n = 0;
    for (int64_t i = 0; i < sparse->rows; i++) {
        uint64_t *bits = sparse->bits + i * row;
        sparse->start[i] = n;
        if (row > 0) memset(bits, 0, (size_t)row * sizeof(uint64_t));
        for (int64_t c = 0; c < sparse->cols; c++) {
            const float x = w[i * ld + c];
            if (apti_bits(x) == 0) continue;
            if (n >= capacity) return APT_E_SCRATCH;
            bits[c / 64] |= (uint64_t)1 << c % 64;
            sparse->values[n++] = x;
        }
    }
    sparse->start[sparse->rows] = n;
    return APT_OK;
}

APT_API apt_result apt_sparse_unpack(float *w, int64_t ld, const apt_sparse *sparse)
{
    apt_result r = apti_sparse_check(sparse, true);
    if (r == APT_OK) r = apti_sparse_check_bits(sparse);
    if (r == APT_OK) r = apti_check_matrix(w, ld, sparse->rows, sparse->cols);
    if (r != APT_OK) return r;
    const int64_t row = apt_bitmask_words(sparse->cols);
    const float *value = sparse->values;
    for (int64_t i = 0; i < sparse->rows; i++)
        for (int64_t c = 0; c < sparse->cols; c++)
            w[i * ld + c] = sparse->bits[i * row + c / 64] >> c % 64 & 1 ? *value++ : 0.0f;
    return APT_OK;
}

/* One element of the product by its definition. */
static float apti_sparse_dot(const apt_sparse *s, int64_t row, const float *x)
{
    const uint64_t *bits = s->bits + row * apt_bitmask_words(s->cols);
    const float *value = s->values + s->start[row];
    float sum = 0;
    for (int64_t at = 0; at < s->cols; at += 64)
        for (uint64_t b = bits[at / 64]; b != 0; b &= b - 1) sum += *value++ * x[at + apti_lowest_bit(b)];
    return sum;
}

#ifndef APT_ONLY_CORE
/* A task is one block of rows of x, as wide as the kernel's sums are many, times a range of outputs. x goes sideways into the
   scratch, APTI_SPARSE_K inputs at a time, so that a value of W meets all rows of the block in consecutive vectors; the
   sums rest there too until all inputs have been through. */
typedef struct apti_sparse_job {
    apt_ctx *ctx;
    const apt_sparse *s;
    float *y;
    const float *x, *start;                      /* start: [outputs of s] what the sums begin with; NULL: 0 */
    int64_t ldy, ldx, n, width, blocks, outputs;          /* rows of x in a block; blocks; outputs of a task */
} apti_sparse_job;

#define APTI_SPARSE_K 128                        /* a multiple of 64: with 64 rows they fill a first-level cache */
#define APTI_SPARSE_OUTPUTS 1024

static void apti_sparse_task(int64_t index, int32_t thread, void *arg)
{
    const apti_sparse_job *job = (const apti_sparse_job *)arg;
    const apti_kernels *kernels = job->ctx->kernels;
    const apt_sparse *s = job->s;
    const int64_t i0 = index % job->blocks * job->width, rows = apti_min_i64(job->width, job->n - i0);
    const int64_t o0 = index / job->blocks * job->outputs, outputs = apti_min_i64(job->outputs, s->rows - o0);
    const int64_t row = apt_bitmask_words(s->cols);
    apti_sparse_tile t;
    int64_t *at = (int64_t *)job->ctx->scratch[thread];
    float *x = (float *)(at + APTI_SPARSE_OUTPUTS), *sums = x + APTI_SPARSE_K * job->width;
    memcpy(at, s->start + o0, (size_t)outputs * sizeof(int64_t));
    memset(sums, 0, (size_t)(outputs * job->width) * sizeof(float));
    for (int64_t o = 0; job->start != NULL && o < outputs; o++)
        for (int64_t i = 0; i < job->width; i++) sums[o * job->width + i] = job->start[o0 + o];
    memset(x, 0, (size_t)(APTI_SPARSE_K * job->width) * sizeof(float));    /* rows that are not there stay 0 */
    t.vectors = (int32_t)(job->width / kernels->lanes);
    t.outputs = outputs;
    t.row = row;
    t.at = at;
    t.values = s->values;
    t.x = x;
    t.sums = sums;
    for (int64_t k = 0; k < s->cols; k += APTI_SPARSE_K) {
        const int64_t cols = apti_min_i64(APTI_SPARSE_K, s->cols - k);
        kernels->transpose(x, job->width, job->x + i0 * job->ldx + k, job->ldx, rows, cols);
        t.bits = s->bits + o0 * row + k / 64;
        t.words = apt_bitmask_words(cols);
        kernels->sparse(&t);
    }
    kernels->transpose(job->y + i0 * job->ldy + o0, job->ldy, sums, job->width, outputs, rows);
}

/* y(n, rows) = start + x(n, cols) W^T */
static void apti_sparse_run(apt_ctx *ctx, const apt_sparse *s, const float *start, float *y, int64_t ldy, const float *x,
                            int64_t ldx, int64_t n)
{
    apti_sparse_job job;
    const int64_t lanes = ctx->kernels->lanes;
    job.ctx = ctx;
    job.s = s;
    job.y = y;
    job.x = x;
    job.start = start;
    job.ldy = ldy;
    job.ldx = ldx;
    job.n = n;
    job.width = lanes;
    while (job.width < n && job.width < APTI_SPARSE_VECTORS * lanes) job.width *= 2;
    job.blocks = apti_ceil_div(n, job.width);
    const int64_t wanted = apti_ceil_div(4 * ctx->threads, job.blocks), most = apti_ceil_div(s->rows, APTI_SPARSE_OUTPUTS);
    job.outputs = apti_ceil_div(s->rows, apti_max_i64(most, apti_min_i64(wanted, apti_ceil_div(s->rows, 32))));
    apti_parallel_for(ctx, job.blocks * apti_ceil_div(s->rows, job.outputs), apti_sparse_task, &job);
}

/* Room for a matrix of this size, all rows empty. */
static apt_result apti_sparse_reserve(apt_ctx *ctx, apt_sparse *sparse, int64_t rows, int64_t cols, int64_t count)
{
    int64_t words = -1;
    memset(sparse, 0, sizeof *sparse);
    if (apti_mul(rows, apt_bitmask_words(cols), &words)) {
        sparse->bits = (uint64_t *)apti_calloc(ctx, words, (int64_t)sizeof(uint64_t));
        sparse->start = (int64_t *)apti_calloc(ctx, rows + 1, (int64_t)sizeof(int64_t));
        sparse->values = (float *)apti_alloc(ctx, count, (int64_t)sizeof(float));
    }
    sparse->rows = rows;
    sparse->cols = cols;
    if (sparse->bits != NULL && sparse->start != NULL && sparse->values != NULL) return APT_OK;
    apt_sparse_free(ctx, sparse);
    return apti_fail(ctx, APT_E_MEMORY, "no memory for a compressed matrix of %lld x %lld weights", (long long)rows,
                     (long long)cols);
}

APT_API void apt_sparse_free(apt_ctx *ctx, apt_sparse *sparse)
{
    if (ctx == NULL || sparse == NULL) return;
    apti_free(ctx, sparse->bits);
    apti_free(ctx, sparse->start);
    apti_free(ctx, sparse->values);
    memset(sparse, 0, sizeof *sparse);
}

APT_API apt_result apt_sparse_make(apt_ctx *ctx, apt_sparse *sparse, const float *w, int64_t ld, int64_t rows, int64_t cols)
{
    if (ctx == NULL) return APT_E_ARGUMENT;
    const int64_t count = apt_sparse_count(w, ld, rows, cols);
    if (sparse == NULL || count < 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_sparse_make: %lld x %lld weights, %lld apart, are no matrix", (long long)rows,
                         (long long)cols, (long long)ld);
    const apt_result r = apti_sparse_reserve(ctx, sparse, rows, cols, count);
    return r == APT_OK ? apt_sparse_pack(sparse, count, w, ld) : r;
}
#endif /* APT_ONLY_CORE */

APT_API apt_result apt_sparse_forward(apt_ctx *ctx, float *y, int64_t ldy, const apt_sparse *sparse, const float *x, int64_t ldx,
                                      int64_t n)
{
    apt_result r = apti_sparse_check(sparse, true);
    if (r == APT_OK) r = apti_check_matrix(x, ldx, n, sparse->cols);
    if (r == APT_OK) r = apti_check_matrix(y, ldy, n, sparse->rows);
    if (r != APT_OK || n == 0 || sparse->rows == 0) return r;
#ifndef APT_ONLY_CORE
    if (ctx != NULL) {
        apti_sparse_run(ctx, sparse, NULL, y, ldy, x, ldx, n);
        return APT_OK;
    }
#else
    (void)ctx;
#endif
    for (int64_t i = 0; i < n; i++)
        for (int64_t o = 0; o < sparse->rows; o++) y[i * ldy + o] = apti_sparse_dot(sparse, o, x + i * ldx);
    return APT_OK;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Learned sparsity: losses on a mask, their scheduler, the BK-core; then, where there is a context, the modules
   ------------------------------------------------------------------------------------------------------------------ */

/* --- sparsity losses --- */

#define APTI_KL_EDGE 1e-6
#define APTI_HUBER_DELTA 0.1

APT_API const char *apt_sparsity_kind_name(int32_t kind)
{
    switch (kind) {
        case APT_SPARSITY_L2: return "l2";
        case APT_SPARSITY_L1: return "l1";
        case APT_SPARSITY_KL: return "kl";
        case APT_SPARSITY_HUBER: return "huber";
        default: return NULL;
    }
}

APT_API apt_result apt_sparsity_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes)
{
    return apti_kind_from_name("sparsity loss", apt_sparsity_kind_name, name, kind, message, bytes);
}

/* Loss of a sparsity s and its slope. */
static double apti_sparsity_value(int32_t kind, double s, double target, double *slope)
{
    const double e = s - target, size = fabs(e), edge = APTI_KL_EDGE;
    if (kind == APT_SPARSITY_L1) {
        *slope = (double)(e > 0) - (double)(e < 0);
        return size;
    }
    if (kind == APT_SPARSITY_HUBER) {
        const bool near = size <= APTI_HUBER_DELTA;
        *slope = near ? e : e > 0 ? APTI_HUBER_DELTA : -APTI_HUBER_DELTA;
        return near ? 0.5 * e * e : APTI_HUBER_DELTA * (size - 0.5 * APTI_HUBER_DELTA);
    }
    *slope = 2 * e;
    if (kind == APT_SPARSITY_L2 || target < edge || target > 1 - edge) return e * e;
    const double q = s < edge ? edge : s > 1 - edge ? 1 - edge : s;
    if (s >= edge && s <= 1 - edge) *slope = e / (q * (1 - q));
    return target * log(target / q) + (1 - target) * log((1 - target) / (1 - q));
}

static apt_result apti_check_between(const float *x, int64_t n, float least, float most)
{
    if (!apti_finite_all(x, n)) return APT_E_NONFINITE;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint32_t)(x[i] < least) | (uint32_t)(x[i] > most);
    return bad != 0 ? APT_E_RANGE : APT_OK;
}

static apt_result apti_check_share(const float *x, int64_t n)
{
    return apti_check_between(x, n, 0.0f, 1.0f);
}

APT_API apt_result apt_sparsity_loss(double *loss, float *grad, const float *mask, int64_t n, int32_t kind, float target,
                                     float grad_scale)
{
    if (loss == NULL || mask == NULL || n < 1 || apt_sparsity_kind_name(kind) == NULL) return APT_E_ARGUMENT;
    if (!apti_finite(grad_scale)) return APT_E_NONFINITE;
    apt_result r = apti_check_share(&target, 1);
    if (r == APT_OK) r = apti_check_share(mask, n);
    if (r != APT_OK) return r;
    double slope;
    *loss = apti_sparsity_value(kind, 1 - apti_sum(mask, n) / (double)n, (double)target, &slope);
    const float each = (float)(-(double)grad_scale * slope / (double)n);      /* more mask is less sparsity */
    for (int64_t i = 0; grad != NULL && i < n; i++) grad[i] += each;
    return APT_OK;
}

APT_API apt_result apt_balanced_loss(apt_balanced *out, double accuracy, double sparsity, double accuracy_weight,
                                     double sparsity_weight)
{
    if (out == NULL) return APT_E_ARGUMENT;
    if (!apti_finite_f64(accuracy) || !apti_finite_f64(sparsity)) return APT_E_NONFINITE;
    if (!apti_finite_f64(accuracy_weight) || !apti_finite_f64(sparsity_weight)) return APT_E_NONFINITE;
    if (accuracy_weight < 0 || sparsity_weight < 0) return APT_E_RANGE;
    out->accuracy = accuracy;
    out->sparsity = sparsity;
    out->accuracy_weight = accuracy_weight;
    out->sparsity_weight = sparsity_weight;
    out->accuracy_part = accuracy_weight * accuracy;
    out->sparsity_part = sparsity_weight * sparsity;
    out->total = out->accuracy_part + out->sparsity_part;
    return APT_OK;
}

/* --- the scheduler of target and weight --- */

APT_API const char *apt_adaptive_kind_name(int32_t kind)
{
    switch (kind) {
        case APT_ADAPTIVE_LINEAR: return "linear";
        case APT_ADAPTIVE_COSINE: return "cosine";
        case APT_ADAPTIVE_STEP: return "step";
        default: return NULL;
    }
}

APT_API apt_result apt_adaptive_kind_from_name(const char *name, int32_t *kind, char *message, size_t bytes)
{
    return apti_kind_from_name("schedule", apt_adaptive_kind_name, name, kind, message, bytes);
}

static void apti_default_float(float *value, float standard)
{
    if (apti_bits(*value) << 1 == 0) *value = standard;          /* +-0, by the bits */
}

static apt_result apti_check_adaptive(const apt_adaptive_desc *d)
{
    const float all[5] = {d->sparsity_first, d->sparsity_last, d->weight_first, d->weight_last, d->threshold};
    if (apt_adaptive_kind_name(d->kind) == NULL) return APT_E_ARGUMENT;
    if (!apti_finite_all(all, 5)) return APT_E_NONFINITE;
    if (d->warmup < -1 || d->steps < 1 || d->warmup >= d->steps) return APT_E_RANGE;
    if (d->sparsity_first < 0 || d->sparsity_first >= 1 || d->sparsity_last < 0 || d->sparsity_last >= 1) return APT_E_RANGE;
    return d->weight_first < 0 || d->weight_last < 0 || d->threshold < 0 ? APT_E_RANGE : APT_OK;
}

static double apti_adaptive_share(const apt_adaptive_desc *d, int64_t step)
{
    const double warmup = d->warmup > 0 ? (double)d->warmup : 0;
    if (step >= d->steps) return 1;
    const double u = ((double)step - warmup) / ((double)d->steps - warmup);
    if (u <= 0) return 0;
    if (d->kind == APT_ADAPTIVE_LINEAR) return u;
    if (d->kind == APT_ADAPTIVE_COSINE) return 0.5 * (1 - cos(3.14159265358979324 * u));
    return u < 0.25 ? 0 : u < 0.5 ? 0.33 : u < 0.75 ? 0.67 : 1;
}

/* The easing acts on the curve, not on the last value: after a bad validation and a good one the run is where it would be. */
static void apti_adaptive_update(apt_adaptive *s)
{
    const apt_adaptive_desc *d = &s->desc;
    const double share = apti_adaptive_share(d, s->step);
    const double target = d->sparsity_first + share * ((double)d->sparsity_last - d->sparsity_first);
    const double weight = d->weight_first + share * ((double)d->weight_last - d->weight_first);
    s->target = (float)(s->eased != 0 ? 0.9 * target : target);
    s->weight = (float)(s->eased != 0 ? 0.5 * weight : weight);
}

APT_API apt_result apt_adaptive_init(apt_adaptive *state, const apt_adaptive_desc *desc)
{
    if (state == NULL || desc == NULL) return APT_E_ARGUMENT;
    apt_adaptive_desc d = *desc;
    if (d.warmup == 0) d.warmup = 1000;
    if (d.warmup < 0) d.warmup = -1;
    apti_default_float(&d.sparsity_first, 0.2f);
    apti_default_float(&d.sparsity_last, 0.5f);
    apti_default_float(&d.weight_first, 0.001f);
    apti_default_float(&d.weight_last, 0.01f);
    const apt_result r = apti_check_adaptive(&d);
    if (r != APT_OK) return r;
    state->desc = d;
    return apt_adaptive_reset(state);
}

APT_API apt_result apt_adaptive_reset(apt_adaptive *state)
{
    if (state == NULL) return APT_E_ARGUMENT;
    const apt_adaptive_desc desc = state->desc;
    const apt_result r = apti_check_adaptive(&desc);             /* refuses a state that was never made */
    if (r != APT_OK) return r;
    memset(state, 0, sizeof *state);
    state->desc = desc;
    apti_adaptive_update(state);
    return APT_OK;
}

APT_API apt_result apt_adaptive_step(apt_adaptive *state, int64_t step, const double *validation)
{
    if (state == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_check_adaptive(&state->desc);
    if (r != APT_OK) return r;
    if (step < 0) return APT_E_RANGE;
    if (validation != NULL && !apti_finite_f64(*validation)) return APT_E_NONFINITE;
    state->step = step;
    if (validation != NULL) {
        if (state->validations == 0 || *validation < state->best) {
            state->best = *validation;
            state->best_step = step;
        }
        state->validations++;
        state->eased = state->desc.threshold > 0 && *validation > (double)state->desc.threshold;
        state->eased_count += state->eased;
    }
    apti_adaptive_update(state);
    return APT_OK;
}

/* Little-endian fields through one cursor, in both directions, so that save and restore cannot disagree. */
typedef struct apti_field_cursor { uint8_t *out; const uint8_t *in; size_t at; } apti_field_cursor;

static void apti_field_bits(apti_field_cursor *c, uint64_t *value, int32_t bytes)
{
    uint64_t read = 0;
    for (int32_t i = 0; i < bytes; i++) {
        if (c->out != NULL) c->out[c->at + (size_t)i] = (uint8_t)(*value >> (8 * i));
        else read |= (uint64_t)c->in[c->at + (size_t)i] << (8 * i);
    }
    c->at += (size_t)bytes;
    if (c->out == NULL) *value = read;
}

static void apti_field_i64(apti_field_cursor *c, int64_t *value)
{
    uint64_t bits;
    memcpy(&bits, value, sizeof bits);
    apti_field_bits(c, &bits, 8);
    memcpy(value, &bits, sizeof bits);
}

static void apti_field_i32(apti_field_cursor *c, int32_t *value)
{
    uint32_t narrow;
    memcpy(&narrow, value, sizeof narrow);
    uint64_t bits = narrow;
    apti_field_bits(c, &bits, 4);
    narrow = (uint32_t)bits;
    memcpy(value, &narrow, sizeof narrow);
}

static void apti_field_f64(apti_field_cursor *c, double *value)
{
    uint64_t bits;
    memcpy(&bits, value, sizeof bits);
    apti_field_bits(c, &bits, 8);
    memcpy(value, &bits, sizeof bits);
}

static void apti_field_f32(apti_field_cursor *c, float *value)
{
    uint64_t bits = apti_bits(*value);
    apti_field_bits(c, &bits, 4);
    *value = apti_float((uint32_t)bits);
}

#define APTI_ADAPTIVE_MAGIC 0x3144415045545041u                  /* "APTEPAD1" */

static void apti_adaptive_fields(apti_field_cursor *c, uint64_t *magic, apt_adaptive *s)
{
    apti_field_bits(c, magic, 8);
    apti_field_i32(c, &s->desc.kind);
    apti_field_i64(c, &s->desc.steps);
    apti_field_i64(c, &s->desc.warmup);
    apti_field_f32(c, &s->desc.sparsity_first);
    apti_field_f32(c, &s->desc.sparsity_last);
    apti_field_f32(c, &s->desc.weight_first);
    apti_field_f32(c, &s->desc.weight_last);
    apti_field_f32(c, &s->desc.threshold);
    apti_field_i64(c, &s->step);
    apti_field_f64(c, &s->best);
    apti_field_i64(c, &s->best_step);
    apti_field_i64(c, &s->validations);
    apti_field_i64(c, &s->eased_count);
    apti_field_i32(c, &s->eased);
}

APT_API apt_result apt_adaptive_save(const apt_adaptive *state, void *out, size_t bytes)
{
    if (state == NULL || out == NULL) return APT_E_ARGUMENT;
    if (bytes < APT_ADAPTIVE_BYTES) return APT_E_SCRATCH;
    const apt_result r = apti_check_adaptive(&state->desc);
    if (r != APT_OK) return r;
    apt_adaptive copy = *state;
    uint64_t magic = APTI_ADAPTIVE_MAGIC;
    apti_field_cursor c = {(uint8_t *)out, NULL, 0};
    apti_adaptive_fields(&c, &magic, &copy);
    uint64_t sum = apti_checksum(0, out, c.at);
    apti_field_bits(&c, &sum, 8);
    return APT_OK;
}

APT_API apt_result apt_adaptive_restore(apt_adaptive *state, const void *in, size_t bytes)
{
    if (state == NULL || in == NULL) return APT_E_ARGUMENT;
    if (bytes < APT_ADAPTIVE_BYTES) return APT_E_FORMAT;
    apt_adaptive read;
    memset(&read, 0, sizeof read);
    uint64_t magic = 0, sum = 0;
    apti_field_cursor c = {NULL, (const uint8_t *)in, 0};
    apti_adaptive_fields(&c, &magic, &read);
    if (magic != APTI_ADAPTIVE_MAGIC) return APT_E_FORMAT;
    const uint64_t wanted = apti_checksum(0, in, c.at);
    apti_field_bits(&c, &sum, 8);
    if (sum != wanted) return APT_E_CHECKSUM;
    if (apti_check_adaptive(&read.desc) != APT_OK || read.step < 0 || !apti_finite_f64(read.best)) return APT_E_FORMAT;
    if (read.validations < 0 || read.eased_count < 0 || read.eased_count > read.validations) return APT_E_FORMAT;
    if (read.eased < 0 || read.eased > 1) return APT_E_FORMAT;
    apti_adaptive_update(&read);
    *state = read;
    return APT_OK;
}

APT_API apt_result apt_expert_count(const apt_expert_schedule *schedule, int64_t step, int32_t *count)
{
    if (schedule == NULL || count == NULL) return APT_E_ARGUMENT;
    if (schedule->last < 1 || schedule->first < schedule->last || schedule->end < schedule->begin) return APT_E_RANGE;
    *count = schedule->first;
    if (step >= schedule->end) *count = schedule->last;
    else if (step > schedule->begin) {
        const double u = ((double)step - (double)schedule->begin) / ((double)schedule->end - (double)schedule->begin);
        const int64_t gone = (int64_t)(u * ((double)schedule->first - (double)schedule->last));
        *count = (int32_t)(schedule->first - gone);
    }
    return APT_OK;
}

/* --- BK-core ---

   A row is cut into pieces; 16 pieces, of any rows, run in step as the lanes of one group: the recursions are chains of complex
   divisions, so one piece alone would wait for every quotient, and 16 side by side fill the vectors of any CPU as plain C.

   Why a piece may begin anywhere. Let y = |im z|. All pivots lie in the half plane beyond distance y of the real line. In its
   hyperbolic metric r -> -c/r moves two points no further apart, and brings both within 1/y of the line (c <= 1); the step
   away from the line by y then shrinks their distance by (1/y)/(1/y + y) = 1/(1 + y^2) or more. Two left pivots of one place that
   come from different beginnings differ by ln(1 + 1/y^2) at most, and w places further by (1 + y^2)^-w of that. The same holds
   for right pivots and, as the backward recursions are the derivatives of these, for gradients. So a piece starts w places
   outside, w so large that the rest is below 1e-9: 33 for z = i. */

enum {
    APTI_BK_LANES = 16,
    APTI_BK_PIECE = 512,              /* positions, at least: with the overlap and all arrays they stay in a second-level cache */
    APTI_BK_TILE = 32,                /* positions that are turned from rows into lanes at a time */
    APTI_BK_FORWARD = 4,              /* arrays of a group: d and c, then r or G */
    APTI_BK_BACKWARD = 9
};
#define APTI_BK_LEAST 0.05f
#define APTI_BK_MOST_V 1e9f           /* its square and those of the reciprocals are floats, whatever a compiler makes of 1/x */

typedef struct apti_bk_job {
    const float *v, *mask;
    int64_t rows, n;
    float shift, y;                   /* d = (v + shift) - iy */
    int64_t piece, pieces, jobs, overlap, groups;
    float *out_re, *out_im;           /* forward */
    const float *dre, *dim;           /* backward */
    float *dv, *dmask;
    double *dz;                       /* the caller's, or NULL */
    int64_t bytes;                    /* of scratch */
} apti_bk_job;

/* One group: where its lanes begin. */
typedef struct apti_bk_group {
    int64_t row[APTI_BK_LANES], first[APTI_BK_LANES], count[APTI_BK_LANES];   /* positions [first, first + count) of the row */
    int64_t lead, total;              /* step t is position first - lead + t; t < total */
    float *x[APTI_BK_BACKWARD];       /* [total][16] each */
} apti_bk_group;

/* Sizes and the cut. The arrays are the caller's to fill in. */
static apt_result apti_bk_plan(apti_bk_job *job, int64_t rows, int64_t n, const apt_bk *z)
{
    const apt_bk standard = {0, 1};
    int64_t size, bytes;
    memset(job, 0, sizeof *job);
    if (z == NULL) z = &standard;
    if (!apti_mul(rows, n, &size) || !apti_mul(size, (int64_t)sizeof(float), &bytes)) return APT_E_ARGUMENT;
    if (!apti_finite(z->re) || !apti_finite(z->im)) return APT_E_NONFINITE;
    job->y = z->im;
    apti_default_float(&job->y, 1.0f);
    const double y = fabs((double)job->y), decay = log(1 + y * y);
    if (y < (double)APTI_BK_LEAST || y > 1e6 || fabs(z->re) > 1e6f) return APT_E_RANGE;
    const double overlap = log(2e9 * (1 + 1 / (y * y))) / decay;
    job->overlap = 2 + (int64_t)(overlap > 0 ? overlap : 0);
    job->rows = rows;
    job->n = n;
    job->shift = -2.0f - z->re;
    job->pieces = apti_max_i64(1, apti_ceil_div(n, apti_max_i64(APTI_BK_PIECE, 4 * job->overlap)));
    job->piece = apti_max_i64(1, apti_ceil_div(n, job->pieces));
    job->pieces = apti_max_i64(1, apti_ceil_div(n, job->piece));
    if (!apti_mul(rows, job->pieces, &job->jobs)) return APT_E_ARGUMENT;
    if (n == 0) job->jobs = 0;
    job->groups = apti_ceil_div(job->jobs, APTI_BK_LANES);
    /* At most twice the overlap on each side; one piece needs none. */
    const int64_t total = job->piece + (job->pieces > 1 ? 4 * job->overlap : 0);
    if (!apti_mul(total, APTI_BK_LANES * APTI_BK_BACKWARD * (int64_t)sizeof(float), &job->bytes)) return APT_E_ARGUMENT;
    job->bytes = apti_round_up(job->bytes, 64) + 64;
    return APT_OK;
}

static void apti_bk_begin(apti_bk_group *g, const apti_bk_job *job, int64_t group, int64_t lead, int32_t arrays, char *scratch)
{
    g->lead = job->pieces > 1 ? lead : 0;
    g->total = job->piece + 2 * g->lead;
    /* A lane without a piece repeats the last one and stores nothing. */
    for (int32_t l = 0; l < APTI_BK_LANES; l++) {
        const int64_t j = group * APTI_BK_LANES + l, at = apti_min_i64(j, job->jobs - 1);
        g->row[l] = at / job->pieces;
        g->first[l] = at % job->pieces * job->piece;
        g->count[l] = j < job->jobs ? apti_min_i64(job->piece, job->n - g->first[l]) : 0;
    }
    float *next = (float *)(void *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    for (int32_t i = 0; i < arrays; i++, next += g->total * APTI_BK_LANES) g->x[i] = next;
}

/* What is turned into lanes: from[p] + add or, as a link, from[p - 1] * from[p] (from NULL: 1), where the lane has that
   position. */
typedef struct apti_bk_source { const float *from; float add; int64_t margin; bool link; } apti_bk_source;

/* Steps [t0, t1) of a lane whose step 0 is value `at` of the array: those in [begin, end) count, the others get 0. */
static void apti_bk_column(float *to, const apti_bk_source *s, int64_t at, int64_t t0, int64_t begin, int64_t end, int64_t t1)
{
    const float *x = s->from;
    for (int64_t t = t0; t < begin; t++) to[t * APTI_BK_LANES] = 0;
    if (s->link && x == NULL) for (int64_t t = begin; t < end; t++) to[t * APTI_BK_LANES] = 1;
    else if (s->link) for (int64_t t = begin; t < end; t++) to[t * APTI_BK_LANES] = x[at + t - 1] * x[at + t];
    else for (int64_t t = begin; t < end; t++) to[t * APTI_BK_LANES] = x[at + t] + s->add;
    for (int64_t t = end; t < t1; t++) to[t * APTI_BK_LANES] = 0;
}

/* to[t][l], for every step and lane */
static void apti_bk_load(float *to, const apti_bk_group *g, const apti_bk_job *job, const apti_bk_source *s)
{
    for (int64_t t0 = 0; t0 < g->total; t0 += APTI_BK_TILE) {
        const int64_t t1 = apti_min_i64(g->total, t0 + APTI_BK_TILE);
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const int64_t base = g->first[l] - g->lead;          /* position of step 0; may be negative */
            const int64_t low = apti_max_i64(s->link, g->first[l] - s->margin);
            const int64_t high = apti_min_i64(job->n, g->first[l] + job->piece + s->margin);
            const int64_t begin = apti_min_i64(t1, apti_max_i64(t0, low - base));
            const int64_t end = apti_max_i64(begin, apti_min_i64(t1, high - base));
            apti_bk_column(to + l, s, g->row[l] * job->n + base, t0, begin, end, t1);
        }
    }
}

/* to(row, position) = or += from[t][l], for the positions of each piece */
static void apti_bk_store(float *to, const apti_bk_group *g, const apti_bk_job *job, const float *from, bool add)
{
    for (int64_t t0 = 0; t0 < job->piece; t0 += APTI_BK_TILE) {
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const int64_t t1 = apti_min_i64(g->count[l], t0 + APTI_BK_TILE);
            float *y = to + (g->row[l] * job->n + g->first[l]);
            const float *x = from + g->lead * APTI_BK_LANES + l;
            if (add) for (int64_t t = t0; t < t1; t++) y[t] += x[t * APTI_BK_LANES];
            else for (int64_t t = t0; t < t1; t++) y[t] = x[t * APTI_BK_LANES];
        }
    }
}

static void apti_bk_load_matrix(const apti_bk_group *g, const apti_bk_job *job)
{
    const apti_bk_source diagonal = {job->v, job->shift, job->n, false}, links = {job->mask, 0, job->n, true};
    apti_bk_load(g->x[0], g, job, &diagonal);
    apti_bk_load(g->x[1], g, job, &links);
}

/* w[t] = 1/r[t-1]: reciprocals of the left pivots r = d - c w. a = Re d. */
static void apti_bk_left(const apti_bk_group *g, float y)
{
    const float *APTI_RESTRICT a = g->x[0], *APTI_RESTRICT c = g->x[1];
    float *APTI_RESTRICT w_re = g->x[2], *APTI_RESTRICT w_im = g->x[3];
    float w[APTI_BK_LANES] = {0}, h[APTI_BK_LANES] = {0};        /* w now, h its imaginary part */
    for (int64_t t = 0; t < g->total * APTI_BK_LANES; t += APTI_BK_LANES) {
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const float re = a[t + l] - c[t + l] * w[l], im = -y - c[t + l] * h[l];
            const float scale = 1.0f / (re * re + im * im);
            w_re[t + l] = w[l];
            w_im[t + l] = h[l];
            w[l] = re * scale;
            h[l] = -im * scale;
        }
    }
}

/* From the right: u = 1/s[t+1], s = d - c[t+1] u, G = 1/(s - c w), which takes the place of w. */
static void apti_bk_right(const apti_bk_group *g, float y)
{
    const float *APTI_RESTRICT a = g->x[0], *APTI_RESTRICT c = g->x[1];
    float *APTI_RESTRICT w_re = g->x[2], *APTI_RESTRICT w_im = g->x[3];
    float u[APTI_BK_LANES] = {0}, h[APTI_BK_LANES] = {0}, next[APTI_BK_LANES] = {0};
    for (int64_t t = (g->total - 1) * APTI_BK_LANES; t >= 0; t -= APTI_BK_LANES) {
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const float re = a[t + l] - next[l] * u[l], im = -y - next[l] * h[l];
            const float q_re = re - c[t + l] * w_re[t + l], q_im = im - c[t + l] * w_im[t + l];
            const float scale = 1.0f / (re * re + im * im), q_scale = 1.0f / (q_re * q_re + q_im * q_im);
            w_re[t + l] = q_re * q_scale;
            w_im[t + l] = -q_im * q_scale;
            u[l] = re * scale;
            h[l] = -im * scale;
            next[l] = c[t + l];
        }
    }
}

static void apti_bk_forward_group(const apti_bk_job *job, int64_t group, char *scratch)
{
    apti_bk_group g;
    apti_bk_begin(&g, job, group, job->overlap, APTI_BK_FORWARD, scratch);
    apti_bk_load_matrix(&g, job);
    apti_bk_left(&g, job->y);
    apti_bk_right(&g, job->y);
    apti_bk_store(job->out_re, &g, job, g.x[2], false);
    apti_bk_store(job->out_im, &g, job, g.x[3], false);
}

/* With D the derivative of the loss by a complex number (dL = Re(D dx)):
       G = 1/q            Dq = -DG G^2
       q = r + s - d      Dr = Dq + (from the right) c[t+1] Dr[t+1] / r^2        Ds = Dq + (from the left) c Ds[t-1] / s^2
       d                  Dd = Dr + Ds - Dq
       c                  Dc = -Re(Dr / r[t-1]) - Re(Ds[t-1] / s)
   This pass goes with apti_bk_right: Dr takes the place of w, Dq that of DG, u and the first half of Dc are stored. */
static void apti_bk_right_backward(const apti_bk_group *g, float y)
{
    const float *APTI_RESTRICT a = g->x[0], *APTI_RESTRICT c = g->x[1];
    float *APTI_RESTRICT w_re = g->x[2], *APTI_RESTRICT w_im = g->x[3], *APTI_RESTRICT q_re = g->x[4],
        *APTI_RESTRICT q_im = g->x[5];
    float *APTI_RESTRICT u_re = g->x[6], *APTI_RESTRICT u_im = g->x[7], *APTI_RESTRICT dc = g->x[8];
    float u[APTI_BK_LANES] = {0}, h[APTI_BK_LANES] = {0}, next[APTI_BK_LANES] = {0};
    float in_re[APTI_BK_LANES] = {0}, in_im[APTI_BK_LANES] = {0};        /* c[t+1] Dr[t+1] / r^2 */
    for (int64_t t = (g->total - 1) * APTI_BK_LANES; t >= 0; t -= APTI_BK_LANES) {
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const float re = a[t + l] - next[l] * u[l], im = -y - next[l] * h[l], wr = w_re[t + l], wi = w_im[t + l];
            const float x = re - c[t + l] * wr, z = im - c[t + l] * wi;
            const float scale = 1.0f / (re * re + im * im), g_scale = 1.0f / (x * x + z * z);
            const float gr = x * g_scale, gi = -z * g_scale, g2r = gr * gr - gi * gi, g2i = 2 * gr * gi;
            const float dr = q_re[t + l], di = -q_im[t + l];             /* DG = dL/d re - i dL/d im */
            const float dqr = di * g2i - dr * g2r, dqi = -dr * g2i - di * g2r;
            const float drr = dqr + in_re[l], dri = dqi + in_im[l];
            const float w2r = c[t + l] * (wr * wr - wi * wi), w2i = c[t + l] * (2 * wr * wi);
            q_re[t + l] = dqr;
            q_im[t + l] = dqi;
            w_re[t + l] = drr;
            w_im[t + l] = dri;
            dc[t + l] = dri * wi - drr * wr;
            u_re[t + l] = u[l];
            u_im[t + l] = h[l];
            in_re[l] = drr * w2r - dri * w2i;
            in_im[l] = drr * w2i + dri * w2r;
            u[l] = re * scale;
            h[l] = -im * scale;
            next[l] = c[t + l];
        }
    }
}

/* The last pass, from the left: Dd takes the place of a (re) and of Re u (im); Dc is completed. */
static void apti_bk_left_backward(const apti_bk_group *g)
{
    float *APTI_RESTRICT a = g->x[0], *APTI_RESTRICT u_re = g->x[6], *APTI_RESTRICT dc = g->x[8];
    const float *APTI_RESTRICT c = g->x[1], *APTI_RESTRICT r_re = g->x[2], *APTI_RESTRICT r_im = g->x[3];
    const float *APTI_RESTRICT q_re = g->x[4], *APTI_RESTRICT q_im = g->x[5], *APTI_RESTRICT u_im = g->x[7];
    float s_re[APTI_BK_LANES] = {0}, s_im[APTI_BK_LANES] = {0};          /* Ds[t-1] */
    float ur[APTI_BK_LANES] = {0}, ui[APTI_BK_LANES] = {0};              /* 1/s[t] */
    for (int64_t t = 0; t < g->total * APTI_BK_LANES; t += APTI_BK_LANES) {
        for (int32_t l = 0; l < APTI_BK_LANES; l++) {
            const float u2r = c[t + l] * (ur[l] * ur[l] - ui[l] * ui[l]), u2i = c[t + l] * (2 * ur[l] * ui[l]);
            const float in_re = s_re[l] * u2r - s_im[l] * u2i, in_im = s_re[l] * u2i + s_im[l] * u2r;
            dc[t + l] += s_im[l] * ui[l] - s_re[l] * ur[l];
            s_re[l] = q_re[t + l] + in_re;
            s_im[l] = q_im[t + l] + in_im;
            ur[l] = u_re[t + l];
            ui[l] = u_im[t + l];
            a[t + l] = r_re[t + l] + in_re;
            u_re[t + l] = r_im[t + l] + in_im;
        }
    }
}

/* dmask[p] += Dc[p] mask[p-1] + Dc[p+1] mask[p+1] */
static void apti_bk_store_mask(const apti_bk_group *g, const apti_bk_job *job)
{
    for (int32_t l = 0; l < APTI_BK_LANES; l++) {
        const float *m = job->mask + g->row[l] * job->n, *dc = g->x[8] + g->lead * APTI_BK_LANES + l;
        float *dm = job->dmask + g->row[l] * job->n;
        for (int64_t t = 0; t < g->count[l]; t++) {
            const int64_t p = g->first[l] + t;
            if (p > 0) dm[p] += dc[t * APTI_BK_LANES] * m[p - 1];
            if (p + 1 < job->n) dm[p] += dc[(t + 1) * APTI_BK_LANES] * m[p + 1];
        }
    }
}

/* d = -2 + v - z: dL/d re(z) = -sum Re Dd, dL/d im(z) = sum Im Dd */
static void apti_bk_sum_z(const apti_bk_group *g, double sum[2])
{
    sum[0] = sum[1] = 0;
    for (int32_t l = 0; l < APTI_BK_LANES; l++) {
        const int64_t at = g->lead * APTI_BK_LANES + l;
        for (int64_t t = 0; t < g->count[l]; t++) {
            sum[0] -= (double)g->x[0][at + t * APTI_BK_LANES];
            sum[1] += (double)g->x[6][at + t * APTI_BK_LANES];
        }
    }
}

/* sum: dL/dz of the group, or NULL */
static void apti_bk_backward_group(const apti_bk_job *job, int64_t group, char *scratch, double *sum)
{
    apti_bk_group g;
    apti_bk_begin(&g, job, group, 2 * job->overlap, APTI_BK_BACKWARD, scratch);
    const apti_bk_source re = {job->dre, 0, job->overlap, false}, im = {job->dim, 0, job->overlap, false};
    apti_bk_load_matrix(&g, job);
    apti_bk_load(g.x[4], &g, job, &re);
    apti_bk_load(g.x[5], &g, job, &im);
    apti_bk_left(&g, job->y);
    apti_bk_right_backward(&g, job->y);
    apti_bk_left_backward(&g);
    if (job->dv != NULL) apti_bk_store(job->dv, &g, job, g.x[0], true);
    if (job->dmask != NULL) apti_bk_store_mask(&g, job);
    if (sum != NULL) apti_bk_sum_z(&g, sum);
}

APT_API int64_t apt_bk_scratch(int64_t rows, int64_t n, const apt_bk *z)
{
    apti_bk_job job;
    return apti_bk_plan(&job, rows, n, z) == APT_OK ? job.bytes : -1;
}

/* Everything that can be said without reading the arrays */
static apt_result apti_bk_forward_plan(apti_bk_job *job, float *re, float *im, const float *v, const float *mask, int64_t rows,
                                       int64_t n, const apt_bk *z)
{
    const apt_result r = apti_bk_plan(job, rows, n, z);
    if (r != APT_OK) return r;
    if (job->jobs > 0 && (re == NULL || im == NULL || v == NULL)) return APT_E_ARGUMENT;
    job->v = v;
    job->mask = mask;
    job->out_re = re;
    job->out_im = im;
    return APT_OK;
}

static apt_result apti_bk_backward_plan(apti_bk_job *job, float *dv, float *dmask, double *dz, const float *dre, const float *dim,
                                        const float *v, const float *mask, int64_t rows, int64_t n, const apt_bk *z)
{
    const apt_result r = apti_bk_plan(job, rows, n, z);
    if (r != APT_OK) return r;
    if (job->jobs > 0 && (dre == NULL || dim == NULL || v == NULL)) return APT_E_ARGUMENT;
    if (dmask != NULL && mask == NULL) return APT_E_ARGUMENT;
    job->v = v;
    job->mask = mask;
    job->dre = dre;
    job->dim = dim;
    job->dv = dv;
    job->dmask = dmask;
    job->dz = dz;
    return APT_OK;
}

/* Values [at, at + n) of the inputs */
static apt_result apti_bk_check(const apti_bk_job *job, int64_t at, int64_t n)
{
    const apt_result r = apti_check_between(job->v + at, n, -APTI_BK_MOST_V, APTI_BK_MOST_V);
    if (r != APT_OK) return r;
    if (job->dre != NULL && !(apti_finite_all(job->dre + at, n) && apti_finite_all(job->dim + at, n))) return APT_E_NONFINITE;
    return job->mask != NULL ? apti_check_share(job->mask + at, n) : APT_OK;
}

static apt_result apti_bk_ready(const apti_bk_job *job, const void *scratch, size_t scratch_bytes)
{
    const apt_result r = apti_bk_check(job, 0, job->jobs > 0 ? job->rows * job->n : 0);
    if (r != APT_OK) return r;
    return job->jobs > 0 && (scratch == NULL || scratch_bytes < (size_t)job->bytes) ? APT_E_SCRATCH : APT_OK;
}

APT_API apt_result apt_bk_forward(float *re, float *im, const float *v, const float *mask, int64_t rows, int64_t n,
                                  const apt_bk *z, void *scratch, size_t scratch_bytes)
{
    apti_bk_job job;
    apt_result r = apti_bk_forward_plan(&job, re, im, v, mask, rows, n, z);
    if (r == APT_OK) r = apti_bk_ready(&job, scratch, scratch_bytes);
    for (int64_t i = 0; r == APT_OK && i < job.groups; i++) apti_bk_forward_group(&job, i, (char *)scratch);
    return r;
}

APT_API apt_result apt_bk_backward(float *dv, float *dmask, double *dz, const float *dre, const float *dim, const float *v,
                                   const float *mask, int64_t rows, int64_t n, const apt_bk *z, void *scratch,
                                       size_t scratch_bytes)
{
    apti_bk_job job;
    apt_result r = apti_bk_backward_plan(&job, dv, dmask, dz, dre, dim, v, mask, rows, n, z);
    if (r == APT_OK) r = apti_bk_ready(&job, scratch, scratch_bytes);
    for (int64_t i = 0; r == APT_OK && i < job.groups; i++) {
        double sum[2];
        apti_bk_backward_group(&job, i, (char *)scratch, dz != NULL ? sum : NULL);
        for (int32_t k = 0; dz != NULL && k < 2; k++) dz[k] += sum[k];
    }
    return r;
}

#ifndef APT_ONLY_CORE
/* --- the BK-core on the context's threads --- */

enum { APTI_BK_CHECK = 1 << 16 };     /* values of a task that looks for NaN */

typedef struct apti_bk_run {
    apt_ctx *ctx;
    const apti_bk_job *job;
    char *memory;                     /* scratch of all threads, or NULL: the context's */
    double *sum;                      /* [2 * groups] or NULL */
    int32_t nonfinite, range;         /* atomic */
} apti_bk_run;

static void apti_bk_check_task(int64_t index, int32_t thread, void *arg)
{
    apti_bk_run *run = (apti_bk_run *)arg;
    const int64_t at = index * APTI_BK_CHECK, n = run->job->rows * run->job->n;
    const apt_result r = apti_bk_check(run->job, at, apti_min_i64(APTI_BK_CHECK, n - at));
    (void)thread;
    if (r == APT_E_NONFINITE) APTI_STORE(&run->nonfinite, 1);
    else if (r != APT_OK) APTI_STORE(&run->range, 1);
}

static void apti_bk_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bk_run *run = (const apti_bk_run *)arg;
    char *scratch = run->memory != NULL ? run->memory + thread * run->job->bytes : (char *)apti_ops_scratch(run->ctx, thread);
    if (run->job->out_re != NULL) apti_bk_forward_group(run->job, index, scratch);
    else apti_bk_backward_group(run->job, index, scratch, run->sum != NULL ? run->sum + 2 * index : NULL);
}

static apt_result apti_bk_run_job(apt_ctx *ctx, const apti_bk_job *job)
{
    if (job->jobs == 0) return APT_OK;
    apti_bk_run run = APT_ZERO;
    run.ctx = ctx;
    run.job = job;
    apti_parallel_for(ctx, apti_ceil_div(job->rows * job->n, APTI_BK_CHECK), apti_bk_check_task, &run);
    if (APTI_LOAD(&run.nonfinite) != 0) return apti_fail(ctx, APT_E_NONFINITE, "BK-core: an input is NaN or infinite");
    if (APTI_LOAD(&run.range) != 0)
        return apti_fail(ctx, APT_E_RANGE, "BK-core: a mask value is outside 0..1, or a potential beyond +-1e9");
    const bool large = (uint64_t)job->bytes > ctx->scratch_bytes / 2;
    if (large) run.memory = (char *)apti_alloc(ctx, job->bytes, ctx->threads);
    if (job->dz != NULL) run.sum = (double *)apti_alloc(ctx, job->groups, 2 * (int64_t)sizeof(double));
    const bool memory = (!large || run.memory != NULL) && (job->dz == NULL || run.sum != NULL);
    if (memory) {
        apti_parallel_for(ctx, job->groups, apti_bk_task, &run);
        for (int64_t i = 0; run.sum != NULL && i < 2 * job->groups; i++) job->dz[i & 1] += run.sum[i];
    }
    apti_free(ctx, run.memory);
    apti_free(ctx, run.sum);
    return memory ? APT_OK : apti_fail(ctx, APT_E_MEMORY, "BK-core: no memory for %lld bytes of scratch", (long long)job->bytes);
}

static apt_result apti_bk_refused(apt_ctx *ctx, apt_result result, int64_t rows, int64_t n)
{
    return apti_fail(ctx, result, "BK-core of %lld rows of %lld: an array is missing or z is not allowed (0.05 <= |im| <= 1e6)",
                     (long long)rows, (long long)n);
}

APT_API apt_result apt_bk_forward_threads(apt_ctx *ctx, float *re, float *im, const float *v, const float *mask, int64_t rows,
                                          int64_t n, const apt_bk *z)
{
    apti_bk_job job;
    if (ctx == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_bk_forward_plan(&job, re, im, v, mask, rows, n, z);
    return r == APT_OK ? apti_bk_run_job(ctx, &job) : apti_bk_refused(ctx, r, rows, n);
}

APT_API apt_result apt_bk_backward_threads(apt_ctx *ctx, float *dv, float *dmask, double *dz, const float *dre, const float *dim,
                                           const float *v, const float *mask, int64_t rows, int64_t n, const apt_bk *z)
{
    apti_bk_job job;
    if (ctx == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_bk_backward_plan(&job, dv, dmask, dz, dre, dim, v, mask, rows, n, z);
    return r == APT_OK ? apti_bk_run_job(ctx, &job) : apti_bk_refused(ctx, r, rows, n);
}

/* --- modules: parameters, memory, optimizer --- */

typedef enum apti_module_kind { APTI_MODULE_MOE = 1, APTI_MODULE_CORE, APTI_MODULE_LAYER } apti_module_kind;

/* value, grad, moment1 and moment2 are one block. */
typedef struct apti_tensor {
    char name[48];
    int64_t rows, cols;
    float *value, *grad, *moment1, *moment2;
} apti_tensor;

/* Every module begins with this. */
struct apt_module {
    apt_ctx *ctx;
    apt_module *next;                 /* in ctx->modules */
    apt_module *owner;                /* NULL: the caller's */
    apti_module_kind kind;
    apti_tensor *tensor;
    int32_t tensors;
    apt_module *part[2];              /* or NULL */
    float *room;                      /* what a forward keeps for the backward */
    int64_t rows, sequences;          /* of the last forward, 0: none */
    bool live;                        /* a backward may follow */
    void *more;                       /* a block of the kind's own, or NULL */
};

static void apti_module_free(apt_module *m)
{
    if (m == NULL) return;
    apt_ctx *ctx = m->ctx;
    for (int32_t i = 0; i < 2; i++) apti_module_free(m->part[i]);
    for (int32_t i = 0; i < m->tensors; i++) apti_free(ctx, m->tensor[i].value);
    apti_free(ctx, m->tensor);
    apti_free(ctx, m->room);
    apti_free(ctx, m->more);
    apti_free(ctx, m);
}

APT_API void apt_module_destroy(apt_module *module)
{
    if (module == NULL || module->owner != NULL) return;
    apt_module **link = &module->ctx->modules;
    while (*link != NULL && *link != module) link = &(*link)->next;
    if (*link != NULL) *link = module->next;
    apti_module_free(module);
}

/* A module of `bytes` with room for `tensors` tensors, which all are 0 until apti_tensor_make. */
static apt_module *apti_module_make(apt_ctx *ctx, apti_module_kind kind, int64_t bytes, int32_t tensors, apt_module *owner)
{
    apt_module *m = (apt_module *)apti_calloc(ctx, 1, bytes);
    if (m == NULL) return NULL;
    m->ctx = ctx;
    m->kind = kind;
    m->owner = owner;
    m->tensor = (apti_tensor *)apti_calloc(ctx, tensors, (int64_t)sizeof(apti_tensor));
    if (m->tensor != NULL) return m;
    apti_free(ctx, m);
    return NULL;
}

/* Hands a complete module to the caller, or frees an incomplete one. */
static apt_result apti_module_done(apt_ctx *ctx, apt_module *m, apt_result result, apt_module **module)
{
    if (result != APT_OK) {
        apti_module_free(m);
        return result;
    }
    if (m->owner == NULL) {
        m->next = ctx->modules;
        ctx->modules = m;
    }
    *module = m;
    return APT_OK;
}

/* The next tensor: uniform in +-bound, or the constant `value` where bound is 0. Its values depend on its name's number only. */
static apt_result apti_tensor_make(apt_module *m, const char *name, int64_t rows, int64_t cols, uint64_t seed, float bound,
                                   float value)
{
    apti_tensor *t = &m->tensor[m->tensors];
    int64_t n = 0, all = 0;
    if (apti_mul(rows, cols, &n) && apti_mul(n, 4 * (int64_t)sizeof(float), &all))
        t->value = (float *)apti_calloc(m->ctx, n, 4 * (int64_t)sizeof(float));
    if (t->value == NULL) return apti_fail(m->ctx, APT_E_MEMORY, "no memory for %s of %lld x %lld", name, (long long)rows,
                                           (long long)cols);
    const size_t length = strlen(name);
    memcpy(t->name, name, length < sizeof t->name ? length : sizeof t->name - 1);
    t->rows = rows;
    t->cols = cols;
    t->grad = t->value + n;
    t->moment1 = t->grad + n;
    t->moment2 = t->moment1 + n;
    apti_rng rng;
    rng.key = apti_rng_seed(seed, (uint64_t)m->kind << 32 | (uint32_t)m->tensors);
    rng.counter = 0;
    if (apti_bits(bound) != 0) apti_rng_fill_uniform(&rng, t->value, n, -bound, bound);
    else apti_ops_fill(t->value, value, n);
    m->tensors++;
    return APT_OK;
}

/* NAME.weight(out, in) uniform in +-1/sqrt(in) and NAME.bias(out) */
static apt_result apti_tensor_pair(apt_module *m, const char *name, int64_t out, int64_t in, uint64_t seed, float bias)
{
    char text[48];
    snprintf(text, sizeof text, "%s.weight", name);
    const apt_result r = apti_tensor_make(m, text, out, in, seed, 1.0f / sqrtf((float)in), 0);
    if (r != APT_OK) return r;
    snprintf(text, sizeof text, "%s.bias", name);
    return apti_tensor_make(m, text, 1, out, seed, 0, bias);
}

/* What the last forward kept is used up. A layer of which the caller took a part by itself has to begin again as well. */
static void apti_module_spend(apt_module *m)
{
    m->live = false;
    if (m->owner != NULL) m->owner->live = false;
}

/* Memory of a forward and its backward. What an earlier forward kept is lost. */
static apt_result apti_module_room(apt_module *m, int64_t floats)
{
    int64_t bytes;
    apti_module_spend(m);
    m->rows = 0;
    if (!apti_mul(floats, (int64_t)sizeof(float), &bytes)) floats = -1;
    if (floats >= 0 && m->room != NULL && apti_block_bytes(m->room) >= bytes) return APT_OK;
    apti_free(m->ctx, m->room);
    m->room = (float *)apti_alloc(m->ctx, floats, (int64_t)sizeof(float));
    return m->room != NULL ? APT_OK : apti_fail(m->ctx, APT_E_MEMORY, "no memory for the activations of a module");
}

/* n floats of the room, beginning on a cache line */
static float *apti_carve(float **next, int64_t n)
{
    float *p = *next;
    *next += apti_round_up(n, 16);
    return p;
}

static const apti_tensor *apti_module_tensor(const apt_module *m, int32_t index)
{
    if (index < m->tensors) return &m->tensor[index];
    index -= m->tensors;
    for (int32_t i = 0; i < 2 && m->part[i] != NULL; i++) {
        const int32_t n = apt_module_tensors(m->part[i]);
        if (index < n) return apti_module_tensor(m->part[i], index);
        index -= n;
    }
    return NULL;
}

APT_API int32_t apt_module_tensors(const apt_module *module)
{
    if (module == NULL) return 0;
    int32_t n = module->tensors;
    for (int32_t i = 0; i < 2; i++) n += apt_module_tensors(module->part[i]);
    return n;
}

APT_API apt_result apt_module_get(const apt_module *module, int32_t index, apt_module_tensor *tensor)
{
    if (module == NULL || tensor == NULL) return APT_E_ARGUMENT;
    if (index < 0 || index >= apt_module_tensors(module))
        return apti_fail(module->ctx, APT_E_RANGE, "tensor %d of a module that has %d", (int)index,
                         (int)apt_module_tensors(module));
    const apti_tensor *t = apti_module_tensor(module, index);
    tensor->name = t->name;
    tensor->rows = t->rows;
    tensor->cols = t->cols;
    tensor->value = t->value;
    tensor->grad = t->grad;
    return APT_OK;
}

APT_API int64_t apt_module_parameters(const apt_module *module)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < apt_module_tensors(module); i++) {
        const apti_tensor *t = apti_module_tensor(module, i);
        sum += t->rows * t->cols;
    }
    return sum;
}

APT_API apt_result apt_module_adam(apt_module *module, float learning_rate, int64_t step)
{
    if (module == NULL) return APT_E_ARGUMENT;
    if (step < 1 || !apti_finite(learning_rate) || learning_rate < 0)
        return apti_fail(module->ctx, APT_E_RANGE, "Adam: step %lld must be 1 or more, the learning rate 0 or more",
                         (long long)step);
    const int32_t n = apt_module_tensors(module);
    for (int32_t i = 0; i < n; i++) {
        const apti_tensor *t = apti_module_tensor(module, i);
        if (!apti_finite_all(t->grad, t->rows * t->cols))
            return apti_fail(module->ctx, APT_E_NONFINITE, "Adam: the gradient of %s is not finite", t->name);
    }
    const double correction = sqrt(1 - pow(0.999, (double)step));
    const float size = (float)((double)learning_rate * correction / (1 - pow(0.9, (double)step)));
    for (int32_t i = 0; i < n; i++) {
        const apti_tensor *t = apti_module_tensor(module, i);
        const int64_t all = t->rows * t->cols;
        module->ctx->kernels->adam(t->value, t->moment1, t->moment2, t->grad, all, 1, 0.9f, 0.999f, size,
                                   (float)(1e-8 * correction), 0);
        memset(t->grad, 0, (size_t)all * sizeof(float));
    }
    return APT_OK;
}

/* --- modules: products --- */

/* y(rows, out) = act(x W^T + bias); W and bias are tensors i and i+1. x has rows of w->cols floats that begin ldx apart: a row
   of a convolution's input is the window of three positions, and windows overlap. pre: [rows * out] or NULL. */
static void apti_affine_forward(const apt_module *m, int32_t i, float *y, const float *x, int64_t ldx, int64_t rows, int32_t act,
                             float *pre)
{
    const apti_tensor *w = &m->tensor[i];
    apti_gemm g = apti_gemm_begin(y, w->rows, rows, w->rows, false);
    apti_gemm_left(&g.part[0], x, ldx, w->cols);
    apti_gemm_right(&g.part[0], APTI_B_PLAIN_T, w->value, w->cols);
    g.bias = w[1].value;
    g.act = act;
    g.pre = pre;
    g.ld_pre = w->rows;
    apti_gemm_run(m->ctx, &g);
}

/* dW += dy^T x, dbias += sum of dy */
static void apti_affine_backward(const apt_module *m, int32_t i, const float *dy, const float *x, int64_t ldx, int64_t rows)
{
    const apti_tensor *w = &m->tensor[i];
    if (rows == 0) return;
    apti_weight_grad(m->ctx, w->grad, w->rows, w->cols, dy, w->rows, x, ldx, rows);
    apti_column_sum(m->ctx, w[1].grad, dy, w->rows, rows, w->rows);
}

/* dx(rows, in) (+)= dy(rows, out) w(out, in) */
static void apti_map_input(apt_ctx *ctx, float *dx, bool accumulate, const float *dy, int64_t lddy, const float *w, int64_t out,
                           int64_t in, int64_t rows)
{
    apti_gemm g = apti_gemm_begin(dx, in, rows, in, accumulate);
    apti_gemm_left(&g.part[0], dy, lddy, out);
    apti_gemm_right(&g.part[0], APTI_B_PLAIN, w, in);
    apti_gemm_run(ctx, &g);
}

/* --- experts --- */

enum { APTI_EXPERTS = 64, APTI_EXPERT_TENSORS = 4 };             /* up and down, weight and bias; tensor 0 is the gate */

typedef struct apti_moe {
    apt_module base;                  /* more: the list of events */
    int32_t hidden, neurons, experts, top_k;
    int32_t events;
    uint64_t there;                   /* bit i: expert i of the beginning is there still */
    int64_t count[APTI_EXPERTS];
    int64_t begin[APTI_EXPERTS + 1];  /* expert e serves places begin[e] .. begin[e+1) of the last forward */
    /* in the room; rows * top_k pairs (position, choice) are sorted by expert into places */
    float *logits, *weight;           /* (rows, experts), (rows, top_k) */
    float *x, *pre, *act, *out;       /* (pairs, hidden / neurons / neurons / hidden) */
    int32_t *choice, *place, *from;   /* of a pair: expert and place; of a place: position */
} apti_moe;

static apti_moe *apti_moe_of(const apt_module *m)
{
    return m != NULL && m->kind == APTI_MODULE_MOE ? (apti_moe *)(uintptr_t)m : NULL;
}

static apt_result apti_moe_fill(apti_moe *moe, uint64_t seed)
{
    const int64_t d = moe->hidden, f = moe->neurons;
    apt_result r = apti_tensor_make(&moe->base, "gate.weight", moe->experts, d, seed, 1.0f / sqrtf((float)d), 0);
    for (int32_t e = 0; r == APT_OK && e < moe->experts; e++) {
        char name[32];
        snprintf(name, sizeof name, "expert.%d.up", (int)e);
        r = apti_tensor_pair(&moe->base, name, f, d, seed, 0);
        snprintf(name, sizeof name, "expert.%d.down", (int)e);
        if (r == APT_OK) r = apti_tensor_pair(&moe->base, name, d, f, seed, 0);
    }
    return r;
}

static apt_result apti_moe_new(apt_ctx *ctx, const apt_moe_desc *desc, apt_module *owner, apt_module **module)
{
    const int32_t experts = desc->experts != 0 ? desc->experts : 4, d = desc->hidden;
    const int32_t top_k = desc->top_k != 0 ? desc->top_k : experts < 2 ? experts : 2;
    if (d < 1 || d > 1 << 20 || desc->neurons < 0 || desc->neurons > 1 << 24)
        return apti_fail(ctx, APT_E_RANGE, "experts: hidden %d, neurons %d", (int)d, (int)desc->neurons);
    if (experts < 1 || experts > APTI_EXPERTS || top_k < 1 || top_k > experts)
        return apti_fail(ctx, APT_E_RANGE, "experts: %d must be 1..64, and of them top_k %d must be 1 or more", (int)experts,
                         (int)top_k);
    apt_module *m = apti_module_make(ctx, APTI_MODULE_MOE, (int64_t)sizeof(apti_moe), 1 + experts * APTI_EXPERT_TENSORS, owner);
    if (m == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for experts");
    apti_moe *moe = (apti_moe *)m;
    moe->hidden = d;
    moe->neurons = desc->neurons != 0 ? desc->neurons : 4 * d;
    moe->experts = experts;
    moe->top_k = top_k;
    moe->there = ~(uint64_t)0 >> (APTI_EXPERTS - experts);
    return apti_module_done(ctx, m, apti_moe_fill(moe, desc->seed), module);
}

APT_API apt_result apt_moe_create(apt_ctx *ctx, const apt_moe_desc *desc, apt_module **module)
{
    if (ctx == NULL || desc == NULL || module == NULL) return APT_E_ARGUMENT;
    return apti_moe_new(ctx, desc, NULL, module);
}

static apt_result apti_moe_carve(apti_moe *moe, int64_t rows)
{
    const int64_t limit = INT32_MAX / moe->top_k;                /* places are int32_t, and no size below can overflow */
    if (rows < 1 || rows > limit) return apti_fail(moe->base.ctx, APT_E_RANGE, "experts: %lld rows", (long long)rows);
    const int64_t pairs = rows * moe->top_k, d = moe->hidden, f = moe->neurons;
    const int64_t all = rows * moe->experts + 4 * pairs + pairs * (2 * d + 2 * f) + 9 * 16;
    const apt_result r = apti_module_room(&moe->base, all);
    if (r != APT_OK) return r;
    float *next = moe->base.room;
    moe->logits = apti_carve(&next, rows * moe->experts);
    moe->weight = apti_carve(&next, pairs);
    moe->x = apti_carve(&next, pairs * d);
    moe->pre = apti_carve(&next, pairs * f);
    moe->act = apti_carve(&next, pairs * f);
    moe->out = apti_carve(&next, pairs * d);
    moe->choice = (int32_t *)(void *)apti_carve(&next, pairs);
    moe->place = (int32_t *)(void *)apti_carve(&next, pairs);
    moe->from = (int32_t *)(void *)apti_carve(&next, pairs);
    return APT_OK;
}

/* What the tasks below share: y or dx, and dy. */
typedef struct apti_moe_job { const apti_moe *moe; float *y; const float *dy; int64_t rows, chunk; } apti_moe_job;

/* The top_k largest logits (ties and NaN: the lower index) and the softmax over them */
static void apti_moe_choose_row(const apti_moe *moe, int64_t row)
{
    const float *z = moe->logits + row * moe->experts;
    float *w = moe->weight + row * moe->top_k;
    int32_t *choice = moe->choice + row * moe->top_k;
    uint64_t taken = 0;
    double sum = 0;
    for (int32_t k = 0; k < moe->top_k; k++) {
        int32_t best = -1;
        for (int32_t e = 0; e < moe->experts; e++)
            if ((taken >> e & 1) == 0 && (best < 0 || z[e] > z[best])) best = e;
        taken |= (uint64_t)1 << best;
        choice[k] = best;
        w[k] = expf(z[best] - z[choice[0]]);
        sum += (double)w[k];
    }
    for (int32_t k = 0; k < moe->top_k; k++) w[k] = (float)((double)w[k] / sum);
}

static void apti_moe_choose_task(int64_t index, int32_t thread, void *arg)
{
    const apti_moe_job *job = (const apti_moe_job *)arg;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk);
    (void)thread;
    for (int64_t row = index * job->chunk; row < end; row++) apti_moe_choose_row(job->moe, row);
}

/* y = sum over choices of weight * out (dy NULL) or, in the backward, dx += sum over choices of dx of the place */
static void apti_moe_combine_task(int64_t index, int32_t thread, void *arg)
{
    const apti_moe_job *job = (const apti_moe_job *)arg;
    const apti_moe *moe = job->moe;
    const apti_kernels *kernels = moe->base.ctx->kernels;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk), d = moe->hidden;
    (void)thread;
    for (int64_t row = index * job->chunk; row < end; row++) {
        float *y = job->y + row * d;
        if (job->dy == NULL) memset(y, 0, (size_t)d * sizeof(float));
        for (int64_t i = row * moe->top_k; i < (row + 1) * moe->top_k; i++) {
            if (job->dy == NULL) kernels->axpy(y, moe->weight[i], moe->out + moe->place[i] * d, d);
            else kernels->add(y, y, moe->x + moe->place[i] * d, d);
        }
    }
}

/* d out = weight * dy in the place of out; d weight = dy . out; through the softmax of the chosen to d logits, in the place of
   logits */
static void apti_moe_gate_task(int64_t index, int32_t thread, void *arg)
{
    const apti_moe_job *job = (const apti_moe_job *)arg;
    const apti_moe *moe = job->moe;
    const apti_kernels *kernels = moe->base.ctx->kernels;
    const int64_t end = apti_min_i64(job->rows, (index + 1) * job->chunk), d = moe->hidden, k = moe->top_k;
    (void)thread;
    for (int64_t row = index * job->chunk; row < end; row++) {
        const float *dy = job->dy + row * d, *w = moe->weight + row * k;
        float *z = moe->logits + row * moe->experts;
        float dw[APTI_EXPERTS];
        double mean = 0;
        for (int64_t i = 0; i < k; i++) {
            float *out = moe->out + moe->place[row * k + i] * d;
            dw[i] = kernels->dot(dy, out, d);
            mean += (double)w[i] * (double)dw[i];
            kernels->scale(out, dy, w[i], d);
        }
        memset(z, 0, (size_t)moe->experts * sizeof(float));
        for (int64_t i = 0; i < k; i++) z[moe->choice[row * k + i]] = (float)((double)w[i] * ((double)dw[i] - mean));
    }
}

static void apti_moe_rows_run(const apti_moe *moe, apt_task task, float *y, const float *dy)
{
    apti_moe_job job = APT_ZERO;
    job.moe = moe;
    job.y = y;
    job.dy = dy;
    job.rows = moe->base.rows;
    job.chunk = apti_ops_rows(moe->hidden);
    apti_parallel_for(moe->base.ctx, apti_ceil_div(job.rows, job.chunk), task, &job);
}

/* Sorts the pairs by expert, within one by position. */
static void apti_moe_sort(apti_moe *moe)
{
    const int64_t pairs = moe->base.rows * moe->top_k;
    int64_t next[APTI_EXPERTS + 1] = {0};
    for (int64_t i = 0; i < pairs; i++) next[moe->choice[i] + 1]++;
    for (int32_t e = 0; e < moe->experts; e++) next[e + 1] += next[e];
    memcpy(moe->begin, next, sizeof next);
    for (int64_t i = 0; i < pairs; i++) {
        moe->place[i] = (int32_t)next[moe->choice[i]]++;
        moe->from[moe->place[i]] = (int32_t)(i / moe->top_k);
    }
}

/* What the last forward chose joins the counts. */
static void apti_moe_count(apti_moe *moe)
{
    for (int32_t e = 0; e < moe->experts; e++) moe->count[e] += moe->begin[e + 1] - moe->begin[e];
}

static apt_result apti_moe_forward(apti_moe *moe, float *y, const float *x, int64_t rows)
{
    const int64_t d = moe->hidden, f = moe->neurons;
    apt_ctx *ctx = moe->base.ctx;
    const apt_result r = apti_moe_carve(moe, rows);
    if (r != APT_OK) return r;
    moe->base.rows = rows;
    apti_gemm gate = apti_gemm_begin(moe->logits, moe->experts, rows, moe->experts, false);
    apti_gemm_left(&gate.part[0], x, d, d);
    apti_gemm_right(&gate.part[0], APTI_B_PLAIN_T, moe->base.tensor[0].value, d);
    apti_gemm_run(ctx, &gate);
    apti_moe_rows_run(moe, apti_moe_choose_task, NULL, NULL);
    apti_moe_sort(moe);
    apti_gather_rows(ctx, moe->x, d, x, d, moe->from, rows * moe->top_k, d);
    for (int32_t e = 0; e < moe->experts; e++) {
        const int64_t at = moe->begin[e], n = moe->begin[e + 1] - at;
        const int32_t up = 1 + e * APTI_EXPERT_TENSORS;
        apti_affine_forward(&moe->base, up, moe->act + at * f, moe->x + at * d, d, n, APT_GELU_ERF, moe->pre + at * f);
        apti_affine_forward(&moe->base, up + 2, moe->out + at * d, moe->act + at * f, f, n, -1, NULL);
    }
    apti_moe_rows_run(moe, apti_moe_combine_task, y, NULL);
    moe->base.live = true;
    return APT_OK;
}

/* dx (+)=; NULL: not wanted. Uses up what the forward kept: activations are overwritten by their gradients. */
static void apti_moe_backward(apti_moe *moe, float *dx, bool accumulate, const float *dy, const float *x)
{
    const int64_t d = moe->hidden, f = moe->neurons, rows = moe->base.rows;
    apt_ctx *ctx = moe->base.ctx;
    apti_module_spend(&moe->base);
    apti_moe_rows_run(moe, apti_moe_gate_task, NULL, dy);
    for (int32_t e = 0; e < moe->experts; e++) {
        const int64_t at = moe->begin[e], n = moe->begin[e + 1] - at;
        const int32_t up = 1 + e * APTI_EXPERT_TENSORS;
        float *act = moe->act + at * f, *in = moe->x + at * d, *out = moe->out + at * d;
        apti_affine_backward(&moe->base, up + 2, out, act, f, n);
        apti_map_input(ctx, act, false, out, d, moe->base.tensor[up + 2].value, d, f, n);
        apti_act_backward(ctx, act, f, act, f, moe->pre + at * f, f, NULL, n, f, APT_GELU_ERF);
        apti_affine_backward(&moe->base, up, act, in, d, n);
        if (dx != NULL) apti_map_input(ctx, in, false, act, f, moe->base.tensor[up].value, f, d, n);
    }
    const apti_tensor *gate = &moe->base.tensor[0];
    apti_weight_grad(ctx, gate->grad, moe->experts, d, moe->logits, moe->experts, x, d, rows);
    if (dx == NULL) return;
    apti_map_input(ctx, dx, accumulate, moe->logits, moe->experts, gate->value, moe->experts, d, rows);
    apti_moe_rows_run(moe, apti_moe_combine_task, dx, dy);
}

/* The inputs of a forward or a backward: present, finite, and (backward) those of the last forward. */
static apt_result apti_module_inputs(const apt_module *m, const float *x, int64_t n, const float *other, int64_t other_n)
{
    if (x == NULL || other == NULL) return apti_fail(m->ctx, APT_E_ARGUMENT, "module: an array is NULL");
    if (!apti_finite_all(x, n) || !apti_finite_all(other, other_n))
        return apti_fail(m->ctx, APT_E_NONFINITE, "module: an input is NaN or infinite");
    return APT_OK;
}

static apt_result apti_module_behind(const apt_module *m, int64_t sequences, int64_t rows)
{
    if (!m->live) return apti_fail(m->ctx, APT_E_STATE, "module: a backward needs a forward before it");
    if (rows != m->rows || sequences != m->sequences)
        return apti_fail(m->ctx, APT_E_SHAPE, "module: the forward had %lld rows, this backward has %lld", (long long)m->rows,
                         (long long)rows);
    return APT_OK;
}

APT_API apt_result apt_moe_forward(apt_module *module, float *y, const float *x, int64_t rows, int32_t train)
{
    apti_moe *moe = apti_moe_of(module);
    int64_t n = 0;
    if (moe == NULL) return APT_E_ARGUMENT;
    if (y == NULL || !apti_mul(rows, moe->hidden, &n))
        return apti_fail(module->ctx, APT_E_ARGUMENT, "experts: no output, or rows below 0");
    apt_result r = apti_module_inputs(module, x, n, x, 0);
    if (r == APT_OK) r = apti_moe_forward(moe, y, x, rows);
    if (r == APT_OK && train != 0) apti_moe_count(moe);
    return r;
}

APT_API apt_result apt_moe_backward(apt_module *module, float *dx, const float *dy, const float *x, int64_t rows)
{
    apti_moe *moe = apti_moe_of(module);
    if (moe == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_module_behind(module, 0, rows);
    if (r == APT_OK) r = apti_module_inputs(module, x, rows * moe->hidden, dy, rows * moe->hidden);
    if (r == APT_OK) apti_moe_backward(moe, dx, false, dy, x);
    return r;
}

APT_API apt_result apt_moe_usage(const apt_module *module, int32_t *experts, int64_t *counts, int32_t capacity)
{
    const apti_moe *moe = apti_moe_of(module);
    if (moe == NULL) return APT_E_ARGUMENT;
    if (counts != NULL && capacity < moe->experts)
        return apti_fail(module->ctx, APT_E_SCRATCH, "room for %d counts, there are %d experts", (int)capacity,
                         (int)moe->experts);
    if (experts != NULL) *experts = moe->experts;
    for (int32_t e = 0; counts != NULL && e < moe->experts; e++) counts[e] = moe->count[e];
    return APT_OK;
}

/* Rows of the gate that stay move up; with them what the optimizer knows of them. */
static void apti_moe_cut_gate(apti_moe *moe, const bool *keep)
{
    apti_tensor *gate = &moe->base.tensor[0];
    float *const all[4] = {gate->value, gate->grad, gate->moment1, gate->moment2};
    int32_t rows = 0;
    for (int32_t e = 0; e < moe->experts; e++) {
        if (!keep[e]) continue;
        for (int32_t i = 0; i < 4; i++)
            memmove(all[i] + rows * gate->cols, all[i] + e * gate->cols, (size_t)gate->cols * sizeof(float));
        rows++;
    }
    gate->rows = rows;
}

static int64_t apti_moe_choices(const apti_moe *moe)
{
    int64_t total = 0;
    for (int32_t e = 0; e < moe->experts; e++) total += moe->count[e];
    return total;
}

/* Frees the experts that keep names 0. The last forward is no more. */
static void apti_moe_remove(apti_moe *moe, const bool *keep)
{
    int32_t left = 0;
    uint64_t there = moe->there;
    apti_moe_cut_gate(moe, keep);
    for (int32_t e = 0; e < moe->experts; e++) {
        apti_tensor *from = &moe->base.tensor[1 + e * APTI_EXPERT_TENSORS];
        const uint64_t bit = there & (0 - there);                /* lowest: number e of those that are there */
        there -= bit;
        if (keep[e]) {
            memmove(&moe->base.tensor[1 + left++ * APTI_EXPERT_TENSORS], from, APTI_EXPERT_TENSORS * sizeof *from);
            continue;
        }
        moe->there -= bit;
        for (int32_t i = 0; i < APTI_EXPERT_TENSORS; i++) apti_free(moe->base.ctx, from[i].value);
    }
    moe->experts = left;
    moe->top_k = moe->top_k < left ? moe->top_k : left;
    moe->base.tensors = 1 + left * APTI_EXPERT_TENSORS;
    apti_module_spend(&moe->base);
    memset(moe->count, 0, sizeof moe->count);
}

/* The same with an event. Memory for the event comes first, so that a failure changes nothing. */
static apt_result apti_moe_cut(apti_moe *moe, const bool *keep, int64_t step, int32_t *removed)
{
    apt_ctx *ctx = moe->base.ctx;
    apt_expert_event *list = (apt_expert_event *)apti_alloc(ctx, moe->events + 1, (int64_t)sizeof *list);
    if (list == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for the history of experts");
    if (moe->events > 0) memcpy(list, moe->base.more, (size_t)moe->events * sizeof *list);
    const double total = (double)apti_moe_choices(moe);
    int64_t lost = 0, least = moe->count[0];
    for (int32_t e = 0; e < moe->experts; e++) {
        least = apti_min_i64(least, moe->count[e]);
        if (!keep[e]) lost += moe->count[e];
    }
    apt_expert_event *event = &list[moe->events++];
    event->step = step;
    event->before = moe->experts;
    event->least_share = (double)least / total;
    event->lost_share = (double)lost / total;
    apti_moe_remove(moe, keep);
    event->after = moe->experts;
    if (removed != NULL) *removed = event->before - event->after;
    apti_free(ctx, moe->base.more);
    moe->base.more = list;
    return APT_OK;
}

APT_API apt_result apt_moe_prune(apt_module *module, float share, int64_t step, int32_t *removed)
{
    apti_moe *moe = apti_moe_of(module);
    if (removed != NULL) *removed = 0;
    if (moe == NULL) return APT_E_ARGUMENT;
    if (!apti_finite(share) || share < 0 || share > 1) return apti_fail(module->ctx, APT_E_RANGE,
                                                                        "experts: the share must be in 0..1");
    apti_default_float(&share, 0.05f);
    const int64_t total = apti_moe_choices(moe);
    if (total == 0) return apti_fail(module->ctx, APT_E_STATE, "experts: no usage was counted since the last removal");
    bool keep[APTI_EXPERTS] = {0};
    int32_t most = 0, left = 0;
    for (int32_t e = 0; e < moe->experts; e++) {
        keep[e] = (double)moe->count[e] >= (double)share * (double)total;
        left += keep[e];
        if (moe->count[e] > moe->count[most]) most = e;
    }
    if (left == 0) keep[most] = true;
    return left == moe->experts ? APT_OK : apti_moe_cut(moe, keep, step, removed);
}

APT_API apt_result apt_moe_progress(apt_module *module, const apt_expert_schedule *schedule, int64_t step, int32_t *removed)
{
    apti_moe *moe = apti_moe_of(module);
    int32_t wanted;
    if (removed != NULL) *removed = 0;
    if (moe == NULL) return APT_E_ARGUMENT;
    const apt_result r = apt_expert_count(schedule, step, &wanted);
    if (r != APT_OK) return apti_fail(module->ctx, r, "experts: a schedule needs 1 <= last <= first and begin <= end");
    if (wanted >= moe->experts) return APT_OK;
    if (apti_moe_choices(moe) == 0) return apti_fail(module->ctx, APT_E_STATE,
                                                     "experts: no usage was counted since the last removal");
    bool keep[APTI_EXPERTS] = {0};
    for (int32_t e = 0; e < moe->experts; e++) keep[e] = true;
    for (int32_t left = moe->experts; left > wanted; left--) {
        int32_t least = -1;
        for (int32_t e = 0; e < moe->experts; e++)
            if (keep[e] && (least < 0 || moe->count[e] <= moe->count[least])) least = e;
        keep[least] = false;
    }
    return apti_moe_cut(moe, keep, step, removed);
}

APT_API int32_t apt_moe_events(const apt_module *module)
{
    const apti_moe *moe = apti_moe_of(module);
    return moe != NULL ? moe->events : 0;
}

APT_API apt_result apt_moe_event(const apt_module *module, int32_t index, apt_expert_event *event)
{
    const apti_moe *moe = apti_moe_of(module);
    if (moe == NULL || event == NULL) return APT_E_ARGUMENT;
    if (index < 0 || index >= moe->events)
        return apti_fail(module->ctx, APT_E_RANGE, "event %d of %d", (int)index, (int)moe->events);
    *event = ((const apt_expert_event *)moe->base.more)[index];
    return APT_OK;
}

/* --- sparse BK-core ---

   The convolutions read a buffer with a position of zeros before and behind each sequence, channels side by side: the window of a
   position is then a plain row of 3 * channels floats, and a convolution is one product over all rows. Rows of the zeros come
   out as something and are cleared again. */

enum { APTI_CONV_WIDTH = 3, APTI_CONV_CHANNELS = 16, APTI_CONVS = 3, APTI_CONV_TENSOR = 4 };
static const int32_t apti_conv_channels[APTI_CONVS + 1] = {2, APTI_CONV_CHANNELS, APTI_CONV_CHANNELS, 2};

typedef struct apti_bk_core {
    apt_module base;
    int32_t hidden, half;
    float temperature;
    apt_bk z;
    uint64_t seed, draw;
    int32_t mode;
    int64_t length;
    /* in the room */
    float *act, *dact;                /* (rows, half): relu of the predictor's first map, its gradient */
    float *u, *p, *m, *dm;            /* (rows): logit, probability, mask, gradient of the mask */
    float *g[2], *dg[2];              /* (rows): BK-core, re and im */
    float *h[APTI_CONVS + 1];         /* (padded rows, channels): m*G, then the outputs of the convolutions */
    float *dh[2];                     /* (padded rows, 16) */
    float *flip;                      /* a convolution's weights, turned */
} apti_bk_core;

static apti_bk_core *apti_bk_core_of(const apt_module *m)
{
    return m != NULL && m->kind == APTI_MODULE_CORE ? (apti_bk_core *)(uintptr_t)m : NULL;
}

static apt_result apti_bk_core_fill(apti_bk_core *c)
{
    apt_module *m = &c->base;
    apt_result r = apti_tensor_pair(m, "importance.0", c->half, c->hidden, c->seed, 0);
    /* 1: in the beginning most positions stay */
    if (r == APT_OK) r = apti_tensor_pair(m, "importance.1", 1, c->half, c->seed, 1);
    for (int32_t i = 0; r == APT_OK && i < APTI_CONVS; i++) {
        char name[24];
        snprintf(name, sizeof name, "interpolation.%d", (int)i);
        r = apti_tensor_pair(m, name, apti_conv_channels[i + 1], APTI_CONV_WIDTH * apti_conv_channels[i], c->seed, 0);
    }
    return r;
}

static bool apti_temperature_fits(float temperature)
{
    return apti_finite(temperature) && temperature >= 1e-3f && temperature <= 1e3f;
}

static apt_result apti_check_temperature(apt_ctx *ctx, float temperature)
{
    if (apti_temperature_fits(temperature)) return APT_OK;
    return apti_fail(ctx, APT_E_RANGE, "temperature %g must be in 0.001..1000", (double)temperature);
}

static apt_result apti_bk_core_new(apt_ctx *ctx, const apt_bk_core_desc *desc, apt_module *owner, apt_module **module)
{
    float temperature = desc->temperature;
    apti_bk_job job;
    apti_default_float(&temperature, 1.0f);
    if (desc->hidden < 2 || desc->hidden > 1 << 20)
        return apti_fail(ctx, APT_E_RANGE, "sparse BK-core: hidden is %d, must be 2 or more", (int)desc->hidden);
    apt_result r = apti_check_temperature(ctx, temperature);
    if (r == APT_OK) r = apti_bk_plan(&job, 0, 0, &desc->z) == APT_OK ? APT_OK : apti_bk_refused(ctx, APT_E_RANGE, 0, 0);
    if (r != APT_OK) return r;
    const int32_t tensors = APTI_CONV_TENSOR + 2 * APTI_CONVS;
    apt_module *m = apti_module_make(ctx, APTI_MODULE_CORE, (int64_t)sizeof(apti_bk_core), tensors, owner);
    if (m == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for a sparse BK-core");
    apti_bk_core *c = (apti_bk_core *)m;
    c->hidden = desc->hidden;
    c->half = desc->hidden / 2;
    c->temperature = temperature;
    c->z = desc->z;
    c->seed = desc->seed;
    return apti_module_done(ctx, m, apti_bk_core_fill(c), module);
}

APT_API apt_result apt_bk_core_create(apt_ctx *ctx, const apt_bk_core_desc *desc, apt_module **module)
{
    if (ctx == NULL || desc == NULL || module == NULL) return APT_E_ARGUMENT;
    return apti_bk_core_new(ctx, desc, NULL, module);
}

static int64_t apti_bk_core_padded(const apti_bk_core *c)
{
    return c->base.sequences * (c->length + 2);
}

static apt_result apti_bk_core_carve(apti_bk_core *c, int64_t sequences, int64_t length)
{
    const int64_t rows = sequences * length, padded = sequences * (length + 2), wide = padded * APTI_CONV_CHANNELS;
    const int64_t flip = APTI_CONV_WIDTH * APTI_CONV_CHANNELS * APTI_CONV_CHANNELS;
    const apt_result r = apti_module_room(&c->base, rows * (2 * c->half + 8) + 4 * wide + 4 * padded + flip + 20 * 16);
    if (r != APT_OK) return r;
    float *next = c->base.room;
    c->act = apti_carve(&next, rows * c->half);
    c->dact = apti_carve(&next, rows * c->half);
    c->u = apti_carve(&next, rows);
    c->p = apti_carve(&next, rows);
    c->m = apti_carve(&next, rows);
    c->dm = apti_carve(&next, rows);
    for (int32_t i = 0; i < 2; i++) {
        c->g[i] = apti_carve(&next, rows);
        c->dg[i] = apti_carve(&next, rows);
        c->dh[i] = apti_carve(&next, wide);
    }
    for (int32_t i = 0; i <= APTI_CONVS; i++) c->h[i] = apti_carve(&next, padded * apti_conv_channels[i]);
    c->flip = apti_carve(&next, flip);
    c->base.rows = rows;
    c->base.sequences = sequences;
    c->length = length;
    memset(c->dm, 0, (size_t)rows * sizeof(float));
    return APT_OK;
}

/* A task is a sequence. */
typedef struct apti_bk_core_job { apti_bk_core *c; float *f; const float *df; } apti_bk_core_job;

/* p and m from u. The difference of two Gumbel variables is logistic: noise = ln(U / (1 - U)), U by the position's number. */
static void apti_bk_core_mask_task(int64_t index, int32_t thread, void *arg)
{
    apti_bk_core *c = ((const apti_bk_core_job *)arg)->c;
    apti_rng rng;
    (void)thread;
    rng.key = apti_rng_seed(c->seed ^ 0x67756d62656cu, c->draw);
    for (int64_t i = index * c->length; i < (index + 1) * c->length; i++) {
        rng.counter = (uint64_t)i;
        const double chance = c->mode == APT_MASK_FIXED ? 0.5 : apti_rng_uniform(&rng) + 0.5 * APTI_2_POW_M53;
        const double p = 1 / (1 + exp(-((double)c->u[i] + log(chance / (1 - chance))) / (double)c->temperature));
        c->p[i] = (float)p;
        c->m[i] = c->mode == APT_MASK_SOFT ? c->p[i] : p > 0.5 ? 1.0f : 0.0f;
    }
}

/* h[0] = m*G between zeros */
static void apti_bk_core_gate_task(int64_t index, int32_t thread, void *arg)
{
    apti_bk_core *c = ((const apti_bk_core_job *)arg)->c;
    float *h = c->h[0] + index * (c->length + 2) * 2;
    const int64_t at = index * c->length;
    (void)thread;
    memset(h, 0, 2 * sizeof(float));
    memset(h + 2 * (c->length + 1), 0, 2 * sizeof(float));
    for (int64_t i = 0; i < c->length; i++)
        for (int32_t k = 0; k < 2; k++) h[2 * (i + 1) + k] = c->m[at + i] * c->g[k][at + i];
}

/* f = m*G + (1-m)*I */
static void apti_bk_core_mix_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bk_core_job *job = (const apti_bk_core_job *)arg;
    const apti_bk_core *c = job->c;
    const float *h = c->h[APTI_CONVS] + (index * (c->length + 2) + 1) * 2;
    const int64_t at = index * c->length;
    (void)thread;
    for (int64_t i = 0; i < c->length; i++) {
        const float m = c->m[at + i];
        for (int32_t k = 0; k < 2; k++) job->f[2 * (at + i) + k] = m * c->g[k][at + i] + (1 - m) * h[2 * i + k];
    }
}

/* dI = (1-m) df, into dh[0] between zeros */
static void apti_bk_core_mix_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bk_core_job *job = (const apti_bk_core_job *)arg;
    const apti_bk_core *c = job->c;
    float *dh = c->dh[0] + index * (c->length + 2) * 2;
    const int64_t at = index * c->length;
    (void)thread;
    memset(dh, 0, 2 * sizeof(float));
    memset(dh + 2 * (c->length + 1), 0, 2 * sizeof(float));
    for (int64_t i = 0; i < c->length; i++)
        for (int32_t k = 0; k < 2; k++) dh[2 * (i + 1) + k] = (1 - c->m[at + i]) * job->df[2 * (at + i) + k];
}

/* dG = m (df + dh), dm += df (G - I) + dh G;  dh(padded rows, 2) is the gradient of h[0]: job->f */
static void apti_bk_core_gate_backward_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bk_core_job *job = (const apti_bk_core_job *)arg;
    const apti_bk_core *c = job->c;
    const int64_t at = index * c->length, from = (index * (c->length + 2) + 1) * 2;
    (void)thread;
    for (int64_t i = 0; i < c->length; i++) {
        for (int32_t k = 0; k < 2; k++) {
            const float df = job->df[2 * (at + i) + k], dh = job->f[from + 2 * i + k], g = c->g[k][at + i];
            c->dg[k][at + i] = c->m[at + i] * (df + dh);
            c->dm[at + i] += df * (g - c->h[APTI_CONVS][from + 2 * i + k]) + dh * g;
        }
    }
}

/* du = dm p (1-p) / temperature, in the place of u */
static void apti_bk_core_logit_task(int64_t index, int32_t thread, void *arg)
{
    const apti_bk_core *c = ((const apti_bk_core_job *)arg)->c;
    (void)thread;
    for (int64_t i = index * c->length; i < (index + 1) * c->length; i++)
        c->u[i] = c->dm[i] * c->p[i] * (1 - c->p[i]) / c->temperature;
}

static void apti_bk_core_run(apti_bk_core *c, apt_task task, float *f, const float *df)
{
    apti_bk_core_job job = {c, f, df};
    apti_parallel_for(c->base.ctx, c->base.sequences, task, &job);
}

static void apti_conv_clear(const apti_bk_core *c, float *h, int32_t channels)
{
    const size_t bytes = (size_t)channels * sizeof(float);
    for (int64_t s = 0; s < c->base.sequences; s++) {
        float *first = h + s * (c->length + 2) * channels;
        memset(first, 0, bytes);
        memset(first + (c->length + 1) * channels, 0, bytes);
    }
}

static void apti_conv_forward(const apti_bk_core *c, int32_t i)
{
    const int32_t in = apti_conv_channels[i], out = apti_conv_channels[i + 1];
    apti_affine_forward(&c->base, APTI_CONV_TENSOR + 2 * i, c->h[i + 1] + out, c->h[i], in, apti_bk_core_padded(c) - 2,
                     i + 1 < APTI_CONVS ? APT_RELU : -1, NULL);
    apti_conv_clear(c, c->h[i + 1], out);
}

/* dy is the gradient of h[i+1] before its activation, dx that of h[i] (before ITS activation, if it has one). */
static void apti_conv_backward(const apti_bk_core *c, int32_t i, float *dx, const float *dy)
{
    const int32_t in = apti_conv_channels[i], out = apti_conv_channels[i + 1];
    const apti_tensor *w = &c->base.tensor[APTI_CONV_TENSOR + 2 * i];
    const int64_t rows = apti_bk_core_padded(c) - 2;
    apti_affine_backward(&c->base, APTI_CONV_TENSOR + 2 * i, dy + out, c->h[i], in, rows);
    /* y[p] = sum over t of W[t] x[p-1+t], so dx[p] = sum over t of W[2-t]^T dy[p-1+t] */
    for (int32_t t = 0; t < APTI_CONV_WIDTH; t++)
        for (int32_t o = 0; o < out; o++)
            memcpy(c->flip + (t * out + o) * in, w->value + o * w->cols + (2 - t) * in, (size_t)in * sizeof(float));
    apti_map_input(c->base.ctx, dx + in, false, dy, out, c->flip, APTI_CONV_WIDTH * out, in, rows);
    if (i > 0) apti_act_backward(c->base.ctx, dx + in, in, dx + in, in, c->h[i] + in, in, NULL, rows, in, APT_RELU);
    apti_conv_clear(c, dx, in);
}

static apt_result apti_bk_core_forward(apti_bk_core *c, float *f, const float *x, const float *v, int64_t sequences,
                                       int64_t length, int32_t mode)
{
    apt_result r = apti_bk_core_carve(c, sequences, length);
    if (r != APT_OK) return r;
    const int64_t rows = c->base.rows;
    c->mode = mode;
    apti_affine_forward(&c->base, 0, c->act, x, c->hidden, rows, APT_RELU, NULL);
    apti_affine_forward(&c->base, 2, c->u, c->act, c->half, rows, -1, NULL);
    if (!apti_finite_all(c->u, rows)) r = apti_fail(c->base.ctx, APT_E_NONFINITE,
                                                    "sparse BK-core: an importance is NaN or infinite");
    if (r == APT_OK) {
        apti_bk_core_run(c, apti_bk_core_mask_task, NULL, NULL);
        r = apt_bk_forward_threads(c->base.ctx, c->g[0], c->g[1], v, c->m, sequences, length, &c->z);
    }
    if (r != APT_OK) {
        c->base.rows = 0;
        return r;
    }
    if (mode != APT_MASK_FIXED) c->draw++;
    apti_bk_core_run(c, apti_bk_core_gate_task, NULL, NULL);
    for (int32_t i = 0; i < APTI_CONVS; i++) apti_conv_forward(c, i);
    apti_bk_core_run(c, apti_bk_core_mix_task, f, NULL);
    c->base.live = true;
    return APT_OK;
}

/* dx is written. Uses up what the forward kept. */
static apt_result apti_bk_core_backward(apti_bk_core *c, float *dx, float *dv, const float *df, const float *x, const float *v)
{
    const int64_t rows = c->base.rows;
    apti_module_spend(&c->base);
    apti_bk_core_run(c, apti_bk_core_mix_backward_task, NULL, df);
    apti_conv_backward(c, 2, c->dh[1], c->dh[0]);
    apti_conv_backward(c, 1, c->dh[0], c->dh[1]);
    apti_conv_backward(c, 0, c->dh[1], c->dh[0]);
    apti_bk_core_run(c, apti_bk_core_gate_backward_task, c->dh[1], df);
    if (dv != NULL) memset(dv, 0, (size_t)rows * sizeof(float));
    const apt_result r = apt_bk_backward_threads(c->base.ctx, dv, c->dm, NULL, c->dg[0], c->dg[1], v, c->m, c->base.sequences,
                                                 c->length, &c->z);
    if (r != APT_OK) return r;
    apti_bk_core_run(c, apti_bk_core_logit_task, NULL, NULL);
    apti_affine_backward(&c->base, 2, c->u, c->act, c->half, rows);
    apti_map_input(c->base.ctx, c->dact, false, c->u, 1, c->base.tensor[2].value, 1, c->half, rows);
    apti_act_backward(c->base.ctx, c->dact, c->half, c->dact, c->half, c->act, c->half, NULL, rows, c->half, APT_RELU);
    apti_affine_backward(&c->base, 0, c->dact, x, c->hidden, rows);
    if (dx != NULL) apti_map_input(c->base.ctx, dx, false, c->dact, c->half, c->base.tensor[0].value, c->half, c->hidden, rows);
    return APT_OK;
}

/* Sizes of a forward: positive, and so that no product of them with a row's floats can overflow. */
static apt_result apti_check_sequences(const apt_module *m, int64_t sequences, int64_t length, int32_t mode)
{
    int64_t rows;
    if (mode < APT_MASK_FIXED || mode > APT_MASK_SOFT) return apti_fail(m->ctx, APT_E_ARGUMENT, "mask mode %d is unknown",
                                                                        (int)mode);
    if (sequences >= 1 && length >= 1 && apti_mul(sequences, length, &rows) && rows <= INT32_MAX / 4) return APT_OK;
    return apti_fail(m->ctx, APT_E_RANGE, "module: %lld sequences of %lld positions", (long long)sequences, (long long)length);
}

APT_API apt_result apt_bk_core_forward(apt_module *module, float *features, const float *x, const float *v, int64_t sequences,
                                       int64_t length, int32_t mode)
{
    apti_bk_core *c = apti_bk_core_of(module);
    if (c == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_check_sequences(module, sequences, length, mode);
    if (r != APT_OK) return r;
    if (features == NULL) return apti_fail(module->ctx, APT_E_ARGUMENT, "sparse BK-core: no output");
    r = apti_module_inputs(module, x, sequences * length * c->hidden, v, sequences * length);
    return r == APT_OK ? apti_bk_core_forward(c, features, x, v, sequences, length, mode) : r;
}

APT_API apt_result apt_bk_core_backward(apt_module *module, float *dx, float *dv, const float *dfeatures, const float *x,
                                        const float *v, int64_t sequences, int64_t length)
{
    apti_bk_core *c = apti_bk_core_of(module);
    if (c == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_check_sequences(module, sequences, length, APT_MASK_FIXED);
    if (r == APT_OK) r = apti_module_behind(module, sequences, sequences * length);
    if (r == APT_OK) r = apti_module_inputs(module, x, module->rows * c->hidden, v, module->rows);
    if (r == APT_OK) r = apti_module_inputs(module, dfeatures, 2 * module->rows, v, 0);
    return r == APT_OK ? apti_bk_core_backward(c, dx, dv, dfeatures, x, v) : r;
}

/* --- the layer --- */

#define APTI_POTENTIAL_LIMIT 3.0f
#define APTI_FEATURE_LIMIT 10.0f
enum { APTI_LAYER_POTENTIAL = 0, APTI_LAYER_OUT = 2, APTI_LAYER_SCALE = 4, APTI_LAYER_TENSORS = 5 };

typedef struct apti_bk_layer {
    apt_module base;                  /* part[0]: core, part[1]: experts */
    int32_t hidden;
    float *e, *raw_v, *v;             /* (rows, hidden), (rows), (rows): experts' output, potential before and behind the clamp */
    float *raw_f, *f, *s;             /* (rows, 2), (rows, 2), (rows, hidden): features, output projection */
    float *ds, *df, *dv, *de;
} apti_bk_layer;

static apti_bk_layer *apti_bk_layer_of(const apt_module *m)
{
    return m != NULL && m->kind == APTI_MODULE_LAYER ? (apti_bk_layer *)(uintptr_t)m : NULL;
}

static apt_result apti_bk_layer_fill(apti_bk_layer *l, const apt_bk_layer_desc *desc)
{
    apt_module *m = &l->base;
    apt_moe_desc moe = desc->moe;
    apt_bk_core_desc core = APT_ZERO;
    float scale = desc->scale;
    apti_default_float(&scale, 1.0f);
    moe.seed = desc->seed;
    core.hidden = moe.hidden;
    core.temperature = desc->temperature;
    core.z = desc->z;
    core.seed = desc->seed;
    apt_result r = apti_bk_core_new(m->ctx, &core, m, &m->part[0]);
    if (r == APT_OK) r = apti_moe_new(m->ctx, &moe, m, &m->part[1]);
    if (r == APT_OK) r = apti_tensor_pair(m, "potential", 1, l->hidden, desc->seed, 0);
    if (r == APT_OK) r = apti_tensor_pair(m, "output", l->hidden, 2, desc->seed, 0);
    if (r == APT_OK) r = apti_tensor_make(m, "scale", 1, 1, desc->seed, 0, scale);
    return r;
}

APT_API apt_result apt_bk_layer_create(apt_ctx *ctx, const apt_bk_layer_desc *desc, apt_module **module)
{
    if (ctx == NULL || desc == NULL || module == NULL) return APT_E_ARGUMENT;
    if (!apti_finite(desc->scale)) return apti_fail(ctx, APT_E_NONFINITE, "BK layer: the scale is NaN or infinite");
    apt_module *m = apti_module_make(ctx, APTI_MODULE_LAYER, (int64_t)sizeof(apti_bk_layer), APTI_LAYER_TENSORS, NULL);
    if (m == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory for a BK layer");
    ((apti_bk_layer *)m)->hidden = desc->moe.hidden;
    return apti_module_done(ctx, m, apti_bk_layer_fill((apti_bk_layer *)m, desc), module);
}

APT_API apt_module *apt_bk_layer_core(apt_module *module)
{
    return apti_bk_layer_of(module) != NULL ? module->part[0] : NULL;
}

APT_API apt_module *apt_bk_layer_moe(apt_module *module)
{
    return apti_bk_layer_of(module) != NULL ? module->part[1] : NULL;
}

static apt_result apti_bk_layer_carve(apti_bk_layer *l, int64_t sequences, int64_t rows)
{
    const int64_t d = l->hidden;
    const apt_result r = apti_module_room(&l->base, rows * (4 * d + 9) + 10 * 16);
    if (r != APT_OK) return r;
    float *next = l->base.room;
    l->e = apti_carve(&next, rows * d);
    l->s = apti_carve(&next, rows * d);
    l->ds = apti_carve(&next, rows * d);
    l->de = apti_carve(&next, rows * d);
    l->raw_v = apti_carve(&next, rows);
    l->v = apti_carve(&next, rows);
    l->dv = apti_carve(&next, rows);
    l->raw_f = apti_carve(&next, 2 * rows);
    l->f = apti_carve(&next, 2 * rows);
    l->df = apti_carve(&next, 2 * rows);
    l->base.rows = rows;
    l->base.sequences = sequences;
    return APT_OK;
}

static void apti_clamp(float *y, const float *x, int64_t n, float limit)
{
    for (int64_t i = 0; i < n; i++) y[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

/* dx = 0 where the clamp held x */
static void apti_clamp_backward(float *dx, const float *x, int64_t n, float limit)
{
    for (int64_t i = 0; i < n; i++) dx[i] = x[i] > limit || x[i] < -limit ? 0 : dx[i];
}

APT_API apt_result apt_bk_layer_forward(apt_module *module, float *y, const float *x, int64_t sequences, int64_t length,
                                        int32_t mode)
{
    apti_bk_layer *l = apti_bk_layer_of(module);
    if (l == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_check_sequences(module, sequences, length, mode);
    if (r != APT_OK) return r;
    const int64_t d = l->hidden, rows = sequences * length;
    if (y == NULL) return apti_fail(module->ctx, APT_E_ARGUMENT, "BK layer: no output");
    r = apti_module_inputs(module, x, rows * d, x, 0);
    if (r == APT_OK) r = apti_bk_layer_carve(l, sequences, rows);
    if (r == APT_OK) r = apti_moe_forward(apti_moe_of(module->part[1]), l->e, x, rows);
    if (r == APT_OK) {
        apti_affine_forward(module, APTI_LAYER_POTENTIAL, l->raw_v, l->e, d, rows, -1, NULL);
        apti_clamp(l->v, l->raw_v, rows, APTI_POTENTIAL_LIMIT);
        r = apti_bk_core_forward(apti_bk_core_of(module->part[0]), l->raw_f, x, l->v, sequences, length, mode);
    }
    if (r != APT_OK) {
        module->rows = 0;
        return r;
    }
    if (mode != APT_MASK_FIXED) apti_moe_count(apti_moe_of(module->part[1]));
    apti_clamp(l->f, l->raw_f, 2 * rows, APTI_FEATURE_LIMIT);
    apti_affine_forward(module, APTI_LAYER_OUT, l->s, l->f, 2, rows, -1, NULL);
    module->ctx->kernels->scale(y, l->s, module->tensor[APTI_LAYER_SCALE].value[0], rows * d);
    module->ctx->kernels->add(y, y, l->e, rows * d);
    module->live = true;
    return APT_OK;
}

APT_API apt_result apt_bk_layer_backward(apt_module *module, float *dx, const float *dy, const float *x, int64_t sequences,
                                         int64_t length)
{
    apti_bk_layer *l = apti_bk_layer_of(module);
    if (l == NULL) return APT_E_ARGUMENT;
    apt_result r = apti_check_sequences(module, sequences, length, APT_MASK_FIXED);
    if (r == APT_OK) r = apti_module_behind(module, sequences, sequences * length);
    const int64_t d = l->hidden, rows = module->rows;
    if (r == APT_OK) r = apti_module_inputs(module, x, rows * d, dy, rows * d);
    if (r != APT_OK) return r;
    const apti_tensor *scale = &module->tensor[APTI_LAYER_SCALE], *out = &module->tensor[APTI_LAYER_OUT];
    const apti_tensor *potential = &module->tensor[APTI_LAYER_POTENTIAL];
    const apti_kernels *kernels = module->ctx->kernels;
    apti_module_spend(module);
    scale->grad[0] += (float)apti_ops_dot(kernels, dy, l->s, rows * d);
    kernels->scale(l->ds, dy, scale->value[0], rows * d);
    apti_affine_backward(module, APTI_LAYER_OUT, l->ds, l->f, 2, rows);
    apti_map_input(module->ctx, l->df, false, l->ds, d, out->value, d, 2, rows);
    apti_clamp_backward(l->df, l->raw_f, 2 * rows, APTI_FEATURE_LIMIT);
    r = apti_bk_core_backward(apti_bk_core_of(module->part[0]), dx, l->dv, l->df, x, l->v);
    if (r != APT_OK) return r;
    apti_clamp_backward(l->dv, l->raw_v, rows, APTI_POTENTIAL_LIMIT);
    apti_affine_backward(module, APTI_LAYER_POTENTIAL, l->dv, l->e, d, rows);
    memcpy(l->de, dy, (size_t)(rows * d) * sizeof(float));
    apti_map_input(module->ctx, l->de, true, l->dv, 1, potential->value, 1, d, rows);
    apti_moe_backward(apti_moe_of(module->part[1]), dx, true, l->de, x);
    return APT_OK;
}

/* --- what both share: the mask's losses and statistics --- */

/* The sparse BK-core of a module, or NULL */
static apti_bk_core *apti_bk_core_in(const apt_module *m)
{
    return apti_bk_layer_of(m) != NULL ? apti_bk_core_of(m->part[0]) : apti_bk_core_of(m);
}

APT_API apt_result apt_module_sparsity_loss(apt_module *module, double *loss, int32_t kind, float target, float grad_scale)
{
    apti_bk_core *c = apti_bk_core_in(module);
    if (c == NULL) return APT_E_ARGUMENT;
    if (!module->live) return apti_fail(module->ctx, APT_E_STATE, "a sparsity loss belongs between forward and backward");
    const apt_result r = apt_sparsity_loss(loss, c->dm, c->m, c->base.rows, kind, target, grad_scale);
    if (r == APT_OK) return r;
    if (loss == NULL) return apti_fail(module->ctx, r, "sparsity loss: no place for the loss");
    if (apt_sparsity_kind_name(kind) != NULL)
        return apti_fail(module->ctx, r, "sparsity loss: the target %g must be in 0..1, the gradient's scale %g finite",
                         (double)target, (double)grad_scale);
    char kinds[64] = "";
    apti_append_kinds(kinds, sizeof kinds, apt_sparsity_kind_name);
    return apti_fail(module->ctx, r, "sparsity loss: there is no kind %d; supported, from 0 on: %s", (int)kind, kinds);
}

APT_API apt_result apt_module_balanced_loss(apt_module *module, apt_balanced *out, int32_t kind, float target, double accuracy,
                                            double accuracy_weight, double sparsity_weight)
{
    apt_balanced checked;
    double loss;
    if (apti_bk_core_in(module) == NULL || out == NULL) return APT_E_ARGUMENT;
    apt_result r = apt_balanced_loss(&checked, accuracy, 0, accuracy_weight, sparsity_weight);
    if (r != APT_OK) return apti_fail(module->ctx, r, "balanced loss: weights must be 0 or more, everything finite");
    r = apt_module_sparsity_loss(module, &loss, kind, target, (float)sparsity_weight);
    return r == APT_OK ? apt_balanced_loss(out, accuracy, loss, accuracy_weight, sparsity_weight) : r;
}

APT_API apt_result apt_module_temperature(apt_module *module, float temperature)
{
    apti_bk_core *c = apti_bk_core_in(module);
    if (c == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_check_temperature(module->ctx, temperature);
    if (r == APT_OK) c->temperature = temperature;
    return r;
}

static int64_t apti_count_beyond(const float *x, int64_t n, float limit)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += x[i] > limit || x[i] < -limit;
    return count;
}

APT_API apt_result apt_module_stats(const apt_module *module, apt_bk_stats *stats)
{
    const apti_bk_core *c = apti_bk_core_in(module);
    const apti_bk_layer *l = apti_bk_layer_of(module);
    if (c == NULL || stats == NULL) return APT_E_ARGUMENT;
    if (module->rows == 0 || c->base.rows == 0) return apti_fail(module->ctx, APT_E_STATE,
                                                                 "statistics need a forward before them");
    memset(stats, 0, sizeof *stats);
    stats->positions = c->base.rows;
    stats->least = 1;
    for (int64_t s = 0; s < c->base.sequences; s++) {
        int64_t masked = 0;
        for (int64_t i = s * c->length; i < (s + 1) * c->length; i++) masked += c->m[i] < 0.5f;
        const double share = (double)masked / (double)c->length;
        stats->masked += masked;
        if (share < stats->least) stats->least = share;
        if (share > stats->most) stats->most = share;
    }
    stats->sparsity = (double)stats->masked / (double)stats->positions;
    stats->probability = apti_sum(c->p, c->base.rows) / (double)stats->positions;
    if (l == NULL) return APT_OK;
    stats->potential_clamped = apti_count_beyond(l->raw_v, c->base.rows, APTI_POTENTIAL_LIMIT);
    stats->features_clamped = apti_count_beyond(l->raw_f, 2 * c->base.rows, APTI_FEATURE_LIMIT);
    stats->experts = apti_moe_of(module->part[1])->experts;
    return APT_OK;
}

APT_API apt_result apt_module_mask(const apt_module *module, float *mask, int64_t rows)
{
    const apti_bk_core *c = apti_bk_core_in(module);
    if (c == NULL || mask == NULL) return APT_E_ARGUMENT;
    if (c->base.rows == 0) return apti_fail(module->ctx, APT_E_STATE, "a mask needs a forward before it");
    if (rows != c->base.rows)
        return apti_fail(module->ctx, APT_E_SHAPE, "the mask has %lld values, not %lld", (long long)c->base.rows,
                         (long long)rows);
    memcpy(mask, c->m, (size_t)rows * sizeof(float));
    return APT_OK;
}

/* --- saved modules ---

   magic, length of all, three heads (the module and its two parts), the history of experts, then each tensor's values,
   gradients and moments, and the check sum. */

#define APTI_MODULE_MAGIC 0x31444f4d54504154u                    /* "TAPTMOD1" */
enum { APTI_MODULE_PARTS = 3, APTI_EVENT_BYTES = 32, APTI_HEAD_BYTES = 60 + 8 * APTI_EXPERTS };

/* What a part holds besides its tensors. kind 0: there is no such part. */
typedef struct apti_module_head {
    int32_t kind, hidden, neurons, experts, top_k, events;
    uint64_t there, seed, draw;
    float temperature, re, im;
    int64_t count[APTI_EXPERTS];
} apti_module_head;

static apt_module *apti_module_part(const apt_module *m, int32_t index)
{
    return index == 0 ? (apt_module *)(uintptr_t)m : m->part[index - 1];
}

static void apti_module_describe(apti_module_head *head, const apt_module *m)
{
    memset(head, 0, sizeof *head);
    if (m == NULL) return;
    const apti_moe *moe = apti_moe_of(m);
    const apti_bk_core *c = apti_bk_core_of(m);
    const apti_bk_layer *l = apti_bk_layer_of(m);
    head->kind = (int32_t)m->kind;
    if (l != NULL) head->hidden = l->hidden;
    if (c != NULL) {
        head->hidden = c->hidden;
        head->seed = c->seed;
        head->draw = c->draw;
        head->temperature = c->temperature;
        head->re = c->z.re;
        head->im = c->z.im;
    }
    if (moe == NULL) return;
    head->hidden = moe->hidden;
    head->neurons = moe->neurons;
    head->experts = moe->experts;
    head->top_k = moe->top_k;
    head->events = moe->events;
    head->there = moe->there;
    memcpy(head->count, moe->count, sizeof head->count);
}

static void apti_head_fields(apti_field_cursor *c, apti_module_head *head)
{
    apti_field_i32(c, &head->kind);
    apti_field_i32(c, &head->hidden);
    apti_field_i32(c, &head->neurons);
    apti_field_i32(c, &head->experts);
    apti_field_i32(c, &head->top_k);
    apti_field_i32(c, &head->events);
    apti_field_bits(c, &head->there, 8);
    apti_field_bits(c, &head->seed, 8);
    apti_field_bits(c, &head->draw, 8);
    apti_field_f32(c, &head->temperature);
    apti_field_f32(c, &head->re);
    apti_field_f32(c, &head->im);
    for (int32_t e = 0; e < APTI_EXPERTS; e++) apti_field_i64(c, &head->count[e]);
}

static void apti_event_fields(apti_field_cursor *c, apt_expert_event *event)
{
    apti_field_i64(c, &event->step);
    apti_field_i32(c, &event->before);
    apti_field_i32(c, &event->after);
    apti_field_f64(c, &event->least_share);
    apti_field_f64(c, &event->lost_share);
}

static void apti_tensor_fields(apti_field_cursor *c, const apti_tensor *t)
{
    float *const all[4] = {t->value, t->grad, t->moment1, t->moment2};
    for (int32_t i = 0; i < 4; i++)
        for (int64_t k = 0; k < t->rows * t->cols; k++) apti_field_f32(c, &all[i][k]);
}

APT_API int64_t apt_module_bytes(const apt_module *module)
{
    if (module == NULL) return -1;
    int64_t bytes = 16 + APTI_MODULE_PARTS * APTI_HEAD_BYTES + 8;
    for (int32_t i = 0; i < APTI_MODULE_PARTS; i++) bytes += apt_moe_events(apti_module_part(module, i)) * APTI_EVENT_BYTES;
    return bytes + 4 * (int64_t)sizeof(float) * apt_module_parameters(module);
}

APT_API apt_result apt_module_save(const apt_module *module, void *out, size_t bytes)
{
    if (module == NULL || out == NULL) return APT_E_ARGUMENT;
    uint64_t magic = APTI_MODULE_MAGIC, length = (uint64_t)apt_module_bytes(module);
    if (bytes < length) return apti_fail(module->ctx, APT_E_SCRATCH, "the saved module has %lld bytes, not %lld",
                                         (long long)length, (long long)bytes);
    apti_field_cursor c = {(uint8_t *)out, NULL, 0};
    apti_field_bits(&c, &magic, 8);
    apti_field_bits(&c, &length, 8);
    for (int32_t i = 0; i < APTI_MODULE_PARTS; i++) {
        apti_module_head head;
        apti_module_describe(&head, apti_module_part(module, i));
        apti_head_fields(&c, &head);
    }
    for (int32_t i = 0; i < APTI_MODULE_PARTS; i++) {
        const apt_module *part = apti_module_part(module, i);
        for (int32_t k = 0; k < apt_moe_events(part); k++) apti_event_fields(&c, (apt_expert_event *)part->more + k);
    }
    for (int32_t i = 0; i < apt_module_tensors(module); i++) apti_tensor_fields(&c, apti_module_tensor(module, i));
    uint64_t sum = apti_checksum(0, out, c.at);
    apti_field_bits(&c, &sum, 8);
    return APT_OK;
}

/* Could a part of this shape have been saved like that? *less: bytes that it saves less than the part would now, by removed
   experts and a shorter history. */
static bool apti_head_fits(const apti_module_head *head, const apt_module *part, int64_t *less)
{
    apti_module_head now;
    apti_module_describe(&now, part);
    if (head->kind != now.kind || head->hidden != now.hidden || head->neurons != now.neurons) return false;
    if (head->seed != now.seed) return false;
    if (apti_bits(head->re) != apti_bits(now.re) || apti_bits(head->im) != apti_bits(now.im)) return false;
    if (now.kind == APTI_MODULE_CORE && !apti_temperature_fits(head->temperature)) return false;
    if (now.kind != APTI_MODULE_MOE) return head->events == 0;
    int32_t experts = 0;
    for (int32_t i = 0; i < APTI_EXPERTS; i++) {
        experts += (int32_t)(head->there >> i & 1);
        if (head->count[i] < 0 || head->count[i] > INT64_MAX / APTI_EXPERTS) return false;
    }
    if ((head->there & ~now.there) != 0 || experts < 1 || experts != head->experts || head->events < 0) return false;
    if (head->top_k != (now.top_k < experts ? now.top_k : experts)) return false;
    const int64_t d = now.hidden, f = now.neurons, expert = 2 * d * f + f + d + d;       /* the last d: its row of the gate */
    *less += 4 * (int64_t)sizeof(float) * expert * (now.experts - experts);
    *less += APTI_EVENT_BYTES * ((int64_t)now.events - head->events);
    return true;
}

/* Removes what the saved experts have not, and takes over counts and history. */
static void apti_moe_restore(apti_moe *moe, const apti_module_head *head, apt_expert_event *list)
{
    bool keep[APTI_EXPERTS] = {0};
    int32_t e = 0;
    for (int32_t i = 0; i < APTI_EXPERTS; i++)
        if ((moe->there >> i & 1) != 0) keep[e++] = (head->there >> i & 1) != 0;
    apti_moe_remove(moe, keep);
    memcpy(moe->count, head->count, sizeof moe->count);
    moe->events = head->events;
    apti_free(moe->base.ctx, moe->base.more);
    moe->base.more = list;
}

/* Magic, length and check sum. The heads begin at byte 16. */
static apt_result apti_module_opened(const apt_module *m, const void *in, size_t bytes)
{
    uint64_t magic = 0, length = 0, sum = 0;
    apti_field_cursor c = {NULL, (const uint8_t *)in, 0};
    if (bytes >= 16 + APTI_MODULE_PARTS * APTI_HEAD_BYTES + 8) {
        apti_field_bits(&c, &magic, 8);
        apti_field_bits(&c, &length, 8);
    }
    if (magic != APTI_MODULE_MAGIC || length != bytes)
        return apti_fail(m->ctx, APT_E_FORMAT, "these %lld bytes are not a saved module, or not all of one", (long long)bytes);
    c.at = bytes - 8;
    apti_field_bits(&c, &sum, 8);
    if (sum != apti_checksum(0, in, bytes - 8)) return apti_fail(m->ctx, APT_E_CHECKSUM, "the saved module is damaged");
    return APT_OK;
}

APT_API apt_result apt_module_restore(apt_module *module, const void *in, size_t bytes)
{
    if (module == NULL || in == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_module_opened(module, in, bytes);
    if (r != APT_OK) return r;
    apti_module_head head[APTI_MODULE_PARTS];
    apti_field_cursor c = {NULL, (const uint8_t *)in, 16};
    int64_t less = 0;
    int32_t events = 0;
    bool fits = true;
    for (int32_t i = 0; i < APTI_MODULE_PARTS; i++) {
        apti_head_fields(&c, &head[i]);
        fits = fits && apti_head_fits(&head[i], apti_module_part(module, i), &less);
        if (head[i].kind == APTI_MODULE_MOE) events = head[i].events;
    }
    if (!fits || apt_module_bytes(module) - less != (int64_t)bytes)
        return apti_fail(module->ctx, APT_E_SHAPE,
                         "the saved module was made from another desc, or has experts that are removed here");
    apt_expert_event *list = NULL;
    if (events > 0) list = (apt_expert_event *)apti_alloc(module->ctx, events, (int64_t)sizeof *list);
    if (events > 0 && list == NULL) return apti_fail(module->ctx, APT_E_MEMORY, "no memory for the history of experts");
    for (int32_t k = 0; k < events; k++) apti_event_fields(&c, &list[k]);
    apti_module_spend(module);
    for (int32_t i = 0; i < APTI_MODULE_PARTS; i++) {
        apt_module *part = apti_module_part(module, i);
        apti_bk_core *core = apti_bk_core_of(part);
        if (part != NULL) apti_module_spend(part);
        if (core != NULL) {
            core->temperature = head[i].temperature;
            core->draw = head[i].draw;
        }
        if (apti_moe_of(part) != NULL) apti_moe_restore(apti_moe_of(part), &head[i], list);
    }
    for (int32_t i = 0; i < apt_module_tensors(module); i++) apti_tensor_fields(&c, apti_module_tensor(module, i));
    return APT_OK;
}
#endif /* APT_ONLY_CORE */
#ifndef APT_ONLY_CORE
// >>model
/* ---------------------------------------------------------------------------------------------------------------------
   A model is a table of named parameters, a description of one transformer block, and the shapes of every layer.
   Each axis of a parameter says which prunable dimension it follows; compaction is one gather over that table.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apti_pass apti_pass;
static void apti_pass_free(apt_ctx *ctx, apti_pass *pass);
static void apti_bitmasks_free(apt_model *model);

/* Which dimension the rows or the columns of a parameter follow. */
typedef enum apti_axis {
    APTI_AXIS_FIXED = 0,
    APTI_AXIS_HIDDEN,
    APTI_AXIS_HEAD,
    APTI_AXIS_KV,
    APTI_AXIS_NEURON,
    APTI_AXIS_RANK
} apti_axis;

typedef struct apti_param {
    char name[112];                   /* Hugging Face name; adapters "lora_A.NAME" */
    int32_t dims;                     /* 1 or 2; a vector has rows = 1 */
    int32_t layer;                    /* -1: outside the layers */
    int64_t rows, cols;
    apti_axis row_axis, col_axis;
    bool linear;                      /* multiplied from packed panels; `value` exists only while it is trained */
    bool narrow;                      /* may be stored in fewer bits while frozen */
    bool optional_in_file;            /* task heads: seeded when a checkpoint lacks them */
    bool trainable;
    float init;                       /* 0 and 1: that constant; negative: N(0, -init) */
    float *value;                     /* rows*cols row-major, or NULL */
    int32_t *columns;                 /* NULL, or: `value` is a frozen table of `stride` columns that a wider teacher has too, */
    int64_t stride;                   /* and columns[0..cols) of them are this parameter's. Embeddings only */
    apti_packed packed;               /* linear only */
    apt_sparse sparse;                /* a compressed copy for long batches (apt_model_compress); start is NULL: none */
    float *grad, *moment1, *moment2;  /* trainable only */
} apti_param;

/* The linear maps of a block; weight slot 2*i, bias slot 2*i + 1. */
typedef enum apti_linear_id {
    APTI_QUERY = 0,
    APTI_KEY,
    APTI_VALUE,
    APTI_OUTPUT,
    APTI_UP,
    APTI_DOWN,
    APTI_GATE,                        /* gated FFN: the second input map */
    APTI_LINEARS
} apti_linear_id;
enum { APTI_NORM1_W = 2 * APTI_LINEARS, APTI_NORM1_B, APTI_NORM2_W, APTI_NORM2_B, APTI_LAYER_SLOTS };
/* What stands outside the layers and the task head; the last two are one per stack. */
enum {
    APTI_WORD = 0,
    APTI_POSITION,
    APTI_TYPE,
    APTI_EMBED_NORM_W,
    APTI_EMBED_NORM_B,
    APTI_RELATIVE,
    APTI_FINAL_NORM = APTI_RELATIVE + 2,
    APTI_EMBED_SLOTS = APTI_FINAL_NORM + 2
};
enum {
    APTI_HEAD_DENSE_W = 0,
    APTI_HEAD_DENSE_B,
    APTI_HEAD_NORM_W,
    APTI_HEAD_NORM_B,
    APTI_HEAD_OUT_W,
    APTI_HEAD_OUT_B,
    APTI_HEAD_SLOTS
};

typedef struct apti_layer {
    apti_param *slot[APTI_LAYER_SLOTS];                           /* NULL: this layer has no such thing */
    apti_param *lora_a[APTI_LINEARS], *lora_b[APTI_LINEARS];      /* never NULL; rows (ranks) may be 0: no adapter */
} apti_layer;

typedef struct apti_design apti_design;

struct apt_model {
    apt_ctx *ctx;
    apt_model *next;                  /* in ctx->models */
    apt_trainer *trainer;             /* the trainer at work on it, or NULL */
    const apti_design *block;          /* of config.family */
    apt_config config;                /* present shapes; config.layer == shape, config.bias_head == bias_head */
    apt_layer_shape *shape;           /* [layers] */
    int32_t *bias_head;               /* [layers * bias_heads], relative positions only */
    int64_t prunable_dense;
    uint64_t structure;               /* counts structural changes: merge, compaction, growth */
    apt_dtype weights;                /* storage of frozen linear weights inside the layers */
    float scale;                      /* s of every adapter */
    apti_param *params;
    int32_t param_count;
    apti_param *none;                 /* 0 x 0, behind the counted ones: adapters of linear maps that a layer does not have */
    apti_param *embed[APTI_EMBED_SLOTS], *head[APTI_HEAD_SLOTS];  /* slots that the family or the task lacks are NULL */
    apti_param *head_a, *head_b;      /* adapter of the LM head, as in apti_layer */
    apti_layer *layers;
    float *masks;                     /* [units], or NULL: all 1. Order: apt_units */
    uint64_t **bitmask;               /* masks of single weights: [param_count], or NULL: none. An entry is NULL: all stay */
    apti_pass *pass;                  /* buffers of apt_model_forward, kept between calls */
};

/* ------------------------------------------------------------------------------------------------ names and layout */

typedef enum apti_when { APTI_ALWAYS = 0, APTI_IF_GATED, APTI_IF_PLAIN, APTI_IF_BIAS } apti_when;

/* One row per parameter of a layer: where it lives, how the file calls it, what its axes follow, which models have it. */
typedef struct apti_param_row {
    int32_t slot;
    const char *suffix;
    int32_t dims;
    apti_axis row_axis, col_axis;
    float init;
    apti_when when;
} apti_param_row;

#define APTI_INIT_NORMAL (-1.0f)      /* N(0, init_range) */
#define APTI_INIT_FAN (-2.0f)         /* N(0, init_range / sqrt(inputs)), */
#define APTI_INIT_QUERY (-3.0f)       /* the same with inputs * head size: T5 has no such factor in its attention */
static const apti_param_row apti_encoder_attention_rows[] = {
    {2 * APTI_QUERY, "attention.self.query.weight", 2, APTI_AXIS_HEAD, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_QUERY + 1, "attention.self.query.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HEAD, 0, APTI_ALWAYS},
    {2 * APTI_KEY, "attention.self.key.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_KEY + 1, "attention.self.key.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_KV, 0, APTI_ALWAYS},
    {2 * APTI_VALUE, "attention.self.value.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_VALUE + 1, "attention.self.value.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_KV, 0, APTI_ALWAYS},
    {2 * APTI_OUTPUT, "attention.output.dense.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HEAD, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_OUTPUT + 1, "attention.output.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_NORM1_W, "attention.output.LayerNorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_NORM1_B, "attention.output.LayerNorm.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
};
static const apti_param_row apti_encoder_ffn_rows[] = {
    {2 * APTI_UP, "intermediate.dense.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_UP + 1, "intermediate.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_NEURON, 0, APTI_ALWAYS},
    {2 * APTI_DOWN, "output.dense.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_NEURON, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_DOWN + 1, "output.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_NORM2_W, "output.LayerNorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_NORM2_B, "output.LayerNorm.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
};

static const apti_param_row apti_encoder_embed_rows[] = {
    {APTI_WORD, "embeddings.word_embeddings.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_POSITION, "embeddings.position_embeddings.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_TYPE, "embeddings.token_type_embeddings.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_EMBED_NORM_W, "embeddings.LayerNorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_EMBED_NORM_B, "embeddings.LayerNorm.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
};

/* Task heads carry full names. The pooler's outputs are not prunable units (FIXED); the MLM transform feeds the tied decoder. */
static const apti_param_row apti_bert_classify_rows[] = {
    {APTI_HEAD_DENSE_W, "bert.pooler.dense.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_DENSE_B, "bert.pooler.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
    {APTI_HEAD_OUT_W, "classifier.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_FIXED, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_OUT_B, "classifier.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
};
static const apti_param_row apti_roberta_classify_rows[] = {
    {APTI_HEAD_DENSE_W, "classifier.dense.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_DENSE_B, "classifier.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
    {APTI_HEAD_OUT_W, "classifier.out_proj.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_FIXED, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_OUT_B, "classifier.out_proj.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
};
static const apti_param_row apti_span_rows[] = {
    {APTI_HEAD_OUT_W, "qa_outputs.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_OUT_B, "qa_outputs.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
};
static const apti_param_row apti_bert_mlm_rows[] = {
    {APTI_HEAD_DENSE_W, "cls.predictions.transform.dense.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL,
     APTI_ALWAYS},
    {APTI_HEAD_DENSE_B, "cls.predictions.transform.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_HEAD_NORM_W, "cls.predictions.transform.LayerNorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_HEAD_NORM_B, "cls.predictions.transform.LayerNorm.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_HEAD_OUT_B, "cls.predictions.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
};
static const apti_param_row apti_roberta_mlm_rows[] = {
    {APTI_HEAD_DENSE_W, "lm_head.dense.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_HEAD_DENSE_B, "lm_head.dense.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_HEAD_NORM_W, "lm_head.layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_HEAD_NORM_B, "lm_head.layer_norm.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 0, APTI_ALWAYS},
    {APTI_HEAD_OUT_B, "lm_head.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_FIXED, 0, APTI_ALWAYS},
};

static const apti_param_row apti_t5_attention_rows[] = {
    {2 * APTI_QUERY, "SelfAttention.q.weight", 2, APTI_AXIS_HEAD, APTI_AXIS_HIDDEN, APTI_INIT_QUERY, APTI_ALWAYS},
    {2 * APTI_KEY, "SelfAttention.k.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_ALWAYS},
    {2 * APTI_VALUE, "SelfAttention.v.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_ALWAYS},
    {2 * APTI_OUTPUT, "SelfAttention.o.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HEAD, APTI_INIT_FAN, APTI_ALWAYS},
    {APTI_NORM1_W, "layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_t5_cross_rows[] = {
    {2 * APTI_QUERY, "EncDecAttention.q.weight", 2, APTI_AXIS_HEAD, APTI_AXIS_HIDDEN, APTI_INIT_QUERY, APTI_ALWAYS},
    {2 * APTI_KEY, "EncDecAttention.k.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_ALWAYS},
    {2 * APTI_VALUE, "EncDecAttention.v.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_ALWAYS},
    {2 * APTI_OUTPUT, "EncDecAttention.o.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HEAD, APTI_INIT_FAN, APTI_ALWAYS},
    {APTI_NORM1_W, "layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_t5_ffn_rows[] = {
    {2 * APTI_UP, "DenseReluDense.wi.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_IF_PLAIN},
    {2 * APTI_UP, "DenseReluDense.wi_0.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_IF_GATED},
    {2 * APTI_GATE, "DenseReluDense.wi_1.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_FAN, APTI_IF_GATED},
    {2 * APTI_DOWN, "DenseReluDense.wo.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_NEURON, APTI_INIT_FAN, APTI_ALWAYS},
    {APTI_NORM2_W, "layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_t5_embed_rows[] = {
    {APTI_WORD, "shared.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_RELATIVE, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2, APTI_AXIS_FIXED,
     APTI_AXIS_FIXED, APTI_INIT_FAN, APTI_ALWAYS},
    {APTI_RELATIVE + 1, "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2, APTI_AXIS_FIXED,
     APTI_AXIS_FIXED, APTI_INIT_FAN, APTI_ALWAYS},
    {APTI_FINAL_NORM, "encoder.final_layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
    {APTI_FINAL_NORM + 1, "decoder.final_layer_norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};

static const apti_param_row apti_llama_attention_rows[] = {
    {2 * APTI_QUERY, "self_attn.q_proj.weight", 2, APTI_AXIS_HEAD, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_QUERY + 1, "self_attn.q_proj.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_HEAD, 0, APTI_IF_BIAS},
    {2 * APTI_KEY, "self_attn.k_proj.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_KEY + 1, "self_attn.k_proj.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_KV, 0, APTI_IF_BIAS},
    {2 * APTI_VALUE, "self_attn.v_proj.weight", 2, APTI_AXIS_KV, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_VALUE + 1, "self_attn.v_proj.bias", 1, APTI_AXIS_FIXED, APTI_AXIS_KV, 0, APTI_IF_BIAS},
    {2 * APTI_OUTPUT, "self_attn.o_proj.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_HEAD, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_NORM1_W, "input_layernorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_llama_ffn_rows[] = {
    {2 * APTI_GATE, "mlp.gate_proj.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_UP, "mlp.up_proj.weight", 2, APTI_AXIS_NEURON, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {2 * APTI_DOWN, "mlp.down_proj.weight", 2, APTI_AXIS_HIDDEN, APTI_AXIS_NEURON, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_NORM2_W, "post_attention_layernorm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_llama_embed_rows[] = {
    {APTI_WORD, "embed_tokens.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
    {APTI_FINAL_NORM, "norm.weight", 1, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, 1, APTI_ALWAYS},
};
static const apti_param_row apti_lm_rows[] = {             /* without rows while the word embeddings are the head */
    {APTI_HEAD_OUT_W, "lm_head.weight", 2, APTI_AXIS_FIXED, APTI_AXIS_HIDDEN, APTI_INIT_NORMAL, APTI_ALWAYS},
};

typedef struct apti_rows { const apti_param_row *row; int32_t count; } apti_rows;
#define APTI_ROWS(table) (int32_t)(sizeof(table) / sizeof((table)[0]))

static apti_rows apti_head_rows(const apt_config *c)
{
    apti_rows r = {NULL, 0};
    const bool bert = c->family == APT_BERT;
    if (c->task == APT_TASK_CLASSIFY || c->task == APT_TASK_REGRESS) {
        r.row = bert ? apti_bert_classify_rows : apti_roberta_classify_rows;
        r.count = APTI_ROWS(apti_bert_classify_rows);
    } else if (c->task == APT_TASK_SPAN) {
        r.row = apti_span_rows;
        r.count = APTI_ROWS(apti_span_rows);
    } else if (c->task == APT_TASK_MLM) {
        r.row = bert ? apti_bert_mlm_rows : apti_roberta_mlm_rows;
        r.count = APTI_ROWS(apti_bert_mlm_rows);
    } else if (c->task == APT_TASK_LM) {
        r.row = apti_lm_rows;
        r.count = APTI_ROWS(apti_lm_rows);
    }
    return r;
}

/* ------------------------------------------------------------------------------------------------ families

   A family is one row of apti_designs: what its block computes and how its files call the weights. Everything below reads
   the row; nothing asks for a family by name except the file section, which reads each family's config.json, and the
   defaults. To add a decoder family:

   1. An enumerator of apt_family in front, and a row here. A block that differs from LLaMA's in names only needs a name
      table (or shares LLaMA's: Mistral, Qwen2 do); one with biases on query, key and value sets apt_config.qkv_bias.
   2. If it computes something new (another norm, say), a field of apti_design, the op with its backward in section ops,
      and the one place in the sublayers below that reads the field.
   3. In section files: its model_type in apti_config_family, its keys in a function like apti_config_llama (refuse every
      key that would change the numbers and is not computed here), and the same keys in apti_config_put.
   4. A golden case in tests/golden with its name in tests/test_model.c.

   Pruning, adapters, distillation, merging, checkpoints and generation follow from the tables. */
struct apti_design {
    const char *prefix;                          /* of every name inside the base model */
    const char *stem[2];                         /* of a layer's names up to its number: first stack, decoder behind an encoder */
    apti_rows embed, attention, cross, ffn;
    bool numbered;                               /* names count a layer's sublayers: "layer.0." attention, "layer.1." ... */
    bool pre_norm;                               /* x + f(norm(x)) with a norm behind the stack; else norm(x + f(x)) */
    bool rms;                                    /* RMSNorm, no shift */
    bool rotary, relative;                       /* positions; neither: embedded ones */
    bool causal;                                 /* the first stack (a decoder behind an encoder always is) */
    bool unscaled;                               /* attention without 1/sqrt(head_dim) */
    bool gate_acts;                              /* gated FFN: act(GATE) * UP; else act(UP) * GATE */
};

#define APTI_TABLE_ROWS(table) {table, APTI_ROWS(table)}
#define APTI_NO_ROWS {NULL, 0}
static const apti_design apti_designs[] = {
    {"bert.", {"encoder.layer.", NULL}, APTI_TABLE_ROWS(apti_encoder_embed_rows), APTI_TABLE_ROWS(apti_encoder_attention_rows),
     APTI_NO_ROWS, APTI_TABLE_ROWS(apti_encoder_ffn_rows), false, false, false, false, false, false, false, false},
    {"roberta.", {"encoder.layer.", NULL}, APTI_TABLE_ROWS(apti_encoder_embed_rows), APTI_TABLE_ROWS(apti_encoder_attention_rows),
     APTI_NO_ROWS, APTI_TABLE_ROWS(apti_encoder_ffn_rows), false, false, false, false, false, false, false, false},
    {"", {"encoder.block.", "decoder.block."}, APTI_TABLE_ROWS(apti_t5_embed_rows), APTI_TABLE_ROWS(apti_t5_attention_rows),
     APTI_TABLE_ROWS(apti_t5_cross_rows), APTI_TABLE_ROWS(apti_t5_ffn_rows), true, true, true, false, true, false, true, false},
    {"model.", {"layers.", NULL}, APTI_TABLE_ROWS(apti_llama_embed_rows), APTI_TABLE_ROWS(apti_llama_attention_rows),
     APTI_NO_ROWS, APTI_TABLE_ROWS(apti_llama_ffn_rows), false, true, true, true, false, true, false, true},
};

/* An unknown family is refused by apti_config_check before anything reads its block. */
static const apti_design *apti_design_of(apt_family family)
{
    const bool known = family >= APT_BERT && family <= APT_LLAMA;
    return &apti_designs[known ? family - APT_BERT : 0];
}

static bool apti_row_applies(const apti_param_row *row, const apt_config *c)
{
    switch (row->when) {
    case APTI_IF_GATED: return c->gated != 0;
    case APTI_IF_PLAIN: return c->gated == 0;
    case APTI_IF_BIAS: return c->qkv_bias != 0;
    case APTI_ALWAYS: default: return true;
    }
}

/* Layers of the encoder when there is a decoder behind it, else all. */
static int32_t apti_first_stack(const apt_config *c)
{
    const int64_t n = (int64_t)c->layers - 2 * (int64_t)c->decoder_layers;
    return (int32_t)apti_max_i64(0, apti_min_i64(n, c->layers));
}

/* In a decoder behind an encoder self attention (no FFN) and cross attention take turns. */
static bool apti_is_cross(const apt_config *c, int32_t l)
{
    return l >= apti_first_stack(c) && (l - apti_first_stack(c)) % 2 == 1;
}

static bool apti_has_ffn(const apt_config *c, int32_t l)
{
    return l < apti_first_stack(c) || apti_is_cross(c, l);
}

/* Input maps and the output map of an FFN. */
static int64_t apti_ffn_matrices(const apt_config *c)
{
    return c->gated ? 3 : 2;
}

/* Output width of the task head. */
static int64_t apti_head_width(const apt_config *c)
{
    switch (c->task) {
    case APT_TASK_CLASSIFY: return c->labels;
    case APT_TASK_SPAN: return 2;
    case APT_TASK_MLM: case APT_TASK_LM: return c->vocab;
    case APT_TASK_REGRESS: case APT_TASK_NONE: default: return 1;
    }
}

/* Length of an axis in the present shapes. FIXED has none: the caller knows it. */
static int64_t apti_axis_size(const apt_config *c, const apt_layer_shape *shape, apti_axis axis)
{
    switch (axis) {
    case APTI_AXIS_HIDDEN: return c->hidden;
    case APTI_AXIS_HEAD: return (int64_t)shape->heads * c->head_dim;
    case APTI_AXIS_KV: return (int64_t)shape->kv_heads * c->head_dim;
    case APTI_AXIS_NEURON: return shape->neurons;
    case APTI_AXIS_FIXED: case APTI_AXIS_RANK: default: return 0;
    }
}

static int64_t apti_fixed_embed_rows(const apt_config *c, int32_t slot)
{
    switch (slot) {
    case APTI_WORD: return c->vocab;
    case APTI_POSITION: return c->positions;
    case APTI_TYPE: return c->types;
    case APTI_RELATIVE: case APTI_RELATIVE + 1: return c->buckets;
    default: return 1;
    }
}

/* The word embeddings are the LM head. */
static bool apti_is_tied(const apt_config *c)
{
    return c->task == APT_TASK_LM && !c->untied;
}

/* FIXED lengths inside task heads: the dense layer keeps the dense hidden size, the output its width. */
static int64_t apti_fixed_head_size(const apt_config *c, int32_t slot, bool rows)
{
    switch (slot) {
    case APTI_HEAD_DENSE_W: return rows ? c->hidden_dense : 0;
    case APTI_HEAD_DENSE_B: return rows ? 1 : c->hidden_dense;
    case APTI_HEAD_OUT_W: return !rows ? c->hidden_dense : apti_is_tied(c) ? 0 : apti_head_width(c);
    case APTI_HEAD_OUT_B: return rows ? 1 : apti_head_width(c);
    default: return 1;
    }
}

static apti_param *apti_param_add(apt_model *model, const apti_param_row *row, int32_t layer, int64_t fixed_rows,
                                  int64_t fixed_cols)
{
    apti_param *p = &model->params[model->param_count++];
    const apt_layer_shape *shape = layer >= 0 ? &model->shape[layer] : NULL;
    p->dims = row->dims;
    p->layer = layer;
    p->row_axis = row->row_axis;
    p->col_axis = row->col_axis;
    p->rows = row->row_axis == APTI_AXIS_FIXED ? fixed_rows : apti_axis_size(&model->config, shape, row->row_axis);
    p->cols = row->col_axis == APTI_AXIS_FIXED ? fixed_cols : apti_axis_size(&model->config, shape, row->col_axis);
    p->init = row->init < 0 ? -model->config.init_range : row->init;
    if (row->init == APTI_INIT_QUERY) p->init /= sqrtf((float)(p->cols * model->config.head_dim));
    if (row->init == APTI_INIT_FAN) p->init /= sqrtf((float)(row->row_axis == APTI_AXIS_FIXED ? model->config.hidden : p->cols));
    return p;
}

/* sub: place among the sublayers of what the files call a layer. */
static void apti_layout_rows(apt_model *model, int32_t l, const apti_rows *rows, int32_t sub)
{
    const apt_config *c = &model->config;
    const int32_t first = apti_first_stack(c), stack = l >= first, number = stack ? (l - first) / 2 : l;
    char inside[16] = "";
    if (model->block->numbered) (void)snprintf(inside, sizeof(inside), "layer.%d.", (int)sub);
    for (int32_t i = 0; i < rows->count; i++) {
        const apti_param_row *row = &rows->row[i];
        if (!apti_row_applies(row, c)) continue;
        apti_param *p = apti_param_add(model, row, l, 1, 1);
        p->linear = p->narrow = row->dims == 2;
        snprintf(p->name, sizeof(p->name), "%s%s%d.%s%s", model->block->prefix, model->block->stem[stack], (int)number, inside,
                 row->suffix);
        model->layers[l].slot[row->slot] = p;
    }
}

/* The adapter of w, of rank 0 at first. */
static void apti_layout_adapter(apt_model *model, const apti_param *w, apti_param **a, apti_param **b)
{
    const apti_param_row ra = {0, NULL, 2, APTI_AXIS_RANK, w->col_axis, 0, APTI_ALWAYS},
                         rb = {0, NULL, 2, w->row_axis, APTI_AXIS_RANK, 0, APTI_ALWAYS};
    const int stem = (int)(strlen(w->name) - strlen(".weight"));
    *a = apti_param_add(model, &ra, w->layer, 0, 0);
    *b = apti_param_add(model, &rb, w->layer, model->config.vocab, 0);       /* rows that follow nothing are the LM head's */
    snprintf((*a)->name, sizeof((*a)->name), "lora_A.%.*s", stem, w->name);
    snprintf((*b)->name, sizeof((*b)->name), "lora_B.%.*s", stem, w->name);
}

static void apti_layout_layer(apt_model *model, int32_t l)
{
    const apt_config *c = &model->config;
    const apti_design *block = model->block;
    const bool cross = apti_is_cross(c, l);
    apti_layout_rows(model, l, cross ? &block->cross : &block->attention, cross);
    if (apti_has_ffn(c, l)) apti_layout_rows(model, l, &block->ffn, cross ? 2 : 1);
    for (int32_t i = 0; i < APTI_LINEARS; i++) {
        apti_layer *layer = &model->layers[l];
        layer->lora_a[i] = layer->lora_b[i] = model->none;
        if (layer->slot[2 * i] != NULL) apti_layout_adapter(model, layer->slot[2 * i], &layer->lora_a[i], &layer->lora_b[i]);
    }
}

/* Fills the parameter table of model->config; no parameter has memory yet. */
static void apti_layout(apt_model *model)
{
    const apt_config *c = &model->config;
    const apti_rows head = apti_head_rows(c);
    for (int32_t i = 0; i < model->block->embed.count; i++) {
        const apti_param_row *row = &model->block->embed.row[i];
        apti_param *p = apti_param_add(model, row, -1, apti_fixed_embed_rows(c, row->slot),
                                       row->slot >= APTI_RELATIVE && row->slot < APTI_FINAL_NORM ? c->bias_heads : 1);
        p->linear = p->narrow = row->slot == APTI_WORD && apti_is_tied(c);
        snprintf(p->name, sizeof(p->name), "%s%s", model->block->prefix, row->suffix);
        model->embed[row->slot] = p;
    }
    for (int32_t l = 0; l < c->layers; l++) apti_layout_layer(model, l);
    for (int32_t i = 0; i < head.count; i++) {
        const apti_param_row *row = &head.row[i];
        if (!apti_row_applies(row, c)) continue;
        apti_param *p =
            apti_param_add(model, row, -1, apti_fixed_head_size(c, row->slot, true), apti_fixed_head_size(c, row->slot, false));
        p->linear = row->dims == 2;
        p->narrow = c->task == APT_TASK_LM;
        p->optional_in_file = c->task != APT_TASK_LM;
        snprintf(p->name, sizeof(p->name), "%s", row->suffix);
        model->head[row->slot] = p;
    }
    model->head_a = model->head_b = model->none;
    if (c->task == APT_TASK_LM) apti_layout_adapter(model, model->head[APTI_HEAD_OUT_W], &model->head_a, &model->head_b);
}

/* ------------------------------------------------------------------------------------------------ places of adapters

   Every linear map of every layer, then the LM head if there is one, are numbered through: place k is linear map
   k % APTI_LINEARS of layer k / APTI_LINEARS. */

/* The matrix that gives the logits of the vocabulary. */
static apti_param *apti_decoder_matrix(const apt_model *m)
{
    return m->config.task == APT_TASK_LM && m->config.untied ? m->head[APTI_HEAD_OUT_W] : m->embed[APTI_WORD];
}

typedef struct apti_site { apti_param *w, *a, *b; } apti_site;        /* w NULL: this layer has no such map, a and b are `none` */

static int32_t apti_layer_sites(const apt_model *m)
{
    return m->config.layers * APTI_LINEARS;
}

static int32_t apti_sites(const apt_model *m)
{
    return apti_layer_sites(m) + (m->config.task == APT_TASK_LM);
}

static apti_site apti_site_of(const apt_model *m, int32_t k)
{
    apti_site site;
    if (k < apti_layer_sites(m)) {
        const apti_layer *layer = &m->layers[k / APTI_LINEARS];
        site.w = layer->slot[2 * (k % APTI_LINEARS)];
        site.a = layer->lora_a[k % APTI_LINEARS];
        site.b = layer->lora_b[k % APTI_LINEARS];
    } else {
        site.w = apti_decoder_matrix(m);
        site.a = m->head_a;
        site.b = m->head_b;
    }
    return site;
}

/* ------------------------------------------------------------------------------------------------ parameter storage */

static int64_t apti_param_count(const apti_param *p)
{
    return p->rows * p->cols;
}

static bool apti_is_adapter(const apti_param *p)
{
    return p->row_axis == APTI_AXIS_RANK || p->col_axis == APTI_AXIS_RANK;
}

/* The description stays, the buffers are someone else's business. */
static void apti_param_forget(apti_param *p)
{
    memset(&p->sparse, 0, sizeof p->sparse);
    p->value = p->grad = p->moment1 = p->moment2 = NULL;
    p->columns = NULL;
    p->packed.data = NULL;
}

static void apti_param_release(apt_ctx *ctx, apti_param *p)
{
    apti_free(ctx, p->value);
    apti_free(ctx, p->columns);
    apti_free(ctx, p->packed.data);
    apti_free(ctx, p->grad);
    apti_free(ctx, p->moment1);
    apti_free(ctx, p->moment2);
    apt_sparse_free(ctx, &p->sparse);
    apti_param_forget(p);
}

/* Reserves the packed panels of a linear parameter in its present shape. */
static bool apti_packed_reserve(apt_ctx *ctx, apti_packed *packed, int64_t n, int64_t k, apt_dtype type)
{
    packed->n = n;
    packed->k = k;
    packed->nr = ctx->kernels->nr;
    packed->type = type;
    packed->data = apti_alloc(ctx, apti_packed_bytes(ctx, n, k, type), 1);
    return packed->data != NULL;
}

/* Only frozen matrices inside the layers and LM heads may be narrowed; other task heads are trained. */
static apt_dtype apti_param_type(const apt_model *model, const apti_param *p)
{
    return p->narrow && !p->trainable ? model->weights : APT_F32;
}

/* Gives `p` the memory its role asks for: panels for linear maps, plain values for the rest and for what is trained. */
static bool apti_param_reserve(apt_model *model, apti_param *p)
{
    const int64_t n = apti_param_count(p);
    if (p->linear && !apti_packed_reserve(model->ctx, &p->packed, p->rows, p->cols, apti_param_type(model, p))) return false;
    if (!p->linear || p->trainable) p->value = (float *)apti_alloc(model->ctx, n, (int64_t)sizeof(float));
    if (p->trainable) {
        p->grad = (float *)apti_calloc(model->ctx, n, (int64_t)sizeof(float));
        p->moment1 = (float *)apti_calloc(model->ctx, n, (int64_t)sizeof(float));
        p->moment2 = (float *)apti_calloc(model->ctx, n, (int64_t)sizeof(float));
        if (p->grad == NULL || p->moment1 == NULL || p->moment2 == NULL) return false;
    }
    return p->value != NULL || (p->linear && !p->trainable);
}

/* Writes row-major values, packing them where products read panels. */
static void apti_param_set(apt_model *model, apti_param *p, const float *values)
{
    apt_sparse_free(model->ctx, &p->sparse);
    if (p->value != NULL && p->value != values) memcpy(p->value, values, (size_t)apti_param_count(p) * sizeof(float));
    if (p->linear) apti_pack(model->ctx, &p->packed, values, p->cols);
}

/* Reads row-major values; panels in bf16 give what the products see. */
static void apti_param_get(const apt_model *model, const apti_param *p, float *values)
{
    if (p->columns != NULL) {
        for (int64_t i = 0; i < p->rows; i++)
            for (int64_t j = 0; j < p->cols; j++) values[i * p->cols + j] = p->value[i * p->stride + p->columns[j]];
    } else if (p->value != NULL) {
        memcpy(values, p->value, (size_t)apti_param_count(p) * sizeof(float));
    } else if (p->linear) {
        apti_unpack(model->ctx, values, p->cols, &p->packed);
    }
}

/* After an update in place of a trained linear weight. */
static void apti_param_repack(apt_model *model, apti_param *p)
{
    if (p->linear && p->value != NULL) apti_pack(model->ctx, &p->packed, p->value, p->cols);
}

/* Initial values from the stream `index`, so a parameter's numbers do not depend on the others. */
static void apti_param_init(float *values, const apti_param *p, uint64_t seed, uint64_t index)
{
    const int64_t n = apti_param_count(p);
    if (p->init < 0) {
        apti_rng rng = {apti_rng_seed(seed, index), 0};
        apti_rng_fill_normal(&rng, values, n, -p->init);
    } else {
        for (int64_t i = 0; i < n; i++) values[i] = p->init;
    }
}

/* ------------------------------------------------------------------------------------------------ making and freeing */

/* Numbers that only T5 and LLaMA have. */
static apt_result apti_config_check_decoder(apt_ctx *ctx, const apt_config *c)
{
    const apt_rope *rope = &c->rope;
    if (c->task != APT_TASK_LM)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "config: T5 and LLaMA know APT_TASK_LM only; task is %d", (int)c->task);
    if (c->decoder_layers < 0 || (c->family == APT_T5) != (c->decoder_layers > 0) || apti_first_stack(c) < 1)
        return apti_fail(ctx, APT_E_RANGE, "config: %d layers with %d decoder layers, which count twice (T5 only)",
                         (int)c->layers, (int)c->decoder_layers);
    if (c->start_id < 0 || c->start_id >= c->vocab || c->pad_id < 0 || c->pad_id >= c->vocab)
        return apti_fail(ctx, APT_E_RANGE, "config: start_id %d and pad_id %d must be in 0..%d", (int)c->start_id, (int)c->pad_id,
                         (int)c->vocab - 1);
    if (c->family == APT_T5 && (c->buckets < 4 || c->buckets > 4096 || c->max_distance <= c->buckets / 2 ||
                                c->max_distance > 65536 || c->bias_heads < 1 || c->bias_heads > 4096))
        return apti_fail(ctx, APT_E_RANGE, "config: %d relative position buckets up to distance %d, %d heads: expected 4..4096 "
                         "buckets, a distance above half of them, 1..4096 heads", (int)c->buckets, (int)c->max_distance,
                         (int)c->bias_heads);
    if (c->family != APT_LLAMA) return APT_OK;
    if (c->head_dim % 2 != 0) return apti_fail(ctx, APT_E_RANGE, "config: head size %d must be even", (int)c->head_dim);
    if (!apti_finite(rope->theta) || !(rope->theta > 0 && rope->theta <= 1e12f) || !apti_finite(rope->factor) || rope->factor < 0)
        return apti_fail(ctx, APT_E_RANGE, "config: rope theta %g, factor %g", (double)rope->theta, (double)rope->factor);
    if (rope->factor > 0 && (!apti_finite(rope->low_factor) || !apti_finite(rope->high_factor) || rope->low_factor <= 0 ||
                             rope->high_factor <= rope->low_factor || rope->original_positions < 1))
        return apti_fail(ctx, APT_E_RANGE, "config: rope scaling with low factor %g, high factor %g, %d positions",
                         (double)rope->low_factor, (double)rope->high_factor, (int)rope->original_positions);
    return APT_OK;
}

static apt_result apti_config_check_layer(apt_ctx *ctx, const apt_config *c, int32_t l)
{
    const apt_layer_shape *s = &c->layer[l];
    if (s->heads < 0 || s->heads > 4096 || s->kv_heads < 0 || s->neurons < 0 || s->neurons > 1048576 ||
        (s->kv_heads == 0) != (s->heads == 0) || (s->kv_heads > 0 && s->heads % s->kv_heads != 0))
        return apti_fail(ctx, APT_E_RANGE, "config: layer %d: heads %d, KV heads %d, neurons %d do not make a layer", (int)l,
                         (int)s->heads, (int)s->kv_heads, (int)s->neurons);
    if (s->neurons > 0 && !apti_has_ffn(c, l))
        return apti_fail(ctx, APT_E_RANGE, "config: layer %d is the self attention of a decoder; it has %d neurons, expected 0",
                         (int)l, (int)s->neurons);
    if (c->family != APT_T5) return APT_OK;
    if (s->heads != s->kv_heads || s->heads > c->bias_heads)
        return apti_fail(ctx, APT_E_RANGE, "config: layer %d: heads %d, KV heads %d, but %d heads have a relative position bias",
                         (int)l, (int)s->heads, (int)s->kv_heads, (int)c->bias_heads);
    for (int32_t h = 0; h < s->heads && c->bias_head != NULL; h++) {
        const int32_t column = c->bias_head[(int64_t)l * c->bias_heads + h];
        if (column < 0 || column >= c->bias_heads)
            return apti_fail(ctx, APT_E_RANGE, "config: layer %d: head %d reads column %d of %d", (int)l, (int)h, (int)column,
                             (int)c->bias_heads);
    }
    return APT_OK;
}

static apt_result apti_config_check(apt_ctx *ctx, const apt_config *c)
{
    const int64_t cap = (int64_t)1 << 24;
    const bool decoder = c->family == APT_T5 || c->family == APT_LLAMA;
    if (c->family < APT_BERT || c->family > APT_LLAMA)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "config: family %d is not known; expected BERT, RoBERTa, T5 or LLaMA",
                         (int)c->family);
    if (c->task < APT_TASK_CLASSIFY || c->task > APT_TASK_LM || (c->task == APT_TASK_LM && !decoder))
        return apti_fail(ctx, APT_E_ARGUMENT, "config: task %d is not known", (int)c->task);
    if (c->vocab < 1 || c->vocab > cap || c->positions < 1 || c->positions > cap || c->types < 1 || c->types > cap)
        return apti_fail(ctx, APT_E_RANGE, "config: vocab %d, positions %d, types %d: each must be in 1..%d", (int)c->vocab,
                         (int)c->positions, (int)c->types, (int)cap);
    if (c->hidden < 1 || c->hidden > 65536 || c->hidden_dense < c->hidden || c->hidden_dense > 65536)
        return apti_fail(ctx, APT_E_RANGE, "config: hidden size %d (dense %d) must be in 1..65536", (int)c->hidden,
                         (int)c->hidden_dense);
    if (c->head_dim < 1 || c->head_dim > 256 || c->layers < 1 || c->layers > 1024)
        return apti_fail(ctx, APT_E_RANGE, "config: head size %d must be in 1..256, layers %d in 1..1024", (int)c->head_dim,
                         (int)c->layers);
    if (c->task == APT_TASK_CLASSIFY && (c->labels < 1 || c->labels > 65536))
        return apti_fail(ctx, APT_E_RANGE, "config: labels %d must be in 1..65536", (int)c->labels);
    if (c->family == APT_ROBERTA && (c->pad_id < 0 || c->pad_id >= c->positions - 1))
        return apti_fail(ctx, APT_E_RANGE, "config: pad_token_id %d leaves no position of %d", (int)c->pad_id, (int)c->positions);
    if (c->activation < APT_GELU_ERF || c->activation > APT_SILU)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "config: activation %d is not known", (int)c->activation);
    if (!apti_finite(c->norm_eps) || c->norm_eps > 1 || !apti_finite(c->init_range))
        return apti_fail(ctx, APT_E_RANGE, "config: norm_eps %g must be in 0..1, init_range %g finite", (double)c->norm_eps,
                         (double)c->init_range);
    apt_result r = decoder ? apti_config_check_decoder(ctx, c) : APT_OK;
    if (!decoder && (c->gated || c->decoder_layers || c->qkv_bias || c->untied))
        r = apti_fail(ctx, APT_E_ARGUMENT, "config: an encoder with fields of T5 or LLaMA");
    for (int32_t l = 0; l < c->layers && r == APT_OK; l++) r = apti_config_check_layer(ctx, c, l);
    return r;
}

static void apti_config_defaults(apt_config *c)
{
    const bool t5 = c->family == APT_T5, llama = c->family == APT_LLAMA;
    if (c->norm_eps <= 0) c->norm_eps = t5 || llama ? 1e-6f : c->family == APT_ROBERTA ? 1e-5f : 1e-12f;
    if (c->init_range <= 0) c->init_range = t5 ? 1.0f : 0.02f;
    if (c->hidden_dense == 0) c->hidden_dense = c->hidden;
    if (c->types == 0) c->types = 1;
    if (llama) c->gated = 1;
    if ((t5 || llama) && c->activation == APT_GELU_ERF) c->activation = llama ? APT_SILU : c->gated ? APT_GELU_TANH : APT_RELU;
    if (c->rope.theta == 0) c->rope.theta = 10000.0f;
    if (!t5) return;
    c->positions = 1 << 24;           /* relative ones have no end */
    if (c->buckets == 0) c->buckets = 32;
    if (c->max_distance == 0) c->max_distance = 128;
    if (c->bias_heads == 0) c->bias_heads = c->layer != NULL ? c->layer[0].heads : c->heads;
}

static int64_t apti_prunable(const apt_config *c)
{
    int64_t sum = 0;
    for (int32_t l = 0; l < c->layers; l++)
        sum += (int64_t)c->head_dim * 2 * (c->layer[l].heads + c->layer[l].kv_heads) +
               apti_ffn_matrices(c) * (int64_t)c->layer[l].neurons;
    return sum * c->hidden;
}

static void apti_model_free(apt_model *model)
{
    apt_ctx *ctx = model->ctx;
    for (int32_t i = 0; i < model->param_count; i++) apti_param_release(ctx, &model->params[i]);
    apti_pass_free(ctx, model->pass);
    apti_free(ctx, model->params);
    apti_free(ctx, model->layers);
    apti_free(ctx, model->shape);
    apti_free(ctx, model->bias_head);
    apti_free(ctx, model->masks);
    apti_bitmasks_free(model);
    apti_free(ctx, model);
}

/* Entries of the parameter table: at most so many, and one that is always empty. */
static int64_t apti_param_capacity(int64_t layers)
{
    return APTI_EMBED_SLOTS + APTI_HEAD_SLOTS + 2 + layers * (APTI_LAYER_SLOTS + 2 * APTI_LINEARS) + 1;
}

/* The shape of layer l when all layers are equal. */
static apt_layer_shape apti_equal_shape(const apt_config *c, int32_t l)
{
    apt_layer_shape shape;
    shape.heads = c->heads;
    shape.kv_heads = c->kv_heads > 0 ? c->kv_heads : c->heads;
    shape.neurons = apti_has_ffn(c, l) ? c->neurons : 0;
    return shape;
}

/* Which column of the relative position table each head reads. */
static void apti_bias_heads_copy(apt_model *model, const int32_t *given)
{
    const int32_t n = model->config.bias_heads;
    for (int64_t i = 0; i < (int64_t)model->config.layers * n; i++)
        model->bias_head[i] = given != NULL ? given[i] : (int32_t)(i % n);
    model->config.bias_head = model->bias_head;
}

/* The frame of a model: shapes and the parameter table without memory for values. */
static apt_result apti_model_frame(apt_ctx *ctx, const apt_config *given, apt_dtype weights, apt_model **out)
{
    apt_model *model = (apt_model *)apti_calloc(ctx, 1, (int64_t)sizeof(apt_model));
    if (model == NULL) return apti_fail(ctx, APT_E_MEMORY, "model: no memory for its frame");
    model->ctx = ctx;
    model->weights = weights;
    model->scale = 2.0f;
    model->config = *given;
    apti_config_defaults(&model->config);
    model->block = apti_design_of(given->family);
    const int64_t layers = given->layers > 0 && given->layers <= 1024 ? given->layers : 0, count = apti_param_capacity(layers);
    const int64_t columns = model->block->relative && model->config.bias_heads > 0 && model->config.bias_heads <= 4096
                                ? model->config.bias_heads : 0;
    model->shape = (apt_layer_shape *)apti_calloc(ctx, layers, (int64_t)sizeof(apt_layer_shape));
    model->layers = (apti_layer *)apti_calloc(ctx, layers, (int64_t)sizeof(apti_layer));
    model->params = (apti_param *)apti_calloc(ctx, count, (int64_t)sizeof(apti_param));
    if (columns > 0) model->bias_head = (int32_t *)apti_calloc(ctx, layers * columns, (int64_t)sizeof(int32_t));
    if (model->shape == NULL || model->layers == NULL || model->params == NULL || (columns > 0 && model->bias_head == NULL)) {
        apti_model_free(model);
        return apti_fail(ctx, APT_E_MEMORY, "model: no memory for %lld parameter entries", (long long)count);
    }
    model->none = &model->params[count - 1];
    for (int32_t l = 0; l < layers; l++)
        model->shape[l] = given->layer != NULL ? given->layer[l] : apti_equal_shape(&model->config, l);
    model->config.bias_head = NULL;
    if (columns > 0 && layers > 0) apti_bias_heads_copy(model, given->bias_head);
    model->config.layer = model->shape;
    const apt_result r = apti_config_check(ctx, &model->config);
    if (r != APT_OK) {
        apti_model_free(model);
        return r;
    }
    apti_layout(model);
    model->prunable_dense = apti_prunable(&model->config);
    *out = model;
    return APT_OK;
}

/* Values of the largest matrix that lives in panels: room for its row-major copy. */
static int64_t apti_largest_linear(const apt_model *model)
{
    int64_t most = 1;
    for (int32_t i = 0; i < model->param_count; i++)
        if (model->params[i].linear) most = apti_max_i64(most, apti_param_count(&model->params[i]));
    return most;
}

/* The same inside the layers: what decisions and merging unpack. */
static int64_t apti_largest_layer(const apt_model *model)
{
    int64_t most = 1;
    for (int32_t i = 0; i < model->param_count; i++)
        if (model->params[i].linear && model->params[i].layer >= 0)
            most = apti_max_i64(most, apti_param_count(&model->params[i]));
    return most;
}

/* Builds a model with random heads and bodies; loading then overwrites what the files hold. */
static apt_result apti_model_build(apt_ctx *ctx, const apt_config *config, uint64_t seed, apt_dtype weights, apt_model **out)
{
    apt_model *model = NULL;
    apt_result r = apti_model_frame(ctx, config, weights, &model);
    if (r != APT_OK) return r;
    float *values = (float *)apti_alloc(ctx, apti_largest_linear(model), (int64_t)sizeof(float));
    for (int32_t i = 0; i < model->param_count && values != NULL; i++) {
        apti_param *p = &model->params[i];
        if (apti_param_count(p) == 0) continue;
        if (!apti_param_reserve(model, p)) {
            r = apti_fail(ctx, APT_E_MEMORY, "model: no memory for %s (%lld x %lld)", p->name, (long long)p->rows,
                          (long long)p->cols);
            break;
        }
        float *target = p->linear ? values : p->value;
        apti_param_init(target, p, seed, (uint64_t)i);
        apti_param_set(model, p, target);
    }
    if (values == NULL) r = apti_fail(ctx, APT_E_MEMORY, "model: no memory for a buffer of its largest matrix");
    apti_free(ctx, values);
    if (r != APT_OK) {
        apti_model_free(model);
        return r;
    }
    model->next = ctx->models;
    ctx->models = model;
    *out = model;
    return APT_OK;
}

APT_API apt_result apt_model_create(apt_ctx *ctx, const apt_config *config, uint64_t seed, apt_model **model)
{
    if (ctx == NULL) return APT_E_ARGUMENT;
    if (config == NULL || model == NULL) return apti_fail(ctx, APT_E_ARGUMENT, "apt_model_create: config or model is NULL");
    apt_config c = *config;
    if (c.layer == NULL && c.head_dim == 0 && c.heads > 0) c.head_dim = c.hidden / c.heads;
    return apti_model_build(ctx, &c, seed, APT_F32, model);
}

APT_API void apt_model_destroy(apt_model *model)
{
    if (model == NULL) return;
    if (model->trainer != NULL) apt_trainer_destroy(model->trainer);
    apt_model **link = &model->ctx->models;
    while (*link != NULL && *link != model) link = &(*link)->next;
    if (*link == model) *link = model->next;
    apti_model_free(model);
}

/* ------------------------------------------------------------------------------------------------ queries */

APT_API void apt_model_config(const apt_model *model, apt_config *config)
{
    if (model != NULL && config != NULL) *config = model->config;
}

APT_API void apt_model_query(const apt_model *model, apt_model_info *info)
{
    if (model == NULL || info == NULL) return;
    const apt_model_info zero = APT_ZERO;
    *info = zero;
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        const int64_t n = apti_param_count(p);
        info->parameters += n;
        if (p->trainable) info->trainable += n;
        if (apti_is_adapter(p)) info->adapter += n;
    }
    info->prunable = apti_prunable(&model->config);
    info->prunable_dense = model->prunable_dense;
}

/* Entries with at least one value, in table order. */
static apti_param *apti_param_at(const apt_model *model, int32_t index)
{
    for (int32_t i = 0; i < model->param_count; i++)
        if (apti_param_count(&model->params[i]) > 0 && index-- == 0) return &model->params[i];
    return NULL;
}

static apti_param *apti_param_find(const apt_model *model, const char *name)
{
    for (int32_t i = 0; i < model->param_count; i++)
        if (strcmp(model->params[i].name, name) == 0) return &model->params[i];
    return NULL;
}

APT_API int32_t apt_model_parameters(const apt_model *model)
{
    int32_t n = 0;
    if (model == NULL) return 0;
    for (int32_t i = 0; i < model->param_count; i++) n += apti_param_count(&model->params[i]) > 0;
    return n;
}

APT_API apt_result apt_model_parameter(const apt_model *model, int32_t index, apt_parameter *info)
{
    if (model == NULL || info == NULL) return APT_E_ARGUMENT;
    const apti_param *p = apti_param_at(model, index);
    if (index < 0 || p == NULL)
        return apti_fail(model->ctx, APT_E_RANGE, "parameter index %d is not below the count", (int)index);
    info->name = p->name;
    info->rows = p->rows;
    info->cols = p->cols;
    info->dims = p->dims;
    info->trainable = p->trainable;
    return APT_OK;
}

static apt_result apti_param_lookup(const apt_model *model, const char *name, const void *values, int64_t count, apti_param **out)
{
    if (model == NULL || name == NULL || values == NULL) return APT_E_ARGUMENT;
    *out = apti_param_find(model, name);
    if (*out == NULL) return apti_fail(model->ctx, APT_E_MISSING, "the model has no parameter named %s", name);
    if (apti_param_count(*out) != count)
        return apti_fail(model->ctx, APT_E_SHAPE, "%s holds %lld x %lld values, the caller gives room for %lld", name,
                         (long long)(*out)->rows, (long long)(*out)->cols, (long long)count);
    return APT_OK;
}

APT_API apt_result apt_model_get(const apt_model *model, const char *name, float *out, int64_t count)
{
    apti_param *p = NULL;
    const apt_result r = apti_param_lookup(model, name, out, count, &p);
    if (r == APT_OK) apti_param_get(model, p, out);
    return r;
}

static bool apti_is_shared(const apti_param *p)
{
    return (p->value != NULL && apti_block_of(p->value)->references > 1) ||
           (p->packed.data != NULL && apti_block_of(p->packed.data)->references > 1);
}

/* Memory of the parameter's own where it lives in a buffer that a teacher has or had; the values stay. */
static bool apti_param_own(apt_model *model, apti_param *p)
{
    apti_param fresh = *p;
    if (!apti_is_shared(p) && p->columns == NULL) return true;
    apti_param_forget(&fresh);
    if (!apti_param_reserve(model, &fresh)) {
        apti_param_release(model->ctx, &fresh);
        return false;
    }
    if (p->linear) memcpy(fresh.packed.data, p->packed.data, (size_t)apti_block_bytes(fresh.packed.data));
    else apti_param_get(model, p, fresh.value);
    apti_param_release(model->ctx, p);
    *p = fresh;
    return true;
}

static const uint64_t *apti_bitmask_of(const apt_model *model, const apti_param *p)
{
    return model->bitmask != NULL ? model->bitmask[p - model->params] : NULL;
}

/* -1: values are 0 wherever the mask is; else the first that is not. */
static int64_t apti_bitmask_broken(const uint64_t *mask, const float *values, int64_t n)
{
    for (int64_t i = 0; mask != NULL && i < n; i++)
        if ((mask[i / 64] >> i % 64 & 1) == 0 && apti_magnitude(values[i]) != 0) return i;
    return -1;
}

APT_API apt_result apt_model_set(apt_model *model, const char *name, const float *values, int64_t count)
{
    apti_param *p = NULL;
    const apt_result r = apti_param_lookup(model, name, values, count, &p);
    if (r != APT_OK) return r;
    if (!apti_finite_all(values, count))
        return apti_fail(model->ctx, APT_E_NONFINITE, "%s: the new values hold NaN or infinity", name);
    const int64_t broken = apti_bitmask_broken(apti_bitmask_of(model, p), values, count);
    if (broken >= 0)
        return apti_fail(model->ctx, APT_E_STATE, "%s: weight %lld is masked and must stay 0; remove the mask with "
                         "apt_model_set_bitmask first", name, (long long)broken);
    if (!apti_param_own(model, p))
        return apti_fail(model->ctx, APT_E_MEMORY, "no memory to set %s beside the teacher's copy", name);
    apti_param_set(model, p, values);
    return APT_OK;
}

/* ------------------------------------------------------------------------------------------------ units and masks */

APT_API void apt_model_units(const apt_model *model, apt_units *units)
{
    const apt_units zero = APT_ZERO;
    if (model == NULL || units == NULL) return;
    *units = zero;
    for (int32_t l = 0; l < model->config.layers; l++) {
        units->heads += model->shape[l].kv_heads;
        units->neurons += model->shape[l].neurons;
    }
    units->hidden = model->config.hidden;
    units->total = units->heads + units->neurons + units->hidden;
}

/* Index of the first head (KV group) of a layer, the first neuron of a layer, the first hidden dimension. */
static int64_t apti_unit_head(const apt_model *model, int32_t layer)
{
    int64_t base = 0;
    for (int32_t l = 0; l < layer; l++) base += model->shape[l].kv_heads + model->shape[l].neurons;
    return base;
}

static int64_t apti_unit_neuron(const apt_model *model, int32_t layer)
{
    return apti_unit_head(model, layer) + model->shape[layer].kv_heads;
}

static int64_t apti_unit_hidden(const apt_model *model)
{
    return apti_unit_head(model, model->config.layers);
}

APT_API apt_result apt_model_get_masks(const apt_model *model, float *masks, int32_t count)
{
    apt_units u;
    if (model == NULL || masks == NULL) return APT_E_ARGUMENT;
    apt_model_units(model, &u);
    if (count != u.total)
        return apti_fail(model->ctx, APT_E_SHAPE, "masks: the model has %d units, the caller gives %d", (int)u.total, (int)count);
    for (int32_t i = 0; i < count; i++) masks[i] = model->masks != NULL ? model->masks[i] : 1.0f;
    return APT_OK;
}

static bool apti_masks_reserve(apt_model *model)
{
    apt_units u;
    if (model->masks != NULL) return true;
    apt_model_units(model, &u);
    model->masks = (float *)apti_alloc(model->ctx, u.total, (int64_t)sizeof(float));
    for (int32_t i = 0; i < u.total && model->masks != NULL; i++) model->masks[i] = 1.0f;
    return model->masks != NULL;
}

/* Masks of 1 everywhere cost nothing: they are dropped. */
static void apti_masks_simplify(apt_model *model)
{
    apt_units u;
    if (model->masks == NULL) return;
    apt_model_units(model, &u);
    for (int32_t i = 0; i < u.total; i++)
        if (model->masks[i] < 1.0f) return;
    apti_free(model->ctx, model->masks);
    model->masks = NULL;
}

APT_API apt_result apt_model_set_masks(apt_model *model, const float *masks, int32_t count)
{
    apt_units u;
    if (model == NULL || masks == NULL) return APT_E_ARGUMENT;
    apt_model_units(model, &u);
    if (count != u.total)
        return apti_fail(model->ctx, APT_E_SHAPE, "masks: the model has %d units, the caller gives %d", (int)u.total, (int)count);
    for (int32_t i = 0; i < count; i++)
        if (!(masks[i] >= 0.0f && masks[i] <= 1.0f) || !apti_finite(masks[i]))
            return apti_fail(model->ctx, APT_E_RANGE, "masks: unit %d has mask %g; expected 0..1", (int)i, (double)masks[i]);
    if (!apti_masks_reserve(model)) return apti_fail(model->ctx, APT_E_MEMORY, "masks: no memory for %d units", (int)count);
    memcpy(model->masks, masks, (size_t)count * sizeof(float));
    apti_masks_simplify(model);
    return APT_OK;
}
/* ------------------------------------------------------------------------------------------------ masks of single weights */

static int64_t apti_adapter_total(const apt_model *model)
{
    apt_model_info info;
    apt_model_query(model, &info);
    return info.adapter;
}

static void apti_compressed_drop(apt_model *model)
{
    for (int32_t i = 0; i < model->param_count; i++) apt_sparse_free(model->ctx, &model->params[i].sparse);
}

/* What can be pruned weight by weight. */
static bool apti_is_matrix(const apti_param *p)
{
    return p->dims == 2 && !apti_is_adapter(p) && apti_param_count(p) > 0;
}

static bool apti_bitmasks_reserve(apt_model *model)
{
    if (model->bitmask == NULL)
        model->bitmask = (uint64_t **)apti_calloc(model->ctx, model->param_count, (int64_t)sizeof(uint64_t *));
    return model->bitmask != NULL;
}

static void apti_bitmasks_free(apt_model *model)
{
    for (int32_t i = 0; model->bitmask != NULL && i < model->param_count; i++) apti_free(model->ctx, model->bitmask[i]);
    apti_free(model->ctx, model->bitmask);
    model->bitmask = NULL;
}

/* Gives the parameter a mask (a block that becomes the model's) and sets weights and moments under it to 0. `values`: room for
   the matrix where it lives in panels only. Cannot fail: the parameter is the model's own and the list of masks is there. */
static void apti_bitmask_adopt(apt_model *model, apti_param *p, uint64_t *mask, float *values)
{
    const int64_t n = apti_param_count(p);
    uint64_t **slot = &model->bitmask[p - model->params];
    float *w = p->value != NULL ? p->value : values;
    if (p->value == NULL) apti_param_get(model, p, w);
    (void)apt_bitmask_apply(model->ctx, w, mask, n);
    apti_param_set(model, p, w);
    if (p->moment1 != NULL) (void)apt_bitmask_apply(model->ctx, p->moment1, mask, n);
    if (p->moment2 != NULL) (void)apt_bitmask_apply(model->ctx, p->moment2, mask, n);
    apti_free(model->ctx, *slot);
    *slot = mask;
}

static void apti_sparsity_add(apt_sparsity *s, int64_t rows, int64_t cols, int64_t kept)
{
    s->matrices++;
    s->weights += rows * cols;
    s->zeros += rows * cols - kept;
    s->dense_bytes += 4 * rows * cols;
    s->sparse_bytes += apt_sparse_bytes(rows, cols, kept);
    s->sparsity = (double)s->zeros / (double)apti_max_i64(s->weights, 1);
    s->compression = (double)s->dense_bytes / (double)s->sparse_bytes;
}

static void apti_sparsity_none(apt_sparsity *s)
{
    const apt_sparsity none = APT_ZERO;
    *s = none;
    s->compression = 1;
}

/* Weights that its mask lets stay. */
static int64_t apti_param_kept(const apt_model *model, const apti_param *p)
{
    const uint64_t *mask = apti_bitmask_of(model, p);
    return mask != NULL ? apt_bitmask_kept(mask, apti_param_count(p)) : apti_param_count(p);
}

/* Of those parameters that `chosen` has (NULL: that have a mask). */
static void apti_sparsity_of(const apt_model *model, const uint8_t *chosen, apt_sparsity *s)
{
    apti_sparsity_none(s);
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        const bool wanted = chosen != NULL ? chosen[i] != 0 : apti_bitmask_of(model, p) != NULL;
        if (wanted && apti_param_count(p) > 0) apti_sparsity_add(s, p->rows, p->cols, apti_param_kept(model, p));
    }
}

APT_API apt_result apt_model_sparsity(const apt_model *model, const char *name, apt_sparsity *sparsity)
{
    if (model == NULL || sparsity == NULL) return APT_E_ARGUMENT;
    if (name == NULL) {
        apti_sparsity_of(model, NULL, sparsity);
        return APT_OK;
    }
    const apti_param *p = apti_param_find(model, name);
    if (p == NULL) return apti_fail(model->ctx, APT_E_MISSING, "the model has no parameter named %s", name);
    apti_sparsity_none(sparsity);
    apti_sparsity_add(sparsity, p->rows, p->cols, apti_param_kept(model, p));
    return APT_OK;
}

/* A compressed copy of p, when it has zeros enough. values: room for the matrix where it lives in panels. */
static apt_result apti_param_compress(apt_model *model, apti_param *p, double least, float *values)
{
    const float *w = p->value != NULL ? p->value : values;
    if (p->value == NULL) apti_param_get(model, p, values);
    const int64_t n = apti_param_count(p), count = apt_sparse_count(w, p->cols, p->rows, p->cols);
    if ((double)(n - count) < least * (double)n) return APT_OK;
    return apt_sparse_make(model->ctx, &p->sparse, w, p->cols, p->rows, p->cols);
}

APT_API apt_result apt_model_compress(apt_model *model, double least, apt_sparsity *used)
{
    apt_sparsity sum;
    if (model == NULL) return APT_E_ARGUMENT;
    if (!apti_finite_f64(least) || least < 0 || least >= 1)
        return apti_fail(model->ctx, APT_E_RANGE, "apt_model_compress: least %g; expected 0 <= least < 1", least);
    if (model->trainer != NULL || apti_adapter_total(model) > 0)
        return apti_fail(model->ctx, APT_E_STATE, "apt_model_compress: the model has %s",
                         model->trainer != NULL ? "a trainer" : "adapters; merge them first");
    float *values = (float *)apti_alloc(model->ctx, apti_largest_layer(model), (int64_t)sizeof(float));
    apt_result r = values != NULL ? APT_OK : apti_fail(model->ctx, APT_E_MEMORY, "apt_model_compress: no memory for one matrix");
    apti_compressed_drop(model);
    apti_sparsity_none(&sum);
    for (int32_t i = 0; i < model->param_count && r == APT_OK; i++) {
        apti_param *p = &model->params[i];
        if (!apti_is_matrix(p) || !p->linear || p->layer < 0) continue;
        r = apti_param_compress(model, p, least > 0 ? least : APT_SPARSE_LEAST, values);
        if (p->sparse.start != NULL) apti_sparsity_add(&sum, p->rows, p->cols, p->sparse.start[p->rows]);
    }
    if (r != APT_OK) apti_compressed_drop(model);
    apti_free(model->ctx, values);
    if (r == APT_OK && used != NULL) *used = sum;
    return r;
}

static apt_result apti_bitmask_lookup(const apt_model *model, const char *name, int64_t words, apti_param **out)
{
    if (model == NULL || name == NULL) return APT_E_ARGUMENT;
    *out = apti_param_find(model, name);
    if (*out == NULL) return apti_fail(model->ctx, APT_E_MISSING, "the model has no parameter named %s", name);
    if (!apti_is_matrix(*out)) return apti_fail(model->ctx, APT_E_ARGUMENT, "%s is no matrix that can have a mask", name);
    const int64_t expected = apt_bitmask_words(apti_param_count(*out));
    if (words != expected)
        return apti_fail(model->ctx, APT_E_SHAPE, "%s: the mask of %lld x %lld weights has %lld words, the caller gives %lld",
                         name, (long long)(*out)->rows, (long long)(*out)->cols, (long long)expected, (long long)words);
    return APT_OK;
}

APT_API apt_result apt_model_get_bitmask(const apt_model *model, const char *name, uint64_t *mask, int64_t words)
{
    apti_param *p = NULL;
    if (mask == NULL) return APT_E_ARGUMENT;
    const apt_result r = apti_bitmask_lookup(model, name, words, &p);
    if (r != APT_OK) return r;
    const uint64_t *own = apti_bitmask_of(model, p);
    const int64_t n = apti_param_count(p);
    if (own != NULL) memcpy(mask, own, (size_t)words * sizeof(uint64_t));
    else memset(mask, 0xff, (size_t)words * sizeof(uint64_t));
    if (own == NULL && n % 64 != 0) mask[n / 64] = ((uint64_t)1 << n % 64) - 1;
    return APT_OK;
}

APT_API apt_result apt_model_set_bitmask(apt_model *model, const char *name, const uint64_t *mask, int64_t words)
{
    apti_param *p = NULL;
    if (model == NULL || name == NULL) return APT_E_ARGUMENT;
    if (mask == NULL && words == 0) {
        p = apti_param_find(model, name);
        if (p == NULL) return apti_fail(model->ctx, APT_E_MISSING, "the model has no parameter named %s", name);
        if (model->bitmask == NULL) return APT_OK;
        apti_free(model->ctx, model->bitmask[p - model->params]);
        model->bitmask[p - model->params] = NULL;
        return APT_OK;
    }
    if (mask == NULL) return apti_fail(model->ctx, APT_E_ARGUMENT, "%s: the mask is NULL", name);
    const apt_result r = apti_bitmask_lookup(model, name, words, &p);
    if (r != APT_OK) return r;
    const int64_t n = apti_param_count(p);
    if (!apti_bitmask_tail_ok(mask, n))
        return apti_fail(model->ctx, APT_E_RANGE, "%s: the mask has bits behind its %lld weights", name, (long long)n);
    uint64_t *copy = (uint64_t *)apti_alloc(model->ctx, words, (int64_t)sizeof(uint64_t));
    float *values = (float *)apti_alloc(model->ctx, p->value == NULL ? n : 0, (int64_t)sizeof(float));
    const bool fine = copy != NULL && values != NULL && apti_bitmasks_reserve(model) && apti_param_own(model, p);
    if (fine) {
        memcpy(copy, mask, (size_t)words * sizeof(uint64_t));
        apti_bitmask_adopt(model, p, copy, values);
    } else apti_free(model->ctx, copy);
    apti_free(model->ctx, values);
    return fine ? APT_OK : apti_fail(model->ctx, APT_E_MEMORY, "%s: no memory for its mask", name);
}

/* ------------------------------------------------------------------------------------------------ one pass: buffers

   A pass owns every activation of one batch in a single block, planned before anything is computed. The same planning
   function with no memory behind it gives the size, so the estimate and the allocation cannot disagree. */

enum {
    APTI_PASS_KEEP = 1,               /* keep what a backward needs */
    APTI_PASS_FULL = 2,               /* gradients of all weights: keep the inputs of every product */
    APTI_PASS_ALL_ROWS = 4            /* the last layer runs on all rows though the head reads only first tokens */
};

/* Activations of one layer. In inference all layers share the first one's buffers. rows_q: query rows (see apti_lean).
   Post-norm: z1 = x + Attention(x), y1 = norm(z1), z2 = y1 + FFN(y1), y2 = norm(z2), and in1 = xq, in2 = y1.
   Pre-norm: in1 = norm(x), y1 = z1 = x + Attention(in1), in2 = norm(y1), y2 = z2 = y1 + FFN(in2).
   Cross attention takes keys and values from `memory`, the output of the first stack. */
typedef struct apti_acts {
    float *x, *xq;                    /* input; rows of it that are queried (== x unless lean) */
    float *in1, *in2;                 /* what attention and FFN read */
    const float *memory;              /* rows that keys and values are made from */
    float *q, *k, *v, *lse, *ctx, *z1, *stats1, *y1, *pre, *act, *z2, *stats2, *y2;
    float *other;                     /* gated FFN: the factor beside the activation */
    float *xa[APTI_LINEARS];          /* s x A^T of each adapter */
    int64_t rows_q, rows_k;
    int32_t stack;
} apti_acts;

/* Layers that work on the same rows: all of an encoder or of a decoder alone; an encoder-decoder has two. */
typedef struct apti_stack {
    int32_t first, end;               /* layers first .. end - 1 */
    int64_t rows;
    const int32_t *offsets, *tokens;  /* of the batch */
    int32_t *positions;
    float *rope;                      /* (rows, head_dim): cosines and sines, rotary positions only */
    int32_t *bucket;                  /* relative positions only, see apti_relative_op */
    float *out, *stats;               /* pre-norm: the norm behind the last layer */
} apti_stack;

/* Sums of |activation| and |gradient| per feature: for each layer its context features, then its neurons; then the hidden
   features at several points, apti_probe_points rows of them. method.md, "Salience". */
typedef struct apti_probe {
    float *act, *grad;                /* [apti_probe_count] */
    float *sum;                       /* the same; used for context features only: sum of the signed activation */
    int64_t rows;                     /* rows seen */
} apti_probe;

/* Keys and values that generation keeps of the last stack: those of its own text, a region per sequence, and those of the source.
   All arrays are the generator's. start, end: of a sequence's region, with what this pass adds; before: keys it had already. */
typedef struct apti_cache {
    bool fill;                        /* this pass reads whole prompts and the source */
    float **k, **v;                   /* [layers] */
    int32_t *start, *end, *source_start, *source_end, *before;
} apti_cache;

struct apti_pass {
    apt_model *model;
    uint32_t mode;
    uint64_t structure;               /* of the model when the plan was made */
    char *block;
    int64_t block_bytes;
    int32_t layers;
    apti_acts *acts;                  /* [layers] */
    /* the batch */
    const apt_batch *batch;
    int64_t rows, labelled;           /* tokens of all stacks; MLM and LM: labelled tokens */
    int64_t most_rows;                /* of a stack */
    int32_t stacks;
    apti_stack stack[2];
    int32_t *first, *one_each, *mlm_index, *mlm_labels, *target_tokens;
    bool lean;
    /* embeddings and head */
    float *embed_z, *embed_stats;
    float *head_in, *head_pre, *head_out, *head_stats, *head_norm, *logits, *dlogits, *dhead, *dhead_in, *mlm_work, *kl_work;
    float *head_xa, *head_dya;        /* adapter of the LM head: apti_lm_op */
    int64_t mlm_chunk;
    /* shared by all layers */
    float *head_mask;                 /* grouped queries: the mask of each query head of the layer at work */
    float *bias, *dbias;              /* relative positions of the layer at work, as apti_attention_op wants them */
    float frequency[APTI_HEAD_MAX / 2];                                 /* rotary positions */
    float *ctx, *act, *g, *t, *dq, *dk, *dv, *dctx, *dact, *dother, *dmemory, *dya;
    apti_cache *cache;                /* NULL: no generation */
    /* hooks of the trainer */
    apti_probe *probe;                /* NULL: no salience */
    float **capture;                  /* [layers] or NULL: copies of chosen layer outputs, ld = hidden */
    void (*inject)(void *user, int32_t layer, float *dy, int64_t ld);   /* adds a gradient to a layer's output */
    void *inject_user;
    double loss_sum;
    int64_t loss_count, correct;
};

/* Hands out 64-byte aligned pieces of `base`, or only counts when base is NULL. */
typedef struct apti_bump { char *base; int64_t used; } apti_bump;

static void *apti_bump_take(apti_bump *bump, int64_t count, int64_t size)
{
    char *p = bump->base != NULL ? bump->base + bump->used : NULL;
    bump->used += apti_round_up(count * size, 64);
    return p;
}

static float *apti_bump_matrix(apti_bump *bump, int64_t rows, int64_t cols)
{
    return (float *)apti_bump_take(bump, rows * apti_ld(cols), (int64_t)sizeof(float));
}

static int64_t apti_query_width(const apt_model *model, int32_t l)
{
    return (int64_t)model->shape[l].heads * model->config.head_dim;
}

static int64_t apti_kv_width(const apt_model *model, int32_t l)
{
    return (int64_t)model->shape[l].kv_heads * model->config.head_dim;
}

static int64_t apti_rank(const apt_model *model, int32_t l, int32_t linear)
{
    return model->layers[l].lora_a[linear]->rows;
}

/* Widest of each shared buffer over all layers. */
typedef struct apti_widths { int64_t query, kv, neurons, rank; } apti_widths;

static apti_widths apti_widest(const apt_model *model)
{
    apti_widths w = {1, 1, 1, 1};
    for (int32_t l = 0; l < model->config.layers; l++) {
        w.query = apti_max_i64(w.query, apti_query_width(model, l));
        w.kv = apti_max_i64(w.kv, apti_kv_width(model, l));
        w.neurons = apti_max_i64(w.neurons, model->shape[l].neurons);
        for (int32_t i = 0; i < APTI_LINEARS; i++) w.rank = apti_max_i64(w.rank, apti_rank(model, l, i));
    }
    return w;
}

/* Classification and regression read the first token only: unless someone looks at the other rows of the last layer, it
   queries just those. Exact, and it saves most of one layer in both directions. */
static bool apti_lean(const apt_model *model, uint32_t mode)
{
    const apt_task_kind task = model->config.task;
    return (task == APT_TASK_CLASSIFY || task == APT_TASK_REGRESS) && (mode & APTI_PASS_ALL_ROWS) == 0;
}

/* Where keys and values of layer l come from. */
static void apti_plan_memory(apti_pass *pass, int32_t l)
{
    apti_acts *a = &pass->acts[l];
    const bool cross = apti_is_cross(&pass->model->config, l);
    a->rows_k = pass->stack[cross ? 0 : a->stack].rows;
    a->memory = cross ? pass->stack[0].out : pass->model->block->pre_norm ? a->in1 : a->x;
}

/* Buffers of layer l for a training pass: everything that its backward reads. */
static void apti_plan_kept_layer(apti_bump *b, apti_pass *pass, int32_t l, int64_t rows_q, bool full)
{
    const apt_model *m = pass->model;
    const int64_t d = m->config.hidden, f = m->shape[l].neurons, hq = apti_query_width(m, l), hk = apti_kv_width(m, l);
    const bool pre = m->block->pre_norm, ffn = apti_has_ffn(&m->config, l);
    apti_acts *a = &pass->acts[l];
    const int64_t rows = pass->stack[a->stack].rows;
    a->rows_q = rows_q;
    a->xq = rows_q == rows ? a->x : apti_bump_matrix(b, rows_q, d);
    a->in1 = pre ? apti_bump_matrix(b, rows, d) : a->xq;
    apti_plan_memory(pass, l);
    a->q = apti_bump_matrix(b, rows_q, hq);
    a->k = apti_bump_matrix(b, a->rows_k, hk);
    a->v = apti_bump_matrix(b, a->rows_k, hk);
    a->lse = (float *)apti_bump_take(b, rows_q * m->shape[l].heads, (int64_t)sizeof(float));
    a->ctx = full || apti_rank(m, l, APTI_OUTPUT) > 0 ? apti_bump_matrix(b, rows_q, hq) : NULL;
    a->z1 = apti_bump_matrix(b, rows_q, d);
    a->stats1 = (float *)apti_bump_take(b, rows_q * 2, (int64_t)sizeof(float));
    a->y1 = pre ? a->z1 : apti_bump_matrix(b, rows_q, d);
    a->in2 = pre && ffn ? apti_bump_matrix(b, rows_q, d) : a->y1;
    a->pre = apti_bump_matrix(b, rows_q, f);
    a->other = m->config.gated ? apti_bump_matrix(b, rows_q, f) : NULL;
    a->act = full || apti_rank(m, l, APTI_DOWN) > 0 ? apti_bump_matrix(b, rows_q, f) : NULL;
    a->z2 = ffn ? apti_bump_matrix(b, rows_q, d) : a->y1;
    a->stats2 = (float *)apti_bump_take(b, rows_q * 2, (int64_t)sizeof(float));
    a->y2 = pre ? a->z2 : apti_bump_matrix(b, rows_q, d);
    for (int32_t i = 0; i < APTI_LINEARS; i++)
        a->xa[i] = (float *)apti_bump_take(b, (i == APTI_KEY || i == APTI_VALUE ? a->rows_k : rows_q) * apti_rank(m, l, i),
                                           (int64_t)sizeof(float));
    if (l + 1 < pass->stack[a->stack].end) pass->acts[l + 1].x = a->y2;
}

/* Inference: one set of buffers; a layer's output takes the place of its input. */
static void apti_plan_shared_layers(apti_bump *b, apti_pass *pass, int64_t sequences, const apti_widths *w)
{
    const int64_t d = pass->model->config.hidden, rows = pass->most_rows;
    const bool pre = pass->model->block->pre_norm;
    apti_acts s = APT_ZERO;
    float *xa = (float *)apti_bump_take(b, rows * w->rank, (int64_t)sizeof(float));
    s.q = apti_bump_matrix(b, rows, w->query);
    s.k = apti_bump_matrix(b, rows, w->kv);
    s.v = apti_bump_matrix(b, rows, w->kv);
    float *inner = apti_bump_matrix(b, rows, d);
    s.other = pass->model->config.gated ? apti_bump_matrix(b, rows, w->neurons) : NULL;
    for (int32_t i = 0; i < APTI_LINEARS; i++) s.xa[i] = xa;
    for (int32_t l = 0; l < pass->layers; l++) {
        const int32_t stack = pass->acts[l].stack;
        float *x = pass->acts[pass->stack[stack].first].x;
        s.x = s.xq = s.z2 = s.y2 = x;
        s.z1 = s.y1 = pre ? x : inner;
        s.in1 = pre ? inner : x;
        s.in2 = inner;
        s.stack = stack;
        s.rows_q = pass->stack[stack].rows;
        pass->acts[l] = s;
        apti_plan_memory(pass, l);
    }
    if (pass->lean) {
        apti_acts *last = &pass->acts[pass->layers - 1];
        last->xq = last->in1 = last->z2 = last->y2 = apti_bump_matrix(b, sequences, d);
        last->rows_q = sequences;
    }
}

static void apti_plan_head(apti_bump *b, apti_pass *pass, int64_t rows, int64_t sequences, bool kept)
{
    const apt_config *c = &pass->model->config;
    const int64_t width = apti_head_width(c), d = c->hidden, f = (int64_t)sizeof(float);
    const bool lm = c->task == APT_TASK_LM, mlm = c->task == APT_TASK_MLM || lm, span = c->task == APT_TASK_SPAN;
    const int64_t n = mlm ? rows : sequences, dense = mlm ? d : c->hidden_dense, rank = pass->model->head_a->rows;
    if (!span) pass->head_in = apti_bump_matrix(b, n, d);
    if (!span && !lm) {
        pass->head_pre = apti_bump_matrix(b, n, dense);
        pass->head_out = apti_bump_matrix(b, n, dense);
    }
    if (mlm) {
        pass->head_stats = (float *)apti_bump_take(b, lm ? 0 : 2 * n, f);
        pass->head_norm = lm ? pass->head_in : apti_bump_matrix(b, n, d);       /* what the decoder reads */
        pass->mlm_chunk = apti_max_i64(1, apti_min_i64(n, APTI_LOGITS / apti_ld(width)));
        pass->mlm_work = apti_bump_matrix(b, pass->mlm_chunk, width);
        pass->kl_work = kept && lm ? apti_bump_matrix(b, pass->mlm_chunk, width) : NULL;
        pass->head_xa = (float *)apti_bump_take(b, n * rank, f);
        pass->head_dya = (float *)apti_bump_take(b, kept ? pass->mlm_chunk * rank : 0, f);
    } else {
        pass->logits = (float *)apti_bump_take(b, (span ? rows : sequences) * width, f);
    }
    if (!kept) return;
    if (!mlm) pass->dlogits = (float *)apti_bump_take(b, (span ? rows : sequences) * width, f);
    if (!span) {
        pass->dhead = apti_bump_matrix(b, n, dense);
        pass->dhead_in = lm ? pass->dhead : apti_bump_matrix(b, n, d);
    }
}

/* Rows of both stacks, and which layers belong to them. */
static void apti_plan_stacks(apti_pass *pass, int64_t rows, int64_t target_rows)
{
    const apt_config *c = &pass->model->config;
    const int32_t first = apti_first_stack(c);
    pass->stacks = c->decoder_layers > 0 ? 2 : 1;
    pass->stack[0].first = 0;
    pass->stack[0].end = pass->stack[1].first = first;
    pass->stack[1].end = c->layers;
    pass->stack[0].rows = rows;
    pass->stack[1].rows = pass->stacks > 1 ? target_rows : 0;
    pass->most_rows = apti_max_i64(rows, pass->stack[1].rows);
    pass->rows = rows + pass->stack[1].rows;
    for (int32_t l = 0; l < pass->layers; l++) pass->acts[l].stack = l >= first;
}

/* Embeddings and the final norm of each stack. */
static void apti_plan_stack_buffers(apti_bump *b, apti_pass *pass, bool full)
{
    const apt_model *m = pass->model;
    const int64_t d = m->config.hidden, f = (int64_t)sizeof(float);
    for (int32_t i = 0; i < pass->stacks; i++) {
        apti_stack *stack = &pass->stack[i];
        stack->positions = (int32_t *)apti_bump_take(b, stack->rows, (int64_t)sizeof(int32_t));
        if (m->block->relative)
            stack->bucket = (int32_t *)apti_bump_take(b, 2 * (int64_t)m->config.max_distance + 1, (int64_t)sizeof(int32_t));
        stack->rope = m->block->rotary ? (float *)apti_bump_take(b, stack->rows * m->config.head_dim, f) : NULL;
        pass->acts[stack->first].x = apti_bump_matrix(b, stack->rows, d);
        if (!m->block->pre_norm) continue;
        stack->out = apti_bump_matrix(b, stack->rows, d);
        stack->stats = (float *)apti_bump_take(b, 2 * stack->rows, f);
    }
    if (m->block->pre_norm) return;
    pass->embed_z = full ? apti_bump_matrix(b, pass->most_rows, d) : pass->acts[0].x;
    pass->embed_stats = (float *)apti_bump_take(b, 2 * pass->most_rows, f);
}

/* What the backward of every layer uses in turn. */
static void apti_plan_backward(apti_bump *b, apti_pass *pass, const apti_widths *w)
{
    const apt_config *c = &pass->model->config;
    const int64_t rows = pass->most_rows;
    pass->g = apti_bump_matrix(b, rows, c->hidden);
    pass->t = apti_bump_matrix(b, rows, c->hidden);
    pass->dq = apti_bump_matrix(b, rows, w->query);
    pass->dk = apti_bump_matrix(b, rows, w->kv);
    pass->dv = apti_bump_matrix(b, rows, w->kv);
    pass->dctx = pass->ctx;           /* forward scratch is free again when the backward comes */
    pass->dact = pass->act;
    pass->dother = c->gated ? apti_bump_matrix(b, rows, w->neurons) : NULL;
    pass->dmemory = pass->stacks > 1 ? apti_bump_matrix(b, pass->stack[0].rows, c->hidden) : NULL;
    pass->dya = (float *)apti_bump_take(b, rows * w->rank, (int64_t)sizeof(float));
}

/* Lays out all buffers for `rows` tokens (T5: and target_rows) in `sequences` sequences; with block NULL it only counts. */
static int64_t apti_plan(apti_pass *pass, char *block, int64_t rows, int64_t target_rows, int64_t sequences)
{
    apt_model *m = pass->model;
    const apti_widths w = apti_widest(m);
    const int64_t f = (int64_t)sizeof(float), i = (int64_t)sizeof(int32_t);
    const bool kept = (pass->mode & APTI_PASS_KEEP) != 0, full = (pass->mode & APTI_PASS_FULL) != 0;
    apti_bump b = {block, 0};
    apti_plan_stacks(pass, rows, target_rows);
    const int64_t last_rows = pass->stack[pass->stacks - 1].rows;
    const int64_t labels = m->config.task == APT_TASK_MLM || m->config.task == APT_TASK_LM ? last_rows : 0;
    pass->first = (int32_t *)apti_bump_take(&b, sequences, i);
    pass->one_each = (int32_t *)apti_bump_take(&b, sequences + 1, i);
    pass->mlm_index = (int32_t *)apti_bump_take(&b, labels, i);
    pass->mlm_labels = (int32_t *)apti_bump_take(&b, labels, i);
    pass->target_tokens = (int32_t *)apti_bump_take(&b, pass->stack[1].rows, i);
    pass->head_mask = (float *)apti_bump_take(&b, w.query / m->config.head_dim + 1, f);
    const int64_t bias = m->block->relative ? (int64_t)m->config.bias_heads * (2 * (int64_t)m->config.max_distance + 1) : 0;
    pass->bias = (float *)apti_bump_take(&b, bias, f);
    pass->dbias = (float *)apti_bump_take(&b, full ? bias : 0, f);
    apti_plan_stack_buffers(&b, pass, full);
    for (int32_t l = 0; l < pass->layers && kept; l++)
        apti_plan_kept_layer(&b, pass, l, pass->lean && l == pass->layers - 1 ? sequences : pass->stack[pass->acts[l].stack].rows,
                             full);
    if (!kept) apti_plan_shared_layers(&b, pass, sequences, &w);
    apti_plan_head(&b, pass, last_rows, sequences, kept);
    pass->ctx = apti_bump_matrix(&b, pass->most_rows, w.query);
    pass->act = apti_bump_matrix(&b, pass->most_rows, w.neurons);
    if (kept) apti_plan_backward(&b, pass, &w);
    return b.used;
}

static void apti_pass_free(apt_ctx *ctx, apti_pass *pass)
{
    if (pass == NULL) return;
    apti_free(ctx, pass->block);
    apti_free(ctx, pass->acts);
    apti_free(ctx, pass);
}

static apt_result apti_pass_create(apt_model *model, apti_pass **out)
{
    apti_pass *pass = (apti_pass *)apti_calloc(model->ctx, 1, (int64_t)sizeof(apti_pass));
    apti_acts *acts = (apti_acts *)apti_calloc(model->ctx, model->config.layers, (int64_t)sizeof(apti_acts));
    if (pass == NULL || acts == NULL) {
        apti_free(model->ctx, acts);
        apti_free(model->ctx, pass);
        return apti_fail(model->ctx, APT_E_MEMORY, "no memory for the frame of a pass");
    }
    pass->model = model;
    pass->acts = acts;
    pass->layers = model->config.layers;
    *out = pass;
    return APT_OK;
}

/* Gives the block back; the next apti_pass_prepare takes a new one. */
static void apti_pass_shrink(apti_pass *pass)
{
    apti_free(pass->model->ctx, pass->block);
    pass->block = NULL;
    pass->block_bytes = 0;
}

static apt_result apti_pass_prepare(apti_pass *pass, const apt_batch *batch, uint32_t mode)
{
    apt_ctx *ctx = pass->model->ctx;
    const int64_t rows = batch->offsets[batch->sequences];
    const int64_t target_rows = pass->model->config.decoder_layers > 0 ? batch->target_offsets[batch->sequences] : 0;
    pass->mode = mode;
    pass->lean = apti_lean(pass->model, mode);
    pass->batch = batch;
    const int64_t bytes = apti_plan(pass, NULL, rows, target_rows, batch->sequences);
    if (bytes > pass->block_bytes) {
        apti_pass_shrink(pass);
        pass->block = (char *)apti_alloc(ctx, bytes, 1);
        if (pass->block == NULL)
            return apti_fail(ctx, APT_E_MEMORY, "no memory for the activations of %lld tokens: %lld bytes",
                             (long long)(rows + target_rows), (long long)bytes);
        pass->block_bytes = bytes;
    }
    (void)apti_plan(pass, pass->block, rows, target_rows, batch->sequences);
    return APT_OK;
}

/* ------------------------------------------------------------------------------------------------ checking a batch */

static apt_result apti_check_tokens(const apt_model *model, const apt_batch *b)
{
    const apt_config *c = &model->config;
    const int32_t room = c->family == APT_ROBERTA ? c->positions - c->pad_id - 1 : c->positions;
    for (int32_t s = 0; s < b->sequences; s++) {
        const int32_t n = b->offsets[s + 1] - b->offsets[s];
        if (n < 1 || n > room)
            return apti_fail(model->ctx, APT_E_RANGE, "batch: sequence %d has %d tokens; expected 1..%d", (int)s, (int)n,
                             (int)room);
    }
    for (int32_t i = 0; i < b->offsets[b->sequences]; i++) {
        if (b->tokens[i] < 0 || b->tokens[i] >= c->vocab)
            return apti_fail(model->ctx, APT_E_RANGE, "batch: token %d is id %d; expected 0..%d", (int)i, (int)b->tokens[i],
                             (int)c->vocab - 1);
        if (b->types != NULL && (b->types[i] < 0 || b->types[i] >= c->types))
            return apti_fail(model->ctx, APT_E_RANGE, "batch: token %d has type %d; expected 0..%d", (int)i, (int)b->types[i],
                             (int)c->types - 1);
    }
    return APT_OK;
}

static apt_result apti_check_labels(const apt_model *model, const apt_batch *b)
{
    const apt_config *c = &model->config;
    const int64_t rows = (c->decoder_layers > 0 ? b->target_offsets : b->offsets)[b->sequences];
    const bool each = c->task == APT_TASK_MLM || c->task == APT_TASK_LM;
    const int64_t n = each ? rows : c->task == APT_TASK_SPAN ? 2 * (int64_t)b->sequences : b->sequences;
    if (c->task == APT_TASK_REGRESS) {
        if (b->targets != NULL && !apti_finite_all(b->targets, b->sequences))
            return apti_fail(model->ctx, APT_E_NONFINITE, "batch: a target is NaN or infinite");
        return APT_OK;
    }
    for (int64_t i = 0; i < n && b->labels != NULL; i++) {
        const int32_t s = c->task == APT_TASK_SPAN ? (int32_t)(i / 2) : 0;
        const int32_t top = c->task == APT_TASK_SPAN ? b->offsets[s + 1] - b->offsets[s] : (int32_t)apti_head_width(c);
        const int32_t low = c->task == APT_TASK_SPAN ? -1 : 0;
        if ((b->labels[i] < low || b->labels[i] >= top) && b->labels[i] != -100)
            return apti_fail(model->ctx, APT_E_RANGE, "batch: label %lld is %d; expected %d..%d, or -100 to ignore it",
                             (long long)i, (int)b->labels[i], (int)low, (int)top - 1);
    }
    return APT_OK;
}

/* What a decoder behind an encoder reads. */
static apt_result apti_check_target(const apt_model *model, const apt_batch *b)
{
    const apt_config *c = &model->config;
    if (b->target_offsets == NULL || (b->target_tokens == NULL && b->labels == NULL))
        return apti_fail(model->ctx, APT_E_ARGUMENT, "batch: needs target_offsets, and labels or target_tokens");
    if (b->target_offsets[0] != 0)
        return apti_fail(model->ctx, APT_E_RANGE, "batch: target_offsets[0] is %d; expected 0", (int)b->target_offsets[0]);
    for (int32_t s = 0; s < b->sequences; s++)
        if (b->target_offsets[s + 1] <= b->target_offsets[s])
            return apti_fail(model->ctx, APT_E_RANGE, "batch: target_offsets[%d] is %d, not above %d", (int)s + 1,
                             (int)b->target_offsets[s + 1], (int)b->target_offsets[s]);
    for (int32_t i = 0; b->target_tokens != NULL && i < b->target_offsets[b->sequences]; i++)
        if (b->target_tokens[i] < 0 || b->target_tokens[i] >= c->vocab)
            return apti_fail(model->ctx, APT_E_RANGE, "batch: target token %d is id %d; expected 0..%d", (int)i,
                             (int)b->target_tokens[i], (int)c->vocab - 1);
    return APT_OK;
}

static apt_result apti_check_batch(const apt_model *model, const apt_batch *b, bool training)
{
    if (b == NULL || b->offsets == NULL || b->tokens == NULL || b->sequences < 1)
        return apti_fail(model->ctx, APT_E_ARGUMENT, "batch: needs at least one sequence, offsets and tokens");
    if (b->offsets[0] != 0) return apti_fail(model->ctx, APT_E_RANGE, "batch: offsets[0] is %d; expected 0", (int)b->offsets[0]);
    for (int32_t s = 0; s < b->sequences; s++)
        if (b->offsets[s + 1] <= b->offsets[s])
            return apti_fail(model->ctx, APT_E_RANGE, "batch: offsets[%d] is %d, not above %d", (int)s + 1,
                             (int)b->offsets[s + 1], (int)b->offsets[s]);
    if (training && (model->config.task == APT_TASK_REGRESS ? (const void *)b->targets : (const void *)b->labels) == NULL)
        return apti_fail(model->ctx, APT_E_ARGUMENT, "batch: training needs labels (targets for regression)");
    apt_result r = apti_check_tokens(model, b);
    if (r == APT_OK && model->config.decoder_layers > 0) r = apti_check_target(model, b);
    return r != APT_OK ? r : apti_check_labels(model, b);
}

/* ------------------------------------------------------------------------------------------------ forward */

static apti_linear_op apti_view(const apt_model *model, const apti_param *w, const apti_param *bias, const apti_param *a,
                                const apti_param *b)
{
    apti_linear_op op;
    op.out = w->rows;
    op.in = w->cols;
    op.w = &w->packed;
    op.bias = bias != NULL ? bias->value : NULL;
    op.rank = a != NULL ? a->rows : 0;
    op.scale = model->scale;
    op.a = a != NULL ? a->value : NULL;
    op.b = b != NULL ? b->value : NULL;
    return op;
}

static apti_linear_op apti_layer_view(const apt_model *model, int32_t l, int32_t i)
{
    const apti_layer *layer = &model->layers[l];
    return apti_view(model, layer->slot[2 * i], layer->slot[2 * i + 1], layer->lora_a[i], layer->lora_b[i]);
}

/* apti_linear_forward of a linear map of layer l, or, where it has a compressed copy and rows enough for that to pay, the
   same sums without their zero terms, and the epilogue as an empty product behind them (not where the residual stands in y,
   which these sums would overwrite). */
static void apti_map_forward(const apt_model *m, int32_t l, int32_t linear, float *y, int64_t ldy, const float *x, int64_t ldx,
                             int64_t rows, float *xa, const apti_epilogue *epilogue)
{
    const apti_linear_op op = apti_layer_view(m, l, linear);
    const apt_sparse *sparse = &m->layers[l].slot[2 * linear]->sparse;
    if (sparse->start == NULL || rows < APT_SPARSE_ROWS || (epilogue != NULL && epilogue->residual == y)) {
        apti_linear_forward(m->ctx, &op, y, ldy, x, ldx, rows, xa, epilogue);
        return;
    }
    apti_sparse_run(m->ctx, sparse, op.bias, y, ldy, x, ldx, rows);
    if (epilogue == NULL) return;
    apti_gemm g = apti_gemm_begin(y, ldy, rows, op.out, true);
    apti_gemm_epilogue(&g, epilogue);
    apti_gemm_run(m->ctx, &g);
}

/* Masks of this layer's heads and neurons and of the hidden dimensions; NULL when all are 1. */
typedef struct apti_layer_masks { const float *head, *neuron, *hidden; } apti_layer_masks;

static apti_layer_masks apti_masks_of(const apt_model *model, int32_t l)
{
    apti_layer_masks m = {NULL, NULL, NULL};
    if (model->masks == NULL) return m;
    if (l >= 0) {
        m.head = model->masks + apti_unit_head(model, l);
        m.neuron = model->masks + apti_unit_neuron(model, l);
    }
    m.hidden = model->masks + apti_unit_hidden(model);
    return m;
}

static int64_t apti_probe_head(const apt_model *model, int32_t layer)
{
    int64_t base = 0;
    for (int32_t l = 0; l < layer; l++) base += apti_query_width(model, l) + model->shape[l].neurons;
    return base;
}

static int64_t apti_probe_neuron(const apt_model *model, int32_t layer)
{
    return apti_probe_head(model, layer) + apti_query_width(model, layer);
}

/* Post-norm: point 2l is the input of layer l, 2l + 1 the input of its FFN, 2L the output of the last layer. Pre-norm: 2l is what
   the attention of layer l adds to the residual stream, 2l + 1 what its FFN adds. */
static int32_t apti_probe_points(const apt_model *model)
{
    return 2 * model->config.layers + (model->block->pre_norm ? 0 : 1);
}

static int64_t apti_probe_hidden(const apt_model *model, int32_t point)
{
    return apti_probe_head(model, model->config.layers) + (int64_t)point * model->config.hidden;
}

static int64_t apti_probe_count(const apt_model *model)
{
    return apti_probe_hidden(model, apti_probe_points(model));
}

static void apti_probe_act(const apti_pass *p, int64_t at, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    if (p->probe != NULL) apti_column_abs_sum(p->model->ctx, p->probe->act + at, x, ld, rows, n);
}

static void apti_probe_grad(const apti_pass *p, int64_t at, const float *x, int64_t ld, int64_t rows, int64_t n)
{
    if (p->probe != NULL) apti_column_abs_sum(p->model->ctx, p->probe->grad + at, x, ld, rows, n);
}

/* Relative positions belong to self attention; all layers of a stack read the table of its first one. */
static apti_relative_op apti_relative_of(const apti_pass *p, int32_t l)
{
    const apt_model *m = p->model;
    apti_relative_op op = APT_ZERO;
    op.heads = m->shape[l].heads;
    op.table_heads = m->config.bias_heads;
    op.column = m->bias_head + (int64_t)l * m->config.bias_heads;
    op.buckets = m->config.buckets;
    op.max_distance = m->config.max_distance;
    op.span = m->config.max_distance + 1;
    op.causal = l >= apti_first_stack(&m->config);
    op.bucket = p->stack[p->acts[l].stack].bucket;
    return op;
}

static apti_rotary_op apti_rotary_of(const apti_pass *p, int32_t l, int32_t heads)
{
    apti_rotary_op op = APT_ZERO;
    op.heads = heads;
    op.dim = p->model->config.head_dim;
    op.interleaved = p->model->config.rope.interleaved != 0;
    op.table = p->stack[p->acts[l].stack].rope;
    return op;
}

static apti_attention_op apti_attention_of(const apti_pass *p, int32_t l)
{
    const apt_model *m = p->model;
    const apti_acts *a = &p->acts[l];
    const bool cross = apti_is_cross(&m->config, l);
    apti_attention_op op = APT_ZERO;
    op.heads = m->shape[l].heads;
    op.kv_heads = m->shape[l].kv_heads;
    op.head_dim = m->config.head_dim;
    op.scale = m->block->unscaled ? 1.0f : 1.0f / sqrtf((float)m->config.head_dim);
    op.causal = (m->block->causal || a->stack > 0) && !cross;
    op.sequences = p->batch->sequences;
    op.q_offsets = a->rows_q == p->stack[a->stack].rows ? p->stack[a->stack].offsets : p->one_each;
    op.k_offsets = p->stack[cross ? 0 : a->stack].offsets;
    if (p->cache != NULL && a->stack == p->stacks - 1) {
        op.k_offsets = cross ? p->cache->source_start : p->cache->start;
        op.k_ends = cross ? p->cache->source_end : p->cache->end;
    }
    if (m->block->relative && !cross && op.heads > 0) {
        const apti_relative_op relative = apti_relative_of(p, l);
        apti_relative_forward(&relative, p->bias, m->embed[APTI_RELATIVE + a->stack]->value);
        op.bias = p->bias;
        op.bias_span = relative.span;
    }
    op.head_mask = apti_masks_of(m, l).head;
    if (op.head_mask == NULL || op.heads == op.kv_heads) return op;
    for (int32_t h = 0; h < op.heads; h++) p->head_mask[h] = op.head_mask[h / (op.heads / op.kv_heads)];
    op.head_mask = p->head_mask;      /* a mask belongs to a KV head and so to all its query heads */
    return op;
}

/* The norm of a block; w and b: its parameters, b NULL for RMS. */
static void apti_norm(const apti_pass *p, float *y, float *stats, const float *z, const apti_param *w, const apti_param *b,
                      int64_t rows)
{
    const apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const float *mask = apti_masks_of(m, -1).hidden;
    if (m->block->rms) apti_rmsnorm_forward(m->ctx, y, ld, stats, z, ld, w->value, mask, rows, d, m->config.norm_eps);
    else apti_layernorm_forward(m->ctx, y, ld, stats, z, ld, w->value, b->value, mask, rows, d, m->config.norm_eps);
}

/* z = mask (x + W in): the end of a sublayer. Pre-norm models are probed at what the sublayer adds. */
static void apti_residual_write(apti_pass *p, int32_t l, int32_t linear, float *z, const float *x, const float *in, int64_t ldin,
                                int32_t point)
{
    const apt_model *m = p->model;
    const apti_acts *a = &p->acts[l];
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const float *mask = apti_masks_of(m, l).hidden;
    const apti_epilogue out = {-1, NULL, 0, x, ld, mask};
    if (p->probe == NULL || !m->block->pre_norm) {
        apti_map_forward(m, l, linear, z, ld, in, ldin, a->rows_q, a->xa[linear], &out);
        return;
    }
    apti_map_forward(m, l, linear, p->t, ld, in, ldin, a->rows_q, a->xa[linear], NULL);
    apti_probe_act(p, apti_probe_hidden(m, point), p->t, ld, a->rows_q, d);
    apti_residual(m->ctx, z, ld, p->t, ld, x, ld, mask, a->rows_q, d);
}

/* Adds the new keys and values of layer l to its cache; ldk: of both. */
static void apti_cache_store(const apti_pass *p, int32_t l, int64_t ldk)
{
    const apti_acts *a = &p->acts[l];
    const apti_cache *cache = p->cache;
    const size_t row = (size_t)ldk * sizeof(float);
    if (apti_is_cross(&p->model->config, l)) {
        memcpy(cache->k[l], a->k, (size_t)a->rows_k * row);
        memcpy(cache->v[l], a->v, (size_t)a->rows_k * row);
        return;
    }
    const int32_t *offsets = p->stack[a->stack].offsets;
    for (int32_t s = 0; s < p->batch->sequences; s++) {
        const size_t n = (size_t)(offsets[s + 1] - offsets[s]);
        const int64_t to = (cache->start[s] + cache->before[s]) * ldk, from = offsets[s] * ldk;
        memcpy(cache->k[l] + to, a->k + from, n * row);
        memcpy(cache->v[l] + to, a->v + from, n * row);
    }
}

/* Query, key and value of layer l, turned by their positions. A source that the cache has is not read again. */
static void apti_qkv_forward(apti_pass *p, int32_t l)
{
    const apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    const apti_acts *a = &p->acts[l];
    const int64_t ld = apti_ld(m->config.hidden), ldq = apti_ld(apti_query_width(m, l)), ldk = apti_ld(apti_kv_width(m, l));
    const bool cached = p->cache != NULL && a->stack == p->stacks - 1;
    apti_map_forward(m, l, APTI_QUERY, a->q, ldq, a->in1, ld, a->rows_q, a->xa[APTI_QUERY], NULL);
    if (cached && !p->cache->fill && apti_is_cross(&m->config, l)) return;
    apti_map_forward(m, l, APTI_KEY, a->k, ldk, a->memory, ld, a->rows_k, a->xa[APTI_KEY], NULL);
    apti_map_forward(m, l, APTI_VALUE, a->v, ldk, a->memory, ld, a->rows_k, a->xa[APTI_VALUE], NULL);
    if (m->block->rotary) {
        const apti_rotary_op q = apti_rotary_of(p, l, m->shape[l].heads), k = apti_rotary_of(p, l, m->shape[l].kv_heads);
        apti_rotary_forward(ctx, &q, a->q, ldq, a->rows_q);
        apti_rotary_forward(ctx, &k, a->k, ldk, a->rows_k);
    }
    if (cached) apti_cache_store(p, l, ldk);
}

/* x -> y1, see apti_acts */
static void apti_attention_sublayer(apti_pass *p, int32_t l)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    apti_acts *a = &p->acts[l];
    apti_param *const *slot = m->layers[l].slot;
    const int64_t d = m->config.hidden, ld = apti_ld(d), hq = apti_query_width(m, l), ldk = apti_ld(apti_kv_width(m, l));
    float *o = a->ctx != NULL ? a->ctx : p->ctx;
    const apti_attention_op at = apti_attention_of(p, l);
    if (m->block->pre_norm) apti_norm(p, a->in1, a->stats1, a->x, slot[APTI_NORM1_W], slot[APTI_NORM1_B], a->rows_q);
    else if (a->xq != a->x) apti_gather_rows(ctx, a->xq, ld, a->x, ld, p->first, a->rows_q, d);
    apti_qkv_forward(p, l);
    const bool cached = p->cache != NULL && a->stack == p->stacks - 1;
    apti_attention_forward(ctx, &at, o, apti_ld(hq), a->lse, a->q, apti_ld(hq), cached ? p->cache->k[l] : a->k, ldk,
                           cached ? p->cache->v[l] : a->v, ldk);
    apti_probe_act(p, apti_probe_head(m, l), o, apti_ld(hq), a->rows_q, hq);
    if (p->probe != NULL) apti_column_sum(ctx, p->probe->sum + apti_probe_head(m, l), o, apti_ld(hq), a->rows_q, hq);
    apti_residual_write(p, l, APTI_OUTPUT, a->z1, a->xq, o, apti_ld(hq), 2 * l);
    if (!m->block->pre_norm) apti_norm(p, a->y1, a->stats1, a->z1, slot[APTI_NORM1_W], slot[APTI_NORM1_B], a->rows_q);
}

/* Which input map of a gated FFN goes through the activation; the other one is the factor. */
static int32_t apti_acting(const apt_model *m)
{
    return m->block->gate_acts ? APTI_GATE : APTI_UP;
}

static int32_t apti_factor(const apt_model *m)
{
    return m->block->gate_acts ? APTI_UP : APTI_GATE;
}

/* y1 -> y2, see apti_acts */
static void apti_ffn_sublayer(apti_pass *p, int32_t l)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    apti_acts *a = &p->acts[l];
    apti_param *const *slot = m->layers[l].slot;
    const bool gated = m->config.gated != 0;
    const int64_t ld = apti_ld(m->config.hidden), f = m->shape[l].neurons, ldf = apti_ld(f);
    const apti_layer_masks mask = apti_masks_of(m, l);
    const int32_t acting = gated ? apti_acting(m) : APTI_UP;
    float *act = a->act != NULL ? a->act : p->act;
    const apti_epilogue up = {(int32_t)m->config.activation, a->pre, ldf, NULL, 0, gated ? NULL : mask.neuron};
    if (m->block->pre_norm) apti_norm(p, a->in2, a->stats2, a->y1, slot[APTI_NORM2_W], slot[APTI_NORM2_B], a->rows_q);
    apti_map_forward(m, l, acting, act, ldf, a->in2, ld, a->rows_q, a->xa[acting], &up);
    if (gated) {
        const int32_t factor = apti_factor(m);
        apti_map_forward(m, l, factor, a->other, ldf, a->in2, ld, a->rows_q, a->xa[factor], NULL);
        apti_gate_forward(ctx, act, ldf, act, ldf, a->other, ldf, mask.neuron, a->rows_q, f);
    }
    apti_probe_act(p, apti_probe_neuron(m, l), act, ldf, a->rows_q, f);
    apti_residual_write(p, l, APTI_DOWN, a->z2, a->y1, act, ldf, 2 * l + 1);
    if (!m->block->pre_norm) apti_norm(p, a->y2, a->stats2, a->z2, slot[APTI_NORM2_W], slot[APTI_NORM2_B], a->rows_q);
}

/* Angles per position of each pair of a head; LLaMA 3 slows those down whose wave is long against the text it was trained on. */
static void apti_rotary_frequencies(float *frequency, const apt_rope *rope, int32_t dim)
{
    for (int32_t i = 0; i < dim / 2; i++) {
        double f = 1.0 / pow((double)rope->theta, 2.0 * i / dim);
        if (rope->factor > 0) {
            const double waves = (double)rope->original_positions * f / 6.283185307179586, low = rope->low_factor,
                         high = rope->high_factor;
            const double share = (waves - low) / (high - low), smooth = share < 0 ? 0 : share > 1 ? 1 : share;
            f = (1 - smooth) * f / (double)rope->factor + smooth * f;
        }
        frequency[i] = (float)f;
    }
}

/* What the decoder reads: the target, or the labels moved by one. */
static void apti_index_target(apti_pass *p)
{
    const apt_batch *b = p->batch;
    const apt_config *c = &p->model->config;
    for (int32_t s = 0; s < b->sequences; s++)
        for (int32_t i = b->target_offsets[s]; i < b->target_offsets[s + 1]; i++) {
            const int32_t before = b->target_tokens != NULL ? b->target_tokens[i]
                                   : i == b->target_offsets[s] ? c->start_id
                                                               : b->labels[i - 1];
            p->target_tokens[i] = before == -100 ? c->pad_id : before;
        }
    p->stack[1].offsets = b->target_offsets;
    p->stack[1].tokens = p->target_tokens;
}

/* MLM: labels stand at their tokens; LM behind an encoder too; a decoder alone predicts a token from the row before it. */
static void apti_index_labels(apti_pass *p)
{
    const apt_batch *b = p->batch;
    const apt_config *c = &p->model->config;
    const apti_stack *stack = &p->stack[p->stacks - 1];
    const bool next = c->task == APT_TASK_LM && p->stacks == 1;
    p->labelled = 0;
    if (b->labels == NULL || (c->task != APT_TASK_MLM && c->task != APT_TASK_LM)) return;
    for (int32_t s = 0; s < b->sequences; s++)
        for (int32_t i = stack->offsets[s] + next; i < stack->offsets[s + 1]; i++) {
            if (b->labels[i] == -100) continue;
            p->mlm_index[p->labelled] = i - next;
            p->mlm_labels[p->labelled++] = b->labels[i];
        }
}

/* What all layers of a stack know of positions: angles of its rows, buckets of distances. */
static void apti_index_positions(apti_pass *p, const apti_stack *stack)
{
    const apt_model *m = p->model;
    const int32_t dim = m->config.head_dim;
    if (m->block->rotary) {
        apti_rotary_frequencies(p->frequency, &m->config.rope, dim);
        apti_rotary_table(m->ctx, stack->rope, stack->positions, p->frequency, stack->rows, dim);
    }
    if (m->block->relative) {
        const apti_relative_op op = apti_relative_of(p, stack->first);
        apti_relative_buckets(stack->bucket, &op);
    }
}

/* Positions, first rows, labelled rows. */
static void apti_index_batch(apti_pass *p)
{
    const apt_batch *b = p->batch;
    const apt_model *m = p->model;
    const apt_config *c = &m->config;
    const int32_t base = c->family == APT_ROBERTA ? c->pad_id + 1 : 0;
    p->stack[0].offsets = b->offsets;
    p->stack[0].tokens = b->tokens;
    if (p->stacks > 1) apti_index_target(p);
    for (int32_t s = 0; s < b->sequences; s++) {
        p->first[s] = b->offsets[s];
        p->one_each[s] = s;
        for (int32_t k = 0; k < p->stacks; k++)
            for (int32_t i = p->stack[k].offsets[s]; i < p->stack[k].offsets[s + 1]; i++)
                p->stack[k].positions[i] =
                    base + i - p->stack[k].offsets[s] + (p->cache != NULL && k == p->stacks - 1 ? p->cache->before[s] : 0);
    }
    p->one_each[b->sequences] = b->sequences;
    apti_index_labels(p);
    for (int32_t k = 0; k < p->stacks; k++) apti_index_positions(p, &p->stack[k]);
}

typedef struct apti_embed_job { const apti_pass *p; const apti_stack *stack; float *x; } apti_embed_job;

/* The same sum as apti_embed_forward from tables of which this model reads some columns only. */
static void apti_embed_columns_task(int64_t index, int32_t thread, void *arg)
{
    const apti_embed_job *job = (const apti_embed_job *)arg;
    const apt_model *m = job->p->model;
    const apti_stack *stack = job->stack;
    const int32_t *types = job->p->batch->types;
    const int64_t d = m->config.hidden, ld = apti_ld(d), end = apti_min_i64(stack->rows, (index + 1) * 64);
    (void)thread;
    for (int64_t i = index * 64; i < end; i++) {
        const int32_t id[] = {stack->tokens[i], stack->positions[i], types != NULL ? types[i] : 0};
        float *x = job->x + i * ld;
        for (int32_t k = 0; k < 3; k++) {             /* APTI_WORD, APTI_POSITION, APTI_TYPE */
            const apti_param *e = m->embed[k];
            if (e == NULL) continue;
            const float *row = e->value + id[k] * (e->columns != NULL ? e->stride : d);
            for (int64_t j = 0; j < d; j++) x[j] = (k > 0 ? x[j] : 0.0f) + row[e->columns != NULL ? e->columns[j] : j];
        }
    }
}

/* Rows of a table that exists as panels only, because it is the LM head as well. */
static void apti_embed_panels_task(int64_t index, int32_t thread, void *arg)
{
    const apti_embed_job *job = (const apti_embed_job *)arg;
    const apti_packed *e = &job->p->model->embed[APTI_WORD]->packed;
    const int64_t d = e->k, ld = apti_ld(d), end = apti_min_i64(job->stack->rows, (index + 1) * 64);
    (void)thread;
    for (int64_t i = index * 64; i < end; i++) {
        const int64_t token = job->stack->tokens[i], at = token / e->nr * d * e->nr + token % e->nr;
        float *x = job->x + i * ld;
        if (e->type == APT_BF16)
            for (int64_t j = 0; j < d; j++) x[j] = apti_bf16_to_f32(((const uint16_t *)e->data)[at + j * e->nr]);
        else
            for (int64_t j = 0; j < d; j++) x[j] = ((const float *)e->data)[at + j * e->nr];
    }
}

/* x(rows, d) *= hidden mask: a write to the residual stream, and its backward. */
static void apti_mask_hidden(const apti_pass *p, float *x, int64_t rows)
{
    const apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const float *mask = apti_masks_of(m, -1).hidden;
    if (mask != NULL) apti_act_backward(m->ctx, x, ld, x, ld, NULL, 0, mask, rows, d, -1);
}

/* Post-norm: x = norm(word + position + type). Pre-norm: x = mask word */
static void apti_embed(apti_pass *p, const apti_stack *stack)
{
    apt_model *m = p->model;
    apti_param *const *e = m->embed;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    float *first = p->acts[stack->first].x;
    apti_embed_job job = {p, stack, m->block->pre_norm ? first : p->embed_z};
    bool columns = false;
    for (int32_t k = 0; k < 3; k++) columns = columns || (e[k] != NULL && e[k]->columns != NULL);
    if (columns) apti_parallel_for(m->ctx, apti_ceil_div(stack->rows, 64), apti_embed_columns_task, &job);
    else if (e[APTI_WORD]->value == NULL) apti_parallel_for(m->ctx, apti_ceil_div(stack->rows, 64), apti_embed_panels_task, &job);
    else
        apti_embed_forward(m->ctx, job.x, ld, e[APTI_WORD]->value, e[APTI_POSITION] != NULL ? e[APTI_POSITION]->value : NULL,
                           e[APTI_TYPE] != NULL ? e[APTI_TYPE]->value : NULL, stack->tokens, stack->positions, p->batch->types,
                           stack->rows, d);
    if (!m->block->pre_norm) apti_norm(p, first, p->embed_stats, job.x, e[APTI_EMBED_NORM_W], e[APTI_EMBED_NORM_B], stack->rows);
    else apti_mask_hidden(p, first, stack->rows);
}

/* CLASSIFY, REGRESS: logits = W_out tanh(W_dense h_first + b) + b; SPAN: logits = W_out h + b */
static void apti_head_forward(apti_pass *p)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    const apti_acts *last = &p->acts[p->layers - 1];
    const int64_t d = m->config.hidden, ld = apti_ld(d), width = apti_head_width(&m->config), n = p->batch->sequences;
    const apti_linear_op out = apti_view(m, m->head[APTI_HEAD_OUT_W], m->head[APTI_HEAD_OUT_B], NULL, NULL);
    if (m->config.task == APT_TASK_SPAN) {
        apti_linear_forward(ctx, &out, p->logits, width, last->y2, ld, p->rows, NULL, NULL);
        return;
    }
    const apti_linear_op dense = apti_view(m, m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    const int64_t ldo = apti_ld(dense.out);
    if (p->lean) apti_gather_rows(ctx, p->head_in, ld, last->y2, ld, p->one_each, n, d);
    else apti_gather_rows(ctx, p->head_in, ld, last->y2, ld, p->first, n, d);
    apti_linear_forward(ctx, &dense, p->head_pre, ldo, p->head_in, ld, n, NULL, NULL);
    for (int64_t i = 0; i < n; i++) apti_tanh_forward(ctx, p->head_out + i * ldo, p->head_pre + i * ldo, dense.out);
    apti_linear_forward(ctx, &out, p->logits, width, p->head_out, ldo, n, NULL, NULL);
}

/* MLM: h' = LN(act(W h + b)) over the labelled rows; the decoder is tied to the word embeddings. */
static void apti_mlm_forward(apti_pass *p)
{
    apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const apti_linear_op dense = apti_view(m, m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    const apti_epilogue act = {(int32_t)m->config.activation, p->head_pre, ld, NULL, 0, NULL};
    apti_gather_rows(m->ctx, p->head_in, ld, p->acts[p->layers - 1].y2, ld, p->mlm_index, p->labelled, d);
    apti_linear_forward(m->ctx, &dense, p->head_out, ld, p->head_in, ld, p->labelled, NULL, &act);
    apti_layernorm_forward(m->ctx, p->head_norm, ld, p->head_stats, p->head_out, ld, m->head[APTI_HEAD_NORM_W]->value,
                           m->head[APTI_HEAD_NORM_B]->value, apti_masks_of(m, -1).hidden, p->labelled, d, m->config.norm_eps);
}

/* T5 v1.0 divides by sqrt(d) in front of the LM head: the d of the dense model, whatever is pruned. */
static void apti_head_scale(const apti_pass *p, float *x, int64_t rows)
{
    const apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const float s = 1.0f / sqrtf((float)m->config.hidden_dense);
    for (int64_t i = 0; m->config.scaled_head && i < rows; i++) m->ctx->kernels->scale(x + i * ld, x + i * ld, s, d);
}

/* LM: the labelled rows of the last norm; the head is a product with E, see apti_lm_loss. */
static void apti_lm_forward(apti_pass *p)
{
    const apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    apti_gather_rows(m->ctx, p->head_in, ld, p->stack[p->stacks - 1].out, ld, p->mlm_index, p->labelled, d);
    apti_head_scale(p, p->head_in, p->labelled);
}

/* One stack from its embeddings to its last norm. */
static void apti_stack_forward(apti_pass *pass, int32_t which)
{
    apt_model *m = pass->model;
    const apti_stack *stack = &pass->stack[which];
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const bool post = !m->block->pre_norm;
    apti_embed(pass, stack);
    for (int32_t l = stack->first; l < stack->end; l++) {
        const apti_acts *a = &pass->acts[l];
        if (post) apti_probe_act(pass, apti_probe_hidden(m, 2 * l), a->x, ld, stack->rows, d);
        apti_attention_sublayer(pass, l);
        if (post) apti_probe_act(pass, apti_probe_hidden(m, 2 * l + 1), a->y1, ld, a->rows_q, d);
        if (apti_has_ffn(&m->config, l)) apti_ffn_sublayer(pass, l);
        if (pass->capture != NULL && pass->capture[l] != NULL)
            for (int64_t i = 0; i < a->rows_q; i++) memcpy(pass->capture[l] + i * d, a->y2 + i * ld, (size_t)d * sizeof(float));
    }
    const apti_acts *last = &pass->acts[stack->end - 1];
    if (post) apti_probe_act(pass, apti_probe_hidden(m, 2 * pass->layers), last->y2, ld, last->rows_q, d);
    else apti_norm(pass, stack->out, stack->stats, last->y2, m->embed[APTI_FINAL_NORM + which], NULL, stack->rows);
}

/* All stacks up to the logits (MLM and LM: up to the decoder's input). */
static apt_result apti_forward(apti_pass *pass, const apt_batch *batch, uint32_t mode)
{
    const apt_result r = apti_pass_prepare(pass, batch, mode);
    if (r != APT_OK) return r;
    apti_index_batch(pass);
    const bool later = pass->cache != NULL && !pass->cache->fill;     /* the source has been read */
    for (int32_t k = later ? pass->stacks - 1 : 0; k < pass->stacks; k++) apti_stack_forward(pass, k);
    if (pass->model->config.task == APT_TASK_LM) apti_lm_forward(pass);
    else if (pass->model->config.task == APT_TASK_MLM) apti_mlm_forward(pass);
    else apti_head_forward(pass);
    return APT_OK;
}

/* That matrix, with its bias where MLM has one and its adapter where LM has one. */
static apti_lm_op apti_decoder_of(const apti_pass *p)
{
    const apt_model *m = p->model;
    const apti_param *w = apti_decoder_matrix(m);
    apti_lm_op op;
    op.head = apti_view(m, w, m->head[APTI_HEAD_OUT_B], m->head_a, m->head_b);
    if (!w->linear) op.head.w = NULL;
    op.e = w->value;
    op.xa = p->head_xa;
    op.dya = p->head_dya;
    return op;
}

static apti_linear_grad apti_grads(const apti_param *w, const apti_param *bias, const apti_param *a, const apti_param *b)
{
    apti_linear_grad g;
    g.w = w->grad;
    g.bias = bias != NULL ? bias->grad : NULL;
    g.a = a != NULL ? a->grad : NULL;
    g.b = b != NULL ? b->grad : NULL;
    return g;
}

static apti_linear_grad apti_decoder_grads(const apt_model *m)
{
    return apti_grads(apti_decoder_matrix(m), m->head[APTI_HEAD_OUT_B], m->head_a, m->head_b);
}

/* ------------------------------------------------------------------------------------------------ losses

   loss_sum / loss_count is the mean. With `grad`, dlogits (MLM: dhead of the normed rows) become grad_scale times its
   gradient. */
static void apti_task_loss(apti_pass *p, bool grad, float grad_scale)
{
    apt_model *m = p->model;
    const apt_batch *b = p->batch;
    const int64_t width = apti_head_width(&m->config), n = b->sequences;
    float *dlogits = grad ? p->dlogits : NULL;
    p->loss_sum = 0;
    p->loss_count = p->correct = 0;
    if (m->config.task == APT_TASK_REGRESS) {
        if (b->targets == NULL) return;
        p->loss_sum = apti_regression(m->ctx, dlogits, p->logits, b->targets, n, grad_scale);
        p->loss_count = n;
    } else if (b->labels == NULL) {
        return;
    } else if (m->config.task == APT_TASK_CLASSIFY) {
        p->loss_sum = apti_cross_entropy(m->ctx, dlogits, width, p->logits, width, b->labels, n, width, -100, grad_scale,
                                         &p->loss_count, &p->correct);
    } else if (m->config.task == APT_TASK_SPAN) {
        p->loss_sum = apti_span_loss(m->ctx, dlogits, p->logits, 2, b->labels, b->offsets, b->sequences, grad_scale,
                                     &p->loss_count, &p->correct);
    } else {
        const apti_lm_op op = apti_decoder_of(p);
        const apti_linear_grad grads = apti_decoder_grads(m);
        const int64_t ld = apti_ld(m->config.hidden);
        p->loss_sum = apti_lm_loss(m->ctx, &op, p->dhead, ld, grad ? &grads : NULL, p->head_norm, ld, p->mlm_labels, p->labelled,
                                   -100, grad_scale, p->mlm_work, p->mlm_chunk, &p->loss_count, &p->correct);
    }
}

static double apti_mean_loss(const apti_pass *p)
{
    return p->loss_count > 0 ? p->loss_sum / (double)p->loss_count : 0;
}

/* ------------------------------------------------------------------------------------------------ backward */

static apti_linear_grad apti_layer_grads(const apt_model *model, int32_t l, int32_t i)
{
    const apti_layer *layer = &model->layers[l];
    return apti_grads(layer->slot[2 * i], layer->slot[2 * i + 1], layer->lora_a[i], layer->lora_b[i]);
}

/* Layer -1 stands for the embeddings: the lowest place that wants a gradient; `layers` when only the head does. */
static int32_t apti_lowest_trainable(const apt_model *model)
{
    int32_t lowest = model->config.layers;
    for (int32_t i = 0; i < APTI_EMBED_SLOTS; i++)
        if (model->embed[i] != NULL && model->embed[i]->trainable) return -1;
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        if (p->trainable && p->layer >= 0 && apti_param_count(p) > 0 && p->layer < lowest) lowest = p->layer;
    }
    return lowest;
}

/* dlogits -> gradient of the last hidden state in pass->g (lean: of its first rows only). */
static void apti_head_backward(apti_pass *p)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    const apti_acts *last = &p->acts[p->layers - 1];
    const int64_t d = m->config.hidden, ld = apti_ld(d), width = apti_head_width(&m->config), n = p->batch->sequences;
    const apti_linear_op out = apti_view(m, m->head[APTI_HEAD_OUT_W], m->head[APTI_HEAD_OUT_B], NULL, NULL);
    const apti_linear_grad gout = apti_grads(m->head[APTI_HEAD_OUT_W], m->head[APTI_HEAD_OUT_B], NULL, NULL);
    if (m->config.task == APT_TASK_SPAN) {
        apti_linear_backward(ctx, &out, p->g, ld, false, p->dlogits, width, last->y2, ld, NULL, NULL, p->rows, &gout);
        return;
    }
    const apti_linear_op dense = apti_view(m, m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    const apti_linear_grad gdense = apti_grads(m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    const int64_t ldo = apti_ld(dense.out);
    apti_linear_backward(ctx, &out, p->dhead, ldo, false, p->dlogits, width, p->head_out, ldo, NULL, NULL, n, &gout);
    for (int64_t i = 0; i < n; i++)
        apti_tanh_backward(ctx, p->dhead + i * ldo, p->dhead + i * ldo, p->head_out + i * ldo, dense.out);
    apti_linear_backward(ctx, &dense, p->dhead_in, ld, false, p->dhead, ldo, p->head_in, ld, NULL, NULL, n, &gdense);
    apti_scatter_rows(ctx, p->g, ld, p->dhead_in, ld, p->lean ? p->one_each : p->first, n, d, last->rows_q);
}

static void apti_mlm_backward(apti_pass *p)
{
    apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const apti_linear_op dense = apti_view(m, m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    const apti_linear_grad grad = apti_grads(m->head[APTI_HEAD_DENSE_W], m->head[APTI_HEAD_DENSE_B], NULL, NULL);
    apti_layernorm_backward(m->ctx, p->dhead, ld, m->head[APTI_HEAD_NORM_W]->grad, m->head[APTI_HEAD_NORM_B]->grad, p->dhead, ld,
                            p->head_out, ld, p->head_stats, m->head[APTI_HEAD_NORM_W]->value, apti_masks_of(m, -1).hidden,
                            p->labelled, d);
    apti_act_backward(m->ctx, p->dhead, ld, p->dhead, ld, p->head_pre, ld, NULL, p->labelled, d, (int32_t)m->config.activation);
    apti_linear_backward(m->ctx, &dense, p->dhead_in, ld, false, p->dhead, ld, p->head_in, ld, NULL, NULL, p->labelled, &grad);
    apti_scatter_rows(m->ctx, p->g, ld, p->dhead_in, ld, p->mlm_index, p->labelled, d, p->rows);
}

static void apti_lm_backward(apti_pass *p)
{
    apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    apti_head_scale(p, p->dhead, p->labelled);
    apti_scatter_rows(m->ctx, p->g, ld, p->dhead, ld, p->mlm_index, p->labelled, d, p->stack[p->stacks - 1].rows);
}

/* out: gradient of z from g, that of y = norm(z); out may be g */
static void apti_norm_grad(const apti_pass *p, float *out, const float *g, const float *z, const float *stats, apti_param *w,
                           apti_param *b, int64_t rows)
{
    const apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const float *mask = apti_masks_of(m, -1).hidden;
    if (m->block->rms) apti_rmsnorm_backward(m->ctx, out, ld, w->grad, g, ld, z, ld, stats, w->value, mask, rows, d);
    else apti_layernorm_backward(m->ctx, out, ld, w->grad, b->grad, g, ld, z, ld, stats, w->value, mask, rows, d);
}

/* Post-norm, y = mask LN(z), z = mask (...): g(y) -> out, before the mask on z. Masks in (0,1) act twice, as they did forward.
   Pre-norm, y = z: the mask in place; what comes out is the gradient of both terms of the sum. */
static void apti_residual_grad(apti_pass *p, int32_t l, int32_t slot, float *out, const float *g, const float *z,
                               const float *stats, int32_t point)
{
    apt_model *m = p->model;
    const int64_t rows = p->acts[l].rows_q;
    const apti_layer *layer = &m->layers[l];
    if (!m->block->pre_norm) apti_norm_grad(p, out, g, z, stats, layer->slot[slot], layer->slot[slot + 1], rows);
    apti_mask_hidden(p, out, rows);
    if (m->block->pre_norm)
        apti_probe_grad(p, apti_probe_hidden(m, point), out, apti_ld(m->config.hidden), rows, m->config.hidden);
}

/* Pre-norm: t, the gradient of norm(x), goes through the norm and joins g, that of the sum behind it. */
static void apti_join_norm(apti_pass *p, int32_t l, int32_t slot, const float *x, const float *stats)
{
    apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d), rows = p->acts[l].rows_q;
    apti_norm_grad(p, p->t, p->t, x, stats, m->layers[l].slot[slot], m->layers[l].slot[slot + 1], rows);
    apti_residual(m->ctx, p->g, ld, p->g, ld, p->t, ld, NULL, rows, d);
}

/* The input maps: dact, the gradient of the value that the down projection reads -> t, that of in2, added where post-norm has the
   residual's part there already. */
static void apti_ffn_inputs_backward(apti_pass *p, int32_t l)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    const apti_acts *a = &p->acts[l];
    const int64_t ld = apti_ld(m->config.hidden), f = m->shape[l].neurons, ldf = apti_ld(f);
    const float *mask = apti_masks_of(m, l).neuron;
    const bool gated = m->config.gated != 0;
    const int32_t acting = gated ? apti_acting(m) : APTI_UP, kind = (int32_t)m->config.activation;
    if (gated)
        apti_gate_backward(ctx, p->dact, ldf, p->dother, ldf, p->dact, ldf, a->pre, ldf, a->other, ldf, mask, a->rows_q, f, kind);
    else apti_act_backward(ctx, p->dact, ldf, p->dact, ldf, a->pre, ldf, mask, a->rows_q, f, kind);
    apti_linear_op op = apti_layer_view(m, l, acting);
    apti_linear_grad grad = apti_layer_grads(m, l, acting);
    apti_linear_backward(ctx, &op, p->t, ld, !m->block->pre_norm, p->dact, ldf, a->in2, ld, a->xa[acting], p->dya, a->rows_q,
                         &grad);
    if (!gated) return;
    const int32_t factor = apti_factor(m);
    op = apti_layer_view(m, l, factor);
    grad = apti_layer_grads(m, l, factor);
    apti_linear_backward(ctx, &op, p->t, ld, true, p->dother, ldf, a->in2, ld, a->xa[factor], p->dya, a->rows_q, &grad);
}

/* g: gradient of y2 -> gradient of y1, post-norm in t, pre-norm in g */
static void apti_ffn_backward(apti_pass *p, int32_t l)
{
    apt_model *m = p->model;
    const apti_acts *a = &p->acts[l];
    const int64_t ld = apti_ld(m->config.hidden), f = m->shape[l].neurons, ldf = apti_ld(f);
    float *sum = m->block->pre_norm ? p->g : p->t;
    const apti_linear_op op = apti_layer_view(m, l, APTI_DOWN);
    const apti_linear_grad grad = apti_layer_grads(m, l, APTI_DOWN);
    apti_residual_grad(p, l, APTI_NORM2_W, sum, p->g, a->z2, a->stats2, 2 * l + 1);
    apti_linear_backward(m->ctx, &op, p->dact, ldf, false, sum, ld, a->act, ldf, a->xa[APTI_DOWN], p->dya, a->rows_q, &grad);
    apti_probe_grad(p, apti_probe_neuron(m, l), p->dact, ldf, a->rows_q, f);
    apti_ffn_inputs_backward(p, l);
    if (m->block->pre_norm) apti_join_norm(p, l, APTI_NORM2_W, a->y1, a->stats2);
}

/* The three input projections: dq, dk, dv -> their adapters and, when wanted, the gradient of what they read. Post-norm: g, which
   holds the residual's part. Pre-norm: t; cross attention: what keys and values read is the first stack's. */
static void apti_qkv_backward(apti_pass *p, int32_t l, bool want_dx, bool want_memory)
{
    apt_model *m = p->model;
    apt_ctx *ctx = m->ctx;
    const apti_acts *a = &p->acts[l];
    const int64_t d = m->config.hidden, ld = apti_ld(d), ldq = apti_ld(apti_query_width(m, l)),
                  ldk = apti_ld(apti_kv_width(m, l));
    const bool pre = m->block->pre_norm, lean = a->xq != a->x, cross = apti_is_cross(&m->config, l);
    apti_linear_op op = apti_layer_view(m, l, APTI_QUERY);
    apti_linear_grad grad = apti_layer_grads(m, l, APTI_QUERY);
    apti_linear_backward(ctx, &op, !want_dx ? NULL : pre ? p->t : p->g, ld, !pre, p->dq, ldq, a->in1, ld, a->xa[APTI_QUERY],
                         p->dya, a->rows_q, &grad);
    float *dx = !want_dx ? NULL : lean || pre ? p->t : p->g;
    if (cross) dx = want_memory ? p->dmemory : NULL;
    op = apti_layer_view(m, l, APTI_KEY);
    grad = apti_layer_grads(m, l, APTI_KEY);
    apti_linear_backward(ctx, &op, dx, ld, !lean, p->dk, ldk, a->memory, ld, a->xa[APTI_KEY], p->dya, a->rows_k, &grad);
    op = apti_layer_view(m, l, APTI_VALUE);
    grad = apti_layer_grads(m, l, APTI_VALUE);
    apti_linear_backward(ctx, &op, dx, ld, true, p->dv, ldk, a->memory, ld, a->xa[APTI_VALUE], p->dya, a->rows_k, &grad);
    if (!lean || !want_dx) return;
    apti_scatter_rows(ctx, p->t, ld, p->g, ld, p->first, a->rows_q, d, 0);   /* queried rows join the others */
    float *swap = p->g;
    p->g = p->t;
    p->t = swap;
}

/* Scores and context of layer l: dctx -> dq, dk, dv before the positions turned them, and the gradient of the relative bias */
static void apti_attention_grads(apti_pass *p, int32_t l)
{
    apt_model *m = p->model;
    const apti_acts *a = &p->acts[l];
    const int64_t ldq = apti_ld(apti_query_width(m, l)), ldk = apti_ld(apti_kv_width(m, l));
    const apti_attention_op at = apti_attention_of(p, l);
    apti_param *table = at.bias != NULL ? m->embed[APTI_RELATIVE + a->stack] : NULL;
    float *dbias = table != NULL && table->grad != NULL ? p->dbias : NULL;
    if (dbias != NULL) memset(dbias, 0, (size_t)(at.heads * (2 * (int64_t)at.bias_span - 1)) * sizeof(float));
    apti_attention_backward(m->ctx, &at, p->dq, ldq, p->dk, ldk, p->dv, ldk, dbias, p->dctx, ldq, a->ctx, ldq, a->lse, a->q, ldq,
                            a->k, ldk, a->v, ldk);
    if (dbias != NULL) {
        const apti_relative_op relative = apti_relative_of(p, l);
        apti_relative_backward(&relative, table->grad, dbias);
    }
    if (!m->block->rotary) return;
    const apti_rotary_op q = apti_rotary_of(p, l, m->shape[l].heads), k = apti_rotary_of(p, l, m->shape[l].kv_heads);
    apti_rotary_backward(m->ctx, &q, p->dq, ldq, a->rows_q);
    apti_rotary_backward(m->ctx, &k, p->dk, ldk, a->rows_k);
}

/* Gradient of y1 (post-norm: t, pre-norm: g) -> g: gradient of x */
static void apti_attention_sublayer_backward(apti_pass *p, int32_t l, bool want_dx, bool want_memory)
{
    apt_model *m = p->model;
    const apti_acts *a = &p->acts[l];
    const int64_t ld = apti_ld(m->config.hidden), hq = apti_query_width(m, l), ldq = apti_ld(hq);
    const apti_linear_op op = apti_layer_view(m, l, APTI_OUTPUT);
    const apti_linear_grad grad = apti_layer_grads(m, l, APTI_OUTPUT);
    apti_residual_grad(p, l, APTI_NORM1_W, p->g, p->t, a->z1, a->stats1, 2 * l);
    apti_linear_backward(m->ctx, &op, p->dctx, ldq, false, p->g, ld, a->ctx, ldq, a->xa[APTI_OUTPUT], p->dya, a->rows_q, &grad);
    apti_probe_grad(p, apti_probe_head(m, l), p->dctx, ldq, a->rows_q, hq);
    apti_attention_grads(p, l);
    apti_qkv_backward(p, l, want_dx, want_memory);
    if (m->block->pre_norm && want_dx) apti_join_norm(p, l, APTI_NORM1_W, a->x, a->stats1);
}

static void apti_embed_backward_pass(apti_pass *p, const apti_stack *stack)
{
    apt_model *m = p->model;
    apti_param *const *e = m->embed;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    float *dx = p->g;
    if (!m->block->pre_norm) {
        dx = p->t;
        apti_norm_grad(p, dx, p->g, p->embed_z, p->embed_stats, e[APTI_EMBED_NORM_W], e[APTI_EMBED_NORM_B], stack->rows);
    } else {
        apti_mask_hidden(p, dx, stack->rows);
    }
    apti_embed_backward(m->ctx, e[APTI_WORD]->grad, e[APTI_POSITION] != NULL ? e[APTI_POSITION]->grad : NULL,
                        e[APTI_TYPE] != NULL ? e[APTI_TYPE]->grad : NULL, dx, ld, stack->tokens, stack->positions,
                        p->batch->types, stack->rows, d);
}

/* One stack, from g, the gradient of its output, down to `lowest` (-1: through the embeddings). */
static void apti_stack_backward(apti_pass *p, int32_t which, int32_t lowest)
{
    apt_model *m = p->model;
    const apti_stack *stack = &p->stack[which];
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const bool post = !m->block->pre_norm, memory = lowest < p->stack[0].end;
    if (!post)
        apti_norm_grad(p, p->g, p->g, p->acts[stack->end - 1].y2, stack->stats, m->embed[APTI_FINAL_NORM + which], NULL,
                       stack->rows);
    for (int32_t l = stack->end - 1; l >= stack->first && l >= lowest; l--) {
        const apti_acts *a = &p->acts[l];
        const bool bottom = l == (lowest > stack->first ? lowest : stack->first);
        if (p->inject != NULL) p->inject(p->inject_user, l, p->g, ld);
        if (post && l == p->layers - 1) apti_probe_grad(p, apti_probe_hidden(m, 2 * p->layers), p->g, ld, a->rows_q, d);
        if (apti_has_ffn(&m->config, l)) apti_ffn_backward(p, l);
        if (post) apti_probe_grad(p, apti_probe_hidden(m, 2 * l + 1), p->t, ld, a->rows_q, d);
        apti_attention_sublayer_backward(p, l, !bottom || lowest < 0 || (post && p->probe != NULL), memory);
        if (post) apti_probe_grad(p, apti_probe_hidden(m, 2 * l), p->g, ld, stack->rows, d);
    }
    if (lowest < 0) apti_embed_backward_pass(p, stack);
}

/* From dlogits down to the lowest place that wants a gradient; with a probe or a loss of the trainer's at some layer down to the
   first layer's input. Gradients are +=. */
static void apti_backward(apti_pass *p)
{
    apt_model *m = p->model;
    const int64_t d = m->config.hidden, ld = apti_ld(d);
    const bool whole = p->probe != NULL || p->inject != NULL;
    const int32_t trained = apti_lowest_trainable(m), lowest = whole && trained > 0 ? 0 : trained;
    if (m->config.task == APT_TASK_LM) apti_lm_backward(p);
    else if (m->config.task == APT_TASK_MLM) apti_mlm_backward(p);
    else apti_head_backward(p);
    if (p->stacks > 1) {
        memset(p->dmemory, 0, (size_t)(p->stack[0].rows * ld) * sizeof(float));
        apti_stack_backward(p, 1, lowest);
        for (int64_t i = 0; i < p->stack[0].rows; i++) memcpy(p->g + i * ld, p->dmemory + i * ld, (size_t)d * sizeof(float));
    }
    apti_stack_backward(p, 0, lowest);
}

/* ------------------------------------------------------------------------------------------------ inference */

static apt_result apti_output_logits(apti_pass *p, apt_output *out)
{
    const apt_config *c = &p->model->config;
    const apti_stack *last = &p->stack[p->stacks - 1];
    const bool lm = c->task == APT_TASK_LM;
    const int64_t width = apti_head_width(c), n = c->task == APT_TASK_SPAN || lm ? last->rows
                                                  : c->task == APT_TASK_MLM      ? p->labelled
                                                                                 : p->batch->sequences;
    out->logits_count = n * width;
    if (out->logits == NULL) return APT_OK;
    if (out->logits_capacity < n * width)
        return apti_fail(p->model->ctx, APT_E_SCRATCH, "output: %lld logits, room for %lld", (long long)(n * width),
                         (long long)out->logits_capacity);
    if (c->task == APT_TASK_MLM || lm) {
        const apti_lm_op op = apti_decoder_of(p);
        if (lm) apti_head_scale(p, last->out, n);                     /* nobody reads it after this */
        apti_lm_logits(p->model->ctx, &op, out->logits, width, lm ? last->out : p->head_norm, apti_ld(c->hidden), n);
    } else if (c->task == APT_TASK_SPAN) {
        for (int64_t i = 0; i < n; i++) {
            out->logits[i] = p->logits[2 * i];
            out->logits[n + i] = p->logits[2 * i + 1];
        }
    } else {
        memcpy(out->logits, p->logits, (size_t)(n * width) * sizeof(float));
    }
    return APT_OK;
}

APT_API apt_result apt_model_forward(apt_model *model, const apt_batch *batch, apt_output *output)
{
    if (model == NULL) return APT_E_ARGUMENT;
    if (output == NULL) return apti_fail(model->ctx, APT_E_ARGUMENT, "apt_model_forward: output is NULL");
    apt_result r = apti_check_batch(model, batch, false);
    if (r == APT_OK && model->pass == NULL) r = apti_pass_create(model, &model->pass);
    if (r != APT_OK) return r;
    const int64_t d = model->config.hidden, ld = apti_ld(d);
    const int64_t rows = (model->config.decoder_layers > 0 ? batch->target_offsets : batch->offsets)[batch->sequences];
    if (output->hidden != NULL && output->hidden_capacity < rows * d)
        return apti_fail(model->ctx, APT_E_SCRATCH, "output: hidden states need %lld floats", (long long)(rows * d));
    r = apti_forward(model->pass, batch, output->hidden != NULL ? APTI_PASS_ALL_ROWS : 0);
    if (r != APT_OK) return r;
    apti_pass *p = model->pass;
    const float *last = model->block->pre_norm ? p->stack[p->stacks - 1].out : p->acts[p->layers - 1].y2;
    for (int64_t i = 0; i < rows && output->hidden != NULL; i++)
        memcpy(output->hidden + i * d, last + i * ld, (size_t)d * sizeof(float));
    apti_task_loss(p, false, 1.0f);
    output->loss = apti_mean_loss(p);
    output->loss_count = p->loss_count;
    output->correct = p->correct;
    return apti_output_logits(p, output);
}
/* ------------------------------------------------------------------------------------------------ generation

   A lane is one text that grows: a sequence, or with beams one of its candidates. Every step reads the last token of each lane
   that is not finished; what came before lives in the cache. Without a cache a step reads everything again. */

/* A text that ended: beams only. */
typedef struct apti_ended { double score; int32_t length; } apti_ended;

typedef struct apti_candidate { double score; int32_t beam, token; } apti_candidate;

typedef struct apti_generator {
    apt_model *model;
    apti_pass *pass;
    const apt_batch *given;
    const apt_generate_desc *desc;
    apti_cache cache;
    apt_batch batch;                  /* of the step at hand */
    int32_t lanes, beams, room, active;
    int32_t longest;                  /* source of a sequence */
    float *bank[2];                   /* beams: keys and values, and where reordered ones go; else only the first */
    int32_t *lane;                    /* [lanes] of each sequence of the step */
    int32_t *count;                   /* [lanes] new tokens */
    int32_t *text, *other_text;       /* [lanes * max_tokens] new tokens */
    int32_t *offsets, *tokens, *last, *order, *source_offsets, *source_tokens;
    float *logits;                    /* (lanes, vocab) */
    double *score, *next_score;       /* beams: [lanes] log probability, and after the step */
    int32_t *parent;                  /* beams: [lanes] the lane whose text each goes on with */
    apti_candidate *candidate;        /* beams: 2 * beams for each beam, then the best of a sequence */
    apti_ended *ended;                /* beams: [sequences * beams] best texts that ended, best first */
    int32_t *ended_text, *ended_count;
    bool *done;                       /* [sequences] */
} apti_generator;

static bool apti_keeps(const apti_generator *g, int32_t l)
{
    return l >= g->pass->stack[g->pass->stacks - 1].first;
}

/* Length of lane's prompt: the start token of a decoder behind an encoder. */
static int32_t apti_prompt(const apti_generator *g, int32_t lane)
{
    const int32_t s = lane / g->beams;
    return g->pass->stacks > 1 ? 1 : g->given->offsets[s + 1] - g->given->offsets[s];
}

/* Keys and values of every layer inside a bank: layer after layer, each with the regions of all lanes. */
static void apti_generator_views(apti_generator *g, float *bank)
{
    const apt_model *m = g->model;
    for (int32_t l = 0; l < m->config.layers; l++) {
        if (!apti_keeps(g, l) || apti_is_cross(&m->config, l)) continue;
        const int64_t floats = (int64_t)g->lanes * g->room * apti_ld(apti_kv_width(m, l));
        g->cache.k[l] = bank;
        g->cache.v[l] = bank + floats;
        bank += 2 * floats;
    }
}

static void apti_generator_plan_cache(apti_generator *g, apti_bump *b)
{
    const apt_model *m = g->model;
    const int64_t f = (int64_t)sizeof(float), source = g->given->offsets[g->given->sequences];
    int64_t floats = 0;
    g->cache.k = (float **)apti_bump_take(b, m->config.layers, (int64_t)sizeof(float *));
    g->cache.v = (float **)apti_bump_take(b, m->config.layers, (int64_t)sizeof(float *));
    if (g->desc->disable_cache) return;
    for (int32_t l = 0; l < m->config.layers; l++) {
        const int64_t ldk = apti_ld(apti_kv_width(m, l));
        if (!apti_keeps(g, l)) continue;
        if (!apti_is_cross(&m->config, l)) {
            floats += 2 * (int64_t)g->lanes * g->room * ldk;
            continue;
        }
        float *k = (float *)apti_bump_take(b, source * ldk, f), *v = (float *)apti_bump_take(b, source * ldk, f);
        if (b->base == NULL) continue;
        g->cache.k[l] = k;
        g->cache.v[l] = v;
    }
    for (int32_t i = 0; i < (g->beams > 1 ? 2 : 1); i++) g->bank[i] = (float *)apti_bump_take(b, floats, f);
}

static int64_t apti_generator_plan(apti_generator *g, char *base)
{
    const int64_t i = (int64_t)sizeof(int32_t), n = g->lanes, vocab = g->model->config.vocab;
    const int64_t new_tokens = n * g->desc->max_tokens;
    const bool beams = g->beams > 1;
    apti_bump b = {base, 0};
    apti_generator_plan_cache(g, &b);
    g->cache.start = (int32_t *)apti_bump_take(&b, n, i);
    g->cache.end = (int32_t *)apti_bump_take(&b, n, i);
    g->cache.source_start = (int32_t *)apti_bump_take(&b, n, i);
    g->cache.source_end = (int32_t *)apti_bump_take(&b, n, i);
    g->cache.before = (int32_t *)apti_bump_take(&b, n, i);
    g->lane = (int32_t *)apti_bump_take(&b, n, i);
    g->count = (int32_t *)apti_bump_take(&b, n, i);
    g->text = (int32_t *)apti_bump_take(&b, new_tokens, i);
    g->other_text = (int32_t *)apti_bump_take(&b, beams ? new_tokens : 0, i);
    g->offsets = (int32_t *)apti_bump_take(&b, n + 1, i);
    g->tokens = (int32_t *)apti_bump_take(&b, n * g->room, i);
    g->last = (int32_t *)apti_bump_take(&b, n, i);
    g->order = (int32_t *)apti_bump_take(&b, vocab, i);
    g->logits = (float *)apti_bump_take(&b, n * vocab, (int64_t)sizeof(float));
    g->source_offsets = (int32_t *)apti_bump_take(&b, n + 1, i);
    g->source_tokens = (int32_t *)apti_bump_take(&b, n * g->longest, i);
    g->score = (double *)apti_bump_take(&b, n, (int64_t)sizeof(double));
    g->next_score = (double *)apti_bump_take(&b, n, (int64_t)sizeof(double));
    g->parent = (int32_t *)apti_bump_take(&b, n, i);
    g->candidate = (apti_candidate *)apti_bump_take(&b, beams ? 2 * (int64_t)g->beams * (g->beams + 1) : 0,
                                                    (int64_t)sizeof(apti_candidate));
    g->ended = (apti_ended *)apti_bump_take(&b, beams ? n : 0, (int64_t)sizeof(apti_ended));
    g->ended_text = (int32_t *)apti_bump_take(&b, beams ? new_tokens : 0, i);
    g->ended_count = (int32_t *)apti_bump_take(&b, g->given->sequences, i);
    g->done = (bool *)apti_bump_take(&b, g->given->sequences, (int64_t)sizeof(bool));
    return b.used;
}

/* The text of lane i of the step: all of it when nothing is cached, else its last token. Returns the tokens so far. */
static int32_t apti_generator_text(apti_generator *g, int32_t i, bool whole, int32_t n)
{
    const apt_batch *given = g->given;
    const int32_t lane = g->lane[i], s = lane / g->beams, prompt = apti_prompt(g, lane), made = g->count[lane];
    const int32_t *text = g->text + (int64_t)lane * g->desc->max_tokens;
    g->cache.start[i] = lane * g->room;
    g->cache.before[i] = whole ? 0 : prompt + made - 1;
    g->cache.end[i] = lane * g->room + prompt + made;
    g->cache.source_start[i] = given->offsets[s];
    g->cache.source_end[i] = given->offsets[s + 1];
    g->offsets[i] = n;
    for (int32_t k = 0; whole && k < prompt; k++)
        g->tokens[n++] = g->pass->stacks > 1 ? g->model->config.start_id : given->tokens[given->offsets[s] + k];
    for (int32_t k = whole ? 0 : made - 1; k < made; k++) g->tokens[n++] = text[k];
    g->last[i] = n - 1;
    return n;
}

/* The batch of a step. `first`: prompts, and the source. */
static void apti_generator_batch(apti_generator *g, bool first)
{
    const apt_batch *given = g->given;
    const bool two = g->pass->stacks > 1, whole = first || g->desc->disable_cache != 0;
    int32_t n = 0, source = 0;
    for (int32_t i = 0; i < g->active; i++) {
        const int32_t s = g->lane[i] / g->beams, length = given->offsets[s + 1] - given->offsets[s];
        n = apti_generator_text(g, i, whole, n);
        g->source_offsets[i] = source;
        if (!two || !whole) continue;
        memcpy(g->source_tokens + source, given->tokens + given->offsets[s], (size_t)length * sizeof(int32_t));
        source += length;
    }
    g->offsets[g->active] = n;
    g->source_offsets[g->active] = source;            /* a source that is cached has no rows */
    memset(&g->batch, 0, sizeof(g->batch));
    g->batch.sequences = g->active;
    g->batch.offsets = two ? g->source_offsets : g->offsets;
    g->batch.tokens = two ? g->source_tokens : g->tokens;
    g->batch.target_offsets = two ? g->offsets : NULL;
    g->batch.target_tokens = two ? g->tokens : NULL;
}

/* One pass over the lanes of the step; logits(active, vocab) of what comes next. */
static apt_result apti_generator_step(apti_generator *g, bool first)
{
    apt_model *m = g->model;
    apti_pass *p = g->pass;
    const int64_t d = m->config.hidden, ld = apti_ld(d), vocab = m->config.vocab;
    const bool cached = g->desc->disable_cache == 0;
    apti_generator_batch(g, first);
    g->cache.fill = first;
    p->cache = cached ? &g->cache : NULL;
    const apt_result r = apti_forward(p, &g->batch, 0);
    p->cache = NULL;
    if (r != APT_OK) return r;
    const apti_lm_op op = apti_decoder_of(p);
    apti_gather_rows(m->ctx, p->head_in, ld, p->stack[p->stacks - 1].out, ld, g->last, g->active, d);
    apti_head_scale(p, p->head_in, g->active);
    apti_lm_logits(m->ctx, &op, g->logits, vocab, p->head_in, ld, g->active);
    for (int32_t i = 0; i < g->active; i++)
        if (!apti_finite_all(g->logits + i * vocab, vocab))
            return apti_fail(m->ctx, APT_E_NONFINITE, "apt_generate: sequence %d has a logit that is NaN or infinite",
                             (int)(g->lane[i] / g->beams));
    return APT_OK;
}

/* ---- choosing one token ---- */

static bool apti_above(const float *x, int32_t a, int32_t b)
{
    return x[a] > x[b] || (x[a] == x[b] && a < b);
}

static void apti_top_sift(const float *x, int32_t *heap, int32_t n, int32_t at)
{
    for (int32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && apti_above(x, heap[child + 1], heap[child])) child++;
        if (apti_above(x, heap[at], heap[child])) return;
        const int32_t swap = heap[at];
        heap[at] = heap[child];
        heap[child] = swap;
    }
}

static void apti_top_begin(const float *x, int32_t *heap, int32_t n)
{
    for (int32_t i = 0; i < n; i++) heap[i] = i;
    for (int32_t i = n / 2 - 1; i >= 0; i--) apti_top_sift(x, heap, n, i);
}

/* Takes the largest of the first n of a heap and puts it behind them: equal ones by the lower index first. */
static int32_t apti_top_next(const float *x, int32_t *heap, int32_t n)
{
    const int32_t top = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = top;
    apti_top_sift(x, heap, n - 1, 0);
    return top;
}

static int32_t apti_choose_likeliest(const float *x, int32_t vocab)
{
    int32_t best = 0;
    for (int32_t i = 1; i < vocab; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* Tokens in falling order until top_k or the share top_p is reached; then one of them by its weight. */
static int32_t apti_choose_drawn(const apti_generator *g, const float *x, apt_rng *rng)
{
    const apt_generate_desc *d = g->desc;
    const int32_t vocab = g->model->config.vocab, most = d->top_k > 0 && d->top_k < vocab ? d->top_k : vocab;
    const double scale = 1.0 / (double)d->temperature, share = d->top_p > 0 && d->top_p < 1 ? (double)d->top_p : 1.0;
    const double u = apt_rng_uniform(rng);
    double all = 0, kept = 0, sum = 0;
    int32_t n = 0;
    apti_top_begin(x, g->order, vocab);
    const double max = (double)x[g->order[0]];
    for (; most < vocab && n < most; n++) all += exp(((double)x[apti_top_next(x, g->order, vocab - n)] - max) * scale);
    for (int32_t i = 0; most == vocab && i < vocab; i++) all += exp(((double)x[i] - max) * scale);
    if (n > 0) apti_top_begin(x, g->order, vocab);
    n = 0;
    while (n < most && (n == 0 || kept < share * all)) {
        kept += exp(((double)x[apti_top_next(x, g->order, vocab - n)] - max) * scale);
        n++;
    }
    for (int32_t i = 0; i < n; i++) {
        sum += exp(((double)x[g->order[vocab - 1 - i]] - max) * scale);
        if (u * kept < sum) return g->order[vocab - 1 - i];
    }
    return g->order[vocab - n];
}

static apt_result apti_generate_plain(apti_generator *g)
{
    const apt_generate_desc *d = g->desc;
    const apt_config *c = &g->model->config;
    for (int32_t step = 0; step < d->max_tokens && g->active > 0; step++) {
        const apt_result r = apti_generator_step(g, step == 0);
        if (r != APT_OK) return r;
        int32_t left = 0;
        for (int32_t i = 0; i < g->active; i++) {
            const int32_t s = g->lane[i];
            const float *x = g->logits + (int64_t)i * c->vocab;
            apt_rng rng = apt_rng_make(d->seed, (uint64_t)s << 32 | (uint32_t)step);
            const int32_t token = d->temperature > 0 ? apti_choose_drawn(g, x, &rng) : apti_choose_likeliest(x, c->vocab);
            g->text[(int64_t)s * d->max_tokens + g->count[s]++] = token;
            const bool stop = d->on_token != NULL && d->on_token(s, token, d->user) != 0;
            if (!stop && (token != c->end_id || d->ignore_end)) g->lane[left++] = s;
        }
        g->active = left;
    }
    return APT_OK;
}

/* ---- beam search ---- */

static double apti_beam_value(const apti_generator *g, double score, int32_t length)
{
    return g->desc->length_penalty != 0 ? score / pow((double)length, (double)g->desc->length_penalty) : score;
}

/* Keeps a text of sequence s that ended (token >= 0: with that one behind it) if it is among its best `beams`. */
static void apti_beam_end(apti_generator *g, int32_t s, int32_t lane, int32_t token, double score)
{
    const int64_t most = g->desc->max_tokens;
    apti_ended *ended = g->ended + (int64_t)s * g->beams;
    int32_t *text = g->ended_text + (int64_t)s * g->beams * most;
    const int32_t length = g->count[lane] + (token >= 0);
    const double value = apti_beam_value(g, score, length);
    int32_t at = 0;
    while (at < g->ended_count[s] && ended[at].score >= value) at++;
    if (at >= g->beams) return;
    if (g->ended_count[s] < g->beams) g->ended_count[s]++;
    for (int32_t k = g->ended_count[s] - 1; k > at; k--) {
        ended[k] = ended[k - 1];
        memcpy(text + k * most, text + (k - 1) * most, (size_t)most * sizeof(int32_t));
    }
    ended[at].score = value;
    ended[at].length = length;
    memcpy(text + at * most, g->text + lane * most, (size_t)g->count[lane] * sizeof(int32_t));
    if (token >= 0) text[at * most + length - 1] = token;
}

/* The 2 * beams best continuations of the lanes from .. to - 1 of the step, best first; equal ones by lane, then by token. */
static int32_t apti_beam_candidates(apti_generator *g, int32_t from, int32_t to)
{
    const int32_t vocab = g->model->config.vocab, each = 2 * g->beams < vocab ? 2 * g->beams : vocab;
    apti_candidate *best = g->candidate;
    int32_t n = 0;
    for (int32_t i = from; i < to; i++) {
        const float *x = g->logits + (int64_t)i * vocab;
        double sum = 0;
        apti_top_begin(x, g->order, vocab);
        const double max = (double)x[g->order[0]];
        for (int32_t k = 0; k < vocab; k++) sum += exp((double)x[k] - max);
        for (int32_t k = 0; k < each; k++) {
            const int32_t token = apti_top_next(x, g->order, vocab - k);
            const apti_candidate c = {g->score[g->lane[i]] + (double)x[token] - max - log(sum), g->lane[i], token};
            int32_t at = n;
            while (at > 0 && best[at - 1].score < c.score) at--;
            if (at >= 2 * g->beams) break;            /* nor is any later token of this lane better */
            n = n < 2 * g->beams ? n + 1 : n;
            memmove(best + at + 1, best + at, (size_t)(n - 1 - at) * sizeof(apti_candidate));
            best[at] = c;
        }
    }
    return n;
}

/* Chooses the next beams of sequence s: parent and next_score of its lanes, their texts in other_text. Returns how many. */
static int32_t apti_beam_next(apti_generator *g, int32_t s, int32_t from, int32_t to)
{
    const apt_generate_desc *d = g->desc;
    const int64_t most = d->max_tokens;
    const int32_t n = apti_beam_candidates(g, from, to), made = g->count[g->lane[from]];
    int32_t kept = 0;
    for (int32_t k = 0; k < n && kept < g->beams; k++) {
        const apti_candidate *c = &g->candidate[k];
        if (c->token == g->model->config.end_id && !d->ignore_end) {
            if (k < g->beams) apti_beam_end(g, s, c->beam, c->token, c->score);
            continue;
        }
        const int32_t lane = s * g->beams + kept++;
        g->parent[lane] = c->beam;
        g->next_score[lane] = c->score;
        memcpy(g->other_text + lane * most, g->text + c->beam * most, (size_t)made * sizeof(int32_t));
        g->other_text[lane * most + made] = c->token;
    }
    /* done when no beam can overtake what has ended: scores only fall */
    g->done[s] = g->ended_count[s] == g->beams &&
                 (kept == 0 || g->ended[(int64_t)s * g->beams + g->beams - 1].score >=
                                   apti_beam_value(g, g->next_score[s * g->beams], made + 1));
    return kept;
}

/* The caches of the new beams: each goes on behind its parent's keys. */
static void apti_beam_reorder(apti_generator *g)
{
    const apt_model *m = g->model;
    bool moved = false;
    for (int32_t i = 0; i < g->active; i++) moved = moved || g->parent[g->lane[i]] != g->lane[i];
    if (!moved || g->desc->disable_cache) return;
    for (int32_t l = 0; l < m->config.layers; l++) {
        if (!apti_keeps(g, l) || apti_is_cross(&m->config, l)) continue;
        const int64_t ldk = apti_ld(apti_kv_width(m, l)), region = g->room * ldk;
        float *k = g->bank[1] + (g->cache.k[l] - g->bank[0]), *v = g->bank[1] + (g->cache.v[l] - g->bank[0]);
        for (int32_t i = 0; i < g->active; i++) {
            const int32_t lane = g->lane[i], rows = apti_prompt(g, lane) + g->count[lane] - 1;
            const size_t bytes = (size_t)(rows * ldk) * sizeof(float);
            memcpy(k + lane * region, g->cache.k[l] + g->parent[lane] * region, bytes);
            memcpy(v + lane * region, g->cache.v[l] + g->parent[lane] * region, bytes);
        }
    }
    float *bank = g->bank[0];
    g->bank[0] = g->bank[1];
    g->bank[1] = bank;
    apti_generator_views(g, g->bank[0]);
}

/* The lanes of the next step from what apti_beam_next chose. */
static void apti_beam_commit(apti_generator *g, const int32_t *kept)
{
    const int32_t step = g->count[g->lane[0]] + 1;
    int32_t *text = g->text;
    g->text = g->other_text;
    g->other_text = text;
    g->active = 0;
    for (int32_t s = 0; s < g->given->sequences; s++)
        for (int32_t k = 0; k < kept[s] && !g->done[s]; k++) {
            const int32_t lane = s * g->beams + k;
            g->count[lane] = step;
            g->score[lane] = g->next_score[lane];
            g->lane[g->active++] = lane;
        }
    apti_beam_reorder(g);
}

static apt_result apti_generate_beams(apti_generator *g)
{
    int32_t *kept = g->last;                          /* free between two steps */
    for (int32_t i = 0; i < g->active; i++) g->lane[i] = i * g->beams;
    for (int32_t step = 0; step < g->desc->max_tokens && g->active > 0; step++) {
        const apt_result r = apti_generator_step(g, step == 0);
        if (r != APT_OK) return r;
        for (int32_t s = 0; s < g->given->sequences; s++) kept[s] = 0;
        for (int32_t from = 0, to; from < g->active; from = to) {
            const int32_t s = g->lane[from] / g->beams;
            for (to = from + 1; to < g->active && g->lane[to] / g->beams == s; to++) {}
            kept[s] = apti_beam_next(g, s, from, to);
        }
        apti_beam_commit(g, kept);
    }
    for (int32_t i = 0; i < g->active; i++)           /* cut off by max_tokens */
        apti_beam_end(g, g->lane[i] / g->beams, g->lane[i], -1, g->score[g->lane[i]]);
    return APT_OK;
}

/* ---- the call ---- */

static void apti_generator_output(const apti_generator *g, int32_t *tokens, int32_t *lengths)
{
    const int64_t most = g->desc->max_tokens;
    for (int32_t s = 0; s < g->given->sequences; s++) {
        const bool beams = g->beams > 1;
        const int32_t *text = beams ? g->ended_text + (int64_t)s * g->beams * most : g->text + s * most;
        lengths[s] = !beams ? g->count[s] : g->ended_count[s] > 0 ? g->ended[(int64_t)s * g->beams].length : 0;
        memcpy(tokens + s * most, text, (size_t)lengths[s] * sizeof(int32_t));
    }
}

static apt_result apti_generate_check(const apt_model *model, const apt_batch *batch, const apt_generate_desc *d)
{
    apt_ctx *ctx = model->ctx;
    if (model->config.task != APT_TASK_LM)
        return apti_fail(ctx, APT_E_STATE, "apt_generate: the model is no language model (T5, LLaMA)");
    if (d->start_canary != 0 || d->end_canary != 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_generate_desc is not initialised: use apt_generate_desc desc = APT_ZERO");
    const double field[][3] = {{(double)d->max_tokens, 1, 1 << 24}, {(double)d->temperature, 0, 1e6},
                               {(double)d->top_k, 0, 1 << 24},      {(double)d->top_p, 0, 1},
                               {(double)d->beams, 0, 1024},         {(double)d->length_penalty, -100, 100}};
    static const char *const names[] = {"max_tokens", "temperature", "top_k", "top_p", "beams", "length_penalty"};
    for (int32_t i = 0; i < 6; i++)
        if (!apti_finite_f64(field[i][0]) || !(field[i][0] >= field[i][1] && field[i][0] <= field[i][2]))
            return apti_fail(ctx, APT_E_RANGE, "apt_generate_desc.%s is %g; expected %g..%g", names[i], field[i][0], field[i][1],
                             field[i][2]);
    if (d->beams > 1 && (d->temperature > 0 || d->on_token != NULL))
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_generate: beams go neither with temperature nor with on_token");
    if (batch == NULL || batch->offsets == NULL || batch->tokens == NULL || batch->sequences < 1 || batch->offsets[0] != 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "batch: needs at least one sequence, offsets from 0 and tokens");
    for (int32_t s = 0; s < batch->sequences; s++)
        if (batch->offsets[s + 1] <= batch->offsets[s])
            return apti_fail(ctx, APT_E_RANGE, "batch: offsets[%d] is %d, not above %d", (int)s + 1, (int)batch->offsets[s + 1],
                             (int)batch->offsets[s]);
    return apti_check_tokens(model, batch);
}

APT_API apt_result apt_generate(apt_model *model, const apt_batch *batch, const apt_generate_desc *desc, int32_t *tokens,
                                int32_t *lengths)
{
    if (model == NULL) return APT_E_ARGUMENT;
    apt_ctx *ctx = model->ctx;
    if (desc == NULL || tokens == NULL || lengths == NULL)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_generate: desc, tokens or lengths is NULL");
    apt_result r = apti_generate_check(model, batch, desc);
    if (r == APT_OK && model->pass == NULL) r = apti_pass_create(model, &model->pass);
    if (r != APT_OK) return r;
    apti_generator g = APT_ZERO;
    g.model = model;
    g.pass = model->pass;
    g.given = batch;
    g.desc = desc;
    g.beams = desc->beams > 1 ? desc->beams : 1;
    g.active = batch->sequences;
    g.longest = (int32_t)apti_attention_longest(batch->offsets, batch->sequences);
    apti_plan_stacks(g.pass, 1, 1);                   /* how many there are */
    const int64_t room = (int64_t)(g.pass->stacks > 1 ? 1 : g.longest) + desc->max_tokens;
    const int64_t lanes = (int64_t)g.beams * batch->sequences;
    if (room > model->config.positions || lanes * room > INT32_MAX)
        return apti_fail(ctx, APT_E_RANGE, "apt_generate: %lld texts of up to %lld tokens; the model has %d positions",
                         (long long)lanes, (long long)room, (int)model->config.positions);
    g.room = (int32_t)room;
    g.lanes = (int32_t)lanes;
    const int64_t bytes = apti_generator_plan(&g, NULL);
    char *block = (char *)apti_calloc(ctx, bytes, 1);
    if (block == NULL) return apti_fail(ctx, APT_E_MEMORY, "apt_generate: no memory for its cache: %lld bytes", (long long)bytes);
    (void)apti_generator_plan(&g, block);
    if (!desc->disable_cache) apti_generator_views(&g, g.bank[0]);
    for (int32_t i = 0; i < batch->sequences; i++) g.lane[i] = i;
    r = g.beams > 1 ? apti_generate_beams(&g) : apti_generate_plain(&g);
    if (r == APT_OK) apti_generator_output(&g, tokens, lengths);
    apti_free(ctx, block);
    return r;
}

/* ------------------------------------------------------------------------------------------------ compaction

   Every buffer of every parameter is gathered to the surviving units. What a teacher has too gets new buffers first: only
   that can fail, and then the model is as it was. The rest shrinks in its own memory and gives back what it can. */

/* Survivors of every prunable dimension, as apt_axis views into one block of indices. */
typedef struct apti_survivors {
    apt_axis hidden, *head, *kv, *neuron;            /* the last three: [layers] */
    apt_axis *axes;
    int32_t *index;
    uint8_t *keep;
} apti_survivors;

static void apti_survivors_free(apt_ctx *ctx, apti_survivors *s)
{
    apti_free(ctx, s->axes);
    apti_free(ctx, s->index);
    apti_free(ctx, s->keep);
}

static apt_result apti_survivors_make(const apt_model *model, apti_survivors *s)
{
    apt_units u;
    apt_model_units(model, &u);
    const apti_survivors none = APT_ZERO;
    const int32_t layers = model->config.layers, dh = model->config.head_dim;
    *s = none;
    s->axes = (apt_axis *)apti_calloc(model->ctx, 3 * (int64_t)layers, (int64_t)sizeof(apt_axis));
    s->index = (int32_t *)apti_alloc(model->ctx, u.total, (int64_t)sizeof(int32_t));
    s->keep = (uint8_t *)apti_alloc(model->ctx, u.total, 1);
    if (s->axes == NULL || s->index == NULL || s->keep == NULL)
        return apti_fail(model->ctx, APT_E_MEMORY, "compaction: no memory for its plan");
    const apt_result r = apt_mask_keep(s->keep, model->masks, u.total);
    if (r != APT_OK) return apti_fail(model->ctx, r, "compaction: a mask is neither 0 nor 1");
    s->head = s->axes;
    s->kv = s->axes + layers;
    s->neuron = s->axes + 2 * layers;
    for (int32_t l = 0; l < layers; l++) {
        const apt_layer_shape *shape = &model->shape[l];
        const int64_t h = apti_unit_head(model, l), n = apti_unit_neuron(model, l);
        const int32_t group = shape->kv_heads > 0 ? shape->heads / shape->kv_heads : 1;
        (void)apt_axis_make(&s->kv[l], s->index + h, s->keep + h, shape->kv_heads, dh);
        s->head[l] = s->kv[l];
        s->head[l].width = group * dh;                /* the query heads of a group stand together */
        (void)apt_axis_make(&s->neuron[l], s->index + n, s->keep + n, shape->neurons, 1);
    }
    const int64_t d = apti_unit_hidden(model);
    (void)apt_axis_make(&s->hidden, s->index + d, s->keep + d, model->config.hidden, 1);
    return s->hidden.kept > 0 ? APT_OK : apti_fail(model->ctx, APT_E_STATE, "compaction: no hidden dimension is left");
}

static apt_axis apti_survivor_axis(const apti_survivors *s, apti_axis axis, int32_t layer, int64_t size)
{
    apt_axis whole = APT_ZERO;
    whole.units = whole.kept = (int32_t)size;
    whole.width = 1;
    switch (axis) {
    case APTI_AXIS_HIDDEN: return s->hidden;
    case APTI_AXIS_HEAD: return s->head[layer];
    case APTI_AXIS_KV: return s->kv[layer];
    case APTI_AXIS_NEURON: return s->neuron[layer];
    case APTI_AXIS_FIXED: case APTI_AXIS_RANK: default: return whole;
    }
}

/* Rows and columns of a parameter that stay. */
typedef struct apti_cut { apt_axis rows, cols; int64_t r, c; bool changes; } apti_cut;

static apti_cut apti_cut_of(const apti_survivors *s, const apti_param *p)
{
    apti_cut cut;
    cut.rows = apti_survivor_axis(s, p->row_axis, p->layer, p->rows);
    cut.cols = apti_survivor_axis(s, p->col_axis, p->layer, p->cols);
    cut.r = (int64_t)cut.rows.kept * cut.rows.width;
    cut.c = (int64_t)cut.cols.kept * cut.cols.width;
    cut.changes = cut.rows.kept != cut.rows.units || cut.cols.kept != cut.cols.units;
    return cut;
}

/* Embedding tables are large and only looked up: while a teacher needs the whole table, the student reads columns of it. */
static bool apti_param_columns(apt_model *model, apti_param *out, const apti_param *p, const apti_cut *cut)
{
    out->columns = (int32_t *)apti_alloc(model->ctx, cut->c, (int64_t)sizeof(int32_t));
    if (out->columns == NULL) return false;
    for (int64_t j = 0; j < cut->c; j++) {
        const int32_t at = cut->cols.index[j];
        out->columns[j] = p->columns != NULL ? p->columns[at] : at;
    }
    out->value = (float *)apti_retain(p->value);
    out->stride = p->columns != NULL ? p->stride : p->cols;
    return true;
}

static bool apti_is_embedding(const apt_model *model, const apti_param *p)
{
    return model->config.task != APT_TASK_MLM && !p->linear &&
           (p == model->embed[APTI_WORD] || p == model->embed[APTI_POSITION] || p == model->embed[APTI_TYPE]);
}

/* out = a copy of the shared, frozen `p` cut to the survivors. `whole` has room for the largest matrix. */
static bool apti_param_cut(apt_model *model, apti_param *out, const apti_param *p, const apti_cut *cut, float *whole)
{
    *out = *p;
    out->rows = cut->r;
    out->cols = cut->c;
    apti_param_forget(out);
    if (cut->r * cut->c == 0) return true;
    if (apti_is_embedding(model, p)) return apti_param_columns(model, out, p, cut);
    if (!apti_param_reserve(model, out)) return false;
    if (p->linear) apti_param_get(model, p, whole);
    float *to = p->linear ? whole : out->value;
    (void)apt_gather(to, cut->c, p->linear ? whole : p->value, p->cols, &cut->rows, &cut->cols);
    apti_param_set(model, out, to);
    return true;
}

/* New versions of all shared parameters in `fresh`; false when memory ran out (then fresh holds what there was). */
static bool apti_cut_all(apt_model *model, apti_param *fresh, const apti_survivors *s, float *whole)
{
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        const apti_cut cut = apti_cut_of(s, p);
        if (!cut.changes || (!apti_is_shared(p) && p->columns == NULL)) continue;    /* no name in fresh */
        if (!apti_param_cut(model, &fresh[i], p, &cut, whole)) return false;
    }
    return true;
}

/* Moves the first `bytes` of a block into one of their own size, when there is memory for it. */
static void *apti_trim(apt_ctx *ctx, void *block, int64_t bytes)
{
    if (block == NULL || apti_block_bytes(block) <= bytes) return block;
    void *small = apti_alloc(ctx, bytes, 1);
    if (small == NULL) return block;
    memcpy(small, block, (size_t)bytes);
    apti_free(ctx, block);
    return small;
}

/* Cuts a parameter that nobody shares inside its own buffers. */
static void apti_param_shrink(apt_model *model, apti_param *p, const apti_cut *cut, float *whole)
{
    apt_ctx *ctx = model->ctx;
    const int64_t old = p->cols, bytes = cut->r * cut->c * (int64_t)sizeof(float);
    float *const kept[] = {p->value, p->grad, p->moment1, p->moment2};
    if (bytes == 0) apti_param_release(ctx, p);
    if (p->linear && p->value == NULL && bytes > 0) {
        apti_param_get(model, p, whole);
        (void)apt_gather(whole, cut->c, whole, old, &cut->rows, &cut->cols);
    }
    for (int32_t i = 0; i < 4 && bytes > 0; i++)
        if (kept[i] != NULL) (void)apt_gather(kept[i], cut->c, kept[i], old, &cut->rows, &cut->cols);
    p->rows = cut->r;
    p->cols = cut->c;
    if (bytes == 0) return;
    if (p->linear) {
        p->packed.n = cut->r;
        p->packed.k = cut->c;
        apti_pack(ctx, &p->packed, p->value != NULL ? p->value : whole, cut->c);
        p->packed.data = apti_trim(ctx, p->packed.data, apti_packed_bytes(ctx, cut->r, cut->c, p->packed.type));
    }
    p->value = (float *)apti_trim(ctx, p->value, bytes);
    p->grad = (float *)apti_trim(ctx, p->grad, bytes);
    p->moment1 = (float *)apti_trim(ctx, p->moment1, bytes);
    p->moment2 = (float *)apti_trim(ctx, p->moment2, bytes);
}

/* Where entry i of a cut axis was before the cut. */
static int64_t apti_axis_source(const apt_axis *axis, int64_t i)
{
    const int64_t unit = i / axis->width;
    return (axis->index != NULL ? axis->index[unit] : unit) * axis->width + i % axis->width;
}

/* The bits of what a cut leaves, moved together in the same memory: none moves back. cols: of the matrix before the cut. */
static void apti_bitmask_cut(uint64_t *mask, int64_t cols, const apti_cut *cut)
{
    int64_t out = 0;
    uint64_t word = 0;
    for (int64_t i = 0; i < cut->r; i++) {
        const int64_t row = apti_axis_source(&cut->rows, i);
        for (int64_t j = 0; j < cut->c; j++, out++) {
            const int64_t at = row * cols + apti_axis_source(&cut->cols, j);
            word |= (mask[at / 64] >> at % 64 & 1) << out % 64;
            if (out % 64 != 63) continue;
            mask[out / 64] = word;
            word = 0;
        }
    }
    if (out % 64 != 0) mask[out / 64] = word;
}

static void apti_compact_commit(apt_model *model, const apti_param *fresh, const apti_survivors *s, float *whole)
{
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_cut cut = apti_cut_of(s, &model->params[i]);
        if (model->bitmask != NULL && model->bitmask[i] != NULL && cut.changes)
            apti_bitmask_cut(model->bitmask[i], model->params[i].cols, &cut);
        if (fresh[i].name[0] != 0) {
            apti_param_release(model->ctx, &model->params[i]);
            model->params[i] = fresh[i];
        } else if (cut.changes) {
            apti_param_shrink(model, &model->params[i], &cut, whole);
        }
    }
    for (int32_t l = 0; l < model->config.layers; l++) {
        apt_layer_shape *shape = &model->shape[l];
        const int32_t group = shape->kv_heads > 0 ? shape->heads / shape->kv_heads : 1;
        int32_t *column = model->bias_head != NULL ? model->bias_head + (int64_t)l * model->config.bias_heads : NULL;
        for (int32_t i = 0; column != NULL && s->kv[l].index != NULL && i < s->kv[l].kept; i++)
            column[i] = column[s->kv[l].index[i]];    /* its row of the relative bias goes with a head */
        shape->kv_heads = s->kv[l].kept;
        shape->heads = s->kv[l].kept * group;
        shape->neurons = s->neuron[l].kept;
    }
    model->config.hidden = s->hidden.kept;
    apti_free(model->ctx, model->masks);
    model->masks = NULL;
    model->structure++;
}

APT_API apt_result apt_model_compact(apt_model *model)
{
    if (model == NULL) return APT_E_ARGUMENT;
    if (model->masks == NULL) return APT_OK;
    apt_ctx *ctx = model->ctx;
    apti_survivors s;
    apti_compressed_drop(model);
    if (model->pass != NULL) apti_pass_shrink(model->pass);
    apt_result r = apti_survivors_make(model, &s);
    const int64_t most = apti_largest_linear(model);
    apti_param *fresh = (apti_param *)apti_calloc(ctx, model->param_count, (int64_t)sizeof(apti_param));
    float *whole = (float *)apti_alloc(ctx, most, (int64_t)sizeof(float));
    if (r == APT_OK && (fresh == NULL || whole == NULL || !apti_cut_all(model, fresh, &s, whole))) {
        r = apti_fail(ctx, APT_E_MEMORY, "compaction: no memory for the smaller model; nothing was changed");
        for (int32_t i = 0; fresh != NULL && i < model->param_count; i++) apti_param_release(ctx, &fresh[i]);
    }
    if (r == APT_OK) apti_compact_commit(model, fresh, &s, whole);
    apti_free(ctx, fresh);
    apti_free(ctx, whole);
    apti_survivors_free(ctx, &s);
    return r;
}

/* ------------------------------------------------------------------------------------------------ adapters */

/* Gives the parameter a gradient and moments; a matrix that lived in panels only gets its plain values back. */
static apt_result apti_param_train(apt_model *model, apti_param *p)
{
    apti_param fresh = *p;
    if (p->trainable || apti_param_count(p) == 0) {
        p->trainable = true;
        return APT_OK;
    }
    fresh.trainable = true;
    apti_param_forget(&fresh);
    if (!apti_param_reserve(model, &fresh)) {
        apti_param_release(model->ctx, &fresh);
        return apti_fail(model->ctx, APT_E_MEMORY, "no memory to train %s (%lld x %lld)", p->name, (long long)p->rows,
                         (long long)p->cols);
    }
    apti_param_get(model, p, fresh.value);
    apti_param_set(model, &fresh, fresh.value);
    apti_param_release(model->ctx, p);
    *p = fresh;
    return APT_OK;
}

/* The reverse: the optimizer's state goes, linear maps go back to panels. */
static void apti_param_freeze(apt_model *model, apti_param *p)
{
    apt_ctx *ctx = model->ctx;
    apti_free(ctx, p->grad);
    apti_free(ctx, p->moment1);
    apti_free(ctx, p->moment2);
    p->grad = p->moment1 = p->moment2 = NULL;
    if (p->linear && p->trainable) {
        apti_free(ctx, p->value);
        p->value = NULL;
    }
    p->trainable = false;
}

/* A view for the core's functions; which: value, gradient or moments of both matrices. */
static apt_adapter apti_adapter_view(const apt_model *model, float *a, float *b, const apti_param *pa, const apti_param *pb)
{
    apt_adapter view;
    view.a = a;
    view.b = b;
    view.rank = (int32_t)pa->rows;
    view.in = (int32_t)pa->cols;
    view.out = (int32_t)pb->rows;
    view.scale = model->scale;
    return view;
}

/* Buffers for one adapter at `rank`, in fresh[0] (A) and fresh[1] (B); none where no heads or neurons are left to adapt. */
static bool apti_adapter_reserve(apt_model *model, apti_param *fresh, int32_t site, int64_t rank, bool trainable)
{
    fresh[0] = *apti_site_of(model, site).a;
    fresh[1] = *apti_site_of(model, site).b;
    fresh[0].rows = fresh[1].cols = rank;
    for (int32_t i = 0; i < 2; i++) {
        apti_param_forget(&fresh[i]);
        fresh[i].trainable = trainable;
    }
    if (apti_param_count(&fresh[0]) == 0 || apti_param_count(&fresh[1]) == 0) return true;
    return apti_param_reserve(model, &fresh[0]) && apti_param_reserve(model, &fresh[1]);
}

/* Moves one adapter into reserved buffers: new A rows random, new B columns and all their moments 0; the output does not
   change. */
static void apti_adapter_adopt(apt_model *model, const apti_param *fresh, int32_t site, apt_rng *rng)
{
    apti_param *pa = apti_site_of(model, site).a, *pb = apti_site_of(model, site).b;
    const apti_param *a = &fresh[0], *b = &fresh[1];
    if (a->value == NULL) return;
    const apt_adapter grown = apti_adapter_view(model, a->value, b->value, a, b);
    const apt_adapter old = apti_adapter_view(model, pa->value, pb->value, pa, pb);
    (void)apt_adapter_grow(&grown, &old, rng);
    if (a->trainable && pa->trainable && pa->rows > 0) {
        const apt_adapter m1 = apti_adapter_view(model, a->moment1, b->moment1, a, b),
                          o1 = apti_adapter_view(model, pa->moment1, pb->moment1, pa, pb);
        const apt_adapter m2 = apti_adapter_view(model, a->moment2, b->moment2, a, b),
                          o2 = apti_adapter_view(model, pa->moment2, pb->moment2, pa, pb);
        (void)apt_adapter_grow(&m1, &o1, NULL);
        (void)apt_adapter_grow(&m2, &o2, NULL);
    }
    apti_param_release(model->ctx, pa);
    apti_param_release(model->ctx, pb);
    *pa = *a;
    *pb = *b;
    model->structure++;
}

/* A first adapter of `rank`, or one raised to it. */
static apt_result apti_adapter_resize(apt_model *model, int32_t site, int64_t rank, bool trainable, apt_rng *rng)
{
    apti_param fresh[2];
    if (!apti_adapter_reserve(model, fresh, site, rank, trainable)) {
        apti_param_release(model->ctx, &fresh[0]);
        apti_param_release(model->ctx, &fresh[1]);
        return apti_fail(model->ctx, APT_E_MEMORY, "no memory for %s at rank %lld", fresh[0].name, (long long)rank);
    }
    apti_adapter_adopt(model, fresh, site, rng);
    return APT_OK;
}

static void apti_adapter_remove(apt_model *model, int32_t site)
{
    apti_param *pa = apti_site_of(model, site).a, *pb = apti_site_of(model, site).b;
    apti_param_release(model->ctx, pa);
    apti_param_release(model->ctx, pb);
    pa->rows = pb->cols = 0;
    pa->trainable = pb->trainable = false;
}

/* Values that one more rank takes. */
static int64_t apti_adapter_per_rank(const apti_site *site)
{
    return site->a->cols + site->b->rows;
}

/* values = W + s B A, with the zeros of W's mask */
static void apti_merge_values(const apt_model *model, const apti_site *site, float *values)
{
    const apt_adapter view = apti_adapter_view(model, site->a->value, site->b->value, site->a, site->b);
    apti_param_get(model, site->w, values);
    (void)apt_adapter_merge(&view, values, site->w->cols);
    if (apti_bitmask_of(model, site->w) != NULL)
        (void)apt_bitmask_apply(model->ctx, values, apti_bitmask_of(model, site->w), apti_param_count(site->w));
}

/* W + s B A, written back in place of W. Only the adapters' own memory is given up afterwards. */
static void apti_merge_one(apt_model *model, int32_t k, float *values)
{
    const apti_site site = apti_site_of(model, k);
    apti_merge_values(model, &site, values);
    apti_param_set(model, site.w, values);
    apti_adapter_remove(model, k);
}

/* What a tied LM head with an adapter becomes: a matrix of its own, and word embeddings that are only looked up. */
typedef struct apti_untied { bool wanted; apti_param head, word; } apti_untied;

static bool apti_untie_reserve(apt_model *m, apti_untied *u)
{
    u->wanted = apti_is_tied(&m->config) && m->head_a->rows > 0;
    if (!u->wanted) return true;
    u->head = *m->head[APTI_HEAD_OUT_W];
    u->head.rows = m->config.vocab;
    u->word = *m->embed[APTI_WORD];
    u->word.linear = u->word.narrow = false;
    apti_param_forget(&u->word);
    if (apti_param_reserve(m, &u->head) && apti_param_reserve(m, &u->word)) return true;
    apti_param_release(m->ctx, &u->head);
    apti_param_release(m->ctx, &u->word);
    return false;
}

/* T5's division by sqrt(d) goes into the matrix: a reader of Hugging Face files expects it of tied heads only. */
static void apti_untie(apt_model *m, const apti_untied *u, float *values)
{
    const apti_site site = apti_site_of(m, apti_layer_sites(m));
    const int64_t n = apti_param_count(site.w);
    apti_param_get(m, site.w, u->word.value);
    apti_merge_values(m, &site, values);
    if (m->config.scaled_head) m->ctx->kernels->scale(values, values, 1.0f / sqrtf((float)m->config.hidden_dense), n);
    apti_param_release(m->ctx, m->embed[APTI_WORD]);
    *m->embed[APTI_WORD] = u->word;
    *m->head[APTI_HEAD_OUT_W] = u->head;
    m->config.untied = 1;
    m->config.scaled_head = 0;
    apti_param_set(m, m->head[APTI_HEAD_OUT_W], values);
    apti_adapter_remove(m, apti_layer_sites(m));
}

/* Logits of `probe` before and after a merge: room for both, and the first half filled. */
static apt_result apti_probe_logits(apt_model *model, const apt_batch *probe, apt_output *out)
{
    const apt_output none = APT_ZERO;
    *out = none;
    apt_result r = apt_model_forward(model, probe, out);
    if (r != APT_OK) return r;
    out->logits_capacity = out->logits_count;
    out->logits = (float *)apti_alloc(model->ctx, 2 * out->logits_count, (int64_t)sizeof(float));
    if (out->logits == NULL) return apti_fail(model->ctx, APT_E_MEMORY, "merge: no memory for the probe's logits");
    return apt_model_forward(model, probe, out);
}

/* The largest difference after a merge. Without adapters a pass needs no more memory than it has: this cannot run out. */
static apt_result apti_logit_difference(apt_model *model, const apt_batch *probe, const apt_output *before, float *difference)
{
    apt_output after = *before;
    after.logits += before->logits_count;
    const apt_result r = apt_model_forward(model, probe, &after);
    *difference = 0;
    for (int64_t i = 0; r == APT_OK && i < before->logits_count; i++) {
        const float e = fabsf(after.logits[i] - before->logits[i]);
        if (e > *difference) *difference = e;
    }
    return r;
}

APT_API apt_result apt_model_merge(apt_model *model, const apt_batch *probe, float *difference)
{
    if (model == NULL) return APT_E_ARGUMENT;
    apt_result r = APT_OK;
    apt_output before = APT_ZERO;
    apti_untied untied = APT_ZERO;
    const int64_t most = model->head_a->rows > 0 ? apti_largest_linear(model) : apti_largest_layer(model);
    float *values = (float *)apti_alloc(model->ctx, most, (int64_t)sizeof(float));
    if (values == NULL) r = apti_fail(model->ctx, APT_E_MEMORY, "merge: no memory for one matrix");
    if (r == APT_OK && probe != NULL && difference != NULL) r = apti_probe_logits(model, probe, &before);
    if (r == APT_OK && !apti_untie_reserve(model, &untied))
        r = apti_fail(model->ctx, APT_E_MEMORY, "merge: no memory for an LM head of its own");
    if (r == APT_OK && untied.wanted) apti_untie(model, &untied, values);
    for (int32_t k = 0; k < apti_sites(model) && r == APT_OK; k++)
        if (apti_site_of(model, k).a->rows > 0) apti_merge_one(model, k, values);
    if (r == APT_OK) model->structure++;
    apti_free(model->ctx, values);
    if (r == APT_OK && before.logits != NULL) r = apti_logit_difference(model, probe, &before, difference);
    apti_free(model->ctx, before.logits);
    return r;
}

/* ------------------------------------------------------------------------------------------------ snapshots (teachers)

   A second model that shares every frozen buffer with the first (reference counts) and owns copies of what is trained. */
static bool apti_param_snapshot(apt_model *model, apti_param *copy, const apti_param *p)
{
    *copy = *p;
    copy->trainable = false;
    apti_param_forget(copy);
    if (apti_param_count(p) == 0) return true;
    if (!p->trainable) {
        copy->value = (float *)apti_retain(p->value);
        copy->columns = (int32_t *)apti_retain(p->columns);
        copy->packed.data = apti_retain(p->packed.data);
        return true;
    }
    if (p->linear) {
        if (!apti_packed_reserve(model->ctx, &copy->packed, p->rows, p->cols, p->packed.type)) return false;
        apti_pack(model->ctx, &copy->packed, p->value, p->cols);
        return true;
    }
    copy->value = (float *)apti_alloc(model->ctx, apti_param_count(p), (int64_t)sizeof(float));
    if (copy->value != NULL) memcpy(copy->value, p->value, (size_t)apti_param_count(p) * sizeof(float));
    return copy->value != NULL;
}

static apt_result apti_model_snapshot(apt_model *model, apt_model **out)
{
    apt_model *copy = NULL;
    apt_result r = apti_model_frame(model->ctx, &model->config, model->weights, &copy);
    if (r != APT_OK) return r;
    copy->prunable_dense = model->prunable_dense;
    copy->scale = model->scale;
    for (int32_t i = 0; i < model->param_count && r == APT_OK; i++)
        if (!apti_param_snapshot(copy, &copy->params[i], &model->params[i]))
            r = apti_fail(model->ctx, APT_E_MEMORY, "teacher: no memory for a copy of %s", model->params[i].name);
    if (r == APT_OK && model->masks != NULL) {
        apt_units u;
        apt_model_units(model, &u);
        if (apti_masks_reserve(copy)) memcpy(copy->masks, model->masks, (size_t)u.total * sizeof(float));
        else r = apti_fail(model->ctx, APT_E_MEMORY, "teacher: no memory for masks");
    }
    if (r != APT_OK) {
        apti_model_free(copy);
        return r;
    }
    *out = copy;
    return APT_OK;
}
// >>train
/* ---------------------------------------------------------------------------------------------------------------------
   The trainer: optimizer, salience, decisions, growth, self-distillation. Everything that changes while training lives
   in apt_trainer or in the model, and so everything in them goes into a checkpoint.
   ------------------------------------------------------------------------------------------------------------------ */

/* Tr(h) = scatter(h) + s B A h maps a student's hidden state onto the teacher's: the identity on shared dimensions, with a
   low-rank update of its own (method.md, "Self-distillation"). */
typedef struct apti_transform {
    apti_param a, b;                  /* A(rank, student hidden), B(teacher hidden, rank) */
    int32_t *place;                   /* [student hidden]: the teacher's dimension */
} apti_transform;

/* What comes behind an update, in this order. A stage that fails is begun again by the next call of apt_trainer_step. */
typedef enum apti_stage {
    APTI_STAGE_NONE = 0,
    APTI_STAGE_GLIDE,                 /* masks move; a compaction when all have arrived */
    APTI_STAGE_DECIDE,                /* settle the last decision, first teacher, a new decision */
    APTI_STAGE_GROW,
    APTI_STAGE_EVENTS,
    APTI_STAGE_EVALUATE,              /* APT_EVENT_STEP has fired already */
    APTI_STAGES
} apti_stage;

/* Iterative magnitude pruning. */
typedef struct apti_iterative {
    apt_iterative_desc desc;          /* resolved, without the caller's patterns */
    uint8_t *chosen;                  /* [param_count] 1: pruned; NULL: there is no plan */
    apt_iteration *history;           /* [iterations] */
    int32_t done;                     /* iterations that have pruned */
} apti_iterative;

struct apt_trainer {
    apt_ctx *ctx;
    apt_model *model;
    apt_train_desc desc;              /* resolved */
    uint64_t structure;               /* of the model after our last change: another value means someone else changed it */
    apti_pass *pass;
    int64_t step;                     /* optimizer steps done */
    int32_t micro;                    /* micro-batches inside the present step */
    int64_t adam_steps;               /* updates since the moments were last zero: bias correction */
    apt_step_info info;
    /* salience and decisions */
    apti_probe probe;
    float *salience;                  /* [units] moving average of S; behind it room for S of one step and one point */
    uint8_t *keep;                    /* [units] last decision */
    bool moving;                      /* masks glide towards keep */
    bool observed;                    /* salience holds something */
    int32_t stage;                    /* apti_stage: what is left to do of a step behind its update */
    bool cancelled;                   /* a callback asked for an end; the call in progress says so when it is through */
    bool working, half_done;          /* inside a call that fires events; its changes are not complete */
    double sparsity;                  /* by the last decision, of the dense prunable parameters */
    /* adapters */
    float *importance;                /* [apti_sites] moving average of I */
    int64_t adapter_budget;           /* adapter values at the start */
    /* self-distillation */
    apt_model *teacher;
    apti_pass *teacher_pass;
    apti_transform transform;
    apt_distill_map map;              /* of the present micro-batch */
    float *distill_block, **capture;  /* teacher's hidden states of one batch, and room for Tr */
    int64_t distill_bytes;
    double distill_loss;
    float layer_scale;                /* factor of the layer loss's gradient in the present backward */
    double best_metric;
    bool has_metric;
    apti_iterative iterative;
};

static void apti_teacher_drop(apt_trainer *t);

static void apti_iterative_drop(apt_trainer *t)
{
    const apti_iterative none = APT_ZERO;
    apti_free(t->ctx, t->iterative.chosen);
    apti_free(t->ctx, t->iterative.history);
    t->iterative = none;
}

/* Streams of the trainer's seed. */
enum { APTI_STREAM_ADAPTER = 1, APTI_STREAM_GROW = 2, APTI_STREAM_LAYERS = 3, APTI_STREAM_TRANSFORM = 4 };
#define APTI_TRANSFORM_RANK 8

static apt_rng apti_trainer_rng(const apt_trainer *t, uint64_t stream)
{
    return apt_rng_make(t->desc.seed, (stream << 48) + (uint64_t)t->step * 64 + (uint64_t)t->micro % 64);
}

/* ------------------------------------------------------------------------------------------------ defaults */

static void apti_default_f(float *x, float value)
{
    if (apti_finite(*x) && *x == 0) *x = value;      /* under -Ofast NaN compares equal to anything */
}

static void apti_default_i(int32_t *x, int32_t value)
{
    if (*x == 0) *x = value;
}

static void apti_desc_prune_defaults(apt_train_desc *d, const apt_config *c)
{
    if (d->prune_end == 0) d->prune_end = apti_max_i64(d->prune_begin, d->steps / 10 * 6 + d->steps % 10 * 6 / 10);
    const int64_t window = d->prune_begin >= 0 && d->prune_end > d->prune_begin ? d->prune_end - d->prune_begin : 0;
    if (d->update_frequency == 0) d->update_frequency = (int32_t)apti_max_i64(1, apti_min_i64(100, window / 8));
    apti_default_f(&d->mask_step, fmaxf(1e-6f, 1.0f / (float)d->update_frequency));
    if (d->distill_end == 0) d->distill_end = d->prune_end;
    apti_default_f(&d->salience_momentum, 0.9f);
    apti_default_i(&d->prune, APT_PRUNE_HEADS | APT_PRUNE_NEURONS | APT_PRUNE_HIDDEN);
    apti_default_i(&d->round_heads, 1);
    apti_default_i(&d->round_neurons, 1);
    apti_default_i(&d->round_hidden, 1);
    apti_default_i(&d->min_hidden, c->hidden < 16 ? c->hidden : 16);
}

static void apti_desc_resolve(apt_train_desc *d, const apt_config *c)
{
    apti_default_f(&d->learning_rate, 2e-4f);
    apti_default_f(&d->beta1, 0.9f);
    apti_default_f(&d->beta2, 0.999f);
    apti_default_f(&d->epsilon, 1e-8f);
    apti_default_f(&d->clip, 1.0f);
    apti_default_i(&d->accumulate, 1);
    apti_default_i(&d->rank, 8);
    apti_default_i(&d->max_rank, d->rank > 64 ? d->rank : 64);
    apti_default_f(&d->scale, 2.0f);
    apti_default_i(&d->adapt, APT_ADAPT_QUERY | APT_ADAPT_VALUE | APT_ADAPT_UP);
    apti_default_f(&d->growth, 4.0f);
    apti_default_f(&d->distill_temperature, 2.0f / 3.0f);
    if (apti_finite(d->distill_pred) && d->distill_pred == 0 && apti_finite(d->distill_layer) && d->distill_layer == 0) {
        d->distill_pred = c->task == APT_TASK_SPAN || c->task == APT_TASK_LM ? 0.1f : c->task == APT_TASK_MLM ? 0.0f : 1.0f;
        d->distill_layer = 0.9f;
        if (c->task == APT_TASK_LM && c->decoder_layers == 0) d->disable_distill = 1;
    }
    apti_desc_prune_defaults(d, c);
    if (d->method != APT_METHOD_APT || d->target_sparsity == 0) d->disable_distill = 1;
    if (d->method != APT_METHOD_APT) d->disable_growth = 1;
}

/* One number of a resolved desc with its legal range. The list serves the check and the checkpoint. */
typedef struct apti_field { const char *name; double value, low, high; } apti_field;
#define APTI_FIELDS 50
#define APTI_FIELDS_COMPARED 48              /* the rest may differ when a run goes on */

static void apti_field_put(apti_field **at, const char *name, double value, double low, double high)
{
    const apti_field field = {name, value, low, high};
    *(*at)++ = field;
}

/* What there is to adapt, as APT_ADAPT_*. */
static int32_t apti_adaptable(const apt_config *c)
{
    return (APT_ADAPT_GATE - 1) | (c->gated ? APT_ADAPT_GATE : 0) | (c->task == APT_TASK_LM ? APT_ADAPT_HEAD : 0);
}

static void apti_desc_fields(const apt_train_desc *d, const apt_config *c, apti_field *fields)
{
    const double most = 9e15, steps = (double)d->steps, begin = (double)d->prune_begin;
    const bool exponential = d->schedule == APT_SCHEDULE_EXPONENTIAL;
    const apt_rope none = APT_ZERO, *rope = apti_design_of(c->family)->rotary ? &c->rope : &none;
    apti_field *f = fields;
    apti_field_put(&f, "start_canary", d->start_canary, 0, 0);
    apti_field_put(&f, "end_canary", d->end_canary, 0, 0);
    apti_field_put(&f, "method", d->method, 0, APT_METHOD_FULL);
    apti_field_put(&f, "steps", steps, 1, most);
    apti_field_put(&f, "learning_rate", d->learning_rate, 0, 1e3);
    apti_field_put(&f, "lr_schedule", d->lr_schedule, 0, APT_LR_CONSTANT);
    apti_field_put(&f, "warmup_steps", (double)d->warmup_steps, 0, most);
    apti_field_put(&f, "weight_decay", d->weight_decay, 0, 1e3);
    apti_field_put(&f, "beta1", d->beta1, 0, 0.999999);
    apti_field_put(&f, "beta2", d->beta2, 0, 0.9999999);
    apti_field_put(&f, "epsilon", d->epsilon, 0, 1);
    apti_field_put(&f, "clip", d->clip, -3e38, 3e38);
    apti_field_put(&f, "accumulate", d->accumulate, 1, 1048576);
    apti_field_put(&f, "rank", d->rank, 1, 4096);
    apti_field_put(&f, "max_rank", d->max_rank, d->rank, 4096);
    apti_field_put(&f, "scale", d->scale, 1e-6, 1e6);
    apti_field_put(&f, "adapt", d->adapt, 1, apti_adaptable(c));
    apti_field_put(&f, "disable_growth", d->disable_growth, 0, 1);
    apti_field_put(&f, "growth", d->growth, 1, 4096);
    apti_field_put(&f, "target_sparsity", d->target_sparsity, 0, 0.999999);
    apti_field_put(&f, "schedule", d->schedule, 0, APT_SCHEDULE_EXPONENTIAL);
    apti_field_put(&f, "start_sparsity", d->start_sparsity, exponential ? 1e-6 : 0, d->target_sparsity);
    apti_field_put(&f, "prune_begin", begin, 0, steps);
    apti_field_put(&f, "prune_end", (double)d->prune_end, begin, steps);
    apti_field_put(&f, "update_frequency", d->update_frequency, 1, 1e9);
    apti_field_put(&f, "mask_step", d->mask_step, 1e-6, 1);
    apti_field_put(&f, "salience_momentum", d->salience_momentum, 0, 0.999999);
    apti_field_put(&f, "disable_kurtosis", d->disable_kurtosis, 0, 1);
    apti_field_put(&f, "salience_norm", d->salience_norm, 0, APT_SALIENCE_SCALED);
    apti_field_put(&f, "prune", d->prune, 1, 7);
    apti_field_put(&f, "round_heads", d->round_heads, 1, 4096);
    apti_field_put(&f, "round_neurons", d->round_neurons, 1, 1048576);
    apti_field_put(&f, "round_hidden", d->round_hidden, 1, 65536);
    apti_field_put(&f, "min_hidden", d->min_hidden, 1, c->hidden_dense);
    apti_field_put(&f, "distill_end", (double)d->distill_end, begin, steps);
    apti_field_put(&f, "distill_temperature", d->distill_temperature, 1e-3, 1e3);
    apti_field_put(&f, "distill_pred", d->distill_pred, 0, 1e6);
    apti_field_put(&f, "distill_layer", d->distill_layer, 0, 1e6);
    apti_field_put(&f, "reset_moments", d->reset_moments, 0, 1);
    apti_field_put(&f, "disable_distill", d->disable_distill, 0, 1);
    apti_field_put(&f, "norm_eps", c->norm_eps, 0, 1);                /* of the model, like the next ones: in no other list */
    apti_field_put(&f, "start_id", c->decoder_layers > 0 ? c->start_id : 0, 0, most);
    apti_field_put(&f, "rope theta", rope->theta, 0, most);
    apti_field_put(&f, "rope interleaved", rope->interleaved != 0, 0, 1);
    apti_field_put(&f, "rope factor", rope->factor, 0, most);
    apti_field_put(&f, "rope low factor", rope->low_factor, 0, most);
    apti_field_put(&f, "rope high factor", rope->high_factor, 0, most);
    apti_field_put(&f, "rope original positions", rope->original_positions, 0, most);
    apti_field_put(&f, "evaluate_every", (double)d->evaluate_every, 0, most);
    apti_field_put(&f, "checkpoint_every", (double)d->checkpoint_every, 0, most);
}

static apt_result apti_desc_check(apt_ctx *ctx, const apt_train_desc *d, const apt_config *c)
{
    apti_field field[APTI_FIELDS];
    apti_desc_fields(d, c, field);
    for (int32_t i = 0; i < APTI_FIELDS; i++)
        if (!apti_finite_f64(field[i].value) || !(field[i].value >= field[i].low && field[i].value <= field[i].high))
            return apti_fail(ctx, APT_E_RANGE, "apt_train_desc.%s is %g; expected %g..%g", field[i].name, field[i].value,
                             field[i].low, field[i].high);
    if ((d->adapt & ~apti_adaptable(c)) != 0)
        return apti_fail(ctx, APT_E_RANGE, "apt_train_desc.adapt is %d, but this FFN has no gate; expected a sum of bits of %d",
                         (int)d->adapt, (int)apti_adaptable(c));
    return APT_OK;
}

/* ------------------------------------------------------------------------------------------------ creating */

static bool apti_is_apt(const apt_trainer *t)
{
    return t->desc.method == APT_METHOD_APT;
}

/* The probe runs while its result can still change a decision. */
static bool apti_prunes_at(const apt_trainer *t, int64_t step)
{
    return apti_is_apt(t) && t->desc.target_sparsity > 0 && step < t->desc.prune_end;
}

/* Arrays whose length follows the model's units; new ones replace the old only when all could be had. */
typedef struct apti_unit_arrays { float *salience, *probe; uint8_t *keep; } apti_unit_arrays;

static void apti_unit_arrays_free(apt_ctx *ctx, apti_unit_arrays *a)
{
    const apti_unit_arrays none = APT_ZERO;
    apti_free(ctx, a->salience);
    apti_free(ctx, a->probe);
    apti_free(ctx, a->keep);
    *a = none;                        /* a failed make leaves nothing to free twice */
}

static apt_result apti_unit_arrays_make(const apt_model *model, apti_unit_arrays *a, int32_t units, int64_t probes)
{
    a->salience = (float *)apti_calloc(model->ctx, 3 * (int64_t)units, (int64_t)sizeof(float));
    a->keep = (uint8_t *)apti_calloc(model->ctx, units, 1);
    a->probe = (float *)apti_calloc(model->ctx, 3 * probes, (int64_t)sizeof(float));
    if (a->salience != NULL && a->keep != NULL && a->probe != NULL) return APT_OK;
    apti_unit_arrays_free(model->ctx, a);
    return apti_fail(model->ctx, APT_E_MEMORY, "trainer: no memory for the salience of %d units", (int)units);
}

static void apti_unit_arrays_adopt(apt_trainer *t, const apti_unit_arrays *a, int64_t probes)
{
    apti_unit_arrays old = {t->salience, t->probe.act, t->keep};
    apti_unit_arrays_free(t->ctx, &old);
    t->salience = a->salience;
    t->keep = a->keep;
    t->probe.act = a->probe;
    t->probe.grad = a->probe + probes;
    t->probe.sum = a->probe + 2 * probes;
    t->probe.rows = 0;
}

/* APT_ADAPT_* are 1 << apti_linear_id; behind them comes the LM head. */
static bool apti_wants_adapter(const apt_trainer *t, int32_t site)
{
    const int32_t bit = site < apti_layer_sites(t->model) ? site % APTI_LINEARS : APTI_LINEARS;
    return t->desc.method != APT_METHOD_FULL && (t->desc.adapt >> bit & 1) != 0;
}

/* Which parameters a trainer of this desc trains: task heads always, adapters, everything for FULL. */
static bool apti_trains(const apt_trainer *t, const apti_param *p)
{
    return apti_is_adapter(p) || p->optional_in_file || t->desc.method == APT_METHOD_FULL;
}

/* Adapters at their first rank, task head (and for FULL everything) trainable. */
static apt_result apti_trainer_attach(apt_trainer *t)
{
    apt_model *m = t->model;
    apt_rng rng = apt_rng_make(t->desc.seed, (uint64_t)APTI_STREAM_ADAPTER << 48);
    apt_result r = APT_OK;
    m->scale = t->desc.scale;
    for (int32_t i = 0; i < APTI_HEAD_SLOTS && r == APT_OK; i++)
        if (m->head[i] != NULL && apti_trains(t, m->head[i])) r = apti_param_train(m, m->head[i]);
    for (int32_t i = 0; i < m->param_count && r == APT_OK && t->desc.method == APT_METHOD_FULL; i++)
        r = apti_param_train(m, &m->params[i]);
    for (int32_t k = 0; k < apti_sites(m) && r == APT_OK; k++)
        if (apti_wants_adapter(t, k)) r = apti_adapter_resize(m, k, t->desc.rank, true, &rng);
    t->adapter_budget = apti_adapter_total(m);
    return r;
}

static void apti_trainer_detach(apt_trainer *t)
{
    apt_model *m = t->model;
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param_freeze(m, &m->params[i]);
    }
    m->trainer = NULL;
}

APT_API void apt_trainer_destroy(apt_trainer *trainer)
{
    if (trainer == NULL) return;
    apt_ctx *ctx = trainer->ctx;
    apti_unit_arrays arrays = {trainer->salience, trainer->probe.act, trainer->keep};
    apti_trainer_detach(trainer);
    apti_unit_arrays_free(ctx, &arrays);
    apti_pass_free(ctx, trainer->pass);
    apti_teacher_drop(trainer);
    apti_iterative_drop(trainer);
    apti_free(ctx, trainer->importance);
    apti_free(ctx, trainer);
}

static apt_result apti_trainer_fill(apt_trainer *t)
{
    apt_units u;
    apti_unit_arrays arrays;
    const int64_t probes = apti_probe_count(t->model);
    apt_model_units(t->model, &u);
    apt_result r = apti_unit_arrays_make(t->model, &arrays, u.total, probes);
    if (r != APT_OK) return r;
    apti_unit_arrays_adopt(t, &arrays, probes);
    memset(t->keep, 1, (size_t)u.total);
    t->importance = (float *)apti_calloc(t->ctx, apti_sites(t->model), (int64_t)sizeof(float));
    if (t->importance == NULL) return apti_fail(t->ctx, APT_E_MEMORY, "trainer: no memory for adapter importance");
    r = apti_pass_create(t->model, &t->pass);
    return r == APT_OK ? apti_trainer_attach(t) : r;
}

APT_API apt_result apt_trainer_create(apt_model *model, const apt_train_desc *desc, apt_trainer **trainer)
{
    if (model == NULL) return APT_E_ARGUMENT;
    apt_ctx *ctx = model->ctx;
    if (desc == NULL || trainer == NULL) return apti_fail(ctx, APT_E_ARGUMENT, "apt_trainer_create: desc or trainer is NULL");
    if (model->trainer != NULL) return apti_fail(ctx, APT_E_STATE, "apt_trainer_create: the model has a trainer already");
    if (apti_adapter_total(model) > 0)
        return apti_fail(ctx, APT_E_STATE, "apt_trainer_create: the model has adapters; merge them first");
    apt_train_desc resolved = *desc;
    apti_desc_resolve(&resolved, &model->config);
    apt_result r = apti_desc_check(ctx, &resolved, &model->config);
    if (r != APT_OK) return r;
    apt_trainer *t = (apt_trainer *)apti_calloc(ctx, 1, (int64_t)sizeof(apt_trainer));
    if (t == NULL) return apti_fail(ctx, APT_E_MEMORY, "trainer: no memory for its frame");
    apti_compressed_drop(model);
    t->ctx = ctx;
    t->model = model;
    t->desc = resolved;
    model->trainer = t;
    r = apti_trainer_fill(t);
    if (r != APT_OK) {
        for (int32_t k = 0; k < apti_sites(model); k++) apti_adapter_remove(model, k);
        apt_trainer_destroy(t);
        return r;
    }
    t->structure = model->structure;
    *trainer = t;
    return APT_OK;
}

APT_API void apt_trainer_query(const apt_trainer *trainer, apt_train_desc *desc)
{
    if (trainer != NULL && desc != NULL) *desc = trainer->desc;
}

APT_API apt_model *apt_trainer_model(apt_trainer *trainer)
{
    return trainer != NULL ? trainer->model : NULL;
}

/* ------------------------------------------------------------------------------------------------ events */

static apt_event apti_event_of(apt_trainer *t, apt_event_kind kind)
{
    apt_event e = APT_ZERO;
    apt_units u;
    apt_model_units(t->model, &u);
    e.kind = kind;
    e.step = &t->info;
    e.trainer = t;
    e.heads = u.heads;
    e.neurons = u.neurons;
    e.hidden = u.hidden;
    e.budget_reached = 1;
    return e;
}

/* A cancel lets the call in progress finish its work, so that a run saved there goes on as if it had not been cancelled. */
static void apti_fire(apt_trainer *t, apt_event *event)
{
    if (t->desc.on_event != NULL && t->desc.on_event(event, t->desc.user) != 0) t->cancelled = true;
}

/* Brackets of the calls that fire events. Callbacks may not call them again. */
static apt_result apti_work_begin(apt_trainer *t, const char *what)
{
    if (t->working) return apti_fail(t->ctx, APT_E_STATE, "%s: not from inside an event", what);
    t->working = t->half_done = true;
    if (t->stage == APTI_STAGE_NONE) t->cancelled = false;            /* else the failed call still owes its answer */
    return APT_OK;
}

static apt_result apti_work_end(apt_trainer *t, apt_result r)
{
    t->working = t->half_done = false;
    if (r != APT_OK || !t->cancelled) return r;
    return apti_fail(t->ctx, APT_E_CANCELLED, "cancelled by the event callback at step %lld", (long long)t->step);
}

/* ------------------------------------------------------------------------------------------------ optimizer */

/* Everything the optimizer changes, in a fixed order. index counts up; NULL at the end. */
static apti_param *apti_trained(apt_trainer *t, int32_t index)
{
    if (index < t->model->param_count) return &t->model->params[index];
    index -= t->model->param_count;
    return index == 0 ? &t->transform.a : index == 1 ? &t->transform.b : NULL;
}

static bool apti_is_trained(const apti_param *p)
{
    return p->trainable && p->grad != NULL && apti_param_count(p) > 0;
}

/* Sum of squares over all gradients: blocks of fixed size in fixed order, so threads cannot change it. */
static double apti_gradient_norm(apt_trainer *t)
{
    double sum = 0;
    const apti_param *p;
    for (int32_t i = 0; (p = apti_trained(t, i)) != NULL; i++) {
        const int64_t n = apti_is_trained(p) ? apti_param_count(p) : 0;
        for (int64_t at = 0; at < n; at += 4096) {
            const float *g = p->grad + at;
            sum += (double)t->ctx->kernels->dot(g, g, apti_min_i64(4096, n - at));
        }
    }
    return sqrt(sum);
}

static double apti_learning_rate(const apt_train_desc *d, int64_t step)
{
    const double pi = 3.14159265358979323846;
    if (step < d->warmup_steps) return d->learning_rate * (double)(step + 1) / (double)d->warmup_steps;
    const int64_t span = apti_max_i64(1, d->steps - d->warmup_steps);
    const double done = (double)apti_min_i64(step - d->warmup_steps, span) / (double)span;
    if (d->lr_schedule == APT_LR_CONSTANT) return d->learning_rate;
    if (d->lr_schedule == APT_LR_COSINE) return d->learning_rate * 0.5 * (1 + cos(pi * done));
    return d->learning_rate * (1 - done);
}

/* w -= lr*sqrt(c2)/c1 * m / (sqrt(v) + eps*sqrt(c2)) + lr*decay*w, which is Adam with both bias corrections folded in. */
typedef struct apti_adam_job {
    apti_param *p;
    const uint64_t *mask;             /* or NULL: weights that stay 0 */
    const apti_kernels *kernels;
    float grad_scale, beta1, beta2, step_size, eps, decay;
} apti_adam_job;
#define APTI_ADAM_BLOCK 8192          /* whole words of a mask, which is applied while the block is in the cache */

static void apti_adam_task(int64_t index, int32_t thread, void *arg)
{
    const apti_adam_job *j = (const apti_adam_job *)arg;
    const int64_t at = index * APTI_ADAM_BLOCK, n = apti_min_i64(APTI_ADAM_BLOCK, apti_param_count(j->p) - at);
    (void)thread;
    j->kernels->adam(j->p->value + at, j->p->moment1 + at, j->p->moment2 + at, j->p->grad + at, n, j->grad_scale, j->beta1,
                     j->beta2, j->step_size, j->eps, j->decay);
    if (j->mask != NULL) apti_bitmask_run(j->p->value + at, j->mask + at / 64, n);
}

/* Weight decay leaves vectors (biases, norms) alone, as usual. */
static void apti_adam_update(apt_trainer *t, double grad_scale, double lr)
{
    const apt_train_desc *d = &t->desc;
    const double n = (double)++t->adam_steps, c1 = 1 - pow(d->beta1, n), root2 = sqrt(1 - pow(d->beta2, n));
    apti_param *p;
    for (int32_t i = 0; (p = apti_trained(t, i)) != NULL; i++) {
        if (!apti_is_trained(p)) continue;
        const uint64_t *mask = i < t->model->param_count ? apti_bitmask_of(t->model, p) : NULL;
        apti_adam_job job = {
            p,        mask,                     t->ctx->kernels,             (float)grad_scale,  d->beta1,
            d->beta2, (float)(lr * root2 / c1), (float)(d->epsilon * root2), p->dims == 2 ? (float)(lr * d->weight_decay) : 0.0f};
        apti_parallel_for(t->ctx, apti_ceil_div(apti_param_count(p), APTI_ADAM_BLOCK), apti_adam_task, &job);
        apti_param_repack(t->model, p);
    }
}

static void apti_zero_gradients(apt_trainer *t)
{
    apti_param *p;
    for (int32_t i = 0; (p = apti_trained(t, i)) != NULL; i++)
        if (apti_is_trained(p)) memset(p->grad, 0, (size_t)apti_param_count(p) * sizeof(float));
}

static void apti_zero_moments(apt_trainer *t)
{
    apti_param *p;
    t->adam_steps = 0;
    for (int32_t i = 0; (p = apti_trained(t, i)) != NULL; i++) {
        if (!apti_is_trained(p)) continue;
        memset(p->moment1, 0, (size_t)apti_param_count(p) * sizeof(float));
        memset(p->moment2, 0, (size_t)apti_param_count(p) * sizeof(float));
    }
}

/* Clip by the global norm, update, clear. A non-finite gradient skips the update. */
static void apti_optimize(apt_trainer *t, double norm)
{
    const double clip = t->desc.clip;
    t->info.gradient_norm = norm;
    t->info.learning_rate = apti_learning_rate(&t->desc, t->step);
    t->info.skipped = !apti_finite((float)norm);
    if (!t->info.skipped) apti_adam_update(t, clip > 0 && norm > clip ? clip / norm : 1.0, t->info.learning_rate);
    apti_zero_gradients(t);
}
/* ------------------------------------------------------------------------------------------------ self-distillation */

static void apti_transform_free(apt_trainer *t)
{
    apti_param_release(t->ctx, &t->transform.a);
    apti_param_release(t->ctx, &t->transform.b);
    apti_free(t->ctx, t->transform.place);
    memset(&t->transform, 0, sizeof(t->transform));
}

static void apti_teacher_drop(apt_trainer *t)
{
    apti_transform_free(t);
    if (t->teacher != NULL) {
        apti_model_free(t->teacher);
        for (int32_t i = 0; i < APTI_EMBED_SLOTS; i++)                /* the whole tables are no longer needed */
            if (t->model->embed[i] != NULL && !apti_is_shared(t->model->embed[i]))
                (void)apti_param_own(t->model, t->model->embed[i]);
    }
    apti_pass_free(t->ctx, t->teacher_pass);
    apti_free(t->ctx, t->distill_block);
    apti_free(t->ctx, t->capture);
    t->teacher = NULL;
    t->teacher_pass = NULL;
    t->distill_block = NULL;
    t->capture = NULL;
    t->distill_bytes = 0;
}

/* One matrix of Tr, with its gradient and moments. */
static bool apti_transform_param(apt_trainer *t, apti_param *p, const char *name, int64_t rows, int64_t cols)
{
    memset(p, 0, sizeof(*p));
    snprintf(p->name, sizeof(p->name), "%s", name);
    p->dims = 2;
    p->layer = -1;
    p->rows = rows;
    p->cols = cols;
    p->trainable = true;
    return apti_param_reserve(t->model, p);
}

/* Tr for the present student and a teacher of `hidden` dimensions of which the student has all, in order. */
static bool apti_transform_make(apt_trainer *t, apti_transform *tr, int64_t hidden)
{
    const int64_t d = t->model->config.hidden;
    apt_rng rng = apti_trainer_rng(t, APTI_STREAM_TRANSFORM);
    memset(tr, 0, sizeof(*tr));
    tr->place = (int32_t *)apti_alloc(t->ctx, d, (int64_t)sizeof(int32_t));
    if (!apti_transform_param(t, &tr->a, "transform_A", APTI_TRANSFORM_RANK, d) ||
        !apti_transform_param(t, &tr->b, "transform_B", hidden, APTI_TRANSFORM_RANK) || tr->place == NULL)
        return false;
    const apt_adapter view = apti_adapter_view(t->model, tr->a.value, tr->b.value, &tr->a, &tr->b);
    (void)apt_adapter_init(&view, &rng);
    for (int64_t i = 0; i < d; i++) tr->place[i] = (int32_t)i;
    return true;
}

/* A snapshot of the student becomes the teacher. On failure the old teacher stays. */
static apt_result apti_teacher_take(apt_trainer *t)
{
    apt_model *teacher = NULL;
    apti_pass *pass = NULL;
    apti_transform tr = APT_ZERO;
    float **capture = NULL;
    apt_result r = apti_model_snapshot(t->model, &teacher);
    if (r == APT_OK) r = apti_pass_create(teacher, &pass);
    if (r == APT_OK) {
        capture = (float **)apti_calloc(t->ctx, t->model->config.layers, (int64_t)sizeof(float *));
        if (capture == NULL || !apti_transform_make(t, &tr, teacher->config.hidden))
            r = apti_fail(t->ctx, APT_E_MEMORY, "teacher: no memory for its transform");
    }
    if (r != APT_OK) {
        apti_param_release(t->ctx, &tr.a);
        apti_param_release(t->ctx, &tr.b);
        apti_free(t->ctx, tr.place);
        apti_free(t->ctx, capture);
        apti_pass_free(t->ctx, pass);
        if (teacher != NULL) apti_model_free(teacher);
        return r;
    }
    apti_teacher_drop(t);
    t->teacher = teacher;
    t->teacher_pass = pass;
    t->transform = tr;
    t->capture = capture;
    apt_event e = apti_event_of(t, APT_EVENT_TEACHER);
    apti_fire(t, &e);
    return APT_OK;
}

/* Tr after a compaction of the student: its columns and places follow the surviving hidden dimensions. */
static bool apti_transform_cut(apt_trainer *t, apti_transform *out, const apt_axis *hidden)
{
    const apti_transform *tr = &t->transform;
    apti_param *a = &out->a;
    apt_axis rows = APT_ZERO;
    rows.units = rows.kept = (int32_t)tr->a.rows;
    rows.width = 1;
    memset(out, 0, sizeof(*out));
    out->place = (int32_t *)apti_alloc(t->ctx, hidden->kept, (int64_t)sizeof(int32_t));
    if (out->place == NULL || !apti_transform_param(t, a, "transform_A", tr->a.rows, hidden->kept)) return false;
    (void)apt_gather(a->value, a->cols, tr->a.value, tr->a.cols, &rows, hidden);
    (void)apt_gather(a->moment1, a->cols, tr->a.moment1, tr->a.cols, &rows, hidden);
    (void)apt_gather(a->moment2, a->cols, tr->a.moment2, tr->a.cols, &rows, hidden);
    for (int32_t i = 0; i < hidden->kept; i++) out->place[i] = tr->place[hidden->index != NULL ? hidden->index[i] : i];
    return true;
}

/* Pieces of distill_block for one batch. */
typedef struct apti_distill_buffers { float *hidden[4], *mapped, *u, *du; double *row_sum; int64_t bytes; } apti_distill_buffers;

static apti_distill_buffers apti_distill_plan(const apt_trainer *t, char *base, int64_t rows)
{
    const int64_t d = t->teacher->config.hidden, f = (int64_t)sizeof(float);
    apti_distill_buffers b;
    apti_bump bump = {base, 0};
    for (int32_t i = 0; i < 4; i++) b.hidden[i] = (float *)apti_bump_take(&bump, i < t->map.pairs ? rows * d : 0, f);
    b.mapped = apti_bump_matrix(&bump, rows, d);
    b.u = (float *)apti_bump_take(&bump, rows * APTI_TRANSFORM_RANK, f);
    b.du = (float *)apti_bump_take(&bump, rows * APTI_TRANSFORM_RANK, f);
    b.row_sum = (double *)apti_bump_take(&bump, rows, (int64_t)sizeof(double));
    b.bytes = bump.used;
    return b;
}

/* What counts as a layer here is a whole one: for a decoder with cross attention, both of its halves. */
static int32_t apti_distill_layers(const apt_config *c)
{
    return c->layers - c->decoder_layers;
}

/* The layer whose output is that of whole layer i. */
static int32_t apti_distill_end(const apt_config *c, int32_t i)
{
    const int32_t first = apti_first_stack(c);
    return i < first ? i : first + 2 * (i - first) + 1;
}

/* Draws the layer pairs of this micro-batch; layers that lost both sublayers are not matched, and a pair stays in its stack. */
static apt_result apti_distill_draw(apt_trainer *t)
{
    apt_rng rng = apti_trainer_rng(t, APTI_STREAM_LAYERS);
    const apt_config *c = &t->model->config;
    const int32_t first = apti_first_stack(c), layers = apti_distill_layers(c);
    uint8_t whole[1024];
    for (int32_t i = 0; i < layers; i++) {
        const int32_t l = apti_distill_end(c, i);
        whole[i] = t->model->shape[l].heads == 0 && t->model->shape[l].neurons == 0;
        if (i >= first) whole[i] = whole[i] && t->model->shape[l - 1].heads == 0;
    }
    t->map.pairs = 0;
    const apt_result r = t->desc.distill_layer > 0 ? apt_distill_match(&t->map, whole, layers, &rng) : APT_OK;
    int32_t pairs = 0;
    for (int32_t i = 0; i < t->map.pairs && r == APT_OK; i++) {
        const int32_t teacher = t->map.teacher[i], student = t->map.student[i];
        if ((teacher < first) != (student < first)) continue;
        t->map.teacher[pairs] = apti_distill_end(c, teacher);
        t->map.student[pairs++] = apti_distill_end(c, student);
    }
    t->map.pairs = pairs;
    return r;
}

/* The teacher's logits and chosen hidden states for this batch; it keeps nothing for a backward. */
static apt_result apti_teacher_forward(apt_trainer *t, const apt_batch *batch)
{
    const double start = apti_seconds();
    const bool two = t->teacher->config.decoder_layers > 0;
    const int64_t rows = apti_max_i64(batch->offsets[batch->sequences], two ? batch->target_offsets[batch->sequences] : 0);
    const int32_t layers = t->teacher->config.layers;
    bool last = false;
    apt_result r = apti_distill_draw(t);
    if (r != APT_OK) return r;
    const int64_t bytes = apti_distill_plan(t, NULL, rows).bytes;
    if (bytes > t->distill_bytes) {
        apti_free(t->ctx, t->distill_block);
        t->distill_bytes = 0;
        t->distill_block = (float *)apti_alloc(t->ctx, bytes, 1);
        if (t->distill_block == NULL)
            return apti_fail(t->ctx, APT_E_MEMORY, "distillation: no memory for %lld tokens", (long long)rows);
        t->distill_bytes = bytes;
    }
    const apti_distill_buffers b = apti_distill_plan(t, (char *)t->distill_block, rows);
    for (int32_t l = 0; l < layers; l++) t->capture[l] = NULL;
    for (int32_t i = 0; i < t->map.pairs; i++) {
        t->capture[t->map.teacher[i]] = b.hidden[i];
        last = last || t->map.teacher[i] == layers - 1;
    }
    t->teacher_pass->capture = t->capture;
    r = apti_forward(t->teacher_pass, batch, last ? APTI_PASS_ALL_ROWS : 0);
    t->info.teacher_milliseconds += 1e3 * (apti_seconds() - start);
    return r;
}

/* ---- prediction loss: adds its gradient to dlogits ---- */

/* SPAN: the distributions run over the tokens of each sequence; one column of the (tokens, 2) logits is copied out. */
static double apti_distill_span(apt_trainer *t, double scale)
{
    apti_pass *s = t->pass;
    const apt_batch *b = s->batch;
    const double each = 1.0 / (2.0 * b->sequences);
    float *row = s->g, *target = s->t;                /* free until the backward begins */
    double sum = 0, loss = 0;
    for (int32_t q = 0; q < 2 * b->sequences; q++) {
        const int64_t at = b->offsets[q / 2], n = b->offsets[q / 2 + 1] - at, c = q % 2;
        float *grad = s->dq;
        for (int64_t i = 0; i < n; i++) {
            row[i] = s->logits[2 * (at + i) + c];
            target[i] = t->teacher_pass->logits[2 * (at + i) + c];
            grad[i] = 0;
        }
        (void)apt_distill_kl(&loss, grad, n, row, n, target, n, NULL, 1, n, t->desc.distill_temperature, (float)(scale * each));
        for (int64_t i = 0; i < n; i++) s->dlogits[2 * (at + i) + c] += grad[i];
        sum += loss * each;
    }
    return sum;
}

typedef struct apti_kl_job {
    float *grad;
    const float *student, *teacher;
    double *row_loss;
    int64_t ld, vocab;
    float temperature, scale;
} apti_kl_job;

static void apti_kl_task(int64_t index, int32_t thread, void *arg)
{
    const apti_kl_job *j = (const apti_kl_job *)arg;
    const int64_t at = index * j->ld;
    (void)thread;
    memset(j->grad + at, 0, (size_t)j->vocab * sizeof(float));
    (void)apt_distill_kl(&j->row_loss[index], j->grad + at, j->ld, j->student + at, j->ld, j->teacher + at, j->ld, NULL, 1,
                         j->vocab, j->temperature, j->scale);
}

/* LM: mean KL over the vocabulary at the labelled rows, a chunk of logits of both models at a time; dhead += its gradient. */
static double apti_distill_lm(apt_trainer *t, double scale)
{
    apti_pass *s = t->pass, *teacher = t->teacher_pass;
    const apti_lm_op x = apti_decoder_of(s), y = apti_decoder_of(teacher);
    const apti_linear_grad grad = apti_decoder_grads(s->model);
    const int64_t vocab = x.head.out, ld = apti_ld(vocab), ldx = apti_ld(x.head.in), ldy = apti_ld(y.head.in), rows = s->labelled;
    const double each = rows > 0 ? 1.0 / (double)rows : 0;
    double *row_loss = apti_distill_plan(t, (char *)t->distill_block, s->most_rows).row_sum, total = 0;
    apti_kl_job job = {s->kl_work, s->mlm_work, teacher->mlm_work, row_loss, ld, vocab, t->desc.distill_temperature,
                       (float)(scale * each)};
    for (int64_t first = 0; first < rows; first += s->mlm_chunk) {
        const int64_t n = apti_min_i64(s->mlm_chunk, rows - first);
        const float *h = s->head_in + first * ldx;
        apti_lm_logits(t->ctx, &x, s->mlm_work, ld, h, ldx, n);
        apti_lm_logits(t->ctx, &y, teacher->mlm_work, ld, teacher->head_in + first * ldy, ldy, n);
        apti_parallel_for(t->ctx, n, apti_kl_task, &job);
        for (int64_t i = 0; i < n; i++) total += row_loss[i] * each;
        apti_lm_grads(t->ctx, &x, s->dhead + first * ldx, ldx, true, s->kl_work, ld, h, ldx, n, &grad);
    }
    return total;
}

static double apti_distill_pred(apt_trainer *t, double scale)
{
    apti_pass *s = t->pass;
    const int64_t width = apti_head_width(&t->model->config), n = s->batch->sequences;
    const float *teacher = t->teacher_pass->logits;
    double loss = 0;
    switch (t->model->config.task) {
    case APT_TASK_CLASSIFY:
        (void)apt_distill_kl(&loss, s->dlogits, width, s->logits, width, teacher, width, NULL, n, width,
                             t->desc.distill_temperature, (float)scale);
        return loss;
    case APT_TASK_REGRESS:
        (void)apt_distill_mse(&loss, s->dlogits, 1, s->logits, 1, teacher, 1, NULL, n, 1, (float)scale);
        return loss;
    case APT_TASK_SPAN: return apti_distill_span(t, scale);
    case APT_TASK_LM: return t->desc.distill_pred > 0 ? apti_distill_lm(t, scale) : 0;
    case APT_TASK_MLM: case APT_TASK_NONE: default: return 0;      /* the vocabulary's logits are never whole */
    }
}

/* ---- layer loss: MSE(Tr(h_student), h_teacher) of each drawn pair, injected where the backward reaches that layer ---- */

typedef struct apti_layer_loss {
    const apti_transform *tr;
    float *mapped;                    /* in: s B A h; out: d loss / d Tr(h) */
    const float *h, *teacher;
    float *dy;                        /* receives the identity's part */
    double *row_sum;
    int64_t ld, ld_mapped, d, dt, rows;
    float coefficient;                /* 2 * factor / (rows * teacher hidden) */
} apti_layer_loss;

#define APTI_LAYER_LOSS_ROWS 32
static void apti_layer_loss_task(int64_t index, int32_t thread, void *arg)
{
    const apti_layer_loss *j = (const apti_layer_loss *)arg;
    const int64_t first = index * APTI_LAYER_LOSS_ROWS, end = apti_min_i64(first + APTI_LAYER_LOSS_ROWS, j->rows);
    (void)thread;
    for (int64_t r = first; r < end; r++) {
        float *m = j->mapped + r * j->ld_mapped;
        const float *h = j->h + r * j->ld, *target = j->teacher + r * j->dt;
        double sum = 0;
        for (int64_t i = 0; i < j->d; i++) m[j->tr->place[i]] += h[i];
        for (int64_t i = 0; i < j->dt; i++) {
            const float e = m[i] - target[i];
            sum += (double)e * e;
            m[i] = e * j->coefficient;
        }
        for (int64_t i = 0; i < j->d; i++) j->dy[r * j->ld + i] += m[j->tr->place[i]];
        j->row_sum[r] = sum;
    }
}

/* One product with a row-major right side. */
static void apti_plain_product(apt_ctx *ctx, float *c, int64_t ldc, bool accumulate, int64_t m, int64_t n, int64_t k,
                               const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t ldb, apti_b_kind kind)
{
    apti_gemm g;
    memset(&g, 0, sizeof(g));
    g.m = m;
    g.n = n;
    g.part[0].k = k;
    g.part[0].a = a;
    g.part[0].a_row = a_row;
    g.part[0].a_col = a_col;
    g.part[0].kind = kind;
    g.part[0].b = b;
    g.part[0].ldb = ldb;
    g.c = c;
    g.ldc = ldc;
    g.accumulate = accumulate;
    g.act = -1;
    apti_gemm_run(ctx, &g);
}

/* Hook of the student's backward: dy(rows, d) += gradient of the layer loss at this layer's output. */
static void apti_distill_inject(void *user, int32_t layer, float *dy, int64_t ld)
{
    apt_trainer *t = (apt_trainer *)user;
    apti_transform *tr = &t->transform;
    apt_ctx *ctx = t->ctx;
    const int64_t rows = t->pass->acts[layer].rows_q, d = t->model->config.hidden, dt = t->teacher->config.hidden,
                  ldm = apti_ld(dt), k = APTI_TRANSFORM_RANK;
    const apti_distill_buffers b = apti_distill_plan(t, (char *)t->distill_block, t->pass->most_rows);
    const float *h = t->pass->acts[layer].y2;
    for (int32_t i = 0; i < t->map.pairs; i++) {
        if (t->map.student[i] != layer) continue;
        apti_plain_product(ctx, b.u, k, false, rows, k, d, h, ld, 1, tr->a.value, d, APTI_B_PLAIN_T);
        ctx->kernels->scale(b.u, b.u, t->model->scale, rows * k);
        apti_plain_product(ctx, b.mapped, ldm, false, rows, dt, k, b.u, k, 1, tr->b.value, k, APTI_B_PLAIN_T);
        apti_layer_loss job = {tr, b.mapped, h, b.hidden[i], dy, b.row_sum, ld, ldm, d, dt, rows, 0};
        job.coefficient = (float)(2.0 * t->layer_scale / ((double)rows * (double)dt));
        apti_parallel_for(ctx, apti_ceil_div(rows, APTI_LAYER_LOSS_ROWS), apti_layer_loss_task, &job);
        double sum = 0;
        for (int64_t r = 0; r < rows; r++) sum += b.row_sum[r];
        t->distill_loss += t->desc.distill_layer * sum / ((double)rows * (double)dt);
        apti_plain_product(ctx, tr->b.grad, k, true, dt, k, rows, b.mapped, 1, ldm, b.u, k, APTI_B_PLAIN);
        apti_plain_product(ctx, b.du, k, false, rows, k, dt, b.mapped, ldm, 1, tr->b.value, k, APTI_B_PLAIN);
        ctx->kernels->scale(b.du, b.du, t->model->scale, rows * k);
        apti_plain_product(ctx, tr->a.grad, d, true, k, d, rows, b.du, 1, k, h, ld, APTI_B_PLAIN);
        apti_plain_product(ctx, dy, ld, true, rows, d, k, b.du, k, 1, tr->a.value, d, APTI_B_PLAIN);
    }
}
/* ------------------------------------------------------------------------------------------------ salience and growth */

/* S of every unit from the sums of this step (method.md, "Salience of a block"), into now[units]. */
static apt_result apti_salience_now(const apt_trainer *t, float *now, float *point)
{
    const apt_model *m = t->model;
    const apti_probe *p = &t->probe;
    const int64_t d = m->config.hidden;
    apt_result r = APT_OK;
    for (int32_t l = 0; l < m->config.layers && r == APT_OK; l++) {
        const apt_layer_shape *s = &m->shape[l];
        const int64_t h = apti_probe_head(m, l), n = apti_probe_neuron(m, l);
        const int64_t width = s->kv_heads > 0 ? (int64_t)s->heads / s->kv_heads * m->config.head_dim : 1;
        r = apt_salience_finish(now + apti_unit_head(m, l), p->act + h, p->grad + h, s->kv_heads, width);
        if (r == APT_OK) r = apt_salience_finish(now + apti_unit_neuron(m, l), p->act + n, p->grad + n, s->neurons, 1);
    }
    float *hidden = now + apti_unit_hidden(m);
    memset(hidden, 0, (size_t)d * sizeof(float));
    for (int32_t i = 0; i < apti_probe_points(m) && r == APT_OK; i++) {
        const int64_t at = apti_probe_hidden(m, i);
        r = apt_salience_finish(point, p->act + at, p->grad + at, d, 1);
        for (int64_t j = 0; j < d && r == APT_OK; j++) hidden[j] += point[j];
    }
    return r;
}

static apt_result apti_salience_update(apt_trainer *t)
{
    apt_units u;
    apt_model_units(t->model, &u);
    float *now = t->salience + u.total;
    apt_result r = apti_salience_now(t, now, now + u.total);
    if (r == APT_OK) r = apt_salience_ema(t->salience, now, u.total, t->desc.salience_momentum);
    if (r == APT_OK) t->observed = true;
    else r = apti_fail(t->ctx, r, "salience: an activation or gradient is NaN or infinite at step %lld", (long long)t->step);
    return r;
}

static void apti_probe_clear(apt_trainer *t)
{
    memset(t->probe.act, 0, (size_t)apti_probe_count(t->model) * 3 * sizeof(float));
}

/* I of every adapter (method.md, "Adapters"), averaged. */
static apt_result apti_importance_update(apt_trainer *t)
{
    for (int32_t k = 0; k < apti_sites(t->model); k++) {
        const apti_param *pa = apti_site_of(t->model, k).a, *pb = apti_site_of(t->model, k).b;
        float now = 0;
        if (pa->rows == 0) continue;
        const apt_adapter view = apti_adapter_view(t->model, pa->value, pb->value, pa, pb);
        apt_result r = apt_adapter_importance(&view, pb->grad, &now);
        if (r == APT_OK) r = apt_salience_ema(&t->importance[k], &now, 1, t->desc.salience_momentum);
        if (r != APT_OK) return apti_fail(t->ctx, r, "importance of %s is NaN or infinite", pb->name);
    }
    return APT_OK;
}

/* The adapters that there are (places without one would make the upper half too large): place[i] is the number of its place,
   next[i] the rank after the growth, fresh[2 * i] and the entry behind it the buffers of one that grows. */
typedef struct apti_growth {
    int32_t *place, *rank, *next, count;
    int64_t *per_rank;
    float *importance;
    apti_param *fresh;
    void *block;
} apti_growth;

static int64_t apti_growth_plan(apti_growth *g, char *base, int64_t n)
{
    apti_bump b = {base, 0};
    g->place = (int32_t *)apti_bump_take(&b, n, (int64_t)sizeof(int32_t));
    g->rank = (int32_t *)apti_bump_take(&b, n, (int64_t)sizeof(int32_t));
    g->next = (int32_t *)apti_bump_take(&b, n, (int64_t)sizeof(int32_t));
    g->per_rank = (int64_t *)apti_bump_take(&b, n, (int64_t)sizeof(int64_t));
    g->importance = (float *)apti_bump_take(&b, n, (int64_t)sizeof(float));
    g->fresh = (apti_param *)apti_bump_take(&b, 2 * n, (int64_t)sizeof(apti_param));
    return b.used;
}

static bool apti_growth_reserve(apt_model *m, const apti_growth *g, int32_t i)
{
    return apti_adapter_reserve(m, &g->fresh[2 * i], g->place[i], g->next[i], true);
}

/* importance NULL (an estimate): the entries of B stand for it, since I is a sum over them. */
static void apti_growth_list(const apt_model *m, apti_growth *g, const float *importance)
{
    g->count = 0;
    for (int32_t k = 0; k < apti_sites(m); k++) {
        const apti_site site = apti_site_of(m, k);
        if (site.a->rows == 0) continue;
        g->place[g->count] = k;
        g->rank[g->count] = (int32_t)site.a->rows;
        g->per_rank[g->count] = apti_adapter_per_rank(&site);
        g->importance[g->count++] = importance != NULL ? importance[k] : (float)apti_param_count(site.b);
    }
}

/* The budget rises in a straight line to `growth` times the start. */
static apt_result apti_growth_ranks(apti_growth *g, const apt_train_desc *d, int64_t step, int64_t start)
{
    const int64_t span = apti_max_i64(1, d->prune_end - d->prune_begin);
    const double done = (double)apti_min_i64(span, apti_max_i64(0, step - d->prune_begin)) / (double)span;
    const int64_t budget = (int64_t)((double)start * (1 + (d->growth - 1) * done));
    return apt_adapter_plan(g->next, g->importance, g->rank, g->per_rank, g->count, budget, d->max_rank);
}

static apt_result apti_growth_make(apt_trainer *t, apti_growth *g)
{
    apt_model *m = t->model;
    const int32_t most = apti_sites(m);
    g->block = apti_calloc(t->ctx, apti_growth_plan(g, NULL, most), 1);
    if (g->block == NULL) return apti_fail(t->ctx, APT_E_MEMORY, "growth: no memory for its plan");
    (void)apti_growth_plan(g, (char *)g->block, most);
    apti_growth_list(m, g, t->importance);
    const apt_result r = apti_growth_ranks(g, &t->desc, t->step, t->adapter_budget);
    if (r != APT_OK) return apti_fail(t->ctx, r, "growth at step %lld: %s", (long long)t->step, apt_result_text(r));
    for (int32_t i = 0; i < g->count; i++)
        if (g->next[i] > g->rank[i] && !apti_growth_reserve(m, g, i))
            return apti_fail(t->ctx, APT_E_MEMORY, "growth: no memory for %s at rank %d", g->fresh[2 * i].name, (int)g->next[i]);
    return APT_OK;
}

/* The upper half by importance grows: all of it or, when memory runs out, none. */
static apt_result apti_grow(apt_trainer *t)
{
    apt_model *m = t->model;
    apti_growth g = APT_ZERO;
    apt_event e = apti_event_of(t, APT_EVENT_GROW);
    e.parameters_before = apti_adapter_total(m);
    const apt_result r = apti_growth_make(t, &g);
    apt_rng rng = apti_trainer_rng(t, APTI_STREAM_GROW);
    for (int32_t i = 0; i < g.count; i++) {
        apti_param *fresh = &g.fresh[2 * i];
        if (r == APT_OK) apti_adapter_adopt(m, fresh, g.place[i], &rng);
        else for (int32_t k = 0; k < 2; k++) apti_param_release(t->ctx, &fresh[k]);
    }
    t->structure = m->structure;
    apti_free(t->ctx, g.block);
    e.parameters_after = apti_adapter_total(m);
    if (e.parameters_after != e.parameters_before) apti_fire(t, &e);
    return r;
}

/* ------------------------------------------------------------------------------------------------ compaction while training */

/* The context sums of this step outlive the cut: a decision right behind it still needs them for the kurtosis of heads. */
static void apti_probe_cut(const apt_trainer *t, float *sum, const apti_survivors *s)
{
    int64_t at = 0;
    for (int32_t l = 0; l < t->model->config.layers; l++) {
        const apt_axis *head = &s->head[l];
        const int64_t width = (int64_t)head->kept * head->width;
        (void)apt_gather(sum + at, width, t->probe.sum + apti_probe_head(t->model, l), (int64_t)head->units * head->width, NULL,
                         head);
        at += width + s->neuron[l].kept;
    }
}

/* apti_probe_count of the model that the survivors make. */
static int64_t apti_probe_survivors(const apt_model *m, const apti_survivors *s)
{
    int64_t n = (int64_t)apti_probe_points(m) * s->hidden.kept;
    for (int32_t l = 0; l < m->config.layers; l++) n += (int64_t)s->head[l].kept * s->head[l].width + s->neuron[l].kept;
    return n;
}

/* Model, salience, keep and Tr shrink together or not at all. */
static apt_result apti_shrink(apt_trainer *t)
{
    apt_model *m = t->model;
    apt_units u;
    apt_model_units(m, &u);
    apti_unit_arrays arrays = APT_ZERO;
    apti_survivors s = APT_ZERO;
    apti_transform tr = APT_ZERO;
    int32_t left = 0;
    apti_pass_shrink(t->pass);
    for (int32_t i = 0; i < u.total; i++) left += m->masks[i] != 0;
    apt_result r = apti_unit_arrays_make(m, &arrays, left, apti_probe_count(m));
    if (r == APT_OK) r = apti_survivors_make(m, &s);
    if (r == APT_OK && t->teacher != NULL && !apti_transform_cut(t, &tr, &s.hidden))
        r = apti_fail(t->ctx, APT_E_MEMORY, "compaction: no memory for the distillation's transform");
    for (int32_t i = 0, j = 0; i < u.total && r == APT_OK; i++) {
        if (m->masks[i] == 0) continue;
        arrays.salience[j] = t->salience[i];
        arrays.keep[j++] = 1;
    }
    const int64_t probes = r == APT_OK ? apti_probe_survivors(m, &s) : 0;
    if (r == APT_OK) apti_probe_cut(t, arrays.probe + 2 * probes, &s);
    if (r == APT_OK) r = apt_model_compact(m);
    if (r == APT_OK) {
        apti_unit_arrays_adopt(t, &arrays, apti_probe_count(m));
        if (t->teacher != NULL) {
            tr.b = t->transform.b;                    /* follows the teacher, not the student */
            memset(&t->transform.b, 0, sizeof(t->transform.b));
            apti_transform_free(t);
            t->transform = tr;
        }
        t->structure = m->structure;
        if (t->desc.reset_moments) apti_zero_moments(t);
    } else {
        apti_unit_arrays_free(t->ctx, &arrays);
        apti_param_release(t->ctx, &tr.a);
        apti_free(t->ctx, tr.place);
    }
    apti_survivors_free(t->ctx, &s);
    return r;
}

/* Masks go to exactly 0 or 1 as decided; what is at 0 is removed. On failure they glide on. */
static apt_result apti_snap_and_shrink(apt_trainer *t)
{
    apt_model *m = t->model;
    float *gliding = m->masks;
    apt_units u;
    if (gliding == NULL) return APT_OK;
    apt_model_units(m, &u);
    m->masks = (float *)apti_alloc(t->ctx, u.total, (int64_t)sizeof(float));
    apt_result r = APT_OK;
    if (m->masks == NULL) r = apti_fail(t->ctx, APT_E_MEMORY, "compaction: no memory for %d masks", (int)u.total);
    else {
        memcpy(m->masks, gliding, (size_t)u.total * sizeof(float));
        (void)apt_mask_snap(m->masks, t->keep, u.total);
        r = apti_shrink(t);
    }
    if (r == APT_OK) {
        apti_free(t->ctx, gliding);
        return r;
    }
    apti_free(t->ctx, m->masks);
    m->masks = gliding;
    return r;
}

static apt_result apti_settle(apt_trainer *t)
{
    apt_model *m = t->model;
    const int64_t bytes = t->ctx->bytes, before = apti_prunable(&m->config);
    const apt_result r = apti_snap_and_shrink(t);
    if (r != APT_OK) return r;
    t->moving = false;
    apt_event e = apti_event_of(t, APT_EVENT_COMPACT);
    e.parameters_before = before;
    e.parameters_after = apti_prunable(&m->config);
    e.bytes_before = bytes;
    e.bytes_after = t->ctx->bytes;
    t->info.kept = (double)e.parameters_after / (double)m->prunable_dense;
    apti_fire(t, &e);
    return APT_OK;
}

/* ------------------------------------------------------------------------------------------------ decisions */

/* Outlier term of every unit: kurtosis of heads (output projection times mean context), neurons (down projection) and hidden
   dimensions (their columns in all input projections). `values` has room for the largest matrix. */
static apt_result apti_outliers(const apt_trainer *t, float *kurtosis, float *values, apt_moments *moments)
{
    const apt_model *m = t->model;
    const int64_t d = m->config.hidden, dh = m->config.head_dim;
    const int32_t readers[] = {APTI_QUERY, APTI_KEY, APTI_VALUE, APTI_UP, APTI_GATE};
    apt_result r = APT_OK;
    memset(moments, 0, (size_t)d * sizeof(apt_moments));
    for (int32_t l = 0; l < m->config.layers && r == APT_OK; l++) {
        const apt_layer_shape *s = &m->shape[l];
        const int64_t width = s->kv_heads > 0 ? (int64_t)s->heads / s->kv_heads * dh : 1;
        const apti_param *o = m->layers[l].slot[2 * APTI_OUTPUT], *down = m->layers[l].slot[2 * APTI_DOWN];
        apti_param_get(m, o, values);
        r = apt_unit_kurtosis(kurtosis + apti_unit_head(m, l), t->probe.sum + apti_probe_head(m, l), values, o->cols, d,
                              s->kv_heads, width);
        if (down != NULL) apti_param_get(m, down, values);
        if (r == APT_OK && down != NULL)
            r = apt_unit_kurtosis(kurtosis + apti_unit_neuron(m, l), NULL, values, down->cols, d, s->neurons, 1);
        for (int32_t i = 0; i < 5 && r == APT_OK; i++) {
            const apti_param *w = m->layers[l].slot[2 * readers[i]];
            if (w == NULL) continue;
            apti_param_get(m, w, values);
            r = apt_unit_moments(moments, NULL, values, d, w->rows, d, 1);
        }
    }
    return r == APT_OK ? apt_moments_kurtosis(kurtosis + apti_unit_hidden(m), moments, d) : r;
}

/* Cross attention has layers of its own here (apt_config.decoder_layers), which cost what any attention costs. */
static apt_transformer apti_transformer_of(const apt_model *m)
{
    apt_transformer shape = APT_ZERO;
    shape.layers = m->config.layers;
    shape.gated = m->config.gated;
    shape.head_dim = m->config.head_dim;
    shape.query_heads = 1;
    for (int32_t l = 0; l < m->config.layers; l++)
        if (m->shape[l].kv_heads > 0) shape.query_heads = m->shape[l].heads / m->shape[l].kv_heads;
    return shape;
}

/* Everything a search needs, in one block of memory. */
typedef struct apti_decision {
    float *salience, *kurtosis, *values;
    apt_moments *moments;
    int32_t *group, *kind, *least, *round_to, *kept;
    uint8_t *keep;
    void *scratch;
    int64_t scratch_bytes;
} apti_decision;

static int64_t apti_decision_plan(const apt_model *m, apti_decision *d, char *base, int32_t units, int32_t groups)
{
    const int64_t f = (int64_t)sizeof(float), i = (int64_t)sizeof(int32_t);
    apti_bump b = {base, 0};
    d->salience = (float *)apti_bump_take(&b, units, f);
    d->kurtosis = (float *)apti_bump_take(&b, units, f);
    d->values = (float *)apti_bump_take(&b, apti_largest_layer(m), f);
    d->moments = (apt_moments *)apti_bump_take(&b, m->config.hidden, (int64_t)sizeof(apt_moments));
    d->group = (int32_t *)apti_bump_take(&b, units, i);
    d->kind = (int32_t *)apti_bump_take(&b, units, i);
    d->least = (int32_t *)apti_bump_take(&b, groups, i);
    d->round_to = (int32_t *)apti_bump_take(&b, groups, i);
    d->kept = (int32_t *)apti_bump_take(&b, groups, i);
    d->keep = (uint8_t *)apti_bump_take(&b, units, 1);
    d->scratch_bytes = apt_mask_search_scratch(units, groups);
    d->scratch = apti_bump_take(&b, d->scratch_bytes, 1);
    return b.used;
}

/* Group and kind of every unit; kinds that must not be pruned get a floor of all their units. */
static void apti_decision_groups(const apt_trainer *t, apti_decision *d, const apt_transformer *shape)
{
    const apt_model *m = t->model;
    apt_limits limits = APT_ZERO;
    limits.min_hidden = t->desc.min_hidden;
    limits.round_heads = t->desc.round_heads;
    limits.round_neurons = t->desc.round_neurons;
    limits.round_hidden = t->desc.round_hidden;
    (void)apt_transformer_limits(d->least, d->round_to, shape, &limits);
    for (int32_t what = 0, l = 0; l <= m->config.layers; what = what == 0 ? 2 : 0, l += what == 0) {
        const bool hidden = l == m->config.layers, heads = !hidden && what == 0;
        const int32_t g = apt_transformer_group(shape, hidden ? 0 : l,
                                                hidden  ? APT_GROUP_HIDDEN
                                                : heads ? APT_GROUP_HEADS
                                                        : APT_GROUP_NEURONS);
        const int64_t at = hidden ? apti_unit_hidden(m) : heads ? apti_unit_head(m, l) : apti_unit_neuron(m, l);
        const int32_t n = hidden ? m->config.hidden : heads ? m->shape[l].kv_heads : m->shape[l].neurons;
        const int32_t kind = hidden ? 2 : heads ? 0 : 1;
        if ((t->desc.prune >> kind & 1) == 0) {                    /* APT_PRUNE_* are 1 << kind */
            d->least[g] = n;
            d->round_to[g] = 1;
        }
        for (int32_t i = 0; i < n; i++) {
            d->group[at + i] = g;
            d->kind[at + i] = kind;
        }
        if (hidden) break;
    }
}

/* Ranks the units by what they matter per parameter and keeps the longest prefix within (1 - sparsity) of the dense model. */
static apt_result apti_search_units(apt_trainer *t, apti_decision *d, int32_t units, double sparsity, apt_search_result *found)
{
    apt_model *m = t->model;
    apt_transformer shape = apti_transformer_of(m);
    apt_search search = APT_ZERO;
    apt_result r = APT_OK;
    memcpy(d->salience, t->salience, (size_t)units * sizeof(float));
    apti_decision_groups(t, d, &shape);
    if (!t->desc.disable_kurtosis) r = apti_outliers(t, d->kurtosis, d->values, d->moments);
    if (r == APT_OK)
        r = apt_salience_combine(d->salience, t->desc.disable_kurtosis ? NULL : d->kurtosis, d->kind, NULL, units, 3,
                                 t->desc.salience_norm);
    search.units = units;
    search.groups = apt_transformer_groups(&shape);
    search.salience = d->salience;
    search.group = d->group;
    search.least = d->least;
    search.round_to = d->round_to;
    search.budget = (1 - sparsity) * (double)m->prunable_dense;
    search.cost = apt_transformer_cost;
    search.user = &shape;
    if (r == APT_OK) r = apt_mask_search(&search, d->scratch, (size_t)d->scratch_bytes, d->keep, d->kept, found);
    return r == APT_OK ? APT_OK : apti_fail(t->ctx, r, "search at step %lld: %s", (long long)t->step, apt_result_text(r));
}

/* One decision: a new keep set for `sparsity`. The masks begin to glide; nothing is removed yet. */
static apt_result apti_decide(apt_trainer *t, double sparsity)
{
    apt_model *m = t->model;
    apt_units u;
    apti_decision d;
    apt_search_result found = APT_ZERO;
    const apt_transformer shape = apti_transformer_of(m);
    const int32_t groups = apt_transformer_groups(&shape);
    apt_model_units(m, &u);
    const int64_t bytes = apti_decision_plan(m, &d, NULL, u.total, groups);
    char *block = (char *)apti_alloc(t->ctx, bytes, 1);
    if (block == NULL || !apti_masks_reserve(m)) {
        apti_free(t->ctx, block);
        return apti_fail(t->ctx, APT_E_MEMORY, "pruning decision: no memory for %d units", (int)u.total);
    }
    (void)apti_decision_plan(m, &d, block, u.total, groups);
    const apt_result r = apti_search_units(t, &d, u.total, sparsity, &found);
    apt_event e = apti_event_of(t, APT_EVENT_PRUNE);
    if (r == APT_OK) {
        memcpy(t->keep, d.keep, (size_t)u.total);
        t->moving = found.kept < u.total;
        t->sparsity = 1 - found.cost / (double)m->prunable_dense;
        t->info.sparsity = t->sparsity;
        e.budget_reached = found.reached;
        e.parameters_before = (int64_t)found.cost_before;
        e.parameters_after = (int64_t)found.cost;
        e.heads = e.neurons = 0;
        e.hidden = d.kept[groups - 1];
        for (int32_t i = 0; i < u.heads + u.neurons; i++) *(d.kind[i] == 0 ? &e.heads : &e.neurons) += d.keep[i];
    }
    if (r != APT_OK || !t->moving) apti_masks_simplify(m);
    apti_free(t->ctx, block);
    if (r == APT_OK) apti_fire(t, &e);
    return r;
}

/* What belongs to a pruning step of the schedule: settle the last decision, take the first teacher, decide. */
static apt_result apti_prune_event(apt_trainer *t, bool *decided)
{
    int32_t due = 0;
    float sparsity = 0;
    apt_schedule s = APT_ZERO;
    s.kind = t->desc.schedule;
    s.target = t->desc.target_sparsity;
    s.begin = t->desc.prune_begin;
    s.end = t->desc.prune_end;
    s.start = t->desc.start_sparsity;
    (void)apt_schedule_sparsity(&s, t->step, &sparsity);
    t->info.sparsity_target = sparsity;
    (void)apt_schedule_due(&s, t->desc.update_frequency, t->step, &due);
    if (!due || sparsity <= 0) return APT_OK;
    apt_result r = t->moving ? apti_settle(t) : APT_OK;
    if (r == APT_OK && t->teacher == NULL && !t->desc.disable_distill && t->step < t->desc.distill_end) r = apti_teacher_take(t);
    if (r == APT_OK) r = apti_decide(t, sparsity);
    *decided = r == APT_OK;
    return r;
}

/* ------------------------------------------------------------------------------------------------ magnitude pruning */

/* Calls that look at the trainer between steps: the model is ours and the last step is through. */
static apt_result apti_trainer_whole(const apt_trainer *t, const char *what)
{
    if (t->model->structure != t->structure)
        return apti_fail(t->ctx, APT_E_STATE, "%s: the model was changed from outside", what);
    if (t->stage != APTI_STAGE_NONE)
        return apti_fail(t->ctx, APT_E_STATE, "%s: step %lld failed behind its update; repeat it first", what,
                         (long long)t->step);
    return APT_OK;
}

/* Whether `name` contains the pieces of `pattern` between its stars, in their order. */
static bool apti_name_matches(const char *name, const char *pattern)
{
    for (;;) {
        const char *star = strchr(pattern, '*');
        const size_t n = star != NULL ? (size_t)(star - pattern) : strlen(pattern);
        while (strncmp(name, pattern, n) != 0)
            if (*name++ == 0) return false;
        if (star == NULL) return true;
        name += n;
        pattern = star + 1;
    }
}

/* chosen[i] = 1 for the parameters that patterns (NULL: none given) name. */
static apt_result apti_magnitude_choose(const apt_model *m, const char *const *patterns, int32_t count, uint8_t *chosen)
{
    if (count < 0 || (patterns == NULL && count > 0) || (patterns != NULL && count == 0))
        return apti_fail(m->ctx, APT_E_ARGUMENT, "magnitude pruning: patterns is %s, pattern_count %d",
                         patterns != NULL ? "given" : "NULL", (int)count);
    for (int32_t i = 0; i < m->param_count; i++)
        chosen[i] = patterns == NULL && apti_is_matrix(&m->params[i]) && m->params[i].linear && m->params[i].layer >= 0;
    for (int32_t k = 0; k < count; k++) {
        const char *pattern = patterns[k];
        bool any = false;
        if (pattern == NULL || pattern[0] == 0)
            return apti_fail(m->ctx, APT_E_ARGUMENT, "magnitude pruning: pattern %d is %s", (int)k,
                             pattern == NULL ? "NULL" : "empty");
        for (int32_t i = 0; i < m->param_count; i++) {
            if (!apti_is_matrix(&m->params[i]) || !apti_name_matches(m->params[i].name, pattern)) continue;
            any = true;
            chosen[i] = 1;
        }
        if (!any)
            return apti_fail(m->ctx, APT_E_MISSING, "magnitude pruning: no matrix of the model has '%.200s' in its name; the "
                             "first of its layers is %s", pattern, m->layers[0].slot[2 * APTI_QUERY]->name);
    }
    return APT_OK;
}

static apt_result apti_magnitude_check(apt_ctx *ctx, const apt_magnitude_desc *d)
{
    if (d->start_canary != 0 || d->end_canary != 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_magnitude_desc is not initialised: use apt_magnitude_desc desc = APT_ZERO");
    if (!apti_finite_f64(d->sparsity) || !(d->sparsity >= 0 && d->sparsity < 1))
        return apti_fail(ctx, APT_E_RANGE, "magnitude pruning: sparsity %g; expected 0 <= sparsity < 1", d->sparsity);
    if (!apti_finite(d->threshold) || d->threshold < 0)
        return apti_fail(ctx, APT_E_RANGE, "magnitude pruning: threshold %g; expected a number from 0 on", (double)d->threshold);
    if ((d->keep != 0 || d->of != 0) && (d->keep < 1 || d->of <= d->keep || d->of > 64))
        return apti_fail(ctx, APT_E_RANGE, "magnitude pruning: pattern %d:%d; expected 1 <= keep < of <= 64", (int)d->keep,
                         (int)d->of);
    const int32_t ways = (d->of != 0) + (d->sparsity > 0) + (d->threshold > 0);
    if (ways > 1 || (d->global && !(d->sparsity > 0)))
        return apti_fail(ctx, APT_E_ARGUMENT, "magnitude pruning: sparsity %g, threshold %g, pattern %d:%d, global %d: give one "
                         "of the first three, and global with sparsity only", d->sparsity, (double)d->threshold, (int)d->keep,
                         (int)d->of, (int)d->global);
    return APT_OK;
}

/* New masks of the chosen matrices, until they take effect all together. */
typedef struct apti_pruning {
    apt_weights *part;                /* [count] */
    apti_param **param;               /* [count] */
    float *values;                    /* room for one matrix that lives in panels; for all of them when the threshold is global */
    int32_t count;
} apti_pruning;

static void apti_magnitude_free(apt_ctx *ctx, apti_pruning *g)
{
    for (int32_t i = 0; g->part != NULL && i < g->count; i++) apti_free(ctx, g->part[i].mask);
    apti_free(ctx, g->part);
    apti_free(ctx, (void *)g->param);
    apti_free(ctx, g->values);
}

/* All memory that a pruning takes. A teacher that shares a matrix keeps it as it is. */
static apt_result apti_magnitude_reserve(apt_model *m, const apt_magnitude_desc *d, const uint8_t *chosen, apti_pruning *g)
{
    int64_t sum = 0, most = 0;
    for (int32_t i = 0; i < m->param_count; i++) g->count += chosen[i] && apti_param_count(&m->params[i]) > 0;
    g->part = (apt_weights *)apti_calloc(m->ctx, g->count, (int64_t)sizeof(apt_weights));
    g->param = (apti_param **)apti_calloc(m->ctx, g->count, (int64_t)sizeof(apti_param *));
    bool fine = g->part != NULL && g->param != NULL && apti_bitmasks_reserve(m);
    for (int32_t i = 0, at = 0; i < m->param_count && fine; i++) {
        apti_param *p = &m->params[i];
        if (!chosen[i] || apti_param_count(p) == 0) continue;
        apt_weights *w = &g->part[at];
        g->param[at++] = p;
        w->n = apti_param_count(p);
        w->mask = (uint64_t *)apti_alloc(m->ctx, apt_bitmask_words(w->n), (int64_t)sizeof(uint64_t));
        fine = w->mask != NULL && apti_param_own(m, p);
        if (p->value != NULL) continue;
        sum += w->n;
        most = apti_max_i64(most, w->n);
    }
    g->values = (float *)apti_alloc(m->ctx, d->global ? sum : most, (int64_t)sizeof(float));
    if (fine && g->values != NULL) return APT_OK;
    return apti_fail(m->ctx, APT_E_MEMORY, "magnitude pruning: no memory for %d masks", (int)g->count);
}

static apt_result apti_magnitude_one(apt_ctx *ctx, const apt_magnitude_desc *d, const apti_param *p, apt_weights *w)
{
    if (d->of != 0) return apt_magnitude_pattern(ctx, w->mask, &w->zeros, w->w, p->rows, p->cols, d->keep, d->of);
    if (d->sparsity > 0) return apt_magnitude_sparsity(ctx, w->mask, &w->zeros, w->w, w->n, d->sparsity);
    const float threshold = d->threshold > 0 ? d->threshold : APT_MAGNITUDE_THRESHOLD;
    return apt_magnitude_threshold(ctx, w->mask, &w->zeros, w->w, w->n, threshold);
}

static apt_result apti_magnitude_masks(apt_model *m, const apt_magnitude_desc *d, apti_pruning *g)
{
    float *values = g->values;
    apt_result r = APT_OK;
    for (int32_t i = 0; i < g->count && r == APT_OK; i++) {
        const apti_param *p = g->param[i];
        apt_weights *w = &g->part[i];
        w->w = p->value != NULL ? p->value : values;
        if (p->value == NULL) apti_param_get(m, p, values);
        if (p->value == NULL && d->global) values += w->n;
        if (d->global) r = apti_finite_all(w->w, w->n) ? APT_OK : APT_E_NONFINITE;
        else r = apti_magnitude_one(m->ctx, d, p, w);
        if (r != APT_OK) return apti_fail(m->ctx, r, "magnitude pruning: %s holds NaN or infinity", p->name);
    }
    return d->global ? apt_magnitude_global(m->ctx, g->part, g->count, d->sparsity) : APT_OK;
}

/* A transaction: on failure no mask and no weight has changed. The event tells of active weights. */
static apt_result apti_magnitude_prune(apt_trainer *t, const apt_magnitude_desc *d, const uint8_t *chosen, apt_sparsity *reached)
{
    apt_model *m = t->model;
    apti_pruning g = APT_ZERO;
    apt_sparsity before;
    apti_sparsity_of(m, chosen, &before);
    apt_result r = apti_magnitude_reserve(m, d, chosen, &g);
    if (r == APT_OK) r = apti_magnitude_masks(m, d, &g);
    for (int32_t i = 0; i < g.count && r == APT_OK; i++) {
        apti_bitmask_adopt(m, g.param[i], g.part[i].mask, g.values);
        g.part[i].mask = NULL;
    }
    apti_magnitude_free(t->ctx, &g);
    if (r != APT_OK) return r;
    apti_sparsity_of(m, chosen, reached);
    if (!(t->desc.target_sparsity > 0)) t->sparsity = t->info.sparsity = reached->sparsity;
    apt_event e = apti_event_of(t, APT_EVENT_PRUNE);
    e.parameters_before = before.weights - before.zeros;
    e.parameters_after = reached->weights - reached->zeros;
    apti_fire(t, &e);
    return APT_OK;
}

APT_API apt_result apt_trainer_magnitude(apt_trainer *trainer, const apt_magnitude_desc *desc, apt_sparsity *sparsity)
{
    apt_sparsity reached;
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    if (desc == NULL) return apti_fail(t->ctx, APT_E_ARGUMENT, "apt_trainer_magnitude: desc is NULL");
    apt_result r = apti_trainer_whole(t, "apt_trainer_magnitude");
    if (r == APT_OK && t->micro != 0) r = apti_fail(t->ctx, APT_E_STATE, "apt_trainer_magnitude: a step is half accumulated");
    if (r == APT_OK) r = apti_magnitude_check(t->ctx, desc);
    if (r != APT_OK) return r;
    uint8_t *chosen = (uint8_t *)apti_calloc(t->ctx, t->model->param_count, 1);
    if (chosen == NULL) return apti_fail(t->ctx, APT_E_MEMORY, "magnitude pruning: no memory for its plan");
    r = apti_magnitude_choose(t->model, desc->patterns, desc->pattern_count, chosen);
    if (r == APT_OK) r = apti_work_begin(t, "apt_trainer_magnitude");
    if (r == APT_OK) {
        r = apti_magnitude_prune(t, desc, chosen, &reached);
        if (r == APT_OK && sparsity != NULL) *sparsity = reached;
        r = apti_work_end(t, r);
    }
    apti_free(t->ctx, chosen);
    return r;
}

/* Masked weights have no gradient, so they do not count in the norm that clips the others either. */
static void apti_mask_gradients(apt_trainer *t)
{
    for (int32_t i = 0; t->model->bitmask != NULL && i < t->model->param_count; i++) {
        const apti_param *p = &t->model->params[i];
        if (t->model->bitmask[i] != NULL && apti_is_trained(p))
            (void)apt_bitmask_apply(t->ctx, p->grad, t->model->bitmask[i], apti_param_count(p));
    }
}

/* --- iterative --- */

APT_API apt_result apt_trainer_iterative(apt_trainer *trainer, const apt_iterative_desc *desc)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    if (desc == NULL || desc->start_canary != 0 || desc->end_canary != 0)
        return apti_fail(t->ctx, APT_E_ARGUMENT, "apt_trainer_iterative: desc is NULL or not initialised with APT_ZERO");
    if (t->step != 0 || t->micro != 0 || t->working)
        return apti_fail(t->ctx, APT_E_STATE, "apt_trainer_iterative: for a fresh trainer only");
    apt_iterative_desc d = *desc;
    double first = 0;
    if (d.first == 0 && apti_finite_f64(d.first)) d.first = 0.2;
    if (d.last == 0 && apti_finite_f64(d.last)) d.last = 0.8;
    apti_default_i(&d.iterations, 5);
    if (apt_magnitude_schedule(&first, d.first, d.last, d.iterations, 0) != APT_OK || d.iterations > 10000)
        return apti_fail(t->ctx, APT_E_RANGE, "iterative pruning from %g to %g in %d iterations; expected 0 < first <= last < 1 "
                         "and 1..10000", d.first, d.last, (int)d.iterations);
    if (d.retrain == 0 && d.begin >= 0 && d.begin < t->desc.steps) d.retrain = (t->desc.steps - d.begin) / d.iterations;
    if (d.begin < 0 || d.begin >= t->desc.steps || d.retrain < 1 || d.retrain > (t->desc.steps - d.begin) / d.iterations)
        return apti_fail(t->ctx, APT_E_RANGE, "iterative pruning: %d times %lld steps behind step %lld do not fit %lld steps",
                         (int)d.iterations, (long long)d.retrain, (long long)d.begin, (long long)t->desc.steps);
    uint8_t *chosen = (uint8_t *)apti_calloc(t->ctx, t->model->param_count, 1);
    apt_iteration *history = (apt_iteration *)apti_calloc(t->ctx, d.iterations, (int64_t)sizeof(apt_iteration));
    apt_result r = APT_OK;
    if (chosen == NULL || history == NULL) r = apti_fail(t->ctx, APT_E_MEMORY, "iterative pruning: no memory for its plan");
    if (r == APT_OK) r = apti_magnitude_choose(t->model, d.patterns, d.pattern_count, chosen);
    if (r != APT_OK) {
        apti_free(t->ctx, chosen);
        apti_free(t->ctx, history);
        return r;
    }
    d.patterns = NULL;                           /* the caller's; what they chose is known */
    apti_iterative_drop(t);
    t->iterative.desc = d;
    t->iterative.chosen = chosen;
    t->iterative.history = history;
    return APT_OK;
}

APT_API int32_t apt_trainer_iterations(const apt_trainer *trainer)
{
    return trainer != NULL ? trainer->iterative.done : 0;
}

APT_API apt_result apt_trainer_iteration(const apt_trainer *trainer, int32_t index, apt_iteration *iteration)
{
    if (trainer == NULL || iteration == NULL) return APT_E_ARGUMENT;
    if (index < 0 || index >= trainer->iterative.done)
        return apti_fail(trainer->ctx, APT_E_RANGE, "iteration %d of %d", (int)index, (int)trainer->iterative.done);
    *iteration = trainer->iterative.history[index];
    return APT_OK;
}

APT_API apt_result apt_trainer_iterative_query(const apt_trainer *trainer, apt_iterative_summary *summary)
{
    apt_iterative_summary s = APT_ZERO;
    if (trainer == NULL || summary == NULL) return APT_E_ARGUMENT;
    const apti_iterative *it = &trainer->iterative;
    if (it->chosen == NULL)
        return apti_fail(trainer->ctx, APT_E_STATE, "apt_trainer_iterative_query: apt_trainer_iterative has made no plan");
    s.iterations = it->desc.iterations;
    s.done = it->done;
    s.begin = it->desc.begin;
    s.retrain = it->desc.retrain;
    s.first = it->desc.first;
    s.last = it->desc.last;
    apti_sparsity_of(trainer->model, it->chosen, &s.reached);
    if (it->done > 0 && (it->history[0].measured & APT_MEASURED_BEFORE) != 0) {
        s.measured |= APT_MEASURED_BEFORE;
        s.before = it->history[0].before;
    }
    for (int32_t i = it->done - 1; i >= 0 && (s.measured & APT_MEASURED_RETRAINED) == 0; i--) {
        if ((it->history[i].measured & APT_MEASURED_RETRAINED) == 0) continue;
        s.measured |= APT_MEASURED_RETRAINED;
        s.retrained = it->history[i].retrained;
        s.degradation = it->history[i].degradation;
    }
    *summary = s;
    return APT_OK;
}

/* Asks the callback; false: it gave no metric. */
static bool apti_measure(apt_trainer *t, double *metric)
{
    apt_event e = apti_event_of(t, APT_EVENT_EVALUATE);
    apti_fire(t, &e);
    if (e.has_metric) *metric = e.metric;
    return e.has_metric && apti_finite_f64(e.metric);
}

/* In front of a step: the next iteration, when it is due. Begun again after a failure, it measures again. */
static apt_result apti_iterate(apt_trainer *t)
{
    apti_iterative *it = &t->iterative;
    if (it->chosen == NULL || it->done >= it->desc.iterations || t->step != it->desc.begin + it->done * it->desc.retrain)
        return APT_OK;
    apt_magnitude_desc how = APT_ZERO;
    apt_iteration h = APT_ZERO;
    const apt_iteration *last = it->done > 0 ? &it->history[it->done - 1] : NULL;
    h.number = it->done + 1;
    h.step = t->step;
    (void)apt_magnitude_schedule(&h.target, it->desc.first, it->desc.last, it->desc.iterations, h.number);
    if (last != NULL && (last->measured & APT_MEASURED_RETRAINED) != 0) {
        h.before = last->retrained;
        h.measured = APT_MEASURED_BEFORE;
    } else if (apti_measure(t, &h.before)) h.measured = APT_MEASURED_BEFORE;
    how.sparsity = h.target;
    how.global = it->desc.global;
    const apt_result r = apti_magnitude_prune(t, &how, it->chosen, &h.reached);
    if (r != APT_OK) return r;
    if (apti_measure(t, &h.after)) h.measured |= APT_MEASURED_AFTER;
    it->history[it->done++] = h;
    return APT_OK;
}

/* Whether the step that was just done is the last one of an iteration. */
static bool apti_iteration_ends(const apt_trainer *t)
{
    const apti_iterative *it = &t->iterative;
    return it->done > 0 && t->step == it->desc.begin + it->done * it->desc.retrain;
}

static void apti_iteration_end(apt_trainer *t, double metric)
{
    apt_iteration *h = &t->iterative.history[t->iterative.done - 1];
    const apt_iteration *first = &t->iterative.history[0];
    h->retrained = metric;
    h->measured |= APT_MEASURED_RETRAINED;
    if ((first->measured & APT_MEASURED_BEFORE) == 0 || first->before == 0) return;
    const double lost = t->iterative.desc.lower_is_better ? metric - first->before : first->before - metric;
    h->degradation = lost / fabs(first->before);
}

/* ------------------------------------------------------------------------------------------------ a step */

static apt_result apti_trainer_ready(apt_trainer *t, const apt_batch *batch)
{
    if (t->model->structure != t->structure)
        return apti_fail(t->ctx, APT_E_STATE, "the model was merged or compacted from outside; this trainer cannot go on");
    if (t->step >= t->desc.steps && t->stage == APTI_STAGE_NONE)
        return apti_fail(t->ctx, APT_E_STATE, "all %lld steps are done", (long long)t->desc.steps);
    return apti_check_batch(t->model, batch, true);
}

static uint32_t apti_train_mode(const apt_trainer *t, bool probe, bool distill)
{
    uint32_t mode = APTI_PASS_KEEP;
    if (t->desc.method == APT_METHOD_FULL) mode |= APTI_PASS_FULL;
    if (probe || (distill && t->desc.distill_layer > 0)) mode |= APTI_PASS_ALL_ROWS;
    return mode;
}

/* Forward, losses and backward of one micro-batch. Gradients and probe sums grow; nothing else changes. The passes come
   first: they are all that can fail, and then nothing has changed at all. */
static apt_result apti_micro_batch(apt_trainer *t, const apt_batch *batch, bool probe)
{
    apti_pass *p = t->pass;
    float mu = 0;
    if (t->teacher != NULL && t->step < t->desc.distill_end)
        (void)apt_distill_mu(&mu, t->step, t->desc.prune_begin, t->desc.prune_end);
    const float share = 1.0f / (float)t->desc.accumulate;
    apt_result r = mu > 0 ? apti_teacher_forward(t, batch) : APT_OK;
    p->probe = probe ? &t->probe : NULL;
    if (r == APT_OK) r = apti_forward(p, batch, apti_train_mode(t, probe, mu > 0));
    if (r != APT_OK) return r;
    t->probe.rows += probe ? p->rows : 0;
    apti_task_loss(p, true, share * (1 - mu));
    const double task = apti_mean_loss(p);
    t->distill_loss = 0;
    t->layer_scale = mu * share * t->desc.distill_layer;
    if (mu > 0) t->distill_loss = t->desc.distill_pred * apti_distill_pred(t, (double)mu * share * t->desc.distill_pred);
    p->inject = mu > 0 && t->map.pairs > 0 ? apti_distill_inject : NULL;
    p->inject_user = t;
    apti_backward(p);
    t->info.mu = mu;
    t->info.task_loss += task * share;
    t->info.distill_loss += t->distill_loss * share;
    t->info.loss += ((1 - (double)mu) * task + (double)mu * t->distill_loss) * share;
    t->info.tokens += p->rows;
    return APT_OK;
}

/* Masks move one step; when all have arrived the model is cut. */
static apt_result apti_glide(apt_trainer *t)
{
    apt_units u;
    if (!t->moving) return APT_OK;
    apt_model_units(t->model, &u);
    (void)apt_mask_step(t->model->masks, t->keep, u.total, t->desc.mask_step);
    return apt_mask_settled(t->model->masks, u.total) ? apti_settle(t) : APT_OK;
}

static apt_result apti_regular_events(apt_trainer *t)
{
    const apt_train_desc *d = &t->desc;
    apt_event e = apti_event_of(t, APT_EVENT_STEP);
    apt_result r = APT_OK;
    const bool again = t->stage == APTI_STAGE_EVALUATE, ends = apti_iteration_ends(t);
    t->half_done = false;
    t->stage = APTI_STAGE_NONE;
    if (!again) apti_fire(t, &e);
    if (ends || (d->evaluate_every > 0 && t->step % d->evaluate_every == 0)) {
        e = apti_event_of(t, APT_EVENT_EVALUATE);
        apti_fire(t, &e);
        if (e.has_metric) r = apt_trainer_metric(t, t->iterative.desc.lower_is_better ? -e.metric : e.metric);
        if (e.has_metric && ends && r == APT_OK) apti_iteration_end(t, e.metric);
        if (r != APT_OK) t->stage = APTI_STAGE_EVALUATE;
    }
    if (r == APT_OK && (ends || (d->checkpoint_every > 0 && t->step % d->checkpoint_every == 0))) {
        e = apti_event_of(t, APT_EVENT_CHECKPOINT);
        apti_fire(t, &e);
    }
    return r;
}

/* The end of an optimizer step: learn from the sums, update. From here on the step counts. */
static apt_result apti_update(apt_trainer *t, bool probe)
{
    apt_result r = APT_OK;
    apti_mask_gradients(t);
    const double norm = apti_gradient_norm(t);
    const bool finite = apti_finite((float)norm);
    if (finite && probe) r = apti_salience_update(t);
    if (finite && r == APT_OK && apti_is_apt(t) && !t->desc.disable_growth) r = apti_importance_update(t);
    apti_optimize(t, norm);
    t->micro = 0;
    t->step++;
    t->info.step = t->step;
    if (t->step >= t->desc.distill_end) apti_teacher_drop(t);
    t->stage = APTI_STAGE_GLIDE;
    return r;
}

/* Behind the update: masks glide, a decision, growth. Each stage does all of its work or can be begun again. */
static apt_result apti_step_rest(apt_trainer *t)
{
    apt_result r = APT_OK;
    bool decided = false;
    if (t->stage == APTI_STAGE_GLIDE) {
        r = apti_glide(t);
        if (r != APT_OK) return r;
        t->stage = APTI_STAGE_DECIDE;
    }
    if (t->stage == APTI_STAGE_DECIDE) {
        if (apti_is_apt(t) && t->desc.target_sparsity > 0) r = apti_prune_event(t, &decided);
        if (r != APT_OK) return r;
        t->stage = decided && !t->desc.disable_growth ? APTI_STAGE_GROW : APTI_STAGE_EVENTS;
    }
    if (t->stage == APTI_STAGE_GROW) {
        r = apti_grow(t);
        if (r == APT_OK) t->stage = APTI_STAGE_EVENTS;
    }
    return r;
}

static void apti_info_begin(apt_trainer *t)
{
    apt_model_info m;
    const apt_step_info zero = APT_ZERO;
    apt_model_query(t->model, &m);
    t->info = zero;
    t->info.step = t->step;
    t->info.sparsity = t->sparsity;
    t->info.kept = (double)m.prunable / (double)m.prunable_dense;
    t->info.trainable = m.trainable;
}

APT_API apt_result apt_trainer_step(apt_trainer *trainer, const apt_batch *batch, apt_step_info *info)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    const double start = apti_seconds();
    apt_result r = apti_trainer_ready(t, batch);
    if (r == APT_OK) r = apti_work_begin(t, "apt_trainer_step");
    if (r != APT_OK) return r;
    if (t->stage == APTI_STAGE_NONE) {                /* else the batch is in already: only the rest is missing */
        const bool probe = apti_prunes_at(t, t->step);
        if (t->micro == 0) {
            apti_info_begin(t);
            r = apti_iterate(t);
            apti_probe_clear(t);
        }
        if (r == APT_OK) r = apti_micro_batch(t, batch, probe);
        if (r != APT_OK) return apti_work_end(t, r);
        if (++t->micro == t->desc.accumulate) r = apti_update(t, probe);
    }
    const bool last = t->stage != APTI_STAGE_NONE;
    if (last && r == APT_OK) r = apti_step_rest(t);
    t->info.milliseconds += 1e3 * (apti_seconds() - start);
    t->info.tokens_per_second = 1e3 * (double)t->info.tokens / (t->info.milliseconds > 0 ? t->info.milliseconds : 1e-9);
    t->info.bytes = t->ctx->bytes;
    t->info.peak_bytes = t->ctx->peak_bytes;
    if (last && r == APT_OK) r = apti_regular_events(t);
    if (info != NULL) *info = t->info;
    return apti_work_end(t, r);
}

APT_API apt_result apt_trainer_finish(apt_trainer *trainer)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    if (trainer->model->structure != trainer->structure)
        return apti_fail(trainer->ctx, APT_E_STATE, "the model was changed from outside");
    apt_result r = apti_work_begin(trainer, "apt_trainer_finish");
    if (r != APT_OK) return r;
    if (trainer->stage != APTI_STAGE_NONE) {
        r = apti_step_rest(trainer);
        if (r == APT_OK) r = apti_regular_events(trainer);
        trainer->half_done = true;
    }
    if (r == APT_OK && trainer->moving) r = apti_settle(trainer);
    return apti_work_end(trainer, r);
}

APT_API apt_result apt_trainer_metric(apt_trainer *trainer, double metric)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    if (!apti_finite((float)metric))
        return apti_fail(trainer->ctx, APT_E_NONFINITE, "apt_trainer_metric: the metric is not finite");
    if (trainer->half_done) return apti_fail(trainer->ctx, APT_E_STATE, "apt_trainer_metric: not from inside this event");
    const apt_result whole = apti_trainer_whole(trainer, "apt_trainer_metric");
    if (whole != APT_OK || (trainer->has_metric && metric <= trainer->best_metric)) return whole;
    const bool inside = trainer->working;             /* from APT_EVENT_STEP or APT_EVENT_EVALUATE: the step reports a cancel */
    apt_result r = inside ? APT_OK : apti_work_begin(trainer, "apt_trainer_metric");
    trainer->half_done = true;
    if (r == APT_OK && trainer->teacher != NULL) r = apti_teacher_take(trainer);
    trainer->half_done = false;
    if (r == APT_OK) {
        trainer->has_metric = true;
        trainer->best_metric = metric;
    }
    return inside ? r : apti_work_end(trainer, r);
}

APT_API apt_result apt_trainer_observe(apt_trainer *trainer, const apt_batch *batch)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    apt_result r = apti_trainer_whole(t, "apt_trainer_observe");
    if (r != APT_OK) return r;
    if (t->micro != 0) return apti_fail(t->ctx, APT_E_STATE, "apt_trainer_observe: a step is half accumulated");
    if (t->working) return apti_fail(t->ctx, APT_E_STATE, "apt_trainer_observe: not from inside an event");
    r = apti_check_batch(t->model, batch, true);
    if (r != APT_OK) return r;
    const apt_step_info info = t->info;
    apti_probe_clear(t);
    r = apti_micro_batch(t, batch, true);
    if (r == APT_OK) r = apti_salience_update(t);
    apti_zero_gradients(t);
    t->info = info;
    return r;
}

APT_API apt_result apt_trainer_prune_now(apt_trainer *trainer, float sparsity)
{
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    apt_result r = apti_trainer_whole(t, "apt_trainer_prune_now");
    if (r != APT_OK) return r;
    if (t->micro != 0) return apti_fail(t->ctx, APT_E_STATE, "apt_trainer_prune_now: a step is half accumulated");
    if (!apti_finite(sparsity) || !(sparsity >= 0 && sparsity < 1))
        return apti_fail(t->ctx, APT_E_RANGE, "apt_trainer_prune_now: sparsity %g; expected 0..1", (double)sparsity);
    if (!t->observed)
        return apti_fail(t->ctx, APT_E_STATE, "apt_trainer_prune_now: no salience yet; call apt_trainer_observe first");
    r = apti_work_begin(t, "apt_trainer_prune_now");
    if (r != APT_OK) return r;
    if (t->moving) r = apti_settle(t);
    if (r == APT_OK) r = apti_decide(t, sparsity);
    if (r == APT_OK && t->moving) r = apti_settle(t);
    return apti_work_end(t, r);
}
/* ------------------------------------------------------------------------------------------------ estimate

   A rehearsal: a frame without memory goes through the run while a ledger notes what each block would take. Layout and
   plans are the real functions. What cannot be known beforehand is which units a run will prune: here every layer loses
   the same share of heads and neurons, and hidden dimensions go only where those cannot give enough. */

enum {
    APTI_USE_WEIGHTS = 0,
    APTI_USE_ADAPTERS,
    APTI_USE_OPTIMIZER,
    APTI_USE_ACTIVATIONS,
    APTI_USE_TEACHER,
    APTI_USE_MASKS,                   /* of single weights */
    APTI_USE_SCRATCH,
    APTI_USES
};

typedef struct apti_rehearsal {
    apt_ctx *ctx;
    apt_model *m;                     /* the student's frame in its present shapes */
    apti_acts *acts;
    apt_layer_shape *dense;           /* [layers] at the start */
    uint8_t *shared;                  /* [params] a buffer that the teacher holds as well */
    apt_trainer t;                    /* the resolved desc and what plans read */
    int64_t now[APTI_USES], most[APTI_USES];                 /* held; held at the peak */
    int64_t tokens, target_tokens, sequences, pass, teacher_pass, masks, adapter_budget, shareable;
    const apt_iterative_desc *plan;              /* pruning of single weights, or NULL ... */
    uint8_t *chosen;                             /* [params] ... of these */
    apti_growth growth;
} apti_rehearsal;

/* What apti_alloc takes from the system. */
static int64_t apti_cost(int64_t bytes)
{
    return apti_round_up(apti_max_i64(bytes, 1), APTI_ALIGNMENT) + 2 * APTI_ALIGNMENT;
}

static void apti_note(apti_rehearsal *r, int32_t use, int64_t bytes)
{
    int64_t now = 0, most = 0;
    r->now[use] += bytes;
    for (int32_t i = 0; i < APTI_USES; i++) {
        now += r->now[i];
        most += r->most[i];
    }
    if (now > most) memcpy(r->most, r->now, sizeof(r->now));
}

/* A block that comes and goes. */
static void apti_note_brief(apti_rehearsal *r, int32_t use, int64_t bytes)
{
    apti_note(r, use, bytes);
    apti_note(r, use, -bytes);
}

static int64_t apti_frame_cost(const apt_model *m)
{
    const int64_t layers = m->config.layers, columns = m->bias_head != NULL ? m->config.bias_heads : 0;
    return apti_cost((int64_t)sizeof(apt_model)) + apti_cost(layers * (int64_t)sizeof(apt_layer_shape)) +
           apti_cost(layers * (int64_t)sizeof(apti_layer)) +
           apti_cost(apti_param_capacity(layers) * (int64_t)sizeof(apti_param)) +
           (columns > 0 ? apti_cost(layers * columns * (int64_t)sizeof(int32_t)) : 0);
}

static int64_t apti_pass_frame_cost(const apt_model *m)
{
    return apti_cost((int64_t)sizeof(apti_pass)) + apti_cost(m->config.layers * (int64_t)sizeof(apti_acts));
}

/* Values and panels of a parameter, as apti_param_reserve takes them. */
static int64_t apti_storage_cost(const apt_model *m, const apti_param *p)
{
    const int64_t n = apti_param_count(p);
    if (n == 0) return 0;
    const int64_t panels = p->linear ? apti_cost(apti_packed_bytes(m->ctx, p->rows, p->cols, apti_param_type(m, p))) : 0;
    return panels + (!p->linear || p->trainable ? apti_cost(n * (int64_t)sizeof(float)) : 0);
}
/* sign 1: the parameter comes; -1: it goes. */
static void apti_note_param(apti_rehearsal *r, const apti_param *p, int64_t sign)
{
    const int64_t n = apti_param_count(p);
    apti_note(r, apti_is_adapter(p) ? APTI_USE_ADAPTERS : APTI_USE_WEIGHTS, sign * apti_storage_cost(r->m, p));
    if (p->trainable && n > 0) apti_note(r, APTI_USE_OPTIMIZER, sign * 3 * apti_cost(n * (int64_t)sizeof(float)));
}

static int64_t apti_plan_cost(const apti_rehearsal *r, uint32_t mode)
{
    apti_pass pass;
    memset(&pass, 0, sizeof(pass));
    pass.model = r->m;
    pass.acts = r->acts;
    pass.layers = r->m->config.layers;
    pass.mode = mode;
    pass.lean = apti_lean(r->m, mode);
    return apti_cost(apti_plan(&pass, NULL, r->tokens, r->target_tokens, r->sequences));
}

/* Grows the block of a pass when the plan needs more; the old one goes first. */
static void apti_note_pass(apti_rehearsal *r, uint32_t mode)
{
    const int64_t bytes = apti_plan_cost(r, mode);
    if (bytes <= r->pass) return;
    apti_note(r, APTI_USE_ACTIVATIONS, -r->pass);
    apti_note(r, APTI_USE_ACTIVATIONS, bytes);
    r->pass = bytes;
}

static void apti_rehearse_model(apti_rehearsal *r)
{
    const int64_t buffer = apti_cost(apti_largest_linear(r->m) * (int64_t)sizeof(float));
    apti_note(r, APTI_USE_SCRATCH,
              apti_cost((int64_t)sizeof(apt_ctx)) + r->ctx->threads * apti_cost((int64_t)r->ctx->scratch_bytes));
#ifdef APTI_THREADS
    if (r->ctx->pool != NULL) apti_note(r, APTI_USE_SCRATCH, apti_cost((int64_t)sizeof(apti_pool)));
#endif
    apti_note(r, APTI_USE_WEIGHTS, apti_frame_cost(r->m));
    apti_note(r, APTI_USE_SCRATCH, buffer);
    for (int32_t i = 0; i < r->m->param_count; i++) apti_note_param(r, &r->m->params[i], 1);
    apti_note(r, APTI_USE_SCRATCH, -buffer);
}

static int64_t apti_unit_arrays_cost(const apt_model *m)
{
    const int64_t f = (int64_t)sizeof(float);
    apt_units u;
    apt_model_units(m, &u);
    return apti_cost(3 * (int64_t)u.total * f) + apti_cost(u.total) + apti_cost(3 * apti_probe_count(m) * f);
}

/* Trainer, task head (for FULL everything) trainable, adapters at their first rank. */
static void apti_rehearse_attach(apti_rehearsal *r)
{
    apt_model *m = r->m;
    const int64_t importance = apti_sites(m) * (int64_t)sizeof(float);
    apti_note(r, APTI_USE_OPTIMIZER, apti_cost((int64_t)sizeof(apt_trainer)) + apti_cost(importance) + apti_unit_arrays_cost(m));
    apti_note(r, APTI_USE_ACTIVATIONS, apti_pass_frame_cost(m));
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param *p = &m->params[i], old = *p;
        if (apti_is_adapter(p) || !apti_trains(&r->t, p)) continue;
        p->trainable = true;
        apti_note_param(r, p, 1);
        apti_note_param(r, &old, -1);
    }
    for (int32_t k = 0; k < apti_sites(m); k++) {
        apti_param *a = apti_site_of(m, k).a, *b = apti_site_of(m, k).b;
        a->trainable = b->trainable = true;
        if (!apti_wants_adapter(&r->t, k) || a->cols == 0 || b->rows == 0) continue;
        a->rows = b->cols = r->t.desc.rank;
        apti_note_param(r, a, 1);
        apti_note_param(r, b, 1);
    }
    r->adapter_budget = apti_adapter_total(m);
}

/* The teacher: a frame, copies of what is trained, Tr. Everything frozen is shared from now on. */
static void apti_rehearse_teacher(apti_rehearsal *r)
{
    const apt_model *m = r->m;
    const int64_t d = m->config.hidden, f = (int64_t)sizeof(float), layers = m->config.layers;
    int64_t bytes = apti_frame_cost(m) + apti_pass_frame_cost(m) + apti_cost(layers * (int64_t)sizeof(float *)) +
                    apti_cost(d * f) + 8 * apti_cost(APTI_TRANSFORM_RANK * d * f);
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param copy = m->params[i];
        r->shared[i] = !copy.trainable;
        copy.trainable = false;
        if (!r->shared[i]) bytes += apti_storage_cost(m, &copy);
    }
    apti_note(r, APTI_USE_TEACHER, bytes);
    r->teacher_pass = apti_plan_cost(r, APTI_PASS_ALL_ROWS);
    r->t.teacher = r->m;                              /* for the next line only */
    r->t.map.pairs = (int32_t)apti_min_i64(4, apti_distill_layers(&m->config));
    r->teacher_pass += apti_cost(apti_distill_plan(&r->t, NULL, apti_max_i64(r->tokens, r->target_tokens)).bytes);
    r->t.teacher = NULL;
}

/* The teacher goes at distill_end, in front of that step's cut; embeddings of which the student reads some columns get a table of
   those. */
static void apti_rehearse_drop(apti_rehearsal *r)
{
    apt_model *m = r->m;
    apti_note(r, APTI_USE_TEACHER, -r->now[APTI_USE_TEACHER]);
    r->teacher_pass = 0;
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param *p = &m->params[i], old = *p;
        r->shared[i] = 0;
        if (!apti_is_embedding(m, p) || p->cols == m->config.hidden) continue;
        p->cols = m->config.hidden;
        apti_note_param(r, p, 1);
        apti_note_param(r, &old, -1);
        apti_note(r, APTI_USE_WEIGHTS, -apti_cost(p->cols * (int64_t)sizeof(int32_t)));
    }
}

/* Shapes at which `left` of the dense prunable parameters is left. */
static void apti_rehearse_shapes(apti_rehearsal *r, double left)
{
    apt_config *c = &r->m->config;
    const int32_t prune = r->t.desc.prune;
    const double matrices = (double)apti_ffn_matrices(c);
    double attention = 0, ffn = 0, kept = 0;
    for (int32_t l = 0; l < c->layers; l++) {
        attention += 2.0 * c->head_dim * (r->dense[l].heads + r->dense[l].kv_heads);
        ffn += matrices * r->dense[l].neurons;
    }
    const double all = attention + ffn,
                 free = ((prune & APT_PRUNE_HEADS) != 0 ? attention : 0) + ((prune & APT_PRUNE_NEURONS) != 0 ? ffn : 0);
    const double share = free > 0 ? 1 - (1 - left) * all / free : 1, x = share > 0 ? share : 0;
    for (int32_t l = 0; l < c->layers; l++) {
        const apt_layer_shape *full = &r->dense[l];
        apt_layer_shape *s = &r->m->shape[l];
        if ((prune & APT_PRUNE_HEADS) != 0 && full->kv_heads > 0) {
            s->kv_heads = (int32_t)apti_max_i64(1, (int64_t)(full->kv_heads * x + 0.5));
            s->heads = s->kv_heads * (full->heads / full->kv_heads);
        }
        if ((prune & APT_PRUNE_NEURONS) != 0 && full->neurons > 0)
            s->neurons = (int32_t)apti_max_i64(1, (int64_t)(full->neurons * x + 0.5));
        kept += 2.0 * c->head_dim * (s->heads + s->kv_heads) + matrices * s->neurons;
    }
    const double y = kept > 0 ? left * all / kept : 1;
    if ((prune & APT_PRUNE_HIDDEN) != 0 && y < 0.95)
        c->hidden = (int32_t)apti_max_i64(r->t.desc.min_hidden, apti_min_i64(c->hidden, (int64_t)(c->hidden_dense * y)));
}

/* First copies of what the teacher keeps (of embeddings a list of columns), then the rest in place, trimmed one by one. */
static void apti_rehearse_params(apti_rehearsal *r, bool shared)
{
    apt_model *m = r->m;
    for (int32_t i = 0; i < m->param_count; i++) {
        apti_param *p = &m->params[i], old = *p;
        const apt_layer_shape *shape = p->layer >= 0 ? &m->shape[p->layer] : NULL;
        if ((r->shared[i] != 0) != shared) continue;
        if (p->row_axis != APTI_AXIS_FIXED && p->row_axis != APTI_AXIS_RANK) p->rows = apti_axis_size(&m->config, shape,
            p->row_axis);
        if (p->col_axis != APTI_AXIS_FIXED && p->col_axis != APTI_AXIS_RANK) p->cols = apti_axis_size(&m->config, shape,
            p->col_axis);
        if (p->rows == old.rows && p->cols == old.cols) continue;
        if (shared && apti_is_embedding(m, p)) {
            apti_note(r, APTI_USE_WEIGHTS, apti_cost(p->cols * (int64_t)sizeof(int32_t)));
            *p = old;                 /* the table stays what it is */
            continue;
        }
        apti_note_param(r, p, 1);
        apti_note_param(r, &old, -1);
        if (shared) apti_note(r, APTI_USE_TEACHER, apti_storage_cost(m, &old));
        if (shared && p->linear) r->shareable += apti_storage_cost(m, p);
        if (shared) r->shared[i] = 2;
    }
    for (int32_t i = 0; i < m->param_count && !shared; i++)
        if (r->shared[i] == 2) r->shared[i] = 0;      /* its new copy is the student's own */
}

static void apti_rehearse_cut(apti_rehearsal *r, double left)
{
    const apt_model *m = r->m;
    const int64_t arrays = apti_unit_arrays_cost(m);
    const int64_t buffers = apti_cost(apti_largest_linear(m) * (int64_t)sizeof(float)) +
        apti_cost(m->param_count * (int64_t)sizeof(apti_param));
    apti_note(r, APTI_USE_ACTIVATIONS, -r->pass);
    r->pass = 0;
    apti_rehearse_shapes(r, left);
    apti_note(r, APTI_USE_SCRATCH, buffers + arrays);
    apti_rehearse_params(r, true);
    apti_rehearse_params(r, false);
    apti_note(r, APTI_USE_SCRATCH, -buffers - arrays - r->masks);
    r->masks = 0;
    apti_note(r, APTI_USE_OPTIMIZER, apti_unit_arrays_cost(m) - arrays);
}

/* The old adapters go when all new ones are there. */
static void apti_rehearse_growth(apti_rehearsal *r, int64_t step)
{
    apt_model *m = r->m;
    apti_growth *g = &r->growth;
    const int64_t plan = apti_cost(apti_block_bytes(g->block));
    apti_note(r, APTI_USE_SCRATCH, plan);
    apti_growth_list(m, g, NULL);
    if (apti_growth_ranks(g, &r->t.desc, step, r->adapter_budget) != APT_OK) g->count = 0;
    for (int32_t pass = 0; pass < 2; pass++)
        for (int32_t i = 0; i < g->count; i++) {
            apti_param *a = apti_site_of(m, g->place[i]).a, *b = apti_site_of(m, g->place[i]).b;
            const int64_t rank = pass == 0 ? g->next[i] : g->rank[i];
            if (g->next[i] == g->rank[i]) continue;
            a->rows = b->cols = rank;
            apti_note_param(r, a, pass == 0 ? 1 : -1);
            apti_note_param(r, b, pass == 0 ? 1 : -1);
            a->rows = b->cols = g->next[i];
        }
    apti_note(r, APTI_USE_SCRATCH, -plan);
}

/* One decision and the steps behind it. */
static void apti_rehearse_decision(apti_rehearsal *r, int64_t step, bool first, uint32_t mode)
{
    const apt_train_desc *d = &r->t.desc;
    const bool distills = !d->disable_distill && step < d->distill_end;
    apti_decision plan;
    apt_units u;
    if (first && distills) apti_rehearse_teacher(r);
    apt_model_units(r->m, &u);
    r->masks = apti_cost((int64_t)u.total * (int64_t)sizeof(float));
    apti_note(r, APTI_USE_SCRATCH, r->masks);
    apti_note_brief(r, APTI_USE_SCRATCH, apti_cost(apti_decision_plan(r->m, &plan, NULL, u.total, 2 * r->m->config.layers + 1)));
    if (!d->disable_growth) apti_rehearse_growth(r, step);
    if (step >= d->steps) return;
    if (distills) {
        apti_note(r, APTI_USE_TEACHER, r->teacher_pass);
        r->teacher_pass = 0;
    }
    apti_note_pass(r, mode);
}

/* All decisions; of very many the first ones one by one, for memory falls from then on. */
static void apti_rehearse_pruning(apti_rehearsal *r, uint32_t mode)
{
    const apt_train_desc *d = &r->t.desc;
    float sparsity = 0, last = 0;
    apt_schedule s = APT_ZERO;
    s.kind = d->schedule;
    s.target = d->target_sparsity;
    s.begin = d->prune_begin;
    s.end = d->prune_end;
    s.start = d->start_sparsity;
    for (int64_t step = d->prune_begin, n = 0; step <= d->prune_end; n++) {
        const int64_t far = (d->prune_end - d->prune_begin) / d->update_frequency / 16 + 1;
        (void)apt_schedule_sparsity(&s, step, &sparsity);
        if (step >= d->distill_end) apti_rehearse_drop(r);
        if (sparsity > 0) {
            if (last > 0) apti_rehearse_cut(r, 1 - (double)last);
            apti_rehearse_decision(r, step, last <= 0, mode);
            last = sparsity;
        }
        step = step == d->prune_end ? step + 1 : apti_min_i64(d->prune_end, step + d->update_frequency * (n < 16 ? 1 : far));
    }
}

/* apti_magnitude_reserve and what comes of it: the list of masks and the masks stay, the plan and a matrix that lives in panels
   only go again. */
static void apti_rehearse_magnitude(apti_rehearsal *r)
{
    const apt_model *m = r->m;
    int64_t masks = 0, sum = 0, most = 0, count = 0;
    if (r->plan == NULL) return;
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        const int64_t n = apti_param_count(p);
        if (!r->chosen[i] || n == 0) continue;
        count++;
        masks += apti_cost(apt_bitmask_words(n) * (int64_t)sizeof(uint64_t));
        if (p->linear && !p->trainable) {
            sum += n;
            most = apti_max_i64(most, n);
        }
    }
    apti_note(r, APTI_USE_MASKS, masks + apti_cost(m->param_count * (int64_t)sizeof(uint64_t *)));
    if (r->t.model == NULL) return;              /* nothing is trained, so nothing pruned */
    apti_note_brief(r, APTI_USE_SCRATCH, apti_cost(count * (int64_t)sizeof(apt_weights)) + apti_cost(m->param_count) +
                    apti_cost(count * (int64_t)sizeof(apti_param *)) + (r->plan->iterations != 1 ? masks : 0) +
                    apti_cost((r->plan->global ? sum : most) * (int64_t)sizeof(float)));
}

static apt_result apti_rehearse(apti_rehearsal *r, const apt_train_desc *desc)
{
    apti_rehearse_model(r);
    if (desc == NULL) {
        apti_note(r, APTI_USE_ACTIVATIONS, apti_pass_frame_cost(r->m));
        apti_note_pass(r, 0);
        apti_rehearse_magnitude(r);
        return APT_OK;
    }
    r->t.desc = *desc;
    r->t.model = r->m;
    apti_desc_resolve(&r->t.desc, &r->m->config);
    const apt_result result = apti_desc_check(r->ctx, &r->t.desc, &r->m->config);
    if (result != APT_OK) return result;
    const bool prunes = r->t.desc.method == APT_METHOD_APT && r->t.desc.target_sparsity > 0;
    const uint32_t mode = apti_train_mode(&r->t, prunes, prunes && !r->t.desc.disable_distill);
    const bool first = r->plan != NULL && r->plan->begin == 0 && r->plan->iterations == 1;
    apti_rehearse_attach(r);
    if (first) apti_rehearse_magnitude(r);       /* there is nothing to compute with yet */
    apti_note_pass(r, mode);
    if (!first) apti_rehearse_magnitude(r);
    if (prunes) apti_rehearse_pruning(r, mode);
    return APT_OK;
}

static void apti_estimate_report(const apti_rehearsal *r, apt_estimate_info *info)
{
    info->weights = r->most[APTI_USE_WEIGHTS];
    info->adapters = r->most[APTI_USE_ADAPTERS];
    info->optimizer = r->most[APTI_USE_OPTIMIZER];
    info->activations = r->most[APTI_USE_ACTIVATIONS];
    info->teacher = r->most[APTI_USE_TEACHER];
    info->masks = r->most[APTI_USE_MASKS];
    info->scratch = r->most[APTI_USE_SCRATCH];
    info->shareable = r->shareable;
    info->total = 0;
    for (int32_t i = 0; i < APTI_USES; i++) info->total += r->most[i];
}

APT_API apt_result apt_estimate(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc, int64_t tokens,
                                int64_t sequences, apt_estimate_info *info)
{
    const bool two = config != NULL && config->decoder_layers > 0;
    return apt_estimate_pair(ctx, config, desc, tokens, two ? tokens : 0, sequences, info);
}

APT_API apt_result apt_estimate_pair(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc, int64_t tokens,
                                     int64_t target_tokens, int64_t sequences, apt_estimate_info *info)
{
    return apt_estimate_magnitude(ctx, config, desc, NULL, tokens, target_tokens, sequences, info);
}

/* Which matrices are pruned; without a plan: none. */
static apt_result apti_rehearse_choose(apti_rehearsal *r, const apt_iterative_desc *plan)
{
    r->plan = plan;
    if (plan == NULL) return APT_OK;
    if (plan->start_canary != 0 || plan->end_canary != 0)
        return apti_fail(r->ctx, APT_E_ARGUMENT, "apt_estimate_magnitude: the plan is not initialised with APT_ZERO");
    if (plan->iterations < 0 || plan->begin < 0)
        return apti_fail(r->ctx, APT_E_RANGE, "apt_estimate_magnitude: %d iterations from step %lld on; expected 0 or more",
                         (int)plan->iterations, (long long)plan->begin);
    return apti_magnitude_choose(r->m, plan->patterns, plan->pattern_count, r->chosen);
}

APT_API apt_result apt_estimate_magnitude(apt_ctx *ctx, const apt_config *config, const apt_train_desc *desc,
                                          const apt_iterative_desc *plan, int64_t tokens, int64_t target_tokens,
                                          int64_t sequences, apt_estimate_info *info)
{
    apti_rehearsal r = APT_ZERO;
    if (ctx == NULL) return APT_E_ARGUMENT;
    if (config == NULL || info == NULL) return apti_fail(ctx, APT_E_ARGUMENT, "apt_estimate: config or info is NULL");
    if (sequences < 1 || tokens < sequences || tokens > (int64_t)1 << 31)
        return apti_fail(ctx, APT_E_RANGE, "apt_estimate: %lld tokens in %lld sequences", (long long)tokens,
                         (long long)sequences);
    if (config->decoder_layers > 0 ? target_tokens < sequences || target_tokens > (int64_t)1 << 31 : target_tokens != 0)
        return apti_fail(ctx, APT_E_RANGE, "apt_estimate: %lld target tokens in %lld sequences", (long long)target_tokens,
                         (long long)sequences);
    apt_config c = *config;
    if (c.layer == NULL && c.head_dim == 0 && c.heads > 0) c.head_dim = c.hidden / c.heads;
    apt_result result = apti_model_frame(ctx, &c, APT_F32, &r.m);
    if (result != APT_OK) return result;
    r.ctx = ctx;
    r.tokens = tokens;
    r.target_tokens = target_tokens;
    r.sequences = sequences;
    r.acts = (apti_acts *)apti_calloc(ctx, r.m->config.layers, (int64_t)sizeof(apti_acts));
    r.dense = (apt_layer_shape *)apti_alloc(ctx, r.m->config.layers, (int64_t)sizeof(apt_layer_shape));
    r.shared = (uint8_t *)apti_calloc(ctx, 2 * (int64_t)r.m->param_count, 1);
    r.chosen = r.shared != NULL ? r.shared + r.m->param_count : NULL;
    const int32_t adapters = apti_sites(r.m);
    r.growth.block = apti_alloc(ctx, apti_growth_plan(&r.growth, NULL, adapters), 1);
    if (r.acts != NULL && r.dense != NULL && r.shared != NULL && r.growth.block != NULL) {
        (void)apti_growth_plan(&r.growth, (char *)r.growth.block, adapters);
        memcpy(r.dense, r.m->shape, (size_t)r.m->config.layers * sizeof(apt_layer_shape));
        result = apti_rehearse_choose(&r, plan);
        if (result == APT_OK) result = apti_rehearse(&r, desc);
    } else {
        result = apti_fail(ctx, APT_E_MEMORY, "apt_estimate: no memory for its plan");
    }
    if (result == APT_OK) apti_estimate_report(&r, info);
    apti_free(ctx, r.acts);
    apti_free(ctx, r.dense);
    apti_free(ctx, r.shared);
    apti_free(ctx, r.growth.block);
    apti_model_free(r.m);
    return result;
}
#endif /* APT_ONLY_CORE */


// >>files
#ifndef APT_ONLY_CORE
/* ---------------------------------------------------------------------------------------------------------------------
   Files. Every byte from outside is untrusted: each length, offset and product of sizes is checked before it is used,
   nothing is allocated from a number that the file's own size does not bound, and text from a file reaches a message
   only as printable ASCII. A refusal names the path and the tensor, key or byte offset, what was expected and what was
   found.
   ------------------------------------------------------------------------------------------------------------------ */

#if defined(__BYTE_ORDER__) && defined(__ORDER_LITTLE_ENDIAN__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "apt.h reads and writes its little-endian files without conversion"
#endif

/* Text from a file made fit for a message: at most 116 bytes, printable ASCII. */
typedef struct apti_shown { char text[120]; } apti_shown;

static apti_shown apti_show_bytes(const char *text, int64_t bytes)
{
    apti_shown shown;
    const int64_t limit = (int64_t)sizeof shown.text - 4, n = apti_min_i64(bytes, limit);
    for (int64_t i = 0; i < n; i++) shown.text[i] = text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?';
    memcpy(shown.text + n, bytes > limit ? "..." : "", bytes > limit ? 4 : 1);
    return shown;
}

static apti_shown apti_show(const char *text)
{
    return apti_show_bytes(text, (int64_t)strlen(text));
}

/* "first/second" (or "first" + "second" when first is empty or ends in a slash) as a new block; NULL: no memory. */
static char *apti_join_path(apt_ctx *ctx, const char *first, const char *second)
{
    const int64_t a = (int64_t)strlen(first), b = (int64_t)strlen(second);
    const bool slash = a > 0 && first[a - 1] != '/';
    char *path = (char *)apti_alloc(ctx, a + b + 2, 1);
    if (path == NULL) return NULL;
    memcpy(path, first, (size_t)a);
    if (slash) path[a] = '/';
    memcpy(path + a + (slash ? 1 : 0), second, (size_t)b + 1);
    return path;
}

/* Heap sort of indices: no recursion and no quadratic worst case, whatever order a file holds. */
typedef int (*apti_compare)(const void *arg, int32_t a, int32_t b);

static void apti_sift_down(int32_t *index, int64_t at, int64_t n, apti_compare compare, const void *arg)
{
    const int32_t moved = index[at];
    for (int64_t child = 2 * at + 1; child < n; child = 2 * at + 1) {
        if (child + 1 < n && compare(arg, index[child], index[child + 1]) < 0) child++;
        if (compare(arg, moved, index[child]) >= 0) break;
        index[at] = index[child];
        at = child;
    }
    index[at] = moved;
}

/* index = 0..n-1 in ascending order of compare. */
static void apti_sort_indices(int32_t *index, int64_t n, apti_compare compare, const void *arg)
{
    for (int64_t i = n / 2 - 1; i >= 0; i--) apti_sift_down(index, i, n, compare, arg);
    for (int64_t last = n - 1; last > 0; last--) {
        const int32_t most = index[0];
        index[0] = index[last];
        index[last] = most;
        apti_sift_down(index, 0, last, compare, arg);
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   Numbers as text, whatever the program's locale: the decimal separator of printf and strtod is never used
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTI_NUMBER_BYTES = 512 };                /* longest number that is read; a double needs at most 770 digits to be hit
                                                    exactly, and 17 to be told apart */

/* The value of a number in JSON's grammar, correctly rounded. "12.5e3" is handed to strtod as "125e2": no separator.
   false: too long or not finite. */
static bool apti_decimal(const char *text, int64_t n, double *out)
{
    char plain[APTI_NUMBER_BYTES + 24];
    int64_t i = 0, used = 0, shift = 0, exponent = 0;
    bool fraction = false, negative = false;
    if (n <= 0 || n > APTI_NUMBER_BYTES) return false;
    for (; i < n && text[i] != 'e' && text[i] != 'E'; i++) {
        if (text[i] == '.') {
            fraction = true;
            continue;
        }
        plain[used++] = text[i];
        if (fraction) shift--;
    }
    for (i++; i < n; i++) {
        if (text[i] == '-') negative = true;
        else if (text[i] != '+') exponent = apti_min_i64(exponent * 10 + (text[i] - '0'), 100000);
    }
    (void)snprintf(plain + used, 24, "e%d", (int)((negative ? -exponent : exponent) + shift));
    *out = strtod(plain, NULL);
    return apti_finite_f64(*out);
}

/* Lays out digits d0.d1d2... * 10^exponent the way Python's repr does: 0.02, 12.5, 3.0, 1e-12. */
static void apti_lay_out_number(char out[40], bool negative, const char *digits, int32_t n, int32_t exponent)
{
    char *p = out;
    while (n > 1 && digits[n - 1] == '0') n--;
    if (negative) *p++ = '-';
    if (exponent < -4 || exponent >= 16) {
        *p++ = digits[0];
        if (n > 1) *p++ = '.';
        for (int32_t i = 1; i < n; i++) *p++ = digits[i];
        (void)snprintf(p, 16, "e%c%02d", exponent < 0 ? '-' : '+', (int)(exponent < 0 ? -exponent : exponent));
        return;
    }
    if (exponent < 0) *p++ = '0';
    for (int32_t i = 0; i <= exponent; i++) *p++ = i < n ? digits[i] : '0';
    *p++ = '.';
    for (int32_t i = -1; i > exponent; i--) *p++ = '0';
    for (int32_t i = exponent < 0 ? 0 : exponent + 1; i < n; i++) *p++ = digits[i];
    if (exponent >= n - 1) *p++ = '0';
    *p = 0;
}

/* The shortest text that reads back as the same float. value is finite. */
static void apti_format_float(char out[40], float value)
{
    for (int precision = 0; precision < 9; precision++) {
        char raw[64], digits[16];
        int32_t n = 0, exponent = 0;
        double back = 0;
        (void)snprintf(raw, sizeof raw, "%.*e", precision, (double)value);
        const char *p = raw;
        for (; *p != 'e' && *p != 0; p++)        /* between the digits stands the locale's separator, of any length */
            if (*p >= '0' && *p <= '9' && n < (int32_t)sizeof digits) digits[n++] = *p;
        const bool below = *p == 'e' && p[1] == '-';
        for (; *p != 0; p++)
            if (*p >= '0' && *p <= '9') exponent = exponent * 10 + (*p - '0');
        apti_lay_out_number(out, raw[0] == '-', digits, n, below ? -exponent : exponent);
        if (apti_decimal(out, (int64_t)strlen(out), &back) && apti_bits((float)back) == apti_bits(value)) return;
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
   JSON, strictly as RFC 8259 has it, and stricter where it leaves a choice: a key stands once in an object, strings are
   valid UTF-8 without lone surrogates, depth and sizes are bounded. The text becomes a flat array of nodes in two
   passes, count and fill. The text is never changed: strings are decoded when they are asked for.
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTI_JSON_DEPTH = 64, APTI_JSON_NODES = 1 << 23, APTI_JSON_BYTES = 1 << 27 };

typedef enum apti_json_kind {
    APTI_JSON_NULL = 0, APTI_JSON_BOOL, APTI_JSON_NUMBER, APTI_JSON_STRING, APTI_JSON_ARRAY, APTI_JSON_OBJECT
} apti_json_kind;

/* The nodes of a container follow it: elements, or key and value in turn. */
typedef struct apti_json_node {
    apti_json_kind kind;
    int32_t count;                               /* elements or members */
    int32_t next;                                /* first node behind this one and all that is in it */
    int32_t begin, end;                          /* bytes of the text; a string without its quotes */
} apti_json_node;

typedef struct apti_json {
    apt_ctx *ctx;
    const char *path;                            /* for messages; the caller's */
    const char *text;                            /* the caller's */
    int64_t bytes, base;                         /* base: where text begins in the file, for messages */
    apti_json_node *nodes;                       /* node 0 is the whole value */
    int32_t count;
} apti_json;

/* Length of the UTF-8 sequence at p, 0 when it is none: overlong forms, surrogates and values above 10FFFF are refused. */
static int32_t apti_utf8_bytes(const char *text, int64_t n)
{
    const uint8_t *p = (const uint8_t *)text;
    const uint32_t c = p[0];
    if (c < 0x80) return 1;
    const int32_t length = c >= 0xc2 && c <= 0xdf ? 2 : (c & 0xf0) == 0xe0 ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
    if (length == 0 || length > n) return 0;
    for (int32_t i = 1; i < length; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    if ((c == 0xe0 && p[1] < 0xa0) || (c == 0xf0 && p[1] < 0x90)) return 0;
    if ((c == 0xed && p[1] > 0x9f) || (c == 0xf4 && p[1] > 0x8f)) return 0;
    return length;
}

/* Four hexadecimal digits; -1: they are none. */
static int32_t apti_hex4(const char *p)
{
    int32_t value = 0;
    for (int i = 0; i < 4; i++) {
        const char c = p[i];
        if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
        else if (c >= 'a' && c <= 'f') value = value * 16 + (c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') value = value * 16 + (c - 'A' + 10);
        else return -1;
    }
    return value;
}

/* Reads the escape that begins at the backslash p; n bytes are left. Bytes it takes, or 0 when it is none. */
static int32_t apti_json_escape(const char *p, int64_t n, uint32_t *point)
{
    const char *names = "\"\\/bfnrt", *values = "\"\\/\b\f\n\r\t";
    if (n < 2) return 0;
    if (p[1] != 'u') {
        const char *hit = p[1] != 0 ? strchr(names, p[1]) : NULL;
        if (hit == NULL) return 0;
        *point = (uint32_t)values[hit - names];
        return 2;
    }
    const int32_t high = n >= 6 ? apti_hex4(p + 2) : -1;
    if (high < 0 || (high >= 0xdc00 && high <= 0xdfff)) return 0;
    *point = (uint32_t)high;
    if (high < 0xd800 || high > 0xdfff) return 6;
    const int32_t low = n >= 12 && p[6] == '\\' && p[7] == 'u' ? apti_hex4(p + 8) : -1;
    if (low < 0xdc00 || low > 0xdfff) return 0;
    *point = 0x10000u + ((uint32_t)(high - 0xd800) << 10) + (uint32_t)(low - 0xdc00);
    return 12;
}

static int32_t apti_utf8_put(uint32_t point, char out[4])
{
    if (point < 0x80) {
        out[0] = (char)point;
        return 1;
    }
    const int32_t n = point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (int32_t i = n - 1; i > 0; i--, point >>= 6) out[i] = (char)(0x80u | (point & 0x3fu));
    out[0] = (char)((n == 2 ? 0xc0u : n == 3 ? 0xe0u : 0xf0u) | point);
    return n;
}

/* One pass over a text. */
typedef struct apti_json_level { int32_t node, count; bool object; } apti_json_level;
typedef struct apti_json_scan {
    const char *text;
    int64_t bytes, at;
    apti_json_node *nodes;                       /* NULL: only count */
    int32_t count, depth;
    apti_json_level level[APTI_JSON_DEPTH];      /* the containers around `at` */
    const char *problem;                         /* what is wrong at `at` */
} apti_json_scan;

static bool apti_json_stop(apti_json_scan *s, const char *problem)
{
    s->problem = problem;
    return false;
}

static int apti_json_peek(const apti_json_scan *s)
{
    return s->at < s->bytes ? (int)(unsigned char)s->text[s->at] : -1;
}

static void apti_json_skip_space(apti_json_scan *s)
{
    for (int c = apti_json_peek(s); c == ' ' || c == '\n' || c == '\r' || c == '\t'; c = apti_json_peek(s)) s->at++;
}

static bool apti_json_add(apti_json_scan *s, apti_json_kind kind, int64_t begin, int64_t end)
{
    if (s->count >= APTI_JSON_NODES) return apti_json_stop(s, "more values than are allowed");
    if (s->nodes != NULL) {
        apti_json_node *node = &s->nodes[s->count];
        node->kind = kind;
        node->count = 0;
        node->next = s->count + 1;
        node->begin = (int32_t)begin;
        node->end = (int32_t)end;
    }
    s->count++;
    return true;
}

static bool apti_json_scan_string(apti_json_scan *s)
{
    if (apti_json_peek(s) != '"') return apti_json_stop(s, "a string is expected");
    const int64_t begin = ++s->at;
    for (int c = apti_json_peek(s); c != '"'; c = apti_json_peek(s)) {
        uint32_t point = 0;
        if (c < 0) return apti_json_stop(s, "the string does not end");
        if (c < 0x20) return apti_json_stop(s, "control character in a string");
        const int64_t left = s->bytes - s->at;
        const int32_t n = c == '\\' ? apti_json_escape(s->text + s->at, left, &point) : apti_utf8_bytes(s->text + s->at, left);
        if (n == 0) return apti_json_stop(s, c == '\\' ? "invalid escape in a string" : "invalid UTF-8 in a string");
        s->at += n;
    }
    return apti_json_add(s, APTI_JSON_STRING, begin, s->at++);
}

/* One digit or more. */
static bool apti_json_scan_digits(apti_json_scan *s)
{
    int c = apti_json_peek(s);
    if (c < '0' || c > '9') return apti_json_stop(s, "a digit is expected");
    for (; c >= '0' && c <= '9'; c = apti_json_peek(s)) s->at++;
    return true;
}

static bool apti_json_scan_number(apti_json_scan *s)
{
    const int64_t begin = s->at;
    if (apti_json_peek(s) == '-') s->at++;
    if (apti_json_peek(s) == '0') s->at++;
    else if (!apti_json_scan_digits(s)) return false;
    if (apti_json_peek(s) == '.') {
        s->at++;
        if (!apti_json_scan_digits(s)) return false;
    }
    if (apti_json_peek(s) == 'e' || apti_json_peek(s) == 'E') {
        s->at++;
        if (apti_json_peek(s) == '+' || apti_json_peek(s) == '-') s->at++;
        if (!apti_json_scan_digits(s)) return false;
    }
    const int64_t end = s->at;
    if (end - begin > APTI_NUMBER_BYTES) {
        s->at = begin;
        return apti_json_stop(s, "number longer than is allowed");
    }
    return apti_json_add(s, APTI_JSON_NUMBER, begin, end);
}

static bool apti_json_scan_word(apti_json_scan *s, const char *word, apti_json_kind kind)
{
    const int64_t n = (int64_t)strlen(word);
    if (s->bytes - s->at < n || memcmp(s->text + s->at, word, (size_t)n) != 0) return apti_json_stop(s, "a value is expected");
    s->at += n;
    return apti_json_add(s, kind, s->at - n, s->at);
}

/* A scalar as a whole; of a container only its opening bracket. */
static bool apti_json_scan_value(apti_json_scan *s)
{
    const int c = apti_json_peek(s);
    if (c == '"') return apti_json_scan_string(s);
    if (c == '-' || (c >= '0' && c <= '9')) return apti_json_scan_number(s);
    if (c == 't') return apti_json_scan_word(s, "true", APTI_JSON_BOOL);
    if (c == 'f') return apti_json_scan_word(s, "false", APTI_JSON_BOOL);
    if (c == 'n') return apti_json_scan_word(s, "null", APTI_JSON_NULL);
    if (c != '{' && c != '[') return apti_json_stop(s, "a value is expected");
    if (s->depth == APTI_JSON_DEPTH) return apti_json_stop(s, "nested too deeply");
    apti_json_level *level = &s->level[s->depth];
    level->node = s->count;
    level->count = 0;
    level->object = c == '{';
    if (!apti_json_add(s, c == '{' ? APTI_JSON_OBJECT : APTI_JSON_ARRAY, s->at, s->at)) return false;
    s->depth++;
    s->at++;
    return true;
}

static void apti_json_scan_close(apti_json_scan *s)
{
    const apti_json_level *level = &s->level[--s->depth];
    s->at++;
    if (s->nodes == NULL) return;
    s->nodes[level->node].count = level->count;
    s->nodes[level->node].next = s->count;
    s->nodes[level->node].end = (int32_t)s->at;
}

/* The next element or member of the innermost container, or its end. */
static bool apti_json_scan_item(apti_json_scan *s)
{
    apti_json_level *level = &s->level[s->depth - 1];
    apti_json_skip_space(s);
    if (apti_json_peek(s) == (level->object ? '}' : ']')) {
        apti_json_scan_close(s);
        return true;
    }
    if (level->count > 0) {
        if (apti_json_peek(s) != ',')
            return apti_json_stop(s, level->object ? "',' or '}' is expected" : "',' or ']' is expected");
        s->at++;
        apti_json_skip_space(s);
    }
    if (level->object) {
        if (!apti_json_scan_string(s)) return false;
        apti_json_skip_space(s);
        if (apti_json_peek(s) != ':') return apti_json_stop(s, "':' is expected");
        s->at++;
        apti_json_skip_space(s);
    }
    level->count++;
    return apti_json_scan_value(s);
}

static bool apti_json_scan_text(apti_json_scan *s)
{
    apti_json_skip_space(s);
    bool ok = apti_json_scan_value(s);
    while (ok && s->depth > 0) ok = apti_json_scan_item(s);
    if (!ok) return false;
    apti_json_skip_space(s);
    return s->at == s->bytes || apti_json_stop(s, "the end is expected");
}

static apt_result apti_json_fail(const apti_json *json, const apti_json_scan *s)
{
    char found[24] = "the end";
    const int c = apti_json_peek(s);
    if (c >= 0) (void)snprintf(found, sizeof found, c > 0x20 && c < 0x7f ? "'%c'" : "byte 0x%02x", c);
    return apti_fail(json->ctx, APT_E_FORMAT, "'%.600s': byte %lld: %s, found %s", json->path, (long long)(json->base + s->at),
                     s->problem, found);
}

/* Walks over the decoded bytes of a string node. */
typedef struct apti_json_chars { const char *p, *end; char unit[4]; int32_t used, length; } apti_json_chars;

static apti_json_chars apti_json_chars_of(const apti_json *json, int32_t node)
{
    apti_json_chars c;
    c.p = json->text + json->nodes[node].begin;
    c.end = json->text + json->nodes[node].end;
    c.used = c.length = 0;
    return c;
}

/* The next byte, -1 at the end. */
static int apti_json_next(apti_json_chars *c)
{
    if (c->used < c->length) return (int)(unsigned char)c->unit[c->used++];
    if (c->p >= c->end) return -1;
    if (*c->p != '\\') return (int)(unsigned char)*c->p++;
    uint32_t point = 0;
    c->p += apti_json_escape(c->p, c->end - c->p, &point);
    c->length = apti_utf8_put(point, c->unit);
    c->used = 1;
    return (int)(unsigned char)c->unit[0];
}

static int apti_json_compare_strings(const void *arg, int32_t a, int32_t b)
{
    const apti_json *json = (const apti_json *)arg;
    apti_json_chars x = apti_json_chars_of(json, a), y = apti_json_chars_of(json, b);
    for (;;) {
        const int p = apti_json_next(&x), q = apti_json_next(&y);
        if (p != q) return p < q ? -1 : 1;
        if (p < 0) return 0;
    }
}

/* Sorts the keys of one object and looks at neighbours. */
static apt_result apti_json_check_object(const apti_json *json, int32_t object, int32_t *keys)
{
    int32_t n = 0;
    for (int32_t key = object + 1; key < json->nodes[object].next; key = json->nodes[key + 1].next) keys[n++] = key;
    apti_sort_indices(keys, n, apti_json_compare_strings, json);
    for (int32_t i = 1; i < n; i++) {
        if (apti_json_compare_strings(json, keys[i - 1], keys[i]) != 0) continue;
        const apti_json_node *key = &json->nodes[keys[i] > keys[i - 1] ? keys[i] : keys[i - 1]];
        return apti_fail(json->ctx, APT_E_FORMAT, "'%.600s': byte %lld: the key '%s' stands twice in one object", json->path,
                         (long long)(json->base + key->begin),
                         apti_show_bytes(json->text + key->begin, key->end - key->begin).text);
    }
    return APT_OK;
}

static apt_result apti_json_check_keys(const apti_json *json)
{
    int64_t most = 0;
    apt_result result = APT_OK;
    for (int32_t i = 0; i < json->count; i++)
        if (json->nodes[i].kind == APTI_JSON_OBJECT) most = apti_max_i64(most, json->nodes[i].count);
    if (most < 2) return APT_OK;
    int32_t *keys = (int32_t *)apti_alloc(json->ctx, most, (int64_t)sizeof(int32_t));
    if (keys == NULL)
        return apti_fail(json->ctx, APT_E_MEMORY, "'%.600s': no memory to check %lld keys", json->path, (long long)most);
    for (int32_t i = 0; i < json->count && result == APT_OK; i++)
        if (json->nodes[i].kind == APTI_JSON_OBJECT) result = apti_json_check_object(json, i, keys);
    apti_free(json->ctx, keys);
    return result;
}

static void apti_json_free(apti_json *json)
{
    apti_free(json->ctx, json->nodes);
    json->nodes = NULL;
    json->count = 0;
}

/* text stays the caller's and must outlive json. On failure there is nothing to free. */
static apt_result apti_json_parse_at(apt_ctx *ctx, const char *path, int64_t base, const void *text, int64_t bytes,
                                     apti_json *json)
{
    apti_json_scan scan;
    memset(&scan, 0, sizeof scan);
    scan.text = json->text = (const char *)text;
    scan.bytes = json->bytes = bytes;
    json->ctx = ctx;
    json->path = path;
    json->base = base;
    json->nodes = NULL;
    json->count = 0;
    if (bytes > APTI_JSON_BYTES)
        return apti_fail(ctx, APT_E_RANGE, "'%.600s': %lld bytes of JSON, at most %d are read", path, (long long)bytes,
                         (int)APTI_JSON_BYTES);
    if (!apti_json_scan_text(&scan)) return apti_json_fail(json, &scan);
    json->count = scan.count;
    json->nodes = (apti_json_node *)apti_alloc(ctx, json->count, (int64_t)sizeof(apti_json_node));
    if (json->nodes == NULL)
        return apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for %d JSON values", path, (int)json->count);
    scan.nodes = json->nodes;
    scan.at = 0;
    scan.count = 0;
    (void)apti_json_scan_text(&scan);
    const apt_result result = apti_json_check_keys(json);
    if (result != APT_OK) apti_json_free(json);
    return result;
}

static apt_result apti_json_parse(apt_ctx *ctx, const char *path, const void *text, int64_t bytes, apti_json *json)
{
    return apti_json_parse_at(ctx, path, 0, text, bytes, json);
}

/* Is `node` (-1 allowed) a string with this text? */
static bool apti_json_is(const apti_json *json, int32_t node, const char *text)
{
    if (node < 0 || json->nodes[node].kind != APTI_JSON_STRING) return false;
    apti_json_chars c = apti_json_chars_of(json, node);
    for (;; text++) {
        const int p = apti_json_next(&c);
        if (p != (*text != 0 ? (int)(unsigned char)*text : -1)) return false;
        if (p < 0) return true;
    }
}

/* The value of a member; -1 when `object` is none or lacks the key. */
static int32_t apti_json_find(const apti_json *json, int32_t object, const char *key)
{
    if (object < 0 || json->nodes[object].kind != APTI_JSON_OBJECT) return -1;
    for (int32_t k = object + 1; k < json->nodes[object].next; k = json->nodes[k + 1].next)
        if (apti_json_is(json, k, key)) return k + 1;
    return -1;
}

/* An integer written as one: no fraction, no exponent, within int64. */
static bool apti_json_int(const apti_json *json, int32_t node, int64_t *out)
{
    if (node < 0 || json->nodes[node].kind != APTI_JSON_NUMBER) return false;
    const char *p = json->text + json->nodes[node].begin, *end = json->text + json->nodes[node].end;
    const bool negative = *p == '-';
    int64_t value = 0;                           /* gathered below zero, where there is one more value */
    for (p += negative ? 1 : 0; p < end; p++) {
        const int digit = *p - '0';
        if (digit < 0 || digit > 9 || value < (INT64_MIN + digit) / 10) return false;
        value = value * 10 - digit;
    }
    if (!negative && value == INT64_MIN) return false;
    *out = negative ? value : -value;
    return true;
}

static bool apti_json_double(const apti_json *json, int32_t node, double *out)
{
    if (node < 0 || json->nodes[node].kind != APTI_JSON_NUMBER) return false;
    return apti_decimal(json->text + json->nodes[node].begin, json->nodes[node].end - json->nodes[node].begin, out);
}

static bool apti_json_bool(const apti_json *json, int32_t node, bool *out)
{
    if (node < 0 || json->nodes[node].kind != APTI_JSON_BOOL) return false;
    *out = json->text[json->nodes[node].begin] == 't';
    return true;
}

/* Decodes a string node into out and ends it with a 0 byte. Its length, -1 when it does not fit or is no string. */
static int64_t apti_json_string(const apti_json *json, int32_t node, char *out, int64_t capacity)
{
    if (node < 0 || json->nodes[node].kind != APTI_JSON_STRING) return -1;
    apti_json_chars c = apti_json_chars_of(json, node);
    int64_t n = 0;
    for (int byte = apti_json_next(&c); byte >= 0; byte = apti_json_next(&c)) {
        if (n + 1 >= capacity) return -1;
        out[n++] = (char)byte;
    }
    if (n >= capacity) return -1;
    out[n] = 0;
    return n;
}

/* The text of a node as the file has it, for messages. */
static apti_shown apti_json_show(const apti_json *json, int32_t node)
{
    const apti_json_node *n = &json->nodes[node];
    return apti_show_bytes(json->text + n->begin, n->end - n->begin);
}

/* ---- writing: calls in the order of the text; the first failure sticks and apti_json_end returns it */

typedef struct apti_json_out {
    apt_ctx *ctx;
    char *text;
    int64_t bytes, capacity;
    int32_t indent, depth;                       /* indent 0: all on one line */
    char closer[APTI_JSON_DEPTH];
    bool comma, after_key;
    apt_result result;
} apti_json_out;

static void apti_json_begin(apti_json_out *out, apt_ctx *ctx, int32_t indent)
{
    memset(out, 0, sizeof *out);
    out->ctx = ctx;
    out->indent = indent;
}

static void apti_json_drop(apti_json_out *out)
{
    apti_free(out->ctx, out->text);
    out->text = NULL;
}

static bool apti_json_reserve(apti_json_out *out, int64_t bytes)
{
    int64_t need = 0;
    if (out->result != APT_OK || !apti_add(out->bytes, bytes, &need)) return false;
    if (need <= out->capacity) return true;
    const int64_t capacity = apti_max_i64(need, apti_max_i64(4096, out->capacity * 2));
    char *text = (char *)apti_alloc(out->ctx, capacity, 1);
    if (text == NULL) {
        out->result = apti_fail(out->ctx, APT_E_MEMORY, "no memory for %lld bytes of JSON", (long long)capacity);
        return false;
    }
    if (out->bytes > 0) memcpy(text, out->text, (size_t)out->bytes);
    apti_free(out->ctx, out->text);
    out->text = text;
    out->capacity = capacity;
    return true;
}

static void apti_json_raw(apti_json_out *out, const char *text, int64_t bytes)
{
    if (!apti_json_reserve(out, bytes)) return;
    memcpy(out->text + out->bytes, text, (size_t)bytes);
    out->bytes += bytes;
}

static void apti_json_line(apti_json_out *out)
{
    if (out->indent == 0) return;
    apti_json_raw(out, "\n", 1);
    for (int32_t i = 0; i < out->indent * out->depth; i++) apti_json_raw(out, " ", 1);
}

/* What stands before a key, an element or the value of a key. */
static void apti_json_before(apti_json_out *out)
{
    if (!out->after_key && out->depth > 0) {
        if (out->comma) apti_json_raw(out, ",", 1);
        apti_json_line(out);
    }
    out->after_key = false;
    out->comma = true;
}

/* opener: '{' or '[' */
static void apti_json_open(apti_json_out *out, char opener)
{
    apti_json_before(out);
    if (out->depth == APTI_JSON_DEPTH && out->result == APT_OK)
        out->result = apti_fail(out->ctx, APT_E_STATE, "JSON nested deeper than %d", (int)APTI_JSON_DEPTH);
    if (out->result != APT_OK) return;
    apti_json_raw(out, &opener, 1);
    out->closer[out->depth++] = opener == '{' ? '}' : ']';
    out->comma = false;
}

static void apti_json_close(apti_json_out *out)
{
    if (out->result != APT_OK || out->depth == 0) return;
    out->depth--;
    if (out->comma) apti_json_line(out);
    apti_json_raw(out, &out->closer[out->depth], 1);
    out->comma = true;
}

static void apti_json_quote(apti_json_out *out, const char *text)
{
    const char *whole = text;
    int64_t left = (int64_t)strlen(text);
    apti_json_raw(out, "\"", 1);
    while (left > 0 && out->result == APT_OK) {
        const int32_t n = apti_utf8_bytes(text, left);
        const unsigned char c = (unsigned char)*text;
        char escape[8];
        if (n == 0) out->result = apti_fail(out->ctx, APT_E_FORMAT, "'%s' is not valid UTF-8", apti_show(whole).text);
        else if (c == '"' || c == '\\' || c < 0x20)
            apti_json_raw(out, escape, snprintf(escape, sizeof escape, c < 0x20 ? "\\u%04x" : "\\%c", (unsigned)c));
        else apti_json_raw(out, text, n);
        text += n;
        left -= n;
    }
    apti_json_raw(out, "\"", 1);
}

static void apti_json_key(apti_json_out *out, const char *key)
{
    apti_json_before(out);
    apti_json_quote(out, key);
    apti_json_raw(out, ": ", out->indent > 0 ? 2 : 1);
    out->after_key = true;
}

static void apti_json_put_string(apti_json_out *out, const char *value)
{
    apti_json_before(out);
    apti_json_quote(out, value);
}

static void apti_json_put_int(apti_json_out *out, int64_t value)
{
    char text[24];
    apti_json_before(out);
    apti_json_raw(out, text, snprintf(text, sizeof text, "%lld", (long long)value));
}

static void apti_json_put_bool(apti_json_out *out, bool value)
{
    apti_json_before(out);
    apti_json_raw(out, value ? "true" : "false", value ? 4 : 5);
}

static void apti_json_put_float(apti_json_out *out, float value)
{
    char text[40];
    apti_json_before(out);
    if (!apti_finite(value) && out->result == APT_OK)
        out->result = apti_fail(out->ctx, APT_E_NONFINITE, "JSON has no NaN and no infinity");
    if (out->result != APT_OK) return;
    apti_format_float(text, value);
    apti_json_raw(out, text, (int64_t)strlen(text));
}

/* The text stays owned by out until apti_json_drop. It is not ended by a 0 byte. */
static apt_result apti_json_end(apti_json_out *out, const char **text, int64_t *bytes)
{
    *text = out->text;
    *bytes = out->bytes;
    return out->result;
}

/* ---------------------------------------------------------------------------------------------------------------------
   safetensors: 8 bytes with the length of a JSON header, the header, then the tensors' bytes. Every rule of the format's
   text is checked: the header's size and first byte, what may stand behind it, known types, shapes whose product fits,
   offsets that agree with type and shape, no overlap, no hole, nothing left over. Unknown keys inside a tensor's entry
   are ignored, as the reference implementation does.
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTI_TENSOR_DIMS = 8, APTI_HEADER_BYTES = 100000000, APTI_SHARDS = 10000, APTI_INDEX_BYTES = 1 << 26 };

typedef struct apti_tensor_view {
    const char *name;                            /* ended by a 0 byte */
    int32_t name_bytes;
    apt_dtype dtype;
    int32_t dims;                                /* 0: a scalar */
    int64_t shape[APTI_TENSOR_DIMS];
    const uint8_t *data;                         /* in the mapped file, at any alignment */
    int64_t bytes;
    int32_t file;
} apti_tensor_view;

typedef struct apti_meta { const char *key, *value; } apti_meta;

typedef struct apti_tensor_file {
    char *path;
    char *pool;                                  /* names and metadata, decoded */
    apti_map map;
} apti_tensor_file;

typedef struct apti_tensors {
    apt_ctx *ctx;
    char *path;                                  /* what was opened, for messages */
    apti_tensor_file *files;
    int32_t file_count;
    apti_tensor_view *views;                     /* by name, once all files are read */
    int32_t count, capacity;
    apti_meta *meta;                             /* __metadata__ of the first file */
    int32_t meta_count;
} apti_tensors;

static int64_t apti_dtype_bytes(apt_dtype type)
{
    switch (type) {
    case APT_F64: case APT_I64: return 8;
    case APT_F32: case APT_I32: return 4;
    case APT_F16: case APT_BF16: case APT_I16: return 2;
    case APT_I8: case APT_U8: case APT_BOOL: default: return 1;
    }
}

static const char *apti_dtype_name(apt_dtype type)
{
    switch (type) {
    case APT_F32: return "F32";
    case APT_F64: return "F64";
    case APT_F16: return "F16";
    case APT_BF16: return "BF16";
    case APT_I64: return "I64";
    case APT_I32: return "I32";
    case APT_I16: return "I16";
    case APT_I8: return "I8";
    case APT_U8: return "U8";
    case APT_BOOL: return "BOOL";
    default: return "?";
    }
}

/* "[2, 32]" for messages. */
static apti_shown apti_show_shape(const int64_t *shape, int32_t dims)
{
    apti_shown shown;
    size_t used = 1;
    strcpy(shown.text, "[");
    for (int32_t i = 0; i < dims && used + 24 < sizeof shown.text; i++)
        used += (size_t)snprintf(shown.text + used, sizeof shown.text - used, i > 0 ? ", %lld" : "%lld", (long long)shape[i]);
    strcpy(shown.text + used, "]");
    return shown;
}

/* Product of a shape; false when a dimension is negative or it does not fit. */
static bool apti_shape_count(const int64_t *shape, int32_t dims, int64_t *count)
{
    bool ok = true;
    *count = 1;
    for (int32_t i = 0; i < dims && ok; i++) ok = apti_mul(*count, shape[i], count);
    return ok;
}

/* ---- one file */

typedef struct apti_header {                     /* while a header is read */
    apt_ctx *ctx;
    const char *path;
    const apti_json *json;
    const uint8_t *data;                         /* behind the header */
    int64_t data_bytes;
    char *pool;
    int64_t pool_bytes, pool_used;
} apti_header;

/* A decoded copy of a string node in the pool, which has room for all of them. */
static const char *apti_header_text(apti_header *h, int32_t node, int64_t *bytes)
{
    char *text = h->pool + h->pool_used;
    *bytes = apti_json_string(h->json, node, text, h->pool_bytes - h->pool_used);
    h->pool_used += *bytes + 1;
    return text;
}

static apt_result apti_header_type(const apti_header *h, int32_t entry, apti_tensor_view *view)
{
    const int32_t node = apti_json_find(h->json, entry, "dtype");
    if (node < 0 || h->json->nodes[node].kind != APTI_JSON_STRING)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' has no \"dtype\" string", h->path,
                         apti_show(view->name).text);
    for (int i = APT_F32; i <= APT_BOOL; i++) {
        view->dtype = (apt_dtype)i;
        if (apti_json_is(h->json, node, apti_dtype_name(view->dtype))) return APT_OK;
    }
    return apti_fail(h->ctx, APT_E_UNSUPPORTED,
                     "'%.600s': tensor '%s' has dtype \"%s\"; known are F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL",
                     h->path, apti_show(view->name).text, apti_json_show(h->json, node).text);
}

static apt_result apti_header_shape(const apti_header *h, int32_t entry, apti_tensor_view *view)
{
    const int32_t node = apti_json_find(h->json, entry, "shape");
    if (node < 0 || h->json->nodes[node].kind != APTI_JSON_ARRAY)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' has no \"shape\" array", h->path,
                         apti_show(view->name).text);
    if (h->json->nodes[node].count > APTI_TENSOR_DIMS)
        return apti_fail(h->ctx, APT_E_UNSUPPORTED, "'%.600s': tensor '%s' has %d dimensions, at most %d are supported", h->path,
                         apti_show(view->name).text, (int)h->json->nodes[node].count, (int)APTI_TENSOR_DIMS);
    view->dims = h->json->nodes[node].count;
    /* node + 1 + i is element i as long as those before it are numbers, which have nothing inside. */
    for (int32_t i = 0; i < view->dims; i++) {
        int64_t *size = &view->shape[i];
        if (!apti_json_int(h->json, node + 1 + i, size) || *size < 0)
            return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s': dimension %d is %s, expected an integer of 0 or more",
                             h->path, apti_show(view->name).text, (int)i, apti_json_show(h->json, node + 1 + i).text);
    }
    int64_t values = 0;
    if (!apti_shape_count(view->shape, view->dims, &values) || !apti_mul(values, apti_dtype_bytes(view->dtype), &view->bytes))
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s': the size of shape %s overflows", h->path,
                         apti_show(view->name).text, apti_show_shape(view->shape, view->dims).text);
    return APT_OK;
}

static apt_result apti_header_offsets(const apti_header *h, int32_t entry, apti_tensor_view *view)
{
    const int32_t node = apti_json_find(h->json, entry, "data_offsets");
    int64_t begin = -1, end = -1;
    if (node < 0 || h->json->nodes[node].kind != APTI_JSON_ARRAY || h->json->nodes[node].count != 2 ||
        !apti_json_int(h->json, node + 1, &begin) || !apti_json_int(h->json, node + 2, &end))
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' has no \"data_offsets\" of two integers", h->path,
                         apti_show(view->name).text);
    if (begin < 0 || begin > end || end > h->data_bytes)
        return apti_fail(h->ctx, APT_E_FORMAT,
                         "'%.600s': tensor '%s': data_offsets [%lld, %lld] do not lie in the %lld bytes of data", h->path,
                         apti_show(view->name).text, (long long)begin, (long long)end, (long long)h->data_bytes);
    if (end - begin != view->bytes)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s': data_offsets give %lld bytes, %s %s needs %lld", h->path,
                         apti_show(view->name).text, (long long)(end - begin), apti_dtype_name(view->dtype),
                         apti_show_shape(view->shape, view->dims).text, (long long)view->bytes);
    view->data = h->data + begin;
    return APT_OK;
}

static apt_result apti_header_tensor(apti_header *h, int32_t key, apti_tensor_view *view)
{
    int64_t bytes = 0;
    view->name = apti_header_text(h, key, &bytes);
    view->name_bytes = (int32_t)bytes;
    if ((int64_t)strlen(view->name) != bytes)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': the tensor name '%s' holds a 0 character", h->path,
                         apti_show_bytes(view->name, bytes).text);
    if (h->json->nodes[key + 1].kind != APTI_JSON_OBJECT)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' is described by %s, expected an object", h->path,
                         apti_show(view->name).text, apti_json_show(h->json, key + 1).text);
    apt_result result = apti_header_type(h, key + 1, view);
    if (result == APT_OK) result = apti_header_shape(h, key + 1, view);
    if (result == APT_OK) result = apti_header_offsets(h, key + 1, view);
    return result;
}

static apt_result apti_header_meta(apti_tensors *set, apti_header *h, int32_t object, bool keep)
{
    const apti_json_node *nodes = h->json->nodes;
    if (nodes[object].kind != APTI_JSON_OBJECT)
        return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': __metadata__ is not an object", h->path);
    for (int32_t key = object + 1; key < nodes[object].next; key = nodes[key + 1].next)
        if (nodes[key + 1].kind != APTI_JSON_STRING)
            return apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': __metadata__ '%s' is not a string", h->path,
                             apti_json_show(h->json, key).text);
    if (!keep) return APT_OK;
    set->meta = (apti_meta *)apti_alloc(set->ctx, nodes[object].count, (int64_t)sizeof(apti_meta));
    if (set->meta == NULL) return apti_fail(h->ctx, APT_E_MEMORY, "'%.600s': no memory for its metadata", h->path);
    for (int32_t key = object + 1; key < nodes[object].next; key += 2) {
        int64_t bytes = 0;
        set->meta[set->meta_count].key = apti_header_text(h, key, &bytes);
        set->meta[set->meta_count++].value = apti_header_text(h, key + 1, &bytes);
    }
    return APT_OK;
}

static int apti_compare_places(const void *arg, int32_t a, int32_t b)
{
    const apti_tensor_view *x = (const apti_tensor_view *)arg + a, *y = (const apti_tensor_view *)arg + b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int apti_compare_names(const void *arg, int32_t a, int32_t b)
{
    return strcmp(((const apti_tensor_view *)arg)[a].name, ((const apti_tensor_view *)arg)[b].name);
}

/* Tensors one behind the other from the first byte of the data to the last. */
static apt_result apti_header_cover(const apti_header *h, const apti_tensor_view *views, int32_t n)
{
    int32_t *order = (int32_t *)apti_alloc(h->ctx, n, (int64_t)sizeof(int32_t));
    if (order == NULL) return apti_fail(h->ctx, APT_E_MEMORY, "'%.600s': no memory for %d tensors", h->path, (int)n);
    for (int32_t i = 0; i < n; i++) order[i] = i;
    apti_sort_indices(order, n, apti_compare_places, views);
    int64_t at = 0;
    apt_result result = APT_OK;
    for (int32_t i = 0; i < n && result == APT_OK; i++) {
        const apti_tensor_view *view = &views[order[i]];
        const int64_t begin = view->data - h->data;
        if (begin != at)
            result = apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' begins at byte %lld of the data, which %s byte %lld",
                               h->path, apti_show(view->name).text, (long long)begin,
                               begin < at ? "overlaps the tensor up to" : "leaves a hole from", (long long)at);
        at = begin + view->bytes;
    }
    if (result == APT_OK && at != h->data_bytes)
        result = apti_fail(h->ctx, APT_E_FORMAT, "'%.600s': the tensors end at byte %lld of %lld bytes of data", h->path,
                           (long long)at, (long long)h->data_bytes);
    apti_free(h->ctx, order);
    return result;
}

static bool apti_tensors_reserve(apti_tensors *set, int32_t more)
{
    if (more <= set->capacity - set->count) return true;
    const int64_t capacity = apti_max_i64((int64_t)set->count + more, 2 * (int64_t)set->capacity);
    if (capacity > INT32_MAX) return false;
    apti_tensor_view *views = (apti_tensor_view *)apti_alloc(set->ctx, capacity, (int64_t)sizeof(apti_tensor_view));
    if (views == NULL) return false;
    if (set->count > 0) memcpy(views, set->views, (size_t)set->count * sizeof(apti_tensor_view));
    apti_free(set->ctx, set->views);
    set->views = views;
    set->capacity = (int32_t)capacity;
    return true;
}

static apt_result apti_header_read(apti_tensors *set, int32_t file, apti_header *h)
{
    const apti_json_node *nodes = h->json->nodes;
    const int32_t first = set->count;
    apt_result result = APT_OK;
    h->pool_bytes = h->json->bytes + 2 * (int64_t)h->json->count;
    h->pool = set->files[file].pool = (char *)apti_alloc(set->ctx, h->pool_bytes, 1);
    if (h->pool == NULL || !apti_tensors_reserve(set, nodes[0].count + 1))
        return apti_fail(set->ctx, APT_E_MEMORY, "'%.600s': no memory for the names of %d tensors", h->path, (int)nodes[0].count);
    for (int32_t key = 1; key < nodes[0].next && result == APT_OK; key = nodes[key + 1].next) {
        if (apti_json_is(h->json, key, "__metadata__")) {
            result = apti_header_meta(set, h, key + 1, file == 0);
            continue;
        }
        apti_tensor_view *view = &set->views[set->count];
        memset(view, 0, sizeof *view);
        view->file = file;
        result = apti_header_tensor(h, key, view);
        set->count += result == APT_OK ? 1 : 0;
    }
    return result == APT_OK ? apti_header_cover(h, set->views + first, set->count - first) : result;
}

/* Adds the tensors of a whole file in memory to the set; set->files[file].path is its name in messages. */
static apt_result apti_tensors_read(apti_tensors *set, int32_t file, const uint8_t *data, int64_t bytes)
{
    const char *path = set->files[file].path;
    uint64_t length = 0;
    if (bytes < 8)
        return apti_fail(set->ctx, APT_E_FORMAT, "'%.600s': %lld bytes, too short for the header's length", path,
                         (long long)bytes);
    memcpy(&length, data, 8);
    if (length > APTI_HEADER_BYTES)
        return apti_fail(set->ctx, APT_E_FORMAT, "'%.600s': header of %llu bytes, at most %d are allowed", path,
                         (unsigned long long)length, (int)APTI_HEADER_BYTES);
    if ((int64_t)length > bytes - 8)
        return apti_fail(set->ctx, APT_E_FORMAT, "'%.600s': header of %llu bytes in a file of %lld", path,
                         (unsigned long long)length, (long long)bytes);
    if (length == 0 || data[8] != '{')
        return apti_fail(set->ctx, APT_E_FORMAT, "'%.600s': byte 8: the header does not begin with '{'", path);
    apti_json json;
    apt_result result = apti_json_parse_at(set->ctx, path, 8, data + 8, (int64_t)length, &json);
    if (result != APT_OK) return result;
    for (int64_t i = json.nodes[0].end; i < (int64_t)length && result == APT_OK; i++)
        if (data[8 + i] != ' ')
            result = apti_fail(set->ctx, APT_E_FORMAT,
                               "'%.600s': byte %lld: only spaces may follow the header, found byte 0x%02x", path,
                               (long long)(8 + i), (unsigned)data[8 + i]);
    apti_header header;
    memset(&header, 0, sizeof header);
    header.ctx = set->ctx;
    header.path = path;
    header.json = &json;
    header.data = data + 8 + length;
    header.data_bytes = bytes - 8 - (int64_t)length;
    if (result == APT_OK) result = apti_header_read(set, file, &header);
    apti_json_free(&json);
    return result;
}

/* ---- sets of files */

static void apti_tensors_close(apti_tensors *set)
{
    if (set == NULL) return;
    apt_ctx *ctx = set->ctx;
    for (int32_t i = 0; i < set->file_count; i++) {
        apti_unmap_file(ctx, &set->files[i].map);
        apti_free(ctx, set->files[i].path);
        apti_free(ctx, set->files[i].pool);
    }
    apti_free(ctx, set->files);
    apti_free(ctx, set->views);
    apti_free(ctx, set->meta);
    apti_free(ctx, set->path);
    apti_free(ctx, set);
}

/* An empty set with room for `files` files. */
static apt_result apti_tensors_new(apt_ctx *ctx, const char *path, int32_t files, apti_tensors **out)
{
    apti_tensors *set = (apti_tensors *)apti_calloc(ctx, 1, (int64_t)sizeof(apti_tensors));
    if (set != NULL) {
        set->ctx = ctx;
        set->path = apti_copy_text(ctx, path);
        set->files = (apti_tensor_file *)apti_calloc(ctx, files, (int64_t)sizeof(apti_tensor_file));
    }
    if (set == NULL || set->path == NULL || set->files == NULL) {
        apti_tensors_close(set);
        return apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory to open it", path);
    }
    set->file_count = files;
    *out = set;
    return APT_OK;
}

/* Maps and reads file number `file`; takes `path`, a block (NULL: there was no memory for it). */
static apt_result apti_tensors_add(apti_tensors *set, int32_t file, char *path)
{
    apti_tensor_file *f = &set->files[file];
    f->path = path;
    if (path == NULL) return apti_fail(set->ctx, APT_E_MEMORY, "'%.600s': no memory for a path", set->path);
    const apt_result result = apti_map_file(set->ctx, path, &f->map);
    return result == APT_OK ? apti_tensors_read(set, file, f->map.data, f->map.bytes) : result;
}

/* When all files are read: sorts by name, refuses a name that two files hold (or one file under two spellings). */
static apt_result apti_tensors_sort(apti_tensors *set)
{
    const int64_t n = set->count;
    int32_t *order = (int32_t *)apti_alloc(set->ctx, n, (int64_t)sizeof(int32_t));
    apti_tensor_view *sorted = (apti_tensor_view *)apti_alloc(set->ctx, n, (int64_t)sizeof(apti_tensor_view));
    apt_result result = APT_OK;
    if (order == NULL || sorted == NULL)
        result = apti_fail(set->ctx, APT_E_MEMORY, "'%.600s': no memory for %d tensors", set->path, (int)n);
    for (int32_t i = 0; i < n && result == APT_OK; i++) order[i] = i;
    if (result == APT_OK) apti_sort_indices(order, n, apti_compare_names, set->views);
    for (int64_t i = 0; i < n && result == APT_OK; i++) {
        sorted[i] = set->views[order[i]];
        if (i > 0 && strcmp(sorted[i - 1].name, sorted[i].name) == 0)
            result = apti_fail(set->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' is also in '%.200s'",
                               set->files[sorted[i].file].path, apti_show(sorted[i].name).text,
                               set->files[sorted[i - 1].file].path);
    }
    apti_free(set->ctx, order);
    if (result != APT_OK) {
        apti_free(set->ctx, sorted);
        return result;
    }
    apti_free(set->ctx, set->views);
    set->views = sorted;
    set->capacity = set->count;
    return APT_OK;
}

/* NULL: there is none. */
static apti_tensor_view *apti_tensors_find(const apti_tensors *set, const char *name)
{
    int64_t low = 0, high = set->count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const int order = strcmp(set->views[middle].name, name);
        if (order == 0) return &set->views[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* A value of __metadata__ (of the first file), NULL: absent. */
static const char *apti_tensors_meta(const apti_tensors *set, const char *key)
{
    for (int32_t i = 0; i < set->meta_count; i++)
        if (strcmp(set->meta[i].key, key) == 0) return set->meta[i].value;
    return NULL;
}

static apt_result apti_tensors_open_file(apt_ctx *ctx, const char *path, apti_tensors **out)
{
    apti_tensors *set = NULL;
    apt_result result = apti_tensors_new(ctx, path, 1, &set);
    if (result != APT_OK) return result;
    result = apti_tensors_add(set, 0, apti_copy_text(ctx, path));
    if (result == APT_OK) result = apti_tensors_sort(set);
    if (result == APT_OK) *out = set;
    else apti_tensors_close(set);
    return result;
}

/* ---- shards: model.safetensors.index.json says which file of the folder holds which tensor */

typedef struct apti_shard_entry { const char *tensor, *shard; } apti_shard_entry;
typedef struct apti_shards {
    apt_ctx *ctx;
    const char *dir;
    char *path;                                  /* of the index */
    char *pool;
    apti_shard_entry *entries;
    int32_t *order;                              /* entries by shard */
    int32_t count, files;
} apti_shards;

static void apti_shards_free(apti_shards *s)
{
    apti_free(s->ctx, s->path);
    apti_free(s->ctx, s->pool);
    apti_free(s->ctx, s->entries);
    apti_free(s->ctx, s->order);
}

static int apti_compare_shards(const void *arg, int32_t a, int32_t b)
{
    return strcmp(((const apti_shard_entry *)arg)[a].shard, ((const apti_shard_entry *)arg)[b].shard);
}

/* A shard is a file of the same folder: nothing in its name may lead elsewhere. */
static bool apti_shard_name_ok(const char *name, int64_t bytes)
{
    const int64_t n = (int64_t)strlen(name);
    for (const char *p = name; *p != 0; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f) return false;
    return n == bytes && n > 12 && n <= 255 && strcmp(name + n - 12, ".safetensors") == 0 && strpbrk(name, "/\\:") == NULL &&
           strstr(name, "..") == NULL;
}

static apt_result apti_shards_entries(apti_shards *s, const apti_json *json, int32_t map)
{
    const apti_json_node *nodes = json->nodes;
    const int64_t pool_bytes = json->bytes + 2 * (int64_t)json->count;
    int64_t used = 0;
    s->pool = (char *)apti_alloc(s->ctx, pool_bytes, 1);
    s->entries = (apti_shard_entry *)apti_alloc(s->ctx, nodes[map].count, (int64_t)sizeof(apti_shard_entry));
    s->order = (int32_t *)apti_alloc(s->ctx, nodes[map].count, (int64_t)sizeof(int32_t));
    if (s->pool == NULL || s->entries == NULL || s->order == NULL)
        return apti_fail(s->ctx, APT_E_MEMORY, "'%.600s': no memory for %d entries", s->path, (int)nodes[map].count);
    for (int32_t key = map + 1; key < nodes[map].next; key = nodes[key + 1].next) {
        apti_shard_entry *entry = &s->entries[s->count];
        s->order[s->count] = s->count;
        s->count++;
        entry->tensor = s->pool + used;
        const int64_t name = apti_json_string(json, key, s->pool + used, pool_bytes - used);
        used += name + 1;
        entry->shard = s->pool + used;
        const int64_t shard = apti_json_string(json, key + 1, s->pool + used, pool_bytes - used);
        if ((int64_t)strlen(entry->tensor) != name)
            return apti_fail(s->ctx, APT_E_FORMAT, "'%.600s': the tensor name '%s' holds a 0 character", s->path,
                             apti_json_show(json, key).text);
        if (shard < 0 || !apti_shard_name_ok(entry->shard, shard))
            return apti_fail(s->ctx, APT_E_FORMAT,
                             "'%.600s': tensor '%s': \"%s\" is not the name of a .safetensors file of this folder", s->path,
                             apti_show(entry->tensor).text, apti_json_show(json, key + 1).text);
        used += shard + 1;
    }
    return APT_OK;
}

static apt_result apti_shards_parse(apti_shards *s, const char *text, int64_t bytes)
{
    apti_json json;
    apt_result result = apti_json_parse(s->ctx, s->path, text, bytes, &json);
    if (result != APT_OK) return result;
    const int32_t map = apti_json_find(&json, 0, "weight_map");
    if (map < 0 || json.nodes[map].kind != APTI_JSON_OBJECT || json.nodes[map].count == 0)
        result = apti_fail(s->ctx, APT_E_FORMAT, "'%.600s': no \"weight_map\" object with tensors", s->path);
    else result = apti_shards_entries(s, &json, map);
    apti_json_free(&json);
    if (result != APT_OK) return result;
    apti_sort_indices(s->order, s->count, apti_compare_shards, s->entries);
    for (int32_t i = 0; i < s->count; i++)
        if (i == 0 || apti_compare_shards(s->entries, s->order[i - 1], s->order[i]) != 0) s->files++;
    if (s->files > APTI_SHARDS)
        result = apti_fail(s->ctx, APT_E_RANGE, "'%.600s': %d shards, at most %d", s->path, (int)s->files, (int)APTI_SHARDS);
    return result;
}

/* Every tensor is where the index says, and the index says where every tensor is. */
static apt_result apti_shards_check(const apti_shards *s, const apti_tensors *set)
{
    int32_t file = -1;
    for (int32_t i = 0; i < s->count; i++) {
        if (i == 0 || apti_compare_shards(s->entries, s->order[i - 1], s->order[i]) != 0) file++;
        const apti_shard_entry *entry = &s->entries[s->order[i]];
        apti_tensor_view *view = apti_tensors_find(set, entry->tensor);
        if (view == NULL || view->file != file)
            return apti_fail(s->ctx, APT_E_MISSING, "'%.600s': tensor '%s' is not in '%s', where the index has it", s->path,
                             apti_show(entry->tensor).text, apti_show(entry->shard).text);
        view->file = ~file;                      /* marks it as listed, undone below */
    }
    const apti_tensor_view *unlisted = NULL;
    for (int32_t i = 0; i < set->count; i++) {
        if (set->views[i].file >= 0) unlisted = &set->views[i];
        else set->views[i].file = ~set->views[i].file;
    }
    if (unlisted == NULL) return APT_OK;
    return apti_fail(s->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' is in '%.200s' but not in the index", s->path,
                     apti_show(unlisted->name).text, set->files[unlisted->file].path);
}

static apt_result apti_shards_open(const apti_shards *s, apti_tensors **out)
{
    apti_tensors *set = NULL;
    apt_result result = apti_tensors_new(s->ctx, s->dir, s->files, &set);
    if (result != APT_OK) return result;
    int32_t file = 0;
    for (int32_t i = 0; i < s->count && result == APT_OK; i++)
        if (i == 0 || apti_compare_shards(s->entries, s->order[i - 1], s->order[i]) != 0)
            result = apti_tensors_add(set, file++, apti_join_path(s->ctx, s->dir, s->entries[s->order[i]].shard));
    if (result == APT_OK) result = apti_tensors_sort(set);
    if (result == APT_OK) result = apti_shards_check(s, set);
    if (result == APT_OK) *out = set;
    else apti_tensors_close(set);
    return result;
}

/* Takes `path` of the index, a block. */
static apt_result apti_tensors_open_index(apt_ctx *ctx, const char *dir, char *path, apti_tensors **out)
{
    apti_shards shards;
    char *text = NULL;
    int64_t bytes = 0;
    memset(&shards, 0, sizeof shards);
    shards.ctx = ctx;
    shards.dir = dir;
    shards.path = path;
    apt_result result = apti_read_file(ctx, path, APTI_INDEX_BYTES, &text, &bytes);
    if (result == APT_OK) result = apti_shards_parse(&shards, text, bytes);
    apti_free(ctx, text);
    if (result == APT_OK) result = apti_shards_open(&shards, out);
    apti_shards_free(&shards);
    return result;
}

/* A .safetensors file, or a folder with model.safetensors or with shards and their index. */
static apt_result apti_tensors_open(apt_ctx *ctx, const char *path, apti_tensors **out)
{
    char *single = apti_join_path(ctx, path, "model.safetensors");
    char *index = apti_join_path(ctx, path, "model.safetensors.index.json");
    apt_result result;
    if (single == NULL || index == NULL) result = apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for a path", path);
    else if (apti_path_query(single) != APTI_PATH_NONE) result = apti_tensors_open_file(ctx, single, out);
    else if (apti_path_query(index) != APTI_PATH_NONE) {
        result = apti_tensors_open_index(ctx, path, index, out);
        index = NULL;
    } else if (apti_path_query(path) == APTI_PATH_FILE) result = apti_tensors_open_file(ctx, path, out);
    else
        result = apti_fail(ctx, APT_E_MISSING, "'%.600s': neither model.safetensors nor model.safetensors.index.json is there",
                           path);
    apti_free(ctx, single);
    apti_free(ctx, index);
    return result;
}

/* ---- values */

static void apti_convert_f64(float *out, const uint8_t *data, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double x;
        memcpy(&x, data + 8 * i, 8);
        /* Beyond float: infinity, which the caller refuses. Half an ulp above FLT_MAX still rounds down to it. */
        const bool fits = apti_finite_f64(x) && x < 3.4028235677973366e38 && x > -3.4028235677973366e38;
        out[i] = fits ? (float)x : apti_float(0x7f800000u);
    }
}

static void apti_convert_half(float *out, const uint8_t *data, int64_t n, bool bf16)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t x;
        memcpy(&x, data + 2 * i, 2);
        out[i] = bf16 ? apti_bf16_to_f32(x) : apti_f16_to_f32(x);
    }
}

/* APT_E_NONFINITE names the first value that is not a finite float. */
static apt_result apti_tensor_check(const apti_tensors *set, const apti_tensor_view *view, const float *values)
{
    const int64_t n = view->bytes / apti_dtype_bytes(view->dtype);
    int64_t i = 0;
    if (apti_finite_all(values, n)) return APT_OK;
    while (apti_finite(values[i])) i++;
    return apti_fail(set->ctx, APT_E_NONFINITE,
                     "'%.600s': tensor '%s': value %lld of %lld is NaN, infinite or too large for a float",
                     set->files[view->file].path, apti_show(view->name).text, (long long)i, (long long)n);
}

/* All values of a F64, F32, F16 or BF16 tensor as finite floats. */
static apt_result apti_tensor_to_f32(const apti_tensors *set, const apti_tensor_view *view, float *out)
{
    const int64_t n = view->bytes / apti_dtype_bytes(view->dtype);
    switch (view->dtype) {
    case APT_F32:
        if (n > 0) memcpy(out, view->data, (size_t)view->bytes);
        break;
    case APT_F64: apti_convert_f64(out, view->data, n); break;
    case APT_F16: apti_convert_half(out, view->data, n, false); break;
    case APT_BF16: apti_convert_half(out, view->data, n, true); break;
    case APT_I64: case APT_I32: case APT_I16: case APT_I8: case APT_U8: case APT_BOOL: default:
        return apti_fail(set->ctx, APT_E_UNSUPPORTED, "'%.600s': tensor '%s' has dtype %s, expected F64, F32, F16 or BF16",
                         set->files[view->file].path, apti_show(view->name).text, apti_dtype_name(view->dtype));
    }
    return apti_tensor_check(set, view, out);
}

/* ---- writing. The same tensors give the same bytes: large types first, so that every tensor is aligned, then by name */

typedef struct apti_tensor_item {
    const char *name;
    apt_dtype dtype;
    int32_t dims;
    int64_t shape[APTI_TENSOR_DIMS];
    const void *data;                            /* NULL: `fill` makes it */
} apti_tensor_item;

/* Writes all bytes of item `index` to out; called once for each such item, in file order. */
typedef apt_result (*apti_tensor_fill)(void *user, int64_t index, void *out);

typedef struct apti_tensor_job {
    const char *path;
    const apti_tensor_item *items;
    int32_t count;
    const apti_meta *meta;
    int32_t meta_count;
    apti_tensor_fill fill;
    void *user;
    /* Checkpoints: sums[0] of the file up to the data, sums[1 + i] of the i-th tensor in file order. The last item then
       stays last and its data are the sums, complete by the time they are written. NULL: none. */
    uint64_t *sums;
} apti_tensor_job;

static int apti_compare_item_names(const void *arg, int32_t a, int32_t b)
{
    return strcmp(((const apti_tensor_item *)arg)[a].name, ((const apti_tensor_item *)arg)[b].name);
}

static int apti_compare_items(const void *arg, int32_t a, int32_t b)
{
    const apti_tensor_item *items = (const apti_tensor_item *)arg;
    const int64_t x = apti_dtype_bytes(items[a].dtype), y = apti_dtype_bytes(items[b].dtype);
    return x != y ? (x > y ? -1 : 1) : apti_compare_item_names(arg, a, b);
}

static int64_t apti_item_bytes(const apti_tensor_item *item)
{
    int64_t count = 0, bytes = 0;
    if (item->dims < 0 || item->dims > APTI_TENSOR_DIMS || !apti_shape_count(item->shape, item->dims, &count)) return -1;
    return apti_mul(count, apti_dtype_bytes(item->dtype), &bytes) ? bytes : -1;
}

/* order: items in file order. */
static apt_result apti_job_order(apti_writer *w, const apti_tensor_job *job, int32_t *order)
{
    int64_t total = 0;
    for (int32_t i = 0; i < job->count; i++) {
        order[i] = i;
        if (!apti_add(total, apti_item_bytes(&job->items[i]), &total))
            return apti_fail(w->ctx, APT_E_SHAPE, "'%.600s': tensor '%s': the size of shape %s overflows", job->path,
                             apti_show(job->items[i].name).text, apti_show_shape(job->items[i].shape, job->items[i].dims).text);
    }
    apti_sort_indices(order, job->count, apti_compare_item_names, job->items);
    for (int32_t i = 1; i < job->count; i++)
        if (apti_compare_item_names(job->items, order[i - 1], order[i]) == 0)
            return apti_fail(w->ctx, APT_E_ARGUMENT, "'%.600s': two tensors are named '%s'", job->path,
                             apti_show(job->items[order[i]].name).text);
    for (int32_t i = 0; i < job->count; i++) order[i] = i;
    apti_sort_indices(order, job->sums != NULL ? job->count - 1 : job->count, apti_compare_items, job->items);
    return APT_OK;
}

static void apti_job_entry(apti_json_out *out, const apti_tensor_item *item, int64_t begin)
{
    apti_json_key(out, item->name);
    apti_json_open(out, '{');
    apti_json_key(out, "dtype");
    apti_json_put_string(out, apti_dtype_name(item->dtype));
    apti_json_key(out, "shape");
    apti_json_open(out, '[');
    for (int32_t i = 0; i < item->dims; i++) apti_json_put_int(out, item->shape[i]);
    apti_json_close(out);
    apti_json_key(out, "data_offsets");
    apti_json_open(out, '[');
    apti_json_put_int(out, begin);
    apti_json_put_int(out, begin + apti_item_bytes(item));
    apti_json_close(out);
    apti_json_close(out);
}

/* The header, padded with spaces so that the data begin at a multiple of 8. */
static apt_result apti_job_header(apti_writer *w, const apti_tensor_job *job, const int32_t *order)
{
    apti_json_out out;
    const char *text = NULL;
    int64_t bytes = 0, at = 0;
    apti_json_begin(&out, w->ctx, 0);
    apti_json_open(&out, '{');
    if (job->meta_count > 0) {
        apti_json_key(&out, "__metadata__");
        apti_json_open(&out, '{');
        for (int32_t i = 0; i < job->meta_count; i++) {
            apti_json_key(&out, job->meta[i].key);
            apti_json_put_string(&out, job->meta[i].value);
        }
        apti_json_close(&out);
    }
    for (int32_t i = 0; i < job->count; i++) {
        apti_job_entry(&out, &job->items[order[i]], at);
        at += apti_item_bytes(&job->items[order[i]]);
    }
    apti_json_close(&out);
    apti_json_raw(&out, "        ", (8 - out.bytes % 8) % 8);
    apt_result result = apti_json_end(&out, &text, &bytes);
    if (result == APT_OK && bytes > APTI_HEADER_BYTES)
        result = apti_fail(w->ctx, APT_E_RANGE, "'%.600s': header of %lld bytes, at most %d are allowed", job->path,
                           (long long)bytes, (int)APTI_HEADER_BYTES);
    const uint64_t length = (uint64_t)bytes;
    if (result == APT_OK) result = apti_write(w, &length, 8);
    if (result == APT_OK) result = apti_write(w, text, bytes);
    if (result == APT_OK && job->sums != NULL) job->sums[0] = apti_checksum(apti_checksum(0, &length, 8), text, (size_t)bytes);
    apti_json_drop(&out);
    return result;
}

static apt_result apti_job_data(apti_writer *w, const apti_tensor_job *job, const int32_t *order)
{
    int64_t most = 0;
    apt_result result = APT_OK;
    for (int32_t i = 0; i < job->count; i++)
        if (job->items[i].data == NULL) most = apti_max_i64(most, apti_item_bytes(&job->items[i]));
    void *buffer = apti_alloc(w->ctx, most, 1);
    if (buffer == NULL)
        return apti_fail(w->ctx, APT_E_MEMORY, "'%.600s': no memory for a tensor of %lld bytes", job->path, (long long)most);
    for (int32_t i = 0; i < job->count && result == APT_OK; i++) {
        const apti_tensor_item *item = &job->items[order[i]];
        const int64_t bytes = apti_item_bytes(item);
        const void *data = item->data;
        if (bytes == 0) continue;
        if (data == NULL) {
            result = job->fill(job->user, order[i], buffer);
            data = buffer;
        }
        if (result == APT_OK && job->sums != NULL && i + 1 < job->count) job->sums[1 + i] = apti_checksum(0, data, (size_t)bytes);
        if (result == APT_OK) result = apti_write(w, data, bytes);
    }
    apti_free(w->ctx, buffer);
    return result;
}

/* Writes a whole file into an open writer; the caller commits or aborts. */
static apt_result apti_tensors_emit(apti_writer *w, const apti_tensor_job *job)
{
    int32_t *order = (int32_t *)apti_alloc(w->ctx, job->count, (int64_t)sizeof(int32_t));
    if (order == NULL) return apti_fail(w->ctx, APT_E_MEMORY, "'%.600s': no memory for %d tensors", job->path, (int)job->count);
    apt_result result = apti_job_order(w, job, order);
    if (result == APT_OK) result = apti_job_header(w, job, order);
    if (result == APT_OK) result = apti_job_data(w, job, order);
    apti_free(w->ctx, order);
    return result;
}

static apt_result apti_tensors_write(apt_ctx *ctx, const apti_tensor_job *job, int64_t *bytes)
{
    apti_writer w;
    apt_result result = apti_write_begin(ctx, job->path, &w);
    if (result != APT_OK) return result;
    result = apti_tensors_emit(&w, job);
    if (result == APT_OK && bytes != NULL) *bytes = w.bytes;
    if (result == APT_OK) return apti_write_commit(&w);
    apti_write_abort(&w);
    return result;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Checkpoint container: a safetensors file whose last tensor holds one 64-bit checksum of everything before the data and
   one per tensor, in file order. Opening one verifies them all.
   ------------------------------------------------------------------------------------------------------------------ */

#define APTI_CKPT_VERSION "2"         /* counts up when the contents change; files of another one are refused */
#define APTI_CKPT_SUMS "apt.checksums"

typedef struct apti_ckpt_entry {
    char *name;
    void *copy;                                  /* owned data, or NULL */
    apti_tensor_fill fill;
    void *user;
    int64_t index;
} apti_ckpt_entry;

typedef struct apti_ckpt_writer {
    apt_ctx *ctx;
    apti_ckpt_entry *entries;
    apti_tensor_item *items;                     /* of the same length; one place is kept free for the checksums */
    int32_t count, capacity;
    apt_result result;                           /* first failure */
} apti_ckpt_writer;

static apt_result apti_ckpt_begin(apt_ctx *ctx, apti_ckpt_writer **out)
{
    apti_ckpt_writer *w = (apti_ckpt_writer *)apti_calloc(ctx, 1, (int64_t)sizeof(apti_ckpt_writer));
    if (w == NULL) return apti_fail(ctx, APT_E_MEMORY, "no memory to write a checkpoint");
    w->ctx = ctx;
    *out = w;
    return APT_OK;
}

/* Ends a writer without a file. NULL is allowed. */
static void apti_ckpt_abort(apti_ckpt_writer *w)
{
    if (w == NULL) return;
    for (int32_t i = 0; i < w->count; i++) {
        apti_free(w->ctx, w->entries[i].name);
        apti_free(w->ctx, w->entries[i].copy);
    }
    apti_free(w->ctx, w->entries);
    apti_free(w->ctx, w->items);
    apti_free(w->ctx, w);
}

static bool apti_ckpt_reserve(apti_ckpt_writer *w)
{
    if (w->count + 1 < w->capacity) return true;
    const int64_t capacity = 64 + 2 * (int64_t)w->capacity;
    apti_ckpt_entry *entries = NULL;
    apti_tensor_item *items = NULL;
    if (capacity <= INT32_MAX) {
        entries = (apti_ckpt_entry *)apti_calloc(w->ctx, capacity, (int64_t)sizeof(apti_ckpt_entry));
        items = (apti_tensor_item *)apti_calloc(w->ctx, capacity, (int64_t)sizeof(apti_tensor_item));
    }
    if (entries == NULL || items == NULL) {
        apti_free(w->ctx, entries);
        apti_free(w->ctx, items);
        return false;
    }
    if (w->count > 0) memcpy(entries, w->entries, (size_t)w->count * sizeof(apti_ckpt_entry));
    if (w->count > 0) memcpy(items, w->items, (size_t)w->count * sizeof(apti_tensor_item));
    apti_free(w->ctx, w->entries);
    apti_free(w->ctx, w->items);
    w->entries = entries;
    w->items = items;
    w->capacity = (int32_t)capacity;
    return true;
}

/* Makes the next entry; NULL with w->result set on failure. */
static apti_ckpt_entry *apti_ckpt_add(apti_ckpt_writer *w, const char *name, apt_dtype dtype, int32_t dims, const int64_t *shape)
{
    if (w->result != APT_OK) return NULL;
    if (dims < 0 || dims > APTI_TENSOR_DIMS || strcmp(name, APTI_CKPT_SUMS) == 0) {
        w->result = apti_fail(w->ctx, APT_E_ARGUMENT, "checkpoint: tensor '%s' of %d dimensions cannot be written", name,
                              (int)dims);
        return NULL;
    }
    char *copy = apti_ckpt_reserve(w) ? apti_copy_text(w->ctx, name) : NULL;
    if (copy == NULL) {
        w->result = apti_fail(w->ctx, APT_E_MEMORY, "checkpoint: no memory for tensor '%s'", name);
        return NULL;
    }
    apti_tensor_item *item = &w->items[w->count];
    apti_ckpt_entry *entry = &w->entries[w->count++];
    item->name = entry->name = copy;
    item->dtype = dtype;
    item->dims = dims;
    for (int32_t i = 0; i < dims; i++) item->shape[i] = shape[i];
    return entry;
}

/* Adds a tensor whose bytes stay the caller's and unchanged until apti_ckpt_finish. dims 0: a scalar, shape may be NULL.
   The first failure sticks and apti_ckpt_finish returns it. */
static apt_result apti_ckpt_put(apti_ckpt_writer *w, const char *name, apt_dtype dtype, int32_t dims, const int64_t *shape,
                                const void *data)
{
    if (apti_ckpt_add(w, name, dtype, dims, shape) == NULL) return w->result;
    w->items[w->count - 1].data = data;
    if (data == NULL && apti_item_bytes(&w->items[w->count - 1]) != 0)
        w->result = apti_fail(w->ctx, APT_E_ARGUMENT, "checkpoint: tensor '%s' has no data", name);
    return w->result;
}

/* The same with a copy of the bytes. */
static apt_result apti_ckpt_put_copy(apti_ckpt_writer *w, const char *name, apt_dtype dtype, int32_t dims, const int64_t *shape,
                                     const void *data)
{
    apti_ckpt_entry *entry = apti_ckpt_add(w, name, dtype, dims, shape);
    if (entry == NULL) return w->result;
    const int64_t bytes = apti_item_bytes(&w->items[w->count - 1]);
    entry->copy = bytes >= 0 ? apti_alloc(w->ctx, bytes, 1) : NULL;
    if (entry->copy == NULL)
        return w->result = apti_fail(w->ctx, APT_E_MEMORY, "checkpoint: no memory for a copy of tensor '%s'", name);
    if (bytes > 0) memcpy(entry->copy, data, (size_t)bytes);
    w->items[w->count - 1].data = entry->copy;
    return APT_OK;
}

/* The same; fill(user, index, out) is asked once for all bytes while the file is written (not when there are none). */
static apt_result apti_ckpt_put_fill(apti_ckpt_writer *w, const char *name, apt_dtype dtype, int32_t dims, const int64_t *shape,
                                     apti_tensor_fill fill, void *user, int64_t index)
{
    apti_ckpt_entry *entry = apti_ckpt_add(w, name, dtype, dims, shape);
    if (entry == NULL) return w->result;
    entry->fill = fill;
    entry->user = user;
    entry->index = index;
    return APT_OK;
}

static apt_result apti_ckpt_fill(void *user, int64_t index, void *out)
{
    const apti_ckpt_entry *entry = &((const apti_ckpt_writer *)user)->entries[index];
    return entry->fill(entry->user, entry->index, out);
}

static apt_result apti_ckpt_write(apti_ckpt_writer *w, const char *path)
{
    const apti_meta meta[2] = {{"format", "apt-checkpoint"}, {"version", APTI_CKPT_VERSION}};
    uint64_t *sums = apti_ckpt_reserve(w) ? (uint64_t *)apti_calloc(w->ctx, (int64_t)w->count + 1, 8) : NULL;
    if (sums == NULL) return apti_fail(w->ctx, APT_E_MEMORY, "'%.600s': no memory for %d checksums", path, (int)w->count + 1);
    apti_tensor_item *table = &w->items[w->count];
    table->name = APTI_CKPT_SUMS;
    table->dtype = APT_U8;
    table->dims = 1;
    table->shape[0] = 8 * ((int64_t)w->count + 1);
    table->data = sums;
    apti_tensor_job job;
    memset(&job, 0, sizeof job);
    job.path = path;
    job.items = w->items;
    job.count = w->count + 1;
    job.meta = meta;
    job.meta_count = 2;
    job.fill = apti_ckpt_fill;
    job.user = w;
    job.sums = sums;
    const apt_result result = apti_tensors_write(w->ctx, &job, NULL);
    apti_free(w->ctx, sums);
    return result;
}

/* Writes the file at once and whole, or not at all; frees the writer in either case. */
static apt_result apti_ckpt_finish(apti_ckpt_writer *w, const char *path)
{
    apt_result result = w->result;
    if (result == APT_OK) result = apti_ckpt_write(w, path);
    apti_ckpt_abort(w);
    return result;
}

typedef struct apti_tensors apti_ckpt_reader;

static void apti_ckpt_close(apti_ckpt_reader *r)
{
    apti_tensors_close(r);
}

static bool apti_ckpt_has(const apti_ckpt_reader *r, const char *name)
{
    return apti_tensors_find(r, name) != NULL;
}

static apt_result apti_ckpt_check_sum(const apti_ckpt_reader *r, const uint8_t *table, int64_t index, const void *data,
                                      int64_t bytes, const char *what)
{
    uint64_t expected = 0;
    memcpy(&expected, table + 8 * index, 8);
    const uint64_t found = apti_checksum(0, data, (size_t)bytes);
    if (found == expected) return APT_OK;
    return apti_fail(r->ctx, APT_E_CHECKSUM, "'%.600s': '%s' has checksum %016llx, expected %016llx", r->path,
                     apti_show(what).text, (unsigned long long)found, (unsigned long long)expected);
}

/* order: all views by their place in the file; the last one is the table. */
static apt_result apti_ckpt_verify(const apti_ckpt_reader *r, const int32_t *order)
{
    const uint8_t *file = r->files[0].map.data;
    const apti_tensor_view *table = apti_tensors_find(r, APTI_CKPT_SUMS);
    if (table == NULL) return apti_fail(r->ctx, APT_E_MISSING, "'%.600s': no tensor '%s'", r->path, APTI_CKPT_SUMS);
    if (table != &r->views[order[r->count - 1]] || table->dtype != APT_U8 || table->bytes != 8 * (int64_t)r->count)
        return apti_fail(r->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' is not the last one with %d checksums", r->path,
                         APTI_CKPT_SUMS, (int)r->count);
    const uint8_t *data = r->views[order[0]].data;
    apt_result result = apti_ckpt_check_sum(r, table->data, 0, file, data - file, "header");
    for (int32_t i = 0; i + 1 < r->count && result == APT_OK; i++) {
        const apti_tensor_view *view = &r->views[order[i]];
        result = apti_ckpt_check_sum(r, table->data, 1 + i, view->data, view->bytes, view->name);
    }
    return result;
}

static apt_result apti_ckpt_accept(const apti_ckpt_reader *r)
{
    const char *format = apti_tensors_meta(r, "format"), *version = apti_tensors_meta(r, "version");
    if (format == NULL || strcmp(format, "apt-checkpoint") != 0)
        return apti_fail(r->ctx, APT_E_FORMAT,
                         "'%.600s' is not a checkpoint: metadata format is \"%s\", expected \"apt-checkpoint\"", r->path,
                         apti_show(format != NULL ? format : "").text);
    if (version == NULL || strcmp(version, APTI_CKPT_VERSION) != 0)
        return apti_fail(r->ctx, APT_E_UNSUPPORTED, "'%.600s': checkpoint version \"%s\", expected \"%s\"", r->path,
                         apti_show(version != NULL ? version : "").text, APTI_CKPT_VERSION);
    int32_t *order = (int32_t *)apti_alloc(r->ctx, apti_max_i64(r->count, 1), (int64_t)sizeof(int32_t));
    if (order == NULL) return apti_fail(r->ctx, APT_E_MEMORY, "'%.600s': no memory for %d tensors", r->path, (int)r->count);
    for (int32_t i = 0; i < r->count; i++) order[i] = i;
    apti_sort_indices(order, r->count, apti_compare_places, r->views);
    const apt_result result = apti_ckpt_verify(r, order);
    apti_free(r->ctx, order);
    return result;
}

/* On success every checksum was right. */
static apt_result apti_ckpt_open(apt_ctx *ctx, const char *path, apti_ckpt_reader **out)
{
    apti_tensors *set = NULL;
    apt_result result = apti_tensors_open_file(ctx, path, &set);
    if (result != APT_OK) return result;
    result = apti_ckpt_accept(set);
    if (result == APT_OK) *out = set;
    else apti_tensors_close(set);
    return result;
}

/* *data: the tensor's bytes in the mapped file, aligned for its type, valid until apti_ckpt_close. count -1: any number
   of values; *found (may be NULL) tells how many there are. */
static apt_result apti_ckpt_find(const apti_ckpt_reader *r, const char *name, apt_dtype dtype, int64_t count, const void **data,
                                 int64_t *found)
{
    const apti_tensor_view *view = apti_tensors_find(r, name);
    if (view == NULL) return apti_fail(r->ctx, APT_E_MISSING, "'%.600s': no tensor '%s'", r->path, apti_show(name).text);
    const int64_t size = apti_dtype_bytes(view->dtype), n = view->bytes / size;
    if (view->dtype != dtype || (count >= 0 && n != count))
        return apti_fail(r->ctx, APT_E_SHAPE, "'%.600s': tensor '%s' holds %lld values of %s, expected %lld of %s", r->path,
                         apti_show(name).text, (long long)n, apti_dtype_name(view->dtype), (long long)(count >= 0 ? count : n),
                         apti_dtype_name(dtype));
    if ((uintptr_t)view->data % (uintptr_t)size != 0)
        return apti_fail(r->ctx, APT_E_FORMAT, "'%.600s': tensor '%s' is not aligned to %d bytes", r->path, apti_show(name).text,
                         (int)size);
    *data = view->data;
    if (found != NULL) *found = n;
    return APT_OK;
}

/* ---------------------------------------------------------------------------------------------------------------------
   Compressed matrices: a U8 tensor "NAME.sparse" instead of NAME. In it, little endian: rows and columns (int32), ceil(cols/8)
   bytes of mask for each row, zeros up to a multiple of 4, one float32 for each bit that is set. One form only is
   accepted: no bit behind the last column, no value that is +0 or not finite, not a byte more.
   ------------------------------------------------------------------------------------------------------------------ */

#define APTI_SPARSE_SUFFIX ".sparse"
#define APTI_SPARSE_HEAD 8

typedef struct apti_sparse_view {
    int32_t rows, cols;
    int64_t row_bytes, count;
    const uint8_t *mask, *values;                /* any alignment */
} apti_sparse_view;

static bool apti_ends_with(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static bool apti_is_sparse_name(const char *name)
{
    return apti_ends_with(name, APTI_SPARSE_SUFFIX);
}

static int64_t apti_sparse_mask_bytes(int64_t rows, int64_t cols)
{
    return apti_round_up(rows * apti_ceil_div(cols, 8), 4);
}

/* Bits of a row, which must have none behind the last column; -1: it has. */
static int64_t apti_sparse_row_bits(const uint8_t *mask, int32_t cols)
{
    int64_t count = 0;
    if (cols % 8 != 0 && mask[cols / 8] >> cols % 8 != 0) return -1;
    for (int64_t i = 0; i < apti_ceil_div(cols, 8); i++) count += apti_popcount(mask[i]);
    return count;
}

/* Mask and values of a tensor whose shape is known; NULL when all is well, else what is not. */
static const char *apti_sparse_parse(const apti_tensor_view *view, apti_sparse_view *v)
{
    if (v->rows < 0 || v->cols < 0 || (v->cols == 0 && v->rows > 0)) return "has an impossible shape";
    const int64_t mask = apti_sparse_mask_bytes(v->rows, v->cols), rest = view->bytes - APTI_SPARSE_HEAD;
    if (mask > rest) return "is too short for its mask";
    v->row_bytes = apti_ceil_div(v->cols, 8);
    v->mask = view->data + APTI_SPARSE_HEAD;
    v->values = v->mask + mask;
    for (int64_t i = 0; i < v->rows; i++) {
        const int64_t bits = apti_sparse_row_bits(v->mask + i * v->row_bytes, v->cols);
        if (bits < 0) return "has bits behind its last column";
        v->count += bits;
    }
    for (int64_t i = v->rows * v->row_bytes; i < mask; i++)
        if (v->mask[i] != 0) return "has something between mask and values";
    if (rest - mask != 4 * v->count) return "has not as many values as bits";
    for (int64_t i = 0; i < v->count; i++) {
        float x;
        memcpy(&x, v->values + 4 * i, 4);
        if (apti_bits(x) == 0 || !apti_finite(x)) return "holds a value that is +0, NaN or infinite";
    }
    return NULL;
}

/* Checks every byte of a tensor. */
static apt_result apti_sparse_open(apt_ctx *ctx, const char *path, const apti_tensor_view *view, apti_sparse_view *out)
{
    const char *what = "is no list of U8 with a shape in front";
    int32_t shape[2] = {0, 0};
    memset(out, 0, sizeof *out);
    if (view->dtype == APT_U8 && view->dims == 1 && view->bytes >= APTI_SPARSE_HEAD) {
        memcpy(shape, view->data, APTI_SPARSE_HEAD);
        out->rows = shape[0];
        out->cols = shape[1];
        what = apti_sparse_parse(view, out);
    }
    if (what == NULL) return APT_OK;
    return apti_fail(ctx, APT_E_FORMAT, "'%.600s': compressed tensor '%s' of %d x %d weights %s", path,
                     apti_show(view->name).text, (int)shape[0], (int)shape[1], what);
}

/* w(rows, cols) of a view that was opened. */
static void apti_sparse_expand(float *w, const apti_sparse_view *v)
{
    const uint8_t *value = v->values;
    for (int64_t i = 0; i < v->rows; i++) {
        const uint8_t *mask = v->mask + i * v->row_bytes;
        for (int64_t c = 0; c < v->cols; c++, w++) {
            *w = 0;
            if ((mask[c / 8] >> c % 8 & 1) == 0) continue;
            memcpy(w, value, 4);
            value += 4;
        }
    }
}

/* What apti_sparse_open reads, of a dense matrix with `count` values that are not +0. */
static void apti_sparse_encode(uint8_t *out, const float *w, int64_t rows, int64_t cols)
{
    const int32_t shape[2] = {(int32_t)rows, (int32_t)cols};
    const int64_t row_bytes = apti_ceil_div(cols, 8), bytes = apti_sparse_mask_bytes(rows, cols);
    uint8_t *mask = out + APTI_SPARSE_HEAD, *value = mask + bytes;
    memcpy(out, shape, APTI_SPARSE_HEAD);
    memset(mask, 0, (size_t)bytes);
    for (int64_t i = 0; i < rows; i++, mask += row_bytes) {
        for (int64_t c = 0; c < cols; c++, w++) {
            if (apti_bits(*w) == 0) continue;
            mask[c / 8] = (uint8_t)(mask[c / 8] | 1u << c % 8);
            memcpy(value, w, 4);
            value += 4;
        }
    }
}

/* --- files of compressed matrices alone --- */

typedef struct apti_sparse_name { char text[160]; } apti_sparse_name;

typedef struct apti_sparse_saver {
    apt_ctx *ctx;
    const char *path, *const *names;
    const apt_sparse *matrix;
    float *dense;                                /* room for the largest */
} apti_sparse_saver;

static apt_result apti_sparse_fill(void *user, int64_t index, void *out)
{
    const apti_sparse_saver *s = (const apti_sparse_saver *)user;
    const apt_sparse *m = &s->matrix[index];
    (void)apt_sparse_unpack(s->dense, m->cols, m);
    if (!apti_finite_all(s->dense, m->rows * m->cols))
        return apti_fail(s->ctx, APT_E_NONFINITE, "'%.600s' is not written: %s holds NaN or infinity", s->path, s->names[index]);
    apti_sparse_encode((uint8_t *)out, s->dense, m->rows, m->cols);
    return APT_OK;
}

/* Checks the matrices; *most: weights of the largest. Values that are +0 are not written, so they do not count. */
static apt_result apti_sparse_items(const apti_sparse_saver *s, apti_tensor_item *items, apti_sparse_name *names, int32_t count,
                                    int64_t *most)
{
    *most = 0;
    for (int32_t i = 0; i < count; i++) {
        const apt_sparse *m = &s->matrix[i];
        int64_t n = 0, zeros = 0;
        apt_result r = s->names[i] != NULL ? apti_sparse_check(m, true) : APT_E_ARGUMENT;
        if (r == APT_OK) r = apti_sparse_check_bits(m);
        if (r == APT_OK && (m->rows > INT32_MAX || m->cols > INT32_MAX || !apti_mul(m->rows, m->cols, &n))) r = APT_E_RANGE;
        if (r == APT_OK && m->cols == 0 && m->rows > 0) r = APT_E_SHAPE;
        if (r != APT_OK)
            return apti_fail(s->ctx, r, "'%.600s' is not written: matrix %d (%.100s) is none", s->path, (int)i,
                             s->names[i] != NULL ? s->names[i] : "no name");
        for (int64_t k = 0; k < m->start[m->rows]; k++) zeros += apti_bits(m->values[k]) == 0;
        (void)snprintf(names[i].text, sizeof names[i].text, "%.140s%s", s->names[i], APTI_SPARSE_SUFFIX);
        items[i].name = names[i].text;
        items[i].dtype = APT_U8;
        items[i].dims = 1;
        items[i].shape[0] = apt_sparse_bytes(m->rows, m->cols, m->start[m->rows] - zeros);
        *most = apti_max_i64(*most, n);
    }
    return APT_OK;
}

APT_API apt_result apt_sparse_save(apt_ctx *ctx, const char *path, const char *const *names, const apt_sparse *matrix,
                                   int32_t count, int64_t *bytes)
{
    const apti_meta meta[1] = {{"format", "apt-sparse"}};
    apti_sparse_saver s = {ctx, path, names, matrix, NULL};
    int64_t most = 0;
    if (ctx == NULL) return APT_E_ARGUMENT;
    if (path == NULL || count < 0 || (count > 0 && (names == NULL || matrix == NULL)))
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_sparse_save: path, names or matrices are missing");
    apti_tensor_item *items = (apti_tensor_item *)apti_calloc(ctx, count, (int64_t)sizeof(apti_tensor_item));
    apti_sparse_name *keys = (apti_sparse_name *)apti_calloc(ctx, count, (int64_t)sizeof(apti_sparse_name));
    apt_result r = APT_OK;
    if (items == NULL || keys == NULL) r = apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for %d matrices", path, (int)count);
    if (r == APT_OK) r = apti_sparse_items(&s, items, keys, count, &most);
    if (r == APT_OK) {
        s.dense = (float *)apti_alloc(ctx, most, (int64_t)sizeof(float));
        if (s.dense == NULL) r = apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for %lld weights", path, (long long)most);
    }
    if (r == APT_OK) {
        const apti_tensor_job job = {path, items, count, meta, 1, apti_sparse_fill, &s, NULL};
        r = apti_tensors_write(ctx, &job, bytes);
    }
    apti_free(ctx, items);
    apti_free(ctx, keys);
    apti_free(ctx, s.dense);
    return r;
}

static void apti_sparse_copy(apt_sparse *out, const apti_sparse_view *v)
{
    const int64_t words = apt_bitmask_words(v->cols);
    for (int64_t i = 0; i < v->rows; i++) {
        const uint8_t *mask = v->mask + i * v->row_bytes;
        for (int64_t b = 0; b < v->row_bytes; b++) out->bits[i * words + b / 8] |= (uint64_t)mask[b] << 8 * (b % 8);
        out->start[i + 1] = out->start[i] + apti_sparse_row_bits(mask, v->cols);
    }
    if (v->count > 0) memcpy(out->values, v->values, (size_t)v->count * sizeof(float));
}

APT_API apt_result apt_sparse_load(apt_ctx *ctx, const char *path, const char *name, apt_sparse *sparse)
{
    apti_tensors *set = NULL;
    apti_sparse_view view;
    char key[160];
    if (ctx == NULL) return APT_E_ARGUMENT;
    if (path == NULL || name == NULL || sparse == NULL)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_sparse_load: path, name or sparse is NULL");
    apt_result r = apti_tensors_open_file(ctx, path, &set);
    if (r != APT_OK) return r;
    (void)snprintf(key, sizeof key, "%.140s%s", name, APTI_SPARSE_SUFFIX);
    const apti_tensor_view *tensor = apti_tensors_find(set, key);
    if (tensor == NULL) r = apti_fail(ctx, APT_E_MISSING, "'%.600s': no tensor '%s'", path, apti_show(key).text);
    if (r == APT_OK) r = apti_sparse_open(ctx, path, tensor, &view);
    if (r == APT_OK) r = apti_sparse_reserve(ctx, sparse, view.rows, view.cols, view.count);
    if (r == APT_OK) apti_sparse_copy(sparse, &view);
    apti_tensors_close(set);
    return r;
}

/* ---------------------------------------------------------------------------------------------------------------------
   config.json. Keys that change what a model computes are read or refused; keys that only concern training elsewhere
   (dropout, caches, label names) are ignored. null counts as absent. A pruned model carries one object more:
   "apt": {"version": 1, "head_dim": 32, "hidden_size_dense": 384, "layers": [{"heads": 5, "neurons": 300}, ...]}
   T5 has "bias_heads" beside them and "bias_head" in each layer: the relative position bias of every head that is left.
   ------------------------------------------------------------------------------------------------------------------ */

enum { APTI_CONFIG_BYTES = 1 << 24 };

typedef enum apti_problem {
    APTI_PROBLEM_NONE = 0,
    APTI_PROBLEM_SINGLE,
    APTI_PROBLEM_REGRESSION,
    APTI_PROBLEM_MULTI
} apti_problem;

typedef struct apti_model_file {
    apt_config config;                           /* config.task: what "architectures" says; CLASSIFY also for regression */
    apt_layer_shape *layer;                      /* a block, or NULL for equal layers; config.layer is the same */
    int32_t labels;                              /* 0: the file does not say */
    apti_problem problem;
    bool untied;                                 /* tie_word_embeddings is false */
    bool either;                                 /* T5: untied if the files hold an lm_head */
    int32_t *bias_head;                          /* a block, or NULL; config.bias_head is the same */
} apti_model_file;

typedef struct apti_config_reader {
    apt_ctx *ctx;
    const char *path;
    const apti_json *json;
    int32_t object;                              /* where keys are looked up */
    char scope[32];                              /* its name in messages: "", "apt.", "apt.layers[3]." */
    apt_result result;                           /* first failure; all later readings are skipped */
} apti_config_reader;

/* -1: absent, null, or a failure came before. */
static int32_t apti_config_find(const apti_config_reader *r, const char *key)
{
    const int32_t node = r->result == APT_OK ? apti_json_find(r->json, r->object, key) : -1;
    return node >= 0 && r->json->nodes[node].kind != APTI_JSON_NULL ? node : -1;
}

static void apti_config_refuse(apti_config_reader *r, apt_result result, const char *key, int32_t node, const char *expected)
{
    if (r->result != APT_OK) return;
    r->result = apti_fail(r->ctx, result, "'%.600s': \"%s%s\" is %s, expected %s", r->path, r->scope, key,
                          node >= 0 ? apti_json_show(r->json, node).text : "missing", expected);
}

/* fallback < low: the key is required. */
static int32_t apti_config_int(apti_config_reader *r, const char *key, int32_t low, int32_t high, int32_t fallback)
{
    char expected[64];
    int64_t value = fallback;
    const int32_t node = apti_config_find(r, key);
    (void)snprintf(expected, sizeof expected, "an integer in %d..%d", (int)low, (int)high);
    if (node < 0 && fallback < low) apti_config_refuse(r, APT_E_MISSING, key, node, expected);
    if (node < 0) return fallback;
    if (!apti_json_int(r->json, node, &value)) apti_config_refuse(r, APT_E_FORMAT, key, node, expected);
    else if (value < low || value > high) apti_config_refuse(r, APT_E_RANGE, key, node, expected);
    return r->result == APT_OK ? (int32_t)value : fallback;
}

static float apti_config_float(apti_config_reader *r, const char *key, double low, double high, float fallback)
{
    char expected[64];
    double value = 0;
    const int32_t node = apti_config_find(r, key);
    if (node < 0) return fallback;
    (void)snprintf(expected, sizeof expected, "a number in %g..%g", low, high);
    if (!apti_json_double(r->json, node, &value)) apti_config_refuse(r, APT_E_FORMAT, key, node, expected);
    else if (value < low || value > high) apti_config_refuse(r, APT_E_RANGE, key, node, expected);
    return r->result == APT_OK ? (float)value : fallback;
}

static bool apti_config_bool(apti_config_reader *r, const char *key, bool fallback)
{
    bool value = fallback;
    const int32_t node = apti_config_find(r, key);
    if (node >= 0 && !apti_json_bool(r->json, node, &value)) apti_config_refuse(r, APT_E_FORMAT, key, node, "true or false");
    return value;
}

/* Position of the string in `names` ("a|b|c"); -1: absent. Anything else is refused. */
static int32_t apti_config_choice(apti_config_reader *r, const char *key, const char *names)
{
    char name[64];
    int32_t index = 0;
    const int32_t node = apti_config_find(r, key);
    if (node < 0) return -1;
    for (const char *p = names; *p != 0; index++) {
        const size_t n = strcspn(p, "|");
        (void)snprintf(name, sizeof name, "%.*s", (int)n, p);
        if (apti_json_is(r->json, node, name)) return index;
        p += p[n] == '|' ? n + 1 : n;
    }
    const bool text = r->json->nodes[node].kind == APTI_JSON_STRING;
    apti_config_refuse(r, text ? APT_E_UNSUPPORTED : APT_E_FORMAT, key, node, names);
    return -1;
}

/* The key, if it is there, must say what is computed here. */
static void apti_config_expect(apti_config_reader *r, const char *key, bool value)
{
    if (apti_config_bool(r, key, value) != value)
        apti_config_refuse(r, APT_E_UNSUPPORTED, key, apti_config_find(r, key), value ? "true" : "false");
}

static void apti_config_refuse_true(apti_config_reader *r, const char *key)
{
    apti_config_expect(r, key, false);
}

/* The family, and what would make the file mean something else than what this library computes. */
static apt_family apti_config_family(apti_config_reader *r)
{
    static const apt_family families[] = {APT_BERT, APT_ROBERTA, APT_T5, APT_LLAMA, APT_LLAMA};
    const char *names = "bert|roberta|t5|llama|qwen2";
    const int32_t family = apti_config_choice(r, "model_type", names);
    if (family < 0) apti_config_refuse(r, APT_E_MISSING, "model_type", -1, names);
    (void)apti_config_choice(r, "position_embedding_type", "absolute");
    (void)apti_config_choice(r, "torch_dtype", "float32|float16|bfloat16|float64");
    (void)apti_config_choice(r, "dtype", "float32|float16|bfloat16|float64");
    apti_config_refuse_true(r, "is_decoder");
    if (family >= 0) apti_config_expect(r, "is_encoder_decoder", families[family] == APT_T5);
    apti_config_refuse_true(r, "add_cross_attention");
    int32_t node = apti_config_find(r, "quantization_config");
    if (node >= 0) apti_config_refuse(r, APT_E_UNSUPPORTED, "quantization_config", node, "plain weights");
    node = apti_config_find(r, "pruned_heads");
    if (node >= 0 && r->json->nodes[node].count > 0) apti_config_refuse(r, APT_E_UNSUPPORTED, "pruned_heads", node, "none");
    return family < 0 ? APT_BERT : families[family];
}

/* T5: a decoder layer counts as two (apt_config.decoder_layers). */
static void apti_config_t5(apti_config_reader *r, apti_model_file *file)
{
    static const apt_activation kinds[] = {APT_RELU, APT_GELU_TANH, APT_GELU_TANH, APT_SILU, APT_RELU};
    static const char *const names[] = {"relu", "gelu_new", "gelu_new", "silu", "relu"};
    apt_config *c = &file->config;
    const int32_t table = 1 << 24;
    const int32_t ffn = apti_config_choice(r, "feed_forward_proj", "relu|gated-gelu|gated-gelu_new|gated-silu|gated-relu");
    c->activation = kinds[ffn < 0 ? 0 : ffn];
    c->gated = ffn > 0;
    (void)apti_config_choice(r, "dense_act_fn", names[ffn < 0 ? 0 : ffn]);        /* both follow from feed_forward_proj */
    apti_config_expect(r, "is_gated_act", c->gated != 0);
    c->vocab = apti_config_int(r, "vocab_size", 1, table, -1);
    c->hidden = c->hidden_dense = apti_config_int(r, "d_model", 1, 65536, -1);
    c->head_dim = apti_config_int(r, "d_kv", 1, 256, -1);
    c->heads = apti_config_int(r, "num_heads", 1, 4096, -1);
    c->neurons = apti_config_int(r, "d_ff", 1, 1048576, -1);
    const int32_t encoder = apti_config_int(r, "num_layers", 1, 340, -1);
    c->decoder_layers = apti_config_int(r, "num_decoder_layers", 1, 340, encoder > 0 ? encoder : 1);
    c->layers = encoder + 2 * c->decoder_layers;
    c->buckets = apti_config_int(r, "relative_attention_num_buckets", 4, 4096, 32);
    c->max_distance = apti_config_int(r, "relative_attention_max_distance", 1, 65536, 128);
    if (c->max_distance <= c->buckets / 2)
        apti_config_refuse(r, APT_E_RANGE, "relative_attention_max_distance",
                           apti_config_find(r, "relative_attention_max_distance"), "more than half of the buckets");
    const int32_t top = c->vocab > 0 ? c->vocab - 1 : table;
    c->pad_id = apti_config_int(r, "pad_token_id", 0, top, 0);
    c->start_id = apti_config_int(r, "decoder_start_token_id", 0, top, c->pad_id);
    c->end_id = apti_config_int(r, "eos_token_id", 0, table, 1);
    c->norm_eps = apti_config_float(r, "layer_norm_epsilon", 1e-30, 1.0, 1e-6f);
    c->init_range = apti_config_float(r, "initializer_factor", 0.0, 100.0, 1.0f);
    const bool tied = apti_config_bool(r, "tie_word_embeddings", true);
    c->untied = !tied;
    c->scaled_head = apti_config_bool(r, "scale_decoder_outputs", tied);
    file->either = tied && !c->scaled_head;      /* newer files say "tied" of the two stacks' embeddings */
    c->bias_heads = c->heads;
    c->types = 1;
    c->positions = table;
}

/* Every pair of a head turns. */
static void apti_config_whole_heads(apti_config_reader *r)
{
    if (apti_config_float(r, "partial_rotary_factor", 0, 1e6, 1.0f) != 1.0f)
        apti_config_refuse(r, APT_E_UNSUPPORTED, "partial_rotary_factor", apti_config_find(r, "partial_rotary_factor"), "1");
}

/* rope_theta and rope_scaling, or both inside rope_parameters. */
static void apti_config_rope(apti_config_reader *r, apt_rope *rope, int32_t positions)
{
    const int32_t root = r->object, newer = apti_config_find(r, "rope_parameters"), older = apti_config_find(r, "rope_scaling");
    const int32_t node = newer >= 0 ? newer : older;
    rope->theta = apti_config_float(r, "rope_theta", 1e-3, 1e12, 10000.0f);
    apti_config_whole_heads(r);
    if (newer >= 0 && older >= 0) apti_config_refuse(r, APT_E_FORMAT, "rope_scaling", older, "null beside rope_parameters");
    if (node < 0) return;
    if (r->json->nodes[node].kind != APTI_JSON_OBJECT)
        apti_config_refuse(r, APT_E_FORMAT, newer >= 0 ? "rope_parameters" : "rope_scaling", node, "an object");
    if (r->result != APT_OK) return;
    r->object = node;
    (void)snprintf(r->scope, sizeof r->scope, "%s.", newer >= 0 ? "rope_parameters" : "rope_scaling");
    rope->theta = apti_config_float(r, "rope_theta", 1e-3, 1e12, rope->theta);
    apti_config_whole_heads(r);
    const int32_t kind = apti_config_choice(r, "rope_type", "default|llama3");
    const int32_t old = apti_config_choice(r, "type", "default|llama3");
    if (kind == 1 || (kind < 0 && old == 1)) {
        rope->factor = apti_config_float(r, "factor", 1e-3, 1e6, 8.0f);
        rope->low_factor = apti_config_float(r, "low_freq_factor", 1e-3, 1e6, 1.0f);
        rope->high_factor = apti_config_float(r, "high_freq_factor", 1e-3, 1e6, 4.0f);
        rope->original_positions = apti_config_int(r, "original_max_position_embeddings", 1, 1 << 24, positions);
        if (rope->high_factor <= rope->low_factor)
            apti_config_refuse(r, APT_E_RANGE, "high_freq_factor", apti_config_find(r, "high_freq_factor"),
                               "more than low_freq_factor");
    }
    r->object = root;
    r->scope[0] = 0;
}

/* The token that ends a text; newer files list several, of which the first is meant. */
static int32_t apti_config_end(apti_config_reader *r, int32_t top)
{
    int64_t value = 2;
    const int32_t node = apti_config_find(r, "eos_token_id");
    if (node < 0 || r->json->nodes[node].kind != APTI_JSON_ARRAY) return apti_config_int(r, "eos_token_id", 0, top, 2);
    if (r->json->nodes[node].count < 1 || !apti_json_int(r->json, node + 1, &value) || value < 0 || value > top)
        apti_config_refuse(r, APT_E_FORMAT, "eos_token_id", node, "token ids");
    return r->result == APT_OK ? (int32_t)value : 2;
}

/* Their dimensions turn in pairs. */
static void apti_config_even_heads(apti_config_reader *r, const apt_config *c)
{
    if (c->family == APT_LLAMA && c->head_dim % 2 != 0)
        apti_config_refuse(r, APT_E_RANGE, "head_dim", apti_config_find(r, "head_dim"), "an even number");
}

/* Newer files name the attention of every layer. */
static void apti_config_layer_types(apti_config_reader *r)
{
    const int32_t list = apti_config_find(r, "layer_types");
    if (list < 0) return;
    if (r->json->nodes[list].kind != APTI_JSON_ARRAY) apti_config_refuse(r, APT_E_FORMAT, "layer_types", list, "a list of names");
    const int32_t n = r->json->nodes[list].count;
    for (int32_t i = 0, item = list + 1; i < n && r->result == APT_OK; i++, item = r->json->nodes[item].next)
        if (!apti_json_is(r->json, item, "full_attention"))
            apti_config_refuse(r, APT_E_UNSUPPORTED, "layer_types", item, "full_attention in every layer");
}

/* LLaMA 1, 2, 3, and Qwen2, which is the same with biases on query, key and value. */
static void apti_config_llama(apti_config_reader *r, apti_model_file *file)
{
    apt_config *c = &file->config;
    const int32_t table = 1 << 24;
    const bool qwen = apti_json_is(r->json, apti_config_find(r, "model_type"), "qwen2");
    if (qwen) apti_config_refuse_true(r, "use_sliding_window");
    const int32_t window = apti_config_find(r, "sliding_window");
    if (window >= 0 && !qwen) apti_config_refuse(r, APT_E_UNSUPPORTED, "sliding_window", window, "null");
    apti_config_layer_types(r);
    (void)apti_config_choice(r, "hidden_act", "silu");
    apti_config_refuse_true(r, "attention_bias");
    apti_config_refuse_true(r, "mlp_bias");
    c->activation = APT_SILU;
    c->gated = 1;
    c->qkv_bias = qwen;
    c->vocab = apti_config_int(r, "vocab_size", 1, table, -1);
    c->positions = apti_config_int(r, "max_position_embeddings", 1, table, 2048);
    c->types = 1;
    c->hidden = c->hidden_dense = apti_config_int(r, "hidden_size", 1, 65536, -1);
    c->layers = apti_config_int(r, "num_hidden_layers", 1, 1024, -1);
    c->heads = apti_config_int(r, "num_attention_heads", 1, 4096, -1);
    c->kv_heads = apti_config_int(r, "num_key_value_heads", 1, 4096, c->heads > 0 ? c->heads : 1);
    c->head_dim = apti_config_find(r, "head_dim") >= 0 ? apti_config_int(r, "head_dim", 1, 256, -1) : 0;
    c->neurons = apti_config_int(r, "intermediate_size", 1, 1048576, -1);
    c->norm_eps = apti_config_float(r, "rms_norm_eps", 1e-30, 1.0, 1e-6f);
    c->init_range = apti_config_float(r, "initializer_range", 0.0, 100.0, 0.02f);
    c->end_id = apti_config_end(r, table);
    c->untied = !apti_config_bool(r, "tie_word_embeddings", false);
    apti_config_rope(r, &c->rope, c->positions);
    apti_config_even_heads(r, c);
    if (r->result == APT_OK && c->heads % c->kv_heads != 0)
        apti_config_refuse(r, APT_E_SHAPE, "num_key_value_heads", apti_config_find(r, "num_key_value_heads"),
                           "a divisor of num_attention_heads");
}

static void apti_config_encoder(apti_config_reader *r, apt_config *c)
{
    const int32_t table = 1 << 24;
    const int32_t activation = apti_config_choice(r, "hidden_act", "gelu|gelu_new|gelu_pytorch_tanh|relu");
    c->activation = activation == 3 ? APT_RELU : activation > 0 ? APT_GELU_TANH : APT_GELU_ERF;
    c->vocab = apti_config_int(r, "vocab_size", 1, table, -1);
    c->positions = apti_config_int(r, "max_position_embeddings", 1, table, -1);
    c->types = apti_config_int(r, "type_vocab_size", 1, table, 2);
    c->hidden = apti_config_int(r, "hidden_size", 1, 65536, -1);
    c->hidden_dense = c->hidden;
    c->layers = apti_config_int(r, "num_hidden_layers", 1, 1024, -1);
    c->heads = apti_config_int(r, "num_attention_heads", 1, 4096, -1);
    c->neurons = apti_config_int(r, "intermediate_size", 1, 1048576, -1);
    c->pad_id = apti_config_int(r, "pad_token_id", 0, table, c->family == APT_ROBERTA ? 1 : 0);
    c->norm_eps = apti_config_float(r, "layer_norm_eps", 1e-30, 1.0, 1e-12f);    /* Hugging Face's default for both families */
    c->init_range = apti_config_float(r, "initializer_range", 0.0, 100.0, 0.02f);
}

/* The classes of a classifier: num_labels, or as many as id2label names. */
static void apti_config_labels(apti_config_reader *r, apti_model_file *file)
{
    file->labels = apti_config_int(r, "num_labels", 1, 65536, 1 << 20);
    if (file->labels > 65536) file->labels = 0;
    const int32_t names = apti_config_find(r, "id2label");
    if (names < 0) return;
    const int32_t n = r->json->nodes[names].count;
    if (r->json->nodes[names].kind != APTI_JSON_OBJECT || n < 1 || n > 65536 || (file->labels > 0 && file->labels != n))
        apti_config_refuse(r, APT_E_FORMAT, "id2label", names, "an object with one name for each label");
    file->labels = n;
}

/* Heads of another kind than ours leave the task open: the caller may want the body only. */
static void apti_config_task(apti_config_reader *r, apti_model_file *file)
{
    char name[128] = "";
    const int32_t problem = apti_config_choice(r, "problem_type",
                                               "single_label_classification|regression|multi_label_classification");
    const int32_t list = apti_config_find(r, "architectures");
    file->problem = (apti_problem)(problem + 1);
    file->untied = !apti_config_bool(r, "tie_word_embeddings", true);
    if (list < 0) return;
    if (r->json->nodes[list].kind != APTI_JSON_ARRAY)
        apti_config_refuse(r, APT_E_FORMAT, "architectures", list, "a list of names");
    if (r->result != APT_OK || r->json->nodes[list].count == 0) return;
    if (r->json->nodes[list + 1].kind != APTI_JSON_STRING)
        apti_config_refuse(r, APT_E_FORMAT, "architectures", list, "a list of names");
    (void)apti_json_string(r->json, list + 1, name, (int64_t)sizeof name);
    if (apti_ends_with(name, "ForSequenceClassification")) file->config.task = APT_TASK_CLASSIFY;
    if (apti_ends_with(name, "ForQuestionAnswering")) file->config.task = APT_TASK_SPAN;
    if (apti_ends_with(name, "ForMaskedLM")) file->config.task = APT_TASK_MLM;
    if (apti_ends_with(name, "ForCausalLM") || apti_ends_with(name, "ForConditionalGeneration")) file->config.task = APT_TASK_LM;
}

/* "bias_heads": columns of the relative position tables; in every layer "bias_head": those that its heads read. */
static void apti_config_bias_heads(apti_config_reader *r, apti_model_file *file)
{
    apt_config *c = &file->config;
    const int32_t apt = r->object;
    c->bias_heads = apti_config_int(r, "bias_heads", 1, 4096, -1);
    if (r->result != APT_OK) return;
    file->bias_head = (int32_t *)apti_calloc(r->ctx, (int64_t)c->layers * c->bias_heads, (int64_t)sizeof(int32_t));
    if (file->bias_head == NULL) r->result = apti_fail(r->ctx, APT_E_MEMORY, "'%.600s': no memory for its heads", r->path);
    int32_t node = apti_config_find(r, "layers") + 1;
    for (int32_t l = 0; l < c->layers && r->result == APT_OK; l++, node = r->json->nodes[node].next) {
        (void)snprintf(r->scope, sizeof r->scope, "apt.layers[%d].", (int)l);
        r->object = node;
        const int32_t list = apti_config_find(r, "bias_head"), n = file->layer[l].heads;
        const bool fits = list >= 0 && r->json->nodes[list].kind == APTI_JSON_ARRAY && r->json->nodes[list].count == n;
        if (!fits || n > c->bias_heads) apti_config_refuse(r, APT_E_FORMAT, "bias_head", list, "one number for each head");
        for (int32_t h = 0, item = list + 1; h < n && r->result == APT_OK; h++, item = r->json->nodes[item].next) {
            int64_t value = 0;
            if (!apti_json_int(r->json, item, &value) || value < 0 || value >= c->bias_heads)
                apti_config_refuse(r, APT_E_RANGE, "bias_head", list, "numbers below bias_heads");
            else file->bias_head[(int64_t)l * c->bias_heads + h] = (int32_t)value;
        }
    }
    c->bias_head = file->bias_head;
    r->object = apt;
}

static void apti_config_layers(apti_config_reader *r, apti_model_file *file)
{
    const int32_t apt = r->object, list = apti_config_find(r, "layers");
    if (list < 0 || r->json->nodes[list].kind != APTI_JSON_ARRAY)
        apti_config_refuse(r, APT_E_FORMAT, "layers", list, "a list of objects");
    else if (r->json->nodes[list].count != file->config.layers) {
        if (r->result == APT_OK)
            r->result = apti_fail(r->ctx, APT_E_SHAPE, "'%.600s': \"apt.layers\" has %d entries, %s is %d", r->path,
                                  (int)r->json->nodes[list].count,
                                  file->config.family == APT_T5 ? "\"num_layers\" + 2 * \"num_decoder_layers\""
                                                                : "\"num_hidden_layers\"",
                                  (int)file->config.layers);
    }
    if (r->result != APT_OK) return;
    file->layer = (apt_layer_shape *)apti_calloc(r->ctx, file->config.layers, (int64_t)sizeof(apt_layer_shape));
    if (file->layer == NULL) r->result = apti_fail(r->ctx, APT_E_MEMORY, "'%.600s': no memory for its layers", r->path);
    int32_t node = list + 1;
    for (int32_t l = 0; l < file->config.layers && r->result == APT_OK; l++, node = r->json->nodes[node].next) {
        (void)snprintf(r->scope, sizeof r->scope, "apt.layers[%d].", (int)l);
        r->object = node;
        file->layer[l].heads = apti_config_int(r, "heads", 0, 4096, -1);
        file->layer[l].kv_heads = apti_config_int(r, "kv_heads", 0, 4096, file->layer[l].heads);
        file->layer[l].neurons = apti_config_int(r, "neurons", 0, 1048576, -1);
    }
    file->config.layer = file->layer;
    r->object = apt;
    r->scope[4] = 0;                                                  /* "apt." */
    if (file->config.family == APT_T5) apti_config_bias_heads(r, file);
}

/* Shapes of a pruned model. */
static void apti_config_pruned(apti_config_reader *r, int32_t apt, apti_model_file *file)
{
    if (r->json->nodes[apt].kind != APTI_JSON_OBJECT) apti_config_refuse(r, APT_E_FORMAT, "apt", apt, "an object");
    r->object = apt;
    (void)snprintf(r->scope, sizeof r->scope, "apt.");
    const int32_t version = apti_config_int(r, "version", 1, INT32_MAX, -1);
    if (version > 1) apti_config_refuse(r, APT_E_UNSUPPORTED, "version", apti_config_find(r, "version"), "1");
    file->config.head_dim = apti_config_int(r, "head_dim", 1, 256, -1);
    apti_config_even_heads(r, &file->config);
    file->config.rope.interleaved = apti_config_bool(r, "rope_interleaved", false);
    file->config.hidden_dense = apti_config_int(r, "hidden_size_dense", (int32_t)apti_max_i64(file->config.hidden, 1), 65536, -1);
    apti_config_layers(r, file);
}

static void apti_config_dense(apti_config_reader *r, apt_config *c)
{
    if (r->result != APT_OK || c->head_dim > 0) return;
    c->head_dim = c->hidden / c->heads;
    if (c->hidden % c->heads != 0)
        r->result = apti_fail(r->ctx, APT_E_SHAPE,
                              "'%.600s': \"hidden_size\" is %d, expected a multiple of \"num_attention_heads\", which is %d",
                              r->path, (int)c->hidden, (int)c->heads);
    else if (c->head_dim > 256)
        r->result = apti_fail(r->ctx, APT_E_RANGE, "'%.600s': heads of %d dimensions, at most 256 are supported", r->path,
                              (int)c->head_dim);
    else if (c->family == APT_LLAMA && c->head_dim % 2 != 0)
        r->result = apti_fail(r->ctx, APT_E_RANGE,
                              "'%.600s': \"hidden_size\" / \"num_attention_heads\" is %d, expected an even number", r->path,
                              (int)c->head_dim);
}

static void apti_model_file_free(apt_ctx *ctx, apti_model_file *file)
{
    apti_free(ctx, file->layer);
    apti_free(ctx, file->bias_head);
    file->layer = NULL;
    file->bias_head = NULL;
    file->config.layer = NULL;
    file->config.bias_head = NULL;
}

/* On failure there is nothing to free. */
static apt_result apti_config_parse(apt_ctx *ctx, const char *path, const void *text, int64_t bytes, apti_model_file *file)
{
    apti_json json;
    apti_config_reader r;
    memset(file, 0, sizeof *file);
    memset(&r, 0, sizeof r);
    r.result = apti_json_parse(ctx, path, text, bytes, &json);
    if (r.result != APT_OK) return r.result;
    r.ctx = ctx;
    r.path = path;
    r.json = &json;
    if (json.nodes[0].kind != APTI_JSON_OBJECT)
        r.result = apti_fail(ctx, APT_E_FORMAT, "'%.600s': byte 0: expected an object", path);
    file->config.family = apti_config_family(&r);
    if (file->config.family == APT_T5) apti_config_t5(&r, file);
    else if (file->config.family == APT_LLAMA) apti_config_llama(&r, file);
    else apti_config_encoder(&r, &file->config);
    apti_config_labels(&r, file);
    apti_config_task(&r, file);
    const apt_config *c = &file->config;
    if (r.result == APT_OK && c->family == APT_ROBERTA && (c->pad_id >= c->vocab || c->pad_id >= c->positions - 1))
        apti_config_refuse(&r, APT_E_RANGE, "pad_token_id", apti_config_find(&r, "pad_token_id"),
                           "less than the vocabulary and the positions");
    const int32_t apt = apti_config_find(&r, "apt");
    if (apt >= 0) apti_config_pruned(&r, apt, file);
    else apti_config_dense(&r, &file->config);
    if (r.result != APT_OK) apti_model_file_free(ctx, file);
    apti_json_free(&json);
    return r.result;
}

/* The task and its labels: what the caller wants, else what the file says. */
static apt_result apti_config_resolve(apt_ctx *ctx, const char *path, apti_model_file *file, apt_task_kind task, int32_t labels)
{
    apt_config *c = &file->config;
    const bool stated = c->task == APT_TASK_CLASSIFY;
    const bool regression = stated && (file->problem == APTI_PROBLEM_REGRESSION ||
                                       (file->problem == APTI_PROBLEM_NONE && file->labels == 1));
    if (task == APT_TASK_NONE && stated && file->problem == APTI_PROBLEM_MULTI)
        return apti_fail(
            ctx, APT_E_UNSUPPORTED,
            "'%.600s': \"problem_type\" is multi_label_classification; say which task is meant in apt_load_desc.task", path);
    if (task == APT_TASK_NONE && regression && file->labels > 1)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "'%.600s': regression with %d labels, expected 1", path, (int)file->labels);
    c->task = task != APT_TASK_NONE ? task : regression ? APT_TASK_REGRESS : c->task;
    const bool decoder = c->family == APT_T5 || c->family == APT_LLAMA;
    if (decoder && c->task == APT_TASK_NONE) c->task = APT_TASK_LM;
    if (c->task != APT_TASK_NONE && decoder != (c->task == APT_TASK_LM))
        return apti_fail(ctx, APT_E_UNSUPPORTED, "'%.600s': task %d; T5 and LLaMA have APT_TASK_LM only, encoders the others",
                         path, (int)c->task);
    if (c->task == APT_TASK_NONE)
        return apti_fail(ctx, APT_E_ARGUMENT,
                         "'%.600s': \"architectures\" names no task, and apt_load_desc.task neither", path);
    if (c->task == APT_TASK_MLM && file->untied)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "'%.600s': \"tie_word_embeddings\" is false, expected true", path);
    if (c->task == APT_TASK_CLASSIFY) c->labels = labels > 0 ? labels : stated && file->labels > 0 ? file->labels : 2;
    return APT_OK;
}

/* ---- writing */

/* A model that plain Hugging Face code can read: equal layers, nothing pruned from the hidden size. */
static bool apti_config_is_dense(const apt_config *c)
{
    const apt_layer_shape *first = &c->layer[0];
    const bool encoder = c->family == APT_BERT || c->family == APT_ROBERTA;
    bool dense = c->hidden == c->hidden_dense && first->heads > 0 && first->neurons > 0;
    if (encoder) dense = dense && (int64_t)first->heads * c->head_dim == c->hidden && first->kv_heads == first->heads;
    if (c->family == APT_T5) dense = dense && first->heads == c->bias_heads;
    if (c->rope.interleaved) dense = false;                          /* Hugging Face has no word for it */
    for (int32_t l = 0; l < c->layers; l++)
        dense = dense && c->layer[l].heads == first->heads && c->layer[l].kv_heads == first->kv_heads &&
                c->layer[l].neurons == (apti_has_ffn(c, l) ? first->neurons : 0);
    return dense;
}

static void apti_config_put_int(apti_json_out *out, const char *key, int64_t value)
{
    apti_json_key(out, key);
    apti_json_put_int(out, value);
}

static void apti_config_put_string(apti_json_out *out, const char *key, const char *value)
{
    apti_json_key(out, key);
    apti_json_put_string(out, value);
}

static void apti_config_put_float(apti_json_out *out, const char *key, float value)
{
    apti_json_key(out, key);
    apti_json_put_float(out, value);
}

static void apti_config_put_bool(apti_json_out *out, const char *key, bool value)
{
    apti_json_key(out, key);
    apti_json_put_bool(out, value);
}

static void apti_config_put_apt(apti_json_out *out, const apt_config *c)
{
    apti_json_key(out, "apt");
    apti_json_open(out, '{');
    apti_config_put_int(out, "version", 1);
    apti_config_put_int(out, "head_dim", c->head_dim);
    apti_config_put_int(out, "hidden_size_dense", c->hidden_dense);
    if (c->family == APT_T5) apti_config_put_int(out, "bias_heads", c->bias_heads);
    if (c->rope.interleaved) apti_config_put_bool(out, "rope_interleaved", true);
    apti_json_key(out, "layers");
    apti_json_open(out, '[');
    for (int32_t l = 0; l < c->layers; l++) {
        apti_json_open(out, '{');
        apti_config_put_int(out, "heads", c->layer[l].heads);
        if (c->layer[l].kv_heads != c->layer[l].heads) apti_config_put_int(out, "kv_heads", c->layer[l].kv_heads);
        apti_config_put_int(out, "neurons", c->layer[l].neurons);
        if (c->family == APT_T5) {
            apti_json_key(out, "bias_head");
            apti_json_open(out, '[');
            for (int32_t h = 0; h < c->layer[l].heads; h++) apti_json_put_int(out, c->bias_head[(int64_t)l * c->bias_heads + h]);
            apti_json_close(out);
        }
        apti_json_close(out);
    }
    apti_json_close(out);
    apti_json_close(out);
}

/* id2label and label2id with Hugging Face's default names. */
static void apti_config_put_labels(apti_json_out *out, int32_t labels)
{
    char id[16], name[32];
    for (int32_t way = 0; way < 2; way++) {
        apti_json_key(out, way == 0 ? "id2label" : "label2id");
        apti_json_open(out, '{');
        for (int32_t i = 0; i < labels; i++) {
            (void)snprintf(id, sizeof id, "%d", (int)i);
            (void)snprintf(name, sizeof name, "LABEL_%d", (int)i);
            if (way == 0) apti_config_put_string(out, id, name);
            else apti_config_put_int(out, name, i);
        }
        apti_json_close(out);
    }
}

/* For a pruned model the sizes that stand outside "apt" are those of its largest layer. */
static apt_layer_shape apti_config_largest(const apt_config *c)
{
    apt_layer_shape most = {1, 1, 1};
    for (int32_t l = 0; l < c->layers; l++) {
        if (c->layer[l].heads > most.heads) most.heads = c->layer[l].heads;
        if (c->layer[l].kv_heads > most.kv_heads) most.kv_heads = c->layer[l].kv_heads;
        if (c->layer[l].neurons > most.neurons) most.neurons = c->layer[l].neurons;
    }
    return most;
}

static void apti_config_put_encoder(apti_json_out *out, const apt_config *c)
{
    const apt_layer_shape most = apti_config_largest(c);
    const bool classifier = c->task == APT_TASK_CLASSIFY || c->task == APT_TASK_REGRESS;
    if (classifier) apti_config_put_labels(out, c->task == APT_TASK_CLASSIFY ? c->labels : 1);
    apti_config_put_string(out, "hidden_act",
                           c->activation == APT_RELU        ? "relu"
                           : c->activation == APT_GELU_TANH ? "gelu_new"
                                                            : "gelu");
    apti_config_put_int(out, "hidden_size", c->hidden);
    apti_config_put_float(out, "initializer_range", c->init_range);
    apti_config_put_int(out, "intermediate_size", most.neurons);
    apti_config_put_float(out, "layer_norm_eps", c->norm_eps);
    apti_config_put_int(out, "max_position_embeddings", c->positions);
    apti_config_put_string(out, "model_type", c->family == APT_BERT ? "bert" : "roberta");
    apti_config_put_int(out, "num_attention_heads", most.heads);
    apti_config_put_int(out, "num_hidden_layers", c->layers);
    apti_config_put_int(out, "pad_token_id", c->pad_id);
    apti_config_put_string(out, "position_embedding_type", "absolute");
    if (classifier)
        apti_config_put_string(out, "problem_type", c->task == APT_TASK_CLASSIFY ? "single_label_classification" : "regression");
    apti_config_put_bool(out, "tie_word_embeddings", true);
    apti_config_put_string(out, "torch_dtype", "float32");
    apti_config_put_int(out, "type_vocab_size", c->types);
}

static void apti_config_put_t5(apti_json_out *out, const apt_config *c)
{
    const apt_layer_shape most = apti_config_largest(c);
    apti_config_put_int(out, "d_ff", most.neurons);
    apti_config_put_int(out, "d_kv", c->head_dim);
    apti_config_put_int(out, "d_model", c->hidden);
    apti_config_put_int(out, "decoder_start_token_id", c->start_id);
    apti_config_put_int(out, "eos_token_id", c->end_id);
    apti_config_put_string(out, "feed_forward_proj",
                           c->activation == APT_RELU        ? c->gated ? "gated-relu" : "relu"
                           : c->activation == APT_GELU_TANH ? "gated-gelu"
                                                            : "gated-silu");
    apti_config_put_float(out, "initializer_factor", c->init_range);
    apti_config_put_bool(out, "is_encoder_decoder", true);
    apti_config_put_float(out, "layer_norm_epsilon", c->norm_eps);
    apti_config_put_string(out, "model_type", "t5");
    apti_config_put_int(out, "num_decoder_layers", c->decoder_layers);
    apti_config_put_int(out, "num_heads", most.heads);
    apti_config_put_int(out, "num_layers", apti_first_stack(c));
    apti_config_put_int(out, "pad_token_id", c->pad_id);
    apti_config_put_int(out, "relative_attention_max_distance", c->max_distance);
    apti_config_put_int(out, "relative_attention_num_buckets", c->buckets);
    apti_config_put_bool(out, "scale_decoder_outputs", c->scaled_head != 0);
    apti_config_put_bool(out, "tie_word_embeddings", c->untied == 0);
    apti_config_put_string(out, "torch_dtype", "float32");
}

static void apti_config_put_llama(apti_json_out *out, const apt_config *c)
{
    const apt_layer_shape most = apti_config_largest(c);
    apti_config_put_int(out, "eos_token_id", c->end_id);
    apti_config_put_int(out, "head_dim", c->head_dim);
    apti_config_put_string(out, "hidden_act", "silu");
    apti_config_put_int(out, "hidden_size", c->hidden);
    apti_config_put_float(out, "initializer_range", c->init_range);
    apti_config_put_int(out, "intermediate_size", most.neurons);
    apti_config_put_int(out, "max_position_embeddings", c->positions);
    apti_config_put_string(out, "model_type", c->qkv_bias ? "qwen2" : "llama");
    apti_config_put_int(out, "num_attention_heads", most.heads);
    apti_config_put_int(out, "num_hidden_layers", c->layers);
    apti_config_put_int(out, "num_key_value_heads", most.kv_heads);
    apti_config_put_float(out, "rms_norm_eps", c->norm_eps);
    if (c->rope.factor > 0) {
        apti_json_key(out, "rope_scaling");
        apti_json_open(out, '{');
        apti_config_put_float(out, "factor", c->rope.factor);
        apti_config_put_float(out, "high_freq_factor", c->rope.high_factor);
        apti_config_put_float(out, "low_freq_factor", c->rope.low_factor);
        apti_config_put_int(out, "original_max_position_embeddings", c->rope.original_positions);
        apti_config_put_string(out, "rope_type", "llama3");
        apti_json_close(out);
    }
    apti_config_put_float(out, "rope_theta", c->rope.theta);
    apti_config_put_bool(out, "tie_word_embeddings", c->untied == 0);
    apti_config_put_string(out, "torch_dtype", "float32");
}

static const char *apti_config_architecture(const apt_config *c)
{
    const bool bert = c->family == APT_BERT;
    if (c->family == APT_T5) return "T5ForConditionalGeneration";
    if (c->family == APT_LLAMA) return c->qkv_bias ? "Qwen2ForCausalLM" : "LlamaForCausalLM";
    if (c->task == APT_TASK_SPAN) return bert ? "BertForQuestionAnswering" : "RobertaForQuestionAnswering";
    if (c->task == APT_TASK_MLM) return bert ? "BertForMaskedLM" : "RobertaForMaskedLM";
    return bert ? "BertForSequenceClassification" : "RobertaForSequenceClassification";
}

static void apti_config_put(apti_json_out *out, const apt_config *c)
{
    apti_json_open(out, '{');
    if (!apti_config_is_dense(c)) apti_config_put_apt(out, c);
    apti_json_key(out, "architectures");
    apti_json_open(out, '[');
    apti_json_put_string(out, apti_config_architecture(c));
    apti_json_close(out);
    if (c->family == APT_T5) apti_config_put_t5(out, c);
    else if (c->family == APT_LLAMA) apti_config_put_llama(out, c);
    else apti_config_put_encoder(out, c);
    apti_config_put_int(out, "vocab_size", c->vocab);
    apti_json_close(out);
    apti_json_raw(out, "\n", 1);
}

/* ---------------------------------------------------------------------------------------------------------------------
   Models. Loading checks every shape against the files before it takes memory for a single value.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct apti_loader {
    apt_ctx *ctx;
    const apt_load_desc *desc;
    apti_model_file file;
    apti_tensors *set;
    apt_model *model;
    const apti_tensor_view **found;              /* for each parameter, NULL: not in the files */
    bool *used;                                  /* for each tensor of the set */
    float *values;                               /* room for the largest matrix that is packed */
} apti_loader;

/* "a, b, c and 5 more" for one line of the log. */
typedef struct apti_name_list { char text[512]; int32_t used, count, left_out; } apti_name_list;

static void apti_name_list_add(apti_name_list *list, const char *name)
{
    const apti_shown shown = apti_show(name);
    const size_t room = sizeof list->text - (size_t)list->used;
    list->count++;
    if (list->left_out > 0 || strlen(shown.text) + 2 >= room) list->left_out++;
    else list->used += (int32_t)snprintf(list->text + list->used, room, "%s%s", list->count > 1 ? ", " : "", shown.text);
}

static void apti_name_list_log(apt_ctx *ctx, const apti_name_list *list, const char *path, const char *what)
{
    char more[32] = "";
    if (list->count == 0) return;
    if (list->left_out > 0) (void)snprintf(more, sizeof more, " and %d more", (int)list->left_out);
    apti_log(ctx, APT_LOG_INFO, "'%.300s': %s: %s%s", path, what, list->text, more);
}

/* One file name with the other spellings that checkpoints use: without the family's prefix, norms as gamma and beta, the
   decoder's bias under the decoder; T5's embeddings under one of its stacks. `variant` counts 0..APTI_SPELLINGS - 1; false: this
   one does not apply. */
enum { APTI_SPELLINGS = 10 };

static bool apti_spelling(const apti_param *p, const char *prefix, int32_t variant, char out[128])
{
    const char *name = p->name, *suffix = "";
    const size_t n = strlen(prefix);
    size_t stem = strlen(name);
    if (variant >= 8) {
        if (strcmp(name, "shared.weight") != 0) return false;
        (void)snprintf(out, 128, "%s.embed_tokens.weight", variant == 8 ? "encoder" : "decoder");
        return true;
    }
    if (variant & 1) {
        if (n == 0 || strncmp(name, prefix, n) != 0) return false;
        name += n;
        stem -= n;
    }
    if (variant & 2) {
        const bool weight = apti_ends_with(name, "LayerNorm.weight");
        if (!weight && !apti_ends_with(name, "LayerNorm.bias")) return false;
        stem -= weight ? 6 : 4;
        suffix = weight ? "gamma" : "beta";
    }
    if (variant & 4) {
        if (strcmp(name, "lm_head.bias") != 0 && strcmp(name, "cls.predictions.bias") != 0) return false;
        stem -= 4;
        suffix = "decoder.bias";
    }
    (void)snprintf(out, 128, "%.*s%s", (int)stem, name, suffix);
    return true;
}

static const apti_tensor_view *apti_loader_find(apti_loader *l, const apti_param *p, const char *suffix)
{
    const char *prefix = l->model->block->prefix;
    char spelled[128], name[144];
    for (int32_t variant = 0; variant < APTI_SPELLINGS; variant++) {
        if (!apti_spelling(p, prefix, variant, spelled)) continue;
        (void)snprintf(name, sizeof name, "%s%s", spelled, suffix);
        const apti_tensor_view *view = apti_tensors_find(l->set, name);
        if (view == NULL) continue;
        l->used[view - l->set->views] = true;
        return view;
    }
    return NULL;
}

/* Under its own name or compressed. */
static const apti_tensor_view *apti_loader_either(apti_loader *l, const apti_param *p)
{
    const apti_tensor_view *view = apti_loader_find(l, p, "");
    return view != NULL ? view : apti_loader_find(l, p, APTI_SPARSE_SUFFIX);
}

static apt_result apti_loader_shape(const apti_loader *l, const apti_param *p, const apti_tensor_view *view)
{
    const int64_t expected[2] = {p->dims == 1 ? p->cols : p->rows, p->cols};
    char hint[96] = "";
    apti_sparse_view sparse;
    if (apti_is_sparse_name(view->name)) {
        const char *path = l->set->files[view->file].path;
        const apt_result r = apti_sparse_open(l->ctx, path, view, &sparse);
        if (r != APT_OK || (sparse.rows == expected[0] && sparse.cols == expected[1] && p->dims == 2)) return r;
        return apti_fail(l->ctx, APT_E_SHAPE, "'%.600s': tensor '%s' has shape [%d,%d], expected %s", path,
                         apti_show(view->name).text, (int)sparse.rows, (int)sparse.cols, apti_show_shape(expected, p->dims).text);
    }
    bool same = view->dims == p->dims;
    for (int32_t i = 0; i < p->dims && same; i++) same = view->shape[i] == expected[i];
    if (same) return APT_OK;
    const bool out = p == l->model->head[APTI_HEAD_OUT_W] || p == l->model->head[APTI_HEAD_OUT_B];
    if (out && l->model->config.task == APT_TASK_CLASSIFY)
        (void)snprintf(hint, sizeof hint, " (apt_load_desc.labels is %d, the model has %d labels)", (int)l->desc->labels,
                       (int)l->model->config.labels);
    return apti_fail(l->ctx, APT_E_SHAPE, "'%.600s': tensor '%s' has shape %s, expected %s%s", l->set->files[view->file].path,
                     apti_show(view->name).text, apti_show_shape(view->shape, view->dims).text,
                     apti_show_shape(expected, p->dims).text, hint);
}

/* Layers of the stack whose names begin with stem[which]. */
static int32_t apti_stem_layers(const apt_config *c, int32_t which)
{
    return which == 0 ? apti_first_stack(c) : c->decoder_layers;
}

/* Tensors of a layer that the config does not have: one of the two files is wrong, and half a model would be a silent answer. */
static apt_result apti_loader_layers(const apti_loader *l)
{
    for (int32_t i = 0; i < l->set->count; i++) {
        const char *name = l->set->views[i].name;
        for (int32_t k = 0; k < 2 && !l->used[i] && l->model->block->stem[k] != NULL; k++) {
            const char *stem = l->model->block->stem[k], *at = strstr(name, stem);
            const int32_t layers = apti_stem_layers(&l->model->config, k);
            if (at != NULL && strtol(at + strlen(stem), NULL, 10) >= layers)
                return apti_fail(l->ctx, APT_E_SHAPE, "'%.600s': tensor '%s' is of a layer beyond the %d of config.json",
                                 l->set->files[l->set->views[i].file].path, apti_show(name).text, (int)layers);
        }
    }
    return APT_OK;
}

/* Files of a tied head may hold it once more, but not as another matrix: config.json or the file would be wrong. */
static apt_result apti_loader_tied(const apti_loader *l)
{
    const apt_model *m = l->model;
    const apti_tensor_view *head = apti_is_tied(&m->config) ? apti_tensors_find(l->set, "lm_head.weight") : NULL;
    if (head == NULL) return APT_OK;
    const apti_tensor_view *word = l->found[m->embed[APTI_WORD] - m->params];
    const bool same = head->dtype == word->dtype && head->dims == word->dims && head->bytes == word->bytes &&
                      memcmp(head->shape, word->shape, (size_t)head->dims * sizeof(head->shape[0])) == 0 &&
                      memcmp(head->data, word->data, (size_t)head->bytes) == 0;
    return same ? APT_OK
                : apti_fail(l->ctx, APT_E_FORMAT, "'%.600s': tensor 'lm_head.weight' is not '%s', but \"tie_word_embeddings\" is "
                            "true in config.json", l->set->files[head->file].path, apti_show(word->name).text);
}

/* Finds every parameter in the files; only task heads may be missing. */
static apt_result apti_loader_match(apti_loader *l)
{
    apti_name_list missing, unused;
    memset(&missing, 0, sizeof missing);
    memset(&unused, 0, sizeof unused);
    l->found = (const apti_tensor_view **)apti_calloc(l->ctx, l->model->param_count, (int64_t)sizeof(apti_tensor_view *));
    l->used = (bool *)apti_calloc(l->ctx, l->set->count, (int64_t)sizeof(bool));
    if (l->found == NULL || l->used == NULL)
        return apti_fail(l->ctx, APT_E_MEMORY, "'%.600s': no memory to load it", l->set->path);
    const apti_param *head = l->model->config.task == APT_TASK_LM ? l->model->head[APTI_HEAD_OUT_W] : NULL;
    for (int32_t i = 0; i < l->model->param_count; i++) {
        const apti_param *p = &l->model->params[i];
        if (apti_param_count(p) == 0) continue;
        l->found[i] = apti_loader_either(l, p);
        if (l->found[i] == NULL && !p->optional_in_file)
            return apti_fail(l->ctx, APT_E_MISSING, "'%.600s': no tensor '%s' of shape %lld x %lld%s", l->set->path, p->name,
                             (long long)p->rows, (long long)p->cols,
                             p == head ? ", which config.json wants: \"tie_word_embeddings\" is false" : "");
        if (l->found[i] == NULL) apti_name_list_add(&missing, p->name);
        const apt_result r = l->found[i] != NULL ? apti_loader_shape(l, p, l->found[i]) : APT_OK;
        if (r != APT_OK) return r;
    }
    if (apti_loader_layers(l) != APT_OK) return APT_E_SHAPE;
    if (apti_loader_tied(l) != APT_OK) return APT_E_FORMAT;
    for (int32_t i = 0; i < l->set->count; i++)
        if (!l->used[i]) apti_name_list_add(&unused, l->set->views[i].name);
    apti_name_list_log(l->ctx, &missing, l->set->path, "not in the files, so initialised from the seed");
    apti_name_list_log(l->ctx, &unused, l->set->path, "tensors that this model does not use");
    return APT_OK;
}

static apt_result apti_loader_values(const apti_loader *l, const apti_tensor_view *view, float *out)
{
    apti_sparse_view sparse;
    if (!apti_is_sparse_name(view->name)) return apti_tensor_to_f32(l->set, view, out);
    const apt_result r = apti_sparse_open(l->ctx, l->set->files[view->file].path, view, &sparse);
    if (r == APT_OK) apti_sparse_expand(out, &sparse);
    return r;
}

/* Memory and values of every parameter. The seeded ones get what apt_model_create would give them. */
static apt_result apti_loader_fill(apti_loader *l)
{
    apt_result result = APT_OK;
    l->values = (float *)apti_alloc(l->ctx, apti_largest_linear(l->model), (int64_t)sizeof(float));
    if (l->values == NULL) return apti_fail(l->ctx, APT_E_MEMORY, "'%.600s': no memory for its largest tensor", l->set->path);
    for (int32_t i = 0; i < l->model->param_count && result == APT_OK; i++) {
        apti_param *p = &l->model->params[i];
        if (apti_param_count(p) == 0) continue;
        if (!apti_param_reserve(l->model, p))
            return apti_fail(l->ctx, APT_E_MEMORY, "'%.600s': no memory for %s (%lld x %lld)", l->set->path, p->name,
                             (long long)p->rows, (long long)p->cols);
        float *target = p->linear ? l->values : p->value;
        if (l->found[i] != NULL) result = apti_loader_values(l, l->found[i], target);
        else apti_param_init(target, p, l->desc->seed, (uint64_t)i);
        if (result == APT_OK) apti_param_set(l->model, p, target);
    }
    return result;
}

static apt_result apti_loader_config(apti_loader *l, const char *dir)
{
    char *path = apti_join_path(l->ctx, dir, "config.json"), *text = NULL;
    int64_t bytes = 0;
    if (path == NULL) return apti_fail(l->ctx, APT_E_MEMORY, "'%.600s': no memory for a path", dir);
    apt_result result = apti_read_file(l->ctx, path, APTI_CONFIG_BYTES, &text, &bytes);
    if (result == APT_OK) result = apti_config_parse(l->ctx, path, text, bytes, &l->file);
    if (result == APT_OK) result = apti_config_resolve(l->ctx, path, &l->file, l->desc->task, l->desc->labels);
    apti_free(l->ctx, text);
    apti_free(l->ctx, path);
    return result;
}

static apt_result apti_load_check(apt_ctx *ctx, const apt_load_desc *desc)
{
    if (desc->start_canary != 0 || desc->end_canary != 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_load_desc is not initialised: use apt_load_desc desc = APT_ZERO");
    if (desc->task < APT_TASK_NONE || desc->task > APT_TASK_LM)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_load_desc.task is %d", (int)desc->task);
    if (desc->labels < 0 || desc->labels > 65536)
        return apti_fail(ctx, APT_E_RANGE, "apt_load_desc.labels is %d, expected 0..65536", (int)desc->labels);
    if (desc->weights != APT_F32 && desc->weights != APT_BF16)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "apt_load_desc.weights is %s, expected F32 or BF16",
                         apti_dtype_name(desc->weights));
    return APT_OK;
}

APT_API apt_result apt_model_load(apt_ctx *ctx, const char *dir, const apt_load_desc *desc, apt_model **model)
{
    const apt_load_desc none = APT_ZERO;
    apti_loader l;
    if (ctx == NULL) return APT_E_ARGUMENT;
    if (dir == NULL || model == NULL) return apti_fail(ctx, APT_E_ARGUMENT, "apt_model_load: dir or model is NULL");
    memset(&l, 0, sizeof l);
    l.ctx = ctx;
    l.desc = desc != NULL ? desc : &none;
    apt_result result = apti_load_check(ctx, l.desc);
    if (result == APT_OK) result = apti_loader_config(&l, dir);
    if (result == APT_OK) result = apti_tensors_open(ctx, dir, &l.set);
    if (result == APT_OK && l.file.either && (apti_tensors_find(l.set, "lm_head.weight") != NULL ||
                                              apti_tensors_find(l.set, "lm_head.weight" APTI_SPARSE_SUFFIX) != NULL))
        l.file.config.untied = 1;
    if (result == APT_OK) result = apti_model_frame(ctx, &l.file.config, l.desc->weights, &l.model);
    if (result == APT_OK) result = apti_loader_match(&l);
    if (result == APT_OK) result = apti_loader_fill(&l);
    if (result == APT_OK) {
        l.model->next = ctx->models;
        ctx->models = l.model;
        *model = l.model;
    } else if (l.model != NULL) apti_model_free(l.model);
    apti_free(ctx, l.values);
    apti_free(ctx, l.used);
    apti_free(ctx, (void *)l.found);
    apti_tensors_close(l.set);
    apti_model_file_free(ctx, &l.file);
    return result;
}

/* ---- saving */

typedef struct apti_saver {
    const apt_model *model;
    const char *path;
    apti_tensor_item *items;
    const apti_param **params;                   /* of the items */
    int32_t count;
    float *values;                               /* compressing only: room for the largest matrix, embeddings too, */
    apti_sparse_name *names;                     /* names of the items, */
    apt_sparsity *sparsity;                      /* and what was compressed */
} apti_saver;

static int64_t apti_largest_matrix(const apt_model *model)
{
    int64_t most = 0;
    for (int32_t i = 0; i < model->param_count; i++)
        if (model->params[i].dims == 2) most = apti_max_i64(most, apti_param_count(&model->params[i]));
    return most;
}

static apt_result apti_saver_check(const apti_saver *s, const apti_param *p, const float *values)
{
    if (apti_finite_all(values, apti_param_count(p))) return APT_OK;
    return apti_fail(s->model->ctx, APT_E_NONFINITE, "'%.600s' is not written: %s holds NaN or infinity", s->path, p->name);
}

/* Matrices that exist as panels only. */
static apt_result apti_saver_fill(void *user, int64_t index, void *out)
{
    const apti_saver *s = (const apti_saver *)user;
    const apti_param *p = s->params[index];
    float *values = s->items[index].dtype == APT_F32 ? (float *)out : s->values;
    apti_param_get(s->model, p, values);
    const apt_result r = apti_saver_check(s, p, values);
    if (r == APT_OK && values != out) apti_sparse_encode((uint8_t *)out, values, p->rows, p->cols);
    return r;
}

/* Turns the last item into a compressed one where that is smaller. */
static void apti_saver_compress(apti_saver *s, apti_tensor_item *item, const apti_param *p)
{
    if (p->dims != 2) return;
    apti_param_get(s->model, p, s->values);
    const int64_t count = apt_sparse_count(s->values, p->cols, p->rows, p->cols);
    const int64_t bytes = apt_sparse_bytes(p->rows, p->cols, count);
    if (bytes >= 4 * apti_param_count(p)) return;
    char *name = s->names[s->count - 1].text;
    (void)snprintf(name, sizeof s->names[0].text, "%s%s", p->name, APTI_SPARSE_SUFFIX);
    item->name = name;
    item->dtype = APT_U8;
    item->dims = 1;
    item->shape[0] = bytes;
    item->shape[1] = 0;
    item->data = NULL;
    apti_sparsity_add(s->sparsity, p->rows, p->cols, count);
}

static apt_result apti_saver_items(apti_saver *s)
{
    apt_result result = APT_OK;
    for (int32_t i = 0; i < s->model->param_count && result == APT_OK; i++) {
        const apti_param *p = &s->model->params[i];
        if (apti_param_count(p) == 0) continue;
        apti_tensor_item *item = &s->items[s->count];
        s->params[s->count++] = p;
        item->name = p->name;
        item->dtype = APT_F32;
        item->dims = p->dims;
        item->shape[0] = p->dims == 1 ? p->cols : p->rows;
        item->shape[1] = p->dims == 1 ? 0 : p->cols;
        item->data = p->columns == NULL ? p->value : NULL;
        if (item->data != NULL) result = apti_saver_check(s, p, p->value);
        if (s->sparsity != NULL && result == APT_OK) apti_saver_compress(s, item, p);
    }
    return result;
}

/* Into an open writer. sparsity not NULL: compressed, and told there. */
static apt_result apti_save_weights(const apt_model *model, const char *path, apti_writer *w, apt_sparsity *sparsity)
{
    const apti_meta meta[1] = {{"format", sparsity != NULL ? "apt-sparse" : "pt"}};
    apt_ctx *ctx = model->ctx;
    apti_saver s;
    apti_tensor_job job;
    memset(&s, 0, sizeof s);
    memset(&job, 0, sizeof job);
    s.model = model;
    s.path = path;
    s.items = (apti_tensor_item *)apti_calloc(ctx, model->param_count, (int64_t)sizeof(apti_tensor_item));
    s.params = (const apti_param **)apti_calloc(ctx, model->param_count, (int64_t)sizeof(apti_param *));
    apt_result result = APT_OK;
    if (sparsity != NULL) {
        s.sparsity = sparsity;
        s.names = (apti_sparse_name *)apti_calloc(ctx, model->param_count, (int64_t)sizeof(apti_sparse_name));
        s.values = (float *)apti_alloc(ctx, apti_largest_matrix(model), (int64_t)sizeof(float));
    }
    if (s.items == NULL || s.params == NULL || (sparsity != NULL && (s.names == NULL || s.values == NULL)))
        result = apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for a list of tensors", path);
    else result = apti_saver_items(&s);
    if (result == APT_OK) {
        job.path = path;
        job.items = s.items;
        job.count = s.count;
        job.meta = meta;
        job.meta_count = 1;
        job.fill = apti_saver_fill;
        job.user = &s;
        result = apti_tensors_emit(w, &job);
    }
    apti_free(ctx, s.items);
    apti_free(ctx, (void *)s.params);
    apti_free(ctx, s.names);
    apti_free(ctx, s.values);
    return result;
}

static apt_result apti_save_config(const apt_model *model, apti_writer *w)
{
    apti_json_out out;
    const char *text = NULL;
    int64_t bytes = 0;
    apti_json_begin(&out, model->ctx, 2);
    apti_config_put(&out, &model->config);
    apt_result result = apti_json_end(&out, &text, &bytes);
    if (result == APT_OK) result = apti_write(w, text, bytes);
    apti_json_drop(&out);
    return result;
}

/* Puts both files in place or none: until the second one stands, the old weights have another name as well. Where the system
   has no second names, a refusal between the two renames leaves the new weights beside the old config.json. */
static apt_result apti_save_commit(apti_writer *w, apti_writer *c, const char *weights)
{
    const int64_t bytes = (int64_t)strlen(weights) + 48;
    char *old = (char *)apti_alloc(w->ctx, bytes, 1);
    if (old == NULL) return apti_fail(w->ctx, APT_E_MEMORY, "'%.600s': no memory for a path", weights);
    (void)snprintf(old, (size_t)bytes, "%s.old-%ld", weights, apti_os_process());
    const bool kept = apti_os_link(weights, old);
    apt_result result = apti_write_commit(w);
    if (result == APT_OK) {
        result = apti_write_commit(c);
        if (result != APT_OK && kept) (void)apti_os_replace(old, weights);
    }
    if (kept) (void)remove(old);
    apti_free(w->ctx, old);
    return result;
}

/* Both files are written beside their targets before the first one is put in place. */
static apt_result apti_save_files(const apt_model *model, const char *weights, const char *config, apt_sparsity *sparsity)
{
    apti_writer w, c;
    apt_result result = apti_write_begin(model->ctx, weights, &w);
    if (result != APT_OK) return result;
    result = apti_write_begin(model->ctx, config, &c);
    if (result == APT_OK) {
        result = apti_save_weights(model, weights, &w, sparsity);
        if (result == APT_OK) result = apti_save_config(model, &c);
        if (result == APT_OK) result = apti_write_ready(&w);
        if (result == APT_OK) result = apti_write_ready(&c);
        if (result == APT_OK) result = apti_save_commit(&w, &c, weights);
        apti_write_abort(&c);
    }
    apti_write_abort(&w);
    return result;
}

/* What a file cannot hold. */
static apt_result apti_save_check(const apt_model *model)
{
    for (int32_t i = 0; i < model->param_count; i++) {
        const apti_param *p = &model->params[i];
        if (apti_is_adapter(p) && apti_param_count(p) > 0)
            return apti_fail(model->ctx, APT_E_STATE, "apt_model_save: the model has adapters (%s): call apt_model_merge first",
                             p->name);
    }
    apt_units units;
    apt_model_units(model, &units);
    for (int32_t i = 0; i < units.total && model->masks != NULL; i++)
        if (model->masks[i] < 1.0f)
            return apti_fail(model->ctx, APT_E_STATE, "apt_model_save: unit %d has mask %g: call apt_model_compact first", (int)i,
                             (double)model->masks[i]);
    return APT_OK;
}

static apt_result apti_model_save(apt_model *model, const char *dir, apt_sparsity *sparsity)
{
    apt_ctx *ctx = model->ctx;
    if (dir == NULL || dir[0] == 0) return apti_fail(ctx, APT_E_ARGUMENT, "apt_model_save: dir is NULL or empty");
    apt_result result = apti_save_check(model);
    if (result == APT_OK) result = apti_make_dir(ctx, dir);
    if (result != APT_OK) return result;
    char *weights = apti_join_path(ctx, dir, "model.safetensors"), *config = apti_join_path(ctx, dir, "config.json");
    if (weights == NULL || config == NULL) result = apti_fail(ctx, APT_E_MEMORY, "'%.600s': no memory for a path", dir);
    else result = apti_save_files(model, weights, config, sparsity);
    apti_free(ctx, weights);
    apti_free(ctx, config);
    return result;
}

APT_API apt_result apt_model_save(apt_model *model, const char *dir)
{
    return model != NULL ? apti_model_save(model, dir, NULL) : APT_E_ARGUMENT;
}

APT_API apt_result apt_model_save_sparse(apt_model *model, const char *dir, apt_sparsity *saved)
{
    apt_sparsity sparsity;
    if (model == NULL) return APT_E_ARGUMENT;
    apti_sparsity_none(&sparsity);
    const apt_result r = apti_model_save(model, dir, &sparsity);
    if (r == APT_OK && saved != NULL) *saved = sparsity;
    return r;
}

#endif /* APT_ONLY_CORE */
#ifndef APT_ONLY_CORE
/* ------------------------------------------------------------------------------------------------ checkpoints

   Everything that a run needs to go on bit for bit: shapes and ranks, weights, moments, masks, salience, the decision,
   importance, the teacher with its transform, counters; inside an accumulation also gradients and sums. Random numbers
   need no state: they are functions of (seed, stream, step). */

/* Counters and flags as two arrays. The first APTI_CKPT_FIXED integers must agree with the model at hand. */
enum {
    APTI_CKPT_FIXED = 22,
    APTI_CKPT_HIDDEN = APTI_CKPT_FIXED,
    APTI_CKPT_STEP,
    APTI_CKPT_MICRO,
    APTI_CKPT_ADAM_STEPS,
    APTI_CKPT_MOVING,
    APTI_CKPT_OBSERVED,
    APTI_CKPT_HAS_METRIC,
    APTI_CKPT_BUDGET,
    APTI_CKPT_STAGE,
    APTI_CKPT_TOKENS,
    APTI_CKPT_PROBE_ROWS,
    APTI_CKPT_INTS
};
enum {
    APTI_CKPT_SPARSITY = 0,
    APTI_CKPT_BEST,
    APTI_CKPT_LOSS,
    APTI_CKPT_TASK_LOSS,
    APTI_CKPT_DISTILL_LOSS,
    APTI_CKPT_TARGET,
    APTI_CKPT_TIME,
    APTI_CKPT_TEACHER_TIME,
    APTI_CKPT_REALS
};

static void apti_ckpt_pack(const apt_trainer *t, int64_t *i, double *x)
{
    const apt_config *c = &t->model->config;
    const int64_t ints[] = {c->family,         c->task,
                            c->vocab,          c->positions,
                            c->types,          c->hidden_dense,
                            c->head_dim,       c->layers,
                            c->labels,         c->pad_id,
                            c->activation,     t->model->prunable_dense,
                            t->model->weights, (int64_t)t->desc.seed,
                            c->decoder_layers, c->gated,
                            c->untied,         c->scaled_head,
                            c->qkv_bias,       c->buckets,
                            c->max_distance,   c->bias_heads,
                            c->hidden,         t->step,
                            t->micro,          t->adam_steps,
                            t->moving,         t->observed,
                            t->has_metric,     t->adapter_budget,
                            t->stage,          t->info.tokens,
                            t->probe.rows};
    const double reals[] = {t->sparsity,          t->best_metric,          t->info.loss,         t->info.task_loss,
                            t->info.distill_loss, t->info.sparsity_target, t->info.milliseconds, t->info.teacher_milliseconds};
    memcpy(i, ints, sizeof(ints));
    memcpy(x, reals, sizeof(reals));
}

static apt_result apti_ckpt_compare_model(const apt_trainer *t, const char *path, const int64_t *found)
{
    static const char *const names[APTI_CKPT_FIXED] = {
        "family",         "task",   "vocab",  "positions", "types",      "dense hidden size",
        "head size",      "layers", "labels", "pad_id",    "activation", "dense prunable parameters",
        "weight storage", "seed",   "decoder layers", "gated FFN", "untied head", "scaled head", "query, key, value biases",
        "relative position buckets", "relative position distance", "relative position heads"};
    int64_t mine[APTI_CKPT_INTS];
    double reals[APTI_CKPT_REALS];
    apti_ckpt_pack(t, mine, reals);
    for (int32_t i = 0; i < APTI_CKPT_FIXED; i++)
        if (mine[i] != found[i])
            return apti_fail(t->ctx, APT_E_STATE, "%s: its %s is %lld; this trainer expects %lld", path, names[i],
                             (long long)found[i], (long long)mine[i]);
    return APT_OK;
}

static apt_result apti_ckpt_compare_desc(const apt_trainer *t, const char *path, const double *found)
{
    apti_field field[APTI_FIELDS];
    apti_desc_fields(&t->desc, &t->model->config, field);
    for (int32_t i = 0; i < APTI_FIELDS_COMPARED; i++)
        if (!(field[i].value == found[i]))
            return apti_fail(t->ctx, APT_E_STATE, "%s: it was written with %s = %g; this trainer has %g", path, field[i].name,
                             found[i], field[i].value);
    return APT_OK;
}

/* ---- writing ---- */

typedef struct apti_ckpt_name { char text[160]; } apti_ckpt_name;

static apti_ckpt_name apti_ckpt_key(const char *part, const char *name)
{
    apti_ckpt_name key;
    snprintf(key.text, sizeof(key.text), "%s.%s", part, name);
    return key;
}

static apt_result apti_ckpt_fill_param(void *user, int64_t index, void *out)
{
    const apt_model *m = (const apt_model *)user;
    apti_param_get(m, &m->params[index], (float *)out);
    return APT_OK;
}

static void apti_ckpt_put_floats(apti_ckpt_writer *w, const char *part, const char *name, const float *x, int64_t rows,
                                 int64_t cols)
{
    const apti_ckpt_name key = apti_ckpt_key(part, name);
    const int64_t shape[2] = {rows, cols};
    if (x != NULL && rows * cols > 0) (void)apti_ckpt_put(w, key.text, APT_F32, 2, shape, x);
}

/* Optimizer state of one parameter; gradients only inside an accumulation. */
static void apti_ckpt_put_moments(apti_ckpt_writer *w, const apti_param *p, bool gradients)
{
    if (!p->trainable) return;
    apti_ckpt_put_floats(w, "moment1", p->name, p->moment1, p->rows, p->cols);
    apti_ckpt_put_floats(w, "moment2", p->name, p->moment2, p->rows, p->cols);
    if (gradients) apti_ckpt_put_floats(w, "grad", p->name, p->grad, p->rows, p->cols);
}

/* Shapes, ranks, masks and parameters of student or teacher; `skip` (or NULL): frozen buffers shared with it are left out. */
static void apti_ckpt_put_model(apti_ckpt_writer *w, const char *part, apt_model *m, const apt_model *skip)
{
    int32_t ranks[APTI_LINEARS];
    apt_units u;
    apt_model_units(m, &u);
    const int64_t shapes[2] = {m->config.layers, 3}, rank_shape[1] = {APTI_LINEARS}, one[1] = {1}, units[1] = {u.total};
    const int64_t hidden = m->config.hidden;
    (void)apti_ckpt_put_copy(w, apti_ckpt_key(part, "hidden").text, APT_I64, 1, one, &hidden);
    (void)apti_ckpt_put(w, apti_ckpt_key(part, "shapes").text, APT_I32, 2, shapes, m->shape);
    const int64_t columns[2] = {m->config.layers, m->config.bias_heads};
    if (m->bias_head != NULL) (void)apti_ckpt_put(w, apti_ckpt_key(part, "bias_head").text, APT_I32, 2, columns, m->bias_head);
    for (int32_t l = 0; l < m->config.layers; l++) {
        char name[32];
        snprintf(name, sizeof(name), "ranks.%d", (int)l);
        for (int32_t i = 0; i < APTI_LINEARS; i++) ranks[i] = (int32_t)apti_rank(m, l, i);
        (void)apti_ckpt_put_copy(w, apti_ckpt_key(part, name).text, APT_I32, 1, rank_shape, ranks);
    }
    const int32_t head_rank = (int32_t)m->head_a->rows;
    if (m->head_a != m->none) (void)apti_ckpt_put_copy(w, apti_ckpt_key(part, "ranks.head").text, APT_I32, 1, one, &head_rank);
    if (m->masks != NULL) (void)apti_ckpt_put(w, apti_ckpt_key(part, "masks").text, APT_F32, 1, units, m->masks);
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        const int64_t shape[2] = {p->rows, p->cols};
        if (apti_param_count(p) == 0 || (skip != NULL && !skip->params[i].trainable)) continue;
        (void)apti_ckpt_put_fill(w, apti_ckpt_key(part, p->name).text, APT_F32, 2, shape, apti_ckpt_fill_param, m, i);
    }
}

/* True when every buffer that the student does not train is one and the same in both. */
static bool apti_teacher_shares(const apt_trainer *t)
{
    for (int32_t i = 0; i < t->model->param_count; i++) {
        const apti_param *s = &t->model->params[i], *q = &t->teacher->params[i];
        if (!s->trainable &&
            (s->packed.data != q->packed.data || s->columns != q->columns || (!s->linear && s->value != q->value)))
            return false;
    }
    return true;
}

static void apti_ckpt_put_trainer(apti_ckpt_writer *w, apt_trainer *t)
{
    apt_units u;
    int64_t ints[APTI_CKPT_INTS];
    double reals[APTI_CKPT_REALS], desc[APTI_FIELDS];
    apti_field field[APTI_FIELDS];
    const int64_t ni[1] = {APTI_CKPT_INTS}, nx[1] = {APTI_CKPT_REALS}, nd[1] = {APTI_FIELDS};
    apt_model_units(t->model, &u);
    const int64_t nu[1] = {u.total};
    apti_ckpt_pack(t, ints, reals);
    apti_desc_fields(&t->desc, &t->model->config, field);
    for (int32_t i = 0; i < APTI_FIELDS; i++) desc[i] = field[i].value;
    (void)apti_ckpt_put_copy(w, "state.ints", APT_I64, 1, ni, ints);
    (void)apti_ckpt_put_copy(w, "state.reals", APT_F64, 1, nx, reals);
    (void)apti_ckpt_put_copy(w, "state.desc", APT_F64, 1, nd, desc);
    (void)apti_ckpt_put(w, "state.keep", APT_U8, 1, nu, t->keep);
    apti_ckpt_put_floats(w, "state", "salience", t->salience, 1, u.total);
    apti_ckpt_put_floats(w, "state", "importance", t->importance, 1, apti_sites(t->model));
    if (t->micro > 0 || t->stage != APTI_STAGE_NONE)
        apti_ckpt_put_floats(w, "state", "probe", t->probe.act, 3, apti_probe_count(t->model));
}

static void apti_ckpt_put_teacher(apti_ckpt_writer *w, apt_trainer *t)
{
    const apti_transform *tr = &t->transform;
    const int64_t places[1] = {tr->a.cols};
    apti_ckpt_put_model(w, "teacher", t->teacher, apti_teacher_shares(t) ? t->model : NULL);
    apti_ckpt_put_floats(w, "teacher", "transform_A", tr->a.value, tr->a.rows, tr->a.cols);
    apti_ckpt_put_floats(w, "teacher", "transform_B", tr->b.value, tr->b.rows, tr->b.cols);
    apti_ckpt_put_moments(w, &tr->a, t->micro > 0);
    apti_ckpt_put_moments(w, &tr->b, t->micro > 0);
    (void)apti_ckpt_put(w, "teacher.place", APT_I32, 1, places, tr->place);
}

/* ---- masks of single weights, and iterative pruning ---- */

enum { APTI_PLAN_REALS = 7, APTI_ITERATION_REALS = 11 };

static void apti_iterative_plan(const apti_iterative *it, double x[APTI_PLAN_REALS])
{
    const apt_iterative_desc *d = &it->desc;
    const double plan[APTI_PLAN_REALS] = {d->first, d->last, (double)d->iterations, (double)d->begin,
                                          (double)d->retrain, d->lower_is_better ? 1.0 : 0.0, d->global ? 1.0 : 0.0};
    memcpy(x, plan, sizeof plan);
}

static void apti_iteration_pack(const apt_iteration *h, double x[APTI_ITERATION_REALS])
{
    const double all[APTI_ITERATION_REALS] = {(double)h->measured, (double)h->step, h->target, (double)h->reached.matrices,
                                              (double)h->reached.weights, (double)h->reached.zeros,
                                              (double)h->reached.sparse_bytes, h->before, h->after, h->retrained, h->degradation};
    memcpy(x, all, sizeof all);
}

/* Counts are exact in a double and in their ranges, or the file is refused. */
static bool apti_iteration_unpack(apt_iteration *h, const double *x)
{
    const double most = 9007199254740992.0;
    for (int32_t i = 0; i < APTI_ITERATION_REALS; i++)
        if (!apti_finite_f64(x[i]) || (i < 7 && (x[i] < 0 || x[i] > most))) return false;
    if (x[0] > 7 || x[3] > 2147483647.0 || x[5] > x[4] || x[4] > most / 4) return false;
    h->measured = (int32_t)x[0];
    h->step = (int64_t)x[1];
    h->target = x[2];
    h->reached.matrices = (int32_t)x[3];
    h->reached.weights = (int64_t)x[4];
    h->reached.zeros = (int64_t)x[5];
    h->reached.sparse_bytes = (int64_t)x[6];
    h->reached.dense_bytes = 4 * h->reached.weights;
    h->reached.sparsity = (double)h->reached.zeros / (double)apti_max_i64(h->reached.weights, 1);
    h->reached.compression = (double)h->reached.dense_bytes / (double)apti_max_i64(h->reached.sparse_bytes, 1);
    h->before = x[7];
    h->after = x[8];
    h->retrained = x[9];
    h->degradation = x[10];
    return true;
}

static void apti_ckpt_put_masks(apti_ckpt_writer *w, const apt_trainer *t)
{
    const apt_model *m = t->model;
    const apti_iterative *it = &t->iterative;
    double plan[APTI_PLAN_REALS], x[APTI_ITERATION_REALS];
    for (int32_t i = 0; m->bitmask != NULL && i < m->param_count; i++) {
        const int64_t words[1] = {apt_bitmask_words(apti_param_count(&m->params[i]))};
        if (m->bitmask[i] != NULL)
            (void)apti_ckpt_put(w, apti_ckpt_key("bitmask", m->params[i].name).text, APT_I64, 1, words, m->bitmask[i]);
    }
    if (it->chosen == NULL) return;
    const int64_t plans[1] = {APTI_PLAN_REALS}, params[1] = {m->param_count}, reals[1] = {APTI_ITERATION_REALS};
    apti_iterative_plan(it, plan);
    (void)apti_ckpt_put_copy(w, "iterative.plan", APT_F64, 1, plans, plan);
    (void)apti_ckpt_put(w, "iterative.chosen", APT_U8, 1, params, it->chosen);
    for (int32_t i = 0; i < it->done; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "%d", (int)i);
        apti_iteration_pack(&it->history[i], x);
        (void)apti_ckpt_put_copy(w, apti_ckpt_key("iterative", name).text, APT_F64, 1, reals, x);
    }
}

APT_API apt_result apt_checkpoint_save(apt_trainer *trainer, const char *path, const void *user, size_t user_bytes)
{
    apti_ckpt_writer *w = NULL;
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    if (path == NULL || (user == NULL && user_bytes > 0))
        return apti_fail(t->ctx, APT_E_ARGUMENT, "apt_checkpoint_save: path or user is NULL");
    if (t->model->structure != t->structure)
        return apti_fail(t->ctx, APT_E_STATE, "%s: the model was changed from outside", path);
    if (t->half_done)
        return apti_fail(t->ctx, APT_E_STATE, "%s: a step is half done; save between steps or from APT_EVENT_CHECKPOINT", path);
    const apt_result r = apti_ckpt_begin(t->ctx, &w);
    if (r != APT_OK) return r;
    const int64_t bytes[1] = {(int64_t)user_bytes};
    apti_ckpt_put_trainer(w, t);
    apti_ckpt_put_model(w, "model", t->model, NULL);
    for (int32_t i = 0; i < t->model->param_count; i++) apti_ckpt_put_moments(w, &t->model->params[i], t->micro > 0);
    if (t->teacher != NULL) apti_ckpt_put_teacher(w, t);
    apti_ckpt_put_masks(w, t);
    if (user_bytes > 0) (void)apti_ckpt_put(w, "user", APT_U8, 1, bytes, user);
    return apti_ckpt_finish(w, path);
}

/* ---- reading: into fresh objects, which replace the present ones only when all went well ---- */

static apt_result apti_ckpt_floats(apti_ckpt_reader *r, const char *part, const char *name, float *out, int64_t count)
{
    const void *data = NULL;
    const apt_result result = apti_ckpt_find(r, apti_ckpt_key(part, name).text, APT_F32, count, &data, NULL);
    if (result == APT_OK) memcpy(out, data, (size_t)count * sizeof(float));
    return result;
}

static bool apti_ckpt_has_key(apti_ckpt_reader *r, const char *part, const char *name)
{
    return apti_ckpt_has(r, apti_ckpt_key(part, name).text);
}

/* Ranks of the adapters at `count` places from `first` on. */
static apt_result apti_ckpt_ranks(apti_ckpt_reader *r, const char *key, apt_model *m, int32_t first, int32_t count)
{
    const void *ranks = NULL;
    int32_t rank[APTI_LINEARS];
    const apt_result result = apti_ckpt_find(r, key, APT_I32, count, &ranks, NULL);
    if (result != APT_OK) return result;
    memcpy(rank, ranks, (size_t)count * sizeof(int32_t));
    for (int32_t i = 0; i < count; i++) {
        const apti_site site = apti_site_of(m, first + i);
        const bool none = site.a == m->none;
        if (rank[i] < 0 || rank[i] > (none ? 0 : 65536))
            return apti_fail(m->ctx, APT_E_RANGE, "checkpoint: rank %d in %s", (int)rank[i], key);
        if (!none) site.a->rows = site.b->cols = rank[i];
    }
    return APT_OK;
}

/* Frame of the saved student or teacher with its shapes and ranks; no parameter memory yet. */
static apt_result apti_ckpt_frame(apt_trainer *t, apti_ckpt_reader *r, const char *part, apt_model **out)
{
    apt_config c = t->model->config;
    const void *hidden = NULL, *shapes = NULL, *columns = NULL;
    apt_result result = apti_ckpt_find(r, apti_ckpt_key(part, "hidden").text, APT_I64, 1, &hidden, NULL);
    if (result == APT_OK)
        result = apti_ckpt_find(r, apti_ckpt_key(part, "shapes").text, APT_I32, 3 * (int64_t)c.layers, &shapes, NULL);
    if (result == APT_OK && t->model->bias_head != NULL)
        result = apti_ckpt_find(r, apti_ckpt_key(part, "bias_head").text, APT_I32, (int64_t)c.layers * c.bias_heads, &columns,
                                NULL);
    if (result != APT_OK) return result;
    int64_t size = 0;
    memcpy(&size, hidden, sizeof(size));
    if (size < 1 || size > c.hidden_dense)
        return apti_fail(t->ctx, APT_E_RANGE, "checkpoint: hidden size %lld; expected 1..%d", (long long)size,
                         (int)c.hidden_dense);
    c.hidden = (int32_t)size;
    c.layer = (const apt_layer_shape *)shapes;
    c.bias_head = (const int32_t *)columns;
    result = apti_model_frame(t->ctx, &c, t->model->weights, out);
    for (int32_t l = 0; l < c.layers && result == APT_OK; l++) {
        char name[32];
        snprintf(name, sizeof(name), "ranks.%d", (int)l);
        result = apti_ckpt_ranks(r, apti_ckpt_key(part, name).text, *out, l * APTI_LINEARS, APTI_LINEARS);
    }
    if (result == APT_OK && (*out)->head_a != (*out)->none)
        result = apti_ckpt_ranks(r, apti_ckpt_key(part, "ranks.head").text, *out, apti_layer_sites(*out), 1);
    if (result != APT_OK && *out != NULL) {
        apti_model_free(*out);
        *out = NULL;
    }
    return result;
}

static apt_result apti_ckpt_read_param(apt_model *m, apti_ckpt_reader *r, const char *part, apti_param *p, bool gradients)
{
    const void *data = NULL;
    apt_result result = apti_ckpt_find(r, apti_ckpt_key(part, p->name).text, APT_F32, apti_param_count(p), &data, NULL);
    if (result != APT_OK) return result;
    if (!apti_param_reserve(m, p)) return apti_fail(m->ctx, APT_E_MEMORY, "checkpoint: no memory for %s", p->name);
    apti_param_set(m, p, (const float *)data);
    if (p->trainable) result = apti_ckpt_floats(r, "moment1", p->name, p->moment1, apti_param_count(p));
    if (p->trainable && result == APT_OK) result = apti_ckpt_floats(r, "moment2", p->name, p->moment2, apti_param_count(p));
    if (p->trainable && result == APT_OK && gradients)
        result = apti_ckpt_floats(r, "grad", p->name, p->grad, apti_param_count(p));
    return result;
}

/* Parameters and masks of `m`, whose frame stands. share (or NULL): frozen parameters come from there by reference. */
static apt_result apti_ckpt_read_model(const apt_trainer *t, apti_ckpt_reader *r, const char *part, apt_model *m,
                                       const apt_model *share, bool student, bool gradients)
{
    apt_result result = APT_OK;
    apt_units u;
    apt_model_units(m, &u);
    m->scale = t->model->scale;
    m->prunable_dense = t->model->prunable_dense;
    for (int32_t i = 0; i < m->param_count && result == APT_OK; i++) {
        apti_param *p = &m->params[i];
        if (apti_param_count(p) == 0) continue;
        p->trainable = student && apti_trains(t, p);
        if (share != NULL && !share->params[i].trainable) {
            p->value = (float *)apti_retain(share->params[i].value);
            p->packed = share->params[i].packed;
            p->packed.data = apti_retain(p->packed.data);
        } else {
            result = apti_ckpt_read_param(m, r, part, p, gradients);
        }
    }
    if (result == APT_OK && apti_ckpt_has_key(r, part, "masks")) {
        if (!apti_masks_reserve(m)) return apti_fail(m->ctx, APT_E_MEMORY, "checkpoint: no memory for masks");
        result = apti_ckpt_floats(r, part, "masks", m->masks, u.total);
    }
    return result;
}

static apt_result apti_ckpt_read_transform(apt_trainer *t, apti_ckpt_reader *r, apt_model *student, apt_model *teacher,
                                           apti_transform *tr, bool gradients)
{
    const int64_t d = student->config.hidden;
    const void *place = NULL;
    apt_result result = apti_ckpt_find(r, "teacher.place", APT_I32, d, &place, NULL);
    if (result != APT_OK) return result;
    tr->place = (int32_t *)apti_alloc(t->ctx, d, (int64_t)sizeof(int32_t));
    if (tr->place == NULL) return apti_fail(t->ctx, APT_E_MEMORY, "checkpoint: no memory for the transform");
    memcpy(tr->place, place, (size_t)d * sizeof(int32_t));
    for (int64_t i = 0; i < d; i++)
        if (tr->place[i] < 0 || tr->place[i] >= teacher->config.hidden)
            return apti_fail(t->ctx, APT_E_RANGE, "checkpoint: transform place %d", (int)tr->place[i]);
    const char *names[2] = {"transform_A", "transform_B"};
    apti_param *params[2] = {&tr->a, &tr->b};
    for (int32_t i = 0; i < 2 && result == APT_OK; i++) {
        const int64_t rows = i == 0 ? APTI_TRANSFORM_RANK : teacher->config.hidden, cols = i == 0 ? d : APTI_TRANSFORM_RANK;
        if (!apti_transform_param(t, params[i], names[i], rows, cols))
            return apti_fail(t->ctx, APT_E_MEMORY, "checkpoint: no memory for the transform");
        result = apti_ckpt_floats(r, "teacher", names[i], params[i]->value, rows * cols);
        if (result == APT_OK) result = apti_ckpt_floats(r, "moment1", names[i], params[i]->moment1, rows * cols);
        if (result == APT_OK) result = apti_ckpt_floats(r, "moment2", names[i], params[i]->moment2, rows * cols);
        if (result == APT_OK && gradients) result = apti_ckpt_floats(r, "grad", names[i], params[i]->grad, rows * cols);
    }
    return result;
}

/* Into a student that has its weights; 0 stands wherever a mask is 0. */
static apt_result apti_ckpt_read_masks(apti_ckpt_reader *r, apt_model *m)
{
    for (int32_t i = 0; i < m->param_count; i++) {
        const apti_param *p = &m->params[i];
        const int64_t n = apti_param_count(p), words = apt_bitmask_words(n);
        const void *data = NULL, *values = NULL;
        if (!apti_ckpt_has_key(r, "bitmask", p->name)) continue;
        if (!apti_is_matrix(p)) return apti_fail(m->ctx, APT_E_FORMAT, "checkpoint: a mask of %s, which is no matrix", p->name);
        apt_result result = apti_ckpt_find(r, apti_ckpt_key("bitmask", p->name).text, APT_I64, words, &data, NULL);
        if (result == APT_OK) result = apti_ckpt_find(r, apti_ckpt_key("model", p->name).text, APT_F32, n, &values, NULL);
        if (result != APT_OK) return result;
        uint64_t *mask = (uint64_t *)apti_alloc(m->ctx, words, (int64_t)sizeof(uint64_t));
        if (mask != NULL) memcpy(mask, data, (size_t)words * sizeof(uint64_t));
        if (mask == NULL || !apti_bitmasks_reserve(m)) {
            apti_free(m->ctx, mask);
            return apti_fail(m->ctx, APT_E_MEMORY, "checkpoint: no memory for the mask of %s", p->name);
        }
        m->bitmask[i] = mask;
        if (!apti_bitmask_tail_ok(mask, n) || apti_bitmask_broken(mask, (const float *)values, n) >= 0)
            return apti_fail(m->ctx, APT_E_FORMAT, "checkpoint: the mask of %s does not fit its weights", p->name);
    }
    return APT_OK;
}

/* The plan must be this trainer's; *done and history[0..done) come from the file. */
static apt_result apti_ckpt_read_iterations(const apt_trainer *t, apti_ckpt_reader *r, const char *path, apt_iteration **history,
                                            int32_t *done)
{
    const apti_iterative *it = &t->iterative;
    const bool planned = it->chosen != NULL;
    const void *plan = NULL, *chosen = NULL, *data = NULL;
    double mine[APTI_PLAN_REALS], x[APTI_ITERATION_REALS];
    *done = 0;
    if (apti_ckpt_has(r, "iterative.plan") != planned)
        return apti_fail(t->ctx, APT_E_STATE, "%s: it was written %s apt_trainer_iterative; this trainer runs %s", path,
                         planned ? "without" : "with", planned ? "with it" : "without: call it before apt_checkpoint_load");
    if (!planned) return APT_OK;
    apt_result result = apti_ckpt_find(r, "iterative.plan", APT_F64, APTI_PLAN_REALS, &plan, NULL);
    if (result == APT_OK) result = apti_ckpt_find(r, "iterative.chosen", APT_U8, t->model->param_count, &chosen, NULL);
    if (result != APT_OK) return result;
    apti_iterative_plan(it, mine);
    if (memcmp(mine, plan, sizeof mine) != 0 || memcmp(it->chosen, chosen, (size_t)t->model->param_count) != 0)
        return apti_fail(t->ctx, APT_E_STATE, "%s: it was written with another plan of iterative pruning", path);
    *history = (apt_iteration *)apti_calloc(t->ctx, it->desc.iterations, (int64_t)sizeof(apt_iteration));
    if (*history == NULL) return apti_fail(t->ctx, APT_E_MEMORY, "checkpoint: no memory for its iterations");
    for (int32_t i = 0; i < it->desc.iterations && result == APT_OK; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "%d", (int)i);
        const apti_ckpt_name key = apti_ckpt_key("iterative", name);
        if (!apti_ckpt_has(r, key.text)) break;
        result = apti_ckpt_find(r, key.text, APT_F64, APTI_ITERATION_REALS, &data, NULL);
        if (result != APT_OK) break;
        memcpy(x, data, sizeof x);
        if (!apti_iteration_unpack(&(*history)[i], x))
            return apti_fail(t->ctx, APT_E_RANGE, "%s: iteration %d holds numbers out of range", path, (int)i);
        (*history)[i].number = i + 1;
        *done = i + 1;
    }
    return result;
}

/* All that a load makes before it touches the trainer. */
typedef struct apti_ckpt_load {
    apt_model *student, *teacher;
    apti_pass *pass, *teacher_pass;
    apti_transform transform;
    apti_unit_arrays arrays;
    float *importance, **capture;
    apt_iteration *history;
    int32_t iterations;
    int64_t ints[APTI_CKPT_INTS], probes;
    double reals[APTI_CKPT_REALS];
} apti_ckpt_load;

static void apti_ckpt_load_free(apt_ctx *ctx, apti_ckpt_load *c)
{
    if (c->student != NULL) apti_model_free(c->student);
    if (c->teacher != NULL) apti_model_free(c->teacher);
    apti_pass_free(ctx, c->pass);
    apti_pass_free(ctx, c->teacher_pass);
    apti_param_release(ctx, &c->transform.a);
    apti_param_release(ctx, &c->transform.b);
    apti_free(ctx, c->transform.place);
    apti_unit_arrays_free(ctx, &c->arrays);
    apti_free(ctx, c->importance);
    apti_free(ctx, c->capture);
    apti_free(ctx, c->history);
}

/* A file with right checksums may still be hostile: counters that later code multiplies or compares stay in their ranges. */
static apt_result apti_ckpt_check_counters(const apt_trainer *t, const char *path, const apti_ckpt_load *c)
{
    const int64_t most = (int64_t)1 << 48, *i = c->ints;
    const int64_t counters[][2] = {{i[APTI_CKPT_STEP], t->desc.steps}, {i[APTI_CKPT_MICRO], t->desc.accumulate - 1},
                                   {i[APTI_CKPT_ADAM_STEPS], t->desc.steps}, {i[APTI_CKPT_BUDGET], most},
                                   {i[APTI_CKPT_TOKENS], most}, {i[APTI_CKPT_PROBE_ROWS], most},
                                   {i[APTI_CKPT_STAGE], i[APTI_CKPT_MICRO] > 0 ? 0 : APTI_STAGES - 1}};
    for (size_t k = 0; k < sizeof(counters) / sizeof(counters[0]); k++)
        if (counters[k][0] < 0 || counters[k][0] > counters[k][1])
            return apti_fail(t->ctx, APT_E_RANGE, "%s: counter %d is %lld; expected 0..%lld", path, (int)k,
                             (long long)counters[k][0], (long long)counters[k][1]);
    for (int32_t k = 0; k < APTI_CKPT_REALS; k++)
        if (!apti_finite((float)c->reals[k]))
            return apti_fail(t->ctx, APT_E_NONFINITE, "%s: number %d of its state is %g", path, (int)k, c->reals[k]);
    return APT_OK;
}

static apt_result apti_ckpt_read_state(apt_trainer *t, apti_ckpt_reader *r, const char *path, apti_ckpt_load *c)
{
    const void *data = NULL;
    apt_result result = apti_ckpt_find(r, "state.ints", APT_I64, APTI_CKPT_INTS, &data, NULL);
    if (result != APT_OK) return result;
    memcpy(c->ints, data, sizeof(c->ints));
    result = apti_ckpt_compare_model(t, path, c->ints);
    if (result == APT_OK) result = apti_ckpt_find(r, "state.reals", APT_F64, APTI_CKPT_REALS, &data, NULL);
    if (result != APT_OK) return result;
    memcpy(c->reals, data, sizeof(c->reals));
    result = apti_ckpt_find(r, "state.desc", APT_F64, APTI_FIELDS, &data, NULL);
    if (result != APT_OK) return result;
    double desc[APTI_FIELDS];
    memcpy(desc, data, sizeof(desc));
    result = apti_ckpt_compare_desc(t, path, desc);
    return result == APT_OK ? apti_ckpt_check_counters(t, path, c) : result;
}

static apt_result apti_ckpt_read_units(apt_trainer *t, apti_ckpt_reader *r, apti_ckpt_load *c)
{
    apt_units u;
    const void *keep = NULL;
    const int64_t n = apti_sites(t->model);
    apt_model_units(c->student, &u);
    c->probes = apti_probe_count(c->student);
    apt_result result = apti_unit_arrays_make(c->student, &c->arrays, u.total, c->probes);
    if (result == APT_OK) result = apti_ckpt_floats(r, "state", "salience", c->arrays.salience, u.total);
    if (result == APT_OK) result = apti_ckpt_find(r, "state.keep", APT_U8, u.total, &keep, NULL);
    if (result == APT_OK) memcpy(c->arrays.keep, keep, (size_t)u.total);
    if (result == APT_OK && (c->ints[APTI_CKPT_MICRO] > 0 || c->ints[APTI_CKPT_STAGE] != APTI_STAGE_NONE))
        result = apti_ckpt_floats(r, "state", "probe", c->arrays.probe, 3 * c->probes);
    c->importance = (float *)apti_alloc(t->ctx, n, (int64_t)sizeof(float));
    if (result == APT_OK && c->importance == NULL)
        result = apti_fail(t->ctx, APT_E_MEMORY, "checkpoint: no memory for importance");
    return result == APT_OK ? apti_ckpt_floats(r, "state", "importance", c->importance, n) : result;
}

static apt_result apti_ckpt_read_teacher(apt_trainer *t, apti_ckpt_reader *r, apti_ckpt_load *c, bool gradients)
{
    apt_result result = apti_ckpt_frame(t, r, "teacher", &c->teacher);
    if (result != APT_OK) return result;
    const apt_model *share = apti_ckpt_has_key(r, "teacher", c->student->embed[APTI_WORD]->name) ? NULL : c->student;
    if (share != NULL && c->teacher->config.hidden != share->config.hidden)
        return apti_fail(t->ctx, APT_E_FORMAT,
                         "checkpoint: the teacher has no weights of its own and another shape than the student");
    for (int32_t l = 0; share != NULL && l < share->config.layers; l++)
        if (memcmp(&share->shape[l], &c->teacher->shape[l], sizeof(apt_layer_shape)) != 0)
            return apti_fail(t->ctx, APT_E_FORMAT, "checkpoint: the teacher shares weights but layer %d has another shape",
                             (int)l);
    result = apti_ckpt_read_model(t, r, "teacher", c->teacher, share, false, false);
    if (result == APT_OK) result = apti_ckpt_read_transform(t, r, c->student, c->teacher, &c->transform, gradients);
    if (result == APT_OK) result = apti_pass_create(c->teacher, &c->teacher_pass);
    c->capture = (float **)apti_calloc(t->ctx, t->model->config.layers, (int64_t)sizeof(float *));
    return result == APT_OK && c->capture == NULL ? apti_fail(t->ctx, APT_E_MEMORY, "checkpoint: no memory for the teacher")
                                                  : result;
}

/* The model keeps its address; its contents become those of `fresh`, which takes the old ones with it. */
static void apti_model_exchange(apt_model *model, apt_model *fresh)
{
    const apt_model old = *model;
    *model = *fresh;
    *fresh = old;
    model->next = old.next;
    model->trainer = old.trainer;
    model->pass = NULL;
    model->structure = old.structure + 1;
    fresh->next = NULL;
    fresh->trainer = NULL;
}

static void apti_ckpt_adopt(apt_trainer *t, apti_ckpt_load *c)
{
    apti_teacher_drop(t);
    apti_pass_free(t->ctx, t->pass);
    t->pass = c->pass;
    apti_unit_arrays_adopt(t, &c->arrays, c->probes);
    memset(&c->arrays, 0, sizeof(c->arrays));
    apti_free(t->ctx, t->importance);
    t->importance = c->importance;
    apti_model_exchange(t->model, c->student);
    t->pass->model = t->model;
    t->teacher = c->teacher;
    t->teacher_pass = c->teacher_pass;
    t->transform = c->transform;
    t->capture = c->capture;
    c->pass = c->teacher_pass = NULL;
    c->importance = NULL;
    c->capture = NULL;
    c->teacher = NULL;
    if (c->history != NULL) {
        apti_free(t->ctx, t->iterative.history);
        t->iterative.history = c->history;
        c->history = NULL;
    }
    t->iterative.done = c->iterations;
    memset(&c->transform, 0, sizeof(c->transform));
    t->structure = t->model->structure;
    t->step = c->ints[APTI_CKPT_STEP];
    t->micro = (int32_t)c->ints[APTI_CKPT_MICRO];
    t->adam_steps = c->ints[APTI_CKPT_ADAM_STEPS];
    t->moving = c->ints[APTI_CKPT_MOVING] != 0;
    t->observed = c->ints[APTI_CKPT_OBSERVED] != 0;
    t->has_metric = c->ints[APTI_CKPT_HAS_METRIC] != 0;
    t->adapter_budget = c->ints[APTI_CKPT_BUDGET];
    t->stage = (int32_t)c->ints[APTI_CKPT_STAGE];
    t->sparsity = c->reals[APTI_CKPT_SPARSITY];
    t->best_metric = c->reals[APTI_CKPT_BEST];
    apti_info_begin(t);
    t->info.tokens = c->ints[APTI_CKPT_TOKENS];
    t->probe.rows = c->ints[APTI_CKPT_PROBE_ROWS];
    t->info.loss = c->reals[APTI_CKPT_LOSS];
    t->info.task_loss = c->reals[APTI_CKPT_TASK_LOSS];
    t->info.distill_loss = c->reals[APTI_CKPT_DISTILL_LOSS];
    t->info.sparsity_target = c->reals[APTI_CKPT_TARGET];
    t->info.milliseconds = c->reals[APTI_CKPT_TIME];
    t->info.teacher_milliseconds = c->reals[APTI_CKPT_TEACHER_TIME];
}

static apt_result apti_ckpt_user(apt_trainer *t, apti_ckpt_reader *r, const char *path, void *user, size_t *user_bytes)
{
    const void *data = NULL;
    int64_t found = 0;
    if (user_bytes == NULL) return APT_OK;
    if (apti_ckpt_has(r, "user")) {
        const apt_result result = apti_ckpt_find(r, "user", APT_U8, -1, &data, &found);
        if (result != APT_OK) return result;
    }
    if ((uint64_t)found > *user_bytes || (found > 0 && user == NULL))
        return apti_fail(t->ctx, APT_E_SCRATCH, "%s: the caller's data needs %lld bytes, room for %lld", path, (long long)found,
                         (long long)*user_bytes);
    if (found > 0) memcpy(user, data, (size_t)found);
    *user_bytes = (size_t)found;
    return APT_OK;
}

APT_API apt_result apt_checkpoint_load(apt_trainer *trainer, const char *path, void *user, size_t *user_bytes)
{
    apti_ckpt_reader *r = NULL;
    apti_ckpt_load c = APT_ZERO;
    if (trainer == NULL) return APT_E_ARGUMENT;
    apt_trainer *t = trainer;
    if (path == NULL) return apti_fail(t->ctx, APT_E_ARGUMENT, "apt_checkpoint_load: path is NULL");
    if (t->step != 0 || t->micro != 0 || t->working)
        return apti_fail(t->ctx, APT_E_STATE, "%s: checkpoints load into a fresh trainer only", path);
    apt_result result = apti_ckpt_open(t->ctx, path, &r);
    if (result != APT_OK) return result;
    result = apti_ckpt_read_state(t, r, path, &c);
    const bool gradients = c.ints[APTI_CKPT_MICRO] > 0;
    if (result == APT_OK) result = apti_ckpt_frame(t, r, "model", &c.student);
    if (result == APT_OK) result = apti_ckpt_read_model(t, r, "model", c.student, NULL, true, gradients);
    if (result == APT_OK) result = apti_ckpt_read_masks(r, c.student);
    if (result == APT_OK) result = apti_ckpt_read_iterations(t, r, path, &c.history, &c.iterations);
    if (result == APT_OK) result = apti_ckpt_read_units(t, r, &c);
    if (result == APT_OK) result = apti_pass_create(c.student, &c.pass);
    if (result == APT_OK && apti_ckpt_has_key(r, "teacher", "hidden")) result = apti_ckpt_read_teacher(t, r, &c, gradients);
    if (result == APT_OK) result = apti_ckpt_user(t, r, path, user, user_bytes);
    if (result == APT_OK) apti_ckpt_adopt(t, &c);
    apti_ckpt_load_free(t->ctx, &c);
    apti_ckpt_close(r);
    return result;
}
#endif /* APT_ONLY_CORE */

#ifndef APT_ONLY_CORE
// >>context
/* ---------------------------------------------------------------------------------------------------------------------
   Making and ending a context. These come last because they touch every section.
   ------------------------------------------------------------------------------------------------------------------ */

/* What the system and the caller give: threads, kernels, scratch. */
static apt_result apti_context_start(apt_ctx *ctx)
{
    ctx->kernels = apti_kernels_find(ctx->desc.kernels);
    if (ctx->kernels == NULL)
        return apti_fail(ctx, APT_E_UNSUPPORTED, "kernels '%.100s' are unknown, not compiled in or not supported by this CPU",
                         ctx->desc.kernels != NULL ? ctx->desc.kernels : "(best)");
    ctx->desc.kernels = NULL;                    /* the caller's text may go */
    ctx->threads = ctx->desc.threads > 0 ? ctx->desc.threads : apti_cpu_count();
#ifndef APTI_THREADS
    if (ctx->desc.parallel_for == NULL) ctx->threads = 1;
#endif
    ctx->scratch_bytes = APTI_SCRATCH_BYTES;
    for (int32_t i = 0; i < ctx->threads; i++) {
        ctx->scratch[i] = apti_alloc(ctx, APTI_SCRATCH_BYTES, 1);
        if (ctx->scratch[i] == NULL)
            return apti_fail(ctx, APT_E_MEMORY, "no memory for the scratch of %d threads", (int)ctx->threads);
    }
#ifdef APTI_THREADS
    if (ctx->threads > 1 && ctx->desc.parallel_for == NULL) return apti_pool_create(ctx);
#endif
    return APT_OK;
}

/* ctx is a zeroed local context that only serves for the message. */
static apt_result apti_check_desc(apt_ctx *ctx, const apt_desc *desc)
{
    /* First: behind a wrong canary no pointer of desc, the logger included, can be trusted. */
    if (desc->start_canary != 0 || desc->end_canary != 0)
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_desc was not initialised: start with apt_desc desc = APT_ZERO");
    ctx->desc = *desc;
    if ((desc->alloc == NULL) != (desc->release == NULL))
        return apti_fail(ctx, APT_E_ARGUMENT, "apt_desc.alloc and .release: both or none");
    if (desc->threads < 0 || desc->threads > APTI_MAX_THREADS)
        return apti_fail(ctx, APT_E_RANGE, "apt_desc.threads is %d, must be 0..%d", (int)desc->threads, APTI_MAX_THREADS);
    return APT_OK;
}

APT_API apt_ctx *apt_create(const apt_desc *desc)
{
    apt_ctx first;                               /* counts and reports until the real one exists */
    memset(&first, 0, sizeof first);
    if (desc != NULL && apti_check_desc(&first, desc) != APT_OK) return NULL;
    apt_ctx *ctx = (apt_ctx *)apti_alloc(&first, 1, (int64_t)sizeof(apt_ctx));
    if (ctx == NULL) {
        (void)apti_fail(&first, APT_E_MEMORY, "no memory for a context");
        return NULL;
    }
    memcpy(ctx, &first, sizeof first);
    if (apti_context_start(ctx) == APT_OK) return ctx;
    apt_destroy(ctx);
    return NULL;
}

APT_API void apt_destroy(apt_ctx *ctx)
{
    if (ctx == NULL) return;
    while (ctx->models != NULL) apt_model_destroy(ctx->models);
    while (ctx->modules != NULL) apt_module_destroy(ctx->modules);
#ifdef APTI_THREADS
    apti_pool_destroy(ctx);
#endif
    for (int32_t i = 0; i < APTI_MAX_THREADS; i++) apti_free(ctx, ctx->scratch[i]);
    apt_ctx last;                                /* apti_free writes to the context after the release */
    memcpy(&last, ctx, sizeof last);
    apti_free(&last, ctx);
}

APT_API const char *apt_error(const apt_ctx *ctx)
{
    return ctx != NULL ? ctx->error : "";
}

APT_API apt_memory apt_memory_info(const apt_ctx *ctx)
{
    apt_memory info = APT_ZERO;
    if (ctx == NULL) return info;
    info.bytes = ctx->bytes;
    info.peak_bytes = ctx->peak_bytes;
    info.blocks = ctx->blocks;
    return info;
}

APT_API void apt_memory_reset_peak(apt_ctx *ctx)
{
    if (ctx != NULL) ctx->peak_bytes = ctx->bytes;
}

APT_API const char *apt_kernel_name(const apt_ctx *ctx)
{
    return ctx != NULL ? ctx->kernels->name : "";
}

APT_API int32_t apt_thread_count(const apt_ctx *ctx)
{
    return ctx != NULL ? ctx->threads : 0;
}
#endif /* APT_ONLY_CORE */

#ifdef __cplusplus
}
#endif
#endif /* APT_IMPLEMENTATION */

/*
   This software is available under two licenses: choose whichever you prefer.

   -------------------------------------------------------------------------------
   ALTERNATIVE A - MIT License

   Copyright (c) 2026 the apt.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of
   this software and associated documentation files (the "Software"), to deal in
   the Software without restriction, including without limitation the rights to
   use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
   of the Software, and to permit persons to whom the Software is furnished to do
   so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all
   copies or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
   SOFTWARE.

   -------------------------------------------------------------------------------
   ALTERNATIVE B - Public Domain (www.unlicense.org)

   This is free and unencumbered software released into the public domain.

   Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
   software, either in source code form or as a compiled binary, for any purpose,
   commercial or non-commercial, and by any means.

   In jurisdictions that recognize copyright laws, the author or authors of this
   software dedicate any and all copyright interest in the software to the public
   domain. We make this dedication for the benefit of the public at large and to
   the detriment of our heirs and successors. We intend this dedication to be an
   overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
   IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
   FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
   AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
   ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
   WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
