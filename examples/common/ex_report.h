/* ex_report.h - an HTML report of one or more training runs: curves, heat maps per layer, tables of results and settings.

       ex_report *report = ex_report_create("RoBERTa on SST-2");
       ex_report_add_metrics(report, "apt", "out/metrics.jsonl", &error);        what ex_log.h wrote
       ex_report_result(report, "apt", "accuracy", "93.1 %");
       ex_report_write(report, "out/report.html", &error);
       ex_report_free(report);

   One file: inline SVG and CSS, no script, nothing loaded from elsewhere, light and dark. Several runs are drawn into the
   same charts. Every chart has a title per point for the mouse. Runs and series appear in the order in which they come in. */
#ifndef EX_REPORT_H
#define EX_REPORT_H

#include <math.h>

#include "ex_base.h"
#include "ex_json.h"

#define EX_REPORT_COLORS 6

typedef struct exi_rep_series { char *name; double *step, *value; } exi_rep_series;
/* values[i * layers + k]: of layer k from step[i] on */
typedef struct exi_rep_layers { char *name; double *step; int32_t *values; int32_t layers; } exi_rep_layers;
typedef struct exi_rep_pair { char *name, *value; } exi_rep_pair;

typedef struct exi_rep_run {
    char *name;
    exi_rep_series *series;           /* stb_ds arrays */
    exi_rep_layers *layers;
    exi_rep_pair *results, *settings;
    double *compactions;              /* steps at which the model became physically smaller */
} exi_rep_run;

typedef struct ex_report { char *title; exi_rep_run *runs; } ex_report;

/* ------------------------------------------------------------------------------------------------ collect */

EX_API ex_report *ex_report_create(const char *title)
{
    ex_report *report = (ex_report *)ex_alloc(1, sizeof(ex_report));
    report->title = ex_format("%s", title);
    return report;
}

EX_API void exi_rep_free_pairs(exi_rep_pair *pairs)
{
    for (size_t i = 0; i < stbds_arrlenu(pairs); i++) {
        free(pairs[i].name);
        free(pairs[i].value);
    }
    stbds_arrfree(pairs);
}

EX_API void ex_report_free(ex_report *report)
{
    if (report == NULL) return;
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        exi_rep_run *run = &report->runs[r];
        for (size_t i = 0; i < stbds_arrlenu(run->series); i++) {
            free(run->series[i].name);
            stbds_arrfree(run->series[i].step);
            stbds_arrfree(run->series[i].value);
        }
        for (size_t i = 0; i < stbds_arrlenu(run->layers); i++) {
            free(run->layers[i].name);
            stbds_arrfree(run->layers[i].step);
            stbds_arrfree(run->layers[i].values);
        }
        stbds_arrfree(run->series);
        stbds_arrfree(run->layers);
        stbds_arrfree(run->compactions);
        exi_rep_free_pairs(run->results);
        exi_rep_free_pairs(run->settings);
        free(run->name);
    }
    stbds_arrfree(report->runs);
    free(report->title);
    free(report);
}

/* The run of that name, which is added when it is new. */
EX_API exi_rep_run *exi_rep_run_of(ex_report *report, const char *name)
{
    exi_rep_run run;
    for (size_t i = 0; i < stbds_arrlenu(report->runs); i++) {
        if (strcmp(report->runs[i].name, name) == 0) return &report->runs[i];
    }
    memset(&run, 0, sizeof(run));
    run.name = ex_format("%s", name);
    stbds_arrput(report->runs, run);
    return &stbds_arrlast(report->runs);
}

EX_API exi_rep_series *exi_rep_find(const exi_rep_run *run, const char *name)
{
    for (size_t i = 0; i < stbds_arrlenu(run->series); i++) {
        if (strcmp(run->series[i].name, name) == 0) return &run->series[i];
    }
    return NULL;
}

/* A point of a curve; names as in ex_log.h, any other name is drawn as a chart of its own. Not finite: left out. */
EX_API void ex_report_point(ex_report *report, const char *run, const char *series, double step, double value)
{
    exi_rep_run *of = exi_rep_run_of(report, run);
    exi_rep_series *found = exi_rep_find(of, series), fresh;
    if (!ex_finite(step) || !ex_finite(value)) return;
    if (found == NULL) {
        memset(&fresh, 0, sizeof(fresh));
        fresh.name = ex_format("%s", series);
        stbds_arrput(of->series, fresh);
        found = &stbds_arrlast(of->series);
    }
    stbds_arrput(found->step, step);
    stbds_arrput(found->value, value);
}

/* One number per layer ("ranks", "heads", "neurons"), valid from this step on. A record of another length is left out. */
EX_API void ex_report_layers(ex_report *report, const char *run, const char *series, double step, const int32_t *values,
                             int32_t layers)
{
    exi_rep_run *of = exi_rep_run_of(report, run);
    exi_rep_layers *found = NULL, fresh;
    for (size_t i = 0; i < stbds_arrlenu(of->layers) && found == NULL; i++) {
        if (strcmp(of->layers[i].name, series) == 0) found = &of->layers[i];
    }
    if (layers <= 0 || !ex_finite(step)) return;
    if (found == NULL) {
        memset(&fresh, 0, sizeof(fresh));
        fresh.name = ex_format("%s", series);
        fresh.layers = layers;
        stbds_arrput(of->layers, fresh);
        found = &stbds_arrlast(of->layers);
    }
    if (found->layers != layers) return;
    stbds_arrput(found->step, step);
    for (int32_t i = 0; i < layers; i++) stbds_arrput(found->values, values[i]);
}

EX_API void exi_rep_set(exi_rep_pair **pairs, const char *name, const char *value)
{
    exi_rep_pair pair;
    for (size_t i = 0; i < stbds_arrlenu(*pairs); i++) {
        if (strcmp((*pairs)[i].name, name) != 0) continue;
        free((*pairs)[i].value);
        (*pairs)[i].value = ex_format("%s", value);
        return;
    }
    pair.name = ex_format("%s", name);
    pair.value = ex_format("%s", value);
    stbds_arrput(*pairs, pair);
}

/* A cell of the table of results. */
EX_API void ex_report_result(ex_report *report, const char *run, const char *name, const char *value)
{
    exi_rep_set(&exi_rep_run_of(report, run)->results, name, value);
}

EX_API void ex_report_setting(ex_report *report, const char *run, const char *name, const char *value)
{
    exi_rep_set(&exi_rep_run_of(report, run)->settings, name, value);
}

/* ------------------------------------------------------------------------------------------------ metrics.jsonl */

/* A value as text; arrays and objects have none. */
EX_API char *exi_rep_value_text(const ex_json_node *node)
{
    if (node->type == EX_JSON_STRING) return ex_format("%s", node->as.text);
    if (node->type == EX_JSON_NUMBER) return ex_format("%.6g", node->as.number);
    if (node->type == EX_JSON_NULL) return ex_format("-");
    return node->type == EX_JSON_TRUE || node->type == EX_JSON_FALSE ? ex_format("%s", node->type == EX_JSON_TRUE ? "yes" : "no")
                                                                     : NULL;
}

EX_API void exi_rep_take_layers(ex_report *report, const char *run, const char *name, double step, const ex_json_node *array)
{
    const ex_json_node *node = ex_json_first(array);
    int32_t *values = NULL;
    for (uint32_t i = 0; i < array->count; i++, node = ex_json_next(node)) {
        int64_t value;
        if (!ex_json_int(node, INT32_MIN, INT32_MAX, &value)) break;
        stbds_arrput(values, (int32_t)value);
    }
    if (stbds_arrlenu(values) == array->count) ex_report_layers(report, run, name, step, values, (int32_t)array->count);
    stbds_arrfree(values);
}

/* One member of a line: a point, a row of layers, a result or a setting. */
EX_API void exi_rep_take_member(ex_report *report, const char *run, const char *event, double step, const ex_json_node *name)
{
    const ex_json_node *value = name + 1;
    const bool result = strcmp(event, "result") == 0, setting = strcmp(event, "settings") == 0;
    if (strcmp(name->as.text, "event") == 0 || strcmp(name->as.text, "step") == 0) return;
    if (result || setting) {
        char *text = exi_rep_value_text(value);
        if (text != NULL && result) ex_report_result(report, run, name->as.text, text);
        if (text != NULL && setting) ex_report_setting(report, run, name->as.text, text);
        free(text);
    } else if (strcmp(event, "step") == 0 || strcmp(event, "evaluate") == 0 || strcmp(event, "layers") == 0) {
        const bool loss = strcmp(event, "evaluate") == 0 && strcmp(name->as.text, "loss") == 0;
        if (value->type == EX_JSON_NUMBER)
            ex_report_point(report, run, loss ? "dev_loss" : name->as.text, step, value->as.number);
        if (value->type == EX_JSON_ARRAY) exi_rep_take_layers(report, run, name->as.text, step, value);
    }
}

EX_API void exi_rep_take_line(ex_report *report, const char *run, const ex_json_node *root)
{
    const char *event = ex_json_text(root, "event", "");
    const ex_json_node *step = ex_json_get(root, "step"), *name;
    const double at = ex_json_is(step, EX_JSON_NUMBER) ? step->as.number : 0;
    if (root->type != EX_JSON_OBJECT) return;
    if (strcmp(event, "compact") == 0) stbds_arrput(exi_rep_run_of(report, run)->compactions, at);
    name = ex_json_first(root);
    for (uint32_t i = 0; i < root->count; i++, name = ex_json_next(name + 1)) exi_rep_take_member(report, run, event, at, name);
}

/* Adds what a run has written. A last line that is not complete (the run goes on, or was killed) is left out. */
EX_API bool ex_report_add_metrics(ex_report *report, const char *run, const char *path, ex_error *error)
{
    size_t bytes;
    int64_t replaced;
    uint32_t line = 1;
    bool fine = true;
    ex_json json;
    char *text = ex_read_file(path, &bytes, error);
    if (text == NULL) return false;
    memset(&json, 0, sizeof(json));
    text = ex_utf8_repair(text, &bytes, &replaced);
    exi_rep_run_of(report, run);
    for (size_t at = 0; fine && at < bytes; line++) {
        char *end = (char *)memchr(text + at, '\n', bytes - at);
        const size_t length = end != NULL ? (size_t)(end - (text + at)) : 0;
        if (end == NULL) break;
        *end = 0;
        if (length > 0) fine = ex_json_parse(&json, path, line, text + at, length, error);
        if (fine && length > 0) exi_rep_take_line(report, run, ex_json_root(&json));
        at += length + 1;
    }
    ex_json_free(&json);
    free(text);
    return fine;
}

/* ------------------------------------------------------------------------------------------------ numbers and text */

/* Text for HTML and attributes. */
EX_API void exi_rep_escape(ex_text *out, const char *text)
{
    for (; *text != 0; text++) {
        if (*text == '&') ex_text_put(out, "&amp;");
        else if (*text == '<') ex_text_put(out, "&lt;");
        else if (*text == '>') ex_text_put(out, "&gt;");
        else if (*text == '"') ex_text_put(out, "&quot;");
        else if (*text == '\'') ex_text_put(out, "&#39;");
        else if ((unsigned char)*text >= 32 || *text == '\n' || *text == '\t') ex_text_add(out, text, 1);
    }
}

/* "tokens_per_second" -> "Tokens per second" */
EX_API void exi_rep_pretty(ex_text *out, const char *name)
{
    char *copy = ex_format("%s", name);
    for (char *c = copy; *c != 0; c++) *c = *c == '_' ? ' ' : *c;
    if (copy[0] >= 'a' && copy[0] <= 'z') copy[0] = (char)(copy[0] - 32);
    exi_rep_escape(out, copy);
    free(copy);
}

typedef struct exi_rep_scale { double low, high, step; } exi_rep_scale;

/* A scale whose ticks are 1, 2 or 5 times a power of ten, about `ticks` of them. */
EX_API exi_rep_scale exi_rep_nice(double low, double high, int ticks)
{
    exi_rep_scale scale;
    double raw, power;
    if (!(high > low)) {
        const double around = fabs(low) > 0 ? 0.1 * fabs(low) : 1;
        low -= around;
        high += around;
    }
    raw = (high - low) / ticks;
    power = pow(10, floor(log10(raw)));
    raw = raw / power - 1e-9;                              /* 2.0000000000000004 is 2 */
    scale.step = raw <= 1 ? power : raw <= 2 ? 2 * power : raw <= 5 ? 5 * power : 10 * power;
    scale.low = scale.step * floor(low / scale.step + 1e-9);
    scale.high = scale.step * ceil(high / scale.step - 1e-9);
    return scale;
}

/* 0.00015 -> "1.5e-4" */
EX_API void exi_rep_small(char *out, size_t size, double value)
{
    const int power = (int)floor(log10(fabs(value)) + 1e-9);
    snprintf(out, size, "%.3ge%d", value / pow(10, power), power);
}

/* A tick label; `step` says how many decimals it needs. */
EX_API void exi_rep_tick(char *out, size_t size, double value, double step)
{
    const int decimals = (int)ceil(-log10(step) - 1e-9);
    if (fabs(value) < step * 1e-6) snprintf(out, size, "0");
    else if (fabs(value) >= 1e4) {
        const double unit = fabs(value) >= 1e9 ? 1e9 : fabs(value) >= 1e6 ? 1e6 : 1e3;
        snprintf(out, size, "%.4g%s", value / unit, unit > 1e8 ? "G" : unit > 1e5 ? "M" : "k");
    } else if (decimals > 3) exi_rep_small(out, size, value);
    else snprintf(out, size, "%.*f", decimals > 0 ? decimals : 0, value);
}

/* A value at the end of a line or in a title. */
EX_API void exi_rep_number(char *out, size_t size, double value)
{
    if (fabs(value) >= 1e4) exi_rep_tick(out, size, value, 1);
    else if (!(fabs(value - floor(value)) > 0)) snprintf(out, size, "%.0f", value);
    else if (fabs(value) >= 100) snprintf(out, size, "%.0f", value);
    else if (fabs(value) >= 10) snprintf(out, size, "%.1f", value);
    else if (fabs(value) > 0 && fabs(value) < 1e-3) exi_rep_small(out, size, value);
    else snprintf(out, size, "%#.3g", value);
}

/* ------------------------------------------------------------------------------------------------ line charts */

/* One chart: which series go in, and how. */
typedef struct exi_rep_panel {
    const char *title, *unit;
    const char *series[3], *labels[3];                     /* the second and third only when there is one run ... */
    double scale;                     /* values are multiplied by this */
    int flags;
} exi_rep_panel;

enum {
    EXI_REP_SMOOTH = 1,               /* a mean over neighbours in front of the raw values */
    EXI_REP_TARGET = 2,               /* ... except that here the second one always goes in, dashed */
    EXI_REP_ZERO = 4,                 /* the axis starts at 0 */
    EXI_REP_MARKS = 8,                /* few points: draw each */
    EXI_REP_HOLDS = 16                /* a value holds until the next one */
};

EX_API bool exi_rep_has(const exi_rep_panel *panel, int flag)
{
    return (panel->flags & flag) != 0;
}

typedef struct exi_rep_line {
    const exi_rep_series *series;
    const char *run, *label;
    int color;
    bool dashed;
    double *smooth;                   /* scaled values that are drawn */
    double end;                       /* where the line ends: its last step, or the run's for values that hold */
} exi_rep_line;

enum { EXI_REP_W = 480, EXI_REP_H = 276, EXI_REP_LEFT = 52, EXI_REP_RIGHT = 58, EXI_REP_TOP = 40, EXI_REP_BOTTOM = 38 };

typedef struct exi_rep_chart {
    const exi_rep_panel *panel;
    exi_rep_line *lines;
    exi_rep_scale x, y;
    double last;                      /* the greatest step: where x ends */
    int number;                       /* of the chart, for ids */
    int legend_rows;
} exi_rep_chart;

EX_API double exi_rep_x(const exi_rep_chart *chart, double step)
{
    const double part = (step - chart->x.low) / (chart->last - chart->x.low);
    return EXI_REP_LEFT + part * (EXI_REP_W - EXI_REP_LEFT - EXI_REP_RIGHT);
}

EX_API double exi_rep_y(const exi_rep_chart *chart, double value)
{
    const double part = (value - chart->y.low) / (chart->y.high - chart->y.low);
    const double top = EXI_REP_TOP + 15 * (chart->legend_rows - 1);
    return EXI_REP_H - EXI_REP_BOTTOM - part * (EXI_REP_H - EXI_REP_BOTTOM - top);
}

EX_API int exi_rep_compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Mean over about n / 25 neighbours, by running sums; a copy when nothing is to be smoothed. */
EX_API double *exi_rep_smooth(const exi_rep_series *series, double scale, bool smooth)
{
    const int64_t n = (int64_t)stbds_arrlenu(series->value), half = smooth ? n / 50 : 0;
    double *sums = (double *)ex_alloc((size_t)n + 1, sizeof(double)), *out = (double *)ex_alloc((size_t)n, sizeof(double));
    for (int64_t i = 0; i < n; i++) sums[i + 1] = sums[i] + scale * series->value[i];
    for (int64_t i = 0; i < n; i++) {
        const int64_t from = i < half ? 0 : i - half, to = n - i <= half ? n : i + half + 1;
        out[i] = half == 0 ? scale * series->value[i] : (sums[to] - sums[from]) / (double)(to - from);
    }
    free(sums);
    return out;
}

/* Widens [low, high] by what is drawn; of raw values behind a smooth line the outermost 2 % may be cut off. */
EX_API void exi_rep_range(const exi_rep_panel *panel, const exi_rep_line *line, double *low, double *high, bool *any)
{
    const size_t n = stbds_arrlenu(line->series->value), skip = n / 50;
    double *sorted = (double *)ex_alloc(n, sizeof(double)), from, to;
    for (size_t i = 0; i < n; i++) sorted[i] = panel->scale * line->series->value[i];
    qsort(sorted, n, sizeof(double), exi_rep_compare);
    from = sorted[exi_rep_has(panel, EXI_REP_SMOOTH) ? skip : 0];
    to = sorted[n - 1 - (exi_rep_has(panel, EXI_REP_SMOOTH) ? skip : 0)];
    if (exi_rep_has(panel, EXI_REP_SMOOTH) && n <= 50 && n > 4) to = sorted[n - 2];       /* a slow first step */
    *low = *any && *low < from ? *low : from;
    *high = *any && *high > to ? *high : to;
    *any = true;
    free(sorted);
}

EX_API void exi_rep_axes(exi_rep_chart *chart)
{
    double low = 0, high = 0, first = 0;
    bool any = false;
    chart->last = 0;
    for (size_t i = 0; i < stbds_arrlenu(chart->lines); i++) {
        const exi_rep_line *line = &chart->lines[i];
        exi_rep_range(chart->panel, line, &low, &high, &any);
        chart->last = i == 0 || line->end > chart->last ? line->end : chart->last;
        first = i == 0 || line->series->step[0] < first ? line->series->step[0] : first;
    }
    if (exi_rep_has(chart->panel, EXI_REP_ZERO) || (low >= 0 && low < 0.3 * high)) low = 0;
    if (first < 0.5 * chart->last) first = 0;              /* so that most charts of a report have the same axis */
    if (!(chart->last > first)) chart->last = first + 1;
    chart->y = exi_rep_nice(low, high, 5);
    chart->x = exi_rep_nice(first, chart->last, 6);
    chart->x.low = first;
}

/* Small text; anchor: start, middle or end. */
EX_API void exi_rep_label(ex_text *out, double x, double y, const char *anchor, const char *text)
{
    ex_text_format(out, "<text class=\"t\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x, y, anchor);
    exi_rep_escape(out, text);
    ex_text_put(out, "</text>\n");
}

/* Ticks and numbers of the steps below y. */
EX_API void exi_rep_x_axis(const exi_rep_chart *chart, double y, ex_text *out)
{
    const double begin = chart->x.step * ceil(chart->x.low / chart->x.step - 1e-9);
    const int count = (int)((chart->last - begin) / chart->x.step + 1e-6);
    for (int i = 0; i <= count; i++) {
        const double step = begin + i * chart->x.step, x = exi_rep_x(chart, step);
        char label[32];
        exi_rep_tick(label, sizeof(label), step, chart->x.step);
        ex_text_format(out, "<path class=\"axis\" d=\"M%.1f %.1fv4\"/>", x, y);
        exi_rep_label(out, x, y + 15, "middle", label);
    }
    exi_rep_label(out, (EXI_REP_LEFT + EXI_REP_W - EXI_REP_RIGHT) / 2.0, y + 30, "middle", "step");
}

EX_API void exi_rep_grid(const exi_rep_chart *chart, ex_text *out)
{
    const int rows = (int)((chart->y.high - chart->y.low) / chart->y.step + 0.5);
    for (int i = 0; i <= rows; i++) {
        const double value = chart->y.low + i * chart->y.step, y = exi_rep_y(chart, value);
        char label[32];
        exi_rep_tick(label, sizeof(label), value, chart->y.step);
        ex_text_format(out, "<path class=\"%s\" d=\"M%d %.1fH%d\"/>", i == 0 ? "axis" : "grid", EXI_REP_LEFT, y,
                       EXI_REP_W - EXI_REP_RIGHT);
        exi_rep_label(out, EXI_REP_LEFT - 6, y + 3.5, "end", label);
    }
    exi_rep_x_axis(chart, EXI_REP_H - EXI_REP_BOTTOM, out);
}

/* Points i of a line as a path: at most `most` of them, the last always. */
EX_API void exi_rep_path(const exi_rep_chart *chart, const exi_rep_line *line, size_t most, ex_text *out)
{
    const size_t n = stbds_arrlenu(line->series->step), stride = n / most + 1;
    double y = 0;
    for (size_t i = 0; i < n; i = i + stride < n || i == n - 1 ? i + stride : n - 1) {
        const double x = exi_rep_x(chart, line->series->step[i]), last = y;
        y = exi_rep_y(chart, line->smooth[i]);
        if (i > 0 && exi_rep_has(chart->panel, EXI_REP_HOLDS)) ex_text_format(out, "L%.1f %.1f", x, last);
        ex_text_format(out, "%s%.1f %.1f", i == 0 ? "M" : "L", x, y);
    }
    ex_text_format(out, "H%.1f", exi_rep_x(chart, line->end));
}

/* The raw values behind a smoothed line: per place the least and the greatest, so that no spike is lost. */
EX_API void exi_rep_raw(const exi_rep_chart *chart, const exi_rep_line *line, ex_text *out)
{
    const size_t n = stbds_arrlenu(line->series->step), places = n < 200 ? n : 200;
    ex_text_format(out, "<path class=\"raw s%d\" d=\"", line->color);
    for (size_t p = 0; p < places; p++) {
        const size_t from = p * n / places, to = (p + 1) * n / places;
        double low = line->series->value[from], high = low;
        for (size_t i = from; i < to; i++) {
            low = line->series->value[i] < low ? line->series->value[i] : low;
            high = line->series->value[i] > high ? line->series->value[i] : high;
        }
        ex_text_format(out, "%s%.1f %.1f", p == 0 ? "M" : "L", exi_rep_x(chart, line->series->step[from]),
                       exi_rep_y(chart, low * chart->panel->scale));
        if (high > low) ex_text_format(out, "V%.1f", exi_rep_y(chart, high * chart->panel->scale));
    }
    ex_text_put(out, "\"/>\n");
}

/* Dots that carry a title; where there are many they are invisible and only serve the mouse. */
EX_API void exi_rep_dots(const exi_rep_chart *chart, const exi_rep_line *line, ex_text *out)
{
    const size_t n = stbds_arrlenu(line->series->step), stride = n / 60 + 1;
    const bool shown = exi_rep_has(chart->panel, EXI_REP_MARKS) && n <= 40 && !line->dashed;
    for (size_t i = 0; i < n; i = i + stride < n || i == n - 1 ? i + stride : n - 1) {
        char value[32];
        exi_rep_number(value, sizeof(value), line->smooth[i]);
        ex_text_format(out, "<circle class=\"%s%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"%s\"><title>", shown ? "dot f" : "hot f",
                       line->color, exi_rep_x(chart, line->series->step[i]), exi_rep_y(chart, line->smooth[i]),
                       shown ? "2.6" : "6");
        exi_rep_escape(out, line->run);
        ex_text_put(out, ", ");
        exi_rep_escape(out, line->label);
        ex_text_format(out, "\nstep %.15g: %s%s</title></circle>\n", line->series->step[i], value, chart->panel->unit);
    }
}

typedef struct exi_rep_end { double y; size_t line; } exi_rep_end;

EX_API int exi_rep_compare_ends(const void *a, const void *b)
{
    const exi_rep_end *x = (const exi_rep_end *)a, *y = (const exi_rep_end *)b;
    return x->y < y->y ? -1 : x->y > y->y ? 1 : x->line < y->line ? -1 : x->line > y->line;
}

/* The last value of each line beside its end; labels that would touch are pushed apart. */
EX_API void exi_rep_end_labels(const exi_rep_chart *chart, ex_text *out)
{
    const size_t count = stbds_arrlenu(chart->lines);
    const double apart = 12, bottom = EXI_REP_H - EXI_REP_BOTTOM - 2, top = EXI_REP_TOP;
    exi_rep_end *ends = (exi_rep_end *)ex_alloc(count, sizeof(exi_rep_end));
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        const exi_rep_line *line = &chart->lines[i];
        double y = exi_rep_y(chart, line->smooth[stbds_arrlenu(line->series->step) - 1]);
        if (line->dashed) continue;                        /* a target ends where its curve does */
        y = y < top ? top : y > bottom ? bottom : y;
        ends[used].y = y;
        ends[used++].line = i;
    }
    qsort(ends, used, sizeof(exi_rep_end), exi_rep_compare_ends);
    for (size_t i = 1; i < used; i++) ends[i].y = ends[i].y < ends[i - 1].y + apart ? ends[i - 1].y + apart : ends[i].y;
    for (size_t i = used; i-- > 0;) {
        const double most = i + 1 < used ? ends[i + 1].y - apart : bottom;
        ends[i].y = ends[i].y > most ? most : ends[i].y;
    }
    for (size_t i = 0; i < used; i++) {
        const exi_rep_line *line = &chart->lines[ends[i].line];
        char value[32];
        exi_rep_number(value, sizeof(value), line->smooth[stbds_arrlenu(line->series->step) - 1]);
        ex_text_format(out, "<text class=\"end f%d\" x=\"%d\" y=\"%.1f\">%s</text>\n", line->color, EXI_REP_W - EXI_REP_RIGHT + 6,
                       ends[i].y + 3.5, value);
    }
    free(ends);
}

EX_API bool exi_rep_one_run(const exi_rep_chart *chart)
{
    for (size_t i = 1; i < stbds_arrlenu(chart->lines); i++) {
        if (strcmp(chart->lines[i].run, chart->lines[0].run) != 0) return false;
    }
    return true;
}

/* What a line is called in the legend: its run, or its series when there is one run only. */
EX_API const char *exi_rep_legend_name(const exi_rep_chart *chart, const exi_rep_line *line)
{
    return exi_rep_one_run(chart) ? line->label : line->run;
}

EX_API double exi_rep_legend_width(const char *name)
{
    double width = 34;
    for (; *name != 0; name++) width += ((unsigned char)*name & 0xc0) != 0x80 ? 6.3 : 0;
    return width;
}

/* Lays the legend out; with out NULL only counts its rows. */
EX_API int exi_rep_legend(const exi_rep_chart *chart, ex_text *out)
{
    const bool one = exi_rep_one_run(chart);
    double x = EXI_REP_LEFT;
    int rows = 1;
    for (size_t i = 0; i < stbds_arrlenu(chart->lines); i++) {
        const exi_rep_line *line = &chart->lines[i];
        const char *name = exi_rep_legend_name(chart, line);
        const double width = exi_rep_legend_width(name);
        if (stbds_arrlenu(chart->lines) == 1 || (line->dashed && !one)) continue;
        if (x + width > EXI_REP_W - 4 && x > EXI_REP_LEFT) {
            x = EXI_REP_LEFT;
            rows++;
        }
        if (out != NULL) {
            const double y = 34 - 10 + 15 * (rows - 1);
            ex_text_format(out, "<path class=\"line s%d%s\" d=\"M%.1f %.1fh16\"/><text class=\"t\" x=\"%.1f\" y=\"%.1f\">",
                           line->color, line->dashed ? " dash" : "", x, y - 3.5, x + 21, y);
            exi_rep_escape(out, name);
            ex_text_put(out, "</text>\n");
        }
        x += width;
    }
    return rows;
}

/* Small triangles on the axis where the model became smaller. */
EX_API void exi_rep_compactions(const ex_report *report, const exi_rep_chart *chart, ex_text *out)
{
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        const exi_rep_run *run = &report->runs[r];
        for (size_t i = 0; i < stbds_arrlenu(run->compactions); i++) {
            const double step = run->compactions[i];
            if (step < chart->x.low || step > chart->last) continue;
            ex_text_format(out, "<path class=\"f%d\" fill-opacity=\"0.75\" d=\"M%.1f %dl-3.5 -6h7z\"><title>",
                           (int)(r % EX_REPORT_COLORS), exi_rep_x(chart, step), EXI_REP_H - EXI_REP_BOTTOM);
            exi_rep_escape(out, run->name);
            ex_text_format(out, "\nstep %.15g: compacted</title></path>\n", step);
        }
    }
}

/* The last step of any of its curves. */
EX_API double exi_rep_run_end(const exi_rep_run *run)
{
    double last = 0;
    for (size_t i = 0; i < stbds_arrlenu(run->series); i++) {
        const double end = run->series[i].step[stbds_arrlenu(run->series[i].step) - 1];
        last = i == 0 || end > last ? end : last;
    }
    return last;
}

EX_API void exi_rep_add_line(exi_rep_chart *chart, const exi_rep_run *run, int color, int which)
{
    const exi_rep_panel *panel = chart->panel;
    exi_rep_line line;
    bool some = false;
    memset(&line, 0, sizeof(line));
    line.series = panel->series[which] != NULL ? exi_rep_find(run, panel->series[which]) : NULL;
    for (size_t i = 0; line.series != NULL && i < stbds_arrlenu(line.series->value); i++)
        some = some || fabs(line.series->value[i]) > 0;
    if (line.series == NULL || (which > 0 && !some)) return;           /* such as the distillation loss of a run without one */
    line.run = run->name;
    line.label = panel->labels[which];
    line.color = color % EX_REPORT_COLORS;
    line.dashed = exi_rep_has(panel, EXI_REP_TARGET) && which == 1;
    line.end = exi_rep_has(panel, EXI_REP_HOLDS) ? exi_rep_run_end(run) : line.series->step[stbds_arrlenu(line.series->step) - 1];
    line.smooth = exi_rep_smooth(line.series, panel->scale, exi_rep_has(panel, EXI_REP_SMOOTH));
    stbds_arrput(chart->lines, line);
}

EX_API void exi_rep_collect(const ex_report *report, exi_rep_chart *chart)
{
    const size_t runs = stbds_arrlenu(report->runs);
    size_t with = 0;
    for (size_t r = 0; r < runs; r++) with += exi_rep_find(&report->runs[r], chart->panel->series[0]) != NULL;
    for (size_t r = 0; r < runs; r++) {
        exi_rep_add_line(chart, &report->runs[r], (int)r, 0);
        for (int which = 1; which < 3; which++) {
            if (which == 1 && exi_rep_has(chart->panel, EXI_REP_TARGET)) exi_rep_add_line(chart, &report->runs[r], (int)r, which);
            else if (with == 1 && runs == 1) exi_rep_add_line(chart, &report->runs[r], which, which);
        }
    }
}

EX_API void exi_rep_card_begin(ex_text *out, const char *title, const char *unit, const char *note, int height, const char *label)
{
    ex_text_put(out, "<figure class=\"card\"><figcaption>");
    exi_rep_pretty(out, title);
    if (unit[0] != 0) ex_text_format(out, " <small>in%s%s</small>", unit, note);
    ex_text_format(out, "</figcaption>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"", EXI_REP_W, height);
    exi_rep_pretty(out, label);
    ex_text_put(out, "\">\n");
}

EX_API void exi_rep_chart_body(const ex_report *report, exi_rep_chart *chart, ex_text *out)
{
    int top;
    chart->legend_rows = exi_rep_legend(chart, NULL);
    top = EXI_REP_TOP + 15 * (chart->legend_rows - 1);
    exi_rep_axes(chart);
    exi_rep_grid(chart, out);
    ex_text_format(
        out, "<clipPath id=\"c%d\"><rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\"/></clipPath><g clip-path=\"url(#c%d)\">\n",
        chart->number, EXI_REP_LEFT - 4, top - 4, EXI_REP_W - EXI_REP_LEFT - EXI_REP_RIGHT + 8,
        EXI_REP_H - EXI_REP_BOTTOM + 5 - top, chart->number);
    for (size_t i = 0; i < stbds_arrlenu(chart->lines) && exi_rep_has(chart->panel, EXI_REP_SMOOTH); i++) {
        if (stbds_arrlenu(chart->lines[i].series->value) >= 50) exi_rep_raw(chart, &chart->lines[i], out);
    }
    for (size_t i = 0; i < stbds_arrlenu(chart->lines); i++) {
        ex_text_format(out, "<path class=\"line s%d%s\" d=\"", chart->lines[i].color, chart->lines[i].dashed ? " dash" : "");
        exi_rep_path(chart, &chart->lines[i], 300, out);
        ex_text_put(out, "\"/>\n");
    }
    exi_rep_compactions(report, chart, out);
    for (size_t i = 0; i < stbds_arrlenu(chart->lines); i++) exi_rep_dots(chart, &chart->lines[i], out);
    ex_text_put(out, "</g>\n");
    exi_rep_legend(chart, out);
    exi_rep_end_labels(chart, out);
}

/* Draws a panel, or nothing when no run has its first series. */
EX_API void exi_rep_draw_panel(const ex_report *report, const exi_rep_panel *panel, int *number, ex_text *out)
{
    exi_rep_chart chart;
    bool dashed = false;
    memset(&chart, 0, sizeof(chart));
    chart.panel = panel;
    exi_rep_collect(report, &chart);
    for (size_t i = 0; i < stbds_arrlenu(chart.lines); i++) dashed = dashed || chart.lines[i].dashed;
    if (stbds_arrlenu(chart.lines) > 0) {
        chart.number = (*number)++;
        exi_rep_card_begin(out, panel->title, panel->unit, dashed ? ", dashed: target" : "", EXI_REP_H, panel->title);
        exi_rep_chart_body(report, &chart, out);
        ex_text_put(out, "</svg></figure>\n");
    }
    for (size_t i = 0; i < stbds_arrlenu(chart.lines); i++) free(chart.lines[i].smooth);
    stbds_arrfree(chart.lines);
}

/* ------------------------------------------------------------------------------------------------ which charts */

/* Is the name one of `list`, which ends with NULL? */
EX_API bool exi_rep_among(const char *const *list, const char *name)
{
    while (*list != NULL && strcmp(*list, name) != 0) list++;
    return *list != NULL;
}

/* Series that are drawn nowhere: they say little over time or stand in other charts. */
EX_API bool exi_rep_silent(const char *name)
{
    static const char *const silent[] = {"tokens",        "mu",    "skipped", "teacher_milliseconds", "peak_bytes",
                                         "gradient_norm", "epoch", "seconds", "loss_scale", NULL};
    return exi_rep_among(silent, name);
}

/* Metrics that are shares and so read as percentages; correlations are not. */
EX_API bool exi_rep_share(const char *name)
{
    static const char *const shares[] = {"accuracy", "f1", "f1-macro", "exact", NULL};
    return exi_rep_among(shares, name);
}

/* Metrics that are percentages already: those of written texts. */
EX_API bool exi_rep_percent(const char *name)
{
    static const char *const percents[] = {"ROUGE-L", "ROUGE-1", "ROUGE-2", "exact match", NULL};
    return exi_rep_among(percents, name);
}

EX_API double exi_rep_greatest(const ex_report *report, const char *name)
{
    double most = 0;
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        const exi_rep_series *series = exi_rep_find(&report->runs[r], name);
        for (size_t i = 0; series != NULL && i < stbds_arrlenu(series->value); i++)
            most = series->value[i] > most ? series->value[i] : most;
    }
    return most;
}

/* Charts of names that this file does not know: metrics of evaluations. */
EX_API void exi_rep_other_panels(const ex_report *report, const exi_rep_panel *known, size_t count, int *number, ex_text *out)
{
    ex_map seen;
    memset(&seen, 0, sizeof(seen));
    for (size_t i = 0; i < count; i++) {
        for (int k = 0; k < 3 && known[i].series[k] != NULL; k++)
            ex_map_put(&seen, known[i].series[k], strlen(known[i].series[k]), 1);
    }
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        for (size_t i = 0; i < stbds_arrlenu(report->runs[r].series); i++) {
            const char *name = report->runs[r].series[i].name;
            exi_rep_panel panel;
            if (exi_rep_silent(name) || !ex_map_put(&seen, name, strlen(name), 1)) continue;
            memset(&panel, 0, sizeof(panel));
            panel.title = panel.series[0] = panel.labels[0] = name;
            panel.unit = exi_rep_share(name) || exi_rep_percent(name) ? " %" : "";
            panel.scale = exi_rep_share(name) ? 100 : 1;
            panel.flags = EXI_REP_MARKS;
            exi_rep_draw_panel(report, &panel, number, out);
        }
    }
    ex_map_free(&seen);
}

EX_API void exi_rep_curves(const ex_report *report, int *number, ex_text *out)
{
    const bool big = exi_rep_greatest(report, "bytes") >= 2147483648.0;
    const double memory = big ? 1 / 1073741824.0 : 1 / 1048576.0;
    const int noisy = EXI_REP_SMOOTH | EXI_REP_ZERO, holds = EXI_REP_HOLDS | EXI_REP_ZERO, target = EXI_REP_TARGET | EXI_REP_ZERO;
    const exi_rep_panel panels[] = {
        {"Training loss", "", {"loss", "task_loss", "distill_loss"}, {"loss", "task", "distillation"}, 1, EXI_REP_SMOOTH},
        {"Dev loss", "", {"dev_loss", NULL, NULL}, {"dev loss", NULL, NULL}, 1, EXI_REP_MARKS},
        {"Sparsity", " %", {"sparsity", "sparsity_target", NULL}, {"reached", "target", NULL}, 100, target},
        {"Prunable parameters left", " %", {"kept", NULL, NULL}, {"kept", NULL, NULL}, 100, holds},
        {"Step time", " ms", {"milliseconds", NULL, NULL}, {"step time", NULL, NULL}, 1, noisy},
        {"Throughput", " tokens/s", {"tokens_per_second", NULL, NULL}, {"tokens/s", NULL, NULL}, 1, noisy},
        {"Memory", big ? " GiB" : " MiB", {"bytes", NULL, NULL}, {"memory", NULL, NULL}, memory, EXI_REP_ZERO},
        {"Trainable parameters", "", {"trainable", NULL, NULL}, {"trainable", NULL, NULL}, 1, holds},
        {"Learning rate", "", {"learning_rate", NULL, NULL}, {"learning rate", NULL, NULL}, 1, EXI_REP_ZERO},
        {"Hidden size", "", {"hidden", NULL, NULL}, {"hidden size", NULL, NULL}, 1, holds}
    };
    const size_t count = sizeof(panels) / sizeof(panels[0]);
    exi_rep_draw_panel(report, &panels[0], number, out);
    exi_rep_other_panels(report, panels, count, number, out);
    for (size_t i = 1; i < count; i++) exi_rep_draw_panel(report, &panels[i], number, out);
}

/* ------------------------------------------------------------------------------------------------ heat maps */

/* Left out: a quantity that has the same value in every layer at every time. */
EX_API bool exi_rep_varies(const exi_rep_layers *layers, int32_t *least, int32_t *most)
{
    *least = *most = layers->values[0];
    for (size_t i = 0; i < stbds_arrlenu(layers->values); i++) {
        *least = layers->values[i] < *least ? layers->values[i] : *least;
        *most = layers->values[i] > *most ? layers->values[i] : *most;
    }
    return *most > *least;
}

/* One cell: layer k from record i to the next one. */
EX_API void exi_rep_cell(const exi_rep_chart *chart, const exi_rep_layers *layers, size_t i, size_t next, int32_t k, double row,
                         double top, double part, ex_text *out)
{
    const double from = exi_rep_x(chart, layers->step[i]);
    const double to = next < stbds_arrlenu(layers->step) ? exi_rep_x(chart, layers->step[next]) : EXI_REP_W - EXI_REP_RIGHT;
    ex_text_format(out, "<rect class=\"heat\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill-opacity=\"%.3f\">"
                   "<title>step %.15g, layer %d: %d</title></rect>\n",
        from, top + k * row, to > from ? to - from : 0.1, row - 1, 0.06 + 0.94 * part, layers->step[i], (int)k,
        (int)layers->values[i * (size_t)layers->layers + (size_t)k]);
}

/* Rows of equal values in time are joined into one rectangle. */
EX_API void exi_rep_cells(const exi_rep_chart *chart, const exi_rep_layers *layers, int32_t most, double row, double top,
                          ex_text *out)
{
    const size_t records = stbds_arrlenu(layers->step), n = (size_t)layers->layers;
    for (int32_t k = 0; k < layers->layers; k++) {
        for (size_t i = 0, next; i < records; i = next) {
            const int32_t value = layers->values[i * n + (size_t)k];
            for (next = i + 1; next < records && layers->values[next * n + (size_t)k] == value; next++) continue;
            exi_rep_cell(chart, layers, i, next, k, row, top, most > 0 ? (double)value / (double)most : 0, out);
        }
    }
}

EX_API void exi_rep_heat_axis(const exi_rep_chart *chart, const exi_rep_layers *layers, double row, double top, ex_text *out)
{
    const size_t last = (stbds_arrlenu(layers->step) - 1) * (size_t)layers->layers;
    const int32_t every = row >= 11 ? 1 : (int32_t)(11 / row) + 1;
    const int right = EXI_REP_W - EXI_REP_RIGHT + 6;
    for (int32_t k = 0; k < layers->layers; k += every) {
        const double y = top + (k + 0.5) * row + 3.5;
        char label[16];
        snprintf(label, sizeof(label), "%d", (int)k);
        exi_rep_label(out, EXI_REP_LEFT - 6, y, "end", label);
        ex_text_format(out, "<text class=\"end heat\" x=\"%d\" y=\"%.1f\">%d</text>\n", right, y,
                       (int)layers->values[last + (size_t)k]);
    }
    exi_rep_x_axis(chart, top + row * layers->layers, out);
    exi_rep_label(out, EXI_REP_LEFT - 6, top - 6, "end", "layer");
    exi_rep_label(out, right, top - 6, "start", "now");
}

EX_API void exi_rep_heat_legend(int32_t most, ex_text *out)
{
    const double x = EXI_REP_LEFT + 8, y = 6;
    char label[16];
    for (int i = 0; i < 24; i++) {
        ex_text_format(out, "<rect class=\"heat\" x=\"%.1f\" y=\"%.1f\" width=\"5\" height=\"9\" fill-opacity=\"%.3f\"/>",
                       x + 5 * i, y, 0.06 + 0.94 * i / 23.0);
    }
    snprintf(label, sizeof(label), "%d", (int)most);
    exi_rep_label(out, x - 5, y + 8, "end", "0");
    exi_rep_label(out, x + 125, y + 8, "start", label);
}

EX_API void exi_rep_heat_map(const exi_rep_run *run, const exi_rep_layers *layers, ex_text *out)
{
    exi_rep_chart chart;
    int32_t least, most;
    const double row = layers->layers <= 16 ? 16 : layers->layers <= 32 ? 10 : 320.0 / layers->layers, top = 36;
    char *label;
    memset(&chart, 0, sizeof(chart));
    if (!exi_rep_varies(layers, &least, &most)) return;
    label = ex_format("%s per layer, %s", layers->name, run->name);
    chart.x.low = layers->step[0];
    chart.last = layers->step[stbds_arrlenu(layers->step) - 1];
    if (exi_rep_run_end(run) > chart.last) chart.last = exi_rep_run_end(run);      /* the last record holds to the end */
    if (!(chart.last > chart.x.low)) chart.last = chart.x.low + 1;
    chart.x.step = exi_rep_nice(chart.x.low, chart.last, 6).step;
    exi_rep_card_begin(out, label, "", "", (int)(top + row * layers->layers) + 38, label);
    exi_rep_heat_legend(most, out);
    exi_rep_cells(&chart, layers, most, row, top, out);
    exi_rep_heat_axis(&chart, layers, row, top, out);
    ex_text_put(out, "</svg></figure>\n");
    free(label);
}

EX_API void exi_rep_heat_maps(const ex_report *report, ex_text *out)
{
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        for (size_t i = 0; i < stbds_arrlenu(report->runs[r].layers); i++)
            exi_rep_heat_map(&report->runs[r], &report->runs[r].layers[i], out);
    }
}

/* ------------------------------------------------------------------------------------------------ tables */

EX_API const exi_rep_pair *exi_rep_pair_of(const exi_rep_run *run, bool settings, const char *name)
{
    const exi_rep_pair *pairs = settings ? run->settings : run->results;
    for (size_t i = 0; i < stbds_arrlenu(pairs); i++) {
        if (strcmp(pairs[i].name, name) == 0) return &pairs[i];
    }
    return NULL;
}

/* Do the runs that have this setting disagree? */
EX_API bool exi_rep_differs(const ex_report *report, bool settings, const char *name)
{
    const exi_rep_pair *first = NULL;
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        const exi_rep_pair *pair = exi_rep_pair_of(&report->runs[r], settings, name);
        if (pair != NULL && first != NULL && strcmp(pair->value, first->value) != 0) return true;
        if (first == NULL) first = pair;
    }
    return false;
}

EX_API bool exi_rep_has_pairs(const exi_rep_run *run, bool settings)
{
    return (settings ? run->settings : run->results) != NULL;
}

EX_API void exi_rep_table_row(const ex_report *report, bool settings, const char *name, ex_text *out)
{
    ex_text_format(out, "<tr%s><th scope=\"row\">", settings && exi_rep_differs(report, settings, name) ? " class=\"diff\"" : "");
    if (settings) exi_rep_escape(out, name);
    else exi_rep_pretty(out, name);
    ex_text_put(out, "</th>");
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        const exi_rep_pair *pair = exi_rep_pair_of(&report->runs[r], settings, name);
        if (!exi_rep_has_pairs(&report->runs[r], settings)) continue;
        ex_text_put(out, "<td>");
        if (pair != NULL) exi_rep_escape(out, pair->value);
        ex_text_put(out, "</td>");
    }
    ex_text_put(out, "</tr>\n");
}

/* Names down, runs across. */
EX_API void exi_rep_table(const ex_report *report, bool settings, ex_text *out)
{
    ex_map seen;
    memset(&seen, 0, sizeof(seen));
    ex_text_put(out, "<div class=\"scroll\"><table><thead><tr><th></th>");
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        if (!exi_rep_has_pairs(&report->runs[r], settings)) continue;
        ex_text_format(out, "<th scope=\"col\"><i class=\"b%d\"></i>", (int)(r % EX_REPORT_COLORS));
        exi_rep_escape(out, report->runs[r].name);
        ex_text_put(out, "</th>");
    }
    ex_text_put(out, "</tr></thead><tbody>\n");
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        const exi_rep_pair *pairs = settings ? report->runs[r].settings : report->runs[r].results;
        for (size_t i = 0; i < stbds_arrlenu(pairs); i++) {
            if (ex_map_put(&seen, pairs[i].name, strlen(pairs[i].name), 1))
                exi_rep_table_row(report, settings, pairs[i].name, out);
        }
    }
    ex_text_put(out, "</tbody></table></div>\n");
    ex_map_free(&seen);
}

/* ------------------------------------------------------------------------------------------------ write */

EX_API const char *exi_rep_style(void)
{
    return "<style>\n"
           ":root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1d2430;--soft:#667085;--line:#e3e6ec;--axis:#98a1b0;"
           "--c0:#2563c9;--c1:#d9601a;--c2:#12805c;--c3:#9c3fa8;--c4:#a97a00;--c5:#5a6675;--heat:#2563c9;--diff:#fff6dd}\n"
           "@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1b2029;--ink:#e7eaf0;--soft:#98a2b3;--line:#2b323e;"
           "--axis:#5d6879;"
           "--c0:#6ea2ff;--c1:#ff9a5c;--c2:#4cc79b;--c3:#d78be2;--c4:#e0b84a;--c5:#a9b4c4;--heat:#6ea2ff;--diff:#33301f}}\n"
           "*{box-sizing:border-box}body{margin:0 auto;max-width:1500px;padding:28px 24px 48px;"
           "background:var(--bg);color:var(--ink);"
           "font:15px/1.5 system-ui,-apple-system,\"Segoe UI\",Roboto,\"Helvetica Neue\",Arial,sans-serif}\n"
           "h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:17px;margin:30px 0 10px}"
           "p{margin:0;color:var(--soft)}.note{font-size:13px;margin:-6px 0 10px}\n"
           ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(430px,100%),1fr));gap:16px}\n"
           ".card{margin:0;padding:14px 14px 6px;background:var(--card);border:1px solid var(--line);border-radius:10px}\n"
           "figcaption{font-weight:600;font-size:14.5px}small{font-weight:400;font-size:12.5px;color:var(--soft)}\n"
           "svg{display:block;width:100%;height:auto}svg text{font-size:11px;font-variant-numeric:tabular-nums}"
           ".t{fill:var(--soft)}"
           ".end{font-weight:600}path.grid{display:inline;stroke:var(--line)}path{fill:none;stroke-width:1}"
           ".axis{stroke:var(--axis)}\n"
           ".line{stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}"
           ".dash{stroke-dasharray:5 4;stroke-width:1.4;opacity:.75}"
           ".raw{stroke-width:1;opacity:.22}.hot{fill-opacity:0}.hot:hover{fill-opacity:.85}.heat{fill:var(--heat)}\n"
           ".s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}"
           ".s3{stroke:var(--c3)}.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}\n"
           ".f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}\n"
           ".b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}"
           ".b3{background:var(--c3)}.b4{background:var(--c4)}.b5{background:var(--c5)}\n"
           "th i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}\n"
           ".scroll{overflow-x:auto;width:fit-content;max-width:100%;"
           "background:var(--card);border:1px solid var(--line);border-radius:10px}\n"
           "table{border-collapse:collapse;min-width:560px;font-variant-numeric:tabular-nums}"
           "th,td{padding:7px 14px;text-align:right;white-space:nowrap;"
           "border-top:1px solid var(--line)}thead th{border-top:0;font-weight:600}"
           "tbody th{font-weight:400;text-align:left;color:var(--soft)}"
           "td{max-width:420px;overflow:hidden;text-overflow:ellipsis}.diff td,.diff th{background:var(--diff)}\n"
           "details{margin-top:30px}summary{font-size:17px;font-weight:600;cursor:pointer;margin-bottom:10px}\n"
           "@media print{.card{break-inside:avoid}}\n"
           "</style>\n";
}

EX_API void exi_rep_body(const ex_report *report, ex_text *out)
{
    bool results = false, settings = false;
    ex_text maps = {NULL, 0, 0};
    int number = 0;
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        results = results || exi_rep_has_pairs(&report->runs[r], false);
        settings = settings || exi_rep_has_pairs(&report->runs[r], true);
    }
    if (results) {
        ex_text_put(out, "<h2>Results</h2>\n");
        exi_rep_table(report, false, out);
    }
    ex_text_put(out, "<h2>Training</h2>\n");
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        if (report->runs[r].compactions == NULL) continue;
        ex_text_put(out, "<p class=\"note\">Triangles on an axis: here a model became physically smaller.</p>\n");
        break;
    }
    ex_text_put(out, "<div class=\"grid\">\n");
    exi_rep_curves(report, &number, out);
    ex_text_put(out, "</div>\n");
    exi_rep_heat_maps(report, &maps);
    if (maps.length > 0) ex_text_format(out, "<h2>Layers over time</h2>\n<div class=\"grid\">\n%s</div>\n", maps.at);
    ex_text_free(&maps);
    if (settings) {
        ex_text_put(out, "<details><summary>Settings</summary>\n");
        exi_rep_table(report, true, out);
        ex_text_put(out, "</details>\n");
    }
}

EX_API bool ex_report_write(const ex_report *report, const char *path, ex_error *error)
{
    ex_text out = {NULL, 0, 0};
    bool fine;
    ex_text_put(&out, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
                      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>");
    exi_rep_escape(&out, report->title);
    ex_text_put(&out, "</title>\n");
    ex_text_put(&out, exi_rep_style());
    ex_text_put(&out, "</head><body>\n<h1>");
    exi_rep_escape(&out, report->title);
    ex_text_put(&out, "</h1>\n<p>");
    for (size_t r = 0; r < stbds_arrlenu(report->runs); r++) {
        ex_text_put(&out, r > 0 ? " \xc2\xb7 " : "");
        exi_rep_escape(&out, report->runs[r].name);
    }
    ex_text_put(&out, "</p>\n");
    exi_rep_body(report, &out);
    ex_text_put(&out, "</body></html>\n");
    fine = ex_write_file(path, out.at, out.length, error);
    ex_text_free(&out);
    return fine;
}

#endif /* EX_REPORT_H */
