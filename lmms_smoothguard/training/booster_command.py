"""`smoothguard train booster`: the options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmms_smoothguard import shared_options as shared


def booster(
    model: Annotated[
        str, typer.Option(help="A hub id, a directory with safetensors weights, or tiny-llava.")
    ] = "tiny-llava",
    data: Annotated[
        str, typer.Option(help="A directory of pictures, or scenes: generated ones, for the embedded model.")
    ] = "scenes",
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in the end, `booster/`.")] = Path(
        "runs/booster"
    ),
    vision_tower: shared.VisionTower = None,
    vision_tower_resolution: shared.VisionTowerResolution = "model",
    sigma_max: Annotated[float, typer.Option(help="The largest noise level, in [0, 1] pixel units.")] = 0.4,
    steps: Annotated[int, typer.Option(min=1, help="Of the purifier.")] = 3000,
    mapper_steps: Annotated[int, typer.Option(min=0, help="Of the mapper; 0 = no mapper.")] = 400,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    widths: Annotated[str, typer.Option(help="Channels of the purifier's levels.")] = "32,64,96",
    unshuffle: Annotated[
        int, typer.Option(min=1, help="Squares of that side become channels first: larger is cheaper.")
    ] = 2,
    feature_weight: Annotated[
        float, typer.Option(min=0.0, help="Of the features against the pixels in the purifier's loss.")
    ] = 1.0,
    mapper_hidden: Annotated[int, typer.Option(min=1, help="Inner width of the mapper's blocks.")] = 384,
    start: Annotated[
        str | None, typer.Option(help="A booster whose purifier to begin with: psm, a directory or a hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the steps; below 1 for a trial.")] = 1.0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; the GPU if there is one.")] = None,
) -> None:
    """Train purifier and mapper for a model that stays frozen. Started again, it goes on where it was."""
    from lmms_smoothguard.training.booster_session import recipe_of, train

    recipe = recipe_of(
        seed=seed,
        sigma_max=sigma_max,
        steps=steps,
        mapper_steps=mapper_steps,
        batch=batch,
        widths=widths,
        unshuffle=unshuffle,
        scale=scale,
        start=start,
        feature_weight=feature_weight,
        mapper_hidden=mapper_hidden,
    )
    train(
        model,
        data,
        out,
        recipe,
        vision_tower=vision_tower,
        vision_tower_resolution=vision_tower_resolution,
        device=device,
        scale=scale,
        checkpoint_every=checkpoint_every,
    )
