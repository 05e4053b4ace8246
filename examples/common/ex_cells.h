/* ex_cells.h - figures of runs as text: a table on the screen and in the report.

       ex_cells cells[2] = {{.run = "LoRA"}, {.run = "APT"}};
       ex_cell(&cells[0], "accuracy", "%.1f %%", 92.5);
       ex_cells_print(cells, 2, stdout); */
#ifndef EX_CELLS_H
#define EX_CELLS_H

#include "ex_base.h"
#include "ex_report.h"

/* Names and values of one run. Zero-initialise and set run. */
typedef struct ex_cells { const char *run; int32_t count; struct { const char *name; char value[48]; } at[24]; } ex_cells;

EX_PRINTF(3, 4) EX_API void ex_cell(ex_cells *cells, const char *name, const char *format, ...)
{
    va_list list;
    if (cells->count >= (int32_t)(sizeof(cells->at) / sizeof(cells->at[0]))) return;
    cells->at[cells->count].name = name;
    va_start(list, format);
    vsnprintf(cells->at[cells->count].value, sizeof(cells->at[0].value), format, list);
    va_end(list);
    cells->count++;
}

EX_API const char *exi_cell_of(const ex_cells *cells, const char *name)
{
    for (int32_t i = 0; i < cells->count; i++) {
        if (strcmp(cells->at[i].name, name) == 0) return cells->at[i].value;
    }
    return "-";
}

/* Runs across, names down: the names of the run that has most of them. */
EX_API void ex_cells_print(const ex_cells *runs, int32_t count, FILE *file)
{
    const ex_cells *most = runs;
    int left = 0, total;
    for (int32_t r = 0; r < count; r++) most = runs[r].count > most->count ? &runs[r] : most;
    for (int32_t i = 0; i < most->count; i++) left = (int)strlen(most->at[i].name) > left ? (int)strlen(most->at[i].name) : left;
    total = left;
    for (int32_t i = -1; i < most->count; i++) {           /* -1: the heading */
        fprintf(file, "%*s", -left, i < 0 ? "" : most->at[i].name);
        for (int32_t r = 0; r < count; r++) {
            int width = (int)strlen(runs[r].run);
            for (int32_t k = 0; k < most->count; k++) {
                const int length = (int)strlen(exi_cell_of(&runs[r], most->at[k].name));
                width = length > width ? length : width;
            }
            fprintf(file, "  %*s", width, i < 0 ? runs[r].run : exi_cell_of(&runs[r], most->at[i].name));
            if (i < 0) total += 2 + width;
        }
        fputc('\n', file);
        for (int k = 0; i < 0 && k < total; k++) fputs(k + 1 < total ? "-" : "-\n", file);
    }
}

EX_API void ex_cells_report(const ex_cells *cells, ex_report *report)
{
    for (int32_t i = 0; i < cells->count; i++) ex_report_result(report, cells->run, cells->at[i].name, cells->at[i].value);
}

#endif /* EX_CELLS_H */
