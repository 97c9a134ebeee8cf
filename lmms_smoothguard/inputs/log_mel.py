"""Whisper's log-mel spectrogram in torch, with gradients: the copy of a feature extractor that attacks and training go through."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lmms_smoothguard.errors import UndefendableError


class LogMel:
    """What a `WhisperFeatureExtractor` makes of clips that are padded already.

    Raises UndefendableError for an extractor that does more than that: dither draws noise of its own, and what is no Whisper
    extractor is computed in another way.
    """

    def __init__(self, extractor: Any) -> None:
        from transformers import WhisperFeatureExtractor

        if not isinstance(extractor, WhisperFeatureExtractor) or bool(getattr(extractor, "dither", 0.0)):
            raise UndefendableError(
                f"the features of {type(extractor).__name__} have no differentiable copy; expected a WhisperFeatureExtractor without dither"
            )
        self._size, self._hop = int(extractor.n_fft), int(extractor.hop_length)
        self._filters = torch.from_numpy(np.asarray(extractor.mel_filters, np.float32)).T
        self._window = torch.hann_window(self._size)

    def __call__(self, sounds: torch.Tensor) -> torch.Tensor:
        """(clips, samples), full scale 1 and more samples than half a frame -> (clips, mels, samples // hop)."""
        window, filters = self._window.to(sounds.device), self._filters.to(sounds.device)
        half = self._size // 2
        # As stft(center=True) pads; its own reflection has no deterministic gradient on GPUs.
        padded = torch.cat([sounds[:, 1 : half + 1].flip(-1), sounds, sounds[:, -half - 1 : -1].flip(-1)], dim=-1)
        spectrum = torch.stft(padded, self._size, self._hop, window=window, center=False, return_complex=True)[..., :-1]
        power = spectrum.real.square() + spectrum.imag.square()
        logarithm = (filters @ power).clamp(min=1e-10).log10()
        floor = logarithm.amax(dim=(-2, -1), keepdim=True) - 8.0
        return (torch.maximum(logarithm, floor) + 4.0) / 4.0
