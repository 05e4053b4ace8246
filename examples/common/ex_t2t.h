/* ex_t2t.h - what a model with an encoder and a decoder can be tuned for: text to text. From files to pairs of token sequences,
   and from the texts that a model writes to ROUGE, BLEU and exact match.

   Include after ex_lm.h. A program fills an ex_t2t's first part, then

       ex_t2t_create         a fresh model of a usual shape (or ex_lm_load: an existing one)
       ex_t2t_read           once `config` and `tokenizer` are known
       ex_t2t_evaluate       loss and metrics of a file
       ex_t2t_answer         writes the target of a source */
#ifndef EX_T2T_H
#define EX_T2T_H

/* ex_t2t.metric; in the order of EX_T2T_METRICS. */
enum { EX_T2T_ROUGE_L, EX_T2T_ROUGE_1, EX_T2T_ROUGE_2, EX_T2T_BLEU, EX_T2T_EXACT, EX_T2T_LOSS };
#define EX_T2T_METRICS "rouge-l|rouge-1|rouge-2|bleu|exact|loss"

/* ex_t2t_create's shape; in the order of EX_T2T_SHAPES. */
#define EX_T2T_SHAPES "none|tiny|small|base"

/* Pair i is sequence i of both. */
typedef struct ex_t2t_set { ex_dataset source, target; } ex_t2t_set;
typedef struct ex_t2t_file { const char *path; ex_pairs pairs; ex_groups groups; ex_t2t_set set; } ex_t2t_file;

typedef struct ex_t2t {
    const char *source, *target, *prefix;     /* as in ex_pairs_desc */
    bool no_header;
    int64_t max_source, max_target;   /* tokens; 0: no limit */
    int64_t texts;                    /* sources of a file that an evaluation writes texts for; 0: all */
    int32_t metric;
    ex_sampling how;
    ex_lm lm;                         /* config, tokenizer, error */
} ex_t2t;

EX_API void ex_t2t_file_free(ex_t2t_file *file)
{
    ex_dataset_free(&file->set.source);
    ex_dataset_free(&file->set.target);
    ex_groups_free(&file->groups);
    ex_pairs_free(&file->pairs);
}

/* ------------------------------------------------------------------------------------------------ a fresh model */

/* The decoder learns to end from targets that end. */
EX_API bool exi_t2t_check_end(const ex_t2t *t, const char *path)
{
    ex_encoding encoding;
    ex_encode_desc desc;
    memset(&encoding, 0, sizeof(encoding));
    memset(&desc, 0, sizeof(desc));
    desc.text = "a";
    desc.bytes = 1;
    bool fine = ex_tokenizer_encode(t->lm.tokenizer, &desc, &encoding, t->lm.error);
    const int32_t count = fine ? encoding.first[1] : 0;
    if (fine && (count == 0 || encoding.ids[count - 1] != t->lm.config.end_id))
        fine = ex_fail(t->lm.error, "%s: the tokenizer does not put the end token (%d) behind a text, so that no text would end",
                       path, (int)t->lm.config.end_id);
    ex_encoding_free(&encoding);
    return fine;
}

/* Special tokens that the decoder begins and ends with. */
EX_API bool exi_t2t_find_specials(ex_t2t *t, const char *path)
{
    const ex_tokenizer *tokenizer = t->lm.tokenizer;
    apt_config *config = &t->lm.config;
    const int32_t end = ex_tokenizer_special(tokenizer, EX_EOS);
    config->vocab = ex_tokenizer_size(tokenizer);
    config->pad_id = config->start_id = ex_tokenizer_special(tokenizer, EX_PAD);
    config->end_id = end >= 0 ? end : ex_tokenizer_special(tokenizer, EX_SEP);
    return (config->pad_id >= 0 && config->end_id >= 0) ||
           ex_fail(t->lm.error, "%s: the tokenizer has no token for %s", path,
                   config->pad_id < 0 ? "padding" : "the end of a text");
}

/* p->loaded becomes a random T5 v1.0 (ReLU, tied head) of shape number `shape` for the tokenizer of a folder or a file. */
EX_API bool ex_t2t_create(ex_t2t *t, ex_program *p, int32_t shape, const char *tokenizer)
{
    /* hidden, blocks of each stack, heads, neurons: T5-efficient-tiny, T5-small, T5-base */
    static const int32_t shapes[][4] = {{256, 4, 4, 1024}, {512, 6, 8, 2048}, {768, 12, 12, 3072}};
    const int32_t *const s = shapes[shape - 1];
    apt_config *config = &t->lm.config;
    config->family = APT_T5;
    config->task = APT_TASK_LM;
    config->hidden = s[0];
    config->head_dim = 64;
    config->layers = 3 * s[1];
    config->decoder_layers = s[1];
    config->heads = s[2];
    config->neurons = s[3];
    config->scaled_head = 1;
    t->lm.tokenizer = ex_tokenizer_load(tokenizer, t->lm.error);
    if (t->lm.tokenizer == NULL || !exi_t2t_find_specials(t, tokenizer)) return false;
    if (apt_model_create(p->ctx, config, (uint64_t)p->options.seed, &p->loaded) != APT_OK)
        return ex_fail(t->lm.error, "%s", apt_error(p->ctx));
    apt_model_config(p->loaded, config);
    ex_program_show_model(p, config, tokenizer, stdout);
    return true;
}

/* ------------------------------------------------------------------------------------------------ files */

/* Reads and tokenises file->path, if there is one. what: "train" and such; model: where the tokenizer is from. */
EX_API bool ex_t2t_read(const ex_t2t *t, ex_t2t_file *file, const char *what, const char *model, int64_t limit)
{
    ex_t2t_set *set = &file->set;
    ex_pairs_desc desc;
    ex_error inner = {""};
    if (file->path == NULL) return true;
    if (!exi_t2t_check_end(t, model)) return false;
    memset(&desc, 0, sizeof(desc));
    desc.source = t->source;
    desc.target = t->target;
    desc.prefix = t->prefix;
    desc.no_header = t->no_header;
    desc.limit = limit;
    if (!ex_pairs_read(&file->pairs, file->path, &desc, t->lm.error)) return false;
    if (!ex_dataset_pairs(&set->source, &set->target, &file->pairs, t->lm.tokenizer, (int32_t)t->max_source,
                          (int32_t)t->max_target, &inner))
        return ex_fail(t->lm.error, "%s: %s", file->path, inner.text);
    ex_groups_make(&file->groups, &file->pairs);
    if (file->pairs.replaced > 0)
        fprintf(stderr, "warning: %s: %lld bytes that are not UTF-8 were replaced\n", file->path,
                (long long)file->pairs.replaced);
    printf("  %-8s %lld pairs, %lld sources, at most %d tokens to %d", what, (long long)file->pairs.count,
           (long long)file->groups.count, (int)set->source.longest, (int)set->target.longest);
    if (set->source.truncated + set->target.truncated > 0)
        printf(", cut: %lld sources, %lld targets", (long long)set->source.truncated, (long long)set->target.truncated);
    printf("\n");
    return true;
}

EX_API int32_t exi_t2t_length(const void *set, int64_t row)
{
    const ex_t2t_set *s = (const ex_t2t_set *)set;
    return exi_dataset_length(&s->source, row) + exi_dataset_length(&s->target, row);
}

EX_API void exi_t2t_gather(ex_batch *batch, const void *set, const int64_t *index, int32_t count)
{
    const ex_t2t_set *s = (const ex_t2t_set *)set;
    ex_batch_gather(batch, &s->source, index, count);
    stbds_arrsetlen(batch->target_offsets, 0);
    stbds_arrput(batch->target_offsets, 0);
    for (int32_t i = 0; i < count; i++) {
        for (int64_t k = s->target.starts[index[i]]; k < s->target.starts[index[i] + 1]; k++)
            stbds_arrput(batch->labels, s->target.tokens[k]);
        stbds_arrput(batch->target_offsets, (int32_t)stbds_arrlenu(batch->labels));
    }
}

EX_API ex_source ex_t2t_source(const ex_t2t_set *set)
{
    const ex_source source = {set, set->source.count, exi_t2t_length, exi_t2t_gather};
    return source;
}

/* ------------------------------------------------------------------------------------------------ metrics */

typedef struct exi_t2t_sums { ex_rouge rouge; ex_bleu bleu; int64_t exact, count; } exi_t2t_sums;

/* One written text against all targets of its source. */
EX_API bool exi_t2t_judge(const ex_t2t *t, const ex_t2t_file *file, int64_t group, const int32_t *tokens, int32_t count,
                          exi_t2t_sums *sums)
{
    const int64_t *row = file->groups.row + file->groups.first[group];
    const int64_t references = file->groups.first[group + 1] - file->groups.first[group];
    ex_rouge rouge;
    ex_string text = {NULL, 0};
    if (count > 0 && exi_lm_is_end(&t->lm, tokens[count - 1])) count--;
    char *decoded = ex_tokenizer_decode(t->lm.tokenizer, tokens, count, true, &text.bytes, t->lm.error);
    if (decoded == NULL) return false;
    text.at = decoded;
    ex_string *reference = (ex_string *)ex_alloc((size_t)references, sizeof(ex_string));
    for (int64_t i = 0; i < references; i++) reference[i] = ex_string_of(file->pairs.pair[row[i]].target);
    ex_rouge_compare(&rouge, text, reference, references);
    sums->rouge.one.f += rouge.one.f;
    sums->rouge.two.f += rouge.two.f;
    sums->rouge.longest.f += rouge.longest.f;
    ex_bleu_add(&sums->bleu, text, reference, references);
    sums->exact += ex_exact_match(text, reference, references);
    sums->count++;
    free(reference);
    free(decoded);
    return true;
}

enum { EX_T2T_TOGETHER = 32 };        /* texts that are written at a time */

/* Writes and judges the texts of groups first .. first + count - 1. */
EX_API bool exi_t2t_write(const ex_t2t *t, apt_ctx *ctx, apt_model *model, const ex_t2t_file *file, int64_t first, int32_t count,
                          exi_t2t_sums *sums)
{
    const apt_generate_desc desc = exi_lm_desc(&t->lm, &t->how, 0);
    int64_t index[EX_T2T_TOGETHER];
    int32_t lengths[EX_T2T_TOGETHER], *tokens = (int32_t *)ex_alloc((size_t)count * (size_t)desc.max_tokens, sizeof(int32_t));
    ex_batch batch;
    memset(&batch, 0, sizeof(batch));
    for (int32_t i = 0; i < count; i++) index[i] = file->groups.row[file->groups.first[first + i]];
    ex_batch_gather(&batch, &file->set.source, index, count);
    const apt_batch view = ex_batch_apt(&batch);
    bool fine = apt_generate(model, &view, &desc, tokens, lengths) == APT_OK || ex_fail(t->lm.error, "%s", apt_error(ctx));
    for (int32_t i = 0; fine && i < count; i++)
        fine = exi_t2t_judge(t, file, first + i, tokens + (int64_t)i * desc.max_tokens, lengths[i], sums);
    ex_batch_free(&batch);
    free(tokens);
    return fine;
}

EX_API void exi_t2t_scores(const ex_t2t *t, const exi_t2t_sums *sums, double loss, ex_scores *scores)
{
    static const char *const names[] = {"ROUGE-L", "ROUGE-1", "ROUGE-2", "BLEU", "exact match"};
    const double texts = sums->count > 0 ? 0.01 * (double)sums->count : 1;    /* everything in percent, as BLEU is */
    const double values[] = {sums->rouge.longest.f / texts, sums->rouge.one.f / texts, sums->rouge.two.f / texts,
                             ex_bleu_score(&sums->bleu), (double)sums->exact / texts};
    memset(scores, 0, sizeof(*scores));
    scores->loss = loss;
    scores->lower = t->metric == EX_T2T_LOSS;
    scores->count = EX_T2T_LOSS;
    for (int32_t i = 0; i < EX_T2T_LOSS; i++) {
        scores->name[i] = names[i];
        scores->value[i] = values[i];
    }
    scores->chosen_name = scores->lower ? "loss" : names[t->metric];
    scores->chosen = scores->lower ? loss : values[t->metric];
}

/* The loss of all pairs; one text for each source, the targets of equal sources being its references. */
EX_API bool ex_t2t_evaluate(const ex_t2t *t, apt_ctx *ctx, apt_model *model, const ex_t2t_file *file, ex_scores *scores,
                            ex_score_info *info)
{
    const ex_source rows = ex_t2t_source(&file->set);
    const int64_t groups = file->groups.count, texts = t->texts > 0 && t->texts < groups ? t->texts : groups;
    exi_t2t_sums sums;
    memset(&sums, 0, sizeof(sums));
    if (!ex_score(ctx, model, &rows, NULL, NULL, info, t->lm.error)) return false;
    for (int64_t g = 0; g < texts; g += EX_T2T_TOGETHER) {
        const int32_t count = texts - g < EX_T2T_TOGETHER ? (int32_t)(texts - g) : EX_T2T_TOGETHER;
        if (!exi_t2t_write(t, ctx, model, file, g, count, &sums)) return false;
    }
    exi_t2t_scores(t, &sums, info->loss, scores);
    return true;
}

/* ------------------------------------------------------------------------------------------------ writing */

/* The text that the model writes for a source, on stdout. */
EX_API bool ex_t2t_answer(const ex_t2t *t, apt_ctx *ctx, apt_model *model, const char *source)
{
    char *text = ex_lm_clean(source), *prompt = ex_format("%s%s", t->prefix != NULL ? t->prefix : "", text);
    ex_text answer = {NULL, 0, 0};
    const bool fine = ex_lm_answer(&t->lm, ctx, model, prompt, &t->how, &answer);
    ex_text_free(&answer);
    free(prompt);
    free(text);
    return fine;
}

#endif /* EX_T2T_H */
