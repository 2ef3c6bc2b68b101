"""The call of transformers 4.57's question-answering pipeline, which transformers 5.3 removed.

The answers, offsets and scores are those of 4.57.6 (see `flaxqa.pipeline_answers`), its
defects included. What differs, and why, is listed in docs/migrate.md.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers

from flaxqa import checkpoint, features, predict, tokens, weights
from flaxqa.checkpoint import Checkpoint, PretrainedModel
from flaxqa.devices import use_compilation_cache
from flaxqa.errors import DataError, ModelRejected, UsageError, all_problems, check_counts
from flaxqa.features import Example
from flaxqa.pipeline_answers import decode_pipeline
from flaxqa.reader import NOT_FINITE, RECORDS_PER_CHUNK, chunks
from flaxqa.tokens import Tokens

TASK = "question-answering"
# What 4.57 takes when no model is named.
DEFAULT_MODEL = "distilbert/distilbert-base-cased-distilled-squad"
DEFAULT_REVISION = "564e9b5"
# Arguments of transformers.pipeline that change no answer, and those that are taken if they ask
# for nothing.
WITHOUT_EFFECT = ("framework", "num_workers")
EMPTY: dict[str, tuple[Any, ...]] = {
    "config": (None,),
    "feature_extractor": (None,),
    "image_processor": (None,),
    "processor": (None,),
    "modelcard": (None,),
    "use_fast": (None, True),
    "token": (None, False),
    "device_map": (None,),
    "trust_remote_code": (None, False),
    "model_kwargs": (None, {}),
    "pipeline_class": (None,),
}

NEEDED = ("question", "context")

Record = tuple[str, str, dict[str, Any]]
Output = dict[str, Any] | list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a call may set, with 4.57's defaults.

    Attributes:
      top_k: how many answers at most; 1 gives a dict, more a list of dicts, unless only one is
        there.
      doc_stride: tokens that neighbouring windows share; None for half of `max_seq_len`, at most
        128.
      max_answer_len: tokens of the longest answer, before it is widened to words.
      max_seq_len: tokens of a window; None for the tokenizer's `model_max_length`, at most 384.
      max_question_len: without effect.
      handle_impossible_answer: whether "no answer" competes, with the text "".
      align_to_words: whether answers are widened to whole words.
      padding: without effect.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int = 64
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    padding: bool | str = "do_not_pad"

    def __post_init__(self) -> None:
        least = {"top_k": 1, "max_answer_len": 1, "doc_stride": 0, "max_seq_len": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("doc_stride", "max_seq_len"):
                continue
            try:
                number = operator.index(value)  # also numpy's integers
            except TypeError:
                raise UsageError(f"{name} parameter should be an integer (got {value!r})") from None
            if number < low:
                raise UsageError(f"{name} parameter should be >= {low} (got {value})")
            object.__setattr__(self, name, number)
        if self.padding not in (True, False, "do_not_pad", "longest", "max_length"):
            raise UsageError(f"padding {self.padding!r} is no padding strategy")


NAMES = tuple(field.name for field in dataclasses.fields(Parameters))


def pipeline(
    task: str = TASK,
    model: str | Path | PretrainedModel | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    device: Any = None,
    batch_size: int | None = None,
    *,
    dtype: Any = None,
    torch_dtype: Any = None,
    read_ahead: int = RECORDS_PER_CHUNK,
    **parameters: Any,
) -> QuestionAnsweringPipeline:
    """What `transformers.pipeline("question-answering", ...)` was.

    Args:
      task: "question-answering", nothing else.
      model: a directory, a hub id, or a model; None for the one 4.57 took.
      tokenizer: a directory or hub id, a `tokenizers.Tokenizer` or a fast tokenizer of
        transformers; None for the model's own.
      revision: branch, tag or commit of a hub model.
      device: None for all devices of this process; else -1 or "cpu", the number of an accelerator,
        "cuda:1", "gpu", "tpu:0", or a `jax.Device`.
      batch_size: the most windows of a batch; None for as many as suit the device.
      dtype: "float32" (also what "auto" means here), "bfloat16" or "float16".
      torch_dtype: its older name.
      read_ahead: how many records of a generator are read before the first is answered.
      **parameters: defaults of its calls, see `Parameters`: top_k, doc_stride, max_answer_len,
        max_seq_len, max_question_len, handle_impossible_answer, align_to_words, padding.

    Raises:
      KeyError: another task.
      ModelRejected, UsageError, TryAgain: see `flaxqa.checkpoint.load`.
    """
    if task != TASK:
        raise KeyError(f"flaxqa has the task {TASK!r} and no other, so not {task!r}")
    refuse_unknown(parameters)
    check_counts(batch_size=1 if batch_size is None else batch_size, read_ahead=read_ahead)
    defaults = merged(Parameters(), parameters)
    devices = which_devices(device)
    dtype = torch_dtype if dtype is None else dtype
    if str(dtype).startswith("torch."):
        dtype = str(dtype).removeprefix("torch.")
    dtype = None if str(dtype) == "auto" else dtype
    use_compilation_cache()
    if model is None:
        warnings.warn(
            f"No model was supplied, defaulted to {DEFAULT_MODEL} and revision {DEFAULT_REVISION}.",
            stacklevel=2,
        )
        model, revision = DEFAULT_MODEL, revision or DEFAULT_REVISION
    loaded, longest = loaded_of(model, tokenizer, revision, dtype)
    return QuestionAnsweringPipeline(
        loaded,
        defaults=defaults,
        model_max_length=longest,
        devices=devices,
        batch_size=batch_size,
        read_ahead=read_ahead,
    )


def refuse_unknown(parameters: Mapping[str, Any]) -> None:
    """Raises: TypeError: an argument is none of these, and asks for something."""
    known = {*NAMES, "topk", *WITHOUT_EFFECT}
    unknown = {
        f"{name}={value!r}"
        for name, value in parameters.items()
        if name not in known and value not in EMPTY.get(name, ())
    }
    if unknown:
        raise TypeError(
            f"pipeline() does not take {', '.join(sorted(unknown))}; it takes task, model, "
            f"tokenizer, revision, device, batch_size, dtype, read_ahead, {', '.join(NAMES)}"
        )


def loaded_of(
    model: Any, tokenizer: Any, revision: str | None, dtype: Any
) -> tuple[Checkpoint, int]:
    """The model with its tokenizer, and the longest window that this takes.

    Raises:
      ModelRejected: the tokenizer does not fit the model; see also `flaxqa.checkpoint.load`.
      UsageError: the model is none.
    """
    if isinstance(model, PretrainedModel):
        if dtype is not None or revision is not None:
            raise UsageError("dtype and revision are for loading; this model is loaded already")
        if tokenizer is None:
            raise UsageError("with a model that is an object, tokenizer= is needed, too")
        tokenizer, longest = tokenizer_of(tokenizer)
        loaded = Checkpoint(model, model.config, tokenizer, Path(), None, (), {})
    elif isinstance(model, (str, Path)):
        loaded = checkpoint.load(model, revision=revision, dtype=dtype or "float32")
        longest = model_max_length(loaded.directory)
        if tokenizer is not None:
            tokenizer, longest = tokenizer_of(tokenizer)
    else:
        raise UsageError(
            f"model is a {type(model).__name__}; flaxqa takes a directory, a hub id, or its own "
            "DistilBertForQuestionAnswering or BertForQuestionAnswering"
        )
    if tokenizer is not None:
        if problems := tokens.tokenizer_problems(tokenizer, loaded.config.vocab_size):
            raise ModelRejected(all_problems("the tokenizer does not fit the model", problems))
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    return loaded, longest


class QuestionAnsweringPipeline:
    """Answers questions as transformers 4.57's class of this name did; made by `pipeline`.

    Attributes:
      task: "question-answering".
      model: the model.
      tokenizer: its tokenizer, without truncation and padding.
    """

    task = TASK

    def __init__(
        self,
        loaded: Checkpoint,
        *,
        defaults: Parameters,
        model_max_length: int,
        devices: Sequence[jax.Device] | None,
        batch_size: int | None,
        read_ahead: int,
    ):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.defaults, self.read_ahead = defaults, read_ahead
        positions = loaded.config.max_position_embeddings
        self.model_max_length = min(model_max_length, positions)
        self.predictor = predict.Predictor(
            loaded.model,
            max_length=positions,
            devices=devices,
            batch_tokens=None if batch_size is None else batch_size * positions,
        )
        self.known: dict[str, Tokens] = {}

    def __repr__(self) -> str:
        return f"<QuestionAnsweringPipeline of a {type(self.model).__name__}, {self.defaults}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answers one question or many.

        Takes `question=` and `context=`, strings or sequences of them; or, as the only argument, a
        dict with both, a list of such dicts, or a generator of them; or question and context.
        Besides, for this call, the parameters of `Parameters`.

        Returns:
          For one question a dict of `score`, `start`, `end` (characters of the context, end
          exclusive) and `answer`, or a list of them if several are asked for and there; for many a
          list of these; for a generator or a torch data set, an iterator of these.

        Raises:
          ValueError: a text is empty or None, a parameter has a value that cannot be, or a
            question leaves no room for its context.
          KeyError: a record has no question or no context.
        """
        given = {name: kwargs.pop(name) for name in (*NAMES, "topk") if name in kwargs}
        parameters = self.fitting(merged(self.defaults, given))
        batch_size = kwargs.pop("batch_size", None)  # it changes no answer
        check_counts(batch_size=1 if batch_size is None else batch_size)
        kwargs.pop("num_workers", None)
        inputs = arguments(args, kwargs)
        if isinstance(inputs, types.GeneratorType) or is_torch_dataset(inputs):
            return self.stream(checked(inputs, empty=True), parameters)
        records = list(checked(inputs))  # all of them before any is computed
        outputs = list(self.stream(iter(records), parameters))
        return outputs[0] if len(outputs) == 1 else outputs

    def fitting(self, parameters: Parameters) -> Parameters:
        """The parameters with those that were left out, refused if the model cannot take them."""
        length, stride = parameters.max_seq_len, parameters.doc_stride
        if length is None:
            length = min(self.model_max_length, 384)
        if stride is None:
            stride = min(length // 2, 128)
        if stride > length:
            raise UsageError(f"`doc_stride` ({stride}) is larger than `max_seq_len` ({length})")
        if stride >= length - 1:
            raise UsageError(f"`doc_stride` ({stride}) leaves no room in `max_seq_len` ({length})")
        return dataclasses.replace(parameters, max_seq_len=length, doc_stride=stride)

    def stream(self, records: Iterator[Record], parameters: Parameters) -> Iterator[Output]:
        """The output of each record, in order; reads `read_ahead` records before the first."""
        positions = self.model.config.max_position_embeddings
        number = 0
        for chunk in chunks(
            records, self.read_ahead, size_of=lambda record: len(record[0]) + len(record[1])
        ):
            examples = [
                Example(f"record {number + index}", question, context)
                for index, (question, context, _) in enumerate(chunk)
            ]
            number += len(chunk)
            windows = features.make(
                examples,
                self.tokenizer,
                max_length=parameters.max_seq_len or 0,
                doc_stride=parameters.doc_stride or 0,
                max_question_length=parameters.max_seq_len,
                known=self.known,
            )
            if (longest := max(map(len, windows))) > positions:
                raise DataError(
                    f"a window of {longest} tokens, but the model has {positions} positions; "
                    f"max_seq_len is {parameters.max_seq_len}"
                )
            logits = self.predictor.predict(windows)
            if not logits.finite().all():
                raise DataError(NOT_FINITE)
            found = decode_pipeline(
                examples,
                windows,
                logits,
                top_k=parameters.top_k,
                max_answer_length=parameters.max_answer_len,
                align_to_words=parameters.align_to_words,
                handle_impossible_answer=parameters.handle_impossible_answer,
            )
            for (_, _, others), answered in zip(chunk, found, strict=True):
                rows = [{**others, **answer} for answer in answered]
                yield rows[0] if len(rows) == 1 else rows


def merged(parameters: Parameters, given: Mapping[str, Any]) -> Parameters:
    """The parameters with what was given for a call; `topk` is the old name of `top_k`."""
    values = {name: value for name, value in given.items() if value is not None}
    if "topk" in values:
        warnings.warn("topk parameter is deprecated, use top_k instead", UserWarning, stacklevel=3)
        values.setdefault("top_k", values["topk"])
    return dataclasses.replace(
        parameters, **{name: value for name, value in values.items() if name in NAMES}
    )


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    """The records that a call names, an iterator if it names one."""
    known = {"question", "context", "X", "data"}
    if unknown := kwargs.keys() - known:
        raise TypeError(
            f"unknown arguments: {', '.join(sorted(unknown))}; parameters are {', '.join(NAMES)}"
        )
    if args:
        if len(args) == 2 and all(isinstance(each, str) for each in args):
            return [{"question": args[0], "context": args[1]}]
        inputs = args[0] if len(args) == 1 else list(args)
    elif "X" in kwargs or "data" in kwargs:
        inputs = kwargs.get("X", kwargs.get("data"))
    elif "question" in kwargs and "context" in kwargs:
        return records_of(kwargs["question"], kwargs["context"])
    else:
        raise UsageError("a question and a context are needed")
    if isinstance(inputs, Mapping):
        lists = [name for name in inputs if name in NEEDED and isinstance(inputs[name], list)]
        return records_of(*(inputs.get(name) for name in NEEDED)) if lists else [inputs]
    if is_torch_dataset(inputs) and not isinstance(inputs, Iterable):
        return (inputs[index] for index in range(len(inputs)))
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise UsageError(f"{inputs!r:.80} is neither a record nor an iterable of records")
    return inputs


def records_of(questions: Any, contexts: Any) -> list[dict[str, Any]]:
    """One record for each question, each context, or each pair of them."""
    for name, given in (("question", questions), ("context", contexts)):
        if given is None:
            raise UsageError(f"`{name}` cannot be None")
        if not isinstance(given, Iterable) or isinstance(given, Mapping):
            raise UsageError(f"{name} is {type(given).__name__}, not a string or a list of them")
    many = [None if isinstance(given, str) else list(given) for given in (questions, contexts)]
    lengths = {len(each) for each in many if each is not None}
    if len(lengths) > 1:
        raise UsageError(
            "Questions and contexts don't have the same lengths: "
            + " and ".join(str(len(each or ())) for each in many)
        )
    n = lengths.pop() if lengths else 1
    columns = [
        [given] * n if each is None else each
        for given, each in zip((questions, contexts), many, strict=True)
    ]
    return [{"question": q, "context": c} for q, c in zip(*columns, strict=True)]


def is_torch_dataset(inputs: Any) -> bool:
    """Whether this is a torch.utils.data.Dataset, found out without torch."""
    return any(base.__module__.startswith("torch.utils.data") for base in type(inputs).__mro__)


def checked(records: Iterable[Any], *, empty: bool = False) -> Iterator[Record]:
    """What `check` gives for each record; its errors say which record it was, if not the first."""
    for number, record in enumerate(records):
        try:
            yield check(record, empty=empty)
        except (KeyError, UsageError) as error:
            if number == 0:
                raise
            raise type(error)(f"record {number}: {error.args[0]}") from error


def check(record: Any, *, empty: bool = False) -> Record:
    """The question, the context and the other fields of a record.

    Args:
      record: a mapping with both.
      empty: whether they may be empty, as 4.57 had it for generators.

    Raises:
      KeyError: it has no question or no context.
      ValueError: it is not a mapping, or a text is empty or not a string.
    """
    if not isinstance(record, Mapping):
        raise UsageError(f"{record!r:.80} must be a dict with question and context")
    for name in NEEDED:
        if name not in record:
            raise KeyError("You need to provide a dictionary with keys {question:..., context:...}")
        text = record[name]
        if text is None or (text == "" and not empty):
            raise UsageError(f"`{name}` cannot be {'None' if text is None else 'empty'}")
        if not isinstance(text, str):
            raise UsageError(f"`{name}` is {type(text).__name__}, it must be a string")
    others = {name: value for name, value in record.items() if name not in NEEDED}
    return record["question"], record["context"], others


def which_devices(device: Any) -> list[jax.Device] | None:
    """The devices that transformers' `device` names; None, all of them, for None."""
    if device is None:
        return None
    if isinstance(device, jax.Device):
        return [device]
    name = str(device)  # also that of a torch.device
    if name in ("-1", "cpu"):
        return jax.local_devices(backend="cpu")[:1]
    kind, _, number = name.partition(":")
    if kind.isdecimal():
        kind, number = "", kind
    kind = "gpu" if kind == "cuda" else kind
    if not (number or "0").isdecimal():
        raise UsageError(f"device {name!r} is not understood")
    try:
        devices = jax.local_devices(backend=kind or None)
    except RuntimeError:
        devices = []
    if int(number or 0) >= len(devices) or (not kind and devices[0].platform == "cpu"):
        there = ", ".join(f"{each.platform}:{each.id}" for each in jax.local_devices())
        raise UsageError(f"there is no device {name!r}; this process has {there}")
    return [devices[int(number or 0)]]


def tokenizer_of(tokenizer: Any) -> tuple[tokenizers.Tokenizer, int]:
    """A tokenizer of ours from what a user names, and its `model_max_length`."""
    if isinstance(tokenizer, (str, Path)):
        directory, _ = checkpoint.locate(tokenizer)
        return tokens.load_tokenizer(directory)[0], model_max_length(directory)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UsageError(
            f"tokenizer is a {type(tokenizer).__name__}; flaxqa takes a directory, a "
            "tokenizers.Tokenizer or a fast tokenizer of transformers"
        )
    if getattr(tokenizer, "padding_side", "right") != "right":
        raise UsageError("the tokenizer pads on the left, which flaxqa does not")
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy, int(min(getattr(tokenizer, "model_max_length", 384), 1 << 30))


def model_max_length(directory: Path) -> int:
    """That of the directory's tokenizer_config.json; without one, any length."""
    name = "tokenizer_config.json"
    settings = weights.read_json(directory, name) if (directory / name).is_file() else {}
    value = settings.get("model_max_length")
    return int(value) if isinstance(value, (int, float)) and 1 <= value < 1 << 30 else 1 << 30
