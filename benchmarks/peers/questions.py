"""Questions about the embedded scenes, and the embedded model as what the libraries attack: a classifier of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt

QUESTIONS = Path(__file__).parent.parent.parent / "tasks" / "shapes" / "data" / "pope.parquet"
_BITS = 16


@dataclass(frozen=True)
class Question:
    """scene: where the picture comes from, several questions have one; inputs: the processor's for the clean picture; label:
    the one token that the model answers when clean."""

    name: str
    scene: str
    image: Image.Image
    inputs: Mapping[str, torch.Tensor]
    right: str
    label: int
    clean_right: bool


class Subject:
    """The embedded model, its processor, and how it answers."""

    def __init__(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(MODEL_DIR)

    def answer(self, image: Image.Image, inputs: Mapping[str, torch.Tensor]) -> tuple[list[int], str]:
        """Through the ordinary path: an 8-bit picture, the image processor, greedy `generate`."""
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        out = self.model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=8, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        said = [token for token in ids if token != self.processor.tokenizer.eos_token_id]
        return said, str(self.processor.decode(said))

    def questions(self, count: int) -> list[Question]:
        """The first `count` of the existence questions. Raises ValueError where the answer is not one token."""
        import pyarrow.parquet

        found = []
        for row in pyarrow.parquet.read_table(QUESTIONS).slice(0, count).to_pylist():
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            inputs = dict(self.processor(images=[image], text=prompt(row["question"]), return_tensors="pt"))
            said, text = self.answer(image, inputs)
            if len(said) != 1:
                raise ValueError(
                    f"question {row['question_id']} is answered {text!r}, {len(said)} tokens; a classifier has one"
                )
            right = normalize_answer(row["answer"])
            found.append(
                Question(
                    row["question_id"],
                    row["image_source"],
                    image,
                    inputs,
                    right,
                    said[0],
                    normalize_answer(text) == right,
                )
            )
        return found

    def still_right(self, question: Question, picture: torch.Tensor) -> bool:
        """Whether the answer to an 8-bit picture (3, height, width) in [0, 1] is right."""
        array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return normalize_answer(self.answer(Image.fromarray(array), question.inputs)[1]) == question.right


def pictures_of(questions: Sequence[Question]) -> torch.Tensor:
    """(questions, 3, height, width) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(q.image)).permute(2, 0, 1) / 255 for q in questions])


class QuestionClassifier(torch.nn.Module):
    """Pictures -> the logits of all tokens at the answer's position: the class is the answer's token.

    Every row has a question of its own, and the libraries pick rows out of a batch without telling: so a picture carries
    its question's number, as bits in one more line of pixels. No gradient goes there, and a bit holds as long as an attack
    moves it by less than 1/2, which random starts in the budgets used here do not. An unknown number (libraries try all
    ones to look at the output) is taken modulo the questions.
    """

    def __init__(self, subject: Subject, questions: Sequence[Question]) -> None:
        super().__init__()
        if len(questions) > 2**_BITS:
            raise ValueError(f"{len(questions)} questions; expected at most {2**_BITS}")
        if len({q.inputs["input_ids"].shape for q in questions}) > 1:
            raise ValueError("prompts of several lengths; expected one, so that nothing is padded")
        self.inner = subject.model
        processor = subject.processor.image_processor
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1))
        self.register_buffer("ids", torch.cat([q.inputs["input_ids"] for q in questions]))
        self.register_buffer("bits", 2 ** torch.arange(_BITS))
        rendered = self.normalised(self.carrying(pictures_of(questions[:8]), range(min(8, len(questions)))))
        expected = torch.cat([q.inputs["pixel_values"] for q in questions[:8]])
        if not torch.allclose(rendered, expected, atol=1e-5):
            raise ValueError(
                "the processor does more than normalise these pictures; expected pictures of the model's size"
            )

    def carrying(self, pictures: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """(batch, 3, height + 1, width): the pictures, each with its question's number below."""
        line = torch.zeros(*pictures.shape[:2], 1, pictures.shape[3])
        line[:, 0, 0, :_BITS] = (torch.as_tensor(numbers).view(-1, 1) // self.bits % 2).float()
        return torch.cat([pictures, line], dim=2)

    def numbers(self, carried: torch.Tensor) -> torch.Tensor:
        """(batch,): what each picture carries."""
        return ((carried.detach()[:, 0, -1, :_BITS] > 0.5) * self.bits).sum(1)

    def normalised(self, carried: torch.Tensor) -> torch.Tensor:
        """What the model gets."""
        return (carried[:, :, :-1] - self.mean) / self.std

    def forward(self, carried: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary)."""
        ids = self.ids[self.numbers(carried) % len(self.ids)]
        output = self.inner(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.normalised(carried.float()),
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
