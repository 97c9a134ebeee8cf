"""Which descriptions of a defence can be carried out from outside of the model."""

from __future__ import annotations

from lmms_smoothguard.config import SmoothGuardConfig, check_vote
from lmms_smoothguard.errors import UndefendableError


def check_outside(config: SmoothGuardConfig) -> None:
    """Raises UndefendableError for what needs the model itself: its normalisation, its tokens, its embeddings; ConfigError for what
    defends nothing."""
    if config.level != "answer":
        raise UndefendableError(
            f"level is {config.level!r}; from outside of a model only whole answers can be compared, expected level 'answer'"
        )
    if config.noise_space != "pixel":
        raise UndefendableError(
            f"noise_space is {config.noise_space!r}; how a remote model normalises is not known, expected noise_space 'pixel' "
            "(sigma in [0, 1] intensities)"
        )
    if config.embedder == "model":
        raise UndefendableError(
            "embedder is 'model'; a remote model's embeddings cannot be had, expected another one, such as 'lexical'"
        )
    check_vote(config)
