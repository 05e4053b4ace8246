"""Writes the tiny tokenizers and their cases beside this file, by Hugging Face tokenizers 0.23.3.

    python make_tokenizer.py TEXTFILE        TEXTFILE: any English text; the files here were made from fairy tales

Each line of a cases file: text, pair, max (length), trunc (0 longest first, 1 only first, 2 only second), stride (with windows),
ids of each window, types, offsets in bytes (start, end, start, end ...; of the first window), decoded (without special tokens).
"""
import json, os, random, sys
from tokenizers import Tokenizer, AddedToken, models, normalizers, pre_tokenizers, processors, decoders, trainers

here = os.path.dirname(os.path.abspath(__file__))
lines = open(sys.argv[1], encoding="utf-8").read().splitlines()[:3000]


def wordpiece():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=260, limit_alphabet=60, min_frequency=2,
                          special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    t.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    t.add_tokens([AddedToken("Grimm", single_word=True), AddedToken("<e>", rstrip=True, normalized=False)])
    ids = {x: t.token_to_id(x) for x in ("[CLS]", "[SEP]")}
    t.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                     special_tokens=list(ids.items()))
    return t


def byte_bpe():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=380, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return t


TEXTS = [
    "", " ", "The wolf said: I'll blow, don't you'd've?  ", "Once upon a time, the king's daughter...", "it's 3.5% of $1,000!!",
    "Caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul STRASSE stra\u00dfe", "e\u0301 a\u0308\u0323 q\u0323\u0307 \u1e9b\u0323 \ufb01",
    "\u6771\u4eac\u306b\u884c\u304f \u6c49\u5b57abc\u4e2d", "\ud55c\uad6d\uc5b4 \uac01", "\u0645\u064f\u062d\u064e\u0645\u0651\u062f \u05d0\u05b8\u05d1",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh", "tab\there\nnew\r\nline \x00\x01\x7f\ufffd end", "\u00bd \u00b2 \u2163 \u0663 \u096a x\u00b2",
    "[MASK] and  [MASK]x [CLS] [SEP] [UNK] [mask] <mask> the <mask>,<s></s><pad>", "Grimm grimm grimms xGrimm Grimm! GRIMM-Grimm",
    "<e> then <e>   spaces <e>", "a.b,c;d:e!f?g(h)i\"j'k\u2019l\u201cm\u201d\u2014n\u2026o", "x" * 101, "ab " * 9,
    "\u061d\u1c89\ua7cb\u166d\u1734\u0897", "_under_score_ C++ e-mail@x.org #1 don't DON'T 'S 's  's",
]
PAIRS = [("Who?", "The wolf said it."), ("", ""), ("a", ""), ("[MASK]", "Grimm and <mask>")]
LONG = " ".join(lines[40:46])[:190]


def offsets(text, pair, e):
    out = []
    for (a, b), s in zip(e.offsets, e.sequence_ids):
        of = pair if s == 1 else text
        out += [len(of[:a].encode()), len(of[:b].encode())]
    return out


def case(t, text, pair=None, **k):
    row = {"text": text}
    if pair is not None:
        row["pair"] = pair
    row.update(k)
    t.no_truncation()
    if "max" in k:
        t.enable_truncation(k["max"], stride=k.get("stride", 0), strategy=["longest_first", "only_first", "only_second"][k["trunc"]])
    e = t.encode(text, pair)
    windows = [e] + (e.overflowing if "stride" in k else [])
    row["ids"] = [w.ids for w in windows]
    if pair is not None:
        row["types"] = e.type_ids
    row["offsets"] = offsets(text, pair, e)
    row["decoded"] = t.decode(e.ids, skip_special_tokens=True)
    t.no_truncation()
    return row


def write(name, t):
    t.save(os.path.join(here, name + ".json"), pretty=False)
    rows = [case(t, x) for x in TEXTS] + [case(t, a, b) for a, b in PAIRS]
    for trunc, text, pair in [(0, LONG, None), (0, LONG, LONG[:90]), (0, LONG[:30], LONG), (1, LONG, "short"), (2, "short", LONG)]:
        rows.append(case(t, text, pair, max=21, trunc=trunc))
    rows.append(case(t, LONG, None, max=30, trunc=1, stride=10))
    rows.append(case(t, "Who said it?", LONG, max=40, trunc=2, stride=8))
    with open(os.path.join(here, name + ".jsonl"), "w") as f:
        f.write("\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n")


write("wordpiece", wordpiece())
write("byte-bpe", byte_bpe())
