"""The compiled tokenizer against the plain one, and against pages of memory that may not be touched."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from unittest.mock import mock_open

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_scratch import tokenizer
from llm_scratch.data import END, tales

pytest.importorskip("numba")
from numba import njit

from llm_scratch import bpe_engine as engine

PIECES = [
    "a", "B", "é", "中", "1", "٣", "½", "'", "s", "ll", "'ve", "'re", " ", "  ", "\n", "\t", "\u3000", "\xa0", "!", "—",
    "😀", "\u2028", "'t", "x" * 30, "\x1c", "\x85", " 's", " the", "Once upon", "q" * 17, END, "<|end", "<|end|>", "\u0301",
    "\r", "\r\n", "12345", "'S", "'Ll", "'ſ", "“", "”a", "!?", "\n\n   ", "    ", "\t",
]  # fmt: skip
BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture(scope="module")
def text():
    return "".join(f"{story}\n{END}\n" for story in tales(400_000))


@pytest.fixture(scope="module")
def path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "tales.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def learned(path):
    os.environ["LLM_SCRATCH_ENGINE"] = "plain"
    try:
        return tokenizer.train_bpe(path, 1500, [END])
    finally:
        del os.environ["LLM_SCRATCH_ENGINE"]


CL100K = (  # as tiktoken writes it today
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
PATTERNS = {
    "gpt2": tokenizer.GPT2_PATTERN,
    "gpt4": tokenizer.GPT4_PATTERN,
    "qwen": tokenizer.GPT4_PATTERN.replace("{1,3}", ""),
    "tiktoken": CL100K,
}
MANY = int(os.environ.get("FUZZ", 1))  # FUZZ=20 pytest ... draws twenty times as many


@pytest.mark.parametrize("name", PATTERNS)
def test_same_ids_on_random_texts(learned, name, monkeypatch):
    fast, plain = (tokenizer.Tokenizer(*learned, [END, "<|end|>"], PATTERNS[name]) for _ in range(2))
    draw = random.Random(time.time_ns())
    for _ in range(10 * MANY):
        texts = ["".join(draw.choices(PIECES, k=draw.randint(0, 60))) for _ in range(300)]
        monkeypatch.setenv("LLM_SCRATCH_ENGINE", "plain")
        expected = plain.encode_batch(texts)
        monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
        for text, ids in zip(texts, expected, strict=True):
            assert fast.encode(text) == ids, ascii(text)


@pytest.mark.parametrize("name", ["gpt2", "tiktoken"])
def test_same_ids_as_tiktoken(learned, name, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    ours = tokenizer.Tokenizer(*learned, [END], PATTERNS[name])
    ranks = {token: i for i, token in ours.vocab.items() if i not in ours.special_tokens.values()}
    theirs = tiktoken.Encoding(
        "local", pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=ours.special_tokens
    )
    draw = random.Random(time.time_ns())
    for _ in range(10 * MANY):
        texts = ["".join(draw.choices(PIECES, k=draw.randint(0, 60))) for _ in range(300)]
        expected = theirs.encode_batch(texts, num_threads=1, allowed_special="all")
        for text, ids in zip(texts, expected, strict=True):
            assert ours.encode(text) == ids, ascii(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_chunk_size(learned, name, monkeypatch, tmp_path):
    "Chunks of 1 to 200 bytes: whatever lies across their ends, nothing changes."
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    draw = random.Random(time.time_ns())
    text = "".join(draw.choices(PIECES, k=700))
    (tmp_path / "text.txt").write_bytes(text.encode())
    one = tokenizer.Tokenizer(*learned, [END], PATTERNS[name])
    expected = one.encode(text)
    for size in range(2, 200, 3):
        monkeypatch.setattr(tokenizer, "_PIECE", size)
        assert one.encode_to_array(tmp_path / "text.txt", 1, progress=False).tolist() == expected
        assert one.encode(text) == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_same_merges_whatever_the_pattern(path, name, monkeypatch):
    results = []
    for which in ("plain", "fast"):
        monkeypatch.setenv("LLM_SCRATCH_ENGINE", which)
        results.append(tokenizer.train_bpe(path, 500, [END], pattern=PATTERNS[name]))
    assert results[0] == results[1]


@pytest.mark.parametrize("vocab_size", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 20])
def test_narrow_and_wide_ids(learned, vocab_size, monkeypatch, tmp_path):
    vocab, merges = learned
    fast, plain = (
        tokenizer.Tokenizer({**vocab, vocab_size - 1: b"<|last|>"}, merges, [END, "<|last|>"])
        for _ in range(2)
    )
    text = "Once upon a time<|last|> zqzqzqzqzqzq " + "q" * 100 + " é中😀" * 5 + "x" * 70_000 + "<|last|>"
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "plain")
    expected = plain.encode(text)
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    assert fast.encode(text) == expected and expected[-1] == vocab_size - 1
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    ids = fast.encode_to_array(tmp_path / "text.txt", 1, progress=False)
    assert ids.tolist() == expected and ids.dtype == (np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@pytest.mark.parametrize("name", PATTERNS)
def test_same_pretokens_on_random_texts(name):
    "Ids can be the same although a word was cut in two: so the words themselves are compared."
    split, draw = tokenizer.pretokenizer(PATTERNS[name]), random.Random(time.time_ns())
    for _ in range(3000 * MANY):
        text = "".join(draw.choices(PIECES, k=draw.randint(0, 60)))
        memory = engine.Memory(tokenizer.engine_pattern(PATTERNS[name]))
        assert memory.count(text.encode(), NO_SPECIAL) == -1
        assert counted(memory) == Counter(word.encode() for word in split(text)), ascii(text)


NO_SPECIAL = engine.Special({})


def edges(ranges, last):
    "Characters at the ends of ranges of first two bytes, and just outside of them."
    for first, end, second, stop in ranges:
        for pair in ((first, second), (first, second - 1), (end, stop), (end, stop + 1)):
            for third in last:
                yield bytes(pair + third).decode("utf-8", "ignore")


SCRIPTS = [
    *edges(engine.LATIN_GREEK + engine.CYRILLIC_ARABIC, [()]),
    *edges(engine.LETTERS3, [(0x80,), (0xBF,)]),
    "×",
    "÷",
    *"жяשאنيπΩ中한été",
]


@pytest.mark.parametrize("name", PATTERNS)
def test_same_pretokens_in_many_scripts(name):
    split, draw = tokenizer.pretokenizer(PATTERNS[name]), random.Random(time.time_ns())
    for _ in range(500 * MANY):
        pieces = draw.choices(SCRIPTS, k=draw.randint(0, 60)) + draw.choices(PIECES, k=draw.randint(0, 20))
        draw.shuffle(pieces)
        text = "".join(pieces)
        memory = engine.Memory(tokenizer.engine_pattern(PATTERNS[name]))
        assert memory.count(text.encode(), NO_SPECIAL) == -1
        assert counted(memory) == Counter(word.encode() for word in split(text)), ascii(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_white_space_across_the_edge_of_a_block(name):
    split = tokenizer.pretokenizer(PATTERNS[name])
    for k in range(50, 70):
        for end in ("", "\n", "\u3000\n", "\u3000y", " y", "!"):
            text = "x" * k + "\n \u3000\u3000\u3000" + end
            memory = engine.Memory(tokenizer.engine_pattern(PATTERNS[name]))
            memory.count(text.encode(), NO_SPECIAL)
            assert counted(memory) == Counter(word.encode() for word in split(text)), (k, end)


@settings(max_examples=300 * MANY, deadline=None)
@given(st.text(), st.sampled_from([*PATTERNS.values()]))
def test_same_pretokens_on_any_text(text, pattern):
    memory = engine.Memory(tokenizer.engine_pattern(pattern))
    assert memory.count(text.encode(), engine.Special({})) == -1
    assert counted(memory) == Counter(word.encode() for word in tokenizer.pretokenizer(pattern)(text))


def counted(memory):
    symbols, at, counts = memory.listed(np.uint16), 0, {}
    while at < len(symbols):
        count, length = symbols[at : at + 8].view(engine.HEAD)[0].tolist()
        counts[bytes(symbols[at + 8 :][:length].astype(np.uint8))] = count
        at += 8 + length
    return counts


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*map(str.encode, PIECES), b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80"]
            + [b"\xd0", b"\xe6\x9d", b"\x9f", "Приве".encode(), "東京特許".encode()]
        ),
        max_size=80,
    )
)
def test_bytes_that_are_not_utf8_are_found(pieces):
    data = b"".join(pieces)
    memory = engine.Memory()
    memory.read(b"\x9f" * (len(data) + 64))  # what the buffer held before must not matter
    bad = memory.count(data, engine.Special({}))
    try:
        data.decode()
        assert bad == -1
    except UnicodeDecodeError as error:
        assert bad == error.start
    assert sum(len(word) * n for word, n in counted(memory).items()) == len(data)  # nothing is lost


def test_same_merges(path, monkeypatch, tmp_path):
    draw = random.Random(time.time_ns())
    few = "".join(draw.choices(["a", "b", "ab", " a", "aab", "c", "\n", "é"], k=20_000))
    odd = tmp_path / "odd.txt"
    odd.write_text(few + "x" * 3000 + "yz" * 2000, encoding="utf-8")
    for source, size in ((path, 2500), (odd, 600)):
        results = []
        for which in ("plain", "fast"):
            monkeypatch.setenv("LLM_SCRATCH_ENGINE", which)
            results.append(tokenizer.train_bpe(source, size, [END, "ab"]))
        assert results[0] == results[1]


def test_texts_instead_of_a_file(path, text, monkeypatch):
    texts = text.split(END)
    for which in ("plain", "fast"):
        monkeypatch.setenv("LLM_SCRATCH_ENGINE", which)
        assert tokenizer.train_bpe(iter(texts), 600) == tokenizer.train_bpe(path, 600)
        with pytest.raises(ValueError, match="empty"):
            tokenizer.train_bpe([], 300)


def test_files_and_streams(learned, path, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    one = tokenizer.Tokenizer(*learned, [END])
    ids = one.encode(text)
    monkeypatch.setattr(tokenizer, "_PIECE", 5000)
    for processes in (1, 3):
        assert one.encode_file(path, tmp_path / "ids.npy", processes, progress=False) == len(ids)
        assert np.load(tmp_path / "ids.npy").tolist() == ids
        in_memory = one.encode_to_array(path, processes, progress=False)
        assert in_memory.tolist() == ids and in_memory.flags.owndata
    assert one.encode(text) == ids  # in pieces
    for size in (*range(1, 200, 13), 5000):
        piece = text[: 50 * size]
        cut = [piece[k : k + size] for k in range(0, len(piece), size)]
        assert list(one.encode_iterable(cut)) == one.encode(piece)


def test_bad_file_is_refused_and_nothing_is_written(learned, text, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    bad, one, good = tmp_path / "bad.txt", tokenizer.Tokenizer(*learned, [END]), text.encode()
    bad.write_bytes(good[:300_000] + b"ab \xff cd" + good[:200_000] + b" \xff")
    with pytest.raises(ValueError, match="byte offset 300,003"):
        one.encode_file(bad, tmp_path / "ids.npy", progress=False)
    with pytest.raises(ValueError, match="byte offset 300,003"):
        tokenizer.train_bpe(bad, 300)
    monkeypatch.setattr(tokenizer, "_PIECE", 20_000)
    for threads in (1, 2, 30):  # 30: all spans are under way at once, and two of them fail
        with pytest.raises(ValueError, match="byte offset 300,003"):
            one.encode_to_array(bad, threads, progress=False)
        with pytest.raises(ValueError, match="byte offset 300,003"):
            tokenizer.train_bpe(bad, 300, num_processes=threads)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]
    assert one.decode(one.encode(text)) == text  # it is none the worse for that


def test_threads_share_a_tokenizer(learned, text, monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    one = tokenizer.Tokenizer(*learned, [END])
    pieces = [text[k : k + 700] for k in range(0, 100_000, 700)]
    expected, found = [one.encode(piece) for piece in pieces], {}
    threads = [
        threading.Thread(target=lambda t=t: found.update({t: [one.encode(piece) for piece in pieces]}))
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[t] == expected for t in range(4))


def test_large_ids_and_long_words(monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    vocab = {70_000 + byte: bytes([byte]) for byte in range(256)} | {
        99_999: b"ab",
        5: b"abab",
        80_000: b" abab",
    }
    merges = [(b"a", b"b"), (b"ab", b"ab"), (b" ", b"abab")]
    one = tokenizer.Tokenizer(vocab, merges)
    assert one.encode("abab abab aab") == [5, 80_000, 70_032, 70_097, 99_999]
    start = time.perf_counter()
    assert one.encode("ab" * 500_000 + " ") == [5] * 250_000 + [70_032]
    assert time.perf_counter() - start < 20  # quadratic time would be hours


@pytest.mark.parametrize("name", ["GPT2_PATTERN", "GPT4_PATTERN"])
def test_tables_that_grow_again_and_again_lose_nothing(name):
    # every batch or so the kernels stop, and go on in larger tables: in the middle of a stretch, and of a word
    pattern = getattr(tokenizer, name)
    kind, split = tokenizer.engine_pattern(pattern), tokenizer.pretokenizer(pattern)
    words = [f"{'Wörter' if k % 7 else 'a'}{k * k}{' ' if k % 3 else chr(10)}" for k in range(9000)]
    words += [f"{chr(97 + k % 26) * (20 + k % 40)}{k} " for k in range(2000)]  # long ones, too
    text = "".join(words[k * 7919 % len(words)] + "<|e|>" * (k % 1500 == 0) for k in range(len(words)))
    data, stops = text.encode(), []

    def barely(memory):
        reserve = memory.reserve
        memory.reserve = lambda words, longs, length: (
            stops.append(1),
            reserve(min(words, 256), min(longs, 256), length),
        )
        return memory

    memory, special = barely(engine.Memory(kind)), {b"<|e|>": 60_000}
    assert memory.count(data, engine.Special(special)) == -1
    plain = [piece for part in text.split("<|e|>") for piece in split(part)]
    assert counted(memory) == Counter(piece.encode() for piece in plain)
    assert len(stops) >= 3  # it did stop
    merges = np.array([[97 + k, 97 + k, 256 + k] for k in range(26)] + [[49, 50, 300], [300, 51, 301]])
    coder, roomy = (
        barely(engine.Coder(range(256), merges, special, kind)),
        engine.Coder(range(256), merges, special, kind),
    )
    roomy.reserve(1 << 18, 1 << 15, len(data))
    stops.clear()
    ids = coder.encode_array(data)
    assert len(stops) >= 3 and len(roomy) == 0
    assert np.array_equal(ids, roomy.encode_array(data)) and len(coder) == len(roomy)
    assert np.array_equal(ids, coder.encode_array(data))  # and from the cache


@pytest.mark.parametrize("first_id", [0, 100_000])  # ids of 2 and of 4 bytes
def test_new_words_that_wait(first_id, learned):
    vocab, merges = learned
    ids = {token: first_id + i for i, token in vocab.items()}
    rows = np.array([(ids[a], ids[b], ids[a + b]) for a, b in merges])
    byte_ids = [ids[bytes([byte])] for byte in range(256)]
    ranks = {(a, b): rank for rank, (a, b, _) in enumerate(rows.tolist())}
    merged, draw = rows[:, 2].tolist(), random.Random(1)
    make = lambda letters: " " + "".join(draw.choices("etaoinshrdlu", k=letters))
    known = [make(3) for _ in range(50)]
    words = []
    for length in [*range(1, 80), *range(1, 80)]:  # all lengths: in lanes, and too long for them
        new = [make(length) for _ in range(draw.choice([1, 2, 3, 20, 300]))]
        words += new + draw.choices(new, k=len(new))  # some again while they wait
        words += draw.choices(known, k=draw.choice([0, 10, 100, 9000]))  # so many that a gap is far behind
    coder = engine.Coder(byte_ids, rows, {})
    expected = {w: tokenizer.merge_word([byte_ids[b] for b in w.encode()], ranks, merged) for w in set(words)}
    text = "".join(words)
    for _ in range(2):
        got = coder.encode_array(text.encode())
        assert got.dtype == (np.uint32 if first_id else np.uint16)
        assert got.tolist() == [i for word in words for i in expected[word]]
    assert len(coder) == len(expected)
    for cut in range(1000, 1100):  # texts that end with words that wait
        piece = tokenizer.pretokenize(text[cut : cut + 200])
        ids_of = lambda w: tokenizer.merge_word([byte_ids[b] for b in w.encode()], ranks, merged)
        fresh = engine.Coder(byte_ids, rows, {})
        assert fresh.encode("".join(piece).encode()) == [i for word in piece for i in ids_of(word)]


def at_once(*jobs):
    "Results of functions that run at the same time, each in a thread; the first error is raised."
    start = threading.Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [
            done.result() for done in [pool.submit(lambda job=job: (start.wait(), job())[1]) for job in jobs]
        ]


@pytest.mark.parametrize("first_id", [0, 100_000])  # ids of 2 and of 4 bytes
@pytest.mark.parametrize(
    "limit", [1 << 21, 1 << 12]
)  # a cache that holds everything; one that is emptied again and again
def test_coders_share_what_they_know(first_id, limit, learned, monkeypatch):
    vocab, merges = learned
    ids = {token: first_id + i for i, token in vocab.items()}
    rows = np.array([(ids[a], ids[b], ids[a + b]) for a, b in merges])
    make = lambda tables=None: engine.Coder(
        [ids[bytes([byte])] for byte in range(256)], rows, {}, tables=tables
    )
    draw, judge = random.Random(2), make()
    words = [" " + "".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 90))) for _ in range(12_000)]
    texts = [
        "".join(words[k : k + 60]).encode() for k in range(0, len(words), 30)
    ]  # each word in two of them
    expected = [judge.encode(text) for text in texts]
    monkeypatch.setattr(engine.Coder, "LIMIT", limit)
    emptied = []
    for turn in range(3):
        tables = engine.Tables(512, 64)
        empty = tables.empty
        tables.empty = lambda empty=empty: (emptied.append(1), empty())
        coders = [make(tables) for _ in range(4)]

        def work(k, coders=coders):  # two begin with the same words, two elsewhere
            order = [*range(k // 2 * 100, len(texts)), *range(k // 2 * 100)]
            return order, [coders[k].encode_array(texts[i]).tolist() for i in order]

        for order, found in at_once(*(partial(work, k) for k in range(4))):
            assert found == [expected[i] for i in order]
        entered = np.count_nonzero(tables.slots["high"]) + np.count_nonzero(tables.longs["hash"])
        assert len(coders[0]) == len(coders[3]) == entered  # nothing twice
        counts, inline = tables.longs["more"] >> np.uint64(48), int(coders[0].state["inline"][0])
        assert (
            tables.longs["value"][counts > inline] % 4 == 0
        ).all()  # addresses where numbers of 4 bytes may lie
        in_arenas = tables.longs["length"].sum() + (
            counts[counts > inline].sum() << int(coders[0].state["width"][0])
        )
        assert tables.left + tables.total("arena_used") >= in_arenas  # also what is in those that are full
        if limit > 1 << 12:
            assert entered == len(judge)
            assert coders[turn].encode_array(b"".join(texts)).tolist() == [
                i for found in expected for i in found
            ]
    assert bool(emptied) == (limit == 1 << 12)
    assert len(tables.arenas) < 40


@njit(nogil=True)
def enter_in_step(address, text, starts, order, slots, mine, other):
    "Enters words in some order, and notes where; waits for another thread again and again."
    state = engine.state_at(address)
    for k, w in enumerate(order):
        if k % 4 == 0:
            engine.store64_last(mine, np.uint64(k))
            while engine.load64_first(other) < np.uint64(k):
                pass
        at, length = text + starts[w], starts[w + 1] - starts[w]
        low, high = engine.key_of_word(at, length, state)
        slots[w], _ = engine.value_of(at, length, low, high, state)
    engine.store64_last(mine, engine.ALL)


two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else False,
                               reason="threads that wait for each other take turns on one core")  # fmt: skip


@two_cores
@pytest.mark.parametrize("lengths", [(1, 15), (16, 30)])
@pytest.mark.parametrize("same", [True, False])  # words at the same time, or such as want the same slots
def test_words_that_threads_enter_at_the_same_time(lengths, same):
    draw = np.random.default_rng(0)
    sizes = draw.integers(lengths[0], lengths[1] + 1, 50_000)
    starts = np.cumsum([0, *sizes])
    for turn in range(8):
        text = draw.integers(0, 256, starts[-1] + engine.PAD).astype(np.uint8)
        text[draw.random(len(text)) < turn / 16] = 0  # zeros, too: an empty slot is full of them
        words = [text[a:b].tobytes() for a, b in pairwise(starts.tolist())]
        tables = engine.Tables(1 << 16, 1 << 16)  # so full that most words have to look for a place
        coders = [engine.Coder(range(256), np.array([[97, 98, 256]]), {}, tables=tables) for _ in range(2)]
        for coder in coders:
            coder.reserve(0, 0, len(text))
        found, steps = [np.zeros(len(words), np.int64) for _ in coders], np.zeros((2, 8), np.uint64)
        home = {word: k for k, word in enumerate(words)}  # any order will do at first
        orders = [np.array([*home.values()])] * 2
        if not same:  # neighbors are entered by different threads, then each other's
            alone = engine.Coder(
                range(256), np.array([[97, 98, 256]]), {}, tables=engine.Tables(1 << 16, 1 << 16)
            )
            alone.reserve(0, 0, len(text))
            places, step = np.zeros(len(words), np.int64), np.full(1, engine.ALL)
            enter_in_step(alone.address, text.ctypes.data, starts, orders[0], places, *[step.ctypes.data] * 2)
            by_home = orders[0][np.argsort(places[orders[0]])]
            orders = [np.concatenate([by_home[k::2], by_home[1 - k :: 2]]) for k in (0, 1)]
        jobs = (
            partial(
                enter_in_step,
                coders[k].address,
                text.ctypes.data,
                starts,
                orders[k],
                found[k],
                steps[k].ctypes.data,
                steps[1 - k].ctypes.data,
            )  # fmt: skip
            for k in (0, 1)
        )
        at_once(*jobs)
        assert len(coders[0]) == len(set(words)) <= 0.8 * (1 << 16)
        assert (found[0] == found[1]).all() and len(set(found[0][orders[0]].tolist())) == len(set(words))


@njit(nogil=True)
def remember_one_by_one(address, values, ids, n):
    state = engine.state_at(address)
    for k in range(len(values)):
        engine.remember(values[k], ids[k], n, state)


@njit(nogil=True)
def watch(values, ids, n, inline, width):
    "How many ids are wrong at the moment when there are said to be some."
    wrong = 0
    for k in range(len(values)):
        count = engine.load16_first(values[k] + engine.COUNT_AT)
        while count == engine.WAITS:
            count = engine.load16_first(values[k] + engine.COUNT_AT)
        at = values[k] if n <= inline else np.int64(engine.load64(values[k]))
        wrong += count != n
        for j in range(n):
            wrong += np.int64(engine.load64(at + (j << width)) & np.uint64(0xFFFF)) != ids[k, j]
    return wrong


@two_cores
@pytest.mark.parametrize("n", [1, 4, 7, 12])
def test_ids_are_there_when_their_number_is(n):
    coder, draw = engine.Coder(range(256), np.array([[97, 98, 256]]), {}), np.random.default_rng(n)
    for _ in range(5):
        slots = np.zeros(20_000, engine.SLOT)
        slots["more"] = engine.WAITS << 48
        values = slots.ctypes.data + engine.SLOT_BYTES * np.arange(len(slots)) + engine.VALUE_AT
        ids = draw.integers(1, 1 << 16, (len(slots), n))
        coder.reserve(0, 0, 4 * ids.size)
        inline, width = (int(coder.state[name][0]) for name in ("inline", "width"))
        (
            remember_one_by_one(coder.address, values[:0], ids[:0], n),
            watch(values[:0], ids[:0], n, inline, width),
        )
        jobs = (
            partial(watch, values, ids, n, inline, width),
            partial(remember_one_by_one, coder.address, values, ids, n),
        )
        assert at_once(*jobs)[0] == 0


@pytest.mark.parametrize("word", [b"few", b" thirteen letters", b"x" * (engine.FEW + 1), b" y" + b"z" * 200])
def test_word_that_waits_in_another_thread(word):
    merges = np.array([[97, 98, 256], [120, 120, 257], [101, 119, 258]])
    tables = engine.Tables()
    first, second = (engine.Coder(range(256), merges, {}, tables=tables) for _ in range(2))
    text = b"ab " + word + b" ab" + (b" new" + word) * 3 + b" ab"
    right = first.encode(text)
    known = len(first)
    table = tables.slots if len(word) <= engine.SHORT else tables.longs
    slot = np.flatnonzero(
        table["more"]
    )  # all words of one table wait, as if the first coder had only begun them
    for index in (0, 1, 2, 1 << 40):  # what is in their values meanwhile says nothing to others
        table["value"][slot], table["more"][slot] = index, engine.WAITS << 48
        assert second.encode(text) == right
        assert (table["value"][slot] == index).all() and (table["more"][slot] >> 48 == engine.WAITS).all()
    assert len(second) == known


def test_room_is_shared():
    tables = engine.Tables(1 << 12, 1 << 9)
    memories = [engine.Memory(tables=tables) for _ in range(5)]
    each = lambda name: [int(memory.state[name][0]) for memory in memories]
    assert each("most") == [int(0.8 * 4096) // 5] * 5 and each("most_long") == [int(0.8 * 512) // 5] * 5
    assert all(memory.lacks(0) for memory in memories)  # 81 long words are less than a batch
    memories[3].reserve(1000, 10, 10)
    assert each("num_longs") == [2048] * 5 and not any(memory.lacks(100) for memory in memories)
    assert memories[2].lacks(engine.SMALL[2] + 1) and not memories[2].lacks(engine.SMALL[2])
    with tables.alone():
        assert each("most") == [0] * 5 and all(memory.lock.locked() for memory in memories)
    assert sum(each("most")) <= 0.8 * 4096 and not memories[0].lock.locked()
    with pytest.raises(KeyError), tables.alone():
        raise KeyError
    assert min(each("most")) > 0 and not tables.turn.locked()  # an error does not stop the others for ever


def test_too_many_words_to_number(monkeypatch):
    memory = engine.Memory()
    memory.count(b"one two three", engine.Special({}))
    monkeypatch.setattr(engine, "MOST_SYMBOLS", len(memory.listed(np.uint16)) - 1)
    with pytest.raises(ValueError, match="at most 36 symbols in different words"):
        engine.train(memory, [bytes([byte]) for byte in range(256)], 300)


def test_every_pair_has_a_place(monkeypatch):
    draw = np.random.default_rng(0)
    for size in (0, 1, 2, 3, 100, 20_000):
        merges = draw.integers(max(2, size // 10), size=(size, 3))
        known = {(a, b): rank for rank, (a, b, _) in reversed([*enumerate(merges.tolist())])}
        for most in (1 << 16, 4):
            with monkeypatch.context() as patched:
                if most == 4:  # too few shifts: the table must be made larger
                    patched.setattr(engine, "MOST_SHIFTS", most)
                    patched.setattr(engine, "find_shifts", engine.find_shifts.py_func)
                pairs, shifts = engine.place_pairs(merges)
            assert shifts.max() < most and (pairs != 2**64 - 1).sum() == len(known)
            places = {
                int(entry) >> engine.RANK_BITS: int(entry) & engine.NEVER
                for entry in pairs
                if entry != 2**64 - 1
            }
            assert places == {a << engine.ID_BITS | b: rank for (a, b), rank in known.items()}
    assert len(pairs) > 2**15  # it was


def test_ids_that_are_too_large(monkeypatch):
    monkeypatch.setenv("LLM_SCRATCH_ENGINE", "fast")
    with pytest.raises(ValueError, match="below 2,097,151"):
        engine.Coder(range(256), np.array([[97, 98, engine.NO_ID]]), {})
    vocab = {byte: bytes([byte]) for byte in range(256)} | {engine.NO_ID: b"ab"}
    one = tokenizer.Tokenizer(vocab, [(b"a", b"b")])
    with pytest.warns(UserWarning, match="plain Python: the engine knows ids below 2,097,151"):
        assert one.encode("abab c") == [engine.NO_ID, engine.NO_ID, 32, 99]
    assert one.encode("ab") == [engine.NO_ID]  # said once
    vocab[engine.NO_ID - 1] = vocab.pop(engine.NO_ID)
    largest = tokenizer.Tokenizer(vocab, [(b"a", b"b")])
    assert largest.encode("abab c") == [engine.NO_ID - 1, engine.NO_ID - 1, 32, 99] and largest._crew


def test_words_that_want_the_same_slot():
    memory, draw, words = engine.Memory(), random.Random(0), []
    while len(words) < 1500:
        word = bytes(draw.choices(b"abcdefghijklmnopqrstuvwxyz", k=draw.randint(5, 12)))
        low, high = int.from_bytes(word[:8], "little"), int.from_bytes(word[8:], "little") | len(word) << 56
        if (low * int(engine.MIX1) ^ high * int(engine.MIX2)) % 2**64 >> 60 == 15:
            words.append(word)
    for _ in range(2):
        memory.count(b"\n".join(words), engine.Special({}))
    expected = Counter(words + [b"\n"] * (len(words) - 1))
    assert counted(memory) == {word: 2 * n for word, n in expected.items()}


def test_a_long_word_has_no_partner():
    "Its home is in the other table, and beside that lies anything, even what looks like its key."
    pair, key, home = engine.zeros(2, engine.SLOT), np.zeros(1, engine.KEY), np.zeros(1, np.int64)
    home[0] = pair.ctypes.data
    for high, found in ((5 << 56, 1), (0, 0)):  # a short word, a long one
        pair["low"][1] = key["low"][0] = 12345
        pair["high"][1] = key["high"][0] = high
        pair["value"] = 0
        assert engine.count_known(0, 1, key.ctypes.data, home.ctypes.data) == found
        assert pair["value"].tolist() == [0, found]
        out = np.zeros(16, np.uint16)
        j, end = engine.emit_known(0, 1, key.ctypes.data, home.ctypes.data, out.ctypes.data, 1, 7)
        assert (j, end) == (found, out.ctypes.data)  # a value without ids
    slot, key["low"][0] = engine.zeros(1, engine.LONG), 1 << 63 | 12345
    home[0] = slot.ctypes.data
    for slot["length"][0], slot["hash"][0] in product(
        (0, 20), (0, 1 << 63 | 12345)
    ):  # it, or what others see of it before
        assert engine.count_known(0, 1, key.ctypes.data, home.ctypes.data) == 0


def test_words_stay_at_home_when_tables_are_made_anew():
    memory, draw = engine.Memory(), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2500)]

    def at_home():
        slots, shift = memory.tables.slots, int(memory.state["shift"][0])
        keys = [(int(low), int(high)) for low, high in zip(slots["low"], slots["high"], strict=True)]
        home = lambda low, high: (low * int(engine.MIX1) ^ high * int(engine.MIX2)) % 2**64 >> shift
        return {key for k, key in enumerate(keys) if key[1] and home(*key) == k}

    memory.count("\n".join(words).encode(), engine.Special({}))
    assert memory.tables.slots.ctypes.data % engine.LINE == 0  # partners share a line of the cache
    before, longs = at_home(), len(memory.tables.longs)
    assert 1000 < len(before) < len(memory) - 300
    address, slots = memory.tables.slots.ctypes.data, len(memory.tables.slots)
    memory.reserve(0, longs, 0)  # the other table must grow; this one stays
    assert len(memory.tables.longs) > longs and memory.tables.slots.ctypes.data == address
    memory.reserve(slots, 0, 0)  # this one is filled again, in order of its slots
    assert len(memory.tables.slots) > slots and at_home() > before


GUARDED = """
import ctypes, mmap
import numpy as np
from llm_scratch import bpe_engine as engine

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def guarded(size):
    "Address of `size` bytes behind which nothing may be touched."
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + PAGE)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(PAGE), 0) == 0
    return address + whole - size

keep = []
merges = np.array([[97, 98, 256], [256, 256, 257]])
pieces = [b"a1" * 40, b"abab ab's", "\\u3000é中😀".encode(), b"x" * 40, b" ", b"'", b"\\xf0\\x9f", b"12!? ", b"ab" * 30,
          b" " + b"abcdefghij" * 2, b"b" * 29, b" " + b"ab" * 20, b"c" * 62, b"ba" * 40]
def texts():
    for n in [*range(0, 200), *range(200, 900, 7)]:
        yield b"".join(pieces[(n + k) % len(pieces)] for k in range(90))[:n] if n % 3 else (b"a1" * n)[:n]
    for k in range(260):  # some words wait, then comes a batch of nothing but such, as many as there can be
        yield b" known" * (600 + k) + b" a few new ones that wait" + b" known" * 300 + b"1a" * 300

for data in texts():
    n = len(data)
    pattern = [(0, 0, 0), (1, 3, 0), (1, 1, 1)][n % 3]
    coder = engine.Coder(range(256), merges, {b"<|e|>": 300}, pattern)
    coder.reserve(4 * n + 256, n // 16 + 256, n)
    coder.slots, coder.longs = coder.tables.slots, coder.tables.longs
    coder.state["arena_size"] = 4 * n  # no more than it asks for
    copied = ("slots", "longs", "masks", "new", "lanes", "pairs", "shifts", "merged", "byte_ranks", "byte_ids")
    sizes = {"text": n + engine.PAD, "out": coder.dtype.itemsize * (n + engine.PAD),
             "arena": 4 * n + engine.PAD, "starts": 8 * (engine.BATCH + 2),
             "keys": 16 * engine.BATCH, "homes": 8 * engine.BATCH, "distant": 8 * engine.BATCH}
    for name, size in (sizes | {name: getattr(coder, name).nbytes for name in copied}).items():
        address = guarded(size)
        if name in copied:
            ctypes.memmove(address, int(coder.state[name][0]), size)
        coder.state[name] = address
    ctypes.memmove(int(coder.state["text"][0]), data, n)
    segments = coder.special.segments(int(coder.state["text"][0]), n)
    m = engine.encode_segments(coder.address, segments, n, False)
    words = len(coder)
    got = np.ctypeslib.as_array((ctypes.c_uint16 * max(m, 1)).from_address(int(coder.state["out"][0])))[:m].tolist()
    assert got == engine.Coder(range(256), merges, {b"<|e|>": 300}, pattern).encode(data), n
    for name, kind, move_all in (("slots", engine.SLOT, engine.move_short), ("longs", engine.LONG, engine.move_long)):
        old, size = int(coder.state[name][0]), int(coder.state["num_" + name][0])  # to a larger table
        new = guarded(2 * size * kind.itemsize)
        move_all(old, size, new, 2 * size)
        table = lambda at, size: np.frombuffer(ctypes.string_at(at, size * kind.itemsize), kind)
        assert sorted(table(old, size).tolist())[-size // 5:] == sorted(table(new, 2 * size).tolist())[-size // 5:]
        coder.state[name], coder.state["num_" + name] = new, 2 * size
    coder.state["shift"] -= np.uint64(1)
    coder.state["arena_size"] += 4 * n  # it will write nothing there
    assert engine.encode_segments(coder.address, segments, n, False) == m and len(coder) == words  # all was found there
for data in [*texts()][:200:3]:  # learning: symbols with their heads, and what may be read behind them
    memory = engine.Memory()
    memory.count(data, engine.Special({}))
    for kind in (np.uint16, np.int32):
        symbols = memory.listed(kind)
        address = guarded(symbols.nbytes + engine.PAD)
        ctypes.memmove(address, symbols.ctypes.data, symbols.nbytes)
        number = np.ctypeslib.as_ctypes_type(kind)
        there = np.ctypeslib.as_array((number * len(symbols)).from_address(address))
        first = lambda: np.concatenate([np.arange(257), np.zeros(45, np.int64)])
        spelled = lambda: np.arange(256).astype(np.uint8)
        learned = [engine.learn(s, 256, 300, first(), spelled())[3].tolist() for s in (symbols, there)]
        assert learned[0] == learned[1]
print("inside")
if __import__("sys").argv[1:] == ["break"]:
    coder.state["text"] += n + engine.PAD
    engine.encode_segments(coder.address, np.array([[0, 64, -1]]), 64, False)
"""


def in_python(code, *args, **env):
    return subprocess.run(
        [sys.executable, "-c", code, *args], env=os.environ | env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect as Linux has it")
def test_nothing_behind_the_buffers_is_touched():
    done = in_python(GUARDED)
    assert done.stdout == "inside\n" and done.returncode == 0, done.stderr[-2000:]
    assert in_python(GUARDED, "break").returncode < 0  # the guard does guard


def test_array_bounds():
    code = """
import random
from llm_scratch import bpe_engine as engine
draw, memory = random.Random(0), engine.Memory()
for _ in range(50):
    memory.count("".join(draw.choices(["a", "b", " ab", "é", "c" * 40, "\\n", "'s"], k=200)).encode(), engine.Special({b"<": 1}))
tokens, merges = engine.train(memory, [bytes([b]) for b in range(256)], 500)
ids = {token: i for i, token in enumerate(tokens)}
coder = engine.Coder(range(256), engine.np.array([(ids[a], ids[b], ids[a + b]) for a, b in merges]), {b"<": 0})
coder.encode(b"abab ab's " * 50 + b"c" * 500 + b"<")
coder.encode(b" ".join(b"d" * length for length in range(70)))
coder.reserve(10_000, 10_000, 10_000)  # words move
coder.encode(b" ".join(b"d" * length for length in range(90)))
memory = engine.Memory()  # each word with "ab" once: the room for their neighbors must grow
memory.count(" ".join(f"ab{x}{y}{z}" for x in "cdefghijklmn" for y in "cdefghijklmn" for z in "cdefghijklmn").encode(), engine.Special({}))
engine.train(memory, [bytes([b]) for b in range(256)], 300)
print("inside")
"""
    done = in_python(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=os.devnull + "-none", NUMBA_OPT="1")
    assert done.stdout == "inside\n", done.stderr[-2000:]


def test_without_numba(path):
    code = """
import sys, warnings
sys.modules["numba"] = None
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    from llm_scratch.tokenizer import Tokenizer, train_bpe
    one = Tokenizer(*train_bpe(sys.argv[1], 400, num_processes=1), ["<|endoftext|>"])
    print(one.decode(one.encode("Once upon a time")), len(caught), "pip install numba" in str(caught[0].message))
"""
    done = in_python(code, str(path), LLM_SCRATCH_ENGINE="fast")
    assert done.stdout == "Once upon a time 1 True\n", done.stderr


def test_small_texts_load_nothing(path):
    code = """
import sys
from llm_scratch.tokenizer import Tokenizer, train_bpe
one = Tokenizer(*train_bpe(sys.argv[1], 400, num_processes=1))
one.encode("Once upon a time" * 1000)
print("numba" in sys.modules)
"""
    done = in_python(code, str(path))
    assert done.stdout == "False\n", done.stderr


def test_compiled_code_goes_elsewhere_where_its_folder_cannot_be_written(tmp_path):
    "As in a system-wide installation: into the user's cache."
    copy = tmp_path / "site" / "llm_scratch"
    copy.mkdir(parents=True)
    for name in ("__init__.py", "bpe_engine.py", "data.py"):
        (copy / name).write_bytes((Path(engine.__file__).parent / name).read_bytes())
    (copy / "__pycache__").write_text("a file where the folder should be")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from llm_scratch import bpe_engine as engine
assert engine.__file__.startswith(sys.argv[1]), engine.__file__
print(engine.Memory().count(b"a b", engine.Special({})))
"""
    done = in_python(code, str(copy.parent), HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.stdout == "-1\n", done.stderr
    assert list((tmp_path / "cache").rglob("*.nbi"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
@pytest.mark.parametrize("which", ["plain", "fast"])
def test_streams_in_one_megabyte(path, which):
    "Encoding a stream of ever new words, with 1 MB more memory than at the start: the cache forgets."
    code = """
import random, resource, sys
from llm_scratch.tokenizer import Tokenizer, train_bpe
one = Tokenizer(*train_bpe(sys.argv[1], 400, num_processes=1))
draw = random.Random(0)
lines = [" ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(2000)) + "\\n" for _ in range(40)]
expected = [len(one.encode(line)) for line in lines]
stream = one.encode_iterable(line for _ in range(3) for line in lines)
sum(1 for _ in zip(range(sum(expected)), stream))  # tables are made
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**20,) * 2)
print(sum(1 for _ in stream) - 2 * sum(expected))
"""
    done = in_python(code, str(path), LLM_SCRATCH_ENGINE=which)
    assert done.stdout == "0\n", done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="reads what Linux says of each core")
def test_time_that_the_host_takes(monkeypatch):
    "Only of the cores that we may use: not of another one, nor of the sum of all."
    ours = os.sched_getaffinity(0)
    ticks = {"": 9999, **dict.fromkeys(ours, 30), max(ours) + 1: 700}
    stat = "".join(f"cpu{core} 1 2 3 4 5 6 7 {stolen} 9 10\n" for core, stolen in ticks.items())
    monkeypatch.setattr("builtins.open", mock_open(read_data=stat + "intr 1 2\n"))
    assert engine._stolen_time() == 30 * len(ours) / os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr("builtins.open", mock_open(read_data="cpu0 1 2\n"))  # an old kernel
    assert engine._stolen_time() == 0
