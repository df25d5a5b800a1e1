"""CHRONOS_PLAIN: a switch for whoever looks for the cause of a wrong token.

Set, every step runs as its model is written: no CUDA graphs, no recorded steps, no packed weights,
no products but torch's own. A token that is then another one points at one of these. Read here and
nowhere else, when a model is loaded. It knows nothing of what it turns off.
"""

from __future__ import annotations

import os

from chronos.common.errors import UsageError

PLAIN = "CHRONOS_PLAIN"
_WORDS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def plain() -> bool:
    """Returns whether the environment asks for plain steps. Raises UsageError for other words."""
    word = os.environ.get(PLAIN, "")
    if word.lower() not in _WORDS:
        raise UsageError(f"{PLAIN} cannot be {word!r}", "the environment", f"set {PLAIN}=1 or 0")
    return _WORDS[word.lower()]
