"""Settings of tokenizers that checkpoints bring, and what is refused of them."""

import json

import pytest
from conftest import VOCAB

from flaxqa import checkpoint, tokens
from flaxqa.errors import ModelRejected

BASE = {
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
    "dim": 768,
    "n_heads": 12,
    "n_layers": 6,
    "hidden_dim": 3072,
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["e", "\u6771", "\u4eac"]),
        ({"do_lower_case": True, "strip_accents": False}, ["\u00e9", "\u6771", "\u4eac"]),
        ({"do_lower_case": False}, ["\u00e9", "\u6771", "\u4eac"]),
        ({"do_lower_case": False, "strip_accents": True}, ["e", "\u6771", "\u4eac"]),
        ({"tokenize_chinese_chars": False}, ["e", "\u6771\u4eac"]),
    ],
)
def test_settings_of_an_old_vocabulary_are_followed(folder, tmp_path, settings, expected):
    import transformers

    vocab = [*VOCAB[:-5], "\u00e9", "e", "\u6771", "\u4eac", "\u6771\u4eac"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(vocab))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, names = tokens.load_tokenizer(folder)
    text = "\u00e9 \u6771\u4eac"
    assert tokenizer.encode(text, add_special_tokens=False).tokens == expected
    assert names == ["tokenizer_config.json", "vocab.txt"]
    # What is saved means the same to transformers and here.
    model = checkpoint.load(folder).model
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.tokenize(text) == expected
    again = checkpoint.load(tmp_path / "saved").tokenizer
    assert again.encode(text, add_special_tokens=False).tokens == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strip_accents": "no"}, "strip_accents is 'no'"),
        ({"tokenize_chinese_chars": 1}, "tokenize_chinese_chars is 1"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "'BertJapaneseTokenizer' is not computed"),
    ],
)
def test_settings_that_are_not_followed_are_refused(folder, settings, message):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelRejected, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize("setting", [{"strip_accents": False}, {"tokenize_chinese_chars": False}])
def test_settings_that_contradict_the_tokenizer_are_refused(folder, setting):
    (folder / "tokenizer_config.json").write_text(json.dumps(setting))
    with pytest.raises(ModelRejected, match=f"{next(iter(setting))} False"):
        checkpoint.load(folder)


def test_a_tokenizer_with_another_normalizer_is_saved_as_it_is(folder, tmp_path):
    import tokenizers

    loaded = checkpoint.load(folder)
    normalizers = tokenizers.normalizers
    for normalizer in (None, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])):
        loaded.tokenizer.normalizer = normalizer
        checkpoint.save(loaded.model, tmp_path, tokenizer=loaded.tokenizer)
        assert checkpoint.load(tmp_path).tokenizer.to_str() == loaded.tokenizer.to_str()
