"""Training and evaluation data: documents in, deterministic NumPy batches out."""

from __future__ import annotations

from chronos.common.data.documents import (
    Document,
    ReadReport,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.data.encode import Encoded, encode_documents
from chronos.common.data.packing import (
    IGNORE,
    Batch,
    PackedBatches,
    PackedDataset,
    pack_documents,
)

__all__ = [
    "IGNORE",
    "Batch",
    "Document",
    "Encoded",
    "PackedBatches",
    "PackedDataset",
    "ReadReport",
    "encode_documents",
    "pack_documents",
    "read_documents",
    "split_documents",
    "stdlib_documents",
]
