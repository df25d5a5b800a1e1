"""Training and evaluation data: documents in, deterministic NumPy batches out."""

from __future__ import annotations

from chronos.common.data.answers import (
    Example,
    Pair,
    Prompt,
    encode_examples,
    encode_pairs,
    encode_prompts,
)
from chronos.common.data.documents import (
    BadRows,
    Document,
    ReadReport,
    counted,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.data.encode import Encoded, encode_documents
from chronos.common.data.fitting import FittedRows, PairBatches, join
from chronos.common.data.functions import stdlib_functions
from chronos.common.data.packing import (
    IGNORE,
    Batch,
    PackedBatches,
    PackedDataset,
    check_single,
    pack_documents,
)

__all__ = [
    "IGNORE",
    "BadRows",
    "Batch",
    "Document",
    "Encoded",
    "Example",
    "FittedRows",
    "PackedBatches",
    "PackedDataset",
    "Pair",
    "PairBatches",
    "Prompt",
    "ReadReport",
    "check_single",
    "counted",
    "encode_documents",
    "encode_examples",
    "encode_pairs",
    "encode_prompts",
    "join",
    "pack_documents",
    "read_documents",
    "split_documents",
    "stdlib_documents",
    "stdlib_functions",
]
