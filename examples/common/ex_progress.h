/* ex_progress.h - a progress bar on stderr with loss, sparsity, tokens per second and the time left.

       ex_progress bar = {0};
       ex_progress_begin(&bar, "train", 0, 1000);
       ex_progress_update(&bar, step, &values);            as often as you like: it draws at most ten times a second
       ex_progress_note(&bar, "step %d: pruned", 300);     a line above the bar
       ex_progress_end(&bar);

   The line always fits the terminal, whose width is asked at each drawing; where it is narrow the bar and then the less
   important numbers go. Each drawing is one write. Where stderr is no terminal a plain line comes every ten seconds. */
#ifndef EX_PROGRESS_H
#define EX_PROGRESS_H

#include <math.h>

#include "ex_base.h"

#define EX_PROGRESS_PLAIN_SECONDS 10.0
#define EX_PROGRESS_DRAW_SECONDS 0.1

/* Negative: not shown; a loss that is not finite is not shown either. */
typedef struct ex_progress_values { double loss, sparsity, tokens_per_second; } ex_progress_values;

/* Zero-initialise. */
typedef struct ex_progress {
    FILE *file;                       /* NULL before begin: stderr */
    char title[48];
    int64_t start, total, done;       /* steps; total 0: unknown */
    ex_progress_values values;
    bool active, terminal, blocks;    /* blocks: the locale has U+2588 */
    int drawn;                        /* columns of the line on the screen, 0: none */
    double begun, last;               /* last: drawing or plain line */
    double rate, rated;               /* steps per second, brought up to date when */
    double seconds, steps;            /* fading sums behind the rate */
    int64_t rated_done;
} ex_progress;

EX_API bool exi_progress_utf8(void)
{
    const char *locale = getenv("LC_ALL");
    if (locale == NULL || locale[0] == 0) locale = getenv("LC_CTYPE");
    if (locale == NULL || locale[0] == 0) locale = getenv("LANG");
    return locale != NULL &&
           (strstr(locale, "UTF-8") != NULL || strstr(locale, "utf8") != NULL || strstr(locale, "UTF8") != NULL);
}

/* Columns of UTF-8 text without wide characters. */
EX_API int exi_progress_columns(const char *text)
{
    int columns = 0;
    for (; *text != 0; text++) columns += ((unsigned char)*text & 0xc0) != 0x80;
    return columns;
}

/* cells columns of bar, in eighths where the locale has them. */
EX_API void exi_progress_bar(ex_text *out, double part, int cells, bool blocks)
{
    static const char *const eighths[] = {" ",
                                          "\xe2\x96\x8f",
                                          "\xe2\x96\x8e",
                                          "\xe2\x96\x8d",
                                          "\xe2\x96\x8c",
                                          "\xe2\x96\x8b",
                                          "\xe2\x96\x8a",
                                          "\xe2\x96\x89",
                                          "\xe2\x96\x88"};
    const int filled = (int)(part * cells * 8 + 0.5);
    ex_text_put(out, blocks ? "\xe2\x96\x95" : "[");
    for (int i = 0; i < cells; i++) {
        const int here = filled - 8 * i;
        if (blocks) ex_text_put(out, eighths[here < 0 ? 0 : here > 8 ? 8 : here]);
        else ex_text_put(out, here >= 8 ? "#" : here >= 4 ? ">" : ".");
    }
    ex_text_put(out, blocks ? "\xe2\x96\x8f" : "]");
}

EX_API double exi_progress_part(const ex_progress *bar)
{
    const double part = bar->total > 0 ? (double)bar->done / (double)bar->total : 0;
    return part < 0 ? 0 : part > 1 ? 1 : part;
}

/* The pieces of the line behind the bar, the most important first. Returns how many there are. */
EX_API int exi_progress_pieces(const ex_progress *bar, double now, bool finished, char pieces[5][48])
{
    char text[32];
    int count = 0;
    snprintf(text, sizeof(text), "%lld", (long long)bar->total);     /* padded, so that the bar does not move with each digit */
    if (bar->total > 0) snprintf(pieces[count++], 48, "%*lld/%s", (int)strlen(text), (long long)bar->done, text);
    else snprintf(pieces[count++], 48, "%lld", (long long)bar->done);
    if (finished) snprintf(pieces[count++], 48, "%s", ex_time_text(text, sizeof(text), now - bar->begun));
    else if (bar->total > 0 && bar->rate > 0) {
        snprintf(pieces[count++], 48, "%s left", ex_time_text(text, sizeof(text), (double)(bar->total - bar->done) / bar->rate));
    }
    if (ex_finite(bar->values.loss) && bar->values.loss >= 0) snprintf(pieces[count++], 48, "loss %.4f", bar->values.loss);
    if (bar->values.sparsity >= 0) snprintf(pieces[count++], 48, "sparsity %.1f%%", 100 * bar->values.sparsity);
    if (bar->values.tokens_per_second > 0) {
        snprintf(pieces[count++], 48, "%s tok/s", ex_count_text(text, sizeof(text), bar->values.tokens_per_second));
    }
    return count;
}

/* The whole line in at most `width` columns: title, percent, bar, pieces. */
EX_API void exi_progress_line(const ex_progress *bar, int width, double now, bool finished, ex_text *out)
{
    char pieces[5][48];
    const int count = exi_progress_pieces(bar, now, finished, pieces);
    int room, shown = 0, cells;
    out->length = 0;
    ex_text_put(out, bar->title);
    if (bar->total > 0) ex_text_format(out, " %3d%%", (int)(100 * exi_progress_part(bar)));
    room = width - exi_progress_columns(out->at);
    while (shown < count) {                                /* after the count and the time the bar comes first, if only short */
        const int need = 2 + exi_progress_columns(pieces[shown]);
        if (room < need + (shown > 1 && bar->total > 0 ? 15 : 0)) break;
        room -= need;
        shown++;
    }
    cells = room - 3 > 40 ? 40 : room - 3;                 /* a blank and the two ends */
    if (bar->total > 0 && cells >= 6) {
        ex_text_put(out, " ");
        exi_progress_bar(out, exi_progress_part(bar), cells, bar->blocks);
    }
    for (int i = 0; i < shown; i++) ex_text_format(out, "  %s", pieces[i]);
}

/* Takes the old line off the screen; where the window has become narrower the terminal has broken it into several. */
EX_API void exi_progress_clear(const ex_progress *bar, int width, ex_text *out)
{
    const int rows = bar->drawn > 0 && width > 0 ? (bar->drawn - 1) / width : 0;
    if (bar->drawn == 0) return;
    if (rows > 0) ex_text_format(out, "\033[%dA", rows);
    ex_text_put(out, rows > 0 ? "\r\033[J" : "\r\033[K");
}

/* The average over about the last tenth of the run. It is counted in steps: as evaluations come every so many steps, their
   time is in it, and one of them does not look as if all that is left were as slow. */
EX_API void exi_progress_rate(ex_progress *bar, double now)
{
    const double passed = now - bar->rated, steps = (double)(bar->done - bar->rated_done);
    const double window = bar->total > 200 ? 0.1 * (double)bar->total : 20;
    if (passed <= 0 || steps <= 0) return;
    const double keep = exp(-steps / window);
    bar->seconds = keep * bar->seconds + passed;
    bar->steps = keep * bar->steps + steps;
    bar->rate = bar->steps / bar->seconds;
    bar->rated_done = bar->done;
    bar->rated = now;
}

EX_API void exi_progress_draw(ex_progress *bar, double now, bool finished)
{
    ex_text line = {NULL, 0, 0}, out = {NULL, 0, 0};
    const int width = bar->terminal ? ex_terminal_width(fileno(bar->file)) : 0;
    ex_text_put(&out, "");
    /* the last column stays free: many terminals wrap when it is written */
    exi_progress_line(bar, bar->terminal ? (width > 20 ? width - 1 : 20) : 1000, now, finished, &line);
    if (bar->terminal) exi_progress_clear(bar, width, &out);
    ex_text_add(&out, line.at, line.length);
    if (!bar->terminal || finished) ex_text_put(&out, "\n");
    bar->drawn = finished || !bar->terminal ? 0 : exi_progress_columns(line.at);
    fwrite(out.at, 1, out.length, bar->file);
    fflush(bar->file);
    bar->last = now;
    ex_text_free(&line);
    ex_text_free(&out);
}

EX_API void ex_progress_begin(ex_progress *bar, const char *title, int64_t start, int64_t total)
{
    const char *kind = getenv("TERM");
    memset(bar, 0, sizeof(*bar));
    bar->file = stderr;
    snprintf(bar->title, sizeof(bar->title), "%s", title);
    bar->start = bar->done = bar->rated_done = start;
    bar->total = total;
    bar->values.loss = bar->values.sparsity = bar->values.tokens_per_second = -1;
    bar->terminal = isatty(fileno(bar->file)) && kind != NULL && strcmp(kind, "dumb") != 0;
    bar->blocks = bar->terminal && exi_progress_utf8();
    bar->begun = bar->last = bar->rated = ex_seconds();
    bar->active = true;
    if (bar->terminal) exi_progress_draw(bar, bar->begun, false);
}

/* values may be NULL: the last ones stay. */
EX_API void ex_progress_update(ex_progress *bar, int64_t done, const ex_progress_values *values)
{
    const double now = ex_seconds();
    if (!bar->active) return;
    bar->done = done;
    if (values != NULL) bar->values = *values;
    if (now - bar->last < (bar->terminal ? EX_PROGRESS_DRAW_SECONDS : EX_PROGRESS_PLAIN_SECONDS)) return;
    exi_progress_rate(bar, now);
    exi_progress_draw(bar, now, false);
}

/* A line above the bar. */
EX_PRINTF(2, 3) EX_API void ex_progress_note(ex_progress *bar, const char *format, ...)
{
    ex_text text = {NULL, 0, 0};
    va_list list;
    FILE *file = bar->file != NULL ? bar->file : stderr;
    ex_text_put(&text, "");
    if (bar->active && bar->terminal) exi_progress_clear(bar, ex_terminal_width(fileno(file)), &text);
    va_start(list, format);
    exi_text_formatted(&text, format, list);
    va_end(list);
    ex_text_put(&text, "\n");
    fwrite(text.at, 1, text.length, file);
    fflush(file);
    ex_text_free(&text);
    bar->drawn = 0;
    if (bar->active && bar->terminal) exi_progress_draw(bar, ex_seconds(), false);
}

/* Leaves one finished line. Calling it twice does nothing more. */
EX_API void ex_progress_end(ex_progress *bar)
{
    if (!bar->active) return;
    exi_progress_draw(bar, ex_seconds(), true);
    bar->active = false;
}

#endif /* EX_PROGRESS_H */
