"""The model card of a robust tower."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmms_smoothguard.evaluation.means import Mean
from lmms_smoothguard.evaluation.rates import Rate

if TYPE_CHECKING:
    from lmms_smoothguard.training.robust import RobustTrainer


@dataclass(frozen=True)
class Figures:
    """One figure before the training and after it."""

    name: str
    before: Rate | Mean
    after: Rate | Mean

    def __str__(self) -> str:
        return f"{self.name}: {shown(self.before)} before, {shown(self.after)} after"


def shown(figure: Rate | Mean) -> str:
    """A figure with its interval and count."""
    if isinstance(figure, Rate):
        return str(figure)
    interval = "" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}, "
    return f"{figure.value:.3f} ({interval}n = {figure.count})"


def write_card(target: Path, command: str, trainer: RobustTrainer, figures: list[Figures]) -> None:
    """Writes `README.md` (the model card) and `figures.json` beside the weights."""
    recipe, subject = trainer.recipe, trainer.subject
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "data": trainer.source.identity,
        "figures": {
            f.name: {"before": f.before.figure().to_dict(), "after": f.after.figure().to_dict()} for f in figures
        },
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    noised = f", {100 * recipe.noised_share:g} % of them with Gaussian noise of sigma {recipe.sigma[0]:g}-{recipe.sigma[1]:g}"
    (target / "README.md").write_text(
        _CARD.format(
            base=subject.name if "/" not in subject.name else Path(subject.name).name,
            title={"fare": "FARE", "tecoa": "TeCoA"}[recipe.method],
            what=_WHAT[recipe.method].format(tokens=trainer.reader, classes=len(trainer.source.classes)),
            eps=f"{recipe.eps:.4f} ({255 * recipe.eps:g}/255)",
            command=command,
            data=trainer.source.identity.removesuffix(", all") + (noised if recipe.noised_share else ""),
            table="\n".join(f"| {f.name} | {shown(f.before)} | {shown(f.after)} |" for f in figures),
            recipe=recipe,
        )
    )


_WHAT = {
    "fare": """FARE (Schlarmann et al. 2024, arXiv 2402.12336), unsupervised: the loss is the squared distance, summed over {tokens}, of the
attacked picture's features from those that the original tower gives of the clean picture. The paper takes the class token.""",
    "tecoa": """TeCoA (Mao et al. 2023, arXiv 2212.07016), supervised: the loss is the cross-entropy of the dual encoder's zero-shot
classification among {classes} class prompts ("a photo of a ..."), of attacked pictures. Text tower and projections stay as they were.""",
}

_CARD = """\
---
license: apache-2.0
library_name: transformers
---

# {title} vision tower of {base}

A `CLIPVisionModel` (fp16 safetensors, image processor beside it), fine-tuned against L-inf attacks of radius {eps}.
{what}

    {command}

trains it. A run that is killed and resumed ends with the same weights bit by bit; another machine, or another number of threads,
may give other weights of the same quality.

## Held-out figures

Of the tower as stored, rounded to fp16; rates with Wilson 95 % intervals, means with Student's; pictures never seen in training.
Every attack is crafted on the very model it is measured on (before: on the original, after: on the tuned one), white-box; on
features and zero-shot classification it is computed in bfloat16, and the attacked pictures of questions are rounded to 8 bits. PGD
alone is no proof of robustness: stronger attacks may find more. `asr` is the share of the questions that the model itself gets right clean
which it gets wrong under attack.

| figure | original tower | this tower |
|---|---|---|
{table}

## Training

{recipe.steps} steps of {recipe.batch} pictures ({data}); {recipe.inner_steps} steps of PGD within each, from a random start;
AdamW, peak learning rate {recipe.lr:g}, cosine decay, weight decay {recipe.weight_decay:g}.
"""
