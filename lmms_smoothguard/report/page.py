"""The report page: one HTML file that holds everything, made from a directory of runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.records import Record
from lmms_smoothguard.evaluation.runs import Sample, load_samples
from lmms_smoothguard.evaluation.titles import attack_title, budget_of
from lmms_smoothguard.report.charts import percent, rates_chart, roc_chart, suspicion_chart
from lmms_smoothguard.report.clips import ClipGallery
from lmms_smoothguard.report.experiments import SEEING, Embedded
from lmms_smoothguard.report.gallery import Gallery
from lmms_smoothguard.report.groups import groups_of
from lmms_smoothguard.report.logs import is_right, logged_options, logged_results
from lmms_smoothguard.report.pictures import PictureGallery
from lmms_smoothguard.report.tables import HEADINGS, table_rows

SHOWN, LOST = 6, 3
"""Samples on the page: about SHOWN at even distances, and the first LOST of those that the defence lost besides."""
_GALLERIES: Mapping[str, type[Gallery]] = {"picture": PictureGallery, "clip": ClipGallery}


def write_page(directory: Path, records: Sequence[Record], on: Embedded = SEEING) -> Path:
    """Writes `directory/report.html` from the logs of `plain` and `smoothguard` there, and returns its path.

    `records`: what `summarize` made of the runs; `on`: the model that they are about. Every other number is read from the samples
    logs. Raises SmoothGuardError where a log, or an image or a sound of the cache, is missing.
    """
    plain, defended = (_samples(directory / name, on) for name in ("plain", "smoothguard"))
    config = logged_defense(directory / "smoothguard")
    gallery = _GALLERIES[on.medium](directory / "cache" / "attacks", on.attacked, on.place, config)
    by_name = {record.name: record for record in records}
    step, chosen = selection(defended["attacked"])
    figures = {
        name: {kind: by_name[name].tasks[task].figures for kind, task in _tasks(on).items()}
        for name in ("plain", "smoothguard")
    }
    attack = by_name["smoothguard"].tasks[on.attacked].attack
    settings = {} if attack is None else attack.settings
    clean, attacked = (_suspicion(defended[kind]) for kind in _tasks(on))
    page = _template().render(
        headings=HEADINGS,
        table=table_rows(records),
        attack=settings,
        attack_name=attack_title(settings),
        budget=budget_of(settings),
        medium=on.medium,
        config=config,
        figures=figures,
        slowdown=table_rows([by_name["plain"], by_name["smoothguard"]])[1][-1],
        percent=percent,
        rates=rates_chart({name: figures[name]["attacked"]["asr"] for name in figures}),
        roc=roc_chart(clean, attacked, figures["smoothguard"]),
        histogram=suspicion_chart(clean, attacked, config.num_samples - 1),
        samples=[_shown(gallery, plain["attacked"][n], defended["attacked"][n], n, n % step != 0) for n in chosen],
        step=step,
        lost=sum(_lost(sample) for sample in defended["attacked"]),
        lost_shown=LOST,
        count=len(defended["attacked"]),
        commands=[record.command for record in records],
        environment={**by_name["smoothguard"].environment, **by_name["smoothguard"].versions},
    )
    target = directory / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def selection(samples: Sequence[Sample], shown: int = SHOWN, lost: int = LOST) -> tuple[int, list[int]]:
    """(k, numbers): every k-th sample, whatever became of it, then the first `lost` others that the defence lost."""
    step = max(1, len(samples) // shown)
    regular = list(range(0, len(samples), step))[: max(shown, 1)]
    extra = [n for n, sample in enumerate(samples) if n % step and _lost(sample)]
    return step, regular + extra[:lost]


def logged_defense(directory: Path) -> SmoothGuardConfig:
    """The defence that the newest run under `directory` was started with, from lmms-eval's own results file.

    Raises SmoothGuardError without one, or for an undefended run.
    """
    results = logged_results(directory)
    config = getattr(logged_options(results).defense, "config", None)
    if not isinstance(config, SmoothGuardConfig):
        raise SmoothGuardError(
            f"{directory} is of another run ({results['config']['model_args']}); expected one with defense=smoothguard"
        )
    return config


def _tasks(on: Embedded) -> dict[str, str]:
    return {"clean": on.clean, "attacked": on.attacked}


def _samples(directory: Path, on: Embedded) -> dict[str, list[Sample]]:
    return {kind: load_samples(directory, task) for kind, task in _tasks(on).items()}


def _suspicion(samples: Sequence[Sample]) -> list[float]:
    return [float(sample.info["suspicion"]) for sample in samples]


def _lost(sample: Sample) -> bool:
    """Right when clean and undefended, wrong in the end: what ASR counts."""
    return is_right(sample, sample.info["clean_answer"]) and not is_right(sample, sample.answer)


def _shown(gallery: Gallery, plain: Sample, defended: Sample, number: int, is_extra: bool) -> dict[str, Any]:
    """What the template says of one sample."""
    exhibits = gallery.of(defended)
    answers, groups = groups_of(defended)
    fooled, lost = not is_right(plain, plain.answer), _lost(defended)
    if lost:
        outcome = "The attack gets through the defence" if fooled else "The defence itself loses the answer"
    elif fooled:
        outcome = "The defence wins the answer back" if is_right(defended, defended.answer) else "Wrong from the start"
    else:
        outcome = "The attack fails on the plain model already"
    return {
        "number": number,
        "is_extra": is_extra,
        "question": plain.question,
        "target": plain.target,
        "outcome": outcome,
        "outcome_kind": "lost" if lost else "won" if fooled and is_right(defended, defended.answer) else "calm",
        "exhibits": {
            kind: {
                "picture": data_uri(one.picture),
                "size": one.picture.shape[1::-1],
                "clip": None if one.clip is None else _uri("audio/wav", one.clip),
            }
            for kind, one in exhibits.by_kind.items()
        },
        "magnified": exhibits.magnified,
        "change": exhibits.change,
        "clean_answer": _said(defended, defended.info["clean_answer"]),
        "plain_answer": _said(plain, plain.answer),
        "answer": _said(defended, defended.answer),
        "copy_answer": next((answer for answer in answers if answer.is_noisy), None),
        "answers": answers,
        "groups": groups,
        "agreement": defended.info["agreement"],
        "suspicion": defended.info["suspicion"],
        "suspected": defended.info["suspected"],
        "warnings": defended.info.get("warnings", []),
    }


def _said(sample: Sample, text: str) -> dict[str, Any]:
    return {"text": text.strip(), "is_right": is_right(sample, text)}


def data_uri(pixels: np.ndarray) -> str:
    """A picture (height, width, 3) of uint8 as `data:image/png;base64,...`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Questions and answers are text of strangers: everything is escaped, and nothing on the page is marked safe.
    environment = Environment(
        loader=PackageLoader("lmms_smoothguard.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
