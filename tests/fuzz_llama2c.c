/* Fuzz target: files of llama2.c and what llama --import makes of them. The first byte chooses: behind a T stands a tokenizer, to
   which a checkpoint is made, otherwise a checkpoint, to which a tokenizer is made. What is accepted must load again, with every
   number where it belongs; what is refused must leave nothing behind.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_llama2c.c -lutf8proc -lm -lpthread && ./a.out corpus/llama2c

   --seeds DIR writes DIR/tied, DIR/untied and DIR/tokenizer. */
#define _POSIX_C_SOURCE 200809L
#define STB_DS_IMPLEMENTATION
#include "../examples/common/ex_base.h"
#define APT_IMPLEMENTATION
#include "../apt.h"
#include "../examples/common/ex_tokenizer.h"
#include "../examples/common/ex_llama2c.h"

static const char *const fuzz_formats[] = {"checkpoint", "checkpoint with a head of its own", "tokenizer", NULL};
static void write_seeds(const char *dir);
#define FUZZ_SEEDS write_seeds
#include "fuzz.h"

enum { LEAST = EXI_TOK_BIN_BYTES + 256, MOST = LEAST + 64 };          /* tokens of what is made here */

static void put_u32(ex_text *out, uint32_t x)
{
    const char bytes[4] = {(char)(x & 255), (char)(x >> 8 & 255), (char)(x >> 16 & 255), (char)(x >> 24)};
    ex_text_add(out, bytes, 4);
}

static void put_float(ex_text *out, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    put_u32(out, bits);
}

/* "<unk>", "\n<s>\n", "\n</s>\n", the bytes, letters. */
static void make_tokenizer(ex_text *out, int32_t tokens)
{
    static const char *const first[] = {"<unk>", "\n<s>\n", "\n</s>\n"};
    put_u32(out, 6);
    for (int32_t i = 0; i < tokens; i++) {
        char piece[8];
        if (i < EXI_TOK_BIN_BYTES) snprintf(piece, sizeof piece, "%s", first[i]);
        else if (i < LEAST) snprintf(piece, sizeof piece, "<0x%02X>", (unsigned)(i - EXI_TOK_BIN_BYTES));
        else snprintf(piece, sizeof piece, "%c", '0' + i - LEAST);
        put_float(out, (float)-i);
        put_u32(out, (uint32_t)strlen(piece));
        ex_text_add(out, piece, strlen(piece));
    }
}

/* One layer: 4 wide, two heads that share their keys. */
static void make_checkpoint(ex_text *out, int32_t tokens, bool untied)
{
    const uint32_t header[7] = {4, 3, 1, 2, 1, untied ? 0u - (uint32_t)tokens : (uint32_t)tokens, 2};
    const int32_t count = tokens * 4 * (untied ? 2 : 1) + 4 + 16 + 8 + 8 + 16 + 4 + 3 * 12 + 4 + 2 * 2;
    for (int i = 0; i < 7; i++) put_u32(out, header[i]);
    for (int32_t i = 0; i < count; i++) put_float(out, (float)(i % 101) / 64 - 0.75f);
}

/* count numbers of the file, those of a rotary matrix (heads > 0) in this order of rows: all first halves of the pairs of a head,
   then all second ones. */
static void check_values(const apt_model *model, const char *name, const uint8_t *file, int64_t rows, int64_t cols, int32_t heads)
{
    float *got = (float *)ex_alloc((size_t)(rows * cols), sizeof(float));
    const int64_t size = heads > 0 ? rows / heads : 1;
    fuzz_check(apt_model_get(model, name, got, rows * cols) == APT_OK);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r % size, half = size / 2;
        const int64_t from = heads > 0 ? r - at + (at < half ? 2 * at : 2 * (at - half) + 1) : r;
        fuzz_check(memcmp(got + r * cols, file + 4 * from * cols, 4 * (size_t)cols) == 0);
    }
    free(got);
}

/* The first arrays of the file, of each kind the first layer's, and the head at the end. */
static void check_model(const apt_model *model, const uint8_t *file, size_t size)
{
    apt_config c;
    apt_model_config(model, &c);
    const int64_t d = c.hidden, kv = (int64_t)c.kv_heads * c.head_dim, layers = c.layers;
    const uint8_t *at = file + EXI_LLAMA2C_HEADER;
    check_values(model, "model.embed_tokens.weight", at, c.vocab, d, 0);
    at += 4 * c.vocab * d;
    check_values(model, "model.layers.0.input_layernorm.weight", at, 1, d, 0);
    at += 4 * layers * d;
    check_values(model, "model.layers.0.self_attn.q_proj.weight", at, d, d, c.heads);
    at += 4 * layers * d * d;
    check_values(model, "model.layers.0.self_attn.k_proj.weight", at, kv, d, c.kv_heads);
    at += 4 * layers * kv * d;
    check_values(model, "model.layers.0.self_attn.v_proj.weight", at, kv, d, 0);
    if (c.untied) check_values(model, "lm_head.weight", file + size - 4 * (size_t)(c.vocab * d), c.vocab, d, 0);
}

/* Numbers may be so large that logits are not finite; then it says so. */
static void write_some(apt_model *model)
{
    const int32_t tokens[2] = {1, 3}, offsets[2] = {0, 2};
    apt_batch batch = APT_ZERO;
    apt_output out = APT_ZERO;
    apt_config c;
    batch.sequences = 1;
    batch.tokens = tokens;
    batch.offsets = offsets;
    apt_model_config(model, &c);
    if (c.positions >= 2) (void)apt_model_forward(model, &batch, &out);
}

static void check_folder(const char *dir, const ex_text *checkpoint, const ex_text *tokenizer)
{
    apt_load_desc load = APT_ZERO;
    apt_model *model = NULL;
    apt_config c;
    ex_error error = {""};
    size_t bytes = 0;
    char *path = ex_path(dir, "tokenizer.bin"), *copy = ex_read_file(path, &bytes, &error);
    ex_tokenizer *t = ex_tokenizer_load(dir, &error);
    load.task = APT_TASK_LM;
    fuzz_check(t != NULL && apt_model_load(fuzz_ctx, dir, &load, &model) == APT_OK);
    apt_model_config(model, &c);
    fuzz_check(c.vocab == ex_tokenizer_size(t));
    fuzz_check(copy != NULL && bytes == tokenizer->length && memcmp(copy, tokenizer->at, bytes) == 0);
    check_model(model, (const uint8_t *)checkpoint->at, checkpoint->length);
    write_some(model);
    apt_model_destroy(model);
    ex_tokenizer_free(t);
    free(copy);
    free(path);
}

static void clear(const char *dir)
{
    static const char *const names[] = {"config.json", "model.safetensors", "tokenizer.bin"};
    for (int i = 0; i < 3; i++) {
        char *path = ex_path(dir, names[i]);
        remove(path);
        free(path);
    }
    rmdir(dir);
}

static bool import(const ex_text *checkpoint, const ex_text *tokenizer)
{
    ex_error error = {""};
    char *from = ex_format("%s", fuzz_put(".ckpt", (const uint8_t *)checkpoint->at, checkpoint->length));
    char *with = ex_format("%s", fuzz_put(".bin", (const uint8_t *)tokenizer->at, tokenizer->length));
    char *to = ex_format("%s", fuzz_path(".model"));
    const bool fine = ex_llama2c_import(fuzz_ctx, from, with, to, &error);
    if (fine) check_folder(to, checkpoint, tokenizer);
    else fuzz_check(error.text[0] != 0 && !ex_is_directory(to));
    clear(to);
    remove(from);
    remove(with);
    free(from);
    free(with);
    free(to);
    return fine;
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    ex_text checkpoint = {NULL, 0, 0}, tokenizer = {NULL, 0, 0};
    uint32_t accepted = 0;
    if (size < 2) return 0;
    ex_text_add(data[0] == 'T' ? &tokenizer : &checkpoint, (const char *)data + 1, size - 1);
    if (data[0] == 'T') {
        const char *path = fuzz_put(".bin", data + 1, size - 1);
        ex_tokenizer *t = ex_tokenizer_load(path, NULL);
        const int32_t tokens = t != NULL ? ex_tokenizer_size(t) : LEAST;
        ex_tokenizer_free(t);
        make_checkpoint(&checkpoint, tokens, false);
        if (import(&checkpoint, &tokenizer)) accepted = 4;
    } else {
        const uint32_t bits = size > 24 ? exi_tok_u32((const char *)data + 21) : 0, vocab = bits < 0x80000000u ? bits : 0u - bits;
        make_tokenizer(&tokenizer, vocab >= LEAST && vocab <= MOST ? (int32_t)vocab : LEAST);
        if (import(&checkpoint, &tokenizer)) accepted = bits == vocab ? 1 : 2;
    }
    ex_text_free(&checkpoint);
    ex_text_free(&tokenizer);
    return accepted;
}

static void write_seeds(const char *dir)
{
    static const char *const names[] = {"tied", "untied", "tokenizer"};
    for (int i = 0; i < 3; i++) {
        ex_text text = {NULL, 0, 0};
        ex_error error = {""};
        char *path = ex_path(dir, names[i]);
        ex_text_add(&text, i == 2 ? "T" : "C", 1);
        if (i == 2) make_tokenizer(&text, MOST);
        else make_checkpoint(&text, LEAST + i, i == 1);
        fuzz_check(ex_write_file(path, text.at, text.length, &error));
        free(path);
        ex_text_free(&text);
    }
}
