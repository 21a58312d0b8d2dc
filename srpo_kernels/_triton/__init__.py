"""Triton kernels and their launchers, imported by name when they first run. Older Tritons than 3.6 raise ImportError."""

import re

import triton

if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < (3, 6):
    raise ImportError(f"Triton {triton.__version__} is older than 3.6")
