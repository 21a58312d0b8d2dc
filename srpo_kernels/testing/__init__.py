"""How operators are checked: error budgets, poisoned outputs, compilation for GPUs that are not there."""

from srpo_kernels.testing.budget import assert_within_budget, check_against_reference
from srpo_kernels.testing.poison import poisoned_outputs

__all__ = ["assert_within_budget", "check_against_reference", "poisoned_outputs"]
