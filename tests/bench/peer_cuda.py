"""The same LoRA step and forward in PyTorch + PEFT on a GPU: random weights, bf16 autocast, scaled dot product attention, adapters of
rank 8 on query, value and FFN up; eager and torch.compile, the faster of which counts.

usage: peer_cuda.py SHAPE BATCH TOKENS STEPS      SHAPE: minilm, roberta-base, llama-110m, llama-7b
Prints one line: SHAPE BATCH x TOKENS eager|compile: step ms tokens/s, forward ms tokens/s, peak MB."""
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

SHAPES = {
    "minilm": (30522, 384, 6, 12, 1536),
    "roberta-base": (50265, 768, 12, 12, 3072),
    "llama-110m": (32000, 768, 12, 12, 2048),
    "llama-7b": (32000, 4096, 32, 32, 11008),
}


def make(name, batch, tokens):
    vocab, hidden, layers, heads, neurons = SHAPES[name]
    size = dict(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=neurons)
    lora = dict(r=8, lora_alpha=16, lora_dropout=0.0)
    ids = torch.randint(5, vocab, (batch, tokens), device="cuda")
    if name.startswith("llama"):
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, attn_implementation="sdpa", **size))
            torch.set_default_dtype(torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"], **lora))
        return model, dict(input_ids=ids, labels=ids)
    config = RobertaConfig(max_position_embeddings=514, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                           attn_implementation="sdpa", **size)
    model = RobertaForSequenceClassification(config).cuda()
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "intermediate.dense"], **lora))
    return model, dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.randint(0, 2, (batch,), device="cuda"))


def clock(work, steps):
    times = []
    for i in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main():
    name, batch, tokens, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(0)
    for mode in ("eager", "compile"):
        torch.cuda.reset_peak_memory_stats()
        model, inputs = make(name, batch, tokens)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        run = torch.compile(model) if mode == "compile" else model

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = run(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss.item()

        def forward():
            with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
                run(**inputs)

        try:
            step_time = clock(step, steps)
            model.eval()
            forward_time = clock(forward, steps)
        except Exception as error:  # torch.compile needs a compiler, which a machine may lack
            print(f"{name} {batch} x {tokens} {mode}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        count = batch * tokens
        print(f"{name} {batch} x {tokens} {mode}: step {1e3 * step_time:.1f} ms {count / step_time:.0f} tokens/s, "
              f"forward {1e3 * forward_time:.1f} ms {count / forward_time:.0f} tokens/s, "
              f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MB", flush=True)
        del model, run, optimizer, trained
        torch.cuda.empty_cache()


main()
