"""Upstream POPE's documents and scoring, under attack."""

from lmms_eval.tasks.pope.utils import *

from lmms_smoothguard.harness.lmms_eval.pope import pope_asr, pope_attacked_scores
from lmms_smoothguard.harness.scoring import *


def results(doc, results):
    return pope_attacked_scores(doc, results[0])
