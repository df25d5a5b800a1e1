"""Shell completion, in a bash of its own: installed, sourced, asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BASH = shutil.which("bash")
ASK = """
source ~/.bashrc
ask() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
  _chronos_completion chronos; echo "${COMPREPLY[*]}"
}
ask chronos ge
ask chronos generate demo --bud
ask chronos bench re
"""


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes_commands_and_flags(tmp_path: Path, command: list[str]) -> None:
    program = tmp_path / "bin" / "chronos"
    program.parent.mkdir()
    program.write_text(f'#!{BASH}\nexec {" ".join(command)} "$@"\n', "utf-8")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path}

    def bash(script: str) -> list[str]:
        done = subprocess.run(
            [str(BASH), "--norc", "-c", script], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    # Two commands in one script: else bash becomes the last one, and no shell is left to be found.
    assert "bash completion installed" in bash("chronos --install-completion; exit $?")[0]
    assert bash(ASK) == ["generate", "--budget", "replay"]
