"""FlashAttention's module as a user meets it: without Triton, with its interpreter, and with neither GPU nor interpreter."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

COMMON = """
import torch
torch.set_num_threads(1)
import llm_scratch.flash_attention as fa

def oracle(q, k, v, causal):
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if q.ndim == 4 else x for x in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool)
    seen = seen.tril(s.shape[-1] - s.shape[-2]) if causal else seen
    return s.masked_fill(~seen, -1e300).softmax(-1).masked_fill(~seen, 0) @ v

def draw(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

def results(f, q, k, v, do):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = f(q, k, v)
    return [o, *torch.autograd.grad(o, (q, k, v), do.to(o.dtype))]

def check(f, q, k, v, causal, rtol=1e-5, atol=2e-5):
    do = draw(q.shape, 9, q.dtype)
    ours = results(lambda *x: f(*x, causal), q, k, v, do)
    theirs = results(lambda *x: oracle(*x, causal), q, k, v, do)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == q.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)

def views(B, H, H_kv, Nq, Nk, K, dtype=torch.float32):
    "Heads as the model makes them, (B, T, H, K) in memory; k and v are cut out of one packed tensor."
    q = draw((B, Nq, H, K), 0, dtype).transpose(1, 2)
    kv = draw((B, Nk, 2 * H_kv, K), 1, dtype).transpose(1, 2)
    return q, kv[:, :H_kv], kv[:, H_kv:]

GRID = [  # B, H, H_kv, Nq, Nk, K
    (1, 1, 1, 1, 1, 16),
    (2, 2, 2, 33, 33, 24),    # ragged
    (1, 4, 2, 7, 40, 80),     # grouped, more keys, padded width
    (1, 2, 1, 40, 7, 32),     # grouped, more queries
    (1, 1, 1, 16, 64, 8),     # narrower than the smallest product
    (1, 1, 1, 17, 18, 256),   # the widest
]
"""


def run(code, interpret=False, hide_triton=False):
    "Run `code` after COMMON in a fresh Python; returns what it printed."
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "IN_TEST")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    hide = "import sys; sys.modules['triton'] = None\n" if hide_triton else ""  # import raises ImportError
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", hide + COMMON + textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def needs_triton(interpreter=False):
    triton = pytest.importorskip("triton")
    release = lambda module: tuple(map(int, module.__version__.split(".")[:2]))
    if interpreter and release(triton) < (3, 7) and release(np) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 and before needs NumPy 2.3 or before")


def test_without_triton():
    run(
        """
        q, k, v = views(1, 4, 2, 7, 9, 16)
        check(fa.flash_attention, q, k, v, True)
        check(fa.FlashAttentionPyTorch.apply, q[:, 0], k[:, 0], v[:, 0], True)
        try:
            fa.FlashAttentionTriton.apply(q, k, v, True)
        except RuntimeError as error:
            assert "not installed" in str(error), error
        else:
            raise AssertionError("no error")
        """,
        hide_triton=True,
    )


def test_fallback_on_the_cpu():
    run(
        """
        for case in GRID:
            for causal in False, True:
                check(fa.flash_attention, *views(*case), causal)
        check(fa.flash_attention, *views(1, 2, 2, 1, 9, 16), True)
        """
    )


def test_compiled_kernels_refuse_cpu_tensors():
    needs_triton()
    run(
        """
        assert not fa.interpreted()
        try:
            fa.FlashAttentionTriton.apply(*views(1, 1, 1, 4, 4, 16), True)
        except RuntimeError as error:
            assert "need a GPU" in str(error), error
        else:
            raise AssertionError("no error")
        """
    )


def test_kernels_in_the_interpreter():
    needs_triton(interpreter=True)
    run(
        """
        assert fa.interpreted()
        for case in GRID:
            for causal in False, True:
                check(fa.flash_attention, *views(*case), causal)
                check(fa.FlashAttentionTriton.apply, *views(*case), causal)
        """,
        interpret=True,
    )


def test_kernels_half_precision_layouts_and_empty_inputs():
    needs_triton(interpreter=True)
    run(
        """
        for dtype, tolerance in (torch.float16, 4e-3), (torch.bfloat16, 3e-2):
            check(fa.flash_attention, *views(1, 2, 1, 9, 20, 24, dtype), True, tolerance, tolerance)

        q, k, v = (x[:, 0] for x in views(2, 1, 1, 9, 12, 16))  # (batch, T, K)
        check(fa.FlashAttentionTriton.apply, q, k, v, True)
        o = fa.FlashAttentionTriton.apply(q.requires_grad_(), k, v, True)
        saved = [(tuple(t.shape), t.dtype) for t in o.grad_fn.saved_tensors]
        assert saved.count(((2, 9), torch.float32)) == 1

        q, k, v = (draw((1, 2, 16, n), n).mT for n in (9, 9, 9))  # last dimension not contiguous
        check(fa.flash_attention, q, k, v, False)
        q = draw((1, 1, 9, 16), 5).expand(1, 2, 9, 16)  # both heads in the same memory
        check(fa.flash_attention, q, k, v, False)
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        fa.flash_attention(*x, causal=True).sum().backward()  # a gradient without any strides of its own
        assert all(t.grad.isfinite().all() for t in x)

        empty = q[:, :, :0]
        assert fa.flash_attention(empty, k, v).shape == (1, 2, 0, 16)
        x = [t.clone().requires_grad_() for t in (empty, k, v)]
        torch.autograd.backward(fa.flash_attention(*x, causal=True).sum())
        assert x[1].grad.abs().max() == x[2].grad.abs().max() == 0  # written, not left as found
        assert fa.flash_attention(q, k[:, :, :0], v[:, :, :0], causal=True).abs().max() == 0
        assert fa.flash_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 9, 16)
        """,
        interpret=True,
    )
