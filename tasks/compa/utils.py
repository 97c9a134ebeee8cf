"""CompA: documents from the user's copy; right is the number of the caption that fits."""

from lmms_smoothguard.harness import scoring
from lmms_smoothguard.harness.lmms_eval import compa
from lmms_smoothguard.harness.lmms_eval.compa_scores import (
    accuracy,
    accuracy_high,
    accuracy_low,
    choice_scores,
    listed,
    number_in,
)
from lmms_smoothguard.harness.lmms_eval.copies import saying_why
from lmms_smoothguard.sounds import sound_of

_RATES = {
    "compa_accuracy": accuracy,
    "compa_accuracy_low": accuracy_low,
    "compa_accuracy_high": accuracy_high,
    "compa_accuracy_count": len,
}
_ASR = {
    "asr": scoring.asr,
    "asr_low": scoring.asr_low,
    "asr_high": scoring.asr_high,
    "asr_count": scoring.asr_count,
}


def _metrics(functions, higher_is_better):
    return [
        {"metric": name, "aggregation": function, "higher_is_better": higher_is_better}
        for name, function in functions.items()
    ]


METRICS = [*_metrics(_RATES, True), *_metrics({"compa_unreadable": scoring.total}, False)]
ATTACKED_METRICS = [*METRICS, *_metrics(_ASR, False), *_metrics({"recovery": scoring.recovered}, True)]


def _documents(kind):
    with saying_why("CompA"):
        return compa.documents(kind)


def order_documents(_):
    return _documents("order")


def attribute_documents(_):
    return _documents("attribute")


def doc_to_visual(doc):
    sound = sound_of(doc["audio_path"])
    return [{"array": sound.samples, "sampling_rate": sound.rate}]


def doc_to_text(doc, lmms_eval_specific_kwargs):
    before, after = lmms_eval_specific_kwargs["pre_prompt"], lmms_eval_specific_kwargs["post_prompt"]
    return f"{before}{listed(doc['choices'])}{after}"


def results(doc, results):
    return choice_scores(doc, results[0])


def attacked_results(doc, results):
    scores = scoring.attack_scores(doc, results[0], lambda answer: number_in(answer) == doc["answer"])
    return choice_scores(doc, results[0]) | scores if scores else {}
