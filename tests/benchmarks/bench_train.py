"""Training speed against TRL's SFTTrainer and a plain transformers Trainer, in the same run.

    python tests/benchmarks/bench_train.py [--model DIR] [--rows 480] [--rounds 3] [--out FILE]
    python tests/benchmarks/bench_train.py --model 1b --max-length 2048 --batch-rows 64 \\
        --micro-batch-tokens 16384          on a GPU

Every trainer gets the same encoded rows, the same number of rows per optimiser step and the same
model, fp32 on CPU or bf16 on a GPU, no checkpoints, no evaluation.  Rate = tokens of rows (prompt
and response, padding never counted) per second of the training loop, start-up excluded.  The
trainers run in processes of their own, interleaved over the rounds; medians are reported.  On a
machine that others use too, tokens per CPU second with `--threads 1` is the steadier number.

Competitors:
    trl-packed    SFTTrainer(packing=True), its best-fit packing, flattened to one sequence a
                  batch.  With the package flash-attn on a GPU it gets FlashAttention and pays
                  for rows alone; without, transformers masks rows apart with SDPA (exact,
                  quadratic in the batch): it does not use torch's own variable-length kernel
    trl-flex      the same with FlexAttention, which skips what the mask hides; needs a GPU and no
                  further package
    trl           SFTTrainer defaults
    trainer       transformers.Trainer with DataCollatorForSeq2Seq padding
    instructmix   this project's loop
"""

from __future__ import annotations

import argparse
import importlib.util
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
from train_workload import Workload, build_model, build_packed_plan, build_workload, labelled

TRAINERS = ("instructmix", "trl-packed", "trl-flex", "trl", "trainer")


def run_instructmix(model_dir: str, work: Workload) -> dict[str, Any]:
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
        micro_batch_tokens=work.micro_batch_tokens,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    plan = build_packed_plan(work)
    model = load_model(model_dir, device=device)
    start, cpu_start = time.perf_counter(), time.process_time()
    result = train_on_plan(model, plan, settings)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "loss": float(result.losses.mean()),
    }


def run_transformers(model_dir: str, work: Workload) -> dict[str, Any]:
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
        [{"input_ids": row["input_ids"], "labels": labelled(row)} for row in work.rows]
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        args=TrainingArguments(**common_arguments(work.batch_rows)),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_dir)),
    )
    return timed(trainer)


def packed_attention() -> str:
    """What TRL's packing is made for, where it is installed; else transformers' default."""
    has_flash = torch_has_gpu() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else "sdpa"


def torch_has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def run_trl(
    model_dir: str, work: Workload, *, packing: bool, attention: str = "sdpa"
) -> dict[str, Any]:
    """TRL's SFTTrainer; with packing its batch is as many full sequences as the rows fill."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    batch = work.batch_rows
    if packing:
        mean = float(np.mean([len(row["input_ids"]) for row in work.rows]))
        batch = max(1, round(batch * mean / work.max_length))
    data = Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [
                    int(place >= row["prompt"]) for place in range(len(row["input_ids"]))
                ],
            }
            for row in work.rows
        ]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=attention),
        args=SFTConfig(**common_arguments(batch), packing=packing, max_length=work.max_length),
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


def run_one(name: str, model_dir: str, args: argparse.Namespace) -> None:
    """One trainer in this process; prints one JSON line."""
    import resource

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = build_workload(model_dir, args)
    rows = work.rows
    run = {
        "instructmix": run_instructmix,
        "trainer": run_transformers,
        "trl": lambda *a: run_trl(*a, packing=False),
        "trl-packed": lambda *a: run_trl(*a, packing=True, attention=packed_attention()),
        "trl-flex": lambda *a: run_trl(*a, packing=True, attention="flex_attention"),
    }[name]
    result = run(model_dir, work)
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
    parser.add_argument("--model", default="4m", help="1m, 4m, 30m, 1b or a model directory")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS)
    parser.add_argument("--one", choices=TRAINERS)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.one:
        run_one(args.one, args.model, args)
        return
    if args.model == "1b" and not torch_has_gpu():
        parser.error("--model 1b needs a GPU: a step on a CPU takes minutes")
    if args.trainers is None:
        args.trainers = [name for name in TRAINERS if name != "trl-flex" or torch_has_gpu()]
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


def gpu_name() -> str | None:
    """The GPU that torch sees first."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run_process(name: str, model_dir: str, args: argparse.Namespace) -> dict[str, Any]:
    """One trainer in a fresh process."""
    command = [__file__, "--one", name, "--model", model_dir]
    for option in ("rows", "max_length", "batch_rows", "micro_batch_tokens"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    environment = {"OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error"}
    return last_json(run_contender(name, command, environment))


def report(
    runs: dict[str, list[dict[str, Any]]], model_dir: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians over rounds, ratios, machine, versions, commit."""
    rows = build_workload(model_dir, args).rows
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
        "config": vars(args),
        "packed_attention_of_trl": packed_attention(),
        "machine": {**hardware(), "gpu": gpu_name()},
        "versions": versions("torch", "transformers", "trl", "flash_attn"),
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
