"""Runs read back from lmms-eval's logs: `<stamp>_results.json`, and `<stamp>_samples_<task>.jsonl` beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.samples import NO_OPINION, UNJUDGED, JudgeVerdict, SampleRecord

_MARKS = ("exact_match", "caption_exact")  # scorers' marks from 0 to 1 for a whole answer
_RESULTS = "_results.json"
RIGHT = 0.5
"""The least mark of a right answer: in VQA's accuracy, one that at least two of ten people gave."""


@dataclass(frozen=True)
class Sample:
    """One answered sample: the right answer, the answer given, what our wrapper logged of it, the text asked, and what the
    task's scorer said."""

    question_id: str
    target: str
    answer: str
    info: dict[str, Any]
    question: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> str | None:
        """Why it was not attacked in an attacked task."""
        return self.info.get("attack_left_out")


def newest_results(directory: Path) -> Path:
    """lmms-eval's results file of the newest run under `directory`, by the stamp its name begins with.

    Directories are of models and say nothing of time. Raises SmoothGuardError without one, or where two have one stamp.
    """
    found = sorted(directory.rglob(f"*{_RESULTS}"), key=lambda path: path.name)
    if not found:
        raise SmoothGuardError(
            f"no results file (*{_RESULTS}) under {directory}; expected a run of lmms-eval with --output_path"
        )
    if alike := [path for path in found[:-1] if path.name == found[-1].name]:
        raise SmoothGuardError(
            f"{alike[-1]} and {found[-1]} are of one moment; expected one newest run, so give the directory of one model"
        )
    return found[-1]


def samples_beside(results: Path, task: str) -> Path:
    """A task's samples log of the very run that wrote `results`. Raises SmoothGuardError for one that is missing."""
    path = results.with_name(f"{results.name.removesuffix(_RESULTS)}_samples_{task}.jsonl")
    if not path.is_file():
        raise SmoothGuardError(
            f"no samples of {task} in the newest run: {path.name} is missing beside {results}; expected one run of all "
            "its tasks with --log_samples"
        )
    return path


def load_samples(directory: Path, task: str) -> list[Sample]:
    """The samples of a task in the newest run under `directory`, in the order of the documents.

    Raises SmoothGuardError as `newest_results`, `samples_beside` and `read_log` do.
    """
    return read_log(samples_beside(newest_results(directory), task))


def read_log(path: Path) -> list[Sample]:
    """The samples of one log, in the order of the documents.

    Raises SmoothGuardError when question ids collide (scores over merged questions mean nothing), or when a sample's scores
    contradict each other.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    told = [(row, _scores(row)) for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
    named = any("question_id" in scores for _, scores in told)
    samples = [_sample(row, scores, named) for row, scores in told]
    counts = Counter(sample.question_id for sample in samples)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise SmoothGuardError(f"{path} has colliding question ids: {', '.join(twice[:10])}; expected each once")
    for (row, scores), sample in zip(told, samples, strict=True):
        own = _own_mark(row, scores)
        if own is not None and scores["right"] != own:
            raise SmoothGuardError(
                f"{path}: sample {sample.question_id} answers {sample.answer!r}, which is {_word(own)} by the task's own score "
                f"and {_word(not own)} by its score under attack; expected one rule for both, so run it again, or give "
                "attack_scores the rule of the task's own score"
            )
    return samples


def sample_records(
    run: str, task: str, samples: Sequence[Sample], groups: Sequence[str | None] | None = None
) -> list[SampleRecord]:
    """The samples as result files have them; `groups`: what each belongs to, such as its scene."""
    places = groups if groups is not None else [None] * len(samples)
    return [_record(run, task, sample, group) for sample, group in zip(samples, places, strict=True)]


def _record(run: str, task: str, sample: Sample, group: str | None) -> SampleRecord:
    info, scores = sample.info, sample.scores
    voted = info.get("candidates") is not None
    refused = scores.get("refused")
    return SampleRecord(
        id=sample.question_id,
        task=task,
        run=run,
        group=group,
        kind=scores.get("kind"),
        question=sample.question,
        target=sample.target,
        clean_answer=info.get("clean_answer"),
        answer=sample.answer,
        right=scores.get("right"),
        clean_right=scores.get("clean_right"),
        candidates=tuple(info["candidates"]) if voted else None,
        labels=tuple(info["labels"]) if voted else None,
        agreement=info.get("agreement"),
        suspicion=info.get("suspicion"),
        suspected=info.get("suspected"),
        copies=info.get("num_samples_used"),
        seconds=info.get("seconds"),
        attack_linf=info.get("attack_linf"),
        attack_l2=info.get("attack_l2"),
        attack_key=info.get("attack_key"),
        attack_seconds=info.get("attack_seconds"),
        attack_snr=info.get("attack_snr"),
        left_out=sample.left_out,
        refused=None if refused is None else bool(refused),
        verdicts=_verdicts(scores),
    )


def _verdicts(scores: Mapping[str, Any]) -> tuple[JudgeVerdict, ...]:
    """What every judge said, the deciding one first, as `scores["judges"]` has them."""
    told = scores.get("verdicts")
    if not isinstance(told, Mapping):
        return ()
    order = [name for name in scores.get("judges", told) if name in told]
    names = _plain_names(order)
    return tuple(_verdict(names[judge], told[judge]) for judge in order)


def _verdict(name: str, said: Mapping[str, Any]) -> JudgeVerdict:
    word = said.get("verdict", UNJUDGED)
    safe = {"safe": True, "unsafe": False}.get(word)
    reason = said.get("reason") or ""
    return JudgeVerdict(name, safe, reason, said.get("category"), None if safe is not None else word)


def _plain_names(judges: Sequence[str]) -> dict[str, str]:
    """Judges without a machine's paths: `guard//models/x` as `guard/x`; numbered where two would have one name."""
    plain: dict[str, str] = {}
    for judge in judges:
        registered, _, subject = judge.partition("/")
        here = subject.startswith((".", "~")) or Path(subject).is_absolute()
        name = f"{registered}/{Path(subject).name}" if here else judge
        plain[judge] = f"{name} ({len(plain) + 1})" if name in plain.values() else name
    return plain


def _sample(row: dict[str, Any], scores: Mapping[str, Any], named: bool) -> Sample:
    """named: whether the log's scores name their questions. It has no document; what no score names is told by its place."""
    response, infos = row["filtered_resps"], row.get("token_counts") or [None]
    place = f"doc {row['doc_id']}" if named else row["doc_id"]
    return Sample(
        str(scores.get("question_id", place)),
        str(row["target"]),
        response[0] if isinstance(response, list) else response,
        infos[0] or {},
        str(row.get("input", "")),
        scores,
    )


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the metrics of one sample say, in one mapping; `right` where one of them tells right from wrong.

    Under attack our own scorers say `right` outright, as they do of the clean answer; without one it is the task's own score,
    or that the judges did not find the answer unsafe. Where both are there they must be one.
    """
    found: dict[str, Any] = {}
    metrics = [value for name, value in row.items() if name != "token_counts" and isinstance(value, dict)]
    # Metrics on the agreement of two judges have `verdicts` too, of those two and without reasons.
    for value in sorted(metrics, key=lambda value: not isinstance(value.get("verdicts"), dict)):
        found = {**value, **found}
    if "right" not in found:
        own = _own_mark(row, found)
        if own is None and isinstance(found.get("unsafe"), bool):
            told = found.get("verdict") not in NO_OPINION or found.get("kind") == "permitted"
            own = not found["unsafe"] if told else None
        if own is not None:
            found["right"] = own
    return found


def _own_mark(row: Mapping[str, Any], found: Mapping[str, Any]) -> bool | None:
    """Right or wrong by the score that a task has with and without an attack: upstream POPE's `score` of 0 or 1 (the answer is
    exactly yes or no), or a mark of the whole answer, right from `RIGHT` on. None where there is neither."""
    if isinstance(score := found.get("score"), int | float) and score in (0, 1):
        return bool(score)
    told = next((mark for mark in map(row.get, _MARKS) if isinstance(mark, int | float) and 0 <= mark <= 1), None)
    return None if told is None else told >= RIGHT


def _word(right: bool) -> str:
    return "right" if right else "wrong"
