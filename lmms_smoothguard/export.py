"""`smoothguard export`: generation code that defends by itself, in the form that transformers loads from a directory or a hub.

`model.generate(**inputs, custom_generate="<dir>", trust_remote_code=True)` needs no import of ours; and a model's directory with it inside
loads, with trust_remote_code=True, as a model whose own `generate` is defended. Loaded otherwise, or saved again, it has left that code
behind: so the defence stands in its generation config too, for processes that import hf_integration.
"""

from __future__ import annotations

import json
import pprint
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.serving import choice_of

FOLDER = "custom_generate"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_GENERATE = '''\
"""Answers of {name}, a defence of lmms-smoothguard, in place of plain ones: written by `smoothguard export`.

    model.generate(**inputs, custom_generate="<this repository>", trust_remote_code=True)

`smoothguard={{...}}` changes single settings for a call, `smoothguard=False` answers plainly.
"""

import importlib

SETTINGS = {settings}


def generate(*unnamed, model, **arguments):
    """As `model.generate`, defended. Raises ImportError without lmms-smoothguard."""
    try:
        hf_integration = importlib.import_module("hf_integration")
    except ImportError as error:
        raise ImportError("this generation code needs lmms-smoothguard; pip install lmms-smoothguard") from error
    return hf_integration.generate_defended(model, SETTINGS, *unnamed, **arguments)


generate.__smoothguard_export__ = True
'''


def write_export(out: Path, defense: Choice, model: str | None = None) -> Path:
    """Writes `out/custom_generate`, beside a copy of the model (a directory or hub id) where one is named.

    The copy's generation config asks for the defence. Raises ConfigError for a directory that holds anything already, and a model that
    cannot be had, has no safetensors weights or a generation config that cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; expected a new or an empty directory")
    if model is not None:
        _copy_model(model, out)
        _ask_for(defense, out)
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    settings = pprint.pformat(defense.to_dict(), sort_dicts=False, width=100)
    (folder / "generate.py").write_text(_GENERATE.format(name=defense.name, settings=settings))
    (folder / "requirements.txt").write_text("lmms-smoothguard\n")
    return folder


def _copy_model(model: str, out: Path) -> None:
    where = Path(model).expanduser()
    if where.is_dir():
        shutil.copytree(where, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_PICKLES))
    else:
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(model, local_dir=out, ignore_patterns=list(_PICKLES))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model is {model!r}, which cannot be had ({error}); expected a directory or a hub id"
            ) from error
    if not (out / "config.json").is_file() or not list(out.glob("*.safetensors")):
        raise ConfigError(
            f"model is {model!r}, which has no config.json with weights in .safetensors; expected a model of transformers"
        )


def _ask_for(defense: Choice, out: Path) -> None:
    """Writes the defence into a model's generation config, whose other fields stay."""
    file = out / "generation_config.json"
    if not file.is_file():  # else transformers would no longer look for them in the model's own config
        from transformers import GenerationConfig

        found = GenerationConfig.from_pretrained(out, config_file_name="config.json", _from_model_config=True)
        found.to_json_file(file)
    try:
        fields = json.loads(file.read_text())
        fields["smoothguard"] = defense.to_dict()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the model's generation_config.json is unreadable ({error}); expected a JSON object"
        ) from error
    fields.pop("_from_model_config", None)  # which has them derived anew when the model is saved, without the defence
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def export(
    out: Annotated[Path, typer.Argument(help="A new directory, to be used as it is or uploaded to a hub.")],
    model: Annotated[
        str | None, typer.Option(help="A hub id or directory: a copy of it whose own generate is defended.")
    ] = None,
    defense: Annotated[str, typer.Option(help="A registered defence.")] = "smoothguard",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of it: --set sigma=0.1; may be repeated.")
    ] = None,
) -> None:
    """Write generation code that defends without an import of ours, for `custom_generate=` or into a model's own directory."""
    folder = write_export(out, choice_of(defense, settings or []), model)
    load: Any = f'from_pretrained("{out}", trust_remote_code=True).generate(**inputs)'
    call = f'model.generate(**inputs, custom_generate="{out}", trust_remote_code=True)'
    typer.echo(f"written to {folder}; use it with\n  {call}")
    if model is not None:
        typer.echo(f"or load the model with it inside\n  AutoModelForImageTextToText.{load}")
        typer.echo(
            "Loaded without trust_remote_code=True, or saved again, it answers UNDEFENDED and says nothing, unless the process imports "
            "hf_integration: then its generation_config.json is heeded, which asks for the same defence."
        )
