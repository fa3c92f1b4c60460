"""In which numbers codes are kept for the backward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from cimjax.spec import CodeRange


def smallest_type(code_range: CodeRange) -> Any:
    """The smallest of the types that hold all codes, and 0; the code of a sign is +1 or -1."""
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= min(code_range.q_min, 0) and code_range.q_max <= np.iinfo(dtype).max:
            return dtype
    return np.float32
