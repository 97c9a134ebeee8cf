"""lmms-eval beyond LLaVA: its own Qwen2-VL wrapper, and every wrapper that can be imported here.

The Qwen2-VL is of tiny size with random weights: it shows that the ways fit, and no figure of it is a result.
"""

from __future__ import annotations

import pytest
from managers import task_manager
from tiny_models import ARCHITECTURES


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The directory of a tiny Qwen2-VL."""
    model, processor = ARCHITECTURES["qwen2_vl"].build()
    directory = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def test_attack_and_defence_through_lmms_evals_qwen2_vl_wrapper(qwen):
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model="smoothguard_qwen2_vl",
        model_args=f"pretrained={qwen},sigma=0.5,noise_space=pixel,num_samples=3,attack_steps=2,min_pixels=3136,max_pixels=12544",
        tasks=["shapes_pope_pgd"], limit=2, batch_size=1, bootstrap_iters=0,
        task_manager=task_manager("smoothguard_qwen2_vl"),
    )  # fmt: skip
    for sample in found["samples"]["shapes_pope_pgd"]:
        info = sample["token_counts"][0]
        assert 0.03 < info["attack_rendering_gap"] < 0.15  # upstream's simple wrapper sends images through JPEG
        assert 0 < info["attack_linf"] <= 4 / 255 + 1e-6
        assert len(info["candidates"]) == 3


def test_every_wrapper_that_upstream_can_import_is_made(capsys):
    """Where ours cannot be made, upstream's own import fails for the same reason: a media library is not installed."""
    models = pytest.importorskip("lmms_eval.models")
    from lmms_smoothguard.harness.lmms_eval.bases import BASES, BLACK_BOXES
    from lmms_smoothguard.harness.lmms_eval.black_boxes import BlackBoxMixin
    from lmms_smoothguard.harness.lmms_eval.wrappers import SmoothGuardMixin

    made = 0
    for base in (*BASES, *BLACK_BOXES):
        manifest = models.get_model_manifest(f"smoothguard_{base}")
        for simple in (False, True):
            if (manifest.simple_class_path if simple else manifest.chat_class_path) is None:
                continue
            try:
                upstream = models.get_model(base, force_simple=simple)
            except (ImportError, AttributeError) as error:
                with pytest.raises(type(error)):
                    models.get_model(f"smoothguard_{base}", force_simple=simple)
                continue
            ours = models.get_model(f"smoothguard_{base}", force_simple=simple)
            assert issubclass(ours, SmoothGuardMixin)
            assert issubclass(ours, BlackBoxMixin) == (base in BLACK_BOXES)
            assert issubclass(ours, upstream)
            made += 1
    assert made >= 25
