"""Draw the map of the workbook: `python docs/map.py nbs/images/map.svg`. The ids and the curve are real.

The ids are those of the tokenizer that README trains; the curve is the first run of a recorded study.
"""

import json
import sys
from html import escape
from pathlib import Path

from llm_scratch import Tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
INK, BLUE, ORANGE, GREEN, PINK, GOLD = "#222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
W, H, GAP = 168, 150, 22  # of a station; between two


def text(x, y, words, size=13, color=INK, weight="normal", anchor="start", family="sans-serif"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}" '
        f'text-anchor="{anchor}" font-family="{family}" xml:space="preserve">{escape(words)}</text>'
    )


def station(i, number, name, color, inside):
    "A box of the way from text to story: a colored bar with the notebook's number, and a picture."
    x, y = 14 + i * (W + GAP), 14
    arrow = (
        f'<path d="M{x + W + 3} {y + H / 2}h12m-5-5l5 5l-5 5" fill="none" stroke="{INK}" stroke-width="2"/>'
    )
    return (
        f'<rect x="{x}" y="{y}" width="{W}" height="{H}" rx="8" fill="#fff" stroke="{color}" stroke-width="1.5"/>'
        f'<path d="M{x} {y + 28}v-20a8 8 0 0 1 8-8h{W - 16}a8 8 0 0 1 8 8v20z" fill="{color}"/>'
        + text(x + 10, y + 19, f"{number}  {name}", 14, "#fff", "bold")
        + (arrow if i < 4 else "")
        + inside(x + 10, y + 28)
    )


def lines(*rows, family="sans-serif", size=13, color=INK):
    return lambda x, y: "".join(
        text(x, y + 26 + 20 * n, r, size, color, family=family) for n, r in enumerate(rows)
    )


def layers(x, y):
    names = [("logits", "#ddd"), ("feed-forward", "#cfe6f3"), ("attention", GOLD), ("embedding", "#ddd")]
    boxes = ""
    for n, (label, color) in enumerate(names):
        boxes += f'<rect x="{x}" y="{y + 12 + 27 * n}" width="{W - 54}" height="22" rx="4" fill="{color}"/>'
        boxes += text(x + (W - 54) / 2, y + 27 + 27 * n, label, 12, anchor="middle")
    bracket = f'<path d="M{x + W - 48} {y + 39}h6v49h-6" fill="none" stroke="{INK}"/>'
    return boxes + bracket + text(x + W - 37, y + 68, "× L", 13)


def curve(x, y):
    rows = json.loads((ROOT / "data/results/laptop-learning-rate.json").read_text())["rows"]
    loss = rows[0]["train"]["loss"]
    low, high, width = min(loss), max(loss), W - 24
    at = [
        (x + 4 + width * n / (len(loss) - 1), y + 106 - 90 * (v - low) / (high - low))
        for n, v in enumerate(loss)
    ]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
    return (
        f'<path d="M{x + 2} {y + 10}v100h{width + 4}" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="{GREEN}" stroke-width="2.5"/>'
        + text(x + width, y + 30, f"loss {high:.1f} → {low:.1f}", 12, anchor="end")
    )


def strip(i, span, number, words, color, y):
    "A box below the way, under `span` stations from number `i` on."
    x, width = 14 + i * (W + GAP), span * (W + GAP) - GAP
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="34" rx="8" fill="#fff" stroke="{color}" stroke-width="1.5"/>'
        + text(x + 10, y + 22, number, 13, color, "bold")
        + text(x + 10 + 9 * len(number) + 4, y + 22, words, 12.5)
    )


def draw() -> str:
    sample = ROOT / "data" / "tales_sample.txt"
    tokenizer = Tokenizer(*train_bpe(sample, vocab_size=1000), ["<|endoftext|>"])
    ids = tokenizer.encode("Once upon a time, Nina found a map in an old bottle.")
    rows = [" ".join(f"{i:>3}" for i in ids[n : n + 4]) for n in range(0, len(ids), 4)]
    width, height = 28 + 5 * W + 4 * GAP, 14 + H + 2 * 46 + 14
    body = [
        station(0, "00", "text", PINK, lines("Once upon a time,", "Nina found a map", "in an old bottle.")),
        station(1, "01", "tokens", ORANGE, lines(*rows, family="monospace", size=14)),
        station(2, "02", "model", BLUE, layers),
        station(3, "03", "training", GREEN, curve),
        station(4, "04", "story", PINK, lines("“This must be", "a treasure!”", "she whispered.", "“Will you come", "with me?”")),
        strip(0, 2, "01a", "the tokenizer at native speed", ORANGE, 14 + H + 12),
        strip(2, 1, "05", "FlashAttention", "#9A6700", 14 + H + 12),
        strip(3, 1, "05a", "fused products", "#9A6700", 14 + H + 12),
        strip(4, 1, "06", "experiments", GREEN, 14 + H + 12),
        strip(0, 3, "notes", "GPUs, numerics, parallelism, inference, scaling, alignment", "#777", 14 + H + 58),
        strip(3, 2, "10", "all of it as one command: llm_scratch", "#777", 14 + H + 58),
    ]  # fmt: skip
    frame = f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return head + frame + "\n".join(body) + "</svg>\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
