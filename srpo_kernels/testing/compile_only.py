"""Compile a Triton kernel for a GPU that is not there, and read what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["ARCHITECTURES", "Compiled", "compile_for"]

#: Compute capabilities every kernel must compile for: Hopper (H20, H100, H200) and Blackwell.
ARCHITECTURES = (90, 100)

_TYPE = re.compile(r"\*?(bf16|[iu](1|8|16|32|64)|fp(8e4nv|16|32|64))")


@dataclass(frozen=True)
class Compiled:
    """Facts of a compiled kernel."""

    ptx: str
    registers: int
    stack: int  # bytes; spills show here
    shared: int  # bytes
    warps: int

    @property
    def occupancy(self) -> float:
        """Warps a multiprocessor can hold of this kernel, over the 64 it has room for."""
        registers = self.warps * 32 * -(-self.registers // 8) * 8
        blocks = min(65536 // registers, 232448 // (self.shared + 1024), 64 // self.warps, 32)
        return blocks * self.warps / 64

    def widest_load(self) -> int:
        """Bytes of the widest global load of a thread."""
        return self._widest("ld")

    def widest_store(self) -> int:
        """Bytes of the widest global store of a thread."""
        return self._widest("st")

    def _widest(self, instruction: str) -> int:
        found = re.findall(rf"{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return max((int(lanes or 1) * int(bits) // 8 for lanes, bits in found), default=0)


def compile_for(kernel: Any, arguments: Mapping[str, Any], *, architecture: int = 90, **options: Any) -> Compiled:
    """Compile `kernel` as the launcher would for well-aligned tensors.

    `arguments` maps every parameter to a Triton type ("*bf16", "i32", "fp32") or, for constants, to its value. Pointers
    and integers are marked divisible by 16, as real shapes are; without that, other code comes out.
    """
    types = {name: value for name, value in arguments.items() if isinstance(value, str) and _TYPE.fullmatch(value)}
    constants = {name: value for name, value in arguments.items() if name not in types}
    signature = {name: types.get(name, "constexpr") for name in arguments}
    hints = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constants, hints)
    options = {"enable_fp_fusion": True, **options}  # Triton 3.10 turns it off by default
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
    metadata = compiled.metadata
    return Compiled(compiled.asm["ptx"], int(usage["REG"]), int(usage["STACK"]), metadata.shared, metadata.num_warps)
