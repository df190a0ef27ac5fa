"""Which split of a model fits which devices, and how fast it would be. Torch-free; nothing here runs a model.

A ``ServingSpec`` says what is served, a ``Fleet`` on what. ``choose`` gives the best shard plan, ``make_report`` the
plan with its reasons and alternatives; ``draw`` in ``plot.py`` needs matplotlib. What ``__all__`` names is public.
"""

from .devices import Device, Efficiency, Fleet, cpu_device, known_devices, parse_fleet
from .memory import Workload
from .report import PlanReport, make_report
from .roofline import Rate, decode_rate, prefill_rate
from .search import Candidate, ServingSpec, candidates, choose, least_devices
from .storage import Storage

__all__ = [
    "Candidate",
    "Device",
    "Efficiency",
    "Fleet",
    "PlanReport",
    "Rate",
    "ServingSpec",
    "Storage",
    "Workload",
    "candidates",
    "choose",
    "cpu_device",
    "decode_rate",
    "known_devices",
    "least_devices",
    "make_report",
    "parse_fleet",
    "prefill_rate",
]
