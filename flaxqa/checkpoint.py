"""A Hugging Face checkpoint, from the hub or a directory: config, tokenizer and model, or an error.

Nothing is guessed. A tensor that is missing, left over, of another shape or not finite, a config
that lies, a tokenizer of another vocabulary: each is refused by name, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx
from jax.typing import DTypeLike

from flaxqa import files, stores, tokens, weights
from flaxqa.errors import ModelRejected, TryAgain, UsageError, all_problems
from flaxqa.model import (
    BertConfig,
    DistilBertConfig,
    EncoderConfig,
    QuestionAnsweringModel,
    read_config,
)

# PyTorch calls the array of every kind of layer `weight`; Flax names it by the kind.
TORCH_NAME = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# What a checkpoint of the type calls the modules that DistilBERT calls otherwise.
MODULE_NAMES = {
    "distilbert": {},
    "bert": {
        "transformer.layer": "encoder.layer",
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    },
}
PRETRAINING_HEADS = {
    "distilbert": ("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    "bert": ("cls.",),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


log = logging.getLogger(__name__)


class PretrainedModel(QuestionAnsweringModel):
    """What both models have in common: weights from and to files."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, dtype: DTypeLike = "float32"
    ) -> Self:
        """The trained model of a local directory, or of a repository on the Hugging Face Hub.

        Args:
          name: a directory, or a hub id such as
            `distilbert/distilbert-base-uncased-distilled-squad`.
          revision: branch, tag or commit of the hub repository.
          dtype: of the weights and of the products' operands: float32, bfloat16, float16, float64.

        Raises:
          ModelRejected: see `flaxqa.checkpoint.load`; or it is a checkpoint of another class.
        """
        model = load(name, revision=revision, dtype=dtype).model
        if not isinstance(model, cls):
            raise ModelRejected(f"{name} is a checkpoint of {type(model).__name__}")
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which transformers' torch class loads."""
        save(self, directory)


class DistilBertForQuestionAnswering(PretrainedModel):
    """DistilBERT with a linear layer that scores every token as the answer's start and end.

    A new model has random weights; `from_pretrained` gives a trained one.
    """

    config_class = DistilBertConfig


class BertForQuestionAnswering(PretrainedModel):
    """BERT with a linear layer that scores every token as the answer's start and end.

    A new model has random weights; `from_pretrained` gives a trained one.
    """

    config_class = BertConfig


MODELS: dict[type[EncoderConfig], type[PretrainedModel]] = {
    DistilBertConfig: DistilBertForQuestionAnswering,
    BertConfig: BertForQuestionAnswering,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that was loaded whole, and where it came from.

    Attributes:
      tokenizer: without truncation and padding, whatever the file said.
      name: what `load` finds it by from any place: a hub id, or the directory's whole path.
      directory: where its files lie, for a hub repository in the hub's cache.
      commit: the 40-digit commit of a hub repository, None for a directory.
      files: what was read, by name.
      ignored: tensors that were left out on purpose, each with the reason.
      states: of the files before they were read, by name; see `flaxqa.files.state_of`.
      notes: what had to be done to make the files fit, a sentence each; also logged as a warning.
      content: the whole config.json.
    """

    model: PretrainedModel
    config: EncoderConfig
    tokenizer: tokenizers.Tokenizer
    directory: Path
    commit: str | None
    files: tuple[str, ...]
    ignored: Mapping[str, str]
    states: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name: str = ""
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weights_file(self) -> str:
        """The file that the weights are in, or the index of the files."""
        return next(one for one in self.files if weights.is_weights(one))

    def sha256(self) -> dict[str, str]:
        """The sha256 of every file that was read, by name.

        Raises:
          ModelRejected: one has changed since.
        """
        hashes = {}
        for name in self.files:
            path = self.directory / name
            try:
                with path.open("rb") as file:
                    hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ModelRejected(f"{path} cannot be read: {error.strerror}") from error
            if files.state_of(path) != self.states.get(name):
                raise ModelRejected(f"{path} has changed since it was loaded")
        return hashes


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    weights_file: str | None = None,
    dtype: DTypeLike = "float32",
    new_head: int | None = None,
) -> Checkpoint:
    """Loads a question-answering checkpoint, every tensor accounted for.

    Args:
      name: a directory, or a hub id such as `distilbert/distilbert-base-uncased-distilled-squad`.
      revision: branch, tag or commit of the hub repository.
      weights_file: name of the file of weights, or of the index of shards, in that directory; the
        first of `flaxqa.weights.FORMATS` when left out, or the only other file of such a format.
      dtype: of the weights and of the products' operands, one of DTYPES.
      new_head: the seed of a question-answering head for a base model, which has none and is to be
        trained; None to refuse base models.

    Raises:
      ModelRejected: a file is missing, damaged, unsafe, or does not fit the others; says which.
      UsageError: there is no such directory or repository, or no such dtype.
      TryAgain: the hub cannot be reached and its cache has no copy.
    """
    dtype = checked_dtype(dtype)
    directory, commit = locate(name, revision, weights_file)
    try:
        loaded = load_directory(directory, commit, weights_file, dtype, new_head)
        by_path = commit is None and not stores.is_url(name)
        told = str(directory.absolute()) if by_path else str(name)
        return dataclasses.replace(loaded, name=told)
    except OSError as error:
        raise ModelRejected(f"{directory} cannot be read: {error}") from error


def load_directory(
    directory: Path,
    commit: str | None,
    weights_file: str | None,
    dtype: DTypeLike,
    new_head: int | None,
) -> Checkpoint:
    states = {path.name: files.state_of(path) for path in directory.iterdir()}
    if not (directory / "config.json").exists() and (
        (directory / "adapter_config.json").exists() or any(directory.glob("*.onnx"))
    ):
        weights.find(directory, weights_file)  # says what such a folder is
    content = weights.read_json(directory, "config.json")
    try:
        config = read_config(content)
    except ModelRejected as error:
        raise ModelRejected(f"{directory / 'config.json'}: {error}") from error
    tokenizer, tokenizer_files = tokens.load_tokenizer(directory)
    if problems := tokens.tokenizer_problems(tokenizer, config.vocab_size):
        raise ModelRejected(all_problems(f"{directory}: the tokenizer does not fit", problems))
    weight_files = weights.find(directory, weights_file)
    tensors = weights.read(directory, weights_file)
    notes = []
    if new_head is not None and not any(name.endswith("qa_outputs.weight") for name in tensors):
        tensors = {**tensors, **random_head(config, new_head)}
        notes.append(f"{weight_files[0]} is a base model; its head is new, of random weights")
    tensors, note = unwrapped(tensors, config)
    try:
        model, ignored = from_tensors(tensors, config, dtype=dtype)
    except ModelRejected as error:
        raise ModelRejected(f"{weight_files[0]}: {error}") from error
    notes += [f"{weight_files[0]}: {note}"] if note else []
    if "model_type" not in content:
        notes.append(f"{directory / 'config.json'} has no model_type; read as {config.model_type}")
    if weights_file is None and weight_files[0].name not in weights.FORMATS:
        notes.append(f"the weights are {weight_files[0]}, the only file that may be them")
    for text in notes:
        log.warning("%s", text)
    names = ("config.json", *tokenizer_files, *(path.name for path in weight_files))
    return Checkpoint(
        model, config, tokenizer, directory, commit, names, ignored, states, tuple(notes),
        content=content,
    )  # fmt: skip


def checked_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        name = jnp.dtype(dtype).name if not isinstance(dtype, str) else dtype
    except TypeError as error:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}") from error
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise UsageError("dtype float64 needs jax.enable_x64(True)")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


# ------------------------------------------------------------------------------------------ files


def locate(
    name: str | Path, revision: str | None = None, weights_file: str | None = None
) -> tuple[Path, str | None]:
    """(directory, commit) of a checkpoint's files; those of a hub repository are fetched first."""
    if stores.is_url(name):
        if revision is not None:
            raise UsageError(f"{name} is a URL; a revision belongs to a hub id")
        return fetched(str(name), weights_file), None
    directory = files.local(name)
    try:
        directory = directory.expanduser()
        is_there, is_directory = directory.exists(), directory.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered
        raise UsageError(f"{name} cannot be read: {error}") from error
    if is_directory:
        if revision is not None:
            raise UsageError(f"{name} is a directory; a revision belongs to a hub id")
        return directory, None
    parts = str(name).split("/")
    if is_there or len(parts) > 2 or parts[0] in ("", ".", "..", "~"):
        raise UsageError(f"{name} is {'not a directory' if is_there else 'missing'}")
    return fetch(str(name), revision, weights_file)


def fetched(url: str, weights_file: str | None) -> Path:
    """A folder with the checkpoint's files of an object store, in the user's cache."""
    states = {name: one for name, one in stores.states_below(url).items() if "/" not in name}
    if not states:
        raise UsageError(f"{url} has no objects")
    chosen = {"config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json",
              "vocab.txt"} & states.keys()  # fmt: skip
    usual = weights.FORMATS if weights_file is None else (weights_file,)
    found = next((name for name in usual if name in states), None)
    chosen |= {found} if found is not None else set(weights.candidates(states))
    if found is not None and found.endswith(weights.INDEX):
        index = stores.folder_of(url, [found], states) / found
        chosen |= set(weights.weight_map(index).values()) & states.keys()
    return stores.folder_of(url, chosen, states)


def fetch(repo_id: str, revision: str | None, weights_file: str | None) -> tuple[Path, str]:
    """The repository's config, tokenizer and one format of weights, in the hub's own cache."""
    import huggingface_hub
    from huggingface_hub import errors

    def get(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=revision))

    unreached = []  # what is not in the cache, of which the hub could not be asked

    def get_if_there(file: str) -> bool:
        try:
            get(file)
        except errors.LocalEntryNotFoundError as error:
            known = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision)
            if known is not huggingface_hub._CACHED_NO_EXIST:  # not known to be missing there
                unreached.append(error)
            return False
        except errors.EntryNotFoundError:
            return False
        return True

    where = f"{repo_id} at {revision or 'main'}"
    try:
        directory = get("config.json").parent
        revision = directory.name  # the commit: all files are of one state of the repository
        tokenizer_files = [file for file in ("tokenizer.json", "vocab.txt") if get_if_there(file)]
        if not tokenizer_files and not unreached:
            raise ModelRejected(f"{where} has neither tokenizer.json nor vocab.txt")
        if not get_if_there("tokenizer_config.json") and unreached:
            if tokenizer_files == ["vocab.txt"]:  # it may say that upper case is kept
                raise unreached[-1]
            unreached.pop()
        usual = weights.FORMATS if weights_file is None else (weights_file,)
        found = next((file for file in usual if get_if_there(file)), None)
        if unreached and not (tokenizer_files and found):
            raise unreached[0]
        if found is not None and found.endswith(weights.INDEX):
            for shard in set(weights.weight_map(directory / found).values()):
                if "/" in shard:
                    raise ModelRejected(f"{where}: {shard!r} is not a bare file name")
                get(shard)
    except errors.LocalEntryNotFoundError as error:
        raise TryAgain(
            f"{where} is not in the hub's cache and the hub cannot be reached; "
            "name a local directory, or try again online"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelRejected(f"{where} is not a whole checkpoint: {error}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UsageError(f"the hub has no {where}, or it is private") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id!r} is neither a directory nor a hub id: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise TryAgain(f"{where} cannot be fetched: {error}") from error
    return directory, directory.name


# ----------------------------------------------------------------------------------------- tensors


def torch_key(path: tuple[Any, ...], model_type: str) -> str:
    """('qa_outputs', 'kernel') -> 'qa_outputs.weight', with the names of the type's checkpoints."""
    *module, leaf = path
    name = ".".join(map(str, (*module, TORCH_NAME[leaf])))
    for ours, theirs in MODULE_NAMES[model_type].items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def unwrapped(
    tensors: weights.Tensors, config: EncoderConfig
) -> tuple[weights.Tensors, str | None]:
    """The tensors under their usual names, and a sentence on how they were called, or None.

    Wrappers put a prefix before all names (`module.` DataParallel, `_orig_mod.` torch.compile,
    `model.` a class of one's own), and a model that was saved alone has none where there should be
    one. They get their usual names where all that the config asks for is there then; else all stay
    as they are.
    """
    wanted, own = shapes(config), f"{config.model_type}."
    prefixes = []
    for anchor in ("qa_outputs.weight", "embeddings.word_embeddings.weight"):
        found = [name for name in tensors if f".{name}".endswith(f".{anchor}")]
        if wanted.keys() <= tensors.keys() or len(found) != 1:
            return tensors, None
        prefixes.append(found[0].removesuffix(anchor))
    head, encoder = prefixes

    def usual(name: str) -> str:
        if name.startswith(f"{head}qa_outputs."):
            return name.removeprefix(head)
        if encoder and not name.startswith(encoder):
            return name.removeprefix(head)
        inside = name.removeprefix(encoder)
        return own + inside if own + inside in wanted else inside

    try:
        renamed = weights.unique((usual(name), tensor) for name, tensor in tensors.items())
    except ValueError:
        return tensors, None
    if not wanted.keys() <= renamed.keys():
        return tensors, None
    if encoder == head + own:
        told = f"{head!r} before every tensor's name was left out"
    else:
        told = f"the names of the encoder's tensors begin with {encoder!r}; read as {own!r}"
        told = told if encoder else f"the names of the encoder's tensors lack {own!r}; it was added"
    return renamed, told


def from_tensors(
    tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, dtype: DTypeLike = "float32"
) -> tuple[PretrainedModel, dict[str, str]]:
    """The model with these tensors cast to `dtype`, and the ones left out with the reason.

    Args:
      tensors: under PyTorch's names, in PyTorch's layout.
      config: what the tensors' names and shapes must follow from.
      dtype: of the weights and of the products' operands, one of DTYPES.

    Raises:
      ModelRejected: a tensor is missing, unexpected, of another shape, not finite, or does not fit
        the dtype; names every one.
    """
    dtype = checked_dtype(dtype)
    wanted = shapes(config)
    extra = {
        name: harmless(name, tensors[name], config.model_type)
        for name in tensors.keys() - wanted.keys()
    }
    problems = listed("missing", wanted.keys() - tensors.keys())
    problems += listed("unexpected", [name for name, reason in extra.items() if not reason])
    there, asked = (layers_of(names) for names in (tensors, wanted))
    if there and there != asked:
        problems.append(f"the file has {there} layers, the config asks for {asked}")
    arrays = {}
    for name in sorted(wanted.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != wanted[name]:
            problems.append(f"{name} has shape {tensor.shape}, the config needs {wanted[name]}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} is stored as {tensor.dtype}, not as a float")
        elif bad := int(np.size(tensor) - np.isfinite(tensor).sum()):
            problems.append(f"{name} has {bad} values that are not finite")
        else:
            with np.errstate(over="ignore"):
                arrays[name] = np.asarray(tensor, dtype)
            if not np.isfinite(arrays[name]).all():
                problems.append(f"{name} has values that do not fit {dtype}")
    if problems:
        title = "the tensors do not fit the config"
        if not any(name.startswith("qa_outputs.") for name in tensors):
            title = "no question-answering head (qa_outputs), so this is a base model; besides"
        raise ModelRejected(all_problems(title, problems))
    graphdef, state = nnx.split(abstract(config, dtype))
    loaded = []
    for path, param in nnx.to_flat_state(state):
        array = arrays.pop(torch_key(path, config.model_type))
        # torch keeps a Linear as [out, in]
        loaded.append(
            (path, param.replace(jnp.asarray(array.T if path[-1] == "kernel" else array)))
        )
    ignored = {name: reason for name, reason in extra.items() if reason}
    return nnx.merge(graphdef, nnx.from_flat_state(loaded)), ignored


def random_head(config: EncoderConfig, seed: int) -> weights.Tensors:
    """The tensors of a question-answering head as BERT's weights begin: normal, 0.02 wide."""
    kernel = 0.02 * np.random.default_rng(seed).standard_normal((2, config.dim))
    return {
        "qa_outputs.weight": kernel.astype(np.float32),
        "qa_outputs.bias": np.zeros(2, np.float32),
    }


def listed(what: str, names: Iterable[str]) -> list[str]:
    """What is to be said of tensors: of each, or of many how they begin and three of them."""
    names = sorted(names)
    if len(names) <= 3:
        return [f"{what} {name}" for name in names]
    begin = os.path.commonprefix(names).rpartition(".")[0]  # noqa: RUF071
    where = f", all below {begin}." if begin else ""
    return [f"{what} {len(names):,} tensors{where}: {', '.join(names[:3])} and more"]


def layers_of(names: Iterable[str]) -> int:
    """How many layers have tensors."""
    found = (re.search(r"\blayer\.(\d+)\.", name) for name in names)
    return len({one[1] for one in found if one})


def abstract(config: EncoderConfig, dtype: DTypeLike) -> PretrainedModel:
    """The model with shapes and without arrays."""
    return nnx.eval_shape(lambda: MODELS[type(config)](config, dtype=dtype, rngs=nnx.Rngs(0)))


def shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of such a checkpoint, in PyTorch's layout, by name.

    From a model of one layer: even an abstract one of as many layers as a config can promise would
    take minutes, and this is asked before the config is believed.
    """
    one_layer = abstract(dataclasses.replace(config, n_layers=1), "float32")
    found = {}
    for path, param in nnx.to_flat_state(nnx.state(one_layer)):
        name, shape = torch_key(path, config.model_type), tuple(param.shape)
        if path[-1] == "kernel":
            shape = shape[::-1]
        for layer in range(config.n_layers if ".layer.0." in name else 1):
            found[name.replace(".layer.0.", f".layer.{layer}.")] = shape
    return found


def harmless(name: str, tensor: np.ndarray, model_type: str) -> str | None:
    """Why a tensor that the model has no place for changes no logit, or None."""
    name = name.removeprefix(f"{model_type}.")
    if name == "embeddings.position_ids" and np.array_equal(
        tensor.reshape(-1), np.arange(tensor.size)
    ):
        return "the positions 0, 1, 2, ... as a buffer, as transformers before 4.31 stored them"
    if name in ("pooler.dense.weight", "pooler.dense.bias") and model_type == "bert":
        return "the pooler, for classifying whole texts: question answering does not use it"
    if any(name.startswith(head) for head in PRETRAINING_HEADS.get(model_type, ())):
        return "a head of pretraining: question answering does not use it"
    return None


def save(
    model: QuestionAnsweringModel,
    directory: str | Path,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    content: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`, `model.safetensors` and, when given, the tokenizer's files.

    transformers' torch class loads the result to the same logits. Weights keep their dtype.

    Args:
      model: what is written.
      directory: made if missing.
      tokenizer: the model's.
      content: another config.json, whose other fields (rates of dropout, say) are kept.

    Raises:
      TryAgain: the directory cannot be written.
    """
    tensors = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(param[...])
        name = torch_key(path, model.config.model_type)
        tensors[name] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    of_others = ("transformers_version", "torch_dtype", "_name_or_path")
    config = {
        **{name: value for name, value in (content or {}).items() if name not in of_others},
        "architectures": [type(model).__name__],
        **model.config.to_dict(),
        "dtype": tensors["qa_outputs.weight"].dtype.name,
    }
    serialized = safetensors.numpy.save(tensors, {"format": "pt"})
    contents = {
        "config.json": json.dumps(config, indent=2).encode() + b"\n",
        weights.SAFETENSORS: serialized,
    }
    if tokenizer is not None:
        normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
        settings = {
            # transformers takes its own default for what is left out, whatever tokenizer.json says.
            **{
                key: normalizer[name]
                for key, name in tokens.NORMALIZER.items()
                if name in normalizer
            },
            "tokenizer_class": type(model).__name__.removesuffix("ForQuestionAnswering")
            + "Tokenizer",
            "model_max_length": model.config.max_position_embeddings,
        }
        contents["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
        contents["tokenizer_config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
    directory = files.writable_directory(directory)
    for name, written in contents.items():
        files.write_whole(directory / name, written)
