"Plausible wrong answers to the exercises of notebook 02, and what their checks must say."

import math

import torch
import torch.nn.functional as F

from llm_scratch.model import (
    RotaryPositionalEmbedding,
    SwiGLU,
    flops,
    rope_tables,
    scaled_dot_product_attention,
    silu,
)


def divides_by_length(self, x):
    return x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps) * self.weight


def squares_in_half(self, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)


def subtracts_the_mean(self, x):
    return F.layer_norm(x, x.shape[-1:]) * self.weight


def overflowing_silu(x):
    return x * x.exp() / (1 + x.exp())


def gates_the_signal(self, x):
    return self.w2(self.w1(x) * silu(self.w3(x)))


def slow_tables(theta, d_k, max_seq_len, device):
    speeds = theta ** (-torch.arange(d_k // 2) / d_k)
    angles = torch.arange(max_seq_len)[:, None] * speeds
    return angles.cos(), angles.sin()


def narrow_tables(theta, d_k, max_seq_len, device):
    speeds = theta ** (-torch.arange(0, d_k, 2) / d_k) * (1 + 1e-7)
    angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()


def turns_halves(self, x, positions=None):
    where = slice(x.shape[-2]) if positions is None else positions
    cos, sin = self.cos[where].repeat(1, 2), self.sin[where].repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def turns_backwards(self, x, positions=None):
    where = slice(x.shape[-2]) if positions is None else positions
    cos, sin = self.cos[where], self.sin[where]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)


def overflowing_softmax(x, dim):
    return x.exp() / x.exp().sum(dim, keepdim=True)


def one_maximum(x, dim):
    e = (x - x.max()).exp()
    return e / e.sum(dim, keepdim=True)


def torch_softmax(x, dim):
    return torch.softmax(x, dim)


def unscaled(Q, K, V, mask=None, causal=False):
    return scaled_dot_product_attention(Q * math.sqrt(Q.shape[-1]), K, V, mask, causal)


def aligned_at_the_top(Q, K, V, mask=None, causal=False):
    T, S = Q.shape[-2], K.shape[-2]
    past = torch.ones(T, S, dtype=torch.bool).tril()
    return scaled_dot_product_attention(Q, K, V, past if causal else mask)


def tiles_the_heads(Q, K, V, mask=None, causal=False):
    if Q.ndim == 4:
        times = Q.shape[1] // K.shape[1]
        K, V = K.repeat(1, times, 1, 1), V.repeat(1, times, 1, 1)
    return scaled_dot_product_attention(Q, K, V, mask, causal)


def cuts_after_moving(self, x, positions=None, mask=None, remember=None):
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, -1, T, self.d_head) for p in (self.q_proj, self.k_proj, self.v_proj))
    return self.output_proj(self.attention(q, k, v, causal=T > 1).transpose(1, 2).flatten(2))


def turns_values(self, x, positions=None, mask=None, remember=None):
    parts = (p(x).unflatten(-1, (-1, self.d_head)) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (part.transpose(1, 2) for part in parts)
    if self.rope is not None:
        q, k, v = self.rope(q, positions), self.rope(k, positions), self.rope(v, positions)
    return self.output_proj(self.attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


def loses_the_stream(self, x, positions, mask, remember):
    x = self.ln1(x)
    x = x + self.attn(x, positions, mask, remember)
    x = self.ln2(x)
    return x + self.ffn(x)


def forgets_positions(self, x, positions, mask, remember):
    x = x + self.attn(self.ln1(x))
    return x + self.ffn(self.ln2(x))


def always_pre(self, x, positions, mask, remember):
    x = x + self.attn(self.ln1(x), positions, mask, remember)
    return x + self.ffn(self.ln2(x))


def multiply_adds(*args, **kwargs):
    return {part: n // 2 for part, n in flops(*args, **kwargs).items()}


def twice_for_training(config, batch_size=1, tokens=None, cached=0, training=False):
    return {part: n * (1 + training) for part, n in flops(config, batch_size, tokens, cached).items()}


def looks_ahead(T, S, window):
    return (torch.arange(S - T, S)[:, None] - torch.arange(S)).abs() < window


def one_too_many(T, S, window):
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return (distance >= 0) & (distance <= window)


def not_divided(Q, K, V, mask):
    scores = (Q @ K.T * K.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    return scores.exp() @ V


def nan_where_empty(Q, K, V, mask):
    return torch.softmax((Q @ K.T * K.shape[-1] ** -0.5).masked_fill(~mask, -math.inf), -1) @ V


turn = RotaryPositionalEmbedding.forward
WRONG = {
    "2.1": [
        (divides_by_length, "the 1/D is missing"),
        (squares_in_half, "overflows float16"),
        (subtracts_the_mean, "does not subtract the mean"),
    ],
    "2.2": [((overflowing_silu, SwiGLU.forward), "overflows"), ((silu, gates_the_signal), "w1 is the gate")],
    "2.3": [
        ((slow_tables, turn), "pairs turn by"),
        ((narrow_tables, turn), "float64"),
        ((rope_tables, turns_halves), "another convention"),
        ((rope_tables, turns_backwards), "backwards"),
    ],
    "2.4": [
        (overflowing_softmax, "subtract the maximum first"),
        (one_maximum, "a maximum of its own"),
        (torch_softmax, "gives zeros"),
    ],
    "2.5": [
        (unscaled, "root of K"),
        (aligned_at_the_top, "the LAST query"),
        (tiles_the_heads, "repeat each key head"),
    ],
    "2.6": [(cuts_after_moving, "cut the width first"), (turns_values, "not values")],
    "2.7": [
        (loses_the_stream, "the stream itself is not normalized"),
        (forgets_positions, "must be handed"),
        (always_pre, "post:"),
    ],
    "2.8": [(multiply_adds, "two operations"), (twice_for_training, "three products")],
    "2.10": [(looks_ahead, "successors"), (one_too_many, "counts the token itself")],
    "2.12": [(not_divided, "divide by the sum"), (nan_where_empty, "0 / 0 is NaN")],
}
