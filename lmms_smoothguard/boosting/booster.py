"""A trained booster: what it was trained for, and the checks that hold it to that."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

from lmms_smoothguard.boosting.mapper import Mapper, MapperConfig
from lmms_smoothguard.boosting.purifier import Purifier, PurifierConfig
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.fingerprint import same_weights, weights_print

FILE, WEIGHTS, FORMAT = "booster.json", "booster.safetensors", 1
MADE = "booster"
"""Where in its directory a training puts the finished booster."""
EMBEDDED = ("psm", "gsb")
"""Names of the embedded model's own booster: the paper's first and second name for it."""
_HOME = Path(__file__).parents[1] / "tiny" / "booster"


@dataclasses.dataclass
class Booster:
    """Purifier and mapper, frozen.

    purifier: pixels (batch, 3, height, width) in [0, 1] and sigma (batch,) -> pixels; mappers: one for every layer that the model
    reads of its tower, none for a purifier alone; sigmas: the range of noise levels trained on; size: (height, width) trained
    at, None where any fits; tower: the print of the vision tower trained for (`weights_print`), None where any fits.
    """

    purifier: torch.nn.Module
    mappers: torch.nn.ModuleList | None = None
    sigmas: tuple[float, float] = (0.0, 5.0)
    size: tuple[int, int] | None = None
    tower: tuple[str, list[float]] | None = None
    source: str = ""

    @property
    def maps(self) -> bool:
        """Whether there is a mapper."""
        return self.mappers is not None

    @functools.cached_property
    def digest(self) -> str:
        """Of all weights."""
        parts = [self.purifier] + ([] if self.mappers is None else [self.mappers])
        return hashlib.sha256(json.dumps([weights_print(part) for part in parts]).encode()).hexdigest()[:32]

    def check_sigma(self, sigma: float) -> None:
        """Raises ConfigError for a noise level that the booster was not trained on."""
        low, high = self.sigmas
        if not low <= sigma <= high:
            raise ConfigError(
                f"sigma is {sigma:g}; the booster {self.source} was trained on {low:g} to {high:g}. Expected a sigma in that range, "
                "or a booster trained on another"
            )

    def purify(self, pixels: torch.Tensor, sigma: float) -> torch.Tensor:
        """(batch, 3, height, width) in [0, 1], noisy -> the same size. Raises ConfigError for another resolution."""
        if self.size is not None and tuple(pixels.shape[-2:]) != self.size:
            raise ConfigError(
                f"the pictures are {pixels.shape[-2]} x {pixels.shape[-1]}; the booster {self.source} was trained at "
                f"{self.size[0]} x {self.size[1]}. Expected that resolution: train a booster for this model"
            )
        purified: torch.Tensor = self.purifier(pixels, torch.full((len(pixels),), sigma, device=pixels.device))
        return purified

    def map(self, layer: int, features: torch.Tensor, sigma: float) -> torch.Tensor:
        """Features (batch, tokens, width) of the layer-th layer that the model reads -> the same, nearer to clean ones."""
        assert self.mappers is not None
        mapped: torch.Tensor = self.mappers[layer](
            features, torch.full((len(features),), sigma, device=features.device)
        )
        return mapped

    def save(self, directory: Path) -> None:
        """Writes weights (safetensors, float16) and what they were trained for."""
        from safetensors.torch import save_file

        assert isinstance(self.purifier, Purifier)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"purifier.{k}": v for k, v in self.purifier.state_dict().items()}
        mappers = [] if self.mappers is None else [dataclasses.asdict(m.config) for m in self.mappers]  # type: ignore[arg-type,call-overload,union-attr]
        if self.mappers is not None:
            tensors |= {f"mappers.{k}": v for k, v in self.mappers.state_dict().items()}
        save_file({k: v.detach().cpu().half().contiguous() for k, v in tensors.items()}, directory / WEIGHTS)
        about = {
            "format": FORMAT, "purifier": dataclasses.asdict(self.purifier.config), "mappers": mappers, "sigmas": self.sigmas,
            "size": self.size, "tower": self.tower,
        }  # fmt: skip
        (directory / FILE).write_text(json.dumps(about) + "\n")


def read_booster(directory: Path) -> Booster:
    """The booster in a directory. Raises ConfigError for what is no booster of ours."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((directory / FILE).read_text())
        if about["format"] != FORMAT:
            raise ConfigError(
                f"{directory / FILE} has format {about['format']!r}; expected {FORMAT}: update the package"
            )
        settings = {**about["purifier"], "widths": tuple(about["purifier"]["widths"])}
        purifier = Purifier(PurifierConfig(**settings))
        mappers = (
            torch.nn.ModuleList(Mapper(MapperConfig(**one)) for one in about["mappers"]) if about["mappers"] else None
        )
        tensors = {name: value.float() for name, value in load_file(directory / WEIGHTS).items()}
        parts = torch.nn.ModuleDict({"purifier": purifier} | ({} if mappers is None else {"mappers": mappers}))
        parts.load_state_dict(tensors)
        parts.requires_grad_(False).eval()
        size = None if about["size"] is None else tuple(about["size"])
        tower = None if about["tower"] is None else (about["tower"][0], about["tower"][1])
        return Booster(purifier, mappers, tuple(about["sigmas"]), size, tower, str(directory))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{directory} is no booster ({error}); expected what `smoothguard train booster` writes"
        ) from error


def read_purifier(source: str) -> Purifier:
    """The purifier of a booster for any tower, to go on training from; `psm` is the embedded LLaVA's.

    Raises ConfigError for what is no booster of ours.
    """
    booster = read_booster(_HOME / "llava" if source in EMBEDDED else _directory(source))
    assert isinstance(booster.purifier, Purifier)
    return booster.purifier


_lock = threading.Lock()
_loaded: weakref.WeakKeyDictionary[Any, dict[tuple[str, bool], Booster]] = weakref.WeakKeyDictionary()


def load_booster(source: str, tower: Any, *, mapper: bool = True) -> Booster:
    """The booster of that name, directory or hub id, on the tower's device; loaded once for a tower.

    tower: the vision tower as `find_tower` found it. Raises ConfigError for one that was trained for other weights.
    """
    key = (source, mapper)
    with _lock:
        known = _loaded.setdefault(tower.module, {})
        if key not in known:
            known[key] = _load(source, tower.module, mapper)
        return known[key]


def forget_boosters(module: Any) -> None:
    """After a tower (anywhere in the module) got other weights: boosters loaded for it are looked up, and checked, anew."""
    with _lock:
        for part in module.modules():
            _loaded.pop(part, None)


def _load(source: str, module: torch.nn.Module, mapper: bool) -> Booster:
    own = weights_print(module)
    if source in EMBEDDED:
        booster = _embedded(source, own)
    else:
        directory = _directory(source)
        if (directory / FILE).exists():
            booster = read_booster(directory)
        else:
            from lmms_smoothguard.boosting.denoiser import read_denoiser

            booster = read_denoiser(directory)
    if booster.tower is not None and not same_weights(booster.tower, own):
        raise ConfigError(
            f"the booster {source} was trained for another vision tower than this model's (its weights differ); expected one made "
            "by `smoothguard train booster` for this very model"
        )
    device = next(module.parameters()).device
    booster.purifier.to(device)
    if booster.mappers is not None:
        booster.mappers.to(device)
    return booster if mapper else dataclasses.replace(booster, mappers=None)


def _embedded(name: str, own: tuple[str, list[float]]) -> Booster:
    for directory in sorted(path.parent for path in _HOME.glob(f"*/{FILE}")):
        booster = read_booster(directory)
        if booster.tower is not None and same_weights(booster.tower, own):
            return dataclasses.replace(booster, source=name)
    raise ConfigError(
        f"booster is {name!r}, which is the embedded model's own, and this is another model; expected the directory of one made "
        "by `smoothguard train booster` for it"
    )


def _directory(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        made = path / MADE  # of a training's directory what it made
        return made if (made / FILE).exists() and not (path / FILE).exists() else path
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"booster is {source!r}; expected psm, gsb, a directory that exists or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the booster {source!r} cannot be had from the hub ({error}); expected a hub id or a directory"
        ) from error
