"""A module tree that shares everything with another one but what it exchanges."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType

from torch import nn

__all__ = ["view"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def view(module: nn.Module, exchange: Callable[[str, nn.Module], nn.Module | None], name: str = "") -> nn.Module:
    """New modules all the way down, with the parameters and buffers of `module`, whichever it has at the time.

    `exchange` gives what stands in for a submodule of that name, or None. A patched forward goes along; forward hooks,
    FSDP2's among them, do not: parameters must be whole when a view of sharded modules is used.
    """
    if (other := exchange(name, module)) is not None:
        return other
    made = copy.copy(module)  # shares the dictionaries of parameters and buffers themselves
    made.__dict__.update({hooks: OrderedDict() for hooks in _HOOKS})
    forward = made.__dict__.get("forward")
    if isinstance(forward, MethodType):
        made.__dict__["forward"] = MethodType(forward.__func__, made)
    prefix = f"{name}." if name else ""
    made.__dict__["_modules"] = {
        key: child and view(child, exchange, prefix + key) for key, child in module._modules.items()
    }
    return made
