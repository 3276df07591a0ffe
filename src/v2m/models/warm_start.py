"""Starting a V2M from the weights of a model without a second pass: Vim, VMamba.

What has the same meaning in both models is carried over. Of the scans, the first pass takes the
baseline's first route, and the second pass, which no baseline has, its second one:

| | first pass | second pass |
|---|---|---|
| Vim to plain V2M | the forward scan, its dt and B | the backward scan (`_b`), its dt and C |
| VMamba to hierarchical V2M | the route along rows, its dt and B | along columns, its dt and C |

So both passes start with trained convolutions, step sizes and decay rates. They were trained in
parallel and are now put in sequence: it is a start, not a working model, until it is trained.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from v2m.errors import InputError

from .hierarchical import HierarchicalV2M, VMamba
from .plain import V2M, Plain
from .vim import Vim, take_out

__all__ = ["WarmStart", "warm_start"]

State = Mapping[str, Tensor]
Found = tuple[Tensor, str]  # a tensor and what it was in the source


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a model took from another one.

    Attributes:
        carried: name in the model -> where it came from.
        fresh: names in the model that start from its own initialisation.
        unused: names in the source that nothing was taken from.
    """

    carried: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.carried)} tensors carried over, {len(self.fresh)} start fresh."]
        for title, names in (("fresh", self.fresh), ("not used", self.unused)):
            if names:
                lines.append(f"{title}: {', '.join(names)}")
        return "\n".join(lines)


def warm_start(
    model: nn.Module, source: type[nn.Module], arguments: dict, state: State
) -> WarmStart:
    """Fill `model` from the state dict of a `source` model; returns what went where.

    Args:
        model: a V2M, plain or hierarchical; it is changed in place.
        source: the class the state dict belongs to.
        arguments: that model's keywords.
        state: its tensors.

    Raises:
        InputError: nothing in the state dict corresponds to the model.
    """
    find = _finder(model, source, arguments, state)
    own = model.state_dict()
    carried, used = {}, set()
    for name, tensor in own.items():
        found = find(name)
        if found is not None and found[0].shape == tensor.shape:
            own[name] = found[0].to(tensor.dtype)
            carried[name] = found[1]
            used.add(found[1].split("[")[0])
    blocks = [name for name in carried if name.startswith("layers.")]
    if not blocks:
        raise InputError(
            f"nothing in the layers of the checkpoint, a {source.__name__}, corresponds to a"
            f" {type(model).__name__} of this size. Give `into` a model of the same width and"
            " stages: a plain V2M for V2M and Vim, v2m_hier_* for VMamba."
        )
    model.load_state_dict(own)
    return WarmStart(
        carried=carried,
        fresh=tuple(name for name in own if name not in carried),
        unused=tuple(name for name in state if name not in used),
    )


def _finder(model, source, arguments, state) -> Callable[[str], Found | None]:
    """From a name in the model to what the source has for it."""
    if issubclass(source, Vim) and isinstance(model, V2M):
        special = _from_vim
    elif issubclass(source, VMamba) and isinstance(model, HierarchicalV2M):
        special = _from_vmamba
    else:
        special = None

    def find(name: str) -> Found | None:
        if name in ("pos_embed", "cls_token") and issubclass(source, Plain):
            return _tokens(name, model, source, arguments, state)
        found = None if special is None else special(name, state)
        return found if found is not None or name not in state else (state[name], name)

    return find


def _tokens(name, model, source, arguments, state) -> Found | None:
    """The position embedding on the model's grid; a class token with its own position in it."""
    if "pos_embed" not in state or not isinstance(model, Plain):
        return None
    position, has_middle = state["pos_embed"], source.prefix_tokens == 1
    middle = None
    if has_middle:
        middle, position = take_out(position)
    if name == "pos_embed":
        old = source.config_class(**arguments).grid_size
        new = model.config.grid_size
        how = (
            "pos_embed"
            + ("[patches]" if has_middle else "")
            + ("" if old == new else "[resampled]")
        )
        return Plain.resample_position(model, position, new, old), how
    if "cls_token" not in state:
        return None
    return state["cls_token"] + (0 if middle is None else middle), "cls_token[with its position]"


def _from_vim(name: str, state: State) -> Found | None:
    """A scan's parameters from Vim's two senses; x_proj from rows dt and B, or dt and C."""
    layer, _, leaf = name.rpartition("mixer.")
    if not layer:
        return None
    second = "_2" in leaf
    source = f"{layer}mixer.{leaf.replace('_2', '_b')}"
    if source not in state or not leaf.startswith("x_proj"):
        return (state[source], source) if second and source in state else None
    weight = state[source]
    states = state[f"{layer}mixer.A_log"].shape[1]
    return _rows_of_projection(weight, states, second=second), f"{source}[dt, {'BC'[second]}]"


def _from_vmamba(name: str, state: State) -> Found | None:
    """A scan's parameters from VMamba's route along rows (0) or columns (1)."""
    layer, _, leaf = name.rpartition("op.")
    stacked = {
        "x_proj.weight": "x_proj_weight",
        "dt_proj.weight": "dt_projs_weight",
        "dt_proj.bias": "dt_projs_bias",
        "A_log": "A_logs",
        "D": "Ds",
    }.get(leaf.replace("_2", ""))
    source = f"{layer}op.{stacked}"
    if not layer or stacked is None or source not in state:
        return None
    second = "_2" in leaf
    tensor = state[source]
    tensor = tensor.chunk(4)[second] if stacked in ("A_logs", "Ds") else tensor[int(second)]
    route = f"{source}[{'columns' if second else 'rows'}"
    if stacked != "x_proj_weight":
        return tensor, f"{route}]"
    states = state[f"{layer}op.A_logs"].shape[1]
    tensor = _rows_of_projection(tensor, states, second=second)
    return tensor, f"{route}, dt, {'BC'[second]}]"


def _rows_of_projection(weight: Tensor, states: int, *, second: bool) -> Tensor:
    """(R + 2N, E) -> (R + N, E): dt with B for a first pass, with C for a second one."""
    rank = weight.shape[0] - 2 * states
    dt, B, C = weight.split([rank, states, states])
    return torch.cat((dt, C if second else B))
