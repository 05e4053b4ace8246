/* What the fuzz targets share. Each target defines

       static const char *const fuzz_formats[]     names of what an input may be, 32 at most, NULL behind the last
       static uint32_t fuzz_one(const uint8_t *data, size_t size)      bit i: data was accepted as fuzz_formats[i]

   and includes this file behind fuzz_formats. With APT_IMPLEMENTATION there is a context, fuzz_ctx. Built with -DAPT_FUZZ
   -fsanitize=fuzzer it is a libFuzzer target, otherwise a program, and both know

       program --replay FILE...    fails when something does not hold, and when no file is accepted as one of the formats: the
                                   seeds of that format are stale
       program --seeds DIR         writes such, where a target defines FUZZ_SEEDS, the name of a function that does */
#ifndef APT_TEST_FUZZ_H
#define APT_TEST_FUZZ_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint32_t fuzz_one(const uint8_t *data, size_t size);

/* Something that must hold does not. */
#define fuzz_check(condition)                                                           \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

/* The name of a file of this process; overwritten for every input. */
static inline const char *fuzz_path(const char *ending)
{
    static char path[600];
    const char *root = getenv("APT_TEST_TMP");
    snprintf(path, sizeof path, "%s/apt_fuzz_%ld%s", root != NULL ? root : "/tmp", (long)getpid(), ending);
    return path;
}

static inline const char *fuzz_put(const char *ending, const uint8_t *data, size_t size)
{
    const char *path = fuzz_path(ending);
    FILE *file = fopen(path, "wb");
    fuzz_check(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
    return path;
}

#ifdef APT_IMPLEMENTATION
static apt_ctx *fuzz_ctx;                        /* lives as long as the process */

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

static void fuzz_begin(void)
{
    apt_desc desc = APT_ZERO;
    desc.threads = 1;
    desc.log = fuzz_quiet;
    desc.alloc = fuzz_alloc;
    desc.release = fuzz_release;
    if (fuzz_ctx == NULL) fuzz_ctx = apt_create(&desc);
    fuzz_check(fuzz_ctx != NULL);
}

static uint32_t fuzz_accepted(const uint8_t *data, size_t size)
{
    fuzz_begin();
    const int64_t bytes = apt_memory_info(fuzz_ctx).bytes;
    const uint32_t formats = fuzz_one(data, size);
    fuzz_check(apt_memory_info(fuzz_ctx).bytes == bytes);      /* nothing leaks, whatever came in */
    return formats;
}
#else
static inline void fuzz_begin(void) {}
#define fuzz_accepted fuzz_one
#endif

/* In a block of its own, so that a sanitizer sees a read behind the last byte. */
static uint32_t fuzz_replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL, *exact;
    size_t size = 0, got = 0;
    fuzz_check(file != NULL);
    do {
        data = (uint8_t *)realloc(data, size + 65536);
        fuzz_check(data != NULL);
        got = fread(data + size, 1, 65536, file);
        size += got;
    } while (got == 65536);
    fclose(file);
    exact = (uint8_t *)malloc(size > 0 ? size : 1);
    fuzz_check(exact != NULL);
    memcpy(exact, data, size);
    free(data);
    const uint32_t formats = fuzz_accepted(exact, size);
    free(exact);
    return formats;
}

static int fuzz_replay(int count, char **paths)
{
    uint32_t formats = 0;
    int stale = 0;
    for (int i = 0; i < count; i++) formats |= fuzz_replay_file(paths[i]);
    for (int i = 0; fuzz_formats[i] != NULL; i++) {
        if (formats >> i & 1) continue;
        fprintf(stderr, "none of the %d files is accepted as: %s\n", count, fuzz_formats[i]);
        stale = 1;
    }
    if (stale == 0) printf("%d files replayed\n", count);
    return stale;
}

/* The exit status; -1: no command of ours. */
static int fuzz_command(int argc, char **argv)
{
#ifdef FUZZ_SEEDS
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0) {
        fuzz_begin();
        FUZZ_SEEDS(argv[2]);
        return 0;
    }
#endif
    return argc > 1 && strcmp(argv[1], "--replay") == 0 ? fuzz_replay(argc - 2, argv + 2) : -1;
}

#ifdef APT_FUZZ
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const int status = fuzz_command(*argc, *argv);
    if (status >= 0) exit(status);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    (void)fuzz_accepted(data, size);
    return 0;
}
#else
int main(int argc, char **argv)
{
    const int status = fuzz_command(argc, argv);
    if (status < 0) fprintf(stderr, "usage: %s --replay FILE...\n", argv[0]);
    return status < 0 ? 2 : status;
}
#endif

#endif /* APT_TEST_FUZZ_H */
