"""`smoothguard certify`: the options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmms_smoothguard import shared_options as shared
from lmms_smoothguard.errors import ConfigError

_CERTIFICATE = "The certificate"


def certify(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A hub id, a directory with safetensors weights, tiny-llava, tiny-audio (answers) or tiny-clip (classes)."
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures (for answers or sounds), a parquet / json / jsonl / csv file, a data set, or an lmms-eval task."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; started again, it goes on where it was.")],
    what: Annotated[
        str,
        typer.Option(
            rich_help_panel=_CERTIFICATE,
            help="features of each picture, classes (of a dual encoder), or answers to each question.",
        ),
    ] = "features",
    sigma: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_CERTIFICATE,
            help="In [0, 1] pixel units, 0.25 by default; of sounds in amplitude (full scale 1), without a default.",
        ),
    ] = None,
    n0: Annotated[int, typer.Option(rich_help_panel=_CERTIFICATE, help="Draws of a served mean (features).")] = 32,
    n: Annotated[int, typer.Option("--n", rich_help_panel=_CERTIFICATE, help="Draws that certify.")] = 1000,
    n_select: Annotated[
        int, typer.Option(rich_help_panel=_CERTIFICATE, help="Separate draws that choose class or answer.")
    ] = 100,
    alpha: Annotated[
        float, typer.Option(rich_help_panel=_CERTIFICATE, help="Probability of error of each certificate.")
    ] = 0.001,
    beta: Annotated[
        float | None,
        typer.Option(rich_help_panel=_CERTIFICATE, help="Of a served mean's own draws; alpha by default."),
    ] = None,
    radii: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_CERTIFICATE,
            help="L2 norms: of pictures in pixel units at the model's resolution, .1,.25,.5 by default; of sounds in amplitude, 0.5, 1 and 2 "
            "sigma by default.",
        ),
    ] = None,
    similarity: Annotated[
        float, typer.Option(rich_help_panel=_CERTIFICATE, help="The cosine that the table asks about beside 0.")
    ] = 0.5,
    reference: Annotated[
        str,
        typer.Option(
            rich_help_panel=_CERTIFICATE,
            help="clean: with the plain encoder's clean feature; served: with the mean of the selection draws.",
        ),
    ] = "clean",
    booster: Annotated[
        str | None, typer.Option(rich_help_panel=_CERTIFICATE, help="psm, gsb, a directory or a hub id.")
    ] = None,
    mapper: Annotated[bool, typer.Option(rich_help_panel=_CERTIFICATE, help="The booster's, where it has one.")] = True,
    seed: Annotated[int, typer.Option(rich_help_panel=_CERTIFICATE, help="Of the noise.")] = 0,
    classes: Annotated[
        str, typer.Option(rich_help_panel=_CERTIFICATE, help="Names, such as cat,dog; the data's labels by default.")
    ] = "",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", rich_help_panel=_CERTIFICATE, help="A sentence with {} for the class; may be repeated."
        ),
    ] = None,
    split: shared.Split = None,
    limit: shared.Limit = None,
    question: shared.Question = None,
    columns: shared.Columns = None,
    max_new_tokens: shared.MaxNewTokens = None,
    match: shared.Match = "exact",
    batch_size: Annotated[
        int, typer.Option(rich_help_panel=shared.MACHINE, help="Noisy copies of the model at once.")
    ] = 32,
    device: shared.Device = None,
    dtype: shared.Dtype = "auto",
    vision_tower: shared.VisionTower = None,
    vision_tower_resolution: shared.VisionTowerResolution = "model",
    trust_remote_code: shared.TrustRemoteCode = False,
) -> None:
    """Certify features, classes or answers under Gaussian noise: a table, certificates.parquet, certify.json and the curves.

    What a certificate promises and what it does not: docs/certificates.md.
    """
    from lmms_smoothguard.certifying.asked import CertifyRun
    from lmms_smoothguard.certifying.run import run_certify
    from lmms_smoothguard.certifying.tables import print_certificates

    asked = CertifyRun(
        model=model,
        data=data,
        out=out,
        what=what,
        sigma=sigma,
        n0=n0,
        n=n,
        n_select=n_select,
        alpha=alpha,
        beta=beta,
        radii=None if radii is None else _numbers("--radii", radii),
        similarity=similarity,
        reference=reference,
        booster=booster,
        mapper=mapper,
        seed=seed,
        split=split,
        limit=limit,
        question=question,
        columns=_columns(columns),
        max_new_tokens=max_new_tokens,
        match=match,
        classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
        prompts=tuple(prompts) if prompts else ("a photo of {}",),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        vision_tower=vision_tower,
        vision_tower_resolution=vision_tower_resolution,
        trust_remote_code=trust_remote_code,
    )
    record, files = run_certify(asked, _command(context, asked))
    print_certificates(record)
    for file in files:
        typer.echo(file)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers with commas between them, such as .1,.25,.5"
        ) from error


def _columns(given: Sequence[str] | None) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for text in given or ():
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--column is {text!r}; expected key=value")
        named[key.strip().replace("-", "_")] = None if value == "none" else value
    return named


def _command(context: typer.Context, asked: object) -> str:
    """What runs it again, without a machine's paths: names of model, data and booster, and every option that was given."""
    import shlex

    from lmms_smoothguard.sweeps.session import plain_name

    words = ["smoothguard", "certify", plain_name(context.params["model"]), plain_name(context.params["data"])]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        source = context.get_parameter_source(name)
        if name in ("model", "data", "out", "device") or source is None or source.name == "DEFAULT":
            continue
        option = max(parameter.opts, key=len)
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option.removeprefix('--')}")
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [option, plain_name(str(one)) if name == "booster" else str(one)]
    return shlex.join(words)
