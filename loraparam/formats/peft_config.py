"""``adapter_config.json``: the fields that say what a file's tensors mean, checked; all others have no effect.

Which modules are adapted and with which rank is told by the tensors. ``target_modules``, a regex from the file, is
never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError, LoraparamError
from ..methods.base import is_int, is_number
from .peft_patterns import first_match, matches
from .peft_products import LEAVES

_NO_FORM = "merge it with PEFT (merge_and_unload), then load the merged weights or extract a LoRA from them"

# Fields that, when set, make the file something else than weights W' = f(W).
_NOT_WEIGHTS = {
    "alora_invocation_tokens": "aLoRA acts after certain tokens only",
    "use_qalora": "QA-LoRA pools the input",
    "use_bdlora": "BD-LoRA splits the input over devices",
    "arrow_config": "Arrow routes each token to one of several adapters",
    "kasa_config": "KaSA truncates the base weight",
    "layer_replication": "layer replication changes the model",
    "megatron_config": "Megatron shards the layers",
}

_USES = ("use_rslora", "use_dora", "use_effective_conv2d", *_NOT_WEIGHTS)

# init_lora_weights that leave the base as it is; pissa and olora are reproduced from the base.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
BASE_CHANGING_STARTS = r"pissa(_niter_\d{1,4})?|olora"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What of a config counts.

    Attributes:
        place: the file, for messages.
        kind: ``peft_type``.
        r, alpha: where no pattern says otherwise.
        start: "" where the base stays as it is, or "pissa", "pissa_niter_<n>", "olora".
        tokens: ids of replaced embedding rows, by module; under "" those of the input embedding.
        doubles: PEFT up to 0.21.2 adds the delta of an attention's ``out_proj`` twice.
    """

    place: str
    kind: str
    r: int = 8
    alpha: float = 8
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    start: str = ""
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    feedforward: str | tuple[str, ...] = ()
    doubles: bool = True

    def rank_for(self, name: str) -> int:
        """The rank that the config gives a module."""
        try:
            first = first_match(self.ranks, name)
        except LoraparamError as error:
            raise FormatError(f"{self.place!r}: {error}") from None
        return int(self.r if first is None else self.ranks[first])

    def alpha_for(self, name: str, r: int) -> float:
        """The alpha of a module whose tensors have rank ``r``.

        Raises:
            FormatError: the config gives it another rank, or a pattern cannot be read.
        """
        expected = self.rank_for(name)
        try:
            own = [self.ranks[key] for key in self.ranks if matches(key, name)] if expected != r else []
            key = first_match(self.alphas, name)
            others = {alpha for k, alpha in self.alphas.items() if matches(k, name)} if own else set()
        except LoraparamError as error:
            raise FormatError(f"{self.place!r}: {error}") from None
        # PEFT sorts the patterns when it saves, so the first one may not be the one it trained with.
        if expected != r and (r not in own or len(others) > 1):
            raise FormatError(f"{self.place!r} gives {name!r} rank {expected:g}; its tensors have rank {r}")
        return self.alpha if key is None else self.alphas[key]

    def is_feedforward(self, name: str) -> bool:
        """Whether IA3 acts on a module's input."""
        if isinstance(self.feedforward, str):
            try:
                return matches(self.feedforward, name, whole=True)
            except LoraparamError as error:
                raise FormatError(f"{self.place!r}: {error}") from None
        return any(name.endswith(ending) for ending in self.feedforward)

    def saves(self, module: str) -> bool:
        """Whether a module is one of ``modules_to_save``, by PEFT's rule."""
        return any(module.endswith(name) for name in self.modules_to_save)


def parse(value: Any, place: str) -> Config:
    """A config's content, checked.

    Raises:
        FormatError: a field with a value that is not allowed, or that this library cannot reproduce.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{place!r} holds a {type(value).__name__}; allowed: an object with peft_type")
    get = _Fields(value, place)
    for key, why in _NOT_WEIGHTS.items():
        if value.get(key):
            raise get.wrong(key, f"not set, because {why}, which no weight can express")
    kind = get.text("peft_type", None)
    get.check_kind(kind)
    for key in value:
        if key.startswith("use_") and key not in _USES and value[key]:
            raise get.wrong(key, "not set, because this release does not know what it changes")
    named = "alpha" if kind in ("LOHA", "LOKR") else "lora_alpha"
    r, alpha = value.get("r", 8), value.get(named, 8)
    if not is_int(r) or r < 1:
        raise get.wrong("r", "a positive integer")
    if not is_number(alpha):
        raise get.wrong(named, "a finite number")
    bias = get.text("bias", "none")
    if bias not in ("none", "all", "lora_only", "vera_only", "MiSS_only"):
        raise get.wrong("bias", "'none', 'all', 'lora_only'")
    return Config(
        place=place,
        kind=kind,
        r=r,
        alpha=alpha,
        rslora=get.flag("use_rslora"),
        dora=get.flag("use_dora"),
        lora_bias=get.flag("lora_bias"),
        fan_in_fan_out=get.flag("fan_in_fan_out"),
        ranks=get.pattern("rank_pattern", "positive integers", lambda rank: is_int(rank) and rank > 0),
        alphas=get.pattern("alpha_pattern", "finite numbers", is_number),
        start=get.start(),
        bias=bias,
        modules_to_save=get.names("modules_to_save"),
        parameters=get.names("target_parameters"),
        tokens=get.tokens(),
        feedforward=get.feedforward(),
        doubles=get.doubles(),
    )


class _Fields:
    """Reading typed fields, an error naming the file and the field."""

    def __init__(self, value: dict[str, Any], place: str) -> None:
        self.value, self.place = value, place

    def wrong(self, key: str, allowed: str) -> FormatError:
        shown = repr(self.value.get(key))
        return FormatError(f"{self.place!r}: {key}={shown[:80]}{'…' * (len(shown) > 80)}; allowed: {allowed}")

    def text(self, key: str, default: str | None) -> str:
        value = self.value.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def check_kind(self, kind: str) -> None:
        if kind not in ("LORA", "DORA", "IA3", *LEAVES):
            known = ", ".join(map(repr, ("LORA", "IA3", *LEAVES)))
            raise self.wrong("peft_type", f"{known} and NVlabs' 'DORA'; as for {kind[:20]}: {_NO_FORM}")
        if kind == "MISS" and self.value.get("init_weights", True) not in (True, False, "mini"):
            raise self.wrong("init_weights", f"true, false, 'mini'; another variant is refused: {_NO_FORM}")

    def flag(self, key: str) -> bool:
        value = self.value.get(key)
        if not (value is None or isinstance(value, bool)):
            raise self.wrong(key, "true, false")
        return bool(value)

    def pattern(self, key: str, allowed: str, fits: Any) -> dict[str, float]:
        value = self.value.get(key) or {}
        if not isinstance(value, dict) or not all(map(fits, value.values())):
            raise self.wrong(key, f"an object of names to {allowed}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.value.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def start(self) -> str:
        value = self.value.get("init_lora_weights", True)
        name = value.lower() if isinstance(value, str) else ""
        if isinstance(value, str) and re.fullmatch(BASE_CHANGING_STARTS, name):
            return name
        if value is None or isinstance(value, bool) or name in _PLAIN_STARTS:
            return ""
        raise self.wrong(
            "init_lora_weights",
            f"true, false, 'pissa', 'pissa_niter_<n>', 'olora', {', '.join(map(repr, _PLAIN_STARTS))}; another one may "
            f"change the base in a way that cannot be reproduced: {_NO_FORM}",
        )

    def tokens(self) -> dict[str, tuple[int, ...]]:
        value = self.value.get("trainable_token_indices") or {}
        value = {"": value} if isinstance(value, list) else value
        good = isinstance(value, dict) and all(
            isinstance(ids, list) and all(is_int(i) and i >= 0 for i in ids) and len(set(ids)) == len(ids)
            for ids in value.values()
        )
        if not good:
            raise self.wrong(
                "trainable_token_indices", "a list of different ids, or an object of modules to such lists"
            )
        return {module: tuple(ids) for module, ids in value.items()}

    def feedforward(self) -> str | tuple[str, ...]:
        value = self.value.get("feedforward_modules")
        return value if isinstance(value, str) else self.names("feedforward_modules")

    def doubles(self) -> bool:
        version = self.value.get("peft_version")
        found = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
        return found is None or tuple(map(int, found.groups())) <= (0, 21, 2)
