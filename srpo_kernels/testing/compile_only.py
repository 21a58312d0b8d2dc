"""Compile a Triton kernel for a GPU that is not there, and read what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from srpo_kernels.testing.specialization import Specialization

__all__ = ["ARCHITECTURES", "Compiled", "compile_for", "compile_specialization"]

#: Compute capabilities every kernel must compile for: Hopper (H20, H100, H200) and Blackwell.
ARCHITECTURES = (90, 100)

_TYPE = re.compile(r"\*?(bf16|[iu](1|8|16|32|64)|fp(8e4nv|16|32|64))")
_LOG, _SASS = "ptxas.log", "sass.names"
#: Of a multiprocessor of either architecture: registers, bytes of shared memory, warps, blocks.
_REGISTERS, _SHARED, _WARPS, _BLOCKS = 65536, 228 * 1024, 64, 32
_WIDE = 16  # bytes


@dataclass(frozen=True)
class Compiled:
    """Facts of a compiled kernel."""

    ptx: str
    cubin_size: int  # bytes
    log: str  # of the assembler, verbose
    instructions: Counter[str]  # of the machine by name with all modifiers, as LDG.E.128
    shared: int  # bytes
    warps: int

    @property
    def registers(self) -> int:
        return self._logged(r"Used (\d+) registers")

    @property
    def stack(self) -> int:
        """Bytes; spills are among them."""
        return self._logged(r"(\d+) bytes stack frame")

    @property
    def spills(self) -> tuple[int, int]:
        """Bytes of instructions that store and load spilled registers."""
        return self._logged(r"(\d+) bytes spill stores"), self._logged(r"(\d+) bytes spill loads")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the assembler warned of, without the kernel's name."""
        return tuple(
            re.findall(r"^.*?(?:warning|advisory)\s*:\s*(.*?)(?: in function '.*|\s*)$", self.log, re.M | re.I)
        )

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor can hold: registers are given to warps by 256, and a block costs 1 KiB."""
        registers = self.warps * -(-self.registers * 32 // 256) * 256
        return min(_REGISTERS // registers, _SHARED // (self.shared + 1024), _WARPS // self.warps, _BLOCKS)

    @property
    def occupancy(self) -> float:
        """Warps a multiprocessor can hold of this kernel, over the 64 it has room for."""
        return self.blocks * self.warps / _WARPS

    def widest_load(self) -> int:
        """Bytes of the widest global load of a thread."""
        return max(self._widths("ld"), default=0)

    def widest_store(self) -> int:
        """Bytes of the widest global store of a thread."""
        return max(self._widths("st"), default=0)

    def narrow_loads(self) -> int:
        """Global loads of fewer than the 16 bytes that a thread can take at once."""
        return sum(width < _WIDE for width in self._widths("ld"))

    def narrow_stores(self) -> int:
        """Global stores of fewer than 16 bytes."""
        return sum(width < _WIDE for width in self._widths("st"))

    def _widths(self, instruction: str) -> list[int]:
        """Bytes of every global access in the PTX; copies to shared memory are loads."""
        found = re.findall(rf"\b{instruction}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global(?:\.\S+)? \[.*?\], \[.*?\], 0x([0-9a-f]+)", self.ptx)
        widths = [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]
        return widths + [int(size, 16) for size in copies if instruction == "ld"]

    def _logged(self, pattern: str) -> int:
        return sum(int(count) for count in re.findall(pattern, self.log))


def compile_for(kernel: Any, arguments: Mapping[str, Any], *, architecture: int = 90, **options: Any) -> Compiled:
    """Compile `kernel` as the launcher would for well-aligned tensors.

    `arguments` maps every parameter to a Triton type ("*bf16", "i32", "fp32") or, for constants, to its value. Pointers
    and integers are marked divisible by 16, as real shapes are; without that, other code comes out.
    """
    types = {name: value for name, value in arguments.items() if isinstance(value, str) and _TYPE.fullmatch(value)}
    constants = {name: value for name, value in arguments.items() if name not in types}
    signature = {name: types.get(name, "constexpr") for name in arguments}
    divisible = {index for index, kind in enumerate(signature.values()) if kind[0] in "*i"}
    return _compile(kernel, signature, constants, divisible, architecture, options)


def compile_specialization(code: Specialization, architecture: int) -> Compiled:
    """Compile what a recorded launch would run."""
    return _compile(
        code.kernel, dict(code.signature), dict(code.constants), code.divisible, architecture, dict(code.options)
    )


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: Iterable[int],
    architecture: int,
    options: dict[str, Any],
) -> Compiled:
    """The assembler's log and the names of machine instructions are kept beside the kernel in Triton's cache."""
    hints = {(index,): [["tt.divisibility", 16]] for index in sorted(divisible)}
    source = ASTSource(kernel, signature, constants, hints)
    options = {"enable_fp_fusion": True, **options}  # Triton 3.10 turns it off by default
    target = GPUTarget("cuda", architecture, 32)

    def compiled(again: bool) -> tuple[Any, str]:
        with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(StringIO()) as log:
            knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, again
            return triton.compile(source, target=target, options=options), log.getvalue()

    made, log = compiled(again=False)
    cache = get_cache_manager(made.hash)
    kept = cache.get_file(_LOG)
    if log or kept is None:
        log = log or compiled(again=True)[1]  # it was in the cache, without its log
        kept = cache.put(log, _LOG, binary=False)
    names = cache.get_file(_SASS) or cache.put(_disassemble(made.asm["cubin"]), _SASS, binary=False)
    log, text = (Path(file).read_text("utf-8") for file in (kept, names))
    return Compiled(
        made.asm["ptx"],
        len(made.asm["cubin"]),
        log,
        Counter(text.split()),
        made.metadata.shared,
        made.metadata.num_warps,
    )


def _disassemble(cubin: bytes) -> str:
    """Names of a cubin's instructions with their modifiers, in order, one a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "\n".join(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", text, re.M))
