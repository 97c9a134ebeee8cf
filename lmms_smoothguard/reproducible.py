"""Sums that come out the same on any number of threads."""

from __future__ import annotations

import os


def reproducible_sums() -> None:
    """Matrix products on a CPU that do not depend on the number of threads, unless the user has set it otherwise.

    torchrun gives every process one thread. MKL splits its sums by threads, and one last bit flips the sign of a gradient,
    hence a pixel. It reads this variable at its first product.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
