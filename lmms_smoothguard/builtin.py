"""The built-in defences, attacks, judges, embedders and aggregators: one line each."""

from __future__ import annotations

from lmms_smoothguard.hookspecs import hookimpl


@hookimpl
def smoothguard_defenses() -> dict[str, str]:
    return {"smoothguard": "lmms_smoothguard.defenses.smoothguard:DEFENSE"}


@hookimpl
def smoothguard_attacks() -> dict[str, str]:
    return {
        "pgd": "lmms_smoothguard.attacks.pgd:PGD",
        "apgd": "lmms_smoothguard.attacks.apgd:APGD",
        "square": "lmms_smoothguard.attacks.square:Square",
    }


@hookimpl
def smoothguard_judges() -> dict[str, str]:
    return {"refusal": "lmms_smoothguard.judges.refusal:RefusalJudge"}


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
