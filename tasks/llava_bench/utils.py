"""Upstream LLaVA-Bench (In-the-Wild)'s documents, judge and scores, under attack.

No answer is the right one: instead of a success rate there is `answer_changed`, and upstream's judge on the final answers
and on the undefended clean ones (`clean_gpt_eval_llava_all`), two calls a question. A judgement that fails counts in
`judge_failed` and in no score: upstream would average its placeholder (-1 for both sides, 100 in all if every one fails).
"""

from lmms_smoothguard.harness.lmms_eval.upstream import task_module
from lmms_smoothguard.harness.scoring import *
from lmms_smoothguard.harness.scoring import change_scores, clean_answer

upstream = task_module("llava-in-the-wild")
llava_doc_to_text, llava_doc_to_visual = upstream.llava_doc_to_text, upstream.llava_doc_to_visual
llava_all_aggregation, llava_conv_aggregation = upstream.llava_all_aggregation, upstream.llava_conv_aggregation
llava_detail_aggregation, llava_complex_aggregation = (
    upstream.llava_detail_aggregation,
    upstream.llava_complex_aggregation,
)
ALL = "gpt_eval_llava_all"


def results(doc, results):
    scores = change_scores(doc, results[0])
    if not scores:
        return {}
    final = upstream.llava_process_results(doc, results)
    clean = upstream.llava_process_results(doc, [clean_answer(doc).strip()])
    failed = [_failed(judged[ALL]) for judged in (final, clean)]
    scores["judge_failed"] = sum(failed)
    if not failed[0]:
        scores |= final
    if not failed[1]:
        scores[f"clean_{ALL}"] = clean[ALL]
    return scores


def _failed(judged):
    return min(judged["scores"]) < 0
