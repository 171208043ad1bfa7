"""Do all backends give the same bits? Random cases, and the checker that runs them."""

from hdrq.parity.checker import check, repeat

__all__ = ["check", "repeat"]
