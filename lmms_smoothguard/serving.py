"""`smoothguard serve`: the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmms_smoothguard.choice import Choice, choose, field_names
from lmms_smoothguard.config import SmoothGuardConfig, check_vote, parse_scalar
from lmms_smoothguard.errors import ConfigError

_DEFENSE = "The defence"


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hub id or directory, as `transformers serve` takes it.")],
    defense: Annotated[str, typer.Option(rich_help_panel=_DEFENSE, help="A registered defence.")] = "smoothguard",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            rich_help_panel=_DEFENSE,
            help="A field of it: --set sigma=0.1 --set num_samples=10; may be repeated.",
        ),
    ] = None,
) -> None:
    """Serve a model through transformers' own OpenAI-compatible server, defended: no request can switch that off.

    Options after `--` go to `transformers serve`: smoothguard serve MODEL --set sigma=0.1 -- --port 8000 --device cuda. The noise is
    drawn afresh for every request unless --set seed=... says otherwise.
    """
    from hf_integration.serve import serve as run

    run(model, choice_of(defense, settings or []), context.args)


def choice_of(defense: str, settings: list[str]) -> Choice:
    """A defence that serves, from FIELD=VALUE settings; its noise is drawn afresh unless they say otherwise.

    Raises ConfigError, for settings that defend nothing too.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set is {setting!r}; expected FIELD=VALUE, such as sigma=0.1")
        fields[name.strip()] = parse_scalar(value)
    fresh = {"seed": None} if defense != "none" and "seed" in field_names(defense) else {}
    found = choose({"defense": defense, **fresh, **fields})
    if found is None:
        raise ConfigError(f"defense is {defense!r}; expected one to serve with")
    if isinstance(found.config, SmoothGuardConfig):
        check_vote(found.config)
    return found
