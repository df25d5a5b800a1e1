"""The training step of each backend against the shipped suite."""

from __future__ import annotations

from chronos.testing.train_tests import TrainTests


class TestTrain(TrainTests):
    pass
