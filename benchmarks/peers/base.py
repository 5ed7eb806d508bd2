"""What the benchmarks ask of a library, in the words that all of them share."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import loraparam as lp

from ..case import Case

LORA, DORA, MAGNITUDE = "LoRA", "DoRA", "Magnitude"
METHODS: dict[str, type[lp.Method]] = {LORA: lp.LoRA, DORA: lp.DoRA, MAGNITUDE: lp.Magnitude}

Factors = dict[str, Tensor]


class PeerError(Exception):
    """Why a library takes no part."""


class Library:
    """One library. What it cannot do raises ``PeerError`` with the reason, which the report prints.

    Attributes:
        name: in the tables.
        package: what has to be importable.
        methods: those of METHODS that it has.
        writes_base: whether it writes into the base weights, so that it needs its own copy of them.
        merges_in_eval: whether it has no forward in evaluation mode with its adapters beside the weights.
    """

    name = ""
    package = ""
    methods: tuple[str, ...] = (LORA,)
    writes_base = False
    merges_in_eval = False

    def module(self) -> ModuleType:
        """The package.

        Raises:
            PeerError: it is not installed.
        """
        try:
            return importlib.import_module(self.package)
        except ImportError:
            raise PeerError(f"{self.package!r} is not installed") from None

    def variant(self, method: str) -> str:
        """What its version of a method is called in the tables."""
        return f"{self.name} {method}"

    def differs(self, case: Case, method: str) -> str:
        """Why it computes something else than ours, or nothing."""
        return case.differs.get(self.variant(method), "")

    # --- training and inference: as bare as the library allows --------------------------------------------------------

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """Put adapters on, in place where it can."""
        raise PeerError(f"has no {method}")

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """Give the adapters the factors that ours have, by target path."""
        raise NotImplementedError

    def after_step(self, model: nn.Module) -> None:
        """What it asks its users to call after each backward."""

    # --- handling: as a user does it ----------------------------------------------------------------------------------

    def wrap(self, model: nn.Module, case: Case) -> nn.Module:
        """A model that can be saved, switched and merged."""
        return self.attach(model, case, LORA)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter."""
        raise PeerError("writes no files")

    def load(self, model: nn.Module, case: Case, folder: Path) -> nn.Module:
        """Put the adapter in a folder on a base model."""
        raise PeerError("reads no files")

    def add(self, model: nn.Module, case: Case) -> None:
        """One more adapter, to switch to."""
        raise PeerError("holds one adapter")

    def switch(self, model: nn.Module, second: bool) -> None:
        """Let the first adapter act alone, or the second."""
        raise PeerError("holds one adapter")

    def merge(self, model: nn.Module) -> None:
        """Fold the adapter into the weights."""
        raise PeerError("does not merge")

    def unmerge(self, model: nn.Module) -> None:
        """Take it out again."""
        raise PeerError("does not take a merged adapter out again")


class StateDicts(Library):
    """A library whose adapters are kept, and switched, as state dicts of the whole model."""

    FILE = "adapter.pt"

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors, by their keys in the model."""
        state: dict[str, Tensor] = self.module().lora_state_dict(model)
        return state

    def save(self, model: nn.Module, folder: Path) -> None:
        """``torch.save`` of the state."""
        torch.save(self.state(model), folder / self.FILE)

    def load(self, model: nn.Module, case: Case, folder: Path) -> nn.Module:
        """New adapters, then ``load_state_dict``."""
        model = self.wrap(model, case)
        model.load_state_dict(torch.load(folder / self.FILE), strict=False)
        return model

    def add(self, model: nn.Module, case: Case) -> None:
        """A second state; loading one or the other is all there is."""
        model.__dict__["benchmark_states"] = [{k: v.clone() for k, v in self.state(model).items()} for _ in range(2)]

    def switch(self, model: nn.Module, second: bool) -> None:
        """``load_state_dict``."""
        model.load_state_dict(model.__dict__["benchmark_states"][second], strict=False)


@dataclass(frozen=True)
class Place:
    """One name of an adapted parameter: of module ``module_path``, named ``name`` there.

    Attributes:
        path: the target it belongs to: its own path, or that of the parameter it is tied to.
        turned: it reads the target's weight as the transposed map: the head of a tied embedding.
    """

    path: str
    module_path: str
    module: nn.Module
    name: str
    turned: bool

    def factors(self, by_target: dict[str, Factors]) -> Factors:
        """The factors for it, A (r, in) and B (out, r) of its own layer."""
        own = by_target[self.path]
        # W + s·(B·A)ᵀ, seen from the head: B and A change places.
        return {"lora_A": own["lora_B"].mT, "lora_B": own["lora_A"].mT} if self.turned else own


def places(model: nn.Module, case: Case) -> Iterator[Place]:
    """Where the targets of a case are, on a model without adapters; a tied weight once for each reader."""
    for row in lp.plan(model, lp.LoRA(r=case.r), case.targets):
        first = type(model.get_submodule(row.path.rpartition(".")[0]))
        for path in dict.fromkeys((row.path, *row.shared_with)):
            module_path, _, name = path.rpartition(".")
            module = model.get_submodule(module_path)
            turned = issubclass(first, nn.Embedding) and isinstance(module, nn.Linear)
            yield Place(row.path, module_path, module, name, turned)


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module at a path, in place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def copy_into(pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Write values, shaped as the library has them, in place."""
    with torch.no_grad():
        for own, value in pairs:
            own.copy_(value.reshape(own.shape))


def version(package: str) -> str | None:
    """A package's version; "source" where it is importable and says none."""
    for name in (package, package.replace("lycoris", "lycoris_lora")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    try:
        return str(getattr(importlib.import_module(package), "__version__", "from source"))
    except ImportError:
        return None
