"""What becomes of a request to a model of one type: the row of the coverage table, found by running it.

    python tests/tiny_models/probe.py llava qwen2_vl ...

Every check compares with something the defence did not make: separate calls of the undefended model, a painted colour's
normalised value, sigma / image_std.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.rendering import EXACT_ENOUGH, Renderer
from lmms_smoothguard.attacks.sound_rendering import SoundRenderer
from lmms_smoothguard.errors import AttackError, UndefendableError
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.media import find_images, find_media
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource, WaveformNoise
from tiny_models.sounds import tone
from tiny_models.subject import Subject, row_of

YES = "yes"
COLOUR = (90, 150, 176)
CHECKS = ("one", "several", "batch", "noise", "gradient", "attack")


@dataclass
class Coverage:
    """`key` and `layout` of the pixels, and of every check: "yes", or "refused: ..." with the defence's (or attack's) own words,
    or "WRONG: ..." where something was answered that should not have been, or "-" with why it was not tried."""

    name: str
    model: str = ""
    several: bool = True
    key: str = ""
    layout: str = ""
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Defended, whatever a request looks like, with noise of the right size; attackable through its own tensor."""
        several = YES if self.several else self.checks.get("several")
        return self.checks.get("several") == several and all(
            self.checks.get(check) == YES for check in ("one", "batch", "noise", "gradient")
        )

    @property
    def wrong(self) -> bool:
        return any(found.startswith("WRONG") for found in self.checks.values())


def probe(name: str) -> Coverage:
    """All that one type does; only what is nobody's refusal is raised."""
    subject = Subject(name)
    found = Coverage(name, type(subject.model).__name__, subject.kind.several)
    square, wide, tall = _pictures()
    one = subject.inputs(row_of(wide))
    try:
        images, sounds = find_media(one, subject.model.config) or (None, None)
    except UndefendableError as error:
        images = sounds = None
        found.layout = f"refused: {error}"
    if images is not None:
        found.key, found.layout = images.key, type(images.layout).__name__
    elif sounds is not None:
        found.key, found.layout = sounds.key, "clips"
    other = "Describe the image." if subject.kind.several else "What is it?"
    shapes = {
        "one": [row_of(wide)],
        "several": [row_of(square, tall)],
        "batch": [row_of(square), row_of(wide, text=other), row_of(tall)],
    }
    for check, rows in shapes.items():
        found.checks[check] = _guarded(_answers, subject, rows)
    if images is not None or found.layout:
        found.checks["noise"] = _guarded(_noise if found.layout != "clips" else _noise_of_sounds, subject)
        found.checks["gradient"] = _guarded(_gradient, subject, one)
        attack = _attack if found.layout != "clips" else _attack_on_sounds
        found.checks["attack"] = _guarded(attack, subject, (wide, tall) if subject.kind.several else (wide,))
    return found


def _pictures():
    """Square, wide and tall, of smooth random colours."""
    generator = np.random.default_rng(7)
    return [
        Image.fromarray(generator.integers(0, 256, (5, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in ((112, 112), (150, 60), (50, 120))
    ]


def _guarded(check, *args) -> str:
    try:
        return check(*args)
    except (UndefendableError, AttackError) as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are made too
        return f"WRONG: {type(error).__name__}: {error}"


def _answers(subject, rows) -> str:
    """Defended answers of all copies beside those of separate calls of single rows."""
    try:
        inputs = subject.inputs(*rows)
        answers = subject.answers(inputs)
    except Exception as error:  # noqa: BLE001 - whatever upstream's code says
        return f"- fails upstream, undefended: {type(error).__name__}: {error}"
    verdicts = subject.defended(inputs)
    if verdicts is None:
        return "WRONG: answered undefended"
    if len(answers) > len(rows):
        return "- nothing to ask: each is a row of its own"
    padding = subject.processor.tokenizer.pad_token_id
    defended = _unpadded([verdict.candidates for verdict in verdicts], padding)
    separate = _unpadded([answers for row in rows for answers in subject.separate_rows([row])], padding)
    if defended == separate:
        noticed = any(len(set(candidates[1:])) > 1 for candidates in defended)
        return YES if noticed else "- all copies answer alike: nothing was tested"
    if len(rows) > 1 and defended == _unpadded(subject.separate_rows(rows), padding):
        return "as calls of the same batch: the undefended answers depend on it"
    if all(len(set(candidates)) == 1 for candidates in defended):
        return "WRONG: every copy gives the undefended answer"
    return f"WRONG: {defended} where separate calls give {separate}"


def _unpadded(answers, padding):
    """Random weights may say the padding token last, where nobody can tell it from padding."""
    text = [[" ".join(map(str, answer)) for answer in row] for row in answers]
    return [[re.sub(rf"( {padding})+$", "", answer) for answer in row] for row in text]


def _noise(subject) -> str:
    """A painted colour lies where the layout says its channels are, and gets noise of sigma / image_std in each."""
    sigma, count = 0.05, 24
    rows = [row_of(Image.new("RGB", (112, 112), COLOUR)), row_of(Image.new("RGB", (112, 56), COLOUR))]
    inputs = subject.inputs(rows[0]) if not subject.kind.mixed and not subject.kind.several else subject.inputs(*rows)
    images = find_images(inputs, subject.model.config)
    statistics = pixel_statistics(subject.model, subject.processor.image_processor)
    if subject.kind.several and len(images.slices) < len(rows):
        return f"WRONG: {len(images.slices)} pictures are found in {len(rows)}"
    values, layout = images.values.float(), images.layout
    part = values[images.slices[0]]
    spread = lambda vector: layout.per_channel(vector, part).expand_as(values)  # noqa: E731
    painted = (values - spread((torch.tensor(COLOUR) / 255 - statistics.mean) / statistics.std)).abs() < 0.03
    if painted.float().mean() < 0.3:
        return f"WRONG: a painted colour is found in {painted.float().mean():.0%} of the values"
    noise = NoiseSource(images, sigma=sigma, statistics=statistics, seed=0)
    offsets = noise.copies(range(1, count)).float() - values
    if _twins(offsets[0][images.slices[0]]):
        return "WRONG: equal parts of one picture share their noise"
    for channel in range(len(statistics.std)):
        here = spread(torch.eye(len(statistics.std))[channel]).bool() & painted
        if not here.any():
            return f"WRONG: no value of channel {channel} shows the colour"
        ratio = float(offsets[here.expand_as(offsets)].std() / (sigma / statistics.std[channel]))
        if abs(ratio - 1) > 0.05:
            return f"WRONG: noise of channel {channel} is {ratio:.2f} times sigma / image_std"
    return YES


def _noise_of_sounds(subject) -> str:
    """Of the amplitude asked for on every clip, and of its own on equal ones."""
    sigma, (_, wide, _) = 0.05, _pictures()
    sounds = find_media(subject.inputs(row_of(wide)), subject.model.config).sounds
    noise = WaveformNoise(sounds, sigma=sigma, snr=None, seed=0)
    offsets = [
        np.concatenate([noisy - clean for noisy, clean in zip(noise.clips(n), sounds.carried.clips, strict=True)])
        for n in range(1, 9)
    ]
    if abs(np.std(offsets) / sigma - 1) > 0.05:
        return f"WRONG: noise is {np.std(offsets) / sigma:.2f} times audio_sigma"
    if abs(np.corrcoef(offsets)[np.triu_indices(8, 1)]).max() > 0.1:
        return "WRONG: copies share their noise"
    changed = noise.copies([1])[0] != sounds.values
    return YES if changed.any() else "WRONG: the features are those without noise"


def _twins(offset) -> bool:
    """Whether two of a picture's parts (patches, tiles, or the picture itself) got the same noise."""
    parts = offset.flatten(1) if len(offset) > 1 else offset[0].flatten(1)
    parts = parts[parts.abs().sum(1) > 0]
    return len(parts.unique(dim=0)) < len(parts)


def _gradient(subject, inputs) -> str:
    """Of the model's first decision with respect to the tensor that `generate` was given."""
    media = find_media(inputs, subject.model.config)
    part = media.images or media.sounds
    pixels = part.values.clone().requires_grad_()
    given = {key: value for key, value in inputs.items() if key != CLIPS} | {part.key: pixels}
    if part.key not in inspect.signature(subject.model.forward).parameters:
        return f"reaches no value: generate makes tokens of {part.key} before it calls the model"
    if is_encoder_decoder(subject.model.config):
        start = subject.model.generation_config.decoder_start_token_id
        given["decoder_input_ids"] = torch.full((len(inputs.get("input_ids", pixels)), 1), start)
    kept: list[bool] = []
    watched = [
        module.register_forward_pre_hook(lambda *_: kept.append(torch.is_grad_enabled()))
        for module in subject.model.modules()
    ]
    logits = subject.model(**given).logits
    for hook in watched:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, -1].max(), pixels, allow_unused=True)
    if gradient is None and not all(kept):
        return f"reaches no value: the model encodes {part.key} without gradient (torch.no_grad)"
    if gradient is None:
        return "reaches no pixel: what the model sees of them is discrete"
    if not torch.isfinite(gradient).all():
        return "WRONG: the gradient is not finite"
    share = float((gradient != 0).float().mean())
    return YES if share > 0.3 else f"reaches {share:.0%} of the values"


def _attack(subject, pictures) -> str:
    """The gradient of an answer's loss with respect to every picture in [0, 1], through the processor."""
    inputs = subject.inputs(row_of(*pictures))
    find_images(inputs, subject.model.config)
    renderer = Renderer(subject.processor, torch.device("cpu"), torch.float32)
    clean = tuple(
        torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None].contiguous()
        for picture in pictures
    )
    if max(renderer.check(clean, inputs, "pixel_values")) > EXACT_ENOUGH:
        return "the rendering is not that of the 8-bit path"
    prompt = {key: value for key, value in inputs.items() if key not in renderer(clean)}
    answer = subject.answer(inputs, min_new_tokens=4)
    loss = AnswerLoss(Threat(subject.model, subject.processor, renderer, (), [prompt], [answer]), "margin")
    leaves = tuple(slot.clone().requires_grad_() for slot in clean)
    for gradient in torch.autograd.grad(loss(leaves).sum(), leaves, allow_unused=True):
        if gradient is None:
            return "reaches no pixel: what the model sees of them is discrete"
        share = float((gradient != 0).float().mean())
        if not torch.isfinite(gradient).all() or share < 0.3:
            return f"a gradient reaches {share:.0%} of a picture"
    return YES


def _attack_on_sounds(subject, pictures) -> str:
    """The gradient of an answer's loss with respect to every waveform, through the features."""
    inputs = subject.inputs(row_of(*pictures))
    carried = find_media(inputs, subject.model.config).sounds.carried
    renderer = SoundRenderer(subject.processor, torch.device("cpu"), torch.float32)
    clean = tuple(torch.from_numpy(tone(picture, renderer.rate))[None] for picture in pictures)
    renderer.check(clean, inputs, carried.key)
    prompt = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and key != carried.key}
    answer = subject.answer(inputs, min_new_tokens=4)
    loss = AnswerLoss(Threat(subject.model, subject.processor, renderer, (), [prompt], [answer]), "margin")
    leaves = tuple(slot.clone().requires_grad_() for slot in clean)
    for gradient in torch.autograd.grad(loss(leaves).sum(), leaves, allow_unused=True):
        share = 0.0 if gradient is None else float((gradient != 0).float().mean())
        if gradient is None or not torch.isfinite(gradient).all() or share < 0.3:
            return f"a gradient reaches {share:.0%} of a sound"
    return YES


def main(names: list[str]) -> int:
    """Prints what is found of these types; after `--json`, as one line of JSON each."""
    if names[:1] == ["--json"]:
        for name in names[1:]:
            found = probe(name)
            print(json.dumps(dataclasses.asdict(found) | {"green": found.green, "wrong": found.wrong}))
        return 0
    bad = 0
    for name in names:
        try:
            found = probe(name)
        except Exception:  # noqa: BLE001 - whatever a recipe does wrong, the next one is tried
            traceback.print_exc()
            bad += 1
            continue
        bad += found.wrong
        print(f"{'GREEN' if found.green else 'not green'} {name} ({found.model}): {found.key} {found.layout}")
        for check, what in found.checks.items():
            print(f"    {check}: {what[:300]}")
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
