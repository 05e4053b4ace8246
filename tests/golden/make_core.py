"""Writes core.safetensors beside this file: numbers for tests/test_core.c that a clone without ../shared can check.

    python make_core.py SHARED_GOLDEN_DIR        (torch, transformers, numpy; the weights are the tiny ones there)

mean_act.CASE.MODULE   signed mean over the real positions of what enters an output projection, adapters on (all cases)
CASE.MODULE.*          weights, sums, salience, kurtosis of a few projections, copied from the case's files
Runs the model in float64 with the adapters merged (W + 2BA) and checks itself against the recorded sums first.
"""
import json, os, struct, sys
import numpy as np
import torch
from transformers import (AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM,
                          AutoModelForSequenceClassification)

CLASSES = {
    "bert": AutoModelForSequenceClassification, "roberta": AutoModelForSequenceClassification,
    "roberta-regression": AutoModelForSequenceClassification, "roberta-qa": AutoModelForQuestionAnswering,
    "llama": AutoModelForCausalLM, "llama-gqa-tied": AutoModelForCausalLM,
    "t5-relu-tied": AutoModelForSeq2SeqLM, "t5-gated-untied": AutoModelForSeq2SeqLM,
}
COPY = [("bert", "bert.encoder.layer.0.attention.output.dense"), ("bert", "bert.encoder.layer.0.output.dense"),
        ("bert", "bert.encoder.layer.2.attention.output.dense"), ("t5-relu-tied", "decoder.block.0.layer.2.DenseReluDense.wo")]
KINDS = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "F64": "<f8"}


def load(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    header.pop("__metadata__", None)
    return {k: np.frombuffer(data[v["data_offsets"][0]:v["data_offsets"][1]], KINDS[v["dtype"]]).reshape(v["shape"])
            for k, v in header.items()}


def save(path, tensors):
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + 4 * x.size]}
        at += 4 * x.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x, "<f4").tobytes())


def mean_activations(folder, case, gold):
    model = CLASSES[case].from_pretrained(folder, attn_implementation="eager").double().eval()
    state = model.state_dict()
    for k in [k for k in gold if k.startswith("lora_A.")]:
        name = k[len("lora_A."):]
        state[name + ".weight"].add_(torch.tensor(2.0 * gold["lora_B." + name].astype("f8") @ gold[k].astype("f8")))
    model.load_state_dict(state)
    names = [k[len("sum_abs_act."):] for k in gold if k.startswith("sum_abs_act.")]
    seen = {}
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda m, x, name=name: seen.__setitem__(name, x[0].detach().numpy()))
    inputs = {k: torch.tensor(gold[k].astype("i8")) for k in ("input_ids", "attention_mask", "token_type_ids", "labels", "decoder_input_ids")
              if k in gold}
    if case in ("roberta-qa", "roberta-regression"):
        inputs.pop("labels", None)
    with torch.no_grad():
        model(**inputs)
    out, worst = {}, 0.0
    for name in names:
        real = gold["attention_mask"] > 0 if "decoder" not in name else gold["labels"] != -100
        x = seen[name][real]
        want = gold["sum_abs_act." + name]
        worst = max(worst, float(np.max(np.abs(np.abs(x).sum(0) - want)) / want.max()))
        if "kurtosis_per_head." + name in gold:
            out[f"mean_act.{case}.{name}"] = x.mean(0)
    print(f"{case}: {len(out)} projections, recorded sums reproduced to {worst:.1e}")
    assert worst < 1e-5
    return out


def main():
    root, tensors = sys.argv[1], {}
    for case in CLASSES:
        tensors.update(mean_activations(os.path.join(root, case), case, load(os.path.join(root, case, "golden.safetensors"))))
    for case, name in COPY:
        gold, model = load(os.path.join(root, case, "golden.safetensors")), load(os.path.join(root, case, "model.safetensors"))
        tensors[f"{case}.{name}.weight"] = model[name + ".weight"]
        for kind in ("sum_abs_act", "sum_abs_grad", "salience_per_feature", "salience_per_head", "kurtosis_per_feature", "kurtosis_per_head"):
            if f"{kind}.{name}" in gold:
                tensors[f"{case}.{name}.{kind}"] = gold[f"{kind}.{name}"]
    gold, name = load(os.path.join(root, "bert", "golden.safetensors")), "bert.encoder.layer.1.attention.self.value"
    for kind in ("lora_B", "grad.lora_B", "adapter_importance"):
        tensors[f"bert.{kind}.{name}"] = gold[f"{kind}.{name}"]
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "core.safetensors")
    save(path, tensors)
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


main()
