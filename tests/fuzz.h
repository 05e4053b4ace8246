/* What the fuzz targets share. Each target defines

       static void fuzz_one(apt_ctx *ctx, const uint8_t *data, size_t size)

   and includes this file behind it. Built with -DAPT_FUZZ -fsanitize=fuzzer it is a libFuzzer target; otherwise a program that
   replays the files it is given (a crash, or a sanitizer's report, is a failure). */
#ifndef APT_TEST_FUZZ_H
#define APT_TEST_FUZZ_H

#include <stdlib.h>

/* Something that must hold does not. */
#define fuzz_check(condition)                                                           \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

static void fuzz_quiet(const apt_log_item *item, void *user)
{
    (void)user;
    fuzz_check(item->message != NULL);
}

/* A hostile input may ask for a lot; what it gets is bounded, so that a target measures the parser and not the machine. */
static void *fuzz_alloc(size_t bytes, void *user)
{
    (void)user;
    return bytes <= (size_t)512 * 1024 * 1024 ? malloc(bytes) : NULL;
}

static void fuzz_release(void *memory, void *user)
{
    (void)user;
    free(memory);
}

static apt_ctx *fuzz_context(void)
{
    apt_desc desc = APT_ZERO;
    desc.threads = 1;
    desc.log = fuzz_quiet;
    desc.alloc = fuzz_alloc;
    desc.release = fuzz_release;
    apt_ctx *ctx = apt_create(&desc);
    fuzz_check(ctx != NULL);
    return ctx;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static apt_ctx *ctx;                         /* lives as long as the process */
    if (ctx == NULL) ctx = fuzz_context();
    const int64_t bytes = apt_memory_info(ctx).bytes;
    fuzz_one(ctx, data, size);
    fuzz_check(apt_memory_info(ctx).bytes == bytes);   /* nothing leaks, whatever came in */
    return 0;
}

#ifndef APT_FUZZ
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL) {
            fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        uint8_t *data = NULL;
        size_t size = 0, got = 0;
        do {
            data = (uint8_t *)realloc(data, size + 65536);
            fuzz_check(data != NULL);
            got = fread(data + size, 1, 65536, file);
            size += got;
        } while (got == 65536);
        fclose(file);
        uint8_t *exact = (uint8_t *)malloc(size > 0 ? size : 1);   /* a sanitizer sees a read behind the last byte */
        fuzz_check(exact != NULL);
        memcpy(exact, data, size);
        (void)LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        free(data);
    }
    printf("%d inputs replayed\n", argc - 1);
    return 0;
}
#endif

#endif /* APT_TEST_FUZZ_H */
