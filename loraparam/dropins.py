"""What the drop-ins for loralib and LoRA-Torch share: torch's layers with a LoRA on, under the originals' names.

A layer is built as torch builds it, and ``attach`` puts the LoRA on; the forward is torch's. What is added here are the
originals' attributes (``lora_A``, ``scaling``, …) and the originals' keys in ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import attach
from .catalogue import catalogue, parametrized
from .errors import LoraparamError
from .freezing import freeze
from .guarded import stack_of
from .layouts import Layout
from .merging import detached
from .methods import BlockLoRA, LoRA
from .stack import AdapterFactors

ADAPTER = "default"
FACTORS = ("lora_A", "lora_B")


class BiasError(LoraparamError, NotImplementedError):
    """``bias`` is none of the originals' three; the originals raise NotImplementedError."""


def factor(name: str) -> property:
    """The attribute of a factor: ``lora_A``, ``w_lora_B``, …"""
    stem, inner = name[: -len(FACTORS[0])], name[-len(FACTORS[0]) :]

    def get(self: LoRALayer) -> Tensor:
        entry = self._entry(stem)
        if entry is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return entry.factors()[inner]

    return property(get, doc=f"The factor {name}, a Parameter.")


class LoRALayer(nn.Module):
    """A layer of torch with a LoRA on its weights, in the originals' terms.

    Subclasses name the ``factors`` they may have; each becomes an attribute.

    Attributes:
        r, lora_alpha, merge_weights: as given.
        scaling: lora_alpha / r, where r > 0; setting it rescales the LoRA.
        merged: whether the original would hold merged weights now, which is in eval(). Here nothing is ever merged into
            a stored weight; reading ``weight`` gives the effective one in both modes.
    """

    # The names of what ``bias="lora_only"`` trains and saves.
    biases: ClassVar[tuple[str, ...]] = ("bias",)
    r: int
    lora_alpha: float
    merge_weights: bool
    # {what the factors' names start with: (path of the module, parameter) that they are for}
    _adapted: dict[str, tuple[str, str]]

    def __init_subclass__(cls, factors: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in factors:
            setattr(cls, name, factor(name))

    def _built(self, r: int, lora_alpha: float, merge_weights: bool = True) -> None:
        """Called once torch's part of the layer is there: note the arguments, in place."""
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        self._adapted = {}
        # The originals start a layer twice: the same seed gives the same weights only so.
        self._reset_torch()

    def _adapt(
        self,
        stem: str,
        path: str,
        *,
        dropout: float = 0.0,
        layout: Layout | None = None,
        width: int = 1,
        blocks: tuple[bool, ...] = (True,),
        shared: bool = False,
    ) -> None:
        """Put a LoRA on the parameter at ``path``, in place, and freeze it; with r = 0, or no block, nothing.

        Its factors' names start with ``stem``. ``width`` is how many rows of A there are per unit of r.
        """
        if self.r == 0 or not any(blocks):
            return
        owner, _, name = path.rpartition(".")
        module = self.get_submodule(owner)
        options: dict[str, Any] = {"r": self.r * width, "alpha": self.lora_alpha * width}
        options.update(dropout=dropout, dropout_on="input")
        # The originals know no largest rank, LoRA does.
        _, out, in_ = (layout or Layout()).sizes(getattr(module, name).shape)
        plain = len(blocks) == 1 and options["r"] <= min(out, in_)
        method = LoRA(**options) if plain else BlockLoRA(**options, blocks=blocks, shared=shared)
        attach(self, method, path, name=ADAPTER, layout=layout, freeze=False)
        freeze([catalogue(self).leaves[path]], set())
        stack = stack_of(module, name)
        assert stack is not None
        stack.writable = True
        self._adapted[stem] = (owner, name)

    def _entry(self, stem: str) -> AdapterFactors | None:
        """Where a pair of factors is kept; None where there is none, as after ``lp.detach``."""
        if stem not in self.__dict__.get("_adapted", {}):
            return None
        owner, name = self._adapted[stem]
        stack = stack_of(self.get_submodule(owner), name)
        return next(iter(stack.named(ADAPTER)), None) if stack is not None else None

    def _entries(self) -> dict[str, AdapterFactors]:
        return {stem: entry for stem in self.__dict__.get("_adapted", {}) if (entry := self._entry(stem)) is not None}

    @property
    def merged(self) -> bool:
        """See the class."""
        return self.merge_weights and not self.training

    @property
    def scaling(self) -> float:
        """s in W + s·B·A."""
        for entry in self._entries().values():
            return float(entry.method.scale)  # type: ignore[attr-defined]
        raise AttributeError(f"{type(self).__name__} with r={self.r} has no attribute 'scaling'")

    @scaling.setter
    def scaling(self, scale: float) -> None:
        for entry in self._entries().values():
            entry.method = replace(entry.method, alpha=scale * entry.method.r)  # type: ignore[call-arg, attr-defined]

    def reset_parameters(self) -> None:
        """Start the layer's parameters, and the factors, anew, in place."""
        if not self._entries():  # torch's constructors call this too
            self._reset_torch()
            return
        with detached(self):
            self._reset_torch()
        for stem, entry in self._entries().items():
            owner, name = self._adapted[stem]
            fresh = entry.method.init(getattr(self.get_submodule(owner), name), entry.layout)
            with torch.no_grad():
                for factor, value in fresh.items():
                    entry.factors()[factor].copy_(value)

    def _reset_torch(self) -> None:
        super().reset_parameters()  # type: ignore[misc]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Assigning to ``lora_A`` puts the parameter where the factor is kept."""
        for stem, entry in self._entries().items():
            if name in (stem + factor for factor in FACTORS):
                entry.register_parameter(name.removeprefix(stem), param)
                return
        super().register_parameter(name, param)

    # --- the originals' keys ----------------------------------------------------------------------------------

    def _keys(self) -> dict[str, tuple[str, nn.Parameter]]:
        """{the original's key: (where torch keeps it, the parameter)} of everything adapted."""
        keys: dict[str, tuple[str, Any]] = {}
        for stem, entry in self._entries().items():
            owner, name = self._adapted[stem]
            path = f"{owner}." if owner else ""
            plist = parametrized(self.get_submodule(owner))[name]
            inside = f"{path}parametrizations.{name}."
            position = next(key for key, child in plist._modules.items() if entry in child._modules.values())
            keys[path + name] = (inside + "original", plist._parameters["original"])
            for factor in FACTORS:
                keys[stem + factor] = (f"{inside}{position}.{entry.key}.{factor}", entry.factors()[factor])
        return keys

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's keys, and always the weight without the LoRA beside the factors, in eval() too."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        names = {prefix + inside: key for key, (inside, _) in self._keys().items()}
        own = {names.get(key, key[len(prefix) :]): state.pop(key) for key in list(state) if key.startswith(prefix)}
        order = catalogue(self).names[""]

        def rank(key: str) -> tuple[int, int]:
            """As the originals' run: the layer's own parameters, the factors, then what its modules hold."""
            if key in order:
                return 0, order.index(key)
            return (2 if "." in key else 1 if "lora_" in key else 0), key not in names.values()

        state.update({prefix + key: own[key] for key in sorted(own, key=rank)})
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Adapted weights of this very module have been found under their own names by now, and missing factors have
        # been given (what is right for other layers, while the originals report them).
        for key, (inside, parameter) in self._keys().items():
            name, place = prefix + key, prefix + inside
            if name in state_dict:
                state_dict[place] = state_dict.pop(name)
            elif inside.endswith(".original") and place in state_dict:
                pass
            else:
                missing_keys.append(name)
                state_dict[place] = parameter
            found = getattr(state_dict[place], "shape", parameter.shape)
            if found != parameter.shape:
                # Said here, for torch would say it of ``place``.
                error_msgs.append(
                    f"size mismatch for {name}: copying a param with shape {tuple(found)} from checkpoint, "
                    f"the shape in current model is {tuple(parameter.shape)}."
                )
                state_dict[place] = parameter
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class LinearBase(LoRALayer, nn.Linear):
    """``nn.Linear``, with the weight stored (in, out) where ``fan_in_fan_out``."""

    fan_in_fan_out: bool

    def _transpose(self, fan_in_fan_out: bool) -> Layout:
        """Store the weight as asked for, in place."""
        self.fan_in_fan_out = fan_in_fan_out
        if not fan_in_fan_out:
            return Layout()
        self.weight.data = self.weight.data.t().contiguous()
        return Layout(out=1)

    def forward(self, input: Tensor) -> Tensor:
        """input·Wᵀ + bias."""
        return F.linear(input, self.weight.t(), self.bias) if self.fan_in_fan_out else super().forward(input)


def block_flags(enable_lora: Any, out_features: int) -> tuple[bool, ...]:
    """``enable_lora`` of a MergedLinear.

    Raises:
        LoraparamError: it is no list of booleans whose length divides ``out_features``.
    """
    given: Any = enable_lora
    listed = isinstance(given, (list, tuple)) and all(isinstance(on, bool) for on in given)
    if not listed or not given or out_features % len(given):
        raise LoraparamError(
            f"enable_lora={enable_lora!r} with out_features={out_features}; allowed: a list of booleans, one for each "
            "of the equal blocks that out_features divides into, such as [True, False, True]"
        )
    return tuple(enable_lora)


def flat_layout(conv: Any, kernel_size: int) -> Layout:
    """How the originals read a kernel: row by row, into out/groups·k rows (Conv1d: out/groups).

    Raises:
        LoraparamError: ``kernel_size`` is no integer.
    """
    if type(kernel_size) is not int:
        raise LoraparamError(
            f"kernel_size={kernel_size!r}; allowed: an integer, as in the original. For other kernels put "
            "lp.attach(model, lp.LoRA(r=...)) on the nn.Conv layer"
        )
    k = 1 if isinstance(conv, nn.Conv1d) else kernel_size
    return Layout(rows=conv.out_channels // conv.groups * k)


# --- the originals' functions ---------------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Set ``requires_grad=False`` on everything but the factors, in place, and True on the biases asked for.

    Args:
        model: a model with drop-in layers; factors of other adapters stay trainable as well.
        bias: "none", "all", or "lora_only", those of the drop-in layers.

    Raises:
        BiasError: another ``bias``; a LoraparamError and a NotImplementedError. Nothing has changed then.

    Example:
        >>> import loraparam.loralib as lora
        >>> model = nn.Sequential(lora.Linear(4, 6, r=2), nn.Linear(6, 2))
        >>> lora.mark_only_lora_as_trainable(model)
        >>> [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad]
        ['lora_A', 'lora_B']
    """
    _check_bias(bias)
    chosen = {id(parameter) for parameter in _biases(model).values()} if bias == "lora_only" else set()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = (bias == "all" and "bias" in name) or id(parameter) in chosen


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The factors under the original's keys, and the biases asked for.

    Args:
        model, bias: as for ``mark_only_lora_as_trainable``.

    Raises:
        BiasError: another ``bias``.

    Example:
        >>> import loraparam.loralib as lora
        >>> model = nn.Sequential(lora.Linear(4, 6, r=2), nn.Linear(6, 2))
        >>> list(lora.lora_state_dict(model, bias="lora_only"))
        ['0.bias', '0.lora_A', '0.lora_B']
    """
    _check_bias(bias)
    chosen = _biases(model) if bias == "lora_only" else {}
    state: dict[str, Tensor] = model.state_dict()
    return {
        key: value
        for key, value in state.items()
        if "lora_" in key or (bias == "all" and "bias" in key) or key in chosen
    }


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise BiasError(f"bias={bias!r}; allowed: 'none', 'all', 'lora_only'")


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: parameter} of the drop-in layers' biases."""
    found = {}
    for path, layer in model.named_modules():
        for name in layer.biases if isinstance(layer, LoRALayer) else ():
            owner, _, leaf = name.rpartition(".")
            parameter = layer.get_submodule(owner)._parameters.get(leaf)
            if parameter is not None:
                found[f"{path}.{name}" if path else name] = parameter
    return found
