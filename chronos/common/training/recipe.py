"""Training recipes: a TOML file checked into frozen dataclasses before anything is allocated.

Every stage has [loss], [data], [cadence], [optimizer] and one section of its own. One that begins
from nothing has [model] (ModelConfig fields) and [tokenizer]; one that goes on with a model has
`path` in [model], with a longer context if so wished, and [anchor]. Unknown names are refused with
the nearest valid one. Knows no stage: a stage hands in the dataclass of its section.
docs/recipes.md is made from the text below each field. Units: tokens, steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from chronos.common.errors import ConfigError, UsageError
from chronos.common.model.config import LISTS, LossWeights, ModelConfig, RopeScaling
from chronos.common.training.lora import LoraRecipe

_T = TypeVar("_T")
S = TypeVar("S", bound="StageRecipe")
STDLIB = "stdlib"  # as data: the Python standard library's own sources
# Its documented functions: a docstring asks and the code answers; the code beside damaged code; the
# question alone.
CHATS, PAIRS, PROMPTS = "stdlib-chats", "stdlib-pairs", "stdlib-prompts"
BUILT_IN = (STDLIB, CHATS, PAIRS, PROMPTS)
DEMO = "demo"
OPTIMIZERS = ("adamw", "muon", "adafactor")
# Of a model that a stage goes on with: its new context, and what it was trained for.
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
_SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "recipes"
_ACCEPTED = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


@dataclass(frozen=True)
class DataRecipe:
    """What to train on, and what of it is held out."""

    path: str = STDLIB
    """A file or a folder, or `stdlib`: the Python standard library's own sources. Its documented
    functions as rows: `stdlib-chats`, `stdlib-pairs`, `stdlib-prompts`."""
    validation_share: float = 0.02
    """Share of the documents that is held out, chosen by a hash of each."""
    skip_bad: int = 0
    """Bad rows to pass over; one more is an error."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ConfigError("data.validation_share must be in [0, 1)")
        if self.skip_bad < 0:
            raise ConfigError("data.skip_bad must be at least 0")


@dataclass(frozen=True)
class TokenizerRecipe:
    """A tokenizer trained on the data, unless `path` names a folder that has one."""

    vocab_size: int = 2048
    """Tokens of the one that is trained."""
    path: str = ""
    """A folder with a tokenizer.json to use instead; empty: train one."""


@dataclass(frozen=True)
class CadenceRecipe:
    """How long a run goes on, and when it logs, evaluates and saves. In steps; free on resume."""

    steps: int = 1000
    """Updates of the whole run."""
    log_every: int = 10
    """Updates between two lines of the log."""
    eval_every: int = 200
    """Updates between two evaluations of what is held out."""
    eval_batches: int = 16
    """Batches of an evaluation, at most."""
    save_every: int = 200
    """Updates between two checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay."""
    max_skipped: int = 10
    """Updates in a row that are not finite before the run ends."""

    def __post_init__(self) -> None:
        at_least_one("cadence", self, *vars(self))


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer, its rate with warm-up and cosine decay, and how an update is computed."""

    name: str = "adamw"
    """`adamw`; `muon`, which moves hidden matrices, beside AdamW for the rest; `adafactor`, which
    keeps least. All are the framework's own and take AdamW's rates."""
    learning_rate: float = 1e-3
    """The highest rate, after warm-up."""
    min_learning_rate: float = 1e-4
    """The rate at the last step; a cosine leads there."""
    warmup_steps: int = 100
    """Updates in which the rate rises."""
    weight_decay: float = 0.1
    """Of matrices; vectors and embeddings have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    compute_dtype: str = "float32"
    """What matrices are multiplied in. `bfloat16` (torch; for GPUs): the weights that are trained,
    the sums and the losses stay in float32 (1710.03740), what is kept for the gradients halves."""
    gradient_checkpointing: bool = False
    """Keep of each layer its input alone and compute it again in the backward pass (1604.06174):
    the same gradients, less memory, one forward pass more. Free on resume."""
    seed: int = 0
    """Of first weights, order of rows, and dropout."""
    threads: int = 0
    """Threads of a product on a CPU (torch); 0: as many as torch takes. Free on resume."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, not {self.name!r}"
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"optimizer.compute_dtype must be float32 or bfloat16, not {self.compute_dtype!r}"
            )
        for name in ("warmup_steps", "weight_decay", "seed", "threads"):
            if not getattr(self, name) >= 0:  # NaN is not
                raise ConfigError(f"optimizer.{name} must be at least 0")
        if self.seed >= 1 << 40:  # times a million and a step, it stays within 64 bits
            raise ConfigError("optimizer.seed must be below 2**40")
        if not 0 < self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                "optimizer.min_learning_rate must be above 0 and at most learning_rate"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.clip > 0):
            raise ConfigError("optimizer.beta1 and beta2 must be in [0, 1), clip above 0")


@dataclass(frozen=True)
class AnchorRecipe:
    """How the routers are kept near those the stage began with."""

    weight: float = 0.0
    """Of KL(router || frozen router) in the loss, a mean over layers and tokens."""
    form: str = "gate"
    """What the frozen router sees: `gate`, the states of the model that is trained (a copy of its
    gates, no second pass), or `states`, those of the reference, for stages that have one."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError("anchor.weight must be at least 0")
        if self.form not in ("gate", "states"):
            raise ConfigError(f"anchor.form must be gate or states, not {self.form!r}")


class StageRecipe(Protocol):
    """A stage's own section: a frozen dataclass that says what it is called in a recipe.

    STARTS: whether it goes on with a model. DEFAULTS: of the other sections, by section and key.
    """

    SECTION: ClassVar[str]
    STARTS: ClassVar[bool]
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """A whole training run. The model's vocabulary size is the tokenizer's."""

    stage: S
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    cadence: CadenceRecipe = field(default_factory=CadenceRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    start: str = ""
    """The model a stage goes on with: a folder, or `demo`."""
    context: int = 0
    """Tokens of the context that it is given, longer than its own; 0: its own."""
    trained: int = 0
    """Tokens it was trained for, where its config names more; 0: what that names."""
    anchor: AnchorRecipe = field(default_factory=AnchorRecipe)
    lora: LoraRecipe | None = None
    """Adapters to train in place of the model's weights; None: these."""
    budget: str = ""
    """What the routed experts of a model with adapters may take in memory; "": all in the model."""
    folder: str = ""
    """Where the recipe lies: paths in it are looked for there first."""

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the weights a run ends with; compared on resume."""
        sections = dataclasses.asdict(self)
        others = ("tokenizer",) if self.stage.STARTS else ("start", "anchor", "lora")
        for name in ("folder", "budget", *others):
            del sections[name]
        if not self.context:  # a run of before the key was there had none
            del sections["context"], sections["trained"]
        return sections | {self.stage.SECTION: sections.pop("stage")}


def shipped() -> dict[str, Path]:
    """The recipes that come with Chronos, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def load_recipe(path: str | Path, stage: type[S]) -> Recipe[S]:
    """Read and check a recipe of a stage: a TOML file, or the name of one that ships.

    Relative paths in it are looked for beside it first, then where the process stands. Raises
    ConfigError naming the file and the key.
    """
    file, text = read_recipe(path)
    return parse_recipe(toml_of(text, file), stage, file)


def read_recipe(path: str | Path) -> tuple[Path, str]:
    """The file of a recipe, or of one that ships, and its text. Raises ConfigError, and UsageError
    where there is none."""
    file = Path(path)
    if not file.is_file():
        file = shipped().get(str(path), file)
    try:
        return file, file.read_text("utf-8")
    except FileNotFoundError:
        fix = f"name a TOML file, or one that ships with Chronos: {', '.join(shipped())}"
        raise UsageError("no such recipe", str(path), fix) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"recipe cannot be read: {error}", str(path)) from None


def toml_of(text: str, file: Path) -> dict[str, Any]:
    """The sections of a recipe as they stand. Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"recipe cannot be read: {error}", str(file)) from None


def parse_recipe(data: dict[str, Any], stage: type[S], file: Path) -> Recipe[S]:
    """The sections of a recipe, checked; `file` is where they stand. Raises ConfigError."""
    try:
        return _beside(file.parent, _recipe(data, stage))
    except ConfigError as error:
        raise ConfigError(error.what, error.where or str(file), error.fix) from None


def _beside(folder: Path, recipe: Recipe[S]) -> Recipe[S]:
    """The recipe with its paths as this process opens them."""

    def found(path: str) -> str:
        special = path in ("", DEMO, *BUILT_IN) or Path(path).is_absolute()
        return str(folder / path) if not special and (folder / path).exists() else path

    data = dataclasses.replace(recipe.data, path=found(recipe.data.path))
    tokenizer = dataclasses.replace(recipe.tokenizer, path=found(recipe.tokenizer.path))
    start = found(recipe.start)
    return dataclasses.replace(
        recipe, data=data, tokenizer=tokenizer, start=start, folder=str(folder)
    )


def by_section(data: dict[str, Any], stage: type[StageRecipe]) -> dict[str, Any]:
    """The sections with the keys of [train], where recipes once kept them all, in their own."""
    sections = {name: values for name, values in data.items() if name != "train"}
    kinds: tuple[type[Any], ...] = (CadenceRecipe, OptimizerRecipe, stage)
    homes = {
        key.name: name
        for name, kind in zip(("cadence", "optimizer", stage.SECTION), kinds, strict=True)
        for key in dataclasses.fields(kind)
    }
    old = _table(data, "train")
    _known(old, set(homes), "key in [train]")
    for key, value in old.items():
        home = _table(sections, homes[key])
        if key in home:
            raise ConfigError(f"{key} is in [train] and in [{homes[key]}]", "", "give it once")
        sections[homes[key]] = home | {key: value}
    return sections


def at_least_one(section: str, values: Any, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is below 1."""
    for name in names:
        if getattr(values, name) < 1:
            raise ConfigError(f"{section}.{name} must be at least 1")


def _recipe(data: dict[str, Any], stage: type[S]) -> Recipe[S]:
    data = by_section(data, stage)
    names = {"model", "data", "tokenizer", "loss", "cadence", "optimizer", stage.SECTION}
    goes_on = stage.STARTS or "path" in _table(data, "model")
    if goes_on:
        names -= {"tokenizer"}
    _known(data, names | {"anchor", "lora"} if stage.STARTS else names, "section")
    for section, values in stage.DEFAULTS.items():
        data[section] = values | _table(data, section)
    tokenizer = section_of(TokenizerRecipe, data, "tokenizer")
    model, start, lengths = dict(_table(data, "model")), "", (0, 0)
    if goes_on:
        _known(model, {"path", *_LENGTHS}, "key in [model]")
        start = str(model.pop("path", ""))
        lengths = _lengths([model.pop(name, 0) for name in _LENGTHS])
    elif "rope_scaling" in model:
        model["rope_scaling"] = section_of(RopeScaling, model, "rope_scaling")
    for name in LISTS:
        if isinstance(model.get(name), list):
            model[name] = tuple(model[name])
    model.setdefault("vocab_size", tokenizer.vocab_size)
    model["loss_weights"] = section_of(LossWeights, data, "loss")
    return Recipe(
        stage=section_of(stage, data, stage.SECTION),
        model=section_of(ModelConfig, {"model": model}, "model"),
        data=section_of(DataRecipe, data, "data"),
        tokenizer=tokenizer,
        cadence=section_of(CadenceRecipe, data, "cadence"),
        optimizer=section_of(OptimizerRecipe, data, "optimizer"),
        start=start,
        context=lengths[0],
        trained=lengths[1],
        anchor=section_of(AnchorRecipe, data, "anchor"),
        lora=section_of(LoraRecipe, data, "lora") if "lora" in data else None,
    )


def _lengths(values: list[Any]) -> tuple[int, int]:
    for name, value in zip(_LENGTHS, values, strict=True):
        if type(value) is not int or value < 0:
            raise ConfigError(f"model.{name} must be a number of tokens, not {value!r}")
    context, trained = values
    if trained and not context:
        what = f"model.{_LENGTHS[1]} is of a context that grows"
        raise ConfigError(what, "", f"give {_LENGTHS[0]}")
    return context, trained


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    values = data.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"[{name}] must be a table")
    return values


def section_of(kind: type[_T], data: dict[str, Any], name: str) -> _T:
    """A section as its dataclass. Raises ConfigError for unknown keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = _table(data, name)
    _known(values, set(fields), f"key in [{name}]")
    for key, value in values.items():
        wanted = str(fields[key].type)
        if wanted.startswith("list["):
            fits = type(value) is list and all(
                type(item) in _ACCEPTED[wanted[5:-1]] for item in value
            )
        else:
            fits = wanted not in _ACCEPTED or type(value) in _ACCEPTED[wanted]
        if not fits:
            raise ConfigError(f"{name}.{key} must be of type {wanted}, not {value!r}")
    return kind(**values)


def _known(values: dict[str, Any], names: set[str], what: str) -> None:
    for key in values.keys() - names:
        near = difflib.get_close_matches(key, names, n=1)
        raise ConfigError(
            f"unknown {what}: {key!r}", "", f"did you mean {near[0]!r}?" if near else ""
        )
