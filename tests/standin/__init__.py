"""A package with the quantizers of released codes, written out from their signatures and semantics."""

from standin import forks, loop, modules, quantizers, states  # noqa: F401
