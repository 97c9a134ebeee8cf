"""The clips of one attacked sample, to be heard, and their spectrograms, to be seen."""

from __future__ import annotations

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.report.gallery import Exhibit, Exhibits, Gallery
from lmms_smoothguard.sounds import Sound, sound_of

_LOUD = 0.1
"""Full scale 1: how loud the magnified change may be at most."""
_FLOOR = 80.0
"""Decibels below the clean clip's loudest spot where the spectrograms' scale ends."""
_WINDOW = 0.025
"""Seconds of a spectrogram's window; it moves on by half of it."""


class ClipGallery(Gallery):
    """Clips are 16-bit PCM, as they are scored; the spectrograms of a sample have one scale."""

    medium = "sound"

    def of(self, sample: Sample) -> Exhibits:
        adversarial = self.entry(sample).sounds[0]
        clean = sound_of(self.document(sample)["audio"]).at(adversarial.rate)
        clean = Sound.from_pcm(clean.pcm, clean.rate)
        change = adversarial.samples - clean.samples
        largest = float(np.abs(change).max())
        self.check(sample, largest)
        magnified = max(1, int(_LOUD / largest)) if largest else 1
        apart = sample.info.get("attack_snr")
        shown = {
            "clean": clean,
            "adversarial": adversarial,
            "difference": Sound(magnified * change, clean.rate),
            "noisy": self._noisy(adversarial),
        }
        loudest = float(_power(clean).max())
        return Exhibits(
            {kind: Exhibit(spectrogram(sound, loudest), sound.wav) for kind, sound in shown.items()},  # type: ignore[misc]
            magnified,
            f"at most {largest:.4f} of full scale" + ("" if apart is None else f", {apart:.0f} dB below the clip"),
        )

    def _noisy(self, sound: Sound) -> Sound:
        """Copy 1 as the defence drew it: same clip, settings and seed, hence the same noise."""
        from hf_integration import protect
        from lmms_smoothguard.inputs.media import find_media
        from lmms_smoothguard.noise import WaveformNoise

        processor = protect(self.processor)
        inputs = processor(
            text=processor.audio_token, audio=[sound.samples], sampling_rate=sound.rate, return_tensors="pt"
        )
        media = find_media(inputs, self.model_config)
        if media is None or media.sounds is None:
            raise SmoothGuardError(
                f"the processor in {self._model} gives no features of sounds to show a noisy copy by"
            )
        config = self._config
        noise = WaveformNoise(media.sounds, sigma=config.audio_sigma, snr=config.audio_snr, seed=config.seed)
        return Sound(noise.clips(1)[0], sound.rate)


def spectrogram(sound: Sound, loudest: float) -> np.ndarray:
    """(frequencies, times, 3) uint8, low notes below: from `loudest`, a power, down by `_FLOOR` decibels."""
    from matplotlib import colormaps

    decibels = 10 * np.log10(np.maximum(_power(sound), 1e-12 * loudest) / loudest)
    shades: np.ndarray = colormaps["magma"](np.clip(1 + decibels / _FLOOR, 0, 1))
    return (255 * shades[::-1, :, :3]).round().astype(np.uint8)


def _power(sound: Sound) -> np.ndarray:
    """(frequencies, times)."""
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    width = max(2, round(_WINDOW * sound.rate))
    made: np.ndarray = ShortTimeFFT(hann(width), hop=width // 2, fs=sound.rate).spectrogram(sound.samples)
    return np.maximum(made, np.finfo(np.float64).tiny)
