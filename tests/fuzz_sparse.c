/* Fuzz target: compressed matrices, the input as a whole safetensors file.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_sparse.c -lm -lpthread && ./a.out corpus/sparse */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"safetensors with a compressed matrix", "compressed matrix", NULL};
#include "fuzz.h"

/* What is accepted is finite, fits its file, and written again it is the same bytes. */
static bool check_one(apt_ctx *ctx, const apti_tensor_view *tensor, size_t size)
{
    apti_sparse_view view;
    apt_sparse s;
    if (apti_sparse_open(ctx, "fuzz", tensor, &view) != APT_OK) return false;
    const int64_t n = (int64_t)view.rows * view.cols;
    fuzz_check(view.count <= n && apt_sparse_bytes(view.rows, view.cols, view.count) == tensor->bytes && n <= 8 * (int64_t)size);
    float *w = (float *)malloc((size_t)n * sizeof(float) + 1), *x = (float *)malloc((size_t)n * sizeof(float) + 1);
    uint8_t *again = (uint8_t *)malloc((size_t)tensor->bytes);
    fuzz_check(w != NULL && x != NULL && again != NULL);
    apti_sparse_expand(w, &view);
    fuzz_check(apti_finite_all(w, n) && apt_sparse_count(w, view.cols, view.rows, view.cols) == view.count);
    apti_sparse_encode(again, w, view.rows, view.cols);
    fuzz_check(memcmp(again, tensor->data, (size_t)tensor->bytes) == 0);
    if (apti_sparse_reserve(ctx, &s, view.rows, view.cols, view.count) == APT_OK) {
        apti_sparse_copy(&s, &view);
        fuzz_check(apt_sparse_unpack(x, view.cols, &s) == APT_OK && memcmp(x, w, (size_t)n * sizeof(float)) == 0);
        apt_sparse_free(ctx, &s);
    }
    free(w);
    free(x);
    free(again);
    return true;
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
    for (int32_t i = 0; i < set->count && result == APT_OK; i++)
        if (apti_is_sparse_name(set->views[i].name) && check_one(ctx, &set->views[i], size)) accepted |= 1;
    apti_tensors_close(set);

    apti_tensor_view plain;                      /* and the input as one tensor, without a header in front */
    memset(&plain, 0, sizeof plain);
    plain.name = "fuzz.sparse";
    plain.dtype = APT_U8;
    plain.dims = 1;
    plain.shape[0] = plain.bytes = (int64_t)size;
    plain.data = data;
    return check_one(ctx, &plain, size) ? accepted | 2 : accepted;
}
