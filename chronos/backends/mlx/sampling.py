"""Choosing a token where the logits are: penalties and rules, filters, the draw.

`chronos.common.text.sampling` says what they mean. Not known here: sequences, seeds, masks.

Shape legend: V vocabulary, N tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from chronos.common.text.sampling import SamplingParams, adjust_logits


def adjust(
    logits_V: mx.array, ids: Sequence[int], prompt_tokens: int, params: SamplingParams
) -> mx.array:
    """`adjust_logits`, by way of the host; the logits as they are where nothing adjusts them."""
    if not params.adjusts:
        return logits_V
    host_V = np.array(logits_V.astype(mx.float32))
    return mx.array(adjust_logits(host_V, ids, prompt_tokens, params))


def draw(logits_V: mx.array, params: SamplingParams, uniform: float) -> mx.array:
    """`common.text.sampling.draw` on the device: the token a uniform number in [0, 1) selects.

    Only a CPU has float64.
    """
    if params.greedy:
        return logits_V.argmax()
    wide = mx.float64 if mx.default_device() == mx.cpu else mx.float32
    p_V = mx.softmax(logits_V.astype(wide) / params.temperature, axis=-1)
    if params.top_k or params.top_p < 1.0:  # sorting costs as much as a small layer
        ids_N = mx.argsort(-p_V)[: params.top_k or len(p_V)]
        p_N = p_V[ids_N]
        p_N = p_N / p_N.sum()
        stays_N = (mx.cumsum(p_N) - p_N < params.top_p) & (p_N >= params.min_p * p_N[0])
        p_V = mx.put_along_axis(mx.zeros_like(p_V), ids_N, p_N * stays_N, axis=0)
    else:
        p_V = p_V * (p_V >= params.min_p * p_V.max())
    mass_V = mx.cumsum(p_V)
    return (mass_V <= uniform * mass_V[-1]).sum()
