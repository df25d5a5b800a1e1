"""Models by their id on the Hugging Face hub: the snapshot in its cache, or a download into it.

huggingface_hub does the work, so its cache, its tokens and HF_HUB_OFFLINE mean here what they mean
everywhere. Only files that Chronos reads are fetched: no pickles, no other frameworks' weights.
Nothing is imported or asked before an id is named. Not covered: revisions other than the main one.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from chronos.common.errors import DiskFullError, MissingBackendError, ResourceError, UsageError
from chronos.common.layout.pack import SIDE_FILES

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PATTERNS = (
    "*.safetensors", "model.safetensors.index.json", "experts/*", "LICENSE*",
    "adapter_config.json", *SIDE_FILES,
)  # fmt: skip
# The same weights in Mistral's own format; what lies in folders of its own (originals, adapters).
IGNORED = ("consolidated*.safetensors", "*/*.safetensors")


def is_model_id(text: str) -> bool:
    """Whether `text` could be `organisation/name`; whether a folder is called so is not asked."""
    return bool(_ID.fullmatch(text)) and ".." not in text


def snapshot(model_id: str, *, fetch: bool, bars: bool = False) -> Path:
    """The folder of a model's files in the hub's cache; with `fetch` they are brought up to date.

    Without a network, or with HF_HUB_OFFLINE, what is in the cache serves. bars: the library may
    draw how far it is. Raises UsageError where nothing is there or the hub knows no such id,
    ResourceError where it refuses or the download breaks off, DiskFullError, and
    MissingBackendError without the library.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise MissingBackendError(
            f"there is no folder {model_id!r}, and models of the hub need huggingface_hub",
            "",
            "pip install 'chronos-moe[guests]'",
        ) from None
    if fetch and not bars:
        disable_progress_bars()
    try:
        found = snapshot_download(
            model_id,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(IGNORED),
            local_files_only=not fetch,
        )
    except LocalEntryNotFoundError as error:
        name = model_id.partition("/")[2]
        raise UsageError(
            f"there is no folder {model_id!r}, and no model of that id in the hub's cache",
            _first_line(error) if fetch else "",
            "go online (and unset HF_HUB_OFFLINE), or name a folder"
            if fetch
            else f"fetch and pack it: chronos pack {model_id} -o {name}-packed",
        ) from None
    except (HfHubHTTPError, ValueError) as error:
        absent = type(error) is RepositoryNotFoundError  # a gated one is a subclass
        raise (UsageError if absent else ResourceError)(
            f"the hub did not give {model_id!r}: {_first_line(error)}",
            "",
            "is it spelled so, and may you read it? (`hf auth login`)",
        ) from None
    except Exception as error:  # of the disk, or of whichever HTTP client the library has
        raise _broken_off(model_id, error) from error
    return Path(found)


def _broken_off(model_id: str, error: Exception) -> ResourceError:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"no room for the files of {model_id!r}: {_first_line(error)}",
            "",
            "free some, or let HF_HOME name a folder on another disk",
        )
    return ResourceError(
        f"the download of {model_id!r} broke off: {_first_line(error)}",
        "",
        "the same command again goes on with the files that are missing",
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
