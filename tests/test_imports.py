"""The import directions of design.md section 2."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

_ROOT = Path(__file__).parents[1]
_NOT_OURS = {"build", "dist", "runs", "venv", "node_modules", "__pycache__"}
#: Top-level folders that may use the training package.
_MAY_USE_SRPO = {"srpo", "benchmarks", "tests", "docs"}


def _imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every imported module by absolute name, with its line; also ``import_module("name")``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield node.lineno, stem
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _forbidden(file: PurePosixPath, name: str) -> str | None:
    """Why `file` may not import `name`, or None."""
    top, parts = name.partition(".")[0], file.parts
    if top == "srpo" and parts[0] not in _MAY_USE_SRPO:
        return f"nothing outside {', '.join(sorted(_MAY_USE_SRPO))} imports srpo"
    if parts[0] != "srpo_kernels":
        return None
    if top == "diffusers" and parts[1] != "patching":
        return "only srpo_kernels/patching imports diffusers"
    if top == "benchmarks" or top == "tests":
        return "srpo_kernels imports neither benchmarks nor tests"
    if parts[1] in ("ops", "_triton"):
        allowed = {"torch", "srpo_kernels", *sys.stdlib_module_names} | ({"triton"} if parts[1] == "_triton" else set())
        if top not in allowed:
            return f"srpo_kernels/{parts[1]} imports only torch, the standard library and srpo_kernels"
        if _within(name, "srpo_kernels.patching", "srpo_kernels.optim"):
            return "operators do not import what is built on them"
    if parts[1] == "optim" and _within(name, "srpo_kernels.patching"):
        return "optimizers do not import patching"
    return None


def _violations(file: str, source: str) -> list[str]:
    """Forbidden imports of a source file at `file`, a path relative to the repository."""
    path = PurePosixPath(file)
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    found = {}
    for line, name in _imports(ast.parse(source), module, path.name == "__init__.py"):
        reason = _forbidden(path, name)
        if reason is not None:
            found.setdefault(line, f"{file}:{line} imports {name}: {reason}")
    return list(found.values())


def _sources() -> list[str]:
    return [
        str(path.relative_to(_ROOT))
        for path in sorted(_ROOT.rglob("*.py"))
        if not any(part.startswith(".") or part in _NOT_OURS for part in path.relative_to(_ROOT).parts)
    ]


def test_every_file_keeps_the_import_directions() -> None:
    sources = _sources()
    assert {"srpo/objective.py", "srpo_kernels/ops/recover.py", "setup.py"} <= set(sources)
    assert [line for file in sources for line in _violations(file, (_ROOT / file).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("srpo_kernels/latents.py", "import srpo"),
        ("srpo_kernels/latents.py", "from srpo.errors import InputError"),
        ("srpo_kernels/latents.py", "def f():\n    from srpo import errors"),
        ("srpo_kernels/ops/recover.py", "from srpo.latents import unpack"),
        ("srpo_kernels/ops/recover.py", "import numpy as np"),
        ("srpo_kernels/ops/recover.py", "import triton"),
        ("srpo_kernels/ops/recover.py", "from einops import rearrange"),
        ("srpo_kernels/ops/recover.py", "import diffusers"),
        ("srpo_kernels/ops/recover.py", "from srpo_kernels import patching"),
        ("srpo_kernels/ops/recover.py", "from .. import patching"),
        ("srpo_kernels/ops/recover.py", "from ..optim import adamw"),
        ("srpo_kernels/ops/__init__.py", "from ..patching.flux import patch"),
        ("srpo_kernels/optim/adamw.py", "from srpo_kernels.patching import patch"),
        ("srpo_kernels/optim/adamw.py", "from diffusers.models import AutoencoderKL"),
        ("srpo_kernels/__init__.py", "import diffusers"),
        ("srpo_kernels/__init__.py", "if True:\n    import importlib\n    importlib.import_module('diffusers')"),
        ("srpo_kernels/_triton/recover.py", "import numpy"),
        ("srpo_kernels/testing/tolerance.py", "from benchmarks import timing"),
        ("setup.py", "import srpo"),
        ("csrc/build.py", "from srpo.config import load_config"),
    ],
)
def test_checker_finds_a_forbidden_import(file: str, source: str) -> None:
    (violation,) = _violations(file, f"import torch\n{source}\n")
    assert violation.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("srpo_kernels/ops/recover.py", "from __future__ import annotations\nimport math, torch\nimport torch.nn"),
        ("srpo_kernels/ops/recover.py", "from srpo_kernels.ops._checks import per_row\nfrom ._checks import per_row"),
        ("srpo_kernels/ops/recover.py", "'import diffusers'  # import srpo"),
        ("srpo_kernels/_triton/recover.py", "import triton.language as tl\nimport torch"),
        ("srpo_kernels/patching/flux.py", "from diffusers import FluxTransformer2DModel\nfrom ..ops import recover"),
        ("srpo_kernels/optim/adamw.py", "from srpo_kernels.ops import recover"),
        ("srpo/objective.py", "from srpo_kernels import recover\nimport srpo.errors\nimport diffusers"),
        ("benchmarks/step.py", "from srpo.objective import branches"),
        ("tests/test_cli.py", "import srpo.cli"),
        ("docs/update.py", "import srpo"),
        ("setup.py", "import srpo_kernels"),
    ],
)
def test_checker_lets_a_permitted_import_pass(file: str, source: str) -> None:
    assert _violations(file, source) == []


def _fresh(script: str) -> dict[str, list[str] | bool]:
    ran = subprocess.run([sys.executable, "-c", script], cwd=_ROOT, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_importing_the_kernels_needs_torch_only() -> None:
    """Nothing but torch, what torch itself imports, the standard library and the package; CUDA stays asleep."""
    seen = _fresh(
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import srpo_kernels\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps({'new': sorted(new), 'all': sorted(sys.modules), 'cuda': torch.cuda.is_initialized()}))"
    )
    new, everything = set(seen["new"]), set(seen["all"])  # type: ignore[arg-type]
    assert new <= {"srpo_kernels", "torch", *sys.stdlib_module_names}
    assert "srpo_kernels.ops.recover" in everything
    assert everything.isdisjoint({"triton", "diffusers", "transformers", "torchvision", "open_clip", "srpo"})
    assert seen["cuda"] is False
