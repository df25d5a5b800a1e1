"""Names of models: `demo`, which ships with the package, a folder, or an id of the model hub."""

from __future__ import annotations

from pathlib import Path

from chronos.common.disk import foreign
from chronos.common.errors import UsageError

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "demo"


def resolve_model(model: str | Path, *, fetch: bool = False, bars: bool = False) -> Path:
    """The folder MODEL stands for. A folder called `demo` beside you needs `./demo`.

    A folder wins over an id of the hub; with `fetch` an id's files are downloaded, otherwise they
    must be in the hub's cache. bars: a download may be drawn. Raises UsageError where there is no
    such folder or it holds no config.json, CorruptFileError where it holds a known format that is
    not ours (GGUF, an adapter), and what `chronos.run.hub.snapshot` does.
    """
    folder = _DEMO_FOLDER if str(model) == DEMO else Path(model).expanduser()
    if not folder.exists() and isinstance(model, str):
        from chronos.run import hub

        if hub.is_model_id(model):
            folder = hub.snapshot(model, fetch=fetch, bars=bars)
    has_config = (folder / "config.json").is_file()
    if folder.exists() and not has_config and (error := foreign.by_name(folder)):
        raise error
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"model {str(model)!r} {what}",
            str(folder),
            f"name a folder with a config.json, or {DEMO!r} for the model that ships with Chronos",
        )
    if not has_config:
        raise UsageError(
            f"{str(model)!r} is not a model folder",
            f"{folder} has no config.json",
            f"did you mean {trained}?"
            if (trained := folder / "model").joinpath("config.json").is_file()
            else "name the folder that holds config.json and the weights",
        )
    return folder
