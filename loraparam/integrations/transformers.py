"""Checkpoints of transformers' Trainer: what was trained, and each adapter as a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..adapters import adapters
from ..errors import AttachError
from ..formats import write_content
from ..formats.bases import ModelBase
from ..formats.content import content_of
from ..formats.files import write_whole
from ..formats.native import NAME
from ..managers import SAVERS
from ..sharding import unflattened, whole
from ..stack import AdapterFactors

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "loraparam.integrations.transformers needs transformers (and its Trainer needs accelerate): "
        "pip install transformers accelerate"
    ) from error

# What from_pretrained is told to read instead of what a checkpoint holds; its error shows the name.
_NO_BASE = "only-adapters-here-attach-them-with-loraparam-load.safetensors"


class AdapterCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Lets a Trainer write, resume and reload checkpoints of a model with adapters.

    A checkpoint holds ``adapters/<name>.safetensors`` for ``lp.load``, and in ``model.safetensors`` everything but
    the frozen base: factors, base parameters left trainable, buffers. ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read that into the model at hand, whose base stays as it is. ``from_pretrained`` of a
    checkpoint raises FileNotFoundError: the base model is not in it. A model that is not transformers' own keeps
    the Trainer's ``model.safetensors``, the whole state. Under FSDP the Trainer writes and resumes from a state of its
    own; the adapters are gathered by all processes.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[AdapterCheckpoints()])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
        >>> lp.load(other, "output/checkpoint-500/adapters/default.safetensors")  # doctest: +SKIP

    Raises:
        AttachError: training begins with nothing attached.
    """

    def __init__(self) -> None:
        self._written = False
        self._hook: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Expect checkpoints without the frozen base: the Trainer would warn of each of its keys."""
        if self._hook is None:
            self._hook = model.register_load_state_dict_post_hook(_expect_no_base)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Take over ``save_pretrained`` of the model, for the folders that this training writes."""
        if not adapters(model):
            raise AttachError("nothing is attached to this model; lp.attach before training, or leave the callback out")

        self.on_init_end(args, state, control, model=model)

        # It keeps no model alive: whatever ends the training, the model goes with its last reference.
        def saver(model: nn.Module, folder: Any, *, state_dict: Any = None, **options: Any) -> bool:
            if Path(folder).name != f"checkpoint-{state.global_step}":
                return False
            writes = options.get("is_main_process", True)
            _save_trained(model, Path(folder), state_dict, writes)
            # A state that was given has been gathered by all processes, but one alone came here with it.
            self._written = state_dict is None
            if self._written:
                _save_adapters(model, Path(folder), writes, args)
            return True

        SAVERS[_pretrained(model)] = saver

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Add the adapters where ``save_pretrained`` did not, or was not called by all processes; here are all."""
        if not self._written:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _save_adapters(model, folder, args.should_save, args)
        self._written = False

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Give ``save_pretrained`` back, and expect whole checkpoints."""
        SAVERS.pop(_pretrained(model), None)
        self._hook.remove()
        self._hook = None


def _expect_no_base(model: nn.Module, incompatible: Any) -> None:
    if set(incompatible.missing_keys) == _frozen(model):
        incompatible.missing_keys.clear()


def _pretrained(model: nn.Module) -> nn.Module:
    """The model itself, inside whatever wraps it; a wrapper shows the attributes of what it holds as its own."""
    return next((module for module in model.modules() if hasattr(type(module), "save_pretrained")), model)


def _save_adapters(model: nn.Module, folder: Path, writes: bool, args: Any) -> None:
    """Gather each adapter on all processes that have parts of it, and write it on those that are to."""
    with unflattened(model, everywhere=args.save_on_each_node) as readable:
        for name in adapters(model) if readable else ():
            content = content_of(model, name)
            if writes:
                path = folder / "adapters" / f"{name}.safetensors"
                write_content(path, content, ModelBase(model), format=NAME)


def _save_trained(model: nn.Module, folder: Path, state: dict[str, Any] | None, writes: bool) -> None:
    """Write the state without the frozen base, and a configuration that says so."""
    frozen = _frozen(model)
    state = model.state_dict() if state is None else state
    # Tied tensors have several keys, and a file takes no memory twice.
    kept = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in frozen}
    tensors = {key: whole(value).clone() for key, value in kept.items()}
    if not writes:
        return
    write_whole(folder / "model.safetensors", to_bytes(tensors, {"format": "pt"}))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        told = {**json.loads(config.to_json_string()), "transformers_weights": _NO_BASE}
        write_whole(folder / "config.json", json.dumps(told, indent=2).encode())


def _frozen(model: nn.Module) -> set[str]:
    """The keys of base parameters that do not train."""
    factors = {
        _unwrapped(f"{path}.{name}")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterFactors)
        for name in module.names
    }
    named = model.named_parameters(remove_duplicate=False)
    return {_unwrapped(name) for name, parameter in named if not parameter.requires_grad} - factors


def _unwrapped(name: str) -> str:
    """The name in a state dict, which leaves out what wraps the layers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
