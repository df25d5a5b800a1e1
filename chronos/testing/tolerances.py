"""How far two ways to the same number may lie apart: one table, float32 unless a name says else.

Bounds are of the largest difference, relative to the largest magnitude of what is compared (at
least 1). They cover another order of summation, nothing more; each is five to ten times the largest
difference seen on a CPU. Bit-exactness (streamed against resident) is not a matter of tolerance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TOLERANCE = {
    "logits": 2e-5,
    "probabilities": 1e-5,
    "rotations": 5e-5,  # float32 angles at position 1,000
    "losses": 2e-6,
    "gradients": 5e-6,
    "finite differences": 1e-6,  # of float64 losses against float32 gradients
    "weights after ten updates": 5e-6,
    "loss curve": 5e-6,  # over ten updates
}


def assert_close(found: npt.ArrayLike, expected: npt.ArrayLike, what: str, label: str = "") -> None:
    """Raises AssertionError where the two differ by more than the table allows for `what`."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    bound = TOLERANCE[what] * max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=label or what)
