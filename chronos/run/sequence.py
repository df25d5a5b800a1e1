"""One sequence of a session by hand: a prompt, then token by token, with logits and routing.

For measuring, recording and tests; replies with stop rules and numbers are `batch`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chronos.common.text.sampling import SamplingParams, Work, pieces

if TYPE_CHECKING:
    import numpy as np

    from chronos.backends.protocol import Session


class OneSequence:
    """record: keep the routing. route_override: layer -> (ids, weights) [T, K], in place of the
    gates' choice. Errors of a pass are raised; `reset` before anything else then."""

    def __init__(
        self,
        session: Session,
        *,
        record: bool = False,
        route_override: Callable[[int], tuple[Any, Any]] | None = None,
        seq: int = 0,
    ) -> None:
        self.session, self.seq, self._record = session, seq, record
        self._override = None
        if route_override is not None:
            self._override = lambda _, layer: route_override(layer)
        self.reset()

    @property
    def position(self) -> int:
        return self.session.position(self.seq)

    def reset(self) -> None:
        """Forget the tokens; the experts stay where they are."""
        self.session.drop(self.seq)

    def prefill(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams,
        prompt: int = 0,
        *,
        advance: Callable[[int], None] = lambda count: None,
    ) -> int:
        """Append a prompt and sample the token after it; -1 where the logits are not finite.

        prompt: tokens of the sequence once its whole prompt is in, where `tokens` are a part.
        advance: called with the tokens of each piece that is in.
        """
        token, whole = None, max(prompt, self.position + len(tokens))
        for work in pieces(self.seq, tokens, sampling):
            token = self._run(replace(work, prompt=whole))
            advance(len(work.tokens))
        assert token is not None
        return token

    def decode(self, token: int, sampling: SamplingParams) -> int:
        """Append one token and sample the next."""
        out = self._run(Work(self.seq, [token], sampling))
        assert out is not None
        return out

    def logits(self) -> np.ndarray:
        """float32 [V] of the last position; a copy."""
        return self.session.logits(self.seq)

    def routing(self) -> Sequence[tuple[Any, Any]]:
        """(ids_TLK, weights_TLK) recorded since the last call, in order of the tokens."""
        return self.session.routing(self.seq)

    def _run(self, work: Work) -> int | None:
        [out] = self.session.run([work], record=self._record, route_override=self._override)
        if isinstance(out, Exception):
            raise out
        return out
