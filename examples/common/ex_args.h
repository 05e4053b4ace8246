/* ex_args.h - command-line options from a table.

       static const char *model;  static int64_t steps = 1000;  static double lr = 2e-4;
       static bool resume;  static int32_t method;
       const ex_arg table[] = {
           EX_GROUP("Data"),
           EX_REQUIRED(EX_TEXT("model", "DIR", &model, "folder with config.json and model.safetensors")),
           EX_GROUP("Training"),
           EX_INT("steps", "N", &steps, 1, 1e9, "optimizer steps in all"),
           EX_REAL("lr", "X", &lr, 0, 1, "learning rate"),
           EX_CHOICE("method", &method, "apt|lora|full", "what is trained"),
           EX_FLAG("resume", &resume, "go on from the last checkpoint"),
           EX_ARGS_END
       };

   What a variable holds before ex_args_parse is its default, and --help shows it. Options are --name value or --name=value;
   flags are --name, --no-name, --name=true. Underscores count as dashes. "--" ends the options; nothing may follow it,
   since these programs take no other arguments. --help and -h are built in. */
#ifndef EX_ARGS_H
#define EX_ARGS_H

#include "ex_base.h"
#include "ex_log.h"

typedef enum exi_arg_kind {
    EXI_ARG_END = 0, EXI_ARG_GROUP, EXI_ARG_REQUIRED, EXI_ARG_TEXT, EXI_ARG_FLAG, EXI_ARG_INT, EXI_ARG_REAL, EXI_ARG_CHOICE
} exi_arg_kind;

/* One row; made by the macros only. */
typedef struct ex_arg {
    exi_arg_kind kind;
    const char *name, *value, *help;  /* value: what stands for it in --help, or the choices */
    double least, most;
    union { const char **text; bool *flag; int64_t *whole; double *real; int32_t *choice; } to;
} ex_arg;

#define EX_GROUP(title) {EXI_ARG_GROUP, title, NULL, NULL, 0, 0, {NULL}}
#define EX_TEXT(name, value, target, help) {EXI_ARG_TEXT, name, value, help, 0, 0, {.text = (target)}}
#define EX_FLAG(name, target, help) {EXI_ARG_FLAG, name, NULL, help, 0, 0, {.flag = (target)}}
#define EX_INT(name, value, target, least, most, help) {EXI_ARG_INT, name, value, help, least, most, {.whole = (target)}}
#define EX_REAL(name, value, target, least, most, help) {EXI_ARG_REAL, name, value, help, least, most, {.real = (target)}}
#define EX_CHOICE(name, target, choices, help) {EXI_ARG_CHOICE, name, choices, help, 0, 0, {.choice = (target)}}
#define EX_REQUIRED(...) {EXI_ARG_REQUIRED, NULL, NULL, NULL, 0, 0, {NULL}}, __VA_ARGS__     /* a mark before the row */
#define EX_ARGS_END {EXI_ARG_END, NULL, NULL, NULL, 0, 0, {NULL}}

typedef enum ex_args_result {
    EX_ARGS_OK,
    EX_ARGS_HELP,                     /* help was printed to stdout: exit with 0 */
    EX_ARGS_ERROR                     /* see error->text: exit with 2 */
} ex_args_result;

typedef struct ex_args_about { const char *program, *summary, *usage, *examples; } ex_args_about;   /* examples: lines, or NULL */

/* Rows that stood on the command line. One program has one command line, and tables are constants: hence a static. */
#define EXI_ARGS_MOST 512
static const ex_arg *exi_args_seen[EXI_ARGS_MOST];
static int exi_args_seen_count;

EX_API bool exi_arg_option(const ex_arg *row)
{
    return row->kind >= EXI_ARG_TEXT;
}

EX_API bool exi_arg_seen(const ex_arg *row)
{
    for (int i = 0; i < exi_args_seen_count; i++) {
        if (exi_args_seen[i] == row) return true;
    }
    return false;
}

EX_API bool exi_arg_required(const ex_arg *table, const ex_arg *row)
{
    return row > table && row[-1].kind == EXI_ARG_REQUIRED;
}

/* Do the first `length` bytes of text spell name, underscores counting as dashes? */
EX_API bool exi_arg_named(const char *name, const char *text, size_t length)
{
    if (strlen(name) != length) return false;
    for (size_t i = 0; i < length; i++) {
        if ((text[i] == '_' ? '-' : text[i]) != (name[i] == '_' ? '-' : name[i])) return false;
    }
    return true;
}

EX_API const ex_arg *exi_arg_find(const ex_arg *table, const char *text, size_t length)
{
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        if (exi_arg_option(row) && exi_arg_named(row->name, text, length)) return row;
    }
    return NULL;
}

/* Was the option on the command line? table: the pointer that was given to ex_args_parse. */
EX_API bool ex_args_given(const ex_arg *table, const char *name)
{
    const ex_arg *row = exi_arg_find(table, name, strlen(name));
    return row != NULL && exi_arg_seen(row);
}

/* ------------------------------------------------------------------------------------------------ values */

EX_API bool exi_arg_whole(const char *text, int64_t *value)
{
    char *end;
    double real;
    errno = 0;
    *value = (int64_t)strtoll(text, &end, 10);
    if (end != text && *end == 0 && errno == 0) return true;
    real = strtod(text, &end);                             /* 1e6 */
    if (end == text || *end != 0 || text[strspn(text, "+-.0123456789eE")] != 0 || real < -9e15 || real > 9e15) return false;
    *value = (int64_t)real;
    return (double)*value >= real && (double)*value <= real;
}

EX_API bool exi_arg_real(const char *text, double *value)
{
    char *end;
    *value = strtod(text, &end);
    return end != text && *end == 0 && text[strspn(text, "+-.0123456789eE")] == 0 && ex_finite(*value);
}

/* Index of text in "a|b|c", or -1. */
EX_API int32_t exi_arg_choice(const char *choices, const char *text)
{
    const size_t length = strlen(text);
    for (int32_t index = 0; choices != NULL; index++) {
        const char *bar = strchr(choices, '|');
        const size_t one = bar != NULL ? (size_t)(bar - choices) : strlen(choices);
        if (one == length && exi_arg_named(text, choices, one)) return index;
        choices = bar != NULL ? bar + 1 : NULL;
    }
    return -1;
}

/* The index-th of "a|b|c". */
EX_API void exi_arg_choice_name(const char *choices, int32_t index, char *out, size_t size)
{
    size_t length;
    while (index-- > 0 && strchr(choices, '|') != NULL) choices = strchr(choices, '|') + 1;
    length = strcspn(choices, "|");
    snprintf(out, size, "%.*s", (int)length, choices);
}

EX_API bool exi_arg_store_number(const ex_arg *row, const char *text, ex_error *error)
{
    int64_t whole = 0;
    double real = 0;
    const bool is_whole = row->kind == EXI_ARG_INT;
    const bool fine = is_whole ? exi_arg_whole(text, &whole) : exi_arg_real(text, &real);
    if (is_whole) real = (double)whole;
    if (!fine || real < row->least || real > row->most) {
        return ex_fail(error, "--%s: expected a %s from %.15g to %.15g, found \"%s\"", row->name,
                       is_whole ? "whole number" : "number", row->least, row->most, text);
    }
    if (is_whole) *row->to.whole = whole;
    else *row->to.real = real;
    return true;
}

EX_API bool exi_arg_store(const ex_arg *row, const char *text, ex_error *error)
{
    int32_t choice;
    if (row->kind == EXI_ARG_INT || row->kind == EXI_ARG_REAL) return exi_arg_store_number(row, text, error);
    if (row->kind == EXI_ARG_TEXT) {
        *row->to.text = text;
        return true;
    }
    if (row->kind == EXI_ARG_FLAG) {
        choice = exi_arg_choice("false|true|no|yes|off|on|0|1", text);
        if (choice < 0) return ex_fail(error, "--%s: expected true or false, found \"%s\"", row->name, text);
        *row->to.flag = choice % 2 == 1;
        return true;
    }
    choice = exi_arg_choice(row->value, text);
    if (choice < 0) return ex_fail(error, "--%s: expected one of %s, found \"%s\"", row->name, row->value, text);
    *row->to.choice = choice;
    return true;
}

/* The present value of a row as text. */
EX_API void exi_arg_show(const ex_arg *row, char *out, size_t size)
{
    out[0] = 0;
    if (row->kind == EXI_ARG_TEXT && *row->to.text != NULL) snprintf(out, size, "%s", *row->to.text);
    if (row->kind == EXI_ARG_FLAG) snprintf(out, size, "%s", *row->to.flag ? "on" : "off");
    if (row->kind == EXI_ARG_INT) snprintf(out, size, "%lld", (long long)*row->to.whole);
    if (row->kind == EXI_ARG_REAL) snprintf(out, size, "%.6g", *row->to.real);
    if (row->kind == EXI_ARG_CHOICE) exi_arg_choice_name(row->value, *row->to.choice, out, size);
}

/* ------------------------------------------------------------------------------------------------ misspelt options */

/* Edits (insert, delete, change, swap neighbours) between a[0 .. n) and b; names longer than 63 bytes are cut. */
EX_API int exi_arg_distance(const char *a, size_t n, const char *b)
{
    int rows[3][65];
    size_t m = strlen(b);
    n = n > 63 ? 63 : n;
    m = m > 63 ? 63 : m;
    for (size_t j = 0; j <= m; j++) rows[0][j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int *now = rows[i % 3], *last = rows[(i + 2) % 3], *before = rows[(i + 1) % 3];
        now[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = last[j - 1] + (a[i - 1] != b[j - 1]);
            if (last[j] + 1 < best) best = last[j] + 1;
            if (now[j - 1] + 1 < best) best = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            now[j] = best;
        }
    }
    return rows[n % 3][m];
}

EX_API bool exi_arg_unknown(const ex_arg *table, const char *text, size_t length, ex_error *error)
{
    const ex_arg *nearest = NULL;
    int least = length < 5 ? 2 : (int)(length < 30 ? length : 30) / 3 + 1;      /* one less than that counts as misspelt */
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        int distance;
        if (!exi_arg_option(row)) continue;
        distance = exi_arg_distance(text, length, row->name);
        if (length >= 3 && strncmp(row->name, text, length) == 0 && distance > 1) distance = 1;     /* a beginning */
        if (distance >= least) continue;
        least = distance;
        nearest = row;
    }
    if (nearest == NULL) return ex_fail(error, "--%.*s: there is no such option", length < 60 ? (int)length : 60, text);
    return ex_fail(error, "--%.*s: there is no such option; did you mean --%s?", length < 60 ? (int)length : 60, text,
                   nearest->name);
}

/* ------------------------------------------------------------------------------------------------ help */

/* Prints words from column `column` on, wrapped at `width` and indented by `indent`. */
EX_API void exi_arg_wrap(FILE *out, const char *text, int column, int indent, int width)
{
    bool first = true;
    while (*text != 0) {
        const int length = (int)strcspn(text, " ");
        if (!first && column + 1 + length > width) {
            fprintf(out, "\n%*s", indent, "");
            column = indent;
            first = true;
        }
        fprintf(out, "%s%.*s", first ? "" : " ", length, text);
        column += length + !first;
        first = false;
        text += length;
        while (*text == ' ') text++;
    }
    fputc('\n', out);
}

EX_API void exi_arg_help(FILE *out, const ex_arg *table, const ex_arg *row, int indent, int width)
{
    const bool on = row->kind == EXI_ARG_FLAG && *row->to.flag;
    char shown[256];
    char *left = ex_format("  --%s%s%s%s", on ? "[no-]" : "", row->name, row->value != NULL ? " " : "",
                           row->value != NULL ? row->value : "");
    char *help;
    exi_arg_show(row, shown, sizeof(shown));
    if (exi_arg_required(table, row)) help = ex_format("%s (required)", row->help);
    else if (shown[0] == 0 || (row->kind == EXI_ARG_FLAG && !on)) help = ex_format("%s", row->help);
    else help = ex_format("%s [%s]", row->help, shown);
    if ((int)strlen(left) + 2 > indent) fprintf(out, "%s\n%*s", left, indent, "");
    else fprintf(out, "%-*s", indent, left);
    exi_arg_wrap(out, help, indent, indent, width);
    free(left);
    free(help);
}

EX_API void ex_args_help(const ex_arg *table, const ex_args_about *about, FILE *out)
{
    int width = ex_terminal_width(fileno(out)), indent = 0;
    width = width == 0 ? 100 : width < 50 ? 50 : width > 110 ? 110 : width;
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        const int left = exi_arg_option(row) ? 6 + (int)strlen(row->name) + (row->value != NULL ? 1 + (int)strlen(row->value) : 0)
                                             : 0;
        if (left > indent && left <= 30) indent = left;
    }
    fprintf(out, "%s - ", about->program);
    exi_arg_wrap(out, about->summary, (int)strlen(about->program) + 3, 0, width);
    fprintf(out, "\nUsage: %s %s\n", about->program, about->usage);
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        if (row->kind == EXI_ARG_GROUP) fprintf(out, "\n%s\n", row->name);
        if (exi_arg_option(row)) exi_arg_help(out, table, row, indent + 1, width);
    }
    fprintf(out, "\n%-*s", indent + 1, "  --help");
    exi_arg_wrap(out, "this text; values in brackets are the defaults", indent + 1, indent + 1, width);
    if (about->examples != NULL) fprintf(out, "\nExamples\n%s\n", about->examples);
}

/* ------------------------------------------------------------------------------------------------ parse */

/* One option at argv[*at]; *at moves on when its value is an argument of its own. */
EX_API bool exi_args_one(const ex_arg *table, int argc, char **argv, int *at, ex_error *error)
{
    const char *text = argv[*at] + 2;
    const size_t length = strcspn(text, "=");
    const char *value = text[length] == '=' ? text + length + 1 : NULL;
    const ex_arg *row = exi_arg_find(table, text, length);
    bool negated = false;
    if (row == NULL && length > 3 && strncmp(text, "no-", 3) == 0) {
        row = exi_arg_find(table, text + 3, length - 3);
        negated = row != NULL && row->kind == EXI_ARG_FLAG && value == NULL;
        if (!negated) row = NULL;
    }
    if (row == NULL) return exi_arg_unknown(table, text, length, error);
    if (exi_args_seen_count < EXI_ARGS_MOST && !exi_arg_seen(row)) exi_args_seen[exi_args_seen_count++] = row;
    if (row->kind == EXI_ARG_FLAG && value == NULL) {
        *row->to.flag = !negated;
        return true;
    }
    if (value == NULL) {
        value = *at + 1 < argc ? argv[*at + 1] : NULL;
        if (value == NULL) return ex_fail(error, "--%s: expected a value (%s), found the end", row->name, row->value);
        if (strncmp(value, "--", 2) == 0)
            return ex_fail(error, "--%s: expected a value (%s), found the option %s", row->name, row->value, value);
        ++*at;
    }
    return exi_arg_store(row, value, error);
}

EX_API ex_args_result ex_args_parse(const ex_arg *table, const ex_args_about *about, int argc, char **argv, ex_error *error)
{
    exi_args_seen_count = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") != 0 && strcmp(argv[i], "-h") != 0) continue;
        ex_args_help(table, about, stdout);
        return EX_ARGS_HELP;
    }
    for (int i = 1; i < argc; i++) {
        const bool option = strncmp(argv[i], "--", 2) == 0;
        if (option && argv[i][2] == 0 && i + 1 == argc) break;
        if (!option || argv[i][2] == 0) {
            ex_fail(error, "\"%s\": expected an option that begins with --", option ? argv[i + 1] : argv[i]);
            return EX_ARGS_ERROR;
        }
        if (!exi_args_one(table, argc, argv, &i, error)) return EX_ARGS_ERROR;
    }
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        if (!exi_arg_option(row) || !exi_arg_required(table, row) || exi_arg_seen(row)) continue;
        ex_fail(error, "--%s %s is required: %s", row->name, row->value != NULL ? row->value : "", row->help);
        return EX_ARGS_ERROR;
    }
    return EX_ARGS_OK;
}

/* Every option and its value, between ex_log_begin(log, "settings") and ex_log_end. */
EX_API void ex_args_log(const ex_arg *table, ex_log *log)
{
    for (const ex_arg *row = table; row->kind != EXI_ARG_END; row++) {
        char shown[256];
        if (!exi_arg_option(row)) continue;
        exi_arg_show(row, shown, sizeof(shown));
        if (row->kind == EXI_ARG_TEXT) ex_log_text(log, row->name, *row->to.text);
        else if (row->kind == EXI_ARG_FLAG) ex_log_bool(log, row->name, *row->to.flag);
        else if (row->kind == EXI_ARG_INT) ex_log_int(log, row->name, *row->to.whole);
        else if (row->kind == EXI_ARG_REAL) ex_log_real(log, row->name, *row->to.real);
        else ex_log_text(log, row->name, shown);
    }
}

#endif /* EX_ARGS_H */
