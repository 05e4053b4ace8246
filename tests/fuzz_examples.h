/* What the fuzz targets for examples/common share; fuzz.h is the same for apt.h, whose contexts these do not need. Each defines

       static void fuzz_one(const uint8_t *data, size_t size)

   and includes this file behind its declaration. With -DAPT_FUZZ -fsanitize=fuzzer it becomes a libFuzzer target; otherwise
   a program that replays the files it is given. */
#ifndef APT_TEST_FUZZ_EXAMPLES_H
#define APT_TEST_FUZZ_EXAMPLES_H

/* Something that must hold does not. */
#define fuzz_check(condition)                                                           \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_one(data, size);
    return 0;
}

#ifndef APT_FUZZ
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        ex_error error = {""};
        size_t size = 0;
        char *text = ex_read_file(argv[i], &size, &error);
        uint8_t *exact = (uint8_t *)malloc(size > 0 ? size : 1);   /* a sanitizer sees a read behind the last byte */
        if (text == NULL) {
            fprintf(stderr, "%s\n", error.text);
            return 1;
        }
        fuzz_check(exact != NULL);
        memcpy(exact, text, size);
        (void)LLVMFuzzerTestOneInput(exact, size);
        free(exact);
        free(text);
    }
    printf("%d inputs replayed\n", argc - 1);
    return 0;
}
#endif

#endif /* APT_TEST_FUZZ_EXAMPLES_H */
