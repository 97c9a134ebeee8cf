"""A distribution of somebody else's, installed for real: what it adds works, and what is broken in others harms nobody."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "tests" / "example_plugin"
PAGE = ROOT / "docs" / "write-your-own.md"

PRELUDE = """
import json, logging, torch
logging.basicConfig(level=logging.WARNING)
import hf_integration
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt
from lmms_smoothguard.tiny.scenes import make_scenes
model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval()
processor = AutoProcessor.from_pretrained(MODEL_DIR)
picture = Image.fromarray(make_scenes(12, 500).images[1])
inputs = processor(images=[picture], text=prompt("Describe the image."), return_tensors="pt")
found = {}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory on the path with the example distribution in it."""
    where = tmp_path_factory.mktemp("site")
    copied = tmp_path_factory.mktemp("source") / "example"
    subprocess.run(["cp", "-r", str(EXAMPLE), str(copied)], check=True)
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--target", str(where), str(copied)]
    subprocess.run(command, check=True)
    return where


def distribution(where, name, entry, code):
    """A second installed distribution: its metadata, and one module."""
    info = where / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    module = entry.partition(":")[0]
    (info / "entry_points.txt").write_text(f"[lmms_smoothguard.plugins]\nexample = {entry}\n")
    if code is not None:
        (where / f"{module}.py").write_text(code)


def run(code, *paths):
    """(what the code left in `found`, its standard error)."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT)])}
    script = f"{PRELUDE}{code}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_page_shows_the_distribution_that_is_tested():
    blocks = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    files = [file for file in EXAMPLE.rglob("*") if file.suffix in (".py", ".toml") and file.name != "__init__.py"]
    assert set(blocks) == {str(file.relative_to(EXAMPLE)) for file in files}
    for file in files:
        text = file.read_text()
        assert blocks[str(file.relative_to(EXAMPLE))] == text
        assert len([line for line in text.splitlines() if line.strip()]) <= 20


def wrong(samples):
    return sum(str(sample["clean_answer"]).strip() not in str(sample["answer"]) for sample in samples)


def test_every_part_works_where_built_in_ones_do(installed):
    found, warnings = run(
        """
plain = model.generate(**inputs, max_new_tokens=12)
with hf_integration.observe() as seen:
    soft = model.generate(**inputs, max_new_tokens=12, smoothguard={"defense": "blur", "width": 1e-3})
    hard = model.generate(**inputs, max_new_tokens=12, smoothguard={"defense": "blur", "width": 50.0})
found["blur"] = [torch.equal(plain, soft), torch.equal(plain, hard), seen.defended]
model.generation_config.smoothguard = {"defense": "blur"}
found["kept"] = model.generation_config.smoothguard
try:
    model.generation_config.smoothguard = {"defense": "blur", "widht": 1.0}
except ValueError as error:
    found["typo"] = str(error)
model.generation_config.smoothguard = None
wild = {"sigma": 0.8, "noise_space": "pixel", "embedder": "words"}
out = model.generate(**inputs, max_new_tokens=12, smoothguard=wild, return_dict_in_generate=True)
found["distinct"] = len(set(out.smoothguard[0].texts)); found["labels"] = max(out.smoothguard[0].labels)
from lmms_smoothguard.harness.lmms_eval.safety import safety_scores
asked = {"question": "one two three", "kind": "forbidden"}
found["judged"] = [safety_scores(asked, "a b c d", judge=judge)["unsafe_rate"] for judge in ("short", "short/4", "refusal+short/3")]
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
for defense in ("defense=blur,width=2.0", "defense=none", "defense=blur,width=2.0,attack_eot=1,attack_decay=0.5"):
    results = simple_evaluate(
        model="smoothguard_llava", model_args=f"pretrained={MODEL_DIR},{defense},attack=momentum,attack_eps=8/255,attack_steps=8",
        tasks=["shapes_pope"], limit=6, batch_size=1, bootstrap_iters=0, task_manager=TaskManager("ERROR", model_name="smoothguard_llava"))
    found[defense] = [s["token_counts"][0] | {"answer": s["filtered_resps"]} for s in results["samples"]["shapes_pope"]]
""",
        installed,
    )
    assert "is left out" not in warnings
    assert found["blur"] == [True, False, 2]
    assert found["kept"] == {"defense": "blur"}
    assert "did you mean 'width'" in found["typo"]
    assert found["distinct"] > 2  # so that the embedder was asked
    assert found["labels"] == 1
    assert [judged["verdict"] for judged in found["judged"]] == ["unsafe", "safe", "unsafe"]
    assert found["judged"][2]["verdicts"]["short/3"]["reason"] == "4 words to a question of 3"
    assert "smoothguard-example" in found["judged"][0]["judges"]["short"]  # whose code, for want of a version
    for sample in found["defense=blur,width=2.0"]:
        assert sample["defended"] is True
        assert sample["attack"]["name"] == "momentum"
        assert 0 < sample["attack_linf"] <= 8 / 255 + 1e-6
        assert sample["attack"]["decay"] == 1.0
    through = found["defense=blur,width=2.0,attack_eot=1,attack_decay=0.5"]
    assert all(sample["attack"]["decay"] == 0.5 for sample in through)
    assert wrong(through) > wrong(found["defense=blur,width=2.0"])  # an attacker who knows the blur goes through it
    undefended = found["defense=none"]
    assert all("defended" not in sample for sample in undefended)
    assert wrong(undefended) >= 4  # the attack does attack


def test_broken_and_duplicate_distributions_are_warnings_that_name_them(installed, tmp_path):
    distribution(tmp_path, "gone-wrong", "gone_wrong", "raise RuntimeError('bad day')")
    distribution(tmp_path, "not-there", "not_there:x", None)
    distribution(
        tmp_path,
        "copy-cat",
        "copy_cat",
        "from lmms_smoothguard import hookimpl\n"
        "@hookimpl\ndef smoothguard_defenses(): return {'blur': 'copy_cat:x', 'smoothguard': 'copy_cat:x', 'cat': 'copy_cat:x'}\n",
    )
    found, warnings = run(
        """
from lmms_smoothguard import plugins
found["defenses"] = {name: offer.owner for name, offer in plugins.offers("defenses").items()}
out = model.generate(**inputs, max_new_tokens=4, smoothguard=True, return_dict_in_generate=True)
found["copies"] = out.smoothguard[0].num_samples_used
""",
        installed,
        tmp_path,
    )
    assert found["copies"] == 10
    owners = found["defenses"]
    assert owners["smoothguard"] == "lmms_smoothguard"
    assert owners["cat"] == "copy-cat:example"
    assert {"smoothguard-example:example", "copy-cat:example"} > {owners["blur"]} > set()
    assert "of gone-wrong is left out: RuntimeError: bad day" in warnings
    assert "of not-there is left out: ModuleNotFoundError" in warnings
    assert "defense 'smoothguard' of copy-cat:example is left out: lmms_smoothguard has that name" in warnings
    assert re.search(r"defense 'blur' of \S+ is left out: \S+ has that name", warnings)


FAILURES = """
from lmms_smoothguard.errors import explain
for key, config in asked.items():
    try:
        model.generate(**inputs, max_new_tokens=12, smoothguard=config)
        found[key] = "answered"
    except Exception as error:
        found[key] = explain(error)
"""


def test_what_fails_on_use_fails_the_request_and_is_named(tmp_path):
    """Never an undefended answer in its place."""
    distribution(
        tmp_path,
        "careless",
        "careless",
        "from dataclasses import dataclass\n"
        "from lmms_smoothguard import hookimpl\n"
        "from lmms_smoothguard.defenses import Defense\n"
        "@dataclass(frozen=True)\nclass Config: x: int = 0\n"
        "RAISES = Defense(Config, lambda request, config: 1 / config.x)\n"
        "SLEEPS = Defense(Config, lambda request, config: None)\n"
        "LIES = Defense(Config, lambda request, config: request.generate(**request.arguments))\n"
        "def BARE(request, config): return None\n"
        "@hookimpl\ndef smoothguard_defenses():\n"
        "    return {n.lower(): f'careless:{n}' for n in ('RAISES', 'SLEEPS', 'LIES', 'BARE', 'ABSENT')}\n"
        "@hookimpl\ndef smoothguard_embedders(): return {'flat': 'careless:flat'}\n"
        "def flat(context): return lambda texts: [1.0] * len(texts)\n",
    )
    wild = {"sigma": 0.8, "noise_space": "pixel"}  # three answers and more, so that an embedder is asked
    asked = {name: {"defense": name} for name in ("raises", "sleeps", "lies", "bare", "absent")}
    asked |= {"flat": wild | {"embedder": "flat"}, "fine": wild}
    found, _ = run(f"asked = {asked!r}{FAILURES}", tmp_path)
    assert found.pop("fine") == "answered"
    complaints = {
        "raises": "ZeroDivisionError: division by zero",
        "sleeps": "did nothing with a request that has media",
        "lies": "returned a Tensor; expected lmms_smoothguard.defenses.Defended",
        "bare": "has no config dataclass",
        "absent": "cannot be loaded from careless:ABSENT",
        "flat": "gave an array of shape (6,) for 6 texts",
    }
    assert set(found) == set(complaints)
    for name, complaint in complaints.items():
        assert "careless:example" in found[name]
        assert complaint in re.sub(r"\(\d+,\) for \d+", "(6,) for 6", found[name])
