"""The built-in defences, attacks, judges, embedders and aggregators: one line each."""

from __future__ import annotations

from lmms_smoothguard.hookspecs import hookimpl


@hookimpl
def smoothguard_defenses() -> dict[str, str]:
    home = "lmms_smoothguard.defenses"
    return {
        "smoothguard": f"{home}.smoothguard:DEFENSE",
        "feature_smoothing": f"{home}.feature_smoothing:DEFENSE",
        "smoothguard+feature_smoothing": f"{home}.feature_smoothing:COMBINED",
    }


@hookimpl
def smoothguard_attacks() -> dict[str, str]:
    home = "lmms_smoothguard.attacks"
    return {
        "pgd": f"{home}.pgd:PGD",
        "apgd": f"{home}.apgd:APGD",
        "square": f"{home}.square:Square",
        "patch": f"{home}.patch:Patch",
        "feature": f"{home}.feature:Feature",
        "universal": f"{home}.universal:Universal",
    }


@hookimpl
def smoothguard_judges() -> dict[str, str]:
    home = "lmms_smoothguard.judges"
    return {
        "refusal": f"{home}.refusal:RefusalJudge",
        "guard": f"{home}.guard:GuardJudge",
        "llm": f"{home}.llm:LLMJudge",
    }


@hookimpl
def smoothguard_embedders() -> dict[str, str]:
    home = "lmms_smoothguard.aggregation.embedders"
    return {
        "lexical": f"{home}:lexical",
        "model": f"{home}:model_embeddings",
        "roberta-base": f"{home}:roberta",
        "sentence-transformers": f"{home}:sentence_transformer",
    }


@hookimpl
def smoothguard_aggregators() -> dict[str, str]:
    home = "lmms_smoothguard.aggregation.clustering"
    return {name: f"{home}:{name}" for name in ("kmeans", "silhouette", "vote", "medoid")}
