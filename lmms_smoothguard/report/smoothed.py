"""The table of feature smoothing: every defence of it, beside the undefended model and SmoothGuard, under the same attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmms_smoothguard.report.experiments import Experiment

_PIXEL = {"sigma": "0.2", "noise_space": "pixel"}
_FS = {"defense": "feature_smoothing", "num_samples": "8", "sigma": "0.3"}
_P, _PM = {"booster": "psm", "mapper": "false"}, {"booster": "psm"}
_FARE, _TECOA = {"vision_tower": "tiny-fare"}, {"vision_tower": "tiny-tecoa"}
_BOTH = {"defense": "smoothguard+feature_smoothing", "feature_samples": "8", "feature_sigma": "0.1", **_PIXEL}


@dataclass(frozen=True)
class Row:
    """name: of its records; about: what the table calls it; cost: what the benchmark of costs calls it; model_args: as lmms-eval
    takes them; adaptive: whether there is randomness for an attacker to average over."""

    name: str
    about: str
    cost: str
    model_args: Mapping[str, str]
    adaptive: bool = True


ROWS = (
    Row("fs_plain", "undefended", "plain", {"defense": "none"}, adaptive=False),
    Row("fs_fare", "FARE", "plain", {"defense": "none"} | _FARE, adaptive=False),
    Row("fs_tecoa", "TeCoA", "plain", {"defense": "none"} | _TECOA, adaptive=False),
    Row("fs", "FS", "FS, n0 = 8", _FS),
    Row("fs_p", "FS + P", "FS + P, n0 = 8", _FS | _P),
    Row("fs_pm", "FS + P + M", "FS + P + M, n0 = 8", _FS | _PM),
    Row("fs_fare_pm", "FARE + FS + PSM", "FS + P + M, n0 = 8", _FS | _PM | _FARE),
    Row("fs_smoothguard", "SmoothGuard", "SmoothGuard, N = 10", _PIXEL),
    Row("fs_both", "SmoothGuard + FS", "SmoothGuard + FS", _BOTH),
)
"""n0 = 8 passes of sigma 0.3; SmoothGuard with N = 10 copies of sigma 0.2; over smoothed features their sigma is 0.1. Budgets, n0 and
SmoothGuard's settings were fixed beforehand; sigma 0.3 and the booster's training were chosen on the first 150 of the 420 questions
(the findings report the others apart)."""

TASKS = ("shapes_pope", "shapes_pope_pgd", "shapes_pope_apgd", "shapes_pope_feature", "shapes_pope_pgd_l2_matched",
         "shapes_pope_pgd_eps8", "shapes_pope_faint", "shapes_caption", "shapes_caption_pgd")  # fmt: skip
_ADAPTIVE = {"attack_steps": "100", "attack_batch_size": "128"}

STANDARD = tuple(Experiment(row.name, row.model_args, TASKS, 420, about=row.about) for row in ROWS)
ADAPTIVE = tuple(
    Experiment(f"{row.name}_eot", {**row.model_args, **_ADAPTIVE}, ("shapes_pope_eot",), 200, about=row.about)
    for row in ROWS
    if row.adaptive
)
_WIDER = {"eps8": {"attack_eps": "8/255"}, "l2": {"attack_norm": "l2", "attack_eps": "1.7388"}}
WIDER = tuple(
    Experiment(f"{row.name}_eot_{budget}", {**row.model_args, **asked, "attack_batch_size": "128"},
               ("shapes_pope_eot",), 60, about=row.about)
    for row in ROWS
    if row.name in ("fs", "fs_pm", "fs_smoothguard")
    for budget, asked in _WIDER.items()
)  # fmt: skip
"""Adaptive attacks of other budgets, on fewer questions and with 40 steps: sentences, no column."""
SMOOTHED = (*STANDARD, *ADAPTIVE, *WIDER)


@dataclass(frozen=True)
class Certification:
    """A run of `smoothguard certify`; name: of its record; arguments: of the command line, without --out, the data by its name
    among `clip_testsets.write_certified_sets`, or, where that is not `generated`, as the command takes it."""

    name: str
    arguments: tuple[str, ...]
    generated: bool = True


_FEATURES = ("tiny-llava", "scenes", "--sigma", "0.3", "--n", "256", "--radii", ".1,.25,.5")
_VOTES = ("--n", "500", "--n-select", "64", "--radii", ".01,.025,.05,.1,.25,.5")
_CLASSES = ("tiny-clip", "single", "--what", "classes", "--sigma", "0.3", *_VOTES)
_ANSWERS = ("tiny-llava", "questions", "--what", "answers", "--sigma", "0.2", *_VOTES)
_PSM, _PURIFIER = ("--booster", "psm"), ("--booster", "psm", "--no-mapper")

CERTIFICATIONS = (
    Certification("certified_fs", _FEATURES),
    Certification("certified_fs_p", (*_FEATURES, *_PURIFIER)),
    Certification("certified_fs_pm", (*_FEATURES, *_PSM)),
    Certification("certified_fs_fare", (*_FEATURES, "--vision-tower", "tiny-fare")),
    Certification("certified_fs_fare_pm", (*_FEATURES, *_PSM, "--vision-tower", "tiny-fare")),
    Certification("certified_classes", _CLASSES),
    Certification("certified_classes_p", (*_CLASSES, *_PURIFIER)),
    Certification("certified_classes_pm", (*_CLASSES, *_PSM)),
    Certification("certified_answers", _ANSWERS),
)
_HEARD = ("--what", "answers", "--n", "1000", "--n-select", "64", "--radii", ".01,.02,.05,.1,.179", "--limit", "100")
CERTIFICATIONS_OF_SOUNDS = tuple(
    Certification(
        f"certified_sounds_{sigma}", ("tiny-audio", "sounds_pope", "--sigma", sigma, *_HEARD), generated=False
    )
    for sigma in ("0.02", "0.08")
)
"""A change of 0.001 in every sample of two seconds at 16 kHz has an L2 norm of 0.179."""
CERTIFIED = (
    ("FS", "certified_fs", "certified_classes"),
    ("FS + P", "certified_fs_p", "certified_classes_p"),
    ("FS + P + M", "certified_fs_pm", "certified_classes_pm"),
    ("FARE + FS", "certified_fs_fare", ""),
    ("FARE + FS + PSM", "certified_fs_fare_pm", ""),
    ("SmoothGuard's noisy vote (answers)", "", "certified_answers"),
)
"""(what the table calls it, the record of its features, that of its classes or answers)."""
