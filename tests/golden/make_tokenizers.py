"""Writes the tokenizer.json of the golden Qwen2 and LLaMA 3 folders beside this script, by Hugging Face tokenizers 0.23.3.

    python make_tokenizers.py                writes qwen2/tokenizer.json and llama3-rope/tokenizer.json
    python make_tokenizers.py --check        fails unless the files are what it would write, byte by byte

They are byte-level BPE as those families ship it (splitting rule, specials, what stands around a text), with a vocabulary so small
that its ids fit the golden models: the few bytes of plain English in lower case, and six merges. Id 2 ends a text, as in
config.json. tests/test_examples.sh writes texts with them. Merges are spelled as the published files of both families have them,
"t h" where a newer library writes ["t","h"]; newer files are read in tests/test_tokenizer.c.
"""
import json
import os
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = os.path.dirname(os.path.abspath(__file__))
BEGIN, END, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"
MERGES = [("t", "h"), ("\u0120", "th"), ("\u0120th", "e"), ("e", "r"), ("\u0120", "w"), ("i", "n")]     # \u0120: a space
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def bytes_of_text():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


def byte_level(first, digits, **model):
    """Ids 0 to 2 are `first`, then some bytes, then the merged pieces; numbers are split as `digits` says."""
    pieces = first + ["\u0120", ".", ",", "\u010a"] + list("abcdefghijklmnopqrstuvwxyz") + [a + b for a, b in MERGES]
    t = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGES, **model))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT % digits), "isolated"), bytes_of_text()])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in first if piece.startswith("<|")])
    return t


def qwen2():
    t = byte_level(["!", "?", END_OF_TEXT], "", continuing_subword_prefix="", end_of_word_suffix="")
    t.normalizer = normalizers.NFC()
    t.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return t


def llama3():
    t = byte_level(["!", BEGIN, END], "{1,3}", ignore_merges=True)
    t.post_processor = processors.Sequence([
        processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 1)])])
    return t


def published(tokenizer):
    """The text of the file as both families have it: merges in one string, and the options of the decoder, which does not look
    at them and in this library has none, like those of the splitter."""
    file = json.loads(tokenizer.to_str())
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    file["decoder"] = file["pre_tokenizer"]["pretokenizers"][1]
    return json.dumps(file, ensure_ascii=False, separators=(",", ":")) + "\n"


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit("usage: make_tokenizers.py [--check]")
    for folder, tokenizer in (("qwen2", qwen2()), ("llama3-rope", llama3())):
        path, text = os.path.join(HERE, folder, "tokenizer.json"), published(tokenizer)
        if not sys.argv[1:]:
            with open(path, "w", encoding="utf-8", newline="\n") as f:
                f.write(text)
        elif open(path, encoding="utf-8", newline="").read() != text:
            raise SystemExit(f"{path} is another")


if __name__ == "__main__":
    main()
