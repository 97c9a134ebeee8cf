"""With the plugin installed and nothing asked of it, transformers, lmms-eval and lm-eval do what they do without it.

"Without it" is the same interpreter whose entry points have lost ours, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_integration
from lmms_smoothguard.tiny.model import MODEL_DIR

HERE = Path(__file__).parent
PREFIX = "smoothguard_"


def told(code, *, hidden):
    """What the last line of a process's output says, as JSON; `hidden`: without our entry points."""
    start = [sys.executable, str(HERE / "hidden_plugin.py"), code] if hidden else [sys.executable, "-c", code]
    done = subprocess.run(
        start, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}, {"num_return_sequences": 2, "num_beams": 2}],
)
def test_generate_is_what_it_was(trained, batch, settings):
    """The override stands, the config says nothing: tokens, scores, types and the random state are the plain model's."""
    model, _ = trained
    inputs = batch(0, 1)

    def run():
        torch.manual_seed(3)
        out = model.generate(**inputs, max_new_tokens=8, output_scores=True, return_dict_in_generate=True, **settings)
        return out, torch.random.get_rng_state()

    hf_integration.disable()
    try:
        plain, plain_state = run()
    finally:
        hf_integration.enable()
    ours, state = run()
    assert type(ours) is type(plain)
    assert set(ours) == set(plain)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))
    assert torch.equal(state, plain_state)


def test_importing_transformers_alone_does_not_know_of_us():
    """The override is somebody's import or an entry point of a harness; transformers has none."""
    code = (
        "import json, sys, transformers; from transformers import LlavaForConditionalGeneration as L; "
        "print(json.dumps([L.generate.__module__, any(name.split('.')[0] in ('lmms_smoothguard', 'hf_integration') for name in sys.modules)]))"
    )
    assert told(code, hidden=False) == told(code, hidden=True) == ["transformers.generation.utils", False]


# -- lmms-eval ---------------------------------------------------------------------------------------------------------

LISTS = """
import json, os, sys
import lmms_eval.models as models
from lmms_eval.tasks import TaskManager
manager = TaskManager("ERROR", model_name="llava_hf")
print(json.dumps({
    "simple": dict(models.AVAILABLE_SIMPLE_MODELS), "chat": dict(models.AVAILABLE_CHAT_TEMPLATE_MODELS),
    "tasks": {name: [entry["type"], str(entry["yaml_path"])] for name, entry in manager.task_index.items()},
    "model": manager.model_name, "torch": "torch" in sys.modules,
}))
"""


@pytest.mark.slow
def test_lmms_evals_own_models_and_tasks_are_all_there_and_the_same():
    pytest.importorskip("lmms_eval")
    ours, theirs = (told(LISTS, hidden=hidden) for hidden in (False, True))
    for table in ("simple", "chat"):
        assert {name: path for name, path in ours[table].items() if not name.startswith(PREFIX)} == theirs[table]
        assert len(ours[table]) > len(theirs[table])
    added = set(ours["tasks"]) - set(theirs["tasks"])
    assert {name: ours["tasks"][name] for name in theirs["tasks"]} == theirs["tasks"]
    assert added
    # A tag or group of upstream's has no member of ours.
    assert all("lmms_smoothguard" in ours["tasks"][name][1] or "/tasks/" in ours["tasks"][name][1] or
               ours["tasks"][name][1] == "-1" for name in added)  # fmt: skip
    assert ours["model"] == theirs["model"] == "llava_hf"


ANSWERS = f"""
import json
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
import lmms_smoothguard
path = next(iter(lmms_smoothguard.__path__))
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
manager = TaskManager("ERROR", include_path=str(tasks_path()), include_defaults=False, model_name="llava_hf")
found = simple_evaluate(
    model="llava_hf", model_args="pretrained={MODEL_DIR},device_map=cpu", tasks=["shapes_pope", "shapes_caption"],
    limit=4, batch_size=1, bootstrap_iters=0, task_manager=manager, device="cpu",
)
rows = {{t: [[s["doc_id"], s["filtered_resps"], s["resps"]] for s in found["samples"][t]] for t in found["samples"]}}
print(json.dumps([found["results"], rows, sorted(found)], default=str))
"""


@pytest.mark.slow
def test_lmms_evals_own_model_gives_the_results_it_gives_without_us():
    pytest.importorskip("lmms_eval")
    ours, theirs = (told(ANSWERS, hidden=hidden) for hidden in (False, True))
    assert ours == theirs
    assert ours[0]["shapes_pope"]["pope_accuracy,none"] == 1.0


# -- lm-eval -----------------------------------------------------------------------------------------------------------


def test_lm_eval_does_not_know_of_us_until_it_is_asked_to():
    pytest.importorskip("lm_eval")
    code = (
        "import json, sys, lm_eval.evaluator, lm_eval.models; from lm_eval.api.registry import model_registry as r; "
        "from lm_eval.tasks import TaskManager; "
        "before = sorted(r); ours = any(name.split('.')[0] in ('lmms_smoothguard', 'hf_integration') for name in sys.modules); "
        "from lmms_smoothguard.harness.lm_eval import registering; registering.register(); "
        "print(json.dumps([before, sorted(set(r) - set(before)), sorted(set(before) - set(r)), ours]))"
    )
    before, added, lost, ours = told(code, hidden=False)
    assert added == ["smoothguard-hf-multimodal"]
    assert not lost
    assert not ours
    assert "hf-multimodal" in before
