"""Loss by position of models on texts longer than they were trained on: before and after YaRN.

Held-out documents of the standard library, a row each from its beginning, teacher-forced. Shown are
nats a token in parts of the row: the shipped model as its config has it, the same weights with YaRN
from TRAINED tokens to `--length` and no training, and a model folder that was trained so:

    chronos train pretrain -c longer -o runs/longer
    python -m bench.runs.longer runs/longer/model [--rows 24] [--length 1024] [--trained 256]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from chronos import backends
from chronos.common.data import Batch
from chronos.common.layout import read_weights
from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import lengthened
from chronos.common.text.tokenizer import Tokenizer
from chronos.measure.evaluate import STDLIB, documents_of
from chronos.run.models import resolve_model


def rows_of(tokenizer: Tokenizer, count: int, length: int, held_out: float) -> list[Batch]:
    """The first tokens of documents that have so many, spread over all of them."""
    ids = (tokenizer.encode_prompt(d.text) for d in documents_of(STDLIB, held_out))
    long = [np.array(row[: length + 1], np.int32)[None] for row in ids if len(row) > length]
    chosen = [long[i * len(long) // count] for i in range(min(count, len(long)))]
    return [Batch(x[:, :-1], x[:, 1:], np.zeros((1, length), np.int32)) for x in chosen]


def by_part(backend: Any, model: Any, rows: list[Batch], edges: list[int]) -> list[float]:
    """Mean nats a token between each two edges."""
    loss_T = -np.mean([backend.score(model, row).log_probs_BT[0] for row in rows], axis=0)
    return [float(loss_T[a:b].mean()) for a, b in zip(edges, edges[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--trained", type=int, default=256)
    parser.add_argument("--held-out", type=float, default=0.05, help="the recipe's share")
    parser.add_argument("--backend", default="torch")
    args = parser.parse_args()
    backend = backends.load(args.backend)
    shipped = resolve_model("demo")
    plain = ModelConfig.from_json(shipped)
    models = {
        "as it is": (shipped, plain),
        "YaRN, untrained": (shipped, lengthened(plain, args.length, args.trained)),
        "YaRN, trained": (args.model, ModelConfig.from_json(args.model)),
    }
    tokenizer = Tokenizer.load(shipped)
    rows = rows_of(tokenizer, args.rows, args.length, args.held_out)
    edges = [0, *range(args.trained, args.length + 1, args.trained)]
    print(f"{len(rows)} rows of {args.length} tokens, nats a token behind position")
    print(f"{'':16}" + "".join(f"{edge:8}" for edge in edges[:-1]))
    found = {}
    for name, (folder, config) in models.items():
        quiet = dataclasses.replace(config, dropout=0.0, fallback_mask_prob=0.0)
        model = backend.build(quiet, seed=0, weights=read_weights(folder, quiet))
        found[name] = by_part(backend, model, rows, edges)
        print(f"{name:16}" + "".join(f"{loss:8.3f}" for loss in found[name]))
    print(json.dumps({"bench": "longer", "edges": edges, "loss": found, "rows": len(rows)}))


if __name__ == "__main__":
    main()
