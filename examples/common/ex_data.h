/* ex_data.h - data files for training and evaluation: rows of text (TSV, JSONL), their tokens, and batches of them.

       ex_rows_read        sentence pairs or single sentences with a class or a score
       ex_dataset_rows     the same as tokens, in one compact array
       ex_feed_next        batch after batch, shuffled; the order is a function of (seed, epoch, index), so a run can go on
                           from a checkpoint exactly where it stopped
       ex_batch_apt        a batch as apt.h takes it (include apt.h first)

   SQuAD files are read by ex_squad.h, which this file includes at its end.
   Errors name the file, the line, what was expected and what was found. Bytes that are no UTF-8 become U+FFFD and are
   counted in `replaced`. */
#ifndef EX_DATA_H
#define EX_DATA_H

#include "ex_base.h"
#include "ex_json.h"
#include "ex_tokenizer.h"

/* ------------------------------------------------------------------------------------------------ lines */

/* The rest of a text: where its next line starts, and the number of the last line taken. */
typedef struct exi_lines { char *at, *end; int64_t line; } exi_lines;

/* Behind a byte order mark, if there is one. */
EX_API void exi_lines_start(exi_lines *lines, char *text, size_t bytes)
{
    lines->at = text + (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0);
    lines->end = text + bytes;
    lines->line = 0;
}

/* The next line, cut off with NUL; *bytes without its end. NULL at the end of the text. */
EX_API char *exi_lines_next(exi_lines *lines, size_t *bytes)
{
    char *line = lines->at, *end;
    if (line >= lines->end) return NULL;
    end = (char *)memchr(line, '\n', (size_t)(lines->end - line));
    if (end == NULL) end = lines->end;
    lines->at = end + 1;
    lines->line++;
    if (end > line && end[-1] == '\r') end--;
    *end = 0;
    *bytes = (size_t)(end - line);
    return line;
}

/* Its number as a JSON reader takes it. */
EX_API uint32_t exi_lines_number(const exi_lines *lines)
{
    return lines->line < UINT32_MAX ? (uint32_t)lines->line : UINT32_MAX;
}

EX_API bool exi_only_space(const char *at, const char *end)
{
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n' || *at == 0)) at++;
    return at >= end;
}

/* ------------------------------------------------------------------------------------------------ labels */

#define EX_MAX_LABELS 1000            /* more different labels: that column holds something else */

typedef enum ex_label_kind { EX_LABEL_NONE = 0, EX_LABEL_CLASS, EX_LABEL_SCORE } ex_label_kind;

/* Names of classes. Whole numbers are in ascending order, other names in the order of their first row. */
typedef struct ex_labels { ex_map map; } ex_labels;

EX_API int32_t ex_labels_count(const ex_labels *labels)
{
    return (int32_t)ex_map_count(&labels->map);
}

EX_API const char *ex_labels_name(const ex_labels *labels, int32_t index)
{
    return index >= 0 && index < ex_labels_count(labels) ? ex_map_key(&labels->map, (size_t)index) : "?";
}

/* Index of a name, or -1. */
EX_API int32_t ex_labels_find(const ex_labels *labels, const char *name)
{
    return ex_map_get(&labels->map, name, strlen(name), -1);
}

/* Index of a name, which is added when it is new. */
EX_API int32_t ex_labels_add(ex_labels *labels, const char *name)
{
    const int32_t known = ex_labels_find(labels, name);
    if (known >= 0) return known;
    ex_map_put(&labels->map, name, strlen(name), ex_labels_count(labels));
    return ex_labels_count(labels) - 1;
}

EX_API void ex_labels_free(ex_labels *labels)
{
    ex_map_free(&labels->map);
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Zero-initialise: no labels, columns found by their usual names. */
typedef struct ex_rows_desc {
    ex_label_kind kind;
    const char *text_column, *pair_column, *label_column;  /* a name, or "#3" for the third column of a TSV file;
                                                              NULL: the usual names; pair "": none */
    bool no_header;                   /* TSV without a header line: columns must be given as "#n" */
    const ex_labels *labels;          /* classes known already (dev after train); NULL: collected from this file */
    int64_t limit;                    /* rows to read; 0: all */
} ex_rows_desc;

typedef struct ex_row {
    const char *text, *pair;          /* NUL-terminated; pair NULL: none */
    uint32_t bytes, pair_bytes;
    int32_t label;                    /* CLASS: index into labels */
    float score;                      /* SCORE */
    int64_t line;
} ex_row;

typedef struct ex_rows {
    int64_t count;
    ex_row *row;                      /* stb_ds array */
    ex_labels labels;
    ex_label_kind kind;
    bool has_pair;
    int64_t replaced;                 /* U+FFFD put in for bytes that are no UTF-8 */
    char *buffer;                     /* the file; all texts point into it */
} ex_rows;

typedef struct exi_rows_reader {
    ex_rows *rows;
    const ex_rows_desc *desc;
    const char *path;
    ex_error *error;
    exi_lines lines;
    char **fields;                    /* TSV: of the present line */
    char **header;                    /* TSV: names; empty without a header line */
    int64_t columns[3];               /* TSV: text, pair, label; -1: none */
    const char *names[3];             /* JSONL: the same */
    char label_text[32];              /* JSONL: a number as text */
} exi_rows_reader;

static const char *const exi_rows_what[3] = {"text", "second text", "label"};

/* Usual names: GLUE's, MRPC's, QNLI's. A pair column is only looked for beside its first column. */
static const char *const exi_rows_text[] = {"sentence1", "question1", "premise", "question",
                                            "#1 String", "sentence",  "text",    NULL};
static const char *const exi_rows_pair[][3] = {
    {"sentence1", "sentence2", NULL}, {"question1", "question2", NULL}, {"premise", "hypothesis", NULL},
    {"question", "sentence", NULL}, {"#1 String", "#2 String", NULL}
};
static const char *const exi_rows_class[] = {"label", "gold_label", "is_duplicate", "Quality", NULL};
static const char *const exi_rows_score[] = {"score", "similarity", "label", NULL};

EX_API void ex_rows_free(ex_rows *rows)
{
    stbds_arrfree(rows->row);
    ex_labels_free(&rows->labels);
    free(rows->buffer);
    memset(rows, 0, sizeof(*rows));
}

EX_API const char *const *exi_rows_usual(const exi_rows_reader *r, int which, const char *text)
{
    static const char *const nothing[] = {NULL};
    if (which == 0) return exi_rows_text;
    if (which == 2) return r->desc->kind == EX_LABEL_SCORE ? exi_rows_score : exi_rows_class;
    for (size_t i = 0; text != NULL && i < sizeof(exi_rows_pair) / sizeof(exi_rows_pair[0]); i++) {
        if (strcmp(exi_rows_pair[i][0], text) == 0) return exi_rows_pair[i] + 1;
    }
    return nothing;
}

EX_API const char *exi_rows_wanted(const exi_rows_reader *r, int which)
{
    if (which == 0) return r->desc->text_column;
    return which == 1 ? r->desc->pair_column : r->desc->label_column;
}

/* Is this column needed at all? */
EX_API bool exi_rows_needs(const exi_rows_reader *r, int which)
{
    if (which == 1) return r->desc->pair_column != NULL && r->desc->pair_column[0] != 0;
    return which == 0 || r->desc->kind != EX_LABEL_NONE;
}

EX_API bool exi_whole_number(const char *text, int64_t *value)
{
    char *end;
    const size_t length = strlen(text);
    if (length == 0 || length > 18 || strchr("+-0123456789", text[0]) == NULL) return false;
    *value = (int64_t)strtoll(text, &end, 10);
    return end != text && *end == 0;
}

EX_API bool exi_rows_class_of(exi_rows_reader *r, ex_row *row, const char *label)
{
    const ex_labels *known = r->desc->labels;
    ex_text list = {NULL, 0, 0};
    if (known == NULL) {
        row->label = ex_labels_add(&r->rows->labels, label);
        if (row->label < EX_MAX_LABELS) return true;
        return ex_fail(r->error, "%s:%lld: more than %d different labels, the last is \"%.60s\"; is that the label column?",
                       r->path, (long long)r->lines.line, EX_MAX_LABELS, label);
    }
    row->label = ex_labels_find(known, label);
    if (row->label >= 0) return true;
    ex_text_put(&list, "");
    for (int32_t i = 0; i < ex_labels_count(known) && i < 8; i++)
        ex_text_format(&list, "%s%s", i > 0 ? ", " : "", ex_labels_name(known, i));
    ex_fail(r->error, "%s:%lld: label \"%.60s\" is none of the %d known ones (%s)", r->path, (long long)r->lines.line, label,
            (int)ex_labels_count(known), list.at);
    ex_text_free(&list);
    return false;
}

EX_API bool exi_rows_label(exi_rows_reader *r, ex_row *row, const char *label)
{
    char *end;
    double score;
    if (label[0] == 0) return ex_fail(r->error, "%s:%lld: expected a label, found nothing", r->path, (long long)r->lines.line);
    if (r->desc->kind == EX_LABEL_CLASS) return exi_rows_class_of(r, row, label);
    score = strtod(label, &end);
    /* the set of characters keeps out nan, inf and hexadecimal numbers, also under -ffast-math */
    if (end == label || *end != 0 || label[strspn(label, "+-.0123456789eE")] != 0 || score < -1e30 || score > 1e30) {
        return ex_fail(r->error, "%s:%lld: expected a number as score, found \"%.60s\"", r->path, (long long)r->lines.line,
                       label);
    }
    row->score = (float)score;
    return true;
}

EX_API bool exi_rows_add(exi_rows_reader *r, char *text, size_t bytes, char *pair, size_t pair_bytes, const char *label)
{
    ex_row row;
    memset(&row, 0, sizeof(row));
    if (bytes > UINT32_MAX || pair_bytes > UINT32_MAX)
        return ex_fail(r->error, "%s:%lld: a text of 4 GiB", r->path, (long long)r->lines.line);
    row.text = text;
    row.bytes = (uint32_t)bytes;
    row.pair = pair;
    row.pair_bytes = (uint32_t)pair_bytes;
    row.line = r->lines.line;
    if (r->desc->kind != EX_LABEL_NONE && !exi_rows_label(r, &row, label)) return false;
    if (pair != NULL) r->rows->has_pair = true;
    stbds_arrput(r->rows->row, row);
    return true;
}

/* ------------------------------------------------------------------------------------------------ TSV */

/* Cuts line at its tabs. Quotes are text: GLUE's files hold single ones. */
EX_API void exi_tsv_split(char *line, char ***fields)
{
    stbds_arrsetlen(*fields, 0);
    for (;;) {
        char *tab = strchr(line, '\t');
        stbds_arrput(*fields, line);
        if (tab == NULL) return;
        *tab = 0;
        line = tab + 1;
    }
}

EX_API bool exi_tsv_no_column(const exi_rows_reader *r, int which, const char *name, const char *const *usual)
{
    ex_text has = {NULL, 0, 0}, wanted = {NULL, 0, 0};
    for (int i = 0; name == NULL && usual[i] != NULL; i++)
        ex_text_format(&wanted, "%s\"%s\"", i > 0 ? ", " : "one of ", usual[i]);
    for (size_t i = 0; i < stbds_arrlenu(r->header); i++) ex_text_format(&has, "%s\"%.40s\"", i > 0 ? ", " : "", r->header[i]);
    if (name != NULL) ex_text_format(&wanted, "\"%s\"", name);
    if (r->desc->no_header)
        ex_fail(r->error, "%s: without a header line the %s column must be given by its number, as \"#1\"", r->path,
                exi_rows_what[which]);
    else
        ex_fail(r->error, "%s:1: expected a column for the %s: %s; found the columns %s", r->path, exi_rows_what[which],
                wanted.at, has.at);
    ex_text_free(&has);
    ex_text_free(&wanted);
    return false;
}

/* Column of a name or "#n"; -1. */
EX_API int64_t exi_tsv_column(const exi_rows_reader *r, const char *name)
{
    int64_t number;
    for (size_t i = 0; i < stbds_arrlenu(r->header); i++) {
        if (strcmp(r->header[i], name) == 0) return (int64_t)i;
    }
    if (name[0] == '#' && exi_whole_number(name + 1, &number) && number >= 1 && number <= 100000) {
        if (r->desc->no_header || number <= (int64_t)stbds_arrlenu(r->header)) return number - 1;
    }
    return -1;
}

EX_API bool exi_tsv_find_columns(exi_rows_reader *r)
{
    for (int which = 0; which < 3; which++) {
        const char *name = exi_rows_wanted(r, which);
        const char *text = r->columns[0] >= 0 && r->columns[0] < (int64_t)stbds_arrlenu(r->header) ? r->header[r->columns[0]]
                                                                                                   : NULL;
        const char *const *usual = exi_rows_usual(r, which, text);
        r->columns[which] = -1;
        if (which == 2 && r->desc->kind == EX_LABEL_NONE) continue;
        if (name != NULL && name[0] != 0) r->columns[which] = exi_tsv_column(r, name);
        for (int i = 0; name == NULL && usual[i] != NULL && r->columns[which] < 0; i++)
            r->columns[which] = exi_tsv_column(r, usual[i]);
        if (r->columns[which] < 0 && exi_rows_needs(r, which)) return exi_tsv_no_column(r, which, name, usual);
    }
    return true;
}

EX_API bool exi_tsv_row(exi_rows_reader *r, char *line, size_t bytes)
{
    int64_t need = 0;
    char *text, *pair;
    for (int which = 0; which < 3; which++) need = r->columns[which] + 1 > need ? r->columns[which] + 1 : need;
    if (memchr(line, 0, bytes) != NULL)
        return ex_fail(r->error, "%s:%lld: expected text, found a NUL byte", r->path, (long long)r->lines.line);
    if (bytes == 0)
        return ex_fail(r->error, "%s:%lld: expected %lld column(s), found an empty line", r->path, (long long)r->lines.line,
                       (long long)need);
    exi_tsv_split(line, &r->fields);
    if ((int64_t)stbds_arrlenu(r->fields) < need) {
        return ex_fail(r->error, "%s:%lld: expected at least %lld columns, found %zu", r->path, (long long)r->lines.line,
                       (long long)need, stbds_arrlenu(r->fields));
    }
    if (!r->desc->no_header && stbds_arrlenu(r->fields) > stbds_arrlenu(r->header)) {
        return ex_fail(r->error,
                       "%s:%lld: expected at most the %zu columns of the header line, found %zu; is there a tab inside a text?",
                       r->path, (long long)r->lines.line, stbds_arrlenu(r->header), stbds_arrlenu(r->fields));
    }
    text = r->fields[r->columns[0]];
    pair = r->columns[1] >= 0 ? r->fields[r->columns[1]] : NULL;
    return exi_rows_add(r, text, strlen(text), pair, pair != NULL ? strlen(pair) : 0,
                        r->columns[2] >= 0 ? r->fields[r->columns[2]] : NULL);
}

EX_API bool exi_tsv_read(exi_rows_reader *r)
{
    size_t bytes = 0;
    bool fine = true;
    char *line = NULL;
    if (!r->desc->no_header) {
        line = exi_lines_next(&r->lines, &bytes);
        if (line != NULL) exi_tsv_split(line, &r->header);
    }
    fine = exi_tsv_find_columns(r);
    while (fine && !exi_only_space(r->lines.at, r->lines.end) &&
           (r->desc->limit == 0 || (int64_t)stbds_arrlenu(r->rows->row) < r->desc->limit)) {
        line = exi_lines_next(&r->lines, &bytes);
        fine = exi_tsv_row(r, line, bytes);
    }
    return fine;
}

/* ------------------------------------------------------------------------------------------------ JSONL */

/* Names are settled by the first row. */
EX_API bool exi_jsonl_find_names(exi_rows_reader *r, const ex_json *json)
{
    for (int which = 0; which < 3; which++) {
        const char *name = exi_rows_wanted(r, which);
        const char *const *usual = exi_rows_usual(r, which, r->names[0]);
        if (which == 2 && r->desc->kind == EX_LABEL_NONE) continue;
        if (name != NULL) r->names[which] = name[0] != 0 ? name : NULL;
        for (int i = 0; name == NULL && usual[i] != NULL && r->names[which] == NULL; i++) {
            if (ex_json_get(ex_json_root(json), usual[i]) != NULL) r->names[which] = usual[i];
        }
        if (r->names[which] == NULL && exi_rows_needs(r, which)) {
            return ex_fail(r->error, "%s:%lld: expected a name for the %s (such as \"%s\"), found none", r->path,
                           (long long)r->lines.line, exi_rows_what[which], usual[0]);
        }
    }
    return true;
}

/* A label may be a string, a number or a boolean. */
EX_API const char *exi_jsonl_label(exi_rows_reader *r, const ex_json *json)
{
    const ex_json_node *node = ex_json_get(ex_json_root(json), r->names[2]);
    int64_t whole;
    if (ex_json_is(node, EX_JSON_STRING)) return node->as.text;
    if (ex_json_int(node, INT64_MIN, INT64_MAX, &whole)) snprintf(r->label_text, sizeof(r->label_text), "%lld", (long long)whole);
    else if (ex_json_is(node, EX_JSON_NUMBER)) snprintf(r->label_text, sizeof(r->label_text), "%.17g", node->as.number);
    else if (ex_json_is(node, EX_JSON_TRUE) || ex_json_is(node, EX_JSON_FALSE))
        return node->type == EX_JSON_TRUE ? "true" : "false";
    else {
        ex_fail(r->error, "%s:%lld: expected \"%s\" with a number or a string, found %s", r->path, (long long)r->lines.line,
                r->names[2], node != NULL ? ex_json_type_name(node->type) : "nothing of that name");
        return NULL;
    }
    return r->label_text;
}

EX_API bool exi_jsonl_row(exi_rows_reader *r, ex_json *json, char *line, size_t bytes)
{
    const ex_json_node *text, *pair = NULL;
    union { const char *from; char *to; } shown[2];
    const char *label = NULL;
    if (!ex_json_parse(json, r->path, exi_lines_number(&r->lines), line, bytes, r->error)) return false;
    if (ex_json_root(json)->type != EX_JSON_OBJECT) {
        return ex_fail(r->error, "%s:%lld: expected an object, found %s", r->path, (long long)r->lines.line,
                       ex_json_type_name(ex_json_root(json)->type));
    }
    if (r->names[0] == NULL && !exi_jsonl_find_names(r, json)) return false;
    text = ex_json_need(json, ex_json_root(json), r->names[0], EX_JSON_STRING, r->error);
    if (text == NULL) return false;
    if (r->names[1] != NULL) {
        pair = ex_json_need(json, ex_json_root(json), r->names[1], EX_JSON_STRING, r->error);
        if (pair == NULL) return false;
    }
    if (r->desc->kind != EX_LABEL_NONE && (label = exi_jsonl_label(r, json)) == NULL) return false;
    shown[0].from = text->as.text;
    shown[1].from = pair != NULL ? pair->as.text : NULL;
    return exi_rows_add(r, shown[0].to, text->count, shown[1].to, pair != NULL ? pair->count : 0, label);
}

EX_API bool exi_jsonl_read(exi_rows_reader *r)
{
    ex_json json;
    bool fine = true;
    memset(&json, 0, sizeof(json));
    while (fine && !exi_only_space(r->lines.at, r->lines.end) &&
           (r->desc->limit == 0 || (int64_t)stbds_arrlenu(r->rows->row) < r->desc->limit)) {
        size_t bytes = 0;
        char *line = exi_lines_next(&r->lines, &bytes);
        if (!exi_only_space(line, line + bytes)) fine = exi_jsonl_row(r, &json, line, bytes);
    }
    r->rows->replaced += json.replaced;
    ex_json_free(&json);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ read */

typedef struct exi_label_order { int64_t value; int32_t index; } exi_label_order;

EX_API int exi_compare_labels(const void *a, const void *b)
{
    const exi_label_order *x = (const exi_label_order *)a, *y = (const exi_label_order *)b;
    return x->value != y->value ? (x->value < y->value ? -1 : 1) : x->index < y->index ? -1 : x->index > y->index;
}

/* When all names are whole numbers, classes go by their value, not by their first row. */
EX_API void exi_rows_sort_labels(ex_rows *rows)
{
    const int32_t count = ex_labels_count(&rows->labels);
    exi_label_order *order = (exi_label_order *)ex_alloc((size_t)count, sizeof(exi_label_order));
    int32_t *place = (int32_t *)ex_alloc((size_t)count, sizeof(int32_t));
    ex_labels sorted;
    bool whole = true;
    memset(&sorted, 0, sizeof(sorted));
    for (int32_t i = 0; i < count && whole; i++) {
        order[i].index = i;
        whole = exi_whole_number(ex_labels_name(&rows->labels, i), &order[i].value);
    }
    if (whole) {
        qsort(order, (size_t)count, sizeof(exi_label_order), exi_compare_labels);
        for (int32_t i = 0; i < count; i++)
            place[order[i].index] = ex_labels_add(&sorted, ex_labels_name(&rows->labels, order[i].index));
        for (size_t i = 0; i < stbds_arrlenu(rows->row); i++) rows->row[i].label = place[rows->row[i].label];
        ex_labels_free(&rows->labels);
        rows->labels = sorted;
    }
    free(order);
    free(place);
}

/* Reads *.jsonl as one JSON object per line, any other name as TSV. A file without rows is an error. On failure rows is empty. */
EX_API bool ex_rows_read(ex_rows *rows, const char *path, const ex_rows_desc *desc, ex_error *error)
{
    exi_rows_reader r;
    size_t bytes = 0;
    const size_t length = strlen(path);
    bool fine;
    memset(&r, 0, sizeof(r));
    memset(rows, 0, sizeof(*rows));
    r.rows = rows;
    r.desc = desc;
    r.path = path;
    r.error = error;
    rows->kind = desc->kind;
    rows->buffer = ex_read_file(path, &bytes, error);
    if (rows->buffer == NULL) return false;
    rows->buffer = ex_utf8_repair(rows->buffer, &bytes, &rows->replaced);
    exi_lines_start(&r.lines, rows->buffer, bytes);
    fine = !exi_only_space(r.lines.at, r.lines.end) || ex_fail(error, "%s: expected rows of text, found an empty file", path);
    fine = fine && (length > 6 && strcmp(path + length - 6, ".jsonl") == 0 ? exi_jsonl_read(&r) : exi_tsv_read(&r));
    rows->count = (int64_t)stbds_arrlenu(rows->row);
    if (fine && rows->count == 0) fine = ex_fail(error, "%s: expected rows after the header line, found none", path);
    if (fine && desc->kind == EX_LABEL_CLASS && desc->labels == NULL) exi_rows_sort_labels(rows);
    for (int32_t i = 0; desc->labels != NULL && i < ex_labels_count(desc->labels); i++)
        ex_labels_add(&rows->labels, ex_labels_name(desc->labels, i));
    stbds_arrfree(r.fields);
    stbds_arrfree(r.header);
    if (!fine) ex_rows_free(rows);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ tokens */

/* Sequence i is tokens[starts[i] .. starts[i + 1]). Plain malloc'ed arrays of exactly the size they need. */
typedef struct ex_dataset {
    int64_t count;
    int64_t *starts;                  /* [count + 1] */
    int32_t *tokens;
    uint8_t *types;                   /* NULL: all 0 */
    int32_t *labels;                  /* CLASS [count]; SPAN [2 * count] (start and end token); else NULL */
    int32_t labels_each;              /* 1, or 2 for SPAN */
    float *targets;                   /* SCORE [count]; else NULL */
    int32_t longest;                  /* tokens of the longest sequence */
    int64_t truncated;                /* how many were cut */
    /* windows of ex_squad.h only */
    int64_t *question;                /* [count]: of which question window i is a part */
    ex_span *offsets;                 /* per token: bytes in the context; 0, 0 outside it */
    int32_t *context_first, *context_end;                  /* [count]: the tokens of the context, inside the sequence */
} ex_dataset;

EX_API void ex_dataset_free(ex_dataset *set)
{
    free(set->starts);
    free(set->tokens);
    free(set->types);
    free(set->labels);
    free(set->targets);
    free(set->question);
    free(set->offsets);
    free(set->context_first);
    free(set->context_end);
    memset(set, 0, sizeof(*set));
}

/* Grows while sequences come in. */
typedef struct exi_dataset_builder {
    int64_t *starts, *question;
    int32_t *tokens, *labels, *context_first, *context_end;
    uint8_t *types;
    ex_span *offsets;
    bool typed;                       /* some type is not 0 */
    int32_t longest;
} exi_dataset_builder;

/* Takes window w of an encoding. */
EX_API void exi_dataset_take(exi_dataset_builder *b, const ex_encoding *encoding, int32_t w)
{
    const int32_t from = encoding->first[w], count = encoding->first[w + 1] - from;
    if (b->starts == NULL) stbds_arrput(b->starts, 0);
    for (int32_t i = from; i < from + count; i++) {
        stbds_arrput(b->tokens, encoding->ids[i]);
        stbds_arrput(b->types, (uint8_t)encoding->types[i]);
        b->typed = b->typed || encoding->types[i] != 0;
    }
    stbds_arrput(b->starts, (int64_t)stbds_arrlenu(b->tokens));
    b->longest = count > b->longest ? count : b->longest;
}

/* A plain array of count * size bytes; the stb_ds array goes. NULL stays NULL. */
EX_API void *exi_dataset_plain(const void *from, size_t count, size_t size)
{
    void *plain;
    if (from == NULL) return NULL;
    plain = ex_alloc(count, size);
    if (count > 0) memcpy(plain, from, count * size);
    return plain;
}
#define EXI_DATASET_MOVE(type, to, array) \
    do { (to) = (type *)exi_dataset_plain(array, stbds_arrlenu(array), sizeof(type)); stbds_arrfree(array); } while (0)

EX_API void exi_dataset_finish(ex_dataset *set, exi_dataset_builder *b)
{
    if (b->starts == NULL) stbds_arrput(b->starts, 0);
    set->count = (int64_t)stbds_arrlenu(b->starts) - 1;
    set->longest = b->longest;
    if (!b->typed) stbds_arrfree(b->types);
    EXI_DATASET_MOVE(int64_t, set->starts, b->starts);
    EXI_DATASET_MOVE(int32_t, set->tokens, b->tokens);
    EXI_DATASET_MOVE(uint8_t, set->types, b->types);
    EXI_DATASET_MOVE(int32_t, set->labels, b->labels);
    EXI_DATASET_MOVE(int64_t, set->question, b->question);
    EXI_DATASET_MOVE(ex_span, set->offsets, b->offsets);
    EXI_DATASET_MOVE(int32_t, set->context_first, b->context_first);
    EXI_DATASET_MOVE(int32_t, set->context_end, b->context_end);
    if (set->tokens == NULL) set->tokens = (int32_t *)ex_alloc(1, sizeof(int32_t));
}

/* Tokens of all rows; pairs are cut longest first. max_length counts special tokens; 0: no limit. */
EX_API bool ex_dataset_rows(ex_dataset *set, const ex_rows *rows, const ex_tokenizer *tokenizer, int32_t max_length,
                            ex_error *error)
{
    exi_dataset_builder builder;
    ex_encoding encoding;
    bool fine = true;
    memset(&builder, 0, sizeof(builder));
    memset(&encoding, 0, sizeof(encoding));
    memset(set, 0, sizeof(*set));
    set->labels_each = 1;
    if (rows->kind == EX_LABEL_SCORE) set->targets = (float *)ex_alloc((size_t)rows->count, sizeof(float));
    for (int64_t i = 0; fine && i < rows->count; i++) {
        const ex_row *row = &rows->row[i];
        ex_encode_desc desc;
        memset(&desc, 0, sizeof(desc));
        desc.text = row->text;
        desc.bytes = row->bytes;
        desc.pair = row->pair;
        desc.pair_bytes = row->pair_bytes;
        desc.max_length = max_length;
        fine = ex_tokenizer_encode(tokenizer, &desc, &encoding, error);
        if (!fine) break;
        exi_dataset_take(&builder, &encoding, 0);
        set->truncated += encoding.truncated;
        if (rows->kind == EX_LABEL_CLASS) stbds_arrput(builder.labels, row->label);
        if (rows->kind == EX_LABEL_SCORE) set->targets[i] = row->score;
    }
    exi_dataset_finish(set, &builder);
    ex_encoding_free(&encoding);
    if (!fine) ex_dataset_free(set);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ batches */

/* Packed sequences, no padding. Zero-initialise, reuse; arrays of stb_ds. */
typedef struct ex_batch {
    int32_t sequences;
    int32_t *offsets, *tokens, *types, *labels;            /* types, labels: NULL when the data set has none */
    float *targets;
    int32_t *target_offsets;          /* encoder and decoder: where the labels of each sequence begin; else NULL */
    int64_t *index;                   /* which sequence of the data set each one is */
} ex_batch;

EX_API void ex_batch_free(ex_batch *batch)
{
    stbds_arrfree(batch->offsets);
    stbds_arrfree(batch->tokens);
    stbds_arrfree(batch->types);
    stbds_arrfree(batch->labels);
    stbds_arrfree(batch->targets);
    stbds_arrfree(batch->target_offsets);
    stbds_arrfree(batch->index);
    memset(batch, 0, sizeof(*batch));
}

/* Copies the sequences index[0 .. count) of set. */
EX_API void ex_batch_gather(ex_batch *batch, const ex_dataset *set, const int64_t *index, int32_t count)
{
    batch->sequences = count;
    stbds_arrsetlen(batch->offsets, 0);
    stbds_arrsetlen(batch->tokens, 0);
    stbds_arrsetlen(batch->types, 0);
    stbds_arrsetlen(batch->labels, 0);
    stbds_arrsetlen(batch->targets, 0);
    stbds_arrsetlen(batch->index, 0);
    if (set->types == NULL) stbds_arrfree(batch->types);
    if (set->labels == NULL) stbds_arrfree(batch->labels);
    if (set->targets == NULL) stbds_arrfree(batch->targets);
    stbds_arrput(batch->offsets, 0);
    for (int32_t s = 0; s < count; s++) {
        const int64_t i = index[s], from = set->starts[i], length = set->starts[i + 1] - from;
        for (int64_t k = from; k < from + length; k++) stbds_arrput(batch->tokens, set->tokens[k]);
        for (int64_t k = from; set->types != NULL && k < from + length; k++) stbds_arrput(batch->types, set->types[k]);
        for (int32_t k = 0; set->labels != NULL && k < set->labels_each; k++)
            stbds_arrput(batch->labels, set->labels[i * set->labels_each + k]);
        if (set->targets != NULL) stbds_arrput(batch->targets, set->targets[i]);
        stbds_arrput(batch->index, i);
        stbds_arrput(batch->offsets, (int32_t)stbds_arrlenu(batch->tokens));
    }
}

#ifdef APT_H
/* The batch as apt.h takes it: views, valid until the batch changes. */
EX_API apt_batch ex_batch_apt(const ex_batch *batch)
{
    apt_batch view;
    memset(&view, 0, sizeof(view));
    view.sequences = batch->sequences;
    view.offsets = batch->offsets;
    view.tokens = batch->tokens;
    view.types = batch->types;
    view.labels = batch->labels;
    view.targets = batch->targets;
    view.target_offsets = batch->target_offsets;
    return view;
}
#endif

EX_API uint64_t exi_mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Where place i of epoch's order comes from: a permutation of 0 .. count-1 that needs no memory. A Feistel network
   permutes the next power of four; values outside are sent round again, which ends since it is a permutation. */
EX_API int64_t ex_permute(uint64_t seed, int64_t epoch, int64_t count, int64_t i)
{
    const uint64_t key = exi_mix(seed + 0x9e3779b97f4a7c15u * ((uint64_t)epoch + 1));
    uint64_t at = (uint64_t)i, mask;
    int half = 1;
    while (half < 31 && (uint64_t)count > (uint64_t)1 << 2 * half) half++;
    mask = ((uint64_t)1 << half) - 1;
    if (count <= 1) return 0;
    do {
        uint64_t left = at >> half, right = at & mask;
        for (uint64_t round = 0; round < 6; round++) {
            const uint64_t next = left ^ (exi_mix(key ^ (right + (round << 58))) & mask);
            left = right;
            right = next;
        }
        at = left << half | right;
    } while (at >= (uint64_t)count);
    return (int64_t)at;
}

/* The whole state of the order: put it into a checkpoint. index: sequences of this epoch handed out. */
typedef struct ex_cursor { int64_t epoch, index; } ex_cursor;

/* ------------------------------------------------------------------------------------------------ order of the data */

/* Rows that can be put in order and into batches, whatever they are: how many, the tokens of each, and how the batch of some of
   them is made. ex_dataset_source and those like it. */
typedef struct ex_source {
    const void *set;
    int64_t count;
    int32_t (*length)(const void *set, int64_t row);
    void (*gather)(ex_batch *batch, const void *set, const int64_t *index, int32_t count);
} ex_source;

/* An endless, shuffled, reproducible stream of batches; its whole state is `at`. */
typedef struct ex_feed {
    ex_source source;
    int32_t batch;                    /* rows per batch */
    uint64_t seed;
    bool by_length;                   /* rows of similar length share a batch */
    ex_cursor at;                     /* epoch, and rows of it handed out */
    int64_t *order;                   /* rows of epoch `ordered` */
    int64_t ordered;                  /* epoch + 1; 0: none yet */
    ex_batch rows;
} ex_feed;

typedef struct exi_keyed { int32_t key; int64_t place, row; } exi_keyed;

EX_API int exi_compare_keyed(const void *a, const void *b)
{
    const exi_keyed *x = (const exi_keyed *)a, *y = (const exi_keyed *)b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return x->place < y->place ? -1 : x->place > y->place;
}

EX_API int32_t exi_dataset_length(const void *set, int64_t row)
{
    const int64_t *starts = ((const ex_dataset *)set)->starts;
    return (int32_t)(starts[row + 1] - starts[row]);
}

EX_API void exi_dataset_gather(ex_batch *batch, const void *set, const int64_t *index, int32_t count)
{
    ex_batch_gather(batch, (const ex_dataset *)set, index, count);
}

EX_API ex_source ex_dataset_source(const ex_dataset *set)
{
    const ex_source source = {set, set->count, exi_dataset_length, exi_dataset_gather};
    return source;
}

/* Sorts order[0 .. count) by length; equal lengths keep their order. */
EX_API void exi_sort_by_length(const ex_source *rows, int64_t *order, int64_t count)
{
    exi_keyed *keyed = (exi_keyed *)ex_alloc((size_t)count, sizeof(exi_keyed));
    for (int64_t i = 0; i < count; i++) {
        keyed[i].key = rows->length(rows->set, order[i]);
        keyed[i].place = i;
        keyed[i].row = order[i];
    }
    qsort(keyed, (size_t)count, sizeof(exi_keyed), exi_compare_keyed);
    for (int64_t i = 0; i < count; i++) order[i] = keyed[i].row;
    free(keyed);
}

/* Sorts windows of 50 batches by length, then shuffles the full batches (a short last one stays last). */
EX_API void exi_feed_group(ex_feed *feed)
{
    const ex_source *rows = &feed->source;
    const int64_t count = rows->count, window = 50 * (int64_t)feed->batch, full = count / feed->batch;
    int64_t *order = feed->order;
    int64_t *sorted = (int64_t *)ex_alloc((size_t)count, sizeof(int64_t));
    memcpy(sorted, order, (size_t)count * sizeof(int64_t));
    for (int64_t i = 0; i < count; i += window)
        exi_sort_by_length(rows, sorted + i, count - i < window ? count - i : window);
    for (int64_t b = 0; b < full; b++) {
        const int64_t from = ex_permute(feed->seed + 1, feed->at.epoch, full, b);
        memcpy(order + b * feed->batch, sorted + from * feed->batch, (size_t)feed->batch * sizeof(int64_t));
    }
    memcpy(order + full * feed->batch, sorted + full * feed->batch, (size_t)(count - full * feed->batch) * sizeof(int64_t));
    free(sorted);
}

/* The next feed->batch row numbers, fewer at the end of an epoch. Valid until the next call. */
EX_API const int64_t *exi_feed_take(ex_feed *feed, int32_t *take)
{
    const int64_t count = feed->source.count;
    if (feed->at.index >= count) {
        feed->at.index = 0;
        feed->at.epoch++;
    }
    if (feed->ordered != feed->at.epoch + 1) {
        if (feed->order == NULL) feed->order = (int64_t *)ex_alloc((size_t)count, sizeof(int64_t));
        for (int64_t i = 0; i < count; i++) feed->order[i] = ex_permute(feed->seed, feed->at.epoch, count, i);
        if (feed->by_length) exi_feed_group(feed);
        feed->ordered = feed->at.epoch + 1;
    }
    const int64_t *at = feed->order + feed->at.index, left = count - feed->at.index;
    *take = left < feed->batch ? (int32_t)left : feed->batch;
    feed->at.index += *take;
    return at;
}

/* The next batch; the last one of an epoch may be smaller. Valid until the next call. */
EX_API ex_batch *ex_feed_next(ex_feed *feed)
{
    int32_t take;
    const int64_t *at = exi_feed_take(feed, &take);
    feed->source.gather(&feed->rows, feed->source.set, at, take);
    return &feed->rows;
}

EX_API int64_t ex_feed_batches(const ex_feed *feed)
{
    return (feed->source.count + feed->batch - 1) / feed->batch;
}

EX_API void ex_feed_free(ex_feed *feed)
{
    free(feed->order);
    ex_batch_free(&feed->rows);
    memset(feed, 0, sizeof(*feed));
}

#include "ex_squad.h"

#endif /* EX_DATA_H */
