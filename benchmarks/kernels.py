"""On an accelerator: one linear layer and one block, in float32 and bfloat16, eager and compiled.

Times of the device and not of Python, kernels launched, peak memory. It runs on the CPU as well, in tiny sizes, for its
own tests; peak memory is then left out.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from .case import Case, called, floats
from .measures import Pace, interleaved, ratio
from .peers import DORA, LORA, OURS, PEFT, PeerError, by_target, stir
from .steps import pairs
from .variants import FLOOR, FULL, limits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = ("eager", "compiled")


class Block(nn.Module):
    """A Llama layer's seven linears, with attention between them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = hidden * 11 // 4
        self.heads = max(1, hidden // 128)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        h = self.norms[0](x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(a.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        y: Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return y


def kernel_cases(hidden: int, tokens: int, r: int) -> list[Case]:
    """A linear layer, and a block."""
    linear = Case(
        name=f"linear {hidden}",
        about=f"nn.Linear({hidden}, {hidden}), {tokens} tokens",
        model=lambda: nn.Sequential(nn.Linear(hidden, hidden, bias=False)),
        x=floats(1, tokens, hidden),
        call=called,
        targets="0",
        peft={"target_modules": ["0"]},
        r=r,
        positions=tokens,
    )
    block = Case(
        name=f"block {hidden}",
        about=f"a Llama layer, hidden {hidden}, {tokens} tokens",
        model=lambda: Block(hidden),
        x=floats(1, tokens, hidden),
        call=called,
        targets="all-linear",
        peft={"target_modules": r".*_proj"},
        r=r,
        positions=tokens,
    )
    return [linear, block]


def rows(block: tuple[int, int, int], pace: Pace, device: torch.device) -> list[dict[str, Any]]:
    """Each case in each dtype, eager and compiled."""
    torch.manual_seed(0)
    return [_row(case, dtype, way, pace, device) for case in kernel_cases(*block) for dtype in DTYPES for way in WAYS]


def _row(case: Case, dtype: str, way: str, pace: Pace, device: torch.device) -> dict[str, Any]:
    models, skipped = _models(case, DTYPES[dtype], device)
    x = case.x().detach().to(device, DTYPES[dtype]).requires_grad_()
    grad = torch.randn_like(x)
    runs = _runs(models, way, x, grad, skipped)
    forget = {name: partial(_forget, models[name], x) for name in runs}
    seconds = interleaved(runs, _on(pace, device), around=forget)
    seen, peaks = {}, {}
    for name, run in runs.items():
        seen[name] = kernels(run, device)
        forget[name]()
        if device.type == "cuda":
            peaks[name] = peak(run, device)
            forget[name]()
    floor = statistics.median(seconds[FLOOR])
    return {
        "name": f"{case.name} {dtype} {way}",
        "limits": limits(case).step,
        "floor_ms": floor * 1e3,
        "rounds": len(seconds[FLOOR]),
        "ratios": {name: ratio(seconds, name) for name in seconds if name != FLOOR},
        "over": {name: ratio(seconds, ours, name) for name, ours in pairs(seconds).items()},
        "kernels": seen,
        "peak": peaks,
        # Two products by the weight, each of as many multiplications and additions.
        "floor_tflops": 4 * _products(case) / floor / 1e12,
        "skipped": skipped,
    }


def _runs(
    models: dict[str, nn.Module], way: str, x: Tensor, grad: Tensor, skipped: dict[str, str]
) -> dict[str, Callable[[], None]]:
    """A step of each model; a peer that does not run in this way is named instead."""
    runs: dict[str, Callable[[], None]] = {}
    torch.compiler.reset()  # it gives up on code that it has compiled for too many models
    for name, model in models.items():
        run: Callable[[Tensor], Tensor] = model
        if way == "compiled":
            run = torch.compile(model, fullgraph=True, dynamic=False)
        try:
            _step(run, x, grad)
        except Exception as error:
            if not name.startswith(PEFT.name):
                raise
            skipped[name] = f"{way}: {type(error).__name__}: {error}".splitlines()[0]
            continue
        _forget(model, x)
        runs[name] = partial(_step, run, x, grad)
    return runs


def _models(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every variant on the device; all but the fully trained one share the base's weights."""
    base = case.model().to(device, dtype).requires_grad_(False)
    share = {id(weight): weight for weight in base.parameters()}
    models: dict[str, nn.Module] = {FLOOR: base, FULL: copy.deepcopy(base).requires_grad_(True)}
    skipped = {}
    for method in (LORA, DORA):
        for library in (OURS, PEFT):
            name = library.variant(method)
            try:
                model = library.attach(copy.deepcopy(base, dict(share)), case, method).to(device)
                if library is OURS:
                    stir(model)
                else:
                    library.fill(model, base, case, by_target(models[method]))
            except PeerError as reason:
                skipped[name] = str(reason)
                continue
            models[name] = model
    return models, skipped


def _products(case: Case) -> int:
    """Multiplications of one forward through the linear layers."""
    return case.positions * sum(weight.numel() for weight in case.model().parameters() if weight.dim() == 2)


def _step(model: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    model(x).backward(grad)


def _forget(model: nn.Module, x: Tensor) -> None:
    x.grad = None
    model.zero_grad(set_to_none=True)


def _on(pace: Pace, device: torch.device) -> Pace:
    """The same pace by a clock that waits for the device."""
    if device.type != "cuda":
        return pace

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return Pace(steps=pace.steps, seconds=pace.seconds, clock=clock)


def kernels(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Kernels of one step and the milliseconds spent in them; on the CPU, operations."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in seen.events() if event.device_type == wanted]
    spent = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events)
    return {"count": len(events), "ms": spent / 1e3}


def peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that one step allocates on the device at most, beyond what is there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
