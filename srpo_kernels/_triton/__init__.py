"""Triton kernels and their launchers, one file per operator of `srpo_kernels.ops`, which checks their inputs.

Raises ImportError where Triton is missing or older than 3.6.
"""

import re

import triton

if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 6):
    raise ImportError(f"Triton {triton.__version__} is older than 3.6")
