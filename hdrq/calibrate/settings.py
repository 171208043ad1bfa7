"""How a run is carried out, whichever model is quantized and by which method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hdrq.calibrate.cache import check_cache
from hdrq.calibrate.progress import Step, bars
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.checkpoint.workdir import Workdir
from hdrq.prepare.offload import Offload


@dataclass(frozen=True)
class RunSettings:
    """What the stages of a run share: where they keep things, whom they tell, and who takes part.

    Args:
        seed: of the elements that ranges are searched on.
        cache, cache_bytes: of :class:`hdrq.calibrate.cache.Cache`.
        progress: is told of every step that is noted; True for bars or lines, False and None for nobody.
        workdir: the work folder; None for none.
        checkpoint_every: iterations between two states that are kept inside a unit; 0 for none.
        ranks: share the calibration samples.
        offload: where the weights lie that a run makes; None for memory.
    """

    seed: int = 0
    cache: str = "auto"
    cache_bytes: int | None = None
    progress: Callable[[Step], None] | bool | None = None
    workdir: Workdir | None = None
    checkpoint_every: int = 0
    ranks: Ranks = ALONE
    offload: Offload | None = None

    def __post_init__(self) -> None:
        check_cache(self.cache, self.cache_bytes)

    @contextmanager
    def shown(self) -> Iterator[RunSettings]:
        """The settings with a callable or None for ``progress``; where ranks share a run the first alone is heard."""
        if self.progress is True and self.ranks.first:
            with bars() as show:
                yield replace(self, progress=show)
        else:
            yield replace(self, progress=(self.progress or None) if self.ranks.first else None)


DEFAULT = RunSettings()
