"""Routing traces: which experts every token asked for, in every layer, on disk and in memory.

The `.npz` holds `ids` uint8 (uint16 above 256 experts) [tokens, layers, k], `weights` float16 of
the same shape (optional), `seq` int32 [tokens], `tokens` int32 [tokens], the id of each token
(optional), and `meta`, a JSON string with at least model,
num_experts, top_k and phase; `layer_ids` where the rows are not layers 0, 1, 2 ...; `expert_bytes`,
the size of the largest expert's record, where it is known.
Files are read strictly and never unpickled: sizes are checked against the archive before anything
is allocated. Not covered: router probabilities of the experts that were not chosen.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.disk.atomic import atomic_write
from chronos.common.errors import DataError, UsageError

Ids = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_MAX_BYTES = 2 << 30  # unpacked, one array: 500 million routed ids; stops a zip bomb
_NARROW = 256  # experts whose ids fit in uint8
_REQUIRED = ("ids", "seq", "meta")
_OPTIONAL = ("weights", "tokens")
# All that zipfile, zlib and numpy's header parser raise on damaged bytes.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of T tokens over L MoE layers, K experts each. Raises DataError if it makes no sense.

    ids_TLK: uint8 or uint16, no id twice in one (token, layer). weights_TLK: float16 or None.
    seq_T: int32, the sequence of each token; the tokens of one sequence are contiguous. tokens_T:
    int32, the id of the token that was run, or None.
    """

    ids_TLK: Ids
    weights_TLK: npt.NDArray[np.float16] | None
    seq_T: npt.NDArray[np.int32]
    meta: dict[str, Any]
    tokens_T: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        _check_meta(self.meta)
        _check_ids(self)
        _check_seq(self.seq_T, self.num_tokens)
        if self.weights_TLK is not None:
            _check_weights(self.weights_TLK, self.ids_TLK.shape)
        if self.tokens_T is not None:
            _check_tokens(self.tokens_T, self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return int(self.ids_TLK.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers; `layers` says which of the model's they are."""
        return int(self.ids_TLK.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.ids_TLK.shape[2])

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return int(self.meta["num_experts"])

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of the largest expert's record, where the recorder knew it."""
        return self.meta.get("expert_bytes")

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute layer index of each row."""
        return tuple(self.meta.get("layer_ids") or range(self.num_layers))

    def part(self, start: int, stop: int) -> RoutingTrace:
        """Tokens start to stop as a trace of their own."""
        return self.select(slice(start, stop))

    def select(self, tokens: slice | npt.NDArray[np.bool_]) -> RoutingTrace:
        """These tokens, in order, as a trace of their own."""
        weights = None if self.weights_TLK is None else self.weights_TLK[tokens]
        ids = None if self.tokens_T is None else self.tokens_T[tokens]
        return RoutingTrace(self.ids_TLK[tokens], weights, self.seq_T[tokens], self.meta, ids)

    def save(self, path: str | Path) -> None:
        """Write the `.npz` atomically; ids in the narrowest type the format allows."""
        arrays: dict[str, Any] = {
            "ids": np.ascontiguousarray(self.ids_TLK, _id_type(self.num_experts)),
            "seq": np.ascontiguousarray(self.seq_T),
            "meta": np.array(json.dumps(self.meta)),
        }
        if self.weights_TLK is not None:
            arrays["weights"] = np.ascontiguousarray(self.weights_TLK)
        if self.tokens_T is not None:
            arrays["tokens"] = np.ascontiguousarray(self.tokens_T)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        atomic_write(path, [packed.getbuffer()], nbytes=packed.getbuffer().nbytes)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a trace strictly. Raises DataError naming the file and what is wrong with it, and
        UsageError where there is none."""
        try:
            arrays = _read_npz(Path(path))
            meta = json.loads(str(arrays["meta"]))
            weights, tokens = arrays.get("weights"), arrays.get("tokens")
            return cls(arrays["ids"], weights, arrays["seq"], meta, tokens)
        except DataError as error:
            raise DataError(error.what, str(path), error.fix) from None
        except FileNotFoundError:
            fix = "check the spelling; chronos trace records one"
            raise UsageError("no such trace", str(path), fix) from None
        except (OSError, *_DAMAGE) as error:
            raise DataError(f"not a readable routing trace: {error}", str(path)) from None


class TraceRecorder:
    """Collects the routing of tokens as they are generated; `trace()` makes the trace of them."""

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        model: str = "",
        phase: str = "generation",
        layers: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._meta = dict(extra or {}) | {
            "model": model,
            "num_experts": num_experts,
            "top_k": top_k,
            "phase": phase,
        }
        if layers is not None:
            self._meta["layer_ids"] = list(layers)
        self._ids: list[npt.NDArray[Any]] = []
        self._weights: list[npt.NDArray[np.float16]] = []
        self._seq: list[npt.NDArray[np.int32]] = []
        self._tokens: list[npt.NDArray[np.int32]] = []
        self._sequence = 0

    def append(
        self,
        ids: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        tokens: npt.ArrayLike | None = None,
    ) -> None:
        """Add one token [L, K] or several [T, L, K]; give weights, and the tokens' ids, always or
        never."""
        ids_TLK = _as_tokens(ids).astype(_id_type(self._meta["num_experts"]))
        self._ids.append(ids_TLK)
        self._seq.append(np.full(len(ids_TLK), self._sequence, np.int32))
        if weights is not None:
            self._weights.append(_as_tokens(weights).astype(np.float16))
        if tokens is not None:
            self._tokens.append(np.atleast_1d(np.asarray(tokens, np.int32)))

    def new_sequence(self) -> None:
        """What is appended from here on belongs to another prompt."""
        if self._seq and self._seq[-1][-1] == self._sequence:
            self._sequence += 1

    def trace(self) -> RoutingTrace:
        """Everything appended so far. Raises DataError if that is nothing."""
        if not self._ids:
            raise DataError("no token was recorded", "", "give longer texts, of two tokens or more")
        weights = None
        if self._weights:
            if len(self._weights) != len(self._ids):
                raise DataError("some tokens were recorded with weights and some without")
            weights = np.concatenate(self._weights)
        tokens = np.concatenate(self._tokens) if self._tokens else None
        return RoutingTrace(
            np.concatenate(self._ids), weights, np.concatenate(self._seq), dict(self._meta), tokens
        )


def join(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Traces of one model, one after the other, with sequences numbered anew. Weights and token
    ids are kept where all have them; the phase is `mixed` where they differ."""
    first = traces[0]
    starts = [0, *np.cumsum([int(trace.seq_T.max()) + 1 for trace in traces])]
    seq_T = [trace.seq_T + np.int32(start) for trace, start in zip(traces, starts, strict=False)]
    weights = [trace.weights_TLK for trace in traces if trace.weights_TLK is not None]
    tokens = [trace.tokens_T for trace in traces if trace.tokens_T is not None]
    phases = {trace.meta["phase"] for trace in traces}
    return RoutingTrace(
        np.concatenate([trace.ids_TLK for trace in traces]),
        np.concatenate(weights) if len(weights) == len(traces) else None,
        np.concatenate(seq_T).astype(np.int32),
        first.meta | {"phase": phases.pop() if len(phases) == 1 else "mixed"},
        np.concatenate(tokens) if len(tokens) == len(traces) else None,
    )


def _id_type(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if num_experts <= _NARROW else np.uint16


def _as_tokens(values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    return array[None] if array.ndim == 2 else array


def _check_meta(meta: Any) -> None:
    if not isinstance(meta, dict):
        raise DataError("meta is not a JSON object")
    bounds = [("num_experts", 1 << 16), ("top_k", 1 << 10)]
    if "expert_bytes" in meta:
        bounds.append(("expert_bytes", 1 << 50))
    for name, highest in bounds:
        value = meta.get(name)
        if type(value) is not int or not 1 <= value <= highest:
            raise DataError(f"meta: {name} must be a whole number of 1 to {highest}, not {value!r}")
    for name in ("model", "phase"):
        if not isinstance(meta.get(name), str):
            raise DataError(f"meta: {name} must be a string, not {meta.get(name)!r}")
    rows = meta.get("layer_ids")
    if rows is None:
        return
    if not isinstance(rows, list) or any(type(row) is not int or row < 0 for row in rows):
        raise DataError("meta: layer_ids must be a list of layer numbers")
    if sorted(set(rows)) != rows:
        raise DataError("meta: layer_ids must rise")


def _check_ids(trace: RoutingTrace) -> None:
    ids, experts = trace.ids_TLK, trace.num_experts
    if ids.dtype not in (np.uint8, np.uint16):
        raise DataError(f"ids must be uint8 or uint16, not {ids.dtype}")
    if ids.ndim != 3 or 0 in ids.shape:
        raise DataError(f"ids must be [tokens, layers, k] and not empty, not {list(ids.shape)}")
    if trace.top_k != trace.meta["top_k"]:
        raise DataError(
            f"ids hold {trace.top_k} experts per token, meta says {trace.meta['top_k']}"
        )
    if len(trace.layers) != trace.num_layers:
        raise DataError(f"ids hold {trace.num_layers} layers, layer_ids {len(trace.layers)}")
    if int(ids.max()) >= experts:
        token, layer, _ = np.argwhere(ids >= experts)[0].tolist()
        raise DataError(
            f"an id of token {token}, layer row {layer} is {ids[token, layer].max()},"
            f" and there are {experts} experts"
        )
    ordered = np.sort(ids, axis=-1)
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(-1))
    if len(twice):
        token, layer = twice[0].tolist()
        raise DataError(f"token {token}, layer row {layer} names one expert twice")


def _check_seq(seq: npt.NDArray[Any], tokens: int) -> None:
    if seq.dtype != np.int32 or seq.shape != (tokens,):
        raise DataError(f"seq must be int32 [{tokens}], not {seq.dtype} {list(seq.shape)}")
    starts = np.flatnonzero(np.diff(seq)) + 1
    runs = seq[np.concatenate([[0], starts])]
    if len(np.unique(runs)) != len(runs):
        raise DataError("seq is not contiguous: a sequence stops and goes on later")


def _check_tokens(tokens: npt.NDArray[Any], count: int) -> None:
    if tokens.dtype != np.int32 or tokens.shape != (count,) or (tokens < 0).any():
        raise DataError(f"tokens must be int32 [{count}] and not negative")


def _check_weights(weights: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if weights.dtype != np.float16 or weights.shape != shape:
        raise DataError(
            f"weights must be float16 {list(shape)}, not {weights.dtype} {list(weights.shape)}"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise DataError("weights hold a negative number, a NaN or an infinity")


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) != len(names):
            raise DataError("the archive names an array twice")
        if missing := [name for name in _REQUIRED if name not in names]:
            raise DataError(f"the archive lacks {', '.join(missing)}")
        if unknown := [name for name in names if name not in _REQUIRED + _OPTIONAL]:
            raise DataError(f"the archive holds {unknown[0]!r}, which is no part of a trace")
        return {
            name: _read_npy(archive, member) for name, member in zip(names, members, strict=True)
        }


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array, read only if its header declares exactly the bytes the archive holds."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise DataError(f"{member.filename}: unknown array format {version}")
        if dtype.hasobject or dtype.kind not in "uifU":
            raise DataError(f"{member.filename}: {dtype} arrays are refused")
        if fortran or min(shape, default=0) < 0:
            raise DataError(f"{member.filename}: not a plain row-major array")
        declared, held = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
        if declared != held or declared > _MAX_BYTES:
            raise DataError(f"{member.filename}: declares {declared} bytes and holds {held}")
        return np.frombuffer(stream.read(), dtype).reshape(shape)
