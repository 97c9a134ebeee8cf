"""The geometry of Square Attack: how large the squares are, where they lie, what is painted into them.

Everything is batched over rows; each row's chance is a column of uniform numbers of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch

from lmms_smoothguard.attacks.pictures import norms

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Section 3.2: after which of the squares, in ten-thousandths of all queries, the share of changed pixels is halved."""


def side(number: int, total: int, share: float, shape: torch.Size, *, odd: bool = False) -> int:
    """The side, in pixels, of square `number` (from 0) of `total`; `share` of the picture (..., height, width) at first.

    odd: as L2 squares are, which have a middle; 3 at least.
    """
    height, width = shape[-2:]
    halvings = bisect_left(_HALVINGS, number * 10_000 // total)
    found = round((share * 0.5**halvings * height * width) ** 0.5)
    if odd:
        found = max(found, 3) | 1
    limit = min(height, width)
    return min(max(found, 1), limit - (odd and limit % 2 == 0))


class Window(NamedTuple):
    """A square of one size in every row: `rows` (batch, 1, 1), `down` (batch, side, 1) and `across` (batch, 1, side) index
    pictures."""

    rows: torch.Tensor
    down: torch.Tensor
    across: torch.Tensor

    @classmethod
    def at(cls, chance: torch.Tensor, size: int, shape: torch.Size) -> Window:
        """chance: (batch, 2) uniform numbers in [0, 1) that say where, evenly over all places inside the picture."""
        free = torch.tensor([extent - size + 1 for extent in shape[-2:]], device=chance.device)
        corner = torch.minimum((chance * free).long(), free - 1)
        offsets = torch.arange(size, device=chance.device)
        rows = torch.arange(len(chance), device=chance.device)
        return cls(rows[:, None, None], corner[:, :1, None] + offsets[:, None], corner[:, 1:, None] + offsets)

    def read(self, pictures: torch.Tensor) -> torch.Tensor:
        """(batch, channels, side, side)."""
        return pictures.permute(0, 2, 3, 1)[self.rows, self.down, self.across].permute(0, 3, 1, 2)

    def painted(self, pictures: torch.Tensor, content: torch.Tensor | float) -> torch.Tensor:
        """A copy with `content`, broadcast to (batch, channels, side, side), in the squares."""
        new = pictures.clone()
        value = torch.as_tensor(content, dtype=pictures.dtype, device=pictures.device)
        if value.ndim:
            value = value.permute(0, 2, 3, 1)
        new.permute(0, 2, 3, 1)[self.rows, self.down, self.across] = value
        return new


def bump(size: int) -> torch.Tensor:
    """(size, size): eta of section 3.4, a hill beside a valley, each falling off from its middle."""
    left = size // 2
    return torch.cat([_hill(size, left), -_hill(size, size - left)], dim=1)


def _hill(height: int, width: int) -> torch.Tensor:
    """(height, width): sum over k <= M(r, s) of 1 / (n + 1 - k)^2, with n = height // 2."""
    middle = height // 2
    down = (torch.arange(height) - middle).abs()
    across = (torch.arange(width) - width // 2).abs()
    depth = middle - torch.maximum(down[:, None], across[None, :])
    heights = (1 / (middle + 1 - torch.arange(middle + 1)).double() ** 2).cumsum(0).float()
    return heights[depth.clamp(0, middle)]


def tiles(signs: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(batch, channels, height, width): the first L2 change, bumps side by side, some five a side; its norm is not yet that
    of a budget. signs: (batch, channels * height * width at least) of -1 and 1."""
    channels, height, width = shape[-3:]
    size = max(1, min(height, width) // 5)
    down, across = height // size, width // size
    count = channels * down * across
    grid = signs[:, :count].reshape(-1, channels, down, across)
    filled = torch.kron(grid, torch.ones(size, size, device=signs.device)) * bump(size).to(signs).repeat(down, across)
    above, before = (height - down * size) // 2, (width - across * size) // 2
    whole = torch.zeros(len(signs), channels, height, width, device=signs.device)
    whole[:, :, above : above + down * size, before : before + across * size] = filled
    return whole


def moved(change: torch.Tensor, eps: float, new: Window, old: Window, pattern: torch.Tensor) -> torch.Tensor:
    """Algorithm 3: what `old` holds of an L2 change (batch, channels, height, width), and what of `eps` is unused, goes into
    `new` as `pattern` (batch, channels, side, side) over what stands there."""
    unused = (eps**2 - norms(change) ** 2).clamp(min=0) / change.shape[1]
    outside = new.painted(old.painted(change, 0.0), 0.0)
    taken = (change**2 - outside**2).sum((2, 3), keepdim=True).clamp(min=0)
    here = new.read(change)
    content = pattern / _lengths(pattern) + here / _lengths(here)
    content = content / _lengths(content) * (taken + unused).sqrt()
    return new.painted(old.painted(change, 0.0), content)


def _lengths(patches: torch.Tensor) -> torch.Tensor:
    """L2 norms a channel."""
    return (patches**2).sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)
