"""Names of models: `demo` is the one that ships with the package; anything else is a folder."""

from __future__ import annotations

from pathlib import Path

from chronos.common.errors import UsageError

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).resolve().parent / "assets" / "demo"


def resolve_model(model: str | Path) -> Path:
    """The folder MODEL stands for. A folder called `demo` beside you needs `./demo`.

    Raises UsageError where there is no such folder or it holds no config.json.
    """
    folder = _DEMO_FOLDER if str(model) == DEMO else Path(model).expanduser()
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"model {str(model)!r} {what}",
            str(folder),
            f"name a folder with a config.json, or {DEMO!r} for the model that ships with Chronos",
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"{str(model)!r} is not a model folder", f"{folder} has no config.json")
    return folder
