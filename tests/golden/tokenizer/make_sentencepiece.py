"""Writes tiny tokenizers of the kinds that T5, LLaMA, LLaMA 3 and llama2.c use, and their cases, beside this file. Ids and texts
are what Hugging Face tokenizers 0.23.3 gives; for llama2.c the algorithm of its run.c, written down again below.

    python make_sentencepiece.py TEXTFILE    TEXTFILE: any English text; the files here were made from fairy tales

Each line of a cases file: text, pair, ids, decoded (without special tokens), all (with them); without text: ids to decode only.
The texts are random: words, odd Unicode, spaces, added tokens. A larger number of such cases was compared when this was made.
"""
import base64, json, os, random, struct, sys, unicodedata
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

here = os.path.dirname(os.path.abspath(__file__))
lines = open(sys.argv[1], encoding="utf-8").read().splitlines()[:3000]
words = " ".join(lines).split()
META = "\u2581"


def charmap(pairs):
    """SentencePiece's precompiled map: bytes of a double array, the array, the texts. A node's children lie at base ^ byte."""
    trie, texts = {}, b""
    for key, value in pairs.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)
        texts += value.encode() + b"\0"
    units, used, bases, todo = {}, {0}, set(), [(0, 0, trie)]
    for at, label, node in todo:
        base = next(b for b in range(1, 1 << 20) if b not in bases and all(b ^ c not in used for c in node))
        bases.add(base)
        used |= {base ^ c for c in node}
        units[at] = label | (0 in node) << 8 | (at ^ base) << 10
        if 0 in node:
            units[base] = 1 << 31 | node[0]
        todo += [(base ^ c, c, child) for c, child in node.items() if c != 0]
    array = [units.get(i, 0) for i in range((max(units) | 255) + 1)]   # a search may look at any unit of a block
    return struct.pack("<I", 4 * len(array)) + struct.pack("<%dI" % len(array), *array) + texts


def mapped():
    """A few dozen characters of the usual map: compatibility forms, composites, spaces and controls."""
    pairs = {"\u200b": " ", "\u200d": " ", "\u0001": "", "\n": " ", "\t": " ", "\r": " ", "\r\n": "\n", "\u0301": "'"}
    for code in [0xa0, 0xaa, 0xbd, 0x958, 0x9dc, 0x1e9b, 0x2026, 0x2122, 0x2160, 0x2460, 0x3000, 0x3392, 0xfb01, 0xfdfa, 0xff21]:
        pairs[chr(code)] = unicodedata.normalize("NFKC", chr(code))
    for code in [0xc5, 0xe9, 0x1e69, 0xac01]:
        pairs[unicodedata.normalize("NFD", chr(code))] = chr(code)
    return pairs


def added(t):
    t.add_special_tokens([AddedToken("<extra_id_0>", special=True), AddedToken("<x>", lstrip=True, rstrip=True, special=True)])
    t.add_tokens([AddedToken("wolf", single_word=True), AddedToken("the king", rstrip=True), AddedToken("[y]", normalized=False)])


def ending(name, first):
    piece, sequence = {"SpecialToken": {"id": name, "type_id": 0}}, [{"Sequence": {"id": i, "type_id": 0}} for i in "AB"]
    one = [[piece, s] if first else [s, piece] for s in sequence]
    return {"type": "TemplateProcessing", "single": one[0], "pair": one[0] + one[1],
            "special_tokens": {name: {"id": name, "ids": [1], "tokens": [name]}}}


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator(lines, trainers.UnigramTrainer(vocab_size=260, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    added(t)
    j = json.loads(t.to_str())
    j["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charmap(mapped())).decode()},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": META}]}
    j["decoder"] = j["pre_tokenizer"]
    j["post_processor"] = ending("</s>", False)
    return j


def byte_fallback():
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    t.train_from_iterator(lines[:400], trainers.BpeTrainer(vocab_size=420, limit_alphabet=70,
                          special_tokens=["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)]))
    j = json.loads(t.to_str())
    j["model"]["byte_fallback"] = True
    j["added_tokens"] = j["added_tokens"][:3]
    t = Tokenizer.from_str(json.dumps(j))
    added(t)
    j = json.loads(t.to_str())
    j["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": META},
                       {"type": "Replace", "pattern": {"String": " "}, "content": META}]}
    j["pre_tokenizer"] = None
    j["decoder"] = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": META}, "content": " "},
                    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    j["post_processor"] = ending("<s>", True)
    return j


def metaspace(j):
    """The newer spelling of the same, with tokens missing: some characters are unknown, some bytes have no token."""
    j = json.loads(json.dumps(j))
    j["normalizer"] = {"type": "NFC"}
    j["pre_tokenizer"] = {"type": "Metaspace", "replacement": META, "prepend_scheme": "first", "split": True}
    gone = {"<0x%02X>" % b for b in (0xcc, 0xf0)}
    j["model"]["vocab"] = {"no " + k if k in gone else k: i for k, i in j["model"]["vocab"].items()}
    return j


def llama3():
    t = Tokenizer.from_file(os.path.join(here, "byte-bpe.json"))
    j = json.loads(t.to_str())
    j["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    j["model"]["ignore_merges"] = True
    j["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True,
                           "trim_offsets": False, "use_regex": True}, ending("<s>", True)]}
    j["post_processor"]["processors"][1]["special_tokens"]["<s>"]["ids"] = [0]
    return j


# ---------------------------------------------------------------------------------------------------------------- random texts

BLOCKS = [(0x20, 0x7e), (0xa0, 0x24f), (0x300, 0x36f), (0x370, 0x5ff), (0x900, 0xdff), (0x1100, 0x11ff), (0x1e00, 0x1fff),
          (0x2000, 0x218f), (0x2460, 0x27ff), (0x3000, 0x33ff), (0x4e00, 0x4eff), (0xac00, 0xad00), (0xfb00, 0xfdff),
          (0xff00, 0xffef), (0x1d400, 0x1d7ff), (0x1f1e6, 0x1f1ff), (0x1f300, 0x1faff), (0, 0x1f)]
ODD = [" ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000", META, META * 2, "\u0301", "\u0323", "\u094d\u0958\u0301", "\u017f",
       "'\u017f", "'S", "'ll", "DON'T", "\u200d", "\ufe0f", "\u0130", "12345", "e\u0301", "s\u0323\u0307", "A\u030a\u0301", "a\u0301"]


def part(r, j):
    kind = r.random()
    if kind < 0.4:
        return r.choice(words)
    if kind < 0.6:
        return r.choice(ODD)
    if kind < 0.7:
        return r.choice([a["content"] for a in j["added_tokens"]])
    if kind < 0.8:
        return r.choice(list(mapped()))
    first, last = r.choice(BLOCKS)
    return "".join(chr(r.randint(first, last)) for _ in range(r.randint(1, 4)))


def cases(j, t, count, seed):
    r, rows = random.Random(seed), []
    names = t.get_vocab()
    for i in range(count):
        text = "".join(part(r, j) + r.choice(["", "", " "]) for _ in range(r.randint(1, 9)))
        row = {"text": text} if i > 0 else {"text": ""}
        if i % 9 == 2:
            row["pair"] = part(r, j) + " " + part(r, j)
        row["ids"] = t.encode(row["text"], row.get("pair")).ids
        if i % 4 == 3:
            row = {"ids": [r.choice(list(names.values())) for _ in range(3)] +
                   [names[n] for n in ("<0x%02X>" % b for b in "\u00e9\u6f22\U0001f600".encode()[r.randint(0, 1):]) if n in names]}
        row["decoded"] = t.decode(row["ids"], skip_special_tokens=True)
        row["all"] = t.decode(row["ids"], skip_special_tokens=False)
        rows.append(row)
    return rows


def write(name, rows):
    with open(os.path.join(here, name + ".jsonl"), "w") as f:
        f.write("\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n")


# ---------------------------------------------------------------------------------------------------------------- llama2.c

def llama2c(j):
    """Tokens of the byte fallback tokenizer with the scores that SentencePiece would give them; some are equal on purpose."""
    tokens = sorted(((k, i) for k, i in j["model"]["vocab"].items() if i < 420), key=lambda x: x[1])
    tokens = [(k.replace(META, " ") if i > 2 else ["<unk>", "\n<s>\n", "\n</s>\n"][i], 0.0 if i < 259 else -float((i - 259) // 3))
              for k, i in tokens]
    longest = max(len(k.encode()) for k, _ in tokens)
    with open(os.path.join(here, "llama2c.bin"), "wb") as f:
        f.write(struct.pack("<i", longest))
        for k, score in tokens:
            f.write(struct.pack("<fi", score, len(k.encode())) + k.encode())
    return tokens


def run_c_encode(tokens, text):
    ids = {k: i for i, (k, _) in enumerate(tokens)}
    out = [1]
    if text:
        out.append(ids[" "])
    for c in text:
        out += [ids[c]] if c in ids else [b + 3 for b in c.encode()]
    while True:
        best, at = -1e10, -1
        for i in range(1, len(out) - 1):                   # the begin token never makes a longer one
            product = tokens[out[i]][0] + tokens[out[i + 1]][0]
            if product in ids and tokens[ids[product]][1] > best:
                best, at = tokens[ids[product]][1], i
        if at < 0:
            return out
        out[at:at + 2] = [ids[tokens[out[at]][0] + tokens[out[at + 1]][0]]]


def run_c_decode(tokens, ids):
    out = b""
    for before, i in zip(ids, ids[1:]):
        piece = tokens[i][0].encode()
        if before == 1 and piece.startswith(b" "):
            piece = piece[1:]
        out += bytes([i - 3]) if 3 <= i < 259 else piece
    return out.decode()


def llama2c_cases(j, count):
    tokens, r, rows = llama2c(j), random.Random(5), []
    for i in range(count):
        text = "".join(part(r, j).replace("\0", "") + r.choice(["", " "]) for _ in range(r.randint(0, 9)))
        ids = run_c_encode(tokens, text)
        rows.append({"text": text, "ids": ids, "decoded": run_c_decode(tokens, ids)})
    return rows


for name, j in (("unigram", unigram()), ("byte-fallback", byte_fallback()), ("metaspace", None), ("llama3", llama3())):
    if name == "metaspace":
        j = metaspace(fallback)
    if name == "byte-fallback":
        fallback = j
        write("llama2c", llama2c_cases(j, 60))
    with open(os.path.join(here, name + ".json"), "w") as f:
        json.dump(j, f, separators=(",", ":"), ensure_ascii=False)
    t = Tokenizer.from_str(json.dumps(j))
    write(name, cases(j, t, 100, 7))
