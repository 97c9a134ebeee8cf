"""Defences around a model's own `generate`."""

from __future__ import annotations

from lmms_smoothguard.defenses.request import Defended, Request, SmoothGuardOutput

__all__ = ["Defended", "Request", "SmoothGuardOutput"]
