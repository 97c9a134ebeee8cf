"""One run of `smoothguard certify`: what is asked, what must not change between its parts, a record a picture or question."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.attacking.identity import versions as package_versions
from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.certifying.asked import ANSWERS, CLASSES, Certification, CertifyRun
from lmms_smoothguard.certifying.records import AMPLITUDE, CertificateRecord, finished
from lmms_smoothguard.certifying.workers import AnswerWorker, ClassWorker, FeatureWorker, Worker
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.evaluation.tables import refuse_inside
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.sweeps.session import plain_name

MADE_BY = "smoothguard certify"
MATCHES = ("exact", "contains")
MAX_NEW_TOKENS = 32
_QUESTION = "What is in the picture?"
"""Beside pictures alone, whose features do not hang on it."""


def run_certify(asked: CertifyRun, command: str) -> tuple[CertificateRecord, list[Path]]:
    """Certifies what is not certified yet, and writes the record, the table of certificates and the curves.

    command: what the record says made it. Raises SmoothGuardError for whatever cannot be meant, loaded or written.
    """
    refuse_inside(asked.data, {"out": asked.out})
    if asked.match not in MATCHES:
        raise ConfigError(f"match is {asked.match!r}; {did_you_mean(str(asked.match), MATCHES)}")
    store = Store(asked.out, MADE_BY)

    from lmms_smoothguard.harness.questions import find_questions

    questions = find_questions(
        asked.data, split=asked.split, limit=asked.limit, question=_text(asked), columns=asked.columns
    )
    if asked.what != ANSWERS:
        questions.refuse_sounds(f"--what {asked.what}")
    certification = asked.about(sounds=questions.heard)
    numbers = _all(questions) if asked.what == ANSWERS else _pictures(questions)
    worker, identity = _prepared(certification, questions, numbers)
    settings = _settings(certification, questions, numbers, identity)
    store.open(settings, questions.ids, package_versions())
    store.sweep_up()
    records = _work(store, questions, numbers, worker)
    return finished(store, certification, command, settings, records, worker)


def _work(store: Store, questions: Questions, numbers: Sequence[int], worker: Worker) -> list[dict[str, Any]]:
    from tqdm import tqdm

    records = []
    for number in tqdm(numbers, unit="certificate", desc="certify"):
        name, digest = questions.ids[number], questions.digests[number]
        record = store.get(name, digest)
        if record is None:
            question, begun = questions[number], time.perf_counter()
            made = worker.certify(question, digest)
            record = {
                "id": name, "digest": digest, "images": [], "question": question.text, "group": question.group,
                "label": question.label, **made, "seconds": time.perf_counter() - begun,
            }  # fmt: skip
            store.put(record)
        records.append(record)
    return records


# -- the model ---------------------------------------------------------------------------------------------------------


def _prepared(asked: Certification, questions: Questions, numbers: Sequence[int]) -> tuple[Worker, dict[str, Any]]:
    """Who certifies, and the model's identity."""
    if asked.what == CLASSES:
        return _dual(asked, questions, numbers)
    from lmms_smoothguard.subject import Subject

    subject = Subject(
        asked.model,
        asked.device,
        asked.dtype,
        trust_remote_code=asked.trust_remote_code,
        vision_tower=asked.vision_tower,
        vision_tower_resolution=asked.vision_tower_resolution,
    )
    identity = {
        "name": plain_name(asked.model),
        "fingerprint": subject.fingerprint,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        **subject.processing(),
    }
    if asked.what == ANSWERS:
        tokens = asked.max_new_tokens or questions.max_new_tokens or MAX_NEW_TOKENS
        return AnswerWorker(asked, subject, tokens), identity | {"max_new_tokens": tokens}
    from lmms_smoothguard.smoothing.encoder import tower_call

    encoder = _encoder(asked, subject.model, subject.processor)

    def call(question: Any) -> Any:
        inputs = subject.inputs(question)
        return tower_call(encoder.tower, lambda: subject.model.generate(**inputs, max_new_tokens=1, smoothguard=False))

    return FeatureWorker(asked, encoder, call), identity | {"booster": encoder.booster_digest}


def _dual(asked: Certification, questions: Questions, numbers: Sequence[int]) -> tuple[Worker, dict[str, Any]]:
    from lmms_smoothguard.dual import DualEncoder

    classes = asked.classes or _labels(questions, numbers)
    dual = DualEncoder(asked.model, asked.device, asked.dtype, trust_remote_code=asked.trust_remote_code)
    encoder = _encoder(asked, dual.model, dual.processor)
    identity = {
        "name": plain_name(asked.model),
        "fingerprint": model_fingerprint(dual.model),
        "dtype": str(dual.model.dtype).removeprefix("torch."),
        "classes": list(classes),
        "prompts": list(asked.prompts),
        "booster": encoder.booster_digest,
    }
    return ClassWorker(asked, encoder, dual, classes), identity


def _encoder(asked: Certification, model: Any, processor: Any) -> Any:
    from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
    from lmms_smoothguard.smoothing.encoder import TowerEncoder

    config = FeatureSmoothingConfig(
        num_samples=asked.n0,
        sigma=asked.sigma,
        booster=asked.booster,
        mapper=asked.mapper,
        max_copies_per_batch=asked.batch_size,
    )
    return TowerEncoder(model, config, getattr(processor, "image_processor", processor))


def _labels(questions: Questions, numbers: Sequence[int]) -> tuple[str, ...]:
    found = sorted({label for number in numbers if (label := questions.words[number].label)})
    if len(found) < 2:
        raise ConfigError(
            f"{questions.source} has {len(found)} different labels; expected two at least for --what classes: name the column of "
            "labels (--column label=...) or the classes (--classes a,b,c)"
        )
    return tuple(found)


# -- the data ----------------------------------------------------------------------------------------------------------


def _text(asked: CertifyRun) -> str | None:
    """Features and classes need no questions, and pictures alone have none; a task of lmms-eval has its own."""
    task = "/" not in asked.data and not Path(asked.data).expanduser().exists()
    return asked.question if asked.question is not None or asked.what == ANSWERS or task else _QUESTION


def _all(questions: Questions) -> list[int]:
    return list(range(len(questions)))


def _pictures(questions: Questions) -> list[int]:
    """The first question about each picture: a certificate is of the picture, and counted twice it would narrow intervals."""
    seen: dict[str, int] = {}
    for number, question in enumerate(questions):
        hasher = hashlib.sha256()
        for image in question.images:
            hasher.update(repr(image.size).encode() + np.asarray(image).tobytes())
        seen.setdefault(hasher.hexdigest(), number)
    return list(seen.values())


def _settings(
    asked: Certification, questions: Questions, numbers: Sequence[int], identity: dict[str, Any]
) -> dict[str, Any]:
    """All that a certificate hangs on; what only the table asks about may be another the next time."""
    kept: dict[str, Any] = {
        "what": asked.what,
        "sigma": asked.sigma,
        "n": asked.n,
        "alpha": asked.alpha,
        "seed": asked.seed,
    }
    if asked.what == ANSWERS:
        kept |= {"n_select": asked.n_select, "match": asked.match}
        kept |= {"noise_space": AMPLITUDE} if questions.heard else {}
    else:
        kept |= {"booster": None if asked.booster is None else plain_name(asked.booster), "mapper": asked.mapper}
        kept |= {"n_select": asked.n_select if asked.what == CLASSES or asked.reference != "clean" else 0}
        kept |= {"reference": asked.reference}
    data = {
        "source": plain_name(asked.data), "split": questions.split, "count": len(numbers), "revision": questions.revision
    }  # fmt: skip
    return {"model": identity, "data": data, "certificate": kept}
