"""Upstream POPE's documents and scoring, under attack."""

from lmms_eval.tasks.pope.utils import *
from lmms_eval.tasks.pope.utils import pope_process_results

from lmms_smoothguard.harness.lmms_eval.scoring import *
from lmms_smoothguard.harness.lmms_eval.scoring import attack_scores, same_answer


def _results(task, doc, results):
    scores = attack_scores(task, doc, results[0], lambda answer: same_answer(answer, doc["answer"]))
    return pope_process_results(doc, results) | scores


def adversarial_results(doc, results):
    return _results("pope_pgd", doc, results)


def popular_results(doc, results):
    return _results("pope_pgd_popular", doc, results)


def random_results(doc, results):
    return _results("pope_pgd_random", doc, results)
