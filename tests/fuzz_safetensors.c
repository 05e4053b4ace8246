/* Fuzz target: the safetensors reader (input as a whole file) and the shard index (input as model.safetensors.index.json).
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_safetensors.c -lm -lpthread && ./a.out corpus/safetensors */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"safetensors", "shard index", NULL};
#include "fuzz.h"

/* Every tensor lies in the file and is as long as type and shape say; together they are as long as the data. */
static void check_set(apti_tensors *set, const uint8_t *data, size_t size)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < set->count; i++) {
        const apti_tensor_view *v = &set->views[i];
        int64_t values = 0;
        fuzz_check(v->data >= data + 8 && v->bytes >= 0 && v->bytes <= (int64_t)size && v->data + v->bytes <= data + size);
        fuzz_check(apti_shape_count(v->shape, v->dims, &values) && values * apti_dtype_bytes(v->dtype) == v->bytes);
        fuzz_check((int64_t)strlen(v->name) == v->name_bytes && apti_tensors_find(set, v->name) == v);
        fuzz_check(i == 0 || strcmp(set->views[i - 1].name, v->name) < 0);
        sum += v->bytes;
        float *out = (float *)malloc((size_t)values * sizeof(float) + 1);
        fuzz_check(out != NULL);
        if (apti_tensor_to_f32(set, v, out) == APT_OK) fuzz_check(apti_finite_all(out, values));
        free(out);
    }
    uint64_t header = 0;
    memcpy(&header, data, 8);
    fuzz_check((uint64_t)sum + 8 + header == size);
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    apt_ctx *ctx = fuzz_ctx;
    uint32_t accepted = 0;
    apti_tensors *set = NULL;
    fuzz_check(apti_tensors_new(ctx, "fuzz", 1, &set) == APT_OK);
    set->files[0].path = apti_copy_text(ctx, "fuzz");
    apt_result result = apti_tensors_read(set, 0, data, (int64_t)size);
    if (result == APT_OK) result = apti_tensors_sort(set);
    if (result == APT_OK) check_set(set, data, size);
    if (result == APT_OK && set->count > 0) accepted |= 1;
    apti_tensors_close(set);

    apti_shards shards;
    memset(&shards, 0, sizeof shards);
    shards.ctx = ctx;
    shards.dir = "/nonexistent";
    shards.path = apti_copy_text(ctx, "fuzz.index.json");
    if (apti_shards_parse(&shards, (const char *)data, (int64_t)size) == APT_OK) {
        for (int32_t i = 0; i < shards.count; i++)
            fuzz_check(strchr(shards.entries[i].shard, '/') == NULL && strstr(shards.entries[i].shard, "..") == NULL);
        accepted |= 2;
    }
    apti_shards_free(&shards);
    return accepted;
}
