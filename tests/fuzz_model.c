/* Fuzz target: the weights of a model folder. The input is model.safetensors beside the config.json of a small BERT, once as
   float32, once as int8 and once as int4. What is loaded runs, is written again and must then load as the same model.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_model.c -lm -lpthread && ./a.out corpus/model

   --seeds DIR writes DIR/f32, DIR/int8 and DIR/int4, for when the format or the model has changed. */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"float32 weights", "int8 weights", "int4 weights", NULL};   /* by APT_QUANT_* */
static void write_seeds(const char *dir);
#define FUZZ_SEEDS write_seeds
#include "fuzz.h"

enum { MOST = 256 };                  /* values of a parameter of this model */

/* The down projection has 35 columns: two groups of int4, and half a byte that is left over. */
static apt_model *make_model(apt_ctx *ctx, int32_t quant)
{
    apt_config config = APT_ZERO;
    apt_quantize_desc desc = APT_ZERO;
    apt_model *model = NULL;
    config.family = APT_BERT;
    config.task = APT_TASK_CLASSIFY;
    config.vocab = 5;
    config.positions = 4;
    config.types = 1;
    config.hidden = 4;
    config.head_dim = 2;
    config.layers = 1;
    config.heads = 2;
    config.neurons = 35;
    config.labels = 2;
    desc.kind = quant;
    fuzz_check(apt_model_create(ctx, &config, 3, &model) == APT_OK);
    if (quant != APT_QUANT_NONE) fuzz_check(apt_model_quantize(model, &desc) == APT_OK);
    return model;
}

static const char *const kinds[] = {"f32", "int8", "int4"};

/* The path of that kind's folder, or of a file in it, behind fuzz_path's; overwritten by the next one. */
static const char *folder_ending(int32_t quant, const char *name)
{
    static char ending[64];
    snprintf(ending, sizeof ending, ".%s%s", kinds[quant], name);
    return ending;
}

static const char *folder_path(int32_t quant, const char *name)
{
    return fuzz_path(folder_ending(quant, name));
}

static void remove_folders(void)
{
    for (int32_t quant = APT_QUANT_NONE; quant <= APT_QUANT_INT4; quant++) {
        remove(folder_path(quant, "/config.json"));
        remove(folder_path(quant, "/model.safetensors"));
        remove(folder_path(quant, ""));
    }
}

/* For each kind a folder with config.json and weights, which live as long as the process. */
static void make_folders(apt_ctx *ctx)
{
    static bool made;
    if (made) return;
    for (int32_t quant = APT_QUANT_NONE; quant <= APT_QUANT_INT4; quant++) {
        apt_model *model = make_model(ctx, quant);
        fuzz_check(apt_model_save(model, folder_path(quant, "")) == APT_OK);
        apt_model_destroy(model);
    }
    made = atexit(remove_folders) == 0;
}

static apt_result run(apt_model *model)
{
    const int32_t offsets[3] = {0, 3, 5}, tokens[5] = {1, 2, 3, 4, 0};
    float logits[4];
    apt_batch batch = APT_ZERO;
    apt_output output = APT_ZERO;
    batch.sequences = 2;
    batch.offsets = offsets;
    batch.tokens = tokens;
    output.logits = logits;
    output.logits_capacity = 4;
    return apt_model_forward(model, &batch, &output);
}

/* Weights may be so large that a product overflows, which the forward may refuse, but nothing else. */
static void check_model(apt_ctx *ctx, apt_model *model, const char *folder)
{
    apt_model *again = NULL;
    const apt_result r = run(model);
    fuzz_check(r == APT_OK || r == APT_E_NONFINITE);
    fuzz_check(apt_model_save(model, folder) == APT_OK && apt_model_load(ctx, folder, NULL, &again) == APT_OK);
    fuzz_check(apt_model_parameters(model) == apt_model_parameters(again));
    for (int32_t i = 0; i < apt_model_parameters(model); i++) {
        float a[MOST], b[MOST];
        apt_parameter p;
        fuzz_check(apt_model_parameter(model, i, &p) == APT_OK && p.rows * p.cols <= MOST);
        fuzz_check(apt_model_get(model, p.name, a, p.rows * p.cols) == APT_OK);
        fuzz_check(apt_model_get(again, p.name, b, p.rows * p.cols) == APT_OK);
        fuzz_check(memcmp(a, b, (size_t)(p.rows * p.cols) * sizeof(float)) == 0);
    }
    apt_model_destroy(again);
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    apt_ctx *ctx = fuzz_ctx;
    uint32_t accepted = 0;
    make_folders(ctx);
    for (int32_t quant = APT_QUANT_NONE; quant <= APT_QUANT_INT4; quant++) {
        apt_model *model = NULL;
        fuzz_put(folder_ending(quant, "/model.safetensors"), data, size);
        if (apt_model_load(ctx, folder_path(quant, ""), NULL, &model) == APT_OK) {
            check_model(ctx, model, folder_path(quant, ""));
            accepted |= 1u << quant;
        } else fuzz_check(apt_error(ctx)[0] != 0);
        apt_model_destroy(model);
    }
    return accepted;
}

static void write_seeds(const char *dir)
{
    char path[600];
    make_folders(fuzz_ctx);
    for (int32_t quant = APT_QUANT_NONE; quant <= APT_QUANT_INT4; quant++) {
        snprintf(path, sizeof path, "%s/%s", dir, kinds[quant]);
        fuzz_check(rename(folder_path(quant, "/model.safetensors"), path) == 0);
    }
}
