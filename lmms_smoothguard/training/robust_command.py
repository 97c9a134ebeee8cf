"""`smoothguard train fare` and `smoothguard train tecoa`: the options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Data = Annotated[
    str, typer.Option(help="`scenes` for generated ones, or a folder of pictures (TeCoA: a folder a class).")
]
_Eps = Annotated[str, typer.Option(help="Radius of the L-inf ball in [0, 1] pixel units, such as 4/255.")]
_Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
_Inner = Annotated[int, typer.Option(min=1, help="Steps of the attack within each.")]
_Batch = Annotated[int, typer.Option(min=1, help="Pictures a step.")]
_Rate = Annotated[
    float | None, typer.Option(help="Peak learning rate; 1e-5 as published for a ViT-L, more for the embedded models.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of order, random starts and generated scenes.")]
_Scenes = Annotated[int, typer.Option(min=1, help="How many scenes are generated.")]
_Noised = Annotated[
    float | None, typer.Option(help="Share of pictures with Gaussian noise; a quarter of scenes, none of a folder's.")
]
_Every = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]
_Questions = Annotated[int, typer.Option(min=1, help="Of the embedded models' figures, 900 at most.")]


def fare(
    model: Annotated[
        str, typer.Option(help="tiny-llava, tiny-clip, or a hub id or directory with a CLIP-type tower.")
    ] = "tiny-llava",
    data: _Data = "scenes",
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in the end, `model/`.")] = Path("runs/fare"),
    eps: _Eps = "4/255",
    steps: _Steps = 500,
    inner_steps: _Inner = 10,
    batch: _Batch = 32,
    lr: _Rate = None,
    tokens: Annotated[
        str,
        typer.Option(
            help="read: what the language model reads; class: the class token, as published; all: every token."
        ),
    ] = "read",
    seed: _Seed = 0,
    scenes: _Scenes = 16_000,
    faint_share: Annotated[float, typer.Option(min=0, max=1, help="Of the scenes.")] = 0.15,
    noised_share: _Noised = None,
    checkpoint_every: _Every = 50,
    device: _Device = None,
    questions: _Questions = 420,
) -> None:
    """Fine-tune a vision tower without labels to keep its features under attack (FARE). Started again, it goes on."""
    from lmms_smoothguard.training.robust_session import Asked, train

    train(Asked("fare", model, data, out, eps, steps, inner_steps, batch, lr, seed, scenes, checkpoint_every, questions,
                tokens=tokens, faint_share=faint_share, noised_share=noised_share, device=device))  # fmt: skip


def tecoa(
    model: Annotated[str, typer.Option(help="tiny-clip, or a hub id or directory of a CLIPModel.")] = "tiny-clip",
    data: _Data = "scenes",
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in the end, `model/`.")] = Path(
        "runs/tecoa"
    ),
    eps: _Eps = "4/255",
    steps: _Steps = 150,
    inner_steps: _Inner = 10,
    batch: _Batch = 32,
    lr: _Rate = None,
    seed: _Seed = 0,
    scenes: _Scenes = 4_000,
    noised_share: _Noised = None,
    checkpoint_every: _Every = 50,
    device: _Device = None,
    questions: _Questions = 420,
) -> None:
    """Fine-tune a dual encoder's vision tower to classify under attack (TeCoA). Started again, it goes on.

    Of generated scenes it takes those of one object alone.
    """
    from lmms_smoothguard.training.robust_session import Asked, train

    train(Asked("tecoa", model, data, out, eps, steps, inner_steps, batch, lr, seed, scenes, checkpoint_every, questions,
                noised_share=noised_share, device=device))  # fmt: skip
