"""One architecture under test: its answers, defended and not, copy by copy."""

from __future__ import annotations

import numpy as np
import pytest

import hf_integration
from hf_integration.protecting import extractor_of, hears, protect
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.media import find_images, find_media
from lmms_smoothguard.noise import NoiseSource, WaveformNoise
from tiny_models import COVERED
from tiny_models.sounds import tone

COPIES, SIGMA, AUDIO_SIGMA = 5, 2.0, 0.9
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


class Subject:
    """One architecture, built."""

    def __init__(self, name):
        if name == "smolvlm":
            pytest.importorskip("num2words")  # its processor asks for it
        self.kind = COVERED[name]
        self.model, self.processor = self.kind.build()
        hf_integration.attach(self.model, self.processor)
        if hears(self.processor):
            protect(self.processor)

    def inputs(self, *rows):
        return self.kind.inputs(self.processor, rows)

    def defended(self, inputs, **config):
        config = {"sigma": SIGMA, "audio_sigma": AUDIO_SIGMA, "num_samples": COPIES} | config
        out = self.model.generate(**inputs, **SETTINGS, smoothguard=config, return_dict_in_generate=True)
        return getattr(out, "smoothguard", None)

    def answers(self, inputs, **settings):
        """Of each row the ids of a separate, undefended call's answer, without prompt, end and padding."""
        end, found = self.processor.tokenizer.eos_token_id, []
        sequences = self.model.generate(**inputs, **SETTINGS | settings, smoothguard=False).tolist()
        prompts = inputs["input_ids"].tolist() if "input_ids" in inputs else [[]] * len(sequences)
        for answer, prompt in zip(sequences, prompts, strict=True):
            answer = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
            start = int(is_encoder_decoder(self.model.config))  # the decoder's own start may be the end token
            found.append(tuple(answer[: answer.index(end, start)] if end in answer[start:] else answer))
        return found

    def answer(self, inputs, **settings):
        (answer,) = self.answers(inputs, **settings)
        return answer

    def separate(self, inputs):
        """Of each row the answers to its copies, every copy a call of its own."""
        images = find_images(inputs, self.model.config)
        if images is None:
            return [(answer,) * COPIES for answer in self.answers(inputs)]
        noise = NoiseSource(images, sigma=SIGMA, statistics=None, seed=0)
        pixels = [images.values, *(noise.copy(number) for number in range(1, COPIES))]
        return list(zip(*(self.answers({**inputs, images.key: values}) for values in pixels), strict=True))

    def separate_rows(self, rows):
        """`separate` of whole rows; copies of sounds are noisy clips put through the processor, as if they had been recorded so."""
        inputs = self.inputs(*rows)
        media = find_media(inputs, self.model.config)
        if media is None or media.sounds is None:
            return self.separate(inputs)
        noise = WaveformNoise(media.sounds, sigma=AUDIO_SIGMA, snr=None, seed=0)
        rate, columns = extractor_of(self.processor).sampling_rate, [self.answers(inputs)]
        for number in range(1, COPIES):
            clips = iter(noise.clips(number))
            noisy = [([_whole(clips, len(tone(one, rate))) for one in sounds], text) for sounds, text in rows]
            columns.append(self.answers(self.inputs(*noisy)))
        return list(zip(*columns, strict=True))


def _whole(clips, length):
    """A sound of that length again, of whose windows the clips are."""
    parts = [next(clips)]
    while sum(map(len, parts)) < length:
        parts.append(next(clips))
    return np.concatenate(parts)


def row_of(*pictures, text="What is it?"):
    return pictures, text
