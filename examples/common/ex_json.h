/* ex_json.h - a strict JSON reader (RFC 8259) for the example programs: linear time, no recursion, one flat array of nodes.

   The text is unescaped in place and strings point into it, so it must stay as long as the nodes are used. Bytes that are
   no UTF-8 and lone surrogates become U+FFFD and are counted. A name that stands twice in an object: the last one counts. */
#ifndef EX_JSON_H
#define EX_JSON_H

#include "ex_base.h"

#define EX_JSON_DEPTH 256             /* arrays and objects inside each other */

typedef enum ex_json_type {
    EX_JSON_NULL = 0, EX_JSON_FALSE, EX_JSON_TRUE, EX_JSON_NUMBER, EX_JSON_STRING, EX_JSON_ARRAY, EX_JSON_OBJECT
} ex_json_type;

/* The children of an array or object follow it directly; in an object each value stands after its name (a string). */
typedef struct ex_json_node {
    ex_json_type type;
    uint32_t span;                    /* nodes of this subtree, itself included */
    uint32_t count;                   /* STRING: bytes; ARRAY: elements; OBJECT: members */
    uint32_t line;
    union { double number; const char *text; } as;   /* text ends with NUL, but may hold others */
} ex_json_node;

typedef struct ex_json {
    ex_json_node *nodes;              /* stb_ds array, nodes[0] is the root */
    char *text;                       /* owned by ex_json_read, else NULL */
    const char *name;                 /* for messages: the path; the caller's */
    int64_t replaced;                 /* U+FFFD put in */
} ex_json;

typedef struct exi_json_parser {
    ex_json *json;
    char *begin, *at, *end;
    uint32_t line;
    uint32_t open[EX_JSON_DEPTH];     /* containers that are not closed yet */
    int32_t depth;
    ex_error *error;
} exi_json_parser;

EX_API const char *ex_json_type_name(ex_json_type type)
{
    static const char *const names[] = {"null", "false", "true", "a number", "a string", "an array", "an object"};
    return names[type];
}

EX_API bool exi_json_fail(const exi_json_parser *p, const char *expected)
{
    const unsigned char c = p->at < p->end ? (unsigned char)*p->at : 0;
    char found[32];
    if (p->at >= p->end) snprintf(found, sizeof(found), "the end");
    else if (c >= 32 && c < 127) snprintf(found, sizeof(found), "'%c'", c);
    else snprintf(found, sizeof(found), "byte 0x%02x", c);
    return ex_fail(p->error, "%s:%u: not valid JSON at byte %zu: expected %s, found %s", p->json->name, p->line,
                   (size_t)(p->at - p->begin), expected, found);
}

EX_API ex_json_node *exi_json_add(exi_json_parser *p, ex_json_type type)
{
    ex_json_node *node = stbds_arraddnptr(p->json->nodes, 1);
    memset(node, 0, sizeof(*node));
    node->type = type;
    node->span = 1;
    node->line = p->line;
    return node;
}

EX_API void exi_json_space(exi_json_parser *p)
{
    for (; p->at < p->end; p->at++) {
        if (*p->at == '\n') p->line++;
        else if (*p->at != ' ' && *p->at != '\t' && *p->at != '\r') return;
    }
}

/* Four hexadecimal digits behind \u. */
EX_API bool exi_json_hex(exi_json_parser *p, uint32_t *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        const char c = p->at < p->end ? *p->at : 0;
        uint32_t digit;
        if (c >= '0' && c <= '9') digit = (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f') digit = (uint32_t)(c - 'a') + 10;
        else if (c >= 'A' && c <= 'F') digit = (uint32_t)(c - 'A') + 10;
        else return exi_json_fail(p, "four hexadecimal digits after \\u");
        *code = *code << 4 | digit;
    }
    return true;
}

/* p->at stands behind "\u"; writes the character to *out. Never longer than the escape was. */
EX_API bool exi_json_unicode(exi_json_parser *p, char **out)
{
    uint32_t code, low;
    if (!exi_json_hex(p, &code)) return false;
    if (code >= 0xd800 && code < 0xdc00 && p->end - p->at >= 2 && p->at[0] == '\\' && p->at[1] == 'u') {
        char *second = p->at;
        p->at += 2;
        if (!exi_json_hex(p, &low)) return false;
        if (low >= 0xdc00 && low < 0xe000) code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        else p->at = second;          /* a character of its own */
    }
    if (code >= 0xd800 && code < 0xe000) {
        code = 0xfffd;
        p->json->replaced++;
    }
    *out += ex_utf8_encode(code, *out);
    return true;
}

EX_API bool exi_json_escape(exi_json_parser *p, char **out)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char c = ++p->at < p->end ? *p->at : 0;
    const char *which = c != 0 ? strchr(from, c) : NULL;
    if (c == 'u') {
        p->at++;
        return exi_json_unicode(p, out);
    }
    if (which == NULL) return exi_json_fail(p, "one of \"\\/bfnrtu after a backslash");
    *(*out)++ = to[which - from];
    p->at++;
    return true;
}

/* p->at stands on the opening quote. */
EX_API bool exi_json_string(exi_json_parser *p)
{
    ex_json_node *node = exi_json_add(p, EX_JSON_STRING);
    char *out = ++p->at;
    node->as.text = out;
    for (;;) {
        if (p->at >= p->end || (unsigned char)*p->at < 32) return exi_json_fail(p, "the rest of a string");
        if (*p->at == '"') break;
        if (*p->at != '\\') *out++ = *p->at++;
        else if (!exi_json_escape(p, &out)) return false;
    }
    p->at++;
    *out = 0;                         /* at the closing quote or before it */
    node->count = (uint32_t)(out - node->as.text);
    return true;
}

EX_API bool exi_json_digits(exi_json_parser *p)
{
    if (p->at >= p->end || *p->at < '0' || *p->at > '9') return exi_json_fail(p, "a digit");
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') p->at++;
    return true;
}

EX_API bool exi_json_number(exi_json_parser *p)
{
    char *start = p->at, *stop;
    double number;
    if (*p->at == '-') p->at++;
    if (p->at < p->end && *p->at == '0') p->at++;          /* no leading zeros */
    else if (!exi_json_digits(p)) return false;
    if (p->at < p->end && *p->at == '.') {
        p->at++;
        if (!exi_json_digits(p)) return false;
    }
    if (p->at < p->end && (*p->at == 'e' || *p->at == 'E')) {
        p->at++;
        if (p->at < p->end && (*p->at == '+' || *p->at == '-')) p->at++;
        if (!exi_json_digits(p)) return false;
    }
    number = strtod(start, &stop);
    if (stop != p->at || !ex_finite(number)) {
        p->at = start;
        return exi_json_fail(p, "a number as JSON writes it, in the range of a double");
    }
    exi_json_add(p, EX_JSON_NUMBER)->as.number = number;
    return true;
}

EX_API bool exi_json_word(exi_json_parser *p)
{
    static const char *const words[] = {"null", "false", "true"};
    for (int i = 0; i < 3; i++) {
        const size_t length = strlen(words[i]);
        if ((size_t)(p->end - p->at) < length || memcmp(p->at, words[i], length) != 0) continue;
        p->at += length;
        exi_json_add(p, (ex_json_type)i);
        return true;
    }
    return exi_json_fail(p, "a value");
}

/* A name and its colon. */
EX_API bool exi_json_name(exi_json_parser *p)
{
    exi_json_space(p);
    if (p->at >= p->end || *p->at != '"') return exi_json_fail(p, "a name in double quotes");
    if (!exi_json_string(p)) return false;
    exi_json_space(p);
    if (p->at >= p->end || *p->at != ':') return exi_json_fail(p, "':'");
    p->at++;
    return true;
}

EX_API void exi_json_close(exi_json_parser *p)
{
    ex_json_node *node = &p->json->nodes[p->open[--p->depth]];
    node->span = (uint32_t)(stbds_arrlenu(p->json->nodes) - p->open[p->depth]);
    p->at++;
}

/* Opens an array or object. *empty: it was closed at once, so no value follows. */
EX_API bool exi_json_open(exi_json_parser *p, bool *empty)
{
    const bool object = *p->at == '{';
    *empty = false;
    if (p->depth == EX_JSON_DEPTH) return exi_json_fail(p, "at most 256 arrays and objects inside each other");
    p->open[p->depth++] = (uint32_t)stbds_arrlenu(p->json->nodes);
    exi_json_add(p, object ? EX_JSON_OBJECT : EX_JSON_ARRAY);
    p->at++;
    exi_json_space(p);
    if (p->at < p->end && *p->at == (object ? '}' : ']')) {
        *empty = true;
        exi_json_close(p);
        return true;
    }
    return object ? exi_json_name(p) : true;
}

/* After a complete value: closes what ends here and reads "," and the next name. *more: another value follows. */
EX_API bool exi_json_after(exi_json_parser *p, bool *more)
{
    for (;;) {
        ex_json_node *parent;
        *more = false;
        exi_json_space(p);
        if (p->depth == 0) return p->at == p->end ? true : exi_json_fail(p, "the end after the value");
        parent = &p->json->nodes[p->open[p->depth - 1]];
        parent->count++;
        if (p->at < p->end && *p->at == ',') {
            *more = true;
            p->at++;
            return parent->type == EX_JSON_OBJECT ? exi_json_name(p) : true;
        }
        if (p->at >= p->end || *p->at != (parent->type == EX_JSON_OBJECT ? '}' : ']')) {
            return exi_json_fail(p, parent->type == EX_JSON_OBJECT ? "',' or '}'" : "',' or ']'");
        }
        exi_json_close(p);
    }
}

/* One value; containers are opened only, and *open says so. */
EX_API bool exi_json_value(exi_json_parser *p, bool *open)
{
    bool empty = true, fine;
    exi_json_space(p);
    if (p->at >= p->end) return exi_json_fail(p, "a value");
    if (*p->at == '{' || *p->at == '[') fine = exi_json_open(p, &empty);
    else if (*p->at == '"') fine = exi_json_string(p);
    else if (*p->at == '-' || (*p->at >= '0' && *p->at <= '9')) fine = exi_json_number(p);
    else fine = exi_json_word(p);
    *open = !empty;
    return fine;
}

/* Parses text[0 .. bytes), where text[bytes] is NUL and the text is valid UTF-8 (ex_utf8_repair). Changes the text. Nodes
   of an earlier parse into the same ex_json are dropped and their memory reused. first_line: of text[0], for messages. */
EX_API bool ex_json_parse(ex_json *json, const char *name, uint32_t first_line, char *text, size_t bytes, ex_error *error)
{
    exi_json_parser p;
    bool open = false, more = true;
    memset(&p, 0, sizeof(p));
    json->name = name;
    stbds_arrsetlen(json->nodes, 0);
    p.json = json;
    p.begin = p.at = text;
    p.end = text + bytes;
    p.line = first_line;
    p.error = error;
    if (bytes >= UINT32_MAX) return ex_fail(error, "%s: JSON of 4 GiB or more is not supported", name);
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) p.at += 3;      /* byte order mark */
    while (more) {
        if (!exi_json_value(&p, &open)) return false;
        if (!open && !exi_json_after(&p, &more)) return false;
    }
    return true;
}

/* Reads and parses a file. path must stay valid as long as messages are made. */
EX_API bool ex_json_read(ex_json *json, const char *path, ex_error *error)
{
    size_t bytes;
    memset(json, 0, sizeof(*json));
    json->text = ex_read_file(path, &bytes, error);
    if (json->text == NULL) return false;
    json->text = ex_utf8_repair(json->text, &bytes, &json->replaced);
    return ex_json_parse(json, path, 1, json->text, bytes, error);
}

EX_API void ex_json_free(ex_json *json)
{
    stbds_arrfree(json->nodes);
    free(json->text);
    memset(json, 0, sizeof(*json));
}

/* Adds text as a JSON string with its quotes; what is no UTF-8 becomes U+FFFD. */
EX_API void ex_json_put(ex_text *out, const char *text, size_t bytes)
{
    size_t at = 0;
    ex_text_add(out, "\"", 1);
    while (at < bytes) {
        const unsigned char c = (unsigned char)text[at];
        size_t plain = 0;
        while (at + plain < bytes && (unsigned char)text[at + plain] >= 32 && text[at + plain] != '"' && text[at + plain] != '\\')
            plain++;
        if (plain > 0) ex_utf8_add_repaired(out, text + at, plain);
        else if (c == '"' || c == '\\') ex_text_format(out, "\\%c", c);
        else if (c == '\n') ex_text_put(out, "\\n");
        else if (c == '\t') ex_text_put(out, "\\t");
        else ex_text_format(out, "\\u%04x", c);
        at += plain > 0 ? plain : 1;
    }
    ex_text_add(out, "\"", 1);
}

/* Members behind others of an object: ,"name": value. What is not finite becomes null. */
EX_API void ex_json_put_number(ex_text *out, const char *name, double value)
{
    if (ex_finite(value)) ex_text_format(out, ", \"%s\": %.9g", name, value);
    else ex_text_format(out, ", \"%s\": null", name);
}

EX_API void ex_json_put_count(ex_text *out, const char *name, int64_t value)
{
    ex_text_format(out, ", \"%s\": %lld", name, (long long)value);
}

/* ------------------------------------------------------------------------------------------------ looking at nodes */

EX_API const ex_json_node *ex_json_root(const ex_json *json)
{
    return json->nodes;
}

/* First child; for an object the first name, its value is ex_json_next of it. Loop `count` (object: 2 * count) times. */
EX_API const ex_json_node *ex_json_first(const ex_json_node *node)
{
    return node + 1;
}

EX_API const ex_json_node *ex_json_next(const ex_json_node *node)
{
    return node + node->span;
}

EX_API bool ex_json_is(const ex_json_node *node, ex_json_type type)
{
    return node != NULL && node->type == type;
}

EX_API bool ex_json_equals(const ex_json_node *node, const char *text)
{
    return ex_json_is(node, EX_JSON_STRING) && node->count == strlen(text) && memcmp(node->as.text, text, node->count) == 0;
}

/* The value of a name in an object; NULL when it is absent or node is no object (or NULL). */
EX_API const ex_json_node *ex_json_get(const ex_json_node *node, const char *name)
{
    const ex_json_node *found = NULL, *at;
    if (!ex_json_is(node, EX_JSON_OBJECT)) return NULL;
    at = node + 1;
    for (uint32_t i = 0; i < node->count; i++, at = ex_json_next(at + 1)) {
        if (ex_json_equals(at, name)) found = at + 1;
    }
    return found;
}

/* The text of a string member, or `otherwise`. */
EX_API const char *ex_json_text(const ex_json_node *object, const char *name, const char *otherwise)
{
    const ex_json_node *node = ex_json_get(object, name);
    return ex_json_is(node, EX_JSON_STRING) ? node->as.text : otherwise;
}

/* A boolean member, or `otherwise` when it is absent, null or something else. */
EX_API bool ex_json_bool(const ex_json_node *object, const char *name, bool otherwise)
{
    const ex_json_node *node = ex_json_get(object, name);
    if (node == NULL || (node->type != EX_JSON_TRUE && node->type != EX_JSON_FALSE)) return otherwise;
    return node->type == EX_JSON_TRUE;
}

/* True when node is a whole number in [low, high]. */
EX_API bool ex_json_int(const ex_json_node *node, int64_t low, int64_t high, int64_t *value)
{
    if (!ex_json_is(node, EX_JSON_NUMBER) || node->as.number < -9.0e15 || node->as.number > 9.0e15) return false;
    *value = (int64_t)node->as.number;
    return (double)*value >= node->as.number && (double)*value <= node->as.number && *value >= low && *value <= high;
}

/* A member that must be there and have this type. NULL and a message otherwise. */
EX_API const ex_json_node *ex_json_need(const ex_json *json, const ex_json_node *object, const char *name, ex_json_type type,
                                        ex_error *error)
{
    const ex_json_node *node = ex_json_get(object, name);
    if (ex_json_is(node, type)) return node;
    ex_fail(error, "%s:%u: expected \"%s\" with %s, found %s", json->name, node != NULL ? node->line : object->line, name,
            ex_json_type_name(type), node != NULL ? ex_json_type_name(node->type) : "nothing of that name");
    return NULL;
}

#endif /* EX_JSON_H */
