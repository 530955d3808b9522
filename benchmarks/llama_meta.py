"""Analyse a 70B-class Llama on the meta device and plan to cut half of its heads and hidden units: time and memory.

python benchmarks/llama_meta.py            # 80 layers; --layers 8 for a quick look
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from machine import save

from morph.analysis import analyse


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=args.layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    tokens = torch.zeros(2, 64, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    analysis = analyse(model, {"input_ids": tokens, "use_cache": False})
    analysed, analysed_busy = time.perf_counter() - start, time.process_time() - busy
    choice = {
        name: np.arange(coupling.units // 2)
        for name, coupling in analysis.couplings.items()
        if coupling.blocks == 1 and not coupling.statistics
    }
    plan = analysis.cut(choice)
    sizes = analysis.sizes(choice)
    planned = time.perf_counter() - start - analysed
    results = {
        "layers": args.layers,
        "params": sum(p.numel() for p in model.parameters()),
        "calls": len(analysis.recording.calls),
        "traced": analysis.traced,
        "couplings": len(analysis.couplings),
        "units": analysis.units.count,
        "free": analysis.free(),
        "params_after": sizes.params,
        "edits": len(plan.edits),
        "analyse_seconds": analysed,
        "analyse_cpu_seconds": analysed_busy,
        "plan_seconds": planned,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mb_before": before / 1024,
    }
    for key, value in results.items():
        print(f"{key:>16} {value}")
    if args.save:
        save("llama-meta", results)


if __name__ == "__main__":
    main()
