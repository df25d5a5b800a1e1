"""Choosing a token where the logits are: penalties and rules, filters, the draw.

`chronos.common.text.sampling` says what they mean. Not known here: sequences, seeds, masks.

Shape legend: V vocabulary, N tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chronos.common.text.sampling import SamplingParams, adjust_logits


def adjust(
    logits_V: Tensor, ids: Sequence[int], prompt_tokens: int, params: SamplingParams
) -> Tensor:
    """`adjust_logits`, by way of the host; the logits as they are where nothing adjusts them."""
    if not params.adjusts:
        return logits_V
    host_V = adjust_logits(logits_V.float().cpu().numpy(), ids, prompt_tokens, params)
    return torch.from_numpy(host_V).to(logits_V.device)


def draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """`common.text.sampling.draw` on the device: the token a uniform number in [0, 1) selects.

    Equal logits at the edge of top-k may be cut in another order. MPS has no float64.
    """
    if params.greedy:
        return logits_V.argmax()
    wide = torch.float32 if logits_V.device.type == "mps" else torch.float64
    p_V = (logits_V.to(wide) / params.temperature).softmax(-1)
    if params.top_k or params.top_p < 1.0:  # sorting costs as much as a small layer
        p_N, ids_N = p_V.topk(min(params.top_k or len(p_V), len(p_V)))
        p_N = p_N / p_N.sum()
        stays_N = (p_N.cumsum(0) - p_N < params.top_p) & (p_N >= params.min_p * p_N[0])
        p_V = torch.zeros_like(p_V).scatter_(0, ids_N, p_N * stays_N)
    else:
        p_V = p_V * (p_V >= params.min_p * p_V.max())
    mass_V = p_V.cumsum(0)
    return torch.searchsorted(mass_V, uniform * mass_V[-1:], right=True)[0]
