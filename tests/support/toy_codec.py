"""A codec written for tests, and the shortest example of one: rows of int8 with a scale each.

The half without a framework says which tensors a record holds and makes them of trained experts;
each backend's half sees them in a record's bytes and dequantises where it computes. `register` puts
all halves where their tables are, as a real encoding would stand in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from chronos.common.layout import codecs
from chronos.common.model.config import ModelConfig
from chronos.common.model.guest import Geometry
from chronos.common.model.weights import TensorSpec, expert_tensors

NAME = "int8-rows"


class Rows:
    """Without a framework: for each matrix of an expert its int8 values and a float32 a row."""

    source = codecs.SWIGLU

    def __init__(self, name: str) -> None:
        self.name = name

    def tensors(self, config: Geometry) -> list[TensorSpec]:
        assert isinstance(config, ModelConfig)
        return self.tensors_from(expert_tensors(config))

    def tensors_from(self, plain: Sequence[TensorSpec]) -> list[TensorSpec]:
        specs = []
        for spec in plain:
            specs.append(TensorSpec(spec.name, spec.shape, "I8"))
            specs.append(TensorSpec(f"{spec.name}_scale", spec.shape[:1], "float32"))
        return specs

    def encode(self, weights: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[Any]]:
        coded: dict[str, NDArray[Any]] = {}
        for name, weight_OI in weights.items():
            scale_O = np.abs(weight_OI).max(axis=1) / np.float32(127)
            coded[name] = np.rint(weight_OI / scale_O[:, None]).astype(np.int8)
            coded[f"{name}_scale"] = scale_O
        return coded


def decoded(weight_OI: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a matrix is after it was coded."""
    coded = Rows(NAME).encode({"w": weight_OI})
    out: NDArray[np.float32] = coded["w"].astype(np.float32) * coded["w_scale"][:, None]
    return out


class Coded(NamedTuple):
    """An expert, or a stack of them, in either framework: arrays in the order of a record."""

    gate_up_FD: Any
    gate_up_scale_F: Any
    down_DF: Any
    down_scale_D: Any


def torch_codec() -> Any:
    from chronos.backends.torch.codecs import Expert, Swiglu, tensors_of

    class TorchRows:
        def view(self, raw: Any, record: Any, release: Any = None) -> Coded:
            return Coded(*tensors_of(raw, record).values())

        def forward(self, x_TD: Any, expert: Coded, block: Any) -> Any:
            assert block.layer >= 0  # the layer's module, for what its experts share
            gate_up_FD = expert.gate_up_FD.to(x_TD.dtype) * expert.gate_up_scale_F[:, None]
            down_DF = expert.down_DF.to(x_TD.dtype) * expert.down_scale_D[:, None]
            return Swiglu().forward(x_TD, Expert(gate_up_FD, down_DF))

    return TorchRows


def mlx_codec() -> Any:
    import mlx.core as mx

    from chronos.backends.mlx.codecs import Expert, Swiglu, tensors_of

    def widened(expert: Coded, dtype: Any) -> Expert:
        gate_up_FD = expert.gate_up_FD.astype(dtype) * expert.gate_up_scale_F[..., None]
        return Expert(gate_up_FD, expert.down_DF.astype(dtype) * expert.down_scale_D[..., None])

    class MlxRows:
        stacked = False

        def view(self, raw: Any, record: Any) -> Coded:
            return Coded(*tensors_of(raw, record).values())

        def forward(self, x_TD: Any, expert: Coded, block: Any) -> Any:
            assert block.layer >= 0
            return Swiglu().forward(x_TD, widened(expert, x_TD.dtype))

        def gathered(self, x_ND: Any, stack: Coded, places_N: Any, block: Any, sort: bool) -> Any:
            chosen = Coded(*(array[places_N] for array in stack))  # not the whole stack
            row_N = mx.arange(len(x_ND), dtype=mx.uint32)
            return Swiglu().gathered(x_ND, widened(chosen, x_ND.dtype), row_N, block, sort)

    return MlxRows


def register(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Make the encoding known to the layout and to one backend."""
    patch.setitem(codecs.ENCODERS, NAME, Rows)
    if backend == "torch":
        from chronos.backends.torch import codecs as torch_codecs

        patch.setitem(torch_codecs.CODECS, NAME, torch_codec())
    else:
        from chronos.backends.mlx import codecs as mlx_codecs

        patch.setitem(mlx_codecs.CODECS, NAME, mlx_codec())
