"""One architecture under test: its answers, defended and not, copy by copy."""

from __future__ import annotations

import pytest

import hf_integration
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.noise import NoiseSource
from tiny_models import COVERED

COPIES, SIGMA = 5, 2.0
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


class Subject:
    """One architecture, built."""

    def __init__(self, name):
        if name == "smolvlm":
            pytest.importorskip("num2words")  # its processor asks for it
        self.kind = COVERED[name]
        self.model, self.processor = self.kind.build()
        hf_integration.attach(self.model, self.processor)

    def inputs(self, *rows):
        return self.kind.inputs(self.processor, rows)

    def defended(self, inputs, **config):
        config = {"sigma": SIGMA, "num_samples": COPIES} | config
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


def row_of(*pictures, text="What is it?"):
    return pictures, text
