"""Training speed against TRL's SFTTrainer and a plain transformers Trainer, in the same run.

    python tests/benchmarks/bench_train.py [--model DIR] [--rows 480] [--rounds 3] [--out FILE]

Every trainer gets the same encoded rows, the same number of rows per optimiser step and the same
model, fp32 on CPU or bf16 on a GPU, no checkpoints, no evaluation.  Rate = tokens of rows (prompt
and response, padding never counted) per second of the training loop, start-up excluded.  The
trainers run in processes of their own, interleaved over the rounds; medians are reported.  On a
machine that others use too, tokens per CPU second with `--threads 1` is the steadier number.

Competitors:
    trl-packed    SFTTrainer(packing=True), its best-fit packing, flattened to one sequence a
                  batch; transformers then masks rows apart (exact, quadratic in the batch)
    trl           SFTTrainer defaults
    trainer       transformers.Trainer with DataCollatorForSeq2Seq padding
    instructmix   this project's loop
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from conditions import commit, hardware, last_json, run_contender, versions

TRAINERS = ("instructmix", "trl-packed", "trl", "trainer")
MAX_LENGTH = 512
BATCH_ROWS = 16
MICRO_BATCH_TOKENS = 4096


def build_rows(num_rows: int, vocab_size: int) -> list[dict[str, Any]]:
    """Rows with the length profile of instruction data: log-normal, median about 120 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(120), 0.7, num_rows), 16, MAX_LENGTH).astype(int)
    rows = []
    for number, length in enumerate(lengths):
        ids = generator.integers(5, vocab_size, size=length)
        prompt = int(length * generator.uniform(0.2, 0.7))
        rows.append({"id": f"row-{number}", "input_ids": ids.tolist(), "prompt": prompt})
    return rows


def build_model(folder: Path, size: str) -> None:
    """A Llama of about 1, 4 or 30 million parameters with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, vocabulary = {
        "1m": (96, 4, 4096),
        "4m": (192, 6, 8192),
        "30m": (384, 8, 32768),
    }[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 48,
        num_key_value_heads=hidden // 96,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{k}": k for k in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2")
    fast.save_pretrained(folder)


def labelled(row: dict[str, Any]) -> list[int]:
    """Labels with the prompt masked out."""
    return [-100] * row["prompt"] + row["input_ids"][row["prompt"] :]


def build_packed_plan(rows: list[dict[str, Any]]) -> Any:
    """This project's plan for the rows."""
    import pyarrow as pa

    from system import schema
    from system.training.plan import build_plan

    tokens = pa.table(
        {
            "id": [row["id"] for row in rows],
            "category": ["all"] * len(rows),
            "input_ids": [row["input_ids"] for row in rows],
            "response_mask": [
                [place >= row["prompt"] for place in range(len(row["input_ids"]))] for row in rows
            ],
        }
    ).cast(schema.TOKENS)
    return build_plan(
        tokens, ["all"] * len(rows), batch_size=BATCH_ROWS, max_length=MAX_LENGTH, packing=True
    )


def run_instructmix(model_dir: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """This project's loop."""
    import torch

    from system.models.base import load_model
    from system.training.settings import TrainSettings
    from system.training.train import train_on_plan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TrainSettings(
        learning_rate=1e-4,
        lr_schedule="linear",
        warmup_share=0.0,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    plan = build_packed_plan(rows)
    model = load_model(model_dir, device=device)
    start, cpu_start = time.perf_counter(), time.process_time()
    result = train_on_plan(model, plan, settings)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "loss": float(result.losses.mean()),
    }


def run_transformers(model_dir: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A plain Trainer: padded batches of the rows of a step."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    data = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": labelled(row)} for row in rows]
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        args=TrainingArguments(**common_arguments(BATCH_ROWS)),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir)),
    )
    return timed(trainer)


def run_trl(model_dir: str, rows: list[dict[str, Any]], *, packing: bool) -> dict[str, Any]:
    """TRL's SFTTrainer; with packing its batch is as many full sequences as the rows fill."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    batch = BATCH_ROWS
    if packing:
        mean = float(np.mean([len(row["input_ids"]) for row in rows]))
        batch = max(1, round(BATCH_ROWS * mean / MAX_LENGTH))
    data = Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [
                    int(place >= row["prompt"]) for place in range(len(row["input_ids"]))
                ],
            }
            for row in rows
        ]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        args=SFTConfig(**common_arguments(batch), packing=packing, max_length=MAX_LENGTH),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    return timed(trainer)


def common_arguments(batch: int) -> dict[str, Any]:
    """Training arguments of the transformers family: one epoch, nothing but training."""
    import torch

    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def timed(trainer: Any) -> dict[str, Any]:
    """Seconds of `train()` and its mean loss."""
    start, cpu_start = time.perf_counter(), time.process_time()
    output = trainer.train()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": output.training_loss}


def run_one(name: str, model_dir: str, num_rows: int) -> None:
    """One trainer in this process; prints one JSON line."""
    import resource

    import torch
    from transformers import AutoConfig

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    vocabulary = AutoConfig.from_pretrained(model_dir).vocab_size
    rows = build_rows(num_rows, vocabulary)
    run = {
        "instructmix": run_instructmix,
        "trainer": run_transformers,
        "trl": lambda *a: run_trl(*a, packing=False),
        "trl-packed": lambda *a: run_trl(*a, packing=True),
    }[name]
    result = run(model_dir, rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(
        json.dumps(
            {
                **result,
                "tokens_per_second": tokens / result["seconds"],
                "tokens_per_cpu_second": tokens / result["cpu_seconds"],
                "responses_per_second": sum(len(r["input_ids"]) - r["prompt"] for r in rows)
                / result["seconds"],
                "peak_memory_bytes": memory,
            }
        )
    )


def peak_of(threads: int) -> float:
    """Fastest fp32 (CPU) or bf16 (GPU) matrix product seen, in operations per second."""
    import torch

    from system.training.flops import peak_flops

    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return peak_flops(device, torch.bfloat16 if on_gpu else torch.float32)


def needed_flops(model_dir: str, rows: list[dict[str, Any]]) -> float:
    """Operations that training on the rows takes at least.

    6 per weight and token (the head on response tokens only), attention over the causal triangle;
    padding and recomputation excluded.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    per_layer = hidden * (2 * query + 2 * key) + 3 * hidden * config.intermediate_size
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = tokens - sum(row["prompt"] for row in rows)
    squares = sum(len(row["input_ids"]) ** 2 for row in rows)
    dense = 6 * (layers * per_layer * tokens + config.vocab_size * hidden * labels)
    return dense + 6 * layers * query * squares


def main() -> None:
    """Runs all trainers, interleaved, and prints (or writes) a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4m", help="1m, 4m, 30m or a model directory")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--one", choices=TRAINERS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.one:
        run_one(args.one, args.model, args.rows)
        return
    model_dir = args.model
    if not Path(model_dir).is_dir():
        model_dir = tempfile.mkdtemp()
        build_model(Path(model_dir), args.model)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.trainers}
    for number in range(args.rounds):
        order = args.trainers if number % 2 == 0 else args.trainers[::-1]
        for name in order:
            runs[name].append(run_process(name, model_dir, args))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    print(json.dumps(report(runs, model_dir, args), indent=2))


def run_process(name: str, model_dir: str, args: argparse.Namespace) -> dict[str, Any]:
    """One trainer in a fresh process."""
    command = [__file__, "--one", name, "--model", model_dir, "--rows", str(args.rows)]
    environment = {"OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error"}
    return last_json(run_contender(name, command, environment))


def report(
    runs: dict[str, list[dict[str, Any]]], model_dir: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians over rounds, ratios, machine, versions, commit."""
    from transformers import AutoConfig

    rows = build_rows(args.rows, AutoConfig.from_pretrained(model_dir).vocab_size)
    peak, needed = peak_of(args.threads), needed_flops(model_dir, rows)
    summary = {
        name: {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in results),
            "tokens_per_cpu_second": statistics.median(r["tokens_per_cpu_second"] for r in results),
            "all": [round(r["tokens_per_second"]) for r in results],
            "share_of_matmul_peak": needed
            / peak
            / statistics.median(r["seconds"] for r in results),
            "peak_memory_bytes": max(r["peak_memory_bytes"] for r in results),
            "mean_loss": results[-1]["loss"],
        }
        for name, results in runs.items()
    }
    ours = summary.get("instructmix")
    record = {
        "benchmark": "train",
        "config": {**vars(args), "max_length": MAX_LENGTH, "batch_rows": BATCH_ROWS},
        "machine": hardware(),
        "versions": versions("torch", "transformers", "trl"),
        "commit": commit(),
        "matmul_peak_gflops": peak / 1e9,
        "results": summary,
        "speedup": {
            name: ours["tokens_per_second"] / result["tokens_per_second"]
            for name, result in summary.items()
        }
        if ours
        else {},
    }
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=2) + "\n")
    return record


if __name__ == "__main__":
    main()
