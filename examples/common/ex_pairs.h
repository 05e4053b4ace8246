/* ex_pairs.h - data files for models that write text: pairs of a source and a target, out of

     *.csv              RFC 4180 with a header line: quoted fields may hold commas, line ends and doubled quotes
     *.jsonl            one object per line with a string for each
     *.json             an array of such objects, or one per line
     any other name     TSV: source<TAB>target

       ex_pairs_read     the pairs of a file; instructions in the manner of Alpaca become prompts
       ex_groups_make    pairs of the same source together: its references

   How they become tokens is in ex_token_rows.h. Errors name the file, the line, what was expected and what was found. */
#ifndef EX_PAIRS_H
#define EX_PAIRS_H

#include "ex_base.h"
#include "ex_data.h"
#include "ex_json.h"

/* Zero-initialise: columns or names are the usual ones (source and target, mr and ref, input and output, ...), or without a
   header line that has them the first two columns of a TSV file. Objects with "instruction" and "output" are instructions. */
typedef struct ex_pairs_desc {
    const char *source, *target;      /* name of a column or of a string in each object, or "#2" for a column; both or none */
    const char *prefix;               /* put before each source ("summarize: "); not before instructions */
    bool no_header;                   /* CSV, TSV: the first line is data */
    bool no_target;                   /* only sources are needed; targets are empty */
    int64_t limit;                    /* pairs to read; 0: all */
} ex_pairs_desc;

typedef struct ex_pair {
    const char *source, *target;      /* NUL-terminated */
    uint32_t source_bytes, target_bytes;
    int64_t line;
} ex_pair;

typedef struct ex_pairs {
    int64_t count;
    ex_pair *pair;                    /* stb_ds array */
    bool instructions;                /* sources are prompts made of instructions */
    int64_t replaced;                 /* U+FFFD put in for bytes that are no UTF-8 */
    char *buffer;                     /* the file; texts point into it ... */
    char **made;                      /* ... or to these; stb_ds array */
} ex_pairs;

EX_API void ex_pairs_free(ex_pairs *pairs)
{
    for (size_t i = 0; i < stbds_arrlenu(pairs->made); i++) free(pairs->made[i]);
    stbds_arrfree(pairs->made);
    stbds_arrfree(pairs->pair);
    free(pairs->buffer);
    memset(pairs, 0, sizeof(*pairs));
}

/* Usual names of the two, most specific first. */
static const char *const exi_pairs_usual[][2] = {
    {"source", "target"}, {"mr", "ref"}, {"document", "summary"}, {"article", "highlights"}, {"dialogue", "summary"},
    {"text", "summary"}, {"question", "answer"}, {"prompt", "completion"}, {"prompt", "response"}, {"input", "output"},
    {"inputs", "targets"}, {"input", "target"}, {"text", "target"}, {"sentence", "label"}, {"text", "label"}
};
#define EXI_PAIRS_USUAL (sizeof(exi_pairs_usual) / sizeof(exi_pairs_usual[0]))

typedef struct exi_field { char *at; size_t bytes; } exi_field;

typedef struct exi_pairs_reader {
    ex_pairs *pairs;
    const ex_pairs_desc *desc;
    const char *path;
    ex_error *error;
    exi_lines lines;
    bool csv;
    exi_field *fields;                /* of the present record; stb_ds array */
    int64_t start;                    /* line where it starts */
    size_t width;                     /* CSV: fields of every record */
    int64_t columns[2];               /* source, target; -1: not needed */
    const char *names[2];             /* the same in an object */
} exi_pairs_reader;

/* ------------------------------------------------------------------------------------------------ one pair */

/* The prompts that Alpaca was trained with. input: NULL or empty for none. */
EX_API char *ex_alpaca_prompt(const char *instruction, const char *input)
{
    if (input == NULL || input[0] == 0) {
        return ex_format("Below is an instruction that describes a task. Write a response that appropriately completes the "
                         "request.\n\n### Instruction:\n%s\n\n### Response:",
                         instruction);
    }
    return ex_format("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
                     "response that appropriately completes the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n"
                     "### Response:",
                     instruction, input);
}

EX_API bool exi_pairs_add(exi_pairs_reader *r, const char *source, size_t source_bytes, const char *target, size_t target_bytes,
                          int64_t line)
{
    ex_pair pair;
    if (source_bytes > UINT32_MAX || target_bytes > UINT32_MAX)
        return ex_fail(r->error, "%s:%lld: a text of 4 GiB", r->path, (long long)line);
    pair.source = source;
    pair.target = target;
    pair.source_bytes = (uint32_t)source_bytes;
    pair.target_bytes = (uint32_t)target_bytes;
    pair.line = line;
    stbds_arrput(r->pairs->pair, pair);
    return true;
}

/* The same with the prefix. */
EX_API bool exi_pairs_add_prefixed(exi_pairs_reader *r, const char *source, size_t source_bytes, const char *target,
                                   size_t target_bytes, int64_t line)
{
    ex_text text = {NULL, 0, 0};
    if (r->desc->prefix == NULL || r->desc->prefix[0] == 0)
        return exi_pairs_add(r, source, source_bytes, target, target_bytes, line);
    ex_text_put(&text, r->desc->prefix);
    ex_text_add(&text, source, source_bytes);
    stbds_arrput(r->pairs->made, text.at);
    return exi_pairs_add(r, text.at, text.length, target, target_bytes, line);
}

EX_API bool exi_pairs_full(const exi_pairs_reader *r)
{
    return r->desc->limit > 0 && (int64_t)stbds_arrlenu(r->pairs->pair) >= r->desc->limit;
}

/* ------------------------------------------------------------------------------------------------ CSV */

/* A field in quotes, r->lines.at behind the first one: taken out of them in place. */
EX_API bool exi_csv_quoted(exi_pairs_reader *r, exi_field *field)
{
    exi_lines *lines = &r->lines;
    char *out = lines->at;
    const int64_t opened = lines->line;
    field->at = out;
    for (;;) {
        if (lines->at >= lines->end)
            return ex_fail(r->error, "%s:%lld: a field in quotes that begins in this line has no end", r->path,
                           (long long)opened);
        if (*lines->at == '"') {
            lines->at++;
            if (lines->at >= lines->end || *lines->at != '"') break;
        }
        lines->line += *lines->at == '\n';
        *out++ = *lines->at++;
    }
    field->bytes = (size_t)(out - field->at);
    return true;
}

/* A field without quotes: up to the next comma or the end of the line, which the caller looks at. */
EX_API bool exi_csv_plain(exi_pairs_reader *r, exi_field *field)
{
    exi_lines *lines = &r->lines;
    field->at = lines->at;
    while (lines->at < lines->end && (*lines->at == 0 || strchr(",\n\r\"", *lines->at) == NULL)) lines->at++;
    if (lines->at < lines->end && *lines->at == '"')
        return ex_fail(r->error, "%s:%lld: a quote inside of a field that does not begin with one", r->path,
                       (long long)lines->line);
    field->bytes = (size_t)(lines->at - field->at);
    return true;
}

/* One record into r->fields. Line ends are LF or CR LF. */
EX_API bool exi_csv_record(exi_pairs_reader *r)
{
    exi_lines *lines = &r->lines;
    r->start = ++lines->line;
    stbds_arrsetlen(r->fields, 0);
    for (;;) {
        exi_field field;
        char end;
        const bool quoted = lines->at < lines->end && *lines->at == '"';
        if (quoted) lines->at++;
        if (!(quoted ? exi_csv_quoted(r, &field) : exi_csv_plain(r, &field))) return false;
        if (lines->end - lines->at >= 2 && lines->at[0] == '\r' && lines->at[1] == '\n') lines->at++;
        end = lines->at < lines->end ? *lines->at : '\n';
        if (end != ',' && end != '\n')
            return ex_fail(r->error, "%s:%lld: expected a comma or the end of the line behind a field, found byte 0x%02x",
                           r->path, (long long)lines->line, (unsigned)(unsigned char)end);
        field.at[field.bytes] = 0;                         /* the quote, the comma or the line end that has been read */
        stbds_arrput(r->fields, field);
        lines->at++;
        if (end == '\n') break;
    }
    if (r->width == 0) r->width = stbds_arrlenu(r->fields);
    if (stbds_arrlenu(r->fields) == r->width) return true;
    return ex_fail(r->error, "%s:%lld: expected %zu fields as in the first line, found %zu", r->path, (long long)r->start,
                   r->width, stbds_arrlenu(r->fields));
}

/* ------------------------------------------------------------------------------------------------ columns */

EX_API bool exi_tsv_record(exi_pairs_reader *r)
{
    size_t bytes = 0;
    char *line = exi_lines_next(&r->lines, &bytes), *end = line + bytes;
    r->start = r->lines.line;
    stbds_arrsetlen(r->fields, 0);
    for (;;) {
        exi_field field;
        char *tab = (char *)memchr(line, '\t', (size_t)(end - line));
        field.at = line;
        field.bytes = (size_t)((tab != NULL ? tab : end) - line);
        stbds_arrput(r->fields, field);
        if (tab == NULL) return true;
        *tab = 0;
        line = tab + 1;
    }
}

/* The column of a name or "#n" in the present record, which is the header line; -1. */
EX_API int64_t exi_pairs_column(const exi_pairs_reader *r, const char *name)
{
    int64_t number;
    for (size_t i = 0; i < stbds_arrlenu(r->fields) && !r->desc->no_header; i++) {
        if (strcmp(r->fields[i].at, name) == 0) return (int64_t)i;
    }
    if (name[0] != '#' || !exi_whole_number(name + 1, &number)) return -1;
    return number >= 1 && number <= (int64_t)stbds_arrlenu(r->fields) ? number - 1 : -1;
}

EX_API bool exi_pairs_no_column(const exi_pairs_reader *r, const char *name)
{
    ex_text has = {NULL, 0, 0};
    for (size_t i = 0; i < stbds_arrlenu(r->fields); i++)
        ex_text_format(&has, "%s\"%.40s\"", i > 0 ? ", " : "", r->fields[i].at);
    if (name == NULL)
        ex_fail(r->error, "%s:%lld: expected columns of usual names (such as \"source\" and \"target\"), found %s", r->path,
                (long long)r->start, has.at);
    else if (r->desc->no_header)
        ex_fail(r->error, "%s:%lld: expected the column \"%.60s\" as a number (\"#1\" to \"#%zu\")", r->path, (long long)r->start,
                name, stbds_arrlenu(r->fields));
    else
        ex_fail(r->error, "%s:%lld: expected a column \"%.60s\", found %s", r->path, (long long)r->start, name, has.at);
    ex_text_free(&has);
    return false;
}

/* Looks at the first record. *header: it holds names. */
EX_API bool exi_pairs_find_columns(exi_pairs_reader *r, bool *header)
{
    const char *const names[2] = {r->desc->source, r->desc->no_target ? NULL : r->desc->target};
    *header = !r->desc->no_header;
    r->columns[1] = -1;
    if (names[0] != NULL) {
        for (int i = 0; i < 2; i++) {
            r->columns[i] = names[i] != NULL ? exi_pairs_column(r, names[i]) : -1;
            if (names[i] != NULL && r->columns[i] < 0) return exi_pairs_no_column(r, names[i]);
        }
        return true;
    }
    for (size_t i = 0; *header && i < EXI_PAIRS_USUAL; i++) {
        r->columns[0] = exi_pairs_column(r, exi_pairs_usual[i][0]);
        r->columns[1] = r->desc->no_target ? -1 : exi_pairs_column(r, exi_pairs_usual[i][1]);
        if (r->columns[0] >= 0 && (r->columns[1] >= 0 || r->desc->no_target)) return true;
    }
    if ((r->csv && *header) || stbds_arrlenu(r->fields) < (r->desc->no_target ? 1 : 2)) return exi_pairs_no_column(r, NULL);
    r->columns[0] = 0;
    r->columns[1] = r->desc->no_target ? -1 : 1;
    *header = false;
    return true;
}

/* The present record as a pair. */
EX_API bool exi_pairs_record(exi_pairs_reader *r)
{
    exi_field part[2] = {{NULL, 0}, {NULL, 0}};
    for (int i = 0; i < 2; i++) {
        if (r->columns[i] < 0) continue;
        if (r->columns[i] >= (int64_t)stbds_arrlenu(r->fields))
            return ex_fail(r->error, "%s:%lld: expected at least %lld columns, found %zu", r->path, (long long)r->start,
                           (long long)r->columns[i] + 1, stbds_arrlenu(r->fields));
        part[i] = r->fields[r->columns[i]];
        if (memchr(part[i].at, 0, part[i].bytes) != NULL)
            return ex_fail(r->error, "%s:%lld: expected text, found a NUL byte", r->path, (long long)r->start);
    }
    return exi_pairs_add_prefixed(r, part[0].at, part[0].bytes, part[1].at != NULL ? part[1].at : "", part[1].bytes, r->start);
}

EX_API bool exi_pairs_table(exi_pairs_reader *r)
{
    bool header = true, first = true;
    while (!exi_only_space(r->lines.at, r->lines.end) && !exi_pairs_full(r)) {
        if (!(r->csv ? exi_csv_record(r) : exi_tsv_record(r))) return false;
        if (first && !exi_pairs_find_columns(r, &header)) return false;
        if (!(first && header) && !exi_pairs_record(r)) return false;
        first = false;
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ objects */

/* Names are settled by the first object. */
EX_API bool exi_pairs_find_names(exi_pairs_reader *r, const ex_json_node *object)
{
    if (r->desc->source != NULL) {
        r->names[0] = r->desc->source;
        r->names[1] = r->desc->no_target ? NULL : r->desc->target;
        return true;
    }
    if (ex_json_get(object, "instruction") != NULL) {
        r->pairs->instructions = true;
        r->names[0] = "instruction";
        r->names[1] = r->desc->no_target ? NULL : "output";
        return true;
    }
    for (size_t i = 0; i < EXI_PAIRS_USUAL; i++) {
        if (ex_json_get(object, exi_pairs_usual[i][0]) == NULL) continue;
        if (!r->desc->no_target && ex_json_get(object, exi_pairs_usual[i][1]) == NULL) continue;
        r->names[0] = exi_pairs_usual[i][0];
        r->names[1] = r->desc->no_target ? NULL : exi_pairs_usual[i][1];
        return true;
    }
    return ex_fail(r->error, "%s:%u: expected strings of usual names (such as \"source\" and \"target\", or \"instruction\" and "
                   "\"output\"), found none", r->path, object->line);
}

/* A string without NUL, since prompts and sources are C strings. */
EX_API const ex_json_node *exi_pairs_text(const exi_pairs_reader *r, const ex_json *json, const ex_json_node *object,
                                          const char *name)
{
    const ex_json_node *text = ex_json_need(json, object, name, EX_JSON_STRING, r->error);
    if (text == NULL || memchr(text->as.text, 0, text->count) == NULL) return text;
    ex_fail(r->error, "%s:%u: expected text in \"%s\", found a NUL character", r->path, text->line, name);
    return NULL;
}

EX_API bool exi_pairs_object(exi_pairs_reader *r, const ex_json *json, const ex_json_node *object)
{
    const ex_json_node *source, *target = NULL, *input;
    char *prompt;
    if (object->type != EX_JSON_OBJECT) {
        return ex_fail(r->error, "%s:%u: expected an object, found %s", r->path, object->line, ex_json_type_name(object->type));
    }
    if (r->names[0] == NULL && !exi_pairs_find_names(r, object)) return false;
    source = exi_pairs_text(r, json, object, r->names[0]);
    if (source == NULL) return false;
    if (r->names[1] != NULL && (target = exi_pairs_text(r, json, object, r->names[1])) == NULL) return false;
    if (!r->pairs->instructions) {
        return exi_pairs_add_prefixed(r, source->as.text, source->count, target != NULL ? target->as.text : "",
                                      target != NULL ? target->count : 0, object->line);
    }
    input = ex_json_get(object, "input");
    if (input != NULL && input->type != EX_JSON_NULL && (input = exi_pairs_text(r, json, object, "input")) == NULL) return false;
    prompt = ex_alpaca_prompt(source->as.text, ex_json_is(input, EX_JSON_STRING) ? input->as.text : NULL);
    stbds_arrput(r->pairs->made, prompt);
    return exi_pairs_add(r, prompt, strlen(prompt), target != NULL ? target->as.text : "", target != NULL ? target->count : 0,
                         object->line);
}

EX_API bool exi_pairs_jsonl(exi_pairs_reader *r, ex_json *json)
{
    while (!exi_only_space(r->lines.at, r->lines.end) && !exi_pairs_full(r)) {
        size_t bytes = 0;
        char *line = exi_lines_next(&r->lines, &bytes);
        if (exi_only_space(line, line + bytes)) continue;
        if (!ex_json_parse(json, r->path, exi_lines_number(&r->lines), line, bytes, r->error)) return false;
        if (!exi_pairs_object(r, json, ex_json_root(json))) return false;
    }
    return true;
}

/* Does the text begin with an object, so that it is no array? */
EX_API bool exi_pairs_lines(const exi_pairs_reader *r)
{
    const size_t space = strspn(r->lines.at, " \t\r\n");
    return r->lines.at[space] == '{';
}

EX_API bool exi_pairs_json(exi_pairs_reader *r, ex_json *json)
{
    const ex_json_node *root, *node;
    if (!ex_json_parse(json, r->path, 1, r->lines.at, (size_t)(r->lines.end - r->lines.at), r->error)) return false;
    root = ex_json_root(json);
    if (root->type != EX_JSON_ARRAY)
        return ex_fail(r->error, "%s:%u: expected an array of objects, found %s", r->path, root->line,
                       ex_json_type_name(root->type));
    node = ex_json_first(root);
    for (uint32_t i = 0; i < root->count && !exi_pairs_full(r); i++, node = ex_json_next(node)) {
        if (!exi_pairs_object(r, json, node)) return false;
    }
    return true;
}

/* ------------------------------------------------------------------------------------------------ read */

/* A file without pairs is an error. On failure pairs is empty. */
EX_API bool ex_pairs_read(ex_pairs *pairs, const char *path, const ex_pairs_desc *desc, ex_error *error)
{
    exi_pairs_reader r;
    ex_json json;
    size_t bytes = 0;
    bool fine;
    memset(&r, 0, sizeof(r));
    memset(&json, 0, sizeof(json));
    memset(pairs, 0, sizeof(*pairs));
    r.pairs = pairs;
    r.desc = desc;
    r.path = path;
    r.error = error;
    r.csv = exi_ends_with(path, ".csv");
    if (!desc->no_target && (desc->source == NULL) != (desc->target == NULL))
        return ex_fail(error, "%s: the names of source and target must be given both or not at all", path);
    pairs->buffer = ex_read_file(path, &bytes, error);
    if (pairs->buffer == NULL) return false;
    pairs->buffer = ex_utf8_repair(pairs->buffer, &bytes, &pairs->replaced);
    exi_lines_start(&r.lines, pairs->buffer, bytes);
    if (exi_ends_with(path, ".jsonl")) fine = exi_pairs_jsonl(&r, &json);
    else if (exi_ends_with(path, ".json")) fine = exi_pairs_lines(&r) ? exi_pairs_jsonl(&r, &json) : exi_pairs_json(&r, &json);
    else fine = exi_pairs_table(&r);
    pairs->replaced += json.replaced;
    pairs->count = (int64_t)stbds_arrlenu(pairs->pair);
    if (fine && pairs->count == 0) fine = ex_fail(error, "%s: expected pairs of texts, found none", path);
    stbds_arrfree(r.fields);
    ex_json_free(&json);
    if (!fine) ex_pairs_free(pairs);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ references */

/* Group g is the pairs row[first[g]] .. row[first[g + 1] - 1], all of one source, in the order of the file. */
typedef struct ex_groups {
    int64_t count;
    int64_t *first, *row;             /* [count + 1], [pairs] */
} ex_groups;

EX_API void ex_groups_free(ex_groups *groups)
{
    free(groups->first);
    free(groups->row);
    memset(groups, 0, sizeof(*groups));
}

EX_API void ex_groups_make(ex_groups *groups, const ex_pairs *pairs)
{
    int32_t *group = (int32_t *)ex_alloc((size_t)pairs->count, sizeof(int32_t));
    int64_t *next;
    ex_map sources;
    memset(&sources, 0, sizeof(sources));
    for (int64_t i = 0; i < pairs->count; i++) {
        const ex_pair *pair = &pairs->pair[i];
        group[i] = ex_map_get(&sources, pair->source, pair->source_bytes, (int32_t)ex_map_count(&sources));
        ex_map_put(&sources, pair->source, pair->source_bytes, group[i]);
    }
    groups->count = (int64_t)ex_map_count(&sources);
    groups->first = (int64_t *)ex_alloc((size_t)groups->count + 1, sizeof(int64_t));
    groups->row = (int64_t *)ex_alloc((size_t)pairs->count, sizeof(int64_t));
    next = (int64_t *)ex_alloc((size_t)groups->count, sizeof(int64_t));
    for (int64_t i = 0; i < pairs->count; i++) groups->first[group[i] + 1]++;
    for (int64_t g = 0; g < groups->count; g++) {
        groups->first[g + 1] += groups->first[g];
        next[g] = groups->first[g];
    }
    for (int64_t i = 0; i < pairs->count; i++) groups->row[next[group[i]]++] = i;
    ex_map_free(&sources);
    free(group);
    free(next);
}

#endif /* EX_PAIRS_H */
