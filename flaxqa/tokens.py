"""Tokenizers out of files; texts to tokens, and tokens back to their places in a text."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from flaxqa import weights
from flaxqa.errors import ModelRejected, all_problems

VOCABULARY_LIMIT = 8 << 20  # bytes; that of BERT for a hundred languages has 1 MB
SPARE_ROWS = 1_024  # of an embedding table, past the tokens
# Settings of tokenizer_config.json, and what the tokenizer calls them.
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
TOKENIZER_CLASSES = (
    None,
    "BertTokenizer",
    "BertTokenizerFast",
    "DistilBertTokenizer",
    "DistilBertTokenizerFast",
)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXTS_AT_ONCE = 32
PIECE = 1 << 14  # characters that the library is given at once of a long text
PIECES_AT_ONCE = 8
SEPARATOR = "[SEP]"


class Places(NamedTuple):
    """Where the C tokens of a text are.

    Attributes:
      offsets: int32 [C, 2], where each starts and ends in the text, in code points, end exclusive.
      words: int32 [C], the number of the word (a piece between spaces and punctuation marks) each
        belongs to; never falls.
    """

    offsets: np.ndarray
    words: np.ndarray


class Tokens:
    """A text's C tokens, without special ones.

    Attributes:
      ids: int32 [C].
      encoding: the library's, if it knows where the tokens are. All places are read from it when
        they are asked for; those of a span without the others.
    """

    def __init__(
        self,
        ids: np.ndarray,
        encoding: tokenizers.Encoding | None = None,
        places: Places | None = None,
    ):
        self.ids, self.encoding = ids, encoding
        if places is not None:
            self.places = places

    @functools.cached_property
    def places(self) -> Places:
        """Those of all tokens."""
        assert self.encoding is not None  # noqa: S101 (for the type checker)
        pairs = itertools.chain.from_iterable(self.encoding.offsets)
        offsets = np.fromiter(pairs, np.int32, 2 * len(self.ids)).reshape(-1, 2)
        return Places(offsets, np.array(self.encoding.word_ids, np.int32))

    def span(self, first: int, last: int, whole_words: bool) -> tuple[int, int]:
        """Where the text from a token to another, not before it, starts and ends.

        With `whole_words` it is widened to all tokens of the words that the two belong to.
        """
        encoding: Any = self.encoding  # whose types allow for tokens without a place
        if encoding is not None:
            if whole_words:
                start, _ = encoding.word_to_chars(encoding.token_to_word(first))
                _, end = encoding.word_to_chars(encoding.token_to_word(last))
            else:
                start, _ = encoding.token_to_chars(first)
                _, end = encoding.token_to_chars(last)
            return start, end
        offsets, words = self.places
        if whole_words:
            first = int(np.searchsorted(words, words[first]))
            last = int(np.searchsorted(words, words[last], "right")) - 1
        return int(offsets[first, 0]), int(offsets[last, 1])


def place(
    tokenizer: tokenizers.Tokenizer, texts: Iterable[str], known: dict[str, Tokens] | None = None
) -> dict[str, Tokens]:
    """The tokens of each distinct text, made on all cores.

    `known` gives what it has, and then holds these.
    """
    distinct, before = dict.fromkeys(texts), known or {}
    new = [text for text in distinct if text not in before]
    long = [text for text in new if len(text) > PIECES_AT_ONCE * PIECE]
    if long and never_looks_across_spaces(tokenizer):
        new = [text for text in new if len(text) <= PIECES_AT_ONCE * PIECE]
        fresh = {text: in_pieces(tokenizer, text) for text in long}
    else:
        fresh = {}
    encodings = tokenizer.encode_batch(new, add_special_tokens=False)
    for text, encoding in zip(new, encodings, strict=True):
        fresh[text] = Tokens(np.array(encoding.ids, np.int32), encoding)
    tokens = {text: fresh[text] if text in fresh else before[text] for text in distinct}
    if known is not None:
        known.clear()
        known.update(tokens)
    return tokens


def in_pieces(tokenizer: tokenizers.Tokenizer, text: str) -> Tokens:
    """The tokens of a text that is cut at spaces, for the library takes 250 bytes a character.

    The same as of the whole text, by a tokenizer that never looks across spaces.
    """
    bounds = [0]
    while (begin := bounds[-1]) < len(text):
        end = begin + PIECE
        if end < len(text):
            # Other white space may be nothing to the tokenizer, and what is around it one word.
            at = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end))
            after = [place for space in " \n" if (place := text.find(space, end)) >= 0]
            end = at if at >= 0 else min(after, default=len(text) - 1)
            end += 1
        bounds.append(min(end, len(text)))
    # Grown in place, where many small arrays would leave the allocator as many holes.
    ids, offsets, words = bytearray(), bytearray(), bytearray()
    word = 0
    for group in range(0, len(bounds) - 1, PIECES_AT_ONCE):
        begins = bounds[group : group + PIECES_AT_ONCE + 1]
        texts = [text[begin:end] for begin, end in itertools.pairwise(begins)]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        for begin, encoding in zip(begins, encodings, strict=False):
            piece = Tokens(np.array(encoding.ids, np.int32), encoding)
            if len(piece.ids):
                ids += piece.ids.tobytes()
                offsets += (piece.places.offsets + np.int32(begin)).tobytes()
                words += (piece.places.words + np.int32(word)).tobytes()
                word += int(piece.places.words[-1]) + 1
    columns = [np.frombuffer(column, np.int32) for column in (ids, offsets, words)]
    return Tokens(columns[0], None, Places(columns[1].reshape(-1, 2), columns[2]))


def identify(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """The ids of each distinct text, int32 [C], on all cores; nothing tells where they are.

    A text costs the library as much as a few words, so that short ones are given many at a time,
    with a special token between them: BERT's tokenizer never looks across a space.
    """
    distinct = list(dict.fromkeys(texts))
    at_once = TEXTS_AT_ONCE if never_looks_across_spaces(tokenizer) else 1
    long = [text for text in distinct if at_once > 1 and len(text) > PIECES_AT_ONCE * PIECE]
    if long:
        found = {text: in_pieces(tokenizer, text).ids for text in long}
        return found | identify(tokenizer, (text for text in distinct if text not in found))
    alone = [text for text in distinct if SEPARATOR in text] if at_once > 1 else []
    others = [text for text in distinct if SEPARATOR not in text] if at_once > 1 else distinct
    groups = [[text] for text in alone]
    groups += [others[start : start + at_once] for start in range(0, len(others), at_once)]
    joined = [f" {SEPARATOR} ".join(group) for group in groups]
    separator, found = tokenizer.token_to_id(SEPARATOR), {}
    encodings = tokenizer.encode_batch_fast(joined, add_special_tokens=False)
    for group, encoding in zip(groups, encodings, strict=True):
        ids = np.array(encoding.ids, np.int32)
        if len(group) == 1:
            found[group[0]] = ids
            continue
        ends = [*np.flatnonzero(ids == separator).tolist(), len(ids)]
        for text, begin, end in zip(group, [-1, *ends], ends, strict=False):
            found[text] = ids[begin + 1 : end]
    return found


def never_looks_across_spaces(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether this is BERT's tokenizer, with no added token that has to do with spaces."""
    kinds = (
        (tokenizer.normalizer, tokenizers.normalizers.BertNormalizer),
        (tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer),
        (tokenizer.model, tokenizers.models.WordPiece),
    )
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        all(isinstance(part, kind) for part, kind in kinds)
        and any(token.content == SEPARATOR and not token.normalized for token in added)
        and not any(
            any(map(str.isspace, token.content))
            or token.lstrip
            or token.rstrip
            or token.single_word
            for token in added
        )
    )


# --- tokenizers out of files ---


def load_tokenizer(directory: Path) -> tuple[tokenizers.Tokenizer, list[str]]:
    """The directory's tokenizer, and the names of the files that made it.

    `tokenizer.json` is taken as it is but for the truncation and padding that its fine-tuning left
    in it; of older checkpoints `vocab.txt` and the settings of `tokenizer_config.json`.

    Raises:
      ModelRejected: no tokenizer, a damaged one, one that is not BERT's, or two files that
        contradict each other.
    """
    names = ["tokenizer_config.json"] if (directory / "tokenizer_config.json").exists() else []
    content = weights.read_json(directory, names[0]) if names else {}
    settings = {key: content[key] for key in NORMALIZER if content.get(key) is not None}
    for key, value in settings.items():
        if not isinstance(value, bool):
            raise ModelRejected(
                f"{directory / names[0]}: {key} is {value!r}, it must be true or false"
            )
    if (directory / "tokenizer.json").exists():
        names.append("tokenizer.json")
        return read_tokenizer(directory, settings), names
    if not (directory / "vocab.txt").exists():
        raise ModelRejected(f"{directory} has neither tokenizer.json nor vocab.txt")
    if (kind := content.get("tokenizer_class")) not in TOKENIZER_CLASSES:
        raise ModelRejected(f"{directory / names[0]}: tokenizer_class {kind!r} is not computed")
    path = weights.inside(directory, "vocab.txt")
    if (size := path.stat().st_size) > VOCABULARY_LIMIT:
        raise ModelRejected(f"{path} has {size:,} bytes, more than {VOCABULARY_LIMIT:,}")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ModelRejected(f"{path} is not UTF-8: {error}") from error
    vocab = {token.rstrip("\r"): index for index, token in enumerate(lines)}
    if len(vocab) != len(lines):
        raise ModelRejected(f"{path} has {len(lines) - len(vocab)} tokens twice")
    names.append("vocab.txt")
    return bert_tokenizer(vocab, **{NORMALIZER[key]: settings[key] for key in settings}), names


def read_tokenizer(directory: Path, settings: Mapping[str, bool]) -> tokenizers.Tokenizer:
    """`tokenizer.json`, without truncation and padding."""
    content = weights.read_json(directory, "tokenizer.json")
    path = directory / "tokenizer.json"
    if problems := unlike_bert(content):
        raise ModelRejected(all_problems(f"{path} is not BERT's tokenizer", problems))
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is not an Exception
        raise ModelRejected(f"{path} is not a tokenizer: {error}") from error
    normalizer = content.get("normalizer") or {}
    for key, value in settings.items():
        stored = normalizer.get(NORMALIZER[key], value)
        if stored is None:  # accents go with upper case
            stored = normalizer.get("lowercase")
        if stored is not value:
            raise ModelRejected(
                f"{path} has {NORMALIZER[key]} {stored}, tokenizer_config.json has {key} {value}"
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def bert_tokenizer(
    vocab: Mapping[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> tokenizers.Tokenizer:
    """BERT's WordPiece tokenizer over a vocabulary.

    Args:
      vocab: {token: id}.
      lowercase: whether upper case is made lower case.
      strip_accents: whether accents are taken off letters; None does so where `lowercase` is set.
      handle_chinese_chars: whether each Chinese character is a word.

    Raises:
      ModelRejected: one of SPECIAL_TOKENS is not in it.
    """
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise ModelRejected(f"the vocabulary has no {', '.join(missing)}")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab=dict(vocab), unk_token="[UNK]")  # noqa: S106 (no password)
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=strip_accents,
        handle_chinese_chars=handle_chinese_chars,
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"])
    )
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def tokenizer_problems(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> list[str]:
    """What would make the tokenizer's ids mean something else to the model; empty when all is well.

    An id past the embedding table is no error to a device: it reads NaN or the last row. More rows
    than tokens are well: tables are padded to a multiple of 8 or 64 for speed, and no id asks for
    the rows that were added. Above SPARE_ROWS of them it is the tokenizer of another model, or cut.
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    needed = ("[UNK]", "[CLS]", "[SEP]")
    problems = [f"it has no {token}" for token in needed if token not in vocab]
    if len(vocab) > vocab_size or vocab_size - len(vocab) > SPARE_ROWS:
        problems.append(f"it has {len(vocab)} tokens, the config has vocab_size {vocab_size}")
    elif max(vocab.values()) >= vocab_size:
        problems.append(f"its largest id is {max(vocab.values())}, past the vocabulary")
    if not problems:
        # Two words and a character that hardly any vocabulary has.
        pair = ("who", "where \U00010fff")
        cls, sep = vocab["[CLS]"], vocab["[SEP]"]
        try:
            a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in pair)
            whole = tokenizer.encode(*pair).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            return [f"it cannot tokenize {pair}: {error}"]
        if whole != [cls, *a, sep, *b, sep]:
            problems.append("it does not make [CLS] question [SEP] context [SEP]")
    return problems


# What each part of `tokenizer.json` may be, and its options with their types.
FLAG = (bool,)
NORMALIZERS: dict[str | None, dict[str, tuple[type, ...]]] = {
    "BertNormalizer": dict.fromkeys(("clean_text", "handle_chinese_chars", "lowercase"), FLAG)
    | {"strip_accents": (bool, type(None))},
    **{name: {} for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")},
}
PARTS: dict[str, dict[str | None, dict[str, tuple[type, ...]]]] = {
    "normalizer": {None: {}, **NORMALIZERS, "Sequence": {"normalizers": (list,)}},
    "pre_tokenizer": {"BertPreTokenizer": {}},
    "post_processor": {
        "BertProcessing": {"sep": (list,), "cls": (list,)},
        "TemplateProcessing": {"single": (list,), "pair": (list,), "special_tokens": (dict,)},
    },
    "decoder": {None: {}, "WordPiece": {"prefix": (str,), "cleanup": FLAG}},
    "model": {
        "WordPiece": {
            "unk_token": (str,),
            "continuing_subword_prefix": (str,),
            "max_input_chars_per_word": (int,),
            "vocab": (dict,),
        }
    },
}


def unlike_bert(content: Mapping[str, Any]) -> list[str]:
    """What in `tokenizer.json` is not of BERT's WordPiece tokenizer; empty when all is.

    The library takes any structure, some of which take all memory, or end the process.
    """
    problems = []
    for name, kinds in PARTS.items():
        part = content.get(name)
        given = part if isinstance(part, dict) else {}
        # Files of before 2022 do not say that the model is WordPiece.
        kind = given.get("type", "WordPiece" if name == "model" and given else None)
        if part is not None and not isinstance(part, dict):
            problems.append(f"its {name} is no object")
        elif not isinstance(kind, str | None) or kind not in kinds:
            wanted = " or ".join(str(each) for each in kinds if each)
            problems.append(f"its {name} is {str(kind)[:50]!r}, not {wanted}")
        else:
            problems += [
                f"its {name} has {option[:50]!r}, which is not computed"
                for option, value in given.items()
                if option != "type" and type(value) not in kinds[kind].get(option, ())
            ]
    several = (content.get("normalizer") or {}).get("normalizers", ()) if not problems else ()
    for one in several:
        kind = one.get("type") if isinstance(one, dict) else None
        if (
            kind is None
            or one.keys() - {"type", *NORMALIZERS.get(str(kind), ())}
            or (str(kind) not in NORMALIZERS)
        ):
            problems.append(f"its normalizer has {str(kind)[:50]!r}, which is not computed")
    if problems:
        return problems
    model = content["model"]
    if model.get("max_input_chars_per_word", 100) not in range(1, 10_001):
        problems.append("its max_input_chars_per_word is not from 1 to 10,000")
    ids = dict(model.get("vocab", {}))
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not text or len(text) > 1_000:
            problems.append("an added token has no text")
        elif ids.setdefault(text, token.get("id")) != token.get("id"):
            problems.append(f"{text!a} is an added token and another in the vocabulary")
    numbers = list(ids.values())
    if not all(type(number) is int for number in numbers) or (
        sorted(numbers) != list(range(len(numbers)))
    ):
        problems.append(f"its {len(ids):,} tokens do not have the ids from 0 on, each once")
    return problems
