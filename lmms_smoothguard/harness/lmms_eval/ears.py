"""What a model hears of a sound, and whether its wrapper gave it just that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_integration.protecting import extractor_of
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness.recording import PlainPass
from lmms_smoothguard.sounds import Sound


class Ear(NamedTuple):
    """What a processor takes of a sound. rate: in Hz; longest: samples of its window, None where it has none."""

    rate: int
    longest: int | None

    @classmethod
    def of(cls, processor: Any) -> Ear | None:
        """None for a processor that shows no feature extractor for sounds."""
        extractor = extractor_of(processor)
        if extractor is None:
            return None
        longest = getattr(extractor, "n_samples", None)
        return cls(int(extractor.sampling_rate), None if longest is None else int(longest))


def heard_as(name: str, sound: Sound, ear: Ear | None, mend: str) -> Sound:
    """A sound at the model's own rate, where wrappers hand it on as it is, and in whole steps of 16 bits.

    name, mend: whose it is and what to do about one that is too long, for messages. Raises AttackError for a model that does not
    hear, and for a sound longer than its window: wrappers cut that, and the question then is another one.
    """
    if ear is None:
        raise AttackError(
            f"{name}: the model's processor shows no feature extractor with a sampling_rate; expected one, to carry gradients to "
            "the samples. Use a model that hears, such as smoothguard_qwen2_audio"
        )
    there = sound.at(ear.rate)
    if ear.longest is not None and len(there.samples) > ear.longest:
        raise AttackError(
            f"{name} is {there.seconds:.2f} seconds long, and the model hears {ear.longest / ear.rate:g} at a time: its wrapper cuts "
            f"it into several; expected sounds that are heard whole. {mend}"
        )
    return Sound.from_pcm(there.pcm, there.rate)


def check_heard(wrapper: Any, name: str, sounds: Sequence[Sound], plain: PlainPass) -> None:
    """What is crafted is crafted from these sounds: AttackError for a wrapper whose processor was given others, for it would be
    shown something else."""
    title = type(wrapper).__name__
    if "input_features" not in plain.inputs:
        raise AttackError(
            f"{name} has sounds, and {title} gave generate() no input_features; expected a model that hears"
        )
    given = [sound.samples for sound in sounds]
    if plain.clips is None or [len(clip) for clip in plain.clips] == [len(clip) for clip in given]:
        return
    lengths = [f"{', '.join(str(len(clip)) for clip in clips)} samples" for clips in (plain.clips, given)]
    raise AttackError(
        f"{title} gave its processor sounds of {lengths[0]} for {name}, whose own have {lengths[1]} at the model's rate; expected "
        "them as they are, for an attack perturbs what the processor is given. This wrapper's sounds cannot be attacked."
    )
