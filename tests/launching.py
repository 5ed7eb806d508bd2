"""Scenarios that several processes (gloo) go through together, and launching them.

A module of scenarios ends with ``SCENARIOS.run()``, and is run as ``python MODULE RANK WORLD FOLDER`` on each process.
What happened in a process is written down as {scenario: error or ""}.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Scenarios(dict[str, Callable[[Path], None]]):
    """Functions by name; as a decorator it adds one."""

    def __call__(self, function: Callable[[Path], None]) -> Callable[[Path], None]:
        self[function.__name__] = function
        return function

    def run(self) -> None:
        """Be the process that the command line says."""
        rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        timeout = datetime.timedelta(seconds=30)
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timeout)
        results = {}
        for name, function in self.items():
            try:
                function(folder)
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            (folder / f"{rank}.json").write_text(json.dumps(results))
        with contextlib.suppress(Exception):
            dist.barrier()
            dist.destroy_process_group()


def launch(module: str, world: int, folder: Path) -> list[dict[str, str]]:
    """What each process has to say of each scenario: all run in one launch, for the imports take most of the time."""
    script = Path(__file__).with_name(f"{module}.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(world), str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        output = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all((folder / f"{rank}.json").exists() for rank in range(world)), output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
