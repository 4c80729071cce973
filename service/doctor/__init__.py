"""``errata doctor``: what is wrong with a stack, and what to do."""

from service.doctor.checks import Finding, Level
from service.doctor.examination import examine
from service.doctor.repair import repair

__all__ = ["Finding", "Level", "examine", "repair"]
