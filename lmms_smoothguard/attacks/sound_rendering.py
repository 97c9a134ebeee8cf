"""From waveforms to the features that the model is given, differentiably: padded, cut and transformed as its processor does it.

Which way a processor goes is found on the clean clips: the one whose features are those that the ordinary path gave, every time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.errors import AttackError, UndefendableError
from lmms_smoothguard.inputs.log_mel import LogMel

FEATURES = "input_features"
_TOO_FAR = 2e-3
"""Mean absolute difference from the ordinary path's features, of which one unit is 40 dB. Two ways to the same spectrum, on two
devices, differ by less than a tenth of it; another resampling or loudness by more."""
_FARTHEST = 0.05
"""The largest of all differences: another end of a clip changes its last frame alone."""
_COARSE = 0.02
log = logging.getLogger(__name__)


class SoundRenderer:
    """Renders a batch of clips to log-mel features.

    processor: the model's whole processor, or its feature extractor alone. Raises AttackError for an extractor other than Whisper's.
    """

    def __init__(self, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        extractor = getattr(processor, "feature_extractor", processor)
        try:
            self._features = LogMel(extractor)
        except UndefendableError as error:
            raise AttackError(f"{error}. Attacks on the sounds of this model are not supported.") from error
        self.key = FEATURES
        self.rate = int(extractor.sampling_rate)
        self._hop, self._window = int(extractor.hop_length), int(extractor.n_samples)
        self._device, self._dtype = device, dtype
        self._length = self._window
        self._arrange: Callable[[torch.Tensor], torch.Tensor] = self._one_window

    @property
    def window(self) -> int:
        """How many samples the model hears at once."""
        return self._window

    def __call__(self, sounds: Slots) -> dict[str, torch.Tensor]:
        """The features of the whole batch: clips in the order of rows, then slots, and each clip's windows one after the other."""
        clips = [self._arrange(slot.to(self._device)) for slot in sounds]
        return {self.key: torch.cat(clips, dim=1).flatten(0, 1).to(self._dtype)}

    def check(self, clean: Slots, captured: Mapping[str, Any], key: str) -> list[float]:
        """Each request's mean difference between the clean clips rendered here and what the ordinary path made of them. Raises
        AttackError where they are not the same."""
        if key not in captured:
            raise AttackError(
                f"the request has no {key} (it has {', '.join(captured)}), which is what is attacked; expected a model that takes "
                "its sounds so"
            )
        expected = captured[key].to(self._device).float()
        framed, longest = int(expected.shape[-1]) * self._hop, max(slot.shape[1] for slot in clean)
        problem = ""
        ways = (
            (self._one_window, framed),
            (self._one_window, longest),
            (self._windows, self._window),
            (self._cut_features, self._window),
        )
        for way in ways:
            self._arrange, self._length = way
            rendered = self(clean)[key].float()
            if rendered.shape != expected.shape:
                problem = problem or f"shape {tuple(rendered.shape)} instead of {tuple(expected.shape)}"
                continue
            gaps = self.gaps(clean, captured)
            if max(gaps) <= _TOO_FAR and float((rendered - expected).abs().max()) <= _FARTHEST:
                return gaps
            problem = f"{max(gaps):.3g} off on average in one request, where 1 is 40 dB"
        raise AttackError(
            f"the differentiable preprocessing does not reproduce {key}: {problem}. The caller preprocesses sounds in a way of "
            "its own, so an attack would be scored on other sounds than it was crafted on."
        )

    def gaps(self, sounds: Slots, captured: Mapping[str, Any]) -> list[float]:
        """Each request's mean difference between sounds rendered here and captured features."""
        apart = self(sounds)[self.key].float() - captured[self.key].to(self._device).float()
        found: list[float] = apart.abs().reshape(len(sounds[0]), -1).mean(1).tolist()
        return found

    # -- what processors do to (batch, samples): (batch, windows, mels, frames) ----------------------------------------------------

    def _one_window(self, clips: torch.Tensor) -> torch.Tensor:
        """Padded or cut to one length: what the features have frames for (Qwen2-Audio), or the longest clip's."""
        return self._features(_fitted(clips, self._length))[:, None]

    def _windows(self, clips: torch.Tensor) -> torch.Tensor:
        """Padded to whole windows, each with a spectrum of its own (GLM-ASR)."""
        count = -(-clips.shape[1] // self._length)
        windows = _fitted(clips, count * self._length).reshape(-1, self._length)
        return self._features(windows).unflatten(0, (len(clips), count))

    def _cut_features(self, clips: torch.Tensor) -> torch.Tensor:
        """Padded to whole windows, and one spectrum of all cut into them (Voxtral)."""
        count = -(-clips.shape[1] // self._length)
        whole = self._features(_fitted(clips, count * self._length))
        return whole.unflatten(2, (count, -1)).transpose(1, 2)


def warn_of_rounding(gaps: Sequence[float]) -> None:
    """Says where clips are other ones in 16 bits. gaps: how far each request's features are from those of its own samples."""
    if max(gaps) > _COARSE:
        log.warning(
            "a clip is another one as 16-bit PCM (%.3g off on average, where 1 is 40 dB): it goes beyond full scale, or is fainter "
            "than 16 bits can say; the attack starts from the 16-bit one",
            max(gaps),
        )


def _fitted(clips: torch.Tensor, samples: int) -> torch.Tensor:
    """Cut, or followed by silence."""
    return pad(clips[:, :samples], (0, max(0, samples - clips.shape[1])))
