"Plausible wrong answers to the exercises of notebook 01, and what their checks must say."

from collections import Counter
from heapq import heappop
from itertools import pairwise

import regex

from llm_scratch.tokenizer import last_cut, special_pattern, split_special


def utf8_border_too_high(code_point):
    return bytes([code_point]) if code_point <= 0x80 else chr(code_point).encode()


def utf8_without_marks(code_point):
    return chr(code_point).encode()[:1] + bytes(byte & 0x3F for byte in chr(code_point).encode()[1:])


def count_pairs_once_a_word(words, word_counts):
    return Counter(pair for tokens in words.values() for pair in pairwise(tokens))


def count_pairs_as_sets(words, word_counts):
    counts = Counter()
    for word, tokens in words.items():
        for pair in set(pairwise(tokens)):
            counts[pair] += word_counts[word]
    return counts


def merge_pair_losing_the_last(tokens, pair):
    merged, i = [], 0
    while i < len(tokens) - 1:
        found = tuple(tokens[i : i + 2]) == pair
        merged.append(tokens[i] + tokens[i + 1] if found else tokens[i])
        i += 1 + found
    return merged


def merge_pair_in_place(tokens, pair):
    i = 0
    while i < len(tokens) - 1:
        if tuple(tokens[i : i + 2]) == pair:
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        i += 1
    return tokens


def trainer(best, merge=True):
    def train(word_counts, num_merges):
        words, merges = {word: [bytes([byte]) for byte in word] for word in word_counts}, []
        while len(merges) < num_merges:
            counts = Counter()
            for word, tokens in words.items():
                for pair in pairwise(tokens):
                    counts[pair] += word_counts[word]
            if not counts:
                break
            pair = best(counts)
            merges.append(pair)
            for word, tokens in words.items() if merge else ():
                text = b"\0".join(tokens).replace(b"\0".join(pair), b"".join(pair))
                words[word] = text.split(b"\0")
            if not merge and len(merges) == 6:
                break
        return merges

    return train


first_of_ties = trainer(lambda counts: min(counts, key=lambda pair: (-counts[pair], pair)))
never_merges = trainer(lambda counts: max(counts, key=lambda pair: (counts[pair], pair)), merge=False)


def most_frequent_trusting_the_heap(table):
    return heappop(table.heap)[3] if table.heap else None


def most_frequent_throwing_away(table):
    while table.heap:
        claimed, _, _, pair = heappop(table.heap)
        if table.pair_counts.get(pair) == -claimed:
            return pair


def special_pattern_unescaped(special_tokens):
    return regex.compile(f"({'|'.join(special_tokens)})") if special_tokens else None


def special_pattern_in_given_order(special_tokens):
    return regex.compile(f"({'|'.join(map(regex.escape, special_tokens))})") if special_tokens else None


def split_special_dropping(text, pattern):
    return pattern.split(text)[::2] if pattern else [text]


def merge_word_left_to_right(ids, ranks, merged):
    i = 0
    while i < len(ids) - 1:
        if (rank := ranks.get((ids[i], ids[i + 1]))) is not None:
            ids = [*ids[:i], merged[rank], *ids[i + 2 :]]
            i = 0
        else:
            i += 1
    return ids


def merge_word_slowly(ids, ranks, merged):
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]:
        rank, i = min(known)
        ids = [*ids[:i], merged[rank], *ids[i + 2 :]]
    return ids


def decode_token_by_token(self, ids):
    return "".join(self.vocab[i].decode("utf-8", "replace") for i in ids)


def decode_strictly(self, ids):
    return b"".join(self.vocab[int(i)] for i in ids).decode("utf-8")


def decode_leaving_out(self, ids):
    return b"".join(self.vocab[int(i)] for i in ids).decode("utf-8", "ignore")


def safe_pieces_without_the_rest(chunks, special_tokens=(), block=2**16, known=True):
    held = ""
    for chunk in chunks:
        held += chunk
        if len(held) >= block:
            cut = last_cut(held, special_tokens, known)
            yield held[:cut]
            held = held[cut:]


def safe_pieces_by_blocks(chunks, special_tokens=(), block=2**16, known=True):
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) >= block:
            yield held[:block]
            held = held[block:]
    yield held


def safe_pieces_all_at_once(chunks, special_tokens=(), block=2**16, known=True):
    text = "".join(chunks)
    yield from (text[:block], text[block:])


WRONG = {
    "1.2": [(utf8_border_too_high, "U+0080 takes 2 bytes, not 1"), (utf8_without_marks, "goes on with 80")],
    "1.5": [(count_pairs_once_a_word, "weigh by word_counts"), (count_pairs_as_sets, "aaa twice")],
    "1.6": [(merge_pair_losing_the_last, "last token was lost"), (merge_pair_in_place, "has been changed")],
    "1.7": [(first_of_ties, "ties go to the greater pair"), (never_merges, "merge, then count")],
    "1.8": [
        (most_frequent_trusting_the_heap, "fallen to 1"),
        (most_frequent_throwing_away, "go back into the heap"),
    ],
    "1.9": [
        ((special_pattern_unescaped, split_special), "escape it"),
        ((special_pattern_in_given_order, split_special), "the longer wins"),
        ((special_pattern, split_special_dropping), "themselves are lost"),
    ],
    "1.10": [(merge_word_left_to_right, "lowest rank goes first"), (merge_word_slowly, "that is quadratic")],
    "1.11": [
        (decode_token_by_token, "may lie across two tokens"),
        (decode_strictly, "must not raise"),
        (decode_leaving_out, "do not vanish"),
    ],
    "1.12": [
        (safe_pieces_without_the_rest, "is the last piece there?"),
        (safe_pieces_by_blocks, "a pre-token was cut in two"),
        (safe_pieces_all_at_once, "only 2 pieces"),
    ],
    "1.14": [
        (lambda word, tokens: [word[:1], word[1:]] if word else [], "from the left, the longest"),
        (lambda word, tokens: [b"abc", b"d"], "bc fits, but bcd is longer"),
    ],
}
