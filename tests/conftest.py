"""Fixtures: the embedded trained model, a few scenes, a cache of its own for every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small lose more by waiting for threads than they win
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in the lmms-eval wrappers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image
from tiny_models import ARCHITECTURES
from tiny_models.subject import Subject

import hf_integration
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt
from lmms_smoothguard.tiny.scenes import make_scenes


@pytest.fixture(scope="session")
def trained():
    """The embedded model and its processor, shared: read-only."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval()
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


@pytest.fixture
def llava(trained):
    """The embedded model with its generation config put back after the test."""
    model, processor = trained
    hf_integration.enable()
    hf_integration.attach(model, processor)
    yield model, processor
    model.generation_config.smoothguard = None
    hf_integration.enable()


@pytest.fixture(scope="session")
def scenes():
    return make_scenes(12, 500)


@pytest.fixture(scope="session")
def images(scenes):
    return [Image.fromarray(image) for image in scenes.images]


@pytest.fixture
def batch(trained, scenes, images):
    """Makes processor inputs for scenes by number, each with an existence question of its own length."""
    _, processor = trained

    def make(*numbers, question=None):
        texts = [
            prompt(
                question or language.existence_question(scenes.present(n)[0]) + (language.POPE_SUFFIX if n % 2 else "")
            )
            for n in numbers
        ]
        return processor(images=[images[n] for n in numbers], text=texts, padding=True, return_tensors="pt")

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOOTHGUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unchanged_random_state():
    """Fails the test if it moves torch's global random state."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def subject(request):
    """Every architecture in turn, of tiny size with random weights."""
    return Subject(request.param)


@pytest.fixture(scope="session")
def pictures(images):
    """Square, wide, tall, each of another scene."""
    return images[0], images[1].resize((150, 60)), images[2].resize((50, 120))


@pytest.fixture
def attack_jobs(trained, images, batch):
    """A job for each of the first scenes: its existence question, away from the right answer (or what else is asked)."""
    from attack_jobs import job_of

    def make(count=4, answer="Yes", **settings):
        return [job_of(trained, images[n], batch(n), answer, **settings) for n in range(count)]

    return make


@pytest.fixture
def attack_crafter(trained, tmp_path):
    """Makes crafters with a cache of this test."""
    from lmms_smoothguard.attacks.cache import AttackCache
    from lmms_smoothguard.attacks.craft import Crafter

    model, processor = trained

    def make(model=model, **kwargs):
        return Crafter(model, processor.image_processor, AttackCache(tmp_path / "crafted"), quiet=True, **kwargs)

    return make


@pytest.fixture
def poison_clean_copy(monkeypatch):
    """Other pixels in the place of copy 0, as if the clean picture had been attacked so well that noise undoes it."""

    def poison(pixels):
        from lmms_smoothguard.defenses.copies import Copies

        honest = Copies.__call__

        def copies(self, numbers):
            made = honest(self, numbers)
            return [{"pixel_values": pixels} if number == 0 else one for number, one in zip(numbers, made, strict=True)]

        monkeypatch.setattr(Copies, "__call__", copies)

    return poison
