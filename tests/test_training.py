"""The fast ways of training against the plain one, and against each other."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from llm_scratch import training
from llm_scratch.model import ModelConfig, TransformerLM
from llm_scratch.training import TrainConfig, get_batch, on_device, train

CONFIG = ModelConfig(vocab_size=64, context_length=16, d_model=32, num_layers=2, num_heads=4, d_ff=48)
IDS = np.random.default_rng(0).integers(64, size=2000).astype(np.uint16)
TRAIN = TrainConfig(steps=9, batch_size=8, lr=5e-3, log_every=3, eval_every=9, device="cpu", precision="fp32")


@pytest.fixture
def quick_compiler(monkeypatch):
    "torch.compile with everything but the generation of code, which takes long."
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def losses(tmp_path=None, **options):
    torch.manual_seed(0)
    model = TransformerLM(CONFIG)
    records = list(train(model, IDS, replace(TRAIN, **options), IDS[:300], tmp_path))
    return torch.tensor([[r["loss"], r["grad_norm"]] for r in records] + [[records[-1]["valid_loss"], 0.0]])


@pytest.mark.parametrize(
    "options",
    [
        {"fused_loss": True},
        {"fused_adamw": True},
        {"tokens_on_device": True},
        {"fused_loss": True, "fused_adamw": True, "tokens_on_device": True, "accumulation": 4},
        {"compile": True},
        {"compile": True, "fused_loss": True, "fused_adamw": True, "tokens_on_device": True},
    ],
    ids=lambda options: "+".join(options),
)
def test_fast_paths_give_the_same_losses(options, quick_compiler):
    torch.testing.assert_close(losses(**options), losses(), rtol=2e-5, atol=2e-6)


def test_bfloat16_curves_overlap(quick_compiler):
    for options in (
        {},
        {"fused_loss": True},
        {"bf16_weights": True},
        {"bf16_weights": True, "fused_loss": True},
    ):
        torch.testing.assert_close(losses(precision="bf16", **options), losses(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_tokens_on_a_device_are_the_same(dtype):
    top = min(np.iinfo(dtype).max, 2**40)
    ids = np.random.default_rng(0).integers(top - 100, top, size=500, endpoint=True).astype(dtype)
    for step in range(3):
        for here, there in zip(
            get_batch(ids, 5, 8, 1, step), get_batch(on_device(ids, "cpu"), 5, 8, 1, step), strict=True
        ):
            assert torch.equal(here, there) and here.max() > top - 100


@pytest.mark.parametrize("options", [{"bf16_weights": True, "precision": "bf16"}, {"fused_loss": True}])
def test_resumed_runs_are_the_same_bit_for_bit(tmp_path, options):
    config = replace(TRAIN, fused_adamw=True, checkpoint_every=3, **options)
    for name, stop in (("whole", None), ("broken", 6)):
        torch.manual_seed(0)
        model = TransformerLM(CONFIG)
        for record in (run := train(model, IDS, config, run_dir=tmp_path / name)):
            if record["step"] == stop:
                run.close()
                torch.manual_seed(1)
                model = TransformerLM(CONFIG)
                list(train(model, IDS, config, run_dir=tmp_path / name, resume=True))
                break
        if stop is None:
            whole = model
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_models_of_several_kinds_compile_in_one_process(quick_compiler, recwarn):
    ids = torch.zeros(2, 8, dtype=torch.int64)
    for change in ({}, {"position": "none"}, {"ffn": "silu"}, {"norm": "none"}, {"tie_weights": True}, {}):
        model = TransformerLM(replace(CONFIG, **change))
        assert training.compiled(training.model_loss, model, ids) is not training.model_loss, recwarn.list


def test_kernels_in_the_interpreter():
    "The same losses from the Triton kernels; in a process of its own, as Triton decides when it is imported."
    if not hasattr(training.triton, "JITFunction"):
        pytest.skip("no Triton")
    code = (
        "import torch, tests.test_training as t; torch.set_num_threads(1); x = torch.zeros(1)\n"
        "assert t.training.can_run_triton(x)\n"
        "plain = t.losses()\n"
        "for options in ({'fused_loss': True}, {'fused_adamw': True}):\n"
        "    torch.testing.assert_close(t.losses(**options), plain, rtol=2e-5, atol=2e-6)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        cwd=training.Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
