"""The purifier P: a small noise-conditioned U-Net that takes noise out of pictures before the vision tower sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from lmms_smoothguard.boosting.extra import diffusers


@dataclasses.dataclass(frozen=True, kw_only=True)
class PurifierConfig:
    """unshuffle: squares of that side become channels before the first convolution, which is what makes a purifier cheap;
    widths: channels of each level of the U-Net, each at half the resolution of the one before; blocks: residual blocks a level."""

    unshuffle: int = 4
    widths: tuple[int, ...] = (32, 64)
    blocks: int = 1


class Purifier(torch.nn.Module):
    """x + e -> x: the U-Net of diffusers predicts what to take away, scaled with the noise level.

    Residual and scale make it the identity before training, and nearly so at noise level 0.
    """

    least = 0.02
    """At noise level 0 this much of the U-Net's answer is still taken away: what an attacker added, perhaps."""

    def __init__(self, config: PurifierConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = 3 * config.unshuffle**2, len(config.widths)
        self.net: Any = diffusers("a purifier").UNet2DModel(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
        )
        torch.nn.init.zeros_(self.net.conv_out.weight)
        torch.nn.init.zeros_(self.net.conv_out.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """pixels (batch, 3, height, width) in [0, 1] and noisy, sigma (batch,) -> the same, with less noise."""
        height, width = pixels.shape[-2:]
        fold = self.config.unshuffle * 2 ** (len(self.config.widths) - 1)
        padded = pad(pixels, (0, -width % fold, 0, -height % fold), mode="replicate")
        folded = pixel_unshuffle(padded * 2 - 1, self.config.unshuffle).contiguous(memory_format=torch.channels_last)
        found = pixel_shuffle(self.net(folded, sigma * 1000, return_dict=False)[0], self.config.unshuffle)
        scale = (self.least + sigma).view(-1, 1, 1, 1)
        return (pixels - scale * found[..., :height, :width].to(pixels.dtype)).clamp(0, 1)
