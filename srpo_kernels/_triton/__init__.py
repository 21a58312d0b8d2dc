"""Triton kernels and their launchers, one file per operator of `srpo_kernels.ops`, which checks their inputs."""
