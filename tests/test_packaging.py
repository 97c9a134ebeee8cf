"""What a newcomer meets first: light imports, found entry points, a wheel that works as the checkout does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, executable: str = sys.executable, cwd: Path | None = None) -> str:
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "package", ["lmms_smoothguard", "hf_integration", "lmms_smoothguard.harness.lmms_eval.manifests"]
)
def test_importing_loads_neither_torch_nor_transformers(package):
    loaded = python(
        f"import sys, {package}; print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_hf_integration_before_or_after_transformers():
    check = "assert hasattr(GenerationMixin.generate, '__smoothguard_original__')"
    python(f"import hf_integration; from transformers import GenerationMixin; {check}")
    python(f"from transformers import GenerationMixin; import hf_integration; {check}")
    python(f"from hf_integration import attach; from transformers import GenerationMixin; {check}")
    python(f"import hf_integration.override; from transformers import GenerationMixin; {check}")
    python("import hf_integration; hf_integration.disable(); import hf_integration.override; from transformers import GenerationMixin; "
           "assert not hasattr(GenerationMixin.generate, '__smoothguard_original__')")  # fmt: skip
    python("import hf_integration; hf_integration.disable(); from transformers import GenerationMixin; "
           "assert not hasattr(GenerationMixin.generate, '__smoothguard_original__')")  # fmt: skip


LOADED_BEFORE = """
import functools, torch
from transformers import AutoModelForImageTextToText, GenerationMixin, LlavaForConditionalGeneration

class LlavaForConditionalGeneration(LlavaForConditionalGeneration):
    generate = functools.partialmethod(GenerationMixin.generate, max_new_tokens=2)

class Neighbour:
    def __getattribute__(self, name):
        print("asked for", name)
        return super().__getattribute__(name)

neighbour = Neighbour()
own = AutoModelForImageTextToText.from_pretrained({own!r}, trust_remote_code=True)
partial = LlavaForConditionalGeneration.from_pretrained({plain!r})
import hf_integration
ids = torch.tensor([[1] + [partial.config.image_token_id] * 64 + [5]])
request = dict(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64), return_dict_in_generate=True)
hf_integration.force({{"num_samples": 3}})
try:
    print(own.generate(**request))
except ValueError as error:
    print(type(error).__name__)
print(len(partial.generate(**request).smoothguard[0].candidates))
"""


def test_models_loaded_before_hf_integration_are_defended_or_refused(tmp_path):
    """Those with generation code of their own on the instance, and odd things in their class; no other object is touched."""
    own = tmp_path / "own_code"
    shutil.copytree(ROOT / "lmms_smoothguard" / "tiny" / "llava", own)
    (own / "custom_generate").mkdir()
    (own / "custom_generate" / "generate.py").write_text("def generate(model, **arguments):\n    return 'undefended'\n")
    plain = str(ROOT / "lmms_smoothguard" / "tiny" / "llava")
    assert python(LOADED_BEFORE.format(own=str(own), plain=plain)).splitlines() == ["UndefendableError", "3"]


def test_a_callback_outlives_a_mere_look_and_a_failed_import(tmp_path):
    (tmp_path / "shaky.py").write_text("import os\nif os.environ.get('SHAKY'):\n    raise RuntimeError('not now')\n")
    python(
        "import importlib.util, os, sys; sys.path.insert(0, '.')\n"
        "from lmms_smoothguard.late_import import when_imported\n"
        "seen = []; when_imported('shaky', seen.append); importlib.util.find_spec('shaky'); os.environ['SHAKY'] = '1'\n"
        "try: import shaky\nexcept RuntimeError: pass\n"
        "assert not seen; del os.environ['SHAKY']; import shaky; assert seen == [shaky]\n"
        "when_imported('shaky', seen.append); assert seen == [shaky] * 2",
        cwd=tmp_path,
    )


def test_the_entry_point_is_cheap():
    """Under 0.1 s of `lmms-eval models`, and no torch: measured as what our callable takes in that process."""
    measured = python(
        "import time, sys; import importlib.metadata as m\n"
        "import lmms_eval.models\n"
        "for name in [n for n in sys.modules if n.startswith(('lmms_smoothguard', 'pluggy'))]: del sys.modules[name]\n"
        "entry = next(e for e in m.entry_points(group='lmms_eval.models') if e.name == 'smoothguard')\n"
        "start = time.perf_counter(); found = entry.load()(); seconds = time.perf_counter() - start\n"
        "assert found and 'torch' not in sys.modules; print(seconds)"
    )
    assert float(measured) < 0.1


def test_every_package_is_listed():
    """setuptools is told every package by name, because `tasks` stands outside."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for top, prefix in (("lmms_smoothguard", ""), ("hf_integration", ""), ("tasks", "lmms_smoothguard.")):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(prefix + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == found


def test_a_wheel_in_an_empty_environment_works_as_the_checkout_does(tmp_path, trained, batch):
    """Core dependencies only: no harness is installed, and the defended answers are the same."""
    model, _ = trained
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("lmms_smoothguard/tasks/shapes/data/pope.parquet", "lmms_smoothguard/tasks/shapes/_pope_template",
                   "lmms_smoothguard/tiny/llava/model.safetensors", "lmms_smoothguard/tiny/guard/model.safetensors",
                   "lmms_smoothguard/tasks/mm_safety/scenarios.jsonl", "lmms_smoothguard/tasks/mm_safety/_mm_safety_template", "lmms_smoothguard/report/page.html.j2", "hf_integration/override.py"):  # fmt: skip
        assert wanted in names
    assert not [name for name in names if name.startswith(("tests/", "tasks/", "benchmarks/"))]
    environment = tmp_path / "venv"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
    executable = str(environment / "bin" / "python")
    install = [*uv, "pip", "install", "-q", "--python", executable, "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True)
    answer = python(
        "import importlib.util, json, subprocess, sys, os\n"
        "assert importlib.util.find_spec('lmms_eval') is None\n"
        "import hf_integration\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from PIL import Image\n"
        "from lmms_smoothguard.tiny import scenes, model as tiny\n"
        "bin = os.path.dirname(sys.executable)\n"
        "where = subprocess.run([bin + '/smoothguard', 'model', 'tiny-llava'], capture_output=True, text=True, check=True).stdout.strip()\n"
        "tasks = subprocess.run([bin + '/smoothguard', 'tasks-path'], capture_output=True, text=True, check=True).stdout.strip()\n"
        "assert os.path.exists(tasks + '/shapes/shapes_pope_pgd.yaml')\n"
        "m = AutoModelForImageTextToText.from_pretrained(where).eval(); p = AutoProcessor.from_pretrained(where)\n"
        "picture = Image.fromarray(scenes.make_scenes(12, 500).images[0])\n"
        "inputs = p(images=[picture], text=tiny.prompt('Describe the image.'), return_tensors='pt')\n"
        "out = m.generate(**inputs, max_new_tokens=32, smoothguard={'sigma': 0.2, 'noise_space': 'pixel'}, return_dict_in_generate=True)\n"
        "print(json.dumps(out.smoothguard[0].texts))",
        executable,
        tmp_path,
    )
    inputs = batch(0, question="Describe the image.")
    here = model.generate(
        **inputs, max_new_tokens=32, smoothguard={"sigma": 0.2, "noise_space": "pixel"}, return_dict_in_generate=True
    )
    assert json.loads(answer.splitlines()[-1]) == list(here.smoothguard[0].texts)


def test_shipped_sizes():
    weights = list((ROOT / "lmms_smoothguard/tiny/llava").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) <= 12e6
    assert not list((ROOT / "lmms_smoothguard/tiny/llava").glob("*.bin"))
    assert sum(file.stat().st_size for file in (ROOT / "tasks/shapes/data").iterdir()) <= 5e6


def test_errors_on_the_command_line_have_no_traceback():
    smoothguard = Path(sys.executable).parent / "smoothguard"
    done = subprocess.run(
        [smoothguard, "model", "tiny-lava"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 2
    assert "did you mean 'tiny-llava'" in done.stderr
    assert "Traceback" not in done.stderr
