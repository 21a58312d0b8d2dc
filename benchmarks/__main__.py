"""``python -m benchmarks COMMAND``: measuring, comparing and reporting, with and without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from benchmarks.schema import ResultError

#: Command: module, whose `main` takes the arguments and returns the exit status; and what it does.
_ALL = {
    "list": ("benchmarks.listing", "what can be measured"),
    "env": ("benchmarks.environment", "what a run records of this machine"),
    "static": (
        "benchmarks.static.command",
        "compile for GPUs that are not there; hold the figures against pins",
    ),
    "kernels": ("benchmarks.kernels", "time operators against eager, torch.compile and Liger"),
    "optim": ("benchmarks.optim", "time optimizer steps against torch's and others'"),
    "step": ("benchmarks.step", "time the SRPO step by phase against reference steps"),
    "gpu": ("benchmarks.gpu", "the quick profile of everything, under ten minutes (make gpu)"),
    "ab": ("benchmarks.ab", "compare two revisions in processes that take turns"),
    "noise": ("benchmarks.noise", "measure this GPU's noise, which margins are made of"),
    "compare": ("benchmarks.compare", "compare two runs"),
    "pin": ("benchmarks.pin", "accept the static figures as they are, with a reason"),
    "history": ("benchmarks.history", "keep runs, find what two of them confirm"),
    "report": ("benchmarks.report.page", "HTML page, Markdown summary, pictures"),
}


def commands() -> dict[str, str]:
    """The module of every command that is there."""
    return {name: module for name, (module, _) in _ALL.items() if importlib.util.find_spec(module)}


def main(arguments: list[str]) -> int:
    """Exit status: 0 ok, 1 regression, 2 usage, 3 incomparable, 4 missing or failed, 5 inconclusive, 6 faster."""
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, *(f"  {name:8} {_ALL[name][1]}" for name in known), sep="\n")
        return 0 if arguments else 2
    if arguments[0] not in known:
        print(f"benchmarks: unknown command {arguments[0]!r}; commands are {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(known[arguments[0]]).main(arguments[1:])
    except ResultError as error:
        print(f"benchmarks {arguments[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
