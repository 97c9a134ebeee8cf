"""What tests of attacks share: jobs on the embedded scenes, and what an adversarial picture does."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.attacks.craft import Job
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.settings import AttackSettings


def job_of(trained, image, inputs, answer="Yes", **settings):
    _, processor = trained
    ids = answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), answer)
    return Job(AttackSettings.parse(settings), (image,), dict(inputs), tuple(ids))


def grey_levels(entry, job):
    return entry.images[0].astype(int) - np.asarray(job.images[0]).astype(int)


def first_logits(trained, entry, job):
    """At the answer's first token, for the 8-bit picture through the ordinary path."""
    model, processor = trained
    pixels = processor.image_processor(images=[Image.fromarray(entry.images[0])], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(**{**job.inputs, "pixel_values": pixels}).logits[0, -1]


def margin_of(trained, entry, job):
    """By how much the best other token beats the first of the job's answer."""
    logits = first_logits(trained, entry, job)
    right = float(logits[job.answer[0]])
    logits[job.answer[0]] = -torch.inf
    return float(logits.max()) - right
