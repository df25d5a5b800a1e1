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


def test_the_public_face_is_lazy_and_complete() -> None:
    import chronos

    for name in chronos.__all__:
        assert getattr(chronos, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        chronos.nothing  # noqa: B018
