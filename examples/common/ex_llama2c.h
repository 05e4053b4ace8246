/* ex_llama2c.h - checkpoints of Karpathy's llama2.c (legacy .bin files) as Hugging Face folders.

       ex_llama2c_import(ctx, "stories260K.bin", "tok512.bin", "stories", &error);

   A file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size is negative where the
   head is not tied to the embedding), then float32 arrays, of each kind those of all layers together:

       token_embedding, rms_att, wq, wk, wv, wo, rms_ffn, w1, w2, w3, rms_final, freq_cis_real, freq_cis_imag, [wcls]

   all little-endian. Its rotary pairs stand side by side in a head, those of Hugging Face half a head apart: the rows of wq and
   wk change places, and what is written is an ordinary LLaMA checkpoint. The two tables of angles are left out, as llama2.c
   itself leaves them out: theta is 10000. The tokenizer stays as it is, as tokenizer.bin. Include after apt.h and ex_tokenizer.h. */
#ifndef EX_LLAMA2C_H
#define EX_LLAMA2C_H

#define EXI_LLAMA2C_HEADER 28
#define EXI_LLAMA2C_MAGIC 0x616b3432u          /* "ak42": the later versions of the format */

/* heads > 0: rotary rows, so many heads of them. name NULL: floats that are passed over. */
typedef struct exi_llama2c_part { const char *name; int64_t rows, cols; bool layers; int32_t heads; } exi_llama2c_part;

typedef struct exi_llama2c {
    const char *path;
    FILE *file;
    apt_config config;
    exi_llama2c_part parts[13];
    int32_t count;
    unsigned char *bytes;             /* of one matrix */
    float *values;
    ex_error *error;
} exi_llama2c;

/* Ranges that apt.h has too, small enough for every product of them to fit an int64. */
EX_API bool exi_llama2c_header(exi_llama2c *l)
{
    static const char *const names[] = {"dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len"};
    static const int32_t most[] = {65536, 1048576, 1024, 4096, 4096, 1 << 24, 1 << 24};
    char header[EXI_LLAMA2C_HEADER];
    int64_t n[7];
    if (fread(header, 1, sizeof(header), l->file) != sizeof(header))
        return ex_fail(l->error, "%s: expected a checkpoint of llama2.c, found less than its header of %d bytes", l->path,
                       EXI_LLAMA2C_HEADER);
    if (exi_tok_u32(header) == EXI_LLAMA2C_MAGIC)
        return ex_fail(l->error, "%s: version %u of llama2.c's format is not supported, only the files without a version",
                       l->path, exi_tok_u32(header + 4));
    for (int i = 0; i < 7; i++) {
        const uint32_t bits = exi_tok_u32(header + 4 * i);
        n[i] = bits < 0x80000000u ? (int64_t)bits : (int64_t)bits - 0x100000000;
        if (i == 5) l->config.untied = n[i] < 0;
        if (i == 5 && n[i] < 0) n[i] = -n[i];
        if (n[i] < 1 || n[i] > most[i])
            return ex_fail(l->error, "%s: %s is %lld, expected 1 to %d", l->path, names[i], (long long)n[i], (int)most[i]);
    }
    if (n[0] % (2 * n[3]) != 0 || n[3] % n[4] != 0)
        return ex_fail(l->error, "%s: dim %lld, n_heads %lld, n_kv_heads %lld: expected heads of an even size, and n_kv_heads to "
                       "divide n_heads", l->path, (long long)n[0], (long long)n[3], (long long)n[4]);
    l->config.family = APT_LLAMA;
    l->config.task = APT_TASK_LM;
    l->config.hidden = (int32_t)n[0];
    l->config.neurons = (int32_t)n[1];
    l->config.layers = (int32_t)n[2];
    l->config.heads = (int32_t)n[3];
    l->config.kv_heads = (int32_t)n[4];
    l->config.vocab = (int32_t)n[5];
    l->config.positions = (int32_t)n[6];
    l->config.head_dim = (int32_t)(n[0] / n[3]);
    l->config.norm_eps = 1e-5f;
    l->config.end_id = 2;
    return true;
}

EX_API void exi_llama2c_part_add(exi_llama2c *l, const char *name, int64_t rows, int64_t cols, bool layers, int32_t heads)
{
    const exi_llama2c_part part = {name, rows, cols, layers, heads};
    l->parts[l->count++] = part;
}

/* The arrays in their order in the file. */
EX_API void exi_llama2c_list(exi_llama2c *l)
{
    const apt_config *c = &l->config;
    const int64_t d = c->hidden, h = c->neurons, kv = (int64_t)c->kv_heads * c->head_dim;
    exi_llama2c_part_add(l, "model.embed_tokens.weight", c->vocab, d, false, 0);
    exi_llama2c_part_add(l, "input_layernorm.weight", 1, d, true, 0);
    exi_llama2c_part_add(l, "self_attn.q_proj.weight", d, d, true, c->heads);
    exi_llama2c_part_add(l, "self_attn.k_proj.weight", kv, d, true, c->kv_heads);
    exi_llama2c_part_add(l, "self_attn.v_proj.weight", kv, d, true, 0);
    exi_llama2c_part_add(l, "self_attn.o_proj.weight", d, d, true, 0);
    exi_llama2c_part_add(l, "post_attention_layernorm.weight", 1, d, true, 0);
    exi_llama2c_part_add(l, "mlp.gate_proj.weight", h, d, true, 0);
    exi_llama2c_part_add(l, "mlp.down_proj.weight", d, h, true, 0);
    exi_llama2c_part_add(l, "mlp.up_proj.weight", h, d, true, 0);
    exi_llama2c_part_add(l, "model.norm.weight", 1, d, false, 0);
    exi_llama2c_part_add(l, NULL, c->positions, c->head_dim, false, 0);         /* both tables of angles */
    if (c->untied) exi_llama2c_part_add(l, "lm_head.weight", c->vocab, d, false, 0);
}

/* Nothing is allocated before the file is known to be as long as its header says. */
EX_API bool exi_llama2c_check_size(exi_llama2c *l)
{
    const int64_t found = ex_file_bytes(l->path);
    int64_t expected = EXI_LLAMA2C_HEADER;
    size_t most = 0;
    for (int32_t i = 0; i < l->count; i++) {
        const exi_llama2c_part *part = &l->parts[i];
        const int64_t count = part->rows * part->cols;
        expected += (int64_t)sizeof(float) * count * (part->layers ? l->config.layers : 1);
        if (part->name != NULL && (size_t)count > most) most = (size_t)count;
    }
    if (found != expected)
        return ex_fail(l->error, "%s: its header tells of a file of %lld bytes, found %lld", l->path, (long long)expected,
                       (long long)found);
    l->bytes = (unsigned char *)ex_alloc(most, sizeof(float));
    l->values = (float *)ex_alloc(most, sizeof(float));
    return true;
}

/* Row 2i + p of a head goes to row p * half + i. */
EX_API int64_t exi_llama2c_row(const exi_llama2c_part *part, int64_t row)
{
    const int64_t size = part->heads > 0 ? part->rows / part->heads : 0;
    return part->heads > 0 ? row / size * size + row % 2 * (size / 2) + row % size / 2 : row;
}

EX_API bool exi_llama2c_read(exi_llama2c *l, apt_ctx *ctx, apt_model *model, const exi_llama2c_part *part, int32_t layer)
{
    const int64_t count = part->rows * part->cols;
    char name[96];
    if (part->name == NULL) return fseek(l->file, (long)(count * (int64_t)sizeof(float)), SEEK_CUR) == 0 ||
                                   ex_fail(l->error, "%s: cannot be read: %s", l->path, strerror(errno));
    if (part->layers) snprintf(name, sizeof(name), "model.layers.%d.%s", (int)layer, part->name);
    else snprintf(name, sizeof(name), "%s", part->name);
    if (fread(l->bytes, sizeof(float), (size_t)count, l->file) != (size_t)count)
        return ex_fail(l->error, "%s: ends inside of what becomes '%s'", l->path, name);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = exi_tok_u32((const char *)l->bytes + (int64_t)sizeof(bits) * i);
        float value;
        memcpy(&value, &bits, sizeof(value));
        if (!ex_finite((double)value))
            return ex_fail(l->error, "%s: number %lld of what becomes '%s' is not finite", l->path, (long long)i, name);
        l->values[exi_llama2c_row(part, i / part->cols) * part->cols + i % part->cols] = value;
    }
    return apt_model_set(model, name, l->values, count) == APT_OK || ex_fail(l->error, "%s", apt_error(ctx));
}

EX_API bool exi_llama2c_fill(exi_llama2c *l, apt_ctx *ctx, apt_model *model)
{
    for (int32_t i = 0; i < l->count; i++) {
        const int32_t layers = l->parts[i].layers ? l->config.layers : 1;
        for (int32_t k = 0; k < layers; k++) {
            if (!exi_llama2c_read(l, ctx, model, &l->parts[i], k)) return false;
        }
    }
    return true;
}

/* The tokenizer's file has no count of its own, so that a wrong one shows here. */
EX_API bool exi_llama2c_tokenizer(const exi_llama2c *l, const char *path)
{
    if (!exi_ends_with(path, ".bin")) return ex_fail(l->error, "%s: expected a tokenizer of llama2.c (.bin)", path);
    ex_tokenizer *tokenizer = ex_tokenizer_load(path, l->error);
    if (tokenizer == NULL) return false;
    const int32_t size = ex_tokenizer_size(tokenizer);
    ex_tokenizer_free(tokenizer);
    return size == l->config.vocab || ex_fail(l->error, "%s has %d tokens, %s needs %d", path, (int)size, l->path,
                                              (int)l->config.vocab);
}

EX_API bool exi_llama2c_write(const exi_llama2c *l, apt_ctx *ctx, apt_model *model, const char *tokenizer, const char *out)
{
    return ex_make_dirs(out, l->error) &&
           (apt_model_save(model, out) == APT_OK || ex_fail(l->error, "%s", apt_error(ctx))) &&
           ex_copy_tokenizer(tokenizer, out, l->error);
}

/* Writes the folder `out`: config.json, model.safetensors, tokenizer.bin. Everything is checked before anything is written. */
EX_API bool ex_llama2c_import(apt_ctx *ctx, const char *checkpoint, const char *tokenizer, const char *out, ex_error *error)
{
    exi_llama2c l;
    apt_model *model = NULL;
    bool fine;
    memset(&l, 0, sizeof(l));
    l.path = checkpoint;
    l.error = error;
    l.file = fopen(checkpoint, "rb");
    if (l.file == NULL) return ex_fail(error, "%s: cannot be opened: %s", checkpoint, strerror(errno));
    fine = exi_llama2c_header(&l);
    if (fine) exi_llama2c_list(&l);
    fine = fine && exi_llama2c_check_size(&l) && exi_llama2c_tokenizer(&l, tokenizer);
    if (fine && apt_model_create(ctx, &l.config, 0, &model) != APT_OK) fine = ex_fail(error, "%s", apt_error(ctx));
    fine = fine && exi_llama2c_fill(&l, ctx, model) && exi_llama2c_write(&l, ctx, model, tokenizer, out);
    apt_model_destroy(model);
    fclose(l.file);
    free(l.bytes);
    free(l.values);
    return fine;
}

#endif /* EX_LLAMA2C_H */
