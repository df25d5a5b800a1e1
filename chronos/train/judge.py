"""The rewards of a run, in a process of their own: one that hangs is named, not waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chronos.common.errors import ChronosError


class RewardError(ChronosError):
    """A reward function raised, hung, or returned the wrong number of rewards."""


class Judge:
    """Functions by name; asking starts their process. Close it when the run is over."""

    def __init__(self, functions: Sequence[str], timeout_s: float, folder: Path) -> None:
        """functions: as `judge_child` resolves them. folder: that of the recipe, which paths are
        looked for in first."""
        self.names = [_found(name, folder) for name in functions]
        self.labels = [name.rpartition(":")[2] or Path(name).name for name in functions]
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> npt.NDArray[np.float64]:
        """Rewards [functions, completions]; NaN where a function gave None, NaN or an infinity.

        Raises RewardError naming the function that raised, hung or returned too few or too many.
        """
        request = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "columns": dict(columns),
        }
        answer = self._exchange(json.dumps(request, default=str) + "\n")
        rewards = np.array(answer["scores"], np.float64)  # null becomes NaN
        return rewards.reshape(len(self.names), len(completions))

    def start(self) -> None:
        """Import the functions. Raises RewardError naming one that is not there."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chronos.train.judge_child", *self.names],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # One thread: the run itself computes while a reward model does.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                # Ctrl-C is the run's, which still needs the rewards of the step it finishes.
                process_group=0,
            )
            self._exchange("")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, line: str) -> dict[str, Any]:
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        hung = threading.Event()

        def end() -> None:
            hung.set()
            process.kill()

        watch = threading.Timer(self._timeout_s, end)
        watch.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            text = process.stdout.readline()
        except BrokenPipeError:
            text = ""
        except BaseException:  # an interrupt would leave the answer for the next request
            self.close()
            raise
        finally:
            watch.cancel()
        if not text:
            self.close()
            said = f"gave no answer within {self._timeout_s:g} s" if hung.is_set() else "died"
            raise RewardError(
                f"the process of the rewards {said}",
                ", ".join(self.labels),
                "look at what it printed, or raise grpo.reward_timeout",
            )
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            self.close()
            raise RewardError(
                f"a reward failed: {answer['error']}", answer["function"], "mend the function"
            )
        return answer


def _found(name: str, folder: Path) -> str:
    """A path as this process opens it; other names as they are."""
    place, colon, attribute = name.rpartition(":")
    path = place if place.endswith(".py") else name
    if (folder / path).exists():
        path = str((folder / path).resolve())
    return f"{path}:{attribute}" if colon and place.endswith(".py") else path
