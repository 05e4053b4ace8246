/* ex_base.h - what every header of examples/common stands on: errors with a text, memory, files, a text buffer, UTF-8,
   a hash map from bytes to a number, numbers for people.

   One unit of the program defines STB_DS_IMPLEMENTATION before the first include of this file. With -std=c11 the unit also
   needs `#define _POSIX_C_SOURCE 200809L` at its very top, because strict C hides fsync, mkdir and isatty.

   Functions that can fail return bool (true: fine) or a pointer (NULL: failed) and put a message into ex_error. Only
   running out of memory ends the program: these headers belong to command-line programs, not to the library. */
#ifndef EX_BASE_H
#define EX_BASE_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Functions live in headers, and not every program calls all of them: inline keeps the compilers quiet about that. */
#define EX_API static inline

#if defined(__GNUC__) || defined(__clang__)
#define EX_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define EX_PRINTF(text, first)
#endif

/* ------------------------------------------------------------------------------------------------ errors and memory */

typedef struct ex_error { char text[1024]; } ex_error;

/* Writes the message and returns false, so that a function can end with `return ex_fail(error, ...)`. error may be NULL. */
EX_PRINTF(2, 3) EX_API bool ex_fail(ex_error *error, const char *format, ...)
{
    va_list list;
    if (error == NULL) return false;
    va_start(list, format);
    vsnprintf(error->text, sizeof(error->text), format, list);
    va_end(list);
    return false;
}

EX_API void *exi_out_of_memory(size_t bytes)
{
    fprintf(stderr, "out of memory: %zu bytes more were needed\n", bytes);
    exit(1);
    return NULL;
}

/* Never NULL. count * size is checked. */
EX_API void *ex_alloc(size_t count, size_t size)
{
    void *memory;
    if (size != 0 && count > SIZE_MAX / size) return exi_out_of_memory(SIZE_MAX);
    memory = calloc(count != 0 ? count : 1, size != 0 ? size : 1);
    return memory != NULL ? memory : exi_out_of_memory(count * size);
}

EX_API void *ex_realloc(void *memory, size_t bytes)
{
    void *moved = realloc(memory, bytes != 0 ? bytes : 1);
    return moved != NULL ? moved : exi_out_of_memory(bytes);
}

/* A NUL-terminated copy; free(). */
EX_API char *ex_copy(const char *text, size_t bytes)
{
    char *copy = (char *)ex_alloc(bytes + 1, 1);
    if (bytes > 0) memcpy(copy, text, bytes);
    return copy;
}

/* stb_ds does not look at the result of realloc, so it gets one that cannot fail. */
#ifndef INCLUDE_STB_DS_H
#ifndef STBDS_REALLOC
#define STBDS_REALLOC(context, memory, bytes) ex_realloc(memory, bytes)
#define STBDS_FREE(context, memory) free(memory)
#endif
#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wextra"
#endif
#include <stb/stb_ds.h>
#if defined(__GNUC__) || defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

/* ------------------------------------------------------------------------------------------------ text buffer */

/* A growing text, always NUL-terminated once something was added. Zero-initialise; free with ex_text_free. */
typedef struct ex_text { char *at; size_t length, capacity; } ex_text;

EX_API void ex_text_reserve(ex_text *text, size_t more)
{
    if (text->capacity - text->length > more) return;
    text->capacity += text->capacity / 2;
    if (text->capacity - text->length <= more) text->capacity = text->length + more + 1;
    text->at = (char *)ex_realloc(text->at, text->capacity);
}

EX_API void ex_text_add(ex_text *text, const char *bytes, size_t count)
{
    ex_text_reserve(text, count);
    if (count > 0) memcpy(text->at + text->length, bytes, count);
    text->length += count;
    text->at[text->length] = 0;
}

EX_API void ex_text_put(ex_text *text, const char *string)
{
    ex_text_add(text, string, strlen(string));
}

EX_API void exi_text_formatted(ex_text *text, const char *format, va_list list)
{
    va_list again;
    int count;
    va_copy(again, list);
    count = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (count < 0) return;
    ex_text_reserve(text, (size_t)count + 1);
    vsnprintf(text->at + text->length, (size_t)count + 1, format, list);
    text->length += (size_t)count;
}

EX_PRINTF(2, 3) EX_API void ex_text_format(ex_text *text, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    exi_text_formatted(text, format, list);
    va_end(list);
}

EX_API bool exi_starts_with(const char *text, size_t bytes, const char *with)
{
    const size_t length = strlen(with);
    return bytes >= length && memcmp(text, with, length) == 0;
}

/* Adds text with `to` in every place of `from`, which must not be empty. */
EX_API void ex_text_add_replaced(ex_text *out, const char *text, size_t bytes, const char *from, const char *to)
{
    for (size_t at = 0; at < bytes;) {
        const bool here = exi_starts_with(text + at, bytes - at, from);
        ex_text_add(out, here ? to : text + at, here ? strlen(to) : 1);
        at += here ? strlen(from) : 1;
    }
}

EX_API void ex_text_free(ex_text *text)
{
    free(text->at);
    memset(text, 0, sizeof(*text));
}

/* printf into fresh memory; free(). */
EX_PRINTF(1, 2) EX_API char *ex_format(const char *format, ...)
{
    ex_text text = {NULL, 0, 0};
    va_list list;
    va_start(list, format);
    exi_text_formatted(&text, format, list);
    va_end(list);
    return text.at != NULL ? text.at : ex_copy("", 0);
}

/* Not for a text that is nothing else. */
EX_API bool exi_ends_with(const char *text, const char *ending)
{
    const size_t length = strlen(text), with = strlen(ending);
    return length > with && strcmp(text + length - with, ending) == 0;
}

/* ------------------------------------------------------------------------------------------------ files */

EX_API bool ex_file_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

EX_API bool ex_is_directory(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* "dir/name"; free(). */
EX_API char *ex_path(const char *dir, const char *name)
{
    const size_t length = strlen(dir);
    return ex_format(length > 0 && dir[length - 1] != '/' ? "%s/%s" : "%s%s", dir, name);
}

/* -1: there is no such file. */
EX_API int64_t ex_file_bytes(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 ? (int64_t)info.st_size : -1;
}

EX_API bool exi_read_all(FILE *file, ex_text *text)
{
    size_t got;
    do {
        const size_t block = text->length < (1u << 16) ? (size_t)1 << 16 : text->length;
        ex_text_reserve(text, block);
        got = fread(text->at + text->length, 1, block, file);
        text->length += got;
    } while (got > 0);
    text->at[text->length] = 0;
    return ferror(file) == 0;
}

/* The whole file, NUL-terminated; free(). Also reads pipes. */
EX_API char *ex_read_file(const char *path, size_t *bytes, ex_error *error)
{
    ex_text text = {NULL, 0, 0};
    FILE *file = fopen(path, "rb");
    bool fine;
    if (file == NULL) {
        ex_fail(error, "%s: cannot be opened: %s", path, strerror(errno));
        return NULL;
    }
    errno = 0;
    fine = exi_read_all(file, &text);
    if (!fine) ex_fail(error, "%s: cannot be read: %s", path, strerror(errno != 0 ? errno : EIO));
    fclose(file);
    if (!fine) {
        ex_text_free(&text);
        return NULL;
    }
    *bytes = text.length;
    return text.at;
}

/* Writes through a temporary file beside it, so that path holds the old or the new text, never a part. */
EX_API bool ex_write_file(const char *path, const char *text, size_t bytes, ex_error *error)
{
    char *temporary = ex_format("%s.tmp", path);
    FILE *file = fopen(temporary, "wb");
    bool fine = file != NULL;
    if (file != NULL) {
        fine = fwrite(text, 1, bytes, file) == bytes && fflush(file) == 0 && fsync(fileno(file)) == 0;
        fine = fclose(file) == 0 && fine;
        fine = fine && rename(temporary, path) == 0;
    }
    if (!fine) {
        ex_fail(error, "%s: cannot be written: %s", path, strerror(errno));
        if (file != NULL) remove(temporary);
    }
    free(temporary);
    return fine;
}

/* A file that does not exist is removed already. */
EX_API bool ex_remove_file(const char *path, ex_error *error)
{
    return remove(path) == 0 || errno == ENOENT || ex_fail(error, "%s: cannot be removed: %s", path, strerror(errno));
}

/* Makes every missing folder of path. */
EX_API bool ex_make_dirs(const char *path, ex_error *error)
{
    char *part = ex_copy(path, strlen(path));
    bool fine = true;
    for (char *at = part + (part[0] == '/'); fine && *part != 0; at++) {
        const char kept = *at;
        if (kept != '/' && kept != 0) continue;
        *at = 0;
        if (mkdir(part, 0777) != 0 && errno != EEXIST) fine = ex_fail(error, "%s: cannot be made: %s", part, strerror(errno));
        if (fine && !ex_is_directory(part)) fine = ex_fail(error, "%s: is not a folder", part);
        *at = kept;
        if (kept == 0) break;
    }
    free(part);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ UTF-8 */

/* Code point at text (bytes > 0) and how many bytes it takes. What is no UTF-8 gives U+FFFD for each longest prefix of
   a possible character, as Unicode chapter 3.9 recommends and Python and Rust do. *valid may be NULL. */
EX_API size_t ex_utf8_decode(const char *text, size_t bytes, uint32_t *code, bool *valid)
{
    const unsigned char *at = (const unsigned char *)text;
    const unsigned char lead = at[0];
    const size_t need = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    uint32_t value = need == 1 ? lead : need == 2 ? lead & 0x1fu : need == 3 ? lead & 0x0fu : lead & 0x07u;
    size_t i = 1;
    /* the second byte has a narrower range after some leads: no overlong forms, surrogates, or values over U+10FFFF */
    const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (; i < need && i < bytes; i++) {
        if (at[i] < (i == 1 ? low : 0x80) || at[i] > (i == 1 ? high : 0xbf)) break;
        value = value << 6 | (at[i] & 0x3fu);
    }
    if (valid != NULL) *valid = i == need;
    *code = i == need ? value : 0xfffd;
    return i;
}

/* Where the last character of a valid text (bytes > 0) starts, and its code point. */
EX_API size_t ex_utf8_last(const char *text, size_t bytes, uint32_t *code)
{
    size_t last = bytes - 1;
    while (last > 0 && ((unsigned char)text[last] & 0xc0) == 0x80) last--;
    ex_utf8_decode(text + last, bytes - last, code, NULL);
    return last;
}

/* Writes 1 to 4 bytes, returns how many. code must be a Unicode scalar value. */
EX_API size_t ex_utf8_encode(uint32_t code, char *out)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xe0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3f));
    out[2] = (char)(0x80 | (code >> 6 & 0x3f));
    out[3] = (char)(0x80 | (code & 0x3f));
    return 4;
}

/* Bytes before the first that is no UTF-8; `bytes` when all is well. */
EX_API size_t ex_utf8_valid_prefix(const char *text, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        uint32_t code;
        bool valid = true;
        size_t step = 1;
        if ((unsigned char)text[at] >= 0x80) step = ex_utf8_decode(text + at, bytes - at, &code, &valid);
        if (!valid) return at;
        at += step;
    }
    return bytes;
}

/* Adds text to out with U+FFFD for what is no UTF-8; returns how many were replaced. */
EX_API int64_t ex_utf8_add_repaired(ex_text *out, const char *text, size_t bytes)
{
    int64_t replaced = 0;
    size_t at = 0;
    while (at < bytes) {
        const size_t good = ex_utf8_valid_prefix(text + at, bytes - at);
        uint32_t code;
        ex_text_add(out, text + at, good);
        at += good;
        if (at == bytes) break;
        at += ex_utf8_decode(text + at, bytes - at, &code, NULL);
        ex_text_add(out, "\xef\xbf\xbd", 3);
        replaced++;
    }
    return replaced;
}

/* Takes a malloc'ed text and gives it back repaired: the same pointer when it was fine, else a new one. */
EX_API char *ex_utf8_repair(char *text, size_t *bytes, int64_t *replaced)
{
    ex_text out = {NULL, 0, 0};
    *replaced = 0;
    if (ex_utf8_valid_prefix(text, *bytes) == *bytes) return text;
    ex_text_reserve(&out, *bytes);
    *replaced = ex_utf8_add_repaired(&out, text, *bytes);
    free(text);
    *bytes = out.length;
    return out.at;
}

/* ------------------------------------------------------------------------------------------------ hash map */

/* Bytes -> number, insertion order kept. Lookups need no write access, unlike those of stb_ds, and keys may hold NUL.
   Zero-initialise; free with ex_map_free. */
typedef struct ex_map_entry { size_t key; uint32_t bytes, hash; int32_t value; } ex_map_entry;
typedef struct ex_map {
    ex_map_entry *entries;            /* stb_ds array */
    char *keys;                       /* stb_ds array: all keys, each followed by NUL */
    uint32_t *slots;                  /* open addressing: entry + 1, 0 = free */
    size_t capacity;                  /* a power of two, at least twice the entries */
} ex_map;

EX_API size_t ex_map_count(const ex_map *map)
{
    return stbds_arrlenu(map->entries);
}

EX_API const char *ex_map_key(const ex_map *map, size_t entry)
{
    return map->keys + map->entries[entry].key;
}

/* Eight bytes at a time, multiplied and folded (as in MurmurHash). */
EX_API uint32_t exi_map_hash(const void *key, size_t bytes)
{
    const unsigned char *at = (const unsigned char *)key;
    uint64_t hash = 0x9e3779b97f4a7c15u ^ (uint64_t)bytes, part;
    for (; bytes > 0; at += sizeof(part)) {
        const size_t take = bytes < sizeof(part) ? bytes : sizeof(part);
        part = 0;
        memcpy(&part, at, take);
        hash = (hash ^ part) * 0xc6a4a7935bd1e995u;
        hash ^= hash >> 47;
        bytes -= take;
    }
    hash *= 0xc6a4a7935bd1e995u;
    return (uint32_t)(hash >> 32);
}

/* The slot that holds key, or the free one where it belongs. */
EX_API size_t exi_map_slot(const ex_map *map, const void *key, size_t bytes, uint32_t hash)
{
    size_t slot = hash & (map->capacity - 1);
    while (map->slots[slot] != 0) {
        const ex_map_entry *entry = &map->entries[map->slots[slot] - 1];
        if (entry->hash == hash && entry->bytes == bytes && memcmp(map->keys + entry->key, key, bytes) == 0) break;
        slot = (slot + 1) & (map->capacity - 1);
    }
    return slot;
}

/* The entry of key, or -1. */
EX_API int64_t ex_map_find(const ex_map *map, const void *key, size_t bytes)
{
    if (map->capacity == 0 || bytes > UINT32_MAX) return -1;
    return (int64_t)map->slots[exi_map_slot(map, key, bytes, exi_map_hash(key, bytes))] - 1;
}

EX_API int32_t ex_map_get(const ex_map *map, const void *key, size_t bytes, int32_t otherwise)
{
    const int64_t entry = ex_map_find(map, key, bytes);
    return entry < 0 ? otherwise : map->entries[entry].value;
}

EX_API void exi_map_grow(ex_map *map)
{
    const size_t capacity = map->capacity != 0 ? map->capacity * 2 : 64;
    free(map->slots);
    map->slots = (uint32_t *)ex_alloc(capacity, sizeof(uint32_t));
    map->capacity = capacity;
    for (size_t i = 0; i < ex_map_count(map); i++) {
        size_t slot = map->entries[i].hash & (capacity - 1);
        while (map->slots[slot] != 0) slot = (slot + 1) & (capacity - 1);
        map->slots[slot] = (uint32_t)i + 1;
    }
}

/* Adds key or changes its value; returns true when the key is new. */
EX_API bool ex_map_put(ex_map *map, const void *key, size_t bytes, int32_t value)
{
    const uint32_t hash = exi_map_hash(key, bytes);
    ex_map_entry entry;
    size_t slot;
    if (2 * (ex_map_count(map) + 1) > map->capacity) exi_map_grow(map);
    slot = exi_map_slot(map, key, bytes, hash);
    if (map->slots[slot] != 0) {
        map->entries[map->slots[slot] - 1].value = value;
        return false;
    }
    entry.key = stbds_arrlenu(map->keys);
    entry.bytes = (uint32_t)bytes;
    entry.hash = hash;
    entry.value = value;
    if (bytes > 0) memcpy(stbds_arraddnptr(map->keys, bytes), key, bytes);
    stbds_arrput(map->keys, 0);
    stbds_arrput(map->entries, entry);
    map->slots[slot] = (uint32_t)ex_map_count(map);
    return true;
}

EX_API void ex_map_free(ex_map *map)
{
    stbds_arrfree(map->entries);
    stbds_arrfree(map->keys);
    free(map->slots);
    memset(map, 0, sizeof(*map));
}

/* ------------------------------------------------------------------------------------------------ time and numbers for people */

/* Neither NaN nor infinite, by the exponent bits, so that -ffast-math cannot assume the answer. */
EX_API bool ex_finite(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return (bits >> 52 & 0x7ff) != 0x7ff;
}

/* Seconds of a clock that never jumps. */
EX_API double ex_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Columns of the terminal behind a descriptor, asked anew each time since windows are resized; 0: no terminal. */
EX_API int ex_terminal_width(int descriptor)
{
    struct winsize size;
    if (!isatty(descriptor)) return 0;
    memset(&size, 0, sizeof(size));
    if (ioctl(descriptor, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
    return (int)size.ws_col;
}

EX_API const char *exi_scaled_text(char *out, size_t size, double n, double base, const char *const *units)
{
    int unit = 0;
    double shown = n < 0 ? -n : n;
    while (shown >= 999.5 && units[unit + 1] != NULL) {
        shown /= base;
        unit++;
    }
    snprintf(out, size, unit == 0 || shown >= 99.95 ? "%s%.0f%s" : "%s%.1f%s", n < 0 ? "-" : "", shown, units[unit]);
    return out;
}

/* "950", "12.3k", "4.5M". */
EX_API const char *ex_count_text(char *out, size_t size, double n)
{
    static const char *const units[] = {"", "k", "M", "G", "T", NULL};
    return exi_scaled_text(out, size, n, 1000.0, units);
}

/* "512 B", "1.2 GiB". */
EX_API const char *ex_bytes_text(char *out, size_t size, double bytes)
{
    static const char *const units[] = {" B", " KiB", " MiB", " GiB", " TiB", NULL};
    return exi_scaled_text(out, size, bytes, 1024.0, units);
}

/* "0.8 s", "2:03", "1:02:03", "3d 04:05". */
EX_API const char *ex_time_text(char *out, size_t size, double seconds)
{
    const double whole = seconds < 0 ? 0 : seconds > 1e9 ? 1e9 : seconds + 0.5;
    const long s = (long)whole;
    if (seconds < 9.95) snprintf(out, size, "%.1f s", seconds < 0 ? 0.0 : seconds);
    else if (s < 60) snprintf(out, size, "%ld s", s);
    else if (s < 3600) snprintf(out, size, "%ld:%02ld", s / 60, s % 60);
    else if (s < 86400) snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    else snprintf(out, size, "%ldd %02ld:%02ld", s / 86400, s / 3600 % 24, s / 60 % 60);
    return out;
}

#endif /* EX_BASE_H */
