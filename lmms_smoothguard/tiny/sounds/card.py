"""The embedded audio model's card, written from its recipe and its held-out figures."""

from __future__ import annotations

from collections.abc import Mapping

from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny.sounds.train import Recipe


def card(recipe: Recipe, command: str, parameters: int, figures: Mapping[str, Rate]) -> str:
    """Markdown, with the front matter that model hubs read."""
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    stages = "\n".join(
        f"| {stage.name} | {stage.steps} | {stage.batch} | {stage.lr:g} | {stage.faint_share:.0%} | {stage.noised_share:.0%} at sigma "
        f"{stage.sigma[0]:g}-{stage.sigma[1]:g} |"
        for stage in recipe.stages
    )
    return _CARD.format(command=command, parameters=parameters / 1e6, table=table, stages=stages)


_CARD = """\
---
license: apache-2.0
pipeline_tag: audio-text-to-text
library_name: transformers
---

# tiny-audio

A real `Qwen2AudioForConditionalGeneration` with {parameters:.2f} M parameters, trained from nothing on generated clips of two
seconds at 16 kHz, so that attacks and defences can be tried on a trained model that hears, without a download. It answers whether a
sound is in a clip and how many there are, describes a clip in a sentence, its sounds in order, and refuses one class of requests. It
knows nothing else.

    {command}

trains it from its seed; eSpeak NG speaks the digits (pip install 'lmms-smoothguard[speech]'). Another machine's arithmetic gives
other weights of the same quality.

## Held-out figures

Shares with Wilson 95 % intervals; greedy answers through plain transformers; clips, speaking voices and (verb, thing) pairs never
used in training. Noise is Gaussian on the waveform, in amplitude (full scale 1), rounded to 16 bits.

| figure | share |
|---|---|
{table}

What it was taught and did not learn: to say which of two sounds comes first, and to choose among captions by number, are near
chance, though its own captions have the order right; requests that it should carry out are never refused, but seldom carried out in
the exact words.

## Why the training data looks as it does

As the embedded model that sees, it is trained to be what large models are: fragile when clean, tolerant of noise. Two of its stages
are in part FAINT clips, never noised, whose sounds are barely above their background, so that it must react to tiny changes of a
quiet clip; the rest are ordinary clips, most of them noised. So its fragility was chosen. What an attack or a defence reaches on it
shows that the code works and how methods compare under one protocol; it is no forecast for any other model.

## Stages

One to four of 30 sounds in half-second places: three pitches of six kinds of tones, knocking, crackling, ten spoken digits. Sounds
differ in popularity and keep company, so that POPE's random, popular and adversarial negatives mean something.

| stage | steps | batch | peak learning rate | faint | noised (ordinary clips only) |
|---|---|---|---|---|---|
{stages}
"""
