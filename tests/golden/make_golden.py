"""Makes golden cases: a tiny random checkpoint as transformers saves it, and golden.safetensors with what it computes.

    python make_golden.py CASE...             writes the folders CASE beside this script (names: the table CASES below)
    python make_golden.py --head DIR...       writes head.safetensors into folders that hold a case
    python make_golden.py --check DIR...      computes golden.safetensors and head.safetensors of DIR again from the checkpoint,
                                              inputs and adapters, compares every tensor, and fails unless all agree to float32
                                              rounding

Versions: Python 3.11, torch 2.9.1, transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6. Other versions may draw other
numbers or save another config.json; --check of the stored cases should hold with any that know the model.
tokenizer.json, where a case has one, is by make_tokenizers.py.

A new case is an entry of CASES: a config, the lengths of its rows (for T5 of both sides), where to begin the search for a seed
whose continuations are clear (1; then the seed that was found, to save the time), and the spellings of its config_old.json.
Give every bias and norm a random value by a rule in scale_of, keep the folder below 400 KB, run the script, run --check, and
name the case in tests/test_model.c. An unknown family also wants its projections in UP and DOWN.

What is in golden.safetensors (float32, computed in float64; integers as int32):
    input_ids attention_mask labels ...       padded rows; a mask of 0 or a label of -100 is no real position
    dense.* grad.NAME                         loss, logits, hidden states and every gradient of the checkpoint itself
    lora_A.NAME lora_B.NAME                   adapters y += 2 B A x on query, value and FFN up projection
    lora.* grad.lora_*                        the same with adapters; adapter_importance.NAME = sum of |B * dL/dB|
    sum_abs_act.NAME sum_abs_grad.NAME        at what enters an output or down projection, over real positions, adapters on
    salience_per_* kurtosis_per_*             of it per feature and per query head: products of those sums; the excess
                                              kurtosis of weight column * mean activation (projection and kurtosis below)
    generate.prompt                           two prompts (T5: encoder inputs), each continued on its own
    generate.greedy generate.beam3            20 new tokens; three beams, length penalty 1
    generate.stop generate.beam3_stop         the same beams when the token `stop` ends a text (it is included; -1 follows)
Every choice in these continuations is clear by more than MARGIN, so that float32 must make the same ones.

What is in head.safetensors: the case with its adapters and one more on the LM head, logits += 2 B A x where x enters the head:
    lora_A.lm_head lora_B.lm_head             that adapter; a tied head's word embeddings know nothing of it
    loss logits grad.lora_* adapter_importance.NAME     with all adapters on
"""
import contextlib
import copy
import json
import os
import sys

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, LlamaConfig, Qwen2Config, T5Config

RANK, SCALE = 4, 2.0
NEW_TOKENS, BEAMS, MARGIN = 20, 3, 1e-3
FIRST_WORD = 3                                     # the ids below are padding, start, and end
ROUNDING = 2.0 ** -23                              # of a tensor's largest value: both sides are rounded to float32 once
UP = ("query", "value", "q", "v", "q_proj", "v_proj", "up_proj", "wi", "wi_0", "intermediate.dense")
DOWN = ("o", "wo", "o_proj", "down_proj", "output.dense")
OUTPUT = ("Attention.o", "self_attn.o_proj", "attention.output.dense")       # those of DOWN that gather heads

CASES = {
    # Biases on q, k, v; two query heads share a KV head; the head is a matrix of its own.
    "qwen2": dict(
        config=Qwen2Config(vocab_size=89, hidden_size=32, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                           rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False),
        seed=41, lengths=(13, 9, 6),
        old={"sliding_window": 64, "transformers_version": "4.40.1"}),      # a window that use_sliding_window turns off
    # Wavelengths 6.3 (kept), 13 and 28 (interpolated), 60 and more (divided by the factor), and a row that is longer than the
    # original context. The heads together are twice as wide as the hidden state.
    "llama3-rope": dict(
        config=LlamaConfig(vocab_size=71, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
                           rope_parameters={"rope_type": "llama3", "rope_theta": 400.0, "factor": 8.0, "low_freq_factor": 1.0,
                                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
                           tie_word_embeddings=True),
        seed=13, lengths=(36, 23),
        old={"transformers_version": "4.43.0"}),
    # Gated FFN, more decoder than encoder layers, a head of its own and no output scaling (T5 v1.1, Flan). As transformers 5
    # saves such a model, config.json says tie_word_embeddings true, and only lm_head.weight in the file tells that it is not;
    # published files say false, as config_old.json does. Distances reach the last bucket (32 and more) and the border of 16
    # (decoder), where the bucket is a whole number before it is rounded down.
    "t5-small-case": dict(
        config=T5Config(vocab_size=67, d_model=20, d_kv=8, d_ff=36, num_layers=2, num_decoder_layers=3, num_heads=3,
                        relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
                        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False),
        seed=390, lengths=(37, 22), label_lengths=(19, 12),
        old={"tie_word_embeddings": False, "transformers_version": "4.23.1"}),
}


# ---- the model, in double throughout ----

@contextlib.contextmanager
def in_double():
    """The models ask for float32 by name in norms, softmax, rotary tables and losses, whatever type the weights have. Here
    that name means float64, so that nothing between the weights and the result is rounded to float32."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept


def load_model(folder, exact=True):
    name = AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model = model.double().eval()
    with in_double():
        for module in list(model.modules()) if exact else []:
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.__init__(module.config)                  # frequencies in float64
    return model


def modules_of(model, kinds):
    return {name: m for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and any(name.endswith("." + kind) for kind in kinds)}


# ---- what a case holds ----

def model_inputs(gold):
    names = ("input_ids", "attention_mask", "token_type_ids", "labels", "start_positions", "end_positions")
    return {k: torch.tensor(gold[k]).double() if gold[k].dtype.kind == "f" else torch.tensor(gold[k]).long()
            for k in names if k in gold}


def forward(model, gold, part, out):
    """Runs the model, writes loss, logits and hidden states under `part` into out, and fills the gradients."""
    model.zero_grad()
    got = model(**model_inputs(gold), output_hidden_states=True)
    out[part + "loss"] = got.loss.reshape(1)
    for name in ("logits", "start_logits", "end_logits"):
        if name in got:
            out[part + name] = got[name]
    stacks = {"hidden": "hidden_states"} if "hidden_states" in got else {
        "hidden": "encoder_hidden_states", "decoder_hidden": "decoder_hidden_states"}
    for name, key in stacks.items():
        for i, h in enumerate(got[key]):
            out[f"{part}{name}.{i}"] = h
    got.loss.backward()


def real_positions(name, gold):
    """Where a hidden state or logit counts, as a mask over (row, position)."""
    return gold["labels"] != -100 if "decoder" in name else gold["attention_mask"] > 0


def kurtosis(x):
    """Excess kurtosis of each row with the unbiased deviation, 0 for constant rows."""
    d = x - x.mean(1, keepdims=True)
    m2, m4 = (d ** 2).sum(1), (d ** 4).sum(1)
    n = x.shape[1]
    return np.where(m2 > 0, m4 / n / np.where(m2 > 0, m2 / (n - 1), 1.0) ** 2 - 3.0, 0.0)


def projection(name, weight, act, grad, heads, out):
    """The sums, salience and kurtosis of one output or down projection. act, grad: (real positions, features)."""
    sum_act, sum_grad = np.abs(act).sum(0), np.abs(grad).sum(0)
    out["sum_abs_act." + name], out["sum_abs_grad." + name] = sum_act, sum_grad
    out["salience_per_feature." + name] = sum_act * sum_grad
    values = (weight * act.mean(0)).T                     # (features, output); the factor cancels unless a neuron never fires
    out["kurtosis_per_feature." + name] = kurtosis(values)
    if name.endswith(OUTPUT):
        out["salience_per_head." + name] = (sum_act * sum_grad).reshape(heads, -1).sum(1)
        out["kurtosis_per_head." + name] = kurtosis(values.reshape(heads, -1))


def adapt(model, gold, hooks):
    """Puts the adapters of the case on the model. Returns {name: (A, B)}."""
    adapters = {}
    for name, module in modules_of(model, UP).items():
        a, b = (torch.tensor(gold[f"lora_{x}.{name}"]).double().requires_grad_() for x in "AB")
        hooks.append(module.register_forward_hook(lambda m, x, y, a=a, b=b: y + SCALE * (x[0] @ a.T) @ b.T))
        adapters[name] = a, b
    return adapters


def probe(model, hooks):
    """Keeps what enters each output and down projection, and its gradient. Returns {name: tensor}, filled by a forward."""
    seen = {}
    for name, module in modules_of(model, DOWN).items():
        def keep(m, x, name=name):
            x[0].retain_grad()
            seen[name] = x[0]
        hooks.append(module.register_forward_pre_hook(keep))
    return seen


def compute(model, gold):
    """Everything of a case except its inputs and adapters, which are taken from gold."""
    out, hooks = {}, []
    with in_double():
        forward(model, gold, "dense.", out)
        out.update({"grad." + n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        adapters, seen = adapt(model, gold, hooks), probe(model, hooks)
        out = {k: v.detach().numpy().copy() for k, v in out.items()}
        adapted = {}
        forward(model, gold, "lora.", adapted)
    out.update({k: v.detach().numpy() for k, v in adapted.items()})
    for name, (a, b) in adapters.items():
        out["grad.lora_A." + name], out["grad.lora_B." + name] = a.grad.numpy(), b.grad.numpy()
        out["adapter_importance." + name] = np.abs((b * b.grad).detach().numpy()).sum().reshape(1)
    for name, x in seen.items():
        real = real_positions(name, gold)
        weight = model.get_submodule(name).weight.detach().numpy()
        projection(name, weight, x.detach().numpy()[real], x.grad.numpy()[real], model.config.num_attention_heads, out)
    for hook in hooks:
        hook.remove()
    return out


def compute_head(model, gold, head):
    """What head.safetensors holds besides its adapter. Always in double throughout, whatever the case was computed in."""
    out, hooks = {}, []
    with in_double():
        adapters = adapt(model, gold, hooks)
        a, b = (torch.tensor(head[f"lora_{x}.lm_head"]).double().requires_grad_() for x in "AB")
        hooks.append(model.lm_head.register_forward_hook(lambda m, x, y: y + SCALE * (x[0] @ a.T) @ b.T))
        adapters["lm_head"] = a, b
        forward(model, gold, "", out)
    for hook in hooks:
        hook.remove()
    out = {k: out[k].detach().numpy() for k in ("loss", "logits")}
    for name, (a, b) in adapters.items():
        out["grad.lora_A." + name], out["grad.lora_B." + name] = a.grad.numpy(), b.grad.numpy()
        out["adapter_importance." + name] = np.abs((b * b.grad).detach().numpy()).sum().reshape(1)
    return out


def head_file(folder):
    return os.path.join(folder, "head.safetensors")


def make_head(folder):
    gold, model, rng = load_file(os.path.join(folder, "golden.safetensors")), load_model(folder), np.random.default_rng(1)
    head = {"lora_A.lm_head": (0.2 * rng.standard_normal((RANK, model.lm_head.in_features))).astype(np.float32),
            "lora_B.lm_head": (0.2 * rng.standard_normal((model.lm_head.out_features, RANK))).astype(np.float32)}
    head.update({k: v.astype(np.float32) for k, v in compute_head(model, gold, head).items()})
    save_file({k: np.ascontiguousarray(v) for k, v in head.items()}, head_file(folder),
              metadata={"made": f"torch {torch.__version__}, transformers {transformers.__version__}"})
    print(f"{head_file(folder)}: {len(head)} tensors, {os.path.getsize(head_file(folder))} bytes")


# ---- continuations ----

def next_logs(model, prompt, texts):
    """Log probabilities of the token after each of `texts` (continuations of one prompt), in float64, without a cache."""
    rows = torch.tensor(texts, dtype=torch.long).reshape(len(texts), -1)
    prompts = torch.tensor(prompt, dtype=torch.long).expand(len(texts), -1)
    with torch.no_grad(), in_double():
        if model.config.is_encoder_decoder:
            start = torch.full((len(texts), 1), model.config.decoder_start_token_id)
            logits = model(input_ids=prompts, decoder_input_ids=torch.cat([start, rows], 1), use_cache=False).logits
        else:
            logits = model(input_ids=torch.cat([prompts, rows], 1), use_cache=False).logits
    return torch.log_softmax(logits[:, -1], -1).numpy()


def beam_search(model, prompt, beams, stop):
    """A plain beam search with length penalty 1 after the rules of transformers: of the 2 * beams best candidates, those among
    the first `beams` that end are finished texts and the first `beams` that do not end go on; it is over at NEW_TOKENS, or when
    `beams` texts are finished and the best open one, at its present length, is not better than the worst of them.
    Returns the best text and the smallest gap between any two scores whose order was asked for."""
    open_texts, finished, margin = [(0.0, [])], [], np.inf
    for length in range(1, NEW_TOKENS + 1):
        logs = next_logs(model, prompt, [text for _, text in open_texts])
        all_scores = np.array([s for s, _ in open_texts])[:, None] + logs
        best = np.argsort(-all_scores, axis=None)[:2 * beams + 1]
        scores = all_scores.flat[best]
        margin = min(margin, np.min(-np.diff(scores)))
        grown = [(s, open_texts[i // logs.shape[1]][1] + [int(i % logs.shape[1])]) for s, i in zip(scores[:-1], best[:-1])]
        ends = [text[-1] == stop or length == NEW_TOKENS for _, text in grown]
        finished += [(s / length, text) for (s, text), end in zip(grown[:beams], ends) if end]
        finished = sorted(finished, key=lambda x: -x[0])[:beams + 1]
        margin = min([margin] + [a[0] - b[0] for a, b in zip(finished, finished[1:])])
        finished = finished[:beams]
        open_texts = [g for g, end in zip(grown, ends) if not end][:beams]
        if len(finished) == beams and open_texts:
            gap = open_texts[0][0] / length - finished[-1][0]
            margin = min(margin, abs(gap))
            if gap <= 0:
                break
        if not open_texts:
            break
    return finished[0][1], margin


def generate(model, prompt, beams, stop):
    """The same by the generate method of transformers. With its cache, which for T5 has as many layers as the encoder and so
    fails on a deeper decoder."""
    ids = torch.tensor(prompt, dtype=torch.long).reshape(1, -1)
    with torch.no_grad(), in_double():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, num_beams=beams,
                              do_sample=False, length_penalty=1.0, early_stopping=False, eos_token_id=stop, pad_token_id=0,
                              use_cache=not model.config.is_encoder_decoder)[0].tolist()
    return text[1 if model.config.is_encoder_decoder else len(prompt):]


def continuations(model, prompts, stop):
    """The generate.* tensors, with the smallest margin behind any of them (plain search and generate must agree)."""
    out, margin = {"generate.prompt": prompts, "generate.stop": np.array([stop], np.int32)}, np.inf
    for key, beams, end in (("greedy", 1, model.config.eos_token_id), ("beam3", BEAMS, model.config.eos_token_id),
                            ("beam3_stop", BEAMS, stop)):
        texts = np.full((len(prompts), NEW_TOKENS), -1, np.int32)
        for row, prompt in enumerate(prompts.tolist()):
            text, gap = beam_search(model, prompt, beams, end)
            if gap > MARGIN and text != generate(model, prompt, beams, end):
                raise SystemExit(f"{key} {row}: the plain search and generate disagree")
            texts[row, :len(text)] = text
            margin = min(margin, gap)
        out["generate." + key] = texts
    return out, margin


def find_stop(model, prompts):
    """A token that ends the best of the first text's beams early but not at once; None if there is none."""
    text, _ = beam_search(model, prompts[0].tolist(), BEAMS, -1)
    for stop in sorted(set(text)):
        text, gap = beam_search(model, prompts[0].tolist(), BEAMS, stop)
        if 5 <= len(text) < NEW_TOKENS and gap > MARGIN:
            return stop
    return None


# ---- making a case ----

def scale_of(name, p, config):
    """Mean and deviation of a random parameter: no bias or norm is trivial, and activations stay near 1."""
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.3
    if "embed_tokens" in name or "shared" in name or "relative_attention_bias" in name:
        return 0.0, 0.5
    if name.endswith("Attention.q.weight"):                 # T5 does not divide scores by the root of the head size
        return 0.0, 1.3 / (p.shape[1] * config.d_kv) ** 0.5
    return 0.0, 1.3 / p.shape[1] ** 0.5


def random_model(case, seed):
    transformers.set_seed(seed)
    model = getattr(transformers, {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM",
                                   "t5": "T5ForConditionalGeneration"}[case["config"].model_type])(case["config"])
    if model.config.model_type == "t5" and not model.config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())    # the library ties whatever it is told
    for name, p in model.named_parameters():
        mean, deviation = scale_of(name, p, model.config)
        p.data = mean + deviation * torch.randn(p.shape)
    return model.eval()


def save_model(model, folder):
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({n: p.detach().numpy() for n, p in model.named_parameters()}, os.path.join(folder, "model.safetensors"),
              metadata={"format": "pt"})


def save_old_config(folder, changes):
    """config_old.json: the spellings that files have which were saved before transformers 5. Must mean the same."""
    with open(os.path.join(folder, "config.json")) as f:
        c = json.load(f)
    new = copy.deepcopy(c)
    c["torch_dtype"] = c.pop("dtype")
    rope = c.pop("rope_parameters", None)
    if rope is not None:
        c["rope_theta"] = rope.pop("rope_theta")
        c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    for name in ("scale_decoder_outputs", "layer_types"):
        c.pop(name, None)
    c.update(changes)
    path = os.path.join(folder, "config_old.json")
    with open(path, "w") as f:
        f.write(json.dumps(c, indent=2, sort_keys=True) + "\n")
    read, want = (type(AutoConfig.for_model(c["model_type"])).from_dict(x).to_dict() for x in (c, new))
    differ = [k for k in want if read.get(k) != want[k] and k not in ("transformers_version", "torch_dtype")]
    if differ:
        raise SystemExit(f"{path}: {differ} do not mean what config.json says")


def random_inputs(case, rng):
    """Random rows, padded at their end; a decoder-only model is not trained on the first two tokens of a row."""
    lengths, vocab = case["lengths"], case["config"].vocab_size

    def rows(lengths, fill):
        x = np.full((len(lengths), max(lengths)), fill, np.int32)
        for row, n in zip(x, lengths):
            row[:n] = rng.integers(FIRST_WORD, vocab, n)
        return x
    ids = rows(lengths, 0)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    if "label_lengths" in case:
        return {"input_ids": ids, "attention_mask": mask, "labels": rows(case["label_lengths"], -100)}
    labels = np.where(mask > 0, ids, -100).astype(np.int32)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def random_adapters(model, rng):
    out = {}
    for name, m in modules_of(model, UP).items():
        out["lora_A." + name] = (0.2 * rng.standard_normal((RANK, m.in_features))).astype(np.float32)
        out["lora_B." + name] = (0.2 * rng.standard_normal((m.out_features, RANK))).astype(np.float32)
    return out


def clear_continuations(model, case, rng):
    """Continuations in which every choice is clear, all 20 tokens are words (no padding, start or end), and the greedy texts do
    not just repeat one. None with other weights."""
    prompts = rng.integers(FIRST_WORD, case["config"].vocab_size, (2, 7)).astype(np.int32)
    for prompt in prompts.tolist():
        text, _ = beam_search(model, prompt, 1, -1)
        if len(set(text)) < 8 or min(text) < FIRST_WORD:
            return None
    stop = find_stop(model, prompts)
    out, margin = continuations(model, prompts, stop) if stop is not None else (None, 0.0)
    return (out, margin) if margin > MARGIN and out["generate.beam3"].min() >= FIRST_WORD else None


def make(name):
    case, folder = CASES[name], os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    os.makedirs(folder, exist_ok=True)
    for seed in range(case["seed"], case["seed"] + 1000):
        save_model(random_model(case, seed), folder)
        model, rng = load_model(folder), np.random.default_rng(seed)
        found = clear_continuations(model, case, rng)
        if found is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear continuations")
    save_old_config(folder, case["old"])
    gold = {**random_inputs(case, rng), **random_adapters(model, rng), **found[0]}
    gold.update({k: v.astype(np.float32) for k, v in compute(model, gold).items()})
    save_file({k: np.ascontiguousarray(v) for k, v in gold.items()}, os.path.join(folder, "golden.safetensors"),
              metadata={"made": f"seed {seed}, torch {torch.__version__}, transformers {transformers.__version__}"})
    size = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))
    print(f"{name}: seed {seed}, smallest margin of a choice {found[1]:.1e}, {len(gold)} tensors, {size} bytes")


# ---- checking a case ----

def error_of(name, got, want, gold):
    """Largest difference at real positions, by the largest value there. A gradient that vanishes in truth (a shift of all keys
    changes no softmax) is measured by the largest gradient of all."""
    if want.dtype.kind == "i":
        return 0.0 if np.array_equal(got, want) else np.inf
    stem = name.split(".", 1)[-1]
    if want.shape[:2] == gold["attention_mask"].shape and stem.startswith(("hidden.", "logits", "start_", "end_")):
        real = gold["attention_mask"] > 0
    elif want.ndim == 3:
        real = gold["labels"] != -100                           # the decoder side of T5
    else:
        real = np.ones(want.shape, bool)
    floor = 1e-6 * max(np.abs(v).max() for k, v in gold.items() if k.startswith("grad.")) if name.startswith("grad.") else 0.0
    return np.abs(got - want)[real].max() / max(np.abs(want[real]).max(), floor, 1e-30)


def shaken(gold, rng):
    """The case with adapters that differ by what storing them as float32 may have changed."""
    return {k: v * (1.0 + 2.0 ** -24 * rng.uniform(-1, 1, v.shape)) if k.startswith("lora_") else v for k, v in gold.items()}


def compute_as_before(model, gold):
    """The first cases (their files name no versions) were computed without in_double, with adapters that were rounded only when
    they were stored, and with a kurtosis of 0 / 0 - 3 for neurons that never fire, where the definition says 0. Returns what
    the stored adapters give, and how far each tensor may be off: 8 times what shaking the adapters changes."""
    global in_double
    exact, in_double = in_double, contextlib.nullcontext
    got, rng = compute(model, gold), np.random.default_rng(1)
    moved = [compute(model, shaken(gold, rng)) for _ in range(4)]
    in_double = exact
    for k in [k for k in got if k.startswith("kurtosis_per_feature.")]:
        got[k] = np.where(gold[k.replace("kurtosis_per_feature.", "sum_abs_act.")] > 0, got[k], -3.0)
    slack = {k: 0.0 if k.startswith("kurtosis_per_feature.") else 8 * max(error_of(k, m[k], got[k], gold) for m in moved)
             for k in got}
    return got, slack


def check(folder):
    path = os.path.join(folder, "golden.safetensors")
    with safe_open(path, "np") as f:
        exact = "made" in (f.metadata() or {})
    gold, model = load_file(path), load_model(folder, exact)
    got, slack = (compute(model, gold), {}) if exact else compute_as_before(model, gold)
    if "generate.prompt" in gold:
        texts, margin = continuations(model, gold["generate.prompt"], int(gold["generate.stop"][0]))
        got.update(texts)
        if margin <= MARGIN:
            raise SystemExit(f"{folder}: a choice of a continuation is clear by {margin:.1e} only")
    given = {k for k in gold if k.startswith("lora_")} | set(model_inputs(gold))
    if set(got) | given != set(gold):
        raise SystemExit(f"{folder}: only one side has {sorted((set(got) | given) ^ set(gold))}")
    for k in got:
        if got[k].shape != gold[k].shape:
            raise SystemExit(f"{folder}: {k} has shape {gold[k].shape}, expected {got[k].shape}")
    errors = {k: error_of(k, got[k], gold[k], gold) for k in got}
    worst, bounds = max(errors, key=errors.get), {k: ROUNDING + slack.get(k, 0.0) for k in got}
    wrong = [k for k in got if not errors[k] <= bounds[k]]
    print(f"{folder}: {len(got)} tensors, largest error {errors[worst]:.1e} of {bounds[worst]:.1e} ({worst}), {len(wrong)} wrong")
    for k in wrong:
        print(f"    {k}: error {errors[k]:.1e}, bound {bounds[k]:.1e}")
    return not wrong and (not os.path.exists(head_file(folder)) or check_head(folder, gold))


def check_head(folder, gold):
    head, model = load_file(head_file(folder)), load_model(folder)
    got = compute_head(model, gold, head)
    if set(got) | {"lora_A.lm_head", "lora_B.lm_head"} != set(head):
        raise SystemExit(f"{head_file(folder)}: only one side has {sorted(set(got) ^ set(head))}")
    errors = {k: error_of(k, got[k], head[k], {**gold, **head}) for k in got}
    worst = max(errors, key=errors.get)
    print(f"{head_file(folder)}: {len(got)} tensors, largest error {errors[worst]:.1e} of {ROUNDING:.1e} ({worst})")
    return errors[worst] <= ROUNDING


def main():
    args = sys.argv[1:]
    options = ("--check", "--head")
    if not args or (args[0] not in options and any(a not in CASES for a in args)) or (args[0] in options and len(args) == 1):
        raise SystemExit(f"usage: make_golden.py CASE... | --head DIR... | --check DIR...   cases: {' '.join(CASES)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()                  # it warns that a T5 head is not tied: so it is meant
    transformers.logging.disable_progress_bar()
    if args[0] not in options:
        for name in args:
            make(name)
    elif args[0] == "--head":
        for folder in args[1:]:
            make_head(folder)
    elif not all([check(folder) for folder in args[1:]]):
        raise SystemExit("not the same")


if __name__ == "__main__":
    main()
