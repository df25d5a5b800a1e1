"""Packed models: where each routed expert lies on disk, and how it gets there.

`folder` opens and checks a packed model, `manifest` and `ctsr` are its two formats, `codecs` names
how an expert's bytes are coded, `pack` writes one from what `source` finds, `unpack` undoes that,
`verify` reads every byte, `overview` none of them, `clusters` decides which experts lie side by
side. `naming`, `guest` and `quantised` know other libraries' checkpoints.
"""

from chronos.common.layout.ctsr import read_records, write_experts
from chronos.common.layout.folder import (
    Layout,
    is_packed,
    open_layout,
    packed_experts,
    read_experts,
    read_weights,
)
from chronos.common.layout.manifest import Record, RecordTensor
from chronos.common.layout.overview import inspect
from chronos.common.layout.pack import PackReport, pack, reorder
from chronos.common.layout.unpack import UnpackReport, unpack
from chronos.common.layout.verify import VerifyReport, verify

__all__ = [
    "Layout",
    "PackReport",
    "Record",
    "RecordTensor",
    "UnpackReport",
    "VerifyReport",
    "inspect",
    "is_packed",
    "open_layout",
    "pack",
    "packed_experts",
    "read_experts",
    "read_records",
    "read_weights",
    "reorder",
    "unpack",
    "verify",
    "write_experts",
]
