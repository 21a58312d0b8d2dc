"""SRPO reward fine-tuning of FLUX (arXiv 2509.06942), on the operators of `srpo_kernels`."""
