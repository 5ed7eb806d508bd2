"""Scenarios that several processes (gloo) go through together, and launching them.

A module of scenarios ends with ``SCENARIOS.run()``, and is run as ``python MODULE WORLD FOLDER``: that process imports
what all need, which takes most of the time, and then forks them. What happened in each is written down as
{scenario: error or ""}.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it when they are made; here it is done before the fork
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Scenarios(dict[str, Callable[[Path], None]]):
    """Functions by name; as a decorator it adds one."""

    def __call__(self, function: Callable[[Path], None]) -> Callable[[Path], None]:
        self[function.__name__] = function
        return function

    def run(self) -> None:
        """Be the processes that the command line says."""
        world, folder = int(sys.argv[1]), Path(sys.argv[2])
        gc.freeze()  # what was imported stays: accelerate collects garbage dozens of times, and need not look there
        # So far there is one thread, which is what makes it safe to fork.
        torch.multiprocessing.start_processes(self._take_part, (world, folder), world, start_method="fork")

    def _take_part(self, rank: int, world: int, folder: Path) -> None:
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
    """What each process has to say of each scenario: all run in one launch."""
    script = Path(__file__).with_name(f"{module}.py")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(world), str(folder)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, which ends as a whole
    )
    try:
        output = process.communicate(timeout=300)[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert all((folder / f"{rank}.json").exists() for rank in range(world)), output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
