"""What this distribution adds: names, and where they lead. Nothing is imported before it is used."""

from lmms_smoothguard import hookimpl


@hookimpl
def smoothguard_defenses():
    return {"blur": "smoothguard_example.blur:DEFENSE"}


@hookimpl
def smoothguard_attacks():
    return {"momentum": "smoothguard_example.momentum:Momentum"}


@hookimpl
def smoothguard_judges():
    return {"short": "smoothguard_example.short:ShortAnswer"}


@hookimpl
def smoothguard_embedders():
    return {"words": "smoothguard_example.words:words"}
