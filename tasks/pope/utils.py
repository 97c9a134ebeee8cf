"""Upstream POPE's documents and scoring, under attack."""

from lmms_eval.tasks.pope.utils import *
from lmms_eval.tasks.pope.utils import pope_process_results

from lmms_smoothguard.harness.lmms_eval.scoring import *
from lmms_smoothguard.harness.lmms_eval.scoring import attack_scores, same_answer


def results(doc, results):
    return pope_process_results(doc, results) | attack_scores(
        doc, results[0], lambda answer: same_answer(answer, doc["answer"])
    )
