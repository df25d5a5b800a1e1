"""One root error class; every message says what happened, where, and how to fix it.

`str(error)` is one line each for the parts that are known. `exit_code` is what the command line
returns for it (0 ok, 1 failure, 2 usage, 3 bad or corrupt input, 4 resource, 5 missing backend).
"""

from __future__ import annotations


class ChronosError(Exception):
    """Root of all errors Chronos raises on purpose."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.where, self.fix) if part)


class UsageError(ChronosError):
    """The caller asked for something that makes no sense (a flag, a name, a number)."""

    exit_code = 2


class ConfigError(ChronosError):
    """A config.json or recipe that cannot be used."""

    exit_code = 3


class DataError(ChronosError):
    """A training or evaluation file, row or trace that cannot be used."""

    exit_code = 3


class CorruptFileError(ChronosError):
    """A file whose bytes are not what its format or its checksum promises."""

    exit_code = 3


class CorruptClusterError(CorruptFileError):
    """A `.ctsr` file or its manifest that is damaged, foreign or incomplete."""


class ShapeMismatch(ChronosError):
    """A well-formed tensor whose dtype or shape is not what the config implies."""

    exit_code = 3


class ResourceError(ChronosError):
    """Not enough memory, disk, files or threads."""

    exit_code = 4


class BudgetError(ResourceError):
    """An expert budget below what the model needs to run at all."""


class DiskFullError(ResourceError):
    """A write that did not fit; nothing that existed before was lost."""


class MissingBackendError(ChronosError):
    """A backend or an optional package that was asked for and is not usable here."""

    exit_code = 5


class StoreError(ChronosError):
    """The expert store could not deliver an expert (a read failed, the store is closed)."""
