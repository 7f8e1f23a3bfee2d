"Plausible wrong answers to the exercises of notebook 06, and what their checks must say."

import math

import numpy as np

from llm_scratch.experiments import isoflop_law, orthogonalize, power_law, tokens_to, valley


def polynomial(x, rounds):
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def forgets_to_normalize(matrix, rounds=5):
    return polynomial(matrix, rounds)


def one_norm_for_all(matrix, rounds=5):
    return polynomial(matrix / matrix.norm(), rounds)


def one_round(matrix, rounds=5):
    return orthogonalize(matrix, 1)


def only_normalizes(matrix, rounds=5):
    return matrix / matrix.norm(dim=(-2, -1), keepdim=True)


def straight_line(row, loss, key="tokens"):
    x, y = row["valid"][key], row["valid"]["valid_loss"]
    for i, value in enumerate(y):
        if value <= loss:
            return (
                float(x[0])
                if i == 0
                else x[i - 1] + (y[i - 1] - loss) / (y[i - 1] - value) * (x[i] - x[i - 1])
            )


def next_evaluation(row, loss, key="tokens"):
    return next(
        (t for t, v in zip(row["valid"][key], row["valid"]["valid_loss"], strict=True) if v <= loss), None
    )


def tokens_only(row, loss, key="tokens"):
    return tokens_to(row, loss)


def last_when_never(row, loss, key="tokens"):
    return tokens_to(row, loss, key) or row["valid"][key][-1]


def unweighted(batches, tokens):
    slope, fewest = np.polyfit(batches, tokens, 1)
    if slope <= 0:
        raise ValueError("no critical batch size")
    return fewest / slope, fewest


def slope_itself(batches, tokens):
    slope, fewest = np.polyfit(batches, tokens, 1, w=1 / np.asarray(tokens))
    return slope, fewest


def never_complains(batches, tokens):
    slope, fewest = np.polyfit(batches, tokens, 1, w=1 / np.asarray(tokens))
    return fewest / slope, fewest


def lowest_point(x, y):
    i = int(np.argmin(y))
    return x[i], y[i]


def over_x_itself(x, y):
    a, b, c = np.polyfit(x, y, 2)
    return -b / (2 * a), c - b * b / (4 * a)


def takes_any_parabola(x, y):
    a, b, c = np.polyfit(np.log(x), y, 2)
    return math.exp(min(700, -b / (2 * a))), c - b * b / (4 * a)


def logarithm_of_the_factor(x, y):
    return tuple(np.polyfit(np.log(x), np.log(y), 1))


def by_the_ends(x, y):
    a = math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])
    return a, y[0] / x[0] ** a


def noisy_from_the_start(curves, noise, draws=1000, seed=0):
    _, laws = isoflop_law(curves, noise, draws, seed)
    return isoflop_law(curves, noise, draws, seed)[0], laws[1:]


def without_noise(curves, noise, draws=1000, seed=0):
    return isoflop_law(curves, 0.0, draws, seed)


def one_draw_for_all(curves, noise, draws=1000, seed=0):
    best, laws = isoflop_law(curves, 0.0, 0)
    return best, laws * (draws + 1)


WRONG = {
    "6.1": [
        (forgets_to_normalize, "singular values begin below 1"),
        (one_norm_for_all, "its own norm"),
        (one_round, "five rounds"),
        (only_normalizes, "instead of near 1"),
    ],
    "6.2": [
        (straight_line, "halfway in the logarithm"),
        (next_evaluation, "halfway in the logarithm"),
        (tokens_only, "about seconds"),
        (last_when_never, "never reached"),
    ],
    "6.3": [
        (unweighted, "weigh the errors"),
        (slope_itself, "critical, not"),
        (never_complains, "raise ValueError"),
    ],
    "6.4": [
        ((lowest_point, power_law), "between two of the points"),
        ((over_x_itself, power_law), "the floor lies at 3 million"),
        ((takes_any_parabola, power_law), "no floor within the data"),
        ((valley, logarithm_of_the_factor), "the factor 2"),
        ((valley, by_the_ends), "all points count alike"),
    ],
    "6.5": [
        (noisy_from_the_start, "the first law is that of the data"),
        (without_noise, "noise of its own"),
        (one_draw_for_all, "noise of its own"),
    ],
}
