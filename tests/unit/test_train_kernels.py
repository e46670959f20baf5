"""Optional kernels and torch.compile: the same training, or an error that names what is missing."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from reference_training import loop_gradient, trained
from training_builders import build_model, build_settings, build_small_plan, largest_difference

from system.config import LoraConfig, RunConfig
from system.errors import ConfigError
from system.training.kernels import resolve_kernels
from system.training.optim import build_optimizer, fused_choice

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
"""Only a name here: what is decided about it needs no GPU."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here"
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "packing"),
    [(None, True), (LoraConfig(rank=2, targets=("q_proj", "up_proj")), False)],
    ids=["full", "adapters"],
)
def test_compiled_layers_train_the_same_model(lora, packing):
    plan = build_small_plan(packing=packing)
    if lora is None:
        gradients = loop_gradient(build_model(), plan, 0)
        for name, found in loop_gradient(build_model(), plan, 0, compile=True).items():
            torch.testing.assert_close(found, gradients[name], atol=2e-6, rtol=2e-5)
    expected = trained(plan, lora=lora)
    compiled = trained(plan, lora=lora, compile=True)
    # Adapters: rounding of gradients near zero, times Adam's step, times alpha / rank = 16.
    assert largest_difference(expected, compiled) < (5e-6 if lora is None else 2e-4)
    start = dict(build_model().named_parameters())
    assert largest_difference(start, {n: compiled[n] for n in start}) > 1e-3


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_that_are_recomputed_train_the_same_model():
    plan = build_small_plan()
    gradients = loop_gradient(build_model(), plan, 0)
    both = loop_gradient(build_model(), plan, 0, compile=True, activation_checkpointing=True)
    for name, found in both.items():
        torch.testing.assert_close(found, gradients[name], atol=2e-6, rtol=2e-5)
    together = trained(plan, compile=True, activation_checkpointing=True)
    assert largest_difference(trained(plan), together) < 5e-6


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("switched_off", [False, True], ids=["alone", "beside-an-eager-engine"])
def test_layers_really_run_compiled_and_lengths_share_what_was_compiled(switched_off):
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(disable=switched_off):
        trained(build_small_plan(), compile=True, micro_batch_tokens=60)
        assert torch._dynamo.config.disable == switched_off, "the setting of others is left"
    captured = counters["stats"]["unique_graphs"]
    assert 0 < captured <= 12, "two equal layers and many lengths need a few graphs, not hundreds"


def test_optimiser_never_switches_its_grouped_kernels_off():
    assert fused_choice(CUDA, is_sharded=True) is True
    assert fused_choice(CUDA, is_sharded=False) is True
    assert fused_choice(CPU, is_sharded=False) is True
    assert fused_choice(CPU, is_sharded=True) is None
    optimizer = build_optimizer(build_model().named_parameters(), build_settings(), is_sharded=True)
    assert optimizer.defaults["fused"] is None and optimizer.defaults["foreach"] is None


def test_missing_compiler_is_named(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"a C\+\+ compiler"):
        trained(build_small_plan(), compile=True)


def test_liger_without_a_gpu_is_refused_and_auto_takes_torch():
    with pytest.raises(ConfigError, match="need a GPU and this worker trains on cpu"):
        resolve_kernels("liger", "llama", CPU)
    assert resolve_kernels("auto", "llama", CPU) == "torch"
    with pytest.raises(ConfigError, match=r"train\.kernels"):
        trained(build_small_plan(), kernels="liger")


def test_liger_without_its_package_or_for_an_unknown_model_is_refused():
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ConfigError, match=r"liger-kernel is not installed.*instructmix\[gpu\]"):
            resolve_kernels("liger", "llama", CUDA)
        assert resolve_kernels("auto", "llama", CUDA) == "torch"
        return
    with pytest.raises(ConfigError, match="none for models of type 'no-such-model'"):
        resolve_kernels("liger", "no-such-model", CUDA)
    assert resolve_kernels("auto", "no-such-model", CUDA) == "torch"
    assert resolve_kernels("auto", "llama", CUDA) == "liger"


def test_liger_on_a_cluster_without_gpus_is_refused_by_the_configuration():
    values = {
        "run_dir": "r",
        "sources": [{"path": "x.jsonl"}],
        "model": {"path": "builtin:tiny"},
        "solve": {"budget": 10},
        "train": {"kernels": "liger"},
    }
    with pytest.raises(ValueError, match=r"cluster\.train_gpus is 0"):
        RunConfig.model_validate(values)
    RunConfig.model_validate(values | {"cluster": {"train_gpus": 1}})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"export": "best"}, "needs keep_best"),
        ({"num_workers": [4, 2]}, "fewest, most"),
    ],
)
def test_train_settings_in_conflict_are_refused(train, message):
    values = {
        "run_dir": "r",
        "sources": [{"path": "x.jsonl"}],
        "model": {"path": "builtin:tiny"},
        "solve": {"budget": 10},
        "train": train,
    }
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values)
