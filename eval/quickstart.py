"""Makes the quickstart data set and trains the tiny checkpoint in `configs/quickstart`.

    python -m flaxqa.eval.quickstart data     writes train.json and heldout.json (SQuAD v1.1 format)
    python -m flaxqa.eval.quickstart train    trains the checkpoint on such paragraphs, saves it
    python -m flaxqa.eval.quickstart distil   a smaller student with it as teacher, and without

Everything follows from SEED. A paragraph tells of two invented subjects of one theme, so that a
question has to be matched to its subject and not only to a kind of answer; some are long enough to
need more than one window of 384 tokens. Every invented word and every number belongs to
one side by a hash, so the held-out part shares none with the training part.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import statistics
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from flaxqa import checkpoint, tokens
from flaxqa.checkpoint import DistilBertForQuestionAnswering
from flaxqa.model import DistilBertConfig
from flaxqa.progress import TerminalProgress

from . import finetune
from .config import FinetuneConfig
from .squad import METRICS

SEED = 20261122
FOLDER = Path(__file__).resolve().parent.parent / "configs" / "quickstart"
HELDOUT_PARAGRAPHS = 80
TRAIN_PARAGRAPHS = 160  # in train.json, to look at; training takes more of them
LONG_SHARE = {"heldout": 0.1, "train": 0.04}  # long rows cost most of the training time

# ------------------------------------------------------------------------------------------ words

ONSETS = "b br c ch d dr f fl g gr h j k l m n p pr qu r s sh st t th tr v w y z".split()
VOWELS = "a e i o u ai ea ie oa ou".split()
CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "nd", "rn", "sk", "lt"]
PERSON_ENDS = ["a", "o", "en", "is", "ard", "et"]
FAMILY_ENDS = ["ski", "well", "sen", "ford", "mond", "ley", "ari", "berg"]
PLACE_ENDS = ["ton", "burg", "mouth", "stead", "holm", "field", "minster", "haven"]
TRADES = (
    "painter botanist engineer composer surgeon astronomer printer geologist weaver chemist "
    "navigator sculptor historian mathematician"
).split()
PRODUCTS = (
    "glass bottles;woollen blankets;clocks;paper;bicycles;ceramic tiles;leather boots;salt;"
    "fishing nets;cheese;violins;steel wire;candles;sailcloth"
).split(";")
MATERIALS = "granite;steel;oak;red brick;limestone;iron;concrete;sandstone".split(";")
CARGOES = "tea;timber;copper ore;dried fish;wool;pepper;marble;grain".split(";")
TITLE_ADJECTIVES = "silent golden broken distant hidden winter burning crooked".split()
TITLE_NOUNS = "harbour orchard lantern mirror bridge garden letter tide".split()
ANIMALS = "eagles;wild goats;marmots;lynxes;red foxes;owls".split(";")


class Words:
    """Draws words and numbers that belong to one side, `heldout` or not, by their hash."""

    def __init__(self, rng: random.Random, heldout: bool):
        self.rng, self.heldout = rng, heldout

    def mine(self, word: str) -> bool:
        return (zlib.crc32(word.lower().encode()) % 4 == 0) == self.heldout

    def invented(self, ends: list[str], syllables: int = 1) -> str:
        while True:
            rng = self.rng
            body = "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                for _ in range(syllables)
            )
            word = (body + rng.choice(ends)).capitalize()
            if self.mine(word):
                return word

    def number(self, low: int, high: int) -> int:
        while True:
            value = self.rng.randint(low, high)
            if self.mine(str(value)):
                return value

    def person(self) -> str:
        return f"{self.invented(PERSON_ENDS)} {self.invented(FAMILY_ENDS)}"

    def place(self) -> str:
        return self.invented(PLACE_ENDS)

    def river(self) -> str:
        return f"River {self.invented(['', 'e', 'er', 'is'])}"

    def count(self, low: int, high: int) -> str:
        return f"{self.number(low, high):,}"

    def year(self) -> str:
        return str(self.number(1400, 1990))

    def title(self) -> str:
        adjective, noun = self.rng.choice(TITLE_ADJECTIVES), self.rng.choice(TITLE_NOUNS)
        return f"The {adjective.capitalize()} {noun.capitalize()} of {self.place()}"


# ------------------------------------------------------------------------------------------ facts


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing to tell of a subject: {s} is its name or pronoun, {a} the answer."""

    answer: Any  # Words -> str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Theme:
    subject: Any  # Words -> str
    opening: str
    pronoun: str
    facts: tuple[Fact, ...]


def one_of(options: list[str]) -> Any:
    return lambda words: words.rng.choice(options)


def fact(answer: Any, statements: str, questions: str) -> Fact:
    return Fact(answer, tuple(statements.split(" | ")), tuple(questions.split(" | ")))


THEMES = (
    Theme(
        Words.person,
        "{s} is remembered in several old records.",
        "she",
        (
            fact(
                Words.place,
                "{s} was born in {a} | {s} came into the world in the town of {a}",
                "Where was {s} born? | In which town was {s} born?",
            ),
            fact(
                Words.year,
                "{s} died in {a} after a short illness | The death of {s} is dated to {a}",
                "When did {s} die? | In what year did {s} die?",
            ),
            fact(
                one_of(TRADES),
                "{s} earned a living as a {a} | {s} worked for most of the time as a {a}",
                "What was the profession of {s}? | What did {s} work as?",
            ),
            fact(
                Words.person,
                "{s} studied under {a} | {s} had learnt the trade from {a}",
                "Who taught {s}? | Under whom did {s} study?",
            ),
            fact(
                lambda w: f"the {w.invented(['', 'ic', 'or'])} Medal",
                "{s} received {a} for this work | In the end {s} was honoured with {a}",
                "Which award did {s} receive? | What was {s} honoured with?",
            ),
        ),
    ),
    Theme(
        Words.place,
        "{s} is a town with a small market square.",
        "it",
        (
            fact(
                Words.river,
                "{s} lies on the {a} | The {a} flows through {s}",
                "On which river does {s} lie? | Which river flows through {s}?",
            ),
            fact(
                lambda w: w.count(1100, 98000),
                "{s} has {a} inhabitants | At the last census {s} counted {a} people",
                "How many people live in {s}? | How many inhabitants does {s} have?",
            ),
            fact(
                Words.year,
                "{s} was founded in {a} | {s} is first mentioned in a charter of {a}",
                "When was {s} founded? | In what year was {s} first mentioned?",
            ),
            fact(
                one_of(PRODUCTS),
                "{s} is known for its {a} | Far away people know {s} for its {a}",
                "What is {s} known for? | For what do people know {s}?",
            ),
            fact(
                Words.person,
                "The mayor of {s} is {a} | {a} was elected mayor of {s}",
                "Who is the mayor of {s}? | Who was elected mayor of {s}?",
            ),
        ),
    ),
    Theme(
        lambda w: f"{w.invented(FAMILY_ENDS)} Works",
        "{s} is a family business.",
        "it",
        (
            fact(
                Words.place,
                "{s} has its head office in {a} | The head office of {s} stands in {a}",
                "Where is the head office of {s}? | In which town does {s} have its head office?",
            ),
            fact(
                one_of(PRODUCTS),
                "{s} makes {a} | {s} sells {a} to many countries",
                "What does {s} make? | What does {s} sell?",
            ),
            fact(
                Words.person,
                "{s} was started by {a} | {a} set up {s} with borrowed money",
                "Who started {s}? | Who set up {s}?",
            ),
            fact(
                lambda w: w.count(20, 9000),
                "{s} employs {a} people | The staff of {s} has grown to {a} people",
                "How many people does {s} employ? | How large is the staff of {s}?",
            ),
            fact(
                Words.year,
                "{s} opened its first workshop in {a} | The first workshop of {s} dates from {a}",
                "When did {s} open its first workshop? | "
                "From what year is the first workshop of {s}?",
            ),
        ),
    ),
    Theme(
        Words.title,
        "{s} is a novel that many schools still read.",
        "it",
        (
            fact(
                Words.person,
                "{s} was written by {a} | {a} wrote {s} in a single summer",
                "Who wrote {s}? | Who is the author of {s}?",
            ),
            fact(
                Words.year,
                "{s} was first printed in {a} | The first edition of {s} appeared in {a}",
                "When was {s} first printed? | In what year did {s} appear?",
            ),
            fact(
                lambda w: w.count(90, 900),
                "{s} has {a} pages | The usual edition of {s} runs to {a} pages",
                "How many pages does {s} have? | How long is {s}?",
            ),
            fact(
                one_of(TRADES),
                "The hero of {s} is a young {a} | {s} tells the story of a lonely {a}",
                "What is the profession of the hero of {s}? | Whose story does {s} tell?",
            ),
        ),
    ),
    Theme(
        lambda w: f"{w.invented(['', 'er', 'an'])} Bridge",
        "{s} is still in daily use.",
        "it",
        (
            fact(
                lambda w: f"{w.count(30, 1900)} metres",
                "{s} is {a} long | From end to end {s} measures {a}",
                "How long is {s}? | What is the length of {s}?",
            ),
            fact(
                Words.person,
                "{s} was designed by {a} | {a} drew the plans for {s}",
                "Who designed {s}? | Who drew the plans for {s}?",
            ),
            fact(
                Words.river,
                "{s} crosses the {a} | With three arches {s} spans the {a}",
                "Which river does {s} cross? | What does {s} span?",
            ),
            fact(
                one_of(MATERIALS),
                "{s} is built of {a} | The builders of {s} chose {a}",
                "What is {s} built of? | Which material did the builders of {s} choose?",
            ),
            fact(
                Words.year,
                "{s} was opened to traffic in {a} | The opening of {s} took place in {a}",
                "When was {s} opened? | In what year did the opening of {s} take place?",
            ),
        ),
    ),
    Theme(
        lambda w: f"the ship {w.invented(['a', 'ia', 'ora'], 2)}",
        "Sailors still speak of {s}.",
        "it",
        (
            fact(
                Words.person,
                "{s} was commanded by {a} | {a} was captain of {s}",
                "Who commanded {s}? | Who was captain of {s}?",
            ),
            fact(
                Words.place,
                "{s} set sail from {a} | The home port of {s} was {a}",
                "From where did {s} set sail? | What was the home port of {s}?",
            ),
            fact(
                one_of(CARGOES),
                "{s} carried {a} | The hold of {s} was filled with {a}",
                "What did {s} carry? | What was the hold of {s} filled with?",
            ),
            fact(
                lambda w: w.count(12, 400),
                "{s} had a crew of {a} | On board of {s} lived {a} sailors",
                "How large was the crew of {s}? | How many sailors lived on board of {s}?",
            ),
            fact(
                Words.year,
                "{s} was lost in a storm in {a} | Nobody has seen {s} since the storm of {a}",
                "When was {s} lost? | In what year was {s} lost in a storm?",
            ),
        ),
    ),
    Theme(
        lambda w: f"Mount {w.invented(['', 'or', 'ak', 'ul'])}",
        "{s} can be seen from far away.",
        "it",
        (
            fact(
                lambda w: f"{w.count(900, 8000)} metres",
                "{s} is {a} high | The summit of {s} reaches {a}",
                "How high is {s}? | What is the height of {s}?",
            ),
            fact(
                Words.person,
                "{s} was first climbed by {a} | {a} was the first to climb {s}",
                "Who climbed {s} first? | Who was the first to climb {s}?",
            ),
            fact(
                one_of(ANIMALS),
                "{s} is home to {a} | On the slopes of {s} live {a}",
                "Which animals live on {s}? | What is {s} home to?",
            ),
            fact(
                Words.place,
                "The road up to {s} begins in {a} | Walkers reach {s} from {a}",
                "Where does the road up to {s} begin? | From where do walkers reach {s}?",
            ),
        ),
    ),
)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def article(words: Words, long: bool) -> tuple[str, list[tuple[str, str, int]]]:
    """One paragraph and its (question, answer, answer_start) triples."""
    rng = words.rng
    theme = rng.choice(THEMES)
    context, asked = "", []
    for _ in range(rng.randint(6, 8) if long else 2):
        subject = theme.subject(words)
        opening = theme.opening.format(s=subject)
        context += (" " if context else "") + opening[0].upper() + opening[1:]
        for told in rng.sample(theme.facts, len(theme.facts) if long else rng.randint(3, 4)):
            answer = told.answer(words)
            statement = rng.choice(told.statements)
            # A pronoun only where it stands for the subject of the sentence before.
            use_pronoun = statement.startswith("{s}") and rng.random() < 0.3
            name = theme.pronoun if use_pronoun else subject
            text = sentence(statement.format(s=name, a="\0"))
            start = len(context) + 1 + text.index("\0")
            if text.index("\0") == 0:
                answer = answer[0].upper() + answer[1:]
            context += " " + text.replace("\0", answer)
            question = rng.choice(told.questions).format(s=subject)
            asked.append((question, answer, start))
    if long:
        asked = rng.sample(asked, 6)
    return context, asked


def articles(heldout: bool) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """The endless sequence of paragraphs of one part; the same at every call."""
    part = "heldout" if heldout else "train"
    rng = random.Random(f"{SEED} {part}")
    while True:
        yield article(Words(rng, heldout), rng.random() < LONG_SHARE[part])


def squad_json(part: str, paragraphs: int) -> dict[str, Any]:
    """The first paragraphs of a part in SQuAD v1.1 format."""
    data = []
    for number, (context, asked) in zip(
        range(paragraphs), articles(part == "heldout"), strict=False
    ):
        qas = [
            {
                "id": f"{part}-{number:04d}-{index}",
                "question": question,
                "answers": [{"text": answer, "answer_start": start}],
            }
            for index, (question, answer, start) in enumerate(asked)
        ]
        title = f"{part} {number:04d}"
        data.append({"title": title, "paragraphs": [{"context": context, "qas": qas}]})
    return {"version": "1.1", "data": data}


def write_data(folder: Path) -> None:
    for part, paragraphs in (("train", TRAIN_PARAGRAPHS), ("heldout", HELDOUT_PARAGRAPHS)):
        write_squad(folder / f"{part}.json", part, paragraphs)


def write_squad(path: Path, part: str, paragraphs: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(squad_json(part, paragraphs), ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------- checkpoint

MODEL: dict[str, Any] = {
    "max_position_embeddings": 512,
    "dim": 128,
    "n_heads": 4,
    "n_layers": 4,
    "hidden_dim": 256,
}
VOCAB_SIZE = 1200
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0}  # it learns too little
DEVICES = 2  # simulated on the CPU, each with one core: 1.4 times as fast as one with two
PARAGRAPHS = 24_000  # seen once, by the checkpoint
STUDENT_PARAGRAPHS, STUDENT_EPOCHS = 100, 10
SEEDS, STUDENT_T = range(5), 2.776  # Student's t of 4 degrees of freedom, for 95 %
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3, "warmup": 0.05,
            "weight_decay": 1e-4, "save_every": 500}  # fmt: skip


def train_tokenizer(paragraphs: int = 4000) -> tokenizers.Tokenizer:
    """An uncased WordPiece tokenizer over a vocabulary taken from the training text.

    The vocabulary is every letter, the words that come often, and the two- and three-letter pieces
    that come most often in the rest. Not `tokenizers`' own trainer: it breaks ties at random, and
    this one gives the same vocabulary every time.
    """
    words: collections.Counter[str] = collections.Counter()
    split = tokenizers.pre_tokenizers.BertPreTokenizer()
    for _, (context, asked) in zip(range(paragraphs), articles(heldout=False), strict=False):
        for line in (context, *(question for question, _, _ in asked)):
            words.update(word for word, _ in split.pre_tokenize_str(line.lower()))
    often = [word for word, count in words.items() if count >= paragraphs / 100]
    pieces: collections.Counter[str] = collections.Counter()
    for word in sorted(words.keys() - set(often)):
        for size in (2, 3):
            for at in range(len(word) - size + 1):
                pieces["##" * (at > 0) + word[at : at + size]] += words[word]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocab = [*tokens.SPECIAL_TOKENS, *letters, *("##" + letter for letter in letters)]
    vocab += sorted(set(often) - set(vocab))
    rest = sorted(pieces.keys() - set(vocab), key=lambda piece: (-pieces[piece], piece))
    vocab += rest[: VOCAB_SIZE - len(vocab)]
    return tokens.bert_tokenizer({token: i for i, token in enumerate(vocab)}, lowercase=True)


def prepare(model: DistilBertForQuestionAnswering) -> None:
    """Starts so small a model where it can learn: wider kernels, like finds like, near finds near.

    BERT's 0.02 is meant for 768 channels; with 128 the attention stays flat for thousands of steps.
    Where the lower layers begin with equal queries and keys, a token attends to its own other
    mentions, which is what matching a question to its subject needs; and with positions that begin
    as DistilBERT's sinusoids, to its neighbours.
    """
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "kernel" and "transformer" in path:
            param[...] = param[...] * (param.shape[0] ** -0.5 / 0.02)
    encoder = model.encoder
    for block in encoder.transformer.layer[:2]:
        block.attention.k_lin.kernel[...] = block.attention.q_lin.kernel[...]
    table = encoder.embeddings.position_embeddings.embedding
    positions, dim = table.shape
    angles = np.arange(positions)[:, None] / 10_000 ** (2 * np.arange(dim // 2) / dim)
    table[...] = 0.02 * jnp.asarray(np.concatenate((np.sin(angles), np.cos(angles)), axis=1))


def write_model(folder: Path) -> None:
    """Writes a checkpoint of random weights from which training begins."""
    tokenizer = train_tokenizer()
    config = DistilBertConfig(vocab_size=tokenizer.get_vocab_size(), **MODEL)
    model = DistilBertForQuestionAnswering(config, rngs=nnx.Rngs(SEED))
    prepare(model)
    checkpoint.save(model, folder, tokenizer=tokenizer, content=NO_DROPOUT)


def write_student(folder: Path, teacher: Path, seed: int) -> None:
    """Writes a checkpoint of every second layer of a teacher, with a new head.

    As DistilBERT began from BERT: Sanh et al. 2019, section 3.
    """
    taught = checkpoint.load(teacher)
    layers = taught.model.encoder.transformer.layer[::2]
    config = dataclasses.replace(taught.config, n_layers=len(layers))
    model = checkpoint.MODELS[type(config)](config, rngs=nnx.Rngs(seed))
    model.encoder.embeddings = taught.model.encoder.embeddings
    model.encoder.transformer.layer = nnx.List(layers)
    checkpoint.save(model, folder, tokenizer=taught.tokenizer, content=NO_DROPOUT)


def train(folder: Path, work: Path, **options: Any) -> None:
    """Trains the checkpoint from random weights, and writes it in float16.

    Args:
      folder: that has heldout.json, and where `checkpoint` is written.
      work: for the data, the untrained checkpoint, and the run.
      **options: of the run.
    """
    write_squad(work / "train.json", "train", PARAGRAPHS)
    write_model(work / "untrained")
    fit(work / "untrained", work, "run", folder, **options)
    done = checkpoint.load(work / "run", dtype="float16")
    checkpoint.save(
        done.model, folder / "checkpoint", tokenizer=done.tokenizer, content=done.content
    )


def distil(folder: Path, work: Path) -> list[dict[str, float]]:
    """Trains a student of two layers with and without the quickstart's teacher, for each seed.

    The seed decides the student's new head and the order of its training.

    Returns of each seed the scores of the distilled student less those of the other.
    """
    write_squad(work / "train.json", "train", STUDENT_PARAGRAPHS)
    gains = []
    taught = {"teacher": str(folder / "checkpoint"), "cache_teacher": str(work / "teacher")}
    given = {"alone": {}, "distilled": taught}
    for seed in SEEDS:
        write_student(work / f"untrained-{seed}", folder / "checkpoint", seed)
        alone, distilled = (
            fit(work / f"untrained-{seed}", work, f"{name}-{seed}", folder, seed=seed,
                epochs=STUDENT_EPOCHS, **options)["epochs"][-1]
            for name, options in given.items()
        )  # fmt: skip
        gains.append({name: distilled[name] - alone[name] for name in METRICS})
        for name, metric in METRICS.items():
            print(f"seed {seed}, {metric.label}: {alone[name]:.2f} alone, {distilled[name]:.2f} "
                  f"distilled, {gains[-1][name]:+.2f}", flush=True)  # fmt: skip
    for name, metric in METRICS.items():
        every = [one[name] for one in gains]
        error = STUDENT_T * statistics.stdev(every) / len(every) ** 0.5
        mean = statistics.mean(every)
        print(f"{metric.label}: {mean:+.2f} ({mean - error:+.2f} to {mean + error:+.2f})")
    return gains


def fit(model: Path, work: Path, output: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Trains by `flaxqa finetune` on train.json in a folder for work; a stopped run goes on."""
    config = FinetuneConfig(
        model=str(model),
        data=str(work / "train.json"),
        heldout=str(folder / "heldout.json"),
        output=str(work / output),
        **{**TRAINING, **options},
    )
    with TerminalProgress() as progress:
        return finetune.finetune(config, progress)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("data", "train", "distil"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the data set and checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart-training"),
                        help="for what training needs; a stopped run goes on there")  # fmt: skip
    args = parser.parse_args()
    if args.what == "data":
        write_data(args.folder)
        return
    jax.config.update("jax_num_cpu_devices", DEVICES)
    if args.what == "train":
        train(args.folder, args.work)
    else:
        distil(args.folder, args.work)


if __name__ == "__main__":
    main()
