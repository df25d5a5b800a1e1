"""A plugin of vLLM: packed guests under its scheduler and cache, their experts from our store.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); the model's
class is imported when one is asked for. How it is served: docs/vllm.md.
"""

from __future__ import annotations

ARCHITECTURE = "ChronosGuestForCausalLM"  # what --hf-overrides names


def register() -> None:
    """Tell vLLM's registry of models where ours is."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:ChronosGuest")
