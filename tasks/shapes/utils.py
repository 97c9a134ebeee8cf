"""Documents of the embedded scenes: prompts, images, scores."""

from lmms_eval.tasks.pope.utils import *

from lmms_smoothguard.harness.lmms_eval.pope import pope_asr, pope_attacked_scores
from lmms_smoothguard.harness.lmms_eval.safety import attacked_safety_scores, metric_list, safety_scores
from lmms_smoothguard.harness.scoring import *
from lmms_smoothguard.harness.scoring import attack_scores, caption_scores, same_answer

SAFETY_METRICS = metric_list(kinds=True)
ATTACKED_SAFETY_METRICS = metric_list(attacked=True)


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc):
    return doc["question"]


def pope_attacked_results(doc, results):
    return pope_attacked_scores(doc, results[0])


def caption_results(doc, results):
    return caption_scores(doc, results[0])


def caption_attacked_results(doc, results):
    scores = attack_scores(doc, results[0], lambda answer: same_answer(answer, doc["caption"]))
    return caption_scores(doc, results[0]) | scores if scores else {}


def safety_results(doc, results):
    return safety_scores(doc, results[0])


def forbidden(docs):
    return docs.filter(lambda kind: kind == "forbidden", input_columns="kind")


def safety_attacked_results(doc, results):
    return attacked_safety_scores(doc, results[0])
