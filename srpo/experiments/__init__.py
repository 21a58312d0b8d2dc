"""The paper's claims, measured: `srpo experiment NAME` (docs/experiments.md)."""
