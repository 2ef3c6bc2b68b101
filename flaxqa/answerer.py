"""A reader for other people's pipelines: batches of columns, or data frames, in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flaxqa import frames
from flaxqa.errors import UsageError

if TYPE_CHECKING:
    from flaxqa.reader import Reader


class QuestionAnswerer:
    """Answers batches of columns: for `datasets.Dataset.map` and `ray.data.Dataset.map_batches`.

        dataset.map(QuestionAnswerer(model), batched=True)
        dataset.map_batches(QuestionAnswerer, fn_constructor_args=(model,),
                            compute=ray.data.ActorPoolStrategy(size=2), ...)

    A batch is a mapping of columns, or a frame of pandas, polars or Arrow. Added are the columns
    `answer`, `start`, `end`, `score`, `no_answer_score`, `n_windows` and `error`. A column has one
    type, so where there is no answer these are "", -1, -1 and 0, and `error` is "" or says why a
    row could not be answered. The model is loaded with the first batch, in the process that has it.
    """

    def __init__(
        self,
        model: str | Path | Reader,
        *,
        question: str = "question",
        context: str = "context",
        answer_options: Mapping[str, Any] | None = None,
        **load_options: Any,
    ):
        """Notes what to do; loads nothing.

        Args:
          model: a directory, a hub id, or a reader that is there already.
          question: the column with the question.
          context: the column with the context.
          answer_options: those of `flaxqa.config.AnswerOptions`, but for `top_k`.
          **load_options: those of `flaxqa.load`.
        """
        self.model, self.question, self.context = model, question, context
        self.answer_options, self.load_options = dict(answer_options or {}), load_options
        self.reader: Reader | None = None if isinstance(model, (str, Path)) else model

    def __getstate__(self) -> dict[str, Any]:
        own = None if isinstance(self.model, (str, Path)) else self.reader
        return {**self.__dict__, "reader": own}  # a copy loads its own

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns added; a frame stays a frame of its kind.

        Raises:
          UsageError: a column is missing.
        """
        if self.reader is None:
            from flaxqa import reader

            self.reader = reader.load(str(self.model), **self.load_options)
        names = (self.question, self.context)
        if frames.library_of(batch) is None:
            if missing := [name for name in names if name not in batch]:
                raise UsageError(
                    f"the batch has no column {missing[0]!r}; it has {', '.join(batch)}"
                )
            pairs: Iterator[Any] = zip(batch[names[0]], batch[names[1]], strict=True)
        else:
            pairs = ((row[names[0]], row[names[1]]) for row in frames.rows_of(batch, names))
        found = list(self.reader.answers(pairs, **self.answer_options))
        return frames.with_columns(batch, frames.columns_of(found))
