/* ex_layers.h - the layers of a model from outside: which of their weights are 0, masks for those, a model of fewer layers.

   Include after ex_run.h. */
#ifndef EX_LAYERS_H
#define EX_LAYERS_H

/* The next matrix of the layers from entry *i on, and its values; false behind the last. free(*values) */
EX_API bool exi_layers_next(const apt_model *model, int32_t *i, apt_parameter *p, float **values)
{
    apt_config config = APT_ZERO;
    apt_model_config(model, &config);
    while (*i < apt_model_parameters(model)) {
        if (apt_model_parameter(model, (*i)++, p) != APT_OK || p->dims != 2 || exi_layer_of(&config, p->name) < 0) continue;
        *values = (float *)ex_alloc((size_t)(p->rows * p->cols), sizeof(float));
        if (apt_model_get(model, p->name, *values, p->rows * p->cols) == APT_OK) return true;
        free(*values);
    }
    return false;
}

EX_API int64_t ex_layers_zeros(const apt_model *model)
{
    apt_parameter p;
    float *values = NULL;
    int64_t zeros = 0;
    for (int32_t i = 0; exi_layers_next(model, &i, &p, &values);) {
        for (int64_t k = 0; k < p.rows * p.cols; k++) zeros += !(fabsf(values[k]) > 0);
        free(values);
    }
    return zeros;
}

/* Folders hold the zeros of magnitude pruning and not its masks: here they come back, so that what is 0 stays 0. */
EX_API bool ex_layers_mask(apt_ctx *ctx, apt_model *model, ex_error *error)
{
    apt_parameter p;
    float *values = NULL;
    bool fine = true;
    for (int32_t i = 0; fine && exi_layers_next(model, &i, &p, &values);) {
        const int64_t n = p.rows * p.cols, words = apt_bitmask_words(n);
        uint64_t *mask = (uint64_t *)ex_alloc((size_t)words, sizeof(uint64_t));
        for (int64_t k = 0; k < n; k++) mask[k / 64] |= (uint64_t)(fabsf(values[k]) > 0) << k % 64;
        fine = apt_model_set_bitmask(model, p.name, mask, words) == APT_OK || ex_fail(error, "%s", apt_error(ctx));
        free(mask);
        free(values);
    }
    return fine;
}

/* An encoder's name with another layer's number: "encoder.layer.1.output" -> "encoder.layer.3.output"; free() */
EX_API char *exi_layers_rename(const char *name, int32_t layer)
{
    const char *at = strstr(name, ".layer.");
    if (at == NULL || layer < 0) return ex_copy(name, strlen(name));
    at += strlen(".layer.");
    return ex_format("%.*s%d%s", (int)(at - name), name, (int)layer, at + strspn(at, "0123456789"));
}

/* Layer i of `part` becomes layer from[i] of `whole`; what belongs to no layer is the same. */
EX_API bool exi_layers_copy(apt_ctx *ctx, apt_model *part, const apt_model *whole, const int32_t *from, ex_error *error)
{
    apt_config config = APT_ZERO;
    bool fine = true;
    apt_model_config(part, &config);
    for (int32_t i = 0; fine && i < apt_model_parameters(part); i++) {
        apt_parameter p;
        if (apt_model_parameter(part, i, &p) != APT_OK) return ex_fail(error, "%s", apt_error(ctx));
        const int32_t layer = exi_layer_of(&config, p.name);
        char *name = exi_layers_rename(p.name, layer >= 0 ? from[layer] : -1);
        float *values = (float *)ex_alloc((size_t)(p.rows * p.cols), sizeof(float));
        fine = apt_model_get(whole, name, values, p.rows * p.cols) == APT_OK &&
               apt_model_set(part, p.name, values, p.rows * p.cols) == APT_OK;
        free(name);
        free(values);
    }
    return fine || ex_fail(error, "%s", apt_error(ctx));
}

/* *model, an encoder, is replaced by one of `left` of its layers (0: half of them): every n-th, the last one among them. */
EX_API bool ex_layers_keep(apt_ctx *ctx, apt_model **model, int32_t left, int64_t seed, ex_error *error)
{
    apt_config config = APT_ZERO;
    apt_model *part = NULL;
    apt_model_config(*model, &config);
    const int32_t layers = config.layers;
    if (left == 0) left = (layers + 1) / 2;
    if (left >= layers)
        return ex_fail(error, "a student of %d layers: the model has %d; expected fewer", (int)left, (int)layers);
    int32_t *from = (int32_t *)ex_alloc((size_t)left, sizeof(int32_t));
    apt_layer_shape *shape = (apt_layer_shape *)ex_alloc((size_t)left, sizeof(apt_layer_shape));
    printf("  of layers 0 to %d it keeps", (int)layers - 1);
    for (int32_t i = 0; i < left; i++) {
        from[i] = (i + 1) * layers / left - 1;
        shape[i] = config.layer[from[i]];
        printf(" %d", (int)from[i]);
    }
    printf("\n");
    config.layers = left;
    config.layer = shape;
    const bool made = apt_model_create(ctx, &config, (uint64_t)seed, &part) == APT_OK;
    const bool fine = made ? exi_layers_copy(ctx, part, *model, from, error) : ex_fail(error, "%s", apt_error(ctx));
    if (made) {
        apt_model_destroy(*model);
        *model = part;
    }
    free(from);
    free(shape);
    return fine;
}

#endif /* EX_LAYERS_H */
