"""What fewer bits cost in EM and F1, in the step of accelerators, on any device: `make precision`.

Rows: float32; bfloat16 with float32 between products, as on CPUs; bfloat16 there, too, as on
accelerators; and what float8 would be: operands of every product of a layer rounded to e4m3, with
the best scale that one number for each tensor can be, that of the batch itself. A scale that is
fixed beforehand can only be worse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from flaxqa import answers, checkpoint, features, files, inference, predict
from flaxqa.errors import FlaxqaError

from . import questions, squad
from .questions import SquadExample

HIGHEST = 448.0  # of e4m3
ROWS = {  # dtype, and whether it lies between products, too
    "float32": ("float32", False),
    "bfloat16, float32 between": ("bfloat16", False),
    "bfloat16": ("bfloat16", True),
    "float8": ("bfloat16", True),
}


class StepOfAccelerators(predict.Predictor):
    """A predictor that computes anywhere as one does on an accelerator."""

    def choose_attention(self, plain: bool) -> str:
        return "banded"


def e4m3(x: jax.Array) -> jax.Array:
    """Rounded to float8 with one scale for all, as float32."""
    x = x.astype(jnp.float32)
    scale = HIGHEST / jnp.maximum(jnp.abs(x).max(), 1e-30)
    return (x * scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) / scale


@contextlib.contextmanager
def float8_products() -> Iterator[None]:
    """Lets the products of `inference.forward` have float8 operands, but for that of the head."""
    plain = inference.product

    def product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        if kernel.shape[-1] == 2:
            return plain(x, kernel, dtype)
        return plain(e4m3(x), e4m3(kernel), jnp.float32).astype(dtype)

    with mock.patch.object(inference, "product", product):
        yield


def answered(
    model: str, asked: Sequence[SquadExample], row: str
) -> tuple[dict[str, str], np.ndarray]:
    """Answers by question, and the logits of all windows."""
    dtype, short = ROWS[row]
    loaded = checkpoint.load(model, dtype=dtype)
    longest = min(384, loaded.config.max_position_embeddings)
    step = StepOfAccelerators(loaded.model, max_length=longest, kernels="xla", batch_tokens=4_096)
    step.short = short
    windows = features.make(asked, loaded.tokenizer, max_length=longest)
    with float8_products() if row == "float8" else contextlib.nullcontext():
        scores = step.predict(windows)
    found = answers.decode_squad(asked, windows, scores, top_k=1)
    tables = np.stack([scores.start, scores.end])
    return (
        {one.id: best[0].text if best else "" for one, best in zip(asked, found, strict=True)},
        tables[np.isfinite(tables)].astype(np.float64),
    )


def rows(model: str, asked: Sequence[SquadExample], v2: bool) -> Iterator[dict[str, Any]]:
    """Of each row the scores, and how far it is from the first."""
    first: tuple[Mapping[str, str], np.ndarray] | None = None
    for row in ROWS:
        began = time.perf_counter()
        texts, logits = answered(model, asked, row)
        exact, wanted = first = first or (texts, logits)
        scores = squad.score(asked, texts, v2=v2)
        yield {
            "step": row,
            **scores.means,
            "same_answers": sum(exact[key] == text for key, text in texts.items()),
            "questions": len(texts),
            # Root mean squares: how large the errors are beside the logits.
            "logits_error": float(np.sqrt(np.square(logits - wanted).mean()
                                          / np.square(wanted).mean())),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flaxqa.eval.precision", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="configs/quickstart/checkpoint", help="checkpoint")
    parser.add_argument("--data", default="configs/quickstart/heldout.json", help="a SQuAD file")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--output", help="file for the numbers, JSON")
    args = parser.parse_args(arguments)
    found = []
    try:
        asked, v2 = questions.read(args.data)
        print("| step | EM | F1 | answers as in float32 | error of logits |\n|---|---|---|---|---|")
        for row in rows(args.model, asked[: args.limit], v2):
            found.append(row)
            print(
                f"| {row['step']} | {row['exact_match']:.2f} | {row['f1']:.2f} "
                f"| {row['same_answers']:,} of {row['questions']:,} | {row['logits_error']:.4f} |",
                flush=True,
            )
    except FlaxqaError as error:
        print(f"precision: {error}", file=sys.stderr)
        return 2
    if args.output:
        content = {"arguments": vars(args), "rows": found}
        files.write_named(args.output, json.dumps(content, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
