"""kohya's sd-scripts, LyCORIS and ComfyUI: one safetensors file.

Keys are ``<prefix>_<module path with "." as "_">.<leaf>``, or ``diffusion_model.<module path>.<leaf>``. Read are LoRA
and LoCon pairs, with a Tucker core or without, DoRA on either axis, full differences and norms. The underscored names
are those of the trainer's model, so the model is needed to know what they mean.

s = alpha / r; without alpha s = 1. A DoRA is LyCORIS's, W' = m·V/(‖V‖ + eps), with eps the resolution of float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import FormatError, listed
from ..layouts import Layout
from ..methods import Full
from .bases import Base
from .components import WritePrefix, component_of, locate
from .content import Content, Item, Prefix
from .files import open_safetensors, safetensors_bytes, write_whole
from .kohya_products import HADAMARD, KRONECKER, product_of, refuse_misfit
from .kohya_write import FLAVOR, Flavor, Names, Writer, check_flavor, from_comfyui
from .leaves import Group, Leaves, alpha_of, layout_for, matrices, read_groups, refuse_growth, squeezed
from .pairs import EPS, Implied, Pair
from .portable import joined, replacements, trained
from .products import Product

NAME = "kohya"
HINTS = ("prefix", "flavor", "names")
OPTIONS = ("prefix", "flavor")
NAMES = "loraparam.names"  # of content that keeps a file's names, which are then written as they are

_MERGE = "merge it with its own tool and extract a LoRA from the merged weights"
_OTHER = {
    "OFT or BOFT (a rotation of the output)": ("oft_blocks", "oft_diag", "rescale"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "LyCORIS's (IA)^3": ("on_input",),
    "a sparse bias of LyCORIS": ("bias_indices", "bias_values", "bias_size"),
}
REFUSED = {leaf: f"{kind} is not read; {_MERGE}" for kind, leaves in _OTHER.items() for leaf in leaves}
REFUSED |= {
    "reshape_weight": "it grows the layer, and adapters keep a parameter's shape",
    "lora_magnitude_vector": "no reader of this format takes it; a DoRA here has 'dora_scale'",
}
_PLAIN = ("lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "set_weight")
LEAVES = Leaves((*_PLAIN, *HADAMARD, *KRONECKER), REFUSED)
LEAVES.leaf_of[".lora_mid.weight"] = "mid"
# Leaves by the parameter they are for. One parameter is said one thing about.
WEIGHT, BIAS = ("down", "product", "diff", "w_norm", "set_weight"), ("diff_b", "b_norm")
# Ends that no other format's keys have.
_OWN = tuple(f".{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "dora_scale", "diff", "diff_b", "w_norm"))
_OWN += tuple(f".{leaf}" for leaf in (*HADAMARD, *KRONECKER, "oft_blocks", "set_weight"))


def recognises(path: Path) -> bool:
    """Whether this is such a file: told from its prefixes and from leaves that no other format has."""
    if not path.is_file():
        return False
    with open_safetensors(path) as file:
        return any(_is_own(key) for key in file.keys())  # noqa: SIM118 - a handle, not a dict


def _is_own(key: str) -> bool:
    head = key.partition(".")[0]
    start = component_of(head) or component_of(key)
    return key.endswith(_OWN) or start.endswith("_") or start.startswith(("diffusion_model.", "text_encoders."))


def read(
    path: Path,
    base: Base | None,
    *,
    prefix: Prefix = None,
    flavor: Flavor | None = None,
    names: Literal["model", "file"] = "model",
) -> Content:
    """The adapter in a file.

    Args:
        path: the file.
        base: the model or checkpoint it is for.
        prefix: the part to load, such as "lora_unet" or "unet"; or {prefix: module path}. Needs the base.
        flavor: "comfyui" where a DoRA's scales were made for ComfyUI; by default as the header says, else "lycoris".
        names: "file" leaves the names as they are in the file, which needs no base, and is enough to look at it.
    """
    groups, metadata = read_groups(path, LEAVES)
    file = str(path)
    flavor = check_flavor(metadata.get(FLAVOR, "lycoris") if flavor is None else flavor)
    if names not in ("model", "file"):
        raise FormatError(f"names={names!r}; allowed: 'model', 'file'")
    if names == "file" and prefix is not None:
        raise FormatError(
            f"{file!r}: prefix={prefix!r} selects a part of a model, and without the base all names stay as they are "
            "in the file; give the base, or leave prefix= out"
        )
    if names == "file":
        located, metadata = {group.head: group.head for group in groups}, {**metadata, NAMES: "file"}
        base = Implied(groups, located)
    elif base is None:
        raise FormatError(
            f"{file!r}: names such as {groups[0].head!r} mean the modules of one model; the base is needed to read "
            "them, or the hint names='file' to leave them as they are"
        )
    else:
        located = locate((group.head for group in groups), base, prefix, file)
    items: list[Item] = []
    replaced: dict[str, Tensor] = {}
    for group in groups:
        if group.head in located:
            items += _items(group, located[group.head], base, flavor)
            if "set_weight" in group.tensors:
                replaced[_parameter(group, "set_weight", located[group.head], base)] = group.tensors["set_weight"]
    return Content(file, tuple(items), replaced, metadata)


def _items(group: Group, place: str, base: Base, flavor: Flavor) -> list[Item]:
    """What a module's tensors say about its weight and its bias."""
    product = product_of(group)
    _refuse_orphans(group, product)
    items = []
    if product is not None or "down" in group.tensors:
        leaf = next(leaf for leaf in group.keys if leaf not in (*BIAS, "alpha", "dora_scale"))
        path = _parameter(group, leaf, place, base)
        items.append(_low_rank(group, product, path, base, flavor))
    for leaf in ("diff", "w_norm", *BIAS):
        if leaf in group.tensors:
            path = _parameter(group, leaf, place, base)
            items.append(_difference(group, leaf, path, base))
    return items


def _refuse_orphans(group: Group, product: Product | None) -> None:
    keys = group.keys if product is None else {**group.keys, "product": "LoHa or LoKr"}
    for leaves in (WEIGHT, BIAS):
        found = [keys[leaf] for leaf in leaves if leaf in keys]
        if len(found) > 1:
            raise group.error(next(iter(group.keys)), f"{listed(found)} are for one parameter; keep one")
    for leaf in ("mid", "dora_scale", "alpha"):
        # Some trainers write an alpha beside a difference, where no reader uses it.
        owners = {"mid": ("down",), "dora_scale": WEIGHT[:2], "alpha": (*WEIGHT, *BIAS)}[leaf]
        if leaf in keys and not any(owner in keys for owner in owners):
            raise group.error(leaf, "there is no pair of factors for it")


def _parameter(group: Group, leaf: str, place: str, base: Base) -> str:
    """The parameter a leaf is for: a module's weight or bias, or the very parameter of the name."""
    name = "bias" if leaf in BIAS else "weight"
    path = f"{place}.{name}" if place else name
    if path in base.names:
        return path
    if place in base.names and leaf not in BIAS:
        return place
    raise group.error(leaf, f"{place!r} has no parameter {name!r}, which is all this format can name")


def _difference(group: Group, leaf: str, path: str, base: Base) -> Item:
    diff, shape = group.tensors[leaf], base.shape(path)
    if squeezed(diff.shape) != squeezed(shape):
        raise group.error(leaf, f"shape {tuple(diff.shape)}; {path!r} has {tuple(shape)}")
    return Item(path, Full(), {"diff": diff.reshape(shape)}, base.layout(path) or Layout(), shape)


def _low_rank(group: Group, product: Product | None, path: str, base: Base, flavor: Flavor) -> Item:
    alpha, shape = alpha_of(group), base.shape(path)
    out, in_ = product.sizes() if product else (group.tensors["up"].shape[0], group.tensors["down"].shape[1])
    layout = layout_for(group, path, base, out, in_)
    if product is None:
        A, B = matrices(group, shape, layout)
        pair = Pair(A=A, B=B, alpha=alpha)
    else:
        pair = _expanded(group, product, alpha, layout, shape)
    pair.checked(group)
    if "dora_scale" in group.keys:
        item = _dora(group, pair, path, layout, base)
        return item if flavor == "lycoris" else from_comfyui(item, base)
    if product is None or product.is_pair(*product.sizes()):
        return pair.item(path, layout, shape)
    diff = layout.tensor(pair.B @ pair.A, shape).contiguous()  # one of them is the identity
    return Item(path, Full(), {"diff": diff}, layout, shape)


def _expanded(group: Group, product: Product, alpha: float | None, layout: Layout, shape: tuple[int, ...]) -> Pair:
    """A product as a pair, with s folded into it; beside the identity, where it is smaller whole."""
    _, out, in_ = layout.sizes(shape)
    refuse_misfit(group, product, shape, out, in_)
    rank = product.scale_rank
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    wide = torch.promote_types(product.left.P.dtype, torch.float32)  # alpha may have any
    if product.is_pair(out, in_):
        A, B = product.pair()
        return Pair(A=A.to(wide), B=(B * scale).to(wide))
    delta, eye = (product.dense() * scale).to(wide), torch.eye(min(out, in_), dtype=wide)
    return Pair(A=delta, B=eye) if out <= in_ else Pair(A=eye, B=delta)


def _dora(group: Group, pair: Pair, path: str, layout: Layout, base: Base) -> Item:
    """A DoRA: its scale has the size of the output dim, or of the input dim, and ones elsewhere."""
    shape = base.shape(path)
    _, out, in_ = layout.sizes(shape)
    channels, m = shape[1 - layout.out], group.tensors["dora_scale"]
    pair = replace(pair, magnitude=m, eps=EPS)
    if squeezed(m.shape) == (out,):
        return pair.item(path, layout, shape)
    if squeezed(m.shape) != squeezed((1, channels)):
        ones = [1] * (len(shape) - 2)
        raise group.error(
            "dora_scale",
            f"shape {tuple(m.shape)}; allowed: {(out, 1, *ones)}, one per output, or {(1, channels, *ones)}, one per "
            "input channel",
        )
    if channels == in_:
        return replace(pair, axis="in").item(path, layout, shape)
    if isinstance(base, Implied):
        grown = min(pair.A.shape[0] * in_ // channels, channels) * out * (in_ // channels)
        refuse_growth(group, "dora_scale", grown)
    A, B = by_input_channel(pair, channels)
    return replace(pair, A=A, B=B, alpha=None).item(path, Layout(out=1), shape)


def by_input_channel(pair: Pair, channels: int) -> tuple[Tensor, Tensor]:
    """The pair of s·B·A read as (channels, out·∏k), whose rows are what a norm per input channel belongs to.

    ΔV[o, i, k] = s·Σ_p B[o, p]·A[p, i, k] has rank r·∏k in that reading: B'[i, (p, k)] = A[p, i, k] and
    A'[(p, k), (o, l)] = s·B[o, p] where k = l.
    """
    A, B = pair.A, pair.B
    wide = torch.promote_types(A.dtype, torch.float32)
    (r, in_), out = A.shape, B.shape[0]
    kernel = in_ // channels
    if r * kernel <= min(channels, out * kernel):
        rows = A.reshape(r, channels, kernel).permute(1, 0, 2).reshape(channels, r * kernel)
        eye = torch.eye(kernel, dtype=torch.float64)
        columns = torch.einsum("op,kl->pkol", B.double() * pair.scale, eye).reshape(r * kernel, out * kernel)
        return columns.to(wide), rows.to(wide)
    delta = (B.double() * pair.scale) @ A.double()
    delta = delta.reshape(out, channels, kernel).transpose(0, 1).reshape(channels, out * kernel).to(wide)
    eye = torch.eye(min(delta.shape), dtype=wide)
    return (delta, eye) if delta.shape[0] <= delta.shape[1] else (eye, delta)


# --- writing ----------------------------------------------------------------------------------------------------


def write(
    path: Path, content: Content, base: Base | None, *, prefix: WritePrefix = None, flavor: Flavor = "lycoris"
) -> None:
    """Write one adapter.

    Args:
        path: the file.
        content: the adapter.
        base: the model or checkpoint it is for.
        prefix: of the names, such as "lora_unet", or {module path: prefix}; one that ends in "." keeps the dots of
            module paths, as ComfyUI's "diffusion_model." By default told from the parts of a pipeline, else "lycoris".
        flavor: "comfyui" for its reading of a DoRA, which takes the norm of the base weight; "lycoris" is right for
            LyCORIS, and for ComfyUI in all else.
    """
    writer = Writer(base, check_flavor(flavor))
    modules: dict[str, dict[str, Item]] = {}
    for item in [*joined(content, base), *replacements(content, base)]:
        owner, _, name = item.path.rpartition(".")
        modules.setdefault(owner, {})[name] = item
    names = Names(modules, base, "" if prefix is None and content.metadata.get(NAMES) == "file" else prefix)
    tensors: dict[str, Tensor] = {}
    for owner, items in modules.items():
        tensors |= _module_tensors(owner, items, names, writer)
    r = max((tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")), default=0)
    header = {"ss_network_module": "lycoris.kohya", "ss_network_dim": str(r), "ss_network_alpha": str(r)}
    write_whole(path, safetensors_bytes(tensors, {**header, FLAVOR: flavor, "loraparam.trained": trained(content)}))


def _module_tensors(owner: str, items: dict[str, Item], names: Names, writer: Writer) -> dict[str, Tensor]:
    """{key: tensor} of one module."""
    tensors: dict[str, Tensor] = {}
    for name in items.keys() - {"weight", "bias"}:
        if not names.is_dotted(owner):
            raise FormatError(
                f"{items[name].path!r}: kohya's names stand for a module's weight and bias; use format='peft' or "
                "'loraparam', or ComfyUI's dotted names: prefix='diffusion_model.'"
            )
        head = names.head(items[name].path)
        tensors |= {f"{head}.{leaf}": tensor for leaf, tensor in writer.leaves(items[name]).items()}
    if "weight" in items or "bias" in items:
        head = names.head(owner)
        leaves = writer.module(items.get("weight"), items.get("bias"))
        tensors |= {f"{head}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return tensors
