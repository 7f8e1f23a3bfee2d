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


def test_compile_takes_the_update_along_where_there_is_a_compiler(monkeypatch):
    update = lambda **options: (
        training.Job(TransformerLM(CONFIG), replace(TRAIN, **options), IDS).optimizer.update
    )
    assert update() is training.adamw_update
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        assert isinstance(update(compile=True), training.CompiledUpdate)
        assert isinstance(update(compile=True, fused_adamw=True), training.FusedUpdate)

    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    with pytest.warns(UserWarning, match="without it"):
        assert update(compile=True) is training.adamw_update


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


def fused_and_plain(dtype, tokens=13, compile=False, fp8=False, attention=None, **sizes):
    "A twin with fused layers, and one without, after the same backward pass: losses and gradients."
    torch.manual_seed(0)
    sizes = {"d_model": 40, "num_layers": 2, "num_heads": 4, "d_ff": 36} | sizes
    model = TransformerLM(ModelConfig(vocab_size=64, context_length=16, **sizes))
    for p in model.parameters():
        if p.ndim == 1:  # gains other than 1
            torch.nn.init.normal_(p, 1, 0.2)
    found = []
    for fuse in (True, False):
        twin = training.Twin(model, dtype)
        if fuse:
            for layer in twin.model.layers:
                layer.attn.attention = attention or layer.attn.attention
            twin.fuse(fp8)
        kinds = {type(layer).__name__ for layer in twin.model.layers}
        assert kinds == {"FusedBlock" if fuse else "TransformerBlock"}
        loss_sum = torch.compile(training.model_loss, backend="aot_eager") if compile else training.model_loss
        loss = loss_sum(twin.model, *get_batch(IDS, 3, tokens, 0, 0))
        loss.backward()
        twin.hand_over_gradients()
        found.append([loss.detach()] + [p.grad.float() for p in model.parameters()])
        model.zero_grad()
    return found


def trained(fuse, steps=4, fp8=False):
    "Losses of some steps with weights that the update writes into the merged matrices, and whether they are there."
    torch.manual_seed(0)
    model = TransformerLM(CONFIG)
    optimizer = training.AdamW(model.parameters(), lr=5e-3, fused=True)
    twin, found = training.Twin(model, torch.bfloat16, optimizer), []
    if fuse:
        twin.fuse(fp8)
    for step in range(steps):
        batch = get_batch(IDS, 4, 16, 0, step)
        options = {"lr": 5e-3, "clip": 1.0, "after_part": twin.hand_over_gradients}
        found.append(float(training.train_step(twin.model, optimizer, *batch, **options)[0]))
        twin.follow()
    if fuse:
        a = model.layers[1].attn
        merged = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).detach()
        torch.testing.assert_close(twin.model.layers[1].qkv.float(), merged, rtol=2**-7, atol=0)
    return torch.tensor(found)


def check_fused_layers():
    from llm_scratch.flash_attention import flash_attention

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    shapes = {}, {"tokens": 1}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "tokens": 16}, {"d_ff": 1030}
    for sizes in (*shapes, {"num_heads": 10, "num_kv_heads": 5}, {"compile": True}):
        for fused, plain in zip(*fused_and_plain(torch.float32, **sizes), strict=True):
            close(fused, plain)
    for sizes in ({"num_kv_heads": 2}, {"tokens": 1}, {"compile": True}):  # gradients in one piece
        for fused, plain in zip(
            *fused_and_plain(torch.float32, attention=flash_attention, **sizes), strict=True
        ):
            close(fused, plain)
    torch.testing.assert_close(trained(True), trained(False), rtol=2e-3, atol=0)
    params = [
        torch.nn.Parameter(torch.zeros(n)) for n in (8, 5000, 3, 100, 4096)
    ]  # whole blocks, and not; 3: torch's way
    for p, dtype in zip(
        params, [torch.float32, torch.bfloat16, torch.float32, None, torch.bfloat16], strict=True
    ):
        if dtype is torch.bfloat16 and hasattr(p, "grad_dtype"):  # torch 2.10
            p.grad_dtype = dtype
        p.grad = None if dtype is None else torch.randn(p.shape).to(getattr(p, "grad_dtype", torch.float32))
    grads = [p.grad for p in params if p.grad is not None]
    close(training.FusedUpdate().norm(params), training.gradient_norm(grads))
    options = {"bf16_weights": True, "fused_adamw": True}  # as a whole run, evaluation and all, a short one
    options |= {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 4}
    both = [losses(fused_layers=fused, **options) for fused in (True, False)]
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-3)


def check_products_in_8_bits():
    from triton.runtime import interpreter

    theirs = interpreter._convert_float  # loses a carry when it rounds to e4m3: torch's cast instead
    e4m3 = training.tl.float8e4nv
    mine = lambda x: torch.tensor(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    interpreter._convert_float = lambda x, a, b, mode: mine(x) if b == e4m3 else theirs(x, a, b, mode)
    rounded, plain = fused_and_plain(torch.float32, fp8=True, num_kv_heads=2)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(rounded[1:], plain[1:], strict=True)]
    assert 0.01 < min(errors) and max(errors) < 0.15, errors
    compiled = fused_and_plain(torch.float32, fp8=True, compile=True, num_kv_heads=2)[0]
    torch.testing.assert_close(compiled, rounded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained(True, steps=2, fp8=True), trained(False, steps=2), rtol=1e-2, atol=0)


def test_products_in_8_bits_are_refused_where_there_are_none(tmp_path):
    with pytest.raises(ValueError, match="NVIDIA GPU, this is 'cpu'"):
        losses(fp8=True, precision="bf16")
    for impossible in ({"bf16_weights": False}, {"fused_layers": False}, {"precision": "fp16"}):
        with pytest.raises(ValueError, match="fp8 needs"):
            TrainConfig(fp8=True, **impossible)


def test_fused_layers_leave_others_alone():
    for options in ({"norm": "post"}, {"position": "none"}, {"ffn": "silu"}, {"qk_norm": True}):
        model = TransformerLM(replace(CONFIG, **options))
        assert not any(training.can_fuse(layer) for layer in model.layers), options
    model = TransformerLM(CONFIG)
    model.layers[0].ffn.w1.weight.requires_grad_(False)
    assert not training.can_fuse(model.layers[0])


@pytest.mark.parametrize("check", ["check_fused_layers", "check_products_in_8_bits"])
def test_fused_layers_in_the_interpreter(check):
    if not hasattr(training.triton, "JITFunction"):
        pytest.skip("no Triton")
    code = f"import torch, tests.test_training as t; torch.set_num_threads(1); t.{check}()"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"TRITON_INTERPRET": "1"}
    where = training.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr[-2000:]
