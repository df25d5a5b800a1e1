"""Rewards that ship, and the process they run in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chronos.common.training.losses import advantages
from chronos.train import rewards
from chronos.train.judge import Judge, RewardError

OWN = """
import sys, time
def lengths(completions, **columns):
    print("noise on stdout")
    return [len(text) for text in completions]
def odd(completions, **columns):
    return [None, float("nan"), float("inf"), 1.5][: len(completions)]
def short(completions, **columns):
    return [1.0]
def raises(completions, **columns):
    raise KeyError("what")
def hangs(completions, **columns):
    time.sleep(60)
def dies(completions, **columns):
    import os; os._exit(3)
class Scorer:
    def get_score(self, messages):
        return float(len(messages[-1]["content"]))
"""


@pytest.fixture
def judges(tmp_path: Path) -> Iterator[dict[str, Judge]]:
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    made: dict[str, Judge] = {}

    class Made(dict):  # type: ignore[type-arg]
        def __missing__(self, names: str) -> Judge:
            functions = [f"own.py:{name}" for name in names.split()]
            timeout = 2.0 if "hangs" in names else 30.0
            made[names] = Judge(functions, timeout, tmp_path)
            return made[names]

    yield Made()
    for judge in made.values():
        judge.close()


def ask(judge: Judge, texts: list[str]) -> np.ndarray:
    return judge(["p"] * len(texts), texts, [[1]] * len(texts), {})


def test_rewards_come_from_a_process(judges: dict[str, Judge]) -> None:
    judge = judges["lengths odd Scorer"]
    assert judge.labels == ["lengths", "odd", "Scorer"]
    for _ in range(2):
        found = ask(judge, ["a", "bb", "", "dddd"])
        assert found[0].tolist() == [1, 2, 0, 4] == found[2].tolist()
        assert np.isnan(found[1]).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "it returned 1 rewards for 2 completions"),
        ("raises", "KeyError: 'what'"),
        ("hangs", "gave no answer within 2 s"),
        ("dies", "died"),
    ],
)
def test_a_reward_that_fails_is_named(judges: dict[str, Judge], name: str, said: str) -> None:
    judge = judges[f"{name}"]
    with pytest.raises(RewardError, match=said) as error:
        ask(judge, ["a", "b"])
    assert name in error.value.where


def test_a_reward_that_is_not_there(tmp_path: Path) -> None:
    for name, said in (("no_such_module:f", "ModuleNotFoundError"), ("none.py:f", "none.py")):
        judge = Judge([name], 30, tmp_path)
        with pytest.raises(RewardError, match=said):
            judge.start()


def test_what_ships() -> None:
    chat = [{"role": "assistant", "content": "```python\ndef f():\n    return 1\n```\nDone."}]
    texts = ["def f(:", "x = 1", chat, "", "just words here", "word"]
    assert rewards.parses_as_python(texts) == [0, 1, 1, 0, 0, 0]
    assert rewards.matches(["abc", "xyz"], pattern=["b", "b"]) == [1, 0]
    assert rewards.length([[1] * 4, [1] * 6, [], [1] * 9], target=[4, 4, 4, 4]) == [1, 0.5, 0, 0]
    answers = ["so 1,200 apples", r"thus \boxed{7}", "Paris", "Rome", "no number"]
    wanted = [1200, "7", "paris", "Paris", 3]
    assert rewards.right_answer(answers, answer=wanted) == [1, 1, 1, 0, 0]


def test_advantages() -> None:
    none = math.nan
    found = advantages(np.array([[1.0, 3.0, none], [2.0, 2.0, 2.0], [none, none, 5.0]]))
    assert found[0] == pytest.approx([-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0])
    assert found[1:].tolist() == [[0, 0, 0], [0, 0, 0]]
    plain = advantages(np.array([[1.0, 3.0]]), scale="none")
    assert plain[0] == pytest.approx([-1, 1])
    batch = advantages(np.array([[0.0, 2.0], [10.0, 10.0]]), scale="batch")
    assert batch[0] == pytest.approx([-1 / 5.2599, 1 / 5.2599], rel=1e-3)


def test_an_interrupt_of_the_run_does_not_end_its_rewards(judges: dict[str, Judge]) -> None:
    """Ctrl-C reaches the run's whole process group; the step it finishes still needs rewards."""
    judge = judges["lengths"]
    judge.start()
    assert judge._process is not None
    assert os.getpgid(judge._process.pid) != os.getpgid(0)
