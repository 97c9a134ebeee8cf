"""The pages' Python on sounds, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import hf_integration
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.sounds import sound_of
from lmms_smoothguard.tiny import place

datasets = pytest.importorskip("datasets")
ROOT = Path(__file__).parent.parent
CLIP = ROOT / "tasks/sounds/data/pope.parquet"


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """A clip with a spoken three in it, as a file beside which a page's code runs."""
    import pyarrow.parquet

    row = pyarrow.parquet.read_table(CLIP).slice(0, 1).to_pylist()[0]
    assert (row["question"], row["answer"]) == ("Is there a spoken three in the recording?", "yes")
    monkeypatch.chdir(tmp_path)
    made = sound_of(row["audio"])
    Path("mine.wav").write_bytes(made.wav)
    return made


def blocks(text):
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_one_clip_is_attacked_as_the_page_shows(recording):
    code = blocks((ROOT / "docs/attacking.md").read_text())
    found: dict = {}
    exec(code, found)
    made = sound_of("adversarial.wav")
    assert 0 < np.abs(made.samples - recording.samples).max() <= 0.001 + 1e-6
    answers = [found[name].text for name in ("clean", "plain", "defended")]
    assert answers == re.search(r"print\(clean.*#(.*)", code)[1].split()


def test_a_model_that_hears_is_loaded_and_defended_as_the_readme_shows(recording):
    whole = (ROOT / "README.md").read_text()
    code = blocks(whole[whole.index("**Sounds.** `generate` sees") : whole.index("`SmoothGuardConfig.paper()`")])
    found = {"hf_integration": hf_integration, "place": place("tiny-audio"), "clip": recording.samples}
    assert "AutoModelForMultimodalLM.from_pretrained(place)" in code
    with hf_integration.observe() as seen:
        exec(code, found)
    assert CLIPS in found["inputs"]
    ((verdict,),) = seen.verdicts
    assert verdict.num_samples_used == 10
