"Plausible wrong answers to the exercises of notebook 05, and what their checks must say."

import math
import statistics

import torch

from llm_scratch.flash_attention import keys_end, online_step, tiled_backward, tiled_forward


def two_passes(x):
    m, trace = max(x), []
    for x_j in x:
        trace.append((m, (trace[-1][1] if trace else 0) + math.exp(x_j - m)))
    return trace


def forgets_to_rebase(x):
    m, l, trace = -math.inf, 0.0, []
    for x_j in x:
        m = max(m, x_j)
        l += math.exp(x_j - m)
        trace.append((m, l))
    return trace


def plain_exponentials(x):
    m, total, trace = -math.inf, 0.0, []
    for x_j in x:
        m, total = max(m, x_j), total + math.exp(x_j)
        trace.append((m, total / math.exp(m)))
    return trace


def acc_without_alpha(s, v, m, l, acc):
    m_new, l_new, _ = online_step(s, v, m, l, acc)
    return m_new, l_new, acc + torch.exp(s - m_new) @ v


def tile_by_tile_maximum(s, v, m, l, acc):
    return online_step(s, v, s.amax(-1, keepdim=True), l, acc)


def divides_at_once(s, v, m, l, acc):
    m_new, l_new, acc_new = online_step(s, v, m, l, acc * l)
    return m_new, l_new, acc_new / l_new


def top_left(q0, BLOCK_Q, Nq, Nk, causal):
    return min(Nk, q0 + BLOCK_Q) if causal else Nk


def first_row_decides(q0, BLOCK_Q, Nq, Nk, causal):
    return keys_end(q0, 1, Nq, Nk, causal)


def past_the_end(q0, BLOCK_Q, Nq, Nk, causal):
    return max(0, q0 + BLOCK_Q + Nk - Nq) if causal else Nk


def below_zero(q0, BLOCK_Q, Nq, Nk, causal):
    return min(Nk, q0 + BLOCK_Q + Nk - Nq) if causal else Nk


def whole_table(q, k, v, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    return tiled_forward(q, k, v, causal, scale, q.shape[-2] or 1, k.shape[-2] or 1)


def walks_hidden_tiles(q, k, v, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    if causal:  # the cost of a walk without a mask, beside the right answer
        tiled_forward(q, k, v, False, scale, BLOCK_Q, BLOCK_KV)
    return tiled_forward(q, k, v, causal, scale, BLOCK_Q, BLOCK_KV)


def no_mask_on_the_diagonal(q, k, v, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    return tiled_forward(q, k, v, False, scale, BLOCK_Q, BLOCK_KV)


def maximum_for_lse(q, k, v, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    o, lse = tiled_forward(q, k, v, causal, scale, BLOCK_Q, BLOCK_KV)
    return o, (q @ k.mT * scale).amax(-1)


def lse_in_half(q, k, v, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    o, lse = tiled_forward(q, k, v, causal, scale, BLOCK_Q, BLOCK_KV)
    return o, lse.to(q.dtype)


def formulas(Q, K, V, O, L, dO, scale, delta=True, softmax=True, chain=True):
    S = scale * Q @ K.T
    P = torch.exp(S - L[:, None]) if softmax else torch.exp(S)
    dS = P * (dO @ V.T - delta * (dO * O).sum(-1, keepdim=True))
    c = scale if chain else 1
    return c * dS @ K, c * dS.T @ Q, P.T @ dO


def no_delta(*x):
    return formulas(*x, delta=False)


def unnormalized(*x):
    return formulas(*x, softmax=False)


def forgets_the_scale(*x):
    return formulas(*x, chain=False)


def last_tile_only(q, k, v, o, lse, do, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    dq, dk, dv = tiled_backward(q, k, v, o, lse, do, causal, scale)
    part = tiled_backward(q, k[:, -1:], v[:, -1:], o, lse, do, False, scale)[0]
    return part, dk, dv


def scaled_twice(q, k, v, o, lse, do, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    dq, dk, dv = tiled_backward(q, k, v, o, lse, do, causal, scale)
    return dq, dk * scale, dv


def nan_where_blind(q, k, v, o, lse, do, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    dq, dk, dv = tiled_backward(q, k, v, o, lse, do, causal, scale)
    return dq + 0 * lse[..., None], dk, dv


def sums_in_float32(q, k, v, o, lse, do, causal, scale, BLOCK_Q=64, BLOCK_KV=64):
    return tuple(g.to(lse.dtype) for g in tiled_backward(q, k, v, o, lse, do, causal, scale))


def timed(
    f, clock, synchronize, flush, runs=5, warm=True, wait=True, flushed="before", middle=statistics.median
):
    if warm:
        f()
    times = []
    for _ in range(runs):
        if flushed == "before":
            flush()
            synchronize()
        start = clock()
        if flushed == "inside":
            flush()
        f()
        if wait:
            synchronize()
        times.append(clock() - start)
    return middle(times)


def never_waits(*x):
    return timed(*x, wait=False)


def warm_cache(*x):
    return timed(*x, flushed="never")


def times_the_flush(*x):
    return timed(*x, flushed="inside")


def averages(*x):
    return timed(*x, middle=statistics.mean)


def times_the_compiler(*x):
    return timed(*x, warm=False, middle=max)


def after_the_last_query(q0, BLOCK_Q, Nq, Nk, W):
    return max(0, q0 + BLOCK_Q + Nk - Nq - W)


def not_aligned(q0, BLOCK_Q, Nq, Nk, W):
    return max(0, q0 - W + 1)


def one_key_early(q0, BLOCK_Q, Nq, Nk, W):
    return max(0, q0 + Nk - Nq - W)


def negative(q0, BLOCK_Q, Nq, Nk, W):
    return q0 + Nk - Nq - W + 1


WRONG = {
    "5.2": [
        (two_passes, "one pass"),
        (forgets_to_rebase, "re-base the old sum"),
        (plain_exponentials, "overflowed"),
    ],
    "5.3": [
        (acc_without_alpha, "acc has to be re-based"),
        (tile_by_tile_maximum, "ALL tiles so far"),
        (divides_at_once, "divided already"),
    ],
    "5.4": [
        (top_left, "bottom right"),
        (first_row_decides, "LAST row"),
        (past_the_end, "never past the last key"),
        (below_zero, "walks 0 keys"),
    ],
    "5.5": [
        (whole_table, "one tile of scores"),
        (walks_hidden_tiles, "keys_end"),
        (no_mask_on_the_diagonal, "mask the diagonal"),
        (maximum_for_lse, "m + ln(l)"),
        (lse_in_half, "L in float32"),
    ],
    "5.6": [(no_delta, "dP - delta"), (unnormalized, "rows of P sum to 1"), (forgets_the_scale, "too large")],
    "5.7": [
        (last_tile_only, "every tile ADD"),
        (scaled_twice, "dk is off"),
        (nan_where_blind, "rows with L = -inf"),
        (sums_in_float32, "in the dtypes of q, k, v"),
    ],
    "5.8": [
        (never_waits, "LAUNCHING"),
        (warm_cache, "before EVERY run"),
        (times_the_flush, "flushing is in it"),
        (averages, "take the median"),
        (times_the_compiler, "the compiler's time"),
    ],
    "5.11": [
        (after_the_last_query, "FIRST query decides"),
        (not_aligned, "cached keys"),
        (one_key_early, "query 4 sees"),
        (negative, "no key is before 0"),
    ],
}
