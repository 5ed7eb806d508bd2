"""One row of the table of models, and what rows are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraparam as lp
from loraparam.catalogue import catalogue
from loraparam.targets import find
from loraparam.testing import Subject
from loraparam.testing.seeding import seed

VOCABULARY, HIDDEN = 64, 16


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: its row.
        build: makes it; no dropout, so that train and eval agree.
        inputs: makes one batch of keyword arguments.
        output: the tensor of interest in what the model returns.
        full: parameters with two dims or more that are no matrices, by the end of their path.
        also: what to adapt beside linear layers and convolutions: stacks of experts, embeddings.
        dead: {target: why no gradient can arrive at it}; they are left out, and check has to name them.
        exclude: {target: why the model and an adapter there do not go together}; attach or the model refuses it.
        refused: how attach begins to say that this model cannot be adapted.
        dtype: to run the laws in; float64 where layers amplify float32's rounding beyond what tells it from a fault.
        generates: whether it decodes token by token, from its inputs without ``decoder_input_ids``.
        pickles: whether the model itself, without adapters, can be pickled.
        input_gradients: whether it takes inputs that require grad.
        deep: whether the independent tests of test_models.py run on it as well as the laws of the matrix.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    output: str = "logits"
    full: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    dead: Mapping[str, str] = field(default_factory=dict)
    exclude: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    dtype: torch.dtype | None = None
    generates: bool = False
    pickles: bool = True
    input_gradients: bool = True
    deep: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> Any:
        """A fresh one in train mode, the same bits each time."""
        seed(0)
        model = self.build().train()
        # Zero biases and unit norms would hide what an adapter does to them.
        randomise(model.parameters())
        return model

    def plain(self) -> Any:
        """One in which no parameter is computed from others, not even by the model's own weight_norm."""
        model = self.model()
        for module in model.modules():
            for name in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, name)
        return model

    def call(self, model: nn.Module) -> Tensor:
        """The output on the batch."""
        result = model(**self.inputs())
        return result if isinstance(result, Tensor) else result[self.output]

    def call_with(self, plain: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        """The output of a plain model with other weights, differentiable in them."""
        result = torch.func.functional_call(plain, weights, kwargs=self.inputs())
        return result if isinstance(result, Tensor) else result[self.output]

    def attach(self, model: nn.Module, recipe: str) -> lp.Plan:
        """Attach the fresh adapters of a recipe, in place."""
        return lp.attach(model, RECIPES[recipe](self), generator=torch.Generator().manual_seed(2))

    def adapt(self, model: nn.Module, recipe: str) -> None:
        """Attach adapters whose factors are as after training, in place: none is zero."""
        self.attach(model, recipe)
        randomise(lp.parameters(model))

    def adapted(self, recipe: str) -> Any:
        """A fresh model with such adapters."""
        model = self.model()
        self.adapt(model, recipe)
        return model

    def subject(self) -> Subject:
        """What the laws of the matrix run on."""
        if self.name not in _SUBJECTS:
            _SUBJECTS[self.name] = self._subject()
        return _SUBJECTS[self.name]

    def _subject(self) -> Subject:
        """LoRA on all linear layers, all convolutions and what the row names beside them."""
        model, targets, method = self.model(), [], LORA
        for target in ("all-linear", is_convolution, *self.also):
            with contextlib.suppress(lp.TargetError):
                find(target, catalogue(model))
                targets.append(target)
        excluded = (*self.exclude, *self.dead)
        if not self.refused and not fits(model, method, targets, excluded):
            method = THIN
        subject = Subject(self.model, self.inputs, method, targets)
        return replace(subject, exclude=excluded, dtype=self.dtype, input_gradients=self.input_gradients, cycles=3)


_SUBJECTS: dict[str, Subject] = {}  # by the entry's name


def fits(model: nn.Module, method: lp.Method, targets: list[Any], exclude: tuple[str, ...]) -> bool:
    """Whether the rank is in range everywhere."""
    try:
        lp.plan(model, method, targets, exclude=exclude)
    except lp.RankError:
        return False
    return True


def is_convolution(path: str, module: nn.Module, name: str) -> bool:
    """A target: every convolution of any kind."""
    return isinstance(module, nn.modules.conv._ConvNd) and name == "weight"


# --- adapters ------------------------------------------------------------------------------------------------


def _matrices(entry: Entry) -> Callable[[str, nn.Module, str], bool]:
    def is_matrix(path: str, module: nn.Module, name: str) -> bool:
        return getattr(module, name).dim() >= 2 and "bias" not in name and not path.endswith(entry.full or ("\0",))

    return is_matrix


def _others(entry: Entry) -> Callable[[str, nn.Module, str], bool]:
    is_matrix = _matrices(entry)
    return lambda path, module, name: not is_matrix(path, module, name)


LORA, DORA = lp.LoRA(r=2, alpha=3), lp.DoRA(r=2, alpha=3)
THIN = lp.LoRA(r=1, alpha=3)  # where a layer has no more than one output

# {name: what to attach}. "everywhere" leaves no parameter out: embeddings, experts, convolutions, norms, biases.
RECIPES: dict[str, Callable[[Entry], Mapping[Any, lp.Method]]] = {
    "lora": lambda entry: {"all-linear": LORA},
    "dora": lambda entry: {"all-linear": DORA},
    "lora-everywhere": lambda entry: {_matrices(entry): LORA, _others(entry): lp.Full()},
    "dora-everywhere": lambda entry: {_matrices(entry): DORA, _others(entry): lp.Full()},
}


def randomise(tensors: Any, seed: int = 3, scale: float = 0.3) -> None:
    """Move every tensor by noise, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.requires_grad:
                continue  # a table of positions, say, which a model makes again when it loads
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=scale)


# --- building ------------------------------------------------------------------------------------------------


def transformer(name: str, /, **sizes: Any) -> Callable[[], nn.Module]:
    """Builds a model class of transformers from these entries of its config, without dropout."""
    import transformers

    def build() -> nn.Module:
        cls = getattr(transformers, name)
        config = cls.config_class(**sizes)
        without_dropout(config)
        return cls(config)

    return build


def without_dropout(config: Any) -> None:
    """Set every dropout rate of a config to zero, in place, those of the configs inside it too."""
    for key, value in list(vars(config).items()):
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        if hasattr(value, "to_diff_dict"):
            without_dropout(value)


# --- inputs --------------------------------------------------------------------------------------------------


def tokens(length: int = 7, seed: int = 5, batch: int = 2) -> Tensor:
    """Token ids from 3 on: the first three have meanings."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    """Standard normal, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def prompt() -> dict[str, Tensor]:
    """A batch of two sentences."""
    return {"input_ids": tokens()}


def prompt_and_answer() -> dict[str, Tensor]:
    """The same, with what a decoder has said so far."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def images(size: int = 8, *frames: int) -> Callable[[], dict[str, Tensor]]:
    """A batch of two pictures, or of two films."""
    return lambda: {"pixel_values": noise(2, *frames, 3, size, size)}


def prompt_and_image() -> dict[str, Tensor]:
    """Two sentences and two pictures."""
    return {**prompt(), **images()()}


def waveform(samples: int = 400, *channels: int) -> Callable[[], dict[str, Tensor]]:
    """Two sounds."""
    return lambda: {"input_values": noise(2, *channels, samples)}


# --- sizes ---------------------------------------------------------------------------------------------------

TOWER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}
VISION: dict[str, Any] = {**TOWER, **IMAGE, "num_labels": 3}
ENDLESS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT_TOWER: dict[str, Any] = {**TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
TEXT_TOWER |= {"bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    **TOWER,
    **ENDLESS,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_SIDES = ("encoder", "decoder")
_LAYERS: dict[str, Any] = {f"{side}_{what}": n for side in _SIDES for what, n in (("layers", 1), ("ffn_dim", 32))}
ENCODER_DECODER: dict[str, Any] = {**_LAYERS, **{f"{side}_attention_heads": 2 for side in _SIDES}, "d_model": HIDDEN}
SEQ2SEQ: dict[str, Any] = {
    **ENCODER_DECODER,
    **ENDLESS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
