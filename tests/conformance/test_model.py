"""The model of each backend against the shipped suite."""

from __future__ import annotations

from chronos.testing.model_tests import ModelTests


class TestModel(ModelTests):
    pass
