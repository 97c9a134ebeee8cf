"""The mapper M: residual blocks behind the vision tower that turn features of purified pictures back to clean ones."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import gelu

_WAVES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """width: of the features; hidden: of a block's inner layer; blocks: residual blocks, one after the other."""

    width: int
    hidden: int = 384
    blocks: int = 2


class _Block(torch.nn.Module):
    """z -> z + g(z, mean token, sigma), g zero at first; the noise level scales and shifts (FiLM) the inner layer."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(config.width)
        self.inner = torch.nn.Linear(2 * config.width, config.hidden)
        self.outer = torch.nn.Linear(config.hidden, config.width)
        self.film = torch.nn.Sequential(
            torch.nn.Linear(2 * _WAVES, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2 * config.hidden)
        )
        torch.nn.init.zeros_(self.outer.weight)
        torch.nn.init.zeros_(self.outer.bias)

    def forward(self, features: torch.Tensor, waves: torch.Tensor) -> torch.Tensor:
        normed = self.norm(features)
        seen = torch.cat([normed, normed.mean(1, keepdim=True).expand_as(normed)], dim=-1)
        scale, shift = self.film(waves)[:, None].chunk(2, dim=-1)
        return features + self.outer(gelu(self.inner(seen) * (1 + scale) + shift))


class Mapper(torch.nn.Module):
    """Residual FiLM blocks on every token and the mean of all: the identity until it is trained."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = torch.nn.ModuleList(_Block(config) for _ in range(config.blocks))

    def forward(self, features: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """features (batch, tokens, width), sigma (batch,) -> the same shape."""
        angles = 10 * sigma[:, None] * torch.arange(1, _WAVES + 1, device=sigma.device, dtype=sigma.dtype)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        for block in self.blocks:
            features = block(features, waves)
        return features
