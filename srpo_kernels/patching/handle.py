"""How a patch is put in, reported and taken out. Knows nothing of any model."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

from torch import nn

__all__ = ["Entry", "PatchHandle", "Rule", "fingerprint", "hooked", "install", "is_patched"]


@dataclass(frozen=True)
class Rule:
    """One kind of module and the forward it gets."""

    target: type[nn.Module]
    forward: Callable[..., Any]  # takes the module first
    uses: Collection[str]  # names of operators
    stands_for: dict[Callable, Collection[str]]  # functions whose work it does -> fingerprints it was written against
    refuse: Callable[[Any], str | None] = lambda _: None  # why an instance cannot be patched
    within: tuple[type[nn.Module], ...] = (nn.Module,)  # only instances that one of these holds, or is


@dataclass(frozen=True)
class Entry:
    """What became of one module; `reason` is empty when it was replaced."""

    name: str
    kind: str
    uses: tuple[str, ...]
    reason: str = ""


class PatchHandle:
    """A patch that is in place until `remove`, or until its ``with`` block is left."""

    def __init__(self, entries: Sequence[Entry], installed: Sequence[tuple[str, nn.Module, MethodType]]) -> None:
        self.entries = tuple(entries)
        self._installed = list(installed)

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """Modules that run on this package's operators."""
        return tuple(entry for entry in self.entries if not entry.reason)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """Modules that were left as they are, each with its reason."""
        return tuple(entry for entry in self.entries if entry.reason)

    def report(self) -> str:
        """One line a module: its name, class, and the operators it runs on or why it was left alone."""
        lines = [f"{len(self.replaced)} modules patched, {len(self.refused)} refused"]
        width = max((len(entry.name) for entry in self.entries), default=0)
        for entry in self.entries:
            what = f"refused: {entry.reason}" if entry.reason else ", ".join(entry.uses)
            lines.append(f"  {entry.name or '(model)':<{width}}  {entry.kind}: {what}")
        return "\n".join(lines)

    def remove(self) -> None:
        """Restore every module's own forward; once removed, nothing more happens.

        Raises `RuntimeError`, before anything is restored, when someone has wrapped a patched forward since.
        """
        for name, module, forward in self._installed:
            if module.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"patch: the forward of {name or 'the model'} was replaced after it was patched; remove that first"
                )
        for _, module, _ in reversed(self._installed):
            del module.__dict__["forward"]
        self._installed.clear()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"PatchHandle({self.report().splitlines()[0]})"


def install(module: nn.Module, rules: Sequence[Rule], *, strict: bool) -> PatchHandle:
    """Give every submodule that a rule is for its new forward; all or, when this raises, none."""
    drifted = {rule.target: _drift(rule) for rule in rules}
    entries, found = [], []
    for name, child in module.named_modules():
        rule = next((rule for rule in rules if isinstance(child, rule.target)), None)
        if rule is None or not any(isinstance(outer, rule.within) for outer in _path(module, name)):
            continue
        if is_patched(child):
            raise ValueError(f"patch: {name or 'the model'} is patched already; call remove() of its handle first")
        reason = drifted[rule.target] or _occupied(child, rule) or rule.refuse(child) or ""
        entries.append(Entry(name, rule.target.__name__, tuple(sorted(rule.uses)), reason))
        if not reason:
            found.append((name, child, MethodType(rule.forward, child)))
    if not entries:
        kinds = ", ".join(sorted({rule.target.__name__ for rule in rules}))
        raise ValueError(f"patch: module holds none of what these ops are for: {kinds}")
    handle = PatchHandle(entries, found)
    if strict and handle.refused:
        raise ValueError(f"patch: strict, and some modules cannot be patched\n{handle.report()}")
    for _, child, forward in found:
        child.__dict__["forward"] = forward
    return handle


def hooked(module: Any, name: str) -> str | None:
    """Why a module that is fused into another cannot be: it is not called, so its hooks would not run."""
    return f"{name} has forward hooks" if module._forward_hooks or module._forward_pre_hooks else None


def is_patched(module: nn.Module) -> bool:
    """Whether this very module runs one of our forwards."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, MethodType) and forward.__func__.__module__.startswith(__package__)


def fingerprint(function: Callable) -> str:
    """A hash of what a function does: its source without annotations, docstring, comments or formatting."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:10]


def _path(module: nn.Module, name: str) -> list[nn.Module]:
    """`module` and every submodule on the way to the one of that name, itself included."""
    path = [module]
    for part in filter(None, name.split(".")):
        path.append(path[-1].get_submodule(part))
    return path


def _drift(rule: Rule) -> str | None:
    """Which function is not the one that the rule was written against."""
    for function, known in rule.stands_for.items():
        if fingerprint(function) not in known:
            return f"{function.__qualname__} of this diffusers version is not one that was checked"
    return None


def _occupied(module: nn.Module, rule: Rule) -> str | None:
    if "forward" in module.__dict__:
        return "another library has replaced its forward"
    if type(module).forward is not rule.target.forward:
        return f"{type(module).__name__} overrides forward"
    return None
