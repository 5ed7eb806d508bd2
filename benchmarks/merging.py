"""Memory and time of merging an adapter into a sharded checkpoint, in a process of its own.

python -m benchmarks.merging                 2 GB of bfloat16, an adapter on every linear layer and the head
python -m benchmarks.merging --layers 4 --method DoRA --json result.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import loraparam as lp
from loraparam.formats import write_content
from loraparam.formats.content import Content, Item, fingerprint

from .report import environment

LAYERS_A_SHARD = 6

# Linux keeps a process's highest resident memory. Not resource.ru_maxrss, which starts at that of the parent.
MERGE = """
import re, sys, time
import torch
import loraparam as lp
torch.set_num_threads(int(sys.argv[4]))
def mib(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, start = mib("VmRSS"), time.perf_counter()
lp.merge_files(*sys.argv[1:4])
print(mib("VmHWM") - before, time.perf_counter() - start)
"""


def shapes(layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """The weights of a Llama-like model, in order."""
    inner = 11 * width // 4
    found = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        found |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"model.layers.{i}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (width, inner)
    return {**found, "lm_head.weight": (vocabulary, width)}


def tensors(given: dict[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    """Each weight, the same at every call: small noise, made in bfloat16."""
    for name, shape in given.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        yield name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)


def write_base(path: Path, given: dict[str, tuple[int, int]]) -> None:
    """The checkpoint, a shard at a time."""
    path.mkdir()
    names, shard, weight_map = list(given), {}, {}
    per_shard = 7 * LAYERS_A_SHARD
    total = -(-len(names) // per_shard)
    for i, (name, tensor) in enumerate(tensors(given)):
        file = f"model-{i // per_shard + 1:05}-of-{total:05}.safetensors"
        shard[name], weight_map[name] = tensor, file
        if len(shard) == per_shard or i + 1 == len(names):
            save_file(shard, path / file, {"format": "pt"})
            shard = {}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_adapter(path: Path, given: dict[str, tuple[int, int]], method: lp.LoRA | lp.DoRA) -> None:
    """An adapter on all weights but the embedding."""
    items = []
    for name, weight in tensors(given):
        if name != "model.embed_tokens.weight":
            factors = method.init(weight, lp.Layout())
            factors["lora_B"].uniform_(-0.01, 0.01)
            saved = None if method.additive else fingerprint(weight)
            items.append(Item(name, method, factors, lp.Layout(), given[name], saved))
    write_content(path, Content("benchmark", tuple(items)), None, format="loraparam")


def measure(layers: int, width: int, vocabulary: int, method: lp.LoRA | lp.DoRA) -> dict[str, Any]:
    """Make the files, merge them in a new process, and say what that took."""
    given = shapes(layers, width, vocabulary)
    sizes = [2 * rows * columns / 2**20 for rows, columns in given.values()]
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, out = (Path(folder, name) for name in ("base", "adapter", "out"))
        write_base(base, given)
        write_adapter(adapter, given, method)
        command = [sys.executable, "-c", MERGE, base, adapter, out, str(torch.get_num_threads())]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds = map(float, done.stdout.split())
        return {
            "model MiB": sum(sizes),
            "largest tensor MiB": max(sizes),
            "adapter MiB": adapter.stat().st_size / 2**20,
            "method": str(method),
            "peak MiB above import": peak,
            "seconds": seconds,
            "seconds with start": time.perf_counter() - start,
        }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print and return the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--method", choices=("LoRA", "DoRA"), default="LoRA")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    method = {"LoRA": lp.LoRA, "DoRA": lp.DoRA}[args.method](r=args.rank)
    result = {**environment(), **measure(args.layers, args.width, args.vocabulary, method)}
    for name, value in result.items():
        sys.stdout.write(f"{name}: {value:,.1f}\n" if isinstance(value, float) else f"{name}: {value}\n")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
