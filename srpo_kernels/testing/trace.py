"""What a piece of model code launches, moves and leaves in memory, read from the operators it dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Launch", "Trace"]

#: Make a tensor or a view without reading or writing memory, whatever their schema says.
_FREE = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"})
#: Bounded by arithmetic: GEMMs and attention.
_COMPUTE = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_", "aten::_flash_attention", "srpo::fp8_linear")


@dataclass(frozen=True)
class Launch:
    """One operator that runs a kernel."""

    name: str
    nbytes: int  # of its tensor arguments and results

    @property
    def memory_bound(self) -> bool:
        return not self.name.startswith(_COMPUTE)


class Trace(TorchDispatchMode):
    """Within the block, records launches, and which tensors were made.

    Works on CPU and meta tensors. An operator counts as one launch, which is true of this package's and of ATen's fused
    ones; what ATen composes of several on the CPU only is counted as several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if aliases and all(tensor.untyped_storage()._cdata in given for tensor in outputs):
            return result  # a view; aten::to and aten::contiguous may have made a copy
        name = func._schema.name
        if (inputs or outputs) and not name.startswith("prim::") and name not in _FREE:  # or it asks a question
            self.launches.append(Launch(name, sum(t.nbytes for t in [*inputs, *outputs])))
        for storage in (tensor.untyped_storage() for tensor in outputs):
            if storage._cdata not in given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def kept(self) -> int:
        """Bytes of what was made within the block and is still alive."""
        return sum(nbytes for reference, nbytes in self._made.values() if not reference.expired())

    def moved(self) -> int:
        """Bytes that memory-bound launches read and wrote."""
        return sum(launch.nbytes for launch in self.launches if launch.memory_bound)
