"""Files of other formats in the place of a safetensors checkpoint: what they are, the way out.

Told by names and first bytes; nothing is parsed, and no pickle is ever opened. Not known here: what
a checkpoint should hold.
"""

from __future__ import annotations

import json
from pathlib import Path

from chronos.common.errors import CorruptFileError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp")
_ORIGINAL = "take the checkpoint in safetensors that it was made from"
_GGUF = (
    "pack it beside the folder of the checkpoint it was made from:"
    " chronos pack FILE.gguf --config DIR -o DST"
)
_SAVE = "load the model with Transformers and save_pretrained it: that writes safetensors"
# By the end of a file's name: what it is, and what to do.
_FORMATS: dict[str, tuple[str, str]] = {
    ".gguf": ("is in GGUF, the format of llama.cpp", _GGUF),
    ".onnx": ("is an ONNX graph", _ORIGINAL),
    ".npz": ("holds weights in NumPy's format, as MLX once did", _ORIGINAL),
    ".h5": ("holds weights of TensorFlow", _SAVE),
    ".msgpack": ("holds weights of Flax", _SAVE),
}
_HEADS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer: a few lines in the place of the file",
        "fetch the file itself: `git lfs install && git lfs pull`, or `hf download`",
    ),
    (b"GGUF", "is in GGUF, the format of llama.cpp", _GGUF),
    (b"PK\x03\x04", "is a zip archive, as torch.save writes it", _SAVE),
    (b"\x80\x02", "is a pickle", _SAVE),
    (b"<", "is a page of HTML or XML: the answer of a server", "download the file again"),
)
HEAD = max(len(head) for head, _, _ in _HEADS)


def by_content(path: Path, head: bytes) -> CorruptFileError | None:
    """The error for a file that begins with `head`, where that is a format known here."""
    for start, what, fix in _HEADS:
        if head.startswith(start):
            return CorruptFileError(f"{path.name} {what}", str(path), fix)
    return None


def refuse_other(path: Path) -> None:
    """Raises CorruptFileError for a file that by its name is of no format that is read here."""
    if path.suffix not in (".safetensors", ".ctsr") and not path.is_symlink():
        raise by_name(path) or CorruptFileError(
            f"{path.name} is not a safetensors file",
            str(path),
            "name a model folder, a .safetensors or a .ctsr file",
        )


def by_name(path: Path) -> CorruptFileError | None:
    """The error for a file of another format, or a folder that holds one in place of weights."""
    if path.is_dir():
        return _adapter(path) or _consolidated(path) or _first_of(path)
    if path.suffix in _FORMATS:
        what, fix = _FORMATS[path.suffix]
        return CorruptFileError(f"{path.name} {what}", str(path), fix)
    if path.suffix in _PICKLES:
        what = f"the weights are pickled ({path.name}), which Chronos does not read"
        return CorruptFileError(what, str(path.parent), _SAVE)
    return None


def _first_of(folder: Path) -> CorruptFileError | None:
    found = [by_name(path) for path in sorted(folder.glob("*")) if path.is_file()]
    shells = (folder / "zero_to_fp32.py").exists()
    for error in filter(None, found):
        if shells and "pickled" in error.what:
            fix = "gather the weights first: python zero_to_fp32.py . OUT --safe_serialization"
            return CorruptFileError(error.what, error.where, fix)
        return error
    return None


def _adapter(folder: Path) -> CorruptFileError | None:
    """What PEFT writes: changes to a model, not the model."""
    path = folder / "adapter_config.json"
    if not path.exists() and not any(folder.glob("adapter_model.*")):
        return None
    try:
        base = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    return CorruptFileError(
        f"Adapter (LoRA) of {str(base or 'another model')[:100]!r}, not a model",
        str(folder),
        "merge it into its model with PEFT (merge_and_unload, save_pretrained), and name that",
    )


def _consolidated(folder: Path) -> CorruptFileError | None:
    """Mistral's own format, other names in one file; its repositories hold both."""
    found = sorted(folder.glob("consolidated*.safetensors"))
    if not found:
        return None
    return CorruptFileError(
        f"{found[0].name.capitalize()} is in Mistral's own format",
        str(found[0]),
        "download the model-*.safetensors of the repository with their index, or convert it with"
        " Transformers (convert_mistral_weights_to_hf.py)",
    )
