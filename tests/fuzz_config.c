/* Fuzz target: config.json. What is accepted makes the frame of a model, is written again and must then read as the same model.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_config.c -lm -lpthread && ./a.out corpus/config */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"config.json", "config.json of an int8 model", "config.json of an int4 model",
                                           NULL};                     /* by APT_QUANT_* */
#include "fuzz.h"

static void compare(const apt_config *a, const apt_config *b)
{
    fuzz_check(a->family == b->family && a->task == b->task && a->vocab == b->vocab && a->positions == b->positions);
    fuzz_check(a->types == b->types && a->hidden == b->hidden && a->hidden_dense == b->hidden_dense);
    fuzz_check(a->head_dim == b->head_dim);
    fuzz_check(a->layers == b->layers && a->labels == b->labels && a->pad_id == b->pad_id && a->activation == b->activation);
    fuzz_check(a->quant == b->quant);
    fuzz_check(apti_bits(a->norm_eps) == apti_bits(b->norm_eps) && apti_bits(a->init_range) == apti_bits(b->init_range));
    fuzz_check(memcmp(a->layer, b->layer, (size_t)a->layers * sizeof(*a->layer)) == 0);
}

static void write_again(apt_ctx *ctx, const apt_model *model)
{
    apti_json_out out;
    apti_model_file file;
    apt_model *again = NULL;
    const char *text = NULL;
    int64_t bytes = 0;
    apti_json_begin(&out, ctx, 2);
    apti_config_put(&out, &model->config);
    fuzz_check(apti_json_end(&out, &text, &bytes) == APT_OK);
    fuzz_check(apti_config_parse(ctx, "again", text, bytes, &file) == APT_OK);
    fuzz_check(apti_config_resolve(ctx, "again", &file, APT_TASK_NONE, 0) == APT_OK);
    fuzz_check(apti_model_frame(ctx, &file.config, APT_F32, &again) == APT_OK);
    compare(&model->config, &again->config);
    apti_model_free(again);
    apti_model_file_free(ctx, &file);
    apti_json_drop(&out);
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    apt_ctx *ctx = fuzz_ctx;
    uint32_t accepted = 0;
    for (int task = APT_TASK_NONE; task <= APT_TASK_LM; task++) {
        apti_model_file file;
        apt_model *model = NULL;
        if (apti_config_parse(ctx, "fuzz", data, (int64_t)size, &file) != APT_OK) {
            fuzz_check(file.layer == NULL && apt_error(ctx)[0] != 0);
            return accepted;
        }
        if (apti_config_resolve(ctx, "fuzz", &file, (apt_task_kind)task, 0) == APT_OK &&
            apti_model_frame(ctx, &file.config, APT_F32, &model) == APT_OK) {
            write_again(ctx, model);
            accepted |= 1u << model->config.quant;
            apti_model_free(model);
        }
        apti_model_file_free(ctx, &file);
    }
    return accepted;
}
