"""What importing costs: no framework, and for the help page not even NumPy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "mlx", "numpy", "networkx", "tokenizers"}
CODE = """
import sys
import chronos
after_import = {name.partition(".")[0] for name in sys.modules}
from chronos.cli import main
codes = [main.run(["--help"]), main.run(["generate", "--help"]), main.run(["--version"])]
after_help = {name.partition(".")[0] for name in sys.modules}
print(codes, sorted(after_import & HEAVY), sorted(after_help & HEAVY), file=sys.stderr)
"""


def test_import_and_help_load_no_framework() -> None:
    code = f"HEAVY = {HEAVY}\n{CODE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[0, 0, 0] [] []"
    assert "generate" in done.stdout and "--budget" in done.stdout


# Windows has none of these; what only its own modules would show needs a machine of its own.
AS_ON_WINDOWS = """
import mmap, os, pkgutil, sys
sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp", "readline"))
for module, names in (
    (os, "preadv pread pwrite statvfs O_NOFOLLOW O_CLOEXEC O_NONBLOCK O_DIRECTORY O_DIRECT getuid"),
    (mmap, "MAP_PRIVATE MAP_ANONYMOUS MADV_HUGEPAGE MADV_DONTNEED"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
import chronos
rooms = ("cli", "common", "run", "measure", "train", "tune", "serve")
for found in pkgutil.walk_packages(chronos.__path__, "chronos."):
    if found.name.split(".")[1] in rooms and not found.name.endswith("template_child"):
        __import__(found.name)
from chronos.cli import main
print([main.run(["--help"]), main.run(["verify", "demo"])])
"""


def test_without_posix_everything_imports_and_files_are_refused() -> None:
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[0, 4]"], done.stderr
    assert "Windows" in done.stderr and "WSL 2" in done.stderr


def test_the_public_face_is_lazy_and_complete() -> None:
    import chronos

    for name in chronos.__all__:
        assert getattr(chronos, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        chronos.nothing  # noqa: B018
