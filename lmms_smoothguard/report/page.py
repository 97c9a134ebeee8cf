"""The report page: one HTML file that holds everything, made from a directory of runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.records import Record
from lmms_smoothguard.evaluation.runs import Sample, load_samples
from lmms_smoothguard.report.charts import percent, rates_chart, roc_chart, suspicion_chart
from lmms_smoothguard.report.experiments import ATTACKED, CLEAN
from lmms_smoothguard.report.groups import groups_of
from lmms_smoothguard.report.logs import is_right, logged_options, logged_results
from lmms_smoothguard.report.pictures import Gallery
from lmms_smoothguard.report.tables import HEADINGS, attack_name, table_rows
from lmms_smoothguard.tiny.model import MODEL_DIR

SHOWN, LOST = 6, 3
"""Samples on the page: about SHOWN at even distances, and the first LOST of those that the defence lost besides."""


def write_page(directory: Path, records: Sequence[Record], model: Path = MODEL_DIR) -> Path:
    """Writes `directory/report.html` from the logs of `plain` and `smoothguard` there, and returns its path.

    `records`: what `summarize` made of the runs. Every other number is read from the samples logs. Raises
    SmoothGuardError where a log or a cached image is missing.
    """
    plain, defended = (_samples(directory, name) for name in ("plain", "smoothguard"))
    config = logged_defense(directory / "smoothguard")
    gallery = Gallery(directory / "cache" / "attacks", ATTACKED, model, config)
    by_name = {record.name: record for record in records}
    step, chosen = selection(defended[ATTACKED])
    figures = {
        name: {task: stored.figures for task, stored in by_name[name].tasks.items()}
        for name in ("plain", "smoothguard")
    }
    attack = by_name["smoothguard"].tasks[ATTACKED].attack
    settings = {} if attack is None else attack.settings
    clean, attacked = (_suspicion(defended[task]) for task in (CLEAN, ATTACKED))
    page = _template().render(
        headings=HEADINGS,
        table=table_rows(records),
        attack=settings,
        attack_name=attack_name(settings),
        largest=figures["smoothguard"][ATTACKED]["largest_linf_in_grey_levels"].value,
        config=config,
        figures=figures,
        slowdown=table_rows([by_name["plain"], by_name["smoothguard"]])[1][-1],
        percent=percent,
        rates=rates_chart({name: figures[name][ATTACKED]["asr"] for name in figures}),
        roc=roc_chart(clean, attacked, figures["smoothguard"]),
        histogram=suspicion_chart(clean, attacked, config.num_samples - 1),
        samples=[_shown(gallery, plain[ATTACKED][n], defended[ATTACKED][n], n, n % step != 0) for n in chosen],
        step=step,
        lost=sum(_lost(sample) for sample in defended[ATTACKED]),
        lost_shown=LOST,
        count=len(defended[ATTACKED]),
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


def _samples(directory: Path, name: str) -> dict[str, list[Sample]]:
    return {task: load_samples(directory / name, task) for task in (CLEAN, ATTACKED)}


def _suspicion(samples: Sequence[Sample]) -> list[float]:
    return [float(sample.info["suspicion"]) for sample in samples]


def _lost(sample: Sample) -> bool:
    """Right when clean and undefended, wrong in the end: what ASR counts."""
    return is_right(sample, sample.info["clean_answer"]) and not is_right(sample, sample.answer)


def _shown(gallery: Gallery, plain: Sample, defended: Sample, number: int, is_extra: bool) -> dict[str, Any]:
    """What the template says of one sample."""
    pictures = gallery.of(defended)
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
        "images": {name: data_uri(getattr(pictures, name)) for name in ("clean", "adversarial", "difference", "noisy")},
        "size": pictures.clean.shape[1::-1],
        "magnified": pictures.magnified,
        "linf": 255 * defended.info["attack_linf"],
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
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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
