"""`smoothguard attack`: the options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmms_smoothguard import shared_options as shared
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError

_ATTACK = "The attack"
_DEFENSE = "The defence"


def attack(
    model: Annotated[
        str, typer.Argument(help="A hub id, a directory with safetensors weights, tiny-llava or tiny-audio.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures or sounds, a parquet / json / jsonl / csv file, a data set (hub id or directory), an lmms-eval task, "
            "or the directory of an earlier run."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; started again, it goes on where it was.")],
    name: Annotated[str, typer.Option("--attack", rich_help_panel=_ATTACK, help="A registered attack.")] = "pgd",
    eps: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_ATTACK,
            help="Radius, of pictures 4/255 by default; of sounds such as 0.0005, or 45dB below each.",
        ),
    ] = None,
    snr: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_ATTACK,
            help="Of sounds with --norm l2, instead of a radius: dB of a clip over its change, as --eps 45dB.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(rich_help_panel=_ATTACK)] = None,
    norm: Annotated[str | None, typer.Option(rich_help_panel=_ATTACK, help="linf or l2.")] = None,
    target: Annotated[str | None, typer.Option(rich_help_panel=_ATTACK, help="A text to be forced.")] = None,
    targeted: Annotated[
        bool, typer.Option("--targeted", rich_help_panel=_ATTACK, help="Each question's own target is to be forced.")
    ] = False,
    eot: Annotated[
        int | None, typer.Option(rich_help_panel=_ATTACK, help="Draws of the defence's noise a step (adaptive).")
    ] = None,
    attack_seed: Annotated[int | None, typer.Option(rich_help_panel=_ATTACK, help="Of the attacker's chance.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", rich_help_panel=_ATTACK, help="Any other setting: --set momentum=0.9; may be repeated."),
    ] = None,
    defense: Annotated[str, typer.Option(rich_help_panel=_DEFENSE, help="A registered defence, or none.")] = "none",
    sigma: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_DEFENSE, help="Of noise on pictures; of that on sounds --defense-set audio_sigma=0.02."
        ),
    ] = None,
    noise_space: Annotated[
        str | None, typer.Option(rich_help_panel=_DEFENSE, help="Of noise on pictures: normalized or pixel.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(rich_help_panel=_DEFENSE, help="N.")] = None,
    defense_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--defense-set", rich_help_panel=_DEFENSE, help="Any other field: --defense-set seed=1; may be repeated."
        ),
    ] = None,
    split: shared.Split = None,
    limit: shared.Limit = None,
    question: shared.Question = None,
    columns: shared.Columns = None,
    max_new_tokens: shared.MaxNewTokens = None,
    match: shared.Match = "exact",
    judge: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=shared.DATA,
            help="A judge decides on success instead of target or label: refusal, guard/<model>, llm/<model>.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(rich_help_panel=shared.MACHINE, help="Rows of the model at once, EOT's draws counted.")
    ] = 32,
    device: shared.Device = None,
    dtype: shared.Dtype = "auto",
    trust_remote_code: shared.TrustRemoteCode = False,
    cache: Annotated[
        Path | None, typer.Option(rich_help_panel=shared.MACHINE, help="Of adversarial images and sounds.")
    ] = None,
    vision_tower: shared.VisionTower = None,
    vision_tower_resolution: shared.VisionTowerResolution = "model",
) -> None:
    """Craft adversarial images or sounds for any questions: PNG or WAV files and attacks.parquet, with the answers before and after.

    On several processes: accelerate launch --num_processes 2 -m lmms_smoothguard attack ...
    """
    from lmms_smoothguard.attacking.asked import AttackRun
    from lmms_smoothguard.attacking.run import run_attack
    from lmms_smoothguard.attacking.summary import describe
    from lmms_smoothguard.attacks.settings import AttackSettings
    from lmms_smoothguard.choice import choose

    others = dict(_pairs("--set", settings))
    _refuse_fields(others, defense)

    options = {"eps": eps, "snr": snr, "steps": steps, "norm": norm, "target": target, "eot": eot, "seed": attack_seed}
    fields: dict[str, Any] = {"sigma": sigma, "noise_space": noise_space, "num_samples": num_samples}
    given = _known(fields) | {key: parse_scalar(value) for key, value in _pairs("--defense-set", defense_settings)}
    if defense == "none" and given:
        raise ConfigError(
            f"{next(iter(given))} is a setting of a defence, and there is none; expected --defense smoothguard"
        )
    asked = AttackRun(
        model=model,
        data=data,
        out=out,
        attack=AttackSettings.parse({"name": name}, _known(options), others),
        defense=choose({"defense": defense, **given}),
        defense_given=tuple(given),
        split=split,
        limit=limit,
        question=question,
        columns={key: None if value == "none" else value for key, value in _pairs("--column", columns)},
        targeted=targeted,
        max_new_tokens=max_new_tokens,
        match=match,
        judge=judge,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        cache=cache,
        vision_tower=vision_tower,
        vision_tower_resolution=vision_tower_resolution,
    )
    summary = run_attack(asked)
    if summary is not None:
        typer.echo("\n".join(describe(summary)))
        typer.echo(f"{summary['samples']} samples: {out / 'attacks.parquet'}")


def _refuse_fields(settings: dict[str, str], defense: str) -> None:
    """A setting of no attack that is a defence's field was meant for another option."""
    from lmms_smoothguard.attacks.settings import all_fields
    from lmms_smoothguard.choice import DEFAULT, field_names

    name = DEFAULT if defense == "none" else defense
    for field, value in settings.items():
        if field in field_names(name) and field not in all_fields():
            raise ConfigError(
                f"--set is '{field}={value}', and {field} is a field of the defence {name}, no setting of an attack; expected "
                f"--defense {name} --defense-set {field}={value}"
            )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _pairs(option: str, given: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{option} is {text!r}; expected key=value")
        pairs.append((key.strip().replace("-", "_"), value))
    return pairs
