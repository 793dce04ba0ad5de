"""PEFT methods of our own: once this is imported, PEFT loads their adapters as any other's."""

from __future__ import annotations

from clpeft.tuners.bottleneck import BottleneckConfig, BottleneckModel
from clpeft.tuners.lisa_hybrid import LisaHybridConfig, LisaHybridModel

__all__ = ["BottleneckConfig", "BottleneckModel", "LisaHybridConfig", "LisaHybridModel"]
