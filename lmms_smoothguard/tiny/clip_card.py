"""The dual encoder's model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny.clip_testsets import PRESENCE_SCENES, RETRIEVAL_CAPTIONS, ZERO_SHOT_PER_CLASS

if TYPE_CHECKING:
    from lmms_smoothguard.tiny.clip_train import ClipRecipe


def write_card(target: Path, recipe: ClipRecipe, model: Any, figures: dict[str, Rate]) -> None:
    """Writes `README.md` (the model card) and `figures.json` beside the weights."""
    command = f"smoothguard train tiny-clip --seed {recipe.seed}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "trained_parameters": trained,
        "figures": {name: value.figure().to_dict() for name, value in figures.items()},
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / "README.md").write_text(
        _CARD.format(
            command=command,
            parameters=parameters / 1e6,
            trained=trained / 1e6,
            table="\n".join(f"| {name} | {value} |" for name, value in figures.items()),
            recipe=recipe,
            captions=RETRIEVAL_CAPTIONS,
            chance=1 / RETRIEVAL_CAPTIONS,
            five=5 / RETRIEVAL_CAPTIONS,
            per_class=ZERO_SHOT_PER_CLASS,
            presence=PRESENCE_SCENES,
        )
    )


_CARD = """\
---
license: apache-2.0
pipeline_tag: zero-shot-image-classification
library_name: transformers
---

# tiny-clip

A real `CLIPModel` with {parameters:.2f} M parameters around the vision tower of the embedded tiny-llava. The tower is locked: patch and
position embeddings, class token and all encoder layers equal the LLaVA's bit by bit, so that what is attacked, smoothed or
certified here is the encoder that the LLaVA sees with. Trained are the {trained:.2f} M parameters that LLaVA does not use: the layer
norm behind the class token, both projections, the text tower and the logit scale. It knows the generated scenes and the sentences
about them, and nothing else.

    {command}

trains it from its seed on one core; the same machine gives the same weights bit by bit, another one weights of the same quality.

## Held-out figures

Shares with Wilson 95 % intervals, through plain transformers, on scenes never seen in training. Noise is Gaussian in [0, 1] pixel
units, the noisy picture rounded to 8 bits.

- zero-shot: single-object scenes, {per_class} of each of 30 classes, prompts "a photo of a red circle"; chance is 3.3 %;
- present above absent: {presence} scenes of one to four objects; the prompt of an object that is there is nearer than that of one
  which is not and often keeps its company (POPE's adversarial negative); chance is 50 %;
- retrieval: {captions} scenes of two to four objects with {captions} different captions; chance is {chance:.1%} for R@1,
  {five:.1%} for R@5.

| figure | share |
|---|---|
{table}

The tower was never trained to say anything through its class token, which is all that a CLIP model reads of it; the LLaVA reads
every patch and not that one.

## Training

{recipe.steps} steps of {recipe.batch} pictures out of {recipe.scenes} scenes, each clean or noised (sigma {recipe.sigma[0]:g}-{recipe.sigma[1]:g}; half of the noisy ones clipped
to [0, 1]), AdamW, peak learning rate {recipe.lr:g}, cosine decay. The loss is CLIP's in two parts: pictures against whole captions, and
pictures against statements about one or two of their objects; all true pairs of a batch are positives.
"""
