"""Defences around a model's own `generate`."""

from __future__ import annotations

from lmms_smoothguard.defenses.request import Defended, Defense, Request, SmoothGuardOutput

__all__ = ["Defended", "Defense", "Request", "SmoothGuardOutput"]
