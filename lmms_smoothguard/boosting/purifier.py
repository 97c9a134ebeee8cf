"""The purifier P: a small noise-conditioned U-Net that takes noise out of pictures before the vision tower sees them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from lmms_smoothguard.boosting.extra import diffusers

_EMBEDDING = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PurifierConfig:
    """unshuffle: squares of that side become channels before the first convolution, which is what makes a purifier cheap;
    widths: channels of each level of the U-Net, each at half the resolution of the one before."""

    unshuffle: int = 2
    widths: tuple[int, ...] = (32, 64, 96)


class Purifier(torch.nn.Module):
    """x + e -> x: a U-Net of diffusers' residual blocks, conditioned on the noise level, predicts what to take away.

    One block a level on either side and two at the bottom: half the parameters of diffusers' own U-Net of the same widths. What is
    taken away is scaled with the noise level, and is nothing before training.
    """

    least = 0.02
    """At noise level 0 this much of the U-Net's answer is still taken away: what an attacker added, perhaps."""

    def __init__(self, config: PurifierConfig) -> None:
        super().__init__()
        self.config = config
        widths, channels = config.widths, 3 * config.unshuffle**2
        diffusers("a purifier")
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.resnet import ResnetBlock2D

        def block(before: int, after: int) -> Any:
            return ResnetBlock2D(
                in_channels=before,
                out_channels=after,
                temb_channels=_EMBEDDING,
                groups=8,
                time_embedding_norm="scale_shift",
            )

        deeper = list(itertools.pairwise(widths))
        self.waves = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(32, _EMBEDDING)
        self.enter = torch.nn.Conv2d(channels, widths[0], 3, padding=1)
        self.encode = torch.nn.ModuleList(block(width, width) for width in widths[:-1])
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(upper, lower, 2, 2) for upper, lower in deeper)
        self.bottom = torch.nn.ModuleList(block(widths[-1], widths[-1]) for _ in range(2))
        self.up = torch.nn.ModuleList(torch.nn.Conv2d(lower, 4 * upper, 1) for upper, lower in deeper)
        self.decode = torch.nn.ModuleList(block(2 * width, width) for width in widths[:-1])
        self.leave = torch.nn.Conv2d(widths[0], channels, 3, padding=1)
        for parameter in self.leave.parameters():
            torch.nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """pixels (batch, 3, height, width) in [0, 1] and noisy, sigma (batch,) -> the same, with less noise."""
        height, width = pixels.shape[-2:]
        fold = self.config.unshuffle * 2 ** (len(self.config.widths) - 1)
        padded = pad(pixels, (0, -width % fold, 0, -height % fold), mode="replicate")
        folded = pixel_unshuffle(padded * 2 - 1, self.config.unshuffle).contiguous(memory_format=torch.channels_last)
        found = pixel_shuffle(self._predicted(folded, sigma), self.config.unshuffle)
        scale = (self.least + sigma).view(-1, 1, 1, 1)
        return (pixels - scale * found[..., :height, :width].to(pixels.dtype)).clamp(0, 1)

    def _predicted(self, folded: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = self.embedding(self.waves(sigma * 1000).to(folded.dtype))
        here, passed = self.enter(folded), []
        for encode, down in zip(self.encode, self.down, strict=True):
            passed.append(encode(here, level))
            here = down(passed[-1])
        for block in self.bottom:
            here = block(here, level)
        for decode, up in zip(reversed(self.decode), reversed(self.up), strict=True):
            here = decode(torch.cat([pixel_shuffle(up(here), 2), passed.pop()], dim=1), level)
        found: torch.Tensor = self.leave(here)
        return found
