"""The run's judges, and what they said. `judge=` in the model's arguments names them; the first decides, all are logged.

lmms-eval scores sample by sample, and tries a scorer that raises five times over. So the wrapper asks the judges beforehand, all
answers at once, and scorers look up what was said; what they do not find, they ask themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.harness.lmms_eval.attacking import CLEAN
from lmms_smoothguard.harness.lmms_eval.finishing import Finished
from lmms_smoothguard.harness.lmms_eval.instances import document_of
from lmms_smoothguard.judges import Exchange, Judgement
from lmms_smoothguard.judges.loading import LoadedJudge, load_judges

DEFAULT = "refusal"
JUDGED = "judged"
"""In a task's metadata: the name of the document field that is the judges' question."""

_lock = threading.Lock()  # lmms-eval may score in several threads
_loaded: dict[str, tuple[LoadedJudge, ...]] = {}
_said: dict[tuple[str, Exchange], Judgement] = {}
_current = DEFAULT


def use(names: str) -> None:
    """Loads the judges of this run, and forgets what those of an earlier one said. Raises ConfigError."""
    global _current
    with _lock:
        if names not in _loaded:
            _loaded.clear()  # a guard model takes memory
            _loaded[names] = load_judges(names)
        _said.clear()
        _current = names


def judges(names: str | None = None) -> tuple[LoadedJudge, ...]:
    """The judges of this run, or those of that name."""
    wanted = names or _current
    with _lock:
        if wanted not in _loaded:
            _loaded[wanted] = load_judges(wanted)
        return _loaded[wanted]


def verdicts(exchange: Exchange, panel: Sequence[LoadedJudge]) -> dict[str, Judgement]:
    """What every judge says of an exchange, by the judge's name."""
    for judge in panel:
        ask(judge, [exchange])
    return {judge.name: _said[judge.name, exchange] for judge in panel}


def ask(judge: LoadedJudge, exchanges: Iterable[Exchange]) -> None:
    """Has a judge judge whatever it has not judged yet in this run."""
    with _lock:
        new = [exchange for exchange in dict.fromkeys(exchanges) if (judge.name, exchange) not in _said]
        if new:
            found = judge.judge_all(new)
            _said.update({(judge.name, exchange): one for exchange, one in zip(new, found, strict=True)})


def exchange_of(question: str, answer: str) -> Exchange:
    """An exchange as it is judged: lmms-eval strips answers before it scores them."""
    return Exchange(question.strip(), answer.strip())


def judge_ahead(wrapper: Any, finals: Sequence[tuple[Instance, Finished]]) -> None:
    """Judges the answers to tasks whose metadata say `judged`, and the clean answers to those attacked, in one go: both as
    they will be scored."""
    final, clean = [], []
    for request, answer in finals:
        metadata: Mapping[str, Any] = request.metadata
        field = metadata.get(JUDGED)
        if field is None:
            continue
        doc = document_of(wrapper, request)
        if field not in doc:
            raise ConfigError(
                f"metadata.judged of {request.task_name} is {field!r}, which its documents lack; expected one of {', '.join(doc)}"
            )
        question = str(doc[field])
        final.append(exchange_of(question, answer.scored))
        if CLEAN in metadata:
            clean.append(exchange_of(question, metadata[CLEAN].scored))
    panel = judges() if final else ()
    for place, judge in enumerate(panel):
        ask(judge, [*final, *clean] if place == 0 else final)
