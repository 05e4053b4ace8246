/* ex_unicode.h - the character classes by which tokenizers split text, on top of utf8proc.

   A tokenizer has to split a text exactly as it did when its model was trained. The reference (Hugging Face tokenizers)
   carries tables of several Unicode versions: punctuation, marks and format characters of its BERT parts are those of
   Unicode 8, letters and numbers of its byte-level parts those of Unicode 16, the clusters of its character map those of
   Unicode 17. The tables below hold the difference to utf8proc. They were found by asking the reference about each of the
   1,112,064 code points. */
#ifndef EX_UNICODE_H
#define EX_UNICODE_H

#include <utf8proc.h>

#include "ex_base.h"

typedef struct exi_range { uint32_t first, last; } exi_range;

/* Punctuation since Unicode 9: no word boundary. */
static const exi_range exi_late_punctuation[] = {
    {0x61d, 0x61d}, {0x9fd, 0x9fd}, {0xa76, 0xa76}, {0xc77, 0xc77}, {0xc84, 0xc84}, {0x1b7d, 0x1b7e}, {0x2e43, 0x2e4f},
    {0x2e52, 0x2e5d}, {0x10ead, 0x10ead}, {0x10f55, 0x10f59}, {0x10f86, 0x10f89}, {0x1144b, 0x1144f}, {0x1145a, 0x1145b},
    {0x1145d, 0x1145d}, {0x11660, 0x1166c}, {0x116b9, 0x116b9}, {0x1183b, 0x1183b}, {0x11944, 0x11946}, {0x119e2, 0x119e2},
    {0x11a3f, 0x11a46}, {0x11a9a, 0x11a9c}, {0x11a9e, 0x11aa2}, {0x11b00, 0x11b09}, {0x11c41, 0x11c45}, {0x11c70, 0x11c71},
    {0x11ef7, 0x11ef8}, {0x11f43, 0x11f4f}, {0x11fff, 0x11fff}, {0x12ff1, 0x12ff2}, {0x16e97, 0x16e9a}, {0x16fe2, 0x16fe2},
    {0x1e95e, 0x1e95f}
};

/* Nonspacing marks since Unicode 9: not stripped. */
static const exi_range exi_late_marks[] = {
    {0x7fd, 0x7fd}, {0x898, 0x89f}, {0x8ca, 0x8e1}, {0x9fe, 0x9fe}, {0xafa, 0xaff}, {0xb55, 0xb55}, {0xc04, 0xc04},
    {0xc3c, 0xc3c}, {0xd00, 0xd00}, {0xd3b, 0xd3c}, {0xd81, 0xd81}, {0xeba, 0xeba}, {0xece, 0xece}, {0x180f, 0x180f},
    {0x1885, 0x1886}, {0x1abf, 0x1ace}, {0x1df6, 0x1dfb}, {0xa82c, 0xa82c}, {0xa8c5, 0xa8c5}, {0xa8ff, 0xa8ff},
    {0xa9bd, 0xa9bd}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85},
    {0x11070, 0x11070}, {0x11073, 0x11074}, {0x110c2, 0x110c2}, {0x111c9, 0x111c9}, {0x111cf, 0x111cf}, {0x1123e, 0x1123e},
    {0x11241, 0x11241}, {0x1133b, 0x1133b}, {0x11438, 0x1143f}, {0x11442, 0x11444}, {0x11446, 0x11446}, {0x1145e, 0x1145e},
    {0x1182f, 0x11837}, {0x11839, 0x1183a}, {0x1193b, 0x1193c}, {0x1193e, 0x1193e}, {0x11943, 0x11943}, {0x119d4, 0x119d7},
    {0x119da, 0x119db}, {0x119e0, 0x119e0}, {0x11a01, 0x11a0a}, {0x11a33, 0x11a38}, {0x11a3b, 0x11a3e}, {0x11a47, 0x11a47},
    {0x11a51, 0x11a56}, {0x11a59, 0x11a5b}, {0x11a8a, 0x11a96}, {0x11a98, 0x11a99}, {0x11c30, 0x11c36}, {0x11c38, 0x11c3d},
    {0x11c3f, 0x11c3f}, {0x11c92, 0x11ca7}, {0x11caa, 0x11cb0}, {0x11cb2, 0x11cb3}, {0x11cb5, 0x11cb6}, {0x11d31, 0x11d36},
    {0x11d3a, 0x11d3a}, {0x11d3c, 0x11d3d}, {0x11d3f, 0x11d45}, {0x11d47, 0x11d47}, {0x11d90, 0x11d91}, {0x11d95, 0x11d95},
    {0x11d97, 0x11d97}, {0x11ef3, 0x11ef4}, {0x11f00, 0x11f01}, {0x11f36, 0x11f3a}, {0x11f40, 0x11f40}, {0x11f42, 0x11f42},
    {0x13440, 0x13440}, {0x13447, 0x13455}, {0x16f4f, 0x16f4f}, {0x16fe4, 0x16fe4}, {0x1cf00, 0x1cf2d}, {0x1cf30, 0x1cf46},
    {0x1e000, 0x1e006}, {0x1e008, 0x1e018}, {0x1e01b, 0x1e021}, {0x1e023, 0x1e024}, {0x1e026, 0x1e02a}, {0x1e08f, 0x1e08f},
    {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}, {0x1e944, 0x1e94a}
};

/* Format characters since Unicode 9: not removed. */
static const exi_range exi_late_format[] = {
    {0x890, 0x891}, {0x8e2, 0x8e2}, {0x110cd, 0x110cd}, {0x13430, 0x1343f}
};

/* Marks since Unicode 10: not moved by canonical ordering. */
static const exi_range exi_late_order[] = {
    {0x7fd, 0x7fd}, {0x898, 0x89f}, {0x8ca, 0x8d3}, {0x9fe, 0x9fe}, {0xc3c, 0xc3c}, {0xd3b, 0xd3c}, {0xeba, 0xeba},
    {0x1715, 0x1715}, {0x1abf, 0x1ace}, {0x1df6, 0x1dfa}, {0xa82c, 0xa82c}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac},
    {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47},
    {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1},
    {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}
};

/* Composites since Unicode 10: not decomposed. */
static const exi_range exi_late_composites[] = {
    {0x105c9, 0x105c9}, {0x105e4, 0x105e4}, {0x11383, 0x11383}, {0x11385, 0x11385}, {0x1138e, 0x1138e}, {0x11391, 0x11391},
    {0x113c5, 0x113c5}, {0x113c7, 0x113c8}, {0x11938, 0x11938}, {0x16121, 0x16128}, {0x16d68, 0x16d6a}
};

/* Letters of Unicode 15.1 and 16: letters although utf8proc 2.8 does not know them. */
static const exi_range exi_new_letters[] = {
    {0x1c89, 0x1c8a}, {0xa7cb, 0xa7cd}, {0xa7da, 0xa7dc}, {0x105c0, 0x105f3}, {0x10d4a, 0x10d65}, {0x10d6f, 0x10d85},
    {0x10ec2, 0x10ec4}, {0x11380, 0x11389}, {0x1138b, 0x1138b}, {0x1138e, 0x1138e}, {0x11390, 0x113b5}, {0x113b7, 0x113b7},
    {0x113d1, 0x113d1}, {0x113d3, 0x113d3}, {0x11bc0, 0x11be0}, {0x13460, 0x143fa}, {0x16100, 0x1611d}, {0x16d40, 0x16d6c},
    {0x18cff, 0x18cff}, {0x1e5d0, 0x1e5ed}, {0x1e5f0, 0x1e5f0}, {0x2ebf0, 0x2ee5d}
};

/* Numbers of Unicode 16. */
static const exi_range exi_new_numbers[] = {
    {0x10d40, 0x10d49}, {0x116d0, 0x116e3}, {0x11bf0, 0x11bf9}, {0x16130, 0x16139}, {0x16d70, 0x16d79}, {0x1ccf0, 0x1ccf9},
    {0x1e5f1, 0x1e5fa}
};

/* Marks of Unicode 16. */
static const exi_range exi_new_marks[] = {
    {0x897, 0x897}, {0x10d69, 0x10d6d}, {0x10efc, 0x10efc}, {0x113b8, 0x113c0}, {0x113c2, 0x113c2}, {0x113c5, 0x113c5},
    {0x113c7, 0x113ca}, {0x113cc, 0x113d0}, {0x113d2, 0x113d2}, {0x113e1, 0x113e2}, {0x11f5a, 0x11f5a}, {0x1611e, 0x1612f},
    {0x1e5ee, 0x1e5ef}
};

/* Capital letters of Unicode 16 and 17: code points first, first + step ... last change by `plus`. */
typedef struct exi_lower_rule { uint32_t first, last, step; int32_t plus; } exi_lower_rule;
static const exi_lower_rule exi_new_lower[] = {
    {0x1c89, 0x1c89, 1, 1}, {0xa7cb, 0xa7cb, 1, 0x264 - 0xa7cb}, {0xa7cc, 0xa7ce, 2, 1}, {0xa7d2, 0xa7d4, 2, 1},
    {0xa7da, 0xa7da, 1, 1}, {0xa7dc, 0xa7dc, 1, 0x19b - 0xa7dc}, {0x10d50, 0x10d65, 1, 32}, {0x16ea0, 0x16eb8, 1, 27}
};

/* Characters that continue a cluster and that utf8proc 2.8 does not know. */
static const exi_range exi_new_joiners[] = {
    {0x897, 0x897}, {0x1acf, 0x1add}, {0x1ae0, 0x1aeb}, {0x10d69, 0x10d6d}, {0x10efa, 0x10efc}, {0x113b8, 0x113c0},
    {0x113c2, 0x113c2}, {0x113c5, 0x113c5}, {0x113c7, 0x113ca}, {0x113cc, 0x113d0}, {0x113d2, 0x113d2}, {0x113e1, 0x113e2},
    {0x11b60, 0x11b67}, {0x11f5a, 0x11f5a}, {0x1611e, 0x1612f}, {0x1e5ee, 0x1e5ef}, {0x1e6e3, 0x1e6e3}, {0x1e6e6, 0x1e6e6},
    {0x1e6ee, 0x1e6ef}, {0x1e6f5, 0x1e6f5}
};

/* Indic consonants of at most three bytes, which a linker joins into one cluster. (Longer ones do not matter: see
   ex_grapheme.) */
static const exi_range exi_consonants[] = {
    {0x915, 0x939}, {0x958, 0x95f}, {0x978, 0x97f}, {0x995, 0x9a8}, {0x9aa, 0x9b0}, {0x9b2, 0x9b2}, {0x9b6, 0x9b9},
    {0x9dc, 0x9dd}, {0x9df, 0x9df}, {0x9f0, 0x9f1}, {0xa95, 0xaa8}, {0xaaa, 0xab0}, {0xab2, 0xab3}, {0xab5, 0xab9},
    {0xaf9, 0xaf9}, {0xb15, 0xb28}, {0xb2a, 0xb30}, {0xb32, 0xb33}, {0xb35, 0xb39}, {0xb5c, 0xb5d}, {0xb5f, 0xb5f},
    {0xb71, 0xb71}, {0xc15, 0xc28}, {0xc2a, 0xc39}, {0xc58, 0xc5a}, {0xd15, 0xd3a}, {0x1000, 0x102a}, {0x103f, 0x103f},
    {0x1050, 0x1055}, {0x105a, 0x105d}, {0x1061, 0x1061}, {0x1065, 0x1066}, {0x106e, 0x1070}, {0x1075, 0x1081},
    {0x108e, 0x108e}, {0x1780, 0x17b3}, {0x1a20, 0x1a54}, {0x1b0b, 0x1b0c}, {0x1b13, 0x1b33}, {0x1b45, 0x1b4c},
    {0x1b83, 0x1ba0}, {0x1bae, 0x1baf}, {0x1bbb, 0x1bbd}, {0xa989, 0xa98b}, {0xa98f, 0xa9b2}, {0xa9e0, 0xa9e4},
    {0xa9e7, 0xa9ef}, {0xa9fa, 0xa9fe}, {0xaa60, 0xaa6f}, {0xaa71, 0xaa73}, {0xaa7a, 0xaa7a}, {0xaa7e, 0xaa7f},
    {0xaae0, 0xaaea}, {0xabc0, 0xabda}
};

static const exi_range exi_linkers[] = {
    {0x94d, 0x94d}, {0x9cd, 0x9cd}, {0xacd, 0xacd}, {0xb4d, 0xb4d}, {0xc4d, 0xc4d}, {0xd4d, 0xd4d}, {0x1039, 0x1039},
    {0x17d2, 0x17d2}, {0x1a60, 0x1a60}, {0x1b44, 0x1b44}, {0x1bab, 0x1bab}, {0xa9c0, 0xa9c0}, {0xaaf6, 0xaaf6},
    {0x10a3f, 0x10a3f}, {0x11133, 0x11133}, {0x113d0, 0x113d0}, {0x1193e, 0x1193e}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99},
    {0x11f42, 0x11f42}
};

EX_API bool exi_in_ranges(const exi_range *ranges, size_t count, uint32_t code)
{
    size_t low = 0, high = count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (ranges[middle].last < code) low = middle + 1;
        else high = middle;
    }
    return low < count && ranges[low].first <= code;
}
#define EXI_IN(table, code) exi_in_ranges(table, sizeof(table) / sizeof(table[0]), code)

EX_API utf8proc_category_t exi_category(uint32_t code)
{
    return utf8proc_category((utf8proc_int32_t)code);
}

/* White_Space of Unicode, unchanged since version 6.3. */
EX_API bool ex_is_space(uint32_t code)
{
    if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
    return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
           code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

/* \p{L} and \p{N} */
EX_API bool ex_is_letter(uint32_t code)
{
    utf8proc_category_t category;
    if (code < 0x80) return (code | 32) >= 'a' && (code | 32) <= 'z';
    category = exi_category(code);
    return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO) ||
           (category == UTF8PROC_CATEGORY_CN && EXI_IN(exi_new_letters, code));
}

EX_API bool ex_is_number(uint32_t code)
{
    utf8proc_category_t category;
    if (code < 0x80) return code >= '0' && code <= '9';
    category = exi_category(code);
    return (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO) ||
           (category == UTF8PROC_CATEGORY_CN && EXI_IN(exi_new_numbers, code));
}

/* The same with the numbers of Unicode 17, by which single digits are split off. */
EX_API bool ex_is_numeric(uint32_t code)
{
    return ex_is_number(code) || (code >= 0x11de0 && code <= 0x11de9) || (code >= 0x16ff4 && code <= 0x16ff6);
}

/* \w: letters, marks, decimal digits, connectors, joiners, and what Unicode calls alphabetic besides. */
EX_API bool ex_is_word(uint32_t code)
{
    const utf8proc_category_t category = exi_category(code);
    if (code < 0x80) return ex_is_letter(code) || ex_is_number(code) || code == '_';
    if (category == UTF8PROC_CATEGORY_CN && (EXI_IN(exi_new_numbers, code) || EXI_IN(exi_new_marks, code))) return true;
    return ex_is_letter(code) || (category >= UTF8PROC_CATEGORY_MN && category <= UTF8PROC_CATEGORY_ME) ||
           category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_PC ||
           code == 0x200c || code == 0x200d || (code >= 0x24b6 && code <= 0x24e9) || (code >= 0x1f130 && code <= 0x1f149) ||
           (code >= 0x1f150 && code <= 0x1f169) || (code >= 0x1f170 && code <= 0x1f189);
}

/* BERT: what clean_text removes besides U+0000 and U+FFFD. */
EX_API bool ex_is_control(uint32_t code)
{
    utf8proc_category_t category;
    if (code < 0x80) return (code < 32 && code != '\t' && code != '\n' && code != '\r') || code == 127;
    category = exi_category(code);
    return category == UTF8PROC_CATEGORY_CC || category == UTF8PROC_CATEGORY_CO ||
           (category == UTF8PROC_CATEGORY_CF && !EXI_IN(exi_late_format, code));
}

/* BERT: every ASCII symbol counts as punctuation. */
EX_API bool ex_is_punctuation(uint32_t code)
{
    utf8proc_category_t category;
    if (code < 0x80) return code > 32 && code < 127 && !ex_is_letter(code) && !ex_is_number(code);
    if (code == 0x166d || code == 0x111c9) return true;    /* were punctuation in Unicode 8 */
    category = exi_category(code);
    return category >= UTF8PROC_CATEGORY_PC && category <= UTF8PROC_CATEGORY_PO && !EXI_IN(exi_late_punctuation, code);
}

/* BERT: the accents that strip_accents removes. */
EX_API bool ex_is_accent(uint32_t code)
{
    if (code < 0x300) return false;
    if (code == 0x1734) return true;                       /* was a nonspacing mark in Unicode 8 */
    return exi_category(code) == UTF8PROC_CATEGORY_MN && !EXI_IN(exi_late_marks, code);
}

/* BERT: "Chinese characters", each a word of its own. */
EX_API bool ex_is_cjk(uint32_t code)
{
    return (code >= 0x4e00 && code <= 0x9fff) || (code >= 0x3400 && code <= 0x4dbf) || (code >= 0x20000 && code <= 0x2a6df) ||
           (code >= 0x2a700 && code <= 0x2b73f) || (code >= 0x2b740 && code <= 0x2b81f) ||
           (code >= 0x2b920 && code <= 0x2ceaf) || (code >= 0xf900 && code <= 0xfaff) || (code >= 0x2f800 && code <= 0x2fa1f);
}

/* The small letter as one code point; U+0130 alone has two (i, U+0307), which is for the caller. */
EX_API uint32_t ex_lower(uint32_t code)
{
    uint32_t lower;
    if (code < 0x80) return code >= 'A' && code <= 'Z' ? code + 32 : code;
    lower = (uint32_t)utf8proc_tolower((utf8proc_int32_t)code);
    for (size_t i = 0; lower == code && i < sizeof(exi_new_lower) / sizeof(exi_new_lower[0]); i++) {
        const exi_lower_rule *rule = &exi_new_lower[i];
        if (code < rule->first || code > rule->last || (code - rule->first) % rule->step != 0) continue;
        return (uint32_t)((int32_t)code + rule->plus);
    }
    return lower;
}

/* Canonical combining class; 0 starts a new character. */
EX_API uint32_t ex_combining_class(uint32_t code)
{
    uint32_t order;
    if (code < 0x300) return 0;
    order = (uint32_t)utf8proc_get_property((utf8proc_int32_t)code)->combining_class;
    return order != 0 && EXI_IN(exi_late_order, code) ? 0 : order;
}

/* Full canonical decomposition into out[4]; returns how many. */
EX_API int ex_decompose(uint32_t code, uint32_t out[4])
{
    utf8proc_int32_t parts[4];
    int boundary = 0;
    utf8proc_ssize_t count;
    out[0] = code;
    if (code < 0xc0 || EXI_IN(exi_late_composites, code)) return 1;
    count = utf8proc_decompose_char((utf8proc_int32_t)code, parts, 4, UTF8PROC_DECOMPOSE, &boundary);
    if (count < 1 || count > 4) return 1;
    for (utf8proc_ssize_t i = 0; i < count; i++) out[i] = (uint32_t)parts[i];
    return (int)count;
}

/* The one character that two make by canonical composition; 0: they make none. */
EX_API uint32_t ex_compose(uint32_t first, uint32_t second)
{
    utf8proc_int32_t both[2];
    if (second < 0x300) return 0;
    both[0] = (utf8proc_int32_t)first;
    both[1] = (utf8proc_int32_t)second;
    if (utf8proc_normalize_utf32(both, 2, (utf8proc_option_t)(UTF8PROC_COMPOSE | UTF8PROC_STABLE)) != 1) return 0;
    return EXI_IN(exi_late_composites, (uint32_t)both[0]) ? 0 : (uint32_t)both[0];
}

/* ------------------------------------------------------------------------------------------------ clusters */

/* What a reader takes for one character: a letter with its accents, a flag, a family of emoji (Unicode Annex 29, extended
   grapheme clusters). Zero-initialise at the first character. It serves the character map, for which clusters of six bytes or
   more are all alike; so rules that could only tell such clusters apart need no tables here. */
typedef struct ex_grapheme {
    int before;                       /* class of the last character */
    bool started;
    bool odd_indicator;               /* the last character is the first half of a flag */
    int emoji;                        /* 1: a pictograph and what extends it; 2: and a joiner behind */
    int conjunct;                     /* 1: an Indic consonant and what extends it; 2: with a linker */
} ex_grapheme;

EX_API int exi_boundary_class(uint32_t code)
{
    if (code < 0x80) return code == '\r' ? UTF8PROC_BOUNDCLASS_CR : code == '\n' ? UTF8PROC_BOUNDCLASS_LF
                            : code < 32 || code == 127                            ? UTF8PROC_BOUNDCLASS_CONTROL
                                                                                  : UTF8PROC_BOUNDCLASS_OTHER;
    if (code == 0x2065 || (code >= 0xfff0 && code <= 0xfff8)) return UTF8PROC_BOUNDCLASS_CONTROL;
    if (code == 0x113d1) return UTF8PROC_BOUNDCLASS_PREPEND;
    if (code == 0x11a3a) return UTF8PROC_BOUNDCLASS_OTHER;
    if (EXI_IN(exi_new_joiners, code)) return UTF8PROC_BOUNDCLASS_EXTEND;
    return (int)utf8proc_get_property((utf8proc_int32_t)code)->boundclass;
}

EX_API bool exi_hangul_joins(int before, int after)
{
    if (before == UTF8PROC_BOUNDCLASS_L)
        return after == UTF8PROC_BOUNDCLASS_L || after == UTF8PROC_BOUNDCLASS_V || after == UTF8PROC_BOUNDCLASS_LV ||
               after == UTF8PROC_BOUNDCLASS_LVT;
    if (before == UTF8PROC_BOUNDCLASS_LV || before == UTF8PROC_BOUNDCLASS_V)
        return after == UTF8PROC_BOUNDCLASS_V || after == UTF8PROC_BOUNDCLASS_T;
    return (before == UTF8PROC_BOUNDCLASS_LVT || before == UTF8PROC_BOUNDCLASS_T) && after == UTF8PROC_BOUNDCLASS_T;
}

EX_API bool exi_stands_alone(int class)
{
    return class == UTF8PROC_BOUNDCLASS_CR || class == UTF8PROC_BOUNDCLASS_LF || class == UTF8PROC_BOUNDCLASS_CONTROL;
}

/* The rules GB3 to GB13 for what stands between the last character and this one. */
EX_API bool exi_grapheme_rule(const ex_grapheme *state, int class, uint32_t code)
{
    const int before = state->before;
    if (before == UTF8PROC_BOUNDCLASS_CR && class == UTF8PROC_BOUNDCLASS_LF) return true;
    if (exi_stands_alone(before) || exi_stands_alone(class)) return false;
    if (exi_hangul_joins(before, class)) return true;
    if (class == UTF8PROC_BOUNDCLASS_EXTEND || class == UTF8PROC_BOUNDCLASS_ZWJ || class == UTF8PROC_BOUNDCLASS_SPACINGMARK)
        return true;
    if (before == UTF8PROC_BOUNDCLASS_PREPEND) return true;
    if (state->conjunct == 2 && EXI_IN(exi_consonants, code)) return true;
    if (state->emoji == 2 && class == UTF8PROC_BOUNDCLASS_EXTENDED_PICTOGRAPHIC) return true;
    return class == UTF8PROC_BOUNDCLASS_REGIONAL_INDICATOR && state->odd_indicator;
}

/* Takes the next character; true when it belongs to the cluster of the one before. */
EX_API bool ex_grapheme_joins(ex_grapheme *state, uint32_t code)
{
    const int class = exi_boundary_class(code);
    const bool extends = class == UTF8PROC_BOUNDCLASS_EXTEND, zwj = class == UTF8PROC_BOUNDCLASS_ZWJ;
    const bool joins = state->started && exi_grapheme_rule(state, class, code);
    state->odd_indicator = class == UTF8PROC_BOUNDCLASS_REGIONAL_INDICATOR && !(joins && state->odd_indicator);
    if (class == UTF8PROC_BOUNDCLASS_EXTENDED_PICTOGRAPHIC) state->emoji = 1;
    else state->emoji = state->emoji == 1 && zwj ? 2 : state->emoji == 1 && extends ? 1 : 0;
    if (code >= 0x900 && EXI_IN(exi_consonants, code)) state->conjunct = 1;
    else if (state->conjunct > 0 && EXI_IN(exi_linkers, code)) state->conjunct = 2;
    else if (!(extends || zwj) || code == 0x200c) state->conjunct = 0;
    state->before = class;
    state->started = true;
    return joins;
}

#endif /* EX_UNICODE_H */
