"""Mutated files of every kind that flaxqa reads, for a fixed time: `make fuzz`.

Each kind has a process of its own, which mutates good files and reads them. Only flaxqa's own
errors may come of it. A process that dies, takes 2 GiB, or spends half a minute on one file, or
tells of another exception, is a finding: the file is kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart"
MEMORY = 2 << 30  # bytes
PATIENCE = 30.0  # seconds for one file

# What stands for itself in the formats, and numbers that are near a border.
WORDS = (
    b"null", b"true", b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\r\n", b"\0", b"\xff", b"-1",
    b"1e999", b"NaN", b"9" * 30, b"[" * 2_000, b'{"a":' * 500, b"\\ud800", b"\xef\xbb\xbf",
    b"../../etc/passwd", b"type", b"Replace", b"Regex", struct.pack("<Q", 1 << 40),
    struct.pack("<q", -1), b"\x80" * 9,
)  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, copies, words of the format put in, and numbers changed."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(made) + 1)
        size = min(rng.choice((1, 2, 8, 64, 4_096)), max(len(made) - at, 1))
        kind = rng.randrange(8)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1 and made:
            made[at % len(made)] = rng.randrange(256)
        elif kind == 2:
            del made[at : at + size]
        elif kind == 3:
            made[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 4:
            word = rng.choice(WORDS)
            made[at : at + rng.choice((0, len(word)))] = word
        elif kind == 5:
            begin = rng.randrange(len(made) + 1)
            made[at:at] = made[begin : begin + size]
        elif kind == 6:
            digits = [place for place, byte in enumerate(made[at : at + 4_096]) if 48 <= byte < 58]
            if digits:
                made[at + rng.choice(digits)] = 48 + rng.randrange(10)
        else:
            del made[at:]
    return bytes(made)


# --- what is read: each makes good files; it gives what reads one that was changed, and the files

Target = tuple[Callable[[Path], Any], list[Path]]


def small_checkpoint(folder: Path) -> Any:
    from flax import nnx

    from flaxqa import DistilBertConfig, DistilBertForQuestionAnswering, checkpoint, tokens

    words = ["who", "where", "is", "bob", ".", "?", "a", "##b"]
    vocab = {token: at for at, token in enumerate([*tokens.SPECIAL_TOKENS, *words])}
    tokenizer = tokens.bert_tokenizer(vocab)
    config = DistilBertConfig(vocab_size=len(vocab), max_position_embeddings=32, dim=8, n_heads=2,
                              n_layers=1, hidden_dim=8)  # fmt: skip
    model = DistilBertForQuestionAnswering(config, rngs=nnx.Rngs(0))
    checkpoint.save(model, folder, tokenizer=tokenizer)
    return model


def checkpoints(folder: Path) -> Target:
    from flaxqa import checkpoint

    small_checkpoint(folder)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 9}')

    def read(path: Path) -> None:
        loaded = checkpoint.load(folder)
        loaded.tokenizer.encode("Who is Bob ab? " * 50)

    names = ("config.json", "tokenizer.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors")  # fmt: skip
    return read, [folder / name for name in names]


def weight_files(folder: Path) -> Target:
    """Those of the other formats, as the tests write them."""
    sys.path.insert(0, str(Path(__file__).parent))
    from test_weights import WRITERS

    from flaxqa import checkpoint, weights

    model = small_checkpoint(folder / "good")
    tensors = weights.read(folder / "good")
    paths = []
    for write in WRITERS:
        place = folder / write.__name__
        place.mkdir()
        write(place, tensors)
        paths += weights.find(place)

    def read(path: Path) -> None:
        checkpoint.from_tensors(weights.read(path.parent), model.config)

    return read, paths


def squad_files(folder: Path) -> Target:
    from flaxqa.eval import questions as dataset
    from flaxqa.eval import squad

    content = json.loads((QUICKSTART / "heldout.json").read_bytes())
    content["data"] = content["data"][:3]
    (folder / "data.json").write_text(json.dumps(content))
    data = dataset.read(folder / "data.json")
    (folder / "predictions.json").write_text(json.dumps({one.id: "a b" for one in data.questions}))
    (folder / "odds.json").write_text(json.dumps({one.id: -1.5 for one in data.questions}))

    def read(path: Path) -> None:
        questions, v2 = dataset.read(folder / "data.json")
        given = squad.read_predictions(folder / "predictions.json")
        odds = squad.read_na_probs(folder / "odds.json")
        squad.score(questions, given, v2=v2)
        squad.score(questions, given, v2=True).with_no_answer(
            {one.id: odds.get(one.id, 0.0) for one in questions}, 0.5
        )

    return read, [folder / name for name in ("data.json", "predictions.json", "odds.json")]


def record_files(folder: Path) -> Target:
    """JSONL, CSV, Parquet and JSON, read as `predict` reads them."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    from flaxqa import inputs, records, rows, sources, work

    good = [{"id": str(i), "question": f"who {i}?", "context": 'it, "is"\n' * 3, "kept": i * 1.5,
             "when": 10**9 * i} for i in range(30)]  # fmt: skip
    table = pa.Table.from_pylist(good)
    when = table.column("when").cast(pa.timestamp("us"))
    table = table.set_column(4, "when", when)
    lines = "".join(json.dumps(row) + "\n" for row in good)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table.to_pandas().to_csv(folder / "c.csv", index=False)
    pq.write_table(table, folder / "d.parquet", row_group_size=7)
    (folder / "e.json").write_text(json.dumps(good))
    shutil.copy(QUICKSTART / "heldout.json", folder / "f.json")
    paths = sorted(folder.iterdir())
    kept = records.Columns(keep=("kept", "when"))

    def read(path: Path) -> None:
        columns = records.Columns() if path.name == "f.json" else kept

        def source(one: rows.Input) -> rows.Source:
            return sources.source_of(one, columns.wanted())

        plan = records.plan(inputs.find([str(path)]), 8, columns=columns, unique_ids=True)
        count = 0
        for shard in range(len(plan.shards)):
            for _, row in records.rows_of(plan, shard, source):
                asked = records.example_of(row, columns, max_context_chars=1_000)
                json.loads(work.error_line(row, str(asked)))
                count += 1
        if count != plan.records:
            raise AssertionError(f"{count} rows of {plan.records}")

    return read, paths


def state_files(folder: Path) -> Target:
    """A run that goes on: it is refused by name, or ends in the same bytes."""
    from flaxqa import batch, reader
    from flaxqa.config import PredictConfig
    from flaxqa.errors import FlaxqaError

    model = str(QUICKSTART / "checkpoint")
    loaded = reader.load(model, devices=1)
    rows = json.loads((QUICKSTART / "heldout.json").read_bytes())["data"][0]["paragraphs"][:2]
    data, output = folder / "data.json", folder / "out"
    data.write_text(json.dumps({"data": [{"paragraphs": rows}]}))
    config = PredictConfig(input=(str(data),), output=str(output), model=model, shard_size=3)
    batch.predict(config, reader=loaded)
    kept = folder / "kept"
    shutil.copytree(output, kept)
    parts = {path.name: path.read_bytes() for path in output.glob("part-*")}

    def read(path: Path) -> None:
        # One part is missing, so that the run has to go on.
        (output / min(parts)).unlink(missing_ok=True)
        problem = None
        try:
            batch.predict(config, reader=loaded)
        except FlaxqaError as error:
            problem = error
            batch.predict(config, reader=loaded, restart=True)
        finally:
            found = {path.name: path.read_bytes() for path in output.glob("part-*")}
            shutil.rmtree(output)
            shutil.copytree(kept, output)
        if found != parts or (problem is not None and path.name not in str(problem)):
            raise AssertionError(f"other bytes in the end, or an error without a name: {problem}")
        if problem is not None:
            raise problem

    names = ("_run.json", "_plan.json", "_manifest.jsonl", "_SUCCESS")
    return read, [output / name for name in names]


def configs(folder: Path) -> Target:
    from flaxqa import config
    from flaxqa.eval.config import CompareConfig, EvalConfig

    kinds: dict[str, Any] = {
        "quickstart.toml": EvalConfig, "gpu.toml": EvalConfig, "compare.toml": CompareConfig,
    }  # fmt: skip
    for name in kinds:
        shutil.copy(ROOT / "configs" / name, folder)

    def read(path: Path) -> None:
        kind = kinds[path.name]
        needed = {"model": "m", "data": "d", "output": "o"}
        kind(**needed | config.read_toml(path, kind))

    return read, [folder / name for name in kinds]


KINDS: dict[str, Callable[[Path], Target]] = {
    "checkpoint": checkpoints,
    "weights": weight_files,
    "squad": squad_files,
    "records": record_files,
    "state": state_files,
    "config": configs,
}


# --- the processes ---


def work(kind: str, seed: int, seconds: float, tell: Any) -> None:
    """Mutates and reads until the time is over; tells what it is at."""
    from flaxqa.errors import FlaxqaError

    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        read, paths = KINDS[kind](Path(name))
        for path in paths:
            read(path)
        good = {path: path.read_bytes() for path in paths}
        began = time.monotonic()
        count = refused = 0
        while time.monotonic() - began < seconds:
            path = random.Random(f"{kind} {seed} {count}").choice(paths)
            content = mutated(good[path], random.Random(f"{kind} {seed} {count} content"))
            path.write_bytes(content)
            tell.send(("at", count, path.name, content))
            try:
                read(path)
            except FlaxqaError:
                refused += 1
            except BaseException as error:
                tell.send(("found", f"{type(error).__name__}: {error}"[:500]))
                return
            path.write_bytes(good[path])
            count += 1
        tell.send(("done", count, refused))


def memory_of(process: int) -> int:
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def watched(kind: str, seed: int, seconds: float) -> Iterator[str]:
    """Runs a kind; what was found, one finding for each process that had to end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(kind, seed, seconds, theirs))
    process.start()
    theirs.close()
    at: tuple[Any, ...] = (0, "", b"")
    since, setting_up, peak = time.monotonic(), True, 0
    problem = ""
    while not problem:
        peak = max(peak, memory_of(process.pid or 0))
        if ours.poll(0.05):
            try:
                what, *told = ours.recv()
            except EOFError:
                process.join()
                problem = f"the process ended with {process.exitcode}"
                break
            if what == "done":
                process.join()
                count, refused = told
                print(f"{kind:11} {count:6,} files, {refused:6,} refused as a whole, "
                      f"{peak / 2**20:,.0f} MiB", flush=True)  # fmt: skip
                return
            if what == "found":
                problem = told[0]
            else:
                at, since, setting_up = tuple(told), time.monotonic(), False
        elif time.monotonic() - since > PATIENCE * (4 if setting_up else 1):
            problem = f"more than {PATIENCE:g} s"
        if peak > MEMORY:
            problem = f"{peak / 2**20:,.0f} MiB"
    process.kill()
    process.join()
    number, name, content = at
    kept = Path(tempfile.gettempdir()) / f"fuzz-{kind}-{seed}-{number}-{name}"
    kept.write_bytes(content)
    yield f"{kind}: {problem}; file {number}: {kept}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz.py", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    findings = [
        finding
        for kind in args.kinds
        for finding in watched(kind, args.seed, args.seconds / len(args.kinds))
    ]
    for finding in findings:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
