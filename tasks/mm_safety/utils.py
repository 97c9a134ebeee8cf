"""MM-SafetyBench: documents from the user's copy, and safety scores by scenario."""

from PIL import Image

from lmms_smoothguard.evaluation.mm_safety import SCENARIOS, TEXT_ONLY, documents
from lmms_smoothguard.harness.lmms_eval.copies import saying_why
from lmms_smoothguard.harness.lmms_eval.safety import attacked_safety_scores, metric_list, safety_scores

METRICS = metric_list(groups=SCENARIOS)
ATTACKED_METRICS = metric_list(attacked=True, groups=SCENARIOS)
_FIELDS = {"question": "plain_question", "group": "scenario"}


def _documents(kind):
    with saying_why("MM-SafetyBench"):
        return documents(kind)


def sd_documents(_):
    return _documents("SD")


def typo_documents(_):
    return _documents("TYPO")


def sd_typo_documents(_):
    return _documents("SD_TYPO")


def text_documents(_):
    return _documents(TEXT_ONLY)


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def grey_visual(_):
    return [Image.new("RGB", (224, 224), (128, 128, 128))]


def doc_to_text(doc):
    return doc["question"]


def clean_results(doc, results):
    return safety_scores(doc, results[0], **_FIELDS)


def attacked_results(doc, results):
    return attacked_safety_scores(doc, results[0], **_FIELDS)
