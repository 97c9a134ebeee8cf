"""One run on several processes, started by `accelerate launch` or torchrun: who does what, and who waits for whom.

Nothing is exchanged but the news that a process has got so far. One that fails exits with a status other than 0, on which
the launcher ends the others.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

_PATIENCE = datetime.timedelta(days=30)  # shares take unequal times, and the default ends a run after half an hour


class Processes:
    """This process among those of a run; alone where no launcher says otherwise."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._state: Any = None
        if self.count > 1:
            from accelerate import PartialState

            # gloo on any machine: there is nothing to send, and NCCL refuses two processes on one GPU.
            self._state = PartialState(cpu=True, timeout=_PATIENCE)

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks and merges."""
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """The device asked for; of several GPUs this process's own."""
        import torch

        if self.count == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def share(self, count: int) -> range:
        """The numbers of this process's samples: every `count`-th."""
        return range(self.rank, count, self.count)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes in first, the others when it is out."""
        if self._state is None:
            yield
        else:
            with self._state.main_process_first():
                yield

    def end(self) -> None:
        """Takes leave of the others; call it when all is done."""
        if self._state is not None:
            self._state.destroy_process_group()
