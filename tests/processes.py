"""Two processes of one group, for tests of what ranks do together: each call runs a function on both."""

import os
import socket
import sys

import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 240  # seconds until a test fails where ranks wait for each other for ever


class Ended(Exception):
    """A process of the group is gone."""


class Pair:
    """Two processes in a gloo group. Functions are module-level ones, and take the group first."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port, sys.path), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function, *args, **options):
        """What the function returned, or raised, on each rank."""
        for pipe in self.pipes:
            pipe.send((function, args, options))
        return [self._answer(pipe) for pipe in self.pipes]

    def _answer(self, pipe):
        try:
            assert pipe.poll(PATIENCE), "ranks wait for each other"
            return pipe.recv()
        except (EOFError, ConnectionError):
            return Ended()

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe, rank, port, path):
    sys.path[:] = path
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            os._exit(0)  # the other may be gone
        try:
            answer = function(dist.group.WORLD, *args, **options)
        except Exception as error:
            answer = error.with_traceback(None)
        try:
            pipe.send(answer)
        except Exception as error:  # it cannot be pickled
            pipe.send(RuntimeError(f"{type(answer).__name__}: {answer} ({error})"))
