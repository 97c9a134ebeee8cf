"""Seeded Gaussian noise on pixels and waveforms.

A draw is a function of (seed, the unpadded image or clip, its number among equals in its row, copy): never of N, of the batch or of
anybody's random state. It is made in float32 on the CPU, so that every device sees the same bits.
"""

from lmms_smoothguard.noise.pixels import NoiseSource, add_noise
from lmms_smoothguard.noise.randomness import NOISE, Draw, Inside, Randomness, draw_noise
from lmms_smoothguard.noise.seeds import fresh_seed
from lmms_smoothguard.noise.waveforms import WaveformNoise, add_waveform_noise, draw_waveform_noise

__all__ = ["NOISE", "Draw", "Inside", "NoiseSource", "Randomness", "WaveformNoise", "add_noise", "add_waveform_noise", "draw_noise",
           "draw_waveform_noise", "fresh_seed"]  # fmt: skip
