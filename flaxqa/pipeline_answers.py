"""The rule by which transformers 4.57's question-answering pipeline chose answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxqa.features import Example, Feature
from flaxqa.spans import Logits


def decode_pipeline(
    examples: Sequence[Example],
    features: Sequence[Feature],
    logits: Sequence[Logits],
    *,
    top_k: int = 1,
    max_answer_length: int = 15,
    align_to_words: bool = True,
    handle_impossible_answer: bool = False,
) -> list[list[dict[str, Any]]]:
    """For every example what transformers 4.57's question-answering pipeline answered.

    Each window by itself: start and end are softmaxes over its context tokens and `[CLS]`; a span's
    score is the product of the two; the best `2 * top_k + 10` spans (`top_k` without alignment) are
    widened to words as far as the window shows them. Then over the windows: answers of one text,
    upper and lower case alike, become the first of them with the sum of their scores, which
    can therefore exceed 1. "No answer" has the lowest product that `[CLS]` has in any window.
    Source: src/transformers/pipelines/question_answering.py of transformers 4.57.6. Spans of equal
    scores are taken in the order in which numpy's partition leaves them, as there.

    Args:
      examples: with the contexts that the answers are cut from.
      features: the windows of the examples, as `features.make` orders them.
      logits: of each window, as `Predictor.predict` gives them.
      top_k: how many answers of each example, at most.
      max_answer_length: in tokens.
      align_to_words: whether an answer is widened to whole words.
      handle_impossible_answer: whether "no answer", the text "", competes.

    Returns:
      For each example dicts of `score`, `start`, `end`, `answer`, best first.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in examples]
    least = [1e6] * len(examples)
    for feature, scores in zip(features, logits, strict=True):
        index, inside = feature.example, tokens_inside(feature)
        # [CLS] is in the softmax, and so is a "[CLS]" that the question spells.
        weighed = inside | (feature.input_ids == feature.input_ids[0])
        start, end = window_softmax(scores.start, weighed), window_softmax(scores.end, weighed)
        least[index] = min(least[index], float(start[0] * end[0]))
        start[0] = end[0] = 0.0
        wanted = 2 * top_k + 10 if align_to_words else top_k
        firsts, lasts, products = window_spans(start, end, inside, wanted, max_answer_length)
        for first, last, product in zip(firsts, lasts, products, strict=True):
            begin, finish = characters(feature, int(first), int(last), align_to_words)
            text = examples[index].context[begin:finish]
            same = (one for one in found[index] if one["answer"].lower() == text.lower())
            if (one := next(same, None)) is not None:
                one["score"] += float(product)
            else:
                found[index].append(
                    {"score": float(product), "start": begin, "end": finish, "answer": text}
                )
    for index, answers in enumerate(found):
        if handle_impossible_answer:
            answers.append({"score": least[index], "start": 0, "end": 0, "answer": ""})
        answers.sort(key=lambda answer: -answer["score"])
        del answers[top_k:]
    return found


def tokens_inside(feature: Feature) -> np.ndarray:
    """bool [T], the context tokens and [CLS]."""
    inside = np.zeros(len(feature), np.bool_)
    stop = feature.context_start + feature.part.stop - feature.part.start
    inside[0] = inside[feature.context_start : stop] = True
    return inside


def window_softmax(logits: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[T] in the logits' own dtype, what is not inside as good as 0."""
    masked = np.where(inside, logits, logits.dtype.type(-10_000.0))
    exponentials = np.exp(masked - masked.max())
    return exponentials / exponentials.sum()


def window_spans(
    start: np.ndarray, end: np.ndarray, inside: np.ndarray, n: int, max_answer_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first and last tokens [A] of the n best spans of a window, and their products [A].

    Spans that touch a token which is not inside are dropped after the choice, as in the source.
    """
    reach = min(max_answer_length, len(start))
    products = np.tril(np.triu(start[:, None] * end[None, :]), reach - 1)
    flat = products.reshape(-1)
    if n == 1:
        order = np.array([np.argmax(flat)])
    elif len(flat) <= n:
        order = np.argsort(-flat)
    else:
        chosen = np.argpartition(-flat, n)[:n]
        order = chosen[np.argsort(-flat[chosen])]
    first, last = np.unravel_index(order, products.shape)
    kept = inside[first] & inside[last]
    return first[kept], last[kept], products[first[kept], last[kept]]


def characters(feature: Feature, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where a span of a window's tokens lies in the context: (0, 0) begins at `[CLS]`."""
    i, j = first - feature.context_start, last - feature.context_start
    if align_to_words and i >= 0 and j >= 0:
        i, j = whole_words(feature.words, i, j)
    return (
        int(feature.offsets[i, 0]) if i >= 0 else 0,
        int(feature.offsets[j, 1]) if j >= 0 else 0,
    )


def whole_words(words: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """The first and the last token of the words that two tokens belong to, in a window.

    Args:
      words: int32 [C], the word of each token, as in `Feature`.
      first: a token.
      last: another, not before it.
    """
    while first and words[first - 1] == words[first]:
        first -= 1
    while last + 1 < len(words) and words[last + 1] == words[last]:
        last += 1
    return first, last
