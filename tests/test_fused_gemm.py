"""Products with endings: what the notebook's own checks leave open."""

import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

gemm = import_module("llm_scratch.fused_gemm")
needs_gluon = pytest.mark.skipif(gemm.gl is None, reason="no Gluon")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
SHAPES = [(128, 256, 64), (1, 64, 8), (300, 1344, 512), (129, 704, 72), (4096, 3072, 768)]  # M, N, K


@needs_gluon
@pytest.mark.parametrize(
    "down, across, programs", [(1, 1, 1), (7, 3, 4), (128, 32, 132), (9, 5, 132), (16, 2, 7)]
)
def test_programs_share_out_all_tiles(down, across, programs, monkeypatch):
    program = 0
    number = SimpleNamespace(num_programs=lambda _: programs, program_id=lambda _: program)
    monkeypatch.setattr(gemm, "gl", number)
    found = []
    for program in range(programs):
        turns = -(-(down * across - program) // programs)
        found += [gemm._tile.fn(turn, across) for turn in range(turns)]
    assert sorted(found) == [(128 * row, tile) for row in range(down) for tile in range(across)]


def test_on_the_cpu_it_is_plain_pytorch():
    x, weight = torch.randn(5, 16), torch.randn(64, 16)
    assert not gemm.runs_fused(x, weight)
    wide = torch.randn(5, 128)  # any strides will do
    flipped, straight = (
        gemm.matmul_gate_backward(x, down, wide) for down in (weight.T, weight.T.contiguous())
    )
    torch.testing.assert_close(flipped, straight)
    gate_up, h = gemm.matmul_gate(x, weight)
    torch.testing.assert_close(gate_up, x @ weight.T)
    torch.testing.assert_close(h, F.silu(gate_up[:, :32]) * gate_up[:, 32:])
    with pytest.raises(ValueError, match="5 positions, but the tables hold 4"):
        gemm.matmul_turn(x, weight, (torch.ones(4, 8), torch.ones(4, 8)), 5, 32)


def signature(gl, ending):
    "What the kernel is compiled for: argument -> type, and which arguments are multiples of 16."
    layout = lambda tile: gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
    descriptor = lambda *tile: f"tensordesc<bf16[{','.join(map(str, tile))}],{layout(list(tile))!r}>"
    pair = ("i32", "i32")
    types = dict(x=descriptor(64, 64), weight=descriptor(4, *gemm.PLACES, 64), out="*bf16", halves=pair)
    types |= {"widths": pair} | ({"beside": descriptor(64, 64)} if ending in gemm.BESIDE else {})
    more = {"gate": "*bf16", "gate_backward": "*bf16", "turn": ("*fp32", "*fp32", *pair)}
    return types | ({"more": more[ending]} if ending in more else {})


@needs_gluon
@pytest.mark.parametrize("ending", ["gate", "gate_backward", "turn", "add"])
def test_kernel_compiles_for_hopper(ending, tmp_path):
    if gemm.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    from test_flash import Compiled, places
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, types = gemm._gemm_kernel, signature(gemm.gl, ending)
    constants = dict(
        ENDING=ending, HALF=32, PAIRS=gemm.BESIDE.get(ending, 0), STAGES=4, BLOCK_K=64, num_warps=4
    )
    constants |= dict.fromkeys({"beside", "more"} - set(types))
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in ("out", "M", "N", "K")}
    more = types.get("more", ())
    places_of_more = [(i,) for i in range(len(more))] if isinstance(more, tuple) else [()]
    aligned |= {(names.index("more"), *place): [["tt.divisibility", 16]] for place in places_of_more}
    numbered = {(names.index(n),): value for n, value in constants.items()}
    compiled = Compiled(kernel, 90)
    source = GluonASTSource(kernel, kinds, numbered, aligned)
    compiled.result = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
    ptx = compiled.result.asm["ptx"]
    assert compiled.spilled(tmp_path) <= 128 and compiled.result.metadata.shared <= 232_448
    assert "m64n256k16" in ptx and "setmaxnreg" in ptx
    # eight columns side by side in one thread: nothing goes to memory in smaller pieces, nothing is shuffled for it
    stores = set(re.findall(r"st\.global\S*", ptx)) | set(re.findall(r"ld\.global\S*", ptx))
    assert stores <= {"st.global.v4.b32", "ld.global.v4.b32"}, stores
    barriers = places(ptx, "mbarrier.init")
    assert barriers and not barriers & places(ptx, "st.shared")
    if (
        ending in gemm.BESIDE
    ):  # what a thread has read is overwritten by the copy unit: not before it has been read
        order = re.findall(r"ld\.shared\.v4|fence\.proxy\.async|mbarrier\.arrive\.shared", ptx)
        steps = "".join({"l": "r", "f": "f", "m": "a"}[word[0]] for word in order)
        assert (
            steps.count("r")
            and len(re.findall("rfa", steps)) == 2 * gemm.BESIDE[ending]
            and not re.search("ra", steps)
        ), steps


def near(got, want, limit):
    error = float((got.double() - want).norm() / want.norm())
    assert got.isfinite().all() and error <= limit, f"off by {error:.1e}"


@on_hopper
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2.5e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_gpu_endings_against_float64(M, N, K, dtype, limit):
    g = torch.Generator("cuda").manual_seed(M + N)
    normal = lambda *shape: torch.randn(*shape, generator=g, device="cuda").to(dtype)
    x, weight, down, plus = normal(M, K), normal(N, K) / K**0.5, normal(K, N) / K**0.5, normal(M, N)
    assert gemm.runs_fused(x, weight)
    wide = x.double() @ weight.double().T
    for got, want in zip(gemm.matmul_gate(x, weight), gemm.plain_gate(wide), strict=True):
        near(got, want, limit)
    near(gemm.matmul_add(x, weight, plus), wide + plus.double(), limit)
    T = next(t for t in (50, 43, 32, 1) if M % t == 0)
    for half, turned in (16, 0), (16, 32), (16, N), (20, 40), (64, N // 128 * 128):
        tables = torch.randn(2, T + 3, half, generator=g, device="cuda")
        want = gemm.plain_turn(wide, *tables.double(), T, turned)
        near(gemm.matmul_turn(x, weight, tuple(tables), T, turned), want, limit)
    gate_up = 4 * normal(M, 2 * N)
    want = gemm.plain_gate_backward(x.double() @ down.double(), gate_up.double())
    for got, true in zip(gemm.matmul_gate_backward(x, down, gate_up), want, strict=True):
        near(got, true, limit)


@on_hopper
def test_gpu_nothing_is_written_past_the_end_and_bits_do_not_depend_on_programs():
    g = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 264, generator=g, device="cuda").bfloat16() for n in (1000, 448))
    want = gemm.matmul_gate(x, weight)
    for programs in 1, 5, 32, 132, 500:
        room = torch.full((1001, 448), 7.0, device="cuda").bfloat16()
        h = torch.full((1001, 224), 7.0, device="cuda").bfloat16()
        gemm._launch("gate", x, weight, room, h, 224, programs=programs)
        assert torch.equal(room[:1000], want[0]) and torch.equal(h[:1000], want[1])
        assert (room[1000] == 7).all() and (h[1000] == 7).all()


@on_hopper
def test_gpu_what_an_ending_reads_may_lie_anywhere():
    g = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, device="cuda").bfloat16()
    x, weight, down, plus, gate_up = (
        normal(1000, 264),
        normal(448, 264),
        normal(264, 192),
        normal(1000, 448),
        normal(1000, 384),
    )
    assert gemm.runs_fused(x, weight) and gemm.runs_fused(x, down, flip=True)
    anywhere = lambda t: (t, torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t), t.T.contiguous().T)
    sums = [gemm.matmul_add(x, weight, t) for t in anywhere(plus)]
    gates = [torch.cat(gemm.matmul_gate_backward(x, down, t), 1) for t in anywhere(gate_up)]
    for programs in 1, 5, 32, 500:
        sums.append(torch.empty_like(plus))
        gemm._launch("add", x, weight, sums[-1], None, 448, beside=plus, programs=programs)
        out, h = torch.empty_like(gate_up), x.new_empty(1000, 192)
        gemm._launch(
            "gate_backward", x, gemm.transposed(down), out, h, 192, beside=gate_up, programs=programs
        )
        gates.append(torch.cat([out, h], 1))
    for results in sums, gates:
        assert all(torch.equal(results[0], other) for other in results[1:])


@on_hopper
def test_gpu_same_bits_again_and_again_at_full_size():
    g = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, device="cuda").bfloat16()
    dy, down, gate_up = normal(16384, 1024), normal(1024, 4096), normal(16384, 8192)
    want = gemm.matmul_gate_backward(dy, down, gate_up)
    for _ in range(60):
        for got, first in zip(gemm.matmul_gate_backward(dy, down, gate_up), want, strict=True):
            assert torch.equal(got, first)
    weight, plus = normal(1024, 1024), normal(16384, 1024)
    want = gemm.matmul_add(dy, weight, plus)
    assert all(torch.equal(gemm.matmul_add(dy, weight, plus), want) for _ in range(200))


@on_hopper
def test_gpu_extreme_gates_stay_finite():
    gate = torch.tensor([-1e30, -3e4, -90.0, 0.0, 90.0, 3e4], device="cuda")
    x = torch.zeros(6, 64, device="cuda")
    x[:, 0] = gate
    weight = torch.zeros(128, 64, device="cuda")
    weight[:64, 0] = weight[64:, 1] = 1.0
    x[:, 1] = 1.0
    _, h = gemm.matmul_gate(x.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(h[:, 0].float(), F.silu(x.bfloat16().float()[:, 0]), rtol=1e-2, atol=1e-30)
    dy = torch.eye(64, device="cuda")[:6].bfloat16()
    gate_up = torch.cat([gate[:, None].expand(6, 64), torch.ones(6, 64, device="cuda")], 1).bfloat16()
    out, h = gemm.matmul_gate_backward(dy, torch.ones(64, 64, device="cuda").bfloat16(), gate_up)
    assert out.isfinite().all() and h.isfinite().all()


@on_hopper
@pytest.mark.parametrize(
    "T", [200, 256]
)  # of 256, whole tiles, the attention kernels turn gradients back themselves
def test_gpu_a_block_trains_the_same(T, monkeypatch):
    from llm_scratch import training
    from llm_scratch.flash_attention import flash_attention
    from llm_scratch.model import ModelConfig, TransformerLM

    torch.manual_seed(0)
    sizes = dict(d_model=256, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=704)
    config = ModelConfig(vocab_size=512, context_length=T, **sizes)
    model = TransformerLM(config, attention=flash_attention).cuda()
    ids = torch.randint(512, (3, T + 1), device="cuda")
    calls, grads = [], {}
    real = gemm._launch
    monkeypatch.setattr(
        gemm, "_launch", lambda ending, *a, **k: (calls.append(ending), real(ending, *a, **k))
    )
    for ours in True, False:
        if not ours:  # products and kernels one after the other, attention as if it were any
            monkeypatch.setattr(training, "runs_fused", lambda *a, **k: False)
            monkeypatch.setattr(training, "flash_attention", None)
        twin = training.Twin(model, torch.bfloat16)
        twin.fuse()
        training.model_loss(twin.model, ids[:, :-1], ids[:, 1:]).backward()
        twin.hand_over_gradients()
        grads[ours] = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        if ours:
            assert sorted(set(calls)) == ["add", "gate", "gate_backward", "turn"] and len(calls) == 2 * 5
    assert len(calls) == 2 * 5
    for a, b in zip(grads[True], grads[False], strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
