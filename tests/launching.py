"""Runs on several processes of this machine: how they are started, and which process is which."""

from __future__ import annotations

import socket
from pathlib import Path

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2"),
    "accelerate": (
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ),
}  # fmt: skip


def on_two(kind):
    """What comes between the interpreter and `-m MODULE`, so that the module runs on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address, number = (
        ("main_process_ip", "main_process_port") if kind == "accelerate" else ("master_addr", "master_port")
    )
    return ("-m", *LAUNCHERS[kind], f"--{address}", "127.0.0.1", f"--{number}", port)


def ranks(launcher):
    """{rank: process id} of the launcher's children."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher.pid:
            found |= {int(v.removeprefix(b"RANK=")): int(place.name) for v in variables if v.startswith(b"RANK=")}
    return found
