"""Upstream VQAv2's and TextVQA's documents and VQA accuracy, under attack.

Right is an answer of accuracy 0.5 or more: one that at least two of ten people gave. `clean_exact_match` is the accuracy of
the undefended model's clean answers.
"""

import copy

from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_doc_to_visual, textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_doc_to_visual, vqav2_process_results

from lmms_smoothguard.harness.scoring import *
from lmms_smoothguard.harness.scoring import attack_scores, clean_answer

RIGHT = 0.5


def _results(doc, answer, process):
    def accuracy(text):
        return process(copy.deepcopy(doc), [text.strip()])["exact_match"]  # upstream rewrites the document's answers

    scores = attack_scores(doc, answer, lambda text: accuracy(text) >= RIGHT)
    if not scores:
        return {}
    return scores | {"exact_match": accuracy(answer), "clean_exact_match": accuracy(clean_answer(doc))}


def vqav2_results(doc, results):
    return _results(doc, results[0], vqav2_process_results)


def textvqa_results(doc, results):
    return _results(doc, results[0], textvqa_process_results)
