"""The object a user holds: questions and contexts in, answers out, one or any number of them.

`Reader.answers` takes records from any iterable, a chunk at a time, and gives their answers in the
order of the records; memory depends on the chunk, not on how many there are. How answers are chosen
is the rule `spans` of `flaxqa.answers`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

import numpy as np
from jax.typing import DTypeLike

from flaxqa import answers, checkpoint, features, predict
from flaxqa.answers import Answer, Answers, Decoder, NotFinite
from flaxqa.checkpoint import Checkpoint
from flaxqa.devices import default_dtype, old_objects_left_alone, use_compilation_cache
from flaxqa.errors import (
    DataError,
    ModelRejected,
    UsageError,
    check_counts,
    check_integers,
    check_shares,
)
from flaxqa.features import Example, Windows
from flaxqa.spans import Logits
from flaxqa.tokens import Tokens

MAX_LENGTH, DOC_STRIDE = 384, 128
RECORDS_PER_CHUNK = 1_024
CHARACTERS_PER_CHUNK = 4_000_000  # so that a few huge contexts do not fill the memory
ERRORS_SHOWN = 20
NOT_FINITE = "the model's logits are not finite"

Item = TypeVar("Item")


class AnswerOptions(TypedDict, total=False):
    """How answers are chosen; what each means is told by `Reader.answers`."""

    top_k: int
    max_answer_length: int
    align_to_words: bool
    overlapping: bool
    min_score: float
    no_answer_threshold: float | None
    chunk_size: int


@dataclasses.dataclass
class Spent:
    """What some work took: seconds, which go on side by side in the stages, and counts.

    Attributes:
      seconds: from begin to end, without those spent compiling.
      tokenize_seconds: in the thread that tokenizes.
      device_seconds: of waiting for the devices, without those spent compiling.
      tokens: of the windows, without padding.
      computed_tokens: with padding.
    """

    seconds: float = 0.0
    tokenize_seconds: float = 0.0
    device_seconds: float = 0.0
    decode_seconds: float = 0.0
    windows: int = 0
    tokens: int = 0
    computed_tokens: int = 0

    def add(self, other: Spent) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Prepared(NamedTuple):
    """A chunk of examples, ready for the devices.

    Attributes:
      reasons: for each why it cannot be asked, or None.
      asked: the others.
      windows: of those.
      seconds: what it took.
    """

    reasons: list[str | None]
    asked: list[Example]
    windows: Windows
    seconds: float


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike = "auto",
    parallel: str = "jit",
    devices: int | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    doc_stride: int | None = None,
    windows: str = "overlap",
    matmul_precision: str = "float32",
    kernels: str = "auto",
) -> Reader:
    """A reader of a DistilBERT or BERT question-answering checkpoint.

    Compiled code is kept in JAX's cache (see `flaxqa.devices.use_compilation_cache`), so a later
    process starts faster.

    Args:
      model: a directory, or a hub id such as `distilbert/distilbert-base-uncased-distilled-squad`.
      revision: branch, tag or commit of a hub model.
      dtype: of weights and operands: "float32", "bfloat16", "float16", "float64" under
        `jax.enable_x64`, or "auto", which is bfloat16 on GPUs and TPUs and float32 on CPUs.
      parallel: "jit" or "pmap", how rows are split over the devices.
      devices: how many of this process's devices to use; None for all.
      batch_tokens: tokens of a batch on each device; None for what suits the device.
      max_length: tokens of a window; None for 384, or the checkpoint's positions if fewer.
      doc_stride: tokens that neighbouring windows share; None for 128, or half a window if less.
      windows: "overlap" or "mlperf", how a long context is cut; see `flaxqa.features`.
      matmul_precision: of float32 products, see `flaxqa.predict.Predictor`.
      kernels: "native", "xla" or "auto", what computes on CPUs; see `flaxqa.predict.Predictor`.

    Raises:
      ModelRejected: the checkpoint is damaged, unsafe, or not one that is computed.
      UsageError: an option cannot be used, or there is no such directory or repository.
      TryAgain: the hub cannot be reached and its cache has no copy.
    """
    use_compilation_cache()
    if isinstance(dtype, str) and dtype == "auto":
        dtype = default_dtype(devices)
    loaded = checkpoint.load(model, revision=revision, dtype=dtype)
    return Reader(
        loaded,
        parallel=parallel,
        devices=devices,
        batch_tokens=batch_tokens,
        max_length=max_length,
        doc_stride=doc_stride,
        windows=windows,
        matmul_precision=matmul_precision,
        kernels=kernels,
    )


class Reader:
    """Answers questions about texts with the words of the texts.

    Attributes:
      checkpoint: the model, its tokenizer, and where they came from.
      predictor: the compiled model on its devices.
      max_length: tokens of a window.
      doc_stride: tokens that neighbouring windows share.
      windows: how a long context is cut.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        *,
        max_length: int | None = None,
        doc_stride: int | None = None,
        windows: str = "overlap",
        **devices: Any,
    ):
        """See `load`; `devices` are the other options of `flaxqa.predict.Predictor`."""
        check_integers(
            max_length=max_length, doc_stride=doc_stride, batch_tokens=devices.get("batch_tokens")
        )
        if max_length is None:
            max_length = min(MAX_LENGTH, loaded.config.max_position_embeddings)
        if doc_stride is None:
            doc_stride = min(DOC_STRIDE, max_length // 2)
        features.default_question_limit(max_length, doc_stride, windows)  # refuses what cannot be
        self.checkpoint = loaded
        self.max_length, self.doc_stride, self.windows = max_length, doc_stride, windows
        self.predictor = predict.Predictor(loaded.model, max_length=max_length, **devices)

    def __repr__(self) -> str:
        config = self.checkpoint.config
        return (
            f"<Reader of {self.checkpoint.directory}: {config.model_type}, {config.n_layers} "
            f"layers, {config.dim} channels, {self.checkpoint.model.dtype}, on "
            f"{len(self.predictor.devices)} {self.predictor.devices[0].platform} device(s), "
            f"{self.predictor.kernels} kernels>"
        )

    def answer(self, question: str, context: str, **options: Unpack[AnswerOptions]) -> Answers:
        """The best answers to one question about one context, best first: always a list.

        Args:
          question: what to ask.
          context: the text that holds the answer.
          **options: those of `answers`.

        Raises:
          DataError: the question or the context is blank, or has a lone surrogate.
          ModelRejected: the model gives logits that are not finite.
        """
        record = {"question": question, "context": context}
        (found,) = self.answers([record], **options)
        if found.error == NOT_FINITE:
            raise ModelRejected(NOT_FINITE)
        if found.error is not None:
            raise DataError(found.error)
        return found

    def answers(
        self,
        records: Iterable[Any],
        *,
        top_k: int = 1,
        max_answer_length: int = answers.MAX_ANSWER_LENGTH,
        align_to_words: bool = True,
        overlapping: bool = False,
        min_score: float = 0.0,
        no_answer_threshold: float | None = None,
        chunk_size: int = RECORDS_PER_CHUNK,
    ) -> Iterator[Answers]:
        """Streams any number of records through the model, in bounded memory and in their order.

        Each result is a list of answers whose `record` is the record as it came, with its id and
        whatever else it has. A record that cannot be asked gives an empty list with the reason in
        `error`; it never stops the others.

        Args:
          records: mappings with `question` and `context`, pairs of them, or `Example`s; from any
            iterable, of which two chunks are read ahead.
          top_k: how many answers at most. Those to a smaller number are the first of those to a
            larger one.
          max_answer_length: in tokens, before an answer is widened to words.
          align_to_words: whether an answer is widened to whole words.
          overlapping: whether an answer may share characters with a better one.
          min_score: answers with a lower `score` are left out.
          no_answer_threshold: in [0, 1]; where `no_answer_score` is above it the list is empty. 0.5
            is run_qa's rule. None, for models that know no unanswerable questions, never asks.
          chunk_size: how many records run together. A smaller number answers the first ones sooner
            and computes less at once. With 1 each record is answered before the next is read.

        Raises:
          UsageError: an option has a value that cannot be.
        """
        check_counts(top_k=top_k, max_answer_length=max_answer_length, chunk_size=chunk_size)
        check_shares(min_score=min_score, no_answer_threshold=no_answer_threshold)
        if isinstance(records, (str, Mapping)):
            raise UsageError("records are an iterable of records; for one there is answer()")

        decode = Decoder(
            "spans",
            top_k=top_k,
            max_answer_length=max_answer_length,
            align_to_words=align_to_words,
            overlapping=overlapping,
        )

        def stream() -> Iterator[Answers]:
            read = ((record, features.as_example(record)) for record in records)
            came = chunks(read, chunk_size, size_of=lambda pair: features.characters(pair[1]))
            # A chunk of one record is for those who wait for its answer.
            together = ((chunk,) for chunk in came) if chunk_size == 1 else (came,)
            for some in together:
                yield from answer(some)

        def answer(some: Iterable[list[tuple[Any, Example | str]]]) -> Iterator[Answers]:
            under_way: collections.deque[list[Any]] = collections.deque()

            def examples() -> Iterator[list[Example | str]]:
                for chunk in some:
                    under_way.append([record for record, _ in chunk])
                    yield [example for _, example in chunk]

            for found, _ in self.answer_chunks(examples(), decode):
                for record, one in zip(under_way.popleft(), found, strict=True):
                    one.record = record
                    no_answer = no_answer_threshold is not None and (
                        one.no_answer_score > no_answer_threshold
                    )
                    if no_answer or min_score > 0:
                        one[:] = [] if no_answer else [a for a in one if a.score >= min_score]
                    yield one

        return stream()

    def answer_questions(
        self, questions: Iterable[str], context: str, **options: Unpack[AnswerOptions]
    ) -> list[Answers]:
        """The answers to each of many questions about one context, which is tokenized once.

        A question that cannot be asked has its reason in `error`, as in `answers`.

        Args:
          questions: what to ask.
          context: the text that holds the answers.
          **options: those of `answers`.
        """
        if isinstance(questions, str):
            raise UsageError("questions are an iterable of strings; for one there is answer()")
        records = ({"question": question, "context": context} for question in questions)
        return list(self.answers(records, **options))

    def search(
        self, question: str, contexts: Iterable[str], **options: Unpack[AnswerOptions]
    ) -> Answers:
        """The best answers to one question in any number of contexts, best first.

        The contexts compete as if they were the windows of one: by the sum of start and end logit,
        with scores out of one softmax over all of them ("shared normalization", Clark and Gardner
        2017, https://arxiv.org/abs/1710.10723); so each score falls as contexts are added. A model
        that was trained on contexts with the answer only, as SQuAD v1.1's, may be as sure of a
        wrong context. `Answer.context` says which context an answer is from. Contexts that cannot
        be asked are named in `error`.

        Args:
          question: what to ask.
          contexts: the texts, from any iterable; memory does not grow with their number.
          **options: those of `answers`; `min_score` and `no_answer_threshold` are asked of all
            contexts together.

        Raises:
          DataError: the question is blank, or has a lone surrogate.
        """
        if (reason := features.why_not_text("question", question)) is not None:
            raise DataError(reason)
        if isinstance(contexts, str):
            raise UsageError("contexts are an iterable of strings; for one there is answer()")
        top_k = options.get("top_k", 1)
        min_score = options.pop("min_score", 0.0)
        threshold = options.pop("no_answer_threshold", None)
        check_shares(min_score=min_score, no_answer_threshold=threshold)
        together, errors, n_errors = Answers(), [], 0
        together.record = {"question": question}
        best: list[tuple[float, int, int, Answer]] = []  # a heap, the worst first
        normalizers = np.full(2, -np.inf)
        records = ({"question": question, "context": context} for context in contexts)
        for index, found in enumerate(self.answers(records, **options)):
            together.n_windows += found.n_windows
            together.question_cut |= found.question_cut
            if found.error is not None:
                n_errors += 1
                if n_errors <= ERRORS_SHOWN:
                    errors.append(f"context {index}: {found.error}")
                continue
            together.null_logit = min(together.null_logit, found.null_logit)
            normalizers = np.logaddexp(normalizers, found.log_normalizers)
            for rank, answer in enumerate(found):
                total = answer.start_logit + answer.end_logit
                entry = (total, -index, -rank, dataclasses.replace(answer, context=index))
                if len(best) < top_k:
                    heapq.heappush(best, entry)
                else:
                    heapq.heappushpop(best, entry)
        ranked = sorted(best, reverse=True)
        if ranked:
            together.null_odds = together.null_logit - ranked[0][0]
        together.log_normalizers = (float(normalizers[0]), float(normalizers[1]))
        if n_errors > ERRORS_SHOWN:
            errors.append(f"and {n_errors - ERRORS_SHOWN} more")
        together.error = "; ".join(errors) or None
        if threshold is None or together.no_answer_score <= threshold:
            for *_, answer in ranked:
                log_score = answer.start_logit + answer.end_logit - float(normalizers.sum())
                answer = dataclasses.replace(answer, score=math.exp(min(log_score, 0.0)))
                if answer.score >= min_score:
                    together.append(answer)
        return together

    def windows_of(
        self, examples: Sequence[Example], known: dict[str, Tokens] | None = None
    ) -> Windows:
        """The windows of examples that can be asked; see `flaxqa.features.make`."""
        return features.make(
            examples,
            self.checkpoint.tokenizer,
            max_length=self.max_length,
            doc_stride=self.doc_stride,
            windows=self.windows,
            known=known,
        )

    def answer_chunks(
        self,
        chunks: Iterable[Sequence[Example | str]],
        decode: Decoder,
        progress: Callable[[int, int], None] = lambda questions, windows: None,
    ) -> Iterator[tuple[list[Answers], Spent]]:
        """Runs chunks of examples; what cannot be asked or answered has the reason in `error`.

        Two chunks are read ahead: while the devices work on one, the next is tokenized and the one
        before is decoded. What is computed of a chunk does not depend on the others. An error of
        `chunks` is raised after all that was read before it is answered.

        Args:
          chunks: of examples, each an example, or why there is none.
          decode: a rule of `flaxqa.answers`.
          progress: called with the numbers of questions and of windows just done, batch by batch.
        """
        predictor = self.predictor
        under_way: collections.deque[Prepared] = collections.deque()
        failures: list[Exception] = []
        to_show: collections.deque[tuple[int, int, int]] = collections.deque()
        waited = 0.0

        def windows() -> Iterator[Windows]:
            nonlocal waited
            for future in self.prepare_ahead(chunks, failures):
                clock = time.perf_counter()
                prepared = future.result()
                waited += time.perf_counter() - clock
                under_way.append(prepared)
                if prepared.windows:
                    to_show.append((len(prepared.reasons), len(prepared.windows), 0))
                yield prepared.windows

        def advance(windows: int) -> None:
            """Tells of a batch: the windows of a chunk come in any order of its questions."""
            questions, of, done = to_show[0]
            shown = questions * (done + windows) // of - questions * done // of
            to_show[0] = questions, of, done + windows
            if done + windows == of:
                to_show.popleft()
            progress(shown, windows)

        stream = predictor.stream(windows(), advance, decode.rule)
        began = time.perf_counter()
        with contextlib.closing(stream), old_objects_left_alone():
            while True:
                waited, clock = 0.0, time.perf_counter()
                compiled, tokens = predictor.compile_seconds, predictor.computed_tokens
                if (logits := next(stream, None)) is None:
                    break
                computed = time.perf_counter()
                compiled = predictor.compile_seconds - compiled
                prepared = under_way.popleft()
                if not prepared.windows:
                    progress(len(prepared.reasons), 0)
                found = self.decode(prepared, logits, decode)
                ended = time.perf_counter()
                yield (
                    found,
                    Spent(
                        seconds=ended - began - compiled,
                        tokenize_seconds=prepared.seconds,
                        device_seconds=computed - clock - compiled - waited,
                        decode_seconds=ended - computed,
                        windows=len(prepared.windows),
                        tokens=int(prepared.windows.lengths.sum()),
                        computed_tokens=predictor.computed_tokens - tokens,
                    ),
                )
                began = time.perf_counter()
        if failures:
            raise failures[0]

    def prepare_ahead(
        self, chunks: Iterable[Sequence[Example | str]], failures: list[Exception]
    ) -> Iterator[concurrent.futures.Future[Prepared]]:
        """The chunks as windows, the next one begun; an error of `chunks` ends them."""
        known: dict[str, Tokens] = {}
        before: concurrent.futures.Future[Prepared] | None = None
        with concurrent.futures.ThreadPoolExecutor(1, "tokenize") as pool:
            iterator = iter(chunks)
            while True:
                try:
                    chunk = next(iterator)
                except StopIteration:
                    break
                except Exception as error:
                    failures.append(error)
                    break
                future = pool.submit(self.prepare, chunk, known)
                if before is not None:
                    yield before
                before = future
            if before is not None:
                yield before

    def prepare(self, examples: Sequence[Example | str], known: dict[str, Tokens]) -> Prepared:
        """The windows of a chunk."""
        began = time.perf_counter()
        reasons = [
            example if isinstance(example, str) else features.why_unanswerable(example)
            for example in examples
        ]
        pairs = zip(examples, reasons, strict=True)
        asked = [one for one, reason in pairs if reason is None and isinstance(one, Example)]
        try:
            windows = self.windows_of(asked, known)
        except BaseException as error:
            if not is_panic(error):
                raise
            asked = self.without_panics(examples, reasons)
            windows = self.windows_of(asked)
        return Prepared(reasons, asked, windows, time.perf_counter() - began)

    def without_panics(
        self, examples: Sequence[Example | str], reasons: list[str | None]
    ) -> list[Example]:
        """The examples that the tokenizer can take; of the others the reason is noted."""
        asked = []
        for index, example in enumerate(examples):
            if reasons[index] is not None or isinstance(example, str):
                continue
            try:
                self.windows_of([example])
                asked.append(example)
            except BaseException as error:
                if not is_panic(error):
                    raise
                reasons[index] = f"the tokenizer fails: {error}"
        return asked

    def decode(
        self, prepared: Prepared, scores: Sequence[Logits], decode: Decoder
    ) -> list[Answers]:
        """The answers of a chunk, in its order."""
        windows, bad = Windows.of(prepared.windows), set[int]()
        try:
            decoded = decode(prepared.asked, windows, scores)
        except NotFinite as error:
            bad = set(error.examples)
            finite = [at for at, window in enumerate(windows) if window.example not in bad]
            decoded = decode(
                prepared.asked, [windows[at] for at in finite], [scores[at] for at in finite]
            )
        for index, cut in zip(windows.example.tolist(), windows.question_cut, strict=True):
            decoded[index].n_windows += 1
            decoded[index].question_cut = cut
        for index in bad:
            decoded[index].error = NOT_FINITE
        answered = iter(decoded)
        found = [next(answered) if reason is None else Answers() for reason in prepared.reasons]
        for one, reason in zip(found, prepared.reasons, strict=True):
            one.error = one.error or reason
        return found


def chunks(
    items: Iterable[Item], most: int | None = None, *, size_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """The items in order, in lists of at most `most` and at most CHARACTERS_PER_CHUNK characters.

    An item that is larger is alone. Where a list ends depends on nothing before its first item. A
    full list is given before another item is read, and what was read before an error of `items`
    before the error. `most` is RECORDS_PER_CHUNK when left out.
    """
    most = RECORDS_PER_CHUNK if most is None else most
    chunk: list[Item] = []
    size = 0
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except Exception:
            if chunk:
                yield chunk
            raise
        size += size_of(item)
        if chunk and size > CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, size = [], size_of(item)
        chunk.append(item)
        if len(chunk) == most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizer's library gave up, by what is no Exception of Python's."""
    return type(error).__name__ == "PanicException"
