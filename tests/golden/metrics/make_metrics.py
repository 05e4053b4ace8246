"""Writes text.jsonl beside this file: random texts with references, their ROUGE by rouge_score 0.1.2 and the corpus BLEU of all
rows up to each one by sacrebleu 2.6.0.

    python make_metrics.py

Each line: text, references, rouge (three times precision, recall, F: ROUGE-1, ROUGE-2, ROUGE-L), bleu.
"""
import json, os, random
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

KINDS = ["rouge1", "rouge2", "rougeL"]
WORDS = ("the The a cat sat on mat, mat. It's don't 3.5 1,000 well-known 10-20 -5 (yes) \"no\" &quot;q&quot; a&amp;b &lt;s&gt; "
         "Caf\u00e9 \u0130stanbul \u212aelvin stra\u00dfe x_y e-mail@x.org ... ?! $5 50% <skipped> Dr. U.S. \u201cq\u201d \u2014 1. .5 "
         "dog dogs ran quickly \u4e2d\u6587 tab\there line-\nbreak a\u00a0b s\u0085t").split(" ")
r = random.Random(3)


def text(words):
    kind = r.random()
    if kind < 0.1:
        return r.choice(["", " ", ".", "the", "!?"])
    return " ".join(words) + r.choice(["", "", ".", " \n", "-\n", "\u00a0"])


def near(words):
    out = [w for w in words if r.random() > 0.2]
    for _ in range(r.randint(0, 3)):
        out.insert(r.randint(0, len(out)), r.choice(WORDS))
    return out


scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=False)
rows, texts, references = [], [], []
for i in range(60):
    words = [r.choice(WORDS) for _ in range(r.randint(1, 14))]
    mine, refs = text(near(words)), [text(near(words)) for _ in range(r.randint(1, 4))]
    scores = scorer.score_multi(refs, mine)
    texts.append(mine)
    references.append(refs)
    most = max(len(x) for x in references)
    streams = [[x[k] if k < len(x) else None for x in references] for k in range(most)]
    rows.append({"text": mine, "references": refs, "rouge": [list(scores[k]) for k in KINDS],
                 "bleu": BLEU().corpus_score(texts, streams).score})
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "text.jsonl"), "w") as f:
    f.write("\n".join(json.dumps(x) for x in rows) + "\n")
