"""What a torch function does with a tensor: reads what it is, makes a view of it, writes into it."""

from __future__ import annotations

from typing import Any

import torch

_VALUES = {"T", "H", "mT", "mH", "real", "imag"}
_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.storage_offset,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_inference,
    torch.Tensor.element_size,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
}
_VIEWS = (
    *("__getitem__", "select", "narrow", "view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as"),
    *("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "squeeze", "unsqueeze"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "expand"),
    *("expand_as", "broadcast_to", "diagonal", "unfold", "as_strided", "numpy", "__array__"),
)
_VIEW_GETTERS: tuple[Any, ...] = (torch.Tensor.T, torch.Tensor.mT, torch.Tensor.H, torch.Tensor.mH, torch.Tensor.real)
# As methods, and as the functions of the same names.
VIEWS = {getattr(owner, name) for owner in (torch.Tensor, torch) for name in _VIEWS if hasattr(owner, name)}
VIEWS |= {getter.__get__ for getter in _VIEW_GETTERS}
_POINTERS = {"data_ptr", "untyped_storage", "storage", "_typed_storage"}
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {f"__i{name}__" for name in _OPERATORS}


def is_metadata(func: Any) -> bool:
    """Whether a function reads only what a tensor is, not its values."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES
    return func in _METADATA


def sets_requires_grad(func: Any) -> bool:
    """Whether a function sets the flag of its first argument."""
    name, attribute = _names(func)
    return func is torch.Tensor.requires_grad_ or (name == "__set__" and attribute == "requires_grad")


def hands_out_storage(func: Any) -> bool:
    """Whether a function gives the place where a tensor's values lie."""
    return _names(func)[0] in _POINTERS


def subject(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function is called on: its first argument, by position or by name, as torch.nn.init passes it."""
    return args[0] if args else next(iter(kwargs.values()), None)


def writes(func: Any) -> bool:
    """Whether a function writes into its first argument."""
    name = _names(func)[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__set__", "__setitem__") or name in _IN_PLACE


def described(func: Any) -> str:
    """The function as a reader knows it: ``zero_()``, ``setting .data``."""
    name, attribute = _names(func)
    return f"setting .{attribute}" if name == "__set__" else f"{name}()"


def _names(func: Any) -> tuple[str, str]:
    """A function's name, and that of the attribute it gets or sets."""
    return getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")
