"""A checkpoint of more channels that answers as the one it was made of.

Speed depends on sizes, answers on training. So a small trained checkpoint is made as large as
DistilBERT-base by repeating its channels: every sum over them counts each of k copies a k-th, norms
see the same mean and variance, and heads hold repeated queries and keys, scaled down again. (The
function-preserving transformations of Chen, Goodfellow and Shlens 2015,
https://arxiv.org/abs/1511.05641.)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxqa import checkpoint
from flaxqa.checkpoint import MODELS, Checkpoint
from flaxqa.errors import UsageError

HEAD = 64  # channels of a head of BERT and DistilBERT


def widened(loaded: Checkpoint, width: int, folder: Path) -> Path:
    """Writes the checkpoint with `width` channels into a folder, which is returned.

    Raises:
      UsageError: the width is not a multiple of the checkpoint's.
    """
    old = loaded.config
    copies, rest = divmod(width, old.dim)
    if rest or not copies:
        raise UsageError(f"width {width} is not a multiple of the checkpoint's {old.dim} channels")
    # As many heads as keep their size at that of BERT's, where that works out.
    more = max(1, width // HEAD // old.n_heads)
    more = more if copies % more == 0 else 1
    config = dataclasses.replace(
        old, dim=width, hidden_dim=old.hidden_dim * copies, n_heads=old.n_heads * more
    )
    channels = np.tile(np.arange(old.dim), copies)
    hidden = np.tile(np.arange(old.hidden_dim), copies)
    in_head = copies // more
    by_head = np.arange(old.dim).reshape(1, old.n_heads, 1, -1)
    heads = np.broadcast_to(by_head, (more, old.n_heads, in_head, by_head.shape[-1])).reshape(-1)
    sides = {  # of each linear layer what it reads and what it writes
        **dict.fromkeys(("q_lin", "k_lin", "v_lin"), (channels, heads)),
        "out_lin": (heads, channels),
        "lin1": (channels, hidden),
        "lin2": (hidden, channels),
        "qa_outputs": (channels, np.arange(2)),
    }

    def wide(path: tuple[object, ...], array: np.ndarray) -> np.ndarray:
        *_, layer, leaf = path
        if leaf == "embedding":
            return array[:, channels]
        reads, writes = sides.get(str(layer), (channels, channels))
        found = array[np.ix_(reads, writes)] / copies if leaf == "kernel" else array[writes]
        return found * in_head**-0.5 if layer == "q_lin" else found

    flat = nnx.to_flat_state(nnx.state(loaded.model))
    state = [
        (path, param.replace(jnp.asarray(wide(path, np.asarray(param[...], np.float32)))))
        for path, param in flat
    ]
    new = nnx.eval_shape(lambda: MODELS[type(config)](config, rngs=nnx.Rngs(0)))
    graphdef, _ = nnx.split(new)
    model = nnx.merge(graphdef, nnx.from_flat_state(state))
    checkpoint.save(model, folder, tokenizer=loaded.tokenizer)
    return folder
