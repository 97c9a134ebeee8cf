"""A pretrained unconditional diffusion model as a purifier: one step of denoising at the matching noise level.

After Carlini et al. 2023, "(Certified!!) Adversarial Robustness for Free!" (arXiv 2206.10550), section 3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from lmms_smoothguard.boosting.booster import Booster
from lmms_smoothguard.boosting.extra import diffusers
from lmms_smoothguard.errors import ConfigError

_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Denoiser(torch.nn.Module):
    """x + e -> the diffusion model's guess of x, from the one step t at which its noise is as large as e.

    alphas: the scheduler's cumulative products (steps,): at step t pictures are sqrt(alpha) x + sqrt(1 - alpha) e on [-1, 1].
    """

    def __init__(self, net: Any, alphas: torch.Tensor, prediction: str) -> None:
        super().__init__()
        self.net, self.prediction = net, prediction
        self.register_buffer("alphas", alphas.float())
        self.fold = 2 ** (len(net.config.block_out_channels) - 1)

    @property
    def sigmas(self) -> tuple[float, float]:
        """The noise levels in [0, 1] pixel units that its steps stand for."""
        levels = self._levels()
        return float(levels.min()), float(levels.max())

    def _levels(self) -> torch.Tensor:
        alphas: torch.Tensor = self.alphas  # type: ignore[assignment]
        return ((1 - alphas) / alphas).sqrt() / 2  # [-1, 1] is twice as wide as [0, 1]

    def forward(self, pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """pixels (batch, 3, height, width) in [0, 1] and noisy, sigma (batch,) -> the same, without noise."""
        height, width = pixels.shape[-2:]
        step = (self._levels()[None] - sigma[:, None]).abs().argmin(1)
        alpha = self.alphas[step].view(-1, 1, 1, 1)  # type: ignore[index]
        padded = pad(pixels, (0, -width % self.fold, 0, -height % self.fold), mode="replicate")
        noised = alpha.sqrt() * (padded * 2 - 1)
        found = self.net(noised.to(self.net.dtype), step, return_dict=False)[0][
            :, :3
        ].float()  # further channels are variances
        if self.prediction == "epsilon":
            found = (noised - (1 - alpha).sqrt() * found) / alpha.sqrt()
        elif self.prediction == "v_prediction":
            found = alpha.sqrt() * noised - (1 - alpha).sqrt() * found
        return ((found[..., :height, :width] + 1) / 2).clamp(0, 1)


def read_denoiser(directory: Path) -> Booster:
    """The denoiser of a diffusers pipeline (`unet/` and `scheduler/`, or both configs side by side), as a booster without mapper.

    Raises ConfigError for a directory without them, a conditional model, weights that are no safetensors.
    """
    library = diffusers("a diffusion model as purifier")
    unet = directory / "unet" if (directory / "unet").is_dir() else directory
    scheduler = directory / "scheduler" if (directory / "scheduler").is_dir() else directory
    try:
        kind = json.loads((unet / "config.json").read_text()).get("_class_name")
        if kind != "UNet2DModel":
            raise ConfigError(
                f"{directory} holds a {kind}; expected a booster, or an unconditional diffusion model (diffusers' UNet2DModel)"
            )
        net = library.UNet2DModel.from_pretrained(unet, use_safetensors=True).requires_grad_(False).eval()
        plan = library.DDPMScheduler.from_pretrained(scheduler)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{directory} is neither a booster nor a diffusers pipeline that can be loaded ({str(error).splitlines()[0]}); expected "
            "what `smoothguard train booster` writes, or unet/ and scheduler/ with safetensors weights"
        ) from error
    if net.config.in_channels != 3 or plan.config.prediction_type not in _PREDICTIONS:
        raise ConfigError(
            f"the diffusion model in {directory} takes {net.config.in_channels} channels and predicts "
            f"{plan.config.prediction_type}; expected 3 and one of {', '.join(_PREDICTIONS)}: one that works on pixels"
        )
    denoiser = Denoiser(net, plan.alphas_cumprod, plan.config.prediction_type)
    return Booster(denoiser, sigmas=denoiser.sigmas, source=str(directory))
