"""Which tensor of another library's checkpoint is which part of which routed expert, by its name.

Checkpoints name experts one by one (`experts.3.gate_proj.weight`) or stack them along dimension 0
(`experts.gate_up_proj`, MLX-LM's `switch_mlp.gate_proj.weight`). A record holds what the library's
own module computes with: one matrix `gate_up_proj`, gate rows first, which is the two parts one
after the other; MLX-LM's three projections as they are, quantised or not, and so those of any
quantised checkpoint (`unmerged`). The facts are from Transformers' conversion_mapping.py and
MLX-LM's `sanitize` methods. Shapes are not known here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from chronos.common.errors import ShapeMismatch
from chronos.common.layout.quantised import KINDS

_LAYER = re.compile(r"((?:\w+\.)*?)(?:layers|blocks|h)\.(\d{1,5})\.(.+)")
_ONE = re.compile(r"(?:.+\.)?experts\.(\d{1,5})\.(\w+)\.(" + "|".join(KINDS) + ")")
_STACKED = re.compile(r"(?:.+\.)?experts\.((?:gate_up|up|down)_proj(?:_bias|_blocks|_scales)?)")
_SWITCH = re.compile(
    r"(?:.+\.)?(?:(?:switch_mlp|switch_glu|experts)\.(gate_proj|up_proj|down_proj)"
    r"|(?:switch_mlp)\.(fc1|fc2))\.(weight|scales|biases|bias)"
)
# The projection of an expert, and whether it is the first or second part of its record's tensor.
_PROJECTIONS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip
_NAMES = {
    ("gate_up_proj", 0): "gate_proj", ("gate_up_proj", 1): "up_proj", ("down_proj", 0): "down_proj",
}  # fmt: skip
# Stacked under names of their own (Granite, Aria).
_ODD_STACKS = {
    "block_sparse_moe.input_linear.weight": "gate_up_proj",
    "block_sparse_moe.output_linear.weight": "down_proj",
    "mlp.experts.fc1.weight": "gate_up_proj",
    "mlp.experts.fc2.weight": "down_proj",
}
_ROUTED = frozenset({"experts", "switch_mlp", "switch_glu"})
_DENSE = frozenset({"e_score_correction_bias"})  # of the router, though it lies among the experts
_SWITCH_ORDER = [
    f"{projection}.{kind}"
    for projection in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    for kind in KINDS
]
# In a record, tensors lie in this order.
ORDER = {
    name: place
    for place, name in enumerate(
        ["gate_up_proj", "gate_up_proj_blocks", "gate_up_proj_scales", "up_proj"]
        + ["gate_up_proj_bias", "up_proj_bias", "down_proj", "down_proj_blocks"]
        + ["down_proj_scales", "down_proj_bias", *_SWITCH_ORDER]
    )
}


class Part(NamedTuple):
    """A tensor, or one of two parts of a tensor, of one expert or of all experts of a layer."""

    tower: str  # what stands before the layers: a checkpoint may hold several stacks of them
    layer: int
    expert: int | None  # None: of all experts, stacked along dimension 0
    tensor: str  # its name in the record
    place: int  # 0 or 1 within the tensor


def unmerged(tensor: str, place: int) -> str:
    """The name in a record of a projection that stays as it is: "gate_proj.weight" for the first
    part of gate_up_proj."""
    if "." in tensor:
        return tensor
    kind = "bias" if tensor.endswith("_bias") else "weight"
    return f"{_NAMES[tensor.removesuffix('_bias'), place]}.{kind}"


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers a tensor is in, and the layer; None where it is in none."""
    found = _LAYER.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def is_extra(name: str) -> bool:
    """Whether a tensor is of a multi-token-prediction head, which no library's decoder runs."""
    return any(part.startswith("mtp") for part in name.split("."))


def expert_part(name: str) -> Part | None:
    """What `name` is a part of; None for a tensor of the dense part.

    Raises ShapeMismatch for one that lies among the experts and is not understood.
    """
    inside = _LAYER.fullmatch(name)
    if not inside:
        return None
    tower, layer, rest = inside[1], int(inside[2]), inside[3]
    if (one := _ONE.fullmatch(rest)) and one[2] in _PROJECTIONS:
        tensor, place = _PROJECTIONS[one[2]]
        if one[3] not in ("weight", "bias"):  # quantised: projections stay as they are
            return Part(tower, layer, int(one[1]), f"{_NAMES[tensor, place]}.{one[3]}", 0)
        suffix = "_bias" if one[3] == "bias" else ""
        return Part(tower, layer, int(one[1]), tensor + suffix, place)
    if stacked := _STACKED.fullmatch(rest):
        return Part(tower, layer, None, stacked[1], 0)
    if rest in _ODD_STACKS:
        return Part(tower, layer, None, _ODD_STACKS[rest], 0)
    if switch := _SWITCH.fullmatch(rest):
        return Part(tower, layer, None, f"{switch[1] or switch[2]}.{switch[3]}", 0)
    *path, leaf = rest.split(".")
    if _ROUTED.isdisjoint(path) or leaf in _DENSE:
        return None
    raise ShapeMismatch(
        f"tensor {name} lies among the routed experts under a name Chronos does not know",
        "",
        "save the model with Transformers in bfloat16, or convert it with MLX-LM, and pack that",
    )
