"""How a record of Transformers' modules spells the experts of MLX-LM's switches: found by asking.

A model's `sanitize` knows a checkpoint by the names of its experts. It is given small numbered ones
under the names that checkpoints use: what becomes of the numbers says how a record's matrices lie,
and a spelling that `sanitize` does not know is noticed. What a codec has to know of a switch is
gathered here too. Not covered: blocks that compute their experts otherwise.

Shape legend: F expert hidden, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from chronos.backends.mlx.codecs import Switch
from chronos.common.layout import Record

LAYER = re.compile(r"(.*?)\b((?:layers|blocks|h)\.(\d+))\.(.+)")
# MLX-LM reads gpt-oss as it was released, in MXFP4; as Transformers saves it, its `sanitize` loses
# the experts.
KNOWN = {"gpt_oss": ("interleaved", True)}
# How checkpoints spell experts: one by one (gate, up, down), or stacked (gate and up, down); and
# what they call the block where MLX-LM calls it otherwise.
_ONE_BY_ONE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_STACKED = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("gate_up_proj", "down_proj"),
    ("input_linear.weight", "output_linear.weight"),
)
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
# An expert in numbers, to be found again: gate rows, up rows [2F, D]; down [D, F]. F = 2, D = 3.
_GATE_UP = np.arange(12, dtype=np.float32).reshape(4, 3)
_DOWN = 100 + np.arange(6, dtype=np.float32).reshape(3, 2)
_EXPERT = (_GATE_UP[:2], _GATE_UP[2:], _DOWN)

Weights = dict[str, mx.array]
Spelling = tuple[str, bool]  # of Transformers' records: `rows` and `swapped` of a `Switch`
Blocks = dict[int, tuple[str, nn.Module]]  # by layer: a switch and its path


def switch_of(block: nn.Module, spelling: Spelling) -> Switch:
    """What a block adds to its experts."""
    names = _projections(block)
    quantised = {n: _settings(block[n]) for n in names if "scales" in block[n]}
    return Switch(block.activation, "gate_proj" in block, quantised, *spelling)


def spellings(
    dense: Iterable[str], blocks: Blocks, records: Mapping[int, Record]
) -> Iterator[tuple[bool, Weights]]:
    """Numbered experts under the names that checkpoints use, the usual ones first, and whether they
    are `swapped`. dense: names of the checkpoint's other tensors."""
    towers = {m[1]: None for name in dense if (m := LAYER.fullmatch(name))}
    parents = {i: m for i, (path, _) in blocks.items() if (m := LAYER.fullmatch(path))}
    own = {m[4].rpartition(".")[0] for m in parents.values()}
    biased = any(t.name.endswith(("_bias", ".bias")) for r in records.values() for t in r.tensors)
    for tower in towers:
        for block in dict.fromkeys([*own, *_BLOCKS]):
            at = {layer: f"{tower}{m[2]}.{block}" for layer, m in parents.items()}
            counts = [(at[layer], experts_in(b)) for layer, (_, b) in blocks.items()]
            gated = any("gate_proj" in b for _, b in blocks.values())
            for three in _ONE_BY_ONE:
                numbers = dict(zip(three, _EXPERT, strict=True))
                if not gated:
                    del numbers[three[0]]
                yield False, _one_by_one(numbers, counts, biased)
            for two in _STACKED:
                for swapped in (False, True):
                    yield swapped, _stacked(two, counts, swapped, biased)


def read_rows(found: Weights, blocks: Blocks) -> str | None:
    """`rows` of a `Switch`, by what became of the numbers; None where they do not lie in any way
    known here."""
    path, block = next(iter(blocks.values()))
    first, *rest = [np.array(found[f"{path}.{name}.weight"][0]) for name in _projections(block)]
    if not np.array_equal(rest[-1], _DOWN):
        return None
    if len(rest) == 1:  # no gate: the checkpoint has none either, what stood for it is left over
        return "" if np.array_equal(first, _GATE_UP[2:]) else None
    rows = {"halves": (_GATE_UP[:2], _GATE_UP[2:]), "interleaved": (_GATE_UP[::2], _GATE_UP[1::2])}
    for name, parts in rows.items():
        if all(np.array_equal(a, b) for a, b in zip((first, rest[0]), parts, strict=True)):
            return name
    return None


def _projections(block: nn.Module) -> tuple[str, ...]:
    return ("fc1", "fc2") if "fc1" in block else ("gate_proj", "up_proj", "down_proj")


def experts_in(block: nn.Module) -> int:
    count: int = (block.fc1 if "fc1" in block else block.gate_proj).weight.shape[0]
    return count


def _one_by_one(
    numbers: Mapping[str, np.ndarray], counts: list[tuple[str, int]], biased: bool
) -> Weights:
    one = {f"{name}.weight": mx.array(matrix) for name, matrix in numbers.items()}
    if biased:
        one |= {f"{name}.bias": mx.array(matrix[:, 0]) for name, matrix in numbers.items()}
    return {
        f"{block}.experts.{expert}.{name}": array
        for block, count in counts
        for expert in range(count)
        for name, array in one.items()
    }


def _stacked(
    names: Sequence[str], counts: list[tuple[str, int]], swapped: bool, biased: bool
) -> Weights:
    weights = {}
    for block, count in counts:
        for name, matrix in zip(names, (_GATE_UP, _DOWN), strict=True):
            one = mx.array(matrix.T if swapped else matrix)
            weights[f"{block}.{name}"] = mx.broadcast_to(one, (count, *one.shape))
            if biased:
                bias = mx.array(matrix[:, 0])
                weights[f"{block}.{name}_bias"] = mx.broadcast_to(bias, (count, *bias.shape))
    return weights


def _settings(block: nn.Module) -> dict[str, Any]:
    return {"group_size": block.group_size, "bits": block.bits, "mode": block.mode}
