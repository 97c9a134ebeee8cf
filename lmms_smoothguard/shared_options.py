"""Options that several commands have: which questions of the data, which model, which machine."""

from __future__ import annotations

from typing import Annotated

import typer

DATA = "The data"
MODEL = "The model"
MACHINE = "The machine"

Split = Annotated[str | None, typer.Option(rich_help_panel=DATA, help="Of a data set: test, or config:test.")]
Limit = Annotated[int | None, typer.Option(rich_help_panel=DATA, help="The first so many questions.")]
Question = Annotated[
    str | None,
    typer.Option(rich_help_panel=DATA, help="A text to ask about every picture or sound, or a column of questions."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        rich_help_panel=DATA,
        help="What a column is: --column label=answer; of id, images, sounds, question, label, target, group, accepted; none for none.",
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=DATA, help="Of an answer; a task's own, else 32.")
]
Match = Annotated[
    str, typer.Option(rich_help_panel=DATA, help="When an answer is right: exact, or contains an accepted one.")
]
VisionTower = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MODEL,
        help="Another CLIP tower: a hub id, directory or .safetensors file (transformers, open_clip), tiny-fare, tiny-tecoa.",
    ),
]
VisionTowerResolution = Annotated[
    str, typer.Option(rich_help_panel=MODEL, help="model, or source: a LLaVA sees pictures of the tower's size.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", rich_help_panel=MODEL, help="Run the checkpoint's own code.")
]
Device = Annotated[str | None, typer.Option(rich_help_panel=MACHINE, help="cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(rich_help_panel=MACHINE, help="auto, float32, bfloat16 or float16.")]
