"Plausible wrong answers to the exercises of notebook 04, and what their checks must say."

import torch


def divides_probabilities(logits, temperature):
    return (logits.float().softmax(-1) / temperature).log()


def overflows(logits, temperature):
    return logits.float() / temperature


def one_maximum_for_all(logits, temperature):
    return (logits.float() - logits.float().max()) / temperature


def multiplies(logits, temperature):
    return (logits.float() - logits.float().amax(-1, keepdim=True)) * temperature


def keeps_ties(logits, k):
    return logits >= logits.topk(min(k, logits.shape[-1])).values[..., -1:]


def in_order_of_size(logits, k):
    return (torch.arange(logits.shape[-1]) < k).expand(logits.shape)


def drops_the_crossing_token(probs, p):
    ordered, order = probs.sort(dim=-1, descending=True)
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) <= p)


def forgets_to_sort_back(probs, p):
    ordered = probs.sort(dim=-1, descending=True).values
    return ordered.cumsum(-1) - ordered < p


def keeps_one_too_many(probs, p):
    ordered, order = probs.sort(dim=-1, descending=True)
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered <= p)


def not_strict(probs, u):
    return (probs.cumsum(-1) >= u[..., None] * probs.sum(-1, keepdim=True)).int().argmax(-1)


def not_scaled(probs, u):
    return (probs.cumsum(-1) > u[..., None]).int().argmax(-1)


def takes_the_likeliest(probs, u):
    return probs.argmax(-1)


def pads_on_the_right(windows):
    T = max(map(len, windows))
    padding = [T - len(w) for w in windows]
    return torch.tensor([w + [0] * pad for pad, w in zip(padding, windows, strict=True)]), torch.tensor(
        padding
    )


def returns_lengths(windows):
    T = max(map(len, windows))
    ids = torch.tensor([[0] * (T - len(w)) + w for w in windows])
    return ids, torch.tensor([len(w) for w in windows])


def token_by_token(tokenizer, ids):
    for token in ids:
        yield tokenizer.decode([token])


def all_at_the_end(tokenizer, ids):
    yield tokenizer.decode(list(ids))


def forgets_the_rest(tokenizer, ids):
    pending = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):
            yield text
            pending = []


def an_absolute_bar(probs, m):
    return probs >= m


def one_bar_for_all_rows(probs, m):
    return probs >= m * probs.max()


def judges_the_same_position(model, ids):
    return model(ids[None])[0].log_softmax(-1).gather(-1, ids[:, None]).mean().item()


def a_sum(model, ids):
    return model(ids[None, :-1])[0].log_softmax(-1).gather(-1, ids[1:, None]).sum().item()


def greedy_only(next_logp, width, steps):
    ids, total = [], 0.0
    for _ in range(steps):
        logp, token = next_logp(ids).max(-1)
        ids, total = [*ids, int(token)], total + float(logp)
    return ids, total


def adds_chances(next_logp, width, steps):
    beams = [(0.0, [])]
    for _ in range(steps):
        longer = [
            (total + chance, [*ids, token])
            for total, ids in beams
            for token, chance in enumerate(next_logp(ids).exp().tolist())
        ]
        beams = sorted(longer, key=lambda beam: beam[0], reverse=True)[:width]
    return beams[0][1], beams[0][0]


def never_cuts(next_logp, width, steps):
    beams = [(0.0, [])]
    for _ in range(steps):
        beams = [
            (total + logp, [*ids, token])
            for total, ids in beams
            for logp, token in zip(*[x.tolist() for x in next_logp(ids).topk(min(width, 2))], strict=True)
        ]
    return max(beams)[::-1]


WRONG = {
    "4.1": [
        (divides_probabilities, "divide the logits"),
        (overflows, "subtract the largest"),
        (one_maximum_for_all, "each row's own"),
        (multiplies, "divide the logits"),
    ],
    "4.2": [
        (keeps_ties, "compare ranks"),
        (in_order_of_size, "order of size"),
    ],
    "4.3": [
        (drops_the_crossing_token, "crosses the line"),
        (forgets_to_sort_back, "order of the input"),
        (keeps_one_too_many, "nothing more is needed"),
    ],
    "4.4": [
        (not_strict, "strictly"),
        (not_scaled, "scale the darts"),
        (takes_the_likeliest, "hit 0, 0, 1, 2"),
    ],
    "4.6": [(pads_on_the_right, "pad on the left"), (returns_lengths, "padded slots")],
    "4.7": [
        (token_by_token, "comes whole"),
        (all_at_the_end, "after one token"),
        (forgets_the_rest, "must come out after all"),
    ],
    "4.8": [(an_absolute_bar, "relative to the likeliest"), (one_bar_for_all_rows, "its own bar")],
    "4.10": [(judges_the_same_position, "t + 1"), (a_sum, "not the sum")],
    "4.11": [
        (greedy_only, "width 2 must find"),
        (adds_chances, "width 1 is greedy"),
        (never_cuts, "compete together"),
    ],
}
