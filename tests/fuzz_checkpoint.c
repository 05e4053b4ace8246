/* Fuzz target: checkpoints. The input is opened as it is, which its checksums mostly forbid, and then with its checksums made
   right, so that the trainer's own checks are reached: apt_checkpoint_load must refuse or give a trainer that can go on.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_checkpoint.c -lm -lpthread && ./a.out corpus/checkpoint

   --seeds DIR writes DIR/run, a checkpoint of the small run that it loads into, for when the format has changed. */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"checkpoint with the right sums", "checkpoint of this run", NULL};
static void write_seeds(const char *dir);
#define FUZZ_SEEDS write_seeds
#include "fuzz.h"

static apt_trainer *make_trainer(apt_ctx *ctx)
{
    apt_config config = APT_ZERO;
    apt_train_desc desc = APT_ZERO;
    apt_model *model = NULL;
    apt_trainer *trainer = NULL;
    config.family = APT_BERT;
    config.task = APT_TASK_CLASSIFY;
    config.vocab = 5;
    config.positions = 4;
    config.types = 1;
    config.hidden = 4;
    config.head_dim = 2;
    config.layers = 1;
    config.heads = 2;
    config.neurons = 3;
    config.labels = 2;
    desc.steps = 8;
    desc.rank = 1;
    desc.max_rank = 2;
    desc.target_sparsity = 0.3f;
    desc.update_frequency = 2;
    fuzz_check(apt_model_create(ctx, &config, 3, &model) == APT_OK);
    fuzz_check(apt_trainer_create(model, &desc, &trainer) == APT_OK);
    return trainer;
}

static apt_result step(apt_trainer *trainer)
{
    const int32_t offsets[3] = {0, 3, 5}, tokens[5] = {1, 2, 3, 4, 0}, labels[2] = {0, 1};
    apt_batch batch = APT_ZERO;
    apt_step_info info;
    batch.sequences = 2;
    batch.offsets = offsets;
    batch.tokens = tokens;
    batch.labels = labels;
    return apt_trainer_step(trainer, &batch, &info);
}

static apti_tensors *open_memory(apt_ctx *ctx, const uint8_t *data, size_t size)
{
    apti_tensors *set = NULL;
    fuzz_check(apti_tensors_new(ctx, "fuzz", 1, &set) == APT_OK);
    set->files[0].path = apti_copy_text(ctx, "fuzz");
    set->files[0].map.data = data;
    if (apti_tensors_read(set, 0, data, (int64_t)size) == APT_OK && apti_tensors_sort(set) == APT_OK) return set;
    set->files[0].map.data = NULL;
    apti_tensors_close(set);
    return NULL;
}

static void close_memory(apti_tensors *set)
{
    set->files[0].map.data = NULL;
    apti_tensors_close(set);
}

/* Puts the right sums into the table of a well-formed container. */
static void repair(apti_tensors *set, uint8_t *data)
{
    const apti_tensor_view *table = apti_tensors_find(set, APTI_CKPT_SUMS);
    int32_t *order = (int32_t *)malloc((size_t)(set->count + 1) * sizeof(int32_t));
    fuzz_check(order != NULL);
    for (int32_t i = 0; i < set->count; i++) order[i] = i;
    apti_sort_indices(order, set->count, apti_compare_places, set->views);
    if (table != NULL && table->bytes == 8 * (int64_t)set->count && table == &set->views[order[set->count - 1]]) {
        uint8_t *out = data + (table->data - data);
        uint64_t sum = apti_checksum(0, data, (size_t)(set->views[order[0]].data - data));
        memcpy(out, &sum, 8);
        for (int32_t i = 0; i + 1 < set->count; i++) {
            const apti_tensor_view *v = &set->views[order[i]];
            sum = apti_checksum(0, v->data, (size_t)v->bytes);
            memcpy(out + 8 * (i + 1), &sum, 8);
        }
    }
    free(order);
}

static bool go_on(apt_ctx *ctx, const uint8_t *data, size_t size)
{
    uint8_t user[64];
    size_t user_bytes = sizeof user;
    apt_trainer *trainer = make_trainer(ctx);
    const char *path = fuzz_put("", data, size);
    const bool loaded = apt_checkpoint_load(trainer, path, user, &user_bytes) == APT_OK;
    for (int i = 0; loaded && i < 10 && step(trainer) == APT_OK; i++) continue;
    if (!loaded) fuzz_check(step(trainer) == APT_OK);    /* refused: the trainer is as before */
    apt_model_destroy(apt_trainer_model(trainer));
    remove(path);
    return loaded;
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    apt_ctx *ctx = fuzz_ctx;
    uint32_t accepted = 0;
    apti_tensors *set = open_memory(ctx, data, size);
    if (set == NULL) return 0;
    if (apti_ckpt_accept(set) == APT_OK) accepted |= 1;
    close_memory(set);
    uint8_t *copy = (uint8_t *)malloc(size);
    fuzz_check(copy != NULL);
    memcpy(copy, data, size);
    set = open_memory(ctx, copy, size);
    fuzz_check(set != NULL);
    repair(set, copy);
    const bool repaired = apti_ckpt_accept(set) == APT_OK;
    close_memory(set);
    if (repaired && go_on(ctx, copy, size)) accepted |= 2;
    free(copy);
    return accepted;
}

static void write_seeds(const char *dir)
{
    char path[600];
    apt_trainer *trainer = make_trainer(fuzz_ctx);
    for (int i = 0; i < 4; i++) fuzz_check(step(trainer) == APT_OK);
    snprintf(path, sizeof path, "%s/run", dir);
    fuzz_check(apt_checkpoint_save(trainer, path, "user", 4) == APT_OK);
    apt_destroy(fuzz_ctx);
}
