"""Eight CPU devices and small random checkpoints; no test needs the network or a GPU."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from flaxqa import tokens

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QUICKSTART = ROOT / "configs" / "quickstart"
HUB_MODEL = "distilbert/distilbert-base-uncased-distilled-squad"
WORDS = (
    "who where what is was in the a an of bob berlin and lives live my name i am called wolfgang "
    "which city does ##s ##ing , . ? ' - 1 2 3 b c d e"
).split()
VOCAB = [*tokens.SPECIAL_TOKENS, *dict.fromkeys(WORDS)]
TINY = {
    "vocab_size": len(VOCAB),
    "max_position_embeddings": 64,
    "dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 64,
}
TINY_BERT = {
    "vocab_size": len(VOCAB),
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}


def hub_problem() -> str | None:
    """Why the hub's model cannot be had, or None; asked once, and only when a test needs it."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "HF_HUB_OFFLINE is set"
    import huggingface_hub

    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(HUB_MODEL, "config.json"), timeout=5
        )
    except Exception as error:
        return f"the Hugging Face Hub cannot be reached ({type(error).__name__})"
    return None


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("hub")]
    reason = hub_problem() if marked else None
    for item in marked:
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="there is no ../shared beside the checkout"))
        if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
            item.add_marker(pytest.mark.skip(reason="libtpu is not installed; make tpu"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is written into the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def random_torch_model(**changes):
    """A torch DistilBERT with every parameter away from its initial value."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.DistilBertConfig(**{**TINY, **changes})
    model = transformers.DistilBertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if config.dim == 32 else 0.02))
    return model


def random_torch_bert(**changes):
    """A torch BERT, likewise."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(
        transformers.BertConfig(**{**TINY_BERT, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def reference():
    return random_torch_model()


@pytest.fixture
def tensors(reference):
    """The reference's tensors by name, copies that a test may change."""
    return {name: tensor.numpy().copy() for name, tensor in reference.state_dict().items()}


def write_config(folder, **changes):
    config = {
        "architectures": ["DistilBertForQuestionAnswering"],
        "model_type": "distilbert",
        "activation": "gelu",
        **TINY,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder, vocab=VOCAB):
    tokens.bert_tokenizer({token: index for index, token in enumerate(vocab)}, lowercase=True).save(
        str(folder / "tokenizer.json")
    )


@pytest.fixture
def folder(tmp_path, reference):
    """A whole tiny checkpoint as transformers saves it."""
    path = tmp_path / "checkpoint"
    reference.save_pretrained(path)
    write_config(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def bert_folder(tmp_path):
    """A whole tiny BERT checkpoint as transformers saves it, with an epsilon of its own."""
    path = tmp_path / "bert"
    random_torch_bert(layer_norm_eps=1e-3).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def batch():
    """Four rows of 40 tokens, the last three padded more and more."""
    rng = np.random.default_rng(0)
    attention_mask = (np.arange(40) < np.array([[40], [33], [17], [2]])).astype(np.int32)
    return rng.integers(1, len(VOCAB), (4, 40), dtype=np.int32) * attention_mask, attention_mask
