"""Data frames of pandas, polars and Arrow: as records, and as what comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flaxqa.errors import UsageError

if TYPE_CHECKING:
    from flaxqa.answers import Answers

ROWS_AT_ONCE = 1_024
NEEDED = ("question", "context")


def library_of(value: Any) -> str | None:
    """ "pandas", "polars" or "pyarrow" if it is a frame of theirs; none of them is imported."""
    kinds = {
        "pandas": ("DataFrame",),
        "polars": ("DataFrame", "LazyFrame"),
        "pyarrow": ("Table", "RecordBatch"),
    }
    for kind in type(value).__mro__:
        library = kind.__module__.partition(".")[0]
        if kind.__name__ in kinds.get(library, ()):
            return library
    return None


def rows_of(records: Iterable[Any], needed: Sequence[str] = NEEDED) -> Iterable[Any]:
    """The rows of a data frame as mappings, in its order; anything else as it is.

    Raises:
      UsageError: a column that is needed is missing.
    """
    library = library_of(records)
    if library is None:
        return records
    frame: Any = records
    if type(frame).__name__ == "LazyFrame":
        frame = frame.collect()
    names = [str(name) for name in (frame.schema.names if library == "pyarrow" else frame.columns)]
    if missing := [name for name in needed if name not in names]:
        raise UsageError(
            f"the frame has no column {' and no '.join(map(repr, missing))}; it has "
            f"{', '.join(names)}"
        )
    if library == "polars":
        return frame.iter_rows(named=True)
    if library == "pyarrow":
        return (row for begin in range(0, frame.num_rows, ROWS_AT_ONCE)
                for row in frame.slice(begin, ROWS_AT_ONCE).to_pylist())  # fmt: skip
    return (dict(zip(names, row, strict=True)) for row in frame.itertuples(index=False, name=None))


def columns_of(found: Sequence[Answers]) -> dict[str, list[Any]]:
    """The best answer of each as columns of one type: "", -1, -1 and 0 where there is none."""
    first = [one[0] if one else None for one in found]
    return {
        "answer": ["" if one is None else one.text for one in first],
        "start": [-1 if one is None else one.start for one in first],
        "end": [-1 if one is None else one.end for one in first],
        "score": [0.0 if one is None else one.score for one in first],
        "no_answer_score": [one.no_answer_score for one in found],
        "n_windows": [one.n_windows for one in found],
        "error": [one.error or "" for one in found],
    }


def with_columns(batch: Any, added: Mapping[str, list[Any]]) -> Any:
    """A frame, or a mapping of columns, with others added; of the kind that it was."""
    library = library_of(batch)
    if library is None:
        return {**batch, **added}
    if library == "pandas":
        return batch.assign(**added)
    if library == "polars":
        import polars

        return batch.with_columns([polars.Series(name, values) for name, values in added.items()])
    import pyarrow

    for name, values in added.items():
        array = pyarrow.array(values)
        if name in batch.schema.names:
            place = batch.schema.get_field_index(name)
            batch = batch.set_column(place, name, array)
        else:
            batch = batch.append_column(name, array)
    return batch
