/* Fuzz target: the JSON reader. What it accepts is read in every way there is, written again by the writer, read back, and must
   then be the same value.
   clang -g -O1 -DAPT_FUZZ -fsanitize=fuzzer,address,undefined fuzz_json.c -lm -lpthread && ./a.out corpus/json */
#define APT_IMPLEMENTATION
#include "../apt.h"

static const char *const fuzz_formats[] = {"JSON", NULL};
#include "fuzz.h"

/* Writes node and returns the one behind it. Numbers become strings of their own text: the writer has no doubles. */
static int32_t write_node(apti_json_out *out, const apti_json *json, int32_t node, char *room, int64_t bytes)
{
    const apti_json_node *n = &json->nodes[node];
    int64_t integer = 0;
    bool flag = false;
    switch (n->kind) {
    case APTI_JSON_NULL: apti_json_put_string(out, "null"); break;
    case APTI_JSON_BOOL:
        fuzz_check(apti_json_bool(json, node, &flag));
        apti_json_put_bool(out, flag);
        break;
    case APTI_JSON_NUMBER:
        if (apti_json_int(json, node, &integer)) apti_json_put_int(out, integer);
        else apti_json_put_string(out, "number");
        break;
    case APTI_JSON_STRING: {
        const int64_t length = apti_json_string(json, node, room, bytes);
        fuzz_check(length >= 0 && length <= n->end - n->begin);
        apti_json_put_string(out, room);
        break;
    }
    case APTI_JSON_ARRAY: case APTI_JSON_OBJECT: {
        int32_t child = node + 1, count = 0;
        apti_json_open(out, n->kind == APTI_JSON_ARRAY ? '[' : '{');
        for (; child < n->next; count++) {
            if (n->kind == APTI_JSON_OBJECT) {
                const int64_t length = apti_json_string(json, child, room, bytes);
                fuzz_check(length >= 0);
                if ((int64_t)strlen(room) == length) fuzz_check(apti_json_find(json, node, room) == child + 1);
                apti_json_key(out, room);
                child++;
            }
            child = write_node(out, json, child, room, bytes);
        }
        fuzz_check(child == n->next && count == n->count);
        apti_json_close(out);
        break;
    }
    default: fuzz_check(false);
    }
    return n->next;
}

/* A 0 character ends a C string early: two keys may then become one. */
static bool holds_zero(const apti_json *json)
{
    for (int64_t i = 0; i + 5 < json->bytes; i++)
        if (memcmp(json->text + i, "\\u0000", 6) == 0) return true;
    return false;
}

static uint32_t fuzz_one(const uint8_t *data, size_t size)
{
    apt_ctx *ctx = fuzz_ctx;
    apti_json json, again;
    if (apti_json_parse(ctx, "fuzz", data, (int64_t)size, &json) != APT_OK) {
        fuzz_check(json.nodes == NULL && apt_error(ctx)[0] != 0);
        return 0;
    }
    char *room = (char *)malloc(size + 1);
    fuzz_check(room != NULL && json.count > 0 && json.nodes[0].next == json.count);
    for (int32_t i = 0; i < json.count; i++) {
        double x = 0;
        fuzz_check(json.nodes[i].begin >= 0 && json.nodes[i].begin <= json.nodes[i].end && json.nodes[i].end <= (int64_t)size);
        if (apti_json_double(&json, i, &x)) fuzz_check(apti_finite_f64(x));
    }
    for (int32_t indent = 0; indent <= 2; indent += 2) {
        apti_json_out out;
        const char *text = NULL;
        int64_t bytes = 0;
        apti_json_begin(&out, ctx, indent);
        (void)write_node(&out, &json, 0, room, (int64_t)size + 1);
        fuzz_check(apti_json_end(&out, &text, &bytes) == APT_OK);
        if (!holds_zero(&json)) {
            fuzz_check(apti_json_parse(ctx, "again", text, bytes, &again) == APT_OK);
            fuzz_check(again.count == json.count);
            for (int32_t i = 0; i < json.count; i++)
                fuzz_check(again.nodes[i].next == json.nodes[i].next && again.nodes[i].count == json.nodes[i].count);
            apti_json_free(&again);
        }
        apti_json_drop(&out);
    }
    free(room);
    apti_json_free(&json);
    return 1;
}
