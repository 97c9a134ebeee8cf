"""Peak memory above the loaded model: of each variant in a process of its own, as allocators keep what they once got."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from timing import subjects, variants
from timing.paired import median, synchronize

BENCH = Path(__file__).parent.parent / "bench.py"


def above_loaded(found: Sequence[dict[str, int]]) -> dict[str, float]:
    """The median of peak less loaded, in bytes, with its interval."""
    return median([one["peak"] - one["loaded"] for one in found]).to_dict()


def peak_of(variant: str, model: str, length: variants.Length, threads: int | None) -> dict[str, int]:
    """{"loaded", "peak"} in bytes of one answer of a fresh process. Raises CalledProcessError with what it wrote."""
    command = [sys.executable, str(BENCH), "memory", variant, model, str(length.tokens)]
    if threads is not None:
        command += ["--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def here(variant: str, model: str, length: variants.Length) -> dict[str, int]:
    """The same of this process: to be called once, first thing."""
    # What the first answer that needs k-means would import is no part of an answer.
    import sklearn.cluster
    import sklearn.feature_extraction.text  # noqa: F401

    subject = subjects.load(model)
    inputs = subjects.requests(subject, 1, subjects.CAPTIONS)[0]
    loaded = _resident()
    variants.answer(subject, inputs, variant, length)
    return {"loaded": loaded, "peak": max(loaded, _peak_resident())}


def on_device(device: str, answer: Callable[[], Any]) -> dict[str, int]:
    """{"loaded", "peak"} in bytes of what torch allocates on a CUDA device."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    loaded = torch.cuda.memory_allocated(device)
    answer()
    synchronize(device)
    return {"loaded": loaded, "peak": torch.cuda.max_memory_allocated(device)}


def _resident() -> int:
    """Bytes of this process in memory now; on Linux the peak is counted anew from here."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_resident()
    Path("/proc/self/clear_refs").write_text("5")
    return _kibibytes(status, "VmRSS")


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be that of the parent process if that was larger when it started this one
        return _kibibytes(status, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _kibibytes(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{status} has no {name}; expected a Linux kernel's")
    return 1024 * int(found[1])
