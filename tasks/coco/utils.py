"""Upstream COCO captioning's documents and scores, under attack.

No caption is the right one: instead of a success rate there is `answer_changed`, and upstream's scores of the final captions
beside some of the undefended clean ones (`clean_coco_*`). Upstream's scorers start java; without it they are None.
"""

import argparse
import functools
import os
import shutil

from lmms_eval.tasks.coco_cap import utils as upstream
from lmms_eval.tasks.coco_cap.utils import coco_doc_to_visual
from loguru import logger

from lmms_smoothguard.harness.scoring import *
from lmms_smoothguard.harness.scoring import change_scores, clean_answer

CLEAN = ("coco_Bleu_4", "coco_METEOR", "coco_CIDEr")


def results(doc, results):
    scores = change_scores(doc, results[0])
    if not scores:
        return {}
    clean = upstream.coco_process_result(doc, [clean_answer(doc).strip()])
    return scores | upstream.coco_process_result(doc, results) | {f"clean_{name}": clean[name] for name in CLEAN}


def _with_java(score):
    @functools.wraps(score)
    def scored(results, args):
        if shutil.which("java") is None:
            logger.warning("{} needs java, which is not on the PATH: there is no such score", score.__name__)
            return None
        return score(results, _apart(args))

    return scored


def _apart(args):
    """Upstream stores the first captions it scores as COCO's submission: attacked ones go to a folder of their own."""
    return argparse.Namespace(output_path=os.path.join(getattr(args, "output_path", None) or "", "attacked"))


bleu4, bleu3, bleu2, bleu1 = map(
    _with_java, (upstream.coco_bleu4, upstream.coco_bleu3, upstream.coco_bleu2, upstream.coco_bleu1)
)
meteor, rougel, cider = map(_with_java, (upstream.coco_meteor, upstream.coco_rougel, upstream.coco_cider))
