"""Low-rank adapters (2106.09685): what is adapted, how adapters start, and their files.

An adapted matrix W [O, I] computes W x + alpha / rank * B A x with A [rank, I] and B [O, rank] = 0;
with `dora` each row of the sum is scaled to a trained length (DoRA, 2402.09353). Files are those of
peft: adapter_config.json and adapter_model.safetensors, whose metadata names the model they belong
to. Knows no framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from chronos.common.disk.atomic import atomic_write
from chronos.common.disk.header import TensorEntry, read_header
from chronos.common.disk.tensors import read_tensors, write_tensors
from chronos.common.errors import ConfigError, UsageError
from chronos.common.model.weights import Key

ATTENTION, SHARED, EXPERTS, GATE = GROUPS = ("attention", "shared", "experts", "gate")
# Modules by a part of their path. What is called otherwise can be named itself.
_ATTENTION = {"self_attn", "self_attention", "attention", "attn", "linear_attn", "mamba"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_SHARED = {"shared_experts", "shared_expert", "shared_mlp"}
_GATES = {"gate", "router", "previous_gate"}
_CONFIG, _TENSORS, _FINGERPRINT = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chronos.fingerprint",
)
_PREFIX = "base_model.model."
# The matrices of routed experts, and those of a native model's shared ones.
_ROUTED = re.compile(r".*\blayers\.(\d+)\..*\bexperts\.(\d+)\.\w+")
_INDEXED = re.compile(r"(.*\.shared_experts\.\d+)\.\w+")


@dataclass(frozen=True)
class LoraRecipe:
    """The section [lora]: which weights get an adapter, and of what kind."""

    SECTION: ClassVar[str] = "lora"
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = (ATTENTION,)
    """`attention`, `shared` (experts), `experts` (routed ones), `gate`, or names of modules."""
    dropout: float = 0.0
    """Share of a dense adapter's input that is dropped in training; experts' keep all."""
    dora: bool = False
    """Whether the dense part's adapters train the length of each row too."""
    expert_rank: int = 0
    """Rank of a routed expert's adapter; 0: rank divided by the experts a token takes."""
    min_picks: int = 1
    """Routed experts that fewer tokens chose get no adapter."""

    def __post_init__(self) -> None:
        targets: Any = self.targets
        if isinstance(targets, list):  # of TOML
            object.__setattr__(self, "targets", tuple(targets))
        for name, least in (("rank", 1), ("expert_rank", 0), ("min_picks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"lora.{name} must be at least {least}")
        if not (self.alpha > 0 and 0 <= self.dropout < 1):
            raise ConfigError("lora.alpha must be above 0 and lora.dropout in [0, 1)")
        names = self.targets if isinstance(self.targets, tuple) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError("lora.targets must list names", "", 'try targets = ["attention"]')

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def rank_of_expert(self, top_k: int) -> int:
        return self.expert_rank or max(1, self.rank // top_k)


def group_of(path: str) -> str:
    """The group that a module of the dense part belongs to, by its path; or ""."""
    parts = path.split(".")
    if parts[-1] in _GATES:
        return GATE
    if _SHARED & set(parts):
        return SHARED
    return ATTENTION if _ATTENTION & set(parts) or parts[-1] in _PROJECTIONS else ""


def chosen(paths: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Those of the modules that the targets name: by group, by the end of their path, or all of it.

    Raises UsageError for a target that names none of them; EXPERTS are not looked for here.
    """
    paths, found = list(paths), set()
    for target in targets:
        if target == EXPERTS:
            continue
        named = {p for p in paths if f".{p}".endswith(f".{target}") or group_of(p) == target}
        if not named:
            kinds = sorted({p.rpartition(".")[2] for p in paths})
            raise UsageError(
                f"lora.targets: {target!r} names nothing in this model",
                "",
                f"name one of {', '.join(GROUPS)}, or of its modules: {', '.join(kinds)[:200]}",
            )
        found |= named
    return [path for path in paths if path in found]


def initial(seed: int, path: str, rank: int, inputs: int) -> NDArray[np.float32]:
    """A of an adapter, [rank, inputs]: uniform within 1 / sqrt(inputs), as peft's. It follows from
    the seed and the module's path alone."""
    random = np.random.default_rng([seed, xxhash.xxh64_intdigest(path.encode())])
    bound = 1.0 / np.sqrt(inputs)
    return random.uniform(-bound, bound, (rank, inputs)).astype(np.float32)


@dataclass(frozen=True)
class AdapterFile:
    """A folder in peft's format, and how to attach an adapter that it fits.

    experts: the routed experts that it has adapters of. fingerprint: of the model it was trained
    for, "" where nobody says.
    """

    folder: Path
    recipe: LoraRecipe
    experts: frozenset[Key]
    fingerprint: str

    def tensors(self) -> Iterator[tuple[TensorEntry, memoryview]]:
        """By peft's names."""
        return read_tensors(self.folder / _TENSORS)

    @property
    def digest(self) -> str:
        """Of its tensors."""
        found = xxhash.xxh3_64()
        for entry, data in self.tensors():
            found.update(f"{entry.name} {list(entry.shape)}\n".encode())
            found.update(data)
        return str(found.hexdigest())

    def check_model(self, fingerprint: str) -> None:
        """Raises UsageError where the adapter is known to be another model's."""
        if self.fingerprint and self.fingerprint != fingerprint:
            raise UsageError(
                "the adapter was trained for another model",
                str(self.folder),
                "name the model it was trained on; `chronos inspect` prints fingerprints",
            )


def peft_name(path: str, part: str) -> str:
    """The name of a tensor in peft's files; part: "lora_A", "lora_B" or "magnitude"."""
    return f"{_PREFIX}{path}." + (
        "lora_magnitude_vector" if part == "magnitude" else f"{part}.weight"
    )


def parsed(name: str) -> tuple[str, str]:
    """(path, part) of a tensor in peft's files. Raises ConfigError."""
    match = re.fullmatch(
        re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", name
    )
    if match is None:
        raise ConfigError(f"{name} is no tensor of a LoRA adapter", "", "only LoRA can be read")
    return match[1], "magnitude" if match[2] == "lora_magnitude_vector" else match[2]


def write_adapter(
    folder: Path,
    recipe: LoraRecipe,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Any]],
    *,
    base: str,
    fingerprint: str,
) -> None:
    """Write an adapter as peft does. tensors: by peft's names. base: the model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(tensors)
    ranks = {parsed(n)[0]: shape[0] for n, _, shape, _ in found if parsed(n)[1] == "lora_A"}
    write_tensors(folder / _TENSORS, found, {"format": "pt", _FINGERPRINT: fingerprint})
    odd = {path: rank for path, rank in sorted(ranks.items()) if rank != recipe.rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "use_dora": recipe.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        # peft scales by alpha over a module's own rank
        "rank_pattern": odd,
        "alpha_pattern": {path: recipe.scale * rank for path, rank in odd.items()},
    }
    atomic_write(folder / _CONFIG, [json.dumps(settings, indent=2).encode()])


def read_adapter(folder: str | Path) -> AdapterFile:
    """Look at an adapter in peft's format. Raises ConfigError for what is not LoRA as above,
    CorruptFileError."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / _CONFIG).read_text("utf-8"))
        kind = settings["peft_type"]
    except FileNotFoundError:
        raise ConfigError(
            f"no adapter here: {_CONFIG} is missing", str(folder), "name a folder in peft's format"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{_CONFIG} cannot be read: {error!r}", str(folder)) from None
    unsupported = [
        key
        for key in ("use_rslora", "fan_in_fan_out", "modules_to_save", "target_parameters")
        if settings.get(key)
    ]
    if kind != "LORA" or settings.get("bias", "none") != "none" or unsupported:
        what = unsupported[0] if unsupported else f"{kind}, bias {settings.get('bias')!r}"
        raise ConfigError(f"the adapter needs {what}", str(folder), "only plain LoRA is read")
    header = read_header(folder / _TENSORS)
    parts = ((*parsed(entry.name), entry.shape) for entry in header.entries.values())
    shapes = {path: shape for path, part, shape in parts if part == "lora_A"}
    if not shapes:
        raise ConfigError("the adapter has no tensors", str(folder))
    routed = {path: match for path in shapes if (match := _ROUTED.fullmatch(path))}
    dense = dict.fromkeys(_INDEXED.sub(r"\1", path) for path in shapes if path not in routed)
    recipe = _recipe(settings, (*dense, *([EXPERTS] if routed else [])), folder)
    alphas = settings.get("alpha_pattern") or {}
    for path, shape in shapes.items():
        alpha = next((a for p, a in alphas.items() if f".{path}".endswith(f".{p}")), recipe.alpha)
        if abs(alpha / shape[0] - recipe.scale) > 1e-9 * recipe.scale:
            raise ConfigError(
                f"{path} is scaled by {alpha / shape[0]:g}, others by {recipe.scale:g}",
                str(folder),
                "only adapters of one scale are read",
            )
    experts = frozenset((int(match[1]), int(match[2])) for match in routed.values())
    ranks = {shapes[path][0] for path in routed}
    if len(ranks) > 1:
        raise ConfigError("the adapters of experts have several ranks", str(folder))
    recipe = replace(recipe, expert_rank=ranks.pop() if ranks else 0)
    return AdapterFile(folder, recipe, experts, header.metadata.get(_FINGERPRINT, ""))


def _recipe(settings: dict[str, Any], paths: tuple[str, ...], folder: Path) -> LoraRecipe:
    try:
        return LoraRecipe(
            rank=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            targets=paths,
            dropout=float(settings.get("lora_dropout") or 0.0),
            dora=bool(settings.get("use_dora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{_CONFIG} cannot be read: {error!r}", str(folder)) from None
    except ConfigError as error:
        raise ConfigError(error.what, str(folder), error.fix) from None
