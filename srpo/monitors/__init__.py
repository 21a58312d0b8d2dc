"""Monitors against reward hacking: what validation images and velocities measure, against step 0 of the same run.

`srpo.validation` applies them. A measurement is a pure function of the weights and of the recipe.
"""

from srpo.monitors.catalog import MONITORS, Limit, Monitor, harm_of, monitor_of
from srpo.monitors.config import ValidationConfig

__all__ = ["MONITORS", "Limit", "Monitor", "ValidationConfig", "harm_of", "monitor_of"]
