"Plausible wrong answers to the exercises of notebook 03, and what their checks must say."

import math

import numpy as np
import torch

from llm_scratch.training import CrossEntropy


class Overflowing(CrossEntropy):
    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets, logits.logsumexp(-1, keepdim=True))
        return logits.exp().sum(-1).log() - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class AveragesAtOnce(CrossEntropy):
    @staticmethod
    def forward(ctx, logits, targets):
        return CrossEntropy.forward(ctx, logits, targets).mean().expand(1)


class WithoutOneHot(torch.autograd.Function):
    forward = CrossEntropy.forward

    @staticmethod
    def backward(ctx, grad):
        logits, _, lse = ctx.saved_tensors
        return (logits.float() - lse).exp() * grad.unsqueeze(-1), None


class IgnoresUpstream(torch.autograd.Function):
    forward = CrossEntropy.forward

    @staticmethod
    def backward(ctx, grad):
        return CrossEntropy.backward(ctx, torch.ones_like(grad))


def _adamw(params, states, group, corrects=True, apart=True, outside=True):
    lr, eps, (b1, b2) = group["lr"], group["eps"], group["betas"]
    for p, state in zip(params, states, strict=True):
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        g = p.grad + (0 if apart else group["weight_decay"] * p)
        m = state["exp_avg"].lerp_(g, 1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
        first, second = (1 - b1 ** state["step"], 1 - b2 ** state["step"]) if corrects else (1, 1)
        p.mul_(1 - lr * group["weight_decay"] * apart)
        root = (v / second).sqrt() + eps if outside else (v / second + eps).sqrt()
        p.sub_(lr * m / first / root)


def forgets_correction(*args):
    _adamw(*args, corrects=False)


def decays_by_gradient(*args):
    _adamw(*args, apart=False)


def eps_inside(*args):
    _adamw(*args, outside=False)


def forgets_everything(params, states, group):
    _adamw(params, [{} for _ in states], group)


def to_zero(step, lr_max, lr_min, warmup, total):
    if step < warmup:
        return lr_max * step / warmup
    done = min(1.0, (step - warmup) / (total - warmup))
    return max(lr_min, lr_max * 0.5 * (1 + math.cos(math.pi * done)))


def rises_again(step, lr_max, lr_min, warmup, total):
    if step < warmup:
        return lr_max * step / warmup
    return lr_min + (lr_max - lr_min) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def from_the_start(step, lr_max, lr_min, warmup, total):
    if step < warmup:
        return lr_max * step / warmup
    if step == warmup:
        return lr_max
    return lr_min + (lr_max - lr_min) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def one_by_one(parameters, max_norm):
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.norm() for g in grads]).norm()
    for g in grads:
        g.mul_(min(1.0, max_norm / (g.norm().item() + 1e-6)))
    return total


def always_scales(parameters, max_norm):
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.norm() for g in grads]).norm()
    for g in grads:
        g.mul_(max_norm / (total + 1e-6))
    return total


def says_the_norm_after(parameters, max_norm):
    params = [p for p in parameters if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    return torch.stack([p.grad.norm() for p in params]).norm().round()


def with_a_generator(ids, batch_size, context_length, seed, step, device="cpu"):
    starts = torch.randint(len(ids) - context_length, (batch_size, 1)).numpy()
    windows = torch.from_numpy(ids[starts + np.arange(context_length + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def misses_the_last(ids, batch_size, context_length, seed, step, device="cpu"):
    starts = np.random.Philox(key=[seed, step]).random_raw(batch_size)
    starts = (starts % np.uint64(len(ids) - context_length - 1)).astype(np.int64)[:, None]
    windows = torch.from_numpy(ids[starts + np.arange(context_length + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def adds_seed_and_step(ids, batch_size, context_length, seed, step, device="cpu"):
    starts = np.random.default_rng(seed + step).integers(len(ids) - context_length, size=(batch_size, 1))
    windows = torch.from_numpy(ids[starts + np.arange(context_length + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def damped(params, velocities, lr, beta):
    torch._foreach_lerp_(velocities, [p.grad for p in params], 1 - beta)
    torch._foreach_add_(params, velocities, alpha=-lr)


def new_velocities(params, velocities, lr, beta):
    velocities = [beta * u + p.grad for u, p in zip(velocities, params, strict=True)]
    torch._foreach_add_(params, velocities, alpha=-lr)


WRONG = {
    "3.1": [
        (Overflowing, "subtract the largest logit first"),
        (AveragesAtOnce, "one number for each position"),
        (WithoutOneHot, "the 1 at the token that came is missing"),
        (IgnoresUpstream, "upstream gradient"),
    ],
    "3.4": [
        (forgets_correction, "1 - beta1**t"),
        (decays_by_gradient, "must not go through the gradient"),
        (eps_inside, "eps is added to the root"),
        (forgets_everything, "kept in the state"),
    ],
    "3.5": [
        (to_zero, "mean of peak and floor"),
        (rises_again, "would rise again"),
        (from_the_start, "begins after the ramp"),
    ],
    "3.6": [
        (one_by_one, "one factor for all"),
        (always_scales, "short enough stays as it is"),
        (says_the_norm_after, "before clipping"),
    ],
    "3.7": [
        (with_a_generator, "no generator may carry state"),
        (misses_the_last, "two windows"),
        (adds_seed_and_step, "must give another batch"),
    ],
    "3.8": [(damped, "beta times"), (new_velocities, "changed in place")],
}
