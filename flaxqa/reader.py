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
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flaxqa import checkpoint, features, frames, predict
from flaxqa.answers import Answer, Answers, Decoder, NotFinite
from flaxqa.checkpoint import Checkpoint
from flaxqa.config import AnswerOptions, DeviceOptions, ReaderOptions, takes
from flaxqa.devices import default_dtype, old_objects_left_alone, use_compilation_cache
from flaxqa.errors import (
    DataError,
    ModelRejected,
    UsageError,
    check_counts,
)
from flaxqa.features import Example, Windows
from flaxqa.plan import Shape
from flaxqa.spans import Logits
from flaxqa.tokens import Tokens

RECORDS_PER_CHUNK = 1_024
CHARACTERS_PER_CHUNK = 4_000_000  # so that a few huge contexts do not fill the memory
ERRORS_SHOWN = 20
NOT_FINITE = "the model's logits are not finite"

Item = TypeVar("Item")
Progress = Callable[[int, int], None]  # the numbers of questions and of windows just done


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


class Ahead:
    """Chunks that are prepared while the devices work on others.

    Attributes:
      under_way: those whose windows the devices have.
      waited: seconds that the devices waited for one since it was set to 0.
    """

    def __init__(self, futures: Iterable[concurrent.futures.Future[Prepared]], progress: Progress):
        self.futures, self.progress, self.waited = futures, progress, 0.0
        self.under_way: collections.deque[Prepared] = collections.deque()
        # Of each chunk its questions, its windows, and how many of these are done.
        self.to_show: collections.deque[tuple[int, int, int]] = collections.deque()

    def windows(self) -> Iterator[Windows]:
        """Those of each chunk, as they are asked for."""
        for future in self.futures:
            clock = time.perf_counter()
            prepared = future.result()
            self.waited += time.perf_counter() - clock
            self.under_way.append(prepared)
            if prepared.windows:
                self.to_show.append((len(prepared.reasons), len(prepared.windows), 0))
            yield prepared.windows

    def advance(self, windows: int) -> None:
        """Tells of a batch: the windows of a chunk come in any order of its questions."""
        questions, of, done = self.to_show[0]
        shown = questions * (done + windows) // of - questions * done // of
        self.to_show[0] = questions, of, done + windows
        if done + windows == of:
            self.to_show.popleft()
        self.progress(shown, windows)


@takes(ReaderOptions)
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    weights: str | None = None,
    **options: Any,
) -> Reader:
    """A reader of a DistilBERT or BERT question-answering checkpoint.

    Compiled code is kept in JAX's cache (see `flaxqa.devices.use_compilation_cache`), so a later
    process starts faster.

    Args:
      model: a directory, or a hub id such as `distilbert/distilbert-base-uncased-distilled-squad`.
      revision: branch, tag or commit of a hub model.
      weights: name of the checkpoint's file of weights, where it has another than the usual ones.
      **options: those of `flaxqa.config.ReaderOptions`. `dtype` may also be "float64", under
        `jax.enable_x64`, or a dtype of JAX; `devices` also a list of devices.

    Raises:
      ModelRejected: the checkpoint is damaged, unsafe, or not one that is computed.
      UsageError: an option cannot be used, or there is no such directory or repository.
      TryAgain: the hub cannot be reached and its cache has no copy.
    """
    chosen = ReaderOptions(**options)
    use_compilation_cache()
    dtype: Any = chosen.dtype
    if isinstance(dtype, str) and dtype == "auto":
        dtype = default_dtype(chosen.devices)
    loaded = checkpoint.load(model, revision=revision, weights_file=weights, dtype=dtype)
    return Reader(loaded, **options)


# Those of this process, and after a fork those of its parent, by their tokens.
READERS: weakref.WeakValueDictionary[str, Reader] = weakref.WeakValueDictionary()


def restored(
    token: str, name: str, revision: str | None, weights: str, options: dict[str, Any]
) -> Reader:
    """The reader that was pickled; see `Reader.__reduce__`."""
    if (known := READERS.get(token)) is not None:
        return known
    return load(name, revision=revision, weights=weights, **options)


class Reader:
    """Answers questions about texts with the words of the texts.

    Attributes:
      checkpoint: the model, its tokenizer, and where they came from.
      predictor: the compiled model on its devices.
      max_length: tokens of a window.
      doc_stride: tokens that neighbouring windows share.
      windows: how a long context is cut.
    """

    @takes(ReaderOptions)
    def __init__(self, loaded: Checkpoint, **options: Any):
        """Takes the options of `flaxqa.config.ReaderOptions`; the dtype is the checkpoint's."""
        self.options = chosen = ReaderOptions(**options)
        self.token = uuid.uuid4().hex
        READERS[self.token] = self
        self.checkpoint, self.windows = loaded, chosen.windows
        self.max_length, self.doc_stride = features.window_sizes(
            chosen, loaded.config.max_position_embeddings
        )
        self.predictor = predict.Predictor(
            loaded.model, max_length=self.max_length, **chosen.of(DeviceOptions)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """By the checkpoint's name and the options: another process loads it anew.

        A fork has it already, and cannot compile; so all that the native kernels need is compiled
        before.
        """
        options = {**vars(self.options), "dtype": str(self.checkpoint.model.dtype)}
        if not isinstance(options["devices"], int | None):
            raise TypeError("a reader on a list of devices cannot be pickled; give their number")
        loaded, predictor = self.checkpoint, self.predictor
        if predictor.kernels == "native":
            predictor.compile(Shape(tokens, tokens) for tokens in predictor.row_tokens)
        return restored, (self.token, loaded.name, loaded.commit, loaded.weights_file, options)

    def __repr__(self) -> str:
        config = self.checkpoint.config
        return (
            f"<Reader of {self.checkpoint.directory}: {config.model_type}, {config.n_layers} "
            f"layers, {config.dim} channels, {self.checkpoint.model.dtype}, on "
            f"{len(self.predictor.devices)} {self.predictor.devices[0].platform} device(s), "
            f"{self.predictor.kernels} kernels>"
        )

    def answer(self, question: str, context: str, **options: Any) -> Answers:
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

    @takes(AnswerOptions)
    def answers(
        self, records: Iterable[Any], *, chunk_size: int = RECORDS_PER_CHUNK, **options: Any
    ) -> Iterator[Answers]:
        """Streams any number of records through the model, in bounded memory and in their order.

        Each result is a list of answers whose `record` is the record as it came, with its id and
        whatever else it has. A record that cannot be asked gives an empty list with the reason in
        `error`; it never stops the others.

        Args:
          records: mappings with `question` and `context`, pairs of them, or `Example`s; from any
            iterable, of which two chunks are read ahead; or a data frame of pandas, polars or Arrow
            with these columns.
          chunk_size: how many records run together. A smaller number answers the first ones sooner
            and computes less at once. With 1 each record is answered before the next is read.
          **options: those of `flaxqa.config.AnswerOptions`.

        Raises:
          UsageError: an option has a value that cannot be, or a frame has not these columns.
        """
        chosen = AnswerOptions(**options)
        check_counts(chunk_size=chunk_size)
        if isinstance(records, (str, Mapping)):
            raise UsageError("records are an iterable of records; for one there is answer()")
        decode = Decoder.of(chosen)
        rows = frames.rows_of(records)

        def stream() -> Iterator[Answers]:
            read = ((record, features.as_example(record)) for record in rows)
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
                    one[:] = one.kept(chosen)
                    yield one

        return stream()

    def answer_questions(
        self, questions: Iterable[str], context: str, **options: Any
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
        self,
        question: str,
        contexts: Iterable[str],
        *,
        chunk_size: int = RECORDS_PER_CHUNK,
        **options: Any,
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
          chunk_size: as in `answers`.
          **options: those of `answers`; `min_score` and `no_answer_threshold` are asked of all
            contexts together.

        Raises:
          DataError: the question is blank, or has a lone surrogate.
        """
        if (reason := features.why_not_text("question", question)) is not None:
            raise DataError(reason)
        if isinstance(contexts, str):
            raise UsageError("contexts are an iterable of strings; for one there is answer()")
        chosen = AnswerOptions(**options)
        every = dataclasses.replace(chosen, min_score=0.0, no_answer_threshold=None)
        records = ({"question": question, "context": context} for context in contexts)
        best = BestOfContexts(question, chosen.top_k, chosen.temperature)
        for found in self.answers(records, chunk_size=chunk_size, **vars(every)):
            best.add(found)
        together = best.answers()
        together[:] = together.kept(chosen)
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
        progress: Progress = lambda questions, windows: None,
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
        failures: list[Exception] = []
        ahead = Ahead(self.prepare_ahead(chunks, failures), progress)
        stream = predictor.stream(ahead.windows(), ahead.advance, decode.rule)
        began = time.perf_counter()
        with contextlib.closing(stream), old_objects_left_alone():
            while True:
                ahead.waited, clock = 0.0, time.perf_counter()
                compiled, tokens = predictor.compile_seconds, predictor.computed_tokens
                if (logits := next(stream, None)) is None:
                    break
                computed = time.perf_counter()
                compiled = predictor.compile_seconds - compiled
                prepared = ahead.under_way.popleft()
                if not prepared.windows:
                    progress(len(prepared.reasons), 0)
                found = self.decode(prepared, logits, decode)
                ended = time.perf_counter()
                yield (
                    found,
                    Spent(
                        seconds=ended - began - compiled,
                        tokenize_seconds=prepared.seconds,
                        device_seconds=computed - clock - compiled - ahead.waited,
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


class BestOfContexts:
    """The answers to one question in many contexts, as they come."""

    def __init__(self, question: str, top_k: int, temperature: float = 1.0):
        self.top_k, self.count, self.n_errors, self.temperature = top_k, 0, 0, temperature
        self.together, self.errors = Answers(), list[str]()
        self.together.record = {"question": question}
        self.best: list[tuple[float, int, int, Answer]] = []  # a heap, the worst first
        self.normalizers = np.full(2, -np.inf)

    def add(self, found: Answers) -> None:
        """Those in the next context."""
        index, self.count = self.count, self.count + 1
        self.together.n_windows += found.n_windows
        self.together.question_cut |= found.question_cut
        if found.error is not None:
            self.n_errors += 1
            if self.n_errors <= ERRORS_SHOWN:
                self.errors.append(f"context {index}: {found.error}")
            return
        self.together.null_logit = min(self.together.null_logit, found.null_logit)
        self.normalizers = np.logaddexp(self.normalizers, found.log_normalizers)
        for rank, answer in enumerate(found):
            total = answer.start_logit + answer.end_logit
            entry = (total, -index, -rank, dataclasses.replace(answer, context=index))
            if len(self.best) < self.top_k:
                heapq.heappush(self.best, entry)
            else:
                heapq.heappushpop(self.best, entry)

    def answers(self) -> Answers:
        """The best of all, with scores over all contexts."""
        together, ranked = self.together, sorted(self.best, reverse=True)
        if ranked:
            together.null_odds = together.null_logit - ranked[0][0]
        together.log_normalizers = (float(self.normalizers[0]), float(self.normalizers[1]))
        if self.n_errors > ERRORS_SHOWN:
            self.errors.append(f"and {self.n_errors - ERRORS_SHOWN} more")
        together.error = "; ".join(self.errors) or None
        for *_, answer in ranked:
            total = (answer.start_logit + answer.end_logit) / self.temperature
            log_score = total - float(self.normalizers.sum())
            together.append(dataclasses.replace(answer, score=math.exp(min(log_score, 0.0))))
        return together


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
