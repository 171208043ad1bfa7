"""The processes that torchrun starts of one command: their group, and who of them speaks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from hdrq.cli.terminal import status_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hdrq.calibrate.ranks import Ranks


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup | None]:
    """The group of all processes that torchrun started, while the block lasts; None where it started none or one.

    What several of them say is said once: warnings and errors that rank 0 has too are its alone.

    Args:
        device: ``"cuda"`` is another GPU for each process of a machine.
    """
    import torch
    import torch.distributed as dist

    from hdrq.calibrate.ranks import TOLD, Ranks

    if not (dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield None
        return
    rank, on_gpu = int(os.environ["RANK"]), torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with _warning_once(Ranks.of(dist.group.WORLD)):
            yield dist.group.WORLD
        dist.barrier()  # nobody takes the group down while another still exchanges
    except Exception as error:
        if getattr(error, TOLD, rank) != rank:
            raise typer.Exit(status_of(error)) from error
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def _warning_once(ranks: Ranks) -> Iterator[None]:
    """Rank 0 shows its warnings as they come, and at the end those of other ranks that it had not itself."""
    said: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message, *args, **kwargs) -> None:
            said.append(str(message))
            if ranks.first:
                show(message, *args, **kwargs)

        warnings.showwarning = note
        yield
        for rank, texts in enumerate(ranks.gather(said)):
            for text in dict.fromkeys(texts):
                if ranks.first and text not in said:
                    warnings.warn(f"on rank {rank}: {text}", stacklevel=3)
