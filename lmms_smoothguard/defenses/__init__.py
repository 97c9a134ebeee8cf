"""Defences around a model's own `generate`."""

from __future__ import annotations

from lmms_smoothguard.defenses.request import Defended, Defense, Request, SmoothGuardOutput
from lmms_smoothguard.noise import Draw, Randomness

__all__ = ["Defended", "Defense", "Draw", "Randomness", "Request", "SmoothGuardOutput"]
