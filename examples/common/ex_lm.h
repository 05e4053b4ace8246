/* ex_lm.h - what a model that predicts the next token can be tuned for: plain text, instructions with answers. From files to
   rows of tokens, from the loss to perplexity, and texts written token by token. (Loading and writing are also for models with
   an encoder, whose files and metrics are in ex_t2t.h.)

   Include after ex_program.h, ex_token_rows.h and ex_metrics.h. A program fills an ex_lm's first part, then

       ex_lm_load            a checkpoint folder: `config` and `tokenizer` become known
       ex_lm_read            a file
       ex_lm_evaluate        perplexity of a file
       ex_lm_write           goes on with a prompt, or answers a source
       ex_lm_answer          the same for a person, ex_lm_lines for every line of stdin */
#ifndef EX_LM_H
#define EX_LM_H

/* How texts are written. temperature 0: the most likely token each time. */
typedef struct ex_sampling {
    double temperature, top_p, length_penalty;
    int64_t top_k, beams, most, seed;         /* most: new tokens */
} ex_sampling;

EX_API void ex_sampling_init(ex_sampling *how, int64_t most)
{
    memset(how, 0, sizeof(*how));
    how->beams = 1;
    how->length_penalty = 1;
    how->most = most;
}

/* Rows of the table of ex_args.h; how is an ex_sampling *. */
#define EX_SAMPLING_ROWS(how)                                                                                               \
    EX_REAL("temperature", "X", &(how)->temperature, 0, 1e3, "0: always the most likely token"),                            \
    EX_INT("top-k", "N", &(how)->top_k, 0, 1e6, "draw from the N most likely tokens; 0: from all"),                         \
    EX_REAL("top-p", "X", &(how)->top_p, 0, 1, "and from the fewest that have this share; 0: from all"),                    \
    EX_INT("beams", "N", &(how)->beams, 1, 1024, "beam search; not with a temperature"),                                    \
    EX_REAL("length-penalty", "X", &(how)->length_penalty, -100, 100, "beams: above 0 prefers longer texts"),               \
    EX_INT("max-new", "N", &(how)->most, 1, 1e6, "tokens to write at most")

EX_API bool ex_sampling_check(const ex_sampling *how, ex_error *error)
{
    return how->beams <= 1 || !(how->temperature > 0) || ex_fail(error, "--beams and --temperature exclude each other");
}

typedef struct ex_lm_file { const char *path; ex_token_rows rows; int64_t longest, sequences; } ex_lm_file;

typedef struct ex_lm {
    int64_t length;                   /* tokens of a row; 0: 256, or the model's positions if fewer */
    bool pack;                        /* several short examples share a row */
    bool learn_prompt;
    apt_config config;
    ex_tokenizer *tokenizer;
    ex_error *error;
} ex_lm;

EX_API void ex_lm_file_free(ex_lm_file *file)
{
    ex_token_rows_free(&file->rows);
}

/* ------------------------------------------------------------------------------------------------ model */

/* Loads the program's checkpoint folder; says on `file` what it is. */
EX_API bool ex_lm_load(ex_lm *lm, ex_program *p, FILE *file)
{
    const apt_load_desc load = APT_ZERO;
    if (!ex_program_load(p, load, &lm->config)) return false;
    lm->tokenizer = ex_program_tokenizer(p, &lm->config, p->model);
    if (lm->tokenizer != NULL) ex_program_show_model(p, &lm->config, p->model, file);
    return lm->tokenizer != NULL;
}

/* ------------------------------------------------------------------------------------------------ files */

/* Pairs of prompt and answer have a format; every other file is plain text. */
EX_API bool ex_lm_is_pairs(const char *path)
{
    return exi_ends_with(path, ".json") || exi_ends_with(path, ".jsonl") || exi_ends_with(path, ".csv") ||
           exi_ends_with(path, ".tsv");
}

EX_API int32_t exi_lm_length(const ex_lm *lm)
{
    const int64_t length = lm->length > 0 ? lm->length : 256;
    return (int32_t)(length < lm->config.positions ? length : lm->config.positions);
}

EX_API bool exi_lm_read_pairs(const ex_lm *lm, ex_lm_file *file, int64_t limit, int64_t *replaced)
{
    ex_pairs_desc desc;
    ex_token_rows_desc rows;
    ex_pairs pairs;
    ex_error inner = {""};
    memset(&desc, 0, sizeof(desc));
    memset(&rows, 0, sizeof(rows));
    desc.limit = limit;
    rows.length = exi_lm_length(lm);
    rows.pack = lm->pack;
    rows.learn_prompt = lm->learn_prompt;
    if (!ex_pairs_read(&pairs, file->path, &desc, lm->error)) return false;
    const bool fine = ex_token_rows_pairs(&file->rows, &pairs, lm->tokenizer, &rows, &inner);
    if (!fine) ex_fail(lm->error, "%s: %s", file->path, inner.text);
    *replaced = pairs.replaced;
    ex_pairs_free(&pairs);
    return fine;
}

EX_API bool exi_lm_read_text(const ex_lm *lm, ex_lm_file *file, int64_t *replaced)
{
    ex_blocks_desc desc;
    memset(&desc, 0, sizeof(desc));
    desc.length = exi_lm_length(lm);
    desc.begin = true;
    desc.keep_rest = true;
    return ex_token_rows_file(&file->rows, file->path, lm->tokenizer, &desc, replaced, lm->error);
}

/* Reads and tokenises file->path, if there is one. what: "train" and such; limit: of pairs, 0: all. */
EX_API bool ex_lm_read(const ex_lm *lm, ex_lm_file *file, const char *what, int64_t limit)
{
    const ex_token_rows *rows = &file->rows;
    int64_t replaced = 0;
    if (file->path == NULL) return true;
    if (ex_lm_is_pairs(file->path) ? !exi_lm_read_pairs(lm, file, limit, &replaced) : !exi_lm_read_text(lm, file, &replaced))
        return false;
    for (int64_t r = 0; r < rows->rows; r++) {
        const int64_t tokens = exi_token_rows_length(rows, r), sequences = rows->first[r + 1] - rows->first[r];
        if (tokens > file->longest) file->longest = tokens;
        if (sequences > file->sequences) file->sequences = sequences;
    }
    if (replaced > 0)
        fprintf(stderr, "warning: %s: %lld bytes that are not UTF-8 were replaced\n", file->path, (long long)replaced);
    printf("  %-8s %lld rows, %lld tokens to learn, longest %lld", what, (long long)rows->rows, (long long)rows->learned,
           (long long)file->longest);
    if (rows->sequences > rows->rows) printf(", %lld examples packed", (long long)rows->sequences);
    if (rows->truncated > 0) printf(", %lld cut", (long long)rows->truncated);
    if (rows->dropped > 0) printf(", %lld left out: nothing of their answers fits", (long long)rows->dropped);
    printf("\n");
    return true;
}

/* ------------------------------------------------------------------------------------------------ perplexity */

EX_API bool ex_lm_evaluate(const ex_lm *lm, apt_ctx *ctx, apt_model *model, const ex_lm_file *file, ex_scores *scores,
                           ex_score_info *info)
{
    const ex_source rows = ex_token_rows_source(&file->rows);
    memset(scores, 0, sizeof(*scores));
    if (!ex_score(ctx, model, &rows, NULL, NULL, info, lm->error)) return false;
    const double sum = info->loss * (double)info->terms;
    scores->loss = info->loss;
    scores->lower = true;
    scores->name[0] = scores->chosen_name = "perplexity";
    scores->value[0] = scores->chosen = ex_perplexity(sum, info->terms);
    scores->name[1] = "per byte";
    scores->value[1] = ex_perplexity(sum, file->rows.bytes);
    scores->count = 2;
    return true;
}

/* ------------------------------------------------------------------------------------------------ writing */

typedef struct exi_lm_stream {
    const ex_lm *lm;
    ex_decoder decoder;
    ex_text *answer;                  /* all that was written ... */
    size_t shown;                     /* ... and how much of it is on the screen */
    int64_t count;                    /* tokens */
    bool failed;
} exi_lm_stream;

EX_API void exi_lm_show(exi_lm_stream *s)
{
    fwrite(s->answer->at + s->shown, 1, s->answer->length - s->shown, stdout);
    fflush(stdout);
    s->shown = s->answer->length;
}

/* With an encoder the prompt is a text of its own. */
EX_API bool exi_lm_has_source(const ex_lm *lm)
{
    return lm->config.family == APT_T5;
}

/* Where one text ends another one may begin: the begin token is an end, too. (A decoder behind an encoder begins with it.) */
EX_API bool exi_lm_is_end(const ex_lm *lm, int32_t token)
{
    if (exi_lm_has_source(lm)) return token == lm->config.end_id;
    return token == lm->config.end_id || token == ex_tokenizer_special(lm->tokenizer, EX_EOS) ||
           token == ex_tokenizer_special(lm->tokenizer, EX_BOS);
}

EX_API int exi_lm_token(int32_t sequence, int32_t token, void *user)
{
    exi_lm_stream *s = (exi_lm_stream *)user;
    (void)sequence;
    s->count++;
    if (exi_lm_is_end(s->lm, token)) return 1;
    if (!ex_decoder_add(&s->decoder, token, s->answer, s->lm->error)) s->failed = true;
    else exi_lm_show(s);
    return s->failed;
}

/* The prompt as training has it: with the begin token where there is one, without an end. A source has both. */
EX_API bool exi_lm_encode(const ex_lm *lm, const char *prompt, ex_encoding *encoding, int32_t *count)
{
    ex_encode_desc desc;
    memset(&desc, 0, sizeof(desc));
    desc.text = prompt;
    desc.bytes = strlen(prompt);
    if (!ex_tokenizer_encode(lm->tokenizer, &desc, encoding, lm->error)) return false;
    *count = encoding->first[1];
    const bool ended = *count > 0 && encoding->ids[*count - 1] == ex_tokenizer_special(lm->tokenizer, EX_EOS);
    if (ended && !exi_lm_has_source(lm)) --*count;
    return *count > 0 || ex_fail(lm->error, "an empty prompt, and the tokenizer has no begin token");
}

/* How many tokens a prompt has. */
EX_API bool ex_lm_tokens(const ex_lm *lm, const char *prompt, int32_t *count)
{
    ex_encoding encoding;
    memset(&encoding, 0, sizeof(encoding));
    const bool fine = exi_lm_encode(lm, prompt, &encoding, count);
    ex_encoding_free(&encoding);
    return fine;
}

/* For a prompt of `count` tokens: no more are written than the model has positions left. */
EX_API apt_generate_desc exi_lm_desc(const ex_lm *lm, const ex_sampling *how, int32_t count)
{
    apt_generate_desc desc = APT_ZERO;
    const int64_t room = lm->config.positions - count;
    desc.max_tokens = (int32_t)(how->most < room ? how->most : room);
    desc.temperature = (float)how->temperature;
    desc.top_k = (int32_t)how->top_k;
    desc.top_p = (float)how->top_p;
    desc.seed = (uint64_t)how->seed;
    desc.beams = (int32_t)how->beams;
    desc.length_penalty = (float)how->length_penalty;
    return desc;
}

/* Goes on with `count` tokens, or answers them. The decoder has seen a prompt, so that the first word keeps its space. */
EX_API bool exi_lm_run(exi_lm_stream *s, apt_ctx *ctx, apt_model *model, const int32_t *ids, int32_t count,
                       const ex_sampling *how)
{
    const int32_t offsets[2] = {0, count};
    apt_generate_desc desc = exi_lm_desc(s->lm, how, count);
    apt_batch batch = APT_ZERO;
    int32_t length = 0, *tokens = (int32_t *)ex_alloc(desc.max_tokens > 0 ? (size_t)desc.max_tokens : 1, sizeof(int32_t));
    ex_text seen = {NULL, 0, 0};
    bool fine = desc.max_tokens > 0 || ex_fail(s->lm->error, "the prompt has %d tokens, the model %d positions", (int)count,
                                               (int)s->lm->config.positions);
    for (int32_t i = 0; fine && !exi_lm_has_source(s->lm) && i < count; i++)
        fine = ex_decoder_add(&s->decoder, ids[i], &seen, s->lm->error);
    ex_text_free(&seen);
    batch.sequences = 1;
    batch.offsets = offsets;
    batch.tokens = ids;
    if (how->beams <= 1) {
        desc.on_token = exi_lm_token;
        desc.user = s;
    }
    if (fine && apt_generate(model, &batch, &desc, tokens, &length) != APT_OK) fine = ex_fail(s->lm->error, "%s", apt_error(ctx));
    for (int32_t i = 0; fine && how->beams > 1 && i < length && exi_lm_token(0, tokens[i], s) == 0; i++) continue;
    free(tokens);
    return fine && !s->failed;
}

/* Writes what follows the prompt to stdout, token by token unless there are beams, and adds it to answer. *tokens (may be NULL):
   how many. */
EX_API bool ex_lm_write(const ex_lm *lm, apt_ctx *ctx, apt_model *model, const char *prompt, const ex_sampling *how,
                        ex_text *answer, int64_t *tokens)
{
    ex_encoding encoding;
    exi_lm_stream stream;
    int32_t count = 0;
    memset(&encoding, 0, sizeof(encoding));
    memset(&stream, 0, sizeof(stream));
    ex_text_put(answer, "");
    stream.lm = lm;
    stream.answer = answer;
    stream.shown = answer->length;
    ex_decoder_start(&stream.decoder, lm->tokenizer, true);
    const bool fine = exi_lm_encode(lm, prompt, &encoding, &count) && exi_lm_run(&stream, ctx, model, encoding.ids, count, how);
    ex_decoder_end(&stream.decoder, answer);
    exi_lm_show(&stream);
    ex_decoder_free(&stream.decoder);
    ex_encoding_free(&encoding);
    if (tokens != NULL) *tokens = stream.count;
    return fine;
}

/* One answer on stdout, its speed on stderr. */
EX_API bool ex_lm_answer(const ex_lm *lm, apt_ctx *ctx, apt_model *model, const char *prompt, const ex_sampling *how,
                         ex_text *answer)
{
    int64_t tokens = 0;
    const double start = ex_seconds();
    if (!ex_lm_write(lm, ctx, model, prompt, how, answer, &tokens)) return false;
    const double seconds = ex_seconds() - start;
    printf("\n");
    fflush(stdout);
    fprintf(stderr, "  %lld tokens, %.0f tokens/s\n", (long long)tokens, seconds > 0 ? (double)tokens / seconds : 0.0);
    return true;
}

/* A text from outside, repaired where it is no UTF-8. free() */
EX_API char *ex_lm_clean(const char *text)
{
    size_t bytes = strlen(text);
    int64_t replaced;
    return ex_utf8_repair(ex_copy(text, bytes), &bytes, &replaced);
}

/* Hands every line of stdin that is not empty to turn, until that fails. */
EX_API bool ex_lm_lines(bool (*turn)(void *user, const char *line), void *user)
{
    char *line = NULL;
    size_t capacity = 0;
    bool fine = true;
    while (fine) {
        if (isatty(STDIN_FILENO)) fprintf(stderr, "> ");
        if (getline(&line, &capacity, stdin) < 0) break;
        line[strcspn(line, "\r\n")] = 0;
        if (line[0] != 0) fine = turn(user, line);
    }
    free(line);
    return fine;
}

#endif /* EX_LM_H */
